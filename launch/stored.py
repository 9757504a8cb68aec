"""Plans that are kept: what of a plan goes into docs/plans/*.json, and the table made of it."""

import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from core_jax.evaluation.document import replace_part
from launch.chips import CHIPS
from launch.compiling import lower_job
from launch.planned import PlannedRow
from launch.topology import parse_topology

FORMAT = 1
FOLDER = pathlib.Path("docs/plans")
DOCUMENT = pathlib.Path("docs/plans.md")
BEGIN, END = "<!-- plans: made by `make plan` -->", "<!-- plans end -->"
_COLLECTIVE = ("kind", "axes", "group_size", "crosses_slices", "count", "bytes", "wire_bytes")

Record = Mapping[str, Any]


def record_of(row: PlannedRow, plan: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """What is kept.

    Args:
      row: the job.
      plan: `Plan.to_json()` of it.
      fingerprint: `lowered_here` of it.
    """
    compiled, memory = plan["compiled"], plan["memory"]
    cost = compiled["cost"]
    found: dict[str, Any] = {
        "format": FORMAT, "name": row.name, "command": row.command,
        "fingerprint": fingerprint,
        "versions": plan["versions"], "effort": plan["effort"],
        "job": plan["job"], "topology": plan["topology"], "slices": plan["slices"],
        "num_chips": plan["num_chips"], "mesh": plan["mesh"], "batch_size": plan["batch_size"],
        "fits": plan["fits"], "memory": {k: v for k, v in memory.items() if v},
        "replicated_optimizer": plan["lowered"]["replicated_optimizer"],
        "flops": {
            "model": plan["model_flops"] / plan["num_chips"],
            "traced": plan["lowered"]["traced_flops"] / plan["num_chips"],
            "compiled": cost and cost["flops"],
        },
        "hbm_bytes": cost and cost["hbm_bytes"],
        "collectives": [{k: c[k] for k in _COLLECTIVE} for c in compiled["collectives"]],
        "roofline": plan["roofline"],
        "rates": plan["run"] and plan["run"]["rates"],
        "compile_seconds": round(compiled["seconds"]),
    }  # fmt: skip
    for name in ("prompt", "prompt_memory"):
        if plan.get(name):
            found[name] = plan[name]
    return found


def record_file(row: PlannedRow, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """Where a record lies."""
    return folder / f"{row.name}.json"


def read_record(row: PlannedRow, folder: pathlib.Path = FOLDER) -> dict[str, Any] | None:
    """The record of a row; None if there is none."""
    file = record_file(row, folder)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write_record(row: PlannedRow, record: Record, folder: pathlib.Path = FOLDER) -> None:
    """Writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    record_file(row, folder).write_text(text, encoding="utf-8")


def lowered_here(row: PlannedRow) -> str:
    """Fingerprint of a row's program as the code is now; needs CPU devices alone, as many as chips.

    Lowered for a topology the kernels would be written in the version of the libtpu that is there,
    so a plan's own fingerprint is no measure of the code.

    Raises:
      PlanError: mesh or batch do not go with the topology.
      RuntimeError: jax was started with too few devices.
    """
    topology = parse_topology(row.topology, row.slices)
    devices = jax.devices("cpu")
    if len(devices) < topology.num_chips:
        raise RuntimeError(
            f"{row.name} has {topology.num_chips} chips and jax {len(devices)} CPU devices; start "
            "it with as many (jax_num_cpu_devices)"
        )
    chosen = devices[: topology.num_chips]
    return lower_job(row.open(), chosen, CHIPS[topology.chip.name], platform="tpu").fingerprint


def why_stale(row: PlannedRow, record: Record | None, fingerprint: str) -> str:
    """What is wrong with a record; empty if it is what the code would give.

    Args:
      row: the job.
      record: what is kept.
      fingerprint: of the program as the code is now.
    """
    if record is None:
        return "no plan has been made"
    if record["format"] != FORMAT or record["command"] != row.command:
        return f"it was made with: {record['command']}"
    if record["versions"]["jax"] != jax.__version__:
        return f"it was made with jax {record['versions']['jax']}, this is {jax.__version__}"
    if record["fingerprint"] != fingerprint:
        return f"the program is {fingerprint[:12]} now, it was {record['fingerprint'][:12]}"
    return ""


def table(
    rows: Sequence[PlannedRow], records: Mapping[str, Record], stale: Collection[str] = ()
) -> str:
    """All plans, in Markdown.

    Args:
      rows: in order.
      records: by name.
      stale: names of those that are not what the code would give.
    """
    heads = ("plan", "chips", "batch a chip", "needs of limit, GiB", "TFLOP", "main memory, GB",
             "received, GB", "least time", "bound by", "rate, at most", "command")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        record = records.get(row.name)
        cells = _cells(record) if record else ["not made"] + [""] * (len(heads) - 3)
        cells.append(f"`{row.command}`")
        mark = " **stale**" if row.name in stale else ""
        lines.append(f"| [{row.name}](plans/{row.name}.json){mark} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(record: Record) -> list[str]:
    memory, line = record["memory"], record["roofline"]
    needs = max(memory["total"], record.get("prompt_memory", {}).get("total", 0))
    slices = f" x {record['slices']} slices" if record["slices"] > 1 else ""
    where = f"{record['topology']}{slices}"
    room = f"{needs / 2**30:.1f} of {memory['limit'] / 2**30:.2f}"
    each = f"{record['batch_size'] / record['num_chips']:g}"
    if line is None:
        return [where, each, f"**does not fit**: {room}", *[""] * 6]
    wire = sum(c["wire_bytes"] for c in record["collectives"])
    time = _time(line["seconds"])
    if "prompt" in record:
        time = f"prompt {_time(record['prompt']['seconds'])}, round {time}"
    rates = ", ".join(f"{rate:,.4g} {name}/s" for name, rate in list(record["rates"].items())[:1])
    return [
        where, each, room, f"{record['flops']['compiled'] / 1e12:.3g}",
        f"{record['hbm_bytes'] / 1e9:.3g}", f"{wire / 1e9:.3g}", time, line["bound"], rates,
    ]  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def with_table(document: str, content: str) -> str:
    """The document with the table in its place.

    Raises:
      ValueError: it has no place for one.
    """
    return replace_part(document, BEGIN, END, content)
