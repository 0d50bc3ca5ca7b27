"""How far the best logit leads the second where the model is decoded greedily."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

BATCH = 8
"""Prompts decoded together, alike in length so that little is spent on padding."""


@dataclass(frozen=True)
class Completion:
    """The greedy continuation of a prompt: its tokens, EOS included where reached, and the lead at each of them."""

    tokens: list[int]
    margins: list[float]


class Reference:
    """A checkpoint as Hugging Face's own model runs it: float32 arithmetic, eager attention and experts.

    Raises:
        OSError: `directory` holds no checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = DeepseekV3ForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )

    def complete(self, prompts: Sequence[str], max_tokens: Sequence[int]) -> list[Completion]:
        """Decode `prompts` greedily, each up to its own limit or EOS; the completions come in their order."""
        texts = [self.tokenizer.encode(prompt) for prompt in prompts]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), BATCH):
            group = order[start : start + BATCH]
            completions = self._decode([texts[i] for i in group], [max_tokens[i] for i in group])
            done.update(zip(group, completions, strict=True))
        return [done[index] for index in range(len(texts))]

    def _decode(self, texts: Sequence[list[int]], limits: Sequence[int]) -> list[Completion]:
        self.tokenizer.padding_side = "left"
        inputs = self.tokenizer.pad({"input_ids": list(texts)}, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.generate(  # type: ignore[misc]
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=max(limits),
                pad_token_id=self.tokenizer.pad_token_id,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.stack(output.logits, dim=1).topk(2).values  # [texts, tokens, 2]
        margins = (best[..., 0] - best[..., 1]).tolist()
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._cut(*row) for row in zip(tokens, margins, limits, strict=True)]

    def _cut(self, tokens: list[int], margins: list[float], limit: int) -> Completion:
        eos = self.tokenizer.eos_token_id
        end = min(limit, tokens.index(eos) + 1 if eos in tokens else limit)
        return Completion(tokens[:end], margins[:end])
