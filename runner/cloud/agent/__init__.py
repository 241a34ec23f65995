"""Programs that run in the pod: standard library only, Python 3.10 or later."""
