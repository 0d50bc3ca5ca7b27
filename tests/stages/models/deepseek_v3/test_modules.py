"""Each module on meshes of several shapes against transformers' module, by value, and the joining of its configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
)

from stages.backend import composite, set_float_dtype, ttnn
from stages.errors import DeviceError, PlanError
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mla import convert_mla_weights
from stages.models.deepseek_v3.mlp import MLP
from stages.models.deepseek_v3.moe import MoE
from stages.models.deepseek_v3.rms_norm import RMSNorm
from stages.run_config import (
    LinearConfig,
    MulConfig,
    load_weight_config,
    merge_run_config,
    save_weight_config,
)
from tests.support.checkpoints import config_keys
from tests.support.stage_driver import relative_error
from weights.model_config import ModelConfig
from weights.source import PrefixView

TOLERANCE = 1e-6
TOKENS = 64
MESHES = [(1, 1), (1, 8), (2, 4), (8, 1)]
KEYS = config_keys({"rms_norm_eps": 1e-3, "n_shared_experts": 2})
HF_CONFIG = DeepseekV3Config.from_dict(KEYS)

mesh_shapes = pytest.mark.parametrize("mesh_device", MESHES, indirect=True, ids=lambda shape: f"{shape[0]}x{shape[1]}")


@pytest.fixture
def mesh_device(request: pytest.FixtureRequest) -> ttnn.MeshDevice:
    set_float_dtype(torch.float32)
    return ttnn.open_mesh_device(ttnn.MeshShape(*getattr(request, "param", (1, 1))))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def on_mesh(x: torch.Tensor, mesh_device: ttnn.MeshDevice, dims: tuple[int | None, int | None]) -> ttnn.Tensor:
    mapper = ttnn.ShardTensor2dMesh(mesh_device, tuple(mesh_device.shape), dims)
    return ttnn.from_torch(x, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh_device, mesh_mapper=mapper)


def hidden_on_mesh(x: torch.Tensor, mesh_device: ttnn.MeshDevice) -> ttnn.Tensor:
    """[1, 1, tokens, hidden]: tokens shared by the rows, hidden by the columns."""
    return on_mesh(x, mesh_device, (2, 3))


def from_mesh(x: ttnn.Tensor, mesh_device: ttnn.MeshDevice) -> torch.Tensor:
    composer = ttnn.ConcatMesh2dToTensor(mesh_device, tuple(mesh_device.shape), (2, 3))
    return ttnn.to_torch(x, mesh_composer=composer)


def run_configs(module: Any, state_dict: Any, path: Path, mesh_device: ttnn.MeshDevice) -> tuple[Any, Any]:
    """Returns the run configs of prefill and of decode, from the same files."""
    files = module.convert_weights(HF_CONFIG, state_dict, path, mesh_device)
    state = module.create_state(HF_CONFIG, mesh_device)
    return (
        module.run_config(module.prefill_model_config(HF_CONFIG, mesh_device), files, state),
        module.run_config(module.decode_model_config(HF_CONFIG, mesh_device), files, state),
    )


def check(module: Any, reference: torch.nn.Module, path: Path, mesh_device: ttnn.MeshDevice, state_dict: Any) -> None:
    """Runs prefill and decode of a module, from hidden states to hidden states."""
    prefill, decode = run_configs(module, state_dict, path, mesh_device)
    x = torch.randn(1, 1, TOKENS, KEYS["hidden_size"])
    expected = reference(x[0])[None]
    for forward, config in ((module.forward_prefill, prefill), (module.forward_decode, decode)):
        output = from_mesh(forward(hidden_on_mesh(x, mesh_device), config), mesh_device)
        assert relative_error(output, expected) < TOLERANCE


@mesh_shapes
@torch.inference_mode()
def test_rms_norm(mesh_device: ttnn.MeshDevice, tmp_path: Path) -> None:
    reference = DeepseekV3RMSNorm(KEYS["hidden_size"], eps=KEYS["rms_norm_eps"])
    reference.weight.copy_(torch.randn(KEYS["hidden_size"]))
    check(RMSNorm, reference, tmp_path, mesh_device, reference.state_dict())


@mesh_shapes
@torch.inference_mode()
def test_mlp(mesh_device: ttnn.MeshDevice, tmp_path: Path) -> None:
    reference = DeepseekV3MLP(HF_CONFIG)  # type: ignore[no-untyped-call]
    check(MLP, reference, tmp_path, mesh_device, reference.state_dict())


def moe_reference(config: DeepseekV3Config = HF_CONFIG) -> tuple[DeepseekV3MoE, dict[str, torch.Tensor]]:
    """Returns transformers' mixture with random weights, and its tensors under a checkpoint's names."""
    reference: DeepseekV3MoE = DeepseekV3MoE(config)
    for parameter in reference.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    reference.gate.e_score_correction_bias.copy_(0.1 * torch.randn(config.n_routed_experts))
    state_dict = {name: value for name, value in reference.state_dict().items() if ".experts." not in f".{name}"}
    inner = KEYS["moe_intermediate_size"]
    for expert in range(config.n_routed_experts):
        gate_up = reference.experts.gate_up_proj[expert]
        state_dict[f"experts.{expert}.gate_proj.weight"] = gate_up[:inner]
        state_dict[f"experts.{expert}.up_proj.weight"] = gate_up[inner:]
        state_dict[f"experts.{expert}.down_proj.weight"] = reference.experts.down_proj[expert]
    return reference, state_dict


@mesh_shapes
@torch.inference_mode()
def test_moe(mesh_device: ttnn.MeshDevice, tmp_path: Path) -> None:
    reference, state_dict = moe_reference()
    check(MoE, reference, tmp_path, mesh_device, state_dict)


STACKED = {"n_shared_experts": 4, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
"""Sizes with which chips run all of their experts as one network, and numbers for which they have a fused gate."""

COMPOSED = {**STACKED, "n_routed_experts": 64, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize("numbers", [STACKED, COMPOSED], ids=["fused-gate", "composed-gate"])
@mesh_shapes
@torch.inference_mode()
def test_moe_as_chips_run_it(
    numbers: dict[str, int], mesh_device: ttnn.MeshDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composite, "DEVICE", "ttnn")
    config = DeepseekV3Config.from_dict({**KEYS, **numbers})
    reference, state_dict = moe_reference(config)
    files = MoE.convert_weights(config, state_dict, tmp_path, mesh_device)
    assert set(files["experts"]) == {"w13", "w2"}
    state = MoE.create_state(config, mesh_device)
    run_config = MoE.run_config(MoE.decode_model_config(config, mesh_device), files, state)
    x = torch.randn(1, 1, TOKENS, KEYS["hidden_size"])
    for _ in range(2):  # The second step finds the constants of the first.
        output = from_mesh(MoE.forward_decode(hidden_on_mesh(x, mesh_device), run_config), mesh_device)
        assert relative_error(output, reference(x[0])[None]) < TOLERANCE
    assert list(state["constants"]) == [TOKENS]


@mesh_shapes
@torch.inference_mode()
def test_embedding(mesh_device: ttnn.MeshDevice, tmp_path: Path) -> None:
    table = torch.randn(KEYS["vocab_size"], KEYS["hidden_size"])
    prefill, decode = run_configs(Embedding, {"weight": table}, tmp_path, mesh_device)
    ids = torch.randint(KEYS["vocab_size"], (1, TOKENS))
    mapper = ttnn.ShardTensor2dMesh(mesh_device, tuple(mesh_device.shape), (1, None))
    on_device = ttnn.from_torch(
        ids, dtype=ttnn.uint32, layout=ttnn.ROW_MAJOR_LAYOUT, device=mesh_device, mesh_mapper=mapper
    )
    assert torch.equal(from_mesh(Embedding.forward_prefill(on_device, prefill), mesh_device)[0, 0], table[ids[0]])
    assert torch.equal(from_mesh(Embedding.forward_decode(on_device, decode), mesh_device)[0, 0], table[ids[0]])


@mesh_shapes
@torch.inference_mode()
def test_lm_head(mesh_device: ttnn.MeshDevice, tmp_path: Path) -> None:
    vocabulary = KEYS["vocab_size"]
    norm = DeepseekV3RMSNorm(KEYS["hidden_size"], eps=KEYS["rms_norm_eps"])
    head = torch.randn(vocabulary, KEYS["hidden_size"])
    state_dict = {"model.norm.weight": norm.weight, "lm_head.weight": head}
    prefill, decode = run_configs(LMHead, state_dict, tmp_path, mesh_device)
    x = torch.randn(1, 1, TOKENS, KEYS["hidden_size"])
    expected = norm(x[0, 0]) @ head.T
    on_device = hidden_on_mesh(x, mesh_device)
    for logits in (LMHead.forward_prefill(on_device, prefill), LMHead.forward_decode(on_device, decode)):
        assert relative_error(LMHead.to_torch(logits, HF_CONFIG, mesh_device), expected) < TOLERANCE


@torch.inference_mode()
def test_the_head_pads_a_vocabulary_that_columns_cannot_share(tmp_path: Path) -> None:
    set_float_dtype(torch.float32)
    mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(1, 8))
    config = ModelConfig.from_dict({**KEYS, "vocab_size": 301}, source="test")
    head = torch.randn(301, KEYS["hidden_size"])
    state_dict = {"model.norm.weight": torch.ones(KEYS["hidden_size"]), "lm_head.weight": head}
    files = LMHead.convert_weights(config, state_dict, tmp_path, mesh_device)
    run_config = LMHead.run_config(
        LMHead.prefill_model_config(config, mesh_device), files, LMHead.create_state(config, mesh_device)
    )
    x = torch.randn(1, 1, 3, KEYS["hidden_size"])
    logits = LMHead.to_torch(LMHead.forward_prefill(hidden_on_mesh(x, mesh_device), run_config), config, mesh_device)
    norm = DeepseekV3RMSNorm(KEYS["hidden_size"], eps=KEYS["rms_norm_eps"])
    assert relative_error(logits, norm(x[0, 0]) @ head.T) < TOLERANCE


def test_sizes_that_the_mesh_cannot_share_are_refused(tmp_path: Path) -> None:
    mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(1, 3))
    config = ModelConfig.from_hf(HF_CONFIG)
    with pytest.raises(PlanError, match=r"attention heads \(8\) cannot be shared evenly by 3 chips"):
        convert_mla_weights(config, {}, tmp_path, mesh_device)
    with pytest.raises(PlanError, match=r"routed experts \(16\)"):
        MoE.convert_weights(HF_CONFIG, {}, tmp_path, mesh_device)
    with pytest.raises(PlanError, match=r"hidden size \(256\)"):
        Embedding.convert_weights(HF_CONFIG, {}, tmp_path, mesh_device)
    with pytest.raises(PlanError, match=r"feed-forward width \(64\)"):
        MLP.convert_weights(HF_CONFIG, {"gate_proj.weight": torch.zeros(64, 96)}, tmp_path, mesh_device)


def test_op_configs_leave_out_what_is_not_set() -> None:
    config = LinearConfig(memory_config=ttnn.L1_MEMORY_CONFIG)
    assert dict(**config) == {"memory_config": ttnn.L1_MEMORY_CONFIG}


@torch.inference_mode()
def test_operators_weights_and_state_must_fit_each_other(mesh_device: ttnn.MeshDevice, tmp_path: Path) -> None:
    weights = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    state_dict = {f"{name}.weight": torch.randn(*shape) for name, shape in weights.items()}
    files = MLP.convert_weights(HF_CONFIG, state_dict, tmp_path, mesh_device)
    operators = {"mlp": MLP.prefill_model_config(HF_CONFIG, mesh_device)}
    state = {"mesh_device": mesh_device, "mlp": MLP.create_state(HF_CONFIG, mesh_device)}
    merged = merge_run_config(operators, {"mlp": files}, state)
    assert merged["mlp"]["w1"].input_tensor_b.shape == (1, 1, 64, 96)
    assert merged["mlp"]["mesh_device"] is mesh_device
    with pytest.raises(DeviceError, match=r"without an operation to use them: mlp\.w4"):
        merge_run_config(operators, {"mlp": {**files, "w4": files["w1"]}}, state)
    with pytest.raises(DeviceError, match=r"w1.input_tensor_b.tensorbin.* 'input_tensor_b', which MulConfig"):
        merge_run_config({"mul": MulConfig()}, {"mul": files["w1"]}, state)
    with pytest.raises(DeviceError, match="mul names both an operation and a state"):
        merge_run_config({"mul": MulConfig()}, {}, {**state, "mul": 1})


def test_weight_configs_move_with_their_files(tmp_path: Path) -> None:
    (tmp_path / "old" / "mlp").mkdir(parents=True)
    old = tmp_path / "old"
    save_weight_config(old, {"mlp": {"w1": str(old / "mlp" / "w1.weight.tensorbin")}})
    assert "old" not in json.dumps(json.loads((old / "weight_config.json").read_text()))
    old.rename(tmp_path / "new")
    expected = {"mlp": {"w1": str(tmp_path / "new" / "mlp" / "w1.weight.tensorbin")}}
    assert load_weight_config(tmp_path / "new") == expected


def test_sub_state_dicts_are_lazy_views() -> None:
    names = {"mlp.gate.weight": torch.ones(1), "mlp.up.weight": torch.ones(2), "norm.weight": torch.ones(3)}
    view = PrefixView(names, "mlp.")
    assert list(view) == ["gate.weight", "up.weight"]
    assert len(view) == 2
    assert view["up.weight"].numel() == 2
    with pytest.raises(KeyError):
        view["norm.weight"]
