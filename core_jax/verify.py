"""A hub directory here and in PyTorch, on the same input.

    python -m core_jax.verify DIR [--json] [--tolerance 1e-4] [--seed 0] [--reference DIR]

Every network of the directory that this project reads is loaded twice, by `load_model` and by
transformers or diffusers, and fed the same seeded input in float32. A line is printed for each
output: max|a - b| and max|a - b| / max|b|. PyTorch is needed for this command only.

Exit status: 0 if every output is within the tolerance, 1 if one is not, 2 if something could not
be compared (not supported here, not readable, or PyTorch is missing).
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.convert.rules import WeightsError
from core_jax.convert.safetensors_io import CheckpointFormatError, TensorReader
from core_jax.models.auto import UnknownModelError, load_config, load_model, save_model
from core_jax.pytorch_twins import TWINS, NotComparableError, require_torch

PASSED, DIFFERENT, NOT_COMPARED = 0, 1, 2
TOLERANCE = 1e-4

@dataclasses.dataclass(frozen=True)
class Difference:
    """One output of one network.

    Attributes:
      component: the pipeline's sub-folder; empty for a model directory.
      output: which output.
      shape: its shape, channels last.
      absolute: max|a - b|; NaN where either side is not finite.
      relative: max|a - b| / max|b|; NaN where PyTorch's output is zero, which proves nothing.
      passed: the relative difference is within the tolerance.
    """

    component: str
    output: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    passed: bool

    def line(self) -> str:
        """For people."""
        name = f"{self.component}/{self.output}" if self.component else self.output
        verdict = "ok" if self.passed else "DIFFERENT"
        return (
            f"{name:32} {'x'.join(map(str, self.shape)):>16}  absolute {self.absolute:.2e}  "
            f"relative {self.relative:.2e}  {verdict}"
        )


def compare(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    tolerance: float,
    component: str = "",
) -> list[Difference]:
    """Measures every output.

    Args:
      ours: output name -> array.
      theirs: the same names and shapes, from PyTorch.
      tolerance: of the relative difference.
      component: for the report.
    """
    found = []
    for name, b in theirs.items():
        a = np.asarray(ours[name], np.float64)
        b = np.asarray(b, np.float64)
        if a.shape != b.shape:
            raise ValueError(f"{name}: shape {a.shape} here, {b.shape} in PyTorch")
        absolute = float(np.abs(a - b).max())
        scale = float(np.abs(b).max())
        relative = absolute / scale if scale > 0 else math.nan
        found.append(
            Difference(component, name, a.shape, absolute, relative, bool(relative <= tolerance))
        )
    return found


def verify_model(
    path: pathlib.Path,
    *,
    reference: pathlib.Path | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    component: str = "",
) -> list[Difference]:
    """Compares one model directory.

    Args:
      path: what `load_model` reads.
      reference: what PyTorch reads; `path` if None.
      tolerance: of the relative difference.
      seed: of the input.
      component: for the report.

    Raises:
      NotComparableError: see the class.
      UnknownModelError, WeightsError, CheckpointFormatError, FileNotFoundError, ValueError: as
        `load_model`.
    """
    family, _ = load_config(path)
    twin = TWINS.get(family.name)
    if twin is None:
        raise NotComparableError(
            f"{family.name} has no comparison with PyTorch yet; there is one for "
            f"{', '.join(sorted(TWINS))}"
        )
    require_torch()
    # TPUs and GPUs multiply in less than float32 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        model, params = load_model(path, dtype=jnp.float32)
        inputs = twin.inputs(model.config, np.random.default_rng(seed))
        ours = {k: np.asarray(v) for k, v in twin.ours(model, params, inputs).items()}
    reference = path if reference is None else reference
    if family.name == "florence2" and _is_remote_code_layout(reference):
        with tempfile.TemporaryDirectory() as scratch:
            save_model(scratch, *load_model(reference))
            theirs = twin.theirs(pathlib.Path(scratch), inputs)
    else:
        theirs = twin.theirs(reference, inputs)
    return compare(ours, theirs, tolerance, component)


def _is_remote_code_layout(path: pathlib.Path) -> bool:
    """Whether Florence-2's tensors have microsoft's names.

    transformers leaves such weights random without an error, so they are rewritten first.
    """
    return any(name.startswith("vision_tower.") for name in TensorReader(path).shapes)


def _components(path: pathlib.Path) -> list[str]:
    """Sub-folders of a pipeline that say what they are; [""] for a model directory.

    Raises:
      FileNotFoundError: `path` is neither.
    """
    if (path / "config.json").is_file():
        return [""]
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{path} has neither config.json nor model_index.json; is it a hub directory?"
        )
    parts = json.loads(index.read_text())
    return [k for k, v in parts.items() if isinstance(v, list) and v[-1] is not None]


@dataclasses.dataclass
class Report:
    """What `verify` found.

    Attributes:
      differences: one an output.
      not_supported: sub-folders of a pipeline that hold no network of ours, and why.
      errors: what could not be compared, and why.
    """

    differences: list[Difference] = dataclasses.field(default_factory=list)
    not_supported: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status."""
        if any(not d.passed for d in self.differences):
            return DIFFERENT
        return PASSED if self.differences and not self.errors else NOT_COMPARED


def verify(
    path: pathlib.Path,
    *,
    reference: pathlib.Path | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Report:
    """Compares a model directory, or every network of a diffusers pipeline; never raises for them.

    Args:
      path: what this project reads.
      reference: what PyTorch reads; the same directory if None.
      tolerance: of the relative difference.
      seed: of the inputs.
    """
    report = Report()
    try:
        components = _components(path)
    except (FileNotFoundError, ValueError) as error:
        report.errors.append(str(error))
        return report
    for name in components:
        part = path / name
        if name and not (part / "config.json").is_file():
            report.not_supported.append(f"{name}: not a network (no config.json)")
            continue
        try:
            report.differences += verify_model(
                part,
                reference=None if reference is None else reference / name,
                tolerance=tolerance, seed=seed, component=name,
            )  # fmt: skip
        except UnknownModelError as error:
            # A pipeline may hold more than we read; a model directory that we don't is an error.
            (report.not_supported if name else report.errors).append(str(error))
        except (NotComparableError, CheckpointFormatError, WeightsError, OSError, ValueError) as e:
            report.errors.append(f"{name}: {e}" if name else str(e))
    return report


def _as_json(report: Report, arguments: argparse.Namespace) -> str:
    def finite(x):
        return x if not isinstance(x, float) or math.isfinite(x) else None  # NaN is not JSON

    return json.dumps(
        {
            "directory": str(arguments.directory),
            "reference": str(arguments.reference or arguments.directory),
            "tolerance": arguments.tolerance,
            "seed": arguments.seed,
            "passed": report.status == PASSED,
            "outputs": [
                {k: finite(v) for k, v in dataclasses.asdict(d).items()}
                for d in report.differences
            ],
            "not_supported": report.not_supported,
            "errors": report.errors,
        },
        indent=2,
    )


def _print(report: Report) -> None:
    for difference in report.differences:
        print(difference.line())
    for text in report.not_supported:
        print(f"not compared: {text}")
    for text in report.errors:
        print(f"error: {text}", file=sys.stderr)
    verdicts = {PASSED: "every output is within the tolerance", DIFFERENT: "outputs differ",
                NOT_COMPARED: "not everything could be compared"}  # fmt: skip
    print(verdicts[report.status])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m core_jax.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=pathlib.Path, help="a model or diffusers pipeline")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative difference")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument(
        "--reference", type=pathlib.Path,
        help="let PyTorch read this directory instead, such as the original of an export",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    report = verify(
        arguments.directory,
        reference=arguments.reference,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
    )
    if arguments.json:
        print(_as_json(report, arguments))
    else:
        _print(report)
    return report.status


if __name__ == "__main__":
    sys.exit(main())
