"""Reports: numbers, merging, and a page that is self-contained and escapes everything."""

import base64
import html.parser
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from core_jax.evaluation.bootstrap import bootstrap_mean
from core_jax.evaluation.report import GalleryRow, Report
from core_jax.evaluation.report_images import encode_image, encode_rows
from core_jax.evaluation.report_plots import draw, tick_text
from core_jax.evaluation.report_text import interval_text, number_text, setting_text

EVIL = "<script>alert('x')</script> & \"quoted\""


def _picture(rng, side=8):
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)


def _filled(rng, text="plain"):
    report = Report(text, provenance={"command": text})
    report.begin_group(text)
    report.add_metric("caption", "caption.object_f1", 0.8, n=5, settings={text: text})
    report.add_metric("caption", "object_f1", 0.8125, n=500, seed=0, interval=(0.79, 0.83),
                      settings={"beams": 4, "note": text})  # fmt: skip
    report.add_table("caption", text, ["name", text], [[text, 1.5], ["b", None]], note=text)
    line = {text: {"x": [1, 2, 4], "y": [3.0, 2.0, None], "low": [2.5, 1.5, 1], "high": [4, 3, 2]}}
    line[text + "2"] = {"x": [1], "y": [1]}  # two series have a legend
    report.add_plot("caption", text, line, x_label=text, y_label=text, note=text, log_x=True)
    report.add_plot("caption", "bars", {text: {"x": [text, "b"], "y": [1, -2]}}, kind="bar")
    images = {text: _picture(rng), "redrawn": Image.new("RGB", (300, 200), "red")}
    row = GalleryRow(
        images=images, more={text: _picture(rng)}, caption=text, reference=text,
        verdict={text: True, text + "3": False}, note=text, id=text,
    )  # fmt: skip
    report.add_gallery("caption", text, [row], note=text)
    return report


def test_numbers_have_their_n_seed_interval_and_settings(tmp_path, rng):
    _filled(rng).write(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["caption"]["object_f1"] == {
        "value": 0.8125,
        "n": 500,
        "seed": 0,
        "interval": [0.79, 0.83],
        "level": 0.95,
        "settings": {"beams": 4, "note": "plain"},
    }
    groups = written["report"]["sections"]["caption"]
    assert groups["plain"]["provenance"] == {"command": "plain"}


def test_names_nest_and_estimates_bring_their_interval(tmp_path):
    report = Report("t")
    estimate = bootstrap_mean(np.arange(10.0), seed=7, num_resamples=100, level=0.9)
    report.add_metric("vlv.stage1", "denoising_loss.caption", estimate, settings={"steps": 5})
    report.add_metric("vlv", "stage1.denoising_loss.none", np.float32(np.nan), n=np.int64(3))
    report.write(tmp_path)
    losses = json.loads((tmp_path / "report.json").read_text())["vlv"]["stage1"]["denoising_loss"]
    entry = losses["caption"]
    assert entry["value"] == 4.5
    assert entry["interval"] == [estimate.low, estimate.high]
    assert (entry["n"], entry["seed"], entry["level"]) == (10, 7, 0.9)
    assert entry["num_resamples"] == 100
    assert losses["none"]["value"] is None
    assert "not finite" in (tmp_path / "report.html").read_text()


def _measured(directory, group, *, provenance=None, section="caption", title="t", **metrics):
    report = Report(title, provenance=provenance)
    report.begin_group(group)
    for name, value in metrics.items():
        report.add_metric(section, name, value, n=20)
    report.write(directory)
    return json.loads((directory / "report.json").read_text())


def test_commands_share_a_report(tmp_path, rng):
    _filled(rng).write(tmp_path)
    written = _measured(tmp_path, "bleu", bleu_4=0.3, object_f1=0.9, provenance={"commit": "abc"})
    written = _measured(tmp_path, "vqa", section="vqa", accuracy=0.5)
    assert written["caption"]["object_f1"]["value"] == 0.9  # in one group, the newest
    assert written["caption"]["bleu_4"]["value"] == 0.3
    assert written["vqa"]["accuracy"]["n"] == 20
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 3  # the first command's gallery is still there
    groups = written["report"]["sections"]["caption"]
    assert groups["plain"]["provenance"] == {"command": "plain"}
    assert groups["bleu"]["provenance"] == {"commit": "abc"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_group_that_is_measured_again_is_replaced_as_a_whole(tmp_path, rng):
    _filled(rng).write(tmp_path)
    _measured(tmp_path, "other", rouge_l=0.1)
    _measured(tmp_path, "plain", section="elsewhere", m=1.0)
    written = _measured(tmp_path, "plain", cider_d=1.5)  # the group of `_filled`
    assert written["caption"].keys() == {"cider_d", "rouge_l"}
    assert written["elsewhere"]["m"]["value"] == 1.0
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page  # its gallery, plots and tables went with it
    assert "<svg" not in page
    assert written["report"]["sections"]["caption"]["plain"]["provenance"] == {}
    # A group that nothing was added to was not measured.
    report = Report("t")
    report.begin_group("plain")
    report.write(tmp_path)
    assert "cider_d" in json.loads((tmp_path / "report.json").read_text())["caption"]


def test_a_group_whose_names_all_moved_is_gone(tmp_path):
    _measured(tmp_path, "old", a=1.0)
    written = _measured(tmp_path, "new", a=2.0)
    assert written["report"]["sections"]["caption"].keys() == {"new"}


def test_the_title_stays_if_none_is_given(tmp_path):
    assert _measured(tmp_path, "a", title=None, x=1.0)["report"]["title"] == "Report"
    _measured(tmp_path, "a", title="first", x=1.0)
    assert _measured(tmp_path, "b", title=None, y=1.0)["report"]["title"] == "first"


def test_headlines_and_pictures_come_first_and_provenance_last(tmp_path, rng):
    page = _filled(rng).write(tmp_path).read_text()
    order = [page.index(x) for x in
             ("class='card'", "<img", "<svg class='plot'", "<table", "<pre>")]  # fmt: skip
    assert order == sorted(order)
    assert page.count("class='card'") == 1  # object_f1 without its prefix is no headline


def test_headlines_say_what_they_are_worth(tmp_path):
    report = Report("t")
    for name, value in (("vlv", 0.8), ("true_caption", 0.9), ("no_caption", 0.25)):
        report.add_metric("vlv", f"vqa.accuracy.{name}", value, n=7, interval=(value - 0.1, 0.95))
    page = report.write(tmp_path).read_text()
    card = page[page.index("<div class='card'>") : page.index("</div></div>")]
    assert "<b>0.800</b>" in card
    assert "[0.700, 0.950] n\u00a0=\u00a07" in card
    assert "ceiling, true captions 0.900" in card
    assert "floor, no caption 0.250" in card


def test_settings_that_all_share_are_said_once(tmp_path):
    report = Report("t")
    report.add_metric("a", "x", 1.0, n=1, settings={"beams": 4, "excludes_zero": True})
    report.add_metric("a", "y", 1.0, n=1, settings={"beams": 4})
    page = report.write(tmp_path).read_text()
    assert page.count("beams: 4") == 1
    assert "<td class='own'>excludes_zero: yes</td>" in page
    assert "<td class='own'></td>" in page


def test_long_galleries_are_folded_and_bounded(tmp_path, rng):
    rows = [GalleryRow(images={"original": _picture(rng)}, id=str(i)) for i in range(20)]
    report = Report("t")
    report.add_gallery("a", "g", rows)
    page = report.write(tmp_path).read_text()
    assert "<summary>8 more</summary>" in page
    noise = [GalleryRow(images={"a": _picture(rng, 300)}) for _ in range(6)]
    full = sum(len(r["images"]["a"]["uri"]) for r in encode_rows(noise))
    smaller = encode_rows(noise, full // 2)
    assert len(smaller) == 6
    assert sum(len(r["images"]["a"]["uri"]) for r in smaller) <= full // 2
    assert {r["images"]["a"]["width"] for r in smaller} < {256, 192, 128}
    least = encode_rows(noise, 1)
    assert len(least) == 1  # one row is shown, whatever it weighs
    assert encode_rows([]) == []


class _Tags(html.parser.HTMLParser):
    """Collects tags, attributes and what is left open."""

    VOID = frozenset(("meta", "img", "line", "path", "rect", "circle", "br", "wbr"))

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag


def _parse(page):
    tags = _Tags()
    tags.feed(page)
    assert not tags.open
    return tags.seen


def test_page_escapes_every_text(tmp_path, rng):
    page = _filled(rng, EVIL).write(tmp_path).read_text()
    plain = _filled(rng, "x" * len(EVIL)).write(tmp_path / "plain").read_text()
    assert "<script" not in page
    assert EVIL not in page
    # Hostile text changes no tag and no attribute's name (legends and ids apart: none differ).
    shape = [(tag, sorted(attrs)) for tag, attrs in _parse(page)]
    assert shape == [(tag, sorted(attrs)) for tag, attrs in _parse(plain)]


def test_page_is_self_contained(tmp_path, rng):
    page = _filled(rng).write(tmp_path).read_text()
    for tag, attrs in _parse(page):
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            if name in attrs:
                assert attrs[name].startswith(("data:image/", "#"))
    assert not re.search(r"url\(|@import|https?:", page)


def test_pictures_survive(rng):
    array = _picture(rng)
    encoded = encode_image(array)
    data = base64.b64decode(encoded["uri"].split(",")[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), array)
    assert encode_image(data)["uri"].startswith("data:image/png")
    assert encode_image(array[..., :1])["width"] == 8
    large = encode_image(Image.new("RGBA", (400, 200)))
    assert large["uri"].startswith("data:image/jpeg")
    assert (large["width"], large["height"]) == (400, 200)
    with pytest.raises(ValueError, match="uint8"):
        encode_image(array / 255.0)


def _svg(plot):
    defaults = {"x_label": "", "y_label": "", "note": "", "log_x": False, "log_y": False}
    text = draw({"kind": "line", **defaults, **plot}, "title")
    return ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


def test_line_plot_places_points_and_intervals():
    series = {"a": {"x": [0, 10, 5], "y": [0, 1, 0.5], "low": [0, 0.9, 0.4], "high": [0.1, 1, 0.6]}}
    svg = _svg({"series": series})
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    assert circles == sorted(circles)  # drawn from left to right
    assert circles[1][0] == pytest.approx((circles[0][0] + circles[2][0]) / 2, abs=0.2)
    assert circles[1][1] == pytest.approx((circles[0][1] + circles[2][1]) / 2, abs=0.2)
    assert circles[0][1] > circles[2][1]  # up is more
    assert len([p for p in svg.iter("path") if p.get("class") == "whisker"]) == 3


def test_log_axis_spaces_decades_evenly():
    svg = _svg({"series": {"a": {"x": [1, 10, 100], "y": [1, 2, 3]}}, "log_x": True})
    x = [float(c.get("cx")) for c in svg.iter("circle")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)


def test_bars_grow_from_zero():
    svg = _svg({"kind": "bar", "series": {"a": {"x": ["p", "q"], "y": [2, -1]}}})
    up, down = svg.iter("rect")
    assert float(up.get("height")) == pytest.approx(2 * float(down.get("height")), abs=0.3)
    bottom = float(up.get("y")) + float(up.get("height"))
    assert bottom == pytest.approx(float(down.get("y")), abs=0.2)


@pytest.mark.parametrize("y", [[1, 1], [0, 0], [1e-9, 2e-9], [1e9, 3e9], [-5, -5.0001]])
def test_plots_of_any_scale_have_ticks_and_stay_inside(y):
    svg = _svg({"series": {"a": {"x": [1, 2], "y": y}}})
    assert len([t for t in svg.iter("text") if t.text]) >= 4
    for circle in svg.iter("circle"):
        assert 0 <= float(circle.get("cx")) <= 480
        assert 0 <= float(circle.get("cy")) <= 300


def test_empty_plot_and_single_point():
    assert "No finite" in draw({"kind": "line", "series": {"a": {"x": [1], "y": [None]}}}, "t")
    assert len(list(_svg({"series": {"a": {"x": [3], "y": [3]}}}).iter("circle"))) == 1


def test_tick_text():
    assert [tick_text(v) for v in (0, 0.25, 1500, 2e6, 1e-5, 0.30000000000000004)] == [
        "0", "0.25", "1500", "2e6", "1e-5", "0.3"]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), [
    (0.5, "0.500"), (0.81254, "0.813"), (1234567, "1,234,567"), (12345.6, "12,346"),
    (999.7, "1,000"), (81.25, "81.2"), (500.0, "500"), (0.0, "0"), (-0.0123, "-0.0123"),
    (3.2e-5, "3.20e-5"), (-3.2e-5, "-3.20e-5"), (1.3e-13, "<0.0001"), (-1e-12, ">-0.0001"),
    (2.5e8, "2.50e8"), (None, "not finite"), (True, "True"), ("text", "text"),
])  # fmt: skip
def test_number_text(value, text):
    assert number_text(value) == text


def test_intervals_and_settings_as_text():
    assert interval_text([0.5, 1.0], 0.95) == "[0.500, 1.00]"
    assert interval_text([0.5, None], 0.9) == "[0.500, not finite] (90%)"
    assert interval_text(None) == ""
    assert setting_text({"a": [1, True], "b": None}) == "a 1, yes, b none"


def test_misuse_is_refused(tmp_path):
    report = Report("t")
    with pytest.raises(ValueError, match="needs n"):
        report.add_metric("a", "b", 1.0)
    with pytest.raises(ValueError, match="interval 2"):
        report.add_metric("a", "b", 1.0, n=1, interval=(2, 1))
    with pytest.raises(ValueError, match="cannot be named 'report'"):
        report.add_metric("report", "b", 1.0, n=1)
    with pytest.raises(ValueError, match="row 0 has 1 cells for 2"):
        report.add_table("a", "t", ["x", "y"], [[1]])
    with pytest.raises(ValueError, match="columns of"):
        report.add_plot("a", "t", {"s": {"x": [1], "y": [1, 2]}})
    with pytest.raises(ValueError, match="not positive"):
        report.add_plot("a", "t", {"s": {"x": [0], "y": [1]}}, log_x=True)
    with pytest.raises(ValueError, match="'pie'"):
        report.add_plot("a", "t", {}, kind="pie")
    report.add_metric("a", "b", 1.0, n=1)
    report.add_metric("a", "b.c", 1.0, n=1)
    with pytest.raises(ValueError, match="is a metric itself"):
        report.write(tmp_path)
    assert not list(tmp_path.glob("report.json"))


def test_other_formats_are_not_overwritten(tmp_path):
    (tmp_path / "report_parts").mkdir()
    (tmp_path / "report_parts" / "x.json").write_text('{"format": 99, "name": "x"}')
    with pytest.raises(ValueError, match="format 99"):
        Report("t").write(tmp_path)


def test_sections_of_similar_names_stay_apart(tmp_path):
    report = Report("t")
    for name in ("a b", "a/b", "a_b"):
        report.add_metric(name, "m", 1.0, n=1)
    report.write(tmp_path)
    Report("t").write(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.keys() == {"a b", "a/b", "a_b", "report"}
