"""Files of weights: which model they hold, other names and dtypes, and any quantised layout read into
`rfkernels.nn.QuantLinear`, one module a family of files.

`load` puts any of them into a model, `read` gives what a file holds, `detect` says which model it is and
`convert` writes it anew; `native` has the files of this package.
"""

from rfkernels.formats.convert import convert as convert
from rfkernels.formats.detect import detect as detect
from rfkernels.formats.load import Part as Part
from rfkernels.formats.load import load as load
from rfkernels.formats.load import original_names as original_names
from rfkernels.formats.load import read as read
