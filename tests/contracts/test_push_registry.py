"""Pushing to a real registry: only what is lacking, base layers mounted, and never a tag that shows half an image."""

import gzip
import io
import json
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptfs.errors import UnavailableError
from ckptfs.model.blob import MemoryBlob
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Reference
from ckptfs.push import PushOptions, PushResult, open_base, open_checkpoint, open_parent, open_target, push
from ckptfs.settings import Settings, Timeouts
from ckptfs.sources import Source, open_source
from ckptfs.telemetry import NetworkCounters
from tests.support.docker_registry import DockerRegistry
from tests.support.push import push_to_layout, tree_images, two_checkpoints
from tests.support.tools import require, run

pytestmark = pytest.mark.registry


@dataclass
class Client:
    """`ckptfs push SOURCE REGISTRY/NAME`; `counters` are of the pushing side."""

    registry: DockerRegistry
    counters: NetworkCounters
    settings: Settings

    def source(self, reference: Reference) -> Source:
        return open_source(reference, settings=self.settings, counters=NetworkCounters(), plain_http=True)

    def push(self, source: str | Path, name: str, *, base: str = "", parent: str = "") -> PushResult:
        reference = Reference.parse(self.registry.reference(name))
        target = open_target(reference, settings=self.settings, counters=self.counters, plain_http=True)
        options = PushOptions(settings=self.settings)
        with open_checkpoint(str(source), self.source, options) as checkpoint:
            image = open_base(checkpoint, base, self.source, options) if base else None
            before = open_parent(Reference.parse(parent), self.source, options) if parent else None
            return push(checkpoint, target, reference.tag, options, base=image, parent=before)


@pytest.fixture
def client(registry: DockerRegistry) -> Client:
    return Client(registry, NetworkCounters(), Settings())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "flat"
    folder.mkdir()
    tree_images(folder / "checkpoint")
    delta = io.BytesIO()
    with tarfile.open(fileobj=delta, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("etc/new"), io.BytesIO())
    (folder / "rootfs-diff.tar").write_bytes(delta.getvalue())
    (folder / "deleted.files").write_text('["/etc/gone"]')
    return folder


def put_base(client: Client, name: str) -> list[Descriptor]:
    """A base image of one large layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("etc/gone")
        info.size = 1_000_000
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    layer = gzip.compress(out.getvalue(), mtime=0)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(out.getvalue()))]},
        }
    ).encode()
    reference = Reference.parse(client.registry.reference(name))
    target = open_target(reference, settings=client.settings, counters=NetworkCounters(), plain_http=True)
    described = [
        Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(layer), len(layer)),
        Descriptor("application/vnd.oci.image.config.v1+json", Digest.of(config), len(config)),
    ]
    for descriptor, data in zip(described, (layer, config), strict=True):
        target.put_blob(descriptor, MemoryBlob(descriptor, data), lambda count: None)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described[1].to_json(),
        "layers": [described[0].to_json()],
    }
    target.put_manifest(json.dumps(manifest).encode(), OCI_MANIFEST, reference.tag)
    return described


def tags(registry: DockerRegistry, repository: str) -> list[str]:
    try:
        with urllib.request.urlopen(f"http://{registry.host}/v2/{repository}/tags/list", timeout=5) as reply:
            found: list[str] = json.load(reply)["tags"] or []
            return found
    except urllib.error.HTTPError as error:
        error.close()
        return []


def test_pushed_twice_sends_nothing_and_is_one_image(client: Client, folder: Path) -> None:
    require("skopeo")
    first = client.push(folder, "direct/twice:a")
    again = client.push(folder, "direct/twice:b")
    assert again.manifest == first.manifest
    assert (again.sent, again.present) == (0, first.sent)
    said = json.loads(
        run("skopeo", "inspect", "--tls-verify=false", f"docker://{client.registry.reference('direct/twice:b')}").stdout
    )
    assert said["Digest"] == str(first.manifest.digest)
    assert sorted(tags(client.registry, "direct/twice")) == ["a", "b"]


def test_an_image_of_a_registry_is_a_source(client: Client, folder: Path) -> None:
    first = client.push(folder, "direct/from:a")
    copied = client.push(client.registry.reference("direct/from:a"), "direct/to:b")
    assert copied.manifest == first.manifest


def test_layers_of_a_parent_are_mounted_not_sent(client: Client, tmp_path: Path) -> None:
    """In the same repository they are there, in another of the registry they are linked, elsewhere they are copied."""
    two_checkpoints(tmp_path)
    first = client.push(tmp_path / "first.tar", "parent/first:1")
    named = client.registry.reference("parent/first:1")
    pages = first.layers[-1].descriptor
    for name in ("parent/first:2", "parent/elsewhere:2"):
        second = client.push(tmp_path / "second.tar", name, parent=named)
        manifest = client.registry.manifest(name)
        assert isinstance(manifest["layers"], list)
        assert manifest["layers"][0]["digest"] == str(pages.digest)
        assert second.sent < pages.size / 10 and second.present >= pages.size
    whole = client.push(tmp_path / "second.tar", "parent/whole:2")
    assert whole.sent > pages.size
    other = f"oci:{tmp_path}/layout:1"
    push_to_layout(tmp_path / "first.tar", tmp_path / "layout", "1")
    copied = client.push(tmp_path / "second.tar", "parent/copied:2", parent=other)
    assert copied.manifest.digest == second.manifest.digest
    assert copied.sent > pages.size


def test_base_layers_are_mounted_not_sent(client: Client, folder: Path) -> None:
    base = put_base(client, "direct/base:1")
    result = client.push(folder, "direct/rooted:ck", base=client.registry.reference("direct/base:1"))
    assert result.rootfs is not None
    assert result.present >= base[0].size
    root = client.registry.manifest("direct/rooted:ck-rootfs")
    layers = root["layers"]
    assert isinstance(layers, list)
    assert layers[0]["digest"] == str(base[0].digest)
    assert len(layers) == 2
    notes = client.registry.manifest("direct/rooted:ck")["annotations"]
    assert isinstance(notes, dict)
    assert notes["dev.ckptfs.rootfs.digest"] == str(result.rootfs.digest)


def test_a_registry_that_goes_away_leaves_no_tag_and_the_next_push_goes_on(folder: Path) -> None:
    require("docker-registry")
    with DockerRegistry() as registry:
        timeouts = Timeouts(read_deadline=0.5, connect=0.2, retry_first=0.05, tries_per_host=2)
        client = Client(registry, NetworkCounters(), Settings(timeouts=timeouts))
        reference = Reference.parse(registry.reference("direct/lost:x"))
        target = open_target(reference, settings=client.settings, counters=client.counters, plain_http=True)
        options = PushOptions(settings=client.settings)
        with open_checkpoint(str(folder), client.source, options) as checkpoint:

            def stop_midway(progress: object) -> None:
                if client.counters.requests > 4:
                    registry.stop()

            with pytest.raises(UnavailableError):
                push(checkpoint, target, "x", options, stop_midway)
        registry.start()
        assert tags(registry, "direct/lost") == []
        result = Client(registry, NetworkCounters(), Settings()).push(folder, "direct/lost:x")
        assert tags(registry, "direct/lost") == ["x"]
        assert result.sent + result.present > 0
