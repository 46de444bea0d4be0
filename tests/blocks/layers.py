"""What the blocks share beside the ops: plain torch matmuls and attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels import ops

__all__ = ["attend", "joined", "mlp"]


def joined(x: Tensor, *linears: nn.Linear) -> Tensor:
    """Several linear layers of one input as one matmul. A model joins its weights once, when it is loaded."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return F.linear(x, weight, bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as [B, L, heads d]; all [B, L, heads, d]; k and v may have fewer heads.

    torch's attention answers in the memory layout of q, so that nothing is copied on either side.
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2).flatten(2)


def mlp(x: Tensor, ff: nn.Module) -> Tensor:
    """diffusers' FeedForward with the tanh GELU, which also adds the bias of the first linear layer."""
    up, down = ff.net[0].proj, ff.net[2]
    return down(ops.gelu(F.linear(x, up.weight), "tanh", up.bias))
