"""Conversations out of trees of messages, as OASST publishes them: nested replies, or one message to a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_finetune_kit.data.formats.conversations import ROLES, said_in_turn
from llm_finetune_kit.data.formats.rows import Example, Fault, Notes, Row, Skipped, no_text, truth
from llm_finetune_kit.data.sources.json_flaws import in_words

Threads = Literal["best", "all"]
Outcome = Example | Fault | Skipped
View = Callable[[Row], Row]  # the columns of a row by the names of the slots

REFUSED = "hold a message that was deleted or refused in review, which was left out with its replies"
UNUSED = {
    "best": "hold messages on no best ranked thread, which were left out (data.threads=all uses every thread)",
    "all": "hold prompts that nobody answered, which were left out",
}


@dataclass(slots=True, eq=False)
class Node:
    """One message of a tree; `index` is its row, `place` where it stands in that row."""

    index: int
    place: str
    role: str
    text: str
    rank: float  # 0 is the best of its siblings; infinite where nobody ranked it
    parent: str | None
    refused: bool
    replies: list[Node] = field(default_factory=list)


def oasst_trees(rows: Sequence[Row], view: View, threads: Threads, notes: Notes) -> Iterator[tuple[int, Outcome]]:
    """One tree to a row: {"prompt": {"text", "role", "replies": [...]}}."""
    for index, row in enumerate(rows):
        try:
            root = _tree(view(row)["prompt"], index)
        except Fault as fault:
            yield index, fault
            continue
        yield from _threads_of(root, threads, notes)


def oasst_messages(rows: Sequence[Row], view: View, threads: Threads, notes: Notes) -> Iterator[tuple[int, Outcome]]:
    """One message to a row, joined by `parent_id`; a message without its parent is a fault, and so is a circle."""
    nodes: dict[str, Node] = {}
    for index, row in enumerate(rows):
        try:
            seen = view(row)
            name, node = _name(seen["message_id"], "message_id"), _node(seen, index, "", seen["parent_id"])
            if name in nodes:
                raise Fault(86, "message_id", f"is '{name[:60]}', as in an earlier row")
            nodes[name] = node
        except Fault as fault:
            yield index, fault
    roots = [node for node in nodes.values() if node.parent is None]
    orphans = [node for node in nodes.values() if node.parent is not None and node.parent not in nodes]
    for node in nodes.values():
        if node.parent in nodes:
            nodes[node.parent].replies.append(node)
    below = _below(orphans)
    for node in orphans:
        yield node.index, Fault(84, "parent_id", f"is '{str(node.parent)[:60]}', and no message has this id")
    yield from ((node.index, Skipped("unreachable reply")) for node in below)
    lost = {id(node) for node in [*roots, *_below(roots), *orphans, *below]}
    for node in nodes.values():
        if id(node) not in lost:
            yield node.index, Fault(85, "parent_id", "leads in a circle: following the parents never comes to a first message")
    for root in roots:
        yield from _threads_of(root, threads, notes)


def _below(nodes: list[Node]) -> list[Node]:
    found, waiting = [], [reply for node in nodes for reply in node.replies]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += node.replies
    return found


# --- messages ----------------------------------------------------------------------------------------------


def _tree(value: Any, index: int) -> Node:
    root = _node(value, index, "prompt", None)
    waiting = [(root, value)]
    while waiting:
        node, given = waiting.pop()
        replies = given.get("replies")
        if replies is not None and type(replies) is not list:
            raise Fault(5, f"{node.place}.replies", f"is {in_words(replies)}, not a list")
        for number, reply in enumerate(replies or []):
            child = _node(reply, index, f"{node.place}.replies[{number}]", None)
            node.replies.append(child)
            waiting.append((child, reply))
    return root


def _node(value: Any, index: int, place: str, parent: Any) -> Node:
    if type(value) is not dict:
        raise Fault(4 if value is None else 5, place, f"is {in_words(value)}, not a message with text and role")
    dot = f"{place}." if place else ""
    for key in ("text", "role"):
        if type(value.get(key)) is not str:
            raise no_text(value.get(key), dot + key) if key in value else Fault(3, dot + key, "is missing")
    role = ROLES.get(value["role"].strip().lower(), "")
    if role not in ("user", "assistant"):
        raise Fault(6, f"{dot}role", f"is the unknown role '{value['role'][:40]}'; known are prompter and assistant")
    if not value["text"] or value["text"].isspace():
        raise Fault(9, f"{dot}text", "is empty")
    parent = None if parent is None or parent == "" else _name(parent, "parent_id")
    refused = truth(value.get("deleted")) is True or truth(value.get("review_result")) is False
    return Node(index, place, role, value["text"], _rank(value.get("rank"), dot), parent, refused)


def _name(value: Any, slot: str) -> str:
    if type(value) is not str and type(value) is not int:
        raise no_text(value, slot)
    return str(value)


def _rank(value: Any, dot: str) -> float:
    if value is None or value == "":
        return float("inf")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Fault(5, f"{dot}rank", f"is {in_words(value)}, not a number") from None


def _pruned(root: Node) -> bool:
    """Takes refused messages out of the tree, with what is below them; whether there were any."""
    pruned, waiting = False, [root]
    while waiting:
        node = waiting.pop()
        good = [reply for reply in node.replies if not reply.refused]
        pruned = pruned or len(good) < len(node.replies)
        node.replies = good
        waiting += good
    return pruned or root.refused


# --- threads -----------------------------------------------------------------------------------------------


def _threads_of(root: Node, threads: Threads, notes: Notes) -> Iterator[tuple[int, Outcome]]:
    notes[REFUSED] += _pruned(root)
    nodes = [root, *_below([root])]
    paths = [] if root.refused else [_best(root)] if threads == "best" else _all(root)
    paths = [path for path in paths if path]
    if not paths:
        yield root.index, Skipped("unanswered prompt")
    else:
        used = {id(node) for path in paths for node in path}
        notes[UNUSED[threads]] += len({node.index for node in nodes if id(node) not in used})
    for path in paths:
        turns: list[Row] = [{"role": node.role, "content": node.text} for node in path]
        try:
            messages = said_in_turn(turns, lambda at, path=path: path[at].place or "text", notes)  # type: ignore[misc]
            yield path[-1].index, Example(messages, None, 0)
        except Fault as fault:
            yield path[-1].index, fault


def _best(root: Node) -> list[Node]:
    """The thread of the best ranked reply at every step, up to its last answer."""
    path = [root]
    while path[-1].replies:
        path.append(min(path[-1].replies, key=lambda node: node.rank))
    return _to_last_answer(path)


def _all(root: Node) -> list[list[Node]]:
    """Every thread, each up to its last answer and once only, in the order of the file."""
    paths: dict[int, list[Node]] = {}
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        if not path[-1].replies and (answered := _to_last_answer(path)):
            paths.setdefault(id(answered[-1]), answered)
        waiting += [[*path, reply] for reply in reversed(path[-1].replies)]
    inner = {id(node) for path in paths.values() for node in path[:-1]}
    return [path for end, path in paths.items() if end not in inner]


def _to_last_answer(path: list[Node]) -> list[Node]:
    while path and path[-1].role != "assistant":
        path = path[:-1]
    return path
