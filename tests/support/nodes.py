"""Several machines in one: network namespaces on a bridge, each with an address of its own; needs root.

Owns the bridge and the namespaces, which go away with the block whatever happens in it. What a node sends is counted by
the kernel, and can be limited. Only the network is apart: files, mounts and processes are those of this machine.
Called by tests and scripts/soak.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, Self

from tests.support.tools import run, start

_NETWORK = "198.18"  # RFC 2544: for benchmarks, routed nowhere
_PREFIX = 24


class Node:
    """A namespace; `address` is where the others find it."""

    def __init__(self, name: str, address: str, outside: str) -> None:
        self.name = name
        self.address = address
        self._outside = outside  # its interface's other end

    def command(self, *words: str | Path) -> list[str]:
        """The command line that runs `words` in this namespace; mounts that they make are seen outside."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *map(str, words)]

    def run(self, *words: str | Path, **options: Any) -> str:
        return run(*self.command(*words), **options).stdout

    def start(self, *words: str | Path, **options: Any) -> Any:
        return start(*self.command(*words), **options)

    def sent_bytes(self) -> int:
        """What has left the node so far, headers included."""
        return int(Path(f"/sys/class/net/{self._outside}/statistics/rx_bytes").read_text())

    def limit(self, rate: str) -> None:
        """Nothing leaves the node faster than `rate` (tc's units: 200mbit)."""
        bucket = ["tbf", "rate", rate, "burst", "64kb", "latency", "50ms"]
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", *bucket)


class Nodes:
    """A context manager; `add` makes one more node. This machine itself is on the bridge as well."""

    def __init__(self) -> None:
        self._tag = f"ck{os.getpid() % 100_000}"
        self._net = f"{_NETWORK}.{os.getpid() % 254}"
        self._nodes: list[Node] = []

    def __enter__(self) -> Self:
        try:
            run("ip", "link", "add", self._tag, "type", "bridge")
            run("ip", "address", "add", f"{self._net}.254/{_PREFIX}", "dev", self._tag)
            run("ip", "link", "set", self._tag, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            with contextlib.suppress(RuntimeError):  # the others have to go as well
                run("ip", "netns", "delete", node.name)
        if Path(f"/sys/class/net/{self._tag}").exists():
            run("ip", "link", "delete", self._tag)

    def add(self) -> Node:
        number = len(self._nodes) + 1
        outside = f"{self._tag}v{number}"
        node = Node(f"{self._tag}n{number}", f"{self._net}.{number}", outside)
        run("ip", "netns", "add", node.name)
        self._nodes.append(node)
        run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", node.name)
        run("ip", "link", "set", outside, "master", self._tag, "up")
        node.run("ip", "link", "set", "lo", "up")
        node.run("ip", "address", "add", f"{node.address}/{_PREFIX}", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        return node
