"""Composition with Hydra: overrides, recipes and the catalogue become one validated `RunSpec`."""
