"""What the README claims, measured: `python -m benchmarks` runs all and writes docs/benchmarks.md."""
