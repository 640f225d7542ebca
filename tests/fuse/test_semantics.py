"""Row F3: a read-only POSIX file system, call by call; where ckptfs differs from a local one, EXCEPTIONS says why.

The calls are what the suites for POSIX file systems have for one that cannot be written to: SUITES names their parts.
"""

import errno
import fcntl
import io
import mmap
import os
import select
import socket
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command import mounted
from tests.support.fake_registry import FakeRegistry
from tests.support.hanging import errno_of
from tests.support.other_user import NOBODY, as_nobody
from tests.support.tools import require

pytestmark = [pytest.mark.fuse, pytest.mark.row("F3")]

TAR = "application/vnd.oci.image.layer.v1.tar"
LONG = "n" * 255
MTIME = 1_700_000_000
FS_IOC_SETFLAGS = 0x40086602  # linux/fs.h
Figure = Callable[[str, object], None]

EXCEPTIONS = {
    "access times": "are the modification time for ever: an image has none, and reading must not write",
    "SEEK_HOLE, SEEK_DATA": "see no holes, though they are not fetched: FUSE_LSEEK has no hook in pyfuse3",
    "fsync": "succeeds: there is nothing to write, as on a read-only ext4",
    "devices": "can be seen and not opened: the mount is nodev",
    "changes of anything": "are EROFS before permissions are looked at, in the kernel, because the mount is read-only",
    "an ordinary user's own mount": "shows owners and modes and does not apply them: only that user can get in",
}


# A directory of pjdfstest, or a test of xfstests -> the calls below that are its read-only half, or why there is none.
SUITES: dict[str, tuple[str, ...] | str] = {
    "pjdfstest chflags": ("set flags",),
    "pjdfstest chmod": ("chmod", "fchmod", "chmod below a file", "chmod of what is not there", "chmod of a loop"),
    "pjdfstest chown": ("chown", "lchown", "fchown", "chown below a file", "chown of what is not there"),
    "pjdfstest ftruncate": ("truncate what was opened to read", "open to truncate"),
    "pjdfstest granular": "NFSv4 access lists; Linux has none",
    "pjdfstest link": ("link", "link a directory", "link over what is there", "link to another file system"),
    "pjdfstest mkdir": ("mkdir", "mkdir what is there", "mkdir below a file", "mkdir below nothing", "mkdir of 256"),
    "pjdfstest mkfifo": ("mkfifo", "mkfifo what is there", "mkfifo below nothing"),
    "pjdfstest mknod": ("mknod", "mknod what is there", "mknod of a device"),
    "pjdfstest open": (
        "open for writing",
        "open for both",
        "open to append",
        "open to truncate",
        "create",
        "create below",
        "create below nothing",
        "create what is there",
        "create a directory",
        "O_NOFOLLOW of a link",
        "O_DIRECTORY of a file",
        "a fifo that nobody reads",
        "write a directory",
        "a loop",
        "a name of 256",
        "a path of 4096",
    ),
    "pjdfstest posix_fallocate": ("allocate what was opened to read",),
    "pjdfstest rename": (
        "rename",
        "rename over",
        "rename a directory",
        "rename to a dot",
        "rename to another file system",
    ),
    "pjdfstest rmdir": ("rmdir", "rmdir what is full", "rmdir a dot", "rmdir two dots"),
    "pjdfstest symlink": ("symlink", "symlink what is there", "symlink below nothing"),
    "pjdfstest truncate": ("truncate", "truncate a directory", "truncate a fifo", "truncate what is not there"),
    "pjdfstest unlink": ("unlink", "unlink a directory", "unlink below a file"),
    "pjdfstest utimensat": ("utime", "futime", "utime of a link", "utime of what is not there"),
    "xfstests generic/294": (
        "mkdir what is there",
        "mknod what is there",
        "symlink what is there",
        "link over what is there",
    ),
    "xfstests generic/306": "writes to devices on a read-only file system; the mount is nodev",
    "bad addresses (EFAULT)": "are refused by the kernel before any file system is asked",
}


@pytest.fixture(scope="module")
def mnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One mount for all: nothing here can change it."""
    require("fusermount3", root=True)
    folder = tmp_path_factory.mktemp("semantics")
    for path in (folder, *folder.parents):
        path.chmod(path.stat().st_mode | 0o011)
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(TAR, archive())])
        options = ("--view", "raw", "--allow-other")
        with mounted(registry.reference("repo:latest"), folder, *options) as mount:
            yield mount.path


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.mtime = kind, len(data), MTIME
            member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))

        add("dir", tarfile.DIRTYPE)
        for number in range(300):
            add(f"dir/entry-{number:03}", data=b"%d" % number)
        add("file", data=b"0123456789" * 1000, pax_headers={"SCHILY.xattr.user.colour": "blue"})
        add("hard", tarfile.LNKTYPE, linkname="file")
        add("soft", tarfile.SYMTYPE, linkname="file")
        add("dangling", tarfile.SYMTYPE, linkname="no/where")
        add("loop", tarfile.SYMTYPE, linkname="loop")
        add("absolute", tarfile.SYMTYPE, linkname="/etc/hostname")
        add("empty")
        add("fifo", tarfile.FIFOTYPE)
        add("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add("private", data=b"secret", mode=0o600)
        add("write-only", data=b"secret", mode=0o222)
        add("closed", tarfile.DIRTYPE, mode=0o700)
        add("closed/inside", data=b"secret")
        add("theirs", data=b"theirs", mode=0o400, uid=NOBODY, gid=NOBODY)
        add("sticky", tarfile.DIRTYPE, mode=0o1777)
        add("setuid", data=b"#!/bin/sh\nid -u\n", mode=0o4755)
        add("program", data=b"#!/bin/sh\necho ran\n", mode=0o755)
        add(LONG, data=b"long")
    return out.getvalue()


# -- nothing can be changed --------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path], object]] = {
    "open for writing": lambda m: os.open(m / "file", os.O_WRONLY),
    "open for both": lambda m: os.open(m / "file", os.O_RDWR),
    "open to append": lambda m: os.open(m / "file", os.O_WRONLY | os.O_APPEND),
    "open to truncate": lambda m: os.open(m / "file", os.O_RDONLY | os.O_TRUNC),
    "create": lambda m: os.open(m / "new", os.O_CREAT | os.O_RDONLY, 0o644),
    "create below": lambda m: os.open(m / "dir" / "new", os.O_CREAT | os.O_WRONLY, 0o644),
    "a nameless file": lambda m: os.open(m / "dir", os.O_TMPFILE | os.O_RDWR, 0o600),
    "truncate": lambda m: os.truncate(m / "file", 0),
    "unlink": lambda m: os.unlink(m / "file"),
    "rename": lambda m: os.rename(m / "file", m / "other"),
    "rename over": lambda m: os.rename(m / "file", m / "empty"),
    "mkdir": lambda m: os.mkdir(m / "new"),
    "rmdir": lambda m: os.rmdir(m / "sticky"),
    "symlink": lambda m: os.symlink("x", m / "new"),
    "link": lambda m: os.link(m / "file", m / "new"),
    "mkfifo": lambda m: os.mkfifo(m / "new"),
    "mknod": lambda m: os.mknod(m / "new", stat.S_IFREG | 0o600),
    "bind a socket": lambda m: _bind(m / "new"),
    "chmod": lambda m: os.chmod(m / "file", 0o600),
    "chown": lambda m: os.chown(m / "file", 1, 1),
    "lchown": lambda m: os.lchown(m / "soft", 1, 1),
    "utime": lambda m: os.utime(m / "file"),
    "setxattr": lambda m: os.setxattr(m / "file", "user.x", b"1"),
    "removexattr": lambda m: os.removexattr(m / "file", "user.colour"),
    "access for writing": lambda m: _access(m / "file", os.W_OK),
    "set flags": lambda m: _opened(m / "file", lambda f: fcntl.ioctl(f, FS_IOC_SETFLAGS, bytes(8))),
    "fchmod": lambda m: _opened(m / "file", lambda f: os.fchmod(f, 0o600)),
    "fchown": lambda m: _opened(m / "file", lambda f: os.fchown(f, 1, 1)),
    "futime": lambda m: _opened(m / "file", lambda f: os.utime(f, (1, 1))),
    "utime of a link": lambda m: os.utime(m / "soft", (1, 1), follow_symlinks=False),
    "mknod of a device": lambda m: os.mknod(m / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "link a directory": lambda m: os.link(m / "dir", m / "new"),
    "rename a directory": lambda m: os.rename(m / "dir", m / "dir" / "inside"),
    "rmdir what is full": lambda m: os.rmdir(m / "dir"),
    "unlink a directory": lambda m: os.unlink(m / "dir"),
}


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _opened(path: Path, action: Callable[[int], object]) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        action(file)
    finally:
        os.close(file)


def _access(path: Path, mode: int) -> None:
    """access(2), with its errno: os.access has only yes and no."""
    words = {os.R_OK: "r", os.W_OK: "w", os.X_OK: "x"}
    if not os.access(path, mode):
        done = subprocess.run(["test", f"-{words[mode]}", path], check=False)
        raise OSError(errno.EROFS if done.returncode == 1 else errno.EINVAL, "")


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_can_be_changed(change: str, mnt: Path) -> None:
    assert errno_of(lambda: CHANGES[change](mnt)) == errno.EROFS


def test_nothing_has_changed(mnt: Path) -> None:
    assert (mnt / "file").read_bytes() == b"0123456789" * 1000
    assert not (mnt / "new").exists() and not (mnt / "other").exists() and (mnt / "sticky").is_dir()


# -- names -------------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[Callable[[Path], object], int]] = {
    "no such name": (lambda m: os.stat(m / "absent"), errno.ENOENT),
    "no such name below": (lambda m: os.stat(m / "dir" / "absent" / "x"), errno.ENOENT),
    "through a file": (lambda m: os.stat(m / "file" / "x"), errno.ENOTDIR),
    "a file with a slash": (lambda m: os.stat(f"{m}/file/"), errno.ENOTDIR),
    "a name of 256": (lambda m: os.stat(m / ("n" * 256)), errno.ENAMETOOLONG),
    "a path of 4096": (lambda m: os.stat(f"{m}/" + "dir/../" * 600 + "file"), errno.ENAMETOOLONG),
    "a loop": (lambda m: os.stat(m / "loop"), errno.ELOOP),
    "a dangling link": (lambda m: os.stat(m / "dangling"), errno.ENOENT),
    "readlink of a file": (lambda m: os.readlink(m / "file"), errno.EINVAL),
    "O_NOFOLLOW of a link": (lambda m: os.open(m / "soft", os.O_NOFOLLOW), errno.ELOOP),
    "O_DIRECTORY of a file": (lambda m: os.open(m / "file", os.O_DIRECTORY), errno.ENOTDIR),
    "create what is there": (lambda m: os.open(m / "file", os.O_CREAT | os.O_EXCL), errno.EEXIST),
    "mkdir what is there": (lambda m: os.mkdir(m / "dir"), errno.EEXIST),
    "symlink what is there": (lambda m: os.symlink("x", m / "soft"), errno.EEXIST),
    "read a directory": (lambda m: _opened(m / "dir", lambda f: os.read(f, 1)), errno.EISDIR),
    "write a directory": (lambda m: os.open(m / "dir", os.O_WRONLY), errno.EISDIR),
    "list a file": (lambda m: os.listdir(m / "file"), errno.ENOTDIR),
    "open a device": (lambda m: os.open(m / "null", os.O_RDONLY), errno.EACCES),
    "write what was opened to read": (lambda m: _opened(m / "file", lambda f: os.write(f, b"x")), errno.EBADF),
    "a negative offset": (lambda m: _opened(m / "file", lambda f: os.lseek(f, -1, os.SEEK_SET)), errno.EINVAL),
    "an unknown attribute": (lambda m: os.getxattr(m / "file", "user.absent"), errno.ENODATA),
    "an unknown ioctl": (lambda m: _opened(m / "file", lambda f: fcntl.ioctl(f, 0x5401)), errno.ENOTTY),
    "a shared writable map": (lambda m: _opened(m / "file", lambda f: mmap.mmap(f, 4096)), errno.EACCES),
    "execute a file that is none": (lambda m: subprocess.run([m / "file"], check=False), errno.EACCES),
    "rename to another file system": (lambda m: os.rename(m / "file", m.parent / "x"), errno.EXDEV),
    "link to another file system": (lambda m: os.link(m / "file", m.parent / "x"), errno.EXDEV),
    "rename to a dot": (lambda m: os.rename(m / "dir", f"{m}/sticky/."), errno.EBUSY),
    "rmdir a dot": (lambda m: os.rmdir(f"{m}/sticky/."), errno.EINVAL),
    "rmdir two dots": (lambda m: os.rmdir(f"{m}/sticky/.."), errno.ENOTEMPTY),
    "unlink below a file": (lambda m: os.unlink(m / "file" / "x"), errno.ENOTDIR),
    "mknod what is there": (lambda m: os.mknod(m / "file", stat.S_IFREG | 0o600), errno.EEXIST),
    "mkfifo what is there": (lambda m: os.mkfifo(m / "file"), errno.EEXIST),
    "link over what is there": (lambda m: os.link(m / "file", m / "empty"), errno.EEXIST),
    "mkdir below a file": (lambda m: os.mkdir(m / "file" / "x"), errno.ENOTDIR),
    "mkdir below nothing": (lambda m: os.mkdir(m / "absent" / "x"), errno.ENOENT),
    "mkdir of 256": (lambda m: os.mkdir(m / ("n" * 256)), errno.ENAMETOOLONG),
    "mkfifo below nothing": (lambda m: os.mkfifo(m / "absent" / "x"), errno.ENOENT),
    "symlink below nothing": (lambda m: os.symlink("x", m / "absent" / "x"), errno.ENOENT),
    "create below nothing": (lambda m: os.open(m / "absent" / "x", os.O_CREAT | os.O_WRONLY), errno.ENOENT),
    "create a directory": (lambda m: os.open(m / "dir", os.O_CREAT | os.O_RDONLY), errno.EISDIR),
    "a fifo that nobody reads": (lambda m: os.open(m / "fifo", os.O_WRONLY | os.O_NONBLOCK), errno.ENXIO),
    "chmod below a file": (lambda m: os.chmod(m / "file" / "x", 0o600), errno.ENOTDIR),
    "chmod of what is not there": (lambda m: os.chmod(m / "absent", 0o600), errno.ENOENT),
    "chmod of a loop": (lambda m: os.chmod(m / "loop", 0o600), errno.ELOOP),
    "chown below a file": (lambda m: os.chown(m / "file" / "x", 1, 1), errno.ENOTDIR),
    "chown of what is not there": (lambda m: os.chown(m / "absent", 1, 1), errno.ENOENT),
    "utime of what is not there": (lambda m: os.utime(m / "absent"), errno.ENOENT),
    "truncate a directory": (lambda m: os.truncate(m / "dir", 0), errno.EISDIR),
    "truncate a fifo": (lambda m: os.truncate(m / "fifo", 0), errno.EINVAL),
    "truncate what is not there": (lambda m: os.truncate(m / "absent", 0), errno.ENOENT),
    "truncate what was opened to read": (lambda m: _opened(m / "file", lambda f: os.ftruncate(f, 0)), errno.EINVAL),
    "allocate what was opened to read": (
        lambda m: _opened(m / "file", lambda f: os.posix_fallocate(f, 0, 10)),
        errno.EBADF,
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_is_refused_has_its_errno(refusal: str, mnt: Path) -> None:
    action, number = REFUSALS[refusal]
    assert errno_of(lambda: action(mnt)) == number


def test_names_lead_where_they_should(mnt: Path) -> None:
    assert (mnt / LONG).read_bytes() == b"long"
    assert (mnt / "soft").read_bytes() == (mnt / "hard").read_bytes() == (mnt / "file").read_bytes()
    assert os.readlink(mnt / "absolute") == "/etc/hostname" and os.readlink(mnt / "dangling") == "no/where"
    assert os.stat(mnt / "dir" / ".." / "dir" / ".").st_ino == os.stat(mnt / "dir").st_ino
    assert os.stat(mnt / "..").st_ino == os.stat(mnt.parent).st_ino
    link = os.open(mnt / "soft", os.O_PATH | os.O_NOFOLLOW)
    assert stat.S_ISLNK(os.fstat(link).st_mode)
    os.close(link)


def test_metadata(mnt: Path) -> None:
    file, hard, soft = os.stat(mnt / "file"), os.stat(mnt / "hard"), os.lstat(mnt / "soft")
    assert (file.st_size, file.st_nlink, file.st_mtime, file.st_ctime) == (10_000, 2, MTIME, MTIME)
    assert file.st_ino == hard.st_ino and file.st_dev == os.stat(mnt).st_dev
    assert soft.st_size == len("file") and stat.S_ISLNK(soft.st_mode)
    assert stat.S_IMODE(os.stat(mnt / "sticky").st_mode) == 0o1777
    assert stat.S_IMODE(os.stat(mnt / "setuid").st_mode) == 0o4755
    null = os.stat(mnt / "null")
    assert stat.S_ISCHR(null.st_mode) and (os.major(null.st_rdev), os.minor(null.st_rdev)) == (1, 3)
    assert stat.S_ISFIFO(os.stat(mnt / "fifo").st_mode)
    assert os.listxattr(mnt / "file") == ["user.colour"] and os.getxattr(mnt / "file", "user.colour") == b"blue"
    before = file.st_atime
    (mnt / "file").read_bytes()
    assert os.stat(mnt / "file").st_atime == before == MTIME, EXCEPTIONS["access times"]
    whole = os.statvfs(mnt)
    assert whole.f_flag & os.ST_RDONLY and whole.f_flag & os.ST_NOSUID and whole.f_flag & os.ST_NODEV
    assert whole.f_namemax == 255 and whole.f_bfree == whole.f_bavail == whole.f_ffree == 0


# -- directories -------------------------------------------------------------------------------------------------------


def test_directories_are_listed_whole_and_typed(mnt: Path) -> None:
    names = [f"entry-{number:03}" for number in range(300)]
    assert sorted(os.listdir(mnt / "dir")) == names
    with os.scandir(mnt) as entries:
        kinds = {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in entries}
    for name, mode in kinds.items():
        assert stat.S_IFMT(os.lstat(mnt / name).st_mode) == stat.S_IFMT(mode)
    raw = subprocess.run(["ls", "-fa", mnt / "dir"], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in raw if name not in (".", "..")] == names
    inodes = subprocess.run(["ls", "-i", mnt / "dir"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(int(line.split()[0]) == os.stat(mnt / "dir" / line.split()[1]).st_ino for line in inodes)


def test_find_sees_everything(mnt: Path) -> None:
    found = subprocess.run(["find", mnt, "-mindepth", "1"], capture_output=True, text=True, check=True).stdout
    expected = sum(len(directories) + len(files) for _, directories, files in os.walk(mnt))
    assert len(found.splitlines()) == expected > 300
    assert (os.stat(mnt / "dir").st_nlink, os.stat(mnt).st_nlink) == (2, 5)  # what find leaves out branches by


def test_two_who_list_at_once_see_the_same(mnt: Path) -> None:
    first, second = os.scandir(mnt / "dir"), os.scandir(mnt / "dir")
    with first, second:
        pairs = [(one.name, two.name) for one, two in zip(first, second, strict=True)]
    assert len(pairs) == 300 and all(one == two for one, two in pairs)


def test_a_directory_can_be_read_again_from_the_start(mnt: Path) -> None:
    directory = os.open(mnt / "dir", os.O_RDONLY)
    try:
        assert os.listdir(directory) == os.listdir(directory) == sorted(os.listdir(mnt / "dir"))
    finally:
        os.close(directory)


# -- open files --------------------------------------------------------------------------------------------------------


def test_reading_ends_at_the_end(mnt: Path) -> None:
    file = os.open(mnt / "file", os.O_RDONLY)
    try:
        assert os.pread(file, 100, 9_990) == b"0123456789" and os.pread(file, 100, 10_000) == b""
        assert os.pread(file, 100, 1 << 40) == b"" and os.pread(file, 0, 5) == b""
        assert os.lseek(file, 0, os.SEEK_END) == 10_000 and os.read(file, 10) == b""
        assert os.lseek(file, 5, os.SEEK_SET) == 5 and os.read(file, 3) == b"567"
        assert os.lseek(file, 0, os.SEEK_HOLE) == 10_000 and os.lseek(file, 7, os.SEEK_DATA) == 7
        assert select.select([file], [], [], 0)[0] == [file]
        os.fsync(file)
        os.fdatasync(file)
        copy = os.dup(file)
        assert os.lseek(copy, 0, os.SEEK_CUR) == os.lseek(file, 0, os.SEEK_CUR)
        os.close(copy)
    finally:
        os.close(file)
    assert (mnt / "empty").read_bytes() == b""


def test_maps(mnt: Path) -> None:
    with open(mnt / "file", "rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as shared:
            assert shared[:] == b"0123456789" * 1000
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[:3] = b"abc"
            assert os.pread(file.fileno(), 3, 0) == b"012"


def test_locks_work_between_processes(mnt: Path) -> None:
    with open(mnt / "file", "rb") as mine, open(mnt / "file", "rb") as other:
        fcntl.flock(mine, fcntl.LOCK_EX)
        assert errno_of(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)) == errno.EWOULDBLOCK
        fcntl.flock(mine, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(mine, fcntl.LOCK_SH, 10, 0)


def test_programs_run_without_set_user_id(mnt: Path) -> None:
    assert subprocess.run([mnt / "program"], capture_output=True, check=True).stdout == b"ran\n"
    done = as_nobody(str(mnt / "setuid"))
    assert done.stdout == f"{NOBODY}\n", done


# -- permissions: another user, where --allow-other lets him in --------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "works"),
    [
        (("cat", "file"), True),
        (("cat", "theirs"), True),
        (("ls", "dir"), True),
        (("ls", "sticky"), True),
        (("cat", "private"), False),
        (("cat", "write-only"), False),
        (("ls", "closed"), False),
        (("cat", "closed/inside"), False),
        (("stat", "closed/inside"), False),
        (("cat", "null"), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_modes_and_owners_hold_for_others(command: tuple[str, str], works: bool, mnt: Path) -> None:
    done = as_nobody(command[0], str(mnt / command[1]))
    assert (done.returncode == 0) == works, done
    assert works or "Permission denied" in done.stderr


def test_the_list(record_property: Figure) -> None:
    known = {*CHANGES, *REFUSALS}
    covered = [names for names in SUITES.values() if isinstance(names, tuple)]
    assert [name for names in covered for name in names if name not in known] == []
    reasons = f"{len(EXCEPTIONS)} exceptions and {len(SUITES) - len(covered)} skips, each with its reason"
    record_property("figure", f"{len(known)} calls with their errno; {reasons}")
