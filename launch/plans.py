"""`python -m launch.plans`: renews the plans in docs/plans that are stale, and their table.

    python -m launch.plans [--only NAME,...]     compiles what is stale; needs libtpu
    python -m launch.plans --check               lowers every job; fails if a plan is stale

A plan is stale where the program that it was made of is no longer the one that the code lowers.
To see that, nothing is compiled and libtpu is not needed.
"""

import os
import pathlib

from absl import app, flags, logging

from launch.topology import parse_topology, prepare_environment

prepare_environment()

_CHECK = flags.DEFINE_bool("check", False, "Compile nothing; fail if a plan is stale.")
_ONLY = flags.DEFINE_list("only", [], "Names of plans; all by default.")
_TABLE = flags.DEFINE_bool("table", True, "Also writes the table in docs/plans.md.")
_ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    """Renews or checks; a user's mistake ends with one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # jax tells that it finds no TPU
    os.chdir(_ROOT)
    import jax

    from launch.errors import PlanError
    from launch.planned import ROWS, row_named

    most = max(parse_topology(row.topology, row.slices).num_chips for row in ROWS)
    jax.config.update("jax_num_cpu_devices", most)
    try:
        rows = [row_named(name) for name in _ONLY.value] or list(ROWS)
        stale = _check(rows) if _CHECK.value else _renew(rows)
    except (PlanError, KeyError) as error:
        raise SystemExit(f"error: {error}") from error
    if stale:
        raise SystemExit(f"{len(stale)} of {len(rows)} plans are stale; renew them with: make plan")


def _check(rows) -> list[str]:
    from launch.stored import lowered_here, read_record, why_stale

    stale = []
    for row in rows:
        reason = why_stale(row, read_record(row), lowered_here(row))
        print(f"{row.name}: {f'stale, {reason}' if reason else 'as the code is'}", flush=True)
        stale += [row.name] if reason else []
    _write_table(stale)
    return stale


def _renew(rows) -> list[str]:
    """Compiles what is stale; returns nothing that is left."""
    import jax

    from launch.planning import make_plan
    from launch.stored import lowered_here, read_record, record_of, why_stale, write_record

    for row in rows:
        fingerprint = lowered_here(row)
        reason = why_stale(row, read_record(row), fingerprint)
        if reason:
            print(f"{row.name}: {reason}; compiling", flush=True)
            topology = parse_topology(row.topology, row.slices)
            plan = make_plan(row.open(), topology, config=row.config_text)
            write_record(row, record_of(row, plan.to_json(), fingerprint))
        print(f"{row.name}: as the code is", flush=True)
        _write_table([])
        jax.clear_caches()
    return []


def _write_table(stale: list[str]) -> None:
    if not _TABLE.value:
        return
    from launch.planned import ROWS
    from launch.stored import DOCUMENT, read_record, table, with_table

    records = {row.name: found for row in ROWS if (found := read_record(row))}
    old = DOCUMENT.read_text(encoding="utf-8")
    new = with_table(old, table(ROWS, records, stale))
    if new != old:
        DOCUMENT.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
