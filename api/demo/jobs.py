"""The batches of a demo: prompts to complete, or references to follow, and their results."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from api.client.open_requests import TokenSource
from api.demo.files import LoggedResult, ResultsLog
from api.demo.generation import Generation, GenerationJob, TextDecoder, TokenIds
from api.demo.reference import Reference, accuracy, read_reference_file
from api.demo.setup import DemoSetup
from api.errors import RequestError
from api.messages.engine import AddRequest
from api.text.chat_template import ChatTemplate
from api.text.served_model import ServedModel
from stages.step import SamplingParams

RANDOM_PROMPT_TOKENS = 16
"""Length of the prompt of a run with random weights that is given none."""

Result = dict[str, Any]
"""`tokens` and `text`, and under teacher forcing `predicted_tokens`, `accuracy_top1` and perhaps `accuracy_top5`."""


class PromptJob(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to complete, the `index`-th from 1 on; with `reference`, the tokens that are to follow it."""

    index: int
    prompt: str
    tokens: list[int]
    reference: Reference | None = None


class Batch:
    """All prompts of a run in order, and the results of those that are done."""

    def __init__(self, setup: DemoSetup, jobs: Sequence[PromptJob], results_log: ResultsLog | None) -> None:
        self._setup = setup
        self._jobs = jobs
        self._log = results_log
        logged = {} if results_log is None else results_log.done(setup.results_settings)
        self._results: dict[int, Result] = {
            job.index: {"tokens": found.tokens, "text": found.text}
            for job in jobs
            if (found := logged.get((job.index, job.prompt))) is not None
        }

    @classmethod
    def of(cls, setup: DemoSetup, results_log: ResultsLog | None) -> "Batch":
        """Reads references and tokenises prompts. Raises OptionError or RequestError, which names the prompt."""
        jobs = _references(setup) if setup.options.token_accuracy else _prompts(setup)
        for job in jobs:
            _check_length(job, setup)
        return cls(setup, jobs, results_log)

    @property
    def left(self) -> list[PromptJob]:
        """The jobs that have no result yet."""
        return [job for job in self._jobs if job.index not in self._results]

    @property
    def results(self) -> list[Result]:
        """The result of each prompt, in order; all must have ended."""
        return [self._results[job.index] for job in self._jobs]

    def generation_jobs(
        self, engine: TokenSource, on_text: Callable[[str], None] | None, on_done: Callable[[str], None]
    ) -> list[GenerationJob]:
        """Requests for all jobs that are left.

        `on_text` gets the text of the first, `on_done` the name of each that ends.
        """
        return [
            self._generation_job(job, engine.next_request_id(), on_text if place == 0 else None, on_done)
            for place, job in enumerate(self.left)
        ]

    def _generation_job(
        self,
        job: PromptJob,
        request_id: int,
        on_text: Callable[[str], None] | None,
        on_done: Callable[[str], None],
    ) -> GenerationJob:
        def ended(generation: Generation) -> None:
            self._note(job, generation)
            on_done(f"Prompt[{job.index - 1}]")

        return GenerationJob(
            request=self._request(job, request_id), decoder=self._decoder(), on_text=on_text, on_done=ended
        )

    def _request(self, job: PromptJob, request_id: int) -> AddRequest:
        options, model = self._setup.options, self._setup.model
        sampling = SamplingParams(
            temperature=options.sampling_temperature,
            top_p=options.sampling_top_p,
            top_k=options.sampling_top_k,
            seed=self._setup.seed,
            choice=job.index,
        )
        if job.reference is not None:
            forced = job.reference.tokens[len(job.tokens) :][: options.max_new_tokens]
            return AddRequest(
                request_id=request_id,
                tokens=job.tokens,
                max_tokens=len(forced),
                stop_token_ids=[],
                sampling=msgspec.structs.replace(sampling, temperature=0.0),
                forced=forced,
            )
        return AddRequest(
            request_id=request_id,
            tokens=job.tokens,
            max_tokens=options.max_new_tokens,
            stop_token_ids=model.eos_token_ids if model is not None and options.stop_at_eos else [],
            sampling=sampling,
        )

    def _decoder(self) -> TextDecoder:
        return TokenIds() if self._setup.model is None else self._setup.model.tokenizer.decoder()

    def _note(self, job: PromptJob, generation: Generation) -> None:
        result: Result = {"tokens": generation.tokens, "text": generation.text}
        if job.reference is not None:
            measured = accuracy(job.reference, generation.tokens)
            result |= {"predicted_tokens": generation.tokens, "accuracy_top1": measured.top1}
            if measured.top5 is not None:
                result["accuracy_top5"] = measured.top5
        self._results[job.index] = result
        if self._log is not None:
            self._log.add(
                LoggedResult(
                    index=job.index,
                    prompt=job.prompt,
                    settings=self._setup.results_settings,
                    tokens=generation.tokens,
                    text=generation.text,
                )
            )


def _prompts(setup: DemoSetup) -> list[PromptJob]:
    model = setup.model
    if not setup.prompts or model is None:
        draw = random.Random(setup.seed)  # noqa: S311 - no secrets are drawn
        texts = setup.prompts or ["[random-weights default prompt]"]
        return [
            PromptJob(
                index=place, prompt=text, tokens=[draw.randrange(setup.vocab_size) for _ in range(RANDOM_PROMPT_TOKENS)]
            )
            for place, text in enumerate(texts, start=1)
        ]
    return [
        PromptJob(index=place, prompt=text, tokens=_tokens(text, model, setup.chat_template))
        for place, text in enumerate(setup.prompts, start=1)
    ]


def _tokens(prompt: str, model: ServedModel, template: ChatTemplate | None) -> list[int]:
    if template is None:
        return model.tokenizer.encode(prompt)
    return model.tokenizer.encode(template.render([{"role": "user", "content": prompt}]), add_special_tokens=False)


def _references(setup: DemoSetup) -> list[PromptJob]:
    jobs = []
    for place, path in enumerate(setup.options.reference_files, start=1):
        reference = read_reference_file(path, setup.options.tf_prompt_len)
        if max(reference.tokens) >= setup.vocab_size or min(reference.tokens) < 0:
            raise RequestError(f"'{path}' has tokens outside the model's vocabulary: it is another model's reference.")
        tokens = reference.tokens[: reference.prompt_length]
        text = "" if setup.model is None else setup.model.tokenizer.decode(tokens)
        jobs.append(PromptJob(index=place, prompt=text, tokens=tokens, reference=reference))
    return jobs


def _check_length(job: PromptJob, setup: DemoSetup) -> None:
    if not job.tokens:
        raise RequestError(f"Prompt[{job.index - 1}] has no tokens: give it some text.")
    new = setup.options.max_new_tokens
    if job.reference is not None:
        new = min(new, len(job.reference.tokens) - len(job.tokens))
    if len(job.tokens) + new > setup.max_model_len:
        raise RequestError(
            f"Prompt[{job.index - 1}] has {len(job.tokens)} tokens; with --max-new-tokens {new} that is more than "
            f"the {setup.max_model_len} tokens the model can hold: shorten one of them."
        )
