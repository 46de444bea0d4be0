import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import record, report, svg, text
from tests.bench.toy import toy_result, toy_run

VOID = {"meta", "rect", "line", "polyline", "circle"}


class Balance(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def test_page_loads_nothing() -> None:
    page = report.page(toy_run())
    assert not re.search(r"http|url\(|src=|href=|@import|<script", page, re.IGNORECASE)


def test_page_has_charts_and_tables_that_are_well_formed() -> None:
    seen = parse(report.page(toy_run())).seen
    assert seen.count("svg") == 2  # the bars, and the one family with two sizes
    assert {"rect", "polyline", "circle", "table"} <= set(seen)
    assert seen.count("polyline") == 3  # ours, eager, the copy; compile was skipped


def test_page_says_what_it_was_taken_on() -> None:
    page = report.page(toy_run())
    for expected in (
        "0123456789ab",
        "torch 2.13.0",
        "A &amp; B &lt;cpu&gt;",
        "10.0 GB/s at the start",
        "no compiler",
    ):
        assert expected in page
    assert "<cpu>" not in page and "<1M>" not in page
    assert "prefers-color-scheme: dark" in page


def test_page_of_a_gpu_names_it() -> None:
    gpu = {"name": "GPU Z", "multiprocessors": 132, "clocks": "1980 MHz"}
    run = toy_run(device="cuda", machine=toy_run().machine | {"gpu": gpu})
    assert "rfkernels on GPU Z" in report.page(run) and "132 SMs" in report.page(run)
    assert text.markdown(run).startswith("# GPU Z\n")


def test_page_of_an_empty_run_is_well_formed() -> None:
    empty = toy_run(cases=(), overhead={}, emoji={}, skipped={})
    assert "svg" not in parse(report.page(empty)).seen


def test_bars_are_as_long_as_their_values() -> None:
    chart = report.roof_chart([toy_result()])
    widths = [float(w) for w in re.findall(r'<rect class="\w+" [^>]*width="([\d.]+)"', chart)]
    ours, eager = widths  # compile has no bar
    assert ours / eager == pytest.approx(3, rel=1e-3)
    assert ">90%<" in chart and ">30%<" in chart


def test_log_log_places_decades_evenly() -> None:
    chart = svg.log_log([svg.Line("ours", ((10.0, 1.0), (100.0, 10.0), (1000.0, 100.0)))], "t", "x", "y")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', chart)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2  # up is slower


def test_log_log_refuses_what_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="positive coordinates"):
        svg.log_log([svg.Line("ours", ((0.0, 1.0),))], "t", "x", "y")


def test_report_command_writes_html_and_markdown(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    record.save(toy_run(), source)
    assert command.main(["report", str(source)]) == 0
    assert (tmp_path / "run.html").read_text() == report.page(toy_run())
    assert command.main(["report", str(source), "-o", str(tmp_path / "run.md")]) == 0
    lines = (tmp_path / "run.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| affine_step f32[4, 262144]")]
    assert len(table) == 1 and "| 1000.0 | 12.6 | 90% | 3.00x | - | 4.00x | - |" in table[0]


def test_an_unwritable_report_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "run.json"
    record.save(toy_run(), source)
    assert command.main(["report", str(source), "-o", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
