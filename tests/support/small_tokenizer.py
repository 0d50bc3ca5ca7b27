"""A tokenizer that behaves as DeepSeek's, small enough to be built in a test."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from api.text.tokenizer import TextTokenizer

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
BOS_ID = 0
EOS_ID = 1
MERGES = [
    *(("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("Ã", "¶"), ("â", "Ĥ")),
    ("a", "â"),  # a whole character and the beginning of another in one token
]


def small_tokenizer() -> Tokenizer:
    """Returns a byte-level BPE: the 256 bytes, a few merges, BOS and EOS. Like DeepSeek's own file it adds no BOS."""
    tokens = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=MERGES))
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def small_text_tokenizer() -> TextTokenizer:
    """Returns the small tokenizer as the front end uses it."""
    return TextTokenizer(small_tokenizer(), bos_token=BOS, eos_token=EOS, add_bos=True)


def write_tokenizer(directory: Path, **config: Any) -> None:
    """Writes tokenizer.json, and tokenizer_config.json with `config`."""
    small_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
