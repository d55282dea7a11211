"""Scores of generated images: FID, KID, precision, recall, density, coverage, F_8, IS, LPIPS, of all and within classes.

    python metrics.py runs/.../samples.npz --dataset cifar100lt                              # samples of any codebase
    python metrics.py samples.npz --dataset cifar100lt --scores all --per-class
    python metrics.py runs/ddpm/samples.npz runs/cbdm/samples.npz --dataset cifar100lt --plot --nearest    # pictures
    python metrics.py samples.npz --dataset cifar100lt --features inception-fid --per-class
    python metrics.py samples.npz --dataset cifar100lt --features classifier:runs/.../classifier.pt

A samples file holds `images` (N, H, W, 3) uint8 and `labels` (N,) (or `arr_0` and `arr_1`). Each score is a pure
function of features, to be read and used alone; `evaluate` strings them together. What it prints begins with the
protocol: features, reference, number of images on both sides. Two numbers compare only where that line is the same.

Features, and what a Fréchet distance in them is called
    inception-fid    FID. The Inception that TensorFlow published in 2015, which the FIDs of papers are made with
                     (Heusel et al. 2017; CBDM, CBGAN, Softlabel-GAN): the number to put beside a paper's.
    inception        FID(torchvision). torchvision's Inception-v3: the same architecture, other weights, so other
                     numbers, which compare with each other alone.
    classifier:PATH  FD. The 64 features of a ResNet-32 of classifier.py: no download, made for small images, and it
                     says which class a sample shows. The default for the shapes data.

The protocols of the papers
    CBDM             50,000 samples, classes equally often, against the balanced training set (--reference reference)
    CBGAN            50,000 samples against the 10,000 test images (--reference test); classes by a balanced classifier
    Softlabel-GAN    against the test images (--reference reference, which is the test set for cifar*imb)
A Fréchet distance falls as images are added on either side (by about 1/n): equal numbers, or no comparison.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import io
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
from datasets import InputError, atomic_write, fail, pick_device, run_command

# ----------------------------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------------------------
# M. Seitzer's port of TensorFlow's graph of 2015-12-05 to PyTorch (pytorch-fid).
FID_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
FID_OUTPUTS = 1008  # of the 2015 network: ImageNet's 1000 classes and 8 that were never used
INCEPTION_SIZE = 299  # pixels a side


class FeatureNetwork(typing.NamedTuple):
    name: str  # as given to load_feature_network
    metric: str  # what a Fréchet distance in these features is called
    fingerprint: str  # tells these weights from others
    forward: typing.Callable  # (B, 3, H, W) uint8 on the device -> features (B, D), class probabilities (B, C)
    info: dict | None  # of a classifier: its classes, test accuracy ...; None for an Inception


def load_feature_network(name, device="cpu", classes=None, image_size=None):
    """The FeatureNetwork called "inception", "inception-fid" or "classifier:PATH".

    classes, image_size: what it is going to see; a classifier for anything else is refused. Raises InputError.
    """
    if name == "inception-fid":
        return FeatureNetwork(name, "FID", name, functools.partial(fid_forward, load_fid_inception(device)), None)
    if name == "inception":
        forward = functools.partial(inception_forward, load_inception(device))
        return FeatureNetwork(name, "FID(torchvision)", name, forward, None)
    if name.startswith("classifier:"):
        path = Path(name.removeprefix("classifier:"))
        network = load_classifier(path, device, classes, image_size)
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        return FeatureNetwork(name, "FD", fingerprint, functools.partial(classifier_forward, network), network.info)
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
    """(B, 3, H, W) uint8 -> pooled features (B, 2048), probabilities of ImageNet's classes (B, 1000)."""
    features = network(to_inception(images))
    return features, network.output(features).softmax(1)


def fid_forward(network, images):
    """As `inception_forward`, with 1008 probabilities from logits *without* the bias of the last layer.

    The TensorFlow code of IS multiplies the features by that layer's weight and adds no bias; so do published numbers.
    """
    features = network(to_inception(images))
    return features, F.linear(features, network.output.weight).softmax(1)


def load_inception(device="cpu"):
    """torchvision's Inception-v3, IMAGENET1K_V1: (B, 3, 299, 299) in [-1, 1] -> (B, 2048); last layer in `.output`."""
    from torchvision.models import Inception_V3_Weights  # here: torchvision takes a second to import

    return build_inception(Inception_V3_Weights.IMAGENET1K_V1.url, num_classes=1000).to(device)


def load_fid_inception(device="cpu"):
    """The network of published FIDs, shapes as in `load_inception`.

    The graph that its weights come from pools differently from torchvision's network in two ways.
    - The 3x3 average pools of the A blocks (5b-d), the C blocks (6b-e) and the first E block (7b) average over the
      pixels inside the image only; torchvision's count the zeros of the padding in.
    - The second E block (7c) takes the maximum; torchvision's takes the average.
    """
    network = build_inception(FID_WEIGHTS, FID_OUTPUTS)
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        pool_branch(getattr(network, f"Mixed_{name}"), average)
    pool_branch(network.Mixed_7c, maximum)
    return network.to(device)


def pool_branch(block, pool):
    """Make an Inception block apply `pool`, where its `forward` has an average pool before `branch_pool` built in."""
    block.register_forward_pre_hook(lambda block, inputs: setattr(block, "pooled", pool(inputs[0])))
    block.branch_pool.register_forward_pre_hook(lambda branch, inputs: (block.pooled,))  # in place of what it was given


def build_inception(url, num_classes):
    """A frozen Inception-v3 with the weights of `url`, without the auxiliary head, its last layer set apart."""
    from torchvision.models import inception_v3

    weights = fetch_weights(url)
    with torch.random.fork_rng(devices=[]):  # building it draws weights; the caller's random state is left alone
        network = inception_v3(num_classes=num_classes, aux_logits=False, init_weights=False)
    try:
        network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("AuxLogits.")})
    except (AttributeError, RuntimeError) as error:
        raise InputError(f"{weights_path(url)} does not hold the weights of {url}; delete it") from error
    network.output, network.fc = network.fc, torch.nn.Identity()
    # channels_last: 77 to 90 ms an image on two CPU threads, 125 to 149 without.
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def weights_path(url):
    """Where torch.hub keeps what it downloads from `url`; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def fetch_weights(url, instead="take --features classifier:PATH"):
    """The state dict at `url`, from torch.hub's cache if it is there. Raises InputError: what to put where."""
    path = weights_path(url)
    cached = path.exists()
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # urllib's, a wrong hash, or torch.load's of a damaged file
        if cached:
            raise InputError(f"{path} is damaged ({type(error).__name__}); put a good copy there") from error
        raise InputError(
            f"cannot download {url} ({error}); copy that file to {path}, or {instead}"
        ) from error


@torch.no_grad()
def extract_features(images, network, device="cpu", batch_size=100):
    """images (N, 3, H, W) uint8 -> features (N, D), class probabilities (N, C); float32 NumPy arrays.

    network: a FeatureNetwork on the same device.
    """
    features = probabilities = None
    starts = tqdm(range(0, len(images), batch_size), "features", leave=False, dynamic_ncols=True)
    for start in starts:
        outputs = [x.float().cpu().numpy() for x in network.forward(images[start : start + batch_size].to(device))]
        if features is None:  # whole arrays at once: a list of parts would need twice the memory in the end
            features, probabilities = (np.empty((len(images), x.shape[1]), np.float32) for x in outputs)
        features[start : start + batch_size], probabilities[start : start + batch_size] = outputs
    return features, probabilities


# ----------------------------------------------------------------------------------------------------------------------
# Fréchet distance
# ----------------------------------------------------------------------------------------------------------------------
# Between Gaussians with the means mu (D,) and covariances S (D, D) of two sets of features (Dowson & Landau 1982). As a
# score of images: FID, Heusel et al. 2017, who call the square the distance, as everybody has since.
#
#     d^2 = |mu1 - mu2|^2 + Tr(S1) + Tr(S2) - 2 Tr((S1 S2)^(1/2))
#
# The last trace is all of the cost. The usual code takes the square root of the matrix S1 S2, which is not symmetric
# (scipy.linalg.sqrtm). But the trace needs only the eigenvalues of S1 S2: it is the sum of their square roots. With any
# factor S1 = L L^T they are, but for zeros, the eigenvalues of L^T S2 L, which is symmetric and so much cheaper:
#
#     both n > D     L = Cholesky factor of S1, which is what LAPACK takes for the eigenvalues of a product S2 S1
#     one n <= D     L = A^T, where A (n, D) = centred features / sqrt(n - 1): S1 = A^T A, and L^T S2 L is only n x n
#     both n <= D    S2 = B^T B too: L^T S2 L = (A B^T)(A B^T)^T, so the square roots are the singular values of A B^T
#                    (n x m), whose sum is its nuclear norm. No D x D matrix at all: intra-FID in seconds.
#
# On two cores, with D = 2,048: two sets of 10,000 in 1.9 s (sqrtm: 20.6 s), one class of 50 + 50 in 1.7 ms (13.3 s).
def frechet_distance(real, fake):
    """d^2 of two sets of features, (N, D) and (M, D), N and M at least 2; never below 0, 0 for equal sets."""
    real, fake = check_features(real, "real"), check_features(fake, "fake")
    D = real.shape[1]
    if fake.shape[1] != D:
        raise ValueError(f"real features have {D} dimensions, fake ones {fake.shape[1]}")
    few, many = sorted((real, fake), key=len)
    if len(few) > D:
        return frechet_distance_from_moments(*moments(real), *moments(fake))
    mu1, A = centred(few)
    if len(many) > D:
        mu2, S2 = moments(many)
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
        raise ValueError(f"means {mu1.shape}, {mu2.shape} and covariances {S1.shape}, {S2.shape}: want (D,) and (D, D)")
    if not all(np.isfinite(x).all() for x in (mu1, S1, mu2, S2)):
        raise ValueError("a mean or a covariance has entries that are NaN or infinite")
    try:  # type=2: S2 S1 v = lambda v
        eigenvalues = scipy.linalg.eigh(S2, S1, type=2, eigvals_only=True, driver="gv", check_finite=False)
    except np.linalg.LinAlgError:  # S1 is singular: duplicates, or a feature that is always 0; L from its eigenvectors
        squares, vectors = np.linalg.eigh(S1)
        L = vectors * np.sqrt(squares.clip(0))
        eigenvalues = np.linalg.eigvalsh(L.T @ S2 @ L)
    return assemble(mu1, np.trace(S1), mu2, np.trace(S2), sum_of_roots(eigenvalues))


def sum_of_roots(eigenvalues):
    return np.sqrt(eigenvalues.clip(0)).sum()  # clip: rounding makes -1e-17 of a zero


def assemble(mu1, trace1, mu2, trace2, cross):
    return float(max(0.0, ((mu1 - mu2) ** 2).sum() + trace1 + trace2 - 2 * cross))  # rounding again


def check_features(features, name):
    """An array or a tensor as a NumPy array; raises ValueError unless it is (N >= 2, D) and finite."""
    features = np.asarray(features.detach().cpu() if isinstance(features, torch.Tensor) else features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} has shape {features.shape}; wanted is (N, D) with N of at least 2")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} has entries that are NaN or infinite")
    return features


def centred(features):
    """Mean (D,), and A (N, D) with A^T A the unbiased covariance; float64."""
    mean = features.mean(0, dtype=np.float64)
    return mean, (features - mean) / math.sqrt(len(features) - 1)


def moments(features, rows=2000):
    """Mean (D,) and unbiased covariance (D, D), float64; `rows` at a time, as 50,000 x 2,048 in float64 is 800 MB."""
    mean = features.mean(0, dtype=np.float64)
    covariance = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), rows):
        A = features[start : start + rows] - mean
        covariance += A.T @ A  # NumPy sees the symmetry and does half of the work
    return mean, covariance / (len(features) - 1)


def intra_fid(real, real_labels, fake, fake_labels, num_classes=None):
    """d^2 within each class: mean and standard deviation over the classes, and d^2 of each class; see `intra_class`."""
    return intra_class(frechet_distance, real, real_labels, fake, fake_labels, num_classes)


def intra_class(score, real, real_labels, fake, fake_labels, num_classes=None, least=2):
    """score(real, fake) within each class: mean and standard deviation over the classes, and the score of each class.

    The last is a (K,) array, K = num_classes or the highest label + 1. A class with fewer than `least` images on either
    side is nan, and left out of mean and deviation (nan if all are): 2 for distances, k + 1 where neighbours are counted.
    Of a score of several numbers, as `precision_recall`, mean and deviation are arrays, and the last is (K, numbers).

        intra_class(kernel_inception_distance, ...)
        intra_class(precision_recall, ..., least=6)
        intra_class(functools.partial(prd_f_beta, clusters=20), ..., least=20)

    With few images a class most scores have a large bias: compare equal numbers alone.
    """
    real, fake = check_features(real, "real"), check_features(fake, "fake")
    real_labels, fake_labels = check_labels(real_labels, real, "real"), check_labels(fake_labels, fake, "fake")
    found = {}
    for k in range(num_classes or 1 + max(real_labels.max(), fake_labels.max())):
        a, b = real[real_labels == k], fake[fake_labels == k]
        found[k] = score(a, b) if min(len(a), len(b)) >= least else math.nan
    shape = max((np.shape(x) for x in found.values()), default=())
    per_class = np.array([np.broadcast_to(x, shape) for x in found.values()], np.float64)
    there = per_class[~np.isnan(per_class).reshape(len(per_class), -1).any(1)]
    if not len(there):
        return math.nan, math.nan, per_class
    mean, deviation = there.mean(0), there.std(0)
    return (mean, deviation, per_class) if shape else (float(mean), float(deviation), per_class)


def check_labels(labels, features, name):
    """(N,) integer array; raises ValueError for anything else."""
    labels = np.asarray(labels)
    if labels.shape != (len(features),) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(f"{name}: wanted are {len(features)} class indices, got {labels.dtype} {labels.shape}")
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# Kernel distance, precision and recall
# ----------------------------------------------------------------------------------------------------------------------
# These compare every image with every other. One tile of the N x M table is at hand at a time, in float64: 50,000 x 50,000
# distances would be 20 GB in one piece; a tile with all that is made of it is 0.2 GB. Tensors stay where they are (a GPU).
TILE = 2048  # rows and columns; 34 MB


def tiles(rows, columns):
    """Pairs of slices (i, j) that cover a table of rows x columns, with a progress bar if there are many."""
    many = range(0, rows, TILE), range(0, columns, TILE)
    pairs = [(slice(i, i + TILE), slice(j, j + TILE)) for i in many[0] for j in many[1]]
    return tqdm(pairs, "pairs", leave=False, dynamic_ncols=True) if len(pairs) > 30 else pairs


def as_pair(real, fake):
    """Both as tensors on one device; raises ValueError unless they are finite (N, D) and (M, D), N and M at least 2."""
    arrays = check_features(real, "real"), check_features(fake, "fake")
    real, fake = (x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(array, order="C", copy=None))
                  for x, array in zip((real, fake), arrays, strict=True))
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}")
    return real, fake.to(real.device)


def kernel_inception_distance(real, fake):
    """KID (Binkowski et al. 2018): the unbiased estimate of MMD^2 with the kernel k(x, y) = (x.y / D + 1)^3.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    real (N, D), fake (M, D). Over all pairs: the number that the mean over subsets (`kid_of_subsets`) estimates, without
    the chance of choosing them. Its expectation does not depend on N and M, as that of FID does; it may come out below 0.
    """
    real, fake = as_pair(real, fake)

    def kernel_mean(a, b, same):
        total = 0.0
        for i, j in tiles(len(a), len(b)):
            if same and i.start > j.start:  # the table is symmetric: twice the half above the diagonal
                continue
            k = (a[i].double() @ b[j].double().T).div_(a.shape[1]).add_(1).pow_(3)
            total += k.sum().item() * (2 if same and i.start < j.start else 1)
            if same and i.start == j.start:
                total -= k.diagonal().sum().item()
        return total / (len(a) * (len(b) - same))

    return kernel_mean(real, real, True) + kernel_mean(fake, fake, True) - 2 * kernel_mean(real, fake, False)


def kid_of_subsets(real, fake, subsets=100, size=1000, seed=0):
    """KID as papers print it: mean and standard deviation over pairs of random subsets of `size` images each.

    The deviation is that of subsets of this size, not the error of the mean. size is cut to the smaller of the two sets.
    """
    real, fake = as_pair(real, fake)
    size, rng = min(size, len(real), len(fake)), np.random.default_rng(seed)
    scores = [
        kernel_inception_distance(*(x[torch.from_numpy(rng.choice(len(x), size, replace=False))] for x in (real, fake)))
        for _ in range(subsets)
    ]
    return float(np.mean(scores)), float(np.std(scores))


# Around each image lies a ball that reaches to its k-th nearest neighbour in its own set (itself not counted; a duplicate
# is a neighbour at distance 0). With the balls of the real images r, and of the fake ones f:
#
#     precision   share of fake images inside a real ball at least     is what it makes real?     Kynkaanniemi et al. 2019
#     recall      share of real images inside a fake ball at least     is all that is real made?
#     density     number of real balls that a fake image lies in, over k, on average; may exceed 1     Naeem et al. 2020
#     coverage    share of real balls with a fake image inside
#
# "Inside" is strictly nearer than the radius (prdc, the code of CBDM and of Softlabel-GAN). All four are counts of
# comparisons, so they have to be decided right: |x|^2 + |y|^2 - 2 x.y is fast but rounded, and where two sets share images
# distance and radius are the same number. Pairs too near to call are measured again, by differences. (Not decided right: more
# than k + 3 images of a set that differ only in the last bits of float32, but do differ.)
def exact_squares(a, b):
    """|a_i - b_i|^2 of rows (P, D): float64 on `a`'s device, the same to the last bit for (b, a) and for any P."""
    sums = [np.square(x.double().cpu().numpy() - y.double().cpu().numpy()).sum(1)
            for x, y in zip(a.split(TILE), b.split(TILE), strict=True)]  # NumPy: torch's order of summing depends on P
    return torch.from_numpy(np.concatenate(sums)).to(a.device)


def fast_squares(a, b):
    """|a_i - b_j|^2 of (n, D), (m, D): float64 (n, m), and how far off an entry may be."""
    a, b = a.double(), b.double()
    squares_a, squares_b = (a * a).sum(1), (b * b).sum(1)
    slack = 4 * a.shape[1] * torch.finfo(torch.float64).eps * (squares_a.max() + squares_b.max())
    return torch.addmm(squares_a[:, None] + squares_b, a, b.T, alpha=-2), slack


def neighbour_radii(features, k=5):
    """Squared distance of each image to its k-th nearest neighbour among the others; (N, D) -> (N,) float64, N > k."""
    features, _ = as_pair(features, features)
    if len(features) <= k:
        raise ValueError(f"{len(features)} images have no {k}-th neighbours")
    few = min(k + 3, len(features) - 1)  # three more: rounding may swap neighbours that are equally far but for 1e-12
    near = torch.full((len(features), few), math.inf, dtype=torch.float64, device=features.device)
    index = torch.zeros(len(features), few, dtype=torch.int64, device=features.device)
    for i, j in tiles(len(features), len(features)):
        if i.start > j.start:  # the table is symmetric
            continue
        squares, _ = fast_squares(features[i], features[j])
        if i.start == j.start:
            squares.fill_diagonal_(math.inf)
        for rows, columns, table in ((i, j, squares), (j, i, squares.T))[: 1 + (i.start < j.start)]:
            found, place = table.topk(min(few, table.shape[1]), largest=False)
            both = torch.cat([near[rows], found], 1), torch.cat([index[rows], place + columns.start], 1)
            near[rows], best = both[0].topk(few, largest=False)
            index[rows] = both[1].gather(1, best)
    radii = [exact_squares(features[i].repeat_interleave(few, 0), features[index[i].flatten()]).view(-1, few)
             for i in (slice(n, n + 512) for n in range(0, len(features), 512))]  # 512: 64 MB of 2,048 features
    return torch.cat(radii).kthvalue(k, 1).values


def balls(real, fake, k=5, real_radii=None):
    """precision, recall, density, coverage: one pass over all pairs; real (N, D), fake (M, D), N and M more than k.

    real_radii: `neighbour_radii` of the real images, if they are known.
    """
    real, fake = as_pair(real, fake)
    r = neighbour_radii(real, k) if real_radii is None else torch.as_tensor(real_radii).to(real.device)
    f = neighbour_radii(fake, k)
    around_fake = torch.zeros(len(fake), dtype=torch.int64, device=real.device)  # real balls that a fake image lies in
    covered, recalled = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for i, j in tiles(len(real), len(fake)):
        squares, slack = fast_squares(real[i], fake[j])
        for radii in (r[i, None], f[None, j]):
            for near in ((squares - radii).abs_() <= slack).nonzero().split(TILE):
                a, b = near.unbind(1)
                squares[a, b] = exact_squares(real[i][a], fake[j][b])
        inside = squares < r[i, None]
        around_fake[j] += inside.sum(0)
        covered[i] |= inside.any(1)
        recalled[i] |= (squares < f[None, j]).any(1)
    precision, recall, number, coverage = (x.double().mean().item() for x in (around_fake > 0, recalled, around_fake, covered))
    return precision, recall, number / k, coverage


def precision_recall(real, fake, k=5):
    """Improved precision and recall (Kynkaanniemi et al. 2019), each in [0, 1]; see above. Exchanging the sets exchanges them.

    k = 5 as in CBDM's code; 3 in the paper that they are from. Both sets need more than k images (else ValueError), and
    more images make smaller balls: equal numbers, or no comparison.
    """
    return balls(real, fake, k)[:2]


def density_coverage(real, fake, k=5):
    """Density (Naeem et al. 2020), 0 or more, about 1 for equal sets, and coverage, in [0, 1]; see above."""
    return balls(real, fake, k)[2:]


# ----------------------------------------------------------------------------------------------------------------------
# Precision and recall of distributions
# ----------------------------------------------------------------------------------------------------------------------
# Sajjadi et al. 2018. Both sets are cut into the same clusters; p and q are the shares of the real and of the fake images in
# each. For every slope lambda in (0, inf), how much of q can be told to be p's, and the reverse:
#
#     precision(lambda) = sum_c min(lambda p_c, q_c),     recall(lambda) = precision(lambda) / lambda
#     F_beta = (1 + beta^2) precision recall / (beta^2 precision + recall), the largest on the curve
ANGLES = 1001  # lambda = tan(angle), equally spaced in (0, pi / 2); the authors' code
CLUSTERINGS = 10  # that the curve is averaged over; the authors' code, CBDM


def prd_f_beta(real, fake, clusters, beta=8, clusterings=CLUSTERINGS, seed=0):
    """F_beta and F_(1/beta) of two sets of features (N, D), (M, D): two numbers in [0, 1].

    The first, F_8, leans to recall: it sees modes that are missing. The second, F_1/8, leans to precision: it sees images
    that are like nothing real. (CBDM's code prints them under exchanged names.)

    clusters      20 for each class in CBDM
    clusterings   over which the curve is averaged. Each draws its own random start, and as many images from the larger
                  set as the smaller has: the clusters would go where the larger one is
    raises        ValueError if a set has fewer images than there are clusters
    """
    real, fake = as_pair(real, fake)
    n = min(len(real), len(fake))
    if n < clusters:
        raise ValueError(f"{clusters} clusters of {n} images")
    curves = []
    for run in range(clusterings):
        rng = np.random.default_rng([seed, run])
        both = torch.cat([x if len(x) == n else x[torch.from_numpy(rng.permutation(len(x))[:n])] for x in (real, fake)])
        mine = k_means(both, clusters, rng)
        p, q = (torch.bincount(part, minlength=clusters).double().cpu().numpy() / n for part in mine.split(n))
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

    A centre is the mean of all rows that it was ever the nearest to, batch after batch. float32: which of two equally near
    clusters a row falls into matters as little as the random start.
    CHOICE: starts from random rows, and takes two passes. scikit-learn's, which papers use, chooses the start with
    more care (k-means++) and takes the best of ten; here the average over clusterings does that.
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
            mine = closest(rows)
            new = torch.bincount(mine, minlength=clusters)
            seen += new
            step = torch.zeros_like(centres).index_add_(0, mine, rows) - new[:, None] * centres
            centres += step / seen.clamp(min=1)[:, None]
    return torch.cat([closest(rows) for rows in x.split(TILE)])


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS
# ----------------------------------------------------------------------------------------------------------------------
# Zhang et al. 2018. How different two images look: AlexNet's five layers, each position's channels scaled to length 1;
#
#     d(x, y) = sum_layers mean_positions sum_channels w_c (f_c(x) - f_c(y))^2
#
# with weights w learnt from human judgements. As a score of a set, its mean over all pairs of images. The sum is a squared
# distance of vectors, and the mean of those over all pairs is twice the unbiased variance, summed over the entries: no
# pairs are needed, n images cost n passes through AlexNet.
LPIPS_WEIGHTS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth"
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]; its `ScalingLayer`
LPIPS_SMALLEST = 31  # pixels a side; below, AlexNet's second pooling has nothing left to pool


class Lpips(typing.NamedTuple):
    layers: torch.nn.Sequential  # AlexNet up to its fifth ReLU
    weights: list  # of the five layers, (C, 1, 1)


def load_lpips(device="cpu"):
    """AlexNet with torchvision's weights, and the published weights of LPIPS (version 0.1). Raises InputError."""
    from torchvision.models import AlexNet_Weights, alexnet

    url = AlexNet_Weights.IMAGENET1K_V1.url
    instead = "leave lpips out of --scores"
    body, heads = fetch_weights(url, instead), fetch_weights(LPIPS_WEIGHTS, instead)
    with torch.device("meta"):  # no memory, no random numbers: AlexNet's last layers, which LPIPS does not use, are 230 MB
        layers = alexnet().features[:-1]
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    try:
        body = {name.removeprefix("features."): w for name, w in body.items() if name.startswith("features.")}
        layers.load_state_dict(body, assign=True)
    except (AttributeError, RuntimeError) as error:
        raise InputError(f"{weights_path(url)} does not hold the weights of {url}; delete it") from error
    try:
        weights = [heads[f"lin{i}.model.1.weight"].view(layer.out_channels, 1, 1) for i, layer in enumerate(convolutions)]
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{weights_path(LPIPS_WEIGHTS)} does not hold the weights of LPIPS; delete it") from error
    sums_on = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
    return Lpips(layers.to(device).eval().requires_grad_(False), [w.to(sums_on).double() for w in weights])


def lpips_features(images, network):
    """images (B, 3, H, W) uint8 on the network's device -> five (B, C, H', W'), channels of length 1 at each position."""
    shift, scale = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (LPIPS_SHIFT, LPIPS_SCALE))
    x, features = (images / 127.5 - 1 - shift) / scale, []
    for layer in network.layers:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            features.append(x / ((x * x).sum(1, keepdim=True).sqrt() + 1e-10))  # 1e-10: as the published code
    return features


@torch.no_grad()
def lpips_diversity(images, network=None, device="cpu", batch_size=100):
    """Mean LPIPS over all pairs of images (N, 3, H, W) uint8, N at least 2, H and W at least 31 pixels; 0: all the same.

    network: an Lpips on `device`; None: `load_lpips`. Its expectation does not depend on N. Raises InputError.
    """
    if len(images) < 2 or min(images.shape[2:]) < LPIPS_SMALLEST:
        raise InputError(f"LPIPS needs two images of {LPIPS_SMALLEST} pixels a side, not {tuple(images.shape)}")
    network, n = network or load_lpips(device), len(images)
    total = squares = [0.0] * 5
    for batch in torch.as_tensor(images).split(batch_size):
        features = [f.to(network.weights[0].device).double() for f in lpips_features(batch.to(device), network)]
        total = [t + f.sum(0) for t, f in zip(total, features, strict=True)]
        squares = [s + (f * f).sum(0) for s, f in zip(squares, features, strict=True)]
    variances = [(s - t * t / n) / (n - 1) for s, t in zip(squares, total, strict=True)]
    return 2 * sum((w * v).sum(0).mean().item() for w, v in zip(network.weights, variances, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Scores of class probabilities, labels and colours
# ----------------------------------------------------------------------------------------------------------------------
def inception_score(probabilities, splits=10):
    """IS = exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and standard deviation over the splits.

    probabilities (N, C), rows sum to 1. From 1 (every row the same) to C (certain of each, all classes equally often).
    The splits are runs of consecutive rows, so rows must be in random order; each has its own p(y).
    """
    p = check_features(probabilities, "probabilities").astype(np.float64)
    if not 1 <= splits <= len(p):
        raise ValueError(f"{splits} splits of {len(p)} rows")
    scores = []
    for rows in np.array_split(p, splits):
        marginal = rows.mean(0)
        # KL = sum p log p - sum p log marginal; the mean over rows turns the p of the second sum into the marginal
        kl = scipy.special.xlogy(rows, rows).sum(1).mean() - scipy.special.xlogy(marginal, marginal).sum()
        scores.append(math.exp(kl))
    return float(np.mean(scores)), float(np.std(scores))


def kl_to_uniform(labels, num_classes):
    """KL(r || uniform) = sum_k r_k log(K r_k), r_k the share of class k among labels (N,).

    From 0 (all K classes equally often) to log K (one class); natural logarithm, 0 log 0 = 0. CBGAN's measure of
    balance, where the labels are what a classifier sees in samples.
    """
    counts = np.bincount(check_labels(labels, labels, "labels"), minlength=num_classes)
    if len(counts) > num_classes:
        raise ValueError(f"label {len(counts) - 1} among {num_classes} classes")
    r = counts / counts.sum()
    return float(scipy.special.xlogy(r, num_classes * r).sum())


HUE_BINS = 12  # 30 degrees each


def effective_hues(images):
    """How many of 12 hues a set of pictures uses: exp(entropy) of the histogram of each picture's main hue; 1 to 12.

    images (N, 3, H, W) uint8, one coloured thing on grey each. A pixel's colour, less its grey, is an arrow whose
    direction is the hue and whose length is the chroma. The mean hue weighted by chroma is the direction of the mean
    arrow; the grey ground drops out. Few images fill few bins: 10 spread over the whole circle score about 7, 50 about
    10.6, 200 about 11.6. Compare equal numbers alone.
    """
    red, green, blue = images.double().mean((2, 3)).unbind(1)
    turns = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi) % 1
    share = torch.bincount((turns * HUE_BINS).long().clamp(max=HUE_BINS - 1), minlength=HUE_BINS) / len(images)
    return math.exp(scipy.special.entr(share.numpy()).sum())


# ----------------------------------------------------------------------------------------------------------------------
# Samples and reference
# ----------------------------------------------------------------------------------------------------------------------
def load_samples(path):
    """images (N, 3, H, W) uint8 and labels (N,) int64 of a samples file; labels None if it has none.

    Raises InputError, naming the file and what was found.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("images", "labels") if "images" in file else ("arr_0", "arr_1")  # the latter: guided-diffusion's
            images, labels = (file[name] if name in file else None for name in names)
    except FileNotFoundError as error:
        raise InputError(f"no samples at {path}") from error
    except Exception as error:  # zip, zlib, NumPy's header and pickle checks, a bare array: each has its own exceptions
        raise InputError(f"{path} is not a samples file, or damaged ({error})") from error
    if images is None:
        raise InputError(f"{path} has neither images nor arr_0")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) < 2:
        raise InputError(f"{path}: images are {images.dtype} {images.shape}, not uint8 (N, H, W, 3) with N > 1")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise InputError(f"{path}: labels are {labels.dtype} {labels.shape}, not integers ({len(images)},)")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def reference_key(dataset, split, rho):
    """Begins the name of a file of features. A long-tailed set has a training split of its own, and nothing else."""
    parts = [dataset, split, f"rho{rho:g}"] if split == "train" and rho else [dataset.removesuffix("lt"), split]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts))  # the name of a folder: may hold anything


def kept(path, made_from, make):
    """The arrays (a dict) of the file at `path` if they are made from `made_from`, a text; else make(), written there."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["made_from"]) == made_from:
                return {name: file[name] for name in file if name != "made_from"}
    except Exception:  # not there, or damaged in one of many ways
        pass
    arrays = make()
    try:
        with atomic_write(path) as file:
            np.savez(file, **arrays, made_from=made_from)
    except InputError as error:  # a data directory that cannot be written to costs time, not the scores
        tqdm.write(f"{path.name} is not kept: {error}")
    return arrays


def reference_file(real, key, network, data_dir):
    """Where the features of an ImageSet are kept, and the text that says of which images and weights they are."""
    weights = network.name if network.info is None else f"classifier-{network.fingerprint[:12]}"
    path = Path(data_dir) / "features" / f"{key}-{real.images.shape[-1]}-{weights}.npz"
    return path, f"{network.fingerprint} {hashlib.sha256(real.images.numpy().tobytes()).hexdigest()}"


def reference_features(real, key, network, data_dir, device, batch_size):
    """Features (N, D) of an ImageSet: from <data_dir>/features/<key>-....npz, or extracted and kept there.

    The file says of which images and which weights it is; for others, or damaged, it is made again.
    """
    path, made_from = reference_file(real, key, network, data_dir)
    return kept(path, made_from, lambda: {
        "features": extract_features(real.images, network, device, batch_size)[0]
    })["features"]  # fmt: skip


def reference_radii(features, parts, file):
    """`neighbour_radii` (N,) within each part that the images (N, D) are cut into, kept beside the features.

    parts   {name: (N,) the part that each image is in}; file: as of `reference_file`
    returns {name: (N,)}, nan where a part has too few images
    """
    path, made_from = file
    cut = hashlib.sha256(b"".join(np.int64(part).tobytes() for part in parts.values())).hexdigest()

    def within(part):
        radii = np.full(len(features), np.nan)
        for p in np.unique(part):
            mine = np.flatnonzero(part == p)
            if len(mine) > NEIGHBOURS:
                radii[mine] = neighbour_radii(features[torch.from_numpy(mine)], NEIGHBOURS).cpu()
        return radii

    path = path.with_name(f"{path.stem}-radii.npz")
    return kept(path, f"{made_from} {cut} {NEIGHBOURS}", lambda: {name: within(part) for name, part in parts.items()})


def load_reference(real, dataset, data_dir, features, reference, rho, device, batch_size=100):
    """The FeatureNetwork that `features` names, and the features (N, D) of the ImageSet `real`; see `evaluate`."""
    classes, size = real.classes, real.images.shape[-1]
    if features is None and dataset.startswith("shapes"):
        judge = frozen_classifier(dataset, data_dir, split="reference", image_size=size, device=device)
        features = f"classifier:{judge.info['path']}"
    network = load_feature_network(features or "inception", device, classes, size)
    return network, reference_features(real, reference_key(dataset, reference, rho), network, data_dir, device, batch_size)


# ----------------------------------------------------------------------------------------------------------------------
# All scores of a set of samples
# ----------------------------------------------------------------------------------------------------------------------
# What --scores takes, and the names of its numbers in metrics.json. fd, precision ... are those of a set of images; for each
# there is intra_..., the mean of the scores within its classes, and intra_..._std, the deviation over classes.
SCORES = {
    "fid": ("fd",), "kid": ("kid",), "pr": ("precision", "recall"), "dc": ("density", "coverage"), "prd": ("f8", "f1_8"),
    "is": (), "lpips": ("lpips",),
}  # fmt: skip
DEFAULT_SCORES = "fid,is"  # seconds after the features; the others compare all pairs of images, or cluster them
NEIGHBOURS = 5  # k of precision, recall, density, coverage: CBDM, Softlabel-GAN
CLUSTERS = 20  # a class, of F_8: CBDM


def chosen_scores(scores):
    """The names in "fid,kid", in ["fid", "kid"] or in "all", a list. Raises InputError."""
    names = [name.strip() for name in scores.split(",")] if isinstance(scores, str) else list(scores)
    names = list(SCORES) if "all" in names else names
    for name in names:
        if name not in SCORES:
            raise InputError(f"unknown score {name!r}; choose from {', '.join(SCORES)}, or all")
    return names


def evaluate(images, labels, dataset, data_dir="data", features=None, reference="reference", rho=None, image_size=None,
             device="cpu", batch_size=100, seen=None, scores=DEFAULT_SCORES):
    """Scores of images (N, 3, H, W) uint8 with the classes (N,) that they were made for.

    labels      tensor; None for a generator without classes: the scores that need none
    features    a name for `load_feature_network`; None: "inception", but for the shapes data their judge, which is
                trained now (seconds) if it is not there
    reference   the split to compare with; rho and image_size as in datasets.load
    seen        (N,) the class that an annotator sees in each sample; None: what the features' own classifier sees, if
                they are a classifier's
    scores      names of SCORES: a list, or one text with commas between; "all": those that can be had (LPIPS needs weights),
                protocol["left_out"] says why one is missing
    returns     {"protocol", "all", "head", "middle", "tail", "per_class"} of plain numbers, ready for JSON. Head,
                middle and tail are thirds of the classes by the number of *training* images. None: could not be
                computed (a class with too few samples, no labels, no classifier).
                    fd                   Fréchet distance, d^2; protocol["metric"] says what to call it
                    kid, precision, recall, density, coverage, f8, f1_8, lpips: if asked for
                    intra_fd, _std       mean and deviation over classes of d^2 within a class; so for each of these
                    intra_fd_classes     over how many: those with enough images on both sides (2; 6 for neighbours; 20 for
                                         F_8, which has a bias even then)
                    recognised           share that classifier or annotator take for the class it was made for
                    seen_share           share of all samples that they take for one of these classes
                    seen                 the same in numbers (per class alone)
                    effective_hues       mean over classes (shapes); reference_hues: of as many real images
                    kid_subsets, _std    mean and deviation over 100 subsets of 1,000, for "all" alone
                    inception_score, _std, kl_to_uniform (of the classes that the classifier sees): for "all" alone
    raises      InputError
    """
    images, labels = torch.as_tensor(images), None if labels is None else torch.as_tensor(labels)
    if rho is None and dataset in datasets.LONG_TAILED:
        rho = datasets.DEFAULT_RHO
    real = datasets.load(dataset, data_dir, reference, image_size, rho)
    train_counts = datasets.load(dataset, data_dir, "train", image_size, rho).counts
    K, size, shapes = len(real.classes), real.images.shape[-1], dataset.startswith("shapes")
    if images.shape[1:] != real.images.shape[1:]:
        raise InputError(f"samples are {images.shape[-2]} x {images.shape[-1]} pixels and {dataset} {size} x {size}; "
                         "--image-size sets the latter")
    if labels is not None and not 0 <= labels.min() <= labels.max() < K:
        raise InputError(f"labels go from {labels.min()} to {labels.max()}; {dataset} has the classes 0 to {K - 1}")
    wanted, left_out, lpips = chosen_scores(scores), [], None
    if "lpips" in wanted:
        try:
            if size < LPIPS_SMALLEST:
                raise InputError(f"LPIPS needs images of {LPIPS_SMALLEST} pixels or more, and {dataset} has {size}")
            lpips = load_lpips(device)
        except InputError as error:
            if scores != "all":
                raise
            left_out, wanted = [str(error)], [name for name in wanted if name != "lpips"]
    network, real_features = load_reference(real, dataset, data_dir, features, reference, rho, device, batch_size)
    fake_features, probabilities = extract_features(images, network, device, batch_size)
    if seen is not None:
        seen = check_labels(seen, images, "seen")
    elif network.info:
        seen = probabilities.argmax(1)

    groups = {"all": range(K), **datasets.thirds(train_counts)}
    pairs_on = device if torch.device(device).type == "cuda" else "cpu"  # MPS has no float64
    real_tensor, fake_tensor = (torch.from_numpy(x).to(pairs_on) for x in (real_features, fake_features))
    radii = {}
    if {"pr", "dc"} & set(wanted):
        third = np.zeros(K, int)
        for i, name in enumerate(("head", "middle", "tail")):
            third[groups[name]] = i
        parts = {"all": np.zeros(len(real.labels), int), "third": third[real.labels], "class": real.labels.numpy()}
        file = reference_file(real, reference_key(dataset, reference, rho), network, data_dir)
        radii = reference_radii(real_tensor, parts, file)
    fields = dict.fromkeys(["fd", *(field for name in wanted for field in SCORES[name])])

    def score(classes, part):
        """Of the samples made for these classes, against the real images of these classes; part: which radii."""
        row = dict.fromkeys(("samples", *fields, "recognised", "seen_share", "effective_hues", "reference_hues"))
        if seen is not None:
            row["seen_share"] = float(np.isin(seen, classes).mean())
        if (labels is None and len(classes) < K) or not len(classes):  # no labels; the tail of two classes
            return row
        mine = np.ones(len(images), bool) if labels is None else np.isin(labels, classes)
        theirs = np.isin(real.labels, classes)
        row["samples"] = int(mine.sum())
        if seen is not None and labels is not None and mine.any():
            row["recognised"] = float((seen == labels.numpy())[mine].mean())
        least = min(mine.sum(), theirs.sum())  # too few images: None
        # All rows are not copied: 50,000 x 2,048 are 400 MB.
        both = [x if rows.all() else x[torch.from_numpy(rows)] for x, rows in ((real_tensor, theirs), (fake_tensor, mine))]
        if "fid" in wanted and least >= 2:
            row["fd"] = frechet_distance(*both)
        if "kid" in wanted and least >= 2:
            row["kid"] = kernel_inception_distance(*both)
        if radii and least > NEIGHBOURS:
            names = ("precision", "recall", "density", "coverage")
            found = dict(zip(names, balls(*both, NEIGHBOURS, radii[part][theirs]), strict=True))
            row |= {name: value for name, value in found.items() if name in fields}
        if "prd" in wanted and part != "third" and least >= CLUSTERS * len(classes):  # thirds: half of the cost
            row["f8"], row["f1_8"] = prd_f_beta(*both, CLUSTERS * len(classes))
        if lpips and mine.sum() >= 2:
            row["lpips"] = lpips_diversity(images[torch.from_numpy(mine)], lpips, device, batch_size)
        return row

    with tqdm(total=len(groups) + K, desc="scores", leave=False, dynamic_ncols=True) as bar:
        per_class, whole = [], {}
        for name, classes in groups.items():
            whole[name] = score(list(classes), "all" if name == "all" else "third")
            bar.update()
        for k, name in enumerate(real.classes):
            row = {"class": k, "name": name, "train_images": int(train_counts[k]), **score([k], "class")}
            row["seen"] = None if seen is None else int((seen == k).sum())
            if shapes and row["samples"]:
                row["effective_hues"] = effective_hues(images[labels == k])
                row["reference_hues"] = effective_hues(real.images[real.labels == k][: row["samples"]])
            per_class.append(row)
            bar.update()

    result = {"protocol": {
        "dataset": dataset, "image_size": size, "rho": rho, "features": network.name, "metric": network.metric,
        "reference": reference, "reference_images": len(real.labels), "samples": len(images), "scores": wanted,
        "labels": labels is not None, "classifier_accuracy": network.info and network.info["test_accuracy"]["all"],
    }, **whole}  # fmt: skip
    if left_out:
        result["protocol"]["left_out"] = left_out
    for group, classes in groups.items():
        rows = [per_class[k] for k in classes]
        for field in fields:
            found = [row[field] for row in rows if row[field] is not None]
            result[group][f"intra_{field}"], result[group][f"intra_{field}_std"] = mean_and_std(found)
            result[group][f"intra_{field}_classes"] = len(found) or None
        for name in ("effective_hues", "reference_hues"):
            result[group][name], _ = mean_and_std(row[name] for row in rows)
    if "kid" in wanted:  # as papers print it
        result["all"]["kid_subsets"], result["all"]["kid_subsets_std"] = kid_of_subsets(real_tensor, fake_tensor)
    if "is" in wanted:
        # Samples often lie class after class; consecutive splits of those would each have few classes.
        shuffled = probabilities[np.random.default_rng(0).permutation(len(probabilities))]
        splits = min(10, len(images))
        result["all"]["inception_score"], result["all"]["inception_score_std"] = inception_score(shuffled, splits)
    result["all"]["kl_to_uniform"] = None if seen is None else kl_to_uniform(seen, K)
    return {**result, "per_class": per_class}


def score_run(where, images, labels, args, device, seen=None, protocol=None, totals=None, per_class=None):
    """Scores, writes and prints the samples of a finished run; the last step of each method's script.

    where       directory of the samples: metrics.json and per_class.csv go there too
    args        the run's settings: dataset, data_dir, features, reference, rho, image_size, scores
    protocol    dict, added to that of the result; totals: to the scores of all; per_class: K dicts, to the classes' rows
    returns     the dict of `evaluate`; None where the features can't be had: the samples are there, which is said
    """
    try:
        result = evaluate(images, labels, args.dataset, args.data_dir, args.features, args.reference, args.rho,
                          args.image_size, device=device, seen=seen, scores=args.scores)
    except InputError as error:  # most often: no weights for the features, and no network to get them
        print(f"{Path(where) / 'samples.npz'} is written but not scored: {error}. Then the same command resumes here.")
        return None
    result["protocol"] |= protocol or {}
    result["all"] |= totals or {}
    if per_class:
        result["per_class"] = [row | more for row, more in zip(result["per_class"], per_class, strict=True)]
    write_scores(result, where)
    print(format_table(result))
    return result


def mean_and_std(values):
    """Of the values that are not None; None, None if all are."""
    values = [x for x in values if x is not None]
    return (float(np.mean(values)), float(np.std(values))) if values else (None, None)


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------
def score_headings(metric):
    """{name of a score: what it is printed as}; metric: what a Fréchet distance is called. KID follows it: KD for FD."""
    return {"fd": metric, "kid": f"K{metric.removeprefix('F')}", "precision": "precision", "recall": "recall",
            "density": "density", "coverage": "coverage", "f8": "F_8", "f1_8": "F_1/8", "lpips": "LPIPS"}  # fmt: skip


def format_table(result, per_class=False):
    """The dict of `evaluate` as text: the protocol; rows for all, head, middle, tail; if asked a row for each class."""
    p = result["protocol"]
    share = p["classifier_accuracy"]
    judge = "" if share is None else f" (right on {share:.1%} of the test images)"
    lines = [f"{p['samples']} samples against {p['reference_images']} images ({p['dataset']}, {p['reference']} split, "
             f"{p['image_size']} pixels); features {p['features']}{judge}"]
    if not p["labels"]:
        lines.append("The samples have no labels: scores of the whole set only.")
    lines += [f"Left out: {reason}" for reason in p.get("left_out", ())]
    score = "IS" if p["metric"] == "FID" else f"IS({p['features'].split(':')[0]})"
    names = score_headings(p["metric"])
    columns = {"samples": "samples", "fd": p["metric"], "intra_fd": f"intra-{p['metric']}", "intra_fd_std": "+-",
               "recognised": "recognised", "seen_share": "seen", "effective_hues": "hues", "reference_hues": "real hues",
               "inception_score": score, "kl_to_uniform": "KL to uniform"}
    groups = {name: result[name] for name in ("all", "head", "middle", "tail")}
    lines += text_table(groups, columns)
    more = {field: heading for field, heading in names.items() if field != "fd" and field in result["all"]}
    if more:
        lines += ["", *text_table(groups, more)]
        within = {f"intra_{field}": heading for field, heading in more.items()}
        if any(result["all"][field] is not None for field in within):
            lines += ["within each class: mean and deviation over the classes"]
            both = {key: heading for field, name in within.items() for key, heading in ((field, name), (f"{field}_std", "+-"))}
            lines += text_table(groups, both)
    K = len(result["per_class"])
    for field, heading in {"fd": p["metric"], **more}.items():
        n = result["all"].get(f"intra_{field}_classes")
        if p["labels"] and field_wanted(p, field) and n is not None and n < K:
            lines.append(f"{heading} within classes: {n} of {K} classes; the others have too few images")
    if per_class:
        columns = {"train_images": "train images", "samples": "samples", **names, "recognised": "recognised",
                   "seen": "seen", "effective_hues": "hues", "reference_hues": "real hues"}
        lines += ["", *text_table({row["name"]: row for row in result["per_class"]}, columns)]
    return "\n".join(lines)


def field_wanted(protocol, field):
    return any(field in SCORES[name] for name in protocol["scores"])


def text_table(rows, columns):
    """Lines of a table. rows {name: dict}, columns {key: heading}; a column with nothing in it is left out."""
    columns = {key: heading for key, heading in columns.items() if any(r.get(key) is not None for r in rows.values())}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {heading:>9}" for heading in columns.values())]
    for name, row in rows.items():
        cells = [(row.get(key), max(9, len(heading))) for key, heading in columns.items()]
        shown = [f"{'-' if x is None else x if isinstance(x, int) else f'{x:.4g}':>{w}}" for x, w in cells]
        lines.append(f"{name:{width}}  " + "  ".join(shown))
    return lines


def beside(where, name):
    """<where>/<name> if `where` is a directory, else <where>-<name>."""
    return Path(where) / name if Path(where).is_dir() else Path(f"{where}-{name}")


def write_scores(result, where):
    """Write metrics.json and per_class.csv: into the directory `where`, or as <where>-metrics.json if it is none.

    Returns the two paths.
    """
    paths = [beside(where, name) for name in ("metrics.json", "per_class.csv")]
    table = io.StringIO()
    writer = csv.DictWriter(table, result["per_class"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["per_class"])
    for path, text in zip(paths, (json.dumps(result, indent=2) + "\n", table.getvalue()), strict=True):
        with atomic_write(path) as file:
            file.write(text.encode())
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------
SMOOTH = 5  # classes; the moving average of CBDM's Fig. 4


def moving_average(values, width=SMOOTH):
    """Centred mean of `width` neighbours, those that are there at the ends and beside a nan; nan where there are none."""
    padded = np.pad(np.asarray(values, np.float64), width // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    there = ~np.isnan(windows)
    total = np.where(there, windows, 0).sum(1)
    return np.where(there.any(1), total / there.sum(1).clip(1), np.nan)


def plot_classes(results, path, score="fd"):
    """A PNG: the score of each class from head to tail, for one or several runs; {name: dict of `evaluate`}.

    Dots are classes, lines moving averages of 5, grey the number of training images. For several runs, the baseline first,
    two more panels: score of the first - score of this one (CBDM, Fig. 4; of a distance, above 0 is better), and score of the
    first / score of this one (Softlabel-GAN, supplement, Figs 6 to 8; above 1 is better; not of KID, which may be below 0).
    Raises InputError without matplotlib, or where no class has the score.
    """
    try:
        import matplotlib.figure  # no pyplot: no window, no state
    except ImportError as error:
        raise InputError("--plot draws with matplotlib, which is not installed: pip install matplotlib") from error
    rows = {name: result["per_class"] for name, result in results.items()}
    counts = np.array([row["train_images"] for row in next(iter(rows.values()))])
    order = np.argsort(-counts, kind="stable")
    values = {name: np.array([row.get(score) for row in table], np.float64)[order] for name, table in rows.items()}
    if all(np.isnan(y).all() for y in values.values()):
        raise InputError(f"no class has a {score} to draw")
    several = len(values) > 1
    panels = 1 if not several else 2 if score == "kid" else 3
    figure = matplotlib.figure.Figure((8, 1.4 + 2.6 * panels), dpi=120, layout="constrained")
    axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]

    def draw(axis, curves, label, level=None):
        behind = axis.twinx()
        behind.fill_between(range(len(order)), counts[order], step="mid", color="0.9", linewidth=0)
        behind.set_ylabel("training images", color="0.5")
        behind.tick_params(colors="0.5")
        behind.set_ylim(0)
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)
        if level is not None:
            axis.axhline(level, color="0.6", linewidth=1)
        for name, y in curves.items():
            i = list(values).index(name)
            axis.plot(y, ".", color=f"C{i}", alpha=0.35, markersize=5)
            axis.plot(moving_average(y), color=f"C{i}", label=name)
        axis.set_ylabel(label)
        axis.spines["top"].set_visible(False)
        behind.spines["top"].set_visible(False)
        axis.legend(frameon=False, loc="best")

    first = next(iter(results))
    protocol = results[first]["protocol"]
    heading = score_headings(protocol["metric"])[score]
    draw(axes[0], values, f"{heading} of the class")
    distance, others = score in ("fd", "kid"), {name: y for name, y in values.items() if name != first}
    if several:
        draw(axes[1], {name: values[first] - y for name, y in others.items()}, "first run - this run", 0)
        axes[1].set_title(f"{heading}, difference to the first run" + "; above 0 is better" * distance, fontsize=10)
    if panels == 3:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = {name: np.where(y != 0, values[first] / y, np.nan) for name, y in others.items()}
        draw(axes[2], ratios, "first run / this run", 1)
        axes[2].set_title(f"{heading} relative to the first run" + "; above 1 is better" * distance, fontsize=10)
    per = sorted({row["samples"] or 0 for table in rows.values() for row in table})
    each = f"{per[0]}" if per[0] == per[-1] else f"{per[0]} to {per[-1]}"
    axes[0].set_title(f"{protocol['dataset']}, {each} samples a class; lines: moving average of {SMOOTH}", fontsize=10)
    axes[-1].set_xlabel("class, from head to tail")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def nearest(fake, real):
    """The row of real (N, D) that each row of fake (M, D) is nearest to, and how far off: (M,) int64, (M,) float64."""
    real, fake = as_pair(real, fake)
    best = torch.full((len(fake),), math.inf, dtype=torch.float64, device=real.device)
    index = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    for i, j in tiles(len(fake), len(real)):
        found, place = fast_squares(fake[i], real[j])[0].min(1)
        index[i] = torch.where(found < best[i], place + j.start, index[i])
        best[i] = torch.minimum(found, best[i])
    return index.cpu(), torch.cat([exact_squares(f, real[n]) for f, n in zip(fake.split(TILE), index.split(TILE), strict=True)]
                                  ).sqrt().cpu()  # fmt: skip


NEAREST_ROWS, NEAREST_PAIRS = 10, 6  # classes, and images of each, in the picture


def nearest_picture(images, labels, network, train, train_features, device="cpu", batch_size=100):
    """A picture of samples, each beside the training image nearest to it in feature space: does the tail memorise?

    Rows go from head to tail: all classes with samples, or ten of them at equal steps, with the first six samples of each.
    """
    from PIL import Image, ImageDraw, ImageFont

    order = [c for c in datasets.head_to_tail(train.counts) if (labels == c).any()]
    classes = [int(order[round(i)]) for i in np.linspace(0, len(order) - 1, min(len(order), NEAREST_ROWS))]
    chosen = [torch.nonzero(labels == c).flatten()[:NEAREST_PAIRS] for c in classes]
    shown = images[torch.cat(chosen)]
    twice = torch.cat([shown, shown[:1]])  # a single image makes no set of features
    index, _ = nearest(extract_features(twice, network, device, batch_size)[0], train_features)
    pairs = iter(zip(shown, train.images[index[:-1]], strict=True))
    size = max(48, images.shape[-1])
    left, top, gap = 170, 22, 12
    sheet = Image.new("RGB", (left + NEAREST_PAIRS * (2 * size + gap), top + len(classes) * (size + 4)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((4, 6), "class, training images", "black", font)
    draw.text((left, 6), "pairs: a sample, and beside it the training image nearest to it", "black", font)
    for row, (c, mine) in enumerate(zip(classes, chosen, strict=True)):
        y = top + row * (size + 4)
        name = train.classes[c].encode("ascii", "replace").decode()[:20]
        draw.text((4, y + size // 2), f"{name}, {int(train.counts[c])}", "black", font, anchor="lm")
        for column in range(len(mine)):
            for side, image in enumerate(next(pairs)):
                tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.NEAREST)
                sheet.paste(tile, (left + column * (2 * size + gap) + side * size, y))
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------
COSTS = """\
what --scores takes, with seconds for 10,000 against 10,000 images, 2,048 features, 100 classes, thirds and classes included
(two cores of an AMD EPYC that other jobs ran on too; without the features themselves; all but lpips together 118 s)
  fid     9 s  Frechet distance, of all and within classes
  is      0 s  Inception Score
  kid    36 s  kernel distance, unbiased, over all pairs of images, and over subsets of 1,000
  pr     48 s  precision and recall, balls to the 5th neighbour; 27 s once the reference's radii are kept
  dc           density and coverage; with pr nothing more
  prd    46 s  F_8 (recall) and F_1/8 (precision), 20 clusters a class, 10 clusterings
  lpips        mean LPIPS over all pairs of samples: a pass through AlexNet each; needs its weights and LPIPS's
kid, pr and dc take four times as long for twice the images on both sides."""


def parse_args():
    parser = argparse.ArgumentParser(description="Scores of files of samples, from head to tail.", epilog=COSTS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.error = fail  # one line where argparse would print the usage too
    parser.add_argument("samples", type=Path, nargs="+",
                        help=".npz: images (N, H, W, 3) uint8 and labels (N,); or arr_0, arr_1")
    group = parser.add_argument_group("what to compare with")
    group.add_argument("--dataset", required=True, help="a name that datasets.py knows")
    group.add_argument("--reference", choices=datasets.SPLITS, default="reference",
                       help="reference (default): the balanced training images; for cifar*imb the test images")
    group.add_argument("--rho", type=float, help="imbalance ratio of a long-tailed set (default: 100)")
    group.add_argument("--image-size", type=int, help="pixels a side (default: the data set's own)")
    group.add_argument("--data-dir", default="data", help="where data sets and their features are kept (default: data)")
    group = parser.add_argument_group("features")
    group.add_argument("--features", help="inception (default), inception-fid (the FID of papers) or classifier:PATH "
                       "(default for shapes: their judge, trained when first needed)")
    group.add_argument("--annotator", metavar="PATH", help="a checkpoint of classifier.py that says which class a sample shows "
                       "(default: that of --features, if it is one)")
    group.add_argument("--device", default="auto", help="auto (default): CUDA, else MPS, else the CPU")
    group.add_argument("--batch-size", type=int, default=100, help="images through the network at once (default: 100)")
    group = parser.add_argument_group("scores")
    group.add_argument("--scores", default=DEFAULT_SCORES, help="names with commas between, or all; their cost below "
                       f"(default: {DEFAULT_SCORES})")
    group = parser.add_argument_group("output")
    group.add_argument("--per-class", action="store_true", help="print a row for each class")
    group.add_argument("--out", type=Path, help="directory for metrics.json and per_class.csv "
                       "(default: beside the samples, as <samples>-metrics.json, <samples>-per_class.csv)")
    group.add_argument("--plot", nargs="?", const="fd", metavar="SCORE", help="write <samples>-SCORE.png: a score of each "
                       "class from head to tail (default: fd), and that of the first file over that of each; needs matplotlib")
    group.add_argument("--nearest", action="store_true",
                       help="write <samples>-nearest.png: samples beside the training images nearest to them")
    args = parser.parse_args()
    chosen_scores(args.scores)
    if args.plot:
        of = [name for name, fields in SCORES.items() if args.plot in fields]
        if not of:
            fail(f"--plot {args.plot}: choose from {', '.join(field for fields in SCORES.values() for field in fields)}")
        if args.scores != "all" and of[0] not in chosen_scores(args.scores):
            fail(f"--plot {args.plot} needs --scores {of[0]}")
        if not importlib.util.find_spec("matplotlib"):  # now, not after the scores
            fail("--plot draws with matplotlib, which is not installed: pip install matplotlib")
    if args.out and len(args.samples) > 1:
        fail("--out goes with one file of samples")
    if args.batch_size < 1:
        fail(f"--batch-size {args.batch_size}: at least 1")
    return args


def main():
    args = parse_args()
    device, results = pick_device(args.device), {}
    where = (args.dataset, args.data_dir)
    if args.out:  # what can fail fails before the scores
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {args.out}: {error}") from error
    samples = {path: load_samples(path) for path in args.samples}
    for path, (images, labels) in samples.items():
        if labels is None and (args.plot or args.nearest):
            fail(f"{path} has no labels, which --plot and --nearest need")
        first = samples[args.samples[0]][0]
        if images.shape[1:] != first.shape[1:]:
            fail(f"{path} has images of {images.shape[-1]} pixels and {args.samples[0]} of {first.shape[-1]}")
    for path, (images, labels) in samples.items():
        seen = None
        if args.annotator:
            classes = datasets.load(*where, args.reference, args.image_size, args.rho).classes
            annotator = load_feature_network(f"classifier:{args.annotator}", device, classes, images.shape[-1])
            seen = extract_features(images, annotator, device, args.batch_size)[1].argmax(1)
        result = evaluate(images, labels, *where, args.features, args.reference, args.rho, args.image_size, device,
                          args.batch_size, seen, args.scores)  # fmt: skip
        print(f"{path}: " * (len(args.samples) > 1) + format_table(result, args.per_class))
        results[str(path)] = result
        out = args.out or path.with_suffix("")
        print("wrote", *write_scores(result, out))
        if args.nearest:
            train = datasets.load(*where, "train", args.image_size, args.rho)
            network, features = load_reference(train, *where, args.features, "train", result["protocol"]["rho"], device,
                                               args.batch_size)  # fmt: skip
            picture = nearest_picture(images, labels, network, train, features, device, args.batch_size)
            with atomic_write(beside(out, "nearest.png")) as file:
                picture.save(file, format="png")
            print("wrote", beside(out, "nearest.png"))
    if args.plot:
        path = beside(args.out or args.samples[0].with_suffix(""), f"{args.plot}.png")
        plot_classes(results, path, args.plot)
        print("wrote", path)


if __name__ == "__main__":
    run_command(main)
