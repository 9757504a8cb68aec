"""Name rules between a checkpoint's tensors and a parameter tree; strict, and two-way.

Our parameter paths echo the hub's names, so most of a map is derived: `a/b_0/c/kernel` is
`a.b.0.c.weight`. A family states what is derived differently, the layouts that other versions
used (`Rename`), the tensors that may be there without being parameters (`ignored`) and those that
repeat another (`aliases`).
"""

import collections
import dataclasses
import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes another."""
    return tuple(sorted(range(len(axes)), key=lambda i: axes[i]))


class Layout(enum.Enum):
    """How a stored tensor relates to ours."""

    SAME = "same"
    LINEAR = "linear"  # [out, in] -> [in, out]
    CONV = "conv"  # OIHW -> HWIO; a depthwise [C, 1, kh, kw] becomes [kh, kw, 1, C]

    def axes(self, rank: int, *, transpose: bool = False) -> tuple[int, ...]:
        """For each of our axes the file's axis that it is: every layout only reorders axes.

        Args:
          rank: of the tensor.
          transpose: the file has the stored orientation transposed (see `Assignment`).
        """
        axes = tuple(range(rank))
        if self is Layout.LINEAR:
            axes = axes[::-1]
        elif self is Layout.CONV:
            axes = (2, 3, 1, 0)
        return tuple(rank - 1 - a for a in axes) if transpose else axes

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Stored orientation -> ours, as a view."""
        return array.transpose(self.axes(array.ndim))

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """Our orientation -> the stored one, as a view."""
        return array.transpose(inverse(self.axes(array.ndim)))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored tensor's shape for one of ours."""
        if self is Layout.LINEAR:
            return shape[::-1]
        return tuple(shape[i] for i in (3, 2, 0, 1)) if self is Layout.CONV else shape


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor and where it goes.

    Attributes:
      name: the canonical stored name.
      path: our parameter path, 'a/b/kernel'.
      layer: index into the leading axis of a stacked parameter, or None.
      layout: orientation.
      shape: the stored shape.
    """

    name: str
    path: str
    layer: int | None
    layout: Layout
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rename:
    """A name of another layout and its canonical form.

    Attributes:
      pattern: regular expression, matched at the start of the name.
      replacement: what `re.sub` puts there.
      transpose: the other layout stores the tensor transposed.
    """

    pattern: str
    replacement: str
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A stack whose layers alternate with those of other stacks.

    Attributes:
      path: the stack's parameter path.
      name: under which its layers are stored, as 'name.{number}.rest'.
      numbers: of its layers.
    """

    path: str
    name: str
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class WeightRules:
    """Everything about a family's tensor names.

    Attributes:
      stacked: parameter paths whose leaves carry a leading layer axis, stored as 'path.{i}.rest'.
      patterns: the same for stacks that hold only some of the layers.
      plain: path components that end in _<digit> and keep the underscore in the stored name.
      rename: stored name -> final stored name, for what the derivation gets wrong.
      layouts: (regex on our path, layout) for leaves whose layout is not what rank suggests.
      legacy: groups of renames; every group is tried as a whole on names not yet canonical.
      ignored: regexes of stored tensors that are buffers, not parameters.
      aliases: (regex, canonical name) of stored tensors that repeat another bit for bit.
      zeros: regexes of stored tensors that are left out because they are zero, which the loader
        verifies.
      buffers: (name, its values) of tensors that are no parameters, but that other readers miss;
        they are written, and ignored when read.
    """

    stacked: tuple[str, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    plain: tuple[str, ...] = ()
    rename: Callable[[str], str] = lambda name: name
    layouts: tuple[tuple[str, Layout], ...] = ()
    legacy: tuple[Rename, ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    zeros: tuple[str, ...] = ()
    buffers: tuple[tuple[str, Callable[[], np.ndarray]], ...] = ()


class WeightsError(ValueError):
    """The tensors of a checkpoint and a model's parameters do not fit; lists every name."""


def derive_entries(
    shapes: Mapping[str, tuple[int, ...]], rules: WeightRules
) -> list[Entry]:
    """Every stored tensor that a parameter tree of these shapes stands for.

    Args:
      shapes: our parameter path -> shape.
      rules: the family's rules.

    Raises:
      ValueError: two parameters would be stored under one name; the rules are wrong.
    """
    patterns = {p.path: p for p in rules.patterns}
    entries = []
    for path, shape in shapes.items():
        prefix = next((p for p in (*rules.stacked, *patterns) if path.startswith(p + "/")), None)
        if prefix is None:
            layout = _layout(path, len(shape), rules)
            name = rules.rename(_stored_name(path, rules))
            entries.append(Entry(name, path, None, layout, layout.stored_shape(shape)))
            continue
        stored, numbers = prefix, range(shape[0])
        if prefix in patterns:
            stored, numbers = patterns[prefix].name, patterns[prefix].numbers
        layout = _layout(path, len(shape) - 1, rules)
        rest = path[len(prefix) + 1 :]
        for layer, number in zip(range(shape[0]), numbers, strict=True):
            name = rules.rename(_stored_name(f"{stored}/{number}/{rest}", rules))
            entries.append(Entry(name, path, layer, layout, layout.stored_shape(shape[1:])))
    counts = collections.Counter(e.name for e in entries)
    if clashes := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"several parameters would be stored as {', '.join(clashes)}")
    return entries


def _stored_name(path: str, rules: WeightRules) -> str:
    *modules, leaf = path.split("/")
    modules = [m if m in rules.plain else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    leaf = LEAF_NAMES.get(leaf, leaf)
    return ".".join([*modules, leaf])


def _layout(path: str, rank: int, rules: WeightRules) -> Layout:
    for pattern, layout in rules.layouts:
        if re.search(pattern, path):
            return layout
    if path.rsplit("/", 1)[-1] != "kernel":
        return Layout.SAME
    return {2: Layout.LINEAR, 4: Layout.CONV}.get(rank, Layout.SAME)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which stored tensor fills an entry, and whether it is stored transposed."""

    entry: Entry
    stored_name: str
    transpose: bool


def assign(
    stored: Mapping[str, tuple[int, ...]], entries: Sequence[Entry], rules: WeightRules
) -> tuple[list[Assignment], list[tuple[str, str]]]:
    """Matches stored tensors to entries, or says everything that does not fit.

    Args:
      stored: name -> shape of every tensor in the checkpoint.
      entries: what the model needs.
      rules: the family's rules.

    Returns:
      One assignment for each entry, and (alias, the stored tensor it must equal) pairs, which the
      caller verifies when it reads the bytes.

    Raises:
      WeightsError: missing, unknown, doubly used or wrongly shaped tensors, all of them at once.
    """
    wanted = {e.name: e for e in entries}
    known = (*rules.ignored, *rules.zeros, *(re.escape(name) for name, _ in rules.buffers))
    found: dict[str, list[tuple[str, bool]]] = {}
    aliases, unknown = [], []
    for name in stored:
        canonical, transpose = _canonical(name, wanted, rules)
        if canonical in wanted:
            found.setdefault(canonical, []).append((name, transpose))
        elif target := _alias(canonical, rules):
            aliases.append((name, target))
        elif not any(re.fullmatch(p, name) for p in known):
            unknown.append(name)
    # A tied table may be stored under its alias only.
    for name, target in list(aliases):
        if target in wanted and target not in found:
            found[target] = [(name, False)]
            aliases.remove((name, target))
    _raise_misfits(stored, wanted, found, unknown)
    chosen = {c: names[0] for c, names in found.items()}
    pairs = [(name, chosen[target][0]) for name, target in aliases if target in chosen]
    return [Assignment(wanted[c], *chosen[c]) for c in wanted], pairs


def _canonical(name: str, wanted: Mapping[str, Entry], rules: WeightRules) -> tuple[str, bool]:
    """The canonical name; each legacy rename is applied in turn until the name is known."""
    transpose = False
    for rename in rules.legacy:
        if name in wanted:
            break
        new, count = re.subn(rename.pattern, rename.replacement, name, count=1)
        if count:
            name, transpose = new, transpose != rename.transpose
    return name, transpose


def _alias(name: str, rules: WeightRules) -> str | None:
    return next((target for p, target in rules.aliases if re.fullmatch(p, name)), None)


def _raise_misfits(stored, wanted, found, unknown) -> None:
    missing = [n for n in wanted if n not in found]
    doubled = [f"{c} <- {', '.join(n for n, _ in names)}" for c, names in found.items()
               if len(names) > 1]
    shaped = []
    for canonical, names in found.items():
        name, transpose = names[0]
        shape = tuple(stored[name])[::-1] if transpose else tuple(stored[name])
        if shape != tuple(wanted[canonical].shape):
            shaped.append(f"{name}: {shape}, the configuration asks for {wanted[canonical].shape}")
    problems = {"missing": missing, "unknown": unknown, "doubly used": doubled,
                "wrong shape": shaped}
    if any(problems.values()):
        raise WeightsError(format_problems(problems))


def format_problems(problems: Mapping[str, Iterable[str]]) -> str:
    """One readable message with every name."""
    lines = ["The checkpoint and the model's configuration do not fit:"]
    for kind, names in problems.items():
        names = list(names)
        if names:
            lines.append(f"  {kind} ({len(names)}):")
            lines += [f"    {n}" for n in names]
    return "\n".join(lines)
