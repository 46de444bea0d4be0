import pytest
import torch

from rfkernels.adapters.hydra import Hydra
from tests.adapters.layers import check_factors, check_merge, check_round_trip, close, layer, randn

OUT, IN, RANK = 10, 12, 3
SHAPES = {"par": ((RANK, IN), (OUT, RANK)), "seq": ((2, OUT), (OUT, 2))}


def language():
    return {
        f"hydra_{b}.hydra_{s}": randn(*shape, seed=i)
        for b, shapes in SHAPES.items()
        for i, (s, shape) in enumerate(zip("AB", shapes, strict=True))
    }


def vision(bias=True):
    made = {}
    for b, shapes in SHAPES.items():
        for i, (side, shape) in enumerate(zip(("down_proj", "up_proj"), shapes, strict=True)):
            made[f"adapter_{b}.{side}.weight"] = randn(*shape, seed=i)
            if bias:
                made[f"adapter_{b}.{side}.bias"] = randn(shape[0], seed=i + 5)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_hydra_is_two_branches_merged_and_rank_2r(scale, bias):
    base, x, made = layer(OUT, IN, bias), randn(2, 7, IN), language()
    adapter = Hydra(made, scale)
    a_p, b_p, a_s, b_s = made.values()
    f = base(x)
    close(adapter(x, base), f + scale * (x @ a_p.T @ b_p.T + f @ a_s.T @ b_s.T))
    check_merge(adapter, base, x)
    check_factors(adapter, base, x)
    assert adapter.factors(base.weight, base.bias).down.shape == (RANK + 2, IN)


@pytest.mark.parametrize("bias", [True, False])
def test_hydra_with_biases(bias):
    base, x, made = layer(OUT, IN, bias), randn(7, IN), vision()
    adapter = Hydra(made, 0.5)
    a_p, pa, b_p, pb, a_s, sa, b_s, sb = made.values()
    f = base(x)
    close(adapter(x, base), f + 0.5 * ((x @ a_p.T + pa) @ b_p.T + pb + (f @ a_s.T + sa) @ b_s.T + sb))
    check_merge(adapter, base, x)
    check_factors(adapter, base, x)


def test_round_trips():
    for made in (language(), vision(), vision(bias=False)):
        check_round_trip(Hydra, made)


def test_refusals():
    with pytest.raises(ValueError, match=r"missing: hydra_seq.hydra_B"):
        Hydra({k: v for k, v in language().items() if k != "hydra_seq.hydra_B"})
    with pytest.raises(ValueError, match=r"got \[3, 12\], \[10, 3\], \[2, 12\], \[10, 2\]"):
        Hydra(language() | {"hydra_seq.hydra_A": randn(2, 12)})
    with pytest.raises(ValueError, match="factors need the layer's weight"):
        Hydra(language()).factors()
    with pytest.raises(ValueError, match=r"for a weight \[10, 12\], got \[10, 11\]"):
        Hydra(language()).merged(randn(OUT, 11))
    with pytest.raises(ValueError, match=r"only into a floating weight, got torch.int8"):
        Hydra(language()).merged(torch.zeros(OUT, IN, dtype=torch.int8))
