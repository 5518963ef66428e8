"""A task with its model where it is to run."""

from __future__ import annotations

import dataclasses

import torch

from workbench.modules.placement import Placement, placed
from workbench.tasks.base import Task


def place_task(task: Task, device: torch.device, placement: Placement) -> Task:
    """Return a ready task with its model placed; one that has to move is copied, the given one stays as it
    is.

    Raises:
        DeviceError: the device cannot hold the model, see `workbench.modules.placement.place`.
    """
    model = placed(task.model, device, placement)
    return task if model is task.model else dataclasses.replace(task, model=model)
