"""Every editor hands `combine` what it asks for, from any strides and into 16-bit velocities."""

import pytest
import torch
from torch import Tensor

from rfkernels import editing
from rfkernels.ops import GUIDES
from rfkernels.samplers import schedule
from tests.editing.fields import wild, wild_pair

GRID = schedule("linear", 4)
MODULES = ("_launches", "flowedit", "inversion", "reward")
SHAPE = (2, 3, 4, 6)


@pytest.fixture
def strict(monkeypatch):
    """`combine` with its contract checked."""
    calls = []
    real = editing._launches.combine

    def combine(
        tensors, coefs, *, guide=None, guidance=None, mask=None, inside=None, keys=None, step=None, out=None
    ):
        x = tensors[0]
        allowed = (torch.float32, torch.float16, torch.bfloat16)
        assert 1 <= len(tensors) <= 8
        for t in (*tensors, *(out or ()), *([] if mask is None else [mask])):
            assert t.shape == x.shape and t.is_contiguous()
            assert t.dtype in ((torch.float64,) if x.dtype == torch.float64 else allowed)
        assert all(t.dtype == x.dtype for t in out or ())
        for t in (coefs, guidance, inside):
            assert t is None or t.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        columns = len(tensors) + (guide is not None) + (keys is not None)
        lead = 0 if step is None else 1
        assert 1 <= coefs.shape[lead] <= 3 and coefs.shape[lead + 1] == columns
        rows = coefs.shape[lead + 2 :]
        assert all(n in (1, m) for n, m in zip(rows, x.shape, strict=False))
        assert (inside is None) == (mask is None) and (inside is None or inside.shape == coefs.shape)
        assert (guide is None) == (guidance is None)
        if guide:
            assert guidance.shape[lead] == len(GUIDES[guide][1])
        if step is not None:
            assert step.shape == () and step.dtype == torch.int64
        if keys is not None:
            assert keys.shape == (len(x), 3) and keys.dtype == torch.int64
        calls.append(guide)
        return real(tensors, coefs, guide=guide, guidance=guidance, mask=mask, inside=inside, keys=keys,
                    step=step, out=out)  # fmt: skip

    for name in MODULES:
        monkeypatch.setattr(f"rfkernels.editing.{name}.combine", combine)
    return calls


def strided(seed: int) -> Tensor:
    t = torch.randn(SHAPE[::-1], generator=torch.Generator().manual_seed(seed)).permute(3, 2, 1, 0)
    assert not t.is_contiguous()
    return t


def half(pair):
    """16-bit velocities of odd strides."""

    def velocity(x, sigma):
        v = pair(x, sigma)
        odd = lambda t: t.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
        return odd(v) if isinstance(v, Tensor) else tuple(map(odd, v))

    return velocity


v, pair = half(wild), half(wild_pair)
EDITORS = {
    "inversion": lambda x, y: editing.rf_inversion(pair, x, GRID.flip(0), guidance=torch.ones(2)),
    "inversion to y": lambda x, y: editing.rf_inversion(v, x, GRID.flip(0), noise=y),
    "edit": lambda x, y: editing.rf_inversion_edit(v, x, GRID, target=y, mask=y > 0, stochastic=True),
    "otip": lambda x, y: editing.rf_inversion_edit(
        pair, x, GRID, target=y, guidance=2.0, transport=editing.Transport(until=2.0)
    ),
    "otip, matched": lambda x, y: editing.rf_inversion_edit(
        pair, x, GRID, target=y, guidance=torch.ones(2), transport=editing.Transport(until=2.0, matched=True)
    ),
    "flow edit": lambda x, y: editing.flow_edit(
        pair, x, GRID, source_guidance=torch.ones(2), target_guidance=2.0, n_min=1, target=pair, method="ab2"
    ),
    "transport edit": lambda x, y: editing.flow_edit(v, x, GRID, strength=0.5, n_avg=2),
    "planned edit": lambda x, y: editing.flow_edit(v, x, GRID, method="unipc"),
    "chef": lambda x, y: editing.flow_chef(pair, x, GRID, editing.Keep(y, y > 0, 0.5), masked_guidance=2.0),
    "chef, loss": lambda x, y: editing.flow_chef(
        v, x, GRID, editing.Descent(lambda t: (t - y).square().sum(), 0.1)
    ),
    "chef, pooled": lambda x, y: editing.flow_chef(
        pair, x, GRID, editing.Separable(y[..., :2, :3], *(editing.operators.pooling(n, 2) for n in (4, 6))),
        guidance=torch.ones(2),
    ),
    "reward": lambda x, y: editing.flow_chef(
        editing.reward_guided(pair, lambda x, s: -(x - y).square().sum((1, 2, 3)), 1.0), x, GRID,
        editing.Keep(y, pull=0.0), guidance=2.0,
    ),
    "inpaint": lambda x, y: editing.inpaint(
        pair, x, GRID, known=y, mask=y[:1] > 0, travel=editing.Travel(2, 1), guidance=2.0
    ),
    "stitch": lambda x, y: editing.wave_stitch(
        v, x, GRID, size=4, stride=1, observed=y, mask=(y > 0).float(), churn=0.2
    ),
    "jump": lambda x, y: editing.pyramid_jump(x, 0.4)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", EDITORS)
def test_the_contract_of_combine(name, strict):
    x, y = strided(0), strided(1)
    kept = x.clone(), y.clone()
    result = EDITORS[name](x, y)
    assert result.isfinite().all() and result.dtype == torch.float32 and strict
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    plain = EDITORS[name](x.contiguous(), y.contiguous())
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
