"""The site: built strictly and offline, every link leads somewhere, every public name is told of once."""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import get_overloads
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer

import batchnorm
import tiny
from batchnorm import cli
from browsing import contrast, launched, luminance  # noqa: F401  # a fixture

ROOT = Path(__file__).parent.parent
OUTSIDE = ("http:", "https:", "mailto:", "data:", "javascript:")
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """A page's anchors, links and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.names = set(), [], [], []
        self.language = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()
        if tag == "html":
            self.language = found.get("lang")
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "dt" and found.get("id"):
            self.names.append(found["id"])
        if LOADS.get(tag) in found and found.get("rel") not in ("canonical", "search", "index"):
            self.loads.append(found[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of `make docs`; the proxy leads nowhere, so that a build which asks the network fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs"]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(
        [*command, "-d", folder / "doctrees", ".", folder / "html"],
        cwd=ROOT,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def leads_nowhere(path, link, pages):
    address = urlsplit(link)
    target = (path.parent / unquote(address.path)).resolve() if address.path else path
    if not target.is_file():
        return True
    anchor = unquote(address.fragment)
    return bool(anchor) and target in pages and anchor not in pages[target].ids


def test_every_link_and_anchor_is_there(pages):
    inside = [
        (path, link)
        for path, page in pages.items()
        for link in page.links + page.loads
        if not link.startswith(OUTSIDE)
    ]
    broken = [(path.name, link) for path, link in inside if leads_nowhere(path, link, pages)]
    assert len(inside) > 1000
    assert broken == []


def test_the_repository_s_own_pages_are_on_it(site, pages):
    """Whoever follows a link of theirs is checked above."""
    markdown = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples/README.md"]
    assert len(markdown) > 15
    for path in markdown:
        assert site / path.relative_to(ROOT).with_suffix(".html") in pages, path


def test_every_page_is_in_the_contents(site, pages):
    sidebar = Page(site / "docs/index.html").links
    named = {(site / "docs" / urlsplit(link).path).resolve() for link in sidebar}
    extra = {site / name for name in ("index.html", "search.html", "genindex.html")}
    assert set(pages) - named - extra - {site / "docs/index.html"} == set()


def test_nothing_is_asked_of_the_network(pages):
    for path, page in pages.items():
        assert [link for link in page.loads if link.startswith(("http", "//"))] == [], path


def test_a_chinese_page_says_so(site, pages):
    assert pages[site / "README.zh-CN.html"].language == "zh-CN"
    assert pages[site / "README.html"].language == "en"


def test_each_public_name_stands_once_in_the_reference_and_no_other(site):
    names = Page(site / "docs/reference.html").names
    of_the_library = [name for name in names if name.count(".") == 1]
    assert sorted(of_the_library) == sorted(f"batchnorm.{name}" for name in batchnorm.__all__)
    assert [name for name in names if name.rpartition(".")[2].startswith("_")] == []
    assert all(name.split(".")[1] in batchnorm.__all__ for name in names)


def test_docstrings_are_drawn_as_they_are_meant(site):
    """Code in backticks is code, equations keep their lines, (N, C, *spatial) its star."""
    html = (site / "docs/reference.html").read_text(encoding="utf-8")
    assert "(N, C, *spatial), any rank from 2, a floating dtype." in html
    assert (
        "<pre><span></span>running ← (1 − momentum) · running + momentum · batch,\n</pre>" in html
    )
    assert html.count('class="highlight-python') >= 3  # of code in docstrings, not of equations
    assert "<strong>num_features</strong> – C.</p>" in html  # no list that starts at C
    assert "`" not in html.partition("<article")[2].partition("</article>")[0]


@pytest.mark.parametrize("name", batchnorm.__all__)
def test_a_public_name_is_documented_and_typed(name):
    subject = getattr(batchnorm, name)
    doc = vars(subject).get("__doc__") if inspect.isclass(subject) else subject.__doc__
    assert doc, "a docstring of its own"
    assert subject.__module__.startswith("batchnorm"), "its home is this library"
    for function in functions_of(subject):
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        untyped = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
        assert untyped == [], function.__qualname__
        if function.__name__ != "__init__":
            assert signature.return_annotation is not inspect.Signature.empty, function.__qualname__


def functions_of(subject):
    """Itself; or a class's own constructor, and what it adds for others to call."""
    if inspect.isfunction(subject):
        return [subject, *get_overloads(subject)]
    own = [
        value
        for kind in subject.__mro__
        if kind.__module__.startswith("batchnorm")
        for name, value in vars(kind).items()
        if name == "__init__" or not name.startswith("_")
    ]
    own = [value.fget if isinstance(value, property) else value for value in own]
    return [value for value in own if inspect.isfunction(value)]


def commands_of(command, path):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands_of(inner, f"{path} {name}")


def test_every_command_and_option_is_told_of(site):
    html = (site / "docs/commands.html").read_text(encoding="utf-8")
    assert "in place of <code" in html  # the option --input, with both its dashes
    assert re.search("–[a-z]", html) is None
    command = typer.main.get_command(cli.app)
    for path in commands_of(command, "batchnorm"):
        assert f'id="{path.replace(" ", "-")}"' in html, path
    for inner in command.commands.values():
        for parameter in inner.params:
            assert max(parameter.opts, key=len) in html, (inner.name, parameter.opts)


def test_what_not_to_use_it_for_runs():
    text = (ROOT / "docs/when-not.md").read_text(encoding="utf-8")
    code = "\n".join(part.partition("```")[0] for part in text.split("```python\n")[1:])
    model, images = tiny.network(), tiny.as_images().test_images
    names = {"batchnorm": batchnorm, "model": model, "images": images, "loader": images.split(32)}
    exec(compile(code, "docs/when-not.md", "exec"), names)  # noqa: S102  # our own page
    assert any(isinstance(module, torch.nn.GroupNorm) for module in model.modules())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_every_page_whole(browser, site, pages, width, scheme):
    """No page is wider than the screen, says a word to the console, or asks for anything."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for path in sorted(set(pages) - {site / "index.html"}):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
        colours = page.evaluate(
            "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
        )
        ink, paper = (luminance(to_hex(colour)) for colour in colours)
        assert (paper > ink) == (scheme == "light")
        assert contrast(ink, paper) >= 7
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def to_hex(colour):
    """rgb(255, 255, 255) -> #ffffff."""
    return "#" + "".join(f"{int(part):02x}" for part in colour.strip("rgb()").split(","))
