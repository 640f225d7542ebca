"""Paths that lead through a layer's own symbolic links, compared with what podman 4.3 makes of such a layer."""

import stat

import pytest

from ckptfs.errors import FormatError
from ckptfs.model.toc import Entry, Inode
from ckptfs.model.tree import Tree
from ckptfs.settings import Limits


def layer(*entries: str) -> list[Entry]:
    """`d/`: a directory, `l -> d`: a symbolic link, `h = f`: a hard link, `f`: a file."""
    found = []
    for text in entries:
        name, _, target = text.partition(" -> ")
        hard, _, other = text.partition(" = ")
        if target:
            found.append(Entry(name.encode(), Inode(stat.S_IFLNK | 0o777, target=target.encode())))
        elif other:
            found.append(Entry(hard.encode(), None, other.encode()))
        else:
            mode = stat.S_IFDIR | 0o755 if text.endswith("/") else stat.S_IFREG | 0o644
            found.append(Entry(text.rstrip("/").encode(), Inode(mode)))
    return found


def shown(tree: Tree, top: str = "") -> set[str]:
    """As `layer` takes it; a second name of a file as `h = f`."""
    found, names = set(), {}
    for node in tree.walk(top.encode()):
        path, inode = node.path.decode(), node.inode
        assert inode is not None
        if inode.is_dir:
            found |= {path + "/"} if path else set()
        elif names.setdefault(inode.ino, path) != path:
            found.add(f"{path} = {names[inode.ino]}")
        else:
            found.add(f"{path} -> {inode.target.decode()}" if inode.target else path)
    return found


def unpacked(*layers: list[Entry]) -> Tree:
    tree = Tree()
    for rank, entries in enumerate(layers, start=1):
        tree.begin(rank)
        tree.add(entries, rank)
        tree.finish(rank)
    return tree


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (("usr/", "lib -> usr", "lib/y"), {"usr/", "lib -> usr", "usr/y"}),
        (("usr/", "lib -> /usr", "lib/y"), {"usr/", "lib -> /usr", "usr/y"}),
        (("a/", "usr/", "a/lib -> ../usr", "a/lib/y"), {"a/", "usr/", "a/lib -> ../usr", "usr/y"}),
        (("a/", "usr/", "a/lib -> ../../../usr", "a/lib/y"), {"a/", "usr/", "a/lib -> ../../../usr", "usr/y"}),
        (("usr/", "b -> usr", "a -> b", "a/y"), {"usr/", "b -> usr", "a -> b", "usr/y"}),
        (("a/", "b/", "a/l -> ../b", "a/l/c/", "a/l/c/f"), {"a/", "b/", "a/l -> ../b", "b/c/", "b/c/f"}),
        (("d/", "d/f", "l -> d", "h = l/f"), {"d/", "d/f", "l -> d", "h = d/f"}),
        (("d/", "d/f", "e/", "e/l -> ../d", "h = e/l/f"), {"d/", "d/f", "e/", "e/l -> ../d", "h = d/f"}),
        (("d/", "l -> d", "h = l", "h/x"), {"d/", "d/x", "h -> d", "l = h"}),
        (("d/", "l -> ././d//", "l/x"), {"d/", "d/x", "l -> ././d//"}),
        (("l -> .", "l/x"), {"l -> .", "x"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_path_through_a_link_of_its_layer_is_where_podman_unpacks_it(entries: tuple[str], expected: set[str]) -> None:
    assert shown(unpacked(layer(*entries))) == expected


def test_a_link_has_the_mode_that_links_have_on_linux() -> None:
    """lstat(2) of any extraction says 0777; tars say what umask was, or nothing."""
    tree = unpacked([Entry(b"l", Inode(stat.S_IFLNK | 0o4644, target=b"x")), Entry(b"h", None, b"l")])
    modes = {node.inode.mode for node in tree.root.visible_children() if node.inode is not None}
    assert modes == {stat.S_IFLNK | 0o777}


def test_a_link_of_another_layer_leads_nowhere() -> None:
    """The directory is over the link, as overlayfs has it: podman unpacks each layer by itself."""
    assert shown(unpacked(layer("usr/", "lib -> usr"), layer("lib/y"))) == {"usr/", "lib/", "lib/y"}
    assert shown(unpacked(layer("lib/y"), layer("usr/", "lib -> usr"))) == {"usr/", "lib -> usr"}


def test_a_link_leads_on_when_a_higher_layer_hides_it() -> None:
    tree = Tree()
    tree.begin(1)
    tree.begin(2)
    tree.add(layer("usr/", "lib -> usr"), 1)
    tree.add(layer("lib/z"), 2)
    tree.add(layer("lib/y"), 1)
    assert shown(tree) == {"usr/", "usr/y", "lib/", "lib/z"}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (("usr/", "lib -> usr", "lib/", "lib/y"), {"usr/", "lib/", "lib/y"}),
        (("usr/", "lib -> usr", "lib/a", "lib", "lib/", "lib/y"), {"usr/", "usr/a", "lib/", "lib/y"}),
        (("d/", "d/l -> /e", "d", "d/", "d/l/", "d/l/x"), {"d/", "d/l/", "d/l/x"}),
        (("d/", "e/", "l -> d", "l/x", "l -> e", "l/y"), {"d/", "d/x", "e/", "e/y", "l -> e"}),
        (("d/", "e/", "f", "l -> d", "l = f", "l/x"), {"d/", "e/", "f", "l/", "l/x"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_link_that_is_replaced_leads_nowhere(entries: tuple[str], expected: set[str]) -> None:
    assert shown(unpacked(layer(*entries))) == expected


def test_what_a_link_leads_to_is_implied() -> None:
    """As by containerd. podman and tar refuse the layer."""
    tree = unpacked(layer("lib -> usr/lib", "lib/a/y"))
    assert shown(tree) == {"lib -> usr/lib", "usr/", "usr/lib/", "usr/lib/a/", "usr/lib/a/y"}
    tree = unpacked(layer("a -> /etc/../../../tmp", "a/y"))
    assert shown(tree) == {"a -> /etc/../../../tmp", "tmp/", "tmp/y"}


def test_whiteouts_lie_where_the_link_leads() -> None:
    lower = layer("usr/", "usr/x", "usr/y")
    assert shown(unpacked(lower, layer("usr/", "lib -> usr", "lib/.wh.x"))) == {"usr/", "usr/y", "lib -> usr"}
    assert shown(unpacked(lower, layer("usr/", "lib -> usr", "lib/.wh..wh..opq"))) == {"usr/", "lib -> usr"}


def test_the_root_of_a_layer_is_the_directory_that_it_is_shown_in() -> None:
    tree = Tree()
    tree.add(layer("usr/", "diff/"), 1)
    tree.begin(1, b"diff")
    tree.add(layer("diff/", "diff/usr/", "diff/a -> /usr", "diff/a/x", "diff/b -> ../../usr", "diff/b/y"), 1)
    tree.add(layer("diff/h = diff/b/y"), 1)
    tree.finish(1)
    expected = {"a -> /usr", "b -> ../../usr", "usr/", "usr/x", "usr/y"}
    assert shown(tree, "diff") == {"diff/"} | {f"diff/{text}" for text in expected} - {"diff/usr/y"} | {
        "diff/h",
        "diff/usr/y = diff/h",
    }
    assert shown(tree, "usr") == {"usr/"}


@pytest.mark.parametrize(
    "entries",
    [
        ("a -> b", "b -> a", "a/y"),
        ("a -> a", "a/y"),
        ("a -> b/x", "b -> a", "h = a/y"),
        ("a -> " + "/".join("x" * 300), "a/y"),
        ("a -> " + "x" * 300, "a/y"),
        ("a -> " + "/".join("x" * 200), "b -> a/" + "/".join("x" * 100), "b/y"),
    ],
    ids=["circle", "itself", "hard-link", "deep", "long-name", "deep-together"],
)
def test_a_link_that_leads_nowhere_good_is_refused(entries: tuple[str]) -> None:
    with pytest.raises(FormatError):
        unpacked(layer(*entries))


def test_a_path_leads_through_as_many_links_as_the_limits_say() -> None:
    tree = Tree(limits=Limits()._replace(path_links=1))
    tree.begin(1)
    tree.add(layer("usr/", "b -> usr", "a -> b", "b/x"), 1)
    with pytest.raises(FormatError):
        tree.add(layer("a/y"), 1)
    assert shown(tree) == {"usr/", "b -> usr", "a -> b", "usr/x"}
