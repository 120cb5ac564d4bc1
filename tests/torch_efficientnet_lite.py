"""EfficientNet-Lite0 in PyTorch, with the names of the published weights.

Run as a program, it writes `golden/efficientnet_lite.npz`.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jaxssl.models import efficientnet_lite

# Kernel size, expansion and channels of the 16 blocks.
BLOCKS = [(3, 1, 16)]
BLOCKS += 2 * [(3, 6, 24)] + 2 * [(5, 6, 40)] + 3 * [(3, 6, 80)]
BLOCKS += 3 * [(5, 6, 112)] + 4 * [(5, 6, 192)] + [(3, 6, 320)]
STRIDES = {
    32: {1: 2, 3: 2, 5: 2, 11: 2},
    16: {1: 2, 3: 2, 5: 2},
    8: {1: 2, 3: 2},
}
DILATIONS = {
    32: 16 * [1],
    16: 12 * [1] + 4 * [2],
    8: 6 * [1] + 6 * [2] + 4 * [4],
}
"""By output stride: strides other than 1, and the dilation of each block."""


def load(twin, leaves):
    """Copies `{path: array}` into the twin; every entry must be used and found."""
    state = {}
    for path, array in leaves.items():
        tensor = torch.from_numpy(np.asarray(array))
        if tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)
        name = efficientnet_lite.torch_name(path)
        state[name] = tensor[:, :, 0, 0] if name == "_fc.weight" else tensor
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


class Conv2dSame(nn.Conv2d):
    """Zeros so that the output has ceil(input / stride) pixels, the odd one behind."""

    def forward(self, x):
        padding = []
        for size, kernel, stride, dilation in zip(
            x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            covered = (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1
            total = max(covered - size, 0)
            padding = [total // 2, total - total // 2, *padding]
        return super().forward(F.pad(x, padding))


def conv(inputs, outputs, size=1, stride=1, dilation=1, groups=1):
    return Conv2dSame(inputs, outputs, size, stride, 0, dilation, groups, bias=False)


def norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    def __init__(self, inputs, outputs, size, expansion, stride, dilation):
        super().__init__()
        wide = expansion * inputs
        if expansion > 1:
            self._expand_conv, self._bn0 = conv(inputs, wide), norm(wide)
        self._depthwise_conv = conv(wide, wide, size, stride, dilation, wide)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = conv(wide, outputs), norm(outputs)

    def forward(self, x):
        y = x
        if hasattr(self, "_expand_conv"):
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    def __init__(self, num_classes=1000, output_stride=32):
        super().__init__()
        self._conv_stem, self._bn0 = conv(3, 32, 3, 2), norm(32)
        self._blocks = nn.ModuleList()
        inputs = 32
        for i, (size, expansion, outputs) in enumerate(BLOCKS):
            # A block whose stride gave way sees what it saw before.
            moved = i in STRIDES[32] and i not in STRIDES[output_stride]
            dilation = DILATIONS[output_stride][i - 1 if moved else i]
            stride = STRIDES[output_stride].get(i, 1)
            self._blocks.append(Block(inputs, outputs, size, expansion, stride, dilation))
            inputs = outputs
        self._conv_head, self._bn1 = conv(320, 1280), norm(1280)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, image):
        """float `[B,H,W,3]` in [0,255] -> logits, and outputs of the stages with channels last."""
        x = ((image - 127) / 128).permute(0, 3, 1, 2)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        stages = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in (2, 4, 10, 15):
                stages.append(x.permute(0, 2, 3, 1))
        x = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return self._fc(x), stages


def write_golden():
    """Stores what the twin computes in float64; the test makes the same inputs."""
    import test_efficientnet_lite as tests

    _, _, leaves = tests.random_network(output_stride=16)
    twin = EfficientNetLite0(tests.CLASSES, 16)
    load(twin, leaves)
    image = torch.from_numpy(tests.random_image())
    with torch.no_grad():
        logits, stages = twin.double().eval()(image.double())
    last = stages[-1][..., :: tests.KEPT]
    np.savez_compressed(tests.GOLDEN, logits=logits, low=stages[0], last=last)


if __name__ == "__main__":
    write_golden()
