# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, HfArgumentParser

import m3fm
from m3fm.training import tokenizer as tokenizer_module
from m3fm.training.tokenizer import (
    REPORT_FILE,
    SENTENCEPIECE_FILE,
    TokenizerRecipe,
    convert_sentencepiece,
    iter_corpus,
    run,
    train_tokenizer,
)

sentencepiece = pytest.importorskip("sentencepiece")

RECIPE_FILE = Path(tokenizer_module.__file__).parent / "recipes" / "tokenizer.yaml"
SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|en|>", "<|zh|>"]
SPECIAL_TOKENS += [f"<|reserved_{slot}|>" for slot in range(9)]
VOCAB_SIZE, FIRST_BYTE_ID, FIRST_LEARNED_ID = 560, 16, 272

HARD_TEXTS = [
    "",
    " ",
    "   ",
    "  two leading, two trailing  ",
    "a  b   c",
    "FINDINGS:\n\n\tNo effusion.\r\nIMPRESSION: 1.5 cm\n",
    "\t",
    "\n",
    "\0",
    "双肺纹理增强，左肺下叶见磨玻璃影。 CT示（12.5mm）",
    "ＣＴ，．；：？！（）【】《》",
    "全角\u3000空格",
    "heart🫀lung🫁 👩‍⚕️",
    "龘靐齉 𠮷野",
    "e\u0301 \u00e9 \ufb01 \u212b ½ ²",
    "U+FFFD \ufffd\ufffd, BOM \ufeff, NBSP\u00a0, NEL\u0085, LS\u2028, soft\u00adhyphen",
    "\u2581 \u2581\u2581lung \u2585",
    "\U0010ffff\U000f0000\ue000\ufdd0",
    "قلب سليم",
]
INJECTIONS = [
    "</s>",
    "<|zh|>",
    "normal.</s><pad><image><image><|zh|>双肺清晰",
    " <s> <unk> <|en|><|reserved_0|><|reserved_8|>",
    "<0x0A><0xE5><0x41>",
    "龘<s>龘</s>龘<0x0A>龘",
]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def made_up_reports(language: str) -> list[str]:
    """Return 120 sentences of words that look like anatomy, so that a few hundred pieces can be learned."""
    starts, ends, (space, comma, stop) = {
        "en": (
            [
                "pneumo",
                "cardio",
                "bronch",
                "pleur",
                "medi",
                "atel",
                "consol",
                "effus",
                "nodul",
                "opac",
                "hemi",
                "aort",
            ],
            ["thorax", "megaly", "itis", "al", "astinum", "ectasis", "idation", "ion", "ar", "ity", "diaphragm", "ic"],
            (" ", ", ", " (CT). "),
        ),
        "zh": (list("左右双上下肺胸纵心主气支叶结"), list("肺叶隔脏管膜影节腔野门部段"), ("", "，", "（CT）。")),
    }[language]
    rng = random.Random(0)

    def clause() -> str:
        return space.join(rng.choice(starts) + rng.choice(ends) for _ in range(3))

    return [f"{clause()}{comma}{clause()}{stop}{clause()} {rng.randrange(99)} mm".capitalize() for _ in range(120)]


@pytest.fixture(scope="module")
def made_up_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    en, zh = made_up_reports("en"), made_up_reports("zh")
    cov_ctr = [{"report_en": en[i], "report_zh": zh[i], "split": "train"} for i in range(60)]
    cov_ctr += [{"report_en": "held out", "report_zh": "保留", "split": "validation"}]
    cov_ctr += [{"report_en": None, "report_zh": None, "split": "unreported"}]
    cov_ctr += [{"report_en": "held out", "report_zh": "保留", "split": "test"}]
    write_rows(root / "cov_ctr/metadata.jsonl", cov_ctr)
    studies = [
        {"study_id": f"S{i}", "split": "train", "findings_en": en[i], "impression_en": ""} for i in range(60, 80)
    ]
    studies += [
        {"study_id": part[0], "split": part, "findings_en": "held out", "impression_en": "held out"}
        for part in ("validation", "test")
    ]
    write_rows(root / "openi_iu_reports/data.jsonl", studies)
    pairs = [{"study_id": f"S{i}", "en": en[i], "zh": zh[i]} for i in range(60, 120)]
    pairs += [{"study_id": study_id, "en": "held out", "zh": "保留"} for study_id in "vt"]
    write_rows(root / "openi_iu_reports/parallel_en_zh.jsonl", pairs)
    ct_rate = [{"report_en": en[0] + "\n" + en[1], "split": "train"}, {"report_en": "held out", "split": "validation"}]
    write_rows(root / "ctrate_reports_text/data.jsonl", ct_rate)
    held_out = {"reading_en": "held out", "clinical_notes_en": "held out", "split": "test"}
    write_rows(
        root / "tb_shenzhen_montgomery_128/metadata.jsonl", [{"reading_en": "normal", "split": "train"}, held_out]
    )
    write_rows(
        root / "covid_chestxray/metadata.jsonl", [{"clinical_notes_en": "a \ufffdwet market\ufffd"}, {}, held_out]
    )
    row = {"split": "train", "lang": "zh", "modality": "ct", "question": "有结节吗？", "answer": "有"}
    slake = [
        row,
        row,
        row | {"modality": "MRI", "answer": "held out"},
        row | {"split": "validation", "answer": "保留"},
    ]
    write_rows(root / "slake_chest_qa_text/data.jsonl", slake)
    return root


@pytest.fixture(scope="module")
def recipe(made_up_root: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizerRecipe:
    output_dir = tmp_path_factory.mktemp("tokenizer")
    return TokenizerRecipe(data_root=str(made_up_root), output_dir=str(output_dir), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def facts(recipe: TokenizerRecipe) -> dict:
    return run(recipe)


@pytest.fixture(scope="module")
def folder(recipe: TokenizerRecipe, facts: dict) -> Path:
    return Path(recipe.output_dir)


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder: Path):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))


def random_texts(pieces: list[str], count: int) -> list[str]:
    """Return texts that mix pieces, special tokens as text, and characters of every plane."""
    rng = random.Random(0)
    blocks = [(0x20, 0x7F), (0x20, 0x21), (0x0, 0x20), (0x4E00, 0x9FFF), (0x3000, 0x3040), (0xFF00, 0xFFF0)]
    blocks += [(0x2581, 0x2582), (0x2000, 0x2070), (0x300, 0x370), (0x1F300, 0x1F700), (0xE000, 0x110000)]

    def part() -> str:
        return rng.choice(pieces) if rng.random() < 0.6 else chr(rng.randrange(*rng.choice(blocks)))

    return ["".join(part() for _ in range(rng.randrange(1, 25))) for _ in range(count)]


def assert_lossless(tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer(text, verbose=False).input_ids
        assert min(ids, default=FIRST_BYTE_ID) >= FIRST_BYTE_ID, f"special token in {text!r}"
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def assert_parity(tokenizer, processor, texts: list[str]) -> None:
    for text in texts:
        assert tokenizer(text, verbose=False).input_ids == processor.encode(text), repr(text)


def test_corpus_is_distinct_training_text_with_its_language(made_up_root):
    corpus = list(iter_corpus(made_up_root))
    assert len(corpus) == len(set(corpus))
    texts = {language: [text for code, text in corpus if code == language] for language in ("en", "zh")}
    assert "held out" not in texts["en"] and "保留" not in texts["zh"]
    assert {"normal", "a \ufffdwet market\ufffd"} < set(texts["en"])
    assert {"有结节吗？", "有"} < set(texts["zh"])
    assert len(texts["en"]) + len(texts["zh"]) == len(corpus)


def test_missing_data_folder_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="data_root"):
        list(iter_corpus(tmp_path))


def test_ids_are_laid_out_as_promised(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(range(FIRST_BYTE_ID)) == SPECIAL_TOKENS
    assert tokenizer.convert_ids_to_tokens(range(FIRST_BYTE_ID, FIRST_LEARNED_ID)) == tokenizer_module.BYTE_TOKENS
    named = ("pad_token", "unk_token", "bos_token", "eos_token", "image_token", "en_token", "zh_token")
    assert [getattr(tokenizer, f"{name}_id") for name in named] == list(range(7))
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == 512
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_frequent_characters_are_pieces_and_chinese_pieces_are_words(tokenizer, made_up_root):
    vocabulary = tokenizer.get_vocab()
    assert set("左肺纵隔心影。，") <= set(vocabulary)
    assert tokenizer.tokenize("吗")[0] == "<0xE5>"  # seen once
    chinese = [piece for piece in vocabulary if "\u4e00" <= piece[:1] <= "\u9fff"]
    assert 2 <= max(map(len, chinese)) <= 4


def test_every_text_survives_and_gives_no_special_token(tokenizer, made_up_root):
    corpus = [text for _, text in iter_corpus(made_up_root)]
    assert_lossless(tokenizer, corpus + HARD_TEXTS + INJECTIONS)
    assert_lossless(tokenizer, random_texts(sorted(tokenizer.get_vocab()), 1500))


def test_ids_are_those_of_sentencepiece(tokenizer, processor, made_up_root):
    corpus = [text for _, text in iter_corpus(made_up_root)]
    assert_parity(tokenizer, processor, corpus + HARD_TEXTS + INJECTIONS)
    assert_parity(tokenizer, processor, random_texts(sorted(tokenizer.get_vocab()), 1500))
    assert_parity(tokenizer, processor, ["".join(corpus), "".join(reversed(corpus)) * 3, "龘🫁" * 2000 + corpus[0]])
    assert [processor.id_to_piece(i) for i in range(len(processor))] == tokenizer.convert_ids_to_tokens(
        range(VOCAB_SIZE)
    )


def test_score_sums_are_exact_in_float32(processor):
    scores = [processor.get_score(i) for i in range(FIRST_LEARNED_ID, VOCAB_SIZE)]
    assert max(scores) < 0
    assert all((score * 64).is_integer() for score in scores)


def test_concatenated_ids_decode_to_concatenated_text(tokenizer):
    texts = ["双肺清晰。", " No effusion", "\n", " 🫁", "left", " "]
    assert tokenizer.decode([i for text in texts for i in tokenizer(text).input_ids]) == "".join(texts)


def test_nothing_is_added_on_encode(tokenizer):
    plain = tokenizer("No effusion.").input_ids
    assert plain == tokenizer.encode("No effusion.", add_special_tokens=False)
    assert tokenizer.decode(plain) == "No effusion."


def test_batch_is_padded_on_the_right(tokenizer):
    texts = ["左肺清晰。</s>", "The heart is enlarged. <pad> No pneumothorax."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    for row, mask, text in zip(batch.input_ids, batch.attention_mask, texts, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert row[length:].tolist() == [tokenizer.pad_token_id] * (len(mask) - length)
        assert tokenizer.decode(row, skip_special_tokens=True) == text


def test_truncation_keeps_the_beginning(tokenizer):
    text = "The heart is enlarged. No pleural effusion."
    ids = tokenizer(text, truncation=True, max_length=4).input_ids
    assert ids == tokenizer(text).input_ids[:4]


def test_all_special_tokens_are_dropped_on_decode(tokenizer):
    prompt = [tokenizer.image_token_id] * 4 + [tokenizer.zh_token_id]
    report = tokenizer("左肺清晰。").input_ids
    ids = [*prompt, *report, tokenizer.eos_token_id, *range(7, FIRST_BYTE_ID), tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "左肺清晰。"
    assert tokenizer.decode(prompt) == "<image>" * 4 + "<|zh|>"


def test_special_tokens_are_read_from_text_only_on_request(tokenizer):
    assert tokenizer("<|zh|>", split_special_tokens=False).input_ids == [tokenizer.zh_token_id]
    assert tokenizer.zh_token_id not in tokenizer("<|zh|>").input_ids


def test_saved_tokenizer_loads_equal(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    converted = convert_sentencepiece(folder / SENTENCEPIECE_FILE)
    for other in (again, converted):
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.split_special_tokens is True
        assert other.init_kwargs.get("clean_up_tokenization_spaces") is False
        for text in HARD_TEXTS + INJECTIONS:
            assert other(text).input_ids == tokenizer(text).input_ids
            assert other.decode(other(text).input_ids) == text
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_same_recipe_gives_the_same_files_in_another_process(recipe, folder, tmp_path):
    settings = dataclasses.asdict(recipe) | {"output_dir": str(tmp_path)}
    code = "import json, sys; from m3fm.training.tokenizer import *; "
    code += "train_tokenizer(TokenizerRecipe(**json.loads(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", code, json.dumps(settings)], check=True, capture_output=True)
    for name in (SENTENCEPIECE_FILE, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_facts_are_measured_and_written(facts, folder):
    assert json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")) == facts
    assert facts["output_dir"] == str(folder)
    assert facts["vocab_size"] == VOCAB_SIZE
    assert list(facts["languages"]) == ["en", "zh"]
    for measured in facts["languages"].values():
        assert measured["round_trip_failures"] == measured["parity_failures"] == 0
        assert measured["characters_per_token"] == round(measured["characters"] / measured["tokens"], 3) > 1
    assert facts["languages"]["en"]["byte_tokens"] == 7  # two U+FFFD of three bytes, one line feed


def test_one_language_fills_the_vocabulary_alone(made_up_root, tmp_path):
    recipe = TokenizerRecipe(data_root=str(made_up_root), output_dir=str(tmp_path), vocab_size=460, languages=["en"])
    tokenizer = train_tokenizer(recipe)
    assert len(tokenizer) == 460
    assert tokenizer.convert_ids_to_tokens([5, 6, 15]) == ["<|en|>", "<|reserved_0|>", "<|reserved_9|>"]
    assert_lossless(tokenizer, HARD_TEXTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"languages": []}, "distinct codes"),
        ({"languages": ["en", "en"]}, "distinct codes"),
        ({"languages": ["en", "de"]}, r"max_piece_lengths.*\['de'\]"),
        ({"language_shares": {}}, r"language_shares.*\['zh'\]"),
        ({"language_shares": {"zh": 1.0}}, "sum below 1"),
        ({"language_shares": {"zh": 0.0}}, "sum below 1"),
    ],
)
def test_impossible_recipe_is_a_value_error(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenizerRecipe(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 300}, "expected more than"),
        ({"vocab_size": 9000}, "do not give"),
        ({"languages": ["zh", "de"]}, "0 texts in 'de'"),
    ],
)
def test_corpus_that_does_not_fit_is_a_value_error(made_up_root, tmp_path, settings, message):
    lengths, shares = {"en": 16, "zh": 4, "de": 16}, {"zh": 0.3, "de": 0.3}
    settings = {"vocab_size": VOCAB_SIZE, "max_piece_lengths": lengths, "language_shares": shares} | settings
    recipe = TokenizerRecipe(data_root=str(made_up_root), output_dir=str(tmp_path / "new"), **settings)
    with pytest.raises(ValueError, match=message):
        train_tokenizer(recipe)
    assert not (tmp_path / "new").exists()


def test_foreign_sentencepiece_model_is_refused(tmp_path):
    texts = iter(made_up_reports("en"))
    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=prefix, vocab_size=120, minloglevel=2
    )
    with pytest.raises(ValueError, match="256 byte pieces; it changes the text"):
        convert_sentencepiece(prefix + ".model")


def test_missing_sentencepiece_names_the_extra(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"pip install m3fm\[train\]"):
        convert_sentencepiece(folder / SENTENCEPIECE_FILE)


def test_recipe_file_holds_the_defaults():
    settings = yaml.safe_load(RECIPE_FILE.read_text(encoding="utf-8"))
    assert settings.pop("recipe") == "tokenizer"
    assert set(settings) == {field.name for field in dataclasses.fields(TokenizerRecipe)}
    (recipe,) = HfArgumentParser(TokenizerRecipe).parse_dict(settings)
    assert recipe == TokenizerRecipe()


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(m3fm.DEFAULT_CHECKPOINT)


@pytest.mark.realdata
def test_shipped_tokenizer_keeps_every_training_report(shipped, data_root):
    texts = [text for _, text in iter_corpus(data_root)]
    assert len(texts) > 10_000
    assert_lossless(shipped, texts + HARD_TEXTS + INJECTIONS)
    assert shipped.convert_ids_to_tokens(range(FIRST_BYTE_ID)) == SPECIAL_TOKENS


@pytest.mark.realdata
def test_shipped_tokenizer_comes_from_its_recipe(shipped, data_root, tmp_path):
    settings = yaml.safe_load(RECIPE_FILE.read_text(encoding="utf-8"))
    del settings["recipe"]
    facts = run(TokenizerRecipe(**settings | {"data_root": str(data_root), "output_dir": str(tmp_path)}))
    assert facts["languages"]["en"]["characters_per_token"] > 5
    assert facts["languages"]["zh"]["characters_per_token"] > 2.1
    for measured in facts["languages"].values():
        assert measured["round_trip_failures"] == measured["parity_failures"] == 0
    # Another processor's float sums may move pieces at the end of the list; ids are compared by piece, not by file.
    trained = AutoTokenizer.from_pretrained(tmp_path)
    common = set(trained.get_vocab()) & set(shipped.get_vocab())
    assert len(common) > 0.99 * len(shipped)
