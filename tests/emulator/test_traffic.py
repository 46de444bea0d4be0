"""The emulator counts what a kernel reads and writes in global memory."""

import pytest
import torch

from tests.ops.cases import BF16, F16, F32, F64

NAMES = {F64: "f64", F32: "f32", F16: "f16", BF16: "bf16"}


def step(emulated, x, v):
    """Traffic of out, x, v and the row scalars of an affine_step."""
    a, b = torch.randn(2, x.shape[0], dtype=F64 if x.dtype == F64 else F32)
    out = torch.empty_like(x)
    emulated.affine_step(out, x, v, a, b)
    assert torch.isfinite(out).all()
    return emulated.traffic()


@pytest.mark.parametrize("state, velocity", [(F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F32, BF16)])
def test_each_tensor_is_touched_once_by_wide_accesses(emulated, state, velocity):
    x, v = torch.randn(3, 64, dtype=F64).to(state), torch.randn(3, 64, dtype=F64).to(velocity)
    out, from_x, from_v, *scalars = step(emulated, x, v)
    assert [t.name for t in (out, from_x)] == [f"tensor {i}, {NAMES[state]}[3, 64] cpu" for i in (0, 1)]
    assert (out.bytes_read, out.bytes_written) == (0, x.nbytes)
    assert (from_x.bytes_read, from_x.bytes_written) == (x.nbytes, 0)
    assert (from_v.bytes_read, from_v.bytes_written) == (v.nbytes, 0)
    # 16 / itemsize of v elements a thread: a wider state moves as one pack of 32 bytes, by 16 at a time
    assert out.writes == {16: x.nbytes // 16}
    assert from_x.reads == {16: x.nbytes // 16}
    assert from_v.reads == {16: v.nbytes // 16}
    size = 8 if state == F64 else 4
    assert all(s.reads == {size: v.nbytes // 16} and not s.writes for s in scalars)  # once a thread


def test_unaligned_tensors_are_read_element_by_element(emulated):
    x = torch.randn(3 * 64 + 1)[1:].view(3, 64)
    out, from_x, from_v, *_ = step(emulated, x, torch.randn(3, 64))
    assert out.writes == from_x.reads == from_v.reads == {4: 3 * 64}


def test_a_vector_whose_members_are_used_one_by_one_is_one_access(emulated):
    x, doubled = torch.randn(32), torch.empty(32)
    emulated.test.double_vectors(doubled, x)
    out, source = emulated.traffic()
    assert torch.equal(doubled, 2 * x)
    assert source.reads == out.writes == {16: 8}


def test_a_call_counts_for_itself(emulated):
    for _ in range(2):
        out, *_ = step(emulated, torch.randn(2, 8), torch.randn(2, 8))
        assert out.bytes_written == 64
    with pytest.raises(RuntimeError, match="deadlock"):
        emulated.test.block_sum(torch.empty(2), torch.randn(512), 2)
    assert emulated.traffic() == []


def test_memory_of_two_tensors_counts_for_the_first(emulated):
    x, v, one = torch.randn(2, 8), torch.randn(2, 8), torch.ones(2)
    emulated.affine_step(x, x, v, one, one)
    out, from_x, *_ = emulated.traffic()
    assert (out.bytes_read, out.bytes_written) == (64, 64)
    assert (from_x.bytes_read, from_x.bytes_written) == (0, 0)


def test_async_copies_and_atomics_count(emulated):
    x = torch.arange(512.0)
    emulated.test.copy_through_async(torch.empty(512), x, 0)
    out, source = emulated.traffic()
    assert (source.reads, source.writes, out.reads, out.writes) == ({4: 512}, {}, {}, {4: 512})
    emulated.test.atomic_sum(torch.zeros(3, dtype=torch.int64), 64)  # two threads of each block add to out
    (total,) = emulated.traffic()
    assert total.reads == total.writes == {8: 6}


def test_gaps_between_rows_are_no_part_of_a_tensor(emulated):
    # The kernel takes 64 neighbours: rows of 32, a gap of 32 behind each, are not for it.
    with pytest.raises(RuntimeError, match=r"reads 4 bytes, in the gaps between the rows of tensor 1"):
        emulated.test.copy(torch.empty(64), torch.randn(2, 64)[:, :32], 0)
    with pytest.raises(RuntimeError, match=r"writes 4 bytes, in the gaps between the rows of tensor 0"):
        emulated.test.copy(torch.empty(2, 64)[:, :32], torch.randn(64), 0)
    emulated.test.copy(torch.empty(32, 2).T, torch.randn(64), 0)  # other orders of the axes have none
    emulated.test.copy(torch.empty(64), torch.randn(1, 64).expand(5, 64), 0)
