"""Packing of documents into rows of equal length; positions start again with each document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from weights.sample.architecture import VOCABULARY
from weights.sample.spans import Document
from weights.sample.tokenizer import CONTROL_TOKENS, FORMAT_TOKENS

BATCH_TOKENS = 1024
ROW_LENGTHS = (256, 512, 1024)
"""Row lengths in tokens. Attention costs their square, so a row is no longer than its longest document needs."""

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
    """A document in tokens, BOS and EOS included; a label is the token itself, or IGNORED if it is not learned.

    Noise may replace a token in the input unless it is exact.
    """

    tokens: list[int]
    labels: list[int]
    exact: list[bool]


@dataclass(frozen=True)
class Batch:
    """Rows of packed samples, as three int64 tensors [rows, row length]; positions start again with each sample."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def encode(document: Document, tokenizer: Tokenizer) -> Sample:
    """Return `document` in tokens; its first label is IGNORED, as a token is predicted from those before it."""
    bos, eos = 0, 1
    tokens, labels, exact = [bos], [IGNORED], [True]
    for span in document:
        piece = tokenizer.encode(span.text, add_special_tokens=False).ids
        tokens += piece
        labels += piece if span.learned else [IGNORED] * len(piece)
        exact += [span.exact] * len(piece)
    return Sample([*tokens, eos], [*labels, eos], [*exact, True])


def batches(samples: Sequence[Sample], rng: np.random.Generator) -> list[Batch]:
    """Pack `samples` into batches of at most BATCH_TOKENS tokens, in random order and with noise.

    Raises:
        ValueError: a sample is longer than the longest row.
    """
    rows: list[_Row] = []
    noisy = [_with_noise(sample, rng) for sample in samples]
    # Those that need long rows come first, so that short ones fill up what is left of these.
    for length, sample in sorted(((_length_for(s), s) for s in noisy), key=lambda pair: -pair[0]):
        size = len(sample.tokens)
        row = next((row for row in rows if row.room >= size), None)
        if row is None:
            row = _Row(length, [], length)
            rows.append(row)
        row.samples.append(sample)
        row.room -= size
    result = [
        batch for length in ROW_LENGTHS for batch in _batches_of([row for row in rows if row.length == length], length)
    ]
    return [result[i] for i in rng.permutation(len(result))]


@dataclass
class _Row:
    length: int
    samples: list[Sample]
    room: int


def _length_for(sample: Sample) -> int:
    size = len(sample.tokens)
    length = next((length for length in ROW_LENGTHS if length >= size), None)
    if length is None:
        raise ValueError(f"A document has {size} tokens, more than a row of {ROW_LENGTHS[-1]}: shorten it.")
    return length


def _with_noise(sample: Sample, rng: np.random.Generator) -> Sample:
    if rng.random() >= NOISY_SHARE:
        return sample
    tokens = np.array(sample.tokens)
    hit = (rng.random(len(tokens)) < NOISE) & (tokens >= SPECIAL_TOKENS) & ~np.array(sample.exact)
    tokens[hit] = rng.integers(SPECIAL_TOKENS, VOCABULARY, hit.sum())
    return Sample(tokens.tolist(), sample.labels, sample.exact)


def _batches_of(rows: Sequence[_Row], length: int) -> list[Batch]:
    filled = [_row(row.samples, length) for row in rows]
    size = BATCH_TOKENS // length
    return [
        Batch(*(torch.tensor(column) for column in zip(*filled[start : start + size], strict=True)))
        for start in range(0, len(filled), size)
    ]


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
