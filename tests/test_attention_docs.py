"""The code of docs/attention.md runs as it stands, from top to bottom, and gives what the page says."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rfkernels
from rfkernels import ops
from rfkernels.ops.attention import PRECISIONS

pytest.importorskip("diffusers")
PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
DOC = PAGE.read_text()
CODE = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What the page has made when it ends."""
    torch.manual_seed(0)
    scope: dict = {}
    for code in CODE:
        if not code.startswith("# needs a pipeline"):
            exec(code, scope)
    return SimpleNamespace(**{key: value for key, value in scope.items() if not key.startswith("__")})


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_layouts_agree(names):
    close(names.out, names.same.transpose(1, 2))


def test_padding_is_a_mask_and_packing_leaves_it_out(names):
    close(names.padded, names.masked)
    assert names.packed.shape[0] == 420 and names.packed_out.shape == (420, 4, 64)
    close(names.unpacked[names.seen], names.padded[names.seen])
    assert not names.unpacked[~names.seen].any()


def test_blocks_are_a_band(names):
    near = names.near.repeat_interleave(128, 0)[:300].repeat_interleave(64, 1)[:, :300]
    close(names.banded, ops.attention(names.q, names.k, names.v, bias=near[None, None], layout="blhd"))


def test_parts_are_the_whole(names):
    close(names.whole, names.out)
    assert names.lse.shape == (2, 300, 4)


def test_eight_bits_are_near(names):
    assert (names.quick - names.out).norm() < 0.03 * names.out.norm()


def test_streams_end_at_the_last_window(names):
    recent = [t[:, 36:100].transpose(1, 2) for t in (names.q, names.k, names.v)]
    expected = ops.attention(*recent)
    close(names.every, expected)
    close(names.newest, expected[:, :, -1:])


def test_groups_are_their_own(names):
    q, k, v = (t[:, 50:100] for t in (names.q, names.k, names.v))
    close(names.local[:, 50:100], ops.attention(q, k, v, layout="blhd"))
    close(names.read[:, 4:8], ops.attention(names.latents[:, 4:8], k, v, layout="blhd"))
    q, k, v = (t[:, 1::3] for t in (names.q, names.k, names.v))
    close(names.sliced[:, 1::3], ops.attention(q, k, v, layout="blhd"))


def test_lines_for_a_pipeline():
    from diffusers.models import attention_dispatch as dispatch

    from tests.integrations.models import made

    registry = dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()[0]
    found = [code for code in CODE if code.startswith("# needs a pipeline")]
    assert len(found) == 2
    try:
        for code in found:
            pipe = SimpleNamespace(transformer=made("flux", torch.float32)[0])
            exec(code, {"rfkernels": rfkernels, "pipe": pipe})
            backend = pipe.transformer.transformer_blocks[0].attn.processor._attention_backend
            assert backend == "rfkernels_auto"
    finally:
        registry.set_active_backend(before)


def test_every_argument_and_precision_is_on_the_page():
    for name in inspect.signature(ops.attention).parameters:
        assert re.search(rf"`{name}\b|\b{name}=|\b{name},? ", DOC), name
    assert re.findall(r"^\| `\"(\w+)\"` \|", DOC, re.MULTILINE) == list(PRECISIONS)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", DOC):
        assert (PAGE.parent / target).exists(), target
