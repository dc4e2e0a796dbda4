# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig

from m3fm.diagnosis import calibrate, default_diagnosis
from m3fm.diagnosis.calibrate import (
    MIN_PATIENTS,
    ScoredSet,
    calibrate_checkpoint,
    fit_calibrations,
    fit_platt,
    fit_youden,
    measure_calibrations,
)
from m3fm.diagnosis_m3fm import calibrate_logits, logistic

# Its name tells that rows deny tuberculosis by not naming it.
SET = "tb_shenzhen_montgomery_128"
NAN = float("nan")
PHRASES = {"present": {"en": ["A."]}, "absent": {"en": ["B."]}}


def made_up(count=300, slope=0.4, shift=-1.5, seed=0):
    """Logits that are too sure of themselves, and labels."""
    generator = np.random.default_rng(seed)
    logits = np.round(generator.normal(size=count) * 5, 4)
    labels = (generator.random(count) < logistic(slope * logits + shift)).astype(float)
    return labels, logits


def scored_set(name="set", label="tb", **options):
    labels, logits = made_up(**options)
    return ScoredSet(name, list(range(len(labels))), {label: labels}, {label: logits})


def log_loss(labels, logits):
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))


def test_what_made_the_labels_is_found():
    labels, logits = made_up(count=20_000)
    found = fit_platt(labels, logits)
    assert found["scale"] == pytest.approx(0.4, rel=0.05)
    assert found["bias"] == pytest.approx(-1.5, abs=0.1)


def test_it_is_the_optimum_of_the_penalised_loss():
    optimize = pytest.importorskip("scipy.optimize")
    labels, logits = made_up(count=40)
    weights = np.random.default_rng(1).random(40) + 0.5

    def objective(theta):
        values = np.exp(theta[0]) * logits + theta[1]
        return weights @ (np.logaddexp(0, values) - labels * values) + theta[0] ** 2 / 2 + (theta[1] / 3) ** 2 / 2

    expected = optimize.minimize(objective, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    found = fit_platt(labels, logits, weights)
    assert [np.log(found["scale"]), found["bias"]] == pytest.approx(expected.x, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_log_loss_never_grows_and_order_stays(seed):
    labels, logits = made_up(count=30, seed=seed)
    found = fit_platt(labels, logits)
    assert log_loss(labels, calibrate_logits(logits, found)) <= log_loss(labels, logits)
    np.testing.assert_array_equal(np.argsort(logits), np.argsort(calibrate_logits(logits, found)))


def test_logits_that_mislead_lose_their_say_but_keep_their_order():
    labels, logits = made_up(count=400)
    found = fit_platt(labels, -logits)
    assert 0 < found["scale"] < 0.1
    assert logistic(found["bias"]) == pytest.approx(labels.mean(), abs=0.05)


def test_perfect_separation_stays_finite():
    labels = np.repeat([0.0, 1.0], 20)
    found = fit_platt(labels, np.repeat([-1.0, 1.0], 20))
    assert 1 < found["scale"] < 20


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        ([1.0, 1.0], [0.0, 1.0], "one class only"),
        ([1.0, NAN], [0.0, 1.0], "unknown labels"),
        ([1.0, 0.0], [0.0], "one logit a label"),
    ],
)
def test_what_cannot_be_fitted_is_refused(labels, logits, message):
    with pytest.raises(ValueError, match=message):
        fit_platt(labels, logits)


def test_youden_maximises_sensitivity_and_specificity():
    labels, logits = made_up(count=200)
    values = logistic(logits)
    found = fit_youden(labels, values)

    def youden(threshold):
        called = values >= threshold
        return called[labels == 1].mean() + (~called[labels == 0]).mean()

    assert youden(found) == pytest.approx(max(youden(value) for value in values))
    # How frequent the finding is does not matter.
    twice = np.concatenate([labels, np.zeros((labels == 0).sum())])
    assert fit_youden(twice, np.concatenate([values, values[labels == 0]])) == found
    assert fit_youden(np.array([1, 0]), np.array([0.9, 0.1])) == pytest.approx(0.5)


def test_labels_are_calibrated_where_there_are_enough_patients():
    table = {name: dict(PHRASES) for name in ("tb", "rare", "other")}
    labels, logits = made_up(count=100)
    rare = np.where(np.arange(100) < MIN_PATIENTS - 1, 1.0, 0.0)
    unknown = np.full(100, NAN)
    sets = [
        ScoredSet("a", list(range(100)), {"tb": labels, "rare": rare, "other": unknown}, dict.fromkeys(table, logits))
    ]
    fitted, uncalibrated = fit_calibrations(table, sets)
    assert uncalibrated == {
        "rare": "9 patients with it and 91 without, 10 of each are needed",
        "other": "0 patients with it and 0 without, 10 of each are needed",
    }
    assert fitted["rare"]["calibration"] is fitted["other"]["threshold"] is None
    assert fitted["tb"]["calibration"]["scale"] == pytest.approx(0.4, abs=0.15)
    assert fitted["tb"]["fitted_on"] == f"validation parts of a (100 studies, {labels.mean() * 100:.1f} % with it)"
    assert "calibration" not in table["tb"]
    # Many studies of few patients are few.
    same = [ScoredSet("a", [0] * 50 + [1] * 50, {"tb": labels}, {"tb": logits})]
    assert list(fit_calibrations({"tb": dict(PHRASES)}, same)[1]) == ["tb"]


def test_no_set_has_more_say_than_a_hundred_studies():
    large, small = scored_set("large", count=5000, shift=2.0), scored_set("small", count=100, shift=-2.0, seed=1)
    fitted, _ = fit_calibrations({"tb": dict(PHRASES)}, [large, small])
    assert abs(fitted["tb"]["calibration"]["bias"]) < 0.5
    assert "large (5000 studies" in fitted["tb"]["fitted_on"] and "small (100 studies" in fitted["tb"]["fitted_on"]


def test_it_is_measured_on_patients_that_it_never_saw(monkeypatch):
    sets = [scored_set(count=200)]
    fitted, _ = fit_calibrations({"tb": dict(PHRASES)}, sets)
    seen = []
    fit = calibrate._Pooled.fit
    monkeypatch.setattr(calibrate._Pooled, "fit", lambda pooled, chosen: seen.append(chosen) or fit(pooled, chosen))
    measured = measure_calibrations(fitted, sets, num_resamples=50)["tb"]["set"]
    assert len(seen) == 5 and sum(~chosen for chosen in seen).tolist() == [1] * 200
    assert measured["studies"] == 200
    for metric in ("ece", "brier"):
        assert measured["after"][metric]["value"] < measured["before"][metric]["value"]
        assert measured["difference"][metric]["high"] < 0
    assert measured["after"]["auroc"]["value"] == pytest.approx(measured["before"]["auroc"]["value"], abs=0.02)


def test_a_stored_calibration_leaves_the_ranking_as_it_was():
    sets = [scored_set()]
    fitted, _ = fit_calibrations({"tb": dict(PHRASES)}, sets)
    labels, logits = sets[0].annotations["tb"], sets[0].logits["tb"]
    calibrated = logistic(calibrate_logits(logits, fitted["tb"]["calibration"]))
    order = np.argsort(logistic(logits), kind="stable")
    np.testing.assert_array_equal(order, np.argsort(calibrated, kind="stable"))
    called = calibrated >= fitted["tb"]["threshold"]
    assert called[labels == 1].mean() + (~called[labels == 0]).mean() > 1.5


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / SET
    folder.mkdir()
    generator, rows = np.random.default_rng(0), []
    for number in range(2 * MIN_PATIENTS + 4):
        split = "validation" if number < 2 * MIN_PATIENTS else "train"
        # Written so that one kind of image is bright: the tiny model is random, and may see that or not.
        pixels = generator.integers(256, size=(32, 32), dtype=np.uint8) // (1 + number % 2)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        labels = ["Tuberculosis"] if number % 2 else ["No Finding"]
        row = {"file_name": f"{number}.png", "modality": "cxr", "split": split, "labels": labels}
        rows.append(row | {"patient_id": f"secret-{number}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_a_checkpoint_is_copied_with_its_calibration(tiny_checkpoint, data, tmp_path):
    (tiny_checkpoint / "optimizer.pt").write_bytes(b"x")
    before = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    facts = calibrate_checkpoint(tiny_checkpoint, [data], tmp_path / "out", num_resamples=20)
    assert list(facts["calibrated"]) == ["no_finding", "tuberculosis"]
    assert len(facts["uncalibrated"]) == len(default_diagnosis()) - 2
    assert list(facts["measured"]["tuberculosis"]) == [SET]
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} == before
    assert set(written) == set(before) - {"optimizer.pt"}
    assert [name for name in written if written[name] != before[name]] == ["config.json"]
    old, new = (json.loads(each["config.json"]) for each in (before, written))
    table = new.pop("diagnosis")
    old.pop("diagnosis", None)
    assert old == new
    assert table["tuberculosis"]["fitted_on"] == f"validation parts of {SET} (20 studies, 50.0 % with it)"
    assert "肺结核" in written["config.json"].decode()
    assert "secret" not in json.dumps(facts) + written["config.json"].decode()
    assert AutoConfig.from_pretrained(tmp_path / "out").diagnosis == table
    # Its own labels are what a calibrated checkpoint is calibrated by.
    again = calibrate_checkpoint(tmp_path / "out", [data], tmp_path / "again", num_resamples=20)
    assert again["calibrated"] == facts["calibrated"]


def test_what_does_not_fit_is_refused(tiny_checkpoint, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ValueError, match="full is not an empty folder"):
        calibrate_checkpoint(tiny_checkpoint, [data], tmp_path / "full")
    with pytest.raises(ValueError, match="data folders of different names, got"):
        calibrate_checkpoint(tiny_checkpoint, [data, data], tmp_path / "out")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    few = "".join(json.dumps(row) + "\n" for row in rows[:6])
    (data / "metadata.jsonl").write_text(few, encoding="utf-8")
    with pytest.raises(ValueError, match="No label can be calibrated"):
        calibrate_checkpoint(tiny_checkpoint, [data], tmp_path / "out")
    (data / "metadata.jsonl").write_text(json.dumps(rows[-1] | {"labels": None}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no annotated studies with images in the part 'validation'"):
        calibrate_checkpoint(tiny_checkpoint, [data], tmp_path / "out")
    assert not (tmp_path / "out").exists()
