"""Documents packed into rows of equal length, each document with positions of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from weights.sample.documents import Document

BATCH_TOKENS = 1024
SHORT_ROW = 256
LONG_ROW = 512
"""Row lengths in tokens: attention costs the square of it, so that only long documents take the long one."""

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Sample:
    """A document in tokens, BOS and EOS included; a label is the token itself, or IGNORED where it is not learned."""

    tokens: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows of packed samples, three int64 tensors [rows, row length]; positions start anew with each sample."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def encode(document: Document, tokenizer: Tokenizer) -> Sample:
    """Return `document` in tokens; its first label is ignored, for a token is predicted from those before it."""
    bos, eos = 0, 1
    tokens, labels = [bos], [IGNORED]
    for span in document:
        piece = tokenizer.encode(span.text, add_special_tokens=False).ids
        tokens += piece
        labels += piece if span.learned else [IGNORED] * len(piece)
    return Sample([*tokens, eos], [*labels, eos])


def batches(samples: Sequence[Sample], rng: np.random.Generator) -> list[Batch]:
    """Pack `samples` into batches of at most BATCH_TOKENS tokens, in random order.

    Raises:
        ValueError: a sample is longer than LONG_ROW.
    """
    short = [sample for sample in samples if len(sample.tokens) <= SHORT_ROW]
    long = [sample for sample in samples if len(sample.tokens) > SHORT_ROW]
    result = _batches_of(long, LONG_ROW) + _batches_of(short, SHORT_ROW)
    return [result[i] for i in rng.permutation(len(result))]


def _batches_of(samples: Sequence[Sample], length: int) -> list[Batch]:
    rows = [_row(group, length) for group in _groups(samples, length)]
    size = BATCH_TOKENS // length
    return [
        Batch(*(torch.tensor(column) for column in zip(*rows[start : start + size], strict=True)))
        for start in range(0, len(rows), size)
    ]


def _groups(samples: Sequence[Sample], length: int) -> list[list[Sample]]:
    # First fit: rows fill up to a few tokens, and the order of the samples stays random.
    groups: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        size = len(sample.tokens)
        if size > length:
            raise ValueError(f"A document has {size} tokens, more than a row of {length}: shorten it.")
        place = next((i for i, free in enumerate(room) if free >= size), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(length)
        groups[place].append(sample)
        room[place] -= size
    return groups


def _row(group: Sequence[Sample], length: int) -> tuple[list[int], list[int], list[int]]:
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for sample in group:
        tokens += sample.tokens
        labels += sample.labels
        positions += range(len(sample.tokens))
    padding = length - len(tokens)
    return tokens + [0] * padding, labels + [IGNORED] * padding, positions + list(range(padding))
