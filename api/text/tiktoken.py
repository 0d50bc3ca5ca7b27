"""Kimi K2's tokenizer: a tiktoken file of ranks, which `tokenizers` merges as tiktoken does."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from weights.errors import CheckpointError
from weights.tokenizer_files import (
    TIKTOKEN_PATTERN,
    TIKTOKEN_RESERVED,
    TOKENIZER_CONFIG_FILE,
    read_added_texts,
    read_ranks,
    reserved_text,
)


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
            added.get(token_id) or AddedToken(reserved_text(token_id), normalized=False)
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
    ranks = read_ranks(path)
    described = path.with_name(TOKENIZER_CONFIG_FILE)
    added = {
        token: AddedToken(text, normalized=False, special=is_special)
        for token, (text, is_special) in read_added_texts(described, config, len(ranks)).items()
    }
    tokenizer = tiktoken_tokenizer(ranks, added)
    if tokenizer.get_vocab_size() != len(ranks) + TIKTOKEN_RESERVED:
        raise CheckpointError(f"{described}: added_tokens_decoder names a token twice.")
    return tokenizer
