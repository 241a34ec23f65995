"""Checks of this machine for a run, each with a remedy; nothing here imports torch."""
