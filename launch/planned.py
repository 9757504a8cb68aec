"""The jobs whose plans are kept in docs/plans, as data.

A name is the file's. Topologies are the smallest common ones that hold a job, or those of the
papers' scale; decoding and caching are planned for one host, since each host works for itself.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from launch.jobs import PlannedJob, job_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A job on a topology.

    Attributes:
      name: of the plan.
      config: file in configs/, without .py.
      variant: of the config.
      topology: of a slice.
      slices: how many.
      job: see `job_of`.
      changes: config values, by path.
    """

    name: str
    config: str
    variant: str = ""
    topology: str
    slices: int = 1
    job: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def open(self) -> PlannedJob:
        """The job, of its config file."""
        config = importlib.import_module(f"configs.{self.config}").get_config(self.variant)
        config.update_from_flattened_dict(dict(self.changes))
        return job_of(config.to_dict(), self.job)

    @property
    def config_text(self) -> str:
        """Config and changes as they are typed."""
        variant = f":{self.variant}" if self.variant else ""
        changes = "".join(f" --config.{path}={value}" for path, value in self.changes.items())
        return f"configs/{self.config}.py{variant}{changes}"

    @property
    def command(self) -> str:
        """That makes this plan."""
        parts = [f"python -m launch.plan --config {self.config_text} --topology {self.topology}"]
        if self.slices > 1:
            parts.append(f"--slices {self.slices}")
        if self.job:
            parts.append(f"--job {self.job}")
        return " ".join(parts)


# Towers and caches of these targets: one host of four v5e chips (63 GiB) or v6e chips (125 GiB).
_HOSTS = {
    "qwen2_5_vl_7b": "v5e:2x2",
    "qwen2_5_vl_32b": "v6e:2x2",
    "gemma3_12b": "v5e:2x2",
    "gemma3_27b": "v6e:2x2",
}
# TPU's fused attention, which a config has to name: its kernels run nowhere else.
_FUSED = {"model.execution.attention": "splash"}

ROWS: tuple[PlannedRow, ...] = (
    PlannedRow(
        name="vlv_stage1_v5e", config="vlv_stage1", topology="v5e:16x16", changes=_FUSED
    ),
    PlannedRow(
        name="vlv_stage1_v5p_two_slices", config="vlv_stage1", topology="v5p:4x4x4", slices=2,
        changes={"run.mesh.data": 2, **_FUSED},
    ),
    PlannedRow(
        name="vlv_stage2_1.5b", config="vlv_stage2", variant="1.5b", topology="v5e:4x4",
        changes=_FUSED,
    ),
    PlannedRow(
        name="vlv_stage2_3b", config="vlv_stage2", variant="3b", topology="v5e:4x4",
        changes=_FUSED,
    ),
    PlannedRow(
        name="vlv_cache", config="vlv_stage1", topology="v5e:2x2", job="cache", changes=_FUSED
    ),
    *(
        PlannedRow(
            name=f"{config}_{variant}", config=config, variant=variant, topology="v5e:8x8",
            changes=_FUSED,
        )
        for config in ("massv_phase1", "massv_phase2")
        for variant in _HOSTS
    ),
    *(
        PlannedRow(
            name=f"{config}_{variant}", config=config, variant=variant, topology=host,
            changes=_FUSED,
        )
        for config in ("massv_distill", "massv_eval")
        for variant, host in _HOSTS.items()
    ),
)  # fmt: skip

# Compiled by the tests, in seconds: the miniature's, and a decoder whose layers are one loop.
SMALL: tuple[PlannedRow, ...] = (
    PlannedRow(name="small_stage1", config="vlv_stage1", variant="mini", topology="v5e:2x2"),
    PlannedRow(name="small_stage2", config="vlv_stage2", variant="mini-small", topology="v5e:2x2"),
    PlannedRow(
        name="small_cache", config="vlv_stage1", variant="mini", topology="v5e:2x2", job="cache"
    ),
    PlannedRow(
        name="small_decoding", config="massv_eval", variant="qwen2_5_vl_7b", topology="v5e:2x2",
        changes={"decoding.prompt_lengths": (512,), "data.max_pixels": 256 * 28 * 28},
    ),
)  # fmt: skip


def row_named(name: str) -> PlannedRow:
    """A row by its name.

    Raises:
      KeyError: there is none; the message lists what there is.
    """
    for row in (*ROWS, *SMALL):
        if row.name == name:
            return row
    raise KeyError(f"no plan is named {name!r}; there are {', '.join(r.name for r in ROWS)}")
