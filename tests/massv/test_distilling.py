"""Distillation with a toy target: choices by id, chunks, restarts, processes, every fate."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from core_jax.data.images import ImageLimits
from core_jax.data.llava import LlavaSource
from core_jax.data.sources import Example, SourceError
from massv_jax.answers import AnswerSource
from massv_jax.distilling import (
    Plan,
    distill,
    make_answerer,
    make_plan,
    make_settings,
    summary,
)
from massv_jax.distilling_answers import Answerer, answer_chunk
from massv_jax.distilling_files import ChunkFolder, DistillError, check_sums
from massv_jax.distilling_instructions import NothingToAsk, draw_seed, make_instruction, share
from massv_jax.experiment import DataConfig, DistillConfig, Experiment, ModelConfig
from massv_jax.speculative.decoder import SpeculativeDecoder
from tests.massv.speculative.test_decoder import VOCAB, ToyFrontend, target
from tests.massv.speculative.toy import PIXELS

SUFFIX = "say it"
ENDS = (15, 7)
CONFIG = DistillConfig(
    max_new_tokens=10, chunk_size=4, batch_size=3, prompt_lengths=(16, 32), turns="all",
    suffixes=(SUFFIX,), greedy_fraction=0.5, seed=5,
)  # fmt: skip


class ChatFrontend(ToyFrontend):
    """Messages instead of texts: "v" stands before each, blanks are left out."""

    def render(self, prompt, num_images):
        parts = [p for m in prompt for p in ({"text": "v"}, *m["content"])]
        text = "".join(p.get("text", "w") for p in parts)
        return text.replace(" ", "")

    def prepare(self, texts, images, *, lengths=None):
        seen = [[np.asarray(x, np.float32).reshape(-1)[:PIXELS] / 128 for x in r] for r in images]
        return super().prepare(texts, seen, lengths=lengths)


def answerer(drafter=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    toy = dataclasses.replace(target(eos=ENDS), frontend=ChatFrontend())
    decoder = SpeculativeDecoder(
        toy, drafter, accept="coupled", batch_size=config.batch_size,
        prompt_lengths=config.prompt_lengths,
    )  # fmt: skip
    limits = ImageLimits(min_side=1)
    return Answerer(decoder=decoder, config=config, target="f" * 64, limits=limits, num_threads=2)


def _record(number, *questions, image=None):
    spoken = []
    for q in questions:
        spoken += [{"from": "human", "value": q}, {"from": "gpt", "value": "theirs"}]
    return {"id": f"r{number}", "conversations": spoken} | ({"image": image} if image else {})


@pytest.fixture
def source(tmp_path):
    """Eleven instructions: images, text, several turns, and one of each way to go wrong."""
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    records = [
        *[_record(i, f"<image>\nab{'cdefg'[i]}", "hi", image=f"{i}.png") for i in range(4)],
        _record(4, "bad", image="broken.png"), _record(5, "gone", image="missing.png"),
        _record(6, "a" * 40), {"id": "r7", "conversations": []},
        _record(8, f"tell {SUFFIX}", f"more {SUFFIX}"), _record(9, "held", image="4.png"),
        _record(10, "last"),
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "exclude.txt").write_text("4.png\n")
    return LlavaSource(tmp_path / "data.json", images=tmp_path)


def _experiment(source, **distillation):
    config = dataclasses.replace(CONFIG, **distillation)
    data = DataConfig(exclude=str(source.root / "exclude.txt"))
    model = ModelConfig(target="t", language_model="l", drafter="run")
    return Experiment(task="distill", model=model, distill=config, data=data)


def _plan(source, **distillation):
    return make_plan(source, _experiment(source, **distillation))


def _bytes(folder):
    names = ("answers.jsonl", "manifest.json", "problems.json", "distill.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_every_instruction_is_accounted_for_and_phase_2_reads_the_answers(source, tmp_path):
    places = []
    made = distill(answerer(), _plan(source), tmp_path / "out", {"a": 1}, at=places.append)
    assert places[0] == "batch 0 of chunk 0"
    assert places[-1].endswith(f"of chunk {_plan(source).num_chunks - 1}")
    assert (made["input"], made["succeeded"], made["failed"], made["skipped"]) == (11, 6, 3, 2)
    assert made["skipped_by_reason"] == {"excluded_image": 1, "no_question": 1}
    problems = json.loads((tmp_path / "out" / "problems.json").read_text())
    reasons = {p["id"]: p["reason"] for p in problems["failed"]}
    assert set(reasons) == {"r4", "r5", "r6"}
    assert reasons["r5"] == "image_missing_file"
    assert "longer than the cache" in reasons["r6"]
    assert "6 succeeded + 3 failed + 2 skipped = 11" in summary(made)
    answers = AnswerSource(tmp_path / "out", images=str(tmp_path), target="f" * 64)
    records = [answers[i].extras["record"] for i in range(len(answers))]
    assert [r.id for r in records] == ["r0", "r1", "r2", "r3", "r8", "r10"]
    assert records[0].images == ("0.png",)
    assert records[0].turns[0].question == (None, "abc")
    for r in records:
        assert r.sampling.temperature == (0 if share(5, "greedy", r.id) < 0.5 else 1)
        assert r.seed == draw_seed(5, 0, r.id)
        for t in r.turns:
            assert (t.finish_reason == "stop") == (t.answer_ids[-1] in ENDS)
            assert t.truncated == (not {*ENDS} & {*t.answer_ids})
            assert all(i < VOCAB for i in t.answer_ids)
        assert not any(t.truncated for t in r.turns[:-1])
    assert {r.sampling.temperature for r in records} == {0, 1}
    assert max(len(r.turns) for r in records) == 2


def test_names_that_are_no_unicode_are_answered_and_found_again(source, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(tmp_path / "0.png", tmp_path / name)
    record = _record(0, "<image>\nabc", image=name) | {"id": "caf\udce9"}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    plan = _plan(LlavaSource(tmp_path / "data.json", images=tmp_path))
    assert distill(answerer(), plan, tmp_path / "out", {"a": name})["succeeded"] == 1
    assert distill(answerer(), plan, tmp_path / "out", {"a": name})["succeeded"] == 1
    answers = AnswerSource(tmp_path / "out", images=str(tmp_path))
    assert answers[0].id == r"caf\udce9"
    assert answers[0].encoded_image() == (tmp_path / "0.png").read_bytes()


def test_a_later_turn_is_asked_after_the_targets_own_answer(source):
    """The second answers are those of prompts that have the first ones in them."""
    who = answerer(greedy_fraction=1.0)
    chunk = answer_chunk(who, source, 0, range(4))
    records = [json.loads(line) for line in chunk.lines]
    two = [r for r in records if len(r["turns"]) == 2]
    assert two
    for r in two:
        first, second = r["turns"]
        assert first["text"] != "theirs"
        image = np.asarray(Image.open(source.root / r["images"][0]))
        asked = [{}, {"text": first["question"][1]}], [{"text": first["text"]}], [{"text": "hi"}]
        question = [{"content": content} for content in asked]
        made = who.decoder.generate([image], [question], max_new_tokens=10)
        assert made.tokens[0, : made.lengths[0]].tolist() == second["answer_ids"]


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_and_restarts_make_the_same_bytes(source, tmp_path, processes, monkeypatch):
    plan, who = _plan(source), answerer()
    distill(who, plan, tmp_path / "one", {"a": 1})
    out = tmp_path / "many"
    commit, left = ChunkFolder.commit, [1]

    def dying(self, chunk):  # in the middle of a commit: answers there, no manifest
        left[0] -= 1
        if left[0] < 0:
            (self.parts / f"{chunk.number:05d}.jsonl").write_bytes(b'{"torn')
            raise KeyboardInterrupt
        commit(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkFolder, "commit", dying)
        with pytest.raises(KeyboardInterrupt):
            distill(who, plan, out, {"a": 1})
    made = [
        distill(who, plan, out, {"a": 1}, process_index=i, process_count=processes)
        for i in reversed(range(processes))
    ]
    assert (made[0] is None) == (processes > 1)
    assert made[-1] is not None
    assert _bytes(out) == _bytes(tmp_path / "one")
    again = {p: p.stat().st_mtime_ns for p in (out / "parts").iterdir()}
    assert distill(who, plan, out, {"a": 1}) == made[-1]
    assert {p: p.stat().st_mtime_ns for p in (out / "parts").iterdir()} == again


def test_answers_do_not_depend_on_the_chunk_or_on_a_drafter(source, tmp_path):
    """Draws follow from seed, id and position; in the toy's arithmetic rows are independent."""
    plain = answer_chunk(answerer(), source, 0, range(11))
    apart = [answer_chunk(answerer(), source, i, [i]).lines for i in range(11)]
    assert plain.lines == tuple(line for lines in apart for line in lines)
    drafted = answerer(dataclasses.replace(target(apart=0.1), frontend=ChatFrontend()))
    assert answer_chunk(drafted, source, 0, range(11)).lines == plain.lines
    other = answer_chunk(answerer(seed=6, greedy_fraction=0.0), source, 0, range(11)).lines
    same = answer_chunk(answerer(greedy_fraction=0.0), source, 0, range(11)).lines
    assert [json.loads(x)["turns"] for x in other] != [json.loads(x)["turns"] for x in same]


def test_stored_probabilities_choose_the_greedy_answer(source):
    lines = answer_chunk(answerer(store_top_k=3, greedy_fraction=1.0), source, 0, range(4)).lines
    for line in lines:
        for turn in json.loads(line)["turns"]:
            assert [ids[0] for ids in turn["top_ids"]] == turn["answer_ids"]
            logs = np.array(turn["top_logprobs"])
            assert (np.diff(logs, axis=1) <= 0).all()
            assert (np.exp(logs).sum(axis=1) <= 1 + 1e-4).all()


def test_on_policy_answers_are_no_labels(source, tmp_path):
    drafter = dataclasses.replace(target(apart=0.1), frontend=ChatFrontend())
    who = answerer(drafter, on_policy=True)
    who = dataclasses.replace(who, decoder=dataclasses.replace(who.decoder, accept="on_policy"))
    out = tmp_path / "out"
    distill(who, _plan(source), out, {"a": 1})
    plain = answer_chunk(answerer(), source, 0, range(4)).lines
    written = (out / "answers.jsonl").read_text().splitlines()
    assert all(json.loads(line)["on_policy"] for line in written)
    assert [json.loads(x)["turns"] for x in written[:4]] != [json.loads(x)["turns"] for x in plain]
    assert not json.loads(plain[0])["on_policy"]
    contexts = AnswerSource(out, images=str(tmp_path))
    assert contexts[0].extras["record"].on_policy
    with pytest.raises(SourceError, match="no labels"):
        AnswerSource(out, images=str(tmp_path), labels=True)


def test_on_policy_needs_a_drafter():
    experiment = Experiment(
        task="distill", model=ModelConfig(target="t", language_model="l"),
        distill=DistillConfig(on_policy=True),
    )  # fmt: skip
    with pytest.raises(DistillError, match=r"model\.drafter"):
        make_answerer(experiment)


def test_other_settings_and_damaged_chunks_are_refused(source, tmp_path):
    plan, out = _plan(source), tmp_path / "out"
    distill(answerer(), plan, out, {"seed": 1, "x": {"y": 2}})
    with pytest.raises(DistillError, match=r"x.y was 2, is 3"):
        distill(answerer(), plan, out, {"seed": 1, "x": {"y": 3}})
    (out / "parts" / "00000.jsonl").write_bytes(b"")
    with pytest.raises(DistillError, match="not what was written"):
        distill(answerer(), plan, out, {"seed": 1, "x": {"y": 2}})
    with pytest.raises(DistillError, match="accounted"):
        check_sums({"input": 3, "succeeded": 1, "failed": 1, "skipped": 0})
    assert Plan(source=source, kept=range(9), left_out={}, chunk_size=4).num_chunks == 3


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["distill.json", "parts/00001.json"])
def test_what_cannot_be_read_is_named_with_its_remedy(source, tmp_path, name, content):
    plan, out = _plan(source), tmp_path / "out"
    distill(answerer(), plan, out, {"a": 1})
    whole = _bytes(out)
    (out / name).write_bytes(content)
    with pytest.raises(DistillError, match=rf"{name} is damaged, .*delete"):
        distill(answerer(), plan, out, {"a": 1})
    (out / name).unlink()
    distill(answerer(), plan, out, {"a": 1})
    assert _bytes(out) == whole


def test_settings_name_all_that_changes_answers(source, tmp_path):
    """The drafter's weights, its windows, the layout, and the records' texts."""
    experiment, near = _experiment(source), target(apart=0.1)

    def settings(drafter=near, read=source, gamma=5, experiment=experiment):
        who = dataclasses.replace(answerer(drafter), gamma=gamma)
        return make_settings(who, make_plan(read, experiment), experiment)

    first = settings()
    assert settings() == first
    assert settings(drafter=None)["drafter_weights"] == ""
    run = dataclasses.replace(experiment.run, mesh={"data": 2, "fsdp": -1})
    file = tmp_path / "data.json"
    file.write_text(file.read_text().replace("hi", "ho"))  # the ids stay
    changed = {
        "drafter_weights": settings(drafter=target(apart=0.2)),
        "gamma": settings(gamma=3),
        "mesh": settings(experiment=dataclasses.replace(experiment, run=run)),
        "instructions": settings(read=LlavaSource(file, images=tmp_path)),
    }
    for name, other in changed.items():
        assert {k for k in first if first[k] != other[k]} == {name}


def test_suffixes_are_dropped_from_their_share_and_turns_are_as_asked():
    def asked(i, **changes):
        spoken = _record(i, f"tell {SUFFIX}", "more")["conversations"]
        example = Example(f"e{i}", None, None, {"conversations": spoken, "image_names": []})
        return make_instruction(example, i, dataclasses.replace(CONFIG, **changes))

    made = [asked(i, drop_suffix_fraction=0.3) for i in range(200)]
    dropped = [m for m in made if m.dropped[0]]
    assert 40 < len(dropped) < 80
    assert {m.dropped for m in dropped} == {(SUFFIX, "")}
    assert {m.questions[0] for m in dropped} == {("tell",)}
    kept = [m for m in made if not m.dropped[0]]
    assert {m.questions for m in kept} == {((f"tell {SUFFIX}",), ("more",))}
    assert len(asked(0, turns="first").questions) == 1
    assert 60 < sum(m.greedy for m in made) < 140
    # Questions need no answers in the file.
    extras = {"conversations": [{"from": "human", "value": "why"}], "image_names": []}
    assert make_instruction(Example("q", None, None, extras), 0, CONFIG).questions == (("why",),)
    with pytest.raises(NothingToAsk):
        make_instruction(Example("q", None, "a caption", {}), 0, CONFIG)
