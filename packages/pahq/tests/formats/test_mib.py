"""Files of EAP-IG and of the circuit track of MIB."""

import json

import pytest
import torch
from pahq import Circuit, Graph
from pahq.formats import from_mib_json, from_mib_pt, grouped, to_mib_json, to_mib_pt
from pahq.formats import mib as module

GRAPH = Graph(2, 2, 1)
FORMS = {"json": (to_mib_json, from_mib_json), "pt": (to_mib_pt, from_mib_pt)}


def circuit(graph=GRAPH, **scores):
    present = torch.zeros(graph.senders, graph.receivers, dtype=torch.bool)
    table = torch.full(present.shape, float("nan"))
    for name, score in {"m0->logits": 1.5, "input->m0": -0.1, **scores}.items():
        present[graph.edge(name)], table[graph.edge(name)] = True, score
    table[graph.edge("m1->logits")] = 0.001
    return Circuit(graph, present, table, {"method": "acdc"})


def written(tmp_path, made, form="json"):
    FORMS[form][0](made, tmp_path / "c", d_model=16)
    return tmp_path / "c"


def rewritten(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("graph", [GRAPH, Graph(2, 3, 3), Graph(2, 4, 2, parallel=True)])
def test_there_and_back(tmp_path, form, graph):
    draws = torch.Generator().manual_seed(0)
    shape = (graph.senders, graph.receivers)
    scores = torch.randn(shape, generator=draws)
    scores[torch.rand(shape, generator=draws) < 0.3] = float("nan")
    made = Circuit(graph, torch.rand(shape, generator=draws) < 0.4, scores)
    found = FORMS[form][1](written(tmp_path, made, form))
    assert found.provenance == {"format": f"mib-{form}", "d_model": 16}
    assert found.graph == Graph(graph.layers, graph.heads, graph.heads, graph.parallel)
    if graph.key_heads != graph.heads:
        found = grouped(found, graph.key_heads)
    assert torch.equal(found.present, made.present)
    edges = torch.from_numpy(graph.full())
    torch.testing.assert_close(
        found.scores[edges], made.scores[edges], rtol=0, atol=0, equal_nan=True
    )


def test_what_json_holds(tmp_path):
    made = circuit(**{"a0.h1->a1.kv0<k>": 0.25, "input->a0.h1<q>": 2.0})
    text = written(tmp_path, made).read_text()
    assert "NaN" not in text
    document = json.loads(text)
    config = {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 16}
    assert document["cfg"] == config
    edges = document["edges"]
    assert len(edges) == Graph(2, 2, 2).edges
    assert edges["m0->logits"] == {"score": 1.5, "in_graph": True}
    assert edges["m1->logits"] == {"score": pytest.approx(0.001), "in_graph": False}
    assert edges["input->logits"] == {"score": 0.0, "in_graph": False, "tested": False}
    for head in range(2):
        assert edges[f"a0.h1->a1.h{head}<k>"] == {"score": 0.25, "in_graph": True}
    inside = {name for name, node in document["nodes"].items() if node["in_graph"]}
    # heads of layer 1 send nothing, nothing enters a0.h0
    assert inside == {"input", "m0", "a0.h1", "logits"}
    assert set(document["nodes"]) == {*GRAPH.sender_names, "logits"}


def test_a_node_that_nothing_enters_is_not_in_the_graph(tmp_path):
    made = circuit(**{"a0.h0->logits": 1.0, "m1->logits": 1.0, "a1.h1->m1": 1.0})
    nodes = json.loads(written(tmp_path, made).read_text())["nodes"]
    assert not nodes["a0.h0"]["in_graph"]
    assert nodes["m1"]["in_graph"]


def test_what_tensors_hold(tmp_path):
    path = written(tmp_path, circuit(**{"a0.h1->a1.kv0<v>": 0.25}), "pt")
    found = torch.load(path, weights_only=True)
    layer = lambda n: [f"a{n}.h0<q>", f"a{n}.h1<q>", f"a{n}.h0<k>", f"a{n}.h1<k>",  # noqa: E731
                       f"a{n}.h0<v>", f"a{n}.h1<v>", f"m{n}"]  # fmt: skip
    assert found["dst_nodes"] == [*layer(0), *layer(1), "logits"]
    assert found["src_nodes"] == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert found["edges_scores"].dtype == torch.float32
    assert found["edges_in_graph"].dtype == found["nodes_in_graph"].dtype == torch.bool
    assert found["nodes_in_graph"].tolist() == [True, False, False, True, False, False, False]
    assert found["edges_scores"].isfinite().all()
    columns = [found["dst_nodes"].index(f"a1.h{head}<v>") for head in range(2)]
    assert found["edges_scores"][2, columns].tolist() == [0.25, 0.25]
    assert found["edges_in_graph"].sum() == 4
    assert found["edges_scores"].count_nonzero() == 5


def test_files_of_other_writers(tmp_path):
    # fewer edges, a score that is no number, and scores of nodes
    def change(document):
        for name in [name for name in document["edges"] if name.endswith("<q>")]:
            del document["edges"][name]
        document["edges"]["m0->m1"] = {"score": float("nan"), "in_graph": True}
        document["nodes"]["m0"] |= {"score": float("nan"), "neurons": [True, True]}

    found = from_mib_json(rewritten(written(tmp_path, circuit()), change))
    assert set(found.edges()) == {"m0->logits", "input->m0", "m0->m1"}
    assert found.scores[found.graph.edge("m0->m1")].isnan()
    assert found.scores[found.graph.edge("input->a0.h0<q>")].isnan()

    path = written(tmp_path, circuit(), "pt")
    document = torch.load(path, weights_only=True)
    del document["edges_tested"]
    document["edges_in_graph"] = document["edges_in_graph"].double()
    document["edges_in_graph"][1:, 0] = 1  # places of no edge
    torch.save(document, path)
    found = from_mib_pt(path)
    assert set(found.edges()) == {"m0->logits", "input->m0"}
    assert found.scores[found.graph.edge("input->logits")] == 0


def test_binary_circuits(tmp_path):
    def change(document):
        for edge in document["edges"].values():
            del edge["score"]

    path = written(tmp_path, circuit(), "pt")
    document = torch.load(path, weights_only=True)
    del document["edges_scores"]
    torch.save(document, path)
    tensors = from_mib_pt(path)
    for found in (from_mib_json(rewritten(written(tmp_path, circuit()), change)), tensors):
        assert set(found.edges()) == {"m0->logits", "input->m0"}
        assert found.scores.isnan().all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["edges"].update({"a9.h0->m1": {"score": 0, "in_graph": True}}), "'a9.h0->m1'"),
        (lambda d: d["edges"].update({"m1->m0": {"score": 0, "in_graph": True}}), "'m1->m0'"),
        (lambda d: d["edges"].update({"m0->m1": {"score": None, "in_graph": True}}), "edge m0->m1"),
        (lambda d: d["edges"].update({"m0->m1": {"score": 1.0}}), "edge m0->m1: expected in_graph"),
        (lambda d: d["edges"].update({"m0->m1": True}), "edge m0->m1"),
        (lambda d: d["edges"]["m0->m1"].update(score=float("inf"), tested=True), "finite"),
        (lambda d: d["nodes"].update({"m7": {"in_graph": True}}), "got str 'm7'"),
        (lambda d: d["nodes"]["m0"].update(neurons=[True, False]), "m0: expected all neurons"),
        (lambda d: d["nodes"]["m0"].update(neurons=[[True], [False]]), "m0: expected all neurons"),
        (lambda d: d.pop("nodes"), "an object 'nodes'"),
        (lambda d: d.update(edges=[]), "an object 'edges'"),
        (lambda d: d["cfg"].update(n_layers="2"), "cfg n_layers: expected a positive integer"),
        (lambda d: d["cfg"].update(n_heads=True), "cfg n_heads"),
        (lambda d: d["cfg"].pop("d_model"), "cfg d_model"),
        (lambda d: d["cfg"].update(parallel_attn_mlp=1), "cfg parallel_attn_mlp"),
        (lambda d: d["cfg"].update(n_layers=1 << 20, n_heads=1 << 20), "cfg: expected a graph"),
    ],
)
def test_bad_json(tmp_path, change, expected):
    path = rewritten(written(tmp_path, circuit()), change)
    with pytest.raises(ValueError, match=expected.replace("<", "\\<").replace("[", "\\[")):
        from_mib_json(path)


@pytest.mark.parametrize("text", ["", "{", '"x"', "[" * 200_000, "\x80"])
def test_no_json(tmp_path, text):
    path = tmp_path / "c"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"path: expected (a JSON file|JSON with)"):
        from_mib_json(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.pop("dst_nodes"), "path: expected entries"),
        (lambda d: d["src_nodes"].__setitem__(1, "a0.h7"), "got str 'a0.h7'"),
        (lambda d: d["dst_nodes"].reverse(), "dst_nodes: expected the 15 of cfg in order"),
        (lambda d: d.update(edges_scores=d["edges_scores"][1:]), "edges_scores: expected a tensor"),
        (lambda d: d.update(edges_in_graph=[1]), "edges_in_graph: expected a tensor"),
        (lambda d: d["edges_scores"].fill_(float("inf")), "finite"),
        (lambda d: d.update(neurons_in_graph=torch.zeros(7, 16)), "neurons_in_graph"),
        (lambda d: d["cfg"].update(n_layers=0), "cfg n_layers"),
    ],
)
def test_bad_tensors(tmp_path, change, expected):
    path = written(tmp_path, circuit(), "pt")
    document = torch.load(path, weights_only=True)
    change(document)
    if "edges_tested" in document:
        document["edges_tested"].fill_(True)
    torch.save(document, path)
    with pytest.raises(ValueError, match=expected):
        from_mib_pt(path)


class Trap:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_no_code_of_a_file_runs(tmp_path, capsys):
    torch.save({"cfg": Trap()}, tmp_path / "c")
    with pytest.raises(ValueError, match="path: expected a file of tensors"):
        from_mib_pt(tmp_path / "c")
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "c").write_bytes(b"PK\x03\x04 no tensors")
    with pytest.raises(ValueError, match="path: expected a file of tensors"):
        from_mib_pt(tmp_path / "c")


def test_a_damaged_file(tmp_path):
    data = written(tmp_path, circuit(), "pt").read_bytes()
    for cut in range(0, len(data), 97):
        (tmp_path / "c").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="path: expected a file of tensors"):
            from_mib_pt(tmp_path / "c")


@pytest.mark.parametrize("form", FORMS)
def test_limits_and_faults(tmp_path, form, monkeypatch):
    write, read = FORMS[form]
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    path = written(tmp_path, circuit(), form)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"score of m0->m1: expected a finite number"):
        write(circuit(**{"m0->m1": float("inf")}), path, d_model=16)
    with pytest.raises(ValueError, match="d_model: expected an integer"):
        write(circuit(), path, d_model=0)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c"]
    monkeypatch.setattr("pahq.formats._files.LARGEST", 10)
    with pytest.raises(ValueError, match="path: expected a file of at most 10 bytes"):
        read(path)


def test_edges_of_gpt2(tmp_path, monkeypatch):
    # counted without the file: that of all names is large
    kept = {}
    monkeypatch.setattr(module, "write_text", lambda path, text: kept.update(text=text))
    graph = Graph(12, 12, 12)
    shape = (graph.senders, graph.receivers)
    to_mib_json(Circuit(graph, torch.ones(shape), torch.ones(shape)), tmp_path / "c", d_model=768)
    assert len(json.loads(kept["text"])["edges"]) == 32_491
