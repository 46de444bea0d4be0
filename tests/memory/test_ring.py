"""Streamed layers: the same bits as on the device, no slot read too early or overwritten too soon."""

import itertools
import random

import pytest
import torch
from torch import nn

from rfkernels.adapters.base import Factors
from rfkernels.memory import SimulatedBackend, stream_layers
from rfkernels.memory.residency import device_bytes, streamed_layers
from rfkernels.nn import LoRALinear, QuantLinear

LARGE = 1 << 30


class Block(nn.Module):
    def __init__(self, width=16, hidden=24):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.register_buffer("scale", torch.rand(width))

    def forward(self, x):
        return x + self.scale * self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, count, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block(hidden=16 + 8 * (i % 3)) for i in range(count))

    def forward(self, x, order=None):
        x = self.first(x)
        for i in range(len(self.blocks)) if order is None else order:
            x = self.blocks[i](x)
        return self.last(x)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def stream(model, layers=("blocks",), seed=0, budget=LARGE, **options):
    return stream_layers(model, layers, backend=SimulatedBackend(budget, seed=seed), **options)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("count, ahead", list(itertools.product((1, 2, 3, 5, 8), (0, 1, 2, 3))))
def test_bits_of_every_ring(count, ahead):
    expected = Model(count)(X)
    for slots in range(ahead + 1, count + 2):
        model = Model(count)
        with stream(model, slots=slots, ahead=ahead, seed=slots) as handle:
            for _ in range(3):
                assert torch.equal(model(X), expected)
            assert len(handle.streamed) == (0 if slots >= count else count - slots + ahead + 1)
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_repeats_and_skips(seed):
    chance = random.Random(seed)
    model, resident = Model(7, seed), Model(7, seed)
    ahead = chance.randint(0, 3)
    with stream(model, slots=chance.randint(ahead + 1, 6), ahead=ahead, seed=seed):
        for _ in range(20):
            order = [chance.randrange(7) for _ in range(chance.randint(0, 12))]
            assert torch.equal(model(X, order), resident(X, order))


def test_each_layer_is_copied_once_a_step_and_guidance_costs_nothing():
    model = Model(6)
    with stream(model, slots=3, ahead=1) as handle:  # 5 of 6 layers share two slots
        model(X)
        before = handle.copies
        model(X)
        assert handle.copies - before == len(handle.streamed) == 5
        before = handle.copies
        model(X, [i for i in range(6) for _ in range(2)])  # both branches at each layer
        assert handle.copies - before == 5


def test_a_jump_back_keeps_what_comes_next():
    model = Model(8)
    with stream(model, slots=3, ahead=2) as handle:
        model(X, [0, 1, 2, 1])
        assert handle.copies == 3 + 2 + 1  # at the start; 3 and 4; 1 again, in the place of 4


def test_restore_gives_back_the_same_tensors_and_values():
    model = Model(5).to(torch.bfloat16)
    model.blocks[1].up.weight.data = model.blocks[1].up.weight.data.t().contiguous().t()  # other strides
    objects = tensors(model)
    before = {n: (t.clone(), t.stride(), t.device) for n, t in objects.items()}
    handle = stream(model, slots=2, ahead=1)
    model(X.bfloat16())
    assert {n: t.stride() for n, t in tensors(model).items()} == {n: b[1] for n, b in before.items()}
    handle.restore()
    handle.restore()  # once more is nothing
    for name, tensor in tensors(model).items():
        assert tensor is objects[name]
        value, stride, device = before[name]
        assert torch.equal(tensor.view(torch.int16), value.view(torch.int16))
        assert (tensor.stride(), tensor.device) == (stride, device)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # memory of its own
    assert handle.backend.allocated == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_state_dict_is_right_and_can_be_loaded_into_while_streamed():
    model, other = Model(5), Model(5, seed=3)
    with stream(model, slots=2) as handle:
        model(X)
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in Model(5).state_dict().items())
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(X), other(X))
        handle.backend.synchronize()  # the first layers of the next step lie in slots
        for block, source in zip(model.blocks, Model(5, seed=4).blocks, strict=True):
            for p, q in zip(block.parameters(), source.parameters(), strict=True):
                p.data.copy_(q)  # unseen
        handle.refresh()
        other = Model(5, seed=4)
        other.first, other.last = model.first, model.last
        for ours, theirs in zip(model.blocks, other.blocks, strict=True):
            theirs.scale = ours.scale
        assert torch.equal(model(X), other(X))
    assert torch.equal(model(X), other(X))


def test_quantised_layers():
    def make():
        model = Model(4)
        for i, block in enumerate(model.blocks):
            format = ("int8", "fp8", "w4a16", "int8")[i]
            options = {"group": 8} if format == "w4a16" else {}
            block.up = QuantLinear.from_linear(block.up, format, **options)
        return model

    model, resident = make(), make()
    with stream(model, slots=2, ahead=1):
        for _ in range(2):
            assert torch.equal(model(X), resident(X))
    assert model.blocks[1].up.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model(X), resident(X))


def test_adapters_stay_on_the_device_and_can_be_switched():
    def make():
        model = Model(4)
        for block in model.blocks:
            block.up = LoRALinear(block.up, [2])
            block.up.load(0, Factors(torch.randn(2, 16), torch.randn(block.up.out_features, 2)))
        return model

    model, resident = make(), make()
    with stream(model, slots=2, ahead=1) as handle:
        moving = {id(t) for layer in handle._layers if layer for t, _ in layer.pack.places}
        assert id(model.blocks[0].up.base.weight) in moving
        assert not moving & {id(model.blocks[i].up.down) for i in range(4)}
        assert torch.equal(model(X), resident(X))
        for m in (model, resident):
            m.blocks[2].up.load(0, Factors(torch.ones(2, 16), torch.ones(m.blocks[2].up.out_features, 2)))
        assert torch.equal(model(X), resident(X))


def test_shared_tensors_stay_shared():
    def make():
        model = Model(5)
        model.blocks[3].up.bias = model.blocks[0].up.bias  # one parameter in two layers
        model.blocks[4].down.bias.data = model.last.weight.data[1]  # a part of another's
        flat = torch.randn(2 * 16)
        model.blocks[1].up.bias.data, model.blocks[1].down.bias.data = flat[:24], flat[8:24]  # overlap
        return model

    torch.manual_seed(5)
    model = make()
    torch.manual_seed(5)
    resident = make()
    with stream(model, slots=2, ahead=1):
        for _ in range(2):
            assert torch.equal(model(X), resident(X))
    assert model.blocks[3].up.bias is model.blocks[0].up.bias
    model.blocks[1].down.bias[0] = 7.0
    assert model.blocks[1].up.bias[8] == 7.0


def test_views_of_one_memory_in_two_dtypes():
    model = Model(4)
    memory = torch.arange(64, dtype=torch.uint8)
    model.blocks[1].register_buffer("bytes", memory[1:33])
    model.blocks[1].register_buffer("numbers", memory[4:36].view(torch.int32))
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda m, _: seen.append((m.bytes.clone(), m.numbers.clone())))
    with stream(model, slots=2, ahead=1):
        model(X)
    for numbers, words in (*seen, (model.blocks[1].bytes, model.blocks[1].numbers)):
        assert torch.equal(numbers, memory[1:33]) and torch.equal(words, memory[4:36].view(torch.int32))


@pytest.mark.parametrize("ahead", (0, 1))
def test_a_failure_inside_a_layer_leaves_a_usable_model(ahead):
    model, resident = Model(5), Model(5)
    with stream(model, slots=ahead + 1, ahead=ahead):
        for error in (ValueError, KeyboardInterrupt):  # no hook of torch runs after the second
            hook = model.blocks[2].down.register_forward_pre_hook(raising(error))
            with pytest.raises(error):
                model(X)
            hook.remove()
            for _ in range(2):
                assert torch.equal(model(X), resident(X))
    assert torch.equal(model(X), resident(X))


def test_a_failure_of_a_layer_called_by_itself():
    model = Model(3)
    x = torch.randn(2, 16)
    expected = model.blocks[0](x)
    with stream(model, slots=1, ahead=0):
        with pytest.raises(RuntimeError, match="shapes"):
            model.blocks[1](x[:, :3])
        assert torch.equal(model.blocks[0](x), expected)  # the slot is free again


def raising(error):
    def hook(*_):
        raise error

    return hook


@pytest.mark.parametrize("ahead", (0, 1, 2))
def test_a_budget_is_kept_and_used(ahead):
    sizes = [2048 + 256 * (i % 3) * 4 for i in range(8)]
    for budget in range(0, sum(sizes) + 512, 512):
        streamed = streamed_layers(sizes, ahead=ahead, budget=budget)
        everything = min(len(sizes), ahead + 1) * max(sizes)
        if streamed is None:
            assert budget < everything
            continue
        assert device_bytes(sizes, streamed, ahead) <= budget
        assert streamed or budget >= sum(sizes)


def test_layers_that_move_are_evenly_spread():
    assert streamed_layers([1] * 8, slots=6) == (1, 3, 5, 7)
    assert streamed_layers([1] * 9, slots=8) == (2, 5, 8)
    assert streamed_layers([1] * 9, slots=9) == ()


def test_device_bytes_are_what_the_backend_counts():
    model = Model(8)
    rest = sum(t.nbytes for m in (model.first, model.last) for t in m.parameters())
    handle = stream(model, resident_bytes=20_000, ahead=1)
    backend = handle.backend
    assert backend.allocated == backend.peak == handle.device_bytes <= 20_000 + rest + 4 * 256
    assert len(handle.streamed) < 8 and handle.resident
    model(X)
    assert backend.peak == handle.device_bytes  # a run allocates nothing
    assert f"{handle.device_bytes:,} bytes on the device" in repr(handle)


def test_a_device_without_room_leaves_the_model_as_it_was():
    model = Model(4)
    with pytest.raises(MemoryError, match="bytes are free"):
        stream(model, slots=3, budget=6000)
    assert torch.equal(model(X), Model(4)(X))
    with stream(model, slots=2):
        assert torch.equal(model(X), Model(4)(X))


def test_inference_mode_and_tensors_made_in_it():
    with torch.inference_mode():
        model = Model(4)
    with stream(model, slots=2, ahead=1), torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(X), Model(4)(X))
    assert torch.equal(model(X), Model(4)(X))


def test_what_would_be_wrong_is_refused():
    model = Model(4)
    with stream(model, slots=2, ahead=1):
        with torch.enable_grad(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
            model(X)
        assert torch.equal(model(X), Model(4)(X))
        with pytest.raises(ValueError, match="streamed already"):
            stream(model, slots=2)
        model.double()
        with pytest.raises(RuntimeError, match="moved or replaced"):
            model(X.double())
    with stream(model := Model(4), slots=2, ahead=1):
        hook = model.blocks[1].down.register_forward_hook(lambda *_: model.blocks[1].scale.add_(1))
        with pytest.raises(RuntimeError, match=r"blocks\.1 writes to its own tensors"):
            model(X)
        hook.remove()
        assert torch.equal(model(X), Model(4)(X))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        return {"table": [self.weight[1:]], "x": x}


def test_a_layer_that_returns_a_weight_is_refused():
    model = nn.Sequential(Table(), nn.Linear(4, 4), nn.Linear(4, 4))
    with stream(model, ["0", "1"], slots=1, ahead=0), pytest.raises(RuntimeError, match="0 returns its own"):
        model(X)


@pytest.mark.parametrize(
    "layers, options, message",
    [
        (["blocks"], {}, "one of slots and resident_bytes"),
        (["blocks"], {"slots": 2, "resident_bytes": 9}, "one of slots and resident_bytes"),
        (["blocks"], {"slots": 2, "ahead": -1}, "ahead >= 0"),
        (["blocks"], {"slots": 1}, r"2 slots, \d+ bytes, are required"),
        (["blocks"], {"resident_bytes": 100}, "resident_bytes=100"),
        (["block"], {"slots": 2}, "got block"),
        ([nn.Linear(1, 1)], {"slots": 2}, "got Linear"),
        (["blocks", "blocks.1"], {"slots": 2}, r"blocks\.1 twice"),
        (["blocks.0", "blocks.0.up"], {"slots": 2}, r"blocks\.0\.up within blocks\.0"),
        ([], {"slots": 2}, "at least one layer"),
    ],
)
def test_bad_input(layers, options, message):
    with pytest.raises(ValueError, match=message):
        stream(Model(3), layers, **options)


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = Model(3)
    with pytest.raises(ValueError, match="with memory"):
        stream(model, slots=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_without_cuda():
    with pytest.raises(ValueError, match="a CUDA device is required"):
        stream_layers(Model(3), ["blocks"], slots=2)
    assert torch.equal(Model(3)(X), Model(3)(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("slots, ahead", [(1, 0), (2, 1), (4, 2), (8, 1)])
def test_on_a_gpu(slots, ahead):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    x = torch.randn(64, 512, device="cuda")
    expected = model.cuda()(x)
    model.cpu()
    with stream_layers(model, list(model), slots=slots, ahead=ahead):
        for _ in range(5):
            assert torch.equal(model(x), expected)
    assert model[0].weight.device.type == "cpu" and torch.equal(model.cuda()(x), expected)
