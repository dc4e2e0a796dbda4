# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What may be typed after `m3fm data`. What it does is in `m3fm/data/commands.py`."""

import argparse

from m3fm_options import EXIT_CODES, count, number

DATA = """\
Look at, convert, split and translate data sets: those of the field as they are published, or a folder of your own.
Needs m3fm[data]. Nothing is sent anywhere; tables and pictures show counts, never ids or texts.
"""

_INSPECT = "Say what a folder holds, from its tables: the set, its parts, texts and labels, and every kind of bad row."

_INSPECT_EPILOG = f"""\
examples:
  m3fm data inspect /data/chexpert
      which set it is, what is in it, what is wrong with it
  m3fm data inspect /data/nih --tables-only
      the tables alone, where the images are not there
  m3fm data inspect my-folder --set folder
      as an own folder, whatever it looks like

{EXIT_CODES}"""

_STATS = "Write tables and a picture of a data set: what inspect says, image sizes, near-duplicate images and leaks."

_STATS_EPILOG = f"""\
examples:
  m3fm data stats /data/cov_ctr --output stats
      stats.md, stats.json and stats.png; every image is looked at for near-duplicates
  m3fm data stats /data/mimic-cxr-jpg --output stats --no-duplicates
      without that, which is what takes long

{EXIT_CODES}"""

_CONVERT = """\
Write a data set as Parquet shards, one row a study, that load_dataset and every command here read. A stopped run goes
on. DICOM is stored without its headers; image files of other kinds as they are.
"""

_CONVERT_EPILOG = f"""\
examples:
  m3fm data convert /data/chexpert --output chexpert-parquet --on-bad skip
      images inside; bad rows are counted and left out
  m3fm data convert /data/mimic-cxr --output mimic --size 512 --num-workers 8
      radiographs reduced to a shortest side of 512 pixels
  m3fm data convert my-hospital --output shards --pseudonyms key.txt --split-file split.json
      ids replaced by keyed hashes, and the parts of a split made by m3fm data split

{EXIT_CODES}"""

_SPLIT = "Split a data set so that no patient, source document or near-duplicate image is in two parts; or check one."

_SPLIT_EPILOG = f"""\
examples:
  m3fm data split my-folder --output split.json
      80, 10 and 10 % for training, validation and test
  m3fm data split my-folder --output split.json --fractions 0.7 0.3 --by patient
      two parts, by patient alone
  m3fm data split /data/cov_ctr --check
      what the parts that the set states have in common; the exit code is 2 where they share anything of --by

{EXIT_CODES}"""

_TRANSLATE = """\
Translate the reports of a data set with a translator of yours, and keep the pairs that pass the checks: negation,
sides, severity, numbers, findings. What is translated is kept, and a stopped run goes on.
"""

_TRANSLATE_EPILOG = f"""\
examples:
  m3fm data translate /data/iu_xray --to zh --translator my_package.my_module:translate --output pairs.jsonl
      a Python callable that takes and returns a list of texts
  m3fm data translate /data/iu_xray --to zh --translator models/opus-mt-en-zh --output pairs.jsonl
      a translation model of transformers in a local folder

{EXIT_CODES}"""

_CHECK_PAIRS = (
    "Check the pairs of a bilingual corpus for what translations get wrong: negation, side, severity, number."
)

_CHECK_PAIRS_EPILOG = f"""\
examples:
  m3fm data check-pairs pairs.jsonl
      how many pairs fail which check
  m3fm data check-pairs pairs.jsonl --rejected rejected.jsonl
      and which, with what differs; that file holds texts, and is as private as they are

{EXIT_CODES}"""


def add_data(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Adds the commands to the parser of `m3fm data`, and returns their parsers."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    for name, text, epilog, add in (
        ("inspect", _INSPECT, _INSPECT_EPILOG, _add_inspect),
        ("stats", _STATS, _STATS_EPILOG, _add_stats),
        ("convert", _CONVERT, _CONVERT_EPILOG, _add_convert),
        ("split", _SPLIT, _SPLIT_EPILOG, _add_split),
        ("translate", _TRANSLATE, _TRANSLATE_EPILOG, _add_translate),
        ("check-pairs", _CHECK_PAIRS, _CHECK_PAIRS_EPILOG, _add_check_pairs),
    ):
        summary = text.partition(":")[0].partition(".")[0].strip().replace("\n", " ")
        add(commands.add_parser(name, help=summary[0].lower() + summary[1:], description=text, epilog=epilog))
    return list(commands.choices.values())


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_set(parser, on_bad="skip")
    parser.add_argument("--json", action="store_true", help="as JSON, to be read by a program")


def _add_stats(parser: argparse.ArgumentParser) -> None:
    _add_set(parser, on_bad="skip")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder for tables and the picture")
    parser.add_argument(
        "--image-sample", type=number, default=2000, metavar="N", help="images whose sizes are read (default: 2000)"
    )
    parser.add_argument("--no-duplicates", action="store_true", help="do not look for near-duplicate images")
    _add_workers(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_set(parser, on_bad="raise")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or that of a stopped run")
    parser.add_argument(
        "--images", choices=("bytes", "paths"), default="bytes", help="store files, or where they are (default: bytes)"
    )
    parser.add_argument(
        "--size", type=count, metavar="PX", help="reduce pictures to this shortest side (default: as they are)"
    )
    parser.add_argument("--split-file", metavar="FILE", help="parts from a file that m3fm data split wrote")
    parser.add_argument(
        "--pseudonyms", metavar="FILE", help="replace ids by hashes with the key in this file, made where missing"
    )
    parser.add_argument("--shard-mb", type=count, default=500, metavar="MB", help="size of a shard (default: 500)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, also if the output can go on")
    _add_workers(parser)


def _add_split(parser: argparse.ArgumentParser) -> None:
    _add_set(parser, on_bad="raise")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", metavar="FILE", help="write the parts there, as JSON of study ids")
    action.add_argument("--check", action="store_true", help="only say what the set's own parts have in common")
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=[0.8, 0.1, 0.1],
        metavar="SHARE",
        help="two are training and validation, three also test (default: 0.8 0.1 0.1)",
    )
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("patient", "document", "image"),
        default=["patient", "document", "image"],
        help="what no two parts may share (default: all three)",
    )
    parser.add_argument("--seed", type=number, default=0, help="default: 0")
    parser.add_argument("--leaks", metavar="FILE", help="with --check: write the studies concerned there, with ids")
    _add_workers(parser)


def _add_translate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a data set, or a file of texts (JSON lines, CSV, TSV)")
    parser.add_argument("--to", required=True, choices=("en", "zh"), help="language that is wanted")
    parser.add_argument(
        "--translator", required=True, metavar="MODULE:NAME|DIR", help="a Python callable, or a model folder"
    )
    parser.add_argument(
        "--source-token", metavar="CODE", help="what a model folder's tokenizer calls the source language"
    )
    parser.add_argument("--target-token", metavar="CODE", help="and the target language, as zho_Hans for NLLB")
    parser.add_argument("--output", required=True, metavar="FILE", help="accepted pairs, JSON lines")
    parser.add_argument("--cache", metavar="FILE", help="translations so far (default: beside the output)")
    parser.add_argument("--rejected", metavar="FILE", help="pairs that fail a check, with what differs")
    parser.add_argument(
        "--unit", choices=("sentence", "report"), default="sentence", help="what is translated (default: sentence)"
    )
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="texts at once (default: 32)")
    _add_on_bad(parser, "raise")


def _add_check_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="JSON lines with en and zh, a CSV or TSV, or a data set")
    parser.add_argument("--accepted", metavar="FILE", help="write the pairs that pass there")
    parser.add_argument("--rejected", metavar="FILE", help="write those that do not there, with what differs")
    _add_on_bad(parser, "raise")


def _add_set(parser: argparse.ArgumentParser, on_bad: str) -> None:
    parser.add_argument("path", metavar="PATH", help="the folder of a data set")
    parser.add_argument("--set", metavar="NAME", help="which set it is (default: told by its files)")
    parser.add_argument("--part", metavar="NAME", help="only train, validation, test or what the set calls it")
    parser.add_argument("--tables-only", action="store_true", help="do not ask whether image files are there")
    _add_on_bad(parser, on_bad)


def _add_on_bad(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--on-bad",
        choices=("raise", "skip"),
        default=default,
        help=f"end with the first bad row, or count it and go on (default: {default})",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-workers", type=number, default=0, metavar="N", help="processes that read images ahead (default: 0)"
    )
