# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""IU X-ray in small trees built to its three layouts, and Open-i's own reports; ids and texts of trees are made up."""

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from m3fm.data.opening import OpenSet
from m3fm.data.schema import LabelState, StudyRecord
from m3fm.data.sets.iu_xray import SET, mesh_labels
from m3fm.data.tables import BadRow, Reading

P, N, U = LabelState.POSITIVE, LabelState.NEGATIVE, LabelState.UNMENTIONED
URL = "http://creativecommons.org/licenses/by-nc-nd/4.0/"


def xml(number: int, images: Sequence[str], major: Sequence[str] = ("normal",), automatic: Sequence[str] = ()) -> str:
    terms = [f"<major>{term}</major>" for term in major] + [f"<automatic>{term}</automatic>" for term in automatic]
    parents = [f'<parentImage id="{name}">\n  <figureId>F1</figureId>\n</parentImage>' for name in images]
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation>
  <uId id="CXR{number}"/>
  <licenseURL>{URL}</licenseURL>
  <MedlineCitation><Article><Abstract>
    <AbstractText Label="COMPARISON">None.</AbstractText>
    <AbstractText Label="INDICATION">Cough &amp; fever</AbstractText>
    <AbstractText Label="FINDINGS">The heart is normal. Film {number}.</AbstractText>
    <AbstractText Label="IMPRESSION"/>
  </Abstract></Article></MedlineCitation>
  <MeSH>{"".join(terms)}</MeSH>
  {"".join(parents)}
</eCitation>
"""


def write(path: Path, content: str | bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_openi(root: Path) -> None:
    reports = root / "ecgen-radiology"
    write(reports / "1.xml", xml(1, ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]))
    write(
        reports / "20.xml",
        xml(20, ["CXR20_IM-0653-1001"], ["Pulmonary Atelectasis/base", "Aorta/tortuous"], ["pleural effusions"]),
    )
    write(reports / "3.xml", xml(3, [], ["No Indexing"], ["sternotomy"]))
    for name in ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "CXR20_IM-0653-1001"):
        write(root / "NLMCXR_png" / f"{name}.png")


def read(root: Path, on_bad: str = "raise", images: str = "required") -> tuple[list[StudyRecord], Reading]:
    opened = OpenSet(root, SET, None, Reading(on_bad, images))
    return list(opened), opened.reading


def annotations(*entries: tuple[str, str, list[str], str]) -> str:
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    for study, report, images, part in entries:
        parts[part].append({"id": study, "report": report, "image_path": images, "split": part})
    return json.dumps(parts)


class TestOpenI:
    def test_a_report_becomes_a_record(self, tmp_path):
        write_openi(tmp_path)
        assert SET.recognises(tmp_path)
        records, _ = read(tmp_path)
        assert [record.study_id for record in records] == ["CXR1", "CXR20", "CXR3"]
        first = records[0]
        assert (first.source, first.modality, first.patient_id, first.split) == ("iu_xray", "cxr", None, None)
        assert first.licence == "CC BY-NC-ND 4.0"
        names = ["CXR1_1_IM-0001-3001.png", "CXR1_1_IM-0001-4001.png"]
        assert [image.path for image in first.images] == [tmp_path / "NLMCXR_png" / name for name in names]
        assert first.reports["en"].findings == "The heart is normal. Film 1."
        assert first.reports["en"].impression is None
        assert first.reports["en"].raw == (
            "COMPARISON: None.\nINDICATION: Cough & fever\nFINDINGS: The heart is normal. Film 1."
        )

    def test_labels_are_made_of_human_and_of_automatic_terms(self, tmp_path):
        write_openi(tmp_path)
        normal, atelectasis, unread = read(tmp_path)[0]
        assert [name for name, state in normal.labels.items() if state is P] == ["Normal"]
        assert [name for name, state in atelectasis.labels.items() if state is P] == ["Atelectasis", "Effusion"]
        assert atelectasis.findings["pleural_effusion"] is P and atelectasis.findings["pneumonia"] is N
        assert normal.findings["no_finding"] is P and atelectasis.findings["no_finding"] is N
        assert set(unread.labels.values()) == {U} and unread.findings == {}
        assert len(normal.labels) == len(atelectasis.labels) == len(unread.labels) == 21

    @pytest.mark.parametrize(
        ("terms", "labels"),
        [
            (["Calcified Granuloma/lung/upper lobe"], {"Calcinosis", "Granuloma"}),
            (["Edema"], {"Normal"}),  # of what is not said
            (["Pulmonary Congestion"], {"Edema"}),
            (["Airspace Disease"], {"Opacity"}),
            (["Lung/hyperdistention"], {"Normal"}),  # none of the 20
            (["Thickening/pleura"], {"Pleural_Thickening"}),
            (["hydropneumothorax"], {"Pneumothorax"}),
        ],
    )
    def test_terms(self, terms, labels):
        assert {name for name, state in mesh_labels(terms).items() if state is P} == labels

    def test_the_archive_as_it_is_downloaded_gives_the_same(self, tmp_path):
        write_openi(tmp_path / "folder")
        write_openi(tmp_path / "archive")
        with tarfile.open(tmp_path / "archive" / "NLMCXR_reports.tgz", "w:gz") as archive:
            for path in sorted((tmp_path / "archive" / "ecgen-radiology").iterdir()):
                archive.add(path, f"ecgen-radiology/{path.name}")
                path.unlink()
        (tmp_path / "archive" / "ecgen-radiology").rmdir()
        assert SET.recognises(tmp_path / "archive")
        told = [[(r.study_id, r.reports, r.labels, len(r.images)) for r in read(tmp_path / kind)[0]] for kind in
                ("folder", "archive")]  # fmt: skip
        assert told[0] == told[1]

    def test_images_in_the_dicom_folder_and_in_a_folder_around_all(self, tmp_path):
        write(tmp_path / "iu" / "NLMCXR_reports" / "ecgen-radiology" / "1.xml", xml(1, ["CXR1_1_IM-0001-3001"]))
        write(tmp_path / "iu" / "NLMCXR_dcm" / "1" / "1_IM-0001-3001.dcm")
        write(tmp_path / "iu" / "README", b"")
        (record,), _ = read(tmp_path / "iu")
        assert record.images[0].path == tmp_path / "iu" / "NLMCXR_dcm" / "1" / "1_IM-0001-3001.dcm"
        write(tmp_path / "other" / "iu" / "ecgen-radiology" / "1.xml", xml(1, []))
        assert SET.recognises(tmp_path / "other")

    def test_the_split_of_r2gen_is_given_to_the_xml(self, tmp_path):
        write_openi(tmp_path)
        text = annotations(("CXR1_1_IM-0001", "A.", ["a/0.png"], "val"), ("CXR20_IM-0653", "B.", ["b/0.png"], "test"))
        write(tmp_path / "annotation.json", text)
        records, _ = read(tmp_path)
        assert [record.split for record in records] == ["validation", "test", "unassigned"]
        assert records[0].reports["en"].findings == "The heart is normal. Film 1."
        assert records[0].images[0].path.parent.name == "NLMCXR_png"

    def test_the_images_of_r2gen_serve_the_xml_where_there_are_no_others(self, tmp_path):
        write(tmp_path / "ecgen-radiology" / "1.xml", xml(1, ["CXR1_1_IM-0001-3001"]))
        write(tmp_path / "annotation.json", annotations(("CXR1_1_IM-0001", "A.", ["CXR1_1_IM-0001/0.png"], "train")))
        write(tmp_path / "images" / "CXR1_1_IM-0001" / "0.png")
        (record,), _ = read(tmp_path)
        assert [image.path for image in record.images] == [tmp_path / "images" / "CXR1_1_IM-0001" / "0.png"]

    def test_views_and_ages_of_tables_beside(self, tmp_path):
        write_openi(tmp_path)
        head = "imageid,View Position,Study Date,Patient's Birth Date"
        rows = ["CXR1_1_IM-0001-3001,LL,20110328,19550328", "CXR1_1_IM-0001-4001,PA,20110328,19550328"]
        write(tmp_path / "nlmcxr_dicom_metadata.csv.gz", "\n".join([head, *rows, "CXR20_IM-0653-1001,PA,,"]))
        first, second, _ = read(tmp_path)[0]
        # The header's "PA" is not believed.
        assert [image.view for image in first.images] == ["LATERAL", None]
        assert first.age == pytest.approx(56.0, abs=0.01) and second.age is None
        write(tmp_path / "nlmcxr_tsne_pa.csv.gz", "imageid,tsne-view\nCXR1_1_IM-0001-4001,PA\n")
        assert [image.view for image in read(tmp_path)[0][0].images] == ["LATERAL", "PA"]
        table = "uid,filename,projection\n1,1_IM-0001-4001.dcm.png,Frontal\n20,20_IM-0653-1001.dcm.png,Lateral\n"
        write(tmp_path / "indiana_projections.csv", table)
        first, second, _ = read(tmp_path)[0]
        assert [image.view for image in (*first.images, *second.images)] == ["LATERAL", "PA", "LATERAL"]

    @pytest.mark.parametrize(
        ("damage", "kind"),
        [
            (xml(4, [])[:-30].encode(), "not_a_row"),
            (b"", "not_a_row"),
            (b"<other/>", "not_a_row"),
            (xml(4, []).replace("Cough", "Caf\xe9").encode("latin-1"), "bad_encoding"),
            (xml(4, []).replace("CXR4", "4").encode(), "bad_value"),
            (xml(1, []).encode(), "duplicate_id"),
        ],
    )
    def test_a_damaged_file_is_named_and_costs_itself_alone(self, tmp_path, damage, kind):
        write_openi(tmp_path)
        write(tmp_path / "ecgen-radiology" / "2.xml", damage)
        records, reading = read(tmp_path, "skip")
        assert [record.study_id for record in records] == ["CXR1", "CXR20", "CXR3"]
        assert reading.counts == {("ecgen-radiology", kind): 1}
        with pytest.raises(BadRow, match=r"2\.xml, line \d+: ") as raised:
            read(tmp_path)
        assert raised.value.kind == kind and "CXR4" not in str(raised.value)

    @pytest.mark.parametrize(
        "head",
        [
            '<!DOCTYPE e [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><eCitation>&b;</eCitation>',
            '<!DOCTYPE e [<!ENTITY a SYSTEM "file:///etc/passwd">]><eCitation><uId id="CXR9"/>&a;</eCitation>',
            "<!DOCTYPE e><eCitation/>",
        ],
    )
    def test_a_document_type_is_refused(self, tmp_path, head):
        write(tmp_path / "ecgen-radiology" / "9.xml", head)
        with pytest.raises(BadRow, match="document type"):
            read(tmp_path)

    def test_a_missing_view_costs_the_view_and_the_last_one_the_study(self, tmp_path):
        write_openi(tmp_path)
        (tmp_path / "NLMCXR_png" / "CXR1_1_IM-0001-3001.png").unlink()
        write(tmp_path / "ecgen-radiology" / "5.xml", xml(5, ["../../etc/passwd"]))
        records, reading = read(tmp_path, "skip")
        assert [len(record.images) for record in records] == [1, 1, 0]
        assert [record.study_id for record in records] == ["CXR1", "CXR20", "CXR3"]  # the third lists no image
        assert reading.counts == {("ecgen-radiology", "missing_file"): 1, ("ecgen-radiology", "bad_value"): 1}
        # The line of the image, not that of the report.
        assert [error.message[:15] for error in reading.examples] == ["1.xml, line 12:", "5.xml, line 12:"]
        (tmp_path / "NLMCXR_png" / "CXR1_1_IM-0001-4001.png").unlink()
        records, reading = read(tmp_path, "skip")
        assert [record.study_id for record in records] == ["CXR20", "CXR3"]
        assert reading.counts[("ecgen-radiology", "missing_file")] == 2
        with pytest.raises(BadRow, match="the image file"):
            read(tmp_path)
        assert len(read(tmp_path, "skip", "unchecked")[0][0].images) == 2

    def test_a_cut_archive_keeps_what_came_before(self, tmp_path):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            for number in (1, 2):
                data = xml(number, []).encode()
                member = tarfile.TarInfo(f"ecgen-radiology/{number}.xml")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        write(tmp_path / "NLMCXR_reports.tgz", content.getvalue()[: len(content.getvalue()) * 4 // 5])
        records, reading = read(tmp_path, "skip")
        assert len(records) < 2
        assert dict(reading.counts) == {("NLMCXR_reports.tgz", "not_a_row"): 1}

    def test_bad_files_of_the_archive_are_counted_by_the_archive(self, tmp_path):
        with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as archive:
            for number in (1, 2, 3):
                data = xml(number, []).encode() if number == 2 else b"<eCitation>"
                member = tarfile.TarInfo(f"ecgen-radiology/{number}.xml")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        records, reading = read(tmp_path, "skip")
        assert [record.study_id for record in records] == ["CXR2"]
        assert reading.counts == {("NLMCXR_reports.tgz", "not_a_row"): 2}
        assert reading.examples[1].message.startswith("3.xml, line ")

    def test_one_bad_file_in_a_hundred_loses_no_good_one(self, tmp_path):
        for number in range(300):
            text = xml(number, [f"CXR{number}_IM-0001-1001"])
            write(tmp_path / "ecgen-radiology" / f"{number}.xml", text if number % 100 else text[:200])
            write(tmp_path / "NLMCXR_png" / f"CXR{number}_IM-0001-1001.png")
        records, reading = read(tmp_path, "skip")
        assert {record.study_id for record in records} == {f"CXR{number}" for number in range(300) if number % 100}
        assert sum(reading.counts.values()) == 3 and all(len(record.images) == 1 for record in records)


REPORTS = """uid,MeSH,Problems,image,indication,comparison,findings,impression
1,normal,normal,Xray Chest PA and Lateral,Cough,None.,"The heart is normal.
Lungs are clear.",Normal chest.
2,Cardiomegaly/borderline;Scoliosis,Cardiomegaly;Scoliosis,"Chest, 2 views",,,,Large heart.
"""
PROJECTIONS = """uid,filename,projection
1,1_IM-0001-4001.dcm.png,Frontal
1,1_IM-0001-3001.dcm.png,Lateral
2,2_IM-0652-1001.dcm.png,Frontal
"""


class TestKaggle:
    def write(self, root: Path, reports: str = REPORTS, projections: str = PROJECTIONS) -> None:
        write(root / "indiana_reports.csv", reports)
        write(root / "indiana_projections.csv", projections)
        for line in PROJECTIONS.splitlines()[1:]:
            write(root / "images" / "images_normalized" / line.split(",")[1])

    def test_tables_become_records(self, tmp_path):
        self.write(tmp_path)
        assert SET.recognises(tmp_path)
        first, second = read(tmp_path)[0]
        assert (first.study_id, second.study_id) == ("CXR1", "CXR2")
        folder = tmp_path / "images" / "images_normalized"
        assert [(image.path, image.view) for image in first.images] == [
            (folder / "1_IM-0001-4001.dcm.png", "FRONTAL"),
            (folder / "1_IM-0001-3001.dcm.png", "LATERAL"),
        ]
        assert first.reports["en"].findings == "The heart is normal. Lungs are clear."
        assert first.reports["en"].impression == "Normal chest."
        assert second.reports["en"].findings is None
        assert second.reports["en"].raw == "IMPRESSION: Large heart."
        assert [name for name, state in second.labels.items() if state is P] == ["Cardiomegaly", "Scoliosis"]

    def test_the_split_of_r2gen(self, tmp_path):
        self.write(tmp_path)
        write(tmp_path / "annotation.json", annotations(("CXR2_IM-0652", "A.", ["a/0.png"], "test")))
        assert [record.split for record in read(tmp_path)[0]] == ["unassigned", "test"]

    def test_bad_rows(self, tmp_path):
        reports = REPORTS + "1,normal,normal,x,,,Twice.,\nx,normal,normal,x,,,No number.,\n3,normal,too,few\n"
        projections = PROJECTIONS + (
            "2,2_IM-0652-1001.dcm.png,Lateral\n2,2_IM-0652-2001.dcm.png,Oblique\n2,../2.png,Lateral\n"
            "2,1_IM-0001-5001.dcm.png,Lateral\n2,2_IM-0652-3001.dcm.png,Lateral\n7,7_IM-0007-1001.dcm.png,Frontal\n"
        )
        self.write(tmp_path, reports, projections)
        records, reading = read(tmp_path, "skip")
        assert [(record.study_id, len(record.images)) for record in records] == [("CXR1", 2), ("CXR2", 1)]
        assert reading.counts == {
            ("indiana_reports.csv", "duplicate_id"): 1,
            ("indiana_reports.csv", "bad_value"): 1,
            ("indiana_reports.csv", "not_a_row"): 1,
            ("indiana_projections.csv", "duplicate_id"): 1,
            ("indiana_projections.csv", "bad_value"): 4,
            ("indiana_projections.csv", "missing_file"): 1,
        }

    def test_a_study_of_whose_images_none_is_there_is_left_out(self, tmp_path):
        self.write(tmp_path, REPORTS + "3,normal,normal,x,,,No image listed.,\n")
        (tmp_path / "images" / "images_normalized" / "2_IM-0652-1001.dcm.png").unlink()
        records, reading = read(tmp_path, "skip")
        assert [(record.study_id, len(record.images)) for record in records] == [("CXR1", 2), ("CXR3", 0)]
        assert reading.counts == {("indiana_projections.csv", "missing_file"): 1}

    def test_a_missing_column_or_table_is_raised(self, tmp_path):
        self.write(tmp_path, REPORTS.replace("MeSH", "terms"))
        with pytest.raises(BadRow, match="'MeSH'"):
            read(tmp_path, "skip")
        self.write(tmp_path)
        (tmp_path / "indiana_projections.csv").unlink()
        with pytest.raises(BadRow, match="no such file"):
            read(tmp_path, "skip")


class TestR2Gen:
    ENTRIES = (
        ("CXR2384_IM-0942", "The heart is normal.", ["CXR2384_IM-0942/0.png", "CXR2384_IM-0942/1.png"], "train"),
        ("CXR1_1_IM-0001", "No effusion.", ["CXR1_1_IM-0001/0.png", "CXR1_1_IM-0001/1.png"], "val"),
        ("CXR7_IM-2263", "Clear lungs.", ["CXR7_IM-2263/0.png", "CXR7_IM-2263/1.png"], "test"),
    )

    def write(self, root: Path, text: str | None = None) -> None:
        write(root / "annotation.json", text or annotations(*self.ENTRIES))
        for _, _, images, _ in self.ENTRIES:
            for image in images:
                write(root / "images" / image)

    def test_entries_become_records(self, tmp_path):
        self.write(tmp_path / "iu_xray")
        assert SET.recognises(tmp_path)
        records, _ = read(tmp_path)
        told = [(record.study_id, record.split, record.reports["en"].raw) for record in records]
        assert told == [
            ("CXR2384", "train", "The heart is normal."),
            ("CXR1", "validation", "No effusion."),
            ("CXR7", "test", "Clear lungs."),
        ]
        path = tmp_path / "iu_xray" / "images" / "CXR2384_IM-0942" / "0.png"
        assert records[0].images[0].path == path and len(records[0].images) == 2
        assert records[0].labels == {} and records[0].findings == {}

    def test_bad_entries_cost_themselves_alone(self, tmp_path):
        good = json.loads(annotations(*self.ENTRIES))
        bad = [
            {"id": "2384", "report": "x", "image_path": ["a"]},
            {"id": "CXR5_IM-1", "image_path": ["a"]},
            {"id": "CXR5_IM-1", "report": "x", "image_path": ["../a"]},
            {"id": "CXR2384_IM-9", "report": "x", "image_path": ["a"]},
            {"id": "CXR6_IM-1", "report": "x", "image_path": ["a"], "split": "test"},
            "no object",
            {"id": "CXR8_IM-1", "report": "x", "image_path": ["gone.png"]},
        ]
        good["train"] += bad
        self.write(tmp_path, json.dumps(good, indent=1))
        records, reading = read(tmp_path, "skip")
        assert [record.study_id for record in records] == ["CXR2384", "CXR1", "CXR7"]
        assert reading.counts == Counter(
            {
                ("annotation.json", "bad_value"): 4,
                ("annotation.json", "duplicate_id"): 1,
                ("annotation.json", "not_a_row"): 1,
                ("annotation.json", "missing_file"): 1,
            }
        )

    def test_a_missing_image_costs_the_image(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "images" / "CXR7_IM-2263" / "1.png").unlink()
        assert [len(record.images) for record in read(tmp_path, "skip")[0]] == [2, 2, 1]
        (tmp_path / "images" / "CXR7_IM-2263" / "0.png").unlink()
        assert [record.study_id for record in read(tmp_path, "skip")[0]] == ["CXR2384", "CXR1"]


def test_other_folders_are_not_recognised(tmp_path):
    assert not SET.recognises(tmp_path)
    write(tmp_path / "annotation.json", json.dumps({"train": [{"id": "s50", "report": "x", "image_path": ["a"]}]}))
    assert not SET.recognises(tmp_path)
    with pytest.raises(BadRow, match="got none of them"):
        read(tmp_path / "images", "skip")


@pytest.mark.realdata
def test_the_reports_of_open_i(data_root):
    records, reading = read(data_root / "label_tables", "raise", "unchecked")
    assert reading.counts == {}
    assert len(records) == SET.published["studies"]
    assert sum(len(record.images) for record in records) == SET.published["images"]
    assert sum(not record.images for record in records) == 104
    assert sum(not record.reports for record in records) <= 40
    views = Counter(image.view for record in records for image in record.images)
    assert views == {"PA": 3267, "LATERAL": 1322, "AP": 259, None: 2622}

    rows = [
        json.loads(line) for line in (data_root / "openi_iu_reports" / "data.jsonl").read_text("utf-8").splitlines()
    ]
    by_id = {record.study_id: record for record in records}
    differ, unread = [], 0
    for row in rows:
        labels = by_id[row["study_id"]].labels
        positive = {name for name, state in labels.items() if state is P}
        unread += not positive
        if positive and positive != set(row["labels21"]):
            differ.append(positive ^ set(row["labels21"]))
        report = by_id[row["study_id"]].reports.get("en")
        for section in ("FINDINGS", "IMPRESSION"):
            text = row.get(f"{section.lower()}_en")
            assert text is None or f"{section}: {text}" in report.raw
    # A Bochdalek hernia is a hernia, which labels21 leaves out; 70 studies were never indexed.
    assert (len(rows), differ, unread) == (3365, [{"Hernia"}], 70)


@pytest.mark.realdata
def test_one_damaged_report_in_a_hundred_loses_no_good_one_of_open_i(data_root, tmp_path):
    spoil = [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"</MeSH>", b""),
        lambda content: content.replace(b"<Abstract>", b"<Abstract>\xff\xfe"),
        lambda content: content.replace(b"<eCitation>", b"<!DOCTYPE eCitation><eCitation>"),
        lambda content: content.replace(b'<uId id="CXR', b'<uId id="'),
        lambda content: b"",
    ]
    (tmp_path / "ecgen-radiology").mkdir()
    spoilt = set()
    with tarfile.open(data_root / "label_tables" / "NLMCXR_reports.tgz") as archive:
        members = [member for member in archive if member.isfile()][:1000]
        for place, member in enumerate(members):
            content = archive.extractfile(member).read()
            if place % 100 == 50:
                spoilt.add(Path(member.name).stem)
                content = spoil[place // 100 % len(spoil)](content)
            (tmp_path / member.name).write_bytes(content)
    records, reading = read(tmp_path, "skip", "unchecked")
    expected = {f"CXR{Path(member.name).stem}" for member in members} - {f"CXR{number}" for number in spoilt}
    assert {record.study_id for record in records} == expected and len(expected) == 990
    assert {file for file, _ in reading.counts} == {"ecgen-radiology"}
    assert {error.message.partition(",")[0] for error in reading.examples} == {f"{number}.xml" for number in spoilt}
