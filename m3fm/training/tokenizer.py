# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The bilingual Unigram tokenizer: sentencepiece learns its pieces, `tokenizers` runs them with the same ids.

Every string survives `decode(encode(text))`: nothing is normalized, spaces stay spaces (no U+2581 stands for them),
and a character that is no piece is spelled in bytes. No text gives a special token; prompts are built from ids.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from struct import pack
from types import ModuleType
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

__all__ = ["TokenizerRecipe", "convert_sentencepiece", "iter_corpus", "read_corpus", "run", "train_tokenizer"]

SENTENCEPIECE_FILE = "sentencepiece.model"
REPORT_FILE = "tokenizer_report.json"
MODEL_MAX_LENGTH = 512

PAD_TOKEN, UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = BASE_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
IMAGE_TOKEN = "<image>"
LANGUAGE_SLOTS = 11  # a slot that no language takes is reserved, so a language added later moves no id
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

# sentencepiece sums scores in float32, `tokenizers` in float64. On multiples of 1/64 both sums are exact, up to
# 2**24 / 64, so the same path wins in both, ties included.
SCORE_STEP = 1 / 64
# `tokenizers` looks for every entry of its vocabulary in the text, "</s>" and "<0x0A>" among them. This score, far
# below that of any spelling in learned pieces, keeps them from being chosen.
UNMATCHABLE_SCORE = -10_000.0

# sentencepiece's stand-in for a space while it trains; text that holds the character itself is spelled in bytes.
SPACE_SYMBOL = "\u2581"
# Spaces have a piece of their own; U+2585 is sentencepiece's mark of an unknown character, U+FFFD that of a bad byte.
NO_PIECE = frozenset(f" {SPACE_SYMBOL}\u2585\ufffd")
# Every token above can be spelled in these, as UNMATCHABLE_SCORE needs.
ASCII_CHARACTERS = frozenset(map(chr, range(0x21, 0x7F)))

# Numbers of sentencepiece_model.proto: the piece types, and the fields that are rewritten.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
TRAINER_VOCAB_SIZE, ESCAPE_WHITESPACES = 4, 5
VARINT, LENGTH_DELIMITED, FIXED32 = 0, 2, 5


@dataclass
class TokenizerRecipe:
    """Holds the settings of one tokenizer training.

    Each language learns its pieces alone, with its own share of the vocabulary and its own piece length. Learned
    together, the templates of Chinese reports, which no space divides, become pieces of a whole clause each.

    Attributes:
        data_root: Folder of the data sets, see `iter_corpus`.
        output_dir: Folder that gets the tokenizer, the sentencepiece model and the report of measured facts.
        vocab_size: Number of ids: special tokens, 256 bytes and learned pieces.
        languages: Language codes, in id order.
        language_shares: Part of the pieces longer than a character that a language gets. The first language of
            `languages` needs none: it gets what the others leave.
        max_piece_lengths: Longest piece of each language, in characters.
        source_weights: How often the texts of a source folder count; those of a folder not named count once.
        text_sets: Sets of `m3fm.data` whose training reports are read, and how often they count; empty: the corpus of
            `iter_corpus`.
        parallel_sets: Sets of `text_sets` that bring parallel text.
        min_character_count: A character seen at least this often is a piece; a rarer one is spelled in bytes.
        seed: Seed of sentencepiece's random generator.
    """

    data_root: str = "../shared/data"
    output_dir: str = "tokenizer"
    vocab_size: int = 8000
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])
    language_shares: dict[str, float] = field(default_factory=lambda: {"zh": 0.3})
    max_piece_lengths: dict[str, int] = field(default_factory=lambda: {"en": 16, "zh": 4})
    source_weights: dict[str, int] = field(default_factory=lambda: {"cov_ctr": 3})
    text_sets: dict[str, int] = field(default_factory=dict)
    parallel_sets: list[str] = field(default_factory=list)
    min_character_count: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        languages = list(self.languages)
        if not 1 <= len(languages) <= LANGUAGE_SLOTS or len(set(languages)) != len(languages):
            raise ValueError(f"`languages` is {languages}; expected 1 to {LANGUAGE_SLOTS} distinct codes")
        for name, needed in (("max_piece_lengths", languages), ("language_shares", languages[1:])):
            missing = sorted(set(needed) - set(getattr(self, name)))
            if missing:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a value for {missing} too")
        shares = [self.language_shares[language] for language in languages[1:]]
        if min(shares, default=0.5) <= 0 or sum(shares) >= 1:
            raise ValueError(f"`language_shares` is {self.language_shares}; expected fractions with a sum below 1")

    @property
    def special_tokens(self) -> list[str]:
        """Return the special tokens in id order, from id 0 on."""
        reserved = [f"<|reserved_{slot}|>" for slot in range(LANGUAGE_SLOTS - len(self.languages))]
        return [*BASE_TOKENS, IMAGE_TOKEN, *(f"<|{language}|>" for language in self.languages), *reserved]


# --- corpus ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """One text column of a JSON-lines file, and the values that its rows must have elsewhere."""

    file: str
    name: str
    language: str
    where: dict[str, tuple[str, ...]] = field(default_factory=dict)


_TRAIN = {"split": ("train",)}
# Of whatever set: nothing of its parts "validation", "test" or any other is read.
_TRAINING_PARTS = ("train", None)
_COV_CTR, _CT_RATE = "cov_ctr/metadata.jsonl", "ctrate_reports_text/data.jsonl"
_IU, _IU_PARALLEL = "openi_iu_reports/data.jsonl", "openi_iu_reports/parallel_en_zh.jsonl"
_TB, _COVID_CXR = "tb_shenzhen_montgomery_128/metadata.jsonl", "covid_chestxray/metadata.jsonl"
_SLAKE = "slake_chest_qa_text/data.jsonl"
_COLUMNS = (
    _Column(_COV_CTR, "report_en", "en", _TRAIN),
    _Column(_COV_CTR, "report_zh", "zh", _TRAIN),
    _Column(_IU, "findings_en", "en"),
    _Column(_IU, "impression_en", "en"),
    _Column(_IU_PARALLEL, "en", "en"),
    _Column(_IU_PARALLEL, "zh", "zh"),
    _Column(_CT_RATE, "report_en", "en", _TRAIN),
    _Column(_TB, "reading_en", "en"),
    _Column(_COVID_CXR, "clinical_notes_en", "en"),
    *(
        _Column(_SLAKE, name, language, {**_TRAIN, "lang": (language,), "modality": ("cxr", "ct")})
        for name in ("question", "answer")
        for language in ("en", "zh")
    ),
)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"no file {file}; expected the chest data folder as `data_root`")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _iter_sources(data_root: str | Path) -> Iterator[tuple[str, str, str]]:
    root = Path(data_root)
    rows = {file: _read_rows(root / file) for file in dict.fromkeys(column.file for column in _COLUMNS)}
    # The translated pairs have no split of their own: they follow the study they were made from.
    held_out = {row["study_id"] for row in rows[_IU] if row.get("split") not in _TRAINING_PARTS}
    rows[_IU_PARALLEL] = [row for row in rows[_IU_PARALLEL] if row["study_id"] not in held_out]
    seen = set()
    for column in _COLUMNS:
        for row in rows[column.file]:
            text = row.get(column.name)
            wanted = row.get("split") in _TRAINING_PARTS
            wanted = wanted and all(row.get(key) in values for key, values in column.where.items())
            if not text or not wanted or (column.language, text) in seen:
                continue
            seen.add((column.language, text))
            yield column.file.split("/")[0], column.language, text


def iter_corpus(data_root: str | Path) -> Iterator[tuple[str, str]]:
    """Yield every distinct training text of the data folder as (language, text), in a fixed order.

    Rows that state a part other than "train" are left out, and with the Open-i ones their translations: no validation
    text of COV-CTR, Open-i, CT-RATE or SLAKE is read. The validation parts that `m3fm.data.splits` carves are not
    stated in the rows, so those of the TB readings (59 texts) and of the COVID notes (74) are read too.

    Args:
        data_root: Folder that holds `cov_ctr`, `openi_iu_reports`, `ctrate_reports_text`,
            `tb_shenzhen_montgomery_128`, `covid_chestxray` and `slake_chest_qa_text`.

    Raises:
        ValueError: If a file is missing.
    """
    for _, language, text in _iter_sources(data_root):
        yield language, text


def read_corpus(recipe: TokenizerRecipe) -> Iterator[tuple[str, str, str]]:
    """Yield every distinct training text of a recipe as (set, language, text).

    Raises:
        ValueError: If a set or a file is missing.
    """
    if not recipe.text_sets:
        yield from _iter_sources(recipe.data_root)
        return
    from .text_bank import TextSets, load_texts

    sets = TextSets(recipe.data_root, dict.fromkeys(recipe.text_sets, 1), recipe.parallel_sets)
    seen = set()
    for group in load_texts(sets):
        for language, text in group.versions.items():
            if (language, text) not in seen:
                seen.add((language, text))
                yield group.source, language, text


# --- learning --------------------------------------------------------------------------------------------------------


def _import_sentencepiece() -> ModuleType:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("sentencepiece is missing: pip install m3fm[train]") from error
    return sentencepiece


def _alphabet(texts: Iterable[str], min_count: int) -> frozenset[str]:
    counts = Counter(chain.from_iterable(texts))
    seen = {character for character, count in counts.items() if count >= min_count and character.isprintable()}
    return (ASCII_CHARACTERS | seen) - NO_PIECE


def _learn(recipe: TokenizerRecipe, language: str, texts: list[str], alphabet: frozenset[str], size: int) -> bytes:
    """Return a sentencepiece model of one language: `size` pieces, and the alphabet of all languages."""
    sentencepiece = _import_sentencepiece()
    sentencepiece.set_random_generator_seed(recipe.seed)
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=len(recipe.special_tokens) + len(BYTE_TOKENS) + len(alphabet) + 1 + size,  # 1: the space
            byte_fallback=True,
            # The alphabet is `required_chars`: a coverage this low adds no character that is not frequent.
            character_coverage=0.98,
            required_chars="".join(sorted(alphabet)),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_by_unicode_script=True,
            split_digits=True,
            max_sentencepiece_length=recipe.max_piece_lengths[language],
            max_sentence_length=1 << 20,  # bytes; longer texts would be dropped
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD_TOKEN,
            control_symbols=recipe.special_tokens[len(BASE_TOKENS) :],
            num_threads=1,  # more threads add up the counts in no fixed order
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"{len(texts)} texts in {language!r} do not give {size} pieces; give more or ask less"
        ) from error
    return model.getvalue()


def _learned_pieces(model: bytes) -> dict[str, float]:
    """Return the score of every learned piece, best first, with spaces as spaces."""
    processor = _import_sentencepiece().SentencePieceProcessor(model_proto=model)
    ids = [i for i in range(len(processor)) if not (processor.is_control(i) or processor.is_unknown(i))]
    return {
        processor.id_to_piece(i).replace(SPACE_SYMBOL, " "): processor.get_score(i)
        for i in ids
        if not processor.is_byte(i)
    }


def _learn_all(recipe: TokenizerRecipe) -> bytes:
    """Return one sentencepiece model with the pieces of all languages."""
    texts: dict[str, list[str]] = {language: [] for language in recipe.languages}
    weights = recipe.text_sets or recipe.source_weights
    for source, language, text in read_corpus(recipe):
        if language in texts:
            texts[language] += [text] * weights.get(source, 1)
    alphabet = _alphabet(chain.from_iterable(texts.values()), recipe.min_character_count)
    room = recipe.vocab_size - len(recipe.special_tokens) - len(BYTE_TOKENS) - len(alphabet) - 1
    if room <= 0:
        raise ValueError(f"`vocab_size` is {recipe.vocab_size}; expected more than {recipe.vocab_size - room}")
    first, *others = recipe.languages
    pieces: dict[str, float] = {}
    for language in others:
        model = _learn(recipe, language, texts[language], alphabet, int(room * recipe.language_shares[language]))
        for piece, score in _learned_pieces(model).items():
            pieces[piece] = max(score, pieces.get(piece, score))
    # The first language may find pieces that are there already: it learns so many more, and its worst are dropped.
    characters = set(chain.from_iterable(texts[first]))
    known = sum(len(piece) > 1 and characters.issuperset(piece) for piece in pieces)
    rest = room - sum(len(piece) > 1 for piece in pieces)
    model = _learn(recipe, first, texts[first], alphabet, rest + known)
    for piece, score in sorted(_learned_pieces(model).items(), key=lambda item: len(item[0]) > 1):
        if piece in pieces or len(pieces) < room + len(alphabet) + 1:
            pieces[piece] = max(score, pieces.get(piece, score))
    return _rewrite(model, recipe.special_tokens, pieces)


# --- the sentencepiece file ------------------------------------------------------------------------------------------


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _number(field_number: int, value: int) -> bytes:
    return _varint(field_number << 3 | VARINT) + _varint(value)


def _message(field_number: int, content: bytes) -> bytes:
    return _varint(field_number << 3 | LENGTH_DELIMITED) + _varint(len(content)) + content


def _piece(piece: str, score: float, kind: int) -> bytes:
    content = _message(1, piece.encode()) + _varint(2 << 3 | FIXED32) + pack("<f", score) + _number(3, kind)
    return _message(PIECES, content)


def _rewrite(model: bytes, special_tokens: list[str], pieces: dict[str, float]) -> bytes:
    """Return `model` with these pieces in place of its own, scores on SCORE_STEP, and spaces left as they are.

    The file is a protobuf message; it is edited here so that no protobuf package is needed.
    """
    kinds = dict.fromkeys(special_tokens, CONTROL) | {UNK_TOKEN: UNKNOWN} | dict.fromkeys(BYTE_TOKENS, BYTE)
    scores = {piece: round(score / SCORE_STEP) * SCORE_STEP for piece, score in pieces.items()}
    parts = [_piece(token, 0.0, kind) for token, kind in kinds.items()]
    parts += [_piece(piece, scores[piece], NORMAL) for piece in sorted(scores, key=lambda p: (-scores[p], p))]
    at = 0
    while at < len(model):
        key, start = _read_varint(model, at)
        size, start = _read_varint(model, start)
        if key >> 3 != PIECES:
            parts.append(model[at : start + size])
        at = start + size
    # Protobuf merges a message that comes twice, and the last value of a field holds.
    parts.append(_message(TRAINER_SPEC, _number(TRAINER_VOCAB_SIZE, len(kinds) + len(pieces))))
    parts.append(_message(NORMALIZER_SPEC, _number(ESCAPE_WHITESPACES, 0)))
    return b"".join(parts)


# --- conversion ------------------------------------------------------------------------------------------------------


def _check_convertible(model_file: str | Path, processor: Any, special_tokens: list[str], learned: dict) -> None:
    """Raise ValueError unless `tokenizers` is sure to give the ids that sentencepiece gives."""
    probe = f" \uff21  e\u0301{SPACE_SYMBOL} "
    # A character that only longer pieces hold is unknown or not by the cost of the unknown piece, and that differs.
    unspelled = set().union(*learned, *special_tokens, *BYTE_TOKENS) - set(learned)
    problems = {
        f"its ids do not start with {', '.join(BASE_TOKENS)}": tuple(special_tokens[:4]) != BASE_TOKENS,
        "it lacks the 256 byte pieces": not all(processor.is_byte(processor.piece_to_id(t)) for t in BYTE_TOKENS),
        "it changes the text (normalization, a leading space, or U+2581 for spaces)": processor.normalize(probe)
        != probe,
        f"{len(unspelled)} characters of its pieces are not pieces": bool(unspelled),
        f"its scores are not multiples of {SCORE_STEP}": any(score % SCORE_STEP for score in learned.values()),
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ValueError(f"{model_file} is not a sentencepiece model of `train_tokenizer`: {'; '.join(found)}")


def convert_sentencepiece(model_file: str | Path) -> PreTrainedTokenizerFast:
    """Convert a sentencepiece model of `train_tokenizer` to a tokenizer with the same ids for every text.

    Special tokens in a text are spelled like any other characters (`split_special_tokens=True`), and none is added.

    Args:
        model_file: The `.model` file.

    Raises:
        ValueError: If the model has settings under which the ids could differ.
    """
    processor = _import_sentencepiece().SentencePieceProcessor(model_file=str(model_file))
    ids = range(len(processor))
    pieces = [processor.id_to_piece(i) for i in ids]
    special_tokens = [pieces[i] for i in ids if processor.is_control(i) or processor.is_unknown(i)]
    unmatchable = {*special_tokens, *BYTE_TOKENS}
    learned = {pieces[i]: processor.get_score(i) for i in ids if pieces[i] not in unmatchable}
    _check_convertible(model_file, processor, special_tokens, learned)

    vocabulary = [(piece, learned.get(piece, UNMATCHABLE_SCORE)) for piece in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=processor.unk_id(), byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    languages = [token[2:-2] for token in special_tokens if token.startswith("<|") and "reserved" not in token]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={
            "image_token": IMAGE_TOKEN,
            **{f"{language}_token": f"<|{language}|>" for language in languages},
        },
        padding_side="right",
        model_max_length=MODEL_MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def train_tokenizer(recipe: TokenizerRecipe) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a recipe, and save it and its sentencepiece model in `recipe.output_dir`.

    The same recipe and data give the same files.

    Raises:
        ValueError: If a corpus file is missing, or the texts are too few for the vocabulary.
        ImportError: If sentencepiece is not installed.
    """
    model = _learn_all(recipe)
    output_dir = Path(recipe.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model_file = output_dir / SENTENCEPIECE_FILE
    model_file.write_bytes(model)
    tokenizer = convert_sentencepiece(model_file)
    tokenizer.save_pretrained(output_dir)
    return tokenizer


# --- recipe ----------------------------------------------------------------------------------------------------------


def _measure(tokenizer: PreTrainedTokenizerFast, processor: Any, texts: list[str]) -> dict[str, float]:
    rows = [tokenizer(text, verbose=False).input_ids for text in texts]
    byte_ids = set(tokenizer.convert_tokens_to_ids(BYTE_TOKENS))
    characters, tokens = sum(map(len, texts)), sum(map(len, rows))
    return {
        "texts": len(texts),
        "characters": characters,
        "tokens": tokens,
        "characters_per_token": round(characters / tokens, 3),
        "byte_tokens": sum(i in byte_ids for row in rows for i in row),
        "most_tokens_in_a_text": max(map(len, rows)),
        "texts_over_model_max_length": sum(len(row) > tokenizer.model_max_length for row in rows),
        "round_trip_failures": sum(
            tokenizer.decode(row, skip_special_tokens=True) != text for row, text in zip(rows, texts, strict=True)
        ),
        "parity_failures": sum(row != processor.encode(text) for row, text in zip(rows, texts, strict=True)),
    }


def run(recipe: TokenizerRecipe) -> dict[str, Any]:
    """Train and save the tokenizer, measure it on its training texts, and write the facts beside it.

    Returns:
        `output_dir`, `vocab_size`, and under `languages` for each language its texts, characters, tokens, characters
        per token, byte tokens, text lengths, texts that do not survive encoding and decoding (`round_trip_failures`)
        and texts whose ids differ from sentencepiece's (`parity_failures`).
    """
    tokenizer = train_tokenizer(recipe)
    output_dir = Path(recipe.output_dir)
    model_file = str(output_dir / SENTENCEPIECE_FILE)
    processor = _import_sentencepiece().SentencePieceProcessor(model_file=model_file)
    texts: dict[str, list[str]] = {language: [] for language in recipe.languages}
    for _, language, text in read_corpus(recipe):
        if language in texts:
            texts[language].append(text)
    facts = {
        "output_dir": recipe.output_dir,
        "vocab_size": len(tokenizer),
        "languages": {language: _measure(tokenizer, processor, rows) for language, rows in texts.items()},
    }
    (output_dir / REPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts
