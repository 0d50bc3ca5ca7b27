"""Answers of a server with the prefix cache equal those of one without, whatever happens to both of them."""

from pathlib import Path

import pytest

from tests.support.equal_answers import Json, answers, answers_in_spite_of_a_loss, assert_equal, counted, requests_of
from tests.support.servers import serving

pytestmark = pytest.mark.slow

GRAMMAR = r"([A-Z][a-z]{2,8} [0-9]{1,3}; ){3}end"
BLOCKS = 36
"""Too few for all requests at once: some have to give way."""

KINDS: list[Json] = [
    {"temperature": 0},
    {"temperature": 1, "seed": 14},
    {"temperature": 1, "seed": 12, "n": 2, "top_p": 0.9},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 1, "seed": 12, "guided_regex": GRAMMAR},
    {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0, "prompt_logprobs": 1},
    {"temperature": 0, "cache_salt": "of another tenant"},
]


@pytest.mark.parametrize("stages", [1, 4])
async def test_answers_are_those_without_the_cache_in_spite_of_preemption_and_loss(stages: int, tmp_path: Path) -> None:
    options = ("--stages", str(stages), "--dtype", "float32", "--max-model-len", "1100")
    requests = requests_of(KINDS)
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    with serving(tmp_path / "without", *options, "--no-enable-prefix-caching", "--kv-host-memory", "0") as server:
        expected = await answers(server, requests)
    shared = {request["prompt"] for request in requests}
    assert len(shared) > 8
    with serving(tmp_path / "with", *options, "--num-blocks", str(BLOCKS), "--kv-host-memory", "64M") as server:
        assert_equal(await answers(server, requests), expected)
        hits, queries, preemptions = await counted(
            server, "prefix_cache_hits", "prefix_cache_queries", "num_preemptions"
        )
        assert hits / queries > 0.3
        assert preemptions > 0
        assert_equal(await answers_in_spite_of_a_loss(server, requests), expected)
