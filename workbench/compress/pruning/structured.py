"""Prune with a structured pattern: units really leave the model, which stays an ordinary one with smaller
modules.

What belongs to a unit comes from `prunable_units` (heads, neurons) and `channels`; whole blocks are in
`blocks`. Here units are scored, chosen, taken out and reported. Removing a unit is the same as
setting all its weights to zero; only with `reconstruct` does what follows change to make up for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.compress.pruning.blocks import remove_blocks
from workbench.compress.pruning.channels import find_channels
from workbench.compress.pruning.criteria import CRITERIA
from workbench.compress.pruning.prunable_units import (
    FoundSpaces,
    Space,
    find_attentions,
    find_heads,
    find_neurons,
    removed_count,
)
from workbench.compress.pruning.reconstruction import rebuilt
from workbench.compress.pruning.schedule import rounds
from workbench.compress.pruning.surgery import narrow
from workbench.compress.pruning.surgery.config_sync import settle_numbers
from workbench.compress.pruning.surgery.rebuilding import check_rebuilds
from workbench.compress.pruning.tracing.numbers import settle_traced
from workbench.compress.pruning.tracing.units import Traced, find_traced, head_spaces
from workbench.compress.pruning.unit_scores import unit_scores
from workbench.compress.pruning.whole_experts import remove_experts
from workbench.errors import CompressionError, RecipeError, WorkbenchError
from workbench.modules.layer import Layer, output_head
from workbench.util.text import kind_and_words

if TYPE_CHECKING:
    from workbench.calibration.statistics import Statistics
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune
    from workbench.tasks.base import Task

WHOLE = {"layers": remove_blocks, "experts": remove_experts}  # what is taken out as it stands
BELONGS = {
    "heads": "attention",
    "neurons": "MLP",
    "channels": "group of channels",
    "layers": "block",
    "experts": "mixture",
}


def remove_structure(step: Prune, work: Work) -> None:
    """Take out the least important units of `step.pattern`: heads, neurons, channels, layers or experts.

    Raises:
        CompressionError: the model has no such structure, or so little of it is asked for that no whole unit
            goes.
    """
    if step.allocation == "sensitivity":
        raise RecipeError(
            f"{step!r}: allocation='sensitivity' divides zeros, not structure; use 'uniform' or 'global'"
        )
    if step.rounds > 1:
        raise RecipeError(
            f"{step!r}: structure is removed in one round; use rounds=1, with a Distill step after it"
        )
    chosen = [layer.origin for layer in work.choose(step)]
    for _ in rounds(step, work, lambda: group_norm(step, work)):
        remove(step, work)
    for origin in chosen:
        if not work.outcomes[origin]:
            work.say(origin, f"prune skipped: it is in no {BELONGS[step.pattern]} that can be removed")


def remove(step: Prune, work: Work) -> None:
    """Choose and take out units, and bring the numbers that the model keeps in line."""
    if step.pattern in WHOLE:
        WHOLE[step.pattern](step, work)
        check_runs(step, work)
        check_rebuilds(step, work)
        return
    pristine = all(layer.pristine for layer in work.layers.values())
    found_spaces = find_spaces(step, work.model, work.task, work.statistics, pristine=pristine)
    for name, reason in found_spaces.skipped.items():
        for layer in work.layers.values():
            if layer.name == name or layer.name.startswith(f"{name}."):
                work.say(layer, f"prune skipped: {reason}")
    spaces = [space for space in found_spaces.spaces if may_be_cut(space, step, work)]
    if not spaces:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found_spaces.skipped.items())[:2])
        raise CompressionError(
            f"{step!r}: {work.task.model_name} has no {step.pattern} that it can remove"
            + (f" ({reasons})" if reasons else "")
        )
    removed = choose(step, spaces, unit_scores(step, work, spaces))
    if step.sparsity and not any(len(units) for units in removed):
        most = max(space.units for space in spaces)
        least = (
            "none of them has a second one that could stay"
            if most == 1
            else f"it starts at sparsity={0.5 / most:.3g}, half a unit of {most}"
        )
        raise CompressionError(
            f"{step!r} removes nothing: {step.sparsity:.3g} of {most} {spaces[0].unit} is less than half of"
            f" one; {least}"
        )
    cut(step, work, spaces, removed)
    report(step, work, spaces, removed)
    settle_numbers(step, work)
    if any(space.block in found_spaces.traced for space in spaces):
        settle_traced(step, work, found_spaces, fresh=pristine and not work.moved)
    check_runs(step, work)
    check_rebuilds(step, work)


def group_norm(step: Prune, work: Work) -> Tensor:
    """Return the sum over units of the L2 norm of their weights (group lasso, Yuan & Lin 2006), a scalar that
    gradients flow through: what a penalty keeps small.
    """
    if step.pattern in WHOLE:
        raise RecipeError(
            f"{step!r}: penalty={step.penalty:g} acts on units within blocks, not on whole {step.pattern};"
            " use penalty=0"
        )
    found_spaces = find_spaces(step, work.model, work.task, work.statistics, pristine=False)
    norms = []
    for space in found_spaces.spaces:
        if may_be_cut(space, step, work):
            squares = [
                side_squares(work.layers[part.module], part.axis)[
                    part.index.to(work.layers[part.module].parameter.device)
                ].sum(1)
                for part in space.parts
                if part.module in work.layers
            ]
            norms.append(torch.stack(squares).sum(0).clamp_min(1e-20).sqrt().sum())
    return torch.stack(norms).sum()


def side_squares(layer: Layer, axis: str) -> Tensor:
    """Return the sum of squares of each row, or of each input channel, of a weight: float32 [rows] or
    [channels].

    Gradients flow through.
    """
    squares = layer.as_matrix(layer.parameter).float().square()
    return squares.sum(1) if axis == "rows" else squares.sum(0).unflatten(0, (-1, layer.patch)).sum(1)


def find_spaces(
    step: Prune, model: nn.Module, task: Task, statistics: Statistics, *, pristine: bool
) -> FoundSpaces:
    """Return the spaces of a pattern, and why other places are skipped.

    Channels of a `pristine` model are followed once a bench.
    """
    if step.pattern in {"heads", "neurons"}:
        alike = step.allocation == "uniform"
        known = (
            find_heads(model, step.sparsity, alike=alike) if step.pattern == "heads" else find_neurons(model)
        )
        traced = traced_of(model, task, statistics, pristine=pristine)
        more = (
            head_spaces(traced.attentions, step.sparsity, alike=alike)
            if step.pattern == "heads"
            else list(traced.neurons)
        )
        blocks = frozenset(space.block for space in more)
        skipped = (traced.skipped if step.pattern == "heads" else {}) | known.skipped
        skipped = {name: reason for name, reason in skipped.items() if name not in blocks}
        sizes = {one.name: one.size for one in traced.attentions}
        return FoundSpaces((*known.spaces, *more), skipped, blocks, sizes)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if find_attentions(model)[0]:
        return FoundSpaces(
            (), dict.fromkeys(convolutions, "its channels are the width that every block of attention reads")
        )
    if not convolutions:
        return FoundSpaces((), {})

    def follow() -> FoundSpaces:
        try:
            return find_channels(model, task.kind, task.calibration, output_head(model))
        except WorkbenchError:
            raise
        except Exception as error:  # noqa: BLE001  of the library: said, and no channel goes
            reason = f"its channels cannot be followed through the model: {kind_and_words(error)}"
            return FoundSpaces((), dict.fromkeys(convolutions, reason))

    return statistics.once("channels", follow) if pristine else follow()


def traced_of(model: nn.Module, task: Task, statistics: Statistics, *, pristine: bool) -> Traced:
    """Return the attentions and MLPs of other forms than the known ones, of a `pristine` model found once a
    bench.
    """

    def find() -> Traced:
        attentions = find_attentions(model)[0]
        known = {name for one in attentions for name in (one.query, one.key, one.value, one.output)} | {
            part.module for space in find_neurons(model).spaces for part in space.parts
        }
        return find_traced(model, task.kind, task.calibration, known)

    return statistics.once("traced units", find) if pristine else find()


def may_be_cut(space: Space, step: Prune, work: Work) -> bool:
    """Return whether the targets pick one of its layers and leave out none, and each is a layer of its own.

    Else say why not.
    """
    layers = [work.layers[name] for name in space.modules() if name in work.layers]
    reason = next((f"{name}: {work.left[name]}" for name in space.modules() if name in work.left), "")
    shared = next((layer for layer in layers if layer.others), None)
    if shared is not None:
        reason = f"{shared.name}: its weight is shared with {', '.join(shared.others)}"
    out = next((layer for layer in layers if step.excluded(*layer.names) is not None), None)
    if out is not None:
        reason = f"its {space.unit} are tied to {out.origin}, which targets leave out"
    for layer in layers:
        if reason:
            work.say(layer, f"prune skipped: {reason}")
    return not reason and any(work.takes(step, layer) for layer in layers)


def choose(step: Prune, spaces: list[Space], scores: list[Tensor]) -> list[Tensor]:
    """Return the units of each space that go, int64 [gone] ascending: the same fraction of each, or the least
    of all together. scores: of each space, [units].
    """
    if step.allocation == "uniform":
        counts = [removed_count(space.units, step.sparsity) for space in spaces]
    else:
        # The scale of norms differs from block to block: each is divided by its block's mean
        norms = CRITERIA[step.criterion].units == "norm"
        even = [score / score.mean().clamp_min(1e-30) if norms else score for score in scores]
        # the best unit of each space cannot go
        free = [values.sort(stable=True).values[:-1] for values in even]
        owners = torch.cat([torch.full((len(values),), place) for place, values in enumerate(free)])
        total = min(removed_count(sum(space.units for space in spaces), step.sparsity), len(owners))
        counts = (
            owners[torch.cat(free).sort(stable=True).indices[:total]].bincount(minlength=len(spaces)).tolist()
        )
    return [
        score.flip(0).sort(stable=True).indices[:gone].neg().add(len(score) - 1).sort().values
        for score, gone in zip(scores, counts, strict=True)
    ]  # ties: the last go


def cut(step: Prune, work: Work, spaces: list[Space], removed: list[Tensor]) -> None:
    """Take the chosen units out of every module that they touch."""
    gone: dict[str, dict[str, list[Tensor]]] = {}
    for space, units in zip(spaces, removed, strict=True):
        for part in space.parts:
            if len(units):
                gone.setdefault(part.module, {}).setdefault(part.axis, []).append(part.index[units].flatten())
    for done, (name, sides) in enumerate(gone.items()):
        work.progress(step.kind(), done, len(gone))
        layer = work.layers.get(name)
        if layer is None:  # a batch norm
            module = work.model.get_submodule(name)
            narrow(module, rows=others(len(module.weight), sides["rows"]))  # type: ignore[arg-type]
        else:
            cut_layer(step, work, layer, {side: torch.cat(indices) for side, indices in sides.items()})
    work.progress(step.kind(), len(gone), len(gone))


def cut_layer(step: Prune, work: Work, layer: Layer, gone: dict[str, Tensor]) -> None:
    """Take rows and input channels out of one layer, and keep its promises and its place in the dense weight
    in step.
    """
    size, per = layer.shape, layer.patch
    rows = others(size[0], [gone["rows"]]) if "rows" in gone else None
    channels = others(size[1] // per, [gone["columns"]]) if "columns" in gone else None
    columns = None if channels is None else (channels[:, None] * per + torch.arange(per)).flatten()
    matrix = rebuilt(layer, columns, work) if step.reconstruct and columns is not None else None
    narrow(layer.module, rows, channels)
    layer.keep(rows, columns)
    layer.pristine = layer.finite = False
    if matrix is not None:
        layer.write(matrix if rows is None else matrix[rows.to(matrix.device)])


def others(size: int, gone: list[Tensor]) -> Tensor:
    """Return the indices below `size` that are not among those gone, int64 [stays] ascending."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[torch.cat(gone)] = False
    return stays.nonzero().flatten()


def report(step: Prune, work: Work, spaces: list[Space], removed: list[Tensor]) -> None:
    """Say for every layer which units left it, what was asked for and what was given."""
    for space, units in zip(spaces, removed, strict=True):
        given = len(units) / space.units
        asked = (
            ""
            if abs(given - step.sparsity) < 5e-4
            else (
                f" ({step.sparsity:.3g} asked, {given:.3g} given"
                f"{'; one has to stay' if len(units) == space.units - 1 and step.sparsity > given else ''})"
            )
        )
        outcome = (
            f"{len(units)} of {space.units} {space.unit} of {space.block} removed by {step.criterion}{asked}"
        )
        outcome += f": {ranges(units.tolist())}" if len(units) else ""
        outcome += ", what follows refitted" if step.reconstruct else ""
        for name in space.modules():
            if name in work.layers:
                work.took(step, work.layers[name], outcome)


def ranges(numbers: list[int], most: int = 12) -> str:
    """Return ascending numbers in a few words: `0-2, 7`; past `most` ranges only how many more there are."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    texts = ["-".join(map(str, run)) for run in runs]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more ranges" if len(texts) > most else "")


def check_runs(step: Prune, work: Work) -> None:
    """Run one item through the smaller model, once a bench and pattern: a model with a rule of its own is
    refused here, in words.
    """

    def run() -> bool:
        device = next(work.model.parameters()).device
        try:
            with torch.no_grad():
                work.task.kind.logits(work.model, work.task.calibration[:1].to(device))
        except (RuntimeError, ValueError, IndexError) as error:
            raise CompressionError(
                f"{step!r}: {type(work.model).__name__} does not run without its {step.pattern}"
                f" ({' '.join(str(error).split())[:200]})"
            ) from None
        return True

    # A router may need some experts of every group
    size = step.sparsity if step.pattern == "experts" else None
    work.statistics.once(("runs without", step.pattern, size), run)
