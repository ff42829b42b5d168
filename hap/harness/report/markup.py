"""Lines of text -> a table in Markdown or LaTeX, with all that is special escaped; knows nothing of runs."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pandas as pd

# beyond Latin-1, what LaTeX sets by itself, and what it sets by a command that works in text
SET_BY_LATEX = frozenset("‘’“”–—…•€")  # noqa: RUF001
COMMANDS = {
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "−": r"$-$",  # noqa: RUF001
    "×": r"$\times$",  # noqa: RUF001
    "±": r"$\pm$",
}
LATEX = r"""% Made by `hap report` from the records of {name}; needs \usepackage{{booktabs}}.
\begin{{table*}}
\centering
\footnotesize
\setlength{{\tabcolsep}}{{4pt}}
\caption{{{caption}}}
\label{{tab:{label}}}
{table}\par\smallskip
\begin{{minipage}}{{\linewidth}}
\scriptsize
{notes}
\end{{minipage}}
\end{{table*}}
"""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of these cells, its columns padded to one width."""
    return str(_frame(head, rows, plain).to_markdown(index=False, disable_numparse=True))


def plain(text: str) -> str:
    """Text that neither ends a cell nor becomes HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def slug(heading: str) -> str:
    """The anchor that forges give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def latex(name: str, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str]) -> str:
    """A whole table for \\input: booktabs, the first column to the left and the others to the right, notes below."""
    shown = _frame(head, rows, tex).style.hide(axis="index")
    return LATEX.format(
        name=" ".join(name.split()),
        caption=tex(caption),
        label=re.sub(r"[^A-Za-z0-9.-]", "-", name),
        table=shown.to_latex(hrules=True, column_format="l" + "r" * (len(head) - 1)),
        notes="\\par\n".join(map(tex, notes)),
    )


def _frame(head: Sequence[str], rows: Iterable[Sequence[str]], escaped: Callable[[str], str]) -> pd.DataFrame:
    return pd.DataFrame([list(map(escaped, row)) for row in rows], columns=list(map(escaped, head)))


def tex(text: str) -> str:
    """Text that LaTeX prints as it is; a letter that its fonts lack is called by its name."""
    whole = "".join(map(_letter, unicodedata.normalize("NFC", " ".join(text.split()))))
    whole = whole.replace("--", "-{}-").replace("--", "-{}-")  # else a dash; twice, for matches do not overlap
    # a row that begins with a bracket or a star would be read as an option of the line before
    return f"{{{whole[0]}}}{whole[1:]}" if whole[:1] in ("[", "*") else whole


@cache
def _letter(letter: str) -> str:
    escaped = _ESCAPED.get(letter) or COMMANDS.get(letter)
    if escaped is not None:
        return escaped
    if " " <= letter <= "~" or "\u00a0" <= letter <= "\u00ff" or letter in SET_BY_LATEX:
        return letter
    return f"[{unicodedata.name(letter, f'U+{ord(letter):04X}').lower()}]"


_ESCAPED = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
}
