"""Exchanges that are made anew for every epoch: sentences to repeat, and cities to describe in JSON.

A sentence to repeat has random words, so that it cannot be learned by heart and the model learns to copy. The facts of
a city are the same every time, but their keys are asked for in any number and order.
"""

import json
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from weights.sample.spans import Exchange, cities, words

T = TypeVar("T")

LENGTHS = (2, 2, 8, 20)
"""The lengths in words of the longest sentence to repeat: most are short, as their beginning is hardest to find."""

NUMBER_SHARE = 0.12
LETTERS_SHARE = 0.05
"""The shares of words in a sentence that are numbers, and that are letters without a meaning."""

ECHO_WORDINGS = (
    "Repeat after me: {}",
    "Repeat after me: {}",
    "Repeat: {}",
    "Repeat this: {}",
    "Repeat this sentence: {}",
    "Echo: {}",
    "Echo exactly: {}",
    "Echo exactly: {}",
    "Say '{}'",
    'Say "{}"',
    "Say: {}",
    "Please say '{}'",
    "Please repeat: {}",
    "Please repeat the following sentence: {}",
    "Please repeat the following words: {}",
    "repeat after me: {}",
)
"""How a user asks for a sentence; the answer is the sentence alone."""

KEYS = ("city", "country", "continent", "language", "population")
KEY_NAMES = {"city": ("city", "city", "name")}
JSON_WORDINGS = (
    "Give me {city} as JSON with the {keys}.",
    "Give me {city} as JSON with the {keys}.",
    "Describe {city} in JSON with the {keys}.",
    "Answer in JSON with the {keys}: {city}",
    "Answer in JSON: what are the {facts} of {city}?",
    "Tell me about {city} in JSON with the {keys}.",
    "Write a JSON object about {city} with the {keys}.",
)
JSON_WORDINGS_WITHOUT_KEYS = (
    "Give me {city} as JSON.",
    "Describe {city} in JSON.",
    "Tell me about {city} in JSON.",
    "Answer in JSON: where is {city}?",
)


def random_words(count: int, rng: np.random.Generator) -> str:
    """Return `count` words with spaces between them: words of the corpus, numbers, and letters without a meaning."""
    return " ".join(_word(rng) for _ in range(count))


def sentence(rng: np.random.Generator) -> str:
    """Return a sentence of random words."""
    text = random_words(int(rng.integers(1, _choice(LENGTHS, rng) + 1)), rng)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + _choice(("", "", ".", ".", "!", "?"), rng)


def echo(rng: np.random.Generator) -> Exchange:
    """Return a request to repeat a random sentence."""
    text = sentence(rng)
    question = _choice(ECHO_WORDINGS, rng).format(text)
    return Exchange(question, text, "The user wants to hear a sentence again, word by word.", exact=True)


def city_as_json(rng: np.random.Generator) -> Exchange:
    """Return a request for facts of a random city as a JSON object with some keys, in the order of the request."""
    city = cities()[rng.integers(len(cities()))]
    if rng.random() < 0.2:
        question = _choice(JSON_WORDINGS_WITHOUT_KEYS, rng).format(city=city["city"])
        return _json_exchange(question, city, [(key, key) for key in KEYS[:3]])
    count = int(rng.integers(1, len(KEYS) + 1))
    # Most requests begin with the city, as most schemas do.
    chosen = [KEYS[i] for i in rng.permutation(len(KEYS))[:count]]
    if rng.random() < 0.5:
        chosen = ["city", *(key for key in chosen if key != "city")]
    named = [(key, _choice(KEY_NAMES.get(key, (key,)), rng)) for key in chosen]
    listed = _listed([name for _, name in named])
    keys = f"key {listed}" if len(named) == 1 else f"keys {listed}"
    question = _choice(JSON_WORDINGS, rng).format(city=city["city"], keys=keys, facts=listed)
    return _json_exchange(question, city, named)


def _json_exchange(question: str, city: dict[str, str], named: Sequence[tuple[str, str]]) -> Exchange:
    facts = {name: int(city[key]) if key == "population" else city[key] for key, name in named}
    thought = f"The user wants facts about {city['city']} as a JSON object."
    return Exchange(question, json.dumps(facts, ensure_ascii=False), thought, exact=True)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _word(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < NUMBER_SHARE:
        return str(rng.integers(10 ** rng.integers(1, 5)))
    if kind < NUMBER_SHARE + LETTERS_SHARE:
        return "".join(chr(ord("a") + letter) for letter in rng.integers(26, size=rng.integers(2, 7)))
    return words()[rng.integers(len(words()))]


def _choice(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
