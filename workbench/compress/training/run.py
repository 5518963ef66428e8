"""A training in progress: step by step, with looks at held-out items, a way back where it diverges, and
checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.compress.core.context import Work
from workbench.compress.training import checkpoints
from workbench.compress.training.divergence_guard import trouble, worse
from workbench.compress.training.plan import Drawn, Objective, Plan, Shown
from workbench.compress.training.trainable import Moving
from workbench.compress.training.validation import HeldOut
from workbench.errors import CompressionError
from workbench.util.progress import Look


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
        elif self.held is None and (sentence := worse(self.losses)):
            self.work.warnings.append(f"{self.plan.noun} {sentence}; {self.plan.advice}")
        if path is not None and self.done == self.plan.steps:
            path.unlink(missing_ok=True)
        return None

    def advance(self, objective: Objective) -> str:
        """Do one optimizer step.

        Return "", or the reason, with nothing done, if the training has diverged.
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
        batches = []
        for learner, generator in enumerate(self.generators):
            index = torch.randint(count, (min(self.plan.batch, count),), generator=generator)
            some = training[index]
            batches.append(Drawn(some.inputs, some.labels, index, learner).to(device))
        return batches

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
        event = f"{self.plan.noun} diverged at step {self.done} of {self.plan.steps}: {wrong}; "
        if self.best is None or self.done == 0:
            raise CompressionError(event + self.plan.advice)
        self.moving.restore(self.best[2])
        self.done = self.kept = self.best[0]
        self.ended = True
        where = f"after step {self.done}" if self.done else "from before the first step"
        self.work.warnings.append(
            f"{event}the weights {where} are kept, where {'held-out' if self.held else 'training'} loss was"
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
                [saved.to(now) for saved, now in zip(best["weights"], self.moving.snapshot(), strict=True)],
            )
        )
        self.done = len(self.losses)
        self.work.curve += [(self.before + place, loss) for place, loss in enumerate(self.losses)]
        self.tell(self.looks)
        self.work.warnings.append(
            f"{self.plan.noun} went on from step {self.done} of {self.plan.steps}, where it was saved"
        )
