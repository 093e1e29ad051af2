"""The READMEs' code works.

A ``python`` block is executed, the blocks of one README one after another in one namespace. What a
reader has already (a model, data) comes from a comment, invisible on the page, that starts with
``<!-- run first`` on a line of its own and is executed where it stands. A block with
``<!-- not run: REASON -->`` on the line before it (it needs a GPU, or a model of 26 GB) is only
compiled, and its imports are executed. In a ``bash`` block, every call of one of our commands is
checked against that command's ``--help``: the subcommand must exist, and so must every option.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = [
    ROOT / "README.md",
    *sorted(
        path
        for path in ROOT.glob("*/**/README.md")
        # .venv and other folders that are nobody's reading
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ),
]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n\s*)?```(?P<language>\w*)\n(?P<code>.*?)^```$"
    r"|^<!-- run first\n(?P<setup>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    reason: str


def blocks(text: str, language: str) -> list[Block]:
    found = (
        Block("python", m["setup"], "")
        if m["setup"] is not None
        else Block(m["language"], m["code"], m["reason"] or "")
        for m in FENCE.finditer(text)
    )
    return [block for block in found if block.language == language]


def imports_of(code: str) -> str:
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return ast.unparse(tree)


def script_of(text: str) -> str:
    """The python blocks of a README as one program."""
    parts = []
    for block in blocks(text, "python"):
        ast.parse(block.code)
        parts.append(imports_of(block.code) if block.reason else block.code)
    return "\n".join(parts)


def commands_of(text: str, ours: set[str]) -> list[list[str]]:
    """The calls of our commands in a README's bash blocks, as words."""
    calls = []
    for block in blocks(text, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[;|]", line.split(" #")[0]):
                words = shlex.split(part, comments=True)
                if words[:2] == ["uv", "run"]:
                    words = words[2:]
                if words and words[0] in ours:
                    calls.append(words)
    return calls


@lru_cache
def help_of(*words: str) -> str:
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:], "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    return done.stdout if done.returncode == 0 else ""


def fault_of(call: list[str]) -> str:
    """What is wrong with a call; empty if its command, subcommands and options exist."""
    words, text = call[:1], help_of(call[0])
    if not text:
        return f"no command {call[0]!r}"
    for word in call[1:]:
        # A word is a subcommand if the help so far lists it as one.
        if not re.search(rf"^\W*{re.escape(word)}\s", text.split("Parameters")[0], re.MULTILINE):
            break
        words, text = [*words, word], help_of(*words, word)
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", text))
    options = [word.split("=")[0] for word in call[len(words) :] if word.startswith("-")]
    missing = [o for o in options if o not in known and not re.fullmatch(r"-+[\d.]*", o)]
    return f"{shlex.join(words)} has no {missing}" if missing else ""


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run(path, tmp_path):
    script = script_of(path.read_text(encoding="utf-8"))
    if not script:
        return
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_exist_with_their_options(path, members):
    ours = {command for member in members for command in member.commands}
    calls = commands_of(path.read_text(encoding="utf-8"), ours)
    assert [fault for call in calls if (fault := fault_of(call))] == []


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if not re.match(r"\w+:", link)]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_the_front_page_is_short_and_says_the_two_commands(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "python3 -m pip install uv && uv run tenfold\n" in text
    assert "python3 -m pip install uv && uv run pytest\n" in text


# -- the checks themselves can fail ----------------------------------------------------------------


def test_marked_blocks_are_compiled_and_their_imports_run():
    text = "<!-- not run: it needs a GPU -->\n```python\nimport json\nboom()\n```\n"
    assert script_of(text) == "import json"
    with pytest.raises(SyntaxError):
        script_of(text.replace("boom()", "boom("))
    assert script_of(text.split("\n", 1)[1]) == "import json\nboom()\n"


def test_what_a_reader_has_already_is_run_first():
    text = "<!-- run first\nmodel = 1\n-->\n\n```python\nmodel + 1\n```\n<!-- a remark -->\n"
    assert script_of(text) == "model = 1\n\nmodel + 1\n"


def test_calls_are_found_in_bash_blocks():
    text = "```bash\ncd x && uv run tenfold zo2 \\\n  --quick  # fast\nls\n```\n"
    text += "```\ntenfold --no\n```\n"
    assert commands_of(text, {"tenfold"}) == [["tenfold", "zo2", "--quick"]]


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("tenfold zo2 --quick", ""),
        ("tenfold --quik", "tenfold has no ['--quik']"),
        ("shared-kernels bench --frobnicate", "shared-kernels bench has no ['--frobnicate']"),
        ("shared-kernels doctor --json", ""),
        ("not-there", "no command 'not-there'"),
    ],
)
def test_calls_are_checked_against_the_help(call, fault):
    try:
        found = fault_of(shlex.split(call))
    except FileNotFoundError:
        found = f"no command {call!r}"
    assert found == fault
