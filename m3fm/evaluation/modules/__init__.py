# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The scores of this package as modules of Hugging Face `evaluate`, which load from this folder without a network.

import evaluate
from m3fm.evaluation.modules import module_path

evaluate.load(module_path("report_text")).compute(predictions=[...], references=[...], language="zh")
"""

from pathlib import Path

MODULES = ("report_text", "report_findings")


def module_path(name: str) -> str:
    """Returns the folder that `evaluate.load` takes.

    Raises:
        ValueError: On a name that is none of `MODULES`.
    """
    if name not in MODULES:
        raise ValueError(f"Unknown module {name!r}: expected one of {list(MODULES)}.")
    return str(Path(__file__).parent / name)
