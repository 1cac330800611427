"""Small vision transformers laid out as torchvision's, timm's and Hugging Face's, for tests of the tokens' room."""

import torch
from torch import nn
from torchvision.models import VisionTransformer

SHAPE = (3, 16, 16)


class Block(nn.Module):
    """A pre-norm block with its attention written out, as in timm."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))


class Small(nn.Module):
    """A transformer whose embedding, positions and pooling are chosen by name.

    Args:
        layout: "timm" (class token joined before the positions are added), "registers" (class and register tokens
            joined after), "mean" (linear embedding of patches cut out by hand, mean pooled), "lookup" (positions from
            an `nn.Embedding`), "map" (positions added to the map of features), "overlap" (patches that overlap),
            "affine" (the input normalised first), "sincos" (a buffer), "frozen", or "none" (no positions).
    """

    def __init__(self, layout="timm", width=48, depth=2, patch=4, classes=5, bias=True):
        super().__init__()
        self.layout, side = layout, 16 // patch
        kernel, padding = (patch + 2, 1) if layout == "overlap" else (patch, 0)
        self.patch_embed = nn.Conv2d(3, width, kernel, patch, padding, bias=bias)
        if layout == "mean":
            self.patch_embed, self.patch = nn.Linear(3 * patch * patch, width, bias=bias), patch
        if layout == "affine":
            self.register_buffer("mean", torch.tensor([0.48, 0.46, 0.41])[:, None, None])
            self.register_buffer("std", torch.tensor([0.23, 0.22, 0.21])[:, None, None])
        count = side * side
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, 2, width) * 0.02)
        rows = count + (layout not in ("registers", "mean", "map"))
        position = torch.randn(1, rows, width) * 0.02
        if layout == "map":
            position = position.transpose(1, 2).reshape(1, width, side, side)
        if layout == "sincos":
            self.register_buffer("pos_embed", position)
        elif layout == "lookup":
            self.pos_embed = nn.Embedding(rows, width)
            self.register_buffer("position_ids", torch.arange(rows).flip(0)[None])
        elif layout != "none":
            self.pos_embed = nn.Parameter(position, requires_grad=layout != "frozen")
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def embed(self, x):
        if self.layout == "affine":
            x = (x - self.mean) / self.std
        if self.layout == "mean":
            B, C, H, W = x.shape
            p = self.patch
            x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)
            return self.patch_embed(x) + self.pos_embed
        x = self.patch_embed(x)
        if self.layout == "map":
            x = x + self.pos_embed
        x = x.flatten(2).transpose(1, 2)
        if self.layout == "registers":
            x = x + self.pos_embed
            return torch.cat([self.cls_token, self.register_tokens, x], 1)
        if self.layout == "map":
            return x
        x = torch.cat([self.cls_token, x], 1)
        if self.layout == "lookup":
            return x + self.pos_embed(self.position_ids)
        return x if self.layout == "none" else x + self.pos_embed

    def forward(self, x):
        x = self.norm(self.blocks(self.embed(x)))
        return self.head(x.mean(1) if self.layout in ("mean", "map") else x[:, 0])


class HuggingFace(nn.Module):
    """Nested as `ViTForImageClassification`: embeddings, separate query, key and value, a classifier."""

    class Patches(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.projection = nn.Conv2d(3, width, 4, 4)

        def forward(self, pixel_values):
            return self.projection(pixel_values).flatten(2).transpose(1, 2)

    class Embeddings(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.cls_token = nn.Parameter(torch.randn(1, 1, width))
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.patch_embeddings = HuggingFace.Patches(width)
            self.position_embeddings = nn.Parameter(torch.randn(1, 17, width))
            self.dropout = nn.Dropout(0.0)

        def forward(self, pixel_values):
            x = self.patch_embeddings(pixel_values)
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.position_embeddings
            return self.dropout(x)

    class Attention(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def __init__(self, width=48, depth=2, classes=5):
        super().__init__()
        self.embeddings = HuggingFace.Embeddings(width)
        self.layernorms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * depth)])
        self.attentions = nn.ModuleList([HuggingFace.Attention(width) for _ in range(depth)])
        self.outputs = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)]
        )
        self.layernorm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, pixel_values):
        x = self.embeddings(pixel_values)
        for i, (attention, output) in enumerate(zip(self.attentions, self.outputs, strict=True)):
            x = x + attention(self.layernorms[2 * i](x))
            x = x + output(self.layernorms[2 * i + 1](x))
        return self.classifier(self.layernorm(x)[:, 0])


def small(layout="timm", seed=0, **options):
    """A `Small` transformer in eval mode, weights from the seed."""
    torch.manual_seed(seed)
    return (HuggingFace(**options) if layout == "huggingface" else Small(layout, **options)).eval()


def torchvision_vit(width=48, seed=0, classes=5, size=16, depth=2, patch=4):
    """torchvision's, small, with a head that is not zero."""
    torch.manual_seed(seed)
    model = VisionTransformer(size, patch, depth, 2, width, 2 * width, num_classes=classes)
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval()
