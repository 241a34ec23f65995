"""Processes of a run: torchrun, nodes, the supervisor, and the diagnosis of failures."""
