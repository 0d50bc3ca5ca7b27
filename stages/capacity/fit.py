"""Whether a deployment fits its chips, and the smallest changes that would make it."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from stages.capacity.chip_memory import StageMemory, chip_memory
from stages.capacity.deployment import Deployment
from stages.errors import PlanError
from stages.tensor_dtypes import CHOICES
from stages.wormhole import GALAXY_COLUMNS, GALAXY_ROWS
from weights.model_config import ModelConfig
from weights.sizes import counted, in_words

ROWS_MAX = 32
"""Rows of 8 Galaxies: as far as a search for more of them goes."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change to a deployment, what it is called, and what it gives; `flags` ask for it."""

    what: Literal["rows", "dtype", "users", "length"]
    text: str
    flags: str
    deployment: Deployment


def fits(config: ModelConfig, deployment: Deployment) -> bool:
    """Whether every stage fits its chips; False too where the model cannot be shared by them."""
    try:
        return all(memory.fits for memory in chip_memory(config, deployment))
    except PlanError:
        return False


def check_fits(config: ModelConfig, deployment: Deployment) -> list[StageMemory]:
    """What each stage takes.

    Raises PlanError where one does not fit: it names the stage, what it lacks and every single change that would do.
    """
    memories = chip_memory(config, deployment)
    lacking = [memory for memory in memories if not memory.fits]
    if lacking:
        raise PlanError(refusal(config, deployment, max(lacking, key=lambda memory: memory.total)))
    return memories


def refusal(config: ModelConfig, deployment: Deployment, memory: StageMemory) -> str:
    """The sentence about a stage that does not fit."""
    last = memory.end_layer - 1
    layers = f"layer {last}" if memory.first_layer == last else f"layers {memory.first_layer} to {last}"
    found = [f"{change.text} ({change.flags})" for change in single_changes(config, deployment)]
    advice = f"give {', or '.join(found)}" if found else "no single change of rows, dtype, users or length would do"
    where = f"{layers} on {counted(memory.rows, 'row')}"
    return f"Stage {memory.stage} of {deployment.stages} ({where}) needs {_lack(memory)} on each chip: {advice}."


def single_changes(config: ModelConfig, deployment: Deployment) -> list[Change]:
    """The smallest change of each sort that makes a deployment fit, of those that exist."""
    rows = next((change for change in _more_rows(deployment) if fits(config, change.deployment)), None)
    narrower = [change for change in _narrower(deployment) if fits(config, change.deployment)]
    users = next((change for change in _fewer_users(deployment) if fits(config, change.deployment)), None)
    length = _shorter(config, deployment)
    return [change for change in (rows, *narrower, users, length) if change is not None]


def _lack(memory: StageMemory) -> str:
    if memory.total > memory.available:
        return f"{in_words(memory.total)} of the {in_words(memory.available)} of DRAM"
    return f"{in_words(memory.decode_l1)} of the {in_words(memory.available_l1)} of L1 in a decode step"


def _more_rows(deployment: Deployment) -> Iterator[Change]:
    """More rows in all: as more stages, or as more rows in each; of as many rows, first those in the fewest stages."""
    widest = max(GALAXY_ROWS, deployment.rows_per_stage)
    for rows in range(deployment.rows + 1, ROWS_MAX + 1):
        for rows_per_stage in range(min(rows, widest), 0, -1):
            stages = rows // rows_per_stage
            if rows % rows_per_stage or (deployment.layers_per_stage is not None and stages != deployment.stages):
                continue
            more = msgspec.structs.replace(deployment, stages=stages, rows_per_stage=rows_per_stage)
            yield Change(
                what="rows",
                text=f"{rows} rows in place of {deployment.rows}",
                flags=f"--stages {stages} --rows-per-stage {rows_per_stage}",
                deployment=more,
            )


def _narrower(deployment: Deployment) -> Iterator[Change]:
    for kind in CHOICES:
        dtypes = deployment.dtypes.narrowed(kind)
        if dtypes is not None:
            yield Change(
                what="dtype",
                text=f"{dtypes.of(kind)} in place of {deployment.dtypes.of(kind)} for {kind}",
                flags=f"--{kind.replace('_', '-')}-dtype {dtypes.of(kind)}",
                deployment=msgspec.structs.replace(deployment, dtypes=dtypes),
            )


def _fewer_users(deployment: Deployment) -> Iterator[Change]:
    most = (deployment.users_per_row - 1) // GALAXY_COLUMNS * GALAXY_COLUMNS
    for users in range(most, 0, -GALAXY_COLUMNS):
        yield Change(
            what="users",
            text=f"{users} users a row in place of {deployment.users_per_row}",
            flags=f"--users {users}",
            deployment=msgspec.structs.replace(deployment, users_per_row=users),
        )


def _shorter(config: ModelConfig, deployment: Deployment) -> Change | None:
    """The greatest length of whole blocks that fits, found by halving."""
    size = deployment.block_size

    def of(blocks: int) -> Deployment:
        return msgspec.structs.replace(deployment, max_model_len=blocks * size)

    fitting, refused = 0, -(-deployment.max_model_len // size)
    while refused - fitting > 1:
        middle = (fitting + refused) // 2
        if fits(config, of(middle)):
            fitting = middle
        else:
            refused = middle
    if not fitting:
        return None
    return Change(
        what="length",
        text=f"{fitting * size} tokens a request in place of {deployment.max_model_len}",
        flags=f"--max-model-len {fitting * size}",
        deployment=of(fitting),
    )
