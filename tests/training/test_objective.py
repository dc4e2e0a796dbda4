# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The loss over ranks, in chunks and with cached gradients, against the whole batch in one process."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing import spawn

from m3fm.training.gradient_cache import Embeddings, GradientCache
from m3fm.training.objective import AlignmentObjective, BatchFacts
from m3fm.training.ranks import all_sum, gather_rows, main_first, own_rows, sum_own_rows

WIDTH, FINDINGS = 8, 3


def made_up_batch(seed: int, studies: int = 9) -> BatchFacts:
    """Returns studies with images, reports in either language or both, labels, and some equal texts."""
    draw = torch.Generator().manual_seed(seed)
    chance = torch.rand(studies, 4, generator=draw)
    has_report = chance[:, 0] < 0.6
    texts = [
        (study, number, language)
        for study in range(studies)
        for language in (0, 1)
        if not (has_report[study] and language and chance[study, 1] < 0.3)
        for number in [100 * language + (7 if chance[study, 2] < 0.3 else 1000 * seed + 10 * study)]
    ]
    study, number, language = (torch.tensor(column) for column in zip(*texts, strict=True))
    return BatchFacts(
        modality=(chance[:, 3] < 0.4).long(),
        has_report=has_report,
        values=(torch.rand(studies, FINDINGS, generator=draw) < 0.5).float(),
        known=torch.rand(studies, FINDINGS, generator=draw) < 0.6,
        image_study=(torch.rand(studies, generator=draw) < 0.7).nonzero()[:, 0],
        text_study=study,
        text_number=number,
        text_language=language,
    )


def embeds_of(facts: BatchFacts, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rows = (len(facts.image_study), len(facts.text_study))
    return tuple(nn.functional.normalize(torch.randn(count, WIDTH, generator=draw), dim=-1) for count in rows)


def whole_loss(facts, images, texts, scale, bias, loss, temperature=0.03, translation=2.0, mse=0.5):
    """Computes the loss of a batch entry by entry, as docs and docstrings say it."""

    def target(one: int, other: int, language: int, number: int) -> tuple[float, bool]:
        said = {
            int(n)
            for s, n, code in zip(facts.text_study, facts.text_number, facts.text_language, strict=True)
            if int(s) == one and int(code) == language
        }
        if one == other or number in said:
            return 1.0, True
        both = facts.known[one] & facts.known[other]
        left, right = (facts.values[row] * facts.known[row] for row in (one, other))
        seen_left, seen_right = (left * facts.known[other]).sum(), (right * facts.known[one]).sum()
        other_modality = bool(facts.modality[one] != facts.modality[other])
        reported = bool(facts.has_report[one] & facts.has_report[other])
        agreement = (
            float((left * right * both).sum() / (seen_left * seen_right).sqrt()) if seen_left * seen_right else 0
        )
        takes_part = other_modality or reported or bool(seen_left > 0) or bool(seen_right > 0)
        return (0.0 if other_modality or reported else agreement), takes_part

    def contrast(left, left_study, side, scale, bias, loss):
        logits = scale * left @ texts[side].t() + bias
        pairs = [
            [
                target(int(i), int(facts.text_study[j]), int(facts.text_language[j]), int(facts.text_number[j]))
                for j in side
            ]
            for i in left_study
        ]
        weights = torch.tensor([[weight for weight, _ in row] for row in pairs])
        takes_part = torch.tensor([[part for _, part in row] for row in pairs])
        if loss == "sigmoid":
            each = -(weights * logits.sigmoid().log() + (1 - weights) * (-logits).sigmoid().log())
            return each[takes_part].sum() / takes_part.any(dim=1).sum()
        total = 0
        for matrix, weight, part in ((logits, weights, takes_part), (logits.t(), weights.t(), takes_part.t())):
            rows = [
                -(w / w.sum() * (row - row[p].logsumexp(0)))[p].sum()
                for row, w, p in zip(matrix, weight, part, strict=True)
                if w.sum() > 0
            ]
            total = total + torch.stack(rows).mean() / 2
        return total

    sides = [(facts.text_language == code).nonzero()[:, 0] for code in (0, 1)]
    total = sum(contrast(images, facts.image_study, side, scale, bias, loss) for side in sides)
    pivot = facts.text_study[sides[0]]
    total = total + translation * contrast(texts[sides[0]], pivot, sides[1], 1 / temperature, 0.0, "infonce")
    pairs = [(a, b) for a in sides[0] for b in sides[1] if facts.text_study[a] == facts.text_study[b]]
    apart = torch.stack([(texts[b] - texts[a].detach()).square().sum() for a, b in pairs])
    return total + mse * apart.mean()


def objective(loss: str, rows: int) -> AlignmentObjective:
    return AlignmentObjective(loss, 2.0, 0.03, 0.5, rows)


def whole_gradients(facts, images, texts, loss):
    leaves = [each.clone().requires_grad_() for each in (images, texts, torch.tensor(9.0), torch.tensor(-3.0))]
    total = whole_loss(facts, *leaves, loss)
    return total.detach(), torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("rows", [2, 1024])
def test_loss_and_gradients_are_those_of_the_whole_matrix(loss, rows):
    facts = made_up_batch(1)
    images, texts = embeds_of(facts, 1)
    expected, grads = whole_gradients(facts, images, texts, loss)
    ours = objective(loss, rows)(facts, images, texts, torch.tensor(9.0), torch.tensor(-3.0))
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(sum(ours.parts.values()), ours.loss)
    assert set(ours.parts) == {"image_0", "image_1", "0_1", "mse_1"}
    found = (ours.image_embeds, ours.text_embeds, ours.logit_scale, ours.logit_bias)
    for name, one, other in zip(("images", "texts", "scale", "bias"), found, grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_may_lack_a_language_or_images():
    facts = made_up_batch(2)
    _, texts = embeds_of(facts, 2)
    only = facts.text_language == 1
    lacking = BatchFacts(
        facts.modality,
        facts.has_report,
        facts.values,
        facts.known,
        facts.image_study[:0],
        facts.text_study[only],
        facts.text_number[only],
        facts.text_language[only],
    )
    ours = objective("infonce", 4)(lacking, texts[:0], texts[only], torch.tensor(9.0))
    assert ours.loss == 0 and ours.parts == {} and not ours.text_embeds.any()
    assert ours.image_embeds.shape == (0, WIDTH)


@pytest.mark.parametrize(
    "values", [{"loss": "triplet"}, {"rows": 0}, {"translation_temperature": 0.0}, {"translation_weight": -1.0}]
)
def test_options_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        AlignmentObjective(**values)


# --- towers ----------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Two towers with dropout, their scale and bias as outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in range(2))
        self.dropout = nn.Dropout(0.3)
        self.scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, images: torch.Tensor, texts: torch.Tensor):
        embeds = [
            nn.functional.normalize(tower(self.dropout(each)), dim=-1)
            for tower, each in ((self.image, images), (self.text, texts))
        ]
        return *embeds, self.scale.exp(), self.bias.clone()


def embed(model, batch) -> Embeddings:
    return Embeddings(*model(batch["images"], batch["texts"]))


def inputs_of(facts: BatchFacts, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    counts = {"images": len(facts.image_study), "texts": len(facts.text_study)}
    return {name: torch.randn(count, 5, generator=draw) for name, count in counts.items()}


def step(model, facts, loss="infonce") -> float:
    """Takes the gradient of one step over micro-batches, and returns the loss."""
    cache = GradientCache(embed, objective(loss, 3))
    cache.begin(model, [inputs_of(each, seed) for seed, each in enumerate(facts, 1)], facts)
    while not cache.is_spent:
        surrogate, gradients = cache.next_surrogate(model)
        surrogate.backward()
    return gradients.loss


def test_cached_gradients_are_those_of_one_batch():
    facts = [made_up_batch(seed, studies) for seed, studies in ((1, 4), (2, 7), (3, 5))]
    inputs = [inputs_of(each, seed) for seed, each in enumerate(facts, 1)]
    together = {name: torch.cat([each[name] for each in inputs]) for name in ("images", "texts")}
    cached, whole = Towers().eval(), Towers().eval()
    loss = step(cached, facts)
    expected = whole_loss(BatchFacts.joined(facts), *whole(**together), "infonce")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for (name, one), other in zip(cached.named_parameters(), whole.parameters(), strict=True):
        if other.grad is None:  # InfoNCE does not know a constant
            assert name == "bias" and abs(one.grad) < 1e-6
        else:
            torch.testing.assert_close(
                one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_second_pass_drops_out_what_the_first_did():
    facts = [made_up_batch(seed) for seed in (1, 2)]
    model, seen = Towers().train(), []

    def spy(model, batch):
        embeds = embed(model, batch)
        seen.append(embeds.text_embeds.detach())
        return embeds

    torch.manual_seed(3)
    cache = GradientCache(spy, objective("infonce", 8))
    cache.begin(model, [inputs_of(each, 1) for each in facts], facts)
    after_first_pass = torch.get_rng_state()
    while not cache.is_spent:
        cache.next_surrogate(model)[0].backward()
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert torch.equal(torch.get_rng_state(), after_first_pass), "the next step draws what it would have drawn"


# --- ranks -----------------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    values = torch.arange(rank + 1.0)[:, None] + 10 * rank
    gathered = gather_rows(values)
    assert gathered[:, 0].tolist() == [10.0 * r + i for r in range(world_size) for i in range(r + 1)]
    assert gather_rows(values > 10).dtype == torch.bool
    assert torch.equal(gathered[own_rows(values)], values)
    assert torch.equal(sum_own_rows(gathered, values), world_size * values)
    assert all_sum(torch.tensor(1.0)) == world_size
    with main_first():
        if rank == 0:
            Path(folder, "first").touch()
        assert Path(folder, "first").exists()

    # Ranks of unequal size, two micro-batches each.
    places = [(other, micro) for other in range(world_size) for micro in (1, 2)]
    facts = {place: made_up_batch(10 * place[0] + place[1], studies=3 + sum(place)) for place in places}
    inputs = {place: inputs_of(facts[place], 10 * place[0] + place[1]) for place in places}
    mine = [place for place in places if place[0] == rank]
    for loss in ("infonce", "sigmoid"):
        whole = Towers().eval()
        together = {name: torch.cat([each[name] for each in inputs.values()]) for name in ("images", "texts")}
        expected = whole_loss(BatchFacts.joined(list(facts.values())), *whole(**together), loss)
        expected.backward()
        for wrapped in (in_ddp(Towers().eval()), in_fsdp(Towers().eval())):
            cache = GradientCache(embed, objective(loss, 3))
            cache.begin(wrapped, [inputs[place] for place in mine], [facts[place] for place in mine])
            with unsynchronised(wrapped):
                cache.next_surrogate(wrapped)[0].backward()
            surrogate, gradients = cache.next_surrogate(wrapped)
            surrogate.backward()
            torch.testing.assert_close(gradients.loss, expected.detach())
            for (name, one), other in zip(wrapped.named_parameters(), whole.parameters(), strict=True):
                found = one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad
                wanted = torch.zeros_like(found) if other.grad is None else other.grad
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, msg=f"{loss}, {name}")
    distributed.destroy_process_group()


def in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def in_fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for tower in (model.image, model.text):
        fully_shard(tower, mesh=mesh)
    # A number cannot be parted by ranks.
    return fully_shard(model, mesh=mesh, ignored_params={model.scale, model.bias})


@contextmanager
def unsynchronised(model: nn.Module):
    if hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def test_gradients_over_ranks_are_those_of_one_process(tmp_path):
    spawn(on_a_rank, (2, str(tmp_path)), nprocs=2)
