"""What an iteration asks of a GPU and of its host outside the models' passes, counted on a pretended device.

Each wait of the host leaves a GPU idle for as long as the host needs to give it the next work, and small kernels take
the host longer to launch than the GPU to run. What is counted here bounds both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pretended_device
import pytest
import torch
from pretended_device import PASSES, Counts, PretendedDevice, by_stage, moved, pretended

from dynatree_bench.data.synthetic import Shape, synthetic_pair
from dynatree_core import CostModel, Engine, Frontier, Observer, Session, generate, hookimpl
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.cost_model import StepFunction
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine import costs
from dynatree_core.errors import PolicyError
from dynatree_core.generation import run
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import Passes
from dynatree_core.testing.models import VARIANTS, tiny_variant
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.padded import _HeardLate, write_plainly
from dynatree_core.tree.token_tree import TokenTree

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a device is pretended where there is none")

WARM_UP, WARM_UP_RECORDED, MEASURED = 6, 12, 8  # iterations
# a pass of 2.4 ms whatever its rows, and a level of 0.45 ms: trees of up to 16 nodes cost hardly more than a step
COSTS = CostModel(
    StepFunction((1, 8, 16, 32, 64), (2.4e-3, 2.45e-3, 2.5e-3, 2.6e-3, 2.8e-3)),
    StepFunction((1, 8, 32), (0.45e-3, 0.46e-3, 0.5e-3)),
    0.2e-3,
)
STACKS = {
    "fixed": "fixed(depth=5,branch=2,max_nodes=16,tau=0.02)",
    "phase3": "phase3",
    "best_first": "best_first(nodes=16,depth=5)",
    "sequoia": "sequoia(nodes=16,depth=5,size='full')",
    "cost_aware": "cost_aware(max_nodes=16,max_depth=5)",
    "best_first that reads": "best_first(nodes=16,depth=5,min_gain=0.2)",
    "autoregressive": "autoregressive",
}


@attrs.frozen
class Measured:
    counts: Counts
    num_iterations: int
    trees: list[tuple[int, ...]]  # nodes by level
    token_ids: list[int]  # of the whole text so far
    idle_seconds: float  # of the device, by the pretended clock

    @property
    def num_levels(self) -> float:
        """That trees have, an iteration."""
        return sum(len(sizes) - 1 for sizes in self.trees) / self.num_iterations

    @property
    def launches(self) -> float:
        return self.counts.num_launches() / self.num_iterations

    @property
    def waits(self) -> float:
        return self.counts.num_waits() / self.num_iterations

    @property
    def copies(self) -> float:
        return self.counts.num_copies() / self.num_iterations


def pair_that_repeats(num_layers: int = 4) -> Any:
    """Models whose text goes round after 80 tokens, so that looking it up finds something."""
    target = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    target |= {"vocab_size": 80, "max_position_embeddings": 512, "num_hidden_layers": num_layers}
    return synthetic_pair(Shape(target, {**target, "num_hidden_layers": 1}), acceptance=0.75, num_choices=16)


def measured(
    stack: str,
    drafter: str,
    num_layers: int = 4,
    runner: str = "eager",
    prompt: list[int] | None = None,
    observer: Observer | None = None,
) -> Measured:
    pair = pair_that_repeats(num_layers)
    with pretended() as device:
        target, model = moved(pair.target), moved(pair.drafter)
        made: Any = {
            "model": lambda: ModelDrafter(model),
            "prompt_lookup": PromptLookupDrafter,
            "union": lambda: UnionDrafter([ModelDrafter(model), PromptLookupDrafter()]),
            "none": lambda: None,
        }[drafter]()
        session = Session(
            target, made, prompt or pair.source.text(0, 100), policy=STACKS[stack], max_new_tokens=200, eos_token_id=[],
            inherit_settings=False, runner=runner, costs=COSTS, trust_model=True, observer=observer,
        )  # fmt: skip
        steps = run(session)
        for _ in range(WARM_UP if runner == "eager" else WARM_UP_RECORDED):
            next(steps)
        idle = device.idle_seconds
        with by_stage(device), device.counting() as counts:
            trees = [next(steps).tree.level_sizes for _ in range(MEASURED)]
        idle = device.idle_seconds - idle
        steps.close()  # type: ignore[attr-defined]
    return Measured(counts, MEASURED, trees, session.new_token_ids, idle)


# an iteration at most: waits for each level that a tree has, other waits, launches
LIMITS = {
    ("autoregressive", "none"): (0, 1, 10),
    # padded trees: the host reads the verdict and nothing else
    ("fixed", "model"): (0, 1, 61),
    ("phase3", "model"): (0, 1, 129),  # of its 8 levels one behind an empty one, since the host is ahead of the device
    ("best_first", "model"): (0, 1, 137),
    ("sequoia", "model"): (0, 1.4, 92),  # and sometimes what it has counted, to plan anew
    # padded trees, at whose root the host decides whether the model is asked
    ("fixed", "union"): (0, 2, 111),
    ("phase3", "union"): (0, 2, 188),
    # trees on the host, which reads what a model proposes for a level, and what is copied from the text without asking
    ("cost_aware", "model"): (1, 1, 31),
    ("cost_aware", "union"): (0, 1, 8),
    ("best_first that reads", "model"): (1, 1, 54),
    ("fixed", "prompt_lookup"): (0, 1, 8),
    ("phase3", "prompt_lookup"): (0, 1, 8),
}


@pytest.mark.parametrize(("stack", "drafter"), LIMITS)
def test_what_an_iteration_asks_outside_passes_stays_within_its_limits(stack: str, drafter: str) -> None:
    of_a_level, others, launches = LIMITS[stack, drafter]
    found = measured(stack, drafter)
    assert found.waits <= of_a_level * found.num_levels + others, found.counts.waits
    assert found.launches <= launches, found.counts.launches
    assert found.copies < 0.5, found.counts.waits  # once in a while, as when a plan is made anew


def test_without_triton_torch_writes_the_same_trees_by_more_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = measured("phase3", "model")
    monkeypatch.setattr(PretendedDevice, "write_level", staticmethod(write_plainly))
    plain = measured("phase3", "model")
    assert fused.launches < plain.launches <= 220
    assert (plain.trees, plain.token_ids) == (fused.trees, fused.token_ids)


@pytest.mark.parametrize("observer", [None, Observer()], ids=["on the host", "on the device"])
@pytest.mark.parametrize("drafter", ["model", "union"])
def test_a_policy_that_reads_grows_the_trees_of_a_cpu(drafter: str, observer: Observer | None) -> None:
    found, pair = measured("cost_aware", drafter, observer=observer), pair_that_repeats()
    model = ModelDrafter(pair.drafter)
    session = Session(
        pair.target, model if drafter == "model" else UnionDrafter([model, PromptLookupDrafter()]),
        pair.source.text(0, 100), policy=STACKS["cost_aware"], max_new_tokens=200, eos_token_id=[],
        inherit_settings=False, runner="eager", costs=COSTS, trust_model=True,
    )  # fmt: skip
    steps = run(session)
    trees = [next(steps).tree.level_sizes for _ in range(WARM_UP + MEASURED)]
    assert found.trees == trees[WARM_UP:]
    assert len({*trees}) > 1
    assert found.token_ids == session.new_token_ids


class Unmarked:
    """Promises nothing, so it may hold tensors of the models' device."""

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 1


@pytest.mark.parametrize(
    ("policy", "drafter", "options", "expected"),
    [
        ("cost_aware", "model", {}, "cpu"),
        ("best_first(min_gain=0.1)+phase3", "model", {}, "cpu"),
        ("phase3", "prompt_lookup", {}, "cpu"),
        ("phase3", "model", {}, "cuda"),
        (["cost_aware", Unmarked()], "model", {}, "cuda"),
        (["phase3", Unmarked()], "prompt_lookup", {}, "cuda"),
        ("cost_aware", "model", {"observer": Observer()}, "cuda"),
        ("cost_aware", None, {}, "cuda"),
    ],
)
def test_trees_grow_where_they_are_read(policy: Any, drafter: str | None, options: Any, expected: str) -> None:
    """Only if all policies take the device from what they are shown."""
    pair = pair_that_repeats(1)
    with pretended():
        made: Any = ModelDrafter(moved(pair.drafter)) if drafter == "model" else drafter
        session = Session(
            moved(pair.target),
            made,
            [1, 2, 3],
            policy=policy,
            max_new_tokens=9,
            costs=COSTS,
            trust_model=True,
            **options,
        )
        assert session.tree_ids.device.type == expected
        assert session.tree_ids.tolist() == session.committed_ids.tolist() == [1, 2, 3]


def test_sequences_whose_trees_grow_on_the_host_and_on_the_device_share_passes() -> None:
    """Some are level by level on the device, where they are rehearsed, some padded."""
    policies = ["cost_aware", "phase3", "best_first(min_gain=0.1)", "fixed(depth=3)"]

    def outcomes(pair: Any) -> list[object]:
        drafter = UnionDrafter([ModelDrafter(pair.drafter), PromptLookupDrafter()])
        engine = Engine(pair.target, drafter, runner="eager", costs=COSTS, trust_model=True)
        prompts = [pair.source.text(place, 60 + place) for place in range(len(policies))]
        handles = [
            engine.submit(prompt, policy=policy, max_new_tokens=16, eos_token_id=[])
            for prompt, policy in zip(prompts, policies, strict=True)
        ]
        results = [handle.result() for handle in handles]
        return [(one.token_ids, [step.num_drafted for step in one.report.steps]) for one in results]

    expected = outcomes(pair_that_repeats(1))
    with pretended():
        pair = pair_that_repeats(1)
        assert outcomes(attrs.evolve(pair, target=moved(pair.target), drafter=moved(pair.drafter))) == expected


@attrs.define
class Misstating:
    """Says of the children which its widths lead to that they are so many, or in these places."""

    number: int
    places: torch.Tensor | None

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        widths = torch.ones_like(frontier.token_ids)
        frontier.note_children(widths, self.number, places=self.places)
        return widths


@pytest.mark.parametrize(
    ("number", "places", "message"),
    [(2, None, "got 1 where it says 2"), (1, torch.tensor([1]), r"got \[0\] where it says \[1\]")],
    ids=["number", "places"],
)
def test_what_a_policy_says_wrongly_of_its_children_is_refused_on_a_cpu(
    number: int, places: torch.Tensor | None, message: str
) -> None:
    pair, policy = pair_that_repeats(), Misstating(number, places)
    options: Any = {"max_new_tokens": 5, "tau": 0.0, "on_error": "raise", "trust_model": True}
    with pytest.raises(PolicyError, match=f"'misstating', hook branch_factor: .* note_children, {message}"):
        generate(pair.target, pair.drafter, [1, 2, 3], policy=["linear(depth=1)", policy], **options)


@attrs.define
class Clamping:
    """Asks another policy, and wants less."""

    other: Any

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        self.other.branch_factor(frontier)
        return torch.zeros_like(frontier.token_ids).index_fill_(0, torch.tensor([0]), 1)


def test_what_is_noted_of_an_answer_counts_for_no_other() -> None:
    pair = pair_that_repeats()
    options: Any = {"max_new_tokens": 5, "tau": 0.0, "on_error": "raise", "trust_model": True}
    found = generate(
        pair.target, pair.drafter, [1, 2, 3], policy=["linear(depth=2)", Clamping(Misstating(2, None))], **options
    )
    assert found.report.num_drafted_nodes > 0


def test_reading_what_is_known_asks_no_drafter() -> None:
    def asked() -> Proposals:
        raise AssertionError("a policy that reads paths has not looked at proposals")

    frontier = Frontier(TokenTree.root(torch.tensor([3])), 0, 8, 4, asked)
    assert frontier.read(frontier.cum_logprob) == [[0.0]]
    assert not frontier.is_drafter_asked


@pytest.mark.parametrize("stack", ["fixed", "phase3"])
def test_a_union_reads_once_a_tree_whether_its_text_is_copied_or_new(stack: str) -> None:
    """In a text of tokens that have not come before, nothing is found and the model is asked about each level."""
    copied, new = measured(stack, "union"), measured(stack, "union", prompt=[5])
    assert copied.waits == 2
    assert copied.counts.launches[PASSES] < new.counts.launches[PASSES]
    assert new.waits <= 2.5, new.counts.waits  # a token that has come once before may be the beginning of something


@pytest.mark.parametrize("stack", ["fixed", "phase3", "best_first"])
def test_a_recorded_step_is_two_launches_and_what_moves_numbers_in_and_out(stack: str) -> None:
    found = measured(stack, "model", runner="cudagraph")
    assert found.launches <= 16, found.counts.lines
    assert found.waits == 1
    assert found.copies == 0
    assert found.counts.launches["replayed"] <= 10 * found.num_iterations, "two graphs, four inputs, four copies"


def test_a_host_is_ahead_of_the_device_by_a_level_at_most_and_lets_it_have_no_rest(monkeypatch) -> None:
    """It drafts one level behind an empty one at most, and none where it is not ahead."""
    ahead = measured("phase3", "model")
    with monkeypatch.context() as patch:
        patch.setattr(pretended_device, "KERNEL_SECONDS", 0.0)
        beside = measured("phase3", "model")
    assert beside.num_levels == ahead.num_levels < 8
    assert beside.launches < ahead.launches < beside.launches + 15
    assert beside.waits == ahead.waits == 1
    monkeypatch.setattr(_HeardLate, "wait_for", lambda *_: None)
    unbounded = measured("phase3", "model")
    assert unbounded.counts.launches[PASSES] > ahead.counts.launches[PASSES]
    assert ahead.idle_seconds <= unbounded.idle_seconds


def test_a_commit_takes_as_many_operations_whatever_the_number_of_layers() -> None:
    few, many = (measured("fixed", "model", num_layers) for num_layers in (2, 8))
    assert many.counts.launches["commit"] == few.counts.launches["commit"] > 0


# mixtures of experts ask which experts they need; two kinds of Falcon take keys by an index from the host
WAITING = {"deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
FALCONS = {"falcon", "falcon, one key head"}


@pytest.mark.parametrize("name", [*EXACT_FAMILIES, *(name for name in VARIANTS if name.startswith("falcon"))])
def test_which_families_wait_within_a_pass_and_cannot_be_recorded(name: str) -> None:
    """docs/models.md lists them."""
    model: Any = copy.deepcopy(tiny_variant(name)).float()
    with pretended() as device, torch.no_grad():
        passes = Passes(EagerRunner.make(moved(model), {}), StageClock(model.device))
        cache = TreeCache(32)
        passes.prefill(torch.arange(10, device=model.device), cache)
        flat = flatten([TokenTree.root(torch.zeros(1, dtype=torch.int64, device=model.device))], [cache.length])
        with by_stage(device), device.counting() as counts:
            passes.forward(flat, cache, stage="verify")
    assert any(stage == PASSES for stage, _ in counts.waits) == (name in WAITING | FALCONS)
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    _, _, listed = page.partition("What waits for the device within a pass")
    assert f"`{name}`" in listed.partition("\n- ")[0] or name not in WAITING


def test_calibration_counts_no_round_that_plans_or_records() -> None:
    """A shape is planned when it comes first, and recorded when it comes for the second time."""
    seconds = iter([9.0, 5.0, 1.0, 1.0])
    found = costs._interleaved({1: lambda: next(seconds)}, 2, 1e9, torch.device("cuda"))
    assert found == {1: 1.0}
    hasty = iter([9.0, 5.0, 1.0])
    assert costs._interleaved({1: lambda: next(hasty)}, 2, -1.0, torch.device("cuda")) == {1: 1.0}
    on_cpu = iter([9.0])
    assert costs._interleaved({1: lambda: next(on_cpu)}, 2, -1.0, torch.device("cpu")) == {1: 9.0}


def test_times_of_stages_add_up_where_the_host_runs_ahead_of_the_device() -> None:
    """A model's passes have the device's time, so what is around them has too: no share of an iteration is negative."""
    pair = pair_that_repeats()
    with pretended() as device:
        session = Session(
            moved(pair.target), ModelDrafter(moved(pair.drafter)), pair.source.text(0, 30), policy="phase3",
            max_new_tokens=20, eos_token_id=[], inherit_settings=False, runner="eager", trust_model=True,
            now=device.now,
        )  # fmt: skip
        for _ in run(session):
            pass
        report, in_passes = session.result().report, session.clock.seconds("draft_forward")
    assert 0 < in_passes < report.draft_seconds
    assert report.rest_seconds > 0
    assert report.overhead_seconds > 0
    parts = report.draft_seconds + report.verify_seconds + report.rest_seconds
    assert parts == pytest.approx(report.decode_seconds)


def test_what_would_wait_or_mix_devices_is_seen() -> None:
    """The pretended device itself: each kind of wait is counted, with the stage, and mixed devices are refused."""
    with pretended() as device, device.counting() as counts:
        numbers = torch.arange(4, device="cuda:0")
        assert numbers.device == torch.device("cuda:0")
        asked: list[Callable[[], object]] = [
            numbers.tolist,
            lambda: numbers.sum().item(),
            lambda: bool(numbers.any()),
            lambda: numbers[numbers > 1],
            lambda: numbers[numbers[0]],
            lambda: numbers.cpu(),
            lambda: torch.tensor([1, 2], device="cuda:0"),
            lambda: numbers.nonzero(),
        ]
        for ask in asked:
            before = counts.num_waits()
            ask()
            assert counts.num_waits() == before + 1, ask
        before = counts.num_waits()
        (numbers + 1)[1:3].fill_(7)
        assert counts.num_waits() == before
        with pytest.raises(RuntimeError, match="one device"):
            numbers + torch.arange(4)
