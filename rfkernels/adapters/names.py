"""Module names of files and of models: which modules of a model one name of a file means, and which rows.

The tables name original modules on the left, those of diffusers on the right; `#` is a number, `[a b]` means
that the rows of the original lie in a and b, one after the other. Names of the model itself need no table.
Only lines whose modules the model has are used, so that all families share one table.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from rfkernels.nn.lora import LoRALinear

__all__ = ["Names", "Target", "bare", "modules"]

_TABLE = """
# FLUX.1, FLUX.2
img_in                                    x_embedder
txt_in                                    context_embedder
time_in.in_layer                          time_text_embed.timestep_embedder.linear_1
time_in.out_layer                         time_text_embed.timestep_embedder.linear_2
vector_in.in_layer                        time_text_embed.text_embedder.linear_1
vector_in.out_layer                       time_text_embed.text_embedder.linear_2
guidance_in.in_layer                      time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer                     time_text_embed.guidance_embedder.linear_2
time_in.in_layer                          time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer                         time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer                      time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer                     time_guidance_embed.guidance_embedder.linear_2
double_stream_modulation_img.lin          double_stream_modulation_img.linear
double_stream_modulation_txt.lin          double_stream_modulation_txt.linear
single_stream_modulation.lin              single_stream_modulation.linear
double_blocks.#.img_mod.lin               transformer_blocks.#.norm1.linear
double_blocks.#.txt_mod.lin               transformer_blocks.#.norm1_context.linear
double_blocks.#.img_attn.qkv              transformer_blocks.#.attn.[to_q to_k to_v]
double_blocks.#.txt_attn.qkv              transformer_blocks.#.attn.[add_q_proj add_k_proj add_v_proj]
double_blocks.#.img_attn.norm.query_norm  transformer_blocks.#.attn.norm_q
double_blocks.#.img_attn.norm.key_norm    transformer_blocks.#.attn.norm_k
double_blocks.#.txt_attn.norm.query_norm  transformer_blocks.#.attn.norm_added_q
double_blocks.#.txt_attn.norm.key_norm    transformer_blocks.#.attn.norm_added_k
double_blocks.#.img_attn.proj             transformer_blocks.#.attn.to_out.0
double_blocks.#.txt_attn.proj             transformer_blocks.#.attn.to_add_out
double_blocks.#.img_mlp.0                 transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.2                 transformer_blocks.#.ff.net.2
double_blocks.#.txt_mlp.0                 transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.2                 transformer_blocks.#.ff_context.net.2
double_blocks.#.img_mlp.0                 transformer_blocks.#.ff.linear_in
double_blocks.#.img_mlp.2                 transformer_blocks.#.ff.linear_out
double_blocks.#.txt_mlp.0                 transformer_blocks.#.ff_context.linear_in
double_blocks.#.txt_mlp.2                 transformer_blocks.#.ff_context.linear_out
single_blocks.#.modulation.lin            single_transformer_blocks.#.norm.linear
single_blocks.#.linear1                   single_transformer_blocks.#.[attn.to_q attn.to_k attn.to_v proj_mlp]
single_blocks.#.linear1                   single_transformer_blocks.#.attn.to_qkv_mlp_proj
single_blocks.#.linear2                   single_transformer_blocks.#.proj_out
single_blocks.#.linear2                   single_transformer_blocks.#.attn.to_out
single_blocks.#.norm.query_norm           single_transformer_blocks.#.attn.norm_q
single_blocks.#.norm.key_norm             single_transformer_blocks.#.attn.norm_k
final_layer.linear                        proj_out
# FLUX.1 as XLabs names it: 1 is the image, 2 the text
double_blocks.#.qkv_lora1                 transformer_blocks.#.attn.[to_q to_k to_v]
double_blocks.#.qkv_lora2                 transformer_blocks.#.attn.[add_q_proj add_k_proj add_v_proj]
double_blocks.#.proj_lora1                transformer_blocks.#.attn.to_out.0
double_blocks.#.proj_lora2                transformer_blocks.#.attn.to_add_out
single_blocks.#.qkv                       single_transformer_blocks.#.attn.[to_q to_k to_v]
single_blocks.#.proj                      single_transformer_blocks.#.proj_out
# SD3, SD3.5
x_embedder.proj                           pos_embed.proj
t_embedder.mlp.0                          time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2                          time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0                          time_text_embed.text_embedder.linear_1
y_embedder.mlp.2                          time_text_embed.text_embedder.linear_2
joint_blocks.#.x_block.attn.qkv           transformer_blocks.#.attn.[to_q to_k to_v]
joint_blocks.#.x_block.attn2.qkv          transformer_blocks.#.attn2.[to_q to_k to_v]
joint_blocks.#.context_block.attn.qkv     transformer_blocks.#.attn.[add_q_proj add_k_proj add_v_proj]
joint_blocks.#.x_block.attn.ln_q          transformer_blocks.#.attn.norm_q
joint_blocks.#.x_block.attn.ln_k          transformer_blocks.#.attn.norm_k
joint_blocks.#.x_block.attn2.ln_q         transformer_blocks.#.attn2.norm_q
joint_blocks.#.x_block.attn2.ln_k         transformer_blocks.#.attn2.norm_k
joint_blocks.#.context_block.attn.ln_q    transformer_blocks.#.attn.norm_added_q
joint_blocks.#.context_block.attn.ln_k    transformer_blocks.#.attn.norm_added_k
joint_blocks.#.x_block.attn.proj          transformer_blocks.#.attn.to_out.0
joint_blocks.#.x_block.attn2.proj         transformer_blocks.#.attn2.to_out.0
joint_blocks.#.context_block.attn.proj    transformer_blocks.#.attn.to_add_out
joint_blocks.#.x_block.adaLN_modulation.1 transformer_blocks.#.norm1.linear
joint_blocks.#.x_block.mlp.fc1            transformer_blocks.#.ff.net.0.proj
joint_blocks.#.x_block.mlp.fc2            transformer_blocks.#.ff.net.2
joint_blocks.#.context_block.mlp.fc1      transformer_blocks.#.ff_context.net.0.proj
joint_blocks.#.context_block.mlp.fc2      transformer_blocks.#.ff_context.net.2
# Wan
time_embedding.0                          condition_embedder.time_embedder.linear_1
time_embedding.2                          condition_embedder.time_embedder.linear_2
time_projection.1                         condition_embedder.time_proj
text_embedding.0                          condition_embedder.text_embedder.linear_1
text_embedding.2                          condition_embedder.text_embedder.linear_2
img_emb.proj.0                            condition_embedder.image_embedder.norm1
img_emb.proj.1                            condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3                            condition_embedder.image_embedder.ff.net.2
img_emb.proj.4                            condition_embedder.image_embedder.norm2
head.modulation                           scale_shift_table
head.head                                 proj_out
# Z-Image
x_embedder                                all_x_embedder.2-1
final_layer.linear                        all_final_layer.2-1.linear
final_layer.adaLN_modulation.1            all_final_layer.2-1.adaLN_modulation.1
# Lumina-Image 2
t_embedder.mlp.0                          time_caption_embed.timestep_embedder.linear_1
t_embedder.mlp.2                          time_caption_embed.timestep_embedder.linear_2
cap_embedder.0                            time_caption_embed.caption_embedder.0
cap_embedder.1                            time_caption_embed.caption_embedder.1
final_layer.linear                        norm_out.linear_2
final_layer.adaLN_modulation.1            norm_out.linear_1
# AuraFlow
t_embedder.mlp.0                          time_step_proj.linear_1
t_embedder.mlp.2                          time_step_proj.linear_2
cond_seq_linear                           context_embedder
init_x_linear                             pos_embed.proj
final_linear                              proj_out
double_layers.#.modX.1                    joint_transformer_blocks.#.norm1.linear
double_layers.#.modC.1                    joint_transformer_blocks.#.norm1_context.linear
single_layers.#.modCX.1                   single_transformer_blocks.#.norm1.linear
"""


def _blocks() -> Iterator[str]:
    """The lines that differ in one word."""
    for stack in ("blocks", "vace_blocks"):  # Wan
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for a, b in (
                ("q", "to_q"),
                ("k", "to_k"),
                ("v", "to_v"),
                ("o", "to_out.0"),
                ("k_img", "add_k_proj"),
            ):
                yield f"{stack}.#.{theirs}.{a} {stack}.#.{ours}.{b}"
            for a, b in (
                ("v_img", "add_v_proj"),
                ("norm_k_img", "norm_added_k"),
                ("norm_q",) * 2,
                ("norm_k",) * 2,
            ):
                yield f"{stack}.#.{theirs}.{a} {stack}.#.{ours}.{b}"
        for a, b in (("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("norm3", "norm2")):
            yield f"{stack}.#.{a} {stack}.#.{b}"
        for a, b in (
            ("modulation", "scale_shift_table"),
            ("before_proj", "proj_in"),
            ("after_proj", "proj_out"),
        ):
            yield f"{stack}.#.{a} {stack}.#.{b}"
    for stack in ("layers", "noise_refiner", "context_refiner"):  # Z-Image, Lumina-Image 2
        for ours in ("attention", "attn"):
            yield f"{stack}.#.attention.qkv {stack}.#.{ours}.[to_q to_k to_v]"
            for a, b in (("out", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k")):
                yield f"{stack}.#.attention.{a} {stack}.#.{ours}.{b}"
        for n in "123":
            yield f"{stack}.#.feed_forward.w{n} {stack}.#.feed_forward.linear_{n}"
        yield f"{stack}.#.adaLN_modulation.1 {stack}.#.norm1.linear"
        yield f"{stack}.#.attention_norm1 {stack}.#.norm1.norm"
        yield f"{stack}.#.attention_norm1 {stack}.#.norm1"
        yield f"{stack}.#.attention_norm2 {stack}.#.norm2"
    for theirs, ours, w, mlp in (  # AuraFlow
        ("double_layers", "joint_transformer_blocks", "w2", "mlpX"),
        ("single_layers", "single_transformer_blocks", "w1", "mlp"),
    ):
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            yield f"{theirs}.#.attn.{w}{a} {ours}.#.attn.{b}"
        for a, b in (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection")):
            yield f"{theirs}.#.{mlp}.{a} {ours}.#.ff.{b}"
            yield f"{theirs}.#.mlpC.{a} {ours}.#.ff_context.{b}"
    for a, b in (("q", "add_q_proj"), ("k", "add_k_proj"), ("v", "add_v_proj"), ("o", "to_add_out")):
        yield f"double_layers.#.attn.w1{a} joint_transformer_blocks.#.attn.{b}"


# Halves of rows exchanged: (shift, scale) of the originals, (scale, shift) of diffusers
_SWAPPED = (("final_layer.adaLN_modulation.1", "norm_out.linear"), ("modF.1", "norm_out.linear"))
_SWAPPED_CONTEXT = (
    "joint_blocks.#.context_block.adaLN_modulation.1",
    "transformer_blocks.#.norm1_context.linear",
)

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
    "net.",
    "velocity_model.",
    "_orig_mod.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)


@dataclass(frozen=True)
class Target:
    """A module or parameter of the model, and how many rows of the file's tensor are its own.

    Args:
        path: its name in the model.
        part, parts: the file's rows are those of `parts` one after the other, of which this is number `part`.
        swap: the halves of its rows are to be exchanged.
    """

    path: str
    part: int = 0
    parts: tuple[str, ...] = ()
    swap: bool = False


def _without_prefix(name: str) -> str:
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix)


def bare(name: str) -> str:
    """A name without the prefixes of trainers."""
    while (shorter := _without_prefix(name)) != name:
        name = shorter
    return name


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, as if no adapters were loaded."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str) -> None:
        module = module.base if isinstance(module, LoRALinear) else module
        found[path] = module
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


class Names:
    """What names of files mean in one model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules(model)
        holders = {path: {**m._parameters, **m._buffers} for path, m in self.modules.items()}
        known = {path for path, own in holders.items() if any(t is not None for t in own.values())}
        known |= {f"{p}.{n}" if p else n for p, m in self.modules.items() for n in m._parameters}
        self._known = known - {""}
        self._dotted = {name: (Target(name),) for name in self._known}
        lines = [line.split(maxsplit=1) for line in _TABLE.splitlines() if line and line[0] != "#"]
        for original, ours in [*lines, *(line.split(maxsplit=1) for line in _blocks())]:
            self._add(original, ours.strip(), lambda path: False)
        for original, ours in _SWAPPED:
            self._add(original, ours, lambda path: True)
        self._add(*_SWAPPED_CONTEXT, self._is_continuous)
        for name in [n for n in self._known if n.endswith(".to_out.0")]:
            self._dotted.setdefault(name.removesuffix(".0"), (Target(name),))
        self._flat: dict[str, tuple[Target, ...] | None] = {}
        for name, targets in self._dotted.items():
            flat = re.sub(r"[.-]", "_", name)
            self._flat[flat] = None if self._flat.get(flat, targets) != targets else targets

    def find(self, name: str) -> tuple[Target, ...]:
        """The targets of a module's name in a file, dotted or with underscores; empty if it is unknown."""
        while True:
            for candidate in (name, re.sub(r"\.(weight|scale)$", "", name)):
                found = self._dotted.get(candidate) or self._flat.get(re.sub(r"[.-]", "_", candidate))
                if found:
                    return found
            shorter = _without_prefix(name)
            if shorter == name:
                return ()
            name = shorter

    def _add(self, original: str, ours: str, swap) -> None:
        head, _, parts = ours.partition("[")
        parts = [head + p for p in parts.rstrip("]").split()] or [ours]
        pattern = re.compile(re.escape(parts[0]).replace(r"\#", r"(\d+)"))
        for name in list(self._known):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            number = match[1] if pattern.groups else ""
            paths = tuple(p.replace("#", number) for p in parts)
            if all(p in self._known for p in paths):
                alias = original.replace("#", number)
                self._dotted.setdefault(
                    alias, tuple(Target(p, i, paths, swap(p)) for i, p in enumerate(paths))
                )

    def _is_continuous(self, path: str) -> bool:
        """Shift and scale alone, as in the last block of SD3."""
        layer = self.modules[path]
        return layer.out_features == 2 * layer.in_features
