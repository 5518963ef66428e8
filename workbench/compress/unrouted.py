"""Experts that no calibration token was routed to: which rule decided instead, said where a user looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.compress.core.inverse import listed
from workbench.compress.registry import METHODS
from workbench.modules.experts import expert_of

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.recipe import Step

INSTEAD = {
    "prune": "by the magnitude of its weights",
    "quantize": "rounded to nearest",
    "lowrank": "by its plain singular values",
    "repair": "by the plain singular values of what it lost",
    "activations": "by the ranges of the experts beside it",
}  # what a rule that reads inputs comes to without any, see `workbench.calibration.routing`


def say_unrouted(step: Step, work: Work) -> None:
    """Write into the report by which rule a step that reads inputs took the experts without any, and warn of
    them once.
    """
    reads = METHODS.of(step).reads
    if work.statistics.task is not work.task or reads is None or not reads(step):
        return
    blocks = work.statistics.routing()
    names = {
        layer.origin: layer
        for layer in work.layers.values()
        if work.done.get((layer.origin, step.kind())) is step
    }
    unrouted = []
    for name, layer in names.items():
        block, _, rest = expert_of(name, blocks)
        if block and not blocks[block][0, int(rest.partition(".")[0])]:
            unrouted.append(layer)
    rule = INSTEAD.get(step.kind(), "by its weights alone")
    for layer in unrouted:
        work.say(layer, f"{rule}, as no calibration token was routed to this expert")
    if unrouted:
        all_of = sum(1 for name in names if expert_of(name, blocks)[0])
        work.warnings.append(
            f"{step.kind()}: no calibration token was routed to the experts of {len(unrouted)} of {all_of}"
            f" layers ({listed(unrouted)}): they were taken {rule.replace('its', 'their')}; give more"
            " calibration items"
        )
