"""The shape of the code itself: imports that are free, files and folders of a size to read, and lists that
cannot drift. Which package may import which is a contract in pyproject.toml (`make lint`)."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import workbench
from workbench.compress.registry import METHODS
from workbench.report.gates import Gates
from workbench.report.report import PLAIN

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "workbench").rglob("*.py"))
HOUSE = ("workbench", "widgets")
PYTHON = sorted(path for folder in (*HOUSE, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
NEVER = {"widgets", "plotly", "ipywidgets", "IPython"}  # what workbench may not import at all
LATER = {
    "jupyterlab",
    "nbconvert",
    "papermill",
    "jinja2",
    "nbformat",
    "datasets",
    "gguf",
    "optuna",
    "transformers",
    "rich",
}  # only inside functions


def imported(tree: ast.AST) -> set[str]:
    """Return the top-level packages that a piece of code imports, `import_module("x")` with a constant
    included."""
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in {
            "import_module",
            "__import__",
        }:
            packages |= {
                argument.value.split(".")[0]
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant)
            }
    return packages


def at_import(path: Path) -> list[ast.stmt]:
    """Return the statements that run when a module is imported by its package: no functions, no
    TYPE_CHECKING."""
    statements: list[ast.stmt] = []
    waiting: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        nested = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        waiting += nested
        if not nested:
            statements.append(node)
    return statements


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_wait_until_they_are_used(path):
    assert not set().union(*map(imported, at_import(path)), set()) & LATER


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_reader_holds_every_file_in_one_sitting(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (400 if path.relative_to(ROOT).parts[0] in HOUSE else 600)
    assert not re.search(r"/(home|root|work|Users)/\w", text.replace(r"/(home|root|work|Users)/\w", "")), (
        "a path of one machine"
    )


def test_a_reader_holds_every_folder_in_one_sitting():
    files = [path.parent.relative_to(ROOT) for name in HOUSE for path in (ROOT / name).rglob("*.py")]
    assert {str(folder): count for folder, count in Counter(files).items() if count > 20} == {}
    assert files.count(Path("workbench")) <= 10


def fresh(code: str, folder: Path) -> dict:
    """Run code in a new process in an empty directory; it must print one line of JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    )
    assert list(folder.iterdir()) == []
    return json.loads(done.stdout)


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(workbench.__path__, "workbench.")
    if not module.name.endswith("zoo.train") and ".triton_" not in module.name
)  # Triton is there on a GPU only
STATE = """
import json, sys, threading
print(json.dumps({"modules": sorted({name.split(".")[0] for name in sys.modules}),
                  "threads": threading.active_count(),
                  "cuda": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()}))
"""


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    state = fresh(f"import workbench{STATE}", tmp_path)
    assert not set(state["modules"]) & (NEVER | LATER | {"torch", "numpy", "scipy", "pydantic"})
    assert (state["threads"], state["cuda"]) == (1, False)


def test_importing_every_module_touches_no_gpu_starts_no_thread_and_opens_no_file(tmp_path):
    watch = """
import sys
opened = []
def hook(event, args):
    named = event == "open" and isinstance(args[0], str) and isinstance(args[1], str)
    if named and args[0] != "/dev/null" and set(args[1]) & set("wax+"):
        opened.append(args[0])
    reaches = event in {"socket.connect", "subprocess.Popen"}
    if reaches and not any("torch" in str(a) or "ldconfig" in str(a) for a in args):
        opened.append(event)
sys.addaudithook(hook)
sys.dont_write_bytecode = True
"""
    imports = "\n".join(f"import {name}" for name in MODULES)
    code = f"{watch}{imports}{STATE.replace('json.dumps({', 'json.dumps({chr(111): opened, ')}"
    state = fresh(code, tmp_path)
    assert not set(state["modules"]) & NEVER
    assert (state["threads"], state["cuda"]) == (1, False)
    assert state["o"] == []


def test_all_public_names_are_there():
    assert set(workbench.__all__) == set(workbench.__dir__())
    for name in workbench.__all__:
        assert getattr(workbench, name) is not None, name
    assert {"Bench", "Recipe", "Prune", "LowRank", "Quantize", "Distill", "load", "Ledger", "METHODS"} <= set(
        workbench.__all__
    )
    with pytest.raises(AttributeError, match="module 'workbench' has no attribute 'nothing'"):
        workbench.nothing  # noqa: B018


def test_the_names_for_type_checkers_are_the_public_ones():
    tree = ast.parse((ROOT / "workbench" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    places = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert set(places) == set(workbench.PLACES)
    for name, module in places.items():
        assert workbench.PLACES[name] in {module, f"{module}.{name}"}


def test_the_report_notebook_takes_exactly_the_known_parameters():
    cells = json.loads((ROOT / "notebooks" / "report.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    body = ast.parse("".join(cell["source"])).body
    names = [target.id for node in body for target in node.targets]
    gates = list(Gates.__pydantic_fields__)
    assert names == [*PLAIN, *METHODS.options(), *gates]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    given = {name: value for name, value in values.items() if value not in (None, [], False)}
    assert set(given) <= {"model", "seed", *(step.slider for step in METHODS.steps())}


def test_no_two_parameters_share_a_name():
    names = [*PLAIN, *METHODS.options(), *Gates.__pydantic_fields__]
    assert len(names) == len(set(names))


def test_every_error_is_of_one_family():
    from workbench import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, errors.WorkbenchError) and kind.__doc__ for kind in kinds)
