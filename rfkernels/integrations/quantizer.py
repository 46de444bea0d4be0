"""`rfkernels.quantize` as a quantiser of diffusers: while a model is loaded, layer by layer.

>>> from rfkernels.integrations.quantizer import RfkernelsConfig
>>> config = RfkernelsConfig("int8-convrot", modulation="w4a16")
>>> model = FluxTransformer2DModel.from_pretrained(path, quantization_config=config)
>>> model.save_pretrained(folder)                            # codes and scales, read back without a config

Importing this module adds it to diffusers (as of 0.42).
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from rfkernels.nn import QuantLinear
from rfkernels.quantization.model import choose, replace

__all__ = ["RfkernelsConfig", "RfkernelsQuantizer"]


class RfkernelsMethod(str, Enum):
    """What `quant_method` of a configuration is."""

    RFKERNELS = "rfkernels"


class RfkernelsConfig(QuantizationConfigMixin):
    """Which layers are quantised, and how: arguments and defaults of `rfkernels.quantize`.

    `layers` belongs to files that are quantised: by name what makes the `QuantLinear`, and dtype and shape of
    its tensors.
    """

    def __init__(
        self,
        method: str = "int8-convrot",
        *,
        skip: Sequence[str] = (),
        keep: Sequence[str] | None = None,
        modulation: str | None = None,
        min_size: int = 1 << 14,
        options: dict[str, Any] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        quant_method: str = RfkernelsMethod.RFKERNELS.value,
    ):
        if quant_method != RfkernelsMethod.RFKERNELS.value:
            raise ValueError(f"RfkernelsConfig: quant_method must be 'rfkernels', got {quant_method!r}")
        self.quant_method = RfkernelsMethod.RFKERNELS
        self.method, self.skip, self.modulation, self.min_size = method, list(skip), modulation, min_size
        self.keep = None if keep is None else list(keep)
        self.options, self.layers = dict(options or {}), dict(layers or {})

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class RfkernelsQuantizer(DiffusersQuantizer):
    """Puts `QuantLinear` layers into a model while diffusers loads it."""

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            for name, layer in config.layers.items():
                replace(model, name, _on_meta(layer))
            return
        sites = choose(
            model,
            config.method,
            config.skip,
            config.keep,
            config.modulation,
            config.min_size,
            config.options,
        )
        self._formats = {name: site.format for site in sites if site.format for name in site.names}

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        self.quantization_config.layers = {name: _record(layer) for name, layer in layers.items()}
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        if self.pre_quantized:
            return layer in self.quantization_config.layers and leaf != "bias"
        return leaf == "weight" and layer in self._formats

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        raise ValueError(f"{param_name} must be {list(current.shape)}, got {list(loaded.shape)}")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **_: Any,
    ) -> None:
        name, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(name)
        if self.pre_quantized:  # what diffusers hands over was cast; the file's tensor was not
            setattr(layer, leaf, state_dict[param_name].to(target_device))
            return
        layer.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
        format, config = self._formats[name], self.quantization_config
        options = config.options if format == config.method else {}
        replace(model, name, QuantLinear.from_linear(layer, format, name=name, **options))

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _record(layer: QuantLinear) -> dict[str, Any]:
    tensors = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in layer.state_dict().items()
    }
    return layer.config() | {"tensors": tensors}


def _on_meta(record: dict[str, Any]) -> QuantLinear:
    """A layer as recorded, its tensors without numbers."""
    made = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, shape) in record["tensors"].items()
    }
    config = {k: v for k, v in record.items() if k != "tensors"}
    return QuantLinear(**made, **config | {"dtype": getattr(torch, config["dtype"])})


auto.AUTO_QUANTIZER_MAPPING[RfkernelsMethod.RFKERNELS.value] = RfkernelsQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[RfkernelsMethod.RFKERNELS.value] = RfkernelsConfig
