"""Unchanged clients of other projects, driven against a running server."""
