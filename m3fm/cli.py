# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the commands of `m3fm` do; what may be typed stands in `m3fm_cli.py` and `m3fm_data_cli.py`."""

import collections
import contextlib
import os
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from m3fm_options import EXIT_ERROR, NOTICE

from . import DEFAULT_CHECKPOINT
from .batch.report import report_files
from .batch.sources import StudySource
from .download import download
from .evaluation.reporter import checkpoint_folder

# --------------------------------------------------------------------------------------------------------------------
# m3fm report


def report(args: Namespace) -> int:
    """Writes reports as they come out of the model, and lists the studies that cannot be read or are refused."""
    _quieten_transformers()
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(_downloaded(args.files)) if args.download else args.files
        sys.stderr.write(f"{NOTICE}\n")
        counts = report_files(
            files,
            language=args.language,
            output=args.output,
            format=args.format,
            model=_checked_model(args.model),
            device=_checked_device(args.device),
            num_beams=args.num_beams,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            on_suspect=args.on_suspect,
            resume=not args.overwrite,
            on_unread=lambda source, error: sys.stderr.write(f"error: {source}: {error}\n"),
        )
    if args.output is not None:
        told = counts["studies"] - counts["errors"]
        resumed = f", {counts['resumed']} of them by an earlier run" if counts["resumed"] else ""
        sys.stderr.write(f"{told} of {counts['studies']} studies reported in {args.output}{resumed}\n")
    return EXIT_ERROR if counts["errors"] else 0


@contextlib.contextmanager
def _downloaded(addresses: list[str]) -> Iterator[list[StudySource]]:
    """Gives what lies at each address as a study, in a folder that is there no longer than it is needed."""
    with tempfile.TemporaryDirectory(prefix="m3fm-") as folder:
        sources = []
        for number, address in enumerate(addresses):
            place = Path(folder) / str(number)
            place.write_bytes(download(address))
            sources.append(StudySource(address.partition("?")[0].partition("#")[0], (place,)))
        yield sources


def _quieten_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


# --------------------------------------------------------------------------------------------------------------------
# m3fm diagnose, calibrate, explain


def diagnose(args: Namespace) -> int:
    """Scores findings on files into a table."""
    from .diagnosis.table import diagnose_files

    _quieten_transformers()
    sys.stderr.write(f"{NOTICE}\n")
    counts = diagnose_files(
        args.files[0] if len(args.files) == 1 else args.files,
        labels=_file_or_names(args.labels),
        output=args.output,
        format=args.format,
        model=_checked_model(args.model),
        device=str(_checked_device(args.device)),
        report_language=args.report_language,
        exclusive=args.exclusive,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        on_suspect=args.on_suspect,
        resume=not args.overwrite,
    )
    if args.output is not None:
        read = counts["studies"] - counts["errors"]
        sys.stderr.write(f"{read} of {counts['studies']} studies diagnosed in {args.output}\n")
    return EXIT_ERROR if counts["errors"] else 0


def _file_or_names(labels: list[str] | None) -> str | list[str] | None:
    """Returns the path of a label file, which has an ending, or names of findings, which have none."""
    if labels and len(labels) == 1 and Path(labels[0]).suffix:
        return labels[0]
    return labels


def calibrate(args: Namespace) -> int:
    """Writes a calibrated copy of a checkpoint, and says which labels could not be calibrated."""
    from .diagnosis.calibrate import calibrate_checkpoint

    _quieten_transformers()
    facts = calibrate_checkpoint(
        _checked_model(args.model),
        args.data,
        args.folder,
        batch_size=args.batch_size,
        device=str(_checked_device(args.device)),
        seed=args.seed,
    )
    for label, reason in facts["uncalibrated"].items():
        sys.stderr.write(f"not calibrated: {label}: {reason}\n")
    sys.stderr.write(f"calibrated: {', '.join(facts['calibrated'])}; written: {facts['output_dir']}\n")
    return 0


def explain(args: Namespace) -> int:
    """Draws heat maps for phrases and findings, and weighs the sentences of a written report."""
    from .explain_files import explain_files

    _quieten_transformers()
    sys.stderr.write(f"{NOTICE}\n")
    rows = explain_files(
        args.files,
        phrases=args.phrase,
        labels=args.labels,
        method=args.method,
        output_dir=args.output,
        model=_checked_model(args.model),
        device=str(_checked_device(args.device)),
        language=args.language,
        report_language=args.report_language,
        on_error="row",
    )
    failed = {row["source"]: row["error"] for row in rows if "error" in row}
    for source, error in failed.items():
        sys.stderr.write(f"error: {source}: {error}\n")
    sys.stderr.write(f"explanations are in {args.output}\n")
    return EXIT_ERROR if failed else 0


# --------------------------------------------------------------------------------------------------------------------
# m3fm train, evaluate, compare, export


def train(args: Namespace) -> int:
    """Runs a recipe, says what it would take, or lists those that ship."""
    if not _is_main_rank():
        # The others of a run say the same.
        _quieten_transformers()
        os.environ["TQDM_DISABLE"] = "1"
    from .training.recipe import RECIPES, find_recipe, plan_recipe, run_recipe

    if args.list:
        for path in sorted(RECIPES.glob("*.yaml")):
            first_line = path.read_text(encoding="utf-8").splitlines()[0]
            sys.stdout.write(f"{path.stem:<20} {first_line.removeprefix('#').strip()}\n")
        return 0
    recipe, settings = _split_words(args.words)
    if recipe is None:
        raise ValueError(
            "Expected a recipe beside `--name value` pairs: a YAML file, or one that `m3fm train --list` shows."
        )
    path = find_recipe(recipe)
    if args.dry_run:
        from .training.plan import format_plans

        _quieten_transformers()
        plans = plan_recipe(path, settings, args.ranks or 1, args.tflops and args.tflops * 1e12)
        sys.stdout.write(format_plans(plans, args.format or "text"))
        return 0
    if (args.format, args.ranks, args.tflops) != (None, None, None):
        raise ValueError("--format, --ranks and --tflops are of a plan: expected --dry-run beside them.")
    facts = run_recipe(path, settings)
    if _is_main_rank():
        sys.stderr.write(f"results are in {facts['output_dir']}\n")
    return 0


def _is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """Splits words into the recipe, wherever it stands, and settings as `--name`, `value` pairs.

    A setting may be written `--name value`, `--name=value`, or `name=value` behind `--set`, several of them in a row.
    """
    recipe, settings = None, []
    rest = collections.deque(words)
    while rest:
        word = rest.popleft()
        if word == "--set" or word.startswith("--set="):
            pairs = [word.removeprefix("--set=")] if word != "--set" else []
            while rest and "=" in rest[0] and not rest[0].startswith("-") and not Path(rest[0]).is_file():
                pairs.append(rest.popleft())
            settings += _pair_words(pairs, rest)
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            settings += [name, value] if equals else [name, *([rest.popleft()] if rest else [])]
        elif recipe is None:
            recipe = word
        else:
            settings.append(word)
    return recipe, settings


def _pair_words(pairs: list[str], rest: Sequence[str]) -> list[str]:
    words = []
    for pair in pairs or [*rest][:1] or [""]:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set: expected name=value, as learning_rate=1e-4, got {pair or 'nothing'}.")
        words += [f"--{name}", value]
    return words


def evaluate(args: Namespace) -> int:
    """Scores a checkpoint on a data folder; the tables go to the screen, the rest to the output folder."""
    _quieten_transformers()
    model, device = _checked_model(args.model), str(_checked_device(args.device))
    if not Path(args.data).is_dir():
        raise ValueError(f"{args.data}: no such data folder.")
    run, takes = EVALUATIONS[args.task]
    given = {name: getattr(args, name) for name in _EVALUATION_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    unused = sorted(given.keys() - takes)
    if unused:
        raise ValueError(f"--task {args.task} takes no {', '.join('--' + name.replace('_', '-') for name in unused)}.")
    run(model, args.data, args.output, args.batch_size, device, given)
    return 0


def _evaluate_reports(
    model: Path, data: str, output: str, batch_size: int, device: str, given: dict[str, Any]
) -> None:
    from .evaluation.bertscore import BertScorer
    from .evaluation.meteor import JavaMeteor
    from .evaluation.report import ReportMetrics, evaluate_reports

    metrics = ReportMetrics(
        java_meteor=JavaMeteor() if given.pop("java_meteor", False) else None,
        bertscore=BertScorer(given.pop("bertscore_model"), device=device) if "bertscore_model" in given else None,
        num_resamples=given.pop("num_resamples", ReportMetrics.num_resamples),
    )
    evaluate_reports(
        model,
        data,
        languages=given.pop("language", None),
        output_dir=output,
        batch_size=batch_size,
        device=device,
        metrics=metrics,
        **given,
    )


def _evaluate_diagnosis(
    model: Path, data: str, output: str, batch_size: int, device: str, given: dict[str, Any]
) -> None:
    from .evaluation.diagnosis import evaluate_diagnosis

    evaluate_diagnosis(
        model,
        data,
        labels=_file_or_names(given.pop("labels", None)),
        languages=given.pop("language", None),
        output_dir=output,
        batch_size=batch_size,
        device=device,
        **given,
    )


def _evaluate_parallel(
    model: Path, data: str, output: str, batch_size: int, device: str, given: dict[str, Any]
) -> None:
    from .evaluation.parallel import evaluate_parallel

    evaluate_parallel(model, data, output_dir=output, batch_size=batch_size, device=device, **given)


def _evaluate_paper(model: Path, data: str, output: str, batch_size: int, device: str, given: dict[str, Any]) -> None:
    from .evaluation.paper import run_paper_table

    run_paper_table(model, data, output_dir=output, batch_size=batch_size, device=device, **given)


_COMMON = {"split", "seed", "num_resamples", "training_data", "language"}
_REPORT_ONLY = {"num_beams", "max_new_tokens", "java_meteor", "bertscore_model"}
_DIAGNOSIS_ONLY = {"labels", "shots"}
_EVALUATION_OPTIONS = _COMMON | _REPORT_ONLY | _DIAGNOSIS_ONLY | {"recipe"}
# Task to its function and the options that it takes.
EVALUATIONS = {
    "report": (_evaluate_reports, _COMMON | _REPORT_ONLY),
    "diagnosis": (_evaluate_diagnosis, _COMMON | _DIAGNOSIS_ONLY),
    "parallel": (_evaluate_parallel, {"split"}),
    "paper": (_evaluate_paper, {"seed", "num_resamples", "recipe"}),
}


def compare(args: Namespace) -> int:
    """Compares two evaluations of the same studies."""
    from .evaluation.compare import compare_runs

    compare_runs(args.first, args.second, args.num_resamples, args.seed, args.output)
    return 0


def export(args: Namespace) -> int:
    """Writes a checkpoint as a folder of its own."""
    from .hub import export_checkpoint, export_remote_code

    write = export_remote_code if args.remote_code else export_checkpoint
    sys.stderr.write(f"written: {write(_checked_model(args.model), args.folder, args.store_as)}\n")
    return 0


def data(args: Namespace) -> int:
    """Runs a command of `m3fm data`."""
    from .data.commands import COMMANDS as DATA_COMMANDS

    return DATA_COMMANDS[args.data_command](args)


COMMANDS = {
    "report": report,
    "diagnose": diagnose,
    "calibrate": calibrate,
    "explain": explain,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "export": export,
    "data": data,
}

# --------------------------------------------------------------------------------------------------------------------
# Options


def _checked_model(model: str | None) -> Path:
    return checkpoint_folder(DEFAULT_CHECKPOINT if model is None else model)


def _checked_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
