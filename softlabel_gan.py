"""Softlabel-GAN: label augmentation as inter-class data augmentation (Katsumata, Vo, Nakayama; WACV 2024), in one file.

A conditional GAN on few and unevenly spread images paints a rare class as the same few pictures. In Softlabel-GAN the
projection discriminator of a BigGAN is not told the class of a real image but what a classifier, trained beforehand on the same
images, makes of it: .7 dog, .2 cat, .1 horse. Its score is linear in the label, so that this dog counts a little as a cat, and
the cats borrow the variety of the dogs. Fakes, and the generator, keep one-hot labels, drawn uniformly over the classes. A
classifier that knows its images by heart would say of each dog the same, however much it looks like a cat: the labels are
worth something because it is paid for doubt, and stops early (`entropy_rewarded_loss` in classifier.py).

P is the paper, S its supplement, A the authors' code (github.com/raven38/softlabel-gan), whose training loop does not run as
released; CHOICE marks what none of them says. DiffAugment (colour, shifts, holes) is on in all but Table 3's ablations.

    python softlabel_gan.py --dataset shapeslt                        # first look: drawn shapes, a CPU, minutes
    python softlabel_gan.py --dataset cifar10imb                      # the paper's run (Tables 2 and 4); also cifar100imb
    python softlabel_gan.py --dataset cifar10imb --labels onehot      # its baseline, DiffAug-GAN: BigGAN and DiffAugment
    python softlabel_gan.py --dataset cifar10imb --labels smooth      # Smooth-GAN; also mixup, ols (S, Table 1), cotrain (S)
    python softlabel_gan.py --dataset cifar10imb --labels onehot --oversample 1    # Oversample (Table 4)
    python softlabel_gan.py --dataset cifar10imb --diffaug ""         # Softlabel-GAN- (Table 3); with onehot plain BigGAN
    python softlabel_gan.py --dataset cifar10imb --minimum-class 120  # Fig. 5
    python softlabel_gan.py --dataset folder:PATH --image-size 128    # your copy of AnimeFace, Oxford-102, Cars; 64, 256 too

`--classifier runs/.../classifier.pt` is a checkpoint of `classifier.py --soft-labels`; without it that one is trained first,
the same for each --seed. Its labels are computed once and stay with the run, soft_labels.npz. The README has a command for each
row of each table. Each command resumes the run that it finds in its run directory: bit for bit on the CPU with the same number
of threads.
Cost, on two cores of an AMD EPYC: shapeslt 5 minutes 24 seconds, both classifiers, training and scores (a busy machine);
imbalanced CIFAR-10 1.9 s a step of D and one of G of 32 images (the paper's has four of 128 and one), never run in full.
To aim at, on imbalanced CIFAR-10 with one-hot, smoothed, soft labels (P, Table 2): FID 57.24, 66.75, 54.59, intra-FID 112.96,
125.31, 109.79; 10,000 samples (P), against the balanced test images (A). Mixup 56.36, Oversample 59.03 (P, Table 4). P's
Table 3 has other FIDs of the same methods, and no reason. A class counts 149 to 2,232 images (P, Table 1).

From A, because P does not say: BigGAN-PyTorch's layers and initial weights, Adam's betas and eps, four steps of D for one of G
at 32 pixels, flips, EMA. Where we differ, and why:
  * The hinge on fakes, as in A; P's Eq. 3 has lost it in print.
  * Smoothed labels sum to 1, as in P; A's sum to 1 - alpha / K. The table of --labels ols is divided by rows, A's by columns.
  * Oversampling draws class c with probability (1 - alpha) n_c / N + alpha / K. A's weights are right at alpha = 1; at 0, where
    S has the data's distribution, they are inverse to it.
  * P's batches (128 at 32 pixels; A's scripts: 50) and all three parts of DiffAugment (A's scripts: without colour).
  * The classifier does not learn from the tenth of the images by which it stops. A trains it on all that it labels, and
    measures its accuracy on them.
  * The classifier of CIFAR and of the shapes is a ResNet-32 from scratch, P's backbone for CIFAR being unknown; that of larger
    images a Wide-ResNet-101-2 with ImageNet's weights, as in A, where P does not mention them.
  * Samples are made with the batch statistics of training; A's 32-pixel scripts use those of each batch of samples.
  * A scores the weights that had the best FID on the way, against the very images of the final score; ours are the last.
  * The vectors u and v of spectral norm are copied, not averaged, into the averaged generator: see `state_pairs`.
  * bfloat16 where the hardware has it (`--amp off`: float32), fused Adam, real and fake in one pass of D. Untested: CUDA, whose
    autocast computes the power method of spectral norm in bfloat16 too.
Not here: ADC-GAN, vision-aided GAN and the guided diffusion of P's Table 7, which are other methods with the same labels;
colour histograms and t-SNE; ImageNet-LT and Tiny ImageNet (folder:PATH takes them, cut by hand).
"""

import argparse
import copy
import hashlib
import json
import math
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

import datasets
from classifier import (
    build_soft_classifier,
    describe_labels,
    entropy_rewarded_loss,
    frozen_classifier,
    outputs,
    warn_of_collapse,
)
from datasets import InputError, atomic_write, environment, fail, pick_device, run_command, use_bf16

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------
# What differs from resolution to resolution. P: the paper, §4.3; A: the authors' code.
AT_32 = dict(
    image_size=32, width=64, discriminator_width=64,  # A
    labels="soft", diffaug="color,translation,cutout", smoothing=0.1, flip=True,  # P; flip: A
    batch_size=128, lr=2e-4, lr_d=2e-4, d_steps=4,  # P; d_steps: A
    # CHOICE, here and below (P has no length): as many images as in A. Here those of its script for small data sets, 5,000
    # epochs of 3,208 in steps of 4 x 128; from 64 pixels on those of its 1,000 epochs of AnimeFace.
    steps=31_000,
    ema=0.9999, ema_start=1_000,  # A
    eval_images=10_000, reference="reference",  # P: 10K samples; A: the balanced test set, which is cifar*imb's reference
    sample_every=1_000, save_every=500,
)
AT_128 = AT_32 | dict(
    image_size=128, width=80, discriminator_width=80,  # A
    batch_size=32, lr=1e-4, lr_d=4e-4, d_steps=1, steps=453_000, ema_start=40_000,  # ema_start: as many images as in A
)
RECIPES = {
    # Ours: the network for 32 pixels, one level less and narrower, for two CPU cores and a few minutes. No cutout: a square of
    # half the picture hides the shape.
    16: AT_32 | dict(
        image_size=16, width=8, discriminator_width=16, diffaug="color,translation", batch_size=32, lr=1e-3, lr_d=1e-3,
        d_steps=1, steps=3_500, ema=0.995, ema_start=100, sample_every=500, save_every=500),
    32: AT_32,
    64: AT_128 | dict(image_size=64, batch_size=512, steps=28_300, ema_start=2_500),
    128: AT_128,
    256: AT_128 | dict(image_size=256),  # CHOICE: as 128; neither P nor A says
}
SHAPES_RHO = 26.5  # CHOICE: that of imbalanced CIFAR-10. With 100 the tail hears more of its neighbours than of its 10 images
# What D is told of a real image.
#   soft     what a classifier makes of it (Softlabel-GAN)
#   onehot   its class (DiffAug-GAN; without DiffAugment BigGAN)
#   smooth   its class with 1 - alpha, and alpha spread over all (Smooth-GAN)
#   ols      the mean of `soft` over the images of its class
#   mixup    its class, mixed with another image's as the images are
#   cotrain  what a classifier makes of it that learns beside the GAN
LABELS = ("soft", "onehot", "smooth", "ols", "mixup", "cotrain")
POLICIES = ("color", "translation", "cutout")

# May differ between two commands on one run directory: they do not define the experiment.
FREE = {"data_dir", "run_dir", "device", "compile", "steps", "sample_every", "save_every", "eval_images", "eval_only",
        "features", "reference", "scores", "sample_seed", "classifier"}  # classifier: its labels are compared


def parse_settings(argv=None):
    """The command line as a namespace; what is not given comes from the table of the resolution."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.error = fail
    which.add_argument("--dataset", default="cifar10imb")
    which.add_argument("--image-size", type=int)
    first, _ = which.parse_known_args(argv)
    size = first.image_size or (16 if first.dataset.startswith("shapes") else 32)
    if size not in RECIPES:
        fail(f"--image-size is {size}; it must be {', '.join(map(str, RECIPES))}")
    rho = None
    if first.dataset in datasets.LONG_TAILED:
        rho = SHAPES_RHO if first.dataset == "shapeslt" else datasets.DEFAULT_RHO

    parser = argparse.ArgumentParser(
        description=f"Softlabel-GAN. Defaults shown are those at {size} pixels",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )
    parser.error = fail
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="cifar10imb", help="a name that datasets.py knows, or folder:PATH")
    group.add_argument("--rho", type=float, help="imbalance ratio of a long-tailed set")
    group.add_argument("--minimum-class", type=int, choices=(120, 90, 65), help="images of the smallest class "
                       "of cifar10imb (Fig. 5); 90 and 120 are the data sets cifar10imb-90 and cifar10imb-120")
    group.add_argument("--data-dir", default="data", help="where prepared data sets lie")
    group.add_argument("--image-size", type=int, help="pixels; settles the networks and the other defaults")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the real images")
    group = parser.add_argument_group("method")
    group.add_argument("--labels", choices=LABELS, help="what D is told of real images; see the script")
    group.add_argument("--classifier", metavar="PATH", help="whose labels soft and ols take; default: one trained first")
    group.add_argument("--smoothing", type=float, metavar="ALPHA", help="of smooth")
    group.add_argument("--oversample", type=float, default=0.0, metavar="ALPHA",
                       help="real images by class: from 0, as in the data, to 1, each class equally often")
    group.add_argument("--diffaug", metavar="POLICY", help='DiffAugment: any of color,translation,cutout; "" for none')
    group = parser.add_argument_group("network")
    group.add_argument("--width", type=int, help="ch of BigGAN, the generator's")
    group.add_argument("--discriminator-width", type=int, help="the discriminator's")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help="of G")
    group.add_argument("--d-steps", type=int, help="steps of D before each")
    group.add_argument("--batch-size", type=int, help="real images a step of D, and fakes")
    group.add_argument("--lr", type=float, help="learning rate of G")
    group.add_argument("--lr-d", type=float, help="learning rate of D")
    group.add_argument("--ema", type=float, help="decay of the averaged generator, which is the one that samples")
    group.add_argument("--ema-start", type=int, help="step until which the averaged generator is the generator")
    group.add_argument("--seed", type=int, default=0, help="of weights, data order, noise and labels of fakes")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto takes CUDA, then MPS, then the CPU")
    group.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="bfloat16; auto: where hardware has it")
    group.add_argument("--compile", action="store_true", help="torch.compile: faster steps after a minute or more of waiting")
    group = parser.add_argument_group("run")
    group.add_argument("--run-dir", help="default: runs/softlabel_gan-<dataset>-<what differs>-s<seed>")
    group.add_argument("--sample-every", type=int, help="steps between two sample grids; 0: none")
    group.add_argument("--save-every", type=int, help="steps between two checkpoints")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-images", type=int, help="samples to score at the end, of each class as many; 0: none")
    group.add_argument("--eval-only", action="store_true", help="sample from and score the checkpoint, do not train")
    group.add_argument("--sample-seed", type=int, default=0, help="other ones: other samples, in a directory of their own")
    group.add_argument("--features", help="inception, inception-fid (FID as published) or classifier:PATH; default: a "
                       "classifier of the shapes for shapes, inception otherwise")
    group.add_argument("--scores", default="fid,is", help="of the final samples: names that metrics.py knows, or all")
    group.add_argument("--reference", choices=datasets.SPLITS, help="split to compare samples with")

    parser.set_defaults(**RECIPES[size], rho=rho)
    args = parser.parse_args(argv)
    if args.minimum_class is not None:
        if args.dataset != "cifar10imb":
            fail(f"--minimum-class belongs to --dataset cifar10imb, not to {args.dataset}")
        args.dataset += f"-{args.minimum_class}" if args.minimum_class != 65 else ""  # 65: the data as they are
    args.minimum_class = None  # from here on the name says it
    check_settings(args)
    if args.run_dir is None:
        unnamed = FREE - {"steps"} | {"dataset", "seed"}  # another length gets another directory, unless --run-dir is given
        differs = [f"{k.replace('_', '')}{v}" for k, v in vars(args).items()
                   if k not in unnamed and v != parser.get_default(k)]
        differs = "".join(f"-{d}" for d in differs).replace("/", "_").replace(" ", "").replace(",", "+")
        args.run_dir = f"runs/softlabel_gan-{args.dataset.replace('/', '_').replace(':', '_')}{differs}-s{args.seed}"
    return args


def check_settings(args):
    """Raises InputError for settings that make no sense, before anything is read or written."""
    rules = dict.fromkeys(("steps", "batch_size", "save_every", "d_steps", "width", "discriminator_width"),
                          ("at least 1", lambda v: v >= 1))
    rules |= dict.fromkeys(("ema_start", "sample_every", "seed", "sample_seed"),
                           ("0 or more, and below 2**63", lambda v: 0 <= v < 2**63))
    rules |= dict.fromkeys(("smoothing", "oversample"), ("from 0 to 1", lambda v: 0 <= v <= 1))
    rules |= dict.fromkeys(("lr", "lr_d"), ("a positive number", lambda v: 0 < v < math.inf))
    rules |= {
        "eval_images": ("0, or at least 2", lambda v: v == 0 or v >= 2),
        "ema": ("from 0 to below 1", lambda v: 0 <= v < 1),
        "diffaug": (f"some of {','.join(POLICIES)}, or empty", lambda v: not v or set(v.split(",")) <= set(POLICIES)),
        "features": ("inception, inception-fid or classifier:PATH",
                     lambda v: v in (None, "inception", "inception-fid") or v.startswith("classifier:")),
    }
    for name, (what, holds) in rules.items():
        if not holds(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)!r}; it must be {what}")
    if args.classifier is not None and args.labels not in ("soft", "ols"):
        fail(f"--labels {args.labels} asks no classifier; --classifier is for soft and ols")
    if args.labels != "smooth" and args.smoothing != AT_32["smoothing"]:
        fail(f"--labels {args.labels} smooths nothing; --smoothing is for smooth")
    judge = args.features.removeprefix("classifier:") if (args.features or "").startswith("classifier:") else None
    for path in (args.classifier, judge):
        if path is not None and not Path(path).is_file():  # now, and not after days of training
            fail(f"there is no classifier {path}")
    if args.scores != "fid,is":  # the default needs no check, and the module a second
        import metrics

        metrics.chosen_scores(args.scores)


# ----------------------------------------------------------------------------------------------------------------------
# The paper's equations
# ----------------------------------------------------------------------------------------------------------------------
# K    number of classes                            y_r    (B, K) label of a real image, as in the data: one-hot
# x    (B, 3, R, R) images in [-1, 1]               y_hat  (B, K) label of a real image, augmented: what D is told
# z    (B, d_z) noise, standard normal              y_f    (B, K) label of a fake: one-hot, each class equally likely
# C    the classifier, frozen (cotrain: it learns)  labels are distributions over the classes: they sum to 1
def discriminator_loss(D_real, D_fake):
    """Eqs 1 and 3: E[f_D(-D(x, y))] + E[f_D(D(G(z, y_f), y_f))], f_D(t) = max(0, 1 + t); scores (B,) in, a scalar out.

    Eq. 1 has y_r for y, Eq. 3 y_hat. As printed, Eq. 3 has lost the f_D of its second term: without it D would gain for ever by
    scoring fakes lower. A has this hinge on both.
    """
    return F.relu(1 - D_real).mean() + F.relu(1 + D_fake).mean()


def generator_loss(D_fake):
    """Eq. 2: -E[D(G(z, y_f), y_f)]; scores (B,) in, a scalar out."""
    return -D_fake.mean()


def soft_labels(C, images, device):
    """§4.2: y_hat = C(x), the classifier's probabilities (N, K) float32 of images (N, 3, R, R) uint8, neither flipped nor
    augmented."""
    return outputs(C, images, device).softmax(1)


def smooth_labels(y, alpha):
    """Smooth-GAN, §4.2: (1 - alpha) y + alpha / K. (n, K) in and out; 1 - alpha + alpha / K on the class.

    A writes 1 - alpha there, so that its labels sum to 1 - alpha / K.
    """
    return (1 - alpha) * y + alpha / y.shape[1]


def mixup(x, y, lam, other):
    """Mixup, §4.2: lambda x + (1 - lambda) x', and the labels likewise. other (n,): which image is x' for each."""
    return lam * x + (1 - lam) * x[other], lam * y + (1 - lam) * y[other]


def online_label_smoothing(p, classes):
    """(K, K): row i is what each real image of class i gets for a label, the mean of p over those that C takes for class i.

    p (N, K): C's probabilities of the training images, classes (N,): theirs. Rows sum to 1; a class of which C
    recognises no image keeps its one-hot label. OLS as A has it: one table, from the finished classifier. Zhang et al. 2021,
    where it comes from, renew theirs each epoch. A divides entry (i, j) by the number of class j, not of class i: its rows
    sum to anything, more than 1 for the head, and the tail's columns are the larger the rarer the class.
    """
    K = p.shape[1]
    y, right = F.one_hot(classes, K).to(p), p.argmax(1) == classes
    total, number = y[right].T @ p[right], y[right].sum(0)[:, None]
    return torch.where(number > 0, total / number.clamp(min=1), torch.eye(K, dtype=p.dtype))


def label_augmentation(how, classes, K, p=None, alpha=0.1):
    """T_y, §4.2: y_hat (N, K) float32 of the training images, whose classes (N,) are given.

    p (N, K): their `soft_labels`, for soft and ols. mixup and cotrain change what is returned in the loop.
    """
    y = F.one_hot(classes, K).double()
    if how == "soft":
        y = p
    elif how == "smooth":
        y = smooth_labels(y, alpha)
    elif how == "ols":
        y = online_label_smoothing(p.double(), classes)[classes]
    return y.float()


COUNTS = 0.01


def borrowed(y_hat):
    """(K,) int64: the images that count for each class, whose label gives it more than 0.01 (§4.2; Table 1). y_hat (N, K)."""
    return (y_hat.double() > COUNTS).sum(0)


def diffaugment(x, policy):
    """DiffAugment (Zhao et al. 2020, arXiv:2006.10738) with the ranges of §4.3: x (B, 3, R, R) float32 in and out.

    Each image draws its own numbers, and gradients pass. policy: some of "color,translation,cutout", in this order. What
    moves in or is cut out is 0, the middle grey. Nothing is clamped: colour goes up to |x| = 4.5.
    """
    B, R = len(x), x.shape[-1]

    def uniform(low, high):
        return torch.empty(B, 1, 1, 1).uniform_(low, high).to(x.device)  # drawn on the CPU: the same on each device

    if "color" in policy:
        x = x + uniform(-0.5, 0.5)  # brightness
        grey = x.mean(1, keepdim=True)
        x = grey + uniform(0, 2) * (x - grey)  # saturation
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + uniform(0.5, 1.5) * (x - mean)  # contrast
    pixel = torch.arange(R)
    if "translation" in policy:
        reach = round(R / 8)
        # (B, R) each: row i of the result is row rows[b, i] of image b, padded
        rows, columns = pixel + torch.randint(2 * reach + 1, (2, B, 1))
        index = torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]
        padded = F.pad(x, (reach,) * 4).permute(0, 2, 3, 1)
        x = padded[tuple(i.to(x.device) for i in index)].permute(0, 3, 1, 2)
    if "cutout" in policy:  # a square of R / 2 around a centre that may lie on the border
        start = torch.randint(R + 1, (2, B, 1)) - R // 4
        row, column = (pixel >= start) & (pixel < start + R // 2)  # (B, R) each
        x = x * ~(row[:, None, :, None] & column[:, None, None, :]).to(x.device)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------
# BigGAN (Brock et al. 2019, arXiv:1809.11096), not the deep one, as in A. Channels of the generator from 4 x 4 pixels up, in
# multiples of --width; those of the discriminator are the same from the image down. 64 to 256 have what 16 and 32 have not:
# z in parts, one for each block (hierarchical), a class embedding that the blocks share, attention at 64 x 64 pixels.
# Parameters at the paper's sizes, generator / discriminator with K classes:
#   32  4,273,667 + 3,072 K / 4,204,801 + 256 K          128  49,200,804 + 128 K / 60,034,482 + 1,280 K
#   64  17,285,604 + 128 K / 30,532,721 + 1,280 K        256  57,460,004 + 128 K / 67,842,802 + 1,280 K
CHANNELS = {16: (4, 4, 4), 32: (4, 4, 4, 4), 64: (16, 8, 4, 2, 1), 128: (16, 16, 8, 4, 2, 1), 256: (16, 16, 8, 8, 4, 2, 1)}
FLAT_LATENT = 128  # d_z up to 32 pixels: P, §4.3
CHUNK = 20  # of z, above: for the first layer and for each block: P
EMBEDDING = 128  # of the class, above: P
ATTENTION_AT = 64  # pixels. At image size 64 the discriminator has none: no block of it gives 64 x 64


def latent_size(image_size):
    """d_z: 128 up to 32 pixels; above, 20 for the first layer and for each block."""
    return FLAT_LATENT if image_size <= 32 else CHUNK * len(CHANNELS[image_size])


class ConditionalNorm(nn.Module):
    """Batch normalisation, then a scale 1 + W_g c and a shift W_s c by the code (B, code_size) of class and noise."""

    def __init__(self, channels, code_size, eps):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gain, self.shift = (nn.Linear(code_size, channels, bias=False) for _ in range(2))

    def forward(self, x, code):
        return self.norm(x) * (1 + self.gain(code))[:, :, None, None] + self.shift(code)[:, :, None, None]


def four_by_four(weight):
    """(out, in, 3, 3) -> (out, in, 4, 4): the kernel summed over the 2 x 2 places of a pixel in its square.

    A 3 x 3 convolution before averaging 2 x 2 pixels, or after doubling them, is one 4 x 4 convolution of stride 2: 16 products
    for each of the small pixels instead of 36. The same numbers but for rounding; a step at 32 pixels takes
    three quarters of the time (two cores). At 128, where kernels are large, summing them costs what that saves.
    """
    w = F.pad(weight, (1, 1, 1, 1))
    return w[..., 1:, 1:] + w[..., 1:, :-1] + w[..., :-1, 1:] + w[..., :-1, :-1]


class GeneratorBlock(nn.Module):
    """(B, in, H, W), code -> (B, out, 2H, 2W)."""

    def __init__(self, width_in, width_out, code_size, eps):
        super().__init__()
        self.norm1, self.conv1 = ConditionalNorm(width_in, code_size, eps), nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2, self.conv2 = ConditionalNorm(width_out, code_size, eps), nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x, code):
        # conv1(upsampled), see four_by_four
        kernel = four_by_four(self.conv1.weight).flip(2, 3).transpose(0, 1)
        h = F.conv_transpose2d(F.relu(self.norm1(x, code)), kernel, self.conv1.bias, stride=2, padding=1)
        h = self.conv2(F.relu(self.norm2(h, code)))
        return h + F.interpolate(self.skip(x), scale_factor=2)  # 1 x 1, then upsampled: the same at a quarter of the price


class DiscriminatorBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), half the height and width if `down`."""

    def __init__(self, width_in, width_out, first, down):
        super().__init__()
        self.first, self.down = first, down
        self.conv1, self.conv2 = nn.Conv2d(width_in, width_out, 3, padding=1), nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if down or width_in != width_out else nn.Identity()

    def forward(self, x):
        h = x if self.first else F.relu(x)  # an image is not activated; not in place: the skip needs x
        h = F.relu(self.conv1(h))
        if not self.down:
            return self.conv2(h) + self.skip(x)
        h = F.conv2d(h, four_by_four(self.conv2.weight) / 4, self.conv2.bias, stride=2, padding=1)  # conv2, then pooled
        return h + self.skip(F.avg_pool2d(x, 2))  # pooled, then 1 x 1: the same, at a quarter of the price


class Attention(nn.Module):
    """Self-attention over pixels (Zhang et al. 2019, SAGAN), (B, C, H, W) in and out; at first, gamma = 0, the identity."""

    def __init__(self, channels):
        super().__init__()
        self.query, self.key = (nn.Conv2d(channels, max(1, channels // 8), 1, bias=False) for _ in range(2))
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        q, k, v = self.query(x), F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2)
        q, k, v = (t.flatten(2).transpose(1, 2) for t in (q, k, v))  # (B, pixels, channels)
        h = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # no 1 / sqrt(d), as in SAGAN
        return x + self.gamma * self.out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def initialise(network, image_size, plain=()):
    """Weights N(0, 0.02^2) up to 32 pixels, orthogonal above (A); zero biases; then spectral norm but in the `plain` layers.

    Miyato et al. 2018: W / sigma(W), sigma by one step of the power method in each forward pass in training mode.
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.02) if image_size <= 32 else nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if module not in plain:
                spectral_norm(module, eps=1e-8 if image_size <= 32 else 1e-6)  # eps: A


class Generator(nn.Module):
    """z (B, d_z), y (B, K) one-hot float -> (B, 3, R, R) float32 in [-1, 1]."""

    def __init__(self, image_size, width, num_classes):
        super().__init__()
        widths, self.hierarchical = [width * c for c in CHANNELS[image_size]], image_size > 32
        eps = 1e-4 if self.hierarchical else 1e-5  # of the batch norms: A
        self.shared = nn.Linear(num_classes, EMBEDDING, bias=False) if self.hierarchical else nn.Identity()
        code_size = EMBEDDING + CHUNK if self.hierarchical else num_classes
        self.first = nn.Linear(CHUNK if self.hierarchical else FLAT_LATENT, 4 * 4 * widths[0])
        self.blocks = nn.ModuleList([GeneratorBlock(a, b, code_size, eps) for a, b in pairwise(widths)])
        self.attention = nn.ModuleDict(
            {str(i): Attention(b) for i, b in enumerate(widths[1:]) if 8 * 2**i == ATTENTION_AT})  # what block i gives
        self.norm, self.last = nn.BatchNorm2d(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)
        # Without spectral norm, as in A: what stands for an embedding of the classes.
        by_code = [layer for block in self.blocks for n in (block.norm1, block.norm2) for layer in (n.gain, n.shift)]
        initialise(self, image_size, plain=[self.shared] if self.hierarchical else by_code)

    def forward(self, z, y):
        code = self.shared(y)
        codes = [code] * len(self.blocks)
        if self.hierarchical:
            z, *parts = z.split(CHUNK, 1)
            codes = [torch.cat([code, part], 1) for part in parts]
        h = self.first(z).view(len(z), -1, 4, 4)
        for i, (block, c) in enumerate(zip(self.blocks, codes, strict=True)):
            h = block(h, c)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return self.last(F.relu(self.norm(h))).tanh().float()


class Discriminator(nn.Module):
    """x (B, 3, R, R) in [-1, 1], y (B, K) a distribution over classes -> scores (B,) without bound.

    §4.3: D(x, y) = phi(x) V y + psi(phi(x)). V has no bias, so the score is linear in y: where y sums to 1, D(x, y) is the
    mean of D(x, class) weighted by y. A one-hot y picks a column of V, the embedding of the usual projection discriminator.
    """

    def __init__(self, image_size, width, num_classes):
        super().__init__()
        widths = [3] + [width * c for c in reversed(CHANNELS[image_size])]
        # To 8 x 8 pixels up to 32, to 4 x 4 above; the remaining blocks keep the size.
        downs = int(math.log2(image_size // 8 if image_size <= 32 else image_size // 4))
        layers = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [DiscriminatorBlock(a, b, first=i == 0, down=i < downs)]
            layers += [Attention(b)] if image_size // 2 ** (i + 1) == ATTENTION_AT else []
        self.phi = nn.Sequential(*layers, nn.ReLU())
        self.V, self.psi = nn.Linear(num_classes, widths[-1], bias=False), nn.Linear(widths[-1], 1)
        initialise(self, image_size)

    def forward(self, x, y):
        phi = self.phi(x).float().sum((2, 3))  # (B, l): the sum over the pixels, not the mean
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has 8 bits: too few to compare scores with 1
            return (phi * self.V(y)).sum(1) + self.psi(phi)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------
SAMPLING_BATCH = 250  # images
GRID, FINAL = range(2)  # the pictures on the way, and what is scored; they do not share their noise


def latents(n, size, kind, seed):
    """z (n, size), standard normal, from the CPU: the same on each device."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([kind, seed]).generate_state(1)[0]))
    return torch.randn(n, size, generator=generator)


@torch.no_grad()
def generate(generator, z, labels, K, amp):
    """Images (n, 3, R, R) uint8 on the CPU from z (n, d_z) and labels (n,) int64; generator: the averaged one, in eval mode.

    In eval mode batch norm has the averages of training. A's scripts for 32 pixels sample with statistics of the batch, which
    then holds a single class where classes are scored apart.
    """
    device = next(generator.parameters()).device
    images = []
    for i in range(0, len(z), SAMPLING_BATCH):
        part = slice(i, i + SAMPLING_BATCH)
        y = F.one_hot(labels[part], K).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            x = generator(z[part].to(device), y.to(device))
        images.append(((x + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(images)


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


def stored_soft_labels(args, train, run_dir, device):
    """p (N, K): the `soft_labels` of the training images, computed once: from then on read from soft_labels.npz of the run.

    Trains the classifier first where none is given. Raises InputError.
    """
    path, stored = run_dir / "soft_labels.npz", None
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                stored, made_for, made_by = (file[name] for name in ("probabilities", "training_data", "classifier"))
            if stored.shape != (len(train.labels), len(train.classes)) or not np.allclose(stored.sum(1), 1, atol=1e-3):
                raise ValueError(f"they are {stored.shape}, or not probabilities")
        except Exception as error:  # zip, zlib and NumPy have their own
            raise InputError(f"{path} is damaged ({error}); without it they are computed again") from error
        if made_for != train.fingerprint:
            fail(f"{path} labels other images than {args.dataset} has now; choose another --run-dir")
        if args.classifier is None:
            return torch.from_numpy(stored)
    C = frozen_classifier(args.dataset, args.data_dir, args.classifier, "train", args.image_size, args.rho, device=device,
                          soft_labels=True)
    sha = hashlib.sha256(Path(C.info["path"]).read_bytes()).hexdigest()
    if stored is not None and made_by != sha:
        fail(f"{run_dir} has the labels of another classifier than {C.info['path']}; choose another --run-dir")
    known = "test" if C.info["tested_on_unseen_images"] else "training"
    right = ", ".join(f"{name} {share:.1%}" for name, share in C.info["test_accuracy"].items() if share is not None)
    print(f"labels by {C.info['path']}, {known} images right: {right}", flush=True)
    if C.info["settings"].get("training_data") != train.fingerprint:  # S, Fig. 5, takes others on purpose
        print(f"warning: it has learnt from other images than {args.dataset}'s", file=sys.stderr, flush=True)
    if stored is not None:
        return torch.from_numpy(stored)
    p = soft_labels(C, train.images, device)
    with atomic_write(path) as file:
        np.savez(file, probabilities=p.numpy(), training_data=train.fingerprint, classifier=sha)
    return p


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------
LOG_EVERY = 50  # steps of G
GRID_ROWS, GRID_COLUMNS = 10, 10  # classes, evenly spaced from head to tail, and samples of each
LOSSES = ("L_D", "L_G", "L_C", "D_real", "D_fake")  # as in the log: Eqs 3 and 2, cotrain's C, scores; of D's last step
MIXUP = 0.2  # lambda ~ Beta(0.2, 0.2): A


def write_grid(path, images, columns):
    """(N, 3, H, W) uint8 as a PNG, row by row; small images are enlarged to about 64 pixels."""
    from PIL import Image
    from torchvision.utils import make_grid  # here: it takes a second to import, and training need not wait for it

    scale = max(1, 64 // images.shape[-1])
    grid = make_grid(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), nrow=columns, padding=scale)
    with atomic_write(path) as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, format="png")


def draw_borrowed(path, train, y_hat, rows):
    """Fig. 2: for each of these classes, a row each, the images of other classes that count most for it; y_hat (N, K).

    White where fewer than a row of them count at all, see `borrowed`. Equals come in random order.
    """
    grid = torch.full((len(rows), GRID_COLUMNS, *train.images.shape[1:]), 255, dtype=torch.uint8)
    shuffled = torch.randperm(len(y_hat), generator=torch.Generator().manual_seed(0))
    for row, k in zip(grid, rows, strict=True):
        mine = y_hat[shuffled, k].masked_fill(train.labels[shuffled] == k, 0)
        best = mine.argsort(descending=True, stable=True)[:GRID_COLUMNS]
        found = train.images[shuffled[best[mine[best] > COUNTS]]]
        row[: len(found)] = found
    write_grid(path, grid.flatten(0, 1), GRID_COLUMNS)


def state_pairs(average, network):
    """The tensors of two like networks, as ((averages, values to average), (copies, values to copy)): lists.

    Averaged are weights and batch statistics; copied the counters and, because the average of two unit vectors is none, the
    vectors of spectral norm: for the average's own weights they are an approximation.
    """
    average, network = average.state_dict(), network.state_dict()
    mean = [k for k, v in network.items() if v.is_floating_point() and not k.endswith(("._u", "._v"))]
    rest = [k for k in network if k not in mean]
    return [([average[k] for k in keys], [network[k] for k in keys]) for keys in (mean, rest)]


def main(argv=None):
    args = parse_settings(argv)
    device = pick_device(args.device)
    amp = use_bf16(args.amp, device)
    run_dir = Path(args.run_dir)
    train = datasets.load(args.dataset, args.data_dir, "train", args.image_size, args.rho)  # the same images for each --seed
    K, B = len(train.classes), args.batch_size
    # A setting like others: a run does not go on with a folder that has changed.
    args.training_data = train.fingerprint
    checkpoint_file, log_file = run_dir / "checkpoint.pt", run_dir / "log.jsonl"
    state = load_checkpoint(checkpoint_file, "cpu") if checkpoint_file.exists() else None
    if state:  # the run that this directory holds goes on
        check_same_run(args, state["settings"], run_dir)
    elif args.eval_only:
        fail(f"--eval-only: there is no checkpoint in {run_dir}")

    if K < 2:
        fail(f"{args.dataset} has one class; a conditional GAN needs two")
    if args.eval_images:
        datasets.load(args.dataset, args.data_dir, args.reference, args.image_size, args.rho)  # missing? now, not in the end

    # y_hat: what D is told of each training image, (N, K). A mirrored image keeps its label (A).
    p = stored_soft_labels(args, train, run_dir, device) if args.labels in ("soft", "ols") else None
    y_hat = label_augmentation(args.labels, train.labels, K, p, args.smoothing)
    labels_hash = hashlib.sha256(y_hat.numpy().tobytes()).hexdigest()
    if state and state["labels_hash"] != labels_hash:
        fail(f"{run_dir} holds a run with other labels; choose another --run-dir")
    order = torch.from_numpy(datasets.head_to_tail(train.counts))
    grid_rows = order[torch.linspace(0, K - 1, min(K, GRID_ROWS)).round().long()]
    facts, counted = {}, [None] * K  # what mixup and cotrain make of the labels is settled in the loop
    if args.labels not in ("mixup", "cotrain"):
        facts, counted = describe_labels(y_hat, train.labels), borrowed(y_hat).tolist()
    if args.labels in ("soft", "smooth", "ols"):
        print(f"labels {args.labels}: mean of the largest probability {facts['max_probability']:.3f}, entropy "
              f"{facts['entropy']:.3f}; images that count for a class: {min(counted)} to {max(counted)}, "
              f"ratio {max(counted) / max(1, min(counted)):.1f}; its own: {int(train.counts.min())} to "
              f"{int(train.counts.max())}, ratio {train.counts.max() / train.counts.min():.1f}", flush=True)
    if args.labels in ("soft", "ols"):
        warn_of_collapse(facts, K)
        lost = [name for name, mass, n_c in zip(train.classes, y_hat.sum(0), train.counts, strict=True) if mass < n_c / 4]
        if lost:  # CHOICE: a quarter
            print(f"warning: the classifier gives {', '.join(lost)} less than a quarter of the probability that their images "
                  "would have: D hears little of them", file=sys.stderr, flush=True)
        draw_borrowed(run_dir / "samples" / "borrowed.png", train, y_hat, grid_rows)

    # Generator, its moving average, which samples, and discriminator.
    torch.manual_seed(args.seed)
    # channels_last: how convolutions are fastest in bfloat16.
    G, D = (network(args.image_size, width, K).to(device, memory_format=torch.channels_last)
            for network, width in ((Generator, args.width), (Discriminator, args.discriminator_width)))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    (means, values), (copies, originals) = state_pairs(ema, G)
    adam = dict(betas=(0.0, 0.999), eps=1e-8 if args.image_size <= 32 else 1e-6, fused=device.type in ("cuda", "cpu"))  # A
    optimizer_G, optimizer_D = (torch.optim.Adam(n.parameters(), lr, **adam) for n, lr in ((G, args.lr), (D, args.lr_d)))
    batches = datasets.Batches(train, B * args.d_steps, args.oversample or "data", args.flip, device, args.seed, y_hat)
    modules = {"G": G, "D": D, "ema": ema, "optimizer_G": optimizer_G, "optimizer_D": optimizer_D, "batches": batches}
    if args.labels == "cotrain":
        C, optimizer_C = build_soft_classifier(args.dataset, K, args.image_size, device)
        modules |= {"C": C, "optimizer_C": optimizer_C}
    sums, logged = torch.zeros(len(LOSSES), device=device), 0  # losses since the last line of the log; how many
    start = 0
    if state:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        start, sums, logged = state["step"], state["sums"].to(device), state["logged"]
    del state  # a second copy of everything
    parameters = [sum(w.numel() for w in network.parameters()) for network in (G, D)]
    print(f"BigGAN, labels {args.labels}, DiffAugment {args.diffaug or 'off'}, on {args.dataset}: {len(train.labels)} images "
          f"of {K} classes, {int(train.counts.max())} to {int(train.counts.min())} a class; {parameters[0]:,} + "
          f"{parameters[1]:,} parameters; {device}{', bf16' if amp else ''}; {run_dir}"
          f"{f'; resumed at step {start}' if start else ''}", flush=True)

    net_G, net_D = (torch.compile(n) if args.compile else n for n in (G, D))
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=amp)  # noqa: E731
    d_z = latent_size(args.image_size)

    def fake_inputs():
        """z and y^f, one-hot, each class equally likely; from the CPU, the same on each device."""
        z, y = torch.randn(B, d_z), F.one_hot(torch.randint(K, (B,)), K).float()
        return z.to(device), y.to(device)

    def check_finite(step, tensors):
        if not all(x.isfinite().all() for x in tensors):
            kept = f"the last good checkpoint, {checkpoint_file}, is kept" if checkpoint_file.exists() else "nothing was saved"
            fail(f"a loss or weight became NaN or infinite shortly before step {step}; {kept}; a new run may need a lower --lr")

    def save_checkpoint(step):
        check_finite(step, [sums, *G.parameters(), *D.parameters()])
        state = {name: module.state_dict() for name, module in modules.items()}
        state |= dict(step=step, settings=vars(args), sums=sums, logged=logged, labels_hash=labels_hash,
                      rng=torch.get_rng_state())
        with atomic_write(checkpoint_file) as file:
            torch.save(state, file)

    def draw_grid(step):
        """One row a class from head to tail; the noise of a column is the same in each row and each grid."""
        z = latents(GRID_COLUMNS, d_z, GRID, args.seed).repeat(len(grid_rows), 1)
        images = generate(ema, z, grid_rows.repeat_interleave(GRID_COLUMNS), K, amp)
        write_grid(run_dir / "samples" / f"step-{step:07d}.png", images, GRID_COLUMNS)

    # SIGINT (Ctrl-C) and SIGTERM finish the step, save and stop; a second one stops at once.
    stop = []

    def ask_to_stop(number=None, _frame=None):
        stop.extend([number] if number else [])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if start < args.steps and not args.eval_only:
        trim_log(log_file, start)
        with atomic_write(run_dir / "config.json") as file:
            config = {"settings": vars(args), **environment(device), "bf16": amp, "parameters": parameters,
                      "labels": facts | {"images_that_count": dict(zip(train.classes, counted, strict=True))}}
            file.write(json.dumps(config, indent=2).encode())
        signal.signal(signal.SIGINT, ask_to_stop)
        signal.signal(signal.SIGTERM, ask_to_stop)
        began = last = time.monotonic()
        last_step = start
        with open(log_file, "a") as log, tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True) as bar:
            for step in range(start, args.steps):
                x_all, y_all = next(batches)  # real images for all steps of D, and what D is told of them
                if args.labels == "mixup":  # one lambda for all of them: A
                    lam = torch.distributions.Beta(MIXUP, MIXUP).sample().item()
                    x_all, y_all = mixup(x_all, y_all, lam, torch.randperm(len(x_all)).to(device))

                # Discriminator, --d-steps times. Real and fake images in one pass.
                for x, y in zip(x_all.split(B), y_all.split(B), strict=True):
                    L_C = torch.zeros((), device=device)
                    if args.labels == "cotrain":  # CHOICE (S has one sentence on it): labels from C's own pass
                        with autocast():
                            logits = C(x).float()
                        L_C = entropy_rewarded_loss(logits, y.argmax(1))
                        optimizer_C.zero_grad()
                        L_C.backward()
                        optimizer_C.step()
                        y = logits.detach().softmax(1)
                    z, y_fake = fake_inputs()
                    with autocast():
                        with torch.no_grad():
                            fake = net_G(z, y_fake)
                        scores = net_D(diffaugment(torch.cat([x, fake]), args.diffaug), torch.cat([y, y_fake]))
                    D_real, D_fake = scores.chunk(2)
                    L_D = discriminator_loss(D_real, D_fake)  # Eq. 3
                    optimizer_D.zero_grad()
                    L_D.backward()
                    optimizer_D.step()

                # Generator, on one-hot labels always.
                D.requires_grad_(False)  # its gradients would be computed and thrown away
                z, y_fake = fake_inputs()
                with autocast():
                    L_G = generator_loss(net_D(diffaugment(net_G(z, y_fake), args.diffaug), y_fake))  # Eq. 2
                D.requires_grad_(True)
                optimizer_G.zero_grad()
                L_G.backward()
                optimizer_G.step()

                done = step + 1
                if done <= args.ema_start:
                    torch._foreach_copy_(means, values)
                else:  # average <- average + (1 - decay) (value - average), one call for all tensors
                    torch._foreach_lerp_(means, values, 1 - args.ema)
                torch._foreach_copy_(copies, originals)

                sums += torch.stack([L_D, L_G, L_C, D_real.mean(), D_fake.mean()]).detach()
                logged += 1
                bar.update()
                if done % LOG_EVERY == 0 or done == args.steps:
                    check_finite(done, [sums])
                    row = dict(zip(LOSSES, (sums / logged).tolist(), strict=True))
                    bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in row.items() if v), refresh=False)
                    rate = (done - last_step) / (time.monotonic() - last)
                    images = done * B * args.d_steps
                    log.write(json.dumps({"step": done, **row, "images": images, "steps_per_second": round(rate, 3)}) + "\n")
                    log.flush()
                    last, last_step = time.monotonic(), done
                    sums.zero_()
                    logged = 0
                if args.sample_every and (done % args.sample_every == 0 or done == args.steps):
                    draw_grid(done)
                stopping = bool(stop)  # a signal that comes after this line is for the next step
                if stopping or done % args.save_every == 0 or done == args.steps:
                    save_checkpoint(done)
                if stopping:
                    bar.close()
                    print(f"stopped by signal {stop[0]} at step {done}; the same command goes on from {checkpoint_file}")
                    sys.exit(128 + stop[0])
        ask_to_stop()  # everything is saved: from here on a signal stops at once
        print(f"trained in {time.monotonic() - began:.0f} s", flush=True)
        start = args.steps

    if args.eval_images:
        import metrics  # here: SciPy takes a second to import, and training need not wait for it

        where = run_dir / f"sample-seed-{args.sample_seed}" if args.sample_seed else run_dir
        y = (torch.arange(args.eval_images) % K).sort().values
        images = generate(ema, latents(len(y), d_z, FINAL, args.sample_seed), y, K, amp)
        print(f"{len(y)} samples of step {start}", flush=True)
        with atomic_write(where / "samples.npz") as file:
            np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), labels=y.numpy())
        try:
            result = metrics.evaluate(images, y, args.dataset, args.data_dir, args.features, args.reference, args.rho,
                                      args.image_size, device=device, scores=args.scores)
        except InputError as error:  # most often: no weights for the features, and no network to get them
            print(f"{where / 'samples.npz'} is written but not scored: {error}. Then the same command goes on from here.")
            return
        result["protocol"] |= {"step": start, "sample_seed": args.sample_seed}
        result["per_class"] = [row | {"images_that_count": n}
                               for row, n in zip(result["per_class"], counted, strict=True)]
        metrics.write_scores(result, where)
        print(metrics.format_table(result))


if __name__ == "__main__":
    run_command(main)
