"""The classifier that judges samples, and that the two GANs keep in their loop: ResNet-32 for small images.

Network: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2 with n = 5.
Recipe: what the long-tailed papers share, LDAM-DRW (Cao et al. 2019, arXiv:1906.07413; CBDM and CBGAN train theirs with
it): SGD, 200 epochs, steps at 160 and 180, random crops and flips; the loss weighs rare classes up from epoch 160 on.

    python classifier.py --dataset cifar10lt --rho 100           # what a GAN on cifar10lt keeps in its loop
    python classifier.py --dataset cifar100 --split reference    # a judge: trained on all of the balanced data
    python classifier.py --dataset cifar10imb --soft-labels      # what Softlabel-GAN takes its labels from
    python classifier.py --dataset cifar10lt --label-fraction 0.001    # 5 labels a class: CBGAN's semi-supervised row
    python classifier.py --dataset cifar10lt --train-on runs/<a GAN's run>/samples.npz    # classifier accuracy score
    python classifier.py --dataset cifar100lt --add runs/<a run>/samples.npz    # real + generated: CBDM's Table 4
    python metrics.py samples.npz --dataset cifar100lt --features classifier:runs/<that run>/classifier.pt

The same command goes on with the run that it finds, bit for bit on a CPU. Other scripts import `frozen_classifier`, which
loads a checkpoint, or trains one where there is none, and returns a frozen network that takes images in [-1, 1].
Subtracting the mean and dividing by the deviation is the network's own business, so that no caller can forget it (the
official CBGAN code hands images in [-1, 1] to a network whose public training code uses CIFAR's statistics).

In CBGAN's words: its classifier in the loop is `--split train`; its annotator, which we call a judge, `--split reference`.
    accuracy there, %  CIFAR-10 rho 100 76.67, rho 10 87.70, balanced 92.29; CIFAR-100 rho 10 57.63; iNaturalist 46.90;
                       LSUN 82.40, 88.07, 90.53; few labels 84.96 (CIFAR-10), 82.40 (LSUN)
    Fig. 5             --rho 1, 10, 100, 500, 5000, each for a GAN at --rho 10; its axis is the last row of per_class.csv
    iNaturalist        plain cross-entropy: --loss ce
    Acc., Table 1      --train-on 50,000 samples; no recipe is given. CHOICE: the usual one, plain cross-entropy

Cost, on two cores of an AMD EPYC: shapes 12 to 19 s for the judge, 98.8 to 99.8 % of the test images right, and half a
minute for what a GAN keeps in its loop. At CIFAR's size a step of 128 images takes 0.26 s in bfloat16 and 0.40 s in
float32; cifar10lt for 30 epochs 20 minutes beside other work, 59.5 %. All 200 epochs: not measured.

Deviations from CBGAN and from LDAM-DRW
- The loss is focal (gamma = 1) with DRW, as CBGAN's released configs name it; its text says "DRW" alone. Rate 0.1 after 5
  epochs of warm-up, as in LDAM-DRW's code; CBGAN prints 0.01. Judges learn with plain cross-entropy. Not LDAM's own loss:
  CBGAN's code has no head for it (and its cosines would have to be multiplied by s = 30 before a softmax).
- The weights of the last epoch are kept; LDAM-DRW keeps the epoch that does best on the *test* set. Ours logs the best of
  some 20 tests on the way beside it.
- The schedule in shorter runs keeps its proportions; the shapes data have a short schedule of our own.
- Few labels: ResNet-50 with torchvision's ImageNet-1k weights. CBGAN fine-tunes BiT's R50x1 (ImageNet-21k weights, which
  torchvision does not have) after BiT's own resizing and cropping: expect other numbers.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
from datasets import ImageSet, InputError, atomic_write, environment, fail, pick_device, run_command, use_bf16

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------
# Channel mean and deviation of pixels in [0, 1]. CIFAR: the constants of LDAM-DRW's cifar_train.py, for both CIFARs.
# CHOICE: 0.5 for everything else, so that the [-1, 1] image itself is what the first layer sees.
CIFAR_STATISTICS = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
CENTRED = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # torchvision

# LDAM-DRW, cifar_train.py.
PAPER_RECIPE = dict(epochs=200, batch_size=128, lr=0.1, schedule="steps", flip=True, weight_decay=2e-4, save_every=1)
# CHOICE (ours): 98.8 to 99.8 % by seed and threads. Few images are seen, so batches are small: of 64 they end at 96 %.
SHAPES_RECIPE = PAPER_RECIPE | dict(batch_size=32, lr=0.05, schedule="cosine", flip=False)
SHAPES_IMAGES_SEEN = 12_000  # 3 epochs of the reference split
# 8 epochs of shapeslt. Right in the tail third with seeds 0, 1, 2, %: focal + DRW 86, 97, 98; cross-entropy 87, 92, 91.
# With 5 epochs (seed 0): 42 and 4.
SHAPES_IMAGES_IN_THE_LOOP = 19_000
# BiT (Kolesnikov et al. 2020, arXiv:1912.11370), its rule for fewer than 20,000 images: 500 steps, of 512 images at most
# here (BiT repeats images to fill a batch), no weight decay.
FEW_LABELS_RECIPE = PAPER_RECIPE | dict(batch_size=512, lr=0.003, schedule="bit", weight_decay=0.0, save_every=50)
FEW_LABELS_STEPS = 500
# Softlabel-GAN: §4.3 gives the head and the weight of the entropy, nothing else. Up to 32 pixels ours; above, the official
# script for Stanford Cars: its rate falls to a tenth every 7 epochs. It turns images by up to 15 degrees; we do not.
HELD_OUT, PATIENCE = 0.1, 30  # CHOICE; see `held_out`. Epochs without a smaller held-out loss, after which training stops
SOFT_LABELS = dict(head="spinal", entropy_weight=0.3, hold_out=HELD_OUT)
# Chosen by the held-out loss: with LDAM-DRW's rate and decay and batches of 64 it was 0.60 on cifar10imb (this: 0.55), 2.67 on
# cifar100imb (2.44).
SOFT_RECIPE = PAPER_RECIPE | SOFT_LABELS | dict(epochs=60, batch_size=32, lr=0.05, weight_decay=5e-4, schedule="cosine")
SOFT_LARGE_RECIPE = SOFT_RECIPE | dict(network="wide_resnet101_2", pretrained=True, normalisation=IMAGENET_STATISTICS,
                                       epochs=25, batch_size=8, lr=0.001, schedule="sevens", weight_decay=0.0)  # fmt: skip
MOMENTUM = 0.9  # LDAM-DRW, BiT. The decay acts on every parameter, batch norm included (LDAM-DRW)
TESTS = {"resnet32": 20, "resnet50": 5, "wide_resnet101_2": 5}  # how often on the way

# May differ between two commands on one run directory: they do not define the experiment.
FREE = {"data_dir", "run_dir", "device", "save_every",
        "train_on", "add", "label_with"}  # training_data says what was learnt from


def parse_settings(argv=None):
    """The command line as a namespace. What is None in it depends on the data, and `complete` fills it in."""
    parser = argparse.ArgumentParser(description="Train the classifier that judges samples and guides the GANs.",
                                     allow_abbrev=False)  # fmt: skip
    parser.error = fail
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes", help="a name that datasets.py knows (default: shapes)")
    group.add_argument("--split", default="train", choices=["train", "reference"],
                       help="train: what a generator learns from, for a GAN's loop; reference: balanced, for a judge")
    group.add_argument("--rho", type=float, help=f"imbalance ratio of a long-tailed set (default: {datasets.DEFAULT_RHO})")
    group.add_argument("--data-dir", default="data", help="where data sets are kept (default: data)")
    group.add_argument("--image-size", type=int, help="pixels a side (default: the data set's own)")
    group.add_argument("--label-fraction", type=float, metavar="F", help="fine-tune a ResNet-50 that knows ImageNet on F "
                       "times as many labelled images as the balanced training set has; CBGAN, Table 3: 0.001")
    group.add_argument("--soft-labels", action="store_true", help="the classifier of Softlabel-GAN: SpinalNet head, entropy "
                       "rewarded, stopped early; the next three change that")
    group.add_argument("--head", choices=["linear", "spinal"], help="linear: the paper's ResNet alternative")
    group.add_argument("--entropy-weight", type=float, metavar="W", help="loss: cross-entropy - W entropy (default: 0.3)")
    group.add_argument("--hold-out", type=float, metavar="F", help="share of each class that early stopping watches; 0: do "
                       f"without (default: {HELD_OUT})")
    group.add_argument("--train-on", metavar="NPZ", help="learn from generated images, test on real ones: the classifier "
                       "accuracy score of Ravuri & Vinyals 2019, column Acc. of CBGAN's Table 1")
    group.add_argument("--add", metavar="NPZ", help="learn from the training split and these generated images together; prints "
                       "macro precision and recall on the test images: CBDM, Table 4")
    group.add_argument("--label-with", metavar="CLASSIFIER.pt", help="with --train-on: who labels the generated images "
                       "(default: the file itself)")
    group.add_argument("--network", choices=NETWORKS, help="default: resnet32; few labels: resnet50; soft labels above 32 "
                       "pixels: wide_resnet101_2")
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction,
                       help="start from ImageNet's weights; default: the two of torchvision do")
    group = parser.add_argument_group("training; defaults are LDAM-DRW's, BiT's for few labels, and our own for shapes")
    group.add_argument("--loss", choices=["ce", "focal"], help="focal: default for --split train, as in CBGAN's configs")
    group.add_argument("--drw", action=argparse.BooleanOptionalAction,
                       help="weigh rare classes up in the last fifth of the epochs; default: with focal")
    group.add_argument("--epochs", type=int,
                       help="default: 200; shapes: 12,000 images in all, 19,000 for a loop; few labels: 500 steps")
    group.add_argument("--batch-size", type=int, help="default: 128; shapes: 32; few labels: 512")
    group.add_argument("--lr", type=float, help="highest learning rate (default: 0.1; shapes: 0.05; few labels: 0.003)")
    group.add_argument("--schedule", choices=["steps", "cosine", "bit", "sevens"],
                       help="steps: down at 80 and 90 %% of the epochs; cosine: for shapes and soft labels; bit: for few "
                       "labels; sevens: soft labels above 32 pixels")
    group.add_argument("--seed", type=int, default=0, help="of the weights, the order and the crops (default: 0)")
    group = parser.add_argument_group("run")
    group.add_argument("--run-dir", help="default: runs/classifier-<data>-<what differs from the default>-s<seed>, "
                       "with --train-on cas-<samples>-<data>-..., with --add with-<samples>-<data>-... beside the samples")
    group.add_argument("--save-every", type=int, help="epochs between two checkpoints (default: 1; few labels: 50)")
    group.add_argument("--device", default="auto", help="auto (default): CUDA, else MPS, else the CPU")
    group.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto",
                       help="bfloat16; auto (default): where hardware has it")
    args = parser.parse_args(argv)
    if args.split == "reference":  # the same judge for cifar10, cifar10lt at any rho, and cifar10imb
        args.dataset, args.rho = balanced(args.dataset), None
    if args.rho is None and args.dataset in datasets.LONG_TAILED:
        args.rho = datasets.DEFAULT_RHO
    for name in ("epochs", "batch_size", "lr", "save_every", "label_fraction"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed is {args.seed}; it must be 0 or more, and below 2**63")
    sources = [name for name, given in (("--split reference", args.split == "reference"), ("--train-on", args.train_on),
                                        ("--add", args.add),
                                        ("--label-fraction", args.label_fraction),
                                        ("--soft-labels", args.soft_labels)) if given]  # fmt: skip
    for name, most in (("entropy_weight", math.inf), ("hold_out", 1)):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < most:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 0 or more, and below {most}")
    if args.entropy_weight and args.loss == "focal":
        fail("--entropy-weight goes with --loss ce")
    args.source = ("samples" if args.train_on else "train and samples" if args.add else
                   "few labels" if args.label_fraction else args.split)  # fmt: skip
    if len(sources) > 1:
        fail(f"{' and '.join(sources)} each say what to learn from; choose one")
    if args.label_with and not (args.train_on or args.add):
        fail("--label-with labels the images of --train-on or --add, and neither is given")
    return args


def recipe_for(args, num_images, image_size):
    """Training settings for `num_images` training images: a fresh dict of plain values."""
    shapes, in_the_loop = args.dataset.startswith("shapes"), not (args.split == "reference" or args.train_on or args.add)
    recipe = {"network": "resnet32", "pretrained": False, "head": "linear", "entropy_weight": 0.0, "hold_out": 0.0,
              "loss": "ce", "drw": False, "normalisation": CENTRED}  # fmt: skip
    if args.label_fraction:
        steps = math.ceil(num_images / (args.batch_size or FEW_LABELS_RECIPE["batch_size"]))  # an epoch
        recipe |= {"network": "resnet50", "pretrained": True, "normalisation": IMAGENET_STATISTICS, **FEW_LABELS_RECIPE}
        return recipe | {"epochs": math.ceil(FEW_LABELS_STEPS / steps), "crop_padding": image_size // 8}
    if in_the_loop and not args.soft_labels:
        recipe |= {"loss": "focal", "drw": True}
    if shapes:
        seen = SHAPES_IMAGES_IN_THE_LOOP if in_the_loop else SHAPES_IMAGES_SEEN
        recipe |= SHAPES_RECIPE | (SOFT_LABELS if args.soft_labels else {})
        return recipe | {"epochs": math.ceil(seen / num_images), "crop_padding": 1}
    if args.dataset.startswith("cifar"):
        recipe |= {"normalisation": CIFAR_STATISTICS}
    if args.soft_labels:
        return recipe | (SOFT_RECIPE if image_size <= 32 else SOFT_LARGE_RECIPE) | {"crop_padding": image_size // 8}
    return recipe | PAPER_RECIPE | {"crop_padding": image_size // 8}  # LDAM-DRW: 4 at 32 pixels


def complete(args, num_images, image_size):
    """Fills in what the command line left open, and the name of the run."""
    args.image_size, changed = image_size, []
    for name, value in recipe_for(args, num_images, image_size).items():
        if name == "drw" and args.drw is None:
            value = args.loss == "focal"
        if getattr(args, name, None) is None:
            setattr(args, name, value)
        elif getattr(args, name) != value and name not in FREE:
            changed.append(f"{name.replace('_', '')}{getattr(args, name)}")
    samples = Path(args.train_on or args.add or "")
    changed += ["relabelled"] if args.label_with else []
    where = samples.parent if args.train_on or args.add else Path("runs")
    args.run_dir = str(args.run_dir or where / run_name(args, changed))


def balanced(dataset):
    """The data set that a long-tailed one was cut from; of a folder nothing is known."""
    return dataset if dataset.startswith("folder:") else dataset.removesuffix("lt").partition("imb")[0]


def run_name(args, changed=()):
    """Name of a run: the data, and `changed`, what differs from the recipe."""
    what = f"cas-{Path(args.train_on).stem}" if args.train_on else f"with-{Path(args.add).stem}" if args.add else "classifier"
    parts = [what, args.dataset.replace("/", "_").replace(":", "_"), f"{args.image_size}px"]
    parts += [f"rho{args.rho:g}"] if args.dataset in datasets.LONG_TAILED else []
    parts += [args.split] if args.split != "train" else []
    parts += [f"labels{args.label_fraction:g}"] if args.label_fraction else []
    parts += ["soft"] if args.soft_labels else []
    parts += [f"amp{args.amp}"] if args.amp != "auto" else []
    return "-".join([*parts, *changed, f"s{args.seed}"])


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------
# K classes with n_k training images, w_k their weights, b = 0.9999: the effective number of images (Cui et al. 2019,
# arXiv:1901.05555) of a class is (1 - b^n_k) / (1 - b), and its weight the inverse.
def drw_weights(counts, epoch, epochs, b=0.9999):
    """Deferred re-weighting (Cao et al. 2019): the weight w_k of each class in `epoch` = 0 .. epochs - 1, (K,) float32.

    All ones in the first 160 of 200 epochs; from then on in proportion to (1 - b) / (1 - b^n_k), with the sum K.
    counts (K,): n_k. A class without images, which no loss asks for, has the weight 0.
    """
    counts = torch.as_tensor(counts).double()
    if epoch < 160 * epochs // 200:  # rounded down: a run of 3 epochs has one with weights
        return torch.ones(len(counts))
    w = torch.where(counts > 0, (1 - b) / (1 - b ** counts.clamp(min=1)), 0)
    return (w * len(counts) / w.sum()).float()


def focal_loss(logits, labels, weight, gamma=1):
    """mean_i (1 - exp(-l_i))^gamma l_i with l_i = w_y CE_i, as in LDAM-DRW: the weight is inside the exponent too.

    logits (B, K), labels (B,), weight (K,). The mean is over B, not over the weights. Lin et al. 2017 (arXiv:1708.02002)
    have gamma = 2; LDAM-DRW has 1. gamma = 0: the mean weighted cross-entropy.
    """
    l = weight[labels] * F.cross_entropy(logits, labels, reduction="none")  # noqa: E741
    return ((1 - torch.exp(-l)) ** gamma * l).mean()


def entropy_rewarded_loss(logits, labels, w=0.3):
    """Softlabel-GAN, §4.3: L_C = CE(C(x), y) - w H(softmax C(x)), H(p) = -sum_c p_c log p_c. Scalar.

    logits (B, K), labels (B,). The sign: the paper says "entropy regularization term" and no more; the official scripts take
    w times the entropy off the loss, so a certain classifier pays. Of an image that it knows by heart the best label is
    the same whatever is in the image: p* on its class, (1 - p*) / (K - 1) on all others, with
    1 / p* = w log((K - 1) p* / (1 - p*)); w = 0.3: p* = .849 for K = 10, .643 for K = 100. A classifier trained to the end
    gives plain label smoothing; what makes its labels worth more is that it stops early.
    """
    log_p = logits.log_softmax(1)
    return F.nll_loss(log_p, labels) + w * (log_p.exp() * log_p).sum(1).mean()


def describe_labels(y, labels):
    """What the labels y (N, K), distributions over the classes, of images of the classes labels (N,) are like: a dict.

    max_probability     mean of the largest
    entropy             mean, natural logarithm
    off_class_mass      mean of the probability that is not on the image's own class
    off_class_distance  total variation distance of that part from the uniform distribution, 0 to 1; 0: plain smoothing, a
                        classifier that says nothing of the image. Mean, weighted by the part; None without any
    """
    y, own = y.double(), F.one_hot(labels, y.shape[1]).bool()
    off = y.masked_fill(own, 0)
    mass = off.sum(1, keepdim=True)
    moved = (off - (mass / (y.shape[1] - 1)).masked_fill(own, 0)).abs().sum() / 2
    return {"max_probability": y.amax(1).mean().item(), "entropy": -torch.special.xlogy(y, y).sum(1).mean().item(),
            "off_class_mass": mass.mean().item(), "off_class_distance": (moved / mass.sum()).item() if mass.sum() > 0 else None}


COLLAPSED = 0.1, 0.01  # CHOICE: off_class_distance, off_class_mass below which labels lend no images


def warn_of_collapse(facts, K):
    """Says on stderr when labels, as described by `describe_labels`, are no more than smoothed or one-hot ones."""
    distance, mass = COLLAPSED
    if facts["off_class_mass"] < mass:
        print(f"warning: the labels are all but one-hot ({facts['off_class_mass']:.2%} off the class): classes lend each other "
              "nothing; a larger --entropy-weight or fewer --epochs would", file=sys.stderr, flush=True)
    elif K > 2 and facts["off_class_distance"] < distance:
        print("warning: the labels have collapsed into plain smoothing (off-class distance "
              f"{facts['off_class_distance']:.3f}): the classifier knows its images by heart; try fewer --epochs",
              file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------
class SpinalHead(nn.Module):
    """(B, D) -> (B, K): SpinalNet (Kabir et al. 2020, arXiv:2007.03347) as Softlabel-GAN's official scripts have it.

    Four layers of the width `w` see the halves of the features in turn, and each what the one before made of the other half;
    the last layer sees all four. No dropout.
    """

    def __init__(self, features, num_classes):
        super().__init__()
        half, w = features // 2, max(20, num_classes)  # w: K in A's scripts (102, 196). CHOICE: 20 at least, as for CIFAR-10
        self.layers = nn.ModuleList([nn.Linear(half, w)] + [nn.Linear(half + w, w) for _ in range(3)])
        self.out = nn.Linear(4 * w, num_classes)

    def forward(self, x):
        halves, seen = x.chunk(2, 1), []
        for i, layer in enumerate(self.layers):
            seen.append(F.relu(layer(torch.cat([halves[i % 2], *seen[-1:]], 1))))
        return self.out(torch.cat(seen, 1))


def build_head(kind, features, num_classes):
    return SpinalHead(features, num_classes) if kind == "spinal" else nn.Linear(features, num_classes)


class BasicBlock(nn.Module):
    """relu(BN conv relu BN conv x + shortcut x), with the shortcut that has no parameters (option A of He et al.)."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.stride = 1 if width_in == width_out else 2  # where the width doubles, height and width of the image halve
        self.conv1 = nn.Conv2d(width_in, width_out, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        if self.stride == 2:  # every second pixel; the new channels, half before and half after the old ones, are zero
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
        return F.relu(h + x)


class ResNet32(nn.Module):
    """464,154 parameters at K = 10 classes, 470,004 at K = 100. Global average pooling: it takes any image size.

    mean, std: three numbers each, of training pixels in [0, 1].
    """

    name, batch = "resnet32", 200  # batch: images to look at at a time

    def __init__(self, num_classes, mean, std, head="linear"):
        super().__init__()
        # Buffers travel with the weights. u = (x + 1) / 2 and (u - m) / s give (x - (2m - 1)) / (2s) for x in [-1, 1].
        self.register_buffer("mean", 2 * torch.tensor(mean).view(1, 3, 1, 1) - 1)
        self.register_buffer("std", 2 * torch.tensor(std).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] + [16] * 5 + [32] * 5 + [64] * 5  # 1 + 3 stages x 5 blocks x 2 + 1 = 32 layers
        self.blocks = nn.Sequential(*[BasicBlock(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])
        self.head = build_head(head, 64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # fan-in, as LDAM-DRW

    def features(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, 64) >= 0: the pooled activations that the head sees."""
        h = F.relu(self.norm(self.conv((x - self.mean) / self.std)))
        return self.blocks(h).mean(dim=(2, 3))

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, K) logits."""
        return self.head(self.features(x))


class ResNet50(nn.Module):
    """torchvision's ResNet-50 behind a resize to 128 x 128, BiT's size for small images. Interface as ResNet32.

    mean, std: three numbers each, of training pixels in [0, 1]. The weights are random; see `load_imagenet`.
    """

    name, size, batch = "resnet50", 128, 100  # pixels, images

    def __init__(self, num_classes, mean, std, head="linear"):
        super().__init__()
        import torchvision.models  # here: it takes a second to import, and few runs need it

        self.register_buffer("mean", 2 * torch.tensor(mean).view(1, 3, 1, 1) - 1)
        self.register_buffer("std", 2 * torch.tensor(std).view(1, 3, 1, 1))
        self.body = getattr(torchvision.models, self.name)()
        self.body.fc = nn.Identity()
        self.head = build_head(head, 2048, num_classes)
        if head == "linear":
            nn.init.zeros_(self.head.weight)  # BiT
            nn.init.zeros_(self.head.bias)

    def features(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, 2048) >= 0: the pooled activations that the head sees."""
        x = F.interpolate((x - self.mean) / self.std, (self.size,) * 2, mode="bilinear", align_corners=False, antialias=True)
        return self.body(x)

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, K) logits."""
        return self.head(self.features(x))

    def load_imagenet(self):
        """Puts the ImageNet weights of torch.hub's cache, or a download, into the body. Raises InputError."""
        from torchvision.models import get_model_weights

        # CHOICE: the first of torchvision's two: cross-entropy alone, without label smoothing and mixup, which cost
        # features some of their use for other data (Kornblith et al. 2021, arXiv:2010.16402).
        url = get_model_weights(self.name).IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        cached = path.exists()
        try:
            weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as error:  # urllib's, a wrong hash, or torch.load's of a damaged file
            if cached:
                raise InputError(f"{path} is damaged ({type(error).__name__}); put a good copy there") from error
            raise InputError(f"cannot download {url} ({error}); copy that file to {path}") from error
        try:  # without the head for ImageNet's classes
            self.body.load_state_dict({name: w for name, w in weights.items() if not name.startswith("fc.")})
        except (AttributeError, RuntimeError) as error:
            raise InputError(f"{path} does not hold the weights of {url}; delete it") from error


class WideResNet101(ResNet50):
    """torchvision's Wide-ResNet-101-2 behind a resize to 448 x 448, Softlabel-GAN's backbone (A)."""

    name, size, batch = "wide_resnet101_2", 448, 16


NETWORKS = {kind.name: kind for kind in (ResNet32, ResNet50, WideResNet101)}


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------
def load_data(args, device):
    """ImageSets to learn from and to test on, and the (K,) counts of the training split, which say what the tail is.

    None of the three depends on --seed. Raises InputError.
    """
    test_set = load_test(args.dataset, args.data_dir, args.image_size, args.rho)
    counts = datasets.load(args.dataset, args.data_dir, "train", args.image_size, args.rho).counts
    if args.train_on:
        return read_samples(args, test_set, device), test_set, counts
    if args.add:
        real = datasets.load(args.dataset, args.data_dir, "train", args.image_size, args.rho)
        added = read_samples(args, test_set, device)
        both = torch.cat([real.images, added.images]), torch.cat([real.labels, added.labels])
        return ImageSet(*both, real.classes), test_set, counts
    if args.label_fraction:
        return few_labels(args), test_set, counts
    return datasets.load(args.dataset, args.data_dir, args.split, args.image_size, args.rho), test_set, counts


def load_test(dataset, data_dir, image_size=None, rho=None):
    """The test split; of a folder without one its reference, which may be what was learnt from: `train` says so."""
    split = "test"
    if dataset.startswith("folder:"):
        root = datasets.folder_root(dataset.removeprefix("folder:"))
        there = datasets.folder_splits(root, Path(data_dir), image_size or 32)
        split = "test" if "test" in there else "reference"
    return datasets.load(dataset, data_dir, split, image_size, rho)


def few_labels(args):
    """--label-fraction of the balanced training images, the same number of each class: CIFAR-10 with 0.001: 5 each.

    Which ones is the same in every run. Balanced: cifar10 for cifar10lt and cifar10imb; a folder counts as balanced.
    """
    train = datasets.load(balanced(args.dataset), args.data_dir, "train", args.image_size)
    each = round(args.label_fraction * len(train.labels) / len(train.classes))
    if each < 1:
        fail(f"--label-fraction {args.label_fraction:g} of {len(train.labels)} images is less than one for each of "
             f"{len(train.classes)} classes")
    if each > train.counts.min():
        c = int(train.counts.argmin())
        fail(f"--label-fraction {args.label_fraction:g} takes {each} images of each class; {train.classes[c]} has "
             f"{int(train.counts[c])}")
    keep = datasets.subset(train.labels.numpy(), [each] * len(train.classes), np.random.RandomState(0))
    return ImageSet(train.images[keep], train.labels[keep], train.classes)


def read_samples(args, test_set, device):
    """The ImageSet of --train-on or --add: `images` (N, H, W, 3) uint8 with `labels` or `predicted` (N,), or --label-with's.

    predicted is what a GAN without labels writes: the class that the classifier in its loop sees in each sample.
    """
    path, size, K = Path(args.train_on or args.add), test_set.images.shape[-1], len(test_set.classes)
    try:
        with np.load(path, allow_pickle=False) as file:  # allow_pickle: a file from elsewhere can't run code
            found = {name: file[name] for name in ("images", "labels", "predicted") if name in file}
    except MemoryError:
        raise
    except Exception as error:  # zip, zlib and NumPy have their own
        raise InputError(f"{path} cannot be read ({error})") from error
    images, labels = found.get("images"), found.get("labels", found.get("predicted"))
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        fail(f"{path} holds no images, an array (N, H, W, 3) of uint8")
    if images.shape[1:3] != (size, size):
        fail(f"{path} has samples of {images.shape[2]} x {images.shape[1]} pixels and {args.dataset} {size} x {size}; "
             "--image-size sets the latter")
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if args.label_with:
        labels = predict(load_classifier(args.label_with, device, test_set.classes, size), images, device).numpy()
    if labels is None:
        fail(f"{path} holds neither labels nor predicted; --label-with CLASSIFIER.pt labels its images")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        fail(f"{path} has labels {labels.dtype} {labels.shape}, not one whole number for each of {len(images)} images")
    if labels.min() < 0 or labels.max() >= K:
        fail(f"{path} has labels from {labels.min()} to {labels.max()}; {args.dataset} has the classes 0 to {K - 1}")
    labels = torch.from_numpy(labels.astype(np.int64))
    return ImageSet(images, labels, test_set.classes)


def held_out(train_set, share):
    """(ImageSet to learn from, ImageSet that early stopping watches): `share` of each class; of two images one each at least.

    Which ones is the same in every run. Why Softlabel-GAN's classifier has to stop early: `entropy_rewarded_loss`. Why not by
    the test images: they are the reference that the samples are scored against.
    """
    n = [min(n_k - 1, max(1, round(share * n_k))) for n_k in train_set.counts.tolist()]
    out = torch.zeros(len(train_set.labels), dtype=torch.bool)
    out[torch.from_numpy(datasets.subset(train_set.labels.numpy(), n, np.random.RandomState(0)))] = True
    return tuple(ImageSet(train_set.images[i], train_set.labels[i], train_set.classes) for i in (~out, out))


def augment(images, crop_padding, flip, generator):
    """A random crop of each zero-padded image, half of them mirrored if `flip`; (B, 3, H, W) uint8 in and out."""
    b, _, height, width = images.shape
    top, left = torch.randint(2 * crop_padding + 1, (2, b, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (B, H), (B, W): which pixels make the crop
    if flip:
        columns = torch.where(torch.rand(b, 1, generator=generator) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (crop_padding,) * 4).permute(0, 2, 3, 1)
    index = torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]
    return padded[tuple(i.to(images.device) for i in index)].permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Testing
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def outputs(network, images, device="cpu", batch_size=None):
    """images (N, 3, H, W) uint8 -> logits (N, K) on the CPU of an eval-mode network."""
    batch_size = batch_size or getattr(network, "batch", 200)
    return torch.cat([network(x.to(device) / 127.5 - 1).cpu() for x in images.split(batch_size)])


def predict(network, images, device="cpu", batch_size=None):
    """images (N, 3, H, W) uint8 -> (N,) int64 on the CPU, the class that an eval-mode network sees in each."""
    return outputs(network, images, device, batch_size).argmax(1)


def accuracy(network, test_set, train_counts, device="cpu"):
    """Share of an ImageSet's images that an eval-mode network recognises, in [0, 1].

    Returns {"all", "head", "middle", "tail"}, thirds of the classes by `train_counts` (K,), the number of *training*
    images of each class; and the list of the K classes' shares. None where there are no test images.
    """
    right = (predict(network, test_set.images, device) == test_set.labels).double()
    K = len(train_counts)

    def share(classes):
        mine = right[torch.isin(test_set.labels, torch.as_tensor(classes))]
        return mine.mean().item() if len(mine) else None

    groups = {"all": range(K), **datasets.thirds(train_counts)}
    return {name: share(list(classes)) for name, classes in groups.items()}, [share([k]) for k in range(K)]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint and resume
# ----------------------------------------------------------------------------------------------------------------------
def load_checkpoint(path, device):
    """The dictionary that main() saved. Raises InputError, naming the file, if it is missing or damaged."""
    if not Path(path).is_file():
        fail(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)  # weights_only: a checkpoint can't run code
        return state | {"settings": state["settings"]}  # or it is no checkpoint of a run
    except Exception as error:  # zip, pickle and file errors alike
        reason = str(error).splitlines()[0]
        raise InputError(f"checkpoint {path} is damaged ({reason}); it is kept, move it away to start afresh") from error


def check_same_run(args, found, run_dir):
    """Raises InputError, naming the flags, if the run in this directory has other settings."""
    now = {k: v for k, v in vars(args).items() if k not in FREE}
    differs = [f"--{k.replace('_', '-')} {found.get(k)} there, {v} now" for k, v in now.items() if found.get(k) != v]
    if differs:
        raise InputError(f"{run_dir} holds a run with other settings ({'; '.join(differs)}); choose another --run-dir")


def trim_log(path, step):
    """Drops the lines of a log that a killed run wrote after the checkpoint of this step: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in lines).encode())


@contextlib.contextmanager
def ask_to_stop():
    """Yields a list that gets the number of a SIGINT (Ctrl-C) or SIGTERM, for a loop that saves and stops in its own time.

    A second signal stops at once. Afterwards the handlers are those of the caller, which may be a GAN's script.
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


def save_classifier(path, network, dataset, split, classes, image_size, settings, test_accuracy, per_class_accuracy=(),
                    unseen=True):
    """Write all that `load_classifier` needs to `path`, in one piece or not at all."""
    info = {
        "dataset": dataset, "split": split,
        "classes": [str(name) for name in classes],  # they may be NumPy's strings, which weights_only would not load
        "image_size": image_size, "settings": settings, "normalisation": settings["normalisation"], "head": settings["head"],
        "test_accuracy": test_accuracy, "per_class_accuracy": list(per_class_accuracy),
        "tested_on_unseen_images": unseen, "network": network.name,
    }
    # Through JSON: pickle writes a string once where the same object comes twice, which it does in a run that was not resumed.
    # A classifier is known by the bytes of its file.
    checkpoint = json.loads(json.dumps(info)) | {"weights": {name: w.cpu() for name, w in network.state_dict().items()}}
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_classifier(path, device="cpu", classes=None, image_size=None):
    """A frozen eval-mode network, one of NETWORKS; its `.info` holds what the checkpoint says beside the weights, and its path.

    classes, image_size: what the caller is going to show it, where that should be checked. Raises InputError, naming
    the file, where it is missing, damaged, no classifier, or made for other classes or another size.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no classifier at {path}")
    try:
        info = torch.load(path, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # building it draws weights; the caller's random state is left alone
            network = NETWORKS[info["network"]](len(info["classes"]), **info["normalisation"], head=info["head"])
        network.load_state_dict(info.pop("weights"))
        if missing := {"test_accuracy", "per_class_accuracy", "tested_on_unseen_images"} - info.keys():
            raise KeyError(*missing)  # of an older version
        made_for = f"{path} is for {info['dataset']} ({len(info['classes'])} classes, {info['image_size']} pixels)"
    except Exception as error:  # a damaged or foreign file: zip, pickle, a missing key, another network's weights ...
        what = type(error).__name__
        raise InputError(f"{path} is not a checkpoint of classifier.py, or damaged ({what}); move it away to train it "
                         "again") from error
    if classes is not None and list(classes) != info["classes"]:
        other = "wanted are" if len(classes) != len(info["classes"]) else "wanted is another data set with"
        raise InputError(f"{made_for}; {other} {len(classes)} classes, {', '.join(list(classes)[:3])} ...")
    if image_size is not None and image_size != info["image_size"]:
        raise InputError(f"{made_for}; wanted are images of {image_size} pixels")
    network.info = {**info, "path": str(path)}
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# What the other scripts import
# ----------------------------------------------------------------------------------------------------------------------
def frozen_classifier(dataset, data_dir, path=None, split="train", image_size=None, rho=None, seed=0,
                      device="cpu", soft_labels=False, amp="auto"):
    """The network of the checkpoint at `path`; without a path, one trained for the purpose, with a progress bar.

    split       what that one learns from: "train", the (long-tailed) data that a GAN learns from too, or "reference",
                balanced: a judge, the same for cifar10, cifar10lt and cifar10imb
    soft_labels whether to train it as Softlabel-GAN does: its probabilities are to be labels
    amp         bfloat16 for this training: "auto" (where the hardware has it), "bf16" or "off"
    returns     a frozen eval-mode network: images (B, 3, H, W) in [-1, 1] -> logits (B, K); `.features(x)` (B, D);
                `.info`: a dict with classes, image_size, test_accuracy, path ...
    raises      InputError, see `load_classifier`

    What it trains it keeps, and finds again in the next call: the judge of the shapes data as
    <data_dir>/classifier-shapes-<size>.pt, any other as runs/<name>/classifier.pt. That judge learns from the reference
    split, which is drawn independently of every training split: it has not seen what a generator learnt from.
    Training that was cut short goes on. A signal while it trains ends the program: SystemExit, with all saved. The
    caller's random state and signal handlers are left as they were.
    """
    test_set = load_test(dataset, data_dir, image_size, rho)
    size = test_set.images.shape[-1]
    if path is None:
        shapes_judge = dataset.startswith("shapes") and split == "reference"
        if shapes_judge:  # one for every run
            seed = 0
        if split == "reference":
            rho = None
        command = ["--dataset", dataset, "--data-dir", str(data_dir), "--split", split, "--image-size", str(size),
                   "--seed", str(seed), "--device", str(device), "--amp", amp]  # fmt: skip
        command += (["--rho", str(rho)] if rho is not None else []) + (["--soft-labels"] if soft_labels else [])
        args = parse_settings(command)
        path = Path("runs") / run_name(args) / "classifier.pt"  # where `train` puts it: nothing differs from the recipe
        if shapes_judge:
            path = Path(data_dir) / f"classifier-shapes-{size}.pt"
            args.run_dir = str(path.with_suffix(""))
        if path.is_file() and dataset.startswith("folder:"):
            found = load_classifier(path, "cpu").info["settings"]["training_data"]
            if found != datasets.load(dataset, data_dir, split, size).fingerprint:
                fail(f"{path} has learnt from other images of {dataset} than there are now; move its directory away")
        if not path.is_file():
            print(f"Training the classifier {path} first.", flush=True)
            train(args, path)
    return load_classifier(path, device, test_set.classes, size)


# Softlabel-GAN, Table 1: least and most images that count for a class, of the data sets that have a name here.
COUNTED_BY_PAPER = {"cifar10imb": (149, 2_232), "cifar100imb": (35, 176)}
RIGHT_ENOUGH = 0.9  # CHOICE. The paper has 81.2 % (AnimeFace), 84.4 % (Tiny ImageNet), 99.9 % (flowers, cars)
MASS_KEPT = 0.25  # CHOICE


def images_that_count(y, threshold=0.01):
    """(K,) int64: how many labels, rows of y (N, K), give each class more than 0.01 (Softlabel-GAN, Table 1)."""
    return (y.double() > threshold).sum(0)


def labels_by_classifier(args, train, run_dir, device):
    """p (N, K) float32: the classifier's probabilities of the training images, neither flipped nor cropped.

    args    dataset, data_dir, image_size, rho, amp; classifier: a path, or None for one that is trained first
    train   the ImageSet to label
    run_dir keeps p as soft_labels.npz, where later calls find it; without args.classifier they need no other file
    raises  InputError where that file is damaged, or labels other images, or is by another classifier
    """
    path = Path(run_dir) / "soft_labels.npz"
    stored = read_soft_labels(path, train) if path.exists() else None
    if stored and args.classifier is None:
        report_labels(stored["probabilities"], train, args.dataset, f"labels of {path}: right on")
        return stored["probabilities"]

    C = frozen_classifier(args.dataset, args.data_dir, args.classifier, "train", args.image_size, args.rho,
                          device=device, soft_labels=True, amp=args.amp)
    sha = hashlib.sha256(Path(C.info["path"]).read_bytes()).hexdigest()
    if stored and stored["classifier"] != sha:
        fail(f"{run_dir} has the labels of another classifier than {C.info['path']}; choose another --run-dir")
    p = stored["probabilities"] if stored else outputs(C, train.images, device).softmax(1)
    if not stored:
        with atomic_write(path) as file:
            np.savez(file, probabilities=p.numpy(), training_data=train.fingerprint, classifier=sha)

    known = "test" if C.info["tested_on_unseen_images"] else "its own training"
    report_labels(p, train, args.dataset, f"labels by {C.info['path']}: right on "
                  f"{C.info['test_accuracy']['all']:.1%} of {known} images and")
    if C.info["settings"].get("training_data") != train.fingerprint:  # the supplement's Fig. 5 does so on purpose
        warn(f"the classifier has learnt from other images than {args.dataset}'s")
    return p


def read_soft_labels(path, train):
    """What `labels_by_classifier` wrote for the images of `train`: probabilities (N, K), training_data, classifier."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in ("probabilities", "training_data", "classifier")}
    except Exception as error:  # zip, zlib and NumPy have their own
        raise InputError(f"{path} is damaged ({error}); delete it, and the labels are computed again") from error
    if stored["training_data"] != train.fingerprint:
        fail(f"{path} labels other images than there are now; choose another --run-dir")
    p = stored["probabilities"]
    if p.shape != (len(train.labels), len(train.classes)) or not np.allclose(p.sum(1), 1, atol=1e-3):
        fail(f"{path} is damaged (no probabilities); delete it, and the labels are computed again")
    return stored | {"probabilities": torch.from_numpy(p)}


def report_labels(p, train, dataset, source):
    """Prints what the labels p (N, K) of `train` are like beside Softlabel-GAN's, and warns where they are unlike."""
    counted, right = images_that_count(p), (p.argmax(1) == train.labels).double().mean().item()
    paper = COUNTED_BY_PAPER.get(dataset)
    print(f"{source} {right:.1%} of the labelled images", flush=True)
    print(f"images that count for a class: {counted.min()} to {counted.max()}"
          + (f" (the paper's: {paper[0]:,} to {paper[1]:,})" if paper else "")
          + f"; its own images: {train.counts.min()} to {train.counts.max()}", flush=True)

    if right < RIGHT_ENOUGH:
        warn(f"the classifier recognises only {right:.1%} of the images that it labels, Softlabel-GAN's up to 99.9 %: "
             "these labels are another regime; classifier.py says how to come near it (--init-from, --hold-out 0)")
    warn_of_collapse(describe_labels(p, train.labels), len(train.classes))
    lost = [name for name, mass, n_k in zip(train.classes, p.sum(0), train.counts, strict=True)
            if mass < MASS_KEPT * n_k]
    if lost:
        warn(f"the classifier gives {', '.join(lost)} less than a quarter of the probability that one-hot labels "
             "would: the discriminator hears little of them")


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def build_soft_classifier(dataset, num_classes, image_size, device="cpu"):
    """An untrained network of --soft-labels in training mode, and its SGD, to be trained beside a GAN ("co-training").

    CHOICE: a tenth of the highest learning rate throughout, as there is no last epoch to anneal to.
    """
    args = parse_settings(["--dataset", dataset, "--soft-labels"])
    complete(args, 1, image_size)
    network = NETWORKS[args.network](num_classes, **args.normalisation, head=args.head)
    if args.pretrained:
        network.load_imagenet()
    network = network.to(device, memory_format=torch.channels_last)
    return network, torch.optim.SGD(network.parameters(), args.lr / 10, MOMENTUM, weight_decay=args.weight_decay)


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------
def learning_rate(progress, epochs, base, schedule):
    """Learning rate after `progress` of `epochs` epochs, a real number in [0, epochs).

    "steps"   LDAM-DRW, for 200 epochs: base times (e + 1)/5 in epoch e = 0 .. 4, times 1 up to epoch 159, 1e-2 up to
              179, 1e-4 from 180. Other lengths keep the proportions.
    "cosine"  CHOICE, for runs of seconds: a straight line up over the first fifth, half a cosine down to 0.
    "sevens"  Softlabel-GAN's official scripts: a tenth of it after every 7 epochs.
    "bit"     BiT, for 500 steps: a straight line up over 100, a tenth from each of 200, 300, 400 on.
    """
    if schedule == "cosine":
        rise = 0.2 * epochs
        if progress < rise:
            return base * progress / rise
        return base * (1 + math.cos(math.pi * (progress - rise) / (epochs - rise))) / 2
    if schedule == "bit":
        fifths = 5 * progress / epochs
        return base * min(1, fifths) * 0.1 ** max(0, math.floor(fifths) - 1)
    epoch, scale = math.floor(progress), epochs / 200
    if schedule == "sevens":
        return base * 0.1 ** (epoch // 7)
    warm_up = min(1, (epoch + 1) / (5 * scale))
    return base * warm_up * (1 if epoch < 160 * scale else 1e-2 if epoch < 180 * scale else 1e-4)


def train(args, path=None):
    """Trains the classifier that `args` of `parse_settings` ask for, or goes on; it ends as `path`.

    Every random number comes from --seed through generators of its own, so that a training run which calls this goes on
    as if it had not. On a CPU two runs give the same weights.
    """
    device = pick_device(args.device)
    amp = use_bf16(args.amp, device)
    train_set, test_set, train_counts = load_data(args, device)
    complete(args, len(train_set.labels), test_set.images.shape[-1])
    # A setting like others: a run does not go on with a folder that has changed, or with other samples of the same name.
    args.training_data = train_set.fingerprint
    whole, watched = train_set, None
    if args.hold_out:
        train_set, watched = held_out(whole, args.hold_out)
        if not len(watched.labels):
            fail(f"{args.dataset} has no class with two images: none can be held out to stop early by")
    unseen = test_set.fingerprint != args.training_data
    run_dir, epochs, B, classes = Path(args.run_dir), args.epochs, args.batch_size, train_set.classes
    path = path or run_dir / "classifier.pt"

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)  # torch.manual_seed would seed the caller's GPU too
        network = NETWORKS[args.network](len(classes), **args.normalisation, head=args.head)
    # channels_last: 1.2 to 1.5 times as fast on the CPU.
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = train_set.images.to(device), train_set.labels.to(device)
    steps = math.ceil(len(labels) / B)  # an epoch
    test_every = max(1, epochs // TESTS[args.network])  # epochs
    test_every = min(test_every, PATIENCE) if watched else test_every  # a run that stops early has been tested
    # The order of this epoch's images, the sum of its losses, the last test, the best one, the time that all took.
    start, order, loss_sum, tested, best, seconds = 0, None, torch.zeros((), device=device), {}, {}, 0.0
    kept = {"epoch": 0, "loss": math.inf}  # the smallest loss on what is held out, and the weights that had it

    checkpoint_file, log_file = run_dir / "checkpoint.pt", run_dir / "log.jsonl"
    if checkpoint_file.exists():
        state = load_checkpoint(checkpoint_file, "cpu")
        check_same_run(args, state["settings"], run_dir)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start, order, loss_sum = state["step"], state["order"], state["loss_sum"].to(device)
        tested, best, seconds, kept = state["tested"], state["best"], state["seconds"], state["kept"]
    elif args.pretrained:
        network.load_imagenet()
    source = args.train_on or (f"{args.label_fraction:g} of the labels" if args.label_fraction else f"{args.split} split")
    source += f" and {args.add}" if args.add else ""
    resumed = "; trained already" if start == epochs * steps else f"; resumed at step {start}" if start else ""
    loss = args.loss + (" + DRW" if args.drw else "") + (f" - {args.entropy_weight:g} entropy" if args.entropy_weight else "")
    print(f"{args.network} on {args.dataset}, {source}: {len(labels)} images of {len(classes)} classes; {loss}; {epochs} "
          f"epochs of {steps} steps; {device}{', bf16' if amp else ''}; {run_dir}{resumed}", flush=True)
    if not unseen:
        print(f"warning: {args.dataset} has no images apart to test with: accuracies are those on what was learnt from",
              file=sys.stderr, flush=True)

    def check_finite(step):
        if not torch.isfinite(loss_sum):
            saved = f"the last good checkpoint, {checkpoint_file}, is kept" if checkpoint_file.exists() else "nothing was saved"
            fail(f"the loss became {loss_sum.item()} in epoch {(step - 1) // steps + 1}; {saved}; try a lower --lr")

    def save_checkpoint(step):
        check_finite(step)
        state = dict(step=step, settings=vars(args), model=network.state_dict(), optimizer=optimizer.state_dict(),
                     generator=generator.get_state(), order=order, loss_sum=loss_sum, tested=tested, best=best, kept=kept,
                     seconds=seconds + time.monotonic() - began)
        with atomic_write(checkpoint_file) as file:
            torch.save(state, file)

    if start < epochs * steps:
        trim_log(log_file, start)
        with atomic_write(run_dir / "config.json") as file:
            config = {"settings": vars(args), **environment(device), "bf16": amp}
            file.write(json.dumps(config, indent=2).encode() + b"\n")
        began, done = time.monotonic(), start
        with (
            ask_to_stop() as stop,
            open(log_file, "a") as log,
            tqdm(total=epochs * steps, initial=start, desc="classifier", unit="step", dynamic_ncols=True) as bar,
        ):
            for step in range(start, epochs * steps):
                epoch, i = divmod(step, steps)
                if i == 0 and watched and epoch - kept["epoch"] >= PATIENCE:
                    break
                if i == 0:
                    order = torch.randperm(len(labels), generator=generator)
                    loss_sum = torch.zeros((), device=device)
                if i == 0 or step == start:
                    weight = drw_weights(train_set.counts, epoch if args.drw else 0, epochs).to(device)
                lr = learning_rate(epoch + (i + 0.5) / steps, epochs, args.lr, args.schedule)
                optimizer.param_groups[0]["lr"] = lr
                index = order[i * B : (i + 1) * B].to(device)
                x = augment(images[index], args.crop_padding, args.flip, generator) / 127.5 - 1
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits = network(x).float()
                if args.entropy_weight:
                    loss = entropy_rewarded_loss(logits, labels[index], args.entropy_weight)
                elif args.loss == "focal":
                    loss = focal_loss(logits, labels[index], weight)
                else:
                    loss = F.cross_entropy(logits, labels[index], weight)  # the mean divides by the sum of the weights
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()  # read once an epoch: reading a number makes a GPU wait

                done = step + 1
                bar.update()
                if done % steps == 0:
                    check_finite(done)
                    row = {"step": done, "epoch": epoch + 1, "loss": loss_sum.item() / steps, "lr": lr}
                    network.eval()
                    if watched:
                        logits = outputs(network, watched.images, device)
                        row["held_out_loss"] = entropy_rewarded_loss(logits, watched.labels, args.entropy_weight).item()
                        if row["held_out_loss"] < kept["loss"]:
                            weights = {name: w.clone() for name, w in network.state_dict().items()}
                            kept = {"epoch": epoch + 1, "loss": row["held_out_loss"], "weights": weights}
                    if (epoch + 1) % test_every == 0 or epoch + 1 == epochs:  # nothing is chosen by it
                        shares, per_class = accuracy(network, test_set, train_counts, device)
                        if args.soft_labels:
                            row |= describe_labels(outputs(network, whole.images, device).softmax(1), whole.labels)
                        tested = {"epoch": epoch + 1, "test_accuracy": shares, "per_class_accuracy": per_class,
                                  "seconds": seconds + time.monotonic() - began}  # fmt: skip
                        if not best or shares["all"] > best["test_accuracy"]["all"]:
                            best = tested
                        row["test_accuracy"] = shares
                    network.train()
                    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                    log.write(json.dumps(row | {"seconds": round(seconds + time.monotonic() - began, 3)}) + "\n")
                    log.flush()
                stopping = bool(stop)  # a signal that comes after this line is for the next step
                if stopping or done % (steps * args.save_every) == 0 or done == epochs * steps:
                    save_checkpoint(done)
                if stopping:
                    break
        if stop:
            print(f"stopped by signal {stop[0]} at step {done}; the same command goes on from {checkpoint_file}")
            sys.exit(128 + stop[0])

    labels = {}
    if watched:
        network.load_state_dict(kept["weights"])
        shares, per_class = accuracy(network.eval(), test_set, train_counts, device)
        tested = tested | {"epoch": kept["epoch"], "test_accuracy": shares, "per_class_accuracy": per_class}
        print(f"kept the weights of epoch {kept['epoch']}, which had the smallest loss on {len(watched.labels)} images held "
              f"out, {kept['loss']:.3f}", flush=True)
    if args.soft_labels:
        labels = describe_labels(outputs(network.eval(), whole.images, device).softmax(1), whole.labels)
        print("labels: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in labels.items() if value))
        warn_of_collapse(labels, len(classes))
    write_results(args, run_dir, train_set, test_set, train_counts, tested, best, unseen, labels)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    save_classifier(path, network, args.dataset, args.source, classes, args.image_size, settings,
                    tested["test_accuracy"], tested["per_class_accuracy"], unseen)  # fmt: skip
    print(f"wrote {path}")
    return path


def write_results(args, run_dir, train_set, test_set, train_counts, tested, best, unseen, labels):
    """metrics.json and per_class.csv in `run_dir`, and the same as text: how many test images the classifier recognises."""
    shares, per_class = tested["test_accuracy"], tested["per_class_accuracy"]
    rows = [{"class": train_set.classes[k], "label": int(k), "train_images": int(train_set.counts[k]),
             "test_images": int(test_set.counts[k]), "accuracy": per_class[k]}
            for k in datasets.head_to_tail(train_counts)]  # fmt: skip
    result = {name: getattr(args, name) for name in ("dataset", "rho", "source", "train_on", "loss", "drw", "epochs", "seed")}
    result |= {"train_images": len(train_set.labels), "test_accuracy": shares, "tested_on_unseen_images": unseen,
               "best_on_test": {"epoch": best["epoch"], "all": best["test_accuracy"]["all"]},
               "seconds": round(tested["seconds"], 1)}  # fmt: skip
    result |= {"labels": labels} if labels else {}
    if args.train_on:
        result["classifier_accuracy_score"] = shares["all"]
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, text in (("metrics.json", json.dumps(result | {"per_class": rows}, indent=2) + "\n"),
                       ("per_class.csv", table.getvalue())):  # fmt: skip
        with atomic_write(run_dir / name) as file:
            file.write(text.encode())

    print(f"trained in {tested['seconds']:.0f} s; accuracy on {len(test_set.labels)} test images: "
          + ", ".join(f"{name} {100 * share:.2f} %" for name, share in shares.items() if share is not None)
          + f" (the best of the epochs tested: {100 * best['test_accuracy']['all']:.2f} % after {best['epoch']})")
    if len(rows) <= 20:
        width = max(len(row["class"]) for row in rows)
        for row in rows:
            share = "      -" if row["accuracy"] is None else f"{100 * row['accuracy']:6.2f} %"
            print(f"  {row['class']:{width}} {row['train_images']:7,d} images {share}")
    if args.train_on:
        print(f"classifier accuracy score: {100 * shares['all']:.2f} %")


def macro_precision_recall(seen, labels, num_classes):
    """Means over the classes of precision and of recall; seen (N,) what a classifier says, labels (N,) what is right.

    Precision of a class: the share of what is taken for it that belongs to it, 0 if nothing is taken for it. Recall: the
    share of it that is recognised; its mean is the accuracy where all classes are equally often. Classes without images
    are left out.
    """
    right = torch.bincount(labels[seen == labels], minlength=num_classes).double()
    taken, there = (torch.bincount(x, minlength=num_classes).double() for x in (seen, labels))
    return tuple((right / n.clamp(min=1))[there > 0].mean().item() for n in (taken, there))


def recognition(args, path):
    """CBDM's Table 4 for the classifier at `path`: macro precision and recall on the test images, added to metrics.json."""
    device = pick_device(args.device)
    test_set = load_test(args.dataset, args.data_dir, args.image_size, args.rho)
    seen = outputs(load_classifier(path, device), test_set.images, device).argmax(1)
    precision, recall = macro_precision_recall(seen, test_set.labels, len(test_set.classes))
    scores = Path(args.run_dir) / "metrics.json"
    result = json.loads(scores.read_text()) | {"macro_precision": precision, "macro_recall": recall, "added": args.add}
    with atomic_write(scores) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    print(f"real and generated images: macro precision {precision:.4f}, macro recall {recall:.4f} on {len(seen)} test images")


def main(argv=None):
    args = parse_settings(argv)
    path = train(args)
    if args.add:
        recognition(args, path)


if __name__ == "__main__":
    run_command(main)
