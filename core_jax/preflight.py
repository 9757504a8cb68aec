"""Before a run of several processes does anything: do all of them run the same thing?

Different code or a different config in one process does not fail by itself. It hangs, because its
collectives differ, or trains something that nobody asked for.
"""

import collections
import dataclasses
import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from core_jax.code_version import SOURCES_VARIABLE, code_version, difference_from_launch
from core_jax.distributed import AllStop, host_names
from core_jax.train.run_record import versions

HOST = "host"  # the one fact that may differ
PROBLEM = "problem"
_SHOWN = 12


class PreflightError(AllStop):
    """The processes do not agree; the message names the odd ones and what differs."""


def check(experiment: Any, *, problem: str = "", extra: Mapping[str, str] | None = None) -> None:
    """Stops all processes unless they agree; alone, only a problem of its own stops this one.

    Args:
      experiment: the typed config, or None for a command without one.
      problem: what is wrong in this process already; it is told to all.
      extra: more facts, such as the working directory.

    Raises:
      PreflightError: see `check_agreement`.
    """
    # Asking for the number of processes would start the backend of a process that is alone.
    if jax.distributed.is_initialized():
        check_agreement(collect_facts(experiment, problem=problem, extra=extra))
    elif problem := problem or _not_launched():
        raise PreflightError(problem)


def collect_facts(
    experiment: Any, *, problem: str = "", extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What the processes must agree on; for the arguments see `check`."""
    code = code_version()
    facts = {
        HOST: socket.gethostname(),
        PROBLEM: problem or _not_launched(),
        "code version": code.commit or code.release,
        "source files": code.sources,
        **{f"version of {name}": version for name, version in versions().items()},
        **(extra or {}),
    }
    if dataclasses.is_dataclass(experiment) and not isinstance(experiment, type):
        facts |= _flat("config", dataclasses.asdict(experiment))
    return facts


def _not_launched() -> str:
    if SOURCES_VARIABLE not in os.environ:
        return ""
    return difference_from_launch(code_version(), os.environ)


def _flat(path: str, value: Any) -> dict[str, str]:
    """Config values by their dotted names; the mesh is among them, as config.run.mesh.*."""
    if isinstance(value, Mapping) and value:
        return {
            name: text
            for key, inner in value.items()
            for name, text in _flat(f"{path}.{key}", inner).items()
        }
    return {path: json.dumps(value, sort_keys=True, default=str)}


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compares the facts of all processes; every one of them calls it.

    Hashes are compared first; only where they differ is everything exchanged, to say what.

    Raises:
      PreflightError: on every process, with the same message.
    """
    _check_devices()
    if text := disagreement(exchange(facts)):
        raise PreflightError(text)


def disagreement(everyone: Sequence[Mapping[str, str]]) -> str:
    """The odd processes and what is odd about them; empty where all agree and none has a problem.

    Where no value has the majority, the one of the lowest process counts as the rule.
    """
    hosts = [facts.get(HOST, "?") for facts in everyone]
    differing: dict[int, list[str]] = {}
    names = sorted({name for facts in everyone for name in facts} - {HOST})
    for name in names:
        values = [facts.get(name, "absent") for facts in everyone]
        rule = collections.Counter(values).most_common(1)[0][0]
        for index, value in enumerate(values):
            if value != rule:
                told = f"{name}: {value or 'none'}, elsewhere {rule or 'none'}"
                differing.setdefault(index, []).append(told)
    if not differing:
        return everyone[0].get(PROBLEM, "")
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, told in differing.items():
        groups.setdefault(tuple(told), []).append(index)
    lines = [f"the {len(everyone)} processes do not agree, so nothing was run"]
    for told, indices in groups.items():
        lines.append(f"{host_names(indices, hosts)} differs from the rest:")
        lines.extend(f"  {text}" for text in told[:_SHOWN])
        if len(told) > _SHOWN:
            lines.append(f"  and {len(told) - _SHOWN} more")
    lines.append("Start all of them with the same code, packages, config and flags")
    return "\n".join(lines)


def _check_devices() -> None:
    """Every process sees all devices, so this needs no exchange; the gather relies on it."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    everyone = [
        {HOST: f"{counts[i]} devices", "devices": str(counts[i])}
        for i in range(jax.process_count())
    ]
    if text := disagreement(everyone):
        raise PreflightError(text)


def exchange(facts: Mapping[str, str]) -> list[dict[str, str]]:
    """The facts of all processes, in their order; only the own ones where all agree but for HOST.

    Every process calls it.
    """
    from jax.experimental import multihost_utils

    body = json.dumps(dict(facts), sort_keys=True).encode()
    same = {name: value for name, value in facts.items() if name != HOST}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).digest()
    # The last four bytes are the length of what is exchanged if the hashes differ.
    head = np.frombuffer(digest + len(body).to_bytes(4, "big"), np.uint8)
    heads = np.asarray(multihost_utils.process_allgather(head)).reshape(-1, len(head))
    if (heads[:, :32] == heads[0, :32]).all():
        return [dict(facts)]
    lengths = [int.from_bytes(row[32:].tobytes(), "big") for row in heads]
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(body)] = np.frombuffer(body, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
