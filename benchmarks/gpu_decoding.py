"""Speculative decoding at full size on a GPU: Qwen2.5-VL-7B and a 1.5B drafter, in bfloat16.

    python -m benchmarks.gpu_decoding [--size=full|tiny] [--variant=qwen2_5_vl_7b] [--rows=1]
        [--gammas 1 3 5 7] [--acceptance 0.83] [--only=decoding,distillation]

The programs are those that `launch.plan` plans (massv_jax.planning_decoding), so the bytes of their
arguments are printed beside the plan's. Weights are random but for three things, which make the
two networks agree as often as one likes whatever their sizes: residual branches end in zeros (they
are computed all the same), the token table has unit rows, and the head is the table, so long that
at temperature 1 a token follows itself with probability `--acceptance` and all others share the
rest. Greedy drafts are then always accepted; sampled ones with that probability each. (Tokens a
round at gamma 5 and 0.83: 3.96, as the miniature's drafters have.)

- "decoding": prompt, plain steps and rounds for each window; a step against the time to read all
  weights and the cache once. At temperature 0 and 1.
- "distillation": a batch of configs/massv_distill.py: prompts, sampled steps, tokens a second.

The peer is transformers' plain greedy generation of as many tokens. "tiny" runs anywhere and
proves nothing but that this script works.
"""

import argparse
import dataclasses
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.alternate import Arguments, Benchmark, main
from benchmarks.gpu import bandwidth
from benchmarks.timing import Measured

PARTS = ("decoding", "distillation")
FIRST_TOKEN = 1000  # of every answer; far from the ids that end one
PLAIN = "plain, temperature 0"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--variant", default="qwen2_5_vl_7b", help="of configs/massv_eval.py")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--rows", type=int, default=1, help="prompts that are answered at once")
    parser.add_argument("--gammas", type=int, nargs="+", default=[1, 3, 5, 7])
    parser.add_argument("--acceptance", type=float, default=0.83, help="of a sampled draft")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--attention", default="xla", help="model.execution.attention")


def experiment_of(arguments: Arguments, folder: pathlib.Path, task: str) -> Any:
    """The config's experiment; "tiny" has tiny networks and float32."""
    from configs import massv_distill, massv_eval
    from core_jax.config import to_dataclass
    from massv_jax.experiment import Experiment

    config = {"eval": massv_eval, "distill": massv_distill}[task].get_config(arguments.variant)
    config.model.execution.attention = arguments.attention
    config.decoding.update(
        batch_size=arguments.rows, max_new_tokens=_new(arguments), gamma=max(arguments.gammas)
    )
    if arguments.size == "tiny":
        config.model.update(target=str(folder / "target"), frozen_dtype="float32",
                            language_model=str(folder / "language_model"))  # fmt: skip
        config.decoding.prompt_lengths = (64,)
        config.distill.update(prompt_lengths=(64,), max_new_tokens=4, batch_size=2)
        config.data.max_pixels = 72**2
    return to_dataclass(Experiment, config.to_dict())


def _new(arguments: Arguments) -> int:
    return 8 if arguments.size == "tiny" else arguments.new


def _prepare(arguments: Arguments, folder: pathlib.Path) -> Mapping[str, Any]:
    if unknown := sorted(set(arguments.only.split(",")) - set(PARTS)):
        raise SystemExit(f"error: --only={','.join(unknown)} is unknown; known: {', '.join(PARTS)}")
    if not 0 < arguments.acceptance < 1:
        raise SystemExit(f"error: --acceptance={arguments.acceptance:g} is not between 0 and 1")
    if arguments.size == "tiny":
        from benchmarks.pairs import SIZES, write_random_pair

        write_random_pair(folder, SIZES["tiny"], noise=0.0)
    return {}


def agreeing_params(abstract: Any, *, acceptance: float, seed: int = 0) -> Any:
    """Random parameters of a network whose tokens follow themselves (see the module).

    Args:
      abstract: tree of shapes, of a target or of a drafter; dtypes are kept.
      acceptance: probability of the token itself at temperature 1.
      seed: of the token table; networks with one seed and other widths still agree.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks.random_weights import random_leaves
    from core_jax.partition import flatten, unflatten

    shapes = flatten(abstract)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = {}
    for path, shape in shapes.items():
        tree, place = unflatten({path: shape}), unflatten({path: device})
        leaf = flatten(random_leaves(tree, dtype=shape.dtype, shardings=place))[path]
        made[path] = leaf
        if path.rsplit("/", 2)[-2] in ("o_proj", "down_proj"):
            made[path] = jnp.zeros_like(leaf)
    for path, leaf in made.items():
        if path.endswith(("embed_tokens/embedding", "lm_head/embedding")):
            V, D = leaf.shape
            made[path] = _table(seed, V, D, acceptance).astype(leaf.dtype)
        elif path.endswith("language_model/norm/scale"):
            made[path] = jnp.ones_like(leaf)
    return unflatten(made)


def _table(seed: int, V: int, D: int, acceptance: float) -> Any:
    """Rows of such a length that row . normalised row = log(a (V - 1) / (1 - a))."""
    import jax

    rows = jax.random.normal(jax.random.key(seed), (V, D))
    length = math.log(acceptance * (V - 1) / (1 - acceptance)) / math.sqrt(D)
    return length * rows / (rows**2).sum(axis=1, keepdims=True) ** 0.5


def concrete_request(program: Any, request: Any, config: Any) -> Any:
    """Arrays for the shapes of a request: an image in front of each row's text.

    Args:
      program: the abstract one, which says what is sampled.
      request: its shapes (massv_jax.speculative.loop.Request).
      config: the target's.
    """
    import jax
    import jax.numpy as jnp

    from core_jax.decode.qwen2_5_vl import ImagePrompt
    from core_jax.models.qwen2_5_vl import pack_images, place_prompts

    vision = config.vision_config
    rows, length = request.prompt.ids.shape
    slots = request.images.patches.shape[1]
    side = math.isqrt(min(slots, (length - 8) * vision.spatial_merge_size**2))
    side -= side % vision.spatial_merge_size
    grid = (1, side, side)
    blank = np.zeros((side * side, vision.patch_values), np.float32)
    packed = pack_images(
        [blank] * rows, [grid] * rows, vision, windows=slots // vision.window_patches
    )
    tokens = (side // vision.spatial_merge_size) ** 2
    ids = np.full((rows, length), FIRST_TOKEN % config.text_config.vocab_size, np.int32)
    ids[:, 0] = config.vision_start_token_id
    ids[:, 1 : 1 + tokens] = config.image_token_id
    ids[:, 1 + tokens] = config.vision_end_token_id
    valid = np.ones(ids.shape, bool)
    places = place_prompts(ids, valid, packed, config)
    prompt = jax.tree.map(jnp.asarray, ImagePrompt.at(ids, places, valid=valid))
    return request.replace(
        prompt=prompt,
        images=jax.tree.map(jnp.asarray, packed.batch),
        draft_prompt=None if request.draft_prompt is None else prompt,
        key=jax.random.key(0) if program.options.samples else None,
        row_seeds=jnp.arange(rows, dtype=jnp.int32),
        limits=jnp.full((rows,), program.options.max_new_tokens, jnp.int32),
    )


@dataclasses.dataclass
class Decoding:
    """The two programs of a batch, with arrays in them.

    Attributes:
      program, params, request: what runs; see massv_jax.speculative.loop.
      planned: bytes of the arguments, by the plan.
    """

    program: Any
    params: Any
    request: Any
    planned: int

    def plain(self) -> "Decoding":
        """Without the drafter."""
        options = dataclasses.replace(self.program.options, max_gamma=0)
        return dataclasses.replace(
            self, program=self.program._replace(proposer=None, options=options),
            params=self.params._replace(drafter=None),
            request=self.request.replace(draft_prompt=None),
        )  # fmt: skip

    def at(self, temperature: float) -> "Decoding":
        """With another temperature."""
        import jax

        rule = dataclasses.replace(self.program.options.rule, temperature=temperature)
        options = dataclasses.replace(self.program.options, rule=rule)
        key = jax.random.key(0) if options.samples else None
        return dataclasses.replace(
            self, program=self.program._replace(options=options),
            request=self.request.replace(key=key),
        )  # fmt: skip

    def start(self) -> Any:
        """The prompts, done."""
        import jax

        from massv_jax.speculative.loop import start

        return jax.block_until_ready(start(self.program, self.params, self.request))

    def rounds(self, gamma: int) -> Any:
        """A call that answers from a state, and returns the last one."""
        import jax
        import jax.numpy as jnp

        from massv_jax.speculative.decoder import ALL_ROUNDS
        from massv_jax.speculative.loop import advance

        def call(state):
            limit = jnp.int32(ALL_ROUNDS)
            done = advance(self.program, self.params, state, limit, gamma=gamma)
            return jax.block_until_ready(done)

        return call


def build(arguments: Arguments, folder: pathlib.Path, task: str) -> Decoding:
    """The plan's programs on the first device, filled."""
    import jax

    from core_jax.models.presets import abstract_model
    from core_jax.sharding import make_mesh
    from massv_jax.planning_decoding import abstract_decoding
    from massv_jax.speculative.loop import Params

    experiment = experiment_of(arguments, folder, task)
    planned = abstract_decoding(experiment, make_mesh({}, jax.devices()[:1]))
    assert planned.before is not None
    program, params, request = planned.before.arguments
    filled = {
        name: None if tree is None else agreeing_params(tree, acceptance=arguments.acceptance)
        for name, tree in params._asdict().items()
    }
    config = abstract_model(experiment.model.target)[0].config
    bytes_of = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, request)))
    return Decoding(program, Params(**filled), concrete_request(program, request, config), bytes_of)


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    import jax

    device, measured = jax.devices()[0], Measured()
    measured.facts["device"] = device.device_kind
    parts: dict[str, Callable[..., None]] = {
        "decoding": _decoding_part, "distillation": _distillation_part,
    }  # fmt: skip
    for part in arguments.only.split(","):
        parts[part](arguments, folder, measured)
    return measured


def _time_answer(measured: Measured, name: str, decoding: Decoding, gamma: int, repeats: int):
    """Times the rounds of an answer, prompt left out; returns the last state."""
    import time

    call, seconds = decoding.rounds(gamma), []
    for _ in range(repeats + 1):
        state = decoding.start()
        began = time.perf_counter()
        state = call(state)
        seconds.append(time.perf_counter() - began)
    measured.first_call[name], measured.seconds[name] = seconds[0], seconds[1:]
    return state


def _decoding_part(arguments: Arguments, folder: pathlib.Path, measured: Measured) -> None:
    import jax

    decoding, repeats = build(arguments, folder, "eval"), arguments.repeats
    _compare_bytes(measured, "decoding", decoding)
    new = decoding.program.options.max_new_tokens
    measured.time("prompts", decoding.at(0.0).start, repeats=repeats)
    for temperature in (0.0, 1.0):
        of = decoding.at(temperature)
        plain = f"plain, temperature {temperature:g}"
        _time_answer(measured, plain, of.plain(), 0, repeats)
        step = statistics.median(measured.seconds[plain]) / (new - 1)
        measured.facts[f"{plain}: tokens/s"] = arguments.rows / step
        gammas = [g for g in arguments.gammas if g <= of.program.options.max_gamma]
        for gamma in gammas:
            name = f"gamma {gamma}, temperature {temperature:g}"
            state = _time_answer(measured, name, of, gamma, repeats)
            emitted, rounds = (int(x.sum()) for x in (state.counts.emitted, state.counts.rounds))
            seconds = statistics.median(measured.seconds[name])
            measured.facts[f"{name}: tokens a round"] = emitted / rounds
            measured.facts[f"{name}: times plain"] = (
                statistics.median(measured.seconds[plain]) / seconds
            )
    rate = bandwidth(jax.devices()[0].device_kind)
    step = statistics.median(measured.seconds[PLAIN]) / (new - 1)
    read = bytes_of_step(decoding)
    measured.facts["plain: GB read a step"] = read / 1e9
    measured.facts["plain: share of the bandwidth"] = read / rate / step if rate else None


def bytes_of_step(decoding: Decoding) -> int:
    """What a plain step has to read: the language model, its head, and the whole cache.

    Of an untied token table a row is read, and the vision tower rests.
    """
    import jax

    from core_jax.partition import flatten
    from massv_jax.speculative.loop import start

    plain = decoding.plain()
    weights = flatten(plain.params.target["language_model"])
    if any(name.startswith("lm_head") for name in weights):
        weights.pop("embed_tokens/embedding")
    state = jax.eval_shape(lambda p, r: start(plain.program, p, r), plain.params, plain.request)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights, state.target)))


def _distillation_part(arguments: Arguments, folder: pathlib.Path, measured: Measured) -> None:
    decoding = build(arguments, folder, "distill")
    _compare_bytes(measured, "distillation", decoding)
    rows, new = len(decoding.request.limits), decoding.program.options.max_new_tokens
    measured.time("distillation: prompts", decoding.start, repeats=arguments.repeats)
    name = "distillation: answers"
    _time_answer(measured, name, decoding, decoding.program.options.max_gamma, arguments.repeats)
    seconds = statistics.median(measured.seconds[name])
    measured.facts["distillation: tokens/s"] = rows * (new - 1) / seconds


def _compare_bytes(measured: Measured, part: str, decoding: Decoding) -> None:
    """Arguments as planned and as they are; temporaries as the compiler has them."""
    import jax

    from massv_jax.speculative.loop import start

    held = sum(x.nbytes for x in jax.tree.leaves((decoding.params, decoding.request)))
    measured.facts[f"{part}: GB of arguments, planned"] = decoding.planned / 1e9
    measured.facts[f"{part}: GB of arguments"] = held / 1e9
    lowered = start.lower(decoding.program, decoding.params, decoding.request)
    memory = lowered.compile().memory_analysis()
    if memory is not None:
        measured.facts[f"{part}: GB of temporaries, prompts"] = memory.temp_size_in_bytes / 1e9
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:
        measured.facts[f"{part}: GB in use at most so far"] = peak / 1e9


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from benchmarks.torch_peer import load_class, load_torch
    from core_jax.models.presets import abstract_model

    torch = load_torch(arguments.threads, cuda=True)
    experiment = experiment_of(arguments, folder, "eval")
    config = abstract_model(experiment.model.target)[0].config
    kind = load_class("transformers", "Qwen2_5_VLConfig")
    cls = load_class("transformers", "Qwen2_5_VLForConditionalGeneration")
    dtype = getattr(torch, experiment.model.frozen_dtype)
    with torch.device("cuda"):
        model = cls(kind.from_dict(config.to_hf())).to(dtype).eval()
    length, new = max(experiment.decoding.prompt_lengths), _new(arguments)
    ids = torch.full((arguments.rows, length), FIRST_TOKEN, device="cuda")
    ids %= config.text_config.vocab_size
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0,
               "eos_token_id": None}  # fmt: skip

    def call(count: int) -> Any:
        with torch.inference_mode():
            return model.generate(ids, max_new_tokens=count, **options).cpu().numpy()

    measured = Measured(facts={"device": torch.cuda.get_device_name()})
    measured.time("prompts", lambda: call(1), repeats=arguments.repeats)
    measured.time(PLAIN, lambda: call(new), repeats=arguments.repeats)
    prompt = statistics.median(measured.seconds["prompts"])
    measured.seconds[PLAIN] = [s - prompt for s in measured.seconds[PLAIN]]
    measured.seconds.pop("prompts")  # its prompt has no image
    return measured


BENCHMARK = Benchmark(
    module="benchmarks.gpu_decoding",
    peer="transformers, PyTorch eager, plain",
    add_arguments=_add_arguments,
    name=lambda a: f"gpu-decoding-{a.size}-{a.variant}-rows{a.rows}-{a.attention}",
    prepare=_prepare,
    ours=_ours,
    theirs=_theirs,
    results="gpu",
    rounds=1,
    repeats=5,
    environment={},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
