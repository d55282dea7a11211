import colorsys
import csv
import functools
import json
import math
import re
import sys
import types
import urllib.error

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image

import datasets
import metrics
from classifier import ResNet32, save_classifier
from datasets import InputError
from metrics import frechet_distance, inception_score, intra_fid, kl_to_uniform

rng = np.random.default_rng(0)


# --------------------------------------------------------------------------------------------------
# Fréchet distance
# --------------------------------------------------------------------------------------------------
def by_sqrtm(real, fake):
    """The formula as papers' code has it: the square root of the unsymmetric product of two full
    covariances."""
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    S1, S2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(S1 @ S2)
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * np.trace(root).real


def by_symmetric_root(real, fake):
    """Tr((S1 S2)^(1/2)) = Tr((R S2 R)^(1/2)) with R = S1^(1/2): for singular covariances, where sqrtm
    fails."""
    S1, S2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    values, vectors = np.linalg.eigh(S1)
    R = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(R @ S2 @ R).clip(0)).sum()
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * cross


def features(n, dimensions=32, shift=0.0, seed=0):
    generator = np.random.default_rng([seed, n])
    mixing = generator.standard_normal((dimensions, dimensions)) * 0.9 ** np.arange(dimensions)
    return (generator.standard_normal((n, dimensions)) @ mixing + shift).astype(np.float32)


SINGULAR = pytest.mark.filterwarnings("ignore:Matrix is singular")  # says sqrtm, and is right all the same


@SINGULAR
@pytest.mark.parametrize("n, m",
                         [(500, 400), (33, 33), (10, 12), (2, 2), (32, 32), (10, 500), (500, 10), (32, 33)])
def test_frechet_distance_is_that_of_sqrtm(n, m):
    """More images than the 32 dimensions on both sides, fewer on both, and fewer on one."""
    real, fake = features(n), features(m, shift=0.5, seed=1)
    expected = by_sqrtm(real, fake)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(fake, real) == pytest.approx(frechet_distance(real, fake), rel=1e-6)
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(fake)) == frechet_distance(real, fake)


def test_frechet_distance_from_moments():
    real, fake = features(200), features(100, shift=1.0, seed=1)
    moments = [x for f in (real, fake) for x in (f.mean(0, dtype=np.float64), np.cov(f.T.astype(np.float64)))]
    assert metrics.frechet_distance_from_moments(*moments) == pytest.approx(by_sqrtm(real, fake), rel=1e-6)
    # N(m, diag(a)) against N(m', diag(b)): |m - m'|^2 + sum (sqrt a - sqrt b)^2
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0])
    for first, second in ((a, b), (b, a)):  # the second time round the first covariance is singular
        found = metrics.frechet_distance_from_moments([0, 0, 0], np.diag(first), [1, 2, 0], np.diag(second))
        assert found == pytest.approx(5 + 1 + 0 + 9, rel=1e-6)


@pytest.mark.parametrize("n", [20, 300])
def test_frechet_distance_of_a_shift(n):
    real = features(n).astype(np.float64)
    shift = np.linspace(-1, 1, 32)
    assert frechet_distance(real, real + shift) == pytest.approx((shift**2).sum(), rel=1e-5)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(real, real[::-1]) >= 0


def test_frechet_distance_in_one_dimension():
    # means 2, 10.5; deviations 2, sqrt(1/2)
    real, fake = np.array([[0.0], [2.0], [4.0]]), np.array([[10.0], [11.0]])
    assert frechet_distance(real, fake) == pytest.approx(8.5**2 + (2 - math.sqrt(0.5)) ** 2)


def test_frechet_distance_of_rank_deficient_features():
    """Dead features and duplicates, as ReLU networks and collapsed generators make them, with more images
    than D."""
    real, fake = features(300), features(200, shift=0.3, seed=1)
    real[:, 5:9] = 0
    real[:, 20] = real[:, 21]
    fake[50:] = fake[0]
    fake[:, 6] = 1
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(np.cov(real, rowvar=False))
    assert frechet_distance(real, fake) == pytest.approx(by_symmetric_root(real, fake), rel=1e-5)
    assert frechet_distance(fake, real) == pytest.approx(by_symmetric_root(real, fake), rel=1e-5)
    constant = np.ones((100, 32))
    assert frechet_distance(real, constant) == pytest.approx(by_symmetric_root(real, constant), rel=1e-6)
    assert frechet_distance(constant, constant) == 0


def test_moments_in_chunks():
    x = features(1001) + 1000  # a large mean: E[x^2] - E[x]^2 in float32 would lose the covariance
    mean, covariance = metrics.moments(x, rows=100)
    assert np.allclose(mean, x.astype(np.float64).mean(0)) and np.allclose(
        covariance, np.cov(x.astype(np.float64).T)
    )


@pytest.mark.parametrize("real, fake, message", [
    (np.ones((1, 3)), np.ones((4, 3)), "real has shape"),
    (np.ones((4, 3)), np.ones(4), "fake has shape"),
    (np.ones((4, 3)), np.ones((4, 2)), "3 dimensions"),
    (np.ones((4, 3)), np.array([[1, 2, np.nan], [1, 2, 3]]), "fake has entries that are NaN"),
    (np.array([[1, 2, np.inf], [1, 2, 3]]), np.ones((4, 3)), "real has entries that are NaN or infinite"),
])  # fmt: skip
def test_features_that_make_no_sense(real, fake, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(real, fake)


def test_moments_that_make_no_sense():
    eye = np.eye(3)
    with pytest.raises(ValueError, match="want"):
        metrics.frechet_distance_from_moments(np.zeros(3), eye, np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        metrics.frechet_distance_from_moments(np.zeros(3), eye * np.nan, np.zeros(3), eye)


def test_intra_fid_is_a_distance_for_each_class():
    real, fake = features(60, 8), features(50, 8, shift=0.2, seed=1)
    real_labels, fake_labels = np.arange(60) % 4, np.arange(50) % 3  # 15 of each of four; 17, 17, 16 of three
    fake_labels[0] = 4  # one image of a class that has no real ones
    mean, deviation, per_class = intra_fid(real, real_labels, fake, torch.from_numpy(fake_labels))
    expected = [by_sqrtm(real[real_labels == k], fake[fake_labels == k]) for k in range(3)]
    assert per_class[:3] == pytest.approx(expected, rel=1e-5)
    assert len(per_class) == 5 and np.isnan(per_class[3:]).all()
    assert mean == pytest.approx(np.mean(expected), rel=1e-5) and deviation == pytest.approx(
        np.std(expected), rel=1e-4
    )
    assert len(intra_fid(real, real_labels, fake, fake_labels, num_classes=9)[2]) == 9
    alone = intra_fid(real, np.zeros(60, int), fake, np.ones(50, int))
    assert math.isnan(alone[0]) and math.isnan(alone[1]) and np.isnan(alone[2]).all()


def test_intra_fid_of_few_images_makes_no_covariance():
    """A million dimensions: one D x D matrix would be 8 TB. By hand: c +- u against c' +- v.

    The covariances are 2 u u^T and 2 v v^T, so d^2 = |c - c'|^2 + 2 |u|^2 + 2 |v|^2 - 4 |u.v|.
    """
    D = 1_000_000
    c, u, c2, v = np.zeros((4, D), np.float32)
    c[:4], c2[:4], u[2], v[2:4] = 1, [1, 3, 1, 1], 5, [3, 4]  # |c - c'|^2 = 4, |u|^2 = |v|^2 = 25, u.v = 15
    real, fake = np.stack([c + u, c - u, c, c + v]), np.stack([c2 + v, c2 - v, c, c + v])
    mean, deviation, per_class = intra_fid(real, np.array([0, 0, 1, 1]), fake, np.array([0, 0, 1, 1]))
    assert per_class == pytest.approx([4 + 50 + 50 - 60, 0], abs=1e-4)  # class 1: the same two images
    assert (mean, deviation) == pytest.approx((22, 22), abs=1e-4)


@pytest.mark.parametrize("labels", [np.zeros(49, int), np.zeros(50), np.full(50, -1), np.zeros((50, 1), int)])
def test_intra_fid_refuses_labels_that_do_not_match(labels):
    with pytest.raises(ValueError, match="fake: wanted are 50 class indices"):
        intra_fid(features(60, 8), np.zeros(60, int), features(50, 8), labels)


# --------------------------------------------------------------------------------------------------
# KID, precision, recall, density, coverage: against double sums and brute force
# --------------------------------------------------------------------------------------------------
def kid_by_hand(real, fake):
    """The textbook's double sums, one pair at a time."""
    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    def among(a):
        return sum(k(a[i],
                     a[j]) for i in range(len(a)) for j in range(len(a)) if i != j) / (len(a) * (len(a) - 1))

    real, fake = real.astype(np.float64), fake.astype(np.float64)
    return among(real) + among(fake) - 2 * sum(k(x, y) for x in real for y in fake) / (len(real) * len(fake))


@pytest.mark.parametrize("tile", [7, 16, 2048])
def test_kid_is_the_double_sum(monkeypatch, tile):
    """With tiles that do and don't divide the 40 and 30 images, and one for all."""
    monkeypatch.setattr(metrics, "TILE", tile)
    real, fake = features(40, 20), features(30, 20, shift=0.3, seed=1)
    expected = kid_by_hand(real, fake)
    assert expected > 0.1 and metrics.kernel_inception_distance(real, fake) == pytest.approx(
        expected, abs=1e-9, rel=1e-9
    )
    assert metrics.kernel_inception_distance(fake, torch.from_numpy(real)) == pytest.approx(
        expected, rel=1e-9
    )
    # Papers print the mean over random subsets; it estimates the same number.
    chosen = np.random.default_rng(1)
    subsets = [metrics.kernel_inception_distance(*(x[chosen.choice(len(x), 10,
                                                                   replace=False)] for x in (real, fake)))
               for _ in range(400)]  # fmt: skip
    assert abs(np.mean(subsets) - expected) < 4 * np.std(subsets) / 20


def test_kid_has_no_bias_by_sample_size_and_fid_has():
    """Halves of one set: the same distribution, so the distance is 0. FID says 1/n of something else; KID
    says 0."""
    fid, kid = {}, {}
    for n in (50, 100, 200, 400):
        pairs = [(features(n, 16, seed=2 * i), features(n, 16, seed=2 * i + 1)) for i in range(20)]
        # one distribution: `features` mixes by its seed
        mixing = np.diag(0.9 ** np.arange(16)).astype(np.float32)
        pairs = [[np.random.default_rng([n, i, side]).standard_normal((n, 16)).astype(np.float32) @ mixing
                  for side in (0, 1)] for i in range(len(pairs))]  # fmt: skip
        fid[n] = np.mean([frechet_distance(a, b) for a, b in pairs])
        kid[n] = np.array([metrics.kernel_inception_distance(a, b) for a, b in pairs])
    for n in (50, 100, 200):
        assert fid[n] / fid[2 * n] == pytest.approx(2, rel=0.3)
    for values in kid.values():
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values)) and (values < 0).any()


def distances(a, b):
    """By differences, in float64; (n, D), (m, D) -> (n, m)."""
    return np.sqrt(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(2))


def brute_force(real, fake, k):
    """precision, recall, density, coverage from three whole tables of distances, sorted."""
    def radii(x):
        table = distances(x, x)
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(table)])

    table, r, f = distances(real, fake), radii(real), radii(fake)
    inside_real, inside_fake = table < r[:, None], table < f[None]
    return (inside_real.any(0).mean(), inside_fake.any(1).mean(), inside_real.sum() / (k * len(fake)),
            inside_real.any(1).mean())  # fmt: skip


def sets_with_ties():
    """Pairs of sets in which distance and radius are often the same number, or nearly."""
    r = np.random.default_rng(7)
    plain, other = features(60, 24), features(45, 24, shift=0.1, seed=1)
    far = features(60, 24) * np.float32(1e-3) + 1000  # |x|^2 + |y|^2 - 2 x.y loses nine digits here
    lattice, lattice2 = (
        r.integers(0, 3, (70, 4)).astype(np.float32),
        r.integers(0, 3, (50, 4)).astype(np.float32),
    )
    shared = np.concatenate([plain[:30], other[:20]])
    copies = np.repeat(other[:8], 7, 0)
    return {"plain": (plain, other), "same": (plain, plain), "permuted": (plain, plain[r.permutation(60)]),
            "shared": (plain, shared), "far": (far, far[::-1][:40]), "lattice": (lattice, lattice2),
            "collapsed": (plain, copies), "onto a real one": (plain, np.repeat(plain[:1], 20, 0)),
            "doubled": (np.repeat(plain, 2, 0), plain)}  # fmt: skip


@pytest.mark.parametrize("tile", [16, 2048])
@pytest.mark.parametrize("name", sets_with_ties())
def test_balls_are_those_of_brute_force_to_the_last_count(monkeypatch, name, tile):
    monkeypatch.setattr(metrics, "TILE", tile)
    real, fake = sets_with_ties()[name]
    for k in (1, 5):
        expected = brute_force(real, fake, k)
        found = (*metrics.precision_recall(real, fake, k), *metrics.density_coverage(real, fake, k))
        counts = np.array([len(fake), len(real), len(fake) * k, len(real)])
        assert np.array_equal(np.rint(np.array(found) * counts),
                              np.rint(np.array(expected) * counts)), (found, expected)
        assert found == pytest.approx(expected, abs=1e-12)
        known = metrics.neighbour_radii(real, k).numpy()
        assert np.allclose(np.sqrt(known),
                           np.sort(distances(real, real) + np.diag([np.inf] * len(real)), 1)[:, k - 1])
        assert metrics.balls(torch.from_numpy(real.copy()), torch.from_numpy(fake.copy()), k, known) == found


def test_what_precision_and_recall_are_known_to_be():
    real, fake = features(200, 8), features(150, 8, shift=0.5, seed=1)
    precision, recall = metrics.precision_recall(real, fake)
    assert 0.05 < precision < 0.95 and 0.05 < recall < 0.95 and precision != recall
    assert metrics.precision_recall(fake, real) == (recall, precision)  # exchanged with the sets
    order = np.random.default_rng(3).permutation(200)
    assert metrics.balls(real[order], fake[order[order < 150]]) == pytest.approx(
        metrics.balls(real, fake), abs=1e-12
    )
    # without duplicates each ball holds its own centre and k - 1 others
    assert metrics.balls(real, real) == (1, 1, 1, 1)
    assert metrics.balls(real, real + 1000) == (0, 0, 0, 0)
    collapsed = np.repeat(real[:1], 150, 0)  # one real image, again and again
    precision, recall, density, coverage = metrics.balls(real, collapsed)
    assert precision == 1 and recall == 0 and density > 0.1 and 0 < coverage < 0.1
    # 0, 1, 2, 3 on a line, k = 1: all radii are 1. 0.5 is in two real balls, 3.5 in that of 3; distance 1 is
    # not inside
    line = np.array([[0.0], [1], [2], [3]])
    fake = np.array([[0.5], [3.5], [4.0], [9.0]])  # radii 3, 0.5, 0.5, 5
    assert metrics.balls(line, fake, 1) == (2 / 4, 4 / 4, 3 / 4, 3 / 4)


@pytest.mark.parametrize("function", [metrics.precision_recall, metrics.density_coverage])
def test_too_few_images_for_a_fifth_neighbour(function):
    assert function(features(6, 3), features(6, 3)) == (1, 1)
    for real, fake in ((5, 6), (6, 5)):
        with pytest.raises(ValueError, match="5 images have no 5-th neighbours"):
            function(features(real, 3), features(fake, 3))
    with pytest.raises(ValueError, match="3 dimensions, fake ones 4"):
        function(features(9, 3), features(9, 4))
    with pytest.raises(ValueError, match="NaN"):
        function(features(9, 3), np.full((9, 3), np.nan))


def test_all_pairs_are_never_at_hand():
    """Twenty times the images, no more memory than a few tiles: 3,000 x 3,000 in float64 are 72 MB."""
    x = features(3000, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "TILE", 100)
        largest, real_empty = [], torch.addmm

        def watched(*arguments, **more):
            out = real_empty(*arguments, **more)
            largest.append(out.numel())
            return out

        patch.setattr(torch, "addmm", watched)
        metrics.balls(x[:900], x[900:1700])
    assert max(largest) == 100 * 100


def test_any_score_within_classes():
    real, fake = features(90, 6), features(80, 6, shift=0.2, seed=1)
    real_labels, fake_labels = np.arange(90) % 4, np.arange(80) % 3  # class 3 has no fake images
    real_labels[real_labels == 2] = 3
    real_labels[:4] = 2  # class 2: four real images
    mean, deviation, per_class = metrics.intra_class(metrics.precision_recall, real, real_labels, fake,
                                                     fake_labels, least=6)
    expected = [brute_force(real[real_labels == k], fake[fake_labels == k], 5)[:2] for k in (0, 1)]
    assert per_class.shape == (4, 2) and per_class[:2] == pytest.approx(np.array(expected))
    assert np.isnan(per_class[2:]).all()
    assert mean == pytest.approx(np.mean(expected, 0)) and deviation == pytest.approx(np.std(expected, 0))
    kid = metrics.intra_class(metrics.kernel_inception_distance, real, real_labels, fake, fake_labels)
    by_hand = [kid_by_hand(real[real_labels == k], fake[fake_labels == k]) for k in range(3)]
    assert kid[2][:3] == pytest.approx(by_hand) and kid[0] == pytest.approx(np.mean(by_hand))
    assert math.isnan(kid[2][3])


@SINGULAR
def test_two_images_are_enough_for_a_distance_within_a_class_and_one_is_not():
    real, fake, labels = features(8, 4), features(8, 4, seed=1), np.repeat([0, 1, 2], [5, 2, 1])
    for score, by_hand in ((frechet_distance, by_sqrtm), (metrics.kernel_inception_distance, kid_by_hand)):
        _, _, per_class = metrics.intra_class(score, real, labels, fake, labels)
        assert per_class[1] == pytest.approx(by_hand(real[5:7], fake[5:7]),
                                             rel=1e-4) and np.isnan(per_class[2])


# --------------------------------------------------------------------------------------------------
# Precision and recall of distributions
# --------------------------------------------------------------------------------------------------
def modes(which, each, seed=0):
    """`each` images in each of these modes, far apart."""
    r = np.random.default_rng(seed)
    places = np.random.default_rng(5).standard_normal((20, 16)) * 100
    return np.concatenate([places[m] + r.standard_normal((each, 16)) for m in which]).astype(np.float32)


def test_prd_of_histograms():
    """20 equal modes, of which the generator makes half: precision = min(lambda / 2, 1), recall = min(1 / 2,
    1 / lambda)."""
    p, q = np.full(20, 1 / 20), np.repeat([1 / 10, 0], 10)
    precision, recall = metrics.prd_curve(p, q)
    slope = np.tan(np.linspace(1e-6, np.pi / 2 - 1e-6, 1001))
    assert precision == pytest.approx(np.minimum(slope / 2,
                                                 1)) and recall == pytest.approx(np.minimum(1 / 2, 1 / slope))
    # the corner of that curve is precision 1, recall 1/2: F = (1 + b^2) / (2 b^2 + 1) ... with b = 8 and 1/8
    corner = [65 / 2 / (64 + 1 / 2), (65 / 64) / 2 / (1 / 64 + 1 / 2)]
    assert [metrics.f_beta(precision, recall, b) for b in (8, 1 / 8)] == pytest.approx(corner, abs=1e-3)
    assert corner == pytest.approx([0.5039, 0.9848], abs=1e-4)
    assert [metrics.f_beta(*metrics.prd_curve(q, p), b) for b in (8, 1 / 8)] == pytest.approx(
        corner[::-1], abs=1e-3
    )
    assert [metrics.f_beta(*metrics.prd_curve(p, p), b) for b in (8, 1 / 8)] == pytest.approx(
        [1, 1], abs=2e-3
    )
    assert metrics.f_beta(*metrics.prd_curve(p[:10] * 2, 0 * p[:10]), 8) == 0


def test_prd_sees_what_is_missing_and_what_is_wrong():
    """F_8 falls when half of the modes are missing, F_1/8 when half of the images are like nothing real."""
    real = modes(range(10), 40)
    f8, f1_8 = metrics.prd_f_beta(real, modes(range(10), 40, seed=1), 40)
    assert f8 > 0.85 and f1_8 > 0.85
    f8, f1_8 = metrics.prd_f_beta(real, modes(range(5), 80, seed=1), 40)
    assert f8 < 0.6 and f1_8 > 0.85
    f8, f1_8 = metrics.prd_f_beta(real, modes(range(20), 20, seed=1), 40)
    assert f8 > 0.85 and f1_8 < 0.6
    # a random start may give two modes one cluster
    assert max(metrics.prd_f_beta(real, modes(range(10, 20), 40), 80)) < 0.1
    with pytest.raises(ValueError, match="30 clusters of 25 images"):
        metrics.prd_f_beta(real, real[:25], 30)


def test_prd_is_that_of_another_k_means():
    """SciPy's k-means (Lloyd, k-means++) instead of ours: F within the spread of single clusterings."""
    import scipy.cluster.vq

    real, fake = features(300, 12), features(300, 12, shift=0.4, seed=1)
    both = np.concatenate([real, fake]).astype(np.float64)
    curves = []
    for seed in range(10):
        _, mine = scipy.cluster.vq.kmeans2(both, 20, minit="++", rng=np.random.default_rng(seed))
        curves.append(
            metrics.prd_curve(*(np.bincount(part, minlength=20) / 300 for part in np.split(mine, 2)))
        )
    single = [metrics.prd_f_beta(real, fake, 20, clusterings=1, seed=seed) for seed in range(10)]
    found = metrics.prd_f_beta(real, fake, 20)
    for i, beta in enumerate((8, 1 / 8)):
        spread = np.std([s[i] for s in single])
        assert 0.003 < spread < 0.1
        assert abs(found[i] - metrics.f_beta(*np.mean(curves, 0), beta)) < 3 * spread
    assert metrics.prd_f_beta(real, fake, 20) == found  # seeded
    # unequal numbers
    assert metrics.prd_f_beta(real, np.concatenate([fake, fake]), 20) == pytest.approx(found, abs=0.1)


def test_k_means_is_as_good_as_lloyds():
    """Within-cluster squares of SciPy's k-means from random rows too, which goes over all rows until nothing
    moves."""
    import scipy.cluster.vq

    x = features(600, 10)

    def squares(mine):
        return sum(((x[mine == c] - x[mine == c].mean(0)) ** 2).sum() for c in np.unique(mine))

    ours = [squares(metrics.k_means(torch.from_numpy(x), 15,
                                    np.random.default_rng(s)).numpy()) for s in range(10)]
    lloyd = [squares(scipy.cluster.vq.kmeans2(x, 15, minit="points",
                                              rng=np.random.default_rng(s))[1]) for s in range(10)]
    assert np.mean(lloyd) * 0.95 < np.mean(ours) < np.mean(lloyd) * 1.1 < squares(np.arange(600) % 15) / 2


def test_k_means_takes_two_passes():
    """By hand on a line, from centres at 0 and 1: what the second pass changes."""
    in_order = types.SimpleNamespace(permutation=np.arange)  # starts from the first two rows
    x = torch.tensor([[0.0], [1.0], [2.5], [9.0]])
    # Pass 1: 0 to the first centre, which stays at 0; 1, 2.5 and 9 to the second, which moves to 4.17: 2.5 is
    # nearer to it.
    # Pass 2: 0 and 1 to the first, now the mean of 0, 0, 1: 0.33; 2.5 and 9 to the second, now the mean of 1,
    # 2.5, 9, 2.5, 9:
    # 4.8. 2.5 is off by 2.17 and 2.3: the first has it.
    assert metrics.k_means(x, 2, in_order).tolist() == [0, 0, 0, 1]
    assert metrics.k_means(x, 2, in_order, passes=1).tolist() == [0, 0, 1, 1]


# --------------------------------------------------------------------------------------------------
# LPIPS, with random weights instead of the published ones
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lpips_home(tmp_path_factory):
    """A TORCH_HOME with the weights of AlexNet and of LPIPS under their published names; and the two
    networks."""
    from torchvision.models import AlexNet_Weights, alexnet

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("torch")
        patch.setenv("TORCH_HOME", str(home))
        folder = home / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        torch.manual_seed(4)
        network = torch.nn.Module()
        with torch.device("meta"):
            network.features = alexnet().features
        network.to_empty(device="cpu")
        for layer in network.features:
            if isinstance(layer, torch.nn.Conv2d):
                layer.reset_parameters()
        unused = {"classifier.6.bias": torch.zeros(1000)}
        torch.save(network.state_dict() | unused, folder / AlexNet_Weights.IMAGENET1K_V1.url.split("/")[-1])
        heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i,
                 c in enumerate((64, 192, 384, 256, 256))}
        torch.save(heads, folder / "alex.pth")
        yield folder, network, heads


@torch.no_grad()
def lpips_of_a_pair(x, y, network, heads):
    """The published definition, one pair at a time."""
    def layers(image):
        image = (image[None] / 127.5 - 1 - torch.tensor([-0.03, -0.088, -0.188]).view(3, 1,
                                                                                      1)) / torch.tensor(
            [0.458, 0.448, 0.45]).view(3, 1, 1)  # fmt: skip
        return [
            F.normalize(network.features[:end](image).double(), dim=1, eps=1e-10) for end in (2, 5, 8, 10, 12)
        ]

    return sum(((a - b) ** 2 * heads[f"lin{i}.model.1.weight"]).sum(1).mean().item()
               for i, (a, b) in enumerate(zip(layers(x), layers(y), strict=True)))  # fmt: skip


def test_lpips_diversity_is_the_mean_over_all_pairs(lpips_home):
    _, network, heads = lpips_home
    images = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (7, 3, 40, 36), dtype=np.uint8))
    images[3] = images[1]  # duplicates are pairs too
    pairs = [lpips_of_a_pair(images[i], images[j], network, heads) for i in range(7) for j in range(i)]
    assert metrics.lpips_diversity(images, batch_size=3) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert min(pairs) == 0 and np.mean(pairs) > 0.01
    assert metrics.lpips_diversity(images[[0, 0, 0]]) == pytest.approx(0, abs=1e-9)
    assert metrics.lpips_diversity(images[:2]) == pytest.approx(pairs[0], rel=1e-5)
    for wrong in (images[:1], images[:, :, :30]):
        with pytest.raises(InputError, match="two images of 31 pixels"):
            metrics.lpips_diversity(wrong)


def test_lpips_weights_that_are_not_there(lpips_home, monkeypatch):
    def no_network(url, *rest, **more):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    heads = lpips_home[0] / "alex.pth"
    content = heads.read_bytes()
    heads.unlink()
    with pytest.raises(InputError, match=f"copy that file to {heads}, or leave lpips out of --scores"):
        metrics.load_lpips()
    torch.save({"lin0.model.1.weight": torch.zeros(3)}, heads)
    with pytest.raises(InputError, match="alex.pth does not hold the weights of LPIPS"):
        metrics.load_lpips()
    heads.write_bytes(content)
    assert [len(w) for w in metrics.load_lpips().weights] == [64, 192, 384, 256, 256]


# --------------------------------------------------------------------------------------------------
# Class probabilities, labels, colours
# --------------------------------------------------------------------------------------------------
def test_inception_score():
    assert inception_score(np.full((100, 7), 1 / 7)) == pytest.approx((1, 0))
    assert inception_score(np.eye(8)[np.arange(160) % 8]) == pytest.approx((8, 0))
    # (1, 0) and (1/2, 1/2): their mean is (3/4, 1/4); KLs are log 4/3 and (log 2/3 + log 2) / 2
    kl = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert inception_score(torch.tensor([[1.0, 0.0], [0.5, 0.5]]),
                           splits=1) == pytest.approx((math.exp(kl), 0))
    # the first split scores 1, the second 2
    p = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert inception_score(p, splits=2) == pytest.approx((1.5, 0.5))
    with pytest.raises(ValueError, match="5 splits of 4 rows"):
        inception_score(p, splits=5)


def test_kl_to_uniform():
    assert kl_to_uniform(np.arange(30) % 10, 10) == pytest.approx(0)
    assert kl_to_uniform([0, 0, 0, 1], 2) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    # two classes of four are missing
    assert kl_to_uniform(torch.tensor([3, 3, 1, 1]), 4) == pytest.approx(math.log(2))
    assert kl_to_uniform([7] * 5, 10) == pytest.approx(math.log(10))
    cifar10lt = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert kl_to_uniform(np.repeat(np.arange(10), cifar10lt), 10) == pytest.approx(0.6589, abs=1e-4)
    with pytest.raises(ValueError, match="label 4 among 4 classes"):
        kl_to_uniform([4], 4)


def coloured(hues, ground=0.3):
    """(N, 3, 8, 8) uint8: a square of each hue (in turns) on a grey ground."""
    images = np.full((len(hues), 3, 8, 8), ground)
    for image, hue in zip(images, hues, strict=True):
        image[:, 2:5, 3:7] = np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.9))[:, None, None]
    return torch.from_numpy(np.rint(images * 255).astype(np.uint8))


def test_effective_hues():
    middles = (np.arange(12) + 0.5) / 12
    assert metrics.effective_hues(coloured(middles)) == pytest.approx(12)
    assert metrics.effective_hues(coloured(middles[[0, 4, 8]], ground=0.8)) == pytest.approx(3)
    assert metrics.effective_hues(coloured([middles[11]] * 5)) == pytest.approx(1)
    three_to_one = metrics.effective_hues(coloured(middles[[0, 0, 0, 6]]))
    assert three_to_one == pytest.approx(4 / 27**0.25)  # exp of -3/4 log 3/4 - 1/4 log 1/4
    everywhere, quarter = rng.random(2000), 0.1 + 0.25 * rng.random(2000)
    assert 11.5 < metrics.effective_hues(coloured(everywhere)) <= 12
    assert 2.5 < metrics.effective_hues(coloured(quarter)) < 4.1


# --------------------------------------------------------------------------------------------------
# Inception
# --------------------------------------------------------------------------------------------------
def random_inception(num_classes):
    """torchvision's network with random weights; batch norms that have seen data, so that the features depend
    on it."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(num_classes=num_classes, aux_logits=False, init_weights=False).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.momentum = 1.0  # the statistics of the next batch
    torch.nn.init.normal_(network.fc.bias)
    with torch.no_grad():
        network(F.interpolate(torch.rand(4, 3, 8, 8), 120, mode="bilinear") * 2 - 1)
    return network.eval()


@pytest.fixture(scope="module")
def networks():
    return {num_classes: random_inception(num_classes) for num_classes in (1000, 1008)}


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory, networks):
    """A TORCH_HOME in which both networks' weights lie under their published names."""
    from torchvision.models import Inception_V3_Weights

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("torch")
        patch.setenv("TORCH_HOME", str(home))
        folder = home / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        # The 2015 file has no counters of batches and no auxiliary head; torchvision's has a head.
        weights = {k: v for k,
                   v in networks[1008].state_dict().items() if not k.endswith("num_batches_tracked")}
        torch.save(weights, folder / "pt_inception-2015-12-05-6726825d.pth")
        head = {"AuxLogits.conv0.conv.weight": torch.zeros(128, 768, 1, 1),
                "AuxLogits.fc.bias": torch.zeros(1000)}
        torch.save(networks[1000].state_dict() | head,
                   folder / Inception_V3_Weights.IMAGENET1K_V1.url.split("/")[-1])
        yield home


def close(a, b):
    return (a - b).abs().max() < 1e-4 * b.abs().max()


def mean_inside(x):
    """3x3 means over the pixels that lie inside the image: sums over counts."""
    box = torch.ones(x.shape[1], 1, 3, 3)
    total = F.conv2d(x, box, padding=1, groups=x.shape[1])
    return total / F.conv2d(torch.ones_like(x), box, padding=1, groups=x.shape[1])


def maximum_inside(x):
    padded = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    h, w = x.shape[2:]
    return torch.stack([padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]).amax(0)


@torch.no_grad()
def test_the_fid_network_pools_as_published(torch_home, networks):
    ours, plain = metrics.load_fid_inception(), networks[1008]
    blocks = {"5b": (192, mean_inside), "5c": (256, mean_inside), "5d": (288, mean_inside),
              "6b": (768, mean_inside),
              "6c": (768, mean_inside), "6d": (768, mean_inside), "6e": (768, mean_inside),
              "7b": (1280, mean_inside),
              "7c": (2048, maximum_inside)}  # fmt: skip
    for name, (width, pool) in blocks.items():
        x = torch.randn(1, width, 7, 6)
        mine, theirs = getattr(ours, f"Mixed_{name}"), getattr(plain, f"Mixed_{name}")
        branch = theirs.branch_pool(pool(x))
        found, usual = mine(x), theirs(x)
        rest = found.shape[1] - branch.shape[1]
        assert close(found[:, :rest], usual[:, :rest]), name  # the other branches, as they were
        assert close(found[:, rest:], branch), name
        assert not close(found[:, rest:], usual[:, rest:]), name
        assert not hasattr(mine, "pooled"), name  # kept, the maps of 100 images are 800 MB
    x = torch.randn(1, 288, 7, 7)
    assert close(ours.Mixed_6a(x), plain.Mixed_6a(x))


def resized_by_hand(images):
    """Bilinear, half-pixel centres, edges repeated: (N, 3, H, W) uint8 -> (N, 3, 299, 299) in [-1, 1]."""
    h, w = images.shape[2:]
    rows, columns = ((np.arange(299) + 0.5) * n / 299 - 0.5 for n in (h, w))
    grid = np.meshgrid(rows, columns, indexing="ij")
    planes = images.double().flatten(0, 1).numpy()
    large = np.array([scipy.ndimage.map_coordinates(p, grid, order=1, mode="nearest") for p in planes])
    return torch.tensor(large / 127.5 - 1, dtype=torch.float32).view(-1, 3, 299, 299)


@torch.no_grad()
def test_inception_features(torch_home, networks):
    """torchvision's own network on images resized by hand: its pooled features and probabilities."""
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 8, 6), dtype=np.uint8))
    # shrinks: no antialiasing either
    large = torch.from_numpy(rng.integers(0, 256, (1, 3, 420, 310), dtype=np.uint8))
    for x in (images, large):
        assert torch.allclose(metrics.to_inception(x), resized_by_hand(x), atol=1e-3)
    network = metrics.load_feature_network("inception")
    found, probabilities = metrics.extract_features(images, network, batch_size=2)
    pooled = []
    hook = networks[1000].avgpool.register_forward_hook(
        lambda m, x, output: pooled.append(output.flatten(1).numpy())
    )
    logits = networks[1000](resized_by_hand(images))
    hook.remove()
    assert found.shape == (3, 2048) and found.dtype == np.float32 and probabilities.shape == (3, 1000)
    # between images: what the comparison has to be finer than
    differ = np.abs(pooled[0][0] - pooled[0][1]).mean()
    assert np.abs(found - pooled[0]).mean() < 0.01 * differ
    assert np.allclose(probabilities, logits.softmax(1).numpy(), atol=1e-4)
    assert network.metric == "FID(torchvision)"


@torch.no_grad()
def test_fid_probabilities_have_no_bias(torch_home, networks, monkeypatch):
    monkeypatch.setattr(metrics, "INCEPTION_SIZE", 99)  # quicker; the features themselves do not matter here
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 8, 8), dtype=np.uint8))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = metrics.load_feature_network("inception-fid")
    # a training run that stops for its scores resumes unchanged
    assert torch.equal(before, torch.get_rng_state())
    found, probabilities = metrics.extract_features(images, network)
    last = networks[1008].fc
    assert found.shape == (2, 2048) and network.metric == "FID"
    assert np.allclose(probabilities, (torch.from_numpy(found) @ last.weight.T).softmax(1).numpy(), atol=1e-5)
    assert not np.allclose(probabilities, last(torch.from_numpy(found)).softmax(1).numpy(), atol=1e-4)


@pytest.mark.parametrize("name, file", [("inception", "inception_v3_google-0cc3c7bd.pth"),
                                        ("inception-fid",
                                         "pt_inception-2015-12-05-6726825d.pth")])  # fmt: skip
def test_weights_that_are_not_there(tmp_path, monkeypatch, name, file):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tried = []

    def no_network(url, *rest, **more):
        tried.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    place = tmp_path / "hub" / "checkpoints" / file
    with pytest.raises(InputError, match="no route to host") as caught:
        metrics.load_feature_network(name)
    assert f"copy that file to {place}" in str(caught.value) and tried[0] in str(caught.value)
    assert tried[0].startswith("https://") and tried[0].endswith(file)
    for content in (b"", b"<html>not found</html>"):
        place.write_bytes(content)
        with pytest.raises(InputError, match="is damaged") as caught:
            metrics.load_feature_network(name)
        assert str(place) in str(caught.value)
    torch.save({"conv.weight": torch.zeros(3)}, place)
    with pytest.raises(InputError, match="does not hold the weights"):
        metrics.load_feature_network(name)
    assert len(tried) == 1


def test_unknown_features():
    with pytest.raises(InputError, match="unknown features 'inceptoin'"):
        metrics.load_feature_network("inceptoin")


# --------------------------------------------------------------------------------------------------
# Evaluation of the shapes data, by a classifier with random weights: what it says is of no matter, that it
# adds up is
# --------------------------------------------------------------------------------------------------
SIZE = 8
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@functools.cache
def random_classifier(K):
    """Random weights, with batch norms that have seen test images."""
    torch.manual_seed(0)
    network = ResNet32(K, **HALF).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the next batch
    with torch.no_grad():
        logits = network(datasets.load("shapes", "unused", "test", SIZE).images[::7] / 127.5 - 1)
        network.head.bias -= logits.mean(0)  # so that it sees every class now and then
    return network.eval()


def write_annotator(path, classes=None):
    classes = classes or datasets.load("shapes", "unused", "test", SIZE).classes
    settings, network = {"normalisation": HALF, "head": "linear"}, random_classifier(len(classes))
    save_classifier(path, network, "shapes", "reference", classes, SIZE, settings, {"all": 0.25})
    return network


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_annotator(folder / f"classifier-shapes-{SIZE}.pt")
    return folder


@pytest.fixture(scope="module")
def samples():
    test = datasets.load("shapes", "unused", "test", SIZE)
    return test.images[::4], test.labels[::4]  # 50 of each class, in order


def shapes_result(data_dir, images, labels, errors=False, **more):
    return metrics.evaluate(images, labels, "shapeslt", data_dir, image_size=SIZE, errors=errors, **more)


@torch.no_grad()
def test_evaluate(data_dir, samples):
    images, labels = samples
    result = shapes_result(data_dir, images, labels, rho=10)
    network = write_annotator(data_dir / "the-same-again.pt")
    real = datasets.load("shapes", data_dir, "reference", SIZE)
    a, b = (network.features(x / 127.5 - 1).numpy() for x in (real.images, images))
    seen = network(images / 127.5 - 1).argmax(1)
    protocol = result["protocol"]
    assert protocol["metric"] == "FD" and protocol["reference_images"] == 4000 and protocol["samples"] == 500
    assert protocol["features"] == f"classifier:{data_dir}/classifier-shapes-8.pt" and protocol["rho"] == 10
    assert result["all"]["fd"] == pytest.approx(by_sqrtm(a, b), rel=1e-2)
    assert result["all"]["kl_to_uniform"] == pytest.approx(kl_to_uniform(seen, 10))
    assert result["all"]["samples"] == 500 and result["all"]["inception_score"] > 1
    mean, deviation, per_class = intra_fid(a, real.labels, b, labels)
    assert result["all"]["intra_fd"] == pytest.approx(mean, rel=1e-2)
    assert [row["fd"] for row in result["per_class"]] == pytest.approx(per_class, rel=1e-2)
    # shapeslt falls from class 0 to 9, so thirds are 0-3, 4-6, 7-9
    for group, classes in (("head", [0, 1, 2, 3]), ("middle", [4, 5, 6]), ("tail", [7, 8, 9])):
        mine, theirs = np.isin(labels, classes), np.isin(real.labels, classes)
        assert result[group]["samples"] == 50 * len(classes)
        assert result[group]["fd"] == pytest.approx(by_symmetric_root(a[theirs], b[mine]), rel=1e-2)
        assert result[group]["intra_fd"] == pytest.approx(np.mean(per_class[classes]), rel=1e-2)
        assert result[group]["intra_fd_std"] == pytest.approx(np.std(per_class[classes]), rel=2e-2)
        assert result[group]["recognised"] == pytest.approx((seen == labels)[mine].float().mean().item())
    row = result["per_class"][9]
    assert row["name"] == "vbars" and row["train_images"] == 100 and row["samples"] == 50
    assert row["seen"] == (seen == 9).sum()
    assert row["recognised"] == pytest.approx((seen[450:] == 9).float().mean().item())
    assert row["effective_hues"] == pytest.approx(metrics.effective_hues(images[450:]))
    assert row["reference_hues"] == pytest.approx(metrics.effective_hues(real.images[3600:3650]))
    assert result["all"]["effective_hues"] == pytest.approx(
        np.mean([r["effective_hues"] for r in result["per_class"]])
    )
    json.dumps(result, allow_nan=False)


def test_a_class_without_samples_is_missing_not_zero(data_dir, samples):
    images, labels = samples
    keep = (labels != 8) & (labels != 9) | (torch.arange(500) == 400)  # one sample of class 8, none of 9
    result = shapes_result(data_dir, images[keep], labels[keep])
    eight, nine = result["per_class"][8:]
    assert nine["samples"] == 0 and nine["fd"] is nine["recognised"] is nine["effective_hues"] is None
    assert eight["samples"] == 1 and eight["fd"] is None and eight["recognised"] in (0.0, 1.0)
    assert result["tail"]["samples"] == 51 and result["tail"]["intra_fd"] == result["per_class"][7]["fd"]
    only_head = labels < 4
    result = shapes_result(data_dir, images[only_head], labels[only_head])
    seen = result["tail"]["seen_share"]  # a classifier may see a class that was not asked for
    taken_for = random_classifier(10)(images[only_head] / 127.5 - 1).argmax(1)
    assert seen == pytest.approx((taken_for >= 7).double().mean().item())
    assert result["tail"] == dict.fromkeys(result["tail"]) | {"samples": 0, "seen_share": seen}
    assert "tail" in metrics.format_table(result)


def test_two_samples_of_a_class_are_enough_and_one_is_not(data_dir, samples):
    images, labels = samples
    few = torch.tensor([0, 1, 50, 51, 52, 100])  # two of class 0, three of 1, one of 2
    rows = shapes_result(data_dir, images[few], labels[few], scores="fid,kid")["per_class"]
    assert [row["samples"] for row in rows[:3]] == [2, 3, 1]
    for name in ("fd", "kid"):
        assert rows[0][name] is not None and rows[1][name] is not None and rows[2][name] is None


def test_samples_without_labels(data_dir, samples):
    result = shapes_result(data_dir, samples[0], None)
    labelled = shapes_result(data_dir, *samples)
    for key in ("fd", "inception_score", "kl_to_uniform", "samples"):
        assert result["all"][key] == labelled["all"][key] is not None
    seen = result["head"]["seen_share"]
    assert result["head"] == dict.fromkeys(result["head"]) | {"seen_share": seen}
    assert result["all"]["recognised"] is None
    assert seen == pytest.approx(sum(row["seen"] for row in result["per_class"][:4]) / 500)
    assert [row["seen"] for row in result["per_class"]] == [row["seen"] for row in labelled["per_class"]]
    assert "no labels" in metrics.format_table(result) and "no labels" not in metrics.format_table(labelled)


def test_an_annotator_may_count_instead_of_the_features(data_dir, samples):
    seen = np.repeat(np.arange(10), [32, 4, 2, 2, 2, 2, 2, 2, 1, 1])
    images = samples[0][:50]
    result = metrics.evaluate(images, None, "shapeslt", data_dir, image_size=SIZE, seen=seen)
    r = np.bincount(seen) / 50
    assert result["all"]["kl_to_uniform"] == pytest.approx((r * np.log(10 * r)).sum())
    assert [row["seen"] for row in result["per_class"]] == np.bincount(seen).tolist()
    assert result["tail"]["seen_share"] == pytest.approx(4 / 50) and result["all"]["seen_share"] == 1
    with pytest.raises(ValueError, match="seen"):
        metrics.evaluate(images, None, "shapeslt", data_dir, image_size=SIZE, seen=seen[:-1])


def test_is_does_not_depend_on_the_order_of_the_samples(data_dir, samples, monkeypatch):
    """Class after class, each tenth would hold one class and score 1."""
    _, labels = samples
    images = (labels * 20)[:, None, None, None].expand(-1, 3, SIZE, SIZE).to(torch.uint8)

    def forward(x):
        p = F.one_hot((x[:, 0, 0, 0] // 20).long().clamp(max=9), 10).float()
        return p, p

    stand_in = metrics.FeatureNetwork("stand-in", "FD", "stand-in", forward, None)
    monkeypatch.setattr(metrics, "load_feature_network", lambda *_: stand_in)
    score = shapes_result(data_dir, images, labels, features="stand-in")["all"]["inception_score"]
    assert inception_score(forward(images)[0])[0] == 1 and 8 < score < 10


@pytest.mark.parametrize("change, message", [
    (dict(image_size=16), "samples are 8 x 8 pixels and shapeslt 16 x 16"),
    (dict(labels=torch.full((500,), 10)), "labels go from 10 to 10; shapeslt has the classes 0 to 9"),
    (dict(labels=torch.full((500,), -1)), "labels go from -1 to -1"),
    (dict(features="classifier:nowhere.pt"), "no classifier at nowhere.pt"),
])  # fmt: skip
def test_samples_that_do_not_fit(data_dir, samples, change, message):
    arguments = dict(images=samples[0], labels=samples[1], dataset="shapeslt", data_dir=data_dir,
                     image_size=SIZE)
    with pytest.raises(InputError, match=message):
        metrics.evaluate(**arguments | change)


def test_a_classifier_of_other_classes_is_refused(data_dir, samples):
    write_annotator(data_dir / "other.pt", classes=["cat", "dog"])
    with pytest.raises(InputError, match="other.pt is for .*2 classes.*wanted are 10 classes, disc"):
        shapes_result(data_dir, *samples, features=f"classifier:{data_dir}/other.pt")


# --------------------------------------------------------------------------------------------------
# All scores, pictures
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_evaluate_gives_every_score_asked_for(data_dir, samples):
    images, labels = samples
    keep = (labels != 8) & (labels != 9) | (torch.arange(500) < 405)  # five samples of class 8, none of 9
    keep &= (labels != 5) | (torch.arange(500) < 270)  # 20 of class 5
    images, labels = images[keep], labels[keep]
    images[(labels == 3) | (labels == 4)] //= 2  # darker: KID is not just noise about 0
    result = shapes_result(data_dir, images, labels, scores="all")
    everything = ["fid", "kid", "pr", "dc", "prd", "copies", "colours", "is"]
    assert result["protocol"]["scores"] == everything
    assert "31 pixels" in result["protocol"]["left_out"][0] and "31 pixels" in metrics.format_table(result)
    network = write_annotator(data_dir / "the-same-again.pt")
    real = datasets.load("shapes", data_dir, "reference", SIZE)
    a, b = (network.features(x / 127.5 - 1).numpy() for x in (real.images, images))
    for row, classes in ((result["all"], range(10)), (result["per_class"][3], [3])):
        theirs, mine = a[np.isin(real.labels, classes)], b[np.isin(labels, classes)]
        assert row["kid"] == pytest.approx(metrics.kernel_inception_distance(theirs, mine), rel=1e-2,
                                           abs=1e-5)
        assert row["kid"] > 0.05  # that of a set and itself is below 0
        found = [row[name] for name in ("precision", "recall", "density", "coverage")]
        assert found == pytest.approx(metrics.balls(theirs, mine), abs=0.02)
        clusters = 20 * len(classes)
        assert (row["f8"], row["f1_8"]) == pytest.approx(metrics.prd_f_beta(theirs, mine, clusters), abs=0.05)
    # of the thirds only what classes say
    assert result["tail"]["fd"] > 0 and result["tail"]["recall"] is None
    assert result["per_class"][5]["samples"] == 20 and result["per_class"][5]["f8"] is not None
    eight, nine = result["per_class"][8:]
    assert eight["kid"] is not None and eight["fd"] is not None  # two images are enough
    for name in ("precision", "recall", "density", "coverage", "f8", "f1_8"):
        assert eight[name] is nine[name] is nine["kid"] is None
        classes = [row[name] for row in result["per_class"][:8]]
        assert result["all"][f"intra_{name}"] == pytest.approx(np.mean(classes))
        assert result["all"][f"intra_{name}_std"] == pytest.approx(np.std(classes))
        assert result["tail"][f"intra_{name}"] == classes[7]
    lines = metrics.format_table(result, per_class=True).splitlines()
    for name, heading in (("kid", "KD"), ("precision", "precision"), ("recall", "recall")):
        (cells,) = (line.split() for line in lines if line.startswith(f"{heading} ") and "within" not in line)
        assert cells[1:] == [f"{result['all'][name]:.4g}", "-", "-", "-"]
        (cells,) = (line.split() for line in lines if line.startswith(f"intra-{heading} "))
        assert cells[1] == f"{result['all'][f'intra_{name}']:.4g}"
        (cells,) = (line.split() for line in lines if line.startswith(f"  deviation, intra-{heading} "))
        assert cells[2] == f"{result['all'][f'intra_{name}_std']:.4g}"
    json.dumps(result, allow_nan=False)


def test_scores_not_asked_for_are_not_computed(data_dir, samples, monkeypatch):
    for name in ("balls", "prd_f_beta", "frechet_distance", "inception_score", "neighbour_radii"):
        monkeypatch.setattr(metrics, name, None)
    result = shapes_result(data_dir, *samples, scores=["kid"])
    assert result["all"]["kid"] is not None and result["all"]["fd"] is None and "recall" not in result["all"]
    unlabelled = shapes_result(data_dir, samples[0], None, scores="kid")
    assert unlabelled["all"]["kid"] == result["all"]["kid"] and unlabelled["all"]["intra_kid"] is None
    assert unlabelled["tail"]["kid"] is unlabelled["per_class"][0]["kid"] is None
    with pytest.raises(InputError, match="unknown score 'kidd'; choose from fid, kid"):
        shapes_result(data_dir, *samples, scores="fid,kidd")
    for scores in ("lpips", ["lpips"], ["all", "lpips"]):
        with pytest.raises(InputError, match="31 pixels"):  # asked for by name: not left out silently
            shapes_result(data_dir, *samples, scores=scores)


def test_radii_of_the_reference_are_kept(tmp_path, monkeypatch):
    x = torch.from_numpy(features(60, 6))
    parts = {"all": np.zeros(60, int), "class": np.repeat([0, 1, 2], [30, 26, 4])}
    file = tmp_path / "shapes.npz"
    radii = metrics.reference_radii(x, parts, file)
    table = distances(x.numpy(), x.numpy()) + np.diag([np.inf] * 60)
    assert np.sqrt(radii["all"]) == pytest.approx(np.sort(table, 1)[:, 4])
    assert np.sqrt(radii["class"][30:56]) == pytest.approx(np.sort(table[30:56, 30:56], 1)[:, 4])
    assert np.isnan(radii["class"][56:]).all()  # four images have no fifth neighbours
    calls, compute = [], metrics.neighbour_radii
    monkeypatch.setattr(metrics, "neighbour_radii", lambda *a: calls.append(1) or compute(*a))
    again = metrics.reference_radii(x, parts, file)
    assert not calls and all(np.array_equal(again[name], radii[name], equal_nan=True) for name in parts)
    halves = parts | {"class": np.repeat([0, 1], 30)}
    metrics.reference_radii(x, halves, file)
    assert len(calls) == 3  # other classes: made again
    other = metrics.reference_radii(x * 2, halves, file)
    # other features; squared distances
    assert len(calls) == 6 and np.allclose(other["all"], 4 * radii["all"])


def test_moving_average():
    nan = np.nan
    assert metrics.moving_average([1, 2, 6, 3, 8, 5]) == pytest.approx([3, 3, 4, 24 / 5, 22 / 4, 16 / 3])
    assert metrics.moving_average([nan, 2, nan, nan, nan, nan, nan, 4]) == pytest.approx(
        [2, 2, 2, 2, nan, 4, 4, 4], nan_ok=True)  # fmt: skip


def test_nearest(monkeypatch):
    monkeypatch.setattr(metrics, "TILE", 16)
    real, fake = features(50, 8), features(40, 8, seed=1)
    fake[3] = real[17]
    index, far = metrics.nearest(fake, real)
    table = distances(fake, real)
    assert np.array_equal(index, table.argmin(1)) and far.numpy() == pytest.approx(table.min(1))
    assert index[3] == 17 and far[3] == 0


def test_samples_beside_their_nearest_training_images(data_dir):
    """Samples that are training images: the two of each pair are the same picture."""
    train = datasets.load("shapeslt", data_dir, "train", SIZE)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(1))
    images, labels = train.images[order], train.labels[order]
    rows = shapes_result(data_dir, images, labels, scores="copies")["per_class"]
    picture = metrics.nearest_picture(images, train, rows)
    pixels = np.asarray(picture)[22:, 170:]
    pairs = [pixels[r * 52 : r * 52 + 48, c * 108 : c * 108 + 96] for r in range(10) for c in range(6)]
    same = [np.array_equal(pair[:, :48], pair[:, 48:]) for pair in pairs]
    assert np.mean(same) > 0.95  # two images may share their features
    first, _, distance = rows[9]["nearest"][0]  # the last row is the class with the fewest images
    assert labels[first] == 9 and distance == pytest.approx(0, abs=1e-5)
    shown = pairs[54][4:48:6, 4:48:6]  # 8 pixels drawn as 48
    assert np.array_equal(shown[:8, :8], images[first].permute(1, 2, 0).numpy())


def test_plot(data_dir, samples, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    result = shapes_result(data_dir, *samples)
    result["per_class"][4]["fd"] = None  # a class without samples is a gap
    metrics.plot_classes({"a": result}, tmp_path / "one.png")
    metrics.plot_classes({"a": result, "b": result}, tmp_path / "two.png")
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.width == two.width > 800 and two.height > 1.5 * one.height
    assert len(np.unique(np.asarray(two.convert("RGB")).reshape(-1, 3), axis=0)) > 20  # not a white sheet


def test_plot_without_matplotlib(data_dir, samples, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        metrics.plot_classes({"a": shapes_result(data_dir, *samples)}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


# --------------------------------------------------------------------------------------------------
# Standard errors, floors, copies, colours, comparisons
# --------------------------------------------------------------------------------------------------
def mixture(n, rng, shift=0.0, D=8):
    """n features from four Gaussians of different widths."""
    which = rng.integers(4, size=n)
    centres = np.random.default_rng(1).normal(size=(4, D)) * 1.5
    noise = rng.normal(size=(n, D)) * (0.7 + 0.35 * which[:, None])
    return torch.from_numpy(centres[which] + noise + shift)


def test_the_expected_score_lies_within_two_errors():
    """... of 90 to 98 sets of samples in 100, the number of samples being the same. Of recall and coverage
    the errors come out too large."""
    rng = np.random.default_rng(0)
    real, n, names = mixture(200, rng), 60, ["fid", "kid", "pr", "dc"]

    def scores(fake):
        return metrics.compare(real, fake, names, 20)

    draws = [scores(mixture(n, rng, 0.3)) for _ in range(400)]
    expected = {name: np.mean([draw[name] for draw in draws]) for name in draws[0]}
    inside = dict.fromkeys(expected, 0)
    for _ in range(100):
        fake = mixture(n, rng, 0.3)
        found = metrics.with_errors(lambda group, fake=fake: scores(fake[metrics.kept(n, group)]), n)
        for name in inside:
            inside[name] += abs(found[name] - expected[name]) < 2 * found[f"{name}_error"]
    for name, count in inside.items():
        assert 90 <= count <= (100 if name in ("recall", "coverage") else 98), inside


def test_errors_by_hand():
    """Of a mean the jackknife's error is the one of textbooks, if the groups are single samples."""
    x = np.random.default_rng(0).normal(size=20)
    found = metrics.with_errors(lambda group: {"mean": x[metrics.kept(20, group)].mean()}, 20)
    assert found["mean_error"] == pytest.approx(x.std(ddof=1) / np.sqrt(20)) and found["mean"] == x.mean()
    groups = [set(range(47)) - set(metrics.kept(47, i)) for i in range(20)]
    # Each sample is left out once, and as many each time; 7 are left over.
    assert sorted(i for group in groups for i in group) == [*range(40)] and {*map(len, groups)} == {2}
    x = np.random.default_rng(1).normal(size=47)
    sums = [x[list(group)].sum() for group in groups]  # their variance is that of two samples
    found = metrics.with_errors(lambda group: {"mean": x[metrics.kept(47, group)].mean(), "f8": 1.0}, 47)
    assert found["mean_error"] == pytest.approx(np.sqrt(np.var(sums, ddof=1) / 2 / 47))
    assert found["f8_error"] is None
    assert metrics.with_errors(lambda _: {"a": 1.0}, 1)["a_error"] is None
    few = metrics.with_errors(lambda group: {"a": 1.0} if group is None else {}, 6)  # too few without a group
    assert few == {"a": 1.0, "a_error": None}
    rows = [{"fd": 3.0, "fd_error": 0.3}, {"fd": 5.0, "fd_error": 0.4}, {"fd": None}]
    assert metrics.mean_with_error(rows, "fd") == (4.0, 1.0, pytest.approx(0.25), 2)
    assert metrics.mean_with_error([{"fd": 1.0, "fd_error": None}], "fd") == (1.0, 0.0, None, 1)


def test_errors_floor_and_copies_of_an_evaluation(data_dir, samples):
    """Real images score about their floor, and as few of them are copies as of any real images."""
    images, labels = samples  # of the test split, as the floor's
    result = shapes_result(data_dir, images, labels, errors=True, scores="fid,copies")
    assert result["protocol"]["floor"] == "test" and result["all"]["floor_images"] == 500
    test = datasets.load("shapes", data_dir, "test", SIZE)
    first = torch.cat([(test.labels == k).nonzero().flatten()[:50] for k in range(10)])
    of_the_floor = shapes_result(data_dir, test.images[first], test.labels[first])
    for group in ("all", "tail"):
        assert result[group]["fd_floor"] == pytest.approx(of_the_floor[group]["fd"])
        assert result[group]["intra_fd_floor"] == pytest.approx(of_the_floor[group]["intra_fd"])
        assert 0 < result[group]["fd_error"] < result[group]["fd"]
        errors = [result["per_class"][k]["fd_error"] for k in (range(10) if group == "all" else (7, 8, 9))]
        assert result[group]["intra_fd_error"] == pytest.approx(np.linalg.norm(errors) / len(errors))
    p = result["all"]["recognised"]
    assert result["all"]["recognised_error"] == pytest.approx(np.sqrt(p * (1 - p) / 500), rel=0.5)
    assert 0.01 < result["all"]["copies"] < 0.12 and result["all"]["copies_floor"] == (
        pytest.approx((0.05 * 199 + 1) / 201))  # the test split has 200 of each class
    spread = torch.arange(500).view(10, 50).T.flatten()  # the classes in turn: the same errors
    in_turn = shapes_result(data_dir, images[spread], labels[spread], errors=True)
    assert in_turn["all"]["fd_error"] == pytest.approx(result["all"]["fd_error"], rel=1e-3)
    train = datasets.load("shapeslt", data_dir, "train", SIZE)
    copied = images.clone()
    for k in (8, 9):  # a tail of copies
        mine = train.images[train.labels == k]
        copied[labels == k] = mine.repeat(8, 1, 1, 1)[:50]
    with_copies = shapes_result(data_dir, copied, labels, scores="copies")
    assert [row["copies"] for row in with_copies["per_class"][8:]] == [1, 1]
    assert with_copies["per_class"][0]["copies"] == result["per_class"][0]["copies"]
    unlabelled = shapes_result(data_dir, copied, None, scores="copies")["all"]
    assert unlabelled["copies"] > 0.2


def test_images_that_are_in_training_too_are_not_held_out():
    train = datasets.image_set(np.arange(60, dtype=np.uint8).reshape(5, 2, 2, 3), np.zeros(5, int), ["a"])
    images = train.images[[1, 4]].permute(0, 2, 3, 1).numpy() + np.uint8([[[[0]]], [[[9]]]])
    apart = datasets.image_set(images, np.zeros(2, int), ["a"])
    assert metrics.held_out(apart, train).tolist() == [1]


def test_samples_of_which_one_class_is_missing(data_dir, samples, tmp_path, monkeypatch, capsys):
    """The first class, and all but two samples: rows with fewer numbers than others."""
    images, labels = samples
    flags = ("--dataset", "shapeslt", "--data-dir", data_dir, "--image-size", SIZE, "--scores", "all")
    for rows, name in ((labels > 0, "without-first"), ([60, 450], "two")):
        datasets.save_samples(tmp_path / f"{name}.npz", images[rows], labels=labels[rows])
        command(monkeypatch, tmp_path, f"{name}.npz", *flags)
        with open(tmp_path / f"{name}-per_class.csv") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["samples"] == "0" and len(rows) == 10
    capsys.readouterr()


def test_what_is_compared_with_has_labels_or_the_samples_have_none(data_dir, samples, tmp_path, monkeypatch,
                                                                   capsys):  # fmt: skip
    images, labels = samples
    features = ("--features", f"classifier:{data_dir}/classifier-shapes-{SIZE}.pt")
    datasets.save_samples(tmp_path / "a.npz", images, labels=labels)
    datasets.save_samples(tmp_path / "plain.npz", images)
    datasets.save_samples(tmp_path / "wrong.npz", images, labels=labels + 7)
    command(monkeypatch, tmp_path, "a.npz", "--against", "plain.npz", *features)
    scores = json.loads((tmp_path / "a-metrics.json").read_text())
    assert scores["all"]["fd"] < 1e-6 and scores["all"]["intra_fd"] is None and scores["head"]["fd"] is None
    with pytest.raises(InputError, match="labels go from 7 to 16, but there are the classes 0 to 9"):
        command(monkeypatch, tmp_path, "a.npz", "--against", "wrong.npz", *features)
    capsys.readouterr()


def test_copies_by_hand():
    """On a line: training images at 0 and 100; held-out images 1, 2 ... 40 from the first, one far away."""
    train, apart = (torch.tensor([[x, 0.0] for x in xs]) for xs in ([0, 100], [*range(1, 41), 60]))
    fake = torch.tensor([[0.0, 0], [3, 0], [5, 0], [99, 0]])
    classes = np.array([0] * 40 + [1])
    copied, expected, index, distance = metrics.copies(fake, np.array([0, 0, 0, 1]), train, apart, classes, 2)
    assert expected == pytest.approx([(0.05 * 39 + 1) / 41] * 3 + [(0.05 * 40 + 1) / 42])
    assert copied.tolist() == [True, False, False, True]  # 5 % of 1 .. 40 lie below 2.95; class 1 asks all: 3
    assert index.tolist() == [0, 0, 0, 1] and distance.tolist() == [0, 3, 5, 1]
    copied, *_ = metrics.copies(fake, None, train, apart, classes, 2)
    assert copied.tolist() == [True, True, False, True]


def test_odd_colours():
    """Forty pictures of green on black, in shares from 40 to 60 %, and one of blue on black."""
    shares = np.random.default_rng(0).uniform(0.4, 0.6, size=41)
    images = torch.zeros(41, 3, 8, 8, dtype=torch.uint8)
    for image, share in zip(images, shares, strict=True):
        image[1].view(-1)[: int(64 * share)] = 200
    assert not metrics.odd_colours(images)[13]
    images[13] = images[13].roll(1, 0)  # blue
    assert np.flatnonzero(metrics.odd_colours(images)).tolist() == [13]


@pytest.mark.parametrize("better, words", [(0.0, "smaller than its error"), (0.5, "worse"), (-0.5, "better")])
def test_runs_are_compared_class_by_class(better, words):
    def run(shift, noise):
        return {"per_class": [{"train_images": 100 - k, "fd": 1 + 0.01 * k + shift + noise * (-1) ** k,
                               "fd_error": 0.3, "recall": 0.5 + shift, "recall_error": None}
                              for k in range(9)]
                + [{"train_images": 1, "fd": None, "recall": None}]}  # fmt: skip

    results = {"a": run(0, 0), "b": run(better, 0.02)}
    lines = metrics.compare_runs(results, "fd")
    rows = {line.split()[0]: line for line in lines[2:]}
    assert "lower is better" in lines[0] and "against a" in lines[0] and lines[1] == "b"
    assert words in rows["all"] and {"all", "head", "middle", "tail"} <= set(rows)
    mean = better + 0.02 / 9
    assert f"{mean:+.4g} +- {np.hypot(0.3, 0.3) / 3:.2g}" in rows["all"]
    won = 4 if better == 0 else 9 * (better < 0)
    assert f"{won} of 9" in rows["all"] and f" of {3}" in rows["tail"].replace("of 2", "of 3")
    higher = metrics.compare_runs(results, "recall")
    assert "higher is better" in higher[0] and "+-" not in "".join(higher[2:])


def blurred(images):
    return (scipy.ndimage.gaussian_filter(images.numpy().astype(float), (0, 0, 1, 1))).astype(np.uint8)


def test_each_bad_tail_is_seen_by_more_than_three_errors(data_dir, samples):
    """Copies, five pictures repeated, pictures of other classes, blur: each by the score that is for it."""
    images, labels = samples
    train = datasets.load("shapeslt", data_dir, "train", SIZE)
    copied, collapsed, wrong, blurry = (images.clone() for _ in range(4))
    for k in (7, 8, 9):
        copied[labels == k] = train.images[train.labels == k].repeat(6, 1, 1, 1)[:50]
        collapsed[labels == k] = images[labels == k][torch.arange(50) % 5]
        wrong[labels == k] = images[labels == k - 5]
    blurry[labels >= 7] = torch.from_numpy(blurred(images[labels >= 7]))
    scores = functools.partial(shapes_result, data_dir, labels=labels, errors=True, scores="fid,dc,copies")
    good = scores(images=images)["tail"]
    for bad, score in ((copied, "copies"), (collapsed, "coverage"), (wrong, "fd"), (blurry, "fd")):
        tail, name = scores(images=bad)["tail"], f"intra_{score}"
        error = np.hypot(good[f"{name}_error"], tail[f"{name}_error"])
        assert abs(tail[name] - good[name]) > 3 * error, score


def test_a_page_that_needs_nothing_else(data_dir, samples, tmp_path, monkeypatch, capsys):
    """Two runs, one with a blurred tail, given as a directory of pictures: scores, differences, pictures."""
    images, labels = samples
    bad = images.clone()
    bad[labels >= 7] = torch.from_numpy(blurred(images[labels >= 7]))
    datasets.save_samples(tmp_path / "good.npz", images, labels=labels)
    classes = datasets.load("shapes", "unused", "test", SIZE).classes
    for i, (image, k) in enumerate(zip(bad, labels, strict=True)):
        place = tmp_path / "bad" / classes[k]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:05d}.png")
    flags = ("--dataset", "shapeslt", "--data-dir", data_dir, "--image-size", SIZE, "--report", "page.html")
    command(monkeypatch, tmp_path, "good.npz", "bad", *flags)
    out = capsys.readouterr().out
    assert "worse" in out.split("of each class against good.npz")[1].split("tail")[1].splitlines()[0]
    page = (tmp_path / "page.html").read_text()
    assert page.count("500 samples against 4000 images") == 2 and "crescent" in page
    assert page.count("src='data:image/png;base64,") >= 4 and "http" not in page and "<script" not in page
    assert "of each class against good.npz" in page

    datasets.save_samples(tmp_path / "unlabelled.npz", images)  # an unconditional GAN's
    (tmp_path / "unlabelled").mkdir()  # as a run has samples.npz and samples/
    command(monkeypatch, tmp_path, "unlabelled.npz", *flags)
    page = (tmp_path / "page.html").read_text()
    assert "The samples have no labels" in page and page.count("src='data:image/png;base64,") == 1
    assert (tmp_path / "unlabelled-metrics.json").exists() and not list((tmp_path / "unlabelled").iterdir())

    command(monkeypatch, tmp_path, "good.npz", "--against", "bad", "--features",
            f"classifier:{data_dir}/classifier-shapes-{SIZE}.pt")  # fmt: skip
    assert "500 samples against 500 images (other images" in capsys.readouterr().out
    with pytest.raises(InputError, match="8 x 8 pixels and other images 4 x 4"):
        small = np.zeros((5, 4, 4, 3), np.uint8)
        np.savez(tmp_path / "small.npz", images=small)
        command(monkeypatch, tmp_path, "good.npz", "--against", "small.npz")


# --------------------------------------------------------------------------------------------------
# Reference features on disk
# --------------------------------------------------------------------------------------------------
class Counting:
    """Stands in for a network; counts the images that it is shown."""

    def __init__(self, fingerprint="weights", info=None):
        self.shown = 0
        self.network = metrics.FeatureNetwork("inception", "FD", fingerprint, self.forward, info)

    def forward(self, x):
        self.shown += len(x)
        x = x.float().flatten(1)[:, :5]
        return x, x.softmax(1)


def test_reference_features_are_made_once(tmp_path):
    real = datasets.load("shapes", tmp_path, "test", SIZE)

    def shown(real, key="shapes-test", **network):
        counting = Counting(**network)
        features = metrics.reference_features(real, key, counting.network, tmp_path, "cpu", 300)
        assert np.array_equal(features, real.images.flatten(1)[:, :5].float())
        return counting.shown

    path = tmp_path / "features" / "shapes-test-8-inception.npz"
    again = metrics.PROBES  # of what is kept, so many are looked at again
    assert shown(real) == 2000 and shown(real) == again == 8 and path.exists()
    changed = datasets.ImageSet(real.images.clone(), real.labels, real.classes)
    changed.images[7, 1, 2, 3] += 1
    assert shown(changed) == 2000 and shown(changed) == again  # other images under the same name
    assert shown(changed, fingerprint="other weights") == 2000
    assert shown(real, key="another") == 2000
    path.write_bytes(path.read_bytes()[:-300])
    assert shown(changed, fingerprint="other weights") == 2000  # damaged: made again
    path.write_text("rubbish")
    assert (
        shown(changed, fingerprint="other weights") == 2000
        and shown(changed, fingerprint="other weights") == again
    )
    assert shown(real, fingerprint="a" * 64, info={}) == 2000  # classifiers do not push each other out
    assert (
        shown(real, fingerprint="b" * 64, info={}) == 2000
        and shown(real, fingerprint="a" * 64, info={}) == again
    )


def test_features_of_other_code_are_not_taken(tmp_path, capsys):
    """The same weights and images, but the code between them was edited since."""
    real = datasets.load("shapes", tmp_path, "test", SIZE)

    def found(change):
        def forward(x):
            return [change(x.float().flatten(1)[:, :5])] * 2

        network = metrics.FeatureNetwork("inception", "FID", "weights", forward, None)
        return metrics.reference_features(real, "shapes", network, tmp_path, "cpu", 300)

    plain = found(lambda x: x)
    rounded = found(lambda x: x * (1 + 1e-3))  # as another device may
    assert np.array_equal(rounded, plain) and not capsys.readouterr().out
    edited = found(lambda x: x * 1.1)
    assert np.allclose(edited, 1.1 * plain) and capsys.readouterr().out.count("\n") == 1
    assert found(lambda x: x[:, :3]).shape == (2000, 3) and "holds other features" in capsys.readouterr().out
    assert found(lambda x: x[:, :3]).shape == (2000, 3) and not capsys.readouterr().out


def test_a_data_directory_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "features").write_text("in the way")
    real = datasets.load("shapes", tmp_path, "test", SIZE)
    features = metrics.reference_features(real, "shapes", Counting().network, tmp_path, "cpu", 300)
    assert len(features) == 2000 and "not kept" in capsys.readouterr().out


def test_balanced_and_long_tailed_sets_share_their_reference(tmp_path, samples, monkeypatch):
    write_annotator(tmp_path / f"classifier-shapes-{SIZE}.pt")
    monkeypatch.setattr(metrics, "extract_features", lambda images,
                        *_: [images.flatten(1)[:, :5].double().numpy()] * 2)
    shapes_result(tmp_path, *samples, rho=10)
    metrics.evaluate(*samples, "shapes", tmp_path, image_size=SIZE)
    names = [p.name.split("-classifier")[0] for p in (tmp_path / "features").iterdir()]
    assert sorted(names) == ["shapes-reference-8", "shapes-test-8"]  # the latter for the floor
    shapes_result(tmp_path, *samples, rho=10, reference="train")
    shapes_result(tmp_path, *samples, rho=20, reference="train")
    names = {p.name.split("-classifier")[0] for p in (tmp_path / "features").iterdir()}
    assert names == {"shapes-reference-8", "shapes-test-8", "shapeslt-train-rho10-8",
                     "shapeslt-train-rho20-8"}  # fmt: skip
    assert metrics.reference_key("folder:/my pictures/x", "train", None) == "folder-my-pictures-x-train"


# --------------------------------------------------------------------------------------------------
# Samples files, output, command line
# --------------------------------------------------------------------------------------------------
def test_load_samples(tmp_path):
    images, labels = rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8), np.arange(5, dtype=np.int32)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez(tmp_path / "b.npz", images, labels)
    for name in ("a.npz", "b.npz"):
        found, found_labels = metrics.load_samples(tmp_path / name)
        assert found.shape == (5, 3, 4, 6) and np.array_equal(found.permute(0, 2, 3, 1), images)
        assert found_labels.dtype == torch.int64 and found_labels.tolist() == [0, 1, 2, 3, 4]
    np.savez(tmp_path / "c.npz", images=images)
    assert metrics.load_samples(tmp_path / "c.npz")[1] is None
    np.savez(tmp_path / "d.npz", images=images, predicted=labels + 1, arr_1=labels)
    names = ("labels", "predicted")
    assert metrics.load_samples(tmp_path / "d.npz")[1] is None
    assert metrics.load_samples(tmp_path / "d.npz", names)[1].tolist() == [1, 2, 3, 4, 5]
    np.savez(tmp_path / "e.npz", images=images, predicted=labels + 1, labels=labels)
    assert metrics.load_samples(tmp_path / "e.npz", names)[1].tolist() == [0, 1, 2, 3, 4]
    assert metrics.load_samples(tmp_path / "b.npz", names)[1].tolist() == [0, 1, 2, 3, 4]


GOOD = np.zeros((5, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("content, message", [
    (None, "no samples at"),
    (b"text", "is not a samples file, or damaged"),
    (dict(pictures=GOOD), "has neither images nor arr_0"),
    (dict(images=GOOD.astype(np.float32)), r"images are float32 \(5, 4, 4, 3\)"),
    (dict(images=GOOD.transpose(0, 3, 1, 2)), r"images are uint8 \(5, 3, 4, 4\)"),
    (dict(images=GOOD[0]), r"images are uint8 \(4, 4, 3\)"),
    (dict(images=GOOD[:1]), r"images are uint8 \(1, 4, 4, 3\)"),
    (dict(images=GOOD, labels=np.zeros(4, int)), r"labels are int64 \(4,\), not integers \(5,\)"),
    (dict(images=GOOD, labels=np.zeros(5)), "labels are float64"),
    (dict(images=GOOD, labels=np.array([None] * 5)), "is not a samples file, or damaged"),
])  # fmt: skip
def test_samples_files_that_make_no_sense(tmp_path, content, message):
    path = tmp_path / "s.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(InputError, match=message) as caught:
        metrics.load_samples(path)
    assert str(path) in str(caught.value)


def test_the_table_names_the_distance_for_what_it_is(data_dir, samples):
    result = shapes_result(data_dir, *samples, errors=True)
    for metric in ("FD", "FID", "FID(torchvision)"):
        result["protocol"]["metric"] = metric
        lines = metrics.format_table(result).splitlines()
        protocol = "500 samples against 4000 images (shapeslt, reference split, 8 pixels); features cl"
        assert lines[0].startswith(protocol)
        assert lines[1].split() == ["all", "head", "middle", "tail"]
        rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
        assert list(rows)[:3] == ["samples", metric, "floor,"]
        assert rows["samples"] == ["500", "200", "150", "150"]
        floors = next(line.split() for line in lines if line.startswith(f"  floor, {metric} "))[2:]
        for i, group in enumerate(("all", "head", "middle", "tail")):
            for name, key in ((metric, "fd"), (f"intra-{metric}", "intra_fd")):
                value, between, error = rows[name][3 * i : 3 * i + 3]
                assert float(value) == pytest.approx(result[group][key], rel=1e-3) and between == "+-"
                assert float(error) == pytest.approx(result[group][f"{key}_error"], rel=0.05)
            assert float(floors[i]) == pytest.approx(result[group]["fd_floor"], rel=1e-3)
    lines = metrics.format_table(result, per_class=True).splitlines()
    assert lines[-1].split()[:3] == ["vbars", "10", "50"] and lines[-11].split()[:3] == [
        "train",
        "images",
        "samples",
    ]
    headings, cells = (re.split(r" {2,}", line.strip()) for line in (lines[-11], lines[-1]))
    assert cells[1 + headings.index("seen")] == str(result["per_class"][9]["seen"])  # names have no heading


def command(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments)])
    metrics.main()


def test_command_line(data_dir, samples, monkeypatch, capsys):
    datasets.save_samples(data_dir / "samples.npz", samples[0], labels=samples[1])
    flags = ("--dataset", "shapeslt", "--data-dir", ".", "--image-size", SIZE, "--per-class")
    command(monkeypatch, data_dir, "samples.npz", *flags)
    out = capsys.readouterr().out
    assert "500 samples against 4000 images" in out and "crescent" in out
    result = json.loads((data_dir / "samples-metrics.json").read_text())
    expected = shapes_result(data_dir, *samples)
    assert result["all"]["fd"] == pytest.approx(expected["all"]["fd"], rel=1e-3)
    with open(data_dir / "samples-per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in expected["per_class"]]
    assert float(rows[3]["fd"]) == pytest.approx(result["per_class"][3]["fd"]) and rows[3]["samples"] == "50"

    assert metrics.write_scores(expected, data_dir) == [data_dir / "metrics.json", data_dir / "per_class.csv"]
    assert json.loads((data_dir / "metrics.json").read_text()) == expected


def test_files_of_unequal_numbers_are_cut_to_the_smallest(data_dir, samples, tmp_path, monkeypatch, capsys):
    """50 of each class against 20 of most: scores of the 20 first, not of 50 against 20."""
    images, labels = samples
    few = torch.cat([torch.arange(k * 50, k * 50 + (20 if k else 35)) for k in range(10)])  # 35 of class 0
    datasets.save_samples(tmp_path / "many.npz", images, labels=labels)
    datasets.save_samples(tmp_path / "few.npz", images[few], labels=labels[few])
    flags = ("--dataset", "shapeslt", "--data-dir", data_dir, "--image-size", SIZE)
    command(monkeypatch, tmp_path, "many.npz", "few.npz", *flags)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "unequal" in line)
    assert line == ("unequal numbers of samples (many.npz has 500, few.npz has 215): each is cut to 215, "
                    "the first of each class")  # fmt: skip
    many, less = (json.loads((tmp_path / f"{name}-metrics.json").read_text()) for name in ("many", "few"))
    assert (
        many == less and many["all"]["fd"] == shapes_result(data_dir, images[few], labels[few])["all"]["fd"]
    )
    assert [row["samples"] for row in many["per_class"]] == [35] + [20] * 9
    command(monkeypatch, tmp_path, "few.npz", "few.npz", *flags)
    assert "unequal" not in capsys.readouterr().out

    equal = metrics.equal_numbers
    assert equal({"a": samples, "b": samples})["b"] is samples
    order = torch.arange(500).flip(0)  # equal totals, other classes: the first 20 of each class as they come
    cut = equal({"a": (images[order], labels[order]), "b": (images[few], labels[few])})
    assert torch.equal(cut["a"][1].bincount(), torch.tensor([35] + [20] * 9)) and torch.equal(
        cut["a"][0][0], images[499]
    )
    # Without labels, files that lie class after class keep all of their classes.
    cut = equal({"a": (images, labels), "b": (images[few], None)})
    assert cut["b"][1] is None and torch.equal(cut["b"][0], images[few]) and len(cut["a"][0]) == 215
    assert cut["a"][1].bincount().tolist() == pytest.approx([21.5] * 10, abs=10)
    in_turn = torch.arange(500).view(10, 50).T.flatten()  # nor do those in which the classes take turns
    cut = equal({"a": (images[in_turn], labels[in_turn]), "b": (images[few], None)})
    assert cut["a"][1].bincount().tolist() == pytest.approx([21.5] * 10, abs=10)
    capsys.readouterr()
    with pytest.raises(InputError, match="no two samples of the same classes: a has 50, b has 50"):
        equal({"a": (images[:50], labels[:50]), "b": (images[50:100], labels[50:100])})


def test_save_samples(tmp_path, samples, monkeypatch):
    images, labels = samples[0][:7], samples[1][:7]
    path = tmp_path / "new" / "s.npz"
    datasets.save_samples(path, images, labels=labels, predicted=np.arange(7), certainty=None)
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {"images", "labels", "predicted"}
        assert np.array_equal(file["images"], images.permute(0, 2, 3, 1)) and file["images"].dtype == np.uint8
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        datasets.save_samples(path, images)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def run_settings(data_dir, **more):
    return types.SimpleNamespace(run_dir="runs/x", dataset="shapeslt", data_dir=str(data_dir), features=None,
                                 reference="reference", rho=10, imbalance="exp",
                                 image_size=SIZE, scores="fid,is", **more)


def test_thirds_are_by_training_images(data_dir, samples, monkeypatch):
    """Not by those of the reference, which is balanced."""
    asked, thirds = [], datasets.thirds
    monkeypatch.setattr(datasets, "thirds", lambda counts: asked.append(counts) or thirds(counts))
    shapes_result(data_dir, *samples)
    assert asked[-1].max() > 10 * asked[-1].min()


def test_six_images_have_a_fifth_neighbour():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3))
    assert set(metrics.compare(a, b, ["pr", "dc"], 20)) == {"precision", "recall", "density", "coverage"}
    assert metrics.compare(a[1:], b, ["pr", "dc"], 20) == {}


def test_score_run(data_dir, samples, tmp_path, capsys):
    seen = np.arange(500) % 10
    shares = [{"share": k / 10} for k in range(10)]
    result = metrics.score_run(tmp_path, *samples, run_settings(data_dir), "cpu", seen, {"step": 7},
                               {"kl_all": 0.5}, shares)
    plain = shapes_result(data_dir, *samples, errors=True, rho=10, seen=seen)
    assert result["protocol"] == plain["protocol"] | {"step": 7}
    assert result["all"] == plain["all"] | {"kl_all": 0.5}
    assert result["per_class"] == [row | share for row, share in zip(plain["per_class"], shares, strict=True)]
    assert result["tail"] == plain["tail"] and json.loads((tmp_path / "metrics.json").read_text()) == result
    with open(tmp_path / "per_class.csv", newline="") as file:
        assert [row["share"] for row in csv.DictReader(file)] == [str(k / 10) for k in range(10)]
    out = capsys.readouterr().out
    assert out.startswith(metrics.format_table(result) + "\n") and "per_class.csv" in out.splitlines()[-1]
    alone = metrics.score_run(tmp_path, *samples, run_settings(data_dir), "cpu")
    assert alone == shapes_result(data_dir, *samples, errors=True, rho=10)


def test_a_run_that_cannot_be_scored(data_dir, samples, tmp_path, capsys):
    args = run_settings(data_dir)
    args.features = "classifier:nowhere.pt"
    assert metrics.score_run(tmp_path, *samples, args, "cpu") is None and not list(tmp_path.iterdir())
    said = f"{tmp_path}/samples.npz is written but not scored: no classifier at nowhere.pt. "
    assert capsys.readouterr().out == said + "The same command then resumes from here.\n"


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "shapes"], "required: samples"),
    (["s.npz", "t.npz", "--dataset", "shapes"], "t.npz has images of 2 pixels and s.npz of 4"),
    (["s.npz", "--dataset", "shapes", "--out", "s.npz"], "s.npz: .*File exists"),
    (["s.npz", "--dataset", "shapes", "--batch-size", "0"],
     "--batch-size: '0' is not a whole number from 1 on"),
    (["s.npz", "--dataset", "shapes", "--plot", "recall"], "--plot recall needs --scores pr"),
    (["s.npz", "--dataset", "shopes"], "unknown data set"),
])  # fmt: skip
def test_command_line_errors(tmp_path, arguments, message, monkeypatch):
    np.savez(tmp_path / "s.npz", images=GOOD)
    np.savez(tmp_path / "t.npz", images=GOOD[:, :2, :2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["metrics.py", *arguments])
    with pytest.raises(InputError, match=message):
        metrics.main()
    assert not list(tmp_path.rglob("*.json"))


def test_command_line_errors_are_one_line(run_script, tmp_path):
    done = run_script("metrics.py", "missing.npz", "--dataset", "shapes", cwd=tmp_path)
    assert done.returncode == 2 and "no samples at missing.npz" in done.stderr
    assert done.stderr.startswith("metrics.py: error: ") and done.stderr.count("\n") == 1


def test_lpips_of_a_class_is_that_of_its_samples(tmp_path, monkeypatch, lpips_home):
    """Class 0 repeats one image, class 1 varies: 0 for the first, the mean over its pairs for the second.

    Class 2 has one sample, and so none.
    """
    monkeypatch.setenv("TORCH_HOME", str(lpips_home[0].parent.parent))
    torch.manual_seed(0)
    images, labels = torch.randint(256, (9, 3, 32, 32),
                                   dtype=torch.uint8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    images[:4] = images[0]
    data = datasets.ImageSet(images, labels, ["a", "b", "c"])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: data)

    def forward(x):
        return x.float()[:, 0, 0, :4], x.float()[:, 0, 0].softmax(1)

    network = metrics.FeatureNetwork("stub", "FD", "0", forward, None)
    monkeypatch.setattr(metrics, "load_feature_network", lambda *_: network)
    result = metrics.evaluate(images, labels, "folder:x", tmp_path, "stub", scores=["all"])
    _, alexnet, heads = lpips_home
    pairs = {(i, j): lpips_of_a_pair(images[i], images[j], alexnet,
                                     heads) for i in range(9) for j in range(i)}
    first, second, third = (row["lpips"] for row in result["per_class"])
    assert first == pytest.approx(0, abs=1e-9)
    assert second == pytest.approx(np.mean([x for pair,
                                            x in pairs.items() if min(pair) > 3 and max(pair) < 8]), rel=1e-4)
    assert result["all"]["lpips"] == pytest.approx(np.mean([*pairs.values()]), rel=1e-4)
    assert third is None and result["all"]["intra_lpips"] == pytest.approx(second / 2)
    (why,) = result["protocol"]["left_out"]
    assert why.startswith("copies needs")  # here every split is the same


@pytest.mark.parametrize("K", [1, 2])
def test_few_classes_and_few_images_are_scored(tmp_path, monkeypatch, K):
    """--scores all where the tail has no class, and prd with it; a class of four images has no neighbours'
    scores."""
    torch.manual_seed(0)
    images, labels = torch.randint(256, (30 * K, 3, 8, 8), dtype=torch.uint8), torch.arange(K).repeat(30)
    keep = (labels < K - 1) | (torch.arange(len(labels)) < 4 * K) if K > 1 else labels == labels
    data = datasets.ImageSet(images[keep], labels[keep], [f"c{k}" for k in range(K)])
    monkeypatch.setattr(datasets, "load", lambda *_, **__: data)

    def forward(x):
        return x.float().flatten(1)[:, :6], x[:, 0, 0].float().softmax(1)

    network = metrics.FeatureNetwork("stub", "FD", "0", forward, None)
    monkeypatch.setattr(metrics, "load_feature_network", lambda *_: network)
    scores = "all" if K == 1 else ["all"]  # but LPIPS, which needs 31 pixels
    result = metrics.evaluate(images, labels, "folder:x", tmp_path, "stub", scores=scores, errors=False)
    assert result["protocol"]["scores"] == ["fid", "kid", "pr", "dc", "prd", "colours", "is"]
    assert "31 pixels" in result["protocol"]["left_out"][0]
    assert result["all"]["f8"] is not None if K == 1 else result["tail"]["samples"] is None
    assert result["all"]["intra_precision_classes"] == (1 if K == 1 else K - 1)
    if K > 1:
        assert result["per_class"][-1]["precision"] is None and result["per_class"][-1]["fd"] > 0
        assert "precision within classes: 1 of 2 classes" in metrics.format_table(result, True)
