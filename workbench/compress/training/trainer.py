"""Training that keeps promises: pruned weights stay zero, weights on a grid stay on it.

Shared by every step that trains.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.core.batch import Batch
from workbench.compress.core.context import Work
from workbench.compress.training import checkpoints
from workbench.compress.training.divergence_guard import trouble, worse
from workbench.compress.training.shadow_weights import hidden_copies
from workbench.compress.training.trainable import Moving
from workbench.compress.training.validation import HeldOut, held_out
from workbench.errors import CompressionError
from workbench.modules.layer import Layer
from workbench.modules.sharing import own_parameters
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


@torch.enable_grad()  # also where the caller has switched gradients off
def train(
    step: Step,
    work: Work,
    layers: list[Layer],
    plan: Plan,
    objective: Objective,
    *,
    start: Callable[[Batch], Tensor] = Batch.matrices,
    shown: Shown | None = None,
) -> Trained:
    """Train `work.model` to make `objective(items)` small.

    Masks and grids of `layers` hold after every optimizer step.

    Where weights lie on a grid, float32 copies of them move; `start(batch)` is where these begin, the rounded
    weights themselves or others that round to the same codes. Where `work.model` only stands for changes of
    another model, `shown()` is that model as it is at the moment: what looks look at, and what a checkpoint
    is known by.

    All parameters move where the targets of `step` begin with all layers, else those of the modules of
    `layers`; what a target leaves out never does. The parameters become the model's own first. The curve
    continues that of earlier trainings.

    It ends where it diverges (see `workbench.compress.training.divergence_guard`): the weights go back to the
    best ones seen, and the warnings say so. They are those of the best look, else those before the tenth of
    all steps in which training loss was lowest, or those that it began with.

    Raises:
        CompressionError: loss or gradients are not finite before the first step, or not even one item fits
            into memory.
    """
    shown = shown or (lambda: work.model)
    held = (
        held_out(work, plan.look_every, plan.steps, f"{plan.prefix}look_every")
        if 0 < plan.look_every < plan.steps
        else None
    )
    path = checkpoints.checkpoint_path(shown(), told(plan, work)) if plan.checkpoint_every else None
    own_parameters(work.model)  # they are about to be changed in place
    trained = trainable(work.model, layers, kept_out(step, work), everything=step.everything)
    moving = Moving(layers, trained, hidden_copies(layers, start, learn_steps=plan.step_rate > 0))
    if plan.widen:
        moving.widen(work.model)
    run = Run.begun(work, plan, moving, held, shown)
    run.resume(path)
    with repeatable_convolutions():
        run.go(objective, path)
    work.progress(plan.what, plan.steps, plan.steps)
    work.model.zero_grad(set_to_none=True)
    work.model.requires_grad_(False)
    moving.narrow()
    for copy in moving.hidden:
        copy.finish()
    for layer in layers:
        layer.pristine = layer.finite = False
    return Trained(run.done, run.ended, tuple(run.looks), run.kept)


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Have cuDNN take only algorithms that add in one order: else the gradient of a convolution differs in
    its last bit from run to run.
    """
    chosen = torch.backends.cudnn
    before = chosen.deterministic, chosen.benchmark
    chosen.deterministic, chosen.benchmark = True, False
    try:
        yield
    finally:
        chosen.deterministic, chosen.benchmark = before


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


def told(plan: Plan, work: Work) -> list[object]:
    """Return what a checkpoint is known by besides the weights that it starts from."""
    known = dataclasses.replace(plan, stop_at=0, checkpoint_every=0)
    return [
        known,
        work.task.model_fingerprint,
        work.task.data_fingerprint,
        next(work.model.parameters()).device.type,
        torch.__version__,
    ]


def kept_out(step: Step, work: Work) -> set[int]:
    """Return the ids of the parameters of every layer that a target leaves out, bias included."""
    modules = [layer.module for layer in work.layers.values() if step.excluded(*layer.names) is not None]
    modules += [work.model.get_submodule(name) for name in work.left if step.excluded(name) is not None]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def trainable(
    model: nn.Module, layers: list[Layer], frozen: set[int], *, everything: bool
) -> list[nn.Parameter]:
    """Return the parameters that are trained as they are: all, or those of `layers`, but for weights on a
    grid; `frozen` ids stay.
    """
    gridded = {id(layer.parameter) for layer in layers if layer.grid is not None}
    chosen = {id(p) for layer in layers for p in layer.module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(
            parameter.is_floating_point()
            and (everything or id(parameter) in chosen)
            and id(parameter) not in frozen
        )
    return [p for p in model.parameters() if p.requires_grad and id(p) not in gridded]


@dataclass
class Run:
    """A training in progress; mutable.

    `losses` holds one number for each step done, `best` is what to go back to.
    """

    work: Work
    plan: Plan
    moving: Moving
    held: HeldOut | None
    shown: Shown
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generators: list[torch.Generator]  # one a learner
    parts: int
    before: int  # points of earlier trainings on the curve
    losses: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    best: tuple[int, float, list[Tensor]] | None = None  # step, loss, snapshot
    done: int = 0
    ended: bool = False
    kept: int = 0

    @classmethod
    def begun(cls, work: Work, plan: Plan, moving: Moving, held: HeldOut | None, shown: Shown) -> Run:
        """Return a training before its first step."""
        groups: list[dict[str, Any]] = [
            {"params": moving.weights, "lr": plan.learning_rate},
            {"params": moving.steps, "lr": plan.step_rate},
        ]
        optimizer = torch.optim.Adam(groups if moving.steps else groups[:1])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / plan.steps))
        )
        return cls(
            work,
            plan,
            moving,
            held,
            shown,
            optimizer,
            schedule,
            [torch.Generator().manual_seed(plan.seed + learner) for learner in range(plan.learners)],
            plan.accumulate,
            len(work.curve),
        )

    @property
    def last(self) -> int:
        """Return the step after which the training ends by itself."""
        return self.plan.stop_at or self.plan.steps

    def go(self, objective: Objective, path: Path | None) -> None:
        """Do all steps that are left."""
        self.look()
        while self.done < self.last and not self.ended:
            self.work.progress(self.plan.what, self.done, self.plan.steps)
            wrong = self.advance(objective)
            if wrong:
                return self.fall_back(wrong, path)
            self.work.training.watch(self.work.curve, self.before + self.plan.steps)
            self.ended = self.plan.may_end and self.work.training.enough()
            self.look()
            if path is not None and (
                self.done % self.plan.checkpoint_every == 0
                or self.ended
                or self.done == self.last < self.plan.steps
            ):
                checkpoints.save(path, self.state(), f"{self.plan.prefix}checkpoint_every")
        if not self.moving.finite():
            return self.fall_back("a weight is not finite", path)
        self.kept = self.done
        if self.held is not None and self.best is not None and self.best[0] != self.done:
            self.kept = self.best[0]
            self.moving.restore(self.best[2])
        elif self.held is None and (words := worse(self.losses)):
            self.work.warnings.append(f"{self.plan.noun} {words}; {self.plan.advice}")
        if path is not None and self.done == self.plan.steps:
            path.unlink(missing_ok=True)
        return None

    def advance(self, objective: Objective) -> str:
        """Do one optimizer step.

        Return what is wrong instead, and do nothing, if the training has diverged.
        """
        total = self.gradients(self.drawn(), objective)
        self.moving.pass_through()
        loss, largest = torch.stack(
            [total.float(), self.moving.largest_gradient().to(total.device)]
        ).tolist()  # one wait for the device
        if wrong := trouble(loss, largest, self.losses):
            return wrong
        self.losses.append(loss)
        self.remember()
        self.optimizer.step()
        self.schedule.step()
        self.moving.hold()
        self.work.curve.append((self.before + self.done, loss))
        self.done += 1
        return ""

    def drawn(self) -> list[Drawn]:
        """Return the next batch of each learner, on the model's device."""
        training, device = self.work.task.training, next(self.work.model.parameters()).device
        count = len(training) - (0 if self.held is None else len(self.held.items))
        found = []
        for learner, generator in enumerate(self.generators):
            index = torch.randint(count, (min(self.plan.batch, count),), generator=generator)
            some = training[index]
            found.append(Drawn(some.inputs, some.labels, index, learner).to(device))
        return found

    def gradients(self, batches: list[Drawn], objective: Objective) -> Tensor:
        """Leave the gradients of the losses of all batches in the parameters.

        Return their mean, or what is not finite of it.

        Where memory runs out, batches are worked through in twice as many parts from then on.
        """
        while True:
            self.work.model.zero_grad(set_to_none=True)
            try:
                return torch.stack([self.added(drawn, objective) for drawn in batches]).mean()
            except torch.OutOfMemoryError:
                self.work.model.zero_grad(set_to_none=True)
            self.halve(len(batches[0]))

    def added(self, drawn: Drawn, objective: Objective) -> Tensor:
        """Return the loss of a batch, worked through part by part, or the first part of it that is not
        finite; its gradients are added to what is there.
        """
        scored = (drawn.labels != -100).sum()
        total: Tensor | None = None
        for part in drawn.batches(-(-len(drawn) // self.parts)):
            assert isinstance(part, Drawn)  # noqa: S101  for the type checker
            loss = objective(dataclasses.replace(part, whole=drawn) if len(part) < len(drawn) else part)
            if not torch.isfinite(loss):
                return loss.detach()
            if len(part) < len(drawn):
                loss = loss * ((part.labels != -100).sum() / scored)
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None  # noqa: S101  for the type checker: a batch has items
        return total

    def halve(self, items: int) -> None:
        """Work through batches in twice as many parts, and say so."""
        size = -(-items // self.parts)
        if size == 1:
            raise CompressionError(
                f"{self.plan.noun} ran out of memory at step {self.done} with one item at a time: take a"
                " smaller model, or a device with more memory"
            )
        self.parts *= 2
        self.work.warnings.append(
            f"{self.plan.noun} ran out of memory at step {self.done} with {size} items at a time: it went on"
            f" with {-(-items // self.parts)}, their gradients added up, so that a step still is made of"
            f" {items}"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def look(self) -> None:
        """Look at the held-out items where it is time, and keep the weights if they are the best yet."""
        over = self.ended or self.done == self.last
        if (
            self.held is None
            or (self.looks and self.looks[-1].step == self.done)
            or not (over or self.done % self.plan.look_every == 0)
        ):
            return
        self.looks.append(self.held.look(self.shown(), self.done))
        self.tell(self.looks[-1:])
        loss = self.looks[-1].loss
        if math.isfinite(loss) and (self.best is None or loss < self.best[1]):
            self.best = self.done, loss, self.moving.snapshot()

    def tell(self, looks: list[Look]) -> None:
        """Put looks on the curve, where steps of earlier trainings come first, and show them all to the one
        who watches.
        """
        self.work.looks += [dataclasses.replace(look, step=self.before + look.step) for look in looks]
        self.work.training.looked(tuple(self.work.looks))

    def remember(self) -> None:
        """Without looks, keep the weights every so often if the losses of late are the lowest yet: something
        to go back to if the next steps diverge.
        """
        window = max(10, self.plan.steps // 10)
        if self.held is not None or self.done % window:
            return
        late = statistics.fmean(self.losses[-window:])
        if self.best is None or late < self.best[1]:
            self.best = self.done, late, self.moving.snapshot()

    def fall_back(self, wrong: str, path: Path | None) -> None:
        """Go back to the best weights where the training diverged; `wrong` says how.

        Raises:
            CompressionError: not one step was done.

        """
        if path is not None:
            path.unlink(missing_ok=True)
        words = f"{self.plan.noun} diverged at step {self.done} of {self.plan.steps}: {wrong}; "
        if self.best is None or self.done == 0:
            raise CompressionError(words + self.plan.advice)
        self.moving.restore(self.best[2])
        self.done = self.kept = self.best[0]
        self.ended = True
        where = f"after step {self.done}" if self.done else "from before the first step"
        self.work.warnings.append(
            f"{words}the weights {where} are kept, where {'held-out' if self.held else 'training'} loss was"
            f" lowest ({self.best[1]:.3g}); {self.plan.advice}"
        )

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        best = (
            None
            if self.best is None
            else {"step": self.best[0], "loss": self.best[1], "weights": self.best[2]}
        )
        return {
            "losses": self.losses,
            "parts": self.parts,
            "looks": [dataclasses.astuple(look) for look in self.looks],
            "best": best,
            "moving": self.moving.snapshot(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
        }

    def resume(self, path: Path | None) -> None:
        """Go on from a checkpoint, if there is one that is not beyond where this training is to end."""
        state = None if path is None else checkpoints.load(path, self.work.warnings)
        if state is None or len(state["losses"]) > self.last:
            return
        self.losses, self.parts, best = state["losses"], state["parts"], state["best"]
        self.looks = [Look(*values) for values in state["looks"]]
        self.moving.restore(state["moving"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for generator, bits in zip(self.generators, state["generators"], strict=True):
            generator.set_state(bits)
        self.best = (
            None
            if best is None
            else (
                best["step"],
                best["loss"],
                [one.to(now) for one, now in zip(best["weights"], self.moving.snapshot(), strict=True)],
            )
        )
        self.done = len(self.losses)
        self.work.curve += [(self.before + place, loss) for place, loss in enumerate(self.losses)]
        self.tell(self.looks)
        self.work.warnings.append(
            f"{self.plan.noun} went on from step {self.done} of {self.plan.steps}, where it was saved"
        )
