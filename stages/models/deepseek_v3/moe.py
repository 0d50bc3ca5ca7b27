"""The mixture of experts: a router, experts spread over all chips, and experts that every token shares.

Tokens of all rows come to every chip, each computes its own experts' part of the sum, and the sums go back to the
rows. Scores are sigmoids; the correction bias takes part in choosing experts but not in their weights (DeepSeek-V3,
arXiv:2412.19437, 2.1.2).
"""

from pathlib import Path
from typing import TypedDict

import torch

from stages.backend import composite, mixture, ttnn
from stages.models.deepseek_v3.expert_stack import stacked_expert, stacked_selection
from stages.models.deepseek_v3.mlp import MLP, PROJECTIONS, MLPRunConfig, MLPState
from stages.models.deepseek_v3.weight_specs import (
    INPUTS,
    expert_weights,
    router_weights,
    stacked_expert_weights,
    stacks_experts,
)
from stages.models.module import COLUMNS, ROWS, TokenwiseModule, matmul_kernel, share, transposed
from stages.run_config import (
    AllGatherConfig,
    LinearConfig,
    MoEGateConfig,
    OperatorConfig,
    ReduceScatterConfig,
    RoutedExpertsConfig,
    StateDict,
    WeightConfig,
    dump_weight,
)
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig
from weights.source import PrefixView


class MoEState(TypedDict):
    """State of a mixture: `select`, as weight_specs.selection has it, and constants of steps by their tokens."""

    mesh_device: ttnn.MeshDevice
    select: ttnn.Tensor
    constants: dict[int, mixture.StepConstants]
    shared_experts: MLPState


class MoERunConfig(TypedDict):
    """The arguments of a forward pass."""

    mesh_device: ttnn.MeshDevice
    select: ttnn.Tensor
    constants: dict[int, mixture.StepConstants]
    gather_hidden: AllGatherConfig
    gather_tokens: AllGatherConfig
    gate: LinearConfig
    route: MoEGateConfig
    experts: RoutedExpertsConfig
    scatter_tokens: ReduceScatterConfig
    shared_experts: MLPRunConfig
    scatter_hidden: ReduceScatterConfig


class MoE(TokenwiseModule[MoERunConfig]):
    """The weighted sum of the chosen experts, plus the shared ones."""

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes router, routed and shared experts; `torch_state_dict` has the names of a checkpoint's mlp.

        Raises PlanError where the experts cannot be shared by the chips.
        """
        config = ModelConfig.from_hf(hf_config)
        share(config.n_routed_experts, mesh_device.get_num_devices(), "The number of routed experts")
        router = {
            "gate": transposed(torch_state_dict, "gate.weight"),
            "route": torch_state_dict["gate.e_score_correction_bias"][None, None, None],
        }
        files: WeightConfig = {
            operation: dump_weight(output_path, operation, spec, router[operation], mesh_device)
            for operation, spec in router_weights(config, dtypes).items()
        }
        rows, parts = tuple(mesh_device.shape)
        is_stacked = stacks(config)
        specs = stacked_expert_weights if is_stacked else expert_weights
        files["experts"] = {
            operand: dump_weight(
                output_path,
                "experts",
                spec,
                stacked_expert(config, torch_state_dict, operand, rows, parts)
                if is_stacked
                else each_expert(config, torch_state_dict, PROJECTIONS[operand]),
                mesh_device,
            )
            for operand, spec in specs(config, dtypes).items()
        }
        if not is_stacked:
            shared = PrefixView(torch_state_dict, "shared_experts.")
            below = output_path / "shared_experts"
            files["shared_experts"] = MLP.convert(shared, below, mesh_device, dtypes, down=INPUTS)
        return files

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for many tokens: intermediate results go to DRAM."""
        shared = MLP.prefill_model_config(hf_config, mesh_device)
        return cls._model_config(ModelConfig.from_hf(hf_config), ttnn.DRAM_MEMORY_CONFIG, shared)

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a user: intermediate results stay in L1."""
        shared = MLP.decode_model_config(hf_config, mesh_device)
        return cls._model_config(ModelConfig.from_hf(hf_config), ttnn.L1_MEMORY_CONFIG, shared)

    @classmethod
    def _model_config(
        cls, config: ModelConfig, memory_config: ttnn.MemoryConfig, shared: OperatorConfig
    ) -> OperatorConfig:
        return {
            "gather_hidden": AllGatherConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
            "gather_tokens": AllGatherConfig(dim=2, cluster_axis=ROWS, memory_config=memory_config),
            "gate": LinearConfig(dtype=ttnn.float32, memory_config=memory_config),
            "route": MoEGateConfig(
                n_groups=config.n_group,
                topk_groups=config.topk_group,
                n_activated_experts=config.num_experts_per_tok,
                route_scale=config.routed_scaling_factor,
                norm_topk_prob=config.norm_topk_prob,
            ),
            "experts": RoutedExpertsConfig(memory_config=memory_config, compute_kernel_config=matmul_kernel()),
            "scatter_tokens": ReduceScatterConfig(dim=2, cluster_axis=ROWS, memory_config=memory_config),
            "shared_experts": shared,
            "scatter_hidden": ReduceScatterConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
        }

    @classmethod
    def create_state(cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice) -> MoEState:
        """Returns the selection of each chip's experts."""
        config = ModelConfig.from_hf(hf_config)
        return {
            "mesh_device": mesh_device,
            "select": stacked_selection(config, mesh_device) if stacks(config) else _selection(config, mesh_device),
            "constants": {},
            # They multiply what is gathered already.
            "shared_experts": {"mesh_device": mesh_device, "up_semaphores": [], "down_semaphores": []},
        }

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: MoERunConfig) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape."""
        own = composite.all_gather(x, **cfg["gather_hidden"])
        every = composite.all_gather(own, **cfg["gather_tokens"])
        logits = ttnn.linear(every, **cfg["gate"])
        if cfg["experts"].w13 is not None:
            return cls._stacked(every, logits, cfg)
        weights, indices = composite.moe_gate(logits, **cfg["route"])
        routed = composite.routed_experts(every, weights, indices, select=cfg["select"], **cfg["experts"])
        routed = composite.reduce_scatter(routed, **cfg["scatter_tokens"])
        # Both are partial sums over columns, so that one reduce-scatter suffices.
        partial = ttnn.add(routed, MLP.forward_partial(own, cfg["shared_experts"]))
        return composite.reduce_scatter(partial, **cfg["scatter_hidden"])

    @classmethod
    def _stacked(cls, every: ttnn.Tensor, logits: ttnn.Tensor, cfg: MoERunConfig) -> ttnn.Tensor:
        """The forward pass from the router's logits on, with all experts of a chip as one network."""
        route = cfg["route"]
        constants = mixture.step_constants(cfg["constants"], route["bias"], every.shape[2])
        weights = mixture.routing(logits, constants, **route)
        partial = mixture.stacked_experts(every, weights, select=cfg["select"], **cfg["experts"])
        partial = composite.reduce_scatter(partial, **cfg["scatter_tokens"])
        return composite.reduce_scatter(partial, **cfg["scatter_hidden"])


def stacks(config: ModelConfig) -> bool:
    """Whether the device of this process runs a chip's experts as one network."""
    return composite.is_on_chips() and stacks_experts(config)


def _selection(config: ModelConfig, mesh_device: ttnn.MeshDevice) -> ttnn.Tensor:
    """Each chip's columns of the identity, [1, 1, experts, experts / chips]."""
    return ttnn.from_torch(
        torch.eye(config.n_routed_experts)[None, None],
        dtype=ttnn.bfloat16,
        layout=ttnn.TILE_LAYOUT,
        device=mesh_device,
        mesh_mapper=ttnn.ShardTensorToMesh(mesh_device, dim=3),
    )


def each_expert(config: ModelConfig, state_dict: StateDict, projection: str) -> torch.Tensor:
    """[1, experts, in, out], a view of [experts, out, in] as checkpoints store each one.

    It is filled expert by expert, so that no second copy of all of them is ever held. The dtype is that of the
    checkpoint's values, or float32 for FP8 values times a scale.
    """
    first = state_dict[f"experts.0.{projection}"]
    stack = torch.empty(config.n_routed_experts, *first.shape, dtype=first.dtype)
    for expert in range(config.n_routed_experts):
        stack[expert] = state_dict[f"experts.{expert}.{projection}"]
    return stack.transpose(1, 2)[None]
