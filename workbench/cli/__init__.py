"""The `workbench` command.

Every recipe option comes from the registered methods, with its help text and its checks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from workbench.cli.cache import cache
from workbench.cli.last_resort import last_resort, prepared, tell
from workbench.cli.points import annotate, compare, points
from workbench.cli.port import Port
from workbench.cli.printing import show, show_point
from workbench.compress.registry import METHODS
from workbench.errors import WorkbenchError
from workbench.modules.placement import Placement
from workbench.report.gates import Gates
from workbench.report.report import load_plugins
from workbench.runtime.names import Runtime

COMMON = (
    ("data", str, "data set: a catalogue name, a hub id, or a local file or image folder"),
    ("device", str, "cpu or cuda; left out: the GPU where there is one"),
    ("ledger", str, "where points are kept: a file, or an Optuna storage URL"),
    ("evaluation_items", int, "evaluate at most so many items"),
    ("calibration_items", int, "calibrate on at most so many other items"),
    ("training_items", int, "train on at most so many other items"),
    ("context_length", int, "tokens in a window of a language model, or read of a text"),
    (
        "margin",
        float,
        (
            "stop reading once the main metric's change is known to plus or minus this: 0.01 is 1 point, or"
            " 1% of perplexity"
        ),
    ),
    (
        "runtime",
        click.Choice(get_args(Runtime)),
        "how both models are run when they are timed; see `workbench runtimes` [default: auto]",
    ),
    (
        "placement",
        click.Choice(get_args(Placement)),
        (
            "where the weights lie: on the device, streamed from the host block by block, or spread over all"
            " GPUs [default: auto]"
        ),
    ),
    ("seed", int, "seed of every random choice"),
    (
        "recipe",
        str,
        "a whole recipe as JSON, as Recipe.to_json() writes it, in place of the options of single methods",
    ),
)

QUIET = click.option("--quiet", "-q", is_flag=True, help="say nothing on stderr while it works")


def flag(name: str) -> str:
    """Return the command-line spelling of an option."""
    return f"--{name.replace('_', '-')}"


def parameters() -> list[click.Parameter]:
    """Return the options that describe a job: model, data, device and every registered method's own."""
    options: list[click.Parameter] = [click.Argument(["model"])]
    options += [click.Option([flag(name)], type=kind, help=about) for name, kind, about in COMMON]
    options.append(click.Option(["--offline"], is_flag=True, help="never reach for the network"))
    for name, step in METHODS.options().items():
        field = step.options().get(name)
        about = (
            field.description
            if field is not None
            else f"layers that {step.kind()} works on: globs or re:expressions, comma-separated"
        )
        default = "" if field is None or name == step.slider else f" [default: {field.default}]"
        options.append(click.Option([flag(name)], metavar="VALUE", help=f"{step.__name__}: {about}{default}"))
    return options


class JobCommand(click.Command):
    """A command about one model and recipe; its options are read from the registry when it is used."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the job's parameters, then the command's own."""
        own = super().get_params(ctx)
        return [*parameters(), *own]


def plugins_option(ctx: click.Context, _: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Import plugins before any option is parsed, so that theirs exist."""
    load_plugins(names)
    ctx.obj = names
    return names


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--plugin",
    multiple=True,
    is_eager=True,
    expose_value=False,
    callback=plugins_option,
    help="a module that registers methods, criteria, number formats or kinds of task; may be repeated",
)
@click.version_option(package_name="compression-workbench")
def workbench() -> None:
    """See how small and fast a model can get, and what it costs."""


@workbench.command()
def models() -> None:
    """List the models that can be picked by name."""
    from rich.table import Table

    from workbench.zoo import models as catalogue

    table = Table(
        "name",
        "task",
        "parameters",
        "licence",
        "source",
        "here",
        title="Models by name; a local directory or a hub id works too",
    )
    for entry in catalogue():
        table.add_row(
            entry.name,
            entry.task,
            f"{entry.parameters:,}",
            entry.licence,
            entry.source,
            "yes" if entry.here else "no",
        )
    show(table)


@workbench.command()
def methods() -> None:
    """List every method and choice: its source, what it computes once, what a move costs, what it does not
    do.
    """
    from rich.table import Table

    from workbench.report.methods_table import method_rows

    rows = method_rows()
    table = Table(*rows[0], title="Methods; the options of each: workbench measure --help")
    for row in rows:
        table.add_row(*row.values())
    show(table)


@workbench.command()
def kinds() -> None:
    """List every kind of task: how its models are told, what quality means, and what there is not."""
    from rich.table import Table

    from workbench.report.kinds_table import kind_rows

    rows = kind_rows()
    table = Table(*rows[0], title="Kinds of task; CONTRIBUTING.md shows how to add one")
    for row in rows:
        table.add_row(*row.values())
    show(table)


@workbench.command()
@click.option("--device", help="cpu or cuda; left out: the GPU where there is one")
@click.option("--quick", is_flag=True, help="measure nothing")
def runtimes(device: str | None, quick: bool) -> None:
    """List every runtime and kernel: what it takes, whether it runs on this machine or why not, and how fast
    it was here, next to plain torch. Then every fast path: whether it is on here, or why not.
    """
    from rich.markup import escape
    from rich.table import Table

    from workbench.fast_paths import fast_paths
    from workbench.runtime.roofline import limits_of
    from workbench.runtime.runtime_table import runtime_rows
    from workbench.util.device import describe, pick

    place = pick(device)
    table = Table(
        "name",
        "takes",
        "runs here",
        "measured here, against plain torch",
        title=f"Runtimes and kernels on {describe(place)}",
    )
    for row in runtime_rows(str(place), measure=not quick):
        table.add_row(escape(row.name), escape(row.takes), escape(row.runs), escape(row.measured))
    show(table)
    paths = Table("fast path", "makes faster", "here", title="Fast paths: the same results, sooner")
    for path in fast_paths(str(place)):
        paths.add_row(path.name, path.speeds_up, escape(f"off: {path.off}" if path.off else "on"))
    show(paths)
    if not quick:
        click.echo(limits_of(str(place)).words())


@workbench.command(cls=JobCommand)
@click.option("--again", is_flag=True, help="measure even if the ledger has this point")
@click.option(
    "--export",
    "directory",
    type=click.Path(path_type=Path),
    help="also write the compressed model to this directory",
)
@click.option("--overwrite", is_flag=True, help="replace an earlier export there")
@QUIET
@click.pass_context
def measure(
    ctx: click.Context, /, again: bool, directory: Path | None, overwrite: bool, quiet: bool, **given: Any
) -> None:
    """Compress MODEL by one recipe, measure it against the dense model, and print one table."""
    from workbench.bench import Bench
    from workbench.export import check_target
    from workbench.report.report import job_from

    job = job_from({**given, "plugins": list(ctx.obj)})
    if directory is not None:
        check_target(directory, overwrite=overwrite)
    bench = Bench(
        job.model, **{**job.settings, "progress": False if quiet else sys.stderr.isatty() or "lines"}
    )
    point = bench.measure(job.recipe, again=again)
    show_point(point)
    if damage := bench.ledger.damage():
        click.echo(f"note: {damage}")
    if directory is not None:
        click.echo(
            f"written to {bench.export(job.recipe, directory, overwrite=overwrite)}; load it with"
            f" workbench.load({str(directory)!r})"
        )


@workbench.command(cls=JobCommand)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="reports",
    show_default=True,
    help="directory of the executed notebook and the page",
)
@click.option("--name", help="of both files; left out: the model's name")
@click.option(
    "--slider-minutes",
    type=float,
    help=(
        "for the points of one slider, moved alone; the rest is left out, and said; 0 waits for all"
        " [default: 5]"
    ),
)
@QUIET
@click.pass_context
def report(ctx: click.Context, /, output: Path, name: str | None, quiet: bool, **given: Any) -> None:
    """Run the report notebook on MODEL.

    Exit code 0: every gate held; 1: one did not, or the work failed; 2: bad usage.
    """
    from workbench.report.report import report as run

    chosen = {key: value for key, value in given.items() if value is not None and value is not False}
    page = run({**chosen, "plugins": list(ctx.obj)}, output, name=name, progress=not quiet)
    click.echo(f"{page}\n{page.with_suffix('.ipynb')}")


@workbench.command()
@click.argument("notebook", default="explore")
@click.option("--no-browser", is_flag=True, help="print the address instead of opening it")
@click.option(
    "--port", type=Port(), help="of the server on 127.0.0.1; left out: the first free one from 8888"
)
def lab(notebook: str, no_browser: bool, port: int | None) -> int:
    """Open JupyterLab on NOTEBOOK of this project (explore, report) or on a notebook file."""
    from workbench.cli.serve import lab as serve

    return serve(chosen_notebook(notebook), browser=not no_browser, port=port)


@workbench.command()
@click.argument("notebook", default="explore")
@click.option("--no-browser", is_flag=True, help="print the address instead of opening it")
@click.option(
    "--port", type=Port(), help="of the server on 127.0.0.1; left out: the first free one from 8888"
)
def app(notebook: str, no_browser: bool, port: int | None) -> int:
    """Serve NOTEBOOK of this project (explore), or a notebook file, as a page without code: on 127.0.0.1,
    behind a token.
    """
    from workbench.cli.serve_app import app as serve

    return serve(chosen_notebook(notebook), browser=not no_browser, port=port)


def chosen_notebook(notebook: str) -> Path:
    """Return the file of a notebook given by name or by path."""
    from workbench.report.report import notebook_path

    return (
        Path(notebook)
        if notebook.endswith(".ipynb") and Path(notebook).is_file()
        else notebook_path(f"{Path(notebook).stem}.ipynb")
    )


for command in (points, annotate, compare, cache):
    workbench.add_command(command)

for gate, about in Gates.__pydantic_fields__.items():  # type: ignore[attr-defined]
    report.params.append(click.Option([flag(gate)], metavar="VALUE", help=f"gate: {about.description}"))


def main(arguments: list[str] | None = None) -> None:
    """Run the command: 0 if all went well, 1 if not or a gate failed, 2 for bad usage, 130 for Ctrl-C.

    An error is one line on stderr, whatever it is; `WORKBENCH_DEBUG=1` shows where it came from.
    """
    exit_with(lambda: workbench.main(arguments, "workbench", standalone_mode=False))


def exit_with(run: Callable[[], Any]) -> None:
    """Run, turning errors into one line and an exit code."""
    with prepared():
        try:
            code = run()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = 2
        except click.ClickException as error:
            tell(f"error: {error.format_message()}{help_for(error)}", error)
            code = 2
        except (click.Abort, KeyboardInterrupt):
            tell("stopped; every point measured before is in the ledger")
            code = 130
        except WorkbenchError as error:
            tell(f"error: {error}", error)
            code = error.exit_code
        except Exception as error:  # noqa: BLE001  nobody is to read a traceback
            code = last_resort(error)
    sys.exit(code if isinstance(code, int) else 0)


def help_for(error: click.ClickException) -> str:
    """Return where the right usage is told, in brackets."""
    context = getattr(error, "ctx", None)
    return "" if context is None else f" ({context.command_path} --help)"
