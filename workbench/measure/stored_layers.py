"""What happened to each layer of a point, read from the ledger's text when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, overload

from pydantic import ConfigDict, PlainSerializer, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator

from workbench.compress.core.layer_report import LayerReport

Reports = tuple[LayerReport, ...]


class StoredLayers(Sequence[LayerReport]):
    """The layers of a stored point: to a reader a tuple of reports, made of its text when first looked at.

    With thousands of points their layers are most of the text, and reading them most of the time and memory.
    """

    __slots__ = ("_reports", "text")

    def __init__(self, text: str) -> None:
        """Read nothing yet.

        Args:
            text: a list of layers as JSON.

        """
        self.text = text
        self._reports: Reports | None = None

    @property
    def unread(self) -> bool:
        """Return whether nobody has looked yet."""
        return self._reports is None

    @property
    def reports(self) -> Reports:
        """Return the reports, read once; raises `pydantic.ValidationError` if the text holds none."""
        if self._reports is None:
            self._reports = reports_adapter().validate_json(self.text)
        return self._reports

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self.reports)

    def __iter__(self) -> Iterator[LayerReport]:
        """Iterate over the reports in the order of the model."""
        return iter(self.reports)

    @overload
    def __getitem__(self, index: int) -> LayerReport: ...

    @overload
    def __getitem__(self, index: slice) -> Reports: ...

    def __getitem__(self, index: int | slice) -> LayerReport | Reports:
        """Return one report, or a tuple of several."""
        return self.reports[index]

    def __eq__(self, other: object) -> bool:
        """Return whether the reports are the same, whether or not the others were stored."""
        if isinstance(other, StoredLayers):
            return self.reports == other.reports
        return self.reports == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        """Return the hash of the tuple that it is equal to."""
        return hash(self.reports)

    def __repr__(self) -> str:
        """Return the reports."""
        return repr(self.reports)


def unread_or_checked(value: object, check: ValidatorFunctionWrapHandler) -> Sequence[LayerReport]:
    """Return layers as a point holds them: stored ones as they are, others as a tuple."""
    return value if isinstance(value, StoredLayers) else tuple(check(value))


Layers = Annotated[Sequence[LayerReport], WrapValidator(unread_or_checked), PlainSerializer(tuple)]


def layers_text(layers: Sequence[LayerReport]) -> str:
    """Return layers as JSON, stored ones as they were stored."""
    return (
        layers.text
        if isinstance(layers, StoredLayers)
        else reports_adapter().dump_json(tuple(layers)).decode()
    )


@cache
def reports_adapter() -> TypeAdapter[Reports]:
    """Return the adapter that reads and writes reports (built on first use, so that importing stays free)."""
    return TypeAdapter(Reports, config=ConfigDict(ser_json_inf_nan="constants"))
