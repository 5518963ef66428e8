"""The command line: one line for an error, one table for a result, and the same words as everywhere."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from workbench import cli
from workbench.compress.registry import METHODS
from workbench.ledger.ledger import Ledger
from workbench.report.gates import Gates


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process as the console script does; return exit code, stdout and stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


BAD = [
    (["measure", "fashion-cmn"], r"unknown model 'fashion-cmn'; nearest: fashion-cnn"),
    (
        ["measure", "fashion-cnn", "--sparsity", "1.0"],
        "Prune(sparsity='1.0') is refused: input should be less than 1",
    ),
    (["measure", "fashion-cnn", "--sparsity", "half"], "Prune(sparsity='half') is refused"),
    (
        ["measure", "fashion-cnn", "--rank-ratio", "0"],
        "LowRank(rank_ratio='0') is refused: input should be greater than 0",
    ),
    (
        ["measure", "fashion-cnn", "--weight-bits", "1"],
        "Quantize(weight_bits='1') is refused: input should be greater than or equal to 2",
    ),
    (
        ["measure", "fashion-cnn", "--weight-bits", "33"],
        "Quantize(weight_bits='33') is refused: input should be less than or equal to 16",
    ),
    (["measure", "fashion-cnn", "--temperature", "2"], "Distill cannot come first"),
    (["measure", "fashion-cnn", "--pattern", "2:4"], "pattern given without sparsity"),
    (["measure", "fashion-cnn", "--sparsity", "0.3", "--pattern", "2:4"], "means sparsity=0.5"),
    (["measure", "fashion-cnn", "--device", "tpu"], "unknown device 'tpu'"),
    (
        ["measure", "fashion-cnn", "--evaluation-items", "1"],
        "evaluation_items=1 is refused: give a whole number of at least 2",
    ),
    (["measure", "fashion-cnn", "--seed", "-1"], "seed=-1 is refused"),
    (
        [
            "measure",
            "fashion-cnn",
            "--sparsity",
            "0.5",
            "--prune-targets",
            "nothing",
            "--evaluation-items",
            "16",
        ],
        "target 'nothing' of prune names no layer",
    ),
    (
        ["measure", "fashion-cnn", "--weight-bits", "4", "--group-size", "11", "--evaluation-items", "16"],
        "group_size 11 does not divide",
    ),
    (["measure", "no/such", "--offline"], "no/such"),
    (["report", "fashion-cnn", "--max-quality-drop", "-1"], "Gates(max_quality_drop='-1') is refused"),
    (["report", "fashion-cnn", "--evaluation-items", "0"], "evaluation_items=0 is refused"),
    (["report", "fashion-cnn", "--weight-bits", "1"], "Quantize(weight_bits='1') is refused"),
    (["--plugin", "no_such_plugin", "models"], "plugin 'no_such_plugin' cannot be imported"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_gets_one_line_and_an_exit_code(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "papermill.execute_notebook", lambda *_, **__: pytest.fail("refused only after the work began")
    )
    code, out, err = run(
        capsys, *arguments, *(["--output", str(tmp_path / "reports")] if "report" in arguments else [])
    )
    failed = ("unknown model", "no/such", "does not divide")  # what was meant is plain, and cannot be done
    assert code == (1 if any(part in message for part in failed) else 2)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []  # nothing written half


def test_wrong_usage_is_exit_code_2_with_the_nearest_option(capsys):
    code, out, err = run(capsys, "measure", "fashion-cnn", "--sparsty", "0.5")
    assert (code, out) == (2, "")
    assert "--sparsity" in err
    assert "Traceback" not in err
    assert run(capsys, "measure")[0] == 2
    assert run(capsys, "measur")[0] == 2


def test_models_are_listed_with_what_one_needs_to_know(capsys):
    code, out, _ = run(capsys, "models")
    assert code == 0
    for name in (
        "fashion-cnn",
        "fashion-vit",
        "smollm2-135m",
        "image classification",
        "language modelling",
        "697,322",
        "MIT",
    ):
        assert name in out


def test_help_offers_every_option_of_every_method_and_every_gate(capsys):
    code, out, _ = run(capsys, "report", "--help")
    assert code == 0
    flat = " ".join(out.split())
    for name, step in METHODS.options().items():
        assert cli.flag(name) in flat
        if name in step.options():
            assert " ".join(step.options()[name].description.split()[:3]) in flat
    for name in Gates.__pydantic_fields__:
        assert cli.flag(name) in flat
    assert "--max-quality-drop" not in run(capsys, "measure", "--help")[1]


def test_measure_prints_the_verdict_the_numbers_and_every_layer(capsys, tmp_path):
    where = tmp_path / "points.journal"
    arguments = [
        "measure",
        "fashion-cnn",
        "--sparsity",
        "0.5",
        "--weight-bits",
        "4",
        "--evaluation-items",
        "64",
        "--offline",
        "--device",
        "cpu",
        "--ledger",
        str(where),
    ]
    code, out, err = run(capsys, *arguments, "--export", str(tmp_path / "out"))
    assert code == 0
    assert "Traceback" not in err
    assert out.startswith("50% sparse + W4: accuracy ")
    for phrase in (
        "smaller on disk",
        "file bytes",
        "theoretical bytes",
        "packed bytes",
        "peak memory",
        "latency",
        "no 4-bit kernel",
        "answers that changed",
        "classifier.1",
    ):
        assert phrase in out
    (point,) = Ledger(where).rows()
    assert f"{point.sizes.file_bytes:,}" in out
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == point.sizes.file_bytes
    assert point.items == 64
    code, again, _ = run(capsys, *arguments)  # from the ledger: the same numbers, latency and all
    assert (code, again) == (0, out[: out.index("written to")])
    code, _, err = run(capsys, *arguments, "--export", str(tmp_path / "out"))
    assert code == 1
    assert "holds an earlier export: pass overwrite=True (--overwrite)" in err
    assert run(capsys, *arguments, "--export", str(tmp_path / "out"), "--overwrite")[0] == 0


def test_the_ledger_may_be_a_url(capsys, tmp_path):
    url = f"sqlite:///{tmp_path / 'points.db'}"
    code, _, _ = run(
        capsys,
        "measure",
        "fashion-cnn",
        "--weight-bits",
        "8",
        "--evaluation-items",
        "16",
        "--ledger",
        url,
        "--device",
        "cpu",
    )
    assert code == 0
    assert len(Ledger(url)) == 1


def test_ctrl_c_says_that_nothing_is_lost(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.bench.Bench.__init__", interrupted)
    code, _, err = run(capsys, "measure", "fashion-cnn", "--weight-bits", "4")
    assert code == 130
    assert err.strip() == "stopped; every point measured before is in the ledger"


def test_the_console_script_is_installed_and_prints_no_traceback():
    script = Path(sys.executable).with_name("workbench")
    bad = subprocess.run(
        [script, "measure", "fashion-cnn", "--weight-bits", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.splitlines() == [
        "error: Quantize(weight_bits='1') is refused: input should be greater than or equal to 2"
    ]


def test_every_command_has_help_and_the_version_is_told(capsys):
    assert f"version {importlib.metadata.version('compression-workbench')}" in run(capsys, "--version")[1]
    for command in ("models", "measure", "report"):
        result = CliRunner().invoke(cli.workbench, [command, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.output
