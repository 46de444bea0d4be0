"""Boards that a plan may be made for: dense peaks, memory, and the way to the host's memory."""

from dataclasses import dataclass

__all__ = ["BOARDS", "Board", "board"]

GIB = 1 << 30


@dataclass(frozen=True)
class Board:
    """One GPU. Rates are those of its maker, without sparsity, at the boost clock.

    Attributes:
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        link: to the host's memory and one way, bytes a second; 0 where the memory is one and the same.
        peaks: operations a second, by "bf16" (and float16, with float32 sums), "int8", "fp8" (with float32
            sums); a type that is absent has no matrix instructions.
        source: of the figures.
    """

    name: str
    memory: int
    bandwidth: float
    link: float
    peaks: dict[str, float]
    source: str

    @property
    def unified(self) -> bool:
        return self.link == 0

    def peak(self, kind: str) -> float:
        """Of a type, or of bf16 where the board has none for it."""
        return self.peaks.get(kind, self.peaks["bf16"])


_PCIE4, _PCIE5 = 16e9 / 8 * 128 / 130, 32e9 / 8 * 128 / 130  # bytes a second of a lane, one way


def _make(name, gib, gb_s, link, bf16, int8, fp8, source) -> Board:
    peaks = {"bf16": bf16 * 1e12, "int8": int8 * 1e12} | ({"fp8": fp8 * 1e12} if fp8 else {})
    return Board(name, int(gib * GIB), gb_s * 1e9, link, peaks, source)


def _orin(name, gib, gb_s, sms, ghz, source) -> Board:
    """An SM of Orin does 2048 bf16 and 4096 int8 operations a clock (170 sparse TOPS = 16 SMs, 1.3 GHz)."""
    return _make(name, gib, gb_s, 0, sms * ghz * 2.048, sms * ghz * 4.096, None, source)


_JETSON = "Jetson Orin data sheets; SMs x clock x 2048 (bf16) or 4096 (int8)"
BOARDS = {
    b.name: b
    for b in (
        _orin("orin-nano", 8, 68, 8, 0.625, _JETSON),
        _orin("orin-nano-super", 8, 102, 8, 1.02, _JETSON),
        _orin("orin-nx", 16, 102.4, 8, 0.918, _JETSON),
        _orin("agx-orin-32", 32, 204.8, 14, 0.93, _JETSON),
        _orin("agx-orin", 64, 204.8, 16, 1.3, _JETSON),
        _make("rtx3060", 12, 360, 16 * _PCIE4, 25.5, 101.9, None, "28 SMs x 1.777 GHz x 512, 2048 (GA10x)"),
        _make("rtx3090", 24, 936, 16 * _PCIE4, 71, 284, None, "GA102 white paper"),
        _make("rtx4060", 8, 272, 8 * _PCIE4, 30.2, 120.9, 60.5, "24 SMs x 2.46 GHz x 512, 2048, 1024 (Ada)"),
        _make("rtx4090", 24, 1008, 16 * _PCIE4, 165.2, 660.6, 330.3, "Ada white paper"),
        _make("l4", 24, 300, 16 * _PCIE4, 121, 242.5, 242.5, "L4 data sheet"),
        _make("a100", 80, 2039, 16 * _PCIE4, 312, 624, None, "A100 data sheet, SXM 80 GB"),
        _make("h100", 80, 3350, 16 * _PCIE5, 989, 1979, 1979, "H100 data sheet, SXM"),
        _make("h200", 141e9 / GIB, 4800, 16 * _PCIE5, 989, 1979, 1979, "H200 data sheet, SXM"),
    )
}


def board(name: str) -> Board:
    """The board of that name.

    Raises:
        ValueError: there is none.
    """
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in BOARDS:
        raise ValueError(f"plan: the board must be one of {', '.join(BOARDS)}, got {name!r}")
    return BOARDS[key]
