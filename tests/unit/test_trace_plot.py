"""`ckptfs profile plot`: recordings as pages and pictures that need nothing else, whatever names are in them."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ckptfs.bench.trace import read_trace, trace_page, trace_svg
from ckptfs.errors import FormatError
from tests.support.command import ckptfs

READ = {"t_ms": 10.0, "path": "checkpoint/pages-1.img", "offset": 0, "length": 4096, "hit": True}
SVG = "{http://www.w3.org/2000/svg}"


def lines(*facts: dict[str, object]) -> list[str]:
    return [json.dumps({**READ, **fact}) + "\n" for fact in facts]


def test_what_a_page_says() -> None:
    waits = {"hit": False, "wait_ms": 250.0, "pid": 7, "command": "criu"}
    trace = read_trace(lines({"pid": 7, "command": "criu"}, {**waits, "t_ms": 20.0, "offset": 1 << 20}, {"t_ms": 5.0}))
    assert [access.at for access in trace] == [0.005, 0.01, 0.02]
    page = trace_page(trace, "Reads of x")
    assert "3 reads of 0.0 MB" in page and "1 had to wait, 0.25 s together" in page
    assert "<td>criu</td><td>2</td><td>0.01</td><td>50 %</td><td>0.250 s</td><td>250.0 ms</td>" in page
    assert "<td>0.020 s</td><td>250.0 ms</td><td>checkpoint/pages-1.img</td><td>1048576</td>" in page


def test_it_opens_without_a_network_and_runs_nothing() -> None:
    page = trace_page(read_trace(lines({}, {"hit": False, "wait_ms": 1.0})), "<b>")
    assert "&lt;b&gt;" in page and "<script" not in page and "<link" not in page and "@import" not in page
    assert not re.findall(r"""(?:src|href|data|action)\s*=\s*["'](?!#|data:)""", page.replace("xlink:href", "href"))
    root = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert root.tag == f"{SVG}svg"


def test_names_are_only_names() -> None:
    names = [
        "a$b$c",
        "<script>x</script>",
        "\x1b[2J\x00",
        "caf\u00e9 \u202e",
        "nul\udcff",
        "x" * 3000,
        "\u6a94\u6848",
        "$\\frac{",
        "&amp;",
    ]
    facts: list[dict[str, object]] = [{"path": name, "command": name, "t_ms": n} for n, name in enumerate(names)]
    trace = read_trace(lines(*facts))
    page = trace_page(trace, "names")
    page.encode()
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    ElementTree.fromstring(trace_svg(trace))


def test_many_reads_stay_a_picture_that_opens(tmp_path: Path) -> None:
    facts = [
        {"t_ms": n / 10, "offset": n << 12, "hit": n % 3 == 0, "wait_ms": 5.0, "path": f"f{n % 40}"}
        for n in range(20_000)
    ]
    text = trace_svg(read_trace(lines(*facts)))
    assert len(text) < 1_000_000 and "26 other files" in text


def test_recordings_of_earlier_versions() -> None:
    (one,) = read_trace(lines({"hit": False}))
    assert one.wait is None and one.who == ""
    assert "<svg" in trace_page([one], "old")


@pytest.mark.parametrize(
    "line",
    ["", "x", "[]", "{}", json.dumps({**READ, "offset": -1}), json.dumps({**READ, "t_ms": "soon"}),
     json.dumps({**READ, "t_ms": 1e999}), json.dumps({**READ, "wait_ms": []})],
)  # fmt: skip
def test_what_is_no_recording(line: str) -> None:
    with pytest.raises(FormatError, match="line 2"):
        read_trace([*lines({}), line + "\n"])


def test_the_command(tmp_path: Path) -> None:
    reads = tmp_path / "reads.jsonl"
    reads.write_text("".join(lines({}, {"hit": False, "wait_ms": None})))
    for name, start in (("reads.html", "<!doctype html>"), ("reads.svg", "<svg")):
        done = ckptfs("profile", "plot", reads, tmp_path / name)
        assert done.code == 0 and done.out.strip() == str(tmp_path / name), done.err
        assert (tmp_path / name).read_text().startswith(start)
    assert ckptfs("profile", "plot", reads, tmp_path / "reads.png").code == 2
    assert "cannot be written" in ckptfs("profile", "plot", reads, tmp_path / "no" / "reads.svg").line
    reads.write_text("not a recording\n")
    assert ckptfs("profile", "plot", reads, tmp_path / "reads.svg").code == 7
    reads.write_text("")
    assert ckptfs("profile", "plot", reads, tmp_path / "reads.svg").code == 3
