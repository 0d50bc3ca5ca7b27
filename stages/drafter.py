"""Drafts of the tokens after the sampled ones, by the model's multi-token-prediction layer (arXiv:2412.19437, 2.2).

At each position that layer takes the last decoder layer's hidden state and the token that follows, and predicts the one
after that. For more than one draft it is repeated, with its own hidden states and drafts in their place. What it adds
to its cache then is overwritten by the next step, as are the entries of drafts that were rejected.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from stages.backend import ttnn
from stages.batch import DecodeBatch, Place
from stages.batch_builder import BatchBuilder
from stages.model_slice import Batch, DraftLayer, HiddenStates
from stages.sampling.rows import LogitRows
from stages.sampling.sampler import Sampled, Sampler
from stages.step import Step
from stages.traces import DecodeTraces

LogitsOf = Callable[[ttnn.Tensor, Batch, ttnn.Tensor | None], ttnn.Tensor]
"""Logits of hidden states for the tokens of a batch at some indices, or for all: `logits` of model and draft layer."""

RowsOf = Callable[[LogitsOf, HiddenStates, Sequence[int], Sequence[int]], LogitRows]
"""Rows of logits of a batch's tokens, by their indices, each for the request in a slot."""


MASKS_SECONDS = 0.01
"""The longest that a step's drafts wait for what grammars allow, which was begun before the draft layer ran: without it
a draft is worth little, but all requests wait."""


@dataclass(slots=True)
class Draft:
    """The drafts of one request in the making.

    The layer's latest entry for the request is at `position`, for the `token`-th token of the batch that it ran on: it
    predicts the token two positions further.
    """

    slot: int
    wanted: int
    position: int
    token: int
    tokens: list[int] = field(default_factory=list)


class Drafter:
    """Drafts for the requests of a step once it is sampled, and keeps the draft layer's cache up to date."""

    def __init__(
        self,
        mesh_device: ttnn.MeshDevice,
        layer: DraftLayer,
        batches: BatchBuilder,
        sampler: Sampler,
        rows_of: RowsOf,
        eager: int | None,
    ) -> None:
        """`eager` decode passes of each number of lanes are not replayed from traces; None: none is."""
        self._layer = layer
        self._batches = batches
        self._sampler = sampler
        self._rows_of = rows_of
        self._traces = None if eager is None else DecodeTraces(self._decode, mesh_device, eager)

    def close(self) -> None:
        """Releases the traces."""
        if self._traces is not None:
            self._traces.release()

    def drafts(self, step: Step, hidden: HiddenStates | None, sampled: Sampled) -> list[list[int]]:
        """Returns the drafts for each segment that samples, in order; nothing where the step asks for none.

        `hidden` are those of all the step's tokens. A request gets fewer drafts than it wants where its logits are not
        numbers, or what its grammar allows is not known yet.
        """
        if hidden is None or not any(segment.drafts for segment in step.segments):
            return []
        states = self._forward(hidden.x, list(_following_tokens(step, sampled)), hidden.batch)
        drafts = list(_begun(step, sampled))
        going = self._extend([draft for draft in drafts if draft.wanted], states)
        while going:
            states = self._go_on(going, states)
            going = self._extend(going, states)
        return [draft.tokens for draft in drafts]

    def _extend(self, drafts: list[Draft], states: HiddenStates) -> list[Draft]:
        """Draws a draft more for each request; returns those that want another."""
        if not drafts:
            return []
        tokens, slots = [draft.token for draft in drafts], [draft.slot for draft in drafts]
        rows = self._rows_of(self._layer.logits, states, tokens, slots)
        until = time.monotonic() + MASKS_SECONDS
        going: list[Draft] = []
        for row, draft in enumerate(drafts):
            left = max(until - time.monotonic(), 0.0)
            token = self._sampler.draft(draft.slot, rows, row, draft.position + 2, draft.tokens, left)
            if token is not None:
                draft.tokens.append(token)
                if len(draft.tokens) < draft.wanted:
                    going.append(draft)
        return going

    def _go_on(self, drafts: list[Draft], states: HiddenStates) -> HiddenStates:
        """Runs the layer on its own hidden states and the latest draft of each request, one position further."""
        batch = self._batches.decode_places([Place(draft.slot, draft.position + 1) for draft in drafts])
        sources = self._batches.sources(states.batch.layout, [draft.token for draft in drafts], batch.layout)
        hidden = self._layer.pick(states.x, states.batch, sources)
        for index, draft in enumerate(drafts):
            draft.position += 1
            draft.token = index
        return self._forward(hidden, [draft.tokens[-1] for draft in drafts], batch)

    def _forward(self, hidden: ttnn.Tensor, following: Sequence[int], batch: Batch) -> HiddenStates:
        ids = self._batches.ids(batch.layout, following)
        if self._traces is not None and isinstance(batch, DecodeBatch):
            x, logits = self._traces.run([hidden, ids], batch)
            return HiddenStates(x, batch, logits)
        return HiddenStates(self._layer.forward(hidden, ids, batch), batch)

    def _decode(self, inputs: Sequence[ttnn.Tensor], batch: DecodeBatch) -> list[ttnn.Tensor]:
        """The pass that a trace records: hidden states and logits of all lanes."""
        hidden, ids = inputs
        x = self._layer.forward(hidden, ids, batch)
        return [x, self._layer.logits(x, batch, None)]


def _following_tokens(step: Step, sampled: Sampled) -> Iterator[int]:
    """The token after each of a step's tokens: the next one of its segment or what was sampled.

    Behind a draft that was rejected any token will do.
    """
    answers = iter(sampled.by_segment())
    for segment in step.segments:
        own = next(answers) if segment.sample else [segment.next_token]
        known = own if step.mode == "decode" else [*segment.tokens[1:], *own]
        # In place of a token that could not be drawn.
        padded = [*known, *[0] * (len(segment.tokens) - len(known))]
        yield from (max(token, 0) for token in padded)


def _begun(step: Step, sampled: Sampled) -> Iterator[Draft]:
    """A request's drafts, before the first, for each segment that samples."""
    begin = 0
    answers = iter(sampled.by_segment())
    for segment in step.segments:
        if segment.sample:
            tokens = next(answers)
            last = len(tokens) - 1 if step.mode == "decode" else len(segment.tokens) - 1
            wanted = segment.drafts if tokens[-1] >= 0 else 0
            yield Draft(segment.slot, wanted, segment.start + last, begin + last)
        begin += len(segment.tokens)
