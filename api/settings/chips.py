"""What the engine's options mean on chips: which layers each stage has, and a KV cache that fits its rows."""

from typing import TYPE_CHECKING, Literal

import msgspec
import structlog

from api.errors import OptionError
from api.settings.stage_count import stage_count
from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.fit import check_fits
from stages.options import TRACE_REGION_BYTES, CacheOptions, Dtype
from stages.plan import StageSpec, default_microbatches
from stages.wormhole import GALAXY_COLUMNS, USERS_PER_ROW
from weights.model_config import ModelConfig
from weights.sizes import ceil_div

if TYPE_CHECKING:
    from api.settings.engine import EngineSettings

log = structlog.get_logger()

HIDDEN_DTYPE: Dtype = "bfloat16"
"""What passes between modules, and between stages, on chips."""


def chip_dtype(asked: Dtype | Literal["auto"]) -> Dtype:
    """Raises OptionError for another dtype than that of chips."""
    if asked not in {"auto", HIDDEN_DTYPE}:
        raise OptionError(
            f"--dtype {asked} is not for chips, which pass {HIDDEN_DTYPE} on: leave it out, and choose the dtypes of "
            "weights, like --attention-dtype bfloat16."
        )
    return HIDDEN_DTYPE


def chip_plan(
    settings: "EngineSettings", config: ModelConfig, prefill_chunk: int
) -> tuple[list[StageSpec], CacheOptions]:
    """Layers of each stage, and the cache: that of all requests at their longest, unless --num-blocks says less.

    Raises OptionError where options contradict each other, and PlanError where chips cannot hold what they ask for.
    """
    deployment = _deployment(settings, config, prefill_chunk)
    check_fits(config, deployment)
    cache = deployment.cache
    if settings.num_blocks is not None:
        if settings.num_blocks > cache.blocks:
            raise OptionError(
                f"--num-blocks {settings.num_blocks} is more than the {cache.blocks} that all requests of a chip can "
                "fill: leave it out, or raise --max-num-seqs."
            )
        cache = msgspec.structs.replace(cache, blocks=settings.num_blocks)
    return chip_stages(config, deployment), cache


def _deployment(settings: "EngineSettings", config: ModelConfig, prefill_chunk: int) -> Deployment:
    stages = stage_count(settings.stages, settings.layers_per_stage) or 1
    microbatches = settings.microbatches or default_microbatches(stages)
    return Deployment(
        stages=stages,
        rows_per_stage=settings.rows_per_stage,
        users_per_row=_users_per_row(settings, microbatches),
        max_model_len=settings.max_model_len or config.max_position_embeddings,
        block_size=settings.block_size,
        prefill_chunk=prefill_chunk,
        microbatches=microbatches,
        layers_per_stage=None if settings.layers_per_stage is None else tuple(settings.layers_per_stage),
        trace_region_bytes=TRACE_REGION_BYTES if settings.enable_trace else 0,
        dtypes=settings.weight_dtypes,
    )


def _users_per_row(settings: "EngineSettings", microbatches: int) -> int:
    if settings.max_num_seqs is None:
        return USERS_PER_ROW
    places = settings.rows_per_stage * microbatches * GALAXY_COLUMNS
    users = ceil_div(settings.max_num_seqs, places) * GALAXY_COLUMNS
    given = users * settings.rows_per_stage * microbatches
    if given != settings.max_num_seqs:
        log.info(
            "--max-num-seqs was rounded up so that every chip has as many", asked=settings.max_num_seqs, slots=given
        )
    return users
