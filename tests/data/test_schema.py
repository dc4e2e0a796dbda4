# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Records as rows of `datasets` and of Parquet files, and back."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3fm.data.opening import OpenSet
from m3fm.data.schema import (
    LANGUAGES,
    MODALITIES,
    Box,
    ImageFile,
    LabelState,
    Mask,
    ReportText,
    StudyRecord,
    features,
)
from m3fm.data.sets import cov_ctr, iu_xray
from m3fm.data.tables import Reading

FULL = StudyRecord(
    study_id="SECRET-STUDY",
    source="made_up",
    modality="cxr",
    patient_id="SECRET-PATIENT",
    documents=("doi:10.1/SECRET", "url:https://example.org/SECRET"),
    images=(
        ImageFile(Path("SECRET/a.png"), view="PA"),
        ImageFile(Path("SECRET/b.png"), data=b"\x89PNG\x00SECRET", view=None),
        ImageFile(None, data=b"SECRET", view="LATERAL"),
    ),
    reports={
        "en": ReportText("Clear SECRET. No effusion.", "Clear SECRET.", "No effusion.", "FINDINGS: Clear\nSECRET."),
        "zh": ReportText("双肺清晰。", raw="双肺清晰｡", is_translated=True),
    },
    labels={state.value: state for state in LabelState},
    findings={"pneumonia": LabelState.UNCERTAIN, "no_finding": LabelState.NEGATIVE},
    boxes=(Box("Mass", 1.5, 2.0, 30.25, 40.0, image=1, reader="R1"), Box("Mass", 0.0, 0.0, 1.0, 1.0)),
    masks=(Mask("Pneumothorax", "10 2 30 4", image=2), Mask("Pneumothorax", "")),
    age=61.5,
    sex="F",
    split="train",
    licence="CC BY 4.0",
)
EMPTY = StudyRecord("s", "made_up", "ct")
# A text that cleaning left nothing of, an image of which nothing is known, and negative or unsaid labels alone.
SPARSE = StudyRecord(
    "t",
    "made_up",
    "ct",
    images=(ImageFile(Path("a.nii.gz")),),
    reports={"zh": ReportText("", raw="XXXX")},
    labels={"A": LabelState.UNMENTIONED},
    findings={"edema": LabelState.NEGATIVE},
    age=0.0,
)
RECORDS = (FULL, EMPTY, SPARSE)


def table(records=RECORDS) -> datasets.Dataset:
    rows = [record.as_row() for record in records]
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features()}, features=features())


def test_a_row_has_the_columns_of_the_schema():
    schema = features()
    for record in RECORDS:
        row = record.as_row()
        assert list(row) == list(schema)
        assert all(list(state) == ["name", "state"] for state in row["labels"] + row["findings"])
        assert all(list(box) == list(schema["boxes"].feature) for box in row["boxes"])
        assert all(list(mask) == list(schema["masks"].feature) for mask in row["masks"])
    assert {f"report_{language}" for language in LANGUAGES} <= set(schema)
    # All that a record says is in the row: `reports` and `views` in columns of their own.
    assert {each.name for each in fields(StudyRecord)} - set(schema) == {"reports"}


@pytest.mark.parametrize("record", RECORDS, ids=["full", "empty", "sparse"])
def test_a_row_is_the_record(record):
    assert StudyRecord.from_row(record.as_row()) == record


def test_through_a_dataset():
    rows = table()
    assert rows.features == features()
    assert rows[0]["labels"][3] == {"name": "positive", "state": 3}  # numbers there, names in rows of records
    assert [StudyRecord.from_row(row) for row in rows] == list(RECORDS)


def test_through_a_stream():
    stream = datasets.IterableDataset.from_generator(lambda: (each.as_row() for each in RECORDS), features=features())
    assert stream.features == features()
    assert [StudyRecord.from_row(row) for row in stream] == list(RECORDS)
    assert [StudyRecord.from_row(row) for row in stream] == list(RECORDS)


def test_through_a_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    # An image that is only a path stays one: no file of it is there to be read.
    pq.write_table(table().data.table, path)
    read = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert read.features == features()
    assert [StudyRecord.from_row(row) for row in read] == list(RECORDS)
    # Without `datasets`, as pyarrow has them.
    assert [StudyRecord.from_row(row) for row in pq.read_table(path).to_pylist()] == list(RECORDS)
    # Readers of other programs get the schema with the file.
    assert "huggingface" in json.dumps([key.decode() for key in pq.read_schema(path).metadata])


def test_through_json_with_names_of_states():
    row = replace(FULL, images=(ImageFile(Path("a.png"), view="PA"),)).as_row()
    assert row["labels"][0] == {"name": "unmentioned", "state": "unmentioned"}
    assert StudyRecord.from_row(json.loads(json.dumps(row))) == StudyRecord.from_row(row)


def test_states_are_stored_in_the_order_of_their_strength():
    assert features()["labels"].feature["state"].names == ["unmentioned", "negative", "uncertain", "positive"]


def test_rows_of_older_files_lack_columns():
    row = {"study_id": "s", "source": "made_up", "modality": "ct", "patient_id": None, "images": []}
    assert StudyRecord.from_row(row) == EMPTY


def test_views_belong_to_images():
    row = FULL.as_row()
    with pytest.raises(ValueError, match="zip"):
        StudyRecord.from_row({**row, "views": row["views"][:1]})
    assert [image.view for image in StudyRecord.from_row({**row, "views": None}).images] == [None, None, None]


def test_an_unknown_state_is_an_error():
    row = EMPTY.as_row()
    for state, error in (("perhaps", ValueError), (4, IndexError)):
        with pytest.raises(error):
            StudyRecord.from_row({**row, "labels": [{"name": "A", "state": state}]})


def test_no_repr_shows_ids_texts_or_paths():
    shown = repr(FULL) + repr(FULL.images) + str(FULL)
    assert "SECRET" not in shown and "61.5" not in shown
    assert "made_up" in shown and "PA" in shown


def test_image_sources():
    path, both, data = FULL.images
    assert (path.source, both.source, data.source) == (Path("SECRET/a.png"), both.data, b"SECRET")


text = st.none() | st.text(st.characters(codec="utf-8"), max_size=20)
state = st.sampled_from(LabelState)
number = st.floats(0, 4096, width=32)
report = st.builds(ReportText, st.text(max_size=20).filter(lambda t: t.isprintable()), text, text, text, st.booleans())
record = st.builds(
    StudyRecord,
    study_id=st.text(st.characters(codec="utf-8"), max_size=8),
    source=st.just("made_up"),
    modality=st.sampled_from(MODALITIES),
    patient_id=text,
    documents=st.lists(st.just("doi:1"), max_size=2).map(tuple),
    images=st.lists(
        st.builds(ImageFile, st.sampled_from([Path("a/b.png"), Path("/c.dcm")]), st.none() | st.binary(), text),
        max_size=3,
    ).map(tuple),
    reports=st.dictionaries(st.sampled_from(LANGUAGES), report),
    labels=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), state, max_size=3),
    findings=st.dictionaries(st.sampled_from(["edema", "mass"]), state),
    boxes=st.lists(st.builds(Box, st.just("Mass"), number, number, number, number), max_size=2).map(tuple),
    age=st.none() | number,
    sex=st.sampled_from(["F", "M", None]),
    split=text,
    licence=text,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(record, min_size=1, max_size=3))
def test_any_records_come_back(records):
    assert [StudyRecord.from_row(row) for row in table(records)] == records


def test_features_are_equal_across_sets(tmp_path):
    report = "<eCitation><uId id='CXR1'/><Abstract><AbstractText Label='FINDINGS'>Clear.</AbstractText></Abstract>"
    (tmp_path / "a" / "ecgen-radiology").mkdir(parents=True)
    (tmp_path / "a" / "ecgen-radiology" / "1.xml").write_text(
        f"{report}<MeSH><major>normal</major></MeSH></eCitation>"
    )
    entry = {"id": "1.jpg", "report": "双肺清晰。", "COVID": 0, "image_path": "1.jpg", "label2": 0}
    (tmp_path / "b" / "images").mkdir(parents=True)
    (tmp_path / "b" / "annotation.json").write_text(json.dumps({"train": [entry]}))
    (tmp_path / "b" / "images" / "1.jpg").touch()
    opened = [
        OpenSet(tmp_path / "a", iu_xray.SET, None, Reading()),
        OpenSet(tmp_path / "b", cov_ctr.SET, None, Reading()),
    ]
    tables = [each.dataset() for each in opened]
    assert tables[0].features == tables[1].features == opened[0].stream().features == features()
    joined = datasets.concatenate_datasets(tables)
    assert [StudyRecord.from_row(row) for row in joined] == [next(iter(each)) for each in opened]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "m3fm\[data\]"'):
        features()
