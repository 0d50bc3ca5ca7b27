"""The numbers of ops in predictions of time, against those counted in the modules' forward passes."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import candidates
from stages.backend import composite
from stages.candidates import CandidateFinder
from stages.capacity.step_time import CANDIDATE_OPS, MATMUL_FIDELITY
from stages.models import rope
from stages.models.architecture import Launches
from stages.models.deepseek_v3 import decoder_block, embedding, lm_head, mla, mlp, moe, mtp, rms_norm
from stages.models.deepseek_v3.architecture import OPS
from stages.models.module import matmul_kernel
from stages.tensor_dtypes import TILE
from tests.support.checkpoints import write_checkpoint
from tests.support.draft_driver import DraftDriver
from tests.support.embedded_meshes import put
from tests.support.stage_driver import Driver, cache_options, stage_options

MODULES = (candidates, composite, decoder_block, embedding, lm_head, mla, mlp, moe, mtp, rms_norm, rope)
MESH = (2, 8)
R1_ROUTING = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
"""The numbers for which chips have a fused gate."""

NO_OPS = {"from_torch", "to_torch", "ConcatMesh2dToTensor", "empty"}
"""Functions that move inputs and results, or allocate memory, without a kernel."""


class Counter:
    """A stand-in for a namespace of ttnn that counts calls of its functions."""

    def __init__(self, namespace: Any, calls: list[str]) -> None:
        self._namespace = namespace
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._namespace, name)
        if isinstance(value, types.ModuleType | types.SimpleNamespace):
            return Counter(value, self._calls)
        if not isinstance(value, types.FunctionType) or name in NO_OPS:
            return value

        def counted(*arguments: Any, **options: Any) -> Any:
            self._calls.append(name)
            return value(*arguments, **options)

        return counted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer, one with experts, and one that drafts."""
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
    return write_checkpoint(tmp_path_factory.mktemp("model"), overrides={**R1_ROUTING, **layers}, mtp_layer=True)


@pytest.fixture(scope="module")
def driver(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """The model on a mesh with collectives on both axes."""
    options = stage_options(model, tmp_path_factory.mktemp("cache"), cache=cache_options(slots=32, pools=16))
    return Driver.load(options, mesh_shape=MESH)


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Records the ops of the chips' algorithms, in the order of their calls."""
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composite, "DEVICE", "ttnn")
        for module in MODULES:
            patch.setattr(module, "ttnn", Counter(module.ttnn, names))
        yield names


def of_a_step(mode: int) -> int:
    every: tuple[tuple[int, Launches], ...] = (
        (1, OPS.enter),
        (5, OPS.norm),
        (2, OPS.attention),
        (2, OPS.residual),
        (1, OPS.mlp),
        (1, OPS.mixture),
        (1, OPS.head),
    )
    return sum(count * ops[mode] for count, ops in every)


def test_products_have_the_fidelity_that_predictions_go_by() -> None:
    assert matmul_kernel().math_fidelity.name == MATMUL_FIDELITY


def test_of_a_prefill_step_and_a_decode_step(driver: Driver, calls: list[str]) -> None:
    driver.admit(0)
    driver.prefill({0: list(range(40))})
    prefill = len(calls)
    driver.decode({0: (40, 7)})
    # Eight tokens, one for each column, are cut out of a tile after the experts; on chips steps have whole tiles.
    assert (prefill, len(calls) - prefill) == (of_a_step(1), of_a_step(0) + 1), calls


@pytest.mark.parametrize(("vocabulary", "padding"), [(512, 0), (500, 1)])
def test_of_candidates(driver: Driver, calls: list[str], vocabulary: int, padding: int) -> None:
    [stage] = driver.stages
    finder = CandidateFinder(stage.mesh_device, vocabulary)
    logits = put(stage.mesh_device, torch.zeros(1, 1, TILE, 512 // MESH[1]))
    del calls[:]
    finder.find(logits)
    assert len(calls) == CANDIDATE_OPS.decode + padding == CANDIDATE_OPS.prefill + padding, calls


def of_drafting(mode: int) -> int:
    """A pass of the multi-token-prediction layer and the head: three norms are its own, two its decoder layer's."""
    every: tuple[tuple[int, Launches], ...] = (
        (5, OPS.norm),
        (1, OPS.draft),
        (1, OPS.attention),
        (1, OPS.residual),
        (1, OPS.mixture),
        (1, OPS.head),
    )
    return sum(count * ops[mode] for count, ops in every)


def test_of_drafting_behind_a_prefill_step_and_a_decode_step(model: Path, calls: list[str], tmp_path: Path) -> None:
    driver = DraftDriver(model, tmp_path, MESH)
    texts = {0: list(range(50))}
    del calls[:]
    driver.prefill(texts, {0: 40}, 64)
    prefill = len(calls)
    driver.decode(texts, {0: range(40, 41)})
    driver.close()
    # The step's own layers come first; of decode steps, as above, both mixtures cut their tokens out of a tile.
    layers = [of_a_step(mode) - OPS.head[mode] - OPS.norm[mode] for mode in (0, 1)]
    decode = layers[0] + 1 + of_drafting(0) + 1
    assert (prefill, len(calls) - prefill) == (layers[1] + of_drafting(1), decode), calls
