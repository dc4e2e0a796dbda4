# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Measure the checks of translations: what they reject, what they find of planted errors, how fast they are.

Rejected are pairs of COV-CTR, whose Chinese radiologists wrote, and of Open-i, whose Chinese a machine wrote; each
once, by part, as the rules were written from the training part. Errors are planted one at a time into the Chinese of
pairs that pass. Rejected pairs were judged by reading both texts, which no radiologist did, before a last round of
rules was written: of Open-i those of the validation part that something else than a wrong term rejects, of COV-CTR a
sample of both parts. Also counted: how many different sentences Open-i's reports have, which is what sentence by
sentence there is to translate. Prints Markdown tables and writes all numbers as JSON.
"""

import argparse
import hashlib
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from m3fm.data.parallel import KINDS, CheckReport, PairChecker, ParallelText, read_corpus, read_pairs
from m3fm.data.parallel.translate import split_sentences
from m3fm.data.tables import Reading
from m3fm.evaluation.finding_labeler import find_mentions
from m3fm.evaluation.tables import markdown_table

TRAINING, VALIDATION = "train", "validation"
JUDGED = Path(__file__).with_name("translation_checks_judged.json")
SUBJECT = re.compile("心[影脏]?|心胸.*|纵[隔膈]影?|肺(?:部|野)?|胸膜(?:腔|空间)?|骨.*|主动脉.*|肋[膈隔]角|心肺")
Plant = Callable[[str, str, random.Random], str | None]


def read_sets(data: Path) -> dict[str, list[ParallelText]]:
    """Reads the pairs of both sets, each once."""
    covid = read_pairs(
        data / "cov_ctr" / "metadata.jsonl",
        reading=Reading("skip"),  # 26 images have no report
        columns={"en": "report_en", "zh": "report_zh"},
        origin="radiologist",
    )
    sets = {"cov_ctr": covid, "openi_iu_reports": read_corpus(data / "openi_iu_reports")}
    return {name: list({tuple(pair.texts.values()): pair for pair in pairs}.values()) for name, pairs in sets.items()}


def replaced(text: str, pairs: Iterable[tuple[str, str]], rng: random.Random) -> str | None:
    """Replaces one place, at random; None where there is none."""
    places = [(match, new) for old, new in pairs for match in re.finditer(old, text)]
    if not places:
        return None
    match, new = rng.choice(places)
    return text[: match.start()] + match.expand(new) + text[match.end() :]


def by_words(*pairs: tuple[str, str]) -> Plant:
    """Returns a plant that replaces words."""
    return lambda english, chinese, rng: replaced(chinese, pairs, rng)


def at_mention(states: set[str], change: Callable[[str, str, random.Random], str | None]) -> Plant:
    """Returns a plant that changes the words of a finding."""

    def plant(english: str, chinese: str, rng: random.Random) -> str | None:
        # Named, and not the normal subject of a denial ("the heart is normal").
        mentions = [
            each
            for each in find_mentions(chinese, "zh")
            if each.state in states
            and each.end - each.start > 1
            and not SUBJECT.fullmatch(chinese[each.start : each.end])
        ]
        rng.shuffle(mentions)
        for mention in mentions:
            words = chinese[mention.start : mention.end]
            new = change(words, mention.finding, rng)
            if new is not None and new != words:
                return chinese[: mention.start] + new + chinese[mention.end :]
        return None

    return plant


# What a translator may take a finding for.
MISTAKEN = {
    "atelectasis": ("吸入", "误吸", "肺气肿", "呼吸暂停"),
    "pneumothorax": ("肺炎", "气管", "肺气肿"),
    "pleural_effusion": ("气胸", "胸膜炎", "腹水"),
    "pneumonia": ("肺结核", "肺癌", "支气管炎"),
    "nodule": ("囊肿", "骨折", "空洞"),
    "fracture": ("脱位", "关节炎"),
    "cardiomegaly": ("心包炎", "心律不齐"),
    "fibrosis": ("水肿", "肺气肿"),
    "consolidation": ("气胸", "钙化"),
    "emphysema": ("肺水肿", "肺炎"),
    "calcification": ("空洞", "水肿"),
    "ground_glass_opacity": ("钙化影", "空洞影"),
}


def mistake(words: str, finding: str, rng: random.Random) -> str | None:
    """Names another finding."""
    return rng.choice(MISTAKEN[finding]) if finding in MISTAKEN else None


def truncate(english: str, chinese: str, rng: random.Random) -> str | None:
    """Keeps the first half of the sentences."""
    sentences = split_sentences(chinese, "zh")
    return "".join(sentences[: len(sentences) // 2]) if len(sentences) > 1 else chinese[: len(chinese) // 2]


def drop_sentence(english: str, chinese: str, rng: random.Random) -> str | None:
    """Leaves out one sentence."""
    sentences = split_sentences(chinese, "zh")
    if len(sentences) < 2:
        return None
    sentences.pop(rng.randrange(len(sentences)))
    return "".join(sentences)


def leave_sentence(english: str, chinese: str, rng: random.Random) -> str | None:
    """Puts an English sentence in the place of a Chinese one."""
    sentences, originals = split_sentences(chinese, "zh"), split_sentences(english, "en")
    place = rng.randrange(len(sentences))
    sentences[place] = originals[min(place, len(originals) - 1)]
    return "".join(sentences)


def loop(english: str, chinese: str, rng: random.Random) -> str | None:
    """Repeats the last words eight times, as a model does that cannot stop."""
    return chinese + chinese.rstrip("。")[-rng.randint(2, 8) :] * 8


PLANTS: dict[str, tuple[str, Plant]] = {
    "side turned": ("laterality", by_words(("左(?!右)", "右"), ("(?<!左)右", "左"))),
    "both sides to one": ("laterality", by_words(("双侧|两侧", "左侧"), ("双肺|两肺", "右肺"))),
    "denial dropped": (
        "negation",
        by_words(("没有(?:发现|看到|任何)?", "有"), ("未见", "可见"), ("无(?=[一-鿿])", "有")),
    ),
    "denial added": ("negation", at_mention({"positive"}, lambda words, finding, rng: f"无{words}")),
    "degree changed": (
        "severity",
        by_words(
            ("轻度|轻微", "重度"),
            ("中度|中等", "轻度"),
            ("重度|严重", "轻度"),
            ("少量|微量", "大量"),
            ("大量", "少量"),
            ("小(?=的?[^，。]{0,3}(?:结节|影|片|积液|肉芽肿))", "大"),
        ),
    ),
    "number changed": (
        "number",
        lambda english, chinese, rng: replaced(
            chinese, [(str(digit), str((digit + rng.randint(1, 8)) % 10)) for digit in range(10)], rng
        ),
    ),
    "unit changed": ("number", by_words(("毫米|mm", "厘米"), ("厘米|cm", "毫米"))),
    "finding mistaken": ("finding", at_mention({"positive", "uncertain"}, mistake)),
    "denied finding mistaken": ("finding", at_mention({"negative"}, mistake)),
    "second half missing": ("length", truncate),
    "sentence missing": ("finding", drop_sentence),
    "sentence untranslated": ("untranslated", leave_sentence),
    "loop": ("repeated", loop),
    "copy of the source": ("untranslated", lambda english, chinese, rng: english),
    "de-identification mark": ("mask", by_words(("(?<=。)", "XXXX。"), ("(?<=，)", "XXXX"))),
}


def check_all(pairs: list[ParallelText], checker: PairChecker) -> tuple[CheckReport, list[ParallelText], Counter[str]]:
    """Checks pairs: the counts, the pairs that pass, and what the differences are about."""
    report, passing, subjects = CheckReport(), [], Counter()
    for pair in pairs:
        differences = checker.check(pair.texts)
        report.add(differences)
        subjects.update({f"{each.kind}: {each.what}" for each in differences if each.what})
        if not differences:
            passing.append(pair)
    return report, passing, subjects


def plant_errors(pairs: list[ParallelText], checker: PairChecker, seed: int) -> dict[str, dict[str, Any]]:
    """Plants one error of each sort into each pair that can take it."""
    results: dict[str, dict[str, Any]] = {}
    for name, (kind, plant) in PLANTS.items():
        rng = random.Random(f"{seed} {name}")
        found: dict[str, int] = defaultdict(int)
        for pair in pairs:
            wrong = plant(pair.texts["en"], pair.texts["zh"], rng)
            if wrong is None or wrong == pair.texts["zh"]:
                continue
            kinds = {each.kind for each in checker.check({"en": pair.texts["en"], "zh": wrong})}
            found["planted"] += 1
            found["found"] += bool(kinds)
            found["found_as_meant"] += kind in kinds
        if found["planted"]:
            results[name] = {"kind": kind, **found, "share_found": found["found"] / found["planted"]}
    return results


def judged_precision(pairs: list[ParallelText], checker: PairChecker, verdicts: dict[str, bool]) -> dict[str, int]:
    """Counts, of the pairs that were judged by reading, how many are rejected, and how many of these are wrong."""
    counts = {"judged": 0, "judged_wrong": 0, "rejected": 0, "rejected_wrong": 0}
    for pair in pairs:
        text = json.dumps([pair.texts["en"], pair.texts["zh"]]).encode()
        is_wrong = verdicts.get(hashlib.sha256(text).hexdigest()[:16])
        if is_wrong is not None:
            rejected = bool(checker.check(pair.texts))
            counts["judged"] += 1
            counts["judged_wrong"] += is_wrong
            counts["rejected"] += rejected
            counts["rejected_wrong"] += rejected and is_wrong
    return counts


def count_sentences(folder: Path) -> dict[str, Any]:
    """Counts the different sentences of a set's English reports."""
    reports = [pair.texts["en"] for pair in read_corpus(folder, ["en"])]
    sentences = [sentence for report in reports for sentence in split_sentences(report, "en")]
    distinct = set(sentences)
    return {
        "reports": len(reports),
        "distinct_reports": len(set(reports)),
        "sentences": len(sentences),
        "distinct_sentences": len(distinct),
        "characters_of_distinct_reports": sum(map(len, set(reports))),
        "characters_of_distinct_sentences": sum(map(len, distinct)),
    }


def planted_table(sets: dict[str, Any]) -> str:
    """Returns what the checks find on the validation parts: pairs rejected as they are, then errors put into them."""
    parts = {name: entry["parts"][VALIDATION] for name, entry in sets.items()}
    rejected = [f"{part['rejected'] / part['pairs']:.1%} of {part['pairs']}" for part in parts.values()]
    kinds = dict.fromkeys(what for part in parts.values() for what in part["planted"])
    found = [
        [what, *(f"{row['share_found']:.0%} of {row['planted']}" if row else "–" for row in rows)]
        for what in kinds
        for rows in [[part["planted"].get(what) for part in parts.values()]]
    ]
    return markdown_table([["found in pairs of", *parts], ["rejected as published", *rejected], *found])


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/translation_checks.json"))
    options = parser.parse_args()

    verdicts = json.loads(JUDGED.read_text(encoding="utf-8"))
    results: dict[str, Any] = {"seed": options.seed, "kinds": list(KINDS), "sets": {}}
    for name, pairs in read_sets(options.data).items():
        checker = PairChecker()
        start = time.perf_counter()
        for pair in pairs:
            checker.check(pair.texts)
        seconds = time.perf_counter() - start
        entry: dict[str, Any] = {"pairs": len(pairs), "pairs_per_second": len(pairs) / seconds, "parts": {}}
        for part in (TRAINING, VALIDATION):
            report, passing, subjects = check_all([pair for pair in pairs if pair.split == part], checker)
            no_terms = check_all(
                [pair for pair in pairs if pair.split == part], PairChecker(kind for kind in KINDS if kind != "term")
            )[0]
            planted = plant_errors(passing, checker, options.seed)
            entry["parts"][part] = {
                **report.as_dict(),
                "share_accepted_without_term": no_terms.as_dict()["share_accepted"],
                "subjects": dict(subjects.most_common(15)),
                "planted": planted,
            }
            print(f"\n{name}, {part}: {len(pairs)} pairs in all, {len(pairs) / seconds:.0f} a second\n")
            print(report.table())
            print("\n| planted | pairs | found | as meant |\n|---|---:|---:|---:|")
            for what, row in planted.items():
                meant = row["found_as_meant"] / row["planted"]
                print(f"| {what} | {row['planted']} | {row['share_found']:.1%} | {meant:.1%} |")
        # Of Open-i, pairs were judged that something else than a wrong term rejects.
        no_term = PairChecker(kind for kind in KINDS if kind != "term")
        entry["judged"] = judged_precision(pairs, no_term, verdicts[name])
        print(f"\njudged by reading: {entry['judged']}")
        results["sets"][name] = entry
    results["table"] = planted_table(results["sets"])
    results["openi_sentences"] = count_sentences(options.data / "openi_iu_reports")
    print("\n", results["openi_sentences"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
