"""The least time a step can take on a chip: compute, main memory or interconnect."""

import dataclasses
from collections.abc import Sequence

from launch.chips import Chip
from launch.collectives import Collective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a step if one thing alone set its pace; they overlap at best.

    Attributes:
      compute: products and convolutions at the peak rate.
      hbm: traffic of the main memory.
      ici: collectives inside a slice, all links busy.
      dcn: collectives between slices.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """Which one that is."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(
    chip: Chip, *, flops: float, hbm_bytes: float, collectives: Sequence[Collective] = ()
) -> Roofline:
    """Of one device's work in a step.

    Args:
      chip: the accelerator.
      flops: operations.
      hbm_bytes: read and written.
      collectives: what it takes part in.
    """
    ici = sum(c.wire_bytes for c in collectives if not c.crosses_slices)
    dcn = sum(c.wire_bytes for c in collectives if c.crosses_slices)
    return Roofline(
        compute=flops / chip.peak_flops,
        hbm=hbm_bytes / chip.hbm_bandwidth,
        ici=ici / chip.ici_bandwidth,
        dcn=dcn / chip.dcn_bandwidth,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run at a step's least time.

    Attributes:
      seconds: of a step.
      rates: units a second, such as {"images": 1000.0}.
      hours: of all steps.
      chip_hours: the same on all chips.
      price: of the run; None where no price was given.
    """

    seconds: float
    rates: dict[str, float]
    hours: float
    chip_hours: float
    price: float | None


def run_of(
    seconds: float, *, steps: int, units: dict[str, int], num_chips: int,
    price_per_chip_hour: float | None,
) -> Run:  # fmt: skip
    """What a run takes.

    Args:
      seconds: of a step.
      steps: of the run.
      units: handled in a step, by name.
      num_chips: in all slices.
      price_per_chip_hour: in any currency.
    """
    hours = steps * seconds / 3600
    price = None if price_per_chip_hour is None else hours * num_chips * price_per_chip_hour
    rates = {name: count / seconds for name, count in units.items()}
    return Run(seconds=seconds, rates=rates, hours=hours, chip_hours=hours * num_chips, price=price)
