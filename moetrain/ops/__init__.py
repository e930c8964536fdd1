"""Torch reference of every hot operation, and the choice of a faster backend."""
