"""Inspection for people: tables and trees on a terminal, by rich. Imported only when something is printed.

Whatever comes out of an image is shown as text: no markup is interpreted, and characters that a terminal would act on
are written as escapes. Owns no facts.
"""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ckptfs.criu.files import Socket
from ckptfs.inspection.container import Container
from ckptfs.inspection.diff import Difference
from ckptfs.inspection.memory import Match
from ckptfs.inspection.overview import Overview, Sizes
from ckptfs.inspection.parts import Part
from ckptfs.inspection.processes import Process, by_parent
from ckptfs.terminal import printable, size_text

_ROW = 16  # bytes in a line of a hex dump
_WIDE = 100  # columns of a terminal from which on a table of eight can be read


def print_summaries(console: Console, rows: Iterable[tuple[str, Container, Sizes]]) -> None:
    """`show`: a line per checkpoint, (its name, container, sizes); a paragraph where a line is too short for that."""
    titles = ("Container", "Image", "!ID", "Engine", "Created", "!Size", "!Delta", "Checkpoint")
    table = _table(*titles)
    for number, (name, container, sizes) in enumerate(rows):
        engine = "/".join(filter(None, (container.engine, container.runtime)))
        created = (container.created or "")[:16].replace("T", " ")
        size, delta = size_text(sizes.total), size_text(sizes.rootfs_diff)
        words = (container.name, container.image, container.id[:12], engine, created, size, delta, name)
        if console.width >= _WIDE:
            table.add_row(*map(_text, words))
            continue
        if number:
            console.print()
        for title, word in zip(titles, words, strict=True):
            console.print(_labelled(title.lstrip("!"), word), soft_wrap=True)
    if table.row_count:
        console.print(table)


def print_overview(console: Console, overview: Overview, before: str = "") -> None:
    """`inspect`: all that the overview has, as one tree. `before`: the image that this one is an increment of."""
    container, parts = overview.container, overview.parts
    tree = Tree(_text(container.name or "checkpoint"), guide_style="dim")
    for label, value in _facts(overview):
        if value:
            tree.add(_labelled(label, value))
    if before:
        tree.add(_labelled("Unchanged memory from", before))
    sizes = tree.add(_labelled("Checkpoint size", size_text(overview.sizes.total)))
    sizes.add(_labelled("Memory pages", size_text(overview.sizes.pages)))
    if overview.sizes.gpu_pages:
        sizes.add(_labelled("GPU memory pages", size_text(overview.sizes.gpu_pages)))
    if overview.sizes.rootfs_diff:
        tree.add(_labelled("Root fs diff size", size_text(overview.sizes.rootfs_diff)))
    _add_statistics(tree, overview)
    if Part.METADATA in parts and container.annotations:
        branch = tree.add("Annotations")
        for key, value in sorted(container.annotations.items()):
            branch.add(_labelled(key, value))
    if overview.processes:
        families = by_parent(overview.processes)
        branch = tree.add("Process tree")
        stack = [(branch, process) for process in reversed(families[0])]
        while stack:
            parent, process = stack.pop()
            node = _add_process(parent, process, parts)
            stack.extend((node, child) for child in reversed(families.get(process.pid, ())))
    if Part.MOUNTS in parts and container.mounts:
        branch = tree.add("Mounts")
        for mount in container.mounts:
            branch.add(_labelled(mount.destination, f"{mount.type} from {mount.source}"))
    if overview.unknown:
        branch = tree.add("Files that are not known here")
        for name in overview.unknown:
            branch.add(_text(name))
    console.print(tree)


def print_memory_sizes(console: Console, processes: Sequence[Process]) -> None:
    """`memparse` without a process: how much memory each one has."""
    table = _table("PID", "Process", "Memory", "Shared memory")
    for process in processes:
        table.add_row(str(process.pid), _text(process.name), size_text(process.memory), size_text(process.shared))
    console.print(table)


def print_matches(console: Console, matches: Iterable[Match]) -> int:
    """`memparse --search`: a line for each match as it is found, with its process; returns how many."""
    count = 0
    for match in matches:
        count += 1
        line = Text(f"{match.pid:>7}  {match.vaddr:016x}  ", style="cyan")
        line.append(_printable(match.before), "dim")
        line.append(_printable(match.data), "bold")
        line.append(_printable(match.after), "dim")
        console.print(line, soft_wrap=True)
    return count


def print_difference(console: Console, difference: Difference) -> None:
    """`diff`."""
    marks = {"added": ("+", "green"), "removed": ("-", "red"), "modified": ("~", "yellow")}
    for container in difference.containers:
        of = f"{container.name}: " if container.name else ""
        for change in container.processes:
            mark, style = marks[change.status]
            console.print(Text(f"{mark} {printable(of)}process {change.pid} {printable(change.name)}", style))
            for name, (before, after) in change.fields.items():
                console.print(_labelled(f"    {name}", f"{before} -> {after}"), soft_wrap=True)
        for memory in container.memory:
            words = f"{memory.changed_pages} pages changed, {memory.added_pages} added, {memory.removed_pages} removed"
            console.print(_labelled(f"{of}memory of {memory.pid}", f"{words}, {memory.same_pages} the same"))
    for file in difference.files:
        mark, style = marks[file.status]
        fields = f" ({', '.join(file.fields)})" if file.fields else ""
        console.print(Text(f"{mark} {printable(file.path)}{fields}", style), soft_wrap=True)
    if difference.fetch_bytes is not None:
        console.print(_labelled("To fetch for the second", size_text(difference.fetch_bytes)))


def hex_lines(vaddr: int, data: bytes) -> Iterator[str]:
    """A hex dump as checkpointctl prints it: address, 16 bytes, their ASCII; "*" for rows equal to the one before."""
    previous, repeated = None, False
    for offset in range(0, len(data), _ROW):
        row = data[offset : offset + _ROW]
        if row == previous:
            if not repeated:
                yield "*"
            repeated = True
            continue
        previous, repeated = row, False
        yield f"{vaddr + offset:016x}  {row.hex(' '):<{3 * _ROW - 1}}  |{_printable(row)}|"


def _facts(overview: Overview) -> Iterator[tuple[str, str]]:
    container = overview.container
    yield "Image", container.image
    yield "ID", container.id
    yield "Runtime", container.runtime
    yield "Created", container.created or ""
    yield "Checkpointed", container.checkpointed or ""
    yield "Engine", container.engine
    yield "Pod", container.pod
    yield "Namespace", container.namespace
    for interface in container.interfaces:
        name = f"Interface {interface.name} of {interface.network}" if interface.name else "IP"
        yield name, " ".join((*interface.addresses, interface.mac))
    yield "Host name", overview.host_name
    yield "Machine", ", ".join(sorted({process.machine for process in overview.processes if process.machine}))


def _add_statistics(tree: Tree, overview: Overview) -> None:
    statistics = overview.statistics
    if statistics is None:
        return
    branch = tree.add("CRIU dump statistics")
    for label, microseconds in (
        ("Freezing time", statistics.freezing_time),
        ("Frozen time", statistics.frozen_time),
        ("Memory dump time", statistics.memdump_time),
        ("Memory write time", statistics.memwrite_time),
    ):
        branch.add(_labelled(label, _duration(microseconds)))
    branch.add(_labelled("Pages scanned", str(statistics.pages_scanned)))
    branch.add(_labelled("Pages written", str(statistics.pages_written)))


def _add_process(parent: Tree, process: Process, parts: Part) -> Tree:
    words = " ".join(process.arguments) if process.arguments else process.name
    state = "" if process.state == "Alive" else f" ({process.state})"
    line = Text(f"[{process.pid}]{state} ", style="cyan")
    line.append(printable(words), "default")
    if process.memory:
        line.append(f"  {size_text(process.memory)}", "dim")
    if process.arguments is None:
        line.append("  command line in pages that cannot be read here", "dim")
    node = parent.add(line)
    if process.environment:
        branch = node.add("Environment variables")
        for variable in process.environment:
            branch.add(_text(variable))
    if Part.FILES in parts and process.descriptors:
        branch = node.add("Open files")
        for entry in process.descriptors:
            branch.add(_labelled(f"[{entry.kind} {entry.fd}]".replace("[ ", "["), entry.path, separator=" "))
    found = [entry.socket for entry in process.descriptors if entry.socket is not None]
    if Part.SOCKETS in parts and found:
        branch = node.add("Open sockets")
        for socket in found:
            branch.add(_text(_socket_words(socket)))
    return node


def _socket_words(socket: Socket) -> str:
    words = [socket.family, socket.type, socket.protocol, socket.state]
    if socket.family in ("INET", "INET6"):
        words.append(f"{socket.source}:{socket.source_port} -> {socket.destination}:{socket.destination_port}")
    elif socket.source:
        words.append(socket.source)
    words.append(f"(send {size_text(socket.send_buffer)}, receive {size_text(socket.receive_buffer)})")
    return " ".join(word for word in words if word)


def _duration(microseconds: int) -> str:
    if microseconds < 1000:
        return f"{microseconds} µs"
    return f"{microseconds / 1000:.2f} ms" if microseconds < 1_000_000 else f"{microseconds / 1_000_000:.2f} s"


def _table(*columns: str) -> Table:
    """A table whose columns fold where the terminal is narrow, but for those with a "!"."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip("!"), overflow="fold", no_wrap=column.startswith("!"))
    return table


def _labelled(label: str, value: str, separator: str = ": ") -> Text:
    text = Text(printable(label) + separator, style="bold")
    text.append(printable(value), "not bold")
    return text


def _text(value: str) -> Text:
    return Text(printable(value))


def _printable(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
