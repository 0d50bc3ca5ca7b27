"""Answers that a sampler gives to requests with grammars, where the logits of a model are random numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher

from api.text.tokenizer import TextTokenizer
from stages.options import VocabularyOptions
from stages.sampling.rows import WholeRows
from stages.sampling.sampler import Sampler
from stages.sampling.vocabulary import load_vocabulary
from stages.step import Admission, Grammar, SamplingParams, Segment, Step, TokenLogprobs
from weights.sample import SAMPLE_DIR

TOKENIZER = TextTokenizer.load(SAMPLE_DIR)
EOS = 1
VOCABULARY = VocabularyOptions(tokenizer=str(SAMPLE_DIR), eos_token_ids=[EOS])
TOKENS = load_vocabulary(VOCABULARY)
SIZE = TOKENIZER.size + 40
"""Rows of logits: some more than the tokenizer has tokens, as models have."""

THINK, END_THINK = TOKENIZER.encode("<think>", False), TOKENIZER.encode("</think>", False)
CLOSING = [TOKENIZER.encode(text, False)[0] for text in ('"', "}", "]", '"}')]

PROMPT = [5, 6, 7]


def random_logits(seed: int, position: int, bonus: float = 0.0) -> torch.Tensor:
    """Logits [SIZE] that depend on seed and position alone; EOS, and what closes JSON, has `bonus` more."""
    logits = np.random.default_rng([seed, position]).normal(0, 2, SIZE).astype(np.float32)
    logits[[EOS, *CLOSING]] += bonus
    return torch.from_numpy(logits)


def params(source: str | Grammar | None = None, **options: Any) -> SamplingParams:
    """Sampling at temperature 1.5 with a grammar, or its source."""
    grammar = Grammar(source=source) if isinstance(source, str) else source
    defaults = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "seed": 7, "choice": 0, "grammar": grammar}
    return SamplingParams(**{**defaults, **options})


class Samplers:
    """A sampler, and the requests in its slots, each with its tokens."""

    def __init__(self, sampler: Sampler | None = None, bonus: float = 0.0) -> None:
        self.sampler = sampler or Sampler(SIZE, VOCABULARY)
        self._bonus = bonus
        self.logprobs: list[TokenLogprobs | None] = []
        self.accepted: list[int] = []
        self._step_id = 0
        self._admitted: dict[int, tuple[SamplingParams, list[int]]] = {}
        self._admissions: list[Admission] = []
        self._ended: list[int] = []

    def admit(self, slot: int, sampling: SamplingParams, answer: Sequence[int] = ()) -> None:
        """Puts a request into a slot, with what it has of its answer already."""
        tokens = [*PROMPT, *answer]
        self._admitted[slot] = sampling, tokens
        self._admissions.append(
            Admission(slot=slot, sampling=sampling, tokens=tokens.copy(), prompt_tokens=len(PROMPT))
        )

    def take_admissions(self) -> list[Admission]:
        """The admissions that are due."""
        due, self._admissions = self._admissions, []
        return due

    def end(self, slot: int) -> None:
        """Takes a request out of its slot."""
        del self._admitted[slot]
        self._ended.append(slot)

    def step(self) -> dict[int, int]:
        """Samples for all slots; gives the token of each."""
        return {slot: token for slot, [token] in self.verify({}).items()}

    def verify(self, drafts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Samples for all slots, some of which have drafts; gives the tokens of each."""
        segments = [
            Segment(
                slot=slot,
                start=len(tokens) - 1,
                tokens=[tokens[-1], *drafts.get(slot, [])],
                new_blocks=[],
                sample=True,
            )
            for slot, (_, tokens) in self._admitted.items()
        ]
        step = Step(
            epoch=1,
            step_id=self._step_id,
            mode="decode",
            segments=segments,
            admissions=self.take_admissions(),
            ended=self._ended,
        )
        self._step_id += 1
        self._ended = []
        self.sampler.apply(self.sampler.prepare(step))
        logits = [
            random_logits(sampling.seed, position, self._bonus)
            for slot, (sampling, tokens) in self._admitted.items()
            for position in range(len(tokens), len(tokens) + 1 + len(drafts.get(slot, [])))
        ]
        drawn = self.sampler.sample(step, WholeRows(torch.stack(logits).numpy()))
        self.logprobs, self.accepted = drawn.logprobs, drawn.accepted
        sampled = dict(zip(self._admitted, drawn.by_segment(), strict=True))
        for slot, own in sampled.items():
            self._admitted[slot][1].extend(own)
        return sampled

    def answer(self, slot: int) -> list[int]:
        """What a request has of its answer."""
        return self._admitted[slot][1][len(PROMPT) :]


def answers(
    asked: Sequence[SamplingParams], most: int, sampler: Sampler | None = None, bonus: float = 0.0
) -> list[list[int]]:
    """The answers to requests that run at once, each until EOS, a failure or `most` tokens."""
    samplers = Samplers(sampler, bonus)
    for slot, sampling in enumerate(asked):
        samplers.admit(slot, sampling)
    whole: dict[int, list[int]] = {}
    while len(whole) < len(asked):
        for slot, token in samplers.step().items():
            if token < 0 or token == EOS or len(samplers.answer(slot)) == most:
                whole[slot] = samplers.answer(slot)
                samplers.end(slot)
    return [whole[slot] for slot in range(len(asked))]


def text_of(answer: Sequence[int]) -> str | None:
    """The text of an answer that has ended by itself; None for one that was cut off."""
    return TOKENIZER.decode(answer[:-1], skip_special_tokens=False) if answer and answer[-1] == EOS else None


def refused_place(source: str, answer: Sequence[int]) -> int | None:
    """The place of the first token that a fresh matcher does not allow after those before it; None for none."""
    for place, token in enumerate(answer):
        matcher = LLMatcher(TOKENS, source, log_level=0)
        assert matcher.consume_tokens(list(answer[:place])), matcher.get_error()
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if token >= len(mask) or not mask[token]:
            return place
    return None
