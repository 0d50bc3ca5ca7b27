"""The options that all stages of a pipeline have in common: weights, dtypes, and the size of the KV cache."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from stages.errors import PlanError
from stages.tensor_dtypes import TILE, WeightDtypes
from weights.model_config import UNCHANGED, ConfigChanges
from weights.sizes import ceil_div


class GivenTimes(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Step times that the user gives: `step_s` seconds, one value for each stage or one for all, and `prompt_token_s`
    more for each token of a prompt in the step."""

    step_s: list[float]
    prompt_token_s: float = 0.0

    def check(self, stages: int) -> None:
        """Raises PlanError unless there is one time for all stages, or one for each of `stages`."""
        if len(self.step_s) not in {1, stages}:
            raise PlanError(
                f"--stage-time gives {len(self.step_s)} times for {stages} stages: give one for all, or one for each."
            )


class PredictedTimes(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Step times as `stages.capacity` predicts them for a stage of `rows` Galaxy rows."""

    rows: int


DRAFT_ACCEPTANCE = 0.8
"""The probability that a draft is right where nothing else is known. It makes 1.8 tokens of a step with one draft, as
many as DeepSeek report of V3's own layer, of whose drafts 85 to 90 % were right (arXiv:2412.19437, 5.4.3)."""


class TimedOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How long steps take, and which tokens come out: ids below `vocabulary` except `never` (in rising order).

    A draft is right with probability `acceptance`, where those before it are.
    """

    times: GivenTimes | PredictedTimes
    vocabulary: int
    never: list[int]
    acceptance: float = DRAFT_ACCEPTANCE


Dtype = Literal["float32", "bfloat16"]

LoadFormat = Literal["auto", "dummy"]

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}

TRANSFORM_VERSION = 2

"""The version of what `convert_weights` writes, part of every cache key: each change of it increases this number."""


TRACE_REGION_BYTES = 45_684_326

"""Memory of each chip for the traces of a stage: what tt-metal's DeepSeek-V3 demo sets aside for the decode trace of
all 61 layers, found by trial (its demo.py: 38,070,272 bytes and a fifth more)."""


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Size of the paged KV cache, the same on every stage of a pipeline.

    `slots` requests run at once, spread over `pools` shards; each pool has `blocks` blocks of `block_size` tokens.
    Slots are numbered so that `pool_of` needs no table.
    """

    slots: int
    pools: int
    blocks: int
    block_size: int
    max_model_len: int

    def __post_init__(self) -> None:
        if self.block_size < TILE or self.block_size % TILE:
            raise PlanError(f"Block size {self.block_size} is not a multiple of {TILE}: choose {TILE}, {2 * TILE}, ...")
        if self.slots < 1 or self.pools < 1 or self.slots % self.pools:
            raise PlanError(f"{self.slots} slots cannot be shared evenly by {self.pools} pools.")
        if self.blocks < self.blocks_per_slot:
            raise PlanError(
                f"{self.blocks} blocks of {self.block_size} tokens cannot hold one request of {self.max_model_len} "
                f"tokens: give at least {self.blocks_per_slot} blocks or lower --max-model-len."
            )

    @property
    def blocks_per_slot(self) -> int:
        """Blocks that a request of the greatest length takes: the width of a page table."""
        return ceil_div(self.max_model_len, self.block_size)

    def pool_of(self, slot: int) -> int:
        """The pool whose blocks the slot uses; neighbouring slots lie in neighbouring pools."""
        return slot % self.pools


class TierOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where full blocks are kept beside the device, and how many bytes of them: none where that is 0.

    `host_bytes` None is a share of the host's memory. So many `disk_sharers` use the directory with the same plan.
    """

    host_directory: str = ""
    host_bytes: int | None = None
    disk_directory: str = ""
    disk_bytes: int = 0
    disk_sharers: int = 1

    @property
    def are_any(self) -> bool:
        """Whether anything is kept beside the device."""
        return self.host_bytes != 0 or self.disk_bytes > 0


class WeightOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How weights are read and kept; `weight_dtypes` are those of weights and of the KV cache on chips."""

    load_format: Annotated[
        LoadFormat, Meta(description="dummy: random weights; only config.json and the tokenizer are read.")
    ] = "auto"
    weight_dtypes: WeightDtypes = WeightDtypes()


class ExecutionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How stages run their steps."""

    enable_trace: Annotated[bool, Meta(description="Capture the decode step of each stage once, and replay it.")] = (
        False
    )


DRAFTS_MAX = 8
"""Drafts of a request in one step at most: fewer than the tokens of a block."""


class DraftOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens the model's own multi-token-prediction layer drafts for each step; 0 leaves it out."""

    num_speculative_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=DRAFTS_MAX,
            description="Tokens that the model's multi-token-prediction layer drafts for each request and step.",
        ),
    ] = 0


class VocabularyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the last stage finds what tokens stand for, which grammars need.

    `tokenizer` is the directory of the tokenizer's files on its host; `eos_token_ids` are the tokens that end answers.
    """

    tokenizer: str
    eos_token_ids: list[int]


class StageOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that all stages of a pipeline have in common.

    `model_path` is a checkpoint directory; with `weights.load_format` "dummy" only its config.json is read and the
    weights are random, from `seed`. Converted weights go to `cache_dir`. `dtype` is what float tensors are held in.
    Only the layers that `changes` leave are the model. `timed` is for the timed device alone. `tiers` are those of the
    stage, or before it has one of all stages on its host. With `drafts` the last stage has the layer that makes them.
    Without a `vocabulary` requests can have no grammar.
    """

    model_path: str
    cache_dir: str
    dtype: Dtype
    seed: int
    cache: CacheOptions
    weights: WeightOptions = WeightOptions()
    execution: ExecutionOptions = ExecutionOptions()
    changes: ConfigChanges = UNCHANGED
    timed: TimedOptions | None = None
    tiers: TierOptions = TierOptions()
    drafts: DraftOptions = DraftOptions()
    vocabulary: VocabularyOptions | None = None
