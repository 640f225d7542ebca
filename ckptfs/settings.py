"""Limits of what comes from images and registries, timeouts and sizes, each with its reason.

What concerns one module only stands at its head: intervals between two looks, numbers that tune one algorithm, limits
of one format, bounds of files of this machine and of what comes in through our own sockets. Values cannot change:
commands make a `Settings` once and hand it down.

They are named tuples, as are all values that a mount needs at its start. Python compiles each method of a dataclass at
every start, which takes 0.4 ms for a frozen one and a full millisecond for `Limits`; a named tuple takes 0.1 to 0.2 ms.
Of a mount's 48 dataclasses it was 27 ms.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB


class Limits(NamedTuple):
    """What a hostile image or registry can make us hold or do; each is refused one past it."""

    manifest_bytes: int = 4 * MiB  # distribution-spec recommends that registries accept at least 4 MiB
    config_bytes: int = 8 * MiB
    error_body_bytes: int = 64 * KiB
    token_bytes: int = 64 * KiB
    toc_compressed_bytes: int = 50 * MiB  # containers/image refuses larger zstd:chunked manifests
    toc_bytes: int = 256 * MiB
    toc_entries: int = 4_000_000
    kept_chunks: int = 1_000_000  # of a layer that a node remembers: 256 GiB of plain tar, 16 s to write down
    layers: int = 256
    image_bytes: int = 1 << 40  # all layers as they are stored: four million chunks if they are plain tar
    path_bytes: int = 4096  # PATH_MAX
    name_bytes: int = 255  # NAME_MAX
    path_depth: int = 256
    path_links: int = 40  # symbolic links on the way of one path: MAXSYMLINKS
    xattr_bytes: int = 64 * KiB  # XATTR_SIZE_MAX
    pax_header_bytes: int = 1 * MiB
    file_bytes: int = 1 << 62
    chunk_bytes: int = 64 * MiB  # largest verify-and-decode unit that is accepted
    zstd_window_bytes: int = 128 * MiB
    redirects: int = 5
    referrer_pages: int = 64  # of a list of what is attached to an image; registries put 50 to 100 on one
    index_depth: int = (
        3  # documents from a name to its image: an index of indexes is legal, a chain of them is an attack
    )
    profile_bytes: int = 4 * MiB
    profile_runs: int = 100_000  # scattered pages of a working set of 400 MB
    criu_image_bytes: int = 64 * MiB  # a CRIU image that is read whole: the pagemap of 3 million separate runs
    criu_record_bytes: int = 16 * MiB  # mm of a process with 65530 mappings (vm.max_map_count) is 4 MB
    criu_records: int = 4_000_000
    increments: int = 8  # checkpoints that one restore reads: `push --parent` writes a whole one after so many
    pre_dumps: int = 64  # checkpoints that CRIU's `parent` links lead through, one after another
    increment_bytes: int = 256 * MiB  # all pagemaps of a checkpoint and of those that it stands on
    process_depth: int = 256  # generations in a process tree
    deleted_files_bytes: int = 64 * MiB  # a list of a million paths; real ones have a few hundred
    dump_bytes: int = 16 * MiB  # config.dump, spec.dump and their like
    argument_bytes: int = 256 * KiB  # of a process's command line or environment; more is shown cut


class Timeouts(NamedTuple):
    """Seconds. A read that the kernel waits for ends after `read_deadline`, with data or with EIO."""

    connect: float = 3.0
    first_byte: float = 5.0
    hedge: float = 1.0  # a host that used to answer sooner and does not: ask on another connection or at a mirror
    mirror_fill: float = 15.0  # until a pull-through mirror that is still fetching a blob serves ranges of it
    commit: float = 120.0  # first byte after an upload: registries hash and move the whole blob before they answer
    stall_bytes: int = 32 * KiB  # fewer than this in `stall_window` means that the connection is dead
    stall_window: float = 5.0
    read_deadline: float = 60.0
    resolve_deadline: float = 30.0
    side_documents: float = 5.0  # until an image is opened without whatever index it may have
    retry_first: float = 0.25
    retry_factor: float = 2.0
    retry_cap: float = 3.0
    retry_jitter: float = 0.1
    tries_per_host: int = 5
    drain: float = 5.0
    mount_ready: float = 30.0
    daemon: float = 10.0  # until a mount's daemon that says nothing to `status` or `umount` is taken for dead
    daemon_end: float = 15.0  # until one that was asked to end is left alone or killed: it drains for 5
    lazy_daemon: float = 10.0  # until `criu lazy-pages` takes connections
    stop: float = 10.0  # between the stop signal and SIGKILL for a restored container, as podman and docker wait
    old_log: float = 7 * 86400.0  # what a mount that has crashed said is kept for that long
    tool: float = 60.0  # for a tool that only asks something: criu check, podman image mount


class Sizes(NamedTuple):
    """Bytes, unless said otherwise."""

    grid: int = 256 * KiB  # decode unit of layers without chunks of their own: plain tar, gzip, zstd
    gzip_grid: int = 1 * MiB  # the same for gzip, whose index has a window of 32 KiB for each
    toc_guess: int = 256 * KiB  # read at first from the end of an eStargz blob: footer and, mostly, the whole table
    random_extent: int = 1 * MiB  # most that one random miss fetches
    sequential_extent: int = 4 * MiB  # docker-registry reads 4 MiB of the blob for every range, however small
    coalesce_gap: int = 64 * KiB  # unwanted bytes that are cheaper to fetch than another request
    in_flight: int = 32 * MiB
    jobs: int = 8  # extents fetched at the same time
    background_jobs: int = 4
    memory_cache: int = 32 * MiB  # the kernel keeps what has been read; this is for what will be
    disk_cache: int = 10 * GiB
    segment: int = 64 * MiB
    read_ahead: int = 4 * MiB  # kernel read-ahead: 128 KiB makes a plain restore 10x slower at 20 ms (docs)
    max_background: int = 256
    small_file: int = 64 * KiB  # beside CRIU's images, files up to this size are metadata: fetched together and first


class Registries(NamedTuple):
    """What the user has set for registries by name: host[:port] as in references.

    plain_http    these speak http.
    mirrors       registry -> where else its images can be had, host[:port] or an http(s) URL, the best first.
    mirror_tags   these mirrors also say which image a tag is; otherwise only the registry itself does.
    system_files  read what podman and containerd have configured on this machine, too.
    """

    plain_http: frozenset[str] = frozenset()
    mirrors: Mapping[str, tuple[str, ...]] = {}
    mirror_tags: bool = False
    system_files: bool = False


class Settings(NamedTuple):
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    sizes: Sizes = Sizes()
    registries: Registries = Registries()


def default_cache_dir() -> Path:
    """The node's cache: /var/cache/ckptfs for root, $XDG_CACHE_HOME/ckptfs for others."""
    if _is_root():
        return Path("/var/cache/ckptfs")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # A user that passwd(5) does not know has no home, in containers mostly: "~" would be a name in this directory
    return Path(base) / "ckptfs" if not base.startswith("~") else Path(f"/var/tmp/ckptfs-{os.geteuid()}")


def runtime_dir() -> Path:
    """Where mounts keep their control sockets and state: /run/ckptfs, or $XDG_RUNTIME_DIR/ckptfs."""
    if _is_root():
        return Path("/run/ckptfs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "ckptfs" if base else Path(f"/tmp/ckptfs-{os.geteuid()}")


def _is_root() -> bool:
    """Whether the system's directories are ours: not those of a user who is root in a namespace (`podman unshare`)."""
    if os.geteuid() != 0 or "XDG_RUNTIME_DIR" not in os.environ:
        return os.geteuid() == 0
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        inside, outside, _ = lines.readline().split()  # user_namespaces(7)
    return inside != "0" or outside == "0"


def state_dir() -> Path:
    """Where restored containers keep what they write: /var/lib/ckptfs, a real disk; overlay cannot use all others."""
    return Path("/var/lib/ckptfs")
