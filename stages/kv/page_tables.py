"""The host's account of the paged KV cache: which blocks each slot holds."""

from collections.abc import Sequence

import torch

from stages.errors import StepError
from stages.options import DRAFTS_MAX, CacheOptions
from stages.step import Admission, BlockLoad, Mode, Segment, ShrunkSlot, Step


def sure_tokens(segment: Segment, mode: Mode) -> int:
    """The tokens of a slot that are cached for good with a segment: drafts may be rejected."""
    return segment.start + (1 if mode == "decode" else len(segment.tokens))


class Slot:
    """The blocks of one request in order, and the number of tokens cached in them.

    The first `shared` of these tokens were there at the admission, and are not written again; all but the first `sure`
    are drafts of the latest step, which may have been rejected.
    """

    def __init__(self, blocks: list[int], tokens: int) -> None:
        self.blocks = blocks
        self.tokens = self.sure = self.shared = tokens


class PageTables:
    """Page tables of all slots. Only steps change them, so they are the same on every stage of a pipeline.

    Several slots may hold a block that was full when they were admitted; one that is written has a single holder.
    """

    def __init__(self, options: CacheOptions) -> None:
        self.options = options
        self._slots: dict[int, Slot] = {}
        self._holders: list[dict[int, int]] = [{} for _ in range(options.pools)]
        # Unused entries point to the scratch block, a valid address for kernels that read whole tables.
        self._table = torch.full((options.slots, options.blocks_per_slot), self.scratch_block, dtype=torch.int32)

    @property
    def scratch_block(self) -> int:
        """The block that belongs to no slot."""
        return self.options.blocks

    def clear(self) -> None:
        """Forgets all slots, as at the start of an epoch."""
        for number in list(self._slots):
            self._release(number)

    def apply(self, step: Step) -> None:
        """Applies what slots give back, ends, admissions and new blocks, in this order; blocks to load have no holder.

        The end of a slot that is not held is not an error: its request may have been aborted before its first step.
        Raises StepError where the step contradicts what the slots hold.
        """
        for shrunk in step.shrunk:
            self._shrink(shrunk)
        for number in step.ended:
            self._check_number(number)
            self._release(number)
        for admission in step.admissions:
            self._admit(admission)
        numbers = [segment.slot for segment in step.segments]
        if len(set(numbers)) < len(numbers):
            raise StepError(f"Step {step.step_id} names a slot twice: {numbers}.")
        for segment in step.segments:
            self._extend(segment, step)
        for load in step.loads:
            self._check_load(load)

    def blocks(self, number: int) -> list[int]:
        """The blocks of a slot, in order. Raises StepError where it was not admitted."""
        return self._held(number).blocks

    def rows(self, numbers: Sequence[int], width: int) -> torch.Tensor:
        """Returns the first `width` blocks of each slot, int32 [slots, width]; scratch blocks for a slot of -1."""
        index = torch.tensor(numbers, dtype=torch.long)
        if min(numbers) >= 0:
            return self._table[index, :width]
        return self._table[index.clamp(min=0), :width].masked_fill((index < 0)[:, None], self.scratch_block)

    def _check_number(self, number: int) -> None:
        if not 0 <= number < self.options.slots:
            raise StepError(f"Slot {number} is not one of the {self.options.slots} slots.")

    def _admit(self, admission: Admission) -> None:
        number, cached = admission.slot, admission.cached
        self._check_number(number)
        self._release(number)
        if len(set(cached)) < len(cached) or len(cached) > self.options.blocks_per_slot:
            raise StepError(f"Slot {number} is admitted with blocks that no request can have: {cached}.")
        for block in cached:
            self._check_block(block)
        holders = self._holders[self.options.pool_of(number)]
        for block in cached:
            holders[block] = holders.get(block, 0) + 1
        self._table[number, : len(cached)] = torch.tensor(cached, dtype=torch.int32)
        self._slots[number] = Slot(cached.copy(), len(cached) * self.options.block_size)

    def _release(self, number: int) -> None:
        slot = self._slots.pop(number, None)
        if slot is not None:
            self._give_back(number, slot.blocks, 0)

    def _shrink(self, shrunk: ShrunkSlot) -> None:
        slot = self._held(shrunk.slot)
        if shrunk.blocks * self.options.block_size < slot.shared or shrunk.blocks >= len(slot.blocks):
            raise StepError(
                f"Slot {shrunk.slot} has {len(slot.blocks)} blocks, of which it cannot keep the first {shrunk.blocks}."
            )
        self._give_back(shrunk.slot, slot.blocks, shrunk.blocks)
        slot.tokens = min(slot.tokens, len(slot.blocks) * self.options.block_size)

    def _give_back(self, number: int, blocks: list[int], kept: int) -> None:
        holders = self._holders[self.options.pool_of(number)]
        for block in blocks[kept:]:
            holders[block] -= 1
            if not holders[block]:
                del holders[block]
        self._table[number, kept:] = self.scratch_block
        del blocks[kept:]

    def _held(self, number: int) -> Slot:
        slot = self._slots.get(number)
        if slot is None:
            raise StepError(f"Slot {number} was not admitted.")
        return slot

    def _extend(self, segment: Segment, step: Step) -> None:
        slot = self._held(segment.slot)
        self._check_position(segment, slot, step)
        self._take_blocks(segment, slot)
        end = segment.start + len(segment.tokens)
        if end > len(slot.blocks) * self.options.block_size:
            raise StepError(
                f"Slot {segment.slot} would hold {end} tokens, but its {len(slot.blocks)} blocks of "
                f"{self.options.block_size} hold {len(slot.blocks) * self.options.block_size}."
            )
        holders = self._holders[self.options.pool_of(segment.slot)]
        first, last = segment.start // self.options.block_size, (end - 1) // self.options.block_size
        if shared := [block for block in slot.blocks[first : last + 1] if holders[block] != 1]:
            raise StepError(f"Slot {segment.slot} writes block {shared[0]}, which another slot reads.")
        # Drafts that were accepted fill a block with the step after theirs.
        before, slot.sure = min(slot.sure, segment.start), sure_tokens(segment, step.mode)
        filled = slot.sure // self.options.block_size - before // self.options.block_size
        if len(segment.keys) not in {0, filled}:
            raise StepError(f"Slot {segment.slot} fills {filled} blocks, but has keys of {len(segment.keys)}.")
        slot.tokens = end

    def _check_position(self, segment: Segment, slot: Slot, step: Step) -> None:
        if not segment.tokens:
            raise StepError(f"The segment of slot {segment.slot} has no tokens.")
        if step.mode == "decode" and len(segment.tokens) > 1 + DRAFTS_MAX:
            raise StepError(
                f"Slot {segment.slot} decodes {len(segment.tokens)} tokens; a decode step takes one and at most "
                f"{DRAFTS_MAX} drafts."
            )
        if step.mode == "prefill" and segment.start % self.options.block_size:
            raise StepError(
                f"Slot {segment.slot} prefills from position {segment.start}, which is not a multiple of the block "
                f"size {self.options.block_size}."
            )
        if not slot.shared <= segment.start <= slot.tokens:
            raise StepError(
                f"Slot {segment.slot} has {slot.tokens} tokens cached; {slot.shared} of them for good; a segment "
                f"at position {segment.start} does not go on from there."
            )

    def _take_blocks(self, segment: Segment, slot: Slot) -> None:
        holders = self._holders[self.options.pool_of(segment.slot)]
        if len(slot.blocks) + len(segment.new_blocks) > self.options.blocks_per_slot:
            raise StepError(
                f"Slot {segment.slot} is given more than the {self.options.blocks_per_slot} blocks of the longest "
                "request."
            )
        for block in segment.new_blocks:
            self._check_block(block)
            if block in holders:
                raise StepError(f"Block {block} of slot {segment.slot} already belongs to another slot.")
            holders[block] = 1
            self._table[segment.slot, len(slot.blocks)] = block
            slot.blocks.append(block)

    def _check_load(self, load: BlockLoad) -> None:
        if not 0 <= load.pool < self.options.pools:
            raise StepError(f"Pool {load.pool} is not one of the {self.options.pools} pools.")
        self._check_block(load.block)
        if load.block in self._holders[load.pool]:
            raise StepError(f"Block {load.block} of pool {load.pool} is to be loaded, but belongs to a slot.")

    def _check_block(self, block: int) -> None:
        if not 0 <= block < self.options.blocks:
            raise StepError(f"Block {block} is not one of the {self.options.blocks} blocks of a pool.")
