import pytest
import torch

from rfkernels.adapters.dora import DoRA, decompose, merged_norm
from tests.adapters.layers import check_factors, check_merge, check_round_trip, close, layer, randn

OUT, IN, RANK, ALPHA = 10, 12, 3, 6.0
MAGNITUDES = {
    "lora_magnitude_vector": (OUT,),
    "lora_magnitude_vector.weight": (OUT,),
    "dora_scale out": (OUT, 1),
    "dora_scale in": (1, IN),
}


def tensors(magnitude="lora_magnitude_vector"):
    made = {"lora_A.weight": randn(RANK, IN), "lora_B.weight": randn(OUT, RANK)}
    return {**made, magnitude.split()[0]: randn(*MAGNITUDES[magnitude], seed=3).abs()}


def definition(weight, made, axis, scale, k=None):
    a, b, m = made.values()
    v = weight + scale * b @ a
    dim = 1 if axis == "output" else 0
    shape = (-1, 1) if axis == "output" else (1, -1)
    k = m.reshape(shape) / torch.linalg.norm(v, dim=dim, keepdim=True) if k is None else k
    return k * v


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_dora_branch_is_the_definition(magnitude, bias):
    base, x, made = layer(OUT, IN, bias), randn(2, 7, IN), tensors(magnitude)
    adapter = DoRA(made, alpha=ALPHA)
    assert adapter.axis == ("input" if magnitude.endswith("in") else "output")
    expected = x @ definition(base.weight, made, adapter.axis, 2.0).T
    close(adapter(x, base), expected + base.bias if bias else expected)
    check_merge(adapter, base, x)
    if adapter.axis == "output":
        check_factors(adapter, base, x)
    else:
        assert adapter.factors(base.weight) is None


@pytest.mark.parametrize("axis, dim", [("output", 1), ("input", 0)])
def test_fast_norm_is_the_norm(axis, dim):
    w, a, b = randn(OUT, IN), randn(RANK, IN), randn(OUT, RANK)
    close(merged_norm(w, a, b, -0.7, axis), torch.linalg.norm(w - 0.7 * b @ a, dim=dim))


def test_norm_of_base():
    base, x, made = layer(OUT, IN), randn(7, IN), tensors()
    adapter = DoRA(made, alpha=ALPHA, norm_of="base")
    k = made["lora_magnitude_vector"] / torch.linalg.norm(base.weight, dim=1)
    expected = x @ definition(base.weight, made, "output", 2.0, k[:, None]).T + base.bias
    close(adapter(x, base), expected)
    check_merge(adapter, base, x)


def test_strength_conventions():
    weight, made = randn(OUT, IN), tensors()
    peft, _ = DoRA(made, alpha=ALPHA, strength=0.5).merged(weight)
    close(peft, definition(weight, made, "output", 1.0))
    lycoris, _ = DoRA(made, alpha=ALPHA, strength=0.5, convention="lycoris").merged(weight)
    v = weight + 2 * made["lora_B.weight"] @ made["lora_A.weight"]
    k = made["lora_magnitude_vector"] / torch.linalg.norm(v, dim=1)
    close(lycoris, (1 + 0.5 * (k - 1))[:, None] * v)
    close(decompose(weight, v - weight, made["lora_magnitude_vector"], 0.5), lycoris)
    assert (peft - lycoris).abs().max() > 1e-3


def test_a_direction_of_norm_zero_gives_zero():
    made = tensors()
    weight = -2 * made["lora_B.weight"] @ made["lora_A.weight"]
    weight[1:] += randn(OUT - 1, IN)
    weight[0] = 0
    made["lora_B.weight"][0] = 0
    merged, _ = DoRA(made, alpha=ALPHA).merged(weight)
    assert torch.equal(merged[0], torch.zeros(IN, dtype=torch.float64)) and merged.isfinite().all()


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_dora_round_trip(magnitude):
    check_round_trip(DoRA, tensors(magnitude), alpha=ALPHA)
    kohya = {
        "lora_down.weight": randn(RANK, IN),
        "lora_up.weight": randn(OUT, RANK),
        "alpha": torch.tensor(6.0),
    }
    check_round_trip(DoRA, {**kohya, "dora_scale": randn(OUT, 1)})
    assert DoRA({**kohya, "dora_scale": randn(OUT, 1)}).scale == 2.0


def test_gradient_takes_the_norm_for_a_constant():
    base, x, made = layer(OUT, IN), randn(7, IN), tensors()
    adapter = DoRA(made, alpha=ALPHA).requires_grad_()
    adapter(x, base).square().sum().backward()
    a, b, m = (t.clone().requires_grad_() for t in made.values())
    v = base.weight + 2 * b @ a
    k = m / torch.linalg.norm(v, dim=1).detach()
    (x @ (k[:, None] * v).T + base.bias).square().sum().backward()
    for name, expected in zip(made, (a, b, m), strict=True):
        torch.testing.assert_close(adapter.tensor(name).grad, expected.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change, hyper, message",
    [
        ({"lora_magnitude_vector": randn(IN + 1)}, {}, r"must be \[10\], \[10, 1\] or \[1, 12\]"),
        ({"lora_magnitude_vector": None}, {}, "missing: lora_magnitude_vector"),
        ({}, {"norm_of": "both"}, 'norm_of must be "merged" or "base"'),
        ({}, {"convention": "comfy"}, 'convention must be "peft" or "lycoris"'),
        ({"lora_B.weight": randn(OUT, 4)}, {}, r"A \[r, in\], B \[out, r\] required"),
    ],
)
def test_dora_refuses(change, hyper, message):
    made = {k: v for k, v in {**tensors(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        DoRA(made, **hyper)


def test_dora_refuses_layers_without_a_weight():
    adapter = DoRA(tensors())
    with pytest.raises(ValueError, match="needs the layer's weight, got function"):
        adapter(randn(7, IN), lambda x: x)
    with pytest.raises(ValueError, match="factors need the layer's weight"):
        adapter.factors()
    with pytest.raises(ValueError, match=r"for a weight \[10, 12\], got \[10, 11\]"):
        adapter.merged(randn(OUT, 11))
    with pytest.raises(ValueError, match="only into a floating weight"):
        adapter.merged(torch.zeros(OUT, IN, dtype=torch.int8))


def test_dora_is_that_of_peft():
    peft = pytest.importorskip("peft")
    base, x = layer(OUT, IN), randn(7, IN)
    model = torch.nn.Sequential(layer(OUT, IN))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["0"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    state = peft.get_peft_model_state_dict(wrapped)
    prefix = "base_model.model.0."
    made = {k.removeprefix(prefix): v.double() + 0.1 for k, v in state.items()}
    peft.set_peft_model_state_dict(wrapped, {prefix + k: v for k, v in made.items()})
    adapter = DoRA.from_state_dict(made, alpha=ALPHA)
    with torch.no_grad():
        close(adapter(x, base), wrapped(x))
        merged = wrapped.merge_and_unload()[0]
    close(adapter.merged(base.weight)[0], merged.weight.detach())
