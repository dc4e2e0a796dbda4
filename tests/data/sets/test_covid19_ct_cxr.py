# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""COVID-19-CT-CXR in small trees built to its two layouts; articles and texts are made up."""

import json
from pathlib import Path

import pytest

from m3fm.data.opening import OpenSet
from m3fm.data.schema import StudyRecord
from m3fm.data.sets.covid19_ct_cxr import SET
from m3fm.data.tables import BadRow, Reading

IMAGES, TEXTS = "06102020.litcovid.released.image.json", "06102020.litcovid.released.text.json"


def url(article: int, name: str) -> str:
    return f"https://www.ncbi.nlm.nih.gov/pmc/articles/PMC{article}/bin/{name}"


def figure(article: int, name: str, **told: object) -> dict[str, object]:
    return {"pmcid": f"PMC{article}", "url": url(article, name), "insert_time": "04202020", **told}


def box(left: int, label: str) -> dict[str, object]:
    return {"xtl": left, "ytl": 0, "xbr": left + 300, "ybr": 280, "label": label}


def text(article: int, name: str, caption: str, *mentions: str) -> dict[str, object]:
    passages = [{"infons": {"file": name, "type": "caption"}, "offset": 1, "text": caption}] if caption else []
    passages += [{"infons": {"section_type": "RESULTS"}, "offset": 2, "text": each} for each in mentions]
    return {"pmcid": f"PMC{article}", "url": url(article, name), "text": passages}


FIGURES = [
    figure(7, "a_Fig1_HTML.jpg", box=[box(0, "ct"), box(310, "cxr"), box(620, "ct")]),
    figure(7, "a_Fig2_HTML.jpg", label="ct"),
    figure(8, "gr1_lrg.jpg", label="cxr"),
]
CAPTION = "Chest CT shows ground-glass opacities."
FILES = (
    "PMC7_a_Fig1_HTML_0x0_300x280.jpg",
    "PMC7_a_Fig1_HTML_310x0_610x280.jpg",
    "PMC7_a_Fig1_HTML_620x0_920x280.jpg",
    "PMC7_a_Fig2_HTML.jpg",
    "PMC8_gr1_lrg.jpg",
)


def read(root: Path, on_bad: str = "raise", images: str = "required") -> tuple[list[StudyRecord], Reading]:
    opened = OpenSet(root, SET, None, Reading(on_bad, images))
    return list(opened), opened.reading


def write_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).touch()


class TestRelease:
    def write(self, root: Path, figures: object = FIGURES, texts: object = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        given = [text(7, "a_Fig1_HTML.jpg", CAPTION, "As Figure 1 shows.")] * 3 + [
            text(7, "a_Fig2_HTML.jpg", "", "No caption but this.")
        ]
        (root / IMAGES).write_text(json.dumps(figures, indent=2))
        (root / TEXTS).write_text(json.dumps(given if texts is None else texts, indent=2))
        write_files(root / "subfigures")

    def test_figures_become_records(self, tmp_path):
        self.write(tmp_path)
        assert SET.recognises(tmp_path)
        records, _ = read(tmp_path)
        folder = tmp_path / "subfigures"
        assert [(r.study_id, r.modality, r.documents, len(r.images)) for r in records] == [
            ("PMC7_a_Fig1_HTML_cxr", "cxr", ("pmc:PMC7",), 1),
            ("PMC7_a_Fig1_HTML_ct", "ct", ("pmc:PMC7",), 2),
            ("PMC7_a_Fig2_HTML_ct", "ct", ("pmc:PMC7",), 1),
            ("PMC8_gr1_lrg_cxr", "cxr", ("pmc:PMC8",), 1),
        ]
        radiograph, ct, second, third = records
        assert [(image.path, image.view) for image in radiograph.images] == [(folder / FILES[1], None)]
        assert [image.path for image in ct.images] == [folder / FILES[0], folder / FILES[2]]
        assert {image.view for image in ct.images} == {"AXIAL"}
        assert ct.reports["en"].text == CAPTION and ct.reports["en"].raw == f"{CAPTION}\nAs Figure 1 shows."
        assert ct.reports == radiograph.reports
        assert second.reports["en"].text == "No caption but this." and third.reports == {}
        assert ct.labels == {} and ct.findings == {} and ct.split is None and "article" in ct.licence

    def test_the_latest_release_is_read(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "12312019.litcovid.released.image.json").write_text("[]")
        assert len(read(tmp_path)[0]) == 4

    def test_images_beside_the_lists(self, tmp_path):
        self.write(tmp_path / "set")
        for name in FILES:
            (tmp_path / "set" / "subfigures" / name).rename(tmp_path / "set" / name)
        assert SET.recognises(tmp_path)
        assert read(tmp_path)[0][0].images[0].path == tmp_path / "set" / FILES[1]

    def test_bad_entries_cost_themselves_alone(self, tmp_path):
        bad = [
            figure(7, "a_Fig1_HTML.jpg", label="ct"),  # given before
            figure(9, "gr2.jpg", label="mri"),
            figure(9, "gr3.jpg", box="all"),
            figure(9, "gr4.jpg", box=[{"label": "ct"}, {**box(0, "ct"), "xtl": -1}]),
            figure(9, "..", label="ct"),
            {**figure(9, "gr5.jpg", label="ct"), "pmcid": "9"},
            figure(9, "gr6.jpg", label="ct"),  # not there
            figure(9, "gr7.jpg", box=[box(0, "ct"), box(0, "ct")]),  # neither
            7,
        ]
        texts = [text(7, "a_Fig1_HTML.jpg", CAPTION), {"pmcid": "PMC7", "url": url(7, "x.jpg"), "text": ["x"]}]
        self.write(tmp_path, [*FIGURES, *bad], texts)
        records, reading = read(tmp_path, "skip")
        assert [len(record.images) for record in records] == [1, 2, 1, 1]
        assert reading.counts == {
            (IMAGES, "duplicate_id"): 2,
            (IMAGES, "bad_label"): 1,
            (IMAGES, "bad_value"): 5,
            (IMAGES, "missing_file"): 2,
            (IMAGES, "not_a_row"): 1,
            (TEXTS, "bad_value"): 1,
        }

    def test_a_figure_with_another_suffix_is_the_same(self, tmp_path):
        self.write(tmp_path, [*FIGURES, figure(8, "gr1_lrg.png", label="cxr")])
        records, reading = read(tmp_path, "skip", "unchecked")
        assert len({record.study_id for record in records}) == len(records) == 4
        assert reading.counts == {(IMAGES, "duplicate_id"): 1}

    def test_without_texts_it_is_not_the_set(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / TEXTS).unlink()
        with pytest.raises(BadRow, match=r"text\.json"):
            read(tmp_path, "skip")


BIOC = f"""<?xml version='1.0' encoding='utf-8' standalone='yes'?>
<collection>
  <source></source>
  <document>
    <id>PMC7_Fig1</id>
    <infon key="url">a_Fig1_HTML.jpg</infon>
    <passage><infon key="file">a_Fig1_HTML.jpg</infon><offset>1</offset><text>{CAPTION}</text></passage>
    <passage><infon key="section_type">RESULTS</infon><text>As Figure 1 shows.</text></passage>
  </document>
  <document>
    <id>Fig2</id>
    <infon key="url">b.jpg</infon>
  </document>
</collection>
"""
HEAD = "pmcid,figure url,subfigure,label,insert_time"


class TestTable:
    def write(self, root: Path, *rows: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        lines = [HEAD]
        first = f"PMC7,{url(7, 'a_Fig1_HTML.jpg')}"
        lines += [f"{first},0x0_300x280,ct,4202020", f"{first},310x0_610x280,cxr,4202020"]
        lines += [f"PMC7,{url(7, 'a_Fig2_HTML.jpg')},,ct,4202020", f"PMC8,{url(8, 'gr1_lrg.jpg')},,nature,4202020"]
        lines += [f"{first},620x0_920x280,ct,4202020", *rows]
        (root / "covid_figure_list.csv").write_text("\n".join(lines) + "\n")
        (root / "convid_figure_text.xml").write_text(BIOC)
        write_files(root)

    def test_rows_become_records(self, tmp_path):
        self.write(tmp_path)
        assert SET.recognises(tmp_path)
        records, reading = read(tmp_path, "skip")
        assert [(record.study_id, len(record.images)) for record in records] == [
            ("PMC7_a_Fig1_HTML_cxr", 1),
            ("PMC7_a_Fig1_HTML_ct", 2),
            ("PMC7_a_Fig2_HTML_ct", 1),
        ]
        assert records[1].reports["en"].raw == f"{CAPTION}\nAs Figure 1 shows." and records[2].reports == {}
        # The second document of the texts does not say its article.
        assert reading.counts == {("convid_figure_text.xml", "bad_value"): 1}
        assert reading.examples[0].line == 10

    def test_bad_rows(self, tmp_path):
        self.write(
            tmp_path,
            f"PMC7,{url(7, 'a_Fig1_HTML.jpg')},0x0_300x280,ct,1",
            f"PMC7,{url(7, 'c.jpg')},half,ct,1",
            f"PMC7,{url(7, 'c.jpg')},,us,1",
            f"x,{url(7, 'c.jpg')},,ct,1",
            f"PMC7,{url(7, 'c.jpg')},,ct",
            f"PMC7,{url(7, 'c.jpg')},,ct,1",
        )
        (tmp_path / "convid_figure_text.xml").write_text(BIOC.replace("<id>Fig2</id>", "<id>"))
        records, reading = read(tmp_path, "skip")
        assert [len(record.images) for record in records] == [1, 2, 1]
        assert records[1].reports["en"].text == CAPTION
        assert reading.counts == {
            ("covid_figure_list.csv", "duplicate_id"): 1,
            ("covid_figure_list.csv", "bad_value"): 2,
            ("covid_figure_list.csv", "bad_label"): 1,
            ("covid_figure_list.csv", "not_a_row"): 1,
            ("covid_figure_list.csv", "missing_file"): 1,
            ("convid_figure_text.xml", "not_a_row"): 1,
        }
        assert [len(record.images) for record in read(tmp_path, "skip", "unchecked")[0]] == [1, 2, 1, 1]

    def test_a_figure_with_another_suffix_is_the_same(self, tmp_path):
        self.write(tmp_path, f"PMC7,{url(7, 'a_Fig2_HTML.png')},,ct,1")
        records, reading = read(tmp_path, "skip", "unchecked")
        assert len({record.study_id for record in records}) == len(records) == 3
        assert reading.counts[("covid_figure_list.csv", "duplicate_id")] == 1

    def test_a_figure_of_which_no_panel_is_there_is_left_out(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / FILES[3]).unlink()
        records, reading = read(tmp_path, "skip")
        assert [record.study_id for record in records] == ["PMC7_a_Fig1_HTML_cxr", "PMC7_a_Fig1_HTML_ct"]
        assert reading.counts[("covid_figure_list.csv", "missing_file")] == 1

    def test_a_missing_column_is_raised(self, tmp_path):
        self.write(tmp_path)
        (tmp_path / "covid_figure_list.csv").write_text("pmcid,label\n")
        with pytest.raises(BadRow, match="'figure url'"):
            read(tmp_path, "skip")


def test_other_folders_are_not_recognised(tmp_path):
    assert not SET.recognises(tmp_path)
    with pytest.raises(BadRow, match="got none of them"):
        read(tmp_path)
