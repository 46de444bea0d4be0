"""Random calls of `combine`, and how they run on every back end."""

import torch

from rfkernels import _C, ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, F16, F32, F64

# state, and the tensors after it
DTYPES = [(F64, F64), (F32, F32), (F32, BF16), (F32, F16), (BF16, F32), (F16, F16)]
TOLERANCE = {F64: 1e-12, F32: 4e-5, F16: 4e-3, BF16: 3e-2}  # guides divide by norms of few elements
SHAPES = [(1,), (2, 0), (2, 7), (3, 5, 64), (2, 4, 9, 11), (2, 20_011), (1, 3, 4096)]


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


class Call:
    """Random arguments of one call."""

    def __init__(self, shape, dtypes=(F32, F32), tensors=4, outputs=1, rows=None, seed=0, **parts):
        self.generator = torch.Generator().manual_seed(seed)
        state, other = dtypes
        accumulator = F64 if state == F64 else F32
        self.tensors = [self.draw(shape, other if k else state) for k in range(tensors)]
        guide, noisy, self.step = parts.get("guide"), parts.get("noisy"), None
        rows = shape[:1] if rows is None else rows
        lead = (3, outputs) if parts.get("stepped") else (outputs,)
        columns = tensors + (guide is not None) + bool(noisy)
        self.coefs = self.draw((*lead, columns, *rows), accumulator)
        self.inside = self.draw((*lead, columns, *rows), accumulator) if parts.get("masked") else None
        self.mask = self.draw(shape, other) if parts.get("masked") else None
        self.keys = ops.noise_keys(2**40 + 5, shape[0], step=3) if noisy else None
        self.guide, self.guidance = guide, None
        if guide:
            of = (len(ops.GUIDES[guide][1]), *([shape[0]] if parts.get("per_sample", True) else []))
            self.guidance = 0.3 + 3 * self.draw((*lead[:-1], *of), accumulator).abs()
        if parts.get("stepped"):
            self.step = torch.tensor(1)

    def draw(self, shape, dtype):
        return torch.randn(shape, generator=self.generator, dtype=F64).to(dtype)

    @property
    def keywords(self):
        names = ("guide", "guidance", "mask", "inside", "keys", "step")
        return {name: getattr(self, name) for name in names}

    def run(self, device="cpu", out=None):
        if device != "emulated":
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.keywords.items()}
            tensors = [t.to(device) for t in self.tensors]
            return [t.cpu() for t in ops.combine(tensors, self.coefs.to(device), **moved, out=out)]
        outputs = self.coefs.shape[0 if self.step is None else 1]
        outs = [torch.full_like(self.tensors[0], torch.nan) for _ in range(outputs)] if out is None else out
        x = self.tensors[0]
        workspace = torch.empty(max(16, _C.combine_workspace(x)), dtype=torch.uint8)
        rest = (self.mask, self.inside, self.keys, self.step, self.guide or "", self.guidance, workspace)
        load_emulator().combine(outs[0], list(outs[1:]), self.tensors, self.coefs, *rest)
        return outs

    def reference(self):
        keywords = {name: wide(value) for name, value in self.keywords.items()}
        return ops.combine_reference([t.double() for t in self.tensors], wide(self.coefs), **keywords)

    def check(self, device):
        state = self.tensors[0].dtype
        for got, expected in zip(self.run(device), self.reference(), strict=True):
            assert got.dtype == state
            tolerance = TOLERANCE[state]
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=4 * tolerance)
