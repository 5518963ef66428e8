"""How servers are started, and who is taken for a browser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from widgets.headless import without_browser
from workbench.cli.serve import lab_command
from workbench.cli.serve_app import TEMPLATES, app_address, app_command, app_environment

NOTEBOOK = Path("/some where/my notebook.ipynb")


@pytest.mark.parametrize(
    "command",
    [
        lab_command(NOTEBOOK, Path("settings"), browser=False, port=4711),
        app_command(NOTEBOOK, browser=False, port=4711),
    ],
)
def test_servers_listen_on_loopback_with_a_token_on_the_given_port(command):
    assert "--ip=127.0.0.1" in command
    assert "--port=4711" in command
    assert "--ServerApp.port_retries=0" in command
    assert f"--ServerApp.root_dir={NOTEBOOK.parent}" in command
    assert any("workbench.cli.serve=True" in word for word in command)
    assert not any("token" in word.lower() or "password" in word.lower() for word in command)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no root on this system")
@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_root_is_allowed_only_where_we_are_root(monkeypatch, user, allowed):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ("--allow-root" in app_command(NOTEBOOK)) is allowed
    assert ("--allow-root" in lab_command(NOTEBOOK, Path("settings"))) is allowed


def test_the_page_of_the_app_is_ours(monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", "/elsewhere")
    assert app_address(NOTEBOOK) == "/voila/render/my%20notebook.ipynb"
    assert app_environment()["JUPYTER_PATH"] == f"{TEMPLATES}{os.pathsep}/elsewhere"
    pages = [path.read_text() for path in TEMPLATES.rglob("*") if path.is_file()]
    assert len(pages) == 4
    assert not any("http://" in page or "https://" in page for page in pages)


@pytest.mark.parametrize(
    ("sign", "watched"), [("JPY_SESSION_NAME", True), ("VOILA_BASE_URL", True), ("SOMETHING_ELSE", False)]
)
def test_a_browser_is_known_by_what_started_the_kernel(monkeypatch, sign, watched):
    for name in ("JPY_SESSION_NAME", "VOILA_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(sign, "/")
    assert without_browser() is not watched
