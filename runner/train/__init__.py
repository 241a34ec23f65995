"""The worker. Only this package imports torch, transformers, trl, peft and deepspeed."""
