"""Workers on a Ray cluster as a backend."""
