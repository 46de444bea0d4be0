"""Two charts as inline SVG: horizontal bars, and lines on logarithmic axes. Colours come from the page."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bars:
    """One group of bars: a label and (series, value) pairs; None leaves the bar out."""

    label: str
    values: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Line:
    """One line of points (x, y), both positive."""

    series: str
    points: tuple[tuple[float, float], ...]


def bars(groups: Sequence[Bars], title: str, *, mark: float = 1.0) -> str:
    """Groups of horizontal bars from 0 to a little over the largest value, in percent; a line at `mark`."""
    left, right, bar, gap, width = 400, 60, 11, 10, 1000
    top = max([mark, *(v for g in groups for _, v in g.values if v is not None)]) * 1.02
    scale = (width - left - right) / top
    y, parts = 24, []
    for group in groups:
        drawn = [(series, value) for series, value in group.values if value is not None]
        middle = y + bar * len(drawn) / 2 + 4
        parts.append(text(left - 8, middle, group.label, "end"))
        for series, value in drawn:
            tip = f"<title>{html.escape(f'{group.label}, {series}: {value:.0%}')}</title>"
            parts.append(
                f'<rect class="{series}" x="{left}" y="{y}" width="{value * scale:.1f}" height="{bar - 1}">'
                f"{tip}</rect>"
            )
            parts.append(text(left + value * scale + 4, y + 8, f"{value:.0%}", "start", "small"))
            y += bar
        y += gap
    x = left + mark * scale
    axis = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{y}"/>' + text(
        x, 12, f"{mark:.0%}", "middle", "small"
    )
    return frame(width, y + 4, title, axis + "".join(parts))


def log_log(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> str:
    """Lines through their points on logarithmic axes, with a grid at the powers of ten."""
    width, height, left, bottom, top, right = 480, 320, 62, 42, 14, 16
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs or min(xs + ys) <= 0:
        raise ValueError(f"log_log: {title} needs points with positive coordinates, got {len(xs)} points")
    (x0, x1), (y0, y1) = decades(xs), decades(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x0) / (x1 - x0) * (width - left - right)
        up = (math.log10(y) - y0) / (y1 - y0) * (height - top - bottom)
        return left + across, height - bottom - up

    parts = []
    for power in range(x0, x1 + 1):
        x, _ = place(10.0**power, 10.0**y0)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(text(x, height - bottom + 15, short(10.0**power), "middle", "small"))
    for power in range(y0, y1 + 1):
        _, y = place(10.0**x0, 10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left - 6, y + 4, short(10.0**power), "end", "small"))
    for line in lines:
        points = [place(x, y) for x, y in sorted(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{line.series}" points="{path}"/>')
        for (x, y), (value_x, value_y) in zip(points, sorted(line.points), strict=True):
            tip = f"<title>{html.escape(f'{line.series}: {short(value_x)}, {value_y:.4g}')}</title>"
            parts.append(f'<circle class="{line.series}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
    parts.append(text((left + width - right) / 2, height - 6, x_label, "middle", "small"))
    turned = f'transform="rotate(-90 14 {height / 2:.0f})"'
    parts.append(text(14, height / 2, y_label, "middle", "small", turned))
    return frame(width, height, title, "".join(parts))


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around the values, at least one decade."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def short(value: float) -> str:
    """A number on an axis: 10, 1k, 10M; below 1 as it is."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def text(x: float, y: float, content: str, anchor: str, kind: str = "", extra: str = "") -> str:
    """One line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}" {extra}>{html.escape(content)}</text>'


def frame(width: int, height: float, title: str, body: str) -> str:
    """The picture with its name for readers that do not see it."""
    name = html.escape(title)
    box = f'viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{name}"'
    return f"<svg {box}><title>{name}</title>{body}</svg>"
