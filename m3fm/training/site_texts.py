# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Reports that a site has as text alone, in whatever file, and parallel text: read, checked, and split.

Messages name files, lines and numbers, never what a text says.
"""

import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data import load_studies
from ..data.report_rules import REPORT_LANGUAGES
from ..data.report_text import mentions_earlier_or_mask, split_sentences
from ..data.studies import training_part
from ..data.tables import BadRow, Reading, Row, is_unicode, open_text, read_csv, read_jsonl
from .languages import is_other_language
from .text_bank import TextGroup

__all__ = [
    "LAYOUTS",
    "MIN_TEXTS",
    "SITE",
    "SiteTexts",
    "read_parallel_groups",
    "read_site_texts",
    "site_groups",
    "split_groups",
]

logger = logging.getLogger(__name__)

LAYOUTS = ("auto", "lines", "paragraphs")
#: Of fewer distinct texts hardly any could be held out, and the decoder would learn them by heart.
MIN_TEXTS = 20
#: What the groups of a site's texts, and of its parallel text, are called.
SITE, PARALLEL = "site", "parallel"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PACKED = (".gz", ".zip")
_COLUMNS = ("report", "text", "findings")
# A paragraph of more lines is rather a file of a report a line, with a blank line somewhere.
_MOST_LINES = 60
# A text with a larger share of all than this is not held out.
_FREQUENT = 0.02
# Texts of another language are left out; if more than this share are, the language was stated wrongly.
_STRAY_SHARE = 0.1
_CHINESE = re.compile("[\u4e00-\u9fff]{2}")
# What may name a patient: full dates, long numbers, and fields of a report's head.
_IDENTIFIER = re.compile(
    r"\b\d{4}\s?[-/.年]\s?\d{1,2}\s?[-/.月]\s?\d{1,2}|\b\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})\b|\b\d{6,}\b"
    r"|\b(MRN|accession|patient (id|name)|date of birth|DOB)\b|姓名|住院号|病历号|检查号|身份证",
    re.IGNORECASE,
)


@dataclass
class SiteTexts:
    """Holds what was read.

    Attributes:
        texts: Reports, white space normalised, repeats included.
        counts: What was found: "read", "empty", "other_language", "earlier" (texts that lost sentences about earlier
            examinations or with masks), "repeated", "identifiers".
    """

    texts: list[str] = field(default_factory=list, repr=False)
    counts: Counter = field(default_factory=Counter)

    def summary(self) -> str:
        """Returns a line that says what was found."""
        names = {
            "read": "texts",
            "repeated": "of them repeats",
            "empty": "empty",
            "other_language": "left out, in another language",
            "earlier": "without their sentences about earlier examinations or with masks",
            "identifiers": "with what looks like a date or a patient's number",
        }
        return ", ".join(f"{self.counts[key]} {words}" for key, words in names.items() if self.counts[key])


# --------------------------------------------------------------------------------------------------------------------
# A site's texts


def read_site_texts(
    path: str | Path, language: str, column: str = "", layout: str = "auto", keep_earlier: bool = False
) -> SiteTexts:
    """Reads reports of one language.

    Args:
        path: A .txt with a report a line, or with blank lines between reports; a .csv, .tsv or .jsonl with a column of
            texts, these also as .gz or .zip; or a data set folder, of which the training part is read.
        language: Code of the language that they are in.
        column: Of a table; empty: the first of `report_<language>`, `report`, `text`, `findings` that is there.
        layout: Of a .txt: "lines", "paragraphs", or "auto": paragraphs where there are blank lines.
        keep_earlier: Whether sentences about earlier examinations or with de-identification masks stay, which no image
            alone can support. They are known in English and Chinese.

    Raises:
        ValueError: With file and line, if nothing can be read, the encoding is not UTF-8, or the texts are in another
            language.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {list(LAYOUTS)}.")
    if not path.exists():
        raise ValueError(f"texts: there is no {path}: expected a .txt, .csv, .tsv or .jsonl file, or a data folder.")
    found = SiteTexts()
    for raw in _raw_texts(path, language, column, layout):
        text = " ".join(raw.split())
        kept = text if keep_earlier else _without_earlier(text, language)
        found.counts["empty"] += not kept
        found.counts["earlier"] += kept != text
        if kept:
            found.counts["identifiers"] += _IDENTIFIER.search(kept) is not None
            found.texts.append(kept)
    if not found.texts:
        raise ValueError(f"{path}: expected reports, got {found.summary() or 'an empty file'}.")
    found.texts = _of_language(path, found, language)
    found.counts["read"] = len(found.texts)
    found.counts["repeated"] = len(found.texts) - len(set(found.texts))
    if found.counts["identifiers"]:
        logger.warning(
            "%s: %d texts hold what looks like a date or a patient's number. A decoder can learn such things by heart "
            "and write them of other patients: remove them, train anew, and do not share the checkpoint.",
            path,
            found.counts["identifiers"],
        )
    return found


def _raw_texts(path: Path, language: str, column: str, layout: str) -> Iterator[str]:
    if path.is_dir():
        yield from _folder_texts(path, language)
        return
    suffix = _suffix(path)
    if suffix == ".txt":
        yield from _plain_texts(path, layout)
    elif suffix == ".jsonl" or suffix in _DELIMITERS:
        rows = _table(path)
        first = next(rows, None)
        name = _column(path, first, column, language)
        for row in itertools.chain([] if first is None else [first], rows):
            yield row.get(name) or ""
    else:
        raise ValueError(
            f"{path}: expected .txt, .csv, .tsv or .jsonl, or a data folder; got {suffix or 'no ending'}."
        )


def _folder_texts(path: Path, language: str) -> Iterator[str]:
    if language not in REPORT_LANGUAGES:
        raise ValueError(
            f"{path}: data folders have reports in {', '.join(REPORT_LANGUAGES)}; give texts in {language!r} as a "
            ".jsonl or .csv file, their column named by `column`."
        )
    reports = [study.reports.get(language, "") for study in training_part(load_studies(path))]
    if not any(reports):
        raise ValueError(f"{path}: its training part has no report in {language!r}.")
    yield from filter(None, reports)


def _plain_texts(path: Path, layout: str) -> Iterator[str]:
    """Yields the reports of a text file."""
    _check_encoding(path)
    with open_text(path) as file:
        lines = file.read().splitlines()
    blocks = [list(block) for is_text, block in itertools.groupby(lines, lambda line: bool(line.strip())) if is_text]
    if layout == "auto" and len(blocks) > 1 and (longest := max(map(len, blocks))) > _MOST_LINES:
        raise ValueError(
            f"{path}: there are blank lines, and up to {longest} lines between them: say `layout: lines` if each line "
            "is a report, or `layout: paragraphs` if blank lines part reports."
        )
    if layout == "paragraphs" or (layout == "auto" and len(blocks) > 1):
        yield from ("\n".join(block) for block in blocks)
    else:
        yield from itertools.chain.from_iterable(blocks)


def _table(path: Path) -> Iterator[Row]:
    _check_encoding(path)
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return read_jsonl(path, Reading())
    return read_csv(path, (), Reading(), _DELIMITERS[suffix], has_long_text=True)


def _column(path: Path, first: Row | None, column: str, language: str) -> str:
    """Returns the column that holds the texts; without naming others, which may be cells of a table without head."""
    if first is None:
        raise ValueError(f"{path}: expected rows of reports, got none.")
    wanted = [column] if column else [f"report_{language}", *_COLUMNS]
    found = next((name for name in wanted if name in first.values), None)
    if found is None:
        hint = "" if column else ": name it by `column`"
        raise ValueError(f"{path}: expected a column {' or '.join(map(repr, wanted))}, got none of them{hint}.")
    return found


def _suffix(path: Path) -> str:
    suffixes = [each.lower() for each in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _check_encoding(path: Path) -> None:
    """Refuses a file that is not UTF-8, saying what it seems to be and how it is converted."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if is_unicode(line):
                continue
            name = _guess(line, number)
            convert = f"iconv -f {name} -t UTF-8 {path.name} > utf8-{path.name}" if name else "with a text editor"
            seems = f"it seems to be {name}" if name else "its encoding cannot be told"
            raise BadRow("bad_encoding", path, number, f"expected UTF-8, {seems}; convert it: {convert}")


def _guess(line: str, number: int) -> str | None:
    """Returns what a line seems to be encoded in, as iconv calls it; None where that cannot be told."""
    raw = line.encode("utf-8", "surrogateescape")
    if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    for name, is_likely in (("GB18030", _CHINESE.search), ("CP1252", str.isprintable)):
        try:
            if is_likely(raw.decode(name).strip()):
                return name
        except UnicodeDecodeError:
            continue
    return None


def _without_earlier(text: str, language: str) -> str:
    if language not in REPORT_LANGUAGES or not mentions_earlier_or_mask(text, language):
        return text
    sentences = split_sentences(text, language)
    return ("" if language == "zh" else " ").join(
        sentence for sentence in sentences if not mentions_earlier_or_mask(sentence, language)
    )


def _of_language(path: Path, found: SiteTexts, language: str) -> list[str]:
    kept = [text for text in found.texts if not is_other_language(text, language)]
    found.counts["other_language"] = len(found.texts) - len(kept)
    # Short texts tell together what none of them tells alone.
    together = " ".join(dict.fromkeys(found.texts))
    if found.counts["other_language"] > _STRAY_SHARE * len(found.texts) or is_other_language(together, language):
        raise ValueError(
            f"{path}: {found.counts['other_language'] or 'most'} of {len(found.texts)} texts are plainly not in "
            f"{language!r}: state their language, or another file."
        )
    return kept


# --------------------------------------------------------------------------------------------------------------------
# Parallel text


def read_parallel_groups(path: str | Path, language: str, known: Sequence[str]) -> list[TextGroup]:
    """Reads texts that are there in a language and in one that a checkpoint knows, each row once.

    Args:
        path: .jsonl, .csv or .tsv, whose columns are language codes: {"en": ..., "de": ...}.
        language: The one that is learned.
        known: Those of the checkpoint.

    Returns:
        Groups with the versions of all these languages, of which `language` is to be written.

    Raises:
        ValueError: With file and line, if a row lacks `language` or all others, or it cannot be read.
    """
    path = Path(path)
    others = [code for code in known if code != language]
    if not path.is_file() or _suffix(path) not in (".jsonl", *_DELIMITERS):
        raise ValueError(f"parallel: expected a .jsonl, .csv or .tsv file, got {path}.")
    groups: dict[tuple[str, ...], TextGroup] = {}
    for row in _table(path):
        texts = {code: " ".join((row.get(code) or "").split()) for code in (*others, language)}
        texts = {code: text for code, text in texts.items() if text}
        if language not in texts or len(texts) < 2:
            wanted = f"{language!r} and one of {others}"
            raise row.bad("bad_value", f"expected text in the columns {wanted}, got {sorted(texts) or 'none'}")
        groups.setdefault(tuple(texts.values()), TextGroup(PARALLEL, texts, (language,), study_id=f"line {row.line}"))
    for code in (*others, language):
        of_code = SiteTexts([group.versions[code] for group in groups.values() if code in group.versions])
        stray = sum(is_other_language(text, code) for text in of_code.texts)
        if stray > _STRAY_SHARE * len(of_code.texts):
            raise ValueError(
                f"{path}: {stray} of {len(of_code.texts)} texts of column {code!r} are plainly not in it."
            )
    if not groups:
        raise ValueError(f"{path}: expected rows with texts in {language!r} and one of {others}, got an empty file.")
    return list(groups.values())


# --------------------------------------------------------------------------------------------------------------------
# Parts


def split_groups(
    groups: Sequence[TextGroup], language: str, held_out: float, seed: int
) -> tuple[list[TextGroup], list[TextGroup]]:
    """Parts texts into those that are learned and those that are held out; no text is on both sides.

    Versions of one text stay together. Which texts are held out hangs on the seed and on what they say, not on the
    order of the file.

    Args:
        groups: Each with a version in `language`, those of parallel text first.
        language: The one that is learned.
        held_out: Share of the distinct texts.
        seed: Of the draw.

    Returns:
        Training groups, and held-out ones without repeats.

    Raises:
        ValueError: If there are fewer than `MIN_TEXTS` distinct texts.
    """
    # A text that comes alone belongs to the versions that parallel text has of it.
    keys: dict[str, str] = {}
    for group in groups:
        keys.setdefault(group.versions[language], next(iter(group.versions.values())))
    counts = Counter(keys[group.versions[language]] for group in groups)
    if len(counts) < MIN_TEXTS:
        raise ValueError(
            f"Expected at least {MIN_TEXTS} distinct texts, got {len(counts)}: of fewer nothing can be held out, and "
            "the decoder would learn them by heart."
        )
    # What half of all reports say is to be learned.
    rare = [text for text in counts if counts[text] <= max(2, _FREQUENT * len(groups))]
    order = sorted(rare, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    chosen = set(order[: max(1, round(held_out * len(counts)))])
    learned = [group for group in groups if keys[group.versions[language]] not in chosen]
    seen = {text for group in learned for text in group.versions.values()}
    held = {text: group for group in groups[::-1] if keys[text := group.versions[language]] in chosen}
    return learned, [group for group in held.values() if seen.isdisjoint(group.versions.values())]


def site_groups(texts: Sequence[str], language: str) -> list[TextGroup]:
    """Returns the texts of a site as groups of one version."""
    return [TextGroup(SITE, {language: text}, (language,), str(number)) for number, text in enumerate(texts, start=1)]
