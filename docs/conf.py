"""The site: the repository's markdown as it stands, and the reference from the docstrings.

The source folder is the repository's root (`sphinx-build -c docs . build/docs`), so that a link which
works on a forge works on the site, and one that is broken here is broken there.
"""

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from typer.cli import get_docs_for_click

import batchnorm
from batchnorm import cli

project = "batchnorm"
version = release = batchnorm.__version__
project_copyright = ""
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "examples/README.md",
    "examples/notebooks/*.ipynb",
]
exclude_patterns = [".*", "build", "demo", "dist", "runs", "src", "tests"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # GitHub's anchors
nb_execution_mode = "off"  # what a notebook printed is committed with it, and a test runs it
default_role = "code"
smartquotes_action = "D"  # dashes alone: quotation marks are meant as they stand

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"batchnorm {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "to-the-first-page.html"}
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

REFERENCE = "docs/reference"
COMMANDS = "docs/commands"
CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def as_restructured(lines: list[str]) -> list[str]:
    """Our docstrings for Sphinx: `code` in single backticks, equations and code in indented blocks."""
    written = []
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        if blank:
            written += paragraph
        elif paragraph[0].startswith("    "):
            written += [f".. code-block:: {_language(paragraph)}", "", *paragraph]
        else:
            written += _escaped("\n".join(paragraph)).split("\n")
    return written


def _language(block: list[str]) -> str:
    code = "\n".join(line.removeprefix("    ") for line in block)
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return "text"
    # a call or a statement; an equation may be an expression, too
    return "python" if any(isinstance(node, ast.Call) for node in ast.walk(tree)) else "text"


def _escaped(text: str) -> str:
    """(N, C, *spatial), |d|, d_ and "C." are meant as they stand; code stays code."""
    parts = CODE.split(text)
    meant = re.compile(r"[*|\\]|_(?!\w)|(?<=: )[A-Z](?=\.$)", re.MULTILINE)
    parts[::2] = [meant.sub(r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(parts)


def on_docstring(
    app: Sphinx, what: str, name: str, subject: object, options: object, lines: list[str]
) -> None:
    """Before napoleon makes fields of Args, Returns and Raises."""
    del app, what, name, subject, options
    lines[:] = as_restructured(lines)


def on_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """A link to a folder leads to its first page; behind the commands' page goes what typer says."""
    here = (app.srcdir / docname).parent
    source[0] = re.sub(
        r"(?<=\]\()[\w./-]+(?=\))", lambda link: _first_page(here, link[0]), source[0]
    )
    if docname == COMMANDS:
        command = typer.main.get_command(cli.app)
        text = get_docs_for_click(
            obj=command, ctx=typer.Context(command), indent=1, name="batchnorm"
        )
        # the lists of commands, cut to 45 letters, in front of the commands themselves
        text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)
        source[0] += re.sub(f"```[^`]+```|{CODE.pattern}|(--[a-z][a-z-]+)", _as_code, text)


def _first_page(here: Path, link: str) -> str:
    folder = here / link
    pages = ["README.md", *sorted(path.name for path in folder.glob("*.ipynb"))]
    there = [f"{link.rstrip('/')}/{page}" for page in pages if (folder / page).is_file()]
    return there[0] if there else link


def _as_code(found: re.Match[str]) -> str:
    """An option that a sentence names is code, too."""
    return f"`{found[2]}`" if found[2] else found[0]


def link_public_names(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """`batchnorm.fold(model)` in a text leads to its place in the reference."""
    name = re.compile(r"(?:batchnorm\.(\w+)|([A-Z]\w+)$|(\w+)\()")
    for code in list(doctree.findall(nodes.literal)):
        found = name.match(code.astext())
        public = found and next(filter(None, found.groups()), "")
        if public not in batchnorm.__all__ or _within(code, nodes.reference, nodes.title):
            continue
        address = app.builder.get_relative_uri(docname, REFERENCE)
        link = nodes.reference(refuri=f"{address}#batchnorm.{public}", internal=True)
        code.replace_self(link)
        link += code


def _within(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    while (node := node.parent) is not None:
        if isinstance(node, kinds):
            return True
    return False


def on_page(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """A Chinese page says that it is one, to browsers and to screen readers."""
    del app, template, doctree
    if Path(pagename).suffix == ".zh-CN":
        context["language"] = "zh-CN"


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("autodoc-process-docstring", on_docstring, priority=400)
    app.connect("source-read", on_source)
    app.connect("doctree-resolved", link_public_names)
    app.connect("html-page-context", on_page)
