"""The hub path, against a small hub served here on loopback: fetch, verify, resume, refuse, and work from the
cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_models

from workbench.zoo import load_task

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


WORDS = {
    "train.csv": ("text,label\n" + "\n".join(f"w{i} w{i + 1},{i % 2}" for i in range(40))).encode(),
    "test.csv": ("text,label\n" + "\n".join(f"w{i} w60,{i % 2}" for i in range(20))).encode(),
}


class Hub(BaseHTTPRequestHandler):
    """The four calls that huggingface_hub makes: revision, tree, HEAD and GET (with Range) of a file."""

    files: dict[str, bytes]
    gets: list[tuple[str, str | None]]
    damaged = ""
    cut = 0  # bytes after which the first GET of weights breaks

    def log_message(self, *_args):
        pass

    def answer(self, data: bytes, headers: dict[str, str], status: int = 200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def answer_data(self, path: str):
        """Serve the data set me/words: two CSV files."""
        kind, name = {"Content-Type": "application/json"}, path.rsplit("/", 1)[-1]
        if path.startswith("/api/datasets/me/words/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in WORDS.items()
            ]
            return self.answer(json.dumps(listed).encode(), kind)
        if path.startswith("/api/"):
            info = {
                "id": "me/words",
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in WORDS],
                "tags": [],
            }
            return self.answer(json.dumps(info).encode(), kind)
        if name not in WORDS:
            return self.answer(b"{}", {"X-Error-Code": "EntryNotFound"}, 404)
        tag = hashlib.sha1(WORDS[name]).hexdigest()  # noqa: S324  git names files so
        return self.answer(WORDS[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

    def answer_and_break(self, data: bytes, headers: dict[str, str]):
        kept, type(self).cut = data[: self.cut], 0
        self.answer(kept, {**headers, "Content-Length": str(len(data))})
        self.close_connection = True

    def entries(self):
        for name, data in self.files.items():
            lfs = (
                {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
                if large(name)
                else {}
            )
            yield {
                "type": "file",
                "path": name,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),  # noqa: S324
                **lfs,
            }

    def do_GET(self):  # noqa: PLR0911  one return a route
        path = self.path.split("?")[0]
        if path in {"/api/models/me/tiny", "/api/models/me/tiny/revision/main"}:
            info = {
                "id": "me/tiny",
                "modelId": "me/tiny",
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in self.files],
                "tags": [],
            }
            return self.answer(json.dumps(info).encode(), {"Content-Type": "application/json"})
        if path in {f"/api/models/me/tiny/tree/{COMMIT}", "/api/models/me/tiny/tree/main"}:
            return self.answer(
                json.dumps(list(self.entries())).encode(), {"Content-Type": "application/json"}
            )
        if path.startswith(("/api/datasets/me/words", "/datasets/me/words/")):
            return self.answer_data(path)
        matched = re.fullmatch(rf"/me/tiny/resolve/(?:{COMMIT}|main)/(.+)", path)
        if not matched or matched[1] not in self.files:
            return self.answer(
                b"{}", {"X-Error-Code": "RepoNotFound" if not matched else "EntryNotFound"}, 404
            )
        name, data = matched[1], self.files[matched[1]]
        digest = hashlib.sha256(data) if large(name) else hashlib.sha1(data)  # noqa: S324
        tag = digest.hexdigest()
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{tag}"',
            "X-Linked-Etag": f'"{tag}"',
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        if name == self.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.gets.append((name, wanted))
            if self.cut and name == "model.safetensors":
                return self.answer_and_break(data, headers)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            return self.answer(
                data[start:], {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, 206
            )
        return self.answer(data, headers)

    do_HEAD = do_GET  # noqa: N815  as http.server names it


def large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


WORKER = """
import json, os, sys
from huggingface_hub import constants
from workbench.errors import WorkbenchError
from workbench.zoo import load_task
constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that a small file has several chunks
for line in sys.stdin:
    order = json.loads(line)
    os.environ.update(order["environment"])
    try:
        said = load_task(order["name"], **order["options"]).model_fingerprint
    except WorkbenchError as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """Serve on one port for all tests: the libraries note some addresses when they are imported."""
    handler = type("Handler", (Hub,), {"files": {}, "gets": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def worker(server, tmp_path_factory):
    """Run load_task in a process of its own, with an environment that has nothing of ours about hubs and
    proxies."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **kept,
        "PYTHONPATH": path,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_ENDPOINT": server[1],
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
    }
    with subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def hub(tmp_path, server, worker):
    """Serve one model; `hub.handler.files` can be changed, `hub.load(...)` runs load_task in the worker."""
    handler, address = server
    folder = tiny_models.llama(tmp_path / "origin")
    tiny_models.words_file(tmp_path / "t.txt")
    handler.files = {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "onnx/model.safetensors": b"other"
    }
    handler.gets, handler.damaged, handler.cut = [], "", 0
    return Served(handler, address, tmp_path, worker)


class Served:
    """A running hub and a process that uses it."""

    def __init__(self, handler, address, folder, worker):
        self.handler, self.address, self.folder, self.worker = handler, address, folder, worker

    def load(self, name="me/tiny", *, address=None, offline_by_environment="", **options) -> str:
        """Load the model in the worker; return its fingerprint, or the one line that it failed with."""
        environment = {
            "HF_ENDPOINT": address or self.address,
            "HF_HOME": str(self.folder / "hf"),
            "XDG_CACHE_HOME": str(self.folder / "xdg"),
            "HF_HUB_OFFLINE": offline_by_environment,
        }
        given = {"data": str(self.folder / "t.txt"), "context": 16, "progress": False, **options}
        self.worker.stdin.write(
            json.dumps({"name": name, "environment": environment, "options": given}) + "\n"
        )
        self.worker.stdin.flush()
        return json.loads(self.worker.stdout.readline())


def test_hub_fetches_safe_files_once_and_works_offline_afterwards(hub):
    hub.handler.files["pytorch_model.bin"] = b"a pickle"
    fetched = hub.load()
    assert (
        fetched
        == load_task(
            hub.folder / "origin", hub.folder / "t.txt", context=16, progress=False
        ).model_fingerprint
    )
    names = [name for name, _ in hub.handler.gets]
    assert "model.safetensors" in names
    assert not {"pytorch_model.bin", "onnx/model.safetensors"} & set(names)
    before = len(hub.handler.gets)
    assert hub.load(offline=True) == fetched
    assert hub.load(offline_by_environment="1") == fetched
    assert hub.load(address="http://127.0.0.1:9") == fetched  # nobody there: the cache serves
    assert len(hub.handler.gets) == before


def test_hub_resumes_when_the_connection_breaks(hub):
    hub.handler.cut = 1000
    assert len(hub.load()) == 16
    assert [wanted for name, wanted in hub.handler.gets if name == "model.safetensors"] == [
        None,
        "bytes=1000-",
    ]


def test_hub_refuses_a_damaged_download_and_recovers(hub):
    hub.handler.damaged = "model.safetensors"
    said = hub.load()
    assert re.match(
        r"ModelError: model 'me/tiny'.* model.safetensors is damaged \(its sha256 is not \w{12}...\); it was"
        r" deleted",
        said,
    )
    hub.handler.damaged = ""
    assert len(hub.load()) == 16


def test_hub_only_pickles_are_refused_before_they_are_fetched(hub):
    hub.handler.files["pytorch_model.bin"] = hub.handler.files.pop("model.safetensors")
    assert "ModelError: me/tiny holds its weights only as a pickle (pytorch_model.bin)" in hub.load()
    assert "pytorch_model.bin" not in [name for name, _ in hub.handler.gets]


def test_hub_remote_code_is_refused_before_weights_are_fetched(hub):
    hub.handler.files["config.json"] = json.dumps(
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    ).encode()
    assert "needs remote code" in hub.load()
    assert {name for name, _ in hub.handler.gets} == {"config.json"}


def test_hub_unknown_model(hub):
    said = hub.load(name="me/none")
    assert re.fullmatch(
        r"ModelError: model 'me/none' cannot be fetched from http://127.0.0.1:\d+: there is no such model, or"
        r" it is private .*",
        said,
    )


def test_hub_unreachable_or_offline_is_one_clear_line_within_seconds(hub):
    hub.load(offline=True)  # the worker imports what it needs
    start = time.monotonic()
    said = hub.load(address="http://127.0.0.1:9")
    assert time.monotonic() - start < 5
    assert re.fullmatch(
        r"Unreachable: model 'me/tiny' cannot be fetched: the hub http://127.0.0.1:9 cannot be reached"
        r" \(ConnectError.*\); "
        r"use --offline if it is cached, or give a local directory",
        said,
    )
    said = hub.load(offline=True)
    assert (
        said == "Unreachable: model 'me/tiny' cannot be fetched: offline was asked for, and it is not in the"
        " cache; "
        "run once without --offline, or give a local directory"
    )
    assert hub.handler.gets == []


def test_hub_cut_weights_are_refused(hub):
    hub.handler.files["model.safetensors"] = hub.handler.files["model.safetensors"][:-100]
    assert "model.safetensors is damaged or truncated" in hub.load()


def test_hub_data_are_fetched_once_and_work_offline_afterwards(hub):
    model = tiny_models.bert(hub.folder / "bert")
    options = {"name": str(model), "data": "me/words"}
    fetched = hub.load(**options)
    assert re.fullmatch(r"\w{16}", fetched)
    assert hub.load(**options, offline=True) == fetched
    assert hub.load(**options, address="http://127.0.0.1:9") == fetched
    assert "DataError: data 'me/none' cannot be read" in hub.load(str(model), data="me/none")
    assert "BuilderConfig 'other' not found. Available: ['default']" in hub.load(
        str(model), data="me/words:other"
    )
    said = hub.load(str(model), data="me/none", address="http://127.0.0.1:9")
    assert re.match(
        r"DataError: data 'me/none' cannot be fetched: the hub http://127.0.0.1:9 cannot be reached", said
    )
