# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3fm.data.labels import FINDINGS, canonical_findings, label_names, label_sources, shared_findings
from m3fm.data.schema import LabelState

POSITIVE, NEGATIVE, UNCERTAIN, UNMENTIONED = (
    LabelState.POSITIVE,
    LabelState.NEGATIVE,
    LabelState.UNCERTAIN,
    LabelState.UNMENTIONED,
)
# What says nothing against a normal study.
COMPATIBLE = {"no_finding", "support_devices", "covid_19"}


def test_chexpert_states_go_over_one_by_one():
    stated = shared_findings(
        {"Edema": UNCERTAIN, "Pneumothorax": NEGATIVE, "Fracture": UNMENTIONED, "Support Devices": POSITIVE},
        "chexpert",
    )
    assert stated == {"edema": UNCERTAIN, "pneumothorax": NEGATIVE, "support_devices": POSITIVE}
    assert list(stated) == ["edema", "pneumothorax", "support_devices"]  # in the order of FINDINGS


def test_nothing_is_said_of_nothing():
    assert shared_findings({}, "chexpert") == {}
    assert shared_findings(dict.fromkeys(label_names("chexpert"), UNMENTIONED), "chexpert") == {}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"Edema": POSITIVE}, NEGATIVE),
        ({"Edema": POSITIVE, "No Finding": POSITIVE}, NEGATIVE),  # a labeller may say both
        ({"No Finding": POSITIVE}, POSITIVE),
        ({"No Finding": POSITIVE, "Support Devices": POSITIVE}, POSITIVE),  # a device is no disease
        ({"No Finding": NEGATIVE}, NEGATIVE),
        ({"Edema": UNCERTAIN}, None),
        ({"Edema": NEGATIVE}, None),
        ({"Support Devices": POSITIVE}, None),
    ],
)
def test_no_finding(labels, expected):
    assert shared_findings(labels, "chexpert").get("no_finding") is expected


def test_finding_that_several_labels_mean():
    def pneumonia(**labels: LabelState) -> LabelState | None:
        return shared_findings(labels, "covid_chestxray").get("pneumonia")

    assert pneumonia(Viral=POSITIVE, Bacterial=NEGATIVE) is POSITIVE
    assert pneumonia(Viral=UNCERTAIN, Bacterial=NEGATIVE) is UNCERTAIN
    # One kind denied leaves the others open.
    assert pneumonia(Viral=NEGATIVE) is None
    means = [name for name in label_names("covid_chestxray") if pneumonia(**{name: POSITIVE}) is POSITIVE]
    assert len(means) > 20
    assert pneumonia(**dict.fromkeys(means, NEGATIVE)) is NEGATIVE


def test_label_that_denies():
    assert shared_findings({"non-COVID": POSITIVE}, "cov_ctr") == {"covid_19": NEGATIVE}
    # A denial in doubt, or denied, says nothing.
    assert shared_findings({"non-COVID": UNCERTAIN}, "cov_ctr") == {}
    assert shared_findings({"non-COVID": NEGATIVE}, "cov_ctr") == {}
    # What is seen outweighs what denies it.
    assert shared_findings({"COVID-19": POSITIVE, "non-COVID": POSITIVE}, "cov_ctr") == {"covid_19": POSITIVE}
    assert shared_findings({"Other lesion": POSITIVE}, "vindr") == {"no_finding": NEGATIVE}


def test_label_that_means_two_findings():
    stated = shared_findings({"Lung Opacity": POSITIVE}, "rsna")
    assert stated["lung_opacity"] is stated["pneumonia"] is POSITIVE
    assert stated["no_finding"] is NEGATIVE


def test_label_that_means_none():
    assert shared_findings({"Unknown": POSITIVE}, "covid_chestxray") == {}


def test_unknown_label_and_source():
    with pytest.raises(ValueError, match="expected a label of chexpert, got 'Oedema'; the nearest it has is 'Edema'"):
        shared_findings({"Oedema": NEGATIVE}, "chexpert")
    with pytest.raises(ValueError, match="unknown label source 'chexpertt'"):
        shared_findings({}, "chexpertt")


def test_a_report_where_a_label_was_expected_is_not_shown():
    with pytest.raises(ValueError, match="got a text of 28 characters; the nearest it has is") as error:
        shared_findings({"Clear lungs, no effusion, P1": POSITIVE}, "chexpert")
    with pytest.raises(ValueError, match="must be a list of names, got a text of 28 characters"):
        canonical_findings("Clear lungs, no effusion, P1", "chexpert")
    assert "Clear" not in str(error.value)


@pytest.mark.parametrize("source", label_sources())
def test_every_label_of_a_source_is_taken(source):
    for label in label_names(source):
        stated = shared_findings({label: POSITIVE}, source)
        assert set(stated) <= set(FINDINGS)
        # What a label means is told in both ways alike.
        said = {name: value for name, value in canonical_findings([label], source).items() if value}
        assert {name for name, state in stated.items() if state is POSITIVE} == set(said)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rules_hold_for_any_states(data):
    source = data.draw(st.sampled_from(label_sources()))
    names = sorted(label_names(source))
    labels = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(list(LabelState)), max_size=8))
    stated = shared_findings(labels, source)
    assert UNMENTIONED not in stated.values()
    assert list(stated) == [name for name in FINDINGS if name in stated]
    positive = {name for name, state in stated.items() if state is POSITIVE}
    assert not (positive - COMPATIBLE and stated.get("no_finding") is not NEGATIVE)
    # Neither the order of labels nor those that are unmentioned count.
    said = {name: state for name, state in reversed(labels.items()) if state is not UNMENTIONED}
    assert shared_findings(said, source) == stated
    # A label that turns positive takes no other finding away.
    label = data.draw(st.sampled_from(names))
    more = shared_findings({**labels, label: POSITIVE}, source)
    assert positive - {"no_finding"} <= {name for name, state in more.items() if state is POSITIVE}
