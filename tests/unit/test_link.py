"""The link emulator over real sockets: its rate and delay as a client measures them, ends of streams, refusals."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ckptfs.bench.link import ShapedLink, bits_per_second, main, seconds
from ckptfs.errors import UsageError

pytestmark = pytest.mark.alone

RTT = 0.020
RATE = 200e6


def _answer(client: socket.socket) -> None:
    """Sends as many bytes as each 16-byte request says; hangs up when the client does."""
    with client, contextlib.suppress(ConnectionError):
        while request := client.recv(16):
            client.sendall(bytes(int(request)))


@pytest.fixture
def target() -> Iterator[str]:
    """The address of a server that answers requests made of a number with that many bytes."""
    threads: list[threading.Thread] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                client, _ = server.accept()
                if over.is_set():
                    client.close()
                    return
                threads.append(threading.Thread(target=_answer, args=(client,)))
                threads[-1].start()

        threads.append(threading.Thread(target=serve))
        threads[0].start()
        host, port = server.getsockname()
        yield f"{host}:{port}"
        over.set()
        socket.create_connection((host, port)).close()
        for thread in threads:
            thread.join()


@pytest.fixture
def link(target: str) -> Iterator[ShapedLink]:
    with ShapedLink(target, rtt=RTT, rate=RATE) as link:
        yield link


def connect(link: ShapedLink) -> socket.socket:
    host, port = link.address.split(":")
    return socket.create_connection((host, int(port)))


def ask(client: socket.socket, count: int) -> float:
    """Seconds until all of `count` bytes have come."""
    began = time.monotonic()
    client.sendall(b"%16d" % count)
    while count:
        count -= len(client.recv(min(count, 1 << 20)))
    return time.monotonic() - began


def test_a_new_connection_costs_one_round_trip_more(link: ShapedLink) -> None:
    began = time.monotonic()
    with connect(link) as client:
        ask(client, 1)
        assert 2 * RTT <= time.monotonic() - began < 3 * RTT
        later = min(ask(client, 1) for _ in range(10))
        assert RTT - 0.0002 <= later < RTT + 0.001


def test_one_connection_fills_the_link(link: ShapedLink) -> None:
    size = 20_000_000
    with connect(link) as client:
        ask(client, 1)
        rate = size * 8 / (ask(client, size) - RTT)
        assert rate == pytest.approx(RATE, rel=0.02)
    assert link.stats().bytes_down == size + 1
    assert link.stats().bytes_up == 32
    assert link.stats().connections == 1


def test_a_small_answer_overtakes_a_big_one(link: ShapedLink) -> None:
    with connect(link) as big, connect(link) as small:
        ask(small, 1)
        big.sendall(b"%16d" % 10_000_000)
        time.sleep(0.1)
        assert min(ask(small, 4096) for _ in range(3)) < RTT + 0.005  # 10 MB would take 400 ms


def test_the_rate_is_shared(link: ShapedLink) -> None:
    def worker() -> None:
        with connect(link) as client:
            ask(client, 5_000_000)

    began = time.monotonic()
    threads = [threading.Thread(target=worker) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began == pytest.approx(15_000_000 * 8 / RATE + 2 * RTT, rel=0.03)


def test_half_closed_connections_deliver_the_rest(link: ShapedLink) -> None:
    with connect(link) as client:
        client.sendall(b"%16d" % 1_000_000)
        client.shutdown(socket.SHUT_WR)
        received = 0
        while data := client.recv(1 << 20):
            received += len(data)
    assert received == 1_000_000


def test_a_target_that_refuses_is_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with ShapedLink(f"127.0.0.1:{port}", rtt=0.001, rate=0) as link, connect(link) as client:  # noqa: SIM117
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_link_without_a_cap(target: str) -> None:
    with ShapedLink(target, rtt=0.002, rate=0) as link, connect(link) as client:
        assert ask(client, 50_000_000) < 1.0  # 400 Mbit/s at the very least


def test_the_command_prints_its_address_and_ends_with_its_input(target: str) -> None:
    command = [sys.executable, "-m", "ckptfs.bench.link", "--target", target, "--control"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("127.0.0.1:")
    assert process.returncode == 0


@pytest.mark.parametrize("bad", [["--rtt", "soon"], ["--rate", "fast"], ["--target", "nowhere"]])
def test_bad_arguments_are_usage_errors(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--target", "127.0.0.1:1", *bad])
    assert ended.value.code == 2
    assert "write it like" in capsys.readouterr().err


def test_an_address_in_use_is_said(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", target, "--listen", target]) == 5
    assert "choose another --listen" in capsys.readouterr().err


def test_units() -> None:
    assert seconds("20ms") == 0.020
    assert seconds("1.5") == 1.5
    assert bits_per_second("200Mbit") == 200e6
    assert bits_per_second("1Gbit/s") == 1e9
    assert bits_per_second("0") == bits_per_second("0.0") == 0
    for text in ("1Tbit", "200", "0.5"):  # bits, the latter two: nobody means that
        with pytest.raises(UsageError):
            bits_per_second(text)


def test_statistics_need_a_running_link() -> None:
    with pytest.raises(UsageError):
        ShapedLink("127.0.0.1:1").stats()
