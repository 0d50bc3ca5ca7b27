"""The multi-token-prediction layer against a plain reference of its description (arXiv:2412.19437, 2.2), by value."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from stages.backend import set_float_dtype, ttnn
from stages.errors import PlanError
from stages.models.deepseek_v3 import mtp
from stages.models.deepseek_v3.mtp import MTP, by_column
from tests.support import draft_driver
from tests.support.checkpoints import reference_model, stored_tensors, write_checkpoint
from tests.support.draft_driver import DraftDriver, load_slice
from tests.support.model_errors import prompts
from tests.support.stage_driver import cache_options, relative_error
from weights.checkpoint import Checkpoint, RandomCheckpoint
from weights.errors import CheckpointError
from weights.model_config import ConfigChanges
from weights.sample import PROMPTS_FILE, SAMPLE_DIR

TOLERANCE = 1e-4
MODEL: dict[str, Any] = {"vocab_size": 320, "num_hidden_layers": 2}
VOCABULARY = MODEL["vocab_size"]
NO_LAYER = r"^The model has no multi-token-prediction layer: leave out --num-speculative-tokens\.$"


class Reference:
    """What the layer gives for whole texts, with transformers' decoder layer and everything else written out."""

    def __init__(self, path: Path) -> None:
        keys = json.loads((path / "config.json").read_text())
        self._layers, self._epsilon = keys["num_hidden_layers"], keys["rms_norm_eps"]
        self._tensors = stored_tensors(path)
        self._model: Any = reference_model(path, mtp_layer=True)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens - 1, vocabulary]: row i predicts token i + 2, given tokens 0 to i + 1."""
        hidden, others = self._seen_by_the_layer(tokens)
        # The last token has none after it; what stands in its place is seen by no other, and left out.
        following = self._tensors["model.embed_tokens.weight"][torch.tensor([*tokens[1:], 0])]
        both = torch.cat([self._norm(following, self._own("enorm")), self._norm(hidden, self._own("hnorm"))], dim=-1)
        output: torch.Tensor = self._layer((both @ self._own("eh_proj").T)[None], **others)
        return self._head(output[0], self._own("shared_head.norm"))[:-1]

    @torch.inference_mode()
    def best(self, tokens: Sequence[int]) -> list[int]:
        """The model's own best token after each."""
        hidden, _ = self._seen_by_the_layer(tokens)
        best: list[int] = self._head(hidden, self._tensors["model.norm.weight"]).argmax(-1).tolist()
        return best

    @property
    def _layer(self) -> Any:
        """The layer's decoder layer, which follows the model's own."""
        return self._model.model.layers[self._layers]

    def _seen_by_the_layer(self, tokens: Sequence[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns the hidden states of the last layer, and the mask and positions that a layer takes."""
        seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def see(_layer: torch.nn.Module, inputs: tuple[torch.Tensor], others: dict[str, Any]) -> None:
            seen.append((inputs[0][0], others))

        hook = self._layer.register_forward_pre_hook(see, with_kwargs=True)
        self._model(torch.tensor([tokens]), use_cache=False)
        hook.remove()
        return seen[0]

    def _own(self, name: str) -> torch.Tensor:
        return self._tensors[f"model.layers.{self._layers}.{name}.weight"]

    def _norm(self, x: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = x * (x.square().mean(-1, keepdim=True) + self._epsilon).rsqrt() * gains
        return values

    def _head(self, hidden: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._norm(hidden, gains) @ self._tensors["lm_head.weight"].T
        return logits


Load = Callable[..., DraftDriver]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Loads models onto meshes, which are closed at the end."""
    drivers: list[DraftDriver] = []

    def loaded(model: Path, mesh_shape: tuple[int, int] = (1, 1), **options: Any) -> DraftDriver:
        drivers.append(DraftDriver(model, tmp_path / "cache", mesh_shape, **options))
        return drivers[-1]

    yield loaded
    for driver in drivers:
        driver.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), overrides=MODEL, mtp_layer=True)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 8), (2, 8)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("chunk", [128, 32])
def test_values_of_prefill_and_of_lanes(
    chunk: int, mesh_shape: tuple[int, int], model: Path, reference: Reference, load: Load
) -> None:
    """The last tokens of texts come as lanes of decode steps, several of a request in one."""
    pools = mesh_shape[0] * mesh_shape[1]
    # Two slots of one pool, and one of another row or column.
    slots = [0, pools, pools - 1] if pools > 1 else [0, 1, 2]
    texts = dict(zip(slots, [text for text in prompts(6, VOCABULARY) if len(text) > 40][:3], strict=True))
    driver = load(model, mesh_shape, picks=chunk == 32)

    lengths = {slot: len(text) - 8 for slot, text in texts.items()}
    found = driver.prefill(texts, lengths, chunk)
    for lanes in (3, 1, 3):
        found |= driver.decode(texts, {slot: range(length, length + lanes) for slot, length in lengths.items()})
        lengths = {slot: length + lanes for slot, length in lengths.items()}

    for slot, text in texts.items():
        expected = reference.logits(text)
        rows = torch.stack([found[slot, position] for position in range(len(text) - 1)])
        assert max(relative_error(row, true) for row, true in zip(rows, expected, strict=True)) < TOLERANCE


def halves_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp, "by_column", lambda weight, parts: by_column(weight.roll(weight.shape[2] // 2, 2), parts))


def rows_in_the_checkpoints_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp, "by_column", lambda weight, _parts: weight)


def norms_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp, "NORMS", {**mtp.NORMS, "enorm": "hnorm.", "hnorm": "enorm."})


def no_norm_before_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MTP, "norm", lambda x, _config: x)


def the_same_tokens_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_driver, "following", lambda _text, segment: segment.tokens)


@pytest.mark.parametrize(
    "plant",
    [halves_swapped, rows_in_the_checkpoints_order, norms_swapped, no_norm_before_the_head, the_same_tokens_again],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_mistake_shows(
    plant: Callable[[pytest.MonkeyPatch], None],
    model: Path,
    reference: Reference,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [text] = prompts(1, VOCABULARY)
    expected = reference.logits(text)
    plant(monkeypatch)
    found = load(model, (1, 8)).prefill({0: text}, {0: len(text) - 1}, 32)
    rows = torch.stack([found[0, position] for position in range(len(text) - 1)])
    assert relative_error(rows, expected) > 10 * TOLERANCE


def test_a_layer_in_fp8_beside_a_projection_that_is_not(tmp_path: Path, load: Load) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=MODEL, dtype="fp8", shards=3, mtp_layer=True)
    [text] = prompts(1, VOCABULARY)
    found = load(model).prefill({0: text}, {0: len(text) - 1}, 32)
    expected = Reference(model).logits(text)
    for position, row in enumerate(expected):
        assert relative_error(found[0, position], row) < TOLERANCE


def test_the_sample_drafts_what_it_answers(load: Load) -> None:
    """With greedy sampling, a draft is accepted where it is what the model itself has as best."""
    tokenizer = Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))
    cases = [case for case in json.loads(PROMPTS_FILE.read_text(encoding="utf-8")) if len(case["text"]) > 60][:8]
    reference = Reference(SAMPLE_DIR)
    driver = load(SAMPLE_DIR, length=512)
    right, made = 0, 0
    for case in cases:
        text = tokenizer.encode(case["prompt"] + case["text"]).ids
        begin = len(tokenizer.encode(case["prompt"]).ids)
        found = driver.prefill({0: text}, {0: len(text) - 1}, 512)
        best = reference.best(text)
        for position in range(begin - 1, len(text) - 1):
            right += int(found[0, position].argmax()) == best[position + 1]
            made += 1
    assert made > 200
    assert right / made > 0.85, (right, made)


# Loading


@pytest.fixture
def mesh() -> Iterator[ttnn.MeshDevice]:
    set_float_dtype(torch.float32)
    opened = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
    yield opened
    ttnn.close_mesh_device(opened)


def test_the_last_of_two_stages_has_an_embedding_for_drafts_alone(
    model: Path, tmp_path: Path, mesh: ttnn.MeshDevice
) -> None:
    source, cache = Checkpoint.open(model), cache_options()
    last = load_slice(source, tmp_path, mesh, cache, stages=2)
    assert last.draft is not None
    assert (last.embedding, last.draft.head) == (None, last.head)
    assert last.draft.kv_cache.shape == last.layers[0].kv_cache.shape
    assert last.draft.kv_cache is not last.layers[0].kv_cache
    whole = load_slice(source, tmp_path, mesh, cache)
    assert whole.draft is not None
    assert whole.draft.embedding is whole.embedding
    assert load_slice(source, tmp_path, mesh, cache, drafts=False).draft is None


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 1}])
def test_a_model_without_the_layer_drafts_nothing(
    changes: dict[str, Any], tmp_path: Path, mesh: ttnn.MeshDevice
) -> None:
    """Even where its config.json counts the layer; without drafts it is served as ever."""
    source = Checkpoint.open(write_checkpoint(tmp_path / "model", overrides={**MODEL, **changes}))
    with pytest.raises(PlanError, match=NO_LAYER):
        load_slice(source, tmp_path / "cache", mesh, cache_options())
    assert load_slice(source, tmp_path / "cache", mesh, cache_options(), drafts=False).draft is None


def test_the_first_layers_of_a_model_draft_nothing(model: Path, tmp_path: Path, mesh: ttnn.MeshDevice) -> None:
    source = Checkpoint.open(model, ConfigChanges(num_hidden_layers=1))
    with pytest.raises(PlanError, match=NO_LAYER):
        load_slice(source, tmp_path, mesh, cache_options())


def test_a_layer_in_part_is_refused_before_anything_is_converted(tmp_path: Path, mesh: ttnn.MeshDevice) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=MODEL, mtp_layer=True)
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    del tensors["model.layers.2.hnorm.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lists no tensor 'model\.layers\.2\.hnorm\.weight'"):
        load_slice(Checkpoint.open(model), tmp_path / "cache", mesh, cache_options())
    assert not (tmp_path / "cache").exists()


def test_a_hidden_size_that_the_mesh_cannot_share_is_refused(model: Path, tmp_path: Path) -> None:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 3))
    with pytest.raises(PlanError, match=r"hidden size \(256\) cannot be shared evenly by 3 chips"):
        MTP.convert_weights(Checkpoint.open(model).config, {}, tmp_path, mesh)
    ttnn.close_mesh_device(mesh)


def test_a_dense_layer_follows_dense_layers(tmp_path: Path, mesh: ttnn.MeshDevice) -> None:
    source = Checkpoint.open(write_checkpoint(tmp_path / "model", overrides={**MODEL, "first_k_dense_replace": 3}))
    random = RandomCheckpoint(source.config, seed=0)
    assert "model.layers.2.mlp.gate_proj.weight" in random.names("model.layers.2.")
    last = load_slice(random, tmp_path / "cache", mesh, cache_options())
    assert last.draft is not None


def test_a_column_has_the_same_values_of_both_inputs() -> None:
    weight = torch.randn(1, 1, 16, 8)
    embedding, hidden = torch.randn(8), torch.randn(8)
    expected = torch.cat([embedding, hidden]) @ weight[0, 0]
    for parts in (1, 2, 4, 8):
        inputs = torch.cat([embedding.view(parts, -1), hidden.view(parts, -1)], dim=1)
        shares = by_column(weight, parts)[0, 0].view(parts, 16 // parts, 8)
        torch.testing.assert_close(sum(own @ share for own, share in zip(inputs, shares, strict=True)), expected)
