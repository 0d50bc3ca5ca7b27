"""The free blocks of one pool of the KV cache."""


class BlockPool:
    """Hands out block ids 0 .. blocks - 1, each to one owner at a time. The last one given back is the next to go."""

    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many blocks can be taken now."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks. Raises ValueError if fewer are free: callers look at `free` first."""
        kept = len(self._free) - count
        if kept < 0:
            raise ValueError(f"{count} blocks were asked of a pool that has {len(self._free)} free.")
        taken = self._free[kept:]
        del self._free[kept:]
        taken.reverse()
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Frees blocks that `take` handed out."""
        self._free.extend(reversed(blocks))
