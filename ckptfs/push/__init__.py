"""`ckptfs push`: any source in, the image of docs/image-format.md out.

    source (directory, archive, image) -> Checkpoint -> plan of layers -> zstd:chunked layers -> blobs -> manifest

Memory does not grow with the checkpoint. The work directory takes each compressed layer until it is sent, and what
layers unpack to that have no digest but that of everything. Blocks; called by the command line and by tests.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptfs.errors import FormatError, NotFoundError, UsageError
from ckptfs.image.resolve import find_image
from ckptfs.layers.zstd_chunked_writer import Member, WrittenLayer, write_layer
from ckptfs.model.annotations import BASE_DIGEST, BASE_NAME, PARENT, ROLE, ROOTFS_DIGEST
from ckptfs.model.blob import MemoryBlob
from ckptfs.model.index import ANNOTATION_INDEX
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Index, Reference
from ckptfs.model.paths import show
from ckptfs.model.tree import WHITEOUT
from ckptfs.push.checkpoint_files import Checkpoint, CheckpointFile, under_checkpoint
from ckptfs.push.containerd import nested, raw_blobs
from ckptfs.push.directory import read_directory
from ckptfs.push.facts import read_facts
from ckptfs.push.image_files import LayerFiles, read_image, select_manifest
from ckptfs.push.increment import Increment, make_increment
from ckptfs.push.joined import joined
from ckptfs.push.manifest import CONFIG_TYPE, BuiltLayer, encode_config, encode_inline_index, encode_manifest
from ckptfs.push.pages import PagesFile, find_pages, require_parents
from ckptfs.push.parent import ParentImage
from ckptfs.push.plan import PlannedLayer, plan_layers
from ckptfs.push.publisher import Progress, Publisher
from ckptfs.push.rootfs import BaseImage, RootfsImage
from ckptfs.push.spool import Spool, Work
from ckptfs.push.target import Target, open_target
from ckptfs.settings import Limits, Settings
from ckptfs.sources import OpenSource, Source
from ckptfs.sources.archive import ArchiveSource
from ckptfs.sources.files import translated

__all__ = [
    "BaseImage",
    "Increment",
    "ParentImage",
    "Progress",
    "PushOptions",
    "PushResult",
    "Target",
    "open_base",
    "open_checkpoint",
    "open_parent",
    "open_target",
    "push",
]


@dataclass(frozen=True, slots=True)
class PushOptions:
    """`name`: of the container, when no dump says it. `annotations`: added to those that the checkpoint gives."""

    name: str = "checkpoint"
    annotations: Mapping[str, str] = field(default_factory=dict)
    threads: int = 2
    work: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class PushResult:
    """`manifest` names M, `rootfs` R. `sent` and `present` are bytes of blobs.

    increment  what was shared with the parent, if one was named: its layers are M's first.
    layers     those that were made for M, behind them.
    """

    manifest: Descriptor
    layers: tuple[WrittenLayer, ...]
    sent: int
    present: int
    rootfs: Descriptor | None = None
    increment: Increment | None = None


@contextmanager
def open_checkpoint(source: str, open_source: OpenSource, options: PushOptions) -> Iterator[Checkpoint]:
    """The checkpoint that SRC names: a directory, an archive, oci:DIR[:TAG], archive:FILE or a registry reference.

    What was pushed as an increment is whole again.
    """
    with _opened(source, open_source, options) as checkpoint:
        yield joined(checkpoint, options.settings.limits)


@contextmanager
def _opened(source: str, open_source: OpenSource, options: PushOptions) -> Iterator[Checkpoint]:
    path = Path(source.removeprefix("archive:"))
    try:
        is_directory, is_file = path.is_dir(), path.exists() and not path.is_dir()
        is_layout = is_directory and (path / "oci-layout").exists()
    except OSError as error:
        raise translated(error, path) from None
    if not source.startswith("oci:") and is_directory and not is_layout:
        yield read_directory(path)
        return
    with ExitStack() as stack:
        work = Work(options.work, stack)
        image: Source
        if is_file:
            image = ArchiveSource(Reference("archive", path=str(path)))
        elif source.startswith(("/", ".", "archive:")) and not is_directory:
            raise NotFoundError(f"there is no {path}", hint="name a directory, an archive, or an image")
        else:
            image = open_source(_reference(f"oci:{path}" if is_directory else source))
        found = find_image(image.resolve(), image.fetch, options.settings.limits)
        if isinstance(found, Index):
            yield Checkpoint(*raw_blobs(found, image, work, options.settings))
            return
        blobs = [image.blob(layer) for layer in found.layers]
        layers = work.enter(LayerFiles(blobs, options.work, options.settings))
        yield _arranged(read_image(image, found, layers), work, options)


def _reference(source: str) -> Reference:
    try:
        return Reference.parse(source)
    except UsageError as error:
        if "/" in source:
            raise
        raise NotFoundError(f"there is no {source}", hint="name a directory, an archive, or an image") from error


def _arranged(checkpoint: Checkpoint, work: Work, options: PushOptions) -> Checkpoint:
    """In the flat layout, whatever the layout of the source."""
    found = nested(checkpoint.files, work, options.settings)
    if found is not None:
        files, annotations = found
        return replace(checkpoint, files=under_checkpoint(files), annotations={**annotations, **checkpoint.annotations})
    return replace(checkpoint, files=under_checkpoint(checkpoint.files))


def push(
    checkpoint: Checkpoint,
    target: Target,
    tag: str,
    options: PushOptions,
    progress: Callable[[Progress], None] | None = None,
    *,
    base: BaseImage | None = None,
    parent: ParentImage | None = None,
) -> PushResult:
    """Publish `checkpoint` as an image under `tag`. FormatError when it is none.

    base    publish the root file system as well, under `tag`-rootfs: its manifest comes before the one that names it.
    parent  leave the pages that this image has to its layers, if that saves enough.
    """
    if not any(file.name == b"inventory.img" for file in checkpoint.files):
        raise FormatError("the source holds no inventory.img, so it is no checkpoint", hint=_what_instead(checkpoint))
    _require_names(checkpoint)
    limits = options.settings.limits
    require_parents(checkpoint.files, limits)
    facts = read_facts(checkpoint, options.name, limits)
    pages = find_pages(checkpoint.files, limits)
    increment: Increment | None = None
    begun = Progress()
    if parent is not None:
        increment, begun = _compared(checkpoint, pages, parent, limits, progress)
        if increment.layers:
            checkpoint = increment.checkpoint
            pages = find_pages(checkpoint.files, limits)
    reused = increment.layers if increment is not None else ()
    total = sum(file.inode.size for file in checkpoint.files if file.is_regular)
    with ExitStack() as stack, Publisher(target, replace(begun, total=total), progress) as publisher:
        work = Work(options.work, stack)
        if increment is not None:
            source = increment.parent.source
            for layer in reused:
                blob = source.blob(layer.descriptor)
                publisher.add(layer.descriptor, blob, origin=_origin(source.reference, target))
        built = []
        for planned in plan_layers(checkpoint):
            spool = work.spool()
            written = _write(planned, pages, spool, publisher, options)
            spool.complete(written.descriptor)
            publisher.add(written.descriptor, spool, done=spool.close)
            built.append(BuiltLayer(planned, written))
        diff_ids = [*(layer.diff_id for layer in reused), *(layer.written.diff_id for layer in built)]
        config_raw = encode_config(checkpoint, diff_ids)
        config = Descriptor(CONFIG_TYPE, Digest.of(config_raw), len(config_raw))
        publisher.add(config, MemoryBlob(config, config_raw))
        annotations = {**facts.annotations, **options.annotations}
        if increment is not None and reused:
            annotations[PARENT] = str(increment.digest)
        rootfs = None
        if base is not None:
            rootfs = RootfsImage(checkpoint, base, work, options.settings)
            rootfs.add_blobs(publisher, _origin(base.source.reference, target), options.threads)
            root = publisher.publish(rootfs.raw, OCI_MANIFEST, f"{tag}-rootfs" if tag else "")
            annotations |= {
                ROOTFS_DIGEST: str(root),
                BASE_NAME: base.name,
                BASE_DIGEST: str(base.manifest.digest),
            }
        index = encode_inline_index(built, pages, limits, [layer.indexed for layer in reused])
        if index is not None:
            annotations[ANNOTATION_INDEX] = index
        descriptors = [*(layer.descriptor for layer in reused), *(layer.written.descriptor for layer in built)]
        raw = encode_manifest(config, descriptors, annotations)
        digest = publisher.publish(raw, OCI_MANIFEST, tag)
        return PushResult(
            Descriptor(OCI_MANIFEST, digest, len(raw)),
            tuple(layer.written for layer in built),
            publisher.progress.sent,
            publisher.progress.present,
            Descriptor(OCI_MANIFEST, Digest.of(rootfs.raw), len(rootfs.raw)) if rootfs is not None else None,
            increment,
        )


def _require_names(checkpoint: Checkpoint) -> None:
    """FormatError for a file that would be lost: in a layer its name says that another one is deleted."""
    for file in checkpoint.files:
        if file.name.startswith(WHITEOUT):
            raise FormatError(f"a file called {show(file.path)} has no place in an image", hint="rename or remove it")


def _what_instead(checkpoint: Checkpoint) -> str:
    """Archives of whole images are no checkpoints, but what is in them may be one."""
    if checkpoint.find(b"oci-layout") is not None:
        return "it is an OCI layout: unpack it and push oci:DIR"
    if checkpoint.find(b"manifest.json") is not None:
        return "it is an image as docker saves it: copy it with skopeo to oci:DIR:1, and push that"
    return "name what criu dumped"


def _compared(
    checkpoint: Checkpoint,
    pages: Mapping[bytes, PagesFile],
    parent: ParentImage,
    limits: Limits,
    progress: Callable[[Progress], None] | None,
) -> tuple[Increment, Progress]:
    """What `parent` can save, and how far that has brought the push."""
    begun = Progress(to_compare=sum(described.file.inode.size for described in pages.values()))

    def compared(count: int) -> None:
        nonlocal begun
        begun = replace(begun, compared=begun.compared + count)
        if progress is not None:
            progress(begun)

    increment = make_increment(checkpoint, pages, parent, limits, compared)
    return increment, replace(begun, compared=begun.to_compare)


def open_base(checkpoint: Checkpoint, reference: str, open_source: OpenSource, options: PushOptions) -> BaseImage:
    """The container's base image: `reference`, or what the checkpoint says when that is "".

    UsageError when it says nothing, or a name that is no reference.
    """
    name = reference or read_facts(checkpoint, options.name, options.settings.limits).base
    if not name:
        raise UsageError("the checkpoint does not say which image it ran from", hint="name it with --base REF")
    if not reference and not _names_a_registry(name):
        raise UsageError(f"no registry is known for the base image {name}", hint="name it with --base REF")
    source = open_source(Reference.parse(name))
    return BaseImage(source, select_manifest(source, options.settings), name)


def open_parent(reference: Reference, open_source: OpenSource, options: PushOptions) -> ParentImage:
    """The image of the checkpoint before."""
    source = open_source(reference)
    return ParentImage(source, select_manifest(source, options.settings), options.settings)


def _names_a_registry(name: str) -> bool:
    """Engines also write short names, image IDs, and localhost/NAME for what was made on the machine."""
    try:
        found = Reference.parse(name)
    except UsageError:
        return False
    return found.kind == "registry" and found.host != "localhost"


def _origin(where: Reference, target: Target) -> str:
    """The repository of another image, when blobs can be mounted from it."""
    return where.repository if where.kind == "registry" and where.host == target.reference.host else ""


def _write(
    planned: PlannedLayer, pages: Mapping[bytes, PagesFile], spool: Spool, publisher: Publisher, options: PushOptions
) -> WrittenLayer:
    def member(file: CheckpointFile) -> Member:
        described = pages.get(file.path)
        return Member(file.path, file.inode, file.link, file.open, described.cuts if described else None)

    return write_layer(
        map(member, planned.files),
        spool.write,
        annotations={ROLE: planned.role},
        threads=options.threads,
        progress=publisher.packed,
    )
