"""`smol serve`: a Flask application on the Waitress WSGI server."""
