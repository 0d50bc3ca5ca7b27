"""The blocks of one pool: who holds them, and what those that are full can be found by."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """The blocks of one pool, with ids from 0 to blocks - 1.

    A full block may have a key, by which it is found as long as it is not taken for something else: of the free blocks
    those without a key are taken first, then the ones that were freed first. A key counts as sure once it was
    confirmed, and is forgotten with the epoch otherwise; in a new epoch it has to be checked before it is relied on.
    """

    def __init__(self, blocks: int, on_taken: Callable[[bytes], None] = lambda _: None) -> None:
        """`on_taken` is called with each sure key whose block is taken for something else."""
        self._on_taken = on_taken
        self._holders = [0] * blocks
        self._keys: list[bytes | None] = [None] * blocks
        self._blocks: dict[bytes, int] = {}
        self._empty = list(range(blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._unsure: set[int] = set()
        self._unchecked: set[int] = set()

    @property
    def free(self) -> int:
        """The number of blocks that nobody holds."""
        return len(self._empty) + len(self._kept)

    @property
    def free_ids(self) -> list[int]:
        """The blocks that nobody holds, in no particular order."""
        return [*self._empty, *self._kept]

    @property
    def holders(self) -> list[int]:
        """How many requests hold each block."""
        return self._holders.copy()

    @property
    def findable(self) -> int:
        """The number of blocks that have a key."""
        return len(self._blocks)

    def find(self, key: bytes) -> int | None:
        """The block that has the key; None without one."""
        return self._blocks.get(key)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, up to the first that no block has."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def fits(self, shared: Sequence[int], needed: int) -> bool:
        """Whether a request gets `needed` blocks, of which it shares those found."""
        idle = sum([not self._holders[block] for block in shared])
        return self.free - idle >= needed - len(shared)

    def is_held(self, block: int) -> bool:
        """Whether a request holds the block."""
        return self._holders[block] > 0

    def is_checked(self, block: int) -> bool:
        """Whether the block was found, or filled, in this epoch."""
        return block not in self._unchecked

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that were found."""
        for block in blocks:
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Takes `count` free blocks, whose keys end. Raises ValueError if fewer are free: callers look before."""
        if count > self.free:
            raise ValueError(f"{count} blocks were asked of a pool that has {self.free} free.")
        taken = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                self._give_up(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Takes a holder from each block. The last ones of a request are taken for something else before the first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._put_back(block)

    def publish(self, block: int, key: bytes) -> None:
        """Gives a block that is held a key, unless another block has it."""
        if key not in self._blocks:
            self._drop_key(block)
            self._blocks[key] = block
            self._keys[block] = key
            self._unsure.add(block)

    def confirm(self, block: int, key: bytes) -> None:
        """Notes that the step that filled the block is back from all stages; nothing where the key is gone."""
        if self._keys[block] == key:
            self._unsure.discard(block)

    def check(self, block: int) -> None:
        """Notes that every stage has the block."""
        self._unchecked.discard(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Ends the keys of blocks, whoever holds them."""
        for block in blocks:
            if self._keys[block] is not None:
                self._drop_key(block)
                if not self._holders[block]:
                    del self._kept[block]
                    self._empty.append(block)

    def forget_all(self) -> None:
        """Ends all keys."""
        self.forget(list(self._blocks.values()))

    def begin_epoch(self) -> None:
        """Frees every block. Keys that are sure stay, of blocks to be checked; those of blocks that were held last."""
        self.forget(list(self._unsure))
        held = [block for block, holders in enumerate(self._holders) if holders]
        for block in held:
            self._holders[block] = 0
            self._put_back(block)
        self._unchecked = set(self._blocks.values())

    def _give_up(self, block: int) -> None:
        key = self._keys[block]
        if key is not None and block not in self._unsure:
            self._on_taken(key)
        self._drop_key(block)

    def _put_back(self, block: int) -> None:
        if self._keys[block] is None:
            self._empty.append(block)
        else:
            self._kept[block] = None

    def _drop_key(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._blocks[key]
            self._keys[block] = None
            self._unsure.discard(block)
            self._unchecked.discard(block)
