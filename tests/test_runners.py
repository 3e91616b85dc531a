"""Runners as plugins: what a class says of a model, what a package of somebody's own can do, and hidden states."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import torch
from command import run_command
from fake_package import package  # noqa: F401  # a fixture
from test_architectures import bushy_tree
from tiny_folder import save_tiny
from torch import nn

from dynatree_core import Engine, PrefixCache, generate, ops
from dynatree_core.cache import TreeCache
from dynatree_core.cli.catalogue import plugin_rows
from dynatree_core.clock import StageClock
from dynatree_core.errors import (
    CacheError,
    ForwardPassError,
    ParameterError,
    PluginConflictError,
    PluginLoadError,
    UnknownPluginError,
)
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.models.kept import kept_of
from dynatree_core.models.state import is_untouched, state_of
from dynatree_core.plugins.registry import RUNNERS
from dynatree_core.runners import packed
from dynatree_core.runners.around import RunnerAround
from dynatree_core.runners.base import PassOutput, Rows, Runner
from dynatree_core.runners.choice import load_runner, make_runner, runner_for
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import Passes
from dynatree_core.testing.models import greedy, perturbed, tiny_model
from dynatree_core.tree.flatten import flatten, flatten_chain

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]

RUNNER = """
from dynatree_core.runners.base import Runner
from dynatree_core.runners.eager import EagerRunner

class R(Runner):
    "A runner of somebody's own."

    name = "mine"
    passes = []
    worth = 0
    reason = None
    unfit = None

    def __init__(self, model):
        self.plain = EagerRunner(model)

    @classmethod
    def reason_against(cls, model):
        return cls.reason

    @classmethod
    def preference(cls, model, kept):
        return cls.worth

    @classmethod
    def make(cls, model, kept):
        if cls.unfit is not None:
            raise cls.unfit
        return cls(model)

    def forward(self, flat, cache, **options):
        self.passes.append(flat.num_rows)
        return self.plain.forward(flat, cache, **options)
"""

OWN_CACHE = """
from transformers import Cache
from dynatree_core.cache.base import KeyValueCache
from dynatree_core.cache.tree_cache import TreeCache

class Handing(Cache, KeyValueCache):
    def __init__(self, capacity, **options):
        super().__init__(layers=[])
        self.own = TreeCache(capacity, **options)
        self.capacity = capacity

def handed_on(name):
    return lambda self, *args, **options: getattr(self.own, name)(*args, **options)

PROPERTIES = ("length", "block_len", "next_place", "max_places")
METHODS = (
    "prepare", "commit", "rollback", "wipe", "truncate", "join", "free", "update", "get_seq_length", "get_mask_sizes"
)
Rows = type(Handing)("Rows", (Handing,), {
    **{name: property(lambda self, name=name: getattr(self.own, name)) for name in PROPERTIES},
    **{name: handed_on(name) for name in METHODS},
})

R.has_own_cache = True
R.new_cache = lambda self, capacity, *, lanes=1, is_zeroed=False: Rows(capacity, lanes=lanes, is_zeroed=is_zeroed)
"""


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: its exit status, what it printed, and what it complained of."""
    return lambda *args: attrs.astuple(run_command(capfd, *args))


@pytest.fixture
def mine(package: Any) -> Any:  # noqa: F811
    """The class of an installed package's runner, which is called "mine"."""
    package("mine", RUNNER, entries="[dynatree.runners]\nmine = module_of_mine:R\n")
    return load_runner("mine")


# ---- packages -------------------------------------------------------------------------------------------------


def test_a_runner_of_somebodys_own_is_chosen_by_name(mine: Any) -> None:
    model = tiny_model("llama")
    expected = greedy(model, PROMPT, 12)
    found = generate(model, perturbed("llama"), PROMPT, max_new_tokens=12, runner="mine")
    assert found.token_ids == expected
    assert found.report.runner == "mine"
    assert len(mine.passes) == 1 + found.report.num_iterations, "the drafter's model has the runner of its own choice"
    mine.passes.clear()
    assert generate(model, None, PROMPT, max_new_tokens=12).report.runner == "eager"
    assert mine.passes == [], "it says that it is worth nothing to auto"


def test_the_command_takes_its_name_and_doctor_lists_it(mine: Any, run: Any, tmp_path: Any) -> None:
    target = save_tiny(tmp_path / "tiny")
    asked = ["generate", "--target", str(target), "--max-new-tokens", "4", "ab", "--runner"]
    code, out, err = run(*asked, "mine", "--json")
    assert (code, json.loads(out)["runner"]) == (0, "mine"), err
    code, out, err = run(*asked, "mien")
    assert code == 2
    assert (
        "runner must be one of auto, cudagraph, eager, mine, native, packed, triton, got 'mien' (did you mean 'mine'?)"
        in err
    )
    code, out, _ = run("doctor", "--json")
    rows = {row["name"]: row for row in json.loads(out)["plugins"] if row["kind"] == "runner"}
    assert list(rows) == ["cudagraph", "eager", "mine", "native", "packed", "triton"]
    assert rows["mine"]["package"] == "mine"


def test_auto_takes_the_one_with_the_greatest_preference(mine: Any) -> None:
    model = tiny_model("llama")
    assert runner_for(model, "auto") == "eager"
    mine.worth = 3
    assert runner_for(model, "auto") == "mine"
    mine.reason = "is for moons, got a planet"
    assert runner_for(model, "auto") == "eager"
    with pytest.raises(ParameterError, match="the mine runner is for moons, got a planet; use runner='auto'"):
        generate(model, None, PROMPT, runner="mine")


def test_one_that_cannot_be_made_after_all(mine: Any) -> None:
    model = tiny_model("llama")
    mine.worth, mine.unfit = 3, ParameterError("no moon")
    with pytest.warns(RuntimeWarning, match="passes are slower than they could be: no moon"):
        assert generate(model, None, PROMPT, max_new_tokens=2).report.runner == "eager"
    with pytest.raises(ParameterError, match="no moon"):
        generate(model, None, PROMPT, runner="mine")
    mine.unfit = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        generate(model, None, PROMPT, runner="mine")
    mine.unfit = SystemExit("no")
    with pytest.raises(PluginLoadError, match=r"the mine runner must say .* but raised SystemExit: it called exit"):
        generate(model, None, PROMPT, runner="mine")


def test_a_pass_that_fails_names_its_fault(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mine, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ForwardPassError, match="a forward pass of 9 rows over 9 cache slots failed in the model: Zero"):
        generate(tiny_model("llama"), None, PROMPT, runner="mine")


def test_names_of_packages_are_names_of_runners(package: Any) -> None:  # noqa: F811
    code = RUNNER.replace('"mine"', '"my_own"')
    package("mine", code, entries="[dynatree.runners]\nmy-own = module_of_mine:R\n")
    for name in ("my-own", "my_own"):
        assert generate(tiny_model("llama"), None, PROMPT, max_new_tokens=2, runner=name).report.runner == "my_own"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit('gone')", "'mine' is installed but cannot be imported"),
        ("R = 5", "must be a class, got int"),
        ("class R: pass", "must be a class derived from Runner with name = 'mine', got <class"),
        (RUNNER.replace('"mine"', '"yours"'), "must be a class derived from Runner with name = 'mine'"),
    ],
)
def test_a_broken_package_costs_itself_only(package: Any, code: str, words: str) -> None:  # noqa: F811
    package("mine", code, entries="[dynatree.runners]\nmine = module_of_mine:R\n")
    model = tiny_model("llama")
    with pytest.warns(RuntimeWarning, match=f"runner='auto' leaves out 'mine': .*{words}"):
        assert generate(model, None, PROMPT, max_new_tokens=2).report.runner == "eager"
    assert generate(model, None, PROMPT, max_new_tokens=2, runner="eager").report.runner == "eager"
    with pytest.raises(PluginLoadError, match=words):
        generate(model, None, PROMPT, runner="mine")
    [row] = [row for row in plugin_rows(RUNNERS) if row.name == "mine"]
    assert words in str(row.error)


def test_two_packages_with_one_name(package: Any) -> None:  # noqa: F811
    package("mine", RUNNER, entries="[dynatree.runners]\nmine = module_of_mine:R\n")
    package("yours", RUNNER, entries="[dynatree.runners]\nmine = module_of_yours:R\n")
    with pytest.raises(PluginConflictError, match=r"'mine' comes from (mine|yours) .* and (mine|yours)"):
        generate(tiny_model("llama"), None, PROMPT, runner="mine")


def test_a_runner_may_bring_a_cache_of_its_own(package: Any) -> None:  # noqa: F811
    package("mine", RUNNER + OWN_CACHE, entries="[dynatree.runners]\nmine = module_of_mine:R\n")
    model, kept = tiny_model("llama"), PrefixCache()
    expected = greedy(model, PROMPT, 20)
    for policy in ("phase1", "autoregressive"):
        found = generate(
            model, perturbed("llama"), PROMPT, policy=policy, max_new_tokens=20, runner="mine", prefix_cache=kept
        )
        assert found.token_ids == expected
    assert found.report.num_reused_tokens == 0, "nobody else can read its rows"
    with pytest.raises(ParameterError, match="the mine runner has a cache of its own, got cache='sinks=2,window=8'"):
        generate(model, None, PROMPT, runner="mine", cache="sinks=2,window=8")
    with pytest.raises(CacheError, match="needs a cache with has_all_rows, got a Rows"):
        make_runner(model, "mine").new_cache(8).copied()


def test_a_runner_around_another_is_that_one_but_for_what_it_does_around_each_pass(package: Any) -> None:  # noqa: F811
    package("mine", RUNNER + OWN_CACHE, entries="[dynatree.runners]\nmine = module_of_mine:R\n")
    model, seen = tiny_model("llama"), []

    @contextmanager
    def each_pass(parts: Sequence[Rows], is_prompt: bool) -> Iterator[None]:
        before = [part.cache.length for part in parts]
        yield
        seen.append(([part.flat.num_rows for part in parts], before, is_prompt))

    inner = make_runner(model, "mine")
    around = RunnerAround(inner, each_pass)
    assert (around.name, around.computed_by, around.has_own_cache) == ("mine", inner.computed_by, True)
    assert type(around.new_cache(8)) is type(inner.new_cache(8))
    options = {"policy": "fixed(depth=2,branch=2)", "max_new_tokens": 9, "eos_token_id": []}
    engine = Engine(model, None, make_runner=lambda model, name: RunnerAround(EagerRunner(model), each_pass))
    handles = [engine.submit(prompt, **options) for prompt in (PROMPT, PROMPT[:4])]
    assert [handle.result().token_ids for handle in handles] == [greedy(model, one, 9) for one in (PROMPT, PROMPT[:4])]
    assert seen[:2] == [([9], [0], True), ([3], [0], True)]
    assert seen[2] == ([1, 1], [9, 3], False), "one pass for both, told once, with the caches as they were before"
    assert len(seen) == 2 + 9


# ---- what is kept of a model ------------------------------------------------------------------------------------


def test_a_second_generation_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = (copy.deepcopy(model).float() for model in (tiny_model("llama"), perturbed("llama")))
    if not packed.can_pack(target):
        pytest.skip("this build of torch has no oneDNN kernels to pack weights for")
    monkeypatch.setattr(ops, "reason_unavailable", lambda: "the test wants it so")
    made, make = [], packed._packed_copy
    monkeypatch.setattr(packed, "_packed_copy", lambda model: made.append(model) or make(model))
    for _ in range(3):
        assert generate(target, drafter, PROMPT, max_new_tokens=4).report.runner == "packed"
    assert [id(model) for model in made] == [id(target), id(drafter)]
    assert make_runner(target, "packed", kept=kept_of(target)) is make_runner(target, "auto", kept=kept_of(target))
    assert make_runner(target, "packed") is not make_runner(target, "packed"), "nothing is kept where nobody asks"


def test_nothing_that_is_kept_holds_the_model() -> None:
    model = copy.deepcopy(tiny_model("llama")).float()
    for name in ("auto", "eager"):
        generate(model, None, PROMPT, max_new_tokens=2, runner=name)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ---- hidden states ----------------------------------------------------------------------------------------------


def hidden_of(model: nn.Module, runner: Runner, *, last_row_only: bool = False) -> tuple[PassOutput, torch.Tensor]:
    """A pass over a tree that is asked for hidden states, and what a hook sees going into the head in a plain one."""
    tree, heard = bushy_tree(), []
    cache = TreeCache(64)
    flat = flatten([tree], [cache.next_place])
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, rows: heard.append(rows[0]))
    with torch.inference_mode():
        EagerRunner(model).forward(cache.prepare(flat), cache)
        hook.remove()
        cache.rollback()
        return runner.forward(cache.prepare(flat), cache, hidden=True, last_row_only=last_row_only), heard[0]


@pytest.mark.parametrize("last_row_only", [False, True])
@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_hidden_states_are_what_goes_into_the_head(family: str, last_row_only: bool) -> None:
    model = tiny_model(family)
    before = state_of(model, reads_code=True)
    found, expected = hidden_of(model, EagerRunner(model), last_row_only=last_row_only)
    assert found.hidden is not None
    assert torch.equal(found.hidden, expected)
    cache = TreeCache(64)
    with torch.inference_mode():
        plain = EagerRunner(model).forward(cache.prepare(flatten([bushy_tree()], [0])), cache)
    assert plain.hidden is None, "nobody asked"
    logits = plain.logits[:, -1:] if last_row_only else plain.logits
    torch.testing.assert_close(found.logits, logits, rtol=1e-9, atol=1e-9)
    assert state_of(model, reads_code=True) == before
    assert is_untouched(model)


def test_hidden_states_are_those_of_transformers() -> None:
    model = copy.deepcopy(tiny_model("llama"))  # transformers leaves hooks on it
    runner, cache, ids = EagerRunner(model), TreeCache(64), torch.tensor([PROMPT])
    with torch.inference_mode():
        passes = Passes(runner, StageClock(torch.device("cpu")))
        found = passes.forward(flatten_chain(ids[0], 0), cache, stage="verify", hidden=True)
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert found.hidden is not None
    torch.testing.assert_close(found.hidden, expected, rtol=1e-9, atol=1e-9)


def test_packed_passes_have_them_too() -> None:
    model = copy.deepcopy(tiny_model("llama")).float()
    if not packed.can_pack(model):
        pytest.skip("this build of torch has no oneDNN kernels to pack weights for")
    found, expected = hidden_of(model, make_runner(model, "packed"))
    torch.testing.assert_close(found.hidden, expected, rtol=1e-3, atol=1e-3)


def test_a_model_whose_forward_was_replaced_has_none() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.forward = model.forward  # bound to the object itself
    with pytest.raises(ForwardPassError, match="does not call its head with all rows; take off what has replaced its"):
        hidden_of(model, EagerRunner(model))


def test_two_threads_hear_their_own() -> None:
    model = tiny_model("llama")
    runner = EagerRunner(model)

    def one(token: int) -> torch.Tensor:
        cache = TreeCache(8)
        with torch.inference_mode():
            output = runner.forward(cache.prepare(flatten_chain(torch.tensor([token, 7]), 0)), cache, hidden=True)
        assert output.hidden is not None
        return output.hidden

    alone = [one(token) for token in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(one, [*range(8)] * 5), alone * 5, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_unknown_name_is_told_before_anything_is_computed() -> None:
    with pytest.raises(UnknownPluginError, match="did you mean 'eager'"):
        make_runner(tiny_model("llama"), "eagre")
