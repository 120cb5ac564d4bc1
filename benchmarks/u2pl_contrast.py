"""What contrast costs in a step of U2PL, in time and memory, and ways to compute parts of it.

  python benchmarks/u2pl_contrast.py
  python benchmarks/u2pl_contrast.py --rounds=5 --size=2,256,512

Steps are those of `u2pl_cityscapes.py:streets` with a full memory bank: with Lc, without it, and
with one pass of the teacher. What Lc costs beside Lc alone is the gradient of the representation
head. At the other size contrast is the paper's, with E = 256, 512 keys, 256 negatives and 30000
keys of a class in the bank, on the demo's network, beside which that head is large. Memory is what
the compiler plans for: what a step carries on, and intermediate results.

All are run in turn, so that ratios hold on a noisy machine; times are medians of warm runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from views import CLASSES, ROOT, random_batch, time_in_turn

from configs import u2pl_cityscapes
from jaxssl import config as configs
from jaxssl import logs, memory_bank, methods, models, optim, quantile, sampling
from jaxssl.contracts import Outputs, Plan
from jaxssl.methods import u2pl
from jaxssl.state import create
from jaxssl.step import Clock, make_train_step

DEMO = "4,64,128"
PAPER = {"capacity": 30_000, "capacity_0": 50_000, "keys": 512, "num_negatives": 256}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="2,256,512", help="images,height,width, beside the demo")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": logs.environment(), "steps": {}, "parts": {}}
    for size in (DEMO, args.size):
        images, height, width = map(int, size.split(","))
        setting = Setting(images, (height, width), {} if size == DEMO else PAPER)
        programs: dict[str, Program] = {
            "step with Lc": step(setting),
            "step without Lc": step(setting, lambda_c=0.0),
            "Lc alone": contrast(setting),
        }
        if size == DEMO:
            programs["step with Lc, teacher_forwards=one"] = step(setting, teacher_forwards="one")
        times = time_in_turn(programs, args.rounds)
        measured = {
            name: {"milliseconds": round(times[name], 1), **program.megabytes}
            for name, program in programs.items()
        }
        result["steps"][f"{images} + {images} of {height}x{width}"] = measured
        print(size)
        for name, numbers in measured.items():
            print(f"  {name:35s}", *(f"{key} {value}" for key, value in numbers.items()))
        del programs
    for part, ways in parts().items():
        times = time_in_turn(ways, args.rounds)
        result["parts"][part] = {name: round(ms, 2) for name, ms in times.items()}
        print(part, result["parts"][part])
    out = ROOT / "benchmarks" / "results" / f"u2pl_contrast_{jax.default_backend()}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {out.relative_to(ROOT)}.")


class Setting(NamedTuple):
    """Images of each stream, their size, and fields of the method that differ from the demo's."""

    images: int
    size: tuple[int, int]
    changes: Mapping[str, Any]

    @property
    def config(self) -> Any:
        config = u2pl_cityscapes.get_config("streets")
        config.model.embedding = 256 if self.changes else 32
        config.method.update(self.changes)
        return config


class Program:
    """A compiled function `(carry, key, ...) -> (carry, result)`, run again and again.

    Attributes:
      carry: what the next run goes on from.
      given: arguments behind the key.
    """

    def __init__(self, function: Callable[..., Any], carry: Any, *given: Any) -> None:
        self.carry, self.given = carry, given
        jitted = jax.jit(function, donate_argnums=0)
        self.compiled = jitted.lower(carry, jax.random.key(0), *given).compile()

    def __call__(self, key: jax.Array) -> Any:
        self.carry, result = self.compiled(self.carry, key, *self.given)
        return result

    @property
    def megabytes(self) -> dict[str, float]:
        """Of what is carried, and of intermediate results."""
        planned = self.compiled.memory_analysis()
        assert planned is not None
        found = {"carried": planned.alias_size_in_bytes, "temporary": planned.temp_size_in_bytes}
        return {f"{name} MB": round(size / 1e6, 1) for name, size in found.items()}


def step(setting: Setting, **changes: Any) -> Program:
    """A training step in the main phase, with a full bank."""
    config = setting.config
    method = methods.load({**config.method, **changes})
    nets = {"a": models.load(configs.model_of(config, "a"), CLASSES)}
    counts = {"labeled": setting.images, "unlabeled": setting.images}
    (phase,) = method.phases(Plan(counts, counts, CLASSES, steps=100))
    optimizer = optim.make_optimizer(config.optimizer)
    start = functools.partial(create, method, nets, optimizer, method.students)
    state = jax.jit(start)({"a": nets["a"].init(jax.random.key(0), setting.size)})
    if state.extra:
        state = state.replace(extra={"bank": full(state.extra["bank"])})
    schedule, rate = optim.make_schedule(config.optimizer), config.optimizer.learning_rate
    run = make_train_step(method, nets, phase, optimizer, schedule, learning_rate=rate, seed=0)
    batch = random_batch(setting.images, setting.size)
    return Program(
        lambda state, key, batch, clock: run(state, {}, batch, clock),
        state,
        batch,
        Clock.of(phase, 0),
    )


def contrast(setting: Setting) -> Program:
    """Lc of representations that are there already: draws, bank, InfoNCE, and the gradient."""
    config, rng = setting.config, np.random.default_rng(0)
    method, E = methods.load(config.method), config.model.embedding
    assert isinstance(method, u2pl.Method)
    shape = 2 * setting.images, setting.size[0] // 4, setting.size[1] // 4
    N = int(np.prod(shape))
    label = jnp.asarray(rng.integers(0, CLASSES, N, np.uint8))
    pixels = u2pl.Pixels(
        z=jnp.asarray(rng.normal(size=(N, E)), jnp.float32),
        p=jnp.asarray(rng.dirichlet(np.ones(CLASSES), N), jnp.float32),
        label=label,
        known=label,
        maybe_negative=jnp.asarray(rng.random(N) < 0.6),
        labeled=jnp.arange(N) < N // 2,
    )
    lengths = (method.capacity_0,) + (method.capacity,) * (CLASSES - 1)
    bank = full(memory_bank.empty(lengths, E, method.bank_dtype))
    student = jnp.asarray(rng.normal(size=(*shape, E)), jnp.float32)

    def run(extra: Any, key: jax.Array, student: jax.Array, pixels: u2pl.Pixels) -> Any:
        def loss(z: jax.Array) -> Any:
            return method.contrast(Outputs(z, embedding=z), pixels, extra, key)[:2]

        (value, extra), gradient = jax.value_and_grad(loss, has_aux=True)(student)
        return extra, (value, gradient)

    return Program(run, {"bank": bank}, student, pixels)


def full(bank: memory_bank.Bank) -> memory_bank.Bank:
    """A bank of zeros in place of nothing."""
    return dataclasses.replace(bank, fill=jnp.array(bank.length))


def parts() -> dict[str, dict[str, Callable[[jax.Array], Any]]]:
    """By part of the step, ways to compute it, the first as the library does."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.random((2, 769, 769), np.float32))
    p = jnp.asarray(rng.dirichlet(np.ones(CLASSES), 8 * 97 * 97), jnp.float32)
    masks = jnp.asarray(rng.random((CLASSES, 32 * 193 * 193)) < 0.1)
    k = 100_000

    def by_number(key: jax.Array, mask: jax.Array) -> jax.Array:
        numbers = jnp.where(mask, jax.random.uniform(key, mask.shape), -1)
        return jax.lax.top_k(numbers, 512)[1]

    def draws(draw: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array], Any]:
        def of_class(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            return draw(*inputs)

        compiled = jax.jit(
            lambda key, masks: jax.lax.map(of_class, (jax.random.split(key, CLASSES), masks))
        )
        return lambda key: compiled(key, masks)

    def on(x: jax.Array, function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], Any]:
        compiled = jax.jit(function)
        return lambda key: compiled(x)

    return {
        f"element {k} of 2 x 769 x 769": {
            "bisection": on(values, lambda x: quantile.kth_smallest(x, k)),
            "sort": on(values, lambda x: jnp.sort(x.ravel())[k]),
            "top_k": on(values, lambda x: -jax.lax.top_k(-x.ravel(), k + 1)[0][-1]),
        },
        "ranks of 19 classes in 8 x 97 x 97 pixels": {
            "counting": on(p, u2pl.class_order),
            "two sorts": on(p, lambda p: jnp.argsort(jnp.argsort(-p, stable=True))),
        },
        "512 different ones of 32 x 193 x 193 pixels, for 19 classes": {
            "by rank": draws(lambda key, mask: sampling.draw(key, mask, 512, replace=False)[0]),
            "a number for each pixel and class": draws(by_number),
        },
    }


if __name__ == "__main__":
    main()
