"""The model in torch's operators, for GPUs and for shapes that the CPU kernels do not support."""
