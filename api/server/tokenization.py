"""The routes POST /tokenize and /detokenize, and GET /tokenizer_info."""

import json
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Annotated

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, PlainValidator
from starlette.requests import Request
from starlette.responses import Response

from api.openai.choices import refuse_other_model, refuse_outside_vocabulary
from api.openai.protocol import TOKEN_IDS_FORM, parse_body, token_ids
from api.openai.responses import DetokenizedText, Tokens, encode
from api.server.openapi import BODY_ERRORS, answers_of, body_of, object_answer
from api.server.request import ClientDisconnectedError, read_and_parse
from api.text.served_model import ServedModel

DEFAULT_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class that transformers takes for a tokenizer whose config names none."""


def _required_token_ids(value: object) -> list[int]:
    tokens = token_ids(value)
    if tokens is None:
        raise ValueError(TOKEN_IDS_FORM)
    return tokens


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_required_token_ids, json_schema_input_type=list[int])]


class Tokenization:
    """The routes that need the model's tokenizer alone: the engine need not be ready."""

    def __init__(self, model: ServedModel, threads: Executor) -> None:
        """Large bodies are handled on `threads`."""
        self._model = model
        self._threads = threads
        self._info = json.dumps(_info(model), ensure_ascii=False).encode()

    def add_routes(self, app: FastAPI) -> None:
        """Adds the three routes to an application."""
        for path, handler, kind, answer in (
            ("/tokenize", self.tokenize, TokenizeRequest, Tokens),
            ("/detokenize", self.detokenize, DetokenizeRequest, DetokenizedText),
        ):
            app.add_api_route(
                path,
                handler,
                methods=["POST"],
                response_model=None,
                response_class=Response,
                responses=answers_of(answer, *BODY_ERRORS),
                openapi_extra=body_of(kind),
            )
        app.add_api_route(
            "/tokenizer_info",
            self.tokenizer_info,
            methods=["GET"],
            response_model=None,
            response_class=Response,
            responses=object_answer(),
        )

    async def tokenize(self, request: Request) -> Response:
        """Answers with the tokens of a text. Raises RequestError."""
        return await self._answer(request, self._tokenized)

    async def detokenize(self, request: Request) -> Response:
        """Answers with the text of tokens, special ones included. Raises RequestError."""
        return await self._answer(request, self._detokenized)

    async def tokenizer_info(self) -> Response:
        """Answers with the contents of tokenizer_config.json, each special token as its text."""
        return Response(self._info, media_type="application/json")

    async def _answer(self, request: Request, answered: Callable[[bytes], msgspec.Struct]) -> Response:
        try:
            answer = await read_and_parse(request, answered, self._threads)
        except ClientDisconnectedError:
            return Response(status_code=499)  # which no client sees
        return Response(encode(answer), media_type="application/json")

    def _tokenized(self, body: bytes) -> Tokens:
        request = parse_body(TokenizeRequest, body)
        refuse_other_model(request.model, self._model)
        tokenizer = self._model.tokenizer
        tokens = tokenizer.encode(request.prompt, request.add_special_tokens is not False)
        return Tokens(
            count=len(tokens),
            max_model_len=self._model.max_model_len,
            tokens=tokens,
            token_strs=list(map(tokenizer.token_string, tokens)) if request.return_token_strs else None,
        )

    def _detokenized(self, body: bytes) -> DetokenizedText:
        request = parse_body(DetokenizeRequest, body)
        refuse_other_model(request.model, self._model)
        refuse_outside_vocabulary(request.tokens, "tokens", self._model)
        return DetokenizedText(prompt=self._model.tokenizer.decode(request.tokens, skip_special_tokens=False))


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
