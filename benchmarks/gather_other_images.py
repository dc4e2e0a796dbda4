# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Take the images of other things than chests out of clones of public repositories.

    python benchmarks/gather_other_images.py --clones FOLDER --output OTHER

`FOLDER/<owner>+<name>` is a clone of each repository that `input_check_sources.yaml` lists (bare or not). The images
go to `OTHER/<part>/<kind>/0000.<ending>`; what no reader of m3fm knows becomes PNG.
"""

import argparse
import io
import re
import subprocess
from pathlib import Path

import yaml
from PIL import Image

SOURCES = Path(__file__).with_name("input_check_sources.yaml")
KEPT_ENDINGS = {".jpg", ".jpeg", ".png", ".dcm"}


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clones", type=Path, required=True, help="folder of the clones, <owner>+<name> each")
    parser.add_argument("--output", type=Path, required=True, help="where the images go")
    arguments = parser.parse_args()
    for source in yaml.safe_load(SOURCES.read_text(encoding="utf-8")):
        clone = arguments.clones / source["repository"].replace("/", "+")
        count = gather(source, clone, arguments.output / source["part"] / source["kind"])
        print(f"{source['part']:8} {source['kind']:20} {count:5}  {source['repository']}")


def gather(source: dict, clone: Path, folder: Path) -> int:
    """Writes the images of one source; returns how many."""
    git = ["git", "-C", str(next(place for place in (clone / "repo", clone) if place.is_dir()))]
    listed = _run([*git, "ls-tree", "-r", "-z", "--name-only", source["commit"]]).decode().split("\0")
    paths = sorted(path for path in listed if re.search(source["files"], path))
    step = max(1.0, len(paths) / source["most"])
    chosen = [paths[int(i * step)] for i in range(min(source["most"], len(paths)))]
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for path in chosen:
        data = _run([*git, "show", f"{source['commit']}:{path}"])
        ending = Path(path).suffix.lower()
        if ending not in KEPT_ENDINGS:
            buffer = io.BytesIO()
            Image.open(io.BytesIO(data)).save(buffer, "PNG")
            data, ending = buffer.getvalue(), ".png"
        (folder / f"{count:04}{ending}").write_bytes(data)
        count += 1
    return count


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


if __name__ == "__main__":
    main()
