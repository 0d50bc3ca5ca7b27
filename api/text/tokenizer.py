"""A model's tokenizer: text to tokens and back, read from tokenizer.json or a tiktoken file without transformers."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from weights.bounded_file import read_bounded
from weights.errors import CheckpointError

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


TOKENIZER_FILE = "tokenizer.json"

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

CHAT_TEMPLATE_FILE = "chat_template.jinja"

TIKTOKEN_FILE = "tiktoken.model"
"""A token in base64 and its rank on each line: what Kimi K2 has in place of tokenizer.json."""

TOKENIZER_FILES = (TOKENIZER_FILE, TIKTOKEN_FILE)

TIKTOKEN_RESERVED = 256
"""Ids after the ranks that Kimi K2's tokenizer sets aside for special tokens (its tokenization_kimi.py)."""

TIKTOKEN_TOKEN_BYTES_MAX = 1 << 10
"""Eight times Kimi K2's longest token; a token of n bytes can be parted in n ways."""

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TIKTOKEN_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How Kimi K2 parts text before it merges bytes: runs of Chinese, words, up to three digits, signs, white space.

The same pattern as `pat_str` of its tokenization_kimi.py.
"""

TOKENIZER_BYTES_MAX = 1 << 27
"""Sixteen times the size of DeepSeek-R1's tokenizer.json."""

CONFIG_BYTES_MAX = 1 << 24

Side = Literal["left", "right"]


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
            if name.endswith("_token") and (text := _token_text(value)) is not None
        }
        self.bos_token_id = _token_id(tokenizer, bos_token)
        self.eos_token = eos_token
        self.eos_token_id = _token_id(tokenizer, eos_token)
        self._special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._prefix: list[int] = []
        if add_bos and self.bos_token_id is not None and self.bos_token_id not in self._encoded("", True):
            self._prefix = [self.bos_token_id]
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
            tokenizer = _read_tiktoken(directory / TIKTOKEN_FILE, config)
        return cls(
            tokenizer,
            bos_token=_token_text(config.get("bos_token")),
            eos_token=_token_text(config.get("eos_token")),
            add_bos=config.get("add_bos_token") is True,
            config=config,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns token ids of `text`, after BOS unless `add_special_tokens` is false."""
        ids = self._encoded(text, add_special_tokens)
        return self._prefix + ids if add_special_tokens else ids

    def encode_part(self, text: str, length: int, side: Side, add_special_tokens: bool = True) -> list[int]:
        """Returns at most `length` of the ids of `encode`.

        Special tokens are kept, and the last of the others, or the first for "right".
        """
        encoding = self._encoding(text, add_special_tokens=False)
        added = self._tokenizer.num_special_tokens_to_add(False) + len(self._prefix) if add_special_tokens else 0
        # The library cuts tokens off at the given side, so that the other end of the text is left.
        encoding.truncate(max(length - added, 0), direction=side)
        ids: list[int] = self._tokenizer.post_process(encoding, None, add_special_tokens).ids
        ids = self._prefix + ids if add_special_tokens else ids
        return ids[:length]

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

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token in self._special

    def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        return ids

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        # Of the library's ways to encode, this one keeps no offsets and lets other threads run.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory has a tokenizer's file."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def tiktoken_tokenizer(ranks: Mapping[bytes, int], added: Mapping[int, AddedToken]) -> Tokenizer:
    """Makes Kimi K2's tokenizer from the ranks of its tokens, which are 0, 1, ... and have all single bytes.

    TIKTOKEN_RESERVED ids after them are tokens that are matched as a whole: those of `added`, by id, and names of
    their own for the others. tiktoken merges the two neighbours whose joined bytes have the lowest rank. The library
    merges the pair that stands first in a list: so all ways to part a token in two are listed, by its rank.
    """
    spelling = _byte_spelling()

    def spelt(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in parts if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelt(left), spelt(right)) for left, right in known]
    vocabulary = {spelt(token): rank for token, rank in ranks.items()}
    # A piece of text that is a token by itself is that token, whatever its merges would give: tiktoken does so.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TIKTOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The library numbers them on, in this order.
    tokenizer.add_tokens(
        [
            added.get(token_id) or AddedToken(f"<|reserved_token_{token_id}|>", normalized=False)
            for token_id in range(len(ranks), len(ranks) + TIKTOKEN_RESERVED)
        ]
    )
    return tokenizer


def _byte_spelling() -> list[str]:
    """The character with which byte-level BPE spells each byte: itself where it is visible in Latin-1, else another."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


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


def _read_tiktoken(path: Path, config: Mapping[str, object]) -> Tokenizer:
    """Reads a tiktoken file; its special tokens are in `added_tokens_decoder` of tokenizer_config.json."""
    ranks: dict[bytes, int] = {}
    content = read_bounded(path, TOKENIZER_BYTES_MAX) or b""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path} is not a tiktoken file: line {number} is not a token and its rank."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise CheckpointError(f"{path} is not a tiktoken file: it needs all 256 bytes, and ranks from 0 without gaps.")
    if max(map(len, ranks)) > TIKTOKEN_TOKEN_BYTES_MAX:
        raise CheckpointError(f"{path} has a token of more than {TIKTOKEN_TOKEN_BYTES_MAX} bytes.")
    tokenizer = tiktoken_tokenizer(ranks, _added_tokens(path.parent / TOKENIZER_CONFIG_FILE, config, len(ranks)))
    if tokenizer.get_vocab_size() != len(ranks) + TIKTOKEN_RESERVED:
        raise CheckpointError(f"{path.parent / TOKENIZER_CONFIG_FILE}: added_tokens_decoder names a token twice.")
    return tokenizer


def _added_tokens(path: Path, config: Mapping[str, object], first: int) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder` by id. Raises CheckpointError where an id is not one of the reserved."""
    entries = config.get("added_tokens_decoder", {})
    added: dict[int, AddedToken] = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        text = _token_text(entry)
        if not text or not key.isdecimal() or not first <= int(key) < first + TIKTOKEN_RESERVED:
            raise CheckpointError(
                f"{path}: added_tokens_decoder has {key!r}; give the text of ids from {first} to "
                f"{first + TIKTOKEN_RESERVED - 1}."
            )
        is_special = isinstance(entry, dict) and entry.get("special") is True
        added[int(key)] = AddedToken(text, normalized=False, special=is_special)
    return added


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


def _token_text(value: object) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text as "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
