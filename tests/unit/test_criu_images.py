"""Names, headers and records of CRIU's images, and what the decoders make of real ones."""

import struct
from pathlib import Path

import pytest

from ckptfs.criu import core, files, images, inventory, mm, namespaces, pstree
from ckptfs.criu.images import Name, header, only_record, parse_name, records
from ckptfs.criu.wire import Message
from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.settings import Limits
from tests.support.criu_images import image, magic, message, record, task, unpack_counter, unpack_tree, varint


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_tree(tmp_path_factory.mktemp("tree")) / "checkpoint"


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_counter(tmp_path_factory.mktemp("counter")) / "checkpoint"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("inventory.img", Name("inventory")),
        ("core-14400.img", Name("core", 14400)),
        ("pagemap-shmem-7.img", Name("pagemap-shmem", 7)),
        ("pagemap-7.img", Name("pagemap", 7)),
        ("tmpfs-dev-44.tar.gz.img", Name("tmpfs-dev", 44)),
        ("ghost-file-1f.img", Name("ghost-file", 0x1F)),
        ("tcp-stream-2a.img", Name("tcp-stream", 0x2A)),
        ("netns-ct-3.img", Name("netns-ct", 3)),
        ("stats-dump", Name("stats-dump")),
        ("stats-dump.img", Name("stats-dump")),
        ("descriptors.json", None),
        ("core-x.img", None),
        ("nothing-3.img", None),
        ("core-٣.img", None),
        (".img", None),
        ("", None),
    ],
)
def test_names(name: str, expected: Name | None) -> None:
    assert parse_name(name) == expected


@pytest.mark.parametrize("which", ["tree", "counter"])
def test_every_real_image_is_known_and_reads_to_its_end(which: str, request: pytest.FixtureRequest) -> None:
    seen = 0
    for path in request.getfixturevalue(which).iterdir():
        name = parse_name(path.name)
        if path.name == "descriptors.json":
            continue
        assert name is not None, path.name
        if not name.raw:
            assert list(records(path.read_bytes(), name.kind, path.name)), path.name
            seen += 1
    assert seen >= 15


def test_magics() -> None:
    assert header(magic("core") + b"rest", "core", "core-1.img") == 8
    assert header(magic("inventory"), "inventory", "inventory.img") == 4
    assert header(magic("core")[4:], "core", "core-1.img") == 4  # images of the first version
    assert header(struct.pack("<II", images.SERVICE_MAGIC, 0x57093306), "stats-dump", "stats-dump") == 8


@pytest.mark.parametrize("data", [b"", b"\0" * 8, magic("mm"), magic("core")[:7], magic("core")[:4] + b"\0\0\0\0"])
def test_another_magic_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"core-1\.img is not a CRIU image of kind core"):
        header(data, "core", "core-1.img")


def test_raw_images_have_no_records() -> None:
    with pytest.raises(FormatError, match="raw"):
        list(records(b"x" * 4096, "pages", "pages-1.img"))


def test_records_with_raw_bytes_after_them() -> None:
    data = magic("pipes-data") + record({1: 7, 2: 3}, b"abc") + record({1: 8, 2: 0})
    found = list(records(data, "pipes-data", "pipes-data.img"))
    assert [(r.message.uint(1), r.extra) for r in found] == [(7, b"abc"), (8, b"")]
    ghost = magic("ghost-file") + record({1: 0, 2: 0, 3: 0o644}, b"the rest")
    assert [r.extra for r in records(ghost, "ghost-file", "ghost-file-1.img")] == [b"the rest"]


@pytest.mark.parametrize(
    "data",
    [
        magic("pstree") + b"\x05\0\0\0abc",
        magic("pstree") + b"\x05\0",
        magic("pipes-data") + record({1: 1, 2: 9}, b"abc"),
        image("pipes-data", {1: 1}),
    ],
)
def test_cut_records_are_refused(data: bytes) -> None:
    kind = "pstree" if data.startswith(magic("pstree")) else "pipes-data"
    with pytest.raises(FormatError):
        list(records(data, kind, f"{kind}.img"))


def test_limits_of_images() -> None:
    data = image("pstree", task(1), task(2, 1))
    exact = Limits(criu_image_bytes=len(data), criu_records=2, criu_record_bytes=len(message(task(2, 1))))
    assert len(list(records(data, "pstree", "pstree.img", exact))) == 2
    for past in (
        Limits(criu_image_bytes=len(data) - 1),
        Limits(criu_records=1),
        Limits(criu_record_bytes=len(message(task(2, 1))) - 1),
    ):
        with pytest.raises(LimitExceeded):
            list(records(data, "pstree", "pstree.img", past))


def test_numbers_in_all_spellings() -> None:
    m = Message(message({1: 300, 4: [5, 6], 5: varint(7) + varint(300), 200: 1, 300: 1}), "m")
    assert (m.uint(1), m.uints(4), m.uints(5)) == (300, [5, 6], [7, 300])
    assert m.uint(4) == 6  # the last one wins
    assert m.uint(9, 4) == 4 and not m.flag(9)
    assert 1 in m and 9 not in m and 200 in m and 300 not in m
    fixed = Message(b"\x09" + b"\1" * 8 + b"\x15" + b"\2" * 4, "m")
    assert (fixed.uint(1), fixed.uint(2)) == (0x0101010101010101, 0x02020202)


def test_text_that_is_not_utf_8_is_printable() -> None:
    assert Message(message({1: b"a\xff"}), "m").text(1) == "a\\xff"


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",
        b"\x08\xff",
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\x0a\x05abc",
        b"\x09\0",
        b"\x15\0",
        b"\x0b",
        b"\x0c",
        b"\x0f",
        b"\x00\x00",
    ],
)
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^core "):
        Message(data, "core")


def test_missing_and_mistyped_fields() -> None:
    m = Message(message({1: b"text", 2: 3}), "mm-1.img, record 1")
    for ask in (m.uint, m.text, m.raw, m.message):
        with pytest.raises(FormatError, match=r"mm-1\.img, record 1 has no field 9"):
            ask(9)
    with pytest.raises(FormatError, match="field 1 is not a number"):
        m.uint(1)
    with pytest.raises(FormatError, match="field 2 is not bytes"):
        m.raw(2)
    with pytest.raises(FormatError, match="field 2 is not a message"):
        list(m.messages(2))
    with pytest.raises(FormatError, match="field 2 is not bytes"):
        m.texts(2)
    with pytest.raises(FormatError, match="is not a list of numbers"):
        Message(message({1: b"\xff"}), "m").uints(1)


def test_an_image_without_its_record() -> None:
    with pytest.raises(FormatError, match=r"mm-1\.img has no record"):
        only_record(magic("mm"), "mm", "mm-1.img")


def test_a_real_tree(tree: Path) -> None:
    tasks = pstree.parse_pstree((tree / "pstree.img").read_bytes())
    assert [(t.pid, t.ppid, t.threads) for t in tasks] == [
        (14400, 0, (14400,)),
        (14401, 14400, (14401,)),
        (14402, 14400, (14402,)),
    ]
    # the youngest child first, as criu restores them
    assert [(t.pid, depth) for t, depth in pstree.restore_order(tasks)] == [(14400, 0), (14402, 1), (14401, 1)]
    assert pstree.parse_ids((tree / "ids-14402.img").read_bytes(), "ids-14402.img").files == 4
    found = core.parse_core((tree / "core-14401.img").read_bytes(), "core-14401.img")
    assert found == core.Core("amd64", "Alive", "tree-cow", 0) and found.has_memory
    assert core.parse_fs((tree / "fs-14400.img").read_bytes(), "fs-14400.img") == core.Directories(8, 9, 0o22)
    space = mm.parse_mm((tree / "mm-14400.img").read_bytes(), "mm-14400.img")
    assert [hex(v.start) for v in space.vmas if not v.private] == ["0x7fed5e7a5000", "0xffffffffff600000"]


def test_real_open_files(tree: Path) -> None:
    memfds = namespaces.parse_memfds((tree / "memfd.img").read_bytes())
    assert [(m.name, m.size, m.shmid) for m in memfds] == [("/dev/zero", 262144, 1399), ("corpus", 131072, 1400)]
    names = {memfd.id: memfd.name for memfd in memfds}
    found = {f.id: f for f in files.parse_files((tree / "files.img").read_bytes(), memfds=names)}
    assert found[1] == files.OpenFile(1, "REG", "/srv/ckpt/tree", size=690920, mode=0o100755)
    assert found[5].position == 7148
    assert found[14].path == "memfd:corpus"
    socket = found[15].socket
    assert socket is not None and (socket.family, socket.type, socket.state) == ("UNIX", "STREAM", "ESTABLISHED")
    table = files.parse_fdinfo((tree / "fdinfo-4.img").read_bytes(), "fdinfo-4.img")
    assert [(d.fd, d.kind) for d in table] == [
        *((fd, "REG") for fd in range(4)),
        (4, "PIPE"),
        (5, "MEMFD"),
        (7, "UNIXSK"),
    ]


def test_a_real_container(counter: Path) -> None:
    found = inventory.parse_inventory((counter / "inventory.img").read_bytes())
    assert found.version == 2 and len(found.run_id) == 36
    statistics = inventory.parse_dump_statistics((counter.parent / "stats-dump").read_bytes())
    assert statistics is not None
    assert (statistics.freezing_time, statistics.frozen_time, statistics.pages_written) == (373, 130128, 398)
    mounts = namespaces.parse_mountpoints((counter / "mountpoints-13.img").read_bytes(), "mountpoints-13.img")
    root = next(m for m in mounts if m.path == "/")
    assert root.file_system == "overlay" and any(m.file_system == "mqueue" for m in mounts)
    assert namespaces.parse_uts((counter / "utsns-12.img").read_bytes(), "utsns-12.img")[0] == "f63b0282238b"


def test_sockets_of_the_internet() -> None:
    four = int.from_bytes(bytes([10, 0, 0, 1]), "little")
    six = [int.from_bytes(bytes.fromhex(word), "little") for word in ("20010db8", "00000000", "00000000", "00000001")]
    options = {1: 1024, 2: 2048, 3: 0, 4: 0, 5: 0, 6: 0}
    owner = dict.fromkeys(range(1, 6), 0)
    common = {2: 9, 4: 1, 5: 6, 7: 80, 8: 0, 9: 2, 10: 5, 13: owner, 14: options}
    data = image(
        "files",
        {1: 4, 2: 1, 4: {1: 1, 3: 2, 6: 10, 11: [four], 12: [0], **common}},
        {1: 4, 2: 2, 4: {1: 2, 3: 10, 6: 1, 11: six, 12: six, **common}},
        {1: 13, 2: 3, 7: {1: 3, 2: 5, 3: 0, 4: 7, 6: 0, 7: 0, 9: 0, 10: 0, 11: owner, 12: options}},
        {1: 6, 2: 4, 8: {1: 4, 2: 0, 3: owner, 4: 1}},
        {1: 99, 2: 5},
    )
    one, two, netlink, event, newer = files.parse_files(data)
    assert one.socket == files.Socket("INET", "STREAM", "TCP", "LISTEN", "10.0.0.1", 80, "0.0.0.0", 0, 1024, 2048)
    assert two.socket is not None and two.socket.source == "2001:db8::1" and two.socket.family == "INET6"
    assert netlink.socket is not None and netlink.socket.protocol == "ROUTE"
    assert (event.kind, event.path, newer.kind) == ("EVENTFD", "eventfd[4]", "TYPE99")


def test_abstract_unix_sockets_and_old_images() -> None:
    owner = dict.fromkeys(range(1, 6), 0)
    options = {1: 1, 2: 2, 3: 0, 4: 0, 5: 0, 6: 0}
    entry = {1: 3, 2: 50, 3: 2, 4: 7, 5: 0, 6: 0, 7: 0, 8: 0, 9: owner, 10: options, 11: b"\0name\0"}
    (found,) = files.parse_legacy_files(image("unixsk", entry), "unixsk", "unixsk.img")
    assert found.path == "unix[50 (0) @name]" and found.socket is not None and found.socket.type == "DGRAM"


def test_zombies_and_threads() -> None:
    zombie = image("core", {1: 3, 3: {1: 6, 2: 9, 3: 0, 4: 0, 5: 0, 6: "gone"}})
    assert core.parse_core(zombie, "core-2.img") == core.Core("arm64", "Zombie", "gone", 9)
    assert not core.parse_core(zombie, "core-2.img").has_memory
    thread = image("core", {1: 1, 5: {1: 0, 2: 0, 13: "worker"}})
    assert core.parse_core(thread, "core-3.img").comm == "worker"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "names no process"),
        ([task(1), task(1, 1)], "names process 1 twice"),
        ([task(1), task(2, 3)], "the parent of process 2, 3, does not stand before it"),
        ([task(1, 1)], "the parent of process 1, 1"),
    ],
)
def test_trees_that_are_none(entries: list[dict[int, object]], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        pstree.parse_pstree(image("pstree", *entries))  # type: ignore[arg-type]


def test_generations_are_bounded() -> None:
    line = [task(pid, pid - 1) for pid in range(1, 5)]
    assert len(pstree.parse_pstree(image("pstree", *line), limits=Limits(process_depth=4))) == 4
    with pytest.raises(LimitExceeded, match="more than 3 generations"):
        pstree.parse_pstree(image("pstree", *line), limits=Limits(process_depth=3))
