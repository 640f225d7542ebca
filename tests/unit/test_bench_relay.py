"""An image served on loopback: what pullers ask for, and what they must not get."""

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.bench.relay import Relay
from ckptfs.errors import CkptfsError, NotFoundError
from ckptfs.model.oci import Reference
from ckptfs.settings import Registries
from tests.support.fake_registry import FakeRegistry

LAYOUT = Path(__file__).parents[1] / "data/corpus/counter/k8s-zstdchunked.oci"


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    with Relay(Reference.parse(f"oci:{LAYOUT}")) as relay:
        yield relay


def get(relay: Relay, path: str, *, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(f"http://{relay.address}/v2/{path}", headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def layer(relay: Relay) -> tuple[str, int]:
    found = json.loads(get(relay, "image/manifests/latest")[1])["layers"][0]
    return found["digest"], found["size"]


def test_a_manifest_by_tag_and_by_digest(relay: Relay) -> None:
    assert get(relay, "")[0] == 200
    _, raw, headers = get(relay, "image/manifests/latest")
    assert headers["Docker-Content-Digest"] == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert get(relay, f"image/manifests/{headers['Docker-Content-Digest']}")[1] == raw
    status, body, head = get(relay, "image/manifests/latest", method="HEAD")
    assert (status, body, head["Content-Length"]) == (200, b"", str(len(raw)))


def test_blobs_whole_and_in_ranges(relay: Relay) -> None:
    digest, size = layer(relay)
    _, whole, headers = get(relay, f"image/blobs/{digest}")
    assert f"sha256:{hashlib.sha256(whole).hexdigest()}" == digest
    assert headers["Content-Length"] == str(size)
    status, part, headers = get(relay, f"image/blobs/{digest}", Range="bytes=100-4195")
    assert (status, part, headers["Content-Range"]) == (206, whole[100:4196], f"bytes 100-4195/{size}")
    assert get(relay, f"image/blobs/{digest}", Range=f"bytes={size - 10}-")[1] == whole[-10:]
    assert get(relay, f"image/blobs/{digest}", Range=f"bytes={size}-")[0] == 416


@pytest.mark.parametrize(
    "path",
    [
        f"image/blobs/sha256:{'0' * 64}",
        f"image/manifests/sha256:{'0' * 64}",
        f"image/manifests/sha256-{'0' * 64}",  # the tag of referrers: there are none
        f"image/referrers/sha256:{'0' * 64}",
        "image/blobs/../../etc/passwd",
        "_catalog",
    ],
)
def test_nothing_else_is_served(path: str, relay: Relay) -> None:
    assert get(relay, path)[0] == 404


def test_it_ends_with_its_block() -> None:
    with Relay(Reference.parse(f"oci:{LAYOUT}")) as relay:
        address = relay.address
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://{address}/v2/", timeout=1)


def test_an_image_that_is_not_there_is_said_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CkptfsError) as raised, Relay(Reference.parse(f"oci:{tmp_path}/nowhere")):
        pass
    assert f"there is no directory {tmp_path}/nowhere" in str(raised.value) and capfd.readouterr().err == ""
    assert raised.value.exit_code == NotFoundError.exit_code
    assert os.listdir(tmp_path) == []


def test_mirrors_that_are_configured_are_asked() -> None:
    with FakeRegistry() as mirror:
        mirror.add_layout(LAYOUT, "app/counter")
        registries = Registries(mirrors={"registry.invalid": (f"{mirror.host}",)}, mirror_tags=True)
        with Relay(Reference.parse("registry.invalid/app/counter:latest"), registries=registries) as relay:
            manifest = json.loads(get(relay, "app/counter/manifests/latest")[1])
            (layer,) = manifest["layers"]
            assert get(relay, f"app/counter/blobs/{layer['digest']}")[1] == mirror.blobs[layer["digest"]]
