"""This machine: hardware, kernels, network and which folders can be written."""
