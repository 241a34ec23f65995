"""A declarative runner for fine-tuning language models: four choices, one resolved run."""

__version__ = "0.1.0"
