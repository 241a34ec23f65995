"""A RunPod on this machine: REST v2 with pods that are real ssh servers, and faults on demand (docs/emulator.md)."""
