"""A heat map of layers that is a table: text that scales, rows to click, arrow keys, sorting by a column.

It is a small anywidget because a plotly heat map weighs 5 MB a piece, and its cells are pixels to a screen
reader.
"""

from __future__ import annotations

from typing import Any, ClassVar

import anywidget
import traitlets

from widgets.panes.layer_rows import LayerTable

SCRIPT = """
function make(tag, parent, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function render({ model, el }) {
  let by = "", down = true, order = [];
  const box = make("div", el, "wb-grid");
  const table = make("table", box);
  table.tabIndex = 0;
  table.setAttribute("aria-label", "layers; arrow keys choose one");
  const head = make("tr", make("thead", table)), body = make("tbody", table);

  function heads() {
    head.replaceChildren();
    [["layer", "in the order of the model"], ...model.get("columns")].forEach(([name, about], index) => {
      const cell = make("th", head);
      cell.scope = "col";
      const button = make("button", cell, "", name);
      button.title = index ? `${about}; a click sorts` : about;
      if (index && name === by) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      button.onclick = () => { down = name === by ? !down : true; by = index ? name : ""; draw(); };
    });
    make("th", head, "wb-what", "what happened").scope = "col";
  }

  function sorted() {
    const rows = [...model.get("rows")], sign = down ? -1 : 1;
    const at = model.get("columns").findIndex(c => c[0] === by);
    if (at < 0) return rows;
    const known = rows.filter(r => r.cells[at].value !== null);
    const rest = rows.filter(r => r.cells[at].value === null);
    return [...known.sort((a, b) => sign * (a.cells[at].value - b.cells[at].value)), ...rest];
  }

  function field(row, cell) {
    const node = make("td", row);
    if (cell.about) node.title = cell.about;
    const heat = Math.max(0, Math.min(1, cell.heat ?? 0));
    if (cell.heat !== null) node.style.setProperty("--heat", `${Math.round(68 * heat)}%`);
    if (cell.heat !== null) node.className = "wb-heat";
    if (cell.bar) {
      const [low, value, high, zero] = cell.bar.map(x => `${(100 * x).toFixed(2)}%`);
      const track = make("div", node, "wb-track");
      make("i", track, "wb-zero").style.left = zero;
      Object.assign(make("i", track, "wb-span").style, { left: low, width: `calc(${high} - ${low})` });
      make("i", track, "wb-dot").style.left = value;
    }
    make("span", node, "", cell.text);
  }

  function draw() {
    heads();
    const rows = sorted();
    order = rows.map(row => row.name);
    body.replaceChildren();
    for (const row of rows) {
      const line = make("tr", body);
      line.dataset.name = row.name;
      const name = make("th", line);
      make("bdi", name, "", row.short);
      name.scope = "row";
      name.title = row.name;
      row.cells.forEach(cell => field(line, cell));
      make("td", line, "wb-what", row.words).title = row.words;
      line.onclick = () => choose(row.name);
    }
    mark(false);
  }

  function choose(name) { model.set("chosen", name); model.save_changes(); }

  function mark(scroll) {
    for (const line of body.children) {
      const mine = line.dataset.name === model.get("chosen");
      line.setAttribute("aria-selected", mine);
      if (mine && scroll) {
        const top = line.offsetTop - head.offsetHeight, bottom = line.offsetTop + line.offsetHeight;
        if (top < box.scrollTop) box.scrollTop = top;
        else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
      }
    }
  }

  table.onkeydown = event => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.target !== table || !order.length) return;
    event.preventDefault();
    event.stopPropagation();
    const index = order.indexOf(model.get("chosen"));
    choose(order[index < 0 ? 0 : Math.max(0, Math.min(order.length - 1, index + step))]);
  };
  const marked = () => mark(true);
  model.on("change:rows", draw);
  model.on("change:chosen", marked);
  draw();
  return () => { model.off("change:rows", draw); model.off("change:chosen", marked); };
}
export default { render };
"""


class LayerGrid(anywidget.AnyWidget):
    """Rows of layers. `chosen` is the full name of the one that was clicked, empty at first."""

    _esm: ClassVar[str] = SCRIPT
    columns = traitlets.List(traitlets.List(traitlets.Unicode())).tag(sync=True)
    rows = traitlets.List(traitlets.Dict()).tag(sync=True)
    chosen = traitlets.Unicode().tag(sync=True)

    def show(self, table: LayerTable) -> None:
        """Show a table; the same one is not sent again."""
        rows: list[dict[str, Any]] = [row.plain() for row in table.rows]
        with self.hold_sync():
            self.columns = [list(column) for column in table.columns]
            self.rows = rows
