"""The memory that a deployment takes on each chip, stage by stage."""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from stages.capacity.chip_weights import ChipTensor, ChipWeights
from stages.capacity.deployment import Deployment
from stages.models.registry import architecture_of
from stages.plan import StageSpec, balanced_split, explicit_stages
from stages.tensor_dtypes import TILE, TensorDtype
from stages.wormhole import DRAM_BANKS, DRAM_BYTES, GALAXY_COLUMNS, L1_BANKS, L1_BYTES, TOKENS_AT_ONCE, TRACE_ALIGNMENT
from weights.model_config import ModelConfig
from weights.sizes import ceil_div, round_up


class Activations:
    """The activations that one chip of a `rows` x `columns` stage holds at its fullest, for `tokens` on every row."""

    def __init__(self, config: ModelConfig, rows: int, tokens: int, columns: int = GALAXY_COLUMNS) -> None:
        self._config = config
        self._columns = columns
        self._local_experts = config.n_routed_experts // (rows * columns)
        self._tokens = tokens
        self._all_tokens = rows * tokens
        inner = selected_width(config, rows, columns)
        self._stacked_width = inner if inner != self._local_experts else 0

    def attention(self) -> list[ChipTensor]:
        """The activations of attention in a prefill of one request, when its columns have exchanged users for heads.

        A request is prefilled by all columns of its row, of which one keeps its KV.
        """
        config = self._config
        heads, tokens, lanes = config.num_attention_heads, self._tokens, self._tokens * self._columns
        share, wide, narrow = heads // self._columns, config.kv_dim, config.kv_lora_rank
        return [
            *self._residual(),
            _float("q", (1, tokens, share, wide)),
            _float("kv", (1, 1, tokens, wide)),
            _float("kv_lanes", (1, 1, lanes, wide)),
            _float("own_kv", (1, 1, tokens, wide)),
            _float("q_lanes", (1, lanes, share, wide)),
            _float("own_q", (1, tokens, heads, wide)),
            _float("attended", (1, heads, tokens, narrow)),
            _float("attended_by_token", (1, tokens, heads, narrow)),
            _float("attended_lanes", (1, lanes, share, narrow)),
        ]

    def feed_forward(self, layer: int) -> list[ChipTensor]:
        """The activations of a layer's feed-forward part, before its results are added to the residual."""
        return self._mixture() if self._config.is_moe(layer) else self._dense()

    def draft(self) -> list[ChipTensor]:
        """What is held while the multi-token-prediction layer runs, beside the activations of its decoder layer."""
        shape = (1, 1, self._tokens, self._config.hidden_size // self._columns)
        return [_float(name, shape) for name in ("hidden", "following")]

    def experts(self) -> list[ChipTensor]:
        """The results of one pass of tokens through the chip's experts."""
        config = self._config
        if self._stacked_width:
            inner = (1, 1, self._all_tokens, self._stacked_width)
            return [_float(name, inner) for name in ("hidden", "selected", "weighted")]
        tokens = min(self._all_tokens, TOKENS_AT_ONCE)
        inner = (1, self._local_experts, tokens, config.moe_intermediate_size)
        outer = (1, self._local_experts, tokens, config.hidden_size)
        return [
            *(_float(name, inner) for name in ("gate", "up", "product")),
            *(_float(name, outer) for name in ("output", "weighted")),
        ]

    def _stacked_mixture(self) -> list[ChipTensor]:
        """The activations of a mixture whose experts are one network on each chip."""
        config, tokens = self._config, self._all_tokens
        several = self._all_tokens > self._tokens
        return [
            *self._residual(),
            *(_float("own", (1, 1, self._tokens, config.hidden_size)) for _ in range(several)),
            _float("every", (1, 1, tokens, config.hidden_size)),
            _float("logits", (1, 1, tokens, config.n_routed_experts), "float32"),
            _float("weights", (1, 1, tokens, config.n_routed_experts + TILE)),
            *self.experts(),
            _float("partial", (1, 1, tokens, config.hidden_size)),
        ]

    def _mixture(self) -> list[ChipTensor]:
        if self._stacked_width:
            return self._stacked_mixture()
        config = self._config
        tokens = min(self._all_tokens, TOKENS_AT_ONCE)
        return [
            *self._residual(),
            _float("own", (1, 1, self._tokens, config.hidden_size)),
            _float("every", (1, 1, self._all_tokens, config.hidden_size)),
            _float("logits", (1, 1, self._all_tokens, config.n_routed_experts), "float32"),
            _float("weights", (1, 1, self._all_tokens, config.num_experts_per_tok)),
            _float("indices", (1, 1, self._all_tokens, config.num_experts_per_tok)),
            _float("dense", (1, 1, tokens, config.n_routed_experts)),
            _float("local", (1, 1, tokens, self._local_experts)),
            _float("local_by_expert", (1, self._local_experts, tokens, 1)),
            *self.experts(),
            *self._former_pass(tokens),
            _float("routed", (1, 1, self._all_tokens, config.hidden_size)),
        ]

    def _former_pass(self, tokens: int) -> Iterator[ChipTensor]:
        """What a pass through the experts leaves behind until the next one ends, and the tokens of that next pass."""
        if self._all_tokens > TOKENS_AT_ONCE:
            yield _float("former_weighted", (1, self._local_experts, tokens, self._config.hidden_size))
            yield _float("some", (1, 1, tokens, self._config.hidden_size))

    def _dense(self) -> list[ChipTensor]:
        config = self._config
        return [
            *self._residual(),
            _float("hidden", (1, 1, self._tokens, config.intermediate_size // self._columns)),
            _float("whole", (1, 1, self._tokens, config.intermediate_size)),
            _float("output", (1, 1, self._tokens, config.hidden_size // self._columns)),
        ]

    def _residual(self) -> Iterator[ChipTensor]:
        """The input of the layer, its normalised form, and the cosines and sines of the step."""
        shape = (1, 1, self._tokens, self._config.hidden_size // self._columns)
        yield from (_float(name, shape) for name in ("x", "normed"))
        rope = (1, 1, self._tokens, self._config.qk_rope_head_dim)
        yield from (_float(name, rope) for name in ("cos", "sin"))


def selected_width(config: ModelConfig, rows: int, columns: int) -> int:
    """The columns to which a chip takes weights by expert: its experts, or all of their inner values."""
    return architecture_of(config).selection(config).on_chip(rows, columns)[-1]


def _float(name: str, shape: tuple[int, ...], dtype: TensorDtype = "bfloat16") -> ChipTensor:
    return ChipTensor(name=name, shape=shape, dtype=dtype)


class StageMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one stage, in bytes on each of its chips.

    `tables` are those of rotary positions and of the experts' chips, `activations` the most that a prefill step holds
    at once, and `decode_l1` the most that a decode step holds in L1, where its results stay.
    """

    stage: int
    first_layer: int
    end_layer: int
    rows: int
    weights: int
    kv_cache: int
    tables: int
    activations: int
    trace: int
    decode_l1: int
    available: int = DRAM_BYTES
    available_l1: int = L1_BYTES

    @property
    def total(self) -> int:
        """Bytes of DRAM."""
        return self.weights + self.kv_cache + self.tables + self.activations + self.trace

    @property
    def fits(self) -> bool:
        """Whether DRAM and L1 are large enough."""
        return self.lack <= 0

    @property
    def lack(self) -> float:
        """The missing memory as a share of the chip's DRAM or L1, whichever lacks more; 0 or less if all fits."""
        return max(self.total / self.available, self.decode_l1 / self.available_l1) - 1


def chip_memory(config: ModelConfig, deployment: Deployment) -> list[StageMemory]:
    """The memory of each stage. Raises PlanError as `chip_stages` does."""
    specs = chip_stages(config, deployment)
    layers = _Layers(config, deployment)
    return [_stage_memory(deployment, spec, layers) for spec in specs]


def chip_stages(config: ModelConfig, deployment: Deployment) -> list[StageSpec]:
    """The layers of each stage: as the deployment gives them, else split so that the fullest chip holds the least.

    A decode step reads all weights of its stage, so this evens out time as well as memory. Raises PlanError as
    `Deployment.check` and `explicit_stages` do.
    """
    deployment.check(config)
    if deployment.layers_per_stage is not None:
        return explicit_stages(config, deployment.layers_per_stage)
    layers = _Layers(config, deployment)
    costs = [layers.weights_of(config.is_moe(layer)) + layers.kv_cache for layer in range(config.num_hidden_layers)]
    costs[0] += allocated(layers.weights.embedding())
    costs[-1] += allocated(layers.weights.head())
    if deployment.num_speculative_tokens:
        drafting = layers.drafting(is_first=deployment.stages == 1)
        costs[-1] += drafting.weights + drafting.kv_cache
    return explicit_stages(config, balanced_split(costs, deployment.stages))


def allocated(tensors: Iterable[ChipTensor], banks: int = DRAM_BANKS) -> int:
    """Bytes that the allocator takes for all of `tensors`."""
    return sum(tensor.allocated(banks) for tensor in tensors)


class _Drafting(NamedTuple):
    """What a stage holds to make drafts: as in StageMemory, the last two being those of a pass of their layer."""

    weights: int = 0
    kv_cache: int = 0
    tables: int = 0
    activations: int = 0
    decode_l1: int = 0


class _Layers:
    """The memory of one layer of each kind: dense, and with a mixture of experts."""

    def __init__(self, config: ModelConfig, deployment: Deployment) -> None:
        self.config = config
        rows = deployment.rows_per_stage
        self.weights = ChipWeights(config, deployment.dtypes, rows)
        self.kv_cache = self.weights.kv_cache(deployment.cache).allocated()
        self._prefill = Activations(config, rows, deployment.prefill_chunk)
        self._decode = Activations(config, rows, deployment.lanes_per_row)
        self.weights_of = functools.cache(self._weights_of)
        self.activations_of = functools.cache(self._activations_of)
        self.decode_l1_of = functools.cache(self._decode_l1_of)

    def drafting(self, *, is_first: bool) -> "_Drafting":
        """What making drafts takes of the last stage, which may be the first one too."""
        is_moe = self.config.is_moe(self.config.num_hidden_layers)
        return _Drafting(
            weights=allocated(self.weights.drafting(is_first=is_first)),
            kv_cache=self.kv_cache,
            tables=is_moe * self.weights.selection().allocated(),
            activations=self.activations_of(is_moe) + allocated(self._prefill.draft()),
            decode_l1=self.decode_l1_of(is_moe) + allocated(self._decode.draft(), L1_BANKS),
        )

    def _weights_of(self, is_moe: bool) -> int:
        return allocated(self.weights.layer(_a_layer(self.config, is_moe)))

    def _activations_of(self, is_moe: bool) -> int:
        feed_forward = self._prefill.feed_forward(_a_layer(self.config, is_moe))
        return max(allocated(self._prefill.attention()), allocated(feed_forward))

    def _decode_l1_of(self, is_moe: bool) -> int:
        return allocated(self._decode.feed_forward(_a_layer(self.config, is_moe)), L1_BANKS)


def _stage_memory(deployment: Deployment, spec: StageSpec, layers: _Layers) -> StageMemory:
    kinds = [layers.config.is_moe(layer) for layer in spec.layers]
    weights = layers.weights
    embedding = allocated(weights.embedding()) if spec.is_first else 0
    head = allocated(weights.head()) if spec.is_last else 0
    selections = sum(kinds) * weights.selection().allocated()
    drafts = spec.is_last and deployment.num_speculative_tokens > 0
    drafting = layers.drafting(is_first=spec.is_first) if drafts else _Drafting()
    return StageMemory(
        stage=spec.index,
        first_layer=spec.first_layer,
        end_layer=spec.end_layer,
        rows=deployment.rows_per_stage,
        weights=embedding + sum(layers.weights_of(kind) for kind in kinds) + head + drafting.weights,
        kv_cache=len(kinds) * layers.kv_cache + drafting.kv_cache,
        tables=allocated(weights.rope_tables(deployment.cache)) + selections + drafting.tables,
        activations=max(drafting.activations, *(layers.activations_of(kind) for kind in kinds)),
        trace=_trace_region(deployment.trace_region_bytes),
        decode_l1=max(drafting.decode_l1, *(layers.decode_l1_of(kind) for kind in kinds)),
    )


def _a_layer(config: ModelConfig, is_moe: bool) -> int:
    """The index of a layer of this kind; all layers of a kind are equal."""
    return config.first_k_dense_replace if is_moe else 0


def _trace_region(size: int) -> int:
    """Bytes that a trace region of `size` bytes takes of all banks together."""
    share = ceil_div(size, DRAM_BANKS)
    return round_up(share, TRACE_ALIGNMENT) * DRAM_BANKS
