"""What happened to each layer of a point, read from the ledger's text when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, overload

from pydantic import TypeAdapter, ValidationInfo, ValidatorFunctionWrapHandler, WrapSerializer, WrapValidator
from pydantic_core import from_json

from workbench.compress.core.layer_report import LayerReport

Reports = tuple[LayerReport, ...]


class StoredLayers(Sequence[LayerReport]):
    """The layers of a stored point: to a reader a tuple of reports, made of its text when first looked at.

    With thousands of points their layers are most of the text, and reading them most of the time and memory.
    """

    __slots__ = ("_reports", "_text")

    def __init__(self, text: str | bytes) -> None:
        """Read nothing yet.

        Args:
            text: a list of layers as JSON; bytes where it stands, escaped, within a string of JSON.

        """
        self._text = text
        self._reports: Reports | None = None

    def read(self) -> Reports:
        """Return the reports of the text, which are not kept.

        Raises:
            pydantic.ValidationError: the text holds no layers.

        """
        text = self._text if isinstance(self._text, str) else str(from_json(b'"' + self._text + b'"'))
        return reports_adapter().validate_json(text)

    @property
    def unread(self) -> bool:
        """Return whether nobody has looked yet."""
        return self._reports is None

    @property
    def reports(self) -> Reports:
        """Return the reports, read once."""
        if self._reports is None:
            self._reports = self.read()
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


def validated(
    value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
) -> Sequence[LayerReport]:
    """Return layers as a point holds them: as they are where they are stored or wait beside the text that is
    read (its `context`), else as a tuple.
    """
    if isinstance(value, StoredLayers):
        return value
    return info.context if isinstance(info.context, StoredLayers) else tuple(validate(value))


Layers = Annotated[
    Sequence[LayerReport],
    WrapValidator(validated),
    WrapSerializer(lambda value, write: write(value.read() if isinstance(value, StoredLayers) else value)),
]


@cache
def reports_adapter() -> TypeAdapter[Reports]:
    """Return what reads them (built on first use, so that importing stays free)."""
    return TypeAdapter(Reports)
