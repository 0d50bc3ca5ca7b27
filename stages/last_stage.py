"""The end of the pipeline: from the last layer's hidden states to logits, tokens and log-probabilities."""

from collections.abc import Iterator, Sequence

import torch

from stages.backend import ttnn
from stages.batch import BatchBuilder
from stages.model_slice import HiddenStates, ModelSlice
from stages.models.deepseek_v3.lm_head import LMHead
from stages.sampling.logprobs import Floats, token_logprobs
from stages.sampling.sampler import Sampler
from stages.step import Step, StepResult, TokenLogprobs
from weights.model_config import ModelConfig
from weights.sizes import ceil_div

SCORED_AT_ONCE = 64
"""Most rows of logits that scoring prompts holds at a time: 33 MB of float32 for a vocabulary of 129280."""


class LastStage:
    """What the last stage has beside its layers: the head, and the requests it samples for."""

    def __init__(
        self, config: ModelConfig, mesh_device: ttnn.MeshDevice, model: ModelSlice, batches: BatchBuilder
    ) -> None:
        """`model` has a head, and `batches` made the inputs of the steps whose hidden states come here."""
        self._config = config
        self._mesh_device = mesh_device
        self._model = model
        self._batches = batches
        self._sampler = Sampler(config.vocab_size)

    def clear(self) -> None:
        """Forgets all requests, as at the start of an epoch."""
        self._sampler.clear()

    def apply(self, step: Step) -> None:
        """Takes over a step's ends and admissions. Raises StepError as Sampler.apply does."""
        self._sampler.apply(step)

    def logits(self, step: Step, hidden: HiddenStates | None) -> torch.Tensor:
        """Float32 [segments that sample, vocabulary]. `hidden` is None for a step without segments."""
        ends = [begin + len(segment.tokens) for begin, segment in zip(_begins(step), step.segments, strict=True)]
        return self._rows(hidden, [end - 1 for end, segment in zip(ends, step.segments, strict=True) if segment.sample])

    def result(self, step: Step, hidden: HiddenStates | None) -> StepResult:
        """The step's tokens and log-probabilities. Raises StepError as Sampler.sample does."""
        sampled = self._sampler.sample(step, self.logits(step, hidden))
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=sampled.tokens,
            logprobs=sampled.logprobs if any(entry is not None for entry in sampled.logprobs) else [],
            prompt_logprobs=self._prompt_logprobs(step, hidden),
        )

    def _prompt_logprobs(self, step: Step, hidden: HiddenStates | None) -> list[list[TokenLogprobs]]:
        scored = self._sampler.scored_prompts(step)
        indices = [
            index
            for begin, prompt in zip(_begins(step), scored, strict=True)
            if prompt is not None
            for index in range(begin, begin + len(prompt.tokens))
        ]
        rows = self._few_at_once(hidden, indices)
        return [
            [token_logprobs(next(rows), token, prompt.top) for token in prompt.tokens]
            for prompt in scored
            if prompt is not None
        ]

    def _few_at_once(self, hidden: HiddenStates | None, indices: Sequence[int]) -> Iterator[Floats]:
        """The logits [vocabulary] of each of a step's tokens `indices`; never more rows than may be held."""
        # Every row of the mesh gives as many logits as the one that has the most of these tokens.
        count = ceil_div(SCORED_AT_ONCE, int(self._mesh_device.shape[0]))
        for begin in range(0, len(indices), count):
            yield from self._rows(hidden, indices[begin : begin + count]).numpy()

    def _rows(self, hidden: HiddenStates | None, indices: Sequence[int]) -> torch.Tensor:
        """Float32 [indices, vocabulary] for these tokens of a step, in ascending order."""
        if hidden is None or not indices:
            return torch.empty(0, self._config.vocab_size)
        places = hidden.batch.places
        if hidden.logits is not None:
            return self._to_torch(hidden.logits)[places.of_tokens()[torch.tensor(indices)]]
        if places.tokens is None and len(indices) == places.width:
            return self._to_torch(self._model.logits(hidden.x, hidden.batch, None))
        picks, chosen = self._batches.picks(places, indices)
        return self._to_torch(self._model.logits(hidden.x, hidden.batch, picks))[chosen]

    def _to_torch(self, logits: ttnn.Tensor) -> torch.Tensor:
        return LMHead.to_torch(logits, self._config, self._mesh_device)


def _begins(step: Step) -> list[int]:
    """The index of each segment's first token among all tokens of the step."""
    begins, end = [], 0
    for segment in step.segments:
        begins.append(end)
        end += len(segment.tokens)
    return begins
