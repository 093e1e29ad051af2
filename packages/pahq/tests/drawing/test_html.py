"""The page: well-formed, complete, small, and no text of others can become markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from pahq import Circuit, Graph
from pahq.drawing import to_html

GRAPH = Graph(3, 4, 2)
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & $edges </script>"
VOID = {"meta", "input", "link", "br"}


class Page(HTMLParser):
    """Tags that are open must be closed in order; texts and scripts are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.scripts, self.cells, self.errors = [], [], [], [], []
        self.attributes = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def circuit(graph=GRAPH, count=40, **known):
    draws = torch.Generator().manual_seed(0)
    edges = torch.from_numpy(graph.full()).nonzero()
    chosen = edges[torch.randperm(len(edges), generator=draws)[:count]]
    present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
    scores = torch.full(present.shape, float("nan"))
    present[chosen[:, 0], chosen[:, 1]] = True
    scores[chosen[2:, 0], chosen[2:, 1]] = torch.randn(max(0, count - 2), generator=draws)
    return Circuit(graph, present, scores, known)


def data(page):
    return json.loads(next(text for attrs, text in page.scripts if attrs.get("id") == "edges"))


def test_every_edge_is_there_with_its_effect():
    made = circuit()
    text = to_html(made)
    page = Page(text)
    assert not page.errors
    assert not page.open
    rows = data(page)
    assert sorted(row[0] for row in rows) == sorted(made.edges())
    for name, sender, into, effect in rows:
        score = float(made.scores[GRAPH.edge(name)])
        assert name.startswith(f"{sender}->")
        assert effect == (None if score != score else pytest.approx(score, rel=1e-5))
        wanted = {"q": "query", "k": "key", "v": "value", "m": "MLP", "l": "logits"}
        assert into == wanted[re.search(r"<(.)>|->(.)[^<]*$", name).expand(r"\1\2")]
    # nothing in it can end the script
    assert "<" not in next(text for attrs, text in page.scripts if attrs.get("id") == "edges")
    # lines of the picture are in the order of the rows
    kinds = re.findall(r'<path class="(\w+)"', text)
    short = {"query": "q", "key": "k", "value": "v", "MLP": "other", "logits": "other"}
    assert kinds == [short[row[2]] for row in rows]


def test_no_text_of_others_becomes_markup():
    plain = Page(to_html(circuit(task="t"), task_texts=[("a", "b")]))
    text = to_html(circuit(task=EVIL), task_texts=[(EVIL, "x")])
    page = Page(text)
    assert page.tags == plain.tags
    assert "<script>alert" not in text
    assert "<img" not in text
    assert EVIL in page.cells
    assert not page.errors
    key = Page(to_html(circuit(**{EVIL: EVIL})))
    assert key.scripts == Page(to_html(circuit())).scripts
    assert "img" not in key.tags


def test_nothing_is_loaded_and_only_its_script_runs():
    text = to_html(circuit(), task_texts=[("a", "b")])
    page = Page(text)
    policy = next(value for tag, name, value in page.attributes if tag == "meta"
                  and name == "content" and "default-src" in value)  # fmt: skip
    assert "default-src 'none'" in policy
    run = [script for attrs, script in page.scripts if not attrs]
    assert len(run) == 1
    digest = base64.b64encode(hashlib.sha256(run[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"src", "href"} & names
    assert not any(name.startswith("on") for name in names)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_prompts():
    page = Page(to_html(circuit(), task_texts=zip(["A & B", "<b>"], ["C", "D"], strict=True)))
    assert page.cells[-4:] == ["A & B", "C", "<b>", "D"]
    assert "Prompts" not in to_html(circuit())
    for bad in (["ab"], [("a",)], [("a", 1)]):
        with pytest.raises(ValueError, match=r"task_texts\[0\]: expected a pair of texts"):
            to_html(circuit(), task_texts=bad)


def test_nodes_to_search_for():
    options = {value for tag, name, value in Page(to_html(circuit())).attributes
               if tag == "option" and name == "value"}  # fmt: skip
    assert options == {*GRAPH.sender_names, "logits"} | {
        f"a{layer}.kv{head}" for layer in range(3) for head in range(2)
    }


def test_no_edges():
    page = Page(to_html(circuit(count=0)))
    assert data(page) == []
    assert not page.errors


def test_size():
    made = circuit(Graph(12, 12, 12), 5000)
    pairs = [(f"prompt {n} " * 10, "x" * 100) for n in range(64)]
    text = to_html(made, task_texts=pairs)
    # names are in the table and not in the picture, too
    assert "</path>" not in text
    assert len(text.encode()) < 2_000_000
    assert len(data(Page(text))) == 5000
