"""Predicted times of a stage's steps: a roofline of weights read and arithmetic, plus network and launches.

Nothing here was measured on a Galaxy. A matrix product takes the longer of reading its weights and computing; reading,
computing and sending are assumed to follow each other, as ops of one queue do.
"""

import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from stages.capacity.chip_memory import Activations
from stages.capacity.chip_weights import ChipTensor, ChipWeights
from stages.capacity.deployment import padded_lanes
from stages.models.architecture import Launches
from stages.models.registry import architecture_of
from stages.plan import StageSpec
from stages.tensor_dtypes import TILE, WeightDtypes
from stages.wormhole import (
    DRAM_BYTES_PER_S,
    GALAXY_COLUMNS,
    HOP_S,
    LINK_BYTES_PER_S,
    LINKS,
    TOKENS_AT_ONCE,
    Fidelity,
    flops_per_s,
)
from weights.model_config import ModelConfig
from weights.sizes import ceil_div, round_up

DRAM_EFFICIENCY = 0.83
"""The share of the DRAM's bandwidth that is reached: the lower end of Llama3-70B's decode, 239 of 288 GB/s
(tech_reports/Saturating_DRAM_bandwidth). Those weights are laid out bank by bank, ours are interleaved."""

MATMUL_EFFICIENCY = 0.5
"""The share of the matrix engines' peak that is reached: products of 1024 to 2048 a side in bfloat16 at HiFi2 without
a tuned program reached 42 to 67 %, smaller ones 9 to 19 % (tech_reports/GEMM_FLOPS, out-of-box results of n150)."""

MATMUL_FIDELITY: Fidelity = "HiFi2"
"""The fidelity of the modules' kernels (stages/models/module.py, matmul_kernel)."""

TRACED_LAUNCH_S = 8.5e-6
UNTRACED_LAUNCH_S = 38e-6
"""Seconds from one op to the next, with a trace and without: time less device time of the smallest product in the same
out-of-box results."""

ExpertKernel = Literal["all", "chosen"]
"""Whether chips run all their experts on every token, as the modules do, or only those that were chosen."""

ACTIVATION_BYTES = 2

CANDIDATE_OPS = Launches(4, 4)
"""Ops that find candidates among a chip's logits (stages/candidates.py), without that for a padded vocabulary."""

CANDIDATE_BYTES = 20
"""Bytes that these move for each logit: topk reads it, as does the typecast, which writes a float32; softmax reads and
writes those, and gather reads them."""

PADDING_BYTES = 4
"""Bytes that the op for a padded vocabulary moves for each logit."""


class CollectiveCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a collective on N chips: `fixed_s` + `hop_s` * (N - 1) + bytes over the busiest link / bandwidth."""

    fixed_s: float
    hop_s: float
    bytes_per_s: float

    def seconds(self, chips: int, busiest_link_bytes: float) -> float:
        """Seconds of one call; 0 on an axis of one chip."""
        if chips == 1:
            return 0.0
        return self.fixed_s + self.hop_s * (chips - 1) + busiest_link_bytes / (self.bytes_per_s * LINKS)


ALL_GATHER = CollectiveCost(fixed_s=4.47e-6, hop_s=1.91e-6, bytes_per_s=11.8e9)

REDUCE_SCATTER = CollectiveCost(fixed_s=3.23e-6, hop_s=3.97e-6, bytes_per_s=11.1e9)

ALL_TO_ALL = CollectiveCost(fixed_s=2.99e-6, hop_s=2.14e-6, bytes_per_s=7.6e9)


def all_gather_s(chips: int, input_bytes: float) -> float:
    """Seconds of an all-gather of `input_bytes` from each chip."""
    return ALL_GATHER.seconds(chips, (chips - 1) * input_bytes)


def reduce_scatter_s(chips: int, input_bytes: float) -> float:
    """Seconds of a reduce-scatter of partial sums of `input_bytes` on each chip."""
    return REDUCE_SCATTER.seconds(chips, (chips - 1) / chips * input_bytes)


def all_to_all_s(chips: int, input_bytes: float) -> float:
    """Seconds of an all-to-all of `input_bytes` on each chip; bytes for distant chips pass through those between."""
    return ALL_TO_ALL.seconds(chips, (chips // 2) * (chips - chips // 2) / chips * input_bytes)


def hop_s(distance: int, chip_bytes: float) -> float:
    """Seconds from a stage to the next over one link: each chip sends `chip_bytes`; `distance` rows share a column."""
    return HOP_S * distance + distance * chip_bytes / LINK_BYTES_PER_S


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step by what they are spent on; a product counts as memory or compute, whichever takes longer."""

    memory_s: float = 0.0
    compute_s: float = 0.0
    network_s: float = 0.0
    launch_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of the whole step: the sum, as nothing overlaps."""
        return self.memory_s + self.compute_s + self.network_s + self.launch_s

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(
            memory_s=self.memory_s + other.memory_s,
            compute_s=self.compute_s + other.compute_s,
            network_s=self.network_s + other.network_s,
            launch_s=self.launch_s + other.launch_s,
        )

    def times(self, count: int) -> "StepTime":
        """The time of `count` equal steps."""
        return StepTime(
            memory_s=self.memory_s * count,
            compute_s=self.compute_s * count,
            network_s=self.network_s * count,
            launch_s=self.launch_s * count,
        )


def hit_share(config: ModelConfig, tokens: int) -> float:
    """The expected share of experts that at least one of `tokens` chooses, if all choices are equally likely."""
    return 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens


class StageTimes:
    """Predicts the times of one stage's steps, without torch or a device."""

    def __init__(
        self,
        config: ModelConfig,
        spec: StageSpec,
        rows: int,
        dtypes: WeightDtypes,
        *,
        traced: bool = False,
        expert_kernel: ExpertKernel = "all",
        launch_s: float | None = None,
    ) -> None:
        """`traced`: decode steps are replayed from a trace. `launch_s`: of a program, in place of what is assumed."""
        self._config = config
        self._spec = spec
        self._rows = rows
        self._dtypes = dtypes
        self._weights = ChipWeights(config, dtypes, rows)
        self._ops = architecture_of(config).ops
        self._traced = traced
        self._expert_kernel = expert_kernel
        self._launch_s = launch_s

    def decode_ops(self, users_per_row: int) -> int:
        """The programs that a decode step without drafts launches on each chip."""
        tokens = _tiles(users_per_row)
        total = self._ops.entering(tokens=tokens, is_decode=True)
        for layer in self._spec.layers:
            total += self.layer_ops(users_per_row, is_moe=self._config.is_moe(layer))
        if not self._spec.is_last:
            return total
        return total + self._ops.norm.decode + self._ops.head.decode + self._candidate_ops.decode

    def layer_ops(self, users_per_row: int, *, is_moe: bool) -> int:
        """The programs of a decoder layer in such a step."""
        return self._ops.layer(is_moe=is_moe, rows=self._rows, tokens=_tiles(users_per_row), is_decode=True)

    def decode(self, users_per_row: int, context: int, *, drafts: int = 0) -> StepTime:
        """The time of a step of `users_per_row` users of each row, with `context` cached tokens each.

        Each user has a token and so many `drafts` behind it, and gets as many for its next step.
        """
        return self.decode_lanes(users_per_row, users_per_row * (1 + drafts), context, passes=drafts)

    def decode_lanes(self, users: int, lanes: int, context: int, *, passes: int) -> StepTime:
        """The time of a decode step in which the `users` of each row have `lanes` tokens, drafts among them.

        On the last stage the draft layer makes so many `passes`, the first over all lanes.
        """
        single, every = _Lanes.of(users, users), _Lanes.of(users, lanes)
        attention = self._attend_lanes(every, context)
        time = self._step(every.tokens, attention, is_decode=True)
        if passes and self._spec.is_last:
            time += self._draft_pass(every.tokens, users, attention, is_decode=True)
            time += self._later_passes(single, users, context, passes)
        return time

    def prefill(self, tokens: int, start: int = 0, *, drafts: int = 0) -> StepTime:
        """The time of a step of `tokens` prompt tokens of one request from position `start`; other rows only pad.

        With `drafts`, as many are made of what follows.
        """
        length = _tiles(tokens)
        # The kernel reads the cache for every head and every tile of queries.
        reads = self._config.num_attention_heads * length // TILE
        attention = self._attend(length, start + length // 2, cache_reads=reads)
        attention += self._swap(length * GALAXY_COLUMNS, length)
        time = self._step(length, attention, is_decode=False)
        if drafts and self._spec.is_last:
            time += self._draft_pass(length, 1, attention, is_decode=False)
            time += self._later_passes(_Lanes.of(1, 1), 1, start + tokens, drafts)
        return time

    def _step(self, tokens: int, attention: StepTime, *, is_decode: bool) -> StepTime:
        kind = functools.cache(lambda is_moe: self._layer(tokens, attention, is_moe=is_moe, is_decode=is_decode))
        total = self._launches(self._ops.entering(tokens=tokens, is_decode=is_decode), is_decode)
        for layer in self._spec.layers:
            total += kind(self._config.is_moe(layer))
        if self._spec.is_last:
            # Only the last token of a prompt needs logits.
            total += self._head(tokens if is_decode else TILE, is_decode)
        return total

    def _layer(self, tokens: int, attention: StepTime, *, is_moe: bool, is_decode: bool) -> StepTime:
        layer = self._config.first_k_dense_replace if is_moe else 0
        every = tokens * self._rows
        experts = {tensor.name for tensor in self._weights.experts()}
        time = self._statistics(tokens).times(2) + attention + self._attention_network(tokens)
        for weight in self._weights.layer(layer):
            if weight.name not in experts:
                time += _product(weight, every if weight.name.startswith("mlp/gate") else tokens)
        ops = self._ops.layer(is_moe=is_moe, rows=self._rows, tokens=tokens, is_decode=is_decode)
        time += self._launches(ops, is_decode)
        if not is_moe:
            return time + self._mlp_network(tokens)
        time += self._experts(every) + self._mixture_network(tokens)
        return time if is_decode else time + self._traffic(tokens)

    def _draft_pass(self, tokens: int, users: int, attention: StepTime, *, is_decode: bool) -> StepTime:
        """The time of the multi-token-prediction layer over `tokens` of each row, and of the head for its `users`."""
        is_moe = self._config.is_moe(self._config.num_hidden_layers)
        joining = [weight for weight in self._weights.draft() if not weight.name.startswith("block/")]
        time = self._statistics(tokens).times(2) + _sum(_product(weight, tokens) for weight in joining)
        time += _network(reduce_scatter_s(GALAXY_COLUMNS, self._hidden(tokens)))
        time += self._launches(self._ops.joining(tokens=tokens, is_decode=is_decode), is_decode)
        time += self._layer(tokens, attention, is_moe=is_moe, is_decode=is_decode)
        return time + self._head(_tiles(users), is_decode, is_traced=False)

    def _later_passes(self, single: "_Lanes", users: int, context: int, passes: int) -> StepTime:
        """The time of all passes after the first, each over the latest draft of every user."""
        if passes == 1:
            return StepTime()
        attention = self._attend_lanes(single, context)
        return self._draft_pass(single.tokens, users, attention, is_decode=True).times(passes - 1)

    def _experts(self, tokens: int) -> StepTime:
        weights = self._weights.experts()
        if self._expert_kernel == "all":
            if self._weights.stacks_experts:
                return _sum(_product(weight, tokens) for weight in [*weights, self._weights.selection()])
            passes = ceil_div(tokens, TOKENS_AT_ONCE)
            return _sum(_product(weight, _tiles(ceil_div(tokens, passes))) for weight in weights).times(passes)
        hit = hit_share(self._config, tokens)
        experts = hit * self._config.n_routed_experts
        each = _tiles(ceil_div(tokens * self._config.num_experts_per_tok, max(1, round(experts))))
        return _sum(_product(weight, each, share=hit) for weight in weights)

    def _attend_lanes(self, lanes: "_Lanes", context: int) -> StepTime:
        """The time of attention in decode: the heads of a lane share tiles, so the cache is read once for each."""
        return self._attend(lanes.own, context, cache_reads=lanes.own) + self._swap(lanes.tokens, lanes.padded)

    def _attend(self, queries: int, context: int, cache_reads: int) -> StepTime:
        """The time of attention on the busiest chip: `queries` tokens, each over `context` cached ones.

        The cache is read `cache_reads` times.
        """
        config = self._config
        token = ChipTensor(name="token", shape=(1, 1, TILE, config.kv_dim), dtype=self._dtypes.kv_cache).bytes / TILE
        flops = 2 * queries * config.num_attention_heads * context * (config.kv_dim + config.kv_lora_rank)
        return _bound(cache_reads * context * token, flops)

    def _swap(self, lanes: int, own: int) -> StepTime:
        """The time of two all-to-alls: queries of all `lanes`, by heads, to a chip's `own` users, and results back."""
        config = self._config
        queries = lanes * _tiles(config.num_attention_heads // GALAXY_COLUMNS) * config.kv_dim
        attended = own * _tiles(config.num_attention_heads) * config.kv_lora_rank
        return _network(sum(all_to_all_s(GALAXY_COLUMNS, size * ACTIVATION_BYTES) for size in (queries, attended)))

    def _attention_network(self, tokens: int) -> StepTime:
        whole = self._hidden(tokens)
        return _network(all_gather_s(GALAXY_COLUMNS, whole / GALAXY_COLUMNS) + reduce_scatter_s(GALAXY_COLUMNS, whole))

    def _mlp_network(self, tokens: int) -> StepTime:
        inner = tokens * self._config.intermediate_size * ACTIVATION_BYTES
        gathered = (self._hidden(tokens), inner)
        return _network(sum(all_gather_s(GALAXY_COLUMNS, whole / GALAXY_COLUMNS) for whole in gathered))

    def _mixture_network(self, tokens: int) -> StepTime:
        whole, rows = self._hidden(tokens), self._rows
        columns = all_gather_s(GALAXY_COLUMNS, whole / GALAXY_COLUMNS) + reduce_scatter_s(GALAXY_COLUMNS, whole)
        return _network(columns + all_gather_s(rows, whole) + reduce_scatter_s(rows, rows * whole))

    def _statistics(self, tokens: int) -> StepTime:
        """The time in which the columns exchange what they know of the length of rows, for a norm."""
        return _network(all_gather_s(GALAXY_COLUMNS, tokens * TILE * ACTIVATION_BYTES))

    def _head(self, tokens: int, is_decode: bool, *, is_traced: bool = True) -> StepTime:
        gather = _network(all_gather_s(GALAXY_COLUMNS, self._hidden(tokens) / GALAXY_COLUMNS))
        products = _sum(_product(weight, tokens) for weight in self._weights.head())
        mode = 0 if is_decode else 1
        ops = self._ops.norm[mode] + self._ops.head[mode] + self._candidate_ops[mode]
        launches = self._launches(ops, is_decode, is_traced=is_traced)
        return self._statistics(tokens) + gather + products + launches + self._candidates(tokens)

    @property
    def _vocabulary_share(self) -> int:
        """The logits of each chip, padded to whole tiles."""
        return _tiles(ceil_div(self._config.vocab_size, GALAXY_COLUMNS))

    @property
    def _candidate_ops(self) -> Launches:
        """The ops by which each chip finds the best of its logits, one more where these are padded."""
        padded = int(self._vocabulary_share * GALAXY_COLUMNS != self._config.vocab_size)
        return Launches(CANDIDATE_OPS.decode + padded, CANDIDATE_OPS.prefill + padded)

    def _candidates(self, tokens: int) -> StepTime:
        """The time in which each chip reads its logits to find the best, and what all of them weigh."""
        is_padded = self._vocabulary_share * GALAXY_COLUMNS != self._config.vocab_size
        return _bound(tokens * self._vocabulary_share * (CANDIDATE_BYTES + PADDING_BYTES * is_padded), 0)

    def _traffic(self, tokens: int) -> StepTime:
        """The time in which experts write results to DRAM and read them again in prefill; in decode they stay in L1."""
        if self._expert_kernel == "chosen":
            return StepTime()
        made = sum(tensor.bytes for tensor in Activations(self._config, self._rows, tokens).experts())
        passes = 1 if self._weights.stacks_experts else ceil_div(tokens * self._rows, TOKENS_AT_ONCE)
        return _bound(2 * made * passes, 0)

    def _hidden(self, tokens: int) -> float:
        return tokens * self._config.hidden_size * ACTIVATION_BYTES

    def _launches(self, ops: int, is_decode: bool, *, is_traced: bool = True) -> StepTime:
        """The time of launches, which take less in decode steps that are traced: all but the head of drafts are."""
        if self._launch_s is not None:
            return StepTime(launch_s=ops * self._launch_s)
        traced = is_decode and self._traced and is_traced
        return StepTime(launch_s=ops * (TRACED_LAUNCH_S if traced else UNTRACED_LAUNCH_S))


class _Lanes(NamedTuple):
    """The lanes of a decode step: `own` of the fullest chip, `padded` ones of each, and `tokens` of a row."""

    own: int
    padded: int
    tokens: int

    @classmethod
    def of(cls, users: int, lanes: int) -> "_Lanes":
        """The `users` of a row share its `lanes` evenly. With drafts, chips pad theirs as steps do."""
        own = ceil_div(ceil_div(users, GALAXY_COLUMNS) * lanes, users)
        if lanes == users:
            return cls(own, own, _tiles(users))
        padded = padded_lanes(own)
        return cls(own, padded, _tiles(padded * GALAXY_COLUMNS))


def _product(weight: ChipTensor, tokens: int, share: float = 1.0) -> StepTime:
    """The time of multiplying `tokens` by a weight, of which a `share` is needed."""
    return _bound(share * weight.bytes, 2 * share * tokens * weight.values)


def _bound(memory_bytes: float, flops: float) -> StepTime:
    memory_s = memory_bytes / (DRAM_BYTES_PER_S * DRAM_EFFICIENCY)
    compute_s = flops / (flops_per_s(MATMUL_FIDELITY) * MATMUL_EFFICIENCY)
    return StepTime(memory_s=memory_s) if memory_s >= compute_s else StepTime(compute_s=compute_s)


def _network(seconds: float) -> StepTime:
    return StepTime(network_s=seconds)


def _sum(times: Iterable[StepTime]) -> StepTime:
    total = StepTime()
    for time in times:
        total += time
    return total


def _tiles(tokens: int) -> int:
    """`tokens` rounded up to whole tiles, as products take them."""
    return round_up(tokens, TILE)
