"""Reading LoRA files of every dialect for one model.

| dialect | example |
| --- | --- |
| peft, diffusers | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, alphas in the metadata |
| old diffusers | `transformer_blocks.0.attn.processor.to_q_lora.down.weight` |
| kohya | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, `.alpha` |
| OneTrainer | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |
| ComfyUI, ai-toolkit | `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight` |
| XLabs FLUX | `double_blocks.0.processor.qkv_lora1.down.weight` |
| BFL control LoRA | `double_blocks.0.img_attn.qkv.lora_B.bias`, `….norm.query_norm.scale` |
| LyCORIS | `lycoris_….hada_w1_a`, `….lokr_w1`, `….dora_scale` |
| differences | `….diff`, `.diff_b`, `.set_weight`, `.w_norm`, `.b_norm`, `.reshape_weight` |

Names are those of the model, or of the original repository where the model is diffusers' (names.py). An alpha
is applied where it stands, before rows are split, renamed or exchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rfkernels.adapters.dialects import Alphas, read_tensors, sorted_keys
from rfkernels.adapters.names import Names
from rfkernels.adapters.records import Patch, Record, records_of

__all__ = ["Contents", "read_lora"]


@dataclass(frozen=True)
class Contents:
    """What a file holds for a model.

    Args:
        records: adapters of its layers.
        patches: changes of its parameters.
        unknown: keys that mean nothing for this model.
        text_encoder: keys of text encoders, which a transformer has no use for.
    """

    records: tuple[Record, ...]
    patches: tuple[Patch, ...]
    unknown: tuple[str, ...]
    text_encoder: tuple[str, ...]


def read_lora(
    source: str | Path | Mapping[str, Tensor], model: nn.Module, *, config: Mapping[str, object] | None = None
) -> Contents:
    """Reads a file for a model, which stays as it is.

    Args:
        source: a safetensors file, a folder of peft, or the tensors by key.
        config: hyperparameters of peft (`r`, `lora_alpha`, ..) instead of those of the file.

    Raises:
        ValueError: factors whose ranks differ, that do not fit their layer or are not finite, by their key.
    """
    tensors, written = read_tensors(source)
    names, alphas = Names(model), Alphas(config or written)
    groups, elsewhere, unknown = sorted_keys(tensors)
    found: list[Record | Patch] = []
    owners: dict[str, str] = {}
    for group in groups.values():
        targets = names.find(group.stem)
        if not targets:
            unknown += group.keys.values()
            continue
        made, left = records_of(group, targets, names, alphas)
        unknown += left
        found += made
        for path in {r.path for r in made}:
            if owners.setdefault(path, group.stem) != group.stem:
                raise ValueError(
                    f"load_lora: {path} must be changed by one name, got {owners[path]} and {group.stem}"
                )
    records = tuple(r for r in found if isinstance(r, Record))
    patches = tuple(p for p in found if isinstance(p, Patch))
    return Contents(records, patches, tuple(unknown), tuple(elsewhere))
