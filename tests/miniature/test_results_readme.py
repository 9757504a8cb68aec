"""The README's numbers are those of the report, whatever of it is there."""

from miniature.results.readme import BEGIN, END, MASSV_BEGIN, MASSV_END, tables
from miniature.results.readme_massv import massv_tables
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


def massv_report():
    arms = {name: {"emitted_length": value(2.0 + i), "tvd": value(0.3)}
            for i, name in enumerate(("text", "text_tuned", "original", "massv"))}  # fmt: skip
    arms["massv"]["times_text"] = value(2.5)
    variants = {"paper": {"emitted_length": value(4.0)},
                "tv": {"emitted_length": value(4.5), "minus_paper": value(0.5)}}  # fmt: skip
    costs = {name: value(0.25) for name in ("draft_in_steps", "verify_in_steps", "overhead")}
    speed = {name: value(1.5) for name in (
        "times_plain_end_to_end", "times_plain_decode", "predicted_times_plain_end_to_end",
    )} | {"costs": costs}  # fmt: skip
    look = {"true": {"accepted_length": value(3.0)}}
    look |= {f"true_minus_{name}": value(1.0) for name in ("other", "blank", "none")}

    def at(arms):
        return {"descriptions": {"t0": {"gamma5": arms}, "t1": {"gamma5": arms}}}

    return {"massv": {"gemma3": {"headline": at(arms)}, "qwen2_5_vl": {
        "headline": at(arms), "variants": at(variants),
        "windows": {"look": {"t0": {"gamma5": {"massv": look}}}},
        "grown": {"speed": {"descriptions": {"t0": {
            "gamma0": {"plain": {}}, "gamma5": {"massv": speed},
        }}}},
    }}}  # fmt: skip


def test_drafters_have_tables_too():
    text = massv_tables(massv_report())
    assert "| Qwen2.5-VL, descriptions, 0 | 2.00 [1.99, 2.01] |" in text
    assert "| 5.00 [4.99, 5.01] | 2.50 [2.49, 2.51] |" in text
    assert "| Gemma 3, descriptions | 0.300 [0.290, 0.310] |" in text
    assert "| tv | 4.50 (+0.500 [0.490, 0.510]) | 4.50 (+0.500 [0.490, 0.510]) |  |  |" in text
    assert "| Qwen2.5-VL | 3.00 [2.99, 3.01] | 1.00 [0.990, 1.01] |" in text
    assert "| grown to 39 million | 5 | 1.50 [1.49, 1.51] | 1.50 |" in text
    assert "Gemma 3 as it is" not in text  # it was not measured


def test_the_readme_has_a_place_for_them():
    document = (ROOT / "README.md").read_text()
    assert document.index(BEGIN) < document.index(END)
    assert document.index(MASSV_BEGIN) < document.index(MASSV_END)
