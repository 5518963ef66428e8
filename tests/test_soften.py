"""What temperature does to one answer: the record against probabilities by hand, and its figure."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_tasks import CLASSES, TRAINING, VOCABULARY, tiny_task

from widgets.figures.figures import softened_figure
from workbench.errors import DataError
from workbench.report.temperature_lesson import softened
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY


def test_probabilities_are_those_of_softened_logits():
    task = tiny_task("vit")
    answer = softened(task, 3, (1, 5))
    with torch.no_grad():
        row = task.kind.logits(task.model, task.training[3:4])[0].tolist()
    order = sorted(range(CLASSES), key=lambda place: -row[place])
    for temperature, line, rest, entropy in zip(
        (1, 5), answer.probabilities, answer.rest, answer.entropy, strict=True
    ):
        powers = [math.exp(row[place] / temperature) for place in order]
        wanted = [power / sum(powers) for power in powers]
        assert line == pytest.approx(wanted, rel=1e-5)
        assert rest == pytest.approx(0, abs=1e-9)
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in wanted), rel=1e-5)
    assert answer.answers == tuple(map(str, order))
    assert answer.truth == str(int(task.training.labels[3]))


def test_a_higher_temperature_is_softer_and_tends_to_all_alike():
    answer = softened(tiny_task("vit"), 0, (0.5, 1, 2, 100))
    assert list(answer.entropy) == sorted(answer.entropy)
    assert answer.entropy[-1] == pytest.approx(math.log(CLASSES), rel=1e-2)
    assert all(line[0] == max(line) for line in answer.probabilities)


def test_of_text_it_is_the_middle_token_and_what_is_not_shown_is_said():
    task = tiny_task("llama")
    answer = softened(task)
    labels = task.training.labels[0]
    assert answer.truth == str(int(labels[(len(labels) - 1) // 2]))
    assert len(answer.answers) == 10 < VOCABULARY
    assert all(
        sum(line) + rest == pytest.approx(1)
        for line, rest in zip(answer.probabilities, answer.rest, strict=True)
    )
    assert answer.rest[-1] > answer.rest[0] > 0


def test_the_figure_has_a_colour_for_each_temperature():
    answer = softened(tiny_task("vit"))
    figure = softened_figure(answer)
    assert [list(trace.y) for trace in figure.data] == [list(line) for line in answer.probabilities]
    assert figure.data[1].name.startswith("T = 2 (")


@pytest.mark.parametrize(
    ("item", "temperatures", "message"),
    [
        (TRAINING, (1,), "there is no training item 40: 'noise' has 40, counted from 0"),
        (-1, (1,), "there is no training item -1"),
        (0, (1, 0), r"temperatures=\(1, 0\) must all be above 0"),
        (0, (), "must all be above 0"),
    ],
)
def test_what_cannot_be_softened_is_refused(item, temperatures, message):
    with pytest.raises(DataError, match=message):
        softened(tiny_task("vit"), item, temperatures)


def test_vectors_are_refused():
    task = tiny_task("bert")
    task.training.inputs.update(
        {name: torch.stack([values, values], 1) for name, values in task.training.inputs.items()}
    )
    object.__setattr__(task, "kind", SENTENCE_SIMILARITY)
    object.__setattr__(task, "model", task.model.bert)
    object.__setattr__(task.training, "labels", torch.rand(TRAINING))
    with pytest.raises(DataError, match="sentence similarity has no distribution for each label"):
        softened(task)
