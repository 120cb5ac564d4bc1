"""The report of a small run: its numbers against the files that they come from; its pictures."""

import contextlib
import io
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import dars_config, digits_config, forward, nearest
from PIL import Image
from sklearn import metrics as sklearn

from jaxssl import report, trained
from jaxssl.contracts import DataInfo
from jaxssl.data import cityscapes, loading
from jaxssl.figures import (
    class_figure,
    coupling_figure,
    error_figure,
    quality_figure,
    reliability_figure,
)
from jaxssl.metrics import Reliability
from jaxssl.report import CITYSCAPES_TAIL, main, tail_classes

HEAD = ("road", "sidewalk", "building", "vegetation", "sky", "car")


def read(workdir, name):
    return json.loads((workdir / "report" / name).read_text())


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reported(dars_run, tmp_path_factory):
    """The workdir after a report, and what that printed."""
    workdir = shutil.copytree(dars_run, tmp_path_factory.mktemp("reported") / "w")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        dars_config(patch)
        assert main([f"--workdir={workdir}"]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    return workdir, out.getvalue()


def test_numbers_are_those_that_the_run_wrote(reported):
    workdir, printed = reported
    found = read(workdir, "report.json")
    assert [one["phase"] for one in found["scores"]] == ["supervised", "round_1", "round_2"]
    for one in found["scores"]:
        lines = [line for line in logged(workdir) if line["phase"] == one["phase"]]
        scores = {line["step"]: line["val/miou"] for line in lines if "val/miou" in line}
        assert len(scores) == (4 if one["phase"] == "supervised" else 2)
        assert one["network"] == "a"
        assert (one["last"]["step"], one["last"]["miou"]) == max(scores.items())
        assert one["best"]["miou"] == max(scores.values()) == scores[one["best"]["step"]]
        last = next(line for line in lines[::-1] if "val/miou" in line)
        tail = [last[f"val/a/iou/{n}"] for n in CITYSCAPES_TAIL if f"val/a/iou/{n}" in last]
        assert one["last"]["tail"] == pytest.approx(np.mean(tail))
        assert one["last"]["iou"]["road"] == last["val/a/iou/road"]
        assert f"{100 * one['best']['miou']:.2f}" in printed
    stored = [
        json.loads((workdir / "pseudo_labels" / name / "summary.json").read_text())
        for name in ("round_1", "round_2")
    ]
    assert found["labelings"] == stored
    for one in stored:
        (row,) = (line for line in printed.splitlines() if f"{100 * one['kept']:.2f}" in line)
        labeler = one["labeler"]
        assert row.split() == [
            *(one["phase"], labeler["network"], "of", labeler["phase"], str(labeler["step"])),
            *("12", f"{100 * one['kept']:.2f}", f"{one['kl']:.4f}"),
            f"{100 * one['accuracy']:.2f}",
        ]


def test_pictures_are_written(reported):
    for name in ("classes.png", "pseudo_labels.png", "errors.png"):
        picture = Image.open(reported[0] / "report" / name).convert("RGB")
        assert min(picture.size) > 400
        assert len(picture.getcolors(2**24)) > 10
    assert len([*(reported[0] / "report").iterdir()]) == 4


def test_a_run_that_labels_nothing(workdir, capsys):
    shutil.rmtree(workdir / "pseudo_labels")
    assert main([f"--workdir={workdir}"]) == 0
    assert "No phase of this run has learned from stored pseudo-labels." in capsys.readouterr().out
    assert [path.name for path in (workdir / "report").iterdir()] == ["report.json"]
    assert read(workdir, "report.json")["labelings"] == []


def test_a_run_in_progress(workdir, capsys):
    (workdir / "pseudo_labels" / "round_2" / "summary.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 90]
    (workdir / "metrics.jsonl").write_text("\n".join([*kept, lines[-1][:50]]))
    assert main([f"--workdir={workdir}"]) == 0
    found = read(workdir, "report.json")
    assert [one["phase"] for one in found["scores"]] == ["supervised", "round_1"]
    assert [one["phase"] for one in found["labelings"]] == ["round_1"]


def test_scores_of_another_mode_do_not_compare(workdir):
    lines = logged(workdir)
    first = next(line for line in lines if line["phase"] == "round_2" and "val/miou" in line)
    first |= {"eval/mode": "slide", "val/miou": 0.99, "val/a/miou": 0.99}
    # Other networks are scored at the end of a phase alone; what is not finite is null.
    lines[-1] |= {"val/b/miou": None, "val/b/iou/wall": 0.25, "val/b/iou/road": 0.5}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = trained.open_trained(workdir)
    *_, one, other = report.read_scores(run, ("wall", "pole"))
    assert one["best"] == one["last"]
    assert one["best"]["miou"] < 0.99
    assert (other["network"], other["best"], other["best"]["tail"]) == ("b", other["last"], 0.25)


@pytest.fixture(scope="module")
def reported_digits(digits_run, tmp_path_factory):
    """The workdir of a run that classifies, after a report, and what that printed."""
    workdir = shutil.copytree(digits_run, tmp_path_factory.mktemp("reported") / "w")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        digits_config(patch)
        assert main([f"--workdir={workdir}"]) == 0
    return workdir, out.getvalue()


def test_whole_images_are_reported(reported_digits):
    workdir, printed = reported_digits
    found, run = read(workdir, "report.json"), trained.open_trained(workdir)
    one = next(x for x in found["scores"] if x["phase"] == "round_2")
    assert (one["network"], one["best"]["step"]) == (run.headline, run.best["step"])
    lines = {line["step"]: line for line in logged(workdir) if "val/accuracy" in line}
    line, result = lines[run.best["step"]], found["result"]
    assert one["best"]["accuracy"] == line["val/accuracy"] == result["accuracy"] > 0.5
    error = line["val/teacher_a/calibration_error"]
    assert one["best"]["calibration_error"] == error == result["calibration_error"]
    row = f"{100 * one['best']['accuracy']:.2f} {100 * error:.2f} {run.best['step']} center_crop"
    assert row in " ".join(printed.split())

    source = loading.load(run.config.data, "val", True)
    images, truth = (np.stack([x[name] for x in source]) for name in ("image", "label"))
    logits = run.net().apply(*run.variables(), images, batch_stats=False)[0].logits
    p = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_array_equal(
        result["confusion"], sklearn.confusion_matrix(truth, p.argmax(1), labels=range(10))
    )
    bins = np.minimum((15 * p.max(1)).astype(int), 14)
    sums = result["reliability"]
    np.testing.assert_array_equal(sums["all"], np.bincount(bins, minlength=15))
    right = np.bincount(bins, p.argmax(1) == truth, minlength=15)
    np.testing.assert_array_equal(sums["right"], right)
    expected = np.abs(right - np.bincount(bins, p.max(1), minlength=15)).sum() / len(p)
    assert error == pytest.approx(expected, rel=1e-4)


def test_every_evaluation_shows_its_confusions(digits_run):
    steps = {line["step"] for line in logged(digits_run) if "val/accuracy" in line}
    kept = {int(path.stem) for path in (digits_run / "evaluations").iterdir()}
    assert kept == steps
    (events,) = (digits_run / "tensorboard").iterdir()
    shown = events.read_bytes().count(b"confusion")
    assert shown == len(steps)


def test_pictures_of_whole_images_are_written(reported_digits):
    names = {path.name for path in (reported_digits[0] / "report").iterdir()}
    drawn = ("confusion.png", "calibration.png", "classes.png", "pseudo_labels.png", "errors.png")
    assert names == {"report.json", *drawn}


def test_bars_are_how_often_confidences_are_right():
    every, right, sure = np.zeros((3, 5))
    every[1:4:2], right[1:4:2], sure[1:4:2] = (10, 30), (2, 27), (3, 21)
    above, below = reliability_figure(Reliability(every, right, sure, sure)).axes
    assert [bar.get_height() for bar in above.patches] == pytest.approx([20, 90])
    assert [bar.get_x() + bar.get_width() / 2 for bar in above.patches] == pytest.approx([30, 70])
    heights = [segment[0, 1] for segment in above.collections[0].get_segments()]
    assert heights == pytest.approx([30, 70])
    assert [bar.get_height() for bar in below.patches] == pytest.approx([25, 75])
    assert above.figure.legends[0].get_title().get_text() == "calibration error 17.50 %"


def log(workdir, key, distances):
    workdir.mkdir(exist_ok=True)
    lines = [{"step": 10 * i, "phase": "main", key: x} for i, x in enumerate(distances)]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_coupling_is_compared_by_what_all_runs_measure(workdir, tmp_path):
    """Two folders of one name are told apart."""
    one, other = tmp_path / "one" / "w", tmp_path / "other" / "w"
    one.parent.mkdir()
    other.parent.mkdir()
    for path, values in ((workdir, (0.5, None, 0.3)), (one, (0.4, 0.1)), (other, (0.9, 0.8))):
        log(path, "watch/coupling", values)
    log(one, "train/coupling", (0.7, 0.6))
    assert main([f"--workdir={workdir}", f"--compare={one},{other}"]) == 0
    assert (workdir / "report" / "coupling.png").exists()
    found = read(workdir, "report.json")["coupling"]
    assert [*found] == [str(workdir), str(one), str(other)]
    first = {"measured": "watch/coupling", "step": [0, 20], "distance": [0.5, 0.3]}
    assert found[str(workdir)] == first
    found = report.read_coupling([one])
    assert found["w"]["measured"] == "train/coupling"
    (line,) = coupling_figure(found).axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), [0.7, 0.6])
    assert line.get_label() == "w"


def test_a_run_of_one_network_has_no_coupling(workdir, tmp_path, capsys):
    log(tmp_path / "other", "train/coupling", (0.7, 0.6))
    assert report.read_coupling([workdir]) == {}
    assert main([f"--workdir={workdir}", f"--compare={tmp_path / 'other'}"]) == 2
    error = capsys.readouterr().err
    assert f"{workdir} does not say how far two networks are apart" in error


# Shares of the labeled pixels in Cityscapes' train set, in %.
CITYSCAPES = {
    "road": 36.88, "building": 22.82, "vegetation": 15.93, "car": 7.00, "sidewalk": 6.08,
    "sky": 4.02, "pole": 1.23, "person": 1.22, "terrain": 1.16, "fence": 0.88, "wall": 0.66,
    "traffic sign": 0.55, "bicycle": 0.41, "truck": 0.27, "bus": 0.24, "train": 0.23,
    "traffic light": 0.21, "rider": 0.14, "motorcycle": 0.10,
}  # fmt: skip


def test_tail_classes_of_cityscapes_are_those_of_the_rule():
    shares = np.array([*CITYSCAPES.values()])
    assert shares.sum() == pytest.approx(100, abs=0.1)
    assert {*CITYSCAPES} == {*cityscapes.INFO.classes}
    names = tuple(name.replace("a", "b") for name in CITYSCAPES)  # not Cityscapes' names
    prior = dict(zip(names, shares / 100, strict=True))
    found = tail_classes(DataInfo(names, ((0, 0, 0),) * 19), prior)
    expected = {name.replace("a", "b") for name in CITYSCAPES_TAIL}
    assert {*found} == expected
    assert {*cityscapes.INFO.classes} - {*CITYSCAPES_TAIL} == {*HEAD}
    assert tail_classes(cityscapes.INFO, {}) == CITYSCAPES_TAIL


def test_tail_classes_of_tables_mean():
    """IoU and Tail mIoU as printed in Table 4, rows Baseline, ST, DARS and DARS + IT."""
    rows = """
        96.7 75.4 88.2 35.2 35.0 45.8 50.3 63.0 89.6 53.9 92.3 72.1 46.7 90.0 38.4 47.9 33.0 33.7 67.0
        97.4 78.3 89.5 43.4 38.1 47.6 55.7 68.1 90.9 56.6 93.3 75.1 51.4 91.7 49.0 67.9 38.0 46.5 69.9
        97.1 77.7 89.8 50.2 46.3 50.8 58.6 69.5 90.7 57.4 92.8 75.0 52.6 91.8 57.6 70.3 44.3 49.9 69.7
        97.2 78.5 90.1 49.3 47.7 50.9 59.9 70.1 90.8 59.6 92.9 75.2 54.4 92.5 67.7 73.0 48.7 54.7 69.9
    """  # noqa: E501
    iou = np.array(rows.split(), float).reshape(4, 19)
    tail = [cityscapes.INFO.classes.index(name) for name in CITYSCAPES_TAIL]
    assert len(tail) == 13
    np.testing.assert_allclose(iou[:, tail].mean(1), [47.2, 54.0, 57.9, 60.6], atol=0.65)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"a": 0.02, "b": 0.9, "c": 0.08}, ("a", "c")),
        ({"a": 0.02, "b": 0.88, "c": 0.1}, ("a",)),
        ({"a": 0.5, "b": 0.5, "c": 0.0}, ("c",)),
        ({"a": 0.3, "b": 0.3, "c": 0.4}, ()),
        ({}, ()),
    ],
)
def test_tail_classes_are_the_rarest(shares, expected):
    assert tail_classes(DataInfo(("a", "b", "c"), ((0, 0, 0),) * 3), shares) == expected


def summary(name, kept, accuracy, labels, pseudo):
    classes = {
        label: {"of_labels": one, "of_kept": other}
        for label, one, other in zip(("sky", "sea", "boat"), labels, pseudo, strict=True)
    }
    return {"phase": name, "kept": kept, "accuracy": accuracy, "classes": classes}


INFO = DataInfo(("sky", "sea", "boat"), ((70, 130, 180), (0, 60, 100), (255, 255, 255)))
LABELINGS = [
    summary("round_1", 0.2, 0.9, (0.3, 0.69, 0.01), (0.25, 0.75, 0.0)),
    summary("round_2", 0.5, 0.8, (0.3, 0.69, 0.01), (0.29, 0.7, 0.01)),
]


def test_bars_are_the_shares_of_classes():
    axes = class_figure(INFO, LABELINGS).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["sea", "sky", "boat"]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert tops[:3] == pytest.approx([69, 30, 1])
    assert tops[3:5] == pytest.approx([75, 25])
    assert tops[6:] == pytest.approx([70, 29, 1])
    assert axes.get_ylim()[0] <= 1 / 1.5
    assert axes.patches[5].get_height() == 0
    (cross,) = (line for line in axes.lines if len(line.get_xdata()) == 1)
    assert cross.get_xdata() == axes.patches[5].get_x() + axes.patches[5].get_width() / 2
    assert axes.patches[0].get_facecolor()[:3] == pytest.approx((0, 60 / 255, 100 / 255))
    legend = axes.figure.legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["labels", "round_1", "round_2", "none"]


def test_bars_are_the_quality_of_pseudo_labels():
    axes = quality_figure(INFO, LABELINGS).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([20, 50, 90, 80])
    assert {"20.0", "50.0", "90.0", "80.0"} == {text.get_text() for text in axes.texts}
    unknown = [{**one, "accuracy": None} for one in LABELINGS]
    axes = quality_figure(INFO, unknown).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([20, 50])


def test_lines_are_the_errors_of_the_surest():
    errors = {"shares": [0.2, 0.6, 1.0], "all": [0.01, 0.05, 0.2]}
    unknown = {**LABELINGS[1], "errors": None}
    axes = error_figure([{**LABELINGS[0], "errors": errors}, unknown]).axes[0]
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xdata(), [20, 60, 100])
    np.testing.assert_allclose(line.get_ydata(), [1, 5, 20])


def test_errors_of_a_run_are_those_of_all_that_was_predicted(workdir):
    run = trained.open_trained(workdir)
    first, _ = report.read_labelings(run)
    split = json.loads((workdir / "splits.json").read_text())
    source = loading.load(run.config.data, "train", True, split["unlabeled"])
    images, truth = (np.stack([one[name] for one in source]) for name in ("image", "label"))
    variables = jax.device_get(run.variables("a", first["labeler"]["step"]))
    valid = np.ones(images.shape[:3], bool)
    logits = nearest(forward(variables, images, valid, False)[0], truth.shape[1:])
    known, wrong = truth != 255, logits.argmax(-1) != truth
    assert first["errors"]["all"][-1] == pytest.approx(wrong[known].mean(), abs=1e-4)
    for c, name in enumerate(run.info.classes):
        mine = known & (logits.argmax(-1) == c)
        if mine.sum() > 100:
            found = first["errors"]["classes"][name]
            assert found[-1] == pytest.approx(wrong[mine].mean(), abs=1e-2)


def test_a_mistake_is_one_message(capsys):
    assert main(["--workdir=/nowhere"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert "/nowhere" in errors
