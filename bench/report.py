"""A run as one page, `python -m bench report FILE.json -o report.html`, that loads nothing from anywhere."""

import argparse
import html
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench import record, svg, text
from bench.record import CaseResult, Run

SIDES = ("ours", "eager", "compile")
NAMES = {
    "ours": "rfkernels",
    "eager": "torch, eager",
    "compile": "torch.compile",
    "copy": "copy of as many bytes",
}


def style() -> str:
    """report.css and the colours of the sides in the charts."""
    rules = Path(__file__).with_name("report.css").read_text()
    for side in NAMES:
        colour = f"var(--{side})"
        rules += f"rect.{side}, circle.{side} {{ fill: {colour}; }} polyline.{side} {{ stroke: {colour}; }} "
        rules += f".key i.{side} {{ background: {colour}; }}\n"
    return rules


def page(run: Run) -> str:
    """The whole page."""
    gpu = run.machine["gpu"]
    title = f"rfkernels on {gpu['name'] if gpu else run.machine['cpu']}"
    cases = [c for c in run.cases if "*" not in c.skipped]
    parts = [f"<h1>{html.escape(title)}</h1>", _facts(run)]
    if cases:
        parts += [
            "<h2>Fraction of the machine's copy</h2>",
            f"<p>{html.escape(text.LEGEND)}</p>",
            _key(SIDES),
        ]
        parts += [roof_chart(cases), "<h2>Time by size</h2>", _key(NAMES), size_charts(cases)]
        rows = [text.cells(c) for c in cases]
        parts += ["<h2>Cases</h2>", _table(text.COLUMNS, rows)]
    if run.overhead:
        rows = [
            (n, *(f"{v * 1e6:.2f}" for v in (s.median, s.p20, s.p80, s.min))) for n, s in run.overhead.items()
        ]
        parts += ["<h2>Cost of a call, us</h2>", _table(("call", "median", "p20", "p80", "min"), rows)]
    if run.emoji:
        parts += ["<h2>The embedded model</h2>", _table(("what", "value"), text.emoji_rows(run.emoji))]
    if skipped := text.skipped_rows(run):
        items = "".join(f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in skipped)
        parts += ["<h2>Left out</h2>", f"<ul>{items}</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(title)}</title><style>{style()}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def roof_chart(cases: Sequence[CaseResult]) -> str:
    """A bar per side and case: its rate over the rate of the copy timed beside it, same way to allocate."""
    groups = []
    for case in cases:
        ending = text.main_side(case).split(".")[1]
        label = f"{text.title(case)}" + (", warm" if case.cache == "warm" else "")
        groups.append(svg.Bars(label, tuple((side, case.roof(f"{side}.{ending}")) for side in SIDES)))
    return svg.bars(groups, "Fraction of the machine's copy")


def size_charts(cases: Sequence[CaseResult]) -> str:
    """Median time over elements, a chart per op and dtypes timed at two sizes or more (cold cache)."""
    families: dict[str, list[CaseResult]] = defaultdict(list)
    for case in cases:
        if case.cache == "cold":
            families[f"{case.op} {case.dtypes}"].append(case)
    charts = []
    for name, members in families.items():
        if len({case.numel for case in members}) < 2:
            continue
        chart = svg.log_log(_lines(members), name, "elements", "us")
        charts.append(f"<figure>{chart}<figcaption>{html.escape(name)}</figcaption></figure>")
    return f'<div class="charts">{"".join(charts)}</div>' if charts else "<p>One size only.</p>"


def _lines(cases: Sequence[CaseResult]) -> list[svg.Line]:
    ending = text.main_side(cases[0]).split(".")[1]
    points: dict[str, list[tuple[float, float]]] = {side: [] for side in NAMES}
    for case in cases:
        for side in SIDES:
            if stats := case.sides.get(f"{side}.{ending}"):
                points[side].append((case.numel, stats.median * 1e6))
        if case.copy_rate:
            points["copy"].append((case.numel, case.bytes_moved / case.copy_rate * 1e6))
    return [svg.Line(side, tuple(p)) for side, p in points.items() if p]


def _facts(run: Run) -> str:
    """Where, when and with what the figures were taken."""
    m, built = run.machine, run.versions["rfkernels"] or {}
    rates = ", ".join(
        f"{run.copy_rate(w) / 1e9:.1f} GB/s at the {w}" for w in ("start", "end") if run.copy_rate(w)
    )
    facts = {
        "device": run.device,
        "CPU": f"{m['cpu']}, {m['cores']} cores, {run.threads} threads, {m['memory_bytes'] / 2**30:.0f} GiB",
        "GPU": m["gpu"]
        and f"{m['gpu']['name']}, {m['gpu']['multiprocessors']} SMs, {m['gpu']['clocks'] or ''}",
        "commit": text.commit(run),
        "date": run.date,
        "versions": ", ".join(f"{name} {run.versions[name]}" for name in ("torch", "python", "cuda")),
        "kernels": ", ".join(
            f"{k} {built[k]}" for k in ("version", "compiler", "cuda", "cpu_isa") if built.get(k)
        ),
        "copy": f"{rates} ({run.copy_bytes >> 20} MiB); noise floor {text.percent(run.drift)}",
        "command": run.command,
    }
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items() if v)
    return f"<dl>{''.join(rows)}</dl>"


def _key(sides: Sequence[str]) -> str:
    items = (f'<span><i class="{side}"></i>{html.escape(NAMES[side])}</span>' for side in sides)
    return f'<p class="key">{"".join(items)}</p>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def main(argv: list[str]) -> int:
    """Writes the page, or Markdown text for a name that ends in .md."""
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__)
    parser.add_argument("file", metavar="FILE.json")
    parser.add_argument("-o", "--output", metavar="report.html", help="default: FILE.html")
    args = parser.parse_args(argv)
    run = record.load(args.file)
    target = Path(args.output or Path(args.file).with_suffix(".html"))
    try:
        target.write_text(text.markdown(run) if target.suffix == ".md" else page(run))
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror}); choose another -o") from None
    print(f"report: {target}")
    return 0
