"""The emulator finds what is wrong with a kernel, and says where."""

import re
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parent / "kernels"
SEEDS = range(6)  # orders of blocks and warps


def call(emulated, name: str, fault: int, seed: int) -> torch.Tensor:
    """The result of a kernel of kernels/faults.cu."""
    emulated.set_seed(seed)
    x = torch.arange(512.0)
    out = torch.full((2,) if name == "block_sum" else (512,), torch.nan)
    getattr(emulated.test, name)(out, x, fault)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_sound_kernels_are_right_in_every_order(emulated, seed):
    x = torch.arange(512.0)
    assert torch.equal(call(emulated, "block_sum", 0, seed), x.view(2, 256).sum(1))
    assert torch.equal(call(emulated, "copy", 0, seed), x)
    assert torch.equal(call(emulated, "swap_warps", 0, seed), x.view(-1, 2, 32).flip(1).flatten())
    assert torch.equal(call(emulated, "copy_through_async", 0, seed), x)


@pytest.mark.parametrize(
    "name, fault, message, line",
    [
        (
            "block_sum",
            1,
            "race: (reads|writes) shared memory that thread .* has",
            "tile[t] += tile[t + half]",
        ),
        ("block_sum", 2, "deadlock: .*128 threads, first .*: waits at __syncthreads, faults.cu:", None),
        ("block_sum", 3, "divergent barrier: this thread is at faults.cu:.* others wait at faults.cu", None),
        ("block_sum", 4, "reads shared memory that no thread has written", "tile[t] += tile[t + half]"),
        ("copy", 1, r"writes 4 bytes, 4 past the end of tensor 0, f32\[512\]", "if (i < end) out[i] ="),
        (
            "copy",
            2,
            r"reads 4 bytes, 4 before the beginning of tensor 1, f32\[512\]",
            "if (i < end) out[i] =",
        ),
        ("swap_warps", 1, "reads shared memory that no thread has written", "out[i] = tile[t ^ warpSize];"),
        ("swap_warps", 2, "race: (reads|writes) shared memory that thread .* has", "tile[t"),
        ("copy_through_async", 1, "reads shared memory while a cp.async to it is in flight", "= tile[group]"),
        ("copy_through_async", 2, "reads shared memory while a cp.async to it is in flight", "= tile[group]"),
        ("copy_through_async", 3, "in flight|no thread has written|race: reads", "= tile[group][from]"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_fault_is_found_and_placed(emulated, name, fault, message, line, seed):
    with pytest.raises(RuntimeError, match=message) as caught:
        call(emulated, name, fault, seed)
    text = str(caught.value)
    assert text.startswith(f"kernel {name}, block (") and ("thread (" in text or "128 threads" in text)
    if line is not None:
        number = int(re.search(r"faults\.cu:(\d+)", text)[1])
        assert line in (KERNELS / "faults.cu").read_text().splitlines()[number - 1]


def test_a_launch_after_a_fault_is_clean(emulated):
    with pytest.raises(RuntimeError):
        call(emulated, "block_sum", 1, 0)
    assert torch.equal(call(emulated, "block_sum", 0, 0), torch.arange(512.0).view(2, 256).sum(1))


@pytest.mark.parametrize("size", [64 << 10, 99 << 10])
def test_dynamic_shared_memory_ends_where_it_was_asked_to(emulated, size):
    out = torch.zeros(1)
    emulated.test.use_shared(out, size, 0)
    assert out.item() == 2
    with pytest.raises(RuntimeError, match="writes 4 bytes outside of every tensor"):
        emulated.test.use_shared(out, size, 1)


def test_limits_of_a_block_are_those_of_the_device(emulated):
    out = torch.ones(1)
    emulated.test.use_block(out, 1024, 0)
    assert out.item() == 0
    with pytest.raises(RuntimeError, match=r"1 \.\. 1024 threads, z at most 64, got \(1025, 1, 1\)"):
        emulated.test.use_block(out, 1025, 0)
    with pytest.raises(RuntimeError, match="at most 101376 bytes on sm_86, 89 and 120, got 101380"):
        emulated.test.use_shared(out, 101380, 0)
    with pytest.raises(RuntimeError, match="more than 49152 bytes of static shared memory"):
        emulated.test.use_block(out, 64, 1)
