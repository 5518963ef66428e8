"""The table of methods: the README shows what the registry says, and every line is about options that
exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from workbench.cli import workbench
from workbench.compress.registry import METHODS
from workbench.report.methods_table import markdown, method_rows

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_holds_the_table_as_the_registry_makes_it():
    assert markdown() in README.read_text()


@pytest.mark.parametrize("step", METHODS.steps(), ids=lambda step: step.__name__)
def test_every_line_names_options_and_choices_that_exist(step):
    assert step.about
    for line in step.about:
        assert all((line.choice, line.source, line.once, line.move, line.limits))
        names, _, values = line.choice.partition("=")
        for name in names.split(", "):
            assert name in step.options()
        for value in filter(None, values.split(", ")):
            info = step.options()[names]
            listed = step.choices(names) or f"{info.annotation} {info.metadata} {info.examples}"
            assert value in listed or value == "n:m"


@pytest.mark.parametrize("step", METHODS.steps(), ids=lambda step: step.__name__)
def test_no_choice_is_left_out(step):
    said = " ".join(line.choice for line in step.about)
    for name in ("criterion", "factorization"):
        if name in step.options():
            for value in step.choices(name):
                assert re.search(rf"\b{name}={value}\b", said)


def test_the_command_prints_every_line():
    shown = CliRunner().invoke(workbench, ["methods"])
    assert shown.exit_code == 0
    letters = re.sub(r"[^a-z0-9]", "", shown.output.lower())
    for row in method_rows():
        assert re.sub(r"[^a-z0-9]", "", row["source"].lower())[:8] in letters
