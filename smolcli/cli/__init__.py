"""The command line: the only package that writes to stdout."""
