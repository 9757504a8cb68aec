"""Both phases on tiny pairs: what moves, what the loss sees, what a run leaves behind."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core_jax.config import to_dataclass
from core_jax.data.images import ImageLimits
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.models import load_model
from core_jax.partition import flatten, tree_hash
from massv_jax import training
from massv_jax.answers import AnsweredTurn, AnswerRecord, SamplingRecord
from massv_jax.batches import RowMaker
from massv_jax.drafter import Drafter
from massv_jax.experiment import DataConfig, Experiment
from massv_jax.exporting import whole_model
from massv_jax.loading import load_tower, make_drafter
from massv_jax.losses import LossConfig
from massv_jax.phase2 import TARGET, TOWER, Teacher, make_loss, repeat_frames
from massv_jax.training import build_job, load_teacher, train
from massv_jax.workdir import WorkdirError, open_drafter
from tests.massv import tiny_pairs
from tests.oracle import close


def say(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    records = []
    for i, picture in enumerate(tiny_pairs.pictures(4)):
        Image.fromarray(picture).save(path / f"{i}.png")
        records.append({"id": str(i), "image": f"{i}.png",
                        "conversations": say("<image>\nwhat is it?", "a red circle")})  # fmt: skip
    (path / "data.json").write_text(json.dumps(records))
    return path


def experiment(pair, folder, task, **changes):
    values = {
        "task": task,
        "model": {"target": str(pair.target), "language_model": str(pair.language_model),
                  "frozen_dtype": "float32", "compute_dtype": "float32"},
        "data": {
            "source": {"kind": "llava", "path": str(folder / "data.json")},
            "batch_size": 8, "max_length": 96, "image_windows": 12, "num_threads": 1,
            "limits": {"min_side": 8}, "format": "plain" if task == "phase1" else "chat",
        },
        "run": {"steps": 2, "seed": 1, "log_every": 1, "save_every": 1000},
        "optimizer": {"learning_rate": 1e-3, "total_steps": 10},
    }  # fmt: skip
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values.setdefault(group, {})[name] = value
    return to_dataclass(Experiment, values)


def test_phase_1_moves_the_projector_alone_and_phase_2_goes_on_from_it(
    qwen_pair, folder, tmp_path, capsys
):
    first = experiment(qwen_pair, folder, "phase1")
    job = build_job(first)
    assert {n.split("/")[0] for n in flatten(job.state.params)} == {"projector"}
    assert {n.split("/")[0] for n in flatten(job.frozen)} == {"tower", "language_model"}
    before = tree_hash(job.parts.params["language_model"])
    train(first, tmp_path / "one")
    shown = capsys.readouterr().out
    assert "[[a red circle\n]]" in shown
    after = open_drafter(tmp_path / "one")
    assert tree_hash(after.params["language_model"]) == before
    moved = flatten(after.params["projector"])
    fresh = flatten(job.parts.params["projector"])
    assert all(not np.array_equal(moved[n], fresh[n]) for n in moved)

    second = experiment(qwen_pair, folder, "phase2", run__init_from=str(tmp_path / "one"))
    job = build_job(second)
    np.testing.assert_array_equal(job.state.params["projector"]["mlp_2"]["kernel"],
                                  after.params["projector"]["mlp_2"]["kernel"])  # fmt: skip
    assert {n.split("/")[0] for n in flatten(job.frozen)} == {"tower"}
    tower = tree_hash(job.frozen["tower"])
    state, metrics = step(job, second, qwen_pair, folder)
    assert tree_hash(job.frozen["tower"]) == tower
    assert {"loss", "ce", "token_accuracy", "weight"} <= metrics.keys()
    changed = [n for n, x in flatten(state.params).items()
               if not np.array_equal(x, flatten(job.parts.params).get(n, 0))]  # fmt: skip
    assert any(n.startswith("language_model/") for n in changed)
    assert any(n.startswith("projector/") for n in changed)
    with pytest.raises(WorkdirError, match="massv_jax"):
        open_drafter(tmp_path)


def test_a_run_is_told_which_examples_were_skipped(qwen_pair, folder, tmp_path, monkeypatch):
    broken = shutil.copytree(folder, tmp_path / "data")
    (broken / "2.png").write_bytes(b"")
    taken = []
    monkeypatch.setattr(
        training, "run_training", lambda *_, make_batches, **__: taken.append(make_batches(0))
    )
    for place in (folder, broken):  # the first is the control
        made = experiment(qwen_pair, place, "phase1", data__max_bad_fraction=0.5)
        train(made, tmp_path / place.name)
        next(taken[-1])
    assert [dict(batches.bad.ids) for batches in taken] == [{}, {"2": "empty"}]


def step(job, made, pair, folder):
    """One step of a job on its own data."""
    from massv_jax.training import make_rows, open_training_source, training_batches

    source = open_training_source(made, job.parts.binding)
    with training_batches(made, source, make_rows(made, job.parts, job.processor), 0) as batches:
        batch = dict(next(batches))
    del batch["ids"]
    copied = jax.tree.map(jnp.copy, job.state)
    return job.step_fn(copied, job.frozen, jax.device_put(batch, job.sharding))


@pytest.mark.slow
def test_gemma_s_projector_learns_at_once(gemma_pair, folder, tmp_path):
    """Its matrix starts as zeros in transformers; then the norm before it would not learn."""
    made = experiment(gemma_pair, folder, "phase1", optimizer__learning_rate=3e-2, run__steps=8)
    fresh = make_drafter(gemma_pair.target, gemma_pair.language_model, seed=1).params["projector"]
    assert train(made, tmp_path / "run").step == 8
    moved = flatten(open_drafter(tmp_path / "run").params["projector"])
    for name, leaf in flatten(fresh).items():
        assert not np.array_equal(leaf, moved[name]), name
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.05


@functools.cache
def rows_of(pair, kind="merger", pooling=1):
    processor = Qwen2_5_VLProcessor.from_pretrained(pair.target)
    parts = make_drafter(pair.target, pair.language_model, kind=kind, pooling=pooling)
    config = DataConfig(
        batch_size=2, max_length=96, image_windows=12, limits=ImageLimits(min_side=8)
    )
    return RowMaker(parts.drafter.config, config, processor, with_target=True), parts


def batch_of(rows, folder):
    from core_jax.data.llava import LlavaSource

    source = LlavaSource(folder / "data.json")
    made = [rows.row(source[i]) for i in (0, 1)]
    return {k: jnp.asarray(np.stack([r[k] for r in made])) for k in made[0]}


@pytest.mark.parametrize(("kind", "pooling"), [("merger", 1), ("mlp", 2), ("text", 1)])
def test_the_target_s_opinion_stands_at_the_drafter_s_tokens(qwen_pair, folder, kind, pooling):
    """`acceptance` against both models run by themselves, also where their prompts differ."""
    rows, parts = rows_of(qwen_pair, kind, pooling)
    batch = batch_of(rows, folder)
    tower = load_tower(qwen_pair.target)
    target = load_teacher(qwen_pair.target, parts.drafter.config.target)
    config = LossConfig(ce=0.0, kl=1.0, teacher="target")
    loss = jax.jit(make_loss(parts.drafter, config,
                             teacher=Teacher(parts.drafter.config.target)))  # fmt: skip
    own = {k: v for k, v in parts.params.items() if v}
    value, metrics = loss(own, {TOWER: tower, TARGET: target}, batch, jax.random.key(0))
    model, params = load_model(qwen_pair.target)
    want = by_hand(rows, parts, tower, batch, folder, model, params)
    np.testing.assert_allclose(float(metrics["acceptance"]), want["overlap"], rtol=5e-5)
    np.testing.assert_allclose(float(value), want["kl"], rtol=5e-5)
    shifted = batch | {"tokens": jnp.roll(batch["tokens"], 1, axis=1)}
    off = loss(own, {TOWER: tower, TARGET: target}, shifted, jax.random.key(0))[0]
    assert abs(float(off) - float(value)) > 5e-3 * float(value)  # a hundred times as much


def by_hand(rows, parts, tower, batch, folder, model, params):
    """Mean KL and overlap over the supervised tokens, row by row, by the stock models."""
    plain, _ = rows_of_plain(rows)
    overlaps, kls = [], []
    for i, row in enumerate(plain_rows(plain, folder)):
        one = {k: jnp.asarray(v)[None] for k, v in row.items()}
        positions = jnp.moveaxis(one["positions"], 1, 0)
        patches = repeat_frames(one["patches"], model.config.vision_config)
        images = (patches, one["patch_positions"], one["segments"])
        args = (one["tokens"], positions, one["slots"], *images, one["valid"])
        p = jax.nn.softmax(jax.jit(model.apply)({"params": params}, *args))[0]
        q = drafter_probs(parts, tower, {k: v[i : i + 1] for k, v in batch.items()})
        learned_p = np.flatnonzero(row["supervised"])
        learned_q = np.flatnonzero(np.asarray(batch["supervised"][i]))
        for at_p, at_q in zip(learned_p, learned_q, strict=True):
            pv, qv = np.asarray(p[at_p - 1])[: q.shape[-1]], np.asarray(q[at_q - 1])
            overlaps.append(np.minimum(pv, qv).sum())
            kls.append((pv * np.log(pv / qv)).sum())
    return {"overlap": np.mean(overlaps), "kl": np.mean(kls)}


def rows_of_plain(rows):
    """Rows of the target's own prompt."""
    config = dataclasses.replace(
        rows.drafter, kind="mlp", pooling=1,
        text=dataclasses.replace(rows.drafter.target.text_config),
    )  # fmt: skip
    return dataclasses.replace(rows, drafter=config, with_target=False), config


def plain_rows(rows, folder):
    from core_jax.data.llava import LlavaSource

    source = LlavaSource(folder / "data.json")
    return [rows.row(source[i]) for i in (0, 1)]


def drafter_probs(parts, tower, batch):
    from massv_jax.phase2 import batch_features, drafter_hidden

    drafter: Drafter = parts.drafter
    features = batch_features(drafter, tower, batch) if drafter.sees_images else None
    hidden = drafter_hidden(drafter, parts.params, batch, features)
    return jax.nn.softmax(hidden @ drafter.head_table(parts.params).T)[0]


def test_loss_is_the_stock_model_s_cross_entropy(qwen_pair, folder):
    rows, parts = rows_of(qwen_pair)
    batch = batch_of(rows, folder)
    tower = load_tower(qwen_pair.target)
    loss = jax.jit(make_loss(parts.drafter, LossConfig(logits_chunk=7)))
    value, metrics = loss(parts.params, {TOWER: tower}, batch, jax.random.key(0))
    model, params = whole_model(parts.drafter.config, parts.params["projector"],
                                parts.params["language_model"], tower)  # fmt: skip
    losses = []
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        patches = repeat_frames(one["patches"], model.config.vision_config)
        images = (patches, one["patch_positions"], one["segments"])
        args = (one["tokens"], jnp.moveaxis(one["positions"], 1, 0), one["slots"], *images)
        log_q = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, *args, one["valid"])[0])
        at = np.flatnonzero(np.asarray(one["supervised"][0]))
        losses += [-float(log_q[t - 1, one["tokens"][0, t]]) for t in at]
    assert close(value, np.mean(losses), 1e-4)
    assert metrics["weight"] == len(losses)


@pytest.mark.slow
def test_phase_2_learns_from_the_target_s_answers(qwen_pair, folder, tmp_path):
    parts = make_drafter(qwen_pair.target, qwen_pair.language_model, kind="text")
    turn = AnsweredTurn(question=(None, "what is it?"), answer_ids=(40, 41, 2),
                        finish_reason="stop", text="xy")  # fmt: skip
    records = [
        AnswerRecord(id=str(i), images=(f"{i}.png",), turns=(turn,), seed=i,
                     sampling=SamplingRecord(), target=parts.binding.weights)
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    made = experiment(
        qwen_pair, folder, "phase2", data__answers=str(tmp_path), model__kind="text",
        data__answer_images=str(folder), optimizer__learning_rate=1e-2, run__steps=6,
    )  # fmt: skip
    train(made, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
