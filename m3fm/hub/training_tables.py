# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Tables of docs/scaling.md and docs/training.md, rendered from what the benchmarks of training measured."""

import statistics
from collections.abc import Callable
from typing import Any

from ..evaluation.tables import markdown_table
from ..evaluation.titles import number

__all__ = ["TABLES"]

_WAYS = {
    "whole": "all logits on every rank",
    "local": "own rows and columns",
    "ring": "ring of texts (sigmoid)",
    "ours": "ours, InfoNCE",
    "ours, sigmoid": "ours, sigmoid",
}


def contrastive_gradients(facts: dict[str, Any]) -> str:
    """Renders how far the gradients of the sharded, cached loss are from those of the whole batch."""
    head = ["loss", "ranks", "by", "studies", "largest gradient", "largest difference", "relative", "loss differs by"]
    return _table(
        head,
        (
            [
                case["loss"],
                str(case["ranks"]),
                f"`{case['way']}`",
                " / ".join(" + ".join(map(str, sizes)) for sizes in case["studies"]),
                f"{case['largest_gradient']:.2g}",
                *(f"{case[name]:.1e}" for name in ("largest_difference", "relative_difference", "loss_difference")),
            ]
            for case in facts["gradients"]
        ),
    )


def contrastive_memory(facts: dict[str, Any]) -> str:
    """Renders peak memory of a rank, measured and by formula."""
    return _costs(facts, "peak_bytes", "peak_by_formula")


def contrastive_traffic(facts: dict[str, Any]) -> str:
    """Renders bytes that a rank sends, measured and by formula."""
    return _costs(facts, "sent_bytes", "sent_by_formula")


def _costs(facts: dict[str, Any], measured: str, formula: str) -> str:
    batches = sorted({case["studies"] for case in facts["costs"]})
    head = ["loss", "R", "ranks", *(f"B = {studies:,}: MB, by formula" for studies in batches)]
    rows: dict[tuple[str, ...], list[str]] = {}
    for case in sorted(facts["costs"], key=lambda case: case["studies"]):
        row = (_WAYS[case["way"]], str(case["rows"] or "–"), str(case["ranks"]))
        rows.setdefault(row, []).append(f"{_mb(case[measured])}, {_mb(case[formula])}")
    return _table(head, [[*row, *cells] for row, cells in rows.items()])


def contrastive_at_scale(facts: dict[str, Any]) -> str:
    """Renders what the formulas give for more ranks."""
    cases = facts["at_scale"]
    ways = dict.fromkeys(case["way"] for case in cases)
    rows: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        row = (str(case["ranks"]), f"{case['studies']:,}")
        rows.setdefault(row, []).append(f"{size(case['memory_bytes'])}, {size(case['sent_bytes'])}")
    head = ["GPUs", "B", *(f"{_WAYS[way].partition(',')[0]}: memory, sent" for way in ways)]
    return _table(head, [[*row, *cells] for row, cells in rows.items()])


def contrastive_steps(facts: dict[str, Any]) -> str:
    """Renders the state, the traffic and the estimated time of steps of larger models."""
    head = ["recipe", "GPUs", "B", "state, DDP", "state, FSDP2", "embeddings sent", "gradients sent"]
    head += ["towers, ms", "loss, ms", "sending, ms", "share of towers"]
    rows = []
    for case in facts["steps"]:
        seconds = case["seconds"]
        sending = seconds["embeddings"] + seconds["gradients"]
        rows.append(
            [
                *(case["recipe"], str(case["ranks"]), f"{case['studies']:,}"),
                *(size(case[name]) for name in ("state_bytes", "parted_bytes", "sent_bytes", "reduce_bytes")),
                *(f"{1000 * each:.3g}" for each in (seconds["towers"], seconds["loss"], sending)),
                f"{seconds['towers'] / sum(seconds.values()):.0%}",
            ]
        )
    return _table(head, rows)


def align_memory(facts: dict[str, Any]) -> str:
    """Renders peak memory of a step by batch size, with and without cached gradients."""
    head = ["batch", "micro-batches", "peak MB", "over the model's", "s a step", "peak / first"]
    first = facts["results"][0]["peak_bytes"]
    return _table(
        head,
        (
            [
                f"{case['batch']:,}",
                f"{case['micro_batches']} of {case['micro_batch']}",
                _mb(case["peak_bytes"]),
                _mb(case["peak_bytes"] - case["before_bytes"]),
                f"{case['seconds']:.0f}",
                f"{case['peak_bytes'] / first:.2f}",
            ]
            for case in facts["results"]
        ),
    )


def align_speed(facts: dict[str, Any]) -> str:
    """Renders stage 1 beside open_clip's step."""
    on_gpu = any("of_peak" in case for case in facts["results"])
    head = ["batch", "micro-batches", "ours, studies/s", "open_clip, studies/s", "ratio", "of CPU time"]
    head += ["matrix multiplication"]
    return _table(
        head + ["of the card's peak"] * on_gpu,
        (
            [
                str(case["batch"]),
                str(case["micro_batches"]),
                *(f"{case['studies_per_s'][name]:.2f}" for name in ("ours", "open_clip")),
                f"{case['ratio']:.2f}",
                number(case.get("cpu_ratio"), 2),
                f"{case['matmul_share']:.0%}",
                *([f"{case['of_peak']:.0%}"] if on_gpu else []),
            ]
            for case in facts["results"]
        ),
    )


def rank_scaling(facts: dict[str, Any]) -> str:
    """Renders how much faster several ranks are than one."""
    head = ["scaling", "ranks", "studies of a step", "studies/s", "of one rank", "of as many apart"]
    return _table(
        head,
        (
            [
                case["scaling"],
                str(case["ranks"]),
                str(case["batch"]),
                f"{case['studies_per_s']:.1f}",
                f"{case['speedup']:.2f}x",
                f"{case['of_apart']:.0%}",
            ]
            for case in facts["results"]
        ),
    )


def stream_scaling(facts: dict[str, Any]) -> str:
    """Renders streams of more and more rows, over all ranks."""
    head = ["rows", "shards", "ranks", "each row once", "rows of a rank", "peak MB of a rank", "rows/s of a rank"]
    return _table(
        head,
        (
            [
                f"{case['rows']:,}",
                str(case["shards"]),
                str(case["ranks"]),
                "yes" if case["once"] else "no",
                f"{min(case['of_ranks']):,} to {max(case['of_ranks']):,}",
                _mb(max(case["peak_bytes"])),
                f"{statistics.median(case['rows_per_s']):,.0f}",
            ]
            for case in facts["streams"]
        ),
    )


def stream_orders(facts: dict[str, Any]) -> str:
    """Renders what the order of an epoch, and studies that are all at hand, take."""
    head = ["studies", "held", "MB", "bytes a study", "at 10^8"]
    return _table(
        head,
        (
            [
                f"{case['studies']:,}",
                case["held"],
                _mb(case["peak_bytes"]),
                f"{case['peak_bytes'] / case['studies']:.0f}",
                size(case["peak_bytes"] / case["studies"] * 1e8),
            ]
            for case in facts["held"]
        ),
    )


def size(count: float) -> str:
    """Renders bytes with three digits: 1.23 GB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return (
                f"{count / 10**power:.3g} {unit}" if count < 1000 * 10**power else f"{count / 10**power:,.0f} {unit}"
            )
    return f"{count:.0f} B"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f}" if count >= 9.95e6 else f"{count / 1e6:.1f}"


def _table(head: list[str], rows: Any) -> str:
    return markdown_table([head, *rows])


#: The name of a table, with the part after `#` where one benchmark gives several, to what renders it.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "contrastive_scaling#gradients": contrastive_gradients,
    "contrastive_scaling#memory": contrastive_memory,
    "contrastive_scaling#traffic": contrastive_traffic,
    "contrastive_scaling#at_scale": contrastive_at_scale,
    "contrastive_scaling#steps": contrastive_steps,
    "align_memory": align_memory,
    "align_speed": align_speed,
    "rank_scaling": rank_scaling,
    "stream_scaling#streams": stream_scaling,
    "stream_scaling#held": stream_orders,
}
