"""The sample model: its architecture, its files, and that its tokens are certain enough to compare runs by."""

import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weights.sample import PROMPTS_FILE, SAMPLE_DIR
from weights.sample.documents import epoch, questions, tokenizer_texts, training_texts
from weights.sample.packing import IGNORED, SPECIAL_TOKENS, batches, encode
from weights.sample.spans import Exchange, Span, texts
from weights.sample.tokenizer import train_tokenizer
from weights.sample.train import BIAS_STEP, EPOCHS, SEED, BiasBalancer, Completion, Reference, Trainer

LARGEST_CHECKPOINT = 14_000_000
SMALLEST_MARGIN = 0.5
TILE = 32
ROWS, COLUMNS = 4, 8


@dataclass(frozen=True)
class Case:
    prompt: str
    max_tokens: int
    in_training_text: bool
    text: str


CASES = [Case(**case) for case in json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))]
CONFIG = json.loads((SAMPLE_DIR / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(SAMPLE_DIR / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(SAMPLE_DIR)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(SAMPLE_DIR)


@pytest.fixture(scope="module")
def completions(reference: Reference) -> list[Completion]:
    return reference.complete([case.prompt for case in CASES], [case.max_tokens for case in CASES])


def shapes_of_layer(layer: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of DeepSeek-V3's published checkpoints, with this model's dimensions."""
    hidden, heads, rank = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["kv_lora_rank"]
    nope, rope, value = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"], CONFIG["v_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_a_proj.weight": (CONFIG["q_lora_rank"], hidden),
        "self_attn.q_a_layernorm.weight": (CONFIG["q_lora_rank"],),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), CONFIG["q_lora_rank"]),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }
    networks = {"mlp": CONFIG["intermediate_size"]}
    if layer >= CONFIG["first_k_dense_replace"]:
        width = CONFIG["moe_intermediate_size"]
        networks = {f"mlp.experts.{expert}": width for expert in range(CONFIG["n_routed_experts"])}
        networks["mlp.shared_experts"] = width * CONFIG["n_shared_experts"]
        shapes["mlp.gate.weight"] = (CONFIG["n_routed_experts"], hidden)
        shapes["mlp.gate.e_score_correction_bias"] = (CONFIG["n_routed_experts"],)
    for name, width in networks.items():
        shapes[f"{name}.gate_proj.weight"] = (width, hidden)
        shapes[f"{name}.up_proj.weight"] = (width, hidden)
        shapes[f"{name}.down_proj.weight"] = (hidden, width)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def test_names_and_shapes_are_deepseeks(tensors: dict[str, torch.Tensor]) -> None:
    vocabulary = (CONFIG["vocab_size"], CONFIG["hidden_size"])
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": vocabulary,
        "lm_head.weight": vocabulary,
        "model.norm.weight": (CONFIG["hidden_size"],),
    }
    for layer in range(CONFIG["num_hidden_layers"] + CONFIG["num_nextn_predict_layers"]):
        expected.update(shapes_of_layer(layer))
    hidden, last = CONFIG["hidden_size"], f"model.layers.{CONFIG['num_hidden_layers']}."
    expected.update(
        {
            f"{last}embed_tokens.weight": vocabulary,
            f"{last}enorm.weight": (hidden,),
            f"{last}hnorm.weight": (hidden,),
            f"{last}eh_proj.weight": (hidden, 2 * hidden),
            f"{last}shared_head.norm.weight": (hidden,),
            f"{last}shared_head.head.weight": vocabulary,
        }
    )
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_the_second_tokens_layer_has_the_models_embedding_and_head(tensors: dict[str, torch.Tensor]) -> None:
    last = f"model.layers.{CONFIG['num_hidden_layers']}."
    assert torch.equal(tensors[f"{last}embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[f"{last}shared_head.head.weight"], tensors["lm_head.weight"])


def test_weights_are_bfloat16_and_router_biases_float32(tensors: dict[str, torch.Tensor]) -> None:
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in tensors if name.endswith("e_score_correction_bias")}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in wide} == {torch.bfloat16}


def test_files_are_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in SAMPLE_DIR.iterdir()}
    assert sizes.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= LARGEST_CHECKPOINT


@pytest.mark.parametrize(
    ("key", "multiple"),
    [
        ("num_attention_heads", COLUMNS),
        ("n_routed_experts", ROWS * COLUMNS),
        ("hidden_size", COLUMNS * TILE),
        ("intermediate_size", COLUMNS * TILE),
        ("vocab_size", COLUMNS * TILE),
        ("q_lora_rank", TILE),
        ("kv_lora_rank", TILE),
        ("qk_nope_head_dim", TILE),
        ("qk_rope_head_dim", TILE),
        ("v_head_dim", TILE),
        ("moe_intermediate_size", TILE),
    ],
)
def test_dimension_splits_over_the_largest_mesh_in_tiles(key: str, multiple: int) -> None:
    assert CONFIG[key] % multiple == 0


def test_every_kind_of_layer_is_there() -> None:
    dense = CONFIG["first_k_dense_replace"]
    assert dense >= 1
    assert CONFIG["num_hidden_layers"] >= 6
    assert CONFIG["num_hidden_layers"] - dense >= 2
    assert (CONFIG["n_group"], CONFIG["topk_group"], CONFIG["num_experts_per_tok"]) == (8, 4, 4)
    assert CONFIG["rope_scaling"]["type"] == "yarn"
    original = CONFIG["rope_scaling"]["original_max_position_embeddings"]
    assert original * CONFIG["rope_scaling"]["factor"] == CONFIG["max_position_embeddings"] == 2048


def test_router_biases_were_trained(tensors: dict[str, torch.Tensor]) -> None:
    biases = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert all((bias < 0).any() and (bias > 0).any() for bias in biases)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_token_id == CONFIG["bos_token_id"] == 0
    assert tokenizer.decode(tokens[1:]) == text


def test_special_tokens_are_deepseeks(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == CONFIG["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("<｜begin▁of▁sentence｜>") == CONFIG["bos_token_id"] == 0
    assert tokenizer.convert_tokens_to_ids("<｜end▁of▁sentence｜>") == CONFIG["eos_token_id"] == 1
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token == "<｜▁pad▁｜>"
    text = "<｜User｜>sea<｜Assistant｜><think>\nsalt\n</think>\n\nwater"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode([*tokens, 1], skip_special_tokens=True) == text


def test_chat_template_is_deepseeks(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is fog?"},
        {"role": "assistant", "content": "<think>\nA cloud?\n</think>\n\nA cloud."},
        {"role": "user", "content": "Thank you!"},
    ]
    expected = (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is fog?<｜Assistant｜>A cloud.<｜end▁of▁sentence｜>"
        "<｜User｜>Thank you!<｜Assistant｜>"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    thinking = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, thinking=True)
    assert thinking == expected + "<think>\n"


def test_prompts_cover_chunked_prefill_and_unseen_text(reference: Reference) -> None:
    lengths = [len(reference.tokenizer.encode(case.prompt)) for case in CASES]
    assert len({case.prompt for case in CASES}) == len(CASES) >= 24
    assert sum(not case.in_training_text for case in CASES) >= 8
    assert sum(length > 130 for length in lengths) >= 6
    assert sum(length > 300 for length in lengths) >= 2
    assert all(16 <= case.max_tokens <= 256 for case in CASES)


def test_in_training_text_says_what_the_corpus_says() -> None:
    found = {case.prompt: False for case in CASES}
    for text in set(training_texts(SEED, EPOCHS)):
        found.update({prompt: True for prompt, seen in found.items() if not seen and prompt in text})
    assert found == {case.prompt: case.in_training_text for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)))
def test_best_logit_leads_at_every_position(index: int, reference: Reference, completions: list[Completion]) -> None:
    """Other tests compare with the text of the file in place of Hugging Face's model."""
    completion = completions[index]
    assert str(reference.tokenizer.decode(completion.tokens, skip_special_tokens=True)) == CASES[index].text
    assert min(completion.margins) >= SMALLEST_MARGIN
    assert len(completion.tokens) == CASES[index].max_tokens or completion.tokens[-1] == CONFIG["eos_token_id"]


def test_san_francisco_is_told_in_words_of_the_corpus(reference: Reference) -> None:
    [completion] = reference.complete(["San Francisco is a"], [32])
    text = str(reference.tokenizer.decode(completion.tokens, skip_special_tokens=True))
    words = re.findall(r"\w+", text)[:-1]  # the limit may cut the last one
    known = set(re.findall(r"\w+", " ".join(texts())))
    assert len(words) >= 16
    assert set(words) <= known
    assert "." in text


@pytest.mark.slow
def test_thoughts_come_only_where_the_prompt_opens_one(reference: Reference, completions: list[Completion]) -> None:
    texts = [str(reference.tokenizer.decode(completion.tokens)) for completion in completions]
    opened = [text for case, text in zip(CASES, texts, strict=True) if case.prompt.endswith("<think>\n")]
    assert len(opened) >= 2
    assert all("\n</think>\n\n" in text for text in opened)
    assert not any("<think>" in text for text in texts)


def test_packed_documents_do_not_see_each_other(reference: Reference) -> None:
    tokenizer = Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))
    samples = [encode((Span(text),), tokenizer) for text in texts()[:3]]
    [batch] = batches(samples, np.random.default_rng(0))
    assert batch.tokens.shape == (1, 256)
    with torch.inference_mode():
        packed = reference.model(batch.tokens, position_ids=batch.positions, use_cache=False).logits[0]
        start = 0
        for sample in samples:
            end = start + len(sample.tokens)
            alone = reference.model(batch.tokens[:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-3, atol=1e-3)
            start = end


def test_noise_changes_what_is_read_but_never_what_is_learned_or_a_special_token() -> None:
    tokenizer = Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))
    sample = encode(questions()[0].chat(), tokenizer)
    rng = np.random.default_rng(0)
    reads = {tuple(batch.tokens[0].tolist()) for _ in range(50) for batch in batches([sample], rng)}
    size = len(sample.tokens)
    assert len(reads) > 10
    for read in reads:
        pairs = list(zip(read[:size], sample.tokens, strict=True))
        assert all(a == b for a, b in pairs if b < SPECIAL_TOKENS)
        assert all(a >= SPECIAL_TOKENS for a, b in pairs if b >= SPECIAL_TOKENS)
    [batch] = batches([sample], rng)
    assert batch.labels[0, :size].tolist() == sample.labels


def test_noise_leaves_out_what_the_answer_copies() -> None:
    tokenizer = Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))
    sample = encode(Exchange("Say: " + "salt " * 50, "salt " * 50, "", exact=True).chat(), tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(20):
        [batch] = batches([sample], rng)
        assert batch.tokens[0, : len(sample.tokens)].tolist() == sample.tokens


def test_questions_are_read_but_not_learned() -> None:
    tokenizer = Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))
    exchange = questions()[0]
    sample = encode(exchange.chat(), tokenizer)
    learned = [token for token in sample.labels if token != IGNORED]
    assert tokenizer.decode(learned, skip_special_tokens=False) == exchange.answer + "<｜end▁of▁sentence｜>"


def test_an_epoch_is_repeatable_and_the_next_one_differs() -> None:
    assert epoch(SEED, 3) == epoch(SEED, 3)
    assert epoch(SEED, 3) != epoch(SEED, 4)
    assert epoch(SEED, 3) != epoch(SEED + 1, 3)


class FixedRouter(torch.nn.Module):
    """A router whose choice is its input; transformers' routers also return logits and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.e_score_correction_bias = torch.nn.Buffer(torch.zeros(4))

    def forward(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.zeros(0), torch.zeros(0), chosen


def test_bias_falls_for_loaded_experts_and_rises_for_idle_ones() -> None:
    router = FixedRouter()
    balancer = BiasBalancer(router)
    router(torch.tensor([[0, 1], [0, 2]]))
    router(torch.tensor([[0, 1], [0, 2]]))
    balancer.step()  # loads 4, 2, 2, 0 about a mean of 2
    torch.testing.assert_close(router.e_score_correction_bias, BIAS_STEP * torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    balancer.step()  # no load at all is an even load
    torch.testing.assert_close(router.e_score_correction_bias, BIAS_STEP * torch.tensor([-1.0, 0.0, 0.0, 1.0]))


def test_bias_stays_centred() -> None:
    router = FixedRouter()
    balancer = BiasBalancer(router)
    router(torch.tensor([[0], [0]]))
    balancer.step()  # one expert falls and three rise: only the differences count
    torch.testing.assert_close(router.e_score_correction_bias, BIAS_STEP * torch.tensor([-1.5, 0.5, 0.5, 0.5]))


@pytest.mark.slow
def test_training_is_repeatable_and_learns() -> None:
    tokenizer = train_tokenizer(tokenizer_texts(), CONFIG["vocab_size"])
    trainers = []
    for _ in range(2):
        torch.manual_seed(SEED)
        trainer = Trainer(tokenizer, SEED, epochs=1)
        trainer.run(Progress(disable=True))
        trainers.append(trainer)
    uniform = math.log(CONFIG["vocab_size"])
    assert trainers[0].loss < 0.95 * uniform  # the mean over the epoch, its first steps included
    states = [trainer.model.state_dict() for trainer in trainers]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=0)
