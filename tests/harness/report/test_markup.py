import re
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from fakes import REPORTED, SPEC, fake_run, write_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from hap.harness.report.markup import latex, markdown, slug, tex
from hap.harness.report.tables import tables
from hap.harness.spec.spec import load_spec

NASTY = r"""50 % & 3 $ of #1_{x} ~ ^ \ <b> | "q" 'q' `q` -- --- ?` !` [a] *b* \input{x} %"""
DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs}
\begin{document}
%s
\end{document}
"""


def compiled(folder: Path, *files: Path) -> str:
    """The text of the pages that pdflatex makes of these tables; a skip without it."""
    for program in ("pdflatex", "pdftotext"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: the structure of the table is tested without it")
    (folder / "whole.tex").write_text(DOCUMENT % "\n".join(f"\\input{{{file.as_posix()}}}" for file in files))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "whole.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    told = ["pdftotext", "-layout", "whole.pdf", "-"]
    return subprocess.run(told, cwd=folder, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_table_in_markdown_keeps_to_its_cells():
    assert markdown(["a", "b|c"], [["<i>", "x\ny"]]) == (
        "| a      | b\\|c   |\n|:-------|:-------|\n| &lt;i> | x y    |"
    )


def test_the_anchor_is_that_of_a_forge():
    assert slug("Probes against the exact trace, CIFAR-10") == "probes-against-the-exact-trace-cifar-10"


def test_what_is_special_is_escaped():
    assert tex("50 % & $1 #2_{3}") == r"50 \% \& \$1 \#2\_\{3\}"
    assert tex("a\\b~c^d") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"
    assert tex("< > | ` ---") == r"\textless{} \textgreater{} \textbar{} \textasciigrave{} -{}-{}-"
    assert tex("[x]") == "{[}x]"
    assert tex("94 ± 1 ≥ é α\n漢") == r"94 $\pm$ 1 $\geq$ é [greek small letter alpha] [cjk unified ideograph-6f22]"  # noqa: RUF001


@given(st.text(string.printable + "±≥αé漢\u0301", max_size=40))
@settings(max_examples=200)
def test_nothing_special_is_left_over(text):
    """Commands of ours taken away, no character of LaTeX's is left."""
    left = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\$\\\w+\$|-\{\}|\{[\[*]\}", "", tex(text))
    assert not re.search(r"[&%$#_{}\\^~<>|`]|--", left)


def test_a_table_in_latex_has_the_rules_of_booktabs():
    lines = latex("a_b", "A % b", ["case", "x (%)"], [["one", "1"], ["[two]", "2"]], ["first", "second"]).splitlines()
    assert lines[1] == r"\begin{table*}"
    assert r"\caption{A \% b}" in lines
    assert r"\label{tab:a-b}" in lines
    start = lines.index(r"\begin{tabular}{lr}")
    assert lines[start + 1 : start + 8] == [
        r"\toprule",
        r"case & x (\%) \\",
        r"\midrule",
        r"one & 1 \\",
        r"{[}two] & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert lines[-4:-2] == [r"first\par", "second"]


def test_nasty_text_compiles_and_is_printed_as_it_is(tmp_path):
    file = tmp_path / "nasty.tex"
    file.write_text(
        latex(NASTY, NASTY, [NASTY[:30], NASTY[30:]], [["[x]", "*"], [NASTY[:30], "é ± ≥ \u03b1"]], [NASTY])
    )
    text = " ".join(compiled(tmp_path, file).split())
    # the font of LaTeX has an underscore that is drawn, and so no letter
    for part in ("50 % & 3 $ of #1 {x} ~ ^ \\ <b> |", "-- --- ?` !` [a] *b* \\input{x} %", "[x] *", "± ≥ [greek"):
        assert part in text.replace("\u02dc", "~").replace("\u02c6", "^")


def test_the_table_of_a_spec_compiles(tmp_path):
    spec = load_spec(write_spec(tmp_path, SPEC.replace("A made-up table", "50 % & _more_ <b>") + REPORTED))
    copy = {"name": "cifar_10", "sha256": "2" * 64, "official": False, "note": "from a mirror | 100 %"}
    runs = {"hap": [fake_run(spec.cases["hap"], seed, data=copy) for seed in spec.seeds]}
    *_, file = tables(spec, runs, tmp_path)
    assert file == tmp_path / "tables" / "table.tex"
    text = file.read_text()
    assert r"\caption{50 \% \& \_more\_ \textless{}b\textgreater{}. [Yu22].}" in text  # a bracket is safe within a line
    assert r"hap & 3 & 95.00 & 61.00 $\pm$ 1.00 & 94.10 $\pm$ 0.10 &" in text
    assert r"reported by GReg-1 (1) & - & 93.36 &" in text
    assert r"cifar\_10 (UNOFFICIAL copy)" in text
    printed = compiled(tmp_path, file)
    assert "61.00 ± 1.00" in printed
    assert "UNOFFICIAL" in printed


def test_every_committed_table_compiles(tmp_path):
    files = sorted((Path(__file__).parents[3] / "results" / "tables").glob("*.tex"))
    if files:
        assert "pruned" in compiled(tmp_path, *files)
