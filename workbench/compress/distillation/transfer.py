"""Transfer: teach a smaller model by LoRA, with hidden states aligned on the sphere.

Everything else frozen, nothing left behind.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from workbench.compress.core.context import Work
from workbench.compress.distillation.aligned_states import (
    Pair,
    captured,
    check_points,
    count_points,
    paired_blocks,
    points,
)
from workbench.compress.distillation.lora import Adapted, Adapters, mean_of, without_gradients
from workbench.compress.distillation.projection import DISTANCES, Fit
from workbench.compress.distillation.teacher_outputs import Allowance, Asked, Teacher
from workbench.compress.distillation.teachers import loaded, names_of, showing, together
from workbench.compress.distillation.transfer_options import Transfer
from workbench.compress.method import TRAINING, Recovery
from workbench.compress.registry import METHODS
from workbench.compress.training.plan import Drawn, Plan, Trained, identity
from workbench.compress.training.trainer import train
from workbench.errors import CompressionError
from workbench.modules.layer import Layer
from workbench.tasks.base import Items

__all__ = ["Transfer", "transfer"]


@METHODS.register(
    Transfer,
    title="transfer",
    shapes=lambda outline, _: outline,  # training moves values, not shapes
    errors=lambda _: Recovery(0.0, 1.0),  # how much comes back, no rule says
    strength=lambda steps: min(1.0, 0.25 * math.log10(1 + steps)),
    trains=lambda _: True,
    placed=lambda _: TRAINING,
    reads=lambda _: frozenset(),
    alone=False,
)
def transfer(step: Transfer, work: Work) -> Transfer:
    """Train LoRAs of the layers that the targets pick, and fold their mean.

    Returns the step as it was done.
    """
    layers = [layer for layer in work.choose(step) if can_adapt(layer, work)]
    if not layers:
        raise CompressionError(
            f"{step!r} finds no layer that it can adapt: all lie on a grid; put Transfer before Quantize, or"
            " Repair between them, whose terms can be adapted"
        )
    teachers = loaded(names_of(step.teachers), work)
    without_gradients(work.model)  # a model as it is loaded computes them all
    adapted = Adapted(work.model, work.task.kind, layers)
    lessons = Lessons(step, work, adapted, teachers)
    lessons.prepare()
    projections = list(lessons.projections.values()) if step.align_projection == "trained" else []
    several = [
        Adapters(adapted.batches, step.lora_rank, step.lora_alpha, step.seed + index, projections)
        for index in range(step.lora_count)
    ]
    done = lessons.train(several)
    adapted.fold(mean_of(several))
    if done.ended:
        step = dataclasses.replace(
            step, transfer_stop_at=done.steps
        )  # what was really done, and gives the same bits again
    told(step, work, layers, several, (teachers[0], done))
    return step


def can_adapt(layer: Layer, work: Work) -> bool:
    """Return whether a change can be folded into a layer; if not, the report says why."""
    if layer.grid is not None:
        work.say(
            layer,
            f"transfer skipped: its weights lie on a {layer.grid.bits}-bit grid, which a folded LoRA would"
            " leave",
        )
    return layer.grid is None


@dataclasses.dataclass
class Lessons:
    """What a student learns from: the loss of its answers and states.

    `pairs`, `projections` and `asked` are filled by `prepare`.
    """

    step: Transfer
    work: Work
    adapted: Adapted
    teachers: list[nn.Module]
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    projections: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # by the student's block
    asked: Asked = dataclasses.field(init=False)
    # A batch that is worked through in parts, and the squares of what it aims at
    squared: tuple[Items, list[Tensor]] | None = None

    def prepare(self) -> None:
        """Find what is compared, and whether what teachers show can be kept. Raises as `align`."""
        step = self.step
        if step.align != "none":
            self.align()
        self.asked = Asked(
            self.shown(),
            self.work,
            Allowance(
                step.transfer_cache_mb,
                step.transfer_cache_disk_mb,
                step.transfer_steps,
                step.transfer_batch * step.lora_count,
                "transfer_cache",
            ),
        )

    def shown(self) -> list[Teacher]:
        """Return the teachers that are asked at each step, and what each shows: answers, and of the first the
        states that are compared.
        """
        answers, kind, asked = self.step.kl_weight > 0, self.work.task.kind, []
        for name, model in zip(names_of(self.step.teachers), self.teachers, strict=True):
            blocks = tuple(self.aims()) if model is self.teachers[0] else ()
            if answers or blocks:
                asked.append(
                    Teacher(name, model, showing(kind, model, blocks, answers=answers), (answers, blocks))
                )
        return asked

    def align(self) -> None:
        """Find which states are compared, leave out those that no LoRA can change, and fit the projections to
        the calibration data.

        Raises:
            CompressionError: states that cannot be compared, or of different widths without a projection, or
                none downstream of a LoRA.
        """
        self.pairs = paired_blocks(
            self.work.model, self.work.task.model, self.teachers[0], last=self.step.align_layers == "last"
        )
        self.pairs = [pair for pair in self.pairs if pair.student in self.downstream()]
        if not self.pairs:
            raise CompressionError(
                f"{self.step!r}: no hidden state lies downstream of a layer that is adapted, so"
                f" align={self.step.align!r} could change nothing; widen targets, or use align='none'"
            )
        fits = self.fitted()
        if self.step.align_projection != "none":
            self.projections = {name: fit.solve() for name, fit in fits.items()}

    def downstream(self) -> set[str]:
        """Return the student's blocks whose output depends on a weight that is adapted."""
        items = self.work.task.calibration[:1].to(next(self.work.model.parameters()).device)
        with torch.enable_grad(), captured(self.work.model, [pair.student for pair in self.pairs]) as states:
            self.adapted.logits(
                items, [torch.zeros_like(start, requires_grad=True) for start in self.adapted.starts]
            )
        return {name for name, state in states.items() if state.requires_grad}

    @torch.no_grad()
    def fitted(self) -> dict[str, Fit]:
        """Return the sums for every projection, over the calibration data."""
        task, device = self.work.task, next(self.work.model.parameters()).device
        fits: dict[str, Fit] = {pair.student: Fit() for pair in self.pairs}
        for start in range(0, len(task.calibration), task.batch_size):
            self.work.progress("projections", start, len(task.calibration))
            items = task.calibration[start : start + task.batch_size].to(device)
            with (
                captured(self.work.model, list(fits)) as mine,
                captured(self.teachers[0], self.aims()) as theirs,
            ):
                task.kind.logits(self.work.model, items)
                task.kind.logits(self.teachers[0], items)
            for pair in self.pairs:
                own, aim = points(mine[pair.student], items), points(theirs[pair.teacher], items)
                check_points(pair, own, aim)
                if self.step.align_projection == "none" and own.shape[1] != aim.shape[1]:
                    raise CompressionError(
                        f"{self.step!r}: {pair.student!r} is {own.shape[1]} wide and {pair.teacher!r} of the"
                        f" teacher {aim.shape[1]}; use align_projection='fixed' or 'trained'"
                    )
                fits[pair.student].add(own, aim)
        return fits

    def aims(self) -> list[str]:
        """Return the teacher's blocks whose states are compared, each once."""
        return list(dict.fromkeys(pair.teacher for pair in self.pairs))

    def train(self, several: list[Adapters]) -> Trained:
        """Train LoRAs, each on its own batches.

        Nothing else in reach of the optimizer, so everything else keeps its bits.
        """
        step, work = self.step, self.work
        training_work = Work(
            nn.ModuleList(several),
            work.task,
            work.statistics,
            work.progress,
            work.training,
            curve=work.curve,
            looks=work.looks,
            warnings=work.warnings,
        )
        advice = f"lower transfer_rate={step.transfer_rate:g}"
        plan = Plan(
            "transfer",
            "transfer",
            advice,
            step.transfer_steps,
            step.transfer_rate,
            step.transfer_batch,
            step.seed,
            step.transfer_stop_at,
            learners=step.lora_count,
            look_every=step.transfer_look_every,
            checkpoint_every=step.transfer_checkpoint_every,
            identity=self.identity() if step.transfer_checkpoint_every else "",
            prefix="transfer_",
        )
        return train(
            dataclasses.replace(step, targets=("*",)),
            training_work,
            [],
            plan,
            lambda items: self.loss(several[items.learner], items),
            shown=lambda: self.folded(several),
        )

    def identity(self) -> str:
        """Return a text of all that a checkpoint depends on besides the data and the student's weights:
        options, and the weights of teachers.
        """
        from workbench.zoo.local import fingerprint

        return " ".join([identity(self.step, "transfer_"), *map(fingerprint, self.teachers)])

    @torch.no_grad()
    def folded(self, several: list[Adapters]) -> nn.Module:
        """Return the student with the mean of the LoRAs' changes in its weights.

        Training does not see it, as it puts each one's own in their place.
        """
        self.adapted.fold(mean_of(several))
        return self.work.model

    def loss(self, adapters: Adapters, items: Drawn) -> Tensor:
        """Return the scalar loss of the student with `adapters` on items of the task."""
        step, kind = self.step, self.work.task.kind
        with captured(self.work.model, [pair.student for pair in self.pairs]) as mine:
            logits = self.adapted.logits(items, adapters.changes())
        total = (
            step.ce_weight * kind.loss(logits, items.labels)
            if step.ce_weight
            else logits.new_zeros((), dtype=torch.float32)
        )
        answers = self.asked(items)
        if step.kl_weight:
            wanted = together(kind, [seen.logits for seen in answers], step.transfer_temperature)
            total = total + step.kl_weight * kind.soft_loss(
                logits, wanted, items.labels, step.transfer_temperature
            )
        if self.pairs:
            total = total + step.align_weight * self.distance(
                adapters, items, mine, dict(zip(self.aims(), answers[0].inside["aims"], strict=True))
            )
        self.asked.check(answers, total)
        return total

    def distance(
        self, adapters: Adapters, items: Drawn, mine: dict[str, Tensor], theirs: dict[str, Tensor]
    ) -> Tensor:
        """Return the mean over the compared blocks of the distance between projected states and their
        aims.
        """
        trained, distances = list(adapters.projections), []
        for index, pair in enumerate(self.pairs):
            state = points(mine[pair.student], items)
            projection = trained[index] if trained else self.projections.get(pair.student)
            wanted = points(theirs[pair.teacher], items)
            distances.append(
                DISTANCES[self.step.align](state if projection is None else state @ projection, wanted)
                * self.share(index, items, theirs[pair.teacher], wanted)
            )
        return torch.stack(distances).mean()

    def share(self, index: int, items: Drawn, states: Tensor, wanted: Tensor) -> Tensor | float:
        """Return the factor of the distance of a part of a batch, a scalar, so that all parts, weighted by
        their labels, add up to that of the batch.
        """
        if items.whole is None:
            return 1.0
        labels = (items.labels != -100).sum() / (items.whole.labels != -100).sum()
        if self.step.align == "mse":  # a ratio of two means over the batch
            return wanted.square().sum() / self.squares(items)[index] / labels
        return len(wanted) / count_points(states, wanted, items, items.whole) / labels

    @torch.no_grad()
    def squares(self, part: Drawn) -> list[Tensor]:
        """Return the sum of squares of each pair's aims over the whole batch that a part is of, read once a
        batch in parts as large.
        """
        whole = part.whole
        assert isinstance(whole, Drawn)  # noqa: S101  for the type checker
        if self.squared is None or self.squared[0] is not whole:
            sums: list[Tensor] = []
            for some in whole.batches(len(part)):
                assert isinstance(some, Drawn)  # noqa: S101  for the type checker
                states = dict(zip(self.aims(), self.asked(some)[0].inside["aims"], strict=True))
                of_part = [points(states[pair.teacher], some).square().sum() for pair in self.pairs]
                sums = (
                    [total + added for total, added in zip(sums, of_part, strict=True)] if sums else of_part
                )
            self.squared = whole, sums
        return self.squared[1]


def told(
    step: Transfer,
    work: Work,
    layers: list[Layer],
    several: list[Adapters],
    outcome: tuple[nn.Module, Trained],
) -> None:
    """Write into the report what was trained, by how many numbers, and which look was kept.

    `outcome` is the first teacher and how the training ended.
    """
    teacher, done = outcome
    count, size = (
        sum(adapters.count() for adapters in several),
        sum(parameter.numel() for parameter in teacher.parameters()),
    )
    way = " + ".join(
        [
            *["CE"] * bool(step.ce_weight),
            *["KL"] * bool(step.kl_weight),
            *[step.align] * (step.align != "none"),
        ]
    )
    averaged = f", mean of {step.lora_count}," if step.lora_count > 1 else ""
    sentence = (
        f"LoRA of rank {step.lora_rank}{averaged} trained {done.steps} steps by {way}, folded; trainable in"
        f" all: {count:,} numbers, {count / size:.2%} of the teacher's {size:,}{done.words()}"
    )
    for layer in layers:
        work.took(step, layer, sentence)
