"""An emulated RunPod on this machine: REST v2 with pods that are real ssh servers, and injected faults
(docs/emulator.md)."""
