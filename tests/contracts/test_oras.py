"""oras as an independent client: it reads what we publish, and we read what it publishes."""

import hashlib
import json
from pathlib import Path
from random import Random

import oras.client
import pytest

from ckptfs.model.oci import OCI_MANIFEST, Digest, Manifest
from ckptfs.sources.layout import LayoutSource
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry
from tests.support.sources import client

DATA = Random(8).randbytes(5_000_000)
KIND = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "layer.tar"
    path.write_bytes(DATA)
    return path


def test_we_read_what_oras_pushes(registry: DockerRegistry, file: Path) -> None:
    other = oras.client.OrasClient(insecure=True)
    name = registry.reference("oras:pushed")
    answer = other.push(name, files=[f"{file}:{KIND}"], disable_path_validation=True, quiet=True)
    answer.close()
    other.session.close()
    with client(registry.host) as c:
        source = c.source("oras:pushed")
        image = source.resolve()
        assert isinstance(image, Manifest)
        (layer,) = image.layers
        assert (layer.media_type, layer.digest) == (KIND, Digest.of(DATA))
        assert source.blob(layer).read_at(1_000_000, 123_456) == DATA[1_000_000:1_123_456]


def test_oras_reads_what_we_push(registry: DockerRegistry, tmp_path: Path) -> None:
    with FakeRegistry() as origin, client(origin) as from_, client(registry.host) as to:
        title = {"org.opencontainers.image.title": "layer.tar"}
        origin.add_image("repo", "latest", [(KIND, DATA)])
        source, target = from_.source(), to.target("oras-reads:latest")
        image = source.resolve()
        assert isinstance(image, Manifest)
        document = json.loads(image.raw)
        document["layers"][0]["annotations"] = title
        for descriptor in (image.config, *image.layers):
            target.put_blob(descriptor, source.blob(descriptor), lambda count: None)
        target.put_manifest(json.dumps(document).encode(), OCI_MANIFEST, "latest")
    other = oras.client.OrasClient(insecure=True)
    (path,) = other.pull(target=registry.reference("oras-reads:latest"), outdir=str(tmp_path / "out"))
    other.session.close()
    assert hashlib.sha256(Path(path).read_bytes()).digest() == hashlib.sha256(DATA).digest()


def test_we_read_the_layout_that_oras_makes(registry: DockerRegistry, file: Path, tmp_path: Path) -> None:
    from oras.layout import NewLayoutFromRegistry

    from ckptfs.model.oci import Reference

    other = oras.client.OrasClient(insecure=True)
    name = registry.reference("oras-layout:latest")
    other.push(name, files=[f"{file}:{KIND}"], disable_path_validation=True, quiet=True).close()
    NewLayoutFromRegistry(str(tmp_path / "layout"), other, name, tag="kept")
    other.session.close()
    source = LayoutSource(Reference("oci", path=str(tmp_path / "layout"), tag="kept"))
    image = source.resolve()
    assert isinstance(image, Manifest)
    assert source.blob(image.layers[0]).read_at(0, len(DATA)) == DATA
