"""Drives a model and its multi-token-prediction layer on one mesh, without the stage and the sampler around them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stages.backend import set_float_dtype, ttnn
from stages.batch_builder import BatchBuilder
from stages.converted_weights import ConvertedWeights
from stages.kv.page_tables import PageTables
from stages.model_slice import Batch, DraftLayer, ModelSlice
from stages.models.registry import architecture_of
from stages.options import CacheOptions
from stages.plan import plan_stages
from stages.stage import close_mesh, open_mesh
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

    def __init__(
        self,
        model: Path,
        cache_dir: Path,
        mesh_shape: tuple[int, int] = (1, 1),
        *,
        length: int = 128,
        picks: bool = True,
    ) -> None:
        """`length` is that of the longest text, and `mesh_shape` is rows and columns.

        With `picks` the tokens that need logits, which are all, are picked before the head.
        """
        set_float_dtype(torch.float32)
        self.mesh = open_mesh(*mesh_shape, enable_trace=False)
        source = Checkpoint.open(model)
        self.config = source.config
        pools = mesh_shape[0] * mesh_shape[1]
        self._cache = cache_options(slots=4 * pools, pools=pools, max_model_len=length)
        self.model = load_slice(source, cache_dir, self.mesh, self._cache)
        self._picks = picks
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
        """Prefills the first `lengths` tokens of each slot's text, in chunks."""
        found: DraftLogits = {}
        for start in range(0, max(lengths.values()), chunk):
            segments = [
                self._segment(slot, text, start, min(start + chunk, lengths[slot]))
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
            self._segment(slot, texts[slot], at, at + 1) for slot, positions in places.items() for at in positions
        ]
        # Not applied to the tables: they hold all blocks already, and take each slot once.
        step = _step("decode", segments, [])
        return self._run(step, self._builder.decode(step), texts)

    def close(self) -> None:
        """Closes the mesh."""
        close_mesh(self.mesh)

    def _run(self, step: Step, batch: Batch, texts: Mapping[int, Sequence[int]]) -> "DraftLogits":
        tokens = [token for segment in step.segments for token in segment.tokens]
        hidden = self.model.forward(self.model.enter(self._builder.ids(batch.layout, tokens), batch), batch)
        shifted = [token for segment in step.segments for token in following(texts[segment.slot], segment)]
        ids = self._builder.ids(batch.layout, shifted)
        rows = iter(self._logits(self.draft.forward(hidden, ids, batch), batch, step.token_count))
        return {
            (segment.slot, segment.start + index): next(rows)
            for segment in step.segments
            for index in range(len(segment.tokens))
        }

    def _logits(self, x: ttnn.Tensor, batch: Batch, tokens: int) -> torch.Tensor:
        """[tokens, vocabulary]."""
        if not self._picks:
            return batch.layout.collect(self._on_host(self.draft.logits(x, batch, None)))
        indices, chosen = self._builder.logit_indices(batch.layout, range(tokens))
        return self._on_host(self.draft.logits(x, batch, indices))[chosen]

    def _on_host(self, logits: ttnn.Tensor) -> torch.Tensor:
        return self._modules.head.to_torch(logits, self.config, self.mesh)

    def _segment(self, slot: int, text: Sequence[int], start: int, end: int) -> Segment:
        """With the first one come all blocks that the slot will ever need, of a pool's in falling order."""
        per_slot = self._cache.blocks_per_slot
        first = slot // self._cache.pools * per_slot
        blocks = [] if start else list(range(first, first + per_slot))[::-1]
        return Segment(slot=slot, start=start, tokens=list(text[start:end]), new_blocks=blocks, sample=False)


DraftLogits = dict[tuple[int, int], torch.Tensor]
"""Logits [vocabulary] by slot and position: those of the token two places further on."""


def _step(mode: Mode, segments: list[Segment], admissions: list[Admission]) -> Step:
    return Step(epoch=1, step_id=1, mode=mode, segments=segments, admissions=admissions, ended=[])


def following(text: Sequence[int], segment: Segment) -> list[int]:
    """Returns the tokens that follow those of a segment, one further on each."""
    return list(text[segment.start + 1 : segment.start + 1 + len(segment.tokens)])
