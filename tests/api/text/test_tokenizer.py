"""The tokenizer and the incremental decoder, against transformers and against decoding everything at once."""

import base64
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from api.text import tokenizer as tokenizer_module
from api.text.served_model import GenerationConfig
from api.text.tokenizer import HELD_TOKENS_MAX, REPLACEMENT, TextTokenizer
from tests.support.small_tokenizer import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    small_text_tokenizer,
    small_tokenizer,
    write_tokenizer,
)
from weights.errors import CheckpointError
from weights.sample import SAMPLE_DIR

SMALL = small_text_tokenizer()
VOCABULARY = small_tokenizer().get_vocab_size()
TEXTS = ["", "hello", "hello wörld €", " two  spaces ", "1234567", "naïve 🙂\n", f"{EOS}x"]


def pieces(tokens: list[int], skip_special_tokens: bool = True) -> list[str]:
    decoder = SMALL.decoder(skip_special_tokens)
    return [*(decoder.add(token) or "" for token in tokens), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_sample_models_tokenizer_encodes_and_decodes_as_transformers_does(text: str) -> None:
    reference = AutoTokenizer.from_pretrained(SAMPLE_DIR)
    tokenizer = TextTokenizer.load(SAMPLE_DIR)
    tokens = reference.encode(text)
    assert tokenizer.encode(text) == tokens
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.bos_token_id == reference.bos_token_id


def test_bos_is_added_as_tokenizer_config_says_where_tokenizer_json_does_not(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos_token={"content": BOS}, eos_token=EOS, add_bos_token=True)
    with_bos = TextTokenizer.load(tmp_path)
    assert with_bos.encode("h") == [BOS_ID, *SMALL.encode("h", add_special_tokens=False)]
    assert with_bos.encode("h", add_special_tokens=False) == with_bos.encode("h")[1:]
    assert (with_bos.bos_token_id, with_bos.eos_token_id) == (BOS_ID, EOS_ID)
    write_tokenizer(tmp_path, bos_token=BOS, add_bos_token=False)
    assert TextTokenizer.load(tmp_path).encode("h") == with_bos.encode("h")[1:]


def test_a_directory_without_a_usable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Tokenizer files not found in the model directory\. .*Checked: '"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.load(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        TextTokenizer.load(tmp_path)


@settings(deadline=None)
@given(st.text())
@example("a" + REPLACEMENT)
def test_any_text_comes_back_in_whole_characters(text: str) -> None:
    tokens = SMALL.encode(text, add_special_tokens=False)
    parts = pieces(tokens, skip_special_tokens=False)
    # A U+FFFD at the very end cannot be told from a character that is short of bytes.
    assert "".join(parts).rstrip(REPLACEMENT) == text.rstrip(REPLACEMENT)
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in part for part in parts)


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCABULARY + 3), max_size=60))
@example([VOCABULARY - 1] * 50)
def test_any_tokens_give_what_decoding_them_at_once_gives_but_for_an_unfinished_end(tokens: list[int]) -> None:
    joined = "".join(pieces(tokens))
    whole = SMALL.decode(tokens)
    assert whole.startswith(joined)
    assert set(whole[len(joined) :]) <= {REPLACEMENT}


def test_half_a_character_is_held_back_and_comes_with_the_rest_of_it() -> None:
    decoder = SMALL.decoder()
    euro = SMALL.encode("€", add_special_tokens=False)
    assert [decoder.add(token) for token in euro] == [*[None] * (len(euro) - 1), "€"]
    assert decoder.add(euro[0]) is None
    assert decoder.flush() == ""


def test_tokens_without_text_give_none_and_hold_nothing_back() -> None:
    decoder = SMALL.decoder()
    assert [decoder.add(token) for token in (BOS_ID, EOS_ID, VOCABULARY)] == ["", "", ""]
    assert SMALL.decoder(skip_special_tokens=False).add(EOS_ID) == EOS


def test_bytes_that_form_no_character_are_released_in_bounded_time() -> None:
    decoder = SMALL.decoder()
    lead = SMALL.encode("€", add_special_tokens=False)[0]
    released = [decoder.add(lead) for _ in range(3 * HELD_TOKENS_MAX)]
    assert any(released[:HELD_TOKENS_MAX])
    assert sum(map(len, filter(None, released))) >= 3 * HELD_TOKENS_MAX - HELD_TOKENS_MAX


def test_the_generation_config_is_read_as_hugging_face_writes_it(tmp_path: Path) -> None:
    assert GenerationConfig.load(tmp_path) == GenerationConfig()
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.95, "do_sample": true}', encoding="utf-8")
    config = GenerationConfig.load(tmp_path)
    assert (config.eos_token_ids, config.temperature, config.top_p, config.top_k) == ([1, 2], 0.6, 0.95, None)
    file.write_text('{"eos_token_id": 7}', encoding="utf-8")
    assert GenerationConfig.load(tmp_path).eos_token_ids == [7]
    for wrong in (
        '{"temperature": "hot"}',
        '{"temperature": -1}',
        '{"top_p": 0}',
        '{"min_p": 2}',
        '{"max_new_tokens": 0}',
    ):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(CheckpointError, match="is not a generation config"):
            GenerationConfig.load(tmp_path)


def test_the_generation_config_may_be_another_or_none(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for directory, temperature in ((model, 0.6), (other, 0.7)):
        directory.mkdir()
        (directory / "generation_config.json").write_text(f'{{"temperature": {temperature}}}', encoding="utf-8")
    assert GenerationConfig.named("auto", model).temperature == 0.6
    assert GenerationConfig.named("vllm", model) == GenerationConfig()
    assert GenerationConfig.named(str(other), model).temperature == 0.7
    with pytest.raises(CheckpointError, match=r"--generation-config: \S+ has no generation_config\.json"):
        GenerationConfig.named(str(tmp_path), model)


KIMI_PATTERN = regex.compile(
    "|".join(
        [
            r"[\p{Han}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
    regex.V1,
)
"""The pattern that tokenization_kimi.py has as `pat_str`."""

MERGED = [
    "he",
    "ll",
    "hell",
    "hello",
    "lo",
    "llo",
    " w",
    "or",
    "wor",
    " wor",
    "ld",
    "12",
    "23",
    "123",
    "34",
    "aa",
    "aaa",
]
MERGED_BYTES = [text.encode() for text in [*MERGED, "中", "文", "中文", "é", "  "]] + [
    b"\xe4\xb8",
    b"\xb8\xad",
    b"\xf0\x9f",
]
RANKS = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *MERGED_BYTES])}
FIRST_SPECIAL = len(RANKS)
KIMI_SPECIAL = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 9: "<|tool_call_begin|>"}


def write_tiktoken(directory: Path, ranks: Mapping[bytes, int] = RANKS, **config: Any) -> Path:
    """Writes tiktoken.model and tokenizer_config.json, as Kimi K2 has them."""
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    added = {
        str(FIRST_SPECIAL + offset): {"content": text, "special": "tool" not in text}
        for offset, text in KIMI_SPECIAL.items()
    }
    keys = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(keys), encoding="utf-8")
    return directory


def merged_by_rank(text: str) -> list[int]:
    """Encodes plainly as tiktoken does: of each piece it merges the two neighbours of the lowest joined rank."""
    ids = []
    for piece in KIMI_PATTERN.findall(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in RANKS:
            parts = [piece.encode()]
        while True:
            joined = [(RANKS[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in RANKS]
            if not joined:
                break
            at = min(joined)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_tiktoken(tmp_path_factory.mktemp("kimi")))


KIMI_TEXTS = st.one_of(st.text(), st.text(st.sampled_from("helo wrd123aé中文字 '\nSTsx🙂ひ")))


@settings(deadline=None, max_examples=300)
@given(KIMI_TEXTS)
@example("hello world, 12345 中文English混合 I'LL é 🙂  \n\n x")
def test_a_tiktoken_file_gives_the_tokens_that_merging_by_rank_gives(kimi: TextTokenizer, text: str) -> None:
    tokens = kimi.encode(text)
    assert tokens == merged_by_rank(text)
    assert kimi.decode(tokens) == text
    decoder = kimi.decoder()
    assert "".join([*(decoder.add(token) or "" for token in tokens), decoder.flush()]).rstrip(REPLACEMENT) == (
        text.rstrip(REPLACEMENT)
    )


def test_chinese_and_numbers_are_parted_as_kimi_parts_them(kimi: TextTokenizer) -> None:
    assert [kimi.token_text(token) for token in kimi.encode("中文 1234")] == ["中文", " ", "123", "4"]
    # No token holds this character: its bytes are tokens.
    assert kimi.encode("字") == list("字".encode())


def test_special_tokens_follow_the_ranks(kimi: TextTokenizer) -> None:
    assert kimi.size == FIRST_SPECIAL + 256
    assert (kimi.bos_token_id, kimi.eos_token_id) == (FIRST_SPECIAL, FIRST_SPECIAL + 1)
    assert kimi.encode("a<|im_end|><|tool_call_begin|>") == [ord("a"), FIRST_SPECIAL + 2, FIRST_SPECIAL + 9]
    assert kimi.special_ids == [FIRST_SPECIAL, FIRST_SPECIAL + 1, FIRST_SPECIAL + 2]
    assert kimi.decode([ord("a"), FIRST_SPECIAL + 2, FIRST_SPECIAL + 9]) == "a<|tool_call_begin|>"
    assert kimi.token_text(FIRST_SPECIAL + 255) == f"<|reserved_token_{FIRST_SPECIAL + 255}|>"
    assert kimi.encode(kimi.token_text(FIRST_SPECIAL + 100)) == [FIRST_SPECIAL + 100]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "needs all 256 bytes"),
        (b"YQ== 0\nYg==\n", "line 2 is not a token and its rank"),
        (b"YQ= 0\n", "line 1 is not a token"),
        (b"YQ== x\n", "line 1 is not a token"),
        (b"".join(b"%s 7\n" % base64.b64encode(bytes([byte])) for byte in range(256)), "ranks from 0 without gaps"),
        (
            b"".join(
                b"%s %d\n" % (base64.b64encode(token), rank)
                for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b"a" * 1025])
            ),
            "a token of more than 1024 bytes",
        ),
    ],
)
def test_a_tiktoken_file_that_is_not_one_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("added", "sentence"),
    [
        ({"1": {"content": "[BOS]"}}, "added_tokens_decoder has '1'; give the text of ids from"),
        ({str(FIRST_SPECIAL): {}}, f"added_tokens_decoder has '{FIRST_SPECIAL}'"),
        ({str(FIRST_SPECIAL): "x", str(FIRST_SPECIAL + 1): "x"}, "names a token twice"),
        ({str(FIRST_SPECIAL): "he"}, "names a token twice"),
    ],
)
def test_special_tokens_that_contradict_the_ranks_are_refused(
    added: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        TextTokenizer.load(write_tiktoken(tmp_path, added_tokens_decoder=added))


SENTENCES = st.lists(
    st.sampled_from(
        ["hello", "wörld", "€", "12345", "a.", "<｜end▁of▁sentence｜>", "\n", "\n\n", "  ", " ", "x" * 40, "?!"]
    ),
    max_size=60,
).map("".join)
LOADED = TextTokenizer.load(SAMPLE_DIR)


@settings(deadline=None, max_examples=200)
@given(text=SENTENCES, count=st.integers(0, 80), which=st.sampled_from([SMALL, LOADED]))
def test_a_text_in_slices_gives_the_tokens_of_the_whole(text: str, count: int, which: TextTokenizer) -> None:
    """Slices that are short enough to be cut many times, at white space as there is some within each of them."""
    whole = which.encode(text, add_special_tokens=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "SLICE_CHARACTERS", 100)
        patch.setattr(tokenizer_module, "SEAM_SEARCHED", 90)
        cuts = [*which._slices(text)]
        assert "".join(cuts) == text == "".join(reversed([*which._slices_from_end(text)]))
        is_sound = which.encode(text, add_special_tokens=False) == whole
        # A slice without white space at which it may be cut is cut anyway.
        assert is_sound or any(len(cut) == 100 for cut in cuts)
        if is_sound:
            assert which.encode_part(text, count, "right", add_special_tokens=False) == whole[:count]
        if all(len(cut) < 100 for cut in which._slices_from_end(text)):
            assert which.encode_part(text, count, "left", False) == whole[len(whole) - min(count, len(whole)) :]


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_long_text_only_what_is_kept_is_tokenised(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenised: list[int] = []
    encoded = TextTokenizer._encoded

    def counting(self: TextTokenizer, text: str, add_special_tokens: bool) -> list[int]:
        tokenised.append(len(text))
        return encoded(self, text, add_special_tokens)

    monkeypatch.setattr(TextTokenizer, "_encoded", counting)
    text = ("ab" * 50 + " ") * 100_000
    assert len(LOADED.encode_part(text, 5, side)) == 5
    assert sum(tokenised) < 2 * tokenizer_module.SLICE_CHARACTERS
    tokenised.clear()
    assert len(LOADED.encode("ab" * (1 << 20), most=10)) > 10
    assert sum(tokenised) < 2 * tokenizer_module.SLICE_CHARACTERS


def test_a_long_text_may_be_given_up_between_slices() -> None:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        LOADED.encode("a word and another. " * 100_000, check=check)
    assert checks == 3
