"""A model's tokenizer: text to tokens and back, read from its tokenizer.json without transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer

from api.incremental_decoder import IncrementalDecoder
from weights.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


class TextTokenizer:
    """Encodes prompts and decodes completions. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, *, bos_token: str | None, eos_token: str | None, add_bos: bool) -> None:
        """`add_bos` puts BOS before every text where tokenizer.json's own post-processor does not."""
        self._tokenizer = tokenizer
        self.bos_token_id = _token_id(tokenizer, bos_token)
        self.eos_token = eos_token
        self.eos_token_id = _token_id(tokenizer, eos_token)
        self._special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._prefix: list[int] = []
        if add_bos and self.bos_token_id is not None and self.bos_token_id not in self._encoded("", True):
            self._prefix = [self.bos_token_id]
        self.characters_per_token_max = max(map(len, tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, directory: Path) -> "TextTokenizer":
        """Reads tokenizer.json and, where there is one, tokenizer_config.json.

        `add_bos_token` of the latter is followed: DeepSeek's own tokenizer.json does not add BOS by itself.
        Raises CheckpointError where tokenizer.json is missing or a file is no tokenizer.
        """
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                f"Tokenizer files not found in the model directory. Expected one of: {TOKENIZER_FILE}. "
                f"Checked: '{directory}'."
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself for whatever is wrong with the file
            raise CheckpointError(f"{path} is no tokenizer: {error}.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _tokenizer_config(directory / TOKENIZER_CONFIG_FILE)
        return cls(
            tokenizer,
            bos_token=_token_text(config.get("bos_token")),
            eos_token=_token_text(config.get("eos_token")),
            add_bos=config.get("add_bos_token") is True,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, after BOS unless `add_special_tokens` is false."""
        ids = self._encoded(text, add_special_tokens)
        return self._prefix + ids if add_special_tokens else ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `tokens`; bytes that form no character become U+FFFD, ids without a token give nothing."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def decoder(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one sequence that grows token by token."""
        return IncrementalDecoder(self._tokenizer, self._special if skip_special_tokens else frozenset())

    def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the library's ways to encode, this one keeps no offsets and lets other threads run.
        encodings: list[tokenizers.Encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encodings[0].ids
        return ids


def _token_id(tokenizer: Tokenizer, token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


def _tokenizer_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return config


def _token_text(value: object) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text as "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
