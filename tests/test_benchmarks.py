"""The benchmark of methods: what its rows share, and what its table computes."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxssl import methods
from jaxssl.contracts import Plan

FILE = Path(__file__).parents[1] / "benchmarks" / "streets_methods.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("streets_methods", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs(benchmark, *seeds, rows=None, **changes):
    return [
        benchmark.Run(name, seed, benchmark.resolve(row, "scratch", "long", seed, changes))
        for seed in seeds
        for name, row in benchmark.rows().items()
        if rows is None or name in rows
    ]


@pytest.fixture(scope="module")
def digits():
    """The benchmark on digits, and the one whose parts it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FILE.parent)
        module = importlib.import_module("digits_methods")
    yield module
    for name in ("digits_methods", "streets_methods"):
        sys.modules.pop(name)


def train_nothing(benchmark, monkeypatch, score="miou"):
    trained = []

    def train(config, workdir):
        trained.append(config)
        workdir.mkdir(parents=True)
        last = {"step": 7, "eval/mode": "whole", f"val/{score}": 0.5}
        (workdir / "metrics.jsonl").write_text(json.dumps(last) + "\n")
        start = {"seconds": {"training": 2.0}, "memory": {"warmup": 2**20, "main": 3 * 2**20}}
        (workdir / "time.jsonl").write_text(json.dumps(start) + "\n")
        stored = json.loads(config.to_json_best_effort())
        stored["crop"] = stored["crop"] or [64, 64]  # left open, the data decide it
        (workdir / "config.json").write_text(json.dumps(stored) + "\n")
        return 0

    monkeypatch.setattr(benchmark.phases, "run", train)
    return trained


OFFLINE = {"dmt", "dst", "cbst", "dars", "st"}
"""Rows that label before they train, with budgets of their own."""

SHORTER = {"rml_baseline", "rml_iml", "rml_iml_model_noise", "rml_iml_input_noise"}
SHORTER |= {"rml_iml_full_noise", "rml_rml"}
"""Rows of fewer stages than the method has."""

OWN = ("embedding", "dropout", "stochastic_depth")
"""Keys of the network that belong to a method: U2PL's head, RML's noise."""


def test_rows_of_a_seed_share_everything_but_the_method(benchmark):
    shared, updates, stems = set(), set(), set()
    for run in runs(benchmark, 3):
        config = run.config.to_dict()
        del config["method"], config["next"]
        plan = Plan(
            {"labeled": 8, "unlabeled": 392},
            {"labeled": 4, "unlabeled": 4},
            19,
            steps=config["steps"],
            warmup=config["warmup"],
        )
        phases = methods.load(run.config.method).phases(plan)
        if run.row in OFFLINE:
            mkd = benchmark.resolve(benchmark.rows()["mkd"], "scratch", "long", 3, {})
            config["warmup"] = mkd.warmup
            config["optimizer"]["learning_rate"] = mkd.optimizer.learning_rate
        elif run.row not in SHORTER:
            updates.add(sum(phase.steps for phase in phases))
        del config["steps"]
        for key in OWN:
            del config["model"][key]
        all_labels = config["data"].pop("split") == "all"
        assert all_labels == (run.row == "supervised_all")
        shared.add(json.dumps(config, sort_keys=True))
        stems.add(run.stem)
    assert updates == {2000}
    assert len(shared) == 1
    assert len(stems) == len(benchmark.rows()) == 37


@pytest.mark.parametrize(
    ("name", "steps"), [("supervised", 800), ("mkd", 800), ("dmt", 160), ("st", 400), ("rml", 400)]
)
def test_updates_are_shared_among_rounds(benchmark, name, steps):
    row = benchmark.rows()[name]
    config = benchmark.resolve(row, "scratch", "long", 0, {})
    assert benchmark.share_updates(config, "300+800") == {"warmup": "300", "steps": str(steps)}


@pytest.mark.parametrize(
    ("network", "root", "same"),
    [
        ("scratch", None, "mkd_mutual_strong"),
        ("pretrained", Path("leaves"), "mkd_mutual_strong_features"),
    ],
)
def test_ablations_that_are_the_method_itself_run_once(benchmark, network, root, same):
    kept = benchmark.distinct(
        benchmark.Run(
            name, seed, benchmark.resolve(row, network, "long", seed, {"data.split": "8"}, root)
        )
        for seed in (0, 1)
        for name, row in benchmark.rows().items()
    )
    for seed in (0, 1):
        left_out = {same, "u2pl_all", "rml_rml_two_stages"}
        assert {run.row for run in kept if run.seed == seed} == benchmark.rows().keys() - left_out


def test_a_folder_of_images_takes_the_place_of_the_streets(benchmark, monkeypatch, tmp_path):
    root = tmp_path / "leaves"
    given = ["--rows=supervised,mkd", "--seeds=0,3", f"--root={root}"]
    results = ["--results", str(tmp_path / "results"), "--workdirs", str(tmp_path / "workdirs")]
    overrides = ["--config.data.split=1_8", "--config.steps=7"]
    monkeypatch.setattr(sys, "argv", ["streets_methods.py", *given, *results, *overrides])
    (root / "images").mkdir(parents=True)
    trained = train_nothing(benchmark, monkeypatch)
    for _ in range(2):  # what is done is not repeated
        assert benchmark.main() == 0
    seen = [(c.method.name, c.data.name, c.data.root, c.data.seed, c.seed) for c in trained]
    assert seen == [
        (method, "folder", str(root), seed, seed)
        for seed in (0, 3)
        for method in ("supervised", "mkd")
    ]
    assert {(c.data.split, c.steps) for c in trained} == {("1_8", 7)}
    files = [json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()]
    assert [(file["mode"], file["config"]["crop"]) for file in files] == [("whole", [64, 64])] * 4
    (root / "images" / "another.png").write_bytes(b"x")
    benchmark._fingerprint.cache_clear()
    with pytest.raises(SystemExit, match="is about other images"):
        benchmark.main()
    assert len(trained) == 4


def test_other_sources_are_told_and_repeated_on_request(benchmark, monkeypatch, capsys, tmp_path):
    trained = train_nothing(benchmark, monkeypatch)
    given = ["--rows=supervised", "--seeds=0,1", "--results", str(tmp_path / "results")]
    given += ["--workdirs", str(tmp_path / "workdirs")]

    def again(code, *more):
        monkeypatch.setattr(benchmark, "code_version", lambda method: code)
        monkeypatch.setattr(sys, "argv", ["streets_methods.py", *given, *more])
        assert benchmark.main() == 0
        return capsys.readouterr().out

    again("old")
    assert "done before, by other sources" in again("new")
    assert len(trained) == 2
    assert "computed by different sources" not in again("new", "--again")
    assert len(trained) == 4
    assert len(list((tmp_path / "results").iterdir())) == 4
    assert "done before\n" in again("new", "--again")
    next((tmp_path / "results").glob("*seed1*-new.json")).unlink()
    assert "computed by different sources" in again("new", "--table")


def test_a_run_is_named_by_what_its_config_changes(benchmark):
    (one,) = runs(benchmark, 0, rows=["mkd"])
    (again,) = runs(benchmark, 0, rows=["mkd"])
    (longer,) = runs(benchmark, 0, rows=["mkd"], steps="3001")
    (other,) = runs(benchmark, 1, rows=["mkd"])
    again.config.log.every = 7  # does not change what is computed
    (windows,) = runs(benchmark, 0, rows=["mkd"])
    windows.config.eval.mode = "slide"
    assert one.stem == again.stem
    assert len({one.stem, longer.stem, other.stem, windows.stem}) == 4
    assert longer.config.steps == 3001


def test_results_of_fewer_keys_are_found(benchmark, tmp_path):
    (run,) = runs(benchmark, 0, rows=["mkd"])
    (longer,) = runs(benchmark, 0, rows=["mkd"], steps="3001")
    config = json.loads(run.config.to_json_best_effort())
    del config["parallel"], config["method"]["threshold"], config["model"]["embedding"]
    result = {"config": config, "code": "x", "finished": "", "miou": 0.5}
    (tmp_path / "mkd-seed0-0123abcd-x.json").write_text(json.dumps(result))
    assert run.read(tmp_path) == result
    assert longer.read(tmp_path) is None
    config["method"]["no_longer_there"] = 1
    (tmp_path / "mkd-seed0-0123abcd-x.json").write_text(json.dumps(result))
    assert run.read(tmp_path) is None


def test_the_table_pairs_seeds(benchmark, tmp_path):
    scores = {"supervised": (0.25, 0.30, 0.20), "mkd": (0.27, 0.31)}
    found = runs(benchmark, 0, 1, 2, rows=scores)
    for run in found:
        if run.seed < len(scores[run.row]):
            seconds = 40.0 if run.row == "mkd" else 10.0
            result = {"miou": scores[run.row][run.seed], "steps": 4, "code": "x", "finished": ""}
            result |= {"memory": 3 * 2**20} if run.row == "mkd" else {}
            result["config"] = json.loads(run.config.to_json_best_effort())
            text = json.dumps({**result, "training_seconds": seconds})
            (tmp_path / f"{run.stem}-x.json").write_text(text)
    lines = benchmark.table(found, tmp_path).splitlines()
    assert lines[2:] == [
        "| supervised | 3 | 25.0 ± 5.0 |  |  | 4 | 1.0 |  |",
        "| mkd | 2 | 29.0 ± 2.8 | +1.5 ± 0.7 | 2 of 2 | 4 | 4.0 | 3 |",
    ]


def test_digits_are_compared_by_accuracy_for_each_number_of_labels(
    digits, monkeypatch, capsys, tmp_path
):
    trained = train_nothing(digits.methods, monkeypatch, "accuracy")
    where = [f"--results={tmp_path / 'r'}", f"--workdirs={tmp_path / 'w'}"]
    monkeypatch.setattr(sys, "argv", ["digits_methods.py", "--seeds=0,3", *where])
    assert digits.main() == 0
    found = [(config.data.split, config.data.seed, config.seed) for config in trained]
    rows = len(digits.rows())
    assert found == [(n, seed, seed) for n in ("20", "50") for seed in (0, 3) for _ in range(rows)]
    for i, config in enumerate(trained):
        for key in ("data", "model", "optimizer", "crop", "warmup", "steps", "eval"):
            assert config[key] == trained[i - i % rows][key]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "labels" in line] == ["20 labels", "50 labels"]
    assert sum("| accuracy % |" in line for line in lines) == 2
    assert sum("| dmt | 2 | 50.0 ± 0.0 | +0.0 ± 0.0 | 0 of 2 |" in line for line in lines) == 2
    assert digits.main() == 0
    assert len(trained) == 2 * 2 * rows  # nothing twice


def test_fashion_takes_the_place_of_the_digits(digits, monkeypatch, tmp_path):
    trained = train_nothing(digits.methods, monkeypatch, "accuracy")
    given = [f"--fashion={tmp_path}", "--labels=250,1000", "--seeds=0", "--rows=supervised,dmt"]
    where = [f"--results={tmp_path / 'r'}", f"--workdirs={tmp_path / 'w'}"]
    monkeypatch.setattr(sys, "argv", ["digits_methods.py", *given, *where])
    assert digits.main() == 0
    assert [(c.data.set, c.data.split, c.method.name) for c in trained] == [
        ("fashion", labels, method)
        for labels in ("250", "1000")
        for method in ("supervised", "dmt_images")
    ]
    assert {(c.data.root, c.model.depth) for c in trained} == {(str(tmp_path), 10)}


def test_the_sources_of_a_method_are_those_that_it_imports(benchmark):
    assert benchmark._imported("supervised") == {"supervised"}
    assert benchmark._imported("dmt_images") == {"dmt_images", "dmt", "mean_teacher", "supervised"}


def test_labels_are_drawn_round_by_round(benchmark, monkeypatch, tmp_path):
    def labelings(*phases):
        return [
            {"phase": f"round_{p}", "accuracy": 0.5 + i / 10, "kept": (i + 1) / 10, "kl": 0.1}
            for i, p in enumerate(phases)
        ]

    found = runs(benchmark, 0, 1, rows=["dmt", "dars", "mkd"])
    made = {"dmt": labelings("1_b", "1_a", "2_b", "2_a"), "dars": labelings("1", "2"), "mkd": []}
    for run in found:
        result = {"labelings": made[run.row], "code": "x", "finished": ""}
        result["config"] = json.loads(run.config.to_json_best_effort())
        (tmp_path / f"{run.stem}-x.json").write_text(json.dumps(result))
    right, kept = benchmark.draw(found, tmp_path).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert lines.keys() == {"dmt (2 seeds)", "dars (2 seeds)"}
    np.testing.assert_allclose(
        lines["dmt (2 seeds)"], [(1, 50), (1.5, 60), (2, 70), (2.5, 80)], rtol=1e-6
    )
    np.testing.assert_allclose(lines["dars (2 seeds)"], [(1, 50), (2, 60)], rtol=1e-6)
    assert [line.get_ydata().tolist() for line in kept.lines][-1] == pytest.approx([10, 20])
    arguments = [f"--results={tmp_path / 'none'}", f"--plot={tmp_path / 'plot.png'}"]
    monkeypatch.setattr(sys, "argv", ["streets_methods.py", *arguments])
    with pytest.raises(SystemExit, match="made pseudo-labels"):
        benchmark.main()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows=supervised,mdk"], "no row 'mdk'; there are supervised,"),
        (["--config.steps"], "overrides look like"),
        (["--stesp=1"], "unexpected --stesp=1"),
    ],
)
def test_mistakes_are_told(benchmark, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["streets_methods.py", *arguments])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    assert left.value.code == 2
    assert words in capsys.readouterr().err
