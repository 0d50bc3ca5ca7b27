"""The routes that turn text into tokens and back."""

from pathlib import Path

import msgspec
import pytest
from transformers import AutoTokenizer

from api.messages.engine import EngineState
from api.text.tokenizer import TextTokenizer
from tests.support.api_client import client, error_of
from tests.support.api_server import MODEL, TEXT, TEXT_TOKENS, endless_text
from tests.support.fake_engine import FakeEngine
from tests.support.small_tokenizer import BOS, BOS_ID, EOS, EOS_ID, write_tokenizer
from weights.sample import SAMPLE_DIR

SAMPLE = msgspec.structs.replace(MODEL, tokenizer=TextTokenizer.load(SAMPLE_DIR), vocab_size=1024, max_model_len=2048)


async def test_text_to_tokens_and_back() -> None:
    engine = FakeEngine(endless_text)
    engine.state = EngineState(phase="loading", detail="")
    async with client(engine) as opened:
        response = await opened.post("/tokenize", json={"model": "small", "prompt": TEXT})
        tokens = [BOS_ID, *TEXT_TOKENS]
        assert response.json() == {
            "count": len(tokens),
            "max_model_len": 256,
            "tokens": tokens,
            "token_strs": None,
        }
        response = await opened.post("/detokenize", json={"tokens": [*tokens, EOS_ID]})
        assert response.json() == {"prompt": BOS + TEXT + EOS}


@pytest.mark.parametrize("text", ["", "San Francisco", "naïve 🙂", f"{EOS}x" * 3000])
async def test_tokens_are_those_of_transformers(text: str) -> None:
    reference = AutoTokenizer.from_pretrained(SAMPLE_DIR)
    async with client(FakeEngine(endless_text), SAMPLE) as opened:
        for add_special_tokens in (True, False, None):
            body = {"prompt": text, "add_special_tokens": add_special_tokens, "return_token_strs": True}
            answer = (await opened.post("/tokenize", json=body)).json()
            tokens = reference.encode(text, add_special_tokens=add_special_tokens is not False)
            assert answer["tokens"] == tokens
            assert answer["token_strs"] == reference.convert_ids_to_tokens(tokens)
            answer = (await opened.post("/detokenize", json={"tokens": tokens})).json()
            assert answer["prompt"] == reference.decode(tokens)


async def test_a_conversation_gives_the_tokens_that_chat_computes() -> None:
    fields = {"messages": [{"role": "user", "content": "naïve 🙂"}], "chat_template_kwargs": {"thinking": True}}
    engine = FakeEngine(lambda _: [1])
    async with client(engine, SAMPLE) as opened:
        answer = (await opened.post("/tokenize", json=fields)).json()
        await opened.post("/v1/chat/completions", json=fields)
        with_bos = (await opened.post("/tokenize", json={**fields, "add_special_tokens": True})).json()
    assert answer["tokens"] == engine.streams[0].request.tokens
    assert with_bos["tokens"] == [0, *answer["tokens"]]


async def test_what_cannot_be_read_is_refused() -> None:
    async with client(FakeEngine(endless_text)) as opened:
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": [1]}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": None}, "tokens"),
            ("/detokenize", {"tokens": ["a"]}, "tokens"),
            ("/detokenize", {"tokens": [300]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
        ):
            assert error_of(await opened.post(path, json=body), 400)["param"] == param
        for path, field in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
            error_of(await opened.post(path, json={**field, "model": "large"}), 404)
        schema = (await opened.get("/openapi.json")).json()
        content = schema["paths"]["/detokenize"]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/DetokenizeRequest"}
        assert "tokens" in schema["components"]["schemas"]["DetokenizeRequest"]["properties"]


async def test_the_tokenizers_own_file_is_shown_with_each_token_as_its_text(tmp_path: Path) -> None:
    described = {"content": BOS, "lstrip": False}
    write_tokenizer(
        tmp_path, bos_token=described, eos_token=EOS, extra_special_tokens=[described, "x"], nested={"a": 1}
    )
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    model = msgspec.structs.replace(MODEL, tokenizer=TextTokenizer.load(tmp_path))
    async with client(FakeEngine(endless_text), model) as opened:
        assert (await opened.get("/tokenizer_info")).json() == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "extra_special_tokens": [BOS, "x"],
            "nested": {"a": 1},
            "chat_template": "{{ messages }}",
        }
    async with client(FakeEngine(endless_text), SAMPLE) as opened:
        info = (await opened.get("/tokenizer_info")).json()
        assert (info["eos_token"], info["tokenizer_class"]) == (EOS, "PreTrainedTokenizerFast")
        assert "messages" in info["chat_template"]
