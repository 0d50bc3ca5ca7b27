"""Base classes and helpers of all modules: how their configs are joined, and the settings of matrix kernels."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, cast

import torch

from stages.backend import ttnn
from stages.batch import DecodeBatch, PrefillBatch
from stages.errors import PlanError
from stages.models.rope import RopeTables
from stages.options import CacheOptions
from stages.run_config import OperatorConfig, StateDict, WeightConfig, merge_run_config
from stages.tensor_dtypes import DEFAULT_DTYPES, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig

RunConfigT = TypeVar("RunConfigT")

ROWS = 0
"""Mesh axis that shares out the batch."""

COLUMNS = 1
"""Mesh axis of tensor parallelism."""


class Module(Generic[RunConfigT]):
    """Base of the modules: namespaces of class methods, never instantiated.

    Beside these a module has `create_state`, `forward_prefill` and `forward_decode`. Each of the
    three stages before the forward pass can run in a process of its own.
    """

    @classmethod
    @abstractmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes the module's weights to files under `output_path` and returns their paths."""

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


class AttentionModule(Module[RunConfigT]):
    """Base of the layers that attend, and keep a KV cache for it."""

    @classmethod
    @abstractmethod
    def create_state(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        mesh_device: ttnn.MeshDevice,
        cache: CacheOptions,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> Mapping[str, Any]:
        """The layer's state on the mesh, with a KV cache of the size that `cache` asks for."""

    @classmethod
    @abstractmethod
    def kv_cache(cls, cfg: RunConfigT) -> ttnn.Tensor:
        """The layer's KV cache, [blocks + 1, 1, block_size, width] on each chip."""


class DecoderModule(AttentionModule[RunConfigT]):
    """Base of the decoder layers: hidden states [1, 1, tokens, hidden / columns] on each chip to the same shape."""

    @classmethod
    @abstractmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: RunConfigT, batch: PrefillBatch) -> ttnn.Tensor:
        """The forward pass over many tokens."""

    @classmethod
    @abstractmethod
    def forward_decode(cls, x: ttnn.Tensor, cfg: RunConfigT, batch: DecodeBatch) -> ttnn.Tensor:
        """The forward pass over one token a user."""


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

    @classmethod
    @abstractmethod
    def create_state(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> Mapping[str, Any]:
        """What the module keeps on the mesh beside its weights."""


class DraftModule(AttentionModule[RunConfigT]):
    """Base of the multi-token-prediction layers, which predict the token after the next one.

    Such a layer takes the hidden states of the last decoder layer, before the final norm, and the embeddings of the
    tokens that follow theirs; it keeps a KV cache of its own, in the same blocks as the decoder layers.
    """

    @classmethod
    @abstractmethod
    def forward_prefill(
        cls, hidden: ttnn.Tensor, following: ttnn.Tensor, cfg: RunConfigT, batch: PrefillBatch
    ) -> ttnn.Tensor:
        """The forward pass over many tokens: both inputs and the result [1, 1, tokens, hidden / columns]."""

    @classmethod
    @abstractmethod
    def forward_decode(
        cls, hidden: ttnn.Tensor, following: ttnn.Tensor, cfg: RunConfigT, batch: DecodeBatch
    ) -> ttnn.Tensor:
        """The forward pass over one token a lane; shapes are those of `forward_prefill`."""

    @classmethod
    @abstractmethod
    def norm(cls, x: ttnn.Tensor, cfg: RunConfigT) -> ttnn.Tensor:
        """The norm between the layer and the head, shapes as in `forward_prefill`; of the mode that `cfg` is of."""


class HeadModule(TokenwiseModule[RunConfigT]):
    """Base of the heads: hidden states to logits [1, 1, tokens, vocabulary / columns] on each chip."""

    @classmethod
    @abstractmethod
    def project(cls, normed: ttnn.Tensor, cfg: RunConfigT) -> ttnn.Tensor:
        """The head without its norm: normed hidden states [1, 1, tokens, hidden / columns] to logits."""

    @classmethod
    @abstractmethod
    def pick(cls, x: ttnn.Tensor, cfg: RunConfigT, indices: ttnn.Tensor) -> ttnn.Tensor:
        """Returns the hidden states of the tokens `indices` [1, n], uint32."""

    @classmethod
    @abstractmethod
    def to_torch(
        cls, logits: ttnn.Tensor, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> torch.Tensor:
        """Returns float32 [tokens of all rows, vocabulary] on the host, without padding."""


AnyDecoderModule: TypeAlias = type[DecoderModule[Any]]
"""A kind of decoder layer, whatever its run config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modules:
    """The modules of a family of models.

    `decoder` returns the kind of a layer, `rope_tables` those of N positions. `draft` is used where a model has a
    multi-token-prediction layer.
    """

    embedding: type[TokenwiseModule[Any]]
    decoder: Callable[[ModelConfig, int], AnyDecoderModule]
    head: type[HeadModule[Any]]
    draft: type[DraftModule[Any]]
    rope_tables: Callable[[ModelConfig, ttnn.MeshDevice, int], RopeTables]


def matmul_kernel() -> ttnn.WormholeComputeKernelConfig:
    """Returns the settings of matrix kernels: two passes over the mantissa.

    They are enough for 8-bit weights (bfloat8_b keeps 7 bits), at half the time of HiFi4.
    """
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
    """`size` / `parts`; raises PlanError, naming `what`, where there is a remainder."""
    if size % parts:
        raise PlanError(f"{what} ({size}) cannot be shared evenly by {parts} chips.")
    return size // parts


def transposed(state_dict: StateDict, name: str) -> torch.Tensor:
    """A linear layer's weight as [1, 1, in, out]: a view of the checkpoint's [out, in]."""
    return state_dict[name].t()[None, None]
