"""`smol bench`: throughput of a backend, and of transformers on the same work."""
