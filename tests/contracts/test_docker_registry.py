"""The registry that tests stand on: it answers, keeps its contents over a restart, asks for passwords, redirects."""

import base64
import hashlib
import urllib.error
import urllib.request

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.tools import require

pytestmark = pytest.mark.registry

BLOB = b"a blob " * 1000


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("docker-registry", "nginx")


def _call(method: str, url: str, data: bytes | None = None, **headers: str) -> urllib.request.Request:
    return urllib.request.Request(url, data=data, method=method, headers=headers)


def _push_blob(registry: DockerRegistry) -> str:
    digest = "sha256:" + hashlib.sha256(BLOB).hexdigest()
    with urllib.request.urlopen(_call("POST", f"http://{registry.host}/v2/some/repo/blobs/uploads/")) as response:
        place = response.headers["Location"]
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(_call("PUT", f"{place}&digest={digest}", BLOB, **headers)).close()
    return f"http://{registry.host}/v2/some/repo/blobs/{digest}"


def test_contents_and_port_stay_over_a_restart() -> None:
    with DockerRegistry() as registry:
        url = _push_blob(registry)
        registry.stop()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url)
        registry.start()
        with urllib.request.urlopen(_call("GET", url, Range="bytes=2-5")) as response:
            assert response.status == 206
            assert response.read() == BLOB[2:6]
    assert not registry.storage.exists()


def test_blobs_are_redirected_to_another_server() -> None:
    with DockerRegistry(redirect=True) as registry:
        request = _call("GET", _push_blob(registry), Range="bytes=0-9")
        with urllib.request.urlopen(request) as response:
            assert response.url.startswith(f"http://127.0.0.1:{registry.blob_port}/")
            assert response.status == 206
            assert response.read() == BLOB[:10]


def test_users_need_their_password() -> None:
    with DockerRegistry(users={"anna": "secret"}) as registry:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{registry.host}/v2/")
        refused.value.close()
        assert refused.value.code == 401
        basic = "Basic " + base64.b64encode(b"anna:secret").decode()
        with urllib.request.urlopen(_call("GET", f"http://{registry.host}/v2/", Authorization=basic)) as response:
            assert response.status == 200
