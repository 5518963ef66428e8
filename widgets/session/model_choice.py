"""What is on the bench: model, data, device and how much of the data; a record."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.tasks.base import Task


@dataclass(frozen=True)
class ModelChoice:
    """What `workbench.Bench` is made from.

    None is always the default: the model's own data, the GPU where there is one, all items.
    """

    model: str | Task
    data: str | None = None
    device: str | None = None
    evaluation_items: int | None = None

    @property
    def name(self) -> str:
        """Return the model's name."""
        return self.model.model_name if isinstance(self.model, Task) else self.model
