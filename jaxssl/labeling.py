"""Pseudo-labels before a phase trains: a network labels every image, a rule keeps some.

Three passes, of which the first alone needs the network. It writes the class that is most probable
and how sure that is for each image; the second counts these; the third drops what the rule does not
keep. Each can be repeated: what is on disk is not labeled twice, and to select twice changes
nothing. Several processes take an image each in turn, and add up what they count.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxssl import metrics, selection, sweep, train, watch
from jaxssl.contracts import (
    IGNORE_LABEL,
    DataInfo,
    Selection,
    Source,
    Stream,
    UnreadableError,
    UserError,
)
from jaxssl.data import loading, pipeline
from jaxssl.data.pseudo_labels import Store
from jaxssl.data.quarantine import Damage
from jaxssl.train import Run, Stopped

T = TypeVar("T")

_THREADS = 4


def label(run: Run, index: int) -> None:
    """Labels the stream of a phase that asks for it, if one does, from wherever that was left.

    Raises:
      Stopped: on a signal to a single process, between two batches of the first pass; what is
        labeled is on disk.
      UserError: too many images cannot be read, or the disk does not take the labels.
    """
    stream, store = _stream_and_store(run, index)
    if stream is None:
        return
    if not store.complete:
        with run.stopwatch("labeling"):
            _label(run, index, stream, store)
            _all_here(f"{run.phases[index].name}: labeled")
    if jax.process_index() == 0:
        _report(run, index, store.read_summary())


def check(run: Run, index: int) -> None:
    """UserError where pseudo-labels that a phase is in the middle of training on are gone."""
    stream, store = _stream_and_store(run, index)
    if stream is not None and not store.complete:
        raise UserError(
            f"The pseudo-labels in {store.folder} are not complete, though training on them has "
            "begun. Restore them, or start in another --workdir."
        )


def most_probable(logits: jax.Array, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Class uint8 `[...]` and level of confidence uint16 `[...]` (see `selection`) of logits
    `[...,C]`.

    The doubt is summed up from the other classes' probabilities: 1 - p would round it away.
    """
    scaled = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    best = scaled.argmax(-1)
    others = jnp.where(jax.nn.one_hot(best, scaled.shape[-1], dtype=bool), -jnp.inf, scaled)
    doubt = jax.nn.logsumexp(others, -1) - jax.nn.logsumexp(scaled, -1)
    level = jnp.minimum(jnp.round(doubt * (-selection.STEPS / np.log(2))), selection.LEVELS - 1)
    return best.astype(jnp.uint8), jnp.maximum(level, 0).astype(jnp.uint16)


def image_rng(seed: int, image_id: str) -> np.random.Generator:
    """The randomness of an image: the same in whichever order and process it is drawn."""
    digest = hashlib.sha256(image_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def counted(store: Store, ids: Iterable[str]) -> np.ndarray:
    """Positions by class and level of confidence over the labels of images, int64 `[C,levels]`."""
    C = store.info.num_classes
    total = np.zeros((C, selection.LEVELS), np.int64)
    for labels, levels in _in_groups(_in_threads(store.read, ids)):
        total += selection.count(labels, levels, C)
    return total


def judged(store: Store, ids: Iterable[str], truth: Source) -> np.ndarray:
    """Of the labels of images, those whose truth is known and, of these, those that are wrong, by
    class and level of confidence; int64 `[2,C,levels]`.

    Args:
      store: holds the labels, before any is dropped.
      ids: of the images.
      truth: a source with the ground truth of at least these images.
    """
    C, look = store.info.num_classes, _Truth(truth)
    total = np.zeros((2, C, selection.LEVELS), np.int64)

    def read(image_id: str) -> tuple[np.ndarray, ...]:
        labels, levels = store.read(image_id)
        return labels, levels, look(image_id, labels.shape)

    for labels, levels, true in _in_groups(_in_threads(read, ids)):
        known = true != IGNORE_LABEL
        for i, some in enumerate((known, known & (labels != true))):
            total[i] += selection.count(labels[some], levels[some], C)
    return total


def error_rates(counts: np.ndarray, info: DataInfo) -> dict[str, Any]:
    """`selection.error_rates` of `judged` labels as JSON values: `shares`, and for each of them the
    rate over `all` classes together, and by class in `classes`; None where nothing is known.
    """
    known, wrong = counts
    together = selection.error_rates(known.sum(0, keepdims=True), wrong.sum(0, keepdims=True))
    rows = [[_finite(rate) for rate in row] for row in selection.error_rates(known, wrong)]
    return {
        "shares": list(selection.SHARES),
        "all": [_finite(rate) for rate in together[0]],
        "classes": dict(zip(info.classes, rows, strict=True)),
    }


def selected(
    store: Store,
    ids: Iterable[str],
    chosen: Selection,
    seed: int,
    truth: Source | None = None,
) -> np.ndarray:
    """Drops what is not kept from the labels of images.

    Args:
      store: holds them; labels are replaced.
      ids: of the images.
      chosen: what is kept.
      seed: of the draw.
      truth: a source with the ground truth of at least these images, if that is known.

    Returns:
      int64 `[C+1,C+1]`, as `watch.pseudo_label_counts`: rows truth (all unknown where there is
      none), columns kept labels, the last one for those dropped.
    """
    C, look = store.info.num_classes, _Truth(truth)

    def select(image_id: str) -> np.ndarray:
        labels, levels = store.read(image_id)
        kept = selection.select(labels, levels, chosen, image_rng(seed, image_id))
        if not np.array_equal(kept, labels):
            store.write_labels(image_id, kept)
        known = look(image_id, kept.shape)
        rows, columns = (np.where(x == IGNORE_LABEL, C, x).astype(np.int64) for x in (known, kept))
        pairs = np.bincount((rows * (C + 1) + columns).ravel(), minlength=(C + 1) ** 2)
        return pairs.reshape(C + 1, C + 1)

    pairs = sum(_in_threads(select, ids), np.zeros((C + 1, C + 1), np.int64))
    store.flush()
    return pairs


def summarize(
    counts: np.ndarray, chosen: Selection, predicted: np.ndarray, prior: np.ndarray, store: Store
) -> dict[str, Any]:
    """What came of a labeling, as JSON values; shares are in [0,1].

    Args:
      counts: of `selected`.
      chosen: what was kept.
      predicted: int64 `[C]`, positions by predicted class.
      prior: int64 `[C]`, positions by class in the labels of training.
      store: names the classes.
    """
    found = watch.PseudoLabels(counts)
    kept = counts[:, :-1].sum(0)
    # Of the last level confidence is 1, beyond it there is none.
    lowest = selection.confidence(np.minimum(chosen.lowest, selection.LEVELS - 1))
    classes = {
        name: {
            "lowest_confidence": float(lowest[i]) if kept[i] else None,
            "share_of_those": float(chosen.share[i]),
            "predicted": int(predicted[i]),
            "kept": int(kept[i]),
            "of_predicted": _ratio(kept[i], predicted[i]),
            "of_kept": _ratio(kept[i], kept.sum()),
            "of_labels": _ratio(prior[i], prior.sum()),
            "accuracy": _finite(found.precision[i]),
        }
        for i, name in enumerate(store.info.classes)
    }
    return {
        "kept": _ratio(kept.sum(), predicted.sum()),
        "kl": _finite(metrics.kl_divergence(prior, kept)),
        "accuracy": _finite(found.accuracy),
        "classes": classes,
    }


COLUMNS = ("class", "from confidence", "kept %", "of pseudo-labels %", "of labels %", "accuracy %")
"""Of `rows`."""


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A table of what came of a labeling, by class, under the names in `COLUMNS`."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    return [
        (
            name,
            "" if found["lowest_confidence"] is None else f"{found['lowest_confidence']:.5f}",
            *(percent(found[key]) for key in ("of_predicted", "of_kept", "of_labels", "accuracy")),
        )
        for name, found in summary["classes"].items()
    ]


def line(summary: Mapping[str, Any]) -> str:
    """The overall values of a labeling in words."""
    words = [f"{100 * (summary['kept'] or 0):.1f} % kept"]
    if summary["kl"] is not None:
        words.append(f"KL(labels || pseudo) {summary['kl']:.4f}")
    if summary["accuracy"] is not None:
        words.append(f"accuracy {100 * summary['accuracy']:.1f} %")
    return ", ".join(words)


def _stream_and_store(run: Run, index: int) -> tuple[Stream | None, Store]:
    phase = run.phases[index]
    return phase.pseudo_labeled, Store.of(run.workdir, phase.name, run.sources["labeled"].info)


def _label(run: Run, index: int, stream: Stream, store: Store) -> None:
    phase, source = run.phases[index], run.sources[stream.name]
    labeling, mine, truth = phase.labeling, sweep.share(source), run.sources.get("truth")
    assert labeling is not None
    _all_here(f"{phase.name}: labeling")
    found = store.read_selection()
    if found is None:
        _predict(run, index, stream, store, mine)
        counts = sweep.sum_over_processes(counted(store, _labeled(store, mine)))
        prior = watch.class_counts(run.sources["labeled"])
        found = labeling.rule(counts, prior), counts.sum(1), prior
        errors = None
        if truth is not None:
            known = sweep.sum_over_processes(judged(store, _labeled(store, mine), truth))
            errors = error_rates(known, store.info)
        _all_here(f"{phase.name}: counted")  # nobody drops a label before all have counted
        if jax.process_index() == 0:
            store.write_selection(*found, errors)
        _all_here(f"{phase.name}: selecting")
    chosen, predicted, prior = found
    pairs = selected(store, _labeled(store, mine), chosen, labeling.seed, truth)
    pairs = sweep.sum_over_processes(pairs)
    left_out = sweep.sum_over_processes(np.array(len(store.missing(mine.ids)), np.int64))
    _all_here(f"{phase.name}: selected")
    described = {
        "phase": phase.name,
        "labeler": labeling.network._asdict() | {"step": run.step_of(labeling.network)},
        "rule": str(labeling.rule),
        "shown": str(labeling.shown),
        "temperature": labeling.temperature,
        "seed": labeling.seed,
        "images": len(source),
        "left_out": int(left_out),
    }
    if jax.process_index() == 0:
        summary = summarize(pairs, chosen, predicted, prior, store)
        store.write_summary({**described, **summary, "errors": store.read_errors()})


def _report(run: Run, index: int, summary: Mapping[str, Any]) -> None:
    """Says and logs what came of a labeling."""
    phase, network = run.phases[index].name, summary["labeler"]["network"]
    title = f"{phase}: pseudo-labels of {network}, {line(summary)}"
    run.console.table(title, COLUMNS, rows(summary))
    values = {name: summary[name] for name in ("kept", "kl", "accuracy")}
    named = {f"pseudo_labels/{name}": x for name, x in values.items() if x is not None}
    # At the first update that learns from them: a run that goes on from before it says so again.
    run.logger.write(run.begin(index) + 1, phase, named)


def _predict(run: Run, index: int, stream: Stream, store: Store, mine: Source) -> None:
    """The first pass, over those images of this process that have no label yet."""
    labeling = run.phases[index].labeling
    assert labeling is not None
    evaluator, network = run.evaluator, labeling.network
    # Before it is known who has something to do: all processes take part in reading a checkpoint.
    variables = sweep.local(train.read_weights(run, network), evaluator.mesh)
    todo = store.missing(mine.ids)
    if not todo:
        return
    subset, damaged = loading.Subset(mine, todo), list[Damage]()
    read = _reader(labeling.temperature)
    noted = train.quarantine_for(run, index)

    def update(batch: Mapping[str, jax.Array]) -> Any:
        return read(evaluator.predict(network.network, labeling.shown, variables, batch))

    def note(position: int, message: str) -> None:
        damaged.append(Damage(stream.name, subset.ids[position], message))

    writing: list[Future[None]] = []
    name = f"{run.phases[index].name}: labeling"
    run.console.message(
        f"{name} {len(todo)} images with {network.network} of {network.phase} ({network.which}), "
        f"{labeling.shown}"
    )
    done = len(mine) - len(todo)
    run.console.phase(name, len(mine), done, unit="images")
    with ThreadPoolExecutor(_THREADS) as pool:

        def write(batch: Mapping[str, np.ndarray], found: tuple[np.ndarray, np.ndarray]) -> None:
            nonlocal done
            _finish(writing)  # at most one batch waits in memory
            for row, (position, valid) in enumerate(
                zip(batch["index"], batch["valid"], strict=True)
            ):
                if position >= 0:
                    inside = pipeline.filled(valid)
                    labels, levels = (x[row][inside] for x in found)
                    task = store.write, subset.ids[position], labels, levels
                    writing.append(pool.submit(*task))
            done += int((batch["index"] >= 0).sum())
            run.console.step(done)
            for one in damaged:
                noted.add(0, one)
            if run.stop.received is not None:
                _finish(writing)
                store.flush()
                raise Stopped(run.stop.received)

        batches = evaluator.batches(subset, threads=_THREADS, on_damage=note)
        with evaluator.telling_compilations("Labeling"):
            sweep.each(update, batches, evaluator.mesh, write)
        _finish(writing)
        store.flush()
    for one in damaged:
        noted.add(0, one)


def _finish(writing: list[Future[None]]) -> None:
    """Waits for files; raises what went wrong with one."""
    while writing:
        writing.pop().result()


@functools.cache
def _reader(temperature: float) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    return jax.jit(functools.partial(most_probable, temperature=temperature))


def _labeled(store: Store, source: Source) -> list[str]:
    """Images of a source that have a label: all but those that could not be read."""
    missing = set(store.missing(source.ids))
    return [image_id for image_id in source.ids if image_id not in missing]


def _in_threads(function: Callable[[str], T], ids: Iterable[str]) -> Iterable[T]:
    """The function's results, in order; few are in memory at a time."""
    ids = list(ids)
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(ids), 4 * _THREADS):
            yield from pool.map(function, ids[first : first + 4 * _THREADS])


def _in_groups(
    arrays: Iterable[tuple[np.ndarray, ...]], least: int = 2**18
) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays of some images, flat and joined, so many positions that counting them is not less work
    than the table is large that they are counted in.
    """

    def joined() -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate([*map(np.ravel, part)]) for part in zip(*some, strict=True))

    some, size = [], 0
    for of_image in arrays:
        some.append(of_image)
        size += of_image[0].size
        if size >= least:
            yield joined()
            some, size = [], 0
    if some:
        yield joined()


class _Truth:
    """Labels of a source by an image's id; 255 where they are not known."""

    def __init__(self, source: Source | None):
        self._source = source
        self._place = {image_id: i for i, image_id in enumerate(source.ids if source else ())}

    def __call__(self, image_id: str, shape: tuple[int, ...]) -> np.ndarray:
        """Of the image of that id, whose label has that shape."""
        unknown = np.full(shape, IGNORE_LABEL, np.uint8)
        if self._source is None:
            return unknown
        try:
            return np.asarray(self._source[self._place[image_id]].get("label", unknown))
        except UnreadableError:  # it only measures
            return unknown


def _all_here(name: str) -> None:
    multihost_utils.sync_global_devices(name)


def _ratio(part: np.integer, whole: np.integer) -> float | None:
    return float(part / whole) if whole else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
