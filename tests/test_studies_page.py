"""The page of the studies in a real browser, on results that no cell was run for."""

import csv
import re

import pytest

import study_results
from batchnorm import BatchNormError
from batchnorm.views import activations, studies_page, study_charts
from batchnorm.views.words import LANGUAGES, Words
from browsing import HOSTILE, Opened, contrast, launched, luminance  # noqa: F401  # a fixture
from processes import command


def save(folder, *made, language="en"):
    study_results.write(folder, *made)
    studies_page.report(folder, Words(language))
    return folder / studies_page.PAGE


def open_every(page):
    """Open each study with the keyboard, and wait until its charts are drawn."""
    for study in page.locator("details[data-study]").all():
        study.locator(":scope > summary").press("Enter")
    page.wait_for_function(
        "[...document.querySelectorAll('details[data-study]')]"
        ".every(study => study.dataset.drawn === 'yes')"
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("width", [320, 1200])
def test_every_study_opens_into_its_charts(browser, tmp_path, width, language):
    with Opened(browser, save(tmp_path, language=language), width=width) as page:
        assert page.locator("svg.marks").count() == 0
        open_every(page)
        charts = page.locator("[data-chart]")
        assert charts.count() == 1 + 2 + 1  # log gradient; accuracy and loss; the grid
        for chart in charts.all():
            assert chart.locator("svg").count() == 1, chart.get_attribute("data-chart")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        said = page.locator("main").inner_text()
        assert bool(re.search("[\u4e00-\u9fff]", said)) == (language == "zh")
        assert page.locator("html").get_attribute("lang") == ("zh-CN" if language == "zh" else "en")


def test_it_says_the_verdicts_and_the_numbers_of_the_record(browser, tmp_path):
    with Opened(browser, save(tmp_path)) as page:
        counts = "4 claims in 2 studies: 2 supported, 1 contradicted, 1 inconclusive."
        assert page.locator(".verdict p").first.inner_text() == counts
        row = page.get_by_role("row", name="It is higher.")
        for text in (
            "✓ supported",
            "[0.05 … 0.15]",
            "claimed: above 0",
            "arm batch: learning rate 1",
        ):
            assert text in row.inner_text()
        assert page.get_by_role("row", name="It is sooner.").get_by_text("✗ contradicted").count()
        open_every(page)
        best = (
            page.locator("details[data-study=study-rates]")
            .get_by_role("row")
            .filter(has_text="learning rate 10")
        )
        assert "0.860 ± 0.010" in best.nth(1).inner_text()


def test_without_scripts_the_effects_and_the_numbers_are_there(browser, tmp_path):
    path = save(tmp_path)
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("svg.strip").count() == 4
    assert "drawn by a script" in page.locator("noscript").inner_text()
    page.locator("summary").first.click()
    assert page.get_by_text("1.200 ± 0.000").is_visible()
    context.close()


def test_an_effect_stands_where_its_numbers_say():
    question = study_results.trainings()["questions"][0]  # seeds .07, .1, .13; [.05, .15]; from 0
    drawn = studies_page.strip(question)
    scale = studies_page.WIDTH / (0.15 * (1 + 2 * studies_page.MARGIN))

    def at(value):
        return pytest.approx((value + 0.15 * studies_page.MARGIN) * scale, abs=0.06)

    assert drawn.effect == at(0.1)
    assert drawn.dots == [at(0.07), at(0.1), at(0.13)]
    assert drawn.interval == (at(0.05), at(0.15))
    assert drawn.claimed == (at(0), studies_page.WIDTH)
    assert drawn.bounds == [at(0)]


def test_a_question_without_a_number_is_drawn_empty(browser, tmp_path):
    result = study_results.probes(cells=[], missing=["a"])
    result["questions"][0] |= {
        "effect": None, "interval": None, "p": None, "p_adjusted": None, "per_seed": {},
        "verdict": "inconclusive", "exploratory": True, "points": {},
    }  # fmt: skip
    with Opened(browser, save(tmp_path, result)) as page:
        open_every(page)
        assert "1 cells failed or were not run" in page.locator("main").inner_text()
        assert "exploratory" in page.locator(".verdict").inner_text()
        assert page.locator("svg.strip circle").count() == 0


def rows_of(spec):
    (rows,) = spec["datasets"].values()
    return rows


def test_the_mean_goes_as_far_as_every_seed_goes():
    result = study_results.trainings()
    short = next(c for c in result["cells"] if (c["arm"], c["seed"]) == ("batch", 2))
    short["curves"] = {name: values[:2] for name, values in short["curves"].items()}
    rows = rows_of(study_charts.curves(result, Words())["test_accuracy"])
    where = study_charts.place(short["point"], Words())
    mean = {
        row["x"]: row for row in rows
        if (row["arm"], row["place"], row["seed"]) == ("arm batch", where, None)
    }  # fmt: skip
    assert list(mean) == [0, 1]
    by_hand = [study_results.accuracy("batch", 0.1, seed, 1.0) for seed in study_results.SEEDS]
    assert mean[1]["y"] == pytest.approx(sum(by_hand) / 3, abs=1e-4)
    assert mean[1]["high"] - mean[1]["y"] == pytest.approx(0.01, abs=1e-4)  # their deviation


def test_the_grid_holds_the_means():
    quantity, spec = study_charts.heat(study_results.trainings(), Words())
    assert quantity == "test_accuracy"
    found = {(r["arm"], r["place"]): r["mean"] for r in rows_of(spec)}
    assert len(found) == 6
    assert found["arm batch", "learning rate 10.0"] == pytest.approx(0.86)
    assert found["arm none", "learning rate 10.0"] == pytest.approx(0.11)
    assert study_charts.heat(study_results.probes(), Words()) is None


def test_another_place_in_the_grid_draws_other_curves(browser, tmp_path):
    with Opened(browser, save(tmp_path)) as page:
        open_every(page)
        lines = "() => [...document.querySelectorAll('[data-chart=\"curve-1-0\"] .mark-line path')]"
        before = page.evaluate(f"({lines})().map(p => p.getAttribute('d')).join()")
        page.locator('select[name="place"]').select_option("learning rate 10.0")
        page.wait_for_function(
            f"before => ({lines})().map(p => p.getAttribute('d')).join() !== before", arg=before
        )


# what goes into a layer


def test_the_histogram_has_the_share_of_the_values_between_percentiles():
    rows = max(activations.moving(study_results.flows(), Words())["datasets"].values(), key=len)
    where = ("arm batch", "learning rate 1.0", 10)
    bars = [row for row in rows if (row["arm"], row["place"], row["step"]) == where]
    # uniform from −11 to 11, shifted by the seeds' mean of 1: a density of 1/22 throughout
    assert bars[0]["from"] == pytest.approx(-11 * 0.98 + 1)
    assert bars[-1]["to"] == pytest.approx(11 * 0.98 + 1)
    assert [bar["density"] for bar in bars] == pytest.approx([1 / 22] * 10, rel=1e-4)
    assert sum(b["density"] * (b["to"] - b["from"]) for b in bars) == pytest.approx(0.98, rel=1e-3)


def test_scales_are_those_of_the_place_that_is_shown():
    specs = activations.fans(study_results.flows(), Words())
    assert list(specs) == [(u, a) for u in ("all units", "one unit") for a in ("none", "batch")]
    ends = {p["name"]: p["value"] for p in specs["one unit", "batch"]["params"]}["ends"]
    assert ends["learning rate 1.0"] == pytest.approx([-0.7 * 21, 0.7 * 21])
    assert ends["learning rate 10.0"] == pytest.approx([-70, 70])


def test_a_moment_that_a_seed_lacks_is_left_out():
    result = study_results.flows()
    result["cells"][1]["curves"]["percentile 99"][2] = None  # batch at rate 1, diverged
    rows = max(activations.moving(result, Words())["datasets"].values(), key=len)
    steps = {(row["arm"], row["step"]) for row in rows if row["place"] == "learning rate 1.0"}
    assert steps == {(f"arm {arm}", step) for arm in ("none", "batch") for step in (0, 10, 20)} - {
        ("arm batch", 20)
    }


BARS = "[...document.querySelectorAll('[data-chart=\"curve-0-flow\"] .mark-rect path')]"


def test_the_flow_is_whole_as_it_stands_and_moves_when_played(browser, tmp_path):
    with Opened(browser, save(tmp_path, study_results.flows())) as page:
        open_every(page)
        for index in range(4):
            fan = page.locator(f'[data-chart="curve-0-flow-{index}"]')
            assert fan.locator(".mark-area path").count() == (5 if index < 2 else 1)
            assert fan.locator(".mark-line path").count() == 1
        drawn = f"() => {BARS}.map(bar => bar.getAttribute('d')).join()"
        last = page.evaluate(drawn)
        assert last
        page.locator('input[name="moment"]').fill("0")
        page.wait_for_function(f"last => ({drawn})() !== last", arg=last)
        assert page.locator("output").inner_text() == "0"
        page.get_by_role("button", name="Play").click()
        page.wait_for_function(f"last => ({drawn})() === last", arg=last)  # it ends at the end


def test_who_asked_for_less_motion_moves_the_slider_alone(browser, tmp_path):
    path = save(tmp_path, study_results.flows())
    with Opened(browser, path, reduced_motion="reduce") as page:
        open_every(page)
        assert page.get_by_role("button", name="Play").count() == 0
        assert page.locator('input[name="moment"]').is_visible()


def test_every_column_of_the_grid_has_its_name():
    _, spec = study_charts.heat(study_results.trainings(), Words())
    axis = spec["layer"][0]["encoding"]["x"]["axis"]
    assert not axis["labelOverlap"]
    assert '"arm batch": ["arm batch"]' in axis["labelExpr"]


def test_curves_open_where_most_questions_look():
    result = study_results.trainings()
    assert study_charts.opening(result, Words()) == "learning rate 1.0"
    assert study_charts.opening(study_results.probes(), Words()) == ""


def test_a_curve_of_one_point_is_no_chart():
    result = study_results.trainings()
    for cell in result["cells"]:
        cell["curves"]["train_loss"] = [None, 1.5, None][: len(cell["curves"]["epoch"])]
    assert list(study_charts.curves(result, Words())) == ["test_accuracy"]


def test_curves_are_drawn_against_the_axis_that_they_name():
    result = study_results.probes()
    for cell in result["cells"]:
        cell["curves"] = {"batch_size": [32, 64], "excess_loss": [0.2, 0.1]}
    charts = study_charts.curves(result, Words())
    assert list(charts) == ["excess_loss"]
    assert {row["x"] for row in rows_of(charts["excess_loss"])} == {32, 64}
    assert "images in a batch" in str(charts["excess_loss"])


def test_pictures_and_tables_are_named_for_a_screen_reader(browser, tmp_path):
    with Opened(browser, save(tmp_path)) as page:
        open_every(page)
        name = "effect 0.1, 95% interval 0.05 … 0.15; claimed: above 0"
        assert page.get_by_role("img", name=name).count() == 1
        for svg in page.locator("[data-chart] svg").all():
            assert svg.get_attribute("aria-label") or svg.locator("[aria-label]").count()
        assert page.get_by_role("table", name="It allows larger rates.").count() == 1
        assert page.get_by_role("combobox", name="at").count() == 1


def test_rows_of_a_narrow_page_are_still_rows(browser, tmp_path):
    with Opened(browser, save(tmp_path), width=320) as page:
        assert page.get_by_role("row", name="It is higher.").get_by_role("cell").count() == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_verdict_can_be_read(browser, tmp_path, scheme):
    """WCAG's contrast of 4.5 for text, as the browser resolved the colours."""
    with Opened(browser, save(tmp_path), scheme=scheme) as page:
        resolve = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        paper = luminance(page.evaluate(resolve, "--paper"))
        for name in studies_page.VERDICTS:
            assert contrast(luminance(page.evaluate(resolve, f"--{name}")), paper) >= 4.5


def test_what_a_record_holds_is_inert(browser, tmp_path):
    hostile = study_results.probes(name="a", claim=HOSTILE, curve=HOSTILE, source=HOSTILE)
    hostile["arms"][0]["label"] = {"en": HOSTILE, "zh": HOSTILE}
    hostile["questions"][0]["claim"] = {"en": HOSTILE, "zh": HOSTILE}
    hostile["environment"] = {"processor": HOSTILE}
    for cell in hostile["cells"]:
        cell["values"][HOSTILE] = 1.0
        cell["point"] = {"x": f"{cell['seed'] % 2}{HOSTILE}"}
    path = save(tmp_path, hostile)
    with Opened(browser, path) as page:
        open_every(page)
        assert page.locator("img").count() == 0
        assert page.locator("h2").nth(1).inner_text() == HOSTILE
        assert page.locator("[data-chart] svg").count() == page.locator("[data-chart]").count() == 2
        page.locator('select[name="place"]').select_option(index=1)
    assert HOSTILE not in path.read_text(encoding="utf-8")


def test_arms_beyond_the_known_have_looks_of_their_own():
    arms = ("none", "batch", *map(str, range(8)))
    looks = study_charts.styles(study_results.trainings(arms=arms))
    assert looks["batch"][0] == "batch"
    assert len({key for key, _ in looks.values()}) == 10


def test_report_makes_the_same_page_again(tmp_path):
    path = save(tmp_path)
    first = path.read_bytes()
    path.unlink()
    done = command("report", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(path) in done.stdout.replace("\n", "")
    assert path.read_bytes() == first


def test_the_files_it_links_are_there(browser, tmp_path):
    with Opened(browser, save(tmp_path)) as page:
        links = page.locator("a[href]:not([href^='#'])").all()
        names = {link.get_attribute("href") for link in links}
    assert {"verdicts.csv", "cells.csv"} <= names
    assert all((tmp_path / name).is_file() for name in names)
    with (tmp_path / "cells.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6 + 18


def test_a_folder_without_a_result_is_said(tmp_path):
    with pytest.raises(BatchNormError, match="holds no result of a study"):
        studies_page.report(tmp_path, Words())
