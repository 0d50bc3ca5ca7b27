"""Kimi K2's tokenizer: a tiktoken file of ranks, which `tokenizers` merges as tiktoken does."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from weights.errors import CheckpointError
from weights.model_config import read_bounded

TOKENIZER_BYTES_MAX = 1 << 27
"""Sixteen times the size of DeepSeek-R1's tokenizer.json."""

TIKTOKEN_FILE = "tiktoken.model"
"""A token in base64 and its rank on each line: what Kimi K2 has in place of tokenizer.json."""

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


def read_tiktoken(path: Path, config: Mapping[str, object]) -> Tokenizer:
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
    described = path.with_name("tokenizer_config.json")
    tokenizer = tiktoken_tokenizer(ranks, _added_tokens(described, config, len(ranks)))
    if tokenizer.get_vocab_size() != len(ranks) + TIKTOKEN_RESERVED:
        raise CheckpointError(f"{described}: added_tokens_decoder names a token twice.")
    return tokenizer


def _added_tokens(path: Path, config: Mapping[str, object], first: int) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder` by id. Raises CheckpointError where an id is not one of the reserved."""
    entries = config.get("added_tokens_decoder", {})
    added: dict[int, AddedToken] = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        text = described_token(entry)
        if not text or not key.isdecimal() or not first <= int(key) < first + TIKTOKEN_RESERVED:
            raise CheckpointError(
                f"{path}: added_tokens_decoder has {key!r}; give the text of ids from {first} to "
                f"{first + TIKTOKEN_RESERVED - 1}."
            )
        is_special = isinstance(entry, dict) and entry.get("special") is True
        added[int(key)] = AddedToken(text, normalized=False, special=is_special)
    return added


def described_token(value: object) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text as "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
