"""Checkpoints of quantised models: one module a family of files, read into `rfkernels.nn.QuantLinear`."""
