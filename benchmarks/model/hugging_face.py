"""transformers' own model and `generate` as a contender, in a process of its own."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import DeepseekV3ForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from benchmarks.model.contender import ANSWER_SECONDS, TokenTimes
from benchmarks.support.peer import Pipe, answer, running_peer


class Prompts(msgspec.Struct, frozen=True):
    """A batch to complete."""

    tokens: list[list[int]]
    new_tokens: int


class HuggingFace:
    """A `Contender` that is transformers."""

    def __init__(self, peer: Pipe) -> None:
        self._peer = peer

    async def complete(self, prompts: Sequence[list[int]], new_tokens: int) -> TokenTimes:
        """See `Contender`. Prompts must be equally long; all of a batch get their tokens at the same times."""
        self._peer.send(Prompts(list(prompts), new_tokens))
        times = await asyncio.to_thread(answer, self._peer, ANSWER_SECONDS)
        if not isinstance(times, list):
            raise TypeError(f"{times!r} is not a list of times")
        return TokenTimes([times] * len(prompts))


@contextlib.asynccontextmanager
async def hugging_face(model: Path, threads: int) -> AsyncIterator[HuggingFace]:
    """Starts the model in bfloat16, with scaled dot product attention and experts one after the other.

    transformers' default for experts, torch's grouped product, was slower on the processors that were tried.
    """
    with running_peer(_serve, None, model, threads) as peer:
        await asyncio.to_thread(answer, peer, ANSWER_SECONDS)
        yield HuggingFace(peer)


class _Clock(StoppingCriteria):
    """Notes the time of each token, and never stops the generation."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def _serve(pipe: Pipe, path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = DeepseekV3ForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    pipe.send("loaded")
    with contextlib.suppress(EOFError):
        while True:
            prompts = pipe.recv()
            pipe.send(_generate(model.generate, prompts))


def _generate(generate: Callable[..., object], prompts: Prompts) -> list[float]:
    ids = torch.tensor(prompts.tokens)
    clock = _Clock()
    began = time.perf_counter()
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=prompts.new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [at - began for at in clock.times]
