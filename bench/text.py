"""What a run prints, and the same figures as a Markdown file."""

from collections.abc import Sequence
from typing import Any

from bench.record import CaseResult, Run
from bench.stats import Stats

COLUMNS = ("case", "cache", "us", "GB/s", "roof", "eager", "compile", "eager*", "compile*")
WIDTHS = (58, 5, 9, 7, 6, 8, 8, 8, 8)
LEGEND = (
    "us, GB/s: our median, minimal passes; roof: fraction of a copy of as many bytes timed beside it;\n"
    "eager, compile: how many times faster ours is, all writing to a given tensor; *: all allocating it"
)

PRODUCT_LEGEND = (
    "Two operations a multiplication; roof: the same arithmetic from panels in the first cache (GB/s: a "
    "copy), timed in the same rounds; beside it: how many times faster ours is than each peer (below 1: "
    "slower), all allocating the result."
)


def head(run: Run) -> str:
    """What is measured on what."""
    gpu = run.machine["gpu"]
    device = gpu["name"] if gpu else f"{run.machine['cpu']}, {run.threads} threads"
    return f"{device}, torch {run.versions['torch']}, {commit(run)}\n{copy_line(run, 'start')}"


def foot(run: Run, seconds: float) -> str:
    """The copy at the end, the noise floor, what was left out."""
    lines = [
        LEGEND,
        copy_line(run, "end"),
        f"noise floor {run.drift:.1%} (drift or spread of the copy); {seconds:.0f} s",
    ]
    lines += [f"left out: {name}: {why}" for name, why in run.skipped.items()]
    return "\n".join(lines)


def copy_line(run: Run, when: str) -> str:
    """The large copy, in GB/s."""
    rate = run.copy_rate(when)
    return f"copy of {run.copy_bytes >> 20} MiB at the {when}: {rate / 1e9:.1f} GB/s" if rate else ""


def commit(run: Run) -> str:
    """The commit in one word or three."""
    if not run.commit["id"]:
        return "commit unknown"
    return f"commit {run.commit['id'][:12]}" + (" with changes" if run.commit["dirty"] else "")


def case_head() -> str:
    """The header of the table of cases."""
    return _line(COLUMNS)


def case_line(result: CaseResult) -> str:
    """One case as a line of the table."""
    if "*" in result.skipped:
        return _line((title(result), result.cache, f"left out: {result.skipped['*']}"))
    if is_product(result):
        return "\n    ".join(product_cells(result))
    return _line(cells(result))


PRODUCT_COLUMNS = ("case", "ours", "beside it")


def is_product(result: CaseResult) -> bool:
    """Its peers are other products, not the formula alone."""
    return result.operations > 0 or any(name.startswith("peer.") for name in result.sides)


def product_cells(result: CaseResult) -> tuple[str, str, str]:
    """A product: time, rate and fraction of the arithmetic roof; how many times faster than each peer."""
    side = main_side(result)
    seconds = result.sides[side].median
    roof = f"{percent(result.roof(side))} of the roof"
    if result.operations:
        speed = f"{result.operations / seconds / 1e9:.0f} GOP/s, {roof}"
    else:
        speed = f"{result.bytes_moved / seconds / 1e9:.1f} GB/s, {roof}"
    rate = f"{seconds * 1e6:.0f} us, {speed}"
    peers = [name for name in result.sides if name.startswith(("peer.", "eager.new", "compile.new"))]
    beside = ", ".join(f"{name.removeprefix('peer.')} {times(result.speedup(name))}" for name in peers)
    return f"{title(result)} {result.cache}", rate, beside


def title(result: CaseResult) -> str:
    """Op, types, shape and what the shape stands for."""
    return f"{result.op} {result.dtypes}{list(result.shape)} {result.label}"


def cells(result: CaseResult) -> tuple[str, ...]:
    """The figures of one case, under COLUMNS."""
    side = main_side(result)
    return (
        title(result),
        result.cache,
        f"{result.sides[side].median * 1e6:.1f}",
        f"{result.rate(side) / 1e9:.1f}",
        percent(result.roof(side)),
        *(times(result.speedup(peer)) for peer in ("eager.out", "compile.out", "eager.new", "compile.new")),
    )


def main_side(result: CaseResult) -> str:
    """The side of ours that stands for the case: with a given output where the op has that."""
    return "ours.out" if "ours.out" in result.sides else "ours.new"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def overhead(stats: dict[str, Stats]) -> str:
    """The cost of a call, in us."""
    rows = [
        (name, f"{s.median * 1e6:.2f} us", f"(p20 {s.p20 * 1e6:.2f}, p80 {s.p80 * 1e6:.2f})")
        for name, s in stats.items()
    ]
    return "\n".join(["one call on small tensors", *(f"  {a:46} {b:>10}  {c}" for a, b, c in rows)])


def emoji(figures: dict[str, Any]) -> str:
    """The embedded model end to end."""
    if "failed" in figures:
        return f"emoji: failed: {figures['failed']}"
    return "\n".join(["the embedded model", *(f"  {name:46} {value}" for name, value in emoji_rows(figures))])


def emoji_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value with its unit, for people."""
    rows = []
    for name, value in figures.items():
        if name.endswith("_s"):
            rows.append(
                (
                    name.removesuffix("_s").replace("_", " "),
                    f"{value['median']:.3f} s (best {value['min']:.3f})",
                )
            )
        elif name.endswith("_bytes"):
            rows.append((name.removesuffix("_bytes").replace("_", " "), f"{value / 2**20:.0f} MiB"))
        else:
            rows.append((name.replace("_", " "), str(value)))
    return rows


def markdown(run: Run) -> str:
    """The run as a Markdown page: the form that is committed under bench/results/."""
    gpu = run.machine["gpu"]
    parts = [
        f"# {gpu['name'] if gpu else run.machine['cpu']}",
        f"{run.date}, {commit(run)}, torch {run.versions['torch']}, {run.device}, {run.threads} CPU threads, "
        f"`{run.command}`",
        f"{copy_line(run, 'start')}. {copy_line(run, 'end')}. Noise floor {percent(run.drift)}.",
        LEGEND.replace("\n", " "),
    ]
    timed = [c for c in run.cases if "*" not in c.skipped]
    if rows := [cells(c) for c in timed if not is_product(c)]:
        parts.append(_markdown_table(COLUMNS, rows))
    if rows := [product_cells(c) for c in timed if is_product(c)]:
        parts += ["## Products", PRODUCT_LEGEND, _markdown_table(PRODUCT_COLUMNS, rows)]
    if run.overhead:
        rows = [
            (name, f"{s.median * 1e6:.2f}", f"{s.p20 * 1e6:.2f}", f"{s.p80 * 1e6:.2f}")
            for name, s in run.overhead.items()
        ]
        parts += ["## Cost of a call, us", _markdown_table(("call", "median", "p20", "p80"), rows)]
    if run.emoji:
        parts += ["## The embedded model", _markdown_table(("what", "value"), emoji_rows(run.emoji))]
    left_out = [f"- {name}: {why}" for name, why in skipped_rows(run)]
    if left_out:
        parts += ["## Left out", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def skipped_rows(run: Run) -> list[tuple[str, str]]:
    """All that was not timed, with the reason."""
    rows = list(run.skipped.items())
    for case in run.cases:
        rows += [
            (case.name if side == "*" else f"{case.name}, {side}", why) for side, why in case.skipped.items()
        ]
    return rows


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|",
    ]
    return "\n".join(
        lines
        + ["| " + " | ".join(c.replace("*", "\\*").replace("|", "\\|") for c in row) + " |" for row in rows]
    )


def _line(cells: Sequence[str]) -> str:
    pairs = zip(cells, WIDTHS, strict=False)
    return " ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(pairs)).rstrip()
