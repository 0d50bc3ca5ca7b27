"""How often predictions under teacher forcing are those of a reference."""

from collections.abc import Iterable, Sequence

import msgspec

from api.demo.reference_file import Reference


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Shares in [0, 1]; `top5` is None where the reference has no best tokens."""

    top1: float
    top5: float | None


def accuracy(reference: Reference, predicted: Sequence[int]) -> Accuracy:
    """Compares predictions for the positions from the reference's prompt on.

    Top-1 counts those that equal the best token of their position, or the reference's own where best ones are not
    given; top-5 those among the five best.
    """
    begin = reference.prompt_length
    total = len(predicted)
    if reference.top5 is None:
        truth = reference.tokens[begin : begin + total]
        return Accuracy(top1=_share(map(int.__eq__, predicted, truth), total), top5=None)
    rows = reference.top5[begin : begin + total]
    return Accuracy(
        top1=_share((token == row[0] for token, row in zip(predicted, rows, strict=True)), total),
        top5=_share((token in row for token, row in zip(predicted, rows, strict=True)), total),
    )


def _share(matches: Iterable[bool], total: int) -> float:
    return sum(matches) / total
