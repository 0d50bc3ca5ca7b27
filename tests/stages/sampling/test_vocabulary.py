"""What grammars know of a tokenizer's files."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from stages.errors import GrammarError
from stages.options import VocabularyOptions
from stages.sampling.vocabulary import load_vocabulary
from tests.support.grammar_answers import TOKENIZER, TOKENS
from weights.sample import SAMPLE_DIR


def options(directory: Path, *eos: int) -> VocabularyOptions:
    return VocabularyOptions(tokenizer=str(directory), eos_token_ids=list(eos))


def test_it_has_the_tokens_of_the_tokenizer_and_its_text_becomes_the_same_ones() -> None:
    assert TOKENS.vocab_size == TOKENIZER.size
    text = 'San Francisco is a {"city": "é😀"}'
    assert TOKENS.tokenize_str(text) == TOKENIZER.encode(text, add_special_tokens=False)


def test_tags_are_special_and_text_that_looks_like_them_is_text() -> None:
    tag = TOKENIZER.token_id("<think>")
    assert tag is not None
    assert TOKENS.is_special_token(tag)
    assert tag not in TOKENS.tokenize_str("<think>")
    assert b"".join(TOKENS.decode_bytes([token]) for token in TOKENS.tokenize_str("<think>")) == b"<think>"


def test_eos_tokens_that_the_tokenizer_does_not_have_are_left_out() -> None:
    assert load_vocabulary(options(SAMPLE_DIR, 1, 9999)).eos_tokens == [1]
    with pytest.raises(GrammarError, match="no EOS token"):
        load_vocabulary(options(SAMPLE_DIR, 9999))


def test_kimis_files_are_read(tmp_path: Path) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"hello"]
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines))
    added = {"258": {"content": "[EOS]", "special": True}, "260": {"content": "<think>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    vocabulary = load_vocabulary(options(tmp_path, 258))
    assert vocabulary.vocab_size == 258 + 256
    assert vocabulary.eos_tokens == [258]
    assert vocabulary.tokenize_str("hello") == [257]
    assert vocabulary.is_special_token(260)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": []}}', '{"model": 1, "added_tokens": 3}'])
def test_what_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="has neither"):
        load_vocabulary(options(tmp_path, 1))
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(GrammarError, match="cannot be used for grammars"):
        load_vocabulary(options(tmp_path, 1))


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    shutil.copyfile(SAMPLE_DIR / "tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(GrammarError, match="cannot be used for grammars"):
        load_vocabulary(options(tmp_path, 1))
