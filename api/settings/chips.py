"""What the engine's options mean on chips: which layers each stage has, and a KV cache that fits its rows."""

import msgspec
import structlog

from api.errors import OptionError
from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.fit import check_fits
from stages.options import CacheOptions
from stages.plan import StageSpec
from stages.wormhole import GALAXY_COLUMNS, USERS_PER_ROW
from weights.model_config import ModelConfig
from weights.sizes import ceil_div

log = structlog.get_logger()


def chip_plan(
    config: ModelConfig, deployment: Deployment, num_blocks: int | None
) -> tuple[list[StageSpec], CacheOptions]:
    """The layers of each stage, and the cache: that of all requests at their longest, unless `num_blocks` is less.

    Raises OptionError where that is more, and PlanError where chips cannot hold the deployment.
    """
    check_fits(config, deployment)
    cache = deployment.cache
    if num_blocks is not None:
        if num_blocks > cache.blocks:
            raise OptionError(
                f"--num-blocks {num_blocks} is more than the {cache.blocks} that all requests of a chip can fill: "
                "leave it out, or raise --max-num-seqs."
            )
        cache = msgspec.structs.replace(cache, blocks=num_blocks)
    return chip_stages(config, deployment), cache


def users_per_row(max_num_seqs: int | None, rows: int, microbatches: int) -> int:
    """The users of a row in one microbatch, as many on every chip, so that `max_num_seqs` run at once at least."""
    if max_num_seqs is None:
        return USERS_PER_ROW
    users = ceil_div(max_num_seqs, rows * microbatches * GALAXY_COLUMNS) * GALAXY_COLUMNS
    slots = users * rows * microbatches
    if slots != max_num_seqs:
        log.info("--max-num-seqs was rounded up so that every chip has as many", asked=max_num_seqs, slots=slots)
    return users
