"""mount.ckptfs: what mount(8) runs for `mount -t ckptfs` and for lines of fstab(5).

Owns the translation of mount options to those of `ckptfs mount`; every long option of that command is also a mount
option, with underscores for dashes. Exit codes are those of mount(8). Installed as a script of its own.
"""

import getopt
import sys

import click

from ckptfs.cli import fail, run
from ckptfs.cli.mount import mount
from ckptfs.errors import UsageError

_USAGE, _FAILED = 1, 32  # mount(8), exit status

# Options of every file system, of fstab and of systemd: they say what holds anyway, or nothing to us.
_COMMON = {
    *(
        "ro",
        "rw",
        "auto",
        "noauto",
        "nofail",
        "_netdev",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "defaults",
        "fail",
    ),
    *("dev", "nodev", "suid", "nosuid", "exec", "noexec", "sync", "async", "dirsync", "remount", "mand", "nomand"),
    *(
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "lazytime",
        "silent",
        "loud",
    ),
}
_COMMON_KEYS = ("x-", "X-", "comment=", "uhelper=", "helper=")


def main() -> None:
    """mount.ckptfs REF DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]"""
    sys.exit(mount_for_mount8(sys.argv[1:]))


def mount_for_mount8(arguments: list[str]) -> int:
    """Mount as mount(8) asks for it; returns its exit status. One line on stderr when it fails."""
    try:
        options, words = getopt.gnu_getopt(arguments, "sfnvo:N:t:h", ["help"])
        flags = {name for name, _ in options}
        if flags & {"-h", "--help"}:
            print(f"usage: {main.__doc__}")
            return 0
        if len(words) != 2:
            raise UsageError(
                "mount.ckptfs takes a reference and a directory", hint="for example: mount -t ckptfs REF DIR"
            )
        texts = [value for name, value in options if name == "-o"]
        command = ["mount", *translate(",".join(texts)), *(["--verbose"] if "-v" in flags else []), "--", *words]
    except (UsageError, getopt.GetoptError) as error:
        return fail(str(error), _USAGE)
    if "-f" in flags:
        return 0
    code = run(command)
    return 0 if code == 0 else _USAGE if code == UsageError.exit_code else _FAILED


def is_mount_option(name: str) -> bool:
    """Whether mount(8) may give this option of `ckptfs mount`, without its dashes."""
    return name.startswith("--") and name not in ("--json", "--foreground", "--ready-fd", "--help")


def translate(text: str) -> list[str]:
    """`view=raw,allow_other,_netdev` as options of `ckptfs mount`. UsageError for what means nothing."""
    known = {
        name.removeprefix("--").replace("-", "_"): (name, option.is_flag)
        for option in mount.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
        if is_mount_option(name)
    }
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part in _COMMON or part.startswith(_COMMON_KEYS):
            continue
        key, equals, value = part.partition("=")
        name, is_flag = known.get(key.replace("-", "_"), ("", False))
        if not name:
            raise UsageError(f"there is no mount option {key!r}", hint="`ckptfs mount --help` has all; _ stands for -")
        if is_flag == bool(equals):
            raise UsageError(f"mount option {key!r} {'takes no value' if is_flag else 'needs a value'}")
        found.append(name if is_flag else f"{name}={value}")
    return found


if __name__ == "__main__":
    main()
