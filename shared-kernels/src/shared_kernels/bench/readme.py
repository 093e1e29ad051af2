"""README blocks remade from committed result files, so that no number is typed in by hand.

A block lies between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``, each on a line of its own;
``NAME`` is the stem of a result file. ``<!-- bench:NAME: PARAM + PARAM -->`` has what was noted of
its workloads beside times: parameters that are mappings, whose keys are rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shared_kernels.bench.report import markdown_table, params_table, read_result

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = re.compile(
    r"^<!-- bench:(?P<name>[\w.-]+)(?:: (?P<params>[^\n]+?))? -->\n.*?^<!-- /bench -->$",
    re.DOTALL | re.MULTILINE,
)
_MARKER = re.compile(r"^<!-- /?bench\b", re.MULTILINE)


def render_readme(readme: Path, results: Path | None = None, *, check: bool = False) -> bool:
    """Rewrite the benchmark blocks of a README.

    Args:
        readme: The Markdown file.
        results: Folder of the result files; by default ``benchmarks/results`` beside it.
        check: Only compare; leave the file as it is.

    Returns:
        Whether the file already held exactly these blocks.

    Raises:
        FileNotFoundError: A block names a result file that does not exist.
        ValueError: A marker has no partner, a result file has another schema, or no such
            parameters.
    """
    folder = results or readme.parent / "benchmarks" / "results"
    old = readme.read_text(encoding="utf-8")
    if len(_MARKER.findall(old)) != 2 * len(_BLOCK.findall(old)):
        raise ValueError(
            f"expected every '<!-- bench:NAME -->' of {readme.name} to be followed by its "
            "'<!-- /bench -->', each on a line of its own; got a marker without a partner"
        )

    def block(match: re.Match[str]) -> str:
        path = folder / f"{match['name']}.json"
        if not path.is_file():
            known = sorted(file.stem for file in folder.glob("*.json"))
            raise FileNotFoundError(
                f"expected a result file for the block 'bench:{match['name']}' of {readme.name}; "
                f"there are {known}"
            )
        result = read_result(path)
        begin = match[0].split("\n", 1)[0]
        if match["params"]:
            table = params_table(result, match["params"].split(" + "))
        else:
            table = markdown_table(result)
        return f"{begin}\n{table}\n<!-- /bench -->"

    new = _BLOCK.sub(block, old)
    if new != old and not check:
        readme.write_text(new, encoding="utf-8")
    return new == old
