"""`smol bench`: how fast this machine answers, and how fast others do on the same questions."""
