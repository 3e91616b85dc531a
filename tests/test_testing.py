"""The conformance kit finds what is wrong with a policy or a drafter, and says it so that one can see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Hashable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import find
from hypothesis.errors import NoSuchExample
from hypothesis.stateful import run_state_machine_as_test
from test_docs import DOCS, blocks, first_words, install, table

from dynatree_core import (
    Drafter,
    DraftPlan,
    DraftState,
    Frontier,
    PluginSpec,
    PolicyStack,
    Proposals,
    StepReport,
    TokenTree,
    choice,
    count,
    fraction,
    hookimpl,
    testing,
)
from dynatree_core.advice import pip_install
from dynatree_core.errors import ParameterError, PolicyError
from dynatree_core.plugins import registry as plugins
from dynatree_core.testing import (
    PolicyMachine,
    assert_drafter_contract,
    assert_hook_contract,
    assert_lossless,
    format_tree,
    pytest_plugin,
)
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.conformance import DRAFTER_PROPERTIES, POLICY_PROPERTIES
from dynatree_core.testing.models import VOCAB, tiny_model

PAGE = DOCS / "testing.md"

# policies, each wrong in one way


class WrongShape:
    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        return torch.ones(max(frontier.width, 2), dtype=torch.int64)  # one node alone gets an answer for two


class NotANumber:
    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        return frontier.confidence / frontier.confidence  # NaN where the drafter proposes nothing


class Negative:
    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        return (frontier.confidence * 4).long() - 1


class TooWide:
    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 2 if frontier.depth else 99


class Writes:
    """Lets every node see every other."""

    @hookimpl
    def keep_nodes(self, tree: TokenTree) -> None:
        tree.ancestor_mask.fill_(True)


class WritesProposals:
    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        frontier.top_logprobs.clamp_(min=-1.0)
        return True


class WritesConfidence:
    """What all policies of a stack see of the level is one tensor."""

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return bool((frontier.confidence.mul_(0.1) > 0.01).all())


class RaisesAtTheEnd:
    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        if report.verdict.stop_reason is not None:
            raise RuntimeError("the end")


class SharedLate:
    """Its state is the class's once it has seen five iterations."""

    seen: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.num_seen = 0

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 1 + len(self.seen) % 3

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        self.num_seen += 1
        if self.num_seen > 5:
            self.seen.append(report.num_accepted)


class WantsTheBonus:
    """Where nothing has stopped there is a token behind the accepted ones."""

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        if report.verdict.stop_reason is None:
            assert len(report.token_ids) == report.num_accepted + 1


class Shared:
    """Its state is the class's, and so every session's."""

    seen: ClassVar[list[int]] = []

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 1 + len(self.seen) % 3

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        self.seen.append(report.num_accepted)


class Unseeded:
    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        return torch.randint(0, 9, (frontier.width,))


class RaisesLate:
    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        if report.iteration == 2:
            raise RuntimeError("late")


class RaisesDeep:
    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        if frontier.depth == 2:
            raise RuntimeError("deep")
        return True


HOOK_FAULTS = [
    (
        WrongShape(),
        "policy 'wrong_shape', hook branch_factor: must return an int, None or a torch.int64 tensor of shape",
    ),
    (NotANumber(), "policy 'not_a_number', hook branch_factor: must return .* got torch.float32 of shape"),
    (Negative(), "policy 'negative', hook branch_factor: a branch factor must be from 0 to max_branch=16, got -1 to"),
    (TooWide(), "policy 'too_wide', hook branch_factor: .* from 0 to max_branch=16, got 99"),
    (Writes(), "hook keep_nodes must only read what it is shown, but wrote to tree.ancestor_mask; clone"),
    (WritesProposals(), "hook should_expand must only read what it is shown, but wrote to proposals.logprobs"),
    (WritesConfidence(), "hook should_expand must only read what it is shown, but wrote to frontier.confidence"),
    (RaisesAtTheEnd(), "policy 'raises_at_the_end', hook on_iteration_end: raised RuntimeError: the end"),
    (RaisesLate(), "policy 'raises_late', hook on_iteration_end: raised RuntimeError: late"),
    (RaisesDeep(), "policy 'raises_deep', hook should_expand: raised RuntimeError: deep"),
]


def _contract(policy: object, max_examples: int) -> None:
    assert_hook_contract(policy, max_examples=max_examples)


def name_of(subject: object) -> str | None:
    return None if isinstance(subject, str) else type(subject).__name__


def nodes_shown(error: BaseException) -> list[str]:
    """The lines of trees in the notes."""
    return re.findall(r"^[* ] +\d+: token \d+.*$", "\n".join(error.__notes__), re.M)


@pytest.mark.parametrize(("policy", "message"), HOOK_FAULTS, ids=name_of)
def test_the_hook_contract_finds(policy, message):
    with pytest.raises((PolicyError, AssertionError), match=message) as caught:
        assert_hook_contract(policy)
    most_nodes = {"RaisesLate": 3, "RaisesDeep": 3, "Writes": 2}.get(type(policy).__name__, 1)
    assert len(nodes_shown(caught.value)) <= most_nodes  # it shrank to what is needed


@pytest.mark.parametrize(
    ("policy", "message"), [f for f in HOOK_FAULTS if not isinstance(f[0], TooWide | RaisesDeep)], ids=name_of
)
def test_any_order_finds(policy, message):
    with pytest.raises((PolicyError, AssertionError), match=message):
        POLICY_PROPERTIES["any_order"](policy, 100)


@pytest.mark.parametrize("policy", [Shared(), SharedLate(), Unseeded()], ids=name_of)
@pytest.mark.parametrize("check", [POLICY_PROPERTIES["independent_sessions"], _contract])
def test_state_outside_the_session_is_found(check, policy):
    with pytest.raises(AssertionError) as caught:
        check(policy, 100)
    # what hypothesis can repeat is a difference, what it cannot is called unsteady
    assert re.search("must share no state|must give the same outcome each time", str(caught.value))


def test_the_lossless_check_finds_a_tree_that_was_written_to():
    with pytest.raises(AssertionError, match="the output must be the target's own text: at token") as caught:
        assert_lossless(["fixed(branch=3,tau=0.0)", Writes()])
    said = str(caught.value)
    expected, got = (
        [int(token) for token in re.search(rf"^{word}: *\[(.*)\]$", said, re.M)[1].split(",")]
        for word in ("expected", "got")
    )
    place, wanted, came = re.search(r"at token (\d+) expected (\w+), got (\w+)", said).groups()
    assert expected[: int(place)] == got[: int(place)]
    assert [str(expected[int(place)]), str(got[int(place)])] == [wanted, came]
    assert re.search(r"^stack: .*fixed\(branch=3,tau=0\.0\)\+writes", said, re.M)
    assert re.search(r"^drafter: +\S", said, re.M)
    assert re.search(r"The step that went wrong, iteration \d+, accepted the path \[.*\] and committed", said)
    assert re.search(r"^\* 0: token \d+ \(root\)$", said, re.M)
    assert "generate(tiny_model(" in "\n".join(caught.value.__notes__)  # how to run it again


def test_the_lossless_check_composes_and_so_finds_what_only_shows_beside_others():
    class Jealous:
        @hookimpl
        def on_iteration_end(self, report: StepReport, stack) -> None:
            if len(stack.policies) > 2:
                raise RuntimeError("I am not alone")

    with pytest.raises(
        PolicyError, match="policy 'jealous', hook on_iteration_end: raised RuntimeError: I am not alone"
    ):
        assert_lossless(Jealous())
    POLICY_PROPERTIES["lossless_alone"](Jealous(), 10)


def test_what_is_right_passes():
    assert_hook_contract(["fixed", ours.HostilePolicy(3)], max_examples=30)
    assert_hook_contract(WantsTheBonus(), max_examples=30)
    assert_lossless(ours.hostile_policies, max_examples=20)
    run_state_machine_as_test(lambda: PolicyMachine(ours.HostilePolicy(3)))


# policies that a graph may repeat


@attrs.define
class Recordable:
    """Two children where the drafter is sure enough of the best one: two nodes more for each sure one."""

    least: float = fraction(0.5)

    is_capturable: ClassVar = True
    is_recordable: ClassVar = True

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        return 1 + (frontier.confidence >= self.least).long()


@attrs.define
class Moves:
    """Moves the parameter of the one beside it."""

    is_capturable: ClassVar = True

    @hookimpl
    def on_iteration_end(self, report: StepReport, stack: PolicyStack) -> None:
        one = stack.find("recordable") or stack.find("reads_its_parameter")
        one.least = 0.9 - one.least if report.iteration % 2 else 0.4


@attrs.define
class Learns(Recordable):
    """Follows what it has learnt, and says so."""

    num_missed: int = attrs.field(default=0, init=False)

    @property
    def graph_key(self) -> Hashable:
        return min(self.num_missed, 2)

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return self.num_missed < 2

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        self.num_missed += report.num_accepted == 0


class LearnsInSecret(Learns):
    graph_key = None


class CountsItsCalls(Recordable):
    """What it has learnt comes from hooks that nobody calls when a graph is repeated."""

    num_calls = 0

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        self.num_calls += 1
        return 1 + self.num_calls % 2


class FollowsTheIteration(Recordable):
    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return frontier.iteration % 2 == 0


class FollowsCosts(Recordable):
    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return frontier.costs.drafter_level_seconds(1) < frontier.costs.target_pass_seconds(1)


class ReadsItsParameter(Recordable):
    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return self.least > 0.45


class ReadsNumbers(Recordable):
    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return bool(frontier.cum_logprob.sum() > -9)


class CountsPadding(Recordable):
    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        return 1 + (frontier.confidence >= frontier.confidence.mean()).long()


class HasAListAsKey(Recordable):
    graph_key: ClassVar = []


class IsNoAttrsClass:
    is_capturable = is_recordable = True

    def __init__(self, branch: int) -> None:
        self.branch = branch

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return self.branch


BROKEN_PROMISES = [
    (
        LearnsInSecret(),
        r"graph_key alone, .* or leave is_recordable out\nstack: .*\nrecorded: iteration \d+, graph_key",
    ),
    (CountsItsCalls(), "repeats other answers; .* an earlier call has left"),
    (FollowsTheIteration(), "repeats other answers; let what else they follow from .frontier.iteration"),
    (FollowsCosts(), "repeats other answers; .* costs"),
    (
        [ReadsItsParameter(), Moves()],
        r"here reads_its_parameter\.least, but policy 'reads_its_parameter', hook should_expand",
    ),
    (
        ReadsNumbers(),
        "is_capturable must not read a tensor's numbers on the host, got a call of __bool__; answer with a",
    ),
    (HasAListAsKey(), r"policy 'has_a_list_as_key' .* its graph_key must be hashable, got \[\] \(list\); a tuple is"),
    (
        IsNoAttrsClass(2),
        "must be an attrs class whose parameters are numbers and strings, got IsNoAttrsClass, .* make it",
    ),
]


@pytest.mark.parametrize(("policy", "message"), BROKEN_PROMISES, ids=name_of)
def test_promises_of_policies_that_a_graph_repeats_are_checked(policy, message):
    with pytest.raises((PolicyError, AssertionError), match=f"(?s){message}"):
        POLICY_PROPERTIES["recordable"](policy, 100)


def test_the_hook_contract_has_the_promises_in_it():
    with pytest.raises(AssertionError, match="a graph that an earlier iteration has recorded"):
        assert_hook_contract(LearnsInSecret(), max_examples=40)


def test_a_promise_that_depends_on_padding_is_found_before_a_graph_repeats_it():
    with pytest.raises(AssertionError, match="must not depend on padding"):
        assert_hook_contract(CountsPadding(), max_examples=40)


@pytest.mark.parametrize("policy", [Recordable(), [Recordable(), Moves()], Learns()], ids=["alone", "moved", "learns"])
def test_promises_that_are_kept_pass(policy):
    assert_hook_contract(policy, max_examples=20)


# drafters


@attrs.frozen(slots=False)
class Frequency(Drafter):
    """Proposes the tokens that occurred most often in the text so far, drafted nodes included; wrong where told."""

    fault: str = ""

    def start(self, plan: DraftPlan) -> DraftState:
        return FrequencyState(plan.vocab_size, self.fault)


class FrequencyState(DraftState):
    def __init__(self, vocab_size: int, fault: str) -> None:
        self.vocab_size, self.fault = vocab_size, fault
        self.drafted = torch.zeros(vocab_size)

    def prefill(self, committed_ids: torch.Tensor) -> None:
        pass

    def propose(self, committed_ids: torch.Tensor, tree: TokenTree, k: int) -> Proposals:
        level = tree.token_ids[tree.last_level]
        if tree.max_depth:
            self.drafted[level] += 1
        counts = torch.bincount(committed_ids, minlength=self.vocab_size) + self.drafted
        top = (counts / (counts.sum() + 1)).topk(k, sorted=True)
        # among equals the smaller id, so that the order is one
        ids, logprobs = top.indices.expand(level.numel(), k).clone(), top.values.log().expand(level.numel(), k).clone()
        match self.fault:
            case "ids":
                ids[:, -1] = self.vocab_size
            case "order":
                logprobs = logprobs.flip(1)
            case "dtype":
                logprobs = logprobs.double()
            case "shape":
                ids = ids[:1]
            case "nan":
                logprobs = logprobs * 0
            case "tree":
                tree.logprob.zero_().sub_(1)
            case "committed":
                committed_ids[0] = 0 if committed_ids[0] else 1
        return Proposals(ids, logprobs)

    def is_look_free(self, committed_ids: torch.Tensor, tree: TokenTree, k: int) -> bool:
        return self.fault == "free"

    def commit(self, draft_path: tuple[int, ...]) -> None:
        if self.fault != "commit":
            self.drafted.zero_()

    def rollback(self) -> None:
        if self.fault != "rollback":
            self.drafted.zero_()


DRAFTER_FAULTS = [
    ("ids", rf"drafter 'Frequency\(fault='ids'\)' must propose token ids from 0 to {VOCAB - 1}, got tensor"),
    ("order", "must propose each node's best children first"),
    ("dtype", "must propose logprobs of type torch.float32 .* got torch.float64"),
    (
        "shape",
        r"must propose token_ids of type torch.int64 and shape \[2, \d\] on cpu, got .* of shape \[1, \d\]",
    ),
    ("nan", "must propose log-probabilities that are numbers of at most 0"),
    ("tree", r"drafter 'Frequency\(fault='tree'\)' must only read what it is shown, but wrote to tree.logprob"),
    ("committed", "must leave committed_ids as they are"),
    ("free", "must propose for free where is_look_free.. has said that it would, got True from .* is_free=False"),
    ("rollback", "must propose after .* what a fresh state does"),
    ("commit", "must propose after .* what a fresh state does"),
]


@pytest.mark.parametrize(("fault", "message"), DRAFTER_FAULTS, ids=[fault for fault, _ in DRAFTER_FAULTS])
def test_the_drafter_contract_finds(fault, message):
    with pytest.raises(AssertionError, match=message) as caught:
        assert_drafter_contract(Frequency(fault))
    assert len(nodes_shown(caught.value)) <= 8


def test_drafters_that_keep_to_it():
    assert_drafter_contract(Frequency())
    assert_drafter_contract(ours.HostileDrafter(3), deterministic=False)
    with pytest.raises(AssertionError, match="deterministic=False spares"):
        assert_drafter_contract(ours.HostileDrafter(3))


# drawing parameters


def test_parameters_are_drawn_from_the_range_that_they_declare():
    @attrs.define
    class Tuned:
        size: int = count(3)
        few: int = count(3, minimum=2, maximum=4)
        many: int = count(40, minimum=30)
        share: float = fraction(0.3)
        kind: str = choice("a", ("a", "b"))
        flag: bool = False
        path: str = "unknown to anyone"

    drawn = ours.parameters(Tuned)
    assert set(drawn) == {"size", "few", "many", "share", "kind", "flag"}
    for name, wanted in [
        ("size", 1), ("size", 12), ("few", 2), ("few", 4), ("many", 30), ("share", 1.0), ("share", 0.0),
        ("kind", "b"), ("flag", True),
    ]:  # fmt: skip
        assert find(drawn[name], lambda value, wanted=wanted: value == wanted) == wanted
    for name, allowed in [("size", range(1, 13)), ("few", range(2, 5)), ("many", range(30, 34)), ("kind", "ab")]:
        with pytest.raises(NoSuchExample):
            find(drawn[name], lambda value, allowed=allowed: value not in allowed)


def test_values_that_do_not_go_together_are_not_drawn(monkeypatch):
    @attrs.define
    class Ordered:
        low: int = count(1)
        high: int = count(2)

        def __attrs_post_init__(self) -> None:
            if self.low > self.high:
                raise ParameterError("low must not exceed high")

        @hookimpl
        def branch_factor(self, frontier: Frontier) -> int:
            return self.low

    monkeypatch.setattr("dynatree_core.plugins.registry.load_plugin", lambda group, name: Ordered)
    monkeypatch.setattr(ours, "load_plugin", lambda group, name: Ordered)
    spec = find(ours.policy_specs("fixed"), lambda spec: spec.parameters.get("low", 1) > 2)
    assert spec == PluginSpec("fixed", None, {"low": 3, "high": 3})


def test_a_package_that_is_wrong_spoils_no_other_test(monkeypatch):
    """What cannot be made stands in no stack that is drawn, with a warning."""
    found = {**plugins.plugin_table(plugins.POLICIES)}
    found["broken"] = [EntryPoint("broken", "no_such_module:C", plugins.POLICIES)]
    monkeypatch.setattr(ours, "plugin_table", lambda group: found if group == plugins.POLICIES else {})
    monkeypatch.setattr(plugins, "plugin_table", lambda group: found if group == plugins.POLICIES else {})
    with pytest.warns(RuntimeWarning, match="'broken' stands in no stack that is drawn: .*cannot be imported"):
        names = ours.policy_names()
    assert "fixed" in names
    assert "broken" not in names
    assert ours.presets() == []


@pytest.mark.parametrize("family", ["llama", "mixtral", "falcon"])
def test_a_tiny_model_is_the_same_whatever_the_default_dtype_is(family):
    expected = tiny_model.__wrapped__(family).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = tiny_model.__wrapped__(family).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())


def test_presets_come_with_their_variants():
    assert {"phase1", "phase1:plan", "phase3:plan"} <= set(ours.presets())


# trees as text


def test_format_tree():
    tree = TokenTree.root(torch.tensor([7]))
    tree = tree.grow(torch.tensor([0, 0]), torch.tensor([3, 4]), torch.tensor([0.5, 0.25]).log())
    tree = tree.grow(torch.tensor([1]), torch.tensor([9]), torch.tensor([1.0]).log())
    assert format_tree(tree, accepted=(1, 3)).splitlines() == [
        "* 0: token 7 (root)",
        "*   1: token 3, p 0.500",
        "*     3: token 9, p 1.000",
        "    2: token 4, p 0.250",
    ]
    assert "*" not in format_tree(tree)
    tree.parent[3] = 3  # damage is shown, not followed
    assert format_tree(tree).splitlines()[-1] == "  3: token 9, p 1.000"


# what it needs


def in_python(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Like at a terminal of 80 columns: pytest does not shorten its lines where it finds itself in a CI."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment | {"COLUMNS": "80"},
    )


@pytest.mark.slow
def test_pytest_without_our_options_loads_no_torch(tmp_path):
    (tmp_path / "test_empty.py").write_text(
        "import sys\n\ndef test_nothing_is_loaded():\n"
        "    assert 'dynatree_core.testing.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = in_python("import pytest, sys; sys.exit(pytest.main(['-q']))", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_without_hypothesis_the_kit_says_what_to_install(tmp_path):
    program = """
import sys

from importlib.machinery import PathFinder

# find nothing, rather than raise: torch asks whether there is one
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name == "hypothesis" else find(name, path, target)
try:
    from dynatree_core.testing import assert_lossless
except ModuleNotFoundError as error:
    print(error)
from dynatree_core.testing import format_tree, models
import pytest
# plain asserts: pytest rewrites hypothesis otherwise, and finds it by itself
sys.exit(pytest.main(["-p", "no:hypothesispytest", "--assert=plain", "--dynatree-policy", "fixed"]))
"""
    done = in_python(program, cwd=tmp_path)
    hint = f"needs hypothesis, which is not installed: {pip_install('dynatree[testing]')}"
    assert f"dynatree_core.testing.assert_lossless {hint}" in done.stdout
    assert hint in done.stderr
    assert (done.returncode, "Traceback" in done.stderr) == (4, False)


# the pytest plugin


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The policy that docs/testing.md shows, installed for other processes."""
    files = {"toml": "pyproject.toml", "python": "plausible.py"}
    shown = [block for block in blocks(PAGE) if "plausible" in block.text.lower()]
    install({files[b.language]: b.text for b in shown if b.language in files}, tmp_path / "site")
    search_path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", search_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def in_pytest(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return in_python("import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", *arguments, cwd=cwd)


@pytest.mark.slow
def test_the_plugin_fails_the_way_the_docs_show(site):
    """In an empty folder; word for word, since what is shown there is the smallest counterexample."""
    chosen = "hook_contract or prints_back"
    done = in_pytest("-q", "--hypothesis-seed=0", "--dynatree-policy", "plausible", "-k", chosen, cwd=site)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    said = re.sub(r" in [\d.]+s\n", "\n", done.stdout).replace("Falsifying example", "Failing test case")
    [shown] = [block.text for block in blocks(PAGE) if "= FAILURES =" in block.text]
    assert said == shown


@pytest.mark.slow
def test_the_plugin_reports_each_property(site):
    options = ["--dynatree-policy", "fixed+plausible", "--dynatree-policy", "fixed(depth=3)"]
    options += ["--dynatree-drafter", "prompt_lookup", "--dynatree-examples", "3"]
    done = in_pytest("-rA", *options, "-k", "not lossless", cwd=site)
    passed = set(re.findall(r"^PASSED dynatree::(\S+)", done.stdout, re.M))
    failed = set(re.findall(r"^FAILED dynatree::(\S+)", done.stdout, re.M))
    of_policies, of_drafters = (
        [title for title in titles if "lossless" not in title] for titles in (POLICY_PROPERTIES, DRAFTER_PROPERTIES)
    )
    assert passed >= {f"{title}[fixed(depth=3)]" for title in of_policies} | {"prints_back[fixed+plausible]"}
    assert passed >= {f"{title}[prompt_lookup]" for title in of_drafters}
    assert {"hook_contract[fixed+plausible]"} <= failed <= {f"{title}[fixed+plausible]" for title in of_policies}
    assert len(passed) + len(failed) == 2 * len(of_policies) + len(of_drafters)
    assert f"collected {2 * len(POLICY_PROPERTIES) + len(DRAFTER_PROPERTIES)} items" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_an_unknown_name_is_a_mistake_of_the_command_line(tmp_path):
    done = in_pytest("--dynatree-policy", "phas3", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--dynatree-policy: 'phas3' is not an installed policy or preset (did you mean 'phase3'?)" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dynatree-policy", ["fixed(dept=3)"], "no parameter 'dept'.*did you mean 'depth'"),
        ("--dynatree-policy", ["fixed", "fixed("], "--dynatree-policy: .*cannot read 'fixed\\('"),
        ("--dynatree-drafter", ["prompt_lokup"], "--dynatree-drafter: 'prompt_lokup'.*did you mean 'prompt_lookup'"),
        ("--dynatree-examples", 0, "--dynatree-examples must be at least 1"),
    ],
)
def test_other_mistakes_of_the_command_line(option, value, message):
    options = {"--dynatree-policy": [], "--dynatree-drafter": [], "--dynatree-examples": 50, option: value}
    with pytest.raises(pytest.UsageError, match=message):
        pytest_plugin.pytest_configure(SimpleNamespace(getoption=options.get))


def test_the_docs_list_every_property_option_and_name():
    for header, wanted in [
        (("property of a stack", "holds when"), set(POLICY_PROPERTIES)),
        (("property of a drafter", "holds when"), set(DRAFTER_PROPERTIES)),
    ]:
        assert set(first_words(table(PAGE, *header))) == wanted
    shown = {word.partition("(")[0] for word in first_words(table(PAGE, "name", "asserts or does"))}
    assert shown == set(testing.__all__)
    strategies = {word.partition("(")[0] for word in first_words(table(PAGE, "strategy", "draws"))}
    assert strategies <= set(ours.__all__)
