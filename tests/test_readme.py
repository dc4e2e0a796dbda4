# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The README and its companions keep their word: commands, code, numbers, versions, attribution."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def setup_commands() -> list[str]:
    return [block.strip() for block in fenced("bash") if block.startswith("python3 -m venv")]


def test_setup_commands_are_single_lines_and_name_what_exists():
    commands = setup_commands()
    assert {command.rsplit(" && ", 1)[1].split()[0] for command in commands} == {".venv/bin/m3fm", ".venv/bin/pytest"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for command in commands:
        assert "\n" not in command
        words = shlex.split(command)
        assert (ROOT / words[words.index("-c") + 1]).is_file()
        assert re.fullmatch(r"\.\[(\w+)\]", words[words.index("-e") + 1])[1] in extras
        assert all((ROOT / word).is_file() for word in words if word.startswith("examples/"))


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    quoted = re.findall(r"^test_command='(.*)'$", script, flags=re.MULTILINE)
    assert quoted == [command for command in setup_commands() if command.endswith("pytest")]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_python_blocks_run_in_order():
    blocks = fenced("python")
    assert len(blocks) >= 4
    for block in blocks:
        ast.parse(block)
    # A process of its own: nothing that another test imported or registered may help the reader's code along.
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert re.search(r"[\u4e00-\u9fff]", result.stdout), "no Chinese report was printed"


@pytest.mark.parametrize(
    "path", ["README.md", "model_cards/m3fm-small.md", "docs/architecture.md", "docs/data.md", "CHANGELOG.md"]
)
def test_no_number_is_left_open(path):
    left = [line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if "TODO-NUMBER" in line]
    assert not left, f"{len(left)} lines of {path} wait for a measured number, the first: {left[0]}"


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    package = (ROOT / "m3fm" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(\S+)"$', package, flags=re.MULTILINE)[1] == version
    assert re.search(r"^version: (\S+)$", citation, flags=re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", changelog, flags=re.MULTILINE)[1] == version


def test_links_lead_to_files():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]:
        text = path.read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        local = [target for target in targets if not target.startswith(("http://", "https://"))]
        assert [target for target in local if not (path.parent / target).exists()] == []


def test_every_example_file_is_attributed():
    attribution = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").partition("## Attribution")[2]
    images = {path.name for path in (ROOT / "examples").iterdir() if path.suffix not in (".md", ".yaml")}
    assert images == set(re.findall(r"^\*\*`([^`]+)`\*\*$", attribution, flags=re.MULTILINE))


def test_example_images_carry_no_metadata():
    image_module = pytest.importorskip("PIL.Image")
    for path in (ROOT / "examples").glob("*.jpg"):
        with image_module.open(path) as image:
            assert len(image.getexif()) == 0 and "comment" not in image.info, path.name


@pytest.mark.parametrize("path", ["README.md", "NOTICE", "docs/data.md", "model_cards/m3fm-small.md"])
def test_the_two_licences_are_stated_alike(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert "CC BY-NC-SA 4.0" in text
    assert re.search(r"Apache-2\.0|Apache License", text)


def test_constraints_are_exact_public_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*", pin) for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(item for group in project["optional-dependencies"].values() for item in group),
    ]
    names = {re.match(r"[A-Za-z0-9._-]+", item)[0].lower().replace("_", "-") for item in wanted} - {"m3fm"}
    assert names <= {pin.partition("==")[0] for pin in pins}
