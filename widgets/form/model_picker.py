"""What to compress, on which data, on which device: the head of the panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as ipw
import traitlets

from widgets.session.model_choice import ModelChoice
from workbench.tasks.registry import KINDS
from workbench.tasks.sources import NAMES
from workbench.util.device import choices as devices
from workbench.zoo import CatalogueEntry, models

OTHER = "other: hub id or folder"


class ModelPicker(ipw.VBox):
    """Controls of a `ModelChoice`; `choice` changes only when the user has picked something else.

    What loads another model takes long, so text counts on Enter only. `busy` shows that something loads, with
    a button that gives it up; `put` shows a choice without reacting.
    """

    choice = traitlets.Instance(ModelChoice)

    def __init__(self, choice: ModelChoice) -> None:
        """Make the controls, and put a choice into them."""
        self.hold = False
        self.entries = {entry.name: entry for entry in models()}
        self.model = ipw.Dropdown(
            options=[*self.entries, OTHER],
            description="model",
            tooltip="the model to compress; another one loads while this one stays usable",
        )
        self.device = ipw.Dropdown(
            options=devices(), description="device", tooltip="where models run and are timed"
        )
        self.more = ipw.ToggleButton(
            description="more", icon="sliders", tooltip="another model, the data, how many items"
        )
        typed = {"continuous_update": False, "ensure_option": False}
        self.other = ipw.Combobox(
            description="hub id or folder",
            placeholder="owner/name or ./folder, then Enter",
            options=local_folders(Path()),
            tooltip="a model of the hub, or a folder with config.json; Enter loads it",
            **typed,
        )
        self.data = ipw.Combobox(
            description="data",
            placeholder="the model's own",
            tooltip=(
                "data by name, a hub data set as owner/name, a file, or a folder of images or sound; empty is"
                " the model's own; Enter loads it"
            ),
            **typed,
        )
        self.items = ipw.BoundedIntText(
            min=0,
            max=10_000_000,
            description="items",
            continuous_update=False,
            tooltip="evaluate at most so many items; 0 is the task's default",
        )
        self.words = ipw.HTML()
        self.stop = ipw.Button(description="stop loading", tooltip="give up; the model that is there stays")
        self.loading = ipw.HBox([self.words, self.stop], layout=ipw.Layout(display="none"))
        self.fold = ipw.HBox([self.other, self.data, self.items], layout=ipw.Layout(display="none"))
        self.row = ipw.HBox([self.model, self.device, self.more])
        for name, widget in {
            "wb-pick": self.row,
            "wb-fold": self.fold,
            "wb-loading": self.loading,
            "wb-more": self.more,
            "wb-stop": self.stop,
        }.items():
            widget.add_class(name)
        self.put(choice)
        super().__init__([self.row, self.fold])
        self.add_class("wb-picker")
        self.more.observe(lambda _: self.unfold(), "value")
        for control in (self.model, self.device, self.other, self.data, self.items):
            control.observe(self.picked, "value")

    def unfold(self) -> None:
        """Show or hide the controls that are used less."""
        self.fold.layout.display = None if self.more.value else "none"

    def picked(self, change: dict[str, Any]) -> None:
        """React to a control; data belong to a model, so another model starts with its own."""
        if self.hold:
            return
        if change["owner"] is self.model and self.model.value == OTHER and not self.other.value.strip():
            self.more.value = True  # there the name is typed
            return
        if change["owner"] is self.other:
            self.hold = True
            self.model.value = OTHER if self.other.value.strip() else self.model.value
            self.hold = False
        wanted = self.described(keep_data=change["owner"] not in (self.model, self.other))
        if wanted != self.choice:
            self.put(wanted)

    def described(self, *, keep_data: bool = True) -> ModelChoice:
        """Return the choice that the controls say."""
        model = self.other.value.strip() if self.model.value == OTHER else self.model.value
        device = None if self.device.value == "auto" else self.device.value
        data = (self.data.value.strip() or None) if keep_data else None
        return ModelChoice(model, data, device, self.items.value or None)

    def put(self, choice: ModelChoice) -> None:
        """Show a choice; loads nothing by itself (whoever observes `choice` may)."""
        self.hold = True
        try:
            listed = choice.name in self.entries
            self.model.value = choice.name if listed else OTHER
            self.other.value = "" if listed else choice.name
            if choice.device is not None and choice.device not in [value for _, value in self.device.options]:
                # Whether it is here, loading says
                self.device.options = [*self.device.options, (choice.device, choice.device)]
            self.device.value = choice.device or "auto"
            self.data.options = data_names(self.entries.get(choice.name))
            self.data.value = choice.data or ""
            self.items.value = choice.evaluation_items or 0
        finally:
            self.hold = False
        if not listed or choice.data or choice.evaluation_items:
            self.more.value = True
            self.fold.layout.display = None
        self.choice = choice

    def busy(self, text: str) -> None:
        """Show that something loads and how far it is; "" when nothing does. `text` is HTML."""
        self.loading.layout.display = None if text else "none"
        running = f"<span role='status'><i class='wb-running' aria-hidden='true'></i>{text}</span>"
        self.words.value = running if text else ""


def data_names(entry: CatalogueEntry | None) -> tuple[str, ...]:
    """Return the data that can be named for a model: those of its kind of task, all where that is unknown."""
    return NAMES if entry is None else KINDS[entry.task].data_names


def local_folders(start: Path, most: int = 50) -> tuple[str, ...]:
    """Return folders with a model in them, at most two levels below `start`."""
    folders = [
        path.parent
        for pattern in ("*/config.json", "*/*/config.json")
        for path in sorted(start.glob(pattern))
        if any(path.parent.glob("*.safetensors"))
    ]
    return tuple(f"./{path.as_posix()}" for path in folders[:most])
