"""Owner of the cache's blocks: who holds which, and whose contents can be found again.

A full block is named by a key that stands for the adapter and all token ids up to its end, so that
equal beginnings of prompts are computed once (automatic prefix caching, as in vLLM). A block that
nobody holds any more keeps its contents until its place is needed; the one that was used longest
ago goes first.
"""

import hashlib
import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

# Clients choose token ids: without a secret they could look for two prompts of one key.
_SECRET = secrets.token_bytes(16)


def block_key(before: bytes, ids: Sequence[int]) -> bytes:
    """Return the key of a block from that of the block before it and its own token ids.

    Before the first block is what else its contents depend on: an adapter's key, or nothing.
    """
    content = np.asarray(ids, np.int64).tobytes()
    return hashlib.blake2b(before + content, digest_size=16, key=_SECRET).digest()


class BlockManager:
    """Hands out blocks of the paged cache, counts who holds them, and takes them back.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._empty = list(range(num_blocks - 1, -1, -1))
        # Published and held by nobody; the one that was used longest ago first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._empty) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def cached(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest beginning of ``keys`` whose contents are there."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_taken_by(self, blocks: Iterable[int]) -> int:
        """Return how many fewer blocks would be free if these were held."""
        return sum(block in self._idle for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Share blocks that :meth:`cached` returned."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Return that many blocks without contents; the caller has asked :attr:`num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a full block; the first of several with the same contents is found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, blocks: Iterable[int]) -> list[int]:
        """Let nobody find these blocks any more; return those that one sequence alone holds."""
        blocks = list(blocks)
        for block in blocks:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]
        return [block for block in blocks if self._holders[block] == 1]

    def free(self, blocks: "list[int] | array[int]") -> None:
        """Give up blocks, of which none stay there; the last ones lose their contents first."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is freed and nobody holds it"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._empty.append(block)
        del blocks[:]

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Compare the books with what sequences hold; for tests.

        Raises:
            AssertionError: a block that is lost, free twice, free and held, or held by others than
                the books say.
        """
        holders = Counter(block for blocks in held for block in blocks)
        assert holders == self._holders, f"held: {holders}, in the books: {self._holders}"
        places = Counter([*self._empty, *self._idle, *self._holders])
        assert places == Counter(range(self.num_blocks)), "a block is lost or in two places"
        assert self._block_of == {key: block for block, key in self._key_of.items()}
        assert not any(block in self._key_of for block in self._empty)
        assert all(block in self._key_of for block in self._idle)
