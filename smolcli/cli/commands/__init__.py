"""The commands, one per module: `smol run` is `run.run`."""
