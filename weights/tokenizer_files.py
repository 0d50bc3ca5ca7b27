"""Kimi K2's tokenizer files: a tiktoken file of ranks, and the tokens that tokenizer_config.json adds to them."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from weights.errors import CheckpointError
from weights.model_config import read_bounded

TOKENIZER_FILE = "tokenizer.json"

TOKENIZER_BYTES_MAX = 1 << 27
"""Sixteen times the size of DeepSeek-R1's tokenizer.json."""

TIKTOKEN_FILE = "tiktoken.model"
"""A token in base64 and its rank on each line: what Kimi K2 has in place of tokenizer.json."""

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

CONFIG_BYTES_MAX = 1 << 24

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


class AddedText(NamedTuple):
    """A token that stands beside the ranks: its text, and whether it is left out of decoded text."""

    text: str
    is_special: bool


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a tiktoken file. Raises CheckpointError unless it has all bytes, and ranks from 0 without gaps."""
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
    return ranks


def read_added_texts(path: Path, config: Mapping[str, object], first: int) -> dict[int, AddedText]:
    """The tokens of `added_tokens_decoder` by id; `path` is the file that `config` was read from.

    Raises CheckpointError where an id is not one of the TIKTOKEN_RESERVED from `first` on.
    """
    entries = config.get("added_tokens_decoder", {})
    added: dict[int, AddedText] = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        text = described_token(entry)
        if not text or not key.isdecimal() or not first <= int(key) < first + TIKTOKEN_RESERVED:
            raise CheckpointError(
                f"{path}: added_tokens_decoder has {key!r}; give the text of ids from {first} to "
                f"{first + TIKTOKEN_RESERVED - 1}."
            )
        added[int(key)] = AddedText(text, isinstance(entry, dict) and entry.get("special") is True)
    return added


def reserved_text(token_id: int) -> str:
    """The text of a reserved id that `added_tokens_decoder` does not name."""
    return f"<|reserved_token_{token_id}|>"


def described_token(value: object) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text as "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
