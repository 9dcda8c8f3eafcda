"""`smol run`: a file of queries to a file of results."""
