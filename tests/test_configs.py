"""Every config builds; at full size its steps are traced, not run."""

import collections
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
from jaxssl.contracts import Labeling, Plan, UserError
from jaxssl.data import masks, tfds
from jaxssl.data.folder import Facts
from jaxssl.inference import Presentation
from jaxssl.methods import dmt_images, rml
from jaxssl.state import create
from jaxssl.step import Clock, make_train_step

ROOT = Path(__file__).parents[1]
CITYSCAPES = sorted(path.stem for path in (ROOT / "configs").glob("*_cityscapes.py"))
# Those with one network and the words of `configs.cityscapes`.
ONLINE = ("supervised", "cps", "cutmix_seg", "dml", "fixmatch", "mean_teacher", "mkd")
FILES = [name for name in CITYSCAPES if name.removesuffix("_cityscapes") in ONLINE]
FOLDERS = sorted(path.stem for path in (ROOT / "configs").glob("*_folder.py"))
VOC = sorted(path.stem for path in (ROOT / "configs").glob("*_voc.py"))
CIFAR10 = sorted(path.stem for path in (ROOT / "configs").glob("*_cifar10.py"))
OTHERS = ("dmt_class_folders", "mkd_pets")
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
    size = tuple(config.crop)
    budget = {"steps": config.steps, "epochs": config.epochs, "warmup": config.warmup}
    plan = Plan(sizes, batch, num_classes, **budget, crop=size)
    optimizer = optim.make_optimizer(config.optimizer)
    key = jax.random.key(0)
    variables = {
        n: jax.eval_shape(functools.partial(net.init, size=size), key) for n, net in nets.items()
    }
    for phase in unlike(method.phases(plan)):
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
        whole = {net.task for net in nets.values()} == {"classification"}
        images = {stream.name: arrays(stream, size, whole=whole) for stream in phase.streams}
        frozen = {name: state.network(weights.network) for name, weights in phase.frozen.items()}
        clock = jax.eval_shape(lambda phase=phase: Clock.of(phase, 0))
        after, metrics = jax.eval_shape(step, state, frozen, images, clock)
        yield state, after, metrics


def unlike(phases):
    """Phases without those that train as many networks on the same arrays as one before."""
    seen = {}
    for phase in phases:
        streams = tuple((s.name, s.batch, type(s.labels)) for s in phase.streams)
        seen.setdefault((len(phase.train), streams), phase)
    return seen.values()


def arrays(stream, size, *, whole):
    image = jax.ShapeDtypeStruct((stream.batch, *size, 3), jnp.uint8)
    shape = (stream.batch, *(() if whole else size))
    label = jax.ShapeDtypeStruct(shape, jnp.uint8)
    confidence = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = {"image": image} if whole else {"image": image, "valid": label.update(dtype=bool)}
    if stream.labels is not None:
        found["label"] = label
    return found | ({"confidence": confidence} if isinstance(stream.labels, Labeling) else {})


@pytest.mark.parametrize("name", ["supervised", "cps", "mkd"])
def test_full_size_steps_keep_the_state(name):
    config = get_config(f"{name}_cityscapes", "r101")
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


@pytest.mark.parametrize("name", ["cps_voc", "mkd_voc", "supervised_voc"])
def test_variants_of_voc(name):
    for split, backbone in itertools.product((*SPLITS, "92", "1464"), ("r50", "r101")):
        config = get_config(name, f"{backbone},{split}")
        assert config.model.backbone == {"r50": "resnet50", "r101": "resnet101"}[backbone]
        assert config.data.split == {"1464": "all"}.get(split, split)
        assert config.data.set == ("blender" if split in SPLITS else "classic")
        assert config.data.extra == (split not in SPLITS and name != "supervised_voc")
    assert get_config(name).data.split == "1_16"
    for arg, backbone in ((None, "resnet50"), ("pretrained,92", "efficientnet_lite0")):
        config = get_config(name, arg)
        assert config.model.backbone == backbone
        # Of MKD's paper.
        assert (config.optimizer.learning_rate, config.optimizer.head_factor) == (0.0025, 1)
        assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 5e-4)
        assert (config.steps, config.warmup, tuple(config.crop)) == (30_000, 0, (512, 512))
        assert (config.batch.labeled, config.batch.unlabeled) == (16, 16)
        assert (config.eval.mode, tuple(config.eval.scales)) == ("whole", (1.0,))
    with pytest.raises(UserError, match="'92' and '1_8' exclude each other"):
        get_config(name, "92,1_8")


def test_all_labels_of_voc():
    config = get_config("supervised_voc", "all")
    assert (config.data.set, config.data.split, config.data.extra) == ("blender", "all", False)


def test_full_size_steps_on_voc_keep_the_state():
    ((before, after, metrics),) = trace(get_config("supervised_voc"), 21)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert metrics["loss"][0].shape == ()


def settled(name, arg, classes=3):
    """A folder's config with everything chosen, for a few small images."""
    table = tuple(f"class {i}" for i in range(classes))
    facts = Facts(12, 30, ((48, 70), (64, 96)), table, ())
    return auto.choose(get_config(name, arg), facts)[0]


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("mkd_folder", 2),
        ("mkd_folder", 150),
        ("cps_folder", 150),
        ("cutmix_seg_folder", 2),
        ("dml_folder", 2),
        ("fixmatch_folder", 2),
        ("mean_teacher_folder", 2),
        ("supervised_folder", 2),
        ("dars_folder", 2),
        ("dmt_folder", 2),
        ("rml_folder", 2),
        ("u2pl_folder", 2),
    ],
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
    rounds = {"dars_cityscapes": 2}.get(name, 1)
    assert configs.differences(demo.to_dict(), long.to_dict()) == [
        f"steps: {300 // rounds} -> {1400 // rounds}",
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


@pytest.mark.parametrize("name", [*CITYSCAPES, *FOLDERS, *VOC, *CIFAR10, *OTHERS])
def test_docstrings_give_command_cost_and_published_figure(name):
    text = load(name).__doc__
    for word in ("Command", "python -m jaxssl.main", "Cost:", "Published"):
        assert word in text


@pytest.mark.parametrize("name", [*CITYSCAPES, *FOLDERS, *VOC, *CIFAR10, *OTHERS])
def test_configs_list_every_field_of_their_method(name):
    config = get_config(name)
    method = methods.load(config.method)
    auxiliary = config.model.get("auxiliary")
    optional = {"teacher_stats"} | (set() if auxiliary else {"auxiliary_weight"})
    fields = set(vars(method)) - optional
    assert fields <= set(config.method), fields - set(config.method)


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        *itertools.product(CIFAR10, (None, "1000", "fashion", "fashion,small", "digits,20")),
        *(("dmt_class_folders", arg) for arg in (None, "small", "pretrained")),
    ],
)
def test_steps_on_whole_images_keep_the_state(name, arg):
    config, phases = get_config(name, arg), 0
    for before, after, metrics in trace(config, 10):
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
        assert metrics["loss"][0].shape == ()
        phases += 1
    online = name in ("mean_teacher_cifar10", "fixmatch_cifar10")
    warmup = online and ("digits" in (arg or "") or "small" in (arg or ""))
    assert phases == (2 if name.startswith("dmt") or warmup else 1)


@pytest.mark.parametrize(
    ("arg", "batch", "cutout", "size"),
    [
        ("4000", (64, 448), 16, 32),
        ("1000", (16, 496), 16, 32),
        ("fashion,4000", (64, 448), 14, 28),
    ],
)
def test_dmt_trains_on_cifar10_as_the_paper_says(arg, batch, cutout, size):
    config, labels = get_config("dmt_cifar10", arg), arg.split(",")[-1]
    assert (config.epochs, config.steps, config.warmup) == (750, None, 0)
    assert (config.batch.labeled, config.batch.unlabeled) == batch
    assert (config.data.split, config.data.validation) == (labels, 200)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (0.1, 5e-4)
    assert (config.optimizer.schedule, config.optimizer.decay_norm_and_bias) == ("cosine", True)
    assert config.augment.to_dict() == {
        "scale": (1.0, 1.0),
        "scale_median": None,
        "flip": True,
        "rotate": 0.0,
        "blur": 0.0,
        "pad": 4,
        "randaugment": 1,
        "operations": "paper",
        "cutout": cutout,
    }
    model = models.load(config.model, 10)
    assert (config.model.name, model.depth, model.widen) == ("wide_resnet", 28, 2)
    assert tuple(config.crop) == (size, size)
    assert methods.load(config.method) == dmt_images.Method(supervised_rate=0.2)


@pytest.mark.parametrize(
    ("arg", "updates"), [("1000", 4143), ("4000", 8286), ("all", 29_297), ("fashion,4000", 9077)]
)
def test_labels_of_cifar10_alone_have_the_updates_that_dmt_begins_with(arg, updates):
    config, labels = get_config("supervised_cifar10", arg), arg.split(",")[-1]
    total = 60_000 if "fashion" in arg else 50_000
    count = total if labels == "all" else int(labels)
    sizes = {"labeled": count, "unlabeled": total - count}
    assert config.optimizer.learning_rate == 0.2
    for one in (config, *([get_config("dmt_cifar10", arg)] if labels != "all" else [])):
        batch = {name: one.batch[name] for name in ("labeled", "unlabeled")}
        first, *_ = methods.load(one.method).phases(Plan(sizes, batch, 10, epochs=one.epochs))
        assert (first.steps, first.streams[0].batch) == (updates, 512)


@pytest.mark.parametrize(
    ("arg", "data", "labels", "updates"),
    [
        ("digits", "digits", "50", (400, 1000)),
        ("digits,20", "digits", "20", (400, 1000)),
        ("small,250", "cifar10", "250", (3000, 1000)),
        ("fashion,1000,small", "mnist", "1000", (3000, 1000)),
    ],
)
def test_data_of_small_networks_are_the_same_for_all_methods(arg, data, labels, updates):
    first, *others = (get_config(name, arg).to_dict() for name in CIFAR10)
    assert (first["data"]["name"], first["data"]["split"]) == (data, labels)
    assert ((first["warmup"], first["steps"]), first["model"]["depth"]) == (updates, 10)
    for config in others:
        for key in ("data", "model", "optimizer", "crop", "warmup", "steps", "eval"):
            assert config[key] == first[key]
    with pytest.raises(UserError, match="'digits' and 'fashion' exclude each other"):
        get_config("dmt_cifar10", "digits,fashion")


@pytest.mark.parametrize("variant", ["direct", "indirect", "noisy"])
def test_rml_on_digits_differs_in_who_teaches_alone(variant):
    config, mnist = get_config("rml_digits", variant), get_config("rml_digits", f"mnist,{variant}")
    method = methods.load(config.method)
    assert method == methods.load(mnist.method)
    assert method.supervision == ("direct" if variant == "direct" else "peer")
    assert method.model_noise == method.input_noise == (variant == "noisy")
    assert (mnist.data.name, mnist.data.split, mnist.crop) == ("mnist", "1_60", (28, 28))
    first = get_config("rml_digits", "direct").to_dict()
    assert {**config.to_dict(), "method": first["method"]} == first
    *_, (before, after, metrics) = trace(config, 10)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert "coupling" in metrics


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


@pytest.mark.parametrize("network", ["pspnet50", "deeplab_v2"])
def test_full_size_steps_of_dars_keep_the_state(network):
    config = get_config("dars_cityscapes", network)
    for before, after, metrics in trace(config):
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
        assert metrics["loss"][0].shape == ()


@pytest.mark.parametrize(
    ("name", "arg", "ratios", "scales", "shown"),
    [
        ("dars_cityscapes", None, (0.2, 0.5), ((0.25, 1.0), (0.2, 1.5)), 0.5),
        ("dars_cityscapes", "1_4", (0.4, 0.6), ((0.25, 1.0), (0.2, 1.5)), 0.5),
        ("dars_cityscapes", "1_8,crop713", (0.4, 0.65), ((0.5, 2.0), (0.5, 3.0)), 1.0),
        ("dars_cityscapes", "1_4,crop713", (0.4, 0.65), ((0.5, 2.0), (0.4, 2.5)), 1.0),
        ("dars_cityscapes", "deeplab_v2", (0.2, 0.45), ((0.25, 1.0), (0.25, 1.0)), 0.5),
        ("dars_voc", None, (0.4, 0.5), ((0.5, 1.5), (0.5, 2.0)), 0.8),
    ],
)
def test_rounds_of_dars_are_the_released_ones(name, arg, ratios, scales, shown):
    config = get_config(name, arg)
    method, crop = methods.load(config.method), tuple(config.crop)
    given = {"epochs": config.epochs, "crop": crop, "scale": tuple(config.augment.scale)}
    plan = Plan({"labeled": 372, "unlabeled": 2603}, dict(config.batch), 19, **given)
    rounds = [phase.pseudo_labeled for phase in method.phases(plan)[1:]]
    found = [stream.augment["scale"] for stream in rounds]
    assert found == [pytest.approx(scale) for scale in scales]
    assert tuple(stream.labels.rule.ratio for stream in rounds) == ratios
    # Images are labeled as they are evaluated.
    evaluated = Presentation.of(config.eval, crop)
    assert all(stream.labels.shown == evaluated for stream in rounds)
    assert (evaluated.mode, evaluated.flip, evaluated.scales) == ("slide", True, (shown,))


@pytest.mark.parametrize(
    ("name", "arg", "crop", "rate"),
    [
        ("dars_cityscapes", None, 361, 0.01),
        ("dars_cityscapes", "crop713", 713, 0.01),
        ("dars_cityscapes", "extra", 713, 0.01),
        ("dars_cityscapes", "deeplab_v2", 361, 0.002),
        ("dars_cityscapes", "pretrained", 361, 0.01),
        ("dars_voc", "1_8", 321, 0.01),
    ],
)
def test_dars_trains_as_the_paper_says(name, arg, crop, rate):
    config = get_config(name, arg)
    assert tuple(config.crop) == (crop, crop)
    assert (config.batch.labeled, config.batch.unlabeled) == (8, 8)
    assert (config.optimizer.learning_rate, config.optimizer.head_factor) == (rate, 10.0)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.optimizer.weight_decay, config.optimizer.schedule) == (1e-4, "poly")
    assert (config.augment.rotate, config.augment.blur, config.augment.flip) == (10.0, 0.5, True)
    assert config.model.batch_norm_momentum == 0.1
    assert (config.epochs is None) != (config.steps is None)


def test_extra_images_of_dars():
    config = get_config("dars_cityscapes", "extra")
    assert (config.data.split, config.data.extra) == ("all", True)
    assert config.steps == 200 * 3000 / 8


@pytest.mark.parametrize("arg", ["streets", "streets,long", "streets,pretrained,1_8"])
def test_streets_of_dars(arg):
    config = get_config("dars_cityscapes", arg)
    other = get_config("supervised_cityscapes", arg)
    assert 2 * config.steps == other.steps
    config.method, config.next, config.steps = other.method, other.next, other.steps
    assert config.to_dict() == other.to_dict()


@pytest.mark.parametrize(
    "arg",
    ["crop361,crop713", "streets,crop713", "streets,deeplab_v2", "extra,1_8", "extra,crop361"],
)
def test_words_of_dars_that_exclude_each_other(arg):
    with pytest.raises(UserError, match="exclude each other"):
        get_config("dars_cityscapes", arg)


def test_sweep_rows_of_dars_build_and_match_the_tables():
    rows = load("dars_sweep").get_rows()
    assert len({row.name for row in rows}) == len(rows) == 15
    rounds = collections.Counter()
    for row in rows:
        config = get_config("dars_cityscapes", "streets")
        config.update_from_flattened_dict(row.overrides)
        method = methods.load(config.method)
        sizes = {"labeled": 8, "unlabeled": 392}
        rounds[len(method.phases(Plan(sizes, dict(config.batch), 19, steps=5))) - 1] += 1
    assert rounds == {0: 1, 1: 8, 2: 6}
    published = {row.name: row.published["pspnet50"] for row in rows}
    assert published["table4/baseline"] == 60.75
    assert published["table4/dars_it"] == published["table6/round2_50_wider"] == 69.64
    assert published["table4/dars"] == published["table6/round1_20"] == 68.01


@pytest.mark.parametrize(("name", "classes"), [("u2pl_cityscapes", 19), ("u2pl_voc", 21)])
def test_full_size_steps_of_u2pl_keep_the_state(name, classes):
    config = get_config(name)
    for before, after, metrics in trace(config, classes):
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
        assert before.extra["bank"].keys.shape == (classes, 50_000, 256)
        assert metrics["loss"][0].shape == ()


@pytest.mark.parametrize(
    ("name", "arg", "crop", "rate", "decay", "epochs", "warmup", "mode"),
    [
        ("u2pl_cityscapes", None, 769, 0.01, 5e-4, 200, 0, "slide"),
        ("u2pl_cityscapes", "1_8,pretrained", 769, 0.01, 5e-4, 200, 0, "slide"),
        # An epoch of 9921 images, 16 at a time.
        ("u2pl_voc", None, 513, 0.001, 1e-4, 79, 620, "center_crop"),
        ("u2pl_voc", "92,r50", 513, 0.001, 1e-4, 79, 656, "center_crop"),
        ("u2pl_voc", "1464,pretrained", 513, 0.001, 1e-4, 79, 570, "center_crop"),
    ],
)
def test_u2pl_trains_as_the_paper_says(name, arg, crop, rate, decay, epochs, warmup, mode):
    config, city = get_config(name, arg), name == "u2pl_cityscapes"
    assert (tuple(config.crop), config.epochs, config.warmup) == ((crop, crop), epochs, warmup)
    assert (config.batch.labeled, config.batch.unlabeled, config.steps) == (16, 16, None)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.power) == ("sgd", 0.9, 0.9)
    assert (optimizer.learning_rate, optimizer.weight_decay) == (rate, decay)
    assert (optimizer.head_factor, optimizer.schedule) == (10.0, "poly")
    assert (config.model.auxiliary, config.method.ohem) == (city, city)
    assert (config.model.embedding, config.model.separable) == (256, False)
    assert (tuple(config.augment.scale), config.augment.scale_median) == ((0.5, 2.0), 1.0)
    shown = Presentation.of(config.eval, (crop, crop))
    assert (shown.mode, shown.window, shown.flip) == (mode, (crop, crop), False)
    assert shown.stride == ((513, 513) if city else (342, 342))
    if name == "u2pl_voc":
        assert config.data.set == ("classic" if arg else "blender")
    word = (arg or "").partition(",")[2]
    backbones = {"": "resnet101", "r50": "resnet50", "pretrained": "efficientnet_lite0"}
    assert config.model.backbone == backbones[word]


@pytest.mark.parametrize("arg", ["streets", "streets,long", "streets,pretrained,1_8"])
def test_streets_of_u2pl(arg):
    """Nothing differs from supervised training but the method and what it needs."""
    config, other = get_config("u2pl_cityscapes", arg), get_config("supervised_cityscapes", arg)
    assert (config.model.embedding, other.model.embedding) == (32, 0)
    other.model.embedding, config.method, config.next = 32, other.method, other.next
    assert config.to_dict() == other.to_dict()


def test_sweep_rows_of_u2pl_build_and_match_the_tables():
    rows = load("u2pl_sweep").get_rows()
    assert len({row.name for row in rows}) == len(rows) == 18
    built = {}
    for row in rows:
        config = get_config("u2pl_voc", "1_4")
        config.update_from_flattened_dict(row.overrides)
        built[row.name] = methods.load(config.method)
    published = {row.name: row.published for row in rows}
    same = [name for name, method in built.items() if method == methods.load({"name": "u2pl"})]
    assert same == ["table4/unreliable", "table5/ranks_3_20", "table6/all", "table7/alpha_20"]
    assert {published[name]["1_4"] for name in same} == {79.30}
    assert published["table5/ranks_10_20"] == {"1_8": 78.62, "1_4": 78.94}
    assert published["table6/baseline"] == {"1_4": 73.02}
    assert published["table6/contrast"] == {"1_4": 77.08}
    assert published["table7/alpha_40"] == {"1_8": 76.77, "1_4": 76.92}


def test_full_size_steps_of_dmt_keep_the_state():
    states = 0
    for before, after, metrics in trace(get_config("dmt_cityscapes")):
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
        assert metrics["loss"][0].shape == ()
        states += 1
    assert states == 2  # on labels, and in a round


@pytest.mark.parametrize(
    ("name", "arg", "epochs", "batch", "crop", "gammas", "rate", "start"),
    [
        ("dmt_cityscapes", None, 10, (2, 6), (256, 512), 3, (4e-3, None), "weights"),
        ("dmt_cityscapes", "1_8,r50", 10, (2, 6), (256, 512), 3, (4e-3, None), "weights"),
        ("dmt_cityscapes", "1_30", 8, (1, 7), (256, 512), 3, (4e-3, None), "weights"),
        ("dmt_cityscapes", "pretrained", 10, (2, 6), (256, 512), 3, (4e-3, None), "sampling"),
        ("dmt_voc", None, 5, (1, 7), (321, 321), 5, (1e-3, 2e-3), "weights"),
        ("dmt_voc", "1464", 5, (1, 7), (321, 321), 5, (1e-3, 2e-3), "weights"),
        ("dmt_voc", "1_20", 4, (1, 7), (321, 321), 5, (1e-3, 2e-3), "weights"),
        ("dmt_voc", "1_50", 4, (1, 7), (321, 321), 5, (1e-3, 2e-3), "sampling"),
        ("dmt_voc", "1_106", 4, (1, 7), (321, 321), 5, (1e-3, 2e-3), "sampling"),
        ("dmt_voc", "1_8,pretrained", 5, (1, 7), (321, 321), 5, (1e-3, 2e-3), "sampling"),
    ],
)
def test_dmt_trains_as_table_1_says(name, arg, epochs, batch, crop, gammas, rate, start):
    config = get_config(name, arg)
    assert (config.epochs, config.steps, config.warmup) == (epochs, None, 0)
    assert (config.batch.labeled, config.batch.unlabeled) == batch
    assert (tuple(config.crop), config.method.gamma_1, config.method.gamma_2) == (
        crop,
        gammas,
        gammas,
    )
    assert (config.optimizer.learning_rate, config.method.supervised_rate) == rate
    assert (config.method.start, config.method.alpha) == (start, 0.8)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.optimizer.schedule, config.optimizer.power) == ("poly", 0.9)
    assert (config.optimizer.weight_decay, config.optimizer.head_factor) == (5e-4, 1.0)
    assert (config.model.name, config.model.output_stride) == (
        "deeplab_v2",
        16 if "pretrained" in (arg or "") else 8,
    )
    assert config.model.backbone == {
        "1_8,r50": "resnet50",
        "pretrained": "efficientnet_lite0",
        "1_8,pretrained": "efficientnet_lite0",
    }.get(arg, "resnet101")
    half = name == "dmt_cityscapes"
    assert tuple(config.augment.scale) == ((0.25, 0.75) if half else (0.5, 1.5))
    assert config.eval.mode == ("half_res" if half else "whole")
    assert config.method.label_scale == (0.5 if half else 1.0)
    if name == "dmt_voc":
        assert config.data.set == ("classic" if arg == "1464" else "blender")


@pytest.mark.parametrize("arg", ["streets", "streets,long", "streets,pretrained,1_8"])
def test_streets_of_dmt(arg):
    """Networks, data and the updates of a network are those of the other methods."""
    config, other = get_config("dmt_cityscapes", arg), get_config("supervised_cityscapes", arg)
    rounds = len(config.method.ratios)
    updates, most = config.warmup + rounds * config.steps, other.warmup + other.steps
    assert updates == most if "long" in arg else updates < most  # twelve phases take their time
    assert config.method.supervised_rate == other.optimizer.learning_rate
    other.update(warmup=config.warmup, steps=config.steps)
    other.optimizer.learning_rate /= 2
    config.method, config.next = other.method, other.next
    assert config.to_dict() == other.to_dict()


def test_sweep_rows_of_dmt_build_and_match_the_table():
    rows = load("dmt_sweep").get_rows()
    phases = {}
    for row in rows:
        config = get_config("dmt_cityscapes", "streets")
        config.update_from_flattened_dict(row.overrides)
        method = methods.load(config.method)
        sizes = {"labeled": 8, "unlabeled": 392}
        phases[row.name] = len(method.phases(Plan(sizes, dict(config.batch), 19, steps=5)))
    assert list(phases.values()) == [1, 2, 6, 6, 12, 12, 12]
    published = {row.name: tuple(row.published.values()) for row in rows}
    assert published["table7/online_st"] == (63.12, 53.52)
    assert published["table7/dmt"] == (70.16, 68.37)
    weights = {row.name: row.overrides["method.weight"] for row in rows}
    assert weights["table7/cbst"] == weights["table7/online_st"] == "none"


@pytest.mark.parametrize("arg", ["r50", "r50,setr"])
def test_full_size_steps_of_rml_keep_the_state(arg):
    shapes = []
    for before, after, metrics in trace(get_config("rml_cityscapes", arg)):
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
        assert metrics["loss"][0].shape == ()
        shapes.append(jax.tree.map(jnp.shape, before))
    warmup, stage = shapes
    alike = jax.tree.structure(stage.params["a"]) == jax.tree.structure(stage.params["b"])
    assert alike == (arg == "r50")
    prototypes = {"prototypes": {"a": (19, 2048), "b": (19, 2048)}}
    assert warmup.extra == stage.extra == (prototypes if alike else {})


@pytest.mark.parametrize(
    ("name", "arg", "steps", "batch", "crop", "scale"),
    [
        ("rml_cityscapes", None, 90_000, 4, (256, 512), (0.5, 0.5)),
        ("rml_cityscapes", "1_30,r50", 90_000, 4, (256, 512), (0.5, 0.5)),
        ("rml_cityscapes", "pretrained", 90_000, 4, (256, 512), (0.5, 0.5)),
        ("rml_voc", None, 60_000, 10, (321, 321), (0.5, 1.5)),
        ("rml_voc", "1_100,coco", 60_000, 10, (321, 321), (0.5, 1.5)),
    ],
)
def test_rml_trains_as_the_paper_says(name, arg, steps, batch, crop, scale):
    config = get_config(name, arg)
    assert (config.steps, config.epochs, config.warmup) == (steps, None, 0)
    assert (config.batch.labeled, config.batch.unlabeled) == (batch, batch)
    assert (tuple(config.crop), tuple(config.augment.scale)) == (crop, scale)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.optimizer.learning_rate, config.optimizer.head_factor) == (1e-4, 1.0)
    assert (config.optimizer.schedule, config.optimizer.weight_decay) == ("poly", 2e-4)
    model = configs.model_of(config, "b")
    assert (model["name"], model["dropout"], model["stochastic_depth"]) == ("deeplab_v2", 0.5, 0.8)
    assert model["preprocessing"] == ("caffe" if "coco" in (arg or "") else "imagenet")
    half = name == "rml_cityscapes"
    assert (config.eval.mode, config.method.prototype_scale) == (
        ("half_res", 0.5) if half else ("whole", 1.0)
    )
    method = methods.load(config.method)
    assert method == rml.Method(prototype_scale=config.method.prototype_scale)
    plan = Plan({"labeled": 372, "unlabeled": 2603}, dict(config.batch), 19, steps=config.steps)
    assert [phase.steps for phase in method.phases(plan)] == [steps // 5, steps, steps]


@pytest.mark.parametrize("arg", ["streets", "streets,long", "streets,pretrained,1_8"])
def test_streets_of_rml(arg):
    """Networks but for their noise, data and the updates of a network are those of the others."""
    config, other = get_config("rml_cityscapes", arg), get_config("supervised_cityscapes", arg)
    assert config.method.stages * config.steps == other.steps
    assert config.model.dropout > 0
    assert config.model.stochastic_depth < 1
    other.model.update(dropout=config.model.dropout, stochastic_depth=config.model.stochastic_depth)
    config.method, config.next, config.steps = other.method, other.next, other.steps
    assert config.to_dict() == other.to_dict()


@pytest.mark.parametrize("arg", ["setr", "setr,1_4", "streets,setr", "streets,setr,pretrained"])
def test_a_pair_of_deeplab_and_setr(arg):
    config = get_config("rml_cityscapes", arg)
    a, b = (configs.model_of(config, student) for student in "ab")
    streets = "streets" in arg
    assert (a["name"], b["name"]) == ("deeplab_v3plus" if streets else "deeplab_v2", "setr")
    assert models.load(b, 3).backbone == ("vit_mini" if streets else "vit_large")
    if streets:
        assert "setr" not in config.next[0]
    row = next(row for row in load("rml_sweep").get_rows() if row.name.endswith("v2_setr_iml"))
    for key, value in row.overrides.items():
        if key.startswith("method."):
            assert config.method[key.removeprefix("method.")] == value


def test_sweep_rows_of_rml_build_and_match_the_tables():
    rows = {row.name: row for row in load("rml_sweep").get_rows()}
    phases = collections.Counter()
    for row in rows.values():
        config = get_config("rml_cityscapes", "1_8")
        config.update_from_flattened_dict(row.overrides)
        method, sizes = methods.load(config.method), {"labeled": 372, "unlabeled": 2603}
        phases[len(method.phases(Plan(sizes, dict(config.batch), 19, steps=5))) - 1] += 1
        for student in "ab":
            networks = models.load(configs.model_of(config, student), 19)
            assert type(networks).__module__.endswith(
                "setr" if f"model_{student}.name" in row.overrides else "deeplab_v2"
            )
    assert phases == {0: 3, 1: 8, 2: 1}
    published = [row.published["a"] for name, row in rows.items() if name.startswith("table4")]
    assert published == [56.03, 60.09, 60.51, 60.49, 61.25, 62.85, 63.65]
    assert rows["table5/deeplab_v2_setr_iml"].published == {"a": 63.96, "b": 64.35}
    assert rows["table5/iml"].overrides == rows["table4/iml"].overrides
    assert methods.load(get_config("rml_voc").method) == rml.Method()


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
