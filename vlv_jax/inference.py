"""The two classes that users hold: `Captioner` and `Autoencoder`."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from core_jax.config import to_dataclass
from core_jax.data.images import ImageLimits, decode_image, upright_rgb
from vlv_jax.batches import ImageViews, views_of
from vlv_jax.captioning import decode_texts, generate_captions, prefix_of_images
from vlv_jax.encoding import caption_embeddings, context_of_text, image_features
from vlv_jax.experiment import Experiment, SamplingConfig
from vlv_jax.loading import Pieces, cast_frozen, load_networks, text_ids
from vlv_jax.networks import Networks
from vlv_jax.redrawing import redraw, redraw_embeddings
from vlv_jax.workdir import (
    EXPORT_FILE,
    WorkdirError,
    added_params,
    assemble,
    experiment_to_use,
    exported_model,
    is_export,
    load_experiment,
    overlay,
)

ImageLike = Image.Image | np.ndarray | str | pathlib.Path | bytes


@dataclasses.dataclass(frozen=True)
class Caption:
    """One caption.

    Attributes:
      text: the caption, nothing cut or cleaned.
      finished: whether it ended by itself rather than at the length limit.
      num_tokens: generated tokens, the end included.
    """

    text: str
    finished: bool
    num_tokens: int


@dataclasses.dataclass
class _Loaded:
    networks: Networks
    params: Any
    pieces: Pieces
    views: ImageViews
    sampling: SamplingConfig
    limits: ImageLimits

    @classmethod
    def from_pretrained(
        cls, path: str | pathlib.Path, *, experiment: Experiment | None = None, **options
    ):
        """Loads an exported directory, or a working directory of `vlv_jax.train`.

        Args:
          path: the directory.
          experiment: overrides the working directory's own config; of an export its sampling,
            precision, execution and limits of images.
          **options: of `assemble` or `load_networks`: which networks are needed.

        Raises:
          WorkdirError: the directory is neither.
        """
        path = pathlib.Path(path)
        if is_export(path):
            return cls._from_export(path, experiment, **options)
        if not path.is_dir():
            raise WorkdirError(f"{path} is not a directory")
        experiment = experiment or load_experiment(path)
        networks, params, pieces = assemble(experiment, workdir=path, **options)
        views = views_of(experiment.data, pieces.processor)
        if views.crop == "random":  # of training; what is used is the whole picture's centre
            views = dataclasses.replace(views, crop="center")
        return cls(
            networks, cast_frozen(params, experiment.model), pieces, views, experiment.sampling,
            experiment.data.limits,
        )  # fmt: skip

    @classmethod
    def _from_export(cls, path: pathlib.Path, experiment: Experiment | None, **options):
        content = json.loads((path / EXPORT_FILE).read_text())
        model = exported_model(path, experiment.model if experiment else None)
        networks, params, pieces = load_networks(model, **options)
        added = {n: t for n, t in added_params(path).items() if n in params}
        params = cast_frozen(overlay(params, added, where=str(path)), model)
        views = ImageViews(pieces.processor, **content["views"])
        if experiment:
            sampling, limits = experiment.sampling, experiment.data.limits
        else:
            sampling = to_dataclass(SamplingConfig, content["sampling"], path="sampling")
            limits = to_dataclass(ImageLimits, content.get("limits", {}), path="limits")
        return cls(networks, params, pieces, views, sampling, limits)

    def with_sampling(self, **changes: Any) -> Self:
        """The same networks, used in another way.

        Args:
          **changes: fields of `SamplingConfig`.
        """
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, **changes))

    def _views(self, images: Sequence[ImageLike]) -> dict[str, np.ndarray]:
        rows = [self.views(_open(image, self.limits)) for image in images]
        return {k: np.stack([r[k] for r in rows]) for k in ("image", "florence_image")}

    def _batches(self, count: int):
        """(start, stop) of each batch; the caller pads the last to the full size."""
        size = self.sampling.batch_size
        return [(i, min(i + size, count)) for i in range(0, count, size)]

    def pad_batch(self, array: np.ndarray) -> np.ndarray:
        """Fills a batch with its last row, so that one compiled program serves every batch."""
        missing = self.sampling.batch_size - len(array)
        if missing <= 0:
            return array
        return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def _open(image: ImageLike, limits: ImageLimits) -> Image.Image:
    if isinstance(image, Image.Image):
        return upright_rgb(image, limits)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"arrays must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
        return upright_rgb(Image.fromarray(image), limits)
    return decode_image(pathlib.Path(image) if isinstance(image, str) else image, limits)


class Captioner(_Loaded):
    """Writes captions: `Captioner.from_pretrained(directory).caption(images)`."""

    @classmethod
    def from_pretrained(cls, path: str | pathlib.Path, **options) -> "Captioner":
        """Loads a stage-2 run or its export; see `_Loaded.from_pretrained`."""
        loaded = super().from_pretrained(path, with_decoder=False, **options)
        if loaded.networks.language_model is None:
            raise WorkdirError(
                f"{path} has no language model: it is a stage-1 run, which can redraw images but "
                "not caption them. Train stage 2 from it"
            )
        return loaded

    def caption(
        self, images: Sequence[ImageLike], *, seed: int | None = None, **changes: Any
    ) -> list[Caption]:
        """Captions images.

        Args:
          images: Pillow images, uint8 arrays [H, W, 3], paths, or encoded bytes.
          seed: of sampling.
          **changes: fields of `SamplingConfig` to change, such as num_beams=4.

        Raises:
          BadImage: an image cannot be used.
        """
        if changes:
            return self.with_sampling(**changes).caption(images, seed=seed)
        out: list[Caption] = []
        for start, stop in self._batches(len(images)):
            views = self._views(images[start:stop])["florence_image"]
            out += self.caption_views(views, rows=np.arange(start, stop), seed=seed)
        return out

    def caption_views(
        self,
        views: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> list[Caption]:
        """Captions one batch of Florence-2 views, uint8 [n, H, W, 3], n <= batch_size.

        Args:
          views: from `ImageViews`.
          rows: a number for each image, which its samples are keyed by.
          seed: of sampling.
          **changes: as in `caption`.
        """
        if changes:
            return self.with_sampling(**changes).caption_views(views, rows=rows, seed=seed)
        config, count = self.sampling, len(views)
        rows = np.arange(count) if rows is None else rows
        prefix = prefix_of_images(self.networks, self.params, jnp.asarray(self.pad_batch(views)))
        tokenizer = self.pieces.lm_tokenizer
        key = jax.random.key(config.seed if seed is None else seed)
        generated = generate_captions(
            self.networks, self.params, prefix, config,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            key=key if config.temperature > 0 else None,
            row_seeds=jnp.asarray(self.pad_batch(rows.astype(np.int32))),
        )  # fmt: skip
        texts = decode_texts(tokenizer, generated)
        finished, lengths = jax.device_get((generated.finished, generated.lengths))
        return [
            Caption(t, bool(f), int(n))
            for t, f, n in zip(texts[:count], finished[:count], lengths[:count], strict=True)
        ]


class Autoencoder(_Loaded):
    """Images to caption embeddings and back."""

    @classmethod
    def from_pretrained(cls, path: str | pathlib.Path, **options) -> "Autoencoder":
        """Loads a run of either stage, or its export; see `_Loaded.from_pretrained`."""
        return super().from_pretrained(path, with_language_model=False, **options)

    def encode(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Caption embeddings z, float32 [n, Q, E].

        Args:
          images: at least one; see `Captioner.caption`.

        Raises:
          BadImage: an image cannot be used.
          ValueError: there is none.
        """
        if not len(images):
            raise ValueError("no images were given")
        out = []
        for start, stop in self._batches(len(images)):
            out.append(self.encode_views(self._views(images[start:stop])["florence_image"]))
        return np.concatenate(out)

    def encode_views(self, views: np.ndarray) -> np.ndarray:
        """`encode` of one batch of Florence-2 views, uint8 [n, H, W, 3], n <= batch_size."""
        z = _encode(self.networks, self.params, jnp.asarray(self.pad_batch(views)))
        return np.asarray(z.astype(jnp.float32))[: len(views)]

    def reconstruct(
        self,
        embeddings: np.ndarray | Sequence[ImageLike],
        *,
        seed: int | None = None,
        start: int = 0,
        **changes: Any,
    ) -> np.ndarray:
        """Redraws images, uint8 [n, H, W, 3].

        Args:
          embeddings: from `encode` ([n, Q, E], Q <= 77, `vlv_jax.redrawing.compose` included),
            or images, which are encoded first.
          seed: of the initial noise; image i draws the same noise whatever else is redrawn.
          start: the first row's number, for a long job in parts of whole batches.
          **changes: fields of `SamplingConfig` to change, such as guidance=1.0.
        """
        if not (isinstance(embeddings, np.ndarray) and embeddings.ndim == 3
                and embeddings.dtype != np.uint8):  # fmt: skip
            embeddings = self.encode(embeddings)
        return self._redraw(embeddings, redraw_embeddings, seed, changes, start)

    def draw_texts(
        self, captions: Sequence[str], *, seed: int | None = None, start: int = 0, **changes: Any
    ) -> np.ndarray:
        """Draws images from captions, as the diffusion pipeline itself does: uint8 [n, H, W, 3].

        For `start` see `reconstruct`.
        """
        length = self.networks.text_encoder.config.max_position_embeddings
        ids = np.asarray(text_ids(self.pieces.text_tokenizer, list(captions), length), np.int32)
        return self._redraw(ids, _redraw_ids, seed, changes, start)

    def _redraw(self, inputs, function, seed, changes, first=0) -> np.ndarray:
        if changes:
            return self.with_sampling(**changes)._redraw(inputs, function, seed, {}, first)
        if not len(inputs):
            raise ValueError("there is nothing to draw: no embeddings and no captions were given")
        config = self.sampling
        factor = self.networks.vae.config.downsampling
        size = self.views.size // factor
        key = jax.random.key(config.seed if seed is None else seed)
        out = []
        for start, stop in self._batches(len(inputs)):
            number = (first + start) // self.sampling.batch_size
            images = function(
                self.networks, self.params, jnp.asarray(self.pad_batch(inputs[start:stop])),
                jax.random.fold_in(key, number), config, latent_size=(size, size),
            )  # fmt: skip
            out.append(np.asarray(images)[: stop - start])
        return np.concatenate(out)


def load_pair(
    path: str | pathlib.Path, *, experiment: Experiment | None = None
) -> tuple[Autoencoder, Captioner | None]:
    """Both classes on one copy of the parameters; no captioner where there is no language model.

    Args:
      path: a working directory or an exported one.
      experiment: see `_Loaded.from_pretrained`.
    """
    loaded = _Loaded.from_pretrained(path, experiment=experiment)
    fields = {f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}
    has_captions = loaded.networks.language_model is not None
    return Autoencoder(**fields), Captioner(**fields) if has_captions else None


def _redraw_ids(networks, params, ids, key, config, *, latent_size):
    context = context_of_text(networks, params, ids)
    return redraw(networks, params, context, key, config, latent_size=latent_size)


_Kind = TypeVar("_Kind", bound=_Loaded)


@functools.partial(jax.jit, static_argnames=("networks",))
def _encode(networks: Networks, params: Any, views: jax.Array) -> jax.Array:
    return caption_embeddings(networks, params, image_features(networks, params, views))


def load_for_command(
    kind: type[_Kind],
    experiment: Experiment | None,
    workdir: pathlib.Path | None,
    source: str | None,
    **changes: Any,
) -> _Kind:
    """The captioner or autoencoder that a command's flags name.

    Args:
      kind: `Captioner` or `Autoencoder`.
      experiment: from the config file; its sampling, precision and execution are used, and with
        an export its limits of images. None: the directory's own.
      workdir: of a run.
      source: an exported directory (or another run), in the place of `workdir`.
      **changes: fields of `SamplingConfig`; None leaves one as it is.

    Raises:
      WorkdirError: none or both directories given, or not such a directory.
      ConfigError: an impossible setting.
    """
    if (workdir is None) == (source is None):
        raise WorkdirError("name one directory: --workdir RUN, or --from EXPORTED_DIRECTORY")
    path = pathlib.Path(source).expanduser() if source is not None else workdir
    used = experiment
    if experiment and not is_export(path):
        used = experiment_to_use(path, experiment)
    loaded = kind.from_pretrained(path, experiment=used)
    sampling = dataclasses.asdict(experiment.sampling if experiment else loaded.sampling)
    sampling |= {name: value for name, value in changes.items() if value is not None}
    loaded.sampling = to_dataclass(SamplingConfig, sampling, path="sampling")
    return loaded
