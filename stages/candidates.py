"""What chips tell of logits without sending them: the best of each share of a vocabulary, and what the share weighs."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stages.backend import ttnn
from stages.pending import OnDevice, at_once
from stages.sampling.candidates import KnownLogits, Ranked, log_mass_of
from stages.sampling.logprobs import Doubles, Floats, TokenIds
from stages.tensor_dtypes import TILE
from weights.sizes import ceil_div, round_up

CANDIDATES = 64
"""The best tokens that each chip gives of its share: two tiles, and the most that ttnn's topk takes over many cores."""

NAMED = 64
"""Tokens that a request's options may name for their logits to be given too; of more, none are."""

LEAST = -3e38
"""What takes the padding of a vocabulary out of the way: finite, as sums with infinite ones are not numbers."""


class DeviceCandidates(NamedTuple):
    """The candidates of tokens [1, 1, tokens, CANDIDATES] on each chip, with its own indices, the best first.

    `shares` are their parts of what the chip's share of the vocabulary weighs, in float32.
    """

    values: ttnn.Tensor
    indices: ttnn.Tensor
    shares: ttnn.Tensor


class HostCandidates(NamedTuple):
    """The candidates of all tokens on the host, as `DeviceCandidates`: the parts of all chips, not joined yet.

    `named` are the tokens that options name, by place of the token, and `named_logits` [1, 1, tokens, NAMED] their
    logits on each chip, None where there are none.
    """

    found: DeviceCandidates
    named: Mapping[int, TokenIds]
    named_logits: ttnn.Tensor | None


class RankedCandidates(NamedTuple):
    """What candidates tell of some rows of logits: the best first, and what `KnownLogits` has of each, by row.

    So many of a row's candidates are `inside` the vocabulary.
    """

    ranked: Ranked
    bounds: Doubles
    log_masses: Doubles
    log_normalisers: Doubles
    inside: TokenIds


class CandidateFinder:
    """Finds candidates among logits [1, 1, tokens, vocabulary / columns] on each chip of a mesh, and reads rows."""

    def __init__(self, mesh_device: ttnn.MeshDevice, vocabulary: int) -> None:
        """Each column holds the logits of an equal share of the `vocabulary`, in whole tiles, the last with padding."""
        self._mesh_device = mesh_device
        self._rows, self._columns = tuple(mesh_device.shape)
        self._vocabulary = vocabulary
        share = vocabulary if self._columns == 1 else _whole_tiles(ceil_div(vocabulary, self._columns))
        self._share = share
        self._count = min(CANDIDATES, share)
        self._padding: ttnn.Tensor | None = None
        if share * self._columns > vocabulary:
            mask = torch.zeros(1, 1, 1, share * self._columns)
            mask[..., vocabulary:] = LEAST
            mapper = ttnn.ShardTensor2dMesh(mesh_device, (self._rows, self._columns), (None, 3))
            self._padding = ttnn.from_torch(
                mask, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh_device, mesh_mapper=mapper
            )

    def find(self, logits: ttnn.Tensor) -> DeviceCandidates:
        """Returns the candidates of each token, which stay on the chips."""
        own = logits if self._padding is None else ttnn.add(logits, self._padding)
        values, indices = ttnn.topk(own, self._count, dim=-1)
        weights = ttnn.softmax(ttnn.typecast(own, ttnn.float32), dim=-1, numeric_stable=True)
        return DeviceCandidates(values, indices, ttnn.gather(weights, -1, index=indices))

    def read(self, logits: ttnn.Tensor, found: DeviceCandidates, named: Mapping[int, TokenIds]) -> HostCandidates:
        """Brings candidates to the host, and the logits of tokens that are `named`, by place of the token."""
        on_host = DeviceCandidates(*(ttnn.from_device(tensor) for tensor in found))
        return HostCandidates(on_host, named, ttnn.from_device(self._named(logits, named)) if named else None)

    def each_row(self, logits: ttnn.Tensor, places: Sequence[int]) -> list[Floats]:
        """Brings the logits [vocabulary] of some tokens to the host, each from the chips of its mesh row alone."""
        width = logits.shape[-2]
        table = ttnn.to_layout(ttnn.reshape(logits, (width, self._share)), ttnn.ROW_MAJOR_LAYOUT)
        return [self._row(table, *divmod(place, width)) for place in places]

    def _row(self, table: ttnn.Tensor, mesh_row: int, index: int) -> Floats:
        picked = ttnn.embedding(self._sharded(torch.tensor([[index]]), ttnn.ROW_MAJOR_LAYOUT), table)
        chips = ttnn.get_device_tensors(picked)[mesh_row * self._columns : (mesh_row + 1) * self._columns]
        whole = torch.cat([ttnn.to_torch(chip).view(-1) for chip in chips])
        logits: Floats = whole[: self._vocabulary].float().numpy()
        return logits

    def _named(self, logits: ttnn.Tensor, named: Mapping[int, TokenIds]) -> ttnn.Tensor:
        """The logits of named tokens, of which each chip has those of its share."""
        width = logits.shape[-2]
        wanted = torch.zeros(self._rows, self._columns, width, NAMED, dtype=torch.long)
        for place, tokens in named.items():
            row, index = divmod(place, width)
            of_column = torch.from_numpy(tokens) - torch.arange(self._columns)[:, None] * self._share
            wanted[row, :, index, : len(tokens)] = of_column.clamp(0, self._share - 1)
        picks = self._sharded(wanted.view(-1, 1, width, NAMED), ttnn.TILE_LAYOUT)
        return ttnn.gather(logits, -1, index=picks)

    def _sharded(self, indices: torch.Tensor, layout: ttnn.Layout) -> ttnn.Tensor:
        """Gives each chip its own of the indices [chips, ...], or all the same where there is one."""
        mapper = ttnn.ShardTensorToMesh(self._mesh_device, dim=0)
        chips = self._rows * self._columns
        every = indices if len(indices) == chips else indices.repeat(chips, *[1] * (indices.dim() - 1))
        return ttnn.from_torch(
            every.to(torch.int32), dtype=ttnn.uint32, layout=layout, device=self._mesh_device, mesh_mapper=mapper
        )

    def _joined(self, tensor: ttnn.Tensor) -> torch.Tensor:
        """[1, 1, tokens, n] on each chip -> [tokens of all rows, columns, n]."""
        composer = ttnn.ConcatMesh2dToTensor(self._mesh_device, (self._rows, self._columns), (2, 3))
        host = ttnn.to_torch(tensor, mesh_composer=composer)[0, 0]
        return host.view(len(host), self._columns, -1)

    def rank(self, candidates: HostCandidates, places: Sequence[int]) -> RankedCandidates:
        """Ranks the candidates of tokens at these places, all at once."""
        chosen = np.array(places, dtype=np.int64)
        on_host = (self._joined(tensor) for tensor in candidates.found)
        values, indices, shares = on_host
        logits: Floats = values.float().numpy()[chosen]
        tokens = (indices.long().numpy()[chosen] + np.arange(self._columns)[:, None] * self._share).reshape(
            len(places), -1
        )
        ranked = Ranked.of(tokens, logits.reshape(len(places), -1))
        # Of each column the best candidate, whose share gives the sum of all its weights.
        normalisers = _log_sums(logits[..., 0].astype(np.float64), shares[..., 0].double().numpy()[chosen])
        bounds = np.full(len(places), -np.inf) if self._count == self._share else logits[..., -1].max(axis=1)
        inside = np.count_nonzero(tokens < self._vocabulary, axis=1)
        return RankedCandidates(
            ranked, bounds, log_mass_of(ranked.logits, normalisers), normalisers, inside.astype(np.int64)
        )

    def named(self, candidates: HostCandidates) -> dict[int, tuple[TokenIds, Floats]]:
        """Returns the tokens that options name, and their logits, by place of the token."""
        if candidates.named_logits is None:
            return {}
        given: Floats = self._joined(candidates.named_logits).float().numpy()
        return {
            place: (tokens, given[place, tokens // self._share, np.arange(len(tokens))])
            for place, tokens in candidates.named.items()
        }

    def known(
        self, candidates: RankedCandidates, index: int, named: tuple[TokenIds, Floats] | None = None
    ) -> KnownLogits:
        """Returns what the candidates of a row tell of its logits, and those that options have named."""
        count, bound = int(candidates.inside[index]), float(candidates.bounds[index])
        # Padding ranks last.
        tokens: TokenIds = candidates.ranked.tokens[index, :count]
        logits: Floats = candidates.ranked.logits[index, :count]
        normaliser = float(candidates.log_normalisers[index])
        if named is not None:
            tokens, at = np.unique(np.concatenate((tokens, named[0])), return_index=True)
            return KnownLogits.of(tokens, np.concatenate((logits, named[1]))[at], bound, self._vocabulary, normaliser)
        unknown, mass = self._vocabulary - count, float(candidates.log_masses[index])
        return KnownLogits(tokens, logits, bound, unknown, mass, normaliser, self._vocabulary)


def _whole_tiles(count: int) -> int:
    return round_up(count, TILE)


def _log_sums(best: Doubles, shares: Doubles) -> Doubles:
    """log(sum(exp(logit))) of each row, given the best logit of each column and its share, [rows, columns].

    Not a number where a logit is none.
    """
    largest = best.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        sums: Doubles = largest + np.log((np.exp(best - largest[:, None]) / shares).sum(axis=1))
    return sums


@dataclasses.dataclass(frozen=True)
class CandidateRows:
    """Rows of logits that stay on the device, but for their candidates. They are `LogitRows`.

    `chosen` has the place of each row among the tokens of `logits`. `on_device` calls a function where the
    device may be used.
    """

    finder: CandidateFinder
    candidates: HostCandidates
    logits: ttnn.Tensor
    chosen: Sequence[int]
    on_device: OnDevice = at_once

    def through(self, on_device: OnDevice) -> "CandidateRows":
        """See `LogitRows`."""
        return dataclasses.replace(self, on_device=on_device)

    def known(self, index: int) -> KnownLogits:
        """See `LogitRows`."""
        return self.finder.known(self._ranked, index, self._named.get(self.chosen[index]))

    @functools.cached_property
    def _ranked(self) -> RankedCandidates:
        """Is made by who asks first: not the thread that computes."""
        return self.finder.rank(self.candidates, self.chosen)

    @functools.cached_property
    def _named(self) -> dict[int, tuple[TokenIds, Floats]]:
        return self.finder.named(self.candidates)

    def fetch(self, indices: Sequence[int]) -> Sequence[Floats]:
        """See `LogitRows`."""
        if not indices:
            return []
        places = [self.chosen[index] for index in indices]
        return self.on_device(lambda: self.finder.each_row(self.logits, places))
