"""Scores of generated images, from head to tail: Fréchet distances, their per-class form, IS, KL to uniform.

    python metrics.py runs/.../samples.npz --dataset cifar100lt                # samples of any codebase
    python metrics.py samples.npz --dataset cifar100lt --features inception-fid

A samples file holds `images` (N, H, W, 3) uint8 and `labels` (N,) int64 (or `arr_0` and `arr_1`). Every score is a pure
function of features; `evaluate` strings them together, and what it prints begins with the protocol: which network, which
reference, how many images on each side. Two numbers compare only where that line is the same.

Three networks, three numbers
- `inception-fid`: the Inception that TensorFlow published in 2015, ported to PyTorch. Its Fréchet distance is the FID
  (Heusel et al. 2017) of papers, CBDM's and CBGAN's among them.
- `inception`: torchvision's Inception-v3, trained anew on ImageNet. The same kind of distance in other features: fit to
  compare runs with each other, not with a paper's FID.
- `classifier:PATH`: a ResNet-32 of classifier.py. Printed as FD. It also says how many samples are recognised as the
  class they were asked for.

Small samples: a Fréchet distance falls as samples are added (its bias is of the order dimensions / images), so
10,000 samples and 50,000 samples of one generator score differently.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import sys
import typing
from pathlib import Path

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
from tqdm import tqdm

import classifier
import datasets

# ------------------------------------------------------------------------------------------------------------------
# Feature networks
# ------------------------------------------------------------------------------------------------------------------

FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")  # the TensorFlow graph of 2015-12-05, ported by M. Seitzer
INCEPTION_SIZE = 299  # pixels a side that Inception-v3 was made for


class FeatureNetwork(typing.NamedTuple):
    """What `load_feature_network` returns. Calling `forward` on (B, 3, H, W) uint8 gives features (B, D), probabilities (B, C)."""

    name: str  # "inception", "inception-fid" or "classifier:PATH"
    metric: str  # what a Fréchet distance in these features may be called
    fingerprint: str  # changes when the weights change
    forward: typing.Callable
    info: dict | None  # of a classifier: its classes, image size, test accuracy; None for an Inception


def load_feature_network(name, device="cpu"):
    """The FeatureNetwork called `name`: "inception", "inception-fid" or "classifier:PATH". Raises InputError."""
    if name in ("inception", "inception-fid"):
        network = load_inception(published_fid=name == "inception-fid", device=device)
        metric = "FID" if name == "inception-fid" else "FID(torchvision)"
        forward = functools.partial(inception_features, network, published_fid=name == "inception-fid")
        return FeatureNetwork(name, metric, name, forward, None)
    if name.startswith("classifier:"):
        path = Path(name.removeprefix("classifier:"))
        network = classifier.load_classifier(path, device)
        return FeatureNetwork(name, "FD", hashlib.sha256(path.read_bytes()).hexdigest(),
                              functools.partial(classifier_features, network), network.info)
    raise datasets.InputError(f"unknown features {name!r}; choose from inception, inception-fid, classifier:PATH")


def classifier_features(network, images):
    """uint8 (B, 3, H, W) -> 64 pooled features, softmax of the logits."""
    features = network.features(images / 127.5 - 1)
    return features, network.head(features).softmax(1)


def inception_features(network, images, published_fid):
    """uint8 (B, 3, H, W) -> 2048 pooled features, class probabilities (1000 classes; 1008 outputs in the 2015 network)."""
    # As pytorch-fid: [0, 1], bilinear without corner alignment or antialiasing, [-1, 1].
    x = F.interpolate(images / 255, (INCEPTION_SIZE,) * 2, mode="bilinear", align_corners=False)
    features = network(2 * x - 1)
    # The published IS leaves the last layer's bias out, because the TensorFlow code multiplies by its weight only.
    logits = F.linear(features, network.output.weight, None if published_fid else network.output.bias)
    return features, logits.softmax(1)


def load_inception(published_fid, device="cpu"):
    """Inception-v3 that maps (B, 3, 299, 299) in [-1, 1] to (B, 2048); its last layer is kept as `.output`."""
    from torchvision.models import Inception_V3_Weights, inception_v3

    url = FID_WEIGHTS if published_fid else Inception_V3_Weights.IMAGENET1K_V1.url
    weights = download_weights(url)
    network = inception_v3(num_classes=1008 if published_fid else 1000, aux_logits=False, init_weights=False)
    try:
        network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("AuxLogits.")})
    except (RuntimeError, AttributeError) as error:
        raise datasets.InputError(f"{cached_weights(url)}: not the weights of Inception-v3; delete it") from error
    if published_fid:
        use_published_pooling(network)
    network.output, network.fc = network.fc, torch.nn.Identity()
    return network.to(device).eval().requires_grad_(False)


def use_published_pooling(network):
    """The pooling of the 2015 network, where torchvision's differs.

    Blocks A and C and the first block E average over the pixels inside the image only (torchvision counts the padding in);
    the last block E takes the maximum instead of the average.
    """
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)

    def pool_with(block, pool):  # torchvision pools inside `forward`; the hooks put our pool's result in its place
        block.register_forward_pre_hook(lambda block, inputs: setattr(block, "pooled", pool(inputs[0])))
        block.branch_pool.register_forward_pre_hook(lambda branch, inputs: (block.pooled,))

    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        pool_with(getattr(network, name), average)
    pool_with(network.Mixed_7c, maximum)


def cached_weights(url):
    """Where torch.hub keeps the file of `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def download_weights(url):
    """State dict from torch.hub's cache, or downloaded into it. Raises InputError that says which file goes where."""
    path = cached_weights(url)
    there = path.exists()
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:
        if there:
            raise datasets.InputError(f"{path} is damaged ({type(error).__name__}); delete it") from error
        raise datasets.InputError(f"no network to fetch {url} ({error}); download it elsewhere and copy it to {path}, "
                                  "or use --features classifier:PATH") from error


@torch.no_grad()
def extract_features(images, network, device="cpu", batch_size=100):
    """images (N, 3, H, W) uint8 -> features (N, D) float32, class probabilities (N, C) float32; NumPy arrays.

    `network`: from `load_feature_network`.
    """
    features, probabilities = [], []
    for batch in tqdm(images.split(batch_size), desc=f"features ({network.name.split(':')[0]})", dynamic_ncols=True):
        f, p = network.forward(batch.to(device))
        features.append(f.float().cpu().numpy())
        probabilities.append(p.float().cpu().numpy())
    return np.concatenate(features), np.concatenate(probabilities)


# ------------------------------------------------------------------------------------------------------------------
# Scores: pure functions of features, float64 inside
# ------------------------------------------------------------------------------------------------------------------
# mu (D,) and S (D, D): mean and unbiased covariance of N features, (N, D).
#     FD^2 = |mu1 - mu2|^2 + Tr(S1) + Tr(S2) - 2 Tr((S1 S2)^(1/2))           Dowson & Landau 1982; Heusel et al. 2017 (FID)
# What is called FID is this square. The last trace is all the work. S1 S2 is not symmetric, so papers' code takes a
# general matrix square root (scipy.linalg.sqrtm). But with any factor S1 = L L^T the eigenvalues of S1 S2 are those of the
# symmetric L^T S2 L, and the trace is the sum of their roots. Two factors come free: the Cholesky factor, and for n <= D
# images the centred features A / sqrt(n - 1) themselves (L = A^T), which needs no D x D matrix at all.


def as_features(features, name):
    """(N, D) NumPy array, as it is; raises ValueError for another shape, fewer than two rows, or NaN."""
    features = features.detach().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name}: need an (N, D) array with N >= 2, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: some features are NaN or infinite")
    return features


def moments(features, chunk=2000):
    """Mean (D,) and unbiased covariance (D, D), float64, of (N, D) features; `chunk` rows at a time to save memory."""
    mean = features.mean(0, dtype=np.float64)
    covariance = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), chunk):
        centred = features[start:start + chunk] - mean
        covariance += centred.T @ centred  # NumPy sees that this is symmetric and does half the work
    return mean, covariance / (len(features) - 1)


def trace_of_root(factor_1, covariance_2):
    """Tr((S1 S2)^(1/2)) with S1 = L L^T: `factor_1` is L, (D, r); S2 (D, D)."""
    eigenvalues = np.linalg.eigvalsh(factor_1.T @ covariance_2 @ factor_1)
    return np.sqrt(np.clip(eigenvalues, 0, None)).sum()  # rounding leaves zeros slightly negative


def frechet_distance_from_moments(mu1, cov1, mu2, cov2):
    """Squared Fréchet distance of two Gaussians: mu (D,), cov (D, D)."""
    mu1, cov1, mu2, cov2 = (np.asarray(x, dtype=np.float64) for x in (mu1, cov1, mu2, cov2))
    try:
        factor = np.linalg.cholesky(cov1)
    except np.linalg.LinAlgError:  # singular: fewer images than dimensions, duplicates, a dead feature
        eigenvalues, vectors = np.linalg.eigh(cov1)
        factor = vectors * np.sqrt(np.clip(eigenvalues, 0, None))
    cross = trace_of_root(factor, cov2)
    return float(max(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross, 0.0))


def frechet_distance(real, fake):
    """Squared Fréchet distance between two sets of features, (N, D) and (M, D); 0 for identical sets. Symmetric."""
    real, fake = as_features(real, "real"), as_features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake {fake.shape[1]}")
    dimensions = real.shape[1]
    if len(real) > dimensions and len(fake) > dimensions:
        return frechet_distance_from_moments(*moments(real), *moments(fake))
    if len(real) > dimensions:
        real, fake = fake, real  # the set with few images gives the factor
    mu1 = real.mean(0, dtype=np.float64)
    a = (real - mu1) / np.sqrt(len(real) - 1)
    if len(fake) > dimensions:
        mu2, cov2 = moments(fake)
        trace_2, cross = np.trace(cov2), trace_of_root(a.T, cov2)
    else:  # S2 = B^T B, so L^T S2 L = (A B^T)(A B^T)^T: the roots are the singular values of A B^T, n x m
        mu2 = fake.mean(0, dtype=np.float64)
        b = (fake - mu2) / np.sqrt(len(fake) - 1)
        trace_2, cross = (b * b).sum(), np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(((mu1 - mu2) ** 2).sum() + (a * a).sum() + trace_2 - 2 * cross, 0.0))


def intra_fid(real, real_labels, fake, fake_labels):
    """Fréchet distance within each class: mean and standard deviation over the classes, and all of them, (K,).

    K = largest label + 1. A class with fewer than two images on either side is nan and left out of mean and deviation.
    """
    real, fake = as_features(real, "real"), as_features(fake, "fake")
    real_labels, fake_labels = np.asarray(real_labels), np.asarray(fake_labels)
    for features, labels, name in ((real, real_labels, "real"), (fake, fake_labels, "fake")):
        if labels.shape != (len(features),):
            raise ValueError(f"{name}: {len(features)} features but labels of shape {labels.shape}")
    per_class = np.full(max(real_labels.max(), fake_labels.max()) + 1, np.nan)
    for k in range(len(per_class)):
        a, b = real[real_labels == k], fake[fake_labels == k]
        if min(len(a), len(b)) >= 2:
            per_class[k] = frechet_distance(a, b)
    if np.isnan(per_class).all():
        return float("nan"), float("nan"), per_class
    return float(np.nanmean(per_class)), float(np.nanstd(per_class)), per_class


def inception_score(probabilities, splits=10):
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and standard deviation over contiguous splits.

    probabilities: (N, C), rows sum to 1. 1 where every row is the same; C where rows are one-hot and classes equally many.
    """
    probabilities = as_features(probabilities, "probabilities")
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), splits):
        marginal = part.mean(0)
        # KL = sum p log p - sum p log marginal, with 0 log 0 = 0
        conditional = scipy.special.xlogy(part, part).sum(1).mean()
        scores.append(math.exp(conditional - scipy.special.xlogy(marginal, marginal).sum()))
    return float(np.mean(scores)), float(np.std(scores))


def kl_to_uniform(labels, num_classes):
    """KL(r || uniform) = sum_k r_k log(K r_k) in nats, r the shares of the labels; 0 balanced, log K all in one class."""
    counts = np.bincount(np.asarray(labels), minlength=num_classes)
    r = counts / counts.sum()
    return float(scipy.special.xlogy(r, r).sum() + math.log(num_classes))


HUE_BINS = 12


def effective_hues(images):
    """exp(entropy) of the histogram over 12 bins of each image's dominant hue: 1 (one colour) to 12 (the whole circle).

    images (N, 3, H, W) uint8, coloured shapes on grey. The mean of pixel hues, as directions weighted by chroma, is the
    direction of the mean colour in the plane across the grey axis; grey pixels have no length there and drop out.
    """
    red, green, blue = images.double().mean(dim=(2, 3)).unbind(1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)  # in (-1/2, 1/2]
    counts = torch.bincount((hue % 1 * HUE_BINS).long().clamp(max=HUE_BINS - 1), minlength=HUE_BINS)
    shares = (counts / counts.sum()).numpy()
    return float(np.exp(scipy.special.entr(shares).sum()))


# ------------------------------------------------------------------------------------------------------------------
# Samples and the reference
# ------------------------------------------------------------------------------------------------------------------


def load_samples(path):
    """images (N, 3, H, W) uint8 and labels (N,) int64 (None where the file has none) of a samples file.

    Keys: images, labels; or arr_0, arr_1 (the guided-diffusion convention). Raises InputError.
    """
    path = Path(path)
    if not path.is_file():
        raise datasets.InputError(f"{path}: no such samples file")
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = ("images", "labels") if "images" in file else ("arr_0", "arr_1")
            images = file[keys[0]]
            labels = file[keys[1]] if keys[1] in file else None
    except Exception as error:
        raise datasets.InputError(f"{path}: not a samples file with images and labels ({error})") from error
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) < 2:
        raise datasets.InputError(
            f"{path}: images must be (N, H, W, 3) uint8 with N >= 2, found {images.shape} {images.dtype}")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise datasets.InputError(
            f"{path}: labels must be ({len(images)},) integers, found {labels.shape} {labels.dtype}")
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def reference_features(reference, dataset, split, network, data_dir, device, batch_size):
    """Features (N, D) of an ImageSet, from <data_dir>/features/, or extracted and kept there."""
    key = dataset.replace("/", "_").replace(":", "_")
    if split != "train":
        key = key.removesuffix("lt").removesuffix("imb")
    size = reference.images.shape[-1]
    path = Path(data_dir) / "features" / f"{key}-{split}-{size}-{network.name.split(':')[0]}.npz"
    digest = hashlib.sha256(reference.images.numpy()).hexdigest()
    fingerprint = f"{network.fingerprint} {digest}"
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["fingerprint"]) == fingerprint:
                return file["features"]
    except Exception:  # absent or damaged: made again
        pass
    features, _ = extract_features(reference.images, network, device, batch_size)
    with datasets.atomic_write(path) as file:
        np.savez(file, features=features, fingerprint=fingerprint)
    return features


# ------------------------------------------------------------------------------------------------------------------
# Everything at once
# ------------------------------------------------------------------------------------------------------------------


def evaluate(images, labels, dataset, data_dir="data", features=None, reference="reference", rho=None,
             image_size=None, seed=0, device="cpu", batch_size=100):
    """All scores of samples: images (N, 3, H, W) uint8 and the labels (N,) they were made for (None: class-free scores).

    `features`: see `load_feature_network`; None takes the judge of the shapes data, or "inception" for anything else.
    Returns a dict of plain numbers: "protocol"; "all", "head", "middle", "tail" (thirds of the classes by training
    counts); "per_class". A score that cannot be computed is None.
    """
    image_size = image_size or images.shape[-1]
    real = datasets.load(dataset, data_dir, split=reference, image_size=image_size, rho=rho, seed=seed)
    counts = datasets.load(dataset, data_dir, split="train", image_size=image_size, rho=rho, seed=seed).counts
    num_classes = len(real.classes)
    if images.shape[1:] != real.images.shape[1:]:
        raise datasets.InputError(f"samples are {tuple(images.shape[2:])}, {dataset} is {tuple(real.images.shape[2:])}")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise datasets.InputError(f"labels {int(labels.min())} to {int(labels.max())}, but {num_classes} classes")
    shapes = dataset.startswith("shapes")
    if features is None and shapes:
        judge = classifier.frozen_classifier(dataset, data_dir, split="reference", image_size=image_size, device=device)
        features = f"classifier:{judge.info['path']}"
    network = load_feature_network(features or "inception", device)

    real_features = reference_features(real, dataset, reference, network, data_dir, device, batch_size)
    fake_features, probabilities = extract_features(images, network, device, batch_size)
    real_labels = real.labels.numpy()
    fake_labels = None if labels is None else labels.numpy()
    predicted = probabilities.argmax(1) if network.info else None

    groups = {"all": np.arange(num_classes), **{k: np.asarray(v) for k, v in datasets.thirds(counts).items()}}
    if labels is not None:
        _, _, intra = intra_fid(real_features, real_labels, fake_features, fake_labels)
        intra = np.append(intra, np.full(num_classes - len(intra), np.nan))
    result = {"protocol": {
        "dataset": dataset, "features": network.name, "metric": network.metric, "reference": reference,
        "reference_images": len(real_labels), "samples": len(images), "image_size": image_size, "rho": rho}}
    for group, classes in groups.items():
        row = dict.fromkeys(["samples", "fd", "intra_fd", "intra_fd_std", "recognised", "effective_hues"])
        result[group] = row
        if labels is None and group != "all":
            continue
        mine = np.isin(fake_labels, classes) if labels is not None else np.ones(len(images), bool)
        theirs = np.isin(real_labels, classes)
        row["samples"] = int(mine.sum())
        if mine.sum() >= 2:
            row["fd"] = frechet_distance(real_features[theirs], fake_features[mine])
        if labels is not None:
            if not np.isnan(intra[classes]).all():
                row["intra_fd"] = float(np.nanmean(intra[classes]))
                row["intra_fd_std"] = float(np.nanstd(intra[classes]))
            if predicted is not None and mine.any():
                row["recognised"] = float((predicted == fake_labels)[mine].mean())
    result["all"]["inception_score"], result["all"]["inception_score_std"] = inception_score(probabilities)
    result["all"]["kl_to_uniform"] = kl_to_uniform(predicted, num_classes) if predicted is not None else None
    result["per_class"] = []
    for k, name in enumerate(real.classes if labels is not None else []):
        mine = fake_labels == k
        row = {"class": k, "name": name, "train_images": int(counts[k]), "samples": int(mine.sum()),
               "fd": None if np.isnan(intra[k]) else float(intra[k]), "recognised": None, "effective_hues": None}
        if mine.any():
            row["recognised"] = float((predicted[mine] == k).mean()) if predicted is not None else None
            row["effective_hues"] = effective_hues(images[torch.from_numpy(mine)]) if shapes else None
        result["per_class"].append(row)
    return result


def format_table(result, per_class=False):
    """The result of `evaluate` as text: the protocol, then one row for all, head, middle and tail (and each class)."""
    p = result["protocol"]
    lines = [f"{p['dataset']} {p['image_size']}x{p['image_size']}: {p['samples']} samples against {p['reference_images']} "
             f"images ({p['reference']} split), features {p['features']}"]
    lines.append(f"{'':8}{p['metric']:>10}{'intra':>10}{'recognised':>12}")

    def cell(value, width):
        return f"{'-' if value is None else format(value, '.3f'):>{width}}"
    for name in ("all", "head", "middle", "tail"):
        row = result[name]
        lines.append(f"{name:8}{cell(row['fd'], 10)}{cell(row['intra_fd'], 10)}{cell(row['recognised'], 12)}")
    return "\n".join(lines)


def write_scores(result, where):
    """`where`: a directory (metrics.json, per_class.csv) or a stem (<stem>-metrics.json, <stem>-per_class.csv)."""
    where = Path(where)
    prefix = where / "" if where.is_dir() else f"{where}-"
    paths = [Path(f"{where}/metrics.json"), Path(f"{where}/per_class.csv")] if where.is_dir() else [
        Path(f"{prefix}metrics.json"), Path(f"{prefix}per_class.csv")]
    with datasets.atomic_write(paths[0]) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    text = io.StringIO()
    if result["per_class"]:
        writer = csv.DictWriter(text, list(result["per_class"][0]))
        writer.writeheader()
        writer.writerows(result["per_class"])
    with datasets.atomic_write(paths[1]) as file:
        file.write(text.getvalue().encode())
    return paths


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage text
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None):
    parser = Parser(description="Score a samples file.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("samples", help=".npz with images (N, H, W, 3) uint8 and labels (N,)")
    parser.add_argument("--dataset", required=True, help="what the samples should look like; any name of datasets.py")
    parser.add_argument("--features", help="inception, inception-fid or classifier:PATH")
    parser.add_argument("--reference", default="reference", choices=["reference", "test", "train"])
    parser.add_argument("--rho", type=float)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--per-class", action="store_true")
    parser.add_argument("--out")
    a = parser.parse_args(argv)
    images, labels = load_samples(a.samples)
    result = evaluate(images, labels, a.dataset, a.data_dir, a.features, a.reference, a.rho, a.image_size,
                      device=a.device, batch_size=a.batch_size)
    print(format_table(result, a.per_class))
    for path in write_scores(result, a.out or Path(a.samples).with_suffix("")):
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except datasets.InputError as error:
        print(f"metrics.py: error: {error}", file=sys.stderr)
        sys.exit(2)
