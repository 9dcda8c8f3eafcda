"""JSON to queries and results to JSON; no I/O."""
