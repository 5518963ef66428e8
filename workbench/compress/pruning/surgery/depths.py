"""How many blocks are left, written where the model's configuration says it, whatever it calls it.

Which number of a configuration is the length of which list of blocks is found by trying: the model is built
as shapes from a configuration with one number changed, and its lists are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from workbench.compress.pruning.surgery import own_config
from workbench.compress.pruning.surgery.rebuilding import built_from
from workbench.errors import CompressionError
from workbench.modules.experts import experts_in

if TYPE_CHECKING:
    from workbench.compress.core.context import Work
    from workbench.compress.pruning.options import Prune

WORDS = ("layer", "depth", "block")  # what names of depths are made of: these are tried first
PER_LAYER = ("layer", "block", "pattern")  # what names of lists with an entry a block are made of
FIRST_DENSE = ("first_k_dense_replace",)  # how many blocks at the beginning have no experts
LISTED = ("mlp_only_layers", "moe_layers")  # places of blocks, with experts or without
MOST = 12  # numbers of a configuration that are tried for one list

Path = tuple[str | int, ...]  # to a number: names of configurations within one another, then its own


def settle_depths(step: Prune, work: Work, kept: dict[str, list[int]], lengths: dict[str, int]) -> None:
    """Write into the model's own configuration, and where its modules keep it, which blocks of each list are
    left.

    kept: the places that stay, by list; lengths: how many there are now.

    Raises:
        CompressionError: nothing in the configuration says how long a list is, so that the model could be
            measured, but never exported.
    """
    shorter = {name: places for name, places in kept.items() if len(places) < lengths[name]}
    config = own_config(work)
    if config is None or not hasattr(config, "to_dict"):
        return
    said = dict(lengths)  # by the configuration, as far as it is written
    for name, places in shorter.items():
        key = "depth of blocks", name, lengths[name]
        (path,) = work.statistics.once(key, partial(find_path, work, config, name, places, said))
        said[name] = len(places)
        if path is None and lengths_of(built_from(work, config), [name]).get(name) != len(places):
            raise CompressionError(
                f"{step!r}: {type(work.model).__name__} could lose blocks of {name}, but never be exported"
                f" without them: no number of its configuration says how many of them there are"
            )
        if path is not None:
            write(config, path, places, lengths[name])
        holder = work.model.get_submodule(name.rpartition(".")[0])
        for own in ("n_layers", "num_layers"):
            if getattr(holder, own, None) == lengths[name]:
                setattr(holder, own, len(places))


def check_mixtures(step: Prune, work: Work) -> None:
    """Refuse blocks that leave in such an order that the configuration would build a dense block where one of
    experts is left, or the other way round.
    """
    if not experts_in(work.task.model):
        return
    built = built_from(work, own_config(work))
    if built is None:
        return
    odd = sorted(set(built.state_dict()) ^ set(work.model.state_dict()))
    if odd:
        raise CompressionError(
            f"{step!r}: {type(work.model).__name__} could lose these blocks, but never be exported without"
            f" them: its configuration cannot say which of those that are left have experts ({odd[0]})"
        )


def find_path(
    work: Work, config: Any, name: str, places: list[int], lengths: dict[str, int]
) -> tuple[Path | None]:
    """Return where a configuration says how long a list of blocks is, None if it does not, as one entry."""
    for path in list(paths(config, lengths[name]))[:MOST]:
        tried = copy.deepcopy(config)
        write(tried, path, places, lengths[name])
        found = lengths_of(built_from(work, tried), list(lengths))
        if found.get(name) == len(places) and all(
            found.get(other) == length for other, length in lengths.items() if other != name
        ):
            return (path,)
    return (None,)


def lengths_of(model: nn.Module | None, names: list[str]) -> dict[str, int]:
    """Return how long each list of modules is in a model."""
    if model is None:
        return {}
    modules = dict(model.named_modules())
    return {name: len(list(modules[name].children())) for name in names if name in modules}


def paths(config: Any, length: int) -> Iterator[Path]:
    """Yield the places of a configuration that hold a number, the likely ones first."""
    found = list(numbers(config, length))
    likely = [path for path in found if any(word in str(path).lower() for word in WORDS)]
    yield from likely
    yield from (path for path in found if path not in likely)


def numbers(config: Any, length: int, before: Path = ()) -> Iterator[Path]:
    """Yield the places of a configuration, and of those within it, that hold a number."""
    for key, value in vars(config).items():
        if key.startswith("_"):
            continue
        if type(value) is int and value == length:
            yield (*before, key)
        elif isinstance(value, list | tuple):
            yield from (
                (*before, key, place) for place, one in enumerate(value) if type(one) is int and one == length
            )
        elif hasattr(value, "to_dict"):
            yield from numbers(value, length, (*before, key))


def write(config: Any, path: Path, places: list[int], length: int) -> None:
    """Put the number of blocks that stay at a place of a configuration, and cut what it lists for each."""
    owner, steps = config, list(path)
    while len(steps) > 1 and hasattr(getattr(owner, str(steps[0])), "to_dict"):
        owner = getattr(owner, str(steps.pop(0)))
    for key, value in list(vars(owner).items()):
        listed = isinstance(value, list | tuple) and len(value) == length and not key.startswith("_")
        if listed and key != steps[0] and any(word in key for word in PER_LAYER):
            setattr(owner, key, type(value)(value[place] for place in places))
    cut_stages(owner, length, len(places))
    move_places(owner, places)
    name = str(steps[0])
    if len(steps) == 1:
        setattr(owner, name, len(places))
        return
    value = list(getattr(owner, name))
    value[int(steps[1])] = len(places)
    setattr(owner, name, type(getattr(owner, name))(value))


def move_places(config: Any, places: list[int]) -> None:
    """Bring what says by their places which blocks have experts in line with the blocks that stay."""
    for key in FIRST_DENSE:
        if type(value := vars(config).get(key)) is int:
            setattr(config, key, sum(place < value for place in places))
    for key in LISTED:
        if isinstance(value := vars(config).get(key), list):
            setattr(config, key, [places.index(place) for place in value if place in places])


def cut_stages(config: Any, length: int, left: int) -> None:
    """Cut the stages of a configuration that counts every block as one and names those that it shows."""
    names = getattr(config, "stage_names", None)
    if not names or len(names) != length + 1:  # and what comes before the blocks
        return
    shown, kept = list(config.out_features or []), list(names)[: left + 1]
    still = [name for name in shown if name in kept] or [kept[-1]]
    if names[-1] in shown and kept[-1] not in still:
        still.append(kept[-1])
    config.stage_names = kept
    vars(config)["_out_features"], vars(config)["_out_indices"] = still, [kept.index(name) for name in still]
