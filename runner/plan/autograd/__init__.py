"""The memory of one training step: autograd on sizes alone, operation by operation."""
