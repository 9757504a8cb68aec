"""Name rules: derived names, other layouts, and every misfit at once."""

import numpy as np
import pytest

from core_jax.convert.rules import (
    Layout,
    Rename,
    WeightRules,
    WeightsError,
    assign,
    derive_entries,
)

SHAPES = {
    "embed/embedding": (10, 4),
    "blocks_0/conv/kernel": (3, 5, 2, 7),
    "layers/fc/kernel": (2, 4, 6),
    "layers/norm/scale": (2, 4),
    "to_out_0/bias": (4,),
}
RULES = WeightRules(
    stacked=("layers",),
    plain=("to_out_0",),
    rename=lambda name: f"model.{name}",
    legacy=(
        Rename(r"^old\.", "model."),
        Rename(r"\.dense\.", ".fc."),
        Rename(r"^model\.table$", "model.embed.weight", transpose=True),
    ),
    ignored=(r".*\.position_ids",),
    aliases=((r"lm_head\.weight", "model.embed.weight"),),
    zeros=(r"final_bias",),
)
CANONICAL = {
    "model.embed.weight": (10, 4),
    "model.blocks.0.conv.weight": (7, 2, 3, 5),
    "model.layers.0.fc.weight": (6, 4),
    "model.layers.1.fc.weight": (6, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.norm.weight": (4,),
    "model.to_out_0.bias": (4,),
}


def _assign(stored):
    return assign(stored, derive_entries(SHAPES, RULES), RULES)


def test_canonical_names_and_shapes_are_derived():
    assert {e.name: e.shape for e in derive_entries(SHAPES, RULES)} == CANONICAL
    assignments, aliases = _assign(CANONICAL)
    assert {a.stored_name for a in assignments} == set(CANONICAL)
    assert not any(a.transpose for a in assignments)
    assert aliases == []
    layers = [a.entry.layer for a in assignments if a.entry.path == "layers/fc/kernel"]
    assert layers == [0, 1]


@pytest.mark.parametrize("layout", Layout)
def test_layouts_are_inverses(layout, rng):
    stored = rng.normal(size=(2, 3, 4, 5) if layout is Layout.CONV else (2, 3))
    ours = layout.to_ours(stored)
    np.testing.assert_array_equal(layout.to_stored(ours), stored)
    assert layout.stored_shape(ours.shape) == stored.shape


def test_a_layout_by_pattern_beats_the_rank():
    rules = WeightRules(layouts=((r"raw/kernel", Layout.SAME),))
    (raw, plain) = derive_entries({"raw/kernel": (2, 3), "plain/kernel": (2, 3)}, rules)
    assert (raw.shape, plain.shape) == ((2, 3), (3, 2))


def test_legacy_names_buffers_and_zeros_are_read():
    stored = {f"old.{n.removeprefix('model.')}": s for n, s in CANONICAL.items()}
    del stored["old.embed.weight"], stored["old.layers.1.fc.weight"]
    stored |= {"model.table": (4, 10), "old.layers.1.dense.weight": (6, 4)}
    stored |= {"model.position_ids": (1, 77), "final_bias": (10,)}
    assignments, _ = _assign(stored)
    by_name = {a.entry.name: a for a in assignments}
    assert by_name["model.embed.weight"].stored_name == "model.table"
    assert by_name["model.embed.weight"].transpose
    assert by_name["model.layers.1.fc.weight"].stored_name == "old.layers.1.dense.weight"
    assert not by_name["model.layers.1.fc.weight"].transpose


def test_every_misfit_is_listed_at_once():
    stored = dict(CANONICAL)
    del stored["model.layers.1.norm.weight"], stored["model.to_out_0.bias"]
    stored["model.layers.0.fc.weight"] = (4, 6)
    stored["old.embed.weight"] = (10, 4)
    stored["adapter.weight"] = stored["adapter.bias"] = (1,)
    with pytest.raises(WeightsError) as caught:
        _assign(stored)
    message = str(caught.value)
    for line in (
        "missing (2)",
        "model.layers.1.norm.weight",
        "model.to_out_0.bias",
        "unknown (2)",
        "adapter.weight",
        "adapter.bias",
        "doubly used (1)",
        "model.embed.weight <- model.embed.weight, old.embed.weight",
        "wrong shape (1)",
        "model.layers.0.fc.weight: (4, 6), the configuration asks for (6, 4)",
    ):
        assert line in message


def test_a_transposed_layout_is_checked_in_its_own_orientation():
    stored = dict(CANONICAL)
    del stored["model.embed.weight"]
    with pytest.raises(WeightsError, match=r"model.table: \(4, 10\)"):
        _assign(stored | {"model.table": (10, 4)})


def test_aliases_are_paired_or_stand_in():
    _, aliases = _assign(CANONICAL | {"lm_head.weight": (10, 4)})
    assert aliases == [("lm_head.weight", "model.embed.weight")]
    stored = dict(CANONICAL)
    del stored["model.embed.weight"]
    assignments, aliases = _assign(stored | {"lm_head.weight": (10, 4)})
    assert aliases == []
    assert "lm_head.weight" in {a.stored_name for a in assignments}


def test_rules_that_store_two_parameters_under_one_name_are_refused():
    rules = WeightRules(rename=lambda name: "same")
    with pytest.raises(ValueError, match="stored as same"):
        derive_entries({"a": (1,), "b": (1,)}, rules)
