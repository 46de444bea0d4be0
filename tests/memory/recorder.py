"""A CUDA graph on the CPU: the ops of a call, recorded with their tensors and run again without Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

SYNCS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"}


class Ops(TorchDispatchMode):
    def __init__(self):
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if str(op) in SYNCS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result


class RecordingCapture:
    """Replays into the same memory; `broken` makes every recording fail."""

    def __init__(self):
        self.recorded, self.broken = 0, ""

    def refusal(self, tensors):
        return "" if tensors else "tensors on one CUDA device are required, got none"

    def warm(self, run, times):
        for _ in range(times):
            result = run()
        return result

    def record(self, run):
        if self.broken:
            raise RuntimeError(self.broken)
        ops = Ops()
        with ops:
            result = run()
        self.recorded += 1

        def replay():
            with torch.no_grad():
                for op, args, kwargs, old in ops.calls:
                    new = op(*args, **kwargs)
                    for to, source in zip(tree_flatten(old)[0], tree_flatten(new)[0], strict=True):
                        if isinstance(to, torch.Tensor) and to.data_ptr() != source.data_ptr():
                            to.copy_(source)

        return result, replay, 100
