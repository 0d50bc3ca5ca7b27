"""Drives a model and its multi-token-prediction layer on one mesh, without the stage and the sampler around them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stages.backend import set_float_dtype, ttnn
from stages.batch import BatchBuilder
from stages.converted_weights import ConvertedWeights
from stages.kv.page_tables import PageTables
from stages.model_slice import Batch, DraftLayer, ModelSlice
from stages.models.registry import architecture_of
from stages.options import CacheOptions
from stages.plan import plan_stages
from stages.step import Admission, Mode, Segment, Step
from tests.support.stage_driver import GREEDY, cache_options
from weights.cache.cache import WeightCache
from weights.checkpoint import Checkpoint
from weights.source import WeightSource


def load_slice(
    source: WeightSource,
    cache_dir: Path,
    mesh: ttnn.MeshDevice,
    cache: CacheOptions,
    *,
    stages: int = 1,
    drafts: bool = True,
) -> ModelSlice:
    """Loads the last of `stages`."""
    weights = ConvertedWeights(source, WeightCache(cache_dir), "float32", mesh)
    last = plan_stages(source.config, stages)[-1]
    return ModelSlice.load(last, weights, cache, lambda _done, _of: None, drafts=drafts)


class DraftDriver:
    """A model on a mesh, whose hidden states and the tokens of given texts go through the layer that drafts."""

    def __init__(self, model: Path, cache_dir: Path, mesh_shape: tuple[int, int] = (1, 1), length: int = 128) -> None:
        """`length` is that of the longest text, and `mesh_shape` is rows and columns."""
        set_float_dtype(torch.float32)
        self.mesh = ttnn.open_mesh_device(ttnn.MeshShape(*mesh_shape))
        source = Checkpoint.open(model)
        self.config = source.config
        pools = mesh_shape[0] * mesh_shape[1]
        self._cache = cache_options(slots=4 * pools, pools=pools, max_model_len=length)
        self.model = load_slice(source, cache_dir, self.mesh, self._cache)
        self._modules = architecture_of(self.config).load_modules()
        rope = self._modules.rope_tables(self.config, self.mesh, self._cache.blocks_per_slot * self._cache.block_size)
        self._tables = PageTables(self._cache)
        self._builder = BatchBuilder(self.config, self.mesh, self._tables, rope)

    @property
    def draft(self) -> DraftLayer:
        """The layer that drafts."""
        assert self.model.draft is not None
        return self.model.draft

    def prefill(self, texts: Mapping[int, Sequence[int]], lengths: Mapping[int, int], chunk: int) -> "DraftLogits":
        """Prefills the first `lengths` tokens of each slot's text, in chunks; the logits of the second tokens."""
        blocks = self._cache.blocks_per_slot
        found: DraftLogits = {}
        for start in range(0, max(lengths.values()), chunk):
            segments = [
                Segment(
                    slot=slot,
                    start=start,
                    tokens=list(text[start : min(start + chunk, lengths[slot])]),
                    # All that the slot will ever need, of a pool's blocks in falling order.
                    new_blocks=list(
                        reversed(range(slot // self._cache.pools * blocks, (slot // self._cache.pools + 1) * blocks))
                    )
                    if start == 0
                    else [],
                    sample=False,
                )
                for slot, text in texts.items()
                if start < lengths[slot]
            ]
            admissions = [] if start else [Admission(slot=slot, sampling=GREEDY) for slot in texts]
            step = _step("prefill", segments, admissions)
            self._tables.apply(step)
            found |= self._run(step, self._builder.prefill(step), texts)
        return found

    def decode(self, texts: Mapping[int, Sequence[int]], places: Mapping[int, range]) -> "DraftLogits":
        """One step with a lane for each position of `places`, which follow those that are cached."""
        segments = [
            Segment(slot=slot, start=at, tokens=[texts[slot][at]], new_blocks=[], sample=False)
            for slot, positions in places.items()
            for at in positions
        ]
        # Not applied to the tables: they hold all blocks, and take each slot once.
        step = _step("decode", segments, [])
        return self._run(step, self._builder.decode(step), texts)

    def close(self) -> None:
        """Closes the mesh."""
        ttnn.close_mesh_device(self.mesh)

    def _run(self, step: Step, batch: Batch, texts: Mapping[int, Sequence[int]]) -> "DraftLogits":
        tokens = [token for segment in step.segments for token in segment.tokens]
        hidden = self.model.forward(self.model.enter(self._builder.ids(batch.layout, tokens), batch), batch)
        following = [token for segment in step.segments for token in _following(texts[segment.slot], segment)]
        ids = self._builder.ids(batch.layout, following)
        logits = self.draft.logits(self.draft.forward(hidden, ids, batch), batch, None)
        rows = iter(batch.layout.collect(self._modules.head.to_torch(logits, self.config, self.mesh)))
        return {
            (segment.slot, segment.start + index): next(rows)
            for segment in step.segments
            for index in range(len(segment.tokens))
        }


DraftLogits = dict[tuple[int, int], torch.Tensor]
"""Logits [vocabulary] by slot and position: those of the token two places further on."""


def _step(mode: Mode, segments: list[Segment], admissions: list[Admission]) -> Step:
    return Step(epoch=1, step_id=1, mode=mode, segments=segments, admissions=admissions, ended=[])


def _following(text: Sequence[int], segment: Segment) -> Sequence[int]:
    return text[segment.start + 1 : segment.start + 1 + len(segment.tokens)]
