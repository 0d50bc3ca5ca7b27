"""One completion as it grows: from the engine's tokens to the pieces that go to the client."""

from collections.abc import Iterator

import msgspec

from api.errors import EngineError
from api.messages.engine import FinishReason, RequestOutput
from api.openai.choices import Choice
from api.openai.protocol import CompletionRequest
from api.openai.responses import CompletionFinish
from api.openai.stop_strings import StopStrings
from api.openai.token_details import Details, TokenDetails
from api.text.served_model import ServedModel

FINISHES: dict[FinishReason, CompletionFinish] = {"stop": "stop", "length": "length"}
"""The reasons that clients are told; with any other the engine gave the request up."""


class Piece(msgspec.Struct, frozen=True):
    """The next text of choice `index`, which has `completion_tokens` so far; its last piece has a `finish_reason`.

    `stop_reason` is the stop string or stop token that ended it, None where EOS or the length did.
    """

    index: int
    text: str
    completion_tokens: int
    finish_reason: CompletionFinish | None
    stop_reason: int | str | None
    details: Details | None


class CompletionText:
    """One choice: its tokens in, pieces of its text out, each with the details of all tokens since the last one."""

    def __init__(self, choice: Choice, request: CompletionRequest, model: ServedModel) -> None:
        """An echo goes before the first piece; no stop string is looked for in it."""
        self._index = choice.index
        self._is_echo = choice.is_echo
        self._unsent = choice.prompt.echo
        self._decoder = model.tokenizer.decoder(request.skip_special_tokens is not False)
        self._shows_stop = request.include_stop_str_in_output or False
        self._stops = StopStrings(request.stop, self._shows_stop)
        self._min_tokens = request.min_tokens or 0
        self._eos_token_ids = frozenset(() if request.ignore_eos else model.eos_token_ids)
        self._details = TokenDetails.asked(request, choice.prompt, model.tokenizer)
        self._has_logprobs = request.logprobs is not None
        self._tokens = 0

    def add(self, output: RequestOutput) -> Iterator[Piece]:
        """At most one piece for each token, fewer while text is held back; the last has the finish reason.

        Raises EngineError where the engine gave the request up.
        """
        finish = None if output.finish_reason is None else FINISHES.get(output.finish_reason)
        if output.finish_reason is not None and finish is None:
            raise EngineError(output.error or "The engine dropped this request before it was complete.")
        if self._details is not None:
            self._details.add_prompt(output.prompt_logprobs)
        if self._is_echo:
            if finish is not None:
                yield self.whole()
            return
        last = len(output.tokens) - 1
        for place, token in enumerate(output.tokens):
            if finish is not None and place == last:
                yield self._last(output, finish)
                return
            text = self._decoder.add(token)
            released = self._add(output, place, text)
            if self._stops.matched is not None:
                yield self._piece(released or "", "stop", self._stops.matched)
                return
            if released or text == "":
                yield self._piece(released or "", None)

    def whole(self) -> Piece:
        """The only piece of a completion that has no tokens."""
        return self._piece("", "length")

    def _add(self, output: RequestOutput, place: int, text: str | None) -> str | None:
        """Counts a token that gave this text; the text that can go to the client now."""
        self._tokens += 1
        if self._details is not None:
            entry = output.logprobs[place] if self._has_logprobs else None
            self._details.add(output.tokens[place], entry, len(text or ""))
        return self._stops.add(text, self._tokens > self._min_tokens) if text else text

    def _last(self, output: RequestOutput, finish: CompletionFinish) -> Piece:
        token = output.tokens[-1]
        is_shown = finish == "length" or self._shows_stop
        text = ((self._decoder.add(token) or "") if is_shown else "") + self._decoder.flush()
        released = self._add(output, len(output.tokens) - 1, text) or ""
        if self._stops.matched is not None:
            return self._piece(released, "stop", self._stops.matched)
        stop = token if finish == "stop" and token not in self._eos_token_ids else None
        return self._piece(released + self._stops.flush(), finish, stop)

    def _piece(self, text: str, finish: CompletionFinish | None, stop: int | str | None = None) -> Piece:
        text, self._unsent = self._unsent + text, ""
        details = None if self._details is None else self._details.take()
        return Piece(self._index, text, self._tokens, finish, stop, details)
