"""The command line of evaluation with tiny networks: a report, and a certificate."""

import json

import pytest
from PIL import Image

from massv_jax.loading import make_drafter, save_drafter
from tests.massv import tiny_pairs
from tests.massv.test_massv_commands import ROOT, run


@pytest.fixture
def flags(qwen_pair, tmp_path):
    save_drafter(tmp_path / "drafter", make_drafter(qwen_pair.target, qwen_pair.language_model))
    records = []
    for i, picture in enumerate(tiny_pairs.pictures(3)):
        Image.fromarray(picture).resize((48, 40)).save(tmp_path / f"{i}.png")
        ask = [{"from": "human", "value": "<image>\nwhat is it?"}]
        records.append({"id": f"e{i}", "image": f"{i}.png", "conversations": ask})
    (tmp_path / "held.json").write_text(json.dumps(records))
    return [
        f"--config.model.target={qwen_pair.target}", "--config.decoding.max_new_tokens=10",
        f"--config.model.language_model={qwen_pair.language_model}",
        f"--config.model.drafter={tmp_path / 'drafter'}", "--config.evaluation.gammas=(2,)",
        f"--config.evaluation.source.path={tmp_path / 'held.json'}",
        f"--config.evaluation.source.images={tmp_path}", "--config.decoding.gamma=2",
        "--config.decoding.batch_size=3", "--config.evaluation.temperatures=(0.0,)",
        "--config.evaluation.kernel_keys=4000", "--config.evaluation.contexts=2",
        "--config.evaluation.bootstrap_samples=20",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_report(flags, tmp_path):
    config = ["--config", ROOT / "configs" / "massv_eval.py:mini", "--out", tmp_path / "out"]
    code, out, error = run("massv_jax.evaluate", *config, *flags)
    assert code == 0, error
    assert "report.html" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())["massv"]
    arms = report["all"]["t0"]["gamma2"]
    assert set(arms) == {"text", "massv"}
    assert arms["massv"]["identical_to_plain"]["value"] == 1
    assert set(report["look"]["t0"]["gamma2"]["massv"]) > {"true", "blank", "other", "none"}
    # Two random networks of large weights have next to nothing in common.
    assert 0 < report["all"]["t0"]["forced"]["massv"]["all"]["tvd"]["value"] <= 1 + 1e-6
    code, _, error = run("massv_jax.evaluate", *config, *flags, "--arm", "x")
    assert code == 1
    assert error.startswith("error: --arm 'x'")


@pytest.mark.slow
def test_a_certificate_of_the_command(flags, tmp_path):
    config = ["--config", ROOT / "configs" / "massv_lossless.py:mini", "--out", tmp_path / "out"]
    code, out, error = run("massv_jax.evaluate", *config, *flags)
    content = json.loads((tmp_path / "out" / "certificate.json").read_text())
    # Where p and q have nothing in common a wrong rule may go unnoticed, and there is no
    # certificate; every check of the right one passes.
    assert (code == 0) == content["passed"], error
    assert content["checks"]["accept_rule.massv"]["rules"]["rejection"]["as_it_must"]
    assert "greedy.massv.gamma2: passed; 3 of 3 answers the same" in out
    assert content["checks"]["window_logits"]["flipped"] == 0
    assert len(content["target"]["weights"]) == 64
