"""The page of a report: one file, no scripts, nothing fetched, every text escaped."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from vlv_jax.evaluation.report_plots import draw

# Side at which pictures of few pixels are shown.
_SHOWN = 160

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#626b76;--rule:#dde2e8;--paper:#fff;
--wash:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4b0;--rule:#333a43;--paper:#15181c;
--wash:#1d2127}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:.6rem 0}
h2{font-size:1.25rem;margin:2.4rem 0 .5rem;padding-top:.8rem;border-top:2px solid var(--rule)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
nav a{display:inline-block;margin:0 .9rem .3rem 0}a{color:#0a84c6}
.note,.meta{color:var(--soft);font-size:.88rem;margin:.3rem 0}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.92rem}
th,td{padding:.3rem .7rem;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--soft);white-space:nowrap}
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
.row{display:flex;flex-wrap:wrap;gap:.5rem 1.1rem;padding:.9rem 0;
border-bottom:1px solid var(--rule)}
.pictures{display:flex;flex-wrap:wrap;gap:.6rem;flex:none;max-width:100%}
figure{margin:0}figcaption{font-size:.78rem;color:var(--soft);text-align:center}
figure img{display:block;height:auto;max-width:min(44vw,16rem);border-radius:4px}
img.pixels{image-rendering:pixelated}
@media(max-width:40rem){.pictures{gap:.4rem;flex-wrap:nowrap;width:100%}
figure{flex:1 1 0;min-width:0}figure img{width:100%}th,td{padding:.3rem .4rem}}
.words{flex:1 1 18rem;min-width:min(100%,16rem)}.words p{margin:0 0 .5rem}
.words b{display:block;font-size:.78rem;font-weight:600;color:var(--soft)}
"""


def render(title: str, parts: Sequence[dict[str, Any]]) -> str:
    """Returns the page of a report's sections, as `Report.write` stores them."""
    links = "".join(f"<a href='#s{i}'>{escape(part['name'])}</a>" for i, part in enumerate(parts))
    sections = "".join(_section(i, part) for i, part in enumerate(parts))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><nav>{links}</nav>{sections}</body></html>\n"
    )


def _section(index: int, part: dict[str, Any]) -> str:
    blocks = [f"<section><h2 id='s{index}'>{escape(part['name'])}</h2>"]
    blocks.append(f"<p class='meta'>Written {escape(part['written'])}</p>")
    if part["provenance"]:
        blocks.append(_details("How this was made", part["provenance"]))
    if part["metrics"]:
        blocks.append(_metrics(part["metrics"]))
    blocks += [_block(title, draw(plot, title), plot) for title, plot in part["plots"].items()]
    blocks += [_block(title, _table(table), table) for title, table in part["tables"].items()]
    for title, gallery in part["galleries"].items():
        rows = "".join(_row(row) for row in gallery["rows"])
        blocks.append(_block(title, rows, gallery))
    return "".join(blocks) + "</section>"


def _block(title: str, body: str, item: dict[str, Any]) -> str:
    note = f"<p class='note'>{escape(item['note'])}</p>" if item["note"] else ""
    return f"<h3>{escape(title)}</h3>{body}{note}"


def _details(summary: str, facts: Any) -> str:
    text = escape(json.dumps(facts, indent=2, ensure_ascii=False))
    return f"<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>"


def number_text(value: float | None) -> str:
    """Returns a number with four significant digits, an int whole."""
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.4g}".removesuffix(".")


def _metrics(metrics: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, entry in metrics.items():
        interval = ""
        if entry["interval"] is not None:
            low, high = (number_text(end) for end in entry["interval"])
            level = "" if entry["level"] == 0.95 else f" ({entry['level']:.0%})"
            interval = f"{low} to {high}{level}"
        seed = "" if entry["seed"] is None else str(entry["seed"])
        rows.append(
            f"<tr><td>{escape(name)}</td><td class='num'><strong>{number_text(entry['value'])}"
            f"</strong></td><td class='num'>{interval}</td><td class='num'>"
            f"{number_text(entry['n'])}</td><td class='num'>{escape(seed)}</td></tr>"
        )
    head = "".join(
        f"<th{' class=num' if i else ''}>{text}</th>"
        for i, text in enumerate(("metric", "value", "95 % interval", "n", "seed"))
    )
    settings = {name: entry["settings"] for name, entry in metrics.items() if entry["settings"]}
    # Most sections have one set of settings; say it once.
    distinct = list({json.dumps(s, sort_keys=True): s for s in settings.values()}.values())
    shown = distinct[0] if len(distinct) == 1 and len(settings) == len(metrics) else settings
    return (
        f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div>" + (_details("Settings", shown) if settings else "")
    )


def _table(table: dict[str, Any]) -> str:
    numeric = [
        bool(table["rows"])
        and all(isinstance(row[i], int | float) or row[i] is None for row in table["rows"])
        for i in range(len(table["columns"]))
    ]

    def cell(value: Any, is_number: bool, tag: str = "td") -> str:
        text = "" if value is None else number_text(value)
        return f"<{tag}{' class=num' if is_number else ''}>{escape(text)}</{tag}>"

    head = "".join(cell(c, n, "th") for c, n in zip(table["columns"], numeric, strict=True))
    rows = "".join(
        "<tr>" + "".join(cell(c, n) for c, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in table["rows"]
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class='wide'><table>{body}</table></div>"


def _row(row: dict[str, Any]) -> str:
    figures = "".join(_figure(name, image) for name, image in row["images"].items())
    words = "".join(
        f"<p><b>{label}</b>{escape(row[key])}</p>"
        for label, key in (("caption", "caption"), ("reference", "reference"), ("note", "note"))
        if row[key] is not None
    )
    name = "" if row["id"] is None else f"<p class='meta'>{escape(str(row['id']))}</p>"
    return (
        f"<div class='row'><div class='pictures'>{figures}</div>"
        f"<div class='words'>{name}{words}</div></div>"
    )


def _figure(name: str, image: dict[str, Any]) -> str:
    width, style = image["width"], ""
    if max(width, image["height"]) <= 128:
        width, style = round(_SHOWN * width / max(width, image["height"])), " class='pixels'"
    return (
        f"<figure><img{style} src='{escape(image['uri'], quote=True)}' width='{width}' "
        f"alt='{escape(name, quote=True)}' loading='lazy'>"
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )
