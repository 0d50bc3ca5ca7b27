"""Where a stage's weights come from: tensors by name, read from a checkpoint or made."""

import math
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from weights.errors import CheckpointError
from weights.model_config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """Returns the beginning of the names of a decoder layer's tensors."""
    return f"model.layers.{layer}."


def draft_prefix(config: ModelConfig) -> str:
    """Returns the beginning of the names of the multi-token-prediction layer's tensors."""
    return layer_prefix(config.num_hidden_layers)


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns the shapes of all tensors of the model by name; matrices are [out, in], as torch.nn.Linear has them.

    Of the multi-token-prediction layers that follow the last decoder layer in some checkpoints the first is among them,
    without its embedding and its head, which are copies of the model's own.
    """
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes.update((layer_prefix(layer) + name, shape) for name, shape in _layer(config, layer))
    if config.num_nextn_predict_layers:
        shapes.update((draft_prefix(config) + name, shape) for name, shape in _draft_layer(config))
    shapes[NORM] = (hidden,)
    shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def _layer(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    yield "input_layernorm.weight", (config.hidden_size,)
    yield from _attention(config)
    yield "post_attention_layernorm.weight", (config.hidden_size,)
    if not config.is_moe(layer):
        yield from _mlp("mlp.", config.hidden_size, config.intermediate_size)
        return
    experts, inner = config.n_routed_experts, config.moe_intermediate_size
    yield "mlp.gate.weight", (experts, config.hidden_size)
    yield "mlp.gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield from _mlp(f"mlp.experts.{expert}.", config.hidden_size, inner)
    yield from _mlp("mlp.shared_experts.", config.hidden_size, inner * config.n_shared_experts)


def _draft_layer(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    yield "enorm.weight", (hidden,)
    yield "hnorm.weight", (hidden,)
    yield "eh_proj.weight", (hidden, 2 * hidden)
    yield from _layer(config, config.num_hidden_layers)
    yield "shared_head.norm.weight", (hidden,)


def _attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    yield "self_attn.q_a_proj.weight", (config.q_lora_rank, hidden)
    yield "self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
    yield "self_attn.q_b_proj.weight", (heads * config.qk_head_dim, config.q_lora_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (config.kv_dim, hidden)
    yield "self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield "self_attn.o_proj.weight", (hidden, heads * config.v_head_dim)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (inner, hidden)
    yield prefix + "up_proj.weight", (inner, hidden)
    yield prefix + "down_proj.weight", (hidden, inner)


class NamedTensors(Protocol):
    """Tensors by name: a mapping of them, or a WeightSource."""

    def __getitem__(self, name: str, /) -> torch.Tensor:
        """The tensor of that name."""

    def __contains__(self, name: object, /) -> bool:
        """Whether there is a tensor of that name."""

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""


class WeightSource(ABC):
    """The tensors of one model under the names of DeepSeek's checkpoints, each made or read when it is asked for."""

    FINGERPRINT_BYTES = 32

    def __init__(self, config: ModelConfig, description: str) -> None:
        """Takes the name of the source in errors as `description`."""
        self.config = config
        self._description = description
        self._shapes = tensor_shapes(config)
        self._sorted = sorted(self._shapes)

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether `name` is a tensor of the model and present."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns `tensor(name)`, so that a PrefixView can read a source."""
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        """The tensors of the model that are present, sorted."""
        return iter(self.names())

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor: float32 where it was quantised, else its stored dtype. Callers must not write to it.

        Raises CheckpointError, naming file and tensor, where it is missing or not as the model needs it.
        """

    @abstractmethod
    def validate(self, *prefixes: str) -> None:
        """Checks all tensors of the model whose names begin with one of `prefixes`, without reading their values.

        Raises CheckpointError, naming file and tensor, for the first that is missing or not as the model needs it.
        """

    @abstractmethod
    def fingerprint(self, *prefixes: str) -> str:
        """Returns a hexadecimal hash of the config and of all tensors whose names begin with one of `prefixes`.

        Equal exactly where the tensors are equal to the bit. Raises CheckpointError as `validate` does.
        """

    @abstractmethod
    def identity(self, *prefixes: str) -> str | None:
        """Returns a hash of the file system's facts about the files that hold the tensors under `prefixes`.

        It is the same at two times only if the fingerprint is. None where the fingerprint costs nothing, or where a
        file was changed so recently that another change might not show.
        """

    def values(self, *prefixes: str) -> int:
        """Returns how many numbers the tensors of the model under `prefixes` hold. Raises CheckpointError."""
        return sum(math.prod(self._shape(name)) for name in self._required(prefixes))

    @property
    def has_draft_layer(self) -> bool:
        """Whether tensors of the model's multi-token-prediction layer are present.

        Some checkpoints leave out the layer that their config.json counts.
        """
        return self.config.num_nextn_predict_layers > 0 and bool(self.names(draft_prefix(self.config)))

    def names(self, prefix: str = "") -> list[str]:
        """Returns the sorted names of the tensors of the model that are present and begin with `prefix`."""
        return [name for name in self._under(prefix) if name in self]

    def view(self, prefix: str) -> "PrefixView":
        """Returns the tensors whose names begin with `prefix`, under the rest of their names."""
        return PrefixView(self, prefix)

    def _shape(self, name: str) -> Shape:
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckpointError(f"{self._description}: the model has no tensor {name!r}.") from None

    def _required(self, prefixes: tuple[str, ...]) -> list[str]:
        """Returns names of the model's tensors under the prefixes, each of which must begin at least one; sorted."""
        names: set[str] = set()
        for prefix in prefixes:
            under = self._under(prefix)
            if not under:
                raise CheckpointError(f"{self._description}: no tensor of the model begins with {prefix!r}.")
            names.update(under)
        return sorted(names)

    def _under(self, prefix: str) -> list[str]:
        last_character = chr(sys.maxunicode)
        begin, end = bisect_left(self._sorted, prefix), bisect_left(self._sorted, prefix + last_character)
        return self._sorted[begin:end]


class PrefixView(Mapping[str, torch.Tensor]):
    """The tensors whose names begin with a prefix, under the rest of their names; each is read when it is asked for.

    A tensor that is missing raises what the viewed tensors raise: KeyError from a mapping, and CheckpointError from a
    WeightSource, from `get` too.
    """

    def __init__(self, tensors: NamedTensors, prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._prefix + name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
