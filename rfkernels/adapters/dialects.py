"""Keys of LoRA files: what each tensor is, by the end of its key, and whose."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Alphas", "Group", "read_tensors", "sorted_keys"]

# The end of a key and the role of its tensor. `~` stands for the name of an adapter, which peft may put in.
_ENDINGS = (
    (r"\.lora_(?:A|down)~(?:\.weight)?", "down"),
    (r"\.lora_(?:B|up)~(?:\.weight)?", "up"),
    (r"\.lora_(?:B|up)~\.bias", "up_bias"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
    (r"(?<=_lora[12])\.down\.weight", "down"),  # XLabs
    (r"(?<=_lora[12])\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:\.lora|\.lora_linear_layer|_lora|(?<=_lora[12]))?\.(?:network_)?alpha", "alpha"),
    (r"\.lora_magnitude_vector~(?:\.weight)?", "lora_magnitude_vector"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.(?P<role>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))~(?:\.weight)?", ""),
    (r"\.(?P<role>lora_t_(?:bounds|router\.[02]\.(?:weight|bias)))", ""),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
    (r"\.w_norm", "diff"),
    (r"\.b_norm", "diff_b"),
    (r"\.set_weight", "set_weight"),
    (r"\.reshape_weight", "reshape_weight"),
    (r"(?<=_norm)\.scale", "set_weight"),  # BFL control LoRA: norms are replaced
)
_ROLES = [
    (re.compile(rf"(?P<stem>.+?){ending.replace('~', '(?:[.](?!weight$|bias$)[^.]+)?')}"), role)
    for ending, role in _ENDINGS
]
_ELSEWHERE = re.compile(
    r"(text_encoders?|text_encoder_\d|text_model|lora_te\d*|te\d|clip_[lg]|t5xxl|bundle_emb)[._].*"
)


@dataclass
class Group:
    """The tensors of one module in a file, by role, with their keys."""

    stem: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def read_tensors(source: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and the hyperparameters that peft or diffusers wrote beside them.

    `source` is a safetensors file, a folder of `PeftModel.save_pretrained`, or the tensors themselves.
    """
    if isinstance(source, Mapping):
        return dict(source), {}
    from safetensors import safe_open

    path, config = Path(source), {}
    if path.is_dir():
        config = json.loads((path / "adapter_config.json").read_text())
        path = path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        written = (file.metadata() or {}).get("lora_adapter_metadata")
    if written:
        found = json.loads(written)
        config = {k.removeprefix("transformer."): v for k, v in found.items()}
    return tensors, config


def sorted_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Group], list[str], list[str]]:
    """Groups by module, keys of text encoders, and keys whose meaning is unknown."""
    groups: dict[str, Group] = {}
    elsewhere, unknown = [], []
    for key, tensor in tensors.items():
        if _ELSEWHERE.fullmatch(key.removeprefix("base_model.model.")):
            elsewhere.append(key)
            continue
        match, role = next(((m, r) for p, r in _ROLES if (m := p.fullmatch(key))), (None, ""))
        if match is None:
            unknown.append(key)
            continue
        stem = match["stem"].replace(".processor.", ".")
        role = role or match["role"]
        group = groups.setdefault(stem, Group(stem))
        if role in group.tensors:
            raise ValueError(f"load_lora: one adapter a file, got both {group.keys[role]} and {key}")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"load_lora: factors must be finite, got NaN or infinity in {key}")
        group.tensors[role], group.keys[role] = tensor, key
    return groups, elsewhere, unknown


class Alphas:
    """The scale of a module: its `.alpha`, else what the file's hyperparameters say, else 1."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config

    def scale(self, stem: str, rank: int, alpha: float | None) -> float:
        """alpha / rank; alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski, 2023)."""
        config = self.config
        if alpha is not None:
            return alpha / rank
        if not config:
            return 1.0
        stated = self._of("rank_pattern", stem, config.get("r", rank))
        if stated != rank:
            raise ValueError(f"load_lora: rank of {stem} must be {stated} as the file states, got {rank}")
        alpha = self._of("alpha_pattern", stem, config.get("lora_alpha", rank))
        return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank

    def lycoris(self, stem: str, kron: bool) -> dict[str, object]:
        """alpha of peft's LoHa and LoKr; LyCORIS files keep it among the tensors."""
        if "alpha" not in self.config:
            return {}
        alpha = self._of("alpha_pattern", stem, self.config["alpha"])
        if not kron:
            return {"alpha": alpha}
        return {
            "alpha": alpha,
            "convention": "peft",
            "rank": self._of("rank_pattern", stem, self.config["r"]),
        }

    def _of(self, pattern: str, stem: str, default: float) -> float:
        """peft: the first key that is the end of the module's name."""
        patterns = self.config.get(pattern) or {}
        return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", stem)), default)
