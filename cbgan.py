"""CBGAN: Class Balancing GAN with a Classifier in the Loop (Rangwani, Mopuri, Babu; UAI 2021, arXiv:2106.09402), in one file.

A GAN that learns from long-tailed images paints the classes as unevenly as it saw them. In CBGAN generator and discriminator
know no classes at all; beside them stands a frozen classifier, trained beforehand on the same long-tailed data, that looks at
each batch of fakes. What it sees is counted over cycles of 2000 steps and averaged (Eqs 5 and 6), and a term in the
generator's loss (Eq. 7) asks for batches spread over all classes, the more for a class the less of it there was.

    python cbgan.py --dataset shapeslt                               # first look: drawn shapes, a CPU, minutes
    python cbgan.py --dataset cifar10lt --rho 100                    # the paper's run (Table 1); also --rho 10 and 1
    python cbgan.py --dataset cifar10lt --reg-weight 0               # its baseline: the same GAN without the regulariser
    python cbgan.py --dataset cifar10lt --conditioning acgan         # baselines with labels; also cgan, pretrained (§4.2)
    python cbgan.py --dataset cifar100lt                             # Table 4, rho 10
    python cbgan.py --dataset folder:LSUN --recipe lsun5             # Table 1; your copy of the images, sorted by class
    python cbgan.py --dataset folder:INAT --recipe inat2019          # Table 4, labels drawn in proportion to 1 / N_k
    python cbgan.py --dataset cifar10 --force-frequency 1000         # Fig. 3: pretend that class 0 is everywhere
    python cbgan.py --dataset cifar10lt --rho 10 --cycle 500         # Fig. 6

`--classifier runs/.../classifier.pt` is a checkpoint of classifier.py (Fig. 5: one trained with another --rho); without it
the one that is needed is trained first. Each command resumes the run that it finds in its run directory: bit for bit on the
CPU with the same number of threads. Cost: COST

P is the paper and C the authors' code (github.com/val-iisc/class-balancing-gan). From C, because P does not say: Adam's eps
1e-6, leaky ReLU of slope 0.1, orthogonal initial weights, the real batch of the D step used again in the G step, averaged
weights (EMA) with the batch statistics averaged too. Where we differ, and why:
  * The learning rate is 2e-4, as in P's text and in all of C; P's Tables 10 and 12 print 2e-3.
  * P's weight of class k is lambda / (K N_k), which has no bound when a class is never generated; C's weights sum to K.
    Ours are C's by default; `--weighting paper` for P's. Both point the same way, see `class_weights`.
  * C starts N_hat at 50 a class and the first count at 512; we start at 1 and 0. C never lets N_hat fall below 1, which at
    iNaturalist's 256 counts a step makes all 1010 classes equal; ours is a floor on the share, 0.001 / K.
  * Images go to the classifier with its own normalisation; C hands it [-1, 1], which is right only if it was trained so.
  * C counts evaluation samples with the same counters, and so loses those of a cycle; only fakes of G steps count here.
  * C's annotator is never loaded, so that the KL it logs is that of the classifier in the loop; ours are two networks.
  * C's discriminator blocks activate the skip connection too (an in-place ReLU); ours take the raw input, as P's references.
  * The weights that came closest in FID are chosen with other noise and other real images than those of the final score; P
    and C choose and score with the same real images.
  * The final batch norm of the residual generator is unconditional, as in C; P says that iNaturalist's are all conditional.
  * bfloat16 where the hardware has it (`--amp off` for float32), fused Adam, real and fake in one pass of D.
Not here: BiT's weights for Table 3 (torchvision has none; classifier.py fine-tunes a ResNet-50), LSUN's and iNaturalist's
downloads (folder:PATH takes the images; both classifiers see the GAN's size, where P shows iNaturalist's at 224 pixels).
"""

import argparse
import copy
import hashlib
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
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

import datasets
from classifier import frozen_classifier, load_classifier
from datasets import InputError, atomic_write, environment, fail, pick_device, run_command, use_bf16

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------
# What differs from data set to data set. P: the paper; T: its tables, all in the appendix but 1 to 4. C: the authors' code.
CIFAR10LT = dict(
    rho=100, image_size=32, flip=False,  # P §4; C
    architecture="sndcgan", width=64, slope=0.1, generator_spectral_norm=False, discriminator_width=64,  # T6, T7; slope: C
    reg_weight={100: 10.0, 10: 7.5, 1: 5.0},  # lambda by rho, T5
    alpha=0.5, beta=1.0, cycle=2_000,  # P §3.1, T10
    steps=100_000, batch_size=256, lr=2e-4, beta1=0.5, beta2=0.999,  # P §4, T10
    ema=0.9999, ema_start=20_000,  # T10
    monitor_every=2_000, monitor_images=10_000,  # P, appendix 6.4
    eval_images=50_000, reference="test",  # P §4
    sample_every=2_000, save_every=1_000,
)
# T12. P's text gives beta1 0 (LSUN's) by reference, its table 0.5. CHOICE: the table. Other rho than 10: the same lambda.
CIFAR100LT = CIFAR10LT | dict(rho=10, architecture="snresgan", reg_weight={10: 0.5})
# T5 says 20, 7.5 and 5, with weights as in --weighting paper; C's, with weights that sum to K, are:
LSUN5 = CIFAR10LT | dict(rho=None, image_size=64, architecture="snresgan", beta1=0.0, reg_weight={100: 10.0, 10: 7.5, 1: 2.5},
                         reference="reference")
INAT2019 = LSUN5 | dict(conditioning="inverse", reg_weight={1: 0.5}, alpha=0.005, beta=0.005, cycle=1, steps=200_000,
                        generator_spectral_norm=True)  # T12, appendix 6.5.2
DATASETS = {
    "cifar10lt": CIFAR10LT,
    "cifar10": CIFAR10LT | dict(rho=None, reg_weight={1: 5.0}),
    "cifar100lt": CIFAR100LT,
    "cifar100": CIFAR100LT | dict(rho=None),
    "lsun5": LSUN5,
    "inat2019": INAT2019,
    # Ours: sized for two CPU cores and a few minutes.
    "shapeslt": CIFAR10LT | dict(
        image_size=16, flip=True, width=32, discriminator_width=64, reg_weight={1: 2.0}, cycle=100, steps=3_000,
        batch_size=32, lr=1e-3, beta1=0.0, beta2=0.99, ema=0.995, ema_start=100, monitor_every=500, monitor_images=0,
        eval_images=10_000, reference="reference", sample_every=500, save_every=500),
}
DATASETS["shapes"] = DATASETS["shapeslt"] | dict(rho=None)

# How labels come in. The first is the method of the paper; LABELLED are its baselines.
#   none        no labels at all                                     uniform   G is given random labels, D none (Table 4)
#   inverse     the same, drawn in proportion to 1 / N_k (iNaturalist)
#   acgan       G with conditional batch norm, a class head in D     cgan      the same G, a projection in D
#   pretrained  the same G, D none; the classifier in the loop in the place of ACGAN's class head (§4.2)
LABELLED = ("acgan", "cgan", "pretrained")

# May differ between two commands on one run directory: they do not define the experiment.
FREE = {"data_dir", "run_dir", "device", "compile", "steps", "sample_every", "save_every", "eval_images", "eval_only",
        "features", "reference", "annotator", "sample_seed", "weights"}


def parse_settings(argv=None):
    """The command line as a namespace; what is not given comes from the table of the data set."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.error = fail
    which.add_argument("--dataset", default="cifar10lt")
    which.add_argument("--recipe", choices=DATASETS)
    which.add_argument("--rho", type=float)
    which.add_argument("--conditioning")
    first, _ = which.parse_known_args(argv)
    recipe = first.recipe or (first.dataset if first.dataset in DATASETS else "cifar10lt")
    table = dict(conditioning="none", recipe=recipe) | DATASETS[recipe]
    if first.dataset not in datasets.LONG_TAILED:
        table["rho"] = None
    rho = max(1.0, first.rho or table["rho"] or 1.0)
    nearest = min(table["reg_weight"], key=lambda r: abs(math.log(r / rho)))
    table["reg_weight"] = 0.0 if first.conditioning in LABELLED else table["reg_weight"][nearest]

    parser = argparse.ArgumentParser(
        description="Class Balancing GAN. Defaults shown are those of --dataset " + first.dataset,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )
    parser.error = fail
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="cifar10lt", help="a name that datasets.py knows, or folder:PATH")
    group.add_argument("--recipe", choices=DATASETS, help="whose defaults to take, for a folder")
    group.add_argument("--rho", type=float, help="imbalance ratio of a long-tailed set")
    group.add_argument("--data-dir", default="data", help="where prepared data sets lie")
    group.add_argument("--image-size", type=int, help="pixels")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the real images; not in C")
    group = parser.add_argument_group("method")
    group.add_argument("--conditioning", choices=("none", "uniform", "inverse", *LABELLED),
                       help="none: the method; see the top of the settings in the script")
    group.add_argument("--classifier", metavar="PATH", help="the classifier in the loop; default: one trained first")
    group.add_argument("--reg-weight", type=float, help="lambda, Table 5, before its division by K; 0: no regulariser")
    group.add_argument("--weighting", choices=("sum-to-K", "paper"), default="sum-to-K",
                       help="sum-to-K: C, bounded; paper: 1 / N_k, Eq. 7")
    group.add_argument("--alpha", type=float, help="forgetting factor, Eq. 5")
    group.add_argument("--beta", type=float, help="weight of new counts, Eq. 5; changes little, see effective_class_frequency")
    group.add_argument("--cycle", type=int, help="generator steps from one update of N_k to the next")
    group.add_argument("--force-frequency", type=float, metavar="N", help="keep N_hat at N for class 0, 1 for others: Fig. 3")
    group = parser.add_argument_group("network")
    group.add_argument("--architecture", choices=("sndcgan", "snresgan"), help="Tables 6 and 7, or 8 and 9")
    group.add_argument("--width", type=int, help="channels of the generator's last level; snresgan up to 32 pixels: a quarter")
    group.add_argument("--discriminator-width", type=int, help="channels of its first level; snresgan up to 32 pixels: half")
    group.add_argument("--slope", type=float, help="of the leaky ReLUs; P: 0 in Tables 8 and 9, 0.1 elsewhere; C: 0.1")
    group.add_argument("--generator-spectral-norm", action=argparse.BooleanOptionalAction, help="P: for iNaturalist")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help="one of D and one of G each")
    group.add_argument("--batch-size", type=int, help="real images a step, and fakes")
    group.add_argument("--lr", type=float, help="learning rate of both networks")
    group.add_argument("--beta1", type=float, help="of Adam: decay of its average of gradients")
    group.add_argument("--beta2", type=float, help="of Adam: decay of its average of squared gradients")
    group.add_argument("--ema", type=float, help="decay of the averaged generator, which is the one that samples")
    group.add_argument("--ema-start", type=int, help="step until which the averaged generator is the generator")
    group.add_argument("--seed", type=int, default=0, help="of weights, data order, noise and labels")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto takes CUDA, then MPS, then the CPU")
    group.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="bfloat16; auto: where hardware has it")
    group.add_argument("--compile", action="store_true", help="torch.compile: faster steps after a minute or more of waiting")
    group = parser.add_argument_group("run")
    group.add_argument("--run-dir", help="default: runs/cbgan-<dataset>-<what differs>-s<seed>")
    group.add_argument("--sample-every", type=int, help="steps between two sample grids; 0: none")
    group.add_argument("--save-every", type=int, help="steps between two checkpoints")
    group.add_argument("--monitor-every", type=int, help="steps between two measurements of the monitored distance")
    group.add_argument("--monitor-images", type=int, help="samples for it; 0: none, the last weights count as the best")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-images", type=int, help="samples to score at the end; 0: none")
    group.add_argument("--eval-only", action="store_true", help="sample from and score the checkpoint, do not train")
    group.add_argument("--weights", choices=("best", "last"), default="best", help="best by the monitored distance, or last")
    group.add_argument("--sample-seed", type=int, default=0, help="of these samples (P's +- is over three of them)")
    group.add_argument("--annotator", metavar="PATH", help="a classifier trained on balanced data, to count the samples with; "
                       "default: that of --features if it is one, else one trained for it")
    group.add_argument("--features", help="inception, inception-fid or classifier:PATH; default: a classifier of the shapes "
                       "for shapes, inception otherwise")
    group.add_argument("--reference", choices=datasets.SPLITS, help="split to compare samples with")

    parser.set_defaults(**table)
    args = parser.parse_args(argv)
    check_settings(args)
    if args.run_dir is None:
        unnamed = FREE - {"steps"} | {"dataset", "seed"}  # another length gets another directory, unless --run-dir is given
        differs = [f"{k.replace('_', '')}{v}" for k, v in vars(args).items()
                   if k not in unnamed and v != parser.get_default(k)]
        differs = "".join(f"-{d}" for d in differs).replace("/", "_").replace(" ", "")
        args.run_dir = f"runs/cbgan-{args.dataset.replace('/', '_').replace(':', '_')}{differs}-s{args.seed}"
    return args


def check_settings(args):
    """Raises InputError for settings that make no sense, before anything is read or written."""
    below_1 = ("from 0 to below 1", lambda v: 0 <= v < 1)
    rules = dict.fromkeys(("steps", "batch_size", "save_every", "cycle", "monitor_every", "width", "discriminator_width"),
                          ("at least 1", lambda v: v >= 1))
    rules |= dict.fromkeys(("reg_weight", "ema_start", "sample_every", "eval_images", "seed", "sample_seed", "slope"),
                           ("0 or more, and finite", lambda v: 0 <= v < math.inf))
    rules |= dict.fromkeys(("ema", "beta1", "beta2"), below_1)
    rules |= dict.fromkeys(("lr", "beta"), ("a positive number", lambda v: 0 < v < math.inf))
    rules |= {
        "alpha": ("above 0 and at most 1", lambda v: 0 < v <= 1),
        "force_frequency": ("a positive number", lambda v: v is None or 0 < v < math.inf),
        "image_size": ("16, 32, 64, 128 or 256", lambda v: v in (16, 32, 64, 128, 256)),
        "monitor_images": ("0, or at least 2", lambda v: v == 0 or v >= 2),
    }
    for name, (what, holds) in rules.items():
        if not holds(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {what}")
    if args.conditioning == "inverse" and not args.reg_weight:
        fail("--conditioning inverse draws labels by what the regulariser counts; without it (--reg-weight 0) take uniform")
    for name in ("classifier", "annotator"):
        if getattr(args, name) is not None and not Path(getattr(args, name)).is_file():
            fail(f"--{name} {getattr(args, name)}: there is no such file")
    if (args.features or "").startswith("classifier:") and not Path(args.features.removeprefix("classifier:")).is_file():
        fail(f"--features {args.features}: there is no such file")  # now, and not after days of training


# ----------------------------------------------------------------------------------------------------------------------
# The paper's equations
# ----------------------------------------------------------------------------------------------------------------------
# K      number of classes                               N_hat  (K,) effective class frequency, N_hat_k^t
# c      (K,) fakes that C took for each class, a cycle  N      (K,) effective class distribution, sums to 1
# x      (B, 3, H, W) real images, in [-1, 1]            p_hat  (K,) mean over a batch of fakes of softmax(C(G(z)))
# z      (B, 128) noise; y (B,) int64 class              w      (K,) weight of each class in the regulariser
# alpha, beta: forgetting and gain of N_hat; lambda: --reg-weight. P's other lambda, of its propositions, is nu in our tests.
def relativistic_loss(better, worse):
    """Eqs 2 and 3: -E[log sigmoid(better - worse)] of the scores of two batches, (B,) each, paired by their place. Scalar.

    Eq. 2, the discriminator's, is relativistic_loss(D(x), D(G(z))), Eq. 3, the generator's, relativistic_loss(D(G(z)), D(x)).
    Jolicoeur-Martineau 2018: a fake need not look real by itself, only more so than a real image.
    """
    return F.softplus(worse - better).mean()  # softplus(-a) = -log sigmoid(a), without overflow


def effective_class_frequency(N_hat, c, alpha, beta):
    """Eq. 5: N_hat_k^t = (1 - alpha) N_hat_k^(t-1) + beta c_k^(t-1), once a cycle; (K,) float and (K,) counts in, (K,) out.

    P uses beta = 1 or beta = alpha. After Eq. 6 that is almost the same: N_hat from (beta, N_hat^0) is beta times N_hat from
    (1, N_hat^0 / beta), so that beta only weighs the start, which one cycle of 512,000 counts drowns.
    """
    return (1 - alpha) * N_hat + beta * c


def effective_class_distribution(N_hat):
    """Eq. 6: N_k = N_hat_k / sum_j N_hat_j. (K,) in and out."""
    return N_hat / N_hat.sum()


FLOOR = 1e-3  # CHOICE: N_k counts as 0.001 / K at least, so that a class that is never generated has a weight


def class_weights(N, weighting):
    """w (K,) from the effective class distribution N (K,): what stands for 1 / N_k in Eq. 7. All 1 where N is uniform.

    "paper"     w_k = 1 / (K N_k): Eq. 7 with P's lambda divided by K, as its appendix says below Table 5
    "sum-to-K"  w_k = K (1 / N_k) / sum_j (1 / N_j): C. The default: |lambda L_reg| can't exceed lambda K / e
    Their ratio, paper over sum-to-K, is sum_j (1 / N_j) / K^2, arithmetic over harmonic mean of N: the same for each class. So
    the gradient points the same way, only longer, 6.2 times where N is CIFAR10-LT's distribution at rho = 100; it is 1 when the
    method has done its work. The log has it as am_over_hm.
    """
    inverse = 1 / N.clamp(min=FLOOR / len(N))
    return inverse / len(N) if weighting == "paper" else inverse / inverse.mean()


def class_balancing_regulariser(p_hat, w):
    """Eq. 7: L_reg = sum_k w_k p_hat_k log p_hat_k. Scalar, from -sum(w) / e to 0; 0 log 0 = 0.

    p_hat (K,) is the mean of the batch's class probabilities, so the entropy is that of the batch: images may each be of one
    class for certain, as long as they are not all of the same. With w = 1 the minimum, -log K, is at the uniform p_hat;
    else classes with a small N_k (large w_k) get more than their share. The bound of Proposition 1 needs K >= 3: with two
    classes the minimum favours the frequent one.
    """
    return (w * p_hat * p_hat.clamp(min=1e-8).log()).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------
# All start from 4 x 4 pixels and double. Parameters at the paper's sizes, generator / discriminator:
#   sndcgan  32 pixels: 3,812,355 / 2,928,193        snresgan  32: 4,276,739 / 1,053,825     64: 12,220,675 / 19,542,721
LATENT = 128


class Norm(nn.Module):
    """Batch normalisation of (B, C, H, W); if there are classes, with a scale and a shift for each (conditional batch norm).

    (1 + gain_y) x + shift_y, de Vries et al. 2017; both tables start orthogonal, not zero, as in C.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        labelled = num_classes is not None
        self.norm = nn.BatchNorm2d(channels, eps=1e-4 if labelled else 1e-5, affine=not labelled)  # eps: C
        self.gain, self.shift = (nn.Embedding(num_classes, channels) if labelled else None for _ in range(2))

    def forward(self, x, y):
        x = self.norm(x)
        return x if y is None else x * (1 + self.gain(y)[:, :, None, None]) + self.shift(y)[:, :, None, None]


def initialise(network, normalise):
    """Orthogonal weights, zero biases (C); then spectral norm on all layers with a weight matrix, if `normalise`.

    Miyato et al. 2018: W / sigma(W), sigma by one step of the power method in each forward pass in training mode.
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if normalise:
                spectral_norm(module, eps=1e-6)


class DCGenerator(nn.Module):
    """SNDCGAN, Table 6. z (B, 128), y (B,) or None -> (B, 3, H, W) float32 in [-1, 1]."""

    def __init__(self, image_size, width, slope, num_classes):
        super().__init__()
        levels, self.slope = int(math.log2(image_size // 4)), slope
        widths = [width * 2**i for i in reversed(range(levels + 1))]  # 512, 256, 128, 64 at 32 pixels
        self.first = nn.Linear(LATENT, widths[0] * 4 * 4)
        self.up = nn.ModuleList([nn.ConvTranspose2d(a, b, 4, 2, padding=1) for a, b in zip(widths, widths[1:], strict=False)])
        self.norm = nn.ModuleList([Norm(b, num_classes) for b in widths[1:]])
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z, y=None):
        h = self.first(z).view(len(z), -1, 4, 4)
        for up, norm in zip(self.up, self.norm, strict=True):
            h = F.leaky_relu(norm(up(h), y), self.slope)
        return self.last(h).tanh().float()


class GeneratorBlock(nn.Module):
    """(B, in, H, W) -> (B, out, 2H, 2W). Skip: 1 x 1 convolution of the block's raw input."""

    def __init__(self, width_in, width_out, slope, num_classes):
        super().__init__()
        self.slope = slope
        self.norm1, self.conv1 = Norm(width_in, num_classes), nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2, self.conv2 = Norm(width_out, num_classes), nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x, y):
        h = F.interpolate(F.leaky_relu(self.norm1(x, y), self.slope), scale_factor=2)
        h = self.conv2(F.leaky_relu(self.norm2(self.conv1(h), y), self.slope))
        return h + F.interpolate(self.skip(x), scale_factor=2)


class ResGenerator(nn.Module):
    """SNResGAN. Table 8 at 64 pixels and above; up to 32 the CIFAR network of Miyato et al. 2018, one width throughout."""

    def __init__(self, image_size, width, slope, num_classes):
        super().__init__()
        levels, self.slope = int(math.log2(image_size // 4)), slope
        widths = [width * 2**i for i in reversed(range(levels + 1))] if image_size > 32 else [4 * width] * (levels + 1)
        self.first = nn.Linear(LATENT, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(
            [GeneratorBlock(a, b, slope, num_classes) for a, b in zip(widths, widths[1:], strict=False)])
        self.norm, self.last = nn.BatchNorm2d(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z, y=None):
        h = self.first(z).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, y)
        return self.last(F.leaky_relu(self.norm(h), self.slope)).tanh().float()


def build_generator(args, num_classes):
    """The generator of these settings; it takes labels unless --conditioning is none."""
    network = {"sndcgan": DCGenerator, "snresgan": ResGenerator}[args.architecture]
    generator = network(args.image_size, args.width, args.slope, None if args.conditioning == "none" else num_classes)
    initialise(generator, args.generator_spectral_norm)
    return generator


class DiscriminatorBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), half the height and width if `down`. The skip takes the raw input (C activates it)."""

    def __init__(self, width_in, width_out, slope, first, down):
        super().__init__()
        self.slope, self.first, self.down = slope, first, down
        self.conv1, self.conv2 = nn.Conv2d(width_in, width_out, 3, padding=1), nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if down or width_in != width_out else nn.Identity()

    def forward(self, x):
        h = x if self.first else F.leaky_relu(x, self.slope)  # an image is not activated
        h = self.conv2(F.leaky_relu(self.conv1(h), self.slope))
        if self.down:  # pooling before the 1 x 1 convolution of the skip: the same, at a quarter of the price
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.skip(x)


class Discriminator(nn.Module):
    """x (B, 3, H, W) in [-1, 1], y (B,) for cgan -> scores (B,) without bound, class logits (B, K) for acgan or None.

    Table 7 (sndcgan), Table 9 (snresgan from 64 pixels) or Miyato et al.'s (up to 32). Spectral norm everywhere, no batch norm:
    an image's score does not depend on the others in its batch.
    """

    def __init__(self, args, num_classes):
        super().__init__()
        slope, width, levels = args.slope, args.discriminator_width, int(math.log2(args.image_size // 4))
        widths = [3] + [width * 2**i for i in range(levels + 1)]  # 3, 64, 128, 256, 512 at 32 pixels
        if args.architecture == "sndcgan":
            layers = []
            for a, b in zip(widths[:-1], widths[1:], strict=True):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(slope)]
                layers += [nn.Conv2d(b, b, 4, 2, padding=1), nn.LeakyReLU(slope)] if b != widths[-1] else []
        else:
            downs = levels  # to 4 x 4, then a block that keeps the size
            if args.image_size <= 32:
                widths, downs = [3] + [2 * width] * (levels + 1), levels - 1  # to 8 x 8, then two
            layers = [DiscriminatorBlock(a, b, slope, first=i == 0, down=i < downs)
                      for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))] + [nn.LeakyReLU(slope)]
        self.layers, self.score = nn.Sequential(*layers), nn.Linear(widths[-1], 1)
        self.class_head = nn.Linear(widths[-1], num_classes) if args.conditioning == "acgan" else None
        self.projection = nn.Embedding(num_classes, widths[-1]) if args.conditioning == "cgan" else None
        initialise(self, normalise=True)

    def forward(self, x, y=None):
        h = self.layers(x).sum((2, 3))  # (B, width): sum over the pixels, not mean
        score = self.score(h)[:, 0]
        if self.projection is not None:  # Miyato & Koyama 2018: w h + b + <e_y, h>
            score = score + (self.projection(y) * h).sum(1)
        return score.float(), None if self.class_head is None else self.class_head(h).float()


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------
SAMPLING_BATCH = 500  # images
GRID, MONITOR, FINAL = range(3)  # three kinds of samples; no two share their noise


def latents(n, kind, seed):
    """z (n, 128), standard normal, and a generator to draw what else is needed. From the CPU: the same on each device."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([kind, seed]).generate_state(1)[0]))
    return torch.randn(n, LATENT, generator=generator), generator


def draw_labels(n, N, conditioning, generator=None):
    """y (n,) int64 for a generator that takes labels, None for one that does not. N (K,): effective class distribution.

    Each class equally likely; with "inverse" in proportion to 1 / N_k (P, appendix 6.5.2), so that rare classes come more
    often in the generator's batches.
    """
    if conditioning == "none":
        return None
    probability = class_weights(N, "paper") if conditioning == "inverse" else torch.ones(len(N))
    return torch.multinomial(probability, n, replacement=True, generator=generator)


@torch.no_grad()
def generate(generator, z, y, amp):
    """Images (n, 3, H, W) uint8 on the CPU from z (n, 128) and y (n,) or None; generator: the averaged one, in eval mode."""
    device = next(generator.parameters()).device
    images = []
    for i in range(0, len(z), SAMPLING_BATCH):
        part = slice(i, i + SAMPLING_BATCH)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            x = generator(z[part].to(device), None if y is None else y[part].to(device))
        images.append(((x + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(images)


@torch.no_grad()
def predict(classifier, images):
    """What a classifier sees in images (n, 3, H, W) uint8: classes (n,) int64 and how certain it is (n,), on the CPU."""
    device = next(classifier.parameters()).device
    q = torch.cat([classifier(x.to(device) / 127.5 - 1).softmax(1).cpu() for x in images.split(SAMPLING_BATCH)])
    return q.argmax(1), q.amax(1)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint and resume
# ----------------------------------------------------------------------------------------------------------------------
# same in: cbdm.py, classifier.py
def load_checkpoint(path, device):
    """The dictionary that main() saved. Raises InputError, naming the file, if it is missing or damaged."""
    if not Path(path).is_file():
        fail(f"there is no checkpoint {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)  # weights_only: a checkpoint can't run code
    except Exception as error:  # zip, pickle and file errors alike
        reason = str(error).splitlines()[0]
        raise InputError(f"checkpoint {path} is damaged ({reason}); it is kept, move it away to start afresh") from error


def check_same_run(args, found, run_dir):
    """Raises InputError, naming the flags, if the run in this directory has other settings."""
    now = {k: v for k, v in vars(args).items() if k not in FREE}
    differs = [f"--{k.replace('_', '-')} {found.get(k)} there, {v} now" for k, v in now.items() if found.get(k) != v]
    if differs:
        raise InputError(f"{run_dir} holds a run with other settings ({'; '.join(differs)}); choose another --run-dir")


# same in: cbdm.py, classifier.py
def trim_log(path, step):
    """Drops the lines of a log that a killed run wrote after the checkpoint of this step: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in lines).encode())


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------
LOG_EVERY = 50  # steps
GRID_ROWS, GRID_COLUMNS, GRID_POOL = 10, 10, 500  # classes from head to tail, samples of each, samples to look for them in
LOSSES = ("L_D", "L_G", "L_reg", "L_class")  # Eqs 2, 3 and 7, and ACGAN's in D, as they stand in the log
CERTAIN = 0.9  # Fig. 3 counts samples whose class is more probable than this apart
CLASS_LOSS = {"acgan": 1.0, "pretrained": 0.5}  # weight of the cross-entropy in the generator's loss: C; P, appendix 6.6
SYSTEM = {"acgan": "ACGAN", "cgan": "cGAN", "pretrained": "ACGAN with the pretrained classifier"}


# same in: cbdm.py
def write_grid(path, images, columns):
    """(N, 3, H, W) uint8 as a PNG, row by row; small images are enlarged to about 64 pixels."""
    from PIL import Image
    from torchvision.utils import make_grid  # here: it takes a second to import, and training need not wait for it

    scale = max(1, 64 // images.shape[-1])
    grid = make_grid(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), nrow=columns, padding=scale)
    with atomic_write(path) as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, format="png")


def rows_by_class(images, seen, classes):
    """The first images (n, 3, H, W) that are seen as each of these classes, a row each; white where there are too few."""
    grid = torch.full((len(classes), GRID_COLUMNS, *images.shape[1:]), 255, dtype=torch.uint8)
    for row, k in zip(grid, classes, strict=True):
        found = images[seen == k][:GRID_COLUMNS]
        row[: len(found)] = found
    return grid.flatten(0, 1)


def state_pairs(average, network):
    """The tensors of two like networks, as ((averages, values to average), (copies, values to copy)): lists.

    Averaged are weights and batch statistics; copied the counters and the vectors of spectral norm, because the average of two
    unit vectors is none.
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
    if args.reg_weight and K < 3:
        fail(f"{args.dataset} has {K} classes: the regulariser balances 3 or more (Proposition 1); --reg-weight 0 goes without")

    # C, the classifier in the loop. acgan and cgan do without it; a run without regulariser is only looked at through it.
    C = None
    if args.reg_weight or args.conditioning not in ("acgan", "cgan"):
        C = frozen_classifier(args.dataset, args.data_dir, args.classifier, "train", args.image_size, args.rho, device=device)
        right = C.info["test_accuracy"]
        print(f"classifier in the loop: {C.info['path']}, {right['all']:.1%} of the test images right, {right['tail']:.1%} of "
              "the tail third", flush=True)
        if args.reg_weight and right["tail"] < 0.05:
            print("warning: the classifier can hardly tell the tail. Where its performance is 0 there, the paper's \"algorithm "
                  "diverges and is not able to produce meaningful results\" (§4.4)", file=sys.stderr, flush=True)
    classifier_hash = C and hashlib.sha256(Path(C.info["path"]).read_bytes()).hexdigest()

    # Generator, its moving average, which samples, and discriminator.
    torch.manual_seed(args.seed)
    # channels_last: how convolutions are fastest in bfloat16.
    G, D = (n.to(device, memory_format=torch.channels_last) for n in (build_generator(args, K), Discriminator(args, K)))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    (means, values), (copies, originals) = state_pairs(ema, G)
    adam = dict(lr=args.lr, betas=(args.beta1, args.beta2), eps=1e-6, fused=device.type in ("cuda", "cpu"))  # eps: C
    optimizer_G, optimizer_D = torch.optim.Adam(G.parameters(), **adam), torch.optim.Adam(D.parameters(), **adam)
    batches = datasets.Batches(train, B, flip=args.flip, device=device, seed=args.seed)
    modules = {"G": G, "D": D, "ema": ema, "optimizer_G": optimizer_G, "optimizer_D": optimizer_D, "batches": batches}
    # N_hat on the CPU, changed once a cycle; c, the counts of the cycle so far, on the device.
    N_hat, c = torch.ones(K, dtype=torch.float64), torch.zeros(K, dtype=torch.int64, device=device)
    if args.force_frequency:
        N_hat[0] = args.force_frequency
    sums, logged = torch.zeros(len(LOSSES), device=device), 0  # losses since the last line of the log; how many
    best = {"distance": math.inf}  # the averaged generator at the smallest monitored distance
    start = 0

    # Resume the run that this directory holds; or start from nothing.
    checkpoint_file, log_file = run_dir / "checkpoint.pt", run_dir / "log.jsonl"
    if checkpoint_file.exists():
        state = load_checkpoint(checkpoint_file, "cpu")
        check_same_run(args, state["settings"], run_dir)
        if state["classifier"] != classifier_hash:
            fail(f"{run_dir} holds a run with another classifier in its loop than {C.info['path']} is now")
        for name, module in modules.items():
            module.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        start, sums, logged, best = state["step"], state["sums"].to(device), state["logged"], state["best"]
        N_hat, c = state["N_hat"], state["c"].to(device)
        del state  # a second copy of everything
    elif args.eval_only:
        fail(f"--eval-only: there is no checkpoint in {run_dir}")
    parameters = [sum(w.numel() for w in network.parameters()) for network in (G, D)]
    name = SYSTEM.get(args.conditioning, "CBGAN" if args.reg_weight else "GAN")
    print(f"{name} on {args.dataset}: {len(train.labels)} images of {K} classes, {int(train.counts.max())} to "
          f"{int(train.counts.min())} a class; {parameters[0]:,} + {parameters[1]:,} parameters; {device}"
          f"{', bf16' if amp else ''}; {run_dir}" + (f"; resumed at step {start}" if start else ""), flush=True)

    net_G, net_D, net_C = (torch.compile(n) if args.compile and n is not None else n for n in (G, D, C))
    N = effective_class_distribution(N_hat)
    w = class_weights(N, args.weighting).float().to(device)

    def noise():
        """z, and y for the generator. Drawn on the CPU, where N is; the only random numbers of a run beside the batches'."""
        z, y = torch.randn(B, LATENT), draw_labels(B, N, args.conditioning)
        return z.to(device, non_blocking=True), None if y is None else y.to(device, non_blocking=True)

    def check_finite(step):
        if not torch.isfinite(sums).all():
            kept = f"the last good checkpoint, {checkpoint_file}, is kept" if checkpoint_file.exists() else "nothing was saved"
            kind = "NaN" if sums.isnan().any() else "infinite"
            fail(f"a loss became {kind} shortly before step {step}; {kept}; try a lower --lr or --reg-weight")

    def save_checkpoint(step):
        check_finite(step)
        state = {name: module.state_dict() for name, module in modules.items()}
        state |= dict(step=step, settings=vars(args), sums=sums, logged=logged, N_hat=N_hat, c=c, best=best,
                      classifier=classifier_hash, rng=torch.get_rng_state())
        with atomic_write(checkpoint_file) as file:
            torch.save(state, file)

    def draw_grid(step):
        """One row a class from head to tail: of the label that was asked for, or of the class that C sees."""
        order = torch.from_numpy(datasets.head_to_tail(train.counts))
        rows = order[torch.linspace(0, K - 1, min(K, GRID_ROWS)).round().long()]
        if args.conditioning in LABELLED:
            y = rows.repeat_interleave(GRID_COLUMNS)
            images = generate(ema, latents(len(y), GRID, args.seed)[0], y, amp)
        else:
            z, generator = latents(GRID_POOL, GRID, args.seed)
            images = generate(ema, z, draw_labels(GRID_POOL, N, args.conditioning, generator), amp)
            images = rows_by_class(images, predict(C, images)[0], rows)
        write_grid(run_dir / "samples" / f"step-{step:07d}.png", images, GRID_COLUMNS)

    # The monitored distance chooses the weights: with noise, and against real images, that the final score does not use.
    monitored = None
    if args.monitor_images and start < args.steps and not args.eval_only:
        import metrics  # here: SciPy takes a second to import, and training need not wait for it

        others = "reference" if args.reference == "test" else "test"
        try:
            real = datasets.load(args.dataset, args.data_dir, others, args.image_size, args.rho)
            monitored = metrics.load_reference(real, args.dataset, args.data_dir, args.features, others, args.rho, device)
        except InputError as error:  # most often: no weights for the features, and no network to get them
            print(f"warning: not monitored, the last weights will be scored: {error}", file=sys.stderr, flush=True)

    def monitor():
        """Frechet distance of the averaged generator."""
        network, features = monitored
        z, generator = latents(args.monitor_images, MONITOR, args.seed)
        images = generate(ema, z, draw_labels(len(z), N, args.conditioning, generator), amp)
        return metrics.frechet_distance(features, metrics.extract_features(images, network, device)[0])

    # SIGINT (Ctrl-C) and SIGTERM finish the step, save and stop; a second one stops at once.
    stop = []

    def ask_to_stop(number=None, _frame=None):
        stop.extend([number] if number else [])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if start < args.steps and not args.eval_only:
        trim_log(log_file, start)
        name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
        with atomic_write(run_dir / "config.json") as file:
            config = {"settings": vars(args), **environment(), "device": name, "bf16": amp, "parameters": parameters,
                      "classifier": C and C.info["path"]}
            file.write(json.dumps(config, indent=2).encode())
        signal.signal(signal.SIGINT, ask_to_stop)
        signal.signal(signal.SIGTERM, ask_to_stop)
        began = last = time.monotonic()
        last_step = start
        zero = torch.zeros((), device=device)
        used = args.reg_weight or args.conditioning == "pretrained"  # C in the generator's loss
        with open(log_file, "a") as log, tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True) as bar:
            for step in range(start, args.steps):
                # Discriminator. Real and fake images in one pass.
                x, y = next(batches)
                z, y_fake = noise()
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    with torch.no_grad():
                        fake = net_G(z, y_fake)
                    scores, logits = net_D(torch.cat([x, fake]), None if y_fake is None else torch.cat([y, y_fake]))
                D_real, D_fake = scores.chunk(2)
                L_D = relativistic_loss(D_real, D_fake)  # Eq. 2
                L_class = zero if logits is None else F.cross_entropy(logits[:B], y) + F.cross_entropy(logits[B:], y_fake)
                optimizer_D.zero_grad()
                (L_D + L_class).backward()
                optimizer_D.step()

                # Generator. New noise, the same real images (C), a forward pass of D on them for Eq. 3.
                D.requires_grad_(False)  # its gradients would be computed and thrown away
                z, y_fake = noise()
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    fake = net_G(z, y_fake)
                    D_fake, logits = net_D(fake, y_fake)
                    with torch.no_grad():
                        D_real, _ = net_D(x, y)
                    seen = net_C(fake).float() if used else None  # (B, K) logits of C, in which no gradient ends
                D.requires_grad_(True)
                loss = L_G = relativistic_loss(D_fake, D_real)  # Eq. 3
                L_reg = zero
                if args.reg_weight:
                    L_reg = class_balancing_regulariser(seen.softmax(1).mean(0), w)  # Eq. 7
                    loss = loss + args.reg_weight * L_reg  # Eq. 17
                if args.conditioning in CLASS_LOSS:
                    loss = loss + CLASS_LOSS[args.conditioning] * F.cross_entropy(seen if logits is None else logits, y_fake)
                optimizer_G.zero_grad()
                loss.backward()
                optimizer_G.step()

                done = step + 1
                if done <= args.ema_start:
                    torch._foreach_copy_(means, values)
                else:  # average <- average + (1 - decay) (value - average), one call for all tensors
                    torch._foreach_lerp_(means, values, 1 - args.ema)
                torch._foreach_copy_(copies, originals)

                # Class statistics, from the generator's fakes alone.
                if args.reg_weight and not args.force_frequency:
                    took = seen.argmax(1)
                    c.scatter_add_(0, took, torch.ones_like(took))
                    if done % args.cycle == 0:
                        N_hat = effective_class_frequency(N_hat, c.cpu(), args.alpha, args.beta)  # Eq. 5
                        N = effective_class_distribution(N_hat)  # Eq. 6
                        w = class_weights(N, args.weighting).float().to(device)
                        c.zero_()

                sums += torch.stack([L_D, L_G, L_reg, L_class]).detach()
                logged += 1
                bar.update()
                if done % LOG_EVERY == 0 or done == args.steps:
                    check_finite(done)
                    row = dict(zip(LOSSES, (sums / logged).tolist(), strict=True))
                    bar.set_postfix_str(", ".join(f"{k} {v:.4f}" for k, v in row.items()), refresh=False)
                    rate = (done - last_step) / (time.monotonic() - last)
                    if args.reg_weight:  # how uneven N is: its KL to uniform; the ratio of the two weightings
                        ratio = class_weights(N, "paper").mean()  # that of sum-to-K is 1
                        row |= {"kl_of_N": torch.special.xlogy(N, K * N).sum().item(), "am_over_hm": ratio.item()}
                    log.write(json.dumps({"step": done, **row, "images": done * B, "steps_per_second": round(rate, 3)}) + "\n")
                    log.flush()
                    last, last_step = time.monotonic(), done
                    sums.zero_()
                    logged = 0
                if monitored and (done % args.monitor_every == 0 or done == args.steps):
                    distance = monitor()
                    log.write(json.dumps({"step": done, "monitored_distance": distance, "N": N.tolist()}) + "\n")
                    if distance < best["distance"]:
                        best = {"distance": distance, "step": done, "N": N, "ema": copy.deepcopy(ema.state_dict())}
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
        import metrics

        if args.weights == "best" and "ema" in best:
            ema.load_state_dict(best["ema"])
            start, N = best["step"], best["N"]
        z, generator = latents(args.eval_images, FINAL, args.sample_seed)
        if args.conditioning in LABELLED:
            y = labels = (torch.arange(len(z)) % K).sort().values  # balanced to within one image
        else:
            y, labels = draw_labels(len(z), N, args.conditioning, generator), None
        images = generate(ema, z, y, amp)
        in_loop = None
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({} if labels is None else {"labels": labels.numpy()})
        if C is not None:  # labels for the samples of a generator without: to train a classifier on them (CA in Table 1)
            in_loop, _ = predict(C, images)
            arrays["predicted"] = in_loop.numpy()
        with atomic_write(run_dir / "samples.npz") as file:
            np.savez(file, **arrays)

        # The classes are counted by an annotator: a classifier that learnt from balanced data and was in no loop.
        path = args.annotator or (args.features or "").removeprefix("classifier:")
        if not Path(path).is_file():
            name = args.dataset.removesuffix("lt")  # balanced
            path = frozen_classifier(name, args.data_dir, None, "reference", args.image_size, device=device).info["path"]
        if C is not None and Path(path).samefile(C.info["path"]):
            fail(f"the annotator {path} is the classifier in the loop, which the generator has learnt to please")
        annotator = load_classifier(path, device, train.classes, args.image_size)
        seen, certainty = predict(annotator, images)
        views = {"training": train.labels, "annotator": seen, "certain": seen[certainty > CERTAIN]}
        views |= {} if in_loop is None else {"in_loop": in_loop}
        kl = {f"kl_{name}": metrics.kl_to_uniform(view.numpy(), K) for name, view in views.items() if len(view)}
        shares = [{f"share_{name}": (view == k).double().mean().item() for name, view in views.items()} for k in range(K)]
        rows = datasets.head_to_tail(train.counts)
        print(f"{len(images)} samples of step {start}, shares of the classes as the annotator {path} sees them (right on "
              f"{annotator.info['test_accuracy']['all']:.1%} of the test images)", flush=True)
        bottom = {"KL to uniform": {"share" + name[2:]: value for name, value in kl.items()}}
        table = {train.classes[k]: shares[k] for k in rows[:20]} | bottom
        print(*metrics.text_table(table, {f"share_{name}": name for name in views}), sep="\n")
        if labels is None:
            grid = rows_by_class(images, seen, rows[:: math.ceil(K / GRID_ROWS)])
            write_grid(run_dir / "samples" / "final.png", grid, GRID_COLUMNS)
        try:
            result = metrics.evaluate(images, labels, args.dataset, args.data_dir, args.features, args.reference, args.rho,
                                      args.image_size, device=device, seen=seen)
        except InputError as error:  # most often: no weights for the features, and no network to get them
            print(f"{run_dir / 'samples.npz'} is written but not scored: {error}. Then the same command goes on from here.")
            return
        result["protocol"] |= {"step": start, "weights": args.weights, "sample_seed": args.sample_seed, "annotator": str(path)}
        result["all"] |= kl
        result["per_class"] = [row | share for row, share in zip(result["per_class"], shares, strict=True)]
        metrics.write_scores(result, run_dir)
        print(metrics.format_table(result))


if __name__ == "__main__":
    run_command(main)
