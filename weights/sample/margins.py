"""How far the best logit leads the second where the model is decoded greedily.

Where the lead is wide, two runs that differ in the last bits of their sums still print the same text.
"""

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
        width = max(len(text) for text in texts)
        pad = self.tokenizer.pad_token_id
        step = torch.tensor([[pad] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = None
        tokens, margins = [], []
        for _ in range(max(limits)):
            with torch.inference_mode():
                output = self.model(
                    step,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            cache = output.past_key_values
            best = output.logits[:, -1].topk(2)
            tokens.append(best.indices[:, 0])
            margins.append(best.values[:, 0] - best.values[:, 1])
            step = best.indices[:, :1]
            mask = torch.cat([mask, torch.ones(len(texts), 1, dtype=mask.dtype)], dim=1)
            positions = positions[:, -1:] + 1
        columns = (torch.stack(tokens, 1).tolist(), torch.stack(margins, 1).tolist(), limits)
        return [self._cut(*row) for row in zip(*columns, strict=True)]

    def _cut(self, tokens: list[int], margins: list[float], limit: int) -> Completion:
        eos = self.tokenizer.eos_token_id
        end = min(limit, tokens.index(eos) + 1 if eos in tokens else limit)
        return Completion(tokens[:end], margins[:end])
