"""The file of a run: figures, and the machine, versions and commit that they hold for."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.stats import Stats

SCHEMA = "rfkernels-bench/1"


@dataclass(frozen=True)
class CaseResult:
    """The sides of one case with one state of the cache. Rates count minimal passes (`bytes_moved`)."""

    room: str
    op: str
    label: str
    shape: tuple[int, ...]
    dtypes: str
    cache: str  # "cold" or "warm"
    bytes_moved: int
    sides: dict[str, Stats]  # ours|eager|compile . out|new, copy.torch, copy.other
    skipped: dict[str, str]  # side -> why it was not timed; "*" for the whole case
    operations: int = 0  # of a product; then its roof is arithmetic

    @property
    def name(self) -> str:
        """What compare.py finds the case by."""
        return f"{self.op} {self.dtypes}{list(self.shape)} {self.cache}"

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    def rate(self, side: str) -> float | None:
        """Bytes per second of a side, None if it was not timed."""
        return self.bytes_moved / self.sides[side].median if side in self.sides else None

    @property
    def copy_rate(self) -> float | None:
        """Bytes per second of the faster copy of as many bytes, timed in the same rounds: the roof."""
        return max(filter(None, (self.rate("copy.torch"), self.rate("copy.other"))), default=None)

    def roof(self, side: str) -> float | None:
        """The side's fraction of the roof: a copy, or of a product the arithmetic alone."""
        if self.operations:
            peak = self.sides.get("roof.product")
            return peak.median / self.sides[side].median if peak and side in self.sides else None
        rate, copy = self.rate(side), self.copy_rate
        return rate / copy if rate and copy else None

    def speedup(self, peer: str) -> float | None:
        """How many times faster ours is than the peer ("eager.out" ...), allocating as the peer does."""
        ours = "ours.new" if peer.startswith("peer.") else f"ours.{peer.split('.')[1]}"
        if peer not in self.sides or ours not in self.sides:
            return None
        return self.sides[peer].median / self.sides[ours].median

    def to_json(self) -> dict[str, Any]:
        derived = {"name": self.name, "copy_bytes_per_s": self.copy_rate}
        sides = {
            name: asdict(stats) | {"bytes_per_s": self.rate(name), "roof": self.roof(name)}
            for name, stats in self.sides.items()
        }
        return derived | asdict(self) | {"sides": sides}


@dataclass(frozen=True)
class Run:
    """All that one `python -m bench` measured. Times are in seconds unless a name says otherwise."""

    device: str
    date: str
    command: str
    commit: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, Any]
    threads: int
    plan: dict[str, Any]
    copy_start: dict[str, Stats] = field(default_factory=dict)
    copy_end: dict[str, Stats] = field(default_factory=dict)
    copy_bytes: int = 0
    cases: tuple[CaseResult, ...] = ()
    overhead: dict[str, Stats] = field(default_factory=dict)
    emoji: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # room or case -> why

    def copy_rate(self, when: str) -> float | None:
        """The faster large copy at "start" or "end", bytes per second."""
        stats = self.copy_start if when == "start" else self.copy_end
        return self.copy_bytes / min(s.median for s in stats.values()) if stats else None

    @property
    def drift(self) -> float | None:
        """The noise floor: how much the large copy changed during the run, or its spread if that is more."""
        start, end = self.copy_rate("start"), self.copy_rate("end")
        if start is None or end is None:
            return None
        spreads = [min(s.values(), key=lambda x: x.median).spread for s in (self.copy_start, self.copy_end)]
        return max(abs(end / start - 1), *spreads)


def save(run: Run, path: str | Path) -> None:
    """Writes the run as JSON."""
    Path(path).write_text(json.dumps(to_json(run), indent=1) + "\n")


def to_json(run: Run) -> dict[str, Any]:
    """The run as JSON values; derived figures are written beside what they come from."""
    derived = {
        "copy_bytes_per_s": {"start": run.copy_rate("start"), "end": run.copy_rate("end")},
        "noise_floor": run.drift,
    }
    return {"schema": SCHEMA} | asdict(run) | derived | {"cases": [case.to_json() for case in run.cases]}


def load(path: str | Path) -> Run:
    """The run of a file that `save` wrote. Raises ValueError in one line for any other file."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); name a file of `python -m bench --json`"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, got {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: must be a file of `python -m bench --json` ({SCHEMA}), got schema {got!r}")
    try:
        return from_json(data)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: a field is missing or of another kind ({error}); take the figures again"
        ) from None


def from_json(data: dict[str, Any]) -> Run:
    """The inverse of `to_json`; what is derived is computed again."""
    fields = {name: data[name] for name in Run.__dataclass_fields__}
    cases = tuple(_case(c) for c in data["cases"])
    stats = {name: _stats(data[name]) for name in ("copy_start", "copy_end", "overhead")}
    return Run(**fields | stats | {"cases": cases})


def _case(data: dict[str, Any]) -> CaseResult:
    fields = {name: data[name] for name in CaseResult.__dataclass_fields__ if name != "operations"}
    fields["operations"] = data.get("operations", 0)  # files from before there were products
    return CaseResult(**fields | {"shape": tuple(data["shape"]), "sides": _stats(data["sides"])})


def _stats(data: dict[str, Any]) -> dict[str, Stats]:
    return {side: Stats(**{name: s[name] for name in Stats.__dataclass_fields__}) for side, s in data.items()}
