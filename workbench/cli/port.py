"""The port of a server, as the command line takes it."""

from __future__ import annotations

import os
import socket
from typing import Any

import click

from workbench.errors import WorkbenchError

LARGEST = 2**16 - 1


class Port(click.IntRange):
    """A number from 1 to 65535."""

    name = "port"

    def __init__(self) -> None:
        """Take any port that a user can name."""
        super().__init__(1, LARGEST)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; what is none is bad usage."""
        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= number <= LARGEST:
            self.fail(f"{value!r} is no port: give a number from 1 to {LARGEST}", param, ctx)
        return number


def check_free(port: int | None) -> None:
    """Refuse a port on which no server can listen here.

    Raises:
        WorkbenchError: it is in use, or this user may not use it.

    """
    if port is None:
        return
    with socket.socket() as probe:
        if os.name == "posix":  # one that was just closed can be used again
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise WorkbenchError(
                f"port {port} cannot be used: {error.strerror}; give another --port, or none for the first"
                " free one"
            ) from None
