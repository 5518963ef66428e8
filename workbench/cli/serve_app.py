"""Serve a notebook as an application through Voila: its panel without its code, on 127.0.0.1 and behind a
token.

Voila runs as an extension of jupyter_server, which asks for the token (Voila's own server asks for none by
default) and loads `workbench.cli.serve` as well. The page comes from our template, which fetches nothing from
outside and follows the system's light or dark theme.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import quote

from workbench.cli.port import check_free
from workbench.cli.serve import common_options
from workbench.cli.server_process import run, until_stopped

APP_IDLE_SECONDS = 600  # until the kernel of a page goes that was closed
TEMPLATES = Path(__file__).parent / "jupyter"  # a Jupyter data directory: voila/templates/workbench

FRONT_END = (
    "@jupyter-widgets/jupyterlab-manager",
    "@voila-dashboards/widgets-manager8",
    "anywidget",
)  # others fetch more than a panel needs
NO_MATHJAX = "/voila/static/nomath.js"  # in the place of a script from another site


def app_address(notebook: Path) -> str:
    """Return the path of the page on the server."""
    return f"/voila/render/{quote(notebook.name)}"


def app_command(notebook: Path, *, browser: bool = True, port: int | None = None) -> list[str]:
    """Return the command that serves a notebook as an application.

    JupyterLab and terminals are not part of it.
    """
    extensions = (
        "voila.server_extension=True",
        "workbench.cli.serve=True",
        "jupyterlab=False",
        "notebook=False",
        "jupyter_lsp=False",
        "jupyter_server_terminals=False",
    )
    return [
        sys.executable,
        "-m",
        "jupyter_server",
        "--ip=127.0.0.1",
        f"--ServerApp.root_dir={notebook.parent}",
        f"--ServerApp.default_url={app_address(notebook)}",
        f"--ServerApp.open_browser={browser}",
        *(f"--ServerApp.jpserver_extensions={extension}" for extension in extensions),
        "--VoilaConfiguration.template=workbench",
        "--VoilaConfiguration.allow_template_override=NO",
        "--VoilaConfiguration.progressive_rendering=True",
        f"--VoilaConfiguration.extension_allowlist={[*FRONT_END]}",
        f"--ServerApp.tornado_settings=mathjax_url={NO_MATHJAX}",
        *common_options(port, APP_IDLE_SECONDS),
    ]


def app_environment() -> dict[str, str]:
    """Return this process' environment with our template where Voila looks for templates."""
    return {
        **os.environ,
        "JUPYTER_PATH": os.pathsep.join(filter(None, [str(TEMPLATES), os.environ.get("JUPYTER_PATH")])),
    }


def app(notebook: Path, *, browser: bool = True, port: int | None = None) -> int:
    """Serve a notebook as an application until it is stopped; return the server's exit code.

    Raises:
        WorkbenchError: the port cannot be used.

    """
    check_free(port)
    command = app_command(notebook.resolve(), browser=browser, port=port)
    return until_stopped(lambda: run(command, app_environment()))
