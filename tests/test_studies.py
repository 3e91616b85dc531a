"""Studies: how they are found, what they leave behind, the committed results, and each on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest

from dynatree_bench.bench_cli import bench
from dynatree_bench.report.series import Panel, draw_panels
from dynatree_bench.report.style import GREY, VERMILION, line_styles
from dynatree_bench.report.tables import Spread, markdown
from dynatree_bench.run.pairs import Models
from dynatree_bench.run.progress import in_rounds
from dynatree_bench.studies import batch, long_context, memory, runners, serve
from dynatree_bench.studies.names import studies
from dynatree_bench.studies.study import Asked, Found, find_study, read_found, run_study, write_report
from dynatree_core import InputError, load_model, ops

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PROVENANCE = {"command", "commit", "date", "versions", "device", "threads", "seed", "busy_percent"}


def runners_found(**seconds: dict[str, list[float]]) -> dict[str, object]:
    return {"provenance": {"model": "tiny", "context": 256}, "seconds": seconds}


@pytest.mark.parametrize("name", studies())
def test_each_file_is_a_study_with_a_question_and_options_that_there_are(name):
    assert studies()[name].endswith("?") or name == "rehearse"
    context = click.Context(bench)
    command = bench.get_command(context, name)
    assert command.help == studies()[name]
    named = {option.name for option in command.params}
    wanted = {*find_study(name).options} - {"picks"}
    assert wanted <= named, "an option of the study that `dynatree bench` does not have"
    assert named - wanted <= {
        "is_quick", "threads", "seed", "with_report", "out", "column", "categories", "is_played",
    }  # fmt: skip


def test_a_name_that_is_none_is_told_with_the_nearest():
    with pytest.raises(InputError, match=r"'runner' is not a study \(did you mean 'runners'\?\)"):
        find_study("runner")


def test_jobs_take_turns_and_the_first_round_does_not_count():
    done: list[tuple[str, int]] = []
    jobs = [lambda turn, name=name: done.append((name, turn)) for name in "abc"]
    in_rounds(jobs, 2)
    assert done == [(name, turn) for turn, names in enumerate(("abc", "bca", "cab")) for name in names]


def test_a_spread_shows_median_and_quartiles():
    assert str(Spread.of([2.0])) == "2.00"
    assert str(Spread.of([3.0, 1.0, 2.0], digits=0)) == "2 (1–3)"
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0], scale=10) == Spread(30.0, 15.0, 520.0)


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="`dynatree bench report` writes must go to a folder that is new"):
        write_report(read_found(RESULTS / "runners.json"), tmp_path)
    with pytest.raises(InputError, match="`dynatree bench` writes must go to a folder that is new"):
        run_study("runners", Asked(Models(), tmp_path), command="the command")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("text", "said"), [("{", "JSONDecodeError"), ("{}", "KeyError: 'study'"), ("[]", "TypeError")])
def test_what_is_no_result_of_a_study_says_so(text, said, tmp_path):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=said):
        read_found(tmp_path)
    with pytest.raises(InputError, match="must hold the results of a study, got FileNotFoundError"):
        read_found(tmp_path / "none")


def test_a_line_has_one_colour_in_all_panels_of_a_figure(tmp_path):
    line = {1: Spread.of([1.0]), 2: Spread.of([2.0])}
    methods = dict.fromkeys(("phase3", "someone's", "autoregressive", *"abcdefgh"), line)
    panels = [Panel("all", "x", "y", methods), Panel("some", "x", "y", {"b": line, "someone's": line})]
    draw_panels(panels, "figure", "foot", tmp_path / "figure.svg")
    styles = line_styles(methods)
    assert (styles["phase3"]["color"], styles["autoregressive"]["color"]) == (VERMILION, "#000000")
    assert len({tuple(style.values()) for style in styles.values()}) == len(methods)
    assert VERMILION not in {style["color"] for name, style in styles.items() if name != "phase3"}
    _, _, second = (tmp_path / "figure.svg").read_text().partition('id="axes_2"')
    coloured = {style["color"] for style in styles.values()} - {"#000000", GREY}  # which text has too
    drawn = {colour for colour in coloured if colour.lower() in second}
    assert drawn == {styles["b"]["color"], styles["someone's"]["color"]}


def test_a_line_goes_from_left_to_right_whatever_was_measured_first(tmp_path):
    one, two, four = (Spread.of([value]) for value in (1.0, 2.0, 4.0))
    for name, line in {"in order": {1: one, 2: two, 4: four}, "mixed": {1: one, 4: four, 2: two}}.items():
        draw_panels([Panel("title", "x", "y", {"phase3": line})], "figure", "foot", tmp_path / f"{name}.svg")
    assert (tmp_path / "mixed.svg").read_text() == (tmp_path / "in order.svg").read_text()


COMMITTED = {
    "drafter_value.json": ("drafter-value", "agreement-distilled"),
    "long-context.json": ("long-context", "passes"),
    "rehearsed.json": ("rehearse", "policies"),
    "runners.json": ("runners", "relative"),
}


@pytest.mark.parametrize("file", COMMITTED)
def test_committed_results_are_read(file, tmp_path):
    name, table = COMMITTED[file]
    found = read_found(RESULTS / file)
    assert found.name == name
    page = write_report(found, tmp_path).read_text(encoding="utf-8")
    assert f"`{found.said['command']}`" in page or found.said["command"] in page
    assert table in {one.name for one in found.tables}
    figures = list(tmp_path.glob("figures/*.svg"))
    assert len(figures) == (name in ("long-context", "runners"))
    first = [figure.read_bytes() for figure in figures]
    write_report(found, tmp_path)
    assert [figure.read_bytes() for figure in figures] == first, "the same figure of the same numbers"


def test_the_committed_page_has_the_numbers_of_the_committed_file():
    page = (RESULTS / "runners.md").read_text(encoding="utf-8").splitlines()
    for table in read_found(RESULTS / "runners.json").tables:
        rows = [line for line in markdown(table) if line.startswith("|")]
        assert len(rows) > 2
        assert [line for line in rows if line not in page] == []


def test_a_busy_machine_is_said(tmp_path):
    said = {
        "busy_percent": {"meanwhile": 11.0},
        "versions": {},
        "device": "d",
        "threads": 1,
        "date": "",
        "command": "c",
    }
    found = Found("runners", runners_found(**{runners.PLAIN: {"1": [1.0]}}) | {"provenance": said | {"context": 9}})
    assert found.sentences == [
        "the machine was busy, so the times are not to be believed: others used 11 % of a core meanwhile"
    ]
    assert "provisional" in write_report(found, tmp_path).with_name("figures").joinpath("runners.svg").read_text()


def test_a_pass_is_relative_to_the_plain_one_of_its_round():
    found = runners_found(**{runners.PLAIN: {"1": [1.0, 2.0, 4.0]}, "other": {"1": [2.0, 4.0, 8.0]}})
    assert runners.relative(found, "other", "1") == Spread(2.0, 2.0, 2.0)
    found["seconds"]["other"]["1"] = [1.0, 4.0, 12.0]
    assert runners.relative(found, "other", "1").median == 2.0


def test_runners_on_a_tiny_model(character_target, tmp_path):
    found = run_study("runners", Asked(Models(str(character_target)), tmp_path, is_quick=True), command="the command")
    assert set(found.said) >= PROVENANCE | {"model", "context", "rounds"}
    assert found.said["command"] == "the command"
    seconds = found.found["seconds"]
    assert {runners.PLAIN, "bfloat16 eager"} <= set(seconds)
    own = {"float32 native", "stored native"}
    assert own & set(seconds) == (own if ops.reason_unavailable() is None else set()), "it computes in float32 only"
    assert "bfloat16 native" not in seconds
    assert all(len(rounds) == 1 for by_rows in seconds.values() for rounds in by_rows.values())
    assert [[row[0] for row in table.rows] for table in found.tables] == [["1", "2", "4"]] * 2


@pytest.fixture(scope="module")
def long_target(character_target, tmp_path_factory):
    """The same model with room for a window."""
    folder = tmp_path_factory.mktemp("long") / "target"
    shutil.copytree(character_target, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_long_contexts_on_a_tiny_model(long_target, tmp_path):
    asked = Asked(Models(str(long_target)), tmp_path, is_quick=True)
    found = run_study("long-context", asked, command="the command")
    assert set(found.said) >= PROVENANCE | {"model", "plan"}
    assert set(found.found["memory"]) == {long_context.ALL, long_context.WINDOW}
    assert {"autoregressive", "phase3"} <= set(found.found["tokens"])
    assert {"1 row, model alone", "8 rows, eager"} <= set(found.found["passes"])
    for name in long_context.TITLES:
        for by_context in found.found[name].values():
            assert {context: len(rounds) for context, rounds in by_context.items()} == {"64": 1, "256": 1}
    assert [table.header for table in found.tables] == [("tokens of context", "64", "256")] * 5
    # keys and values of 2 heads of 8 in 3 layers, float32
    assert found.found["memory"][long_context.ALL]["64"] == [63 * 2 * 2 * 8 * 3 * 4 / 2**20]


def test_no_context_is_measured_twice():
    assert long_context.within((512, 4096, 6144, 8192), 4000) == (512, 4000)
    with pytest.raises(InputError, match=r"--max-new-tokens must leave 2 tokens .* leaves -8"):
        long_context.within((512,), -8)


def test_a_bare_pass_is_that_of_the_model_without_a_mask(long_target):
    """It sees the same slots as a pass over the tree, and leaves the cache as it was."""
    default = load_model(str(long_target), device="cpu", dtype="float32")
    caches = long_context.Caches(default, 40)
    caches.fill(list(range(20)))
    assert caches.bare_pass(4) > 0
    assert (caches.bare.length, caches.bare.min_slots, caches.kept[long_context.ALL].length) == (20, 0, 20)
    caches.fill(list(range(30)))
    assert caches.bare.length == 30


def test_the_peak_is_that_of_the_work():
    def peak(size: int) -> int:
        return memory.peak_memory(lambda: len(b"x" * size))

    large, small = peak(2**28), peak(1)
    if small == 0:
        pytest.skip("this system does not tell a process its peak")
    assert large - small == pytest.approx(2**28, rel=0.1)


def test_peaks_are_relative_to_autoregressive_decoding():
    peaks = {"autoregressive": 2**20, "fixed": 2**20, "phase3": 3 * 2**19}
    [table] = memory.tables({"peaks": {"as it comes": peaks}})
    assert table.rows[-1] == ("as it comes", "phase3", "1.50", "50.00")
    unknown = {"peaks": {"as it comes": dict.fromkeys(memory.METHODS, 0)}}
    assert list(memory.tables(unknown)) == [None]
    assert memory.sentences(unknown) == ("not measured: this system does not tell a process its peak",)


@pytest.mark.slow
def test_memory_of_a_tiny_model(character_target, tmp_path):
    asked = Asked(Models(str(character_target)), tmp_path, is_quick=True)
    found = run_study("memory", asked, command="the command")
    assert set(found.found["peaks"]) == set(memory.SETTINGS)
    assert all(set(of_methods) == set(memory.METHODS) for of_methods in found.found["peaks"].values())
    assert json.loads((tmp_path / "study.json").read_text())["study"] == "memory"


def test_batches_on_a_tiny_model(character_target, tmp_path):
    """Every output is that of the prompt alone, ours and others'; what is told of passes is what they were."""
    models = Models(str(character_target), ("prompt_lookup",), device="cpu")
    policies = ("linear(depth=2)", "phase3+governor")
    asked = Asked(models, tmp_path, is_quick=True, policies=policies, batch_sizes=(1, 3), max_new_tokens=(5,))
    found = run_study("batch", asked, command="the command")
    assert set(found.said) >= PROVENANCE | {"target", "dtype", "drafter", "sizes", "rounds", "max_new_tokens"}
    numbers, methods = found.found, [batch.PLAIN, *policies, batch.PADDED, batch.CONTINUOUS]
    assert numbers["errors"] == {}
    assert list(numbers["total"]) == sorted(methods, key=list(numbers["total"]).index)
    assert set(numbers["total"]) == set(methods)
    # 4 prompts for one lane, and 12 for three
    assert numbers["same"] == {name: [16, 16] for name in methods}
    for name in methods:
        assert {size: len(values) for size, values in numbers["total"][name].items()} == {"1": 1, "3": 1}
        # a runner that does not go through its model's embedding, such as `native`, tells nothing of padding
        assert all(0 <= one < 1 for values in numbers["padding"].get(name, {}).values() for one in values)
    assert numbers["padding"].get(batch.PLAIN, {"1": [0]})["1"] == [0]
    assert numbers["padding"][batch.PADDED]["3"][0] > 0
    assert numbers["drafted"][batch.PLAIN] == {"1": [0], "3": [0]}
    assert numbers["drafted"]["linear(depth=2)"]["3"][0] > 0
    assert numbers["committed"][batch.PLAIN] == {"1": [1], "3": [1]}
    assert set(numbers["partly"]) == {*methods} - {batch.PADDED}
    for by_size in numbers["partly"].values():
        assert by_size["1"] == [0]  # one lane is full to the end
        assert 0 < by_size["3"][0] < 1
    assert numbers["pause"]["longest"] >= numbers["pause"]["usual_meanwhile"] > 0
    assert [table.name for table in found.tables] == [
        "total", "each", "relative", "whole", "partly", "drafted", "committed", "padding", "host", "pause",
    ]  # fmt: skip
    assert "all 48 outputs of ours are those of each sequence alone" in found.sentences
    page = write_report(found, tmp_path / "report")
    assert "what trees are worth" in (page.parent / "figures" / "batch.svg").read_text()


def test_tokens_count_while_all_lanes_are_full():
    """Two lanes, four sequences that end at 2, 3, 5 and 7: from 2 to 5 both are full."""
    times = [[1.0, 2.0], [1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [4.0, 5.0, 6.0, 7.0]]
    found = batch.while_full(2, 0.0, [2.0, 3.0, 5.0, 7.0], times)
    assert found == {"total": 6 / 3, "partly": 2 / 7}


def batch_found(**total: dict[str, list[float]]) -> dict[str, object]:
    names = ("each", *batch.MORE)
    pause = {"num_running": 4, "prompt_tokens": 9, "usual": 1.0}
    same = {name: [2, 2] for name in total}
    return {
        "provenance": {"sizes": [1, 4]}, "total": total, "same": same, "errors": {}, "pause": pause,
        **{name: {} for name in names},
    }  # fmt: skip


def test_a_policy_is_judged_by_plain_decoding_in_the_same_round():
    found = batch_found(
        **{batch.PLAIN: {"1": [10.0, 20.0], "4": [30.0, 60.0]}, "phase3": {"1": [20.0, 40.0], "4": [15.0, 30.0]}}
    )
    assert batch.relative(found, "phase3", "1") == Spread(2.0, 2.0, 2.0)
    assert "phase3 pays with 1 at once" in batch.sentences(found)
    found["host"] = {"phase3": {"1": [2.0], "4": [3.5]}}
    assert batch.growth(found, "phase3") == 0.5
    assert batch.growth(found, batch.PLAIN) is None


def test_a_wrong_output_and_a_method_that_does_not_run_are_told_first():
    found = batch_found(**{batch.PLAIN: {"1": [1.0]}, "phase3": {"1": [0.5]}})
    found["same"]["phase3"] = [1, 2]
    found["errors"][batch.CONTINUOUS] = "RuntimeError: no"
    assert [*batch.sentences(found)] == [
        "phase3: 1 of 2 outputs are not those of plain decoding alone",
        f"{batch.CONTINUOUS} does not run here: RuntimeError: no",
        "phase3 pays at no size",
    ]


@pytest.mark.slow  # it starts servers
def test_the_server_of_a_tiny_model_under_load(character_target, tmp_path, monkeypatch):
    """Whole answers are right, those that were cut off, malformed or oversized are what they should be."""
    monkeypatch.setattr(serve, "find_spec", lambda name: None)  # `transformers serve` has tests of its own
    models = Models(str(character_target), ("prompt_lookup",), device="cpu")
    asked = Asked(models, tmp_path, is_quick=True, policies=("fixed",), batch_sizes=(1, 3), num_prompts=16)
    found = run_study("serve", asked, command="the command")
    assert "none of 64 requests to our server went wrong" in found.sentences
    assert set(found.found["errors"]) == set(serve.THEIRS)
    for policy in ("fixed", serve.PLAIN):
        counts = found.found["outcomes"][policy]
        assert counts == {"whole: right": 26, "cut off: cut": 2, "malformed: refused": 2, "oversized: refused": 2}
        assert {size: len(values) for size, values in found.found["total"][policy].items()} == {"1": 1, "3": 1}
        assert len(found.found["first"][policy]["3"]) == 14
    assert [table.name for table in found.tables] == ["total", *serve.WAITS, "memory", "outcomes"]
    assert found.found["memory"]["dynatree serve"][0][1] > 100
    page = write_report(found, tmp_path / "report")
    assert "first token" in (page.parent / "figures" / "serve.svg").read_text()


def test_wrong_answers_of_the_server_are_told_first():
    said = {"clients": [8]}
    outcomes = {"phase3": {"whole: right": 7, "whole: wrong": 1, "whole: failed (500)": 2}}
    found = {"provenance": said, "outcomes": outcomes | {next(iter(serve.THEIRS)): {"whole: wrong": 3}}, "errors": {}}
    assert serve.sentences(found) == [
        "3 of 10 requests to our server went wrong",
        "transformers serve: 3 of 3 answers differ from plain decoding alone",
    ]


def test_a_server_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(serve.ServerError, match="did not: No module"),
        serve.started(["-c", "raise SystemExit('No module')"], "model", tmp_path / "log", is_ours=True),
    ):
        pytest.fail("it must not begin")


def test_percentiles_are_values_that_were_there():
    values = [float(value) for value in range(100)]
    assert [serve.percentile(values, percent) for percent in (50, 95, 99)] == [50.0, 95.0, 99.0]
    assert serve.percentile([3.0], 99) == 3.0
    assert serve.percentile([], 50) is None


def test_a_server_is_told_to_have_written_the_tokens_of_its_usage():
    """Chunks without a text, such as that of the end token, are not counted one by one."""

    def line(**record):
        return b"data: " + json.dumps(record).encode() + b"\n"

    chunk = line(choices=[{"delta": {"content": "ab"}}], dynatree={"texts": ["a", "b"]})
    end = line(choices=[{"delta": {}}], dynatree={"texts": [""]})
    lines = [chunk, b"\n", end, line(choices=[], usage={"completion_tokens": 3}), b"data: [DONE]\n"]
    question = serve.Question("whole", [], 3, "ab")
    assert [serve._listen(some, question, 0.0).num_tokens for some in (lines, lines[:3])] == [3, 2]
