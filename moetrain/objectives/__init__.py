"""What is optimised on which batch."""

from moetrain.objectives import consistency, language_modeling

__all__ = ["consistency", "language_modeling"]
