"""The engine: token ids in, token ids out. Knows no text, JSON, HTTP or files."""
