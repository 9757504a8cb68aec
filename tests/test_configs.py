"""The config files: every value can be set from a command line, and means what it says."""

import importlib
import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import common
from core_jax.commands import config_names
from core_jax.config import ConfigError, to_dataclass

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ("__init__", "common")
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in SHARED)


def _variants(module):
    """Every variant of a config file: its own refusal lists them."""
    with pytest.raises(ValueError, match="variants") as caught:
        module.get_config("no such variant")
    quoted = str(caught.value).split("'")[1::2]
    return [word for word in quoted if word != "no such variant"]


def _module(name):
    return importlib.import_module(f"configs.{name}")


def _experiment(name):
    return importlib.import_module(f"{name.split('_')[0]}_jax.experiment").Experiment


def _has(config, name):
    *groups, last = name.split(".")
    for group in groups:
        config = config[group]
    return last in config


def parse(monkeypatch, file, *arguments):
    """The typed experiment of a command line, read as the commands read it."""
    argv = ["command", f"--config={ROOT / 'configs' / file}", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    values(argv)
    return to_dataclass(_experiment(file), config.value.to_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_of_every_config_means_something(name):
    module, experiment = _module(name), _experiment(name)
    variants = _variants(module)
    assert "" in variants
    assert any("mini" in v for v in variants)
    for variant in variants:
        config = module.get_config(variant).lock()
        typed = to_dataclass(experiment, config.to_dict())
        assert typed == to_dataclass(experiment, module.get_config(variant).to_dict())


def test_the_default_variant_is_the_empty_one():
    for name in CONFIGS:
        assert _module(name).get_config().to_dict() == _module(name).get_config("").to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_of_every_variant_can_be_set(name):
    """A command line changes only what a config has."""
    wanted = config_names(_experiment(name)) | {f"run.mesh.{a}" for a in ("data", "fsdp", "tensor")}
    for variant in _variants(_module(name)):
        config = _module(name).get_config(variant).lock()
        assert [path for path in sorted(wanted) if not _has(config, path)] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_added_changes_nothing(name, monkeypatch):
    """Records of runs compare typed experiments."""
    variants, cls = _variants(_module(name)), _experiment(name)
    whole = [to_dataclass(cls, _module(name).get_config(v).to_dict()) for v in variants]
    monkeypatch.setattr(common, "_add_defaults", lambda config, cls: None)
    written = [_module(name).get_config(v) for v in variants]
    assert not _has(written[0], "optimizer.eps")
    assert [to_dataclass(cls, config.to_dict()) for config in written] == whole


def test_a_command_line_sets_values_that_no_config_file_writes(monkeypatch):
    told = parse(
        monkeypatch, "vlv_stage2.py:1.5b",
        "--config.data.source.name=coco_captions", "--config.data.source.split=train[:10%]",
        "--config.data.source.path=", "--config.data.source.follow_symlinks=true",
        "--config.data.limits.max_pixels=1000", "--config.optimizer.min_ratio=0.1",
        "--config.optimizer.weight_decay_mask=('.*/kernel',)", "--config.run.ema_decay=0.9",
        "--config.run.mesh.tensor=2", "--config.evaluation.source.path=held_out",
    )  # fmt: skip
    source = told.data.source
    assert (source.kind, source.name, source.split) == ("auto", "coco_captions", "train[:10%]")
    assert source.path is None
    assert source.follow_symlinks is True
    assert told.data.limits.max_pixels == 1000
    assert (told.optimizer.min_ratio, told.optimizer.weight_decay_mask) == (0.1, (".*/kernel",))
    assert told.run.ema_decay == 0.9
    assert list(told.run.mesh.items()) == [("data", 1), ("fsdp", -1), ("tensor", 2)]
    assert told.evaluation.source.path == "held_out"


def test_an_unknown_value_is_still_refused(monkeypatch):
    with pytest.raises((AttributeError, KeyError), match="lerning_rate"):
        parse(monkeypatch, "vlv_stage1.py", "--config.optimizer.lerning_rate=1")


@pytest.mark.parametrize("file", ["vlv_stage2.py:mini", "massv_phase2.py:mini"])
def test_the_decay_ends_with_the_run(file, monkeypatch):
    told = parse(monkeypatch, file, "--config.run.steps=6000")
    assert (told.run.steps, told.optimizer.total_steps) == (6000, 6000)
    longer = parse(monkeypatch, file, "--config.optimizer.total_steps=9000")
    assert longer.optimizer.total_steps == 9000
    assert longer.run.steps == parse(monkeypatch, file).run.steps


@pytest.mark.parametrize("file", ["vlv_stage2.py:mini", "massv_phase2.py:mini"])
def test_a_run_that_would_go_on_without_learning_is_refused(file, monkeypatch):
    steps = ("--config.run.steps=600", "--config.optimizer.total_steps=500")
    with pytest.raises(ConfigError, match=r"optimizer\.total_steps=500.*run\.steps=600"):
        parse(monkeypatch, file, *steps)
    parse(monkeypatch, file, *steps, "--config.optimizer.min_ratio=0.1")
    parse(monkeypatch, file, *steps, "--config.optimizer.schedule=constant")
    with pytest.raises(ConfigError, match=r"fewer, such as optimizer\.warmup_steps=0"):
        parse(monkeypatch, file, "--config.run.steps=2")


BOTH = ("vlv_stage1.py:mini", "massv_phase1.py:mini")


@pytest.mark.parametrize(
    ("files", "given", "said"),
    [
        (BOTH, "run.steps=0", r"\(run\.steps unless set\) is 0; it must be at least 1"),
        (BOTH, "run.keep=0", r"run\.keep is 0; it must be at least 1"),
        (BOTH, "run.log_every=0", r"run\.log_every is 0"),
        (BOTH, "run.save_every=0", r"run\.save_every is 0"),
        (BOTH, "run.grad_accum=0", r"run\.grad_accum is 0"),
        (BOTH, "run.grad_accum=3", r"data\.batch_size \d+ does not divide into run\.grad_accum 3"),
        (BOTH, "run.ema_decay=1.5", r"run\.ema_decay is 1\.5; it must lie in \[0, 1\)"),
        (BOTH, "data.batch_size=0", r"data\.batch_size is 0"),
        (BOTH, "data.max_bad_fraction=2", r"data\.max_bad_fraction is 2.0; .* \[0, 1\]"),
        (BOTH, "optimizer.learning_rate=0", r"optimizer\.learning_rate is 0.0; it must be posit"),
        (BOTH, "optimizer.learning_rate=nan", r"optimizer\.learning_rate is nan"),
        (BOTH[:1], "run.sample_every=-1", r"run\.sample_every is -1"),
        (BOTH[:1], "model.num_queries=0", r"model\.num_queries is 0"),
        (BOTH[:1], "data.max_tokens=0", r"data\.max_tokens is 0"),
        (BOTH[:1], "sampling.batch_size=0", r"sampling\.batch_size is 0"),
        (BOTH[:1], "sampling.top_p=0", r"sampling\.top_p is 0.0"),
        (BOTH[:1], "evaluation.bootstrap_samples=0", r"evaluation\.bootstrap_samples is 0"),
        (BOTH[1:], "distill.batch_size=0", r"distill\.batch_size is 0"),
        (BOTH[1:], "decoding.gamma=0", r"decoding\.gamma is 0; it must be from 1 to 16"),
        (BOTH[1:], "decoding.prompt_lengths=()", r"decoding\.prompt_lengths is \(\)"),
        (BOTH[1:], "evaluation.gammas=(5, 17)", r"evaluation\.gammas has 17"),
    ],
)  # fmt: skip
def test_values_without_a_meaning_are_refused(files, given, said, monkeypatch):
    """Before anything is loaded; with a message that has the value's name and the remedy."""
    for file in files:
        with pytest.raises(ConfigError, match=said):
            parse(monkeypatch, file, f"--config.{given}")


def test_beams_and_temperature_exclude_each_other(monkeypatch):
    both = ("--config.sampling.num_beams=4", "--config.sampling.temperature=0.7")
    with pytest.raises(ConfigError, match=r"num_beams 4 and sampling\.temperature 0\.7 exclude"):
        parse(monkeypatch, "vlv_stage2.py:mini", *both)
    for one in both:
        parse(monkeypatch, "vlv_stage2.py:mini", one)
