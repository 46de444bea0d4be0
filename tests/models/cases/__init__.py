"""Variants of each family, `CASES` of tests/models/test_parity.py."""
