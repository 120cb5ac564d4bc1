"""One MKD step beside a plain PyTorch step of the same work.

  python benchmarks/step_vs_torch.py              # the demo's network, for a CPU
  python benchmarks/step_vs_torch.py --full       # ResNet-50, 16 + 16 of 512x512, bfloat16
  python benchmarks/step_vs_torch.py --profile=5  # also the five largest items

Same networks, same parameters, same batch, same losses: the first loss of both is compared before
anything is timed. Both draw CutMix boxes; the photometric operation, which PyTorch programs apply
on the host, is left out of both (benchmarks/views.py times it). PyTorch uses channels_last, and
autocast where the dtype is bfloat16; it runs with and without torch.compile. Times are medians of
warm steps, the programs in turn, so that ratios hold on a noisy machine. On a machine without a GPU
for PyTorch, its rows are left out.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import gzip
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jaxssl import logs, mixing, models, optim  # noqa: E402
from jaxssl.contracts import Plan  # noqa: E402
from jaxssl.methods import mkd  # noqa: E402
from jaxssl.state import create  # noqa: E402
from jaxssl.step import Clock, make_train_step  # noqa: E402

CLASSES = 19
DEMO = {
    "backbone": "resnet10",
    "width": 16,
    "channels": 48,
    "low_level_channels": 16,
    "aspp_rates": (1, 2, 3),
}
STRENGTH, DECAY, RATE, MOMENTUM = 1.5, 5e-4, 0.01, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="ResNet-50, 16 + 16 of 512x512")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each program")
    parser.add_argument("--profile", type=int, default=0, help="print so many largest items")
    parser.add_argument("--no_torch", action="store_true")
    parser.add_argument("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    network, images, size, dtype = (
        ({"backbone": "resnet50"}, 16, (512, 512), "bfloat16")
        if args.full
        else (DEMO, 4, (64, 128), "float32")
    )
    batch = random_batch(images, size)
    program = JaxStep(network, batch, dtype)
    programs: dict[str, Callable[[], float]] = {"jaxssl": program}
    if not args.no_torch:
        for name, compiled in (("PyTorch", False), ("PyTorch, torch.compile", True)):
            programs[name] = TorchStep(network, program.variables, batch, dtype, compiled)
    result = {
        "images": f"{images} + {images} of {size[0]}x{size[1]}, {dtype}, {network['backbone']}",
        "first_loss": {name: run() for name, run in programs.items()},
        "compile_seconds": program.compile_seconds,
        "memory": program.memory,
        "environment": {**logs.environment(), "command": shlex.join(["python", *sys.argv])},
    }
    print(result["images"], result["first_loss"])
    check(result["first_loss"], 3e-3 if dtype == "bfloat16" else 1e-3)
    result["milliseconds"] = time_in_turn(programs, args.steps)
    for name, milliseconds in result["milliseconds"].items():
        rate = 2000 * images / milliseconds
        print(f"{name:24s} {milliseconds:9.1f} ms a step {rate:9.1f} images/s")
    if args.profile:
        result["largest"] = largest_items(program, args.profile)
        for name, share in result["largest"]:
            print(f"{100 * share:5.1f} %  {name}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def random_batch(images: int, size: tuple[int, int]) -> dict[str, dict[str, np.ndarray]]:
    """Noise with labels of large cells, some of them ignored."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, CLASSES + 1, (images, size[0] // 8, size[1] // 8), np.uint8)
    label = cells.repeat(8, 1).repeat(8, 2)
    return {
        name: {
            "image": rng.integers(0, 256, (images, *size, 3), np.uint8),
            "valid": np.ones((images, *size), bool),
            "label": np.where(label == CLASSES, 255, label).astype(np.uint8),
        }
        for name in ("labeled", "unlabeled")
    }


def check(losses: dict[str, float], tolerance: float) -> None:
    """The programs must do the same work."""
    ours = losses["jaxssl"]
    for name, loss in losses.items():
        if abs(loss - ours) > tolerance * abs(ours):
            sys.exit(f"{name} computes a loss of {loss}, jaxssl one of {ours}.")


def time_in_turn(programs: dict[str, Callable[[], float]], steps: int) -> dict[str, float]:
    """Median milliseconds of each program, all of them once in every round."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(steps + 2):
        for name, run in programs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values[2:]) for name, values in times.items()}


@dataclasses.dataclass(frozen=True)
class CutMixOnly(mkd.Method):
    """MKD whose strong view is CutMix alone, with one mask for both programs."""

    def _views(self, batch: Any, key: jax.Array) -> mkd.Views:
        del key
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        mask = fixed_mask(unlabeled["image"].shape)
        strong = {name: mixing.mix(mask, unlabeled[name]) for name in ("image", "valid")}
        return mkd.Views(labeled, unlabeled, strong, mask)


def fixed_mask(shape: tuple[int, ...]) -> jax.Array:
    return mixing.box_mask(jax.random.key(1), shape[0], shape[1:3])


class JaxStep:
    """The library's compiled step on the default device."""

    def __init__(self, network: dict[str, Any], batch: Any, dtype: str):
        model = {"name": "deeplab_v3plus", "separable": True, "dtype": dtype, **network}
        net = models.load(model, CLASSES)
        method = CutMixOnly(ema_decay_max=0.99, strength=STRENGTH)
        nets = dict.fromkeys(method.students, net)
        size = batch["labeled"]["image"].shape[1:3]
        count = {name: len(stream["image"]) for name, stream in batch.items()}
        plan = Plan(sizes=count, batch=count, num_classes=CLASSES, steps=100)
        (phase,) = method.phases(plan)
        optimizer = optim.make_optimizer(
            {
                "name": "sgd", "momentum": MOMENTUM, "nesterov": False, "weight_decay": DECAY,
                "decay_norm_and_bias": True, "head_factor": 1.0, "clip_norm": 0.0,
            }
        )  # fmt: skip
        schedule = optim.make_schedule({"schedule": "constant", "power": 0.9, "warmup_steps": 0})
        variables = {
            name: net.init(jax.random.key(i), size) for i, name in enumerate(method.students)
        }
        self.variables = jax.device_get(variables)
        make = functools.partial(create, method, nets, optimizer, method.students)
        # Somewhere inside the ramp, where ISDA's term is not 0.
        self._state = jax.jit(make)(variables).replace(step=jnp.int32(50))
        step = make_train_step(method, nets, phase, optimizer, schedule, learning_rate=RATE, seed=0)
        self._rest = ({}, jax.device_put(batch), Clock.of(phase, 0))
        began = time.perf_counter()
        self._step = jax.jit(step, donate_argnums=0).lower(self._state, *self._rest).compile()
        self.compile_seconds = time.perf_counter() - began
        analysis = self._step.memory_analysis()
        self.memory = {
            name: getattr(analysis, f"{name}_size_in_bytes", None)
            for name in ("argument", "output", "temp")
        }

    def __call__(self) -> float:
        self._state, metrics = self._step(self._state, *self._rest)
        return float(jax.block_until_ready(metrics)["loss"][0])


class TorchStep:
    """The same step as a PyTorch program would have it."""

    def __init__(
        self, network: dict[str, Any], variables: Any, batch: Any, dtype: str, compiled: bool
    ):
        import torch
        import torch_twin

        self.torch, self.amp = torch, dtype == "bfloat16"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        layout = torch.channels_last
        self.students, self.teachers, self.statistics = {}, {}, {}
        for name, (params, stats) in variables.items():
            twin = torch_twin.DeepLabV3Plus(CLASSES, **network)
            leaves = traverse_util.flatten_dict({"p": params, "s": stats})
            torch_twin.load(twin, {path[1:]: array for path, array in leaves.items()})
            twin = twin.to(self.device, memory_format=layout)
            self.students[name] = twin.train()
            self.teachers[name] = copy.deepcopy(twin).eval().requires_grad_(False)
            A = twin.head.classifier.in_channels
            zero = functools.partial(torch.zeros, device=self.device)
            self.statistics[name] = [zero(CLASSES), zero(CLASSES, A), zero(CLASSES, A)]
        parameters = [p for net in self.students.values() for p in net.parameters()]
        self.optimizer = torch.optim.SGD(parameters, RATE, momentum=MOMENTUM, weight_decay=DECAY)
        self.batch = {
            name: {key: torch.from_numpy(x).to(self.device) for key, x in stream.items()}
            for name, stream in batch.items()
        }
        mask = np.array(fixed_mask(batch["unlabeled"]["image"].shape))
        self.mask = torch.from_numpy(mask).to(self.device)
        self.run = {
            id(net): torch.compile(self._features) if compiled else self._features
            for net in (*self.students.values(), *self.teachers.values())
        }
        self.progress = 0.5

    def _features(self, net: Any, image: Any) -> tuple[Any, Any]:
        """Logits and what the classifier sees, at stride 4."""
        kept = []
        hook = net.head.classifier.register_forward_pre_hook(lambda _, x: kept.append(x[0]))
        logits, _ = net(image)
        hook.remove()
        return logits.permute(0, 3, 1, 2).float(), kept[0].float()

    def _forward(self, net: Any, image: Any) -> tuple[Any, Any]:
        device = "cuda" if self.device == "cuda" else "cpu"
        with self.torch.autocast(device, self.torch.bfloat16, enabled=self.amp):
            return self.run[id(net)](net, image.float())

    def _mix(self, x: Any, mask: Any) -> Any:
        return self.torch.where(mask, x, x.roll(-1, 0))

    def __call__(self) -> float:
        torch, F = self.torch, self.torch.nn.functional
        labeled, unlabeled = self.batch["labeled"], self.batch["unlabeled"]
        truth = labeled["label"].long()
        truth = torch.where(truth == 255, -100, truth)
        strong = self._mix(unlabeled["image"], self.mask[..., None])
        small = self.mask[:, None, ::4, ::4]
        targets, logits, loss = {}, {}, 0.0
        for name, net in self.students.items():
            own, own_features = self._forward(net, labeled["image"])
            full = F.interpolate(own, truth.shape[1:], mode="bilinear")
            loss = loss + F.cross_entropy(full, truth)
            other, features = self._forward(net, strong)
            with torch.no_grad():
                self._observe(name, own_features, truth[:, ::4, ::4])
                self._observe(name, features, other.argmax(1))
                table = self._table(name, net)
                shift = table[other.argmax(1)].permute(0, 3, 1, 2)
            logits[name] = other + shift
            with torch.no_grad():
                weak, _ = self._forward(self.teachers[name], unlabeled["image"])
                targets["teacher_" + name] = self._mix(weak, small).argmax(1)
            targets[name] = logits[name].argmax(1)
        for name, peer in (("a", "b"), ("b", "a")):
            loss = loss + 1.5 * F.cross_entropy(logits[name], targets["teacher_" + peer])
            loss = loss + 1.0 * F.cross_entropy(logits[name], targets[peer])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._average()
        return float(loss.detach())

    def _observe(self, name: str, features: Any, labels: Any) -> None:
        """Merges the moments of one batch (as `mkd.merge`)."""
        torch = self.torch
        x = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        labels = labels.reshape(-1)
        member = torch.nn.functional.one_hot(labels.clamp(min=0), CLASSES).to(x.dtype)
        member = member * (labels >= 0)[:, None]
        count = member.sum(0)
        mean = member.T @ x / count.clamp(min=1)[:, None]
        m2 = member.T @ (x - member @ mean) ** 2
        old_count, old_mean, old_m2 = self.statistics[name]
        total = old_count + count
        share = (count / total.clamp(min=1))[:, None]
        delta = mean - old_mean
        m2 = old_m2 + m2 + old_count[:, None] * share * delta**2
        self.statistics[name] = [total, old_mean + share * delta, m2]

    def _table(self, name: str, net: Any) -> Any:
        count, _, m2 = self.statistics[name]
        w = net.head.classifier.weight[:, :, 0, 0]
        v = (w[None] - w[:, None]) ** 2
        variance = m2 / count.clamp(min=1)[:, None]
        strength = STRENGTH * (1 - np.cos(np.pi * self.progress)) / 2
        return strength / 2 * self.torch.einsum("yja,ya->yj", v, variance)

    def _average(self) -> None:
        with self.torch.no_grad():
            for name, teacher in self.teachers.items():
                student = self.students[name]
                new = [*student.parameters(), *_floats(student.buffers())]
                old = [*teacher.parameters(), *_floats(teacher.buffers())]
                self.torch._foreach_lerp_(old, new, 0.01)


def _floats(buffers: Any) -> list[Any]:
    return [buffer for buffer in buffers if buffer.is_floating_point()]


def largest_items(program: JaxStep, count: int, steps: int = 3) -> list[tuple[str, float]]:
    """The kinds of operations (as XLA names them, without their numbers) that take most of the
    profiled time, with their share.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                program()
        (path,) = Path(folder).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(path.read_bytes()))
    total: dict[str, float] = collections.Counter()
    for event in trace["traceEvents"]:
        if "hlo_op" in event.get("args", {}):
            total[event["args"]["hlo_op"].split(".")[0]] += event["dur"]
    everything = sum(total.values())
    largest = sorted(total.items(), key=lambda item: -item[1])[:count]
    return [(name, duration / everything) for name, duration in largest]


if __name__ == "__main__":
    main()
