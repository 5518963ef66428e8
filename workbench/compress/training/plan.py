"""What one training is to do, the items that are drawn for it, and how it ended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.recipe import Step
from workbench.tasks.base import Items
from workbench.util.progress import Look


@dataclass(frozen=True)
class Plan:
    """One training: Adam with a cosine schedule over `steps`, ended after `stop_at` of them (0: all).

    `what` is shown as progress; `noun` and `advice` go into the error when it diverges. Batches of `batch`
    items are drawn from the task's training items with `seed`. The one who watches may end it where `may_end`
    (its step can say so afterwards). With a `step_rate` above 0 the step sizes of grids are learned too, at
    that rate of Adam for their logarithms.

    A batch is worked through in `accumulate` parts, whose gradients are added: their losses are weighted by
    the labels that they score. With several `learners` the model is made of so many parts, each of which has
    batches of its own, drawn with `seed`, `seed` + 1 and so on; a point of the curve is the mean of their
    losses. With `look_every` below `steps`, held-out items are looked at so often, and the best look is what
    is kept. With `checkpoint_every`, the training is saved so often under a name made of `identity` and all
    that it starts from, and goes on from there. `widen` holds 16-bit parameters in float32 meanwhile.
    Messages call these options by their names with `prefix` before them.
    """

    what: str
    noun: str
    advice: str
    steps: int
    learning_rate: float
    batch: int
    seed: int
    stop_at: int = 0
    may_end: bool = True
    step_rate: float = 0.0
    accumulate: int = 1
    learners: int = 1
    look_every: int = 0
    checkpoint_every: int = 0
    identity: str = ""
    widen: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class Trained:
    """How many steps were done, and whether it ended there before its time: the one who watches said so, or
    it diverged.

    `looks` are those at held-out items; `kept` is the step after which the weights were as they are now.
    """

    steps: int
    ended: bool
    looks: tuple[Look, ...] = ()
    kept: int = 0

    def words(self) -> str:
        """Return which look was kept and what was seen there, to be added to a report's line.

        Nothing without looks.
        """
        best = next((look for look in self.looks if look.step == self.kept), None)
        if best is None:
            return ""
        return (
            f", kept as after step {best.step}: held-out {best.metric} {best.value:.4g} [{best.low:.4g},"
            f" {best.high:.4g}] on {best.items} items, dense {best.dense:.4g}"
        )


@dataclass(frozen=True)
class Drawn(Items):
    """Training items, and which ones they are: `index` int64 [N], on the CPU.

    Which `learner` they are for, from 0; of which batch they are a part, if they are.
    """

    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    learner: int = 0
    whole: Items | None = None

    def __getitem__(self, index: slice | Tensor) -> Drawn:
        """Return the items of a slice or of an index tensor."""
        some = Items.__getitem__(self, index)
        return Drawn(some.inputs, some.labels, self.index[index], self.learner, self.whole)

    def to(self, device: torch.device | str) -> Drawn:
        """Return the same items on `device`; the index stays."""
        there = Items.to(self, device)
        return Drawn(there.inputs, there.labels, self.index, self.learner, self.whole)


Objective = Callable[[Drawn], Tensor]
Shown = Callable[[], nn.Module]


def identity(step: Step, prefix: str = "") -> str:
    """Return all options of a step that a checkpoint depends on.

    `prefix` stands before the names of those that it does not depend on.
    """
    return json.dumps(
        {
            name: value
            for name, value in dataclasses.asdict(step).items()
            if name not in {f"{prefix}stop_at", f"{prefix}checkpoint_every"}
        },
        sort_keys=True,
    )
