"""The metrics port of a real mount: what it serves, to whom, and that nobody who asks can hurt a reader."""

import contextlib
import http.client
import socket
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.command import ckptfs, mounted
from tests.support.tools import require

pytestmark = pytest.mark.fuse

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


def ask(address: str, method: str, target: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection(address, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, target)
        answer = connection.getresponse()
        return answer, answer.read().decode()


def values(text: str) -> dict[str, float]:
    return {one.name: one.value for family in text_string_to_metric_families(text) for one in family.samples}


def test_any_free_port_is_told_by_status(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path, "--metrics", "0") as mount:
        address = mount.first["metrics"]
        assert address == mount.status()["metrics"] and address.startswith("127.0.0.1:")
        assert address in ckptfs("status", mount.path).out
        (mount.path / "config.dump").read_bytes()
        answer, text = ask(address, "GET", "/metrics?x=y")
        assert answer.status == 200 and answer.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
        found = values(text)
        assert found["ckptfs_up"] == 1 and found["ckptfs_reads_total"] >= 1
        assert found["ckptfs_image_bytes"] == mount.status()["image_bytes"]
        assert values(ckptfs("status", mount.path, "--prometheus").out).keys() == found.keys()


def test_what_else_is_asked(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path, "--metrics", "127.0.0.1:0") as mount:
        address = mount.first["metrics"]
        head, nothing = ask(address, "HEAD", "/metrics")
        assert head.status == 200 and nothing == "" and int(head.getheader("Content-Length") or 0) > 1000
        assert ask(address, "GET", "/")[0].status == ask(address, "GET", "/etc/passwd")[0].status == 404
        assert ask(address, "POST", "/metrics")[0].status == 405
        host, _, port = address.rpartition(":")
        for request in (b"\r\n\r\n", b"\x16\x03\x01" + b"x" * 9000, b"GET /metrics\r\n\r\n", b"G" * 100_000):
            with socket.create_connection((host, int(port)), timeout=10) as client, contextlib.suppress(OSError):
                client.sendall(request)
                assert client.recv(100).startswith(b"HTTP/1.1 400 ")
        assert ask(address, "GET", "/metrics")[0].status == 200


def test_clients_that_never_end_hurt_nobody(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path, "--metrics", "0") as mount:
        host, _, port = mount.first["metrics"].rpartition(":")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(40)]
            for client in clients[:8]:
                client.sendall(b"GET /metr")
            began = time.monotonic()
            assert (mount.path / "checkpoint" / "pages-1.img").read_bytes()
            assert mount.status()["errors"] == [] and time.monotonic() - began < 5
            clients[-1].settimeout(2)
            with contextlib.suppress(ConnectionResetError):
                assert clients[-1].recv(1) == b"", "one too many is closed at once"
            clients[0].settimeout(10)
            assert clients[0].recv(1) == b"" and time.monotonic() - began < 9, "and the others after their time"
        assert ask(mount.first["metrics"], "GET", "/metrics")[0].status == 200


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = ckptfs("mount", f"oci:{LAYOUT}", tmp_path / "mnt", "--metrics", address, "--cache-dir", tmp_path / "c")
    assert done.code == 8 and address in done.line and "port 0" in done.line
    assert not (tmp_path / "mnt").is_mount()


@pytest.mark.parametrize("wrong", ["example.org:80", "127.0.0.1", "70000", "127.0.0.1:x", "::1:80", ""])
def test_what_is_no_address(wrong: str, tmp_path: Path) -> None:
    done = ckptfs("mount", f"oci:{LAYOUT}", tmp_path, "--metrics", wrong)
    assert done.code == 2 and "127.0.0.1:9180" in done.line


def test_from_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "ckptfs.toml"
    file.write_text('metrics = "[::1]:0"\n')
    shown = ckptfs("config", "show", "--config", file, "--json").json["metrics"]
    assert shown == {"value": "[::1]:0", "origin": str(file)}
    with mounted(f"oci:{LAYOUT}", tmp_path, "--config", file) as mount:
        assert mount.first["metrics"].startswith("[::1]:")
        assert ask(mount.first["metrics"], "GET", "/metrics")[0].status == 200
    file.write_text('metrics = "anywhere"\n')
    done = ckptfs("config", "show", "--config", file)
    assert done.code == 2 and f"{file}, line 1: metrics: 'anywhere' is no address and port" in done.line


def test_no_port_without_the_option(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        assert mount.first["metrics"] is None
        inodes = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
        fds = [link.readlink().name for link in Path(f"/proc/{mount.pid}/fd").iterdir() if link.is_symlink()]
        assert not inodes & {name.removeprefix("socket:[").rstrip("]") for name in fds}
