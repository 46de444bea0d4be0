"""Models larger than the device: what fits, layers that come and go, and steps replayed as CUDA graphs."""

from rfkernels.memory.backends import Backend as Backend
from rfkernels.memory.backends import CudaBackend as CudaBackend
from rfkernels.memory.backends import SimulatedBackend as SimulatedBackend
from rfkernels.memory.boards import BOARDS as BOARDS
from rfkernels.memory.boards import Board as Board
from rfkernels.memory.graph import Buckets as Buckets
from rfkernels.memory.graph import GraphReport as GraphReport
from rfkernels.memory.graph import GraphRunner as GraphRunner
from rfkernels.memory.plan import MemoryPlan as MemoryPlan
from rfkernels.memory.plan import plan as plan
from rfkernels.memory.ring import Handle as Handle
from rfkernels.memory.ring import stream_layers as stream_layers
