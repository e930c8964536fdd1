"""Composition of configurations, run folders, processes and signals."""
