"""The prompts of a request as tokens of the model, and the refusal of tokens that it does not have."""

from collections.abc import Callable

import msgspec

from api.errors import RequestError, UnknownModelError
from api.openai.protocol import GenerationFields
from api.text.served_model import ServedModel

ALL_THAT_FITS = -1

"""The truncate_prompt_tokens that keeps as many tokens as leave room for the answer."""

Check = Callable[[], None]
"""What long work calls between its parts: it raises where the work is to end."""

CheckSize = Callable[[int, int], None]
"""What gets the answers and prompt tokens of a request so far, and raises where they are too many."""


def go_on() -> None:
    """The check of work that nobody ends."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a request, and the text that goes before its answers when the client asked for an echo."""

    tokens: list[int]
    echo: str = ""


def refuse_other_model(name: str | None, model: ServedModel) -> None:
    """Raises UnknownModelError if a request's model has none of the names of `model`. It may have none at all."""
    if name is not None and name not in model.names:
        names = "', '".join(model.names)
        raise UnknownModelError(f"This server has no model of that name: it serves '{names}'.", "model")


def refuse_outside_vocabulary(tokens: list[int], param: str, model: ServedModel) -> None:
    """Raises RequestError if one of the ids in a request's field is not a token of the model."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        raise RequestError(f"{param} has a token id outside the vocabulary, 0 to {model.vocab_size - 1}.", param)


def refuse_unknown_text(tokens: list[int], param: str, model: ServedModel) -> None:
    """Raises RequestError if the tokens of a text have one that the model does not have, as of a larger tokenizer."""
    if tokens and max(tokens) >= model.vocab_size:
        raise RequestError(
            f"{param} has a text that the tokenizer makes token {max(tokens)} of, and the model's vocabulary is 0 to "
            f"{model.vocab_size - 1}: leave it out.",
            param,
        )


class PromptReader:
    """Turns the prompts of one request into tokens, which takes long for long ones. May run on a thread."""

    def __init__(
        self,
        fields: GenerationFields,
        model: ServedModel,
        *,
        completion_tokens: int,
        adds_special_tokens: bool,
        echoes: bool = False,
        param: str = "prompt",
        check: Check = go_on,
    ) -> None:
        """Where the request truncates its prompts, these leave room for `completion_tokens`.

        `check` is called again and again and may raise to end the work. Errors name the field `param`. Raises
        RequestError where the truncation does not fit the model.
        """
        self._model = model
        self._adds_special_tokens = adds_special_tokens
        self._echoes = echoes
        self._param = param
        self._check = check
        self._side = fields.truncation_side or "left"
        self._length = _length_kept(fields.truncate_prompt_tokens, completion_tokens, model)

    def read(self, prompt: str | list[int]) -> Prompt:
        """Raises RequestError for a text or tokens that cannot be a prompt of the model."""
        self._check()
        if isinstance(prompt, str):
            tokens = self._tokens(prompt)
            refuse_unknown_text(tokens, self._param, self._model)
        else:
            tokens = prompt
            refuse_outside_vocabulary(tokens, self._param, self._model)
        length = self._length
        if length is not None and len(tokens) > length:
            tokens = tokens[:length] if self._side == "right" else tokens[len(tokens) - length :]
        if not tokens:
            raise RequestError("A prompt has no tokens: give at least one.", self._param)
        if not self._echoes:
            return Prompt(tokens=tokens)
        is_whole_text = isinstance(prompt, str) and length is None
        return Prompt(tokens=tokens, echo=str(prompt) if is_whole_text else self._model.tokenizer.decode(tokens))

    def _tokens(self, text: str) -> list[int]:
        model, special = self._model, self._adds_special_tokens
        if self._length is not None:
            return model.tokenizer.encode_part(text, self._length, self._side, special, check=self._check)
        if len(text) > model.prompt_characters_max:
            raise RequestError(
                f"The prompt's {len(text)} characters cannot fit the model's {model.max_model_len} tokens.", self._param
            )
        tokens = model.tokenizer.encode(text, special, most=model.max_model_len, check=self._check)
        if len(tokens) > model.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has at least "
                f"{len(tokens)}: shorten it.",
                self._param,
            )
        return tokens


def _length_kept(asked: int | None, completion_tokens: int, model: ServedModel) -> int | None:
    room = model.max_model_len - completion_tokens
    if asked == ALL_THAT_FITS:
        return max(room, 1)
    if asked is not None and asked > room:
        raise RequestError(
            f"truncate_prompt_tokens is more than the {max(room, 0)} tokens that the model's {model.max_model_len} "
            f"leave beside {completion_tokens} of the completion.",
            "truncate_prompt_tokens",
        )
    return asked
