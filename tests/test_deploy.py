"""The files of docs/deploy fit the program: their options are its own, their metrics are those that it has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from serving import new_service, running

from dynatree_core.cli.serve import serve
from dynatree_core.serve.gate import OPEN_PATHS

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"
OPTIONS = {name for option in serve.params for name in option.opts}
FILES = ("Dockerfile", "Dockerfile.dockerignore", "dynatree.service", "grafana.json", "prometheus.yml", "serve.toml")


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """The names of all metrics of a server that has answered one request."""
    with running(new_service()) as server:
        body = {"model": "tiny", "prompt": "the cat sat on the mat. the cat", "max_tokens": 30, "temperature": 0}
        assert server.post("/v1/completions", body).status_code == 200
        assert server.post("/v1/completions", {**body, "n": 0}).status_code == 400
        with server.http() as http:
            text = http.get("/metrics").text
    return set(re.findall(r"^([a-z0-9:_]+)\{", text, re.M))


def test_the_page_names_each_file():
    page = (DEPLOY.parent / "deploy.md").read_text(encoding="utf-8")
    assert sorted(file.name for file in DEPLOY.iterdir()) == sorted(FILES)
    assert all(f"| `docs/deploy/{name}` |" in page for name in FILES)


def test_the_configuration_is_one_of_the_program():
    found = tomllib.loads((DEPLOY / "serve.toml").read_text(encoding="utf-8"))
    assert found
    assert {f"--{name}" for name in found} <= OPTIONS


@pytest.mark.parametrize("name", ["Dockerfile", "dynatree.service"])
def test_the_options_of_a_command_line_are_the_programs(name):
    text = (DEPLOY / name).read_text(encoding="utf-8")
    [command] = re.findall(r"^(?:ENTRYPOINT|ExecStart=)(.*)$", text, re.M)
    words = re.findall(r"--[a-z-]+", command)
    assert words
    assert set(words) <= OPTIONS


def test_an_image_is_built_of_what_the_wheel_needs_and_not_of_what_git_ignores():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.removeprefix("**/") for line in lines if not line.startswith("#")}
    root = DEPLOY.parents[1]
    ignored = (root / ".gitignore").read_text(encoding="utf-8").split()
    assert {line.partition("/")[0] for line in ignored} <= left_out
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.partition("*")[0] for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    assert len(packages) == 3
    assert not left_out & (packages | files)


def test_the_containers_health_is_asked_where_no_key_is_needed():
    [path] = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    assert path in OPEN_PATHS


def test_each_metric_of_the_dashboard_is_there(metrics):
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"\b((?:vllm:|dynatree_)\w+)", text)}
    assert len(named) > 15
    assert named <= metrics


def test_panels_of_the_dashboard_do_not_overlap():
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    unit = tmp_path / "dynatree.service"
    # the program that it names is not installed here
    text = (DEPLOY / unit.name).read_text(encoding="utf-8").replace("/opt/dynatree/bin/dynatree", "/bin/true")
    unit.write_text(text, encoding="utf-8")
    said = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr.strip()) == (0, "")
