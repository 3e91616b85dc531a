"""The trace of generations: a file in which every iteration can be looked at afterwards (docs/trace.md)."""

from dynatree_core.trace.format import SCHEMA, json_schema
from dynatree_core.trace.reading import Iteration, SequenceTrace, TraceFile, read
from dynatree_core.trace.record import Recorder, Trace, check_trace, is_trace, tracing

__all__ = [
    "SCHEMA",
    "Iteration",
    "Recorder",
    "SequenceTrace",
    "Trace",
    "TraceFile",
    "check_trace",
    "is_trace",
    "json_schema",
    "read",
    "tracing",
]
