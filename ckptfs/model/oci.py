"""The nouns of the OCI image and distribution specs: Digest, Reference, Descriptor, Manifest, Index.

Parses and checks; knows nothing of where the documents come from.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ckptfs.errors import FormatError, IntegrityError, UsageError

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)

ANNOTATION_REF_NAME = "org.opencontainers.image.ref.name"
# On descriptors of our own making: the digest names where the bytes are, not what they are, and cannot be checked.
ANNOTATION_SYNTHETIC = "dev.ckptfs.synthetic-digest"

_VARIANTS = {"amd64": ("", "v1"), "arm64": ("", "v8"), "arm": ("v7",)}  # for all machines of an architecture, as podman

_ALGORITHMS = {"sha256": 64, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+\Z")
# distribution/reference grammar: lower-case path components, separators . _ __ - and /. Compiled when first used (re
# keeps them): 0.4 ms that a daemon, which gets its reference parsed, need not spend.
_REPOSITORY = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z"
_HOST = (
    r"(?:\[[0-9a-fA-F:]+\]|[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*)"
    r"(?::[0-9]{1,5})?\Z"
)


class Digest(NamedTuple):
    """`algorithm:hex`, checked (image-spec, descriptor.md). Only sha256 and sha512 are registered."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> "Digest":
        algorithm, colon, hexadecimal = text.partition(":")
        if not colon or _ALGORITHMS.get(algorithm) != len(hexadecimal) or not _HEX.match(hexadecimal):
            raise FormatError(f"{text[:100]!r} is not a digest", hint="expected sha256:<64 hex digits>")
        return cls(algorithm, hexadecimal)

    @classmethod
    def of(cls, data: bytes | memoryview, algorithm: str = "sha256") -> "Digest":
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    @property
    def raw(self) -> bytes:
        return bytes.fromhex(self.hex)

    def check(self, data: bytes | memoryview, what: str) -> None:
        """Raise IntegrityError unless `data` has this digest."""
        actual = hashlib.new(self.algorithm, data).hexdigest()
        if actual != self.hex:
            raise IntegrityError(f"{what} has digest {self.algorithm}:{actual}, expected {self}")

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


class Reference(NamedTuple):
    """Where an image is.

    registry: host[:port], repository, and tag or digest or both (the digest wins).
    oci:      path of an OCI image layout, optional tag (org.opencontainers.image.ref.name).
    archive:  path of a checkpoint archive.
    """

    kind: Literal["registry", "oci", "archive"]
    host: str = ""
    repository: str = ""
    path: str = ""
    tag: str = ""
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """UsageError unless `text` is host/repo[:tag][@digest], oci:DIR[:TAG][@digest] or archive:FILE."""
        if text.startswith("archive:"):
            if not text[8:]:
                raise UsageError("archive: without a file", hint="write archive:FILE.tar")
            return cls("archive", path=text[8:])
        rest, at, digest_text = text.partition("@")
        digest = None
        if at:
            try:
                digest = Digest.parse(digest_text)
            except FormatError as error:
                # what stands before the @ may be somebody's password
                raise UsageError(f"the reference is wrong after its @: {error}") from None
        if rest.startswith("oci:"):
            path, colon, tag = rest[4:].rpartition(":")
            if not colon or "/" in tag:
                path, tag = rest[4:], ""
            if not path:
                raise UsageError("oci: without a directory", hint="write oci:DIR or oci:DIR:TAG")
            return cls("oci", path=path, tag=tag, digest=digest)
        host, slash, name = rest.partition("/")
        forms = "write HOST[:PORT]/REPOSITORY[:TAG], oci:DIR[:TAG] or archive:FILE"
        looks_like_host = host.strip(".") and ("." in host or ":" in host or host == "localhost")  # ./a is a path
        if not slash or not looks_like_host:
            raise UsageError(f"reference {text!r} names no registry", hint=forms)
        repository, colon, tag = name.partition(":")
        if not re.match(_HOST, host):
            raise UsageError(
                f"reference {text!r}: {host!r} is not a host name", hint=f"{forms}, without https:// before it"
            )
        if not re.match(_REPOSITORY, repository) or len(repository) > 255:
            raise UsageError(
                f"reference {text!r}: {repository!r} is not a repository name",
                hint="lower-case letters, digits and . _ - between slashes",
            )
        if colon and not re.match(_TAG, tag):
            raise UsageError(f"reference {text!r}: {tag!r} is not a tag", hint="at most 128 letters, digits and . _ -")
        return cls("registry", host, repository, tag=tag or ("" if digest else "latest"), digest=digest)

    def pinned(self, digest: Digest) -> "Reference":
        return Reference(self.kind, self.host, self.repository, self.path, self.tag, digest)

    def __str__(self) -> str:
        tail = (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")
        if self.kind == "registry":
            return f"{self.host}/{self.repository}{tail}"
        return f"{self.kind}:{self.path}{tail}"


class Descriptor(NamedTuple):
    """A typed, sized, digested pointer to a blob (image-spec, descriptor.md)."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = {}
    artifact_type: str = ""
    platform: Mapping[str, str] = {}

    @property
    def synthetic(self) -> bool:
        """Whether the digest is only a name (local archives, files inside an image)."""
        return ANNOTATION_SYNTHETIC in self.annotations

    @classmethod
    def from_json(cls, value: object, what: str = "descriptor") -> "Descriptor":
        if not isinstance(value, dict):
            raise FormatError(f"{what} is not an object")
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not isinstance(digest, str):
            raise FormatError(f"{what} has no mediaType or digest")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
            raise FormatError(f"{what} has size {str(size)[:40]}")
        annotations = string_map(value.get("annotations"), f"{what}: annotations")
        annotations.pop(ANNOTATION_SYNTHETIC, None)  # no document may say that what it names need not be checked
        return cls(
            media_type,
            Digest.parse(digest),
            size,
            annotations,
            str(value.get("artifactType") or ""),
            {k: v for k, v in (value.get("platform") or {}).items() if isinstance(v, str)}
            if isinstance(value.get("platform"), dict)
            else {},
        )

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        if self.platform:
            out["platform"] = dict(self.platform)
        if self.annotations:
            out["annotations"] = dict(self.annotations)
        return out


class Manifest(NamedTuple):
    """An image manifest; `raw` are the bytes that `digest` covers."""

    raw: bytes
    digest: Digest
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    artifact_type: str = ""
    subject: Descriptor | None = None


class Index(NamedTuple):
    """An image index (manifest list)."""

    raw: bytes
    digest: Digest
    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    def select(self, architecture: str | None = None) -> Descriptor:
        """The manifest for this machine; the only one where there is just one; FormatError when none fits.

        Artifacts (SOCI's index of an image stands beside it) are images only where nothing else is there.
        """
        wanted = architecture or machine_architecture()
        named = [m for m in self.manifests if m.media_type in MANIFEST_TYPES and not _is_attestation(m)]
        images = [m for m in named if not m.artifact_type] or named
        if not images:
            raise FormatError(f"index {self.digest} names no image")
        if len(images) == 1:
            return images[0]
        fitting = [
            m for m in images if m.platform.get("os", "linux") == "linux" and m.platform.get("architecture") == wanted
        ] or [m for m in images if not m.platform]  # as with podman and containerd, it may be for any
        for m in fitting:
            if m.platform.get("variant", "") in _VARIANTS.get(wanted, ("",)):
                return m
        if fitting:
            return fitting[0]
        offered = sorted({m.platform.get("architecture", "?") for m in images})
        raise FormatError(f"the index has no image for linux/{wanted}", hint=f"it offers {', '.join(offered)}")


def parse_document(raw: bytes, media_type: str = "", digest: Digest | None = None) -> Manifest | Index:
    """A manifest or an index from its bytes. FormatError for everything else; layer types are not judged.

    digest  that it has been asked for and checked by; else its SHA-256.
    """
    value = parse_json(raw, "manifest")
    if not isinstance(value, dict):
        raise FormatError("the manifest is not a JSON object")
    claimed = media_type.split(";")[0].strip()
    declared = value.get("mediaType") or (claimed if claimed in MANIFEST_TYPES else "")
    if value.get("schemaVersion") != 2:
        raise FormatError("the manifest has not schemaVersion 2", hint="push the image again with a current tool")
    digest = digest or Digest.of(raw)
    annotations = string_map(value.get("annotations"), "manifest: annotations")
    if declared in INDEX_TYPES or (not declared and "manifests" in value):
        manifests = value.get("manifests")
        if "layers" in value or not isinstance(manifests, list):
            raise FormatError("the index has no list of manifests, or layers as well")
        found = tuple(Descriptor.from_json(m, f"manifests[{i}]") for i, m in enumerate(manifests))
        return Index(raw, digest, str(declared or OCI_INDEX), found, annotations)
    layers = value.get("layers")
    if "manifests" in value or not isinstance(layers, list):
        raise FormatError("the manifest has no list of layers, or manifests as well")
    subject = value.get("subject")
    return Manifest(
        raw,
        digest,
        str(declared or OCI_MANIFEST),
        Descriptor.from_json(value.get("config"), "config"),
        tuple(Descriptor.from_json(layer, f"layers[{i}]") for i, layer in enumerate(layers)),
        annotations,
        str(value.get("artifactType") or ""),
        Descriptor.from_json(subject, "subject") if subject is not None else None,
    )


def parse_diff_ids(config: bytes, manifest: Manifest) -> list[Digest]:
    """The digests of the unpacked layers, in order, out of the image's config (image-spec, config.md); FormatError."""
    value = parse_json(config, "image's config")
    rootfs = value.get("rootfs") if isinstance(value, dict) else None
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or len(found) != len(manifest.layers):
        raise FormatError("the image's config does not list its layers")
    return [Digest.parse(str(diff_id)) for diff_id in found]


def parse_json(raw: bytes, what: str) -> object:
    """JSON from outside, with every way in which it can fail made a FormatError."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the {what} is not JSON ({type(error).__name__})") from None


def string_map(value: object, what: str) -> dict[str, str]:
    """A JSON object of strings; absent and null are empty."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(f"{what} is not an object of strings")
    return value


def machine_architecture() -> str:
    """GOARCH of this machine."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}.get(machine, machine)


def _is_attestation(descriptor: Descriptor) -> bool:
    """BuildKit's provenance manifests stand in the index with platform unknown/unknown."""
    return descriptor.annotations.get("vnd.docker.reference.type") == "attestation-manifest"
