"""Prompts as hashed words and character trigrams: a text encoder without a vocabulary file."""

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MAX_WORDS", "TextEncoder", "TextTokens", "tokenize", "word_key", "word_rows", "words"]

MAX_WORDS = 16
PIECES = 8  # the word itself and up to 7 trigrams
WORD_WEIGHT = 3.0


@dataclass(frozen=True)
class TextTokens:
    """Tokenized prompts.

    rows: int64[batch, words, 8], rows of the embedding table; weights: [batch, words, 8], zero where a slot
    is unused, otherwise each word's weights sum to 1; mask: bool[batch, words], true where there is a word.
    unknown: for each prompt the words that training never showed; truncated: for each prompt the words beyond
    the limit, not used.
    """

    rows: Tensor
    weights: Tensor
    mask: Tensor
    unknown: list[list[str]]
    truncated: list[list[str]]

    def __len__(self) -> int:
        return len(self.mask)


def words(prompt: str) -> list[str]:
    r"""The lower-case words of a prompt: runs of Unicode letters and digits (`\w+`)."""
    return re.findall(r"\w+", prompt.lower())


def word_key(word: str) -> int:
    """The crc32 of a word as a signed 32-bit number: how a weights file remembers its words."""
    key = zlib.crc32(word.encode())
    return key - (1 << 32) if key >= 1 << 31 else key


@lru_cache(maxsize=65536)
def word_rows(word: str, table: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Table rows and weights of a word: its crc32 (weight 3) and up to 7 trigrams of `<word>` (weight 1)."""
    padded = f"<{word}>"
    trigrams = [padded[i : i + 3] for i in range(len(padded) - 2)][: PIECES - 1]
    rows = [zlib.crc32(word.encode()) % table] + [zlib.crc32(f"#{t}".encode()) % table for t in trigrams]
    total = WORD_WEIGHT + len(trigrams)
    weights = [WORD_WEIGHT / total] + [1 / total] * len(trigrams)
    unused = PIECES - len(rows)
    return tuple(rows + [0] * unused), tuple(weights + [0.0] * unused)


def tokenize(
    prompts: list[str], table: int, *, length: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays (rows, weights, mask) of TextTokens, cut to 16 words, padded to `length` or the longest."""
    split = [words(p)[: length or MAX_WORDS] for p in prompts]
    length = length or max(1, *map(len, split)) if split else 1
    rows = np.zeros((len(split), length, PIECES), dtype=np.int64)
    weights = np.zeros((len(split), length, PIECES), dtype=np.float32)
    mask = np.zeros((len(split), length), dtype=bool)
    for b, sentence in enumerate(split):
        for t, word in enumerate(sentence):
            rows[b, t], weights[b, t] = word_rows(word, table)
            mask[b, t] = True
    return rows, weights, mask


class TextEncoder(nn.Module):
    """Hashed embeddings, each joined with its two neighbours and its place, to [batch, words, width].

    Neighbours and places carry word order ("blue background" against "blue heart", "a cat left of a dog");
    attention later treats words as a set.
    """

    def __init__(self, table: int, embed: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(table, embed))
        self.join = nn.Linear(3 * embed, width)
        self.position = nn.Parameter(torch.zeros(MAX_WORDS, width))
        self.out = nn.Linear(width, width)

    def forward(self, rows: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Word features [batch, words, width] and their mean over words [batch, width] (0 for no word)."""
        dtype = self.join.bias.dtype  # the weight may be quantised
        e = (self.table[rows] * weights[..., None].to(self.table.dtype)).sum(-2).to(dtype)
        before, after = F.pad(e, (0, 0, 1, 0))[:, :-1], F.pad(e, (0, 0, 0, 1))[:, 1:]
        place = self.position[: e.shape[1]].to(dtype)
        h = self.out(F.silu(self.join(torch.cat([before, e, after], -1)) + place))
        keep = mask[..., None].to(h.dtype)
        h = h * keep
        return h, h.sum(1) / keep.sum(1).clamp(min=1)
