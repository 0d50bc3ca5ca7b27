"""The dtypes of tensors on chips, what a tile of each takes, and which kind of weight is kept in which."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from stages.errors import PlanError

TILE = 32
"""Edge of a Wormhole tile; block sizes and prefill starts are multiples of it."""

TensorDtype = Literal["float32", "bfloat16", "bfloat8_b", "bfloat4_b"]
"""The dtypes of tensors on chips, by ttnn's names."""

Kind = Literal["embedding", "attention", "gate_up", "down", "router", "head", "kv_cache"]
"""A kind of tensor whose dtype can be chosen; norms and rope tables are always bfloat16."""

_EXPONENTS_PER_TILE = TILE * TILE // 16
"""Block floats share an exponent of one byte among 16 values of a row."""

TILE_BYTES: dict[TensorDtype, int] = {
    "float32": TILE * TILE * 4,
    "bfloat16": TILE * TILE * 2,
    "bfloat8_b": TILE * TILE + _EXPONENTS_PER_TILE,
    "bfloat4_b": TILE * TILE // 2 + _EXPONENTS_PER_TILE,
}

VALUE_BYTES: dict[TensorDtype, int] = {"float32": 4, "bfloat16": 2}
"""Bytes of a value, for the dtypes that need no tiles."""

_BLOCK_FLOATS: tuple[TensorDtype, ...] = ("bfloat16", "bfloat8_b", "bfloat4_b")

CHOICES: dict[Kind, tuple[TensorDtype, ...]] = {
    # The op takes no other.
    "embedding": ("bfloat16",),
    "attention": _BLOCK_FLOATS,
    "gate_up": _BLOCK_FLOATS,
    "down": _BLOCK_FLOATS,
    # Fewer bits would choose other experts.
    "router": ("float32", "bfloat16"),
    "head": _BLOCK_FLOATS,
    "kv_cache": _BLOCK_FLOATS,
}
"""The dtypes that each kind may have, widest first."""


def _option(kind: Kind, meaning: str) -> Meta:
    """The option `--<kind>-dtype` of a kind of weight."""
    help_text = f"Dtype of the {meaning} on chips; the embedded device has --dtype."
    extra: dict[str, Any] = {"parameter": f"{kind}_dtype", "values": CHOICES[kind]}
    return Meta(description=help_text, extra=extra)


class WeightDtypes(msgspec.Struct, frozen=True, kw_only=True):
    """The dtype of each kind of weight, and of the KV cache; the defaults are what the modules write.

    `gate_up` and `down` are the projections of all feed-forward networks: experts, routed and shared, and dense.
    `attention` is the dtype of the multi-token-prediction layer's own projection too.
    Raises PlanError for a dtype that a kind cannot have.
    """

    embedding: TensorDtype = "bfloat16"
    attention: Annotated[TensorDtype, _option("attention", "attention's projections")] = "bfloat8_b"
    gate_up: Annotated[
        TensorDtype, _option("gate_up", "gate and up projections of experts and other feed-forward networks")
    ] = "bfloat4_b"
    down: Annotated[TensorDtype, _option("down", "down projections of experts and other feed-forward networks")] = (
        "bfloat8_b"
    )
    router: Annotated[TensorDtype, _option("router", "experts' router")] = "float32"
    head: Annotated[TensorDtype, _option("head", "head")] = "bfloat8_b"
    kv_cache: Annotated[TensorDtype, _option("kv_cache", "KV cache")] = "bfloat8_b"

    def __post_init__(self) -> None:
        for kind, allowed in CHOICES.items():
            if self.of(kind) not in allowed:
                raise PlanError(f"{kind} cannot be {self.of(kind)}: choose {' or '.join(allowed)}.")

    def of(self, kind: Kind) -> TensorDtype:
        """Returns the dtype of a kind."""
        dtype: TensorDtype = getattr(self, kind)
        return dtype

    def narrowed(self, kind: Kind) -> "WeightDtypes | None":
        """Returns these dtypes with the next narrower one for a kind; None where there is none."""
        narrower = CHOICES[kind][CHOICES[kind].index(self.of(kind)) + 1 :]
        return msgspec.structs.replace(self, **{kind: narrower[0]}) if narrower else None


DEFAULT_DTYPES = WeightDtypes()
