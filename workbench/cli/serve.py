"""Start JupyterLab on one of the project's notebooks, tuned for sliders.

Also the server extension that does the tuning.

JupyterLab runs as a separate process on 127.0.0.1 with its token. Nothing of the user's own Jupyter settings
is changed: what differs is given on the command line and in a directory that is removed afterwards.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from workbench.cli.port import check_free
from workbench.cli.server_process import run, until_stopped

LAB_IDLE_SECONDS = 4 * 3600  # until a kernel goes that no page is connected to

SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": False,
    },
    "@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": False},
}


def lab_command(
    notebook: Path, settings: Path, *, browser: bool = True, port: int | None = None
) -> list[str]:
    """Return the command that opens JupyterLab on a notebook.

    Kernels talk over local sockets where the system has them; `workbench.cli.serve` is loaded as a server
    extension. As root (in a container) `--allow-root` is added: the server listens on 127.0.0.1 only and asks
    for its token.
    """
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ip=127.0.0.1",
        f"--ServerApp.root_dir={notebook.parent}",
        f"--LabApp.default_url=/doc/tree/{notebook.name}",
        "--ServerApp.jpserver_extensions=workbench.cli.serve=True",
        f"--LabApp.app_settings_dir={settings}",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    ]
    return [*command, *common_options(port, LAB_IDLE_SECONDS), *([] if browser else ["--no-browser"])]


def common_options(port: int | None, idle_seconds: int = LAB_IDLE_SECONDS) -> list[str]:
    """Return the options of every server of ours: local sockets to kernels, the port, and root's leave to be
    root.

    A container is often root, and jupyter_server refuses root only because it might listen to others: ours
    never does.
    """
    options = ["--KernelManager.transport=ipc"] if os.name == "posix" else []
    options += [
        f"--MappingKernelManager.cull_idle_timeout={idle_seconds}",
        f"--MappingKernelManager.cull_interval={min(idle_seconds, 60)}",
    ]
    if port is not None:
        options += [f"--port={port}", "--ServerApp.port_retries=0"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    return options


def write_settings(directory: Path) -> None:
    """Write JupyterLab's defaults for this server: no news are fetched, and no widget state is saved (5 MB):
    a saved notebook shows the panel's picture.
    """
    (directory / "overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")


def lab(notebook: Path, *, browser: bool = True, port: int | None = None) -> int:
    """Run JupyterLab on a notebook until it is stopped; return its exit code.

    Raises:
        WorkbenchError: the port cannot be used.

    """
    check_free(port)

    def serve() -> int:
        with tempfile.TemporaryDirectory(prefix="workbench-lab-") as folder:
            write_settings(Path(folder))
            return run(lab_command(notebook.resolve(), Path(folder), browser=browser, port=port))

    return until_stopped(serve)


def send_at_once() -> None:
    """Make kernel messages leave the server at once: without this each may wait 40 ms for the last one's
    acknowledgement.

    Nagle's algorithm and delayed acknowledgements stall small messages; a slider sends nothing else.
    """
    from jupyter_server.services.kernels.websocket import KernelWebsocketHandler as Handler

    if getattr(Handler, "sends_at_once", False):
        return
    before = Handler.open

    async def opened(self: Any, *args: Any, **options: Any) -> None:
        self.set_nodelay(True)
        await before(self, *args, **options)

    Handler.open = opened  # type: ignore[method-assign]
    Handler.sends_at_once = True  # type: ignore[attr-defined]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    """Tell jupyter_server that this module is an extension."""
    return [{"module": "workbench.cli.serve"}]


def _load_jupyter_server_extension(server: Any) -> None:
    """Tune the server (called by jupyter_server when it starts)."""
    send_at_once()
    server.log.info("workbench: kernel messages are sent at once")
