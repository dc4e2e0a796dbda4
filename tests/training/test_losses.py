# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The contrastive targets and losses against values computed by hand."""

import math

import pytest
import torch

from m3fm.layers_m3fm import contrastive_loss
from m3fm.training.losses import Items, label_agreement, sigmoid_loss, soft_cross_entropy, soft_targets

FINDINGS = ("no_finding", "effusion", "pneumonia", "nodule")


def items(*rows: tuple[int, int, str, dict[str, float] | None, bool]) -> Items:
    """Builds items from (study, text, modality, findings, has_report)."""
    columns = list(zip(*rows, strict=True))
    findings = [row or {} for row in columns[3]]
    return Items(
        study=torch.tensor(columns[0]),
        text=torch.tensor(columns[1]),
        modality=torch.tensor([("cxr", "ct").index(name) for name in columns[2]]),
        values=torch.tensor([[row.get(name, 0.0) for name in FINDINGS] for row in findings]),
        known=torch.tensor([[name in row for name in FINDINGS] for row in findings]),
        has_report=torch.tensor(columns[4]),
    )


def as_images(texts: Items) -> Items:
    return Items(**{**vars(texts), "text": torch.full_like(texts.text, -1)})


def symmetric(logits: torch.Tensor, weights: torch.Tensor, takes_part: torch.Tensor) -> torch.Tensor:
    """Returns the mean of both directions."""
    sums = [
        soft_cross_entropy(*turned)
        for turned in ((logits, weights, takes_part), (logits.t(), weights.t(), takes_part.t()))
    ]
    return sum(total / count.clamp(min=1) for total, count in sums) / 2


def targets(*rows) -> tuple[list[list[float]], list[list[bool]]]:
    texts = items(*rows)
    weights, takes_part = soft_targets(as_images(texts), texts, torch.stack([texts.study, texts.text], dim=1))
    return weights.tolist(), takes_part.tolist()


# --- targets ---------------------------------------------------------------------------------------------------------


def test_reported_studies_are_pairs_and_nothing_else():
    weights, takes_part = targets((0, 0, "ct", None, True), (1, 1, "ct", None, True))
    assert weights == [[1, 0], [0, 1]]
    assert takes_part == [[True, True], [True, True]]


def test_equal_texts_are_positives_in_both_directions():
    weights, _ = targets((0, 0, "ct", None, True), (1, 1, "ct", None, True), (2, 0, "ct", None, True))
    assert weights == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_between_two_reports_labels_have_no_say():
    weights, takes_part = targets((0, 0, "cxr", {"effusion": 1.0}, True), (1, 1, "cxr", {"effusion": 1.0}, True))
    assert weights == [[1, 0], [0, 1]]
    assert takes_part == [[True, True], [True, True]]


def test_agreement_in_labels_is_a_soft_positive():
    # One finding of two in common: 1 / sqrt(2 * 1).
    weights, _ = targets(
        (0, 0, "cxr", {"effusion": 1.0, "pneumonia": 1.0}, False),
        (1, 1, "cxr", {"effusion": 1.0, "pneumonia": 0.0}, True),
        (2, 2, "cxr", {"effusion": 0.0, "pneumonia": 0.0, "no_finding": 1.0}, True),
    )
    assert weights[0] == pytest.approx([1, math.sqrt(0.5), 0])
    assert weights[1] == pytest.approx([math.sqrt(0.5), 1, 0])
    assert weights[2] == pytest.approx([0, 0, 1])


def test_equal_labels_weigh_as_much_as_a_pair():
    normal = {"no_finding": 1.0, "effusion": 0.0}
    weights, takes_part = targets((0, 0, "cxr", normal, False), (1, 1, "cxr", normal, False))
    assert weights == [[1, 1], [1, 1]]
    assert takes_part == [[True, True], [True, True]]


def test_what_is_unknown_is_neither_positive_nor_negative():
    weights, takes_part = targets(
        (0, 0, "cxr", {"pneumonia": 1.0}, False),
        (1, 1, "cxr", None, True),
        (2, 2, "cxr", {"effusion": 1.0}, True),  # says nothing of pneumonia
        (3, 3, "cxr", {"pneumonia": 0.0, "effusion": 0.0}, True),  # denies it
    )
    assert weights[0] == [1, 0, 0, 0]
    assert takes_part[0] == [True, False, False, True]


def test_another_modality_is_a_negative_whatever_the_labels():
    weights, takes_part = targets((0, 0, "cxr", {"pneumonia": 1.0}, False), (1, 1, "ct", {"pneumonia": 1.0}, False))
    assert weights == [[1, 0], [0, 1]]
    assert takes_part == [[True, True], [True, True]]


def test_only_what_both_sides_know_is_compared():
    left = items((0, 0, "cxr", {"pneumonia": 1.0, "nodule": 1.0}, False))
    right = items((1, 1, "cxr", {"pneumonia": 1.0, "effusion": 1.0}, False))
    agreement, comparable = label_agreement(left, right)
    assert agreement.item() == pytest.approx(1.0), "neither knows of the other's second finding"
    assert comparable.item()


def test_select_keeps_rows_together():
    chosen = items((0, 3, "cxr", None, True), (1, 4, "ct", {"nodule": 1.0}, False)).select(torch.tensor([False, True]))
    assert (chosen.study.item(), chosen.text.item(), chosen.modality.item()) == (1, 4, 1)
    assert chosen.values.tolist() == [[0, 0, 0, 1]] and chosen.has_report.tolist() == [False]


def test_rows_see_equal_texts_that_stand_elsewhere():
    # The text of study 0 is not among the columns; that of study 1 reads the same, and is.
    texts = items((0, 5, "ct", None, True), (1, 5, "ct", None, True), (2, 6, "ct", None, True))
    written = torch.stack([texts.study, texts.text], dim=1)
    columns = texts.select(torch.tensor([1, 2]))
    weights, _ = soft_targets(as_images(texts), columns, written)
    assert weights.tolist() == [[1, 0], [1, 0], [0, 1]]
    weights, _ = soft_targets(as_images(texts).select(torch.tensor([0])), columns, written)
    assert weights.tolist() == [[1, 0]]


# --- losses ----------------------------------------------------------------------------------------------------------


def test_identity_weights_give_the_loss_of_clip():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) * 5
    loss = symmetric(logits, torch.eye(6), torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close(loss, contrastive_loss(logits))


def test_soft_weights_by_hand():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weights = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    log = math.log

    def log_softmax(first: float, second: float) -> tuple[float, float]:
        total = log(math.exp(first) + math.exp(second))
        return first - total, second - total

    rows = [-(log_softmax(1, 0)[0] * 2 / 3 + log_softmax(1, 0)[1] / 3), -log_softmax(0, 2)[1]]
    columns = [-log_softmax(1, 0)[0], -(log_softmax(0, 2)[0] / 3 + log_softmax(0, 2)[1] * 2 / 3)]
    loss = symmetric(logits, weights, torch.ones(2, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx((sum(rows) / 2 + sum(columns) / 2) / 2, abs=1e-6)


def test_what_takes_no_part_has_no_influence():
    takes_part = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    losses, gradients = [], []
    for value in (-3.0, 8.0):
        logits = torch.tensor([[1.0, 0.0, value], [0.0, 2.0, 1.0], [0.5, 0.0, 1.0]], requires_grad=True)
        loss = symmetric(logits, torch.eye(3), takes_part)
        loss.backward()
        losses.append(loss.item())
        gradients.append(logits.grad[0, 2].item())
    assert losses[0] == pytest.approx(losses[1])
    assert gradients == [0.0, 0.0]


def test_rows_without_a_positive_do_not_count():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, -5.0]])
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    by_rows = -(torch.log_softmax(logits[:2], dim=1).diagonal().mean())
    by_columns = -(torch.log_softmax(logits.t(), dim=1)[:, :2].diagonal().mean())
    loss = symmetric(logits, weights, torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(loss, (by_rows + by_columns) / 2)


def test_without_any_positive_the_loss_is_zero_and_still_has_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = symmetric(logits, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_half_precision_logits_are_compared_in_full():
    logits = torch.eye(4, dtype=torch.bfloat16) * 50
    loss = symmetric(logits, torch.eye(4), torch.eye(4, dtype=torch.bool) | (logits > -1))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_the_sigmoid_loss_asks_of_every_pair():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0], [4.0, 4.0]])
    weights = torch.tensor([[1.0, 0.0], [0.25, 1.0], [0.0, 0.0]])
    takes_part = torch.tensor([[True, True], [True, False], [False, False]])
    total, count = sigmoid_loss(logits, weights, takes_part)

    def surprise(logit: float, weight: float) -> float:
        sure = 1 / (1 + math.exp(-logit))
        return -(weight * math.log(sure) + (1 - weight) * math.log(1 - sure))

    assert total.item() == pytest.approx(surprise(2, 1) + surprise(-1, 0) + surprise(0.5, 0.25), abs=1e-6)
    assert count == 2, "a row of which nothing takes part does not count"
