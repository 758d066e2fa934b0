"""Inception's features against PyTorch, on random weights in the published layout; and its two resizes."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.inception import SIDE, Inception, load_inception, to_input


class Net:
    """FID's Inception written from its description, on a state dict that it fills with random weights as it goes."""

    def __init__(self):
        self.weights, self.generator = {}, torch.Generator().manual_seed(0)

    def conv(self, name, x, features, size=1, stride=1, padding=0):
        kh, kw = (size, size) if isinstance(size, int) else size
        if f"{name}.conv.weight" not in self.weights:
            self._make(name, (features, x.shape[1], kh, kw))
        x = F.conv2d(x, self.weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var, weight, bias = (
            self.weights[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, weight, bias, eps=0.001))

    def _make(self, name, shape):
        def noise(*s):
            return torch.randn(*s, generator=self.generator)

        self.weights[f"{name}.conv.weight"] = noise(*shape) * (2 / np.prod(shape[1:])) ** 0.5
        self.weights[f"{name}.bn.running_mean"] = 0.1 * noise(shape[0])
        self.weights[f"{name}.bn.running_var"] = 1 + 0.2 * noise(shape[0]).abs()
        self.weights[f"{name}.bn.weight"] = 1 + 0.1 * noise(shape[0])
        self.weights[f"{name}.bn.bias"] = 0.1 * noise(shape[0])

    def mean_pool(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def __call__(self, x):
        c = self.conv
        x = c("Conv2d_1a_3x3", x, 32, 3, 2)
        x = c("Conv2d_2b_3x3", c("Conv2d_2a_3x3", x, 32, 3), 64, 3, 1, 1)
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(c("Conv2d_4a_3x3", c("Conv2d_3b_1x1", x, 80), 192, 3), 3, 2)
        for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = self.a(f"Mixed_{name}", x, pool)
        x = self.b("Mixed_6a", x)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = self.c(f"Mixed_{name}", x, width)
        x = self.d("Mixed_7a", x)
        x = self.e("Mixed_7b", x, self.mean_pool)
        x = self.e("Mixed_7c", x, lambda y: F.max_pool2d(y, 3, 1, 1))
        return x.mean((2, 3))

    def a(self, n, x, pool):
        c = self.conv
        five = c(f"{n}.branch5x5_2", c(f"{n}.branch5x5_1", x, 48), 64, 5, 1, 2)
        three = c(f"{n}.branch3x3dbl_2", c(f"{n}.branch3x3dbl_1", x, 64), 96, 3, 1, 1)
        three = c(f"{n}.branch3x3dbl_3", three, 96, 3, 1, 1)
        pooled = c(f"{n}.branch_pool", self.mean_pool(x), pool)
        return torch.cat([c(f"{n}.branch1x1", x, 64), five, three, pooled], 1)

    def b(self, n, x):
        c = self.conv
        double = c(f"{n}.branch3x3dbl_2", c(f"{n}.branch3x3dbl_1", x, 64), 96, 3, 1, 1)
        double = c(f"{n}.branch3x3dbl_3", double, 96, 3, 2)
        return torch.cat([c(f"{n}.branch3x3", x, 384, 3, 2), double, F.max_pool2d(x, 3, 2)], 1)

    def c(self, n, x, w):
        c, row, column = self.conv, dict(size=(1, 7), padding=(0, 3)), dict(size=(7, 1), padding=(3, 0))
        seven = c(f"{n}.branch7x7_2", c(f"{n}.branch7x7_1", x, w), w, **row)
        seven = c(f"{n}.branch7x7_3", seven, 192, **column)
        double = c(f"{n}.branch7x7dbl_2", c(f"{n}.branch7x7dbl_1", x, w), w, **column)
        double = c(f"{n}.branch7x7dbl_4", c(f"{n}.branch7x7dbl_3", double, w, **row), w, **column)
        double = c(f"{n}.branch7x7dbl_5", double, 192, **row)
        pooled = c(f"{n}.branch_pool", self.mean_pool(x), 192)
        return torch.cat([c(f"{n}.branch1x1", x, 192), seven, double, pooled], 1)

    def d(self, n, x):
        c = self.conv
        three = c(f"{n}.branch3x3_2", c(f"{n}.branch3x3_1", x, 192), 320, 3, 2)
        seven = c(f"{n}.branch7x7x3_2", c(f"{n}.branch7x7x3_1", x, 192), 192, (1, 7), 1, (0, 3))
        seven = c(f"{n}.branch7x7x3_4", c(f"{n}.branch7x7x3_3", seven, 192, (7, 1), 1, (3, 0)), 192, 3, 2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(self, n, x, pool):
        c, row, column = self.conv, dict(size=(1, 3), padding=(0, 1)), dict(size=(3, 1), padding=(1, 0))
        three = c(f"{n}.branch3x3_1", x, 384)
        double = c(f"{n}.branch3x3dbl_2", c(f"{n}.branch3x3dbl_1", x, 448), 384, 3, 1, 1)
        parts = [c(f"{n}.branch1x1", x, 320)]
        parts += [c(f"{n}.branch3x3_2a", three, 384, **row), c(f"{n}.branch3x3_2b", three, 384, **column)]
        parts += [c(f"{n}.branch3x3dbl_3a", double, 384, **row), c(f"{n}.branch3x3dbl_3b", double, 384, **column)]
        return torch.cat([*parts, c(f"{n}.branch_pool", pool(x), 192)], 1)


@pytest.fixture(scope="module")
def net():
    """The reference, its weights made."""
    net = Net()
    with torch.no_grad():
        net(torch.zeros(1, 3, 96, 96))
    return net


@pytest.fixture(scope="module")
def file(net, tmp_path_factory):
    """The weights as published, with what the features do not need."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    more = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    more["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save({**net.weights, **more}, path)
    return path


def test_features_are_pytorchs(net, file):
    params = load_inception(file)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 107, 99, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    got = np.asarray(jax.jit(lambda p, x: Inception().apply({"params": p}, x))(params, x))
    assert got.shape == (1, 2048)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    assert expected.std() > 0.01 * np.abs(expected).max()


def test_a_missing_weight_is_named(net, tmp_path):
    torch.save({k: v for k, v in net.weights.items() if k != "Mixed_7c.branch_pool.bn.bias"}, tmp_path / "p.pth")
    with pytest.raises(UserError, match=r"lacks the tensor 'Mixed_7c\.branch_pool\.bn\.bias'"):
        load_inception(tmp_path / "p.pth")
    with pytest.raises(UserError, match="there is no file"):
        load_inception(tmp_path / "nowhere.pth")


def test_clean_resize_is_pillows_in_floats():
    image = np.random.default_rng(1).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    got = to_input([image], "clean")[0]
    for c in range(3):
        channel = Image.fromarray(image[..., c].astype(np.float32), mode="F")
        expected = np.asarray(channel.resize((SIDE, SIDE), resample=Image.BICUBIC))
        assert np.abs(got[..., c] - (expected - 128) / 128).max() < 1e-6


def test_pytorch_resize_is_bilinear_without_antialiasing():
    for size in ((40, 61), (500, 300), (SIDE, SIDE)):
        image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
        x = torch.from_numpy(image.transpose(2, 0, 1)[None] / np.float32(255))
        expected = 2 * F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0].numpy() - 1
        assert np.abs(to_input([image], "pytorch")[0] - expected.transpose(1, 2, 0)).max() < 1e-4
