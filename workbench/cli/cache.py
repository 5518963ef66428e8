"""The `workbench cache` command: what is kept on disk for the next session, and how to clear it."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import click

from workbench.errors import WorkbenchError


@click.command()
@click.option("--clear", is_flag=True, help="delete all of it; it is computed again when it is needed")
def cache(clear: bool) -> None:
    """List what was computed once and is kept on disk, by model: statistics, factorisations, scales.

    WORKBENCH_CACHE moves it, or is "off".
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from workbench.calibration.disk_cache import DISK_BYTES, WHERE, contents, folder
    from workbench.calibration.disk_cache import clear as delete

    place = folder()
    if place is None:
        click.echo(f"nothing is kept on disk: {WHERE} is off")
        return
    if clear:
        try:
            click.echo(f"{delete(place) / 2**20:.1f} MB deleted from {place}")
        except OSError as error:
            raise WorkbenchError(f"cannot clear {place}: {error}") from None
        return
    kept = contents(place)
    used = sum(model.bytes for model in kept)
    table = Table(
        "model",
        "weights",
        "values",
        "MB",
        "last used",
        title=(f"{used / 2**20:.1f} of at most {DISK_BYTES / 2**20:,.0f} MB in {place}"),
    )
    for model in kept:
        table.add_row(
            escape(model.name),
            model.fingerprint,
            str(model.files),
            f"{model.bytes / 2**20:.1f}",
            f"{datetime.fromtimestamp(model.used, UTC):%Y-%m-%d %H:%M} UTC",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
