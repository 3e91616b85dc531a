"""The contracts of policies and drafters as assertions. Each searches for a counterexample with hypothesis.

A failure shows the smallest counterexample found: the error's message first, then, as notes, the drawn example and the
trees of its iterations as text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
from hypothesis import HealthCheck, Phase, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

from dynatree_core.clock import StageClock
from dynatree_core.cost_model import CostModel, StepFunction
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState
from dynatree_core.drafters.build import as_drafter
from dynatree_core.engine.session import Session
from dynatree_core.errors import ParameterError, PolicyError
from dynatree_core.generation import run
from dynatree_core.models.state import without_gradients
from dynatree_core.plugins.spec import format_stack, parse_stack
from dynatree_core.policy.build import build_stack
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.testing import padding
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB, reference, tiny_model
from dynatree_core.testing.text import format_tree
from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DRAFTER_PROPERTIES",
    "POLICY_PROPERTIES",
    "Case",
    "PolicyMachine",
    "assert_drafter_contract",
    "assert_hook_contract",
    "assert_lossless",
    "cases",
    "check_case",
    "without_database",
]

Policy = str | object | Sequence[str | object]
Answers = tuple[list[int], list[bool]]  # children of each frontier node, and whether each node of the tree is verified


def assert_lossless(policy: Policy, *, drafter: Any = None, max_examples: int = 50) -> None:
    """Generations with this stack, alone and beside random others, equal the target's own output.

    Drawn are tiny float64 models of several architectures, prompts, lengths, end tokens, limits, logits processors,
    sampling by seed, other registered policies before and after the stack, and drafters from perfect to hostile.

    Args:
        policy: a stack's string, a policy object, a list of both, or a hypothesis strategy for any of them.
        drafter: a registered name, a Drafter, or a model with the tiny models' vocabulary. None: any drafter.
        max_examples: generations to try.

    Raises:
        AssertionError: the output differs; the message has the first difference and the tree of the step that made it.
        DynaTreeError: a policy or drafter broke its contract in a generation; the message names it.
    """
    _check_lossless(cases(_composed(policy), drafter=drafter), max_examples)


def assert_hook_contract(policy: Policy, *, max_examples: int = 100) -> None:
    """Every hook of this stack keeps its contract for any tree, proposals and outcome, and changes no argument.

    Two sessions of the stack that take turns must not influence each other. Policies that are marked `is_capturable`
    must read no numbers on the host, and must say the same of a node whatever padding stands beside it. Policies that
    are marked `is_recordable` must say what a graph repeats that was recorded in an earlier iteration.

    Args:
        policy: a stack's string, a policy object, a list of both, or a hypothesis strategy for any of them.
        max_examples: sequences of iterations to try.

    Raises:
        PolicyError: an answer of the wrong type, shape, dtype or range, or an exception; it names policy and hook.
        AssertionError: a hook changed an argument, two sessions share state, an answer depends on padding, or a graph
            would repeat another one.
    """
    _check_hooks(policy, max_examples)
    _check_independent_sessions(policy, max_examples)
    _check_capturable(policy, max_examples)
    _check_recordable(policy, max_examples)


def assert_drafter_contract(
    drafter: str | Drafter | nn.Module,
    *,
    deterministic: bool = True,
    vocab_size: int = VOCAB,
    target: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_examples: int = 50,
) -> None:
    """A drafter proposes in the right form for any tree, and keeps nothing of nodes that were not accepted.

    The second is checked at each level of every tree, after commits, rollbacks and broken iterations: the proposals
    must equal those of a new state that was given the committed tokens only.

    Args:
        drafter: a registered name with parameters if any, a Drafter, or a model.
        deterministic: whether to compare with a new state; False for a drafter that draws random numbers.
        vocab_size: number of the target's token ids.
        target: the model that the drafter gets as its target; None: a tiny one.
        tokenizer: what the drafter gets as `DraftPlan.tokenizer`.
        max_examples: generations to try.

    Raises:
        AssertionError: what must hold of the proposals, and what was proposed.
    """
    source = as_drafter(drafter)
    if source is None:
        raise ParameterError("assert_drafter_contract needs a drafter, got None; give its name, an object or a model")
    cpu = torch.device("cpu")
    target = tiny_model("llama") if target is None else target
    plan = DraftPlan(vocab_size, 64, 32, cpu, StageClock(cpu), target, tokenizer=tokenizer)

    @given(
        prompt=st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=14),
        k=st.integers(1, 8),
        rounds=st.lists(_rounds(vocab_size), min_size=1, max_size=4),
    )
    def drafter_contract(prompt: list[int], k: int, rounds: list[_Round]) -> None:
        with without_gradients(target, *source.models(target)):
            _Drafting(source, plan, prompt, k, deterministic).play(rounds)

    _check_description(source, target)
    _search(drafter_contract, max_examples)


def _search(check: Callable[[], None], max_examples: int) -> None:
    """Run a check on many examples. Of several faults the first is shown, by its smallest example."""
    with _steady():
        without_database(max_examples)(check)()


def without_database(max_examples: int) -> hypothesis_settings:
    """Settings of one search: nothing remembered between runs, no deadline, one fault at a time."""
    return hypothesis_settings(
        max_examples=max_examples,
        deadline=None,
        database=None,  # its key would be this function, whatever is checked
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def _steady() -> Iterator[None]:
    """Replace hypothesis' message about flaky tests by one that says what a policy's author can do."""
    try:
        yield
    except Flaky as error:
        raise AssertionError(
            "the same example must give the same outcome each time, but failed once and passed once; something "
            "outlives the session: a class attribute, a global, or random numbers that no seed of the policy or "
            f"drafter decides\n{error}"
        ) from error


def _drawn(policy: Policy) -> st.SearchStrategy[Any]:
    return policy if isinstance(policy, st.SearchStrategy) else st.just(policy)


def _composed(policy: Policy) -> st.SearchStrategy[Any]:
    return _drawn(policy).flatmap(ours.compositions)


# lossless


@attrs.frozen(eq=False)
class Case:
    """One generation to compare with transformers' own."""

    target: Any
    drafter: Any
    prompt: list[int]
    options: dict[str, Any]  # what generate() gets
    expected: list[int]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"generate({_name(self.target)}, {_name(self.drafter)}, {self.prompt}, {options})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def _name(model_or_drafter: Any) -> str:
    is_model = isinstance(model_or_drafter, nn.Module)
    return str(model_or_drafter.config.name_or_path) if is_model else repr(model_or_drafter)


@st.composite
def cases(
    draw: st.DrawFn,
    policies: st.SearchStrategy[Any],
    *,
    drafter: Any = None,
    limits: st.SearchStrategy[dict[str, Any]] = ours.limits,
    families: st.SearchStrategy[str] = ours.families,
) -> Case:
    """A generation: everything that is drawn here is drawn for every check of losslessness."""
    family, seed = draw(families), draw(ours.model_seeds)
    target, prompt = tiny_model(family, seed), draw(ours.prompts)
    chosen_drafter = draw(ours.drafters(family, seed)) if drafter is None else drafter
    max_new_tokens = draw(st.integers(0, 24))
    settings = draw(ours.settings)
    expected = reference(target, prompt, max_new_tokens, **settings)
    # end tokens that never come, and ones that stand in the output
    eos = draw(st.lists(st.sampled_from(expected) | ours.token_ids if expected else ours.token_ids, max_size=2))
    if eos:
        expected = reference(target, prompt, max_new_tokens, eos, **settings)
    options = {
        "policy": draw(policies), "max_new_tokens": max_new_tokens, "eos_token_id": eos, **draw(limits), **settings
    }  # fmt: skip
    return Case(target, chosen_drafter, prompt, options, expected)


def check_case(case: Case) -> None:
    """Run a generation and compare it.

    Raises:
        AssertionError: another token, or another reason to stop.
    """
    session = Session(case.target, case.drafter, case.prompt, on_error="raise", **case.options)
    for _ in run(session):
        if session.new_token_ids != case.expected[: len(session.new_token_ids)]:
            break
    if session.new_token_ids != case.expected:
        raise AssertionError(_difference(case, session))
    reason = "eos" if case.expected and case.expected[-1] in case.options["eos_token_id"] else "length"
    if session.stop_reason != reason:
        raise AssertionError(f"the generation must stop for the reason '{reason}', got '{session.stop_reason}'")


def _check_lossless(cases: st.SearchStrategy[Case], max_examples: int) -> None:
    @given(case=cases)
    def lossless(case: Case) -> None:
        check_case(case)

    _search(lossless, max_examples)


def _difference(case: Case, session: Session) -> str:
    """The first difference, and the tree of the step that made it."""
    got, expected = session.new_token_ids, case.expected
    pairs = zip([*got, None], [*expected, None], strict=False)
    place = next(i for i, (ours_, theirs) in enumerate(pairs) if ours_ != theirs)
    wanted, came = ("the end" if place >= len(ids) else ids[place] for ids in (expected, got))
    lines = [
        f"the output must be the target's own text: at token {place} expected {wanted}, got {came}",
        f"stack:    {session.stack}",
        f"drafter:  {session.drafter_name}",
        f"prompt:   {case.prompt}",
        f"expected: {expected}",
        f"got:      {got}",
    ]
    report = session.last_report
    if report is not None:
        start = len(got) - len(report.token_ids)
        lines += [
            f"The step that went wrong, iteration {report.iteration}, accepted the path {list(report.verdict.path)} "
            f"and committed {list(report.token_ids)}, where the target alone says {expected[start : len(got)]}. Its "
            "tree, * is accepted:",
            format_tree(report.tree, (0, *report.verdict.path)),
        ]
    return "\n".join(lines)


# hooks


@contextmanager
def _only_read(who: str, tree: TokenTree, frontier: Frontier | None = None) -> Iterator[None]:
    """Fail if the block writes to these tensors."""
    shown = {f"tree.{name}": value for name, value in attrs.asdict(tree, recurse=False).items()}
    if frontier is not None:
        of_drafter = attrs.asdict(frontier.proposals, recurse=False)
        shown |= {f"proposals.{name}": value for name, value in of_drafter.items()}
        shown |= {"frontier.confidence": frontier.confidence, "frontier.entropy": frontier.entropy}
    tensors = {name: value for name, value in shown.items() if isinstance(value, Tensor)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    as_text = format_tree(tree)
    yield
    changed = [name for name, tensor in tensors.items() if not torch.equal(before[name], tensor)]
    if changed:
        raise AssertionError(
            f"{who} must only read what it is shown, but wrote to {', '.join(changed)}; clone() what it changes. "
            f"The tree before the call:\n{as_text}"
        )


@contextmanager
def _unwatched(who: str, tree: TokenTree, frontier: Frontier | None = None) -> Iterator[None]:
    yield


@attrs.frozen
class _Hooks:
    """Calls a stack's hooks, and checks their answers, as a decode step does."""

    stack: PolicyStack
    watch: Callable[..., Any] = _only_read

    @torch.inference_mode()
    def widths(self, frontier: Frontier) -> list[int]:
        """Children of each frontier node, 0 where it is not expanded; [] where should_expand says False for all."""
        with self.watch("hook should_expand", frontier.tree, frontier):
            expand = self.stack.should_expand(frontier).value
        if expand is False:
            return []
        with self.watch("hook branch_factor", frontier.tree, frontier):
            branch = self.stack.branch_factor(frontier)
        wanted = branch.value.tolist() if isinstance(branch.value, Tensor) else [branch.value] * frontier.width
        if not 0 <= min(wanted) <= max(wanted) <= frontier.max_branch:
            self.stack.refuse_branch_factor(branch.decider, f"{min(wanted)} to {max(wanted)}", frontier.max_branch)
        is_expanded = expand.tolist() if isinstance(expand, Tensor) else [True] * frontier.width
        return [width if is_wanted else 0 for width, is_wanted in zip(wanted, is_expanded, strict=True)]

    @torch.inference_mode()
    def kept(self, tree: TokenTree) -> Tensor:
        """[nodes] bool: the nodes that would be verified."""
        everything = torch.ones(tree.num_nodes, dtype=torch.bool)
        if tree.num_drafted == 0:  # a decode step calls keep_nodes only where something was drafted
            return everything
        with self.watch("hook keep_nodes", tree):
            keep = self.stack.keep_nodes(tree).value
        return everything if keep is None else tree.close_under_ancestors(keep)

    @torch.inference_mode()
    def tell(self, report: StepReport) -> None:
        with self.watch("hook on_iteration_end", report.tree):
            self.stack.on_iteration_end(report)

    def answers(self, iteration: ours.Iteration) -> Answers:
        """The answers of all four hooks, called in the order of a decode step."""
        own = attrs.evolve(iteration.frontier)  # it caches what is asked of it, which two stacks must not share
        answers = self.widths(own), self.kept(iteration.tree).tolist()
        self.tell(iteration.report)
        return answers


def _check_hooks(policy: Policy, max_examples: int, *, watch: Callable[..., Any] = _only_read) -> None:
    @given(policy=_drawn(policy), iterations=ours.iterations())
    def hook_contract(policy: Policy, iterations: list[ours.Iteration]) -> None:
        hooks = _Hooks(build_stack(policy), watch)
        for iteration in iterations:
            note(str(iteration))
            hooks.answers(iteration)

    _search(hook_contract, max_examples)


def _check_independent_sessions(policy: Policy, max_examples: int) -> None:
    """A session answers the same whether or not another session of the stack runs in between."""

    @given(policy=_drawn(policy), iterations=ours.iterations(), of_another=ours.iterations())
    def independent_sessions(
        policy: Policy, iterations: list[ours.Iteration], of_another: list[ours.Iteration]
    ) -> None:
        alone, beside, another = (_Hooks(build_stack(policy), _unwatched) for _ in range(3))
        expected = [alone.answers(iteration) for iteration in iterations]
        for number, iteration in enumerate(iterations):
            if number < len(of_another):
                another.answers(of_another[number])
            note(str(iteration))
            answers = beside.answers(iteration)
            if answers != expected[number]:
                raise AssertionError(
                    "two sessions of a stack must share no state, but beside another session its answers differ; "
                    "keep state in attributes of the instance, and random numbers in a generator of its own\n"
                    f"stack:  {beside.stack}\n"
                    f"alone:  widths {expected[number][0]}, kept {expected[number][1]}\n"
                    f"beside: widths {answers[0]}, kept {answers[1]}"
                )

    _search(independent_sessions, max_examples)


def _check_capturable(policy: Policy, max_examples: int) -> None:
    """A stack that is marked `is_capturable` answers alike with padding, and reads no numbers on the host."""

    @given(policy=_drawn(policy), iterations=ours.iterations())
    def capturable(policy: Policy, iterations: list[ours.Iteration]) -> None:
        plain, padded = _Hooks(build_stack(policy), _unwatched), _Padded(build_stack(policy))
        if not plain.stack.is_capturable:
            return
        for iteration in iterations:
            note(str(iteration))
            widths, kept = plain.answers(iteration)
            expected, answers = (widths or [0] * iteration.frontier.width, kept), padded.answers(iteration)
            if answers != expected:
                raise AssertionError(
                    "what a policy that is marked is_capturable says of a node must not depend on padding, but with "
                    "padding behind each level its answers differ; mask it by `tree.is_live`, or leave "
                    f"is_capturable out\nstack:   {plain.stack}\n"
                    f"without: widths {expected[0]}, kept {expected[1]}\n"
                    f"with:    widths {answers[0]}, kept {answers[1]}"
                )

    _search(capturable, max_examples)


def _check_recordable(policy: Policy, max_examples: int) -> None:
    """A stack that is marked `is_recordable` says what a graph repeats that an earlier iteration has recorded."""

    @given(policy=_drawn(policy), iterations=ours.iterations())
    def recordable(policy: Policy, iterations: list[ours.Iteration]) -> None:
        plain, repeated = build_stack(policy), _Repeated(build_stack(policy))
        _check_known_parameters(plain)
        for iteration in iterations:
            note(str(iteration))
            hooks = _Padded(plain) if repeated.stack.is_recordable else _Hooks(plain, _unwatched)
            expected, answers = hooks.answers(iteration), repeated.answers(iteration)
            if answers != expected:
                raise AssertionError(
                    "what a policy that is marked is_recordable says must follow from the tree, the proposals, its "
                    "parameters and its graph_key alone, but a graph that an earlier iteration has recorded with the "
                    "same ones repeats other answers; let what else they follow from (frontier.iteration, costs, load, "
                    "what on_iteration_end or an earlier call has left) change graph_key, or leave is_recordable out\n"
                    f"stack:    {plain}\n"
                    f"recorded: iteration {repeated.recorded_in}, graph_key {repeated.graph_keys()}\n"
                    f"called:   widths {expected[0]}, kept {expected[1]}\n"
                    f"repeated: widths {answers[0]}, kept {answers[1]}"
                )

    _search(recordable, max_examples)


def _check_known_parameters(stack: PolicyStack) -> None:
    """Fail where a policy's promise is not believed."""
    for name, policy in stack.policies.items():
        is_promised = all(getattr(policy, mark, False) is True for mark in ("is_capturable", "is_recordable"))
        if is_promised and not PolicyStack({name: policy}, name).is_recordable:
            raise AssertionError(
                f"policy '{name}' is marked is_recordable, so it must be an attrs class whose parameters are numbers "
                f"and strings, got {type(policy).__name__}, whose parameters cannot be told apart, so that it is never "
                "recorded; make it one, with what else it keeps in fields of init=False, or leave is_recordable out"
            )


# a machine on which drafting is dear, for policies that promise not to ask
_OTHER_COSTS = CostModel(StepFunction((1,), (0.001,)), StepFunction((1,), (0.1,)), 0.0)


@attrs.define
class _Repeated:
    """A stack whose tree is drawn by graphs: where one is recorded, hooks of the copy in it are repeated.

    The live policies are then told how iterations end, and are not asked.
    """

    stack: PolicyStack
    recorded: dict[Hashable, tuple[PolicyStack, int]] = attrs.field(factory=dict)  # with the iteration of each
    recorded_in: int = 0  # the iteration of what was repeated last

    def graph_keys(self) -> dict[str, Hashable]:
        """What the policies say that answers follow from, by name."""
        return {name: getattr(policy, "graph_key", None) for name, policy in self.stack.policies.items()}

    def answers(self, iteration: ours.Iteration) -> Answers:
        """The answers of all four hooks in a decode step."""
        if not self.stack.is_recordable:
            return _Hooks(self.stack, _unwatched).answers(iteration)
        key = self._key()
        if key not in self.recorded:
            self.recorded[key] = copy.deepcopy(self.stack), iteration.frontier.iteration
        of_graph, self.recorded_in = self.recorded[key]
        answers = self._repeated(copy.deepcopy(of_graph), iteration)  # a replay leaves nothing behind in a policy
        self.stack.on_iteration_end(iteration.report)
        return answers

    def _key(self) -> Hashable:
        """What must be as it was for a graph to be repeated, beside numbers that are tensors in it."""
        for name, key in self.graph_keys().items():
            try:
                hash(key)
            except TypeError as error:
                raise AssertionError(
                    f"policy '{name}' is marked is_recordable, so its graph_key must be hashable, got {key!r:.200} "
                    f"({type(key).__name__}); a tuple is"
                ) from error
        fixed = [(*place, value) for place, value in _numbers(self.stack).items() if not isinstance(value, float)]
        return *self.graph_keys().items(), *fixed

    def _repeated(self, copied: PolicyStack, iteration: ours.Iteration) -> Answers:
        """What the copy says of a tree when it is recorded, at another time."""
        before, now = _numbers(copied), _numbers(self.stack)
        moved = [place for place, value in now.items() if value != before[place]]
        for policy, name in moved:
            number = padding.unread(torch.tensor(now[policy, name], dtype=torch.float32))
            object.__setattr__(copied.policies[policy], name, number)
        frontier = attrs.evolve(
            iteration.frontier, iteration=self.recorded_in, measure=lambda: _OTHER_COSTS, num_tokens_left=1
        )
        try:
            return _Padded(copied).about(iteration.tree, frontier)
        except PolicyError as error:
            if not moved:
                raise
            numbers = ", ".join(map(".".join, moved))
            raise AssertionError(
                "a policy that is marked is_recordable must bear that a parameter which moves is a tensor without "
                f"dimensions, here {numbers}, but {error}; or leave is_recordable out"
            ) from error


def _numbers(stack: PolicyStack) -> dict[tuple[str, str], Any]:
    """The parameters by policy and name."""
    values = stack.parameters().items()
    return {(policy, name): value for policy, of_policy in values for name, value in of_policy.items()}


@attrs.frozen
class _Padded:
    """A stack's hooks on trees with padding; the answers are those about nodes."""

    stack: PolicyStack

    def answers(self, iteration: ours.Iteration) -> Answers:
        """The answers of all four hooks, called in the order of a decode step."""
        answers = self.about(iteration.tree, iteration.frontier)
        self.stack.on_iteration_end(iteration.report)
        return answers

    @torch.inference_mode()
    def about(self, tree: TokenTree, frontier: Frontier) -> Answers:
        """Those of the hooks that a graph repeats."""
        width = 1 + max(*tree.level_sizes, *frontier.tree.level_sizes)  # some padding in each level
        widths = self._widths(padding.padded_frontier(frontier, width), frontier.width)
        with_padding = padding.padded(tree, width)
        is_kept = with_padding.is_live
        if tree.num_drafted > 0:
            keep = self.stack.keep_nodes(padding.unread_tree(with_padding)).value
            if keep is not None:
                is_kept = with_padding.close_under_ancestors(keep.as_subclass(Tensor))
        return widths, is_kept[with_padding.is_live].tolist()

    def _widths(self, frontier: Frontier, num_nodes: int) -> list[int]:
        expand = self.stack.should_expand(frontier).value
        if expand is False:
            return [0] * num_nodes
        wanted, is_expanded = (
            answer.as_subclass(Tensor)[:num_nodes].tolist() if isinstance(answer, Tensor) else [answer] * num_nodes
            for answer in (self.stack.branch_factor(frontier).value, expand)
        )
        return [width if is_wanted else 0 for width, is_wanted in zip(wanted, is_expanded, strict=True)]


class PolicyMachine(RuleBasedStateMachine):
    """A state machine of hypothesis: it calls a stack's hooks in every order in which a session may call them.

    A random drafter proposes; the stack's answers decide which nodes are grown and verified; a random path is accepted,
    or the iteration is broken off. Every answer is checked against its contract.

        run_state_machine_as_test(lambda: PolicyMachine("my_policy(x=3)"))
    """

    max_nodes = 24

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self._begin_session()

    def _begin_session(self) -> None:
        self.hooks = _Hooks(build_stack(self.policy))
        self.iteration = 0
        self._start(0)

    def _start(self, token_id: int) -> None:
        self.tree = TokenTree.root(torch.tensor([token_id]))
        self.is_growing, self.is_pruned = True, False

    @precondition(lambda self: self.is_growing)
    @rule(level=ours.levels)
    def next_level(self, level: list[list[tuple[int, float]]]) -> None:
        """should_expand and branch_factor, and the children that they ask for."""
        tree, k = self.tree, ours.MAX_BRANCH
        nodes_left = self.max_nodes - tree.num_drafted
        proposals = ours.proposals_of(level, tree.level_sizes[-1], k)
        note(format_tree(tree))
        widths = self.hooks.widths(Frontier(tree, self.iteration, nodes_left, k, lambda: proposals))
        children = [
            (row, rank)
            for row, width in enumerate(widths)
            for rank in range(width)
            if proposals.logprobs[row, rank] > -torch.inf
        ][:nodes_left]
        if children:
            rows, ranks = torch.tensor(children).T
            parents = tree.last_level.start + rows
            self.tree = tree.grow(parents, proposals.token_ids[rows, ranks], proposals.logprobs[rows, ranks])
        self.is_growing = bool(children) and self.tree.num_drafted < self.max_nodes

    @precondition(lambda self: self.tree.num_drafted and not self.is_pruned)
    @rule()
    def prune(self) -> None:
        """keep_nodes, which ends the growth."""
        note(format_tree(self.tree))
        self.tree = self.tree.subtree(self.hooks.kept(self.tree))
        self.is_growing, self.is_pruned = False, True

    @precondition(lambda self: self.is_pruned or not self.tree.num_drafted)
    @rule(node=st.integers(0, max_nodes), bonus=ours.token_ids)
    def end_iteration(self, node: int, bonus: int) -> None:
        """on_iteration_end, with the path to any node accepted."""
        self._tell(ours.report_of(self.tree, self.iteration, node % self.tree.num_nodes, bonus))
        self.iteration += 1
        self._start(bonus)

    @precondition(lambda self: self.is_pruned or not self.tree.num_drafted)
    @rule(node=st.integers(0, max_nodes), num_cut=st.integers(0, 2), stop_reason=st.sampled_from(["eos", "length"]))
    def stop(self, node: int, num_cut: int, stop_reason: str) -> None:
        """on_iteration_end, with a token that ends the generation; then another session begins."""
        node %= self.tree.num_nodes
        self._tell(ours.report_of(self.tree, self.iteration, node, 0, num_cut, stop_reason))
        self._begin_session()

    def _tell(self, report: StepReport) -> None:
        note(format_tree(self.tree, (0, *report.verdict.path)))
        self.hooks.tell(report)

    @rule()
    def break_off(self) -> None:
        """The iteration was interrupted, and the session goes on from its last token."""
        self._start(int(self.tree.token_ids[0]))


def _check_any_order(policy: Policy, max_examples: int) -> None:
    with _steady():
        machine: Any = partial(PolicyMachine, policy)  # hypothesis calls it like a class
        run_state_machine_as_test(
            machine,
            settings=hypothesis_settings(without_database(max_examples), stateful_step_count=40),
        )


def _check_prints_back(stack: str, max_examples: int) -> None:
    """`str(stack)` parses to an equal stack, whatever its parameters are."""

    @given(text=st.just(stack) | ours.other_parameters(stack))
    def prints_back(text: str) -> None:
        specs = parse_stack(text)
        again = parse_stack(format_stack(specs))
        if again != specs:
            raise AssertionError(f"'{text}' must parse to the stack that its canonical spelling does, got {again}")
        first = build_stack(text)
        second = build_stack(str(first))
        if str(first) != str(second) or _parameters(first) != _parameters(second):
            raise AssertionError(
                f"a stack must be built alike from its own spelling: '{text}' gave {_parameters(first)}, its spelling "
                f"'{first}' gave {_parameters(second)}"
            )

    _search(prints_back, max_examples)


def _parameters(stack: PolicyStack) -> dict[str, Any]:
    """Values for the parameters of each policy whose fields declare a range (`count`, `fraction`, `choice`)."""
    found: dict[str, Any] = {}
    for name, policy in stack.policies.items():
        kind: Any = type(policy)
        if attrs.has(kind):
            found[name] = {field.name: getattr(policy, field.name) for field in attrs.fields(kind) if field.init}
    return found


# drafters


@attrs.frozen
class _Round:
    """One iteration of a drafter: which proposed children the tree grows, and how the iteration ends."""

    picks: list[list[int]]  # one list a level: indices of the proposed children that the tree grows
    ending: str  # "commit", "rollback", or "break": interrupted in the iteration, then resumed
    node: int  # last node of the accepted path
    bonus: int


def _rounds(vocab_size: int) -> st.SearchStrategy[_Round]:
    return st.builds(
        _Round,
        picks=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), max_size=3),
        ending=st.sampled_from(["commit", "rollback", "break"]),
        node=st.integers(0, 9),
        bonus=st.integers(0, vocab_size - 1),
    )


class _Drafting:
    """A drafter's state in one generation, compared with new states that have seen committed tokens only."""

    def __init__(self, source: Drafter, plan: DraftPlan, prompt: list[int], k: int, is_compared: bool) -> None:
        self.source, self.plan, self.k, self.is_compared = source, plan, k, is_compared
        self.committed_ids = torch.tensor(prompt)
        self.state = self._fresh()

    def _fresh(self) -> DraftState:
        state = self.source.begin(self.plan)
        state.prefill(self.committed_ids[:-1])
        return state

    def play(self, rounds: list[_Round]) -> None:
        for number, played in enumerate(rounds):
            tree = self._drafted(played.picks)
            node = played.node % tree.num_nodes
            path = tuple(tree.ancestor_mask[node].nonzero().flatten().tolist()[1:])
            is_committed = played.ending == "commit"
            note(f"iteration {number}, then {played.ending}:\n{format_tree(tree, (0, *path) if is_committed else ())}")
            if is_committed:
                self.state.commit(path)
                new_ids = torch.tensor([*tree.token_ids[list(path)].tolist(), played.bonus])
                self.committed_ids = torch.cat([self.committed_ids, new_ids])
            else:
                self.state.rollback()
            if played.ending == "break":
                self.state.prefill(self.committed_ids[:-1])
        self._drafted([[0]])  # a last small tree, to see what the last ending has left behind

    def _drafted(self, picks: list[list[int]]) -> TokenTree:
        """Grow a tree of proposed children, and compare the proposals of each level with those of a new state."""
        tree = TokenTree.root(self.committed_ids[-1:].clone())
        fresh = self._fresh() if self.is_compared else None
        for level in picks:
            is_free = self.state.is_look_free(self.committed_ids, tree, self.k)  # the new state is not asked that
            proposals = self._proposed(self.state, tree)
            self._require(
                isinstance(is_free, bool) and (proposals.is_free or not is_free),
                "propose for free where is_look_free() has said that it would",
                f"{is_free} from is_look_free(), and is_free={proposals.is_free} of the Proposals",
            )
            if fresh is not None:
                self._compare(proposals, self._proposed(fresh, tree), tree)
            possible = (proposals.logprobs > -torch.inf).flatten().nonzero().flatten()
            if possible.numel() == 0:
                break
            chosen = possible[sorted({pick % possible.numel() for pick in level})]
            parents = tree.last_level.start + chosen // self.k
            tree = tree.grow(parents, proposals.token_ids.flatten()[chosen], proposals.logprobs.flatten()[chosen])
        return tree

    def _proposed(self, state: DraftState, tree: TokenTree) -> Proposals:
        """The proposals for the last level, whose shapes, dtypes and ranges are checked."""
        ids_before = self.committed_ids.clone()
        with _only_read(f"drafter '{self.source}'", tree):
            proposals = state.propose(self.committed_ids, tree, self.k)
        self._require(torch.equal(ids_before, self.committed_ids), "leave committed_ids as they are", "a change")
        self._require(isinstance(proposals, Proposals), "return Proposals", type(proposals).__name__)
        ids, logprobs = proposals.token_ids, proposals.logprobs
        shape = (tree.level_sizes[-1], self.k)
        for field, tensor, dtype in (("token_ids", ids, torch.int64), ("logprobs", logprobs, torch.float32)):
            self._require(
                tensor.dtype == dtype and tensor.shape == shape and tensor.device == self.plan.device,
                f"propose {field} of type {dtype} and shape {list(shape)} on {self.plan.device}",
                f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}",
            )
        self._require(
            bool((logprobs <= 1e-3).all()), "propose log-probabilities that are numbers of at most 0", logprobs
        )
        is_known = 0 <= int(ids.min()) <= int(ids.max()) < self.plan.vocab_size
        self._require(is_known, f"propose token ids from 0 to {self.plan.vocab_size - 1}", ids)
        is_descending = bool((logprobs[:, :-1] >= logprobs[:, 1:]).all())
        self._require(is_descending, "propose each node's best children first", logprobs)
        return proposals

    def _compare(self, kept: Proposals, fresh: Proposals, tree: TokenTree) -> None:
        """Fail unless two proposals are equal up to rounding; children with equal probabilities may be swapped."""
        is_close = torch.isclose(kept.logprobs, fresh.logprobs, rtol=1e-3, atol=1e-3)
        gaps = kept.logprobs[:, :-1] - kept.logprobs[:, 1:] < 1e-3
        end = torch.zeros(gaps.shape[0], 1, dtype=torch.bool)
        is_tied = torch.cat([gaps, end], dim=1) | torch.cat([end, gaps], dim=1)
        is_same = (kept.token_ids == fresh.token_ids) | is_tied | (kept.logprobs == -torch.inf)
        self._require(
            bool((is_close & is_same).all()),
            f"propose after {self.committed_ids.tolist()} what a fresh state does that was shown these tokens only, "
            f"for the last level of\n{format_tree(tree)}\nthat is\n{_shown(fresh)}\n(deterministic=False spares a "
            "drafter that draws random numbers)",
            f"\n{_shown(kept)}",
        )

    def _require(self, is_met: bool, what: str, got: object) -> None:
        if not is_met:
            raise AssertionError(f"drafter '{self.source}' must {what}, got {got}")


def _shown(proposals: Proposals) -> str:
    """The proposals as text: a line for each node, with its children and their probabilities."""
    rows = zip(proposals.token_ids.tolist(), proposals.logprobs.exp().tolist(), strict=True)
    return "\n".join(
        "  " + (", ".join(f"{token} p {prob:.3f}" for token, prob in zip(*row, strict=True) if prob > 0) or "nothing")
        for row in rows
    )


def _check_description(source: Drafter, target: nn.Module) -> None:
    """The drafter's own description (models, context limit, ...) has the right types and does not change."""
    models = source.models(target)
    if not (isinstance(models, Sequence) and all(isinstance(model, nn.Module) for model in models)):
        raise AssertionError(f"drafter '{source}' must return a sequence of modules from models, got {models!r:.200}")
    limit, device, price = source.context_limit(target), source.runs_on(target), source.price_class()
    for is_met, what, got in (
        (
            limit is None or (isinstance(limit, int) and limit > 0),
            "return None or a positive int from context_limit",
            limit,
        ),
        (device is None or isinstance(device, torch.device), "return a torch.device or None from runs_on", device),
        (isinstance(price, str), "return a string from price_class", price),
        ([*models] == [*source.models(target)], "return the same models each time", source.models(target)),
    ):
        if not is_met:
            raise AssertionError(f"drafter '{source}' must {what}, got {got!r:.200}")


# the suite of the pytest plugin: name of the property -> check of a stack's string or a drafter's name

POLICY_PROPERTIES: dict[str, Callable[[str, int], None]] = {
    "hook_contract": partial(_check_hooks, watch=_unwatched),
    "only_reads": _check_hooks,
    "any_order": _check_any_order,
    "independent_sessions": _check_independent_sessions,
    "capturable": _check_capturable,
    "recordable": _check_recordable,
    "prints_back": _check_prints_back,
    "lossless_alone": lambda stack, n: _check_lossless(cases(_drawn(stack)), n),
    "lossless_composed": lambda stack, n: _check_lossless(cases(_composed(stack)), n),
    "lossless_with_other_parameters": lambda stack, n: _check_lossless(cases(ours.other_parameters(stack)), n),
    "lossless_at_tight_limits": lambda stack, n: _check_lossless(cases(_drawn(stack), limits=ours.tight_limits), n),
}

DRAFTER_PROPERTIES: dict[str, Callable[[str, int], None]] = {
    "proposals": lambda name, n: assert_drafter_contract(name, deterministic=False, max_examples=n),
    "commit_and_rollback": lambda name, n: assert_drafter_contract(name, max_examples=n),
    "lossless": lambda name, n: assert_lossless(ours.stacks(), drafter=name, max_examples=n),
}
