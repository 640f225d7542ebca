"""Defaults from files and the environment: who wins, what is refused, and what is said about it."""

import json
import os
from pathlib import Path

import pytest

from ckptfs import configuration, settings
from ckptfs.configuration import KEYS, load, parse_deadline, parse_size
from ckptfs.errors import UsageError
from ckptfs.settings import GiB, MiB
from tests.support.command import ckptfs


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A system file, a user file and another, none of them there yet."""
    home = tmp_path / "home"
    found = {"system": tmp_path / "etc.toml", "user": home / "ckptfs" / "config.toml", "named": tmp_path / "named.toml"}
    found["user"].parent.mkdir(parents=True)
    monkeypatch.setattr(configuration, "SYSTEM_FILE", found["system"])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    for name in KEYS:
        monkeypatch.delenv(f"CKPTFS_{name.upper()}", raising=False)
    return found


def test_nothing_set(places: dict[str, Path]) -> None:
    found = load()
    assert {one.origin for one in found.values.values()} == {"default"}
    assert found.option_defaults() == {}
    assert set(found.values) == set(KEYS)


def test_later_places_win_key_by_key(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    places["system"].write_text('cache_size = "1G"\nmemory = "1M"\nverify = "strict"\nprefetch = "none"\n')
    places["user"].write_text("cache_size = 3221225472\nmemory = '2M'\nread_deadline = 5\n")
    places["named"].write_text('memory = "3M"\n')
    monkeypatch.setenv("CKPTFS_READ_DEADLINE", "hard")
    monkeypatch.setenv("CKPTFS_PLAIN_HTTP", "a.example, b.example:5000")
    values = load(places["named"]).values
    assert (values["verify"].value, values["verify"].origin) == ("strict", str(places["system"]))
    assert (values["cache_size"].value, values["cache_size"].origin) == (3 * GiB, str(places["user"]))
    assert (values["memory"].value, values["memory"].origin) == (3 * MiB, str(places["named"]))
    assert (values["read_deadline"].value, values["read_deadline"].origin) == ("hard", "CKPTFS_READ_DEADLINE")
    assert load(places["named"]).registries.plain_http == {"a.example", "b.example:5000"}
    monkeypatch.setenv("CKPTFS_CONFIG", str(places["named"]))
    assert load().values["memory"].value == 3 * MiB


def test_paths_are_relative_to_their_file(places: dict[str, Path]) -> None:
    places["named"].write_text('cache_dir = "cache"\ncache_key_file = "~/key"\n')
    values = load(places["named"]).values
    assert values["cache_dir"].value == places["named"].parent / "cache"
    assert values["cache_key_file"].value == Path("~/key").expanduser()


def test_a_home_directory_that_is_not_known(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTFS_CACHE_DIR", "~nobody-of-that-name/cache")
    with pytest.raises(UsageError, match="CKPTFS_CACHE_DIR: '~nobody-of-that-name/cache' names a home directory"):
        load()
    monkeypatch.setattr(settings, "_is_root", lambda: False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user without a line in passwd(5)
    assert settings.default_cache_dir() == Path(f"/var/tmp/ckptfs-{os.geteuid()}")


def test_mirrors(places: dict[str, Path]) -> None:
    places["named"].write_text('[mirrors]\n"docker.io" = ["mirror.example:5000", "https://other.example/hub"]\n')
    mirrors = load(places["named"]).registries.mirrors
    assert mirrors == {"docker.io": ("mirror.example:5000", "https://other.example/hub")}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('memory = "1M"\ncache_sise = "1G"', "line 2: unknown key 'cache_sise'; did you mean cache_size?"),
        ("colour = 1", "line 1: unknown key 'colour'; there are cache_dir, cache_size"),
        ("[cache]\ndir = 'x'", "line 1: unknown key 'cache'; did you mean cache_"),
        ('\n\ncache_size = "10X"', "line 3: cache_size: '10X' is not a size"),
        ('\nmemory = "1K"', "line 2: memory: '1K' is too small; give at least 1M"),
        ("cache_size = true", "not a size"),
        ("cache_size = -1", "not a size"),
        ("read_deadline = 0", "not a number of seconds"),
        ('read_deadline = "soon"', "not a number of seconds"),
        ('verify = "never"', "is none of auto, strict"),
        ('background_fetch = "perhaps"', "neither true nor false"),
        ("cache_dir = 3", "not a path"),
        ('cache_dir = "a\\u0000b"', "not a path"),
        ('plain_http = ["http://x"]', "not a list of hosts"),
        ("plain_http = true", "not a list of hosts"),
        ("mirrors = []", "table"),
        ('[mirrors]\n"a" = "b"', "not a list of mirrors"),
        ('[mirrors]\n"a" = ["https://user:pw@b"]', "not a list of mirrors"),
        ('[mirrors]\n"a" = ["[1:2]"]', "not a list of mirrors"),
        ('cache_dir = "~no-such-user/x"', "home directory"),
        (f"read_deadline = 1{'0' * 400}", "not a number of seconds"),
        (f"cache_size = 1{'0' * 5000}", "is not TOML"),
        ("cache_dir =", "is not TOML"),
        ("\x00", "is not TOML"),
        ("[" * 100_000, "is not TOML"),
    ],
)
def test_what_is_refused(text: str, words: str, places: dict[str, Path]) -> None:
    places["named"].write_text(text)
    with pytest.raises(UsageError) as caught:
        load(places["named"])
    assert words in str(caught.value) and str(places["named"]) in str(caught.value)


def test_a_named_file_must_be_there(places: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load(places["named"])
    with pytest.raises(UsageError, match="cannot be read"):
        load(places["named"].parent)


def test_a_wrong_variable_is_named(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTFS_MEMORY", "much")
    with pytest.raises(UsageError, match="CKPTFS_MEMORY: 'much' is not a size"):
        load()


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 * MiB), ("10GiB", 10 * GiB), ("1.5k", 1536), ("7", 7), (7, 7), ("0", 0)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_deadlines() -> None:
    assert parse_deadline("hard") == float("inf") and parse_deadline("1.5") == 1.5 and parse_deadline(60) == 60


# -- commands ----------------------------------------------------------------------------------------------------------


def test_show_says_where_values_come_from(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('cache_size = "2G"\n')
    env = {"CKPTFS_MEMORY": "32M", "CKPTFS_MEMROY": "1", "XDG_CONFIG_HOME": str(tmp_path)}
    shown = ckptfs("config", "show", "--config", file, "--json", env=env)
    assert shown.json["cache_size"] == {"value": 2 * GiB, "origin": str(file)}
    assert shown.json["memory"] == {"value": 32 * MiB, "origin": "CKPTFS_MEMORY"}
    assert shown.json["verify"] == {"value": "auto", "origin": "default"}
    assert "CKPTFS_MEMROY" in shown.line
    table = ckptfs("config", "show", env=env).out.splitlines()
    assert len(table) == len(KEYS) and any(line.split() == ["memory", str(32 * MiB), "CKPTFS_MEMORY"] for line in table)
    assert json.loads(ckptfs("config", "show", "--json", env=env).out).keys() == KEYS.keys()


def test_options_win_over_files(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('cache_dir = "from-file"\n')
    for options, used in (((), "from-file"), (("--cache-dir", tmp_path / "from-option"), "from-option")):
        done = ckptfs("cache", "info", "--config", file, *options)
        assert done.code == 3 and str(tmp_path / used) in done.line


@pytest.mark.parametrize(
    "command", [("ls", "oci:x"), ("mount", "oci:x", "/mnt"), ("cache", "info"), ("config", "show")]
)
def test_a_bad_file_is_one_line_for_every_command(command: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("x = 1\n")
    done = ckptfs(*command, "--config", file)
    assert done.code == 2 and "unknown key 'x'" in done.line and f"{file}, line 1" in done.line
