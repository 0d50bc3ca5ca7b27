"""The training text: documents made from the files in `corpus/`.

A file has entries separated by lines of three hyphens. Entries of `haiku.txt` are a subject and three lines, those of
`questions.txt` a question and its answer; every other entry is a document as it is. Haiku and questions take several
forms (plain, chat, chat with a thought), one per epoch in turn. The wording of questions, the sentence at which a text
begins, sentences to repeat, tools, and conversations of several turns are drawn again for every epoch, so that the
model learns what an answer depends on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from weights.sample import exercises, tools
from weights.sample.spans import Document, Exchange, Span, entries, texts
from weights.sample.tokenizer import EOS

CONVERSATIONS = 12
"""The number of conversations of several turns in an epoch."""
MAX_TURNS = 8
LONG_TURNS = 14
"""The turns of the one long conversation of an epoch, which trains positions far beyond the rest."""
REASONED_SHARE = 0.25
"""The share of conversations whose last answer has a thought; the template drops the thoughts of former turns."""
TEXT_PERIOD, TEXT_EPOCHS = 5, 3
"""A text is in TEXT_EPOCHS of TEXT_PERIOD epochs; that is enough to learn it by heart."""
CUT_SHARE = 0.25
"""The share of texts that begin at a later sentence than their first."""
EXERCISE_SHARE = 0.2
"""The share of turns that are exercises, which are made anew every time."""
SYSTEM_PROMPTS = ("", "", "You are a helpful assistant.", "Answer in a few plain sentences.")

ECHOES = 56
"""The number of conversations of repeated sentences in an epoch."""
MAX_ECHO_TURNS = 5
DESCRIBED = 26
"""The number of conversations about cities in JSON in an epoch."""
MAX_DESCRIBED_TURNS = 4
TOOL_CONVERSATIONS = 52
TOOL_TURNS = (1, 1, 1, 2, 2, 3)
TOOL_REASONED_SHARE = 0.3
WITHOUT_TOOLS = 5
"""The number of questions in an epoch that would need a tool, without tools."""
LONG_ANSWERS = 4
"""The number of stories and essays in an epoch that answer a question."""

LONG_REQUESTS = (
    ("Tell me a long story about {}.", "Tell me a long story about {}.", "Write a long story about {}."),
    ("Write an essay about {}.", "Write an essay about {}.", "Write a long essay about {}."),
)
STORIES = (
    "the lighthouse keeper",
    "a baker",
    "seven clocks",
    "a machine that counts the stars",
    "a woman who mends things",
    "a river",
    "the night train",
    "a mouse",
)
"""The subjects of the entries of `stories.txt`."""
ESSAYS = (("the sea", "sea.txt"), ("pipelines", "pipelines.txt"), ("the weather", "weather.txt"))
ESSAY_ENTRIES = 5


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


def long_answers() -> list[tuple[str, str, int]]:
    """Return the subjects of long answers with the answer of each and the place of its wordings in LONG_REQUESTS."""
    stories = [(subject, text, 0) for subject, text in zip(STORIES, entries("stories.txt"), strict=True)]
    essays = [
        (subject, "\n\n".join([f"An essay about {subject}.", *entries(name)[:ESSAY_ENTRIES]]), 1)
        for subject, name in ESSAYS
    ]
    return [*stories, *essays]


def tokenizer_texts() -> list[str]:
    """Return the texts to train the tokenizer on: every entry once, in its plain form, and what tools look like."""
    plain = [span.text for exchange in [*haiku(), *questions()] for span in exchange.plain()]
    return [*texts(), *plain, *tools.tokenizer_texts()]


def epoch(seed: int, number: int) -> list[Document]:
    """Return the documents of one epoch in the order of training; the same for the same `seed` and `number`."""
    rng = np.random.default_rng([seed, number])
    due = [text for index, text in enumerate(texts()) if (index + number) % TEXT_PERIOD < TEXT_EPOCHS]
    documents: list[Document] = [(Span(_cut(text, rng)),) for text in due]
    exchanges = [*haiku(), *questions()]
    for index, exchange in enumerate(exchanges):
        worded = replace(exchange, question=_reworded(exchange.question, rng))
        forms = (worded.chat, worded.plain, worded.reasoned)
        documents.append(forms[(index + number) % len(forms)]())
    turns = [*rng.integers(2, MAX_TURNS + 1, CONVERSATIONS), LONG_TURNS]
    documents += [_conversation(_mixed(exchanges, int(count), rng), rng) for count in turns]
    for _ in range(ECHOES):
        documents.append(_conversation([exercises.echo(rng) for _ in range(rng.integers(1, MAX_ECHO_TURNS + 1))], rng))
    for _ in range(DESCRIBED):
        count = rng.integers(1, MAX_DESCRIBED_TURNS + 1)
        documents.append(_conversation([exercises.city_as_json(rng) for _ in range(count)], rng))
    documents += [_tool_conversation(exchanges, rng) for _ in range(TOOL_CONVERSATIONS)]
    documents += [_conversation([tools.without_tools(rng)], rng) for _ in range(WITHOUT_TOOLS)]
    requests = long_answers()
    for index in range(LONG_ANSWERS):
        subject, text, kind = requests[(number * LONG_ANSWERS + index) % len(requests)]
        question = LONG_REQUESTS[kind][rng.integers(len(LONG_REQUESTS[kind]))].format(subject)
        documents.append(Exchange(question, text, "").chat())
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
    if question == "Tell me a story." and rng.random() < 0.3:
        return "Tell me a long story."  # a story about nothing in particular is the short one
    lowered = question[0].lower() + question[1:]
    politely = f"Can you tell me: {lowered}" if question.endswith("?") else f"Please {lowered}"
    wordings = (question, question, question, lowered, question.rstrip("?."), politely)
    # Greetings, which end with an exclamation mark, are not reworded.
    return question if question.endswith("!") else wordings[rng.integers(len(wordings))]


def _mixed(exchanges: Sequence[Exchange], turns: int, rng: np.random.Generator) -> list[Exchange]:
    chosen = [exchanges[i] for i in rng.choice(len(exchanges), turns, replace=False)]
    worded = [replace(turn, question=_reworded(turn.question, rng)) for turn in chosen]
    makers = (exercises.echo, exercises.city_as_json)
    return [
        makers[rng.integers(len(makers))](rng) if rng.random() < EXERCISE_SHARE else exchange for exchange in worded
    ]


def _conversation(turns: Sequence[Exchange], rng: np.random.Generator) -> Document:
    system = SYSTEM_PROMPTS[rng.integers(len(SYSTEM_PROMPTS))]
    spans = [Span(system, learned=False)]
    for turn in turns[:-1]:
        spans += [*turn.chat(), Span(EOS)]
    last = turns[-1].reasoned() if rng.random() < REASONED_SHARE else turns[-1].chat()
    return (*spans, *last)


def _tool_conversation(exchanges: Sequence[Exchange], rng: np.random.Generator) -> Document:
    system = SYSTEM_PROMPTS[rng.integers(len(SYSTEM_PROMPTS))]
    turns = TOOL_TURNS[rng.integers(len(TOOL_TURNS))]
    return tools.conversation(
        system, _mixed(exchanges, len(TOOL_TURNS), rng), turns, rng.random() < TOOL_REASONED_SHARE, rng
    )
