"""What no file may do: be dropped in part, fit by accident, or hold a NaN. The model stays as it was."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rfkernels.adapters.files import read_lora
from rfkernels.adapters.load import load_lora, loaded, set_adapters, unload_lora
from rfkernels.adapters.merge import merge_lora, unmerge_lora
from tests.adapters.dialects import assert_untouched, low_rank, modules_and_bits, randn
from tests.adapters.models import model_of


def pair(out=12, features=8, rank=2, name="fc"):
    return {
        f"{name}.lora_A.weight": randn(rank, features, seed=1),
        f"{name}.lora_B.weight": randn(out, rank, seed=2),
    }


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv2d(4, 6, 3)


def replaced(key, tensor):
    return pair() | {key: tensor}


NAN = torch.full((2, 8), torch.nan)
REFUSED = {
    "nan": (replaced("fc.lora_A.weight", NAN), r"must be finite, got NaN or infinity in fc\.lora_A\.weight"),
    "rank": (
        replaced("fc.lora_A.weight", torch.ones(3, 8)),
        r"rank must be one for both factors, got fc\.lora_A\.weight \[3, 8\] and fc\.lora_B",
    ),
    "inputs": (replaced("fc.lora_A.weight", torch.ones(2, 9)), r"weight \[12, 8\] of fc, got \[12, 9\]"),
    "outputs": (replaced("fc.lora_B.weight", torch.ones(11, 2)), r"weight \[12, 8\] of fc, got \[11, 8\]"),
    "axes": (replaced("fc.lora_A.weight", torch.ones(8)), r"rank must be one for both factors, got"),
    "difference": (
        {"fc.diff": torch.ones(8, 11)},
        r"fc\.diff must have the shape \[12, 8\] of fc\.weight, got",
    ),
    "bias": ({"fc.diff_b": torch.ones(11)}, r"fc\.diff_b must be \[12\], got \[11\]"),
    "norm": (
        {"norm.diff": torch.ones(11)},
        r"norm\.diff must have the shape \[12\] of norm\.weight, got \[11\]",
    ),
    "LoHa": (
        {f"fc.hada_w{i}_{s}": torch.ones(*n) for i in "12" for s, n in (("a", (12, 2)), ("b", (2, 9)))},
        "fc must have 96 numbers, got 108",
    ),
    "half a LoHa": ({"fc.hada_w1_a": torch.ones(12, 2)}, "fc: LoHa has the tensors"),
    "convolution": (
        {"conv.lora_down.weight": torch.ones(2, 4, 1, 1), "conv.lora_up.weight": torch.ones(6, 2, 1, 1)},
        r"must fit the weight \[6, 4, 3, 3\] of conv",
    ),
    "two adapters": (
        pair() | {"fc.lora_A.other.weight": torch.ones(2, 8)},
        r"one adapter a file, got both fc\.lora_A\.weight and fc\.lora_A\.other\.weight",
    ),
    "nothing": ({}, "a file with adapters for this model required"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    tensors, message = REFUSED[case]
    model = Toy().requires_grad_(False)
    before = modules_and_bits(model)
    with pytest.raises(ValueError, match=message):
        load_lora(model, tensors)
    assert_untouched(model, before)


def test_unknown_keys_are_listed():
    """All of them; `strict=False` loads the rest and reports them."""
    model = Toy()
    strange = {"fc9.lora_A.weight": torch.ones(2, 8), "fc.oft_blocks": torch.ones(2), "x": torch.ones(1)}
    lonely = {"norm.alpha": torch.ones(()), "conv.lora_A.weight": torch.ones(2, 4, 3, 3)}
    encoder = {
        "lora_te1_text_model_layers_0_fc1.alpha": torch.ones(()),
        "text_encoder.x.lora_A.weight": torch.ones(1),
    }
    with pytest.raises(ValueError, match="4 keys mean nothing for this model") as error:
        load_lora(model, pair() | {k: v for k, v in (strange | lonely).items() if k != "x"} | encoder)
    assert all(key in str(error.value) for key in [*lonely, "fc9.lora_A.weight", "fc.oft_blocks"])
    report = load_lora(model, pair() | strange | lonely | encoder, strict=False)
    assert set(report.unknown) == {*strange, *lonely}
    assert set(report.text_encoder) == {*encoder}
    assert list(report.layers) == ["fc"]


def test_magnitude_of_a_fused_layer():
    """One per input is a norm over all rows of the fused layer, which its parts do not know."""
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = pair(72, 24, name=stem) | {f"{stem}.dora_scale": torch.ones(1, 24)}
    with pytest.raises(ValueError, match=r"dora_scale must be one number per output, since .* in 3 parts"):
        load_lora(model_of("flux"), tensors)


def test_failure_halfway():
    """DoRA beside strengths per sample is refused when a slot is filled: layers before it are restored."""
    model = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(8, 12)}).requires_grad_(False)
    before = modules_and_bits(model)
    load_lora(model, pair(name="b"), name="one")
    set_adapters(model, "one", torch.ones(3, 1))
    y = model["b"](torch.ones(3, 8))
    dora = pair(name="a") | pair(name="b") | {"b.lora_magnitude_vector": torch.ones(12)}
    with pytest.raises(ValueError, match="strengths of DoRA must be one per slot"):
        load_lora(model, dora, name="two")
    assert loaded(model) == ["one"] and type(model["a"]) is nn.Linear
    assert torch.equal(model["b"](torch.ones(3, 8)), y)
    with pytest.raises(ValueError, match=r"strength of two must be one number, since it changes a\.weight"):
        load_lora(model, {"a.diff": torch.ones(12, 8)}, torch.ones(3), "two")
    unload_lora(model)
    assert_untouched(model, before)


def test_one_name_a_layer():
    """A file with the fused and the split layer would count twice."""
    model = model_of("flux")
    tensors, _ = low_rank(model, "comfy", r"double_blocks\.0\.img_attn\.qkv")
    more = pair(24, 24, name="transformer_blocks.0.attn.to_k")
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_k must be changed by one name"):
        load_lora(model, tensors | more)


def test_rows_of_a_fused_layer():
    tensors = pair(70, 24, name="diffusion_model.double_blocks.0.img_attn.qkv")
    with pytest.raises(ValueError, match=r"lora_B\.weight must have 24 \+ 24 \+ 24 rows, got \[70, 2\]"):
        load_lora(model_of("flux"), tensors)


def test_hyperparameters_of_peft(tmp_path):
    """Metadata of diffusers: alpha, patterns, rank-stabilised scale; an alpha among the tensors wins."""
    path, model = tmp_path / "lora.safetensors", Toy()
    for config, scale in (
        ({"r": 2, "lora_alpha": 4}, 2.0),
        ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
        ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"fc": 1}}, 0.5),
        ({"r": 8, "lora_alpha": 4, "rank_pattern": {"f.": 2}}, 2.0),
        ({"r": 8, "lora_alpha": 4, "rank_pattern": {"^fc": 2}, "alpha_pattern": {"c": 64}}, 2.0),
    ):
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        save_file({f"transformer.{k}": v for k, v in pair().items()}, path, metadata)
        (record,) = read_lora(path, model).records
        assert record.item.scale == pytest.approx(scale)
    assert read_lora(pair(), model).records[0].item.scale == 1
    assert read_lora(pair(), model, config={"r": 2, "lora_alpha": 1}).records[0].item.scale == 0.5
    with_alpha = pair() | {"fc.alpha": torch.tensor(6.0)}
    assert read_lora(with_alpha, model, config={"r": 2, "lora_alpha": 1}).records[0].item.scale == 3
    with pytest.raises(ValueError, match="rank of fc must be 3 as the file states, got 2"):
        read_lora(pair(), model, config={"r": 3, "lora_alpha": 1})


def test_calls_out_of_order():
    model = Toy()
    for call, name in ((set_adapters, "set_adapters"), (merge_lora, "merge_lora")):
        with pytest.raises(ValueError, match=f"{name}: a model with adapters required, none are loaded"):
            call(model, "one")
    with pytest.raises(ValueError, match="unmerge_lora: merged adapters required, none are"):
        unmerge_lora(model)
    load_lora(model, pair(), name="one")
    with pytest.raises(ValueError, match=r"names must be of \['one'\], got \['two'\]"):
        set_adapters(model, ["one", "two"])
    with pytest.raises(ValueError, match="one strength per name, got 1 names, 2 strengths"):
        set_adapters(model, ["one"], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"name must be one of \['one'\], got two"):
        unload_lora(model, "two")
    with pytest.raises(ValueError, match="name must be new, got one"):
        load_lora(model, pair(), name="one")
    with pytest.raises(ValueError, match=r"names must be of \['one'\], got \['two'\]"):
        merge_lora(model, "two")
    merge_lora(model)
    with pytest.raises(ValueError, match="adapters are merged already"):
        merge_lora(model)


def test_what_cannot_be_merged_leaves_the_model():
    """A nonlinear adapter says why; layers merged before it are restored."""
    from rfkernels.adapters.base import Adapter

    class Bent(Adapter):
        kind = "a bottleneck"

        def forward(self, x, base):
            return base(x).relu()

    model = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(8, 12)}).requires_grad_(False)
    before = modules_and_bits(model)
    load_lora(model, pair(name="a") | pair(name="b"))
    model["b"].load_extra(0, Bent({}))
    wrapped = model["a"]
    with pytest.raises(ValueError, match="a bottleneck cannot be merged into a weight"):
        merge_lora(model)
    assert model["a"] is wrapped
    unload_lora(model)
    assert_untouched(model, before)


def test_layers_that_are_not_in_use():
    """diffusers keeps to_q beside the fused projection that it calls."""
    model = model_of("flux")
    tensors = pair(24, 24, name="transformer_blocks.0.attn.to_q")
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q must be in use, unfuse"):
        load_lora(model, tensors)
    model.unfuse_qkv_projections()
    load_lora(model, tensors)


def test_widening_of_a_changed_layer():
    model = model_of("flux")
    load_lora(model, {"x_embedder.diff": torch.ones(24, 8)})
    with pytest.raises(ValueError, match=r"x_embedder is to be widened: an nn\.Linear without"):
        load_lora(model, pair(24, 16, name="img_in"))
    unload_lora(model)
    load_lora(model, pair(24, 16, name="img_in"))
    load_lora(model, pair(24, 8, name="img_in"), name="narrow")  # reads the first channels
    assert model.x_embedder.in_features == 16
