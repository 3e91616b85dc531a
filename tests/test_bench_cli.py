"""`dynatree bench`: what it prints, its exit codes, and that it goes on where it was cut off."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from command import byte_level_tokenizer, for_transformers, run_command, save_model
from transformers import AutoTokenizer

from dynatree_bench import bench_cli
from dynatree_bench.data.workloads import KNOWN, encode, load_workload
from dynatree_bench.report import style
from dynatree_bench.report.memory_share import memory_sentence
from dynatree_bench.report.statistics import lowest_speedup, summaries
from dynatree_bench.run import bandwidth, measure, methods, pairs
from dynatree_bench.run.bandwidth import ReadSpeed
from dynatree_bench.run.experiments import EXPERIMENTS, HF, RIVALS, chosen_methods
from dynatree_bench.run.records import OutputRecord, read_results
from dynatree_bench.studies.names import studies
from dynatree_core import InputError, LoadedModel
from dynatree_core.cli.loading import usual_drafter
from dynatree_core.models import embedded
from dynatree_core.testing.models import tiny_model
from dynatree_core.trace import read

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(capsys, monkeypatch):
    """Runs `dynatree bench` in this process, on the CPU and without looking for seconds whether the machine is idle."""
    monkeypatch.setattr(measure, "busy_percent", lambda seconds: 0.0)
    monkeypatch.setattr(measure.LoadMeter, "share", lambda meter: 0.0)
    monkeypatch.setattr(bandwidth, "read_speed", lambda device: ReadSpeed(8e9, None))
    monkeypatch.setitem(style.STYLE, "savefig.dpi", 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    return functools.partial(run_command, capsys, "bench")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with one tokenizer, and prompts."""
    root = tmp_path_factory.mktemp("bench")
    tokenizer = for_transformers(byte_level_tokenizer(), eos_token="<end>")
    for seed, name in enumerate(("target", "drafter")):
        save_model(root / name, tokenizer, seed=seed)
    prompts = [{"category": kind, "prompt": f"{kind}: one two three one two three"} for kind in ("a", "b")]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return root


@pytest.fixture
def of_folders(folders):
    """Options for these models."""
    models = ("--target", folders / "target", "--drafter", folders / "drafter", "--device", "cpu")
    return (*models, "--dtype", "float64", "--workload", folders / "prompts.jsonl", "--max-new-tokens", 5)


@pytest.mark.slow
def test_help_and_list_need_no_torch():
    program = (
        "import sys; from dynatree_bench.bench_cli import bench; sys.exit('torch' in sys.modules or "
        "bench.main(['list'], standalone_mode=False) or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for experiment in EXPERIMENTS.values():
        assert experiment.name in done.stdout
        assert f"{experiment.full.num_prompts or 'all'} prompts" in done.stdout
    assert {*studies()} <= {*done.stdout.split()}


def test_list_as_json_and_help_of_each(bench):
    found = json.loads(bench("list", "--json").out)
    assert [entry["name"] for entry in found] == [*EXPERIMENTS, *studies()]
    assert all(entry["question"] in " ".join(bench("--help").out.split()) for entry in found[-2:])
    for name, experiment in EXPERIMENTS.items():
        ran = bench(name, "--help")
        assert ran.code == 0
        assert experiment.question in " ".join(ran.out.split())
        assert "--quick" in ran.out


def test_a_run_is_written_summarised_and_complete_when_it_is_called_again(bench, of_folders, tmp_path):
    out = tmp_path / "run"
    ran = bench("main", *of_folders, "--replay", "--out", out)
    assert ran.code == 0, ran.err
    num = 2 * len(chosen_methods(EXPERIMENTS["main"]))
    results = read_results(out)
    assert ran.out == (
        f"{memory_sentence(results)}\n"
        f"main: {num} outputs in {out}\n"
        f"tables and figures of them: {out / 'report' / 'report.md'}\n"
    )
    assert memory_sentence(results).startswith("memory is read at 8.0 GB/s here; plain decoding reads 0.")
    page = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert f"**What a ratio is worth**: {memory_sentence(results)}." in page
    assert (out / "report" / "figures" / "phases.png").exists()
    assert results.info.target.name.endswith("target")
    assert results.info.target.sha256 != results.info.drafter.sha256
    assert results.info.settings["replay"]
    assert {record.category for record in results.records} == {"a", "b"}
    assert all(record.is_identical for record in results.records)
    again = bench("main", *of_folders, "--replay", "--out", out)
    assert (again.code, again.out) == (0, ran.out)
    assert read_results(out).records == results.records
    other = bench("main", *of_folders, "--out", out)
    assert other.code == 2
    assert "settings replay: True there, False now" in other.err


@pytest.mark.parametrize(("method", "code"), [("hf generate", 0), ("fixed", 1)])
def test_differences_are_said_and_ours_fail(bench, of_folders, tmp_path, monkeypatch, method, code):
    def decode(pair, cell, prompt_ids, eos):
        output = methods.decode(pair, cell, prompt_ids, eos)
        is_wrong = cell.method.name == method
        return attrs.evolve(output, token_ids=(*output.token_ids[:-1], 0)) if is_wrong else output

    monkeypatch.setattr(measure, "decode", decode)
    ran = bench("main", *of_folders, "--only", method, "--no-report", "--out", tmp_path / "run")
    assert ran.code == code
    assert f"{method}: 2 of 2 outputs differ from autoregressive decoding" in ran.out


def test_a_foreign_method_that_cannot_run_is_left_out_or_refused(bench, of_folders, tmp_path):
    models = (*of_folders[:2], "--drafter", "prompt_lookup", *of_folders[4:])
    options = (*models, "--policy", "fixed", "--num-prompts", 2, "--no-report")
    ran = bench("main", *options, "--out", tmp_path / "run")
    assert ran.code == 0
    assert ran.err.startswith(
        "dynatree: note: left out: hf assisted heuristic, hf assisted constant, hf assisted dynam"
    )
    assert ran.err.count("\n") == 1
    assert "failed" not in ran.out
    ran = bench("main", *options, "--only", "hf assisted dynamic", "--out", tmp_path / "asked")
    assert ran.code == 2
    assert "'hf assisted dynamic' cannot run here: the drafter must be a plain transformers model" in ran.err
    assert not (tmp_path / "asked").exists()


def test_a_trace_has_each_of_our_generations_and_no_other(bench, of_folders, tmp_path):
    out, file = tmp_path / "run", tmp_path / "run.jsonl.gz"
    options = (*of_folders, "--only", "fixed", "--only", "hf generate", "--repeats", 2, "--no-report", "--out", out)
    assert bench("main", *options, "--trace", file, "--trace-private").code == 0
    records, sequences = read_results(out).records, read(file).sequences
    ours = [one for one in records if not one.method.startswith("hf")]
    assert {one.method for one in ours} == {"autoregressive", "fixed"}
    assert len({one.method for one in records}) > 2
    found = [(one.begin["policy"].partition("(")[0], tuple(one.token_ids)) for one in sequences]
    assert sorted(found) == sorted((one.method, one.token_ids) for one in ours)
    assert all(one.prompt is None and one.end is not None for one in sequences)


def test_without_a_report_the_line_that_makes_one_is_said(bench, of_folders, tmp_path):
    out = tmp_path / "run"
    ran = bench("scalability", *of_folders, "--no-report", "--out", out)
    assert ran.code == 0
    assert ran.out.endswith(f"outputs in {out}\ntables and figures of them: dynatree bench report {out}\n")
    assert not (out / "report").exists()


def test_it_drafts_with_what_generate_drafts_with(bench, of_folders, tmp_path, monkeypatch):
    asked = []

    def load_pair(target, *drafters, **options):
        asked.append((target, drafters, *(drafters or (usual_drafter(target),))))
        raise InputError("enough")

    monkeypatch.setattr(pairs, "load_pair", load_pair)
    for options in ((), ("--target", "default"), ("--target", "owner/name"), ("--drafter", "linear")):
        bench("main", *options, "--out", tmp_path)
    assert [used for _, _, used in asked] == [
        "distilled+prompt_lookup", "distilled+prompt_lookup", "prompt_lookup", "linear",
    ]  # fmt: skip
    assert [given for _, given, _ in asked] == [(), (), (), ("linear",)]


def test_without_a_name_a_pair_has_the_usual_drafter(of_folders, monkeypatch):
    monkeypatch.setattr(pairs, "usual_drafter", lambda target: f"prompt_lookup(max_ngram={len(target)})")
    pair = pairs.load_pair(str(of_folders[1]), device="cpu")
    assert str(pair.drafter) == f"prompt_lookup(max_ngram={len(str(of_folders[1]))})"


@pytest.mark.parametrize(
    "args", [("main", "--policy", "phase33"), ("all", "--only", "fxed"), ("main", "--policy", "fixed(")]
)
def test_what_is_wrong_with_methods_is_found_before_a_model_is_loaded(bench, tmp_path, monkeypatch, args):
    def load(*arguments, **options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(pairs, "load_pair", load)
    ran = bench(*args, "--target", "owner/name", "--out", tmp_path / "run")
    assert ran.code == 2
    assert args[-1].rstrip("(") in ran.err
    assert ran.err.count("\n") == 1


def test_all_experiments_of_a_synthetic_pair(bench, tmp_path):
    ran = bench(
        "all", "--quick", "--synthetic", "tiny:0.8:0.5", "--device", "cpu", "--num-prompts", 1, "--max-new-tokens", 4,
        "--out", tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for name in EXPERIMENTS:
        results = read_results(tmp_path / name)
        assert results.info.is_synthetic
        assert results.info.target.name == "synthetic tiny"
        assert all(record.is_identical for record in results.records)
    settings = read_results(tmp_path / "main").info.settings
    assert (settings["workloads"], settings["acceptance"], settings["decay"]) == (["markov"], 0.8, 0.5)


def test_a_synthetic_run_goes_on_with_the_same_acceptance_only(bench, tmp_path):
    options = ("--device", "cpu", "--quick", "--num-prompts", 1, "--max-new-tokens", 4, "--out", tmp_path)
    assert bench("scalability", "--synthetic", "tiny:0.8", *options).code == 0
    assert bench("scalability", "--synthetic", "tiny:0.8", *options).code == 0
    for spec, said in (("tiny:0.9", "acceptance: 0.8 there, 0.9 now"), ("tiny:0.8:0.5", "decay: 0.6 there, 0.5 now")):
        other = bench("scalability", "--synthetic", spec, *options)
        assert other.code == 2
        assert said in other.err


def test_one_experiment_that_cannot_run_does_not_keep_all_from_it(bench, of_folders, tmp_path, monkeypatch):
    names = ["prompt-length", "scalability"]
    monkeypatch.setattr(bench_cli, "EXPERIMENTS", {name: EXPERIMENTS[name] for name in names})
    ran = bench("all", *of_folders, "--out", tmp_path)  # its prompts are too short to be cut to the full lengths
    assert ran.code == 1
    assert "dynatree: error: prompt-length: prompts cut to 400 tokens must have so many" in ran.err
    assert f"scalability: 6 outputs in {tmp_path / 'scalability'}" in ran.out


def test_an_interrupt_says_how_to_go_on(bench, of_folders, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(measure, "decode", interrupt)
        ran = bench("scalability", *of_folders, "--out", out)
    assert ran.code == 130
    assert f"what is done is in {out}; the same command goes on from there" in ran.err
    assert bench("scalability", *of_folders, "--out", out).code == 0
    assert len(read_results(out).info.continued) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--workload", "wikitext2"), "did you mean 'wikitext-2'"),
        (("--only", "fxed"), "did you mean 'fixed'"),
        (("--policy", "confidense"), "did you mean 'confidence'"),
        (("--max-new-tokens", "4,0"), "must be numbers of at least 1 separated by commas, got '4,0'"),
        (("--max-new-tokens", "many"), "must be numbers of at least 1"),
        (("--synthetic", "tiny"), "give either --target or --synthetic"),
        (("--drafter", "prompt_lokup"), "did you mean 'prompt_lookup'"),
        (("--drafter", "./not-there"), "cannot load './not-there'"),
        (("--prompt-tokens", "500"), "the longest of 'prompts' has"),
    ],
)
def test_misuse_is_told_in_one_line_and_nothing_is_written(bench, of_folders, tmp_path, args, said):
    ran = bench("main", *of_folders, *args, "--out", tmp_path / "run")
    assert ran.code in (1, 2)
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spec", ["tny", "tiny:x", "tiny:0.1", "tiny:0.8:0.5:0.2"])
def test_a_synthetic_pair_that_cannot_be(bench, tmp_path, spec):
    ran = bench("main", "--synthetic", spec, "--device", "cpu", "--out", tmp_path / "run")
    assert ran.code == 2
    assert ran.err.startswith("dynatree: error: ")
    assert ran.err.count("\n") == 1


def test_never_slower_fails_below_what_is_to_be_shown(bench, of_folders, tmp_path, monkeypatch):
    models = ("--target", of_folders[1], "--device", "cpu", "--workload", of_folders[-3], "--max-new-tokens", 4)
    ran = bench("never-slower", *models, "--no-report", "--out", tmp_path / "run")
    results = read_results(tmp_path / "run")
    assert all(record.is_identical for record in results.records)
    lowest = lowest_speedup(results, {"governor", "cost_aware"})
    assert ran.code == (lowest[0] < 0.97)
    assert (
        f"cost_aware or governor: {lowest[0]:.3f} ({lowest[1]}, {lowest[2]}); at least 0.97 is to be shown" in ran.out
    )
    names = [method.name for method in results.info.methods]
    assert names[:4] == ["autoregressive", *(f"phase3 with {name}" for name in ("prompt_lookup", "random", "noise"))]
    assert [method.drafter for method in results.info.methods][3] == "noise"


def test_of_fixed_width_the_caches_are_compared_too(bench, of_folders, tmp_path):
    ran = bench("fixed-width", *of_folders, "--layers", 1, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    results = read_results(tmp_path / "run")
    assert results.info.settings["layers"] == 1
    names = ["autoregressive", "phase3", "autoregressive fixed width", "phase3 fixed width"]
    assert [method.name for method in results.info.methods] == names
    assert all(record.is_identical for record in results.records)
    assert all(record.is_bitwise for record in results.records if record.method.startswith("autoregressive"))
    by_method = {one.method: one for one in summaries(results.records)}
    assert by_method["autoregressive"].num_bitwise == 2
    page = (tmp_path / "run" / "report" / "report.md").read_text(encoding="utf-8")
    assert "| bits |" in page
    assert "## Methods by category" in page


def test_a_study_prints_its_tables_and_can_be_reported_again(bench, folders, tmp_path):
    out = tmp_path / "run"
    ran = bench("runners", "--target", folders / "target", "--quick", "--out", out)
    assert ran.code == 0, ran.err
    assert "Relative to one row of float32 eager" in ran.out
    assert "the machine was" in ran.out
    page, figure = out / "report" / "report.md", out / "report" / "figures" / "runners.svg"
    assert ran.out.endswith(f"tables and figures of it: {page}\n")
    before = page.read_text(encoding="utf-8"), figure.read_bytes()
    assert before[0].startswith("# Benchmark results: runners")
    assert "· `dynatree" in before[0], "the command that made it"
    again = bench("report", out / "study.json", "--out", tmp_path / "again")
    assert (again.code, again.out) == (0, f"{tmp_path / 'again' / 'report.md'}\n")
    assert (tmp_path / "again" / "report.md").read_text(encoding="utf-8") == before[0]
    assert (tmp_path / "again" / "figures" / "runners.svg").read_bytes() == before[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("runners", "--policy", "fixed"), "No such option '--policy'"),
        (("rehearse", "--policy", "fxed"), "did you mean 'fixed'"),
        (("rehearse", "--drafter", "prompt_lokup"), "did you mean 'prompt_lookup'"),
        (("drafter-value", "--workload", "none.jsonl"), "'none.jsonl'"),
        (("report", "none.json"), "a results folder must hold run.json"),
    ],
)
def test_misuse_of_a_study_is_one_line(bench, folders, tmp_path, args, said):
    target = () if args[0] in ("report", "runners") else ("--target", folders / "target")
    ran = bench(*args, *target, *(("--out", tmp_path / "run") if args[0] != "report" else ()))
    assert ran.code in (1, 2)
    assert said in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_quick_forms_have_prompts_that_are_long_enough_for_the_default_model():
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    loaded = LoadedModel(tiny_model("llama"), tokenizer, "default")
    for experiment in EXPERIMENTS.values():
        form = experiment.quick
        for workload, num_tokens in itertools.product(form.workloads, form.prompt_tokens):
            prompts = encode(load_workload(workload, form.num_prompts), loaded, num_tokens=num_tokens)
            assert len(prompts) == form.num_prompts


def test_the_page_names_every_experiment_method_workload_and_field():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    words = {word for row in re.findall(r"^\|.*$", page, re.M) for word in re.findall("`([^`]+)`", row)}
    names = {method.name for method in (*EXPERIMENTS["main"].methods, *HF, *RIVALS)}
    fields = {field.name for field in attrs.fields(OutputRecord)}
    assert {*EXPERIMENTS, *studies(), *names, *KNOWN, *fields} <= words


def test_missing_libraries_are_named_with_the_line_to_run(bench, monkeypatch):
    monkeypatch.delitem(sys.modules, "dynatree_bench.run.measure")
    monkeypatch.setitem(sys.modules, "dynatree_bench.run.machine", None)
    ran = bench("main", "--quick")
    assert ran.code == 1
    assert "pip install 'dynatree[bench]'" in ran.err
