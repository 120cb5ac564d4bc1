"""How fast images are read: from files, from a packed set, from a packed set of smaller images.

  python benchmarks/reading.py --out=benchmarks/results/reading_cpu.json

Makes a Cityscapes tree (PNG, 1024x2048) and a folder (JPEG, 1024x2048, PNG masks), packs both as
they are and with half the height and width, and reads all of them with their labels: one image
after the other, and as training does, in batches of crops of 512x1024 by four threads (half that
crop from the smaller images). Rounds take turns, so that ratios hold on a busy machine, and the
time that the CPU worked is given, too; figures are medians. Files are in the operating system's
cache: what a packed set saves on disks that are slow to open files is not in these figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from jaxssl.contracts import Source, Stream
from jaxssl.data import loading, packing
from jaxssl.data.pipeline import Feed, batches
from jaxssl.data.transforms import Augment

SIZE = (1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_sets(Path(folder), args.images)
        results = measure(data, args.rounds)
    report = {"machine": machine(), "images": args.images, "size": SIZE, "results": results}
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def make_sets(folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """Writes everything; returns name -> config of the data, and its size on disk in MB."""
    write_cityscapes(folder / "png", count)
    write_folder(folder / "jpeg", count)
    common = {"split": "all", "seed": 0, "classes": (), "ignore": (255,)}
    data = {
        "png files": {"name": "cityscapes", "root": str(folder / "png"), **common},
        "jpeg files": {"name": "folder", "root": str(folder / "jpeg"), **common},
    }
    for kind in ("png", "jpeg"):
        for title, size in (("packed", None), ("packed half", (SIZE[0] // 2, SIZE[1] // 2))):
            out = folder / f"{kind} {title}"
            source = loading.load(data[f"{kind} files"], "train", labels=True)
            packing.pack({"train": packing.Part(source, source)}, out, packing.Size(size))
            data[f"{kind} {title}"] = {"name": "tfds", "root": str(out), **common}
    return data


def measure(data: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    sources = {name: loading.load(config, "train", labels=True) for name, config in data.items()}
    ways: dict[str, Callable[[Source], int]] = {"read": read, "batches": read_batches}
    rates: dict[tuple[str, str], list[float]] = {}
    cpu: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, source in sources.items():
            for way, run in ways.items():
                start, used = time.perf_counter(), time.process_time()
                count = run(source)
                rates.setdefault((name, way), []).append(count / (time.perf_counter() - start))
                cpu.setdefault((name, way), []).append((time.process_time() - used) / count)
    results = {}
    for name, config in data.items():
        files = f"{name.split()[0]} files"
        results[name] = {"megabytes": round(megabytes(Path(config["root"])), 1)}
        for way in ways:
            ratios = [a / b for a, b in zip(rates[name, way], rates[files, way], strict=True)]
            results[name][f"{way}, images/s"] = round(statistics.median(rates[name, way]), 2)
            results[name][f"{way}, times files"] = round(statistics.median(ratios), 2)
            used = 1000 * statistics.median(cpu[name, way])
            results[name][f"{way}, ms of CPU an image"] = round(used, 1)
    return results


def read(source: Source) -> int:
    for i in range(len(source)):
        assert "label" in source[i]
    return len(source)


def read_batches(source: Source) -> int:
    height, width = (side // 2 for side in source[0]["image"].shape[:2])
    steps = len(source) // 4
    feed = Feed(Stream("labeled", 4), source, Augment((height, width), (0.5, 2.0)))
    with batches([feed], seed=0, phase_index=0, start=0, steps=steps, threads=4) as iterator:
        return sum(len(batch["labeled"]["image"]) for batch in iterator)


def picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image that compresses like a photograph, about 2.3 MB as PNG, and labels in patches."""
    rng = np.random.default_rng(seed)
    image = np.zeros((*SIZE, 3))
    for step, strength in ((256, 90), (64, 40), (16, 15), (4, 5)):
        coarse = rng.normal(0, 1, (SIZE[0] // step, SIZE[1] // step, 3)).astype(np.float32)
        image += strength * np.stack([_enlarged(coarse[..., c]) for c in range(3)], -1)
    noise = rng.normal(0, 0.8, SIZE)[..., None]
    label = _enlarged(rng.integers(0, 19, (16, 32)).astype(np.float32), Image.Resampling.NEAREST)
    return (110 + image + noise).clip(0, 255).astype(np.uint8), label.astype(np.uint8)


def _enlarged(array: np.ndarray, how: Any = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize(SIZE[::-1], how))


def write_cityscapes(root: Path, count: int) -> None:
    for i in range(count):
        image, label = picture(i)
        name = f"bench_{i:06d}_000019"
        for kind, end, array in (
            ("leftImg8bit", "leftImg8bit", image),
            ("gtFine", "gtFine_labelTrainIds", label),
        ):
            path = root / kind / "train" / "bench" / f"{name}_{end}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def write_folder(root: Path, count: int) -> None:
    for part in ("images", "labels", "val/images", "val/labels"):
        (root / part).mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"class {chr(97 + i)}\n" for i in range(19)))
    for i in range(count):
        image, label = picture(i)
        for part in ("", "val/") if i == 0 else ("",):
            Image.fromarray(image).save(root / part / "images" / f"{i}.jpg", quality=92)
            Image.fromarray(label).save(root / part / "labels" / f"{i}.png")


def megabytes(root: Path) -> float:
    files = (p for p in root.rglob("*") if p.is_file() and "val" not in p.parts)
    return sum(path.stat().st_size for path in files) / 1e6


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(": ")[2] if lines else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "load average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
    }


if __name__ == "__main__":
    main()
