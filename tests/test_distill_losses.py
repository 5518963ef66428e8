"""What else a student is trained by: divergences against float64 written by hand, hidden states and attention
maps of real blocks, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_tasks import SORTS, TRAINING, same, tiny_task, weights

import workbench as wb
from workbench.compress import compress
from workbench.compress.distillation.distill import distillation_loss
from workbench.compress.distillation.hidden_states import block_pairs, see, showing_attention
from workbench.compress.distillation.losses import attention_loss, divergence_loss, state_loss
from workbench.errors import CompressionError, RecipeError
from workbench.recipe import Recipe
from workbench.tasks.likelihood import Choosing
from workbench.tasks.sentence_similarity import SENTENCE_SIMILARITY

PRUNE = wb.Prune(sparsity=0.5)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def logits(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(student, teacher, temperature, divergence, skew):
    """Return T^2 * the divergence, and its gradient by the student's logits, in float64 without autograd.

    Rows [N, C].
    """
    s, t, rows = student.double() / temperature, teacher.double() / temperature, len(student)
    q, p = s.exp() / s.exp().sum(-1, keepdim=True), t.exp() / t.exp().sum(-1, keepdim=True)
    if divergence == "forward":  # d/ds of sum p log(p/q) is q - p
        each, by_s = (p * (p / q).log()).sum(-1), q - p
    elif divergence == "reverse":  # d/ds_i of sum q log(q/p) is q_i (log(q_i/p_i) - KL)
        each = (q * (q / p).log()).sum(-1)
        by_s = q * ((q / p).log() - each[:, None])
    else:  # m = a p + (1-a) q; dKL/dq_j = -(1-a) p_j / m_j, then through the softmax
        m = skew * p + (1 - skew) * q
        each, by_q = (p * (p / m).log()).sum(-1), -(1 - skew) * p / m
        by_s = q * (by_q - (q * by_q).sum(-1, keepdim=True))
    return float(temperature**2 * each.mean()), temperature * by_s / rows


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "skewed"])
def test_divergence_and_gradient_are_those_written_by_hand(divergence, temperature, device):
    student, teacher = logits(7, 5, seed=1), logits(7, 5, seed=2)
    moved = student.to(device, copy=True).requires_grad_()
    loss = divergence_loss(
        Choosing(), moved, teacher.to(device), LABELS.to(device), temperature, divergence=divergence, skew=0.3
    )
    loss.backward()
    value, gradient = by_hand(student, teacher, temperature, divergence, 0.3)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-4)
    assert torch.allclose(moved.grad.cpu().double(), gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_at_high_temperature_it_is_logit_matching(divergence):
    """Hinton, Vinyals and Dean (2015): T^2 KL tends to the squared difference of centred logits / (2 *
    classes), either way round."""
    student, teacher = logits(7, 5, seed=1), logits(7, 5, seed=2)
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    wanted = float(difference.double().square().sum(-1).mean() / (2 * 5))
    errors = [
        abs(
            float(divergence_loss(Choosing(), student, teacher, LABELS, t, divergence=divergence)) / wanted
            - 1
        )
        for t in (10.0, 50.0)
    ]
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 2


def test_reverse_forgives_what_is_left_out_and_forward_does_not():
    """The teacher holds two classes likely, the student one of them: the mode-seeking direction is the
    smaller one."""
    teacher, student = torch.tensor([[8.0, 8.0, 0.0]]), torch.tensor([[8.0, 0.0, 0.0]])
    forward, reverse = (
        float(divergence_loss(Choosing(), student, teacher, torch.tensor([0]), 1.0, divergence=d))
        for d in ("forward", "reverse")
    )
    assert reverse == pytest.approx(math.log(2), rel=0.01)
    assert forward > 4 * reverse


def test_skewed_stays_bounded_where_the_student_gives_no_chance():
    """KL(p || a p + (1-a) q) is at most -log a (Ko et al. 2024)."""
    loss = divergence_loss(
        Choosing(),
        torch.tensor([[-200.0, 0.0]]),
        torch.tensor([[0.0, -200.0]]),
        torch.tensor([0]),
        1.0,
        divergence="skewed",
        skew=0.1,
    )
    assert float(loss) == pytest.approx(-math.log(0.1), rel=1e-4)


def test_answers_of_different_vocabularies_are_refused():
    with pytest.raises(
        CompressionError,
        match=(
            r"student answers with \(7, 5\) and its teacher with \(7, 6\): they need the same vocabulary or"
            r" label map"
        ),
    ):
        distillation_loss(logits(7, 5, seed=1), logits(7, 6, seed=2), LABELS, 2.0, 0.5, kind=Choosing())


def test_vectors_have_no_other_divergence():
    task = tiny_task("vit")
    object.__setattr__(task, "kind", SENTENCE_SIMILARITY)
    with pytest.raises(
        CompressionError,
        match="divergence='reverse' compares distributions, and a model of sentence similarity answers with",
    ):
        compress(task, Recipe(PRUNE, wb.Distill(temperature=2, divergence="reverse")))


# --- hidden states and attention maps


def test_state_loss_by_hand():
    student, teacher = logits(2, 3, 4, seed=1), logits(2, 3, 4, seed=2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    terms = [
        sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / sum(b**2 for b in t)
        for item, aims, kept in zip(student.tolist(), teacher.tolist(), mask.tolist(), strict=True)
        for s, t, k in zip(item, aims, kept, strict=True)
        if k
    ]
    assert float(state_loss(student, teacher, [mask])) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_attention_loss_by_hand():
    student, teacher = logits(2, 3, 4, 4, seed=1).softmax(-1), logits(2, 3, 4, 4, seed=2).softmax(-1)
    teacher[..., 3] = 0  # a causal mask leaves exact zeros
    wanted = [
        p * math.log(p / q)
        for p, q in zip(teacher.flatten().tolist(), student.flatten().tolist(), strict=True)
        if p
    ]
    assert float(attention_loss(student, teacher)) == pytest.approx(sum(wanted) / (2 * 3 * 4), rel=1e-5)


@pytest.mark.parametrize(
    ("sort", "blocks"), [("vit", 2), ("resnet", 2), ("llama", 2), ("gpt2", 2), ("bert", 1)]
)
def test_hidden_states_are_those_that_transformers_gives(sort, blocks):
    task = tiny_task(sort)
    some = task.training[:3]
    seen = see(task.kind, task.model, some, states=True)
    assert len(seen.inside["hidden_states"]) == blocks + 1
    assert torch.equal(seen.logits, task.kind.logits(task.model, some))
    plain = task.model(**some.inputs, output_hidden_states=True).hidden_states
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(seen.inside["hidden_states"], plain, strict=True)
    )


@pytest.mark.parametrize("sort", ["vit", "llama", "gpt2", "bert"])
def test_attention_maps_are_shown_and_what_was_set_before_comes_back(sort):
    task = tiny_task(sort)
    before = task.model.config._attn_implementation
    answers = task.kind.logits(task.model, task.training[:3])
    with showing_attention(task.model):
        seen = see(task.kind, task.model, task.training[:3], maps=True)
    maps = seen.inside["attentions"]
    assert len(maps) == task.model.config.num_hidden_layers
    assert all(torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5) for attention in maps)
    assert task.model.config._attn_implementation == before
    assert torch.equal(task.kind.logits(task.model, task.training[:3]), answers)


@pytest.mark.parametrize("sort", SORTS)
def test_matching_brings_hidden_states_closer(sort, device):
    """With next to no weight on answers, the blocks still come to show what the teacher's show."""
    task = tiny_task(sort, device)
    start = compress(task, Recipe(PRUNE))
    compressed = compress(
        task,
        Recipe(
            PRUNE,
            wb.Distill(
                temperature=2,
                alpha=0,
                hidden_weight=100,
                steps=40,
                learning_rate=5e-3,
                distill_batch=TRAINING,
            ),
        ),
    )
    some = task.training.to(device)
    with torch.no_grad():
        teacher = see(task.kind, task.model, some, states=True).inside["hidden_states"]
        far = [
            sum(
                float(state_loss(a, b))
                for a, b in zip(
                    see(task.kind, model, some, states=True).inside["hidden_states"], teacher, strict=True
                )
            )
            for model in (start.model, compressed.model)
        ]
    assert far[1] < 0.8 * far[0]


def test_matching_attention_brings_the_maps_closer():
    task = tiny_task("vit")
    before = weights(task.model)
    start = compress(task, Recipe(PRUNE))
    compressed = compress(
        task,
        Recipe(
            PRUNE,
            wb.Distill(
                temperature=2,
                alpha=0,
                attention_weight=100,
                steps=40,
                learning_rate=5e-3,
                distill_batch=TRAINING,
            ),
        ),
    )
    with torch.no_grad(), showing_attention(task.model):
        teacher = see(task.kind, task.model, task.training, maps=True).inside["attentions"]
        far = [
            sum(
                float(attention_loss(a, b))
                for a, b in zip(
                    see(task.kind, model, task.training, maps=True).inside["attentions"], teacher, strict=True
                )
            )
            for model in (start.model, compressed.model)
        ]
    assert far[1] < 0.8 * far[0]
    assert same(weights(task.model), before)


def test_the_first_loss_adds_up():
    task = tiny_task("vit")
    first = [
        compress(task, Recipe(PRUNE, wb.Distill(temperature=2, steps=1, distill_batch=8, **more))).curve[0][1]
        for more in (
            {},
            {"hidden_weight": 1.0},
            {"hidden_weight": 3.0},
            {"hidden_weight": 1.0, "layer_map": "2:2"},
            {"hidden_weight": 1.0, "layer_map": "1:1"},
        )
    ]
    assert first[2] - first[0] == pytest.approx(3 * (first[1] - first[0]), rel=1e-4)
    assert (first[3] + first[4]) / 2 == pytest.approx(
        first[1], rel=1e-5
    )  # without a map, the mean over both blocks


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        (2, 2, ((1, 1), (2, 2))),
        (2, 6, ((1, 3), (2, 6))),
        (3, 6, ((1, 2), (2, 4), (3, 6))),
        (4, 6, ((1, 2), (2, 3), (3, 5), (4, 6))),
    ],
)
def test_blocks_are_spread_evenly(student, teacher, wanted):
    assert block_pairs(student, teacher, "") == wanted


def test_a_map_beyond_the_last_block_is_refused():
    with pytest.raises(
        RecipeError,
        match=(
            r"layer_map='1:3' pairs 1:3, but hidden_states come from 2 blocks of the student and 2 of the"
            r" teacher"
        ),
    ):
        compress(tiny_task("vit"), Recipe(PRUNE, wb.Distill(temperature=2, hidden_weight=1, layer_map="1:3")))


@pytest.mark.parametrize("bad", ["1", "1:2,", "a:b", "1:2;3:4"])
def test_a_map_that_is_none_is_refused(bad):
    with pytest.raises(RecipeError, match="is not a list of student:teacher blocks such as '1:2,2:4'"):
        wb.Distill(temperature=2, hidden_weight=1, layer_map=bad)


def test_a_map_that_matches_nothing_is_refused():
    with pytest.raises(
        RecipeError, match="layer_map='1:1' matches nothing while hidden_weight and attention_weight are 0"
    ):
        wb.Distill(temperature=2, layer_map="1:1")


def test_a_convolution_has_no_attention_maps():
    with pytest.raises(
        CompressionError,
        match=(
            "the compressed tiny-resnet gives no attention maps, so attention_weight has nothing to compare:"
            " set attention_weight=0"
        ),
    ):
        compress(tiny_task("resnet"), Recipe(PRUNE, wb.Distill(temperature=2, attention_weight=1)))


def test_removed_heads_do_not_fit_and_removed_neurons_do():
    task = tiny_task("vit")
    with pytest.raises(
        CompressionError,
        match=(
            r"attentions of block 1 of the student are \(1, 5, 5\) an item and those of block 1 of the"
            r" teacher \(2, 5, 5\)"
        ),
    ):
        compress(
            task,
            Recipe(wb.Prune(sparsity=0.5, pattern="heads"), wb.Distill(temperature=2, attention_weight=1)),
        )
    compressed = compress(
        task,
        Recipe(
            wb.Prune(sparsity=0.5, pattern="neurons"),
            wb.Distill(temperature=2, attention_weight=1, hidden_weight=1, steps=2),
        ),
    )
    assert len(compressed.curve) == 2


def test_removed_layers_are_matched_with_those_that_are_left():
    task = tiny_task("vit")
    compressed = compress(
        task,
        Recipe(wb.Prune(sparsity=0.5, pattern="layers"), wb.Distill(temperature=2, hidden_weight=1, steps=2)),
    )
    assert len(see(task.kind, compressed.model, task.training[:1], states=True).inside["hidden_states"]) == 2
    assert len(compressed.curve) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", -1),
        ("alpha", 1.1),
        ("alpha", -0.1),
        ("skew", 0),
        ("skew", 1),
        ("hidden_weight", -1),
        ("accumulate", 0),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(RecipeError, match=rf"Distill\({name}={value}\) is refused"):
        wb.Distill(**{name: value})


def test_options_that_were_added_leave_the_key_of_what_was_done_before():
    """Golden: the key of this recipe before the options were there."""
    assert Recipe(PRUNE, wb.Distill(temperature=2, learning_rate=5e-4, look_every=0)).key == KEY
    assert (
        Recipe(PRUNE, wb.Distill(temperature=2, learning_rate=5e-4)).key != KEY
    )  # nothing was held out then


KEY = "cf3099ec38b680c3"
