# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The page is one well-formed file that says what the numbers say, shows cases, and names no patient or file."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from m3fm.data import Study
from m3fm.evaluation.cases import finding_chips, mark_common, select_cases, thumbnails
from m3fm.evaluation.finding_labeler import label_report
from m3fm.evaluation.page import write_page

VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}
REFERENCES = {
    "en": "No pleural effusion. There is consolidation in the right lower lobe.",
    "zh": "右肺下叶见实变影，未见胸腔积液。",
}
WRITTEN = {
    "en": "There is consolidation in the left lower lobe. <script>alert('x')</script> & \"quoted\"",
    "zh": "左肺下叶见实变影，双侧胸腔积液。",
}


class Page(HTMLParser):
    """Checks nesting while it reads, and collects tags with their attributes and the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def by_column(columns, scores):
    return {column: dict(scores) for column in columns}


def difference(value, low, high):
    return {"difference": value, "low": low, "high": high, "p_value": 0.012}


def report_metrics():
    rows = {"model": (0.5, 0.6), "constant_report": (0.55, 0.1), "shuffled_images": (0.5, 0.3)}
    scores = {
        row: {"bleu_4": a, "rouge_l": 0.5, "finding_f1_micro": b, "lobe_accuracy": None}
        for row, (a, b) in rows.items()
    }
    found = {"finding_f1_micro": difference(0.5, 0.4, 0.6), "bleu_4": difference(-0.05, -0.1, -0.01)}
    found |= {"rouge_l": difference(0.0, -0.02, 0.02), "lobe_accuracy": difference(None, None, None)}
    columns = ("en", "zh")
    finding = {"precision": 1.0, "recall": 0.5, "f1": 0.667, "support": 4, "predicted": 2}
    ranked = {"recall@1": 0.1, "chance@1": 0.05, "median_rank": 3.0, "num_queries": 9, "num_items": 9}
    return {
        "task": "report",
        "model": "m3fm-small",
        "data": "our & set",
        "split": "validation",
        "model_sha256": "f00d",
        "command": "m3fm evaluate --data 'a<b'",
        "versions": {"torch": "2.13.0"},
        "decoding": {"num_beams": 1, "suppress_tokens": [0, 1]},
        "num_studies": {"en": 9, "zh": 9},
        "num_groups": {"en": 7, "zh": 7},
        "rows": {row: by_column(columns, values | {"distinct": 0.25}) for row, values in scores.items()},
        "intervals": {"model": by_column(columns, {"bleu_4": [0.41, 0.59], "lobe_accuracy": None})},
        "differences": {row: by_column(columns, found) for row in ("constant_report", "shuffled_images")},
        "findings": by_column(columns, {"nodule": finding}),
        "retrieval": {"image-en": {"forward": ranked, "backward": ranked}},
        "new_patients": {"num_studies": {"en": 4}, "rows": {"model": {"en": {"rouge_l": 0.44}}}},
    }


def diagnosis_metrics():
    columns, rows = ("nodule", "macro"), ("model", "label_prior", "linear_probe_tower", "blank_images")
    scores = {"auroc": 0.8, "auprc": 0.4, "ece": 0.1, "prevalence": 0.2}
    found = {"auroc": difference(0.3, 0.1, 0.5), "ece": difference(0.3, 0.1, 0.5)}
    return {
        "task": "diagnosis",
        "model": "m3fm-small",
        "data": "set",
        "split": "test",
        "labels": ["nodule"],
        "thresholds": {"nodule": 0.4321},
        "rows": {row: by_column(columns, scores) for row in rows},
        "intervals": {"model": by_column(columns, {"auroc": [0.7, 0.9]})},
        "differences": {row: by_column(columns, found) for row in ("label_prior", "blank_images")},
        "spread": {"model": by_column(columns, {"auroc": 0.0123})},
        "curves": {"nodule": {"fpr": [0, 0.5, 1], "tpr": [0, 1, 1], "recall": [0, 1, 1], "precision": [1, 0.5, 0.2]}},
        "reliability": {"nodule": {"confidence": [0.1, 0.7], "accuracy": [0.0, 0.5], "count": [5, 4]}},
    }


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    made = {}
    for number in range(9):
        path = folder / f"JOHNDOE_{number}.png"
        pixels = np.add.outer(np.arange(40), np.arange(90)).astype(np.uint8)
        Image.fromarray(pixels).save(path, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00")
        key = f"STUDY-SECRET-{number}"
        made[key] = Study(
            key, "set", "cxr", (path,) * 3, "PATIENT-SECRET", REFERENCES, None, "validation", "GROUP-SECRET"
        )
    return made


def write_run(folder, metrics, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
    return folder


def report_rows(studies):
    return [
        {"study_id": key, "group": 4711, "prediction": WRITTEN if i % 3 else REFERENCES, "reference": REFERENCES}
        for i, key in enumerate(studies)
    ]


def diagnosis_rows(studies):
    return [
        {
            "study_id": key,
            "group": 4711,
            "labels": {"nodule": number % 2},
            "probabilities": {"nodule": number / 8},
            "decisions": {"nodule": 1},
        }
        for number, key in enumerate(studies)
    ]


@pytest.fixture
def report_run(tmp_path, studies):
    return write_run(tmp_path / "out", report_metrics(), report_rows(studies))


@pytest.fixture
def diagnosis_run(tmp_path, studies):
    return write_run(tmp_path / "out", diagnosis_metrics(), diagnosis_rows(studies))


def test_report_page_stands_alone_and_names_nobody(report_run, studies):
    path = write_page(report_run, studies)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path.name == "report.html" and path.stat().st_size < 3_000_000
    assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r'src="data:[^"]*"', "", html))
    assert not page.all("script") and not page.all("link")
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.all("img"))
    for secret in ("SECRET", "JOHNDOE", "4711", str(report_run)):
        assert secret not in html
    for plot in re.findall(r"data:image/(?:svg\+xml|jpeg);base64,([^\"]*)", html):
        content = base64.b64decode(plot)
        assert b"SECRET" not in content and b"Exif" not in content and b"JOHNDOE" not in content
    first = html.encode()
    assert write_page(report_run, studies).read_bytes() == first


def test_report_page_says_what_was_measured(report_run):
    page = Page(write_page(report_run).read_text(encoding="utf-8"))
    text = page.text
    assert text.index("For research only") < text.index("m3fm-small on our & set")
    assert "English, the model against the constant report: ▼ worse in BLEU-4" in text
    assert "(0.500 against 0.550; difference −0.050, interval −0.100 to −0.010)" in text
    assert "◇ not better in ROUGE-L" in text and "▲ better in finding F1, micro" in text
    assert "the right images against those of other studies" in text
    assert "ratio of distinct reports 0.250 generated, 0.111 in the references" in text
    assert "0.410 to 0.590" in text and "p = 0.012" in text
    assert "lobe accuracy" not in text  # undefined for every row
    assert "new patients alone (4 studies)" in text and "0.440" in text
    assert "English → image" in text and "Lung nodule" in text
    assert "m3fm evaluate --data 'a<b'" in text and '"suppress_tokens": [0, 1]' in text and "f00d" in text
    headings = {name for name, _ in page.tags} & {"h1", "h2", "h3", "caption", "thead", "th"}
    assert headings == {"h1", "h2", "h3", "caption", "thead", "th"}
    assert all(cell.get("scope") for cell in page.all("th"))
    anchors = [link["href"] for link in page.all("a")]
    assert anchors and {f"#{heading.get('id')}" for heading in page.all("h2")} >= set(anchors)


def test_cases_show_both_texts_escaped(report_run, studies):
    html = write_page(report_run, studies, max_cases=3).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.all("article")) == 3
    assert "<script>" not in html and "&lt;" in html and "alert" in page.text
    assert [attributes["lang"] for attributes in page.all("p") if "lang" in attributes] == ["en", "en", "zh", "zh"] * 3
    assert "Case 1, worst" in page.text and "Case 2, median" in page.text and "Case 3, best (score 1.00)" in page.text
    assert "≈ found, other place: Consolidation (right lower → left lower)" in page.text
    assert "1 more not shown" in page.text
    assert len([each for each in page.all("img") if each["src"].startswith("data:image/jpeg")]) == 3 * 2


def test_page_without_studies_or_predictions(report_run):
    assert "data:image/jpeg" not in write_page(report_run).read_text(encoding="utf-8")
    (report_run / "predictions.jsonl").unlink()
    assert not Page(write_page(report_run).read_text(encoding="utf-8")).all("article")
    assert (report_run / "plots" / "image_use.svg").read_bytes().startswith(b"<?xml")


def test_diagnosis_page(diagnosis_run, studies):
    html = write_page(diagnosis_run, studies, max_cases=3).read_text(encoding="utf-8")
    page = Page(html)
    assert "Macro average, the model against the label prior: ▲ better in AUROC" in page.text
    assert "0.432" in page.text and "SD 0.012" in page.text
    assert 'class="worse"' in html  # a higher calibration error is worse
    plots = {path.stem for path in (diagnosis_run / "plots").iterdir()}
    assert plots == {"image_use", "auroc", "roc", "precision_recall", "reliability"}
    assert "SECRET" not in html and "✗ yes" in page.text
    assert [each["alt"] for each in page.all("img") if "case" in each["alt"]][0] == "Chest image 1 of case 1"


def test_retrieval_alone_makes_a_page(tmp_path):
    metrics = {"task": "parallel", "data": "set", "retrieval": report_metrics()["retrieval"]}
    page = Page(write_page(write_run(tmp_path / "out", metrics, [])).read_text(encoding="utf-8"))
    assert "image → English" in page.text and "Summary" not in page.text


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no metrics\.json"):
        write_page(tmp_path)
    (tmp_path / "metrics.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the results of an evaluation"):
        write_page(tmp_path)
    (tmp_path / "metrics.json").write_text('{"task": "poetry"}', encoding="utf-8")
    with pytest.raises(ValueError, match="unknown task 'poetry'"):
        write_page(tmp_path)


def test_common_text_is_marked_and_nothing_lost():
    first, second = mark_common("The heart is Normal.\nNo effusion 1.5 cm", "the HEART is big. effusion 1.5 cm")
    assert "".join(text for text, _ in first) == "The heart is Normal.\nNo effusion 1.5 cm"
    assert [text for text, common in first if common] == ["The heart is", "effusion 1.5 cm"]
    assert [text for text, common in second if common] == ["the HEART is", "effusion 1.5 cm"]
    chinese, _ = mark_common("双肺纹理增强，心影不大", "双肺未见心影大")
    assert [text for text, common in chinese if common] == ["双肺", "心影"]
    assert mark_common("", "text") == ([], [("text", False)])


def test_chips_tell_found_misplaced_missed_and_invented():
    reference = label_report("Consolidation in the right lower lobe. Pleural effusion. Cardiomegaly.", "en")
    written = label_report("Consolidation in the left lower lobe. Pleural effusion. Pneumothorax.", "en")
    kinds = {chip.title: chip.kind for chip in finding_chips(reference, written)}
    assert kinds["Consolidation"] == "misplaced" and kinds["Pleural effusion"] == "found"
    assert kinds["Cardiomegaly"] == "missed" and kinds["Pneumothorax"] == "invented"
    assert "No finding" not in kinds


@pytest.mark.parametrize(("cases", "ranks"), [(6, "wwmmbb"), (3, "wmb"), (2, "bb"), (0, ""), (100, "wwwmmmbbb")])
def test_cases_are_ranked_and_none_comes_twice(studies, cases, ranks):
    chosen = select_cases(diagnosis_rows(studies), "diagnosis", None, cases)
    assert "".join(case.rank[0] for case in chosen) == ranks
    assert [case.number for case in chosen] == list(range(1, len(ranks) + 1))
    scores = {rank: [case.score for case in chosen if case.rank == rank] for rank in ("worst", "best")}
    assert scores["worst"] + scores["best"][::-1] == sorted(scores["worst"] + scores["best"])


def test_thumbnails_are_small_windowed_and_bare(studies):
    study = next(iter(studies.values()))
    images = thumbnails(study)
    assert len(images) == 2  # of three
    image = Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2])))
    assert image.size == (256, 256) and image.mode == "L" and not image.getexif()
