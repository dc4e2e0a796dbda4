# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Collators: what the models' `forward` takes, from studies, records and rows alike."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3fm import M3FMForImageClassification
from m3fm.data import Study
from m3fm.data.schema import ImageFile, LabelState, ReportText, StudyRecord
from m3fm.training.augmentation import Augmentation
from m3fm.training.collators import DRAWN, FindingLabels, PairedTexts, ReportTexts, StudyCollator
from m3fm.training.study_images import StudyPixels

LONG = "The heart is normal. " * 30


def record(folder: Path, number: int, **reports: str) -> StudyRecord:
    path = folder / f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 256, (30, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    states = list(LabelState)
    return StudyRecord(
        study_id=str(number),
        source="set",
        modality="cxr",
        images=(ImageFile(path, view="PA"),) * (1 + number % 2),
        reports={code: ReportText(text) for code, text in reports.items()},
        findings={"edema": states[number % 4], "nodule": states[(number + 1) % 4]},
    )


@pytest.fixture
def records(tmp_path: Path) -> list[StudyRecord]:
    texts = [
        {"en": "The lungs are clear.", "zh": "双肺清晰。"},
        {"en": LONG, "zh": "心影不大。" * 60},
        {"en": "No effusion.", "zh": "未见积液。"},
        {"zh": "右肺结节。"},
    ]
    return [record(tmp_path, number, **each) for number, each in enumerate(texts)]


def pixels(processor, **options) -> StudyPixels:
    return StudyPixels(processor.image_processor, **options)


def collated(processor, targets, items, epoch: int = 0, seed: int = 0):
    collator = StudyCollator(pixels(processor), targets, seed)
    collator.set_epoch(epoch)
    return collator(items)


def test_reports_are_written_by_the_model_and_cost_nothing_in_the_prompt(tiny_processor, tiny_model, records):
    texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config, language="zh", max_length=40)
    batch = collated(tiny_processor, texts, records)
    assert set(batch) == {"pixel_values", "image_mask", "input_ids", "attention_mask", "labels"}
    prompt = tiny_model.build_prompt(["zh"] * 4)
    places = prompt.shape[1]
    assert torch.equal(batch["input_ids"][:, :places], prompt)
    assert (batch["labels"][:, :places] == -100).all()
    tokenizer = tiny_processor.tokenizer
    for row, each in enumerate(records):
        real = batch["attention_mask"][row].bool()
        body = batch["input_ids"][row][real][places:]
        assert torch.equal(batch["labels"][row][real][places:], body)
        assert body[-1] == tokenizer.eos_token_id and len(body) <= 40
        written = tokenizer.decode(body, skip_special_tokens=True)
        wanted = each.reports["zh"].text
        assert written == wanted if row != 1 else (wanted.startswith(written) and written.endswith("。"))
        assert (batch["labels"][row][~real] == -100).all()
        assert (batch["input_ids"][row][~real] == tokenizer.pad_token_id).all()
    loss = tiny_model(**batch).loss
    assert torch.isfinite(loss) and loss > 0


def test_records_rows_and_studies_give_one_batch(tiny_processor, tiny_model, records):
    studies = [
        Study(
            each.study_id,
            each.source,
            each.modality,
            tuple(image.path for image in each.images),
            None,
            {code: report.text for code, report in each.reports.items()},
            None,
            None,
        )
        for each in records
    ]
    texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config)
    batches = [
        collated(tiny_processor, texts, items) for items in (records, [each.as_row() for each in records], studies)
    ]
    for other in batches[1:]:
        assert all(torch.equal(other[name], batches[0][name]) for name in batches[0])


def test_languages_are_drawn_anew_in_each_epoch_of_those_there_are(tiny_processor, tiny_model, records):
    texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config)
    assert texts.language == DRAWN
    codes = {token: code for code, token in tiny_model.config.language_token_ids.items()}
    place = tiny_model.config.num_prefix_tokens
    epochs = [
        [codes[token] for token in collated(tiny_processor, texts, records, epoch)["input_ids"][:, place].tolist()]
        for epoch in range(12)
    ]
    again = collated(tiny_processor, texts, records, 3)["input_ids"][:, place].tolist()
    assert [codes[token] for token in again] == epochs[3]
    for row in range(3):
        assert {epoch[row] for epoch in epochs} == {"en", "zh"}
    assert {epoch[3] for epoch in epochs} == {"zh"}


def test_a_study_draws_the_same_in_other_company(tiny_processor, tiny_model, records):
    texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config)
    collator = StudyCollator(pixels(tiny_processor, augmentation=Augmentation()), texts)
    together = collator(records)["pixel_values"]
    alone = collator([records[2]])["pixel_values"]
    assert torch.equal(together[2, :1], alone[0])
    collator.set_epoch(1)
    assert not torch.equal(collator([records[2]])["pixel_values"], alone)


def test_a_missing_report_is_refused_with_advice(tiny_processor, tiny_model, records):
    texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config, language="en")
    with pytest.raises(ValueError, match=r"no report in 'en': leave such studies out.*dataset\.filter") as caught:
        collated(tiny_processor, texts, records)
    assert "右肺" not in str(caught.value) and "report_zh" not in str(caught.value)
    silent = StudyRecord("bare", "set", "cxr", images=records[0].images)
    for language, filtered in (("zh", r"row\['report_zh'\]"), (DRAWN, r"row\['report_en'\] or row\['report_zh'\]")):
        texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config, language)
        with pytest.raises(ValueError, match=rf"dataset\.filter\(lambda row: bool\({filtered}\)\)\."):
            collated(tiny_processor, texts, [silent])
    with pytest.raises(ValueError, match=r"got 'de', expected 'drawn' or one of \['en', 'zh'\]"):
        ReportTexts(tiny_processor.tokenizer, tiny_model.config, language="de")
    with pytest.raises(ValueError, match="got 'de'"):
        PairedTexts(tiny_processor.tokenizer, language="de")


def test_an_empty_batch_is_refused(tiny_processor):
    with pytest.raises(ValueError, match="The batch is empty: expected at least one study"):
        collated(tiny_processor, PairedTexts(tiny_processor.tokenizer), [])


@pytest.mark.parametrize(
    ("text", "fitting", "kept"),
    [
        ("Lungs clear. The heart is normal. No effusion.",) + ("Lungs clear. The heart is normal.",) * 2,
        ("The heart is normal. Lungs clear.", "The heart is normal. Lungs", "The heart is normal."),
        ("Clear. A nodule of 3.5 cm is seen.", "Clear. A nodule of 3.", "Clear."),
        ("双肺清晰。心影不大。", "双肺清晰。", "双肺清晰。"),
        ("双肺清晰。心影不大。", "双肺清晰。心影不大", "双肺清晰。"),
        ("The heart is normal.", "The heart is", "The heart is"),
    ],
)
def test_a_long_report_ends_with_the_last_whole_sentence_that_fits(text, fitting, kept, tiny_processor, tiny_model):
    tokenizer = tiny_processor.tokenizer
    length = len(tokenizer(fitting)["input_ids"])
    assert tokenizer.decode(tokenizer(text)["input_ids"][:length]) == fitting
    texts = ReportTexts(tokenizer, tiny_model.config, max_length=length + 1)  # and the end
    assert tokenizer.decode(texts.encoded(text)) == kept


def test_a_collator_for_evaluation_has_an_epoch_of_its_own(tiny_processor, records):
    collator = StudyCollator(pixels(tiny_processor, augmentation=Augmentation()), FindingLabels(["edema"]), seed=3)
    collator.set_epoch(5)
    plain = collator.for_evaluation()
    collator.set_epoch(6)
    assert (plain.epoch, plain.seed, collator.epoch) == (0, 3, 6)
    expected = collated(tiny_processor, collator.targets, records)["pixel_values"]
    assert torch.equal(plain(records)["pixel_values"], expected)
    assert not torch.equal(collator(records)["pixel_values"], expected)


def test_pairs_train_the_contrastive_model(tiny_processor, tiny_model, records):
    batch = collated(tiny_processor, PairedTexts(tiny_processor.tokenizer, "zh", max_length=32), records)
    assert set(batch) == {"pixel_values", "image_mask", "input_ids", "attention_mask", "return_loss"}
    assert batch["input_ids"].shape == (4, 32)
    assert torch.isfinite(tiny_model.model(**batch).loss)


def test_pairs_without_a_report_speak_of_findings(tiny_processor, tmp_path):
    silent = record(tmp_path, 2)  # edema uncertain, nodule positive
    texts = PairedTexts(tiny_processor.tokenizer, "en")
    written = {
        tiny_processor.tokenizer.decode(
            collated(tiny_processor, texts, [silent], epoch)["input_ids"][0], skip_special_tokens=True
        ).lower()
        for epoch in range(8)
    }
    assert len(written) > 1
    assert all("nodul" in text and "edema" not in text for text in written)
    with pytest.raises(ValueError, match="no report in 'en'"):
        collated(tiny_processor, texts, [StudyRecord("bare", "set", "cxr", images=silent.images)])


def test_labels_keep_the_unknown_apart(tiny_processor, tiny_config, records):
    # States by number: unmentioned, negative, uncertain, positive.
    batch = collated(tiny_processor, FindingLabels(["edema", "nodule"]), records)
    nan = float("nan")
    expected = torch.tensor([[nan, 0.0], [0.0, nan], [nan, 1.0], [1.0, nan]])
    torch.testing.assert_close(batch["labels"], expected, equal_nan=True)
    half = collated(tiny_processor, FindingLabels(["edema", "nodule"], uncertain="half"), records)
    assert half["labels"][2, 0] == half["labels"][1, 1] == 0.5
    tiny_config.num_labels = 2
    tiny_config.problem_type = "multi_label_classification"
    model = M3FMForImageClassification(tiny_config).train()
    assert torch.isfinite(model(**batch).loss)
    for wrong, told in (({"findings": ["flu"]}, "flu"), ({"findings": []}, "none")):
        with pytest.raises(ValueError, match=f"findings: got .*{told}"):
            FindingLabels(**wrong)
    with pytest.raises(ValueError, match="uncertain: got 'maybe'"):
        FindingLabels(["edema"], "maybe")


def test_what_is_skipped_has_no_target_either(tiny_processor, records, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    bad = StudyRecord("bad", "set", "cxr", images=(ImageFile(broken),))
    images = pixels(tiny_processor, on_unreadable="skip")
    batch = StudyCollator(images, FindingLabels(["edema"]))([records[1], bad, records[3]])
    assert batch["labels"].tolist() == [[0.0], [1.0]]
    assert len(batch["pixel_values"]) == 2
    assert images.skipped == 1


def test_a_collator_goes_to_other_processes(tiny_processor, tiny_model, records):
    texts = ReportTexts(tiny_processor.tokenizer, tiny_model.config)
    collator = StudyCollator(pixels(tiny_processor, augmentation=Augmentation()), texts, seed=3)
    collator.set_epoch(5)
    copy = pickle.loads(pickle.dumps(collator))
    assert copy.epoch == 5
    ours, theirs = collator(records), copy(records)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
