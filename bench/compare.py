"""Two runs side by side: `python -m bench compare OLD NEW [--fail-above 5%]`.

A case is slower when its median grew by more than the limit and the spreads do not meet (20 % of the new
samples or fewer lie below 80 % of the old), so that noise alone does not fail a comparison.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from bench import record, text
from bench.record import Run
from bench.stats import Stats

OURS = ("ours.out", "ours.new")


@dataclass(frozen=True)
class Change:
    """One figure in both runs."""

    name: str
    old: Stats
    new: Stats

    @property
    def ratio(self) -> float:
        """New time over old time: above 1 is slower."""
        return self.new.median / self.old.median

    @property
    def within_noise(self) -> bool:
        """The middle 60 % of the samples of the two runs overlap."""
        return self.new.p20 <= self.old.p80 and self.old.p20 <= self.new.p80

    def slower(self, limit: float) -> bool:
        """Slower by more than `limit` (0.05 is 5 %), and not by noise."""
        return self.ratio > 1 + limit and not self.within_noise


def figures(run: Run) -> Iterator[tuple[str, Stats]]:
    """What a comparison looks at: our sides of every case, and our calls."""
    for case in run.cases:
        for side in OURS:
            if side in case.sides:
                yield f"{case.name}, {side}", case.sides[side]
    for name, stats in run.overhead.items():
        if not name.startswith("torch.add") and " in torch" not in name:
            yield f"call {name}", stats


def compare(old: Run, new: Run) -> tuple[list[Change], list[str]]:
    """The changes, the worst first, and the names that only the old run has."""
    before, after = dict(figures(old)), dict(figures(new))
    changes = [Change(name, before[name], after[name]) for name in before if name in after]
    return sorted(changes, key=lambda c: -c.ratio), [name for name in before if name not in after]


def warnings(old: Run, new: Run) -> list[str]:
    """Why the two runs may not be comparable."""
    found = []
    for what, a, b in (
        ("device", old.device, new.device),
        ("CPU", old.machine["cpu"], new.machine["cpu"]),
        ("GPU", (old.machine["gpu"] or {}).get("name"), (new.machine["gpu"] or {}).get("name")),
        ("threads", old.threads, new.threads),
        ("torch", old.versions["torch"], new.versions["torch"]),
        ("quick", old.plan.get("quick"), new.plan.get("quick")),
    ):
        if a != b:
            found.append(f"{what} differs: {a} and {b}")
    rates = old.copy_rate("start"), new.copy_rate("start")
    if all(rates) and abs(rates[1] / rates[0] - 1) > 0.1:
        found.append(f"the machine's own copy differs: {rates[0] / 1e9:.1f} and {rates[1] / 1e9:.1f} GB/s")
    return found


def fraction(value: str) -> float:
    """A limit as people write it: "5%" or "0.05". Raises ValueError for anything else."""
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"--fail-above must be like 5% or 0.05, got {value!r}")
    return number


def table(changes: list[Change], limit: float) -> list[str]:
    """One line a figure, old and new median in us."""
    width = max((len(c.name) for c in changes), default=4)
    lines = [f"{'figure':{width}} {'old us':>10} {'new us':>10} {'change':>8}"]
    for c in changes:
        verdict = (
            "SLOWER" if c.slower(limit) else "noise" if c.within_noise else "faster" if c.ratio < 1 else ""
        )
        old, new = c.old.median * 1e6, c.new.median * 1e6
        lines.append(f"{c.name:{width}} {old:10.2f} {new:10.2f} {c.ratio - 1:+8.1%} {verdict}".rstrip())
    return lines


def main(argv: list[str]) -> int:
    """0: nothing is slower than the limit allows; 1: something is. Without a limit always 0."""
    parser = argparse.ArgumentParser("python -m bench compare", description=__doc__)
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json")
    parser.add_argument(
        "--fail-above", metavar="5%", help="exit with 1 if a figure is slower by more than this"
    )
    args = parser.parse_args(argv)
    limit = fraction(args.fail_above) if args.fail_above else float("inf")
    old, new = record.load(args.old), record.load(args.new)
    changes, missing = compare(old, new)
    if not changes:
        raise ValueError(
            f"{args.old} and {args.new} have no figure in common; measure the same rooms in both"
        )

    print(f"old {text.commit(old)}, {old.date}; new {text.commit(new)}, {new.date}")
    for line in warnings(old, new):
        print(f"note: {line}")
    print("\n".join(table(changes, limit)))
    for name in missing:
        print(f"only in {args.old}: {name}")
    slower = [c for c in changes if c.slower(limit)]
    if slower:
        print(
            f"{len(slower)} of {len(changes)} figures are slower by more than {args.fail_above}",
            file=sys.stderr,
        )
    return 1 if slower else 0
