"""Distances between sets, against closed forms and against the formulas of maintained packages."""

import numpy as np
import pytest
import scipy.linalg

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.distances import (
    Gaussian,
    KernelReference,
    coverage,
    frechet_distance,
    precision_recall,
    radii,
    unit_rows,
)

RNG = np.random.default_rng(0)


def with_moments(n, mean, covariance, seed=0):
    """n rows whose sample mean and (unbiased) covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def pytorch_fid(mu1, sigma1, mu2, sigma2):
    """The formula of pytorch-fid's and clean-fid's calculate_frechet_distance."""
    root = np.asarray(scipy.linalg.sqrtm(sigma1.dot(sigma2)))
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real)


# --- Frechet -------------------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians_is_closed():
    a, b = np.array([1.0, 2.0, 0.5]), np.array([2.0, 0.5, 0.5])
    x = with_moments(50, np.zeros(3), np.diag(a**2))
    reference = Gaussian(np.array([1.0, 0.0, -2.0]), np.diag(b**2))
    assert frechet_distance(x, reference) == pytest.approx(5 + ((a - b) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("n", [200, 40])
def test_frechet_is_pytorch_fids(n):
    mix_a, mix_b = RNG.standard_normal((2, 12, 12))
    a, b = RNG.standard_normal((n, 12)) @ mix_a + 1, RNG.standard_normal((300, 12)) @ mix_b
    expected = pytorch_fid(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert frechet_distance(a, Gaussian.fit(b)) == pytest.approx(expected, rel=1e-8)


def test_frechet_with_fewer_images_than_features():
    """Rank-deficient on both sides: the closed form of commuting covariances, where sqrtm of a product is unstable."""
    d, n = 64, 10
    basis = np.linalg.qr(RNG.standard_normal((d, d)))[0][:, :5]
    a = RNG.standard_normal((n, 5))
    x = a @ basis.T
    y = 3 * x + 2 * basis[:, 0]
    covariance = np.cov(a, rowvar=False)
    expected = ((y.mean(0) - x.mean(0)) ** 2).sum() + (1 - 3) ** 2 * np.trace(covariance)
    assert frechet_distance(x, Gaussian.fit(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, Gaussian.fit(x)) == pytest.approx(0, abs=1e-6)


def test_statistics_from_a_file(tmp_path):
    x = RNG.standard_normal((30, 4))
    np.savez(tmp_path / "s.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    assert frechet_distance(x, Gaussian.read(tmp_path / "s.npz")) == pytest.approx(0, abs=1e-9)
    np.savez(tmp_path / "bad.npz", mu=x.mean(0))
    with pytest.raises(UserError, match="no statistics mu and sigma"):
        Gaussian.read(tmp_path / "bad.npz")
    np.savez(tmp_path / "odd.npz", mu=x.mean(0), sigma=np.eye(3))
    with pytest.raises(UserError, match="do not belong together"):
        Gaussian.read(tmp_path / "odd.npz")


def test_one_image_has_no_distance():
    with pytest.raises(UserError, match="at least two images"):
        frechet_distance(np.zeros((1, 4)), Gaussian(np.zeros(4), np.eye(4)))
    with pytest.raises(UserError, match="one width"):
        frechet_distance(np.zeros((5, 3)), Gaussian(np.zeros(4), np.eye(4)))
    with pytest.raises(UserError, match="at least two images"):
        Gaussian.fit(np.zeros((1, 4)))


# --- CMMD ----------------------------------------------------------------------------------------------------------


def cmmd(x, y, sigma=10, scale=1000):
    """The formula of cmmd's distance.py, kernel matrices written out."""

    def kernel(a, b):
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        return np.exp(-squared / (2 * sigma**2)).mean()

    return scale * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def test_cmmd_is_the_published_formula():
    x, y = unit_rows(RNG.standard_normal((40, 16)) + 1), unit_rows(RNG.standard_normal((70, 16)))
    assert np.linalg.norm(x, axis=1) == pytest.approx(np.ones(40))
    assert KernelReference(y).mmd(x) == pytest.approx(cmmd(x, y), rel=1e-9)


def test_mmd_of_two_points_is_closed():
    x, y = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    assert KernelReference(y, sigma=5.0, scale=1.0).mmd(x) == pytest.approx(2 - 2 * np.exp(-0.5))


def test_cmmd_of_a_set_with_itself_is_zero_whatever_its_size(monkeypatch):
    from dmdr_jax.evaluation import distances

    x = unit_rows(RNG.standard_normal((25, 8)))
    assert KernelReference(x).mmd(x) == pytest.approx(0, abs=1e-9)
    whole = KernelReference(x[:10]).mmd(x)
    monkeypatch.setattr(distances, "_CHUNK", 7)
    assert KernelReference(x[:10]).mmd(x) == pytest.approx(whole, rel=1e-12)


# --- precision and recall ------------------------------------------------------------------------------------------


def by_definition(points, manifold, k):
    """Share of points inside a ball around a manifold point that reaches to its k-th neighbour, one by one."""
    inside = 0
    for p in points:
        for i, m in enumerate(manifold):
            others = sorted(np.linalg.norm(m - o) for j, o in enumerate(manifold) if j != i)
            if np.linalg.norm(p - m) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_their_definition(k):
    a, b = RNG.standard_normal((15, 2)), RNG.standard_normal((20, 2)) * 0.5 + 0.5
    precision, recall = precision_recall(a, b, k)
    assert precision == pytest.approx(by_definition(a, b, k))
    assert recall == pytest.approx(by_definition(b, a, k))
    assert 0 < precision < 1 or 0 < recall < 1


def test_radii_of_points_on_a_line():
    x = np.array([[0.0], [1.0], [3.0], [7.0], [100.0]])
    assert radii(x, 1).tolist() == [1, 1, 4, 16, 93**2]
    assert coverage(np.array([[2.0], [20.0]]), x[:4], radii(x[:4], 1)) == 0.5


def test_a_set_covers_itself_and_a_collapsed_one_has_no_recall():
    x = RNG.standard_normal((60, 5)) * 1e3 + 1e4
    assert precision_recall(x, x) == (1.0, 1.0)
    collapsed = np.repeat(x[:1], 60, 0) + 1e-3 * RNG.standard_normal((60, 5))
    precision, recall = precision_recall(collapsed, x)
    assert precision == 1.0
    assert recall < 0.1


def test_too_few_points_for_neighbours():
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
