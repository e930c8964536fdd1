"""What is optimised on which batch."""

from moetrain.objectives import language_modeling

__all__ = ["language_modeling"]
