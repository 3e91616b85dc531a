"""Recovery: a step that fails is done again without what has failed, or ends its sequence with what was committed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from dynatree_core.engine.decode import decode_step, decode_steps, prefill_chunks
from dynatree_core.engine.faults import Faults
from dynatree_core.engine.lane import Lane
from dynatree_core.errors import DrafterError, DynaTreeError, NonFiniteLogitsError, PolicyError
from dynatree_core.plugins.foreign import raised
from dynatree_core.runners.passes import is_out_of_memory, out_of_memory
from dynatree_core.tree.verdict import StepReport

__all__ = ["ended_by", "filled", "named_lack_of_memory", "note_observers", "step", "steps"]


def filled(lane: Lane) -> Iterator[int]:
    """Fill a lane's caches, a chunk each time the next one is asked for; yields its tokens."""
    try:
        lane.rollback()  # what a step that was broken off has left behind
        yield from prefill_chunks(lane)
        return
    except DrafterError as error:
        lane.fall_back(error)
    yield from prefill_chunks(lane)  # the target's part, if it was not reached


def ended_by(lane: Lane, error: Exception) -> Exception:
    """The error with which a lane's sequence ends: that one, or a lack of memory by its name.

    One of this package has what was committed as its `partial`, and observers are told of it. What they raise then is
    a note of that error (`__notes__`).
    """
    error = named_lack_of_memory(error)
    if isinstance(error, DynaTreeError):
        error.partial = lane.result("error")
        try:
            lane.report_fault(error, "ended")
        except Exception as other:  # noqa: BLE001  # an observer's own: the sequence ends with the first error
            note_observers(error, other)
    return error


def note_observers(error: BaseException, other: Exception) -> None:
    """Have the error with which a sequence ends say what an observer has raised that was told of it."""
    error.add_note(f"an observer that was told of it has failed: {raised(other)}")


def named_lack_of_memory(error: Exception) -> Exception:
    """The error itself, or the one of this package where it says that there is no memory left."""
    if isinstance(error, DynaTreeError) or not is_out_of_memory(error):
        return error
    named = out_of_memory("the generation", error)
    named.__cause__ = error
    return named


def step(lane: Lane) -> StepReport:
    """One decode step, and what happens when a policy, the drafter or a draft fails in it.

    Raises:
        Exception: what ends the sequence.
    """
    num_before = lane.num_iterations
    try:
        return decode_step(lane)
    except Exception as error:  # noqa: BLE001  # raised again where there is no help
        return _recovered(lane, error, num_before)


def steps(lanes: Sequence[Lane]) -> dict[Lane, StepReport | Exception]:
    """One decode step of each, together; for each its report, or what ends its sequence.

    Where something fails for one of them, that one goes on by itself.
    """
    num_before = {lane: lane.num_iterations for lane in lanes}
    outcomes = decode_steps(lanes)
    faults = Faults()
    failed = {lane: outcome for lane, outcome in outcomes.items() if isinstance(outcome, Exception)}
    recovered = faults.each(lambda lane, error: _recovered(lane, error, num_before[lane]), failed)
    return {**outcomes, **recovered, **faults.errors}


def _recovered(lane: Lane, error: Exception, num_before: int) -> StepReport:
    """The step after all; the error again where there is no help."""
    try:
        if not isinstance(error, NonFiniteLogitsError):
            raise error
        if lane.depth_limit == 0 or lane.is_observers(error):
            raise error
        lane.report_fault(error, "root alone")
        return _step_without_draft(lane)
    except (PolicyError, DrafterError) as error:
        lane.fall_back(error)
    if lane.num_iterations > num_before and lane.last_report is not None:
        return lane.last_report  # it failed after the step was committed
    return decode_step(lane)


def _step_without_draft(lane: Lane) -> StepReport:
    """The step again, with the root alone.

    A wrong draft may overflow where the target's own text never goes. In an early layer its keys and values are not
    numbers then, and they are in all rows of the pass, masked or not.
    """
    lane.rollback()
    lane.cache.wipe()
    sequence, limits = lane.sequence, lane.sequence.limits
    sequence.limits = attrs.evolve(limits, max_depth=0)
    try:
        return decode_step(lane)
    finally:
        sequence.limits = limits
