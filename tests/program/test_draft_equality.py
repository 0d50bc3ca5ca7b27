"""Answers of a server that drafts equal those of one that does not, whatever is asked and whatever happens to it."""

import asyncio
from pathlib import Path

import pytest

from tests.support.equal_answers import Json, answers, answers_in_spite_of_a_loss, assert_equal, counted, requests_of
from tests.support.servers import serving

pytestmark = pytest.mark.slow

OPTIONS = ("--dtype", "float32", "--max-model-len", "1100")
BLOCKS = 36
"""Too few for all requests at once: some have to give way."""

SCHEMA = {
    "type": "object",
    "properties": {"boat": {"enum": ["Gull", "Heron"]}, "crew": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["boat", "crew"],
    "additionalProperties": False,
}
KINDS: list[Json] = [
    {"temperature": 0},
    {"temperature": 0.7, "seed": 14},
    {"temperature": 1.5, "seed": 3, "top_p": 0.95},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.7, "seed": 12, "n": 2, "top_k": 20},
    {"temperature": 1, "seed": 12, "guided_regex": r"([A-Z][a-z]{2,8} [0-9]{1,3}; ){3}end"},
    {"temperature": 0, "guided_json": SCHEMA},
    {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    {"temperature": 0, "echo": True, "logprobs": 1},
    {"temperature": 0.7, "seed": 5, "stop": [" the", "."], "include_stop_str_in_output": True},
    {"temperature": 0, "min_tokens": 20, "ignore_eos": False, "logit_bias": {"1": 4}},
    {"temperature": 1.5, "seed": 8, "min_p": 0.05, "logprobs": 0},
    {"temperature": 0, "bad_words": [" the", " harbour"]},
    {"temperature": 0.7, "seed": 2, "cache_salt": "of another tenant"},
    {"temperature": 0, "max_tokens": 2},
]
REQUESTS = requests_of(KINDS, 2 * len(KINDS))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[Json]]:
    """What is answered without drafts, and without a cache of prefixes."""
    directory = tmp_path_factory.mktemp("without")
    with serving(directory, *OPTIONS, "--stages", "1", "--no-enable-prefix-caching") as server:
        return asyncio.run(answers(server, REQUESTS))


@pytest.mark.parametrize(("stages", "drafts"), [(1, 1), (2, 2), (4, 3)])
async def test_answers_are_those_without_drafts_in_spite_of_preemption_and_loss(
    stages: int, drafts: int, expected: list[list[Json]], tmp_path: Path
) -> None:
    options = ("--num-blocks", str(BLOCKS), "--num-speculative-tokens", str(drafts), "--always-draft")
    with serving(tmp_path, *OPTIONS, "--stages", str(stages), *options) as server:
        assert_equal(await answers(server, REQUESTS), expected)
        before = await counted(server, "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
        hits, preemptions = await counted(server, "prefix_cache_hits", "num_preemptions")
        made, accepted = before
        assert made > 15 * len(REQUESTS)
        assert 0.1 < accepted / made < 0.9
        assert hits > 0
        assert preemptions > 0
        assert_equal(await answers_in_spite_of_a_loss(server, REQUESTS), expected)
        [after] = await counted(server, "spec_decode_num_draft_tokens")
        assert after > 1.5 * made
