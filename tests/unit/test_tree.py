"""The merge: ranks, whiteouts, hard links, and that the order of arrival does not matter."""

import itertools
import stat
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.errors import FormatError
from ckptfs.model.toc import Entry, Inode
from ckptfs.model.tree import OPAQUE_XATTR, Tree
from tests.support.speed import slowness


def file(path: str, mark: int = 0) -> Entry:
    return Entry(path.encode(), Inode(stat.S_IFREG | 0o644, size=mark))


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path.encode(), Inode(stat.S_IFDIR | mode))


def link(path: str, target: str) -> Entry:
    return Entry(path.encode(), None, target.encode())


def build(*layers: list[Entry], order: tuple[int, ...] | None = None) -> Tree:
    tree = Tree()
    for rank in range(1, len(layers) + 1):
        tree.begin(rank)
    for rank in order or range(1, len(layers) + 1):
        tree.add(layers[rank - 1], rank)
        tree.finish(rank)
    return tree


def shown(tree: Tree) -> dict[str, tuple[str, int, int]]:
    """path -> (kind, permissions, size as the mark of where it is from)."""
    out = {}
    for node in tree.walk():
        assert node.inode is not None
        kind = "d" if node.inode.is_dir else "f" if node.inode.is_file else "?"
        out[node.path.decode()] = (kind, stat.S_IMODE(node.inode.mode), node.inode.size)
    return out


def test_upper_file_wins_in_any_order_of_arrival() -> None:
    for order in ((1, 2), (2, 1)):
        tree = build([file("a", 1), file("b", 1)], [file("a", 2)], order=order)
        assert shown(tree)["a"] == ("f", 0o644, 2)
        assert shown(tree)["b"] == ("f", 0o644, 1)


def test_whiteout_hides_lower_ranks_only() -> None:
    for order in ((1, 2), (2, 1)):
        tree = build([file("d/x", 1), file("d/y", 1)], [file("d/.wh.x"), file("d/.wh.z"), file("d/z", 2)], order=order)
        assert set(shown(tree)) == {"", "d", "d/y", "d/z"}


def test_an_addition_wins_over_a_whiteout_of_the_same_layer() -> None:
    for upper in ([file(".wh.x"), file("x", 2)], [file("x", 2), file(".wh.x")]):
        assert shown(build([file("x", 1)], upper))["x"] == ("f", 0o644, 2)


def test_opaque_directory_hides_what_is_below() -> None:
    for order in ((1, 2), (2, 1)):
        tree = build([file("d/x", 1)], [directory("d", 0o700), file("d/.wh..wh..opq"), file("d/y", 2)], order=order)
        assert shown(tree) == {"": ("d", 0o755, 0), "d": ("d", 0o700, 0), "d/y": ("f", 0o644, 2)}


def test_whiteout_of_a_directory_then_a_new_one() -> None:
    for order in itertools.permutations((1, 2, 3)):
        tree = build([file("d/old", 1)], [file(".wh.d")], [file("d/new", 3)], order=order)
        assert set(shown(tree)) == {"", "d", "d/new"}, order


def test_file_over_directory_and_back() -> None:
    for order in itertools.permutations((1, 2, 3)):
        tree = build([file("d/x", 1)], [file("d", 2)], [file("d/y", 3)], order=order)
        assert set(shown(tree)) == {"", "d", "d/y"}, order


def test_a_file_again_and_again_where_a_higher_layer_has_a_directory() -> None:
    """Each time costs what its own layer has put below it meanwhile, not what there is."""
    count = 20_000
    tree = Tree()
    tree.begin(1)
    tree.begin(2)
    tree.add([file(f"d/{i}", 2) for i in range(count)], 2)
    tree.finish(2)
    began = time.process_time()
    tree.add([entry for i in range(count) for entry in (file(f"d/{i}/own", 1), file(f"d/own{i}", 1), file("d", 1))], 1)
    tree.add([file("d/last", 1), file("d/0", 1)], 1)
    tree.finish(1)
    took = time.process_time() - began
    assert set(shown(tree)) == {"", "d", "d/last", *(f"d/{i}" for i in range(count))}
    assert took <= 2.0 * slowness()


def test_directory_metadata_comes_from_the_highest_that_describes_it() -> None:
    for order in ((1, 2), (2, 1)):
        tree = build([directory("d", 0o700)], [file("d/x", 2)], order=order)
        assert shown(tree)["d"] == ("d", 0o700, 0)


def test_hard_links_share_an_inode_and_count() -> None:
    tree = build([file("a", 1), link("b", "a"), link("c", "b")])
    nodes = [tree.find(name) for name in (b"a", b"b", b"c")]
    assert len({node.inode.ino for node in nodes if node is not None and node.inode is not None}) == 1
    assert nodes[0] is not None and nodes[0].inode is not None and nodes[0].inode.nlink == 3


def test_hard_link_to_a_file_that_a_higher_layer_replaces() -> None:
    for order in ((1, 2), (2, 1)):
        tree = build([file("a", 1), link("b", "a")], [file("a", 2)], order=order)
        assert shown(tree)["b"][2] == 1 and shown(tree)["a"][2] == 2
        b = tree.find(b"b")
        assert b is not None and b.inode is not None and b.inode.nlink == 1


def test_hard_link_across_layers() -> None:
    for order in ((1, 2), (2, 1)):
        tree = build([file("a", 1)], [link("b", "a")], order=order)
        assert shown(tree)["b"][2] == 1, order


def test_hard_link_across_layers_leads_to_the_highest_below_in_any_order_of_arrival() -> None:
    for order in itertools.permutations((1, 2, 3)):
        tree = build([file("a", 1), file("z", 1)], [file("a", 2)], [link("b", "a"), link("c", "z")], order=order)
        assert (shown(tree)["b"][2], shown(tree)["c"][2]) == (2, 1), order


def test_hard_link_to_a_file_of_its_own_layer_that_comes_after_a_lower_one() -> None:
    tree = Tree()
    tree.begin(1)
    tree.begin(2)
    tree.add([link("b", "a")], 2)
    tree.add([file("a", 1)], 1)
    tree.finish(1)
    tree.add([file("a", 2)], 2)
    tree.finish(2)
    assert shown(tree)["b"][2] == 2


def test_forward_hard_link_and_long_chains() -> None:
    chain = [link(f"l{i}", f"l{i + 1}") for i in range(50_000)]
    tree = build([*chain, file("l50000", 7)])
    assert shown(tree)["l0"][2] == 7


@pytest.mark.parametrize(
    "entries",
    [
        [link("a", "a")],
        [link("a", "b"), link("b", "a")],
        [link("a", "nowhere")],
        [directory("d"), link("a", "d")],
    ],
    ids=["self", "cycle", "dangling", "to-a-directory"],
)
def test_impossible_hard_links(entries: list[Entry]) -> None:
    with pytest.raises(FormatError):
        build(entries)


def test_repeated_entry_replaces_as_long_as_its_layer_arrives() -> None:
    tree = Tree()
    tree.begin(1)
    tree.begin(2)
    tree.add([file("b", 1), file("d/a", 1)], 1)
    tree.add([file("d/a", 2)], 2)
    tree.finish(1)
    nodes = {path: tree.find(path) for path in (b"b", b"d", b"d/a")}
    told = {path: tree.replaceable(node) for path, node in nodes.items() if node is not None}
    assert told == {b"b": False, b"d": True, b"d/a": True}
    tree.add([file("d/a", 3)], 2)
    assert shown(tree)["d/a"][2] == 3
    tree.finish(2)
    assert not any(tree.replaceable(node) for node in nodes.values() if node is not None)


def test_directory_link_counts() -> None:
    tree = build([directory("d/e"), directory("d/f"), file("d/g")], [file("d/.wh.e")])
    d = tree.find(b"d")
    assert d is not None and d.inode is not None and d.inode.nlink == 3
    assert tree.root.inode is not None and tree.root.inode.nlink == 3


def test_settled_says_when_an_answer_can_still_change() -> None:
    tree = Tree()
    tree.begin(1)
    tree.begin(2)
    tree.add([file("a", 1)], 1)
    assert not tree.settled(b"a", tree.find(b"a"))  # layer 2 could replace it
    tree.add([file("b", 2)], 2)
    assert tree.settled(b"b", tree.find(b"b"))
    assert not tree.settled(b"c", None)
    tree.finish(2)
    assert tree.settled(b"a", tree.find(b"a"))
    assert not tree.settled(b"c", None)
    tree.finish(1)
    assert tree.settled(b"c", None) and tree.complete()


def test_a_prefix_only_concerns_its_directory() -> None:
    tree = Tree()
    tree.begin(9, b"diff")
    assert tree.settled(b"other", None) and tree.complete(b"") and not tree.complete(b"diff")
    assert not tree.settled(b"diff/x", None)


_names = st.sampled_from(["a", "b", "c"])
_paths = st.lists(_names, min_size=1, max_size=3).map("/".join)
_entries = st.one_of(
    st.builds(lambda p: ("file", p), _paths),
    st.builds(lambda p: ("dir", p), _paths),
    st.builds(lambda p: ("wh", p), _paths),
    st.builds(lambda p: ("opq", p), _paths),
)


def _make(kind: str, path: str, rank: int) -> Entry:
    if kind == "file":
        return file(path, rank)
    if kind == "dir":
        return directory(path, 0o700 + rank)
    head, _, name = path.rpartition("/")
    prefix = head + "/" if head else ""
    return file(f"{prefix}.wh.{name}") if kind == "wh" else file(f"{path}/.wh..wh..opq")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(_entries, max_size=5, unique_by=lambda e: e[1]), min_size=2, max_size=3))
def test_order_of_layers_never_matters(layers: list[list[tuple[str, str]]]) -> None:
    """Whatever the layers are, reading them in any order shows the same tree (entries of one layer in its order)."""
    results = set()
    for order in itertools.permutations(range(1, len(layers) + 1)):
        made = [[_make(kind, path, rank) for kind, path in layer] for rank, layer in enumerate(layers, start=1)]
        results.add(str(shown(build(*made, order=order))))
    assert len(results) == 1, results


def test_an_implied_directory_waits_for_the_layers_that_could_describe_it() -> None:
    tree = Tree()
    tree.begin(1)
    tree.begin(2)
    tree.add([file("d/x")], 2)
    node = tree.find(b"d")
    assert node is not None
    assert not tree.settled(b"d", node) and not tree.lasting(node)
    tree.finish(2)
    assert not tree.settled(b"d", node), "layer 1 may still say what mode it has"
    tree.add([directory("d", 0o700)], 1)
    assert tree.settled(b"d", node) and tree.lasting(node)
    assert shown(tree)["d"] == ("d", 0o700, 0)


def test_a_stream_is_not_waited_for_to_describe_what_it_implied() -> None:
    """Tars list directories before what is in them; a later entry is told by attributes that do not last."""
    tree = Tree()
    tree.begin(1)
    tree.add([file("d/x")], 1)
    node = tree.find(b"d")
    assert node is not None
    assert tree.settled(b"d", node) and not tree.lasting(node)
    tree.finish(1)
    assert tree.lasting(node)


def test_a_tar_may_describe_the_directory_that_it_is_shown_in() -> None:
    tree = Tree()
    tree.add([directory("delta")], 1)
    tree.begin(1, b"delta")
    node = tree.find(b"delta")
    assert node is not None
    assert tree.settled(b"delta", node) and not tree.described(node) and not tree.lasting(node)
    tree.add([directory("delta", 0o1777)], 1)
    assert tree.described(node) and tree.lasting(node)
    assert shown(tree)["delta"][1] == 0o1777


def test_whether_a_directory_is_opaque_is_known_at_the_end() -> None:
    tree = Tree()
    tree.add([directory("delta")], 1)
    tree.begin(1, b"delta")
    tree.add([directory("delta/d"), file("delta/d/x")], 1, whiteouts="overlay")
    node = tree.find(b"delta/d")
    assert node is not None and node.inode is not None
    assert not tree.marked(node)
    tree.delete(b"delta/d", 1)
    tree.finish(1)
    assert tree.marked(node)
    assert set(node.inode.xattrs) == {OPAQUE_XATTR}


@pytest.mark.parametrize("again", [[directory("d"), file("d/new")], [file("d/new")]], ids=["listed", "implied"])
def test_a_directory_made_again_is_opaque_in_any_order(again: list[Entry]) -> None:
    for entries in ([file(".wh.d"), *again], [*again, file(".wh.d")]):
        tree = Tree()
        tree.begin(1)
        tree.add(entries, 1, whiteouts="overlay")
        tree.finish(1)
        node = tree.find(b"d")
        assert node is not None and node.inode is not None and node.inode.is_dir
        assert set(node.inode.xattrs) == {OPAQUE_XATTR}


def test_a_directory_of_which_nothing_is_left_is_opaque_and_empty() -> None:
    """A mark may be all that a layer says of a directory; below a whiteout it says nothing."""
    for entries, path in (([file("d/e/.wh..wh..opq")], b"d/e"), ([file(".wh.d"), file("d/.wh..wh..opq")], b"")):
        tree = Tree()
        tree.begin(1)
        tree.add(entries, 1, whiteouts="overlay")
        tree.finish(1)
        marked = [node.path for node in tree.walk() if node.inode is not None and OPAQUE_XATTR in node.inode.xattrs]
        assert marked == ([path] if path else [])
        assert set(shown(tree)) == ({"", "d", "d/e"} if path else {"", "d"})


def test_only_a_whiteout_makes_a_directory_opaque() -> None:
    """Not what a layer says of itself, nor what another tree has made of its entries: a node keeps them."""
    entries = [directory("d"), file("d/.wh..wh..opq"), directory("e")]
    marked, described = entries[0].inode, entries[2].inode
    assert marked is not None and described is not None
    described.xattrs = {b"user.note": b"1", OPAQUE_XATTR: b"y"}
    as_lower, merged = Tree(), Tree()
    as_lower.add(entries, 1, whiteouts="overlay")
    as_lower.finish(1)
    assert set(marked.xattrs) == {OPAQUE_XATTR} and set(described.xattrs) == {b"user.note"}
    merged.add(entries, 1)
    merged.finish(1)
    assert not marked.xattrs and set(described.xattrs) == {b"user.note"}


# What layers merge to is what overlayfs shows of them, each by itself.

_SAID = st.tuples(st.sampled_from("fdwo"), st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("/".join))


def said(layer: list[tuple[str, str]], number: int) -> list[Entry]:
    """Files, directories, whiteouts and opaque marks in any order; no path is a file and a directory.

    Nor is anything marked below a whiteout of the same layer: tools do not agree on whether that makes a directory.
    """
    gone = {path + "/" for kind, path in layer if kind == "w"}
    inside = {"w": lambda path: path.rpartition("/")[0] + "/", "o": lambda path: path + "/"}
    layer = [(kind, path) for kind, path in layer if kind in "fd" or not inside[kind](path).startswith(tuple(gone))]
    folders = {path for kind, path in layer if kind == "d"}
    folders |= {path[:at] for _, path in layer for at in range(1, len(path)) if path[at] == "/"}
    out = []
    for kind, path in layer:
        above, slash, name = path.rpartition("/")
        if kind == "w":
            out.append(file(f"{above}{slash}.wh.{name}"))
        elif kind == "o":
            out.append(file(f"{path}/.wh..wh..opq"))
        elif kind == "d" or path in folders:
            out.append(directory(path))
        else:
            out.append(file(path, number))
    return out


def overlaid(trees: list[Tree], path: bytes = b"") -> dict[str, tuple[str, int]]:
    """What overlayfs makes of lower directories, the highest first, below `path`."""
    shown_, names = {}, {n.name for tree in trees if (top := tree.find(path)) for n in top.visible_children()}
    for name in sorted(names):
        below: list[Tree] = []
        inside = path + b"/" + name if path else name
        for tree in trees:
            node = tree.find(inside)
            if node is None or node.inode is None:
                continue
            if not node.inode.is_dir:
                if not below and node.inode.is_file:
                    shown_[inside.decode()] = ("f", node.inode.size)
                break
            below.append(tree)
            if OPAQUE_XATTR in node.inode.xattrs:
                break
        if below:
            shown_ |= {inside.decode(): ("d", 0), **overlaid(below, inside)}
    return shown_


@settings(deadline=None)
@given(st.lists(st.lists(_SAID, max_size=7), min_size=1, max_size=4))
def test_layers_merge_to_what_overlayfs_shows_of_them(layers: list[list[tuple[str, str]]]) -> None:
    lower = []
    for number, layer in enumerate(layers, start=1):
        tree = Tree()
        tree.begin(1)
        tree.add(said(layer, number), 1, whiteouts="overlay")
        tree.finish(1)
        lower.insert(0, tree)
    whole = build(*(said(layer, number) for number, layer in enumerate(layers, start=1)))
    assert {path: (kind, size) for path, (kind, _, size) in shown(whole).items() if path} == overlaid(lower)
