"""Candidates found on meshes, against the logits themselves, and the tokens of stages that sample from them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from stages import candidates
from stages.backend import ttnn
from stages.candidates import CandidateFinder, CandidateRows
from stages.sampling.logprobs import Floats, TokenIds, log_normaliser
from stages.stage import Stage
from stages.step import SamplingParams, StepResult
from tests.support.checkpoints import write_checkpoint
from tests.support.embedded_meshes import on_mesh_shapes, put
from tests.support.kv_blocks import floats_held_in
from tests.support.model_errors import TINY, prompts
from tests.support.stage_driver import Driver, cache_options, stage_options

SIZES = [512, 500, 5]
"""Vocabularies that columns share evenly, that need padding, and that leave columns without a token."""
TOKENS = 3
NO_TOKENS: TokenIds = np.array([], dtype=np.int64)

on_meshes = on_mesh_shapes([(1, 2), (1, 8), (2, 4)])


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    torch.manual_seed(0)
    with floats_held_in(torch.float32):
        yield


def on_mesh(mesh: ttnn.MeshDevice, logits: torch.Tensor) -> ttnn.Tensor:
    """Logits [tokens of all rows, vocabulary] as the head leaves them, with zeros for padding."""
    share = -(-logits.shape[1] // (32 * mesh.shape[1])) * 32
    padded = torch.nn.functional.pad(logits, (0, share * mesh.shape[1] - logits.shape[1]))
    return put(mesh, padded[None, None], (2, 3))


def rows_on(mesh: ttnn.MeshDevice, logits: torch.Tensor, named: dict[int, TokenIds] | None = None) -> CandidateRows:
    finder = CandidateFinder(mesh, logits.shape[1])
    device = on_mesh(mesh, logits)
    host = finder.read(device, finder.find(device), named or {})
    return CandidateRows(finder, host, device, range(len(logits)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [4, 64])
@on_meshes
def test_candidates_are_the_best_of_each_column(
    mesh: ttnn.MeshDevice, size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "CANDIDATES", count)
    # All below the zeros of the padding.
    logits = torch.randn(TOKENS * mesh.shape[0], size) * 4 - 30
    rows = rows_on(mesh, logits)
    for index, row in enumerate(logits.numpy()):
        known = rows.known(index)
        assert known.is_finite
        assert (known.logits == row[known.tokens]).all()
        assert known.unknown == size - len(known.tokens)
        others = np.delete(row, known.tokens)
        assert not len(others) or others.max() <= known.bound
        assert known.log_normaliser == pytest.approx(log_normaliser(row), abs=1e-5)
        assert int(known.tokens[known.logits.argmax()]) == int(row.argmax())


@on_meshes
def test_whole_rows_come_as_they_are(mesh: ttnn.MeshDevice) -> None:
    logits = torch.randn(TOKENS * mesh.shape[0], 500)
    order = [len(logits) - 1, 0, 1]
    asked = []

    def on_device(function: Callable[[], Any]) -> Any:
        asked.append(function)
        return function()

    rows = rows_on(mesh, logits).through(on_device)
    fetched: list[Floats] = list(rows.fetch(order))
    assert [row.tolist() for row in fetched] == logits[order].tolist()
    assert rows.fetch([]) == []
    assert len(asked) == 1


@on_meshes
def test_logits_that_options_name_are_known_too(mesh: ttnn.MeshDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "CANDIDATES", 2)
    logits = torch.randn(TOKENS * mesh.shape[0], 500)
    last = len(logits) - 1
    named = {0: np.array([0, 63, 64, 499]), last: np.arange(100, 164)}
    rows = rows_on(mesh, logits, named)
    for place, tokens in named.items():
        known = rows.known(place)
        assert set(tokens.tolist()) <= set(known.tokens.tolist())
        assert (known.logits == logits[place].numpy()[known.tokens]).all()
    assert len(rows.known(1).tokens) == 2 * mesh.shape[1]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@on_meshes
def test_what_is_not_a_number_is_noticed_wherever_it_is(mesh: ttnn.MeshDevice, broken: float) -> None:
    logits = torch.randn(TOKENS * mesh.shape[0], 512)
    logits[1, 300] = broken
    rows = rows_on(mesh, logits)
    assert [rows.known(index).is_finite for index in range(3)] == [True, False, True]


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "nucleus": {"temperature": 0.6, "top_p": 0.95},
    "hot": {"temperature": 1.5},
    "top-k": {"top_k": 3, "logprobs": 0},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    "allowed": {"allowed_token_ids": [3, 70, 200, 411]},
    "bias": {"temperature": 0.0, "logit_bias": {77: 100.0}},
    "vocabulary": {"logprobs": -1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("candidates") / "model", overrides=TINY, mtp_layer=True)


@pytest.fixture(scope="module")
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def answers(driver: Driver, count: int) -> list[StepResult]:
    """The results of a prompt for each of ASKED, and of `count` tokens more."""
    texts = 2 * prompts(len(ASKED) // 2, TINY["vocab_size"])
    for slot, (text, options) in enumerate(zip(texts, ASKED.values(), strict=True)):
        sampling = SamplingParams(
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": slot, "choice": 0, **options}
        )
        driver.admit(slot, sampling, text)
    results = [driver.run_bytes("prefill", [driver.segment(slot, 0, text) for slot, text in enumerate(texts)])]
    for place in range(count):
        segments = [
            driver.segment(slot, len(text) + place, [token])
            for slot, (text, token) in enumerate(zip(texts, results[-1].tokens, strict=True))
        ]
        results.append(driver.run_bytes("decode", segments))
    return results


@pytest.mark.parametrize("enable_trace", [False, True])
@pytest.mark.parametrize("count", [8, 64])
@pytest.mark.parametrize("shape", [(1, 4), (2, 4)])
def test_tokens_are_those_of_whole_logits(
    shape: tuple[int, int],
    count: int,
    enable_trace: bool,
    model: Path,
    weight_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "CANDIDATES", count)
    pools = shape[0] * shape[1]
    options = stage_options(
        model, weight_cache, cache=cache_options(slots=2 * pools, pools=pools), enable_trace=enable_trace
    )

    def results(*, is_whole: bool) -> list[StepResult]:
        with pytest.MonkeyPatch.context() as patch:
            if is_whole:
                patch.setattr("stages.output_head.CandidateFinder", lambda *_: None)
            driver = Driver.load(options, mesh_shape=shape)
            try:
                return answers(driver, 3)
            finally:
                driver.close()

    whole, found = results(is_whole=True), results(is_whole=False)
    assert [result.fallbacks for result in whole] == [0] * len(whole)
    # All 32 or 128 of a column's tokens may be among 64; those who want the whole vocabulary always get it.
    assert all(result.fallbacks >= 1 for result in found) or count * shape[1] >= TINY["vocab_size"]
    assert [_rounded(result) for result in found] == [_rounded(result) for result in whole]


def _rounded(result: StepResult) -> StepResult:
    """The result without what depends on how it was sampled."""
    logprobs = [
        entry
        and msgspec.structs.replace(
            entry, logprob=round(entry.logprob, 3), top_logprobs=[round(value, 3) for value in entry.top_logprobs]
        )
        for entry in result.logprobs
    ]
    return msgspec.structs.replace(result, logprobs=logprobs, fallbacks=0)


def test_the_host_gets_no_vocabulary_of_logits(
    model: Path, weight_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "CANDIDATES", 8)
    options = stage_options(model, weight_cache, cache=cache_options(slots=8, pools=4))
    driver = Driver.load(options, mesh_shape=(1, 4))
    [stage] = driver.stages
    assert isinstance(stage, Stage)
    read: list[int] = []
    to_torch = ttnn.to_torch

    def watched(tensor: ttnn.Tensor, **options: Any) -> torch.Tensor:
        host = to_torch(tensor, **options)
        read.append(host.shape[-1])
        return host

    monkeypatch.setattr(ttnn, "to_torch", watched)
    driver.admit(0)
    result = driver.run_bytes("prefill", [driver.segment(0, 0, prompts(1, TINY["vocab_size"])[0])])
    driver.close()
    assert result.fallbacks == 0
    # What is joined there, by the thread that draws.
    assert read == [4 * 8] * 3
