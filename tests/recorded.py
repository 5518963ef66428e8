"""What the layers of a model really read, recorded by hooks of the tests' own: the reference for everything
calibrated."""

from __future__ import annotations

import torch


def conv_rows(module: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return the patches of a convolution, [positions, channels * height * width], cut out one position at a
    time."""
    (height, width), (down, right), (top, left) = module.kernel_size, module.stride, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = torch.nn.functional.pad(x, (left, left, top, top), mode=mode)
    high, wide = module.dilation[0] * (height - 1) + 1, module.dilation[1] * (width - 1) + 1
    rows = [
        x[:, :, i : i + high : module.dilation[0], j : j + wide : module.dilation[1]].flatten(1)
        for i in range(0, x.shape[2] - high + 1, down)
        for j in range(0, x.shape[3] - wide + 1, right)
    ]
    return torch.cat(rows)


def recorded_inputs(task) -> dict[str, torch.Tensor]:
    """Return the inputs of every layer over the calibration data as rows, float32."""
    rows: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in task.model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and type(module).__name__ != "Conv1D":
            continue

        def hook(module, args, name=name):
            x = args[0].detach().float().clone()
            rows.setdefault(name, []).append(
                conv_rows(module, x) if isinstance(module, torch.nn.Conv2d) else x.reshape(-1, x.shape[-1])
            )

        handles.append(module.register_forward_pre_hook(hook))
    device = next(task.model.parameters()).device
    with torch.no_grad():
        for batch in task.calibration.batches(7):  # another batch size than the workbench's
            task.kind.logits(task.model, batch.to(device))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(batches) for name, batches in rows.items()}
