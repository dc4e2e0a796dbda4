# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import re

import numpy as np
import pytest

from m3fm.data.labels import (
    FINDINGS,
    canonical_findings,
    finding_sentence,
    finding_table,
    label_sources,
    label_vector,
)

CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_table_describes_exactly_the_findings():
    assert tuple(finding_table()) == FINDINGS
    assert tuple(f.chexpert for f in finding_table().values() if f.chexpert) == CHEXPERT


@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_has_names_and_phrases_in_both_languages(name):
    finding = finding_table()[name]
    for texts in (finding.present, finding.absent):
        assert set(texts) == set(finding.names) == {"en", "zh"}
        assert all(phrase.endswith(".") and not CHINESE.search(phrase) for phrase in texts["en"])
        assert all(phrase.endswith("。") and CHINESE.search(phrase) for phrase in texts["zh"])
        assert not re.search(r"[,.;:?!]", "".join(texts["zh"])), "Chinese phrases use full-width punctuation"
    assert not set(finding.present["zh"]) & set(finding.absent["zh"])
    assert not set(finding.present["en"]) & set(finding.absent["en"])


def test_names_and_phrases_are_unambiguous():
    for language in ("en", "zh"):
        assert len({f.names[language] for f in finding_table().values()}) == len(FINDINGS)
        phrases = [p for f in finding_table().values() for p in f.present[language]]
        assert len(set(phrases)) == len(phrases)


def test_exhaustive_set_denies_what_it_does_not_name():
    findings = canonical_findings(["Effusion", "Pleural_Thickening"], "nih_chestxray14_sample")
    assert findings["pleural_effusion"] == findings["pleural_thickening"] == 1.0
    assert findings["hernia"] == findings["no_finding"] == 0.0
    assert len(findings) == 15
    assert "fracture" not in findings


def test_normal_row_denies_all_that_the_set_annotates():
    findings = canonical_findings(["No Finding"], "nih_chestxray14_sample")
    assert [name for name, value in findings.items() if value] == ["no_finding"]
    assert len(findings) == 15


@pytest.mark.parametrize(
    ("labels", "source", "expected"),
    [
        (["Pneumonia"], "kermany_pneumonia_224", {"no_finding": 0.0, "pneumonia": 1.0}),
        (["No Finding"], "kermany_pneumonia_224", {"no_finding": 1.0, "pneumonia": 0.0}),
        (["Tuberculosis"], "tb_shenzhen_montgomery_128", {"no_finding": 0.0, "tuberculosis": 1.0}),
        (["COVID-19"], "cov_ctr", {"covid_19": 1.0}),
        (["non-COVID"], "cov_ctr", {"covid_19": 0.0}),
        (["CAP"], "covid_ct_md_slices", {"no_finding": 0.0, "pneumonia": 1.0, "covid_19": 0.0}),
        (["Normal"], "covid_ct_md_volumes", {"no_finding": 1.0, "pneumonia": 0.0, "covid_19": 0.0}),
        (["Klebsiella"], "covid_chestxray", {"no_finding": 0.0, "pneumonia": 1.0, "covid_19": 0.0}),
        (["Pleural Effusion"], "chexpert", {"no_finding": 0.0, "pleural_effusion": 1.0}),
        (["No Finding", "Support Devices"], "chexpert", {"no_finding": 1.0, "support_devices": 1.0}),
        (["edema", "Lung Lesion"], "canonical", {"no_finding": 0.0, "edema": 1.0, "lung_lesion": 1.0}),
        ([], "canonical", {}),
    ],
)
def test_translations(labels, source, expected):
    assert canonical_findings(labels, source) == expected


def test_unknown_label_names_the_nearest():
    with pytest.raises(ValueError, match=r"expected a label of nih_chestxray14_sample, got 'Efusion'.*'Effusion'"):
        canonical_findings(["Efusion"], "nih_chestxray14_sample")


def test_unknown_source_lists_the_known():
    with pytest.raises(ValueError, match="unknown label source 'mimic'.*cov_ctr"):
        canonical_findings(["Edema"], "mimic")


def test_a_bare_string_is_refused():
    with pytest.raises(ValueError, match="list of names"):
        canonical_findings("Edema", "chexpert")


@pytest.mark.parametrize("source", label_sources())
def test_every_source_speaks_of_canonical_findings(source):
    assert set(canonical_findings([], source)) <= set(FINDINGS)


def test_label_vector_keeps_unknown_apart_from_absent():
    values, known = label_vector({"edema": 1.0, "mass": 0.0})
    assert values.shape == known.shape == (len(FINDINGS),)
    assert values.dtype == np.float32
    assert known.dtype == bool
    assert values[FINDINGS.index("edema")] == 1.0
    assert [FINDINGS[i] for i in np.flatnonzero(known)] == ["edema", "mass"]
    assert not label_vector(None)[1].any()


def test_label_vector_refuses_other_names():
    with pytest.raises(ValueError, match="'Edema' is not a canonical finding; the nearest is 'edema'"):
        label_vector({"Edema": 1.0})


@pytest.mark.parametrize("language", ["en", "zh"])
def test_sentence_states_what_is_present_and_denies_only_what_is_absent(language):
    table = finding_table()
    findings = canonical_findings(["Effusion", "Mass"], "nih_chestxray14_sample")
    for seed in range(20):
        text = finding_sentence(findings, language, np.random.default_rng(seed))
        for name in ("pleural_effusion", "mass"):
            assert any(phrase in text for phrase in table[name].present[language])
            assert not any(phrase in text for phrase in table[name].absent[language])
        denied = [n for n in FINDINGS if any(phrase in text for phrase in table[n].absent[language])]
        assert denied
        assert all(findings.get(name) == 0.0 for name in denied)


def test_sentence_follows_the_generator():
    findings = canonical_findings(["Effusion", "Mass", "Edema"], "nih_chestxray14_sample")
    texts = [finding_sentence(findings, "en", np.random.default_rng(seed)) for seed in range(30)]
    assert texts == [finding_sentence(findings, "en", np.random.default_rng(seed)) for seed in range(30)]
    assert len(set(texts)) > 10


def test_sentence_of_a_normal_study_is_a_normal_phrase():
    findings = canonical_findings(["No Finding"], "nih_chestxray14_sample")
    for language in ("en", "zh"):
        text = finding_sentence(findings, language, np.random.default_rng(0))
        assert text in finding_table()["no_finding"].present[language]


def test_chinese_sentences_are_joined_without_a_space():
    assert " " not in finding_sentence({"mass": 1.0, "edema": 1.0}, "zh", np.random.default_rng(0))


def test_sentence_refuses_what_it_cannot_say():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="language must be one of en, zh, got 'fr'"):
        finding_sentence({"mass": 1.0}, "fr", rng)
    with pytest.raises(ValueError, match="at least one known finding"):
        finding_sentence({}, "en", rng)
    assert finding_sentence({"no_finding": 0.0}, "en", rng) == "The examination is abnormal."
