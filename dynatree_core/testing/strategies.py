"""Hypothesis strategies, from small to large: prompts, parameters, stacks, hostile policies and drafters."""

from __future__ import annotations

import random
from typing import Any

import attrs
import torch
from hypothesis import strategies as st

from dynatree_core import Drafter, DraftPlan, DraftState, Frontier, PluginSpec, Proposals, TokenTree, hookimpl
from dynatree_core.composition import format_stack
from dynatree_core.plugins import POLICIES, PRESETS, plugin_table
from dynatree_core.testing.models import VOCAB, perturbed, tiny_model

FAMILIES = ("gpt_neox", "llama", "gpt2")

token_ids = st.integers(0, VOCAB - 1)
prompts = st.lists(token_ids, min_size=1, max_size=14)
families = st.sampled_from(FAMILIES)
model_seeds = st.integers(0, 3)  # few, since building a model costs more than decoding with it
probabilities = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0]) | st.floats(0, 1)
branches = st.integers(1, 4)
depths = st.integers(1, 9)

# policy -> its parameters; a registered policy that is missing here fails test_every_policy_has_a_strategy
PARAMETERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "autoregressive": {},
    "linear": {"depth": depths, "tau": probabilities},
    "fixed": {"depth": depths, "branch": branches, "tau": probabilities, "max_nodes": st.integers(1, 60)},
    "confidence": {
        "high": probabilities,
        "low": probabilities,
        "min_branch": branches,
        "default_branch": branches,
        "max_branch": branches,
    },
    "dynamic_depth": {
        "signal": st.sampled_from(["confidence", "cumulative"]),
        "stop_threshold": probabilities,
        "extend_threshold": probabilities,
        "base_depth": depths,
        "max_depth": depths,
    },
    "history": {
        "rule": st.sampled_from(["step", "window"]),
        "target_accept_rate": probabilities,
        "learning_rate": probabilities,
        "history_window": st.integers(1, 12),
        "margin": probabilities,
    },
}


@st.composite
def policy_specs(draw: st.DrawFn, name: str) -> PluginSpec:
    """One registered policy with some of its parameters set at random."""
    parameters = draw(st.fixed_dictionaries({}, optional=PARAMETERS[name]))
    return PluginSpec(name, None, parameters)


@st.composite
def stacks(draw: st.DrawFn) -> str:
    """A stack string: a preset, or a composition of registered policies in any order."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from([*plugin_table(PRESETS), "phase1:plan", "phase2:plan", "phase3:plan"]))
    names = draw(st.lists(st.sampled_from(sorted(plugin_table(POLICIES))), min_size=1, max_size=4, unique=True))
    return format_stack([draw(policy_specs(name)) for name in names])


@attrs.define
class HostilePolicy:
    """Answers every hook at random, within the contract and against all sense."""

    seed: int
    random: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def _tensor(self, size: int, low: int, high: int) -> torch.Tensor:
        return torch.tensor([self.random.randint(low, high) for _ in range(size)])

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor | int | None:
        kind = self.random.randrange(4)
        if kind == 0:
            return None
        return self.random.randint(0, 3) if kind == 1 else self._tensor(frontier.width, 0, 4).to(frontier.tree.device)

    @hookimpl
    def should_expand(self, frontier: Frontier) -> torch.Tensor | bool | None:
        kind = self.random.randrange(8)
        if kind < 2:
            return None if kind else True
        if kind == 2:
            return frontier.depth < 2
        return (self._tensor(frontier.width, 0, 3) > 0).to(frontier.tree.device)

    @hookimpl
    def keep_nodes(self, tree: TokenTree) -> torch.Tensor | None:
        if self.random.randrange(3) == 0:
            return None
        return (self._tensor(tree.num_nodes, 0, 4) > 0).to(tree.device)


class HostileDrafter(Drafter):
    """Proposes random tokens: repeated among siblings, with ties, and with fewer children than asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, plan: DraftPlan) -> HostileState:
        return HostileState(random.Random(self.seed), plan)


class HostileState(DraftState):
    def __init__(self, source: random.Random, plan: DraftPlan) -> None:
        self.random, self.plan = source, plan

    def prefill(self, committed_ids: torch.Tensor) -> None:
        pass

    def propose(self, committed_ids: torch.Tensor, tree: TokenTree, k: int) -> Proposals:
        width = tree.level_sizes[-1]
        ids = [[self.random.randrange(self.plan.vocab_size) for _ in range(k)] for _ in range(width)]
        logprobs = torch.tensor([[self.random.choice([0.0, -0.1, -0.7, -3.0]) for _ in range(k)] for _ in range(width)])
        logprobs[:, self.random.randint(0, k) :] = -torch.inf
        logprobs = logprobs.sort(dim=1, descending=True).values
        return Proposals(torch.tensor(ids).to(self.plan.device), logprobs.to(self.plan.device))

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass

    def rollback(self) -> None:
        pass


@st.composite
def drafters(draw: st.DrawFn, family: str, seed: int) -> Any:
    """From perfect to hostile: the target itself, a perturbed copy, an unrelated model, the prompt, noise."""
    kind = draw(st.sampled_from(["self", "near", "far", "other_family", "prompt_lookup", "hostile", "none"]))
    match kind:
        case "self":
            return tiny_model(family, seed)
        case "near":
            return perturbed(family, seed, draw(st.sampled_from([0.02, 0.05, 0.1])))
        case "far":
            return tiny_model(family, seed + 10)
        case "other_family":
            return tiny_model(draw(families), seed + 20)
        case "prompt_lookup":
            return f"prompt_lookup(max_ngram={draw(st.integers(1, 4))},max_matches={draw(st.integers(1, 6))})"
        case "hostile":
            return HostileDrafter(draw(st.integers(0, 1000)))
        case _:
            return None


@st.composite
def trees(draw: st.DrawFn, *, max_depth: int = 5, max_width: int = 5) -> TokenTree:
    """A random tree, grown by levels, with distinct siblings and probabilities that descend among them."""
    tree = TokenTree.root(torch.tensor([draw(token_ids)]))
    for _ in range(draw(st.integers(0, max_depth))):
        level = tree.last_level
        parents = sorted(draw(st.lists(st.integers(level.start, level.stop - 1), min_size=1, max_size=max_width)))
        tokens = draw(st.lists(token_ids, min_size=len(parents), max_size=len(parents), unique=True))
        logprobs = -torch.tensor(draw(st.lists(st.floats(0.01, 3), min_size=len(parents), max_size=len(parents))))
        tree = tree.grow(torch.tensor(parents), torch.tensor(tokens), logprobs)
    return tree
