"""Loading, switching, merging and unloading: the right numbers, slots that stay, and the model of before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.adapters.load import load_lora, loaded, set_adapters, set_time, unload_lora
from rfkernels.adapters.merge import combine_adapters, merge_lora, unmerge_lora
from rfkernels.nn import LoRALinear
from tests.adapters.dialects import assert_untouched, modules_and_bits, randn

F64 = torch.float64


class Mlp(nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.fc1 = nn.Linear(8, 12, dtype=dtype)
        self.fc2 = nn.Linear(12, 6, bias=False, dtype=dtype)
        for i, p in enumerate(self.parameters()):
            p.requires_grad_(False).copy_(randn(*p.shape, seed=900 + i) * 5)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


def lora(seed: int, rank: int = 2, layers=("fc1", "fc2"), alpha: float | None = None) -> dict:
    shapes, tensors = {"fc1": (12, 8), "fc2": (6, 12)}, {}
    for i, name in enumerate(layers):
        out, features = shapes[name]
        tensors[f"{name}.lora_A.weight"] = randn(rank, features, seed=seed + i) * 5
        tensors[f"{name}.lora_B.weight"] = randn(out, rank, seed=seed + i + 50) * 5
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def by_hand(model: Mlp, x, *adapters):
    """The model with weights W + sum_i w_i s_i B_i A_i; adapters are (tensors, strength)."""
    model = copy.deepcopy(model)
    for tensors, strength in adapters:
        for name in ("fc1", "fc2"):
            layer = model.get_submodule(name)
            if f"{name}.lora_A.weight" in tensors:
                a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
                scale = float(tensors.get(f"{name}.alpha", len(a))) / len(a)
                layer.weight += strength * scale * b @ a
            if f"{name}.diff_b" in tensors:
                added = strength * tensors[f"{name}.diff_b"]
                layer.bias = nn.Parameter(added if layer.bias is None else layer.bias + added)
    return model(x)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def x():
    return randn(4, 5, 8, seed=1) * 10


def test_stack_of_adapters(x):
    model, one, two = Mlp(), lora(1, alpha=1.0), lora(2, rank=3)
    before, plain = modules_and_bits(model), copy.deepcopy(model)
    load_lora(model, one, 0.5, "one")
    close(model(x), by_hand(plain, x, (one, 0.5)))
    load_lora(model, two, -2.0, "two")
    close(model(x), by_hand(plain, x, (one, 0.5), (two, -2.0)))
    assert loaded(model) == ["one", "two"]
    set_adapters(model, "two", 0.25)
    close(model(x), by_hand(plain, x, (two, 0.25)))
    set_adapters(model, ["two", "one"], [1.0, 2.0])
    close(model(x), by_hand(plain, x, (one, 2.0), (two, 1.0)))
    unload_lora(model, "one")
    close(model(x), by_hand(plain, x, (two, 1.0)))
    unload_lora(model, "two")
    assert_untouched(model, before)
    assert loaded(model) == []


def test_no_strength_is_no_change(x):
    model = Mlp()
    load_lora(model, lora(1), 0.0)
    plain = LoRALinear(model.fc1.base, [4])
    assert torch.equal(model.fc1(x), plain(x))


def test_per_sample_strengths(x):
    """One call with a strength per sample is the loop over samples."""
    model, files = Mlp(), [lora(1), lora(2, rank=1), lora(3, rank=4, layers=("fc2",))]
    files[0]["fc1.diff_b"], files[1]["fc2.diff_b"] = randn(12, seed=5), randn(6, seed=6)
    plain = copy.deepcopy(model)
    for i, tensors in enumerate(files):
        load_lora(model, tensors, name=str(i))
    table = torch.tensor([[0.5, 0, 1], [0, 0, 0], [0, -2, 0.3], [1, 1, 1]], dtype=F64)
    set_adapters(model, ["0", "1", "2"], table)
    y = model(x)
    for sample, strengths in enumerate(table.tolist()):
        pairs = zip(files, strengths, strict=True)
        close(y[sample], by_hand(plain, x[sample : sample + 1], *pairs)[0])
    tokens = x[:, 0]  # 2-d tokens, as of modulations
    close(model(tokens), y[:, 0])
    close(model(x[:, None]), y[:, None])
    set_adapters(model, ["1"], [torch.tensor([1.0, 0, 0, 2.0])])
    close(model(x)[3], by_hand(plain, x[3:], (files[1], 2.0))[0])
    with pytest.raises(ValueError, match="strengths and times must be one for all samples"):
        merge_lora(model)


def test_slots_keep_shapes(x):
    """With reserved slots nothing is allocated or compiled anew: the same buffers, the same graph."""
    model = Mlp()
    load_lora(model, lora(1), slots=2, max_rank=4, name="one")
    before, plain = {n: (b.data_ptr(), b.shape) for n, b in model.named_buffers()}, Mlp()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x)
    two = lora(2, rank=4)
    load_lora(model, two, 0.5, name="two")
    set_adapters(model, ["one", "two"], [0.0, 2.0])
    close(compiled(x), by_hand(plain, x, (two, 2.0)))
    unload_lora(model, "one")
    three = lora(3, rank=3)
    load_lora(model, three, name="three")
    set_adapters(model, ["three"])
    close(compiled(x), by_hand(plain, x, (three, 1.0)))
    assert len(frames) == 1
    assert before == {n: (b.data_ptr(), b.shape) for n, b in model.named_buffers()}
    unload_lora(model)


def test_rank_above_the_slot():
    model = Mlp()
    with pytest.raises(ValueError, match="rank of fc1 must be at most max_rank 2, got 3"):
        load_lora(model, lora(1, rank=3), slots=1, max_rank=2)
    assert type(model.fc1) is nn.Linear
    load_lora(model, lora(1, rank=3), name="grown")
    unload_lora(model, "grown")  # nothing was reserved by the failure
    assert type(model.fc1) is nn.Linear
    load_lora(model, lora(1, rank=2), slots=2)
    with pytest.raises(ValueError, match="rank of fc1 must be at most 2, its slot's, got 3"):
        load_lora(model, lora(1, rank=3))
    load_lora(model, lora(1, rank=1))
    with pytest.raises(
        ValueError, match="a free slot of fc1 required, all 2 are taken by adapter_0, adapter_1"
    ):
        load_lora(model, lora(1, rank=1))
    layer = LoRALinear(nn.Linear(8, 12), [2])
    with pytest.raises(ValueError, match="rank must be at most 2, that of slot 0, got 3"):
        layer.load(0, _factors(3))


def _factors(rank):
    from rfkernels.adapters.base import Factors

    return Factors(torch.ones(rank, 8), torch.ones(12, rank))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_merge_and_back(dtype, x):
    model = Mlp().to(dtype)
    before, x = modules_and_bits(model), x.to(dtype)
    tensors = lora(1) | {"fc1.diff_b": randn(12, seed=3), "fc2.diff_b": randn(6, seed=4)}
    load_lora(model, tensors, 0.5)
    beside = model(x)
    merge_lora(model)
    assert type(model.fc1) is nn.Linear and type(model.fc2) is nn.Linear
    close(model(x), beside, {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype])
    unmerge_lora(model)
    assert torch.equal(model(x), beside)
    merge_lora(model)
    unload_lora(model)  # out of a merge too
    assert_untouched(model, before)


def test_merge_of_some(x):
    """Others stay beside the merged weight."""
    model, plain, one, two = Mlp(), Mlp(), lora(1), lora(2, layers=("fc1",))
    load_lora(model, one, 0.5, "one")
    load_lora(model, two, 2.0, "two")
    merge_lora(model, "one")
    assert isinstance(model.fc1, LoRALinear) and type(model.fc2) is nn.Linear
    close(model(x), by_hand(plain, x, (one, 0.5), (two, 2.0)))
    for call in (
        lambda: set_adapters(model, "two"),
        lambda: load_lora(model, one),
        lambda: unload_lora(model, "one"),
    ):
        with pytest.raises(ValueError, match="adapters are merged into the weights"):
            call()
    unmerge_lora(model)
    set_adapters(model, "two")
    close(model(x), by_hand(plain, x, (two, 1.0)))


def test_stochastic_merge_keeps_small_changes():
    model = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)).requires_grad_(False)
    before = model[0].weight.clone()
    tensors = {"0.lora_A.weight": torch.ones(1, 256), "0.lora_B.weight": torch.full((256, 1), 1e-5)}
    load_lora(model, tensors)
    merge_lora(model)
    nearest = (model[0].weight.double() - before.double()).mean()
    unmerge_lora(model)
    merge_lora(model, rounding="stochastic", seed=1)
    first = model[0].weight.clone()
    kept = (first.double() - before.double()).mean()
    assert abs(nearest) < 5e-6 and abs(kept - 1e-5) < 2e-6
    unmerge_lora(model)
    merge_lora(model, rounding="stochastic", seed=1)
    assert torch.equal(model[0].weight, first)
    unload_lora(model)
    assert torch.equal(model[0].weight, before)


def test_intervals_of_time(x):
    """Experts per interval: beside the weight, merged per interval, and one LoRA by hand are the same."""
    model, plain = Mlp(), Mlp()
    a, b = randn(6, 8, seed=1) * 5, randn(12, 6, seed=2) * 5
    bounds = torch.tensor([0, 0.25, 0.5, 1.0])
    load_lora(model, {"fc1.lora_A.weight": a, "fc1.lora_B.weight": b, "fc1.lora_t_bounds": bounds})
    close(model(x), plain(x))  # no time, no expert
    for t, expert in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.5, 2), (0.9, 2), (1.0, 2)):
        at = slice(2 * expert, 2 * expert + 2)
        wanted = by_hand(plain, x, ({"fc1.lora_A.weight": a[at], "fc1.lora_B.weight": b[:, at]}, 1.0))
        set_time(model, t)
        close(model(x), wanted)
        merge_lora(model)
        close(model(x), wanted)
        unmerge_lora(model)
    set_time(model, torch.tensor([0.0, 0.3, 0.6, 1.0]))  # a time per sample
    y = model(x)
    for i, expert in enumerate((0, 1, 2, 2)):
        at = slice(2 * expert, 2 * expert + 2)
        one = ({"fc1.lora_A.weight": a[at], "fc1.lora_B.weight": b[:, at]}, 1.0)
        close(y[i], by_hand(plain, x[i : i + 1], one)[0])
    with pytest.raises(ValueError, match=r"fc2: a timestep LoRA: A \[J r, in\]"):
        load_lora(model, lora(1, layers=("fc2",)) | {"fc2.lora_t_bounds": bounds})


def test_a_slot_is_as_new(x):
    """What an adapter left of factors, time, biases or another family is gone when the next one comes."""
    model, plain = Mlp(), Mlp()
    tensors = lora(1, rank=4, layers=("fc1",)) | {"fc1.lora_t_bounds": torch.tensor([0, 0.5, 1.0])}
    whole = {"fc2.lokr_w1": randn(2, 3, seed=8), "fc2.lokr_w2": randn(3, 4, seed=9)}
    load_lora(model, tensors | whole, slots=1, max_rank=4, name="first")
    set_time(model, 0.7)
    unload_lora(model, "first")
    assert not model.fc1.down.any() and not model.fc1.up.any() and not len(model.fc2.extras)
    close(model(x), plain(x))
    second = lora(3, rank=4)
    load_lora(model, second, name="second")
    close(model(x), by_hand(plain, x, (second, 1.0)))
    unload_lora(model)


def test_combination(x):
    """cat is exact; to a rank it is the truncated SVD of the dense sum."""
    model, plain, one, two = Mlp(), Mlp(), lora(1, alpha=1.0), lora(2, rank=3, layers=("fc1",))
    load_lora(model, one, name="one")
    load_lora(model, two, name="two")
    exact, errors = combine_adapters(model, ["one", "two"], [0.5, -1.0])
    assert errors == {"fc1": 0, "fc2": 0} and len(exact["fc1.lora_A.weight"]) == 5
    small, errors = combine_adapters(model, ["one", "two"], [0.5, -1.0], rank=2)
    dense = exact["fc1.lora_B.weight"] @ exact["fc1.lora_A.weight"]
    u, s, vt = torch.linalg.svd(dense)
    close(small["fc1.lora_B.weight"] @ small["fc1.lora_A.weight"], (u[:, :2] * s[:2]) @ vt[:2])
    assert errors["fc1"] == pytest.approx(float(s[2:].norm() / s.norm()))
    unload_lora(model)
    load_lora(model, exact)
    close(model(x), by_hand(plain, x, (one, 0.5), (two, -1.0)))
    with pytest.raises(ValueError, match=r"a strength for names of \['adapter_0'\] required, got \['one'\]"):
        combine_adapters(model, ["one"], [1.0])


def test_changes_of_parameters(x):
    """Norms have one strength for all samples, and come back bit for bit."""
    model, before = Mlp(), modules_and_bits(Mlp())
    weight, norm = model.norm.weight, randn(8, seed=3)
    load_lora(model, lora(1) | {"norm.diff": norm, "norm.diff_b": norm}, 0.5, "one")
    load_lora(model, {"norm.set_weight": norm}, 0.0, "two")
    close(model.norm.weight, before[1]["norm.weight"] + 0.5 * norm)
    set_adapters(model, ["one", "two"], [1.0, 0.5])
    close(model.norm.weight, before[1]["norm.weight"] + norm + 0.5 * (norm - before[1]["norm.weight"]))
    set_adapters(model, "two")
    assert torch.equal(model.norm.weight, norm)
    with pytest.raises(ValueError, match=r"strength of one must be one number, since it changes norm.weight"):
        set_adapters(model, "one", torch.ones(4, 1))
    unload_lora(model)
    assert model.norm.weight is weight
    assert all(torch.equal(t, before[1][n]) for n, t in model.state_dict().items())


def test_other_families(x):
    """DoRA by its column scale, a Kronecker product without a low-rank form, both beside LoRA."""
    model, plain = Mlp(), Mlp()
    before = modules_and_bits(model)
    m, w1, w2 = randn(12, seed=7).abs() * 20, randn(2, 3, seed=8) * 5, randn(3, 4, seed=9) * 5
    a, b = randn(2, 8, seed=1) * 5, randn(12, 2, seed=2) * 5
    tensors = {"fc1.lora_A.weight": a, "fc1.lora_B.weight": b, "fc1.lora_magnitude_vector": m}
    report = load_lora(model, tensors | {"fc2.lokr_w1": w1, "fc2.lokr_w2": w2}, name="mixed")
    assert report.layers == {"fc1": "DoRA", "fc2": "LoKr"}
    two = lora(5)
    load_lora(model, two, 0.5, "two")
    direction = plain.fc1.weight + b @ a
    dora = m[:, None] * direction / direction.norm(dim=1, keepdim=True)
    for strength in (1.0, 0.3, 0.0):
        set_adapters(model, ["mixed", "two"], [strength, 0.5])
        wanted = copy.deepcopy(plain)
        wanted.fc1.weight += strength * (dora - plain.fc1.weight)
        wanted.fc2.weight += strength * torch.kron(w1, w2)
        wanted = by_hand(wanted, x, (two, 0.5))
        close(model(x), wanted)
        merge_lora(model)
        close(model(x), wanted)
        unmerge_lora(model)
    with pytest.raises(ValueError, match="strengths of DoRA must be one per slot, got one per sample"):
        set_adapters(model, "mixed", torch.ones(4, 1))
    unload_lora(model)
    assert_untouched(model, before)


def test_conversion_of_a_loaded_model(x):
    """To 16 bits and back: strengths and scales stay float32."""
    model, one = Mlp(), lora(1, alpha=1.0)
    load_lora(model, one, 0.7)
    model.to(torch.bfloat16)
    assert model.fc1.down.dtype == torch.bfloat16 and model.fc1.scale.dtype == torch.float32
    close(model.fc1.scale, torch.full((2,), 0.35))
    plain = Mlp().to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    error = (model(x).double() - by_hand(plain.double(), x.double(), (one, 0.7))).norm()
    assert error < 2e-2 * model(x).double().norm()


def test_copies_are_apart(x):
    """A deep copy of a model has adapters of its own."""
    model = Mlp()
    load_lora(model, lora(1), name="one")
    other = copy.deepcopy(model)
    y = model(x)
    unload_lora(other)
    assert torch.equal(model(x), y) and loaded(model) == ["one"] and loaded(other) == []
