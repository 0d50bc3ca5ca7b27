"""Tokens that are drawn beside later steps: the same as at once, whatever slots and blocks became of meanwhile."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from stages.errors import StepError
from stages.options import TierOptions
from stages.pending import PendingResult, at_once
from stages.stage import Stage
from stages.step import Admission, SamplingParams, Segment, Step, StepResult
from tests.support.checkpoints import write_checkpoint
from tests.support.model_errors import TINY, prompts
from tests.support.stage_driver import GREEDY, Driver, cache_options, key_of, stage_options

VOCABULARY = TINY["vocab_size"]
HOT = SamplingParams(temperature=1.5, top_p=1.0, top_k=0, seed=5, choice=0, frequency_penalty=0.5)
SCORED = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0, logprobs=1, prompt_logprobs=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("head") / "model", overrides=TINY)


@pytest.fixture
def stages(model: Path, tmp_path: Path) -> Iterator[list[Stage]]:
    """Two equal stages that are the whole model, with a tier each."""
    drivers = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tiers = TierOptions(host_directory=str(tmp_path / name), host_bytes=1 << 26)
        drivers.append(Driver.load(stage_options(model, tmp_path / "cache", cache=cache_options(), tiers=tiers)))
    yield [stage for driver in drivers for stage in driver.stages]
    for driver in drivers:
        driver.close()


def steps(sampling: Sequence[SamplingParams]) -> list[Step]:
    """Prompts in slots, a step each, of which the later take the slots and blocks of the earlier."""
    asked = []
    for index, (text, params) in enumerate(zip(prompts(len(sampling), VOCABULARY), sampling, strict=True)):
        tokens = (text * 32)[:32]
        segment = Segment(slot=0, start=0, tokens=tokens, new_blocks=[0], sample=True, keys=[key_of(index)])
        admission = Admission(slot=0, sampling=params, tokens=tokens, prompt_tokens=32)
        asked.append(
            Step(
                epoch=1,
                step_id=index,
                mode="prefill",
                segments=[segment],
                admissions=[admission],
                ended=[0] if index else [],
            )
        )
    return asked


def begin(stage: Stage, step: Step) -> PendingResult:
    pending = stage.step(step, memoryview(b""))
    assert isinstance(pending, PendingResult)
    return pending


def kept(stage: Stage) -> list[bytes]:
    return sorted(stage.inventory(0).added)


def test_tokens_do_not_depend_on_when_they_are_drawn(stages: list[Stage]) -> None:
    one, other = stages
    asked = steps([GREEDY, HOT, HOT, GREEDY])
    expected = [begin(one, step).draw(at_once) for step in asked]
    pending = [begin(other, step) for step in asked]
    assert not any(each.needs_device for each in pending)
    assert kept(other) == []
    assert [each.draw(at_once) for each in pending] == expected
    assert len({tuple(result.tokens) for result in expected}) > 1
    assert kept(other) == kept(one) == sorted(key_of(index) for index in range(4))


def test_a_load_changes_slots_in_the_order_of_steps(stages: list[Stage]) -> None:
    [first, second] = steps([GREEDY, HOT])
    stage = stages[0]
    pending = begin(stage, first)
    load = Step(epoch=1, step_id=5, mode="load", segments=[], admissions=[], ended=[0])
    assert stage.load_blocks(load) == []
    again = begin(stage, msgspec.structs.replace(second, ended=[]))
    assert len(pending.draw(at_once).tokens) == len(again.draw(at_once).tokens) == 1


def test_scores_of_a_prompt_need_the_device(stages: list[Stage]) -> None:
    scored, plain = (begin(stages[0], step) for step in steps([SCORED, GREEDY]))
    assert (scored.needs_device, plain.needs_device) == (True, False)


def test_a_request_that_cannot_be_sampled_for_is_refused_before_it_is_computed(stages: list[Stage]) -> None:
    [step] = steps([HOT])
    lacking = msgspec.structs.replace(step, admissions=[Admission(slot=0, sampling=HOT)])
    with pytest.raises(StepError, match="its sampling reads them"):
        stages[0].step(lacking, memoryview(b""))


def test_a_new_epoch_drops_what_was_not_drawn(stages: list[Stage]) -> None:
    one, other = stages
    first, second = steps([HOT, HOT])
    begin(one, first)
    fresh = msgspec.structs.replace(second, epoch=2, ended=[])
    results: list[StepResult] = [begin(stage, fresh).draw(at_once) for stage in (one, other)]
    assert results[0] == results[1]
    assert kept(one) == [key_of(1)]
