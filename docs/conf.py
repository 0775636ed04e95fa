"""The documentation site: `sphinx-build -W --keep-going docs docs/_build`.

Two things are npclip's own. A line `<!-- README.md: Models -->` in a page becomes what stands under
that heading there (without a heading: all of the file), so that nothing is written twice. And
docstrings, which say `name: text` of each argument, become Sphinx's fields and references.

Sphinx is imported by no line here, so that the tests can do without.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import npclip

ROOT = Path(__file__).resolve().parents[1]

project = "npclip"
author = "The npclip authors"
project_copyright = "2026, The npclip authors"
version = release = npclip.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes; no curly quotes around what is code
default_role = "code"  # `x` in docstrings
autodoc_member_order = "bysource"
autoclass_content = "both"
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_type_aliases = {"Float32": "Float32", "Label": "Label", "Prediction": "Prediction"}
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
nitpicky = True  # a reference to nothing is a warning, and so an error
nitpick_ignore_regex = [
    ("py:.*", r"(?!npclip\.).*"),  # Python's, NumPy's and Pillow's types
    ("py:class", r"npclip\.provenance\.Origin"),  # of the constructor that load() calls
]
html_theme = "furo"
html_title = "npclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

INCLUDE = re.compile(r"^<!-- (\w\S*\.md)(?:: (.+))? -->$", re.M)
LINKS = {  # of the texts that are included, where the site has another place for it
    "docs/": "",
    "kernels/README.md": "kernels.md",
    "npclip/errors.py": "api/errors.rst",
    "npclip/store/__init__.py": "api/collections.rst",
}


def section(file: str, heading: str | None = None) -> str:
    """The text between a heading of a Markdown file and the next one, or all of the file.

    Raises ValueError where there is no such heading.
    """
    text = (ROOT / file).read_text("utf-8")
    if heading is None:
        return text
    # headings are looked for with all code, and the comments in it, blanked out
    outside = re.sub(r"^```.*?^```$", lambda code: " " * len(code[0]), text, flags=re.M | re.S)
    start = re.search(rf"^#+ {re.escape(heading)}$", outside, re.M)
    if not start:
        raise ValueError(f"{file} has no heading {heading!r}")
    end = re.compile("^#+ ", re.M).search(outside, start.end())
    return text[start.end() : end.start() if end else None].strip("\n")


def expand(markdown: str) -> str:
    """A page with its includes, their links as they are in the site."""

    def include(line: re.Match[str]) -> str:
        text = section(*line.groups())
        text = re.sub(r"\[([^]]+)\]\((tests|examples)/[^)]*\)", r"\1", text)  # not in the site
        for ours, there in LINKS.items():
            text = text.replace(f"]({ours}", f"]({there}")
        return text

    return INCLUDE.sub(include, markdown)


def fields(lines: list[str], names: set[str]) -> list[str]:
    """A docstring in reStructuredText: `name: text` of an argument as a field, errors as links."""
    errors = "|".join(name for name in vars(npclip.errors) if name.endswith("Error"))
    argument = "|".join(names) or "(?!)"
    found: list[str] = []
    for line in lines:
        line = line.replace("*", r"\*").replace("<|", r"<\|")  # nothing is marked up by these
        line = re.sub(rf"(?<=[.;]) (?=Raises |({argument}): )", "\n", line)
        for part in line.split("\n"):
            is_field = bool(re.match(rf"({argument}): ", part))
            before = found[-1] if found else ""
            follows_field = before.startswith((":param", "    "))
            if before and part[:1].strip() and is_field != follows_field:
                found.append("")  # between fields and the text around them
            part = f":param {part}" if is_field else part
            found.append(re.sub(rf"\b({errors})\b", r":exc:`~npclip.errors.\1`", part))
    return found


def argument_names(what: str, obj: Any) -> set[str]:
    """Of a function, or of a class's constructor."""
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


def setup(app: Any) -> None:
    """Called by Sphinx."""

    def on_source(app: Any, name: str, source: list[str]) -> None:
        for file, _ in INCLUDE.findall(source[0]):
            app.env.note_dependency(str(ROOT / file))  # the page is read again when that changes
        source[0] = expand(source[0])

    def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: Any) -> None:
        lines[:] = fields(lines, argument_names(what, obj))

    def on_signature(app: Any, what: str, name: str, obj: Any, options: Any, *parts: Any) -> Any:
        alias = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
        return tuple(part and alias.sub(r"\1", part) for part in parts)

    app.connect("source-read", on_source)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("autodoc-process-docstring", on_docstring)
