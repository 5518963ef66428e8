"""Run a notebook with parameters, keep it executed, and make one HTML page that opens with no network."""

from __future__ import annotations

import importlib
import os
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from workbench.compress.registry import METHODS, PLAIN
from workbench.errors import GateFailed, LedgerError, RecipeError, WorkbenchError
from workbench.recipe import Recipe
from workbench.report.gates import Gates
from workbench.util.device import device_named
from workbench.util.text import file_name, kind_and_words, nearest

if TYPE_CHECKING:
    from workbench.bench import Bench


# The least of each number that a bench is told
COUNTS = {"evaluation_items": 2, "calibration_items": 1, "training_items": 1, "context_length": 2}
YES, NO = ("yes", "y", "on", "true", "1"), ("no", "n", "off", "false", "0")


@dataclass(frozen=True)
class Job:
    """What one report is about: validated notebook parameters."""

    model: str
    recipe: Recipe
    gates: Gates
    settings: dict[str, Any]
    slider_minutes: float = 5.0  # for the points of one slider; 0 waits for all

    def bench(self) -> Bench:
        """Return the bench of this job: the model and its data, loaded."""
        from workbench.bench import Bench
        from workbench.util.progress import say

        if self.settings.get("progress") == "lines":
            say(f"loading {self.model}")
        bench = Bench(self.model, **self.settings)
        if damage := bench.ledger.damage():
            say(f"note: {damage}")
        return bench


def load_plugins(names: str | tuple[str, ...] | list[str]) -> None:
    """Import modules by name: they register methods, criteria, number formats, metrics or kinds of task.

    Raises:
        RecipeError: a module cannot be imported.

    """
    for name in (
        [part.strip() for part in names.split(",") if part.strip()] if isinstance(names, str) else names
    ):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  a module may raise anything
            raise RecipeError(f"plugin {name!r} cannot be imported: {kind_and_words(error)}") from None


def job_from(namespace: Mapping[str, Any]) -> Job:
    """Return the job that a notebook's variables describe.

    Call it as `job_from(globals())` right after the parameters.

    Values may come as strings, as papermill's command line gives them. Everything is checked before any work.

    Raises:
        RecipeError: an unknown parameter (with the nearest names), or a bad value (with the valid ones).
    """
    load_plugins(namespace.get("plugins") or ())
    gates = tuple(Gates.__pydantic_fields__)  # type: ignore[attr-defined]
    parameters = {*PLAIN, *METHODS.options(), *gates}
    simple = (str, int, float, list, tuple, type(None))
    for name, value in namespace.items():
        if (
            not name.startswith("_")
            and isinstance(value, simple)
            and name not in parameters
            and name not in {"In", "Out"}
        ):
            raise RecipeError(f"unknown parameter {name!r}; {nearest(name, sorted(parameters))}")
    given = {name: empty_to_none(namespace.get(name)) for name in parameters}
    seed = whole("seed", given["seed"], 0)
    recipe = chosen_recipe(given["recipe"], {name: given[name] for name in METHODS.options()}, seed)
    settings = {
        name: given[name]
        for name in ("data", "device", "ledger", "runtime", "placement")
        if given[name] is not None
    }
    lines = given["progress"] == "lines"
    settings |= {
        "seed": seed,
        "offline": yes_or_no("offline", given["offline"]),
        "progress": "lines" if lines else yes_or_no("progress", given["progress"]),
    }
    if "device" in settings:
        device_named(str(settings["device"]))
    settings |= {
        name: whole(name, given[name], least) for name, least in COUNTS.items() if given[name] is not None
    }
    if given["margin"] is not None:
        settings["margin"] = fraction("margin", given["margin"])
    if not given["model"]:
        raise RecipeError(
            "parameter 'model' is missing: give a catalogue name such as 'fashion-vit', a directory or a"
            " hub id"
        )
    minutes = (
        fraction("slider_minutes", given["slider_minutes"], "5, or 0 to wait for every point")
        if given["slider_minutes"] is not None
        else Job.slider_minutes
    )
    return Job(str(given["model"]), recipe, Gates(**{name: given[name] for name in gates}), settings, minutes)


def chosen_recipe(whole_recipe: Any, options: Mapping[str, Any], seed: int) -> Recipe:
    """Return the recipe given whole as JSON (what `Recipe.to_json` writes), or that of flat options.

    Raises:
        RecipeError: no recipe, or one given in both ways.

    """
    if whole_recipe is None:
        return METHODS.recipe(options, seed)
    both = [name for name, value in options.items() if value is not None]
    if both:
        raise RecipeError(
            f"recipe={str(whole_recipe)[:80]!r} is given together with {', '.join(both)}: give the whole"
            " recipe, or single options"
        )
    return whole_recipe if isinstance(whole_recipe, Recipe) else METHODS.from_json(str(whole_recipe))


def notebook_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of the report notebook: a recipe that is given in any way replaces the notebook's
    example whole.
    """
    given = {
        name: value.to_json() if isinstance(value, Recipe) else value for name, value in parameters.items()
    }
    chosen = any(given.get(name) is not None for name in ("recipe", *METHODS.options()))
    return {**(dict.fromkeys(METHODS.options()) if chosen else {}), **given}


def empty_to_none(value: Any) -> Any:
    """Return None for what papermill's command line can only give as a string: '', 'None', 'null'."""
    return None if isinstance(value, str) and value.strip().lower() in {"", "none", "null"} else value


def whole(name: str, value: Any, least: int) -> int:
    """Return a parameter as a whole number of at least `least`."""
    try:
        number = int(str(value)) if value is not None else least
    except ValueError:
        number = least - 1
    if number < least:
        raise RecipeError(f"{name}={value!r} is refused: give a whole number of at least {least}")
    return number


def yes_or_no(name: str, value: Any) -> bool:
    """Return a parameter that is yes or no, in any of the usual words; None is no."""
    word = str(value).strip().lower()
    if value is None or word in NO:
        return False
    if word in YES:
        return True
    raise RecipeError(f"{name}={value!r} is refused: give one of {', '.join(YES)}, or {', '.join(NO)}")


def fraction(name: str, value: Any, example: str = "0.01") -> float:
    """Return a parameter as a finite number of at least 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise RecipeError(f"{name}={value!r} is refused: give a number of at least 0, such as {example}")
    return number


def notebook_path(name: str = "report.ipynb") -> Path:
    """Return a notebook of the project: beside the package in a checkout, in the environment's share folder
    when installed.
    """
    for folder in (
        Path(__file__).parents[2] / "notebooks",
        Path(sysconfig.get_path("data")) / "share/compression-workbench/notebooks",
    ):
        if (folder / name).is_file():
            return folder / name
    raise WorkbenchError(f"notebook {name!r} is not part of this installation")


def report(
    parameters: Mapping[str, Any],
    output: str | Path = "reports",
    *,
    name: str | None = None,
    progress: bool = True,
) -> Path:
    """Run the report notebook and write `<name>.ipynb` and `<name>.html` into `output`.

    Return the page's path.

    Both are written also when a gate fails or a cell raises, with what had been measured by then.

    Args:
        parameters: notebook parameters by name: `model`, sliders and their choices or a whole `recipe`, gates
            (see `job_from`).
        output: a directory, made if it is missing.
        name: of both files; None takes the model's name.
        progress: whether to say on stderr what is done: a line for each point and every ten seconds, in a
            terminal also a bar over the cells.

    Raises:
        RecipeError: a bad parameter, before any work.
        GateFailed: a gate did not hold.
        WorkbenchError: the notebook raised; the message is the cell's.
    """
    import papermill

    job = job_from(parameters)
    folder = Path(output)
    stem = name or file_name(job.model).strip("-.")
    notebook, page = folder / f"{stem}.ipynb", folder / f"{stem}.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # fail before the work, not after it
    except OSError as error:
        raise WorkbenchError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from None
    failure: WorkbenchError | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of papermill and its helpers; the notebook has its own process
        try:
            execute(notebook, notebook_parameters(parameters), progress=progress)
        except papermill.PapermillExecutionError as error:
            kinds: dict[str, type[WorkbenchError]] = {
                "GateFailed": GateFailed,
                "LedgerError": LedgerError,
                "RecipeError": RecipeError,
            }
            failure = kinds.get(error.ename, WorkbenchError)(
                error.evalue if error.ename in kinds else f"{error.ename}: {error.evalue}"
            )
        except OSError as error:
            raise WorkbenchError(
                f"cannot write the report {str(notebook)!r}: {error.strerror}; what was measured is in the"
                " ledger"
            ) from None
        write_page(notebook, page)
    if failure is not None:
        raise failure
    return page


def write_page(notebook: Path, page: Path) -> None:
    """Write the page of an executed notebook beside it, whole or not at all."""
    side = page.with_name(f".{page.name}.part")
    try:
        side.write_text(to_html(notebook), encoding="utf-8")
        side.replace(page)
    except OSError as error:
        side.unlink(missing_ok=True)
        raise WorkbenchError(
            f"cannot write the page {str(page)!r}: {error.strerror}; the executed notebook is"
            f" {str(notebook)!r}"
        ) from None


class Above:
    """A file that writes whole lines on stderr, above a progress bar where there is one."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.rest = ""

    def write(self, text: str) -> int:
        """Write the lines that are whole; hold the rest."""
        from tqdm import tqdm

        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            tqdm.write(line, file=sys.stderr)
        return len(text)

    def flush(self) -> None:
        """Show the lines at once."""
        sys.stderr.flush()


def execute(notebook: Path, parameters: Mapping[str, Any], *, progress: bool) -> None:
    """Run the report notebook with parameters and write it, executed, to `notebook` after every cell."""
    import papermill

    given = {**parameters, "progress": "lines"} if progress else dict(parameters)
    shown = {"progress_bar": progress and sys.stderr.isatty(), "stderr_file": Above() if progress else None}
    with tempfile.TemporaryDirectory(prefix="wb-", ignore_cleanup_errors=True) as sockets:
        papermill.execute_notebook(
            notebook_path(),
            notebook,
            parameters=given,
            kernel_name="python3",
            config=kernel_config(sockets),
            **shown,
        )


def kernel_config(folder: str) -> Any:
    """Return settings that let the kernel talk through local sockets in `folder`, not TCP ports, where the
    system has them.
    """
    from traitlets.config import Config

    return (
        Config({"KernelManager": {"transport": "ipc", "ip": str(Path(folder) / "k")}})
        if os.name == "posix"
        else Config()
    )


def to_html(notebook: Path) -> str:
    """Return an executed notebook as one HTML page without code that fetches nothing."""
    import nbformat
    from jinja2 import Environment
    from nbconvert import HTMLExporter

    document = nbformat.read(notebook, as_version=4)
    document.cells = [
        cell for cell in document.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    for cell in document.cells:  # what was said on the way is for the terminal
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    exporter = HTMLExporter(
        template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(document)
    body = re.sub(
        r"<script[^>]*\ssrc=[^>]*></script>", "", body
    )  # plotly asks a CDN for MathJax, which no figure here uses
    here = Path(__file__).parent
    template = Environment(autoescape=True).from_string(
        (here / "report_page.html").read_text(encoding="utf-8")
    )
    title = cast(
        "str", document.metadata.get("papermill", {}).get("parameters", {}).get("model", notebook.stem)
    )
    return template.render(title=title, body=body)
