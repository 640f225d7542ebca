"""What to fetch before it is asked for, as plans: iterators of chunks in the order in which they will be wanted.

A policy looks at the finished tree only; the engine fetches. A new policy is one module and one line in image/.
"""

from collections.abc import Iterator
from typing import Protocol

from ckptfs.model.toc import Chunk
from ckptfs.model.tree import Tree


class PrefetchPolicy(Protocol):
    def plan(self, tree: Tree) -> Iterator[Chunk]:
        """Chunks in the order of their use; one may come twice."""
