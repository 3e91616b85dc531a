"""The page of `dynatree view`, without a browser: how it is built, what stands in it, what its figures say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import dynatree, is_one_error_line, spawn  # noqa: F401  # a fixture
from hypothesis import given
from hypothesis import strategies as st
from made_traces import made_trace
from test_observer import DRAFTER, PROMPT, TARGET, Fails

from dynatree_core import generate, generate_batch
from dynatree_core.errors import InputError
from dynatree_core.testing.models import perturbed, tiny_model
from dynatree_core.trace import Trace
from dynatree_core.trace.reading import read
from dynatree_core.trace.summary import oracle_tokens, run_of
from dynatree_core.trace.view import inert_json, page, page_of

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "viewer"
BUILT = ROOT / "dynatree_core" / "trace" / "page.html"
LICENCES = BUILT.with_name("page_licences.txt")
START_PAGE = ROOT / "dynatree_core" / "serve" / "page"  # which has the viewer's trees


def shown(trace: Path) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    return run_of(trace.name, read(trace))


# the build


def hash_of_sources() -> str:
    """As `viewer/build.mjs` computes it."""
    names = ["package.json", "package-lock.json", "tsconfig.json", "build.mjs"]
    names += [f"src/{file.name}" for file in sorted((SOURCES / "src").iterdir())]
    found = hashlib.sha256()
    for name in names:
        found.update(f"{name}\n".encode() + (SOURCES / name).read_bytes() + b"\n")
    return found.hexdigest()


def test_the_built_page_is_of_these_sources():
    built = BUILT.read_text(encoding="utf-8")
    message = "the sources of the viewer have changed: build it with `make viewer` and commit what it writes"
    assert f'<meta name="dynatree-viewer-sources" content="{hash_of_sources()}">' in built, message
    for name in ("trees.js", "trees.css"):
        assert f"of the sources {hash_of_sources()}." in (START_PAGE / name).read_text(encoding="utf-8"), message


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("node") is None or not (SOURCES / "node_modules").is_dir(),
    reason="the viewer's packages are not installed: `make viewer` does that, with node and npm",
)
def test_building_again_gives_the_same_bytes(tmp_path):
    subprocess.run(["node", "build.mjs", str(tmp_path)], cwd=SOURCES, check=True, capture_output=True)
    assert (tmp_path / "page.html").read_bytes() == BUILT.read_bytes()
    assert (tmp_path / "page_licences.txt").read_bytes() == LICENCES.read_bytes()
    for name in ("trees.js", "trees.css"):
        assert (tmp_path / name).read_bytes() == (START_PAGE / name).read_bytes()


def test_the_page_is_small_and_carries_its_licences():
    built = BUILT.read_text(encoding="utf-8")
    assert len(built.encode()) < 1_000_000
    lock = json.loads((SOURCES / "package-lock.json").read_text(encoding="utf-8"))
    for name in json.loads((SOURCES / "package.json").read_text(encoding="utf-8"))["dependencies"]:
        line = f"{name} {lock['packages'][f'node_modules/{name}']['version']} ("
        assert line in LICENCES.read_text(encoding="utf-8")
        assert line in built
    assert "Permission to use, copy, modify, and/or distribute" in built  # ISC, of d3-hierarchy
    assert "Permission is hereby granted, free of charge" in built  # MIT, of uPlot


def test_the_lock_names_no_registry():
    assert "resolved" not in (SOURCES / "package-lock.json").read_text(encoding="utf-8")


def test_the_page_allows_its_own_script_and_style_alone(tmp_path):
    made = page([shown(made_trace(tmp_path / "run.jsonl"))])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', made)
    assert policy is not None
    allowed = dict(part.split(" ", 1) for part in policy[1].split("; "))
    for tag in ("script", "style"):
        [code] = re.findall(rf"<{tag}>(.*?)</{tag}>", made, re.S)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert allowed.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert allowed == {
        "default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    assert not re.search(r"<[a-z][^>]*\s(on\w+|style)=", made.split("<style>")[0])  # no code in attributes
    assert made.isascii()
    # whatever could load something
    code = re.search(r"<script>(.*?)</script>", made, re.S)
    assert code is not None
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|importScripts|eval)\b|\bimport\(", code[1])
    assert not re.findall(r"\.(?:innerHTML|outerHTML|insertAdjacentHTML)\b|document\.write", code[1])


# data that cannot get out


@given(st.recursive(st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), st.lists, max_leaves=9))
def test_data_stays_what_it_was_and_has_no_character_of_markup(value):
    text = inert_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&\u2028\u2029\n") & set(text)


@pytest.mark.parametrize(
    "text",
    ["</script>", "<!-- <script>", "]]>", "&lt;", "\u2028\u2029", "\ud800", "\x00", "${1}`", "{{7*7}}", "@@data@@"],
)
def test_a_hostile_text_is_data_in_the_page(text, tmp_path):
    trace = made_trace(tmp_path / "run.jsonl", words=[text, f"{text} and more", "c"])
    made = page([shown(trace)])
    plain = page([shown(made_trace(tmp_path / "run.jsonl", words=["a", "b", "c"]))])
    for mark in ("<script", "</script", "<!--", "-->", "<style"):
        assert made.count(mark) == plain.count(mark)
    [data] = re.findall(r'<script type="application/json" id="runs">\n(.*)\n</script>', made)
    assert json.loads(data)[0]["texts"]["0"] == [text, len(text)]


def test_a_huge_token_is_cut(tmp_path):
    run, _ = shown(made_trace(tmp_path / "run.jsonl", words=["x" * 1_000_000, "b", "c"]))
    text, length = run["texts"]["0"]
    assert (len(text), length) == (500, 1_000_000)


# figures


@pytest.mark.parametrize(
    ("ranks", "num_nodes", "tokens"),
    [
        ([0, 0, 0, 0], 2, 3),  # a chain of two, and the bonus token
        ([1, 0, 0, 0], 2, 2),  # the second of two siblings
        ([1, 0, 0, 0], 3, 3),
        ([2, 0, 0, 0], 2, 1),  # out of reach
        ([None, 0, 0, 0], 9, 1),
        ([0, None, 0, 0], 9, 2),
        ([0, 0, 0, 0], 9, 4),  # all there are
        ([0], 0, 1),
    ],
)
def test_the_oracle_tree_reaches_what_its_nodes_pay_for(ranks, num_nodes, tokens):
    assert oracle_tokens(ranks, 0, num_nodes, len(ranks)) == tokens


def test_columns_fit_together_and_the_oracle_is_never_worse(tmp_path):
    run, details = shown(made_trace(tmp_path / "run.jsonl", num_iterations=60, num_sequences=2))
    assert len(details) == 2
    for sequence, nodes in zip(run["sequences"], details, strict=True):
        assert len(nodes) == 60
        columns = ("iteration", "start", "committed", "accepted", "nodes", "drafted", "depth", "oracle", "ended")
        assert {len(sequence[name]) for name in columns} == {60}
        assert sequence["start"][0] == 0
        for place, committed in enumerate(sequence["committed"][:-1]):
            assert sequence["start"][place + 1] - sequence["start"][place] == len(committed)
        pairs = zip(sequence["oracle"], sequence["committed"], strict=True)
        assert all(oracle >= len(committed) for oracle, committed in pairs)
        for by in ("by_depth", "by_rank", "by_confidence"):
            assert sum(accepted for _, _, accepted in sequence[by]) == sum(sequence["accepted"])
        kinds = [run["reasons"][reason]["kind"] for one in nodes for reason in one["reason"] if reason >= 0]
        assert kinds.count("accepted") == sum(sequence["accepted"])
        assert kinds.count("accepted") + kinds.count("rejected") == sum(sequence["nodes"])
        assert kinds.count("pruned") == sum(sequence["drafted"]) - sum(sequence["nodes"])


HAND_MADE = {
    "kind": "iteration", "sequence": 0, "iteration": 0, "start": 3, "num_drafted": 3,
    "nodes": {
        # root; drafted 1, 2 and a child 3 of 1, which is pruned; refused: 4 (below τ) and 5 (beyond the width)
        "token": [9, 1, 2, 3, 4, 5], "parent": [-1, 0, 0, 1, 1, 0], "rank": [0, 0, 1, 0, 1, 2],
        "depth": [0, 1, 1, 2, 2, 1], "logprob": [0.0, -0.25, -1.5, -0.5, -3.0, -2.0],
        "cum_logprob": [0.0, -0.25, -1.5, -0.75, -3.25, -2.0], "outcome": [0, 0, 0, 6, 4, 3],
    },
    "levels": [
        {"first": 0, "width": 1, "nodes_left": 9, "end": None, "end_by": None,
         "expand": {"fixed": True}, "branch": {"fixed": 4, "confidence": [2]}},
        {"first": 1, "width": 2, "nodes_left": 7, "end": None, "end_by": None,
         "expand": {"fixed": True, "dynamic_depth": [True, False]}, "branch": {"confidence": [2, 2]}},
    ],
    "pruned": {"best_first": [3]}, "wanted": {"token": [1, 3, 7, None], "logprob": [-0.1, -0.2, -0.3, None]},
    "path": [1], "committed": [1, 3], "bonus": 3, "committed_logprob": [-0.1, -0.2], "text": None,
    "seconds": {"iteration": 0.5, "draft": 0.1, "draft_forward": 0.05, "verify": 0.3},
    "policies": {"confidence": {"high": [0.9, 0.8]}}, "stop": None, "texts": {},
}  # fmt: skip


def hand_made(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sequence and the nodes of a trace whose one iteration is `HAND_MADE` with changes."""
    trace = made_trace(tmp_path / "run.jsonl", num_iterations=1)
    lines = trace.read_text().splitlines()
    lines[3] = json.dumps(HAND_MADE | changes)
    trace.write_text("\n".join(lines) + "\n")
    run, [[nodes]] = shown(trace)
    reasons = [None if reason < 0 else run["reasons"][reason]["text"] for reason in nodes["reason"]]
    return run["sequences"][0], nodes | {"reason": reasons}


def test_each_node_has_its_reason_and_the_ending_its_cause(tmp_path):
    sequence, nodes = hand_made(tmp_path)
    assert nodes["reason"] == [
        None,
        "accepted: the target's own choice",
        "verified, and not the target's choice",
        "drafted, but pruned (best_first)",
        "proposed, but below τ = 0.05 (fixed)",
        "proposed, but beyond the branch factor (confidence)",
    ]
    assert sequence["endings"] == ["the target's choice was drafted, but pruned (best_first)"]
    assert nodes["wanted"] == [(0, 1, -0.1), (1, 3, -0.2), (2, 7, -0.3)]
    assert nodes["votes"] == [
        "level 0: fixed expand yes; fixed children 4; confidence children 2",
        "level 1: fixed expand yes; dynamic_depth expand yes, no; confidence children 2",
    ]
    assert (sequence["nodes"], sequence["drafted"], sequence["depth"]) == ([2], [3], [1])
    assert sequence["seconds"]["draft"] == [0.1]
    assert sequence["seconds"]["rest"] == [pytest.approx(0.1)]
    assert sequence["parameters"] == {"confidence.high": [0.9]}
    assert ("confidence.low", "0.4") in sequence["constants"]


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        ({"bonus": 4, "committed": [1, 4]}, "the target's choice was proposed, but below τ = 0.05 (fixed)"),
        ({"bonus": 8, "committed": [1, 8]}, "the drafter did not propose the target's choice"),
        ({"bonus": None, "committed": [1], "stop": "eos"}, "the generation stopped within the path"),
        (
            {"path": [], "committed": [5], "bonus": 5},
            "the target's choice was proposed, but beyond the branch factor (confidence)",
        ),
        ({"path": [2], "committed": [2, 7], "bonus": 7}, "nothing was proposed there"),
    ],
)
def test_why_a_path_ended(changes, ending, tmp_path):
    sequence, _ = hand_made(tmp_path, **changes)
    assert sequence["endings"] == [ending]


# the command


def test_view_writes_a_page_beside_the_trace(dynatree, tmp_path):  # noqa: F811
    trace = made_trace(tmp_path / "run.jsonl")
    ran = dynatree("view", trace)
    assert (ran.code, ran.out, ran.err) == (0, f"{tmp_path / 'run.html'}\n", "")
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == page([shown(trace)])
    assert dynatree("view", trace).code == 0, "its own page may be written anew"
    ran = dynatree("view", trace, "--out", "-")
    assert ran.out == page([shown(trace)])


def test_a_page_is_made_in_python_too(tmp_path):
    first, second = (made_trace(tmp_path / f"{seed}.jsonl", seed=seed) for seed in (0, 1))
    assert page_of(first, str(second)) == page([shown(first), shown(second)])
    with pytest.raises(InputError, match="must show one trace or two, got 3"):
        page_of(first, second, first)


def test_view_spares_the_files_of_others(dynatree, tmp_path):  # noqa: F811
    trace = made_trace(tmp_path / "run.jsonl")
    (tmp_path / "run.html").write_text("mine")
    ran = dynatree("view", trace)
    assert ran.code == 2
    assert is_one_error_line(ran, "run.html", "new, empty or made by it")
    assert (tmp_path / "run.html").read_text() == "mine"


@pytest.mark.parametrize("has_browser", [True, False])
def test_view_opens_a_browser(has_browser, dynatree, tmp_path, monkeypatch):  # noqa: F811
    trace, opened = made_trace(tmp_path / "run.jsonl"), []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or has_browser)
    ran = dynatree("view", trace, "--open")
    assert opened == [(tmp_path / "run.html").as_uri()]
    assert ran.out == f"{tmp_path / 'run.html'}\n"
    assert ran.code == (0 if has_browser else 1)
    assert has_browser or is_one_error_line(ran, "--open must have a browser", "run.html")


def test_view_draws_in_the_terminal(dynatree, tmp_path):  # noqa: F811
    trace = made_trace(tmp_path / "run.jsonl", num_iterations=3, words=["one", "two\x1b[31m", "three"])
    ran = dynatree("view", trace, "--terminal")
    assert (ran.code, ran.err) == (0, "")
    assert "iteration 2" in ran.out
    assert "\x1b" not in ran.out
    assert not list(tmp_path.glob("*.html"))
    ran = dynatree("view", trace, "--terminal", "--out", "x.html")
    assert ran.code == 2
    assert is_one_error_line(ran, "--terminal draws one trace")


def test_a_reader_of_the_drawing_may_leave(tmp_path):
    trace = made_trace(tmp_path / "run.jsonl", num_iterations=300)
    with spawn("view", trace, "--terminal", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"iteration 0")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_view_refuses_what_is_no_trace(dynatree, tmp_path):  # noqa: F811
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a"}\n')
    ran = dynatree("view", other)
    assert ran.code == 2
    assert is_one_error_line(ran, "other.jsonl", "must begin with the header of a trace")
    newer = made_trace(tmp_path / "newer.jsonl")
    newer.write_text(newer.read_text().replace("dynatree-trace/1", "dynatree-trace/2"))
    ran = dynatree("view", newer)
    assert ran.code == 2
    assert is_one_error_line(ran, "newer.jsonl", "got version 2")
    header = tmp_path / "header.jsonl"
    header.write_text(made_trace(header).read_text().splitlines(keepends=True)[0])
    ran = dynatree("view", header)
    assert ran.code == 2
    assert is_one_error_line(ran, "must hold a generation", "header.jsonl")
    ran = dynatree("view", tmp_path)
    assert ran.code == 2
    assert is_one_error_line(ran, "must be a file")
    ran = dynatree("view", tmp_path / "absent.jsonl")
    assert ran.code == 1
    assert is_one_error_line(ran, "No such file or directory", "absent.jsonl")
    assert not list(tmp_path.glob("*.html"))


def test_a_truncated_trace_is_shown_as_far_as_it_goes(tmp_path):
    trace = made_trace(tmp_path / "run.jsonl", num_iterations=9)
    trace.write_bytes(trace.read_bytes()[:-2000])
    run, [details] = shown(trace)
    assert 0 < len(details) < 9
    assert run["notes"] == [
        "The file breaks off within a line: what stands before that is shown.",
        "The generation has no end in the file: it was still running, or the process died.",
    ]


def test_view_imports_nothing_that_computes(tmp_path):
    trace = made_trace(tmp_path / "run.jsonl")
    code = (
        "import sys\nfrom dynatree_core.cli.group import _dynatree\n"
        f"_dynatree.main(['view', {str(trace)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# of real generations


STACKS = ["phase3", "best_first(nodes=4)+fixed(depth=3)", "linear(depth=2)", "autoregressive", "sequoia"]


@pytest.mark.parametrize("policy", STACKS)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 1}, {"repetition_penalty": 1.3}], ids=str)
def test_the_figures_of_a_generation_are_those_of_its_report(policy, settings, tmp_path):
    target, prompt = tiny_model("llama"), [3, 1, 4, 1, 5, 9, 3, 1, 4]
    result = generate(
        target, perturbed("llama"), prompt, policy=policy, max_new_tokens=24, trace=tmp_path / "run.jsonl", **settings
    )
    run, [details] = shown(tmp_path / "run.jsonl")
    [sequence] = run["sequences"]
    report = result.report
    figures = {figure["label"]: figure["value"] for figure in sequence["figures"]}
    assert [token for tokens in sequence["committed"] for token in tokens] == result.token_ids
    assert figures["iterations"] == len(details) == report.num_iterations
    assert figures["tokens per iteration"] == report.tokens_per_iteration
    for label, share in (("node acceptance", report.node_acceptance), ("path acceptance", report.path_acceptance)):
        assert figures[label] == (None if share is None else pytest.approx(100 * share))
    assert sum(sequence["nodes"]) == report.num_drafted_nodes
    assert sequence["depth"] == [step.depth for step in report.steps]
    assert sequence["accepted"] == [step.num_accepted for step in report.steps]
    assert figures["tokens per second"] == pytest.approx(report.tokens_per_second)
    assert all(oracle >= len(tokens) for oracle, tokens in zip(sequence["oracle"], sequence["committed"], strict=True))
    assert page([(run, [details])])


def test_a_private_batch_shows_each_sequence_without_its_prompt(tmp_path):
    with Trace(tmp_path / "run.jsonl.gz", is_private=True) as trace:
        results = generate_batch(TARGET, DRAFTER, [[3, 1, 4], [2, 7], [9]], max_new_tokens=8, trace=trace)
    run, details = shown(tmp_path / "run.jsonl.gz")
    assert [sequence["prompt"] for sequence in run["sequences"]] == [None] * 3
    assert [sequence["num_prompt_tokens"] for sequence in run["sequences"]] == [3, 2, 1]
    assert [[token for tokens in one["committed"] for token in tokens] for one in run["sequences"]] == [
        result.token_ids for result in results
    ]
    assert list(map(len, details)) == [result.report.num_iterations for result in results]
    assert run["notes"] == ["The file has no texts of tokens, so their ids are shown."]


def test_a_fault_is_shown_at_its_iteration(tmp_path):
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        generate(TARGET, Fails(), PROMPT, policy="fixed", on_error="fallback", trace=tmp_path / "run.jsonl")
    run, _ = shown(tmp_path / "run.jsonl")
    [[place, text]] = run["sequences"][0]["faults"]
    assert place == 0
    assert text.startswith("DrafterError: ")
    assert text.endswith("(then: fallback)")


def test_characters_over_several_tokens_are_shown_whole(tmp_path):
    trace = made_trace(tmp_path / "run.jsonl", words=["\ufffd", "a", "b"], num_iterations=3)
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "iteration":
            line["text"] = "é"
        if line["kind"] == "end":
            line["text"] = "\ufffd"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [sequence] = shown(trace)[0]["sequences"]
    spread = [place for place, tokens in enumerate(sequence["committed"]) if 0 in tokens]
    assert spread
    texts = dict.fromkeys(spread, "é")
    if 2 in texts:
        texts[2] += "\ufffd"
    assert sequence["joined"] == texts
