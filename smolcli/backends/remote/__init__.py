"""Another service over HTTP."""
