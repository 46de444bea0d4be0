"""Files of every dialect: the merged weights are those of the original model with the same differences."""

import pytest
import torch

from rfkernels.adapters.load import load_lora, unload_lora
from rfkernels.adapters.merge import merge_lora, unmerge_lora
from tests.adapters.dialects import (
    STYLES,
    assert_state,
    assert_untouched,
    expected,
    low_rank,
    modules_and_bits,
    randn,
    weights,
)
from tests.adapters.models import CONVERTED, model_of, original


def check(family: str, model, tensors, deltas, strength: float = 0.7) -> None:
    """Loaded, merged: the expected weights. Unmerged, unloaded: the model of before."""
    before = modules_and_bits(model)
    wanted = expected(family, model, deltas, strength)
    report = load_lora(model, tensors, scale=strength)
    assert not report.unknown and not report.text_encoder
    merge_lora(model)
    assert_state(model, wanted)
    unmerge_lora(model)
    unload_lora(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("family", CONVERTED)
@pytest.mark.parametrize("style", STYLES)
def test_low_rank(family, style):
    model = model_of(family)
    check(family, model, *low_rank(model, style))


@pytest.mark.parametrize("family", CONVERTED)
def test_full_differences(family):
    """`.diff` of weights, `.diff_b` of biases, norms and tables of modulation included."""
    model = model_of(family)
    tensors, deltas = {}, {}
    for i, (name, tensor) in enumerate(original(model).items()):
        module, _, kind = name.rpartition(".")
        kind = {"weight": "diff", "bias": "diff_b", "scale": "diff"}.get(kind)
        key = f"diffusion_model.{module}.{kind}" if kind else f"diffusion_model.{name}.diff"
        if kind == "diff" and name.endswith(".scale"):
            key = f"diffusion_model.{name}.diff"
        if name == "pos_embed":  # a buffer
            continue
        deltas[name] = randn(*tensor.shape, seed=i)
        tensors[key] = deltas[name]
    check(family, model, tensors, deltas)


def test_xlabs():
    """1 is the image, 2 the text; of a single block q, k, v alone, not the MLP."""
    model, tensors, deltas = model_of("flux"), {}, {}
    pairs = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.1.processor.qkv_lora2": "double_blocks.1.txt_attn.qkv",
        "double_blocks.1.processor.proj_lora1": "double_blocks.1.img_attn.proj",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
        "single_blocks.1.processor.qkv_lora": "single_blocks.1.linear1",
        "single_blocks.1.processor.proj_lora": "single_blocks.1.linear2",
    }
    for i, (key, name) in enumerate(pairs.items()):
        out, features = weights(model)[name].shape
        rows = 3 * 24 if key.endswith("qkv_lora") else out
        a, b = randn(4, features, seed=i), randn(rows, 4, seed=i + 50)
        tensors |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
        deltas[f"{name}.weight"] = torch.cat((b @ a, torch.zeros(out - rows, features)))
    check("flux", model, tensors, deltas)


def test_block_diagonal_qkv():
    """sd-scripts trains q, k, v apart, stores A stacked and B block diagonal: each gets its own rank."""
    model = model_of("flux")
    tensors, deltas = {}, {}
    for name, parts in (
        ("double_blocks.0.img_attn.qkv", [24] * 3),
        ("single_blocks.0.linear1", [24] * 3 + [96]),
    ):
        n = len(parts)
        a = randn(2 * n, 24, seed=n)
        b = torch.block_diag(*(randn(size, 2, seed=size + i) for i, size in enumerate(parts)))
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{stem}.lora_down.weight": a,
            f"{stem}.lora_up.weight": b,
            f"{stem}.alpha": torch.tensor(4.0),
        }
        deltas[f"{name}.weight"] = 4 / (2 * n) * b @ a
    report = load_lora(model, tensors)
    assert set(report.layers.values()) == {"rank 2"}
    unload_lora(model)
    check("flux", model, tensors, deltas)


def test_fused_qkv_shares_one_down():
    model = model_of("flux")
    tensors, _ = low_rank(model, "comfy", r"double_blocks\.0\.img_attn\.qkv")
    report = load_lora(model, tensors)
    assert report.layers == {f"transformer_blocks.0.attn.to_{c}": "rank 3" for c in "qkv"}


@pytest.mark.parametrize(
    "name", ["final_layer.adaLN_modulation.1", "final_layer.linear", "img_in", "time_in.in_layer"]
)
def test_what_others_drop(name):
    """diffusers 0.42 drops these kohya keys, has no alpha for final_layer and no swap for FLUX.2."""
    for family in ("flux", "flux2"):
        model = model_of(family)
        check(family, model, *low_rank(model, "kohya", f"^{name.replace('.', '[.]')}$"))


def test_control_lora():
    """BFL's depth and canny LoRAs: biases of B, norms replaced, an input twice as wide."""
    model = model_of("flux")
    before = modules_and_bits(model)
    tensors, deltas = low_rank(model, "comfy", "img_attn|txt_attn")
    tensors = {key.removeprefix("diffusion_model."): t for key, t in tensors.items()}
    state = original(model)
    for i, name in enumerate([n for n in state if n.endswith("_norm.scale") and "double" in n]):
        tensors[name] = randn(*state[name].shape, seed=i)
        deltas[name] = tensors[name] - state[name]
    for i, name in enumerate(["double_blocks.0.img_attn.proj", "double_blocks.1.txt_attn.qkv"]):
        tensors[f"{name}.lora_B.bias"] = deltas[f"{name}.bias"] = randn(*state[f"{name}.bias"].shape, seed=i)
    a, b = randn(3, 16, seed=77), randn(24, 3, seed=78)
    tensors |= {"img_in.lora_A.weight": a, "img_in.lora_B.weight": b}
    wanted = expected("flux", model, deltas)
    wide = torch.cat((wanted["x_embedder.weight"], torch.zeros(24, 8)), 1) + b @ a
    load_lora(model, tensors)
    assert model.config.in_channels == 16
    merge_lora(model)
    assert_state(model, wanted | {"x_embedder.weight": wide})
    unload_lora(model)
    assert model.config.in_channels == 8
    assert_untouched(model, before)


def test_replaced_norm_and_reshape_weight():
    """ComfyUI: `.set_weight` in place of a weight; `.reshape_weight` states the width a LoRA needs."""
    model = model_of("flux")
    before = modules_and_bits(model)
    norm, value = "transformer_blocks.0.attn.norm_q", randn(12, seed=1)
    a, b = randn(2, 12, seed=2), randn(24, 2, seed=3)
    load_lora(
        model,
        {
            f"diffusion_model.{norm}.set_weight": value,
            "diffusion_model.txt_in.lora_A.weight": a,
            "diffusion_model.txt_in.lora_B.weight": b,
            "diffusion_model.txt_in.reshape_weight": torch.tensor([24, 12]),
        },
    )
    assert torch.equal(model.get_parameter(f"{norm}.weight"), value)
    merge_lora(model)
    wide = torch.cat((before[1]["context_embedder.weight"], torch.zeros(24, 2)), 1) + b @ a
    torch.testing.assert_close(model.context_embedder.weight, wide, rtol=1e-12, atol=1e-12)
    unload_lora(model)
    assert_untouched(model, before)


def test_w_norm_b_norm():
    model = model_of("wan")
    before = modules_and_bits(model)
    w, b = randn(24, seed=1), randn(24, seed=2)
    load_lora(
        model, {"diffusion_model.blocks.0.norm3.w_norm": w, "diffusion_model.blocks.0.norm3.b_norm": b}, 0.5
    )
    norm = model.blocks[0].norm2
    torch.testing.assert_close(norm.weight, before[1]["blocks.0.norm2.weight"] + 0.5 * w)
    torch.testing.assert_close(norm.bias, before[1]["blocks.0.norm2.bias"] + 0.5 * b)
    unload_lora(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_hadamard_and_kronecker(family):
    """LyCORIS on fused layers: LoHa's rows are split, a Kronecker product's become a difference."""
    model, tensors, deltas = model_of(family), {}, {}
    linear = {n: w for n, w in weights(model).items() if w.ndim == 2}
    for i, (name, weight) in enumerate(linear.items()):
        out, features = weight.shape
        stem = f"lycoris_{name.replace('.', '_')}"
        if i % 2:
            u1, d1, u2, d2 = (
                randn(*shape, seed=9 * i + j) * 3
                for j, shape in enumerate([(out, 2), (2, features), (out, 2), (2, features)])
            )
            factors = {
                "hada_w1_a": u1,
                "hada_w1_b": d1,
                "hada_w2_a": u2,
                "hada_w2_b": d2,
                "alpha": torch.tensor(1.0),
            }
            delta = 0.5 * (u1 @ d1) * (u2 @ d2)
        else:
            w1, w2a, w2b = (
                randn(2, 2, seed=i),
                randn(out // 2, 3, seed=i + 1),
                randn(3, features // 2, seed=i + 2),
            )
            factors = {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": torch.tensor(1.0)}
            delta = torch.kron(w1, w2a @ w2b) / 3
        tensors |= {f"{stem}.{role}": t for role, t in factors.items()}
        deltas[f"{name}.weight"] = delta
    check(family, model, tensors, deltas)


def test_names_of_diffusers_and_onetrainer():
    """The model's own names, with dots or underscores, and peft's name of the adapter."""
    model = model_of("qwen")
    paths = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for prefix, flat, down, up in (
        ("transformer.", False, "lora_A", "lora_B"),
        ("", False, "lora_A.default", "lora_B.default"),
        ("lora_transformer_", True, "lora_down", "lora_up"),
        ("lora_unet_", True, "lora_down", "lora_up"),
    ):
        before = modules_and_bits(model)
        tensors, wanted = {}, dict(before[1])
        for i, (path, layer) in enumerate(paths.items()):
            a, b = randn(2, layer.in_features, seed=i), randn(layer.out_features, 2, seed=i + 500)
            stem = prefix + (path.replace(".", "_") if flat else path)
            tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
            wanted[f"{path}.weight"] = wanted[f"{path}.weight"] + b @ a
        load_lora(model, tensors)
        merge_lora(model)
        assert_state(model, wanted)
        unload_lora(model)
        assert_untouched(model, before)


def test_old_diffusers_processors():
    """`attn.processor.to_out_lora.down.weight` is `attn.to_out.0`."""
    model = model_of("flux")
    a, b = randn(2, 24, seed=0), randn(24, 2, seed=1)
    stem = "transformer_blocks.0.attn.processor"
    report = load_lora(
        model,
        {
            f"{stem}.to_q_lora.down.weight": a,
            f"{stem}.to_q_lora.up.weight": b,
            f"{stem}.to_out_lora.down.weight": a,
            f"{stem}.to_out_lora.up.weight": b,
        },
    )
    assert list(report.layers) == ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"]


def test_bias_of_a_convolution():
    """A convolution's LoRA is merged into it, its biases too."""
    model = model_of("wan")
    before = modules_and_bits(model)
    weight = model.patch_embedding.weight
    a, b = randn(2, *weight.shape[1:], seed=0), randn(24, 2, 1, 1, 1, seed=1)
    stem, bias, more = "diffusion_model.patch_embedding", randn(24, seed=2), randn(24, seed=3)
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(1.0)}
    tensors |= {f"{stem}.lora_B.bias": bias, f"{stem}.diff_b": more}
    load_lora(model, tensors, 0.5)
    delta = 0.5 * (b.flatten(1) @ a.flatten(1)).view(weight.shape)
    torch.testing.assert_close(
        weight, before[1]["patch_embedding.weight"] + 0.5 * delta, rtol=1e-12, atol=1e-12
    )
    wanted = before[1]["patch_embedding.bias"] + 0.5 * (0.5 * bias + more)
    torch.testing.assert_close(model.patch_embedding.bias, wanted, rtol=1e-12, atol=1e-12)
    unload_lora(model)
    assert_untouched(model, before)
