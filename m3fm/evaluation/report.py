# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Evaluate report generation on a data folder: scores, floors, image use, retrieval, written down to be re-run.

`evaluate_reports` is what `m3fm evaluate --task report` runs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Study, fingerprint
from ..data.splits import new_to
from .baselines import derangement, nearest_neighbors, random_reports, select_constant_report
from .bertscore import BertScorer
from .clinical_metrics import ClinicalScorer
from .features import embed_resumably
from .meteor import JavaMeteor
from .page import write_page
from .parallel import RECALL_AT, text_retrieval
from .reporter import CONTROLS, CheckpointReporter, Reporter, embed_in_batches, hash_checkpoint
from .resampling import Measurement, cluster_weights, compare_rows
from .retrieval import retrieval_recall, same_text
from .runs import (
    FORMAT,
    METRICS_FILE,
    PREDICTIONS,
    command_line,
    complete_predictions,
    group_numbers,
    hash_order,
    hash_text,
    open_output,
    provenance,
    without_nan,
    write_json,
)
from .selection import evaluated_and_training
from .tables import TRAINING_PART, render_table
from .text_metrics import LANGUAGES, TextScorer, distinct_ratio

# One draw of random or shuffled reports for 72 studies moves BLEU-4 by 0.015, so such rows are means over draws.
_MOST_DRAWS, _STUDIES_DRAWN = 10, 1000


@dataclass(frozen=True)
class ReportMetrics:
    """What reports are scored with beside the default suite.

    Attributes:
        java_meteor: The full METEOR of pycocoevalcap, which needs Java.
        bertscore: BERTScore with a model at hand.
        num_resamples: Of patients, for intervals and p-values.
    """

    java_meteor: JavaMeteor | None = None
    bertscore: BertScorer | None = None
    num_resamples: int = 1000


@dataclass
class _Scores:
    """Collects what `metrics.json` holds of each language."""

    rows: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    intervals: dict[str, dict[str, dict[str, tuple[float, float]]]] = field(default_factory=dict)
    differences: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    findings: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    num_studies: dict[str, int] = field(default_factory=dict)
    num_groups: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        language: str,
        systems: dict[str, list[list[str]]],
        references: Sequence[str],
        groups: Sequence[int],
        metrics: ReportMetrics,
        seed: int,
    ) -> None:
        """Scores systems, each with the reports of one or several draws, on the same resamples of patients."""
        text = TextScorer(references, language, java_meteor=metrics.java_meteor, bertscore=metrics.bertscore)
        clinical = ClinicalScorer(references, language)

        def measure(reports: list[str]) -> list[Measurement]:
            return [*text.measure(reports), *clinical.measure(reports)]

        trials = {name: [measure(reports) for reports in draws] for name, draws in systems.items()}
        weights = cluster_weights(groups, metrics.num_resamples, seed)
        for place, by_row in zip(
            (self.rows, self.intervals, self.differences), compare_rows(trials, weights), strict=True
        ):
            for name, scores in by_row.items():
                place.setdefault(name, {})[language] = scores
        for name, draws in systems.items():
            self.rows[name][language]["distinct"] = float(np.mean([distinct_ratio(reports) for reports in draws]))
        self.findings[language] = clinical.finding_table(systems["model"][0])
        self.num_studies[language], self.num_groups[language] = len(references), len(set(groups))


def evaluate_reports(
    model_dir: str | Path,
    data_folder: str | Path,
    languages: Sequence[str] | None = None,
    output_dir: str | Path = "evaluation",
    split: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    training_data: str | Path | None = None,
    metrics: ReportMetrics | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint's reports beside the floors, prints the tables, returns what `metrics.json` holds.

    Writes `predictions.jsonl`, `run.json` and `features/` (an interrupted run goes on after them), `metrics.json` and
    `report.html`.

    Args:
        model_dir: A checkpoint folder.
        data_folder: The floors are chosen in its part "train"; without one, among the other patients that are
            evaluated, and the constant report among all of them, which favours the floor.
        languages: Codes to evaluate; None: all that the checkpoint writes and the data has reports in.
        output_dir: Made if missing.
        split: The part to evaluate, see `evaluated_and_training`; where not all its studies are of new patients, those
            are scored alone too.
        batch_size: Studies at once.
        seed: Of random reports, shuffles and resamples.
        device: A torch device.
        num_beams: Beams; None takes the checkpoint's generation config.
        max_new_tokens: Longest report in tokens; None takes the checkpoint's.
        training_data: A folder whose part "train" the floors are chosen in instead.
        metrics: What is scored beside the default suite, and how often patients are resampled.

    Raises:
        ValueError: If the checkpoint, the data or a language does not fit, or `output_dir` holds another run.
    """
    evaluated, training, part = evaluated_and_training(data_folder, split, training_data)
    reporter = CheckpointReporter(model_dir, device, num_beams, max_new_tokens)
    languages = _checked_languages(languages, reporter.languages, evaluated, part)
    evaluated = _with_reports(evaluated, languages)
    # A training image without report taught the model its patient too.
    is_new = new_to(training, evaluated)
    training = _with_reports(training, languages)
    _check_floors(evaluated, training, languages)
    run = {
        "task": "report",
        "split": part,
        "languages": languages,
        "model_sha256": hash_checkpoint(model_dir),
        "data_sha256": fingerprint([*evaluated, *training]),
        "order_sha256": hash_order([*evaluated, *training]),
        "decoding": reporter.decoding_settings,
    }
    output = open_output(output_dir, run)
    groups = group_numbers(evaluated)
    rows = predict_reports(reporter, evaluated, groups, languages, output / PREDICTIONS, batch_size)
    chosen = metrics or ReportMetrics()
    options = {"data": data_folder, "training_data": training_data, "language": languages, "output": output_dir}
    options |= {"split": part, "batch_size": batch_size, "seed": seed, "device": device, "num_beams": num_beams}
    options |= {"max_new_tokens": max_new_tokens, "num_resamples": chosen.num_resamples}
    if chosen.bertscore:
        options["bertscore_model"] = chosen.bertscore.model_dir
    command = command_line("report", model_dir, options) + (" --java-meteor" if chosen.java_meteor else "")
    content = {
        "format": FORMAT,
        **run,
        **provenance(model_dir, data_folder, seed, device, chosen.num_resamples, command),
        **({"bertscore_model_sha256": hash_checkpoint(chosen.bertscore.model_dir)} if chosen.bertscore else {}),
        **score_predictions(reporter, evaluated, training, rows, is_new, languages, output, batch_size, seed, chosen),
    }
    result = without_nan(content)
    write_json(output / METRICS_FILE, result)
    page = write_page(output, {study.study_id: study for study in evaluated})
    sys.stdout.write(f"{render_table(result)}\n\n{page}\n")
    return result


def predict_reports(
    reporter: Reporter,
    studies: Sequence[Study],
    groups: Sequence[int],
    languages: Sequence[str],
    path: Path,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Writes reports from the studies' images and from images that show nothing, resumably.

    Returns:
        A row for each study in their order: `study_id`, `group`, and by language `prediction`, `reference` and the
        controls' reports.
    """
    group_of = {study.study_id: group for study, group in zip(studies, groups, strict=True)}

    def predict(batch: Sequence[Study]) -> list[dict[str, Any]]:
        written = {
            control: {language: reporter.generate(batch, language, control) for language in languages}
            for control in (None, *CONTROLS)
        }
        for by_language in written.values():
            for language, texts in by_language.items():
                if len(texts) != len(batch):
                    raise ValueError(f"Expected {len(batch)} reports in {language!r}, got {len(texts)}.")
        return [
            {
                "group": group_of[study.study_id],
                "prediction": {language: written[None][language][place] for language in languages},
                "reference": {code: text for code, text in study.reports.items() if code in languages},
                "controls": {
                    control: {language: written[control][language][place] for language in languages}
                    for control in CONTROLS
                },
            }
            for place, study in enumerate(batch)
        ]

    return complete_predictions(path, studies, batch_size, predict, "reports")


def score_predictions(
    reporter: Reporter,
    evaluated: Sequence[Study],
    training: Sequence[Study],
    predictions: Sequence[dict[str, Any]],
    is_new: Sequence[bool],
    languages: Sequence[str],
    output: Path,
    batch_size: int,
    seed: int,
    metrics: ReportMetrics,
) -> dict[str, Any]:
    """Scores predictions beside the floors, and retrieval in the shared space.

    Returns:
        `rows`, `intervals`, `differences`, `findings`, `num_studies`, `num_groups`, `floors_from`, `constant` (which
        report it was), `retrieval`, and where not all studies are of new patients, `new_patients` with `rows`,
        `intervals`, `num_studies` and `num_groups` of those that are.
    """
    folder = output / "features"
    features = embed_resumably(reporter.embed_studies, evaluated, folder, "images", batch_size)
    from_others = _Floors(evaluated, features, [row["group"] for row in predictions])
    from_training = _Floors(training, {}, None)
    if training:
        trained = embed_resumably(reporter.embed_studies, training, folder, "training_images", batch_size)
        from_training = _Floors(training, trained, None)
    all_scores, new_scores = _Scores(), _Scores()
    constants, floors_from, retrieval = {}, {}, {}
    for language in languages:
        here = [i for i, study in enumerate(evaluated) if language in study.reports]
        references = [evaluated[i].reports[language] for i in here]
        groups = [predictions[i]["group"] for i in here]
        floors = from_training if any(language in study.reports for study in training) else from_others
        floors_from[language] = TRAINING_PART if floors is from_training else "other patients of the evaluated part"
        constant = floors.constant(language, seed)
        # Its text, for an id may be a patient's.
        constants[language] = {"report_sha256": hash_text(constant), "criterion": "rouge_l"}
        model_rows = [predictions[i] for i in here]
        systems = _image_use(model_rows, language, constant, seed)
        systems |= floors.systems(language, {space: matrix[here] for space, matrix in features.items()}, groups, seed)
        all_scores.add(language, systems, references, groups, metrics, seed)
        new = [place for place, i in enumerate(here) if is_new[i]]
        new_scores.num_studies[language] = len(new)
        if 2 <= len(new) < len(here):
            systems = _image_use([model_rows[place] for place in new], language, constant, seed)
            chosen = ([references[place] for place in new], [groups[place] for place in new])
            new_scores.add(language, systems, *chosen, metrics, seed)
        texts = embed_in_batches(reporter, references, batch_size)
        retrieval[f"image-{language}"] = retrieval_recall(
            features["shared"][here], texts, RECALL_AT, same_text(references)
        )
    common = [study.reports for study in evaluated if all(language in study.reports for language in languages)]
    if common and len(languages) > 1:
        columns = {language: [reports[language] for reports in common] for language in languages}
        retrieval |= text_retrieval(reporter, columns, batch_size)
    result = {**vars(all_scores), "floors_from": floors_from, "constant": constants, "retrieval": retrieval}
    if new_scores.num_studies != all_scores.num_studies:
        parts = ("rows", "intervals", "num_studies", "num_groups")
        result["new_patients"] = {part: getattr(new_scores, part) for part in parts}
    return result


@dataclass(frozen=True)
class _Floors:
    """Chooses reports without a model, from studies with features by space; own groups are kept out where given."""

    studies: Sequence[Study]
    features: dict[str, np.ndarray]
    groups: Sequence[int] | None

    def constant(self, language: str, seed: int) -> str:
        reports = self._reports(language)
        return reports[select_constant_report(reports, language, seed=seed)]

    def systems(
        self, language: str, queries: dict[str, np.ndarray], groups: Sequence[int], seed: int
    ) -> dict[str, list[list[str]]]:
        reports, count = self._reports(language), len(groups)
        there = self._places(language)
        apart = (None, None) if self.groups is None else (groups, [self.groups[i] for i in there])
        draws = range(_num_draws(count))
        systems = {"random_report": [random_reports(reports, count, seed + draw, *apart) for draw in draws]}
        for space, matrix in queries.items():
            nearest = nearest_neighbors(matrix, self.features[space][there], *apart)
            systems[f"nearest_neighbor_{space}"] = [[reports[i] for i in nearest]]
        return systems

    def _places(self, language: str) -> list[int]:
        return [i for i, study in enumerate(self.studies) if language in study.reports]

    def _reports(self, language: str) -> list[str]:
        return [self.studies[i].reports[language] for i in self._places(language)]


def _image_use(rows: Sequence[dict[str, Any]], language: str, constant: str, seed: int) -> dict[str, list[list[str]]]:
    """Returns what is compared to see whether images are looked at; each system has one or several draws."""
    written = [row["prediction"][language] for row in rows]
    # Each report was written from its own image alone, without sampling. Giving the model the image of another study
    # would make it write that study's report again, so permuting reports is generating on permuted images.
    shuffles = [derangement(len(written), seed + draw) for draw in range(_num_draws(len(written)))]
    return {
        "model": [written],
        "shuffled_images": [[written[i] for i in order] for order in shuffles],
        **{control: [[row["controls"][control][language] for row in rows]] for control in CONTROLS},
        "constant_report": [[constant] * len(written)],
    }


def _num_draws(num_studies: int) -> int:
    return max(2, min(_MOST_DRAWS, _STUDIES_DRAWN // num_studies))


def _checked_languages(
    languages: Sequence[str] | None, known: Sequence[str], evaluated: Sequence[Study], part: str
) -> list[str]:
    """Returns the languages to evaluate, each with at least two reports."""
    possible = [code for code in known if code in LANGUAGES]
    if languages is not None:
        unknown = sorted(set(languages) - set(possible))
        if unknown or len(set(languages)) != len(languages) or not languages:
            raise ValueError(f"Unsupported languages {list(languages)}: expected some of {possible}, each once.")
    counts = {code: sum(code in study.reports for study in evaluated) for code in languages or possible}
    chosen = [code for code, count in counts.items() if count >= 2]
    if not chosen or (languages is not None and len(chosen) < len(languages)):
        raise ValueError(
            f"Expected at least 2 studies with an image and a report in each language in {part!r}, got {counts}."
        )
    return chosen


def _check_floors(evaluated: Sequence[Study], training: Sequence[Study], languages: Sequence[str]) -> None:
    """Refuses, before anything is written, a run that has no study to take floors from."""
    for language in languages:
        here = [study for study in evaluated if language in study.reports]
        if not any(language in study.reports for study in training) and len(set(group_numbers(here))) < 2:
            raise ValueError(
                f"Expected reports in {language!r} of at least two patients, or a training part to take floors from: "
                f"got {len(here)} studies of one patient. --training-data names a folder with a training part."
            )


def _with_reports(studies: Sequence[Study], languages: Sequence[str]) -> list[Study]:
    return [study for study in studies if any(code in study.reports for code in languages)]
