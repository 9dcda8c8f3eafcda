"""Backends, which compute answers behind one interface."""
