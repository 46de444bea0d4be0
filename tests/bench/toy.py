"""A case of two additions that needs no compiled kernel, and a run made of it."""

from dataclasses import replace

import torch
from torch import Tensor

from bench.cases import Case
from bench.record import CaseResult, Run
from bench.stats import Stats


def add_out(out: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, out=out)


def toy_case(**changes: object) -> Case:
    case = Case(
        room="toy",
        op="add",
        label="toy",
        shape=(4, 50),
        dtypes="f32",
        bytes_moved=3 * 4 * 200,
        inputs=lambda: (torch.full((4, 50), 2.0), torch.full((4, 50), 3.0)),
        ours=add_out,
        formula=lambda x, y: x + y,
        formula_out=lambda out, x, y: torch.add(x, y, out=out),
    )
    return replace(case, **changes)


def stats(median: float, spread: float = 0.02) -> Stats:
    return Stats(median, median * (1 - spread / 2), median * (1 + spread / 2), median * (1 - spread), 20)


def toy_result(seconds: float = 1e-3, shape: tuple[int, ...] = (4, 1 << 18), **changes: object) -> CaseResult:
    numel = shape[0] * shape[1]
    result = CaseResult(
        room="solver",
        op="affine_step",
        label="<1M>",
        shape=shape,
        dtypes="f32",
        cache="cold",
        bytes_moved=12 * numel,
        sides={
            "ours.out": stats(seconds),
            "ours.new": stats(2 * seconds),
            "eager.out": stats(3 * seconds),
            "eager.new": stats(8 * seconds),
            "copy.torch": stats(1.5 * seconds),
            "copy.other": stats(0.9 * seconds),
        },
        skipped={"compile.out": "RuntimeError: no compiler", "compile.new": "RuntimeError: no compiler"},
    )
    return replace(result, **changes)


def toy_run(**changes: object) -> Run:
    machine = {"cpu": "A & B <cpu>", "cores": 2, "memory_bytes": 8 << 30, "gpu": None}
    run = Run(
        device="cpu",
        date="2026-01-01T00:00:00+00:00",
        command="python -m bench solver",
        commit={"id": "0123456789abcdef", "dirty": False},
        machine=machine,
        versions={"python": "3.11", "torch": "2.13.0", "cuda": None, "rfkernels": {"version": "0.1.0"}},
        threads=2,
        plan={"quick": True},
        copy_start={"copy.torch": stats(0.011), "copy.other": stats(0.010)},
        copy_end={"copy.torch": stats(0.012), "copy.other": stats(0.0125)},
        copy_bytes=100_000_000,
        cases=(toy_result(), toy_result(4e-3, (4, 1 << 20))),
        overhead={"_C.taylor_step, 4 tensors": stats(1e-6), "torch.add(out=)": stats(7e-7)},
        emoji={"load_s": {"median": 0.25, "min": 0.2, "samples": 3}, "16_emoji_peak_bytes": 500 << 20},
        skipped={"noise": "left out by hand"},
    )
    return replace(run, **changes)
