"""The example of the upstream README runs as it is written, and each of its stages in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

from stages.backend import set_float_dtype, ttnn
from stages.models.deepseek_v3.mlp import MLP
from stages.run_config import LinearConfig, MulConfig
from tests import ROOT
from tests.support.stage_driver import relative_error

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}

CONVERT = """
import sys
from pathlib import Path
import torch
from transformers import DeepseekV3Config
from stages.backend import set_float_dtype, ttnn
from stages.models.deepseek_v3.mlp import MLP
import json
folder = Path(sys.argv[1])
set_float_dtype(torch.float32)
mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
hf_config = DeepseekV3Config.from_dict(json.loads(sys.argv[2]))
print(json.dumps(MLP.convert_weights(hf_config, torch.load(folder / "mlp.pt"), folder / "weights", mesh_device)))
"""


@pytest.fixture
def hf_config() -> DeepseekV3Config:
    return DeepseekV3Config.from_dict(SIZES)


@pytest.fixture
def reference(hf_config: DeepseekV3Config) -> DeepseekV3MLP:
    torch.manual_seed(0)
    model: DeepseekV3MLP = DeepseekV3MLP(hf_config).eval()  # type: ignore[no-untyped-call]
    return model


@pytest.fixture
def mesh_device() -> ttnn.MeshDevice:
    set_float_dtype(torch.float32)
    return ttnn.open_mesh_device(ttnn.MeshShape(1, 1))


def on_mesh(x: torch.Tensor, mesh_device: ttnn.MeshDevice) -> ttnn.Tensor:
    return ttnn.from_torch(x, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh_device)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@torch.inference_mode()
def test_the_example_runs_as_written(
    mode: str,
    hf_config: DeepseekV3Config,
    reference: DeepseekV3MLP,
    mesh_device: ttnn.MeshDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch_state_dict = reference.state_dict()
    x = torch.randn(1, 1, 7, 64)
    input_tensor = on_mesh(x, mesh_device)

    # Stage 1: Convert weights and get weight_config (saves to disk in standard format)
    weight_config = MLP.convert_weights(hf_config, torch_state_dict, Path("weights/mlp"), mesh_device)

    # Stage 2: Generate operator configs (returns nested dicts with TTNN objects)
    if mode == "prefill":
        model_config = MLP.prefill_model_config(hf_config, mesh_device)
    else:
        model_config = MLP.decode_model_config(hf_config, mesh_device)

    # Stage 3: Generate the runtime state of the model
    model_state = MLP.create_state(hf_config, mesh_device)

    # Stage 3: Runtime execution
    run_config = MLP.run_config(model_config, weight_config, model_state)
    if mode == "prefill":
        output = MLP.forward_prefill(input_tensor, run_config)
    else:
        output = MLP.forward_decode(input_tensor, run_config)

    assert {name: Path(str(path)).name for name, path in weight_config.items()} == {
        "w1": "w1.input_tensor_b.tensorbin",
        "w2": "w2.input_tensor_b.tensorbin",
        "w3": "w3.input_tensor_b.tensorbin",
    }
    assert isinstance(model_config["w1"], LinearConfig)
    assert isinstance(model_config["mul_activation"], MulConfig)
    assert relative_error(ttnn.to_torch(output), reference(x)) < 1e-6


@pytest.mark.slow
@torch.inference_mode()
def test_weights_converted_by_another_process(
    hf_config: DeepseekV3Config, reference: DeepseekV3MLP, mesh_device: ttnn.MeshDevice, tmp_path: Path
) -> None:
    torch.save(reference.state_dict(), tmp_path / "mlp.pt")
    converted = subprocess.run(
        [sys.executable, "-c", CONVERT, str(tmp_path), json.dumps(SIZES)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    (tmp_path / "mlp.pt").unlink()
    run_config = MLP.run_config(
        MLP.prefill_model_config(hf_config, mesh_device),
        json.loads(converted.stdout),
        MLP.create_state(hf_config, mesh_device),
    )
    x = torch.randn(1, 1, 5, 64)
    output = MLP.forward_prefill(on_mesh(x, mesh_device), run_config)
    assert relative_error(ttnn.to_torch(output), reference(x)) < 1e-6
