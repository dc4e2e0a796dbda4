# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
from m3fm.evaluation.tables import SCORE_COLUMNS, render_table


def test_the_tables_are_markdown_and_pure():
    scores = dict.fromkeys(SCORE_COLUMNS, 0.5184) | {"cider_d": None, "distinct": 1 / 72}
    gap = {"difference": -0.0123, "low": -0.05, "high": 0.0214, "p_value": 0.4}
    way = {"recall@1": 0.1, "chance@1": 0.014, "median_rank": 10.5, "num_queries": 72, "num_items": 72}
    metrics = {
        "num_studies": {"en": 72, "zh": 71},
        "rows": {"model": {"en": scores, "zh": scores}, "constant_report": {"en": scores, "zh": scores}},
        "differences": {"constant_report": {"en": {"bleu_4": gap, "rouge_l": gap | {"difference": None}}}},
        "retrieval": {"image-en": {"forward": way, "backward": way}},
    }
    assert render_table(metrics).splitlines() == [
        "| language | reports | bleu_4 | meteor | rouge_l | cider_d | chrf | finding_f1_micro | finding_f1_macro "
        "| located_f1_micro | distinct |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| en | model (72) | 0.518 | 0.518 | 0.518 | – | 0.518 | 0.518 | 0.518 | 0.518 | 0.014 |",
        "| en | constant report (72) | 0.518 | 0.518 | 0.518 | – | 0.518 | 0.518 | 0.518 | 0.518 | 0.014 |",
        "| zh | model (71) | 0.518 | 0.518 | 0.518 | – | 0.518 | 0.518 | 0.518 | 0.518 | 0.014 |",
        "| zh | constant report (71) | 0.518 | 0.518 | 0.518 | – | 0.518 | 0.518 | 0.518 | 0.518 | 0.014 |",
        "",
        "| language | model minus | bleu_4 | rouge_l | cider_d | finding_f1_micro |",
        "| --- | --- | --- | --- | --- | --- |",
        "| en | constant report | −0.012 [−0.050, 0.021] | – | – | – |",
        "",
        "| retrieval | items | recall@1 | chance@1 | median rank |",
        "| --- | --- | --- | --- | --- |",
        "| image → en | 72 | 0.100 | 0.014 | 10.5 |",
        "| en → image | 72 | 0.100 | 0.014 | 10.5 |",
    ]
    assert render_table({}) == ""


def test_floors_that_are_not_of_the_training_part_are_told():
    floors_from = {"en": "training part", "zh": "other patients of the evaluated part"}
    assert (
        render_table({"floors_from": floors_from})
        == "The floors of zh come from the other patients of the evaluated part."
    )
