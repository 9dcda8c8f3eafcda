"""The engine: token ids in, token ids out. It deals with no text, JSON, HTTP or files."""
