"""A page on which a circuit can be searched, cut and sorted; it opens without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html import escape
from string import Template
from typing import TYPE_CHECKING

from shared_kernels._checks import message

from pahq.drawing._edges import caption, edges_of
from pahq.drawing.svg import draw

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pahq.circuit import Circuit
    from pahq.drawing._edges import Edge

_STYLE = """
:root { --ink: #1c2126; --soft: #5b6670; --paper: #fbfbf9; --card: #ffffff; --line: #d5d9dc;
  --mark: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaec; --soft: #9aa5ae; --paper: #0f1214;
  --card: #14181b; --line: #394249; --mark: #f59763; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem 1.2rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.2rem; margin: 0 0 .8rem; } h2 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
main { display: grid; grid-template-columns: minmax(0, 1fr) minmax(20rem, 27rem); gap: 1.2rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; }
.picture { overflow: auto; max-height: 94vh; } .picture svg { display: block; margin: auto; }
.side { position: sticky; top: 1rem; max-height: 94vh; display: flex; flex-direction: column; }
@media (max-width: 60rem) { main { grid-template-columns: minmax(0, 1fr); }
  .side { position: static; } .picture { max-height: none; } }
label { display: block; margin-bottom: .6rem; color: var(--soft); }
input { display: block; width: 100%; font: inherit; color: inherit; background: var(--paper); }
input[type=search] { border: 1px solid var(--line); border-radius: 6px; padding: .3rem .5rem; }
output { color: var(--ink); font-variant-numeric: tabular-nums; }
#said { min-height: 1.6em; font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.scroll { overflow: auto; min-height: 9rem; max-height: 30rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible {
  outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.prompt { white-space: pre-wrap; }
#rows tr { cursor: pointer; } #rows tr.marked { outline: 2px solid var(--mark);
  outline-offset: -2px; }
.pahq .edges path { cursor: pointer; } .pahq .node { cursor: pointer; }
.pahq .edges path.gone { display: none; }
.pahq .edges path.marked { stroke: var(--mark); stroke-opacity: 1; stroke-width: 5; }
"""

_SCRIPT = """
"use strict";
(() => {
  const edges = JSON.parse(document.getElementById("edges").textContent);
  const paths = [...document.querySelectorAll(".pahq .edges path")];
  const nodes = [...document.querySelectorAll(".pahq .node")];
  const body = document.getElementById("rows"), said = document.getElementById("said");
  const slider = document.getElementById("least"), search = document.getElementById("node");
  const picture = document.querySelector(".picture");
  const steps = [...new Set(edges.map(e => Math.abs(e[3] ?? 0)))].sort((a, b) => a - b);
  const shown = s => s === null ? "not tested"
    : (s < 0 ? "" : "+") + Number(s.toPrecision(4));
  const place = new Map(paths.map((path, i) => [path, i]));
  const rows = edges.map((edge, i) => {
    const row = document.createElement("tr");
    row.tabIndex = 0;
    for (const [text, name] of [[edge[0], ""], [edge[2], ""], [shown(edge[3]), "number"]]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      cell.className = name;
      row.append(cell);
    }
    row.addEventListener("mouseenter", () => mark(i));
    row.addEventListener("mouseleave", () => mark(pinned));
    row.addEventListener("click", () => pin(i));
    row.addEventListener("keydown", event => { if (event.key === "Enter") pin(i); });
    return row;
  });
  const ends = edges.map(e => e[0].split("->").map(end => end.split("<")[0]));
  let marked = -1, pinned = -1, order = edges.map((_, i) => i), visible = [];

  function mark(i) {
    for (const item of [paths[marked], rows[marked]]) item?.classList.remove("marked");
    marked = i;
    for (const item of [paths[i], rows[i]]) item?.classList.add("marked");
    said.textContent = i < 0 ? "Point at an edge, or click to keep it."
      : edges[i][0] + ": " + shown(edges[i][3]);
  }
  function pin(i) {
    pinned = i === pinned ? -1 : i;
    mark(pinned);
  }
  function list() {
    body.replaceChildren(...order.filter(i => visible[i]).map(i => rows[i]));
  }
  function choose() {
    const least = steps[slider.value] ?? 0, wanted = search.value.trim().toLowerCase();
    const names = new Set(nodes.map(node => node.dataset.node));
    const hit = name => !wanted || (names.has(wanted) ? name === wanted : name.includes(wanted));
    visible = edges.map((edge, i) => Math.abs(edge[3] ?? 0) >= least && ends[i].some(hit));
    const on = new Set();
    paths.forEach((path, i) => {
      path.classList.toggle("gone", !visible[i]);
      if (visible[i]) ends[i].forEach(name => on.add(name));
    });
    nodes.forEach(node => node.classList.toggle("on", on.has(node.dataset.node)));
    const count = visible.filter(Boolean).length;
    document.getElementById("chosen").textContent =
      Number(least.toPrecision(4)) + " (" + count + " of " + edges.length + " edges)";
    list();
  }
  const keys = [e => e[0], e => e[2], e => e[3], e => e[3] === null ? null : Math.abs(e[3])];
  function sort(column, down) {
    const key = keys[column], sign = down ? -1 : 1;
    order.sort((a, b) => {
      const x = key(edges[a]), y = key(edges[b]);
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "string"
        ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
    document.querySelectorAll("#table th").forEach((head, i) => head.setAttribute("aria-sort",
      i === Math.min(column, 2) ? (down ? "descending" : "ascending") : "none"));
    list();
  }
  let by = 3, down = true;
  document.querySelectorAll("#table th button").forEach((button, i) => {
    button.addEventListener("click", () => {
      // effects: by size, downward, upward, then with their sign
      if (i === 2 && by === 3 && !down) [by, down] = [2, true];
      else if (i === Math.min(by, 2)) [by, down] = by === 2 && !down ? [3, true] : [by, !down];
      else [by, down] = i === 2 ? [3, true] : [i, false];
      sort(by, down);
    });
  });
  // thin lines are hard to hit: look around the pointer, too
  function near(event) {
    for (const [x, y] of [[0, 0], [0, 2], [0, -2], [2, 0], [-2, 0], [3, 3], [-3, 3], [3, -3],
                          [-3, -3]]) {
      const found = document.elementFromPoint?.(event.clientX + x, event.clientY + y);
      if (place.has(found)) return place.get(found);
    }
    return place.get(event.target) ?? -1;
  }
  picture.addEventListener("mousemove", event => {
    const i = near(event);
    mark(i < 0 ? pinned : i);
  });
  picture.addEventListener("mouseleave", () => mark(pinned));
  picture.addEventListener("click", event => {
    const node = event.target.closest(".node"), i = near(event);
    if (node) {
      search.value = search.value === node.dataset.node ? "" : node.dataset.node;
      choose();
    } else if (i >= 0) {
      pin(i);
      if (pinned >= 0) rows[i].scrollIntoView?.({ block: "nearest" });
    }
  });
  slider.max = Math.max(0, steps.length - 1);
  slider.addEventListener("input", choose);
  search.addEventListener("input", choose);
  visible = edges.map(() => true);
  sort(by, down);
  choose();
  mark(-1);
})();
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'sha256-$digest'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<noscript><p>Search and table need JavaScript; the picture does not.</p></noscript>
<main>
<div class="card picture">$picture</div>
<div class="card side">
<label>Absolute effect of at least <output id="chosen"></output>
<input type="range" id="least" min="0" max="0" value="0" step="1"></label>
<label>Node <input type="search" id="node" list="nodes" placeholder="a3.h2, m0, logits"></label>
<datalist id="nodes">$nodes</datalist>
<div id="said" role="status"></div>
<div class="scroll"><table id="table">
<thead><tr><th><button type="button">edge</button></th><th><button type="button">into</button></th>
<th><button type="button">effect</button></th></tr></thead>
<tbody id="rows"></tbody>
</table></div>
</div>
</main>
$prompts
<section class="card">
<h2>How it was found</h2>
<table><tbody>$provenance</tbody></table>
<p>An effect is what the removal of an edge added to the metric, which is to be kept low. Edges that
were not tested have none, and go first when the slider is moved.</p>
</section>
<script type="application/json" id="edges">$edges</script>
<script>$script</script>
</body>
</html>
""")

_INTO = {"q": "query", "k": "key", "v": "value"}


def to_html(circuit: Circuit, *, task_texts: Iterable[Sequence[str]] | None = None) -> str:
    """Return a page of a circuit that needs nothing else, about 0.2 kB for each edge.

    It has the picture, a slider for the smallest absolute effect, a search for a node, names and
    effects of edges that are pointed at or clicked, a table of edges to sort, prompts, and how the
    circuit was found. It follows light and dark mode, loads nothing, and runs its own script only:
    all text is escaped, and a policy in the page forbids the rest.

    Args:
        circuit: Any.
        task_texts: Clean and corrupted prompt of each pair, such as
            ``zip(task.meta["clean"], task.meta["corrupted"])``.

    Raises:
        ValueError: An entry of ``task_texts`` that is not two texts.
    """
    edges = edges_of(circuit)
    digest = hashlib.sha256(_SCRIPT.encode()).digest()
    return _PAGE.substitute(
        digest=base64.b64encode(digest).decode(),
        title=escape(caption(circuit)),
        style=_STYLE,
        picture=draw(circuit, edges, titles=False),
        nodes="".join(f'<option value="{name}"></option>' for name in _nodes(circuit)),
        prompts=_prompts(task_texts),
        provenance="".join(
            f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
            for key, value in circuit.provenance.items()
        ),
        edges=_data(edges),
        script=_SCRIPT,
    )


def _nodes(circuit: Circuit) -> list[str]:
    graph = circuit.graph
    shared = {name.split("<")[0] for name in graph.receiver_names} - set(graph.sender_names)
    return [*graph.sender_names, *sorted(shared)]


def _data(edges: Sequence[Edge]) -> str:
    """Return name, sender's name, what it goes into and effect of each edge, as JSON."""
    rows = []
    for edge in edges:
        target = edge.name.split("->")[1]
        into = _INTO.get(edge.kind, "logits" if target == "logits" else "MLP")
        score = float(f"{edge.score:.6g}") if math.isfinite(edge.score) else None
        rows.append([edge.name, edge.name.split("->")[0], into, score])
    # so that no text can end the script that holds it
    return json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c")


def _prompts(texts: Iterable[Sequence[str]] | None) -> str:
    if texts is None:
        return ""
    rows = []
    for number, pair in enumerate(texts):
        good = not isinstance(pair, str) and len(pair) == 2
        if not good or not all(isinstance(text, str) for text in pair):
            remedy = 'such as zip(task.meta["clean"], task.meta["corrupted"])'
            raise ValueError(message(f"task_texts[{number}]", "a pair of texts", pair, remedy))
        cells = "".join(f'<td class="prompt">{escape(text)}</td>' for text in pair)
        rows.append(f"<tr>{cells}</tr>")
    head = "<tr><th>clean</th><th>corrupted</th></tr>"
    return (
        '<section class="card"><h2>Prompts</h2><div class="scroll"><table>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )
