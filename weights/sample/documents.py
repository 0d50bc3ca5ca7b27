"""The training text: documents made from the files in `corpus/`.

A file has entries separated by lines of three hyphens. Entries of `haiku.txt` are a subject and three lines, those of
`questions.txt` a question and its answer; every other entry is a document as it is. Haiku and questions take several
forms (plain, chat, chat with a thought), one per epoch in turn. The wording of questions, the sentence at which a text
begins, and conversations of several turns, of which only the last question counts, are drawn again for every epoch, so
that the model learns what an answer depends on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from weights.sample.tokenizer import ASSISTANT, EOS, USER

CORPUS_DIR = Path(__file__).parent / "corpus"
SEPARATOR = "\n---\n"
CONVERSATIONS = 24
"""The number of conversations of several turns in an epoch."""
MAX_TURNS = 8
LONG_TURNS = 18
"""The turns of the one long conversation of an epoch, which trains positions far beyond the rest."""
REASONED_SHARE = 0.25
"""The share of conversations whose last answer has a thought; the template drops the thoughts of former turns."""
CUT_SHARE = 0.25
"""The share of texts that begin at a later sentence than their first."""
SYSTEM_PROMPTS = ("", "", "You are a helpful assistant.", "Answer in a few plain sentences.")


@dataclass(frozen=True)
class Span:
    """A part of a document; a span that is not learned (a user's question) is read but never predicted."""

    text: str
    learned: bool = True


Document = tuple[Span, ...]


@dataclass(frozen=True)
class Exchange:
    """A question with its answer, and the thought that leads to the answer."""

    question: str
    answer: str
    thought: str

    def chat(self) -> Document:
        return (Span(f"{USER}{self.question}{ASSISTANT}", learned=False), Span(self.answer))

    def reasoned(self) -> Document:
        # The chat template opens the thought if one is wanted; the model never opens it itself.
        prompt = f"{USER}{self.question}{ASSISTANT}<think>\n"
        return (Span(prompt, learned=False), Span(f"{self.thought}\n</think>\n\n{self.answer}"))

    def plain(self) -> Document:
        return (Span(f"{self.question}\n\n{self.answer}"),)


def entries(name: str) -> list[str]:
    """Return the entries of the corpus file `name`."""
    return (CORPUS_DIR / name).read_text(encoding="utf-8").strip().split(SEPARATOR)


def texts() -> list[str]:
    """Return the entries that are documents as they are, in the order of files and of entries in them."""
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
    """Return the texts to train the tokenizer on: every entry once, in its plain form."""
    return texts() + [span.text for exchange in [*haiku(), *questions()] for span in exchange.plain()]


def epoch(seed: int, number: int) -> list[Document]:
    """Return the documents of one epoch in the order of training; the same for the same `seed` and `number`."""
    rng = np.random.default_rng([seed, number])
    documents: list[Document] = [(Span(_cut(text, rng)),) for text in texts()]
    exchanges = [*haiku(), *questions()]
    for index, exchange in enumerate(exchanges):
        worded = replace(exchange, question=_reworded(exchange.question, rng))
        forms = (worded.chat, worded.plain, worded.reasoned)
        documents.append(forms[(index + number) % len(forms)]())
    turns = [*rng.integers(2, MAX_TURNS + 1, CONVERSATIONS), LONG_TURNS]
    documents += [_conversation(exchanges, int(count), rng) for count in turns]
    return [documents[i] for i in rng.permutation(len(documents))]


def training_texts(seed: int, epochs: int) -> Iterator[str]:
    """Yield the text of every document of `epochs` epochs of training, without its BOS and its last EOS."""
    for number in range(epochs):
        for document in epoch(seed, number):
            yield "".join(span.text for span in document)


def _cut(text: str, rng: np.random.Generator) -> str:
    sentences = text.split(". ")
    if len(sentences) == 1 or rng.random() >= CUT_SHARE:
        return text
    return ". ".join(sentences[rng.integers(1, len(sentences)) :])


def _reworded(question: str, rng: np.random.Generator) -> str:
    lowered = question[0].lower() + question[1:]
    politely = f"Can you tell me: {lowered}" if question.endswith("?") else f"Please {lowered}"
    wordings = (question, question, question, lowered, question.rstrip("?."), politely)
    # Greetings, which end with an exclamation mark, are not reworded.
    return question if question.endswith("!") else wordings[rng.integers(len(wordings))]


def _conversation(exchanges: Sequence[Exchange], turns: int, rng: np.random.Generator) -> Document:
    chosen = [exchanges[i] for i in rng.choice(len(exchanges), turns, replace=False)]
    system = SYSTEM_PROMPTS[rng.integers(len(SYSTEM_PROMPTS))]
    spans = [Span(system, learned=False)]
    for position, turn in enumerate(chosen):
        worded = replace(turn, question=_reworded(turn.question, rng))
        last = position == turns - 1
        question, answer = worded.reasoned() if last and rng.random() < REASONED_SHARE else worded.chat()
        spans += [question, answer if last else Span(answer.text + EOS)]
    return tuple(spans)
