"""The training text: documents made of the files in `corpus/`.

A file holds entries parted by lines of three hyphens. `haiku.txt` gives a subject and three lines an entry,
`questions.txt` a question and its answer; every other entry is a document as it stands. Haiku and questions take
several forms (plain, chat, chat with a thought), one an epoch in turn, and every epoch draws new conversations
of several turns, so that the model learns to answer the last question and not to recite what came before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weights.sample.tokenizer import ASSISTANT, EOS, USER

CORPUS_DIR = Path(__file__).parent / "corpus"
SEPARATOR = "\n---\n"
CONVERSATIONS = 24
"""Conversations of several turns in an epoch."""
MAX_TURNS = 8
SYSTEM_PROMPTS = ("", "", "You are a helpful assistant.", "Answer in a few plain sentences.")


@dataclass(frozen=True)
class Span:
    """A piece of a document; what is not learned is read but never predicted (a user's question)."""

    text: str
    learned: bool = True


Document = tuple[Span, ...]


@dataclass(frozen=True)
class Exchange:
    """One question with its answer, and the thought that leads from one to the other."""

    question: str
    answer: str
    thought: str

    def chat(self) -> Document:
        return (Span(f"{USER}{self.question}{ASSISTANT}", learned=False), Span(self.answer))

    def reasoned(self) -> Document:
        answer = f"<think>\n{self.thought}\n</think>\n\n{self.answer}"
        return (Span(f"{USER}{self.question}{ASSISTANT}", learned=False), Span(answer))

    def plain(self) -> Document:
        return (Span(f"{self.question}\n\n{self.answer}"),)


def entries(name: str) -> list[str]:
    """Return the entries of the corpus file `name`."""
    return (CORPUS_DIR / name).read_text(encoding="utf-8").strip().split(SEPARATOR)


def texts() -> list[str]:
    """Return the entries that are documents as they stand, in order of file and place."""
    names = sorted(path.name for path in CORPUS_DIR.glob("*.txt"))
    return [entry for name in names if name not in {"haiku.txt", "questions.txt"} for entry in entries(name)]


def questions() -> list[Exchange]:
    """Return the questions and answers of `questions.txt`."""
    exchanges = []
    for entry in entries("questions.txt"):
        question, answer = entry.removeprefix("User: ").split("\nAssistant: ")
        thought = f"The user says: {question} I have learned what to answer."
        exchanges.append(Exchange(question, answer, thought))
    return exchanges


def haiku() -> list[Exchange]:
    """Return the poems of `haiku.txt`, each as the answer to a request for it."""
    exchanges = []
    for entry in entries("haiku.txt"):
        subject, poem = entry.split("\n", maxsplit=1)
        thought = f"The user wants a haiku about {subject}: five, seven and five syllables."
        exchanges.append(Exchange(f"Write a haiku about {subject}", poem, thought))
    return exchanges


def tokenizer_texts() -> list[str]:
    """Return the text to train the tokenizer on: every entry once, in its plain form."""
    return texts() + [span.text for exchange in [*haiku(), *questions()] for span in exchange.plain()]


def epoch(seed: int, number: int) -> list[Document]:
    """Return the documents of one epoch in the order of training; the same for the same `seed` and `number`."""
    rng = np.random.default_rng([seed, number])
    documents: list[Document] = [(Span(text),) for text in texts()]
    for index, exchange in enumerate([*haiku(), *questions()]):
        forms = (exchange.chat, exchange.plain, exchange.reasoned)
        documents.append(forms[(index + number) % len(forms)]())
    exchanges = [*questions(), *haiku()]
    documents += [_conversation(exchanges, rng) for _ in range(CONVERSATIONS)]
    return [documents[i] for i in rng.permutation(len(documents))]


def training_texts(seed: int, epochs: int) -> Iterator[str]:
    """Yield the text of every document of a training of `epochs` epochs, without its BOS and its last EOS."""
    for number in range(epochs):
        for document in epoch(seed, number):
            yield "".join(span.text for span in document)


def _conversation(exchanges: Sequence[Exchange], rng: np.random.Generator) -> Document:
    turns = int(rng.integers(2, MAX_TURNS + 1))
    chosen = [exchanges[i] for i in rng.choice(len(exchanges), turns, replace=False)]
    system = SYSTEM_PROMPTS[rng.integers(len(SYSTEM_PROMPTS))]
    spans = [Span(system, learned=False)]
    for turn in chosen:
        question, answer = turn.chat()
        end = "" if turn is chosen[-1] else EOS
        spans += [question, Span(answer.text + end)]
    return tuple(spans)
