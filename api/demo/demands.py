"""What a demo asks of the engine: prompts to complete, or references to follow."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from api.client.token_source import TokenSource
from api.demo.accuracy import Reference, accuracy, read_reference_file
from api.demo.files import LoggedResult, ResultsLog
from api.demo.generation import Demand, Generation, TextDecoder, TokenIds
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


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, the `index`-th from 1 on; with `reference`, the tokens that it is to be followed by."""

    index: int
    prompt: str
    tokens: list[int]
    reference: Reference | None = None


class Demands:
    """All prompts of a run in order, and what is known of their completions."""

    def __init__(self, setup: DemoSetup, wanted: Sequence[Wanted], results_log: ResultsLog | None) -> None:
        self._setup = setup
        self._wanted = wanted
        self._log = results_log
        logged = {} if results_log is None else results_log.done(setup.results_settings)
        self._results: dict[int, Result] = {
            want.index: {"tokens": found.tokens, "text": found.text}
            for want in wanted
            if (found := logged.get((want.index, want.prompt))) is not None
        }

    @classmethod
    def of(cls, setup: DemoSetup, results_log: ResultsLog | None) -> "Demands":
        """Reads references and tokenises prompts. Raises OptionError or RequestError, which names the prompt."""
        wanted = _references(setup) if setup.options.token_accuracy else _prompts(setup)
        for want in wanted:
            _check_length(want, setup)
        return cls(setup, wanted, results_log)

    @property
    def left(self) -> list[Wanted]:
        """Those without a result yet."""
        return [want for want in self._wanted if want.index not in self._results]

    @property
    def results(self) -> list[Result]:
        """One for each prompt, in order; all must have ended."""
        return [self._results[want.index] for want in self._wanted]

    def demands(
        self, engine: TokenSource, on_text: Callable[[str], None] | None, on_done: Callable[[str], None]
    ) -> list[Demand]:
        """Requests for all that is left. `on_text` gets the first one's text, `on_done` the name of each that ends."""
        return [
            self._demand(want, engine.next_request_id(), on_text if place == 0 else None, on_done)
            for place, want in enumerate(self.left)
        ]

    def _demand(
        self,
        want: Wanted,
        request_id: int,
        on_text: Callable[[str], None] | None,
        on_done: Callable[[str], None],
    ) -> Demand:
        def ended(generation: Generation) -> None:
            self._note(want, generation)
            on_done(f"Prompt[{want.index - 1}]")

        return Demand(request=self._request(want, request_id), decoder=self._decoder(), on_text=on_text, on_done=ended)

    def _request(self, want: Wanted, request_id: int) -> AddRequest:
        options, model = self._setup.options, self._setup.model
        sampling = SamplingParams(
            temperature=options.sampling_temperature,
            top_p=options.sampling_top_p,
            top_k=options.sampling_top_k,
            seed=self._setup.seed,
            choice=want.index,
        )
        if want.reference is not None:
            forced = want.reference.tokens[len(want.tokens) :][: options.max_new_tokens]
            return AddRequest(
                request_id=request_id,
                tokens=want.tokens,
                max_tokens=len(forced),
                stop_token_ids=[],
                sampling=msgspec.structs.replace(sampling, temperature=0.0),
                forced=forced,
            )
        return AddRequest(
            request_id=request_id,
            tokens=want.tokens,
            max_tokens=options.max_new_tokens,
            stop_token_ids=model.eos_token_ids if model is not None and options.stop_at_eos else [],
            sampling=sampling,
        )

    def _decoder(self) -> TextDecoder:
        return TokenIds() if self._setup.model is None else self._setup.model.tokenizer.decoder()

    def _note(self, want: Wanted, generation: Generation) -> None:
        result: Result = {"tokens": generation.tokens, "text": generation.text}
        if want.reference is not None:
            measured = accuracy(want.reference, generation.tokens)
            result |= {"predicted_tokens": generation.tokens, "accuracy_top1": measured.top1}
            if measured.top5 is not None:
                result["accuracy_top5"] = measured.top5
        self._results[want.index] = result
        if self._log is not None:
            self._log.add(
                LoggedResult(
                    index=want.index,
                    prompt=want.prompt,
                    settings=self._setup.results_settings,
                    tokens=generation.tokens,
                    text=generation.text,
                )
            )


def _prompts(setup: DemoSetup) -> list[Wanted]:
    model = setup.model
    if not setup.prompts or model is None:
        draw = random.Random(setup.seed)  # noqa: S311 - no secrets are drawn
        texts = setup.prompts or ["[random-weights default prompt]"]
        return [
            Wanted(
                index=place, prompt=text, tokens=[draw.randrange(setup.vocab_size) for _ in range(RANDOM_PROMPT_TOKENS)]
            )
            for place, text in enumerate(texts, start=1)
        ]
    return [
        Wanted(index=place, prompt=text, tokens=_tokens(text, model, setup.chat_template))
        for place, text in enumerate(setup.prompts, start=1)
    ]


def _tokens(prompt: str, model: ServedModel, template: ChatTemplate | None) -> list[int]:
    if template is None:
        return model.tokenizer.encode(prompt)
    return model.tokenizer.encode(template.render([{"role": "user", "content": prompt}]), add_special_tokens=False)


def _references(setup: DemoSetup) -> list[Wanted]:
    wanted = []
    for place, path in enumerate(setup.options.reference_files, start=1):
        reference = read_reference_file(path, setup.options.tf_prompt_len)
        if max(reference.tokens) >= setup.vocab_size or min(reference.tokens) < 0:
            raise RequestError(f"'{path}' has tokens outside the model's vocabulary: it is another model's reference.")
        tokens = reference.tokens[: reference.prompt_length]
        text = "" if setup.model is None else setup.model.tokenizer.decode(tokens)
        wanted.append(Wanted(index=place, prompt=text, tokens=tokens, reference=reference))
    return wanted


def _check_length(want: Wanted, setup: DemoSetup) -> None:
    if not want.tokens:
        raise RequestError(f"Prompt[{want.index - 1}] has no tokens: give it some text.")
    new = setup.options.max_new_tokens
    if want.reference is not None:
        new = min(new, len(want.reference.tokens) - len(want.tokens))
    if len(want.tokens) + new > setup.max_model_len:
        raise RequestError(
            f"Prompt[{want.index - 1}] has {len(want.tokens)} tokens; with --max-new-tokens {new} that is more than "
            f"the {setup.max_model_len} tokens the model can hold: shorten one of them."
        )
