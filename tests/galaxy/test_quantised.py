"""The sample model with weights in block floats, which ttnn itself makes and which are exact on the host.

Weights are converted here, and read back as the values that a chip would compute with. Teacher forcing runs on the
embedded device, in a process of its own, as this one is bound to ttnn.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.backend import ttnn
from stages.converted_weights import ConvertedWeights, stage_parts
from stages.device import DEVICE_VARIABLE
from stages.plan import plan_stages
from stages.run_config import WeightConfig
from stages.tensor_dtypes import WeightDtypes
from tests import ROOT
from weights.cache.cache import WeightCache
from weights.checkpoint import open_weights
from weights.sample import SAMPLE_DIR

SETTINGS = {
    "bfloat16": WeightDtypes(attention="bfloat16", gate_up="bfloat16", down="bfloat16", head="bfloat16"),
    "bfloat8_b": WeightDtypes(gate_up="bfloat8_b"),
    "default": WeightDtypes(),
}
SAME_WEIGHTS_MIN = 0.99
"""The least agreement with the checkpoint's own bfloat16 values: all positions but near ties."""
QUANTISED_MIN = 0.8
"""The least agreement with block floats: far below what was measured, and far above chance, which is 1 in 1024."""


@pytest.fixture(scope="module")
def chip() -> Iterator[ttnn.MeshDevice]:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
    yield mesh
    ttnn.close_mesh_device(mesh)


def each_file(files: WeightConfig) -> Iterator[str]:
    for value in files.values():
        if isinstance(value, str):
            yield value
        else:
            yield from each_file(value)


def read_back(weights: ConvertedWeights, directory: Path) -> None:
    """Converts weights for a chip, and writes the values that it would compute with to files in `directory`."""
    config = weights.source.config
    [whole] = plan_stages(config, 1)
    parts = {part.name: weights.load(part) for part in stage_parts(config, whole)}
    files = [path for part in parts.values() for path in each_file(part)]
    for number, path in enumerate(files):
        torch.save(ttnn.to_torch(ttnn.load_tensor(path)), directory / f"{number}.pt")
    (directory / "parts.json").write_text(json.dumps({"parts": parts, "files": files}), encoding="utf-8")


@pytest.mark.parametrize("name", SETTINGS)
def test_teacher_forcing_with_weights_of_chips(
    name: str, chip: ttnn.MeshDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_weights(SAMPLE_DIR, load_format="auto", seed=0)
    read_back(ConvertedWeights(source, WeightCache(tmp_path / "cache"), "bfloat16", chip, SETTINGS[name]), tmp_path)
    process = subprocess.run(
        [sys.executable, "-m", "tests.galaxy.teacher_forcing", str(tmp_path)],
        env={**os.environ, DEVICE_VARIABLE: "embedded", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{name}: top-1 {result['top1']:.4f} of {result['positions']} positions, probabilities of the best "
            f"tokens differ by {result['difference']:.4f} in the mean\n"
        )
    assert result["top1"] >= (SAME_WEIGHTS_MIN if name == "bfloat16" else QUANTISED_MIN)
