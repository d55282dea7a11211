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
    python cbgan.py --dataset cifar10 --force-frequency 1000         # Fig. 3: class 0 counts as frequent; G makes less of it

`--classifier runs/.../classifier.pt` is a checkpoint of classifier.py (Fig. 5: trained with another --rho; iNaturalist: with
--loss ce); without it the one that is needed is trained first. The README has a command for each row of each table. Each
command resumes the run that it finds in its run directory: bit for bit on the CPU with the same number of threads.
Cost, on two cores of an AMD EPYC: shapeslt 5 minutes 44 seconds, classifiers, training (4:30) and scores; cifar10lt 0.67 s a
step of 64 images, never run in full.
To aim at (P, Table 1, CIFAR-10, rho 100): FID 36.97 without and 32.93 with the regulariser, KL to uniform 0.31 and 0.06. Its
FIDs are in the features of --features inception-fid, over the 10,000 test images.

P is the paper and A the authors' code (github.com/val-iisc/class-balancing-gan). From A, because P does not say: Adam's eps
1e-6, orthogonal initial weights, the real batch of the D step used again in the G step, batch statistics averaged with the
weights (EMA). Where we differ, and why:
  * The learning rate is 2e-4, as in P's text and in all of A; P's Tables 10 and 12 print 2e-3.
  * Leaky ReLUs of slope 0.1 also in SNResGAN, as in A; P's Tables 8 and 9 print ReLU (--slope 0).
  * P's weight of class k is lambda / (K N_k), which has no bound when a class is never generated; A's weights sum to K.
    Ours are A's; `--weighting paper` for P's. See `class_weights` for what it changes.
  * A starts N_hat at 50 a class and the first count at 512; we start at 1 and 0. A never lets N_hat fall below 1, which at
    iNaturalist's 256 counts a step makes all 1010 classes equal; ours is a floor on the share, 0.001 / K.
  * Images go to the classifier with its own normalisation; A hands it [-1, 1], which is right only if it was trained so.
  * A counts evaluation samples with the same counters, and so loses those of a cycle; only fakes of G steps count here.
  * A's annotator is never loaded, so that the KL it logs is that of the classifier in the loop; we have two networks, and print
    both. P has one for iNaturalist, where no balanced set exists: its KL is our kl_in_loop.
  * A's discriminator blocks activate the skip connection too (an in-place ReLU); ours take the raw input, as P's references.
  * The weights that came closest in FID are chosen with other noise and other real images than those of the final score; P
    and A choose and score with the same real images.
  * The final batch norm of the residual generator is unconditional, as in A; P says that iNaturalist's are all conditional.
  * bfloat16 where the hardware has it (on CUDA, untested, for spectral norm's power method too; `--amp off`: float32), fused
    Adam, real and fake in one pass of D.
Not here: BiT's weights for Table 3 (torchvision has none; classifier.py fine-tunes a ResNet-50), LSUN's and iNaturalist's
downloads (folder:PATH takes the images; the classifiers see the GAN's size, where P shows iNaturalist's at 224 pixels).
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
from classifier import frozen_classifier, load_classifier
from datasets import InputError, atomic_write, environment, fail, pick_device, run_command, use_bf16

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------
# What differs from data set to data set. P: the paper; T: its tables, all in the appendix but 1 to 4. A: the authors' code.
CIFAR10LT = dict(
    conditioning="none", rho=100, image_size=32, flip=False,  # P §4; A
    architecture="sndcgan", width=64, discriminator_width=64, slope=0.1, generator_spectral_norm=False,  # T6, T7; slope: A
    alpha=0.5, beta=1.0, cycle=2_000,  # P §3.1, T10, §4
    steps=100_000, batch_size=256, lr=2e-4, beta1=0.5, beta2=0.999,  # P §4, T10
    ema=0.9999, ema_start=20_000,  # T10
    monitor_every=2_000, monitor_images=10_000,  # P, appendix 6.4
    eval_images=50_000, reference="test",  # P §4
    sample_every=2_000, save_every=1_000,
)
LSUN5 = CIFAR10LT | dict(image_size=64, architecture="snresgan", beta1=0.0)  # T8, T9, P §4
RECIPES = {
    "cifar10lt": CIFAR10LT,
    # T12; P's text gives beta1 0 (LSUN's) by reference. CHOICE (where P and A leave two values open): the table's.
    "cifar100lt": CIFAR10LT | dict(rho=10, architecture="snresgan"),
    "lsun5": LSUN5,
    # T12, appendix 6.5.2
    "inat2019": LSUN5 | dict(
        conditioning="inverse", alpha=0.005, beta=0.005, cycle=1, steps=200_000, generator_spectral_norm=True),
    # Ours: the paper's networks, one level less, the generator narrowed, for two CPU cores and a few minutes.
    "shapeslt": CIFAR10LT | dict(
        image_size=16, flip=True, width=32, discriminator_width=64, cycle=100, steps=3_000, batch_size=32, lr=1e-3, beta1=0.0,
        beta2=0.99, ema=0.995, ema_start=100, monitor_images=0, eval_images=10_000, reference="reference", sample_every=500,
        save_every=500),
}
# lambda by the imbalance of the data; the nearest counts. T5; T12. For LSUN A's, whose weights sum to K; with --weighting paper
# give T5's: --reg-weight 20, 7.5 or 5. CHOICE for Fig. 3, where P has none: that of balanced CIFAR-10, 5.
LAMBDA = {"cifar10lt": {100: 10.0, 10: 7.5, 1: 5.0}, "cifar100lt": {10: 0.5}, "lsun5": {100: 10.0, 10: 7.5, 1: 2.5},
          "inat2019": {1: 0.5}, "shapeslt": {1: 2.0}}  # fmt: skip

# How labels come in. The first is the method of the paper; LABELLED are its baselines.
#   none        no labels at all
#   inverse     G is given random labels, drawn in proportion to 1 / N_k, D none (iNaturalist)
#   uniform     the same, each class equally likely: the ablation of 6.5.2 (FID 11.58); with --reg-weight 0 Table 4's SNResGAN
#   acgan       G with conditional batch norm, a class head in D     cgan      the same G, a projection in D
#   pretrained  the same G, D none; the classifier in the loop in the place of ACGAN's class head (§4.2)
LABELLED = ("acgan", "cgan", "pretrained")

# May differ between two commands on one run directory: they do not define the experiment.
FREE = {"data_dir", "run_dir", "device", "compile", "steps", "sample_every", "save_every", "eval_images", "eval_only",
        "features", "reference", "scores", "annotator", "sample_seed", "weights",
        "classifier"}  # its content is compared


def parse_settings(argv=None):
    """The command line as a namespace; what is not given comes from the table of the data set."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.error = fail
    which.add_argument("--dataset", default="cifar10lt")
    which.add_argument("--recipe", choices=RECIPES)
    first, _ = which.parse_known_args(argv)
    of_name = [r for r in RECIPES if first.dataset.startswith(r.removesuffix("lt"))]  # cifar10, cifar10imb: cifar10lt
    recipe = first.recipe or max(of_name, key=len, default="cifar10lt")
    table = RECIPES[recipe] | dict(recipe=recipe)
    if first.dataset not in datasets.LONG_TAILED:
        table["rho"] = None
    if first.dataset.startswith("folder:"):
        table["reference"] = "reference"  # a folder may do without a test split

    parser = argparse.ArgumentParser(
        description="Class Balancing GAN. Defaults shown are those of --dataset " + first.dataset,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )
    parser.error = fail
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="cifar10lt", help="a name that datasets.py knows, or folder:PATH")
    group.add_argument("--recipe", choices=RECIPES, help="whose defaults to take, for a folder")
    group.add_argument("--rho", type=float, help="imbalance ratio of a long-tailed set")
    group.add_argument("--data-dir", default="data", help="where prepared data sets lie")
    group.add_argument("--image-size", type=int, help="pixels")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the real images; not in A")
    group = parser.add_argument_group("method")
    group.add_argument("--conditioning", choices=("none", "uniform", "inverse", *LABELLED),
                       help="none: the method; see the top of the settings in the script")
    group.add_argument("--classifier", metavar="PATH", help="the classifier in the loop; default: one trained first")
    group.add_argument("--reg-weight", type=float, metavar="LAMBDA",
                       help="default: by the imbalance of the data, see LAMBDA in the script; 0 for acgan, cgan, pretrained")
    group.add_argument("--weighting", choices=("sum-to-K", "paper"), default="sum-to-K",
                       help="sum-to-K: A, bounded; paper: 1 / N_k, Eq. 7")
    group.add_argument("--alpha", type=float, help="forgetting factor, Eq. 5")
    group.add_argument("--beta", type=float, help="weight of new counts, Eq. 5; see effective_class_frequency")
    group.add_argument("--cycle", type=int, help="generator steps from one update of N_k to the next")
    group.add_argument("--force-frequency", type=float, metavar="N", help="keep N_hat at N for class 0, 1 for others: Fig. 3")
    group = parser.add_argument_group("network")
    group.add_argument("--architecture", choices=("sndcgan", "snresgan"), help="Tables 6 and 7, or 8 and 9")
    group.add_argument("--width", type=int, help="channels of the generator's last level; snresgan up to 32 pixels: a quarter")
    group.add_argument("--discriminator-width", type=int, help="channels of its first level; snresgan up to 32 pixels: half")
    group.add_argument("--slope", type=float, help="of the leaky ReLUs; A: 0.1; P: 0 in Tables 8 and 9")
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
    group.add_argument("--sample-seed", type=int, default=0, help="other ones for P's +-, in a directory of their own")
    group.add_argument("--annotator", metavar="PATH", help="a classifier trained on balanced data, to count the samples with; "
                       "default: that of --features if it is one, else one trained for it")
    group.add_argument("--features", help="inception, inception-fid (P's FID) or classifier:PATH; default: a classifier of the "
                       "shapes for shapes, inception otherwise")
    group.add_argument("--scores", default="fid,is", help="of the final samples: names that metrics.py knows, or all")
    group.add_argument("--reference", choices=datasets.SPLITS, help="split to compare samples with")

    parser.set_defaults(**table)
    args = parser.parse_args(argv)
    check_settings(args)
    if args.run_dir is None:
        unnamed = FREE - {"steps"} | {"dataset", "seed"}  # another length gets another directory, unless --run-dir is given
        differs = [f"{k.replace('_', '')}{v}" for k, v in vars(args).items()
                   if k not in unnamed and (v != parser.get_default(k) or (k == "recipe" and first.recipe))]
        differs = "".join(f"-{d}" for d in differs).replace("/", "_").replace(" ", "")
        args.run_dir = f"runs/cbgan-{args.dataset.replace('/', '_').replace(':', '_')}{differs}-s{args.seed}"
    return args


def check_settings(args):
    """Raises InputError for settings that make no sense, before anything is read or written."""
    below_1 = ("from 0 to below 1", lambda v: 0 <= v < 1)
    rules = dict.fromkeys(("steps", "batch_size", "save_every", "cycle", "monitor_every", "width", "discriminator_width"),
                          ("at least 1", lambda v: v >= 1))
    rules |= dict.fromkeys(("ema_start", "sample_every", "eval_images", "seed", "sample_seed", "slope"),
                           ("0 or more, and finite", lambda v: 0 <= v < math.inf))
    rules |= dict.fromkeys(("ema", "beta1", "beta2"), below_1)
    rules |= dict.fromkeys(("lr", "beta"), ("a positive number", lambda v: 0 < v < math.inf))
    rules |= {
        "reg_weight": ("0 or more, and finite", lambda v: v is None or 0 <= v < math.inf),
        "alpha": ("above 0 and at most 1", lambda v: 0 < v <= 1),
        "force_frequency": ("a positive number", lambda v: v is None or 0 < v < math.inf),
        "image_size": ("16, 32, 64, 128 or 256", lambda v: v in (16, 32, 64, 128, 256)),
        "features": ("inception, inception-fid or classifier:PATH",
                     lambda v: v in (None, "inception", "inception-fid") or v.startswith("classifier:")),
        "monitor_images": ("0, or at least 2", lambda v: v == 0 or v >= 2),
    }
    for name, (what, holds) in rules.items():
        if not holds(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {what}")
    if args.conditioning == "inverse" and args.reg_weight == 0:
        fail("--conditioning inverse draws labels by what the regulariser counts; without it (--reg-weight 0) take uniform")
    for name in ("classifier", "annotator"):
        if getattr(args, name) is not None and not Path(getattr(args, name)).is_file():
            fail(f"--{name} {getattr(args, name)}: there is no such file")
    if (args.features or "").startswith("classifier:") and not Path(args.features.removeprefix("classifier:")).is_file():
        fail(f"--features {args.features}: there is no such file")  # now, and not after days of training
    if args.scores != "fid,is":  # the default needs no check, and the module a second
        import metrics

        metrics.chosen_scores(args.scores)


# ----------------------------------------------------------------------------------------------------------------------
# The paper's equations
# ----------------------------------------------------------------------------------------------------------------------
# K      number of classes                               N_hat  (K,) effective class frequency, N_hat_k^t
# c      (K,) fakes that C took for each class, a cycle  N      (K,) effective class distribution, sums to 1
# x      (B, 3, H, W) real images, in [-1, 1]            p_hat  (K,) mean over a batch of fakes of softmax(C(G(z)))
# z      (B, 128) noise; y (B,) int64 class              w      (K,) weight of each class in the regulariser
# alpha, beta: forgetting and gain of N_hat; lambda: --reg-weight (P has another lambda, a multiplier, in its propositions)
def relativistic_loss(better, worse):
    """Eqs 2 and 3: -E[log sigmoid(better - worse)] of the scores of two batches, (B,) each, paired by their place. Scalar.

    Eq. 2, the discriminator's, is relativistic_loss(D(x), D(G(z))), Eq. 3, the generator's, relativistic_loss(D(G(z)), D(x)).
    Jolicoeur-Martineau 2018: a fake need not look real by itself, only more so than a real image.
    """
    return F.softplus(worse - better).mean()  # softplus(-a) = -log sigmoid(a), without overflow


def effective_class_frequency(N_hat, c, alpha, beta):
    """Eq. 5: N_hat_k^t = (1 - alpha) N_hat_k^(t-1) + beta c_k^(t-1), once a cycle; (K,) float and (K,) counts in, (K,) out.

    P uses beta = 1 or beta = alpha. After Eq. 6 that is almost the same: N_hat from (beta, N_hat^0) is beta times N_hat from
    (1, N_hat^0 / beta): beta only weighs the start, which one cycle of 512,000 counts drowns (iNaturalist's take hundreds).
    """
    return (1 - alpha) * N_hat + beta * c


def effective_class_distribution(N_hat):
    """Eq. 6: N_k = N_hat_k / sum_j N_hat_j. (K,) in and out."""
    return N_hat / N_hat.sum()


FLOOR = 1e-3  # CHOICE: N_k counts as 0.001 / K at least, so that a class that is never generated has a weight


def class_weights(N, weighting):
    """w (K,) from the effective class distribution N (K,): what stands for 1 / N_k in Eq. 7. All 1 where N is uniform.

    "paper"     w_k = 1 / (K N_k): Eq. 7 with P's lambda divided by K, as its appendix says below Table 5
    "sum-to-K"  w_k = K (1 / N_k) / sum_j (1 / N_j): A. The default: |lambda L_reg| can't exceed lambda K / e
    Their ratio, paper over sum-to-K, is sum_j (1 / N_j) / K^2, arithmetic over harmonic mean of N: the same for each class. The
    gradient of L_reg points the same way, only P's is longer, 6.2 times where N is CIFAR10-LT's distribution at rho = 100, and
    weighs that much more against L_G; when the method has done its work the ratio is 1. The log has it as am_over_hm.
    """
    inverse = 1 / N.clamp(min=FLOOR / len(N))
    return inverse / len(N) if weighting == "paper" else inverse / inverse.mean()


def class_balancing_regulariser(p_hat, w):
    """Eq. 7: L_reg = sum_k w_k p_hat_k log p_hat_k. Scalar, from -sum(w) / e to 0; 0 log 0 = 0.

    p_hat (K,) is the mean of the batch's class probabilities, so the entropy is that of the batch: images may each be of one
    class for certain, as long as they are not all of the same. With w = 1 the minimum, -log K, is at the uniform p_hat;
    else it is at p_hat_k = exp(nu N_k - 1), nu such that they sum to 1 (Proposition 2): a class with a small N_k gets more than
    its share, one with a large N_k at most exp(-K (log K - 1) N_k - 1) (Eq. 16, Proposition 1; P's text on Fig. 3 says the
    contrary of its caption and proof). That needs K >= 3: with two classes nu > 0, and the frequent one is favoured.
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

    (1 + gain_y) x + shift_y, de Vries et al. 2017; both tables start orthogonal, not zero, as in A.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        labelled = num_classes is not None
        self.norm = nn.BatchNorm2d(channels, eps=1e-4 if labelled else 1e-5, affine=not labelled)  # eps: A
        self.gain, self.shift = (nn.Embedding(num_classes, channels) if labelled else None for _ in range(2))

    def forward(self, x, y):
        x = self.norm(x)
        return x if y is None else x * (1 + self.gain(y)[:, :, None, None]) + self.shift(y)[:, :, None, None]


def initialise(network, normalise):
    """Orthogonal weights, zero biases (A); then spectral norm on all layers with a weight matrix, if `normalise`.

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
        self.up = nn.ModuleList([nn.ConvTranspose2d(a, b, 4, 2, padding=1) for a, b in pairwise(widths)])
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
            [GeneratorBlock(a, b, slope, num_classes) for a, b in pairwise(widths)])
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
    """(B, in, H, W) -> (B, out, H, W), half the height and width if `down`. The skip takes the raw input (A activates it)."""

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
            for a, b in pairwise(widths):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(slope)]
                layers += [nn.Conv2d(b, b, 4, 2, padding=1), nn.LeakyReLU(slope)] if b != widths[-1] else []
        else:
            downs = levels  # to 4 x 4, then a block that keeps the size
            if args.image_size <= 32:
                widths, downs = [3] + [2 * width] * (levels + 1), levels - 1  # to 8 x 8, then two
            layers = [DiscriminatorBlock(a, b, slope, first=i == 0, down=i < downs)
                      for i, (a, b) in enumerate(pairwise(widths))] + [nn.LeakyReLU(slope)]
        self.layers, self.score = nn.Sequential(*layers), nn.Linear(widths[-1], 1)
        self.class_head = nn.Linear(widths[-1], num_classes) if args.conditioning == "acgan" else None
        self.projection = nn.Embedding(num_classes, widths[-1]) if args.conditioning == "cgan" else None
        initialise(self, normalise=True)

    def forward(self, x, y=None):
        h = self.layers(x).float().sum((2, 3))  # (B, width): sum over the pixels, not mean
        with torch.autocast(x.device.type, enabled=False):  # scores are compared: not in 8 bits
            score = self.score(h)[:, 0]
            if self.projection is not None:  # Miyato & Koyama 2018: w h + b + <e_y, h>
                score = score + (self.projection(y) * h).sum(1)
            return score, None if self.class_head is None else self.class_head(h)


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


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------
LOG_EVERY = 50  # steps
GRID_ROWS, GRID_COLUMNS = 10, 10  # classes, evenly spaced from head to tail, and samples of each
GRID_POOL = 50, 5_000  # samples to look for them in, where there are no labels: this many a class, at most these
LOSSES = ("L_D", "L_G", "L_reg", "L_D_class", "L_G_class")  # Eqs 2, 3 and 7, the baselines' cross-entropies; as in the log
CERTAIN = 0.9  # Fig. 3 counts samples whose class is more probable than this apart


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

    Averaged are weights and batch statistics; copied the counters and, because the average of two unit vectors is none, the
    vectors of spectral norm: for the average's own weights they are an approximation.
    """
    average, network = average.state_dict(), network.state_dict()
    mean = [k for k, v in network.items() if v.is_floating_point() and not k.endswith(("._u", "._v"))]
    rest = [k for k in network if k not in mean]
    return [([average[k] for k in keys], [network[k] for k in keys]) for keys in (mean, rest)]


def other_images(args):
    """(split, ImageSet) of balanced real images that are not those of the final score; (None, None) where there are none."""
    scored = datasets.load(args.dataset, args.data_dir, args.reference, args.image_size, args.rho).images
    for split in ("reference", "test", "train"):
        try:
            real = datasets.load(args.dataset, args.data_dir, split, args.image_size, args.rho)
        except InputError:  # a folder without this split
            continue
        balanced = real.counts.max() == real.counts.min()  # a distance to long-tailed images would choose against the method
        if balanced and not torch.equal(real.images, scored):
            return split, real
    return None, None


def main(argv=None):
    args = parse_settings(argv)
    device = pick_device(args.device)
    amp = use_bf16(args.amp, device)
    run_dir = Path(args.run_dir)
    train = datasets.load(args.dataset, args.data_dir, "train", args.image_size, args.rho)  # the same images for each --seed
    K, B, labelled = len(train.classes), args.batch_size, args.conditioning in LABELLED
    if args.reg_weight is None:
        imbalance = (train.counts.max() / train.counts.min()).item()
        nearest = min(LAMBDA[args.recipe], key=lambda rho: abs(math.log(rho / imbalance)))
        args.reg_weight = 0.0 if labelled else LAMBDA[args.recipe][nearest]
    # A setting like others: a run does not go on with a folder that has changed.
    args.training_data = train.fingerprint
    if args.force_frequency and not args.reg_weight:
        fail("--force-frequency says how frequent the regulariser takes class 0 to be; lambda is 0 here")
    if args.reg_weight and K < 3:
        fail(f"{args.dataset} has {K} classes: the regulariser balances 3 or more (Proposition 1); --reg-weight 0 goes without")
    checkpoint_file, log_file = run_dir / "checkpoint.pt", run_dir / "log.jsonl"
    state = load_checkpoint(checkpoint_file, "cpu") if checkpoint_file.exists() else None
    if state:  # the run that this directory holds goes on
        check_same_run(args, state["settings"], run_dir)
    elif args.eval_only:
        fail(f"--eval-only: there is no checkpoint in {run_dir}")

    # C, the classifier in the loop. acgan and cgan do without; a run without regulariser is only looked at through it.
    C, in_loss = None, bool(args.reg_weight) or args.conditioning == "pretrained"
    if in_loss or args.conditioning not in ("acgan", "cgan"):
        C = frozen_classifier(args.dataset, args.data_dir, args.classifier, "train", args.image_size, args.rho, device=device)
        right, rarest = C.info["test_accuracy"], int(datasets.head_to_tail(train.counts)[-1])
        shown = ", ".join(f"{name} {share:.1%}" for name, share in right.items() if share is not None)
        print(f"classifier in the loop: {C.info['path']}, test images right: {shown}", flush=True)
        if args.reg_weight and min(right["tail"], C.info["per_class_accuracy"][rarest]) < 0.05:
            print("warning: the classifier can hardly tell the tail. With one whose performance is 0 on the rarest class, the "
                  "paper's \"algorithm diverges and is not able to produce meaningful results\" (§4.4)", file=sys.stderr)
    classifier_hash = hashlib.sha256(Path(C.info["path"]).read_bytes()).hexdigest() if in_loss else None
    if state and state["classifier"] != classifier_hash:
        fail(f"{run_dir} holds a run with another classifier in its loop than {C.info['path']}; choose another --run-dir")
    # The annotator, which counts the classes in the samples: a classifier that learnt from balanced data, and not C.
    features = args.features or ""
    annotator = args.annotator or (features.removeprefix("classifier:") if features.startswith("classifier:") else None)
    if annotator:
        if C is not None and Path(annotator).samefile(C.info["path"]):
            fail(f"{annotator} is the classifier in the loop; take another annotator")
        load_classifier(annotator, "cpu", train.classes, args.image_size)  # refused now rather than after days of training

    # Generator, its moving average, which samples, and discriminator.
    torch.manual_seed(args.seed)
    # channels_last: how convolutions are fastest in bfloat16.
    G, D = (n.to(device, memory_format=torch.channels_last) for n in (build_generator(args, K), Discriminator(args, K)))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    (means, values), (copies, originals) = state_pairs(ema, G)
    adam = dict(lr=args.lr, betas=(args.beta1, args.beta2), eps=1e-6, fused=device.type in ("cuda", "cpu"))  # eps: A
    optimizer_G, optimizer_D = torch.optim.Adam(G.parameters(), **adam), torch.optim.Adam(D.parameters(), **adam)
    batches = datasets.Batches(train, B, flip=args.flip, device=device, seed=args.seed)
    modules = {"G": G, "D": D, "ema": ema, "optimizer_G": optimizer_G, "optimizer_D": optimizer_D, "batches": batches}
    # N_hat on the CPU, changed once a cycle; c, the counts of the cycle so far, on the device.
    N_hat, c = torch.ones(K, dtype=torch.float64), torch.zeros(K, dtype=torch.int64, device=device)
    if args.force_frequency:
        N_hat[0] = args.force_frequency
    sums, logged = torch.zeros(len(LOSSES), device=device), 0  # losses since the last line of the log; how many
    best = {}  # the averaged generator at the smallest monitored distance, and what that was
    start = 0
    if state:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        start, sums, logged, best = state["step"], state["sums"].to(device), state["logged"], state["best"]
        N_hat, c = state["N_hat"], state["c"].to(device)
    del state  # a second copy of everything
    parameters = [sum(w.numel() for w in network.parameters()) for network in (G, D)]
    print(f"GAN, conditioning {args.conditioning}, lambda {args.reg_weight:g}, on {args.dataset}: {len(train.labels)} images "
          f"of {K} classes, {int(train.counts.max())} to {int(train.counts.min())} a class; {parameters[0]:,} + "
          f"{parameters[1]:,} parameters; {device}{', bf16' if amp else ''}; {run_dir}"
          f"{f'; resumed at step {start}' if start else ''}", flush=True)

    net_G, net_D, net_C = (torch.compile(n) if args.compile and n is not None else n for n in (G, D, C))
    N = effective_class_distribution(N_hat)
    w = class_weights(N, args.weighting).float().to(device)
    # N, w, c and best change in the loop below; the functions here see them as they are when called.

    def noise():
        """z, and y for the generator; from the CPU, the same on each device."""
        z, y = torch.randn(B, LATENT), draw_labels(B, N, args.conditioning)
        return z.to(device), None if y is None else y.to(device)

    def check_finite(step, tensors):
        if not all(x.isfinite().all() for x in tensors):
            kept = f"the last good checkpoint, {checkpoint_file}, is kept" if checkpoint_file.exists() else "nothing was saved"
            fail(f"a loss or weight became NaN or infinite shortly before step {step}; {kept}; a new run may need a lower --lr "
                 "or --reg-weight")

    def save_checkpoint(step):
        check_finite(step, [sums, *G.parameters(), *D.parameters()])
        state = {name: module.state_dict() for name, module in modules.items()}
        state |= dict(step=step, settings=vars(args), sums=sums, logged=logged, N_hat=N_hat, c=c, best=best,
                      classifier=classifier_hash, rng=torch.get_rng_state())
        with atomic_write(checkpoint_file) as file:
            torch.save(state, file)

    order = torch.from_numpy(datasets.head_to_tail(train.counts))
    grid_rows = order[torch.linspace(0, K - 1, min(K, GRID_ROWS)).round().long()]

    def draw_grid(step):
        """One row a class from head to tail: of the label that was asked for, or of the class that C sees."""
        if labelled:
            y = grid_rows.repeat_interleave(GRID_COLUMNS)
            images = generate(ema, latents(len(y), GRID, args.seed)[0], y, amp)
        else:
            z, generator = latents(min(GRID_POOL[0] * K, GRID_POOL[1]), GRID, args.seed)
            images = generate(ema, z, draw_labels(len(z), N, args.conditioning, generator), amp)
            images = rows_by_class(images, predict(C, images)[0], grid_rows)
        write_grid(run_dir / "samples" / f"step-{step:07d}.png", images, GRID_COLUMNS)

    # The monitored distance chooses the weights: with noise, and against real images, that the final score does not use.
    ruler = None
    if args.monitor_images and start < args.steps and not args.eval_only:
        import metrics  # here: SciPy takes a second to import, and training need not wait for it

        split, real = other_images(args)
        try:
            ruler = real and metrics.load_reference(real, args.dataset, args.data_dir, args.features, split, args.rho, device)
        except InputError as error:  # no weights for the features, and no network to get them
            print(f"warning: the distance is not monitored: {error}", file=sys.stderr, flush=True)
        if not real:
            print("warning: the distance is not monitored: there are no balanced images but those of the final score",
                  file=sys.stderr, flush=True)
        if ruler and best.get("ruler", [args.features, split]) != [args.features, split]:
            best = {}  # chosen by another distance

    def monitor():
        """Frechet distance of the averaged generator, and KL to uniform of the classes that C sees in it."""
        network, features = ruler
        z, generator = latents(args.monitor_images, MONITOR, args.seed)
        images = generate(ema, z, draw_labels(len(z), N, args.conditioning, generator), amp)
        distance = metrics.frechet_distance(features, metrics.extract_features(images, network, device)[0])
        return distance, None if C is None else metrics.kl_to_uniform(predict(C, images)[0].numpy(), K)

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
                      "classifier": C and C.info["path"]}
            file.write(json.dumps(config, indent=2).encode())
        signal.signal(signal.SIGINT, ask_to_stop)
        signal.signal(signal.SIGTERM, ask_to_stop)
        began = last = time.monotonic()
        last_step = start
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
                loss = L_D = relativistic_loss(D_real, D_fake)  # Eq. 2
                L_D_class = L_G_class = L_reg = torch.zeros_like(L_D)
                if args.conditioning == "acgan":  # real and fake images by the label that they came with (A)
                    L_D_class = F.cross_entropy(logits[:B], y) + F.cross_entropy(logits[B:], y_fake)
                    loss = loss + L_D_class
                optimizer_D.zero_grad()
                loss.backward()
                optimizer_D.step()

                # Generator. New noise; the same real images (A), which D scores once more for Eq. 3.
                D.requires_grad_(False)  # its gradients would be computed and thrown away
                z, y_fake = noise()
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    fake = net_G(z, y_fake)
                    D_fake, logits = net_D(fake, y_fake)
                    with torch.no_grad():
                        D_real, _ = net_D(x, y)
                    seen = net_C(fake).float() if in_loss else None  # (B, K) logits; C is frozen, gradients go through it
                D.requires_grad_(True)
                loss = L_G = relativistic_loss(D_fake, D_real)  # Eq. 3
                if args.reg_weight:
                    L_reg = class_balancing_regulariser(seen.softmax(1).mean(0), w)  # Eq. 7
                    loss = loss + args.reg_weight * L_reg  # Eq. 17; the 1 / K of appendix 6.4.1 is in w
                if args.conditioning == "acgan":
                    L_G_class = F.cross_entropy(logits, y_fake)  # weight 1: A
                elif args.conditioning == "pretrained":
                    L_G_class = 0.5 * F.cross_entropy(seen, y_fake)  # §4.2, appendix 6.6
                loss = loss + L_G_class
                optimizer_G.zero_grad()
                loss.backward()
                optimizer_G.step()

                done = step + 1
                if done <= args.ema_start:
                    torch._foreach_copy_(means, values)
                else:  # average <- average + (1 - decay) (value - average), one call for all tensors
                    torch._foreach_lerp_(means, values, 1 - args.ema)
                torch._foreach_copy_(copies, originals)

                # Class statistics: of the fakes of this step alone, for the cycles to come.
                if args.reg_weight and not args.force_frequency:
                    took = seen.argmax(1)
                    c.scatter_add_(0, took, torch.ones_like(took))
                    if done % args.cycle == 0:
                        N_hat = effective_class_frequency(N_hat, c.cpu(), args.alpha, args.beta)  # Eq. 5
                        N = effective_class_distribution(N_hat)  # Eq. 6
                        w = class_weights(N, args.weighting).float().to(device)
                        c.zero_()

                sums += torch.stack([L_D, L_G, L_reg, L_D_class, L_G_class]).detach()
                logged += 1
                bar.update()
                if done % LOG_EVERY == 0 or done == args.steps:
                    check_finite(done, [sums])
                    row = dict(zip(LOSSES, (sums / logged).tolist(), strict=True))
                    bar.set_postfix_str(", ".join(f"{k} {v:.4f}" for k, v in row.items() if v), refresh=False)
                    rate = (done - last_step) / (time.monotonic() - last)
                    if args.reg_weight:  # how uneven N is: KL to uniform; ratio of the two weightings, see class_weights
                        ratio = (class_weights(N, "paper") / class_weights(N, "sum-to-K")).mean()
                        row |= {"kl_of_N": torch.special.xlogy(N, K * N).sum().item(), "am_over_hm": ratio.item()}
                    log.write(json.dumps({"step": done, **row, "images": done * B, "steps_per_second": round(rate, 3)}) + "\n")
                    log.flush()
                    last, last_step = time.monotonic(), done
                    sums.zero_()
                    logged = 0
                if ruler and done % args.monitor_every == 0:
                    distance, kl = monitor()
                    row = {"step": done, "monitored_distance": distance, "kl_in_loop": kl, "N": N.tolist()}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    if distance < best.get("distance", math.inf):
                        best = {"distance": distance, "ruler": [args.features, split], "step": done, "N": N,
                                "ema": copy.deepcopy(ema.state_dict())}  # fmt: skip
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

        where = run_dir / f"sample-seed-{args.sample_seed}" if args.sample_seed else run_dir
        scored, use_best = start, args.weights == "best" and "ema" in best
        if use_best:
            ema.load_state_dict(best["ema"])
            scored, N = best["step"], best["N"]
            sets = [datasets.load(args.dataset, args.data_dir, split, args.image_size, args.rho).images
                    for split in (best["ruler"][1], args.reference)]  # fmt: skip
            if torch.equal(*sets):  # a folder's reference may be its test split
                print(f"warning: the {args.reference} images that score these weights have chosen them", file=sys.stderr)
        z, generator = latents(args.eval_images, FINAL, args.sample_seed)
        y = (torch.arange(len(z)) % K).sort().values if labelled else draw_labels(len(z), N, args.conditioning, generator)
        images = generate(ema, z, y, amp)
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({"labels": y.numpy()} if labelled else {})
        views = {"training": train.labels}
        if C is not None:  # what samples without labels are taken for, to train a classifier on them (Acc. in Table 1)
            views["in_loop"], _ = predict(C, images)
            arrays["predicted"] = views["in_loop"].numpy()
        with atomic_write(where / "samples.npz") as file:
            np.savez(file, **arrays)

        if not annotator:
            judge = frozen_classifier(args.dataset, args.data_dir, None, "reference", args.image_size, device=device)
            annotator = judge.info["path"]
            if C is not None and Path(annotator).samefile(C.info["path"]):
                print("warning: the annotator is the classifier in the loop", file=sys.stderr)
        judge = load_classifier(annotator, device, train.classes, args.image_size)
        seen, certainty = predict(judge, images)
        views |= {"annotator": seen, "certain": seen[certainty > CERTAIN]}
        views = {name: view for name, view in views.items() if len(view)}
        kl = {f"kl_{name}": metrics.kl_to_uniform(view.numpy(), K) for name, view in views.items()}
        shares = [{f"share_{name}": (view == k).double().mean().item() for name, view in views.items()} for k in range(K)]
        shown = order if K <= 20 else torch.cat([order[:10], order[-10:]])
        which = "each class" if K <= 20 else "ten classes of the head and ten of the tail"
        known = "test images" if judge.info["tested_on_unseen_images"] else "images that it learnt from"
        print(f"{len(images)} samples of step {scored}: share of {which} as the annotator {annotator} sees it (right on "
              f"{judge.info['test_accuracy']['all']:.1%} of the {known})")
        table = {train.classes[k]: shares[k] for k in shown}
        table["KL to uniform"] = {f"share_{name}": kl[f"kl_{name}"] for name in views}
        print(*metrics.text_table(table, {f"share_{name}": name for name in views}), sep="\n", flush=True)
        grid = rows_by_class(images, y if labelled else seen, grid_rows)
        write_grid(where / "samples" / "final.png", grid, GRID_COLUMNS)
        try:
            result = metrics.evaluate(images, y if labelled else None, args.dataset, args.data_dir, args.features,
                                      args.reference, args.rho, args.image_size, device=device, seen=seen, scores=args.scores)
        except InputError as error:  # most often: no weights for the features, and no network to get them
            print(f"{where / 'samples.npz'} is written but not scored: {error}. Then the same command goes on from here.")
            return
        result["protocol"] |= {"step": scored, "weights": "best" if use_best else "last", "sample_seed": args.sample_seed,
                               "annotator": annotator}  # fmt: skip
        result["all"] |= kl
        result["per_class"] = [row | share for row, share in zip(result["per_class"], shares, strict=True)]
        metrics.write_scores(result, where)
        print(metrics.format_table(result))


if __name__ == "__main__":
    run_command(main)
