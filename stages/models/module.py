"""What all modules share: the way their configs become one, and the settings of matrix kernels."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

import torch

from stages.backend import ttnn
from stages.errors import PlanError
from stages.run_config import OperatorConfig, StateDict, WeightConfig, merge_run_config
from weights.model_config import HuggingFaceConfig, ModelConfig

RunConfigT = TypeVar("RunConfigT")

ROWS = 0
"""Mesh axis that shares out the batch."""

COLUMNS = 1
"""Mesh axis of tensor parallelism."""


class Module(Generic[RunConfigT]):
    """Base of the modules: namespaces of class methods, never instantiated.

    Beside these a module has `convert_weights`, `create_state`, `forward_prefill` and `forward_decode`. Each of the
    three stages before the forward pass can run in a process of its own.
    """

    @classmethod
    @abstractmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs of the forward pass over many tokens."""

    @classmethod
    @abstractmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs of the forward pass over one token a user."""

    @classmethod
    def run_config(
        cls,
        model_config: OperatorConfig,
        weight_config: WeightConfig,
        model_state: Mapping[str, Any],
        loaded: dict[str, ttnn.Tensor] | None = None,
    ) -> RunConfigT:
        """Joins what the three stages made; loads the weights onto the mesh `model_state["mesh_device"]`.

        `loaded` are tensors by file that are on the mesh already, and is added to: with it a prefill and a decode
        config share their weights. Raises DeviceError where a weight file fits no operation.
        """
        return cast(RunConfigT, merge_run_config(model_config, weight_config, model_state, loaded))


class TokenwiseModule(Module[RunConfigT]):
    """Base of the modules that compute each token by itself: decode differs from prefill in its run config alone."""

    @classmethod
    @abstractmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: RunConfigT) -> ttnn.Tensor:
        """The forward pass over many tokens."""

    @classmethod
    def forward_decode(cls, x: ttnn.Tensor, cfg: RunConfigT) -> ttnn.Tensor:
        """The forward pass over one token a user; shapes are those of `forward_prefill`."""
        return cls.forward_prefill(x, cfg)


def matmul_kernel() -> ttnn.WormholeComputeKernelConfig:
    """Two passes over the mantissa: enough for 8-bit weights (bfloat8_b keeps 7 bits), at half HiFi4's time."""
    return ttnn.WormholeComputeKernelConfig(
        math_fidelity=ttnn.MathFidelity.HiFi2,
        math_approx_mode=False,
        fp32_dest_acc_en=False,
        packer_l1_acc=True,
    )


def columns(mesh_device: ttnn.MeshDevice) -> int:
    """Chips along the axis of tensor parallelism."""
    return int(mesh_device.shape[COLUMNS])


def share(size: int, parts: int, what: str) -> int:
    """`size` / `parts`; raises PlanError, naming `what`, where it leaves a rest."""
    if size % parts:
        raise PlanError(f"{what} ({size}) cannot be shared evenly by {parts} chips.")
    return size // parts


def transposed(state_dict: StateDict, name: str) -> torch.Tensor:
    """A linear layer's weight as [1, 1, in, out]: a view of the checkpoint's [out, in]."""
    return state_dict[name].t()[None, None]
