"""What was kept of texts: the texts with their kept words marked, and the words that are kept most often."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distset.files import write_atomically
from distset.report.plots import COLORS, new_axes, new_figure, save

__all__ = ["KeptWords", "plot_kept_words", "write_kept_words"]

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Kept words</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #444; }}
article {{ border-top: 1px solid #ddd; padding: 1em 0; }}
h2 {{ font-size: 1em; color: #222; margin: 0 0 .4em; }}
mark {{ background: #ffd54d; color: #000; font-weight: 600; padding: 0 .15em; border-radius: .2em; }}
</style>
<h1>Kept words</h1>
{articles}
"""


class KeptWords(NamedTuple):
    """A text: its words, which of them are kept, what follows from these, and what is true."""

    words: list[str]
    kept: list[bool]
    answer: str
    truth: str


def write_kept_words(texts: Sequence[KeptWords], path: Path) -> None:
    """One HTML page with the texts, kept words marked."""
    articles = [
        f"<article><h2>{html.escape(text.truth)} &mdash; from {sum(text.kept)} words: {html.escape(text.answer)}</h2>"
        f"<p>{' '.join(_word(*pair) for pair in zip(text.words, text.kept))}</p></article>"
        for text in texts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, PAGE.format(articles="\n".join(articles)))


def plot_kept_words(texts: Sequence[KeptWords], path: Path, *, words: int = 20) -> None:
    """The words that are kept most often, with the share of texts that keep them."""
    counts = Counter(word for text in texts for word in {w for w, kept in zip(text.words, text.kept) if kept})
    found = counts.most_common(words)
    figure = new_figure(5.6, 0.6 + 0.24 * max(len(found), 1))
    axes = new_axes(figure, (1, 1, 1))
    axes.barh(range(len(found)), [count / len(texts) for _, count in found], color=COLORS[0], height=0.7)
    axes.set_yticks(range(len(found)), [word for word, _ in found], parse_math=False)  # $ is a word
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel=f"share of {len(texts):,} texts that keep the word")
    save(figure, path)


def _word(word: str, kept: bool) -> str:
    return f"<mark>{html.escape(word)}</mark>" if kept else html.escape(word)
