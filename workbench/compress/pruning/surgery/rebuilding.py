"""Whether a model without some of its structure can be exported: built again from its configuration.

An export holds a configuration, and beside it what the configuration cannot say of sizes and numbers
(`surgery.differences`). What neither can say is refused before anything is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.compress.pruning.surgery import apply_differences, differences
from workbench.errors import MISFITS, CompressionError
from workbench.modules.experts import experts_in, separate_experts
from workbench.util.quiet import quiet
from workbench.util.text import kind_and_words

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune
    from workbench.tasks.base import Kind

# Attributes of modules that an export does not say: they must follow from the configuration
PLAIN = (str, bool)
PASSING = {"training"}


def built_from(work: Work, config: Any, like: nn.Module | None = None) -> nn.Module | None:
    """Return a model of the task's kind without values, its experts apart as in `like` (by default the
    work's), None where the configuration builds none.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return skeleton_of(work.task.kind, config, list(experts_in(like or work.model)))
    except (*MISFITS, StrictDataclassError):  # what a configuration is refused with
        return None


def skeleton_of(kind: Kind, config: Any, experts: list[str]) -> nn.Module:
    """Return the untrained model that a configuration builds, as shapes where it can be built so.

    Raises whatever the configuration is refused with.
    """
    import transformers

    build = getattr(transformers, kind.auto_class).from_config
    config = type(config).from_dict(config.to_dict())  # as it comes back from a file
    with quiet():
        try:
            with torch.device("meta"):
                built: nn.Module = build(config, trust_remote_code=False)
        except (RuntimeError, NotImplementedError):  # it computes with numbers while it is built
            built = build(config, trust_remote_code=False)
    separate_experts(built, experts)
    return built


def check_rebuilds(step: Prune, work: Work) -> None:
    """Build the model again from what an export would say of it, once a bench and pattern.

    A model that is not what its configuration builds even whole (changed in memory) is let go on.

    Raises:
        CompressionError: that is another model, so that this one could be measured, but never exported.

    """
    config = getattr(work.model, "config", None)
    if not hasattr(config, "to_dict"):
        return
    once, dense = work.statistics.once, work.task.model
    reason = once(("rebuilds without", step.pattern), lambda: unlike(work, work.model, config))
    if reason and not once("rebuilds", lambda: unlike(work, dense, dense.config)):
        raise CompressionError(
            f"{step!r}: {type(work.model).__name__} could run without those {step.pattern}, but never be"
            f" exported: {reason}"
        )


def unlike(work: Work, model: nn.Module, config: Any) -> str:
    """Return in what a model built again differs from one, "" if in nothing."""
    made = built_from(work, config, model)
    if made is None:
        return "its configuration builds no model any more"
    try:
        apply_differences(made, differences(model, made))
    except (AttributeError, RuntimeError, IndexError) as error:
        return kind_and_words(error)
    wanted, found = (
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items()} for each in (model, made)
    )
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            return (
                f"its configuration builds {name} {list(found[name]) if name in found else 'nowhere'}, and it"
                f" is {list(wanted[name]) if name in wanted else 'nowhere'}"
            )
    modules = dict(made.named_modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            other = vars(modules[name]).get(key) if name in modules else value
            if isinstance(value, PLAIN) and key not in PASSING and not key.startswith("_") and other != value:
                return f"its configuration builds {name} with {key}={other!r}, and it has {value!r}"
    return ""
