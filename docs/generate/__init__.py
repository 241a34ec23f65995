"""Generators of the pages in docs/: `python -m docs.generate [--check]`."""
