"""Modes of known transformers: the same graph with one change, a piece for each, to be composed.

Import the module of a piece: `from rfkernels.variants.camera import CameraControl`.
"""
