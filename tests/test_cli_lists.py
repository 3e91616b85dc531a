"""`dynatree policies`, `drafters`, `models` and `calibrate`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
from command import ON_CPU, Dynatree, dynatree, folders, more_plugins

from dynatree_core.models.embedded import EmbeddedModel

__all__ = ["dynatree", "folders", "more_plugins"]  # fixtures


def test_policies_and_presets(dynatree: Dynatree) -> None:
    rows = {row["name"]: row for row in dynatree("policies", "--json").document}
    assert rows["phase3"]["kind"] == "preset"
    assert rows["phase3"]["expands_to"] == "confidence+dynamic_depth+history"
    assert rows["phase3"]["description"] == "= confidence+dynamic_depth+history"
    confidence = rows["confidence"]
    assert confidence["kind"] == "policy"
    assert confidence["package"] == "dynatree"
    assert confidence["hooks"] == ["branch_factor"]
    assert confidence["parameters"]["high"] == 0.9
    assert confidence["variants"]["plan"]["high"] == 0.8
    assert confidence["description"].startswith("Few children")
    assert all(row["error"] is None for row in rows.values())
    ran = dynatree("policies")
    assert ran.code == 0
    for name in rows:
        assert name in ran.out
    for detail in ("high=0.9", ":plan", "branch_factor", "dynatree 0", "= confidence+dynamic_depth+history"):
        assert detail in ran.out


def test_drafters(dynatree: Dynatree) -> None:
    rows = {row["name"]: row for row in dynatree("drafters", "--json").document}
    assert rows["prompt_lookup"]["parameters"] == {"max_ngram": 8, "max_matches": 16}
    assert rows["model"]["required"] == ["model"]
    ran = dynatree("drafters")
    assert "max_ngram=8" in ran.out
    assert "model (required)" in ran.out


@pytest.mark.usefixtures("more_plugins")
def test_a_broken_plugin_hides_no_other(dynatree: Dynatree) -> None:
    rows = {row["name"]: row for row in dynatree("policies", "--json").document}
    assert rows["confidence"]["error"] is None
    assert "no_such_module" in rows["absent"]["error"]
    assert "did you mean 'branch_factor'" in rows["misspelt"]["error"]
    assert rows["wrong"]["error"] is not None
    assert "what" in rows["demanding"]["error"]
    assert rows["demanding"]["description"] == "A policy that cannot be made from nothing."
    assert rows["demanding"]["parameters"] == {"what": None, "size": 3}
    [twin] = [row for row in dynatree("drafters", "--json").document if row["name"] == "twin"]
    assert "must be unique" in twin["error"]
    for command in ("policies", "drafters"):
        ran = dynatree(command)
        assert (ran.code, ran.err) == (0, "")
        assert "cannot be used" in ran.out


def embedded_model(folder: Path, *, installed: bool, converted: bool) -> EmbeddedModel:
    return EmbeddedModel("Tiny", "llm-tiny", "1.2", "Apache-2.0", installed, converted, folder, 541_000_000 * converted)


@pytest.mark.parametrize(("installed", "converted"), [(False, False), (True, False), (True, True), (False, True)])
def test_models(
    dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool, converted: bool
) -> None:
    model = embedded_model(tmp_path, installed=installed, converted=converted)
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: model)
    ran = dynatree("models")
    assert (ran.code, ran.err) == (0, "")
    for detail in ("Tiny", "llm-tiny 1.2", "Apache-2.0", str(tmp_path)):
        assert detail in ran.out
    assert ("not installed" in ran.out) == (not installed)
    assert ("541 MB" in ran.out) == converted
    assert ("dynatree models install" in ran.out) == (not converted)


def test_models_names_the_damage(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = attrs.evolve(embedded_model(tmp_path, installed=False, converted=False), damage="weights are missing")
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: model)
    ran = dynatree("models")
    assert (ran.code, ran.err) == (0, "")
    assert "no: weights are missing" in ran.out
    assert "dynatree models install" in ran.out


def test_models_install(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make_ready(*, progress: Callable[[str], None]) -> Path:
        progress("converting")
        return tmp_path

    model = embedded_model(tmp_path, installed=True, converted=False)
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: model)
    monkeypatch.setattr("dynatree_core.models.embedded.make_ready", make_ready)
    ran = dynatree("models", "install")
    assert (ran.code, ran.err) == (0, "")
    *times, last = ran.out.splitlines()
    assert last == f"Tiny is ready in {tmp_path}"
    assert [re.sub(r": \d+\.\d s$", "", line) for line in times] == ["converting"]
    monkeypatch.setattr("dynatree_core.models.embedded.make_ready", lambda *, progress: tmp_path)
    ran = dynatree("models", "install")
    assert (ran.code, ran.out, ran.err) == (0, f"Tiny is ready in {tmp_path}\n", "")


def test_calibrate(dynatree: Dynatree, folders: SimpleNamespace) -> None:
    models_ = ("--target", folders.plain, "--drafter", folders.plain, "--rounds", "1")
    document = dynatree("calibrate", "--json", *ON_CPU, *models_).document
    assert document["device"] == "cpu"
    verify, draft = document["costs"]["verify"], document["costs"]["draft"]
    assert verify["seconds"] == sorted(verify["seconds"])
    assert (verify["at"][0], draft["at"][0]) == (1, 1)
    ran = dynatree("calibrate", *ON_CPU, "--target", folders.plain, "--rounds", "1")
    assert ran.code == 0
    for expected in ("target's pass, by rows", "drafter's level, by nodes", "rest of an iteration", "kept in "):
        assert expected in ran.out


def test_calibrate_where_nothing_can_be_kept(
    dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("dynatree_core.engine.costs.folder", lambda: tmp_path / "file" / "costs")
    ran = dynatree("calibrate", *ON_CPU, "--target", folders.plain, "--drafter", "prompt_lookup", "--rounds", "1")
    assert ran.code == 0
    assert "kept in" not in ran.out
    warned = ran.err.splitlines()
    assert warned
    assert all(line.startswith("dynatree: warning: measured costs cannot be kept") for line in warned)
