"""Scores of the shipped models, computed from their own samples with fixed seeds."""
