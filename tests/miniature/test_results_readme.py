"""The README's numbers are those of the report, whatever of it is there."""

from miniature.results.readme import BEGIN, END, tables
from tests.test_repo import ROOT


def value(mean, n=500):
    settings = {"runs": ["a", "b", "c"]}
    return {"value": mean, "interval": [mean - 0.01, mean + 0.01], "n": n, "settings": settings}


def report():
    losses = {name: value(0.1 * i + 0.1) for i, name in enumerate(("vlv", "caption", "none"))}
    return {"vlv": {
        "caption": {"object_f1": value(0.5), "bleu_4": value(0.25)},
        "stage1": {"denoising_loss": losses | {"wrong_image": value(0.9)}},
        "ablations": {"T7_paper": {"caption": {
            "object_f1": {"stage1": value(0.6), "no_stage1": value(0.2)},
            "object_f1_difference": {"no_stage1_minus_stage1": value(-0.4)},
        }}},
    }}  # fmt: skip


def test_tables_have_what_the_report_has():
    text = tables(report())
    assert "captions of 500 held-out scenes, 3 seeds" in text
    assert "| object: shape, colour and size, F1 | 0.500 [0.490, 0.510] |" in text
    assert "| BLEU-4 | 0.250 [0.240, 0.260] |" in text
    assert "| denoising loss (n = 500) | 0.100 [0.0900, 0.110] | 0.200" in text
    assert "with: 0.600 [0.590, 0.610]; without: 0.200 [0.190, 0.210] |" in text
    assert "minus" not in text
    assert "redrawn" not in text  # it was not measured


def test_the_readme_has_a_place_for_them():
    document = (ROOT / "README.md").read_text()
    assert document.index(BEGIN) < document.index(END)
