"""The table of mutants fits the code. `make mutants` runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_is_a_change_that_compiles_and_has_tests(mutant):
    before, after = Path(ROOT, mutant.file()).read_text(encoding="utf-8"), mutant.source()
    assert after != before
    if mutant.file().suffix == ".py":  # that those in C compile, the script says
        assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    for test in mutant.tests:
        file, _, name = test.partition("::")
        defined = {
            name.id if isinstance(name, ast.Name) else name.name
            for name in ast.walk(ast.parse(Path(ROOT, file).read_text(encoding="utf-8")))
            if isinstance(name, ast.FunctionDef | ast.Name)
        }
        assert name.partition("[")[0] in defined
