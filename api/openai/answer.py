"""The answer to one completion request: whole or in chunks, its usage, and its line in the log."""

import time
from collections import Counter
from collections.abc import AsyncGenerator

import msgspec
import structlog

from api.openai.choices import Choice
from api.openai.completion_text import Piece
from api.openai.error_responses import INTERNAL_ERROR, error_body, status_body
from api.openai.legacy_logprobs import joined_logprobs
from api.openai.pieces import Pieces
from api.openai.prompts import Prompt
from api.openai.protocol import CompletionRequest, StreamOptions
from api.openai.responses import DONE_EVENT, Completion, CompletionChoice, Usage, event
from api.server.admission import Place
from weights.errors import GalaxylineError

log = structlog.get_logger()


class Answer:
    """Iterate over `events`, or await `whole`. Close it however it ends: `contextlib.aclosing`."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        request: CompletionRequest,
        prompts: list[Prompt],
        choices: list[Choice],
        pieces: Pieces,
        place: Place,
    ) -> None:
        self._id = answer_id
        self._model = model
        self._request = request
        self._prompts = prompts
        self._choices = choices
        self._pieces = pieces
        self._place = place
        self._created = int(time.time())
        self._began = time.monotonic()
        self._last: dict[int, Piece] = {}
        self._failure: str | None = None

    async def whole(self) -> Completion:
        """All of it at once. Raises what the engine's streams raise."""
        pieces: dict[int, list[Piece]] = {choice.index: [] for choice in self._choices}
        try:
            async for piece in self._pieces:
                self._note(piece)
                pieces[piece.index].append(piece)
        except Exception as error:
            self._failure = str(error)
            raise
        return self._completion([_joined(parts) for parts in pieces.values()], self._usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Its chunks as server-sent events. A failure is an event too, and the last one before [DONE]."""
        try:
            async for chunk in self._chunks():
                yield event(chunk)
        except GalaxylineError as error:
            self._failure = str(error)
            yield event(error_body(error))
        except Exception as error:
            self._failure = repr(error)
            yield event(status_body(500, INTERNAL_ERROR))
            yield DONE_EVENT
            raise
        yield DONE_EVENT

    def last_words(self, error: GalaxylineError) -> bytes:
        """The last events of a stream that has to end early, because of `error`."""
        self._failure = str(error)
        return event(error_body(error)) + DONE_EVENT

    async def aclose(self) -> None:
        """Aborts what has not ended, and logs how the request went. Nobody may be iterating; once is enough."""
        await self._pieces.aclose()
        self._place.release()
        self._log()

    def _note(self, piece: Piece) -> None:
        if piece.index not in self._last:
            self._place.began(piece.index)
        self._last[piece.index] = piece
        if piece.finish_reason is not None:
            self._place.ended(piece.index)

    async def _chunks(self) -> AsyncGenerator[Completion, None]:
        options = self._request.stream_options or StreamOptions()
        usage: Usage | msgspec.UnsetType | None = None if options.include_usage else msgspec.UNSET
        async for piece in self._pieces:
            self._note(piece)
            if options.continuous_usage_stats:
                usage = Usage.of(len(self._choices[piece.index].prompt.tokens), piece.completion_tokens)
            yield self._completion([_choice(piece)], usage)
        if options.include_usage:
            yield self._completion([], self._usage())

    def _completion(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _usage(self) -> Usage:
        """The counts of the whole answer so far: each prompt once, however many choices it has."""
        prompt_tokens = sum(len(prompt.tokens) for prompt in self._prompts)
        return Usage.of(prompt_tokens, sum(piece.completion_tokens for piece in self._last.values()))

    def _log(self) -> None:
        usage = self._usage()
        ids = [choice.request.request_id for choice in self._choices if choice.request is not None]
        reasons = Counter(piece.finish_reason or "abort" for piece in self._last.values())
        reasons["abort"] += len(self._choices) - len(self._last)
        fields = {
            "id": self._id,
            "engine_requests": f"{ids[0]}-{ids[-1]}" if len(ids) > 1 else "".join(map(str, ids)),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reasons": dict(+reasons),
            "seconds": round(time.monotonic() - self._began, 4),
        }
        if self._failure is None:
            log.info("completion ended", **fields)
        else:
            log.warning("completion failed", **fields, error=self._failure)


def _choice(piece: Piece) -> CompletionChoice:
    details = piece.details
    if details is None:
        return CompletionChoice(
            index=piece.index, text=piece.text, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason
        )
    return CompletionChoice(
        index=piece.index,
        text=piece.text,
        logprobs=details.logprobs,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        token_ids=details.token_ids,
        prompt_token_ids=details.prompt_token_ids,
        prompt_logprobs=details.prompt_logprobs,
    )


def _joined(pieces: list[Piece]) -> CompletionChoice:
    """The whole of a choice."""
    last = pieces[-1]
    text = "".join(piece.text for piece in pieces)
    details = [piece.details for piece in pieces if piece.details is not None]
    if not details:
        return _choice(msgspec.structs.replace(last, text=text))
    first = details[0]
    whole = msgspec.structs.replace(
        first,
        logprobs=joined_logprobs([part.logprobs for part in details if part.logprobs is not None]),
        token_ids=msgspec.UNSET
        if first.token_ids is msgspec.UNSET
        else [token for part in details for token in part.token_ids or []],
    )
    return _choice(msgspec.structs.replace(last, text=text, details=whole))
