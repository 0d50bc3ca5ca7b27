"""What the tiers beside the chips would hold, and what they are predicted to save.

Nothing here was measured on a Galaxy.
"""

import msgspec

from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.prediction import Prediction, PredictionOptions, stage_times
from stages.capacity.step_time import ACTIVATION_BYTES, UNTRACED_LAUNCH_S
from stages.models.registry import architecture_of
from stages.plan import StageSpec
from stages.wormhole import GALAXY_ROWS, HOST_BYTES_PER_S
from weights.model_config import ModelConfig
from weights.sizes import ceil_div

BLOCKS_AT_ONCE = 8
"""Blocks of each chip that one op writes (stages/kv/block_memory.py)."""


class TierSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that the tiers of each host may take."""

    host_bytes: int
    disk_bytes: int


class TierPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """What chips and tiers hold in tokens, and seconds with and without what is kept.

    `block_bytes` is a block of all layers, as tiers keep it. `hit_ttft_s` is the time to the first token of a prompt
    that is cached but for its last block. `recovery_s` is what follows the replacement of a lost stage under all users
    until they go on, `recompute_s` the same where nothing was kept.
    """

    block_bytes: int
    device_tokens: int
    host_tokens: int
    disk_tokens: int
    hit_ttft_s: float
    recovery_s: float
    recompute_s: float


def predict_tiers(
    config: ModelConfig,
    deployment: Deployment,
    options: PredictionOptions,
    prediction: Prediction,
    sizes: TierSizes,
) -> TierPrediction:
    """Predicts what tiers hold and save in a deployment. Raises PlanError as `chip_stages` does."""
    specs = chip_stages(config, deployment)
    width = architecture_of(config).kv_cache_shape(config, deployment.cache)[-1]
    layer_bytes = width * deployment.block_size * ACTIVATION_BYTES
    block_size, cache = deployment.block_size, deployment.cache
    stages = stage_times(config, specs, deployment, options)
    drafts = deployment.num_speculative_tokens
    chunk = min(deployment.prefill_chunk, options.prompt_tokens)
    slowest_s = max(stage.prefill(chunk, options.context // 2, drafts=drafts).total_s for stage in stages)
    blocks = deployment.users * ceil_div(options.context, block_size)
    layers = max(_layers(spec, deployment) for spec in specs)
    writes = layers * ceil_div(ceil_div(blocks, deployment.chips), BLOCKS_AT_ONCE)
    load_s = blocks * layers * layer_bytes / HOST_BYTES_PER_S + writes * UNTRACED_LAUNCH_S
    last = max(options.prompt_tokens - block_size, 0)
    last_s = [stage.prefill(block_size, last, drafts=drafts).total_s for stage in stages]
    return TierPrediction(
        block_bytes=layer_bytes * sum(_layers(spec, deployment) for spec in specs),
        device_tokens=cache.blocks * cache.pools * block_size,
        host_tokens=_tokens(sizes.host_bytes, specs, deployment, layer_bytes),
        disk_tokens=_tokens(sizes.disk_bytes, specs, deployment, layer_bytes),
        hit_ttft_s=sum(last_s) + prediction.hop_s * (len(specs) - 1),
        recovery_s=load_s + ceil_div(deployment.users * block_size, chunk) * slowest_s,
        recompute_s=ceil_div(deployment.users * options.context, chunk) * slowest_s,
    )


def _layers(spec: StageSpec, deployment: Deployment) -> int:
    """The layers of which a stage keeps blocks: the one that makes drafts is one of the last stage's."""
    return len(spec.layers) + (1 if spec.is_last and deployment.num_speculative_tokens else 0)


def _tokens(size: int, specs: list[StageSpec], deployment: Deployment, layer_bytes: int) -> int:
    """The tokens of which all stages keep their part: the host with most layers bounds them."""
    per_host = max(GALAXY_ROWS // deployment.rows_per_stage, 1)
    hosts = [specs[begin : begin + per_host] for begin in range(0, len(specs), per_host)]
    layers = max(sum(_layers(spec, deployment) for spec in host) for host in hosts)
    return size // (layers * layer_bytes) * deployment.block_size
