"""Second moments of layer inputs against a direct computation, also where models do unusual things."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from recorded import recorded_inputs
from tiny_tasks import items, tiny_task
from torch import nn

import workbench as wb
from workbench.calibration.passes import alike
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.errors import CompressionError
from workbench.modules.layer import patches
from workbench.recipe import Recipe
from workbench.tasks.base import Task
from workbench.tasks.image_classification import IMAGE_CLASSIFICATION


class Classifier(nn.Module):
    """Pictures [N, 1, 8, 8] through a body to four logits; called as transformers models are."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, 4)
        self.config = SimpleNamespace(num_labels=4)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(self.body(pixel_values).flatten(1)))


def custom_task(body: nn.Module, features: int, device: str = "cpu") -> Task:
    torch.manual_seed(0)
    for parameter in body.parameters():
        nn.init.normal_(parameter, std=0.4)
    model = Classifier(body, features).to(device).eval().requires_grad_(False)
    return Task(
        IMAGE_CLASSIFICATION,
        model,
        "custom",
        "custom",
        "noise",
        items("vit", 8, 1),
        items("vit", 24, 2),
        items("vit", 24, 3),
        batch_size=16,
    )


def assert_moments(task: Task) -> None:
    statistics, inputs = Statistics(task), recorded_inputs(task)
    assert inputs
    for name, rows in inputs.items():
        if (
            isinstance(task.model.get_submodule(name), nn.Conv2d)
            and task.model.get_submodule(name).groups != 1
        ):
            continue
        if name == "lm_head" and not isinstance(getattr(task.model, "config", None), SimpleNamespace):
            continue  # shares its weight, so that no method asks
        expected = rows.double().t() @ rows.double() / len(rows)
        torch.testing.assert_close(statistics.second_moment(name).double(), expected, rtol=1e-4, atol=1e-5)


def test_second_moments_of_linear_conv1d_and_conv2d_layers(sort, device):
    assert_moments(tiny_task(sort, device))


def test_second_moments_of_a_bfloat16_model(sort):
    task = tiny_task(sort, dtype=torch.bfloat16)
    for name, rows in recorded_inputs(task).items():
        if name != "lm_head":
            torch.testing.assert_close(
                Statistics(task).second_moment(name), rows.t() @ rows / len(rows), rtol=1e-3, atol=1e-4
            )
            break


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1)},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_second_moments_of_every_kind_of_convolution(options, device):
    body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 5, **options))
    features = body(torch.zeros(1, 1, 8, 8)).numel()
    assert_moments(custom_task(body, features, device))


class InPlace(nn.Module):
    """Two layers that read one tensor, which is changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x):
        x = x.flatten(1) * 1.0
        early = self.first(x)
        x.relu_()
        return early + self.second(x)


def test_a_tensor_changed_in_place_between_two_layers_is_not_taken_for_the_old_one():
    assert_moments(custom_task(InPlace(), 16))


class Twice(nn.Module):
    """One layer called twice with different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x.flatten(1))))


def test_a_layer_called_twice_counts_both_inputs():
    assert_moments(custom_task(Twice(), 64))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 16), nn.Linear(64, 16)

    def forward(self, x):
        return self.used(x.flatten(1))


def test_a_layer_that_is_never_called_is_skipped_by_name():
    task = custom_task(Unused(), 16)
    rows = compress(task, Recipe(wb.Prune(sparsity=0.5, criterion="wanda"))).report
    assert [row.sparsity for row in rows] == [0.5, 0.0, 0.0]  # the last are the biases
    assert rows[1].outcome.startswith("prune skipped: it receives no input during calibration")
    with pytest.raises(CompressionError, match=r"body\.unused: prune skipped: it receives no input"):
        compress(task, Recipe(wb.Prune(sparsity=0.5, criterion="wanda", targets=("body.unused",))))
    compress(task, Recipe(wb.Prune(sparsity=0.5)))


class Registered(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.other = self.one

    def forward(self, x):
        return self.other(self.one(x.flatten(1)))


def test_one_module_under_two_names_is_left_dense_and_reported():
    task = custom_task(Registered(), 64)
    compressed = compress(task, Recipe(wb.Prune(sparsity=0.5, targets=("*", "head"))))
    rows = {row.name: row for row in compressed.report}
    assert "shared with" in rows["body.one"].outcome
    assert rows["head"].sparsity == 0.5
    assert torch.equal(compressed.model.body.one.weight, task.model.body.one.weight)
    assert compressed.model.body.one is compressed.model.body.other


def test_grouped_convolutions_are_left_and_reported():
    task = custom_task(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), 64)
    rows = {row.name: row for row in compress(task, Recipe(wb.Quantize(weight_bits=4))).report}
    assert rows["body.1"].outcome == "quantize skipped: a convolution in 2 groups is not supported"
    assert rows["body.0"].bits == 4


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "padding_mode": "reflect"},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's own
def test_padding_said_in_a_word_gives_the_patches_that_torch_reads(options):
    conv = nn.Conv2d(1, 4, bias=False, **options)
    task = custom_task(nn.Sequential(conv), 4 * conv(torch.zeros(1, 1, 8, 8))[0, 0].numel())
    rows = patches(conv, pixels := task.calibration.inputs["pixel_values"])
    product = (rows @ conv.weight.flatten(1).t()).unflatten(0, (len(pixels), -1)).transpose(1, 2)
    torch.testing.assert_close(product, conv(pixels).flatten(2), atol=1e-5, rtol=1e-5)
    compress(task, Recipe(wb.Prune(sparsity=0.5, criterion="wanda")))


class ByName(nn.Module):
    """A layer whose input is handed over by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 16)

    def forward(self, x):
        return self.layer(input=x.flatten(1))


def test_a_layer_called_by_keyword_is_seen_or_refused_by_name():
    task = custom_task(ByName(), 16)
    try:
        moment = Statistics(task).second_moment("body.layer")
    except CompressionError as error:
        assert "body.layer" in str(error)  # noqa: PT017  either is honest
    else:
        rows = task.calibration.inputs["pixel_values"].flatten(1)
        torch.testing.assert_close(moment, rows.t() @ rows / len(rows))


def test_adding_in_place_keeps_what_is_shared_and_leaves_the_rest():
    first, second, alone = torch.ones(2, 2), torch.full((2, 2), 2.0), torch.full((2, 2), 5.0)
    sums = {"q": first, "k": first, "up": second, "gate": second, "left": alone, "late": alone}
    extra, up, gate, late = (torch.full((2, 2), value) for value in (10.0, 20.0, 30.0, 40.0))
    totals = alike(sums, {"q": extra, "k": extra, "up": up, "gate": gate, "late": late, "new": extra})
    assert {name: float(total[0, 0]) for name, total in totals.items()} == {
        "q": 11,
        "k": 11,
        "up": 22,
        "gate": 32,
        "left": 5,
        "late": 45,
        "new": 10,
    }
    assert totals["q"] is totals["k"] is first  # added to where it lay
    assert totals["new"] is extra
    assert float(extra[0, 0]) == 10
