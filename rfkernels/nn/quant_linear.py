"""A linear layer with a quantised weight, on the ops of `rfkernels.ops.linear`."""

from typing import Any

import torch
from torch import Tensor, nn

from rfkernels import ops
from rfkernels.ops.gguf import block_of
from rfkernels.ops.linear import dequantize_weight
from rfkernels.ops.quantize import rotate
from rfkernels.quantization import FORMATS, ROTATIONS, quantize_weight

__all__ = ["FORMATS", "QuantLinear"]

_CODES = {
    "int8": torch.int8,
    "int8-convrot": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "w4a16": torch.uint8,
    "w4a8": torch.uint8,
    "svdq-int4": torch.uint8,
    "gguf": torch.uint8,
}
_STORED = ("weight", "weight_scale", "weight_zero", "input_scale", "smooth", "proj_down", "proj_up")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class QuantLinear(nn.Module):
    """`nn.Linear` with a stored weight; for inference, its parameters have no gradient.

    Formats, and the tensors that each has:

        int8          W = codes * scale `[out]`; tokens quantised to int8 per row
        int8-convrot  the same of W R, R = `ops.rotation_matrix(rotation)` in groups of inputs; so are tokens
        fp8           W = codes * scale, one number or `[out]`; tokens as they are, or with `quantize_input`
                      in float8_e4m3fn, per row or with the one `input_scale`
        w4a16         `ops.linear_w4a16`: groups of inputs, zeros or none
        w4a8          the same without zeros, or one scale per row; rotated, tokens in int8
        svdq-int4     y = (x / smooth) Q^T + (x proj_down^T) proj_up^T, Q as in w4a8 without rotation; its
                      tokens in int8, or without `quantize_input` as they are
        gguf          `ops.linear_gguf`: blocks of a GGUF file, of the type `kind`; from files alone

    Codes, scales and factors keep their dtype when the module is cast; the bias changes, and `dtype`, that of
    the tokens.
    """

    def __init__(
        self,
        format: str,
        weight: Tensor,
        weight_scale: Tensor | None = None,
        weight_zero: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        rotation: int = 0,
        quantize_input: bool | None = None,
        kind: str | None = None,
        input_scale: Tensor | None = None,
        smooth: Tensor | None = None,
        proj_down: Tensor | None = None,
        proj_up: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if format not in _CODES:
            raise ValueError(f"QuantLinear: format must be one of {', '.join(_CODES)}, got {format!r}")
        if (kind is None) == (format == "gguf"):
            raise ValueError(
                f"QuantLinear {format}: kind must be given for gguf, and only there, got {kind!r}"
            )
        always = format not in ("fp8", "w4a16", "gguf")
        self.format, self.rotation, self.kind = format, rotation, kind
        self.quantize_input = always if quantize_input is None else quantize_input
        given = (weight, weight_scale, weight_zero, input_scale, smooth, proj_down, proj_up)
        for name, tensor in zip(_STORED, given, strict=True):
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        default = torch.get_default_dtype() if bias is None else bias.dtype
        self.register_buffer(
            "_compute", torch.empty(0, dtype=dtype or default, device=weight.device), persistent=False
        )
        self._check()

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        width = self.weight.shape[1]
        if self.kind is not None:
            block = block_of(self.kind)
            return width // block.bytes * block.numbers
        return width * (2 if self.weight.dtype == torch.uint8 else 1)

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0: all of them."""
        scale = self.weight_scale
        grouped = self.weight.dtype == torch.uint8 and scale is not None and scale.ndim == 2
        return self.in_features // scale.shape[1] if grouped else 0

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens that the layer was made for."""
        return self._compute.dtype

    @property
    def coding(self) -> dict[str, Any] | None:
        """How tokens are quantised, arguments of `ops.quantize`; None where they stay as they are, or are
        treated in another way first."""
        if self.format in ("int8", "int8-convrot", "w4a8"):
            return {"format": "int8", "rotation": self.rotation}
        per_row = self.format == "fp8" and self.quantize_input and self.input_scale is None
        return {"format": "fp8", "rotation": 0} if per_row else None

    @property
    def nbytes(self) -> int:
        """Of all stored tensors, bias included."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    def config(self) -> dict[str, Any]:
        """What beside the tensors makes the layer: keyword arguments of the constructor, ready for JSON."""
        return {
            "format": self.format,
            "rotation": self.rotation,
            "quantize_input": self.quantize_input,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({} if self.kind is None else {"kind": self.kind}),
        }

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, format={self.format!r}"]
        parts += [f"kind={self.kind!r}"] if self.kind is not None else []
        parts += [f"group={self.group}"] if self.group else []
        parts += [f"rotation={self.rotation}"] if self.rotation else []
        parts += [f"rank={len(self.proj_down)}"] if self.proj_down is not None else []
        return ", ".join([*parts, f"bias={self.bias is not None}"])

    def run(
        self,
        x: Tensor,
        *,
        lora: tuple[Tensor, Tensor] | None = None,
        column_scale: Tensor | None = None,
        bias: Tensor | None = None,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        r"""Returns :math:`r + g \odot f(k \odot x W^T + h U^T + b)`.

        Args:
            x: `[*lead, in]`, floating; or codes as `coding` says, with `x_scale` `[*lead]`.
            dtype: of the result; by default that of a floating x, for codes `self.dtype`.
            lora: (h `[*lead, rank]` of `ops.lora_shrink`, U `[out, rank]`).
            column_scale: k, float32 `[out]`.
            bias: `[out]`, added to the layer's own.
            activation, gate, residual: of `ops.linear`.
        """
        if x_scale is not None and self.coding is None:
            raise ValueError(f"QuantLinear {self.format}: x must be floating, got codes {x.dtype}")
        scale, zero, up = self._scaled(column_scale)
        dtype = dtype or (x.dtype if x_scale is None else self.dtype)
        epilogue = {"activation": activation, "gate": gate, "residual": residual, "dtype": dtype}
        bias = self._bias(bias, dtype)
        if self.format == "svdq-int4":
            return self._run_svdq(x, scale, up, bias, lora, epilogue)
        epilogue["lora"] = lora
        if self.format == "fp8":
            return self._run_fp8(x, x_scale, scale, bias, epilogue)
        if self.format == "gguf":
            return ops.linear_gguf(x, self.weight, self.kind, bias, weight_scale=scale, **epilogue)
        if self.format == "w4a16":
            return ops.linear_w4a16(x, self.weight, scale, zero, bias, **epilogue)
        op = ops.linear_w4a8 if self.format == "w4a8" else ops.linear_int8
        rotation = self.rotation if x_scale is None else 0
        return op(x, self.weight, scale, bias, x_scale=x_scale, rotation=rotation, **epilogue)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def dequantized(self) -> Tensor:
        """The weight, float32 `[out, in]`, for tokens that are neither rotated nor smoothed."""
        if self.kind is not None:
            return ops.dequantize_gguf(self.weight, self.kind)
        numbers = rotate(dequantize_weight(self.weight, self.weight_scale, self.weight_zero), self.rotation)
        if self.smooth is not None:
            numbers = numbers / self.smooth.float() + self.proj_up.float() @ self.proj_down.float()
        return numbers

    def with_bias(self, bias: Tensor | None) -> "QuantLinear":
        """Another layer on the same tensors."""
        return QuantLinear(bias=bias, **self._tensors(), **{**self.config(), "dtype": self.dtype})

    def take_rows(self, rows: Tensor | slice) -> "QuantLinear":
        """The layer with the outputs `rows`, an index: a part of a fused qkv, or another order. Tensors of a
        slice are views."""
        tensors = self._tensors()
        tensors["weight"] = self.weight.view(torch.uint8)[rows].view(self.weight.dtype)
        for name in ("weight_scale", "weight_zero", "proj_up"):
            tensor = tensors[name]
            if tensor is not None and tensor.numel() > 1:
                tensors[name] = tensor[rows]
        bias = None if self.bias is None else self.bias[rows]
        return QuantLinear(bias=bias, **tensors, **{**self.config(), "dtype": self.dtype})

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str, *, name: str = "", **options: Any) -> "QuantLinear":
        """Quantises one layer, in pieces of rows. The bias is shared, the weight is not changed.

        Args:
            format: one of `FORMATS`.
            name: of the layer, in errors.
            options: of the formats, with their defaults.
                "int8-convrot": rotation, the largest of 256, 64, 16 that divides the inputs.
                "fp8": scale "row" (or "tensor"), quantize_input False.
                "w4a16": group 64, zero "float", search 1 (`quantize_int4`).
                "w4a8": group 64 (or 0: rows), rotation, search 1.
                "svdq-int4": rank 32, group 64, input_max, iterations 0, quantize_input True
                (`quantize_svdq`).

        Raises:
            ValueError: a NaN or infinite weight, an unknown format, groups or a rotation that do not
                divide the inputs.
        """
        weight = linear.weight.detach()
        tensors = quantize_weight(weight, format, name, **options)
        return cls(format, bias=linear.bias, dtype=weight.dtype, **tensors)

    # --- parts ---

    def _tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in _STORED}

    def _scaled(self, column_scale: Tensor | None):
        """Scale, zero and up with `column_scale` in them."""
        scale, zero, up = self.weight_scale, self.weight_zero, self.proj_up
        if column_scale is None:
            return scale, zero, up
        column = column_scale.float()
        if scale is None:
            scale = column
        elif self.group:
            scale = scale.float() * column[:, None]
        else:
            scale = scale.float().reshape(-1) * column
        if zero is not None and zero.is_floating_point():
            zero = zero.float() * column[:, None]
        return scale, zero, None if up is None else up.float() * column[:, None]

    def _bias(self, extra: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        bias = self.bias
        if extra is not None:
            bias = extra if bias is None else bias.float() + extra.float()
        return bias if bias is None or bias.dtype in (torch.float32, dtype) else bias.to(dtype)

    def _run_fp8(
        self, x: Tensor, x_scale: Tensor | None, scale: Tensor | None, bias: Tensor | None, epilogue: dict
    ) -> Tensor:
        if x_scale is not None:
            return ops.linear_fp8(x, self.weight, scale, bias, x_scale=x_scale, **epilogue)
        if self.input_scale is not None and self.quantize_input:
            x, x_scale = ops.quantize(x, "fp8", tensor_scale=self.input_scale)
            x_scale = x_scale.reshape(()).expand(x.shape[:-1])
        return ops.linear_fp8(
            x, self.weight, scale, bias, x_scale=x_scale, quantize_input=self.quantize_input, **epilogue
        )

    def _run_svdq(self, x, scale, up, bias, lora, epilogue) -> Tensor:
        hidden = ops.lora_shrink(x, self.proj_down.to(x.dtype))
        if lora is not None:
            hidden, up = torch.cat((hidden, lora[0]), -1), torch.cat((up, lora[1].to(up.dtype)), -1)
        smoothed = x / self.smooth.to(x.dtype)
        if self.quantize_input:
            return ops.linear_w4a8(smoothed, self.weight, scale, bias, lora=(hidden, up), **epilogue)
        return ops.linear_w4a16(smoothed, self.weight, scale, None, bias, lora=(hidden, up), **epilogue)

    def __getstate__(self):
        """torch pickles no float8 tensor."""
        return {**self.__dict__, "_buffers": {**self._buffers, "weight": self.weight.view(torch.uint8)}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._buffers["weight"] = self.weight.view(_CODES[self.format])

    def _apply(self, fn, recurse=True):
        """Stored tensors pass as integers, which casts leave alone."""
        kept = {name: tensor.dtype for name in _STORED if (tensor := self._buffers[name]) is not None}
        for name, dtype in kept.items():
            self._buffers[name] = self._buffers[name].view(_INTEGERS[dtype.itemsize])
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            self._buffers[name] = self._buffers[name].view(dtype)
        return self

    def _check(self) -> None:
        weight, scale, zero = self.weight, self.weight_scale, self.weight_zero
        if weight.ndim != 2 or weight.dtype != _CODES[self.format]:
            raise self._wrong("weight", f"{_CODES[self.format]} [out, in]", weight)
        out, width = self.out_features, self.in_features
        if self.rotation and (self.rotation not in ROTATIONS or width % self.rotation):
            allowed = f"one of {ROTATIONS} that divides {width}"
            raise ValueError(f"QuantLinear {self.format}: rotation must be {allowed}, got {self.rotation}")
        if self.rotation and self.format not in ("int8-convrot", "w4a8"):
            raise ValueError(f"QuantLinear {self.format}: rotation must be 0, got {self.rotation}")
        if self.kind is not None:
            block = block_of(self.kind)
            if weight.shape[1] % block.bytes:
                raise self._wrong("weight", f"{self.kind}, [out, a multiple of {block.bytes}]", weight)
            if scale is not None:
                raise self._wrong("weight_scale", "absent", scale)
        elif scale is None and self.format != "fp8":
            raise self._wrong("weight_scale", "there", scale)
        grouped = weight.dtype == torch.uint8
        if scale is not None and not (
            scale.shape in ((out,), (out, 1))
            or (not grouped and scale.numel() == 1)
            or (grouped and scale.ndim == 2 and len(scale) == out and width % scale.shape[1] == 0)
        ):
            raise self._wrong(
                "weight_scale", f"floating [{out}]" + (f" or [{out}, groups]" if grouped else ""), scale
            )
        if zero is not None and (self.format != "w4a16" or zero.shape != scale.shape):
            raise self._wrong("weight_zero", "absent, or of w4a16 and in the shape of weight_scale", zero)
        self._shaped("bias", self.bias, (out,))
        if self.input_scale is not None and (self.format != "fp8" or self.input_scale.numel() != 1):
            raise self._wrong("input_scale", "one number, of fp8", self.input_scale)
        rank = -1 if self.proj_down is None else len(self.proj_down)
        for name, shape in (("smooth", (width,)), ("proj_down", (rank, width)), ("proj_up", (out, rank))):
            tensor = getattr(self, name)
            if (tensor is None) != (self.format != "svdq-int4"):
                raise self._wrong(name, "given for svdq-int4, and only there", tensor)
            self._shaped(name, tensor, shape)

    def _shaped(self, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
        if tensor is not None and tensor.shape != shape:
            raise self._wrong(name, str(list(shape)), tensor)

    def _wrong(self, name: str, required: str, got: Tensor | None) -> ValueError:
        got = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
        return ValueError(f"QuantLinear {self.format}: {name} must be {required}, got {got}")
