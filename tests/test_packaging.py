"""What is written twice is equal, and what the README promises exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_lists_what_pyproject_lists() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert f"python{PROJECT['requires-python']}" in conda
    assert sorted(item for item in pip if not item.startswith("--")) == sorted(
        [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    )


def test_constraints_pin_every_direct_dependency() -> None:
    name = re.compile(r"^[A-Za-z0-9_.-]+")
    pinned = {
        name.match(line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    wanted = {
        name.match(item)[0].lower().replace("_", "-")
        for item in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    }
    assert wanted <= pinned


def test_readme_first_screen_names_targets_that_exist() -> None:
    first = (ROOT / "README.md").read_text()[:2500]
    targets = re.findall(r"^make (\w+)", first, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"report", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert "make VENV" in (ROOT / ".ci" / "run").read_text()


def test_every_part_runs_and_the_end_says_how_each_went() -> None:
    commands = ("first: echo seen", "second: exit 3", "third: NAME='a: b' sh -c 'echo $NAME'")
    run = subprocess.run([ROOT / ".ci" / "each", *commands], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert {"seen", "a: b"} < set(run.stdout.splitlines())
    summary = ["=== all parts", "first: passed", "second: FAILED, exit code 3", "third: passed"]
    assert run.stdout.splitlines()[-4:] == summary
    assert (
        subprocess.run(
            [ROOT / ".ci" / "each", *commands[::2]], stdout=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_runs_its_three_parts_through_that() -> None:
    told = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/installed-dev", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ".ci/each" in told
    assert re.findall(r'"(\w+): ', told) == ["browser", "tests", "notebooks"]


def test_embedded_weights_stay_small() -> None:
    weights = list((ROOT / "workbench" / "zoo" / "embedded").rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(path.stat().st_size for path in weights) < 8_000_000


@pytest.mark.slow
def test_wheel_carries_models_page_and_notebooks(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for ending in (
        "fashion-vit/model.safetensors",
        "fashion-cnn/model.safetensors",
        "fashion-mnist-slice.npz",
        "report_page.html",
        "templates/workbench/index.html.j2",
        "static/workbench.css",
        "widgets/labels.js",
        "notebooks/report.ipynb",
        "LICENSE-fashion-mnist",
    ):
        assert any(name.endswith(ending) for name in names), ending
    assert not [name for name in names if name.startswith("tests/")]
