"""Small models for tests of quantisation."""

import pytest
import torch
from torch import nn

from rfkernels.nn import QuantLinear


def flux(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = pytest.importorskip("diffusers").FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )
    return model.eval() if dtype == torch.float32 else model.to(dtype).eval()


def run(model):
    g = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    with torch.no_grad():
        return model(
            hidden_states=randn(2, 16, 64),
            encoder_hidden_states=randn(2, 8, 64),
            pooled_projections=randn(2, 32),
            timestep=torch.tensor([0.5, 0.7]),
            guidance=torch.tensor([3.5, 3.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]


def formats(model):
    return {n: m.format for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def shared(a, b):
    return a.data_ptr() == b.data_ptr()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(64, 96),
            nn.Linear(64, 96),
            nn.Linear(64, 96, bias=False),
        )
        self.table, self.last = nn.Embedding(96, 64), nn.Linear(64, 96)
        self.attention = nn.MultiheadAttention(64, 2)
        self.last.weight = self.table.weight
        self.second.weight = self.third.weight = self.first.weight
        self.fourth = self.first
        self.narrow = nn.Linear(40, 256)
