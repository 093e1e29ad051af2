"""Pages are parsed and pictures read back: order, numbers, and that nothing of a sample runs."""

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from sam_if import SAM, Scores, Suspect, Suspects, Trajectory, TrajectoryInfluence, classification
from sam_if.detect import detect_mislabels
from sam_if.views import Card, render_html, render_png, render_suspects
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

VOID = {"meta", "img", "br"}
VALUES = torch.tensor([[0.5, -2.0, 1.5, 0.0, -0.25, 1e-4], [-1.0, 3.0, 0.0, 2.0, -4.0, 1.0]])
TEXTS = [f"text {number}" for number in range(6)]


class Element:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    @property
    def text(self):
        return "".join(c if isinstance(c, str) else c.text for c in self.children).strip()

    def all(self, tag=None, kind=None):
        """Return elements below, in order, by tag and class."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                if tag in (None, child.tag) and (kind is None or kind in classes):
                    found.append(child)
                found += child.all(tag, kind)
        return found


class Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = [Element("root", [])]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs)
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parsed(page):
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert len(parser.open) == 1, "something is left open"
    return parser.open[0]


def rows(part, kind):
    """Return number, shown score and width of the bar of the samples of a kind, in order."""
    (group,) = [found for found in part.all("div", kind) if found.all("h3")]
    return [
        (
            int(re.search(r"sample (\d+)", row.text)[1]),
            row.all(kind="value")[0].text,
            float(re.fullmatch(r"width:(.*)%", row.all(kind="bar")[0].attributes["style"])[1]),
        )
        for row in group.all("li")
    ]


def picture(image):
    """Return the pixels of an ``img``."""
    from PIL import Image

    head, data = image.attributes["src"].split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def only_picture(content):
    page = parsed(render_html(Scores(torch.ones(1, 1), "m"), ["q"], [content]))
    return picture(page.all("img")[0])


def test_order_numbers_and_bars():
    page = parsed(render_html(Scores(VALUES, "m"), ["first", "second"], TEXTS, k=2))
    first, second = page.all("section")
    assert rows(first, "helped") == [(2, "▲ +1.5", 75.0), (0, "▲ +0.5", 25.0)]
    assert rows(first, "harmed") == [(1, "▼ -2", 100.0), (4, "▼ -0.25", 12.5)]
    assert rows(second, "helped") == [(1, "▲ +3", 75.0), (3, "▲ +2", 50.0)]
    assert rows(second, "harmed") == [(4, "▼ -4", 100.0), (0, "▼ -1", 25.0)]
    assert [found.all(kind="query")[0].text for found in (first, second)] == ["first", "second"]
    assert [found.all("h2")[0].text for found in (first, second)] == ["Query 0", "Query 1"]
    for section in (first, second):
        for row in section.all("li"):
            number = re.search(r"sample (\d+)", row.text)[1]
            assert row.all(kind="text")[0].text == f"text {number}"


def test_scores_of_0_are_of_neither_kind():
    page = parsed(render_html(Scores(VALUES, "m"), TEXTS[:2], TEXTS, k=50))
    first, second = page.all("section")
    assert [number for number, *_ in rows(first, "helped")] == [2, 0, 5]
    assert [number for number, *_ in rows(first, "harmed")] == [1, 4]
    assert "3 of 6 samples are above 0, 2 below" in first.text
    assert "3 of 6 samples are above 0, 2 below" in second.text
    none = parsed(render_html(Scores(torch.zeros(1, 3), "m"), ["q"], TEXTS[:3]))
    assert not none.all("li")
    assert [found.text for found in none.all("p") if found.text == "none"] == ["none"] * 2


def test_mean_and_titles():
    page = parsed(render_html(Scores(VALUES, "m"), None, TEXTS, k=1))
    (section,) = page.all("section")
    assert section.all("h2")[0].text == "Mean of 2 queries"
    assert not section.all(kind="query")
    assert rows(section, "helped") == [(3, "▲ +1", 47.1)]
    assert rows(section, "harmed") == [(4, "▼ -2.12", 100.0)]
    assert "4 of 6 samples are above 0, 2 below" in section.text
    page = parsed(render_html(Scores(VALUES[:1], "m"), None, TEXTS))
    assert page.all("h2")[0].text == "What was asked"
    page = parsed(render_html(Scores(VALUES, "m"), TEXTS[:2], TEXTS, titles=["a & b", "<c>"]))
    assert [found.text for found in page.all("h2")] == ["a & b", "<c>"]


def test_method_convention_and_warnings():
    scores = Scores(VALUES, "hessian/<full>", warnings=["not at <rest>", "far"])
    page = parsed(render_html(scores, TEXTS[:2], TEXTS))
    assert [found.text for found in page.all(kind="warning")] == [
        "Warning: not at <rest>", "Warning: far",
    ]  # fmt: skip
    head = page.all("header")[0].text
    assert "Method: hessian/<full>. Queries: 2. Training samples: 6. Reliable: no." in head
    assert "by how much the query would rise if the sample had not been trained on" in head
    assert "is a loss, samples above 0 (▲) helped and those below (▼) harmed" in head
    assert head.index("Warning") < head.index("Method")
    page = parsed(render_html(Scores(VALUES, "m"), TEXTS[:2], TEXTS))
    assert not page.all(kind="warning")
    assert "Reliable: yes." in page.all("header")[0].text


def test_what_samples_say_does_not_run():
    bad = "<script>alert(1)</script>\"'><img src=http://a/b onerror=alert(2)>&amp;"
    long = bad + "x" * 500
    card = Card({bad: long}, label=bad, note=bad)
    scores = Scores(torch.tensor([[1.0, -1.0]]), bad, warnings=[bad])
    text = render_html(scores, [Card(bad, bad, bad)], [card, long], titles=[bad])
    page = parsed(text)
    assert {element.tag for element in page.all()} <= {
        "html", "head", "meta", "title", "style", "body", "header", "section", "div", "h1", "h2",
        "h3", "p", "ol", "li", "i", "b", "bdi",
    }  # fmt: skip
    assert not [name for e in page.all() for name in e.attributes if name.startswith("on")]
    assert page.all("h2")[0].text == bad
    assert [found.text for found in page.all(kind="label")] == [f"label {bad}"] * 2
    assert [found.text for found in page.all(kind="note")] == [bad, bad]
    assert [found.attributes.get("title") for found in page.all(kind="text")] == [None, long, long]
    assert page.all("b")[0].text == bad
    row = Suspect(0, 1.0, 1, 0, 1.0)
    page = parsed(render_suspects(Suspects(bad, (row,)), [bad], label_names=[bad]))
    assert page.all(kind="label")[0].text == f"label {bad}"
    assert not page.all("script")
    assert not page.all("img")


def test_nothing_outside_the_page_is_asked_for():
    text = render_html(Scores(VALUES, "m"), TEXTS[:2], [torch.rand(4, 4)] * 6)
    page = parsed(text)
    assert not re.search(r"url\(|@import|https?:", page.all("style")[0].text)
    assert {e.tag for e in page.all()}.isdisjoint({"script", "link", "iframe", "object", "a"})
    assert all(e.attributes["src"].startswith("data:") for e in page.all("img"))
    policy = [e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    named = {e.attributes.get("name"): e.attributes.get("content") for e in page.all("meta")}
    assert named["viewport"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in page.all("style")[0].text


def test_long_texts_are_shortened():
    texts = ["x" * 280, "y" * 281, "\n".join("abcdefghij"), "short \n"]
    page = parsed(render_html(Scores(torch.ones(1, 4), "m"), None, texts))
    found = {e.text[0]: e for e in page.all(kind="text")}
    assert found["x"].text == "x" * 280
    assert "title" not in found["x"].attributes
    assert found["y"].text == "y" * 280 + " …"
    assert found["y"].attributes["title"] == "y" * 281
    assert found["a"].text == "\n".join("abcdefgh") + " …"
    assert found["a"].attributes["title"] == texts[2]
    assert found["s"].text == "short"
    assert "title" not in found["s"].attributes


def test_half_a_surrogate_is_written(tmp_path):
    page = render_html(
        Scores(torch.ones(1, 1), "m"), None, ["a\ud800b"], tmp_path / "new" / "a.html"
    )
    assert "a?b" in page
    assert (tmp_path / "new" / "a.html").read_text(encoding="utf-8") == page
    render_png(Scores(torch.ones(1, 1), "m"), None, ["a\ud800b"], tmp_path / "a.png")


NUMBERS = [
    (torch.tensor([0.5, -2.0, 1 / 3]), "0.5 -2 0.3333 (3,)"),
    (torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True), "0.5 (1,)"),
    (torch.arange(10)[None], "0 1 2 3 4 5 6 7 … (1, 10)"),
    (np.array([True, False]), "1 0 (2,)"),
    (np.arange(4).reshape(2, 2), "0 1 2 3 (2, 2)"),
    (torch.full((1, 2), -7.0), "-7 -7 (1, 2)"),
    (torch.zeros(5, 4, 4, 4), "0 0 0 0 0 0 0 0 … (5, 4, 4, 4)"),
    (torch.zeros(2, 4, 4), "0 0 0 0 0 0 0 0 … (2, 4, 4)"),
    (torch.zeros(0, 4), "(0, 4)"),
    ({"size": 1.23456, "n": 3, "on": True, "none": None, "who": "me", "x": np.float32(0.25)},
     "size 1.235 n 3 on True none None who me x 0.25"),
    ({"x": torch.tensor([1.0, 2.0])}, "x 1 2 (2,)"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "text"), NUMBERS)
def test_numbers(content, text):
    page = parsed(render_html(Scores(torch.ones(1, 1), "m"), None, [content]))
    assert " ".join(e.text for e in page.all(kind="text")) == text


GREY = np.arange(6 * 5, dtype=np.uint8).reshape(6, 5) * 8
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
PICTURES = [
    (GREY, GREY),
    (GREY[None], GREY),
    (GREY[..., None], GREY),
    (COLOUR, COLOUR),
    (COLOUR.transpose(2, 0, 1), COLOUR),
    (torch.tensor(COLOUR).permute(2, 0, 1), COLOUR),
    (torch.tensor(GREY).double() / 255, GREY),
    (torch.tensor(COLOUR).permute(2, 0, 1).float() / 255, COLOUR),
    (COLOUR.astype(np.float32) / 255, COLOUR),
    (torch.tensor([[0.0, 1.0], [1.0, 0.5]], dtype=torch.bfloat16), [[0, 255], [255, 128]]),
    # rounding may leave a little over
    (np.array([[-1e-4, 1 + 1e-4], [0.0, 1.0]]), [[0, 255], [0, 255]]),
]


@pytest.mark.parametrize(("content", "pixels"), PICTURES)
def test_pixels_of_pictures(content, pixels):
    assert np.array_equal(only_picture(content), pixels)


def test_pictures_of_pillow():
    image = pytest.importorskip("PIL.Image")
    assert np.array_equal(only_picture(image.fromarray(COLOUR)), COLOUR)
    assert np.array_equal(
        only_picture(image.fromarray(COLOUR).convert("CMYK").convert("RGB")), COLOUR
    )
    clear = np.dstack([COLOUR, COLOUR[..., 0]])
    assert np.array_equal(only_picture(image.fromarray(clear)), clear)
    one_bit = image.fromarray(GREY > 100)
    assert np.array_equal(only_picture(one_bit)[..., 0], (GREY > 100) * 255)
    palette = image.fromarray(GREY).convert("P")
    assert only_picture(palette).shape == (6, 5, 3)
    palette.info["transparency"] = 0
    assert only_picture(palette).shape == (6, 5, 4)
    turned = image.fromarray(GREY)
    turned.getexif()[0x0112] = 6
    assert np.array_equal(only_picture(turned), np.rot90(GREY, -1))
    large = image.fromarray(np.zeros((300, 600), np.uint8))
    assert only_picture(large).shape == (128, 256)
    assert large.size == (600, 300)
    with pytest.raises(ValueError, match=r"samples\[0\]: expected a picture of 8 bits, got .*'F'"):
        only_picture(image.new("F", (4, 4)))


def test_small_pictures_are_drawn_as_squares():
    images = [np.zeros((64, 64), np.uint8), np.zeros((64, 65), np.uint8)]
    page = parsed(render_html(Scores(torch.tensor([[2.0, 1.0]]), "m"), None, images))
    assert [e.attributes.get("class") for e in page.all("img")] == ["tiny", None]
    assert [e.attributes["alt"] for e in page.all("img")] == ["sample 0", "sample 1"]
    assert "img.tiny { image-rendering: pixelated; }" in page.all("style")[0].text


def test_only_what_is_shown_is_looked_up_and_once():
    asked = []

    class Data:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            asked.append(index)
            return Card(f"text {index}", str(index), f"note {index}")

    page = parsed(render_html(Scores(VALUES, "m"), TEXTS[:2], Data(), k=1))
    assert sorted(asked) == [1, 2, 4]
    assert [e.text for e in page.all(kind="label")] == [f"label {n}" for n in (2, 1, 1, 4)]
    assert [e.text for e in page.all(kind="note")] == ["note 2", "note 1", "note 1", "note 4"]


SUSPECTS = Suspects("margin", (
    Suspect(4, 0.9, 1, 1, 3.25), Suspect(2, 0.45, 2, 0, 0.5), Suspect(0, -0.6, 3, 1, 0.125),
))  # fmt: skip


def test_suspects(tmp_path):
    text = render_suspects(SUSPECTS, TEXTS, tmp_path / "a.html", k=2, label_names=["cat", "dog"])
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == text
    page = parsed(text)
    assert rows(page, "harmed") == [(4, "margin +0.9", 100.0), (2, "margin +0.45", 50.0)]
    first, second = page.all("li")
    assert "1. sample 4, loss 3.25" in first.text
    assert "2. sample 2, loss 0.5" in second.text
    assert [e.text for e in page.all(kind="label")] == ["label dog", "label cat"]
    assert [e.text for e in page.all(kind="text")] == ["text 4", "text 2"]
    assert rows(parsed(render_suspects(SUSPECTS, TEXTS)), "harmed")[2] == (0, "margin -0.6", 0.0)
    head = page.all("header")[0].text
    assert "The first 2 of 3 samples" in head
    assert "how far the given label's logit was below the largest other one" in head


def test_labels_of_suspects():
    def labels(samples, **options):
        page = parsed(render_suspects(SUSPECTS, samples, **options))
        return [e.text.removeprefix("label ") for e in page.all(kind="label")]

    assert labels(TEXTS) == ["1", "0", "1"]
    cards = [Card(text, f"of {text}") for text in TEXTS]
    assert labels(cards) == ["of text 4", "of text 2", "of text 0"]
    assert labels(cards, label_names={0: "cat", 1: "dog"}) == ["dog", "cat", "dog"]
    unlabelled = Suspects("loss", (Suspect(0, 0.0, 1, None, 0.0),))
    page = parsed(render_suspects(unlabelled, TEXTS, label_names=["cat"]))
    assert not page.all(kind="label")
    assert rows(page, "harmed") == [(0, "loss +0", 0.0)]
    assert not parsed(render_suspects(Suspects("loss", ()), TEXTS)).all("li")


NAN, BAD = VALUES.clone(), [torch.rand(4, 4) * 16] * 6
NAN[1, 3] = torch.nan
NANS = np.full((2, 2), np.nan)
WRONG = [
    ((Scores(VALUES, "m"), TEXTS[:1], TEXTS), {}, r"queries: expected 2, as scores has, got int 1"),
    ((Scores(VALUES[:0], "m"), [], TEXTS), {}, r"queries: expected .*at least one"),
    ((Scores(VALUES[:0], "m"), None, TEXTS), {}, r"queries: expected .*at least one"),
    ((Scores(VALUES, "m"), TEXTS[:2], TEXTS[:5]), {}, r"samples: expected 6, .*, got int 5; "),
    ((Scores(VALUES, "m"), TEXTS[:2], TEXTS), {"k": 0}, r"k: expected an integer in \[1, "),
    ((Scores(NAN, "m"), TEXTS[:2], TEXTS), {}, r"scores: .*finite.*nan for query 1 and sample 3"),
    ((Scores(VALUES / 0, "m"), None, TEXTS), {}, r"scores: .*finite.*inf for query 0 and sample 0"),
    ((Scores(VALUES, "m"), TEXTS[:2], BAD), {}, r"samples\[2\]: .* from 0 to 1, .*; undo its norm"),
    ((Scores(VALUES, "m"), BAD[:2], TEXTS), {}, r"queries\[0\]: .* from 0 to 1, "),
    ((Scores(VALUES, "m"), TEXTS[:2], [NANS] * 6), {}, r"samples\[2\]: .*'nan to"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "told"), WRONG)
def test_bad_values(arguments, options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        render_html(*arguments, tmp_path / "a.html", **options)
    with pytest.raises(ValueError, match=told):
        render_png(*arguments, tmp_path / "a.png", **options)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (object(), r"samples\[0\]: expected a tensor.*, got str 'object'; "),
        ([1.0, 2.0], r"samples\[0\]: .*'list'"),
        (b"text", r"samples\[0\]: .*'bytes'"),
        (np.array(["a"]), r"samples\[0\]: .*'ndarray'"),
        ({"a": {1, 2}}, r"samples\[0\]\['a'\]: .*'set'"),
    ],
)
def test_bad_contents(content, told, tmp_path):
    scores = Scores(torch.ones(1, 1), "m")
    with pytest.raises(TypeError, match=told):
        render_html(scores, None, [content])
    with pytest.raises(TypeError, match=told):
        render_png(scores, None, [Card(content)], tmp_path / "a.png")
    with pytest.raises(TypeError, match=told):
        render_suspects(Suspects("loss", (Suspect(0, 1.0, 1, None, 1.0),)), [content])


def test_bad_options(tmp_path):
    scores = Scores(VALUES, "m")
    with pytest.raises(ValueError, match=r"titles: expected 2, got int 1; "):
        render_html(scores, TEXTS[:2], TEXTS, titles=["a"])
    with pytest.raises(ValueError, match=r"titles: expected 1, got int 2; "):
        render_html(scores, None, TEXTS, titles=["a", "b"])
    with pytest.raises(ValueError, match=r"path: .* ends with .png, got str 'a.svg'"):
        render_png(scores, TEXTS[:2], TEXTS, tmp_path / "a.svg")
    with pytest.raises(ValueError, match=r"k: expected an integer"):
        render_suspects(SUSPECTS, TEXTS, k=0)
    with pytest.raises(ValueError, match=r"samples: .*suspect 4 .*, got int 4; "):
        render_suspects(SUSPECTS, TEXTS[:4])
    with pytest.raises(
        ValueError, match=r"label_names: expected a name for label 1, got list \[0\]"
    ):
        render_suspects(SUSPECTS, TEXTS, label_names=["cat"])
    diverged = Suspects("margin", (Suspect(1, torch.nan, 1, 0, 1.0),))
    with pytest.raises(ValueError, match=r"suspects: .*finite.* 'nan for sample 1'"):
        render_suspects(diverged, TEXTS)


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    scores = Scores(torch.ones(1, 1), "m")
    with pytest.raises(ImportError, match=r"Pillow: pip install 'sam-if\[plot\]'"):
        render_html(scores, None, [torch.rand(4, 4)])
    assert "a text" in render_html(scores, None, ["a text"])


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'sam-if\[plot\]'"):
        render_png(Scores(VALUES, "m"), TEXTS[:2], TEXTS, tmp_path / "a.png")


def test_png(monkeypatch, tmp_path):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], Figure.savefig

    def savefig(self, *arguments, **options):
        drawn.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    samples = [Card(GREY, "seven"), "$\\frac{$ a text of many words that is broken", *[GREY.T] * 4]
    scores = Scores(VALUES, "hessian", warnings=["not at rest"])
    render_png(scores, [COLOUR, {"a": 1}], samples, tmp_path / "new" / "a.png", k=2)
    data = (tmp_path / "new" / "a.png").read_bytes()
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(data))
    assert image.size == (3 * 1.5 * 160, 8 * 160)
    assert np.asarray(image).std() > 20
    assert "Software" not in image.info
    (kept,) = drawn
    titles = [axes.get_title().split("\n") for axes in kept.axes]
    assert titles == [
        ["Query 0"],
        ["▲ +1.5", "sample 2"], ["▲ +0.5", "sample 0", "label seven"],
        ["▼ -2", "sample 1"], ["▼ -0.25", "sample 4"],
        ["Query 1"],
        ["▲ +3", "sample 1"], ["▲ +2", "sample 3"],
        ["▼ -4", "sample 4"], ["▼ -1", "sample 0", "label seven"],
    ]  # fmt: skip
    assert np.array_equal(kept.axes[0].images[0].get_array(), COLOUR)
    assert np.array_equal(kept.axes[1].images[0].get_array(), GREY.T)
    assert np.array_equal(kept.axes[2].images[0].get_array(), GREY)
    assert kept.axes[3].texts[0].get_text().split("\n")[0] == "$\\frac{$ a text of"
    assert kept.axes[5].texts[0].get_text() == "a: 1"
    assert kept.axes[2].images[0].get_interpolation() == "nearest"
    assert kept.axes[2].images[0].get_clim() == (0, 255)
    assert kept.axes[2].images[0].get_cmap().name == "gray"
    places = [axes.get_position() for axes in kept.axes[:5]]
    assert all(place.x0 > places[0].x1 for place in places[1:])
    assert min(places[1].y0, places[2].y0) > max(places[3].y1, places[4].y1)
    assert "hessian" in kept.get_suptitle()
    assert "not reliable; not at rest" in kept.get_suptitle()
    render_png(scores, [COLOUR, {"a": 1}], samples, tmp_path / "b.png", k=2)
    assert (tmp_path / "b.png").read_bytes() == data
    drawn.clear()
    render_png(Scores(VALUES, "m"), None, samples, tmp_path / "b.png", k=1)
    titles = [axes.get_title().split("\n")[:2] for axes in drawn[0].axes]
    assert titles == [[""], ["▲ +1", "sample 3"], ["▼ -2.12", "sample 4"]]
    assert drawn[0].axes[0].texts[0].get_text() == "Mean of 2 queries"
    assert drawn[0].get_suptitle().endswith("\nreliable")


def test_digits(tmp_path):
    """Real digits, three with wrong labels, of which the pages show pictures and scores."""
    x, y = load_digits(return_X_y=True)
    images = x.reshape(-1, 8, 8) / 16
    x, given, wrong = torch.tensor(x / 16), torch.tensor(y), [3, 40, 77]
    given[wrong] = (given[wrong] + 5) % 10
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 10).double()
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.05, lr=0.5)
    trajectory = Trajectory(model, classification(), optimizer)
    for _ in range(20):
        for samples in torch.randperm(120).split(24):
            trajectory.record((x[samples], given[samples]), samples)
            for step in (optimizer.first_step, optimizer.second_step):
                cross_entropy(model(x[samples]), given[samples]).backward()
                step(zero_grad=True)
    influence = TrajectoryInfluence(trajectory, "none")
    asked = slice(200, 202)
    scores = influence.scores([(x[n : n + 1], given[n : n + 1]) for n in (200, 201)])
    cards = [
        Card(image, str(int(label))) for image, label in zip(images, given, strict=True)
    ]  # fmt: skip
    page = parsed(render_html(scores, cards[asked], cards[:120], tmp_path / "digits.html"))
    sections = page.all("section")
    assert len(sections) == 2
    for number, section in enumerate(sections):
        asked_pixels = picture(section.all(kind="query")[0].all("img")[0])
        assert np.array_equal(asked_pixels, (images[200 + number] * 255).round())
        for kind in ("helped", "harmed"):
            expected = scores.top(8, number, harmful=kind == "harmed")
            assert [n for n, *_ in rows(section, kind)] == [n for n, _ in expected]
            shown = [float(text.split()[1]) for _, text, _ in rows(section, kind)]
            assert shown == pytest.approx([value for _, value in expected], rel=5e-3)
        for row in section.all("li"):
            sample = int(re.search(r"sample (\d+)", row.text)[1])
            assert np.array_equal(picture(row.all("img")[0]), (images[sample] * 255).round())
            assert row.all(kind="label")[0].text == f"label {given[sample]}"
    render_png(scores, cards[asked], cards[:120], tmp_path / "digits.png")
    suspects = detect_mislabels(trajectory, k=8)
    page = parsed(render_suspects(suspects, cards[:120], tmp_path / "suspects.html"))
    assert {*wrong} <= {number for number, *_ in rows(page, "harmed")}
