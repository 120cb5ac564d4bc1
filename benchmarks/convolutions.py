"""Convolutions: XLA's own beside the forms of jaxssl/models/layers.py that CPUs take.

  python benchmarks/convolutions.py  # writes benchmarks/results/convolutions_BACKEND.json

Depthwise kernels have the shapes of EfficientNet-Lite0 on four images of 64x128 at output stride
16, and of its last stage at output stride 8; kernels of 1x1 those of its and ResNet's blocks; wide
and far dilated ones stand in the last stages of a ResNet at output stride 8 and behind it. Forward,
and the gradient in input and kernel. Beside the median of the time on the clock stands the smallest
CPU time, which other programs on the machine disturb less. "shifted, JAX's gradient" is what JAX
makes of the shifted multiplies by itself.

layers.fastest_form chooses by this table on CPUs; on other backends it takes XLA's own.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxssl import logs  # noqa: E402
from jaxssl.models import layers  # noqa: E402


class Shape(NamedTuple):
    """One convolution."""

    height: int
    width: int
    inputs: int
    outputs: int
    size: int
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False


SHAPES = (
    *(
        Shape(height, width, channels, channels, size, stride, dilation, depthwise=True)
        for height, width, channels, size, stride, dilation in (
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
    ),
    Shape(32, 64, 32, 16, size=1),
    Shape(16, 32, 64, 64, size=1),
    Shape(8, 16, 240, 40, size=1),
    Shape(8, 16, 512, 2048, size=1),
    Shape(4, 8, 192, 1152, size=1),
    Shape(16, 32, 256, 256, size=3, dilation=4),
    Shape(8, 16, 512, 512, size=3, dilation=4),
    Shape(8, 16, 512, 512, size=3, dilation=8),
    Shape(8, 16, 512, 256, size=3, dilation=12),
)
BATCH, REPEATS = 4, 11


def main() -> None:
    rows = [row for shape in SHAPES for row in measure(shape)]
    out = ROOT / "benchmarks" / "results" / f"convolutions_{jax.default_backend()}.json"
    out.parent.mkdir(exist_ok=True)
    result = {"environment": logs.environment(), "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


def measure(shape: Shape) -> list[dict[str, Any]]:
    """Times all forms at one shape, in turn, so that their ratios hold on a noisy machine."""
    groups = shape.inputs if shape.depthwise else 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, shape.height, shape.width, shape.inputs), np.float32)
    weights = (shape.size, shape.size, shape.inputs // groups, shape.outputs)
    kernel = rng.standard_normal(weights, np.float32)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    convolve = functools.partial(
        layers.convolution,
        stride=shape.stride,
        dilation=shape.dilation,
        groups=groups,
        padding="same",
    )
    forms: dict[str, Callable[..., jax.Array]] = {
        "plain": functools.partial(convolve, form="plain")
    }
    if shape.depthwise:
        forms["shifted"] = functools.partial(convolve, form="shifted")
        forms["shifted, JAX's gradient"] = functools.partial(_shifted, shape.stride, shape.dilation)
    else:
        forms["matmul"] = functools.partial(convolve, form="matmul")
    programs, rows = {}, []
    for form, function in forms.items():
        for pass_, program in (("forward", function), ("gradient", _gradient(function))):
            began = time.process_time()
            programs[form, pass_] = jax.jit(program).lower(x, kernel).compile()
            compiling = time.process_time() - began
            rows.append(
                {"shape": shape._asdict(), "form": form, "pass": pass_, "compile_s": compiling}
            )
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
        print(*shape, *list(row.values())[1:], sep="\t", flush=True)
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
