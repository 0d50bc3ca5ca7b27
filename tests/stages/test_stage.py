"""The interface of a stage: bytes, progress, epochs, the weight cache, and steps that it must refuse."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.backend import ttnn
from stages.errors import PlanError, StepError
from stages.pending import PendingResult, at_once, drawn
from stages.plan import plan_stages
from stages.stage import Stage
from stages.step import Admission, Mode, SamplingParams, Segment, Step, StepResult
from tests.support.checkpoints import config_keys, reference_model, write_checkpoint
from tests.support.embedded_meshes import put
from tests.support.model_errors import TINY, TOLERANCE, prompts, reference_logits
from tests.support.stage_driver import GREEDY, Driver, cache_options, relative_error, stage_options
from weights.errors import CheckpointError
from weights.model_config import ConfigChanges, ModelConfig

VOCABULARY = TINY["vocab_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("stage") / "model", overrides=TINY)


@pytest.fixture(scope="module")
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def load(model: Path, weight_cache: Path) -> Iterator[Callable[..., Driver]]:
    drivers = []

    def loaded(stages: int = 1, **options: Any) -> Driver:
        drivers.append(Driver.load(stage_options(model, weight_cache, **options), stages))
        return drivers[-1]

    yield loaded
    for driver in drivers:
        driver.close()


def one_step(segment: Segment, mode: Mode = "prefill", epoch: int = 1, admit: bool = True, **changes: Any) -> Step:
    admissions = [Admission(slot=segment.slot, sampling=GREEDY)] if admit else []
    fields: dict[str, Any] = {"ended": [], "admissions": admissions, **changes}
    return Step(epoch=epoch, step_id=1, mode=mode, segments=[segment], **fields)


def a_segment(**changes: Any) -> Segment:
    fields: dict[str, Any] = {"slot": 0, "start": 0, "tokens": [1, 2, 3], "new_blocks": [0], "sample": True}
    return Segment(**{**fields, **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_give_the_same_tokens_however_the_model_is_split(dtype: str, load: Callable[..., Driver]) -> None:
    def tokens(stages: int) -> list[list[int]]:
        driver = load(stages, dtype=dtype)
        texts = prompts(3, VOCABULARY)
        for slot in range(3):
            driver.admit(slot)
        segments = [driver.segment(slot, 0, text, sample=slot != 1) for slot, text in enumerate(texts)]
        sampled = [driver.run_bytes("prefill", segments).tokens]
        at = {slot: (len(texts[slot]), token) for slot, token in zip((0, 2), sampled[0], strict=True)}
        for _ in range(3):
            decode = [driver.segment(slot, position, [token]) for slot, (position, token) in at.items()]
            sampled.append(driver.run_bytes("decode", decode).tokens)
            at = {slot: (at[slot][0] + 1, token) for slot, token in zip(at, sampled[-1], strict=True)}
        return sampled

    whole = tokens(1)
    assert [len(step) for step in whole] == [2, 2, 2, 2]
    assert whole == tokens(2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 4)])
def test_hidden_states_that_stay_on_meshes_give_the_same_tokens(
    shape: tuple[int, int], model: Path, weight_cache: Path
) -> None:
    pools = shape[0] * shape[1]
    options = stage_options(model, weight_cache, cache=cache_options(slots=4 * pools, pools=pools))
    by_bytes, by_mesh = (Driver.load(options, 2, shape) for _ in range(2))
    first, last = by_mesh.stages
    assert first.hidden_spec() == last.hidden_spec()
    assert first.hidden_spec().mesh_shape == shape

    def on_mesh(step: Step) -> StepResult:
        what = first.step_hidden_spec(step)
        hidden = first.step_on_mesh(step, None)
        assert what == last.step_hidden_spec(step)
        assert not isinstance(hidden, PendingResult)
        if what is None or hidden is None:
            assert (what, hidden) == (None, None)
        else:
            assert tuple(hidden.shape) == what.shape
            joined = ttnn.ConcatMesh2dToTensor(first.mesh_device, shape, (2, 3))
            hidden = put(last.mesh_device, ttnn.to_torch(hidden, mesh_composer=joined), (2, 3))
            assert step.mode == "prefill" or what.shape[2] <= first.hidden_spec().decode.shape[2]
        pending = last.step_on_mesh(step, hidden)
        assert isinstance(pending, PendingResult)
        return pending.draw(at_once)

    def run(driver: Driver) -> list[list[int]]:
        texts = prompts(3, VOCABULARY)
        for slot in range(3):
            driver.admit(slot)
        prefill = [driver.segment(slot, 0, text) for slot, text in enumerate(texts)]
        tokens = [
            driver.run_bytes("prefill", prefill) if driver is by_bytes else on_mesh(driver.step("prefill", prefill))
        ]
        for count in range(2):
            decode = [
                driver.segment(slot, len(text) + count, [token])
                for slot, (text, token) in enumerate(zip(texts, tokens[-1].tokens, strict=True))
            ]
            tokens.append(
                driver.run_bytes("decode", decode) if driver is by_bytes else on_mesh(driver.step("decode", decode))
            )
        for slot in range(3):
            driver.end(slot)
        tokens.append(driver.run_bytes("decode", []) if driver is by_bytes else on_mesh(driver.step("decode", [])))
        return [result.tokens for result in tokens]

    assert run(by_mesh) == run(by_bytes)
    by_bytes.close()
    by_mesh.close()


def test_sampling_parameters_are_those_of_the_slot(load: Callable[..., Driver]) -> None:
    driver = load()
    hot = SamplingParams(temperature=3.0, top_p=1.0, top_k=0, seed=5, choice=0)
    text = prompts(1, VOCABULARY)[0]
    for slot, params in ((0, GREEDY), (1, hot), (2, hot)):
        driver.admit(slot, params)
    segments = [driver.segment(slot, 0, text) for slot in range(3)]
    greedy, first, second = driver.run_bytes("prefill", segments).tokens
    assert first == second != greedy


def test_progress_counts_layers(model: Path, weight_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = stage_options(model, weight_cache)
    spec = plan_stages(ModelConfig.from_file(model / "config.json"), 1)[0]
    Stage.load(spec, options, lambda done, layers: seen.append((done, layers))).close()
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_step_without_segments_changes_slots_only(load: Callable[..., Driver]) -> None:
    first, last = load(2).stages
    step = Step(
        epoch=1, step_id=1, mode="decode", segments=[], admissions=[Admission(slot=0, sampling=GREEDY)], ended=[3]
    )
    hidden = first.step(step, memoryview(b""))
    assert isinstance(hidden, memoryview)
    assert hidden.nbytes == 0
    assert drawn(last.step(step, memoryview(b""))) == StepResult(epoch=1, step_id=1, tokens=[])
    admitted = first.step(one_step(a_segment(), admit=False), memoryview(b""))
    assert isinstance(admitted, memoryview)
    assert admitted.nbytes == 3 * TINY["hidden_size"] * 4


def test_a_new_epoch_forgets_all_slots(load: Callable[..., Driver]) -> None:
    stage = load().stages[0]
    stage.step(one_step(a_segment()), memoryview(b""))
    with pytest.raises(StepError, match="not admitted"):
        stage.step(one_step(a_segment(), epoch=2, admit=False), memoryview(b""))
    stage.step(one_step(a_segment(slot=1), epoch=2), memoryview(b""))
    with pytest.raises(StepError, match=r"epoch 1, but epoch 2 has begun"):
        stage.step(one_step(a_segment(slot=2)), memoryview(b""))


@pytest.mark.parametrize(
    ("segment", "mode", "message"),
    [
        (a_segment(tokens=[1, VOCABULARY]), "prefill", "outside the vocabulary"),
        (a_segment(tokens=[1, -1]), "prefill", "outside the vocabulary"),
        (a_segment(tokens=[]), "prefill", "no tokens"),
        (a_segment(tokens=[1] * 10), "decode", "decodes 10 tokens"),
        (a_segment(tokens=[1] * 33), "prefill", r"would hold 33 tokens, but its 1 blocks of 32 hold 32"),
        (a_segment(new_blocks=[]), "prefill", "its 0 blocks"),
        (a_segment(start=32, new_blocks=[0, 1]), "prefill", "does not go on from there"),
        (a_segment(start=5), "prefill", "not a multiple of the block size 32"),
        (a_segment(start=1, tokens=[1]), "decode", "does not go on from there"),
        (a_segment(new_blocks=[10**6]), "prefill", "is not one of"),
        (a_segment(new_blocks=[-1]), "prefill", "is not one of"),
        (a_segment(new_blocks=[4, 4]), "prefill", "already belongs to another slot"),
        (a_segment(new_blocks=list(range(9))), "prefill", "more than the 8 blocks"),
        (a_segment(slot=4), "prefill", "not one of the 4 slots"),
    ],
)
def test_contradictions_are_refused(segment: Segment, mode: Mode, message: str, load: Callable[..., Driver]) -> None:
    with pytest.raises(StepError, match=message):
        load().stages[0].step(one_step(segment, mode), memoryview(b""))


def test_slots_and_blocks_of_others_are_refused(load: Callable[..., Driver]) -> None:
    stage = load().stages[0]
    stage.step(one_step(a_segment()), memoryview(b""))
    with pytest.raises(StepError, match="Slot 1 was not admitted"):
        stage.step(one_step(a_segment(slot=1, new_blocks=[1]), admit=False), memoryview(b""))
    with pytest.raises(StepError, match="Block 0 of slot 1 already belongs to another slot"):
        stage.step(one_step(a_segment(slot=1)), memoryview(b""))
    twice = Step(
        epoch=1,
        step_id=2,
        mode="decode",
        segments=[a_segment(start=3, tokens=[7], new_blocks=[])] * 2,
        admissions=[],
        ended=[],
    )
    with pytest.raises(StepError, match="names a slot twice"):
        stage.step(twice, memoryview(b""))


def test_ended_blocks_are_free_in_the_same_step(load: Callable[..., Driver]) -> None:
    stage = load().stages[0]
    stage.step(one_step(a_segment()), memoryview(b""))
    stage.step(one_step(a_segment(slot=1), ended=[0]), memoryview(b""))


def test_hidden_states_of_another_size_are_refused(load: Callable[..., Driver]) -> None:
    last = load(2).stages[1]
    with pytest.raises(StepError, match="needs 1536 bytes of hidden states, but 8 came"):
        last.step(one_step(a_segment()), memoryview(bytearray(8)))
    with pytest.raises(StepError, match=r"hidden states of shape \(2, 128\)"):
        last.forward(one_step(a_segment()), torch.zeros(2, 128))


@pytest.mark.parametrize(
    ("pools", "mesh_shape", "message"),
    [(3, None, "neither one chip's nor whole rows"), (1, (1, 8), "1 x 8 chips needs as many KV pools, not 1")],
)
def test_meshes_that_do_not_fit_are_refused(
    pools: int, mesh_shape: tuple[int, int] | None, message: str, model: Path, tmp_path: Path
) -> None:
    options = stage_options(model, tmp_path, cache=cache_options(slots=pools, pools=pools))
    with pytest.raises(PlanError, match=message):
        Driver.load(options, 1, mesh_shape)


def test_a_latent_that_tiles_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", overrides={**TINY, "kv_lora_rank": 56})
    with pytest.raises(PlanError, match="kv_lora_rank is 56; only multiples of 32"):
        Driver.load(stage_options(path, tmp_path / "cache"))


def test_a_missing_tensor_is_named_before_anything_is_converted(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", overrides={**TINY, "num_hidden_layers": 2})
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
        Driver.load(stage_options(path, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_converted_weights_are_found_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = stage_options(model, tmp_path)
    text = prompts(1, VOCABULARY)[0]

    def logits() -> torch.Tensor:
        driver = Driver.load(options)
        driver.admit(0)
        result = driver.prefill({0: text})
        driver.close()
        return result

    first = logits()
    entries = sorted(path.name for path in tmp_path.iterdir())
    assert len([name for name in entries if name.startswith(("embedding", "layer0", "layer1", "head"))]) == 4

    def no_conversion(*_: object, **__: object) -> str:
        raise AssertionError("converted again")

    for module in ("mlp", "moe", "mla", "rms_norm", "embedding", "lm_head"):
        monkeypatch.setattr(f"stages.models.deepseek_v3.{module}.dump_weight", no_conversion)
    assert torch.equal(logits(), first)
    monkeypatch.setattr("stages.converted_weights.TRANSFORM_VERSION", 0)
    with pytest.raises(AssertionError, match="converted again"):
        logits()


def test_dummy_weights_need_no_tensors(model: Path, tmp_path: Path) -> None:
    only_config = tmp_path / "model"
    only_config.mkdir()
    (only_config / "config.json").write_text((model / "config.json").read_text())
    tokens = []
    for seed in (0, 0, 1):
        driver = Driver.load(stage_options(only_config, tmp_path / "cache", load_format="dummy", seed=seed))
        driver.admit(0)
        tokens.append(driver.prefill({0: prompts(1, VOCABULARY)[0]}))
        driver.close()
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_a_model_may_be_cut_to_its_first_layers(model: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    (shorter / "model.safetensors").symlink_to(model / "model.safetensors")
    (shorter / "config.json").write_text(json.dumps(config_keys({**TINY, "num_hidden_layers": 1})))
    [text] = prompts(1, VOCABULARY)
    expected = reference_logits(reference_model(shorter), text)[-1]
    driver = Driver.load(stage_options(model, tmp_path / "cache", changes=ConfigChanges(num_hidden_layers=1)))
    driver.admit(0)
    assert relative_error(driver.prefill({0: text})[0], expected) < TOLERANCE
    driver.close()
