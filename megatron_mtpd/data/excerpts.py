"""Excerpts of tokenized documents, drawn at random: for what needs some text, and no epochs of it.

Deliberately absent: training's data, which Megatron's own datasets give (see `datasets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


def parse_blend(words: Sequence[str]) -> list[tuple[float, Path]]:
    """Weight and prefix of each dataset of `--data-path`: prefixes alone, or each behind its weight.

    >>> parse_blend(["a"]), parse_blend(["3", "a", "1", "b"])
    ([(1.0, PosixPath('a'))], [(3.0, PosixPath('a')), (1.0, PosixPath('b'))])

    Raises ValueError for a weight that is no positive number, and for a prefix without files.
    """
    weights: Sequence[str | float] = [1.0] * len(words)
    if len(words) > 1 and _is_number(words[0]):
        weights, words = words[::2], words[1::2]
    blend = []
    for weight, prefix in zip(weights, words, strict=False):
        if not _is_number(weight) or float(weight) <= 0 or len(weights) != len(words):
            raise ValueError(f"--data-path: {weight} is no weight; give prefixes alone, or a weight before each.")
        for path in (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin")):
            if not path.exists() or not path.stat().st_size:
                raise ValueError(f"--data-path: {path} does not exist or is empty; give what preprocess_data.py wrote.")
        blend.append((float(weight), Path(prefix)))
    return blend


def _is_number(word: str | float) -> bool:
    try:
        return float(word) == float(word)
    except ValueError:
        return False


def draw(blend: Sequence[tuple[float, Path]], tokens: int, longest: int, seed: int | Sequence[int]) -> list[list[int]]:
    """Excerpts of at most `longest` tokens until there are `tokens` of them, in the blend's proportions of tokens.

    An excerpt lies within one document, drawn by its length. The same seed draws the same.
    """
    random, found = np.random.default_rng(seed), []
    total = sum(weight for weight, _ in blend)
    for weight, prefix in blend:
        left = round(tokens * weight / total)
        for excerpt in _excerpts(prefix, longest, random):
            if left <= 0:
                break
            found.append(excerpt[:left])
            left -= len(excerpt)
    return [found[i] for i in random.permutation(len(found))]  # so that each part of them has of each dataset


def _excerpts(prefix: Path, longest: int, random: np.random.Generator) -> Iterator[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    lengths = dataset.sequence_lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    while True:
        at = random.integers(ends[-1])
        document = int(np.searchsorted(ends, at, side="right"))
        length = int(lengths[document])
        first = int(random.integers(max(length - longest, 0) + 1))
        yield dataset.get(document, first, min(longest, length)).tolist()
