"""The routes POST /tokenize and /detokenize, and GET /tokenizer_info."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, PlainValidator
from starlette.requests import Request
from starlette.responses import Response

from api.errors import RequestError
from api.openai.bodies import DetokenizedText, Tokens, encode
from api.openai.chat import ChatModel, PromptFields, render_prompt
from api.openai.prompts import refuse_other_model, refuse_outside_vocabulary
from api.openai.protocol import TOKEN_IDS_FORM, parse_body, token_ids
from api.server.openapi import BODY_ERRORS, add_route, answers_of, body_of, object_answer
from api.server.request import CLIENT_LEFT, Bodies, Check, ClientDisconnectedError, RequestDeadline
from api.text.served_model import ServedModel

CHARACTERS_MAX = 1 << 20
IDS_MAX = 1 << 18
"""The most characters of a text, and ids of tokens, that are turned into the other where the model takes fewer."""

DEFAULT_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class that transformers takes for a tokenizer whose config names none."""


def _required_token_ids(value: object) -> list[int]:
    tokens = token_ids(value)
    if tokens is None:
        raise ValueError(TOKEN_IDS_FORM)
    return tokens


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a text or, with `messages`, that of a `TokenizeChatRequest`."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(PromptFields):
    """The body of POST /tokenize with a conversation in place of a text."""

    model_config = ConfigDict(extra="ignore")


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_required_token_ids, json_schema_input_type=list[int])]


class Tokenization:
    """The routes that need the model's tokenizer alone: the engine need not be ready."""

    def __init__(self, chat: ChatModel, bodies: Bodies) -> None:
        self._chat = chat
        self._model = model = chat.served
        self._bodies = bodies
        self._info = json.dumps(_info(model), ensure_ascii=False).encode()

    def add_routes(self, app: FastAPI) -> None:
        """Adds the three routes to an application."""
        for path, handler, kind, answer, summary in (
            ("/tokenize", self.tokenize, TokenizeRequest, Tokens, "Turns a text or a conversation into tokens."),
            ("/detokenize", self.detokenize, DetokenizeRequest, DetokenizedText, "Turns tokens into their text."),
        ):
            answers = answers_of(answer, *BODY_ERRORS, 429)
            add_route(app, path, handler, answers, summary, method="POST", more=body_of(kind))
        summary = "What tokenizer_config.json holds, each special token as its text."
        add_route(app, "/tokenizer_info", self.tokenizer_info, object_answer(), summary)

    async def tokenize(self, request: Request) -> Response:
        """Answers with the tokens of a text. Raises RequestError."""
        return await self._answer(request, self._tokenized, inline=False)

    async def detokenize(self, request: Request) -> Response:
        """Answers with the text of tokens, special ones included. Raises RequestError."""
        return await self._answer(request, self._detokenized, inline=True)

    async def tokenizer_info(self) -> Response:
        """Answers with the contents of tokenizer_config.json, each special token as its text."""
        return Response(self._info, media_type="application/json")

    async def _answer(self, request: Request, answered: Callable[[bytes, Check], bytes], *, inline: bool) -> Response:
        try:
            answer = await self._bodies.parse(request, answered, RequestDeadline(None), inline=inline)
        except ClientDisconnectedError:
            return Response(status_code=CLIENT_LEFT)
        return Response(answer, media_type="application/json")

    def _tokenized(self, body: bytes, check: Check) -> bytes:
        request = parse_body(TokenizeRequest, body)
        refuse_other_model(request.model, self._model)
        if request.messages is not None:
            prompt = render_prompt(parse_body(TokenizeChatRequest, body), self._chat)
        elif request.prompt is not None:
            prompt = request.prompt
        else:
            raise RequestError("prompt is missing: give a text, or messages.", "prompt")
        most = max(self._model.prompt_characters_max, CHARACTERS_MAX)
        if len(prompt) > most:
            raise RequestError(f"prompt has {len(prompt)} characters, more than {most}: send parts.", "prompt")
        tokenizer = self._model.tokenizer
        # A template writes the special tokens itself.
        adds_special_tokens = request.add_special_tokens or (
            request.add_special_tokens is None and request.messages is None
        )
        tokens = tokenizer.encode(prompt, adds_special_tokens, check=check)
        answer = Tokens(
            count=len(tokens),
            max_model_len=self._model.max_model_len,
            tokens=tokens,
            token_strs=list(map(tokenizer.token_string, tokens)) if request.return_token_strs else None,
        )
        return encode(answer)

    def _detokenized(self, body: bytes, check: Check) -> bytes:
        request = parse_body(DetokenizeRequest, body)
        refuse_other_model(request.model, self._model)
        most = max(self._model.max_model_len, IDS_MAX)
        if len(request.tokens) > most:
            raise RequestError(f"tokens has {len(request.tokens)} ids, more than {most}: send parts.", "tokens")
        refuse_outside_vocabulary(request.tokens, "tokens", self._model)
        check()
        text = self._model.tokenizer.decode(request.tokens, skip_special_tokens=False)
        return encode(DetokenizedText(prompt=text))


def _info(model: ServedModel) -> dict[str, object]:
    config = {"tokenizer_class": DEFAULT_TOKENIZER_CLASS, **model.tokenizer.config}
    return {name: _plain(value) for name, value in config.items()}


def _plain(value: object) -> object:
    """Replaces every description of a token, an object with its "content", by that text."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return value["content"] if "content" in value else {name: _plain(part) for name, part in value.items()}
    return value
