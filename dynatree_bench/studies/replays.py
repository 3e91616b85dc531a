"""How far is what a replayed trace says of a policy from what a real run with it does?

Question: `dynatree replay` grows a policy's trees of what another run has proposed. How many tokens and nodes an
iteration does it say, how many are there when the policy really runs, and how much of the difference is due to nodes
that were never proposed?

Method: each policy really decodes each prompt, with a trace. Then every policy is replayed on the traces of every other
one, and on its own, where the difference must be zero. Texts are the same, since decoding is lossless, so replay and
real run are about the same tokens. Speeds are not measured.

Output: for each pair of policies tokens and nodes an iteration, replayed and real, the difference, and the share of
nodes whose children a policy wanted and the trace does not know.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from dynatree_bench.report.tables import Table, simple
from dynatree_bench.run.progress import bar
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import generate
from dynatree_core.trace import Replay, SequenceTrace, read, recorded, replay

POLICIES = ("phase3", "fixed(depth=4,branch=2)", "cost_aware", "fixed(depth=8,branch=4)")


@attrs.frozen
class Row:
    """One policy, replayed on the traces of another."""

    recorded_with: str
    policy: str
    tokens_per_iteration: float  # replayed
    real_tokens_per_iteration: float
    nodes_per_iteration: float  # replayed
    real_nodes_per_iteration: float
    unknown_share: float

    @property
    def difference(self) -> float:
        """Of tokens an iteration, relative to the real ones."""
        return self.tokens_per_iteration / self.real_tokens_per_iteration - 1


def measure(asked: Asked) -> dict[str, Any]:
    """{"rows": of Row}"""
    pair, limit = asked.load(), asked.new_tokens(full=96, quick=16)
    prompts = [ids for of_kind in asked.prompts(pair, full=10).values() for ids in of_kind]
    policies = asked.policies or POLICIES
    traces: dict[str, list[SequenceTrace]] = {}
    with tempfile.TemporaryDirectory() as folder, bar("decoding", len(policies) * len(prompts)) as advance:
        for number, policy in enumerate(policies):
            traces[policy] = []
            for place, ids in enumerate(prompts):
                path = Path(folder) / f"{number}-{place}.jsonl"
                options = {"tokenizer": pair.target.tokenizer, "max_new_tokens": limit, "trace": path}
                generate(pair.target.model, pair.drafter, list(ids), policy=policy, **options)
                traces[policy] += read(path).sequences
                advance()
    rows = [row(before, policy, traces) for before in policies for policy in policies]
    said = {
        **pair.said(),
        "max_new_tokens": limit,
        "num_prompts": len(prompts),
    }
    return {"provenance": said, "rows": [attrs.asdict(one) for one in rows]}


def row(before: str, policy: str, traces: Mapping[str, Sequence[SequenceTrace]]) -> Row:
    """A policy replayed on the traces of the one before, beside its own real runs.

    Raises:
        RuntimeError: the same prompts have become other texts, so that nothing can be compared.
    """
    if [one.token_ids for one in traces[before]] != [one.token_ids for one in traces[policy]]:
        raise RuntimeError(
            f"'{before}' and '{policy}' must decode the same texts, got others; `dynatree audit` tells why"
        )
    replayed = [replay(one, policy) for one in traces[before]]
    real = [recorded(one) for one in traces[policy]]
    num_asked = sum(step.num_asked for one in replayed for step in one.steps)
    return Row(
        recorded_with=before,
        policy=policy,
        tokens_per_iteration=_per_iteration(replayed, "num_committed"),
        real_tokens_per_iteration=_per_iteration(real, "num_committed"),
        nodes_per_iteration=_per_iteration(replayed, "num_verified"),
        real_nodes_per_iteration=_per_iteration(real, "num_verified"),
        unknown_share=sum(step.num_unknown for one in replayed for step in one.steps) / max(num_asked, 1),
    )


def _per_iteration(replays: Iterable[Replay], what: str) -> float:
    steps = [step for one in replays for step in one.steps]
    return float(sum(getattr(step, what) for step in steps) / len(steps))


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    rows = [Row(**one) for one in found["rows"]]
    header = ("recorded with", "replayed", "tok/it", "real", "difference %", "nodes", "real nodes", "unknown %")
    cells = [
        (
            one.recorded_with, one.policy, one.tokens_per_iteration, one.real_tokens_per_iteration,
            100 * one.difference, one.nodes_per_iteration, one.real_nodes_per_iteration, 100 * one.unknown_share,
        )
        for one in rows
    ]  # fmt: skip
    return [simple("replays", "Replayed and real", "", header, cells)]


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    others = [one for one in (Row(**one) for one in found["rows"]) if one.recorded_with != one.policy]
    if not others:
        return []
    worst = max(others, key=lambda one: abs(one.difference))
    return [
        f"the largest difference: {worst.policy}, replayed on {worst.recorded_with}, {worst.difference:+.0%} tokens an "
        "iteration"
    ]


STUDY = Study(
    ("target", "drafters", "device", "dtype", "policies", "workloads", "num_prompts", "picks", "max_new_tokens",
     "is_chat"),
    measure, tables, sentences=sentences,
)  # fmt: skip
