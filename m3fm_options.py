# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What the parts of the `m3fm` command share: the notice, how it ends, how options are read. Loads nothing."""

import argparse

NOTICE = "For research only. Not a medical device: reports may be wrong; base no decision about a patient on them."
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 2, 130, 141

EXIT_CODES = """\
exit codes:
  0    all went well
  2    a study could not be read or was refused (the others are still reported), or an option, a model or a recipe is
       wrong
  130  interrupted by Ctrl-C; what was finished is written
  141  the program that read the output went away
"""


class Parser(argparse.ArgumentParser):
    """Keeps the line breaks of the texts above, and takes no shortened option for another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def count(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def number(text: str) -> int:
    """Reads a whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)
