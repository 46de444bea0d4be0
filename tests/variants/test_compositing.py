"""Positions of background and foreground as released and as meant, and the branch outside of a mask."""

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from rfkernels.ops import qkv_norm_rope
from rfkernels.variants.compositing import (
    BackgroundFusion,
    erope_ids,
    erope_table,
    fuse_background,
    mask_tokens,
)
from tests.variants.plain import F64, close, draw, randomise

GRIDS = [(3, 2, 5), (2, 3, 4), (1, 1, 1), (5, 4, 1)]


def frames_of(ids, grid):
    """[2 T, H, W, 3]: frames of the background, then of the foreground."""
    t, h, w = grid
    assert ids.shape == (2 * t * h * w, 3) and ids.dtype == torch.int64
    return ids.view(2 * t, h, w, 3).tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_released_positions_alternate_between_the_halves(grid):
    _, height, _ = grid
    for f, frame in enumerate(frames_of(erope_ids(*grid), grid)):
        for h, row in enumerate(frame):
            assert row == [[f // 2, h + height * (f % 2), w] for w in range(grid[2])]


@pytest.mark.parametrize("grid", GRIDS)
def test_stacked_positions_extend_the_height(grid):
    frames, height, _ = grid
    for f, frame in enumerate(frames_of(erope_ids(*grid, released=False), grid)):
        for h, row in enumerate(frame):
            assert row == [[f % frames, h + height * (f >= frames), w] for w in range(grid[2])]


def test_the_released_table_is_that_of_diffusers_for_twice_the_height():
    """CogVideoX's function, on the grid that the released code asks it for."""
    t, h, w = 3, 2, 5
    cos, sin = get_3d_rotary_pos_embed(64, ((0, 0), (2 * h, w)), (2 * h, w), t, device="cpu")
    table = erope_table(t, h, w)
    for ours, theirs in zip(table.unbind(-1), (cos, sin), strict=True):
        close(ours.repeat_interleave(2, -1), theirs.float(), 2e-6)


@pytest.mark.parametrize("released", [True, False])
def test_queries_turn_behind_the_text(released):
    grid, text, heads = (2, 2, 3), 4, 2
    ids = erope_ids(*grid, released=released)
    table = erope_table(*grid, axes_dims=(4, 6, 6), released=released, dtype=F64)
    qkv = draw(1, text + len(ids), 3 * heads * 16)
    q, k, _ = qkv_norm_rope(qkv, heads, rotation=table, rotate_from=text)
    for turned, x in zip((q, k), qkv.unflatten(-1, (3, heads, 16)).unbind(2), strict=False):
        close(turned[:, :text], x[:, :text])
        for token, position in enumerate(ids.tolist()):
            axes = zip(position, (4, 6, 6), strict=True)
            angles = [p * 10000 ** (-2 * j / d) for p, d in axes for j in range(d // 2)]
            factor = torch.polar(torch.ones(8, dtype=F64), torch.tensor(angles, dtype=F64))
            pairs = torch.view_as_complex(x[:, text + token].unflatten(-1, (8, 2)))
            close(turned[:, text + token], torch.view_as_real(pairs * factor).flatten(-2))


def test_a_token_is_masked_where_any_of_its_patch_is():
    mask = torch.zeros(2, 3, 4, 6)
    mask[0, 1, 2, 5] = 0.25
    mask[1, 2, 0, 0] = mask[1, 2, 1, 1] = 1
    tokens = mask_tokens(mask)
    expected = torch.nn.functional.avg_pool2d(mask, 2).flatten(1) > 0
    assert torch.equal(tokens, expected) and tokens.sum().item() == 2
    assert tokens[0, 1 * 6 + 1 * 3 + 2] and tokens[1, 2 * 6]
    assert torch.equal(mask_tokens(mask > 0), expected)
    assert torch.equal(mask_tokens(mask, 1), mask.flatten(1) > 0)


def test_the_branch_speaks_outside_of_the_mask_alone():
    h, branch = draw(2, 12, 8), draw(2, 12, 8, seed=1)
    mask = draw(2, 12, seed=2) > 0
    branch[mask] = torch.nan  # what is masked is not even read
    out = fuse_background(h, branch, mask)
    assert torch.equal(out[mask], h[mask]) and torch.equal(out[~mask], (h + branch)[~mask])
    one = fuse_background(h, branch.nan_to_num(), mask[:1])
    assert torch.equal(one[:, mask[0]], h[:, mask[0]])


def test_fusion_begins_as_the_main_model_and_leaves_the_foreground():
    fusion = BackgroundFusion(3, 8, 6).double()
    h, branch, mask = draw(2, 20, 8), draw(2, 12, 6, seed=1), draw(2, 12, seed=2) > 0
    assert torch.equal(fusion(1, h, branch, mask), h)
    randomise(fusion)
    layer, out = fusion.branch_blocks[1], fusion(1, h, branch, mask)
    said = h[:, :12] + branch @ layer.weight.T + layer.bias
    close(out[:, :12], torch.where((mask == 0)[..., None], said, h[:, :12]))
    assert torch.equal(out[:, 12:], h[:, 12:])
    assert list(fusion.state_dict())[:2] == ["branch_blocks.0.weight", "branch_blocks.0.bias"]
    out.square().sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_refusals():
    with pytest.raises(ValueError, match=r"a grid of 1 or more required, got \(0, 2, 2\)"):
        erope_ids(0, 2, 2)
    for mask, patch in ((torch.ones(1, 2, 3, 4), 2), (torch.ones(2, 4, 4), 2), (torch.ones(1, 2, 4, 4), 0)):
        with pytest.raises(ValueError, match="mask must be"):
            mask_tokens(mask, patch)
    h, mask = draw(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    for branch, wrong in ((draw(2, 4, 7), mask), (h, mask.float()), (h, mask[:, :3]), (h, mask[0])):
        with pytest.raises(ValueError, match="fuse_background: h, branch"):
            fuse_background(h, branch, wrong)
    with pytest.raises(ValueError, match="BackgroundFusion: h, branch"):
        BackgroundFusion(1, 8)(0, h, draw(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
