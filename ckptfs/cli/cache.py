"""ckptfs cache: the node's cache seen from outside. What it holds, whether it is sound, less of it, or all of an image.

Only `warm` reads contents and needs the cache's key; the others keep house in a directory that mounts use meanwhile.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptfs.cli.options import (
    ByteSize,
    F,
    cache_dir_option,
    config_option,
    configure_logging,
    current_configuration,
    reference_argument,
    registry_options,
    verbosity_options,
    verify_option,
    view_options,
)
from ckptfs.cli.progress import Line
from ckptfs.errors import CacheError, IntegrityError, NotFoundError
from ckptfs.model.oci import Reference
from ckptfs.settings import default_cache_dir
from ckptfs.terminal import size_text

if TYPE_CHECKING:
    from ckptfs.engine.cache import ChunkCache
    from ckptfs.image import OpenImage


@click.group()
def cache() -> None:
    """The node's cache of decoded chunks, which all mounts share.

    \b
    ckptfs cache info
    ckptfs cache warm registry.example/app/ckpt:1
    ckptfs cache clear
    """


def _housekeeping(function: F) -> F:
    return cache_dir_option(config_option(verbosity_options(function)))


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="One object.")
@_housekeeping
def info(as_json: bool, cache_dir: Path | None, verbose: int, quiet: bool) -> None:
    """How much is in the cache, and whether it is encrypted and in use.

    \b
    ckptfs cache info --json
    """
    with _opened(cache_dir, verbose, quiet) as found:
        stats = found.stats()._asdict()
        name = found.name
    limit = current_configuration().values["cache_size"].value
    if as_json:
        click.echo(json.dumps({"path": name, "limit": limit, **stats}, indent=2))
        return
    how = "encrypted" if stats["encrypted"] else "not encrypted"
    click.echo(name)
    click.echo(f"  size       {size_text(stats['bytes'])} of at most {size_text(limit)}, {how}")
    click.echo(f"  holds      {stats['chunks']} chunks in {stats['segments']} segments, {stats['documents']} documents")
    click.echo(f"  in use     {'yes' if stats['in_use'] else 'no'}")


@cache.command(short_help="Read everything and drop what is damaged.")
@click.option("--json", "as_json", is_flag=True, help="One object: how many were read, how many were damaged.")
@_housekeeping
def verify(as_json: bool, cache_dir: Path | None, verbose: int, quiet: bool) -> None:
    """Read everything and drop what is damaged; exit code 6 if anything was.

    Mounts verify what they read in any case: this tells you about the disk.

    \b
    ckptfs cache verify
    """
    # What is damaged is told once, at the end.
    with (
        _opened(cache_dir, verbose, quiet or not verbose) as found,
        Line(lambda: "reading the whole cache", quiet=quiet),
    ):
        checked, bad = found.verify()
    if as_json:
        click.echo(json.dumps({"checked": checked, "damaged": bad}))
    elif not bad and not quiet:
        click.echo(f"{checked} chunks and documents are sound")
    if bad:
        raise IntegrityError(
            f"{bad} of {checked} chunks and documents were damaged and have been dropped",
            hint="whoever needs them fetches them again; see whether the disk is failing",
        )


@cache.command(short_help="Evict what was used longest ago.")
@click.option("--to", "target", type=ByteSize(), help="Bytes to get down to, e.g. 2G. [default: cache_size]")
@click.option("--json", "as_json", is_flag=True, help="One object: bytes that were freed, bytes that are left.")
@_housekeeping
def prune(target: int | None, as_json: bool, cache_dir: Path | None, verbose: int, quiet: bool) -> None:
    """Evict what was not used for the longest time, until the cache is small enough.

    Mounts do this by themselves when they write; they may go on meanwhile. Evicted is by segments, of an eighth of the
    cache and at most 64 MiB; those to which mounts are writing stay.

    \b
    ckptfs cache prune --to 2G
    """
    target = current_configuration().values["cache_size"].value if target is None else target
    with _opened(cache_dir, verbose, quiet) as found, Line(lambda: "evicting", quiet=quiet):
        freed, left = _freed(found, lambda: found.prune(target))
    _tell_freed(freed, left, as_json, quiet, "; the rest is being written by mounts" if left > target else "")


@cache.command()
@click.option("--force", is_flag=True, help="Also while mounts use it: they fetch again what they need.")
@click.option("--json", "as_json", is_flag=True, help="One object: bytes that were freed, bytes that are left.")
@_housekeeping
def clear(force: bool, as_json: bool, cache_dir: Path | None, verbose: int, quiet: bool) -> None:
    """Remove everything that the cache holds.

    \b
    ckptfs cache clear
    """
    with _opened(cache_dir, verbose, quiet) as found, Line(lambda: "removing", quiet=quiet):
        freed, left = _freed(found, lambda: found.clear(force=force))
    _tell_freed(freed, left, as_json, quiet)


@cache.command(short_help="Fetch an image into the cache.")
@reference_argument
@click.option("--metadata", is_flag=True, help="Only the small files that every restore reads, not the pages.")
@view_options
@click.option("--json", "as_json", is_flag=True, help="One object.")
@verify_option
@registry_options
def warm(reference: Reference, metadata: bool, as_json: bool, **options: Any) -> None:
    """Fetch an image into the cache, so that mounting and restoring it needs no network.

    \b
    ckptfs cache warm registry.example/app/ckpt:1
    ckptfs cache warm registry.example/app/ckpt:1 --metadata
    """
    from ckptfs.cli.opening import with_images

    async def work(images: "Sequence[OpenImage]") -> tuple[int, int, int, str]:
        from ckptfs.image.ahead import fetch_all
        from ckptfs.image.residency import ResidencyMeter

        image = images[0]
        lost = await fetch_all(image, metadata_only=metadata)
        cached = ResidencyMeter(image).measure().cached_bytes
        return lost, cached, image.image_bytes, str(image.resolved.manifest.digest)

    (lost, cached, whole, digest), traffic = with_images([reference], work, offline=False, **options)
    if lost or (not metadata and cached < whole):
        fit = f"only {size_text(cached)} of {size_text(whole)} fit" if not metadata else f"{lost} chunks did not fit"
        raise CacheError(f"{fit} into the cache", hint="give a larger --cache-size, or free space on its disk")
    if as_json:
        facts = {"reference": str(reference), "digest": digest, "image_bytes": whole, "cached_bytes": cached}
        click.echo(json.dumps({**facts, "fetched_bytes": traffic.fetched_bytes, "requests": traffic.requests}))
    elif not options["quiet"]:
        what = "its metadata is" if metadata else "all of it is"
        click.echo(f"{reference}: {what} in the cache; {traffic.sentence()}")


@contextmanager
def _opened(cache_dir: Path | None, verbose: int, quiet: bool) -> "Iterator[ChunkCache]":
    """The cache as it is, whatever its key; NotFoundError where there is none."""
    configure_logging(verbose, quiet)
    from ckptfs.engine.cache import ChunkCache

    path = cache_dir or default_cache_dir()
    try:
        path.stat()
    except FileNotFoundError:
        hint = "a mount makes it; --cache-dir names another"
        raise NotFoundError(f"there is no cache in {path}", hint=hint) from None
    except OSError:
        pass  # opening it says what to do
    with ChunkCache.open(path, size=current_configuration().values["cache_size"].value) as found:
        yield found


def _freed(found: "ChunkCache", action: Callable[[], None]) -> tuple[int, int]:
    """Bytes that were freed, and that are left."""
    before = found.stats().bytes
    action()
    left = found.stats().bytes
    return max(0, before - left), left


def _tell_freed(freed: int, left: int, as_json: bool, quiet: bool, why: str = "") -> None:
    if as_json:
        click.echo(json.dumps({"freed_bytes": freed, "bytes": left}))
    elif not quiet:
        click.echo(f"freed {size_text(freed)}, {size_text(left)} left{why}")
