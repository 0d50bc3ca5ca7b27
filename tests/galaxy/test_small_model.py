"""A small model from its checkpoint to tokens on the mock Galaxy: converted, kept as .tensorbin files, loaded, run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.backend import ttnn
from stages.errors import PlanError
from stages.models.deepseek_v3.decoder_block import MoEBlock
from stages.plan import plan_stages
from stages.run_config import FLOATS
from stages.stage import Stage
from stages.tensor_dtypes import WeightDtypes
from tests.support.checkpoints import write_checkpoint
from tests.support.draft_driver import DraftDriver
from tests.support.stage_driver import Driver, cache_options, stage_options
from weights.model_config import ModelConfig

COLUMNS = 8
# A column has sixteen heads, as chips exchange them; of the two layers one is dense and one has experts.
OVERRIDES = {"num_attention_heads": 128, "num_hidden_layers": 2}
PROMPTS = {0: [1] * 70, 1: [2] * 33, COLUMNS + 1: [3] * 5}
"""The prompts by slot; two of them share a pool."""
WIDE = WeightDtypes(attention="bfloat16", gate_up="bfloat8_b", head="bfloat16", router="bfloat16", kv_cache="bfloat16")

CACHE = cache_options(slots=2 * COLUMNS, pools=COLUMNS, max_model_len=128)

Load = Callable[..., Driver]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), overrides=OVERRIDES)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(model: Path, cache_dir: Path) -> Iterator[Load]:
    """Loads the model, and closes the one loaded before, as a process has one Galaxy."""
    drivers: list[Driver] = []

    def loaded(**options: Any) -> Driver:
        while drivers:
            drivers.pop().close()
        drivers.append(Driver.load(stage_options(model, cache_dir, cache=CACHE, **options), mesh_shape=(1, COLUMNS)))
        return drivers[-1]

    yield loaded
    while drivers:
        drivers.pop().close()


def run(driver: Driver) -> None:
    """Prefills prompts, in chunks, and decodes two of them."""
    for slot in PROMPTS:
        driver.admit(slot)
    assert driver.prefill(PROMPTS, chunk=32).shape == (3, 512)
    assert driver.decode({0: (70, 1), COLUMNS + 1: (5, 2)}).shape == (2, 512)


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*.tensorbin")}


def test_a_checkpoint_becomes_tokens(load: Load, cache_dir: Path) -> None:
    run(load())
    kept = files_of(cache_dir)
    assert {path.partition("-")[0] for path in kept} == {"embedding", "layer0", "layer1", "head"}
    assert all("-ttnn-" in path and f"-1x{COLUMNS}-" in path for path in kept)

    before = {path: (cache_dir / path).stat().st_mtime_ns for path in kept}
    run(load())
    assert {path: (cache_dir / path).stat().st_mtime_ns for path in files_of(cache_dir)} == before


def test_hidden_states_travel_in_the_dtype_of_the_stages(model: Path, cache_dir: Path) -> None:
    first = plan_stages(ModelConfig.from_file(model / "config.json"), 2)[0]
    options = stage_options(model, cache_dir, cache=CACHE, dtype="float32")
    driver = Driver([Stage.load(first, options, lambda _done, _of: None)], CACHE)
    driver.admit(0)
    output = driver.stages[0].step(driver.step("prefill", [driver.segment(0, 0, [1, 2, 3])]), memoryview(b""))
    assert isinstance(output, memoryview)
    assert output.nbytes == 3 * 256 * 4
    driver.close()


def test_settings_reach_weights_cache_and_entries(load: Load, cache_dir: Path) -> None:
    before = files_of(cache_dir)
    driver = load(weight_dtypes=WIDE)
    run(driver)
    made = {path.partition("-")[0] for path in files_of(cache_dir) - before}
    # The embedding does not depend on the change.
    assert made == {"layer0", "layer1", "head"}
    layer = driver.stages[0].model.layers[1]
    assert layer.block is MoEBlock
    config: Any = layer.configs.decode
    found = {
        "attention": config["self_attn"]["wq_b"].input_tensor_b,
        "kv_cache": config["self_attn"]["kv_cache"],
        "router": config["mlp"]["gate"].input_tensor_b,
        "gate_up": config["mlp"]["experts"].w1,
        "down": config["mlp"]["shared_experts"]["w2"].input_tensor_b,
    }
    assert {kind: tensor.dtype for kind, tensor in found.items()} == {
        "attention": ttnn.bfloat16,
        "kv_cache": ttnn.bfloat16,
        "router": ttnn.bfloat16,
        "gate_up": ttnn.bfloat8_b,
        "down": FLOATS[WIDE.down],
    }


def test_the_layer_that_drafts_is_converted_and_run(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=OVERRIDES, mtp_layer=True)
    driver = DraftDriver(model, tmp_path / "cache", (1, COLUMNS))
    texts = {slot: [*prompt, 4, 5, 6, 7] for slot, prompt in PROMPTS.items()}
    found = driver.prefill(texts, {slot: len(prompt) for slot, prompt in PROMPTS.items()}, chunk=32)
    # Three lanes of each request.
    found |= driver.decode(texts, {slot: range(len(prompt), len(prompt) + 3) for slot, prompt in PROMPTS.items()})
    driver.close()
    assert len(found) == sum(len(prompt) + 3 for prompt in PROMPTS.values())
    assert {tuple(row.shape) for row in found.values()} == {(512,)}
    parts = {path.partition("-")[0] for path in files_of(tmp_path / "cache")}
    assert parts == {"embedding", "layer0", "layer1", "head", "mtp2"}


def test_heads_that_chips_cannot_exchange_are_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    cache = cache_options(slots=COLUMNS, pools=COLUMNS)
    with pytest.raises(PlanError, match=r"8 attention heads cannot be exchanged by 8 columns of chips"):
        Driver.load(stage_options(model, tmp_path / "cache", cache=cache), mesh_shape=(1, COLUMNS))


def test_one_chip_takes_the_sample_models_sizes(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    driver = Driver.load(stage_options(model, tmp_path / "cache"), mesh_shape=(1, 1))
    driver.admit(0)
    driver.admit(1)
    assert driver.prefill({0: [1] * 40, 1: [2]}).shape == (2, 512)
    assert driver.decode({0: (40, 1), 1: (1, 2)}).shape == (2, 512)
    driver.close()
