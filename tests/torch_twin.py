"""Networks in PyTorch, laid out as in torchvision, mmseg and semseg, for `jaxssl.models` to equal.

Run as a program, it writes `golden/models.npz`.
"""

import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LAYERS = {
    "resnet10": [1, 1, 1, 1],
    "resnet18": [2, 2, 2, 2],
    "resnet34": [3, 4, 6, 3],
    "resnet50": [3, 4, 6, 3],
    "resnet101": [3, 4, 23, 3],
}
NAMES = {
    r"^backbone\.stem(\d)\.conv": lambda m: f"backbone.stem.{3 * int(m[1]) - 3}",
    r"^backbone\.stem(\d)\.bn": lambda m: f"backbone.stem.{3 * int(m[1]) - 2}",
    r"layer(\d)_(\d+)": r"layer\1.\2",
    r"downsample_conv": "downsample.0",
    r"downsample_bn": "downsample.1",
    r"\.(kernel|scale)$": ".weight",
    r"\.mean$": ".running_mean",
    r"\.var$": ".running_var",
}
"""From the paths of our trees to the names of the twin's state."""


def name_and_tensor(path, array):
    """A leaf of our trees as an entry of the twin's `state_dict`."""
    name = ".".join(path)
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    array = np.asarray(array)
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    return name, torch.from_numpy(array.copy())


def load(twin, leaves):
    """Copies `{path: array}` into the twin; every entry must be used and found."""
    state = dict(name_and_tensor(path, array) for path, array in leaves.items())
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride, dilation, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride, dilation, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, name, width, stem, stem_width, output_stride, multi_grid):
        super().__init__()
        half = stem_width or width // 2
        if stem == "conv7":
            convs = [nn.Conv2d(3, 2 * half, 7, 2, 3, bias=False)]
        else:
            convs = [
                nn.Conv2d(3, half, 3, 2, 1, bias=False),
                nn.Conv2d(half, half, 3, 1, 1, bias=False),
                nn.Conv2d(half, 2 * half, 3, 1, 1, bias=False),
            ]
        steps = ((conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()) for conv in convs)
        self.stem = nn.Sequential(*(layer for step in steps for layer in step))
        self.block = BasicBlock if name in ("resnet10", "resnet18", "resnet34") else Bottleneck
        self.inplanes, self.dilation = 2 * half, 1
        depths = LAYERS[name]
        dilate = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}
        self.layer1 = self._make_layer(width, depths[0], 1, False)
        self.layer2 = self._make_layer(2 * width, depths[1], 2, dilate[output_stride][0])
        self.layer3 = self._make_layer(4 * width, depths[2], 2, dilate[output_stride][1])
        self.layer4 = self._make_layer(
            8 * width, depths[3], 2, dilate[output_stride][2], multi_grid
        )

    def _make_layer(self, planes, blocks, stride, dilate, grids=None):
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        grids = grids or [1] * blocks
        layers = []
        for i in range(blocks):
            dilation = (previous_dilation if i == 0 else self.dilation) * grids[i]
            out, step = planes * self.block.expansion, stride if i == 0 else 1
            downsample = nn.Identity()
            if step != 1 or self.inplanes != out:
                conv = nn.Conv2d(self.inplanes, out, 1, step, bias=False)
                downsample = nn.Sequential(conv, nn.BatchNorm2d(out))
            layers.append(self.block(self.inplanes, planes, step, dilation, downsample))
            self.inplanes = out
        return nn.Sequential(*layers)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        x1 = self.layer1(x)
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        return x1, x2, x3, self.layer4(x3)


class ConvModule(nn.Module):
    def __init__(self, inputs, outputs, size, dilation=1, groups=1):
        super().__init__()
        padding = dilation * (size // 2)
        self.conv = nn.Conv2d(inputs, outputs, size, 1, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class DepthwiseSeparableConvModule(nn.Module):
    def __init__(self, inputs, outputs, size, dilation=1):
        super().__init__()
        self.depthwise = ConvModule(inputs, inputs, size, dilation, groups=inputs)
        self.pointwise = ConvModule(inputs, outputs, 1)

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


class Head(nn.Module):
    def __init__(self, classes, inputs, low, separable, rates, channels, low_channels, align):
        super().__init__()
        conv3x3 = DepthwiseSeparableConvModule if separable else ConvModule
        self.align_corners = align
        self.pool = ConvModule(inputs, channels, 1)
        self.aspp0 = ConvModule(inputs, channels, 1)
        self.aspp1, self.aspp2, self.aspp3 = (conv3x3(inputs, channels, 3, r) for r in rates)
        self.bottleneck = ConvModule(5 * channels, channels, 3)
        self.low_level = ConvModule(low, low_channels, 1)
        self.decoder1 = conv3x3(channels + low_channels, channels, 3)
        self.decoder2 = conv3x3(channels, channels, 3)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def resize(self, x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def fused(self, stages):
        low, x = stages[0], stages[-1]
        pooled = self.resize(self.pool(F.adaptive_avg_pool2d(x, 1)), x.shape[2:])
        parts = [pooled, self.aspp0(x), self.aspp1(x), self.aspp2(x), self.aspp3(x)]
        x = self.resize(self.bottleneck(torch.cat(parts, 1)), low.shape[2:])
        return torch.cat([x, self.low_level(low)], 1)

    def forward(self, stages):
        return self.classifier(self.decoder2(self.decoder1(self.fused(stages))))


class Auxiliary(nn.Module):
    def __init__(self, classes, inputs, channels):
        super().__init__()
        self.conv = ConvModule(inputs, channels, 3)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, x):
        return self.classifier(self.conv(x))


class Network(nn.Module):
    """Runs the `backbone`, `head` and `auxiliary` of its subclasses."""

    def stages(self, image):
        mean = torch.tensor((123.675, 116.28, 103.53), dtype=image.dtype)
        std = torch.tensor((58.395, 57.12, 57.375), dtype=image.dtype)
        return self.backbone(((image - mean) / std).permute(0, 3, 1, 2))

    def forward(self, image):
        """float `[B,H,W,3]` in [0,255] -> logits and auxiliary logits, both channels last."""
        stages = self.stages(image)
        logits = self.head(stages).permute(0, 2, 3, 1)
        if self.auxiliary is None or not self.training:
            return logits, None
        return logits, self.auxiliary(stages[2]).permute(0, 2, 3, 1)


class DeepLabV3Plus(Network):
    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        width=64,
        stem="deep",
        stem_width=None,
        output_stride=16,
        multi_grid=None,
        separable=True,
        aspp_rates=(6, 12, 18),
        channels=256,
        low_level_channels=48,
        align_corners=False,
        auxiliary=False,
    ):
        super().__init__()
        self.backbone = ResNet(backbone, width, stem, stem_width, output_stride, multi_grid)
        low = width * self.backbone.block.expansion
        self.head = Head(
            num_classes,
            8 * low,
            low,
            separable,
            aspp_rates,
            channels,
            low_level_channels,
            align_corners,
        )
        self.auxiliary = Auxiliary(num_classes, 4 * low, channels) if auxiliary else None


class Representation(nn.Module):
    def __init__(self, inputs, channels):
        super().__init__()
        self.conv1 = ConvModule(inputs, channels, 3)
        self.conv2 = ConvModule(channels, channels, 3)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.projection(self.conv2(self.conv1(x)))


class U2PL(DeepLabV3Plus):
    """With a representation head beside the classifier's branch."""

    def __init__(self, num_classes, embedding, **fields):
        super().__init__(num_classes, separable=False, align_corners=True, **fields)
        inputs = self.head.decoder1.conv.in_channels
        self.head.representation = Representation(inputs, embedding)

    def forward(self, image):
        """float `[B,H,W,3]` in [0,255] -> logits and embedding, both channels last."""
        stages = self.stages(image)
        embedding = self.head.representation(self.head.fused(stages))
        return self.head(stages).permute(0, 2, 3, 1), embedding.permute(0, 2, 3, 1)


class AtrousSum(nn.Module):
    def __init__(self, classes, inputs, rates):
        super().__init__()
        for i, rate in enumerate(rates, 1):
            conv = nn.Conv2d(inputs, classes, 3, padding=rate, dilation=rate)
            self.add_module(f"aspp{i}", conv)

    def forward(self, stages):
        return torch.stack([conv(stages[-1]) for conv in self.children()]).sum(0)


class DeepLabV2(Network):
    def __init__(
        self,
        num_classes,
        backbone="resnet101",
        width=64,
        stem="conv7",
        output_stride=8,
        aspp_rates=(6, 12, 18, 24),
        aspp_branches=4,
        auxiliary=False,
        auxiliary_channels=256,
    ):
        super().__init__()
        self.backbone = ResNet(backbone, width, stem, None, output_stride, None)
        inputs = 8 * width * self.backbone.block.expansion
        self.head = AtrousSum(num_classes, inputs, aspp_rates[:aspp_branches])
        self.auxiliary = (
            Auxiliary(num_classes, inputs // 2, auxiliary_channels) if auxiliary else None
        )


class PyramidHead(nn.Module):
    def __init__(self, classes, inputs, bins, channels, align):
        super().__init__()
        self.align_corners, self.bins = align, bins
        for i in range(len(bins)):
            self.add_module(f"pool{i + 1}", ConvModule(inputs, inputs // len(bins), 1))
        self.bottleneck = ConvModule(inputs + inputs // len(bins) * len(bins), channels, 3)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, stages):
        x = stages[-1]
        parts = [x]
        for i, size in enumerate(self.bins, 1):
            y = getattr(self, f"pool{i}")(nn.AdaptiveAvgPool2d(size)(x))
            parts.append(
                F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=self.align_corners)
            )
        return self.classifier(self.bottleneck(torch.cat(parts, 1)))


class PSPNet(Network):
    """With a ResNet whose strides semseg exchanges for dilations after it is made."""

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        width=64,
        stem_width=64,
        pool_bins=(1, 2, 3, 6),
        channels=512,
        auxiliary_channels=256,
        align_corners=False,
    ):
        super().__init__()
        self.backbone = ResNet(backbone, width, "deep", stem_width, 32, None)
        for layer, dilation in ((self.backbone.layer3, 2), (self.backbone.layer4, 4)):
            for block in layer:
                conv = block.conv2 if isinstance(block, Bottleneck) else block.conv1
                conv.stride = (1, 1)
                conv.dilation = conv.padding = (dilation, dilation)
            layer[0].downsample[0].stride = (1, 1)
        inputs = 8 * width * self.backbone.block.expansion
        self.head = PyramidHead(num_classes, inputs, pool_bins, channels, align_corners)
        self.auxiliary = Auxiliary(num_classes, inputs // 2, auxiliary_channels)


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        kept = self.shortcut(y) if hasattr(self, "shortcut") else x
        return kept + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """With the shortcuts of Zagoruyko and Komodakis; for images of CIFAR-10."""

    def __init__(self, num_classes, depth=28, widen=2):
        super().__init__()
        widths, blocks = [16, 16 * widen, 32 * widen, 64 * widen], (depth - 4) // 6
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(3, 16, 3, 1, 1, bias=False)})
        for i in (1, 2, 3):
            inputs = [widths[i - 1], *[widths[i]] * (blocks - 1)]
            strides = [1 if i == 1 else 2, *[1] * (blocks - 1)]
            made = [WideBlock(x, widths[i], s) for x, s in zip(inputs, strides, strict=True)]
            self.backbone[f"layer{i}"] = nn.Sequential(*made)
        self.backbone["bn"] = nn.BatchNorm2d(widths[-1])
        self.head = nn.ModuleDict({"classifier": nn.Conv2d(widths[-1], num_classes, 1)})

    def forward(self, image):
        """float `[B,H,W,3]` in [0,255] -> logits `[B,C]`."""
        mean, std = image.new_tensor([[125.3, 123.0, 113.9], [63.0, 62.1, 66.7]])
        x = ((image - mean) / std).permute(0, 3, 1, 2)
        for name in ("stem", "layer1", "layer2", "layer3"):
            x = self.backbone[name](x)
        x = F.avg_pool2d(F.relu(self.backbone["bn"](x)), 8)
        return self.head["classifier"](x).flatten(1)


def run(twin, leaves, image, *, training=False):
    """Logits and auxiliary logits of a twin with these parameters, in the image's dtype."""
    load(twin, leaves)
    image = torch.from_numpy(image)
    with torch.no_grad():
        return twin.to(image.dtype).train(training)(image)


def count_normalized(twin):
    """Fills the dictionary that it returns, as the twin runs: values per channel, by BatchNorm."""
    counts = {}
    for name, module in twin.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: counts.update(
                    {name: inputs[0].numel() / inputs[0].shape[1]}
                )
            )
    return counts


def write_golden():
    """Stores what the twin computes in float64; `test_models` makes the same inputs."""
    import test_models as tests

    _, _, leaves = tests.random_network(tests.TINY)
    twin = DeepLabV3Plus(**tests.TINY).double()
    load(twin, leaves)
    image = torch.from_numpy(tests.random_image((2, 49, 81))).double()
    with torch.no_grad():
        evaluated, _ = twin.eval()(image)
        logits, auxiliary = twin.train()(image)
    np.savez_compressed(tests.GOLDEN, evaluated=evaluated, logits=logits, auxiliary=auxiliary)


if __name__ == "__main__":
    write_golden()
