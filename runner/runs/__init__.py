"""The life of a run on this machine: check, launch, resume, sweep, and use afterwards."""
