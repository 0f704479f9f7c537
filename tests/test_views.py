"""Pictures and words: what they show is what the record holds, in glyphs that are really drawn."""

import re
import string
from io import StringIO
from itertools import pairwise

import pytest
from matplotlib import font_manager
from PIL import Image, ImageChops

import records
from batchnorm.comparison import Comparison, report
from batchnorm.errors import BatchNormError
from batchnorm.lab.summary import mean_curve
from batchnorm.views import animation, curves, fonts, verdict
from batchnorm.views.console import Console, table
from batchnorm.views.lines import accuracy_lines
from batchnorm.views.terminal import terminal
from batchnorm.views.words import LANGUAGES, PHRASES, Words

EN, ZH = Words("en"), Words("zh")


def fields(phrase):
    return {name for _, name, _, _ in string.Formatter().parse(phrase) if name}


@pytest.mark.parametrize("key", PHRASES)
def test_both_languages_say_the_same_with_the_same_numbers(key):
    english, chinese = PHRASES[key]
    assert fields(english) == fields(chinese)
    assert not re.search("[\u4e00-\u9fff]", english)


def test_an_unknown_language_is_said():
    with pytest.raises(BatchNormError, match="'fr' and should be one of en, zh"):
        Words("fr")


@pytest.mark.parametrize("words", [EN, ZH], ids=LANGUAGES)
def test_the_font_has_every_glyph(words):
    path = font_manager.findfont(fonts.family(words), fallback_to_default=False)
    glyphs = font_manager.get_font(path).get_charmap()
    place = LANGUAGES.index(words.language)
    missing = {c for phrases in PHRASES.values() for c in phrases[place] if ord(c) not in glyphs}
    assert missing <= {"\n"}


def test_a_font_without_the_glyphs_is_not_taken(monkeypatch):
    latin = [e for e in font_manager.fontManager.ttflist if e.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", latin)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    fonts._family.cache_clear()
    try:
        assert fonts.family(EN) == "DejaVu Sans"
        with pytest.raises(BatchNormError, match=r"no font on this machine.*fonts-noto-cjk"):
            fonts.family(ZH)
    finally:
        fonts._family.cache_clear()


def test_a_font_installed_since_matplotlib_looked_is_found(monkeypatch):
    latin = [e for e in font_manager.fontManager.ttflist if e.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", latin)
    fonts._family.cache_clear()
    try:
        assert not fonts.family(ZH).startswith("DejaVu")
    finally:
        fonts._family.cache_clear()


def test_the_mean_ends_where_the_first_seed_diverged(tmp_path):
    record = records.write(tmp_path, arms=("batch",), seeds=(0, 1))
    cells = record.of("batch")
    cells[1].evaluations[3:] = []
    points = mean_curve(cells, "test_accuracy")
    assert [point.epoch for point in points] == [0, 0.5, 1]
    for k, point in enumerate(points):
        expected = (records.accuracy("batch", 0, k) + records.accuracy("batch", 1, k)) / 2
        assert point.value == pytest.approx(expected)


def frames(path):
    with Image.open(path) as picture:
        for index in range(picture.n_frames):
            picture.seek(index)
            yield picture.convert("RGB"), picture.info["duration"]


@pytest.mark.parametrize("words", [EN, ZH], ids=LANGUAGES)
def test_each_frame_draws_more_than_the_one_before(tmp_path, words):
    record = records.write(tmp_path, seeds=(0, 1))
    animation.write(record, tmp_path, words)
    for name in ("without.gif", "with.gif", "compare.gif"):
        shown = list(frames(tmp_path / name))
        assert len(shown) == 5
        for (before, _), (after, _) in pairwise(shown):
            assert ImageChops.difference(before, after).getbbox()
        assert [duration for _, duration in shown] == [250] * 4 + [3000]


def test_a_long_record_has_sixty_frames_and_ends_at_its_end(tmp_path):
    record = records.write(tmp_path, evaluations=200)
    animation.compare(record, tmp_path / "long.gif", EN)
    count = len(list(frames(tmp_path / "long.gif")))
    assert 40 <= count <= 61


def test_the_figure_holds_the_values_of_the_record(tmp_path):
    record = records.write(tmp_path, seeds=(0, 1))
    figure = curves.draw(record, EN)
    accuracy = figure.axes[0]
    thick = {line.get_label(): line.get_ydata() for line in accuracy.get_lines()}
    expected = [line.mean[-1].value for line in accuracy_lines(record, EN)]
    found = [thick[line.label][-1] for line in accuracy_lines(record, EN)]
    assert found == expected


def test_a_diverged_seed_ends_in_a_cross(tmp_path):
    record = records.write(tmp_path, diverged=("batch",))
    figure = curves.draw(record, EN)
    crosses = [line for line in figure.axes[0].get_lines() if line.get_marker() == "x"]
    assert crosses
    assert all(line.get_xdata()[0] == 1 for line in crosses)
    assert "with BN (diverged)" in figure.axes[1].get_legend_handles_labels()[1]


def sentences(folder, **shape):
    return " ".join(verdict.verdict(records.write(folder, **shape), EN))


def test_the_verdict_compares_with_and_without(tmp_path):
    said = sentences(tmp_path)
    none, batch = (records.accuracy(arm, 0, 4) for arm in ("none", "batch"))
    again = records.accuracy("batch", 0, 4, recalibrated=True)
    assert f"at a test accuracy of {again:.3f}" in said
    assert f"({batch:.3f} with the running ones); without it, at {none:.3f}" in said
    assert f"gain over no normalization is {again - none:.3f}; {again - batch:.3f} of it" in said
    assert "One seed: what another seed would give is not known" in said


def test_the_verdict_tells_what_diverged_and_what_is_unfinished(tmp_path):
    said = sentences(tmp_path, seeds=(0, 1), diverged=("batch",), unfinished=("none",))
    assert "with BN: the loss stopped being finite in 2 of 2 seeds" in said
    assert "without BN: 2 of 2 seeds are not finished" in said


def test_the_verdict_of_arms_that_cannot_be_compared_names_each(tmp_path):
    said = sentences(tmp_path, arms=("group", "layer"))
    assert "LeNet with group norm ends at a test accuracy of" in said
    assert "LeNet with layer norm ends at a test accuracy of" in said


def test_is_it_090_answers_with_the_sampling_error(tmp_path):
    answers = {a.quantity: a for a in verdict.is_it(records.write(tmp_path))}
    value = records.accuracy("batch", 0, 4)  # .8853: five errors below
    assert answers["test_accuracy"].number == f"{value:.3f}"
    assert answers["test_accuracy"].error == f"{(value * (1 - value) / 10_000) ** 0.5:.3f}"
    assert answers["test_accuracy"].answer == "no"
    assert answers["recalibrated_test_accuracy"].answer == "yes"
    assert answers["train_accuracy"].error == "0.001"


@pytest.mark.parametrize(
    ("value", "answer"), [(0.9, "yes"), (0.8941, "within"), (0.8937, "no"), (0.95, "yes")]
)
def test_within_is_two_sampling_errors(value, answer):
    assert verdict._answer(value, 10_000) == answer


def test_is_it_090_is_asked_of_the_notes_experiment_alone(tmp_path):
    assert verdict.is_it(records.write(tmp_path, network="m:f")) == []


def rendered(record, words, width):
    from rich.console import Console as Rich

    console = Rich(width=width, record=True, file=StringIO())
    console.print(table(record, words))
    return console.export_text()


@pytest.mark.parametrize("words", [EN, ZH], ids=LANGUAGES)
def test_the_table_fits_80_columns_without_losing_a_number(tmp_path, words):
    text = rendered(records.write(tmp_path), words, 80)
    assert "…" not in text
    for number in (records.accuracy("none", 0, 4), records.accuracy("batch", 0, 4, True)):
        assert f"{number:.3f}" in text


def test_progress_in_a_log_is_a_line_an_evaluation(tmp_path, capsys):
    record = records.write(tmp_path)
    cell = record.of("batch")[0]
    with Console() as console:
        console.start(cell.config, 2350, 0)
        console.step(cell.config, 10, 2.0, 0.2, 20_000.0)
        for evaluation in cell.evaluations:
            console.evaluation(cell.config, evaluation)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(cell.evaluations)
    assert all(line.startswith("with BN, seed 0: epoch") for line in lines)
    assert f"test {cell.last.test_accuracy:.3f}" in lines[-1]
    with Console(quiet=True) as console:
        console.start(cell.config, 2350, 0)
        console.evaluation(cell.config, cell.last)
    assert capsys.readouterr().err == ""


def test_names_are_printed_as_they_are(capsys):
    terminal(soft_wrap=True).print("there is no checkpoint a:x:b.pt, and no layer :fire:")
    assert capsys.readouterr().out == "there is no checkpoint a:x:b.pt, and no layer :fire:\n"


def test_a_bar_ends_with_the_last_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "120")
    cell = records.write(tmp_path).of("batch")[0]
    with Console() as console:
        console.start(cell.config, 2350, 0)
        console.step(cell.config, 10, 2.0, 0.2, 20_000.0)
        for evaluation in cell.evaluations:
            console.evaluation(cell.config, evaluation)
    last = [line for line in capsys.readouterr().err.splitlines() if "seed 0" in line][-1]
    numbers = (cell.last.test_accuracy, cell.last.recalibrated_test_accuracy)
    assert "test " + " ".join(f"{number:.3f}".removeprefix("0") for number in numbers) in last
    assert f" {cell.last.epoch:.1f}/{cell.config.epochs} loss 2.000" in last


def test_a_notebook_shows_the_verdict_and_the_table(tmp_path):
    comparison = Comparison(records.write(tmp_path, network="m:<script>"))
    shown = comparison._repr_html_()
    assert "<table>" in shown
    assert f"{records.accuracy('batch', 0, 4):.3f}" in shown
    assert "<script>" not in shown


def test_report_writes_in_the_language(tmp_path):
    records.write(tmp_path)
    report(tmp_path, language="zh")
    assert 'lang="zh-CN"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    chinese = (tmp_path / "compare.gif").read_bytes()
    report(tmp_path)
    assert (tmp_path / "compare.gif").read_bytes() != chinese
