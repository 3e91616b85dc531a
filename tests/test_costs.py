"""Costs: what is measured, how it is kept, and when it is measured again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator

import pytest
import torch

from dynatree_core import CostModel, Session, StepFunction, build_drafter, generate, hookimpl, run
from dynatree_core.cost_model import NOMINAL_COSTS
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine import costs
from dynatree_core.engine.costs import FOLLOWED, ROWS, WIDTHS, isotonic, measured_costs
from dynatree_core.testing.models import perturbed, tiny_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of measurements."""
    monkeypatch.setattr(costs, "folder", lambda: tmp_path / "costs")
    return tmp_path / "costs"


class Priced:
    """A clock that the passes of models move, by a price for each model."""

    def __init__(self) -> None:
        self.now = 0.0
        self.handles: list = []
        self.num_passes = 0

    def price(self, model: torch.nn.Module, seconds: Callable[[int], float]) -> None:
        def charge(module, args, kwargs):
            self.num_passes += 1
            self.now += seconds(kwargs["input_ids"].shape[1])

        self.handles.append(model.register_forward_pre_hook(charge, with_kwargs=True))


@pytest.fixture
def priced(monkeypatch) -> Iterator[Priced]:
    clock = Priced()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    yield clock
    for handle in clock.handles:
        handle.remove()


def test_a_step_function_is_as_high_as_its_next_point():
    seconds = StepFunction((1, 4, 16), (1.0, 2.0, 4.0))
    assert [seconds(n) for n in (0, 1, 2, 4, 5, 16, 17, 32)] == [0.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.25, 8.0]
    for count in (0, 1, 15, 40):
        table = seconds.table(count)
        assert len(table) > count
        assert table == [seconds(n) for n in range(len(table))]


def test_the_costs_of_an_iteration():
    model = CostModel(StepFunction((1, 8), (1.0, 2.0)), StepFunction((1, 4), (0.1, 0.3)), 0.05)
    assert model.plain_step_seconds() == pytest.approx(1.05)
    assert model.iteration_seconds(0, []) == pytest.approx(1.05)
    assert model.iteration_seconds(7, [1, 3]) == pytest.approx(2.0 + 0.1 + 0.3 + 0.05)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 3, 2, 4], [1, 2.5, 2.5, 4]),
        ([3, 2, 1], [2, 2, 2]),
        ([1, 5, 4, 0], [1, 3, 3, 3]),
        ([2], [2]),
    ],
)
def test_isotonic(values, expected):
    assert isotonic(values) == pytest.approx(expected)


def test_what_is_measured(folder, priced):
    """The passes' own prices, whatever else the clock saw; a drafter's level has as many rows as nodes."""
    target, drafter = tiny_model("llama"), perturbed("llama")
    priced.price(target, lambda rows: 1.0 + 0.1 * rows)
    priced.price(drafter, lambda rows: 0.2 + 0.01 * rows)
    model = measured_costs(target, ModelDrafter(drafter), patience=1e9)
    assert model.target_pass_seconds == StepFunction(ROWS, pytest.approx([1.0 + 0.1 * rows for rows in ROWS]))
    assert model.drafter_level_seconds == StepFunction(WIDTHS, pytest.approx([0.2 + 0.01 * width for width in WIDTHS]))
    assert model.rest_seconds == 0.0  # no pass is in it


def test_a_model_is_measured_where_a_union_asks_it(folder, priced):
    target, drafter = tiny_model("llama"), perturbed("llama")
    priced.price(drafter, lambda rows: 0.2 + 0.01 * rows)
    union = UnionDrafter([ModelDrafter(drafter), build_drafter("prompt_lookup")])
    model = measured_costs(target, union, patience=1e9)
    assert model.drafter_level_seconds == StepFunction(WIDTHS, pytest.approx([0.2 + 0.01 * width for width in WIDTHS]))


def test_following_a_long_text_is_never_free(folder, priced):
    """Also where a pass takes as long over one token as over many, since launches are all that it takes."""
    drafter = perturbed("llama")
    priced.price(drafter, lambda rows: 0.2)
    model = measured_costs(tiny_model("llama"), ModelDrafter(drafter), patience=1e9)
    follow = model.drafter_follow_seconds
    assert follow is not None
    assert follow.at == FOLLOWED[: len(follow.at)]
    assert [model.catch_up_seconds(num) for num in (0, follow.at[0])] == [0.0, pytest.approx(0.0)]
    assert model.catch_up_seconds(100 * follow.at[-1]) == pytest.approx(20.0)


def test_a_short_context_of_a_model_in_a_union(folder):
    short = copy.deepcopy(perturbed("llama"))
    short.config.max_position_embeddings = 20
    union = UnionDrafter([ModelDrafter(short), build_drafter("prompt_lookup")])
    assert measured_costs(tiny_model("llama"), union).drafter_level_seconds(1) > 0


def test_a_round_that_was_slow_does_not_count(folder, priced):
    target = tiny_model("llama")
    slow = iter([9.0] * 8 + [0.0] * 7 + [5.0] * 7)  # the prefill, the round to warm up, and the last one
    priced.price(target, lambda rows: 1.0 + next(slow, 0.0))
    assert measured_costs(target, None, patience=1e9).target_pass_seconds(1) == 1.0


def test_a_slow_machine_makes_do_with_fewer_rounds(folder, priced):
    target = tiny_model("llama")
    priced.price(target, lambda rows: 100.0)
    assert measured_costs(target, None).target_pass_seconds(1) == 100.0
    assert priced.num_passes <= len(ROWS) + 5  # a prefill, a round, and a few more for the rest


def test_rows_that_are_measured_are_all_different(folder):
    """Equal rows would go to the same experts of a mixture, which then read as few weights as one row."""
    seen, model = [], tiny_model("mixtral")
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    measured_costs(model, None, runner="eager")
    handle.remove()
    trees = [rows for rows in seen if len(rows) == 24]
    assert trees
    assert all(len(set(rows)) == 24 for rows in trees)


def test_without_a_drafter_levels_are_free(folder):
    assert measured_costs(tiny_model("llama"), None).drafter_level_seconds(16) == 0.0


def test_a_registered_drafter_is_measured(folder):
    model = measured_costs(tiny_model("llama"), build_drafter("prompt_lookup"))
    assert 0 < model.drafter_level_seconds(1) <= model.drafter_level_seconds(32)


def test_measurements_are_kept(folder, priced):
    target = tiny_model("llama")
    price = [1.0]
    priced.price(target, lambda rows: price[0])
    known: dict = {}
    first = measured_costs(target, None, known=known)
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text())
    assert kept["of"]["model"] == "LlamaForCausalLM"
    assert kept["of"]["runner"] == "eager"
    price[0] = 1.25
    num_passes = priced.num_passes
    assert measured_costs(target, None, known=known) == first  # this process knows it
    assert priced.num_passes == num_passes
    assert measured_costs(target, None) == first  # another one finds it, and a pass takes about as long still
    price[0] = 2.0
    assert measured_costs(target, None).target_pass_seconds(1) == 2.0  # not any more
    assert measured_costs(target, None, is_anew=True).target_pass_seconds(1) == 2.0


def test_another_drafter_under_the_same_name_is_noticed(folder, priced):
    target, lookup = tiny_model("llama"), build_drafter("prompt_lookup")
    found = []
    for seed, price in ((0, 0.2), (1, 0.6)):
        drafter = copy.deepcopy(perturbed("llama", seed))
        drafter.config.name_or_path = "drafter"
        priced.price(drafter, lambda rows, price=price: price)
        union = UnionDrafter([ModelDrafter(drafter), lookup])
        found.append((str(union), measured_costs(target, union).drafter_level_seconds(1)))
    assert found[0][0] == found[1][0]
    assert [price for _, price in found] == pytest.approx([0.2, 0.6])


@pytest.mark.parametrize("damage", ["versions", "text", "format"])
def test_what_another_version_kept_is_not_used(folder, priced, damage):
    target = tiny_model("llama")
    price = [1.0]
    priced.price(target, lambda rows: price[0])
    measured_costs(target, None)
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text())
    kept["versions" if damage == "versions" else "format"] = "another"
    file.write_text("no json" if damage == "text" else json.dumps(kept))
    price[0] = 1.25
    assert measured_costs(target, None).target_pass_seconds(1) == 1.25


def test_models_are_told_apart_by_shape_and_dtype(folder):
    for model in (tiny_model("llama"), tiny_model("gpt2"), copy.deepcopy(tiny_model("llama")).float()):
        measured_costs(model, None, rounds=1)
    assert len(list(folder.iterdir())) == 3
    measured_costs(tiny_model("llama", 5), None)  # other weights, which do not matter
    assert len(list(folder.iterdir())) == 3


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(costs, "folder", lambda: tmp_path / "file" / "costs")
    with pytest.warns(RuntimeWarning, match="measured costs cannot be kept"):
        assert measured_costs(tiny_model("llama"), None).target_pass_seconds(1) > 0


def test_nothing_is_measured_unless_a_policy_asks(folder):
    generate(tiny_model("llama"), perturbed("llama"), [1, 2], policy="phase3+governor", max_new_tokens=8)
    assert not folder.exists()


def test_the_time_of_a_measurement_counts_nowhere(folder, priced):
    target, drafter = copy.deepcopy(tiny_model("llama")), perturbed("llama")  # a model that nothing is kept of
    priced.price(target, lambda rows: 1.0)
    priced.price(drafter, lambda rows: 0.25)

    class Asks:
        @hookimpl
        def should_expand(self, frontier) -> bool:
            assert frontier.costs.target_pass_seconds(1) == 1.0
            return frontier.depth < 2

    session = Session(target, drafter, [1, 2, 3], policy=Asks(), max_new_tokens=9, tau=0.0)
    reports = list(run(session))
    assert reports[0].seconds == pytest.approx(1.5)
    assert session.result().report.decode_seconds == pytest.approx(sum(report.seconds for report in reports))
    assert len(list(folder.iterdir())) == 2


def test_nominal_costs_rise_with_rows():
    assert NOMINAL_COSTS.target_pass_seconds(1) == 1.0
    assert (
        NOMINAL_COSTS.target_pass_seconds(1)
        < NOMINAL_COSTS.target_pass_seconds(2)
        < NOMINAL_COSTS.target_pass_seconds(200)
    )
    assert NOMINAL_COSTS.drafter_level_seconds(1) == NOMINAL_COSTS.drafter_level_seconds(100) == 0.1
