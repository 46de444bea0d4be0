"""What the tests of adapters share: seeded float64 tensors, a layer, the claims of a merge."""

import torch
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(out: int, features: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    made = nn.Linear(features, out, bias=bias, dtype=dtype).requires_grad_(False)
    made.weight.copy_(randn(out, features, seed=1, dtype=dtype))
    if bias:
        made.bias.copy_(randn(out, seed=2, dtype=dtype))
    return made


class Running(nn.Module):
    """A layer with `run`, as quantised layers have, that records what it was asked to fuse."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.hidden = inner, None

    def run(self, x, *, lora=None, column_scale=None, bias=None, activation="none", gate=None, residual=None):
        y = x @ self.inner.weight.T
        if column_scale is not None:
            y = y * column_scale
        for b in (self.inner.bias, bias):
            y = y if b is None else y + b
        if lora is not None:
            self.hidden = lora[0]
            y = y + lora[0] @ lora[1].T
        if activation == "relu":
            y = y.relu()
        return y if residual is None else y + residual

    def forward(self, x):
        return self.run(x)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def check_merge(adapter, base: nn.Linear, x: Tensor) -> None:
    """The merged layer equals the adapter beside the layer."""
    weight, bias = adapter.merged(base.weight, base.bias)
    assert weight.dtype == torch.float64
    y = x @ weight.T
    close(y if bias is None else y + bias, adapter(x, base))


def check_factors(adapter, base: nn.Linear, x: Tensor) -> None:
    """The low-rank form, as the contract reads it, equals the definition."""
    form = adapter.factors(base.weight, base.bias)
    k = 1.0 if form.column_scale is None else form.column_scale
    y = k * (x @ base.weight.T) + form.scale * (x @ form.down.T) @ (form.up.T * k)
    for b in (base.bias, form.bias):
        y = y if b is None else y + b
    close(y, adapter(x, base))


def check_round_trip(family, tensors: dict[str, Tensor], **hyper) -> None:
    """`state_dict` gives the names and numbers back that `from_state_dict` took."""
    state = family.from_state_dict(tensors, **hyper).state_dict()
    assert set(state) == set(tensors)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
