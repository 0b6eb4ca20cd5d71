"""The released model's forward pass, written from its description and not through our modules."""

import torch
from torch.nn import functional


class Recomputed:
    """Parts of a model, computed step by step from its raw official tensors."""

    def __init__(self, tensors, config=None):
        self.tensors, self.vision = tensors, config and config["vision_config"]

    def linear(self, name, x):
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name, x, eps=1e-5):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if bias is None:  # RMS norm
            return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.vision["layer_norm_eps"])
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def patch_features(self, tiles):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (tiles / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        prefix = "vision_model.embeddings"
        weight = self.tensors[f"{prefix}.patch_embedding.weight"]
        patches = functional.conv2d(
            pixels, weight, self.tensors[f"{prefix}.patch_embedding.bias"], stride=weight.shape[-1]
        )
        x = patches.flatten(2).transpose(1, 2)
        first = self.tensors[f"{prefix}.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.tensors[f"{prefix}.position_embedding"]
        for layer in range(self.vision["num_hidden_layers"]):
            x = self.vision_layer(f"vision_model.encoder.layers.{layer}", x)
        return x[:, 1:]

    def vision_layer(self, prefix, x):
        eps = self.vision["layer_norm_eps"]
        q, k, v = self.linear(f"{prefix}.attn.qkv", self.norm(f"{prefix}.norm1", x, eps)).chunk(3, -1)
        if self.vision["qk_normalization"]:
            q, k = self.norm(f"{prefix}.attn.q_norm", q), self.norm(f"{prefix}.attn.k_norm", k)
        q, k, v = (
            t.unflatten(-1, (self.vision["num_attention_heads"], -1)).transpose(1, 2) for t in (q, k, v)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        attended = self.linear(f"{prefix}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + self.tensors[f"{prefix}.ls1"] * attended
        hidden = functional.gelu(self.linear(f"{prefix}.mlp.fc1", self.norm(f"{prefix}.norm2", x, eps)))
        return x + self.tensors[f"{prefix}.ls2"] * self.linear(f"{prefix}.mlp.fc2", hidden)

    @staticmethod
    def shuffle(features, scale):
        """Upstream's pixel_shuffle, by its definition in index arithmetic."""
        factor = round(1 / scale)
        side = round(features.shape[1] ** 0.5)
        rows = [
            torch.cat(
                [
                    features[:, (row * factor + i) * side + column * factor + j]
                    for i in range(factor)
                    for j in range(factor)
                ],
                -1,
            )
            for row in range(side // factor)
            for column in range(side // factor)
        ]
        return torch.stack(rows, 1)

    def mlp1(self, features):
        x = self.norm("mlp1.0", self.shuffle(features, 0.5))
        return self.linear("mlp1.3", functional.gelu(self.linear("mlp1.1", x)))

    def mlp2(self, features):
        x = functional.gelu(self.linear("mlp2.1", self.norm("mlp2.0", self.shuffle(features, 0.25))))
        return self.linear("mlp2.7", functional.gelu(self.linear("mlp2.4", x)))

    def gates(self, features, layers=(1, 2, 2, 2), heads=16):
        """Logits of compress and keep, with the attention layers that really run."""
        query = self.tensors["pooling_before_gating.query_token"].expand(len(features), 1, -1)
        for i in layers:
            name = f"pooling_before_gating.attn{i}"
            weights = self.tensors[f"{name}.in_proj_weight"].chunk(3)
            biases = self.tensors[f"{name}.in_proj_bias"].chunk(3)
            q, k, v = (
                functional.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
                for x, w, b in zip((query, features, features), weights, biases, strict=True)
            )
            mixed = (
                ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            )
            query = self.norm(f"pooling_before_gating.norm{i}", self.linear(f"{name}.out_proj", mixed))
        x = query.squeeze(1)
        for i in range(1, 5):
            inner = functional.gelu(self.linear(f"gating.block{i}.0", x))
            x = x + self.norm(f"gating.block{i}.5", self.linear(f"gating.block{i}.3", inner))
        return self.linear("gating.gate.1", self.norm("gating.gate.0", x))
