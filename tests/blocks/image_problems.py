"""Blocks of AuraFlow and FLUX.3, as `problems` has those of other families."""

from functools import partial

import torch
from diffusers.models.transformers import auraflow_transformer_2d as d_auraflow
from diffusers.models.transformers import transformer_flux3 as d_flux3

from rfkernels import ops
from rfkernels.models import auraflow, flux3
from tests.blocks.parity import Problem, normal, tokens
from tests.blocks.problems import BATCH, IMAGE, QK, TEXT, image_ids, streams

__all__ = ["PROBLEMS"]


def flux3_problem(heads: int = 2, axes: tuple[int, ...] = (32, 32, 32, 32)) -> Problem:
    head_dim = sum(axes)
    width = heads * head_dim
    ids = torch.zeros(TEXT + IMAGE, 4, dtype=torch.int64)
    ids[:TEXT, 3] = torch.arange(TEXT)
    ids[TEXT:, :3] = image_ids()

    def theirs(block, image, text, modulation):
        c_modulation, modulation = (
            rows.expand(-1, length, -1) for rows, length in zip(modulation, (TEXT, IMAGE), strict=True)
        )
        return block(image, text, modulation, c_modulation, d_flux3.Flux3PosEmbed(10000, axes)(ids))

    def ours(block, image, text, modulation):
        x = torch.cat([text, image], 1)
        table, index = modulation.flatten(0, 2), flux3.rows_of([text, image])
        x = flux3.parallel_block(block, x, table, ops.rotary_table(ids, axes), index)
        return x.split([TEXT, IMAGE], 1)

    def inputs():
        made = {"image": tokens(BATCH, IMAGE, width), "text": tokens(BATCH, TEXT, width)}
        return made | {"modulation": 0.5 * normal(2, BATCH, 1, 3 * width)}

    build = partial(d_flux3.Flux3SingleTransformerBlock, width, heads, head_dim)
    wide = ("attn.norm_q.weight", "attn.norm_k.weight")
    return Problem("flux3", build, inputs, theirs, ours, wide=wide, small=QK)


def auraflow_problems(heads: int = 2, head_dim: int = 64) -> list[Problem]:
    width = heads * head_dim
    joint, single = d_auraflow.AuraFlowJointTransformerBlock, d_auraflow.AuraFlowSingleTransformerBlock

    def theirs(block, **inputs):
        return block(*inputs.values())

    def inputs():
        return {"x": tokens(BATCH, TEXT + IMAGE, width), "temb": normal(BATCH, width)}

    sizes, ours, ours_single = (width, heads, head_dim), auraflow.joint_block, auraflow.single_block
    return [
        Problem("auraflow-joint", partial(joint, *sizes), partial(streams, width), theirs, ours, small=QK),
        Problem("auraflow-single", partial(single, *sizes), inputs, theirs, ours_single, small=QK),
    ]


PROBLEMS = [*auraflow_problems(), flux3_problem()]
