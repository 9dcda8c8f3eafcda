"""The same pipeline over HTTP: Flask on Waitress."""
