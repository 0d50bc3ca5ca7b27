"""Which deployment to plan where the user leaves it open, and what was assumed for it."""

from collections.abc import Iterator

import msgspec

from stages.capacity.chip_memory import chip_memory
from stages.capacity.deployment import Deployment
from stages.capacity.fit import fits
from stages.capacity.prediction import PredictionOptions, predict
from stages.errors import PlanError
from stages.wormhole import GALAXY_ROWS
from weights.model_config import ModelConfig
from weights.sizes import counted

GALAXIES = (1, 2, 4, 8)
"""Numbers of Galaxies that are tried where no number of rows is given."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a pipeline's shape; None leaves it open."""

    rows: int | None = None
    stages: int | None = None
    rows_per_stage: int | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment, and in words what was assumed for it."""

    deployment: Deployment
    assumptions: list[str]


def choose(config: ModelConfig, shape: Shape, base: Deployment, options: PredictionOptions) -> Choice:
    """The fastest of the deployments that `shape` leaves open and that fit; of `base` all but the shape is taken.

    Where no number of rows follows from `shape`, the fewest whole Galaxies that fit are taken. Where none fits, the
    one that lacks least is returned, for `check_fits` to refuse. Raises PlanError where `shape` contradicts itself or
    the model cannot be shared by any.
    """
    totals = _totals(shape)
    for rows in totals:
        open_ones = list(_shapes(shape, rows, base))
        fitting = [deployment for deployment in open_ones if fits(config, deployment)]
        if fitting:
            fastest = max(fitting, key=lambda one: predict(config, one, options).tokens_per_s)
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
    """Fewest stages first; a stage takes more rows than a Galaxy has only if asked to."""
    for rows_per_stage in range(rows, 0, -1):
        stages = rows // rows_per_stage
        is_asked = shape.rows_per_stage is not None or shape.stages is not None
        if rows % rows_per_stage or (rows_per_stage > GALAXY_ROWS and not is_asked):
            continue
        if shape.stages in {None, stages} and shape.rows_per_stage in {None, rows_per_stage}:
            yield msgspec.structs.replace(base, stages=stages, rows_per_stage=rows_per_stage)


def _least_lacking(config: ModelConfig, deployments: list[Deployment]) -> Deployment:
    """Of those that the model can be shared by."""
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
