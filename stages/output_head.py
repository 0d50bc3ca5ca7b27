"""The end of the pipeline: from the last layer's hidden states to logits, tokens and log-probabilities."""

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from stages.backend import ttnn
from stages.batch_builder import BatchBuilder
from stages.candidates import NAMED, CandidateFinder, CandidateRows
from stages.drafter import Drafter, LogitsOf
from stages.model_slice import HiddenStates, ModelSlice
from stages.models.registry import architecture_of
from stages.options import VocabularyOptions
from stages.pending import PendingResult
from stages.sampling.logprobs import Floats, TokenIds, token_logprobs
from stages.sampling.rows import LogitRows, WholeRows
from stages.sampling.sampler import Sampler, SlotChanges, sampling_tokens
from stages.step import Step, StepResult, TokenLogprobs
from weights.model_config import ModelConfig
from weights.sizes import ceil_div

SCORED_AT_ONCE = 64
"""Rows of logits that scoring prompts holds at a time, at most: 33 MB of float32 for a vocabulary of 129280."""


class OutputHead:
    """The part of the last stage that follows its layers: the head, the sampler and the requests it samples for.

    The thread that computes calls all of it but what it returns to be drawn. The sampler's state changes there alone,
    in the order of the steps.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh_device: ttnn.MeshDevice,
        model: ModelSlice,
        batches: BatchBuilder,
        vocabulary: VocabularyOptions | None,
        eager: int | None,
    ) -> None:
        """Takes a model with a head, the builder that makes the inputs of its steps, and what grammars need.

        `eager` decode passes of the draft layer, if the model has it, are not replayed from traces; None: none is.
        """
        self._config = config
        self._mesh_device = mesh_device
        self._model = model
        self._module = architecture_of(config).load_modules().head
        self._batches = batches
        self._sampler = Sampler(config.vocab_size, vocabulary)
        # Steps whose ends and admissions the sampler has not taken in yet, and slots whose prompts are scored.
        self._noted: deque[tuple[Step, SlotChanges]] = deque()
        self._scored: set[int] = set()
        self._named: dict[int, TokenIds] = {}
        self._epoch = 0
        self._finder: CandidateFinder | None = None
        # A single chip's logits are on the host already, or too few for chips to choose among them.
        if mesh_device.get_num_devices() > 1:
            self._finder = CandidateFinder(mesh_device, config.vocab_size)
        self._drafter: Drafter | None = None
        if model.draft is not None:
            self._drafter = Drafter(mesh_device, model.draft, batches, self._sampler, self._rows_of, eager)

    def enter_epoch(self) -> None:
        """Forgets all requests; the sampler does with the first tokens that are drawn."""
        for _, changes in self._noted:
            changes.leave()
        self._noted.clear()
        self._scored.clear()
        self._named.clear()

    def close(self) -> None:
        """Ends the sampler's thread, and releases the draft layer's traces."""
        self._sampler.close()
        if self._drafter is not None:
            self._drafter.close()

    def note(self, step: Step) -> None:
        """Takes in a step's ends and admissions. Raises StepError as Sampler.prepare does."""
        changes = self._sampler.prepare(step)
        self._noted.append((step, changes))
        for slot in step.ended:
            self._named.pop(slot, None)
        named = {slot: request.named for slot, request in changes.admitted.items()}
        self._named.update({slot: tokens for slot, tokens in named.items() if 0 < len(tokens) <= NAMED})
        self._scored.difference_update(step.ended)
        for admission in step.admissions:
            self._scored.discard(admission.slot)
            if admission.sampling.prompt_logprobs is not None:
                self._scored.add(admission.slot)

    def pass_over(self, step: Step) -> None:
        """Takes in a step that nothing is drawn of."""
        self._catch_up(step)

    def logits(self, step: Step, hidden: HiddenStates | None) -> torch.Tensor:
        """Returns float32 logits [tokens, vocabulary] of the step's `sampling_tokens`; `hidden` is None without any."""
        return self._rows(self._model.logits, hidden, sampling_tokens(step))

    def begin(self, step: Step, hidden: HiddenStates | None) -> PendingResult:
        """Computes the step's logits; what is returned samples tokens and log-probabilities of them.

        That raises StepError as Sampler.sample does.
        """
        rows = self._sampled_rows(step, hidden)
        has_scores = step.mode != "decode" and any(segment.slot in self._scored for segment in step.segments)
        has_drafts = self._drafter is not None and any(segment.drafts for segment in step.segments)
        needs_device = has_scores or has_drafts
        # Otherwise without the hidden states, whose memory is the device's.
        kept = hidden if needs_device else None
        return PendingResult(lambda on_device: self._result(step, rows.through(on_device), kept), needs_device)

    def candidates(self, logits: ttnn.Tensor) -> Sequence[ttnn.Tensor]:
        """Returns the candidates among logits on the device; none where these are read as a whole."""
        return [] if self._finder is None else self._finder.find(logits)

    def _result(self, step: Step, logits: LogitRows, hidden: HiddenStates | None) -> StepResult:
        """Samples the next step; `hidden` is None where nothing needs the device any more."""
        self._catch_up(step)
        sampled = self._sampler.sample(step, logits)
        has_drafts = step.mode == "decode" and any(len(segment.tokens) > 1 for segment in step.segments)
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=sampled.tokens,
            logprobs=sampled.logprobs if any(entry is not None for entry in sampled.logprobs) else [],
            prompt_logprobs=self._prompt_logprobs(step, hidden),
            accepted=sampled.accepted if has_drafts else [],
            drafts=[] if self._drafter is None else self._drafter.drafts(step, hidden, sampled),
            fallbacks=sampled.fallbacks,
        )

    def _catch_up(self, step: Step) -> None:
        """Has the sampler take in the step, and those before it that sampled nothing, such as loads."""
        if step.epoch != self._epoch:
            self._sampler.clear()
            self._epoch = step.epoch
        while self._noted:
            noted, changes = self._noted.popleft()
            self._sampler.apply(changes)
            if noted is step:
                break

    def _prompt_logprobs(self, step: Step, hidden: HiddenStates | None) -> list[list[TokenLogprobs]]:
        scored = self._sampler.scored_prompts(step)
        tokens = [
            token
            for begin, prompt in zip(_begins(step), scored, strict=True)
            if prompt is not None
            for token in range(begin, begin + len(prompt.tokens))
        ]
        rows = self._few_at_once(hidden, tokens)
        return [
            [token_logprobs(next(rows), token, prompt.top) for token in prompt.tokens]
            for prompt in scored
            if prompt is not None
        ]

    def _few_at_once(self, hidden: HiddenStates | None, tokens: Sequence[int]) -> Iterator[Floats]:
        """Yields the logits [vocabulary] of each token, never holding more than SCORED_AT_ONCE rows of them."""
        # Every row of the mesh gives as many logits as the one that has the most of these tokens.
        count = ceil_div(SCORED_AT_ONCE, int(self._mesh_device.shape[0]))
        for begin in range(0, len(tokens), count):
            yield from self._rows(self._model.logits, hidden, tokens[begin : begin + count]).numpy()

    def _sampled_rows(self, step: Step, hidden: HiddenStates | None) -> LogitRows:
        segments = [segment for segment in step.segments if segment.sample]
        lengths = [len(segment.tokens) if step.mode == "decode" else 1 for segment in segments]
        slots = [segment.slot for segment, length in zip(segments, lengths, strict=True) for _ in range(length)]
        return self._rows_of(self._model.logits, hidden, sampling_tokens(step), slots)

    def _rows_of(
        self, logits_of: LogitsOf, hidden: HiddenStates | None, tokens: Sequence[int], slots: Sequence[int]
    ) -> LogitRows:
        """Returns rows of logits of tokens of a step, each for the request in a slot: on a mesh, with candidates."""
        if hidden is None or not tokens or self._finder is None:
            return WholeRows(self._rows(logits_of, hidden, tokens).numpy())
        logits, chosen = self._on_device(logits_of, hidden, tokens)
        found = hidden.candidates or self._finder.find(logits)
        places = chosen.tolist()
        named = {place: self._named[slot] for place, slot in zip(places, slots, strict=True) if slot in self._named}
        return CandidateRows(self._finder, self._finder.read(logits, found, named), logits, places)

    def _rows(self, logits_of: LogitsOf, hidden: HiddenStates | None, tokens: Sequence[int]) -> torch.Tensor:
        """Returns float32 logits [tokens, vocabulary] of tokens of a step, given by their indices in rising order."""
        if hidden is None or not tokens:
            return torch.empty(0, self._config.vocab_size)
        logits, chosen = self._on_device(logits_of, hidden, tokens)
        return self._module.to_torch(logits, self._config, self._mesh_device)[chosen]

    def _on_device(
        self, logits_of: LogitsOf, hidden: HiddenStates, tokens: Sequence[int]
    ) -> tuple[ttnn.Tensor, torch.Tensor]:
        """Returns logits on the device, and the places of the tokens among those of all rows, int64 [tokens]."""
        layout = hidden.batch.layout
        if hidden.logits is not None:
            return hidden.logits, layout.places()[torch.tensor(tokens)]
        if layout.tokens is None and len(tokens) == layout.width:
            return logits_of(hidden.x, hidden.batch, None), layout.places()
        indices, chosen = self._batches.logit_indices(layout, tokens)
        return logits_of(hidden.x, hidden.batch, indices), chosen


def _begins(step: Step) -> list[int]:
    """Returns the index of each segment's first token among all tokens of the step."""
    begins, end = [], 0
    for segment in step.segments:
        begins.append(end)
        end += len(segment.tokens)
    return begins
