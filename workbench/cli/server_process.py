"""A server in a process of its own, which ends with this one: with its kernels, and whatever ended us."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType

PATIENCE_SECONDS = 10.0  # a server shuts its kernels down in one or two
STOPS = ("SIGTERM", "SIGHUP")  # as Ctrl-C; a system that does not have one never sends it


def until_stopped(serve: Callable[[], int]) -> int:
    """Serve, and return the exit code; 0 after Ctrl-C, SIGTERM or the end of the terminal, once all is put
    away.
    """
    numbers = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:  # once is enough; a second Ctrl-C ends the waiting
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    before = {number: signal.signal(number, stop) for number in numbers} if main else {}
    try:
        return serve()
    except KeyboardInterrupt:
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a server until it ends or this process is stopped; return its exit code.

    A session of its own keeps Ctrl-C from it, upon which it would ask a question.
    """
    process = subprocess.Popen(  # noqa: S603  our own words
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait()
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process under it: asked first, then killed."""
    import psutil

    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(PATIENCE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=1)
    for child in left:
        with contextlib.suppress(psutil.Error):
            child.kill()
