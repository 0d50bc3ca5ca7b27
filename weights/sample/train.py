"""Train the sample model: `python -m weights.sample.train --seed 0 --out DIR`.

The same seed, number of threads and library versions give the same checkpoint.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from weights.sample.architecture import CONFIG, VOCABULARY
from weights.sample.balance import balancers
from weights.sample.documents import epoch, tokenizer_texts
from weights.sample.export import save_checkpoint
from weights.sample.margins import Reference
from weights.sample.packing import Batch, batches, encode
from weights.sample.tokenizer import train_tokenizer

SEED = 0
EPOCHS = 60
"""The seed and length of the training that gave the checkpoint in the repository."""
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 40
BALANCED_SHARE = 0.8
"""The routers' biases stand still for the rest of the training, so that the weights settle around them."""
PROMPTS = Path("tests/data/prompts.json")


class Trainer:
    """Trains a new model of CONFIG in float32; `loss` is the mean over the last epoch, in nats a token."""

    def __init__(self, tokenizer: Tokenizer, seed: int, epochs: int) -> None:
        self.model = DeepseekV3ForCausalLM._from_config(  # type: ignore[no-untyped-call]
            DeepseekV3Config.from_dict(CONFIG),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="grouped_mm",
        )
        self.loss = math.inf
        self._tokenizer = tokenizer
        self._seed = seed
        self._epochs = epochs
        self._steps = 0
        self._balancers = balancers(self.model)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def run(self, progress: Progress) -> None:
        """Train through all epochs, and show where it stands in `progress`."""
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
    """Return the smallest lead of a best logit over the test prompts, and the prompt where it is."""
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
    save_checkpoint(trainer.model.state_dict(), tokenizer, arguments.out)
    seconds = time.monotonic() - started
    console.print(f"final loss {trainer.loss:.4f} after {seconds:.0f} s; checkpoint in {arguments.out}")
    if PROMPTS.exists():
        margin, prompt = worst_margin(arguments.out, PROMPTS)
        console.print(f"worst margin of {PROMPTS}: {margin:.3f} at {prompt[:60]!r}")


if __name__ == "__main__":
    main()
