"""Reports from results that were made up: what stands on the page and in its tables."""

from __future__ import annotations

import csv
import random
import re

import attrs
import numpy as np
import pytest
from fake_results import READING, ROW, SOURCE, STEP

from dynatree_bench.data.published import published
from dynatree_bench.report import figures
from dynatree_bench.report.figures import FIGURES, provenance
from dynatree_bench.report.memory_share import memory_sentence
from dynatree_bench.report.page import TABLES, report
from dynatree_bench.report.shapes import compared
from dynatree_bench.report.statistics import summaries
from dynatree_bench.run.experiments import EXPERIMENTS
from dynatree_bench.run.records import Results, ResultsError, append_record, read_results, write_info
from dynatree_core.cli.group import main

pytestmark = pytest.mark.usefixtures("_small_figures")


PLOTS = {plot.name: plot for plot in FIGURES}


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


def test_a_report_says_what_its_ratios_are_worth(runs, main_page, tmp_path, monkeypatch):
    sentence = memory_sentence(read_results(runs / "main"))
    assert sentence.startswith("memory is read at 34.8 GB/s here; plain decoding reads 540 MB of weights in ")
    assert f"**What a ratio is worth**: {sentence}.\n" in main_page.read_text(encoding="utf-8")
    shares = {row["method"]: row["bandwidth_share"] for row in rows_of(main_page, "summary")}
    by_name = {one.method: one for one in summaries(read_results(runs / "main").records)}
    for name in ("autoregressive", "phase3"):
        assert float(shares[name]) == pytest.approx(READING / by_name[name].iteration_seconds)
    assert 0.4 < float(shares["autoregressive"]) < 0.6, "a step takes twice as long as reading"
    assert shares["hf generate"] == "", "it does not tell its iterations"
    results = read_results(runs / "main")
    before = attrs.evolve(results, info=attrs.evolve(results.info, memory=None))
    monkeypatch.setattr("dynatree_bench.report.page.read_results", lambda folder: before)
    page = report(runs / "main", tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "What a ratio is worth" not in text
    assert "GB/s" not in text
    assert {row["bandwidth_share"] for row in rows_of(page, "summary")} == {""}


def table_rows(page, title):
    """The cells of a table of the page, its header among them."""
    part = page.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "---" not in line]


def test_calibration_and_the_length_have_a_row_for_each_method_that_drafts(main_page):
    header, *rows = table_rows(main_page, "Calibration")
    assert header[1:] == sorted(header[1:])
    assert set(header[1:]) <= {f"{i / 10:.1f}–{(i + 1) / 10:.1f}" for i in range(10)}
    numbers = rows_of(main_page, "calibration")
    assert len(numbers) == sum(cell != "–" for row in rows for cell in row[1:])
    one = next(row for row in numbers if row["method"] == "phase3")
    assert f"{100 * float(one['accepted']):.1f} % of {one['nodes']}" in next(row for row in rows if row[0] == "phase3")
    header, *rows = table_rows(main_page, "Along the output")
    assert header == ["method", "from token 0 to 10", "from token 10 to 20", "from token 20 to 30"]
    names = [row[0] for row in rows]
    assert {"linear", "phase3"} <= set(names)
    assert not {"autoregressive", "autoregressive eager", "autoregressive sinks"} & set(names), "these draft nothing"


def test_what_stands_for_its_method_alone_has_no_second_column(runs, main_page):
    header, *rows = table_rows(main_page, "Shapes beside the published ones")
    assert header == ["method", "this run", "published"]
    assert rows[0][0] == "autoregressive"


def test_few_prompts_are_said(runs, tmp_path, monkeypatch):
    results = read_results(runs / "main")
    said = "The prompts are few (2): intervals of fewer than about 10 are too narrow"
    assert said in report(runs / "main", tmp_path / "few").read_text(encoding="utf-8")
    more = tuple(attrs.evolve(r, prompt_id=f"{r.prompt_id}-{i}") for i in range(5) for r in results.records)
    monkeypatch.setattr("dynatree_bench.report.page.read_results", lambda folder: attrs.evolve(results, records=more))
    assert "The prompts are few" not in report(runs / "main", tmp_path / "more").read_text(encoding="utf-8")


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


def test_the_first_table_has_pooled_speedups_overall_and_by_category(runs, tmp_path, monkeypatch):
    """Prompts that take 3 s and 1 s without drafting, and 1 s and 1 s with it; one that failed does not count."""
    monkeypatch.setattr(figures, "FIGURES", ())
    results = read_results(runs / "main")
    one = next(record for record in results.records if record.method == "fixed")
    write_info(tmp_path, results.info)
    for method, times in {"autoregressive": (3.0, 1.0), "hf generate": (6.0, 2.0), "fixed": (1.0, 1.0)}.items():
        for category, seconds in zip(("prose", "code"), times, strict=True):
            changes = {"method": method, "prompt_id": category, "category": category, "decode_seconds": seconds}
            append_record(tmp_path, attrs.evolve(one, **changes, is_identical=method != "fixed"))
    append_record(tmp_path, attrs.evolve(one, prompt_id="x", category="code", error="it broke"))
    page = report(tmp_path)
    lines = page.read_text(encoding="utf-8").splitlines()
    start = lines.index("## Speedup over all prompts")
    assert not any(line.startswith("## ") for line in lines[:start])
    header, _, _, _, fixed = lines[start + 2 : start + 7]
    assert header == "| method | against autoregressive | against hf generate | tokens/iteration | prose | code |"
    tokens = sum(one.steps.num_committed) / len(one.steps.depth)
    assert fixed == f"| fixed † | 2.00 [1.00, 3.00] | 4.00 [2.00, 6.00] | {tokens:.2f} | 3.00 | 1.00 |"
    row = rows_of(page, "pooled")[-1]
    assert {name: row[name] for name in ("method", "speedup", "speedup_low", "hf_speedup_high", "speedup_count")} == {
        "method": "fixed", "speedup": "2.0", "speedup_low": "1.0", "hf_speedup_high": "6.0", "speedup_count": "2",
    }  # fmt: skip
    assert (row["speedup prose"], row["speedup code"]) == ("3.0", "1.0")


def test_without_categories_a_pooled_speedup_stands_for_each_point(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    page = report(runs / "scalability", tmp_path)
    results = read_results(runs / "scalability")
    rows = rows_of(page, "pooled")
    assert [row["max_new_tokens"] for row in rows if row["method"] == "fixed"] == ["100", "200", "500", "1000"]
    assert not any(name.startswith("speedup ") for name in rows[0])
    for one, row in zip(summaries(results.records), rows, strict=True):
        assert (row["method"], row["max_new_tokens"]) == (one.method, str(one.axes["max_new_tokens"]))
    assert "against hf generate" not in page.read_text(encoding="utf-8")


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


def test_passes_are_priced_by_methods_with_the_run_s_runner_only(runs, tmp_path, monkeypatch):
    """With the eager runner a plain pass takes ten times as long; averaged in, further rows would cost nothing."""
    monkeypatch.setattr(figures, "FIGURES", ())
    results = read_results(runs / "main")
    write_info(tmp_path, results.info)
    for record in results.records:
        is_eager = record.method == "autoregressive eager"
        append_record(tmp_path, attrs.evolve(record, verify_seconds=10 * record.verify_seconds) if is_eager else record)
    expected = report(runs / "main", tmp_path / "expected")
    page = report(tmp_path)
    assert rows_of(page, "worth") == rows_of(expected, "worth")
    (note,) = [line for line in page.read_text(encoding="utf-8").splitlines() if "a row verified in" in line]
    assert float(re.search(r"a row verified in (\S+)", note)[1]) == pytest.approx(ROW / STEP, rel=0.5)


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


def test_what_an_earlier_report_had_and_this_one_has_not_is_removed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (PLOTS["ablation"],))
    for name in ("figures/ablation.png", "figures/mine.png", "tables/oracle.csv", "tables/mine.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    results = read_results(runs / "datasets")
    write_info(tmp_path / "run", results.info)
    for record in results.records:
        append_record(tmp_path / "run", attrs.evolve(record, replay=None))
    report(tmp_path / "run", tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["mine.png"]
    found = {path.stem for path in (tmp_path / "tables").iterdir()}
    assert {"pooled", "summary", "mine"} <= found <= {*TABLES, "mine"}
    assert "oracle" not in found


def test_an_output_without_a_decoding_time_has_no_speed(runs, tmp_path):
    results = read_results(runs / "main")
    write_info(tmp_path, results.info)
    for record in results.records:
        append_record(tmp_path, attrs.evolve(record, decode_seconds=0.0) if record.method == "hf static" else record)
    page = report(tmp_path)
    for name in ("pooled", "summary"):
        (row,) = [row for row in rows_of(page, name) if row["method"] == "hf static"]
        assert row.get("speedup", row.get("speedup_median")) == ""


def test_a_folder_of_runs_has_a_page_for_each(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (PLOTS["accepted"],))
    for name in ("ablation", "datasets"):
        (tmp_path / name).symlink_to(runs / name)
    text = report(tmp_path, tmp_path / "out").read_text(encoding="utf-8")
    for name in ("ablation", "datasets"):
        assert f"({name}/report.md)" in text
        assert (tmp_path / "out" / name / "report.md").exists()


def test_a_run_without_outputs_does_not_keep_the_others_from_a_report(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    (tmp_path / "ablation").symlink_to(runs / "ablation")
    write_info(tmp_path / "begun", read_results(runs / "main").info)
    text = report(tmp_path, tmp_path / "out").read_text(encoding="utf-8")
    assert "(ablation/report.md)" in text
    assert "- begun has no outputs yet" in text
    (tmp_path / "ablation").unlink()
    with pytest.raises(ResultsError, match=r"the runs in .* have none yet"):
        report(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_column_has_a_name_of_its_own(runs, name, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    page = report(runs / name, tmp_path)
    for path in (page.parent / "tables").iterdir():
        header = next(csv.reader(path.open(encoding="utf-8")))
        assert len(set(header)) == len(header), (path.name, header)
    if name == "tree-search":
        found = summaries(read_results(runs / name).records)
        for one, row in zip(found, rows_of(page, "summary"), strict=True):
            if one.method == "fixed":
                assert (int(row["depth"]), float(row["mean_depth"])) == (one.axes["depth"], one.depth)


def test_rows_stand_in_the_order_of_the_run_s_methods_and_points(runs, tmp_path, monkeypatch):
    """Whatever the order in which they were measured."""
    monkeypatch.setattr(figures, "FIGURES", ())
    results = read_results(runs / "ablation")
    write_info(tmp_path, results.info)
    records = list(results.records)
    random.Random(0).shuffle(records)
    for record in records:
        append_record(tmp_path, record)
    rows = [[(row["method"], row.get("base_depth")) for row in rows_of(report(folder, tmp_path / name), "summary")]
            for folder, name in ((runs / "ablation", "one"), (tmp_path, "two"))]  # fmt: skip
    assert rows[0] == rows[1]
    ours = [row for row in rows[0] if row[0] in ("fixed", "phase3")]
    assert ours == [(name, str(depth)) for name in ("fixed", "phase3") for depth in (4, 5, 6)]


def test_of_one_prompt_no_interval_is_shown(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    results = read_results(runs / "main")
    write_info(tmp_path, results.info)
    for record in results.records:
        if record.prompt_id == results.records[0].prompt_id:
            append_record(tmp_path, record)
    lines = report(tmp_path).read_text(encoding="utf-8").splitlines()
    pooled, summary, *_ = [line for line in lines if line.startswith("| phase3 |")]
    speedups = [one.speedup for one in summaries(read_results(tmp_path).records) if one.method == "phase3"]
    for row in (pooled, summary):
        assert f"| {speedups[0].median:.2f} |" in row
        assert "[" not in row
    assert np.isnan(figures._error_bars(speedups)).all()


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


def test_what_is_made_up_is_decoded_as_its_source_says(runs):
    """So the figures show what a run would: chains of 6 have the tokens per iteration of the source's acceptance."""
    (linear,) = [one for one in summaries(read_results(runs / "main").records) if one.method == "linear"]
    assert linear.nodes_per_iteration <= 6
    assert 1.5 < linear.tokens_per_iteration < 4.5
    assert SOURCE.acceptance == 0.65
