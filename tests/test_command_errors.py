"""The command line says every error in one line, with the same exit codes everywhere."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from workbench import cli
from workbench.errors import GateFailed, RecipeError, WorkbenchError
from workbench.report import report as reports
from workbench.report.report import job_from


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("name", ["offline", "progress"])
def test_yes_and_no_are_read_in_the_usual_words(name):
    for word in ("on", "y", "yes", "true", "1", "True ", "YES", "On", True, 1):
        assert job_from({"model": "fashion-vit", "weight_bits": 4, name: word}).settings[name] is True
    for word in ("off", "n", "no", "false", "0", "False", False, 0, None, "", "None"):
        assert job_from({"model": "fashion-vit", "weight_bits": 4, name: word}).settings[name] is False


@pytest.mark.parametrize("word", ["maybe", "2", "oui", "-1", "truee", "nope", 2, [True]])
def test_what_is_neither_yes_nor_no_is_refused(word):
    with pytest.raises(
        RecipeError, match=r"offline=.* is refused: give one of yes, y, on, true, 1, or no, n"
    ):
        job_from({"model": "fashion-vit", "weight_bits": 4, "offline": word})


@pytest.mark.parametrize("command", ["lab", "app"])
@pytest.mark.parametrize("port", ["0", "-1", "65536", "70000", "abc", "", "80.5", "8888 ", "1e3", "٣x"])
def test_a_port_that_is_none_is_refused_in_one_line(capsys, monkeypatch, command, port):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a server"))
    if port == "8888 ":
        port = "88 88"
    code, out, err = run(capsys, command, "--no-browser", f"--port={port}")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert f"{port!r} is no port: give a number from 1 to 65535" in line
    assert f"(workbench {command} --help)" in line


@pytest.mark.parametrize("command", ["lab", "app"])
def test_a_port_in_use_is_refused_in_one_line(capsys, monkeypatch, command):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a server"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = run(capsys, command, "--no-browser", "--port", str(port))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: port {port} cannot be used: Address already in use; give another --port")
    assert len(err.splitlines()) == 1


USAGE = [
    ["measure"],
    ["measur"],
    ["measure", "fashion-cnn", "--sparsty", "0.5"],
    ["measure", "fashion-cnn", "--runtime", "steam"],
    ["measure", "fashion-cnn", "--seed", "x"],
    ["measure", "fashion-cnn", "--device", "tpu"],
    ["measure", "fashion-cnn", "--device", "vulkan"],
    ["measure", "fashion-cnn", "--weight-bits", "1"],
    ["measure", "fashion-cnn", "--recipe", "{"],
    ["measure", "fashion-cnn", "--recipe", "[1]"],
    ["measure", "fashion-cnn", "--recipe", "[" * 100_000],
    ["measure", "fashion-cnn", "--sparsity", "nan"],
    ["measure", "fashion-cnn", "--sparsity", "0.5", "--prune-targets", "re:("],
    ["measure", "", "--sparsity", "0.5"],
    ["report", "fashion-cnn", "--device", "tpu"],
    ["report", "fashion-cnn", "--min-speedup", "0"],
    ["report", "fashion-cnn", "--slider-minutes", "long"],
    ["points", "fashion-cnn", "--output", "points.xlsx"],
    ["annotate", "fashion-cnn", "abc"],
    ["compare", "fashion-cnn"],
    ["--plugin", "no.such.plugin", "models"],
    ["--plugin", "", "models"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=lambda words: " ".join(words)[:60])
def test_bad_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"), [(GateFailed("x"), 1), (RecipeError("x"), 2), (WorkbenchError("x"), 1)]
)
def test_a_report_exits_with_the_code_of_its_error(capsys, monkeypatch, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(reports, "report", fail)
    assert run(capsys, "report", "fashion-cnn", "--weight-bits", "4")[0] == expected


class OddError(Exception):
    """An exception of a library."""


@pytest.mark.parametrize(
    "error",
    [
        KeyError("name"),
        ZeroDivisionError("division\nby zero"),
        OddError(),
        RecursionError("deep"),
        MemoryError(),
        OSError(36, "too long"),
    ],
    ids=repr,
)
def test_what_nobody_foresaw_is_one_line_with_its_kind_and_where_the_trace_lies(
    capsys, monkeypatch, own_state, error
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("workbench.bench.Bench.__init__", fail)
    monkeypatch.delenv("WORKBENCH_DEBUG", raising=False)
    code, out, err = run(capsys, "measure", "fashion-cnn", "--weight-bits", "4")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: unforeseen {type(error).__name__}: ")
    place = Path(line.split("'")[-2] if "'" in line else "")
    assert place.is_relative_to(own_state)
    assert "Traceback (most recent call last)" in place.read_text()
    assert line.endswith("WORKBENCH_DEBUG=1 shows it")
    monkeypatch.setenv("WORKBENCH_DEBUG", "1")
    code, _, err = run(capsys, "measure", "fashion-cnn", "--weight-bits", "4")
    assert code == 1
    assert "Traceback (most recent call last)" in err


def test_where_no_log_can_be_written_the_line_is_still_one(capsys, monkeypatch):
    monkeypatch.setattr("workbench.bench.Bench.__init__", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    code, _, err = run(capsys, "measure", "fashion-cnn", "--weight-bits", "4")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "its log could not be written" in err


@pytest.mark.skipif(os.name != "posix", reason="arguments of bytes")
def test_arguments_that_are_no_text_are_refused_in_one_line():
    command = [
        os.fsencode(sys.executable),
        b"-m",
        b"workbench",
        b"measure",
        b"\xff\x1b[31m/x",
        b"--weight-bits",
        b"4",
        b"--offline",
    ]
    ended = subprocess.run(
        command,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert ended.returncode == 1
    assert ended.stdout == b""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(b"error: ")
    assert b"Traceback" not in line
    assert b"\x1b" not in line


def test_output_that_nobody_reads_to_its_end_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "workbench", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        running.stdout.close()
        assert running.stderr.read() == b""


FILES = {
    "a list": b"[1]",
    "no JSON": b"{",
    "no text": b"\xff\xfe{",
    "nested": b"[" * 100_000,
    "no type": b"{}",
    "a type that is a number": b'{"model_type": 3}',
    "an architecture that is a text": b'{"model_type": "llama", "architectures": "x"}',
    "a size in words": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": "x"}',
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_whatever_a_model_folder_holds_is_refused_in_one_line(capsys, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    (tmp_path / "words.txt").write_text("w1 w2\n" * 100)
    code, out, err = run(
        capsys, "measure", str(tmp_path), "--data", str(tmp_path / "words.txt"), "--sparsity", "0.5"
    )
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "unforeseen" not in line
