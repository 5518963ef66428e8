"""Exports: read by a decoder written here from the documented format, loaded back bit for bit, and never half
there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from test_methods import STEPS as NAMED
from test_methods import VARIANTS, leave_out, orders
from tiny_tasks import tiny_task

import workbench as wb
from workbench.bench import Bench
from workbench.compress.registry import METHODS
from workbench.errors import ExportError
from workbench.export import check_target
from workbench.recipe import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = {
    **VARIANTS,
    **{order: Recipe(*(NAMED[name] for name in order)) for order in orders() if len(order) > 2},
    "dense": Recipe(),
    "nf4": Recipe(wb.Prune(sparsity=0.5), wb.Quantize(number_format="nf4")),
    "float8": Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=8, number_format="float8")),
    "float16": Recipe(wb.Quantize(weight_bits=16, number_format="float16")),
    "2:4 hqq": Recipe(wb.Prune(pattern="2:4"), wb.Quantize(weight_bits=3, rounding="hqq")),
    "tensor": Recipe(wb.Quantize(weight_bits=5, granularity="tensor")),
    "3.4": Recipe(wb.Prune(sparsity=0.7), wb.Quantize(weight_bits=3.4, group_size=8)),
}


# --- a decoder from scratch: numpy and the words of the documentation, nothing of the workbench


def bits_of(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return `count` integers of `bits` bits each, least significant bit first in each byte and in each
    integer."""
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(1)


NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # Dettmers et al. 2023


def float8(code: int) -> float:
    """Return the value of a byte as e4m3: a sign, four bits of exponent with a bias of 7, three bits of
    fraction, no infinities."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if code >> 7 else size


def float4(code: int) -> float:
    """Return the value of four bits as e2m1: a sign, two bits of exponent of bias 1, one of fraction."""
    exponent, fraction = code >> 1 & 3, code & 1
    size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
    return -size if code >> 3 else size


TABLES = {
    "nf4": NF4,
    "float4": [float4(code) for code in range(16)],
    "float8": [float8(code) for code in range(256)],
}


def numbers(codes: np.ndarray, number_format: str) -> np.ndarray:
    """Return the values of codes, before zero points and scales; fails for formats without a table here."""
    if number_format in ("integer", "offset"):
        return codes
    return np.array(TABLES[number_format], np.float32)[codes]


def arrays_of(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file; numpy has no bfloat16, every number of which is a float32."""
    tensors = safetensors.torch.load_file(file)
    return {
        key: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for key, tensor in tensors.items()
    }


def decoded(tensors: dict[str, np.ndarray], key: str, about: dict) -> np.ndarray:
    """Return one weight as float32 in the shape in which the module holds it."""
    shape = about["shape"]
    if about["kind"] == "dense":
        return tensors[key].astype(about["dtype"])
    rows = shape[1] if about["transposed"] else shape[0]
    columns = int(np.prod(shape)) // rows
    mask = (
        bits_of(tensors[f"{key}.mask"], 1, rows * columns).astype(bool)
        if "bitmask" in about["kind"]
        else np.ones(rows * columns, bool)
    )
    matrix = np.zeros(rows * columns, np.float32)
    if about["kind"] == "bitmask":
        matrix[mask] = tensors[f"{key}.values"]
    else:
        bits, groups = about["bits"], about["groups"]
        scales = about["scale_rows"] or rows, groups
        scale = tensors[f"{key}.scale"].astype(np.float32).reshape(scales)
        zero = np.full(scales, 1 << (bits - 1) if about["number_format"] == "integer" else 0)
        if f"{key}.zero_point" in tensors:
            kept = tensors[f"{key}.zero_point"]
            zero = (
                bits_of(kept, bits, scale.size) if kept.dtype == np.uint8 else kept.astype(np.float32)
            ).reshape(scales)
        wide = [
            np.broadcast_to(np.repeat(x, columns // groups, axis=1), (rows, columns)).ravel()
            for x in (scale, zero)
        ]
        codes = numbers(bits_of(tensors[f"{key}.codes"], bits, int(mask.sum())), about["number_format"])
        matrix[mask] = (codes - wide[1][mask]).astype(np.float32) * wide[0][mask]
        if f"{key}.input_scale" in tensors:
            matrix = (
                matrix.reshape(rows, columns) * tensors[f"{key}.input_scale"].astype(np.float32)
            ).ravel()
    matrix = matrix.reshape(rows, columns)
    return np.ascontiguousarray(matrix.T) if about["transposed"] else matrix.reshape(shape)


def rebuilt(directory: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of an export."""
    manifest = json.loads((directory / "compression.json").read_text())
    encodings, tensors = manifest["encodings"], arrays_of(directory / "model.safetensors")
    for block in manifest["experts"]:  # one tensor for all experts where none is packed
        for layer in ("gate_up_proj", "down_proj"):
            for place, matrix in enumerate(tensors.pop(f"{block}.{layer}", ())):
                tensors[f"{block}.{place}.{layer}.weight"] = matrix
    state = {
        key: decoded(tensors, key, about) for key, about in encodings.items() if about["kind"] != "shared"
    }
    state |= {key: state[about["same_as"]] for key, about in encodings.items() if about["kind"] == "shared"}
    return {key: torch.from_numpy(value) for key, value in state.items()}


def merged(state: dict[str, torch.Tensor], low_rank: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return a state dict for the plain architecture: the two layers of a low-rank one multiplied into
    one."""
    for name, rank in low_rank.items():
        first, second = state.pop(f"{name}.0.weight"), state.pop(f"{name}.1.weight")
        assert len(first) == rank
        state[f"{name}.weight"] = (
            (second.flatten(1).double() @ first.flatten(1).double())
            .float()
            .view(len(second), *first.shape[1:])
        )
        if f"{name}.1.bias" in state:
            state[f"{name}.bias"] = state.pop(f"{name}.1.bias")
    return state


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)),
        Recipe(
            wb.LowRank(rank_ratio=0.45),
            wb.Prune(sparsity=0.3, criterion="wanda"),
            wb.Quantize(weight_bits=6, grid="symmetric"),
        ),
    ],
    ids=lambda recipe: recipe.label(),
)
def test_an_independent_reader_finds_the_accuracy_and_the_bytes_that_were_measured(
    tmp_path, recipe, fashion_cnn
):
    from transformers import ResNetConfig, ResNetForImageClassification

    bench = Bench(fashion_cnn, device="cpu", ledger=tmp_path / "points.journal", progress=False)
    point = bench.measure(recipe)
    out = bench.export(recipe, tmp_path / "out")
    model = ResNetForImageClassification(
        ResNetConfig.from_dict(json.loads((out / "config.json").read_text()))
    ).eval()
    model.load_state_dict(
        merged(rebuilt(out), json.loads((out / "compression.json").read_text())["low_rank"])
    )
    with np.load(ROOT / "workbench" / "tasks" / "pictures" / "fashion-mnist-slice.npz") as arrays:
        images, labels = arrays["evaluation_images"], arrays["evaluation_labels"]
    assert images.shape == (2000, 28, 28)
    pixels = (torch.from_numpy(images).float() / 255 - 0.286) / 0.353  # as preprocessor_config.json says
    with torch.no_grad():
        answers = torch.cat(
            [model(pixel_values=batch.unsqueeze(1)).logits.argmax(-1) for batch in pixels.split(200)]
        )
    right = int((answers == torch.from_numpy(labels)).sum())
    # Other batches, and products of factors, round otherwise: an image or two may lie near a tie.
    assert right == pytest.approx(2000 * point.primary.compressed.value, abs=2)
    assert (out / "model.safetensors").stat().st_size == point.sizes.file_bytes
    assert (
        sum(t.nbytes for t in safetensors.numpy.load_file(out / "model.safetensors").values())
        == point.sizes.packed_bytes
    )
    assert point.dense_sizes.file_bytes == pytest.approx(
        (ROOT / "workbench/zoo/embedded/fashion-cnn/model.safetensors").stat().st_size, rel=0.01
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_what_is_loaded_back_is_the_same_bit_for_bit(sort, tmp_path, recipe, ledger):
    leave_out(sort, recipe)
    from workbench.export import export

    task = tiny_task(sort)
    bench = Bench(task, device="cpu", ledger=ledger, progress=False)
    compressed = bench.compress(recipe)
    out = export(task, compressed, MEASURED(recipe), tmp_path / "out")
    loaded = wb.load(out)
    with torch.no_grad():
        assert torch.equal(
            task.kind.logits(loaded, task.evaluation), task.kind.logits(compressed.model, task.evaluation)
        )
    expected = compressed.model.state_dict()
    state = rebuilt(out)
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


class Measured:
    """One measurement for exports that are only about tensors: the recipe is put in, the rest is of another
    point."""

    def __init__(self) -> None:
        self.point = None

    def __call__(self, recipe: Recipe):
        if self.point is None:
            import tempfile

            with tempfile.TemporaryDirectory() as folder:
                self.point = Bench(
                    tiny_task("vit"), device="cpu", ledger=Path(folder) / "x.journal", progress=False
                ).measure(Recipe())
        return dataclasses.replace(self.point, recipe=recipe)


MEASURED = Measured()


@pytest.mark.parametrize("sort", ["vit", "resnet", "llama", "gpt2", "bert", "untied"])
def test_bfloat16_models_come_back_in_bfloat16(sort, tmp_path):
    from workbench.compress import compress
    from workbench.export import export

    task = tiny_task(sort, dtype=torch.bfloat16)
    recipe = Recipe(
        wb.LowRank(rank_ratio=0.3, targets=("*", "lm_head" if sort == "untied" else "*")),
        wb.Prune(sparsity=0.5),
        wb.Quantize(weight_bits=4, group_size=0),
    )
    compressed = compress(task, recipe)
    loaded = wb.load(export(task, compressed, MEASURED(recipe), tmp_path / "out"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(
            task.kind.logits(loaded, task.evaluation), task.kind.logits(compressed.model, task.evaluation)
        )


@pytest.fixture
def exported(tmp_path) -> Path:
    bench = Bench(tiny_task("gpt2"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    return bench.export(
        Recipe(wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)), tmp_path / "parent" / "out"
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_tied_weights_are_stored_once_and_come_back_tied(exported):
    loaded = wb.load(exported)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert "lm_head.weight" not in safetensors.numpy.load_file(exported / "model.safetensors")


def test_an_export_says_how_it_was_made(exported):
    manifest = json.loads((exported / "compression.json").read_text())
    assert METHODS.from_json(json.dumps(manifest["recipe"])) == Recipe(
        wb.Prune(sparsity=0.5), wb.Quantize(weight_bits=4)
    )
    assert (
        manifest["weights_sha256"]
        == hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    )
    assert manifest["measurement"]["sizes"]["file_bytes"] == (exported / "model.safetensors").stat().st_size
    assert manifest["measurement"]["provenance"]["versions"]["torch"] == torch.__version__
    card = (exported / "README.md").read_text()
    assert "50% sparse + W4" in card
    assert f"{(exported / 'model.safetensors').stat().st_size:,}" in card
    assert {path.name for path in exported.iterdir()} == {
        "README.md",
        "compression.json",
        "config.json",
        "model.safetensors",
    }
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


# --- what other tools do with it


def by_transformers(task, directory):
    import transformers

    return getattr(transformers, task.kind.auto_class).from_pretrained(directory, local_files_only=True)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_transformers_opens_an_export_rightly_or_not_at_all(sort, tmp_path, recipe, ledger):
    """Tensors that it does not know it would draw at random, with no more than a warning."""
    leave_out(sort, recipe)
    from workbench.export import export

    task = tiny_task(sort)
    compressed = Bench(task, device="cpu", ledger=ledger, progress=False).compress(recipe)
    out = export(task, compressed, MEASURED(recipe), tmp_path / "out")
    said = json.loads((out / "config.json").read_text()).get("quantization_config")
    if said is not None:
        assert said == {"written_by": "compression-workbench", "opened_by": "workbench.load(folder)"}
        assert not hasattr(wb.load(out).config, "quantization_config")
        with pytest.raises(ValueError, match="has no `quant_method` attribute"):
            by_transformers(task, out)
        return
    opened = by_transformers(task, out)
    with torch.no_grad():
        answers = (task.kind.logits(model, task.evaluation) for model in (opened, compressed.model))
        assert torch.equal(*answers)


def test_an_export_without_packed_weights_is_opened_by_transformers(sort, tmp_path, ledger):
    task = tiny_task(sort)
    bench = Bench(task, device="cpu", ledger=ledger, progress=False)
    opened = by_transformers(task, bench.export(Recipe(), tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(
            task.kind.logits(opened, task.evaluation), task.kind.logits(task.model, task.evaluation)
        )


def test_an_export_is_no_model_to_compress_again(exported):
    from workbench.errors import ModelError
    from workbench.zoo import load_task

    with pytest.raises(
        ModelError, match=r"is an export of the workbench, compressed already: workbench\.load"
    ):
        load_task(exported, "words.txt", progress=False)


# --- damage


def test_a_damaged_weights_file_is_refused(exported):
    path = exported / "model.safetensors"
    whole = path.read_bytes()
    for spoiled in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole + b"x",
    ):
        path.write_bytes(spoiled)
        with pytest.raises(ExportError, match=r"model\.safetensors' is damaged: its sha256"):
            wb.load(exported)


@pytest.mark.parametrize("key", ["format", "weights_sha256", "auto_class", "encodings", "low_rank"])
def test_a_manifest_with_a_part_missing_is_refused(exported, key):
    manifest = json.loads((exported / "compression.json").read_text())
    del manifest[key]
    (exported / "compression.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=key if key != "format" else "has format None"):
        wb.load(exported)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\x00", '{"format": 1}'])
def test_a_damaged_manifest_is_refused(exported, text):
    (exported / "compression.json").write_text(text)
    with pytest.raises(ExportError, match="out'"):
        wb.load(exported)


def test_a_newer_format_is_refused_with_what_this_version_reads(exported):
    manifest = json.loads((exported / "compression.json").read_text())
    (exported / "compression.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ExportError, match=r"has format 2; this version reads format 1"):
        wb.load(exported)


def test_a_class_that_is_no_model_of_ours_is_never_built(exported):
    manifest = json.loads((exported / "compression.json").read_text())
    (exported / "compression.json").write_text(json.dumps({**manifest, "auto_class": "pipeline"}))
    with pytest.raises(
        ExportError,
        match=r"asks for the class 'pipeline'; known: AutoModel, AutoModelForCTC, AutoModelForCausalLM",
    ):
        wb.load(exported)


@pytest.mark.parametrize("spoil", ["encodings", "tensors", "config", "rank"])
def test_parts_that_do_not_fit_together_are_refused(exported, spoil):
    manifest = json.loads((exported / "compression.json").read_text())
    name = next(name for name, about in manifest["encodings"].items() if about["bits"])
    if spoil == "encodings":
        manifest["encodings"][name]["kind"] = "magic"
    elif spoil == "tensors":
        manifest["encodings"][name]["bits"] = 5
    elif spoil == "rank":
        manifest["low_rank"] = {"transformer.nothing": 3}
    else:
        (exported / "config.json").unlink()
    (exported / "compression.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=r"out'|cannot be unpacked"):
        wb.load(exported)


def test_a_directory_that_is_no_export_is_refused(tmp_path, exported):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ExportError, match=r"is no export of the workbench: compression\.json is missing"):
            wb.load(place)
    (exported / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"is no export of the workbench: model\.safetensors is missing"):
        wb.load(exported)


# --- where it is written


def test_what_is_there_already_is_not_written_over(tmp_path, exported, monkeypatch):
    bench = Bench(tiny_task("gpt2"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    recipe, before = Recipe(wb.Quantize(weight_bits=8)), contents(exported)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    monkeypatch.setattr("workbench.bench.compress", lambda *_: pytest.fail("refused only after the work"))
    for target, overwrite, message in (
        (exported, False, r"holds an earlier export: pass overwrite=True \(--overwrite\)"),
        (tmp_path / "full", True, "holds files that are no export of the workbench"),
        (tmp_path / "full" / "thesis.txt", True, "is a file"),
        (tmp_path / "full" / "thesis.txt" / "out", True, "."),
    ):
        with pytest.raises(ExportError, match=message):
            bench.export(recipe, target, overwrite=overwrite)
    assert contents(exported) == before
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_an_empty_directory_and_an_earlier_export_may_be_replaced(tmp_path, exported):
    bench = Bench(tiny_task("gpt2"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    (tmp_path / "empty").mkdir()
    recipe = Recipe(wb.Quantize(weight_bits=8))
    old = contents(exported)
    for target in (tmp_path / "empty", exported):
        assert bench.export(recipe, target, overwrite=target is exported) == target
        assert json.loads((target / "compression.json").read_text())["recipe"][0]["weight_bits"] == 8
    assert contents(exported) != old
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_a_parent_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    bench = Bench(tiny_task("vit"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(
            ExportError, match=r"cannot write to .*: choose a directory that you may write to"
        ):
            check_target(tmp_path / "out", overwrite=False)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(ExportError, match=r"cannot write to .*Read-only file system"):
        bench.export(Recipe(wb.Quantize(weight_bits=8)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "call",
    ["os.fsync", "workbench.export.verify", "workbench.export.card", "pathlib.Path.rename", "second rename"],
)
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
    ids=["full disk", "Ctrl-C"],
)
def test_a_failure_at_any_moment_leaves_no_half_export_and_keeps_the_old_one(
    tmp_path, exported, monkeypatch, call, failure
):
    bench = Bench(tiny_task("gpt2"), device="cpu", ledger=tmp_path / "points.journal", progress=False)
    bench.measure(Recipe(wb.Quantize(weight_bits=8)))  # the ledger's own writes are not the subject
    before, count = contents(exported), itertools.count()
    rename = Path.rename

    def fail(*arguments, **_):
        if call == "second rename" and next(count) != 1:
            return rename(*arguments)
        raise failure

    expected = ExportError if isinstance(failure, OSError) else KeyboardInterrupt
    for target in (exported, exported.with_name("new")):
        if call == "second rename" and target is not exported:
            continue
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.rename" if call == "second rename" else call, fail)
            with pytest.raises(expected):
                bench.export(Recipe(wb.Quantize(weight_bits=8)), target, overwrite=True)
        assert [path.name for path in exported.parent.iterdir()] == ["out"]
        assert contents(exported) == before
    wb.load(exported)


def test_an_export_can_be_moved_and_copied(tmp_path, exported):
    expected = wb.load(exported).state_dict()
    shutil.copytree(exported, tmp_path / "elsewhere")
    shutil.rmtree(exported)
    loaded = wb.load(str(tmp_path / "elsewhere")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
