"""Where a registry may send us, and where not."""

from ipaddress import ip_address

import pytest

from ckptfs.errors import UnavailableError
from ckptfs.sources.origin import Address, Origin, Reach, Territory, is_loopback

HOSTS = {
    "registry.example": ["93.184.216.34"],
    "cdn.example": ["93.184.216.35", "2606:2800:220:1::1"],
    "sneaky.example": ["93.184.216.36", "10.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "inside.example": ["10.0.0.7"],
    "neighbour.example": ["10.0.0.8"],
}


def resolve(host: str, port: int) -> list[Address]:
    try:
        return [ip_address(host)]
    except ValueError:
        return [ip_address(address) for address in HOSTS[host]]


PUBLIC = Territory(Origin.of("https://registry.example"), resolve)
INSIDE = Territory(Origin.of("https://inside.example:5000"), resolve)
BASE = "https://registry.example/v2/r/blobs/sha256:0?x=y"


@pytest.mark.parametrize(
    ("url", "target", "reach"),
    [
        ("https://cdn.example/x?sig=1", "https://cdn.example/x?sig=1", Reach.PUBLIC),
        ("/elsewhere", "https://registry.example/elsewhere", Reach.ANYWHERE),
        ("https://registry.example:8443/x", "https://registry.example:8443/x", Reach.ANYWHERE),
        ("//cdn.example/x", "https://cdn.example/x", Reach.PUBLIC),
    ],
)
def test_allowed(url: str, target: str, reach: Reach) -> None:
    assert PUBLIC.admit(url, BASE) == (target, reach)


@pytest.mark.row("N16")
@pytest.mark.parametrize(
    "url",
    [
        "http://cdn.example/x",
        "http://registry.example/x",
        "file:///etc/passwd",
        "ftp://cdn.example/",
        "gopher://cdn.example/",
        "https://cdn.example\\@169.254.169.254/",
        "https://user:canary@cdn.example/",
        "https://[::1/",
        "https://cdn.example:99999999/",
        "https://169.254.169.254/latest/meta-data",
        "https://metadata.example/",
        "https://sneaky.example/",
        "https://inside.example/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[fe80::1]/",
        "https://0.0.0.0/",
        "https://100.64.0.1/",
        "https://[fd00:ec2::254]/",
    ],
)
def test_refused(url: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        PUBLIC.admit(url, BASE)
    assert not caught.value.retryable
    assert "canary" not in str(caught.value)


@pytest.mark.row("N16")
def test_a_registry_inside_may_name_its_neighbours_but_no_metadata_service() -> None:
    base = "https://inside.example:5000/v2/"
    assert INSIDE.admit("https://neighbour.example/x", base)[1] is Reach.SITE
    assert INSIDE.admit("https://cdn.example/x", base)[1] is Reach.SITE
    for url in ("https://169.254.169.254/", "https://metadata.example/", "https://[fe80::1]/", "https://0.0.0.0/"):
        with pytest.raises(UnavailableError, match="refused"):
            INSIDE.admit(url, base)


def test_origins() -> None:
    assert str(Origin.of("https://H.example:443/x")) == "https://h.example"
    assert str(Origin.of("http://h.example:5000")) == "http://h.example:5000"
    assert Origin.of("https://[::1]:5000/").netloc == "[::1]:5000"
    assert Origin.of("https://h.example./") == Origin.of("https://h.example")
    assert Origin.of("https://h.example") != Origin.of("http://h.example:443")


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:5000"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example", "10.0.0.1:5000", "[::2]:1", "127.0.0.1.example", "registry"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
