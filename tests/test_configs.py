"""Every config builds; at full size its steps are traced, not run."""

import functools
import importlib.util
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxssl import auto, methods, models, optim
from jaxssl import config as configs
from jaxssl.contracts import Plan, UserError
from jaxssl.data import masks, tfds
from jaxssl.data.folder import Facts
from jaxssl.state import create
from jaxssl.step import Clock, make_train_step

ROOT = Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*_cityscapes.py"))
FOLDERS = sorted(path.stem for path in (ROOT / "configs").glob("*_folder.py"))
SPLITS = ("1_16", "1_8", "1_4", "1_2")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(name: str, arg: str | None = None):
    return load(name).get_config(arg)


def trace(config, num_classes: int = 19):
    """Shapes of the state before and after a step of every phase, for the config's own sizes."""
    method = methods.load(config.method)
    nets = {n: models.load(configs.model_of(config, n), num_classes) for n in method.students}
    batch = {"labeled": config.batch.labeled, "unlabeled": config.batch.unlabeled}
    sizes = {"labeled": 186, "unlabeled": 2789}
    plan = Plan(sizes, batch, num_classes, steps=config.steps, warmup=config.warmup)
    optimizer = optim.make_optimizer(config.optimizer)
    size, key = tuple(config.crop), jax.random.key(0)
    variables = {
        n: jax.eval_shape(functools.partial(net.init, size=size), key) for n, net in nets.items()
    }
    for phase in method.phases(plan):
        make = functools.partial(create, method, nets, optimizer, phase.train)
        state = jax.eval_shape(make, variables)
        step = make_train_step(
            method,
            nets,
            phase,
            optimizer,
            optim.make_schedule(config.optimizer),
            learning_rate=config.optimizer.learning_rate,
            seed=0,
        )
        images = {stream.name: arrays(stream, size) for stream in phase.streams}
        clock = jax.eval_shape(lambda phase=phase: Clock.of(phase, 0))
        after, metrics = jax.eval_shape(step, state, {}, images, clock)
        yield state, after, metrics


def arrays(stream, size):
    image = jax.ShapeDtypeStruct((stream.batch, *size, 3), jnp.uint8)
    valid = jax.ShapeDtypeStruct((stream.batch, *size), jnp.bool_)
    label = jax.ShapeDtypeStruct((stream.batch, *size), jnp.uint8)
    unlabeled = {"image": image, "valid": valid}
    return unlabeled if stream.labels is None else {**unlabeled, "label": label}


@pytest.mark.parametrize("name", FILES)
def test_full_size_steps_keep_the_state(name):
    config = get_config(name, "r101")
    assert tuple(config.crop) == (512, 1024)
    for before, after, metrics in trace(config):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
            lambda x: (x.shape, x.dtype), after
        )
        assert metrics["loss"][0].shape == ()


@pytest.mark.parametrize("name", FILES)
def test_variants_say_what_they_are(name):
    for split, backbone in itertools.product(SPLITS, ("r50", "r101")):
        config = get_config(name, f"{backbone},{split}")
        assert config.data.split == split
        assert config.model.backbone == {"r50": "resnet50", "r101": "resnet101"}[backbone]
        assert config.data.name == "cityscapes"
    streets = get_config(name, "streets")
    assert streets.data.name == "streets"
    assert tuple(streets.crop) == tuple(streets.data.size)


def settled(name, arg, classes=3):
    """A folder's config with everything chosen, for a few small images."""
    table = tuple(f"class {i}" for i in range(classes))
    facts = Facts(12, 30, ((48, 70), (64, 96)), table, ())
    return auto.choose(get_config(name, arg), facts)[0]


@pytest.mark.parametrize(
    ("name", "classes"),
    [("mkd_folder", 2), ("mkd_folder", 150), ("cps_folder", 150), ("supervised_folder", 2)],
)
def test_folders_of_few_and_many_classes_train(name, classes):
    config = settled(name, "small", classes)
    for before, after, metrics in trace(config, classes):
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
        assert metrics["loss"][0].shape == ()
    assert classes in jax.tree.leaves(jax.tree.map(jnp.shape, before.params["a"]))


@pytest.mark.parametrize("name", FOLDERS)
def test_variants_of_folders(name):
    backbones = {arg: get_config(name, arg).model.backbone for arg in ("small", "r50", "r101")}
    assert backbones == {"small": "resnet10", "r50": "resnet50", "r101": "resnet101"}
    assert get_config(name).model == get_config(name, "r50").model
    assert get_config(name, "small").limits.crop < get_config(name).limits.crop
    for arg in ("pretrained", "small,pretrained"):
        config = settled(name, arg)
        assert config.model.pretrained
        assert config.warmup == 0
    assert settled(name, "small").warmup > 0
    for arg in ("r101,pretrained", "pretrained,r50", "small,r101"):
        with pytest.raises(UserError, match="exclude each other"):
            get_config(name, arg)


@pytest.mark.parametrize("name", FILES)
def test_the_long_budget_is_the_streets_alone(name):
    demo, long = get_config(name, "streets"), get_config(name, "long,streets")
    assert get_config(name, "streets,long,1_8").data.split == "1_8"
    assert configs.differences(demo.to_dict(), long.to_dict()) == [
        "steps: 300 -> 1400",
        "warmup: 1400 -> 600",
    ]
    with pytest.raises(UserError, match="write streets,long"):
        get_config(name, "long,1_8")


@pytest.mark.parametrize("name", FILES)
def test_pretrained_swaps_the_backbone(name):
    full, demo = get_config(name, "pretrained,1_8"), get_config(name, "streets,pretrained")
    for config in (full, demo):
        assert config.model.backbone == "efficientnet_lite0"
        assert config.model.pretrained == "imagenet"
    assert full.optimizer.learning_rate == 0.01
    assert demo.optimizer.learning_rate == 0.001
    assert (full.data.name, full.data.split, full.model.channels) == ("cityscapes", "1_8", 256)
    assert (demo.data.name, demo.model.channels) == ("streets", 48)
    assert (full.optimizer.head_factor, demo.optimizer.head_factor) == (1, 10)
    assert all("streets," not in hint or "pretrained" in hint for hint in demo.next)
    with pytest.raises(UserError, match="'r101' and 'pretrained' exclude each other"):
        get_config(name, "r101,pretrained")


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, "mkd_pets"])
def test_docstrings_give_command_cost_and_published_figure(name):
    text = load(name).__doc__
    for word in ("Command", "python -m jaxssl.main", "Cost:", "Published"):
        assert word in text


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, "mkd_pets"])
def test_configs_list_every_field_of_their_method(name):
    config = get_config(name)
    method = methods.load(config.method)
    fields = set(vars(method)) - {"teacher_stats", "auxiliary_weight"}
    assert fields <= set(config.method), fields - set(config.method)


def test_pets_are_read_by_tfds():
    config = get_config("mkd_pets")
    assert set(tfds.DEFAULTS) <= set(config.data)
    table = masks.parse(config.data.classes, config.data.ignore, "")
    # The data set's trimap: 1 pet, 2 background, 3 border.
    assert table.labels_of_values() == {1: 1, 2: 0, 3: 255, 255: 255}
    assert config.data.split == "1_16"
    assert config.data.splits.val == "test"
    assert get_config("mkd_pets", "1_64").data.split == "1_64"


@pytest.mark.parametrize("arg", ["small", "r50", "pretrained", "small,pretrained"])
def test_variants_of_pets(arg):
    config = get_config("mkd_pets", arg)
    assert (config.warmup == 0) == bool(config.model.pretrained) == ("pretrained" in arg)
    assert (config.eval.mode == "half_res") == ("small" in arg)
    with pytest.raises(UserError, match="'r50' and 'pretrained' exclude each other"):
        get_config("mkd_pets", "r50,pretrained")


def test_mkd_defaults_are_the_papers():
    config = get_config("mkd_cityscapes")
    assert (config.method.alpha, config.method.beta, config.method.ema_decay_max) == (1.5, 1.0, 0.4)
    assert config.method.teacher_stats == "own"  # of which only the released code speaks
    assert (config.optimizer.learning_rate, config.optimizer.momentum) == (0.01, 0.9)
    assert (config.optimizer.weight_decay, config.optimizer.power) == (5e-4, 0.9)
    assert (config.batch.labeled, config.batch.unlabeled) == (16, 16)
    assert (config.model.output_stride, config.model.separable) == (16, True)
    assert config.warmup == 0


def test_students_may_differ():
    config = get_config("mkd_cityscapes", "streets")
    config.model_b.backbone = "resnet18"
    assert configs.model_of(config, "a")["backbone"] == "resnet10"
    assert configs.model_of(config, "b") == {**config.model, "backbone": "resnet18"}


@pytest.mark.parametrize(
    ("arg", "words"), [("r50,r101", "exclude"), ("r18", "r101"), ("1_3", "1_16")]
)
def test_wrong_variants_are_refused(arg, words):
    with pytest.raises(UserError, match=words):
        get_config("mkd_cityscapes", arg)


def test_differences_name_what_changes_the_run():
    config = get_config("mkd_cityscapes")
    stored = json.loads(config.to_json())
    config.log.every = 7
    config.data.workers = 3
    config.optimizer.learning_rate = 0.5
    config.crop = (256, 512)
    assert configs.differences(stored, json.loads(config.to_json())) == [
        "crop: [512, 1024] -> [256, 512]",
        "optimizer.learning_rate: 0.01 -> 0.5",
    ]


def test_sweep_rows_build_and_match_the_tables():
    rows = load("mkd_sweep").get_rows()
    assert len({row.name for row in rows}) == len(rows) == 17
    for row in rows:
        config = get_config("mkd_cityscapes", "streets")
        config.update_from_flattened_dict(row.overrides)
        methods.load(config.method)
    published = {row.name: row.published["r50"] for row in rows}
    assert published["table3/co_training"] == 68.82
    assert published["table3/mutual_strong_features"] == 74.02
    assert published["table4/gamma_0.4"] == 72.82
    assert published["table5/beta_1.0"] == 73.66


def test_sweep_starter_prints_commands():
    command = [sys.executable, "launch/sweep.py", "--sweep=configs/mkd_sweep.py", "--dry_run"]
    command += ["--config=configs/mkd_cityscapes.py:streets", "--workdir=W", "--only=table4"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = printed.splitlines()
    assert len(lines) == 5
    assert "--config.method.ema_decay_max=0.4" in shlex.split(lines[2])
    assert "--workdir=W/table4/gamma_0.4" in shlex.split(lines[2])
