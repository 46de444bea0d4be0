"""The regions of a transformer block pass over memory once: counted, by tensor and width of access."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.ops.cases import BF16, F16, F32

ROWS, WIDTH = 3, 3072  # FLUX.1
HEADS, D = 24, 128


@dataclass(frozen=True)
class Touched:
    """A tensor of a call, and how often each of its bytes is read and written, by accesses of `by` bytes."""

    tensor: Tensor
    reads: int = 0
    writes: int = 0
    by: int = 16


def read(tensor: Tensor, times: int = 1) -> Touched:
    return Touched(tensor, reads=times)


def written(tensor: Tensor, by: int = 16) -> Touched:
    return Touched(tensor, writes=1, by=by)


def assert_touched(emulated, name: str, *args) -> None:
    getattr(emulated, name)(*(a.tensor if isinstance(a, Touched) else a for a in args))
    touched = [a for a in args if isinstance(a, Touched)]
    for place, (a, t) in enumerate(zip(touched, emulated.traffic(), strict=True)):
        for done, times in ((t.reads, a.reads), (t.writes, a.writes)):
            assert done == ({a.by: times * a.tensor.nbytes // a.by} if times else {}), f"{name}: {place}, {t}"


class Tensors:
    """Random tokens and parameter rows; codes and scales to be written."""

    def __init__(self, tokens: torch.dtype, parameters: torch.dtype):
        self.tokens, self.parameters = tokens, parameters

    def x(self, width: int = WIDTH) -> Tensor:
        return torch.randn(1, ROWS, width).to(self.tokens)

    def row(self, width: int = WIDTH) -> Touched:
        """Parameters that serve all tokens: every token reads them (from a cache)."""
        return read(torch.randn(width).to(self.parameters), ROWS)

    def codes(self) -> tuple[Touched, Touched]:
        """Eight codes at a time, and the scale of each row."""
        return (
            written(torch.empty(1, ROWS, WIDTH, dtype=torch.int8), by=8),
            written(torch.empty(1, ROWS), by=4),
        )


def norm_modulate(m: Tensors) -> tuple:
    return written(m.x()), read(m.x()), m.row(), m.row(), None, m.row(), m.row(), "layer", 1e-6, "fast"


def gated_residual(m: Tensors) -> tuple:
    branch = ("tanh", "rms", m.row())
    return written(m.x()), read(m.x()), read(m.x()), m.row(), None, *branch, 1e-6, "fast"


def gated_residual_norm_modulate(m: Tensors) -> tuple:
    tables = (m.row(), m.row(), m.row(), None)
    region = ("none", "none", None, None, None, "layer", 1e-6, "exact")
    return written(m.x()), written(m.x()), read(m.x()), read(m.x()), *tables, *region


def norm_modulate_quantize(m: Tensors) -> tuple:
    region = (m.row(), m.row(), None, None, None, "rms", 1e-6, "fast")
    return *m.codes(), read(m.x()), *region, None, 256


def gated_residual_norm_modulate_quantize(m: Tensors) -> tuple:
    tables = (m.row(), m.row(), m.row(), None)
    region = ("none", "none", None, None, None, "layer", 1e-6, "fast")
    return written(m.x()), *m.codes(), read(m.x()), read(m.x()), *tables, *region, None, 0


def ada_norm_backward(m: Tensors) -> tuple:
    """dy is read again once its row's means are known, the parameters too; a part's sums are written once."""
    sums = written(torch.empty(1, 1, 2, WIDTH), by=4)
    weight, table = (read(m.row().tensor, 2 * ROWS) for _ in range(2))
    tokens = (read(m.x(), 2), read(m.x()), read(m.x()))  # dy, v, what joins dv
    layout = (None, None, None, 1, 1, True)
    return written(m.x()), sums, *tokens, weight, table, *layout, "layer", "one_plus", 1e-6


def activation(m: Tensors) -> tuple:
    return written(m.x()), read(m.x()), None, "gelu_tanh", "fast"


def activation_backward(m: Tensors) -> tuple:
    return written(m.x()), read(m.x()), read(m.x()), None, "gelu_tanh"


def activation_quantize(m: Tensors) -> tuple:
    return *m.codes(), read(m.x()), m.row(), "gelu_tanh", "fast", None, 256


def gated_activation(m: Tensors) -> tuple:
    return written(m.x()), read(m.x(2 * WIDTH)), None, None, None, "silu", True, "fast"


def gated_activation_backward(m: Tensors) -> tuple:
    return written(m.x(2 * WIDTH)), read(m.x()), read(m.x(2 * WIDTH)), None, None, None, "silu", True


def gated_activation_quantize(m: Tensors) -> tuple:
    region = (None, m.row(2 * WIDTH), None, "silu", False, "fast")
    return *m.codes(), read(m.x(2 * WIDTH)), *region, None, 0


REGIONS = [
    norm_modulate,
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate_quantize,
    gated_residual_norm_modulate_quantize,
    ada_norm_backward,
    activation,
    activation_backward,
    activation_quantize,
    gated_activation,
    gated_activation_backward,
    gated_activation_quantize,
]


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("region", REGIONS, ids=lambda f: f.__name__)
def test_a_region_reads_and_writes_its_tokens_once(emulated, region: Callable[[Tensors], tuple], dtypes):
    assert_touched(emulated, region.__name__, *region(Tensors(*dtypes)))


def heads(dtype: torch.dtype, layout: str) -> list[Tensor]:
    shape = (1, HEADS, 2 * ROWS, D) if layout == "bhld" else (1, 2 * ROWS, HEADS, D)
    return [torch.randn(shape).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_two_fused_projections_become_heads_in_one_pass(emulated, dtype, layout):
    m = Tensors(dtype, dtype)
    streams, weights = [m.x(3 * WIDTH) for _ in range(2)], [torch.ones(D).to(dtype) for _ in range(4)]
    results = heads(dtype, layout)
    angles = torch.randn(2 * ROWS, D // 2, 2)
    numbers = (1, HEADS, HEADS, 0, 1e-6)
    emulated.qkv_norm_rope(*results, streams, weights, angles, *numbers, layout, "fast", True)
    traffic = emulated.traffic()
    for result, t in zip(results, traffic[:3], strict=True):
        assert t.writes == {16: result.nbytes // 16} and not t.reads
    for stream, t in zip(streams, traffic[3:5], strict=True):
        assert t.reads == {16: stream.nbytes // 16} and not t.writes
    assert traffic[-1].reads == {16: 2 * HEADS * angles.nbytes // 16}  # by each head of q and of k


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_the_gradient_of_a_projection_is_made_in_one_pass(emulated, dtype, layout):
    m = Tensors(dtype, dtype)
    stream, weights = m.x(3 * WIDTH), [torch.ones(D).to(dtype) for _ in range(2)]
    grads, d_tokens = heads(dtype, layout), torch.empty(1, ROWS, 3 * WIDTH, dtype=dtype)
    angles, d_weights = torch.randn(2 * ROWS, D // 2, 2), torch.empty(1, 2 * D)
    numbers = (1, HEADS, HEADS, ROWS, 0, 1e-6, layout)  # the second stream of a joint attention
    emulated.qkv_norm_rope_backward(d_tokens, d_weights, *grads, [stream], weights, angles, *numbers)
    of_tokens, of_weights, *of_grads, of_stream = emulated.traffic()[:6]
    assert of_tokens.writes == {16: d_tokens.nbytes // 16} and not of_tokens.reads
    assert of_weights.writes == {4: 2 * D} and not of_weights.reads
    for t in of_grads:  # of the joint sequence, whose other half is the other stream's
        assert t.reads == {16: grads[0].nbytes // 2 // 16} and not t.writes
    assert of_stream.reads == {16: stream.nbytes * 2 // 3 // 16} and not of_stream.writes  # not v: a copy
