# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import stat
from pathlib import Path

import pytest

from m3fm.data.pseudonyms import Pseudonyms
from m3fm.data.schema import ImageFile, StudyRecord

KEY = bytes(range(32))


def record(study_id="s", patient_id="p", name="DOE.JANE.png"):
    return StudyRecord(study_id, "x", "cxr", patient_id, ("doi:10.1/x",), (ImageFile(Path(name), b"..", "PA"),))


def test_one_patient_has_one_pseudonym_and_another_key_another():
    first, second = Pseudonyms(KEY).replace(record("a")), Pseudonyms(KEY).replace(record("b"))
    assert first.patient_id == second.patient_id
    assert first.documents == second.documents
    assert first.study_id != second.study_id
    assert Pseudonyms(bytes(32)).replace(record("a")).patient_id != first.patient_id
    # Of kinds that share a number, each has its own.
    assert len({Pseudonyms(KEY).of(kind, "4711") for kind in ("study", "patient", "document")}) == 3


@pytest.mark.parametrize(
    ("name", "suffix"), [("DOE.JANE.png", ".png"), ("a.nii.gz", ".nii.gz"), ("1.2.840.JANE", ""), ("X.JPG", ".jpg")]
)
def test_of_a_name_the_kind_of_file_alone_is_kept(name, suffix):
    replaced = Pseudonyms(KEY).replace(record(name=name))
    assert replaced.images == (ImageFile(Path(f"{replaced.study_id}-0{suffix}"), b"..", "PA"),)


def test_an_unknown_patient_stays_unknown():
    assert Pseudonyms(KEY).replace(record(patient_id=None)).patient_id is None


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path):
    made = Pseudonyms.from_file(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert Pseudonyms.from_file(tmp_path / "key") == made
    assert Pseudonyms.from_file(tmp_path / "other").fingerprint != made.fingerprint
    assert made.key.hex() not in repr(made)


def test_a_file_that_is_no_key(tmp_path):
    (tmp_path / "key").write_text("secret")
    with pytest.raises(ValueError, match="expected 64 hexadecimal digits") as caught:
        Pseudonyms.from_file(tmp_path / "key")
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="a key of 32 bytes, got 3"):
        Pseudonyms(b"abc")
