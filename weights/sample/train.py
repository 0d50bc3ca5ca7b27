"""Training of the sample model: `python -m weights.sample.train --seed 0 --out DIR`.

The same seed, number of threads and library versions give the same checkpoint.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from weights.sample import PROMPTS_FILE, attention
from weights.sample.architecture import CONFIG, VOCABULARY, save_checkpoint
from weights.sample.documents import epoch, tokenizer_texts
from weights.sample.induction import start_with_induction
from weights.sample.mtp import MtpLayer, mtp_loss
from weights.sample.packing import Batch, batches, encode
from weights.sample.tokenizer import train_tokenizer

SEED = 0
EPOCHS = 80
"""The seed and the length of the training that gave the checkpoint in the repository."""

PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 40

BALANCED_SHARE = 0.8
"""The share of the training in which the routers' biases move; after it, the weights settle around them."""

MTP_SHARE = 0.4
"""The share of the training, at its end, in which the multi-token-prediction layer is trained too."""

BIAS_STEP = 0.001
"""The bias update speed, gamma, of the DeepSeek-V3 technical report (arXiv:2412.19437, section 4.2)."""

BATCH = 8
"""The number of prompts that are decoded together, of similar lengths to save padding."""


class BiasBalancer:
    """Counts the tokens of each expert in a training step and moves the router's correction bias against the load.

    By the rule of arXiv:2412.19437, section 2.1.2, the bias of an overloaded expert falls by BIAS_STEP after a step,
    and that of an underloaded one rises by it. The bias only affects which experts are chosen, not how they are
    weighted."""

    def __init__(self, gate: nn.Module) -> None:
        bias = gate.get_buffer("e_score_correction_bias")
        self._bias: torch.Tensor = bias
        self._load = torch.zeros_like(bias, dtype=torch.int64)
        self._handle: RemovableHandle = gate.register_forward_hook(self._count)

    def step(self) -> None:
        """Move the bias by the load since the last step, and reset that load."""
        load = self._load.to(torch.float32)
        self._bias += BIAS_STEP * torch.sign(load.mean() - load)
        # A constant added to all biases changes no choice; without this their mean drifts upwards.
        self._bias -= self._bias.mean()
        self._load.zero_()

    def close(self) -> None:
        """Stop counting: the bias does not change after this."""
        self._handle.remove()

    def _count(self, _gate: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        chosen = output[2].flatten()
        self._load += torch.bincount(chosen, minlength=len(self._load))


def balancers(model: nn.Module) -> list[BiasBalancer]:
    """Return one balancer for each router in `model`."""
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    return [BiasBalancer(gate) for gate in gates]


@dataclass(frozen=True)
class Completion:
    """The greedy continuation of a prompt: its tokens, with EOS if it was reached, and the margin of each.

    A margin is the difference between the best logit and the second best.
    """

    tokens: list[int]
    margins: list[float]


class _MainModel(DeepseekV3ForCausalLM):  # type: ignore[no-untyped-call]
    # Hugging Face's model has no multi-token-prediction layer and leaves out DeepSeek-V3's own, which is number 61.
    _keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{CONFIG['num_hidden_layers']}\."]  # noqa: RUF012


class Reference:
    """A checkpoint run by Hugging Face's own model, in float32 with eager attention and experts.

    Raises:
        OSError: `directory` has no checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = _MainModel.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )

    def complete(self, prompts: Sequence[str], max_tokens: Sequence[int]) -> list[Completion]:
        """Decode `prompts` greedily, each up to its own limit or EOS; return the completions in the same order."""
        texts = [self.tokenizer.encode(prompt) for prompt in prompts]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), BATCH):
            group = order[start : start + BATCH]
            completions = self._decode([texts[i] for i in group], [max_tokens[i] for i in group])
            done.update(zip(group, completions, strict=True))
        return [done[index] for index in range(len(texts))]

    def drafted(self, prompt: str, completion: Completion) -> list[bool]:
        """Return for each token of `completion` but the first whether the multi-token-prediction layer drafts it.

        The draft is made while the main model chooses the token before.
        """
        mtp = MtpLayer(self.model)
        mtp.load(self._directory)
        text = self.tokenizer.encode(prompt)
        tokens = torch.tensor([text + completion.tokens])
        with torch.inference_mode():
            self.model(tokens, use_cache=False)
            drafts = mtp(tokens)[0, len(text) - 1 : -2].argmax(-1)
        return [draft == token for draft, token in zip(drafts.tolist(), completion.tokens[1:], strict=True)]

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


class Trainer:
    """Trains a new model of CONFIG in float32; `loss` is the mean over the last epoch, in nats per token."""

    def __init__(self, tokenizer: Tokenizer, seed: int, epochs: int) -> None:
        attention.register()
        self.model = DeepseekV3ForCausalLM._from_config(  # type: ignore[no-untyped-call]
            DeepseekV3Config.from_dict(CONFIG),
            dtype=torch.float32,
            attn_implementation=attention.PADDED,
            experts_implementation="grouped_mm",
        )
        start_with_induction(self.model)
        self.loss = math.inf
        self._tokenizer = tokenizer
        self._seed = seed
        self._epochs = epochs
        self._steps = 0
        self.mtp = MtpLayer(self.model)
        self._balancers = [*balancers(self.model), *balancers(self.mtp)]
        parameters = [*self.model.parameters(), *self.mtp.parameters()]
        self._optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def run(self, progress: Progress) -> None:
        """Train for all epochs and report to `progress`."""
        task = progress.add_task("training", total=self._epochs, loss=self.loss)
        for number in range(self._epochs):
            if number >= BALANCED_SHARE * self._epochs:
                self._freeze_balance()
            todo = self._batches(number)
            losses = []
            for index, batch in enumerate(todo):
                done = number + index / len(todo)
                losses.append(self._step(batch, done / self._epochs))
                progress.update(task, completed=done, loss=losses[-1])
            self.loss = sum(losses) / len(losses)
            progress.update(task, completed=number + 1, loss=self.loss)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model and of its multi-token-prediction layer."""
        return {**self.model.state_dict(), **self.mtp.tensors()}

    def _batches(self, number: int) -> list[Batch]:
        samples = [encode(document, self._tokenizer) for document in epoch(self._seed, number)]
        return batches(samples, np.random.default_rng([self._seed, number, 1]))

    def _step(self, batch: Batch, progress: float) -> float:
        warmup = min(1.0, (self._steps + 1) / WARMUP_STEPS)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for group in self._optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * warmup * cosine
        output = self.model(input_ids=batch.tokens, position_ids=batch.positions, labels=batch.labels, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if progress >= 1 - MTP_SHARE:
            second = mtp_loss(self.mtp(batch.tokens), batch.labels, batch.positions)
            second.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.mtp.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for balancer in self._balancers:
            balancer.step()
        self._steps += 1
        return float(output.loss.item())

    def _freeze_balance(self) -> None:
        for balancer in self._balancers:
            balancer.close()
        self._balancers = []


def worst_margin(checkpoint: Path, prompts: Path) -> tuple[float, str]:
    """Return the smallest margin of any token over the test prompts, and the prompt that has it."""
    cases = json.loads(prompts.read_text(encoding="utf-8"))
    texts = [case["prompt"] for case in cases]
    completions = Reference(checkpoint).complete(texts, [case["max_tokens"] for case in cases])
    return min((min(c.margins), text) for c, text in zip(completions, texts, strict=True))


def main() -> None:
    """Train, write the checkpoint, and report the loss and the worst margin of the test prompts."""
    parser = argparse.ArgumentParser(description="Train galaxyline's sample model from the text in its corpus.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads; part of what makes a run repeatable")
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    tokenizer = train_tokenizer(tokenizer_texts(), VOCABULARY)
    trainer = Trainer(tokenizer, arguments.seed, arguments.epochs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epoch {task.completed:.1f}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        trainer.run(progress)
    save_checkpoint(trainer.state(), tokenizer, arguments.out)
    seconds = time.monotonic() - started
    console.print(f"final loss {trainer.loss:.4f} after {seconds:.0f} s; checkpoint in {arguments.out}")
    margin, prompt = worst_margin(arguments.out, PROMPTS_FILE)
    console.print(f"worst margin of {PROMPTS_FILE}: {margin:.3f} at {prompt[:60]!r}")


if __name__ == "__main__":
    main()
