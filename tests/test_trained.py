"""A workdir opened again gives back what the run saved, and stays as it was."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import Linear, make_state
from ml_collections import ConfigDict

from jaxssl import config as configs
from jaxssl import models, phases, trained
from jaxssl.checkpoint import Checkpoints
from jaxssl.contracts import DataInfo, UserError
from jaxssl.data.splits import Split
from jaxssl.methods import mkd
from jaxssl.trained import open_trained, read_classes, write_classes

CLASSES = {
    "classes": ["sky", "ground", "tree", "car"],
    "palette": [[0, 0, 255], [128, 64, 0], [0, 160, 0], [255, 0, 0]],
    "task": "segmentation",
}
INFO = DataInfo(
    ("sky", "ground", "tree", "car"), ((0, 0, 255), (128, 64, 0), (0, 160, 0), (255, 0, 0))
)


def make_workdir(path, *, classes=CLASSES, best="a"):
    """A run of MKD on `Linear`, evaluated best at step 4, saved last at step 6; its state."""
    count = len(classes["classes"])
    path.mkdir()
    config = configs.default()
    config.crop, config.method = (16, 24), ConfigDict({"name": "mkd", "alpha": 0.5})
    (path / "config.json").write_text(config.to_json_best_effort())
    (path / "classes.json").write_text(json.dumps(classes))
    state = make_state(mkd.Method(), {"a": Linear(count), "b": Linear(count)})
    other = jax.tree.map(lambda x: 2 * x + 1, (state.teacher_params, state.teacher_stats))
    state = state.replace(teacher_params=other[0], teacher_stats=other[1])
    record = {"step": 4, "score": 0.5, "choice": 0.5, "network": best, "last": 0.4}
    meta = {"phase": "main", "phases": [["warmup", 2], ["main", 5]], "best": {"main": record}}
    with Checkpoints(path / "checkpoints") as checkpoints:
        for step in (2, 4, 6):
            checkpoints.keep = {4} if step > 4 else set()
            checkpoints.save(step, jax.tree.map(lambda x, k=step: x + k, state), meta)
    return state


def test_a_phase_that_no_later_one_comes_up_to():
    def one(choice, step, network="a", mode="whole"):
        return {"choice": choice, "step": step, "network": network, "mode": mode}

    falling = {"first": one(0.5, 3), "round_1": one(0.6, 5), "round_2": one(0.4, 9)}
    assert trained.earlier(falling) == ("round_1", falling["round_1"])
    assert trained.earlier({**falling, "round_3": one(0.6, 11)}) is None
    assert trained.earlier({**falling, "round_2_b": one(0.7, 9, "b")}) is None
    windows = {**falling, "round_1": one(0.6, 5, mode="slide")}
    assert trained.earlier(windows) == ("first", falling["first"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "w"
    return path, make_workdir(path)


@pytest.fixture
def workdir(saved, tmp_path):
    path, state = saved
    return shutil.copytree(path, tmp_path / "w"), state


@pytest.fixture(autouse=True)
def _networks(monkeypatch):
    monkeypatch.setattr(models, "load", lambda config, num_classes, **_: Linear(num_classes))


def test_a_run_has_the_keys_of_its_own_networks(workdir):
    path, config = workdir[0], configs.default()
    configs.use_network(config, "deeplab_v2", dropout=0.5)
    configs.use_network(config, "pspnet", student="b", channels=32)
    config.method = ConfigDict({"name": "mkd"})
    stored = json.loads(config.to_json_best_effort())
    del stored["model"]["aspp_rates"], stored["model_b"]["pool_bins"]  # as if they were newer
    (path / "config.json").write_text(json.dumps(stored))
    run = open_trained(path)
    for student in "ab":
        assert configs.model_of(run.config, student) == configs.model_of(config, student)


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def test_a_run_is_what_it_was(workdir):
    run = open_trained(str(workdir[0]))
    assert run.networks == ("a", "b", "teacher_a", "teacher_b")
    assert run.info == INFO
    assert run.method == mkd.Method(alpha=0.5)
    assert run.phases == (("warmup", 2), ("main", 5))
    assert run.kept == (4, 6)
    assert run.config.crop == (16, 24)
    assert run.config.eval.scales == (1.0,)


@pytest.mark.parametrize(("step", "number"), [("best", 4), ("last", 6), (6, 6), ("4", 4)])
@pytest.mark.parametrize("network", [None, "b", "teacher_b"])
def test_a_network_comes_back_on_all_devices(workdir, network, step, number):
    path, state = workdir
    found = open_trained(path).variables(network, step)
    tree = {None: ("params", "a"), "b": ("params", "b"), "teacher_b": ("teacher_params", "b")}
    saved = getattr(state, tree[network][0])[tree[network][1]]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + number), found.params, saved)
    stats = "teacher_stats" if network == "teacher_b" else "stats"
    saved = getattr(state, stats)[tree[network][1]]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + number), found.stats, saved)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(found))


def test_the_headline_is_what_the_best_evaluation_names(tmp_path):
    make_workdir(tmp_path / "w", best="teacher_b")
    run = open_trained(tmp_path / "w")
    assert run.networks == ("teacher_b", "a", "b", "teacher_a")


def test_opening_leaves_a_run_in_progress_alone(workdir):
    path, _ = workdir
    being_saved = path / "checkpoints" / "7.orbax-checkpoint-tmp"
    (being_saved / "state").mkdir(parents=True)
    before = contents(path)
    open_trained(path).variables()
    assert contents(path) == before


def test_overrides_are_read_as_on_a_command_line(workdir):
    overrides = {"eval.mode": "slide", "eval.window": "8,12", "eval.batch": 3, "data.root": "/x"}
    config = open_trained(workdir[0], overrides).config
    assert (config.eval.mode, config.eval.window, config.eval.batch) == ("slide", (8, 12), 3)
    assert config.data.root == "/x"


def test_a_run_that_is_older_than_a_key_has_its_default(workdir):
    path = workdir[0] / "config.json"
    stored = json.loads(path.read_text())
    del stored["eval"]["flip"]
    stored["eval"]["batch"] = 7
    path.write_text(json.dumps(stored))
    config = open_trained(workdir[0]).config
    assert (config.eval.flip, config.eval.batch) == (False, 7)


REFUSED = {
    "no workdir": (lambda path: open_trained(path.parent), "--workdir of a training run"),
    "network": (lambda path: open_trained(path).variables("c"), "a, b, teacher_a, teacher_b"),
    "step": (lambda path: open_trained(path).variables(step=5), "one of 4, 6"),
    "no step": (lambda path: open_trained(path).step("newest"), "one of 4, 6"),
    "key": (lambda path: open_trained(path, {"eval.size": 1}), "no key 'size'"),
    "value": (lambda path: open_trained(path, {"eval.batch": "x"}), "eval.batch=x"),
}


@pytest.mark.parametrize(("act", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_mistake_is_named(workdir, act, words):
    with pytest.raises(UserError, match=words):
        act(workdir[0])


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("classes.json", None, "start its training command once more"),
        ("classes.json", '{"classes": ["a"]}', "classes.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(workdir, file, text, words):
    if text is None:
        (workdir[0] / file).unlink()
    else:
        (workdir[0] / file).write_text(text)
    with pytest.raises(UserError, match=words):
        open_trained(workdir[0])


def test_a_run_without_a_checkpoint_or_evaluation_says_so(workdir, tmp_path):
    path, state = workdir
    empty = tmp_path / "new"
    empty.mkdir()
    for name in ("config.json", "classes.json"):
        (empty / name).write_text((path / name).read_text())
    with pytest.raises(UserError, match="There is no checkpoint in"):
        open_trained(empty)
    with Checkpoints(empty / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {"phase": "main", "phases": [["main", 5]], "best": {}})
    run = open_trained(empty)
    assert run.headline == "a"
    with pytest.raises(UserError, match="--step=last"):
        run.step()
    assert run.step("last") == 1


def test_classes_are_written_and_in_a_run_that_has_begun_other_ones_refused(tmp_path):
    write_classes(tmp_path, INFO)
    assert json.loads((tmp_path / "classes.json").read_text()) == CLASSES
    assert read_classes(tmp_path) == INFO
    other = DataInfo(INFO.classes[::-1], INFO.palette)
    split, config = Split(("1",), ("2",), "drawn"), configs.default()

    def begin(info, **changes):
        config.update(changes)
        phases.open_workdir(tmp_path, config, split, info, main_process=True)

    begin(other, seed=1)  # as long as nothing came of the first start
    assert read_classes(tmp_path) == other
    (tmp_path / "metrics.jsonl").touch()
    begin(other, seed=1)
    with pytest.raises(UserError, match="classes differ"):
        begin(INFO, seed=1)
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        begin(other, seed=2)
