"""Processes of a run: torchrun, nodes, the supervisor, and why a process failed."""
