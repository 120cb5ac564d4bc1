"""Eight CPU devices, one compilation cache, and what the tests of training share.

Environment variables, so that processes that a test starts have the same cache.
"""

import os
import signal
import tempfile
from pathlib import Path

# Most of the time goes into compiling; without optimization that takes half as long.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir(), "jaxssl-tests-compiled"))
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import contextlib
import dataclasses
import io
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxssl import config as configs
from jaxssl import models, optim, phases, sharding, train
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import IGNORE_LABEL, Labeling, Outputs, Plan, Variables
from jaxssl.models import layers, network
from jaxssl.state import create

MAKE_MESH = sharding.make_mesh

OPTIMIZER = {
    "name": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.0,
    "decay_norm_and_bias": True,
    "head_factor": 1.0,
    "clip_norm": 0.0,
    "schedule": "poly",
    "power": 0.9,
    "warmup_steps": 0,
}


def pytest_configure(config):
    # In the background of a script Ctrl-C is ignored, and then by programs that a test starts too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A test run that was killed may leave half an entry behind.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning"
    )


@dataclasses.dataclass(frozen=True)
class Linear:
    """The smallest network with all parts: every second pixel, centered by a mean over the batch,
    times two matrices. `forward` is its twin in NumPy.
    """

    num_classes: int = 4
    channels: int = 5
    auxiliary: bool = False
    axis_name: str | None = None

    def init(self, key, size):
        keys = jax.random.split(key, 3)
        kernel = 3 * jax.random.normal(keys[0], (3, self.channels))
        head = {
            "kernel": jax.random.normal(keys[1], (self.channels, self.num_classes)),
            "bias": jax.random.normal(keys[2], (self.num_classes,)),
        }
        return Variables({"backbone": {"kernel": kernel}, "head": head}, {"mean": jnp.zeros(3)})

    def apply(self, params, stats, image, *, valid=None, batch_stats, key=None):
        x = image.astype(params["head"]["bias"].dtype) / 255 - 0.5
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        mean = stats["mean"]
        if batch_stats:
            mean = x.mean((0, 1, 2))
            if self.axis_name is not None:
                mean = jax.lax.pmean(mean, self.axis_name)
            stats = {"mean": 0.9 * stats["mean"] + 0.1 * mean}
        features = (x - mean)[:, ::2, ::2] @ params["backbone"]["kernel"]
        logits = features @ params["head"]["kernel"] + params["head"]["bias"]
        auxiliary = 2 * logits if self.auxiliary else None
        return Outputs(logits, features, embedding=features, auxiliary=auxiliary), stats

    def classifier(self, params):
        return params["head"]["kernel"], params["head"]["bias"]

    def resize(self, logits, size):
        return nearest(logits, size)


class Pooled(Linear):
    """`Linear` for classification: the mean of its logits."""

    def apply(self, *args, **kwargs):
        outputs, stats = super().apply(*args, **kwargs)
        return outputs._replace(logits=outputs.logits.mean((1, 2))), stats


def forward(variables, image, valid, batch_stats=True):
    """`Linear` in NumPy, float64: (logits, features, new statistics)."""
    params, stats = jax.tree.map(np.float64, tuple(variables))
    x = np.where(valid[..., None], image / 255 - 0.5, 0)
    mean = x.mean((0, 1, 2)) if batch_stats else stats["mean"]
    if batch_stats:
        stats = {"mean": 0.9 * stats["mean"] + 0.1 * mean}
    features = (x - mean)[:, ::2, ::2] @ params["backbone"]["kernel"]
    return features @ params["head"]["kernel"] + params["head"]["bias"], features, stats


def nearest(x, size):
    """Resizes `[B,h,w,...]` by repeating or dropping pixels."""
    rows, columns = (
        np.arange(new) * old // new for old, new in zip(x.shape[1:3], size, strict=True)
    )
    return x[:, rows][:, :, columns]


def cross_entropy(logits, labels):
    """Mean of -log softmax over the pixels with a label, in NumPy."""
    known = labels != IGNORE_LABEL
    logits, labels = logits[known], labels[known]
    if not len(labels):
        return 0.0
    top = logits.max(-1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
    return (log_sum - logits[np.arange(len(labels)), labels]).mean()


def softmax(logits):
    """In NumPy, over the last axis."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def assert_gradient(gradient, params, value):
    """Compares a gradient with the slope of `value(params)`, in float64, in a random direction.

    On so short a way targets are constant, so a gradient that flowed through them would show.
    """
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.float64, params)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def moved(step):
        return value(jax.tree.map(lambda p, d: p + step * d, params, direction))

    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    slope = sum((g * d).sum() for g, d in pairs)
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-3)


class Body(nn.Module):
    """Three convolutions, down to stride 4."""

    norm: layers.NormDef

    @nn.compact
    def __call__(self, x):
        x = layers.ConvBNReLU(8, self.norm, stride=2)(x)
        x = layers.ConvBNReLU(16, self.norm, stride=2)(x)
        return (layers.ConvBNReLU(16, self.norm, dilation=2)(x),)


class Classifier(nn.Module):
    """A 1x1 convolution."""

    num_classes: int

    @nn.compact
    def __call__(self, stages):
        return layers.classify(stages[-1], self.num_classes, dropout=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(network.LinenNetwork):
    """A network of the library's layers that compiles in seconds."""

    num_classes: int = 4

    def module(self, *, batch_stats):
        return network.EncoderDecoder(Body(self.norm(batch_stats)), Classifier(self.num_classes))


def random_batch(seed=0, *, images=4, size=(16, 24), num_classes=4, padded=True):
    """Noise with labels, some of them ignored; where `padded`, some images end early."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name in ("labeled", "unlabeled"):
        valid = np.ones((images, *size), bool)
        if padded:
            valid[::2, -size[0] // 4 :] = valid[1, :, -size[1] // 4 :] = False
        batch[name] = {
            "image": rng.integers(0, 256, (images, *size, 3), np.uint8),
            "valid": valid,
        }
    label = rng.integers(0, num_classes, (images, *size), np.uint8)
    if padded:
        label[rng.random(label.shape) < 0.1] = IGNORE_LABEL
        label[~batch["labeled"]["valid"]] = IGNORE_LABEL
    batch["labeled"]["label"] = label
    return batch


def stream_arrays(stream, rng, size, *, num_classes=4, task="segmentation"):
    """Noise in a batch of what a phase's stream holds; nothing is padded or ignored."""
    shape = (stream.batch, *size)
    arrays = {"image": rng.integers(0, 256, (*shape, 3), np.uint8)}
    arrays["index"] = np.arange(stream.batch, dtype=np.int32)
    if task == "segmentation":
        arrays["valid"] = np.ones(shape, bool)
    else:
        shape = shape[:1]
    if stream.labels:
        arrays["label"] = rng.integers(0, num_classes, shape, np.uint8)
    if isinstance(stream.labels, Labeling) and stream.labels.confidence:
        arrays["confidence"] = rng.random(shape, np.float32)
    return arrays


def shapes(count=8, size=64):
    """Images of a rectangle and a disk on a background, with noise, and their labels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    label = np.zeros((count, size, size), np.uint8)
    for i in range(count):
        top, left = rng.integers(0, size // 4, 2)
        label[i, top : top + size // 2, left : left + size // 3] = 1
        row, column, radius = size * rng.uniform((0.6, 0.6, 0.2), (0.75, 0.75, 0.25))
        label[i, (y - row) ** 2 + (x - column) ** 2 < radius**2] = 2
    colors = np.array([[60, 90, 60], [170, 60, 60], [60, 80, 190]])
    image = colors[label] + rng.normal(0, 12, (count, size, size, 3))
    valid = np.ones(label.shape, bool)
    return {"image": image.clip(0, 255).astype(np.uint8), "label": label, "valid": valid}


def mean_iou(labels, predictions):
    """Mean over the classes of intersection over union, in NumPy."""
    scores = [
        ((labels == c) & (predictions == c)).sum() / ((labels == c) | (predictions == c)).sum()
        for c in np.unique(labels)
    ]
    return np.mean(scores)


def plan(steps=10, *, warmup=0, images=4):
    """What a method plans its phases from."""
    count = {"labeled": images, "unlabeled": images}
    return Plan(sizes=count, batch=count, num_classes=4, steps=steps, warmup=warmup)


def make_state(method, nets, *, optimizer=None, size=(16, 24)):
    """The state a run of the method starts with; every student differs."""
    optimizer = optimizer or optim.make_optimizer(OPTIMIZER)
    variables = {
        name: net.init(jax.random.key(i), size) for i, (name, net) in enumerate(nets.items())
    }
    return create(method, nets, optimizer, method.students, variables)


def leaves(workdir):
    """The arrays of a workdir's newest checkpoint, by name."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, _ = checkpoints.latest()
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            dict(checkpoints._manager.item_metadata(step)["state"].tree),
        )
        state = checkpoints.restore(step, shapes)
    found = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def assert_same_run(workdir, other):
    """Compares the newest checkpoints and all metrics of two workdirs, bit for bit."""
    mine, theirs = leaves(workdir), leaves(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    texts = [(folder / "metrics.jsonl").read_text() for folder in (workdir, other)]
    assert [json.loads(line) for line in texts[0].splitlines()] == [
        json.loads(line) for line in texts[1].splitlines()
    ]


class Killed(BaseException):
    """Ends a run where it stands."""


def run_until(step, config, workdir):
    """Runs until a step is saved, and no further."""
    save = train.save

    def saving(run, index, state, at):
        save(run, index, state, at)
        if at == step:
            run.checkpoints.wait()
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", saving)
        with pytest.raises(Killed):
            phases.run(config, workdir)


def use_devices(patch, count):
    """Lets runs have the first devices alone."""
    patch.setattr(
        sharding, "make_mesh", lambda devices=None: MAKE_MESH((devices or jax.devices())[:count])
    )


@pytest.fixture
def nets():
    return {"a": Linear(), "b": Linear()}


def dars_config(patch):
    """DARS on streets, with a network that compiles in no time, on one device."""
    patch.setattr(models, "load", lambda config, num_classes, **_: Linear(num_classes))
    use_devices(patch, 1)
    config = configs.default()
    configs.use_streets(config, None)
    with config.unlocked():
        config.data.update(size=(16, 32), train_count=20, val_count=5)
    config.update(crop=(16, 32), warmup=60, steps=30, distributed="off", compilation_cache="")
    config.method = ConfigDict({"name": "dars", "ratios": (0.3, 0.5), "label_mode": "whole"})
    config.optimizer.update(name="sgd", learning_rate=0.5)
    config.log.update(every=2, tensorboard=False)
    config.eval.update(every=15, batch=3, panels=0, bucket=24, unlabeled_truth=True)
    return config


@pytest.fixture(scope="session")
def dars_run(tmp_path_factory):
    """The workdir of a run of `dars_config`; to be copied."""
    workdir = tmp_path_factory.mktemp("dars") / "w"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        assert phases.run(dars_config(patch), workdir) == 0
    return workdir


def digits_config(patch):
    """DMT on the embedded digits, with a small perceptron, on one device."""
    first, make_mesh = jax.devices()[:1], sharding.make_mesh
    patch.setattr(sharding, "make_mesh", lambda devices=None: make_mesh(first))
    config = configs.default()
    configs.use_network(config, "mlp", hidden=(16,))
    with config.unlocked():
        config.data.update(name="digits", root="", split="50")
    config.update(crop=(8, 8), warmup=60, steps=80, distributed="off", compilation_cache="")
    config.method = ConfigDict({"name": "dmt_images", "ratios": (0.3, 1.0), "ema_decay_max": 0.8})
    config.batch.update(labeled=10, unlabeled=20)
    config.augment.update(scale=(1.0, 1.0), flip=False)
    config.optimizer.update(name="adamw", learning_rate=0.01, weight_decay=0.1)
    config.eval.update(every=30, mode="center_crop", batch=120, panels=0, unlabeled_truth=True)
    return config


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The workdir of a run of `digits_config`; to be copied."""
    workdir = tmp_path_factory.mktemp("digits") / "w"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        assert phases.run(digits_config(patch), workdir) == 0
    return workdir


@pytest.fixture
def workdir(dars_run, tmp_path, monkeypatch):
    """A copy of `dars_run`, beside its network and its device."""
    dars_config(monkeypatch)
    return shutil.copytree(dars_run, tmp_path / "w")
