"""Other servers as a backend, over HTTP."""
