"""An iteration's tree as lines for a terminal, in colours or plain, however narrow it is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import attrs
from rich.console import Console
from rich.text import Text

from dynatree_core.trace.reading import Iteration, TraceFile

__all__ = ["print_iteration", "print_trace", "tree_lines"]

LONGEST_TEXT = 24  # characters of a token that are shown
NUM_REFUSED = 3  # refused children of a node that are named; of the others there is a number


@attrs.frozen
class _Signs:
    """What a line begins with, beside its colour: nothing is told by colour alone."""

    accepted: str
    rejected: str
    pruned: str
    refused: str
    more: tuple[str, str, str, str]  # a child, the last child, below a child that others follow, below the last one
    cut: str

    def of(self, state: str) -> str:
        return {"accepted": self.accepted, "rejected": self.rejected, "pruned": self.pruned}[state]


_DRAWN = _Signs("✓", "✗", "✂", "·", ("├ ", "└ ", "│ ", "  "), "…")
_ASCII = _Signs("+", "x", "-", ".", ("|-", "`-", "| ", "  "), "...")
_STYLES = {"accepted": "bold green", "rejected": "red", "pruned": "yellow", "refused": "dim"}


def print_trace(trace: TraceFile, console: Console) -> None:
    """Print every iteration of a trace, sequence by sequence.

    Args:
        trace: as `read` gives it.
        console: where to; its width and its colours are used.
    """
    for sequence in trace.sequences:
        if len(trace.sequences) > 1:
            console.print(Text(f"sequence {sequence.number}: {sequence.begin['policy']}", style="bold"))
        for iteration in sequence.iterations:
            print_iteration(iteration, trace.texts, console)


def print_iteration(iteration: Iteration, texts: Mapping[int, str], console: Console) -> None:
    """Print one iteration's tree.

    Args:
        iteration: of a trace.
        texts: token id -> text; a token without one is shown by its id.
        console: where to.
    """
    for line in tree_lines(iteration, texts, width=console.width, is_ascii=console.options.ascii_only):
        console.print(line, no_wrap=True, overflow="ellipsis", crop=True, highlight=False)


def tree_lines(iteration: Iteration, texts: Mapping[int, str], *, width: int, is_ascii: bool = False) -> list[Text]:
    """A line for the iteration, and one for each node of its drafted tree.

    Each node has its draft probability; a node that is no further on the accepted path has what the target wanted
    there. Children that were not drafted are named in one line below their parent, with the reason.

    Args:
        iteration: of a trace.
        texts: token id -> text.
        width: columns of the terminal; deeper nodes are not indented further than half of it.
        is_ascii: draw with ASCII alone.
    """
    return list(_Drawing(iteration, texts, width, _ASCII if is_ascii else _DRAWN).lines())


@attrs.define(eq=False)
class _Drawing:
    iteration: Iteration
    texts: Mapping[int, str]
    width: int
    signs: _Signs

    def lines(self) -> Iterator[Text]:
        iteration = self.iteration
        committed = " ".join(map(self._text, iteration.committed))
        seconds = iteration.seconds["iteration"]
        num_accepted = len(iteration.path)
        yield Text.assemble(
            (f"iteration {iteration.number}", "bold"),
            f", {num_accepted} of {iteration.num_drafted} accepted, {seconds * 1000:.1f} ms: ",
            (committed, "green"),
        )
        children: defaultdict[int, list[int]] = defaultdict(list)
        for node, parent in enumerate(iteration.nodes["parent"]):
            children[parent].append(node)
        yield self._root(children)
        yield from self._below(0, "", children)

    def _root(self, children: Mapping[int, Sequence[int]]) -> Text:
        line = Text(self._text(self.iteration.nodes["token"][0]), style="bold")
        self._add_wish(line, 0)
        return line

    def _below(self, parent: int, indent: str, children: Mapping[int, Sequence[int]]) -> Iterator[Text]:
        """The lines of a node's descendants, without recursion: trees may be deep."""
        stack = [(parent, indent)]
        order: list[tuple[int, str, str]] = []
        while stack:
            node, prefix = stack.pop()
            if node != parent:
                yield self._node(node, order.pop())
            below = [child for child in children.get(node, ()) if child <= self.iteration.num_drafted]
            refused = [child for child in children.get(node, ()) if child > self.iteration.num_drafted]
            if refused:
                yield self._refused(refused, self._cut(prefix) + self.signs.more[1 if not below else 0])
            for place, child in reversed(list(enumerate(below))):
                is_last = place == len(below) - 1
                order.append((child, self._cut(prefix), self.signs.more[1 if is_last else 0]))
                stack.append((child, prefix + self.signs.more[3 if is_last else 2]))

    def _cut(self, prefix: str) -> str:
        """A prefix that leaves half of the width to the node."""
        room = max(self.width // 2 - 4, 2)
        return prefix if len(prefix) <= room else self.signs.cut + prefix[len(prefix) - room + len(self.signs.cut) :]

    def _node(self, node: int, place: tuple[int, str, str]) -> Text:
        iteration, (_, prefix, branch) = self.iteration, place
        state = self._state(node)
        line = Text.assemble((prefix + branch, "dim"), (f"{self.signs.of(state)} ", _STYLES[state]))
        line.append(self._text(iteration.nodes["token"][node]), style=_STYLES[state])
        line.append(f" {_percent(iteration.nodes['logprob'][node])}")
        source = iteration.nodes.get("source", ())
        if source and source[node] >= 0:
            line.append(f" {iteration.record['sources'][source[node]]}", style="dim")
        if state == "pruned":
            line.append(f" pruned by {iteration.refused_by(node)}", style="yellow")
        if state == "accepted":
            self._add_wish(line, node)
        return line

    def _state(self, node: int) -> str:
        if node in self.iteration.path:
            return "accepted"
        return "pruned" if self.iteration.outcome(node) == "pruned" else "rejected"

    def _add_wish(self, line: Text, node: int) -> None:
        """What the target wanted behind the last accepted node."""
        last = self.iteration.path[-1] if self.iteration.path else 0
        bonus = self.iteration.record["bonus"]
        if node == last and bonus is not None:
            probability = _percent(self.iteration.record["committed_logprob"][-1])
            line.append(f"  target: {self._text(bonus)} {probability}", style="cyan")

    def _refused(self, nodes: Sequence[int], prefix: str) -> Text:
        """One line about the children of a node that were not drafted."""
        line = Text.assemble((prefix, "dim"), (f"{self.signs.refused} not drafted: ", "dim"))
        named = [
            f"{self._text(self.iteration.nodes['token'][node])} {_percent(self.iteration.nodes['logprob'][node])}"
            for node in nodes[:NUM_REFUSED]
        ]
        more = [f"{len(nodes) - len(named)} more"] if len(nodes) > len(named) else []
        reasons = Counter(map(self._reason, nodes))
        why = ", ".join(reason if len(reasons) == 1 else f"{count} {reason}" for reason, count in reasons.items())
        line.append(f"{', '.join([*named, *more])} ({why})", style="dim")
        return line

    def _reason(self, node: int) -> str:
        """Why a node was not drafted, and by which policy; a limit is in the outcome's name already."""
        outcome, by = self.iteration.outcome(node), self.iteration.refused_by(node)
        is_limit = outcome in ("below_tau", "over_budget")
        return outcome.replace("_", " ") + (f" by {by}" if by is not None and not is_limit else "")

    def _text(self, token: int) -> str:
        """A token between quotes, in which nothing steers the terminal: Python escapes what is not printable."""
        text = self.texts.get(token)
        if text is None:
            return f"#{token}"
        shown = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + self.signs.cut
        return ascii(shown) if self.signs is _ASCII else repr(shown)


def _percent(logprob: float | None) -> str:
    return "–" if logprob is None else f"{math.exp(min(logprob, 0.0)):.0%}"
