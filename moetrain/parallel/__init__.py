"""Parallel layouts: everything that knows about ranks."""
