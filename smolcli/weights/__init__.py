"""Finding, downloading, storing and loading models."""
