"""Every error the workbench raises on purpose: one base class, so that a caller can catch all or one kind."""

from __future__ import annotations

# What libraries raise where a module, its inputs and the numbers of a model's files do not fit together
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class WorkbenchError(Exception):
    """Base of all errors below; its message is one line that a user can act on."""

    exit_code = 1  # of the command: 1 where it failed, 2 where what it was given cannot be meant


class RecipeError(WorkbenchError, ValueError):
    """A recipe or one of its options is out of range, unknown, or in an order that cannot work."""

    exit_code = 2


class ModelError(WorkbenchError):
    """A model is unknown, missing, damaged, unsafe to load, or not of a kind that the workbench can run."""


class DataError(WorkbenchError):
    """Data are missing, do not fit the task, are too few, or overlap where they must not."""


class CompressionError(WorkbenchError):
    """A step could not be applied to this model: no layer can take it, or its numbers are not finite."""


class LayerSkipped(CompressionError):  # noqa: N818  says what happened
    """One layer cannot take a step, for a reason of its own: the step is done without it, and the report says
    why.
    """

    def __init__(self, name: str, reason: str) -> None:
        """Name the layer and say why, such as `it receives no input during calibration`."""
        super().__init__(f"layer {name!r}: {reason}")
        self.layers = {name: reason}

    @classmethod
    def of_all(cls, layers: dict[str, str]) -> LayerSkipped:
        """Return one refusal of several layers: reasons by name, at least one."""
        refusal = cls(*next(iter(layers.items())))
        refusal.layers = dict(layers)
        return refusal


class BrokenPromiseError(WorkbenchError):
    """A tensor no longer has the property that a step promised (mask, rank, grid): a defect of the
    workbench.
    """


class LedgerError(WorkbenchError):
    """The ledger cannot be opened, read or written."""


class ExportError(WorkbenchError):
    """An export cannot be written or read back."""


class DeviceError(WorkbenchError):
    """The device asked for is not here."""


class DeviceNameError(DeviceError):
    """What was asked for is no device."""

    exit_code = 2


class RuntimeRefused(WorkbenchError):  # noqa: N818  says what happened
    """A runtime or kernel was asked for by name that cannot run this model here."""


class Cancelled(WorkbenchError):  # noqa: N818  not a failure: the user asked for it
    """The user cancelled; nothing measured before is lost."""


class GateFailed(WorkbenchError):  # noqa: N818  reads as the verdict it is
    """A report's gate did not hold."""

    def _render_traceback_(self) -> list[str]:
        """Show one line instead of a traceback in a notebook (an IPython convention)."""
        return [f"GateFailed: {self}"]
