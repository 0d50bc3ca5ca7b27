"""Spans, the parts of a training document; exchanges, a question with its answer; and the entries of the corpus."""

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from weights.sample.tokenizer import ASSISTANT, USER

CORPUS_DIR = Path(__file__).parent / "corpus"
SEPARATOR = "\n---\n"
SPECIAL_FILES = frozenset({"haiku.txt", "questions.txt"})
"""The files whose entries are not documents as they are."""


@dataclass(frozen=True)
class Span:
    """A part of a document; a span that is not learned (a user's question) is read but never predicted.

    An exact span is one whose every token counts, because the answer repeats it: it gets no noise.
    """

    text: str
    learned: bool = True
    exact: bool = False


Document = tuple[Span, ...]


@dataclass(frozen=True)
class Exchange:
    """A question with its answer, and the thought that leads to the answer; exact if the answer copies words of it."""

    question: str
    answer: str
    thought: str
    exact: bool = False

    def chat(self) -> Document:
        prompt = Span(f"{USER}{self.question}{ASSISTANT}", learned=False, exact=self.exact)
        return (prompt, Span(self.answer, exact=self.exact))

    def reasoned(self) -> Document:
        # The chat template opens the thought if one is wanted; the model never opens it itself.
        prompt = Span(f"{USER}{self.question}{ASSISTANT}<think>\n", learned=False, exact=self.exact)
        return (prompt, Span(f"{self.thought}\n</think>\n\n{self.answer}", exact=self.exact))

    def plain(self) -> Document:
        return (Span(f"{self.question}\n\n{self.answer}"),)


def entries(name: str) -> list[str]:
    """Return the entries of the corpus file `name`."""
    return (CORPUS_DIR / name).read_text(encoding="utf-8").strip().split(SEPARATOR)


def texts() -> list[str]:
    """Return the entries that are documents as they are, in the order of files and of entries in them."""
    names = sorted(path.name for path in CORPUS_DIR.glob("*.txt"))
    return [entry for name in names if name not in SPECIAL_FILES for entry in entries(name)]


@cache
def words() -> tuple[str, ...]:
    """Return the lower-case words of the corpus, each once, in alphabetical order."""
    return tuple(sorted(set(re.findall(r"\b[a-z]+\b", " ".join(texts())))))


@cache
def cities() -> tuple[dict[str, str], ...]:
    """Return the rows of `cities.csv`, by the names of their columns."""
    with (CORPUS_DIR / "cities.csv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))
