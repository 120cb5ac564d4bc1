"""Cityscapes: 19 evaluated classes, and the tree they are stored in."""

from __future__ import annotations

import numpy as np

from jaxssl.contracts import IGNORE_LABEL, DataInfo

# label id in the files, name, color; the position in this table is the train id.
_EVALUATED = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)

INFO = DataInfo(
    classes=tuple(name for _, name, _ in _EVALUATED),
    palette=tuple(color for _, _, color in _EVALUATED),
)

LABEL_IDS = np.array([label_id for label_id, _, _ in _EVALUATED], np.uint8)
"""Train id -> label id."""

TRAIN_IDS = np.full(256, IGNORE_LABEL, np.uint8)
"""Label id -> train id; 255 for everything that is not evaluated."""
TRAIN_IDS[LABEL_IDS] = np.arange(len(LABEL_IDS), dtype=np.uint8)
