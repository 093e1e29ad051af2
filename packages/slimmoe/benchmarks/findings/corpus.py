"""Real text for the experiments: documentation, dictionaries, books and code of Debian packages.

Only this script ships, not the text. `download` asks the system's package manager for packages and
unpacks them without installing anything; `documents` turns what is inside into plain text. A folder
of one's own texts does as well.
"""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

#: By domain, packages and where in them the text is.
PACKAGES = {
    "dictionary": {
        "dict-gcide": "**/*.dict.dz", "dict-wn": "**/*.dict.dz", "dict-foldoc": "**/*.dict.dz",
        "dict-jargon": "**/*.dict.dz", "dict-devil": "**/*.dict.dz",
    },
    "books": {"bible-kjv-text": "**/*.rawtext", "fortunes": "**/games/fortunes/*",
              "miscfiles": "**/*.gz"},
    "manuals": {
        "linux-doc-6.1": "**/html/**/*.html", "python3.11-doc": "**/html/**/*.html",
        "debian-handbook": "**/en-US/*.html", "debian-policy": "**/*.html",
        "debian-reference-en": "**/*.en.html", "developers-reference": "**/*.html",
        "installation-guide-amd64": "**/en/*.html", "gnome-user-docs": "**/help/C/**/*.page",
        "gimp-help-en": "**/en/*.html", "git-doc": "**/*.html", "apache2-doc": "**/*.html.en",
        "sqlite3-doc": "**/*.html", "postgresql-doc-15": "**/html/*.html",
        "maxima-doc": "**/html/maxima_[0-9]*.html", "octave-doc": "**/octave.html/*.html",
        "perl-doc": "**/*.pod", "vim-doc": "**/*.txt", "python-scipy-doc": "**/html/**/*.html",
        "python-sqlalchemy-doc": "**/html/**/*.html", "python-django-doc": "**/html/**/*.html",
        "manpages": "**/man[1-9]/*.gz", "manpages-dev": "**/man[1-9]/*.gz",
        "autoconf-doc": "**/*.html", "lilypond-doc-html": "**/*[a-z].html",
        "libboost1.74-doc": "**/*.html", "rust-doc": "**/html/[bcenru][dmoaeu][bmicfs]*/**/*.html",
        "gnuplot-doc": "**/*.html", "bash-doc": "**/*.html", "aptitude-doc-en": "**/*.html",
    },
    "code": {"libpython3.11-stdlib": "**/*.py", "python3-sympy": "**/*.py"},
}  # fmt: skip
_SKIPPED = {"script", "style", "nav", "header", "footer", "aside", "head", "form", "button"}
_BLOCKS = {"p", "div", "pre", "li", "td", "th", "tr", "dt", "dd", "br", "section", "table",
           *(f"h{n}" for n in range(1, 7))}  # fmt: skip
#: A paragraph that comes again is a menu, a licence or a heading; shorter ones are left alone.
_LEAST = 24
#: Characters of a document that is worth having, and of one that is cut into several.
_SHORT, _LONG = 400, 40_000


class Document(NamedTuple):
    """A text, of what kind it is, and the package and the file that it is of."""

    domain: str
    source: str
    text: str


def download(folder: str | Path) -> None:
    """Fetch and unpack the packages into a folder, each into one of its own.

    Needs ``apt-get`` and ``dpkg-deb``. What is there is not fetched again.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for packages in PACKAGES.values() for name in packages]
    for name in tqdm(names, desc="packages", unit="package"):
        if (folder / name).is_dir():
            continue
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True, capture_output=True)
        (archive,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder / f"{name}.part"], check=True)
        (folder / f"{name}.part").rename(folder / name)
        archive.unlink()


def documents(folder: str | Path) -> list[Document]:
    """Return all documents of a folder of `download`, in a fixed order, without repetitions."""
    found, seen = [], set()
    files = [
        (domain, package, path)
        for domain, packages in PACKAGES.items()
        for package, pattern in packages.items()
        for path in sorted((Path(folder) / package).glob(pattern))
        if path.is_file() and not path.is_symlink()
    ]
    for domain, package, path in tqdm(files, desc="texts", unit="file"):
        source = f"{package}/{path.name}"
        for text in _texts(path):
            if domain != "dictionary":
                text = _without_repetitions(text, seen)
            found += [Document(domain, source, part) for part in _parts(text)]
    return found


def _texts(path: Path) -> list[str]:
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n")
    names = path.name.split(".")
    if "html" in names or path.suffix == ".page":
        parser = _Text()
        parser.feed(text)
        return ["".join(parser.parts)]
    if re.search(r"\.[1-9]\w*\.gz$", path.name):
        return [_manual(text)]
    if names[-1] == "dz":
        # entries are apart; some hundred of them make a document
        entries = re.split(r"\n(?=\S)", text)
        return ["\n".join(entries[at : at + 100]) for at in range(0, len(entries), 100)]
    return [text]


class _Text(html.parser.HTMLParser):
    """Keeps what is read, not what surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped = self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in _SKIPPED
        self._verbatim += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipped = max(0, self._skipped - (tag in _SKIPPED))
        self._verbatim = max(0, self._verbatim - (tag == "pre"))
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))


def _manual(text: str) -> str:
    """Return a page of the manual without its macros."""
    text = re.sub(r"\\f[A-Z]|\\&|\\\||\\\^", "", text).replace("\\-", "-").replace("\\(aq", "'")
    lines = [
        re.sub(r"^\.[A-Za-z]+ ?", "", line)
        for line in text.split("\n")
        if not line.startswith((".\\", "'\\"))
    ]
    return "\n".join(lines)


def _without_repetitions(text: str, seen: set[bytes]) -> str:
    lines, kept = re.sub(r"\n\s*\n+", "\n\n", text.strip()).split("\n"), []
    for line in lines:
        bare = line.strip()
        if len(bare) >= _LEAST:
            key = hashlib.blake2b(bare.encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept))


def _parts(text: str) -> list[str]:
    parts = []
    while len(text) > _LONG:
        cut = text.rfind("\n", 0, _LONG)
        cut = cut if cut > 0 else _LONG
        parts.append(text[:cut])
        text = text[cut:].lstrip("\n")
    return [part for part in [*parts, text] if len(part) >= _SHORT]
