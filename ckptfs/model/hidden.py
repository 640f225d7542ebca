"""Files that a layer has and no name shows, because another layer hides them: hard links may still lead to them.

Kept until all layers are there, since layers come in any order. By path: who asks for one has no time for the others.
"""

from ckptfs.model.toc import Inode


class Hidden:
    def __init__(self) -> None:
        self._found: dict[bytes, dict[int, Inode]] = {}

    def add(self, path: bytes, rank: int, inode: Inode) -> None:
        """Layer `rank` has this at `path`; the last one counts."""
        self._found.setdefault(path, {})[rank] = inode

    def at(self, path: bytes, rank: int) -> Inode | None:
        """What layer `rank` itself has."""
        return self._found.get(path, {}).get(rank)

    def below(self, path: bytes, rank: int) -> Inode | None:
        """What the highest of the layers below `rank` has."""
        found = self._found.get(path, {})
        highest = max((r for r in found if r < rank), default=None)
        return found[highest] if highest is not None else None

    def clear(self) -> None:
        self._found.clear()
