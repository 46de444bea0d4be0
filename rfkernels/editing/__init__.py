"""Editing, inversion and inverse problems on a rectified flow: nothing is trained, a velocity is enough."""

from rfkernels.editing import operators as operators
from rfkernels.editing.features import *
from rfkernels.editing.flowchef import *
from rfkernels.editing.flowedit import *
from rfkernels.editing.inpaint import *
from rfkernels.editing.inversion import *
from rfkernels.editing.mix import *
from rfkernels.editing.pusa import *
from rfkernels.editing.reward import *
from rfkernels.editing.transport import *
from rfkernels.editing.wavestitch import *
from rfkernels.editing.windows import *
