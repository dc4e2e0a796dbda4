# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import numpy as np
import pytest

from m3fm.data import FINDINGS, Study, finding_table
from m3fm.diagnosis import default_phrases
from m3fm.evaluation.label_file import annotate, choose_labels, default_label, find_finding, read_labels

EXAMPLE = Path(__file__).parents[2] / "examples" / "labels_chest.yaml"


def study(number, **findings):
    return Study(f"s{number}", "made_up", "cxr", (), None, {}, findings or None, None, f"patient:{number}")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "labels.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_names_of_every_kind_are_known(write):
    names = "[pneumonia, Pleural Effusion, 肺结核, lung lesion, COVID-19, Pleural_Other]"
    labels = read_labels(write(names))
    findings = ["pneumonia", "pleural_effusion", "tuberculosis", "lung_lesion", "covid_19", "pleural_other"]
    assert [label.finding for label in labels.labels] == [label.name for label in labels.labels] == findings
    assert not labels.exclusive
    assert labels.labels[2].present == default_phrases("tuberculosis", "present")
    assert labels.labels[2].absent == default_phrases("tuberculosis", "absent")


def test_every_finding_is_found_by_all_its_names():
    for key, finding in finding_table().items():
        for name in {key, key.upper(), *finding.names.values(), finding.chexpert or key}:
            assert find_finding(f" {name}  ").key == key
    assert [default_label(finding).name for finding in FINDINGS] == list(FINDINGS)


def test_labels_may_bring_names_and_phrases(write):
    text = """
    exclusive: true
    Pneumonia:
    normal:
      finding: No Finding
      present: {en: [Normal chest., Normal chest.], zh: 胸部正常。}
    """
    labels = read_labels(write(text))
    assert labels.exclusive
    pneumonia, normal = labels.labels
    assert (pneumonia.name, pneumonia.finding) == ("pneumonia", "pneumonia")
    assert (normal.name, normal.finding) == ("normal", "no_finding")
    assert normal.present == {"en": ("Normal chest.",), "zh": ("胸部正常。",)}
    assert normal.absent == default_phrases("no_finding", "absent")


def test_the_example_is_read():
    labels = read_labels(EXAMPLE)
    assert [label.name for label in labels.labels] == ["pneumonia", "pleural_effusion", "tuberculosis", "normal"]
    assert labels.labels[2].absent["en"] == ("No evidence of tuberculosis.",)
    assert labels.labels[2].absent["zh"] == default_phrases("tuberculosis", "absent")["zh"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pneumona]", r"labels.yaml: 'pneumona' is not a known finding; expected for instance pneumonia"),
        ("[肺炎症]", "expected for instance pneumonia"),
        ("[xyzzy]", "expected for instance no_finding, "),
        ("[pneumonia, Pneumonia]", "each name once, got 'pneumonia' more than once"),
        ("[肺炎, pneumonia]", "each name once, got 'pneumonia'"),
        ("{a: {finding: pneumonia}, pneumonia: null}", "each finding once, got 'pneumonia'"),
        ("pneumonia:\nedema:\npneumonia:\n", "each key once, got 'pneumonia' more than once"),
        (
            "pneumonia: {present: {en: [No Pneumonia], zh: [有]}, absent: {en: [no pneumonia.]}}",
            "both present and absent",
        ),
        ("pneumonia: {present: {fr: [oui]}}", "mapping of en, zh, got fr"),
        ("pneumonia: {present: [yes]}", "mapping of en, zh, got list"),
        ("pneumonia: {present: {en: []}}", "one phrase or more"),
        ("pneumonia: {present: {en: [1]}}", "one phrase or more"),
        ("pneumonia: {prompt: {en: [x]}}", "finding, present and absent, got prompt"),
        ("pneumonia: yes", "finding, present and absent, got bool"),
        ("pneumonia: {finding: 3}", "expected finding to be a name"),
        ("[3]", "name of a finding, got 3"),
        ("[]", "a label or more, got 0"),
        ("exclusive: true\npneumonia:\n", "two labels or more, got 1"),
        ("exclusive: perhaps\npneumonia:\n", "true or false, got 'perhaps'"),
        ("pneumonia", "a list of findings or a mapping of labels, got str"),
        ("", "got NoneType"),
        ("[pneumonia", "expected YAML"),
        ("!!python/object/apply:os.system [ls]", "expected YAML"),
    ],
)
def test_files_that_are_not_right_are_refused(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_labels(write(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such label file"):
        read_labels(tmp_path / "none.yaml")


def test_annotations_know_what_is_unknown():
    label = default_label("edema")
    found = annotate([study(0, edema=1.0), study(1, edema=0.0), study(2, mass=1.0), study(3)], label)
    np.testing.assert_array_equal(found, [1, 0, np.nan, np.nan])


def test_labels_that_cannot_be_scored_are_left_out_by_name():
    evaluated = [study(0, edema=1.0, mass=0.0), study(1, edema=0.0, mass=0.0, hernia=1.0)]
    labels, names, skipped = choose_labels(None, evaluated, [], 0)
    assert [label.name for label in labels.labels] == ["edema", "mass", "hernia"]
    assert names == ["edema"]
    assert skipped == {
        "mass": "one class only in the evaluated studies: 0 with it, 2 without",
        "hernia": "one class only in the evaluated studies: 1 with it, 0 without",
    }
    _, names, skipped = choose_labels(["Edema", "pneumonia"], evaluated, [], 0)
    assert names == ["edema"]
    assert skipped == {"pneumonia": "not annotated in the evaluated studies"}
    with pytest.raises(ValueError, match="No label can be scored. mass: one class only.*pneumonia: not annotated"):
        choose_labels(["mass", "pneumonia"], evaluated, [], 0)


def test_labels_without_enough_to_learn_from():
    evaluated = [study(0, edema=1.0, mass=0.0), study(1, edema=0.0, mass=1.0)]
    training = [study(number, edema=float(number % 2), mass=float(number == 2)) for number in range(2, 8)]
    # One rare label of many, as in the paper's table, must not cost the others, asked for by name or not.
    for labels in (None, ["edema", "mass"]):
        _, names, skipped = choose_labels(labels, evaluated, training, 3)
        assert names == ["edema"]
        assert "3 patients of each class, the training part has 1 patients with it and 5 without" in skipped["mass"]
    with pytest.raises(ValueError, match="No label can be scored. mass: learning needs 3 patients of each class"):
        choose_labels(["mass"], evaluated, training, 3)
    assert choose_labels(["edema", "mass"], evaluated, training, "full")[1] == ["edema", "mass"]
    with pytest.raises(ValueError, match="shots=3 needs studies to learn from"):
        choose_labels(None, evaluated, [], 3)


def test_labels_are_names_or_a_file(write):
    evaluated = [study(0, edema=1.0), study(1, edema=0.0)]
    path = write("[Edema]")
    for given in (["edema"], path, str(path), [str(path)]):
        assert choose_labels(given, evaluated, [], 0)[1] == ["edema"]
    with pytest.raises(ValueError, match="edema: no such label file"):
        choose_labels("edema", evaluated, [], 0)
