"""Plain and speculative decoding against transformers' generate and assisted generation.

    python -m benchmarks.speculative --size=larger [--gamma=5] [--noise=0.03]
    python -m benchmarks.speculative --size=mini --target=DIR --drafter=EXPORTED_DIR

"larger" is a random Qwen2.5-VL of 43 million parameters with a drafter of 16 million that agrees
with it (benchmarks.pairs); "mini" times two directories, by default the miniature's target and the
demo's drafter. A call asks one question about each picture, at batch 1: image processing, tower,
prompt, all tokens, back on the host. Both sides get their pixels and tokens from the same code.

Stock transformers hides the image from an assistant ("image hidden"); the lines that mend it are
those of the exported drafter's own model card, run as they stand there.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.alternate import Arguments, Benchmark, UnavailableError, main
from benchmarks.pairs import SIZES as RANDOM_SIZES
from benchmarks.pairs import Pair, pictures, write_random_pair
from benchmarks.provenance import ROOT
from benchmarks.timing import Measured

PLAIN, SPECULATIVE, HIDDEN = "plain", "speculative", "speculative, peer's image hidden"
QUESTION = "Describe the image in detail."
MINI = Pair(
    ROOT / "miniature" / "checkpoints" / "qwen2.5-vl", ROOT / "runs" / "demo" / "massv" / "drafter"
)
SIZES = (*RANDOM_SIZES, "mini")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    parser.add_argument("--gamma", type=int, default=5, help="drafts of a window")
    parser.add_argument("--prompts", type=int, default=4, help="pictures that a call asks about")


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Which target and drafter, and how long they answer."""
    parser.add_argument("--size", choices=SIZES, default="larger")
    parser.add_argument("--target", type=pathlib.Path, default=MINI.target, help="of mini")
    parser.add_argument("--drafter", type=pathlib.Path, default=MINI.drafter, help="of mini")
    parser.add_argument("--new", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--noise", type=float, default=0.03, help="in a random drafter's weights")


def _pair(arguments: Arguments, folder: pathlib.Path) -> Pair:
    if arguments.size in RANDOM_SIZES:
        return Pair(folder / "target", folder / "drafter")
    return Pair(arguments.target, arguments.drafter)


def prepare(arguments: Arguments, folder: pathlib.Path) -> Mapping[str, Any]:
    """Writes the pictures, and the pair if it is a random one; returns the sizes of both.

    Raises:
      SystemExit: a directory that is named is none.
    """
    from core_jax.models import load_model
    from core_jax.partition import count_parameters

    if arguments.size in RANDOM_SIZES:
        write_random_pair(folder, RANDOM_SIZES[arguments.size], noise=arguments.noise)
    pair = _pair(arguments, folder)
    for path in (pair.target, pair.drafter):
        if not (path / "config.json").is_file():
            raise SystemExit(
                f"error: {path} is no hub directory; --size=mini times a target and an exported "
                "drafter (python -m massv_jax.export), named by --target and --drafter"
            )
    np.save(folder / "pictures.npy", pictures(_count(arguments)))
    sizes = {
        name: count_parameters(load_model(path)[1]["language_model"])
        for name, path in (("target", pair.target), ("drafter", pair.drafter))
    }
    return {f"{name}'s language model, parameters": n for name, n in sizes.items()}


def _count(arguments: Arguments) -> int:
    return 1 if arguments.size == "tiny" else arguments.prompts


def new_tokens(arguments: Arguments) -> int:
    """Most tokens of an answer."""
    return 8 if arguments.size == "tiny" else arguments.new


def _padded(rows: list[np.ndarray], length: int) -> np.ndarray:
    out = np.full((len(rows), length), -1, np.int64)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = tokens
    return out


def open_pair(arguments: Arguments, folder: pathlib.Path) -> tuple[Any, Any]:
    """Target and drafter in float32; answers of random ones have no end but their limit."""
    from core_jax.decode.target import load_target
    from massv_jax import load_drafter

    pair = _pair(arguments, folder)
    target = load_target(pair.target, dtype="float32")
    if arguments.size in RANDOM_SIZES:
        target = dataclasses.replace(target, eos_ids=())
    return target, load_drafter(pair.drafter, pair.target, dtype="float32", loaded=target)


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from massv_jax import SpeculativeDecoder
    from massv_jax.speculative.counts import Statistics

    target, drafter = open_pair(arguments, folder)
    seen, new = np.load(folder / "pictures.npy"), new_tokens(arguments)
    sessions: list[Any] = []

    def call_of(decoder: SpeculativeDecoder, gamma: int) -> Callable[[], np.ndarray]:
        def call():
            sessions.clear()
            rows = []
            for picture in seen:
                session = decoder.begin(
                    [picture], [QUESTION], max_new_tokens=new, max_gamma=max(gamma, 1)
                )
                session.advance(gamma)
                tokens, lengths = session.tokens()
                rows.append(tokens[0, : lengths[0]])
                sessions.append(session)
            return _padded(rows, new)

        return call

    measured, repeats = Measured(), arguments.repeats
    plain = call_of(SpeculativeDecoder(target, None), 0)
    measured.outputs[PLAIN] = measured.time(PLAIN, plain, repeats=repeats)
    drafted = call_of(SpeculativeDecoder(target, drafter), arguments.gamma)
    measured.outputs[SPECULATIVE] = measured.time(SPECULATIVE, drafted, repeats=repeats)
    measured.seconds[HIDDEN] = measured.seconds[SPECULATIVE]
    measured.outputs[HIDDEN] = measured.outputs[SPECULATIVE]
    total = Statistics.concatenate([session.statistics() for session in sessions]).total
    tokens = int((measured.outputs[PLAIN] >= 0).sum())
    measured.facts["tokens a call"] = tokens
    measured.facts["tokens a round"] = float(total.emitted_length[0])
    return measured


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from benchmarks.torch_peer import load_class, load_torch
    from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor

    torch = load_torch(arguments.threads)
    cls = load_class("transformers", "Qwen2_5_VLForConditionalGeneration")
    pair, new = _pair(arguments, folder), new_tokens(arguments)
    target, assistant = (
        cls.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        for path in (pair.target, pair.drafter)
    )
    settings = assistant.generation_config
    settings.num_assistant_tokens = arguments.gamma
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0  # drafts all of a window, as we do
    processor = Qwen2_5_VLProcessor.from_pretrained(pair.target)
    seen, sighted = np.load(folder / "pictures.npy"), sighted_of(pair.drafter)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    image_id = processor.config.image_token_id
    options = {"max_new_tokens": new, "do_sample": False}
    if arguments.size in RANDOM_SIZES:
        options |= {"eos_token_id": None, "pad_token_id": 0}
    stock = assistant.prepare_inputs_for_generation

    def inputs_of(picture: np.ndarray) -> dict[str, Any]:
        ids = torch.tensor(processor([processor.render(message)], [[picture]]).ids).long()
        patches, grid = processor.image_processor(picture)
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.tensor(patches), "image_grid_thw": torch.tensor([grid]),
            "mm_token_type_ids": (ids == image_id).int(),
        }  # fmt: skip

    def call_of(drafts: str) -> Callable[[], np.ndarray]:
        def call():
            rows = []
            for picture in seen:
                inputs = inputs_of(picture)
                images = {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
                extra = {} if drafts == PLAIN else {"assistant_model": assistant}
                assistant.prepare_inputs_for_generation = stock
                if drafts == SPECULATIVE:
                    sighted(assistant, **images)
                with torch.inference_mode():
                    out = target.generate(**inputs, **options, **extra)
                rows.append(out[0, inputs["input_ids"].shape[1] :].numpy())
            return _padded(rows, new)

        return call

    measured = Measured(facts={"threads": torch.get_num_threads()})
    for name in (PLAIN, SPECULATIVE, HIDDEN):
        measured.outputs[name] = measured.time(name, call_of(name), repeats=arguments.repeats)
    return measured


def sighted_of(drafter: pathlib.Path) -> Callable[..., Any]:
    """`sighted` as the drafter's model card has it.

    Raises:
      UnavailableError: the card has no such lines.
    """
    card = (drafter / "README.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    code = next((block for block in blocks if "def sighted" in block), "")
    if not code:
        raise UnavailableError(f"{drafter}/README.md does not say how transformers sees an image")
    names: dict[str, Any] = {}
    exec(code.partition("\nimages = ")[0], names)  # our own model card's lines
    return names["sighted"]


BENCHMARK = Benchmark(
    module="benchmarks.speculative",
    peer="transformers, PyTorch eager",
    add_arguments=_add_arguments,
    name=lambda a: f"speculative-{a.size}-gamma{a.gamma}",
    prepare=prepare,
    ours=_ours,
    theirs=_theirs,
    repeats=5,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
