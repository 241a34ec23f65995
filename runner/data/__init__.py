"""Rows become token ids and labels: readers, formats, chat template, loss mask (packing: `runner/train/tokens/`)."""
