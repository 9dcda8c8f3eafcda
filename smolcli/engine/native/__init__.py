"""The model on native C kernels, compiled ahead of time for each CPU variant."""
