"""What holds for every file that is tracked."""

import pathlib
import re
import subprocess
import warnings

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = {".py", ".md", ".toml", ".sh", ".json", ".txt", ".cfg", ".yaml", ".yml", ""}
# Absolute paths of one machine; /tmp and /usr are everybody's.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|opt|work|mnt|workspace)/[\w.]+")
# Paths that a file may name: none of a machine, but of a system that it describes.
ALLOWED: set[str] = set()
SOFT_LINES, HARD_LINES = 400, 600


def _tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [n for n in listed.stdout.split("\0") if n]
    return [ROOT / n for n in names if (ROOT / n).is_file()]


def _text_files():
    return [f for f in _tracked() if f.suffix in TEXT and "checkpoints" not in f.parts]


def test_no_file_names_a_path_of_one_machine():
    assert MACHINE_PATH.search("see /home/somebody/models")
    relative = "/".join((".", "work", "x"))  # put together here: written out it looks like one
    assert not MACHINE_PATH.search(f"https://example.org/home/page and {relative}")
    problems = []
    for file in _text_files():
        if file == pathlib.Path(__file__) or file.name == "LICENSE":
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            if (hit := MACHINE_PATH.search(line)) and hit.group() not in ALLOWED:
                problems.append(f"{file.relative_to(ROOT)}:{number}: {hit.group()}")
    assert not problems, "\n".join(problems)


def test_files_are_short():
    lengths = {
        str(f.relative_to(ROOT)): len(f.read_text().splitlines())
        for f in _tracked()
        if f.suffix == ".py"
    }
    long = {name: n for name, n in lengths.items() if n > SOFT_LINES}
    if long:
        listed = ", ".join(f"{name} ({n})" for name, n in sorted(long.items()))
        warnings.warn(f"files over {SOFT_LINES} lines: {listed}", stacklevel=1)
    too_long = [name for name, n in long.items() if n > HARD_LINES]
    assert not too_long, f"over {HARD_LINES} lines, split them: {too_long}"


def test_there_is_no_utils_module():
    names = {"utils.py", "util.py", "helpers.py", "misc.py"}
    assert not [f for f in _tracked() if f.name in names]


def test_no_pickles_or_large_files_are_tracked():
    pickles = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
    assert not [f for f in _tracked() if f.suffix in pickles]
    checkpoints = [f for f in _tracked() if "checkpoints" in f.parts]
    assert sum(f.stat().st_size for f in checkpoints) < 25_000_000


def test_docs_that_the_code_names_exist():
    named = {
        (match, file)
        for file in _text_files()
        for match in re.findall(r"\bdocs/[\w./-]+\.md", file.read_text(errors="replace"))
    }
    missing = sorted({f"{doc} (in {f.relative_to(ROOT)})" for doc, f in named
                      if not (ROOT / doc).is_file()})  # fmt: skip
    assert not missing, "\n".join(missing)
