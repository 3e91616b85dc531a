"""The study of the operators' products: it measures each kind and number of rows, and its limits are what they say."""

from __future__ import annotations

import pytest

from dynatree_bench.run import limits
from dynatree_bench.run.bandwidth import ReadSpeed
from dynatree_bench.run.pairs import Models
from dynatree_bench.studies import ops as study
from dynatree_bench.studies.study import Asked
from dynatree_core import InputError, ops


def test_a_quick_run_measures_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "read_speed", lambda device: ReadSpeed(12.5e9, None))
    monkeypatch.setitem(limits.SIZES, "cpu", 16)
    if (reason := ops.reason_unavailable()) is not None:
        pytest.skip(f"the operators' library cannot be used: {reason}")
    found = study.measure(Asked(Models(), tmp_path, is_quick=True))
    assert set(found["seconds"]) == set(study.KINDS)
    assert all(len(found["seconds"][kind][str(rows)]) == 2 for kind in study.KINDS for rows in study.ROWS)
    times, shares = study.tables(found)
    assert times is not None
    assert shares is not None
    assert [row[0] for row in shares.rows] == list(study.KINDS)


def test_the_limit_is_reading_or_multiplying():
    said = {"weight_bytes": {"q4_1": 1e9}, "bytes_per_second": 1e10, "num_weights": 1e9, "flops": 1e11}
    assert study.limit(said, "q4_1", 1) == 0.1
    assert study.limit(said, "q4_1", 32) == pytest.approx(0.64)
    said["weight_bytes"]["q4_1/int8"] = 1e9
    assert study.limit(said, "q4_1/int8", 32) == 0.1


def test_without_the_library_there_is_nothing_to_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "reason_unavailable", lambda: "it is not here")
    with pytest.raises(InputError, match="it is not here"):
        study.measure(Asked(Models(), tmp_path, is_quick=True))
