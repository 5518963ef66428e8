"""Tables and points on a terminal."""

from __future__ import annotations

import sys
from typing import Any

import click


def show(table: Any) -> None:
    """Print a rich table, wide where the output is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)


def show_point(point: Any) -> None:
    """Print a point: verdict, everything measured, every layer."""
    from rich.markup import escape
    from rich.table import Table

    from workbench.measure.card import notes, verdict
    from workbench.measure.summary import layer_rows, summary

    click.echo(verdict(point))
    table = Table("", "dense", "compressed")
    for row in summary(point):
        table.add_row(*map(escape, row))
    show(table)
    layers = Table(*layer_rows(point)[0])
    for cells in layer_rows(point):
        layers.add_row(*map(escape, cells.values()))
    show(layers)
    for warning in notes(point):
        click.echo(f"note: {warning}")
