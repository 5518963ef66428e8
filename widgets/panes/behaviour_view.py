"""What the compressed model now answers differently: pictures, classes, confusion, or texts side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from html import escape

import ipywidgets as ipw
from PIL import Image
from torch import Tensor

from widgets.session.session import Session
from widgets.session.state import PanelState
from widgets.session.worker import Stale
from workbench.bench import Bench
from workbench.measure.behaviour import Behaviour, Continuation, Flip
from workbench.recipe import Recipe
from workbench.tasks.base import Items, Kind

MOST = 24  # pictures shown


class BehaviourView(ipw.VBox):
    """A button and what it finds.

    Comparing answers takes as long as one evaluation, so it runs when asked.
    """

    def __init__(
        self,
        session: Session,
        *,
        guarded: Callable[[Callable[[], None]], None],
        post: Callable[[str, Callable[[], None]], None],
    ) -> None:
        """Start with the button.

        Args:
            session: whose models are compared.
            guarded: runs an action and shows what it raises in the panel.
            post: takes a slot and a drawing, to be done by the thread that draws.

        """
        self.session, self.post = session, post
        self.button = ipw.Button(
            description="show what changed",
            tooltip="compare the answers of the dense and the compressed model, item by item",
            layout=ipw.Layout(width="auto", align_self="flex-start"),
        )
        self.button.on_click(lambda _: guarded(self.ask))
        self.body = ipw.HTML(
            "<p class='wb-dim'>Equal accuracy can hide many changed answers: look at them here.</p>"
        )
        self.body.add_class("wb-table")
        super().__init__([self.button, self.body])

    def show(self, _state: PanelState) -> None:
        """Keep what was found until it is asked for anew."""

    def ask(self) -> None:
        """Compare the answers of both models, behind the panel; raises as `Session.ask`."""
        recipe = self.session.state.recipe

        def work(bench: Bench, stale: Stale) -> Iterator[str]:
            if bench.task.kind.behaviour is None:
                yield not_shown_html(bench.task.kind)
                return
            changed = bench.behaviour(recipe, compressed=self.session.compressed, cancelled=stale)
            if isinstance(changed, Behaviour):
                yield classes_html(recipe.label(), changed, bench.task.evaluation)
            else:
                yield texts_html(recipe.label(), changed)

        def draw(html: str) -> None:
            self.body.value = html

        self.session.ask(work, lambda html: self.post("behaviour", lambda: draw(html)))
        self.body.value = "<p class='wb-dim'>comparing item by item ...</p>"


def classes_html(label: str, record: Behaviour, items: Items) -> str:
    """Return changed items with their pictures, the change of each class, and both confusion tables."""
    changed, kl = len(record.flips), record.kl
    head = (
        f"<p><b>{escape(label)}</b>: {changed:,} of {record.items:,} answers changed"
        f" ({changed / record.items:.1%}); KL to the dense model {kl.value:.4f} nats"
        f" ({kl.low:.4f} to {kl.high:.4f})</p>"
    )
    pixels = items.inputs.get("pixel_values")
    cards = "".join(card(flip, None if pixels is None else pixels[flip.item]) for flip in record.flips[:MOST])
    more = f"<p class='wb-dim'>The {MOST} most changed of {changed:,}.</p>" if changed > MOST else ""
    names = [change.name for change in record.classes]
    tables = (
        f"<div class='wb-side'>{confusion_html('dense', names, record.dense_confusion)}"
        f"{confusion_html('compressed', names, record.confusion)}</div>"
    )
    return f"{head}<div class='wb-flips'>{cards}</div>{more}{changes_html(record)}{tables}"


def card(flip: Flip, pixels: Tensor | None) -> str:
    """Return one changed item: its picture, what it is, what each model says."""
    picture = "" if pixels is None else f"<img alt='item {flip.item}' src='{picture_uri(pixels)}'>"
    mark = "wb-lost" if flip.dense == flip.label else "wb-won" if flip.compressed == flip.label else ""
    answers = (
        f"<b>{escape(flip.label)}</b>{escape(flip.dense)} \N{RIGHTWARDS ARROW} {escape(flip.compressed)}"
    )
    about = f"item {flip.item}, KL {flip.kl:.2f} nats"
    return f"<div class='wb-flip {mark}' title='{about}'>{picture}<span>{answers}</span></div>"


def picture_uri(pixels: Tensor) -> str:
    """Return an image [C, H, W], whatever its normalisation, as a PNG data URI."""
    spread = float(pixels.max() - pixels.min()) or 1.0
    grey = ((pixels - pixels.min()) / spread * 255).byte().cpu()
    channels = grey.permute(1, 2, 0).contiguous() if len(grey) == 3 else grey[0]
    image = Image.fromarray(channels.numpy())
    if image.height > 96:
        image.thumbnail((96, 96))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def changes_html(record: Behaviour) -> str:
    """Return one row a class, the worst change first."""
    rows = "".join(
        f"<tr><td>{escape(c.name)}</td><td>{c.items:,}</td><td>{c.dense:.1%}</td><td>{c.compressed:.1%}</td>"
        f"<td>{100 * c.change.value:+.1f} points"
        f" ({100 * c.change.low:+.1f} to {100 * c.change.high:+.1f})</td></tr>"
        for c in sorted(record.classes, key=lambda c: c.change.value)
    )
    heads = "".join(f"<th>{name}</th>" for name in ("class", "items", "dense", "compressed", "paired change"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def confusion_html(title: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return a confusion table, cells shaded by their share of the row; rows are labels, columns answers."""
    heads = "".join(f"<th title='{escape(name)}'>{escape(name[:4])}</th>" for name in names)
    body = ""
    for name, row in zip(names, counts, strict=True):
        total = sum(row) or 1
        cells = "".join(
            f"<td style='background:rgba(59,130,246,{0.6 * value / total:.2f})'>{value or ''}</td>"
            for value in row
        )
        body += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return f"<table><thead><tr><th>{escape(title)}</th>{heads}</tr></thead><tbody>{body}</tbody></table>"


def texts_html(label: str, records: Sequence[Continuation]) -> str:
    """Return the texts given to both models, with their answers side by side."""
    rows = "".join(
        f"<tr><td>{escape(r.prompt)}</td><td>{escape(r.dense)}</td><td>{escape(r.compressed)}</td></tr>"
        for r in records
    )
    heads = "<th>given</th><th>dense</th><th>compressed</th>"
    table = f"<table class='wb-texts'><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<p><b>{escape(label)}</b></p>{table}"


def not_shown_html(kind: Kind) -> str:
    """Return that what changed is not shown, and why."""
    return f"<p>What changed is not shown: {escape(kind.name)} does not say how it could be.</p>"


def answers_html(bench: Bench, recipe: Recipe) -> str:
    """Return both models' answers in words, or where they are shown instead, or why they are not."""
    kind = bench.task.kind
    if kind.behaviour is None:
        return not_shown_html(kind)
    changed = () if kind.behaviour == "classes" else bench.behaviour(recipe)
    if isinstance(changed, Behaviour) or kind.behaviour == "classes":
        return (
            "<p>Shown for models that answer in words; the panel shows a classifier's changed answers as"
            " pictures.</p>"
        )
    return texts_html(recipe.label(), changed)
