"""Checkpoints of quantised models: one module a family of files, read into `rfkernels.nn.QuantLinear`.

`load` puts any of them into a model, `read` gives what a file holds; `native` has the files of this package.
"""

from rfkernels.formats.load import Part as Part
from rfkernels.formats.load import load as load
from rfkernels.formats.load import original_names as original_names
from rfkernels.formats.load import read as read
