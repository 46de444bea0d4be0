"""A small block of every family: two samples, ragged token counts, the head dims of the released models."""

from functools import partial

import torch
from diffusers.models import attention
from diffusers.models.transformers import transformer_flux as d_flux
from diffusers.models.transformers import transformer_flux2 as d_flux2
from diffusers.models.transformers import transformer_hidream_image as d_hidream
from diffusers.models.transformers import transformer_lumina2 as d_lumina2
from diffusers.models.transformers import transformer_qwenimage as d_qwen
from diffusers.models.transformers import transformer_wan as d_wan
from diffusers.models.transformers import transformer_z_image as d_zimage
from torch import Tensor

from rfkernels import ops
from rfkernels.models import dit, flux, flux2, hidream, pixart, qwen, sandwich, sd3, wan
from tests.blocks.parity import Problem, normal, tokens

__all__ = ["PROBLEMS"]

# what becomes queries and keys, normed at once
QK = (
    "attn.to_q",
    "attn.to_k",
    "attn.add_q",
    "attn.add_k",
    "attn1.to_q",
    "attn1.to_k",
    "attn2.to_q",
    "attn2.to_k",
)
QK += ("attention.to_q", "attention.to_k")

BATCH, TEXT, GRID = 2, 23, (7, 11)
IMAGE = GRID[0] * GRID[1]


def grid_ids(frames: int, rows: int, columns: int) -> Tensor:
    """int64[frames rows columns, 3]: frame, row and column of every token."""
    axes = (torch.arange(n) for n in (frames, rows, columns))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def image_ids() -> Tensor:
    return grid_ids(1, *GRID)


def streams(width: int) -> dict[str, Tensor]:
    """image, text and a condition per sample."""
    image, text = tokens(BATCH, IMAGE, width), tokens(BATCH, TEXT, width)
    return {"image": image, "text": text, "temb": normal(BATCH, width)}


def flux_problems(heads: int, axes: tuple[int, int, int]) -> list[Problem]:
    head_dim = sum(axes)
    width = heads * head_dim
    ids = torch.cat([torch.zeros(TEXT, 3, dtype=torch.int64), image_ids()])

    def theirs(block, image, text, temb):
        return block(image, text, temb, d_flux.FluxPosEmbed(10000, axes)(ids))

    def ours(block, image, text, temb):
        return flux.double_block(block, image, text, temb, ops.rotary_table(ids, axes))

    def ours_single(block, image, text, temb):
        x = torch.cat([text, image], 1)
        return flux.single_block(block, x, temb, ops.rotary_table(ids, axes)).split([TEXT, IMAGE], 1)

    double, single = d_flux.FluxTransformerBlock, d_flux.FluxSingleTransformerBlock
    inputs = partial(streams, width)
    return [
        Problem(
            f"flux-double-{head_dim}", partial(double, width, heads, head_dim), inputs, theirs, ours, small=QK
        ),
        Problem(
            f"flux-single-{head_dim}",
            partial(single, width, heads, head_dim),
            inputs,
            theirs,
            ours_single,
            small=QK,
        ),
    ]


def flux2_problems(heads: int = 2, axes: tuple[int, ...] = (32, 32, 32, 32)) -> list[Problem]:
    head_dim = sum(axes)
    width = heads * head_dim
    ids = torch.zeros(TEXT + IMAGE, 4, dtype=torch.int64)
    ids[:TEXT, 3] = torch.arange(TEXT)
    ids[TEXT:, :3] = image_ids()

    def table():
        return ops.rotary_table(ids, axes, 2000.0)

    def theirs(block, image, text, modulation, c_modulation):
        return block(image, text, modulation, c_modulation, d_flux2.Flux2PosEmbed(2000, axes)(ids))

    def ours(block, image, text, modulation, c_modulation):
        return flux2.double_block(block, image, text, modulation, c_modulation, table())

    def theirs_single(block, x, modulation):
        return block(x, None, modulation, d_flux2.Flux2PosEmbed(2000, axes)(ids))

    def ours_single(block, x, modulation):
        return flux2.single_block(block, x, modulation, table())

    def inputs():
        modulations = {name: 0.5 * normal(BATCH, 6 * width) for name in ("modulation", "c_modulation")}
        return {"image": tokens(BATCH, IMAGE, width), "text": tokens(BATCH, TEXT, width)} | modulations

    def inputs_single():
        return {"x": tokens(BATCH, TEXT + IMAGE, width), "modulation": 0.5 * normal(BATCH, 3 * width)}

    double, single = d_flux2.Flux2TransformerBlock, d_flux2.Flux2SingleTransformerBlock
    return [
        Problem("flux2-double", partial(double, width, heads, head_dim), inputs, theirs, ours, small=QK),
        Problem(
            "flux2-single",
            partial(single, width, heads, head_dim),
            inputs_single,
            theirs_single,
            ours_single,
        ),
    ]


def qwen_problem(name: str, reference: bool, heads: int = 2, axes: tuple[int, ...] = (16, 56, 56)) -> Problem:
    width, (rows, columns) = heads * sum(axes), GRID
    ids = torch.full((TEXT + IMAGE, 3), max(rows // 2, columns // 2))
    ids[:TEXT] += torch.arange(TEXT)[:, None]
    ids[TEXT:] = image_ids() - torch.tensor([0, rows - rows // 2, columns - columns // 2])

    def theirs(block, image, text, temb, index=None):
        embed = d_qwen.QwenEmbedRope(10000, axes, scale_rope=True)
        rotary = embed([(1, rows, columns)], torch.device("cpu"), max_txt_seq_len=TEXT)
        return block(image, text, None, temb, rotary, modulate_index=index)

    def ours(block, image, text, temb, index=None):
        if index is not None:  # of the two conditions of a sample -> of the rows of temb
            index = index * BATCH + torch.arange(BATCH)[:, None]
        return qwen.double_block(block, image, text, temb, ops.rotary_table(ids, axes), index)

    def inputs():
        made = streams(width)
        if reference:
            made["temb"] = normal(2 * BATCH, width)
            made["index"] = (torch.arange(IMAGE) >= 50).long().expand(BATCH, IMAGE)
        return made

    build = partial(d_qwen.QwenImageTransformerBlock, width, heads, sum(axes), zero_cond_t=reference)
    return Problem(name, build, inputs, theirs, ours, small=QK)


def sd3_problem(name: str, heads: int = 4, head_dim: int = 64, **options) -> Problem:
    width = heads * head_dim

    def theirs(block, image, text, temb):
        return tuple(out for out in block(image, text, temb) if out is not None)

    def ours(block, image, text, temb):
        return tuple(out for out in sd3.joint_block(block, image, text, temb) if out is not None)

    build = partial(attention.JointTransformerBlock, width, heads, head_dim, **options)
    small = QK if "qk_norm" in options else ()
    return Problem(name, build, partial(streams, width), theirs, ours, small=small)


def wan_problem(name: str, per_token: bool, heads: int = 2, axes: tuple[int, ...] = (44, 42, 42)) -> Problem:
    head_dim = sum(axes)
    width, size = heads * head_dim, (3, 5, 7)
    rotary = d_wan.WanRotaryPosEmbed(head_dim, (1, 1, 1), 64)

    def theirs(block, x, text, temb, index=None):
        temb = temb if index is None else temb[index]  # [B, L, 6, width]
        return block(x, text, temb, rotary(torch.empty(1, 1, *size)))

    def ours(block, x, text, temb, index=None):
        return wan.video_block(block, x, text, temb, ops.rotary_table(grid_ids(*size), axes), index)

    def inputs():
        length = size[0] * size[1] * size[2]
        made = {"x": tokens(BATCH, length, width), "text": tokens(BATCH, TEXT, width)}
        made["temb"] = 0.5 * normal(2, 6, width)
        if per_token:  # the first frame is given: its tokens take the row of t = 0
            given = torch.arange(length) < size[1] * size[2]
            made["index"] = torch.where(given, 0, 1).expand(BATCH, length)
        return made

    build = partial(d_wan.WanTransformerBlock, width, 3 * width, heads, cross_attn_norm=True)
    wide = ("temb", "scale_shift_table", "norm2.weight", "norm2.bias")
    return Problem(name, build, inputs, theirs, ours, wide=wide, small=QK)


def hidream_problems(heads: int = 2, axes: tuple[int, ...] = (64, 32, 32)) -> list[Problem]:
    head_dim = sum(axes)
    width = heads * head_dim
    ids = torch.cat([image_ids(), torch.zeros(TEXT, 3, dtype=torch.int64)])

    def rotary():
        return d_hidream.HiDreamImageEmbedND(10000, axes)(ids[None])

    def table():
        return ops.rotary_table(ids, axes)

    def theirs(block, image, text, temb):
        return block(image, None, text, temb, rotary())

    def theirs_single(block, image, text, temb):
        return block(torch.cat([image, text], 1), None, None, temb, rotary())

    def ours(block, image, text, temb):
        return hidream.double_block(block, image, text, temb, table())

    def ours_single(block, image, text, temb):
        return hidream.single_block(block, torch.cat([image, text], 1), temb, table())

    dense = {"num_routed_experts": 0}
    double = partial(d_hidream.HiDreamImageTransformerBlock, width, heads, head_dim, **dense)
    single = partial(d_hidream.HiDreamImageSingleTransformerBlock, width, heads, head_dim, **dense)
    return [
        Problem("hidream-double", double, partial(streams, width), theirs, ours, small=QK),
        Problem("hidream-single", single, partial(streams, width), theirs_single, ours_single, small=QK),
    ]


def dit_problem(heads: int = 4, head_dim: int = 72) -> Problem:
    width = heads * head_dim

    def build():
        return attention.BasicTransformerBlock(
            width,
            heads,
            head_dim,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=10,
            attention_bias=True,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )

    def theirs(block, x, t, label):
        return block(x, timestep=t, class_labels=label)

    def inputs():
        t, label = torch.tensor([3, 871]), torch.tensor([7, 10])
        return {"x": tokens(BATCH, IMAGE, width), "t": t, "label": label}

    def ours(block, x, t, label):
        return dit.class_conditional_block(block, x, block.norm1.emb(t, label, hidden_dtype=x.dtype))

    flat, small = ("attn1.to_k.bias",), ("attn1.to_out",)
    return Problem("dit", build, inputs, theirs, ours, flat=flat, small=small)


def pixart_problem(heads: int = 4, head_dim: int = 72) -> Problem:
    width = heads * head_dim

    def build():
        return attention.BasicTransformerBlock(
            width,
            heads,
            head_dim,
            cross_attention_dim=width,
            activation_fn="gelu-approximate",
            attention_bias=True,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )

    def theirs(block, x, text, temb):
        return block(x, encoder_hidden_states=text, timestep=temb)

    def inputs():
        x, text = tokens(BATCH, IMAGE, width), tokens(BATCH, TEXT, width)
        return {"x": x, "text": text, "temb": 0.5 * normal(BATCH, 6 * width)}

    flat = ("attn1.to_k.bias", "attn2.to_k.bias")
    return Problem("pixart", build, inputs, theirs, pixart.cross_block, flat=flat)


def lumina2_problem(heads: int = 6, kv_heads: int = 2, axes: tuple[int, ...] = (32, 32, 32)) -> Problem:
    width = heads * sum(axes)
    ids = torch.cat([torch.zeros(TEXT, 3, dtype=torch.int64), image_ids()])
    ids[:TEXT, 0], ids[TEXT:, 0] = torch.arange(TEXT), TEXT

    def theirs(block, x, temb):
        rotary = d_lumina2.Lumina2RotaryPosEmbed(10000, axes)._get_freqs_cis(ids.expand(BATCH, -1, -1))
        return block(x, None, rotary, temb)

    def ours(block, x, temb):
        return sandwich.lumina2_block(block, x, temb, ops.rotary_table(ids, axes))

    def inputs():
        return {"x": tokens(BATCH, TEXT + IMAGE, width), "temb": normal(BATCH, width)}

    build = partial(d_lumina2.Lumina2TransformerBlock, width, heads, kv_heads, 256, 1.0, 1e-5)
    return Problem("lumina2", build, inputs, theirs, ours, small=QK)


def zimage_problem(
    name: str, per_token: bool, heads: int = 2, axes: tuple[int, ...] = (32, 48, 48)
) -> Problem:
    width, rows = heads * sum(axes), BATCH * 2
    ids = torch.cat([image_ids(), torch.zeros(TEXT, 3, dtype=torch.int64)])
    ids[:IMAGE, 0], ids[IMAGE:, 0] = TEXT + 1, 1 + torch.arange(TEXT)

    def theirs(block, x, temb, index=None):
        rotary = d_zimage.RopeEmbedder(256.0, axes, (256, 64, 64))(ids)[None]
        if index is None:
            return block(x, None, rotary, temb)
        clean, noisy = temb.chunk(2)
        mask = (index >= BATCH).to(torch.int64)
        return block(x, None, rotary, noise_mask=mask, adaln_noisy=noisy, adaln_clean=clean)

    def ours(block, x, temb, index=None):
        return sandwich.zimage_block(block, x, temb, ops.rotary_table(ids, axes, 256.0), index)

    def inputs():
        made = {"x": tokens(BATCH, TEXT + IMAGE, width), "temb": normal(rows if per_token else BATCH, 256)}
        if per_token:  # rows of clean tokens, then of noisy ones, one of each per sample
            noisy = torch.rand(BATCH, TEXT + IMAGE) < 0.7
            made["index"] = torch.arange(BATCH)[:, None] + BATCH * noisy
        return made

    build = partial(d_zimage.ZImageTransformerBlock, 0, width, heads, heads, 1e-5, True)
    return Problem(name, build, inputs, theirs, ours, small=QK)


PROBLEMS = [
    *flux_problems(4, (16, 24, 24)),
    *flux_problems(2, (16, 56, 56)),
    *flux2_problems(),
    qwen_problem("qwen-image", reference=False),
    qwen_problem("qwen-image-edit", reference=True),
    sd3_problem("sd3"),
    sd3_problem("sd3-last", context_pre_only=True),
    sd3_problem("sd3.5", qk_norm="rms_norm"),
    sd3_problem("sd3.5-dual", qk_norm="rms_norm", use_dual_attention=True),
    sd3_problem("sd3.5-last", qk_norm="rms_norm", context_pre_only=True),
    wan_problem("wan", per_token=False),
    wan_problem("wan-per-token", per_token=True),
    *hidream_problems(),
    dit_problem(),
    pixart_problem(),
    lumina2_problem(),
    zimage_problem("z-image", per_token=False),
    zimage_problem("z-image-per-token", per_token=True),
]
