"""`dynatree profile`: where an iteration's time goes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import click.testing
import pytest

from dynatree_bench.profile_cli import profile as command
from dynatree_bench.run.profile import Start, is_trace, profile, start_of_a_generation
from dynatree_core.errors import InputError
from dynatree_core.testing.models import perturbed, tiny_model


def test_stages_operators_and_trace(tmp_path: Path) -> None:
    trace = tmp_path / "new" / "trace.json.gz"
    target = tiny_model("llama")
    found = profile(target, perturbed("llama"), [1, 2, 3], num_iterations=5, trace=trace, policy="fixed(depth=2)")
    assert (found.num_iterations, found.runner) == (5, "eager")
    assert 1 <= found.tokens_per_iteration <= 3
    assert min(found.stages.values()) > 0
    times = [operator.milliseconds for operator in found.operators]
    assert times == sorted(times, reverse=True)
    calls = {operator.name: operator.calls for operator in found.operators}
    assert calls["dynatree: decode"] == calls["dynatree: verify"] == 1
    assert calls["dynatree: draft_forward"] == 2, "a pass for each level"
    assert calls["aten::linear"] > 0
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"dynatree: decode", "dynatree: verify", "aten::linear"} <= names


def test_more_iterations_than_there_is_room_for() -> None:
    with pytest.raises(InputError, match=r"9 iterations after 4 .* ended with 'length' after 10; ask for fewer"):
        profile(tiny_model("llama"), None, [1], num_iterations=9, policy="autoregressive", max_new_tokens=10)


def test_a_trace_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dynatree_bench.run.profile.Session", lambda *asked, **named: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a file that can be written, got .*trace\.json, .*choose another"):
        profile(tiny_model("llama"), None, [1], trace=tmp_path / "file" / "trace.json")


def test_the_start_of_a_generation() -> None:
    ticks = iter([0.0, 50.0, 60.0, 70.0, 100.0, 103.0, 200.0, 200.5, 300.0, 302.0, 400.0, 400.75])
    found = start_of_a_generation(
        tiny_model("llama"), "prompt_lookup", [1, 2], num_starts=2, now=lambda: next(ticks), runner="eager"
    )
    assert found == Start(2, 2000.0, 500.0), "the first of each kind does not count, then the fastest does"


def test_the_command_shows_what_a_start_takes(character_target: Path) -> None:
    arguments = ["--target", str(character_target), "--drafter", "prompt_lookup", "--start", "aab"]
    done = click.testing.CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    for expected in ("the fastest of 30", "Session(target, drafter, ...)", "Session.on(engine, ...)"):
        assert expected in done.output
    done = click.testing.CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["on_engine_ms"] > 0
    done = click.testing.CliRunner().invoke(command, [*arguments, "--trace", "trace.json"])
    assert (done.exit_code, "got it beside --start" in done.output) == (2, True)


def test_the_command(character_target: Path, tmp_path: Path) -> None:
    arguments = ["--target", str(character_target), "--drafter", "prompt_lookup", "--iterations", "3", "aab"]
    done = click.testing.CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    for expected in ("target's passes", "the drafter's rest", "in all", "operators", "dynatree: decode"):
        assert expected in done.output
    done = click.testing.CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["num_iterations"] == 3
    traced = [*arguments, "--trace", str(tmp_path / "trace.json")]
    done = click.testing.CliRunner().invoke(command, traced, catch_exceptions=False)
    assert "open it in" in done.output
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert is_trace(tmp_path / "trace.json"), "a later run may replace it"


@pytest.mark.parametrize(("name", "held"), [("mine.json", b'{"traceEvents": []}'), ("mine.json.gz", b"no gzip")])
def test_what_is_no_trace_is_not_replaced(name: str, held: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(held)
    with pytest.raises(InputError, match=r"`dynatree profile` writes must go to a file that is new, .* got .*mine"):
        profile(tiny_model("llama"), None, [1], trace=tmp_path / name)
    assert (tmp_path / name).read_bytes() == held
