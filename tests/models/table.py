"""The table of docs/models.md: how far our models are from diffusers' float32, and diffusers' own 16 bits.

python -m tests.models.table
"""

from collections.abc import Iterator

import torch

from tests.models.parity import Case, cast, error, models

__all__ = ["HEAD", "measured", "row", "rows"]

HEAD = ("model and input", "float32", "bfloat16", "diffusers in bfloat16")


@torch.no_grad()
def measured(case: Case) -> tuple[float, ...]:
    """Relative errors against diffusers in float32: ours, ours in bfloat16, diffusers' in bfloat16.

    Of a discrete case the first alone.
    """
    theirs, ours = models(case)
    inputs = case.inputs()
    exact = case.reference(theirs, inputs)
    wide = error(ours(**inputs), exact)
    if case.discrete:
        return (wide,)
    theirs, ours = models(case, torch.bfloat16)
    inputs = cast(inputs, torch.bfloat16)
    return wide, error(ours(**inputs), exact), error(case.reference(theirs, inputs), exact)


def row(case: Case) -> str:
    errors = [f"{e:.1e}" for e in measured(case)]
    return f"| {case} | {' | '.join(errors + ['-'] * (3 - len(errors)))} |"


def rows() -> Iterator[str]:
    from tests.models.test_parity import CASES

    yield f"| {' | '.join(HEAD)} |"
    yield "| --- | ---: | ---: | ---: |"
    yield from map(row, CASES)


if __name__ == "__main__":
    print("\n".join(rows()))
