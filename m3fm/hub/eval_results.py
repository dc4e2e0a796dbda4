# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Puts measured results into the metadata of a model repository, in the two formats that the Hugging Face Hub reads.

- `model-index` in the front matter of the model card takes results on any data set. It is always written.
- `.eval_results/*.yaml` takes results on benchmarks alone: data sets on the Hub with an `eval.yaml` that lists their
  tasks. A data folder is none by itself, so nothing is written unless it is said which benchmark it is a copy of. An
  entry holds one number, so its task is `COLUMN_METRIC` (`zh_finding_f1_micro`, `macro_auroc`), which the benchmark's
  `eval.yaml` has to list.

The names in `model-index` carry the interval and the floor beside the score: a number without them says little.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
    metadata_load,
    metadata_save,
    parse_eval_result_entries,
)
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from ..evaluation.titles import MODEL_ROW, ROW_TITLES, column_title, metric_title

EVAL_RESULTS_FOLDER = ".eval_results"
# More says more than these samples can tell.
DIGITS = 4

# Retrieval alone has no row of a model.
_TASKS = {"report": "image-text-to-text", "diagnosis": "zero-shot-image-classification"}
_TASK_NAMES = {"report": "Report generation", "diagnosis": "Diagnosis"}
_FLOORS = {"report": "constant_report", "diagnosis": "label_prior"}
# Parts of names to the metric ids that the Hub knows; the first that fits.
_METRIC_TYPES = (
    ("bleu", "bleu"),
    ("rouge", "rouge"),
    ("meteor", "meteor"),
    ("chrf", "chrf"),
    ("cider", "cider"),
    ("bertscore", "bertscore"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("f1", "f1"),
    ("accuracy", "accuracy"),
    ("auroc", "roc_auc"),
    ("auprc", "average_precision"),
    ("sensitivity", "recall"),
    ("brier", "brier_score"),
)
# What describes the data or the texts and not how good they are.
_NO_SCORES = frozenset({"prevalence", "distinct"})


@dataclass(frozen=True)
class Score:
    """One number of a run, with what it has to be read beside.

    Attributes:
        column: Language, label or "macro".
        metric: Name as in `metrics.json`.
        value: Of the model.
        interval: 95 % interval, if there is one.
        floor: The same metric of the constant report or the label prior, if there is one.
    """

    column: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    floor: float | None


def read_scores(metrics: Mapping[str, Any]) -> list[Score]:
    """Returns the model's scores: all of each language or of the average over labels, of single labels AUROC alone.

    Args:
        metrics: As in `metrics.json`.

    Raises:
        ValueError: If it holds no scores of a model.
    """
    task = metrics.get("task")
    columns = (metrics.get("rows") or {}).get(MODEL_ROW)
    if task not in _TASKS or not columns:
        raise ValueError(f"Expected scores of a model in one of {list(_TASKS)}, got the task {task!r}.")
    intervals = (metrics.get("intervals") or {}).get(MODEL_ROW, {})
    floors = metrics["rows"].get(_FLOORS[task], {})
    scores = []
    for column, by_metric in columns.items():
        for name, value in by_metric.items():
            is_shown = task == "report" or column == "macro" or name == "auroc" or len(columns) == 1
            if value is None or name in _NO_SCORES or not is_shown:
                continue
            interval = intervals.get(column, {}).get(name)
            if interval is not None:
                interval = None if None in interval else tuple(interval)
            scores.append(Score(column, name, value, interval, floors.get(column, {}).get(name)))
    return scores


def card_results(
    metrics: Mapping[str, Any], dataset_id: str | None = None, source_url: str | None = None
) -> list[EvalResult]:
    """Returns the results of a run as `model-index` holds them.

    Args:
        metrics: As in `metrics.json`.
        dataset_id: Of the data set on the Hub; None takes the name of its folder.
        source_url: Where the numbers and how they were made can be looked up.

    Raises:
        ValueError: If it holds no scores of a model.
    """
    task = metrics["task"]
    shots = _shots(metrics)
    is_trained = shots not in ("", "0-shot")
    return [
        EvalResult(
            task_type="image-classification" if is_trained else _TASKS[task],
            task_name=_task_name(metrics),
            dataset_type=dataset_id or metrics["data"],
            dataset_name=metrics["data"],
            # Results are told apart by this, and several trainings on one data set are several results.
            dataset_config=f"{score.column}, {shots}" if is_trained else score.column,
            dataset_split=metrics["split"],
            metric_type=_metric_type(score.metric),
            metric_name=_metric_name(score, task),
            metric_value=round(score.value, DIGITS),
            source_name="m3fm evaluate" if source_url else None,
            source_url=source_url,
        )
        for score in read_scores(metrics)
    ]


def benchmark_entries(
    metrics: Mapping[str, Any], dataset_id: str, source_url: str | None = None
) -> list[EvalResultEntry]:
    """Returns the results of a run as `.eval_results/*.yaml` holds them.

    Args:
        metrics: As in `metrics.json`.
        dataset_id: Of a benchmark on the Hub, "owner/name".
        source_url: Where the numbers and how they were made can be looked up.

    Raises:
        ValueError: If it holds no scores of a model, or the id is none of the Hub.
    """
    _check_dataset_id(dataset_id)
    task = metrics["task"]
    return [
        EvalResultEntry(
            dataset_id=dataset_id,
            task_id=f"{score.column}_{score.metric}",
            value=round(score.value, DIGITS),
            source_name="m3fm evaluate" if source_url else None,
            source_url=source_url,
            notes=f"{_task_name(metrics)}, part {metrics['split']}: {_metric_name(score, task)}",
        )
        for score in read_scores(metrics)
    ]


def update_card(card: Path, model_name: str, results: Sequence[EvalResult]) -> None:
    """Writes results into the front matter of a card; the text and other keys stay, in their order.

    Results that are there already stay too, except those of the same task, data set, column and part.

    Args:
        card: README.md of a model repository.
        model_name: Of a card without `model-index`.
        results: To write.

    Raises:
        ValueError: If there is no card, or its `model-index` is not valid.
    """
    if not card.is_file():
        raise ValueError(f"{card}: no such model card.")
    metadata = metadata_load(card) or {}
    kept: list[EvalResult] = []
    if earlier := metadata.get("model-index"):
        try:
            model_name, kept = model_index_to_eval_results(earlier)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{card}: its model-index is not valid.") from None
    replaced = {result.unique_identifier for result in results}
    kept = [result for result in kept if result.unique_identifier not in replaced]
    metadata["model-index"] = eval_results_to_model_index(model_name, [*kept, *results])
    ModelCardData(**metadata)  # raises where the Hub would refuse
    metadata_save(card, metadata)


def write_entries(folder: Path, name: str, entries: Sequence[EvalResultEntry]) -> Path:
    """Writes `.eval_results/NAME.yaml` of a model repository, once its content is read back as what it was.

    Raises:
        ValueError: If huggingface_hub reads something else.
    """
    text = yaml.safe_dump(eval_result_entries_to_yaml(list(entries)), sort_keys=False, allow_unicode=True, width=1000)
    if parse_eval_result_entries(yaml.safe_load(text)) != list(entries):
        raise ValueError(f"{name}: huggingface_hub does not read these results back as they are.")
    path = folder / EVAL_RESULTS_FOLDER / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `python -m m3fm.hub.eval_results METRICS.json ... --card README.md --folder DIR --benchmark NAME=ID`."""
    parser = argparse.ArgumentParser(prog="m3fm.hub.eval_results", description="Put results into a model repository.")
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json of one or more evaluations")
    parser.add_argument("--card", type=Path, help="README.md whose model-index is brought up to date")
    parser.add_argument("--folder", type=Path, help="model repository that gets .eval_results/*.yaml")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=OWNER/NAME",
        help="data folder and the benchmark on the Hub that it is a copy of; may be repeated",
    )
    parser.add_argument("--source-url", help="where the numbers can be looked up")
    args = parser.parse_args(argv)
    try:
        benchmarks = _read_benchmarks(args.benchmark)
        runs = [_read_run(path) for path in args.metrics]
        if not (args.card or args.folder):
            raise ValueError("Expected --card, --folder or both: the results have nowhere to go.")
        if args.card:
            if len(models := {run["model"] for run in runs}) > 1:
                raise ValueError(f"Expected results of one model for one card, got {sorted(models)}.")
            results = [
                each for run in runs for each in card_results(run, benchmarks.get(run["data"]), args.source_url)
            ]
            update_card(args.card, runs[0]["model"], results)
            sys.stdout.write(f"{args.card}: {len(results)} results in model-index\n")
        if args.folder:
            _write_folder(args.folder, runs, benchmarks, args.source_url)
    except ValueError as error:
        parser.error(str(error))


def _write_folder(
    folder: Path, runs: Iterable[Mapping[str, Any]], benchmarks: Mapping[str, str], source_url: str | None
) -> None:
    for run in runs:
        if run["data"] not in benchmarks:
            hint = f"{run['data']}: no benchmark on the Hub is named for it (--benchmark), so {EVAL_RESULTS_FOLDER}"
            sys.stdout.write(f"{hint} gets nothing; the model card can hold it.\n")
            continue
        entries = benchmark_entries(run, benchmarks[run["data"]], source_url)
        name = "_".join(part for part in (run["data"], run["task"], _shots(run), run["split"]) if part)
        path = write_entries(folder, name, entries)
        sys.stdout.write(f"{path}: {len(entries)} results\n")


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{path}: expected a metrics.json of m3fm evaluate.") from None
    missing = [key for key in ("task", "model", "data", "split", "rows") if key not in run]
    if missing:
        raise ValueError(f"{path}: expected a metrics.json of m3fm evaluate, {', '.join(missing)} missing.")
    return run


def _read_benchmarks(pairs: Sequence[str]) -> dict[str, str]:
    benchmarks = {}
    for pair in pairs:
        name, _, dataset_id = pair.partition("=")
        _check_dataset_id(dataset_id)
        benchmarks[name] = dataset_id
    return benchmarks


def _check_dataset_id(dataset_id: str) -> None:
    owner, slash, name = dataset_id.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise ValueError(f"Expected the id of a data set on the Hub as 'owner/name', got {dataset_id!r}.")


def _task_name(metrics: Mapping[str, Any]) -> str:
    return ", ".join(part for part in (_TASK_NAMES[metrics["task"]], _shots(metrics)) if part)


def _shots(metrics: Mapping[str, Any]) -> str:
    """Returns how many labelled studies a class a diagnosis learned from; "" for reports."""
    if metrics["task"] != "diagnosis":
        return ""
    shots = metrics.get("shots") or 0
    return "all-labels" if shots == "full" else f"{shots}-shot"


def _metric_type(name: str) -> str:
    return next((kind for part, kind in _METRIC_TYPES if part in name), name)


def _metric_name(score: Score, task: str) -> str:
    """Returns "BLEU-4, English (95 % interval 0.49 to 0.57; constant report 0.527)"."""
    beside = []
    if score.interval:
        beside.append(f"95 % interval {score.interval[0]:.3f} to {score.interval[1]:.3f}")
    if score.floor is not None:
        beside.append(f"{ROW_TITLES[_FLOORS[task]]} {score.floor:.3f}")
    name = f"{metric_title(score.metric)}, {column_title(score.column)}"
    return f"{name} ({'; '.join(beside)})" if beside else name


if __name__ == "__main__":
    main()
