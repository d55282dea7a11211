"""datasets.py: which images, in which order, with which errors. Fake CIFAR files stand in for a download."""

import argparse
import colorsys
import hashlib
import io
import json
import math
import os
import pickle
import sys
import tarfile
import threading
import tracemalloc
import types
import unicodedata
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import datasets
from datasets import Batches, ImageSet, InputError, atomic_write, head_to_tail, load, thirds

SIZE = 8  # side of the fake images: small, so that 50,000 of them are quick
CIFAR10LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
SHAPESLT = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]


def numbered(n, size=SIZE):
    """(n, size, size, 3) uint8: the first pixel of image i holds the number i: a subset shows its origin."""
    images = np.zeros((n, size, size, 3), np.uint8)
    i = np.arange(n)
    images[:, 0, 0] = np.stack([i % 256, i // 256 % 256, i // 65536], axis=1)
    return images


def numbers(images):
    """The numbers of (N, 3, H, W) images made by numbered()."""
    return (images[:, :, 0, 0].long() * torch.tensor([1, 256, 65536])).sum(1).numpy()


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A data directory with numbered images as CIFAR, classes in mixed order, as in the original files."""
    where = tmp_path_factory.mktemp("cifar")
    for source, k in (("cifar10", 10), ("cifar100", 100)):
        for split, n in (("train", 50_000), ("test", 10_000)):
            labels = np.random.RandomState(k + n).permutation(np.repeat(np.arange(k), n // k))
            classes = np.array([f"class {c}" for c in range(k)])
            path = where / f"{source}-{split}-{SIZE}.npz"
            np.savez(path, images=numbered(n), labels=labels, classes=classes)
    return where


def file_labels(cifar, source):
    with np.load(cifar / f"{source}-train-{SIZE}.npz") as file:
        return file["labels"]


# Long-tailed CIFAR ------------------------------------------------------------------------------------------
def test_counts_of_the_papers(cifar):
    lt10, lt100 = (load(name, cifar, image_size=SIZE) for name in ("cifar10lt", "cifar100lt"))
    assert lt10.counts.tolist() == CIFAR10LT and len(lt10.labels) == 12_406
    assert len(lt100.labels) == 10_847
    assert lt100.counts[[0, 40, 53, 62, 94, 96, 97, 98, 99]].tolist() == [500, 77, 42, 27, 6, 5, 5, 5, 5]
    assert lt10.images.dtype == torch.uint8 and lt10.images.shape == (12_406, 3, SIZE, SIZE)
    assert lt10.labels.dtype == torch.int64 and lt10.counts.dtype == torch.int64
    assert lt100.classes[99] == "class 99" and len(lt100.classes) == 100


@pytest.mark.parametrize("name, k", [("cifar10lt", 10), ("cifar100lt", 100)])
def test_long_tailed_subset_is_the_one_of_ldam(cifar, name, k):
    """As LDAM-DRW's imbalance_cifar.py goes about it: the global generator, seeded with 0, class by class."""
    targets = file_labels(cifar, name.removesuffix("lt"))
    saved = np.random.get_state()
    np.random.seed(0)
    expected = []
    for c in np.unique(targets):
        idx = np.where(targets == c)[0]
        np.random.shuffle(idx)
        expected.extend(idx[: int(50_000 / k * 0.01 ** (c / (k - 1.0)))])
    np.random.set_state(saved)

    data = load(name, cifar, image_size=SIZE)
    assert numbers(data.images).tolist() == expected
    assert data.labels.tolist() == targets[expected].tolist()
    assert len(set(expected)) == len(expected)


def test_rho_and_seed(cifar):
    assert load("cifar10lt", cifar, image_size=SIZE, rho=1).counts.tolist() == [5000] * 10
    ten = load("cifar10lt", cifar, image_size=SIZE, rho=10).counts
    assert (ten[0], ten[9]) == (5000, 500) and (ten[:-1] > ten[1:]).all()
    assert load("cifar100lt", cifar, image_size=SIZE, rho=500).counts.min() == 1

    zero, one = (load("cifar100lt", cifar, image_size=SIZE, seed=seed) for seed in (0, 1))
    assert zero.counts.tolist() == one.counts.tolist()
    assert set(numbers(zero.images)) != set(numbers(one.images))
    assert len(set(numbers(one.images))) == 10_847


@pytest.mark.parametrize("rho", [0.99, 0, -3, float("nan"), float("inf"), 501])
def test_rho_out_of_range(cifar, rho):
    with pytest.raises(InputError, match="rho"):
        load("cifar100lt", cifar, image_size=SIZE, rho=rho)


def test_reference_and_test_splits(cifar):
    for name in ("cifar10", "cifar10lt"):  # the protocol of CBDM: the balanced training images
        assert numbers(load(name, cifar, "reference", SIZE, seed=5).images).tolist() == list(range(50_000))
    imbalanced = load("cifar10imb", cifar, "reference", SIZE)  # Softlabel-GAN: the test images
    test = load("cifar10imb", cifar, "test", SIZE)
    assert len(imbalanced.labels) == 10_000 and torch.equal(imbalanced.labels, test.labels)
    assert load("cifar100lt", cifar, "test", SIZE, rho=50).counts.tolist() == [100] * 100


def test_imbalanced_cifar_of_softlabel_gan(cifar):
    ten, hundred = (load(name, cifar, image_size=SIZE) for name in ("cifar10imb", "cifar100imb"))
    assert ten.counts.tolist() == [267, 99, 441, 191, 85, 1720, 65, 147, 119, 74]  # 99: 99.9985 rounded down
    assert hundred.counts[:10].tolist() == [26, 36, 33, 34, 35, 28, 24, 31, 29, 32]
    assert len(hundred.labels) == 2993 and hundred.counts.max() == 36
    assert hundred.counts.argmin() == 96 and hundred.counts[96] == 6 and hundred.counts[71] == 12
    first_of_each = [np.flatnonzero(file_labels(cifar, "cifar10") == c)[:n] for c, n in enumerate(ten.counts)]
    assert numbers(ten.images).tolist() == np.concatenate(first_of_each).tolist()


def test_a_file_with_too_few_images(tmp_path):
    np.savez(tmp_path / f"cifar10-train-{SIZE}.npz", images=numbered(100), labels=np.arange(100) % 10,
             classes=np.array(list("abcdefghij")))
    with pytest.raises(InputError, match="class 0 needs 267 images"):
        load("cifar10imb", tmp_path, image_size=SIZE)


def test_nobody_elses_random_numbers_are_touched(cifar):
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    for name in ("cifar10lt", "cifar100imb"):
        next(Batches(load(name, cifar, image_size=SIZE), 8, "sqrt", flip=True))
    load("shapeslt", cifar)
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("k, rho, total", [
    (10, 10, 20_431), (10, 50, 13_996), (100, 10, 19_573), (100, 50, 12_608),
])
def test_totals_at_other_ratios(cifar, k, rho, total):
    counts = load(f"cifar{k}lt", cifar, image_size=SIZE, rho=rho).counts
    assert counts.sum() == total and counts[0] == 50_000 // k and counts[-1] == 50_000 // k // rho


def test_the_seed_chooses_the_long_tailed_subset_and_nothing_else(cifar):
    labels, saved = file_labels(cifar, "cifar10"), np.random.get_state()
    np.random.seed(3)
    expected = []
    for c in range(10):
        idx = np.flatnonzero(labels == c)
        np.random.shuffle(idx)
        expected.extend(idx[: int(5000 * 0.1 ** (c / 9))])
    np.random.set_state(saved)
    assert numbers(load("cifar10lt", cifar, image_size=SIZE, rho=10, seed=3).images).tolist() == expected
    for name, split in (("cifar10lt", "test"), ("cifar10imb", "train")):
        one, other = (load(name, cifar, split, SIZE, seed=seed) for seed in (0, 3))
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("name, reference", [
    ("cifar100", "train"), ("cifar100lt", "train"), ("cifar100imb", "test"),
])
def test_reference_of_cifar100(cifar, name, reference):
    data = load(name, cifar, "reference", SIZE)
    with np.load(cifar / f"cifar100-{reference}-{SIZE}.npz") as file:
        assert data.labels.tolist() == file["labels"].tolist()
    assert numbers(data.images).tolist() == list(range(len(data.labels)))
    assert len(set(data.counts.tolist())) == 1


def test_fingerprint_hashes_the_bytes_without_copying_them():
    def expected(images, labels):
        return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]

    images = torch.arange(3_000_000).to(torch.uint8).reshape(-1, 3, 100, 100)
    labels = torch.arange(len(images))
    known = expected(images, labels)
    tracemalloc.start()
    try:
        assert ImageSet(images, labels, ["a"]).fingerprint == known
        assert tracemalloc.get_traced_memory()[1] < images.nbytes / 10
    finally:
        tracemalloc.stop()
    lying = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as of a prepared file
    tracemalloc.start()
    try:
        assert ImageSet(lying, labels, ["a"]).fingerprint == known
        assert tracemalloc.get_traced_memory()[1] < images.nbytes / 2  # 32 images of 100
    finally:
        tracemalloc.stop()
    turned = images.mT  # not contiguous: the bytes that count are those of a contiguous copy
    assert ImageSet(turned, labels, ["a"]).fingerprint == expected(turned.contiguous(), labels) != known


def test_imbalanced_tiny_imagenet(tmp_path, monkeypatch):
    """47,602 images, 41 to 483 a class: the paper, §5.1. The first ten classes and the places of the extremes
    were computed from the official file's law with another program."""
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(200), 500))
    classes = np.array([f"n{c:08d}" for c in range(200)])
    for split, n in (("train", 100_000), ("test", 10_000)):
        np.savez(tmp_path / f"tinyimagenet-{split}-{SIZE}.npz", images=numbered(n), labels=labels[:n],
                 classes=classes)
    data = load("tinyimagenetimb", tmp_path, image_size=SIZE)
    assert len(data.labels) == 47_602 and (data.counts.min(), data.counts.max()) == (41, 483)
    assert data.counts[:10].tolist() == [417, 47, 439, 66, 140, 451, 478, 68, 117, 383]
    assert (data.counts.argmin(), data.counts.argmax()) == (94, 15)
    assert numbers(data.images[data.labels == 94]).tolist() == np.flatnonzero(labels == 94)[:41].tolist()
    assert len(load("tinyimagenetimb", tmp_path, "reference", SIZE).labels) == 10_000  # the validation set
    balanced = load("tinyimagenet", tmp_path, "reference", SIZE)
    assert len(balanced.labels) == 100_000 and balanced.counts.unique().tolist() == [500]


# Names and arguments ----------------------------------------------------------------------------------------
def test_unknown_names_are_answered_with_known_ones(tmp_path):
    with pytest.raises(InputError, match="'cifar100tl'.*did you mean cifar100lt"):
        load("cifar100tl", tmp_path)
    with pytest.raises(InputError, match="cifar10imb.*folder:PATH"):
        load("zzz", tmp_path)
    with pytest.raises(InputError, match="split"):
        load("shapes", tmp_path, "valid")


@pytest.mark.parametrize("name", ["shapes", "cifar10", "cifar100imb"])
def test_rho_where_there_is_none(tmp_path, name):
    with pytest.raises(InputError, match="rho"):
        load(name, tmp_path, rho=10)


@pytest.mark.parametrize("name", ["shapes", "cifar10imb", "folder:/somewhere"])
def test_a_step_needs_rho(tmp_path, name):
    with pytest.raises(InputError, match="imbalance step needs rho"):
        load(name, tmp_path, imbalance="step")


def test_step_imbalance(cifar):
    counts = datasets.long_tailed_counts
    assert counts(10, 5, 4, "step").tolist() == [10, 10, 10, 2, 2]  # 10 / 4 rounded down
    assert counts(49, 2, 49).tolist() == counts(49, 2, 49, "step").tolist() == [49, 1]  # 49 * (1 / 49) < 1
    assert counts(7, 1, 7).tolist() == counts(7, 1, 7, "step").tolist() == [7]
    with pytest.raises(InputError, match="leaves the last class without an image"):
        counts(10, 4, 11, "step")
    exp, step = (load("cifar10lt", cifar, image_size=SIZE, seed=3, imbalance=i) for i in ("exp", "step"))
    assert step.counts.tolist() == [5000] * 5 + [50] * 5
    ends = [numbers(data.images[data.labels == 0]).tolist() for data in (exp, step)]
    assert ends[0] == ends[1]  # the same draws
    assert load("shapeslt", ".", rho=10, imbalance="step").counts.tolist() == [1000] * 5 + [100] * 5
    assert load("shapeslt", ".", "test", rho=10, imbalance="step").counts.tolist() == [200] * 10


@pytest.mark.parametrize("name, size", [("shapes", 0), ("shapes", 129), ("cifar10", 7), ("folder:x", 2000)])
def test_image_sizes_that_make_no_sense(tmp_path, name, size):
    with pytest.raises(InputError, match=f"image size is {size}"):
        load(name, tmp_path, image_size=size)


def test_seed_out_of_range(tmp_path):
    with pytest.raises(InputError, match="seed is -1"):
        load("shapes", tmp_path, seed=-1)


def test_error_messages_are_one_line():
    assert str(InputError("first\nsecond")) == "first second"


# Head to tail -----------------------------------------------------------------------------------------------
def test_head_to_tail_and_thirds():
    assert head_to_tail([3, 9, 3, 100]).tolist() == [3, 1, 0, 2]  # equal counts stay in label order
    twos_and_ones = [1, 2] * 50  # many, because NumPy's default sort happens to be stable for a few
    assert head_to_tail(twos_and_ones).tolist() == [*range(1, 100, 2), *range(0, 100, 2)]
    assert head_to_tail(torch.tensor([1, 2])).tolist() == [1, 0]
    parts = thirds(torch.arange(10))
    parts = {name: indices.tolist() for name, indices in parts.items()}
    assert parts == {"head": [9, 8, 7, 6], "middle": [5, 4, 3], "tail": [2, 1, 0]}
    assert [len(part) for part in thirds(np.ones(100)).values()] == [34, 33, 33]


# Shapes -----------------------------------------------------------------------------------------------------
def hues(images):
    """Hue, in turns, of the most saturated pixel of each image. (Antialiasing adds grey, which keeps it.)"""
    result = []
    for image in images.numpy().reshape(len(images), 3, -1):
        pixel = image[:, (image.max(0).astype(int) - image.min(0)).argmax()]
        result.append(colorsys.rgb_to_hsv(*(pixel / 255))[0])
    return np.array(result)


def arc(turns):
    """The shortest arc of the circle (1 is all of it) that holds all of these angles."""
    turns = np.sort(turns % 1)
    return 1 - np.diff(np.append(turns, turns[0] + 1)).max()


def test_shapes_counts(tmp_path):
    sets = {(name, split): load(name, tmp_path, split)
            for name in ("shapes", "shapeslt") for split in datasets.SPLITS}
    assert sets["shapes", "train"].counts.tolist() == [1000] * 10
    assert sets["shapeslt", "train"].counts.tolist() == SHAPESLT
    for name in ("shapes", "shapeslt"):
        assert sets[name, "reference"].counts.tolist() == [400] * 10
        assert sets[name, "test"].counts.tolist() == [200] * 10
    assert sets["shapes", "train"].images.shape == (10_000, 3, 16, 16)
    assert sets["shapes", "train"].images.dtype == torch.uint8
    assert sets["shapes", "train"].classes[::3] == ["disc", "ring", "heart", "vbars"]
    assert load("shapeslt", tmp_path, rho=10).counts[[0, 9]].tolist() == [1000, 100]
    assert load("shapeslt", tmp_path, "test", image_size=24).images.shape == (2000, 3, 24, 24)
    assert not list(tmp_path.iterdir())  # no files

    distinct = {image.numpy().tobytes() for s in datasets.SPLITS for image in sets["shapes", s].images}
    assert len(distinct) == 10_000 + 4000 + 2000  # no image twice, so the splits are disjoint


def test_each_shape_is_drawn_once(tmp_path, monkeypatch):
    """What a first look costs: scripts load the same splits again and again."""
    drawn = []

    def counting(inside, u, *args, draw_shape=datasets.draw_shape):
        drawn.append(len(u))
        return draw_shape(inside, u, *args)

    monkeypatch.setattr(datasets, "draw_shape", counting)
    datasets.draw_shapes.cache_clear()
    for _ in range(3):
        for split in datasets.SPLITS:
            load("shapeslt", tmp_path, split, image_size=8)
    assert drawn == [*SHAPESLT, *[400] * 10, *[200] * 10]


def test_a_caller_cannot_change_the_set_of_another(tmp_path):
    mine, yours = (load("shapes", tmp_path, "test", image_size=8) for _ in range(2))
    images, labels, classes = yours.images.clone(), yours.labels.clone(), list(yours.classes)
    x, y = next(Batches(mine, 50, flip=True))
    x.zero_(), y.zero_()
    mine.labels = 1 - mine.labels
    mine.images = mine.images[:5]
    mine.classes.append("a new one")
    for other in (yours, load("shapes", tmp_path, "test", image_size=8)):
        assert torch.equal(other.images, images) and torch.equal(other.labels, labels)
        assert other.classes == classes


def test_shapes_are_the_same_every_time(tmp_path):
    def drawn(split, seed):
        datasets.draw_shapes.cache_clear()  # so that they are drawn again
        return load("shapeslt", tmp_path, split, image_size=8, seed=seed)

    for split in datasets.SPLITS:
        first, again, other = (drawn(split, seed) for seed in (3, 3, 4))
        assert first.images.data_ptr() != again.images.data_ptr()
        assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
        assert torch.equal(first.images, other.images) == (split != "train")  # the rest has no seed
    long, longer = (load("shapeslt", tmp_path, image_size=8, rho=rho) for rho in (10, 100))
    tail = longer.images[longer.labels == 9]
    assert torch.equal(long.images[long.labels == 9][: len(tail)], tail)  # the shorter tail is part of it


def test_hues_narrow_from_head_to_tail_in_the_training_split_alone(tmp_path):
    narrow = load("shapeslt", tmp_path, rho=1)  # 1000 images a class, to measure the arcs well
    for c in range(10):
        assert arc(hues(narrow.images[narrow.labels == c])) == pytest.approx(1 - 0.75 * c / 9, abs=0.02)
    tail = load("shapeslt", tmp_path)
    assert arc(hues(tail.images[tail.labels == 9])) <= 0.255
    of_tail = [hues(narrow.images[narrow.labels == c]) for c in (7, 8, 9)]
    middles = [np.angle(np.exp(2j * np.pi * turns).mean()) for turns in of_tail]
    assert np.abs(np.exp(1j * np.array(middles)).sum()) < 1.5  # 3 if the tail classes all had the same colour
    for name, split in (("shapes", "train"), ("shapeslt", "reference"), ("shapeslt", "test")):
        wide = load(name, tmp_path, split)
        assert all(arc(hues(wide.images[wide.labels == c])) > 0.94 for c in range(10))


def test_shapes_fit_in_the_frame_and_are_their_own_mirror_images():
    axis = np.linspace(-2, 2, 801)
    axis = (axis - axis[::-1]) / 2  # exactly symmetric
    x, y = np.meshgrid(axis, axis)
    for name, inside in datasets.SHAPES.items():
        covered = inside(x, y)
        assert 0.75 * np.hypot(x, y)[covered].max() + 0.2 < 1, name  # at the largest scale and offset
        assert covered.sum() * 0.005**2 > 1, name  # of the disc's 3.14: not a speck
        assert (covered != covered[:, ::-1]).mean() < 1e-4, name
    data = load("shapes", ".", "test")
    corners = data.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].float()
    assert (corners.amax(1) == corners.amin(1)).all() and corners.max() <= 128  # grey, up to 0.5


def test_place_size_and_colour_of_the_shapes(monkeypatch):
    """Measured on discs of 64 x 64 pixels. Their radius is .85 of the scale; a pixel is 1/32 half widths."""
    monkeypatch.setattr(datasets, "SHAPES", dict([*datasets.SHAPES.items()][:2]))  # quicker than all ten
    images, _ = datasets.draw_shapes.__wrapped__("test", 64, rho=1, seed=0, narrow_hues=False)
    images = images[:200].numpy()
    chroma = images.max(1).astype(int) - images.min(1)
    covered = chroma > chroma.max((1, 2), keepdims=True) / 2
    spans = [[np.flatnonzero(disc.any(axis))[[0, -1]] + (0, 1) for axis in (0, 1)] for disc in covered]
    low, high = np.moveaxis(np.array(spans) / 32 - 1, -1, 0)
    scale, centre = (high - low) / 2 / 0.85, (high + low) / 2
    assert 0.48 < scale.min() < 0.52 and 0.73 < scale.max() < 0.77
    for axis in (0, 1):
        assert -0.22 < centre[:, axis].min() < -0.18 and 0.18 < centre[:, axis].max() < 0.22
    brightest = chroma.reshape(200, -1).argmax(1)
    brightest = images.reshape(200, 3, -1)[np.arange(200), :, brightest]
    value, saturation = brightest.max(1) / 255, 1 - brightest.min(1) / brightest.max(1)
    assert 0.845 < value.min() < 0.87 and value.max() > 0.98
    assert 0.745 < saturation.min() < 0.77 and saturation.max() > 0.98
    ground = images[:, 0, 0, 0] / 255
    assert ground.min() < 0.02 and 0.48 < ground.max() < 0.505


def test_shapes_can_be_told_apart_at_16_pixels():
    """By the nearest of 400 x 10 silhouettes, a weak rule: place, size and rotation vary."""
    def silhouettes(split):
        images = load("shapes", ".", split).images.float()
        chroma = (images.amax(1) - images.amin(1)).flatten(1)
        return chroma / chroma.norm(dim=1, keepdim=True)

    nearest = (silhouettes("test") @ silhouettes("reference").T).argmax(1) // 400
    right = nearest == torch.arange(10).repeat_interleave(200)
    assert right.float().mean() > 0.9
    assert right.reshape(10, 200).float().mean(1).min() > 0.75


def test_shapes_are_mirror_images_of_themselves_on_average_too():
    """In the pictures, so with places and rotations: neither may favour a side."""
    data = load("shapes", ".")
    upside_down = {}
    for c, name in enumerate(data.classes):
        images = data.images[data.labels == c].float()
        chroma = images.amax(1) - images.amin(1)
        mean = (chroma / chroma.amax((1, 2), keepdim=True)).mean(0)
        assert (mean - mean.flip(1)).abs().max() < 0.1, name  # standard error of a pixel: about 0.02
        upside_down[name] = (mean - mean.flip(0)).abs().max()
    # The same measure finds the asymmetry of those that have one.
    assert min(upside_down[name] for name in ("triangle", "heart", "crescent")) > 0.25


def test_middles_of_the_arcs_are_golden_sections_apart():
    narrow = load("shapeslt", ".", rho=1)
    for c in range(1, 10):
        mean = np.exp(2j * np.pi * hues(narrow.images[narrow.labels == c])).mean()
        if abs(mean) > 0.3:  # an arc close to the full circle has no clear middle
            assert abs(np.angle(mean / np.exp(2j * np.pi * 0.6180339887 * c))) < 0.2, c
    assert abs(mean) > 0.8  # the tail: sinc(1/4) = 0.90
    wide = load("shapeslt", ".", "reference")
    assert max(abs(np.exp(2j * np.pi * hues(wide.images[wide.labels == c])).mean()) for c in range(10)) < 0.15


def test_ground_is_one_grey_in_every_corner():
    images = load("shapes", ".", "test").images
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == corners[:, :1, :1]).all()
    assert corners.max() > 122 and corners.min() < 5  # from black to a middle grey


@pytest.mark.parametrize("size", [16, 32])
def test_other_sizes_show_the_same_shapes(size):
    small, data = (load("shapes", ".", "test", image_size=side).images for side in (8, size))
    shrunk = torch.nn.functional.avg_pool2d(data.float(), size // 8)
    assert (shrunk - small).abs().mean() < 1.5 and (shrunk.roll(1, 0) - small).abs().mean() > 15


# Batches ----------------------------------------------------------------------------------------------------
def small_set(counts, size=4):
    """Numbered images, classes interleaved in a fixed random order."""
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    images = torch.from_numpy(numbered(len(labels), size)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.from_numpy(labels), [str(c) for c in range(len(counts))])


def drawn(batches, number):
    """The numbers and labels of this many batches, checked against each other."""
    x, y = (torch.cat(parts) for parts in zip(*(next(batches) for _ in range(number)), strict=True))
    images = ((x + 1) * 127.5).round()
    i = numbers(images)
    return i, y


@pytest.mark.parametrize("batch_size", [1, 7, 10, 64])
def test_every_image_once_an_epoch(batch_size):
    data = small_set([20, 8, 2])  # 30 images: batches straddle the epochs, and 64 is more than two of them
    i, y = drawn(Batches(data, batch_size, seed=1), -(-90 // batch_size))
    assert (y == data.labels[i]).all()
    epochs = [i[start : start + 30].tolist() for start in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("classes, expected", [
    ("data", np.array([100, 25, 9, 1]) / 135), ("uniform", np.full(4, 0.25)),
    ("sqrt", np.array([10, 5, 3, 1]) / 19),
])
def test_class_frequencies(classes, expected):
    data = small_set([100, 25, 9, 1])
    i, y = drawn(Batches(data, 1000, classes, seed=2), 40)
    assert (y == data.labels[i]).all()
    share = np.bincount(y, minlength=4) / 40_000
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 40_000)  # four standard deviations
    of_head = np.bincount(i, minlength=135)[data.labels == 0]  # images of one class come up equally often
    assert (np.abs(of_head - of_head.mean()) < 5 * np.sqrt(of_head.mean())).all()


@pytest.mark.parametrize("classes", ["data", "uniform", "sqrt"])
def test_a_resumed_stream_is_the_stream_that_was_never_stopped(classes):
    data = small_set([20, 8, 2])
    straight, stopped = (Batches(data, 7, classes, flip=True, seed=3) for _ in range(2))
    for _ in range(6):  # to the middle of the second epoch
        next(straight), next(stopped)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    next(stopped)  # what is saved must not move with the stream it was saved from
    resumed = Batches(data, 7, classes, flip=True, seed=99)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for _ in range(20):
        (x1, y1), (x2, y2) = next(straight), next(resumed)
        assert torch.equal(x1, x2) and torch.equal(y1, y2)


def test_state_dict_is_a_copy():
    batches = Batches(small_set([30]), 7, seed=3)
    next(batches)
    state = batches.state_dict()
    x1, _ = next(batches)
    next(batches)
    batches.load_state_dict(state)
    assert torch.equal(next(batches)[0], x1)


def test_seeds_give_different_streams_and_one_seed_the_same():
    one, same, other = (drawn(Batches(small_set([30]), 30, seed=seed), 1)[0].tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_flip():
    image = torch.arange(3 * 2 * 5, dtype=torch.uint8).reshape(1, 3, 2, 5)
    data = ImageSet(image, torch.zeros(1, dtype=torch.int64), ["a"])
    upright, mirrored = image[0] / 127.5 - 1, image[0][:, :, [4, 3, 2, 1, 0]] / 127.5 - 1
    x, _ = next(Batches(data, 2000, flip=True))
    is_upright, is_mirrored = (torch.isclose(x, other).all((1, 2, 3)) for other in (upright, mirrored))
    assert (is_upright ^ is_mirrored).all()
    assert 900 < is_mirrored.sum() < 1100  # 1000 +- 4.5 standard deviations
    assert torch.isclose(next(Batches(data, 50))[0], upright).all()


def test_range_and_types():
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(1, 3, 3, 3).contiguous()
    x, y = next(Batches(ImageSet(image, torch.tensor([0]), ["a"]), 4))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (4, 3, 3, 3) and y.shape == (4,)
    assert x[0, 0, 0].tolist() == pytest.approx([-1, 1, -0.6]) and x.min() == -1 and x.max() == 1


@pytest.mark.parametrize("flip", [False, True])
def test_batches_do_not_show_how_the_images_lie_in_memory(flip):
    prepared = np.random.RandomState(0).randint(0, 256, (30, 6, 6, 3)).astype(np.uint8)
    data = datasets.image_set(prepared, np.arange(30) % 3, list("abc"))
    assert data.images.data_ptr() == prepared.ctypes.data  # no copy
    other = ImageSet(data.images.contiguous(), data.labels, data.classes)
    (x1, y1), (x2, y2) = (next(Batches(d, 8, flip=flip)) for d in (data, other))
    assert x1.is_contiguous() and x1.stride() == x2.stride() and torch.equal(x1, x2) and torch.equal(y1, y2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("classes", ["data", "uniform", "sqrt"])
def test_the_order_is_the_same_on_a_gpu(classes):
    data = small_set([20, 8, 2])
    cpu, gpu = (Batches(data, 7, classes, flip=True, device=device) for device in ("cpu", "cuda"))
    for _ in range(10):
        (x1, y1), (x2, y2) = next(cpu), next(gpu)
        assert x2.is_cuda and y2.is_cuda and torch.equal(x1, x2.cpu()) and torch.equal(y1, y2.cpu())


def test_batches_that_cannot_be():
    data = small_set([3, 2])
    with pytest.raises(ValueError, match="balanced"):
        Batches(data, 2, "balanced")
    with pytest.raises(ValueError, match="batch_size"):
        Batches(data, 0)
    with pytest.raises(ValueError, match="class 2 has no image"):
        Batches(ImageSet(data.images, data.labels, ["a", "b", "c"]), 2, "uniform")


@pytest.mark.parametrize("classes", ["data", "uniform", "sqrt"])
def test_images_of_a_class_come_up_equally_often(classes):
    data = small_set([100, 25, 9, 1])
    i, y = drawn(Batches(data, 1000, classes, flip=False, seed=4), 40)
    times, of_class = np.bincount(i, minlength=135), np.bincount(y, minlength=4) / [100, 25, 9, 1]
    expected = of_class[data.labels]
    assert (np.abs(times - expected) < 5 * np.sqrt(expected)).all()


def test_empty_sets_and_empty_classes():
    data = small_set([3, 2])
    with pytest.raises(ValueError, match="has 0 images"):
        Batches(ImageSet(data.images[:0], data.labels[:0], data.classes), 2)
    hollow = ImageSet(data.images, data.labels, ["a", "b", "c"])
    i, _ = drawn(Batches(hollow, 5), 1)  # in proportion to n_c a class of none is no trouble
    assert sorted(i.tolist()) == [0, 1, 2, 3, 4]


# Devices ----------------------------------------------------------------------------------------------------
def test_a_class_with_a_comma_in_its_name(tmp_path):
    args = types.SimpleNamespace(export=str(tmp_path / "there"), classes=["Finch, zebra", "kiwi, owl"])
    classes = ["Finch, zebra", "kiwi", "owl", "zebra"]
    network = torch.nn.Linear(1, 1)
    assert datasets.open_export(args, network, classes) == {"Finch, zebra": 0, "kiwi": 1, "owl": 2}
    args.classes = None
    assert list(datasets.open_export(args, network, classes).values()) == [0, 1, 2, 3]


def test_work_is_not_shared_where_one_process_is_alone(monkeypatch):
    monkeypatch.setattr(datasets, "WORLD", 2)
    assert datasets.my_part(10) == slice(0, 5)
    monkeypatch.setattr(datasets, "ALONE", [True])
    assert datasets.my_part(10) == slice(10)


@pytest.mark.parametrize("dataset, seconds, said", [
    ("cifar10", 1, ""), ("cifar10", 100, "; on a CPU, try `python cbdm.py --dataset shapeslt` first"),
    ("folder:x", 100, "; on a CPU, try `--image-size 32 --steps 1100`, which takes about 7.6 hours, first"),
    ("folder:x", 9, "; on a CPU, try `--image-size 32 --steps 10000`, which takes about 6.2 hours, first"),
])
def test_a_training_of_days_on_a_cpu(dataset, seconds, said, tmp_path, monkeypatch, capsys):
    """100 s at 64 pixels are 25 s at 32: 1,100 steps in 8 hours."""
    args = argparse.Namespace(dataset=dataset, image_size=64, steps=10_000, run_dir=str(tmp_path))
    log = datasets.Log(args, ("loss",), torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["cbdm.py"])
    clock = iter(range(0, 10**6, 10 * seconds))  # from step 5 to 15
    monkeypatch.setattr(datasets.time, "monotonic", lambda: next(clock))
    with log.open(0, 10_000):
        for _ in range(15):
            log.add(torch.zeros(()))
    line = capsys.readouterr().out.strip()
    assert f"{seconds} s a step" in line and line.partition("memory")[2] == said and "\n" not in line


def test_devices_that_are_not_there():
    assert datasets.pick_device("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name} can't be used: ") as caught:
            datasets.pick_device(name)
        assert "\n" not in str(caught.value)
    cpu = torch.device("cpu")
    assert datasets.use_bf16("bf16", cpu) and not datasets.use_bf16("off", cpu)


# Files ------------------------------------------------------------------------------------------------------
def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"old")
        assert not path.exists()
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # as readable to others as any file one writes
    for stop in (ValueError, KeyboardInterrupt):
        with pytest.raises(stop), atomic_write(path) as file:
            file.write(b"half")
            raise stop
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]
    with pytest.raises(InputError, match="cannot write"), atomic_write(path / "below a file"):
        pass


def prepared_arrays():
    return dict(images=numbered(20), labels=np.arange(20) % 10, classes=np.array(list("abcdefghij")))


@pytest.fixture(params=["read", "mapped"])
def large(request, monkeypatch):
    """Prepared files are read as small ones are, or mapped as large ones."""
    monkeypatch.setattr(datasets, "MAPPED_FROM", {"read": 2**28, "mapped": 0}[request.param])


@pytest.mark.parametrize("change", [
    lambda a: a.pop("labels"),
    lambda a: a.update(images=a["images"].astype(np.float32)),
    lambda a: a.update(images=a["images"].transpose(0, 3, 1, 2)),
    lambda a: a.update(images=a["images"][:, :, :-1]),
    lambda a: a.update(labels=a["labels"].astype(np.int32)),
    lambda a: a.update(labels=a["labels"][:-1]),
    lambda a: a.update(labels=a["labels"] + 1),
    lambda a: a.update(labels=a["labels"] - 1),
    lambda a: a.update(classes=np.arange(10)),
    lambda a: a.update(images=a["images"][:0], labels=a["labels"][:0]),
])
def test_prepared_files_with_something_else_in_them(tmp_path, change, large):
    arrays, path = prepared_arrays(), tmp_path / f"cifar10-test-{SIZE}.npz"
    np.savez(path, **arrays)
    assert len(load("cifar10", tmp_path, "test", SIZE).labels) == 20
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"cifar10-test-8\.npz .* delete it"):
        load("cifar10", tmp_path, "test", SIZE)


def test_damaged_prepared_files(tmp_path, large):
    path = tmp_path / f"cifar10-test-{SIZE}.npz"
    np.savez(path, **prepared_arrays())
    whole = path.read_bytes()
    array = io.BytesIO()
    np.save(array, numbered(2))
    flipped = bytearray(whole)
    flipped[2000] ^= 1  # one bit within the images
    cut = [whole[:n] for n in (0, 10, 1000, -1)]
    for damaged in (*cut, b"<html>404</html>", array.getvalue(), bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cifar10-test-8\.npz .* delete it") as caught:
            load("cifar10", tmp_path, "test", SIZE)
        assert "\n" not in str(caught.value)


def test_a_large_prepared_file_is_mapped_and_checked_once(tmp_path, monkeypatch):
    path, checks, hashed = tmp_path / f"cifar10-test-{SIZE}.npz", [], []
    rows = np.arange(1000)
    arrays = dict(images=numbered(1000), labels=rows % 10, classes=np.array(list("abcdefghij")))
    np.savez(path, **arrays)
    known = load("cifar10", tmp_path, "test", SIZE).fingerprint  # of the file as it is read
    monkeypatch.setattr(datasets, "MAPPED_FROM", arrays["images"].nbytes)
    testzip, ascontiguousarray = zipfile.ZipFile.testzip, np.ascontiguousarray
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: checks.append(1) or testzip(file))
    monkeypatch.setattr(np, "ascontiguousarray", lambda x: hashed.append(len(x)) or ascontiguousarray(x))
    for _ in range(2):
        data = load("cifar10", tmp_path, "test", SIZE)
        assert data.fingerprint == known and checks == [1] and sum(hashed) == 2000  # images and labels
    assert numbers(data.images).tolist() == rows.tolist()
    data.images[0] = 255  # stays in memory
    again = load("cifar10", tmp_path, "test", SIZE)
    assert numbers(again.images).tolist() == rows.tolist()

    path.rename(tmp_path / "moved.npz")  # a copy is checked again
    path.write_bytes((tmp_path / "moved.npz").read_bytes())
    assert load("cifar10", tmp_path, "test", SIZE).fingerprint == known and checks == [1, 1]
    np.savez(path, **arrays | {"images": arrays["images"][::-1]})
    other = load("cifar10", tmp_path, "test", SIZE)
    assert other.fingerprint != known and numbers(other.images).tolist() == rows[::-1].tolist()

    def full_disk(path):
        raise InputError("disk full")

    monkeypatch.setattr(datasets, "atomic_write", full_disk)
    np.savez(path, **arrays)
    assert load("cifar10", tmp_path, "test", SIZE).fingerprint == known  # goes without notes
    np.savez_compressed(path, **arrays)
    assert load("cifar10", tmp_path, "test", SIZE).fingerprint == known  # is read


def test_parts_of_a_large_file_have_their_own_fingerprints(cifar, monkeypatch):
    """What is asked of it: those of the same images in memory, for each rho and seed."""
    asked = [dict(rho=rho, seed=seed) for rho in (100, 50) for seed in (0, 1)]
    before = [load("cifar100lt", cifar, "train", SIZE, **a).fingerprint for a in asked]
    monkeypatch.setattr(datasets, "MAPPED_FROM", 0)
    for _ in range(2):
        assert [load("cifar100lt", cifar, "train", SIZE, **a).fingerprint for a in asked] == before
    assert len(set(before)) == 4


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["images", "labels"])
def test_pickles_are_not_opened(tmp_path, name, large):
    bomb = np.array([Bomb(str(tmp_path / "went off"))], dtype=object)
    np.savez(tmp_path / f"cifar10-test-{SIZE}.npz", **prepared_arrays() | {name: bomb})
    with pytest.raises(InputError, match="allow_pickle"):
        load("cifar10", tmp_path, "test", SIZE)
    assert not (tmp_path / "went off").exists()


def test_a_data_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make the data directory"):
        load("cifar10", tmp_path / "file")


@pytest.mark.parametrize(
    "name, archive", [("cifar100lt", "cifar-100-python.tar.gz"), ("cifar10", "cifar-10-python.tar.gz")]
)
def test_a_download_that_fails(tmp_path, monkeypatch, name, archive):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(InputError) as caught:
        load(name, tmp_path / "data", "test")
    for word in ("no network", archive, name.removesuffix("lt") + "-test-32.npz", str(tmp_path / "data")):
        assert word in str(caught.value)


def test_cifar_from_an_archive_that_was_copied_here(tmp_path, monkeypatch, capsys):
    """A tiny archive in CIFAR's format, which torchvision unpacks. Afterwards the prepared file is enough."""
    import torchvision

    pixels = np.random.RandomState(0).randint(0, 256, (24, 3, 32, 32)).astype(np.uint8)
    labels = np.random.RandomState(1).randint(0, 10, 24).tolist()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents = {name: {"data": pixels[4 * i : 4 * i + 4].reshape(4, -1), "labels": labels[4 * i : 4 * i + 4]}
                for i, name in enumerate(names)} | {"batches.meta": {"label_names": list("abcdefghij")}}
    archive, sums = tmp_path / "cifar-10-python.tar.gz", {}
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            blob = pickle.dumps(content)
            sums[name] = hashlib.md5(blob).hexdigest()
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(blob)
            tar.addfile(member, io.BytesIO(blob))
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})

    train, test = load("cifar10", tmp_path), load("cifar10", tmp_path, "test")
    assert torch.equal(train.images, torch.from_numpy(pixels[:20])) and train.labels.tolist() == labels[:20]
    assert torch.equal(test.images, torch.from_numpy(pixels[20:])) and test.labels.tolist() == labels[20:]
    assert train.classes == list("abcdefghij")

    archive.unlink()
    for file in (tmp_path / "cifar-10-batches-py").iterdir():
        file.unlink()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", None)
    assert torch.equal(load("cifar10", tmp_path).images, train.images)
    assert load("cifar10", tmp_path, image_size=48).images.shape == (20, 3, 48, 48)  # from the prepared 32
    half = load("cifar10", tmp_path, image_size=16).images.float()
    boxes = train.images.float().reshape(20, 3, 16, 2, 16, 2).mean((3, 5))
    single = train.images[:, :, ::2, ::2].float()
    assert (half - boxes).abs().mean() < 0.6 * (half - single).abs().mean()  # averages pixels
    assert (tmp_path / "cifar10-train-16.npz").exists()


def test_a_file_that_is_refused_stays_as_it_is(tmp_path, monkeypatch):
    """It may be the only copy, so it is neither deleted nor replaced by a download. No code in it is run."""
    path, trace = tmp_path / f"cifar10-test-{SIZE}.npz", tmp_path / "went off"
    monkeypatch.setattr(datasets, "download", None)  # would be an error if it were called
    bomb = np.array([Bomb(str(trace))], dtype=object)
    for change in ({}, {"labels": np.arange(20) % 11}, {"classes": bomb}, {"images": bomb}):
        np.savez(path, **prepared_arrays() | change)
        content = path.read_bytes() if change else path.read_bytes()[:-500]
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load("cifar10", tmp_path, "test", SIZE)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]
    with np.load(path, allow_pickle=True) as file:
        file["images"]
    assert trace.exists()  # so it would have run


@pytest.mark.parametrize("name, size, prepared", [
    ("cifar100lt", 16, "cifar100-train-32.npz"), ("cifar10", 32, "cifar10-train-32.npz"),
    ("cifar10imb", None, "cifar10-test-32.npz"),
])
def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch, name, size, prepared):
    import torchvision

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", no_network)  # CIFAR100 inherits it
    with pytest.raises(InputError, match="no network") as caught:
        load(name, tmp_path, "reference", image_size=size)
    assert prepared in str(caught.value) and "https://" in str(caught.value) and os.listdir(tmp_path) == []


def test_a_disk_that_refuses(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="cannot write .*disk full") as caught, atomic_write(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert str(path) in str(caught.value) and path.read_bytes() == b"old"
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError, match="cannot write"), atomic_write(tmp_path / "directory") as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


# Downloads that are images ----------------------------------------------------------------------------------
def jpeg(number, size=(40, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, (number, number, number)).save(file, "JPEG", quality=95)
    return file.getvalue()


def tar(files):
    """The bytes of a .tar.gz of these files, {path: bytes}, and their MD5 sum."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return archive.getvalue(), hashlib.md5(archive.getvalue()).hexdigest()


def greys(data):
    """The grey of each image of one colour: what `jpeg` was given."""
    return data.images.float().mean((1, 2, 3)).round().int().tolist()


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def test_flowers(tmp_path, monkeypatch, no_network):
    """All three parts of it, in each split."""
    import scipy.io
    from torchvision.datasets import Flowers102

    where, mat = tmp_path / "flowers-102", {}
    where.mkdir()
    labels = [2, 1, 2, 1, 102]  # of images 1 to 5, counted from 1
    archive, md5 = tar({f"jpg/image_{i + 1:05d}.jpg": jpeg(50 * i, (60, 30)) for i in range(5)})
    (where / "102flowers.tgz").write_bytes(archive)
    sums = {"image": ("102flowers.tgz", md5)}
    parts = {"trnid": [[4, 1]], "valid": [[5, 3]], "tstid": [[2, 2]]}
    for kind, name, content in (("label", "imagelabels.mat", {"labels": [labels]}),
                                ("setid", "setid.mat", parts)):
        mat = io.BytesIO()
        scipy.io.savemat(mat, content)
        (where / name).write_bytes(mat.getvalue())
        sums[kind] = name, hashlib.md5(mat.getvalue()).hexdigest()
    monkeypatch.setattr(Flowers102, "_file_dict", sums)
    with pytest.raises(InputError, match="flowers102 has 8,189 train images, but in .* are 6"):
        load("flowers102", tmp_path)
    monkeypatch.setitem(datasets.IMAGES, ("flowers102", "train"), 6)
    data = load("flowers102", tmp_path)
    assert data.images.shape == (6, 3, 128, 128) and len(data.classes) == 102
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 101] and data.classes[101] == "blackberry lily"
    assert greys(data) == [50, 50, 150, 0, 100, 200]  # images 2, 2, 4; 1, 3; 5
    for split in ("reference", "test"):
        assert torch.equal(load("flowers102", tmp_path, split).images, data.images)
    assert sorted(os.listdir(tmp_path)) == ["flowers-102", "flowers102-train-128.npz"]


def test_inaturalist(tmp_path, monkeypatch, no_network):
    """Species 0 to 2 in two super categories, of 4, 2 and 3 training images; one of each to test with."""
    from torchvision.datasets import inaturalist

    shown = {"Birds/1": [10, 20, 30], "Plants/0": [60, 70, 80, 90, 100], "Plants/2": [150, 160, 170, 180]}
    files = {f"train_val2019/{where}/{n:03d}.jpg": jpeg(n) for where, of in shown.items() for n in of}
    archive, md5 = tar(files)
    (tmp_path / "2019.tgz").write_bytes(archive)
    monkeypatch.setitem(inaturalist.DATASET_MD5, "2019", md5)
    held_out = "Birds/1/020", "Plants/0/060", "Plants/2/180"
    listed = [{"file_name": f"train_val2019/{name}.jpg"} for name in held_out]
    archive, md5 = tar({"val2019.json": json.dumps({"images": listed}).encode()})
    (tmp_path / "val2019.json.tar.gz").write_bytes(archive)
    monkeypatch.setitem(datasets.MD5, "val2019.json.tar.gz", md5)
    for split, n in (("train", 9), ("test", 3)):
        monkeypatch.setitem(datasets.IMAGES, ("inat2019", split), n)
    train, reference, test = (load("inat2019", tmp_path, split) for split in datasets.SPLITS)
    assert train.classes == ["Plants/0", "Birds/1", "Plants/2"] and train.images.shape[2:] == (64, 64)
    assert greys(train) == [70, 80, 90, 100, 10, 30, 150, 160, 170] and train.counts.tolist() == [4, 2, 3]
    assert greys(test) == [60, 20, 180] and test.labels.tolist() == [0, 1, 2]
    assert greys(reference) == [70, 80, 10, 30, 150, 160] and reference.counts.tolist() == [2, 2, 2]
    assert train.fingerprint == load("inat2019", tmp_path, "train", 64).fingerprint != reference.fingerprint


def test_tiny_imagenet(tmp_path, monkeypatch, no_network):
    """Two classes; files in the order of their names as text: 0, 1, 10, 2."""
    where = "tiny-imagenet-200"
    files = {f"{where}/train/n0{c}/images/n0{c}_{i}.JPEG": jpeg(100 * c + 10 * i, (64, 64))
             for c in (1, 0) for i in (0, 1, 2, 10)}
    files |= {f"{where}/train/n0{c}/n0{c}_boxes.txt": b"n00_0.JPEG\t0\t0\t9\t9\n" for c in (0, 1)}
    files |= {f"{where}/val/images/val_{i}.JPEG": jpeg(40 * i, (64, 64)) for i in range(3)}
    rows = [f"val_{i}.JPEG\tn0{c}\t0\t32\t44\t62\n" for i, c in enumerate((1, 0, 1))]
    files |= {f"{where}/val/val_annotations.txt": "".join(rows).encode(), f"{where}/wnids.txt": b"n01\nn00\n"}
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    md5 = hashlib.md5((tmp_path / "tiny-imagenet-200.zip").read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.MD5, "tiny-imagenet-200.zip", md5)
    for split, n in (("train", 8), ("test", 3)):
        monkeypatch.setitem(datasets.IMAGES, ("tinyimagenet", split), n)
    train, test = load("tinyimagenet", tmp_path), load("tinyimagenetimb", tmp_path, "test")
    assert greys(train) == [0, 10, 100, 20, 100, 110, 200, 120] and train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.classes == ["n00", "n01"] and train.images.shape[2:] == (64, 64)
    assert greys(test) == [40, 0, 80] and test.labels.tolist() == [0, 1, 1]
    (tmp_path / "tiny-imagenet-200" / "train" / "n00" / "images" / "n00_1.JPEG").unlink()
    with pytest.raises(InputError, match="tinyimagenet has 8 train images, but in .* are 7; remove"):
        load("tinyimagenet", tmp_path, image_size=32)


@pytest.mark.parametrize("name, words", [
    ("flowers102", ["102flowers.tgz, imagelabels.mat and setid.mat (from https://www.robots.ox.ac.uk/~vgg/",
                    "into data/flowers-102 or a prepared flowers102-train-128.npz into data"]),
    ("tinyimagenetimb", ["copy tiny-imagenet-200.zip (from http://cs231n.stanford.edu/) into data or a ",
                         "prepared tinyimagenet-train-64.npz into data"]),
    ("inat2019", ["val2019.json.tar.gz, and train_val2019.tar.gz under the name 2019.tgz", "into data or a ",
                  "inat2019-train-64.npz", "https://ml-inat-competition-datasets.s3.amazonaws.com/2019/"]),
])
def test_what_to_copy_where_without_a_network(tmp_path, monkeypatch, capsys, no_network, name, words):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, name) == 2
    captured = capsys.readouterr()
    line = captured.err
    assert line.startswith(f"datasets.py: error: cannot get {name.removesuffix('imb')} (")
    assert "no network" in line and all(word in line for word in words) and line.count("\n") == 1, line
    assert not list(tmp_path.rglob("*.npz"))


# Your own images --------------------------------------------------------------------------------------------
def solid(colour, size=(20, 20), mode="RGB"):
    return Image.new(mode, size, colour)


@pytest.fixture
def birds(tmp_path):
    """A folder: train has 3 owls and 1 kiwi, test one of each."""
    root = tmp_path / "birds"
    for where in ("train/owl", "train/kiwi", "test/owl", "test/kiwi"):
        (root / where).mkdir(parents=True)
    for i in range(3):
        solid((200, 50 * i, 0)).save(root / f"train/owl/{i}.png")
    solid((0, 0, 200)).save(root / "train/kiwi/a.PNG")
    solid((1, 1, 1)).save(root / "test/owl/a.png")
    solid((2, 2, 2)).save(root / "test/kiwi/a.png")
    (root / "train/owl/notes.txt").write_text("not an image")
    (root / "train/owl/._0.png").write_text("not an image, but macOS puts such files there")
    (root / "train/.hidden").mkdir()
    return root


def test_folder(birds, tmp_path):
    data = load(f"folder:{birds}", tmp_path / "data", image_size=SIZE)
    assert data.classes == ["kiwi", "owl"] and data.counts.tolist() == [1, 3]
    assert data.labels.tolist() == [0, 1, 1, 1]
    assert data.images.shape == (4, 3, SIZE, SIZE)
    assert data.images[:, :, 3, 3].tolist() == [[0, 0, 200], [200, 0, 0], [200, 50, 0], [200, 100, 0]]
    assert os.listdir(tmp_path / "data") == [f"folder-birds-train-{SIZE}.npz"]
    assert load(f"folder:{birds}/", tmp_path / "data").images.shape[-1] == 32  # the default, in its own file
    assert load(f"folder:{birds}", tmp_path / "data", "test", SIZE).images[:, 0, 0, 0].tolist() == [2, 1]


def test_folder_reference_is_the_first_of_reference_test_train(birds, tmp_path):
    def reference():
        return load(f"folder:{birds}", tmp_path / "data", "reference", SIZE).images[:, 0, 0, 0].tolist()

    for kind in ("owl", "kiwi"):
        (birds / "reference" / kind).mkdir(parents=True)
        solid((7, 7, 7)).save(birds / "reference" / kind / "a.png")
    assert reference() == [7, 7]
    (birds / "reference").rename(birds / "elsewhere")
    assert reference() == [2, 1]
    (birds / "test").rename(birds / "elsewhere too")
    assert reference() == [0, 200, 200, 200]
    with pytest.raises(InputError, match="no test images"):
        load(f"folder:{birds}", tmp_path / "data", "test", SIZE)


def test_folder_images_of_every_kind(tmp_path):
    where = tmp_path / "kinds" / "train" / "all"
    where.mkdir(parents=True)
    (tmp_path / "kinds" / "test").mkdir()  # so that none is held out
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (0, 180, 0)  # the middle third, which the square crop keeps
    wide[:, :20] = wide[:, 40:] = (255, 0, 0)
    half = np.zeros((20, 20, 3), np.uint8)
    half[:10] = 255  # the upper half is white
    upside_down = Image.Exif()
    upside_down[0x0112] = 3  # orientation: turned by half a circle
    Image.fromarray(wide).save(where / "a-wide.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(where / "b-tall.bmp")
    solid(77, mode="L").save(where / "c-grey.png")
    Image.fromarray(np.full((20, 20), 0x8000, np.uint16)).save(where / "d-grey16.png")
    solid((9, 9, 9, 0), mode="RGBA").save(where / "e-transparent.png")
    solid((40, 80, 120)).convert("P").save(where / "f-palette.gif")
    palette = solid((40, 80, 120)).quantize(8)
    palette.save(where / "f-palette.png", transparency=palette.getpixel((3, 3)))
    Image.fromarray(half).save(where / "g-turned.jpg", exif=upside_down, quality=95)
    solid((10, 200, 30), (3, 3)).save(where / "h-small.webp", lossless=True)
    Image.fromarray(np.indices((256, 256)).sum(0).astype(np.uint8) % 2 * 255).save(where / "i-checkers.png")
    x = load(f"folder:{tmp_path / 'kinds'}", tmp_path, image_size=SIZE).images.int()
    inner = slice(2, -2)  # antialiasing looks two pixels further than the crop at the edges
    assert (x[0][:, inner, inner] == torch.tensor([0, 180, 0])[:, None, None]).all()
    assert x[0][1].min() > 120 and torch.equal(x[0], x[1].mT)  # the same image, lying and standing
    assert (x[2] == 77).all() and (x[3] == 128).all() and (x[4] == 255).all()
    assert (x[5] - torch.tensor([40, 80, 120])[:, None, None]).abs().max() < 30  # a palette of 216 colours
    assert (x[6] == 255).all()  # its one colour is the transparent one
    assert x[7][:, :3].max() < 20 and x[7][:, 5:].min() > 235
    assert (x[8] == torch.tensor([10, 200, 30])[:, None, None]).all()
    assert (x[9] - 127).abs().max() < 3  # antialiased: picking pixels would give 0 or 255


def test_folder_is_prepared_once_and_again_after_a_change(birds, tmp_path, monkeypatch, capsys):
    name, data_dir = f"folder:{birds}", tmp_path / "data"
    first = load(name, data_dir, image_size=SIZE)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "read_image", None)  # would be an error if it were called
        assert torch.equal(load(name, data_dir, image_size=SIZE).images, first.images)
    assert capsys.readouterr().err == ""

    solid((9, 9, 9)).save(birds / "train/kiwi/b.png")
    assert load(name, data_dir, image_size=SIZE).counts.tolist() == [2, 3]
    assert "has changed" in capsys.readouterr().err
    solid((8, 8, 8)).save(birds / "train/kiwi/b.png")
    os.utime(birds / "train/kiwi/b.png", ns=(1, 1))  # same size, other content, other time
    assert load(name, data_dir, image_size=SIZE).images[1, 0, 0, 0] == 8


def test_a_prepared_folder_is_enough(birds, tmp_path):
    name, data_dir = f"folder:{birds}", tmp_path / "data"
    train, test = (load(name, data_dir, split, SIZE) for split in ("train", "test"))
    birds.rename(tmp_path / "gone")
    assert torch.equal(load(name, data_dir, "train", SIZE).images, train.images)
    assert torch.equal(load(name, data_dir, "reference", SIZE).images, test.images)
    with pytest.raises(InputError, match="birds.*nor was it prepared"):
        load(name, data_dir, "train", 16)


def test_folder_with_a_broken_image(birds, tmp_path):
    whole = (birds / "train/owl/1.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (birds / "train/owl/1.png").write_bytes(content)
        with pytest.raises(InputError, match=r"train/owl/1\.png"):
            load(f"folder:{birds}", tmp_path / "data", image_size=SIZE)
    assert os.listdir(tmp_path / "data") == []


def faults(name, data_dir, split="train"):
    """The one line in which a folder is refused."""
    with pytest.raises(InputError) as caught:
        load(name, data_dir, split, SIZE)
    assert not list(data_dir.glob("*")) and "\n" not in str(caught.value)
    return str(caught.value)


def test_all_broken_images_are_told_at_once(birds, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FAULTS_SHOWN", 10)
    whole = {}
    for i in range(14):
        path = birds / f"train/owl/{i:02d}.jpg"
        Image.effect_noise((64, 64), 50).save(path)
        whole[path] = path.read_bytes()
    for path, content in list(whole.items())[2:13]:
        path.write_bytes(content[: len(content) // 2])
    frames = [solid((i, 0, 0)) for i in (0, 100, 200)]
    frames[0].save(birds / "train/kiwi/moves.gif", save_all=True, append_images=frames[1:])
    (birds / "train/kiwi/z.png").write_bytes(b"no image")
    line = faults(f"folder:{birds}", tmp_path / "data")
    assert "cannot read 13 of 20 images" in line and line.endswith("; and 3 more; remove or replace them")
    assert "kiwi/moves.gif (3 images in one file" in line and "kiwi/z.png (cannot identify" in line
    named = [f"owl/{i:02d}.jpg (" in line for i in range(14)]
    assert named == [False] * 2 + [True] * 8 + [False] * 4 and "truncated" in line


def test_a_photo_with_a_preview_behind_it_is_no_animation(birds, tmp_path):
    """MPO, as phones write it under the name .jpg."""
    photo, preview = solid((10, 200, 30), (640, 480)), solid((0, 0, 0), (160, 120))
    photo.save(birds / "train/kiwi/b.jpg", format="MPO", save_all=True, append_images=[preview])
    x = load(f"folder:{birds}", tmp_path / "data", image_size=SIZE).images[1].int()
    assert (x - torch.tensor([10, 200, 30])[:, None, None]).abs().max() < 3


def test_directories_within_a_class_are_refused(birds, tmp_path):
    name = f"folder:{birds}"
    for where in ("train/kiwi/more", "train/owl/2019", "train/owl/2020/june"):
        (birds / where).mkdir(parents=True)
        solid((9, 9, 9)).save(birds / where / "a.png")
    line = faults(name, tmp_path / "data")
    assert "train/kiwi/more is a directory within a class (3 in " in line
    assert load(name, tmp_path / "other", "test", SIZE).counts.tolist() == [1, 1]
    (birds / "train/kiwi/more").rename(birds / "train/kiwi/.more")
    assert "train/owl/2019 is a directory within a class (2 in " in faults(name, tmp_path / "data")
    for year in ("2019", "2020"):
        (birds / "train/owl" / year).rename(birds / "train/owl" / f".{year}")
    assert load(name, tmp_path / "data", image_size=SIZE).counts.tolist() == [1, 3]  # hidden: left out


def test_links_that_lead_nowhere(birds, tmp_path):
    link = birds / "train/owl/link.png"
    for target in ("link.png", "gone.png"):  # to itself; to nothing
        link.symlink_to(target)
        line = faults(f"folder:{birds}", tmp_path / "data")
        assert "cannot list" in line and str(link) in line
        link.unlink()
    link.symlink_to("../owl")
    assert "train/owl/link.png is a directory within a class" in faults(f"folder:{birds}", tmp_path / "data")
    link.unlink()
    link.symlink_to("0.png")
    assert load(f"folder:{birds}", tmp_path / "data", image_size=SIZE).counts.tolist() == [1, 4]


def test_a_directory_that_may_not_be_read(birds, tmp_path, monkeypatch):
    scandir = os.scandir

    def refusing(where):  # a refusal by permission would not stop root
        if str(where).endswith("kiwi"):
            raise PermissionError(13, "Permission denied", str(where))
        return scandir(where)

    monkeypatch.setattr(os, "scandir", refusing)
    for name in (f"folder:{birds}", f"folder:{birds / 'train'}"):
        line = faults(name, tmp_path / "data")
        assert "cannot list" in line and "train/kiwi" in line and "Permission denied" in line


def test_names_that_are_not_utf8(birds, tmp_path):
    path = os.fsencode(birds / "train/owl/na") + b"\xefve.png"
    os.rename(birds / "train/owl/0.png", path)
    line = faults(f"folder:{birds}", tmp_path / "data")
    assert r"train/owl/na\udcefve.png' is not UTF-8" in line and line.encode()
    os.rename(path, birds / "train/owl/0.png")
    root = os.fsdecode(os.fsencode(birds) + b"\xef")
    birds.rename(root)
    line = faults(f"folder:{root}", tmp_path / "data")
    assert r"birds\udcef' is not UTF-8" in line and line.encode()


@pytest.mark.parametrize("dtype, values, expected", [
    (np.float32, (0, 0.5, 1), None), (np.float32, (-1, 0, 200), None), (np.float32, (0, 1, np.nan), None),
    (np.float32, (0, 9, 255.5), None), (np.float32, (0, 99.6, 255), (0, 100, 255)),
    (np.int32, (-1, 0, 200), None), (np.int32, (0, 9, 70_000), None), (np.int32, (0, 9, 200), (0, 9, 200)),
    (np.int32, (0, 0x8000, 0xFFFF), (0, 128, 255)), (np.uint16, (0, 0x8000, 0xFFFF), (0, 128, 255)),
    (np.uint16, (0, 200, 300), (0, 0, 1)),
])
def test_greys_of_more_than_eight_bits(birds, tmp_path, dtype, values, expected):
    greys = np.repeat(np.array(values, dtype), 20)[:, None].repeat(60, 1)  # three stripes, 20 pixels high
    Image.fromarray(greys).save(birds / "train/kiwi/b.tif")
    if expected is None:
        line = faults(f"folder:{birds}", tmp_path / "data")
        assert f"{birds}/train/kiwi/b.tif (its greys are " in line and f" to {np.max(values):g};" in line
    else:
        x = load(f"folder:{birds}", tmp_path / "data", image_size=60).images[1]
        assert (x == x[0, :, :1]).all() and x[0, [10, 30, 50], 0].tolist() == list(expected)


def photo(width, height):
    """A made-up photo: something in every direction, and grain."""
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = rng.integers(0, 25, (height, width, 3))
    return Image.fromarray((0.9 * np.asarray(scene) + grain).astype(np.uint8))


@pytest.mark.parametrize("width, height, orientation, decoded", [
    (1024, 768, 1, (256, 192)),  # 768 / 4 is at least twice 64, 768 / 8 is not
    (1024, 1024, 1, (128, 128)), (1024, 768, 6, (192, 256)), (255, 600, 1, (255, 600)), (20, 20, 1, (20, 20)),
])
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(
    birds, tmp_path, monkeypatch, width, height, orientation, decoded
):
    path, exif, sizes = birds / "train/kiwi/b.jpg", Image.Exif(), []
    exif[0x0112] = orientation  # 6: lying on its side
    photo(width, height).save(path, quality=90, exif=exif)

    def resize(image, size, resize=datasets.resize):
        sizes.append(image.size)
        return resize(image, size)

    monkeypatch.setattr(datasets, "resize", resize)
    x = datasets.read_image(path, 64)
    assert sizes == [decoded]
    with Image.open(path) as image:
        image.load()
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = left, top, left + side, top + side
        full = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box))
    full = np.rot90(full, -1) if orientation == 6 else full  # clockwise
    difference = np.abs(x.astype(int) - full)
    assert difference.mean() < 0.5 and difference.max() <= 4


def test_images_are_read_by_several_threads_in_their_order(monkeypatch):
    """The first image is finished last: with one thread it would wait in vain."""
    last_is_read = threading.Event()

    def read_image(file, size):
        if file == 0:
            assert last_is_read.wait(20)
        if file == datasets.READERS - 1:
            last_is_read.set()
        return np.full((size, size, 3), file, np.uint8)

    monkeypatch.setattr(datasets, "read_image", read_image)
    images = np.stack([*datasets.read_images(range(150), SIZE, "reading")])
    assert images.dtype == np.uint8 and images.shape == (150, SIZE, SIZE, 3)
    assert (images == np.arange(150)[:, None, None, None]).all()


def test_preparing_takes_the_memory_of_the_images_once(tmp_path, monkeypatch):
    for i in range(64):
        path = tmp_path / "many" / "train" / "all" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "many" / "test").mkdir()

    def read_image(path, size):
        return np.full((size, size, 3), int(os.path.basename(path).removesuffix(".png")), np.uint8)

    monkeypatch.setattr(datasets, "read_image", read_image)
    tracemalloc.start()  # it sees NumPy's memory, not torch's
    try:
        images = load(f"folder:{tmp_path / 'many'}", tmp_path / "data", image_size=512).images
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert images[:, 2, 5, 7].tolist() == sorted(range(64), key=lambda i: f"{i}.png")
    assert peak < 1.1 * images.nbytes and os.listdir(tmp_path / "data") == ["folder-many-train-512.npz"]


def test_classes_directly_in_the_folder_are_training_images(birds, tmp_path):
    name, data_dir = f"folder:{birds / 'train'}", tmp_path / "data"
    nested, flat = (load(f"folder:{where}", data_dir, image_size=SIZE) for where in (birds, birds / "train"))
    reference = load(name, data_dir, "reference", SIZE)
    for data in (flat, reference):
        assert torch.equal(data.images, nested.images) and torch.equal(data.labels, nested.labels)
        assert data.classes == nested.classes
    with pytest.raises(InputError, match=f"has no test images; they go into {birds}/train/test/<class>/"):
        load(name, data_dir, "test", SIZE)
    (birds / "train/emu").mkdir()
    with pytest.raises(InputError, match="train/emu has no images"):
        load(name, data_dir, image_size=SIZE)
    assert datasets.folder_splits(birds, data_dir, SIZE) == ["train", "test"]
    for kind in ("owl", "kiwi"):
        (birds / "train" / kind).rename(birds / kind)
    (birds / "train/emu").rmdir()
    (birds / "train/.hidden").rmdir()
    (birds / "train").rmdir()  # classes beside test: is that one too?
    with pytest.raises(InputError, match="no directory train"):
        load(f"folder:{birds}", data_dir, image_size=SIZE)


def test_a_prepared_folder_of_the_same_name_is_not_another(birds, tmp_path, capsys):
    data_dir, prepared = tmp_path / "data", tmp_path / "data" / f"folder-birds-train-{SIZE}.npz"
    owls = load(f"folder:{birds}", data_dir, image_size=SIZE)
    moved, elsewhere = tmp_path / "disk" / birds.parent.name / "birds", tmp_path / "garden" / "birds"
    assert capsys.readouterr().err == ""
    assert torch.equal(load(f"folder:{moved}", data_dir, image_size=SIZE).images, owls.images)
    said = capsys.readouterr().err
    assert f"{moved} is not on this machine" in said and said.endswith(f"prepared from {birds}\n")
    assert said.count("\n") == 1

    with pytest.raises(InputError) as caught:  # the folder that is asked for was never there
        load(f"folder:{elsewhere}", data_dir, image_size=SIZE)
    for words in (f"{elsewhere} is no directory", f"prepared from another one, {birds};"):
        assert words in str(caught.value)

    (elsewhere / "train/tit").mkdir(parents=True)
    solid((5, 5, 5)).save(elsewhere / "train/tit/a.png")
    assert load(f"folder:{elsewhere}", data_dir, image_size=SIZE).classes == ["tit"]  # both folders are there
    assert "has changed" in capsys.readouterr().err
    assert torch.equal(load(f"folder:{birds}", data_dir, image_size=SIZE).images, owls.images)
    assert "has changed" in capsys.readouterr().err

    with np.load(prepared) as file:
        arrays = dict(file)
    assert arrays.pop("folder") == str(birds)
    np.savez(prepared, **arrays)
    assert torch.equal(load(f"folder:{birds}", data_dir, image_size=SIZE).images, owls.images)
    with pytest.raises(InputError, match="does not say from which folder"):
        load(f"folder:{moved}", data_dir, image_size=SIZE)


def test_folders_that_are_not_laid_out_as_they_should_be(birds, tmp_path):
    def error(where=birds, split="train"):
        with pytest.raises(InputError) as caught:
            load(f"folder:{where}", tmp_path / "data", split, SIZE)
        return str(caught.value)

    assert "needs a path" in error("")
    (tmp_path / "higher").mkdir()
    birds.rename(tmp_path / "higher/birds")
    for word in ("no directory train", "higher/train/<class>/", "higher/<class>/"):
        assert word in error(tmp_path / "higher")
    (tmp_path / "higher/birds").rename(birds)
    assert "nor was it prepared" in error(tmp_path / "nowhere")
    (tmp_path / "empty/train").mkdir(parents=True)
    assert "no sub-directories" in error(tmp_path / "empty")
    (birds / "test/emu").mkdir()
    assert "'emu' is in test but not in train" in error(split="test")
    (birds / "test/emu").rmdir()
    (birds / "train/emu").mkdir()
    assert "train/emu has no images" in error()
    assert "'emu' is in train but not in test" in error(split="test")


def test_a_damaged_prepared_folder_is_named(birds, tmp_path):
    path = tmp_path / f"folder-birds-train-{SIZE}.npz"
    load(f"folder:{birds}", tmp_path, image_size=SIZE)
    content = path.read_bytes()[:-500]
    path.write_bytes(content)
    for _ in range(2):  # with the folder, and without
        with pytest.raises(InputError, match="cannot be read") as caught:
            load(f"folder:{birds}", tmp_path, image_size=SIZE)
        assert str(path) in str(caught.value) and path.read_bytes() == content
        if birds.exists():
            birds.rename(tmp_path / "gone")


def test_images_taken_away_and_classes_renamed(birds, tmp_path):
    name = f"folder:{birds}"
    assert load(name, tmp_path, image_size=SIZE).counts.tolist() == [1, 3]
    (birds / "train/owl/0.png").unlink()
    assert load(name, tmp_path, image_size=SIZE).counts.tolist() == [1, 2]
    (birds / "train/kiwi").rename(birds / "train/wren")
    data = load(name, tmp_path, image_size=SIZE)
    assert data.classes == ["owl", "wren"] and data.counts.tolist() == [2, 1]


# Held out of a folder ---------------------------------------------------------------------------------------
def write_class(where, n, c=0):
    """n pictures 0.png, 1.png ...; the colour of each tells c and its number."""
    where.mkdir(parents=True)
    for i in range(n):
        solid((c, i, 0)).save(where / f"{i}.png")


def parts(name, data_dir, split):
    """{(c, number)} of a split of what `write_class` wrote."""
    return list(map(tuple, load(name, data_dir, split, SIZE).images[:, :2, 3, 3].tolist()))


@pytest.mark.parametrize("below", ["train", "."])
def test_a_fifth_of_each_class_is_held_out(tmp_path, below):
    root, name, data_dir = tmp_path / "pets", f"folder:{tmp_path / 'pets'}", tmp_path / "data"
    for c, (kind, n) in enumerate([("cat", 12), ("dog", 4), ("fish", 5)]):
        write_class(root / below / kind, n, c)
    expected = []
    for c, (kind, n, out) in enumerate([("cat", 12, 2), ("dog", 4, 0), ("fish", 5, 1)]):
        by_hash = sorted(range(n), key=lambda i: hashlib.sha256(f"{kind}/{i}.png".encode()).hexdigest())
        expected += [(c, i) for i in sorted(by_hash[:out], key=str)]
    train = parts(name, data_dir, "train")
    assert set(os.listdir(data_dir)) == {f"folder-pets-{split}-{SIZE}.npz" for split in ("train", "test")}
    assert parts(name, data_dir, "reference") == parts(name, data_dir, "test") == expected
    assert sorted(train + expected) == [(c, i) for c, n in enumerate((12, 4, 5)) for i in range(n)]
    reference = load(name, data_dir, "reference", SIZE)
    assert reference.classes == ["cat", "dog", "fish"] and reference.counts.tolist() == [2, 0, 1]
    assert load(name, data_dir, image_size=SIZE).counts.tolist() == [10, 4, 4] and reference.summary

    root.rename(tmp_path / "gone")  # the prepared arrays are enough
    assert parts(name, data_dir, "train") == train and parts(name, data_dir, "reference") == expected
    (tmp_path / "gone").rename(root)
    for i in range(4, 10):  # now ten dogs, two of them apart
        solid((1, i, 0)).save(root / below / f"dog/{i}.png")
    assert load(name, data_dir, "reference", SIZE).counts.tolist() == [2, 2, 1]
    assert load(name, data_dir, image_size=SIZE).counts.tolist() == [10, 8, 4]


def test_at_most_a_hundred_are_held_out():
    files = [f"/somewhere/{i}.png" for i in range(2_000)]
    assert [len(datasets.held_out("c", files[:n])) for n in (4, 5, 499, 500, 2_000)] == [0, 1, 99, 100, 100]
    assert datasets.held_out("c", files) != datasets.held_out("d", files)
    # What is held out hardly depends on how many there are.
    assert len(datasets.held_out("c", files[:450]) & datasets.held_out("c", files[:440])) > 80


def test_nothing_is_held_out_of_a_folder_with_a_reference_or_of_tiny_classes(tmp_path):
    root, name, data_dir = tmp_path / "pets", f"folder:{tmp_path / 'pets'}", tmp_path / "data"
    write_class(root / "train/cat", 4)
    assert parts(name, data_dir, "reference") == parts(name, data_dir, "train") == [(0, i) for i in range(4)]
    with pytest.raises(InputError, match="has no test images"):
        load(name, data_dir, "test", SIZE)
    write_class(root / "reference/cat", 1, 7)
    for i in range(4, 9):
        solid((0, i, 0)).save(root / f"train/cat/{i}.png")
    assert len(parts(name, data_dir, "train")) == 9 and parts(name, data_dir, "reference") == [(7, 0)]
    with pytest.raises(InputError, match="has no test images"):
        load(name, data_dir, "test", SIZE)


def test_names_are_those_of_linux_on_macos_too(tmp_path):
    """There an umlaut may be two characters, and O comes before Z."""
    sets = {}
    for form in ("NFC", "NFD"):
        for c, kind in enumerate(("Zebra", "Öl und Essig")):
            where = tmp_path / form / unicodedata.normalize(form, kind)
            where.mkdir(parents=True)
            for i in range(30):
                solid((c, i, 0)).save(where / unicodedata.normalize(form, f"grün {i:02d} ü.png"))
        name = f"folder:{tmp_path / form}"
        sets[form] = load(name, tmp_path / "data", image_size=SIZE).classes, *(
            parts(name, tmp_path / "data", split) for split in ("train", "test"))
    assert os.listdir(tmp_path / "NFC") != os.listdir(tmp_path / "NFD")
    assert sets["NFC"] == sets["NFD"] and sets["NFC"][0] == ["Zebra", "Öl und Essig"]
    assert sets["NFC"][2] != sorted(sets["NFC"][2])[:6] and len(sets["NFC"][2]) == 12


def test_a_folder_can_be_thinned(tmp_path):
    name, data_dir = f"folder:{tmp_path / 'pets'}", tmp_path / "data"
    for c, n in enumerate((12, 8, 9)):
        write_class(tmp_path / "pets/train" / "abc"[c], n, c)
        write_class(tmp_path / "pets/test" / "abc"[c], 2, c)
    assert load(name, data_dir, image_size=SIZE).counts.tolist() == [12, 8, 9]
    exp = load(name, data_dir, image_size=SIZE, rho=4)
    assert exp.counts.tolist() == [8, 4, 2]  # the smallest class has 8
    assert load(name, data_dir, image_size=SIZE, rho=3, imbalance="step").counts.tolist() == [8, 8, 2]
    random_state, expected = np.random.RandomState(5), []
    for c, (n, kept) in enumerate([(12, 8), (8, 4), (9, 2)]):
        files = sorted(range(n), key=lambda i: f"{i}.png")
        random_state.shuffle(files)
        expected += [(c, i) for i in files[:kept]]
    images = load(name, data_dir, "train", SIZE, 4, seed=5).images
    assert list(map(tuple, images[:, :2, 3, 3].tolist())) == expected
    for split in ("reference", "test"):
        assert load(name, data_dir, split, SIZE, 4, imbalance="step").counts.tolist() == [2, 2, 2]
    with pytest.raises(InputError, match="rho 9 leaves the last class .* the head class has 8"):
        load(name, data_dir, image_size=SIZE, rho=9)


# Preparing a folder -----------------------------------------------------------------------------------------
def test_a_preparation_that_was_cut_short_resumes(tmp_path, monkeypatch):
    name, data_dir = f"folder:{tmp_path / 'pets'}", tmp_path / "data"
    write_class(tmp_path / "pets/train/cat", 100)
    (tmp_path / "pets/test").mkdir()
    read, seen = datasets.read_image, []

    def stopped(path, size):
        if path.endswith("/cat/77.png"):
            raise KeyboardInterrupt
        return read(path, size)

    def counted(path, size):
        seen.append(path)
        return read(path, size)

    order = sorted(range(100), key=lambda i: f"{i}.png")
    for changed, left in ((False, 100 - order.index(77)), (True, 100)):
        monkeypatch.setattr(datasets, "read_image", stopped)
        with pytest.raises(KeyboardInterrupt):
            load(name, data_dir, image_size=SIZE)
        assert os.listdir(data_dir) == [f"folder-pets-train-{SIZE}.part"]
        with open(data_dir / f"folder-pets-train-{SIZE}.part", "ab") as file:
            file.write(b"half an image")
        if changed:
            os.utime(tmp_path / "pets/train/cat/5.png", ns=(1, 1))
        monkeypatch.setattr(datasets, "read_image", counted)
        assert parts(name, data_dir, "train") == [(0, i) for i in order] and len(seen) == left
        assert os.listdir(data_dir) == [f"folder-pets-train-{SIZE}.npz"]
        (data_dir / f"folder-pets-train-{SIZE}.npz").unlink()
        seen.clear()


def test_no_image_follows_one_that_cannot_be_read(birds):
    """They would not be where a preparation that resumes looks for them."""
    (birds / "train/owl/1.png").write_bytes(b"no image")
    files, images = [birds / f"train/owl/{i}.png" for i in range(3)], []
    with pytest.raises(InputError, match="cannot read 1 of 3 images"):
        images.extend(datasets.read_images(files, SIZE, "reading"))
    assert len(images) == 1


def test_one_picture_in_two_classes_is_warned_of(birds, tmp_path, capsys):
    for kind, name in (("owl", "x"), ("owl", "y"), ("kiwi", "b")):
        solid((7, 7, 7)).save(birds / f"train/{kind}/{name}.png")
    load(f"folder:{birds}", tmp_path / "data", image_size=SIZE)
    said = capsys.readouterr().err
    assert f"{birds}/train/kiwi/b.png and {birds}/train/owl/x.png: one picture in two classes; 2 such" in said
    (birds / "train/kiwi/b.png").unlink()  # twice in one class
    load(f"folder:{birds}", tmp_path / "data", image_size=SIZE)
    assert "one picture" not in capsys.readouterr().err


def test_a_data_directory_that_refuses_the_images(birds, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*file/folder-birds-train-8.part"):
        load(f"folder:{birds}", tmp_path / "file", image_size=SIZE)


# Pictures as they are ---------------------------------------------------------------------------------------
def test_pictures_as_they_are(tmp_path):
    write_class(tmp_path / "b/tit", 3, 1)
    write_class(tmp_path / "b/Öl", 2, 2)
    (tmp_path / "b/tit/notes.txt").touch()
    images, labels, names = datasets.load_images(tmp_path / "b")
    assert images.shape == (5, 3, 20, 20) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images[:, :2, 3, 3].tolist() == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1]]
    assert labels.tolist() == [0, 0, 0, 1, 1] and names == ["tit", "Öl"]
    _, labels, names = datasets.load_images(str(tmp_path / "b"), ["Öl", "emu", "tit"])
    assert labels.tolist() == [2, 2, 2, 0, 0] and names == ["Öl", "emu", "tit"]
    _, labels, names = datasets.load_images(tmp_path / "b", [unicodedata.normalize("NFD", "Öl"), "tit"])
    assert labels.tolist() == [1, 1, 1, 0, 0] and names == ["Öl", "tit"]
    images, labels, names = datasets.load_images(tmp_path / "b/tit")
    assert len(images) == 3 and labels is None and names is None
    assert datasets.load_images(tmp_path / "b/tit", ["x", "y"])[1:] == (None, ["x", "y"])
    noise = np.random.RandomState(0).randint(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "b/tit/9.png")
    images, *_ = datasets.load_images(tmp_path / "b/tit")
    assert (images[3].permute(1, 2, 0).numpy() == noise).all()  # not resampled
    with pytest.raises(InputError, match="b/tit is none of the 2 classes, such as tits"):
        datasets.load_images(tmp_path / "b", ["tits", "Öl"])


def test_pictures_that_do_not_go_together(tmp_path):
    def error(where):
        with pytest.raises(InputError) as caught:
            datasets.load_images(where)
        return str(caught.value)

    assert "cannot list" in error(tmp_path / "nowhere") and "has no images" in error(tmp_path)
    write_class(tmp_path / "b/tit", 3)
    solid((1, 1, 1), (20, 21)).save(tmp_path / "b/tit/1.png")
    assert f"{tmp_path}/b/tit/0.png has 20 x 20 pixels, {tmp_path}/b/tit/1.png 20 x 21;" in error(
        tmp_path / "b")
    (tmp_path / "b/tit/1.png").write_bytes(b"no image")
    assert "cannot read 1 of 3 images" in error(tmp_path / "b")
    (tmp_path / "b/emu").mkdir()
    assert "b/emu has no images" in error(tmp_path / "b")
    (tmp_path / "b/emu").rmdir()
    solid((1, 1, 1)).save(tmp_path / "b/x.png")
    assert "has both " in error(tmp_path / "b")


# python datasets.py -----------------------------------------------------------------------------------------
def bar_lengths(path, rows):
    """How many pixels of the bars' colour each row of a picture has."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue = (np.abs(pixels - (70, 130, 180)).max(2) < 3) & (np.arange(pixels.shape[1]) > pixels.shape[1] // 2)
    return blue.reshape(rows, -1).sum(1)


def command(monkeypatch, *arguments):
    """The exit status of the command, run in this process, which need not import torch again."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/datasets.py", *map(str, arguments)])
    try:
        datasets.run_command(datasets.main)
    except SystemExit as stop:
        return stop.code
    return 0


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "shapeslt") == 0
    text = capsys.readouterr().out
    assert [line.split() for line in text.splitlines()[1:11]] == [
        [str(c), name, f"{n:,}"] for c, (name, n) in enumerate(zip(datasets.SHAPES, SHAPESLT, strict=True))]
    assert "10 classes, 2,478 training images of 16 x 16 pixels" in text
    assert "imbalance ratio 100" in text and "4,000 reference images, 2,000 test images" in text
    bars = bar_lengths(tmp_path / "data/shapeslt.png", 10)
    assert bars / bars[0] == pytest.approx(np.array(SHAPESLT) / 1000, abs=0.03) and bars.min() > 0


def test_command_with_a_hundred_classes(cifar, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "picture.png"
    flags = ["--data-dir", cifar, "--image-size", SIZE, "--rho", 50, "--out", out]
    assert command(monkeypatch, "cifar100lt", *flags) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 120
    assert all(f"class {c} " in text for c in range(100)) and "imbalance ratio 50" in text
    bars = bar_lengths(out, 10)  # 10 of 100 classes, evenly spaced from the first to the last
    assert bars[-1] / bars[0] == pytest.approx(1 / 50, abs=0.02) and (np.diff(bars) <= 0).all()


def test_command_orders_by_count_and_does_without_a_test_split(birds, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, f"folder:{birds}", "--data-dir", tmp_path / "data") == 0
    text = capsys.readouterr().out
    assert text.index("owl") < text.index("kiwi") and "2 reference images, 2 test images" in text
    (birds / "test").rename(birds / "elsewhere")
    assert command(monkeypatch, f"folder:{birds}", "--data-dir", tmp_path / "data") == 0
    text = capsys.readouterr().out
    assert "4 reference images, 0 test images" in text and "held out" not in text
    for i in range(3, 10):
        solid((200, 20 * i, 0)).save(birds / f"train/owl/{i}.png")
    flags = ["--data-dir", tmp_path / "data", "--rho", 1, "--imbalance", "step"]
    assert command(monkeypatch, f"folder:{birds}", *flags) == 0
    text = capsys.readouterr().out
    assert "2 reference images, 2 test images, held out: of n images a class n // 5" in text
    assert "2 training images" in text  # one of each class


@pytest.mark.parametrize("arguments, message", [
    (["shapes", "--rho", "10"], "rho"),
    (["shapes", "--image-size", "ten"], "invalid int value"),
    (["shapes", "--colour"], "unrecognized"),
    ([], "required: NAME"),
    (["cifar10tl"], "unknown data set 'cifar10tl'; did you mean cifar10lt"),
    (["shapes", "--out", "file/picture.png"], "cannot write"),
    (["shapeslt", "--rho", "0.5"], "rho is 0.5"),
    (["shapeslt", "--rho", "1e6"], "the head class has 1000"),
    (["shapes", "--imbalance", "step"], "imbalance step needs rho"),
    (["shapes", "--image", "8"], "unrecognized"),  # no abbreviations
    (["folder:nowhere"], "is no directory"),
    (["cifar10", "--data-dir", "file"], "cannot make the data directory file"),
])
def test_command_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert command(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("datasets.py: error: ") and message in captured.err


def test_command_errors_as_a_process_of_its_own(run_script, tmp_path):
    done = run_script("datasets.py", "cifar10tl", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "did you mean cifar10lt" in done.stderr
    assert done.stderr.startswith("datasets.py: error: ") and done.stderr.count("\n") == 1


def test_an_empty_policy_is_the_identity():
    x = torch.rand(4, 3, 16, 16)
    assert datasets.diffaugment(x, "") is x


@pytest.mark.parametrize("R", [16, 32, 64])
def test_diffaugment_keeps_shapes_and_ranges_and_lets_gradients_through(R):
    x = (torch.rand(8, 3, R, R) * 2 - 1).requires_grad_()
    out = datasets.diffaugment(x, "color,translation,cutout")
    assert out.shape == x.shape and out.dtype == x.dtype and out.abs().max() <= 4.5
    out.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_colour():
    x = torch.rand(2000, 3, 4, 4).double() * 2 - 1
    out = datasets.diffaugment(x, "color")
    # Undone from the invariants: saturation keeps each pixel's mean over channels, contrast the image's mean.
    shift = (out - x).mean((1, 2, 3))
    grey, grey_x = out.mean(1), x.mean(1)
    contrast = (grey - grey.mean((1, 2), keepdim=True)) / (grey_x - grey_x.mean((1, 2), keepdim=True))
    contrast = contrast.flatten(1)
    assert (contrast.std(1) < 1e-6).all()  # one number an image
    colour = ((out - grey[:, None]) / (x - grey_x[:, None])).flatten(1)
    saturation = colour.mean(1) / contrast.mean(1)
    for value, low, high in ((shift, -0.5, 0.5), (contrast.mean(1), 0.5, 1.5), (saturation, 0, 2)):
        p = scipy.stats.kstest(value.numpy(), scipy.stats.uniform(low, high - low).cdf).pvalue
        assert p > 0.001 and low <= value.min() and value.max() <= high
    flat = torch.full((3, 3, 4, 4), 0.3)
    assert (datasets.diffaugment(flat, "color").flatten(1).std(1) < 1e-6).all()  # a grey image stays one


def test_translation():
    out = datasets.diffaugment(torch.ones(4000, 1, 32, 32), "translation")
    inside = out[:, 0, 4:28, 4:28]
    assert (inside == 1).all()  # no more than an eighth moves in
    assert (out == 0).double().mean() == pytest.approx(1 - (1 - 20 / 9 / 32) ** 2, abs=0.003)
    spot = torch.zeros(4000, 1, 16, 16)
    spot[:, :, 8, 8] = 1
    _, _, row, column = datasets.diffaugment(spot, "translation").nonzero().T
    shifted = set(range(8 - 2, 8 + 3))
    assert len(row) == 4000 and set(row.tolist()) == set(column.tolist()) == shifted
    assert np.bincount(row.numpy())[6:].min() > 700 and abs(np.corrcoef(row, column)[0, 1]) < 0.06


def test_cutout():
    out = datasets.diffaugment(torch.ones(4000, 1, 32, 32), "cutout")[:, 0]
    share = (out == 0).double().mean((1, 2))
    assert share.min() == 1 / 16 and share.max() == 1 / 4 and share.mean() == pytest.approx(0.187, abs=0.004)
    rows, columns = (out == 0).any(2).sum(1), (out == 0).any(1).sum(1)
    assert torch.equal((rows * columns).double() / 1024, share)  # rectangles
    assert len({tuple(o.flatten().tolist()) for o in out[:20]}) > 15  # each image its own
    # The centre is anywhere from 0 to 32, each place equally often: a hole of full height begins at -8 .. 24.
    for holes in ((out == 0).any(2), (out == 0).any(1)):
        first, last = holes.int().argmax(1), 31 - holes.flip(1).int().argmax(1)
        start = torch.where(first > 0, first, last - 15)
        number = torch.bincount(start + 8, minlength=33)
        assert len(number) == 33 and scipy.stats.chisquare(number.numpy()).pvalue > 0.001


def waves(x, y):
    """A smooth picture of three colours, at points from -1 to 1."""
    return torch.stack([torch.sin(3 * x + 2 * y), torch.cos(2 * x - 3 * y), torch.sin(2 * x * y + y)])


def pixels(R=32):
    place = (torch.arange(R) * 2 + 1) / R - 1
    y, x = torch.meshgrid(place, place, indexing="ij")
    return torch.stack([x, y])


def test_ada_does_what_its_nine_numbers_say():
    # Point for point, with complex numbers: what is seen at a place was at the place that the inverse gives.
    torch.manual_seed(0)
    R, B = 32, 400
    x, y = pixels(R)
    out, told = datasets.ada(waves(x, y).expand(B, 3, R, R), p=0.5)
    assert out.shape == (B, 3, R, R) and told.shape == (B, 9)
    seen = 0
    for image, (mirrored, flipped, n, cos, sin, n_cos, n_sin, *move) in zip(out, told.tolist(), strict=True):
        place = torch.complex(x, -y) - complex(move[0] / 4, -move[1] / 4)  # y up: angles are anticlockwise
        n_stretch = math.hypot(n_cos, n_sin)
        axis = complex(n_cos, n_sin) / n_stretch if n_stretch else 1
        errors = []
        for sign in (1, -1):  # the pair (n cos r, n sin r) is also that of -n and r + 180 degrees
            along = place / axis
            by = 2 ** (0.2 * sign * n_stretch)
            back = torch.complex(along.real / by, along.imag * by) * axis
            back = back / complex(cos + 1, sin) / 2 ** (0.2 * n)
            back_x, back_y = back.real * (-1 if mirrored else 1), -back.imag * (-1 if flipped else 1)
            inside = torch.maximum(back_x.abs(), back_y.abs()) < 1 - 4 / R  # elsewhere reflections
            if inside.sum() > 50:
                errors.append((image - waves(back_x, back_y)).abs()[:, inside].max().item())
        assert not errors or min(errors) < 0.02
        seen += bool(errors)
    assert seen > 350


def test_ada_draws_what_the_paper_says():
    torch.manual_seed(0)
    B = 40_000
    x = torch.rand(1, 3, 4, 4).expand(B, 3, 4, 4)
    out, told = datasets.ada(x)
    untouched = (told == 0).all(1)
    assert untouched.double().mean() == pytest.approx(0.2819, abs=0.007)  # 0.5 x 0.94 x 0.88^4
    assert (out[untouched] - x[untouched]).abs().max() < 1e-5
    alone = (told[:, 0] == 1) & (told[:, 1:] == 0).all(1)
    assert (out[alone] - x[alone].flip(3)).abs().max() < 1e-5
    assert ((told[:, 3] + 1) ** 2 + told[:, 4] ** 2 - 1).abs().max() < 1e-5
    happened = [told[:, 0], told[:, 1], told[:, 2], told[:, 4], told[:, 5:7].abs().sum(1), told[:, 7]]
    shares = [(numbers != 0).double().mean().item() for numbers in happened]
    assert shares == pytest.approx([0.5, 0.06, 0.12, 0.12, 0.12, 0.12], abs=0.008)
    for numbers in (told[:, 2], told[:, 5:7].norm(dim=1) * told[:, 5].sign(), told[:, 7], told[:, 8]):
        numbers = numbers[numbers != 0].numpy()
        assert scipy.stats.kstest(numbers, scipy.stats.norm.cdf).pvalue > 0.001
    angles = torch.atan2(told[:, 4], told[:, 3] + 1)[told[:, 4] != 0].numpy()
    assert scipy.stats.kstest(angles, scipy.stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.001
    stretched = told[:, 5] != 0
    assert (told[stretched, 6] == 0).double().mean() == pytest.approx(0.5, abs=0.03)  # along the axis
    assert (told[:, 7] != 0).equal(told[:, 8] != 0)  # both or none


def test_ada_without_chances_only_mirrors():
    x = torch.rand(64, 3, 8, 8)
    out, told = datasets.ada(x, p=0)
    assert (told[:, 1:] == 0).all() and 0 < told[:, 0].sum() < 64
    mirrored = told[:, 0, None, None, None].bool()
    assert (out - torch.where(mirrored, x.flip(3), x)).abs().max() < 1e-5
