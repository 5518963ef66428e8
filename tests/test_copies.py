"""Copies that share tensors: nothing done to one may reach the other, whatever the model looks like."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_tasks import same, tiny_task, weights
from torch import nn

from workbench.modules.sharing import own_parameters, sharing_copy


def test_a_copy_has_its_own_modules_and_the_same_tensors(sort):
    model = tiny_task(sort).model
    twin = sharing_copy(model)
    assert type(twin) is type(model)
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in model.named_modules()]
    mine, theirs = dict(twin.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)


def test_what_is_put_into_a_copy_stays_there(sort):
    task = tiny_task(sort)
    model, before = task.model, weights(task.model)
    twin = sharing_copy(model)
    for module in list(twin.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros_like(parameter)))
        module.register_buffer("extra", torch.ones(1))
        module.register_forward_hook(lambda *_: None)
    twin.add_module("added", nn.Identity())
    twin.train()
    assert same(weights(model), before)
    assert not model.training
    assert not any(hasattr(module, "extra") or module._forward_hooks for module in model.modules())
    assert not hasattr(model, "added")


def test_hooks_of_the_model_run_in_the_copy_but_not_the_other_way():
    model = nn.Sequential(nn.Linear(2, 2))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("old"))
    twin = sharing_copy(model)
    twin[0].register_forward_hook(lambda *_: seen.append("new"))
    model(torch.zeros(1, 2))
    assert seen == ["old"]
    twin(torch.zeros(1, 2))
    assert seen == ["old", "old", "new"]


def test_own_parameters_keeps_ties_and_values(sort):
    task = tiny_task(sort)
    twin = sharing_copy(task.model)
    own_parameters(twin)
    assert same(weights(twin), weights(task.model))
    theirs = {tensor.data_ptr() for tensor in [*task.model.parameters(), *task.model.buffers()]}
    assert not any(tensor.data_ptr() in theirs for tensor in [*twin.parameters(), *twin.buffers()])
    assert len(list(twin.parameters())) == len(list(task.model.parameters()))  # tied ones still count once


class Hidden(nn.Module):
    """Holds a module where the module tree does not show it."""

    def __init__(self, how):
        super().__init__()
        self.shown = nn.Linear(2, 2)
        self.kept = {
            "list": [self.shown],
            "dict": {"a": {"b": self.shown}},
            "method": self.shown.forward,
            "partial": functools.partial(torch.add, self.shown),
            "keyword": functools.partial(print, end=self.shown),
        }[how]


@pytest.mark.parametrize("how", ["list", "dict", "method", "partial", "keyword"])
def test_a_model_that_hides_a_module_is_copied_whole(how):
    model = Hidden(how)
    twin = sharing_copy(model)
    assert twin.shown.weight is not model.shown.weight
    assert torch.equal(twin.shown.weight, model.shown.weight)


def test_modules_that_stand_in_two_places_stay_one():
    layer = nn.Linear(2, 2)
    twin = sharing_copy(nn.Sequential(layer, layer))
    assert twin[0] is twin[1]
    assert twin[0] is not layer
