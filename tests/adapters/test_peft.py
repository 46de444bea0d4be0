"""peft and diffusers as counterparts, where they are right."""

import copy

import pytest
import torch
from torch import nn

from rfkernels.adapters.load import load_lora, set_adapters, unload_lora
from rfkernels.adapters.merge import merge_lora
from tests.adapters.dialects import assert_untouched, low_rank, modules_and_bits, randn
from tests.adapters.models import INPUTS, model_of, run

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12, dtype=torch.float64), nn.Linear(12, 6, dtype=torch.float64)
        for i, p in enumerate(self.parameters()):
            p.requires_grad_(False).copy_(randn(*p.shape, seed=900 + i) * 5)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def randomised(model: nn.Module, key: str = "lora_") -> nn.Module:
    model = model.to(torch.float64).eval()  # adapters too
    for i, (name, p) in enumerate(model.named_parameters()):
        if key in name and "magnitude" not in name:
            p.requires_grad_(False).copy_(randn(*p.shape, seed=i) * 5)
    return model


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


CONFIGS = {
    "lora": (peft.LoraConfig, {"r": 3, "lora_alpha": 5}),
    "rslora": (peft.LoraConfig, {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "patterns": (
        peft.LoraConfig,
        {"r": 3, "lora_alpha": 5, "rank_pattern": {"fc2": 2}, "alpha_pattern": {"^fc1": 7}},
    ),
    "bias": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "lora_bias": True}),
    "dora": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "loha": (peft.LoHaConfig, {"r": 2, "alpha": 5}),
    "loha of rank 16": (peft.LoHaConfig, {"r": 16, "alpha": 5}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 5}),
    "lokr of whole factors": (peft.LoKrConfig, {"r": 64, "alpha": 5}),
}


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # peft's, of its own lora_bias
@pytest.mark.parametrize("case", CONFIGS)
def test_saved_by_peft(case, tmp_path):
    """The folder that `save_pretrained` writes; beside the weights and merged."""
    kind, options = CONFIGS[case]
    net, x = Net(), randn(4, 8, seed=1) * 10
    before = modules_and_bits(net)
    config = kind(target_modules=["fc1", "fc2"], **options)
    key = "lora_" if kind is peft.LoraConfig else case.split()[0].replace("loha", "hada") + "_"
    theirs = randomised(peft.get_peft_model(copy.deepcopy(net), config), key)
    theirs.save_pretrained(tmp_path)
    load_lora(net, tmp_path)
    close(net(x), theirs(x))
    merge_lora(net)
    close(net(x), theirs.merge_and_unload()(x))
    unload_lora(net)
    assert_untouched(net, before)


def test_several_of_peft(tmp_path):
    net, x = Net(), randn(4, 8, seed=1) * 10
    theirs = peft.get_peft_model(
        copy.deepcopy(net), peft.LoraConfig(r=3, target_modules=["fc1", "fc2"]), "one"
    )
    theirs.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["fc2"]))
    theirs = randomised(theirs)
    theirs.save_pretrained(tmp_path)
    for name in ("one", "two"):
        load_lora(net, tmp_path / name, name=name)
    theirs.base_model.set_adapter(["one", "two"])
    close(net(x), theirs(x))
    set_adapters(net, "two")
    theirs.base_model.set_adapter("two")
    close(net(x), theirs(x))


@pytest.mark.parametrize("family", INPUTS)
def test_whole_models(family):
    """Every layer with an adapter: the forward pass beside the weights is the merged one."""
    model = model_of(family)
    before, plain = modules_and_bits(model), run(model, family)
    tensors, _ = low_rank(model, "kohya")
    load_lora(model, tensors, 0.3)
    beside = run(model, family)
    assert (beside - plain).norm() > 1e-3 * plain.norm()
    merge_lora(model)
    close(run(model, family), beside, 1e-6)  # diffusers computes some of it in float32
    unload_lora(model)
    assert_untouched(model, before)
    assert torch.equal(run(model, family), plain)


DIFFUSERS = {
    ("flux", "kohya"): (
        "_convert_kohya_flux_lora_to_diffusers",
        r"^double_blocks\.\d\.(img|txt)_(attn|mlp|mod)",
    ),
    ("wan", "kohya"): ("_convert_musubi_wan_lora_to_diffusers", r"^blocks\.\d\.(self_attn|cross_attn|ffn)"),
    ("wan", "comfy"): ("_convert_non_diffusers_wan_lora_to_diffusers", r"^blocks\.\d\."),
    ("z_image", "ai-toolkit"): (
        "_convert_non_diffusers_z_image_lora_to_diffusers",
        r"feed_forward|attention\.out",
    ),
}


@pytest.mark.parametrize(("family", "style"), DIFFUSERS)
def test_diffusers_loader(family, style):
    """Their conversion and their loader give the same weights, on the layers that they convert rightly."""
    from diffusers.loaders import lora_conversion_utils

    converter, layers = DIFFUSERS[family, style]
    model, theirs = model_of(family), model_of(family)
    tensors, _ = low_rank(model, style, layers)
    load_lora(model, tensors)
    merge_lora(model)
    converted = getattr(lora_conversion_utils, converter)(dict(tensors))
    theirs.load_lora_adapter(converted, prefix="transformer")
    theirs.to(torch.float64)
    theirs.fuse_lora()
    theirs.unload_lora()
    state = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        close(tensor, state[name], 1e-6)  # their factors were float32 on the way
