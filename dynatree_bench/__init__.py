"""Benchmarks: programs that measure, never timed asserts."""

from dynatree_core.cli.quiet import quiet_imports

quiet_imports()  # its programs import transformers before anything of theirs runs
