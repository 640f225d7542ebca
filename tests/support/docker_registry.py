"""A real registry: Debian's docker-registry on a free loopback port, with its storage in a folder that goes away.

Owns the registry process and, with `redirect`, an nginx that serves blobs as an object store would. Never used for
faults: the registry that misbehaves on a script is another module. Called by fixtures, tests and the demo.
"""

import base64
import ctypes
import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

from tests.support.nodes import Node
from tests.support.tools import end, free_port, start, wait_for

_MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.manifest.v1",
        "oci.image.index.v1",
        "docker.distribution.manifest.v2",
        "docker.distribution.manifest.list.v2",
    )
)


class DockerRegistry:
    """`with DockerRegistry() as registry:` … `registry.host` is "127.0.0.1:PORT".

    `users` maps names to passwords and turns basic authentication on. `redirect` answers blob requests with a 307 to
    another server, as registries in front of an object store do. `proxy_of`: the URL of a registry of which it is a
    pull-through mirror. `node`: where it runs, in place of this machine. `stop` and `start` keep port and contents.
    """

    def __init__(
        self,
        *,
        users: dict[str, str] | None = None,
        redirect: bool = False,
        proxy_of: str = "",
        node: Node | None = None,
    ) -> None:
        self._users = users or {}
        self._proxy_of = proxy_of
        self._node = node
        self._folder = Path(tempfile.mkdtemp(prefix="registry-"))
        self.storage = self._folder / "storage"
        self.port = free_port()
        self.host = f"{node.address if node else '127.0.0.1'}:{self.port}"
        self.blob_port = free_port() if redirect else 0
        self._registry: subprocess.Popen[bytes] | None = None
        self._blob_server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._configure()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Returns when both servers answer."""
        with (self._folder / "log").open("ab") as log:
            command: list[str | Path] = ["docker-registry", "serve", self._folder / "config.yml"]
            self._registry = start(*(self._node.command(*command) if self._node else command), stdout=log, stderr=log)
            if self.blob_port:
                self._blob_server = start("nginx", "-c", self._folder / "nginx.conf", stdout=log, stderr=log)
        wait_for("docker-registry", lambda: self._answers(f"http://{self.host}/v2/"))
        if self.blob_port:
            wait_for("nginx", lambda: self._answers(f"http://127.0.0.1:{self.blob_port}/"))

    def stop(self) -> None:
        for process in (self._registry, self._blob_server):
            if process is not None:
                end(process)
        self._registry = self._blob_server = None

    def reference(self, name: str) -> str:
        """`name` ("repo:tag") as tools want it: "127.0.0.1:PORT/repo:tag"."""
        return f"{self.host}/{name}"

    def manifest(self, name: str) -> dict[str, object]:
        """The manifest of "repo:tag" or "repo@digest" as the registry serves it."""
        repository, _, tag = name.partition("@") if "@" in name else name.rpartition(":")
        request = urllib.request.Request(f"http://{self.host}/v2/{repository}/manifests/{tag}")
        request.add_header("Accept", _MANIFESTS)
        for user, password in list(self._users.items())[:1]:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
        with urllib.request.urlopen(request, timeout=10) as response:
            manifest: dict[str, object] = json.load(response)
            return manifest

    def _answers(self, url: str) -> bool:
        if self._registry is None or self._registry.poll() is not None:
            raise RuntimeError("docker-registry ended: " + (self._folder / "log").read_text()[-2000:])
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except urllib.error.HTTPError as error:
            error.close()  # 401 and 403 are answers
        except OSError:
            return False
        return True

    def _configure(self) -> None:
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": {"addr": self.host},
        }
        if self._proxy_of:
            config["proxy"] = {"remoteurl": self._proxy_of}
        if self._users:
            passwords = self._folder / "htpasswd"
            passwords.write_text("".join(f"{user}:{_bcrypt(word)}\n" for user, word in self._users.items()))
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(passwords)}}
        if self.blob_port:
            base = f"http://127.0.0.1:{self.blob_port}"
            config["middleware"] = {"storage": [{"name": "redirect", "options": {"baseurl": base}}]}
            (self._folder / "nginx.conf").write_text(self._nginx())
        self.storage.mkdir(exist_ok=True)
        (self._folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML

    def _nginx(self) -> str:
        user = "user root;" if self._folder.owner() == "root" else ""
        temporary = " ".join(
            f"{kind}_temp_path {self._folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        return (
            f"{user} daemon off; pid {self._folder}/nginx.pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; default_type application/octet-stream; {temporary}\n"
            f"  server {{ listen 127.0.0.1:{self.blob_port}; root {self.storage}; }} }}\n"
        )


def _bcrypt(password: str) -> str:
    """docker-registry takes no other hash; the C library's crypt makes it."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    hashed = crypt(password.encode(), b"$2b$05$abcdefghijklmnopqrstuu")
    assert isinstance(hashed, bytes)
    return hashed.decode()
