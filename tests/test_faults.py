"""Faults at every point of an iteration: what was committed is right, and the session can go on.

First by place: target, drafter, caches, policies, processors and criteria fail in one of their calls. Then by line: an
interrupt or a lack of memory at each line that a generation executes here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interleaved import traced
from test_prefix_cache import check_rows
from test_settings import Countdown, Grudge

import dynatree_core
import dynatree_policies
from dynatree_core import Observer, PrefixCache, Session, hookimpl, run
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.errors import DrafterError, DynaTreeError, ForwardPassError, OutOfMemoryError, PolicyError
from dynatree_core.runners import passes
from dynatree_core.testing.models import greedy, perturbed, tiny_model

# copies, since hooks are put on them
TARGET, DRAFTER = copy.deepcopy(tiny_model("llama")), copy.deepcopy(perturbed("llama", noise=0.02))
PROMPT, LENGTH = [5, 6, 7, 5, 6], 14
EXPECTED = greedy(TARGET, PROMPT, LENGTH)

NO_MEMORY = (torch.OutOfMemoryError("no memory"), MemoryError("no memory"), RuntimeError("can't allocate memory"))
ANY_ERROR = (*NO_MEMORY, OSError("gone"))

Where = contextlib.AbstractContextManager[object]


class Fault:
    """Raises at one of its calls, and never again: then what was out of order is mended.

    A generation may be over before that call; `has_struck` says so.
    """

    def __init__(self, error: BaseException, call: int) -> None:
        self.error, self.call, self.calls = error, call, 0

    @property
    def has_struck(self) -> bool:
        return self.calls >= self.call

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.call:
            raise self.error


def in_method(owner: object, name: str, fault: Fault, *, when: str = "before") -> Where:
    """The fault is called before or after each call of that method."""
    original = getattr(owner, name)

    def wrapper(*arguments: object, **options: object) -> object:
        if when == "before":
            fault()
        result = original(*arguments, **options)
        if when == "after":
            fault()
        return result

    return mock.patch.object(owner, name, wrapper)


@contextlib.contextmanager
def in_model(register: Callable[..., torch.utils.hooks.RemovableHandle], fault: Fault) -> Iterator[None]:
    """The fault is called where a hook of that kind is."""
    handle = register(lambda *arguments: fault())
    try:
        yield
    finally:
        handle.remove()


# name -> what makes a fault strike there while it is open
IN_TARGET: dict[str, Callable[[Session, Fault], Where]] = {
    "before": lambda session, fault: in_model(TARGET.register_forward_pre_hook, fault),
    "between layers": lambda session, fault: in_model(TARGET.model.layers[0].register_forward_hook, fault),
    "after": lambda session, fault: in_model(TARGET.register_forward_hook, fault),
}
IN_DRAFTER_MODEL: dict[str, Callable[[Session, Fault], Where]] = {
    "before": lambda session, fault: in_model(DRAFTER.register_forward_pre_hook, fault),
    "between layers": lambda session, fault: in_model(DRAFTER.model.layers[0].register_forward_hook, fault),
    "after": lambda session, fault: in_model(DRAFTER.register_forward_hook, fault),
}
IN_TENSORS: dict[str, Callable[[Session, Fault], Where]] = {
    "buffers of a cache": lambda session, fault: in_method(torch.Tensor, "new_empty", fault),
    "rows that move": lambda session, fault: in_method(torch.Tensor, "__setitem__", fault),
    "rows that have moved": lambda session, fault: in_method(torch.Tensor, "__setitem__", fault, when="after"),
    "nodes and masks": lambda session, fault: in_method(torch, "index_select", fault),
    "choices": lambda session, fault: in_method(torch, "from_numpy", fault),
}
IN_SESSION: dict[str, Callable[[Session, Fault], Where]] = {
    f"{name}, {when}": lambda session, fault, owner=owner, name=name, when=when: in_method(
        owner(session), name, fault, when=when
    )
    for owner, name in [
        (lambda session: session.target, "prefill"),
        (lambda session: session.target, "forward"),
        (lambda session: session.sequence, "record"),
        (lambda session: session.cache, "commit"),
        (lambda session: session.cache, "rollback"),
        (lambda session: session.stack, "keep_nodes"),
        (lambda session: session.stack, "on_iteration_end"),
    ]
    for when in ("before", "after")
}
IN_DRAFTER = [(name, when) for name in ("prefill", "propose", "commit", "rollback") for when in ("before", "after")]
INTERRUPTS = {
    **{f"target, {place}": where for place, where in IN_TARGET.items()},
    **{f"drafter, {place}": where for place, where in IN_DRAFTER_MODEL.items()},
    **IN_TENSORS,
    **IN_SESSION,
}
HOOKS = ["should_expand", "branch_factor", "keep_nodes", "on_iteration_end"]

calls = st.integers(1, 9)
UNION = UnionDrafter([ModelDrafter(DRAFTER), PromptLookupDrafter()])
drafters = st.sampled_from([DRAFTER, UNION, "prompt_lookup"])


class Spy:
    """A policy without an opinion, which fails in one of its hooks."""

    def __init__(self, hook: str, fault: Fault) -> None:
        self.hook, self.fault = hook, fault

    def __deepcopy__(self, memo: object) -> Spy:
        return self

    def _called(self, hook: str) -> None:
        if hook == self.hook:
            self.fault()

    @hookimpl
    def should_expand(self, frontier):
        self._called("should_expand")

    @hookimpl
    def branch_factor(self, frontier):
        assert 0 <= frontier.confidence[0] <= 1 + 1e-6  # the drafter's pass, within a policy
        self._called("branch_factor")

    @hookimpl
    def keep_nodes(self, tree):
        self._called("keep_nodes")

    @hookimpl
    def on_iteration_end(self, report):
        self._called("on_iteration_end")


def new_session(drafter: object = DRAFTER, **options: object) -> Session:
    options = {"policy": "fixed(depth=3)", "max_new_tokens": LENGTH, "tau": 0.0, **options}
    return Session(TARGET, drafter, PROMPT, **options)


def finish(session: Session) -> None:
    for _ in run(session):
        pass


def check_committed(session: Session, expected: list[int]) -> None:
    """What is committed is a beginning of the greedy output, and every token of it was counted."""
    assert session.new_token_ids == expected[: len(session.new_token_ids)]
    assert sum(step.num_committed for step in session.steps) == len(session.new_token_ids)


def check_strike(
    session: Session, fault: Fault, where: Where, named: object, *words: str, expected: list[int] = EXPECTED
) -> None:
    """The fault ends the run with an error of that class, in these words; then the session goes on to its end."""
    error = None
    with where:
        try:
            finish(session)
        except named as caught:
            error = caught
    assert (error is not None) == fault.has_struck
    assert all(word in str(error) for word in words if error)
    if isinstance(error, DynaTreeError):
        assert error.partial.token_ids == session.new_token_ids
        # the last token may have been committed before
        assert error.partial.stop_reason == (session.stop_reason or "error")
    check_committed(session, expected)
    finish(session)
    assert session.new_token_ids == expected
    check_committed(session, expected)


def check_fallback(session: Session, fault: Fault, where: Where) -> None:
    """The fault ends the drafting, with a warning, and the output is the greedy one all the same."""
    with warnings.catch_warnings(record=True) as told, where:
        warnings.simplefilter("always")
        finish(session)
    assert [str(warning.message)[:15] for warning in told] == ["drafting is off"] * fault.has_struck
    assert (session.draft_state is None) == fault.has_struck
    assert session.new_token_ids == EXPECTED
    check_committed(session, EXPECTED)


@pytest.mark.parametrize("place", IN_TARGET)
@settings(max_examples=10)
@given(calls, st.sampled_from([1, 3, 256]), st.sampled_from(ANY_ERROR), st.sampled_from(["raise", "fallback"]))
def test_target(place, call, chunk, error, on_error):
    """Over the prompt, in one pass or several, and over trees. Without its target nothing goes on."""
    fault, session = Fault(error, call), new_session(on_error=on_error)
    named = ForwardPassError if isinstance(error, OSError) else OutOfMemoryError
    with mock.patch.object(passes, "PREFILL_CHUNK", chunk):
        check_strike(session, fault, IN_TARGET[place](session, fault), named, "a forward pass of ", str(error))


@pytest.mark.parametrize("place", IN_TENSORS)
@settings(max_examples=10)
@given(calls, drafters, st.sampled_from(NO_MEMORY))
@example(2, DRAFTER, NO_MEMORY[0])
def test_no_memory_for_tensors(place, call, drafter, error):
    """Whoever asked for them, target or drafter."""
    fault, session = Fault(error, call), new_session(drafter)
    check_strike(session, fault, IN_TENSORS[place](session, fault), (OutOfMemoryError, DrafterError), str(error))


@pytest.mark.parametrize("place", IN_TENSORS)
def test_each_of_these_places_is_met(place):
    """A fault that never strikes would show nothing."""
    fault, session = Fault(NO_MEMORY[0], 1), new_session(DRAFTER)
    check_strike(session, fault, IN_TENSORS[place](session, fault), (OutOfMemoryError, DrafterError), "no memory")
    assert fault.has_struck


@pytest.mark.parametrize("place", IN_SESSION)
@settings(max_examples=8)
@given(calls, drafters, st.sampled_from(NO_MEMORY))
@example(1, DRAFTER, NO_MEMORY[0])
def test_no_memory_between_the_stages(place, call, drafter, error):
    fault, session = Fault(error, call), new_session(drafter)
    check_strike(session, fault, IN_SESSION[place](session, fault), OutOfMemoryError, "more memory", str(error))


@pytest.mark.parametrize("place", IN_DRAFTER_MODEL)
@settings(max_examples=10)
@given(calls, st.sampled_from(ANY_ERROR))
def test_drafter_model(place, call, error):
    fault, session = Fault(error, call), new_session()
    where = IN_DRAFTER_MODEL[place](session, fault)
    check_strike(session, fault, where, DrafterError, "drafter 'model", str(error))
    fault, session = Fault(error, call), new_session(on_error="fallback")
    check_fallback(session, fault, IN_DRAFTER_MODEL[place](session, fault))


@pytest.mark.parametrize(("name", "when"), IN_DRAFTER)
@settings(max_examples=8)
@given(calls, drafters, st.sampled_from(ANY_ERROR))
@example(1, DRAFTER, OSError("gone"))
@example(1, DRAFTER, NO_MEMORY[0])
def test_drafter(name, when, call, drafter, error):
    fault, session = Fault(error, call), new_session(drafter)
    where = in_method(session.draft_state, name, fault, when=when)
    check_strike(session, fault, where, DrafterError, f"drafter '{session.drafter_name}' raised", str(error))
    fault, session = Fault(error, call), new_session(drafter, on_error="fallback")
    check_fallback(session, fault, in_method(session.draft_state, name, fault, when=when))


@pytest.mark.parametrize("kind", [ModelDrafter, PromptLookupDrafter])
@pytest.mark.parametrize("error", ANY_ERROR)
def test_drafter_that_cannot_start(kind, error):
    drafter = ModelDrafter(DRAFTER) if kind is ModelDrafter else "prompt_lookup"
    with in_method(kind, "start", Fault(error, 1)), pytest.raises(DrafterError, match=r"drafter '.*' raised"):
        new_session(drafter)
    with in_method(kind, "start", Fault(error, 1)), pytest.warns(RuntimeWarning, match="drafting is off"):
        session = new_session(drafter, on_error="fallback")
    finish(session)
    assert session.new_token_ids == EXPECTED


@pytest.mark.parametrize("hook", HOOKS)
@settings(max_examples=10)
@given(calls, drafters, st.sampled_from(ANY_ERROR))
def test_policy(hook, call, drafter, error):
    fault = Fault(error, call)
    session = new_session(drafter, policy=["fixed(depth=3)", Spy(hook, fault)])
    words = (f"policy 'spy', hook {hook}: raised {type(error).__name__}", str(error))
    check_strike(session, fault, contextlib.nullcontext(), PolicyError, *words)
    fault = Fault(error, call)
    session = new_session(drafter, policy=["fixed(depth=3)", Spy(hook, fault)], on_error="fallback")
    check_fallback(session, fault, contextlib.nullcontext())


@pytest.mark.parametrize("place", INTERRUPTS)
@settings(max_examples=8)
@given(calls, st.sampled_from([1, 256]))
@example(1, 256)
def test_interrupt(place, call, chunk):
    """Ctrl-C within a step: what was committed is right, and so is what comes when the session goes on."""
    fault, session = Fault(KeyboardInterrupt(), call), new_session()
    with mock.patch.object(passes, "PREFILL_CHUNK", chunk):
        check_strike(session, fault, INTERRUPTS[place](session, fault), KeyboardInterrupt)


class FailingGrudge(Grudge):
    """A processor with a memory, which fails before it remembers."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, input_ids, scores):
        self.fault()
        return super().__call__(input_ids, scores)


class FailingCountdown(Countdown):
    """A criterion with a memory, which fails before it counts."""

    def __init__(self, calls: int, fault: Fault) -> None:
        super().__init__(calls)
        self.fault = fault

    def __call__(self, input_ids, scores, **options):
        self.fault()
        return super().__call__(input_ids, scores, **options)


class Cancelled(Exception):
    """What a caller's own criterion may raise to end a generation."""


@pytest.mark.parametrize("who", ["processor", "criterion"])
@settings(max_examples=10)
@given(st.integers(1, 12), drafters, st.sampled_from([Cancelled("enough"), OSError("gone"), *NO_MEMORY]))
def test_a_callers_own_processor_or_criterion(who, call, drafter, error):
    """Their errors are the caller's and come as they are. One with a memory goes on as if nothing had been."""
    expected = greedy(TARGET, PROMPT, LENGTH, logits_processor=[Grudge()], stopping_criteria=[Countdown(11)])
    fault, never = Fault(error, call), Fault(error, 10**9)
    processor = FailingGrudge(fault if who == "processor" else never)
    criterion = FailingCountdown(11, fault if who == "criterion" else never)
    session = new_session(drafter, logits_processor=[processor], stopping_criteria=[criterion])
    named = OutOfMemoryError if error in NO_MEMORY else type(error)
    check_strike(session, fault, contextlib.nullcontext(), named, str(error), expected=expected)
    assert [text[len(PROMPT) :] for text in processor.calls] == [expected[:i] for i in range(len(expected))]
    assert [text[len(PROMPT) :] for text in criterion.texts] == [expected[: i + 1] for i in range(len(expected))]


class FailingObserver(Observer):
    """Watches everything, and fails in one of its methods."""

    wants_logits = True

    def __init__(self, method: str, fault: Fault) -> None:
        setattr(self, method, lambda record: fault())


@pytest.mark.parametrize("method", ["on_prefill", "on_level", "on_prune", "on_verify", "on_commit"])
@settings(max_examples=10)
@given(calls, drafters, st.sampled_from([Cancelled("enough"), OSError("gone"), *NO_MEMORY]))
def test_a_callers_own_observer(method, call, drafter, error):
    """Its error is the caller's and comes as it is, with on_error="fallback" too."""
    for on_error in ("raise", "fallback"):
        fault = Fault(error, call)
        session = new_session(drafter, observer=FailingObserver(method, fault), on_error=on_error)
        named = OutOfMemoryError if error in NO_MEMORY else type(error)
        check_strike(session, fault, contextlib.nullcontext(), named, str(error))
        assert (session.draft_state is None) == (drafter is None)


OURS = tuple(str(Path(package.__file__).parent) for package in (dynatree_core, dynatree_policies))
# within these a caller's own processors and criteria are called: one with a memory would remember an interrupted call
CALLS_THE_CALLERS_OWN = {"_choose", "_judge"}
# what names an error cannot name one of its own: it comes as it is
NAMES_ERRORS = "_ending"


def is_within(frame: FrameType | None, functions: set[str]) -> bool:
    """Whether one of these functions is being executed."""
    while frame is not None:
        if frame.f_code.co_name in functions and frame.f_code.co_filename.startswith(OURS):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def at_line(called: Callable[[str, str, int, FrameType], None]) -> Iterator[None]:
    """Called with file, function, line and frame before every line of ours that is executed within `run`."""

    def enter(frame, event, argument):
        code = frame.f_code
        return line if code.co_filename.startswith(OURS) and code is not run.__code__ else None

    def line(frame, event, argument):
        if event == "line":
            called(frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno, frame)
        return line

    with traced(enter):
        yield


def asked(kind: str) -> dict[str, object]:
    """Options of a generation: none, a caller's processor and criterion with a memory, sampling, a moving window, a
    prefix cache that knows the beginning and another text, or an observer."""
    return {
        "greedy": {},
        "memory": {"logits_processor": [Grudge()], "stopping_criteria": [Countdown(11)]},
        "sampling": {"do_sample": True, "temperature": 0.6, "seed": 3},
        "sinks": {"cache": "sinks=2,window=3"},
        "watched": {"observer": Observer()},
        "prefix": {"prefix_cache": knowing(PROMPT[:3], [9, 9]) if kind == "prefix" else None},
    }[kind]


def knowing(*texts: list[int]) -> PrefixCache:
    """A prefix cache with these texts."""
    found = PrefixCache()
    for text in texts:
        finish(Session(TARGET, DRAFTER, text, max_new_tokens=1, prefix_cache=found))
    return found


@functools.cache
def lines(drafter: object, kind: str) -> dict[tuple[str, str, int], list[int]]:
    """Every line that a run executes -> when: the how manieth lines of all they are."""
    found = defaultdict(list)
    num_executed = itertools.count(1)

    def note(file: str, function: str, line: int, frame: FrameType) -> None:
        number = next(num_executed)
        if not (kind == "memory" and is_within(frame, CALLS_THE_CALLERS_OWN)):
            found[file, function, line].append(number)

    # what only a first session executes is not executed again
    finish(new_session(drafter, policy="phase3", **asked(kind)))
    session = new_session(drafter, policy="phase3", **asked(kind))
    with at_line(note):
        finish(session)
    return found


@settings(max_examples=120)
@given(
    st.data(),
    drafters,
    st.sampled_from(["greedy", "memory", "sampling", "sinks", "prefix", "watched"]),
    st.sampled_from([KeyboardInterrupt(), *NO_MEMORY]),
    st.sampled_from(["raise", "fallback"]),
)
def test_every_line(data, drafter, kind, error, on_error):
    """An interrupt (Ctrl-C) or a lack of memory, wherever Python stands in our code."""
    found = lines(drafter, kind)
    check_line(data, data.draw(st.sampled_from(sorted(found))), drafter, kind, error, on_error)


@settings(max_examples=20)
@given(st.data(), st.sampled_from([KeyboardInterrupt(), *NO_MEMORY]), st.sampled_from(["raise", "fallback"]))
def test_every_line_that_names_errors(data, error, on_error):
    """Rarely met above, and the errors are others."""
    found = lines(DRAFTER, "greedy")
    line = data.draw(st.sampled_from(sorted(line for line in found if line[1] == NAMES_ERRORS)))
    check_line(data, line, DRAFTER, "greedy", error, on_error)


def check_line(data, line, drafter, kind, error, on_error) -> None:
    found = lines(drafter, kind)
    fault = Fault(error, data.draw(st.sampled_from(found[line])))
    undisturbed = new_session(None, **asked(kind))
    finish(undisturbed)
    expected = undisturbed.new_token_ids
    options = asked(kind)
    session = new_session(drafter, policy="phase3", on_error=on_error, **options)
    as_it_is = isinstance(error, KeyboardInterrupt) or line[1] == NAMES_ERRORS
    named = (type(error), DynaTreeError) if as_it_is else DynaTreeError
    caught = None
    try:
        with at_line(lambda *line: fault()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finish(session)
    except named as struck:
        caught = struck
    assert fault.has_struck
    assert on_error == "raise" or not isinstance(caught, DrafterError | PolicyError)
    check_committed(session, expected)
    if kind == "prefix":
        check_rows(options["prefix_cache"])
    finish(session)
    assert session.new_token_ids == expected
    check_committed(session, expected)
    if kind == "prefix":
        check_rows(options["prefix_cache"])
