from .format import SCHEMA, is_trace, json_schema
from .reading import Iteration, SequenceTrace, TraceFile, iteration_of, read
from .record import Recorder, Trace, check_trace, tracing
from .replaying import Replay, ReplayStep, fitted_costs, recorded, replay
from .show import print_iteration, print_trace, tree_lines
from .view import page_of

__all__ = [
    "SCHEMA",
    "Iteration",
    "Recorder",
    "Replay",
    "ReplayStep",
    "SequenceTrace",
    "Trace",
    "TraceFile",
    "check_trace",
    "fitted_costs",
    "is_trace",
    "iteration_of",
    "json_schema",
    "page_of",
    "print_iteration",
    "print_trace",
    "read",
    "recorded",
    "replay",
    "tracing",
    "tree_lines",
]
