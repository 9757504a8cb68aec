"""The commands in the documents: they parse, and each finds what an earlier one wrote."""

import importlib
import inspect
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = "faster-vlm.md"
# What a command reads of earlier outputs.
INPUTS = ("config.run.init_from", "config.data.answers", "config.model.drafter", "drafter")


def commands(document):
    """Words of every `python -m massv_jax...` of a document, with its variables put in."""
    text = (ROOT / "docs" / document).read_text().replace("\\\n", " ")
    named = dict(re.findall(r'^([A-Z_]+)="(.*)"$', text, flags=re.MULTILINE))
    for line in re.findall(r"^ *python -m (massv_jax\..*)$", text, flags=re.MULTILINE):
        yield shlex.split(re.sub(r"\$([A-Z_]+)", lambda m: named[m[1]], line))


def flags_of(words):
    """Name -> values; those without one are switches."""
    found = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found.setdefault(name, []).extend([value] if value else [])
        else:
            found[name].append(word)
    return found


def config_of(flags):
    """The config of --config, and the dotted names in it that flags change."""
    file, _, variant = flags["config"][0].partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    changed = [name.removeprefix("config.") for name in flags if name.startswith("config.")]
    return module.get_config(variant), changed


def value_at(config, dotted):
    for part in dotted.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("document", [GUIDE, "massv.md", "speculative.md"])
def test_commands_parse(document):
    found = list(commands(document))
    assert found
    for module, *words in found:
        source = inspect.getsource(importlib.import_module(module))
        known = {"config", "workdir", *re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)}
        flags = flags_of(words)
        if module == "massv_jax.compare":  # argparse
            known |= set(re.findall(r'"--(\w+)"', source))
        assert {n for n in flags if not n.startswith("config.")} <= known, (module, flags)
        if "config" in flags:
            config, changed = config_of(flags)
            for name in changed:
                value_at(config, name)  # a command line changes only what the file has


def test_the_guide_goes_from_one_output_to_the_next():
    written = set()
    modules = []
    for module, *words in commands(GUIDE):
        flags = flags_of(words)
        read = set()
        if "config" in flags and "phase1" not in flags["config"][0]:
            config, _ = config_of(flags)
            read |= {config.run.init_from, config.data.answers} - {""}
        for name in INPUTS:
            read |= set(flags.get(name, ()))
        read |= {arm.partition("=")[2] for arm in flags.get("arm", ()) if "=" in arm}
        if module == "massv_jax.export":
            read |= set(flags["workdir"])
        assert read <= written, (module, read - written)
        if module == "massv_jax.train":
            written |= set(flags["workdir"])
        written |= set(flags.get("out", ()))
        modules.append(module.removeprefix("massv_jax."))
    assert modules == ["train", "distill", "train", "export", "evaluate", "evaluate", "generate"]


def test_the_configs_defaults_are_the_documents_paths():
    from configs import massv_eval, massv_phase2

    written = {d for _, *words in commands("massv.md") for name in ("workdir", "out")
               for d in flags_of(words).get(name, ())}  # fmt: skip
    phase2 = massv_phase2.get_config("qwen2_5_vl_7b")
    drafter = massv_eval.get_config("qwen2_5_vl_7b").model.drafter
    assert {phase2.run.init_from, phase2.data.answers, drafter} <= written
