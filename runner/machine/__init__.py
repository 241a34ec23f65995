"""This machine: hardware, kernels, network and writable folders."""
