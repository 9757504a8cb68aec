"""A plan as tables: for the terminal, and the same as a page."""

import html
from collections.abc import Sequence

from launch.planning import Plan

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, heads, rows


def size_text(count: float) -> str:
    """Bytes for people: 1.50 GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """A time for people."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    if plan.fits is None:
        return "not compiled: arguments, arithmetic and a roofline of these alone"
    if plan.fits:
        return f"fits, {size_text(plan.memory.headroom)} of {size_text(plan.memory.limit)} left"
    assert plan.compiled is not None
    problem = plan.compiled.problem
    assert problem is not None
    return (
        f"DOES NOT FIT: needs {size_text(problem.used)} of {size_text(problem.limit)} "
        f"({size_text(problem.used - problem.limit)} too much)"
    )


def tables(plan: Plan) -> list[Table]:
    """Everything that a plan says."""
    found = [_what(plan), _memory(plan)]
    if plan.compiled is not None and plan.compiled.problem is not None:
        rows = [(size_text(b), shape, name) for b, shape, name in plan.compiled.problem.largest]
        if rows:
            found.append(("Largest temporaries", ("bytes", "shape", "of"), rows[:8]))
    if plan.remedies:
        tried = [(r.flags, size_text(r.needs), "fits" if r.fits else "does not fit")
                 for r in plan.remedies]  # fmt: skip
        found.append(("What would help, compiled", ("change", "needs", ""), tried))
    found.append(_work(plan))
    if plan.compiled is not None and plan.compiled.problem is None:
        found.append(_collectives(plan))
    if plan.roofline is not None:
        found.append(_time(plan))
    if plan.fit is not None:
        found.append(plan.fit.table())
    return found


def _what(plan: Plan) -> Table:
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    slices = f" x {plan.slices} slices" if plan.slices > 1 else ""
    rows = [
        ("config", plan.config),
        ("devices", f"{plan.topology}{slices}, {plan.num_chips} chips"),
        ("mesh", mesh),
        ("batch", f"{plan.batch_size}, {plan.batch_size / plan.num_chips:g} a device"),
        ("program", plan.lowered.fingerprint[:16]),
        *(("layout", problem) for problem in plan.layout),
        ("made with", ", ".join(f"{k} {v}" for k, v in plan.versions.items() if v)),
    ]
    if plan.compiled is not None:
        rows.append(("took", f"{plan.lowered.seconds:.0f} s to lower, "
                             f"{plan.compiled.seconds:.0f} s to compile ({plan.effort} effort)"))
    return (f"{plan.job}: {verdict(plan)}", ("", ""), rows)


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    parts = {
        "frozen weights": memory.frozen, "trained weights (float32)": memory.trained,
        "optimizer": memory.optimizer, "moving average": memory.ema,
        "keys, values, answers": memory.cache, "batch": memory.batch,
        "padding of layouts": memory.padding, "activations, temporaries": memory.temporaries,
        "other outputs": memory.outputs, "program": memory.code,
    }  # fmt: skip
    rows = [(name, size_text(b), f"{100 * b / memory.limit:.1f} %")
            for name, b in parts.items() if b]  # fmt: skip
    if plan.compiled is not None:
        rows.append(("headroom", size_text(memory.headroom),
                     f"{100 * memory.headroom / memory.limit:.1f} %"))  # fmt: skip
    if plan.compiled is not None and plan.compiled.before is not None:
        before = plan.compiled.before.memory
        rows.append(("the prompt's program needs", size_text(before.total),
                     f"{100 * before.total / before.limit:.1f} %"))  # fmt: skip
    if plan.lowered.replicated_optimizer:
        rows.append(("of the optimizer, replicated",
                     size_text(plan.lowered.replicated_optimizer), ""))  # fmt: skip
    return ("Main memory of a device", ("", "bytes", "of the limit"), rows)


def _work(plan: Plan) -> Table:
    per_device = plan.model_flops / plan.num_chips
    rows = [
        ("the model's", f"{per_device / 1e12:.4g}", "products, nothing computed twice"),
        ("the traced program's", f"{plan.lowered.traced_flops / plan.num_chips / 1e12:.4g}",
         f"{plan.lowered.traced_flops / plan.model_flops:.2f} x the model's: rematerialisation"),
    ]  # fmt: skip
    if plan.compiled is not None and plan.compiled.cost is not None:
        cost = plan.compiled.cost
        rows.append(("the compiled program's", f"{cost.flops / 1e12:.4g}",
                     f"{cost.flops / per_device:.2f} x the model's"))  # fmt: skip
        if plan.compiled.compiler_flops:
            rows.append(("the compiler's count", f"{plan.compiled.compiler_flops / 1e12:.4g}",
                         f"loops once; ours so: {cost.flops_once / 1e12:.4g}"))  # fmt: skip
    return ("TFLOP of a step on a device", ("", "TFLOP", ""), rows)


def _collectives(plan: Plan) -> Table:
    assert plan.compiled is not None
    rows = [
        (c.kind, "+".join(c.axes) or "-", str(c.group_size), "DCN" if c.crosses_slices else "ICI",
         str(c.count), size_text(c.bytes), size_text(c.wire_bytes), size_text(c.largest))
        for c in plan.compiled.collectives
    ]  # fmt: skip
    heads = ("kind", "axes", "devices", "over", "a step", "arrays", "received", "largest one")
    return ("Collectives of a step, on a device", heads, rows)


def _time(plan: Plan) -> Table:
    line, run, chip = plan.roofline, plan.run, plan.chip
    assert line is not None
    assert run is not None
    rows = [
        ("compute", seconds_text(line.compute), f"at {chip.peak_flops / 1e12:g} TFLOP/s"),
        ("main memory", seconds_text(line.hbm), f"at {chip.hbm_bandwidth / 1e9:g} GB/s"),
        ("interconnect", seconds_text(line.ici), f"at {chip.ici_bandwidth / 1e9:g} GB/s received"),
    ]
    if line.dcn:
        rows.append(("between slices", seconds_text(line.dcn),
                     f"at {chip.dcn_bandwidth / 1e9:g} GB/s received"))  # fmt: skip
    rows.append(("a step, at least", seconds_text(line.seconds), f"bound by {line.bound}"))
    rows += [(f"{name}/s, at most", f"{rate:,.4g}", "") for name, rate in run.rates.items()]
    if plan.steps:
        rows.append(("the run, at least", f"{run.hours:.3g} h",
                     f"{plan.steps:,} steps, {run.chip_hours:,.4g} chip hours"))  # fmt: skip
    if plan.prompt is not None:
        rows.append(("the prompt before, at least", seconds_text(plan.prompt.seconds),
                     f"bound by {plan.prompt.bound}"))  # fmt: skip
    if run.price is not None:
        rows.append(("price, at least", f"{run.price:,.2f}", ""))
    return ("Time by roofline: a lower bound", ("", "", ""), rows)


def as_text(plan: Plan) -> str:
    """For a terminal."""
    lines = []
    for title, heads, rows in tables(plan):
        lines += ["", title]
        body = [heads, *rows] if any(heads) else rows
        widths = [max(len(str(row[i])) for row in body) for i in range(len(heads))] if body else []
        for row in body:
            cells = (
                str(c).ljust(w) if not i else str(c).rjust(w) if i + 1 < len(row) else str(c)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  " + "  ".join(cells).rstrip())
        if not rows:
            lines.append("  none")
    return "\n".join(lines[1:]) + "\n"


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:0 auto;padding:1rem}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #dde2e8}"
    "h2{font-size:1.1rem;margin:1.8rem 0 .4rem}"
)


def as_html(plan: Plan) -> str:
    """One file, nothing fetched, every text escaped."""
    parts = []
    for title, heads, rows in tables(plan):
        head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
            for row in rows
        )
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>")
    title = html.escape(f"{plan.job} on {plan.topology}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>\n"
    )
