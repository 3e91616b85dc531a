"""Reports from results that were made up: what stands in tables and figures, and what is left out."""

from __future__ import annotations

import csv

import attrs
import pytest
from fake_results import SOURCE, write_run

from dynatree_bench import figures
from dynatree_bench.experiments import EXPERIMENTS
from dynatree_bench.figures import FIGURES, draw, provenance
from dynatree_bench.published import compared, published
from dynatree_bench.records import Results, ResultsError, append_record, read_results, write_info
from dynatree_bench.report import report
from dynatree_bench.statistics import summaries
from dynatree_core.cli import main

PLOTS = {plot.name: plot for plot in FIGURES}
OWN = {  # the figure of each experiment
    "main": "phases", "ablation": "ablation", "sensitivity": "sensitivity", "scalability": "scalability",
    "tree-search": "tree-search", "prompt-length": "prompt-length", "datasets": "datasets",
}  # fmt: skip
COMMON = {"acceptance-over-length", "iteration-time", "calibration", "nodes", "accepted"}


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch):
    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 40)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of each experiment."""
    folder = tmp_path_factory.mktemp("runs")
    for name in EXPERIMENTS:
        write_run(folder, name, num_prompts=2, max_new_tokens=30)
    return folder


@pytest.fixture(scope="module")
def main_page(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures.STYLE, "savefig.dpi", 40)
        return report(runs / "main")


def rows_of(page, name):
    with (page.parent / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_report_has_all_methods_with_what_went_wrong(main_page):
    text = main_page.read_text(encoding="utf-8")
    assert text.startswith("# Benchmark results: main, synthetic pair")
    assert "**Synthetic**" in text
    assert "dynatree bench main --replay" in text
    for method in EXPERIMENTS["main"].methods:
        if method.name != "hf static compiled":  # only where it is asked for
            assert f"| {method.name} |" in text
    (economize,) = [line for line in text.splitlines() if line.startswith("| economize |")]
    assert "†" in economize
    assert "† Outputs that differ from greedy decoding: economize" in text
    assert "Outputs that failed: dejavuu 2 of 2. The first: dejavuu: RuntimeError" in text


def test_the_figures_are_there_and_named_in_the_page(main_page):
    drawn = {path.stem for path in (main_page.parent / "figures").iterdir()}
    assert drawn == {"phases", "shapes", *COMMON}
    text = main_page.read_text(encoding="utf-8")
    for name in drawn:
        assert f"(figures/{name}.png)" in text
        assert PLOTS[name].caption in text


def test_the_csv_file_has_the_numbers_of_the_statistics(runs, main_page):
    found = {one.method: one for one in summaries(read_results(runs / "main").records)}
    rows = {row["method"]: row for row in rows_of(main_page, "summary")}
    assert list(rows) == list(found)
    fixed, row = found["fixed"], rows["fixed"]
    assert float(row["speedup_median"]) == fixed.speedup.median
    assert float(row["tokens_per_second_sd"]) == fixed.tokens_per_second.sd
    assert float(row["tokens_per_iteration"]) == fixed.tokens_per_iteration
    assert (row["outputs"], row["failed"]) == ("2", "0")
    assert rows["hf generate"]["draft_ms"] == ""


def test_formulas_and_oracle_stand_beside_the_measurement(main_page):
    chain, tree = rows_of(main_page, "formulas")
    assert chain["method"].startswith("linear")
    assert (chain["depth"], chain["branch"], tree["depth"], tree["branch"]) == ("6", "1", "5", "2")
    p = float(chain["levels passed"])
    assert float(chain["expected tok/it"]) == pytest.approx(sum(p**i for i in range(7)))
    oracle = {row["method"].split(" ")[0]: row for row in rows_of(main_page, "oracle")}
    assert set(oracle) == {"linear", "fixed", "phase1", "phase2", "phase3", "phase3+governor", "cost_aware"}
    for row in oracle.values():
        assert 0 < float(row["share %"]) <= 100
        assert float(row["oracle tok/it"]) >= float(row["tok/it"])


def test_the_methods_that_differ_are_marked_in_the_figure(runs):
    results = read_results(runs / "main")
    figure = PLOTS["phases"].draw(results)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "economize †" in labels
    assert "fixed" in labels


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_has_its_own_figure_and_no_other_s(runs, name, tmp_path):
    results = read_results(runs / name)
    for own in set(OWN.values()):
        assert draw(PLOTS[own], results, tmp_path / f"{own}.png") == (own == OWN[name])
    assert [path.stem for path in tmp_path.iterdir()] == [OWN[name]]


def test_the_heat_map_frames_the_best_tree(runs):
    results = read_results(runs / "tree-search")
    found = [one for one in summaries(results.records) if one.method == "fixed"]
    best = max(one.speedup.median for one in found)
    figure = PLOTS["tree-search"].draw(results)
    framed = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_weight() == "bold"]
    assert framed == [f"{best:.2f}"]


def test_what_a_run_does_not_have_is_not_drawn(runs, tmp_path):
    results = read_results(runs / "main")
    foreign = Results(results.folder, results.info, tuple(r for r in results.records if r.steps is None))
    for name in COMMON:
        assert not draw(PLOTS[name], foreign, tmp_path / "none.png")
    no_replay = tuple(attrs.evolve(record, replay=None) for record in results.records)
    figure = PLOTS["nodes"].draw(Results(results.folder, results.info, no_replay))
    assert "oracle tree" not in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    results = read_results(runs / "ablation")
    for name in ("one.png", "two.png"):
        assert draw(PLOTS["accepted"], results, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_provenance_says_where_the_numbers_come_from(runs):
    said = provenance(read_results(runs / "main"))
    for part in (
        "made up, target, 135 M parameters, float32",
        "synthetic tiny, drafter",
        "a processor that does not exist (cpu), 2 threads",
        "dynatree 0.1.0 (0123456789-dirty), torch 2.13.0",
        "seed 0",
        "2026-11-22",
        "dynatree bench main --replay",
    ):
        assert part in said


def test_a_run_without_the_baseline_has_no_speedups_and_says_so(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (PLOTS["phases"],))
    results = read_results(runs / "main")
    write_info(tmp_path, attrs.evolve(results.info, is_synthetic=False, ignore_eos=True, notes=("it rained",)))
    for record in results.records:
        if record.method == "fixed":
            append_record(tmp_path, record)
    page = report(tmp_path, tmp_path / "elsewhere")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "elsewhere" / "report.md"
    assert "There are no outputs of `autoregressive`, so there are no speedups." in text
    assert "End tokens were ignored" in text
    assert "It rained." in text
    assert "Synthetic" not in text
    assert "| speedup |" not in text


def test_a_folder_of_runs_has_a_page_for_each(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (PLOTS["accepted"],))
    for name in ("ablation", "datasets"):
        (tmp_path / name).symlink_to(runs / name)
    text = report(tmp_path, tmp_path / "out").read_text(encoding="utf-8")
    for name in ("ablation", "datasets"):
        assert f"({name}/report.md)" in text
        assert (tmp_path / "out" / name / "report.md").exists()


def test_where_there_is_nothing_to_report_it_says_so(runs, tmp_path):
    with pytest.raises(ResultsError, match="there must be results in"):
        report(tmp_path)
    write_info(tmp_path, read_results(runs / "main").info)
    with pytest.raises(ResultsError, match="has none yet"):
        report(tmp_path)
    with pytest.raises(ResultsError, match=r"must hold run\.json"):
        report(tmp_path / "missing")


def test_the_command(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FIGURES", (PLOTS["accepted"],))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "report", str(runs / "datasets"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "report.md")]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "report", str(tmp_path)])
    assert ended.value.code == 2
    assert "there must be results in" in capsys.readouterr().err


# published shapes


def test_published_numbers_stand_relative_to_their_own_reference(runs):
    pair = compared(read_results(runs / "main"))
    assert pair.theirs["fixed"]["fixed"] == pair.ours["fixed"]["fixed"] == 1
    assert pair.theirs["phase3"]["phase3"] == pytest.approx(210.8 / 181.3)
    assert set(pair.ours) == set(pair.theirs) == {"autoregressive", "linear", "fixed", "phase1", "phase2", "phase3"}
    found = {one.method: one.tokens_per_second.mean for one in summaries(read_results(runs / "main").records)
             if one.tokens_per_second}  # fmt: skip
    assert pair.ours["linear"]["linear"] == pytest.approx(found["linear"] / found["fixed"])


@pytest.mark.parametrize(
    ("name", "method", "tick", "expected"),
    [
        ("ablation", "phase3", "4", 189.4 / 177.0),
        ("sensitivity", "phase3", "[2, 4]", 145.9 / 180.5),
        ("sensitivity", "phase3", "0.7/0.2", 169.9 / 180.5),
        ("scalability", "phase3", "100", 110.0 / 192.2),
    ],
)
def test_published_shapes_by_hand(runs, name, method, tick, expected):
    pair = compared(read_results(runs / name))
    assert pair.theirs[method][tick] == pytest.approx(expected)
    assert tick in pair.ours[method]


def test_experiments_without_published_numbers_have_no_shapes(runs):
    assert compared(read_results(runs / "datasets")) is None
    results = read_results(runs / "main")
    others = tuple(record for record in results.records if record.method != "fixed")
    assert compared(Results(results.folder, results.info, others)) is None  # without its reference


def test_published_numbers_are_attributed():
    numbers = published()
    assert "A100" in numbers.pop("source")
    assert set(numbers) <= set(EXPERIMENTS)


# the results that are made up


def test_what_is_made_up_is_decoded_as_its_source_says(runs):
    """So the figures show what a run would: chains of 6 have the tokens per iteration of the source's acceptance."""
    (linear,) = [one for one in summaries(read_results(runs / "main").records) if one.method == "linear"]
    assert linear.nodes_per_iteration <= 6
    assert 1.5 < linear.tokens_per_iteration < 4.5
    assert SOURCE.acceptance == 0.65
