"""Packing of documents into rows of equal length; positions start again with each document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from weights.sample.architecture import VOCABULARY
from weights.sample.documents import Document
from weights.sample.tokenizer import CONTROL_TOKENS, FORMAT_TOKENS

BATCH_TOKENS = 1024
ROW_LENGTHS = (256, 512, 1024)
"""Row lengths in tokens. Attention costs their square, so a document goes into the shortest row that has room."""

NOISY_SHARE = 0.5
NOISE = 0.1
"""The share of tokens that are replaced in the input of NOISY_SHARE of the samples, while the labels stay right: so one
unknown word in a prompt does not lead the model astray."""

SPECIAL_TOKENS = len(CONTROL_TOKENS) + len(FORMAT_TOKENS)
"""The number of special tokens, whose ids come first in the vocabulary."""

IGNORED = -100
"""The label that torch's cross entropy ignores."""


@dataclass(frozen=True)
class Sample:
    """A document in tokens, BOS and EOS included; a label is the token itself, or IGNORED if it is not learned."""

    tokens: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows of packed samples, as three int64 tensors [rows, row length]; positions start again with each sample."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def encode(document: Document, tokenizer: Tokenizer) -> Sample:
    """Return `document` in tokens; its first label is IGNORED, as a token is predicted from those before it."""
    bos, eos = 0, 1
    tokens, labels = [bos], [IGNORED]
    for span in document:
        piece = tokenizer.encode(span.text, add_special_tokens=False).ids
        tokens += piece
        labels += piece if span.learned else [IGNORED] * len(piece)
    return Sample([*tokens, eos], [*labels, eos])


def batches(samples: Sequence[Sample], rng: np.random.Generator) -> list[Batch]:
    """Pack `samples` into batches of at most BATCH_TOKENS tokens, in random order and with noise.

    Raises:
        ValueError: a sample is longer than the longest row.
    """
    rows: dict[int, list[Sample]] = {length: [] for length in ROW_LENGTHS}
    for sample in samples:
        size = len(sample.tokens)
        length = next((length for length in ROW_LENGTHS if length >= size), None)
        if length is None:
            raise ValueError(f"A document has {size} tokens, more than a row of {ROW_LENGTHS[-1]}: shorten it.")
        rows[length].append(_with_noise(sample, rng))
    result = [batch for length, group in rows.items() for batch in _batches_of(group, length)]
    return [result[i] for i in rng.permutation(len(result))]


def _with_noise(sample: Sample, rng: np.random.Generator) -> Sample:
    if rng.random() >= NOISY_SHARE:
        return sample
    tokens = np.array(sample.tokens)
    hit = (rng.random(len(tokens)) < NOISE) & (tokens >= SPECIAL_TOKENS)
    tokens[hit] = rng.integers(SPECIAL_TOKENS, VOCABULARY, hit.sum())
    return Sample(tokens.tolist(), sample.labels)


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
