"""Profiles in a registry: attached to an image, merged, found by a mount for one request, and harmless when bad."""

import base64
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ckptfs.image.profiles import attached, publish
from ckptfs.image.publishing import publish_index
from ckptfs.model.annotations import CREATED, INDEX_ARTIFACT, PROFILE_ARTIFACT
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Manifest, Reference
from ckptfs.model.profile import Profile, Run, encode_profile
from ckptfs.settings import KiB, Limits, MiB, Settings
from ckptfs.sources import Source, open_source
from ckptfs.sources.upload import RegistryTarget
from ckptfs.telemetry import NetworkCounters
from tests.support.command import ckptfs, mounted
from tests.support.disks import disk_of
from tests.support.fake_registry import FakeRegistry, Silent
from tests.support.tools import require, wait_for

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
PAGES = b"checkpoint/pages-1.img"
LIMITS = Limits()


class Case:
    """An image in a registry, with the referrers API or without."""

    def __init__(self, registry: FakeRegistry) -> None:
        registry.add_layout(LAYOUT, "repo")
        self.registry = registry
        self.reference = registry.reference("repo:latest")
        document = self.source.resolve()
        assert isinstance(document, Manifest)
        self.image = document

    @property
    def source(self) -> Source:
        return open_source(Reference.parse(self.reference), settings=Settings(), counters=NetworkCounters())

    @property
    def target(self) -> RegistryTarget:
        return RegistryTarget(Reference.parse(self.reference), Settings(), NetworkCounters())

    def publish(self, profile: Profile, *, merge: bool = False) -> Profile:
        return publish(self.source, self.target, self.image, profile, LIMITS, merge=merge).profile

    @property
    def found(self) -> Profile | None:
        return attached(self.source, self.image.digest, LIMITS)

    def turn(self) -> None:
        """What is attached is listed the other way round from now on."""
        manifests, name = self.registry.manifests, ("repo", f"sha256-{self.image.digest.hex}")
        if name in manifests:
            raw, kind = manifests[name]
            listed = json.loads(raw)
            listed["manifests"].reverse()
            manifests[name] = (json.dumps(listed).encode(), kind)
        else:
            self.registry.manifests = dict(reversed(manifests.items()))

    def attach(self, created: str, blob: bytes = b"{}", subject: Digest | None = None, **annotations: str) -> None:
        """An artifact as somebody else would write it."""
        described = Descriptor(PROFILE_ARTIFACT, Digest.of(blob), len(blob))
        self.registry.add_blob(blob, "repo")
        artifact: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": PROFILE_ARTIFACT,
            "config": Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"), 2).to_json(),
            "layers": [described.to_json()],
            "subject": Descriptor(OCI_MANIFEST, subject or self.image.digest, len(self.image.raw)).to_json(),
            "annotations": {CREATED: created, **{name.replace("_", "."): text for name, text in annotations.items()}},
        }
        self.target.put_manifest(json.dumps(artifact).encode(), OCI_MANIFEST, "")


@pytest.fixture(params=[True, False], ids=["api", "tag"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with FakeRegistry(referrers=request.param) as registry:
        yield Case(registry)


def profile(*offsets: int, at: int = 0, recordings: int = 1) -> Profile:
    return Profile(tuple(Run(PAGES, offset, 4 * KiB, at) for offset in offsets), recordings)


def test_an_image_without_a_profile_has_none(case: Case) -> None:
    assert case.found is None


def test_a_small_profile_is_found_with_the_list_of_referrers(case: Case) -> None:
    case.publish(profile(0, MiB))
    before = len(case.registry.log)
    assert case.found == profile(0, MiB)
    assert len(case.registry.log) - before == (1 if case.registry.referrers else 2)


def test_a_large_profile_is_fetched(case: Case) -> None:
    numbers = random.Random(1)
    large = Profile(tuple(Run(PAGES, numbers.randrange(1 << 40), 4 * KiB, at) for at in range(5000)))
    case.publish(large)
    assert case.found == large


def test_the_newest_counts_and_has_what_was_there(case: Case) -> None:
    case.publish(profile(0))
    case.publish(profile(MiB), merge=True)
    assert case.found == profile(0, MiB, recordings=2)
    case.publish(profile(2 * MiB))
    assert case.found == profile(2 * MiB)


def test_the_newest_counts_in_whatever_order_they_are_listed(case: Case) -> None:
    """Some registries list the newest first, some by digest; both of these were pushed within one second."""
    for number in range(2):
        case.publish(profile(number * MiB))
    for _ in range(2):
        case.turn()
        assert case.found == profile(MiB)


@pytest.mark.parametrize(
    "created", ["2999-12-31T23:59:59+01:00", "2999-12-31", "9999-12-31T23:59:59.999999Z", "soon", ""]
)
def test_the_last_one_counts_whatever_clocks_say(case: Case, created: str) -> None:
    """One of a machine whose clock is ahead; dates that are none, and one that nothing comes after."""
    case.attach(created, encode_profile(profile(0)))
    case.publish(profile(MiB))
    assert case.found == profile(MiB)
    case.publish(profile(2 * MiB), merge=True)
    assert case.found == profile(MiB, 2 * MiB, recordings=2)


def test_a_list_of_profiles_does_not_grow_for_ever() -> None:
    """Where the registry keeps none itself; every mount fetches it."""
    with FakeRegistry(referrers=False) as registry:
        case = Case(registry)
        publish_index(case.target, case.image, {case.image.layers[0].digest: b"index"})
        for number in range(9):
            case.publish(profile(number * MiB), merge=True)
        raw, _ = registry.manifests["repo", f"sha256-{case.image.digest.hex}"]
        kinds = [entry["artifactType"] for entry in json.loads(raw)["manifests"]]
        assert kinds == [INDEX_ARTIFACT] + 3 * [PROFILE_ARTIFACT]
        assert case.found == profile(*(number * MiB for number in range(9)), recordings=9)


def bomb() -> str:
    return base64.b64encode(zstandard.ZstdCompressor().compress(bytes(64 * MiB))).decode()


def no_size() -> str:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(encode_profile(profile(0)))
    return base64.b64encode(frame).decode()


@pytest.mark.parametrize(
    "inline",
    ["", "!", "AAAA", bomb(), no_size(), base64.b64encode(zstandard.compress(b"[]")).decode()],
    ids=["empty", "no base64", "no zstd", "bomb", "no size", "no profile"],
)
def test_a_bad_profile_is_passed_over(inline: str, case: Case) -> None:
    case.publish(profile(0))
    case.attach("9999-01-01T00:00:00Z", dev_ckptfs_profile=inline)
    assert case.found == profile(0)


def test_a_bad_document_is_passed_over(case: Case) -> None:
    case.publish(profile(0))
    case.attach("9999-01-01T00:00:00Z", b"rubbish")
    case.attach("9999-01-02T00:00:00Z", b'{"version": 1, "files": [], "runs": ' + b"[" * 5 * MiB)
    assert case.found == profile(0)


def test_nobody_can_attach_a_profile_by_listing_it(case: Case) -> None:
    """The list says that an artifact belongs to the image; the artifact itself says to which."""
    other = Digest.of(b"another image")
    case.attach("2000-01-01T00:00:00Z", encode_profile(profile(7 * MiB)), subject=other)
    artifact = attached(case.source, other, LIMITS)
    assert artifact == profile(7 * MiB) and case.found is None


# -- a mount finds it --------------------------------------------------------------------------------------------------


@pytest.fixture
def mountable(case: Case) -> Case:
    require("fusermount3")
    return case


def asked_for_profiles(case: Case) -> int:
    return len([a for a in case.registry.requests("GET") if "referrers" in a.path or "/manifests/sha256-" in a.path])


@pytest.mark.fuse
def test_a_mount_fetches_first_what_the_profile_says(mountable: Case, tmp_path: Path) -> None:
    with mounted(mountable.reference, tmp_path / "sized", "--prefetch", "none", "--no-background-fetch") as mount:
        size = (mount.path / PAGES.decode()).stat().st_size
    last = size - 4 * KiB
    mountable.publish(profile(last, at=900))
    with mounted(mountable.reference, tmp_path, "--no-background-fetch") as mount:
        wait_for("the profile", lambda: mount.status()["profile"] == {"runs": 1, "recordings": 1})
        wait_for("its chunk", lambda: mount.status()["network"]["in_flight"] == 0)
        misses = mount.status()["reads"]["misses"]
        with (mount.path / PAGES.decode()).open("rb", buffering=0) as pages:
            pages.seek(last)
            assert len(pages.read(4 * KiB)) == 4 * KiB
        assert mount.status()["reads"]["misses"] == misses


@pytest.mark.fuse
def test_looking_for_a_profile_is_one_request_and_only_when_it_is_of_use(mountable: Case, tmp_path: Path) -> None:
    most = 1 if mountable.registry.referrers else 2
    with mounted(mountable.reference, tmp_path, "--prefetch", "none") as mount:
        assert mount.status()["profile"] is None
        foreign = asked_for_profiles(mountable)
    with mounted(mountable.reference, tmp_path, "--no-background-fetch") as mount:
        wait_for("the request", lambda: asked_for_profiles(mountable) > foreign)
        wait_for("silence", lambda: mount.status()["network"]["in_flight"] == 0)
        digest = mount.status()["digest"]
    assert asked_for_profiles(mountable) - foreign <= most
    before = len(mountable.registry.log)
    pinned = f"{mountable.registry.host}/repo@{digest}"
    with mounted(pinned, tmp_path, "--no-background-fetch") as mount:
        time.sleep(0.3)
    assert not [a for a in mountable.registry.log[before:] if "referrers" in a.path or "sha256-" in a.path]


@pytest.mark.fuse
def test_a_registry_that_does_not_answer_about_profiles_delays_nothing(tmp_path: Path) -> None:
    require("fusermount3")
    with FakeRegistry({("/referrers/", None): Silent()}, referrers=True) as registry:
        case = Case(registry)
        with mounted(case.reference, tmp_path) as mount:
            assert mount.first["ready_ms"] < 5000
            assert (mount.path / "config.dump").read_bytes()


# -- the commands ------------------------------------------------------------------------------------------------------


def recording(folder: Path, *offsets: int) -> Path:
    file = folder / "reads.jsonl"
    facts = [{"t_ms": 10, "path": PAGES.decode(), "offset": at, "length": 4 * KiB, "hit": False} for at in offsets]
    file.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return file


def test_a_profile_of_many_files_is_shown(tmp_path: Path) -> None:
    many = Profile(tuple(Run(f"{number}".encode(), 0, 1, 0) for number in range(50_000)))
    (tmp_path / "many.json").write_bytes(encode_profile(many))
    shown = ckptfs("profile", "show", tmp_path / "many.json", "--json", timeout=30)
    assert len(shown.json["files"]) == shown.json["runs"] == 50_000


def test_record_show_push(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    done = ckptfs("profile", "record", "--from", recording(tmp_path, 5 * MiB, 9 * MiB), case.reference, "--out", out)
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    shown = ckptfs("profile", "show", out, "--json").json
    assert (shown["runs"], shown["bytes"], shown["recordings"]) == (2, 8 * KiB, 1)
    pushed = ckptfs("profile", "push", out, case.reference, "--json")
    assert pushed.code == 0, pushed.err
    assert pushed.json["image"] == str(case.image.digest)
    assert case.found == profile(5 * MiB, 9 * MiB, at=10)
    assert ckptfs("profile", "push", out, case.reference).code == 0
    assert ckptfs("profile", "show", case.reference, "--json").json["recordings"] == 2
    assert ckptfs("profile", "push", out, case.reference, "--replace").code == 0
    text = ckptfs("profile", "show", case.reference, "--runs").out
    assert str(5 * MiB) in text and str(9 * MiB) in text


def test_recordings_merge(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [recording(tmp_path / "a", 0, 5 * MiB), recording(tmp_path / "b", 5 * MiB, 9 * MiB)]
    assert ckptfs("profile", "record", "--from", files[0], "--from", files[1], "--out", out).code == 0
    shown = ckptfs("profile", "show", out, "--json").json
    assert (shown["runs"], shown["recordings"]) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "{ref}"], 3),
        (["show", "{bad}"], 7),
        (["push", "{bad}", "{ref}"], 7),
        (["push", "{good}", "oci:{folder}"], 2),
        (["record", "{ref}"], 2),
        (["record"], 2),
        (["record", "--from", "{reads}", "{ref}", "--", "true"], 2),
        (["record", "--from", "{bad}", "{ref}"], 7),
        (["record", "--from", "{none}", "{ref}"], 3),
        (["record", "--from", "{reads}", "{ref}", "--out", "/nowhere/p.json"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: list[str], code: int, case: Case, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}\n")
    (tmp_path / "none").write_text("")
    (tmp_path / "good").write_bytes(encode_profile(profile(0)))
    names = {"ref": case.reference, "folder": str(tmp_path), "reads": str(recording(tmp_path, 0))}
    names |= {name: str(tmp_path / name) for name in ("bad", "none", "good")}
    done = ckptfs("profile", *(argument.format(**names) for argument in arguments))
    assert done.code == code and done.line


def test_what_cannot_be_written_is_told_before_the_restore(case: Case, tmp_path: Path) -> None:
    command = ["sh", "-c", f"touch {tmp_path}/has-run"]
    done = ckptfs("profile", "record", case.reference, "--out", "/nowhere/p.json", "--", *command)
    assert done.code == 2 and "/nowhere/p.json cannot be written" in done.line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("record", "--from", "{reads}", "--out", "{out}"), ("plot", "{reads}", "{out}")])
def test_a_full_disk_leaves_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    reads = recording(tmp_path, 0, 5 * MiB)
    with disk_of(tmp_path / "small", "size=16k") as small:
        (small / "filler").write_bytes(bytes(16 * KiB))
        done = ckptfs("profile", *(word.format(reads=reads, out=small / "out.svg") for word in words))
        assert done.code == 8 and "out.svg cannot be written: No space left on device; name one" in done.line
        assert [path.name for path in small.iterdir()] == ["filler"]


def test_reads_from_front_to_back_are_no_working_set(tmp_path: Path) -> None:
    facts = [{"t_ms": 10, "path": PAGES.decode(), "offset": at * MiB, "length": MiB, "hit": False} for at in range(9)]
    (tmp_path / "reads").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    done = ckptfs("profile", "record", "--from", tmp_path / "reads", "--out", tmp_path / "p.json")
    assert done.code == 3 and "nothing was read out of sequence" in done.line and not (tmp_path / "p.json").exists()


@pytest.mark.fuse
@pytest.mark.parametrize(("command", "code"), [(["sh", "-c", "exit 3"], 8), (["/no/such/program"], 2), (["true"], 3)])
def test_a_command_that_fails_leaves_nothing(
    command: list[str], code: int, mountable: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    out = tmp_path / "p.json"
    done = ckptfs(
        "profile", "record", mountable.reference, "--cache-dir", tmp_path / "cache", "--out", out, "--", *command
    )
    assert done.code == code and done.line
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.fuse
def test_what_ends_it_ends_its_command_and_the_mount(
    mountable: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = ["profile", "record", mountable.reference, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "p.json"]
    command = ["--", "sh", "-c", f"touch {tmp_path}/begun; exec sleep 60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptfs", *map(str, words), *command], stderr=subprocess.PIPE, text=True
    )
    wait_for("the command", (tmp_path / "begun").exists)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 8 and "failed with exit code -15; nothing has been written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "cache"]


@pytest.mark.fuse
def test_a_command_finds_the_mount_by_its_arguments_and_environment(mountable: Case, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    script = 'test "$1" = "$CKPTFS_MOUNT" && cat "$1/config.dump" > /dev/null'
    arguments = ["profile", "record", mountable.reference, "--cache-dir", tmp_path / "cache", "--out", out]
    done = ckptfs(*arguments, "--", "sh", "-c", script, "sh", "{}")
    assert done.code == 0, done.err
    assert [file["path"] for file in ckptfs("profile", "show", out, "--json").json["files"]] == ["config.dump"]
