"""How much of a caption is true and how much of the scene it tells, in counts that can be summed.

Every metric m has four counts an example, so that sums over a corpus, and over bootstrap samples of
it, give micro-averages:

    precision = sum(m.tp_pred) / sum(m.pred)      recall = sum(m.tp_ref) / sum(m.ref)

Metrics:

- `object`: multiset overlap of (shape, colour, size), all three right. An object named twice is
  wrong once.
- `object_full`: the same with the texture.
- `relation`: predicted are the distinct facts that the caption states, places ('at the top left')
  and relations between two objects ('left of'), normalised by the parser. A fact is true if the
  objects it names, by colour and shape, are in the scene and lie so by cells. To be told are, after
  the canonical description scheme of `captions`, the cell of each object and
  `pairwise_count(scene)` relations: any true ones, since an author may choose which, so recall
  counts true stated relations up to that number.
- `position`, `pairwise`: the two parts of `relation` by themselves.
- `shape`, `colour`, `size`, `texture`, `cell`: of objects paired greedily, most alike first (exact
  triples before all others), how often the attribute agrees.
- `background`: 1 if the colours, and plain or fading, are right.
"""

from collections import Counter
from collections.abc import Sequence

from miniature.world.captions import pairwise_count
from miniature.world.parsing import ParsedObject, ParsedScene, parse
from miniature.world.scenes import Object, Scene

_ATTRIBUTES = ("shape", "colour", "size", "texture", "cell")
METRICS = (
    "object", "object_full", "relation", "position", "pairwise", *_ATTRIBUTES, "background",
)  # fmt: skip
Counts = dict[str, int]


def scorer(references: Sequence[Scene | str | bytes], captions: Sequence[str]) -> list[Counts]:
    """Scores captions against the scenes they should describe.

    Args:
        references: scenes, or their JSON as the data set stores it.
        captions: one for each reference.

    Returns:
        For each example the counts '<metric>.tp_pred', '.pred', '.tp_ref', '.ref' of every metric.

    Raises:
        ValueError: if the lengths differ or a reference is no scene.
    """
    if len(references) != len(captions):
        raise ValueError(f"{len(references)} references but {len(captions)} captions")
    return [
        score(r if isinstance(r, Scene) else Scene.from_json(r), c)
        for r, c in zip(references, captions, strict=True)
    ]


def score(scene: Scene, caption: str) -> Counts:
    """Counts of one caption, see the module's docstring."""
    parsed = parse(caption)
    counts: Counts = {}
    _count_objects(counts, scene, parsed)
    _count_relations(counts, scene, parsed)
    _count_attributes(counts, scene, parsed)
    background = (scene.background.top, scene.background.bottom)
    is_right = int(parsed.background == background)
    _put(counts, "background", is_right, int(parsed.background is not None), is_right, 1)
    return counts


def aggregate(counts: Sequence[Counts]) -> dict[str, float]:
    """Micro-averages over examples: '<metric>_precision', '_recall', '_f1' of every metric.

    A ratio without any denominator is 0.
    """
    total = Counter()
    for example in counts:
        total.update(example)
    result = {}
    for metric in METRICS:
        precision = _ratio(total[f"{metric}.tp_pred"], total[f"{metric}.pred"])
        recall = _ratio(total[f"{metric}.tp_ref"], total[f"{metric}.ref"])
        result[f"{metric}_precision"] = precision
        result[f"{metric}_recall"] = recall
        result[f"{metric}_f1"] = _ratio(2 * precision * recall, precision + recall)
    return result


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _put(counts: Counts, metric: str, tp_pred: int, pred: int, tp_ref: int, ref: int) -> None:
    counts[f"{metric}.tp_pred"], counts[f"{metric}.pred"] = tp_pred, pred
    counts[f"{metric}.tp_ref"], counts[f"{metric}.ref"] = tp_ref, ref


def _count_objects(counts: Counts, scene: Scene, parsed: ParsedScene) -> None:
    def count(metric: str, fields: tuple[str, ...]) -> None:
        def values(objects) -> Counter:
            return Counter(tuple(getattr(o, f) for f in fields) for o in objects)

        said, true = values(parsed.objects), values(scene.objects)
        right = (said & true).total()
        _put(counts, metric, right, said.total(), right, true.total())

    count("object", ("shape", "colour", "size"))
    count("object_full", ("shape", "colour", "size", "texture"))


def _count_relations(counts: Counts, scene: Scene, parsed: ParsedScene) -> None:
    by_key = {o.key: o for o in scene.objects}

    def is_true(fact: tuple) -> bool:
        a = by_key.get(fact[1])
        if a is None or fact[0] == "at":
            return a is not None and a.cell == fact[2]
        b = by_key.get(fact[2])
        if b is None:
            return False
        return a.column < b.column if fact[0] == "left" else a.row < b.row

    places = [is_true(f) for f in parsed.facts if f[0] == "at"]
    pairs = [is_true(f) for f in parsed.facts if f[0] != "at"]
    wanted = pairwise_count(scene)
    told = min(sum(pairs), wanted)
    number = len(scene.objects)
    _put(counts, "position", sum(places), len(places), sum(places), number)
    _put(counts, "pairwise", sum(pairs), len(pairs), told, wanted)
    _put(
        counts,
        "relation",
        sum(places) + sum(pairs),
        len(parsed.facts),
        sum(places) + told,
        number + wanted,
    )


def _count_attributes(counts: Counts, scene: Scene, parsed: ParsedScene) -> None:
    pairs = _pair(scene.objects, parsed.objects)
    for name in _ATTRIBUTES:
        said = sum(getattr(p, name) is not None for p in parsed.objects)
        right = sum(getattr(t, name) == getattr(p, name) for t, p in pairs)
        _put(counts, name, right, said, right, len(scene.objects))


def _pair(
    true: Sequence[Object], said: Sequence[ParsedObject]
) -> list[tuple[Object, ParsedObject]]:
    def likeness(t: Object, p: ParsedObject) -> tuple[bool, int]:
        agree = [getattr(t, name) == getattr(p, name) for name in _ATTRIBUTES]
        return all(agree[:3]), sum(agree)

    ranked = sorted(
        ((likeness(t, p), -i, -j) for i, t in enumerate(true) for j, p in enumerate(said)),
        reverse=True,
    )
    pairs, used_true, used_said = [], set(), set()
    for _, i, j in ranked:
        if i not in used_true and j not in used_said:
            used_true.add(i)
            used_said.add(j)
            pairs.append((true[-i], said[-j]))
    return pairs
