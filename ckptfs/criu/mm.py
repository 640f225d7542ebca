"""A task's address space: mm-PID.img with its mappings (vma entries), its command line and its environment."""

from typing import NamedTuple

from ckptfs.criu.images import DEFAULT_LIMITS, only_record, records
from ckptfs.criu.wire import Message
from ckptfs.settings import Limits

# vma status bits that matter here (criu/include/image.h); they are part of the image format
REGULAR = 1 << 0
FILE_PRIVATE = 1 << 6
ANON_PRIVATE = 1 << 9
AIO_RING = 1 << 13
SHADOW_STACK = 1 << 15
PLUGIN = 1 << 27
# mmap(2) flags that matter here
MAP_SHARED = 0x01
MAP_ANONYMOUS = 0x20
MAP_GROWSDOWN = 0x100
MAP_HUGETLB = 0x40000


class Vma(NamedTuple):
    """One mapping [start, end). `shmid` is a shared memory id, or the id in files.img of a mapped file."""

    start: int
    end: int
    shmid: int
    flags: int
    status: int

    @property
    def private(self) -> bool:
        """Whether its pages are the task's own, and so in its pagemap."""
        own = self.status & REGULAR and self.status & (ANON_PRIVATE | FILE_PRIVATE)
        return bool(own or self.status & (SHADOW_STACK | AIO_RING))


class Mm(NamedTuple):
    """Addresses are virtual; `arguments` and `environment` are (start, end) of the strings that execve(2) left there.

    `executable` is the id in files.img of /proc/PID/exe.
    """

    arguments: tuple[int, int]
    environment: tuple[int, int]
    executable: int
    vmas: tuple[Vma, ...]


def parse_mm(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> Mm:
    m = only_record(data, "mm", name, limits)
    return Mm((m.uint(8), m.uint(9)), (m.uint(10), m.uint(11)), m.uint(12), tuple(_vma(v) for v in m.messages(14)))


def parse_vmas(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> tuple[Vma, ...]:
    """vmas-PID.img, where the mappings stood before they moved into mm-PID.img."""
    return tuple(_vma(record.message) for record in records(data, "vmas", name, limits))


def _vma(m: Message) -> Vma:
    return Vma(m.uint(1), m.uint(2), m.uint(4), m.uint(6), m.uint(7))
