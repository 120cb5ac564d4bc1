"""What views and CutMix cost beside the training step that they are part of.

  python benchmarks/views.py                             # the demo's network, 4 + 4 images
  python benchmarks/views.py --size=16,512,512 --rounds=5

Everything is jitted and run in turn with a new key each round, so that the shares of the step hold
on a noisy machine; times are medians of warm runs. The step is MKD's of the streets demo, all of
it: views, four networks, gradients, update.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import mkd_cityscapes  # noqa: E402
from jaxssl import config as configs  # noqa: E402
from jaxssl import logs, methods, mixing, models, optim, views  # noqa: E402
from jaxssl.contracts import Plan  # noqa: E402
from jaxssl.state import create  # noqa: E402
from jaxssl.step import Clock, make_train_step  # noqa: E402

CLASSES = 19
STEP = "MKD step"

# Each takes a key, uint8 images and the pixels that are not padding.
VIEWS = {
    "brightness": lambda key, image, valid: views.brightness(image, 0.7),
    "contrast": lambda key, image, valid: views.contrast(image, 0.7, valid=valid),
    "saturation": lambda key, image, valid: views.saturation(image, 0.7),
    "sharpness": lambda key, image, valid: views.sharpness(image, 0.7, valid=valid),
    "hue": lambda key, image, valid: views.hue(image, 0.2),
    "grayscale": lambda key, image, valid: views.grayscale(image),
    "solarize": lambda key, image, valid: views.solarize(image),
    "posterize": lambda key, image, valid: views.posterize(image, 4),
    "autocontrast": lambda key, image, valid: views.autocontrast(image, valid=valid),
    "equalize": lambda key, image, valid: views.equalize(image, valid=valid),
    "color jitter": lambda key, image, valid: views.color_jitter(key, image, valid=valid),
    "Gaussian blur": lambda key, image, valid: views.gaussian_blur(key, image, valid=valid),
    "photometric distortion": lambda key, image, valid: views.photometric_distortion(key, image),
    "strong": lambda key, image, valid: views.strong(key, image, valid=valid),
    "CutMix of three boxes": lambda key, image, valid: mixing.mix(
        mixing.box_mask(key, image.shape[0], image.shape[1:3]), image
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", help="images,height,width; may be repeated")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": logs.environment(), "milliseconds": {}}
    for size in args.size or ["4,64,128", "4,256,512"]:
        images, height, width = map(int, size.split(","))
        batch = random_batch(images, (height, width))
        programs = {name: of_unlabeled(view, batch) for name, view in VIEWS.items()}
        times = time_in_turn({**programs, STEP: demo_step(batch)}, args.rounds)
        name = f"{images} of {height}x{width}"
        result["milliseconds"][name] = {view: round(ms, 3) for view, ms in times.items()}
        print(f"{name:24s} {'ms':>9s}   share of the step")
        for view, ms in times.items():
            print(f"  {view:22s} {ms:9.2f} {100 * ms / times[STEP]:8.2f} %")
    out = ROOT / "benchmarks" / "results" / f"views_{jax.default_backend()}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {out.relative_to(ROOT)}.")


def random_batch(images: int, size: tuple[int, int]) -> dict[str, dict[str, jax.Array]]:
    """Noise; a quarter of each unlabeled image is padding."""
    rng = np.random.default_rng(0)
    valid = np.ones((images, *size), bool)
    padded = valid.copy()
    padded[:, -(size[0] // 4) :] = False
    noise = functools.partial(rng.integers, 0, 256, (images, *size, 3), np.uint8)
    label = rng.integers(0, CLASSES, (images, *size), np.uint8)
    labeled = {"image": noise(), "valid": valid, "label": label}
    return jax.device_put({"labeled": labeled, "unlabeled": {"image": noise(), "valid": padded}})


def of_unlabeled(
    view: Callable[..., jax.Array], batch: Mapping[str, Mapping[str, jax.Array]]
) -> Callable[[jax.Array], Any]:
    compiled, unlabeled = jax.jit(view), batch["unlabeled"]
    return lambda key: compiled(key, unlabeled["image"], unlabeled["valid"])


def demo_step(batch: Mapping[str, Mapping[str, jax.Array]]) -> Callable[[jax.Array], Any]:
    """The step of `mkd_cityscapes.py:streets` on this batch; ignores the key."""
    config = mkd_cityscapes.get_config("streets")
    method = methods.load(config.method)
    images, height, width = batch["labeled"]["label"].shape
    counts = {"labeled": images, "unlabeled": images}
    plan = Plan(sizes=counts, batch=counts, num_classes=CLASSES, steps=100)
    (phase,) = method.phases(plan)
    nets = {name: models.load(configs.model_of(config, name), CLASSES) for name in method.students}
    optimizer = optim.make_optimizer(config.optimizer)
    variables = {
        name: net.init(jax.random.key(i), (height, width))
        for i, (name, net) in enumerate(nets.items())
    }
    start = functools.partial(create, method, nets, optimizer, method.students)
    state = jax.jit(start)(variables)
    schedule = optim.make_schedule(config.optimizer)
    rate = config.optimizer.learning_rate
    make = functools.partial(make_train_step, learning_rate=rate, seed=0)
    step = jax.jit(make(method, nets, phase, optimizer, schedule))
    return lambda key: step(state, {}, batch, Clock.of(phase, 0))


def time_in_turn(
    programs: Mapping[str, Callable[[jax.Array], Any]], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each program, all of them once in every round."""
    for run in programs.values():
        jax.block_until_ready(run(jax.random.key(0)))
    times = {name: [] for name in programs}
    for key in jax.random.split(jax.random.key(1), rounds):
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(key))
            times[name].append(time.perf_counter() - began)
    return {name: 1000 * float(np.median(values)) for name, values in times.items()}


if __name__ == "__main__":
    main()
