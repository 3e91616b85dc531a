"""What the viewer's page shows of a trace: columns and figures of each sequence, and the nodes of each iteration.

The dictionaries are those of `viewer/src/data.ts`, which says what each field means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from dynatree_core.trace.format import OUTCOMES
from dynatree_core.trace.reading import SequenceTrace, TraceFile

__all__ = ["StepSummary", "oracle_tokens", "run_of"]

Record = Mapping[str, Any]

LONGEST_TEXT = 500  # characters of a token's text that the page holds
NUM_REFUSED = 3  # children of a node that were not grown and are listed; of others there is a number
SMALLEST_REFUSED = math.log(0.01)  # draft probability below which such a child is not listed
NUM_VOTES = 8  # of a policy on one level that are written out
DIGITS = 4  # after the point, of log-probabilities
SPREAD = "\ufffd"  # the text of a token that is a part of a character

ACCEPTED = ("accepted", "accepted: the target's own choice")
REJECTED = ("rejected", "verified, and not the target's choice")


def run_of(name: str, trace: TraceFile) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """A trace file as the page shows it.

    Args:
        name: what the run is called.

    Returns:
        The run, and the nodes of each iteration of each sequence.
    """
    texts = {str(token): (text[:LONGEST_TEXT], len(text)) for token, text in trace.texts.items()}
    tables = _Tables(trace.header["outcomes"])
    made = [_Sequence(one, tables, trace.texts).summarise() for one in trace.sequences]
    run = {
        "name": name,
        "notes": list(_notes(trace)),
        "facts": _facts(trace),
        "drafters": tables.drafters,
        "reasons": [{"kind": kind, "text": text} for kind, text in tables.reasons],
        "texts": texts,
        "sequences": [sequence for sequence, _ in made],
    }
    return run, [details for _, details in made]


def _notes(trace: TraceFile) -> Iterator[str]:
    """What has to be known of a file before anything in it is believed."""
    if trace.is_truncated:
        yield "The file breaks off within a line: what stands before that is shown."
    unfinished = [str(one.number) for one in trace.sequences if one.end is None]
    if unfinished:
        which = "The generation has" if len(trace.sequences) == 1 else f"Sequences {', '.join(unfinished)} have"
        yield f"{which} no end in the file: it was still running, or the process died."
    if not trace.texts:
        yield "The file has no texts of tokens, so their ids are shown."


@attrs.define
class _Tables:
    """What the sequences of a file share: drafters, and the words for what became of a node."""

    outcomes: Sequence[str]  # name of an outcome, by its number
    drafters: list[str] = attrs.field(factory=list)
    reasons: dict[tuple[str, str], int] = attrs.field(factory=dict)  # kind and words -> place

    def reason(self, kind: str, text: str) -> int:
        return self.reasons.setdefault((kind, text), len(self.reasons))

    def drafter(self, name: str) -> int:
        if name not in self.drafters:
            self.drafters.append(name)
        return self.drafters.index(name)


def oracle_tokens(ranks: Sequence[int | None], start: int, num_nodes: int, end: int) -> int:
    """Tokens that the best tree of so many nodes commits at a position: those that it reaches, and the bonus token.

    That tree is a chain of the target's own tokens, each with the siblings that the drafter ranks above it, so a token
    of rank r takes r + 1 nodes.

    Args:
        ranks: of each new token among the drafter's proposals for it, from 0; None where it is none of them, or where
            the drafter was not asked: there the tree ends, so that the number may be too small, never too large.
        start: the first token's place in `ranks`.
        num_nodes: drafted nodes.
        end: new tokens in all, which no iteration exceeds.
    """
    place = start
    while place < end - 1 and (rank := ranks[place]) is not None and rank + 1 <= num_nodes:
        num_nodes -= rank + 1
        place += 1
    return place - start + 1


class StepSummary:
    """Of one generation that runs: each iteration as the page shows it, with what it needs and was not told before.

    Args:
        begin: the record of the generation's beginning.
    """

    def __init__(self, begin: Record) -> None:
        self._tables = _Tables(OUTCOMES)
        self._sequence = _Sequence(SequenceTrace(0, begin, [], [], [], None), self._tables, {})
        self._told: set[int] = set()  # tokens whose texts were told

    def step(self, record: Record, text_of: Callable[[int], str]) -> dict[str, Any]:
        """One iteration.

        Args:
            record: of its kind, as in a trace.
            text_of: the text of a token.
        """
        nodes, tables = _Nodes(record, OUTCOMES), self._tables
        num_reasons, num_drafters = len(tables.reasons), len(tables.drafters)
        detail, ended = self._sequence.detail(nodes), self._sequence.why(nodes)
        shown = {*detail["token"], *(token for _, token, _ in detail["wanted"]), *record["committed"]}
        texts = {token: text_of(token) for token in sorted(shown - self._told)}
        self._told |= shown
        return {
            "iteration": record["iteration"],
            "accepted": len(record["path"]),
            "nodes": sum(1 for _ in nodes.verified()),
            "bonus": record["bonus"],
            "ended": ended,
            "detail": detail,
            "reasons": [{"kind": kind, "text": text} for kind, text in list(tables.reasons)[num_reasons:]],
            "drafters": tables.drafters[num_drafters:],
            "texts": {str(token): (text[:LONGEST_TEXT], len(text)) for token, text in texts.items()},
        }


class _Sequence:
    """Makes the page's view of one generation."""

    def __init__(self, trace: SequenceTrace, tables: _Tables, texts: Mapping[int, str]) -> None:
        self.trace, self.tables, self.texts = trace, tables, texts
        self.records = [iteration.record for iteration in trace.iterations]
        self.endings: dict[str, int] = {}
        self.by_depth: dict[int, list[int]] = {}  # -> [reached, accepted]
        self.by_rank: dict[int, list[int]] = {}
        self.by_confidence: dict[int, list[int]] = {}  # by tenths

    def summarise(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        begin, iterations, end = self.trace.begin, self.records, self.trace.end
        details = []
        columns: dict[str, list[Any]] = {name: [] for name in ("accepted", "nodes", "drafted", "depth", "ended")}
        ranks: list[int | None] = []  # of each new token among the drafter's proposals
        for record in iterations:
            nodes = _Nodes(record, self.tables.outcomes)
            columns["accepted"].append(len(record["path"]))
            columns["drafted"].append(record["num_drafted"])
            columns["nodes"].append(sum(map(nodes.is_verified, range(1, nodes.num_drafted + 1))))
            columns["depth"].append(max((nodes.depth[node] for node in nodes.verified()), default=0))
            columns["ended"].append(self._ending(nodes))
            ranks += nodes.committed_ranks()
            self._count(nodes)
            details.append(self.detail(nodes))
        committed = [list(record["committed"]) for record in iterations]
        first = iterations[0]["start"] if iterations else 0
        start = [record["start"] - first for record in iterations]
        oracle = [
            oracle_tokens(ranks, at, num_nodes, len(ranks))
            for at, num_nodes in zip(start, columns["nodes"], strict=True)
        ]
        parameters, constants = _parameters(begin, iterations)
        return {
            "label": self._label(),
            "prompt": begin["prompt"],
            "num_prompt_tokens": begin["num_prompt_tokens"],
            "stop": None if end is None else end["stop_reason"],
            "figures": _figures(columns, committed, oracle, end, iterations),
            "iteration": [record["iteration"] for record in iterations],
            "start": start,
            "committed": committed,
            "joined": self._joined(),
            **columns,
            "oracle": oracle,
            "endings": list(self.endings),
            "seconds": _seconds(iterations),
            "parameters": parameters,
            "constants": constants,
            "faults": self._faults(),
            "by_depth": _shares(self.by_depth, str),
            "by_rank": _shares(self.by_rank, str),
            "by_confidence": _shares(self.by_confidence, lambda tenth: f"{10 * tenth}–{10 * tenth + 10} %"),
        }, details

    def _label(self) -> str:
        """The sequence's number and how its prompt ends."""
        text = self.trace.begin["prompt_text"] or ""
        words = " ".join(text[-200:].split())[-40:]
        return f"{self.trace.number}: … {words}" if words else str(self.trace.number)

    def _joined(self) -> dict[int, str]:
        """The texts of iterations in which a character is spread over several tokens."""
        joined = {
            place: record["text"]
            for place, record in enumerate(self.records)
            if record["text"] is not None and any(SPREAD in self.texts.get(token, "") for token in record["committed"])
        }
        last = len(self.records) - 1
        if last in joined and self.trace.end is not None:
            joined[last] += self.trace.end["text"] or ""  # a character that was never completed
        return {place: text[:LONGEST_TEXT] for place, text in joined.items()}

    def _faults(self) -> list[tuple[int, str]]:
        """Faults, each at the iteration in which it came or the last one."""
        places = {record["iteration"]: place for place, record in enumerate(self.records)}
        last = max(0, len(places) - 1)
        return [
            (
                places.get(fault["iteration"], last),
                f"{fault['error']}: {fault['message'][:LONGEST_TEXT]} (then: {fault['then']})",
            )
            for fault in self.trace.faults
        ]

    def _count(self, nodes: _Nodes) -> None:
        """Count the nodes that the target was asked about with the path before them accepted."""
        for node in nodes.verified():
            if nodes.parent[node] not in nodes.on_path:
                continue
            is_accepted = node in nodes.on_path
            tenth = min(9, int(10 * math.exp(nodes.logprob[node])))
            for counts, key in (
                (self.by_depth, nodes.depth[node]),
                (self.by_rank, nodes.rank[node]),
                (self.by_confidence, tenth),
            ):
                count = counts.setdefault(key, [0, 0])
                count[0] += 1
                count[1] += is_accepted

    def _ending(self, nodes: _Nodes) -> int:
        """Why the accepted path is no longer."""
        return self.endings.setdefault(self.why(nodes), len(self.endings))

    def why(self, nodes: _Nodes) -> str:
        record = nodes.record
        if record["bonus"] is None:
            return "the generation stopped within the path"
        last = record["path"][-1] if record["path"] else 0
        wished = nodes.child(last, record["bonus"])
        if wished is not None:
            _, text = self._outcome(nodes, wished)
            return f"the target's choice was {text}"
        if last in nodes.proposed_for:
            return "the drafter did not propose the target's choice"
        level = nodes.level_of(last)
        end = None if level is None else level["end"]
        by = f" ({level['end_by']})" if level is not None and level["end_by"] else ""
        return {
            "depth": f"the tree's depth was at its limit{by}",
            "nodes": f"the node budget was used up{by}",
            "expand": f"the tree was not expanded further{by}",
            "width": f"the branch factor was 0{by}",
            None: "nothing was proposed there",
        }.get(end, "nothing was admitted there")

    def _outcome(self, nodes: _Nodes, node: int) -> tuple[str, str]:
        """What became of a node: its kind, and words."""
        begin, parent = self.trace.begin, nodes.parent[node]
        limits, limits_by = begin["limits"], begin["limits_by"]
        outcome = self.tables.outcomes[nodes.outcome[node]]
        if outcome == "verified":
            return ACCEPTED if node in nodes.on_path else REJECTED
        if outcome == "pruned":
            cut = [who for who, cut_nodes in nodes.record["pruned"].items() if node in cut_nodes]
            return "pruned", f"drafted, but pruned{_by(cut)}"
        level = nodes.level_of(parent)
        if outcome == "not_expanded":
            place = parent - level["first"] if level is not None else 0
            votes = (level["expand"] or {}) if level is not None else {}
            return "refused", f"proposed, but its parent was not expanded{_by(_vetoes(votes, place))}"
        if outcome == "beyond_width":
            votes = (level["branch"] or {}) if level is not None else {}
            return "refused", f"proposed, but beyond the branch factor{_by(_deciders(votes))}"
        if outcome == "below_tau":
            return "refused", f"proposed, but below τ = {limits['tau']:g}{_by(limits_by.get('tau', ()))}"
        if outcome == "over_budget":
            of = f"the budget of {limits['max_nodes']} nodes{_by(limits_by.get('max_nodes', ()))}"
            return "refused", f"proposed, but over {of}"
        return "refused", f"not grown ({outcome.replace('_', ' ')})"

    def detail(self, nodes: _Nodes) -> dict[str, Any]:
        """The nodes that the page lists: all that were drafted, and the likeliest of the others."""
        record, wanted = nodes.record, nodes.wanted
        listed = list(range(nodes.num_drafted + 1))
        num_refused: dict[int, int] = {}
        more: dict[int, int] = {}
        for node in range(nodes.num_drafted + 1, len(nodes.token)):
            parent = nodes.parent[node]
            is_wish = wanted.get(parent, (None, None))[0] == nodes.token[node]
            is_likely = num_refused.get(parent, 0) < NUM_REFUSED and nodes.logprob[node] >= SMALLEST_REFUSED
            if is_wish or is_likely:
                num_refused[parent] = num_refused.get(parent, 0) + 1
                listed.append(node)
            else:
                more[parent] = more.get(parent, 0) + 1
        sources = [self.tables.drafter(name) for name in record.get("sources") or ()]
        source = nodes.source or [0 if sources else -1] * len(nodes.token)
        return {
            "token": [nodes.token[node] for node in listed],
            "parent": [nodes.parent[node] for node in listed],  # drafted, so its place here is its number
            "rank": [nodes.rank[node] if node else None for node in listed],
            "logprob": [_rounded(nodes.logprob[node]) if node else None for node in listed],
            "path": [_rounded(nodes.cum_logprob[node]) for node in listed],
            "drafter": [sources[source[node]] if 0 <= source[node] < len(sources) else -1 for node in listed],
            "reason": [self.tables.reason(*self._outcome(nodes, node)) if node else -1 for node in listed],
            "wanted": [(node, token, _rounded(logprob)) for node, (token, logprob) in wanted.items()],
            "votes": list(_votes(record["levels"])),
            "more": list(more.items()),
        }


class _Nodes:
    """The nodes of an iteration's record: the drafted tree, root first, then proposed children that are not in it."""

    def __init__(self, record: Record, outcomes: Sequence[str]) -> None:
        nodes = record["nodes"]
        self.record = record
        self.outcomes = outcomes
        self.token: Sequence[int] = nodes["token"]
        self.parent: Sequence[int] = nodes["parent"]
        self.rank: Sequence[int] = nodes["rank"]
        self.depth: Sequence[int] = nodes["depth"]
        self.logprob: Sequence[float] = nodes["logprob"]
        self.cum_logprob: Sequence[float] = nodes["cum_logprob"]
        self.outcome: Sequence[int] = nodes["outcome"]
        self.source: Sequence[int] | None = nodes.get("source")
        self.num_drafted: int = record["num_drafted"]
        self.on_path = {0, *record["path"]}
        self.proposed_for = set(self.parent[1:])  # nodes whose children the drafter was asked for
        self._children: dict[int, list[int]] = {}
        for node in range(1, len(self.token)):
            self._children.setdefault(self.parent[node], []).append(node)
        self.wanted: dict[int, tuple[int, float | None]] = {
            node: (token, logprob)
            for node, (token, logprob) in enumerate(
                zip(record["wanted"]["token"], record["wanted"]["logprob"], strict=True)
            )
            if token is not None
        }

    def is_verified(self, node: int) -> bool:
        return self.outcomes[self.outcome[node]] == "verified"

    def verified(self) -> Iterator[int]:
        """The verified drafted nodes."""
        return filter(self.is_verified, range(1, self.num_drafted + 1))

    def child(self, parent: int, token: int) -> int | None:
        """The proposed child with that token."""
        return next((node for node in self._children.get(parent, ()) if self.token[node] == token), None)

    def level_of(self, node: int) -> Record | None:
        """The level whose frontier a node belongs to."""
        for level in self.record["levels"]:
            if level["first"] <= node < level["first"] + level["width"]:
                found: Record = level
                return found
        return None

    def committed_ranks(self) -> list[int | None]:
        """The rank of each token of the step among the drafter's proposals; None where it is unknown."""
        ranks: list[int | None] = [self.rank[node] for node in self.record["path"]]
        if self.record["bonus"] is not None:
            last = self.record["path"][-1] if self.record["path"] else 0
            wished = self.child(last, self.record["bonus"])
            ranks.append(None if wished is None else self.rank[wished])
        return ranks


def _by(who: Iterable[str]) -> str:
    names = " and ".join(who)
    return f" ({names})" if names else ""


def _vetoes(votes: Mapping[str, Any], place: int) -> list[str]:
    """Who did not want a node expanded."""
    return [who for who, vote in votes.items() if (vote[place] if isinstance(vote, list) else vote) is False]


def _deciders(votes: Mapping[str, Any]) -> list[str]:
    """Whose branch factor held: the last one that had an opinion."""
    return [who for who, vote in votes.items() if vote is not None][-1:]


def _votes(levels: Sequence[Record]) -> Iterator[str]:
    """What policies said on each level, in words."""
    for depth, level in enumerate(levels):
        said = []
        for hook, words in (("expand", "expand"), ("branch", "children")):
            for who, vote in (level[hook] or {}).items():
                if vote is not None:
                    said.append(f"{who} {words} {_vote(vote)}")
        if level["end"] is not None:
            said.append(f"the tree ends: {level['end']}{_by(filter(None, [level['end_by']]))}")
        if said:
            yield f"level {depth}: {'; '.join(said)}"


def _vote(vote: Any) -> str:
    words = {True: "yes", False: "no"}
    if not isinstance(vote, list):
        return words[vote] if isinstance(vote, bool) else str(vote)
    if len(set(vote)) == 1:
        return _vote(vote[0])
    shown = ", ".join(_vote(one) for one in vote[:NUM_VOTES])
    return shown + (f" and {len(vote) - NUM_VOTES} more" if len(vote) > NUM_VOTES else "")


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, DIGITS)


def _shares(counts: Mapping[int, Sequence[int]], label: Callable[[int], str]) -> list[tuple[str, int, int]]:
    return [(label(key), reached, accepted) for key, (reached, accepted) in sorted(counts.items())]


def _seconds(iterations: Sequence[Record]) -> dict[str, list[float | None]]:
    """Seconds of each iteration by stage; what no stage has is the rest."""
    stages: dict[str, None] = {}  # in the order in which they come
    for record in iterations:
        stages |= dict.fromkeys(record["seconds"])
    # passes are inside the stage that makes them
    names = [name for name in stages if not name.endswith("_forward") and name != "iteration"]
    columns: dict[str, list[float | None]] = {
        name: [record["seconds"].get(name, 0.0) for record in iterations]
        for name in names  # zeros are left out
    }
    if "iteration" in stages:
        columns["rest"] = [
            max(0.0, total - sum(record["seconds"].get(name, 0.0) for name in names))
            if (total := record["seconds"].get("iteration")) is not None
            else None
            for record in iterations
        ]
    return columns


def _parameters(
    begin: Record, iterations: Sequence[Record]
) -> tuple[dict[str, list[float | None]], list[tuple[str, str]]]:
    """The numbers of the policies before each iteration; and what never changed, in words."""
    policies = begin["policies"]
    state = {f"{policy}.{field}": value for policy, fields in policies.items() for field, value in fields.items()}
    changed = {
        f"{policy}.{field}"
        for record in iterations
        for policy, fields in record["policies"].items()
        for field in fields
    }
    columns: dict[str, list[float | None]] = {}
    now = dict(state)
    for place, record in enumerate(iterations):
        for name in changed:
            columns.setdefault(name, []).append(_number(now.get(name)))
        for policy, fields in record["policies"].items():
            for field, (before, after) in fields.items():
                if place == 0 and f"{policy}.{field}" not in state:
                    columns[f"{policy}.{field}"][0] = _number(before)
                now[f"{policy}.{field}"] = after
    drawn = {name: columns[name] for name in sorted(columns) if any(value is not None for value in columns[name])}
    constants = [(name, str(value)[:LONGEST_TEXT]) for name, value in state.items() if name not in changed]
    return drawn, constants


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _figures(
    columns: Mapping[str, Sequence[int]],
    committed: Sequence[Sequence[int]],
    oracle: Sequence[int],
    end: Record | None,
    iterations: Sequence[Record],
) -> list[dict[str, Any]]:
    """The figures of a sequence; times from the generation's own report, where the trace has one."""
    num_iterations, num_tokens = len(committed), sum(map(len, committed))
    accepted, nodes = sum(columns["accepted"]), sum(columns["nodes"])
    report: Record = {} if end is None else end["report"]
    drafting = [(got, depth) for got, depth in zip(columns["accepted"], columns["depth"], strict=True) if depth]

    def ratio(number: float | None, of: float | None, scale: float = 1.0) -> float | None:
        return scale * number / of if number is not None and of else None

    def figure(label: str, value: float | None, unit: str = "", digits: int = 0, better: str = "") -> dict[str, Any]:
        return {"label": label, "value": value, "unit": unit, "digits": digits, "better": better}

    seconds = [record["seconds"]["iteration"] for record in iterations if "iteration" in record["seconds"]]
    decode = report.get("decode_seconds", sum(seconds) if seconds else None)
    return [
        figure("new tokens", num_tokens),
        figure("iterations", num_iterations, better="less"),
        figure("tokens per iteration", ratio(num_tokens, num_iterations), digits=2, better="more"),
        figure("… of the oracle tree of the same size", ratio(sum(oracle), num_iterations), digits=2),
        figure("nodes per iteration", ratio(nodes, num_iterations), digits=1),
        figure("node acceptance", ratio(accepted, nodes, 100), "%", 1, "more"),
        figure(
            "path acceptance",
            ratio(sum(got / depth for got, depth in drafting), len(drafting), 100),
            "%",
            1,
            "more",
        ),
        figure("tokens per second", ratio(num_tokens, decode), digits=1, better="more"),
        figure("time per iteration", ratio(decode, num_iterations, 1000), "ms", 2, "less"),
        figure("… drafting", ratio(report.get("draft_seconds"), num_iterations, 1000), "ms", 2, "less"),
        figure("… verifying", ratio(report.get("verify_seconds"), num_iterations, 1000), "ms", 2, "less"),
        figure("… the rest", ratio(report.get("rest_seconds"), num_iterations, 1000), "ms", 2, "less"),
        figure("prefill", ratio(report.get("prefill_seconds"), 1, 1000), "ms", 1, "less"),
    ]


def _facts(trace: TraceFile) -> list[tuple[str, str]]:
    """What is to be known of a file before its iterations."""
    facts: list[tuple[str, str]] = []
    header = trace.header
    if trace.sequences:
        begin = trace.sequences[0].begin
        settings = begin["settings"]
        named = ("target", "dtype", "device", "model_type")
        facts += [(name.replace("_", " "), str(settings[name])) for name in named if settings.get(name) is not None]
        facts += [("drafter", str(begin["drafter"])), ("policy", begin["policy"])]
        facts.append(("limits", ", ".join(f"{name} {value:g}" for name, value in begin["limits"].items())))
        others = {name: value for name, value in settings.items() if name not in named and value not in (None, [])}
        facts.append(("settings", ", ".join(f"{name} {value}" for name, value in others.items())))
        ends = [one.end for one in trace.sequences if one.end is not None]
        if ends and ends[0]["report"].get("runner") is not None:
            facts.append(("runner", str(ends[0]["report"]["runner"])))
    facts.append(("versions", ", ".join(f"{name} {value}" for name, value in header["versions"].items())))
    facts.append(("made", header["created"]))
    return facts
