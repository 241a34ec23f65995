"""The worker: torch, transformers, trl, peft and deepspeed are imported here and nowhere else."""
