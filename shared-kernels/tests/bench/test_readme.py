from pathlib import Path

import pytest
import shared_kernels
from shared_kernels.bench import markdown_table, render_readme
from shared_kernels.bench.report import SCHEMA, SCHEMA_VERSION, caption, write_result

RESULT = {
    "schema": SCHEMA,
    "schema_version": SCHEMA_VERSION,
    "provenance": {
        "command": "c",
        "commit": None,
        "dirty": None,
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.11.0"},
        "cpu": {"model": "A CPU", "torch_threads": 2, "usable_cores": 2},
        "gpu": None,
        "load_average": [0.5, 0.5, 0.5],
    },
    "ceilings": {},
    "workloads": [],
}
TEXT = "# Title\n\n<!-- bench:zo-cpu -->\nold numbers\n<!-- /bench -->\n\nThe end.\n"


@pytest.fixture
def readme(tmp_path):
    write_result(RESULT, tmp_path / "benchmarks" / "results" / "zo-cpu.json")
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    return path


def test_blocks_are_remade_and_the_rest_is_left(readme):
    assert render_readme(readme) is False
    table = markdown_table(RESULT)
    assert readme.read_text() == TEXT.replace("old numbers", table)
    assert render_readme(readme) is True


def test_check_changes_nothing(readme):
    assert render_readme(readme, check=True) is False
    assert readme.read_text() == TEXT
    render_readme(readme)
    assert render_readme(readme, check=True) is True
    readme.write_text(readme.read_text().replace("2.11.0", "2.12.0"))
    assert render_readme(readme, check=True) is False


def test_two_blocks_and_another_folder(readme, tmp_path):
    write_result(RESULT, tmp_path / "elsewhere" / "noise-cpu.json")
    readme.write_text("<!-- bench:noise-cpu -->\n<!-- /bench -->\nand\n" * 2)
    assert render_readme(readme, tmp_path / "elsewhere") is False
    assert readme.read_text().count(markdown_table(RESULT)) == 2
    assert readme.read_text().count("\nand\n") == 2


def test_parameters_as_a_table(readme, tmp_path):
    params = {
        "searches": {"fp32": {"seconds": 33.8952, "batches": 1677}, "bf16": {"seconds": 16.4}},
        "peak bytes": {"one|run": 3 << 30, "bf16": 1 << 20}, "edges": 7,
    }  # fmt: skip
    result = RESULT | {"workloads": [{"name": "w", "params": params, "arms": []}]}
    write_result(result, tmp_path / "benchmarks" / "results" / "zo-cpu.json")
    begin = "<!-- bench:zo-cpu: searches + peak bytes -->\n"
    readme.write_text(f"{begin}old\n<!-- /bench -->\n")
    assert render_readme(readme) is False
    assert readme.read_text() == begin + (
        "|  | seconds | batches | peak bytes |\n"
        "| --- | --: | --: | --: |\n"
        "| fp32 | 33.9 | 1,677 |  |\n"
        "| bf16 | 16.4 |  | 1.00 MiB |\n"
        "| one\\|run |  |  | 3.00 GiB |\n"
        f"\n{caption(result)}\n<!-- /bench -->\n"
    )
    assert render_readme(readme) is True
    readme.write_text(readme.read_text().replace("searches +", "edges +"))
    with pytest.raises(ValueError, match=r"\['edges', 'peak bytes'\] of \['peak bytes', 'search"):
        render_readme(readme)


def test_a_block_without_a_result_is_an_error(readme):
    readme.write_text(TEXT.replace("zo-cpu", "zo-gpu"))
    with pytest.raises(FileNotFoundError, match=r"bench:zo-gpu.*\['zo-cpu'\]"):
        render_readme(readme)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("<!-- /bench -->", ""),
        TEXT.replace("<!-- bench:zo-cpu -->", ""),
        TEXT.replace("bench:zo-cpu -->", "bench: zo-cpu -->"),
    ],
)
def test_a_marker_without_a_partner_is_an_error(readme, text):
    readme.write_text(text)
    with pytest.raises(ValueError, match="without a partner"):
        render_readme(readme)
    assert readme.read_text() == text


def test_a_text_without_blocks_is_left_alone(readme):
    readme.write_text("# Title\nbetween `<!-- bench:NAME -->` and `<!-- /bench -->`\n")
    assert render_readme(readme) is True


def test_our_own_readme_shows_the_committed_results():
    readme = Path(shared_kernels.__file__).parents[2] / "README.md"
    assert render_readme(readme, check=True), "run: shared-kernels report shared-kernels/README.md"
