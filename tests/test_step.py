import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMIZER, Linear, make_state, plan, random_batch

from jaxssl import contracts, methods, optim
from jaxssl.contracts import Aux, Phase, Stream, Variables
from jaxssl.methods import mkd, supervised
from jaxssl.state import TrainState
from jaxssl.step import Clock, make_train_step

START = np.array([1.0, -2.0], np.float32)


@dataclasses.dataclass(frozen=True)
class Probe(contracts.Method):
    """Two students of two weights w each, one teacher, and the loss `sum(w) * mean(x)^2`.

    Every argument of the loss appears among the metrics. `poison` is what a batch may bring: "loss"
    is added to the loss, and "gradient" of 0 makes gradients alone infinite.
    """

    decay: float = 0.25
    traces: list = dataclasses.field(default_factory=list)

    @property
    def students(self):
        return ("a", "b")

    @property
    def teachers(self):
        return ("a",)

    def phases(self, plan):
        return (phase(plan.main_steps("labeled")),)

    def ema_decay(self, phase, k):
        return jnp.where(k == 0, 0.0, self.decay)

    def init_extra(self, nets, params):
        return {"count": jnp.zeros((), jnp.int32), "last": jnp.zeros(())}

    def loss(self, nets, params, state, frozen, batch, key, *, phase, progress):
        self.traces.append(phase.name)
        x = batch["labeled"]["x"].mean()
        total = sum(params[name]["w"].sum() for name in self.students)
        poison = batch["labeled"]["poison"].min(0)
        loss = total * x**2 + poison[0] + jnp.sqrt(poison[1] + 0 * total) - 1
        metrics = {
            "x": (batch["labeled"]["x"].sum(), jnp.float32(batch["labeled"]["x"].size)),
            "progress": (progress, jnp.ones(())),
            "draw": (jax.random.uniform(key), jnp.ones(())),
            "frozen": (sum(v.params["w"].sum() for v in frozen.values()), jnp.ones(())),
        }
        stats = {name: {"mean": 0.9 * state.stats[name]["mean"] + 0.1 * x} for name in phase.train}
        teacher_stats = {"a": {"mean": 10 * x}}
        extra = {"count": state.extra["count"] + 1, "last": x}
        return loss, Aux(stats, teacher_stats, extra, metrics)


def phase(steps=10, train=("a", "b"), **fields):
    return Phase("main", steps, train, (Stream("labeled", 4),), **fields)


def probe_state(method, train=("a", "b")):
    optimizer = optim.make_optimizer(OPTIMIZER)
    weights = {"a": {"w": START}, "b": {"w": 2 * START}}
    mean = {"mean": np.float32(0.5)}
    state = TrainState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        params=weights,
        stats={"a": mean, "b": mean},
        teacher_params={"a": {"w": 3 * START}},
        teacher_stats={"a": mean},
        opt_state={name: optimizer.init(weights[name]) for name in train},
        extra=method.init_extra({}, {}),
    )
    return jax.tree.map(jnp.array, state)


def batch_of(x, *, loss=0.0, gradient=1.0):
    x = np.asarray(x, np.float32)
    poison = np.full((len(x), 2), (loss, gradient), np.float32)
    return {"labeled": {"x": x, "poison": poison}}


def make_step(method, phase, nets=None, **options):
    return make_train_step(
        method,
        nets or {},
        phase,
        optim.make_optimizer(OPTIMIZER),
        optim.make_schedule(OPTIMIZER),
        **{"learning_rate": 0.1, "seed": 3, **options},
    )


def first_key():
    """The randomness of step 0 with the seed of `make_step`."""
    return jax.random.fold_in(jax.random.key(3), 0)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_update_by_hand():
    """Momentum .9, poly, teachers after the students, statistics and `extra` of the loss."""
    method = Probe()
    state, clock = probe_state(method), Clock.of(phase(), 0)
    step = jax.jit(make_step(method, phase()))
    w, trace, teacher, mean = START.copy(), 0.0, 3 * START, 0.5
    for k, x in enumerate(([1, 3], [0, 2], [3, 3])):
        state, metrics = step(state, {}, batch_of(x), clock)
        trace = np.mean(x) ** 2 + 0.9 * trace
        w = w - 0.1 * (1 - k / 10) ** 0.9 * trace
        decay = 0.0 if k == 0 else 0.25
        teacher = decay * teacher + (1 - decay) * w
        mean = 0.9 * mean + 0.1 * np.mean(x)
        np.testing.assert_allclose(state.params["a"]["w"], w, rtol=1e-6)
        np.testing.assert_allclose(state.teacher_params["a"]["w"], teacher, rtol=1e-6)
        np.testing.assert_allclose(state.stats["b"]["mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"][0], 2 * np.mean(x) ** 2, rtol=1e-6)
    assert (int(state.step), int(state.skipped)) == (3, 0)
    assert int(state.extra["count"]) == 3


@pytest.mark.parametrize("poison", [{"loss": np.nan}, {"loss": np.inf}, {"gradient": 0.0}], ids=str)
@pytest.mark.parametrize("teacher_stats", ["ema", "own"])
def test_step_that_is_not_finite_is_dropped(poison, teacher_stats):
    method = Probe(teacher_stats=teacher_stats)
    step, clock = jax.jit(make_step(method, phase())), Clock.of(phase(), 0)
    before, _ = step(probe_state(method), {}, batch_of([1, 2]), clock)
    after, metrics = step(before, {}, batch_of([3, 4], **poison), clock)
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert_equal(after.replace(step=before.step, skipped=before.skipped), before)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(metrics))
    assert (float(metrics["skipped"][0]), float(metrics["loss"][1])) == (1, 0)

    again, _ = step(after, {}, batch_of([3, 4]), clock)
    assert (int(again.step), int(again.skipped)) == (3, 1)
    assert (again.params["a"]["w"] != after.params["a"]["w"]).all()


def test_clock_progress_schedule_and_key():
    later = phase(20, schedule=(10, 40), learning_rate=0.5)
    method = Probe()
    state = probe_state(method).replace(step=jnp.int32(105))
    _, metrics = jax.jit(make_step(method, later))(state, {}, batch_of([1]), Clock.of(later, 100))
    np.testing.assert_allclose(metrics["progress"][0], 5 / 20, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"][0], 0.5 * (1 - 15 / 40) ** 0.9, rtol=1e-6)
    key = jax.random.fold_in(jax.random.key(3), 105)
    assert metrics["draw"][0] == jax.random.uniform(key)


def test_one_trace_for_many_steps_and_for_phases_that_lie_elsewhere():
    method = Probe()
    step, state = jax.jit(make_step(method, phase())), probe_state(method)
    for begin in (0, 2):
        clock = Clock.of(phase(10 + begin), begin)
        for _ in range(2):
            state, _ = step(state, {}, batch_of([1, 2]), clock)
    assert method.traces == ["main"]


def test_only_trained_networks_move_and_frozen_ones_reach_the_loss():
    method = Probe()
    state = probe_state(method, train=("b",))
    frozen = {"old": Variables({"w": jnp.array([5.0, 6.0])}, {})}
    only_b = phase(train=("b",))
    after, metrics = jax.jit(make_step(method, only_b))(
        state, frozen, batch_of([1]), Clock.of(only_b, 0)
    )
    assert_equal(after.network("a"), state.network("a"))
    assert (after.params["b"]["w"] != state.params["b"]["w"]).all()
    assert list(after.opt_state) == ["b"]
    assert float(metrics["frozen"][0]) == 11


@pytest.mark.parametrize("teacher_stats", ["ema", "copy", "own"])
def test_statistics_of_teachers(teacher_stats):
    method = Probe(teacher_stats=teacher_stats)
    step, clock = jax.jit(make_step(method, phase())), Clock.of(phase(), 0)
    state, _ = step(probe_state(method), {}, batch_of([1]), clock)
    state, _ = step(state, {}, batch_of([2]), clock)
    first = 0.9 * 0.5 + 0.1 * 1
    student = 0.9 * first + 0.1 * 2
    expected = {"ema": 0.25 * first + 0.75 * student, "copy": student, "own": 20}[teacher_stats]
    np.testing.assert_allclose(state.teacher_stats["a"]["mean"], expected, rtol=1e-6)


@pytest.mark.parametrize("teacher_stats", ["ema", "own"])
def test_accumulation_is_the_mean_over_micro_batches(teacher_stats):
    method = Probe(teacher_stats=teacher_stats)
    step = jax.jit(make_step(method, phase(), accumulate=2))
    x = np.array([1, 2, 4, 8, 0, 3])
    state, metrics = step(probe_state(method), {}, batch_of(x), Clock.of(phase(), 0))
    even, odd = np.mean(x[0::2]), np.mean(x[1::2])
    gradient = (even**2 + odd**2) / 2
    np.testing.assert_allclose(state.params["a"]["w"], START - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0], 3 * START.sum() * gradient, rtol=1e-6)
    mean = 0.9 * (0.9 * 0.5 + 0.1 * even) + 0.1 * odd
    np.testing.assert_allclose(state.stats["a"]["mean"], mean, rtol=1e-6)
    expected = {"ema": mean, "own": 10 * odd}[teacher_stats]
    np.testing.assert_allclose(state.teacher_stats["a"]["mean"], expected, rtol=1e-6)
    assert (float(metrics["x"][0]), float(metrics["x"][1])) == (18, 6)
    draws = jax.vmap(jax.random.uniform)(jax.random.split(first_key(), 2))
    np.testing.assert_allclose(metrics["draw"][0], draws.sum(), rtol=1e-6)
    assert (int(state.step), int(state.extra["count"])) == (1, 2)
    np.testing.assert_allclose(state.extra["last"], odd, rtol=1e-6)


def test_accumulated_gradients_of_a_network(nets):
    """Micro-batches have denominators and statistics of their own."""
    del nets["b"]
    batch = random_batch()
    batch["labeled"]["label"][0] = 255
    method = supervised.Method()
    (main,) = method.phases(plan())
    state = make_state(method, nets)

    def loss(params, state, rows):
        micro = {"labeled": jax.tree.map(lambda x: x[rows], batch["labeled"])}
        key = jax.random.key(0)
        return method.loss(nets, params, state, {}, micro, key, phase=main, progress=jnp.zeros(()))

    first, _ = jax.grad(loss, has_aux=True)(state.params, state, slice(0, None, 2))
    second, _ = jax.grad(loss, has_aux=True)(state.params, state, slice(1, None, 2))
    step = jax.jit(make_step(method, main, nets, accumulate=2))
    after, _ = step(state, {}, {"labeled": batch["labeled"]}, Clock.of(main, 0))
    jax.tree.map(
        lambda new, old, g, h: np.testing.assert_allclose(
            new, old - 0.1 * (g + h) / 2, rtol=1e-4, atol=1e-6
        ),
        after.params,
        state.params,
        first,
        second,
    )


def split(tree, devices):
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tree)


def on_two_devices(step):
    return jax.pmap(
        step, axis_name="data", in_axes=(None, None, 0, None), devices=jax.devices()[:2]
    )


def test_pmap_reduces_over_devices():
    """Losses are local, everything that comes out of them is reduced; keys differ."""
    method = Probe()
    x = np.array([1, 2, 4, 8])
    step = on_two_devices(make_step(method, phase(), axis_name="data"))
    state, metrics = step(probe_state(method), {}, split(batch_of(x), 2), Clock.of(phase(), 0))
    left, right = x[:2].mean(), x[2:].mean()
    expected = START - 0.1 * (left**2 + right**2) / 2
    for leaf in jax.tree.leaves((state, metrics)):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    np.testing.assert_allclose(state.params["a"]["w"][0], expected, rtol=1e-6)
    np.testing.assert_allclose(state.extra["last"][0], (left + right) / 2)
    assert state.extra["count"][0] == 1
    assert metrics["x"][0][0] == x.sum()
    draws = [jax.random.uniform(jax.random.fold_in(first_key(), device)) for device in range(2)]
    np.testing.assert_allclose(metrics["draw"][0][0], sum(draws), rtol=1e-6)


def test_pmap_drops_the_step_on_all_devices():
    method = Probe()
    batch = split(batch_of([1, 2, 3, 4]), 2)
    batch["labeled"]["poison"][1, 0, 0] = np.nan
    step = on_two_devices(make_step(method, phase(), axis_name="data"))
    before = probe_state(method)
    after, _ = step(before, {}, batch, Clock.of(phase(), 0))
    assert after.skipped.tolist() == [1, 1]
    twice = jax.tree.map(lambda x: np.stack([x, x]), (before.params, before.extra))
    assert_equal((after.params, after.extra), twice)


def test_pmap_equals_one_device_where_counts_are_equal(nets):
    """Losses per device have the same denominators, BatchNorm sees all devices."""
    method = mkd.Method(strong=False, feature_augmentation=False)
    (main,) = method.phases(plan())
    batch = random_batch(padded=False)
    state, clock = make_state(method, nets), Clock.of(main, 0)
    one, _ = jax.jit(make_step(method, main, nets))(state, {}, batch, clock)
    parallel = {name: Linear(axis_name="data") for name in nets}
    step = on_two_devices(make_step(method, main, parallel, axis_name="data"))
    two, _ = step(state, {}, split(batch, 2), clock)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-6), one, two)


@pytest.mark.parametrize(
    "config",
    [
        {"name": "supervised"},
        {"name": "cps"},
        {"name": "mkd", "teacher_stats": "own", "augment": "all"},
        {"name": "mkd", "teacher_stats": "copy", "covariance": "full", "teacher": "own"},
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
def test_state_is_a_fixed_point(config, options, nets):
    """Shapes, dtypes and weak types: what is restored, and what would trace again."""
    method = methods.load(config)
    nets = {name: nets[name] for name in method.students}
    for each in method.phases(plan(warmup=1)):
        state = make_state(method, nets)
        step = make_step(method, each, nets, **options)
        after, _ = jax.eval_shape(step, state, {}, random_batch(), Clock.of(each, 0))
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)


def test_loop_donates_and_transfers_nothing(nets):
    method = mkd.Method(strong=False)
    (main,) = method.phases(plan())
    states = [jax.jit(lambda: make_state(method, nets))()]
    step = jax.jit(make_step(method, main, nets), donate_argnums=0)
    clock = Clock.of(main, 0)
    with jax.transfer_guard("disallow"):
        for seed in range(3):
            batch = jax.device_put(random_batch(seed))
            states.append(step(states[-1], {}, batch, clock)[0])
    *before, last = states
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert (int(last.step), int(last.skipped)) == (3, 0)
