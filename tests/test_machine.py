"""An engine as a state machine beside a plain model: requests come, run, fail, are cancelled, put back, in any order.

The plain model is the request alone: transformers' `generate`, or what it says first where a sequence did not end.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import LogitsProcessor

from dynatree_core import Engine, PrefixCache
from dynatree_core.cost_model import NOMINAL_COSTS
from dynatree_core.errors import ParameterError, QueueFullError
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB, perturbed, reference, tiny_model

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [3, 1, 4, 1, 7, 7, 2, 9, 30], [2], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
POLICIES = ("phase3", "fixed(depth=2,branch=2,tau=0.0)", "autoregressive", "cost_aware", "phase3+governor", "hostile")
WAYS: tuple[dict[str, Any], ...] = (
    {}, {}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 8, "temperature": 0.7, "top_k": 9}, {"exact": "fixed_width"},
)  # fmt: skip
MAX_WAITING = 3


class Failing(LogitsProcessor):
    """Fails at one of its calls, as a caller's own might."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("of a test")
        return scores


@functools.cache
def alone(family: str, prompt: int, num_tokens: int, ends: bool, way: int) -> list[int]:
    """What `generate` says to the request alone."""
    said = {name: value for name, value in WAYS[way].items() if name != "exact"}
    return reference(tiny_model(family), PROMPTS[prompt], num_tokens, [*range(0, VOCAB, 6)] if ends else [], **said)


class EngineMachine(RuleBasedStateMachine):
    """Handles with what each request says alone; `ending` is how each may end, besides at its own end."""

    @initialize(
        family=st.sampled_from(["llama", "gpt2"]), drafter=st.sampled_from(["near", "far", "prompt_lookup", "none"]),
        max_sequences=st.integers(1, 4), budget=st.sampled_from([None, 200_000]), keeps=st.booleans(),
    )  # fmt: skip
    def begin(self, family: str, drafter: str, max_sequences: int, budget: int | None, keeps: bool) -> None:
        self.family = family
        # on a clock of its own: else a governor's trees, and with them what may come next, would differ from run to run
        ticks = itertools.count()
        made: dict[str, Any] = {"near": perturbed(family), "far": tiny_model(family, 3), "none": None}
        self.engine = Engine(
            tiny_model(family), made.get(drafter, drafter), max_sequences=max_sequences, max_waiting=MAX_WAITING,
            max_bytes=budget, prefix_cache=PrefixCache() if keeps else None, costs=NOMINAL_COSTS,
            now=lambda: float(next(ticks)),
        )  # fmt: skip
        self.handles: list[Any] = []
        self.expected: dict[Any, list[int]] = {}
        self.ending: dict[Any, set[str]] = {}
        self.seen: dict[Any, list[int]] = {}

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1), num_tokens=st.sampled_from([0, 1, 4, 9]), ends=st.booleans(),
        way=st.integers(0, len(WAYS) - 1), policy=st.sampled_from(POLICIES), max_nodes=st.sampled_from([0, 3, 20]),
        fails_at=st.sampled_from([None, None, None, 0, 2]), seed=st.integers(0, 9),
    )  # fmt: skip
    def submit(
        self, prompt: int, num_tokens: int, ends: bool, way: int, policy: str, max_nodes: int, fails_at: int | None,
        seed: int,
    ) -> None:  # fmt: skip
        options = dict(WAYS[way])
        fails = fails_at is not None and "exact" not in options
        if fails:
            options["logits_processor"] = [Failing(fails_at)]
        load = self.engine.load
        is_full = load.num_waiting >= max(self.engine._scheduler.max_sequences - load.num_running, 0) + MAX_WAITING
        try:
            handle = self.engine.submit(
                PROMPTS[prompt],
                policy=ours.HostilePolicy(seed) if policy == "hostile" else policy,
                max_new_tokens=num_tokens,
                eos_token_id=[*range(0, VOCAB, 6)] if ends else [],
                max_nodes=max_nodes,
                **options,
            )
        except QueueFullError:
            assert is_full
            return
        assert not is_full
        self.handles.append(handle)
        self.expected[handle] = alone(self.family, prompt, num_tokens, ends, way)
        self.ending[handle] = {"failed"} if fails else set()
        self.seen[handle] = []

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            for event in self.engine.step():
                if event.kind == "tokens":
                    self.seen[event.handle] += event.report.token_ids

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.handles))
        if not handle.is_done:
            self.ending[handle].add("cancelled")
        self.engine.cancel(handle)
        assert handle.is_done

    @precondition(lambda self: self.engine.load.num_running > 1)
    @rule()
    def put_back(self) -> None:
        """As if memory were short."""
        youngest = max((one.handle for one in self.engine._scheduler._running), key=lambda handle: handle.number)
        assert self.engine._scheduler._put_back().handle is youngest
        assert not youngest.is_done

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def wait_for(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.handles)).advance_until_done()

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def step_from_a_callback(self, data: st.DataObject) -> None:
        """It is refused, and nobody is disturbed."""
        handle = data.draw(st.sampled_from(self.handles))
        if handle.is_done or handle.on_report is not None:
            return

        def impatient(*_: object) -> None:
            try:
                self.engine.step()
            except ParameterError:
                return
            raise AssertionError("a step inside of a step")

        handle.on_report = impatient

    @invariant()
    def each_is_as_alone(self) -> None:
        running = 0
        for handle in getattr(self, "handles", []):
            expected, found = self.expected[handle], handle.token_ids
            assert found == expected[: len(found)], (found, expected)
            if handle.status == "stopped":
                assert found == handle.result().token_ids == expected
            elif handle.is_done:
                assert handle.status in self.ending[handle], (handle, handle.error)
            else:
                running += 1
        if hasattr(self, "engine"):
            load = self.engine.load
            assert load.num_running + load.num_waiting == running
            assert load.num_running <= self.engine._scheduler.max_sequences
            if self.engine.max_bytes is not None:
                lanes = [one.lane for one in self.engine._scheduler._running]
                assert sum(lane.cache.num_bytes for lane in lanes) <= self.engine.max_bytes

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.load.num_running or self.engine.load.num_waiting:
            self.step(1)
        self.each_is_as_alone()
        for handle in self.handles:
            assert handle.token_ids[: len(self.seen[handle])] == self.seen[handle] or handle.status != "stopped"


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
