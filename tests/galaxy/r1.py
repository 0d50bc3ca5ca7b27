"""DeepSeek-R1 on meshes: its config, KV cache options, and a prefill and a decode step that fill a mesh."""

import dataclasses

import torch

from stages.backend import ttnn
from stages.batch import DecodeBatch, PrefillBatch
from stages.batch_builder import BatchBuilder
from stages.kv.page_tables import PageTables
from stages.models.deepseek_v3.rope import rope_tables
from stages.options import CacheOptions
from stages.step import Admission, Mode, Segment, Step
from tests.support.checkpoints import config_keys
from tests.support.plans import R1 as SIZES
from tests.support.stage_driver import GREEDY
from weights.model_config import ModelConfig

KEYS = config_keys(SIZES)
R1 = ModelConfig.from_dict(KEYS, source="R1")
COLUMNS = 8
USERS_PER_ROW = 32
CONTEXT = 4096
BLOCK_SIZE = 32
PROMPT = 128


def r1_cache(rows: int, microbatches: int = 1) -> CacheOptions:
    """Options of a KV cache for 32 users a row and microbatch, each at the greatest length."""
    slots, pools = USERS_PER_ROW * rows * microbatches, rows * COLUMNS
    blocks = CONTEXT // BLOCK_SIZE * (slots // pools)
    return CacheOptions(slots=slots, pools=pools, blocks=blocks, block_size=BLOCK_SIZE, max_model_len=CONTEXT)


def admissions(cache: CacheOptions) -> list[Admission]:
    """Admissions of a request for every slot."""
    return [Admission(slot=slot, sampling=GREEDY) for slot in range(cache.slots)]


def segments(cache: CacheOptions, slots: range, start: int, length: int) -> list[Segment]:
    """Returns segments of `length` tokens, one a slot; slots of a pool hold blocks that lie apart, in falling order."""
    per_slot = cache.blocks_per_slot
    blocks = range(-(-start // BLOCK_SIZE), -(-(start + length) // BLOCK_SIZE))
    return [
        Segment(
            slot=slot,
            start=start,
            tokens=[1] * length,
            new_blocks=[(slot // cache.pools + 1) * per_slot - 1 - block for block in blocks],
            sample=True,
        )
        for slot in slots
    ]


def step(mode: Mode, parts: list[Segment], *, step_id: int = 1, admitted: list[Admission] | None = None) -> Step:
    """Makes a step of epoch 1."""
    return Step(epoch=1, step_id=step_id, mode=mode, segments=parts, admissions=admitted or [], ended=[])


@dataclasses.dataclass(frozen=True)
class FullSteps:
    """Makes a prefill step of one prompt for every pool, and a decode step of 32 users for every row."""

    mesh: ttnn.MeshDevice
    cache: CacheOptions
    builder: BatchBuilder
    prefill_step: Step
    prefill: PrefillBatch
    decode_step: Step
    decode: DecodeBatch

    @classmethod
    def on(cls, mesh: ttnn.MeshDevice) -> "FullSteps":
        """Puts the inputs of both steps on a mesh."""
        cache = r1_cache(mesh.shape[0])
        tables = PageTables(cache)
        builder = BatchBuilder(R1, mesh, tables, rope_tables(R1, mesh, CONTEXT))
        first = range(cache.pools)
        prefill_step = step("prefill", segments(cache, first, 0, PROMPT), admitted=admissions(cache))
        tables.apply(prefill_step)
        prefill = builder.prefill(prefill_step)
        parts = segments(cache, first, PROMPT, 1) + segments(cache, range(cache.pools, cache.slots), 0, 1)
        decode_step = step("decode", parts, step_id=2)
        tables.apply(decode_step)
        return cls(mesh, cache, builder, prefill_step, prefill, decode_step, builder.decode(decode_step))

    def batch(self, mode: Mode) -> PrefillBatch | DecodeBatch:
        """The inputs of the step of a mode."""
        return self.prefill if mode == "prefill" else self.decode

    def hidden(self, mode: Mode) -> ttnn.Tensor:
        """The input of a layer in that mode, [1, 1, tokens of a row, hidden / columns] on each chip."""
        hidden = torch.zeros(len(self.batch(mode).layout.places()), R1.hidden_size, dtype=torch.bfloat16)
        return self.builder.hidden(self.batch(mode).layout, hidden)
