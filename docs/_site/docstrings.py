"""How docstrings become pages: our ``Example:`` is the parser's ``Examples:``, and formulas are set by MathJax."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = for_pages(obj.docstring.value)


def for_pages(text: str) -> str:
    """The docstring with the parser's section names and the page's formulas."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
    return re.sub(r"^ *\.\. math:: *(.*(?:\n(?: {4,}.*)?)*?)(?=\n\S|\n\n\S|\Z)", _formula, text, flags=re.MULTILINE)


def _formula(found: re.Match[str]) -> str:
    return "$$\n" + textwrap.dedent(found[1]).strip() + "\n$$\n"
