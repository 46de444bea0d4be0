
from rfkernels.memory.backends import Backend as Backend
from rfkernels.memory.backends import CudaBackend as CudaBackend
from rfkernels.memory.backends import SimulatedBackend as SimulatedBackend
from rfkernels.memory.ring import Handle as Handle
from rfkernels.memory.ring import stream_layers as stream_layers
