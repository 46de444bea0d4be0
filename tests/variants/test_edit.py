"""HiDream-E1: its guidance of three velocities, and the source on the right."""

import pytest
import torch

from rfkernels.samplers import sample, schedule
from rfkernels.variants.edit import edit_sources, edit_velocity, hidream_edit_guidance
from tests.variants.plain import close, draw

U, SRC, F = (draw(3, 4, 2, 5, seed=i) for i in range(3))


def definition(u, i, f, s_image, s_text, clip):
    """Column by column."""
    out = torch.empty_like(u)
    for b in range(u.shape[0]):
        for y in range(u.shape[2]):
            for x in range(u.shape[3]):
                cu, ci, cf = (t[b, :, y, x] for t in (u, i, f))
                if clip:
                    p = ci + s_text * (cf - ci)
                    p = p * min(1.0, (cf.norm() / (p.norm() + 1e-8)).item())
                    out[b, :, y, x] = cu + s_image * (p - cu)
                else:
                    out[b, :, y, x] = cu + s_image * (ci - cu) + s_text * (cf - ci)
    return out


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("s_image, s_text", [(2.0, 3.0), (1.0, 0.2), (4.0, 5.0)])
def test_guidance_is_its_definition(s_image, s_text, clip):
    expected = definition(U, SRC, F, s_image, s_text, clip)
    close(hidream_edit_guidance(U, SRC, F, s_image, s_text, clip), expected)
    scales = [torch.full((3,), s, dtype=torch.float64) for s in (s_image, s_text)]
    close(hidream_edit_guidance(U, SRC, F, *scales, clip), expected)
    half = hidream_edit_guidance(*(t.bfloat16() for t in (U, SRC, F)), s_image, s_text, clip)
    wide = definition(*(t.bfloat16().double() for t in (U, SRC, F)), s_image, s_text, clip)
    assert half.dtype == torch.bfloat16
    close(half.double(), wide, 8e-3)  # rounded once


def test_scales_are_of_samples():
    s = torch.tensor([1.0, 2.0, 3.0])
    together = hidream_edit_guidance(U, SRC, F, s, s + 1)
    for b in range(3):
        part = slice(b, b + 1)
        close(together[part], definition(U[part], SRC[part], F[part], b + 1.0, b + 2.0, True))


def test_limits():
    """Without an instruction both are plain guidance by the source; scales of 1 give the full velocity; and
    what is clipped is no longer than the full velocity."""
    plain = U + 2 * (F - U)
    for clip in (True, False):
        close(hidream_edit_guidance(U, F, F, 2.0, 5.0, clip), plain, 1e-7)
        close(hidream_edit_guidance(U, SRC, F, 1.0, 1.0, clip), F, 1e-7)
    p = hidream_edit_guidance(torch.zeros_like(U), SRC, F, 1.0, 9.0)
    assert (p.norm(dim=1) <= F.norm(dim=1) * (1 + 1e-12)).all()
    zero = torch.zeros_like(U)
    assert torch.equal(hidream_edit_guidance(U, zero, zero, 1.0, 3.0), zero)


def test_a_sampler_steps_the_left_half_with_three_velocities():
    x, source, sigmas = draw(2, 4, 3, 5), draw(2, 4, 3, 5, seed=1), schedule("linear", 2)
    texts = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)[:, None, None, None]

    def model(joint, sigma):
        assert joint.shape == (6, 4, 3, 10) and sigma.shape == (6,)
        assert torch.equal(joint[..., 5:], edit_sources(source))
        assert torch.equal(joint[:2, ..., :5], joint[4:, ..., :5])
        return joint.roll(5, -1) * sigma.reshape(-1, 1, 1, 1) + texts * joint  # the left half reads the right

    result = sample(edit_velocity(model, source, 2.0, 3.0), x, sigmas)
    expected = x
    for now, then in zip(sigmas.double()[:-1], sigmas.double()[1:], strict=True):
        parts = zip((0, 1, 2), (0 * source, source, source), strict=True)
        three = [-(s * now + texts[2 * i : 2 * i + 2] * expected) for i, s in parts]
        expected = expected + (then - now) * definition(*three, 2.0, 3.0, True)
    close(result, expected, 1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"three \[batch, channels, ...\] required"):
        hidream_edit_guidance(U, SRC, F[:1], 1.0, 1.0)
    with pytest.raises(ValueError, match=r"scales must be numbers or \[3\], got \[2\]"):
        hidream_edit_guidance(U, SRC, F, torch.ones(2), 1.0)
