"""ImageReward's network in PyTorch, from its definition: timm's image tower, BERT with cross-attention, head."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

MEAN, STD = 0.16717362830052426, 1.0333394966054072


def attend(q, k, v, heads, mask=None):
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask).transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, -1), self.heads))


class VisionBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Vision(nn.Module):
    def __init__(self, size, patch, width, layers, heads, hidden):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(VisionBlock(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))


class BertAttention(nn.Module):
    def __init__(self, width, seen, heads):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {n: nn.Linear(width if n == "query" else seen, width) for n in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, seen, mask=None):
        y = attend(self.self["query"](x), self.self["key"](seen), self.self["value"](seen), self.heads, mask)
        return self.output["LayerNorm"](self.output["dense"](y) + x)


class BertLayer(nn.Module):
    def __init__(self, width, seen, heads, hidden):
        super().__init__()
        self.attention, self.crossattention = BertAttention(width, width, heads), BertAttention(width, seen, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, mask, image):
        x = self.crossattention(self.attention(x, x, mask), image)
        y = self.output["dense"](nn.functional.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](y + x)


class Bert(nn.Module):
    def __init__(self, vocabulary, positions, width, layers, heads, hidden, seen):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(positions)[None])
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(BertLayer(width, seen, heads, hidden) for _ in range(layers))}
        )

    def forward(self, ids, mask, image):
        e = self.embeddings
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"](torch.arange(ids.shape[1])))
        bias = (1.0 - mask[:, None, None].to(x.dtype)) * -10000.0
        for layer in self.encoder["layer"]:
            x = layer(x, bias, image)
        return x


class Blip(nn.Module):
    def __init__(self, visual, text, width, seen):
        super().__init__()
        self.visual_encoder, self.text_encoder = visual, text
        self.vision_proj, self.text_proj = nn.Linear(seen, 5), nn.Linear(width, 5)  # in the file, not in the score


class Head(nn.Module):
    def __init__(self, width, widths=(12, 8, 6, 4, 1)):
        super().__init__()
        layers = []
        for i, out in enumerate(widths):
            layers += [nn.Linear(width, out)] + [nn.Dropout(0.2)] * (i < 3)
            width = out
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class ImageReward(nn.Module):
    def __init__(self, size=32, patch=16, vision=(64, 2, 1, 96), text=(128, 2, 2, 80), vocabulary=60, positions=40):
        super().__init__()
        seen, vision_layers, vision_heads, vision_hidden = vision
        width, layers, heads, hidden = text
        visual = Vision(size, patch, seen, vision_layers, vision_heads, vision_hidden)
        bert = Bert(vocabulary, positions, width, layers, heads, hidden, seen)
        self.blip, self.mlp = Blip(visual, bert, width, seen), Head(width)

    def forward(self, pixels, ids, mask):
        state = self.blip.text_encoder(ids, mask, self.blip.visual_encoder(pixels))[:, 0]
        return (self.mlp(state)[:, 0] - MEAN) / STD
