"""Hypothesis strategies, from small to large: prompts, models, parameters, stacks, trees, and what happens to them.

Everything here is public. Examples are small and shrink towards the smallest: one token, a tree without children.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import attrs
import torch
from hypothesis import assume
from hypothesis import strategies as st

from dynatree_core import (
    Drafter,
    DraftPlan,
    DraftState,
    Frontier,
    PluginSpec,
    Proposals,
    StepReport,
    TokenTree,
    Verdict,
    hookimpl,
)
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.errors import DynaTreeError, ParameterError
from dynatree_core.plugins.params import DOMAIN
from dynatree_core.plugins.presets import expand_preset
from dynatree_core.plugins.registry import (
    POLICIES,
    PRESETS,
    load_plugin,
    plugin_parameters,
    plugin_table,
    plugin_variants,
    required_parameters,
)
from dynatree_core.plugins.spec import format_stack, parse_stack
from dynatree_core.policy.build import build_stack
from dynatree_core.testing.models import VOCAB, perturbed, tiny_model
from dynatree_core.testing.text import format_tree

__all__ = [
    "FAMILIES",
    "HostileDrafter",
    "HostilePolicy",
    "Iteration",
    "compositions",
    "drafters",
    "families",
    "frontiers",
    "hostile_policies",
    "iterations",
    "levels",
    "limits",
    "model_seeds",
    "other_parameters",
    "parameters",
    "policy_names",
    "policy_specs",
    "presets",
    "probabilities",
    "processor_settings",
    "prompts",
    "proposals_of",
    "report_of",
    "settings",
    "stacks",
    "tight_limits",
    "token_ids",
    "trees",
    "warper_settings",
]

FAMILIES = ("gpt_neox", "llama", "gpt2")
MAX_BRANCH = 16  # a session's default, with which every policy must work
# largest drawn value of a parameter made by `count`: larger ones make large trees and no new cases
LARGEST_COUNT = 12

token_ids = st.integers(0, VOCAB - 1)
prompts = st.lists(token_ids, min_size=1, max_size=14)
families = st.sampled_from(FAMILIES)
model_seeds = st.integers(0, 3)  # few seeds, so that models are reused: building one takes longer than decoding with it
probabilities = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0]) | st.floats(0, 1)

# limits, as generate() takes them; max_branch not below the default, which policies may count on
limits = st.fixed_dictionaries(
    {},
    optional={
        "tau": probabilities,
        "max_nodes": st.integers(0, 40),
        "max_depth": st.integers(0, 8),
        "max_branch": st.integers(MAX_BRANCH, 50),
    },
)
# extreme limits: no tree, one node, one level, nothing cut, all nodes cut but those with probability 1
tight_limits = st.fixed_dictionaries(
    {
        "tau": st.sampled_from([0.0, 1.0, 0.5]),
        "max_nodes": st.sampled_from([0, 1, 2, 300]),
        "max_depth": st.sampled_from([0, 1, 2, 100]),
    }
)


# settings of a generation


def _can_force(settings: Mapping[str, Any]) -> bool:
    """Whether generate() accepts these settings together: it refuses a forced token that is suppressed."""
    forced = {settings.get("forced_bos_token_id"), settings.get("forced_eos_token_id")}
    return not forced & {*settings.get("suppress_tokens", ()), *settings.get("begin_suppress_tokens", ())}


_some_ids = st.lists(token_ids, min_size=1, max_size=4, unique=True)
# generate()'s settings that change the target's logits, one at a time or together
processor_settings: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.1, 1.5, 3.0]),
        "no_repeat_ngram_size": st.integers(1, 4),
        "bad_words_ids": st.lists(st.lists(token_ids, min_size=1, max_size=3), min_size=1, max_size=3),
        "min_length": st.integers(1, 30),
        "min_new_tokens": st.integers(1, 20),
        "forced_bos_token_id": token_ids,
        "forced_eos_token_id": token_ids,
        "suppress_tokens": _some_ids,
        "begin_suppress_tokens": _some_ids,
        "sequence_bias": st.dictionaries(
            st.tuples(token_ids) | st.tuples(token_ids, token_ids),
            st.sampled_from([-10.0, -1.0, 1.0, 10.0]),
            min_size=1,
            max_size=3,
        ),
        "renormalize_logits": st.just(True),
        "remove_invalid_values": st.just(True),
    },
).filter(_can_force)
# its settings that change the distribution tokens are sampled from
warper_settings: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.2, 0.7, 1.5]),
        "top_k": st.integers(0, 40),
        "top_p": st.sampled_from([0.3, 0.8, 1.0]),
        "min_p": st.sampled_from([0.05, 0.3]),
        "typical_p": st.sampled_from([0.4, 0.9]),
        "epsilon_cutoff": st.sampled_from([0.001, 0.1]),
        "eta_cutoff": st.sampled_from([0.001, 0.1]),
        "top_h": st.sampled_from([0.3, 0.8]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "no_repeat_ngram_size": st.integers(1, 3),
    },
)
_sampling = st.builds(
    lambda seed, warpers: {"do_sample": True, "seed": seed, **warpers}, st.integers(0, 99), warper_settings
)
# plain greedy decoding, with processors, or sampling
settings: st.SearchStrategy[dict[str, Any]] = st.just({}) | processor_settings | _sampling


# policies


def policy_names() -> list[str]:
    """The registered policies that can be built without giving a parameter."""
    return [name for name in sound_plugins(POLICIES) if not required_parameters(load_plugin(POLICIES, name))]


def sound_plugins(group: str) -> list[str]:
    """The registered policies or presets that can be imported, with or without required parameters.

    Others are left out with a warning, so that a broken package does not fail the test of another one's policy.
    """
    table = plugin_table(group)
    return list(_sound(group, tuple(table), tuple(entry for entries in table.values() for entry in entries)))


@functools.cache
def _sound(group: str, names: tuple[str, ...], installed: tuple[EntryPoint, ...]) -> tuple[str, ...]:
    sound = []
    for name in names:
        try:
            if group == PRESETS or not required_parameters(load_plugin(group, name)):
                build_stack(name)
        except DynaTreeError as error:
            warnings.warn(f"'{name}' stands in no stack that is drawn: {error}", RuntimeWarning, stacklevel=3)
        else:
            sound.append(name)
    return tuple(sound)


def parameters(plugin: type) -> dict[str, st.SearchStrategy[Any]]:
    """Strategies for a policy's or drafter's parameters, by name.

    Fields made by `count`, `fraction` and `choice` declare their range; booleans are drawn too. The range of any other
    parameter is unknown, so it keeps its default.
    """
    fields = {field.alias: field for field in attrs.fields(plugin)} if attrs.has(plugin) else {}
    found: dict[str, st.SearchStrategy[Any]] = {}
    for name, default in plugin_parameters(plugin).items():
        domain = fields[name].metadata.get(DOMAIN) if name in fields else None
        match domain:
            case (int(lowest), int() | None as highest):
                practical = max(LARGEST_COUNT, lowest + 3)
                found[name] = st.integers(lowest, practical if highest is None else min(highest, practical))
            case (float(), float()):
                found[name] = probabilities
            case tuple():
                found[name] = st.sampled_from(domain)
            case None if isinstance(default, bool):
                found[name] = st.booleans()
    return found


@st.composite
def policy_specs(draw: st.DrawFn, name: str, *, given: Mapping[str, Any] | None = None) -> PluginSpec:
    """One registered policy: a variant of it if it has any, with some of its parameters set at random.

    Parameters given by the caller are used unless others are drawn for them.
    """
    plugin = load_plugin(POLICIES, name)
    drawn = draw(st.fixed_dictionaries({}, optional=parameters(plugin)))
    spec = PluginSpec(name, draw(st.sampled_from([None, *plugin_variants(plugin)])), {**(given or {}), **drawn})
    assume(_is_allowed(spec))
    return spec


def _is_allowed(spec: PluginSpec) -> bool:
    """Whether the policy accepts these values together; some combinations may be refused."""
    try:
        build_stack(str(spec))
    except ParameterError:
        return False
    return True


@st.composite
def other_parameters(draw: st.DrawFn, stack: str) -> str:
    """The stack with other parameters of its policies; presets are replaced by the policies that they stand for."""
    specs = [spec for given in parse_stack(stack) for spec in expand_preset(given)]
    return format_stack([draw(policy_specs(spec.name, given=spec.parameters)) for spec in specs])


def presets() -> list[str]:
    """The registered presets, and each with each of its variants."""
    found = []
    for name in sound_plugins(PRESETS):
        plugins = [load_plugin(POLICIES, spec.name) for spec in expand_preset(PluginSpec(name))]
        variants = sorted({variant for plugin in plugins for variant in plugin_variants(plugin)})
        found += [name, *(f"{name}:{variant}" for variant in variants)]
    return found


@st.composite
def stacks(draw: st.DrawFn) -> str:
    """A stack string: a preset, or a composition of registered policies in any order."""
    if sound_plugins(PRESETS) and draw(st.integers(0, 4)) == 4:
        return draw(st.sampled_from(presets()))
    names = draw(st.lists(st.sampled_from(policy_names()), min_size=1, max_size=4, unique=True))
    return format_stack([draw(policy_specs(name)) for name in names])


@st.composite
def compositions(draw: st.DrawFn, policy: str | object | Sequence[str | object]) -> list[str | object]:
    """A stack with up to three other registered policies before and after it, and sometimes a hostile one."""
    own = list(policy) if isinstance(policy, list | tuple) else [policy]
    taken = build_stack(own).policies
    free = [name for name in policy_names() if name not in taken]
    names = draw(st.lists(st.sampled_from(free), max_size=3, unique=True)) if free else []
    others: list[str | object] = [str(draw(policy_specs(name))) for name in names]
    if "hostile_policy" not in taken and draw(st.integers(0, 3)) == 3:
        others.append(draw(hostile_policies))
    place = draw(st.integers(0, len(others)))
    return [*others[:place], *own, *others[place:]]


@attrs.define
class HostilePolicy:
    """Answers every hook at random within its contract, without regard to what would be sensible."""

    seed: int
    random: random.Random = attrs.field(init=False, repr=False, eq=False)

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


hostile_policies = st.builds(HostilePolicy, st.integers(0, 10_000))


# drafters


@attrs.frozen(slots=False)
class HostileDrafter(Drafter):
    """Proposes random tokens: repeated among siblings, with ties, and with fewer children than asked for."""

    seed: int

    def start(self, plan: DraftPlan) -> HostileState:
        return HostileState(random.Random(self.seed), plan)


class HostileState(DraftState):
    """A source of random numbers."""

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
    """Drafters for the target `tiny_model(family, seed)`, from perfect to hostile.

    The target itself, a perturbed copy, an unrelated model, one of another family, prompt lookup, prompt lookup united
    with a model, random tokens, or None.
    """
    kind = draw(st.sampled_from(["self", "near", "far", "other_family", "prompt_lookup", "union", "hostile", "none"]))
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
        case "union":
            return UnionDrafter([ModelDrafter(perturbed(family, seed, 0.05)), PromptLookupDrafter()])
        case "hostile":
            return HostileDrafter(draw(st.integers(0, 1000)))
        case _:
            return None


# trees, levels and iterations


@st.composite
def trees(draw: st.DrawFn, *, max_depth: int = 5, max_width: int = 5) -> TokenTree:
    """A random tree, grown by levels, with distinct siblings and probabilities that descend among them."""
    tree = TokenTree.root(torch.tensor([draw(token_ids)]))
    for _ in range(draw(st.integers(0, max_depth))):
        level = tree.last_level
        parents = sorted(draw(st.lists(st.integers(level.start, level.stop - 1), min_size=1, max_size=max_width)))
        num_children = len(parents)
        tokens = draw(st.lists(token_ids, min_size=num_children, max_size=num_children, unique=True))
        logprobs = [-loss for loss in draw(st.lists(st.floats(0.01, 3), min_size=num_children, max_size=num_children))]
        logprobs = [logprob for _, logprob in sorted(zip(parents, logprobs, strict=True), key=lambda c: (c[0], -c[1]))]
        tree = tree.grow(torch.tensor(parents), torch.tensor(tokens), torch.tensor(logprobs))
    return tree


@st.composite
def _children(draw: st.DrawFn) -> list[tuple[int, float]]:
    """The proposals for one node: up to four tokens with descending probabilities that sum to at most 1."""
    found: list[tuple[int, float]] = []
    highest = left = 1.0
    for token in draw(st.lists(token_ids, max_size=4, unique=True)):
        highest = min(highest, left * draw(probabilities))
        left -= highest
        found.append((token, highest))
    return found


# the proposals for a level: a list of (token, probability) for each of its first nodes; see proposals_of
levels = st.lists(_children(), min_size=1, max_size=3)


def proposals_of(level: Sequence[Sequence[tuple[int, float]]], width: int, k: int) -> Proposals:
    """Proposals [width, k]: drawn lists are repeated until there are `width`, and filled up with probability 0."""
    token_ids_ = torch.zeros(width, k, dtype=torch.int64)
    probs = torch.zeros(width, k)
    for row in range(width):
        for rank, (token, prob) in enumerate(level[row % len(level)][:k]):
            token_ids_[row, rank], probs[row, rank] = token, prob
    return Proposals(token_ids_, probs.log())


@st.composite
def frontiers(draw: st.DrawFn, tree: TokenTree, iteration: int = 0) -> Frontier:
    """The frontier of a tree, with any proposals that keep a drafter's contract."""
    max_branch = draw(st.sampled_from([MAX_BRANCH, VOCAB]))
    proposals = proposals_of(draw(levels), tree.level_sizes[-1], max_branch)
    return Frontier(tree, iteration, draw(st.integers(1, 128)), max_branch, lambda: proposals)


def report_of(
    tree: TokenTree, iteration: int, node: int, bonus: int, num_cut: int = 0, stop_reason: str | None = None
) -> StepReport:
    """The report of a step that accepted the path to a node; with a stop, the last tokens of the path are missing."""
    path = tuple(tree.ancestor_mask[node].nonzero().flatten().tolist()[1:])
    token_ids_ = (*tree.token_ids[list(path)].tolist(), bonus)
    end = max(len(token_ids_) - num_cut, 1)
    draft_path = tuple(tree.draft_index[list(path)].tolist())
    return StepReport(iteration, tree, Verdict(path[:end], draft_path[:end], token_ids_[:end], stop_reason))


@attrs.frozen(eq=False)
class Iteration:
    """The arguments of a stack's hooks in one decode step: a frontier, the whole tree, and the report."""

    frontier: Frontier
    report: StepReport

    @property
    def tree(self) -> TokenTree:
        return self.report.tree

    def __str__(self) -> str:
        confidence = [round(value, 3) for value in self.frontier.confidence.tolist()]
        return (
            f"iteration {self.frontier.iteration}: the frontier is at depth {self.frontier.depth}, confidence "
            f"{confidence}; committed {list(self.report.token_ids)}; * is accepted\n"
            f"{format_tree(self.tree, (0, *self.report.verdict.path))}"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"<{self.tree.num_nodes} nodes>")  # the trees are printed as text


@st.composite
def iterations(draw: st.DrawFn, *, max_size: int = 8) -> list[Iteration]:
    """Successive decode steps. Their trees and outcomes are drawn, not made by the policies under test.

    The last step may end the generation.
    """
    found = []
    num_iterations = draw(st.integers(1, max_size))
    for number in range(num_iterations):
        tree = draw(trees(max_depth=4, max_width=4))
        node = draw(st.integers(0, tree.num_nodes - 1))
        is_last = number == num_iterations - 1
        stop_reason = draw(st.sampled_from([None, "eos", "length"])) if is_last else None
        num_cut = draw(st.integers(0, 2)) if stop_reason else 0
        report = report_of(tree, number, node, draw(token_ids), num_cut, stop_reason)
        found.append(Iteration(draw(frontiers(tree, number)), report))
    return found
