"""Train the two embedded models, `fashion-cnn` and `fashion-vit`, on all 60,000 Fashion-MNIST training
images.

    python -m workbench.zoo.train --data FOLDER_WITH_IDX_GZ --out workbench/zoo/embedded

The folder holds the four `*-ubyte.gz` files of the data set's own repository (Xiao, Rasul, Vollgraf 2017,
MIT). About three minutes on one H100, some hours on a laptop CPU. The CNN is trained first and teaches the
ViT (hard labels mixed with its soft targets: Hinton et al. 2015, DeiT 2021), because a ViT of one million
parameters learns slowly from 60,000 small pictures alone. The schedule is fixed in advance, the last weights
(their moving average) are kept, and no choice was made by the 10,000 test images.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from workbench.tasks.fashion_mnist import FILE, LABELS, MEAN, STD

EPOCHS = {"fashion-cnn": 80, "fashion-vit": 200}
EVALUATION_ITEMS, CALIBRATION_ITEMS, TRAINING_ITEMS = 2000, 512, 5000


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes: [N] labels or [N, H, W] images."""
    with gzip.open(path) as file:
        header = file.read(4)
        shape = [int.from_bytes(file.read(4), "big") for _ in range(header[3])]
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def build(name: str) -> nn.Module:
    """Return the untrained model: ordinary transformers classes, nothing special to the workbench."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    names: Any = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    if name == "fashion-vit":
        config = ViTConfig(
            image_size=28,
            patch_size=7,
            num_channels=1,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=384,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **names,
        )
        return ViTForImageClassification(config)
    residual = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        **names,
    )
    return ResNetForImageClassification(residual)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 2 pixels, mirror half of the images, erase one 7x7 square in half of them. images: [B,
    1, 28, 28].
    """
    count, _, height, width = images.shape

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (count, 1, 1), device=images.device, generator=generator)

    rows = torch.arange(height, device=images.device).view(1, -1, 1) + draw(5)
    columns = torch.arange(width, device=images.device).view(1, 1, -1)
    columns = torch.where(draw(2) == 1, width - 1 - columns, columns) + draw(5)
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    items = torch.arange(count, device=images.device).view(-1, 1, 1)
    images = padded[items, 0, rows, columns].unsqueeze(1)
    top, left, erase = draw(height), draw(width), draw(2)
    y, x = (
        torch.arange(height, device=images.device).view(1, -1, 1),
        torch.arange(width, device=images.device).view(1, 1, -1),
    )
    hole = (y >= top) & (y < top + 7) & (x >= left) & (x < left + 7) & (erase == 1)
    return images.masked_fill(hole.unsqueeze(1), 0.0)


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: 5% linear warm-up, then a cosine to zero."""
    warm = max(1, steps // 20)
    return (
        peak * step / warm
        if step < warm
        else peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
    )


def make_step(
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    pixels: torch.Tensor,
    labels: torch.Tensor,
) -> Callable[[], None]:
    """Return a function that trains once on whatever `pixels` and `labels` hold.

    On a GPU one CUDA graph, as launches cost more than the work.
    """

    def once() -> None:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda, cache_enabled=False):
            logits = model(pixel_values=pixels).logits.float()
            loss = F.cross_entropy(logits, labels, label_smoothing=0.0 if teacher else 0.1)
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(pixel_values=pixels).logits.float()
                soft = F.kl_div(
                    (logits / 2).log_softmax(-1),
                    (target / 2).log_softmax(-1),
                    log_target=True,
                    reduction="batchmean",
                )
                loss = 0.3 * loss + 0.7 * 4 * soft
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def eager() -> None:
        optimizer.zero_grad(set_to_none=True)
        once()

    if not pixels.is_cuda:
        return eager
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # warm up; the learning rate is still zero
            eager()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, teacher: nn.Module | None
) -> nn.Module:
    """Return the moving average of the weights after AdamW with a cosine schedule. images: [N, 1, 28, 28],
    labels: [N].
    """
    generator = torch.Generator(images.device).manual_seed(0)
    batch, peak = 512, 2e-3
    per_epoch = len(images) // batch
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=torch.tensor(0.0, device=images.device), fused=images.is_cuda, capturable=images.is_cuda
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=True
    )
    pixels, wanted = images[:batch].clone(), labels[:batch].clone()
    step = make_step(model, teacher, optimizer, pixels, wanted)
    for index in range(epochs * per_epoch):
        if index % per_epoch == 0:
            order = torch.randperm(len(images), device=images.device, generator=generator)
            print(f"epoch {index // per_epoch} of {epochs}", end="\r", flush=True)
        picked = order[(index % per_epoch) * batch :][:batch]
        pixels.copy_(augment(images[picked], generator))
        wanted.copy_(labels[picked])
        for group in optimizer.param_groups:
            group["lr"].fill_(rate(index, epochs * per_epoch, peak))
        step()
        if index % 8 == 0:
            average.update_parameters(model)
    smoothed: nn.Module = copy.deepcopy(average.module).eval()
    return smoothed


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction of `images` ([N, 1, 28, 28]) classified as `labels` ([N]), in float32."""
    hits = [
        (model(pixel_values=x).logits.argmax(-1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return float(sum(hits)) / len(labels)


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` indices with equally many of each of the ten classes, in random order, so that any
    prefix is fair.
    """
    generator = np.random.default_rng(seed)
    picked = [generator.permutation(np.flatnonzero(labels == label))[: count // 10] for label in range(10)]
    return generator.permutation(np.concatenate(picked))


def main() -> None:
    """Read the data, train both models, write weights, slice and measured accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slice", type=Path, default=FILE, help="where a slice of the data is written")
    parser.add_argument("--epochs-scale", type=float, default=1.0, help="1.0 is the full schedule")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raw = {
        split: (
            read_idx(options.data / f"{split}-images-idx3-ubyte.gz"),
            read_idx(options.data / f"{split}-labels-idx1-ubyte.gz"),
        )
        for split in ("train", "t10k")
    }

    def normalise(pixels: np.ndarray) -> torch.Tensor:
        return ((torch.tensor(pixels) / 255 - MEAN) / STD).unsqueeze(1).to(device)

    (x, y), (x_test, y_test) = [
        (normalise(images), torch.tensor(labels).long().to(device)) for images, labels in raw.values()
    ]
    held_out = stratified(raw["t10k"][1], EVALUATION_ITEMS, seed=0)
    kept = stratified(raw["train"][1], TRAINING_ITEMS, seed=1)
    np.savez_compressed(
        options.slice,
        evaluation_images=raw["t10k"][0][held_out],
        evaluation_labels=raw["t10k"][1][held_out],
        training_images=raw["train"][0][kept],
        training_labels=raw["train"][1][kept],
    )
    teacher: nn.Module | None = None
    for name in ("fashion-cnn", "fashion-vit"):
        epochs = max(1, round(EPOCHS[name] * options.epochs_scale))
        model = train(build(name).to(device), x, y, epochs, teacher)
        measured = {
            "accuracy_test_10000": accuracy(model, x_test, y_test),
            "accuracy_evaluation_2000": accuracy(model, x_test[held_out], y_test[held_out]),
            "accuracy_training_60000": accuracy(model, x, y),
            "parameters": sum(p.numel() for p in model.parameters()),
            "epochs": epochs,
        }
        print(name, measured, flush=True)
        model.cpu().save_pretrained(options.out / name)  # type: ignore[operator]
        teacher = model.to(device)
        (options.out / name / "training.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
