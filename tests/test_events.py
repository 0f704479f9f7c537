"""TensorBoard's event files: what TensorBoard's own reader finds in them is what the record holds."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import records
import study_results
from batchnorm import BatchNormError, studies
from batchnorm.studies import Judged
from batchnorm.views import events
from batchnorm.views.words import Words


def scalars(run):
    """By name: (step, value, when) of each event."""
    found = EventAccumulator(str(run)).Reload()
    return {
        name: [(e.step, e.value, e.wall_time) for e in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def test_a_comparison_has_a_run_a_cell(tmp_path):
    record = records.write(tmp_path / "record", seeds=(0, 1))
    events.of_record(record, tmp_path / "events")
    runs = {
        str(p.parent.relative_to(tmp_path / "events"))
        for p in tmp_path.glob(f"events/**/{events.WRITTEN}")
    }
    assert runs == {f"{arm}/seed-{seed}" for arm in record.arms for seed in (0, 1)}
    cell = record.of("batch")[1]
    found = scalars(tmp_path / "events" / "batch" / "seed-1")
    expected = [(e.step, e.test_accuracy) for e in cell.evaluations]
    assert [(step, pytest.approx(value)) for step, value, _ in found["test_accuracy"]] == expected
    whens = [when for _, _, when in found["test_accuracy"]]
    spent = [e.seconds - cell.evaluations[0].seconds for e in cell.evaluations]
    assert [when - whens[0] for when in whens] == pytest.approx(spent, abs=1e-3)


def test_written_again_it_is_the_same_and_others_files_stay(tmp_path):
    record = records.write(tmp_path / "record")
    events.of_record(record, tmp_path)
    mine = tmp_path / "batch" / "seed-0" / "notes.txt"
    mine.write_text("mine")
    before = scalars(tmp_path / "batch" / "seed-0")
    events.of_record(record, tmp_path)
    assert scalars(tmp_path / "batch" / "seed-0") == before
    assert mine.read_text() == "mine"


def test_a_study_has_its_curves_over_their_steps(tmp_path):
    events.of_results([study_results.flows(), study_results.probes()], tmp_path)
    found = scalars(tmp_path / "flow" / "batch" / "learning-rate-1.0" / "seed-2")
    assert [(step, value) for step, value, _ in found["percentile-50"]] == [
        (0, 2),
        (10, 2),
        (20, 2),
    ]
    assert "step" not in found
    found = scalars(tmp_path / "growth" / "deep" / "seed-0")
    assert [step for step, _, _ in found["log_gradient"]] == [0, 1, 2, 3]


def test_without_tensorboard_it_is_said_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    request = studies.Request(["axes"], "quick", tmp_path / "out", tensorboard=tmp_path)
    with pytest.raises(BatchNormError, match=r"pip install 'batchnorm\[tensorboard\]'"):
        studies.run(request)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("language", "said"), [("en", "✓ "), ("zh", "中文")])
def test_a_notebook_shows_the_verdicts(tmp_path, language, said):
    shown = Judged([study_results.trainings()], tmp_path, Words(language))._repr_html_()
    assert shown.count("<tr>") == 1 + 3
    for text in ("0.05 … 0.15", "0.02", str(tmp_path), Words(language)("contradicted")):
        assert text in shown
    assert (said in shown) == (language == "zh")
