"""The options that shape the engine, as the command line has them, and what follows from them for a given model."""

import os
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from actors.options import STAGE_RUNNER, TIMED_RUNNER, PipelineOptions, Transport
from api.engine.options import EngineOptions
from api.engine.recovery import DEFAULT_MAX_RESTARTS
from api.engine.timeline import open_timeline
from api.errors import OptionError
from api.scheduler.options import DEFAULT_PREFILL_WAIT
from api.settings.chips import chip_dtype, chip_plan
from api.settings.stage_count import stage_count
from api.settings.timed import check_timed, timed_options
from api.text.model_source import ModelSource
from stages.device import Device
from stages.options import ITEM_BYTES, CacheOptions, Dtype, LoadFormat, StageOptions
from stages.plan import StageSpec, default_microbatches, explicit_stages, plan_stages
from stages.tensor_dtypes import WeightDtypes
from stages.wormhole import USERS_PER_ROW
from weights.model_config import UNCHANGED, ConfigChanges, ModelConfig
from weights.sizes import ceil_div, round_up

DEFAULT_STAGES = 2
DEFAULT_CACHE_DIR = Path("generated/deepseek_v3")
DEFAULT_PREFILL_CHUNK = 256
CACHE_MEMORY_SHARE = 0.25
"""Part of this host's memory that the KV caches of all stages may take unless --num-blocks says otherwise."""

ENGINE_MARGIN_S = 30.0
"""What the engine process gets beyond the stages' own deadline, to start and to say what went wrong."""

log = structlog.get_logger()


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's options, None where the model decides. Counts are positive; times are in seconds.

    `seed` is that of dummy weights, 0 by default. `max_model_len`, `block_size` and `prefill_chunk` are in tokens,
    `num_blocks` in blocks of `block_size`, `prefill_wait` in decode steps. With `spare` a process on each host waits to
    take the place of a lost stage. A trace of all steps is written to `timeline`. `stage_time` and `prompt_token_time`
    are milliseconds, of the timed device.
    """

    cache_dir: Path
    stages: int | None = None
    layers_per_stage: list[int] | None = None
    microbatches: int | None = None
    max_model_len: int | None = None
    block_size: int = 32
    max_num_seqs: int | None = None
    prefill_chunk: int | None = None
    prefill_wait: float = DEFAULT_PREFILL_WAIT
    num_blocks: int | None = None
    dtype: Dtype | Literal["auto"] = "auto"
    load_format: LoadFormat = "auto"
    seed: int | None = None
    device: Device = "embedded"
    rows_per_stage: int = 1
    stage_time: list[float] | None = None
    prompt_token_time: float | None = None
    transport: Transport | None = None
    enable_trace: bool = False
    weight_dtypes: WeightDtypes = WeightDtypes()
    ray_address: str | None = None
    start_timeout_s: float = 600.0
    placement_timeout_s: float = 30.0
    step_timeout_s: float = 60.0
    max_restarts: int = DEFAULT_MAX_RESTARTS
    spare: bool = True
    timeline: Path | None = None

    def engine_options(
        self, source: ModelSource, config: ModelConfig, changes: ConfigChanges = UNCHANGED, *, sharers: int = 1
    ) -> EngineOptions:
        """What the engine is told; `config` has the `changes` already. Logs every option not followed to the letter.

        So many `sharers`, engines with the same options, share this host's memory. Raises OptionError or PlanError
        where the options do not fit the model, each other, or this memory, and OptionError where `timeline` cannot be
        written.
        """
        if self.timeline is not None:
            open_timeline(self.timeline).close()
        check_timed(self)
        if self.device == "ttnn" or self._is_predicted:
            dtype = chip_dtype(self.dtype)
            specs, cache = chip_plan(self, config, self._prefill_chunk())
        else:
            dtype = resolve_dtype(self.dtype, source)
            specs = self._specs(config)
            cache = self._cache(config, dtype, self.microbatches or default_microbatches(len(specs)), sharers)
        return EngineOptions(
            pipeline=PipelineOptions(
                hidden_size=config.hidden_size,
                specs=specs,
                stage=StageOptions(
                    model_path=str(source.path),
                    cache_dir=str(self.cache_dir.expanduser().absolute()),
                    dtype=dtype,
                    load_format=self.load_format,
                    seed=self.seed or 0,
                    changes=changes,
                    enable_trace=self.enable_trace,
                    weight_dtypes=self.weight_dtypes,
                    cache=cache,
                    timed=timed_options(self, source, config, len(specs)) if self.device == "timed" else None,
                ),
                device=self.device,
                runner=TIMED_RUNNER if self.device == "timed" else STAGE_RUNNER,
                rows_per_stage=self.rows_per_stage,
                transport=self.transport or ("mesh" if self.device == "ttnn" and len(specs) > 1 else "host"),
                ray_address=self.ray_address,
                start_timeout_s=self.start_timeout_s,
                placement_timeout_s=self.placement_timeout_s,
                step_timeout_s=self.step_timeout_s,
                spare=self.spare,
            ),
            prefill_chunk=self._prefill_chunk(),
            microbatches=self.microbatches,
            prefill_wait=self.prefill_wait,
            max_restarts=self.max_restarts,
            timeline=None if self.timeline is None else str(self.timeline.absolute()),
        )

    @property
    def _is_predicted(self) -> bool:
        """Whether stages take the time of chips without being any."""
        return self.device == "timed" and self.stage_time is None

    @property
    def needs_weights(self) -> bool:
        """Whether the model's directory has to hold a checkpoint."""
        return self.device != "timed" and self.load_format == "auto"

    def _specs(self, config: ModelConfig) -> list[StageSpec]:
        stages = stage_count(self.stages, self.layers_per_stage)
        if self.layers_per_stage is not None:
            return explicit_stages(config, self.layers_per_stage)
        return plan_stages(config, min(DEFAULT_STAGES, config.num_hidden_layers) if stages is None else stages)

    def _prefill_chunk(self) -> int:
        asked = self.prefill_chunk or DEFAULT_PREFILL_CHUNK
        chunk = round_up(asked, self.block_size)
        if self.prefill_chunk is not None and chunk != asked:
            log.info("--max-num-batched-tokens was rounded up to whole blocks", asked=asked, tokens=chunk)
        return chunk

    def _cache(self, config: ModelConfig, dtype: Dtype, microbatches: int, sharers: int) -> CacheOptions:
        asked = self.max_num_seqs or USERS_PER_ROW * microbatches
        slots = round_up(asked, microbatches)
        if slots != asked:
            log.info("--max-num-seqs was rounded up so that every microbatch has as many", asked=asked, slots=slots)
        max_model_len = self.max_model_len or config.max_position_embeddings
        if max_model_len > config.max_position_embeddings:
            raise OptionError(
                f"--max-model-len {max_model_len} is more than the model's {config.max_position_embeddings} positions."
            )
        return CacheOptions(
            slots=slots,
            pools=1,
            blocks=self.num_blocks or self._blocks(config, dtype, slots, max_model_len, sharers),
            block_size=self.block_size,
            max_model_len=max_model_len,
        )

    def _blocks(self, config: ModelConfig, dtype: Dtype, slots: int, max_model_len: int, sharers: int) -> int:
        """Blocks for `slots` requests of the greatest length, or as many as memory allows."""
        block_bytes = self.block_size * config.num_hidden_layers * config.kv_dim * ITEM_BYTES[dtype]
        if self.device == "timed":
            return slots * ceil_div(max_model_len, self.block_size)  # Which nothing is kept in.
        affordable = int(CACHE_MEMORY_SHARE * memory_bytes()) // sharers // block_bytes
        needed = ceil_div(max_model_len, self.block_size)
        if affordable < needed:
            raise OptionError(
                f"The KV cache of one request of {max_model_len} tokens takes {needed * block_bytes >> 20} MiB, more "
                f"than {CACHE_MEMORY_SHARE / sharers:.0%} of this host's memory: lower --max-model-len, or give "
                "--num-blocks."
            )
        if affordable < slots * needed:
            log.info("memory bounds the KV cache", blocks=affordable, wanted=slots * needed)
        return min(affordable, slots * needed)


def resolve_dtype(asked: Dtype | Literal["auto"], source: ModelSource) -> Dtype:
    """What --dtype means for a model: "auto" is float32 for the sample, whose text tests compare, else bfloat16."""
    if asked != "auto":
        return asked
    return "float32" if source.is_sample else "bfloat16"


def memory_bytes() -> int:
    """Physical memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
