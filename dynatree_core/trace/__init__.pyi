from .format import SCHEMA, is_trace, json_schema
from .reading import Iteration, SequenceTrace, TraceFile, iteration_of, read
from .record import Recorder, Trace, check_trace, tracing
from .show import print_iteration, print_trace, tree_lines

__all__ = [
    "SCHEMA",
    "Iteration",
    "Recorder",
    "SequenceTrace",
    "Trace",
    "TraceFile",
    "check_trace",
    "is_trace",
    "iteration_of",
    "json_schema",
    "print_iteration",
    "print_trace",
    "read",
    "tracing",
    "tree_lines",
]
