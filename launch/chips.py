"""One table of accelerators: what a chip computes, holds, and moves.

TPU rows are Google's public pages, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; GPU rows are
NVIDIA's data sheets of the SXM modules. Interconnect: those pages count both directions of all
links of a chip (v5e 400, v5p 1200, v6e 800 GB/s; v4 2400 Gbit/s, one direction); here it is one
direction of all links, which is what a chip can receive. A collective over one mesh axis rarely
uses all links, so times from it are lower bounds.
"""

import dataclasses

from core_jax.train.hardware import PEAK_BF16_FLOPS

GiB = 2**30
_PEAK = dict(PEAK_BF16_FLOPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as a topology names it.
      peak_flops: dense bf16 FLOP/s.
      hbm_bytes: of the data sheet.
      usable_bytes: that libtpu 0.0.42.1 lets a program have, by its own out-of-memory message;
        None where none has been seen.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s received, all links together. NVLink on GPUs.
      dcn_bandwidth: bytes/s received between slices, a chip's share of its host's network.
      is_tpu: whether libtpu compiles for it.
    """

    name: str
    peak_flops: float
    hbm_bytes: float
    usable_bytes: float | None
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    is_tpu: bool = True

    @property
    def limit(self) -> float:
        """What a program may use."""
        return self.hbm_bytes if self.usable_bytes is None else self.usable_bytes


CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    Chip(
        name="v4", peak_flops=_PEAK["tpu v4"], hbm_bytes=32 * GiB, usable_bytes=None,
        hbm_bandwidth=1.2e12, ici_bandwidth=300e9,
        dcn_bandwidth=3.125e9,  # not published a chip; taken as v5e's
    ),
    Chip(
        name="v5e", peak_flops=_PEAK["tpu v5e"], hbm_bytes=16 * GiB, usable_bytes=15.75 * GiB,
        hbm_bandwidth=819e9, ici_bandwidth=200e9,
        dcn_bandwidth=3.125e9,  # 2 x 100 Gbit/s a host of 8
    ),
    Chip(
        name="v5p", peak_flops=_PEAK["tpu v5p"], hbm_bytes=95 * GiB, usable_bytes=95.74 * GiB,
        hbm_bandwidth=2765e9, ici_bandwidth=600e9, dcn_bandwidth=6.25e9,  # 50 Gbit/s a chip
    ),
    Chip(
        name="v6e", peak_flops=_PEAK["tpu v6"], hbm_bytes=32 * GiB, usable_bytes=31.25 * GiB,
        hbm_bandwidth=1638e9, ici_bandwidth=400e9,
        dcn_bandwidth=3.125e9,  # not published a chip; taken as v5e's
    ),
    # NVIDIA: A100 80GB SXM, H100 SXM, H200 SXM; NVLink 600, 900, 900 GB/s in both directions.
    Chip(
        name="a100", peak_flops=_PEAK["a100"], hbm_bytes=80e9, usable_bytes=None,
        hbm_bandwidth=2039e9, ici_bandwidth=300e9, dcn_bandwidth=25e9, is_tpu=False,
    ),
    Chip(
        name="h100", peak_flops=_PEAK["h100"], hbm_bytes=80e9, usable_bytes=None,
        hbm_bandwidth=3350e9, ici_bandwidth=450e9, dcn_bandwidth=50e9, is_tpu=False,
    ),
    Chip(
        name="h200", peak_flops=_PEAK["h200"], hbm_bytes=141e9, usable_bytes=None,
        hbm_bandwidth=4800e9, ici_bandwidth=450e9, dcn_bandwidth=50e9, is_tpu=False,
    ),
)}  # fmt: skip
