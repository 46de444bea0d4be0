"""Packed batches: every sample gets what it gets alone."""

import pytest
import torch
from torch import nn

from rfkernels.nn import run_linear
from rfkernels.ops import attention, gated_residual_norm_modulate, norm_modulate, qkv_norm_rope, rotary_table
from rfkernels.variants.packing import join_packings, packing_of
from tests.variants.plain import F64, attend, close, draw, layer_norm, randomise

HEADS, D = 2, 8
WIDTH = HEADS * D
LENGTHS = [(5, 3, 7), (4, 0, 1), (1,), (0, 6), (), (0, 0)]
lengths_of = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


@lengths_of
def test_rows_know_their_sample_and_their_place(lengths):
    p = packing_of(lengths)
    rows = [(b, i) for b, n in enumerate(lengths) for i in range(n)]
    assert list(zip(p.sample.tolist(), p.position.tolist(), strict=True)) == rows
    assert p.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert (p.cu_seqlens.dtype, p.sample.dtype, p.position.dtype) == (torch.int32, torch.int64, torch.int64)
    assert p.lengths == lengths


@lengths_of
def test_packing_comes_back(lengths):
    p = packing_of(lengths)
    parts = [draw(n, 2, 3, seed=n) for n in lengths]
    x = p.pack(parts) if parts else draw(0, 2, 3)
    assert all(map(torch.equal, p.unpack(x), parts))
    for length in (None, 9):
        padded = p.pad(x, length)
        assert padded.shape == (len(lengths), max(lengths, default=0) if length is None else 9, 2, 3)
        for part, row in zip(parts, padded, strict=True):
            assert torch.equal(row[: len(part)], part) and not row[len(part) :].any()
        assert torch.equal(p.pack_padded(padded), x)


def test_padding_has_a_gradient():
    p, x = packing_of((2, 0, 3)), draw(5, 2).requires_grad_()
    weight = draw(3, 4, 2, seed=1)
    (p.pad(x, 4) * weight).sum().backward()
    assert torch.equal(x.grad, p.pack_padded(weight))


class Block(nn.Module):
    """Attention and an MLP with adaptive modulation, as in DiT, on `[rows, width]`."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(D)) for _ in range(2))

    def forward(self, x, time, rotation, packing):
        shift, scale, gate, shift2, scale2, gate2 = run_linear(self.modulation, time).chunk(6, -1)
        index = packing.sample
        n = norm_modulate(x, scale, shift, index=index)
        weights = {"q_weight": self.q_weight, "k_weight": self.k_weight}
        qkv = qkv_norm_rope(run_linear(self.qkv, n)[None], HEADS, rotation=rotation, **weights)
        o = attention(*(t[0] for t in qkv), cu_seqlens=packing.cu_seqlens).flatten(1)
        x, n = gated_residual_norm_modulate(x, run_linear(self.out, o), gate, scale2, shift2, index=index)
        h = run_linear(self.down, run_linear(self.up, n, activation="gelu_tanh"))
        return x + gate2[index] * h

    def alone(self, x, time, angles):
        """The same for one sample, in plain torch."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(time).chunk(6, -1)
        q, k, v = self.qkv(layer_norm(x) * (1 + scale) + shift).chunk(3, -1)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]

        def normed_and_turned(t, weight):
            t = nn.functional.rms_norm(t.unflatten(-1, (HEADS, D)), (D,), weight, 1e-6)
            return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(1)

        q, k = normed_and_turned(q, self.q_weight), normed_and_turned(k, self.k_weight)
        x = x + gate * self.out(attend(q[None], k[None], v[None], HEADS)[0])
        h = self.down(nn.functional.gelu(self.up(layer_norm(x) * (1 + scale2) + shift2), approximate="tanh"))
        return x + gate2 * h


@torch.no_grad()
@pytest.mark.parametrize("lengths", [n for n in LENGTHS if sum(n)], ids=str)
def test_a_block_treats_samples_as_if_alone(lengths):
    block, p, time = randomise(Block()), packing_of(lengths), draw(len(lengths), WIDTH, seed=1)
    parts = [draw(n, WIDTH, seed=10 + b) for b, n in enumerate(lengths)]
    places = [torch.arange(n) * (b + 1) for b, n in enumerate(lengths)]  # positions of their own
    rotation = rotary_table(p.pack(places)[:, None], (D,), dtype=F64)
    out = p.unpack(block(p.pack(parts), time, rotation, p))
    frequency = 10000 ** (-torch.arange(0, D, 2, dtype=F64) / D)
    for x, place, t, y in zip(parts, places, time, out, strict=True):
        if len(x):
            close(y, block.alone(x, t, place[:, None] * frequency))


@lengths_of
def test_packed_is_padded_under_a_mask(lengths):
    if not sum(lengths):
        return
    p = packing_of(lengths)
    q, k, v = (draw(sum(lengths), HEADS, D, seed=i) for i in range(3))
    packed = attention(q, k, v, cu_seqlens=p.cu_seqlens)
    padded = attention(*(p.pad(t, 8) for t in (q, k, v)), key_lengths=torch.tensor(lengths), layout="blhd")
    close(packed, p.pack_padded(padded))


TEXT, IMAGE = packing_of((3, 0, 2)), packing_of((4, 5, 1))


def test_two_streams_become_one_and_come_back():
    joint = join_packings(TEXT, IMAGE)
    text, image = draw(5, 3), draw(10, 3, seed=1)
    x = joint.join(text, image)
    expected = [t for pair in zip(TEXT.unpack(text), IMAGE.unpack(image), strict=True) for t in pair]
    assert torch.equal(x, torch.cat(expected))
    assert joint.packing.lengths == (7, 5, 3)
    assert all(map(torch.equal, joint.split(x), (text, image)))


def test_joint_attention_of_text_and_picture():
    joint = join_packings(TEXT, IMAGE)
    qkv = [[draw(n, HEADS, D, seed=n + i) for i in range(3)] for n in (5, 10)]
    q, k, v = (joint.join(a, b) for a, b in zip(*qkv, strict=True))
    text, image = joint.split(attention(q, k, v, cu_seqlens=joint.packing.cu_seqlens))
    for b in range(3):
        parts = [[p.unpack(t)[b] for t in stream] for p, stream in zip((TEXT, IMAGE), qkv, strict=True)]
        alone = attend(*(torch.cat(pair).flatten(1)[None] for pair in zip(*parts, strict=True)), HEADS)[0]
        got = torch.cat([TEXT.unpack(text)[b], IMAGE.unpack(image)[b]]).flatten(1)
        close(got, alone)


def test_cross_attention_has_two_packings():
    q = draw(10, HEADS, D)
    k, v = draw(5, HEADS, D, seed=1), draw(5, HEADS, D, seed=2)
    out = attention(q, k, v, cu_seqlens=(IMAGE.cu_seqlens, TEXT.cu_seqlens))
    flat = lambda p, t, b: p.unpack(t)[b].flatten(1)[None]
    for b in (0, 2):
        expected = attend(flat(IMAGE, q, b), flat(TEXT, k, b), flat(TEXT, v, b), HEADS)[0]
        close(IMAGE.unpack(out)[b].flatten(1), expected)
    assert not IMAGE.unpack(out)[1].any()  # no text


def test_refusals():
    p = packing_of((2, 3))
    for call, message in (
        (lambda: packing_of((2, -1)), r"0 or more, got \[2, -1\]"),
        (lambda: p.pack([draw(2, 4), draw(2, 4)]), r"samples of \[2, 3\] rows required, got \[2, 2\]"),
        (lambda: p.unpack(draw(4, 4)), r"\[5, ...\] required, got \[4, 4\]"),
        (lambda: p.pad(draw(4, 4)), r"\[5, ...\] required"),
        (lambda: p.pad(draw(5, 4), 2), "length must be 3 or more, got 2"),
        (lambda: p.pack_padded(draw(2, 2, 4)), r"\[2, 3 or more, ...\] required, got \[2, 2, 4\]"),
        (lambda: join_packings(), r"one batch required, got \[\]"),
        (lambda: join_packings(p, packing_of((1,))), r"one batch required, got \[2, 1\]"),
        (lambda: join_packings(p, p).join(draw(5, 4), draw(4, 4)), r"\[5, ...\] required"),
        (lambda: join_packings(p, p).split(draw(9, 4)), r"\[10, ...\] required"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
