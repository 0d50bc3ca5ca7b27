"""The questions of the chaos benchmark's clients, and the damage to their answers."""

import difflib
import json
import random
from collections.abc import Hashable, Sequence
from typing import Literal, Protocol

import msgspec

from weights.sample import PROMPTS_FILE

Style = Literal["greedy", "sampled", "two choices", "log-probabilities"]
STYLES: tuple[Style, ...] = ("greedy", "sampled", "greedy", "two choices", "greedy", "log-probabilities")
LENGTHS = (24, 48, 96, 128)
"""The numbers of tokens that answers have."""
PROMPT_CHARACTERS = 1200


class Asked(Protocol):
    """A request whose answer is the same every time."""

    @property
    def path(self) -> str:
        """The route."""

    @property
    def is_streamed(self) -> bool:
        """Whether the body asks for a stream."""

    @property
    def choices(self) -> int:
        """The number of choices."""

    def body(self) -> dict[str, object]:
        """The JSON object of the body."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A body of POST /v1/completions whose answer always has the same tokens."""

    style: Style
    prompt: str
    max_tokens: int
    seed: int

    path = "/v1/completions"
    is_streamed = True

    @property
    def choices(self) -> int:
        """The number of choices."""
        return 2 if self.style == "two choices" else 1

    def __str__(self) -> str:
        return f"{self.style}, {self.max_tokens} tokens after {self.prompt[:40]!r}"

    def body(self) -> dict[str, object]:
        """The JSON object of the body, which asks for a stream."""
        fields: dict[str, object] = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "temperature": 0,
        }
        if self.style in {"sampled", "two choices"}:
            fields |= {"temperature": 1, "top_p": 0.95, "seed": self.seed, "n": self.choices}
        if self.style == "log-probabilities":
            fields |= {"logprobs": 2}
        return fields


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """The number of tokens, or characters of a message, by which an answer differs from the fault-free one."""

    lost: int = 0
    repeated: int = 0
    changed: int = 0

    def __bool__(self) -> bool:
        return bool(self.lost or self.repeated or self.changed)


def questions(count: int, seed: int) -> list[Question]:
    """Makes `count` questions of all styles and lengths, which follow from the seed."""
    draw = random.Random(seed)
    prompts = [entry["prompt"] for entry in json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))]
    return [
        Question(
            style=STYLES[number % len(STYLES)],
            prompt=draw.choice(prompts)[:PROMPT_CHARACTERS],
            max_tokens=draw.choice(LENGTHS),
            seed=draw.randrange(1 << 31),
        )
        for number in range(count)
    ]


def damage(expected: Sequence[Hashable], got: Sequence[Hashable], *, is_whole: bool) -> Damage:
    """The damage to the tokens of an answer, or to a message's characters.

    An answer that its client left half-way (not `is_whole`) may lack its end.
    """
    if not is_whole:
        expected = expected[: len(got)]
    if list(expected) == list(got):
        return Damage()
    lost = repeated = changed = 0
    matcher = difflib.SequenceMatcher(None, list(expected), list(got), autojunk=False)
    for tag, first, end, got_first, got_end in matcher.get_opcodes():
        if tag == "equal":
            continue
        both = min(end - first, got_end - got_first)
        changed += both
        lost += end - first - both
        repeated += got_end - got_first - both
    return Damage(lost=lost, repeated=repeated, changed=changed)
