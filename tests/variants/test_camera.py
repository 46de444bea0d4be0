"""Cameras in the blocks of Wan: the base model at first, the card's formula then, nothing left behind."""

from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

import rfkernels
from rfkernels.nn import QuantLinear
from rfkernels.samplers import sample, schedule
from rfkernels.variants.camera import CameraControl, fold_projector
from rfkernels.variants.concat import beside
from rfkernels.variants.motion import MotionAdapter
from tests.variants.plain import F64, close, draw, randomise

WIDTH, FRAMES, GRID = 32, 3, 2 * 5
CAMERAS = draw(1, FRAMES, 12, seed=9)
VIDEO, TEXT, TIME = draw(1, 4, 2 * FRAMES, 4, 10, seed=1), draw(1, 6, 24, seed=2), torch.tensor([250.0])


def wan():
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    )
    return randomise(model.eval())


def run(model, x=VIDEO, time=TIME):
    return model(x, time.expand(len(x)), TEXT.expand(len(x), -1, -1), return_dict=False)[0]


def controlled(model, seed=5):
    """With cameras and layers at random."""
    control = CameraControl(model)
    for i, block in enumerate(model.blocks):
        randomise(block.cam_encoder, seed + i)
        randomise(block.projector, seed + 10 + i)
    control.cameras = CAMERAS
    return control


def rotation(model):
    return model.rope(VIDEO)


@torch.no_grad()
def test_it_is_the_base_model_at_first_to_the_bit():
    model = wan()
    base = run(model)
    control = CameraControl(model)
    assert torch.equal(run(model), base)
    control.cameras = CAMERAS
    assert torch.equal(run(model), base)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_sees_the_camera_of_every_frame_and_ends_in_the_projector(batch):
    model = wan()
    x, block = draw(2 * batch, 2 * FRAMES * GRID, WIDTH), model.blocks[1]
    cameras = draw(batch, FRAMES, 12, seed=4)
    plain = block.attn1.__class__.forward  # without hooks
    control = controlled(model)
    control.cameras = cameras
    out = block.attn1(x, None, None, rotation(model))
    expected = []
    for b in range(2 * batch):  # the conditional half of a batch behind the other
        c = cameras[b % batch] @ block.cam_encoder.weight.T + block.cam_encoder.bias
        tokens = torch.cat([x[b, i * GRID : (i + 1) * GRID] + c[i % FRAMES] for i in range(2 * FRAMES)])
        o = plain(block.attn1, tokens[None], None, None, rotation(model))
        expected.append(o @ block.projector.weight.T + block.projector.bias)
    close(out, torch.cat(expected))


@torch.no_grad()
def test_the_camera_enters_modulated_tokens_before_the_gate():
    """The block of the card; diffusers' own is float32 within."""
    model = wan()
    controlled(model)
    block = model.blocks[0]
    x, text, temb = draw(1, 2 * FRAMES * GRID, WIDTH), draw(1, 6, WIDTH, seed=1), draw(1, 6, WIDTH, seed=2)
    shift, scale, gate, shift2, scale2, gate2 = (block.scale_shift_table + temb).chunk(6, 1)
    norm = lambda t: torch.nn.functional.layer_norm(t, (WIDTH,), eps=1e-6)
    c = block.cam_encoder(CAMERAS).repeat(1, 2, 1).repeat_interleave(GRID, 1)
    attn = type(block.attn1).forward
    y = attn(block.attn1, norm(x) * (1 + scale) + shift + c, None, None, rotation(model))
    expected = x + gate * block.projector(y)
    expected = expected + block.attn2(block.norm2(expected), text, None, None)
    expected = expected + gate2 * block.ffn(norm(expected) * (1 + scale2) + shift2)
    close(block(x, text, temb, rotation(model)), expected, 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("biases", [(True, True), (False, True), (True, False), (False, False)])
def test_a_folded_projector_is_the_product(biases):
    o, projector = (
        randomise(nn.Linear(n, m, bias=b), n) for b, n, m in zip(biases, (5, 7), (7, 7), strict=True)
    )
    folded, x = fold_projector(o, projector), draw(3, 5)
    close(folded(x), projector(o(x)), 1e-13)
    assert (folded.bias is not None) == any(biases)
    half = fold_projector(o.bfloat16(), projector)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, (projector.weight @ o.weight.double()).bfloat16())


@torch.no_grad()
def test_folding_saves_a_layer_and_changes_nothing():
    model = wan()
    control = controlled(model)
    x, attn = draw(1, 2 * FRAMES * GRID, WIDTH), model.blocks[0].attn1
    before = attn(x, None, None, rotation(model))
    control.fold()
    model.blocks[0].projector.forward = None  # it is not called
    close(attn(x, None, None, rotation(model)), before)
    del model.blocks[0].projector.forward


@torch.no_grad()
@pytest.mark.parametrize("fold", [False, True])
def test_nothing_is_left_behind(fold):
    model = wan()
    base, state = run(model), {k: v.clone() for k, v in model.state_dict().items()}
    modules = {name: id(m) for name, m in model.named_modules()}
    control = controlled(model)
    if fold:
        control.fold()
        control.fold()  # once
        with pytest.raises(ValueError, match="load before fold required"):
            control.load(released())
    assert not torch.allclose(run(model), base, atol=1e-3)
    control.detach()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(run(model), base)
    CameraControl(model)  # again


def released(prefix=""):
    layers = {"cam_encoder.weight": (WIDTH, 12), "projector.weight": (WIDTH, WIDTH)}
    layers |= {"cam_encoder.bias": (WIDTH,), "projector.bias": (WIDTH,)}
    return {
        f"{prefix}blocks.{i}.{name}": draw(*shape, seed=i) for i in range(2) for name, shape in layers.items()
    }


def test_released_keys_are_loaded_and_others_named():
    model, state = wan(), released("pipe.dit.")
    control = CameraControl(model)
    assert control.load(state | {"head.weight": draw(2)}) == ["head.weight"]
    mine = model.state_dict()
    assert all(torch.equal(mine[name.removeprefix("pipe.dit.")], t) for name, t in state.items())
    assert model.load_state_dict(released(), strict=False).unexpected_keys == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("blocks.1.projector.bias"), "blocks.1.projector.bias missing"),
        (lambda s: s.update({"blocks.2.projector.bias": draw(32)}), "blocks.2.projector.bias unknown"),
        (lambda s: s.update({"blocks.0.cam_encoder.bias": draw(3)}), r"blocks.0.cam_encoder.bias \[3\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message):
    state = released()
    change(state)
    with pytest.raises(ValueError, match=message):
        CameraControl(wan()).load(state)


def test_cameras_train():
    model = wan()
    control = CameraControl(model)
    control.cameras = CAMERAS
    run(model).square().sum().backward()
    for block in model.blocks:
        for layer in (block.cam_encoder, block.projector):
            assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@torch.no_grad()
def test_only_the_target_is_stepped_beside_a_clean_source():
    """Through the model, against an Euler loop by hand."""
    model, sigmas = wan(), schedule("linear", 3)
    controlled(model)
    x, source = draw(2, 4, FRAMES, 4, 10, seed=3), draw(2, 4, FRAMES, 4, 10, seed=4)
    seen = []

    def velocity(joint, sigma):
        seen.append(joint[:, :, FRAMES:].clone())
        return run(model, joint, 1000 * sigma[:1])

    result = sample(beside(velocity, source, dim=2), x, sigmas)
    assert len(seen) == 3 and all(torch.equal(s, source) for s in seen)
    expected = x
    for now, then in pairwise(sigmas):
        v = run(model, torch.cat([expected, source], 2), 1000 * now[None].double())
        expected = expected + (then - now).double() * v[:, :, :FRAMES]
    assert result.shape == x.shape
    close(result, expected, 1e-6)


def test_beside_cuts_every_velocity_of_a_tuple_along_any_axis():
    x, source = draw(2, 3, 4, 5), draw(1, 3, 4, 2, seed=1)
    pair = lambda joint, sigma: (joint, 2 * joint)
    u, c = beside(pair, source, dim=-1, negate=True)(x, None)
    assert torch.equal(u, -x) and torch.equal(c, -2 * x)
    for dim, wrong in ((-1, draw(2, 3, 5, 5)), (0, draw(2, 3, 4, 5)), (1, draw(3, 3, 4, 5)), (1, draw(2, 3))):
        with pytest.raises(ValueError, match="source must be like x"):
            beside(pair, wrong, dim=dim)(x, None)


def test_refusals():
    model = wan()
    with pytest.raises(ValueError, match="self-attention attn1 required, got Linear"):
        CameraControl(nn.Linear(2, 2))
    control = CameraControl(model)
    with pytest.raises(ValueError, match="no cameras yet"):
        CameraControl(model)
    for cameras, message in (
        (CAMERAS[..., :11], r"must be \[batch, frames, 12\], got \[1, 3, 11\]"),
        (draw(1, 7, 12), r"cameras \[1, 7\] must divide"),
        (draw(3, FRAMES, 12), r"cameras \[3, 3\] must divide"),
    ):
        control.cameras = cameras
        with pytest.raises(ValueError, match=message):
            run(model)
    with pytest.raises(ValueError, match=r"two nn\.Linear required, got Identity and Linear"):
        fold_projector(nn.Identity(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the 3 outputs of o"):
        fold_projector(nn.Linear(2, 3), nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_follow_the_model(dtype):
    model = wan().to(dtype)
    control = CameraControl(model)
    control.cameras = CAMERAS.float()
    assert model.blocks[0].projector.weight.dtype == dtype
    x = draw(1, 2 * FRAMES * GRID, WIDTH).to(dtype)
    assert model.blocks[0].attn1(x, None, None, rotation(model)).dtype == dtype
    control.fold()
    model.to(F64)
    assert model.blocks[0].cam_encoder.weight.dtype == F64
    control.detach()
    assert model.blocks[0].attn1.to_out[0].weight.dtype == F64


@torch.no_grad()
def test_beside_quantised_layers_a_dtype_is_asked_for():
    model = wan().float()
    for block in model.blocks:
        block.attn1.to_out[0] = QuantLinear.from_linear(block.attn1.to_out[0], "int8")
    for add in (CameraControl, lambda m: MotionAdapter(b.attn1 for b in m.blocks)):
        with pytest.raises(ValueError, match="dtype must be given beside weights that are codes"):
            add(model)
    attn, x = model.blocks[0].attn1, draw(1, 2 * FRAMES * GRID, WIDTH).float()
    base = attn(x, None, None, rotation(model))
    CameraControl(model, dtype=torch.float32)
    assert torch.equal(attn(x, None, None, rotation(model)), base)


@torch.no_grad()
def test_accelerated_model_has_its_cameras():
    """Hooks of the attention are not passed over: these blocks run their own forward."""
    model = wan()
    control = controlled(model)
    expected = run(model)
    rfkernels.accelerate(model)
    close(run(model), expected, 1e-5)
    assert "attn1 has a hook" in str(rfkernels.explain(model))
    control.detach()
    plain = run(model)
    assert (plain - expected).abs().max() > 1e-3
    rfkernels.restore(model)
    close(run(model), plain, 1e-5)
