"""Families, variants, prefixes and configurations, from names and shapes alone."""

import pytest
import torch

from rfkernels.formats.configs import CLASSES
from rfkernels.formats.container import Checkpoint, open_checkpoint
from rfkernels.formats.convert import convert
from rfkernels.formats.detect import PREFIXES, Listing, detect
from tests.formats.families import SIZES, make, tiny, write

pytest.importorskip("diffusers")
HEADLESS = ("wan", "wan-vace", "auraflow", "hidream", "dit", "pixart")  # no tensor has the size of a head
SAME = ("hidream", "qwen-image", "dit", "pixart")  # one naming, or files in the other are not written here


def listed(shapes, prefix=""):
    return Listing({prefix + name: shape for name, shape in shapes.items()}, {}, {})


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", SIZES)
def test_a_model_of_the_configuration_takes_the_state_dict(family, tmp_path):
    model = tiny(family)
    ours = write(model, tmp_path / "ours.safetensors")
    found = detect(ours)
    variant = {"flux3": "distilled", "wan-vace": "vace"}.get(family, "")
    family_of = family.removesuffix("-vace")
    assert (found.family, found.naming, found.prefix, found.variant) == (family_of, "diffusers", "", variant)
    assert found.class_name == type(model).__name__
    with torch.device("meta"):
        other = make(family, found.config)
    assert shapes_of(other) == shapes_of(model)
    told = set(SIZES[family]["config"]) & set(found.config) - {"multiple_of"}
    told -= {"attention_head_dim", "num_attention_heads"} if family in HEADLESS else set()
    assert {key: found.config[key] for key in told} == {key: SIZES[family]["config"][key] for key in told}
    if family not in SAME:
        convert(ours, tmp_path / "theirs.safetensors", to="original")
        theirs = detect(tmp_path / "theirs.safetensors")
        assert (theirs.family, theirs.naming, theirs.config) == (family_of, "original", found.config)


def test_prefixes():
    shapes = shapes_of(tiny("flux"))
    plain = detect(listed(shapes))
    for prefix in (*PREFIXES, "model.diffusion_model._orig_mod.", "net.transformer."):
        found = detect(listed(shapes, prefix))
        assert (found.prefix, found.config, found.naming) == (prefix, plain.config, "diffusers")
    among = listed(shapes, "model.diffusion_model.").shapes | {"vae.decoder.conv_in.weight": (1,)}
    assert detect(Listing(among, {}, {})).prefix == "model.diffusion_model."


ONE = {"num_layers": 1, "num_single_layers": 1}
DEPTHS = ("transformer_blocks", "single_transformer_blocks")


def of_published(family, depths, **config):
    """The variant of a model that is as wide as the published one, its first blocks and names of the last."""
    with torch.device("meta"):
        shapes = shapes_of(make(family, config))
    return detect(listed(shapes | {f"{series}.{n - 1}.end": (1,) for series, n in depths.items()})).variant


def test_variants_of_flux():
    deep = dict(zip(DEPTHS, (19, 38), strict=True))
    for variant, config in {
        "dev": {"guidance_embeds": True},
        "schnell": {},
        "fill": {"in_channels": 384, "out_channels": 64, "guidance_embeds": True},
        "depth-canny": {"in_channels": 128, "out_channels": 64, "guidance_embeds": True},
    }.items():
        assert of_published("flux", deep, **ONE, **config) == variant
    assert of_published("flux", {}, **ONE) == ""
    for variant, heads, depths, text in (
        ("dev", 48, (8, 48), 15360),
        ("klein-4b", 24, (5, 20), 7680),
        ("klein-9b", 32, (8, 24), 12288),
    ):
        config = {"num_attention_heads": heads, "joint_attention_dim": text, **ONE}
        assert of_published("flux2", dict(zip(DEPTHS, depths, strict=True)), **config) == variant
    assert of_published("flux3", {}, **ONE) == "base"
    assert of_published("flux3", {}, flow_map=True, **ONE) == "distilled"


def test_variants_of_sd3_and_wan():
    for variant, depth, heads, size, config in (
        ("medium", 24, 24, 192, {}),
        ("3.5-medium", 24, 24, 384, {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
        ("3.5-large", 38, 38, 192, {"qk_norm": "rms_norm"}),
    ):
        config |= {"num_attention_heads": heads, "caption_projection_dim": 64 * heads, "num_layers": 2}
        depths = {"transformer_blocks": depth}
        assert of_published("sd3", depths, pos_embed_max_size=size, **config) == variant
    for variant, heads, channels, config in (
        ("t2v-1.3b", 12, 16, {}),
        ("t2v-14b", 40, 16, {}),
        ("i2v-14b-2.1", 40, 36, {"image_dim": 1280, "added_kv_proj_dim": 5120}),
        ("i2v-14b-2.2", 40, 36, {}),
        ("ti2v-5b", 24, 48, {"out_channels": 48}),
    ):
        config |= {"num_attention_heads": heads, "in_channels": channels, "num_layers": 1}
        assert of_published("wan", {}, **config) == variant
    vace = {"num_layers": 1, "vace_layers": [0], "num_attention_heads": 12}
    assert of_published("wan-vace", {"blocks": 30, "vace_blocks": 15}, **vace) == "vace-1.3b"


def test_variants_of_other_families():
    assert of_published("z-image", {"layers": 30}, n_layers=1) == "z-image"
    assert of_published("lumina2", {"layers": 26}, num_layers=1) == "lumina-image-2.0"
    depths = {"single_transformer_blocks": 32}
    assert of_published("auraflow", depths, num_mmdit_layers=1, num_single_dit_layers=1) == "auraflow"
    assert of_published("qwen-image", {"transformer_blocks": 60}, num_layers=1) == "qwen-image"
    assert of_published("dit", {"transformer_blocks": 28}, num_layers=1, out_channels=8) == "xl-2"
    for variant, additional in (("sigma", False), ("alpha-1024", True)):
        config = {"caption_channels": 4096, "use_additional_conditions": additional, "num_layers": 1}
        assert of_published("pixart", {"transformer_blocks": 28}, **config) == variant


def test_original_dit_and_its_configuration():
    """Names of the repositories of DiT and SiT, with shapes of SiT-S/2."""
    width, blocks = 384, 12
    shapes = {"x_embedder.proj.weight": (width, 4, 2, 2), "x_embedder.proj.bias": (width,)}
    shapes |= {"pos_embed": (1, 256, width), "t_embedder.mlp.0.weight": (width, 256)}
    shapes |= {"t_embedder.mlp.2.weight": (width, width), "y_embedder.embedding_table.weight": (1001, width)}
    for i in range(blocks):
        for name, rows, columns in (("attn.qkv", 3 * width, width), ("adaLN_modulation.1", 6 * width, width)):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    shapes |= {"final_layer.linear.weight": (32, width), "final_layer.linear.bias": (32,)}
    found = detect(listed(shapes))
    assert (found.family, found.variant, found.naming) == ("dit", "s-2", "original")
    assert found.config == {
        "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8,
        "num_layers": 12, "num_embeds_ada_norm": 1000, "patch_size": 2,
    }  # fmt: skip


def test_no_tensor_is_read(tmp_path, monkeypatch):
    path = write(tiny("sd3"), tmp_path / "a.safetensors")

    def reads(*_):
        raise AssertionError("a tensor was read")

    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(Checkpoint, "__getitem__", reads)
    assert detect(checkpoint).family == "sd3"


def test_quantised_files_have_the_same_configuration(tmp_path):
    config = {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    ours = write(tiny("flux", **config), tmp_path / "a")
    for method in ("int8", "w4a16"):
        convert(ours, tmp_path / "b", method=method, layout="comfy", to="original", min_size=0)
        assert detect(tmp_path / "b").config == detect(ours).config


def test_gguf_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    convert(write(tiny("flux"), tmp_path / "a"), tmp_path / "b", to="original")
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "flux")
    for name, tensor in open_checkpoint(tmp_path / "b").items():
        writer.add_tensor(f"model.diffusion_model.{name}", tensor.numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    found = detect(tmp_path / "c.gguf")
    assert (found.family, found.naming, found.prefix) == ("flux", "original", "model.diffusion_model.")
    assert found.config == detect(tmp_path / "a").config
    convert(tmp_path / "c.gguf", tmp_path / "d", to="diffusers")
    back = open_checkpoint(tmp_path / "d")
    assert all(torch.equal(back[name], tensor) for name, tensor in tiny("flux").state_dict().items())


def test_refusals():
    with pytest.raises(
        ValueError, match=r"a model of auraflow, .* is required, got 2 keys like \['a', 'b.weight'\]"
    ):
        detect({"b.weight": torch.ones(1), "a": torch.ones(1)})
    shapes = shapes_of(tiny("flux"))
    del shapes["context_embedder.weight"]
    with pytest.raises(ValueError, match=r"context_embedder.weight of a flux model is required, found none"):
        detect(listed(shapes))
    assert set(SIZES) == {*CLASSES, "wan-vace"}
