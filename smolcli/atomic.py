"""Files that other processes see whole or not at all."""

import os
import threading
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it; the last of concurrent writers wins.

    Raises:
        OSError: the directory is missing or not writable.
    """
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    partial.write_bytes(data)
    partial.replace(path)
