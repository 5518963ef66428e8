"""Transfer: the loss against one written by hand, what moves and what keeps its bits, teachers, and every
refusal."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tokenizer_files
from tiny_tasks import CLASSES, TRAINING, llama, resnet, same, spread, tiny_task, vit, weights

import workbench as wb
from workbench.calibration.statistics import Statistics
from workbench.compress import compress
from workbench.compress.distillation.teachers import together
from workbench.errors import CompressionError, ModelError, RecipeError
from workbench.export import load
from workbench.recipe import Recipe
from workbench.util.progress import Training
from workbench.zoo.teachers import check_vocabulary, vocabulary

PRUNE = wb.Prune(sparsity=0.5)
DEPTH = wb.Prune(sparsity=0.5, pattern="layers")
FAST = {"transfer_steps": 4, "transfer_batch": 16, "transfer_rate": 1e-2}
BLOCKS = {"vit": "vit.layers", "llama": "model.layers", "gpt2": "transformer.h"}


def saved(folder, model, labels=None, *, with_words: bool = False):
    """Save a model so that the zoo loads it, with class names or a tokenizer."""
    if labels:
        model.config.id2label, model.config.label2id = (
            dict(enumerate(labels)),
            {name: i for i, name in enumerate(labels)},
        )
    model.save_pretrained(folder)
    if with_words:
        tokenizer_files(folder)
    return str(folder)


def seeded(make, seed: int):
    """Return another model of the same shape."""
    torch.manual_seed(seed)
    model = spread(make())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            )
    return model


# --- the loss


def softmax(row, temperature):
    powers = [math.exp((x - max(row)) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def states(model, items, names):
    """Return logits as lists, and the outputs of blocks by name, float64 [tokens of all items, width]."""
    outputs = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: outputs.__setitem__(
                name, out if isinstance(out, torch.Tensor) else out[0]
            )
        )
        for name in names
    ]
    with torch.no_grad():
        logits = model(**items.inputs).logits
    for hook in hooks:
        hook.remove()
    return logits.double().tolist(), {name: state.double().flatten(0, 1) for name, state in outputs.items()}


@pytest.mark.parametrize("align", ["none", "mse", "cosine", "geodesic"])
def test_the_first_loss_is_that_of_the_definition_in_float64(align):
    task = tiny_task("vit")
    start = compress(task, Recipe(PRUNE)).model
    step = wb.Transfer(
        transfer_steps=1,
        transfer_batch=TRAINING,
        align=align,
        ce_weight=0.3,
        kl_weight=0.7,
        align_weight=2.5,
        transfer_temperature=3,
        seed=4,
    )
    compressed = compress(task, Recipe(PRUNE, step))
    blocks = [f"{BLOCKS['vit']}.{i}" for i in range(2)]
    drawn = task.training[torch.randint(TRAINING, (TRAINING,), generator=torch.Generator().manual_seed(4))]
    (mine, own), (theirs, aims) = states(start, drawn, blocks), states(task.model, drawn, blocks)
    cross = (
        -sum(math.log(softmax(row, 1)[label]) for row, label in zip(mine, drawn.labels.tolist(), strict=True))
        / TRAINING
    )
    soft = (
        sum(
            p * math.log(p / q)
            for s, t in zip(mine, theirs, strict=True)
            for p, q in zip(softmax(t, 3), softmax(s, 3), strict=True)
        )
        / TRAINING
    )
    (_, fit), (_, goal) = (
        states(start, task.calibration, blocks),
        states(task.model, task.calibration, blocks),
    )
    distances = []
    for name in blocks:
        projection = torch.linalg.lstsq(fit[name], goal[name]).solution
        rows, aim_rows = own[name] @ projection, aims[name]
        cosines = (rows * aim_rows).sum(1) / rows.norm(dim=1) / aim_rows.norm(dim=1)
        distances.append(
            {
                "mse": (rows - aim_rows).square().sum() / aim_rows.square().sum(),
                "cosine": (1 - cosines).mean(),
                "geodesic": torch.arccos(cosines).mean(),
                "none": 0.0,
            }[align]
        )
    wanted = 0.3 * cross + 0.7 * 9 * soft + 2.5 * float(sum(distances)) / 2
    assert compressed.curve[0][1] == pytest.approx(wanted, rel=1e-3)


def test_several_teachers_count_by_the_mean_of_their_softened_answers():
    generator = torch.Generator().manual_seed(0)
    answers = [3 * torch.randn(6, 5, generator=generator) for _ in range(3)]
    task = tiny_task("vit")
    merged = together(task.kind, answers, 2.0)
    for row in range(6):
        wanted = [
            sum(column) / 3
            for column in zip(*(softmax(answer[row].tolist(), 2.0) for answer in answers), strict=True)
        ]
        assert softmax(merged[row].tolist(), 2.0) == pytest.approx(wanted, rel=1e-5)
    assert together(task.kind, answers[:1], 2.0) is answers[0]


# --- what moves


@pytest.mark.parametrize("align", ["none", "geodesic"])
@pytest.mark.parametrize("count", [1, 3])
def test_everything_but_the_adapted_weights_keeps_its_bits(sort, device, align, count):
    task = tiny_task(sort, device)
    start = compress(task, Recipe(PRUNE))
    compressed = compress(
        task, Recipe(PRUNE, wb.Transfer(align=align, lora_count=count, align_projection="trained", **FAST))
    )
    before, after = weights(start.model), weights(compressed.model)
    taught = {f"{row.name}.weight" for row in compressed.report if "LoRA" in row.outcome}
    assert taught
    assert {name for name in before if not torch.equal(before[name], after[name])} == taught
    assert len(compressed.curve) == FAST["transfer_steps"]


def test_only_targeted_layers_move_and_masks_hold():
    task = tiny_task("vit")
    start, compressed = (
        compress(task, Recipe(PRUNE)),
        compress(task, Recipe(PRUNE, wb.Transfer(targets=("re:fc1$",), **FAST))),
    )
    before, after = weights(start.model), weights(compressed.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"vit.layers.{i}.mlp.fc1.weight" for i in range(2)
    }
    for earlier, later in zip(start.layers, compressed.layers, strict=True):
        assert torch.equal(earlier.mask, later.mask) if earlier.mask is not None else later.mask is None


@pytest.mark.parametrize(
    "before",
    [
        DEPTH,
        wb.Prune(sparsity=0.5, pattern="neurons"),
        wb.Prune(sparsity=0.5, pattern="heads"),
        wb.LowRank(rank_ratio=0.3, factorization="svd"),
        PRUNE,
    ],
    ids=lambda step: step.label(),
)
@pytest.mark.parametrize("sort", ["vit", "llama"])
def test_students_cut_in_depth_width_and_rank_come_closer_to_the_teacher(sort, before):
    task = tiny_task(sort)
    start = compress(task, Recipe(before))
    compressed = compress(
        task,
        Recipe(
            before,
            wb.Transfer(
                transfer_steps=40,
                transfer_look_every=0,
                transfer_rate=1e-2,
                transfer_batch=TRAINING,
                ce_weight=0,
            ),
        ),
    )
    training = task.training
    with torch.no_grad():
        teacher = task.kind.logits(task.model, training)
        first, last = (
            float(task.kind.soft_loss(task.kind.logits(model, training), teacher, training.labels, 2))
            for model in (start.model, compressed.model)
        )
    assert last < 0.8 * first
    assert [tuple(p.shape) for p in compressed.model.parameters()] == [
        tuple(p.shape) for p in start.model.parameters()
    ]


def test_alignment_brings_states_closer_than_answers_alone():
    task = tiny_task("vit")
    block = f"{BLOCKS['vit']}.1"
    aim = states(task.model, task.training, [block])[1][block]
    angles = {}
    for align in ("none", "geodesic"):
        compressed = compress(
            task,
            Recipe(
                PRUNE,
                wb.Transfer(
                    transfer_steps=60,
                    transfer_look_every=0,
                    transfer_rate=1e-2,
                    transfer_batch=TRAINING,
                    align=align,
                    align_weight=3,
                    align_projection="fixed" if align == "none" else "none",
                ),
            ),
        )
        state = states(compressed.model, task.training, [block])[1][block]
        angles[align] = float(torch.arccos(torch.cosine_similarity(state, aim, dim=1)).mean())
    assert angles["geodesic"] < 0.9 * angles["none"]


def test_the_report_counts_what_learned_exactly():
    task = tiny_task("vit")
    compressed = compress(
        task,
        Recipe(
            PRUNE,
            wb.Transfer(lora_rank=2, lora_count=2, align_projection="trained", align_layers="last", **FAST),
        ),
    )
    shapes = [row.shape for row in compressed.report if "LoRA" in row.outcome]
    count = 2 * (sum(2 * sum(shape) for shape in shapes) + 16 * 16)
    total = sum(parameter.numel() for parameter in task.model.parameters())
    row, *_ = (row for row in compressed.report if "LoRA" in row.outcome)
    assert (
        "LoRA of rank 2, mean of 2, trained 4 steps by CE + KL + geodesic, folded; trainable in all:"
        f" {count:,} numbers, {count / total:.2%} of the teacher's {total:,}" in row.outcome
    )


def test_weights_on_a_grid_are_left_alone_and_the_report_says_why():
    task = tiny_task("vit")
    recipe = (wb.Quantize(weight_bits=4, targets=("re:fc1$",)),)
    start, compressed = compress(task, Recipe(*recipe)), compress(task, Recipe(*recipe, wb.Transfer(**FAST)))
    rows = {row.name: row.outcome for row in compressed.report}
    assert (
        "transfer skipped: its weights lie on a 4-bit grid, which a folded LoRA would leave"
        in rows["vit.layers.0.mlp.fc1"]
    )
    assert torch.equal(
        start.model.vit.layers[0].mlp.fc1.weight, compressed.model.vit.layers[0].mlp.fc1.weight
    )
    assert not torch.equal(
        start.model.vit.layers[0].mlp.fc2.weight, compressed.model.vit.layers[0].mlp.fc2.weight
    )


def test_terms_beside_rounded_weights_can_be_taught():
    task = tiny_task("vit")
    recipe = (wb.Quantize(weight_bits=3), wb.Repair(repair_ratio=0.2))
    start, compressed = compress(task, Recipe(*recipe)), compress(task, Recipe(*recipe, wb.Transfer(**FAST)))
    before, after = weights(start.model), weights(compressed.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".first." in name or ".second." in name for name in moved)


def test_what_was_taught_can_be_quantized_exported_and_loaded(tmp_path, ledger):
    bench = wb.Bench(tiny_task("vit"), ledger=ledger, progress=False)
    recipe = Recipe(DEPTH, wb.Transfer(**FAST), wb.Quantize(weight_bits=8))
    point = bench.measure(recipe)
    assert point.recipe == recipe
    bench.export(recipe, tmp_path / "out")
    assert same(weights(load(tmp_path / "out")), weights(bench.compress(recipe).model))


def test_ending_early_says_where_and_gives_the_same_bits_again():
    task = tiny_task("vit")
    seen: list[int] = []
    training = Training(lambda curve, _: seen.append(len(curve)), lambda: len(seen) == 3)
    stopped = compress(
        task, Recipe(PRUNE, wb.Transfer(transfer_steps=9, transfer_batch=8)), training=training
    )
    assert stopped.recipe == Recipe(
        PRUNE, wb.Transfer(transfer_steps=9, transfer_batch=8, transfer_stop_at=3)
    )
    again = compress(task, stopped.recipe)
    assert same(weights(again.model), weights(stopped.model))
    assert again.curve == stopped.curve


def test_the_curve_goes_on_where_a_later_training_begins():
    task = tiny_task("vit")
    compressed = compress(
        task, Recipe(PRUNE, wb.Transfer(**FAST), wb.Distill(temperature=2, steps=3, distill_batch=8))
    )
    assert [step for step, _ in compressed.curve] == list(range(7))


# --- teachers


def test_a_teacher_from_the_zoo_teaches_the_model_itself(tmp_path):
    task = tiny_task("vit")
    name = saved(tmp_path, seeded(vit, 7))
    compressed = compress(
        task,
        Recipe(
            wb.Transfer(
                teachers=name,
                transfer_steps=40,
                transfer_look_every=0,
                transfer_batch=TRAINING,
                transfer_rate=1e-2,
                ce_weight=0,
            )
        ),
    )
    from workbench.zoo.teachers import load_teacher

    teacher = load_teacher(name, task, torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.no_grad():
        wanted = task.kind.logits(teacher, task.training)
        first, last = (
            float(
                task.kind.soft_loss(task.kind.logits(model, task.training), wanted, task.training.labels, 2)
            )
            for model in (task.model, compressed.model)
        )
    assert last < 0.8 * first


def test_a_teacher_is_loaded_once_a_bench_and_others_are_asked_together(tmp_path):
    task = tiny_task("vit")
    name = saved(tmp_path, seeded(vit, 7))
    kept = Statistics(task)
    recipes = [
        Recipe(wb.Transfer(teachers=f"dense,{name}", transfer_batch=8, transfer_steps=2)),
        Recipe(wb.Transfer(teachers=name, transfer_batch=8, transfer_steps=2)),
    ]
    first = compress(task, recipes[0], kept)
    loaded = [key for key in kept.kept if isinstance(key, tuple) and key[0] == "teacher"]
    assert loaded == [("teacher", name)]
    assert first.curve != compress(task, recipes[1], kept).curve
    assert same(weights(compress(task, recipes[0]).model), weights(first.model))


def test_a_teacher_of_another_family_teaches_by_answers_only(tmp_path):
    task = tiny_task("vit")
    name = saved(tmp_path, seeded(resnet, 3))  # reads the same images
    with pytest.raises(
        CompressionError,
        match=(
            r"hidden states cannot be aligned: the student's blocks are in vit\.layers, the teacher's in"
            r" resnet\.encoder.*; use align='none'"
        ),
    ):
        compress(task, Recipe(wb.Transfer(teachers=name, **FAST)))
    assert compress(task, Recipe(wb.Transfer(teachers=name, align="none", **FAST))).curve


def test_a_teacher_of_another_width_needs_a_projection(tmp_path):
    task = tiny_task("vit")
    name = saved(tmp_path, seeded(lambda: vit_of(24, 3), 2))
    with pytest.raises(
        CompressionError,
        match=(
            r"'vit\.layers\.0' is 16 wide and 'vit\.layers\.1' of the teacher 24; use"
            r" align_projection='fixed' or 'trained'"
        ),
    ):
        compress(task, Recipe(wb.Transfer(teachers=name, align_projection="none", **FAST)))
    for projection in ("fixed", "trained"):
        assert compress(task, Recipe(wb.Transfer(teachers=name, align_projection=projection, **FAST))).curve


def vit_of(width: int, layers: int, patch: int = 4, classes: int = CLASSES):
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=patch,
            num_channels=1,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=classes,
        )
    )


def test_a_teacher_with_other_tokens_cannot_be_aligned(tmp_path):
    name = saved(tmp_path, seeded(lambda: vit_of(16, 2, patch=2), 2))
    with pytest.raises(
        CompressionError,
        match=r"'vit\.layers\.0' passes on 80 points where 'vit\.layers\.0' of the teacher has 272",
    ):
        compress(tiny_task("vit"), Recipe(wb.Transfer(teachers=name, **FAST)))


def test_a_teacher_with_other_classes_is_refused(tmp_path):
    name = saved(tmp_path, seeded(lambda: vit_of(16, 2, classes=7), 2))
    with pytest.raises(
        CompressionError,
        match=(
            r"answers in the shape \[1, 7\], the student in \[1, 4\]: give a teacher with the same classes or"
            r" vocabulary"
        ),
    ):
        compress(tiny_task("vit"), Recipe(wb.Transfer(teachers=name, **FAST)))


def test_a_teacher_with_other_labels_is_refused(tmp_path):
    task = dataclasses.replace(tiny_task("vit"), labels=("a", "b", "c", "d"))
    name = saved(tmp_path, seeded(vit, 2), labels=("a", "c", "b", "d"))
    with pytest.raises(
        ModelError, match=r"has other labels than 'tiny-vit': 4 against 4, and label 1 is 'c' against 'b'"
    ):
        compress(task, Recipe(wb.Transfer(teachers=name, **FAST)))


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    from transformers import AutoTokenizer

    name = saved(tmp_path / "teacher", seeded(llama, 2), with_words=True)
    tokenizer = AutoTokenizer.from_pretrained(name)
    task = dataclasses.replace(tiny_task("llama"), processor=tokenizer)
    assert compress(task, Recipe(wb.Transfer(teachers=name, **FAST))).curve
    file = tmp_path / "teacher" / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    file.write_text(json.dumps(told))
    with pytest.raises(
        ModelError, match=r"has another vocabulary \(64 entries\) than 'tiny-llama' \(64\): 'w[01]' differs"
    ):
        compress(task, Recipe(wb.Transfer(teachers=name, **FAST)))


def test_a_speech_models_vocabulary_is_that_of_its_tokenizer():
    """As of whisper-base and whisper-tiny.en, whose tokenizers cut words at different places."""
    task = dataclasses.replace(tiny_task("llama"), model_name="tiny.en")
    mine, theirs = (
        {word: place for place, word in enumerate(entries)}
        for entries in (["a", "b", "ab"], ["a", "ba", "b", "c"])
    )
    assert vocabulary(SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: mine))) == mine
    assert vocabulary(SimpleNamespace()) == {}
    with pytest.raises(
        ModelError,
        match=(
            r"teacher 'base' has another vocabulary \(4 entries\) than 'tiny.en' \(3\): 'b' differs, 2 are in"
            r" both; .* give one with the same tokenizer, or compress 'base' itself"
        ),
    ):
        check_vocabulary("base", task, theirs, mine)


def test_a_teacher_for_another_task_is_refused(tmp_path):
    name = saved(tmp_path, seeded(llama, 2))
    with pytest.raises(ModelError, match=r"does language modelling, 'tiny-vit' does image classification"):
        compress(tiny_task("vit"), Recipe(wb.Transfer(teachers=name, **FAST)))


def test_a_teacher_that_nobody_knows_is_refused():
    with pytest.raises(ModelError, match="unknown model 'fashion-cn'.*fashion-cnn"):
        compress(tiny_task("vit"), Recipe(wb.Transfer(teachers="fashion-cn", **FAST)))


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": "dense,"}, "should name each teacher once"),
        ({"teachers": "dense,dense"}, "should name each teacher once"),
        ({"transfer_stop_at": 200}, "transfer_stop_at=200 lies beyond transfer_steps=100"),
        ({"transfer_temperature": 0}, "greater than 0"),
        ({"lora_rank": 0}, "greater than or equal to 1"),
        ({"ce_weight": 0, "kl_weight": 0, "align": "none"}, "nothing to learn from"),
        ({"align": "euclid"}, "geodesic"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        wb.Transfer(**options)


def test_a_dense_model_cannot_teach_itself():
    with pytest.raises(RecipeError, match="Transfer cannot come first with teachers='dense'"):
        Recipe(wb.Transfer())


def test_repair_after_it_is_refused():
    with pytest.raises(RecipeError, match="Repair cannot follow Transfer"):
        Recipe(PRUNE, wb.Transfer(), wb.Repair())


def test_where_all_weights_lie_on_grids_it_says_what_would_work():
    with pytest.raises(
        CompressionError, match="all lie on a grid; put Transfer before Quantize, or Repair between them"
    ):
        compress(tiny_task("vit"), Recipe(wb.Quantize(weight_bits=4), wb.Transfer(**FAST)))


def test_alignment_that_no_adapted_layer_can_reach_is_refused_and_unreachable_blocks_are_left_out():
    task = tiny_task("vit")
    with pytest.raises(CompressionError, match="no hidden state lies downstream of a layer that is adapted"):
        compress(task, Recipe(PRUNE, wb.Transfer(targets=("classifier",), **FAST)))
    compressed = compress(
        task,
        Recipe(
            PRUNE,
            wb.Transfer(targets=("re:layers.1.*fc2$",), align_projection="trained", lora_rank=1, **FAST),
        ),
    )
    (row,) = (row for row in compressed.report if "LoRA" in row.outcome)
    assert (
        f"trainable in all: {32 + 16 + 16 * 16:,} numbers" in row.outcome
    )  # one projection: the first block is not downstream


def test_items_that_are_no_numbers_are_refused_by_what_the_teacher_says_of_them():
    task = tiny_task("vit")
    task.training.inputs["pixel_values"][:] = torch.nan
    with pytest.raises(
        CompressionError,
        match=(
            r"teacher 'dense' answers with numbers that are not finite \(64 of 64\): nothing can be learned"
            r" from them; check its weights and the training items"
        ),
    ):
        compress(task, Recipe(PRUNE, wb.Transfer(**FAST)))
