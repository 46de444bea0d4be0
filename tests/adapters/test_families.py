"""What every adapter promises, whatever its family."""

import pytest
import torch
from torch import nn

from rfkernels.adapters.base import Adapter
from rfkernels.adapters.bottleneck import Bottleneck, BottleneckStack, ConformerAdapter
from rfkernels.adapters.dora import DoRA
from rfkernels.adapters.hadamard import QWHA, random_indices
from rfkernels.adapters.hydra import Hydra
from rfkernels.adapters.kronecker import SoKA
from rfkernels.adapters.linear_adapter import LinearAdapter
from rfkernels.adapters.lora import LoRA
from rfkernels.adapters.lycoris import LoHa, LoKr
from rfkernels.adapters.pruning import SPLoPA, SPLoRA, SPPaRA
from rfkernels.adapters.routed import MoLA, Poly
from rfkernels.adapters.timestep import TimestepLoRA
from tests.adapters.layers import layer, randn

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
N, R = 24, 4


def low_rank(a="lora_A.weight", b="lora_B.weight"):
    return {a: randn(R, N) / 5, b: randn(N, R, seed=1) / 5}


def conformer():
    made = {f"lnorm.{n}": randn(N, seed=i) for i, n in enumerate(("weight", "bias"))}
    made |= {"pwise_conv1.weight": randn(2 * R, N, 1), "dwise_conv.weight": randn(R, 1, 3)}
    made |= {f"bnorm.{n}": randn(R, seed=i) for i, n in enumerate(("weight", "bias", "running_mean"))}
    return made | {"bnorm.running_var": randn(R).square() + 0.5, "pwise_conv2.weight": randn(N, R, 1)}


FAMILIES = {
    "lora": lambda: LoRA(low_rank(), alpha=8.0),
    "dora": lambda: DoRA(low_rank() | {"lora_magnitude_vector": randn(N).abs()}),
    "dora, input axis": lambda: DoRA(low_rank() | {"dora_scale": randn(1, N).abs()}),
    "loha": lambda: LoHa(low_rank("hada_w1_b", "hada_w1_a") | low_rank("hada_w2_b", "hada_w2_a")),
    "loha, dora_scale": lambda: LoHa(
        low_rank("hada_w1_b", "hada_w1_a")
        | low_rank("hada_w2_b", "hada_w2_a")
        | {"dora_scale": randn(N, 1).abs()}
    ),
    "lokr": lambda: LoKr({"lokr_w1": randn(4, 4) / 5, "lokr_w2": randn(6, 6) / 5}),
    "soka": lambda: SoKA(
        {"soka_u": randn(2, 4, 6) / 5, "soka_v": randn(2, 6, 4) / 5, "soka_sigma": randn(2)}
    ),
    "qwha": lambda: QWHA(
        {
            "qhft_spectrum": randn(60),
            "qhft_indices": random_indices((N, N), 60),
            "qhft_scaling": torch.tensor(20.0),
        },
        (N, N),
    ),
    "adaptformer": lambda: Bottleneck(low_rank("down_proj.weight", "up_proj.weight")),
    "houlsby": lambda: Bottleneck(
        low_rank("linear_downsample.weight", "linear_upsample.weight"), position="sequential"
    ),
    "conformer": lambda: ConformerAdapter(conformer()),
    "hydra": lambda: Hydra(
        low_rank("hydra_par.hydra_A", "hydra_par.hydra_B")
        | low_rank("hydra_seq.hydra_A", "hydra_seq.hydra_B")
    ),
    "mola": lambda: MoLA(
        low_rank("lora_A.0.weight", "lora_B.0.weight")
        | low_rank("lora_A.1.weight", "lora_B.1.weight")
        | {"router.weight": randn(2, N)},
    ),
    "poly": lambda: Poly(
        {"poly_lora_A": randn(2, 3, N // 2, R) / 5, "poly_lora_B": randn(2, 3, R, N // 2) / 5}
    ),
    "zeroi2v": lambda: LinearAdapter(
        low_rank("D_fc1.weight", "D_fc2.weight") | {"D_fc1.bias": randn(R), "D_fc2.bias": randn(N)}, "after"
    ),
    "splora": lambda: SPLoRA({"adapter.cols": randn(1, N, R) / 5, "adapter.rows": randn(1, R, N) / 5}),
    "sppara": lambda: SPPaRA({"adapter": randn(N, N) / 5}),
    "splopa": lambda: SPLoPA(
        {
            "adapter.pos_weights": randn(2, 4, 6) / 5,
            "adapter.prototypes.cols": randn(2, 6, 1),
            "adapter.prototypes.rows": randn(2, 1, 4),
        }
    ),
    "timestep": lambda: at_time(
        TimestepLoRA(low_rank() | {"lora_t_bounds": torch.tensor([0.0, 0.5, 1.0])}), 0.7
    ),
}
MERGE = [name for name in FAMILIES if name not in ("adaptformer", "houlsby", "conformer", "mola")]


def at_time(adapter: TimestepLoRA, t: float) -> TimestepLoRA:
    adapter.set_time(t)
    return adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_16_bits_are_close_to_float64(name, device, dtype):
    adapter, base, x = FAMILIES[name]().to(device, dtype), layer(N, N).to(device, dtype), randn(2, 5, N)
    x = x.to(device, dtype)
    y = adapter(x, base)
    assert y.dtype == dtype and y.shape == (2, 5, N)
    expected = FAMILIES[name]().to(dtype).double()(x.cpu().double(), layer(N, N).to(dtype).double())
    error = (y.cpu().double() - expected).norm() / expected.norm()
    assert error <= (6e-3 if dtype == torch.bfloat16 else 8e-4)  # two or three roundings


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_loads_its_own_state(name):
    adapter, other = FAMILIES[name](), FAMILIES[name]()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    other.load_state_dict(adapter.state_dict())
    x = randn(2, 5, N)
    assert torch.equal(other(x, layer(N, N)), adapter(x, layer(N, N)))
    assert isinstance(adapter, Adapter) and not any(p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_merges_or_refuses(name):
    adapter, base, x = FAMILIES[name](), layer(N, N), randn(2, 5, N)
    if name not in MERGE:
        with pytest.raises(ValueError, match="cannot be merged into a weight"):
            adapter.merged(base.weight, base.bias)
        assert adapter.factors(base.weight, base.bias) is None
        return
    weight, bias = adapter.merged(base.weight, base.bias)
    torch.testing.assert_close(x @ weight.T + bias, adapter(x, base), rtol=1e-11, atol=1e-11)
    for codes in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="only into a floating weight"):
            adapter.merged(torch.zeros(N, N).to(codes), None)


@pytest.mark.parametrize("name", MERGE)
def test_merges_of_16_bit_weights_are_float32(name):
    weight, bias = FAMILIES[name]().merged(randn(N, N).bfloat16(), randn(N).bfloat16())
    assert weight.dtype == torch.float32 and bias.dtype == torch.float32
    expected, _ = FAMILIES[name]().merged(randn(N, N).bfloat16().double(), randn(N).bfloat16().double())
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiles_to_one_graph(name):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter = layer(N, N), FAMILIES[name]()

        def forward(self, x):
            return self.adapter(x, self.base)

    torch._dynamo.reset()
    module, x = Layer(), randn(2, 5, N)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)


def test_scales_keep_their_precision_in_16_bits():
    mola = FAMILIES["mola"]()
    thirds = MoLA(dict(mola.state_dict()), alpha=4 / 3).bfloat16()
    assert thirds.router.dtype == torch.bfloat16 and thirds.owner.dtype == torch.int64
    assert thirds.columns.tolist() == [1 / 3] * 8
    made = {"lora_A.weight": randn(R, N), "lora_B.weight": randn(N, R)}
    adapter = TimestepLoRA(made, experts=2).bfloat16()
    adapter.set_time(0.3, shares=torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert adapter.columns.tolist() == [1 / 3] * 2 + [2 / 3] * 2
    stack = BottleneckStack(
        [Bottleneck(low_rank("down_proj.weight", "up_proj.weight"), scale=0.1)]
    ).bfloat16()
    assert stack.scale.tolist() == [0.1] * (R + 1) and stack.down.dtype == torch.bfloat16


def test_scales_move_with_their_module():
    assert FAMILIES["mola"]().to("meta").columns.device.type == "meta"
