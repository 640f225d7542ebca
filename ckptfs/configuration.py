"""What the user has set for good: TOML files and the environment, as defaults of the command line's options.

In rising precedence: /etc/ckptfs/config.toml, ~/.config/ckptfs/config.toml, the file of --config (or CKPTFS_CONFIG),
CKPTFS_* variables, options. Owns the keys, what values they take, and where each value came from. An unknown key is an
error that names its file and line: a typo in `cache_key_file` must not mean an unencrypted cache. Reads; never writes.
Called by cli/.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckptfs.errors import UsageError
from ckptfs.settings import Registries, Settings, default_cache_dir

SYSTEM_FILE = Path("/etc/ckptfs/config.toml")
LEAST_CACHE = 1 << 20  # bytes, on disk and in memory
_FILE_BYTES = 1 << 20
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?\Z")

Parse = Callable[[Any, Path], Any]  # (raw value, directory that relative paths are relative to) -> value, or ValueError


def parse_size(value: Any) -> int:
    """`512M`, `10GiB`, 1048576: bytes, powers of 1024. ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = (
        re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", value.strip().lower()) if _is_text(value) else None
    )
    if not match:
        raise ValueError(f"{value!r} is not a size; write for example 512M or 10G")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_deadline(value: Any) -> float:
    """Seconds, or `hard` for a reader that must never get EIO because the registry is away. ValueError."""
    if value == "hard":
        return float("inf")
    try:
        seconds = float(value) if not isinstance(value, bool) else 0.0
    except (ValueError, TypeError):
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{value!r} is not a number of seconds; write for example 60, or hard")
    return seconds


def _size(value: Any, _: Path) -> int:
    size = parse_size(value)
    if size < LEAST_CACHE:
        raise ValueError(f"{value!r} is too small; give at least 1M")
    return size


def _deadline(value: Any, _: Path) -> str:
    parse_deadline(value)
    return str(value)


def _path(value: Any, base: Path) -> Path:
    if not _is_text(value) or not value:
        raise ValueError(f"{value!r} is not a path")
    try:
        return base / Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{value!r} begins with a home directory that is not known") from None


def _flag(value: Any, _: Path) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not _is_text(value) or value.lower() not in words:
        raise ValueError(f"{value!r} is neither true nor false")
    return words[value.lower()]


def _one_of(*choices: str) -> Parse:
    def parse(value: Any, _: Path) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return str(value)

    return parse


def _hosts(value: Any, _: Path) -> tuple[str, ...]:
    hosts = [host.strip() for host in value.split(",") if host.strip()] if _is_text(value) else value
    if not isinstance(hosts, list) or not all(_is_text(host) and _HOST.match(host) for host in hosts):
        raise ValueError(f"{value!r} is not a list of hosts (host or host:port)")
    return tuple(hosts)


def _mirrors(value: Any, base: Path) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict) or not all(_HOST.match(host) for host in value):
        raise ValueError('it is a table: "registry.example" = ["mirror.example:5000"]')
    for places in value.values():
        if not isinstance(places, list) or not all(_is_text(place) and _is_mirror(place) for place in places):
            raise ValueError(f"{places!r} is not a list of mirrors (host[:port], or an http(s) URL without a password)")
    return {host: tuple(places) for host, places in value.items()}


def _is_mirror(place: str) -> bool:
    host = re.sub(r"\Ahttps?://", "", place).partition("/")[0]
    return _HOST.match(host) is not None


def parse_address(value: Any) -> tuple[str, int]:
    """`127.0.0.1:9180`, `[::1]:9180`, or a port alone, which is on loopback. ValueError."""
    import ipaddress  # 6 ms that only those pay who set it

    wanted = ValueError(f"{value!r} is no address and port; write for example 127.0.0.1:9180, port 0 for any")
    match = re.fullmatch(r"(?:(\[[^\]]+\]|[^\[\]:]+):)?(\d{1,5})", str(value).strip())
    if match is None or isinstance(value, bool) or int(match[2]) > 65535:
        raise wanted
    host = (match[1] or "127.0.0.1").strip("[]")
    try:
        return str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)), int(match[2])
    except ValueError:
        raise wanted from None


def _address(value: Any, _: Path) -> str:
    host, port = parse_address(value)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


class Key(NamedTuple):  # a dataclass would cost every command a millisecond more
    """`option`: the parameter of commands whose default it is; None where it goes into Settings.registries."""

    parse: Parse
    default: Any
    option: str | None
    in_environment: bool = True


_sizes, _timeouts = Settings().sizes, Settings().timeouts

KEYS: dict[str, Key] = {
    "cache_dir": Key(_path, default_cache_dir(), "cache_dir"),
    "cache_size": Key(_size, _sizes.disk_cache, "cache_size"),
    "cache_key_file": Key(_path, None, "cache_key_file"),
    "memory": Key(_size, _sizes.memory_cache, "memory"),
    "read_deadline": Key(_deadline, f"{_timeouts.read_deadline:g}", "read_deadline"),
    "verify": Key(_one_of("auto", "strict"), "auto", "verify"),
    "prefetch": Key(_one_of("auto", "none"), "auto", "prefetch"),
    "metrics": Key(_address, None, "metrics"),
    "background_fetch": Key(_flag, True, "background_fetch"),
    "plain_http": Key(_hosts, (), None),
    "mirrors": Key(_mirrors, {}, None, in_environment=False),
    "mirror_tags": Key(_flag, False, None),
    "system_mirrors": Key(_flag, True, None),
}


class Value(NamedTuple):
    """`origin`: "default", the path of a file, or the name of a variable."""

    value: Any
    origin: str


class Configuration(NamedTuple):
    """A value for every key of KEYS."""

    values: Mapping[str, Value]

    def option_defaults(self) -> dict[str, Any]:
        """What options mean that are not on the command line; nothing for those that nobody has set."""
        return {
            key.option: found.value
            for name, key in KEYS.items()
            if key.option is not None and (found := self.values[name]).origin != "default"
        }

    @property
    def registries(self) -> Registries:
        found = {name: self.values[name].value for name in ("mirrors", "mirror_tags")}
        plain_http, system_files = self.values["plain_http"].value, self.values["system_mirrors"].value
        return Registries(frozenset(plain_http), system_files=system_files, **found)


DEFAULTS = Configuration({name: Value(key.default, "default") for name, key in KEYS.items()})


def load(file: Path | None = None) -> Configuration:
    """Everything that applies to this user. UsageError for what cannot be read or understood."""
    values = dict(DEFAULTS.values)
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for path in (SYSTEM_FILE, Path(home) / "ckptfs" / "config.toml"):
        values |= _from_file(path, required=False)
    if file is None and os.environ.get("CKPTFS_CONFIG"):
        file = Path(os.environ["CKPTFS_CONFIG"])
    if file is not None:
        values |= _from_file(file, required=True)
    for name, key in KEYS.items():
        variable = f"CKPTFS_{name.upper()}"
        if key.in_environment and (text := os.environ.get(variable)):
            values[name] = Value(_parsed(key, text, Path.cwd(), variable), variable)
    return Configuration(values)


def unknown_variables(environment: Mapping[str, str]) -> set[str]:
    """CKPTFS_* that are no key: most likely a typo, or of a later version. They are not an error."""
    known = {f"CKPTFS_{name.upper()}" for name, key in KEYS.items() if key.in_environment} | {"CKPTFS_CONFIG"}
    return {name for name in environment if name.startswith("CKPTFS_")} - known


def _from_file(path: Path, *, required: bool) -> dict[str, Value]:
    try:
        with open(path, "rb") as file:
            raw = file.read(_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        if not required:
            return {}
        raise UsageError(f"{path} does not exist", hint="name another file with --config") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="see its owner and mode") from None
    import tomllib  # 5 ms that only those pay who have a file

    try:
        text = raw.decode()
        document = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    values = {}
    for name, value in document.items():
        where = f"{path}, line {_line(text, name)}"
        if name not in KEYS:
            import difflib

            close = difflib.get_close_matches(name, KEYS, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(KEYS)}"
            raise UsageError(f"{where}: unknown key {name!r}", hint=hint)
        values[name] = Value(_parsed(KEYS[name], value, path.absolute().parent, f"{where}: {name}"), str(path))
    return values


def _parsed(key: Key, value: Any, base: Path, where: str) -> Any:
    try:
        return key.parse(value, base)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _line(text: str, name: str) -> int:
    """The line where a key or the table of that name is first set; 1 where it is written in another way."""
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(name)}["']?\s*[=.\]]""")
    lines = text.splitlines()
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 1)
