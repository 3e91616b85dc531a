from .format import SCHEMA, json_schema
from .reading import Iteration, SequenceTrace, TraceFile, read
from .record import Recorder, Trace, check_trace, is_trace, tracing

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
