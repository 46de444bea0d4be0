"""A FLUX of diffusers, quantised, with an adapter: the same bits when its blocks are streamed."""

import copy

import pytest
import torch

import rfkernels
from rfkernels.memory import SimulatedBackend, stream_layers


def test_a_quantised_flux_with_an_adapter():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 32, "num_attention_heads": 4, "axes_dims_rope": (8, 12, 12)}
    sizes |= {"joint_attention_dim": 64, "pooled_projection_dim": 32, "num_layers": 2, "num_single_layers": 3}
    model = diffusers.FluxTransformer2DModel(in_channels=16, **sizes).eval()
    rfkernels.quantize(model, "int8-convrot", modulation="w4a16")
    layer = "transformer.transformer_blocks.1.attn.to_q"
    lora = {f"{layer}.lora_A.weight": torch.randn(2, 128), f"{layer}.lora_B.weight": torch.randn(128, 2)}
    rfkernels.load_lora(model, lora)
    inputs = {
        "hidden_states": torch.randn(1, 9, 16),
        "encoder_hidden_states": torch.randn(1, 5, 64),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        expected = copy.deepcopy(model)(**inputs)[0]
        blocks = ["transformer_blocks", "single_transformer_blocks"]
        with stream_layers(model, blocks, slots=3, backend=SimulatedBackend(1 << 30)) as handle:
            assert len(handle.streamed) == 4
            for _ in range(3):
                assert torch.equal(model(**inputs)[0], expected)
        assert torch.equal(model(**inputs)[0], expected)
