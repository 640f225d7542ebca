"""`ckptfs` and `python -m ckptfs`: errors become one line and an exit code here. And checkpointctl's plugin.

checkpointctl runs `checkpointctl-NAME` for `checkpointctl NAME`, and asks each one that it finds for a description at
every start: half a second is all it waits, so nothing is imported for that.
"""

import sys

_DESCRIBED = 42  # the exit code by which checkpointctl knows that a plugin understood the question (cmd/plugin.go)


def main() -> None:
    try:
        from ckptfs.cli import run
    except KeyboardInterrupt:  # Ctrl-C within the first tenth of a second
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


def checkpointctl_plugin() -> None:
    """`checkpointctl ckptfs inspect REF` is `ckptfs inspect REF`, and so is every other command."""
    if sys.argv[1:] == ["--plugin-description"]:
        print("Look into checkpoint images in a registry, mount and restore them, without pulling them")
        sys.exit(_DESCRIBED)
    from ckptfs.cli import run

    sys.exit(run(sys.argv[1:], "checkpointctl ckptfs"))


if __name__ == "__main__":
    main()
