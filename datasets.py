"""Data for every script: long-tailed CIFAR, drawn shapes that need no download, your own folder of images.

    python datasets.py cifar100lt           # prepare a data set, print its counts, draw a picture of it
    python datasets.py shapeslt --rho 50

    train = load("cifar100lt", "data")                  # an ImageSet: images uint8, labels, class names
    for x, y in Batches(train, batch_size=128): ...     # x float32 in [-1, 1], y class indices; never ends

Names
    shapes, shapeslt            ten drawn shapes, balanced or long-tailed; no files, about two seconds
    cifar10, cifar100           Krizhevsky 2009, all 50,000 training images
    cifar10lt, cifar100lt       exponential tail of Cao et al. 2019 (LDAM, arXiv:1906.07413); --rho sets it
    cifar10imb, cifar100imb     the histograms of Softlabel-GAN (Katsumata et al., WACV 2024)
    cifar10imb-90, -120         cifar10imb with more images: 90 or 120 in its smallest class (their Fig. 5)
    flowers102                  Oxford flowers (Nilsback and Zisserman 2008), all 8,189, as in Softlabel-GAN
    tinyimagenet                Tiny ImageNet, 200 classes with 500 training images each
    tinyimagenetimb             47,602 of these, 41 to 483 a class, as in Softlabel-GAN
    inat2019                    iNaturalist 2019, 1,010 species with a tail of their own, as in CBGAN
    folder:PATH                 your own images: PATH/train/<class>/* or PATH/<class>/* and, if you have them,
                                PATH/test and PATH/reference with the same classes
Splits
    train       what a method learns from
    reference   the balanced images that scores compare with: the full training set for CIFAR, cifar*lt (as in
                CBDM, CVPR 2023) and tinyimagenet, the test set for *imb (as in Softlabel-GAN), a new drawing
                of shapes; for inat2019 as many training images of each class as the rarest has (CBGAN, UAI
                2021, has 16,160, so 16 of each)
    test        held-out images, balanced; Tiny ImageNet's and iNaturalist's are their validation sets
    All three splits of flowers102 are all its images, as in Softlabel-GAN: nothing is held out.
    A folder's reference is PATH/reference, else PATH/test. Where it has neither, a part of each class is both
    and held out from training, the same files on each machine: of n images n // 5, at most 100.

Images are decoded once, into <data-dir>/<source>-<split>-<size>.npz: images (N, H, W, 3) uint8, labels (N,)
int64, classes (K,) str; of files also where they lay and a fingerprint of them. From then on nothing else is
read, so a data directory can be copied to a machine without a network or without your photos.
All images stay in memory (CIFAR: 150 MB), which makes a batch one indexing operation: no workers, no queue.
Arrays of 256 MB or more are mapped: the system reads an image when it is first drawn.

The last section, "For every command line", is what all scripts share and no paper is about.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import difflib
import functools
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

NAMES = ("shapes", "shapeslt", "cifar10", "cifar100", "cifar10lt", "cifar100lt",
         "cifar10imb", "cifar100imb", "cifar10imb-90", "cifar10imb-120",
         "flowers102", "tinyimagenet", "tinyimagenetimb", "inat2019", "folder:PATH")
# Pixels, by how a name begins. CBGAN: 64 for inat2019. Softlabel-GAN: 128 for flowers102, and Tiny ImageNet's
# 64 enlarged to 128 (--image-size 128).
SIZES = {"shapes": 16, "cifar100": 32, "cifar10": 32, "flowers102": 128, "tinyimagenet": 64, "inat2019": 64,
         "folder:": 32}
LONG_TAILED = ("shapeslt", "cifar10lt", "cifar100lt")  # those with a --rho; a folder may have one
IMBALANCES = ("exp", "step")  # from head to tail
SPLITS = ("train", "reference", "test")
DEFAULT_RHO = 100  # head class / tail class; "imb = 0.01" in Cao et al. 2019 and CBDM, their main setting
SMALLEST_SIZE, LARGEST_SIZE = 8, 1024  # pixels
LARGEST_SHAPES = 128  # pixels: 40 s, 1.5 GB


class InputError(Exception):
    """Something the person at the keyboard can mend. One line: what is wrong, with which file, what to do.

    `run_command` prints it as `<script>: error: <line>` and exits with status 2.
    """

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


@dataclasses.dataclass
class ImageSet:
    """images (N, 3, H, W) uint8 tensor, labels (N,) int64 tensor in [0, K), classes: K names by label.

    remember: called with what computes the fingerprint, which takes seconds for each GB; see `remembered`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    remember: Callable = lambda compute: compute()

    @property
    def counts(self):
        """(K,) int64 tensor, images per class."""
        return torch.bincount(self.labels, minlength=len(self.classes))

    @property
    def summary(self):
        """How many images of how many classes, in words."""
        counts = self.counts
        return (f"{len(self.labels)} images of {len(self.classes)} classes, "
                f"{int(counts.max())} to {int(counts.min())} a class")

    @property
    def fingerprint(self):
        """16 hexadecimal digits that tell these images and labels from others."""
        def compute():
            digest = hashlib.sha256()
            for block in (*self.images.split(32), self.labels):  # in blocks: images may lie as (N, H, W, 3)
                digest.update(np.ascontiguousarray(block.numpy()))
            return digest.hexdigest()[:16]

        return self.remember(compute)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file, which replaces `path` when the block succeeds and vanishes when it fails.

    A reader only ever sees a whole file, whenever the writer is killed. np.savez, torch.save and PIL's save
    take the file object. Raises InputError where the disk refuses.
    """
    path = Path(path)
    if RANK:  # process 0 writes
        yield io.BytesIO()
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # beside it: os.replace is atomic within a disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # gone already when the block succeeded


# --------------------------------------------------------------------------------------------------
# Loading by name
# --------------------------------------------------------------------------------------------------
def load(name, data_dir, split="train", image_size=None, rho=None, seed=0, imbalance="exp"):
    """One split of one data set.

    name        one of NAMES
    data_dir    where prepared arrays are read and written (not used for shapes)
    split       "train", "reference" or "test", see the top of this file. A folder with neither of the latter
                holds out n // 5 of n images a class, at most 100; if that is none, the reference is train
    image_size  height and width in pixels; None: see SIZES
    rho         imbalance ratio >= 1: images in the head class / images in the tail class. None: 100 for the
                *lt sets, the folder as it is for folder:, which rho thins, best a balanced one: head first in
                alphabetical order, its smallest class says how many the head keeps. Other sets have none
    seed        which images the training split holds, not how a method trains. cifar*lt: 0 is the subset of
                Cao et al. 2019; another seed gives another subset with the same counts; folder: with rho
                likewise. shapes: seeds the drawing. Reference, test and *imb never depend on it
    imbalance   "exp" or "step", see `long_tailed_counts`
    returns     ImageSet
    raises      InputError
    """
    if name not in NAMES[:-1] and not name.startswith("folder:"):
        near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(NAMES)}"
        raise InputError(f"unknown data set {name!r}; {hint}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    long_tailed, folder = name in LONG_TAILED, name.startswith("folder:")
    if rho is not None and not (long_tailed or folder):
        raise InputError(f"{name} has no imbalance ratio; rho is for {', '.join(LONG_TAILED)} and folders")
    if imbalance == "step" and rho is None and not long_tailed:
        raise InputError(f"imbalance step needs rho, an imbalance ratio, and {name} is asked for without one")
    thinned = long_tailed or rho is not None
    rho = (DEFAULT_RHO if long_tailed else 1) if rho is None else rho
    if not (rho >= 1 and math.isfinite(rho)):
        raise InputError(f"rho is {rho:g}; images in the head class / images in the tail class are 1 or more")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; NumPy takes 0 to 2**32 - 1")
    source = next(source for source in SIZES if name.startswith(source))
    shapes = source == "shapes"
    size = image_size if image_size is not None else SIZES[source]
    largest = LARGEST_SHAPES if shapes else LARGEST_SIZE
    if not SMALLEST_SIZE <= size <= largest:
        raise InputError(f"image size is {size}; {name} takes {SMALLEST_SIZE} to {largest} pixels")

    if shapes:
        images, labels = draw_shapes(split, size, rho, seed, narrow_hues=long_tailed, imbalance=imbalance)
        return ImageSet(images, labels, list(SHAPES))

    imbalanced = "imb" in name and not folder
    stored = split if split != "reference" else ("test" if imbalanced else "train")
    if source == "flowers102":
        stored = "train"
    with first_process_first():
        if folder:
            images, labels, classes = load_folder(name.removeprefix("folder:"), Path(data_dir), split, size)
        else:
            images, labels, classes = load_source(source, Path(data_dir), stored, size)
    keep = slice(None)
    if split == "train" and thinned:
        n_max = np.bincount(labels).min() if folder else len(labels) // len(classes)
        counts = long_tailed_counts(n_max, len(classes), rho, imbalance)
        keep = subset(labels, counts, np.random.RandomState(seed))
    elif split == "train" and imbalanced:
        _, _, smallest = name.partition("-")
        keep = subset(labels, softlabel_gan_counts(len(classes), int(smallest or 65)))
    elif split == "reference" and source == "inat2019":  # balanced, so as many as the rarest class has
        keep = subset(labels, [np.bincount(labels).min()] * len(classes))
    data = image_set(images[keep], labels[keep], classes)
    if isinstance(images, np.memmap):
        chosen = hashlib.sha256(np.arange(len(labels))[keep]).hexdigest()
        data.remember = functools.partial(remembered, Path(images.filename), f"fingerprint {chosen}")
    return data


def image_set(images, labels, classes):
    """Prepared arrays (images (N, H, W, 3) uint8) as an ImageSet (N, 3, H, W), a view of the same memory."""
    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), list(classes))


# --------------------------------------------------------------------------------------------------
# How many images of each class, and which
# --------------------------------------------------------------------------------------------------
def long_tailed_counts(n_max, num_classes, rho, imbalance="exp"):
    """n_c, c = 0 .. K-1: (K,) int64, from n_max down to n_max / rho. Class 0 is the head.

    exp: floor(n_max * (1/rho)^(c / (K - 1))), Cao et al. 2019, get_img_num_per_cls of LDAM-DRW. step: n_max
    for the first ceil(K / 2) classes, floor(n_max / rho) for the others (Buda et al. 2018; Cao et al. 2019).
    """
    c = np.arange(num_classes)
    power = c / max(num_classes - 1, 1) if imbalance == "exp" else c >= num_classes / 2
    counts = np.array([int(round(n_max * (1 / rho) ** float(p), 9)) for p in power])
    if counts.min() < 1:
        raise InputError(f"rho {rho:g} leaves the last class without an image; the head class has {n_max}, "
                         f"so that is the largest rho")
    return counts


# Softlabel-GAN, Fig. 5: the smallest class of imbalanced CIFAR-10, and the S that scales its histogram.
# 65 is the paper's main data set. Of the other two the paper gives only the smallest class.
# CHOICE: the same histogram with a larger S (6,827 to 6,902 give 90, 9,102 to 9,177 give 120).
HISTOGRAM_TOTAL = {65: 5000, 90: 6900, 120: 9150}


def softlabel_gan_counts(num_classes, smallest=65):
    """(K,) int64: imbalanced CIFAR-10 (3208 images, 65 to 1720 a class), CIFAR-100 (2993, 6 to 36 a class) or
    Tiny ImageNet (47,602, 41 to 483).

    Softlabel-GAN, official datasets.py: 5000 times the probability that a log-normal (s=3; K = 10) or
    chi-squared (df=3; K = 100) variable falls into each of K equal bins on [0, 3], rounded down. Then a fixed
    permutation assigns them to the classes. smallest: 65, 90 or 120, see HISTOGRAM_TOTAL.
    CHOICE, for Tiny ImageNet (K = 200): 50,000 times, chi-squared, on [0, 8], which that file has commented
    out. It alone gives the paper's counts; the Pareto law of the paper's words gives 18,642 images.
    """
    import scipy.stats  # here because its import takes a second and only these sets need it

    law = scipy.stats.lognorm(s=3) if num_classes == 10 else scipy.stats.chi2(df=3)
    total, end = (50_000, 8) if num_classes == 200 else (HISTOGRAM_TOTAL[smallest], 3)
    bins = total * np.diff(law.cdf(np.linspace(0, end, num_classes + 1)))
    return np.floor(bins).astype(np.int64)[np.random.RandomState(15).permutation(num_classes)]


def subset(labels, counts, random_state=None):
    """Indices of counts[c] images of each class c, class after class.

    With a random state: class by class, shuffle the indices (in file order) and keep the first n_c of them.
    np.random.RandomState(0) gives the images of Cao et al. 2019, whose code does the same with the global
    generator seeded with 0. Without a random state: the first n_c in file order, as in Softlabel-GAN.
    """
    keep = []
    for c, n_c in enumerate(counts):
        of_class = np.where(labels == c)[0]
        if len(of_class) < n_c:
            raise InputError(f"class {c} needs {n_c} images, but the prepared file has {len(of_class)}; "
                             f"is it complete?")
        if random_state is not None:
            random_state.shuffle(of_class)
        keep.append(of_class[:n_c])
    return np.concatenate(keep)


def head_to_tail(counts):
    """Class indices from most to fewest images, (K,) int64 array; equal counts stay in label order."""
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def thirds(counts):
    """head_to_tail cut in three: {"head": indices, "middle": ..., "tail": ...}; of 100 classes 34, 33, 33."""
    head, middle, tail = np.array_split(head_to_tail(counts), 3)
    return {"head": head, "middle": middle, "tail": tail}


# --------------------------------------------------------------------------------------------------
# Prepared arrays
# --------------------------------------------------------------------------------------------------
REPLACE_IT = "delete it or replace it by a good copy, then run again"
MAPPED_FROM = 2**28  # bytes of images: below, reading them takes half a second


@contextlib.contextmanager
def prepared_file(path):
    """Opens a prepared .npz; raises InputError where it is cut short or damaged.

    allow_pickle=False: a data file from somewhere else must not be able to run code.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except MemoryError:
        raise
    except Exception as error:  # zip, zlib, NumPy's header and pickle checks: each has its own exceptions
        raise InputError(f"{path} cannot be read ({error}); {REPLACE_IT}") from error


def read_prepared(path, size):
    """images (N, size, size, 3) uint8, labels (N,) int64, classes (K,) str; InputError for anything else."""
    with prepared_file(path) as file:
        images = stored_images(path, file)
        labels, classes = file["labels"], file["classes"]
    wrong = None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        wrong = f"images are {images.dtype} {images.shape}, not uint8 (N, {size}, {size}, 3)"
    elif labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        wrong = f"labels are {labels.dtype} {labels.shape}, not int64 ({len(images)},)"
    elif classes.dtype.kind != "U" or classes.ndim != 1:
        wrong = f"classes are {classes.dtype} {classes.shape}, not a list of names"
    elif len(labels) == 0:
        wrong = "it holds no images"
    elif labels.min() < 0 or labels.max() >= len(classes):
        wrong = f"labels do not lie in 0 .. {len(classes) - 1}"
    if wrong:
        raise InputError(f"{path} is not a prepared data set ({wrong}); {REPLACE_IT}")
    return images, labels, classes


def stored_images(path, file):
    """The array `images` of a prepared file: read, or mapped if it is large. np.savez doesn't compress it.

    Reading checks the sums (CRC-32) that a zip has of its contents. Of a mapped file they are checked once.
    """
    info = file.zip.getinfo("images.npy")
    if info.file_size < MAPPED_FROM or info.compress_type != zipfile.ZIP_STORED:
        return file["images"]
    with open(str(path), "rb") as raw:  # str: for the .filename of a memmap
        raw.seek(info.header_offset + 26)  # where a zip has the lengths of the name and of what else precedes
        raw.seek(info.header_offset + 30 + int(np.fromfile(raw, "<u2", 2).sum()))
        np.lib.format.read_magic(raw)
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(raw)
        if by_column or dtype != np.uint8:
            return file["images"]

        def check():
            if damaged := file.zip.testzip():
                raise zipfile.BadZipFile(f"Bad CRC-32 for file {damaged!r}")
            return "sound"

        remembered(path, "sound", check)
        return np.memmap(raw, dtype, "c", raw.tell(), shape)  # c: what a caller writes stays in memory


def remembered(path, what, compute):
    """compute(), a text on the large file at `path`: kept beside it until that file changes or is a copy."""
    now = os.stat(path)
    key = hashlib.sha256(f"{what} {now.st_ino} {now.st_size} {now.st_mtime_ns}".encode()).hexdigest()[:16]
    note = path.with_name(f"{path.stem}-{key}.txt")
    if note.exists():
        return note.read_text()
    text = compute()
    with contextlib.suppress(InputError), atomic_write(note) as file:  # a directory may be for reading alone
        file.write(text.encode())
    return text


def read_origin(path):
    """(fingerprint, absolute path) of the folder that a prepared file is from; "" where it does not say."""
    with prepared_file(path) as file:
        fingerprint, folder = (str(file[name]) if name in file else "" for name in ("fingerprint", "folder"))
    return fingerprint, folder


def resize(image, size):
    """A PIL image, centre-cropped to a square, as (size, size, 3) uint8.

    Bicubic with PIL's antialiasing: without it FID shifts by several points (Parmar et al. 2022, clean-fid).
    """
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


# The downloads: archives, in which directory of the data directory, from where.
DOWNLOADS = {
    "cifar10": ("cifar-10-python.tar.gz", "", "https://www.cs.toronto.edu/~kriz/"),
    "cifar100": ("cifar-100-python.tar.gz", "", "https://www.cs.toronto.edu/~kriz/"),
    "flowers102": ("102flowers.tgz, imagelabels.mat and setid.mat", "flowers-102",
                   "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "tinyimagenet": ("tiny-imagenet-200.zip", "", "http://cs231n.stanford.edu/"),
    "inat2019": ("val2019.json.tar.gz, and train_val2019.tar.gz under the name 2019.tgz,", "",
                 "https://ml-inat-competition-datasets.s3.amazonaws.com/2019/"),
}
MD5 = {"tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de",  # as in many public loaders
       "val2019.json.tar.gz": "5cc5509b0fe495f1c8c1362612448497"}  # the competition's page
# What was unpacked in part is seen by its number of images. CBGAN counts iNaturalist's 3,030 twice: as test
# images, and in its 268,243 training images.
IMAGES = {("flowers102", "train"): 8_189,
          ("tinyimagenet", "train"): 100_000, ("tinyimagenet", "test"): 10_000,
          ("inat2019", "train"): 265_213, ("inat2019", "test"): 3_030}


def load_source(source, data_dir, split, size):
    """images (N, size, size, 3), labels, classes of one of DOWNLOADS; split "train" or "test"."""
    path = data_dir / f"{source}-{split}-{size}.npz"
    if not path.exists():
        (prepare_cifar if source.startswith("cifar") else prepare_files)(source, data_dir, split, size, path)
    return read_prepared(path, size)


def prepare_cifar(source, data_dir, split, size, path):
    """Writes the prepared arrays: 32 pixels from the download, other sizes from the prepared 32."""
    if size == 32:
        loaded = download(source, data_dir, split, path)
        images, classes = loaded.data, loaded.classes
        labels = np.array(loaded.targets, dtype=np.int64)
    else:
        small, labels, classes = load_source(source, data_dir, split, 32)
        images = np.empty((len(small), size, size, 3), np.uint8)
        for i, image in enumerate(tqdm(small, f"resizing {source} {split}")):
            images[i] = resize(Image.fromarray(image), size)
    with atomic_write(path) as file:
        np.savez(file, images=images, labels=labels, classes=np.array(classes))


def prepare_files(source, data_dir, split, size, path):
    """Writes the prepared arrays of a download that is a directory of images, in the order of their names.

    Images are cropped to a square. Softlabel-GAN's code squeezes its flowers instead.
    """
    classes, pairs = download(source, data_dir, split, path)
    if len(pairs) != IMAGES[source, split]:
        raise InputError(f"{source} has {IMAGES[source, split]:,d} {split} images, but in {data_dir} are "
                         f"{len(pairs):,d}; remove what was unpacked there, then run again")
    files, labels = zip(*sorted(pairs, key=lambda pair: (pair[1], pair[0])), strict=True)
    write_prepared(path, source, data_dir, split, size, np.array(classes), files, np.array(labels, np.int64))


def download(source, data_dir, split, path):
    """`unpacked`, with one line for whatever goes wrong. path: of the prepared arrays, to name them."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the data directory {data_dir}: {error}") from error
    try:
        return unpacked(source, data_dir, split)
    except Exception as error:  # urllib, http, tarfile and torchvision each raise their own
        archives, where, url = DOWNLOADS[source]
        raise InputError(
            f"cannot get {source} ({error}); copy {archives} (from {url}) into {data_dir / where} "
            f"or a prepared {path.name} into {data_dir}, then run again"
        ) from error


def unpacked(source, data_dir, split):
    """torchvision downloads, checks MD5 sums, and keeps an archive that is there already.

    Returns its data set of CIFAR; of the others the classes, by label, and (file, label) of each image.
    """
    from torchvision import datasets  # here because a prepared set does not need it

    def fetch(archive):
        url = DOWNLOADS[source][2] + archive
        datasets.utils.download_and_extract_archive(url, data_dir, md5=MD5[archive])

    if source.startswith("cifar"):
        dataset = datasets.CIFAR100 if source == "cifar100" else datasets.CIFAR10
        return dataset(root=str(data_dir), train=split == "train", download=True)
    if source == "flowers102":
        parts = [datasets.Flowers102(data_dir, part, download=True, loader=str)
                 for part in ("train", "val", "test")]
        return parts[0].classes, [part[i] for part in parts for i in range(len(part))]
    if source == "inat2019":  # the archive holds both splits; the competition's list says which is which
        found = datasets.INaturalist(data_dir, "2019", download=True)
        fetch("val2019.json.tar.gz")
        listed = json.loads((data_dir / "val2019.json").read_text())["images"]
        test = {os.path.basename(image["file_name"]) for image in listed}
        classes = found.all_categories  # <super category>/<number>
        return classes, [(os.path.join(found.root, classes[c], name), c) for c, name in found.index
                         if (name in test) == (split == "test")]
    where = data_dir / "tiny-imagenet-200"
    if not where.is_dir():
        fetch("tiny-imagenet-200.zip")
    classes = [directory.name for directory in directories_in(where / "train")]
    if split == "train":
        return classes, [(file, c) for c, name in enumerate(classes)
                         for file in images_in(where / "train" / name / "images")]
    rows = (where / "val" / "val_annotations.txt").read_text().splitlines()  # file, class, box
    return classes, [(str(where / "val" / "images" / file), classes.index(name))
                     for file, name, *_ in map(str.split, rows)]


# --------------------------------------------------------------------------------------------------
# Your own images
# --------------------------------------------------------------------------------------------------
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
READERS = 4  # threads, also on fewer cores: some wait for the disk. Each holds one decoded image at a time
FAULTS_SHOWN = 100  # images that cannot be read: so many are named, the others counted
HELD_OUT_SHARE, MOST_HELD_OUT = 5, 100  # one image in five of each class, at most 100
nfc = functools.partial(unicodedata.normalize, "NFC")  # an umlaut is one character, as on Linux; on macOS two


def folder_root(where):
    """PATH of folder:PATH as an absolute path; its last part names the prepared arrays."""
    if not where:
        raise InputError("folder: needs a path: folder:/data/birds with images in /data/birds/<class>/")
    try:
        where.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the path {where!r} is not UTF-8; rename it") from error
    return Path(os.path.abspath(os.path.expanduser(where)))  # not resolve(): a link keeps the name you typed


def folder_splits(root, data_dir, size):
    """The splits there are: directories, or prepared arrays where the folder is not on this machine."""
    if not root.is_dir():
        return [split for split in SPLITS if prepared_path(root, data_dir, split, size).exists()]
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if splits in ([], ["train"]):  # PATH/<class>/* or PATH/train/<class>/*
        sizes = [len(images_in(directory)) for directory in directories_in(directory_of(root, "train"))]
        splits = ["train"] if any(sizes) else splits
        splits += ["test"] if any(n >= HELD_OUT_SHARE for n in sizes) else []
    return splits


def holds_out(root):
    """Whether the test images of a folder are a part of those in its classes."""
    return root.is_dir() and not ((root / "reference").is_dir() or (root / "test").is_dir())


def held_out(name, files):
    """The files of a class that are held out, by the SHA-256 of their names: as good as drawn at random."""
    digests = {hashlib.sha256(nfc(f"{name}/{os.path.basename(f)}").encode()).digest(): f for f in files}
    return {digests[key] for key in sorted(digests)[: min(len(files) // HELD_OUT_SHARE, MOST_HELD_OUT)]}


def prepared_path(root, data_dir, split, size):
    return data_dir / f"folder-{root.name}-{split}-{size}.npz"


def load_folder(where, data_dir, split, size):
    """images (N, size, size, 3), labels, classes of PATH/<split>/<class>/*; PATH/<class>/* are as PATH/train.

    Without PATH/reference and PATH/test, `held_out` parts train and test. Classes are in alphabetical order.
    The arrays are prepared again when the folder has changed since. Where the folder is not on this machine,
    the arrays that were prepared from it are enough.
    """
    root = folder_root(where)
    try:
        splits = folder_splits(root, data_dir, size)
    except OSError as error:
        raise InputError(f"cannot list the images of {root}: {error}") from error
    if "train" not in splits:
        missing = "has no directory train, and no classes of its own"
        if not root.is_dir():
            missing = f"is no directory, nor was it prepared in {data_dir}"
        raise InputError(f"{root} {missing}; images go into {root / 'train'}/<class>/ or {root}/<class>/")
    if split == "reference":
        split = next(s for s in ("reference", "test", "train") if s in splits)
    if split not in splits:
        raise InputError(f"{root} has no {split} images; they go into {root / split}/<class>/")

    path = prepared_path(root, data_dir, split, size)
    if root.is_dir():
        for each in splits if holds_out(root) else [split]:  # both parts: one alone would pass for the whole
            prepare_folder(root, each, size, prepared_path(root, data_dir, each, size))
    else:
        check_origin(root, path)
    return read_prepared(path, size)


def prepare_folder(root, split, size, path):
    """Writes the prepared arrays, unless they are there and were made from these very files."""
    try:
        classes, files, labels = list_folder(root, split)
        fingerprint = fingerprint_of(root, files)
    except OSError as error:
        raise InputError(f"cannot list the images of {root}: {error}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{root}: the name {error.object!r} is not UTF-8; rename it") from error
    if path.exists():
        if read_origin(path)[0] == fingerprint:
            return
        changed = directory_of(root, split)
        print(f"{changed} has changed since {path} was prepared; preparing it again", file=sys.stderr)
    write_prepared(path, fingerprint, root, split, size, classes, files, labels)


def write_prepared(path, fingerprint, root, split, size, classes, files, labels):
    """Decodes the files, N paths below `root`, with classes (K,) and labels (N,), into prepared arrays.

    The images go to a part file, not to memory; a preparation that was cut short resumes from it, unless the
    fingerprint says that it was of other files.
    """
    part, head = path.with_suffix(".part"), fingerprint.encode()
    image_bytes = 3 * size**2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not part.exists() or part.open("rb").read(len(head)) != head:  # of other files
            part.unlink(missing_ok=True)  # not emptied: another process may be reading it
            part.write_bytes(head)
        with open(part, "r+b") as file:
            done = min((file.seek(0, os.SEEK_END) - len(head)) // image_bytes, len(files))
            file.seek(len(head) + done * image_bytes)
            for image in read_images(files, size, f"reading {root.name} {split}", done):
                file.write(image)
            file.flush()
            images = np.memmap(file, np.uint8, "r", len(head), (len(files), size, size, 3))
    except OSError as error:
        raise InputError(f"cannot write {part}: {error}") from error
    except InputError:  # next time the files are others
        part.unlink()
        raise
    warn_of_twins(images, labels, files)
    with atomic_write(path) as file:
        np.savez(file, images=images, labels=labels, classes=classes,
                 fingerprint=fingerprint, folder=str(root))
    del images  # Windows deletes no file that is in use
    part.unlink(missing_ok=True)


def warn_of_twins(images, labels, files):
    """A warning where one image is in two classes: images (N, ...), labels (N,), files: N paths."""
    seen = {}
    first = [seen.setdefault(hash(image.tobytes()), i) for i, image in enumerate(images)]
    twins = np.flatnonzero(labels[first] != labels)
    for i in twins[:1]:
        warn(f"{files[first[i]]} and {files[i]}: one picture in two classes; {len(twins)} such pairs")


def check_origin(root, path):
    """Says which folder the prepared file is from; InputError where that is another one of the same name.

    The last two parts of the paths must agree, no more: each machine keeps its data somewhere else.
    """
    _, folder = read_origin(path)
    if not folder:
        raise InputError(f"{root} is no directory here, and {path} does not say from which folder it was "
                         f"prepared; prepare it again where the images are")
    if Path(folder).parts[-2:] != root.parts[-2:]:
        raise InputError(f"{root} is no directory here, and {path} was prepared from another one, {folder}; "
                         f"if that is the one you mean, ask for folder:{folder}")
    print(f"{root} is not on this machine; {path} was prepared from {folder}", file=sys.stderr)


def directory_of(root, split):
    """Where the classes of a split are: PATH/<split>, PATH/train, or PATH where the classes lie in it."""
    return next(path for path in (root / split, root / "train", root) if path.is_dir())


def visible(where):
    """What is in a directory, in alphabetical order, without hidden files and directories."""
    with os.scandir(where) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: nfc(e.name))


def directories_in(where):
    return [Path(e.path) for e in visible(where) if e.is_dir()]  # OSError where a link leads to itself


def images_in(where):
    return [e.path for e in visible(where) if e.name.lower().endswith(IMAGE_SUFFIXES)]  # Paths take a second


def list_classes(directories):
    """The images of each class, a list of lists. InputError for a class that is empty or has directories."""
    nested = [below for directory in directories for below in directories_in(directory)]
    if nested:
        raise InputError(f"{nested[0]} is a directory within a class ({len(nested)} in "
                         f"{directories[0].parent}); only images directly in <class>/ are read: move them "
                         f"there, or remove the directory")
    of_classes = [images_in(directory) for directory in directories]
    if [] in of_classes:
        empty, kinds = directories[of_classes.index([])], " ".join(IMAGE_SUFFIXES)
        raise InputError(f"{empty} has no images ({kinds}); add some, or remove the directory")
    return of_classes


def list_folder(root, split):
    """classes (K,) str, files (N paths, class after class), labels (N,) int64."""
    directories = directories_in(directory_of(root, split))
    classes, classes_of_train = ([nfc(directory.name) for directory in found] for found in
                                 (directories, directories_in(directory_of(root, "train"))))
    if not classes_of_train:
        raise InputError(f"{root / 'train'} has no sub-directories; each class is one, with its images in it")
    for name in sorted(set(classes) ^ set(classes_of_train)):
        has, lacks = (split, "train") if name in classes else ("train", split)
        raise InputError(f"{root}: class {name!r} is in {has} but not in {lacks}; "
                         f"the splits need the same classes")

    of_classes = list_classes(directories)
    if holds_out(root):
        for name, files in zip(classes, of_classes, strict=True):
            out = held_out(name, files)
            files[:] = [file for file in files if (file in out) == (split == "test")]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in of_classes])
    return np.array(classes), [file for files in of_classes for file in files], labels


def fingerprint_of(root, files):
    """A hash of paths within the folder, sizes and times of change; it opens no file, so it is quick."""
    digest = hashlib.sha256(b"2\n")  # the version of read_image: what an earlier one read is prepared again
    for file in files:
        name, status = file[len(str(root)) + 1 :].encode(), os.stat(file)
        digest.update(name + f"|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_images(files, size, what, done=0):
    """Yields `read_image` of each file, in order, without the first `done`.

    InputError names all that cannot be read, at the end. Threads do: PIL releases Python's lock to decode.
    """
    def read(file):  # an image, or in a text what is wrong with the file
        try:
            return read_image(file, size)
        except MemoryError:
            raise
        except Exception as error:  # each of PIL's decoders has its own exceptions
            return f"{file} ({error})"

    faults = []
    bar = tqdm(desc=what, total=len(files), initial=done, unit=" images")
    with bar, ThreadPoolExecutor(READERS) as pool:
        for start in range(done, len(files), 64):  # 64: decoded images in memory
            for image in pool.map(read, files[start : start + 64]):
                bar.update()
                if isinstance(image, str):
                    faults.append(image)
                elif not faults:
                    yield image
    if faults:
        shown = "; ".join(faults[:FAULTS_SHOWN])
        if len(faults) > FAULTS_SHOWN:
            shown += f"; and {len(faults) - FAULTS_SHOWN} more"
        raise InputError(f"cannot read {len(faults)} of {len(files)} images: {shown}; remove or replace them")


def read_image(path, size):
    """One image file as (size, size, 3) uint8: upright as a viewer shows it, on white where transparent."""
    with Image.open(path) as image:
        animated = getattr(image, "is_animated", False)
        if animated and image.format != "MPO":  # MPO: a camera's JPEG with its preview behind it
            raise ValueError(f"{image.n_frames} images in one file, an animation or pages; save one of them")
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster. The rule: take
        # the smallest with both sides at least 2 * size. The pixels differ slightly from those of a full
        # decode: on 20 made-up photos by 0.2 grey levels on average, 2 at most; with 1 * size by 0.7 and 5.
        if size:
            image.draft(None, (2 * size, 2 * size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = eight_bit_grey(image)
        if image.has_transparency_data:  # CHOICE: white; what lies under a transparent pixel is arbitrary
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return resize(image, size) if size else np.asarray(image.convert("RGB"))  # None: as it is


def eight_bit_grey(image):
    """Greys of 16 bits (mode I;16), 32 bits (I) or floats (F) as mode L. PIL itself would clip them at 255.

    16-bit values are scaled. The others have no fixed range, so theirs must plainly be that of 8 or 16 bits.
    """
    greys = np.asarray(image)
    low, high = greys.min(), greys.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        greys = greys >> 8
    elif not (low >= 0 and 1 < high <= 255):  # up to 1: black to white, most likely; NaN is refused too
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its greys are {kind} from {low:g} to {high:g}; save them as 8 or 16 bits")
    return Image.fromarray(np.rint(greys).astype(np.uint8))


def load_images(path, classes=None):
    """Pictures as they are, such as samples: PATH/<class>/*, or PATH/* without labels.

    classes  names; a class may lack a directory. None: the directories, in alphabetical order
    returns  images (N, 3, H, W) uint8; labels (N,) int64, or None; names by label, None where nobody knows
    raises   InputError, also where the sizes differ
    """
    where = Path(path)
    try:
        directories, files = directories_in(where), images_in(where)
        of_classes = list_classes(directories)
    except OSError as error:
        raise InputError(f"cannot list the images of {path}: {error}") from error
    if bool(directories) == bool(files):
        found = f"both {directories[0]}/ and {files[0]}" if files else "no images"
        raise InputError(f"{path} has {found}; they go into {path}/<class>/, or without labels into {path}")
    names = [nfc(directory.name) for directory in directories]
    known = names if classes is None else list(map(nfc, classes))
    for name in sorted(set(names) - set(known)):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:3]
        raise InputError(f"{where / name} is none of the {len(known)} classes, such as {', '.join(near)}")
    labels = None
    if directories:
        files = sum(of_classes, [])
        labels = np.repeat([known.index(name) for name in names], [len(of_class) for of_class in of_classes])
        labels = torch.from_numpy(labels).long()
    images = None
    for i, image in enumerate(read_images(files, None, f"reading {where.name}")):
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            one, other = (f"{width} x {height}" for height, width, _ in (images.shape[1:], image.shape))
            raise InputError(f"{files[0]} has {one} pixels, {files[i]} {other}; all must have one size")
        images[i] = image
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels, known or None


# --------------------------------------------------------------------------------------------------
# Shapes: a data set that needs no download
# --------------------------------------------------------------------------------------------------
def plus(x, y):
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return (near < 0.27) & (far < 0.95)


def star(x, y, points=5, inner=0.45):
    """Inside a star with its tips on the unit circle and its notches at radius `inner`."""
    sector = np.pi / points
    angle = np.abs((np.arctan2(x, y) + sector) % (2 * sector) - sector)  # 0 at a tip, `sector` at a notch
    radius = np.hypot(x, y)
    edge_x, edge_y = inner * math.cos(sector) - 1, inner * math.sin(sector)  # from tip (1, 0) to notch
    return edge_x * radius * np.sin(angle) - edge_y * (radius * np.cos(angle) - 1) > 0


def heart(x, y):
    """Inside the curve (u^2 + v^2 - 1)^3 = u^2 v^3, shrunk into the unit disc."""
    u, v = 1.28 * x, 1.28 * y + 0.22
    body = u * u + v * v - 1
    return body * body * body < u * u * v * v * v


# From head to tail. Each function tells which points (x right, y up, in the frame of the shape) are inside.
# Each shape is its own mirror image, so a method may flip images left to right here as it does on CIFAR.
# All shapes lie in the unit disc: with the largest scale and offset (.75 + .2) they stay within the picture.
SHAPES = {
    "disc": lambda x, y: x * x + y * y < 0.85**2,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.7,
    "triangle": lambda x, y: (y > -0.5) & (math.sqrt(3) * np.abs(x) + y < 1),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.76) < 0.22,
    "plus": plus,
    "star": star,
    "heart": heart,
    "crescent": lambda x, y: (x * x + y * y < 0.95**2) & (x * x + (y - 0.5) ** 2 > 0.75**2),  # horns up
    "hbars": lambda x, y: (np.abs(x) < 0.7) & (np.abs(np.abs(y) - 0.48) < 0.22),
    "vbars": lambda x, y: (np.abs(y) < 0.7) & (np.abs(np.abs(x) - 0.48) < 0.22),
}
SHAPES_PER_CLASS = {"train": 1000, "reference": 400, "test": 200}


@functools.lru_cache(maxsize=8)  # a script loads the same splits several times
def draw_shapes(split, size, rho, seed, narrow_hues, imbalance="exp"):
    """Ten classes of one coloured shape on a grey ground: images (N, 3, size, size) uint8, labels (N,) int64.

    Every caller gets the same tensors, so nobody may write into them.

    Ours, so that a first look needs no download. Colour, ground, place, scale and rotation say nothing about
    the class, with one exception: with narrow_hues, the *training* images of class c take their hues from an
    arc that narrows linearly from the full circle (head) to a quarter of it (tail). A tail class therefore
    lacks variety as well as images, which a method can bring back if it shares knowledge between classes. In
    the reference every class has every hue.
    """
    train = split == "train"
    counts = long_tailed_counts(SHAPES_PER_CLASS[split], len(SHAPES), rho if train else 1, imbalance)
    images = []
    for c, (inside, n_c) in enumerate(zip(SHAPES.values(), counts, strict=True)):
        # Each class of each split has its own stream: other counts give more or fewer of the same images.
        # RandomState instead of default_rng because NumPy promises that its streams never change.
        random_state = np.random.RandomState([SPLITS.index(split), c, seed if train else 0])
        arc = 1 - 0.75 * c / (len(SHAPES) - 1) if narrow_hues and train else 1.0
        middle = c * (math.sqrt(5) - 1) / 2  # CHOICE: the golden section spreads the arcs over the circle
        images.append(draw_shape(inside, random_state.rand(n_c, 8), size, arc, middle))
    labels = np.repeat(np.arange(len(SHAPES)), counts)
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(labels)


def draw_shape(inside, u, size, arc, middle, supersampling=4, block=64):
    """(n, 3, size, size) uint8 from u (n, 8) uniform in [0, 1).

    arc, middle: width and middle of the range of hues, in turns of the colour circle.
    supersampling: sub-pixels along each side of a pixel; the share of them inside the shape is its opacity.
    block: images drawn at a time; few enough that the temporary arrays stay in the processor's cache.
    """
    hue, saturation = middle + arc * (u[:, 0] - 0.5), 0.75 + 0.25 * u[:, 1]
    value, ground = 0.85 + 0.15 * u[:, 2], 0.5 * u[:, 3]
    # HSV to RGB with k = (n + 6 hue) mod 6, n = 5, 3, 1 for red, green, blue:
    # channel = value * (1 - saturation * clip(min(k, 4 - k), 0, 1))
    k = (np.array([5, 3, 1]) + 6 * hue[:, None]) % 6
    colour = value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))  # (n, 3)

    # Positions of the sub-pixels; the picture is [-1, 1] x [-1, 1], so lengths are in half widths.
    fine = size * supersampling
    axis = ((np.arange(fine) + 0.5) / fine * 2 - 1).astype(np.float32)
    scale = 0.5 + 0.25 * u[:, 4]
    angle = np.deg2rad(20) * (2 * u[:, 5] - 1)
    centre_x, centre_y = 0.2 * (2 * u[:, 6] - 1), 0.2 * (2 * u[:, 7] - 1)
    images = np.empty((len(u), 3, size, size), np.uint8)
    for start in range(0, len(u), block):
        b = slice(start, start + block)
        cos, sin = ((f(angle[b]) / scale[b]).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        x = axis[None, None, :] - centre_x[b, None, None].astype(np.float32)  # right
        y = -axis[None, :, None] - centre_y[b, None, None].astype(np.float32)  # up
        covered = inside(cos * x + sin * y, cos * y - sin * x)  # (b, fine, fine) bool, in the shape's frame
        covered = covered.reshape(-1, size, supersampling, size, supersampling).mean(axis=(2, 4))[:, None]
        grey = ground[b, None, None, None]
        images[b] = np.rint(255 * (grey + covered * (colour[b, :, None, None] - grey)))
    return images


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------
class Batches:
    """Endless iterator over (x, y) on `device`: x (B, 3, H, W) float32 in [-1, 1], y (B,) int64.

    classes  "data"     each image once an epoch, so class c comes up in proportion to n_c. Epochs follow one
                        another without a gap: a batch may hold the end of one and the start of the next
             "uniform"  draw a class uniformly, then one of its images, with replacement: "RS" in CBDM
             "sqrt"     the same with classes in proportion to sqrt(n_c): "RS-SQRT" in CBDM
             a number   alpha from 0 to 1, the same with class c drawn with probability
                        (1 - alpha) n_c / N + alpha / K: "Oversample" in Softlabel-GAN
    flip     mirror each image left to right with probability 1/2
    targets  (N, ...) tensor: y comes from here instead of the labels

    Every random number comes from one generator on the CPU, so the order is the same on every device.
    A stream resumed from state_dict() is bit for bit the stream that was never stopped.
    """

    def __init__(self, image_set, batch_size, classes="data", flip=False, device="cpu", seed=0, targets=None):
        counts = image_set.counts
        if isinstance(classes, str) and classes not in ("data", "uniform", "sqrt"):
            raise ValueError(f'classes is {classes!r}; it is "data", "uniform", "sqrt" or a number')
        if batch_size < 1 or len(image_set.labels) == 0:
            raise ValueError(f"batch_size is {batch_size} and the set has {len(image_set.labels)} images")
        if classes != "data" and counts.min() < 1:
            raise ValueError(f"class {int(counts.argmin())} has no image to draw")
        self.images = image_set.images.to(device)
        self.labels = (image_set.labels if targets is None else targets).to(device)
        self.batch_size, self.flip = batch_size, flip
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)  # what is left of this epoch ("data")
        self.by_class = torch.argsort(image_set.labels, stable=True)
        self.counts, self.first = counts, counts.cumsum(0) - counts  # class c: counts[c] from first[c] on
        n_c = counts.double()
        N, K = len(image_set.labels), len(counts)
        if isinstance(classes, str):
            self.weight = {"data": None, "uniform": torch.ones_like(n_c), "sqrt": n_c.sqrt()}[classes]
        else:
            self.weight = (1 - classes) * n_c / N + classes / K

    def __iter__(self):
        return self

    def __next__(self):
        if self.weight is None:
            while len(self.order) < self.batch_size:  # several times where the batch is larger than the set
                epoch = torch.randperm(len(self.labels), generator=self.generator)
                self.order = torch.cat([self.order, epoch])
            index, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        else:
            c = torch.multinomial(self.weight, self.batch_size, replacement=True, generator=self.generator)
            u = torch.rand(self.batch_size, dtype=torch.float64, generator=self.generator)
            index = self.by_class[self.first[c] + (u * self.counts[c]).long()]
        index = to_device(index, self.images.device)
        x, y = self.images[index].contiguous(), self.labels[index]  # (N, H, W, 3) in memory: see image_set
        if self.flip:
            mirrored = torch.rand(self.batch_size, generator=self.generator) < 0.5
            mirrored = to_device(mirrored, x.device)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x.float() / 127.5 - 1, y

    def state_dict(self):
        """Where the stream stands: tensors only, so torch.load(weights_only=True) reads it."""
        return {"generator": self.generator.get_state(), "order": self.order.clone()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"].cpu())  # .cpu(): torch.load may have mapped it to the GPU
        self.order = state["order"].cpu()


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------
# On the device, for a whole batch at once; flips are in Batches.
DIFFAUGMENT = ("color", "translation", "cutout")


def diffaugment(x, policy, batches=1):
    """DiffAugment (Zhao et al. 2020, arXiv:2006.10738), its authors' ranges. x (B, 3, R, R) in and out.

    policy: some of "color,translation,cutout", applied in this order. Each image draws its own numbers, and
    gradients pass. What moves in or is cut out is 0, the middle grey. Nothing is clamped: colour reaches
    |x| = 4.5. batches: how many x holds, one after the other.
    """
    B, R = WORLD * len(x), x.shape[-1]
    reach, side = round(R / 8), R // 2
    # Seven numbers an image, from the CPU: the same on each device. They travel in one piece.
    drawn = torch.zeros(7, B)
    if "color" in policy:
        drawn[0].uniform_(-0.5, 0.5)  # brightness
        drawn[1].uniform_(0, 2)  # saturation
        drawn[2].uniform_(0.5, 1.5)  # contrast
    if "translation" in policy:
        drawn[3:5] = torch.randint(2 * reach + 1, (2, B))  # top left corner in the padded image
    if "cutout" in policy:
        drawn[5:7] = torch.randint(R + 1, (2, B))  # centre of the hole, which may lie on the border
    if WORLD > 1:
        drawn = torch.cat([my_share(of_batch.T) for of_batch in drawn.chunk(batches, 1)]).T
    B, drawn = len(x), to_device(drawn, x.device)
    brightness, saturation, contrast = drawn[:3].view(3, B, 1, 1, 1)
    top, left, row, column = drawn[3:].long().view(4, B, 1)
    pixel = torch.arange(R, device=x.device)

    if "color" in policy:
        x = x + brightness
        grey = x.mean(1, keepdim=True)
        x = grey + saturation * (x - grey)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + contrast * (x - mean)
    if "translation" in policy:
        image = torch.arange(B, device=x.device)[:, None, None]
        rows, columns = (top + pixel)[:, :, None], (left + pixel)[:, None, :]
        padded = F.pad(laid_out(x), (reach,) * 4).permute(0, 2, 3, 1)
        x = laid_out(padded[image, rows, columns].permute(0, 3, 1, 2))
    if "cutout" in policy:
        top, left = row - side // 2, column - side // 2
        in_rows = (pixel >= top) & (pixel < top + side)  # (B, R)
        in_columns = (pixel >= left) & (pixel < left + side)
        x = x * ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])
    return x


ADA_CONDITIONS = 9  # numbers an image


def ada(x, p=0.12):
    """EDM's augmentation (Karras et al. 2022, App. F.2; after ADA, Karras et al. 2020). "Adaptive" it is not.

    x (B, 3, R, R) -> the same moved about, and what was done to each image, (B, 9): zeros where nothing was.
    A network that is told so does not repeat it when asked for zeros. Each image is mirrored with probability
    1/2; then, each with probability p:

        flip      upside down, in half of these cases
        scale     by 2^(0.2 n); n, like all n below, standard normal
        rotate    by an angle a, any, anticlockwise
        stretch   by 2^(0.2 n) along an axis and 2^(-0.2 n) across, the axis at r, 0 or (one in two) any angle
        move      by R / 8 (n_x, n_y), right and down

    The nine: mirrored, flipped, n, cos a - 1, sin a, n cos r, n sin r, n_x, n_y. An image is continued by its
    reflection. CHOICE: bicubic interpolation; EDM's filters are wavelets.
    """
    B = WORLD * len(x)
    # From the CPU: the same on each device. A number that does not happen is 0.
    normal, uniform = torch.randn(B, 4), torch.rand(B, 2) * 2 - 1
    happens = torch.rand(B, 5) < p
    mirrored, flipped, oblique = (torch.rand(B, 3) < 0.5).T
    flipped = flipped & happens[:, 0]
    scale, stretch = normal[:, 0] * happens[:, 1], normal[:, 1] * happens[:, 3]
    angle = math.pi * uniform[:, 0] * happens[:, 2]
    axis = math.pi * uniform[:, 1] * oblique
    move = normal[:, 2:] * happens[:, 4:]
    conditions = torch.stack([mirrored, flipped, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(),
                              stretch * axis.sin(), *move.T], 1)  # fmt: skip

    # Where does a point of the result come from? Coordinates from -1 to 1, so R / 8 pixels are 1 / 4.
    def scaled(by_x, by_y):
        return torch.diag_embed(torch.stack([by_x, by_y], 1))

    def rotated(a):
        return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1).view(B, 2, 2)

    both = 2 ** (-0.2 * scale)
    along = 2 ** (-0.2 * stretch)
    back = scaled(1 - 2.0 * mirrored, 1 - 2.0 * flipped) @ scaled(both, both) @ rotated(angle)
    back = back @ rotated(-axis) @ scaled(along, 1 / along) @ rotated(axis)
    back = torch.cat([back, back @ (-move / 4)[:, :, None]], 2)  # (B, 2, 3)
    back, conditions = (to_device(my_share(part), x.device) for part in (back, conditions))
    grid = F.affine_grid(back, x.shape, align_corners=False)
    how = "bilinear" if x.device.type == "mps" else "bicubic"  # which MPS has not
    x = F.grid_sample(x, grid, how, padding_mode="reflection", align_corners=False)
    return laid_out(x), conditions


# --------------------------------------------------------------------------------------------------
# python datasets.py NAME
# --------------------------------------------------------------------------------------------------
def table(classes, counts):
    """Lines of text: index, name and count of each class from head to tail, in columns if there are many."""
    width = max(len(name) for name in classes)
    cells = [f"{c:4d} {classes[c]:{width}} {counts[c]:6,d}" for c in head_to_tail(counts)]
    columns = 1 if len(cells) <= 20 else max(1, 110 // (len(cells[0]) + 2))  # 110: characters in a line
    rows = math.ceil(len(cells) / columns)
    return ["  ".join(cells[row::rows]) for row in range(rows)]


def picture(data, rows=10, columns=10, tile=48, bar=200):
    """A PIL image: one class a row from head to tail, its first images, and a bar in proportion to its count.

    rows: the most classes to show, evenly spaced from head to tail.
    tile, bar: about how wide to show an image, how long to draw the longest bar; pixels.
    """
    order = head_to_tail(data.counts)
    order = order[np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(int)]
    left, right = 130, 70  # pixels: for the name left of the images, for the count right of the bar
    size = data.images.shape[-1]
    zoom = max(1, round(tile / size))
    pitch = size * zoom + 2
    start = left + columns * pitch + 6  # of the bars
    sheet = Image.new("RGB", (start + bar + right, len(order) * pitch), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, c in enumerate(order):
        top, middle = row * pitch, row * pitch + pitch // 2
        name = data.classes[c].encode("ascii", "replace").decode()[:20]  # PIL's font has little beyond ASCII
        draw.text((4, middle), name, "black", font, anchor="lm")
        for column, image in enumerate(data.images[data.labels == c][:columns]):
            shown = Image.fromarray(image.permute(1, 2, 0).numpy())
            shown = shown.resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + column * pitch, top))
        n_c = int(data.counts[c])
        end = start + max(1, round(bar * n_c / int(data.counts.max())))
        draw.rectangle((start, middle - pitch // 5, end, middle + pitch // 5), "steelblue")
        draw.text((end + 5, middle), f"{n_c:,}", "black", font, anchor="lm")
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Prepare and describe a data set.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("name", metavar="NAME", help=" ".join(NAMES))
    parser.add_argument("--data-dir", default="data", help="of prepared data sets (default: data)")
    parser.add_argument("--rho", type=float, help=f"imbalance ratio: *lt sets {DEFAULT_RHO}, folders none")
    parser.add_argument("--imbalance", choices=IMBALANCES, default="exp", help="with rho (default: exp)")
    parser.add_argument("--image-size", type=int, help="pixels (default: 16 for shapes, 128 for flowers102, "
                        "64 for tinyimagenet* and inat2019, else 32)")
    parser.add_argument("--out", metavar="PNG", help="the picture (default: <data-dir>/<name>.png)")
    args = parser.parse_args()
    where = args.name, args.data_dir
    train, reference = (load(*where, s, args.image_size, args.rho, 0, args.imbalance) for s in SPLITS[:2])
    _ = train.fingerprint  # of a large file: now, so that a training starts at once
    size, counts = train.images.shape[-1], train.counts
    splits, rule = SPLITS, ""
    if args.name.startswith("folder:"):  # only a folder may lack a test split
        root = folder_root(args.name.removeprefix("folder:"))
        splits = folder_splits(root, Path(args.data_dir), size)
        if "test" in splits and holds_out(root):
            rule = f", held out: of n images a class n // {HELD_OUT_SHARE}, at most {MOST_HELD_OUT}"
    tests = len(load(*where, "test", args.image_size).labels) if "test" in splits else 0
    out = Path(args.out or Path(args.data_dir) / f"{args.name.replace('/', '_').replace(':', '_')}.png")
    with atomic_write(out) as file:
        picture(train).save(file, format="PNG")
    print(f"{args.name}, from head to tail:", *table(train.classes, counts), sep="\n")
    head, tail = counts.max(), counts.min()
    print(f"{len(counts)} classes, {counts.sum():,d} training images of {size} x {size} pixels, "
          f"{head:,d} to {tail:,d} a class: imbalance ratio {head / tail:.4g}")
    print(f"{len(reference.labels):,d} reference images, {tests:,d} test images{rule}")
    print(f"picture: {out}")


# --------------------------------------------------------------------------------------------------
# For every command line
# --------------------------------------------------------------------------------------------------
# What all scripts share and no paper is about: flags, the machine, checkpoints, the log, pictures, signals.
def fail(message):
    """Raises InputError; as `parser.error` it makes argparse say one line without the usage."""
    raise InputError(message)


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def run_command(main):
    """Calls main(); what the person at the keyboard can mend ends as one line on stderr and status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:  # OSError: a full disk, a name too long; it says which file
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def number(kind, holds, what):
    """An argparse type: int or float, refused unless holds(value); `what` is the range in words."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def at_least(low):
    return number(int, lambda v: low <= v < 2**63, f"a whole number from {low} on")


positive = number(float, lambda v: 0 < v < math.inf, "a positive number")
not_negative = number(float, lambda v: 0 <= v < math.inf, "0 or a positive number")
finite = number(float, math.isfinite, "a finite number")
share = number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
decay = number(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")


def existing_file(text):
    """An argparse type: a file that is there now, not only after days of training."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return text


def feature_name(text):
    """An argparse type: which network's features compare images, see metrics.py."""
    if text.startswith("classifier:"):
        existing_file(text.removeprefix("classifier:"))
    elif text not in ("inception", "inception-fid"):
        raise argparse.ArgumentTypeError(f"{text!r} is not inception, inception-fid or classifier:PATH")
    return text


def first_flags(argv, **types):
    """The few flags that decide the defaults of the others, read before them: None where not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail
    types |= dict(dataset=str, recipe=str, data_dir=str, image_size=at_least(1), steps=at_least(1))
    for name, kind in types.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    return parser.parse_known_args(argv)[0]


def folder_settings(first, batch_size, epochs, low, high):
    """Defaults by how many images a folder holds, {} if none: a dict of steps, eval_images, sample_every.

    first: `first_flags`. steps: so many epochs, but from low to high. No image is opened, nothing prepared.
    """
    try:
        root = folder_root((first.dataset or "").removeprefix("folder:"))
        if root.is_dir():
            counts = [len(images_in(of_class)) for of_class in directories_in(directory_of(root, "train"))]
            N, K = sum(counts), len(counts)
        else:
            path = prepared_path(root, Path(first.data_dir or "data"), "train", first.image_size or 32)
            with prepared_file(path) as file:  # reads what is asked of it, here not the images
                N, K = len(file["labels"]), len(file["classes"])
    except (InputError, OSError):  # loading says what is wrong
        return {}
    if not N:
        return {}
    steps = min(max(100 * round(N * epochs / batch_size / 100), low), high)
    of_each = min(max(50, math.ceil(500 / K)), max(1, 5000 // K))  # samples: 500 to 5,000 in all
    # A grid of a diffusion model costs as much as twenty steps.
    return dict(steps=steps, eval_images=K * of_each, sample_every=max(100, (first.steps or steps) // 20))


def settings_parser(description):
    """An ArgumentParser for the flags of a method; `read_settings` adds those that all scripts have."""
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=shown, allow_abbrev=False)
    parser.error = fail
    return parser


# These may differ between two commands on one run directory: they do not define the experiment.
FREE = {"data_dir", "run_dir", "device", "compile", "code", "steps", "sample_every", "save_every",
        "eval_images", "eval_only", "features", "reference", "scores",
        "export", "classes", "per_class", "soft_label"}


def read_settings(parser, argv, script, defaults, free=FREE):
    """The command line as a namespace: the flags of `parser` and those that mean the same in every script.

    defaults    {name: value} where a flag is not given
    free        names that do not define the experiment; no part of the run directory's name, but for steps
    returns     also .code, which tells versions of the script apart
    raises      InputError
    """
    add = parser.add_argument_group("data").add_argument
    add("--dataset", help="a name that datasets.py knows, or folder:PATH")
    add("--rho", type=not_negative, help="imbalance ratio, head class / tail class; it thins a folder")
    add("--imbalance", choices=IMBALANCES, default="exp", help="exp: from class to class; step: halfway")
    add("--data-dir", default="data", help="where prepared data sets lie")
    add("--image-size", type=at_least(1), help="pixels a side")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images; not for text")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=at_least(1), help="of the network that samples")
    add("--batch-size", type=at_least(1), help="real images a step")
    add("--lr", type=positive, help="learning rate of Adam, for the network that samples")
    add("--ema", type=decay, help="decay of the averaged weights, which are the ones that sample")
    add("--seed", type=at_least(0), default=0, help="of weights, data order, noise and labels")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto takes CUDA, then MPS, then the CPU")
    add("--amp", choices=("auto", "bf16", "off"), default="auto",
        help="bfloat16; auto: where the hardware has it")
    add("--compile", action="store_true", help="torch.compile: faster steps after a minute's wait")
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", help=f"default: runs/{script}-<dataset>-<what differs>-s<seed>")
    add("--sample-every", type=at_least(0), help="steps between two sample grids; 0: none")
    add("--save-every", type=at_least(1), help="steps between two checkpoints")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-images", type=at_least(0), help="samples to score at the end; 0: none")
    add("--eval-only", action="store_true", help="sample from and score the checkpoint, do not train")
    add("--features", type=feature_name, help="inception, inception-fid (the FID of papers) or "
        "classifier:PATH; default: a classifier of the shapes for shapes, inception otherwise")
    add("--scores", default="fid,is", help="of the final samples: names that metrics.py knows, or all")
    add("--reference", choices=SPLITS, default="reference", help="split to compare samples with")
    add = parser.add_argument_group("pictures for a training set of your own").add_argument
    add("--export", metavar="DIR", help="with --eval-only: write DIR/<class>/00001.png ... and nothing else")
    add("--classes", nargs="+", metavar="A,B", help="which to export; default: all")
    add("--per-class", type=at_least(1), default=100, help="how many pictures of each")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)

    if args.export and not args.eval_only:
        fail("--export is for a run that is trained: add --eval-only")
    if args.classes and not args.export:
        fail("--classes says what to export; give --export DIR too")
    if args.export:
        args.eval_images = 0
    elif args.eval_only and not args.eval_images:
        fail("--eval-only with --eval-images 0 leaves nothing to do")
    if args.scores != parser.get_default("scores"):  # the default needs no check, and the module a second
        import metrics

        metrics.chosen_scores(args.scores)
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size} can't be shared out evenly among {WORLD} processes")
    if args.run_dir is None:
        unnamed = free - {"steps"} | {"dataset", "seed"}  # another length gets a directory of its own
        differs = [f"-{name.replace('_', '')}{value}" for name, value in vars(args).items()
                   if name not in unnamed and value != parser.get_default(name)]
        name = f"{script}-{args.dataset}{''.join(differs)}-s{args.seed}"
        args.run_dir = "runs/" + name.translate(str.maketrans("/:,", "__+", " "))
    source = Path(__file__).with_name(f"{script}.py").read_bytes()
    args.code = hashlib.sha256(source).hexdigest()[:16]
    return args


# The machine
def pick_device(name):
    """torch.device of a name; "auto" is CUDA, then MPS, then the CPU. Raises InputError.

    With torchrun each process gets a GPU of its own, and is here put in touch with the others.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=name)
    except Exception as error:
        raise InputError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from error
    device = torch.device(name)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches are alike: try its kernels once, keep the fastest
        if device.index is not None:
            torch.cuda.set_device(device)  # the one whose random state and memory are meant by default
    if WORLD > 1 and device.type == "mps":
        fail("several processes need CUDA or the CPU, not mps")
    if WORLD > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))  # a classifier may train first
        if RANK:
            sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    return device


def use_bf16(choice, device):
    """Whether to compute in bfloat16; "auto": where the hardware multiplies it faster than float32.

    "off" means float32 on a GPU too, whose convolutions would else round to TF32, 10 bits.
    """
    torch.backends.cudnn.allow_tf32 = choice != "off"
    if choice != "auto":
        return choice == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def environment(device):
    """What a run stands on, for its config.json: commit, versions, device, threads."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"commit": commit or "unknown", "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "device": name, "threads": torch.get_num_threads()}


def random_states(device):
    """The states of the random generators that a run draws from: {"cpu": (n,) uint8} and one for its GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states, device):
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:  # not where a run moves from one kind of device to another
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


# Several processes (torchrun). Each draws the same random numbers for the whole batch and computes its share
# of it; gradients, batch statistics and losses are averaged. So N processes follow the run of one, to
# rounding, and a run may resume with another number of them. Process 0 alone writes and prints.
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
SILENT = {"disable": True} if RANK else {}  # for tqdm
ALONE = [False]  # inside `first_process_first`


def together():
    """Whether other processes take part in what is done now."""
    return WORLD > 1 and not ALONE[0]


def my_share(x):
    """The rows of a batch that this process computes; all of them where there is one process."""
    return x.chunk(WORLD)[RANK]


def mean_of_processes(x):
    """x (any shape), averaged over the processes, in place."""
    if together():
        dist.all_reduce(x)
        x /= WORLD
    return x


def sum_of_processes(x):
    """x (any shape), summed over the processes, in place."""
    if together():
        dist.all_reduce(x)
    return x


class MeanOfProcesses(torch.autograd.Function):
    """The same inside the network: x enters the loss of each process, so all their gradients count."""

    @staticmethod
    def forward(_, x):
        return mean_of_processes(x.clone())

    @staticmethod
    def backward(_, gradient):
        return mean_of_processes(gradient.clone())


def whole_batch_mean(x):
    """A mean over this process's share -> the mean over the whole batch; gradients pass."""
    return MeanOfProcesses.apply(x) if WORLD > 1 else x


def average_gradients(network):
    """After backward(): from the gradient of this process's share to the whole batch's. One message."""
    if WORLD > 1:
        gradients = [w.grad for w in network.parameters() if w.grad is not None]
        mean = mean_of_processes(torch.cat([g.flatten() for g in gradients]))
        for g, m in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            g.copy_(m.view_as(g))


class SharedBatchNorm(torch.nn.BatchNorm2d):
    """Batch normalisation with the statistics of the whole batch, not those of a process's share."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            y = x.float()
            mean = whole_batch_mean(y.mean((0, 2, 3)))
            y = y - mean[:, None, None]
            variance = whole_batch_mean((y * y).mean((0, 2, 3)))
            with torch.no_grad():
                n = WORLD * x.numel() / x.shape[1]
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
            y = y * (variance + self.eps).rsqrt()[:, None, None]
            if self.affine:
                y = y * self.weight[:, None, None] + self.bias[:, None, None]
            return y.to(x.dtype)


def share_batch_norms(network):
    """Makes the batch norms of a network `SharedBatchNorm`s if there are several processes; returns it."""
    for module in network.modules():
        if WORLD > 1 and type(module) is torch.nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm
    return network


@contextlib.contextmanager
def own_randomness(device, *numbers):
    """What is drawn inside, as by dropout, is this process's own; outside it is as if nothing had been drawn.

    numbers: the seed of the run and what tells this use from others.
    """
    states = random_states(device)
    torch.manual_seed(seed_from(*numbers, RANK))
    try:
        yield
    finally:
        set_random_states(states, device)


def my_part(n):
    """Which of n pieces of work are this process's, to be put together by `collect`: a slice."""
    return slice(n) if ALONE[0] else slice(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def collect(x):
    """The rows that each process has computed, on the CPU, one after the other: in every process."""
    if not together():
        return x
    parts = [None] * WORLD
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


@contextlib.contextmanager
def first_process_first():
    """The block runs in process 0, then in the others, which find what it has put on disk."""
    if not together() or not dist.is_initialized():
        yield
        return
    turn = torch.zeros(())  # every process waits here for the others
    if RANK:
        dist.all_reduce(turn)
    ALONE[0] = True
    try:
        yield
    finally:
        ALONE[0] = False
        if not RANK:
            dist.all_reduce(turn)


def seed_from(*numbers):
    """One seed, below 2**32, from several whole numbers; other numbers give an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def to_device(x, device):
    """A tensor on the device, without making the CPU wait for what a GPU has still to do.

    Not so on MPS, where such a copy may read memory that is already something else's.
    """
    return x.to(device, non_blocking=device.type == "cuda")


def layout(device):
    """For Module.to: convolutions are fastest in channels_last; on MPS slow, and their gradients wrong."""
    return {} if torch.device(device).type == "mps" else {"memory_format": torch.channels_last}


class Contiguous(torch.autograd.Function):
    """x and its gradient, both contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


def laid_out(x):
    """What goes into a convolution, or comes out, in the layout of `layout`, and its gradient: see there."""
    return Contiguous.apply(x) if x.device.type == "mps" else x


class SpectralNorm(torch.nn.utils.parametrizations._SpectralNorm):
    """Of `spectral_norm`; a class, so that a copy of the network gets vectors of its own."""

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(weight)


def spectral_norm(layer, eps):
    """torch's spectral norm of the layer's weight (Miyato et al. 2018), in float32 also under autocast."""
    torch.nn.utils.parametrizations.spectral_norm(layer, eps=eps)
    layer.parametrizations.weight[0].__class__ = SpectralNorm


class Average:
    """Keeps `average`, a copy of `network` that does not learn, at the moving average of its weights (EMA).

    Averaged are weights and batch statistics. Copied are the counters and the vectors of spectral norm's
    power method: the average of two unit vectors is none, and those of the averaged weights are near.
    """

    def __init__(self, average, network):
        average, network = average.state_dict(), network.state_dict()
        mean = [k for k, v in network.items() if v.is_floating_point() and not k.endswith(("._u", "._v"))]
        rest = [k for k in network if k not in mean]
        self.means, self.values = [average[k] for k in mean], [network[k] for k in mean]
        self.copies, self.originals = [average[k] for k in rest], [network[k] for k in rest]

    def update(self, decay):
        """average <- decay average + (1 - decay) network: one call for all tensors; decay 0 copies."""
        torch._foreach_lerp_(self.means, self.values, 1 - decay)
        if self.copies:
            torch._foreach_copy_(self.copies, self.originals)


# Checkpoints
def load_checkpoint(path, device="cpu"):
    """The dictionary that `save` wrote. Raises InputError, naming the file, if it is missing or damaged."""
    if not Path(path).is_file():
        fail(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)  # a checkpoint can't run code
        return state | {"settings": state["settings"]}  # or it is no checkpoint of a run
    except Exception as error:  # zip, pickle and file errors alike
        reason = str(error).splitlines()[0]
        raise InputError(f"checkpoint {path} is damaged ({reason}); it is kept, "
                         "move it away to start afresh") from error


def check_same_run(args, found, run_dir, free=FREE):
    """Raises InputError, naming the flags, if the settings `found` in this directory are other ones.

    Settings that it does not know, as an older run does not know a new flag, are not compared.
    """
    if found.get("training_data", args.training_data) != args.training_data:
        fail(f"{run_dir} holds a run on other images than {args.dataset} has now; choose another --run-dir")
    now = {k: v for k, v in vars(args).items() if k not in free and k in found}
    differs = [f"--{k.replace('_', '-')} {found[k]} there, {v} now" for k, v in now.items() if found[k] != v]
    if differs:
        fail(f"{run_dir} holds a run with other settings ({'; '.join(differs)}); choose another --run-dir")


def find_run(args, free=FREE):
    """The checkpoint of the run that --run-dir holds, or None; args.training_data: the images' fingerprint.

    Raises InputError for a run with other settings, or with --eval-only where there is none.
    """
    path = Path(args.run_dir) / "checkpoint.pt"
    if not path.exists():
        if args.eval_only:
            fail(f"--eval-only: there is no checkpoint in {args.run_dir}")
        return None
    state = load_checkpoint(path)
    check_same_run(args, state["settings"], args.run_dir, free)
    if state["settings"].get("code", args.code) != args.code:
        warn(f"the script has changed since {args.run_dir} was saved; that run resumes with the script as it "
             "is now. For a run of its own choose another --run-dir")
    return state


def save(args, step, parts, device, **more):
    """Writes <run-dir>/checkpoint.pt in one piece: the state of each part, random states, and `more`.

    parts   {name: whatever has state_dict and load_state_dict}
    Raises InputError, and leaves the last checkpoint alone, if a weight or a loss is not finite.
    """
    path = Path(args.run_dir) / "checkpoint.pt"
    finite = all(w.isfinite().all() for part in parts.values() if isinstance(part, torch.nn.Module)
                 for w in part.parameters())
    if not finite:
        fail(not_finite("weight", step, path))
    if RANK:  # process 0 writes
        return
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "settings": vars(args), "rng": random_states(device), **more}
    with atomic_write(path) as file:
        torch.save(state, file)


def not_finite(what, step, checkpoint):
    last = f"the last good checkpoint, {checkpoint}, is kept" if checkpoint.exists() else "nothing was saved"
    return f"a {what} became NaN or infinite shortly before step {step}; {last}; try a lower --lr"


def restore(state, parts, device):
    """Puts what `save` wrote back into `parts` and the random generators; InputError if it does not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_random_states(state["rng"], device)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the checkpoint in {state['settings']['run_dir']} is from another version of this "
                         f"script ({reason}); choose another --run-dir") from error


# Log, pictures, signals
LOG_EVERY = 50  # steps
TIMED = 5, 15  # the steps of a run, or of what is left of it, between which the time of a step is taken
GRID_ROWS, GRID_COLUMNS = 10, 10  # of a grid: classes, evenly spaced from head to tail, and samples of each


class Log:
    """log.jsonl of a run and its progress bar: `add` takes a step's numbers, `write` logs their means.

    names: of these numbers. Between two lines their sums stay on the device: no step waits for a GPU.
    After the first steps it says how long the rest takes and how much memory; about_sampling(seconds a step,
    seconds of training), if given, is asked for more to say.
    """

    def __init__(self, args, names, device, about_sampling=None):
        self.args, self.device = args, device
        self.about_sampling = about_sampling
        self.path, self.names = Path(args.run_dir) / "log.jsonl", names
        self.checkpoint = self.path.with_name("checkpoint.pt")
        self.sums, self.added = torch.zeros(len(names), device=device), 0

    @contextlib.contextmanager
    def open(self, start, steps):
        """The file is open and the bar is shown inside the `with` block; steps: of the whole run."""
        # Drop what a killed run wrote after its checkpoint: it will be written again.
        if self.path.exists() and not RANK:
            lines = self.path.read_text().splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start]
            with atomic_write(self.path) as file:
                file.write("".join(lines).encode())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.start, self.steps = start, steps
        self.steps_here = 0
        self.last_step, self.last_time = start, time.monotonic()
        bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, **SILENT)
        with open(os.devnull if RANK else self.path, "a") as self.file, bar as self.bar:
            yield self

    def add(self, *values):
        """One step's numbers: 0-d tensors on the device."""
        self.sums += torch.stack([value.detach() for value in values])
        self.added += 1
        self.bar.update()
        self.steps_here += 1
        if self.steps_here in TIMED:
            self.look_ahead()

    def look_ahead(self):
        """Times some of the first steps, and says in one line what the whole run will take."""
        self.sums.tolist()  # waits for the device
        if self.steps_here == TIMED[0]:
            self.began = time.monotonic()
            return
        seconds = (time.monotonic() - self.began) / (TIMED[1] - TIMED[0])
        left = (self.steps - self.start - self.steps_here) * seconds
        line = f"{seconds:.3g} s a step: the training takes {duration(left)} from here{memory(self.device)}"
        if self.about_sampling:
            line += self.about_sampling(seconds, left)
        if self.device.type == "cpu" and left > 86_400 and "steps" in self.args:  # a classifier has none
            line += f"; on a CPU, try {smaller(self.args, seconds)} first"
        if not RANK:
            self.bar.write(line, file=sys.stdout)

    def write(self, step, **more):
        """The means since the last line, and `more`; raises InputError if one of them is not finite."""
        mean_of_processes(self.sums)
        if not self.sums.isfinite().all():
            fail(not_finite("loss or gradient", step, self.checkpoint))
        row = dict(zip(self.names, (self.sums / self.added).tolist(), strict=True))
        self.bar.set_postfix_str(", ".join(f"{k} {v:.4f}" for k, v in row.items() if v), refresh=False)
        rate = (step - self.last_step) / (time.monotonic() - self.last_time)
        self.note(step, **row, **more, steps_per_second=round(rate, 3))
        self.last_step, self.last_time = step, time.monotonic()
        self.sums.zero_()
        self.added = 0

    def note(self, step, **row):
        """A line of its own."""
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()

    def state_dict(self):
        return {"sums": self.sums, "added": self.added}  # with several processes: of process 0

    def load_state_dict(self, state):
        self.sums.copy_(state["sums"])
        self.added = state["added"]


def smaller(args, seconds):
    """A command that ends sooner, as text. seconds: what a step takes now."""
    if not args.dataset.startswith("folder:"):
        return f"`python {Path(sys.argv[0]).name} --dataset shapeslt`"
    size = min(args.image_size, 32)
    seconds *= (size / args.image_size) ** 2  # by area
    steps = min(max(1, int(8 * 3600 / seconds / 100)) * 100, args.steps)  # a night
    return f"`--image-size {size} --steps {steps}`, which takes about {duration(steps * seconds)},"


def duration(seconds):
    """As text, in the unit that suits it: "75 s", "40 minutes", "27.8 hours", "3 days 2 hours"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    days, hours = divmod(minutes // 60, 24)
    return (f"{minutes} minutes" if minutes < 120 else
            f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{days} days {hours} hours")


def memory(device):
    """What this process has used of it so far, as text."""
    if device.type == "cuda":
        return f", with {torch.cuda.max_memory_reserved(device) / 2**30:.1f} GiB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", with {used / 2**30:.1f} GiB of memory"


def due(step, every, steps):
    """Whether something that happens every so many steps (0: never) and after the last one happens now."""
    return every > 0 and (step % every == 0 or step == steps)


@contextlib.contextmanager
def stop_signals():
    """Yields a list that gets the number of a SIGINT (Ctrl-C) or SIGTERM: the loop saves, then stops.

    A second signal stops at once. Afterwards the handlers are those of the caller.
    """
    stop = []

    def handler(number, _frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def asked_to_stop(stop):
    """The number of a signal that a process has got, else 0: the same answer in every process."""
    number = torch.tensor(stop[0] if stop else 0)
    if together():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def leave(number, step, args):
    """Ends the program after the signal of this number, when the run is saved."""
    print(f"stopped by signal {number} at step {step}; the same command resumes the run in {args.run_dir}")
    sys.exit(128 + number)


def write_config(args, device, **more):
    """<run-dir>/config.json: every setting, and what the run stands on."""
    with atomic_write(Path(args.run_dir) / "config.json") as file:
        config = {"settings": vars(args), **environment(device), **more}
        file.write(json.dumps(config, indent=2).encode() + b"\n")


def grid_classes(counts):
    """Classes for the rows of a grid, from head to tail: all, or ten at equal steps. (K,) in, (rows,) out."""
    order = torch.from_numpy(head_to_tail(counts))
    return order[torch.linspace(0, len(order) - 1, min(len(order), GRID_ROWS)).round().long()]


def rows_of(images, which, classes):
    """A row for each of these classes: its first images (N, 3, H, W), then white; which (N,): classes."""
    grid = torch.full((len(classes), GRID_COLUMNS, *images.shape[1:]), 255, dtype=torch.uint8)
    for row, k in zip(grid, classes, strict=True):
        found = images[which == k][:GRID_COLUMNS]
        row[: len(found)] = found
    return grid.flatten(0, 1)


def write_grid(path, images, columns=GRID_COLUMNS):
    """(N, 3, H, W) uint8 as a PNG, row by row; small images are enlarged to about 64 pixels."""
    from torchvision.utils import make_grid  # here: it takes a second to import, and training need not wait

    scale = max(1, 64 // images.shape[-1])
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(enlarged, nrow=columns, padding=scale)
    with atomic_write(path) as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, format="png")


def balanced_labels(n, num_classes):
    """n labels, class after class, each class equally often to within one: (n,) int64."""
    return (torch.arange(n) % num_classes).sort().values


def save_samples(path, images, **arrays):
    """A samples file: images (N, 3, H, W) uint8 as `images` (N, H, W, 3), and arrays that are not None."""
    arrays = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
    with atomic_write(path) as file:
        np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), **arrays)


SAVE_SECONDS = 300  # how often the samples of a long evaluation are put on disk
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"


def draw_in_batches(where, labels, shape, at_once, key, again, draw):
    """Samples of all labels (N,), (N, 3, H, W) uint8, kept in <where>/samples.npz with labels and key.

    A killed evaluation resumes, and a finished one is not repeated, unless `again`; samples on disk count if
    they have the same key. Each process draws a batch.

    shape       (0, 3, H, W)
    draw        draw(y, start, bar): the samples of these labels, y[0] being labels[start], whatever was drawn
                before; it moves the bar on by one for each
    """
    path, part = Path(where) / "samples.npz", Path(where) / "samples.part"
    images = torch.empty(shape, dtype=torch.uint8)
    for file in [part] if again else [path, part]:
        # A file that is missing, damaged or of another version is as good as none.
        with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as found:
            if str(found["key"]) == key:
                images = torch.from_numpy(found["images"]).permute(0, 3, 1, 2)
                break
    saved = time.monotonic()
    bar = tqdm(total=len(labels), initial=len(images), desc="sampling", unit="img", bar_format=BAR, **SILENT)
    with bar:
        while len(images) < len(labels):
            start = len(images) + RANK * at_once
            y = labels[start : start + at_once]
            images = torch.cat([images, collect(draw(y, start, bar) if len(y) else images[:0])])
            if time.monotonic() - saved > SAVE_SECONDS and len(images) < len(labels):
                save_samples(part, images, key=key)
                saved = time.monotonic()
    save_samples(path, images, labels=labels, key=key)
    if not RANK:
        part.unlink(missing_ok=True)
    return images


def images_at_once(at_32, image_size):
    """How many images to sample at once where it would be `at_32` of 32 x 32 pixels: by their area."""
    return max(1, int(at_32 * 32**2 / image_size**2))


def to_uint8(x):
    """Images in [-1, 1] as uint8 on the CPU; what lies outside is cut off."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# Pictures for a training set (--export)
EXPORT_AT_ONCE = 50  # of 32 x 32 pixels; always whole batches, for their size decides the last bits
EXPORT_BATCHES = 1_000  # of a generator without labels; what it has not made by then it hardly ever makes


def class_number(name, classes, flag):
    """The place of a name among the classes, or InputError."""
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5) or [*classes][:10]
        fail(f"{flag}: no class is called {name!r}; there are {', '.join(near)}")
    return [*classes].index(name)


def open_export(args, network, classes):
    """Makes the directory; returns {name: number} of --classes. InputError where it holds other things."""
    words = args.classes or classes  # a word is a class, even one with a comma in it, or several
    names = [name.strip() for word in words for name in ([word] if word in classes else word.split(","))]
    wanted = {name: class_number(name, classes, "--classes") for name in names}
    weights = network.state_dict().values()
    digest = hashlib.sha256(b"".join(w.cpu().contiguous().numpy().tobytes() for w in weights)).hexdigest()
    source = {name: value for name, value in vars(args).items() if name not in FREE}
    source |= {"device": next(network.parameters()).device.type, "weights": digest}
    path, text = Path(args.export) / "export.json", json.dumps(source, indent=2).encode()
    if not (path.is_file() and path.read_bytes() == text):
        if path.parent.exists() and visible(path.parent):
            fail(f"--export {args.export}: there are other things in it than pictures by these weights and "
                 "settings (those are in its export.json); choose another directory")
        with atomic_write(path) as file:
            file.write(text)
    return wanted


def write_picture(path, image):
    """(3, H, W) uint8 as a PNG, unless it is there."""
    if not path.exists():
        with atomic_write(path) as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="png")


def export_by_label(args, network, classes, draw):
    """Writes DIR/<class>/00001.png ..., --per-class of each. What is there is not drawn again.

    network: the averaged one. draw(k, start, n): pictures start to start + n of class k, (n, 3, H, W) uint8.
    """
    n = images_at_once(EXPORT_AT_ONCE, args.image_size)
    with first_process_first():  # the others find nothing left to do
        for name, k in tqdm(open_export(args, network, classes).items(), "export", unit="class", **SILENT):
            for start in range(0, args.per_class, n):
                numbers = range(start + 1, min(start + n, args.per_class) + 1)
                paths = [Path(args.export, name, f"{i:05d}.png") for i in numbers]
                if not all(path.exists() for path in paths):
                    for path, image in zip(paths, draw(k, start, n), strict=False):
                        write_picture(path, image)


def export_by_look(args, network, classes, draw):
    """The same of a generator without labels: a classifier tells its pictures apart, certainty.csv how well.

    draw(i): batch i of an endless stream, (n, 3, H, W) uint8, and the classifier's probabilities (n, K).
    """
    with first_process_first():
        wanted = open_export(args, network, classes)
        seen, rows = dict.fromkeys(wanted.values(), 0), {}
        table = Path(args.export) / "certainty.csv"
        if RANK:
            return
        if table.exists():  # of other classes, or of more pictures
            rows = {row[0]: row for row in csv.reader(table.read_text("utf-8").splitlines())}
        rows["file"] = ["file", "class", "probability"]
        for i in tqdm(range(EXPORT_BATCHES), "export", unit="batch", **SILENT):
            images, p = draw(i)
            for image, k, certainty in zip(images, p.argmax(1).tolist(), p.amax(1).tolist(), strict=True):
                if seen.get(k, args.per_class) < args.per_class:
                    seen[k] += 1
                    name = f"{classes[k]}/{seen[k]:05d}.png"
                    write_picture(Path(args.export, name), image)
                    rows[name] = [name, classes[k], f"{certainty:.4f}"]
            if min(seen.values()) == args.per_class:
                break
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows.values())
        with atomic_write(table) as file:
            file.write(text.getvalue().encode())
        short = [f"{name} ({seen[k]})" for name, k in wanted.items() if seen[k] < args.per_class]
        if short:
            warn(f"{EXPORT_BATCHES} batches hold fewer than {args.per_class} pictures of {', '.join(short)}")


if __name__ == "__main__":
    run_command(main)
