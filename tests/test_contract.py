"""All methods as the engine sees them, on tiny networks and in each task that they say they learn.

A module that is added to `jaxssl.methods` is tested here as it is: its phases refer to what exists,
and a step keeps the state's shapes and moves what the phase trains, nothing else. For the five
papers' methods, phases have the updates of the papers, and a loss forwards the networks that its
paper forwards, on the streams and in the BatchNorm mode it does.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stream_arrays

from jaxssl import contracts, methods, optim
from jaxssl.contracts import Outputs, Plan, Variables
from jaxssl.methods import dars, dmt, dmt_images, mkd, rml, u2pl
from jaxssl.state import TEACHER, create
from jaxssl.step import Clock, make_train_step


@dataclasses.dataclass(frozen=True)
class Linear:
    """A network of two 1x1 convolutions without linen; `stride` and `width` vary its shapes."""

    width: int = 4
    num_classes: int = 3
    stride: int = 2
    task: str = "segmentation"

    def init(self, key, size):
        stem_key, head_key = jax.random.split(key)
        stem = jax.random.normal(stem_key, (3, self.width))
        kernel = jax.random.normal(head_key, (self.width, self.num_classes))
        head = {"kernel": kernel, "bias": jnp.zeros(self.num_classes)}
        return Variables(
            {"backbone": {"kernel": stem}, "head": head}, {"mean": jnp.zeros(self.width)}
        )

    def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
        x = image.astype(jnp.float32) / 255
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0.5)
        x = x[:, :: self.stride, :: self.stride] @ params["backbone"]["kernel"]
        mean = x.mean((0, 1, 2)) if batch_stats else stats["mean"]
        if batch_stats:
            stats = {"mean": 0.9 * stats["mean"] + 0.1 * mean}
        features = jax.nn.relu(x - mean[None, None, None])
        if key is not None:
            features *= 2.0 * jax.random.bernoulli(key, 0.5, features.shape)
        if self.task == "classification":
            features = features.mean((1, 2))
        logits = features @ params["head"]["kernel"]
        logits += jnp.broadcast_to(params["head"]["bias"], logits.shape)
        return Outputs(logits, features, embedding=features), stats

    def classifier(self, params):
        return params["head"]["kernel"], params["head"]["bias"]

    def resize(self, logits, size):
        shape = (logits.shape[0], *size, logits.shape[-1])
        return jax.image.resize(logits, shape, "bilinear")


DMT = dmt.Method(oracle_epochs=60, supervised_rate=4e-3)
CITYSCAPES = {"sizes": {"labeled": 186, "unlabeled": 2789, "val": 500}, "num_classes": 19}
CIFAR = {"sizes": {"labeled": 4000, "unlabeled": 46_000, "val": 200}, "num_classes": 10}
ROUNDS = [f"round_{i}" for i in (1, 2, 3, 4, 5)]
STEPS = {
    # 80,000 steps, as the config says; a warm-up goes before them.
    "mkd": (
        mkd.Method(),
        Plan(**CITYSCAPES, batch={"labeled": 16, "unlabeled": 16}, steps=80_000, warmup=500),
        {"warmup": 500, "main": 80_000},
    ),
    # 200 passes over 2789 images, 16 at a time: 34862.5.
    "u2pl": (
        u2pl.Method(),
        Plan(**CITYSCAPES, batch={"labeled": 16, "unlabeled": 16}, epochs=200, warmup=174),
        {"warmup": 174, "main": 34_862},
    ),
    # 90,000 steps a stage, and a fifth of that before.
    "rml": (
        rml.Method(),
        Plan(**CITYSCAPES, batch={"labeled": 4, "unlabeled": 4}, steps=90_000),
        {"warmup": 18_000, "stage_1": 90_000, "stage_2": 90_000},
    ),
    # 60 * sqrt(2975 / 186) = 239.96 epochs of 186 images, 8 at a time: 5579.1.
    # 10 epochs of 2789 images, 6 at a time: 4648.3.
    "dmt": (
        DMT,
        Plan(**CITYSCAPES, batch={"labeled": 2, "unlabeled": 6}, epochs=10),
        {"supervised_a": 5579, "supervised_b": 5579}
        | {f"{name}_{student}": 4648 for name in ROUNDS for student in "ba"},
    ),
    # Difference maximized sampling: 239.96 epochs of .8 * 186 images: 4463.2.
    # 8 epochs of 2789 images, 7 at a time: 3187.4.
    "dmt_sampling": (
        dataclasses.replace(DMT, start="sampling"),
        Plan(**CITYSCAPES, batch={"labeled": 1, "unlabeled": 7}, epochs=8),
        {"supervised_a": 4463, "supervised_b": 4463}
        | {f"{name}_{student}": 3187 for name in ROUNDS for student in "ba"},
    ),
    # 300 * sqrt(50000 / 4000) = 1060.66 epochs of 4000 images, 512 at a time: 8286.4.
    # 750 epochs of a fifth, two fifths, ... of 46000 images, 448 at a time: 77008.9 for all.
    "dmt_images": (
        dmt_images.Method(),
        Plan(**CIFAR, batch={"labeled": 64, "unlabeled": 448}, epochs=750),
        {"supervised": 8286}
        | dict(zip(ROUNDS, (15_402, 30_804, 46_205, 61_607, 77_009), strict=True)),
    ),
    # 200 epochs of 2789 images, 8 at a time: 69725; 16 labeled at a time: half as many steps.
    "dars": (
        dars.Method(),
        Plan(**CITYSCAPES, batch={"labeled": 8, "unlabeled": 8}, epochs=200),
        {"supervised": 34_862, "round_1": 69_725, "round_2": 69_725},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_phases_take_the_steps_of_the_paper(name):
    method, plan, steps = STEPS[name]
    phases = method.phases(plan)
    assert [(phase.name, phase.steps) for phase in phases] == list(steps.items())


@pytest.mark.parametrize("name", STEPS)
def test_phases_refer_to_what_exists(name):
    method, plan, _ = STEPS[name]
    assert_phases_refer_to_what_exists(method, method.phases(plan))


def assert_phases_refer_to_what_exists(method, phases):
    networks = {*method.students, *(TEACHER + student for student in method.teachers)}
    assert {method.headline, method.labeler or method.headline} <= networks
    earlier = {}
    for phase in phases:
        assert phase.name not in earlier
        assert {*phase.train, *phase.reinitialize} <= {*method.students}
        assert {*phase.start, phase.headline or method.headline} <= networks
        sweeps = [sweep.name for sweep in phase.sweeps]
        assert len(sweeps) == len(set(sweeps))
        for stream in phase.streams:
            if stream.name == "labeled":
                assert stream.labels == "truth"
            else:
                assert stream is phase.pseudo_labeled or stream.labels is None
        for weights in references(phase):
            assert weights.network in networks
            # What is best is decided, and saved, by the headline's score.
            then = earlier[weights.phase].headline or method.headline
            assert weights.which == "last" or weights.network == then
        done, total = phase.schedule or (0, phase.steps)
        assert 0 <= done <= done + phase.steps <= total
        earlier[phase.name] = phase


def references(phase):
    """All weights of earlier phases that a phase asks for."""
    sweeps = (sweep.networks.values() for sweep in phase.sweeps)
    stream = phase.pseudo_labeled
    labelers = [stream.labels.network] if stream else []
    return [*phase.start.values(), *phase.frozen.values(), *itertools.chain(*sweeps), *labelers]


def test_dmt_labels_with_the_networks_of_the_round_before():
    method, plan, _ = STEPS["dmt_sampling"]
    phases = {phase.name: phase for phase in method.phases(plan)}
    assert len(phases) == 12
    asked = {
        name: [(weights.phase, weights.which) for weights in references(phases[name])]
        for name in ("round_1_b", "round_1_a", "round_2_b", "round_2_a")
    }
    assert asked == {
        "round_1_b": [("supervised_b", "best"), ("supervised_a", "best")],
        "round_1_a": [("supervised_a", "best"), ("supervised_b", "best")],
        "round_2_b": [("round_1_b", "best"), ("round_1_a", "best")],
        "round_2_a": [("round_1_a", "best"), ("round_1_b", "best")],
    }
    parts = [phases[f"supervised_{name}"].streams[0].part for name in "ab"]
    assert parts == [(0.0, 0.8), (pytest.approx(0.2), 1.0)]


@pytest.mark.parametrize(
    ("method", "plan", "phase", "rate"),
    [
        (*STEPS["u2pl"][:2], 0, 1.0),
        (*STEPS["u2pl"][:2], 1, (34_862 / 35_036) ** 0.9),
        (*STEPS["dars"][:2], 2, 1.0),
        # 0.00536 and 0.00372 of 0.01 are the rates at which the released rounds begin.
        (dars.Method(schedule="stretched"), STEPS["dars"][1], 1, 0.536),
        (dars.Method(schedule="stretched"), STEPS["dars"][1], 2, 0.372),
    ],
)
def test_schedules_go_on_restart_or_stretch(method, plan, phase, rate):
    schedule = optim.make_schedule({"schedule": "poly", "power": 0.9, "warmup_steps": 0})
    clock = Clock.of(method.phases(plan)[phase], begin=12_345)
    assert schedule(clock.schedule_begin, clock.schedule_steps) == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "phase", "decays"),
    [
        ("u2pl", 0, {0: 0, 100: 0}),
        ("u2pl", 1, {0: 0, 1: 0.5, 3: 0.75, 1000: 0.99}),
        ("rml", 1, {0: 0, 1: 0.5, 10_000: 0.999}),
        ("rml", 2, {0: 0.999}),
        ("dmt_images", 3, {0: 0, 1: 0.5, 10_000: 0.999}),
    ],
)
def test_teachers_start_once(name, phase, decays):
    method, plan, _ = STEPS[name]
    phase = method.phases(plan)[phase]
    assert {k: float(method.ema_decay(phase, jnp.int32(k))) for k in decays} == pytest.approx(
        decays
    )


SIZE = (8, 12)
# Each program runs once or twice: compiling it well would take far longer than it runs.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
OPTIMIZER = optim.make_optimizer(
    {
        "name": "sgd",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 5e-4,
        "decay_norm_and_bias": True,
        "head_factor": 10.0,
        "clip_norm": 0.0,
    }
)


def drawn(nets):
    """Random variables of each network."""
    return {name: net.init(jax.random.key(i), SIZE) for i, (name, net) in enumerate(nets.items())}


@dataclasses.dataclass(frozen=True)
class Small:
    """A method on two labeled and three unlabeled images, with networks of its own widths."""

    method: contracts.Method
    task: str = "segmentation"
    widths: tuple[int, int] = (4, 4)

    @functools.cached_property
    def phases(self):
        sizes, batch = {"labeled": 8, "unlabeled": 12}, {"labeled": 2, "unlabeled": 3}
        return self.method.phases(
            Plan(sizes, batch, num_classes=3, epochs=5, warmup=7, crop=(6, 8))
        )

    @functools.cached_property
    def nets(self):
        widths = dict(zip(self.method.students, self.widths, strict=False))
        return {name: Linear(width, task=self.task) for name, width in widths.items()}

    def state(self, phase):
        variables = drawn(self.nets)
        return create(self.method, self.nets, OPTIMIZER, phase.train, variables)

    def frozen(self, phase, state):
        return {name: state.network(weights.network) for name, weights in phase.frozen.items()}

    def batch(self, phase):
        rng = np.random.default_rng(0)
        batch = {
            stream.name: stream_arrays(stream, rng, SIZE, num_classes=3, task=self.task)
            for stream in phase.streams
        }
        return jax.tree.map(jnp.asarray, batch)

    def step(self, phase):
        schedule = optim.make_schedule({"schedule": "poly", "power": 0.9, "warmup_steps": 0})
        return make_train_step(
            self.method, self.nets, phase, OPTIMIZER, schedule, learning_rate=0.1, seed=0
        )


SMALLER = {"u2pl": {"keys": 4, "capacity": 8, "capacity_0": 8}}
"""By method, fields that keep its arrays small."""


def small(name, task):
    method = methods.load({"name": name, **SMALLER.get(name, {})})
    return Small(method, task, widths=(4, 6) if name == "rml" else (4, 4))


SMALL = {
    (name, task): small(name, task)
    for task in ("segmentation", "classification")
    for name in methods.for_task(task)
}
PHASES = [(*key, i) for key, small in SMALL.items() for i in range(len(small.phases))]


@pytest.mark.parametrize("name", methods.available())
def test_numbers_of_every_method_have_bounds(name):
    """A field that is a number, may be None instead, or holds several, says which it takes."""
    cls = type(methods.load({"name": name}))
    kinds = get_type_hints(cls, include_extras=True)
    plain = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        parts = {plain[field.name], *get_args(plain[field.name])}
        if parts & {int, float} and field.name not in ("rank_low", "rank_high"):
            assert "Bounds" in repr(kinds[field.name]), f"{name}.{field.name}"


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        (contracts.Bounds(0, 1), (0, 0.5, 1), (-0.1, 1.1, math.nan), "from 0 to 1"),
        (contracts.Bounds(0), (0, 1e9), (-1e-9, math.inf, -math.inf), "from 0 on"),
        (contracts.Bounds(0, without=(0,)), (1e-9, 5), (0, -1), "above 0"),
        (contracts.Bounds(0, 1, without=(1,)), (0, 0.99), (1,), "from 0 to below 1"),
        (contracts.Bounds(0.5, 1, without=(0.5, 1)), (0.6,), (0.5, 1), "above 0.5 to below 1"),
    ],
)
def test_bounds(bounds, inside, outside, words):
    assert all(map(bounds.contain, inside))
    assert not any(map(bounds.contain, outside))
    assert str(bounds) == words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "mkd", "ema_decay_max": 1.5}, r"method.ema_decay_max=1.5 is no number from 0 to"),
        ({"name": "mkd", "threshold": -0.5}, r"method.threshold=-0.5 is no number from 0 to 1\."),
        ({"name": "dmt", "ratios": (0.5, 20.0)}, r"method.ratios=\(0.5, 20.0\) is no number from"),
        ({"name": "fixmatch", "ema_decay_max": -1.0}, "method.ema_decay_max=-1.0 is no number"),
    ],
)
def test_numbers_outside_their_bounds_are_refused(fields, words):
    with pytest.raises(contracts.UserError, match=words):
        methods.load(fields)


def test_every_method_learns_something():
    assert {name for name, _ in SMALL} == {*methods.available()}


@pytest.mark.parametrize(("name", "task"), SMALL)
def test_phases_of_every_method_refer_to_what_exists(name, task):
    one = SMALL[name, task]
    assert_phases_refer_to_what_exists(one.method, one.phases)


@pytest.mark.parametrize(("name", "task", "index"), PHASES)
def test_a_step_keeps_shapes_and_dtypes_of_the_state(name, task, index):
    small, phase = SMALL[name, task], SMALL[name, task].phases[index]
    state = jax.eval_shape(lambda: small.state(phase))
    frozen = jax.eval_shape(lambda state: small.frozen(phase, state), state)
    clock = jax.eval_shape(lambda: Clock.of(phase, 0))
    after, metrics = jax.eval_shape(small.step(phase), state, frozen, small.batch(phase), clock)
    assert after == state
    assert {value.shape for pair in metrics.values() for value in pair} == {()}


@pytest.mark.parametrize(("name", "task"), SMALL)
def test_a_step_moves_what_the_phase_trains_and_nothing_else(name, task):
    small, phase = SMALL[name, task], SMALL[name, task].phases[-1]
    state = jit(functools.partial(small.state, phase))()
    frozen, batch = small.frozen(phase, state), small.batch(phase)
    after, metrics = jit(small.step(phase))(state, frozen, batch, Clock.of(phase, 0))
    assert int(after.skipped) == 0
    assert np.isfinite(metrics["loss"][0])
    for student in small.method.students:
        moved = changed(state.network(student), after.network(student))
        assert moved == (student in phase.train)
    for student in small.method.teachers:
        # At the first update the mean of one network is that network, or little of it.
        decay = float(small.method.ema_decay(phase, jnp.int32(0)))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new,
            state.teacher_params[student],
            after.params[student],
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            after.teacher_params[student],
            expected,
        )
    assert changed(state.extra, after.extra) == bool(state.extra)


def changed(before, after):
    same = jax.tree.map(lambda x, y: bool((x == y).all()), before, after)
    return not all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "mkd",
            {
                **dict.fromkeys([(name, n, "batch", "noise") for name in "ab" for n in (2, 3)], 1),
                **dict.fromkeys([(f"teacher_{name}", n) for name in "ab" for n in (2, 3)], 1),
            },
        ),
        ("u2pl", {("a", 5, "batch", "noise"): 1, ("teacher_a", 3): 1, ("teacher_a", 5): 1}),
        (
            "rml",
            {
                **dict.fromkeys([(name, n, "batch", "noise") for name in "ab" for n in (2, 3)], 1),
                **dict.fromkeys([(f"teacher_{name}", 3) for name in "ab"], 1),
                **dict.fromkeys([(f"frozen {name}", 3) for name in "ab"], 1),
            },
        ),
        ("dmt", {("a", 5, "batch", "noise"): 1}),
        ("dmt_images", {("a", 5, "batch"): 1, ("a", 5, "batch", "noise"): 1}),
        ("dars", {("a", 2, "batch", "noise"): 1, ("a", 3, "batch", "noise"): 1}),
    ],
)
def test_forward_passes(name, expected):
    """Network, images, BatchNorm statistics of the batch or running ones, and noise."""
    task = methods.load({"name": name}).tasks[0]
    small, phase = SMALL[name, task], SMALL[name, task].phases[-1]
    seen = collections.Counter()

    def loss():
        state = small.state(phase)
        frozen = small.frozen(phase, state)
        owners = {id(state.network(n).params): n for n in small.method.students}
        owners |= {id(p): TEACHER + n for n, p in state.teacher_params.items()}
        frozen = {n: Variables(dict(v.params), v.stats) for n, v in frozen.items()}
        owners |= {id(v.params): f"frozen {n}" for n, v in frozen.items()}
        nets = {n: Watched(net, owners, seen) for n, net in small.nets.items()}
        rest = state, frozen, small.batch(phase), jax.random.key(0)
        progress = jnp.float32(0.5)
        return small.method.loss(nets, state.params, *rest, phase=phase, progress=progress)

    jax.eval_shape(loss)
    assert seen == expected


@dataclasses.dataclass(frozen=True, eq=False)
class Watched:
    """A network that counts whose forward passes it makes, and how."""

    net: Linear
    owners: Mapping[int, str]
    seen: collections.Counter

    def init(self, key, size):
        return self.net.init(key, size)

    def classifier(self, params):
        return self.net.classifier(params)

    def resize(self, logits, size):
        return self.net.resize(logits, size)

    def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
        how = ("batch",) * batch_stats + ("noise",) * (key is not None)
        self.seen[self.owners[id(params)], image.shape[0], *how] += 1
        return self.net.apply(params, stats, image, valid=valid, batch_stats=batch_stats, key=key)
