"""The options that say in which dtype chips keep each kind of weight, and the KV cache."""

from collections.abc import Callable
from typing import Any

import click

from stages.tensor_dtypes import CHOICES, Kind, WeightDtypes

_MEANINGS: dict[Kind, str] = {
    "attention": "attention's projections",
    "gate_up": "gate and up projections of experts and other feed-forward networks",
    "down": "down projections of the same",
    "router": "experts' router",
    "head": "head",
    "kv_cache": "KV cache",
}
"""Of the kinds that there is a choice for."""


def _parameter(kind: Kind) -> str:
    return f"{kind}_dtype"


weight_dtype_options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
    click.option(
        f"--{kind.replace('_', '-')}-dtype",
        _parameter(kind),
        type=click.Choice(CHOICES[kind]),
        default=WeightDtypes().of(kind),
        show_default=True,
        help=f"Of the {meaning} on chips; the embedded device has --dtype.",
    )
    for kind, meaning in _MEANINGS.items()
]


def take_weight_dtypes(options: dict[str, Any]) -> WeightDtypes:
    """What the options said, which are taken out of `options`."""
    return WeightDtypes(**{kind: options.pop(_parameter(kind)) for kind in _MEANINGS})
