"""LPIPS against PyTorch, on random weights in the files that are published."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.lpips import TRUNKS, load_lpips, square

PADDING = {
    "vgg": dict.fromkeys((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), 1),
    "alex": {0: 2, 3: 2, 6: 1, 8: 1, 10: 1},
}
SHAPES = {
    "vgg": [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256)]
    + [(512, 512)] * 5,
    "alex": [(64, 3), (192, 64), (384, 192), (256, 384), (256, 256)],
}
KERNELS = {"vgg": [3] * 13, "alex": [11, 5, 3, 3, 3]}
POOLS = {"vgg": {4: 2, 9: 2, 16: 2, 23: 2}, "alex": {2: 3, 5: 3}}  # by place in torchvision's `features`, the window
SEEN = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # the ReLUs that LPIPS reads


def published(kind, seed=0):
    """State dicts of torchvision's trunk and of lpips, random."""
    g = torch.Generator().manual_seed(seed)
    trunk = {}
    for number, (c_out, c_in), k in zip(PADDING[kind], SHAPES[kind], KERNELS[kind]):
        trunk[f"features.{number}.weight"] = torch.randn(c_out, c_in, k, k, generator=g) * (2 / (c_in * k * k)) ** 0.5
        trunk[f"features.{number}.bias"] = 0.1 * torch.randn(c_out, generator=g)
    trunk["classifier.0.weight"] = torch.zeros(2, 2)
    widths = [c for n, (c, _) in zip(PADDING[kind], SHAPES[kind]) if n + 1 in SEEN[kind]]
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=g) for i, c in enumerate(widths)}
    return trunk, linear


def reference(kind, trunk, linear, a, b):
    """LPIPS v0.1 as the lpips package computes it, from pictures [b, 3, h, w] in [0, 1]."""
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))

    def activations(x):
        x, found = (2 * x - 1 - shift) / scale, []
        for place in range(max(SEEN[kind]) + 1):
            if place in PADDING[kind]:
                stride = 4 if kind == "alex" and place == 0 else 1
                weights = trunk[f"features.{place}.weight"], trunk[f"features.{place}.bias"]
                x = F.conv2d(x, *weights, stride=stride, padding=PADDING[kind][place])
            elif place in POOLS[kind]:
                x = F.max_pool2d(x, POOLS[kind][place], 2)
            else:
                x = F.relu(x)
            if place in SEEN[kind]:
                found.append(x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10))
        return found

    pairs = zip(activations(a), activations(b), linear.values())
    return sum(F.conv2d((x - y) ** 2, w).mean((1, 2, 3)) for x, y, w in pairs)


@pytest.fixture(params=["vgg", "alex"])
def files(request, tmp_path):
    trunk, linear = published(request.param)
    torch.save(trunk, tmp_path / "trunk.pth")
    torch.save(linear, tmp_path / "linear.pth")
    return request.param, trunk, linear, tmp_path


def test_distance_is_pytorchs(files):
    kind, trunk, linear, folder = files
    metric = load_lpips(folder / "trunk.pth", folder / "linear.pth")
    assert metric.network.trunk is TRUNKS[kind]
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 2, 67, 70, 3), np.float32)  # odd sizes: pools drop what is left over
    expected = reference(kind, trunk, linear, *(torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (a, b))).numpy()
    got = np.asarray(metric.distance(metric.features(a), metric.features(b)))
    assert got == pytest.approx(expected, rel=1e-4)
    assert expected.min() > 0.01


def test_spread_is_the_mean_over_pairs(tmp_path, monkeypatch):
    from dmdr_jax.evaluation import lpips

    monkeypatch.setattr(lpips, "SIDE", 64)
    monkeypatch.setattr(lpips.square, "__defaults__", (64,))
    trunk, linear = published("alex", seed=1)
    torch.save(trunk, tmp_path / "t.pth")
    torch.save(linear, tmp_path / "l.pth")
    metric = load_lpips(tmp_path / "t.pth", tmp_path / "l.pth")
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    seen = [metric.features(square(p, 64)[None]) for p in pictures]
    d = {(i, j): float(metric.distance(seen[i], seen[j])[0]) for i in range(3) for j in range(3)}
    assert d[0, 1] == pytest.approx(d[1, 0], rel=1e-5)
    assert d[0, 0] == 0
    assert metric.spread(pictures) == pytest.approx(
        [(d[0, 1] + d[0, 2]) / 2, (d[0, 1] + d[1, 2]) / 2, (d[0, 2] + d[1, 2]) / 2], rel=1e-5
    )
    assert metric.spread([pictures[0]] * 2) == pytest.approx([0, 0])


def test_wrong_files_are_named(files):
    kind, _, _, folder = files
    other = published({"vgg": "alex", "alex": "vgg"}[kind])[1]
    torch.save(other, folder / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold LPIPS' weights for this trunk"):
        load_lpips(folder / "trunk.pth", folder / "other.pth")
    with pytest.raises(UserError, match=r"linear\.pth is neither"):
        load_lpips(folder / "linear.pth", folder / "trunk.pth")
    with pytest.raises(UserError, match="there is no file"):
        load_lpips(folder / "nowhere.pth", folder / "linear.pth")


def test_pictures_of_another_size_are_resized():
    x = np.full((10, 30, 3), 51, np.uint8)
    assert square(x, 16).shape == (16, 16, 3)
    assert square(x, 16) == pytest.approx(np.full((16, 16, 3), 0.2), abs=1e-6)
