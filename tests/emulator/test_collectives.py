"""Shuffles, votes, reductions, barriers and atomics, against what the programming guide says they give."""

from collections.abc import Callable

import pytest
import torch

WARP = 32
MASK32 = 2**32 - 1


def lanes(f: Callable[[list[int], int], int]) -> Callable[[list[int]], list[int]]:
    """The result of each of 64 threads from f(values of its warp, its lane)."""
    return lambda v: [f(v[t // WARP * WARP : t // WARP * WARP + WARP], t % WARP) for t in range(64)]


def whole(f: Callable[[list[int]], int]) -> Callable[[list[int]], list[int]]:
    """The same for all threads of the block."""
    return lambda v: [f(v)] * 64


def bits(predicates: list[bool]) -> int:
    return sum(p << i for i, p in enumerate(predicates))


def fold(f: Callable[[int, int], int]) -> Callable[[list[int]], list[int]]:
    def over_warp(v: list[int], _: int) -> int:
        result = v[0]
        for x in v[1:]:
            result = f(result, x)
        return result & MASK32

    return lanes(over_warp)


def popc_clz_ffs(v: list[int], t: int) -> int:
    x = v[t]
    return x.bit_count() * 10000 + (32 - x.bit_length()) * 100 + (x & -x).bit_length()


# op of kernels/collectives.cu -> (number, what thread t gets)
OPS = {
    0: (5, lanes(lambda v, t: v[5])),
    1: (3, lanes(lambda v, t: v[t - 3] if t >= 3 else v[t])),
    2: (3, lanes(lambda v, t: v[t + 3] if t + 3 < WARP else v[t])),
    3: (9, lanes(lambda v, t: v[t ^ 9])),
    4: (3, lanes(lambda v, t: v[t - 3] if t % 8 >= 3 else v[t])),
    5: (3, lanes(lambda v, t: v[t + 3] if t % 8 + 3 < 8 else v[t])),
    6: (5, lanes(lambda v, t: v[t // 8 * 8 + 5])),
    7: (4, lanes(lambda v, t: bits([x & 4 != 0 for x in v]))),
    8: (64, lanes(lambda v, t: any(x & 64 for x in v))),
    9: (1, lanes(lambda v, t: all(x & 1 for x in v))),
    10: (0, lanes(lambda v, t: bits([x == v[t] for x in v]))),
    11: (0, lanes(lambda v, t: MASK32 + 1 if len(set(v)) == 1 else 0)),
    12: (0, fold(lambda a, b: a + b)),
    13: (0, fold(min)),
    14: (0, fold(max)),
    15: (0, fold(lambda a, b: a & b)),
    16: (0, fold(lambda a, b: a | b)),
    17: (0, fold(lambda a, b: a ^ b)),
    18: (2, whole(lambda v: sum(x & 2 != 0 for x in v))),
    19: (64, whole(lambda v: any(x & 64 for x in v))),
    20: (1, whole(lambda v: all(x & 1 for x in v))),
    21: (4, lanes(lambda v, t: bits([x & 4 != 0 and i // 16 == t // 16 for i, x in enumerate(v)]))),
    22: (0, lanes(popc_clz_ffs)),
}


@pytest.mark.parametrize("values", ["random", "equal", "odd"])
@pytest.mark.parametrize("op", OPS)
def test_collective_gives_each_thread_its_value(emulated, op, values):
    torch.manual_seed(op)
    x = torch.randint(0, 63, (64,))
    x = {"random": x, "equal": torch.full_like(x, 65), "odd": x | 1}[values]
    number, expected = OPS[op]
    out = torch.full_like(x, -1)
    emulated.test.collective(out, x, op, number)
    signed = [e if op in (7, 10, 11, 21) or e < 2**31 else e - 2**32 for e in map(int, expected(x.tolist()))]
    assert [o & (2**33 - 1) for o in out.tolist()] == [s & (2**33 - 1) for s in signed]


@pytest.mark.parametrize("threads", [32, 100, 1024])
def test_atomics_lose_nothing(emulated, threads):
    out = torch.zeros(3, dtype=torch.int64)
    emulated.test.atomic_sum(out, threads)
    assert out.tolist() == [sum(t * t for t in range(threads))] * 3


@pytest.mark.parametrize("x, y", [(32, 1), (7, 5), (64, 16)])
def test_every_thread_of_a_grid_runs_once_and_knows_its_place(emulated, x, y):
    out = torch.full((x * y * 6 * 4,), -1)
    emulated.test.index(out, x, y)
    assert out.tolist() == list(range(len(out)))


@pytest.mark.parametrize("seed", range(4))
def test_named_barrier_orders_warps(emulated, seed):
    emulated.set_seed(seed)
    x = torch.randint(0, 1000, (128,))
    out = torch.zeros(32, dtype=torch.int64)
    emulated.test.produce_and_consume(out, x)
    assert torch.equal(out, x.view(4, 32).amax(0))
