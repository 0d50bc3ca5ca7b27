"""The end of the pipeline: from the last layer's hidden states to logits, tokens and log-probabilities."""

from collections.abc import Iterator, Sequence

import torch

from stages.backend import ttnn
from stages.batch import BatchBuilder
from stages.drafter import Drafter, LogitsOf
from stages.model_slice import HiddenStates, ModelSlice
from stages.models.registry import architecture_of
from stages.options import VocabularyOptions
from stages.sampling.logprobs import Floats, token_logprobs
from stages.sampling.sampler import Sampler, sampling_tokens
from stages.step import Step, StepResult, TokenLogprobs
from weights.model_config import ModelConfig
from weights.sizes import ceil_div

SCORED_AT_ONCE = 64
"""Rows of logits that scoring prompts holds at a time, at most: 33 MB of float32 for a vocabulary of 129280."""


class OutputHead:
    """The part of the last stage that follows its layers: the head, the sampler and the requests it samples for."""

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
        self._drafter: Drafter | None = None
        if model.draft is not None:
            self._drafter = Drafter(mesh_device, model.draft, batches, self._sampler, self._rows, eager)

    def clear(self) -> None:
        """Forgets all requests, as at the start of an epoch."""
        self._sampler.clear()

    def close(self) -> None:
        """Ends the sampler's thread, and releases the draft layer's traces."""
        self._sampler.close()
        if self._drafter is not None:
            self._drafter.close()

    def apply(self, step: Step) -> None:
        """Applies a step's ends and admissions. Raises StepError as Sampler.apply does."""
        self._sampler.apply(step)

    def logits(self, step: Step, hidden: HiddenStates | None) -> torch.Tensor:
        """Returns float32 logits [tokens, vocabulary] of the step's `sampling_tokens`; `hidden` is None without any."""
        return self._rows(self._model.logits, hidden, sampling_tokens(step))

    def result(self, step: Step, hidden: HiddenStates | None) -> StepResult:
        """Samples the step's tokens and log-probabilities. Raises StepError as Sampler.sample does."""
        sampled = self._sampler.sample(step, self.logits(step, hidden))
        has_drafts = step.mode == "decode" and any(len(segment.tokens) > 1 for segment in step.segments)
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=sampled.tokens,
            logprobs=sampled.logprobs if any(entry is not None for entry in sampled.logprobs) else [],
            prompt_logprobs=self._prompt_logprobs(step, hidden),
            accepted=sampled.accepted if has_drafts else [],
            drafts=[] if self._drafter is None else self._drafter.drafts(step, hidden, sampled),
        )

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

    def _rows(self, logits_of: LogitsOf, hidden: HiddenStates | None, tokens: Sequence[int]) -> torch.Tensor:
        """Returns float32 logits [tokens, vocabulary] of tokens of a step, given by their indices in rising order."""
        if hidden is None or not tokens:
            return torch.empty(0, self._config.vocab_size)
        layout = hidden.batch.layout
        if hidden.logits is not None:
            return self._to_torch(hidden.logits)[layout.places()[torch.tensor(tokens)]]
        if layout.tokens is None and len(tokens) == layout.width:
            return self._to_torch(logits_of(hidden.x, hidden.batch, None))
        indices, chosen = self._batches.logit_indices(layout, tokens)
        return self._to_torch(logits_of(hidden.x, hidden.batch, indices))[chosen]

    def _to_torch(self, logits: ttnn.Tensor) -> torch.Tensor:
        return self._module.to_torch(logits, self._config, self._mesh_device)


def _begins(step: Step) -> list[int]:
    """Returns the index of each segment's first token among all tokens of the step."""
    begins, end = [], 0
    for segment in step.segments:
        begins.append(end)
        end += len(segment.tokens)
    return begins
