"""Private names of libraries: each in one place, and there in the installed versions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from workbench.util import library_internals
from workbench.util.library_internals import Internal, inside, lacks

ROOT = Path(__file__).parents[1]
PLACES = {"workbench/util/library_internals.py", "widgets/plot/plotly_internals.py"}
GROUPS = {
    name: value
    for name, value in vars(library_internals).items()
    if isinstance(value, tuple) and value and isinstance(value[0], Internal)
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_installed_versions_have_every_private_name(name):
    assert lacks(GROUPS[name]) == ""


def test_a_name_that_is_gone_is_told_with_its_library_and_version():
    gone = Internal("torch", inside("torch"), "_int_mm_of_old", "products of 8-bit integers")
    lost = Internal("torch", inside("torch._no_such_module"), "_int_mm", "products of 8-bit integers")
    for internal in (gone, lost):
        assert re.fullmatch(
            rf"torch \S+ has no {internal.name}, needed for products of 8-bit integers", lacks((internal,))
        )
    assert lacks((Internal("triton", inside("triton"), "jit", "kernels"),)) in {
        "",
        "triton (not installed) has no jit, needed for kernels",
    }


def reads_private(path):
    """Return whether code reads `library._name`, or tells the linter that it reads some other object's."""
    attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    return "SLF001" in path.read_text() or any(
        re.match(r"_(?!_)", node.attr)
        and re.match(r"(torch|transformers|optuna|triton|plotly)\b", ast.unparse(node))
        for node in attributes
    )


def test_private_names_are_read_in_one_place_for_each_library():
    paths = (path for folder in ("workbench", "widgets") for path in (ROOT / folder).rglob("*.py"))
    assert {str(path.relative_to(ROOT)) for path in paths if reads_private(path)} == PLACES


def catches_all(node):
    """Return whether code catches whatever is raised."""
    return isinstance(node, ast.ExceptHandler) and (
        node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
    )


@pytest.mark.parametrize("folder", ["workbench", "widgets"])
def test_whatever_is_caught_is_told_or_goes_on(folder):
    """A broad except either raises, or says what it has caught to somebody."""
    for path in (ROOT / folder).rglob("*.py"):
        for handler in filter(catches_all, ast.walk(ast.parse(path.read_text()))):
            inside = [node for line in handler.body for node in ast.walk(line)]
            told = any(isinstance(node, ast.Name) and node.id == handler.name for node in inside)
            assert told or any(isinstance(node, ast.Raise) for node in inside), f"{path}:{handler.lineno}"
