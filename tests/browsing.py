"""A page in a real browser: what it says, what it asks for, whether its colours can be read."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium")  # None: the one that `playwright install` put somewhere
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "</script><img src=http://evil.test/ onerror=alert(1)>{{7*7}}<!--"


@pytest.fixture(scope="module", name="browser")
def launched():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


class Opened:
    """A page, what its console said and which addresses it asked for."""

    def __init__(self, browser, path, width=1200, scheme="light", **context):
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **context
        )
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self):
        self.page.wait_for_selector("body[data-ready]", timeout=60_000)
        return self.page

    def __exit__(self, *exception):
        self.context.close()
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("file:", "data:"))] == []


def rgb(colour):
    digits = colour.removeprefix("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def luminance(colour):
    """WCAG 2's relative luminance."""
    parts = [v / 255 for v in rgb(colour)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
