"""A task with its model where it is to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from workbench.modules.placement import Placement, placed
from workbench.tasks.base import Task


def capped(task: Task, sizes: Mapping[str, int | None]) -> Task:
    """Return a ready task with at most so many items of each role ("evaluation", "calibration", "training");
    None: as many as it has.

    Raises:
        DataError: a size below 1.
    """
    task.kind.sizes.limited(**sizes)  # to be refused in the same words
    fewer = {
        role: getattr(task, role)[:size]
        for role, size in sizes.items()
        if size is not None and size < len(getattr(task, role))
    }
    return dataclasses.replace(task, **fewer) if fewer else task


def place_task(task: Task, device: torch.device, placement: Placement) -> Task:
    """Return a ready task with its model placed; one that has to move is copied, the given one stays as it
    is.

    Raises:
        DeviceError: the device cannot hold the model, see `workbench.modules.placement.place`.
    """
    model = placed(task.model, device, placement)
    return task if model is task.model else dataclasses.replace(task, model=model)
