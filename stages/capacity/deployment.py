"""A pipeline on chips as `plan` sees it: stages, rows of each, requests in flight, and dtypes of weights."""

import msgspec

from stages.errors import PlanError
from stages.options import TRACE_REGION_BYTES, CacheOptions
from stages.plan import check_drafts, check_stages, default_microbatches
from stages.tensor_dtypes import WeightDtypes
from stages.wormhole import CORES, GALAXY_COLUMNS, HEADS_TOGETHER
from weights.model_config import ModelConfig
from weights.sizes import ceil_div


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline on chips: its stages, their rows, the requests in flight, and the dtypes of the weights.

    Each of `stages` owns `rows_per_stage` rows of 8 chips. A microbatch has `users_per_row` requests on each row, and
    `microbatches` are in flight (None: one more than stages), each request with up to `max_model_len` tokens in the
    KV cache. A prefill step has up to `prefill_chunk` tokens. `layers_per_stage` is None where memory decides. The last
    stage drafts `num_speculative_tokens` of each request for its next step.
    """

    stages: int
    rows_per_stage: int
    users_per_row: int
    max_model_len: int
    block_size: int
    prefill_chunk: int
    microbatches: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    trace_region_bytes: int = TRACE_REGION_BYTES
    dtypes: WeightDtypes = WeightDtypes()
    num_speculative_tokens: int = 0

    @property
    def rows(self) -> int:
        """The number of Galaxy rows of all stages."""
        return self.stages * self.rows_per_stage

    @property
    def chips(self) -> int:
        """The number of chips of one stage."""
        return self.rows_per_stage * GALAXY_COLUMNS

    @property
    def steps_in_flight(self) -> int:
        """The number of microbatches in flight."""
        return default_microbatches(self.stages) if self.microbatches is None else self.microbatches

    @property
    def users(self) -> int:
        """The number of requests in flight."""
        return self.users_per_row * self.rows_per_stage * self.steps_in_flight

    @property
    def lanes_per_row(self) -> int:
        """The lanes of a decode step on each row: one for each request and each of its drafts, and padding."""
        if not self.num_speculative_tokens:
            return self.users_per_row
        own = ceil_div(self.users_per_row, GALAXY_COLUMNS) * (1 + self.num_speculative_tokens)
        return GALAXY_COLUMNS * padded_lanes(own)

    @property
    def cache(self) -> CacheOptions:
        """A KV cache with room for all requests at their longest, with a pool on each chip of a stage."""
        blocks_per_slot = ceil_div(self.max_model_len, self.block_size)
        return CacheOptions(
            slots=self.users,
            pools=self.chips,
            blocks=self.users // self.chips * blocks_per_slot,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
        )

    def check(self, config: ModelConfig) -> None:
        """Raises PlanError where the model or the users cannot be shared evenly by the chips of a stage.

        And where the model cannot draft what is asked for.
        """
        check_stages(config, self.stages)
        check_drafts(config, self.num_speculative_tokens)
        if self.users_per_row < 1 or self.users_per_row % GALAXY_COLUMNS:
            raise PlanError(
                f"{self.users_per_row} users a row cannot be shared evenly by its {GALAXY_COLUMNS} chips: choose a "
                f"multiple of {GALAXY_COLUMNS}."
            )
        if self.lanes_per_row > GALAXY_COLUMNS * CORES:
            raise PlanError(
                f"{self.users_per_row} users a row with {self.num_speculative_tokens} drafts each take more than the "
                f"{CORES} cores of a chip, one for each token of a decode step: lower --num-speculative-tokens or the "
                "users."
            )
        if self.max_model_len > config.max_position_embeddings:
            raise PlanError(
                f"--max-model-len {self.max_model_len} is more than the model's {config.max_position_embeddings} "
                "positions."
            )
        shared = {
            "hidden size": (config.hidden_size, GALAXY_COLUMNS),
            "number of attention heads": (config.num_attention_heads, GALAXY_COLUMNS),
            "feed-forward width": (config.intermediate_size, GALAXY_COLUMNS),
            "width of the shared experts": (config.moe_intermediate_size * config.n_shared_experts, GALAXY_COLUMNS),
            "number of routed experts": (config.n_routed_experts, self.chips),
        }
        for what, (size, parts) in shared.items():
            if size % parts:
                raise PlanError(f"The {what} ({size}) cannot be shared evenly by {parts} chips.")
        heads = config.num_attention_heads // GALAXY_COLUMNS
        if heads % HEADS_TOGETHER:
            raise PlanError(
                f"{config.num_attention_heads} attention heads are {heads} for each of {GALAXY_COLUMNS} columns of "
                f"chips, which exchange them by {HEADS_TOGETHER}: the model cannot be served on chips."
            )


def padded_lanes(own: int) -> int:
    """The lanes of each chip in a step with drafts whose fullest chip has `own`: a power of two, so that few differ."""
    return 1 << (own - 1).bit_length()
