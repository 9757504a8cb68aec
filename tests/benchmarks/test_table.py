"""The figures in the document."""

import json

from benchmarks import table
from benchmarks.alternate import OURS, PEER

TIMES = {"calls": 3, "min": 1.0, "median": 2.0, "max": 3.0, "round_medians": [2.0]}
RESULT = {
    "name": "unet-mini", "peer": "diffusers", "busy_cores": [0.04, 0.02, None],
    "facts": {"MFU": 0.41, "parameters": 3, "nothing": None},
    "measures": {
        "forward": {OURS: TIMES, PEER: TIMES, "ratio": {"median": 1.0, "min": 0.9, "max": 1.1}},
        "alone": {OURS: TIMES},
    },
    "provenance": {
        "cpu": "a processor", "cpus": 2, "commit": "0123456789abcdef", "time": "2026-11-21T00:00",
        "versions": {"jax": "0.10.2"},
    },
}  # fmt: skip


def _write(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    result = RESULT | changes
    (folder / f"{result['name']}.json").write_text(json.dumps(result))


def test_figures_replace_what_is_between_the_markers(tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    _write(tmp_path / "cpu")
    arguments = ["--results", str(tmp_path), "--document", str(document)]
    assert table.main(arguments) == 0
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    row = "| `unet-mini` | forward | 1 / **2** / 3 | 1 / **2** / 3 | **1.00** (0.90 to 1.10) | 0.04"
    assert row in text
    assert "| `unet-mini` | alone | 1 / **2** / 3 | 0.04 |" in text
    assert "MFU 0.41" in text
    assert "a processor, 2 cores; jax 0.10.2; commit 0123456789ab" in text
    table.main(arguments)
    assert document.read_text() == text


def test_a_busy_machine_is_pointed_at(tmp_path):
    _write(tmp_path / "gpu", busy_cores=[4.0])
    assert "4.00, NOT quiet" in table.figures(tmp_path)


def test_no_results_give_a_sentence(tmp_path):
    assert table.figures(tmp_path) == table.NOTHING


def test_the_figures_go_into_the_document(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text(table.DOCUMENT.read_text())
    assert table.main(["--results", str(tmp_path), "--document", str(document)]) == 0
    assert table.NOTHING in document.read_text()
