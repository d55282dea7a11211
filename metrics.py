"""Scores of images: FID, KID, precision, recall, density, coverage, F_8, IS, LPIPS: of all, by class.

    python metrics.py runs/.../samples.npz --dataset cifar100lt               # samples of any codebase
    python metrics.py samples.npz --dataset cifar100lt --scores all --per-class
    python metrics.py A/samples.npz B/samples.npz --dataset cifar100lt --plot --nearest       # pictures
    python metrics.py samples.npz --dataset cifar100lt --features inception-fid --per-class
    python metrics.py samples.npz --dataset cifar100lt --features classifier:runs/.../classifier.pt

A samples file holds `images` (N, H, W, 3) uint8 and `labels` (N,), or `arr_0` and `arr_1`. Each score is
a pure function of features, to be read and used alone; `evaluate` calls them all. The first line printed
is the protocol: features, reference, number of images on both sides. Two numbers compare only where that
line is the same.

Features, and what a Fréchet distance in them is called
    inception-fid    FID. The Inception that TensorFlow published in 2015. The FIDs of papers are made with
                     it (Heusel et al. 2017; CBDM, CBGAN, Softlabel-GAN): the number to put beside theirs.
    inception        FID(torchvision). torchvision's Inception-v3: the same architecture, other weights, so
                     other numbers, which compare with each other alone.
    classifier:PATH  FD. The 64 features of a ResNet-32 of classifier.py: no download, made for small
                     images. It also says which class a sample shows. The default for the shapes data.

The protocols of the papers
    CBDM             50,000 samples, equally many of each class, against the balanced training set
                     (--reference reference)
    CBGAN            50,000 samples against the 10,000 test images (--reference test); a classifier trained
                     on balanced data counts the classes
    Softlabel-GAN    against the test images (--reference reference: the test set for cifar*imb)
A Fréchet distance falls as images are added on either side (by about 1/n): compare equal numbers only.
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import functools
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import re
import typing
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.special
import torch
import torch.nn.functional as F
from tqdm import tqdm

import datasets
from classifier import frozen_classifier, load_classifier
from datasets import InputError, at_least, atomic_write, fail, pick_device, run_command, warn

# --------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------
# M. Seitzer's port of TensorFlow's graph of 2015-12-05 to PyTorch (pytorch-fid).
FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")  # fmt: skip
FID_OUTPUTS = 1008  # of the 2015 network: ImageNet's 1000 classes and 8 that were never used
INCEPTION_SIZE = 299  # pixels a side


class FeatureNetwork(typing.NamedTuple):
    name: str  # as given to load_feature_network
    metric: str  # what a Fréchet distance in these features is called
    fingerprint: str  # tells these weights from others
    forward: typing.Callable  # (B, 3, H, W) uint8 on the device -> features (B, D), probabilities (B, C)
    info: dict | None  # of a classifier: its classes, test accuracy ...; None for an Inception


def load_feature_network(name, device="cpu", classes=None, image_size=None):
    """The FeatureNetwork called "inception", "inception-fid" or "classifier:PATH".

    classes, image_size: what it will see; a classifier for anything else is refused. Raises InputError.
    """
    if name == "inception-fid":
        forward = functools.partial(inception_forward, load_fid_inception(device))
        return FeatureNetwork(name, "FID", name, forward, None)
    if name == "inception":
        forward = functools.partial(inception_forward, load_inception(device))
        return FeatureNetwork(name, "FID(torchvision)", name, forward, None)
    if name.startswith("classifier:"):
        path = Path(name.removeprefix("classifier:"))
        network = load_classifier(path, device, classes, image_size)
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        forward = functools.partial(classifier_forward, network)
        return FeatureNetwork(name, "FD", fingerprint, forward, network.info)
    raise InputError(f"unknown features {name!r}; choose from inception, inception-fid, classifier:PATH")


def classifier_forward(network, images):
    """(B, 3, H, W) uint8 -> pooled features (B, 64), class probabilities (B, K)."""
    features = network.features(images / 127.5 - 1)
    return features, network.head(features).softmax(1)


def to_inception(images):
    """(B, 3, H, W) uint8 -> (B, 3, 299, 299) in [-1, 1], resized as pytorch-fid does (no antialiasing)."""
    x = F.interpolate(images / 255, (INCEPTION_SIZE, INCEPTION_SIZE), mode="bilinear", align_corners=False)
    return 2 * x - 1


def inception_forward(network, images):
    """(B, 3, H, W) uint8 -> pooled features (B, 2048), ImageNet probabilities (B, 1000 or 1008)."""
    features = network(to_inception(images))
    return features, network.output(features).softmax(1)


def load_inception(device="cpu"):
    """torchvision's Inception-v3: (B, 3, 299, 299) in [-1, 1] -> (B, 2048); its last layer is `.output`."""
    from torchvision.models import Inception_V3_Weights  # here: torchvision takes a second to import

    return build_inception(Inception_V3_Weights.IMAGENET1K_V1.url, 1000).to(device, **datasets.layout(device))


def load_fid_inception(device="cpu"):
    """The network of published FIDs, shapes as in `load_inception`.

    The graph that its weights come from differs from torchvision's network in three ways.
    - The 3x3 average pools of the A blocks (5b-d), the C blocks (6b-e) and the first E block (7b) average
      over the pixels inside the image only; torchvision's also count the zeros of the padding.
    - The second E block (7c) takes the maximum; torchvision's takes the average.
    - The last layer adds no bias: so the IS of papers is computed.
    """
    network = build_inception(FID_WEIGHTS, FID_OUTPUTS)
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        pool_branch(getattr(network, f"Mixed_{name}"), average)
    pool_branch(network.Mixed_7c, maximum)
    network.output.bias = None
    # channels_last: 77 to 90 ms an image on two CPU threads, 125 to 149 without.
    return network.to(device, **datasets.layout(device))


def pool_branch(block, pool):
    """Make an Inception block apply `pool` instead of the average pool that it has before `branch_pool`."""
    block.register_forward_pre_hook(lambda block, inputs: setattr(block, "pooled", pool(inputs[0])))
    # What the second hook returns replaces the branch's input. It pops: the maps of 100 images are 800 MB.
    block.branch_pool.register_forward_pre_hook(lambda branch, inputs: (block.__dict__.pop("pooled"),))


def build_inception(url, num_classes):
    """A frozen Inception-v3 with the weights of `url`; no auxiliary head, the last layer set apart."""
    from torchvision.models import inception_v3

    weights = fetch_weights(url)
    with torch.random.fork_rng(devices=[]):  # building it draws weights; the caller's random state stays
        network = inception_v3(num_classes=num_classes, aux_logits=False, init_weights=False)
    try:
        network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("AuxLogits.")})
    except (AttributeError, RuntimeError) as error:
        raise InputError(f"{weights_path(url)} does not hold the weights of {url}; delete it") from error
    network.output, network.fc = network.fc, torch.nn.Identity()
    return network.eval().requires_grad_(False)


def weights_path(url):
    """Where torch.hub keeps what it downloads from `url`; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def fetch_weights(url, instead="take --features classifier:PATH"):
    """The state dict at `url`, from torch.hub's cache if possible. Raises InputError: what to put where."""
    path = weights_path(url)
    cached = path.exists()
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # urllib's, a wrong hash, or torch.load's of a damaged file
        if cached:
            raise InputError(f"{path} is damaged ({type(error).__name__}); put a good copy there") from error
        message = f"cannot download {url} ({error}); copy that file to {path}, or {instead}"
        raise InputError(message) from error


@torch.no_grad()
def extract_features(images, network, device="cpu", batch_size=100):
    """images (N, 3, H, W) uint8 -> features (N, D), class probabilities (N, C); float32 NumPy arrays.

    network: a FeatureNetwork on the same device.
    """
    shared_out = datasets.together() and len(images) >= datasets.WORLD
    if shared_out:
        images = images[datasets.my_part(len(images))]
    features = probabilities = None
    bar = tqdm(range(0, len(images), batch_size), "features", leave=False, dynamic_ncols=True,
               **datasets.SILENT)
    for start in bar:
        batch = slice(start, start + batch_size)
        outputs = [x.float().cpu().numpy() for x in network.forward(images[batch].contiguous().to(device))]
        if features is None:  # whole arrays at once: a list of parts would need twice the memory in the end
            features, probabilities = (np.empty((len(images), x.shape[1]), np.float32) for x in outputs)
        features[batch], probabilities[batch] = outputs
    if not shared_out:
        return features, probabilities
    return tuple(datasets.collect(torch.from_numpy(x)).numpy() for x in (features, probabilities))


# --------------------------------------------------------------------------------------------------
# Fréchet distance
# --------------------------------------------------------------------------------------------------
# Between Gaussians with the means mu (D,) and covariances S (D, D) of two sets of features (Dowson &
# Landau 1982). As a score of images it is FID (Heusel et al. 2017, who call the square the distance,
# as everybody has since).
#
#     d^2 = |mu1 - mu2|^2 + Tr(S1) + Tr(S2) - 2 Tr((S1 S2)^(1/2))
#
# The last trace is all of the cost. The usual code takes the square root of the matrix S1 S2, which is
# not symmetric (scipy.linalg.sqrtm). But the trace needs only the eigenvalues of S1 S2: it is the sum of
# their square roots. With any factor S1 = L L^T they are, but for zeros, the eigenvalues of L^T S2 L,
# which is symmetric and so much cheaper:
#
#     both n > D     L = Cholesky factor of S1, which LAPACK takes for the eigenvalues of S2 S1
#     one n <= D     L = A^T, where A (n, D) = centred features / sqrt(n - 1): S1 = A^T A, and
#                    L^T S2 L is only n x n
#     both n <= D    S2 = B^T B too: L^T S2 L = (A B^T)(A B^T)^T, so the square roots are the singular
#                    values of A B^T (n x m), whose sum is its nuclear norm. No D x D matrix at all:
#                    intra-FID in seconds.
#
# On two cores with D = 2,048: two sets of 10,000 in 1.9 s (sqrtm: 20.6 s), one class of 50 + 50 in
# 1.7 ms (13.3 s).
def frechet_distance(real, fake, real_moments=None):
    """d^2 of two sets of features, (N, D) and (M, D), N and M at least 2; never below 0, 0 for equal sets.

    real_moments: `moments` of the real features, if they are known.
    """
    real, fake = (x.cpu().numpy() for x in as_pair(real, fake))
    few, many = sorted((real, fake), key=len)
    D = real.shape[1]

    def moments_of(x):
        return real_moments if real_moments and x is real else moments(x)

    if len(few) > D:
        return frechet_distance_from_moments(*moments_of(real), *moments(fake))
    mu1, A = centred(few)
    if len(many) > D:
        mu2, S2 = moments_of(many)
        trace2, cross = np.trace(S2), sum_of_roots(np.linalg.eigvalsh(A @ S2 @ A.T))
    else:
        mu2, B = centred(many)
        trace2, cross = (B * B).sum(), np.linalg.svd(A @ B.T, compute_uv=False).sum()
    return assemble(mu1, (A * A).sum(), mu2, trace2, cross)


def frechet_distance_from_moments(mu1, cov1, mu2, cov2):
    """d^2 from means (D,) and covariances (D, D)."""
    mu1, S1, mu2, S2 = (np.asarray(x, dtype=np.float64) for x in (mu1, cov1, mu2, cov2))
    D = mu1.size
    if not (mu1.shape == mu2.shape == (D,) and S1.shape == S2.shape == (D, D)):
        raise ValueError(f"means {mu1.shape}, {mu2.shape} and covariances {S1.shape}, {S2.shape}: "
                         "want (D,) and (D, D)")
    if not all(np.isfinite(x).all() for x in (mu1, S1, mu2, S2)):
        raise ValueError("a mean or a covariance has entries that are NaN or infinite")
    try:  # type=2: S2 S1 v = lambda v
        eigenvalues = scipy.linalg.eigh(S2, S1, type=2, eigvals_only=True, driver="gv", check_finite=False)
    except np.linalg.LinAlgError:  # S1 is singular: duplicates, a feature that is always 0
        squares, vectors = np.linalg.eigh(S1)
        L = vectors * np.sqrt(squares.clip(0))
        eigenvalues = np.linalg.eigvalsh(L.T @ S2 @ L)
    return assemble(mu1, np.trace(S1), mu2, np.trace(S2), sum_of_roots(eigenvalues))


def sum_of_roots(eigenvalues):
    return np.sqrt(eigenvalues.clip(0)).sum()  # clip: rounding makes -1e-17 of a zero


def assemble(mu1, trace1, mu2, trace2, cross):
    return float(max(0.0, ((mu1 - mu2) ** 2).sum() + trace1 + trace2 - 2 * cross))  # rounding again


def as_pair(real, fake):
    """Both as tensors on one device; ValueError unless they are finite, (N, D) and (M, D), N, M >= 2."""
    real, fake = check_features(real, "real"), check_features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}")
    return real, fake.to(real.device)


def check_features(features, name):
    """A tensor of the array or tensor, where it is; raises ValueError unless it is (N >= 2, D) and finite."""
    if not isinstance(features, torch.Tensor):
        features = torch.from_numpy(np.array(features, order="C", copy=None))
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} has shape {tuple(features.shape)}; wanted is (N, D) with N of at least 2")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name} has entries that are NaN or infinite")
    return features.detach()


def centred(features):
    """Mean (D,), and A (N, D) with A^T A the unbiased covariance; float64."""
    mean = features.mean(0, dtype=np.float64)
    return mean, (features - mean) / math.sqrt(len(features) - 1)


def moments(features, rows=2000):
    """Mean (D,) and unbiased covariance (D, D), float64; in chunks: 50,000 x 2,048 in float64 is 800 MB."""
    mean = features.mean(0, dtype=np.float64)
    covariance = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), rows):
        A = features[start : start + rows] - mean
        covariance += A.T @ A  # NumPy sees the symmetry and does half of the work
    return mean, covariance / (len(features) - 1)


def intra_fid(real, real_labels, fake, fake_labels, num_classes=None):
    """d^2 within each class: mean and standard deviation over the classes, and the d^2 of each, (K,)."""
    return intra_class(frechet_distance, real, real_labels, fake, fake_labels, num_classes)


def intra_class(score, real, real_labels, fake, fake_labels, num_classes=None, least=2):
    """score(real, fake) within each class: mean and deviation over the classes, and the score of each.

        intra_class(kernel_inception_distance, ...)
        intra_class(precision_recall, ..., least=6)
        intra_class(functools.partial(prd_f_beta, clusters=20), ..., least=20)

    num_classes   K; None: the highest label + 1
    least         images that a class must have on either side, else it is nan and left out of the mean: 2 for
                  distances, k + 1 where neighbours are counted, 20 for F_8
    returns       mean, deviation, scores (K,); arrays, the last (K, numbers), for a score of several numbers

    With few images a class most scores have a large bias: compare equal numbers only.
    """
    real, fake = as_pair(real, fake)
    real_labels = check_labels(real_labels, real, "real")
    fake_labels = check_labels(fake_labels, fake, "fake")
    scores = []
    for k in range(num_classes or 1 + max(real_labels.max(), fake_labels.max())):
        a, b = (x[torch.from_numpy(y == k)] for x, y in ((real, real_labels), (fake, fake_labels)))
        scores.append(score(a, b) if min(len(a), len(b)) >= least else None)
    there = [x for x in scores if x is not None]
    missing = np.full_like(there[0], math.nan) if there else math.nan
    per_class = np.array([missing if x is None else x for x in scores], np.float64)
    if not there:
        return math.nan, math.nan, per_class
    return np.mean(there, 0), np.std(there, 0), per_class


def check_labels(labels, features, name):
    """(N,) integer array; raises ValueError for anything else."""
    labels = np.asarray(labels)
    if labels.shape != (len(features),) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{name}: wanted are {len(features)} class indices, got {found}")
    return labels


# --------------------------------------------------------------------------------------------------
# Kernel distance, precision and recall
# --------------------------------------------------------------------------------------------------
# These compare every image with every other. A tile of the N x M table is computed at a time, in float64:
# all of 50,000 x 50,000 would be 20 GB; a tile and what is made of it is 0.2 GB. Tensors stay where they
# are (a GPU).
TILE = 2048  # rows and columns; 34 MB


def tiles(rows, columns):
    """Pairs of slices (i, j) that cover a table of rows x columns, with a progress bar if there are many."""
    starts = itertools.product(range(0, rows, TILE), range(0, columns, TILE))
    pairs = [(slice(i, i + TILE), slice(j, j + TILE)) for i, j in starts]
    return tqdm(pairs, "pairs", leave=False, dynamic_ncols=True) if len(pairs) > 30 else pairs


def kernel_inception_distance(real, fake):
    """KID (Binkowski et al. 2018): the unbiased estimate of MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    real (N, D), fake (M, D). Over all pairs: papers print the mean over 100 random subsets of 1,000, which
    estimates the same number with more noise. Unlike FID's, its expectation does not depend on N and M. It
    may come out below 0.
    """
    real, fake = as_pair(real, fake)
    return kernel_mean(real, real) + kernel_mean(fake, fake) - 2 * kernel_mean(real, fake)


def kernel_mean(a, b):
    """Mean of k(a_i, b_j) over all i and j; where b is a, over i != j."""
    total, same = 0.0, a is b
    for i, j in tiles(len(a), len(b)):
        if same and i.start > j.start:  # the table is symmetric: twice the half above the diagonal
            continue
        k = (a[i].double() @ b[j].double().T).div_(a.shape[1]).add_(1).pow_(3)
        total += k.sum().item() * (2 if same and i.start < j.start else 1)
        if same and i.start == j.start:
            total -= k.diagonal().sum().item()
    return total / (len(a) * (len(b) - same))


# Around each image lies a ball that reaches to its k-th nearest neighbour in its own set. The image itself
# does not count; a duplicate is a neighbour at distance 0. With the balls of the real images r and of the
# fake ones f:
#
#     precision   share of fake images inside some real ball       is what it makes real?
#     recall      share of real images inside some fake ball       is all that is real made?
#     density     number of real balls that a fake image lies in, over k, on average; may exceed 1
#     coverage    share of real balls with a fake image inside
#
# Precision and recall: Kynkaanniemi et al. 2019; density and coverage: Naeem et al. 2020. "Inside" is
# strictly nearer than the radius (prdc, which CBDM and Softlabel-GAN use). All four count comparisons, and
# where two sets share images, distance and radius are often the same number. Rounding must not put what
# lies on the edge of a ball inside. So a distance counts as smaller if it is so by more than the rounding
# of |x|^2 + |y|^2 - 2 x.y can be: some 1e-11 of the largest |x|^2, with 2,048 features.
def squared_distances(a, b, centre):
    """|a_i - b_j|^2 of (n, D), (m, D): float64 (n, m). Near `centre` (D,) rounding is small."""
    a, b = a.double() - centre, b.double() - centre
    return torch.addmm((a * a).sum(1)[:, None] + (b * b).sum(1), a, b.T, alpha=-2)


def centre_and_slack(*sets):
    """A centre for `squared_distances`, and how much two of them that are equal may differ by rounding."""
    centre = sets[0][:: 1 + len(sets[0]) // TILE].double().mean(0)
    parts = (x.double() - centre for features in sets for x in features.split(TILE))
    largest = max((x * x).sum(1).max() for x in parts)
    return centre, 16 * len(centre) * torch.finfo(torch.float64).eps * largest  # 16 D: at worst it is 4 D


def neighbour_radii(features, k=5):
    """(N, D) -> (N,) float64: squared distance of each image to the k-th nearest of the others, N > k."""
    features = check_features(features, "features")
    if len(features) <= k:
        raise ValueError(f"{len(features)} images have no {k}-th neighbours")
    centre, slack = centre_and_slack(features)
    near = torch.full((len(features), k), math.inf, dtype=torch.float64, device=features.device)
    for i, j in tiles(len(features), len(features)):
        if i.start > j.start:  # the table is symmetric
            continue
        squares = squared_distances(features[i], features[j], centre)
        if i.start == j.start:
            squares.fill_diagonal_(math.inf)
        for rows, table in ((i, squares), (j, squares.T))[: 1 + (i.start < j.start)]:
            found = table.topk(min(k, table.shape[1]), largest=False).values
            near[rows] = torch.cat([near[rows], found], 1).topk(k, largest=False).values
    radii = near.amax(1)
    return radii.where(radii > slack, 0)


def balls(real, fake, k=5, real_radii=None):
    """precision, recall, density, coverage of (N, D), (M, D), N and M more than k: one pass over all pairs.

    real_radii: `neighbour_radii` of the real images, if they are known.
    """
    real, fake = as_pair(real, fake)
    centre, slack = centre_and_slack(real, fake)
    known = neighbour_radii(real, k) if real_radii is None else torch.as_tensor(real_radii).to(real.device)
    r, f = known - slack, neighbour_radii(fake, k) - slack
    around_fake = torch.zeros(len(fake), dtype=torch.int64, device=real.device)  # real balls that one lies in
    covered, recalled = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for i, j in tiles(len(real), len(fake)):
        squares = squared_distances(real[i], fake[j], centre)
        inside = squares < r[i, None]
        around_fake[j] += inside.sum(0)
        covered[i] |= inside.any(1)
        recalled[i] |= (squares < f[None, j]).any(1)
    counts = around_fake > 0, recalled, around_fake, covered
    precision, recall, number, coverage = (x.double().mean().item() for x in counts)
    return precision, recall, number / k, coverage


def precision_recall(real, fake, k=5):
    """Improved precision and recall (Kynkaanniemi et al. 2019), each in [0, 1]; see above.

    k = 5 as in CBDM's code; the paper that defines them has 3. Both sets need more than k images (else
    ValueError). More images make smaller balls: compare equal numbers only. Exchanging the sets exchanges the
    two numbers.
    """
    return balls(real, fake, k)[:2]


def density_coverage(real, fake, k=5):
    """Density (Naeem et al. 2020), 0 or more, about 1 for equal sets, and coverage, in [0, 1]; see above."""
    return balls(real, fake, k)[2:]


# --------------------------------------------------------------------------------------------------
# Precision and recall of distributions
# --------------------------------------------------------------------------------------------------
# Sajjadi et al. 2018. Both sets are cut into the same clusters; p and q are the shares of the real and of
# the fake images in each. For every slope lambda in (0, inf), how much of q can be told to be p's, and the
# reverse:
#
#     precision(lambda) = sum_c min(lambda p_c, q_c),     recall(lambda) = precision(lambda) / lambda
#     F_beta = (1 + beta^2) precision recall / (beta^2 precision + recall), the largest on the curve
ANGLES = 1001  # lambda = tan(angle), equally spaced in (0, pi / 2); the authors' code
CLUSTERINGS = 10  # over which the curve is averaged; the authors' code, CBDM


def prd_f_beta(real, fake, clusters, beta=8, clusterings=CLUSTERINGS, seed=0):
    """F_beta and F_(1/beta) of two sets of features (N, D), (M, D): two numbers in [0, 1].

    The first, F_8, leans to recall: it sees modes that are missing. The second, F_1/8, leans to precision:
    it sees images that are like nothing real. (CBDM's code prints them under exchanged names.)

    clusters      20 for each class in CBDM
    clusterings   over which the curve is averaged. Each has its own random start, and takes as many images
                  from the larger set as the smaller has: else the clusters would go where the larger one is
    raises        ValueError if a set has fewer images than there are clusters
    """
    real, fake = as_pair(real, fake)
    n = min(len(real), len(fake))
    if n < clusters:
        raise ValueError(f"{clusters} clusters of {n} images")
    curves = []
    for run in range(clusterings):
        rng = np.random.default_rng([seed, run])
        both = torch.cat([x if len(x) == n else x[torch.from_numpy(rng.permutation(len(x))[:n])]
                          for x in (real, fake)])  # fmt: skip
        parts = k_means(both, clusters, rng).split(n)
        p, q = (torch.bincount(part, minlength=clusters).double().cpu().numpy() / n for part in parts)
        curves.append(prd_curve(p, q))
    precision, recall = np.mean(curves, 0)
    return f_beta(precision, recall, beta), f_beta(precision, recall, 1 / beta)


def prd_curve(p, q):
    """precision (1001,), recall (1001,) of the histograms p (real) and q (fake), each with the sum 1."""
    slope = np.tan(np.linspace(1e-6, np.pi / 2 - 1e-6, ANGLES))
    precision = np.minimum(slope[:, None] * p, q).sum(1)
    return precision.clip(0, 1), (precision / slope).clip(0, 1)


def f_beta(precision, recall, beta):
    """The largest F_beta on a curve; 0 where precision and recall are both 0."""
    weighted = beta**2 * precision + recall
    return float(((1 + beta**2) * precision * recall / np.where(weighted > 0, weighted, 1)).max())


def k_means(x, clusters, rng, passes=2):
    """Mini-batch k-means (Sculley 2010): the cluster of each row of x (N, D), (N,) int64.

    A centre is the mean of all rows that it was ever the nearest to, batch after batch. float32: which of
    two equally near clusters a row falls into matters as little as the random start.
    CHOICE: it starts from random rows and takes two passes. scikit-learn's, which papers use, chooses the
    start with more care (k-means++) and takes the best of ten; here the average over clusterings does that.
    """
    x = x.float()
    x = x - x.mean(0)
    centres = x[torch.from_numpy(rng.permutation(len(x))[:clusters])].clone()
    seen = torch.zeros(clusters, device=x.device)

    def closest(rows):  # |x|^2 is the same for every centre
        return torch.addmm((centres * centres).sum(1), rows, centres.T, alpha=-2).argmin(1)

    for _ in range(passes):
        for batch in torch.from_numpy(rng.permutation(len(x))).split(max(1000, clusters)):
            rows = x[batch]
            nearest = closest(rows)
            new = torch.bincount(nearest, minlength=clusters)
            seen += new
            step = torch.zeros_like(centres).index_add_(0, nearest, rows) - new[:, None] * centres
            centres += step / seen.clamp(min=1)[:, None]
    return torch.cat([closest(rows) for rows in x.split(TILE)])


# --------------------------------------------------------------------------------------------------
# LPIPS
# --------------------------------------------------------------------------------------------------
# Zhang et al. 2018: how different two images look. AlexNet's five layers, each position's channels scaled
# to length 1;
#
#     d(x, y) = sum_layers mean_positions sum_channels w_c (f_c(x) - f_c(y))^2
#
# with weights w learnt from people's judgements. The score of a set is its mean over all pairs of images.
# d is a squared distance of vectors, and the mean of those over all pairs is twice the unbiased variance,
# summed over the entries. So no pair is ever formed: n images cost n passes through AlexNet.
LPIPS_WEIGHTS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth"
LPIPS_SHIFT = -0.030, -0.088, -0.188  # of images in [-1, 1]; the published code's `ScalingLayer`
LPIPS_SCALE = 0.458, 0.448, 0.450
LPIPS_SMALLEST = 31  # pixels a side; below, AlexNet's second pooling has nothing left to pool


class Lpips(typing.NamedTuple):
    layers: torch.nn.Sequential  # AlexNet up to its fifth ReLU
    weights: list  # of the five layers, (C, 1, 1)


def load_lpips(device="cpu"):
    """AlexNet with torchvision's weights, and LPIPS's own (version 0.1). Raises InputError."""
    from torchvision.models import AlexNet_Weights, alexnet

    url = AlexNet_Weights.IMAGENET1K_V1.url
    instead = "leave lpips out of --scores"
    body, heads = fetch_weights(url, instead), fetch_weights(LPIPS_WEIGHTS, instead)
    with torch.device("meta"):  # no random numbers, and no memory for its last layers: 230 MB, not used
        layers = alexnet().features[:-1]
    widths = [layer.out_channels for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    try:
        body = {name.removeprefix("features."): w for name, w in body.items() if name.startswith("features.")}
        layers.load_state_dict(body, assign=True)
    except (AttributeError, RuntimeError) as error:
        raise InputError(f"{weights_path(url)} does not hold the weights of {url}; delete it") from error
    try:
        weights = [heads[f"lin{i}.model.1.weight"].view(width, 1, 1) for i, width in enumerate(widths)]
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        path = weights_path(LPIPS_WEIGHTS)
        raise InputError(f"{path} does not hold the weights of LPIPS; delete it") from error
    sums_on = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
    return Lpips(layers.to(device).eval().requires_grad_(False), [w.to(sums_on).double() for w in weights])


def lpips_features(images, network):
    """(B, 3, H, W) uint8 on the network's device -> five (B, C, H', W'); each position has length 1."""
    shift, scale = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (LPIPS_SHIFT, LPIPS_SCALE))
    x, features = (images / 127.5 - 1 - shift) / scale, []
    for layer in network.layers:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            features.append(x / ((x * x).sum(1, keepdim=True).sqrt() + 1e-10))  # as in the published code
    return features


@torch.no_grad()
def lpips_sums(images, network, device="cpu", batch_size=100):
    """Of each group of images, see `group_of`: their number, sum, sum of squares of each layer's entries."""
    sums_on = network.weights[0].device
    groups = []
    of = group_of(len(images))
    for g in np.unique(of):
        n = 0
        total, squares = [0.0] * 5, [0.0] * 5
        for batch in torch.as_tensor(images)[torch.from_numpy(of == g)].split(batch_size):
            features = [f.to(sums_on).double() for f in lpips_features(batch.to(device), network)]
            n += len(batch)
            total = [t + f.sum(0) for t, f in zip(total, features, strict=True)]
            squares = [s + (f * f).sum(0) for s, f in zip(squares, features, strict=True)]
        groups.append((n, total, squares))
    return groups


def lpips_of(groups, network):
    """Mean LPIPS over all pairs of the images whose sums these are."""
    n = sum(group[0] for group in groups)
    total, squares = (map(sum, zip(*(group[i] for group in groups), strict=True)) for i in (1, 2))
    variances = [(s - t * t / n) / (n - 1) for s, t in zip(squares, total, strict=True)]
    return 2 * sum((w * v).sum(0).mean().item() for w, v in zip(network.weights, variances, strict=True))


def lpips_diversity(images, network=None, device="cpu", batch_size=100):
    """Mean LPIPS over all pairs of images (N, 3, H, W) uint8, N >= 2, H and W >= 31; 0: all are the same.

    network: an Lpips on `device`; None: `load_lpips`. Its mean does not depend on N. Raises InputError.
    """
    if len(images) < 2 or min(images.shape[2:]) < LPIPS_SMALLEST:
        found = tuple(images.shape)
        raise InputError(f"LPIPS needs two images of {LPIPS_SMALLEST} pixels a side, not {found}")
    network = network or load_lpips(device)
    return lpips_of(lpips_sums(images, network, device, batch_size), network)


# --------------------------------------------------------------------------------------------------
# Scores of class probabilities, labels and colours
# --------------------------------------------------------------------------------------------------
def inception_score(probabilities, splits=10):
    """IS = exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and standard deviation over the splits.

    probabilities (N, C), rows sum to 1. From 1 (all rows the same) to C (each is certain, all classes equally
    often). A split is a run of consecutive rows with its own p(y), so the rows must be in random order.
    """
    p = check_features(probabilities, "probabilities").cpu().numpy().astype(np.float64)
    if not 1 <= splits <= len(p):
        raise ValueError(f"{splits} splits of {len(p)} rows")
    scores = []
    for rows in np.array_split(p, splits):
        marginal = rows.mean(0)
        # KL = sum p log p - sum p log marginal; the mean over rows turns the second p into the marginal
        kl = scipy.special.xlogy(rows, rows).sum(1).mean() - scipy.special.xlogy(marginal, marginal).sum()
        scores.append(math.exp(kl))
    return float(np.mean(scores)), float(np.std(scores))


def kl_to_uniform(labels, num_classes):
    """KL(r || uniform) = sum_k r_k log(K r_k), r_k the share of class k among labels (N,).

    From 0 (all K classes equally often) to log K (one class); natural logarithm, 0 log 0 = 0. CBGAN's measure
    of balance, where the labels are what a classifier sees in samples.
    """
    counts = np.bincount(check_labels(labels, labels, "labels"), minlength=num_classes)
    if len(counts) > num_classes:
        raise ValueError(f"label {len(counts) - 1} among {num_classes} classes")
    r = counts / counts.sum()
    return float(scipy.special.xlogy(r, num_classes * r).sum())


HUE_BINS = 12  # 30 degrees each


def effective_hues(images):
    """How many of 12 hues a set of pictures uses: exp(entropy) of the histogram of their main hues; 1 to 12.

    images (N, 3, H, W) uint8, one coloured thing on grey each. A pixel's colour, less its grey, is an arrow:
    its direction is the hue, its length the chroma. The mean arrow has the mean hue, weighted by chroma; the
    grey ground drops out. Few images fill few bins: 10 spread over the whole circle score about 7, 50
    about 10.6, 200 about 11.6. Compare equal numbers only.
    """
    red, green, blue = images.double().mean((2, 3)).unbind(1)
    turns = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi) % 1
    bins = (turns * HUE_BINS).long().clamp(max=HUE_BINS - 1)
    share = torch.bincount(bins, minlength=HUE_BINS) / len(images)
    return math.exp(scipy.special.entr(share.numpy()).sum())


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------
def load_samples(path, label_names=("labels",), classes=None):
    """images (N, 3, H, W) uint8 and labels (N,) int64 of samples; labels None if they have none.

    path          a samples file; or a directory of pictures of one size, PATH/<class>/*.png or PATH/*.png
    label_names   the first of these arrays that the file has holds the labels
    classes       names; the labels of a directory are places in it, or alphabetical
    raises        InputError, naming the file and what was found
    """
    if Path(path).is_dir():
        images, labels, _ = datasets.load_images(path, classes)
        if len(images) < 2:
            raise InputError(f"{path} holds one picture; scores need at least two")
        return images, labels
    try:
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:  # the convention of guided-diffusion
                label_names = ("arr_1",)
            images = next((file[name] for name in ("images", "arr_0") if name in file), None)
            labels = next((file[name] for name in label_names if name in file), None)
    except FileNotFoundError as error:
        raise InputError(f"no samples at {path}") from error
    except Exception as error:  # zip, zlib, NumPy's header and pickle checks, a bare array: each has its own
        raise InputError(f"{path} is not a samples file, or damaged ({error})") from error
    if images is None:
        raise InputError(f"{path} has neither images nor arr_0")
    found, n = f"{images.dtype} {images.shape}", len(images) if images.ndim else 0
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or n < 2:
        raise InputError(f"{path}: images are {found}, not uint8 (N, H, W, 3) with N > 1")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (n,)):
        raise InputError(f"{path}: labels are {labels.dtype} {labels.shape}, not integers ({n},)")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def equal_numbers(samples):
    """{path: (images, labels)}, cut so that all have as many samples, as most scores depend on how many.

    Of each class the first n are kept, n being the smallest number that any file has of it. Where a file has
    no labels, it is the smallest total, chosen at random, since files often lie class after class.
    """
    numbers = {path: len(images) for path, (images, _) in samples.items()}
    labels = {path: labels for path, (_, labels) in samples.items()}
    if any(y is None for y in labels.values()):
        which, n = "at random", min(numbers.values())
        rows = {path: torch.randperm(number, generator=torch.Generator().manual_seed(0))[:n].sort().values
                for path, number in numbers.items()}  # fmt: skip
    else:
        which = "the first of each class"
        classes = torch.cat([*labels.values()]).unique().tolist()
        fewest = {c: min((y == c).sum() for y in labels.values()) for c in classes}
        rows = {path: torch.cat([(y == c).nonzero().flatten()[:n] for c, n in fewest.items()]).sort().values
                for path, y in labels.items()}  # fmt: skip
        n = len(rows[next(iter(rows))])
    if all(number == n for number in numbers.values()):
        return samples
    found = ", ".join(f"{path} has {number}" for path, number in numbers.items())
    if n < 2:
        raise InputError(f"the files have no two samples of the same classes: {found}")
    print(f"unequal numbers of samples ({found}): each is cut to {n}, {which}")
    return {path: (images[rows[path]], None if y is None else y[rows[path]])
            for path, (images, y) in samples.items()}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------
def name_of(dataset):
    """Of a data set; of an ImageSet, "other images"."""
    return dataset if isinstance(dataset, str) else "other images"


def reference_key(dataset, split, rho, imbalance="exp"):
    """Begins the name of a file of features. Of a long-tailed set only the training split is its own."""
    if not isinstance(dataset, str):
        return f"images-{dataset.fingerprint}"
    own = split == "train" and rho
    step = "-step" * (imbalance == "step")
    name = f"{dataset}-{split}-rho{rho:g}{step}" if own else f"{dataset.removesuffix('lt')}-{split}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)  # the name of a folder may hold anything


def cached(path, made_from, compute, still_right=lambda arrays: True):
    """The arrays (a dict) in the file at `path`, or compute(), then written there.

    made_from     a text that tells what they are computed from. The file keeps it; another one: computed anew
    still_right   called with the arrays of the file; False: computed anew
    """
    arrays = None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["made_from"]) == made_from:
                arrays = {name: file[name] for name in file if name != "made_from"}
    except Exception:  # not there, or damaged in one of many ways
        pass
    if arrays is None or not still_right(arrays):
        arrays = compute()
        try:
            with atomic_write(path) as file:
                np.savez(file, **arrays, made_from=made_from)
        except InputError as error:  # a data directory that cannot be written to costs time, not the scores
            tqdm.write(f"{path.name} is not kept: {error}")
    return arrays


def reference_file(real, key, network, data_dir):
    """Where the features of an ImageSet are kept."""
    weights = network.name if network.info is None else f"classifier-{network.fingerprint[:12]}"
    return Path(data_dir) / "features" / f"{key}-{real.images.shape[-1]}-{weights}.npz"


PROBES = 8  # images whose features are compared with those kept
TOLERANCE = 0.02  # of the spread of these features; CUDA rounds to TF32, a part in 2,000


def reference_features(real, key, network, data_dir, device, batch_size):
    """Features (N, D) of an ImageSet: from <data_dir>/features/<key>-....npz, or extracted and kept there.

    The file says of which images and weights it is. As the code may have changed since, a few of the features
    are computed again and compared.
    """
    path = reference_file(real, key, network, data_dir)
    probes = np.linspace(0, len(real.images) - 1, PROBES).round().astype(int)

    def extract(images):
        return extract_features(images, network, device, batch_size)[0]

    def still_right(arrays):
        old, new = arrays["features"][probes], extract(real.images[probes])
        spread = np.linalg.norm(old - old.mean(0))
        if old.shape == new.shape and np.linalg.norm(new - old) <= TOLERANCE * spread:
            return True
        tqdm.write(f"{path.name} holds other features than the network gives now; all are extracted again")
        return False

    made_from = f"{network.fingerprint} {real.fingerprint}"
    return cached(path, made_from, lambda: {"features": extract(real.images)}, still_right)["features"]


def reference_radii(features, parts, path):
    """`neighbour_radii` (N,) within each part that the images (N, D) are cut into, kept beside the features.

    parts {name: (N,) the part that each image is in}; path of the features -> {name: (N,)}, nan where a part
    has too few images.
    """

    def within(part):
        radii = np.full(len(features), np.nan)
        for p in np.unique(part):
            members = np.flatnonzero(part == p)
            if len(members) > NEIGHBOURS:
                radii[members] = neighbour_radii(features[torch.from_numpy(members)], NEIGHBOURS).cpu()
        return radii

    made_from = hashlib.sha256(features.cpu().numpy())
    for part in parts.values():
        made_from.update(np.int64(part).tobytes())
    return cached(path.with_name(f"{path.stem}-radii.npz"), f"{made_from.hexdigest()} {NEIGHBOURS}",
                  lambda: {name: within(part) for name, part in parts.items()})  # fmt: skip


def load_reference(real, dataset, data_dir, features, reference, rho, device, batch_size=100,
                   imbalance="exp"):  # fmt: skip
    """The FeatureNetwork that `features` names, and the features (N, D) of an ImageSet; see `evaluate`.

    features None: for the shapes data their annotator, which is trained now (seconds) if need be; else
    inception; for a folder, where Inception's weights can't be had, a classifier of its classes.
    """
    classes, size = real.classes, real.images.shape[-1]
    network = None
    folder, shapes = (name_of(dataset).startswith(kind) for kind in ("folder:", "shapes"))
    if features is None and not shapes:
        try:
            network = load_feature_network("inception", device, classes, size)
        except InputError as error:
            if not folder:
                raise
            warn(f"{error}. A classifier of the folder's classes compares the images instead: FD, not FID")
    if features is None and network is None:
        annotator = frozen_classifier(dataset, data_dir, split="reference", image_size=size, device=device)
        features = f"classifier:{annotator.info['path']}"
    network = network or load_feature_network(features, device, classes, size)
    key = reference_key(dataset, reference, rho, imbalance)
    return network, reference_features(real, key, network, data_dir, device, batch_size)


# --------------------------------------------------------------------------------------------------
# All scores of a set of samples
# --------------------------------------------------------------------------------------------------
# What --scores takes, and what its numbers are called in metrics.json: fd, precision ... of a set of images.
# For each there is intra_..., the mean of the scores within the classes, and intra_..._std, their deviation.
SCORES = {
    "fid": ("fd",),
    "kid": ("kid",),
    "pr": ("precision", "recall"),
    "dc": ("density", "coverage"),
    "prd": ("f8", "f1_8"),
    "copies": ("copies",),
    "colours": ("odd_colours",),
    "is": (),
    "lpips": ("lpips",),
}
DEFAULT_SCORES = "fid,is"  # seconds; the others compare all pairs of images, or cluster them
LOWER_IS_BETTER = ("fd", "kid", "copies", "odd_colours")
NEIGHBOURS = 5  # k of precision, recall, density, coverage: CBDM, Softlabel-GAN
CLUSTERS = 20  # a class, of F_8: CBDM
HUES = {"effective_hues": "hues", "reference_hues": "real hues"}  # of the shapes; the second is the heading
SHOWN = 6  # samples of each class that are nearest to a training image, for the picture


def chosen_scores(scores):
    """The names in "fid,kid", in ["fid", "kid"] or in "all", a list. Raises InputError."""
    names = [name.strip() for name in scores.split(",")] if isinstance(scores, str) else list(scores)
    names = list(SCORES) if "all" in names else names
    for name in names:
        if name not in SCORES:
            raise InputError(f"unknown score {name!r}; choose from {', '.join(SCORES)}, or all")
    return names


def compare(real, fake, names, clusters, real_radii=None, real_moments=None):
    """{name in metrics.json: score} of two sets of features, without scores that need more images.

    names: of SCORES. clusters: of F_8. real_radii, real_moments: of the real images, if known.
    """
    few, found = min(len(real), len(fake)), {}
    if "fid" in names and few >= 2:
        found["fd"] = frechet_distance(real, fake, real_moments)
    if "kid" in names and few >= 2:
        found["kid"] = kernel_inception_distance(real, fake)
    if {"pr", "dc"} & set(names) and few > NEIGHBOURS:
        four = balls(real, fake, NEIGHBOURS, real_radii)
        found |= zip(SCORES["pr"], four[:2], strict=True) if "pr" in names else {}
        found |= zip(SCORES["dc"], four[2:], strict=True) if "dc" in names else {}
    if "prd" in names and few >= clusters:
        found["f8"], found["f1_8"] = prd_f_beta(real, fake, clusters)
    return found


# Error bars: how much would a score change with other samples of the same model (not: of another training)?
# The delete-a-group jackknife (Shao & Tu 1995, section 2.3): n samples are dealt out, class by class, into
# g = 20 groups of s (what is left over stays in always), and scored g times, each time without one group;
#
#     error^2 = (n - s)^2 / (n s (g - 1)) * sum_i (score_i - mean of these)^2
#
# The bootstrap would draw images twice, which a nearest neighbour takes for a copy. Of 100 sets of 60
# samples from a known distribution (a test counts) the expected score lies within two errors in 95 (FD,
# precision), 91 (KID), 96 (density), 98 (recall), 97 (coverage); the errors of the last two are 1.4 and 1.3
# times the true ones, that of the IS of 100 images 1.7 times. F_8 has none: with other numbers its clusters
# are others. The samples of two classes are independent: so the error of a mean over classes.
GROUPS = 20
WITHOUT_ERROR = ("f8", "f1_8", "inception_score_std")


def group_of(n):
    """Which group each of n samples is in, (n,): 0 .. g - 1, or g, which is never left out."""
    g = min(n, GROUPS)
    rows = np.arange(n)
    return np.where(rows < n // g * g, rows % g, g) if n else rows


def kept(n, left_out):
    """Which of n samples count where one group, 0 .. g - 1, is left out, or none (None): (M,) indices."""
    return np.arange(n) if left_out is None else np.flatnonzero(group_of(n) != left_out)


def with_errors(score, n):
    """score(None) of n samples, {name: number}, and <name>_error, the standard error of each, or None.

    score(i): the scores without the samples of group i, see `kept`.
    """
    found, g = score(None), min(n, GROUPS)
    left = [score(i) for i in range(g)] if g > 1 else []
    errors = {}
    for name in found:
        x = np.array([scores.get(name, math.nan) for scores in left])
        errors[f"{name}_error"] = None
        if left and name not in WITHOUT_ERROR and not np.isnan(x).any():
            s = n // g
            errors[f"{name}_error"] = (n - s) * math.sqrt(((x - x.mean()) ** 2).sum() / (n * s * (g - 1)))
    return found | errors


def mean_with_error(rows, field):
    """Mean, deviation, and the error of the mean, of a field of several classes' rows; how many have it."""
    rows = [row for row in rows if row[field] is not None]
    if not rows:
        return None, None, None, None
    errors = [row.get(f"{field}_error") for row in rows]
    error = None if None in errors else math.hypot(*errors) / len(rows)
    values = [row[field] for row in rows]
    return float(np.mean(values)), float(np.std(values)), error, len(rows)


OFTEN_NEARER = 0.05  # the share of real images that count as copies too
APART = ("test", "reference")  # splits that may hold images held out of training
ENOUGH_APART = 20  # held-out images of a class, to say how near its images lie to the training images


def copies(fake, labels, train, apart, apart_labels, num_classes):
    """Which samples are nearer to a training image than all but 5 % of real held-out images are: (N,) bool.

    fake, train, apart: features of samples, training images and held-out images; labels (N,), or None;
    apart_labels. Near: of each class's own held-out images if they are 20 or more, else of all. After Meehan
    et al. 2020, who compare the same two distributions of distances.
    returns     also what share of real images would be copies by this rule (N,): 5 %, more where few are held
                out; the nearest training image of each sample (N,), and its distance (N,)
    """
    index, distance = nearest(fake, train)
    _, usual = nearest(apart, train)

    def limit(of):  # the k-th of n distances has a share of k / (n + 1) below it, on average
        n = len(of)
        return torch.quantile(of, OFTEN_NEARER).item(), (OFTEN_NEARER * (n - 1) + 1) / (n + 1)

    limits = [limit(usual)] * num_classes
    for k in range(num_classes):
        own = usual[torch.from_numpy(apart_labels == k)]
        if len(own) >= ENOUGH_APART and labels is not None:
            limits[k] = limit(own)
    of_class = np.zeros(len(fake), int) if labels is None else labels
    near, expected = np.array(limits)[of_class].T
    return distance.numpy() <= near, expected, index.numpy(), distance.numpy()


def held_out(apart, train):
    """Which images of the set `apart` are not among those of `train`: (N,) indices."""
    known = {hash(image.tobytes()) for image in train.images.numpy()}
    return np.flatnonzero([hash(image.tobytes()) not in known for image in apart.images.numpy()])


def odd_colours(images):
    """Which pictures of a class (N, 3, H, W) uint8 have colours unlike the others': (N,) bool.

    Softlabel-GAN, §4.4 and Fig. 7: a histogram of colours of each; its mean correlation with the others'; odd
    is what lies below the lower quartile by more than 1.5 times the range between the quartiles. CHOICE: 8 x
    8 x 8 colours, Pearson's correlation, the quartiles of the class; the paper says none of these.
    """
    red, green, blue = (images.long() // 32).flatten(2).unbind(1)
    bins = 64 * red + 8 * green + blue
    histograms = torch.zeros(len(images), 512, dtype=torch.double).scatter_add_(
        1, bins, torch.ones(bins.shape, dtype=torch.double))
    z = histograms - histograms.mean(1, keepdim=True)
    z = z / z.norm(dim=1, keepdim=True)
    mean = (z @ z.sum(0) - 1) / (len(images) - 1)
    low, high = torch.quantile(mean, torch.tensor([0.25, 0.75], dtype=torch.double))
    return (mean < low - 1.5 * (high - low)).numpy()


def other_split(load, known, splits):
    """The first of these splits that can be loaded and is none of the ImageSets known: (name, ImageSet)."""
    for split in splits:
        with contextlib.suppress(InputError):  # a folder without this split
            found = load(split)
            if not any(found.fingerprint == x.fingerprint for x in known):
                return split, found
    return None, None


@dataclasses.dataclass
class Compared:
    """What a row of scores is made from: N samples, M real images; None where something is not to be had."""

    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: np.ndarray | None  # (N,) the classes that the samples were made for
    seen: np.ndarray | None  # (N,) the classes that a classifier sees in them
    probabilities: np.ndarray  # (N, C) of the feature network
    fake: torch.Tensor  # (N, D) features
    real: torch.Tensor  # (M, D)
    real_labels: np.ndarray  # (M,)
    radii: dict  # of the real images, (M,): "all", among all; "class", within their class
    floor: torch.Tensor | None  # features of other real images, as many of each class as there are samples
    floor_labels: np.ndarray
    copied: np.ndarray | None  # (N,) bool, see `copies`; and what share of real images would be
    copies_floor: np.ndarray | None
    lpips: Lpips | None
    num_classes: int
    device: str
    batch_size: int
    errors: bool
    fields: list  # what a row holds: names in metrics.json


def score_classes(c, classes, names, radii=None):
    """A row of scores (a dict) of the samples made for these classes, against the real images of them.

    c       a Compared; names: of SCORES; radii: which of c.radii, if any
    """
    K, everything = c.num_classes, len(classes) == c.num_classes
    row = dict.fromkeys(("samples", *c.fields, "recognised", "seen_share", *HUES))
    if c.seen is not None:
        row["seen_share"] = float(np.isin(c.seen, classes).mean())
    if (c.labels is None and not everything) or not len(classes):  # the tail of two classes
        return row
    mine = np.arange(len(c.images))
    if c.labels is not None:  # class by class, so that each group of `kept` has as many of each
        mine = np.argsort(c.labels, kind="stable")
        mine = mine[np.isin(c.labels[mine], classes)]
    theirs = np.isin(c.real_labels, classes)
    # All rows are not copied: 50,000 x 2,048 are 400 MB.
    real = c.real if theirs.all() else c.real[torch.from_numpy(theirs)]
    known = c.radii[radii][theirs] if c.radii and radii else None
    clusters = CLUSTERS * len(classes)
    real_moments = moments(real.cpu().numpy()) if "fid" in names and len(real) > real.shape[1] else None
    sums = []
    if "lpips" in names and len(mine):
        sums = lpips_sums(c.images[mine], c.lpips, c.device, c.batch_size)
    # Samples often lie class after class; consecutive splits for IS would each have few classes.
    shuffled = np.random.default_rng(0).permutation(len(c.images))

    def score(left_out):
        """Of all samples but a group, see `kept`."""
        rows = mine[kept(len(mine), left_out)]
        fake = c.fake if len(rows) == len(c.images) else c.fake[torch.from_numpy(rows)]
        found = compare(real, fake, names, clusters, known, real_moments)
        if c.seen is not None and c.labels is not None and len(rows):
            found["recognised"] = float((c.seen == c.labels)[rows].mean())
        if "copies" in names and len(rows):
            found["copies"] = float(c.copied[rows].mean())
        if "colours" in names and len(classes) == 1 and len(rows) > 2:
            found["odd_colours"] = int(odd_colours(c.images[rows]).sum())
        if "lpips" in names and len(rows) >= 2:
            of_groups = [group for g, group in enumerate(sums) if g != left_out]
            found["lpips"] = lpips_of(of_groups, c.lpips)
        if everything and "is" in names and len(rows) > 1:
            order = shuffled[np.isin(shuffled, rows)]
            mean, deviation = inception_score(c.probabilities[order], min(10, len(rows)))
            found |= {"inception_score": mean, "inception_score_std": deviation}
        if everything and c.seen is not None:
            found["kl_to_uniform"] = kl_to_uniform(c.seen[rows], K)
        return found

    row["samples"] = len(mine)
    row |= with_errors(score, len(mine)) if c.errors else score(None)
    others = np.flatnonzero(np.isin(c.floor_labels, classes))
    if len(others):
        found = compare(real, c.floor[torch.from_numpy(others)], names, clusters, known, real_moments)
        row |= {f"{field}_floor": x for field, x in found.items()} | {"floor_images": len(others)}
    if "copies" in names and len(mine):
        row["copies_floor"] = float(c.copies_floor[mine].mean())
    return row


def evaluate(images, labels, dataset, data_dir="data", features=None, reference="reference", rho=None,
             image_size=None, device="cpu", batch_size=100, seen=None, scores=DEFAULT_SCORES, errors=True,
             imbalance="exp"):
    """Scores of images (N, 3, H, W) uint8 with the classes (N,) that they were made for.

    labels      tensor; None for a generator without classes: the scores that need none
    dataset     a name for datasets.load; or an ImageSet to compare with, which has no training images
    features    a name for `load_feature_network`; None: see `load_reference`
    reference   the split to compare with; rho, image_size and imbalance as in datasets.load
    seen        (N,) the class that an annotator sees in each sample; None: what the features' own classifier
                sees, if they are a classifier's
    scores      names of SCORES, a list or a text with commas between. "all": those that can be had (LPIPS
                needs weights); protocol["left_out"] says why one is missing
    errors      whether to compute standard errors, for which each score is computed 20 times more
    returns     {"protocol", "all", "head", "middle", "tail", "per_class"} of plain numbers, ready for JSON;
                with several processes None in all but the first.
                Head, middle and tail are thirds of the classes by the number of *training* images. None: not
                to be had (a class with too few samples, no labels, no classifier).
        fd                   Fréchet distance, d^2; protocol["metric"] says what to call it
        kid, precision, recall, density, coverage, f8, f1_8, copies, odd_colours (a count), lpips
                             if asked for; of all and of each class, for the thirds only as intra_...
        intra_fd, _std       mean and deviation over classes of d^2 within a class; likewise for the others
        intra_fd_classes     over how many: those with enough images on both sides (2; 6 for neighbours; 20
                             for F_8, which has a bias even then)
        recognised           share that the classifier or annotator takes for the class it was made for
        seen_share           share of all samples that it takes for one of these; seen: how many (per class)
        effective_hues       mean over classes (shapes); reference_hues: of as many real images
        inception_score, _std, kl_to_uniform (of the classes seen)
                             for "all" alone
        ..._error            the standard error of any of these, see `with_errors`
        ..._floor            of distances, precision ... f1_8: what real images score that are not the
                             reference, as many of each class as there are samples, or all there are;
                             floor_images: how many. Of copies: see `copies`
        nearest              of a class, with the score copies: the samples that are nearest to a training
                             image, [sample, training image, distance]
    raises      InputError
    """
    load, name = None, "other images"
    real = dataset
    if not isinstance(dataset, datasets.ImageSet):
        if rho is None and dataset in datasets.LONG_TAILED:
            rho = datasets.DEFAULT_RHO
        load = functools.partial(datasets.load, dataset, data_dir, image_size=image_size, rho=rho,
                                 imbalance=imbalance)
        real, name = load(reference), dataset
    train = load("train") if load else real
    K, size = len(real.classes), real.images.shape[-1]
    if images.shape[1:] != real.images.shape[1:]:
        raise InputError(f"samples are {images.shape[-2]} x {images.shape[-1]} pixels and {name} "
                         f"{size} x {size}; --image-size sets the latter")
    if labels is not None and not 0 <= labels.min() <= labels.max() < K:
        found = f"{labels.min()} to {labels.max()}"
        raise InputError(f"labels go from {found}; {name} has the classes 0 to {K - 1}")

    # What can't be had is left out, unless it was asked for by name.
    wanted, left_out = chosen_scores(scores), []
    lpips = None

    def leave_out(score, why):
        if score in scores:
            raise InputError(why)
        left_out.append(why)
        wanted.remove(score)

    if "lpips" in wanted:
        try:
            if size < LPIPS_SMALLEST:
                raise InputError(f"LPIPS needs images of {LPIPS_SMALLEST} pixels; {name} has {size}")
            lpips = load_lpips(device)
        except InputError as error:
            leave_out("lpips", str(error))
    apart_split, apart = other_split(load, [train], APART) if load else (None, None)
    fresh = held_out(apart, train) if "copies" in wanted and apart else []
    if "copies" in wanted and len(fresh) < ENOUGH_APART:
        leave_out("copies", f"copies needs {ENOUGH_APART} images held out of training; {name} has fewer")

    # Features: of the samples, of the reference, of other real images (the floor), of the training images.
    network, real_features = load_reference(real, dataset, data_dir, features, reference, rho, device,
                                            batch_size, imbalance)  # fmt: skip

    def features_of(split, found):
        return load_reference(found, dataset, data_dir, network.name, split, rho, device, batch_size,
                              imbalance)[1]  # fmt: skip

    fake_features, probabilities = extract_features(images, network, device, batch_size)
    floor_split, floor = other_split(load, [real], ("test", "reference", "train")) if load else (None, None)
    floor_features = features_of(floor_split, floor) if floor else None
    if "copies" in wanted:
        apart_features, train_features = features_of(apart_split, apart), features_of("train", train)
    if datasets.RANK:
        return None

    # What is known of each image.
    pairs_on = device if torch.device(device).type == "cuda" else "cpu"  # MPS has no float64
    real_features = torch.from_numpy(real_features).to(pairs_on)
    y = None if labels is None else labels.numpy()
    if seen is not None:
        seen = check_labels(seen, images, "seen")
    elif network.info:
        seen = probabilities.argmax(1)
    radii, floor_labels = {}, np.array([], int)
    copied = copies_floor = None
    if {"pr", "dc"} & set(wanted):
        parts = {"all": np.zeros(len(real.labels), int), "class": real.labels.numpy()}
        path = reference_file(real, reference_key(dataset, reference, rho, imbalance), network, data_dir)
        radii = reference_radii(real_features, parts, path)
    if "copies" in wanted:
        copied, copies_floor, nearest_train, distance = copies(
            fake_features, y, train_features, apart_features[fresh], apart.labels.numpy()[fresh], K)
    if floor:  # as many of each class as there are samples, if there are so many
        wished = [(y == k).sum() if y is not None else len(images) // K for k in range(K)]
        rows = np.concatenate([np.flatnonzero(floor.labels == k)[:n] for k, n in enumerate(wished)])
        floor_labels = floor.labels.numpy()[rows]
        floor_features = torch.from_numpy(floor_features[rows]).to(pairs_on)
    fields = ["fd", *(field for name in wanted for field in SCORES[name] if field != "fd")]
    c = Compared(images, y, seen, probabilities, torch.from_numpy(fake_features).to(pairs_on), real_features,
                 real.labels.numpy(), radii, floor_features, floor_labels, copied, copies_floor, lpips, K,
                 device, batch_size, errors, fields)  # fmt: skip

    # The rows: all samples, thirds of the classes, each class; then the means within classes.
    result = {"all": score_classes(c, range(K), wanted, "all")}
    thirds = datasets.thirds(train.counts)
    for group, classes in thirds.items():
        result[group] = score_classes(c, classes, [score for score in wanted if score == "fid"])
    per_class = []
    for k, name in enumerate(tqdm(real.classes, "classes", leave=False, dynamic_ncols=True)):
        row = {"class": k, "name": name, "train_images": int(train.counts[k])}
        row |= score_classes(c, [k], wanted, "class")
        row["seen"] = None if seen is None else int((seen == k).sum())
        if load and dataset.startswith("shapes") and row["samples"]:
            row["effective_hues"] = effective_hues(images[labels == k])
            row["reference_hues"] = effective_hues(real.images[real.labels == k][: row["samples"]])
        if "copies" in wanted and row["samples"]:
            mine = np.flatnonzero(y == k)
            first = mine[np.argsort(distance[mine], kind="stable")[:SHOWN]]
            row["nearest"] = [[int(i), int(nearest_train[i]), float(distance[i])] for i in first]
        per_class.append(row)
    for group, classes in {"all": range(K), **thirds}.items():
        result[group] |= within_classes([per_class[k] for k in classes], fields, wanted)
    result["all"].setdefault("kl_to_uniform", None)
    accuracy = network.info and network.info["test_accuracy"]["all"]
    protocol = {"dataset": name_of(dataset), "image_size": size, "rho": rho, "imbalance": imbalance,
                "features": network.name, "metric": network.metric, "reference": reference,
                "reference_images": len(real.labels), "samples": len(images), "scores": wanted,
                "labels": labels is not None, "floor": floor_split,
                "classifier_accuracy": accuracy} | ({"left_out": left_out} if left_out else {})  # fmt: skip
    return {"protocol": protocol, **result, "per_class": per_class}


def within_classes(rows, fields, wanted):
    """intra_fd ...: what the rows of several classes give a row of their group, a dict."""
    found = {}
    for field in fields:
        keys = f"intra_{field}", f"intra_{field}_std", f"intra_{field}_error", f"intra_{field}_classes"
        found |= zip(keys, mean_with_error(rows, field), strict=True)
        floors = [row[f"{field}_floor"] for row in rows if row.get(f"{field}_floor") is not None]
        found[f"intra_{field}_floor"] = float(np.mean(floors)) if floors else None
    if "colours" in wanted:
        counts = [row["odd_colours"] for row in rows if row["odd_colours"] is not None]
        found["odd_colours"] = sum(counts) if counts else None
    return found | {name: mean_with_error(rows, name)[0] for name in HUES}


def score_run(where, images, labels, args, device, seen=None, protocol=None, totals=None, per_class=None):
    """Scores the samples of a run, writes the scores into `where`, prints the table.

    where       the directory that holds samples.npz
    args        has dataset, data_dir, features, reference, rho, image_size, scores
    protocol, totals, per_class    dicts to add to result["protocol"] and result["all"], and a list of K dicts
                to add to the rows of result["per_class"]
    returns     the dict of `evaluate` with these additions; None if the samples cannot be scored, mostly
                because the weights of the features cannot be downloaded. Then a line says so
    """
    try:
        result = evaluate(images, labels, args.dataset, args.data_dir, args.features, args.reference,
                          args.rho, args.image_size, device, seen=seen, scores=args.scores,
                          imbalance=args.imbalance)  # fmt: skip
    except InputError as error:
        print(f"{where}/samples.npz is written but not scored: {error}. "
              "The same command then resumes from here.", flush=True)
        return None
    if result is None:  # of another process
        return None
    result["protocol"] |= protocol or {}
    result["all"] |= totals or {}
    if per_class is not None:
        result["per_class"] = [row | more for row, more in zip(result["per_class"], per_class, strict=True)]
    paths = write_scores(result, where)
    print(format_table(result))
    print("wrote", *paths, "and samples.npz; pictures:", Path(args.run_dir) / "samples", flush=True)
    return result


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------
def score_headings(metric):
    """{name of a score: what it is printed as}. metric: what a Fréchet distance is called; KD follows FD."""
    same = {name: name for name in ("precision", "recall", "density", "coverage")}
    return {"fd": metric, "kid": f"K{metric.removeprefix('F')}", **same, "f8": "F_8", "f1_8": "F_1/8",
            "copies": "copies", "odd_colours": "odd colours", "lpips": "LPIPS"}  # fmt: skip


def format_table(result, per_class=False):
    """The dict of `evaluate` as text: the protocol, a row for each score; if asked a row for each class."""
    p, K = result["protocol"], len(result["per_class"])
    groups = ("all", "head", "middle", "tail")
    share = p["classifier_accuracy"]
    known = "" if share is None else f" (right on {share:.1%} of the test images)"
    lines = [f"{p['samples']} samples against {p['reference_images']} images ({p['dataset']}, "
             f"{p['reference']} split, {p['image_size']} pixels); features {p['features']}{known}"]
    if not p["labels"]:
        lines.append("The samples have no labels: scores of the whole set only.")
    lines += [f"Left out: {reason}" for reason in p.get("left_out", ())]
    scores = score_headings(p["metric"])
    inception = "IS" if p["metric"] == "FID" else f"IS({p['features'].split(':')[0]})"
    headings = {"samples": "samples", **scores, "recognised": "recognised", "seen_share": "seen", **HUES,
                "inception_score": inception, "kl_to_uniform": "KL to uniform"}  # fmt: skip
    rows, notes = {}, []
    for key, heading in headings.items():
        for k, h in ((key, heading), (f"intra_{key}", f"intra-{heading}")):
            rows[h] = {group: with_error(result[group], k) for group in groups}
            rows[f"  floor, {h}"] = {group: result[group].get(f"{k}_floor") for group in groups}
        rows[f"  deviation, {h}"] = {group: result[group].get(f"intra_{key}_std") for group in groups}
        n = result["all"].get(f"intra_{key}_classes")
        if n is not None and n < K:
            notes.append(f"{heading} within classes: {n} of {K} classes; the others have too few images")
    rows = {heading: row for heading, row in rows.items() if any(x is not None for x in row.values())}
    if any("floor" in heading for heading in rows) and p["floor"]:
        n = result["all"].get("floor_images")
        notes.append(f"floor: what {n} real images score ({p['floor']} split)" if n else "")
    if any("+-" in str(x) for row in rows.values() for x in row.values()):
        notes.append("+-: standard error by the choice of samples; another training differs by more")
    lines += [*text_table(rows, {group: group for group in groups}), *filter(None, notes)]
    if per_class:
        columns = {"train_images": "train images", "samples": "samples", **scores, "recognised": "recognised",
                   "seen": "seen", **HUES}  # fmt: skip
        table = {row["name"]: {key: with_error(row, key) for key in columns} for row in result["per_class"]}
        lines += ["", *text_table(table, columns)]
    return "\n".join(lines)


def with_error(row, key):
    """A score as text with its error, if it has one: "12.3 +- 0.4"."""
    value, error = row.get(key), row.get(f"{key}_error")
    return value if value is None or error is None else f"{value:.4g} +- {error:.2g}"


def compare_runs(results, field):
    """Lines of text: how runs {name: dict of `evaluate`} differ from the first in a score, class by class.

    A difference has the errors of both; that of a mean over classes follows from those of the classes. The
    difference between two trainings of one method is larger: compare several seeds.
    """
    (first, base), *others = results.items()
    better = -1 if field in LOWER_IS_BETTER else 1
    thirds = datasets.thirds([row["train_images"] for row in base["per_class"]])
    lines = [f"{field} of each class against {first}, {'lower' if better < 0 else 'higher'} is better"]
    for name, result in others:
        rows = {}
        for group, classes in {"all": range(len(base["per_class"])), **thirds}.items():
            pairs = [(base["per_class"][k], result["per_class"][k]) for k in classes]
            pairs = [(a, b) for a, b in pairs if a.get(field) is not None and b.get(field) is not None]
            if not pairs:
                continue
            difference = np.array([b[field] - a[field] for a, b in pairs])
            errors = [row.get(f"{field}_error") for pair in pairs for row in pair]
            mean, error = difference.mean(), None if None in errors else math.hypot(*errors) / len(pairs)
            row = {"won": f"{(better * difference > 0).sum()} of {len(pairs)}", "difference": f"{mean:+.4g}"}
            if error is not None:
                row["difference"] += f" +- {error:.2g}"
                row["in words"] = ("the difference is smaller than its error" if abs(mean) <= error else
                                   "less than two errors" if abs(mean) <= 2 * error else
                                   "better" if better * mean > 0 else "worse")  # fmt: skip
            rows[group] = row
        lines += [name, *text_table(rows, {key: key for key in ("won", "difference", "in words")})]
    return lines


def text_table(rows, columns):
    """Lines of a table. rows {name: dict}, columns {key: heading}; an empty column is left out."""
    columns = {key: heading for key, heading in columns.items()
               if any(row.get(key) is not None for row in rows.values())}  # fmt: skip
    table = [["", *columns.values()]]
    for name, row in rows.items():
        values = [row.get(key) for key in columns]
        cells = ["-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in values]
        table.append([name, *cells])
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    return [f"{name:{first}}" + "".join(f"  {x:>{max(9, w)}}" for x, w in zip(cells, widths, strict=True))
            for name, *cells in table]  # fmt: skip


def class_shares(seen, classes, order):
    """Prints, once, the share of each class in samples and KL to uniform, as several classifiers see them.

    seen {name: (N,) int64}; classes: K names; order: from head to tail. Returns {"kl_<name>": KL} and, for
    each of the K classes, {"share_<name>": share}.
    """
    K = len(classes)
    shown, which = order, "each class"
    if K > 20:
        shown, which = [*order[:10], *order[-10:]], "ten classes of the head and ten of the tail"
    shares = {name: (np.bincount(y, minlength=K) / len(y)).tolist() for name, y in seen.items()}
    kl = {name: kl_to_uniform(y, K) for name, y in seen.items()}
    print(f"share of {which} in the samples, and KL to uniform")
    rows = {classes[k]: {name: f"{share[k]:.2%}" for name, share in shares.items()} for k in shown}
    rows["KL"] = {name: f"{x:.4f}" for name, x in kl.items()}
    print("\n".join(text_table(rows, {name: name for name in seen})), flush=True)
    rows = [{f"share_{name}": share[k] for name, share in shares.items()} for k in range(K)]
    return {f"kl_{name}": x for name, x in kl.items()}, rows


def beside(where, name):
    """<where>/<name> in a directory; for a file of samples <file without .npz>-<name>."""
    where = Path(where)
    return where / name if where.is_dir() else where.with_name(f"{where.stem}-{name}")


def write_scores(result, where):
    """Writes metrics.json and per_class.csv, see `beside`; returns the two paths."""
    paths = [beside(where, name) for name in ("metrics.json", "per_class.csv")]
    write_result(result, result["per_class"], *paths)
    return paths


def write_result(result, rows, json_path, csv_path):
    """Writes a dict as JSON, and dicts as rows of a CSV; each file is then whole, or as before."""
    table = io.StringIO()
    writer = csv.DictWriter(table, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for path, text in ((json_path, json.dumps(result, indent=2) + "\n"), (csv_path, table.getvalue())):
        with atomic_write(path) as file:
            file.write(text.encode())


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------
SMOOTH = 5  # classes; the moving average of CBDM's Fig. 4
NO_MATPLOTLIB = "--plot draws with matplotlib, which is not installed: pip install matplotlib"


def moving_average(values, width=SMOOTH):
    """Centred mean of `width` neighbours, without those that are nan or past an end; nan if none is left."""
    padded = np.pad(np.asarray(values, np.float64), width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    there = ~np.isnan(windows)
    total = np.where(there, windows, 0).sum(1)
    return np.where(there.any(1), total / there.sum(1).clip(1), np.nan)


def plot_classes(results, path, score="fd"):
    """A PNG: the score of each class from head to tail, for one or several runs, {name: dict of `evaluate`}.

    Dots are classes, with their standard errors, lines moving averages of 5, dashes what real images score,
    grey the number of training images. Several runs, the first
    of which is the baseline, have two more panels: the score of the first - that of this one (CBDM, Fig. 4;
    above 0 is better for a distance), and their ratio (Softlabel-GAN, supplement, Figs 6 to 8; above 1 is
    better; not for KID, which may be below 0). Raises InputError without matplotlib, or without any score.
    """
    try:
        import matplotlib.figure  # no pyplot: no window, no state
    except ImportError as error:
        raise InputError(NO_MATPLOTLIB) from error
    tables = {name: result["per_class"] for name, result in results.items()}
    first, *others = tables
    counts = np.array([row["train_images"] for row in tables[first]])
    order = datasets.head_to_tail(counts)

    def column(rows, key):
        return np.array([row.get(key) for row in rows], np.float64)[order]

    y = {name: column(rows, score) for name, rows in tables.items()}
    errors = {name: column(rows, f"{score}_error") for name, rows in tables.items()}
    if all(np.isnan(values).all() for values in y.values()):
        raise InputError(f"no class has a {score} to draw")
    protocol, distance = results[first]["protocol"], score in ("fd", "kid")
    heading = score_headings(protocol["metric"])[score]
    per = sorted({row["samples"] or 0 for rows in tables.values() for row in rows})
    each = f"{per[0]}" if per[0] == per[-1] else f"{per[0]} to {per[-1]}"
    panels = [(f"{protocol['dataset']}, {each} samples a class; lines: moving average of {SMOOTH}",
               f"{heading} of the class", y, None)]  # fmt: skip
    if others:
        panels.append((f"{heading}, difference to the first run" + "; above 0 is better" * distance,
                       "first run - this run", {name: y[first] - y[name] for name in others}, 0))  # fmt: skip
    if others and score != "kid":
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = {name: np.where(y[name] != 0, y[first] / y[name], np.nan) for name in others}
        panels.append((f"{heading} relative to the first run" + "; above 1 is better" * distance,
                       "first run / this run", ratios, 1))  # fmt: skip

    figure = matplotlib.figure.Figure((8, 1.4 + 2.6 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    colours = {name: f"C{i}" for i, name in enumerate(y)}
    for axis, (title, label, curves, level) in zip(axes, panels, strict=True):
        behind = axis.twinx()
        behind.fill_between(range(len(order)), counts[order], step="mid", color="0.9", linewidth=0)
        behind.set_ylabel("training images", color="0.5")
        behind.tick_params(colors="0.5")
        behind.set_ylim(0)
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)
        if level is not None:
            axis.axhline(level, color="0.6", linewidth=1)
        for name, values in curves.items():
            bars = errors[name] if curves is y else None
            axis.errorbar(range(len(order)), values, bars, fmt=".", color=colours[name], alpha=0.35,
                          markersize=5)  # fmt: skip
            axis.plot(moving_average(values), color=colours[name], label=name)
        if curves is y:
            floor = moving_average(column(tables[first], f"{score}_floor"))
            axis.plot(floor, "--", color="0.4", label="real images")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(label)
        axis.spines["top"].set_visible(False)
        behind.spines["top"].set_visible(False)
        axis.legend(frameon=False, loc="best")
    axes[-1].set_xlabel("class, from head to tail")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def nearest(fake, real):
    """The row of real (N, D) nearest to each of fake (M, D), and the distance: (M,) int64, (M,) float64."""
    real, fake = as_pair(real, fake)
    centre, _ = centre_and_slack(real)
    best = torch.full((len(fake),), math.inf, dtype=torch.float64, device=real.device)
    index = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    for i, j in tiles(len(fake), len(real)):
        found, place = squared_distances(fake[i], real[j], centre).min(1)
        index[i] = torch.where(found < best[i], place + j.start, index[i])
        best[i] = torch.minimum(found, best[i])
    return index.cpu(), (fake.double() - real[index].double()).norm(dim=1).cpu()


def nearest_picture(images, train, per_class, rows=10):
    """A PIL image: the samples that are nearest to a training image, each beside it (memorised?).

    per_class: of `evaluate`, with the score copies. Rows go from head to tail: all classes with samples, or
    ten of them at equal steps.
    """
    from PIL import Image, ImageDraw, ImageFont

    order = [int(k) for k in datasets.head_to_tail(train.counts) if per_class[k].get("nearest")]
    order = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(len(order), rows))]
    size, gap = max(48, images.shape[-1]), 12  # pixels, as all below
    left, top = 170, 22
    width, height = left + SHOWN * (2 * size + gap), top + len(order) * (size + 4)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((4, 6), "class, training images", "black", font)
    draw.text((left, 6), "pairs: a sample, and beside it the training image nearest to it", "black", font)
    for row, k in enumerate(order):
        y = top + row * (size + 4)
        name = train.classes[k].encode("ascii", "replace").decode()[:20]
        draw.text((4, y + size // 2), f"{name}, {int(train.counts[k])}", "black", font, anchor="lm")
        for column, (i, j, _) in enumerate(per_class[k]["nearest"]):
            both = torch.cat([images[i], train.images[j]], 2).permute(1, 2, 0).numpy()
            tile = Image.fromarray(both).resize((2 * size, size), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (2 * size + gap), y))
    return sheet


def write_report(results, pictures, field, path):
    """One HTML page that needs nothing else: protocol and scores of each run, their differences, pictures.

    results {name: dict of `evaluate`}; pictures {caption: PNG file}, which are inlined; field: what the runs
    are compared by.
    """
    parts = ["<!doctype html><meta charset='utf-8'><title>Scores</title><style>body {font: 16px sans-serif; "
             "max-width: 70em; margin: 2em auto; padding: 0 1em} pre {font-size: 13px; overflow-x: auto} "
             "img {max-width: 100%; image-rendering: pixelated}</style><h1>Scores</h1>"]  # fmt: skip
    for name, result in results.items():
        table = html.escape(format_table(result, per_class=True))
        parts.append(f"<h2>{html.escape(name)}</h2><pre>{table}</pre>")
    if len(results) > 1:
        lines = "\n".join(compare_runs(results, field))
        parts.append(f"<h2>Differences</h2><pre>{html.escape(lines)}</pre>")
    for caption, file in pictures.items():
        data = base64.b64encode(Path(file).read_bytes()).decode()
        text = html.escape(caption)
        parts.append(f"<h2>{text}</h2><img alt='{text}' src='data:image/png;base64,{data}'>")
    with atomic_write(path) as file:
        file.write("\n".join(parts).encode())


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
COSTS = """\
what --scores takes, with seconds for 10,000 against 10,000 images, 2,048 features, 100 classes included
(two cores of an AMD EPYC that other jobs ran on too; without the features; all but lpips together 118 s;
without standard errors, for which each score is computed 20 times more: see --no-errors)
  fid     9 s  Frechet distance, of all and within classes
  is      0 s  Inception Score
  kid    36 s  kernel distance, unbiased, over all pairs of images
  pr     48 s  precision and recall, balls to the 5th neighbour; 27 s once the reference's radii are kept
  dc           density and coverage; with pr nothing more
  prd    46 s  F_8 (recall) and F_1/8 (precision), 20 clusters a class, 10 clusterings
  lpips        mean LPIPS over all pairs of samples: a pass through AlexNet each; needs their weights
  copies       the training image nearest to each sample; of held-out images too
  colours      pictures whose colours are unlike those of their class, by histograms (Softlabel-GAN, Fig. 7)
kid, pr and dc take four times as long for twice the images on both sides."""


def parse_args():
    parser = argparse.ArgumentParser(
        description="Scores of files of samples, from head to tail.", epilog=COSTS,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.error = fail  # one line where argparse would print the usage too
    parser.add_argument("samples", type=Path, nargs="+",
                        help=".npz: images (N, H, W, 3) uint8 and labels (N,), or arr_0, arr_1; or a "
                        "directory: pictures in it, or in a sub-directory for each class")
    add = parser.add_argument_group("what to compare with").add_argument
    add("--dataset", help="a name that datasets.py knows")
    add("--against", type=Path, metavar="PATH", help="instead of --dataset: other images, file or directory")
    add("--reference", choices=datasets.SPLITS, default="reference",
        help="reference (default): the balanced training images; for cifar*imb the test images")
    add("--rho", type=float, help="imbalance ratio of a long-tailed set (default: 100)")
    add("--imbalance", choices=("exp", "step"), default="exp", help="how its classes thin out (default: exp)")
    add("--image-size", type=int, help="pixels a side (default: the data set's own)")
    add("--data-dir", default="data", help="where data sets and their features are kept (default: data)")
    add = parser.add_argument_group("features").add_argument
    add("--features", help="inception (default), inception-fid (the FID of papers) or classifier:PATH "
        "(default for shapes: their annotator, trained when first needed)")
    add("--annotator", metavar="PATH", help="a checkpoint of classifier.py that says which class a sample "
        "shows (default: that of --features, if it is one)")
    add("--device", default="auto", help="auto (default): CUDA, else MPS, else the CPU")
    add("--batch-size", type=at_least(1), default=100, help="images at once (default: 100)")
    add = parser.add_argument_group("scores").add_argument
    add("--scores", default=DEFAULT_SCORES,
        help=f"names with commas between, or all; their cost below (default: {DEFAULT_SCORES})")
    add("--no-errors", action="store_true", help="no standard errors, which cost each score 20 times more")
    add = parser.add_argument_group("output").add_argument
    add("--per-class", action="store_true", help="print a row for each class")
    add("--out", type=Path, help="directory for metrics.json and per_class.csv (default: beside the samples, "
        "as <samples>-metrics.json, <samples>-per_class.csv; of a directory in <samples>-scores/)")
    add("--plot", nargs="?", const="fd", metavar="SCORE", help="write <samples>-SCORE.png: a score of each "
        "class from head to tail (default: fd), and of several files against the first; needs matplotlib")
    add("--nearest", action="store_true",
        help="write <samples>-nearest.png: the samples that are nearest to a training image, beside it")
    add("--report", type=Path, metavar="HTML", help="write all of it as one page, pictures included")
    args = parser.parse_args()
    chosen_scores(args.scores)
    if (args.dataset is None) == (args.against is None):
        fail("say what to compare with: --dataset NAME, or --against PATH of other images")
    if args.nearest:
        if args.against:
            fail("--nearest shows training images; --against has none")
        args.scores += ",copies"
    if args.plot:
        of = [name for name, fields in SCORES.items() if args.plot in fields]
        if not of:
            fields = [field for fields in SCORES.values() for field in fields]
            fail(f"--plot {args.plot}: choose from {', '.join(fields)}")
        if of[0] not in chosen_scores(args.scores):
            fail(f"--plot {args.plot} needs --scores {of[0]}")
        if not importlib.util.find_spec("matplotlib"):  # now, not after the scores
            fail(NO_MATPLOTLIB)
    if args.out and len(args.samples) > 1:
        fail("--out goes with one file of samples")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    results, pictures = {}, {}
    first_out = None
    where = (args.dataset, args.data_dir)
    for directory in filter(None, (args.out, args.report and args.report.parent)):  # fail before the scores
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{directory}: {error}") from error
    if args.against:
        by_classifier = (args.features or "").startswith("classifier:")
        names = load_feature_network(args.features).info["classes"] if by_classifier else None
        if args.against.is_dir():
            images, labels, names = datasets.load_images(args.against, names)
        else:
            images, labels = load_samples(args.against)
        whole = labels is None  # then so are the samples
        labels = torch.zeros(len(images), dtype=torch.int64) if whole else labels
        names = names or [str(k) for k in range(int(labels.max()) + 1)]
        if not 0 <= labels.min() <= labels.max() < len(names):
            fail(f"--against {args.against}: labels go from {labels.min()} to {labels.max()}, "
                 f"but there are the classes 0 to {len(names) - 1}")
        real = datasets.ImageSet(images, labels, names)
        where, classes = (real, args.data_dir), real.classes
    else:
        load = functools.partial(datasets.load, *where, image_size=args.image_size, rho=args.rho,
                                 imbalance=args.imbalance)
        classes = load(args.reference).classes
        if args.report and other_split(load, [load("train")], APART)[1]:
            args.scores += ",copies"
    samples = {path: load_samples(path, classes=classes) for path in args.samples}
    if args.against and whole:
        samples = {path: (images, None) for path, (images, _) in samples.items()}
    size = samples[args.samples[0]][0].shape[-1]
    labelled = all(labels is not None for _, labels in samples.values())
    if args.report and labelled and "fid" in chosen_scores(args.scores):
        args.plot = args.plot or ("fd" if importlib.util.find_spec("matplotlib") else None)
    for path, (images, labels) in samples.items():
        if labels is None and (args.plot or args.nearest):
            fail(f"{path} has no labels, which --plot and --nearest need")
        if images.shape[2:] != samples[args.samples[0]][0].shape[2:]:
            fail(f"{path} has images of {images.shape[-1]} pixels and {args.samples[0]} of {size}")
    if args.annotator:
        annotator = load_feature_network(f"classifier:{args.annotator}", device, classes, size)
    for path, (images, labels) in equal_numbers(samples).items():
        seen = None
        if args.annotator:
            seen = extract_features(images, annotator, device, args.batch_size)[1].argmax(1)
        result = evaluate(images, labels, *where, args.features, args.reference, args.rho, args.image_size,
                          device, args.batch_size, seen, args.scores, not args.no_errors,
                          args.imbalance)  # fmt: skip
        print(f"{path}: " * (len(args.samples) > 1) + format_table(result, args.per_class))
        results[str(path)] = result
        out = args.out or path
        if path.is_dir() and not args.out:  # not among the samples
            out = path.resolve().with_name(f"{path.resolve().name}-scores")
            out.mkdir(exist_ok=True)
        first_out = first_out or out
        print("wrote", *write_scores(result, out))
        if args.report:
            shown = images[np.linspace(0, len(images) - 1, 100).astype(int)]
            if labels is not None:
                counts = torch.tensor([row["train_images"] for row in result["per_class"]])
                shown = datasets.rows_of(images, labels, datasets.grid_classes(counts))
            order = "" if labels is None else ", from head to tail"
            pictures[f"{path}: samples{order}"] = beside(out, "grid.png")
            datasets.write_grid(beside(out, "grid.png"), shown)
        if labels is not None and (args.nearest or args.report) and "copies" in chosen_scores(args.scores):
            pictures[f"{path}: samples, each beside the nearest training image"] = beside(out, "nearest.png")
            with atomic_write(beside(out, "nearest.png")) as file:
                nearest_picture(images, load("train"), result["per_class"]).save(file, format="png")
            print("wrote", beside(out, "nearest.png"))
    fields = [field for name in chosen_scores(args.scores) for field in SCORES[name]]
    field = args.plot or next(iter(fields), "recognised")
    if len(results) > 1:
        print(*compare_runs(results, field), sep="\n")
    if args.plot:
        path = beside(first_out, f"{args.plot}.png")
        plot_classes(results, path, args.plot)
        pictures = {f"{args.plot} from head to tail": path} | pictures
        print("wrote", path)
    if args.report:
        write_report(results, pictures, field, args.report)
        print("wrote", args.report)


if __name__ == "__main__":
    run_command(main)
