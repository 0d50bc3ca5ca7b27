"""What each token stands for, as grammars need it: read from the files of a tokenizer, without the tokenizer itself."""

import json
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

from stages.errors import GrammarError
from stages.options import VocabularyOptions
from weights.errors import CheckpointError
from weights.model_config import read_bounded
from weights.tokenizer_files import (
    CONFIG_BYTES_MAX,
    TIKTOKEN_FILE,
    TIKTOKEN_PATTERN,
    TIKTOKEN_RESERVED,
    TOKENIZER_BYTES_MAX,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_added_texts,
    read_ranks,
    reserved_text,
)


def load_vocabulary(options: VocabularyOptions) -> LLTokenizer:
    """Reads tokenizer.json or tiktoken.model: a second of one thread for DeepSeek's 129 thousand tokens, and 100 MB.

    Added tokens that look like tags, such as `<think>`, do not belong to a grammar's text: they are there by id alone.
    Raises GrammarError where the files are not there, or cannot be used.
    """
    directory = Path(options.tokenizer)
    try:
        content = read_bounded(directory / TOKENIZER_FILE, TOKENIZER_BYTES_MAX)
        if content is not None:
            return _of_json(json.loads(content), options.eos_token_ids)
        if (directory / TIKTOKEN_FILE).is_file():
            return _of_ranks(directory, options.eos_token_ids)
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GrammarError(f"The tokenizer in {directory} cannot be used for grammars: {error}") from error
    raise GrammarError(f"{directory} has neither {TOKENIZER_FILE} nor {TIKTOKEN_FILE}, which grammars need.")


HIDDEN = "\U000f0000"
"""Stands before the name of a tag: a character for private use, which no grammar's text has."""


def _of_json(tokenizer: Any, eos_token_ids: list[int]) -> LLTokenizer:
    """The vocabulary of a tokenizer.json, whose tags get names that do not occur in text.

    Text that a grammar demands is tokenised as a whole, and would become a tag where it is written like one.
    """
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer.get("added_tokens", []):
        text = token["content"]
        if token["special"] or (text.startswith("<") and text.endswith(">")):
            token["special"] = True
            token["content"] = HIDDEN + text
            if text in vocabulary:
                vocabulary[HIDDEN + text] = vocabulary.pop(text)
    return LLTokenizer(json.dumps(tokenizer), eos_token=_known(eos_token_ids, _size(tokenizer)))


def _size(tokenizer: Any) -> int:
    """The number of tokens, the added ones among them."""
    added = [token["id"] for token in tokenizer.get("added_tokens", [])]
    return int(max([*tokenizer["model"]["vocab"].values(), *added])) + 1


def _of_ranks(directory: Path, eos_token_ids: list[int]) -> LLTokenizer:
    ranks = read_ranks(directory / TIKTOKEN_FILE)
    path = directory / TOKENIZER_CONFIG_FILE
    added = read_added_texts(path, json.loads(read_bounded(path, CONFIG_BYTES_MAX) or b"{}"), len(ranks))
    special = {
        added[token].text if token in added else reserved_text(token): token
        for token in range(len(ranks), len(ranks) + TIKTOKEN_RESERVED)
    }
    tokenizer: LLTokenizer = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]  # the stub lacks it
        encoder=ranks,
        special_tokens=special,
        pattern=TIKTOKEN_PATTERN,
        eos_token=_known(eos_token_ids, len(ranks) + TIKTOKEN_RESERVED),
    )
    return tokenizer


def _known(eos_token_ids: list[int], size: int) -> list[int]:
    """The EOS tokens that the tokenizer has. Raises GrammarError where it has none: no answer could end."""
    known = [token for token in eos_token_ids if 0 <= token < size]
    if not known:
        raise GrammarError("The model has no EOS token that its tokenizer knows: no answer to a grammar could end.")
    return known
