"""The host's account of the paged KV cache: which blocks each slot holds."""

from collections.abc import Sequence

import torch

from stages.errors import StepError
from stages.options import CacheOptions
from stages.step import Admission, Segment, Step


class Slot:
    """The blocks of one request in order, and the number of tokens cached in them."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.tokens = 0


class PageTables:
    """Page tables of all slots. Only steps change them, so they are the same on every stage of a pipeline."""

    def __init__(self, options: CacheOptions) -> None:
        self.options = options
        self._slots: dict[int, Slot] = {}
        self._owners: list[dict[int, int]] = [{} for _ in range(options.pools)]
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
        """Applies a step's ends, admissions and new blocks, in this order.

        The end of a slot that is not held is not an error: its request may have been aborted before its first step.
        Raises StepError where the step contradicts what the slots hold.
        """
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

    def rows(self, numbers: Sequence[int], width: int) -> torch.Tensor:
        """Returns the first `width` blocks of each slot, int32 [slots, width]; scratch blocks for a slot of -1."""
        index = torch.tensor(numbers, dtype=torch.long)
        rows = self._table[index.clamp(min=0), :width]
        return rows if min(numbers) >= 0 else rows.masked_fill((index < 0)[:, None], self.scratch_block)

    def _check_number(self, number: int) -> None:
        if not 0 <= number < self.options.slots:
            raise StepError(f"Slot {number} is not one of the {self.options.slots} slots.")

    def _admit(self, admission: Admission) -> None:
        self._check_number(admission.slot)
        self._release(admission.slot)
        self._slots[admission.slot] = Slot()

    def _release(self, number: int) -> None:
        slot = self._slots.pop(number, None)
        if slot is None:
            return
        owners = self._owners[self.options.pool_of(number)]
        for block in slot.blocks:
            del owners[block]
        self._table[number] = self.scratch_block

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
        slot.tokens = end

    def _check_position(self, segment: Segment, slot: Slot, step: Step) -> None:
        if not segment.tokens:
            raise StepError(f"The segment of slot {segment.slot} has no tokens.")
        if step.mode == "decode" and len(segment.tokens) != 1:
            raise StepError(f"Slot {segment.slot} decodes {len(segment.tokens)} tokens; a decode step takes one each.")
        if step.mode == "prefill" and segment.start % self.options.block_size:
            raise StepError(
                f"Slot {segment.slot} prefills from position {segment.start}, which is not a multiple of the block "
                f"size {self.options.block_size}."
            )
        if not 0 <= segment.start <= slot.tokens:
            raise StepError(
                f"Slot {segment.slot} has {slot.tokens} tokens cached; a segment at position {segment.start} leaves a "
                "gap."
            )

    def _take_blocks(self, segment: Segment, slot: Slot) -> None:
        owners = self._owners[self.options.pool_of(segment.slot)]
        if len(slot.blocks) + len(segment.new_blocks) > self.options.blocks_per_slot:
            raise StepError(
                f"Slot {segment.slot} is given more than the {self.options.blocks_per_slot} blocks of the longest "
                "request."
            )
        for block in segment.new_blocks:
            if not 0 <= block < self.options.blocks:
                raise StepError(f"Block {block} is not one of the {self.options.blocks} blocks of a pool.")
            if block in owners:
                raise StepError(f"Block {block} of slot {segment.slot} already belongs to slot {owners[block]}.")
            owners[block] = segment.slot
            self._table[segment.slot, len(slot.blocks)] = block
            slot.blocks.append(block)
