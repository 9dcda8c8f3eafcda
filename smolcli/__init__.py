"""smol: a batch processor, and a server, for SmolLM2 on your own machine."""

__version__ = "0.1.0"
