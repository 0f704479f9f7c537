"""The page in a real browser: it draws, it answers, it asks the network for nothing."""

import re

import pytest

import records
from batchnorm.comparison import report
from batchnorm.lab.arms import ARMS
from batchnorm.lab.record import read
from batchnorm.lab.summary import summarize
from batchnorm.views import page as views_page
from batchnorm.views.words import LANGUAGES, Words
from browsing import HOSTILE, Opened, contrast, launched, luminance, rgb  # noqa: F401  # a fixture

SHAPES = {
    "one seed": {},
    "several seeds": {"seeds": (0, 1, 5)},
    "diverged": {"arms": ("none", "batch", "batch-note"), "diverged": ("batch",)},
    "diverged, several seeds": {"seeds": (0, 1), "diverged": ("none",)},
    "unfinished": {"unfinished": ("batch",)},
    "no batch norm": {"arms": ("none", "group", "layer")},
    "batch norm alone": {"arms": ("batch-torch",)},
    "one evaluation": {"evaluations": 1, "unfinished": ("none", "batch")},
    "every arm": {"arms": tuple(ARMS)},
}


def save(record, folder, language="en"):
    path = folder / "report.html"
    views_page.save(record, path, Words(language))
    return path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_record_is_drawn_without_an_error(browser, tmp_path, shape):
    record = records.write(tmp_path, **shape)
    with Opened(browser, save(record, tmp_path)) as page:
        charts = page.locator("[data-chart]")
        assert charts.count() == int(page.get_attribute("body", "data-ready"))
        for chart in charts.all():
            assert chart.locator("svg").count() == 1, chart.get_attribute("data-chart")


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_says_the_numbers_of_the_record(browser, tmp_path, language):
    record = records.write(tmp_path)
    arms = {arm.arm: arm for arm in summarize(record)}
    with Opened(browser, save(record, tmp_path, language)) as page:
        verdict = page.locator(".verdict").inner_text()
        for value in (
            arms["none"].test_accuracy.mean,
            arms["batch"].test_accuracy.mean,
            arms["batch"].recalibrated_test_accuracy.mean,
        ):
            assert f"{value:.3f}" in verdict
        assert page.locator("html").get_attribute("lang") == ("zh-CN" if language == "zh" else "en")
        assert bool(re.search("[\u4e00-\u9fff]", verdict)) == (language == "zh")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_line_stands_out_from_the_paper(browser, tmp_path, scheme):
    """WCAG's contrast of 3 for graphics, 4.5 for text, as the browser resolved the colours."""
    shape = SHAPES["every arm"]
    with Opened(browser, save(records.write(tmp_path, **shape), tmp_path), scheme=scheme) as page:
        resolve = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        paper = luminance(page.evaluate(resolve, "--paper"))
        assert (paper > 0.5) == (scheme == "light")
        for arm in shape["arms"]:
            assert contrast(luminance(page.evaluate(resolve, f"--{arm}")), paper) >= 3
        for name in ("--ink", "--soft", "--link"):
            assert contrast(luminance(page.evaluate(resolve, name)), paper) >= 4.5
        strokes = page.eval_on_selector_all(
            '[data-chart="accuracy"] .mark-line path',
            "paths => paths.map(p => getComputedStyle(p).stroke)",
        )
        assert {rgb(page.evaluate(resolve, "--none")), rgb(page.evaluate(resolve, "--batch"))} <= {
            tuple(map(int, re.findall(r"\d+", stroke))) for stroke in strokes
        }


def test_lines_are_told_apart_without_colour(browser, tmp_path):
    with Opened(browser, save(records.write(tmp_path), tmp_path)) as page:
        dashes = page.eval_on_selector_all(
            '[data-chart="accuracy"] .mark-line path',
            "paths => paths.map(p => getComputedStyle(p).strokeDasharray)",
        )
        assert len(dashes) == len(set(dashes)) == 3


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_runs_over_the_edge(browser, tmp_path, width):
    record = records.write(tmp_path, **SHAPES["several seeds"])
    with Opened(browser, save(record, tmp_path), width=width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def path_of(page, chart):
    return page.eval_on_selector_all(
        f'[data-chart="{chart}"] .mark-line path', "ps => ps.map(p => p.getAttribute('d'))"
    )


def test_the_keyboard_reaches_every_control_and_each_does_its_work(browser, tmp_path):
    with Opened(browser, save(records.write(tmp_path), tmp_path)) as page:
        names = []
        for _ in range(40):
            page.keyboard.press("Tab")
            names.append(page.evaluate("document.activeElement.name || document.activeElement.id"))
        assert {"until", "axis", "shown", "statistic"} <= set(names)

        whole = path_of(page, "accuracy")
        page.locator('input[name="until"]').focus()
        page.keyboard.press("Home")
        page.wait_for_function(
            "before => document.querySelector('[data-chart=accuracy] .mark-line path')"
            ".getAttribute('d') !== before",
            arg=whole[0],
        )
        assert page.locator("output").inner_text() == "0"

        by_epoch = path_of(page, "curve-train_loss")
        page.locator('select[name="axis"]').select_option("seconds")
        page.wait_for_timeout(200)
        labels = page.locator('[data-chart="curve-train_loss"] .role-axis-label text')
        assert "4.0" in labels.all_text_contents()  # seconds; epochs end at 2
        assert len(path_of(page, "curve-train_loss")) == len(by_epoch) == 2

        page.locator('input[name="shown"][value="none"]').first.uncheck()
        page.wait_for_timeout(200)
        assert len(path_of(page, "curve-train_loss")) == 1
        assert len(path_of(page, "layer-norm1")) == 2, "each section has its own choice"

        page.locator('select[name="statistic"]').select_option("weight")
        page.wait_for_timeout(200)
        assert len(path_of(page, "layer-norm1")) == 1, "the arm `none` has no weight"


def test_play_draws_from_the_start_to_the_end(browser, tmp_path):
    with Opened(browser, save(records.write(tmp_path), tmp_path)) as page:
        page.get_by_role("button", name="Play").click()
        page.wait_for_function("document.querySelector('input[name=until]').valueAsNumber < 1")
        page.wait_for_function("document.querySelector('output').value === '2'", timeout=30_000)


def test_charts_and_tables_are_named_for_a_screen_reader(browser, tmp_path):
    with Opened(browser, save(records.write(tmp_path), tmp_path)) as page:
        for svg in page.locator("[data-chart] svg").all():
            assert svg.get_attribute("aria-label") or svg.locator("[aria-label]").count()
        assert page.get_by_role("img").count() or page.locator("[role=graphics-document]").count()
        tree = page.locator("main").aria_snapshot()
        for heading in ("Is it 0.9?", "The numbers", "Curves", "Inside the layers", "Run it again"):
            assert heading in tree


def test_what_a_record_holds_is_inert(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PLACES", [HOSTILE, "a'b[0]\"$x"])
    record = records.write(tmp_path, network=f"x:{HOSTILE}", data=f"y:{HOSTILE}")
    path = save(record, tmp_path)
    with Opened(browser, path) as page:
        assert page.locator("img").count() == 0
        assert HOSTILE in page.locator("h1").inner_text()
        captions = page.locator("#layers ~ .grid figcaption").all_inner_texts()
        assert captions == [HOSTILE, "a'b[0]\"$x"]
        assert page.locator("[data-chart] svg").count() == page.locator("[data-chart]").count()
    assert HOSTILE not in path.read_text(encoding="utf-8")


def test_without_scripts_the_numbers_are_there(browser, tmp_path):
    path = save(records.write(tmp_path), tmp_path)
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "drawn by a script" in page.locator("noscript").inner_text()
    assert page.locator("table").count() >= 3
    context.close()


def test_the_command_on_the_page_is_the_one_that_made_it(tmp_path):
    record = records.write(
        tmp_path, seeds=(2, 3), batch_size=128, schedule="one-cycle", network="m:f", threads=3
    )
    assert list(views_page.commands(record)) == [
        (
            "batchnorm compare --arms none,batch --seed 2 --seeds 2 --network m:f --batch-size 128 "
            "--schedule one-cycle --threads 3 --initialization xavier-uniform"
        )
    ]


def test_seeds_with_a_gap_need_two_commands(tmp_path):
    commands = list(views_page.commands(records.write(tmp_path, seeds=(0, 1, 5))))
    assert len(commands) == 2
    assert "--seed 0 --seeds 2" in commands[0]
    assert "--seed 5 --seeds 1" in commands[1]


def test_the_same_record_gives_the_same_page(tmp_path):
    records.write(tmp_path)
    report(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert read(tmp_path).cells
