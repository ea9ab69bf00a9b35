"""Owner of the cache's blocks."""


class BlockManager:
    """Hands out blocks of the paged cache and takes them back.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """Say whether :meth:`allocate` would succeed."""
        return self.blocks_for(num_tokens) <= self.num_free

    def allocate(self, num_tokens: int) -> list[int]:
        """Return blocks for that many tokens; the caller has asked :meth:`can_allocate`."""
        count = self.blocks_for(num_tokens)
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        """Take blocks back and empty the list."""
        self._free.extend(reversed(blocks))
        blocks.clear()
