"""lqa: read a language model's activations in natural language, and steer the model in natural language."""

__version__ = "0.1.0"
