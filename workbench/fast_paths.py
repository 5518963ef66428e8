"""Every fast path by name: what it makes faster, and whether it is on here or why not."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.calibration.disk_cache import ON_DISK
from workbench.calibration.passes import ONE_PRODUCT
from workbench.kernels.column_solver import COLUMNS
from workbench.kernels.losses import LOSSES
from workbench.kernels.weight_trials import WEIGHT_PASSES
from workbench.ledger.journal import JOURNAL
from workbench.measure.evaluation.block_chain import PREFIX
from workbench.measure.evaluation.chunked_head import CHUNKED_HEAD
from workbench.measure.evaluation.cuda_graphs import GRAPHS
from workbench.measure.evaluation.fused_blocks import FUSED
from workbench.measure.evaluation.length_sorting import BY_LENGTH
from workbench.modules.sharing import SHARED_COPIES
from workbench.util.device import pick
from workbench.util.fast_path import FastPath
from workbench.util.library_internals import LIVE_PLOT, lacks

PLOT = FastPath(
    "live plot",
    "dragging a slider: the page is sent what changed, and shows it again when it is reloaded",
    lambda _device: lacks(LIVE_PLOT),
)
FAST_PATHS = (
    SHARED_COPIES,
    WEIGHT_PASSES,
    COLUMNS,
    ONE_PRODUCT,
    ON_DISK,
    LOSSES,
    CHUNKED_HEAD,
    PREFIX,
    BY_LENGTH,
    GRAPHS,
    FUSED,
    JOURNAL,
    PLOT,
)


@dataclass(frozen=True)
class PathState:
    """A fast path on one device; `off` says why it is off, "" if it is on."""

    name: str
    speeds_up: str
    off: str


def fast_paths(device: str) -> list[PathState]:
    """Return every fast path on a device such as "cpu" or "cuda:0", asked and tried now; raises as `pick`.

    The kernels that run compressed models are listed by `workbench.runtime.runtime_table.runtime_rows`.
    """
    place = pick(device)
    return [PathState(path.name, path.speeds_up, path.check(place)) for path in FAST_PATHS]
