"""Forwards for the blocks of diffusers' transformers, which `rfkernels.accelerate` puts in place of theirs.

Each module has `BLOCKS`, from the name of a class to its `Forward`.
"""
