"""The commands about points that are there already: list and export them, pin them, note something, compare
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from workbench.cli.printing import show
from workbench.errors import LedgerError

if TYPE_CHECKING:
    from workbench.ledger.ledger import Ledger
    from workbench.measure.measurement import Measurement

LEDGER = click.option(
    "--ledger",
    "where",
    help="where points are kept: a file, or an Optuna storage URL; left out: the user's own file of MODEL",
)


@click.command()
@click.argument("model")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="write them to this .csv or .jsonl file; one that is there is kept, the new name numbered",
)
@click.option("--pinned", is_flag=True, help="only those that are pinned")
@LEDGER
def points(model: str, output: Path | None, pinned: bool, where: str | None) -> None:
    """List every point measured on MODEL, with its key, or write them to a file."""
    from rich.markup import escape
    from rich.table import Table

    from workbench.ledger.table import FORMATS, save_points
    from workbench.measure.card import quality_words, touched_share
    from workbench.predict.scoring import words_of as predictions
    from workbench.util.text import size

    if output is not None and output.suffix not in FORMATS:
        raise click.UsageError(f"--output {str(output)!r}: the name must end in {' or '.join(FORMATS)}")
    ledger = opened(model, where)
    said = ledger.annotations()
    rows = [row for row in rows_of(ledger, model) if not pinned or (row.key in said and said[row.key].pinned)]
    if output is not None:
        click.echo(f"{len(rows)} points written to {save_points(rows, output, said)}")
        tell_damage(ledger)
        return
    table = Table("key", "recipe", "quality", "file", "touched", "speed", "pinned", "note")
    for row in rows:
        mark = said.get(row.key)
        speed = f"{row.latency.speedup.value:.2f}x" if row.latency else ""
        cells = (
            row.key,
            row.recipe.label(),
            quality_words(row.primary),
            size(row.sizes.file_bytes),
            touched_share(row),
            speed,
            "yes" if mark and mark.pinned else "",
            mark.note if mark else "",
        )
        table.add_row(*map(escape, cells))
    show(table)
    if accuracy := predictions(rows):
        click.echo(accuracy)
    tell_damage(ledger)


@click.command()
@click.argument("model")
@click.argument("key")
@click.option("--note", help='any text; "" removes the note')
@click.option(
    "--pin/--unpin",
    "pinned",
    default=None,
    help="whether the point stands first in lists and is marked on plots",
)
@LEDGER
def annotate(model: str, key: str, note: str | None, pinned: bool | None, where: str | None) -> None:
    """Write a note on the point KEY of MODEL, or pin it."""
    if note is None and pinned is None:
        raise click.UsageError("nothing to write: give --note, --pin or --unpin")
    ledger = opened(model, where)
    said = ledger.annotate(key, note=note, pinned=pinned)
    click.echo(f"{key}: {'pinned' if said.pinned else 'not pinned'}; note: {said.note or 'none'}")
    tell_damage(ledger)


@click.command()
@click.argument("model")
@click.argument("keys", nargs=-1, required=True)
@LEDGER
def compare(model: str, keys: tuple[str, ...], where: str | None) -> None:
    """Show two to six points of MODEL side by side, by their KEYS."""
    from rich.markup import escape
    from rich.table import Table

    from workbench.search.compare import comparison, facts

    ledger = opened(model, where)
    rows = {key: ledger.find(key) for key in keys}
    if missing := [key for key, row in rows.items() if row is None]:
        raise LedgerError(
            f"no point {missing[0]!r} in the ledger {ledger.where!r}: `workbench points {model}` lists them"
        )
    record = comparison([row for row in rows.values() if row is not None])
    table = Table("", *(row.key for row in record.points))
    for choice in record.choices:
        if choice.differs:
            table.add_row(escape(f"{choice.step} {choice.option}"), *map(escape, choice.texts))
    for fact in facts(record):
        table.add_row(escape(fact.name), *map(escape, fact.words))
    show(table)
    for apart in record.apart:
        click.echo(apart.words(record.points[0].primary.metric, record.points[0].primary.confidence))
    tell_damage(ledger)


def opened(model: str, where: str | None) -> Ledger:
    """Return the ledger of a model, which must be there."""
    from workbench.ledger.ledger import Ledger, default_path

    place = where or str(default_path(model))
    if "://" not in place and not Path(place).is_file():
        raise LedgerError(
            f"nothing is measured on {model!r} yet: there is no ledger {place!r}; give --ledger if the points"
            " are elsewhere"
        )
    return Ledger(place)


def tell_damage(ledger: Ledger) -> None:
    """Say what of a ledger cannot be read, and where, if anything."""
    if damage := ledger.damage():
        click.echo(f"note: {damage}")


def rows_of(ledger: Ledger, model: str) -> list[Measurement]:
    """Return the points of a model."""
    return [row for row in ledger.rows() if row.context.model_name == model]
