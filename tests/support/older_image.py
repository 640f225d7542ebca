"""An image that a ckptfs of before BLAKE3 pushed, with SHA-256 in its index, and the checkpoint that it was made of.

tests/data/older/sha256-index.oci is what commit 8599277 made of `older_checkpoint`; no later one can make it again.
"""

from pathlib import Path

from tests.support.criu_images import image, mm, pagemap, task, vma
from tests.support.push import DATA

OLDER = DATA / "older/sha256-index.oci"
PAGE = 4096
PAGES = 600  # in several chunks, and cells of four pages
_START = 0x10000


def older_checkpoint(folder: Path, changed: range = range(0)) -> Path:
    """A process with 600 pages of memory, each its own; those in `changed` are others than in the image."""
    images = folder / "checkpoint"
    images.mkdir(parents=True)
    memory = b"".join(
        (b"%s page %d." % (b"new" if n in changed else b"old", n)).ljust(PAGE, b"-") for n in range(PAGES)
    )
    (images / "inventory.img").write_bytes(image("inventory", {1: 1, 3: 1}))
    (images / "pstree.img").write_bytes(image("pstree", task(5)))
    (images / "core-5.img").write_bytes(image("core", {1: 1, 3: {1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: "main"}}))
    (images / "ids-5.img").write_bytes(image("ids", {1: 1, 2: 1, 3: 1, 4: 1}))
    (images / "mm-5.img").write_bytes(mm(vma(_START, _START + len(memory))))
    (images / "pagemap-5.img").write_bytes(pagemap(1, (_START, PAGES, 4)))
    (images / "pages-1.img").write_bytes(memory)
    return folder
