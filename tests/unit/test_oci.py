"""References, digests, descriptors, manifests and indexes: what is accepted, and what each refusal says."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import CkptfsError, FormatError, IntegrityError, UsageError
from ckptfs.model.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    Index,
    Manifest,
    Reference,
    parse_document,
    parse_json,
)

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


def descriptor(**changes: Any) -> dict[str, Any]:
    return {"mediaType": "application/x", "digest": DIGEST, "size": 3, **changes}


def manifest(**changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(),
        "layers": [descriptor(size=7)],
        **changes,
    }
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()


def index(*platforms: str, **changes: Any) -> bytes:
    entries = [
        descriptor(
            mediaType=OCI_MANIFEST, digest=f"sha256:{number:064x}", platform={"os": "linux", "architecture": name}
        )
        for number, name in enumerate(platforms)
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, **changes}).encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host.example/repo", Reference("registry", "host.example", "repo", tag="latest")),
        ("host.example/repo:tag", Reference("registry", "host.example", "repo", tag="tag")),
        ("host.example/a/b-c__d.e:T_1.x", Reference("registry", "host.example", "a/b-c__d.e", tag="T_1.x")),
        ("localhost/repo", Reference("registry", "localhost", "repo", tag="latest")),
        ("registry:5000/repo", Reference("registry", "registry:5000", "repo", tag="latest")),
        ("127.0.0.1:5000/r:t", Reference("registry", "127.0.0.1:5000", "r", tag="t")),
        ("[::1]:5000/r:t", Reference("registry", "[::1]:5000", "r", tag="t")),
        (f"h.x/r@{DIGEST}", Reference("registry", "h.x", "r", digest=Digest("sha256", HEX))),
        (f"h.x/r:t@{DIGEST}", Reference("registry", "h.x", "r", tag="t", digest=Digest("sha256", HEX))),
        ("oci:/a/b", Reference("oci", path="/a/b")),
        ("oci:/a/b:tag", Reference("oci", path="/a/b", tag="tag")),
        ("oci:/a:b/c", Reference("oci", path="/a:b/c")),
        (f"oci:d@{DIGEST}", Reference("oci", path="d", digest=Digest("sha256", HEX))),
        ("archive:/x/y@z.tar.gz", Reference("archive", path="/x/y@z.tar.gz")),
    ],
)
def test_references(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "repo",
        "repo:tag",
        "library/repo",
        "host.example/",
        "host.example/Repo",
        "host.example/a//b",
        "host.example/../b",
        "host.example/repo:",
        "host.example/repo:" + "t" * 129,
        "host.example/repo:-tag",
        "host.example/repo@sha256:12",
        "host.example/repo@md5:" + "0" * 32,
        "user:password@host.example/repo",
        "ho st.example/repo",
        "-host.example/repo",
        "host.example:port/repo",
        "https://host.example/repo",
        "oci:",
        "oci::tag",
        "archive:",
        "host.example/" + "a" * 256,
    ],
)
def test_refused_references_say_why_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Reference.parse(text)
    assert "\n" not in str(caught.value)
    assert "password" not in str(caught.value)


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_a_usage_error(text: str) -> None:
    try:
        parsed = Reference.parse(text)
    except UsageError:
        return
    assert Reference.parse(str(parsed)) == parsed


_name = st.from_regex(r"[a-z0-9]{1,8}(?:[._-][a-z0-9]{1,8}){0,2}", fullmatch=True)


@given(
    st.sampled_from(["localhost", "h.example", "h:5000", "[::1]:5000", "10.0.0.1"]),
    st.lists(_name, min_size=1, max_size=4),
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    st.booleans(),
)
def test_references_survive_being_written(host: str, parts: list[str], tag: str, pinned: bool) -> None:
    reference = Reference("registry", host, "/".join(parts), tag=tag)
    if pinned:
        reference = reference.pinned(Digest("sha256", HEX))
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize("text", [DIGEST, "sha512:" + "ab" * 64])
def test_digests(text: str) -> None:
    assert str(Digest.parse(text)) == text
    assert Digest.parse(text).raw == bytes.fromhex(text.partition(":")[2])


@pytest.mark.parametrize(
    "text", ["", "sha256", "sha256:", DIGEST[:-1], DIGEST + "0", DIGEST.upper(), "sha1:" + "0" * 40, DIGEST + "\n"]
)
def test_refused_digests(text: str) -> None:
    with pytest.raises(FormatError):
        Digest.parse(text)


@given(st.binary(max_size=100))
def test_a_digest_checks_what_it_was_made_of(data: bytes) -> None:
    digest = Digest.of(data)
    digest.check(data, "it")
    with pytest.raises(IntegrityError, match="it has digest"):
        digest.check(data + b"x", "it")


def test_a_sha512_digest_is_checked_as_such() -> None:
    digest = Digest.parse("sha512:" + "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce"
                          "47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e")  # fmt: skip
    digest.check(b"", "nothing")


def test_a_manifest() -> None:
    raw = manifest(annotations={"a": "b"}, artifactType="t", subject=descriptor(size=9))
    parsed = parse_document(raw)
    assert isinstance(parsed, Manifest)
    assert parsed.raw == raw
    assert parsed.digest == Digest.of(raw)
    assert parsed.media_type == OCI_MANIFEST
    assert [layer.size for layer in parsed.layers] == [7]
    assert parsed.annotations == {"a": "b"}
    assert parsed.artifact_type == "t"
    assert parsed.subject is not None and parsed.subject.size == 9


def test_the_media_type_of_the_reply_counts_where_the_document_has_none() -> None:
    parsed = parse_document(manifest(mediaType=None), f"{DOCKER_MANIFEST}; charset=utf-8")
    assert parsed.media_type == DOCKER_MANIFEST
    raw = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    assert isinstance(parse_document(raw, DOCKER_LIST), Index)
    assert parse_document(raw).media_type == OCI_INDEX


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        manifest(schemaVersion=1),
        manifest(schemaVersion=None),
        manifest(layers=None),
        manifest(layers={}),
        manifest(layers=[1]),
        manifest(layers=[{}]),
        manifest(config=None),
        manifest(manifests=[]),
        manifest(annotations=[]),
        manifest(annotations={"a": 1}),
        manifest(subject="x"),
        manifest(layers=[descriptor(size=-1)]),
        manifest(layers=[descriptor(size=1 << 62)]),
        manifest(layers=[descriptor(size="3")]),
        manifest(layers=[descriptor(size=True)]),
        manifest(layers=[descriptor(size=1.5)]),
        manifest(layers=[descriptor(digest="sha256:../../etc/passwd")]),
        manifest(layers=[descriptor(mediaType=None)]),
        index(layers=[]),
        index(manifests={}),
    ],
)
def test_refused_documents(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_document(raw)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_fields = ["schemaVersion", "mediaType", "config", "layers", "manifests", "annotations", "subject", "artifactType"]


@given(st.dictionaries(st.sampled_from(_fields), _json | st.just(2) | st.just([descriptor()]), max_size=8))
def test_any_document_is_parsed_or_a_format_error(document: dict[str, Any]) -> None:
    try:
        parse_document(json.dumps({"schemaVersion": 2, **document}).encode())
    except FormatError:
        pass


@given(st.binary(max_size=50))
def test_any_bytes_are_json_or_a_format_error(raw: bytes) -> None:
    try:
        parse_json(raw, "thing")
    except FormatError:
        pass


def test_an_index_gives_the_image_for_a_machine() -> None:
    parsed = parse_document(index("arm64", "amd64"))
    assert isinstance(parsed, Index)
    assert parsed.select("amd64").digest.hex == f"{1:064x}"
    assert parsed.select("arm64").digest.hex == f"{0:064x}"
    with pytest.raises(FormatError, match="it offers amd64, arm64"):
        parsed.select("s390x")


def test_an_index_with_one_image_gives_it_whatever_its_platform() -> None:
    parsed = parse_document(index("riscv64"))
    assert isinstance(parsed, Index)
    assert parsed.select("amd64") == parsed.manifests[0]


def test_attestations_are_no_images() -> None:
    notes = {"vnd.docker.reference.type": "attestation-manifest"}
    entries = [descriptor(mediaType=OCI_MANIFEST), descriptor(mediaType=OCI_MANIFEST, annotations=notes)]
    parsed = parse_document(index(manifests=entries))
    assert isinstance(parsed, Index)
    assert parsed.select("amd64") == parsed.manifests[0]
    empty = parse_document(index(manifests=entries[1:]))
    assert isinstance(empty, Index)
    with pytest.raises(FormatError, match="names no image"):
        empty.select()


@pytest.mark.parametrize("platform", [{}, {"platform": {"os": "linux", "architecture": "s390x"}}])
def test_artifacts_beside_an_image_are_no_images(platform: dict[str, Any]) -> None:
    """As soci convert writes it: an index of the image, and SOCI's of that."""
    soci = descriptor(mediaType=OCI_MANIFEST, artifactType="application/vnd.amazon.soci.index.v2+json")
    image = descriptor(mediaType=OCI_MANIFEST, digest=f"sha256:{1:064x}", **platform)
    for entries in ([image, soci], [soci, image]):
        parsed = parse_document(index(manifests=entries))
        assert isinstance(parsed, Index)
        assert parsed.select("amd64").digest.hex == f"{1:064x}"
    alone = parse_document(index(manifests=[soci]))
    assert isinstance(alone, Index)
    assert alone.select() == alone.manifests[0]


def test_an_image_without_a_platform_is_for_any_that_has_none_of_its_own() -> None:
    entries = json.loads(index("arm64", "amd64"))["manifests"]
    entries.insert(0, descriptor(mediaType=OCI_MANIFEST, digest=f"sha256:{7:064x}"))
    parsed = parse_document(index(manifests=entries))
    assert isinstance(parsed, Index)
    assert parsed.select("amd64").digest.hex == f"{1:064x}"
    assert parsed.select("s390x").digest.hex == f"{7:064x}"


@pytest.mark.parametrize("others", [["v3"], ["v2", "v3"]])
@pytest.mark.parametrize("baseline", [{}, {"variant": "v1"}])
def test_an_image_for_newer_machines_only_is_not_taken_where_there_is_another(
    others: list[str], baseline: dict[str, str]
) -> None:
    platforms = [{"variant": variant} for variant in others] + [baseline]
    entries = [
        descriptor(
            mediaType=OCI_MANIFEST,
            digest=f"sha256:{number:064x}",
            platform={"os": "linux", "architecture": "amd64", **platform},
        )
        for number, platform in enumerate(platforms)
    ]
    parsed = parse_document(index(manifests=entries))
    assert isinstance(parsed, Index)
    assert parsed.select("amd64").digest.hex == f"{len(others):064x}"


def test_a_descriptor_survives_being_written() -> None:
    value = descriptor(annotations={"a": "b"}, artifactType="t", platform={"os": "linux"})
    assert Descriptor.from_json(value).to_json() == value


def test_errors_are_of_the_tree() -> None:
    assert issubclass(FormatError, CkptfsError) and FormatError.exit_code == 7
