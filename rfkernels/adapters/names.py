"""Module names of files and of models: which modules of a model one name of a file means, and which rows.

The tables name original modules on the left, those of diffusers on the right. `#` is a number, `*` a word;
`[a b]` means that the rows of the original lie in a and b, one after the other; `~` that its halves are
exchanged, (shift, scale) of the original for (scale, shift) of diffusers. The model's own names need none.
"""

import re
from dataclasses import dataclass

from torch import nn

from rfkernels.nn.lora import LoRALinear

__all__ = ["FAMILIES", "Names", "Target", "bare", "modules"]

# A family of models by modules that it alone has, and its table
FAMILIES = {
    # FLUX.1, FLUX.2; names with lora or without attn are those of XLabs, 1 the image, 2 the text
    "x_embedder context_embedder": """
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
final_layer.adaLN_modulation.1            norm_out.linear~
double_blocks.#.qkv_lora1                 transformer_blocks.#.attn.[to_q to_k to_v]
double_blocks.#.qkv_lora2                 transformer_blocks.#.attn.[add_q_proj add_k_proj add_v_proj]
double_blocks.#.proj_lora1                transformer_blocks.#.attn.to_out.0
double_blocks.#.proj_lora2                transformer_blocks.#.attn.to_add_out
single_blocks.#.qkv                       single_transformer_blocks.#.attn.[to_q to_k to_v]
single_blocks.#.proj                      single_transformer_blocks.#.proj_out
distilled_guidance_layer.in_proj          distilled_guidance_layer.in_proj
distilled_guidance_layer.out_proj         distilled_guidance_layer.out_proj
distilled_guidance_layer.norms.#          distilled_guidance_layer.norms.#
distilled_guidance_layer.layers.#.in_layer distilled_guidance_layer.layers.#.linear_1
distilled_guidance_layer.layers.#.out_layer distilled_guidance_layer.layers.#.linear_2
""",
    # FLUX.3
    "x_embedders.image timestep_embedder.linear_1": """
emb_in.*                                  x_embedders.*
txt_in                                    context_embedder
time_in.in_layer                          timestep_embedder.linear_1
time_in.out_layer                         timestep_embedder.linear_2
ref_time_in.in_layer                      target_timestep_embedder.linear_1
ref_time_in.out_layer                     target_timestep_embedder.linear_2
early_stream_modulations.*.lin            early_stream_modulations.*.linear
single_stream_modulations.*.lin           single_stream_modulations.*.linear
final_layer.image.linear                  proj_out
final_layer.image.adaLN_modulation.1      norm_out.linear~
"""
    + "".join(
        f"{theirs}.{old} {ours}.{new}\n"
        for theirs, ours in (
            ("content_mode_blocks.*.#", "mode_blocks.*.#"),
            ("txt_mode_blocks.#", "txt_mode_blocks.#"),
            ("single_blocks.#", "single_transformer_blocks.#"),
        )
        for old, new in (
            ("q_proj", "attn.to_q"),
            ("k_proj", "attn.to_k"),
            ("v_proj", "attn.to_v"),
            ("attn_out", "attn.to_out.0"),
            ("norm.query_norm", "attn.norm_q"),
            ("norm.key_norm", "attn.norm_k"),
            ("mlp_in", "ff.linear_in"),
            ("mlp_out", "ff.linear_out"),
        )
    ),
    # SD3, SD3.5
    "pos_embed.proj time_text_embed.text_embedder.linear_1": """
pos_embed                                 pos_embed.pos_embed
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
joint_blocks.#.context_block.adaLN_modulation.1 transformer_blocks.#.norm1_context.linear
final_layer.linear                        proj_out
final_layer.adaLN_modulation.1            norm_out.linear~
""",
    # Wan
    "condition_embedder.time_proj": """
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
*.#.self_attn.q                           *.#.attn1.to_q
*.#.self_attn.k                           *.#.attn1.to_k
*.#.self_attn.v                           *.#.attn1.to_v
*.#.self_attn.o                           *.#.attn1.to_out.0
*.#.self_attn.norm_q                      *.#.attn1.norm_q
*.#.self_attn.norm_k                      *.#.attn1.norm_k
*.#.cross_attn.q                          *.#.attn2.to_q
*.#.cross_attn.k                          *.#.attn2.to_k
*.#.cross_attn.v                          *.#.attn2.to_v
*.#.cross_attn.o                          *.#.attn2.to_out.0
*.#.cross_attn.norm_q                     *.#.attn2.norm_q
*.#.cross_attn.norm_k                     *.#.attn2.norm_k
*.#.cross_attn.k_img                      *.#.attn2.add_k_proj
*.#.cross_attn.v_img                      *.#.attn2.add_v_proj
*.#.cross_attn.norm_k_img                 *.#.attn2.norm_added_k
*.#.ffn.0                                 *.#.ffn.net.0.proj
*.#.ffn.2                                 *.#.ffn.net.2
*.#.norm3                                 *.#.norm2
*.#.modulation                            *.#.scale_shift_table
*.#.before_proj                           *.#.proj_in
*.#.after_proj                            *.#.proj_out
""",
    # Z-Image
    "all_x_embedder.2-1": """
x_embedder                                all_x_embedder.2-1
final_layer.linear                        all_final_layer.2-1.linear
final_layer.adaLN_modulation.1            all_final_layer.2-1.adaLN_modulation.1
*.#.attention.qkv                         *.#.attention.[to_q to_k to_v]
*.#.attention.out                         *.#.attention.to_out.0
*.#.attention.q_norm                      *.#.attention.norm_q
*.#.attention.k_norm                      *.#.attention.norm_k
""",
    # Lumina-Image 2
    "time_caption_embed.timestep_embedder.linear_1": """
t_embedder.mlp.0                          time_caption_embed.timestep_embedder.linear_1
t_embedder.mlp.2                          time_caption_embed.timestep_embedder.linear_2
cap_embedder.0                            time_caption_embed.caption_embedder.0
cap_embedder.1                            time_caption_embed.caption_embedder.1
final_layer.linear                        norm_out.linear_2
final_layer.adaLN_modulation.1            norm_out.linear_1
*.#.attention.qkv                         *.#.attn.[to_q to_k to_v]
*.#.attention.out                         *.#.attn.to_out.0
*.#.attention.q_norm                      *.#.attn.norm_q
*.#.attention.k_norm                      *.#.attn.norm_k
*.#.feed_forward.w1                       *.#.feed_forward.linear_1
*.#.feed_forward.w2                       *.#.feed_forward.linear_2
*.#.feed_forward.w3                       *.#.feed_forward.linear_3
*.#.adaLN_modulation.1                    *.#.norm1.linear
*.#.attention_norm1                       *.#.norm1.norm
*.#.attention_norm1                       *.#.norm1
*.#.attention_norm2                       *.#.norm2
""",
    # DiT, SiT; diffusers has the embedders of time and class in every block
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": """
x_embedder.proj                           pos_embed.proj
t_embedder.mlp.0                          transformer_blocks.0.norm1.emb.timestep_embedder.linear_1
t_embedder.mlp.2                          transformer_blocks.0.norm1.emb.timestep_embedder.linear_2
y_embedder.embedding_table                transformer_blocks.0.norm1.emb.class_embedder.embedding_table
blocks.#.attn.qkv                         transformer_blocks.#.attn1.[to_q to_k to_v]
blocks.#.attn.proj                        transformer_blocks.#.attn1.to_out.0
blocks.#.mlp.fc1                          transformer_blocks.#.ff.net.0.proj
blocks.#.mlp.fc2                          transformer_blocks.#.ff.net.2
blocks.#.adaLN_modulation.1               transformer_blocks.#.norm1.linear
final_layer.adaLN_modulation.1            proj_out_1
final_layer.linear                        proj_out_2
""",
    # AuraFlow
    "time_step_proj.linear_1": """
t_embedder.mlp.0                          time_step_proj.linear_1
t_embedder.mlp.2                          time_step_proj.linear_2
cond_seq_linear                           context_embedder
init_x_linear                             pos_embed.proj
final_linear                              proj_out
double_layers.#.modX.1                    joint_transformer_blocks.#.norm1.linear
double_layers.#.modC.1                    joint_transformer_blocks.#.norm1_context.linear
single_layers.#.modCX.1                   single_transformer_blocks.#.norm1.linear
modF.1                                    norm_out.linear~
positional_encoding                       pos_embed.pos_embed
double_layers.#.attn.w2q                  joint_transformer_blocks.#.attn.to_q
double_layers.#.attn.w2k                  joint_transformer_blocks.#.attn.to_k
double_layers.#.attn.w2v                  joint_transformer_blocks.#.attn.to_v
double_layers.#.attn.w2o                  joint_transformer_blocks.#.attn.to_out.0
double_layers.#.mlpX.c_fc1                joint_transformer_blocks.#.ff.linear_1
double_layers.#.mlpX.c_fc2                joint_transformer_blocks.#.ff.linear_2
double_layers.#.mlpX.c_proj               joint_transformer_blocks.#.ff.out_projection
single_layers.#.attn.w1q                  single_transformer_blocks.#.attn.to_q
single_layers.#.attn.w1k                  single_transformer_blocks.#.attn.to_k
single_layers.#.attn.w1v                  single_transformer_blocks.#.attn.to_v
single_layers.#.attn.w1o                  single_transformer_blocks.#.attn.to_out.0
single_layers.#.mlp.c_fc1                 single_transformer_blocks.#.ff.linear_1
single_layers.#.mlp.c_fc2                 single_transformer_blocks.#.ff.linear_2
single_layers.#.mlp.c_proj                single_transformer_blocks.#.ff.out_projection
double_layers.#.mlpC.c_fc1                joint_transformer_blocks.#.ff_context.linear_1
double_layers.#.mlpC.c_fc2                joint_transformer_blocks.#.ff_context.linear_2
double_layers.#.mlpC.c_proj               joint_transformer_blocks.#.ff_context.out_projection
double_layers.#.attn.w1q                  joint_transformer_blocks.#.attn.add_q_proj
double_layers.#.attn.w1k                  joint_transformer_blocks.#.attn.add_k_proj
double_layers.#.attn.w1v                  joint_transformer_blocks.#.attn.add_v_proj
double_layers.#.attn.w1o                  joint_transformer_blocks.#.attn.to_add_out
""",
}

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
    """What names of files mean in one model.

    `modules` are its modules, `table` the targets of every dotted name, own names and originals.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules(model)
        holders = {path: {**m._parameters, **m._buffers} for path, m in self.modules.items()}
        known = {path for path, own in holders.items() if any(t is not None for t in own.values())}
        known |= {f"{p}.{n}" if p else n for p, m in self.modules.items() for n in m._parameters}
        self._known = known - {""}
        self.table = {name: (Target(name),) for name in self._known}
        for marks, lines in FAMILIES.items():
            if all(mark in self._known for mark in marks.split()):
                for line in lines.strip().splitlines():
                    self._add(*line.split(maxsplit=1))
        for name in [n for n in self._known if n.endswith(".to_out.0")]:
            self.table.setdefault(name.removesuffix(".0"), (Target(name),))
        self._flat: dict[str, tuple[Target, ...] | None] = {}
        for name, targets in self.table.items():
            flat = re.sub(r"[.-]", "_", name)
            self._flat[flat] = None if self._flat.get(flat, targets) != targets else targets

    def find(self, name: str) -> tuple[Target, ...]:
        """The targets of a module's name in a file, dotted or with underscores; empty if it is unknown."""
        while True:
            for candidate in (name, re.sub(r"\.(weight|scale)$", "", name)):
                found = self.table.get(candidate) or self._flat.get(re.sub(r"[.-]", "_", candidate))
                if found:
                    return found
            shorter = _without_prefix(name)
            if shorter == name:
                return ()
            name = shorter

    def _add(self, original: str, ours: str) -> None:
        head, _, parts = ours.rstrip("~").partition("[")
        parts = [head + p for p in parts.rstrip("]").split()] or [head]
        pattern = re.escape(parts[0]).replace(r"\#", r"(?P<n>\d+)").replace(r"\*", r"(?P<word>\w+)")
        for match in filter(None, map(re.compile(pattern).fullmatch, list(self._known))):
            wild = {"#": match.groupdict().get("n"), "*": match.groupdict().get("word")}
            paths = tuple(_filled(p, wild) for p in parts)
            if all(p in self._known for p in paths):
                swap = ours.endswith("~") or self._is_continuous(paths[0])
                targets = tuple(Target(p, i, paths, swap) for i, p in enumerate(paths))
                self.table.setdefault(_filled(original, wild), targets)

    def _is_continuous(self, path: str) -> bool:
        """Scale and shift alone for the text of a last block, as in SD3."""
        layer = self.modules.get(path)
        return path.endswith("norm1_context.linear") and layer.out_features == 2 * layer.in_features


def _filled(name: str, wild: dict[str, str | None]) -> str:
    return re.sub(r"[#*]", lambda m: wild[m[0]], name)
