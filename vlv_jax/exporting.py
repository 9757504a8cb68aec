"""One directory with everything a trained model needs, in the hub's layouts.

vlv_config.json      what the parts are for: queries, prompt, views, sampling, precision
vlv.safetensors      queries, projection phi and, of a captioner, projection psi
florence2/           as transformers loads it, with tokenizer and preprocessor
stable-diffusion/    a diffusers pipeline
language_model/      of a captioner: as transformers loads it, with tokenizer
README.md            the model card
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from core_jax.convert.safetensors_write import write_tensors
from core_jax.models import save_model
from core_jax.partition import flatten
from core_jax.train.workdir import newest_step
from vlv_jax import networks as names
from vlv_jax.experiment import Experiment, ModelConfig
from vlv_jax.model_card import model_card
from vlv_jax.networks import Networks
from vlv_jax.workdir import (
    EXPORT_FILE,
    EXPORT_WEIGHTS,
    WorkdirError,
    assemble,
    experiment_to_use,
    is_export,
)

FORMAT = 1
_PIPELINE = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exportable:
    """A model that can be written.

    Attributes:
      experiment: how it was made; its model config names the directories that tokenizers and
        preprocessors are copied from.
      networks, params: all of it, UNet and VAE included.
      origin: a sentence about where the weights come from.
      facts: for the model card, such as the step.
    """

    experiment: Experiment
    networks: Networks
    params: Mapping[str, Any]
    origin: str
    facts: Mapping[str, Any]


def exportable_run(experiment: Experiment, workdir: pathlib.Path) -> Exportable:
    """The newest checkpoint of a run of either stage; the averaged weights where it kept them.

    Raises:
      WorkdirError: it is no run, or has no checkpoint yet.
    """
    experiment = experiment_to_use(workdir, experiment)
    networks, params, _ = assemble(
        experiment, workdir=workdir, with_language_model=experiment.stage == 2, prefer_ema=True
    )
    averaged = experiment.run.ema_decay is not None
    return Exportable(
        experiment=experiment,
        networks=networks,
        params=params,
        origin=f"Stage {experiment.stage} of VLV, trained with this repository.",
        facts={
            "step": newest_step(workdir),
            "weights": f"moving average, decay {experiment.run.ema_decay}" if averaged else "last",
        },
    )


def write_export(
    model: Exportable,
    out: pathlib.Path,
    *,
    dtype: str | None = None,
    report: Mapping[str, Any] | None = None,
) -> None:
    """Writes the directory; it appears under its name only when it is whole.

    Args:
      model: from `exportable_run` or vlv_jax.released.
      out: a new directory, or an earlier export, which is replaced.
      dtype: type of the stored weights, the VAE's excepted (it loses detail in half precision);
        None: each as it is held (what was trained in float32, the hub's as on the hub).
      report: the content of report.json for the model card.

    Raises:
      WorkdirError: `out` holds something else.
    """
    out = pathlib.Path(out)
    if out.exists() and not is_export(out) and (not out.is_dir() or any(out.iterdir())):
        raise WorkdirError(f"{out} is there and is no export; name another directory for --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-writing-"))
    try:
        _write_parts(model, scratch, dtype)
        (scratch / EXPORT_FILE).write_text(json.dumps(export_config(model), indent=2) + "\n")
        has_lm = model.networks.language_model is not None
        card = model_card(
            model.experiment, has_language_model=has_lm, origin=model.origin,
            facts=model.facts, report=report or {},
        )  # fmt: skip
        (scratch / "README.md").write_text(card, encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's are private
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def export_config(model: Exportable) -> dict[str, Any]:
    """The content of vlv_config.json."""
    config, data = model.experiment.model, model.experiment.data
    return {
        "format": FORMAT,
        "has_language_model": model.networks.language_model is not None,
        "num_queries": model.networks.bridge.num_queries,
        "task_prompt": config.task_prompt,
        "frozen_dtype": config.frozen_dtype,
        "vae_dtype": config.vae_dtype,
        "views": {
            "size": data.image_size,
            # Random crops are for training.
            "crop": "center" if data.crop == "random" else data.crop,
            "resample": data.resample,
            "native_crops": data.native_crops,
        },
        "limits": dataclasses.asdict(data.limits),
        "sampling": dataclasses.asdict(model.experiment.sampling),
    }


def _write_parts(model: Exportable, out: pathlib.Path, dtype: str | None) -> None:
    config, networks, params = model.experiment.model, model.networks, model.params
    save_model(out / "florence2", networks.florence2, params[names.FLORENCE2], dtype=dtype)
    copy_companions(pathlib.Path(config.florence2), out / "florence2")
    pipeline, source = out / "stable-diffusion", pathlib.Path(config.diffusion)
    save_model(
        pipeline / "text_encoder", networks.text_encoder, params[names.TEXT_ENCODER], dtype=dtype
    )
    save_model(pipeline / "unet", networks.unet, params[names.UNET], dtype=dtype)
    save_model(pipeline / "vae", networks.vae, params[names.VAE])
    write_pipeline_files(source, pipeline)
    if networks.language_model is not None:
        weights = params[names.LANGUAGE_MODEL]
        save_model(out / "language_model", networks.language_model, weights, dtype=dtype)
        copy_companions(pathlib.Path(config.language_model), out / "language_model")
    own = {k: params[k] for k in (names.BRIDGE, names.PROJECTOR) if k in params}
    tensors = (
        (name.replace("/", "."), _stored(leaf, dtype)) for name, leaf in flatten(own).items()
    )
    write_tensors(out, tensors, file_name=EXPORT_WEIGHTS)


def _stored(leaf: Any, dtype: str | None) -> np.ndarray:
    import ml_dtypes

    kinds = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    array = np.asarray(leaf)
    return array if dtype is None else array.astype(kinds[dtype])


def copy_companions(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies tokenizer, preprocessor and licence files; never weights, configurations or code."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        is_text = file.suffix in (".json", ".txt", ".jinja", ".model")
        is_licence = file.name.lower().startswith(("license", "licence", "notice"))
        is_ours = file.name == "config.json" or file.name.endswith(".index.json")
        if file.is_file() and (is_text or is_licence) and not is_ours:
            shutil.copyfile(file, target / file.name)


def write_pipeline_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Tokenizer, scheduler and model_index.json of a diffusers pipeline.

    A safety checker and its feature extractor are neither used nor copied, and the index says so.
    """
    copy_companions(source / "tokenizer", target / "tokenizer")
    (target / "scheduler").mkdir(parents=True, exist_ok=True)
    scheduler = source / "scheduler" / "scheduler_config.json"
    shutil.copyfile(scheduler, target / "scheduler" / "scheduler_config.json")
    file = source / "model_index.json"
    index = json.loads(file.read_text()) if file.is_file() else {}
    kept = {k: v for k, v in index.items() if not isinstance(v, list) or k in _PIPELINE}
    dropped = {k: [None, None] for k, v in index.items() if isinstance(v, list) and k not in kept}
    default = {
        "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }  # fmt: skip
    name = json.loads(scheduler.read_text()).get("_class_name", "DDPMScheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        **default, **_PIPELINE, **dropped, **kept, "scheduler": ["diffusers", name],
    }  # fmt: skip
    index["requires_safety_checker"] = False
    for licence in [*source.glob("LICENSE*"), *source.glob("LICENCE*")]:
        shutil.copyfile(licence, target / licence.name)
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def with_model(experiment: Experiment, **changes: Any) -> Experiment:
    """An experiment with other fields of its model config."""
    model: ModelConfig = dataclasses.replace(experiment.model, **changes)
    return dataclasses.replace(experiment, model=model)
