"""The page of a report: one file, no scripts, nothing fetched, every text escaped.

What a reader wants first comes first: the headline numbers as cards, then the pictures. Plots and
tables with every number's circumstances follow, and at the end how it was all made.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from core_jax.evaluation.report_images import SMALL
from core_jax.evaluation.report_plots import draw
from core_jax.evaluation.report_text import interval_text, number_text, setting_text

# Side at which pictures of few pixels are shown, and rows of a gallery that are not folded away.
_SHOWN, _ROWS = 160, 12
# Metrics that become cards in every section that has them: what they are called, and the metrics
# that say what the number is worth.
HEADLINES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("caption.object_f1", "Objects right (F1)", {}),
    ("caption.relation_f1", "Relations right (F1)", {}),
    ("caption.finished", "Captions that end by themselves", {}),
    ("caption.cider_d", "CIDEr-D (0 to 10)", {}),
    ("reconstruction.pixel_mse.vlv", "Redrawn, pixel MSE", {
        "from true captions": "reconstruction.pixel_mse.caption",
        "from nothing": "reconstruction.pixel_mse.none",
    }),
    ("stage1.denoising_loss.vlv", "Denoising loss", {
        "with true captions": "stage1.denoising_loss.caption",
        "with nothing": "stage1.denoising_loss.none",
    }),
    ("vqa.accuracy.vlv", "Questions answered from captions", {
        "ceiling, true captions": "vqa.accuracy.true_caption",
        "floor, no caption": "vqa.accuracy.no_caption",
    }),
    ("descriptions.t0.gamma5.massv.emitted_length", "Tokens a pass of the target, drafted for", {
        "by a drafter without eyes": "descriptions.t0.gamma5.text.emitted_length",
    }),
    ("descriptions.t0.gamma5.massv.identical_to_plain", "Answers in plain decoding's words", {}),
)  # fmt: skip

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#5d6671;--rule:#dde2e8;--paper:#fff;
--wash:#f4f6f8;--link:#0670ab;--good:#0b6b48;--good-wash:#dff3ea;--bad:#a3301a;--bad-wash:#fbe6e1}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#a0aab5;--rule:#343b44;--paper:#15181c;
--wash:#1e2329;--link:#5cb3e6;--good:#7ddab0;--good-wash:#163328;--bad:#f3a08d;--bad-wash:#41221b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:.6rem 0}
h2{font-size:1.3rem;margin:2.6rem 0 .5rem;padding-top:.8rem;border-top:2px solid var(--rule)}
h3{font-size:1.1rem;margin:2rem 0 .4rem}h4{font-size:.95rem;margin:1.2rem 0 .3rem}
nav a{display:inline-block;margin:0 1rem .3rem 0}a{color:var(--link)}
.note,.meta{color:var(--soft);font-size:.88rem;margin:.3rem 0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.7rem;
margin:1rem 0}
.card{background:var(--wash);border:1px solid var(--rule);border-radius:10px;padding:.7rem .8rem}
.card b{display:block;font-size:1.7rem;line-height:1.25;font-variant-numeric:tabular-nums}
.card span{display:block;font-size:.8rem;color:var(--soft)}
.card .label{color:var(--ink);font-size:.88rem;font-weight:600}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.28rem .7rem;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--soft);white-space:nowrap}
td.line{white-space:nowrap}
td.num,th.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{margin:.3rem 0;font-size:.88rem}summary{cursor:pointer;color:var(--soft)}
pre{white-space:pre-wrap;background:var(--wash);padding:.6rem;border-radius:6px;margin:.3rem 0}
svg.plot{display:block;width:100%;max-width:580px;height:auto;font:13px system-ui,sans-serif}
svg text{fill:var(--soft)}svg .label{fill:var(--ink)}
svg .grid{stroke:var(--rule)}svg .axis{stroke:var(--soft)}
svg .line{fill:none;stroke-width:2}svg .whisker{fill:none;stroke-width:1.3}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.2rem 0;
font-size:.88rem}
.legend span{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.row{display:flex;flex-wrap:wrap;gap:.5rem 1.2rem;padding:.9rem 0;
border-bottom:1px solid var(--rule)}
.pictures{display:flex;flex-wrap:wrap;gap:.6rem;flex:none;max-width:100%}
figure{margin:0}figcaption{font-size:.78rem;color:var(--soft);text-align:center}
figure img{display:block;height:auto;max-width:min(44vw,16rem);border-radius:4px}
.more figure img{max-width:7rem}.more .pictures{margin:.4rem 0}
img.pixels{image-rendering:pixelated}
.words{flex:1 1 18rem;min-width:min(100%,16rem)}.words p{margin:0 0 .4rem}
.words p.meta{font-size:.78rem}
.chip{display:inline-block;border-radius:99px;padding:0 .6rem;margin:0 .3rem .3rem 0;
font-size:.8rem;background:var(--good-wash);color:var(--good)}
.chip.bad{background:var(--bad-wash);color:var(--bad)}
@media(max-width:40rem){.row>.pictures{gap:.4rem;flex-wrap:nowrap;width:100%}
.row>.pictures figure{flex:1 1 0;min-width:0}.row>.pictures figure img{width:100%;max-width:none}
th,td{padding:.28rem .4rem}.cards{grid-template-columns:1fr 1fr;gap:.5rem}
.card b{font-size:1.4rem}}
"""


def render(title: str, parts: Sequence[dict[str, Any]]) -> str:
    """Returns the page of a report's sections, as `Report.write` stores them."""
    links = "".join(f"<a href='#s{i}'>{escape(part['name'])}</a>" for i, part in enumerate(parts))
    links += "<a href='#made'>How this was made</a>" if parts else ""
    galleries = "".join(_galleries(part) for part in parts)
    sections = "".join(_section(i, part) for i, part in enumerate(parts))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><nav>{links}</nav>{_cards(parts)}{galleries}{sections}"
        f"{_provenance(parts)}</body></html>\n"
    )


def _items(part: Mapping[str, Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in part["groups"].values():
        yield from group[kind].items()


def _cards(parts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for part in parts:
        metrics = dict(_items(part, "metrics"))
        cards = "".join(
            _card(label, metrics[name], {k: metrics[m] for k, m in beside.items() if m in metrics})
            for name, label, beside in HEADLINES
            if name in metrics
        )
        if cards:
            rows.append((part["name"], f"<div class='cards'>{cards}</div>"))
    if len(rows) == 1:
        return rows[0][1]
    return "".join(f"<h3>{escape(name)}</h3>{cards}" for name, cards in rows)


def _card(label: str, entry: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> str:
    number = f"n\u00a0=\u00a0{number_text(entry['n'])}"
    lines = [f"{interval_text(entry['interval'], entry['level'])} {number}"]
    lines += [f"{name} {number_text(other['value'])}" for name, other in beside.items()]
    details = "".join(f"<span>{escape(line.strip())}</span>" for line in lines)
    return (
        f"<div class='card'><span class='label'>{escape(label)}</span>"
        f"<b>{escape(number_text(entry['value']))}</b>{details}</div>"
    )


def _galleries(part: Mapping[str, Any]) -> str:
    blocks = []
    for title, gallery in _items(part, "galleries"):
        rows = [_row(row) for row in gallery["rows"]]
        shown, folded = "".join(rows[:_ROWS]), "".join(rows[_ROWS:])
        if folded:
            number = len(rows) - _ROWS
            shown += f"<details><summary>{number} more</summary>{folded}</details>"
        note = f"<p class='note'>{escape(gallery['note'])}</p>" if gallery["note"] else ""
        blocks.append(f"<section><h2>{escape(title)}</h2>{note}{shown}</section>")
    return "".join(blocks)


def _section(index: int, part: Mapping[str, Any]) -> str:
    blocks = [f"<section><h2 id='s{index}'>{escape(part['name'])}</h2>"]
    for name, group in part["groups"].items():
        if len(part["groups"]) > 1 and any(group[k] for k in ("metrics", "plots", "tables")):
            blocks.append(f"<h3>{escape(name)}</h3>")
        blocks += [_block(title, draw(plot, title), plot) for title, plot in group["plots"].items()]
        blocks += [_block(title, _table(t), t) for title, t in group["tables"].items()]
        if group["metrics"]:
            blocks.append(_metrics(group["metrics"]))
    return "".join(blocks) + "</section>"


def _block(title: str, body: str, item: Mapping[str, Any]) -> str:
    note = f"<p class='note'>{escape(item['note'])}</p>" if item["note"] else ""
    return f"<h4>{escape(title)}</h4>{body}{note}"


def _provenance(parts: Sequence[Mapping[str, Any]]) -> str:
    """One folded block for all groups of a section that have the same facts."""
    blocks = []
    for part in parts:
        same: dict[str, list[str]] = {}
        for name, group in part["groups"].items():
            facts = json.dumps(group["provenance"], indent=2, ensure_ascii=False)
            same.setdefault(facts, []).append(f"{name} (written {group['written']})")
        for facts, names in same.items():
            summary = f"{part['name']}: {', '.join(names)}"
            blocks.append(
                f"<details><summary>{escape(summary)}</summary><pre>{escape(facts)}</pre></details>"
            )
    if not blocks:
        return ""
    return f"<section><h2 id='made'>How this was made</h2>{''.join(blocks)}</section>"


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    common = _common([m["settings"] for m in metrics.values()])
    rows, differs = [], False
    for name, entry in metrics.items():
        own = {k: v for k, v in entry["settings"].items() if k not in common}
        differs = differs or bool(own)
        cells = (
            interval_text(entry["interval"], entry["level"]),
            number_text(entry["n"]),
            "" if entry["seed"] is None else str(entry["seed"]),
        )
        rows.append(
            # A long name may break after its dots.
            f"<tr><td>{escape(name).replace('.', '.<wbr>')}</td>"
            f"<td class='num'><strong>{escape(number_text(entry['value']))}</strong></td>"
            + "".join(f"<td class='num'>{escape(cell)}</td>" for cell in cells)
            + f"<td class='own'>{escape(_settings_text(own))}</td></tr>"
        )
    columns = ("metric", "value", "95 % interval", "n", "seed", "settings" if differs else "")
    head = "".join(
        f"<th{' class=num' if 0 < i < 5 else ''}>{text}</th>" for i, text in enumerate(columns)
    )
    note = f"<p class='note'>Settings: {escape(_settings_text(common))}</p>" if common else ""
    return (
        f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table></div>{note}"
    )


def _common(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {k: v for k, v in settings[0].items() if all(k in s and s[k] == v for s in settings)}


def _settings_text(settings: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {setting_text(value)}" for name, value in settings.items())


def _table(table: Mapping[str, Any]) -> str:
    numeric = [
        bool(table["rows"])
        and all(isinstance(row[i], int | float) or row[i] is None for row in table["rows"])
        for i in range(len(table["columns"]))
    ]

    def cell(value: Any, is_number: bool, tag: str = "td") -> str:
        text = "" if value is None else number_text(value)
        kind = " class=num" if is_number else " class=line" if text.startswith("[") else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell(c, n, "th") for c, n in zip(table["columns"], numeric, strict=True))
    rows = "".join(
        "<tr>" + "".join(cell(c, n) for c, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in table["rows"]
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class='wide'><table>{body}</table></div>"


def _row(row: Mapping[str, Any]) -> str:
    words = [] if row["id"] is None else [f"<p class='meta'>{escape(str(row['id']))}</p>"]
    if row["caption"] is not None:
        words.append(f"<p>{escape(row['caption'])}</p>")
    words += [
        f"<span class='chip{'' if right else ' bad'}'>{'✓' if right else '✗'} {escape(text)}</span>"
        for text, right in row["verdict"].items()
    ]
    folded = [
        f"<p>{label}{escape(row[key])}</p>"
        for label, key in (("", "note"), ("True caption: ", "reference"))
        if row[key] is not None
    ]
    if row["more"]:
        folded.append(f"<div class='more'>{_pictures(row['more'])}</div>")
    if folded:
        words.append(f"<details><summary>More</summary>{''.join(folded)}</details>")
    pictures = _pictures(row["images"])
    return f"<div class='row'>{pictures}<div class='words'>{''.join(words)}</div></div>"


def _pictures(images: Mapping[str, Mapping[str, Any]]) -> str:
    figures = "".join(_figure(name, image) for name, image in images.items())
    return f"<div class='pictures'>{figures}</div>"


def _figure(name: str, image: Mapping[str, Any]) -> str:
    width, style = image["width"], ""
    if max(width, image["height"]) <= SMALL:
        width, style = round(_SHOWN * width / max(width, image["height"])), " class='pixels'"
    return (
        f"<figure><img{style} src='{escape(image['uri'], quote=True)}' width='{width}' "
        f"alt='{escape(name, quote=True)}' loading='lazy'>"
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )
