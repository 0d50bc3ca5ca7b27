"""The options that shape the engine, as the command line has them, and what follows from them for a given model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from actors.cluster.environment import cluster_address
from actors.log import LateLogger
from actors.options import ClusterOptions, PipelineOptions, Transport
from api.engine.options import EngineOptions, RecoveryOptions
from api.errors import OptionError
from api.scheduler.options import ScheduleOptions
from api.settings.drafts import DraftSettings
from api.settings.environment import CACHE_VARIABLE
from api.settings.model import SplitOptions
from api.settings.option import changed, made
from api.settings.paths import (
    SEEDS_CACHE,
    USERS_CACHE,
    check_cache_dir,
    default_cache_dir,
    prepare_file,
)
from api.settings.tiers import KVOptions
from api.settings.timed import TimeOptions
from api.text.model_source import ModelSource, at_home
from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.fit import check_fits
from stages.device import PROFILES, DeviceProfile
from stages.options import (
    ITEM_BYTES,
    TRACE_REGION_BYTES,
    CacheOptions,
    Dtype,
    ExecutionOptions,
    StageOptions,
    TierOptions,
    WeightOptions,
)
from stages.plan import StageSpec, default_microbatches, explicit_stages, plan_stages
from stages.wormhole import GALAXY_COLUMNS, PREFILL_CHUNK, USERS_PER_ROW
from weights.model_config import UNCHANGED, ConfigChanges, ModelConfig
from weights.sizes import ceil_div, round_up

log = LateLogger(__name__)


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


DEFAULT_STAGES = 2

CACHE_MEMORY_SHARE = 0.25

"""Part of this host's memory that the KV caches of all stages may take unless --num-blocks says otherwise."""

ENGINE_MARGIN_S = 30.0

"""What the engine process gets beyond the stages' own deadline, to start and to report what went wrong."""

AskedDtype = Literal["auto", "float32", "bfloat16"]

CacheDir = Annotated[
    Path | None,
    Meta(
        description="Where converted weights are kept.",
        extra={
            "variables": (CACHE_VARIABLE,),
            "path": "directory",
            "default": f"${CACHE_VARIABLE}, then {SEEDS_CACHE} where it exists, else ~/.cache/{USERS_CACHE}",
        },
    ),
]

DtypeOption = Annotated[AskedDtype, Meta(description="auto: float32 for the sample model, else bfloat16.")]

Seed = Annotated[
    int | None,
    Meta(description="Seed of dummy weights, and of the requests that bring none.", extra={"default": "random"}),
]

Settings = TypeVar("Settings", bound="EngineSettings")


class LengthOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths in tokens, of requests and of blocks of the KV cache."""

    max_model_len: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Tokens of prompt and completion.",
                extra={"flags": ("--max-model-len", "--max-seq-len"), "default": "the model's"},
            ),
        ]
        | None
    ) = None
    block_size: Annotated[int, Meta(ge=1, description="Tokens of a KV cache block.")] = 32


class CapacityOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests run at once, and the size of the KV cache; None where the program decides."""

    max_num_seqs: (
        Annotated[int, Meta(ge=1, description="Requests that run at once.", extra={"default": "32 per microbatch"})]
        | None
    ) = None
    num_blocks: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="KV cache blocks.",
                extra={"default": "enough for --max-num-seqs, bounded by memory"},
            ),
        ]
        | None
    ) = None


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's options, None where the model decides. `EngineSettings.of` takes them by name.

    What stages, actors and the scheduler take as it is given is in their own groups; the rest becomes something else
    for a model, like `dtype` or `prefill_chunk`. `seed` is that of dummy weights, 0 by default.
    """

    split: SplitOptions = SplitOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    lengths: LengthOptions = LengthOptions()
    capacity: CapacityOptions = CapacityOptions()
    prefill_chunk: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Prompt tokens of one step at most, rounded up to whole blocks.",
                extra={
                    "flags": ("--max-num-batched-tokens", "--prefill-chunk"),
                    "default": f"{DeviceProfile().prefill_chunk}, or {PREFILL_CHUNK} on chips",
                },
            ),
        ]
        | None
    ) = None
    dtype: DtypeOption = "auto"
    weights: WeightOptions = WeightOptions()
    cache_dir: CacheDir = None
    seed: Seed = None
    cluster: ClusterOptions = ClusterOptions()
    times: TimeOptions = TimeOptions()
    transport: Annotated[
        Transport | None,
        Meta(
            description="How hidden states pass: mesh, from chip to chip, or host, which needs no links between "
            "stages' chips.",
            extra={"default": "mesh between stages on chips"},
        ),
    ] = None
    execution: ExecutionOptions = ExecutionOptions()
    drafts: DraftSettings = DraftSettings()
    recovery: RecoveryOptions = RecoveryOptions()
    kv: KVOptions = KVOptions()
    timeline: Annotated[
        Path | None,
        Meta(description="A file for a trace of all steps, one track a stage; Perfetto (ui.perfetto.dev) opens it."),
    ] = None

    @classmethod
    def of(cls: type[Settings], **given: Any) -> Settings:
        """Makes settings of options by name, like `stages=2`; groups may be given whole.

        Raises OptionError for a value that an option cannot have, and for a name that is not an option's.
        """
        return made(cls, given)

    def but(self: Settings, **changes: Any) -> Settings:
        """The same settings with other options, by name. Raises as `of` does."""
        return changed(self, **changes)

    def engine_options(
        self, source: ModelSource, config: ModelConfig, changes: ConfigChanges = UNCHANGED, *, sharers: int = 1
    ) -> EngineOptions:
        """What the engine is sent; `config` has the `changes` already. Logs every option not followed to the letter.

        So many `sharers`, engines with the same options, share this host's memory. Raises OptionError or PlanError
        where the options do not fit the model, each other, or this memory, and OptionError where `timeline` cannot be
        written.
        """
        if self.timeline is not None:
            prepare_file(self.timeline, "--timeline")
        cluster, profile = self.cluster, self.cluster.profile
        self.times.check(cluster.device, self.drafts.count)
        drafts = self.drafts.options(config)
        if profile.has_chips or self._is_predicted:
            dtype = resolve_dtype(self.dtype, source, PROFILES["ttnn"])
            specs, cache = chip_plan(config, self._deployment(config), self.capacity.num_blocks)
        else:
            dtype = resolve_dtype(self.dtype, source, profile)
            specs = self._specs(config)
            cache = self._cache(config, dtype, self.schedule.microbatches or default_microbatches(len(specs)), sharers)
        tiers = self.kv.tiers(sharers)
        timed = None
        if not profile.computes:
            timed = self.times.timed_options(source, config, len(specs), cluster.rows_per_stage)
        return EngineOptions(
            pipeline=PipelineOptions(
                hidden_size=config.hidden_size,
                specs=specs,
                stage=StageOptions(
                    model_path=str(source.path),
                    cache_dir=str(self._checked_cache_dir()),
                    dtype=dtype,
                    seed=self.seed or 0,
                    cache=cache,
                    weights=self.weights,
                    execution=self.execution,
                    drafts=drafts,
                    changes=changes,
                    timed=timed,
                    tiers=tiers if profile.computes else TierOptions(host_bytes=0),
                ),
                cluster=cluster,
                runner=profile.runner,
                transport=self.transport or (profile.transport if len(specs) > 1 else "host"),
            ),
            prefill_chunk=self._prefill_chunk(),
            schedule=self.schedule,
            recovery=self.recovery,
            timeline=None if self.timeline is None else str(self.timeline.absolute()),
        )

    def _checked_cache_dir(self) -> Path:
        """The directory of converted weights. Raises OptionError where it is this host's, and of no use."""
        directory = cache_directory(self.cache_dir, os.environ)
        # The hosts of a given cluster have disks of their own.
        if self.cluster.profile.computes and cluster_address(self.cluster.ray_address) is None:
            check_cache_dir(directory)
        if self.cache_dir is None:
            log.info("converted weights are kept in", directory=str(directory))
        return directory

    @property
    def needs_weights(self) -> bool:
        """Whether the model's directory has to hold a checkpoint."""
        return self.cluster.profile.computes and self.weights.load_format == "auto"

    @property
    def _is_predicted(self) -> bool:
        """Whether stages take the time of chips without being any."""
        return not self.cluster.profile.computes and self.times.stage_time is None

    def _deployment(self, config: ModelConfig) -> Deployment:
        """What the chips are to hold. Raises OptionError where the options contradict each other."""
        stages = self.split.count or 1
        rows, layers = self.cluster.rows_per_stage, self.split.layers_per_stage
        microbatches = self.schedule.microbatches or default_microbatches(stages)
        return Deployment(
            stages=stages,
            rows_per_stage=rows,
            users_per_row=users_per_row(self.capacity.max_num_seqs, rows, microbatches),
            max_model_len=self.lengths.max_model_len or config.max_position_embeddings,
            block_size=self.lengths.block_size,
            prefill_chunk=self._prefill_chunk(),
            microbatches=microbatches,
            layers_per_stage=None if layers is None else tuple(layers),
            trace_region_bytes=TRACE_REGION_BYTES if self.execution.enable_trace else 0,
            dtypes=self.weights.weight_dtypes,
            num_speculative_tokens=self.drafts.count,
        )

    def _specs(self, config: ModelConfig) -> list[StageSpec]:
        stages = self.split.count
        if self.split.layers_per_stage is not None:
            return explicit_stages(config, self.split.layers_per_stage)
        stages = min(DEFAULT_STAGES, config.num_hidden_layers) if stages is None else stages
        return plan_stages(config, stages, drafts=self.drafts.count)

    def _prefill_chunk(self) -> int:
        asked = self.prefill_chunk or self.cluster.profile.prefill_chunk
        chunk = round_up(asked, self.lengths.block_size)
        if self.prefill_chunk is not None and chunk != asked:
            log.info("--max-num-batched-tokens was rounded up to whole blocks", asked=asked, tokens=chunk)
        return chunk

    def _cache(self, config: ModelConfig, dtype: Dtype, microbatches: int, sharers: int) -> CacheOptions:
        asked = self.capacity.max_num_seqs or USERS_PER_ROW * microbatches
        slots = round_up(asked, microbatches)
        if slots != asked:
            log.info("--max-num-seqs was rounded up so that every microbatch has as many", asked=asked, slots=slots)
        max_model_len = self.lengths.max_model_len or config.max_position_embeddings
        if max_model_len > config.max_position_embeddings:
            raise OptionError(
                f"--max-model-len {max_model_len} is more than the model's {config.max_position_embeddings} positions."
            )
        return CacheOptions(
            slots=slots,
            pools=1,
            blocks=self.capacity.num_blocks or self._blocks(config, dtype, slots, max_model_len, sharers),
            block_size=self.lengths.block_size,
            max_model_len=max_model_len,
        )

    def _blocks(self, config: ModelConfig, dtype: Dtype, slots: int, max_model_len: int, sharers: int) -> int:
        """Blocks for `slots` requests of the greatest length, or as many as memory allows."""
        needed = ceil_div(max_model_len, self.lengths.block_size)
        if not self.cluster.profile.computes:
            return slots * needed  # Nothing is kept in them.
        layers = config.num_hidden_layers + (1 if self.drafts.count else 0)
        block_bytes = self.lengths.block_size * layers * config.kv_dim * ITEM_BYTES[dtype]
        affordable = int(CACHE_MEMORY_SHARE * memory_bytes()) // sharers // block_bytes
        if affordable < needed:
            raise OptionError(
                f"The KV cache of one request of {max_model_len} tokens takes {needed * block_bytes >> 20} MiB, more "
                f"than {CACHE_MEMORY_SHARE / sharers:.0%} of this host's memory: lower --max-model-len, or give "
                "--num-blocks."
            )
        if affordable < slots * needed:
            log.info("memory bounds the KV cache", blocks=affordable, wanted=slots * needed)
        return min(affordable, slots * needed)


def cache_directory(given: Path | None, environment: Mapping[str, str]) -> Path:
    """The absolute directory of converted weights: the given one, else the default. Raises OptionError."""
    return at_home(default_cache_dir(environment) if given is None else given).absolute()


def resolve_dtype(asked: AskedDtype, source: ModelSource, device: DeviceProfile) -> Dtype:
    """What --dtype means for a model: "auto" is float32 for the sample, whose text tests compare, else bfloat16.

    Raises OptionError for another dtype than that of the device, where it has only one.
    """
    if device.hidden_dtype is not None:
        if asked not in {"auto", device.hidden_dtype}:
            raise OptionError(
                f"--dtype {asked} is not for chips, which pass {device.hidden_dtype} on: leave it out, and choose the "
                "dtypes of weights, like --attention-dtype bfloat16."
            )
        return device.hidden_dtype
    if asked != "auto":
        return asked
    return "float32" if source.is_sample else "bfloat16"


def memory_bytes() -> int:
    """The physical memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
