"""The model in torch's own operators: runs wherever torch does, GPUs included."""
