"""CRIU's plan in chunks of a tree: what is fetched before a restore asks, for checkpoints on top of others too."""

import stat
from collections.abc import Mapping

from ckptfs.criu.pagemap import LAZY, PARENT, PRESENT
from ckptfs.model.toc import Chunk, Entry, Extent, Inode
from ckptfs.model.tree import Tree
from ckptfs.prefetch.restore_order import RestoreOrder
from ckptfs.settings import Limits
from tests.support.criu_images import image, mm, pagemap, task, vma

P = 4096
EAGER, LAZILY = PRESENT, PRESENT | LAZY
LINK = b"../pre-checkpoint"


def test_an_increment_needs_at_once_what_its_parent_has() -> None:
    """Its own page and the parent's that are not lazy, and of what comes later only the beginning."""
    own = pagemap(1, (0x1000, 2, PARENT), (0x10000, 1, EAGER), (0x100000, 400, PARENT | LAZY))
    files = {
        "checkpoint/pages-1.img": P,
        "pre-checkpoint/pagemap-5.img": pagemap(1, (0x1000, 2, EAGER), (0x100000, 400, LAZILY)),
        "pre-checkpoint/pages-1.img": 402 * P,
    }
    wanted = order(files, own, eager_only=True)
    assert wanted[:3] == ["checkpoint/pages-1.img 0", "pre-checkpoint/pages-1.img 0", "pre-checkpoint/pages-1.img 1"]
    assert len(wanted) == 3 + 64
    assert len(set(order(files, own, eager_only=False))) == 1 + 402


def test_a_parent_s_parent() -> None:
    files = {
        "checkpoint/pages-1.img": 0,
        "pre-checkpoint/pagemap-5.img": pagemap(1, (0x1000, 1, PARENT), (0x2000, 1, EAGER)),
        "pre-checkpoint/pages-1.img": P,
        "first/pagemap-5.img": pagemap(4, (0x1000, 1, EAGER)),
        "first/pages-4.img": P,
    }
    wanted = order(files, pagemap(1, (0x1000, 2, PARENT)), eager_only=True, links={"pre-checkpoint": b"../first"})
    assert sorted(wanted) == ["first/pages-4.img 0", "pre-checkpoint/pages-1.img 0"]


def test_links_that_lead_round_and_nowhere() -> None:
    files = {"checkpoint/pages-1.img": P, "pre-checkpoint/pagemap-5.img": pagemap(1, (0x1000, 1, PARENT))}
    own = pagemap(1, (0x1000, 1, PARENT), (0x2000, 1, EAGER))
    for target in (b"../checkpoint", b"../../../nowhere", b"."):
        assert order(files, own, eager_only=True, links={"pre-checkpoint": target}) == ["checkpoint/pages-1.img 0"]


def order(
    files: Mapping[str, bytes | int], own: bytes, *, eager_only: bool, links: Mapping[str, bytes] | None = None
) -> list[str]:
    """`FILE PAGE` of each chunk: one for each page. `files`: bytes, or the size of a pages file; `own`: the pagemap."""
    contents: dict[str, bytes | int] = {
        "checkpoint/inventory.img": b"",
        "checkpoint/pstree.img": image("pstree", task(5)),
        "checkpoint/mm-5.img": mm(vma(0x1000, 0x9000), vma(0x100000, 0x100000 + 400 * P)),
        "checkpoint/pagemap-5.img": own,
        **files,
    }
    known: dict[int, bytes] = {}
    entries = []
    for path, content in contents.items():
        size = content if isinstance(content, int) else len(content)
        chunks = [Chunk(f"{path} {n}".encode(), 0, 0, 99999, P, bytes(32)) for n in range(size // P)]
        extents = [Extent(n * P, P, chunk) for n, chunk in enumerate(chunks)]
        inode = Inode(stat.S_IFREG | 0o600, size=size, extents=tuple(extents))
        if isinstance(content, bytes):
            known[id(inode)] = content
        entries.append(Entry(path.encode(), inode))
    for directory, target in {"checkpoint": LINK, **(links or {})}.items():
        entries.append(Entry(f"{directory}/parent".encode(), Inode(stat.S_IFLNK | 0o777, target=target)))
    tree = Tree()
    tree.begin(1)
    tree.add(entries, 1)
    tree.finish(1)
    made = RestoreOrder(lambda inode: known.get(id(inode)), Limits(), eager_only=eager_only)
    return [chunk.key.decode() for chunk in made.plan(tree)]
