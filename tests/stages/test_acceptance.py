"""How many drafts are accepted: of the sample model's own layer, and of two draws that share their random numbers."""

import math
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from stages.backend import set_float_dtype, ttnn
from stages.backend.embedded.dtype import held_in
from stages.options import DraftOptions
from stages.sampling.draw import draw_token
from stages.sampling.logprobs import Doubles, Floats
from stages.step import SamplingParams
from tests.support.checkpoints import reference_model
from tests.support.draft_driver import DraftDriver
from tests.support.drafted_requests import DraftedRequests
from tests.support.model_errors import reference_logits
from tests.support.servers import Prompt, sample_prompts
from tests.support.stage_driver import Driver, cache_options, stage_options
from weights.sample import SAMPLE_DIR, spans
from weights.sample.packing import SPECIAL_TOKENS, encode
from weights.sample.spans import Span

EOS_ID = 1
LONGEST_ANSWER = 100
LEAST_ACCEPTED = 0.8

TEXTS = 8
LENGTH = 160
REPEATS = 3
"""How often each position is drawn, every time with another seed: so there are more than 10^4 draws."""
PERTURBED_SHARE = 0.2
KINDS = ("learned", "perturbed", "random")
ERRORS = 4
"""The standard errors that a mean may be off by: chance exceeds them once in 15 000 times, and the seeds are fixed."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))


# The sample model's own drafts


def chosen_prompts() -> list[Prompt]:
    """Every third of those that have long answers: texts, chats, thoughts, tool calls and stories."""
    return [prompt for prompt in sample_prompts() if prompt.max_tokens >= 64][::3]


@pytest.mark.usefixtures("float32")
def test_most_of_what_the_sample_drafts_is_accepted(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With greedy sampling; the answers are those of Hugging Face's model, as far as these are known."""
    prompts = chosen_prompts()
    cache = cache_options(slots=len(prompts), max_model_len=512)
    drafts = DraftOptions(num_speculative_tokens=1)
    driver = Driver.load(stage_options(SAMPLE_DIR, tmp_path, cache=cache, drafts=drafts))
    requests = DraftedRequests(driver)
    requests.prefill({slot: tokenizer.encode(prompt.prompt).ids for slot, prompt in enumerate(prompts)}, drafts=1)
    while going := [slot for slot, request in requests.by_slot.items() if not has_ended(request.answer)]:
        requests.decode(dict.fromkeys(going, 1))
    driver.close()

    for slot, prompt in enumerate(prompts):
        answer = tokenizer.decode(requests.by_slot[slot].answer, skip_special_tokens=False)
        common = min(len(answer), len(prompt.text))
        assert common > 30
        assert answer[:common] == prompt.text[:common]
    steps = [step for request in requests.by_slot.values() for step in request.steps]
    assert {made for made, _ in steps} == {1}
    made, right = requests.verified()
    with capsys.disabled():
        sys.stdout.write(f"\n{right} of {made} drafts for {len(prompts)} prompts accepted: {right / made:.3f}\n")
    assert made > 200
    assert right / made >= LEAST_ACCEPTED


def has_ended(answer: list[int]) -> bool:
    return EOS_ID in answer or len(answer) >= LONGEST_ANSWER


# Draws with the same random numbers


@dataclass(frozen=True)
class Position:
    """A place in one of the texts, and what model and draft layer have as logits for the token in it."""

    text: int
    index: int
    target: Floats
    draft: Floats


@pytest.fixture(scope="module")
def positions(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Position]]]:
    """The distributions over texts of each kind, which are given and not sampled.

    The model's logits are those of Hugging Face's, which other tests hold against those of stages.
    """
    before = held_in(ttnn.bfloat16)
    driver = DraftDriver(SAMPLE_DIR, tmp_path_factory.mktemp("weights"), length=LENGTH)
    model = reference_model(SAMPLE_DIR)
    found: dict[str, list[Position]] = {kind: [] for kind in KINDS}
    for number, (kind, text) in enumerate(texts(tokenizer)):
        drafts = driver.prefill({0: text}, {0: len(text) - 1}, LENGTH)
        targets = reference_logits(model, text).numpy()
        # Draft logits at a position are of the token two further on, those of the model of the next.
        found[kind] += [
            Position(number, index, targets[index - 1], drafts[0, index - 2].numpy()) for index in range(2, len(text))
        ]
    yield found
    driver.close()
    set_float_dtype(before)


def texts(tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Documents that the model knows by heart, the same with other tokens in places, and tokens at random."""
    generator = np.random.default_rng(0)
    learned = [encode((Span(text),), tokenizer).tokens for text in spans.texts()]
    words = (SPECIAL_TOKENS, tokenizer.get_vocab_size())
    for text in [tokens[:LENGTH] for tokens in learned if len(tokens) >= LENGTH][:TEXTS]:
        yield "learned", text
        others = generator.integers(*words, len(text))
        yield "perturbed", np.where(generator.random(len(text)) < PERTURBED_SHARE, others, text).tolist()
        yield "random", generator.integers(*words, len(text)).tolist()


@dataclass(frozen=True)
class Agreement:
    """How often two draws agreed at each position, and how likely it was that they would.

    `likely` is the probability that the exponential race has, between `at_least`, which is proved of it, and `at_most`,
    which no way to draw exceeds. `independent` is that of draws that have no random numbers in common.
    """

    drawn: Doubles
    likely: Doubles
    at_least: Doubles
    at_most: Doubles
    independent: Doubles

    @classmethod
    def of(cls, positions: list[Position], top_p: float) -> "Agreement":
        """Draws at temperature 1."""
        p = distributions(np.stack([position.target for position in positions]), top_p)
        q = distributions(np.stack([position.draft for position in positions]), top_p)
        distance = np.abs(p - q).sum(-1) / 2
        drawn = [sum(agree(position, top_p, repeat) for repeat in range(REPEATS)) / REPEATS for position in positions]
        least, most = (1 - distance) / (1 + distance), 1 - distance
        return cls(np.array(drawn), race_agreement(p, q), least, most, (p * q).sum(-1))

    @classmethod
    def joined(cls, parts: Collection["Agreement"]) -> "Agreement":
        """That of the positions of all `parts`."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @property
    def draws(self) -> int:
        """The number of pairs of draws."""
        return len(self.drawn) * REPEATS

    def error(self) -> float:
        """ERRORS standard errors of the mean of `drawn`, whatever between its bounds each probability is."""
        worst = np.clip(0.5, self.at_least, self.at_most)
        return ERRORS * math.sqrt((worst * (1 - worst)).mean() / self.draws)

    def __str__(self) -> str:
        return (
            f"{self.drawn.mean():.4f} of {self.draws} pairs of draws agree; at least {self.at_least.mean():.4f}, "
            f"at most (1 - TV) {self.at_most.mean():.4f}, by the race {self.likely.mean():.4f}, "
            f"if independent {self.independent.mean():.4f}; {ERRORS} standard errors are {self.error():.4f}"
        )


def agree(position: Position, top_p: float, repeat: int) -> bool:
    """Whether model and draft layer draw the same token; no two texts, and no two repeats, have the same seed."""
    seed = position.text * REPEATS + repeat
    sampling = SamplingParams(temperature=1.0, top_p=top_p, top_k=0, seed=seed, choice=0)
    target, draft = (draw_token(logits, sampling, position.index) for logits in (position.target, position.draft))
    return target == draft


def distributions(logits: Floats, top_p: float) -> Doubles:
    """Softmax of each row and then its nucleus, in double precision."""
    shares = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    order = np.argsort(-shares, axis=-1, kind="stable")
    ranked = np.take_along_axis(shares, order, -1)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    np.put_along_axis(shares, order, ranked, -1)
    whole: Doubles = shares / shares.sum(-1, keepdims=True)
    return whole


def race_agreement(p: Doubles, q: Doubles) -> Doubles:
    """The sum over tokens j of 1 / (the sum over tokens i of max(p_i / p_j, q_i / q_j)), for each row.

    Token j comes first in both races if its noise E_j has E_i > E_j max(p_i / p_j, q_i / q_j) for every other i; these
    are exponentials of rate 1. With tokens in the order of p / q, the maxima are q's up to j and p's after it.
    """
    ratios = np.divide(p, q, out=np.where(p > 0, np.inf, 0.0), where=q > 0)
    order = np.argsort(ratios, axis=-1)
    p, q = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    after = np.maximum(p.sum(-1, keepdims=True) - p.cumsum(-1), 0)
    # 1 / (after / p + until / q), where neither is 0.
    weighed = after * q + q.cumsum(-1) * p
    shares: Doubles = np.divide(p * q, weighed, out=np.zeros_like(p), where=p * q > 0).sum(-1)
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draws_agree_as_often_as_without_communication_they_can(
    top_p: float, positions: dict[str, list[Position]], capsys: pytest.CaptureFixture[str]
) -> None:
    """At least as often as Daliri et al. (arXiv:2408.07978) prove of Gumbel noise: (1 - TV) / (1 + TV).

    TV is the total variation distance of the two distributions, and 1 - TV the most that any coupling can reach.
    """
    found = {kind: Agreement.of(own, top_p) for kind, own in positions.items()}
    found["all"] = Agreement.joined(found.values())
    assert found["all"].draws >= 10**4
    with capsys.disabled():
        sys.stdout.write(f"\ntop_p {top_p}:\n" + "".join(f"{name}: {one}\n" for name, one in found.items()))
    for one in found.values():
        assert one.drawn.mean() >= one.at_least.mean() - one.error()
        assert one.drawn.mean() <= one.at_most.mean() + one.error()
        assert abs(one.drawn.mean() - one.likely.mean()) <= one.error()


@pytest.mark.parametrize("seed", range(8))
def test_the_probability_of_agreement_in_races(seed: int) -> None:
    """The race is as its definition has it, and between its bounds, where some tokens have no probability."""
    generator = np.random.default_rng(seed)
    p, q = (np.where(generator.random(9) < 0.7, generator.exponential(size=9), 0.0) for _ in range(2))
    p[0], q[0] = 0.3, 0.4
    p, q = p / p.sum(), q / q.sum()
    shared = [token for token in range(9) if p[token] * q[token] > 0]
    expected = sum(1 / np.maximum(p / p[token], q / q[token]).sum() for token in shared)
    [found] = race_agreement(p[None], q[None])
    assert found == pytest.approx(expected, rel=1e-12)
    distance = np.abs(p - q).sum() / 2
    assert (1 - distance) / (1 + distance) <= found <= 1 - distance
