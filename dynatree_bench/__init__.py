"""Benchmarks: programs that measure, never timed asserts."""
