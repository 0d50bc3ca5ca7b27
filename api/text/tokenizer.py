"""A model's tokenizer: text to tokens and back, read from tokenizer.json or a tiktoken file without transformers."""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from api.text.tiktoken import read_tiktoken
from weights.errors import CheckpointError
from weights.model_config import read_bounded
from weights.tokenizer_files import (
    CONFIG_BYTES_MAX,
    TIKTOKEN_FILE,
    TOKENIZER_BYTES_MAX,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    described_token,
)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

CHARACTER_BYTES_MAX = 4

"""Bytes of the longest UTF-8 character (RFC 3629), hence the most tokens of one character."""

HELD_TOKENS_MAX = 16

"""Tokens that are held back until a character is whole; more than this form no character."""


class IncrementalDecoder:
    """Turns the tokens of one sequence into text as they arrive; special tokens and unknown ids give no text.

    Bytes of an unfinished character at the end of a sequence are left out. Bytes that cannot form a character become
    U+FFFD, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, silent: frozenset[int]) -> None:
        """Takes the ids of special tokens that give no text in `silent`."""
        self._tokenizer = tokenizer
        self._silent = silent
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def add(self, token: int) -> str | None:
        """Returns the text that `token` completes: None within a character, empty for a token without text."""
        if token in self._silent or self._tokenizer.id_to_token(token) is None:
            return ""
        text: str | None = self._stream.step(self._tokenizer, token)
        if text is not None:
            if self._held:
                self._held.clear()
            return text
        self._held.append(token)
        return None if len(self._held) < HELD_TOKENS_MAX else self._release()

    def flush(self) -> str:
        """Returns the text of the tokens held back at the end of a sequence, without an unfinished character."""
        text = self._decode(self._held).rstrip(REPLACEMENT)
        self._held.clear()
        return text

    def _release(self) -> str | None:
        # Without this, a model that repeats one byte would never show any text, and each step would cost more than
        # the one before: the stream decodes all tokens it holds.
        whole = self._decode(self._held)
        for kept in range(CHARACTER_BYTES_MAX - 1, len(self._held)):
            text = self._decode(self._held[:-kept])
            if text + self._decode(self._held[-kept:]) == whole:
                self._held = self._held[-kept:]
                self._stream = DecodeStream(ids=self._held, skip_special_tokens=False)
                return text
        return None

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text


CHAT_TEMPLATE_FILE = "chat_template.jinja"

TOKENIZER_FILES = (TOKENIZER_FILE, TIKTOKEN_FILE)

Side = Literal["left", "right"]

SLICE_CHARACTERS = 1 << 18
"""The most characters that the library gets at once, for which it takes up to 0.1 GB and half a second."""

SEAM_CHARACTERS = 512
"""The characters on either side of a place where text is cut that have to give the same tokens cut and uncut."""

SEAM_SEARCHED = 1 << 14
SEAMS_TRIED = 32
"""The characters, and the white space in them, that are searched for a place to cut a text."""

WHITE_SPACE = re.compile(r"\s+")


def _go_on() -> None:
    """The check of work that nobody ends."""


class TextTokenizer:
    """Encodes prompts and decodes completions. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str | None,
        add_bos: bool,
        config: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """`add_bos` puts BOS before every text where tokenizer.json's own post-processor does not.

        `config` is the content of tokenizer_config.json, which clients can request. `special_tokens` are the texts of
        its special tokens by name, such as `bos_token`.
        """
        self._tokenizer = tokenizer
        self.config = config
        self.special_tokens = {
            name: text
            for name, value in config.items()
            if name.endswith("_token") and (text := described_token(value)) is not None
        }
        self.bos_token_id = _token_id(tokenizer, bos_token)
        self.eos_token = eos_token
        self.eos_token_id = _token_id(tokenizer, eos_token)
        self._special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._added = self._added_ids(add_bos)
        self._texts: dict[int, str] = {}
        self.characters_per_token_max = max(map(len, tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, directory: Path) -> "TextTokenizer":
        """Reads tokenizer.json, or tiktoken.model, and the optional tokenizer_config.json and chat_template.jinja.

        `add_bos_token` of tokenizer_config.json is followed: DeepSeek's own tokenizer.json does not add BOS by itself.
        chat_template.jinja takes precedence over the template in tokenizer_config.json.
        Raises CheckpointError if the directory has no tokenizer, or one of its files is malformed.
        """
        if not has_tokenizer(directory):
            raise CheckpointError(
                f"Tokenizer files not found in the model directory. Expected one of: {', '.join(TOKENIZER_FILES)}. "
                f"Checked: '{directory}'."
            )
        config = _tokenizer_config(directory)
        if (directory / TOKENIZER_FILE).is_file():
            tokenizer = _read_tokenizer(directory / TOKENIZER_FILE)
        else:
            tokenizer = read_tiktoken(directory / TIKTOKEN_FILE, config)
        return cls(
            tokenizer,
            bos_token=described_token(config.get("bos_token")),
            eos_token=described_token(config.get("eos_token")),
            add_bos=config.get("add_bos_token") is True,
            config=config,
        )

    def encode(
        self, text: str, add_special_tokens: bool = True, *, most: int | None = None, check: Callable[[], None] = _go_on
    ) -> list[int]:
        """Returns token ids of `text`, after BOS unless `add_special_tokens` is false.

        A text longer than SLICE_CHARACTERS is tokenised in slices, as `_slices` cuts it: once there are more than
        `most` tokens the rest is left out, and before each slice `check` may raise to end the work.
        """
        before, after = self._added if add_special_tokens else ([], [])
        ids = list(before)
        for part in self._slices(text):
            check()
            ids += self._encoded(part, add_special_tokens=False)
            if most is not None and len(ids) > most:
                return ids
        return ids + after

    def encode_part(
        self,
        text: str,
        length: int,
        side: Side,
        add_special_tokens: bool = True,
        *,
        check: Callable[[], None] = _go_on,
    ) -> list[int]:
        """Returns at most `length` of the ids of `encode`.

        Special tokens are kept, and the last of the others, or the first for "right". Of a text longer than
        SLICE_CHARACTERS only as many slices are tokenised as these tokens are in.
        """
        before, after = self._added if add_special_tokens else ([], [])
        count = max(length - len(before) - len(after), 0)
        parts: list[list[int]] = []
        for part in self._slices(text) if side == "right" else self._slices_from_end(text):
            check()
            parts.append(self._encoded(part, False))
            if sum(map(len, parts)) >= count:
                break
        ids = list(chain.from_iterable(parts if side == "right" else reversed(parts)))
        kept = ids[:count] if side == "right" else ids[max(len(ids) - count, 0) :]
        return (before + kept + after)[:length]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `tokens`; bytes that form no character become U+FFFD, unknown ids give nothing."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """Returns a decoder for one sequence that grows token by token."""
        return IncrementalDecoder(self._tokenizer, self._special if skip_special_tokens else frozenset())

    @property
    def size(self) -> int:
        """The number of tokens, special ones included: every id is less."""
        return self._tokenizer.get_vocab_size()

    @property
    def special_ids(self) -> list[int]:
        """The tokens that `decode` leaves out, in rising order."""
        return sorted(self._special)

    def token_text(self, token: int) -> str:
        """Returns the text of one token by itself, also of special ones; U+FFFD for a part of a character."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.decode([token], skip_special_tokens=False)
        return text

    def token_string(self, token: int) -> str:
        """Returns a token as the vocabulary spells it, such as "Ġthe"; empty for an unknown id."""
        return self._tokenizer.id_to_token(token) or ""

    def token_id(self, text: str) -> int | None:
        """Returns the id of the token that the vocabulary spells like this, such as "<think>"; None for none."""
        return _token_id(self._tokenizer, text)

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token in self._special

    def _slices(self, text: str) -> Iterator[str]:
        """Cuts a text into parts of at most SLICE_CHARACTERS whose tokens, one after the other, are the text's.

        Where no place near a part's end is sound, it is cut there all the same, and the tokens there may be others: a
        run of a quarter of a million characters without white space would cost gigabytes as a whole.
        """
        begin = 0
        while len(text) - begin > SLICE_CHARACTERS:
            end = begin + SLICE_CHARACTERS
            end = self._seam(text, end - SEAM_SEARCHED, end) or end
            yield text[begin:end]
            begin = end
        yield text[begin:] if begin else text

    def _slices_from_end(self, text: str) -> Iterator[str]:
        """Cuts a text into such parts beginning with the last one."""
        end = len(text)
        while end > SLICE_CHARACTERS:
            begin = end - SLICE_CHARACTERS
            begin = self._seam(text, begin, begin + SEAM_SEARCHED) or begin
            yield text[begin:end]
            end = begin
        yield text[:end]

    def _seam(self, text: str, first: int, last: int) -> int | None:
        """The last place between `first` and `last` where the text can be cut without a change to the tokens there."""
        spaces = deque(WHITE_SPACE.finditer(text, first, last), SEAMS_TRIED)
        places = (place for space in reversed(spaces) for place in (space.start(), space.end()))
        return next((place for place in places if first < place < last and self._is_sound(text, place)), None)

    def _is_sound(self, text: str, place: int) -> bool:
        left, right = text[max(place - SEAM_CHARACTERS, 0) : place], text[place : place + SEAM_CHARACTERS]
        return self._encoded(left, False) + self._encoded(right, False) == self._encoded(left + right, False)

    def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the library's ways to encode, this one keeps no offsets and lets other threads run.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _added_ids(self, add_bos: bool) -> tuple[list[int], list[int]]:
        """The special tokens that go before every text, and those that go after it."""
        bare, whole = self._encoded("a", False), self._encoded("a", True)
        begin = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        before, after = whole[:begin], whole[begin + len(bare) :]
        if add_bos and self.bos_token_id is not None and self.bos_token_id not in before + after:
            before = [self.bos_token_id, *before]
        return before, after


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory has a tokenizer's file."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _read_tokenizer(path: Path) -> Tokenizer:
    if path.stat().st_size > TOKENIZER_BYTES_MAX:
        raise CheckpointError(f"{path} is larger than {TOKENIZER_BYTES_MAX} bytes: it is not a tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself for whatever is wrong with the file
        raise CheckpointError(f"{path} is not a tokenizer: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_id(tokenizer: Tokenizer, token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    path = directory / TOKENIZER_CONFIG_FILE
    try:
        config = json.loads(read_bounded(path, CONFIG_BYTES_MAX) or b"{}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not contain a JSON object.")
    template = read_bounded(directory / CHAT_TEMPLATE_FILE, CONFIG_BYTES_MAX)
    return config if template is None else {**config, "chat_template": template.decode(errors="replace")}
