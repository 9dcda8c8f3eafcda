"""The model in kernels of our own, compiled for the CPU that they run on."""
