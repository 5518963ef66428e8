"""The table of kinds of task, read from the registry: for the command line."""

from __future__ import annotations

from workbench.tasks.registry import KINDS

COLUMNS = ("kind", "models", "quality", "KL divergence of", "changed answers", "shown as", "data")


def kind_rows() -> list[dict[str, str]]:
    """Return one row for each registered kind of task: how its models are told, and what is known of it."""
    return [
        dict(
            zip(
                COLUMNS,
                (
                    kind.name,
                    ", ".join(f"...{ending}" for ending in kind.architectures),
                    kind.primary,
                    kind.distribution or "none",
                    {"answers": "each answer", None: "not told apart"}.get(
                        kind.flips_by, f"order by {kind.flips_by}"
                    ),
                    kind.behaviour or "not shown",
                    ", ".join(dict.fromkeys((*kind.default_data, *kind.data_names))) or "to be named",
                ),
                strict=True,
            )
        )
        for kind in KINDS
    ]
