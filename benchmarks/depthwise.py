"""Depthwise convolutions: XLA's own beside shifted multiplies, at the shapes of EfficientNet-Lite0.

  python benchmarks/depthwise.py  # writes benchmarks/results/depthwise_BACKEND.json

Shapes are those of the network on four images of 64x128 at output stride 16, and of its last
stage at output stride 8. Forward, and forward with the gradient in input and kernel. Beside the
median of the time on the clock stands the smallest CPU time, which other programs on the machine
disturb less. "shifted, JAX's gradient" is what JAX makes of the shifted multiplies by itself.

jaxssl/models/layers.py chooses by this table on CPUs; on other backends it takes XLA's own.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxssl import logs  # noqa: E402
from jaxssl.models import layers  # noqa: E402

SHAPES = (
    # height, width, channels, kernel size, stride, dilation
    (32, 64, 32, 3, 1, 1),
    (32, 64, 96, 3, 2, 1),
    (16, 32, 144, 3, 1, 1),
    (16, 32, 144, 5, 2, 1),
    (8, 16, 240, 5, 1, 1),
    (8, 16, 240, 3, 2, 1),
    (4, 8, 480, 3, 1, 1),
    (4, 8, 672, 5, 1, 1),
    (4, 8, 1152, 5, 1, 2),
    (4, 8, 1152, 3, 1, 2),
    (8, 16, 1152, 5, 1, 4),
)
BATCH, REPEATS = 4, 11


def main() -> None:
    rows = [row for shape in SHAPES for row in measure(shape)]
    out = ROOT / "benchmarks" / "results" / f"depthwise_{jax.default_backend()}.json"
    out.parent.mkdir(exist_ok=True)
    result = {"environment": logs.environment(), "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


def measure(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Times all forms at one shape, in turn, so that their ratios hold on a noisy machine."""
    height, width, channels, size, stride, dilation = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BATCH, height, width, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 1, channels)), jnp.float32)
    settings = {"stride": stride, "dilation": dilation, "groups": channels, "padding": "same"}
    forms: dict[str, Callable[..., jax.Array]] = {
        form: functools.partial(layers.convolution, **settings, form=form)
        for form in ("plain", "shifted")
    }
    forms["shifted, JAX's gradient"] = functools.partial(_shifted, stride, dilation)
    programs, rows = {}, []
    for form, convolve in forms.items():
        for pass_, function in (("forward", convolve), ("gradient", _gradient(convolve))):
            began = time.process_time()
            programs[form, pass_] = jax.jit(function).lower(x, kernel).compile()
            compiling = time.process_time() - began
            rows.append({"shape": shape, "form": form, "pass": pass_, "compile_s": compiling})
    times = {key: ([], []) for key in programs}
    for _ in range(REPEATS + 1):
        for key, program in programs.items():
            clock, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(x, kernel))
            times[key][0].append(time.perf_counter() - clock)
            times[key][1].append(time.process_time() - cpu)
    for row in rows:
        clock, cpu = times[row["form"], row["pass"]]
        row["ms"] = round(1e3 * statistics.median(clock[1:]), 2)
        row["cpu_ms"] = round(1e3 * min(cpu[1:]), 2)
        row["compile_s"] = round(row["compile_s"], 2)
        print(*row.values(), sep="\t", flush=True)
    return rows


def _shifted(stride: int, dilation: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    zeros = tuple(
        layers._zeros(length, size, stride, dilation, "same")
        for length, size in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )
    return layers._shifted(x, kernel, stride, dilation, zeros)


def _gradient(convolve: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda x, kernel: (convolve(x, kernel) ** 2).sum(), argnums=(0, 1))


if __name__ == "__main__":
    main()
