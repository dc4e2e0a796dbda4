# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The formulas of docs/scaling.md, against what models, batches and the loss really hold."""

import pytest
import torch

from m3fm.training.losses import soft_cross_entropy
from m3fm.training.objective import AlignmentObjective, BatchFacts
from m3fm.training.scaling import (
    WAYS,
    ContrastiveStep,
    Machine,
    attention_flops,
    dense_flops,
    reduce_bytes,
    state_bytes,
    step_seconds,
)


def paired_facts(studies: int, languages: int, findings: int) -> BatchFacts:
    rows = torch.arange(studies)
    return BatchFacts(
        modality=torch.zeros(studies, dtype=torch.long),
        has_report=torch.ones(studies, dtype=torch.bool),
        values=torch.zeros(studies, findings),
        known=torch.zeros(studies, findings, dtype=torch.bool),
        image_study=rows,
        text_study=rows.repeat_interleave(languages),
        text_number=torch.arange(studies * languages),
        text_language=torch.arange(languages).repeat(studies),
    )


def test_facts_weigh_what_their_tensors_weigh():
    facts = paired_facts(6, 2, 5)
    tensors = [getattr(facts, name) for name in facts.__dataclass_fields__]
    held = sum(each.numel() * each.element_size() for each in tensors)
    assert ContrastiveStep(6, languages=2, findings=5).fact_bytes * 6 == held


@pytest.mark.parametrize(("studies", "rows"), [(10, 4), (6, 1024)])
def test_the_loss_holds_the_logits_of_the_formula(monkeypatch, studies, rows):
    seen = []

    def counted(logits, *targets):
        seen.append(logits.numel())
        return soft_cross_entropy(logits, *targets)

    monkeypatch.setattr("m3fm.training.objective.soft_cross_entropy", counted)
    images, texts = torch.randn(studies, 3), torch.randn(2 * studies, 3)
    AlignmentObjective(rows=rows)(paired_facts(studies, 2, 1), images, texts, torch.tensor(10.0))
    step = ContrastiveStep(studies, width=3, languages=2, rows=rows)
    assert max(seen) == step.logits("ours")
    # Every contrast is computed in both directions, and nothing twice.
    assert sum(seen) == 2 * step.contrasts * studies**2
    assert step.flops() == 3 * 2 * 3 * sum(seen)


def test_only_our_memory_stays_as_it_is_with_more_ranks():
    one, many = ContrastiveStep(8192, rows=64), ContrastiveStep(8192, ranks=64, rows=64)
    assert one.logits("ours") == many.logits("ours") == 64 * 8192
    assert one.logits("whole") == many.logits("whole") == 8192**2
    assert many.logits("local") == one.logits("local") / 64
    assert [one.sent_bytes(way) for way in WAYS] == [0, 0, 0, 0]
    assert many.sent_bytes("ring") == 63 / 64 * 2 * 8192 * 512 * 4
    assert many.sent_bytes("local") == 2 * many.sent_bytes("ring")


def test_state_is_that_of_a_model_with_adamw():
    model = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    moments = [each for state in optimizer.state.values() for name, each in state.items() if name != "step"]
    held = [*model.parameters(), *(each.grad for each in model.parameters()), *moments]
    count = sum(each.numel() for each in model.parameters())
    assert state_bytes(count) == sum(each.numel() * each.element_size() for each in held)
    assert state_bytes(count, frozen=100, shards=4) == (16 * count + 400) / 4
    assert reduce_bytes(count, 1) == 0
    assert reduce_bytes(count, 2) == 4 * count


def test_flops_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tokens, width = 7, 16
    layer = torch.nn.Linear(width, 24, bias=False)
    queries = torch.randn(1, 2, tokens, width // 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, width))
        torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)
    assert counter.get_total_flops() == dense_flops(layer.weight.numel(), tokens) + attention_flops(1, tokens, width)


def test_a_step_is_slower_between_nodes():
    machine = Machine(flops_per_s=1e12, node=8, node_bytes_per_s=1e10, network_bytes_per_s=1e9)
    node, cluster = (step_seconds(ContrastiveStep(64 * w, w), 1e12, 1e6, machine) for w in (8, 16))
    assert node["towers"] == cluster["towers"] == 1
    assert node["gradients"] == pytest.approx(2 * 7 / 8 * 4e6 / 1e10)
    assert cluster["gradients"] == pytest.approx(2 * 15 / 16 * 4e6 / 1e9)
