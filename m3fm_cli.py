# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The `m3fm` command: what may be typed, what its help says, and how it ends. What it does is in `m3fm/cli.py`.

This file lies beside the package because importing the package loads torch, which `--help` and a mistyped option need
not wait for.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence

from m3fm_data_cli import DATA, add_data
from m3fm_options import (
    EXIT_CODES,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PIPE_CLOSED,
    NOTICE,
    Parser,
    count,
    number,
)

_MAIN = f"""\
Chest X-ray and CT reports in English and Chinese, offline.

{NOTICE}
"""

_MAIN_EPILOG = f"""\
examples:
  m3fm report chest.png                                       an English report on the screen
  m3fm report a.png b.dcm ct.nii.gz --language both --format json
  m3fm train align-small --output_dir runs/mine               train by a recipe that ships, into a folder of your own

`m3fm COMMAND --help` explains a command.

{EXIT_CODES}"""

_REPORT = """\
Write reports for chest images: PNG, JPEG, TIFF, BMP, WebP, and with m3fm[medical] DICOM and NIfTI.

A FILE is one study. In a folder the DICOM files of one study are a study, be they views or the slices of a CT, and
every other image is one; a folder with metadata.jsonl, a CSV or a JSONL file lists its studies. Files never leave the
machine, and no name, number, date or institution of a DICOM header is printed. What is plainly not a chest gets no
report.
"""

_REPORT_EPILOG = f"""\
examples:
  m3fm report chest.png
      one report in English, to read
  m3fm report chest.dcm --language zh --output report.txt
      one in Chinese, into a file
  m3fm report scans/ --language both --format jsonl --output reports.jsonl --num-workers 2
      a line for each study of a folder as soon as its batch is written; a run that was stopped goes on
  m3fm report studies.csv --format jsonl --output reports.jsonl
      the studies of a list: a column image, file_name or path, and study_id for those of several images
  m3fm report --download https://example.org/chest.dcm
      from the web, over https, and only when asked to

output fields (json: one list; jsonl: one object a line; UTF-8):
  source       the file as given, or its path in the folder or list
  modality     "cxr", "ct", or null where it is not told and not clearly seen, or images of a study differ in it
  report_en    the English report, if asked for
  report_zh    the Chinese report, if asked for
  input_check  what was seen of the images: "verdict" is ok, suspect or refused; "findings" say why
  error        instead of modality and reports: why the study could not be read or was refused

Errors, the progress bar and the notice go to stderr.

{EXIT_CODES}
{NOTICE}
"""

_DIAGNOSE = """\
Say how probable findings are on chest images, without any training: a row for each study and finding.
"""

_DIAGNOSE_EPILOG = f"""\
examples:
  m3fm diagnose chest.png --labels tuberculosis normal
      two findings, on the screen; English and Chinese names are known
  m3fm diagnose scans/ --labels labels.yaml --output out.csv
      every image of a folder, into a table; a stopped run goes on
  m3fm diagnose scans/ --format jsonl --output out.jsonl
      the findings that the checkpoint is calibrated for

{EXIT_CODES}
{NOTICE}
"""

_CALIBRATE = """\
Fit calibration and thresholds of a checkpoint's findings on validation studies, into a copy of it; weights stay.
"""

_CALIBRATE_EPILOG = f"""\
examples:
  m3fm calibrate my-calibrated --data /data/cov_ctr
      the shipped checkpoint, on the validation part of one set
  m3fm calibrate my-calibrated --data /data/cov_ctr /data/nih
      on several sets, each with the same weight
  m3fm calibrate mine-calibrated --model runs/mine --data /data/cov_ctr
      a checkpoint of your own

{EXIT_CODES}"""

_EXPLAIN = """\
Show where an image says what: a heat map for a phrase or a finding, or for each sentence of the written report.
"""

_EXPLAIN_EPILOG = f"""\
examples:
  m3fm explain chest.png --phrase "pleural effusion" --output maps
      a map for a phrase, as PNG and as data
  m3fm explain chest.png --labels cardiomegaly 胸腔积液 --output maps
      maps for findings, by their presence against their absence
  m3fm explain ct.nii.gz --phrase 磨玻璃影 --report-language zh --output maps
      every slice of a CT and how much each counts; and what in the image each sentence of the report stands on

{EXIT_CODES}
{NOTICE}
"""

_TRAIN = """\
Train by a recipe: a YAML file whose `recipe:` names the training and whose other lines are its settings.

Every setting can be replaced on the command line. An interrupted run, started again, goes on where it stopped.
Needs m3fm[train].
"""

_TRAIN_EPILOG = f"""\
examples:
  m3fm train --list
      the recipes that ship
  m3fm train small --dry-run
      what it would take, stage by stage: parameters, memory, steps, tokens, time, disk; nothing is started
  m3fm train align-small --set data_root=/data/chest output_dir=runs/mine
      one of them, on a data folder of your own
  m3fm train small --set stages.align.learning_rate=1e-4 stages.write.num_train_epochs=3
      a recipe of several stages, with settings of two of them replaced
  m3fm train my-recipe.yaml --set model.text_encoder_config.hidden_size=128 --learning_rate 1e-4
      a recipe of your own; `--name value` is the same as `--set name=value`
  torchrun --nproc_per_node 8 -m m3fm train base
      on eight GPUs of one machine; every recipe runs so
  accelerate launch --config_file fsdp.yaml -m m3fm train large
      with what accelerate can do: several machines, FSDP

output: the checkpoint with its processor, training.json (settings, data, scores), history.json and curves.png, in the
recipe's output_dir; of several stages, a folder each in it, and stages.json.

{EXIT_CODES}"""

_EVALUATE = """\
Score a checkpoint on a data folder, beside what any score must be read against: constant, random and nearest-neighbour
reports, and the model on shuffled, blank and noise images. Needs m3fm[evaluate].
"""

_EVALUATE_EPILOG = f"""\
examples:
  m3fm evaluate --data /data/cov_ctr --output scores
      reports of the shipped checkpoint, every language, the validation part
  m3fm evaluate --model runs/mine --data /data/cov_ctr --language zh --split test --output scores-zh
      those of a checkpoint of your own, in Chinese, on the test part
  m3fm evaluate --task diagnosis --data /data/nih --labels labels.yaml --shots 0 --output scores-nih
      zero-shot diagnosis; --shots 16: from 16 training studies a class; --shots full: from all of them
  m3fm evaluate --task parallel --data /data/openi_iu_reports --split all --output scores-parallel
      how well a sentence finds its translation, in all parts of the data
  m3fm evaluate --task paper --data /data --output paper
      the nine sets of the paper, those that are found in /data

output: tables on the screen; in the output folder metrics.json with the scores, intervals and what they depend on, and
for reports and diagnosis report.html, predictions.jsonl and features/ (a stopped run goes on after them).
predictions.jsonl and report.html hold reports, and report.html images of the data: they are as private as it is.

{EXIT_CODES}"""

_COMPARE = """\
Compare two evaluated checkpoints on the same studies: differences with intervals and p-values, resampling patients.
"""

_COMPARE_EPILOG = f"""\
examples:
  m3fm compare scores/first scores/second
      what second gains or loses, score by score
  m3fm compare scores/first scores/second --output difference.json
      the same, and as JSON
  m3fm compare scores/first scores/second --num-resamples 10000 --seed 1
      with finer p-values, from other resamples

{EXIT_CODES}"""

_EXPORT = """\
Write a checkpoint as a folder of its own, without what a training run left beside it.
"""

_EXPORT_EPILOG = f"""\
examples:
  m3fm export m3fm-small
      the shipped checkpoint, for machines that have m3fm
  m3fm export m3fm-small --remote-code
      with its code: pipeline("m3fm-report", model="m3fm-small", trust_remote_code=True) needs no m3fm
  m3fm export mine --model runs/mine --remote-code
      a checkpoint of your own

{EXIT_CODES}"""

_ERROR_PATIENCE = 20.0  # seconds
_TRACEBACK = "show where an error was raised, for a bug report"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Words after `m3fm`; None takes those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: After `--help`, and with code 2 on a wrong option.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "train":
        args.words = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe may have an encoding that has no Chinese
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # A recipe may name a model of the hub; every other command takes a folder, and a plan needs no weights.
    if args.command != "train" or args.dry_run:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    try:
        from m3fm import cli

        code = cli.COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if args.traceback:
            raise
        _tell_error(error)
        return EXIT_ERROR
    except RuntimeError:
        _await_launcher()
        raise


def _tell_error(error: Exception) -> None:
    """Writes an error to stderr, once: what all processes of a training run into, the first of them tells."""
    _await_launcher()
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"error: {error}\n" if rank == "0" else f"error on rank {rank}: {error}\n")


def _await_launcher() -> None:
    """Lets the launcher end this process, as it does where the first one of the run has failed, and with it this."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_ERROR_PATIENCE)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = Parser(prog="m3fm", description=_MAIN, epilog=_MAIN_EPILOG)
    parser.add_argument("--traceback", action="store_true", help=_TRACEBACK)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_report(commands.add_parser("report", help="write reports", description=_REPORT, epilog=_REPORT_EPILOG))
    for name, summary, description, epilog, add in (
        ("diagnose", "say how probable findings are", _DIAGNOSE, _DIAGNOSE_EPILOG, _add_diagnose),
        ("calibrate", "fit probabilities and thresholds", _CALIBRATE, _CALIBRATE_EPILOG, _add_calibrate),
        ("explain", "show where the image says it", _EXPLAIN, _EXPLAIN_EPILOG, _add_explain),
    ):
        add(commands.add_parser(name, help=summary, description=description, epilog=epilog))
    _add_train(commands.add_parser("train", help="train by a recipe", description=_TRAIN, epilog=_TRAIN_EPILOG))
    _add_evaluate(
        commands.add_parser(
            "evaluate", help="score a checkpoint on data", description=_EVALUATE, epilog=_EVALUATE_EPILOG
        )
    )
    _add_compare(
        commands.add_parser("compare", help="compare two evaluations", description=_COMPARE, epilog=_COMPARE_EPILOG)
    )
    _add_export(
        commands.add_parser(
            "export", help="write a checkpoint as a folder", description=_EXPORT, epilog=_EXPORT_EPILOG
        )
    )
    data = commands.add_parser("data", help="look at, convert, split and translate data sets", description=DATA)
    data_commands = add_data(data)
    # Suppressed, so that it does not undo what stood before the command.
    for command in (*commands.choices.values(), *data_commands):
        command.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=_TRACEBACK)
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE|FOLDER", help="X-rays, CT slices or volumes, folders or lists of them"
    )
    parser.add_argument("--language", default="en", metavar="en|zh|both", help="of the reports (default: en)")
    parser.add_argument("--format", choices=("text", "json", "jsonl"), default="text", help="default: text")
    parser.add_argument(
        "--output", metavar="FILE", help="write there and not to the screen; jsonl goes on if stopped, others replace"
    )
    parser.add_argument("--download", action="store_true", help="the files are https addresses: fetch them first")
    _add_reading(parser)
    _add_model(parser)
    _add_decoding(parser, batch_size=8)


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE|FOLDER", help="X-rays, CT slices or volumes, folders or lists of them"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE|NAME",
        help="a label file, or names of findings (default: those that the checkpoint is calibrated for)",
    )
    parser.add_argument("--exclusive", action="store_true", default=None, help="each study has exactly one of them")
    parser.add_argument("--report-language", metavar="CODE", help="read the report that the model writes too")
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default: csv")
    parser.add_argument("--output", metavar="FILE", help="write there and not to the screen; goes on if stopped")
    _add_reading(parser)
    _add_model(parser)
    _add_running(parser, batch_size=8)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a new or an empty folder for the calibrated checkpoint")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FOLDER", help="data folders with validation parts"
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds and resamples (default: 0)")
    _add_model(parser)
    _add_running(parser, batch_size=8)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="chest images")
    parser.add_argument("--phrase", nargs="+", default=(), metavar="TEXT", help="phrases in English or Chinese")
    parser.add_argument("--labels", nargs="+", default=(), metavar="NAME", help="names of findings")
    parser.add_argument("--language", metavar="CODE", help="of the phrases (default: seen from the text)")
    parser.add_argument("--report-language", metavar="CODE", help="write a report too, and weigh its sentences")
    parser.add_argument(
        "--method", choices=("similarity", "gradient"), default="similarity", help="default: similarity"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="for pictures and data")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps ... (default: cpu)")
    _add_model(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="list the recipes that ship")
    parser.add_argument("--dry-run", action="store_true", help="say what the recipe would take, and start nothing")
    parser.add_argument("--format", choices=("text", "json"), help="of what --dry-run says (default: text)")
    parser.add_argument("--ranks", type=count, metavar="N", help="processes that --dry-run plans for (default: 1)")
    parser.add_argument(
        "--tflops",
        type=count,
        metavar="N",
        help="of a matrix multiplication on the device that --dry-run plans for (default: measured on this one)",
    )
    # Shown in the help only: what the parser does not know are the recipe and its settings, in whatever order.
    parser.usage = (
        "m3fm train [-h] [--list] [--dry-run [--ranks N] [--tflops N] [--format {text,json}]]\n"
        "                  [--traceback] RECIPE [--set name=value ...] [--name value ...]"
    )
    parser.add_argument_group(
        "RECIPE",
        "A YAML file, or the name of a recipe that ships. Each setting replaces one of its lines; a dot leads into\n"
        "a block. Values are read as YAML.",
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a data folder (docs/data.md)")
    parser.add_argument(
        "--task",
        choices=("report", "diagnosis", "parallel", "paper"),
        default="report",
        help="reports (default), findings, sentence retrieval between languages, or the paper's table",
    )
    parser.add_argument("--language", nargs="+", metavar="CODE", help="default: all that the checkpoint writes")
    parser.add_argument(
        "--split", help="default: validation if there is one, else test; all: of parallel texts or a set without parts"
    )
    parser.add_argument("--output", default="evaluation", metavar="DIR", help="default: evaluation")
    parser.add_argument("--training-data", metavar="FOLDER", help="for floors and probes (default: --data)")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE|NAME",
        help="diagnosis: a label file, or names of findings (default: all that are annotated)",
    )
    parser.add_argument(
        "--shots", type=_shots, metavar="0|N|full", help="diagnosis: training studies a class (default: 0)"
    )
    parser.add_argument("--recipe", metavar="FILE", help="paper: which sets and how (default: the one that ships)")
    parser.add_argument("--java-meteor", action="store_true", help="reports: METEOR with synonyms too; needs Java")
    parser.add_argument("--bertscore-model", metavar="DIR", help="reports: BERTScore with this text encoder")
    parser.add_argument("--num-resamples", type=count, metavar="N", help="for intervals (default: 1000)")
    parser.add_argument("--seed", type=int, help="of random reports, shuffles and resamples (default: 0)")
    _add_decoding(parser, batch_size=8)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="FIRST", help="the output folder of an evaluation")
    parser.add_argument("second", metavar="SECOND", help="another one, of the same studies")
    parser.add_argument("--output", metavar="FILE", help="write the comparison there as JSON too")
    parser.add_argument("--num-resamples", type=count, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a new or an empty folder")
    _add_model(parser)
    parser.add_argument("--remote-code", action="store_true", help="add the code that runs it where m3fm is missing")
    parser.add_argument(
        "--store-as", choices=("float16", "bfloat16"), help="halve float32 weights (default: as they are)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder (default: the one inside the package)")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-suspect",
        choices=("refuse", "warn"),
        default="refuse",
        help="what to do with images that are plainly not a chest (default: refuse)",
    )
    parser.add_argument(
        "--num-workers", type=number, default=0, metavar="N", help="processes that read ahead (default: 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin the output anew, also if it can go on")


def _add_running(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument(
        "--batch-size", type=count, default=batch_size, metavar="N", help=f"studies at once (default: {batch_size})"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps ... (default: cpu)")


def _add_decoding(parser: argparse.ArgumentParser, batch_size: int) -> None:
    _add_running(parser, batch_size)
    parser.add_argument("--num-beams", type=count, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=count, metavar="N", help="longest report")


def _shots(text: str) -> int | str:
    if text != "full" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0, a whole number or full, got {text!r}")
    return text if text == "full" else int(text)
