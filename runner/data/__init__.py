"""Rows become token ids and labels: row formats, chat template, loss mask, packing, cache."""
