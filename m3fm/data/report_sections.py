# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Reports parsed into sections and cleaned, with the text kept as it was published."""

from __future__ import annotations

from .schema import ReportText

__all__ = ["report_from_sections", "report_from_text"]


def report_from_text(raw: str, language: str, is_translated: bool = False) -> ReportText | None:
    """Parse and clean a report as its set publishes it; None where there is no text at all."""
    text = " ".join(raw.split())
    return ReportText(text, raw=raw, is_translated=is_translated) if text else None


def report_from_sections(
    findings: str | None, impression: str | None, language: str, raw: str | None = None, is_translated: bool = False
) -> ReportText | None:
    """Clean a report whose set gives its sections apart; None where both are empty."""
    parts = [" ".join(part.split()) if part else None for part in (findings, impression)]
    text = " ".join(filter(None, parts))
    return ReportText(text, *parts, raw=raw or "\n".join(filter(None, (findings, impression))), is_translated=is_translated) if text else None
