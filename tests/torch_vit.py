"""A vision transformer and SETR of PyTorch's own layers, for `jaxssl.models.setr` to equal."""

import torch
from torch import nn
from torch.nn import functional as F


class VisionTransformer(nn.Module):
    """Trained on square images of `grid` patches a side."""

    def __init__(self, width, depth, heads, patch, grid, tokens=1):
        super().__init__()
        self.grid, self.count = grid, tokens
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.tokens = nn.Parameter(torch.randn(1, tokens, width))
        self.positions = nn.Parameter(torch.randn(1, tokens + grid**2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        """Normalized `[B,3,H,W]` -> `[B,D,h,w]`."""
        side = self.patch.stride[0]
        height, width = (-(-length // side) * side for length in x.shape[2:])
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        x = self.patch(x)
        own, positions = self.positions[:, : self.count], self.positions[:, self.count :]
        positions = positions.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, x.shape[2:], mode="bilinear", align_corners=False)
        grid, x = x.shape[2:], (x + positions).flatten(2).transpose(1, 2)
        x = torch.cat([(self.tokens + own).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, self.count :]).transpose(1, 2).unflatten(2, grid)


class SETR(nn.Module):
    """With the naive decoder; logits of the patches, channels last."""

    def __init__(self, backbone, channels, num_classes):
        super().__init__()
        self.backbone = backbone
        self.conv = nn.Conv2d(backbone.norm.normalized_shape[0], channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, image, mean=127.5, std=127.5):
        """Float `[B,H,W,3]` in [0,255]."""
        x = self.backbone(((image - mean) / std).permute(0, 3, 1, 2))
        return self.classifier(F.relu(self.bn(self.conv(x)))).permute(0, 2, 3, 1)


def randomized(module, seed=0):
    """Random parameters and statistics that keep activations near 1."""
    torch.manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.ndim == 3:
            tensor.normal_(0, 0.5)
        elif tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
        elif tensor.dtype.is_floating_point:
            tensor.uniform_(0.5, 1.5) if "weight" in name or "var" in name else tensor.normal_()
    return module.eval()


def timm_names(state):
    """The state of a `VisionTransformer` as timm names it, in NumPy."""
    names = {
        "patch.": "patch_embed.proj.",
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj": "attn.proj",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "positions": "pos_embed",
    }
    state = renamed(state, names)
    tokens = state.pop("tokens")
    for i, name in enumerate(("cls_token", "dist_token")[: tokens.shape[1]]):
        state[name] = tokens[:, i : i + 1]
    return state


def mmseg_names(state):
    """The state of a `SETR` as mmseg names it, in NumPy."""
    names = {
        "backbone.norm.": "decode_head.norm.",
        "backbone.patch.": "backbone.patch_embed.projection.",
        "backbone.blocks.": "backbone.layers.",
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        "self_attn.": "attn.attn.",
        "linear1": "ffn.layers.0.0",
        "linear2": "ffn.layers.1",
        "positions": "pos_embed",
        "tokens": "cls_token",
    }
    heads = {name: state[name] for name in state if not name.startswith("backbone.")}
    state = {name: state[name] for name in state.keys() - heads.keys()}
    ends = {"classifier.": "decode_head.conv_seg.", "conv.": "decode_head.up_convs.0.0.conv."}
    return renamed(state, names) | renamed(heads, ends | {"bn.": "decode_head.up_convs.0.0.bn."})


def renamed(state, names):
    changed = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "num_batches" not in name:
            changed[name] = tensor.numpy().copy()
    return changed
