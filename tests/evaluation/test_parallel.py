# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest

from m3fm.evaluation import parallel
from m3fm.evaluation.parallel import evaluate_parallel

TEXTS = {"The lungs are clear.": "双肺清晰。", "Left effusion is seen.": "左侧胸腔积液。", "Edema.": "肺水肿。"}


class FakeReporter:
    """Gives a sentence and its translation one place."""

    def __init__(self, *arguments):
        pass

    def embed_texts(self, texts):
        places = {text: place for place, pair in enumerate(TEXTS.items()) for text in pair}
        return np.stack([np.eye(len(TEXTS))[places[text]] for text in texts])


def test_parallel_texts_count_once_and_by_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "CheckpointReporter", FakeReporter)
    (tmp_path / "config.json").write_text("{}")
    pairs = [(f"{number}{copy}", pair) for number, pair in enumerate(TEXTS.items()) for copy in "ab"]
    studies = [{"study_id": name, "modality": "cxr", "split": "validation", "report_en": "x"} for name, _ in pairs]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, studies)))
    rows = [{"study_id": name, "en": english, "zh": chinese} for name, (english, chinese) in pairs]
    (tmp_path / "parallel_en_zh.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    metrics = evaluate_parallel(tmp_path, tmp_path, tmp_path / "out")
    assert metrics["retrieval"]["en-zh"]["forward"]["recall@1"] == 1
    assert metrics["retrieval"]["en-zh"]["forward"]["num_items"] == len(TEXTS)
    assert "| zh → en | 3 | 1.000 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert evaluate_parallel(tmp_path, tmp_path, tmp_path / "out", split="all")["split"] == "all"
    with pytest.raises(ValueError, match="no parallel texts in the part 'test'"):
        evaluate_parallel(tmp_path, tmp_path, tmp_path / "out", split="test")
