"""Measurements of a model: held-out loss, answers, benchmarks."""
