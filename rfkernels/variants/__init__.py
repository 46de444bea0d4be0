"""Modes of a transformer that are the same graph with one change."""
