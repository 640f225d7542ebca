"""The profile that is attached to an image: found by a mount, published by `ckptfs profile push`.

An artifact whose subject is the image, with one document (model/profile.py). A small document is in an annotation of
the artifact as well, and thereby in the registry's list of what refers to the image: one request finds it. Of several
the newest counts; a push merges what was there, so that it has seen every restore. `find` costs a mount that request
and nothing else. Blocks.
"""

import base64
import binascii
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import zstandard

from ckptfs.errors import CkptfsError, FormatError
from ckptfs.image.attaching import Attached, Sink, attach
from ckptfs.image.resolve import DocumentStore
from ckptfs.model.annotations import CREATED, PROFILE_ARTIFACT
from ckptfs.model.oci import Descriptor, Digest, Manifest, parse_document
from ckptfs.model.profile import Profile, decode_profile, encode_profile, merged
from ckptfs.settings import KiB, Limits
from ckptfs.sources import Repository, Source

log = logging.getLogger(__name__)

_INLINE = "dev.ckptfs.profile"  # annotation: base64 of the document as a zstd frame
_INLINE_BYTES = 16 * KiB  # of base64; a list of referrers may hold many, in 4 MiB at most
_LEVEL = 19
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Published:
    """What is attached to the image now."""

    artifact: Attached
    profile: Profile


def remembered(image: Digest, documents: DocumentStore, limits: Limits) -> Profile | None:
    """The profile that this node has seen of the image before."""
    raw = documents.get_document(_key(image))
    try:
        return decode_profile(raw, limits) if raw is not None else None
    except FormatError as error:
        log.info("the kept profile of %s is not used: %s", image, error)
        return None


def find(source: Source, image: Digest, documents: DocumentStore, limits: Limits) -> Profile | None:
    """The profile that the registry has of the image, None where it has none; this node keeps it."""
    profile = attached(source, image, limits)
    if profile is not None:
        documents.put_document(_key(image), encode_profile(profile))
    return profile


def attached(source: Source, image: Digest, limits: Limits) -> Profile | None:
    """The newest profile that can be read. Raises what keeps it from asking."""
    return _first(source, image, _offers(source, image), limits)


def _offers(source: Source, image: Digest) -> list[Descriptor]:
    """The artifacts that hold profiles of the image, newest first."""
    if not isinstance(source, Repository):
        return []
    offers = reversed(source.referrers(image, PROFILE_ARTIFACT))  # registries without dates list the oldest first
    return sorted(offers, key=_created, reverse=True)


def _created(offer: Descriptor) -> datetime:
    """When; the earliest time there is, if it does not say, or names one that nothing comes after."""
    try:
        created = datetime.fromisoformat(offer.annotations.get(CREATED, "")).astimezone(UTC)
        return created + _TICK - _TICK
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


def _first(source: Source, image: Digest, offers: Sequence[Descriptor], limits: Limits) -> Profile | None:
    for offer in offers:
        try:
            return decode_profile(_document(source, image, offer, limits), limits)
        except CkptfsError as error:
            log.warning("the profile %s of %s is not used: %s", offer.digest, source.reference, error)
    return None


def publish(
    source: Source, sink: Sink, image: Manifest, profile: Profile, limits: Limits, *, merge: bool = True
) -> Published:
    """Attach the profile to the image, merged with the one that it has. The mounts that begin from now on find it."""
    offers = _offers(source, image.digest)
    if merge and (earlier := _first(source, image.digest, offers, limits)) is not None:
        profile = merged((earlier, profile), limits)
    document = encode_profile(profile)
    now = datetime.now(UTC)  # to the microsecond: of two within a second the later one is the newest
    if offers:  # also where the one before is of a machine whose clock is ahead of ours
        now = max(now, _created(offers[0]) + _TICK)
    annotations = {CREATED: now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    inline = base64.b64encode(zstandard.ZstdCompressor(level=_LEVEL).compress(document)).decode()
    if len(inline) <= _INLINE_BYTES:
        annotations[_INLINE] = inline
    described = Descriptor(PROFILE_ARTIFACT, Digest.of(document), len(document))
    return Published(attach(sink, image, PROFILE_ARTIFACT, [(described, document)], annotations), profile)


def _document(source: Source, image: Digest, offer: Descriptor, limits: Limits) -> bytes:
    inline = offer.annotations.get(_INLINE)
    if inline is not None:
        return _unpacked(inline, limits)
    artifact = parse_document(source.fetch(offer), offer.media_type)
    if not isinstance(artifact, Manifest) or artifact.subject is None or artifact.subject.digest != image:
        raise FormatError("it is attached to something else")
    for blob in artifact.layers:
        if blob.media_type == PROFILE_ARTIFACT and blob.size <= limits.profile_bytes:
            return source.fetch(blob)
    raise FormatError("it has no document of the right type and size")


def _unpacked(inline: str, limits: Limits) -> bytes:
    try:
        frame = base64.b64decode(inline, validate=True)
        if not 0 <= zstandard.frame_content_size(frame) <= limits.profile_bytes:
            raise FormatError(f"its annotation does not say that it is smaller than {limits.profile_bytes} bytes")
        return zstandard.ZstdDecompressor().decompress(frame)
    except (binascii.Error, zstandard.ZstdError, ValueError) as error:
        raise FormatError(f"its annotation cannot be unpacked ({type(error).__name__})") from None


def _key(image: Digest) -> str:
    return f"profile/{image}"
