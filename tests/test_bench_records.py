"""The files of a benchmark run: what is written is read back, and what is not as it should be is named."""

from __future__ import annotations

import json

import attrs
import pytest

from dynatree_bench.run.records import (
    MemoryInfo,
    MethodInfo,
    ModelInfo,
    OutputRecord,
    Replay,
    ResultsError,
    RunInfo,
    Steps,
    Trials,
    append_record,
    drop_torn_line,
    read_info,
    read_records,
    read_results,
    write_info,
)

INFO = RunInfo(
    experiment="main",
    command="dynatree bench main --quick",
    version="0.1.0",
    commit="abc-dirty",
    started="2026-11-22T03:00:00+00:00",
    target=ModelInfo("tiny", None, "float32", 1000),
    drafter=None,
    device="cpu",
    device_name="a processor",
    threads=1,
    libraries={"torch": "2.13.0"},
    seed=0,
    is_synthetic=False,
    ignore_eos=False,
    methods=(MethodInfo("linear K=6", "dynatree", "linear", None, {"tau": 0.0}),),
    axes={"max_new_tokens": [4]},
    memory=MemoryInfo(17.0e9, 2**25, 538_000_000),
)

RECORD = OutputRecord(
    experiment="main",
    method="linear K=6",
    prompt_id="prose-0",
    category="prose",
    axes={"max_new_tokens": 4},
    repeat=0,
    order=1,
    num_prompt_tokens=7,
    token_ids=(5, 6, 7, 8),
    stop_reason="length",
    prefill_seconds=0.5,
    decode_seconds=2.0,
    total_seconds=2.5,
    draft_seconds=0.5,
    verify_seconds=1.0,
    rest_seconds=0.5,
    overhead_seconds=0.6,
    peak_memory_bytes=None,
    is_identical=True,
    error=None,
    load=0.02,
    steps=Steps((3, 1), (3, 1), (1, 1), (2, 2)),
    trials=Trials((1, 2, 1), (0, 0, 0), (0.9, 0.5, 0.7), (True, False, True)),
    replay=Replay((0, 1, 0, -1), (0.9, 0.2, 0.7, 0.0)),
)


@pytest.fixture
def folder(tmp_path):
    write_info(tmp_path, INFO)
    append_record(tmp_path, RECORD)
    append_record(tmp_path, attrs.evolve(RECORD, repeat=1, steps=None, trials=None, replay=None, load=None))
    return tmp_path


def rewritten(folder, **changes):
    """The folder with fields of its first record's JSON changed, or taken out where the change is `...`."""
    path = folder / "records.jsonl"
    first, *others = path.read_text(encoding="utf-8").splitlines()
    fields = {**json.loads(first), **changes}
    fields = {name: value for name, value in fields.items() if value is not ...}
    path.write_text("\n".join([json.dumps(fields), *others, ""]), encoding="utf-8")
    return folder


def test_what_is_written_is_read_back(folder):
    results = read_results(folder)
    assert results.info == INFO
    assert results.records[0] == RECORD
    assert results.records[1].steps is None
    assert len(results.records) == 2


def test_each_line_is_in_the_file_when_it_is_appended(folder):
    append_record(folder, attrs.evolve(RECORD, repeat=2))
    assert (folder / "records.jsonl").read_text(encoding="utf-8").count("\n") == 3


def test_a_run_that_goes_on_has_one_more_date(folder):
    write_info(folder, attrs.evolve(INFO, continued=("2026-11-23",)))
    assert read_info(folder).continued == ("2026-11-23",)
    assert sorted(path.name for path in folder.iterdir()) == ["records.jsonl", "run.json"]


def test_what_an_earlier_version_did_not_write_is_as_if_it_had_not_been_measured(folder):
    path = folder / "run.json"
    fields = json.loads(path.read_text())
    assert "memory" in fields
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "memory"}))
    assert read_info(folder) == attrs.evolve(INFO, memory=None)


def test_a_run_without_an_output_has_no_records(tmp_path):
    write_info(tmp_path, INFO)
    assert read_results(tmp_path).records == ()
    assert not drop_torn_line(tmp_path)


def test_a_torn_last_line_is_left_out_and_can_be_dropped(folder):
    path = folder / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert len(read_records(folder)) == 2
    assert drop_torn_line(folder)
    assert path.read_bytes() == whole
    assert not drop_torn_line(folder)


def test_keys_tell_axes_and_repeats_apart():
    others = [attrs.evolve(RECORD, axes={"max_new_tokens": 8}), attrs.evolve(RECORD, repeat=1)]
    assert len({record.key for record in [RECORD, *others]}) == 3
    one, same = attrs.evolve(RECORD, axes={"a": 1, "b": 2}), attrs.evolve(RECORD, axes={"b": 2, "a": 1})
    assert one.key == same.key


def test_an_output_may_not_be_there_twice(folder):
    append_record(folder, RECORD)
    with pytest.raises(ResultsError, match=r"records.jsonl, line 3: .* line 1 has it"):
        read_records(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": ...}, "missing: method"),
        ({"speed": 3}, "unknown: speed"),
        ({"repeat": "0"}, "repeat must be of type int, got '0'"),
        ({"repeat": True}, "repeat must be of type int, got True"),
        ({"repeat": -1}, "'repeat' must be from 0"),
        ({"decode_seconds": -1.0}, "'decode_seconds' must be from 0"),
        ({"decode_seconds": float("nan")}, "a number must be finite, got NaN"),
        ({"token_ids": [1, 2.5, 3, 4]}, r"token_ids\[1\] must be of type int, got 2.5"),
        ({"token_ids": 5}, "token_ids must be a list, got 5"),
        ({"token_ids": [1, 2, 3]}, "steps must commit the 3 tokens of the output, got 4"),
        ({"axes": []}, "axes must be an object"),
        ({"steps": {"depth": []}}, "steps must have exactly the fields of Steps, missing: num_drafted"),
        ({"steps": [1]}, "steps must be an object"),
        ({"error": "one\ntwo"}, "must be one line"),
        ({"replay": {"rank": [0], "probability": [0.5]}}, "replay must have an entry for each of the 4 tokens, got 1"),
        (
            {"trials": {"depth": [1], "rank": [0], "probability": [0.5], "is_accepted": []}},
            "must be equally long, depth has 1, rank has 1, probability has 1, is_accepted has 0",
        ),
        ({"trials": {"depth": [1], "rank": [0], "probability": [1.5], "is_accepted": [True]}}, "'probability' must be"),
        (
            {"steps": {"num_drafted": [1], "depth": [2], "num_accepted": [2], "num_committed": [4]}},
            "a step must have num_accepted ≤ depth ≤ num_drafted",
        ),
    ],
)
def test_a_record_that_is_not_as_the_schema_has_it_is_named(folder, changes, expected):
    with pytest.raises(ResultsError, match=rf"records\.jsonl, line 1: .*{expected}"):
        read_records(rewritten(folder, **changes))


def test_a_line_that_is_no_json_is_named(folder):
    with (folder / "records.jsonl").open("a") as file:
        file.write("{]\n")
    with pytest.raises(ResultsError, match="line 3: Expecting property name"):
        read_records(folder)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"must hold run.json and records.jsonl"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema": 2}, "schema"),
        ({"threads": 0}, "'threads' must be from 1"),
        ({"memory": {"bytes_per_second": 0.0, "cache_bytes": 1, "step_bytes": 1}}, "'bytes_per_second' must be more"),
        ({"memory": {"bytes_per_second": 1.0, "cache_bytes": None}}, "missing: step_bytes"),
        ({"target": None}, "target must be an object, got None"),
        ({"methods": [{"name": "x", "kind": "other", "policy": None, "drafter": None, "options": {}}]}, "'kind' must"),
        ({"libraries": {"torch": 2}}, "libraries.torch must be of type str"),
    ],
)
def test_a_run_that_is_not_as_the_schema_has_it_is_named(folder, changes, expected):
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ResultsError, match=rf"run\.json: .*{expected}"):
        read_info(folder)
