"""The split of layers into stages: a pure function of the model's size and the number of stages."""

from collections.abc import Sequence

import msgspec

from stages.errors import PlanError
from stages.models.registry import architecture_of
from weights.model_config import ModelConfig


class StageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline stage: the layers [first_layer, end_layer), the embedding at the front, the head at the end."""

    index: int
    stages: int
    first_layer: int
    end_layer: int

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds token ids."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the final norm, the head, the sampler and the layer that makes drafts."""
        return self.index == self.stages - 1

    @property
    def layers(self) -> range:
        """The decoder layers of this stage."""
        return range(self.first_layer, self.end_layer)


def plan_stages(config: ModelConfig, stages: int, *, drafts: int = 0) -> list[StageSpec]:
    """Splits the layers into contiguous ranges so that the most expensive stage is as cheap as possible.

    Cost is the number of weights that a decode step of one token reads: what bounds a small batch. The last stage also
    makes so many `drafts` of each step, one pass after the other. Raises PlanError unless 1 <= stages <= layers, and as
    `check_drafts` does.
    """
    check_stages(config, stages)
    check_drafts(config, drafts)
    architecture = architecture_of(config)
    costs = [architecture.layer_cost(config, layer) for layer in range(config.num_hidden_layers)]
    costs[-1] += config.vocab_size * config.hidden_size
    if drafts:
        costs[-1] += drafts * architecture.draft_cost(config)
    return _specs(balanced_split(costs, stages))


NO_DRAFT_LAYER = "The model has no multi-token-prediction layer: leave out --num-speculative-tokens."


def check_drafts(config: ModelConfig, drafts: int) -> None:
    """Raises PlanError where drafts are asked for of a model without a multi-token-prediction layer."""
    if drafts and not config.num_nextn_predict_layers:
        raise PlanError(NO_DRAFT_LAYER)


def check_stages(config: ModelConfig, stages: int) -> None:
    """Raises PlanError unless 1 <= stages <= layers."""
    layers = config.num_hidden_layers
    if not 1 <= stages <= layers:
        raise PlanError(f"Cannot split {layers} layers into {stages} stages: choose between 1 and {layers} stages.")


def default_microbatches(stages: int) -> int:
    """Returns the number of microbatches in flight: one more than stages, so that none waits for the way back.

    A single stage has one, because half the batch would take as much time as the whole.
    """
    return stages + 1 if stages > 1 else 1


def explicit_stages(config: ModelConfig, layers_per_stage: Sequence[int]) -> list[StageSpec]:
    """Returns one stage for each entry, of that many layers.

    Raises PlanError unless every entry is positive and they add up to the model's layers.
    """
    total = sum(layers_per_stage)
    if not layers_per_stage or min(layers_per_stage) < 1 or total != config.num_hidden_layers:
        raise PlanError(
            f"The split {','.join(map(str, layers_per_stage))} holds {total} layers; give every stage at least one, "
            f"and {config.num_hidden_layers} in all."
        )
    return _specs(layers_per_stage)


def balanced_split(costs: Sequence[int], parts: int) -> list[int]:
    """Returns the sizes of `parts` contiguous, non-empty runs of `costs` whose most expensive run is the cheapest.

    The linear partition problem by dynamic programming (Skiena, The Algorithm Design Manual, 8.5).
    """
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)
    count = len(costs)
    # worst[p][n]: the most expensive run when the first n costs form p runs; cut[p][n]: where its last run begins.
    worst = [[0] * (count + 1) for _ in range(parts + 1)]
    cut = [[0] * (count + 1) for _ in range(parts + 1)]
    worst[1] = list(before)
    for part in range(2, parts + 1):
        for end in range(part, count + 1):
            worst[part][end], cut[part][end] = min(
                (max(worst[part - 1][begin], before[end] - before[begin]), begin) for begin in range(part - 1, end)
            )
    sizes = []
    end = count
    for part in range(parts, 0, -1):
        begin = cut[part][end]
        sizes.append(end - begin)
        end = begin
    return sizes[::-1]


def _specs(sizes: Sequence[int]) -> list[StageSpec]:
    specs = []
    first = 0
    for index, size in enumerate(sizes):
        specs.append(StageSpec(index=index, stages=len(sizes), first_layer=first, end_layer=first + size))
        first += size
    return specs
