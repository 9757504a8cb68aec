"""Files of prompts to files of answers: stops, restarts, bad rows, the command line."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jinja2
import numpy as np
import pytest
from PIL import Image

from core_jax.data.processors import ProcessorError
from core_jax.decode.target import TargetError
from massv_jax import generating
from massv_jax.binding import BindingError
from massv_jax.experiment import DecodingConfig
from massv_jax.generating import change_decoding, generate_answers, row_seed
from massv_jax.generating_files import GenerateJob, JobError, read_done
from massv_jax.speculative.adaptive import FixedGamma, GammaChoice
from massv_jax.speculative.decoder import RequestError
from massv_jax.windows_log import LoggedWindows, open_log
from tests.massv.speculative.test_decoder import PROMPTS, ToyFrontend, decoder, target
from tests.massv.speculative.toy import PIXELS

OPTIONS = {"max_new_tokens": 12, "gamma": 3, "temperature": 1.0}


def _write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def _read(path):
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Five prompts, two of them with a picture; the toy network's pictures are six numbers."""

    def toy_pixels(image, limits=None):
        return np.asarray(real(image, limits), np.float32).reshape(-1)[:PIXELS] / 128

    real = generating.open_image
    monkeypatch.setattr(generating, "open_image", toy_pixels)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    rows = [{"id": f"q{i}", "prompt": p} for i, p in enumerate(PROMPTS)]
    rows[0]["image"], rows[2]["images"] = "a.png", ["b.png"]
    return _write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"


def test_a_stopped_job_goes_on_and_says_the_same(files, tmp_path, monkeypatch):
    source, output = files
    job = GenerateJob(input=source, output=output, batch_size=2, options=OPTIONS)
    made = generate_answers(decoder(), job)
    whole = _read(output)
    assert list(whole) == [f"q{i}" for i in range(5)]
    assert made.rounds.sum() == sum(r["rounds"] for r in whole.values())
    log = [json.loads(x) for x in (tmp_path / "out.jsonl.windows.jsonl").read_text().splitlines()]
    assert [line["ids"] for line in log] == [["q0", "q1"], ["q2", "q3"], ["q4"]]
    # Killed in the middle of the third answer's line, and started with other neighbours.
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:15])
    assert generate_answers(decoder(), job) is not None
    assert _read(output) == whole
    assert generate_answers(decoder(), job) is None
    assert len({r["text"] for r in whole.values()}) == 5


def test_windows_are_replayed_from_their_log(files, tmp_path):
    """Sampled answers follow from the windows: other ones, then these from the log."""
    source, _ = files
    windows = itertools.cycle([1, 3, 2])

    class Changing(FixedGamma):
        def run(self, session, *, batch):
            choices = []
            while not session.done:
                choices.append(GammaChoice(next(windows), 1))
                session.advance(*choices[-1])
            return tuple(choices)

    def answer(name, gamma, **kwargs):
        job = GenerateJob(input=source, output=tmp_path / name, batch_size=2,
                          options=OPTIONS | {"gamma": gamma}, **kwargs)  # fmt: skip
        generate_answers(decoder(), job)
        return _read(tmp_path / name)

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[1]["image"] = "missing.png"
    _write(source, rows)
    made = answer("made.jsonl", Changing(4))
    log = tmp_path / "made.jsonl.windows.jsonl"
    lines = log.read_text().splitlines()
    assert [json.loads(line)["ids"] for line in lines] == [["q0"], ["q2", "q3"], ["q4"]]
    assert all(json.loads(line)["max_gamma"] == 4 for line in lines)
    assert answer("again.jsonl", LoggedWindows.read(log)) == made
    assert answer("fixed.jsonl", 1) != made  # a control: windows do matter
    # A kill left a line of windows without answers, and the beginning of another.
    log.write_text(
        json.dumps({"ids": ["q0", "q2"], "windows": [[[1, 99]]], "max_gamma": 4}) + "\n"
        + "\n".join(lines) + "\n" + lines[0][:9]
    )  # fmt: skip
    assert answer("killed.jsonl", LoggedWindows.read(log)) == made
    with open_log(log) as opened:
        opened.write(lines[0] + "\n")
    assert [json.loads(x)["ids"] for x in log.read_text().splitlines()][3:] == [["q4"], ["q0"]]
    with pytest.raises(JobError, match="gamma was 'windows of the log"):
        answer("killed.jsonl", LoggedWindows.read(log))
    # A row that the log knows nothing of, batches that were larger, and lines of another kind.
    log.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])
    with pytest.raises(JobError, match=r"\['q4'\] are not in the log"):
        answer("short.jsonl", LoggedWindows.read(log))
    with pytest.raises(JobError, match=r"up to 2 prompts; set --batch_size=2"):
        list(LoggedWindows.read(log).split([], 1))
    log.write_text('{"ids": 3}\n')
    with pytest.raises(JobError, match=r"line 1, is no line of windows"):
        LoggedWindows.read(log)
    with pytest.raises(JobError, match=r"--replay .*none: No such file"):
        LoggedWindows.read(tmp_path / "none")


def test_processes_share_the_prompts(files, tmp_path):
    source, output = files
    for i in range(2):
        generate_answers(decoder(), GenerateJob(
            input=source, output=output, batch_size=2, options=OPTIONS, process_index=i,
            process_count=2,
        ))  # fmt: skip
    parts = [_read(tmp_path / f"out-0000{i}-of-00002.jsonl") for i in range(2)]
    assert [list(p) for p in parts] == [["q0", "q2", "q4"], ["q1", "q3"]]


def test_rows_that_cannot_be_answered_do_not_stop_the_others(files):
    source, output = files
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[0]["image"] = "missing.png"
    rows[1]["prompt"] = "a" * 40
    _write(source, rows)
    generate_answers(decoder(), GenerateJob(input=source, output=output, batch_size=5,
                                            options=OPTIONS))  # fmt: skip
    made = _read(output)
    assert made["q0"] == {"id": "q0", "error": "image: missing_file"}
    assert "longer than the cache" in made["q1"]["error"]
    assert all("text" in made[f"q{i}"] for i in (2, 3, 4))


def test_texts_that_are_no_unicode(files):
    source, output = files
    rows = [{"id": "caf\udce9", "prompt": PROMPTS[0]}, {"id": "half", "prompt": "a\ud83d"},
            {"id": "ok", "prompt": PROMPTS[1]}]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    source.write_text(text, encoding="utf-8-sig")
    job = GenerateJob(input=source, output=output, batch_size=3, options=OPTIONS)
    assert generate_answers(decoder(), job) is not None
    made = _read(output)
    assert list(made) == [r"caf\udce9", "half", "ok"]
    assert "no Unicode" in made["half"]["error"]
    assert "text" in made[r"caf\udce9"]
    assert read_done(output) == {r"caf\udce9", "ok"}


def test_what_failed_is_tried_again_and_what_was_answered_is_kept(files, tmp_path):
    source, output = files
    job = GenerateJob(input=source, output=output, batch_size=5, options=OPTIONS)
    hidden = (tmp_path / "a.png").rename(tmp_path / "hidden.png")
    generate_answers(decoder(), job)
    before = _read(output)
    assert "error" in before["q0"]
    hidden.rename(tmp_path / "a.png")
    made = generate_answers(decoder(), job)
    assert len(made.rounds) == 1
    lines = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert [r["id"] for r in lines] == ["q1", "q2", "q3", "q4", "q0"]
    assert all(r == before[r["id"]] for r in lines[:-1])
    assert "text" in lines[-1]


def test_line_separators_in_an_answer_end_no_line(tmp_path):
    output = tmp_path / "out.jsonl"
    records = [{"id": "a", "text": "one\u2028two\x85three"}, {"id": "b", "text": "four"}]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    output.write_text(text, encoding="utf-8")
    assert read_done(output) == {"a", "b"}
    assert output.read_text(encoding="utf-8") == text
    output.write_bytes(text.encode() + '{"id": "c", "text": "ü'.encode()[:-1])  # a kill in a letter
    assert read_done(output) == {"a", "b"}
    assert output.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (dict(options={"temperature": 0.5}), "temperature"),
        (dict(options={"seed": 3}), "seed"),
        (dict(options={"gamma": 2}), "gamma"),
        (dict(drafter=None), "drafter"),
        (dict(target=target(seed=4)), "target"),
        (dict(accept="coupled"), "accept"),
    ],
)
def test_other_settings_do_not_mix_with_what_is_there(files, other, name):
    source, output = files
    job = GenerateJob(input=source, output=output, batch_size=5, options={"seed": 0, **OPTIONS})
    generate_answers(decoder(), job)
    options = other.pop("options", {})
    job = dataclasses.replace(job, options={**job.options, **options})
    with pytest.raises(JobError, match=f"other settings: {name} was"):
        generate_answers(dataclasses.replace(decoder(), **other), job)
    # Another number of rows changes no answer.
    job = dataclasses.replace(job, batch_size=2, options={"seed": 0, **OPTIONS})
    assert generate_answers(decoder(), job) is None


def test_a_row_that_the_template_refuses_does_not_stop_the_others(files):
    """Gemma's raises where roles do not alternate."""
    source, output = files
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    user = {"role": "user", "content": "a"}
    rows[1] = {"id": "q1", "messages": [user, user]}
    _write(source, rows)

    class Strict(ToyFrontend):
        def render(self, prompt, num_images):
            if not isinstance(prompt, str):
                raise jinja2.TemplateError("Conversation roles must alternate")
            return super().render(prompt, num_images)

    strict = dataclasses.replace(target(), frontend=Strict())
    job = GenerateJob(input=source, output=output, batch_size=5, options=OPTIONS)
    generate_answers(dataclasses.replace(decoder(), target=strict), job)
    made = _read(output)
    assert "roles must alternate" in made["q1"]["error"]
    assert all("text" in made[f"q{i}"] for i in (0, 2, 3, 4))


@pytest.mark.parametrize("name", ["out.jsonl.settings.json", "out.jsonl"])
def test_what_cannot_be_read_is_named_with_its_remedy(files, name):
    source, output = files
    job = GenerateJob(input=source, output=output, batch_size=2, options=OPTIONS)
    generate_answers(decoder(), job)
    for content in (b"[]\n", b'{"a": \n', b"\xff\xfe\n"):
        output.with_name(name).write_bytes(content)
        with pytest.raises(JobError, match=rf"{name}.* name another file for --output"):
            generate_answers(decoder(), job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gamma=20), "gamma is 20"),
        (dict(gamma=0), "gamma is 0"),
        (dict(top_p=2.0), "top_p"),
        (dict(batch_size=0), "batch_size"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(min_confidence=2.0), "min_confidence"),
    ],
)
def test_settings_out_of_range_are_found_before_anything_is_loaded(changes, message):
    assert change_decoding(DecodingConfig(), gamma=3).gamma == 3
    with pytest.raises(RequestError, match=message):
        change_decoding(DecodingConfig(), **changes)


def test_a_users_mistakes_end_in_one_line_and_ours_in_a_traceback(monkeypatch):
    from core_jax import commands as core_commands
    from massv_jax.commands import run_command

    caught = []
    monkeypatch.setattr(core_commands, "run_command", lambda *a, errors, **k: caught.extend(errors))
    run_command(lambda experiment, workdir: None)
    users = (*caught, *core_commands.core_errors())
    for error in (JobError, RequestError, TargetError, ProcessorError, BindingError):
        assert issubclass(error, users)
    assert not issubclass(TypeError, users)
    assert not issubclass(ValueError, users)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "no JSON object"),
        ('{"id": 1}', 'needs "prompt"'),
        ('{"id": 1, "messages": ["hello"]}', 'needs "prompt"'),
        ('{"id": 1, "messages": [{"role": "user", "content": null}]}', 'needs "prompt"'),
        ('{"id": "q0", "prompt": "x"}\n{"id": "q0", "prompt": "y"}', "was there before"),
    ],
)
def test_inputs_that_are_none(tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text(line + "\n")
    job = GenerateJob(input=source, output=tmp_path / "o", options=OPTIONS)
    with pytest.raises(JobError, match=message):
        generate_answers(decoder(), job)


def test_outputs_that_are_none(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"caption": "x"}\n')
    with pytest.raises(JobError, match="is no answer"):
        read_done(other)
    with pytest.raises(JobError, match="is missing"):
        generate_answers(decoder(), GenerateJob(input=tmp_path / "no", output=tmp_path / "o"))
    with pytest.raises(JobError, match="language_model"):
        generating.open_drafter_named("text", target_dir="x")
    assert row_seed("q1") != row_seed("q2")


@pytest.mark.slow
def test_the_command(qwen_pair, tmp_path):
    """A stand-alone process, with prompt lookup, twice."""
    Image.fromarray(np.full((40, 24, 3), 90, np.uint8)).save(tmp_path / "a.png")
    source = _write(tmp_path / "in.jsonl", [
        {"id": "x", "prompt": "what is it?", "image": "a.png"}, {"id": "y", "prompt": "two cats"},
    ])  # fmt: skip
    command = [
        sys.executable, "-m", "massv_jax.generate", "--target", str(qwen_pair.target),
        "--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "6",
        "--batch_size", "2",
    ]  # fmt: skip
    first = subprocess.run([*command, "--drafter", "lookup"], capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "target passes" in first.stdout
    made = _read(tmp_path / "out.jsonl")
    assert list(made) == ["x", "y"]
    wrong = subprocess.run([*command, "--drafter", "text"], capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert wrong.returncode == 1
    assert "language_model" in wrong.stderr
