"""How far the logits of stages are from those of Hugging Face's model."""

from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM

from tests.support.stage_driver import Driver, relative_error

TOLERANCE = 1e-4
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def prompts(count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token lists of different lengths, on both sides of block borders."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [70, 32, 1, 45, 97, 64][:count]
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def reference_logits(model: DeepseekV3ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocabulary], float32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def worst_error(driver: Driver, model: DeepseekV3ForCausalLM, vocab_size: int, chunk: int | None = 32) -> float:
    """Prefills three prompts of different lengths at once, decodes each by several tokens; the largest error."""
    texts = prompts(3, vocab_size)
    expected = [reference_logits(model, text) for text in texts]
    head = [max(len(text) - 5, 1) for text in texts]
    for slot in range(3):
        driver.admit(slot)
    logits = driver.prefill({slot: text[: head[slot]] for slot, text in enumerate(texts)}, chunk)
    errors = [relative_error(logits[slot], expected[slot][head[slot] - 1]) for slot in range(3)]
    for step in range(5):
        at = {slot: head[slot] + step for slot in (2, 0, 1) if head[slot] + step < len(texts[slot])}
        logits = driver.decode({slot: (position, texts[slot][position]) for slot, position in at.items()})
        errors += [
            relative_error(row, expected[slot][position])
            for row, (slot, position) in zip(logits, at.items(), strict=True)
        ]
    return max(errors)
