"""Traces that nobody recorded: of any length, with any token texts, for tests of what reads them.

They have the form of docs/trace.md, and their numbers fit together: the path follows the target's wishes, a child
that was not grown has a reason.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OUTCOMES = ("verified", "no_token", "not_expanded", "beyond_width", "below_tau", "over_budget", "pruned")
WORDS = (
    " the", " committee", " met", " on", " Tuesday", " to", " discuss", " a", " new", " bridge", ".", " It", " will",
    " cross", " river", " north", " of", " old", " and", " they", " agreed", " that", " should", " carry", " trams",
    " for", " people", " foot", ",", "\n", " naïve", " über",
)  # fmt: skip
PROPOSED = 4  # children that the drafter proposes for a node


def made_trace(
    path: Path,
    *,
    num_iterations: int = 12,
    num_nodes: int = 12,
    max_depth: int = 4,
    seed: int = 0,
    words: Sequence[str] = WORDS,
    num_sequences: int = 1,
    prompt: Sequence[int] = (0, 1, 2),
    text_seed: int = 0,
    policy: str = "confidence+history",
    drafters: Sequence[str] = ("distilled", "prompt_lookup"),
    tau: float = 0.05,
) -> Path:
    """Write a trace.

    Args:
        num_nodes: drafted nodes of an iteration at most.
        words: token id -> text.
        prompt: token ids.
        text_seed: of the text that the target would write; traces with the same one are of the same text.
    """
    lines: list[dict[str, Any]] = [
        {
            "kind": "header",
            "schema": "dynatree-trace/1",
            "created": "2026-11-30T00:00:00+00:00",
            "versions": {"dynatree": "0.1.0", "torch": "2.9.0"},
            "outcomes": list(OUTCOMES),
            "is_private": False,
        }
    ]
    for sequence in range(num_sequences):
        maker = _Maker(
            random.Random(f"{seed} {sequence}"),
            random.Random(f"{text_seed} {sequence}"),
            len(words), num_nodes, max_depth, list(drafters), tau,
        )  # fmt: skip
        lines += maker.sequence(sequence, list(prompt), policy, num_iterations, dict(enumerate(words)))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


class _Maker:
    """Makes the records of one generation."""

    def __init__(
        self, choose: random.Random, write: random.Random, vocab: int, num_nodes: int, max_depth: int,
        drafters: list[str], tau: float,
    ) -> None:  # fmt: skip
        self.choose, self.write, self.tau = choose, write, tau
        self.vocab, self.num_nodes, self.max_depth, self.drafters = vocab, num_nodes, max_depth, drafters
        self.text: list[int] = []  # what the target writes
        self.high = 0.9

    def token_at(self, position: int) -> int:
        while len(self.text) <= position:
            self.text.append(self.write.randrange(self.vocab))
        return self.text[position]

    def sequence(
        self, number: int, prompt: list[int], policy: str, num_iterations: int, words: Mapping[int, str]
    ) -> list[dict[str, Any]]:
        limits = {"tau": self.tau, "max_nodes": self.num_nodes, "max_depth": self.max_depth, "max_branch": 16}
        texts = {str(token): text for token, text in words.items()}
        begin = {
            "kind": "begin", "sequence": number, "prompt": prompt,
            "prompt_text": "".join(words[token] for token in prompt), "num_prompt_tokens": len(prompt),
            "policy": policy, "policies": {"confidence": {"high": self.high, "low": 0.4}},
            "drafter": "+".join(self.drafters), "limits": limits, "limits_by": {"tau": ["fixed"], "max_nodes": []},
            "settings": {"target": "a-target", "dtype": "float64", "device": "cpu", "max_new_tokens": 1000},
            "texts": texts,
        }  # fmt: skip
        prefill = {
            "kind": "prefill", "sequence": number, "num_tokens": len(prompt), "num_reused_tokens": 0,
            "seconds": {"prefill": 0.05},
        }  # fmt: skip
        records, new_tokens = [begin, prefill], 0
        root = prompt[-1]
        for iteration in range(num_iterations):
            record = self.iteration(number, iteration, root, new_tokens, len(prompt))
            if iteration == num_iterations - 1:
                record["stop"] = "length"
            records.append(record)
            new_tokens += len(record["committed"])
            root = record["committed"][-1]
        seconds = sum(record["seconds"]["iteration"] for record in records[2:])
        report = {
            "runner": "eager", "num_new_tokens": new_tokens, "prefill_seconds": 0.05, "decode_seconds": seconds,
            "draft_seconds": seconds / 4, "verify_seconds": seconds / 2, "rest_seconds": seconds / 4,
        }  # fmt: skip
        end = {
            "kind": "end", "sequence": number, "stop_reason": "length", "text": None, "report": report, "costs": None,
        }  # fmt: skip
        return [*records, end]

    def iteration(self, number: int, iteration: int, root: int, new_tokens: int, prompt_len: int) -> dict[str, Any]:
        """Grow a tree that often has the target's next tokens, and commit what it follows."""
        choose = self.choose
        names = ("token", "parent", "rank", "depth", "logprob", "cum_logprob", "outcome", "source")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        refused: dict[str, list[Any]] = {name: [] for name in names}

        def add(to: dict[str, list[Any]], *values: Any) -> None:
            for name, value in zip(names, values, strict=True):
                to[name].append(value)

        add(columns, root, -1, 0, 0, 0.0, 0.0, 0, -1)
        levels, frontier, true_path = [], [0], {0: 0}  # node -> its depth, where it is the target's own text
        for depth in range(self.max_depth):
            width = len(frontier)
            level = {
                "first": frontier[0], "width": width, "nodes_left": self.num_nodes + 1 - len(columns["token"]),
                "end": None, "end_by": None, "expand": {"dynamic_depth": True},
                "branch": {"confidence": [choose.randint(1, 3) for _ in frontier]},
            }  # fmt: skip
            levels.append(level)
            if len(columns["token"]) > self.num_nodes:
                level |= {"end": "nodes", "end_by": "max_nodes", "expand": None, "branch": None}
                break
            grown = []
            for place, node in enumerate(frontier):
                left = 1.0
                wish = self.token_at(new_tokens + true_path[node]) if node in true_path else None
                others = choose.sample(range(self.vocab), min(PROPOSED, self.vocab))
                if wish is not None and choose.random() < 0.8:
                    at = choose.choice((0, 0, 0, 1, 2)) % len(others)
                    others = [token for token in others if token != wish]
                    others.insert(at, wish)
                for rank, token in enumerate(others[:PROPOSED]):
                    probability = left * choose.uniform(0.3, 0.9)
                    left -= probability
                    logprob = math.log(probability)
                    path = columns["cum_logprob"][node] + logprob
                    outcome = 0
                    if len(columns["token"]) > self.num_nodes:
                        outcome = OUTCOMES.index("over_budget")
                    if self.tau and path < math.log(self.tau):
                        outcome = OUTCOMES.index("below_tau")
                    if rank >= level["branch"]["confidence"][place]:  # type: ignore[index]
                        outcome = OUTCOMES.index("beyond_width")
                    source = choose.randrange(len(self.drafters))
                    to = refused if outcome else columns
                    add(to, token, node, rank, depth + 1, logprob, path, outcome, source)
                    if not outcome:
                        new = len(columns["token"]) - 1
                        grown.append(new)
                        if token == wish:
                            true_path[new] = true_path[node] + 1
            if not grown:
                level["end"] = "refused"
                break
            frontier = grown
        else:
            last = {
                "first": frontier[0],
                "width": len(frontier),
                "nodes_left": 0,
                "end": "depth",
                "end_by": "max_depth",
            }
            levels.append({**last, "expand": None, "branch": None})
        num_drafted = len(columns["token"]) - 1
        parents = set(columns["parent"])
        cut = [node for node in range(1, num_drafted + 1) if node not in parents and choose.random() < 0.06]
        for node in cut:
            columns["outcome"][node] = OUTCOMES.index("pruned")
        path = [node for node in sorted(true_path, key=true_path.__getitem__) if node and node not in cut]
        committed = [columns["token"][node] for node in path] + [self.token_at(new_tokens + len(path))]
        wanted = [
            None if node in cut else self.token_at(new_tokens + true_path[node]) if node in true_path
            else choose.randrange(self.vocab)
            for node in range(num_drafted + 1)
        ]  # fmt: skip
        before, self.high = self.high, min(0.95, max(0.5, self.high + choose.choice((-0.01, 0.01))))
        draft, verify = 0.002 * len(levels), 0.03 + 0.0002 * num_drafted
        return {
            "kind": "iteration", "sequence": number, "iteration": iteration, "start": prompt_len + new_tokens,
            "num_drafted": num_drafted, "levels": levels,
            "nodes": {name: columns[name] + refused[name] for name in names}, "sources": self.drafters,
            "pruned": {"best_first": cut} if cut else {},
            "wanted": {"token": wanted, "logprob": [None if token is None else -0.25 for token in wanted]},
            "path": path, "committed": committed, "bonus": committed[-1],
            "committed_logprob": [-0.25] * len(committed), "text": None,
            "seconds": {
                "iteration": draft + verify + 0.001, "draft": draft, "draft_forward": draft / 2, "verify": verify,
            },
            "policies": {"confidence": {"high": [before, self.high]}} if before != self.high else {},
            "stop": None, "texts": {},
        }  # fmt: skip
