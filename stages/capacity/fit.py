"""Deployments that fit their chips: the changes that make one fit, and the fastest one."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from stages.capacity.chip_memory import StageMemory, chip_memory
from stages.capacity.deployment import Deployment
from stages.capacity.prediction import PredictionOptions, predict
from stages.errors import PlanError
from stages.tensor_dtypes import CHOICES
from stages.wormhole import GALAXY_COLUMNS, GALAXY_ROWS
from weights.model_config import ModelConfig
from weights.sizes import ceil_div, counted, in_words

ROWS_MAX = 32
"""The most rows that a search tries: those of 8 Galaxies."""

GALAXIES = (1, 2, 4, 8)
"""Numbers of Galaxies that are tried if no number of rows is given."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change to a deployment, in words, with the command line flags for it and the deployment that it gives."""

    what: Literal["rows", "dtype", "users", "length", "drafts"]
    text: str
    flags: str
    deployment: Deployment


def fits(config: ModelConfig, deployment: Deployment) -> bool:
    """Whether every stage fits its chips; False too if the model cannot be shared by them."""
    try:
        return all(memory.fits for memory in chip_memory(config, deployment))
    except PlanError:
        return False


def check_fits(config: ModelConfig, deployment: Deployment) -> list[StageMemory]:
    """Returns the memory of each stage.

    Raises PlanError if one does not fit; its message names the stage, what it lacks and every single change that helps.
    """
    memories = chip_memory(config, deployment)
    lacking = [memory for memory in memories if not memory.fits]
    if lacking:
        raise PlanError(refusal(config, deployment, max(lacking, key=lambda memory: memory.total)))
    return memories


def refusal(config: ModelConfig, deployment: Deployment, memory: StageMemory) -> str:
    """The message about a stage that does not fit: what it needs, and the changes that would make it fit."""
    last = memory.end_layer - 1
    layers = f"layer {last}" if memory.first_layer == last else f"layers {memory.first_layer} to {last}"
    found = [f"{change.text} ({change.flags})" for change in single_changes(config, deployment)]
    advice = f"give {', or '.join(found)}" if found else _no_change(deployment)
    where = f"{layers} on {counted(memory.rows, 'row')}"
    return f"Stage {memory.stage} of {deployment.stages} ({where}) needs {_lack(memory)} on each chip: {advice}."


def _no_change(deployment: Deployment) -> str:
    kinds = (
        "rows, dtype, users, length or drafts" if deployment.num_speculative_tokens else "rows, dtype, users or length"
    )
    return f"no single change of {kinds} would do"


def single_changes(config: ModelConfig, deployment: Deployment) -> list[Change]:
    """The smallest change of each kind that makes a deployment fit, as far as there are any."""
    rows = next((change for change in _more_rows(deployment) if fits(config, change.deployment)), None)
    narrower = [change for change in _narrower(deployment) if fits(config, change.deployment)]
    users = next((change for change in _fewer_users(deployment) if fits(config, change.deployment)), None)
    length = _shorter(config, deployment)
    drafts = next((change for change in _fewer_drafts(deployment) if fits(config, change.deployment)), None)
    return [change for change in (rows, *narrower, users, length, drafts) if change is not None]


def _lack(memory: StageMemory) -> str:
    if memory.total > memory.available:
        return f"{in_words(memory.total)} of the {in_words(memory.available)} of DRAM"
    return f"{in_words(memory.decode_l1)} of the {in_words(memory.available_l1)} of L1 in a decode step"


def _more_rows(deployment: Deployment) -> Iterator[Change]:
    """Deployments with more rows, fewest rows first; with equally many rows, the fewest stages come first."""
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


def _fewer_drafts(deployment: Deployment) -> Iterator[Change]:
    for drafts in range(deployment.num_speculative_tokens - 1, -1, -1):
        yield Change(
            what="drafts",
            text=f"{counted(drafts, 'draft')} of each request and step in place of {deployment.num_speculative_tokens}",
            flags=f"--num-speculative-tokens {drafts}",
            deployment=msgspec.structs.replace(deployment, num_speculative_tokens=drafts),
        )


def _shorter(config: ModelConfig, deployment: Deployment) -> Change | None:
    """The greatest length in whole blocks that fits, found by bisection."""
    size = deployment.block_size

    def of(blocks: int) -> Deployment:
        return msgspec.structs.replace(deployment, max_model_len=blocks * size)

    fitting, refused = 0, ceil_div(deployment.max_model_len, size)
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


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a pipeline's shape; None leaves it open."""

    rows: int | None = None
    stages: int | None = None
    rows_per_stage: int | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment, and the assumptions behind it in words."""

    deployment: Deployment
    assumptions: list[str]


def choose(config: ModelConfig, shape: Shape, base: Deployment, options: PredictionOptions) -> Choice:
    """The fastest deployment of a shape that `shape` allows and that fits; all but the shape is taken from `base`.

    If `shape` does not fix the number of rows, the fewest whole Galaxies that fit are taken. If nothing fits, the
    deployment that lacks least is returned, for `check_fits` to refuse. Raises PlanError if `shape` contradicts itself
    or no allowed shape can share the model.
    """
    totals = _totals(shape)
    for rows in totals:
        open_ones = list(_shapes(shape, rows, base))
        fitting = [deployment for deployment in open_ones if fits(config, deployment)]
        if fitting:
            fastest = max(fitting, key=lambda one: predict(config, one, options).served_tokens_per_s)
            return Choice(deployment=fastest, assumptions=_assumptions(shape, fastest, len(open_ones)))
    every = [deployment for rows in totals for deployment in _shapes(shape, rows, base)]
    return Choice(deployment=_least_lacking(config, every), assumptions=[])


def _totals(shape: Shape) -> list[int]:
    """The numbers of rows to try, fewest first."""
    if shape.stages is not None and shape.rows_per_stage is not None:
        total = shape.stages * shape.rows_per_stage
        if shape.rows not in {None, total}:
            raise PlanError(
                f"{shape.stages} stages of {shape.rows_per_stage} rows are {total} rows, not {shape.rows}: leave out "
                "--rows, --stages or --rows-per-stage."
            )
        return [total]
    totals = [galaxies * GALAXY_ROWS for galaxies in GALAXIES] if shape.rows is None else [shape.rows]
    given = shape.stages or shape.rows_per_stage or 1
    even = [total for total in totals if total % given == 0]
    if not even:
        what = "stages" if shape.stages is not None else "rows a stage"
        raise PlanError(f"{' or '.join(map(str, totals))} rows cannot be shared evenly with {given} {what}.")
    return even


def _shapes(shape: Shape, rows: int, base: Deployment) -> Iterator[Deployment]:
    """Deployments of `rows` rows, fewest stages first; stages larger than a Galaxy only if `shape` asks for them."""
    for rows_per_stage in range(rows, 0, -1):
        stages = rows // rows_per_stage
        is_asked = shape.rows_per_stage is not None or shape.stages is not None
        if rows % rows_per_stage or (rows_per_stage > GALAXY_ROWS and not is_asked):
            continue
        if shape.stages in {None, stages} and shape.rows_per_stage in {None, rows_per_stage}:
            yield msgspec.structs.replace(base, stages=stages, rows_per_stage=rows_per_stage)


def _least_lacking(config: ModelConfig, deployments: list[Deployment]) -> Deployment:
    """The deployment that lacks least memory. Raises PlanError if none can share the model."""
    lacking: list[tuple[float, int]] = []
    refusals: list[PlanError] = []
    for index, deployment in enumerate(deployments):
        try:
            memories = chip_memory(config, deployment)
        except PlanError as error:
            refusals.append(error)
            continue
        lacking.append((max(memory.lack for memory in memories), index))
    if not lacking:
        raise refusals[0]
    return deployments[min(lacking)[1]]


def _assumptions(shape: Shape, deployment: Deployment, choices: int) -> list[str]:
    told = []
    if shape.rows is None and not (shape.stages and shape.rows_per_stage):
        told.append(f"{deployment.rows} rows: the fewest whole Galaxies that fit (--rows)")
    if choices > 1:
        split = f"{counted(deployment.stages, 'stage')} of {counted(deployment.rows_per_stage, 'row')}"
        told.append(f"{split}: predicted the fastest of {choices} splits (--stages, --rows-per-stage)")
    if deployment.rows_per_stage > GALAXY_ROWS:
        told.append(f"stages of {deployment.rows_per_stage} rows: Galaxies that are wired to one mesh")
    return told
