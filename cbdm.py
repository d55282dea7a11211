"""CBDM: Class-Balancing Diffusion Models (Qin, Zheng, Yao, Zhou, Zhang; CVPR 2023, arXiv:2305.00562), in one file.

A class-conditional diffusion model that has seen five images of a class repeats those five, or paints something else. CBDM
is the usual DDPM with one term more (Eq. 4): for an image x_t of class y the network is asked a second time, with a random
other label y', and the two predictions are pulled together, the more so the noisier x_t is. Our intuition: noisy steps settle
composition and colour, which classes can share; in the late steps, which tell classes apart, the pull is weak.

    python cbdm.py --dataset shapeslt                    # first look: drawn shapes, a CPU, minutes
    python cbdm.py --dataset cifar100lt                  # the paper's run (Table 1)
    python cbdm.py --dataset cifar100lt --tau 0          # its baseline: DDPM with classifier-free guidance
    python cbdm.py --dataset cifar100lt --label-set sqrt # Table 2; also bal
    python cbdm.py --dataset cifar100lt --init-from runs/cbdm-cifar100lt-tau0.0-s0/checkpoint.pt --steps 50000  # fine-tuning
    python cbdm.py --dataset cifar100lt --eval-only --sampler ddim     # Table 6; replaces the run's samples and scores

Each command resumes the run that it finds in its run directory: bit for bit on the CPU with the same number of threads; with
the same data and noise on a GPU. Cost: shapeslt 5 minutes on two CPU cores; cifar100lt 11 s a step there (never run in full).

P is the paper and C the authors' code (github.com/qym7/CBDM-pytorch). From C, because P does not say: gradients clipped at
norm 1, averaged weights (EMA) for sampling, horizontal flips, dropout 0.1, the sizes of the U-Net. Where we differ, and why:
  * t runs over T = 1000 values 0 .. 999, as in C; Alg. 1 writes {0 .. T}, which would be 1001. Our t is P's t - 1.
  * The regulariser's weight is tau t with P's tau = 0.001, so it is 0 at the first step; C writes t/T * 1.0, the same number.
  * A label is dropped (for guidance) per image; C drops those of a whole batch at once. The expected gradient is the same and
    varies less. `--drop-whole-batch` does as C.
  * Dropped images have no regulariser, as in C; P does not say.
  * Squared norms are means over pixels, as in C; P's sums would change what clipping at norm 1 means.
  * Warm-up is 5000 steps, as in C; P says epochs, which would be longer than the whole training.
  * y' comes from the training distribution by default, as in C's runs from scratch; P leaves q*_Y open (Table 2 compares).
  * x_0 is not clipped while sampling: C computes the clipped one and does not use it. `--clip-x0` does.
  * Samples have exactly balanced labels; C draws them at random (500 +- 22 a class).
  * The output convolution of an attention block starts near zero, as in DDPM (Ho et al. 2020); in C the block around it
    initialises it a second time, at full size.
  * bfloat16 where the hardware has it (`--amp off` for C's float32), fused Adam, both labels in one forward pass.
Not here yet: ADA and DiffAug (Table 1), the EDM and ViT backbones (Table 5).
"""

import argparse
import contextlib
import copy
import functools
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
from datasets import InputError, atomic_write, environment, fail, pick_device, run_command, use_bf16

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------
T = 1000  # diffusion steps, P §4.1

# What differs from data set to data set. P: the paper. C: the README, config files or flags of the authors' code.
CIFAR100LT = dict(
    image_size=32,
    steps=300_000, regularise_after=0.0, batch_size=48,  # C, README (P: "appropriate epochs")
    lr=2e-4, beta2=0.999, warmup=5_000, lr_schedule="constant",  # P §4.1, C
    ema=0.9999, dropout=0.1,  # C
    channels=128, multipliers=[1, 2, 2, 2], blocks=2, attention_level=1,  # C, the U-Net of DDPM
    prediction="eps", noise_schedule="linear",  # P §3.1, §4.1
    guidance=1.6,  # P §4.1, read in the order of Table 1; C's README says 1.6 too
    sampler="ancestral", ddim_steps=100, clip_x0=False,  # C; DDIM: P Table 6
    eval_images=50_000,  # P §4.1
    sample_every=10_000, save_every=2_000,
)
BALANCED = CIFAR100LT | dict(steps=800_000, batch_size=128, guidance=0.8)  # C, config files; P §4.1
DATASETS = {
    "cifar100lt": CIFAR100LT,
    # CHOICE: steps and batch of CIFAR100-LT, which has nearly as many images; those of P and C are not known.
    "cifar10lt": CIFAR100LT | dict(guidance=1.0),  # P §4.1
    "cifar100": BALANCED,
    "cifar10": BALANCED,
    # Ours: sized for two CPU cores and a few minutes. With the regulariser from the first step on, each step costs twice as
    # much; so the run does what the second block of Table 2 does in two: a DDPM first, then CBDM fine-tunes it.
    "shapeslt": CIFAR100LT | dict(
        image_size=16, steps=2600, regularise_after=0.9, batch_size=32,
        lr=3e-3, beta2=0.99, warmup=100, lr_schedule="cosine", ema=0.995, dropout=0.0,
        channels=32, multipliers=[1, 1, 2], blocks=1, attention_level=2, prediction="v", noise_schedule="cosine",
        guidance=2.0, sampler="ddim", ddim_steps=25, clip_x0=True,
        eval_images=500, sample_every=650, save_every=325,
    ),
}
DATASETS["shapes"] = DATASETS["shapeslt"]

# May differ between two commands on one run directory: they do not define the experiment.
FREE = {"data_dir", "run_dir", "device", "compile", "steps", "sample_every", "save_every", "eval_images", "eval_only",
        "features", "reference", "scores", "guidance", "sampler", "ddim_steps", "clip_x0"}


def parse_settings(argv=None):
    """The command line as a namespace; what is not given comes from the table of the data set."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.error = fail
    which.add_argument("--dataset", default="cifar100lt")
    which.add_argument("--tau", type=float, default=0.001)
    first, _ = which.parse_known_args(argv)
    table = dict(DATASETS.get(first.dataset, CIFAR100LT))
    if first.tau == 0 and first.dataset == "cifar100lt":
        table["guidance"] = 0.8  # C, README: the best of the baseline; P tunes omega for each model
    rho = datasets.DEFAULT_RHO if first.dataset in datasets.LONG_TAILED else None

    parser = argparse.ArgumentParser(
        description="Class-Balancing Diffusion Models. Defaults shown are those of --dataset " + first.dataset,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )
    parser.error = fail
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="cifar100lt", help="a name that datasets.py knows, or folder:PATH")
    group.add_argument("--rho", type=float, default=rho, help="imbalance ratio of a long-tailed set; P: 100")
    group.add_argument("--data-dir", default="data", help="where prepared data sets lie")
    group.add_argument("--image-size", type=int, help="pixels")
    group.add_argument("--resample", choices=("data", "uniform", "sqrt"), default="data",
                       help="class distribution of the training images; uniform is RS, sqrt is RS-SQRT in Table 1")
    group = parser.add_argument_group("method")
    group.add_argument("--tau", type=float, default=0.001, help="weight of the regulariser, P §4.3; 0 is DDPM")
    group.add_argument("--gamma", type=float, default=0.25, help="weight of the commitment term, P §3.3")
    group.add_argument("--label-set", choices=("train", "bal", "sqrt"), default="train", help="where y' comes from, Table 2")
    group.add_argument("--regularise-after", type=float, help="share of the steps that are plain DDPM at first; 0: P, Alg. 1")
    group.add_argument("--drop-rate", type=float, default=0.1, help="share of images without a label, P §3.3")
    group.add_argument("--prediction", choices=("eps", "v"), help="what the network predicts; v: ours, for short runs")
    group.add_argument("--noise-schedule", choices=("linear", "cosine"), help="linear: P §4.1")
    group.add_argument("--drop-whole-batch", action="store_true", help="drop the labels of whole batches, C")
    group = parser.add_argument_group("network")
    group.add_argument("--channels", type=int, help="width of the first level")
    group.add_argument("--multipliers", type=int, nargs="+", help="width of each level, in units of --channels")
    group.add_argument("--blocks", type=int, help="residual blocks a level")
    group.add_argument("--attention-level", type=int, help="the level with self-attention, counted from 0")
    group.add_argument("--dropout", type=float, help="inside the residual blocks")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help="optimiser steps")
    group.add_argument("--batch-size", type=int, help="images a step")
    group.add_argument("--lr", type=float, help="learning rate of Adam after the warm-up")
    group.add_argument("--beta2", type=float, help="of Adam: decay of its average of squared gradients")
    group.add_argument("--warmup", type=int, help="steps over which the rate rises linearly from 0")
    group.add_argument("--lr-schedule", choices=("constant", "cosine"), help="after the warm-up")
    group.add_argument("--ema", type=float, help="decay of the averaged weights, which are the ones that sample")
    group.add_argument("--init-from", metavar="CHECKPOINT", help="start from another run's averaged weights (fine-tuning)")
    group.add_argument("--seed", type=int, default=0, help="of weights, data order, noise and labels")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto takes CUDA, then MPS, then the CPU")
    group.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="bfloat16; auto: where hardware has it")
    group.add_argument("--compile", action="store_true", help="torch.compile: faster steps after a minute or more of waiting")
    group = parser.add_argument_group("run")
    group.add_argument("--run-dir", help="default: runs/cbdm-<dataset>-<what differs>-s<seed>")
    group.add_argument("--sample-every", type=int, help="steps between two sample grids; 0: none")
    group.add_argument("--save-every", type=int, help="steps between two checkpoints")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-images", type=int, help="samples to score at the end; 0: none")
    group.add_argument("--eval-only", action="store_true", help="sample from and score the checkpoint, do not train")
    group.add_argument("--guidance", type=float, help="omega, P §4.1")
    group.add_argument("--sampler", choices=("ancestral", "ddim"), help="ancestral takes all 1000 steps")
    group.add_argument("--ddim-steps", type=int, help="steps of DDIM, also for the grids during training")
    group.add_argument("--clip-x0", action=argparse.BooleanOptionalAction, help="clip x_0 to [-1, 1] in each sampling step")
    group.add_argument("--features", help="inception, inception-fid or classifier:PATH; default: a classifier of the shapes "
                       "for shapes, inception otherwise")
    group.add_argument("--scores", default="fid,is", help="of the final samples: names that metrics.py knows, or all")
    group.add_argument("--reference", choices=datasets.SPLITS, default="reference", help="split to compare samples with")

    parser.set_defaults(**table)
    args = parser.parse_args(argv)
    check_settings(args)
    if args.run_dir is None:
        unnamed = FREE - {"steps"} | {"dataset", "seed"}  # another length gets another directory, unless --run-dir is given
        differs = [f"{k.replace('_', '')}{v}" for k, v in vars(args).items()
                   if k not in unnamed and v != parser.get_default(k)]
        differs = "".join(f"-{d}" for d in differs).replace("/", "_").replace(" ", "")
        args.run_dir = f"runs/cbdm-{args.dataset.replace('/', '_').replace(':', '_')}{differs}-s{args.seed}"
    return args


def check_settings(args):
    """Raises InputError for settings that make no sense, before anything is read or written."""
    below_1 = ("from 0 to below 1", lambda v: 0 <= v < 1)
    rules = dict.fromkeys(("steps", "batch_size", "blocks", "save_every"), ("at least 1", lambda v: v >= 1))
    rules |= dict.fromkeys(("tau", "gamma", "warmup", "sample_every", "eval_images", "seed"),
                           ("0 or more, and finite", lambda v: 0 <= v < math.inf))
    rules |= dict.fromkeys(("ema", "beta2", "dropout", "regularise_after"), below_1)
    levels = len(args.multipliers)
    rules |= {
        "drop_rate": ("from 0 to 1", lambda v: 0 <= v <= 1),
        "lr": ("a positive number", lambda v: 0 < v < math.inf),
        "guidance": ("a finite number", math.isfinite),
        "ddim_steps": (f"2 to {T}", lambda v: 2 <= v <= T),
        "attention_level": (f"0 to {levels - 1} with {levels} levels", lambda v: 0 <= v < levels),
        "channels": ("a multiple of 4, the channels in a group of GroupNorm", lambda v: v > 0 and v % 4 == 0),
        "multipliers": ("each at least 1", lambda v: min(v) >= 1),
        "image_size": (f"a multiple of {2 ** (levels - 1)} for {levels} levels", lambda v: v % 2 ** (levels - 1) == 0),
    }
    for name, (what, holds) in rules.items():
        if not holds(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {what}")
    if (args.features or "").startswith("classifier:") and not Path(args.features.removeprefix("classifier:")).is_file():
        fail(f"--features {args.features}: there is no such file")  # now, and not after days of training
    if args.scores != "fid,is":  # the default needs no check, and the module a second
        import metrics

        metrics.chosen_scores(args.scores)


# ----------------------------------------------------------------------------------------------------------------------
# The paper's equations
# ----------------------------------------------------------------------------------------------------------------------
# B is the paper's N, q_Y its q*_Y.
# x_0      (B, 3, H, W) an image, in [-1, 1]           y, y'   (B,) int64, its class and a random one; NO_LABEL is "None"
# t        (B,) int64, step 0 .. T-1, on the CPU       h, h'   (B, 3, H, W), eps_theta(x_t, y, t) and eps_theta(x_t, y', t)
# x_t      (B, 3, H, W), x_0 after t steps of noise    tau     weight of the regulariser; gamma: of its commitment term
# eps      (B, 3, H, W), the noise in x_t              omega   guidance strength
# beta_t, alpha_bar_t: noise schedule; index t here is step t + 1 of the paper
NO_LABEL = -1


def noise_schedule(kind):
    """alpha_bar (T,) float64: the share of the variance of x_t that is still signal.

    "linear": beta_t from 1e-4 to 0.02, P §4.1; alpha_bar falls from 0.9999 to 0.00004.
    "cosine": Nichol & Dhariwal 2021, Eq. 17, for the shapes data (CHOICE: see --prediction).
    """
    if kind == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        f = torch.cos((torch.linspace(0, 1, T + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0)


LINEAR = noise_schedule("linear")


def like(x, a):
    """a on the device and in the type of x, without making a GPU wait."""
    return a.to(x.device, x.dtype, non_blocking=True)


def q_sample(x_0, t, eps, alpha_bar=LINEAR):
    """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), §3.1."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return like(x_0, a.sqrt()) * x_0 + like(x_0, (1 - a).sqrt()) * eps


def velocity(x_0, t, eps, alpha_bar):
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, what the network learns instead of eps with --prediction v.

    Salimans & Ho 2022. Not in the paper: at pure noise an error in eps is multiplied by 1 / sqrt(alpha_bar), up to 157, on
    its way to x_0, and a network that trains for minutes never becomes that exact; an error in v is not multiplied. Both
    halves of Eq. 4 are then distances between velocities, so that at each t their ratio stays the paper's.
    """
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return like(x_0, a.sqrt()) * eps - like(x_0, (1 - a).sqrt()) * x_0


def eps_of_velocity(v, x_t, t, alpha_bar):
    """The noise that belongs to a predicted velocity. t: int."""
    return (1 - alpha_bar[t]).sqrt().item() * x_t + alpha_bar[t].sqrt().item() * v


def ddpm_loss(h, eps):
    """Eq. 1: || eps - eps_theta(x_t, y, t) ||^2, as a mean over images and pixels. Scalar. eps is v with --prediction v."""
    return (eps - h).square().mean()


def regularisers(h, h_prime, t, tau, labelled):
    """The second half of Eq. 4 (Alg. 1, lines 7 to 10). Returns the scalars (L_r, L_rc):

        L_r  = tau t / |Y| * sum over y' of || h - sg(h') ||^2     Eq. 3 times tau: moves what the image's own label predicts
        L_rc = tau t / |Y| * sum over y' of || sg(h) - h' ||^2     moves what the random label predicts ("commitment")

    h (B, C, H, W); h_prime (|Y|, B, C, H, W), one entry for each drawn y'; t (B,); labelled (B,) bool, False where the
    label was dropped: those images have no regulariser, but count in the mean.
    sg is the stop-gradient, against a network that ignores its label (§3.3). The two terms have the same value; what sg
    changes is that the pull on h' can have a weight of its own, gamma. With gamma = 1 the gradient is that of the plain
    squared distance.
    """
    weight = tau * like(h, t) * labelled  # (B,), at most 0.999 with tau = 0.001: weak where x_t is nearly the image

    def distance(a, b):
        return (weight * (a - b).square().mean(dim=(2, 3, 4))).mean()

    return distance(h, h_prime.detach()), distance(h.detach(), h_prime)


def label_distribution(counts, label_set):
    """q*_Y, the distribution of y' (§4.2): (K,) float64 that sums to 1. counts (K,): training images of each class.

    "train" n_c, "bal" uniform, "sqrt" sqrt(n_c). On CIFAR100-LT head and tail differ by 100, 1 and 10.
    """
    power = {"train": 1.0, "bal": 0.0, "sqrt": 0.5}[label_set]
    weight = counts.double() ** power
    return weight / weight.sum()


def guided(eps_y, eps_none, omega):
    """Classifier-free guidance (§3.1): eps_hat = (1 + omega) eps_theta(x_t, y, t) - omega eps_theta(x_t, t)."""
    return (1 + omega) * eps_y - omega * eps_none


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------
# The U-Net of DDPM (Ho et al. 2020) with a label embedding: 35,797,507 parameters for 100 classes at the paper's size,
# 12.4 GFLOP for a 32 x 32 image and a forward pass.
class SelfAttention(nn.Module):
    """Each pixel attends to each, one head. (B, C, H, W) -> the same."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # (B, C, HW)
        # Written out: at 256 pixels it is twice as fast on a CPU as F.scaled_dot_product_attention.
        attention = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=2)  # (B, HW, HW), rows sum to 1
        return x + self.out((v @ attention.transpose(1, 2)).view_as(x))


class ResidualBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W). The embedding of t and y comes in as a bias for each channel."""

    def __init__(self, in_channels, out_channels, embedding, dropout, groups, attention):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embedding, out_channels)
        self.norm2, self.conv2 = nn.GroupNorm(groups, out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = SelfAttention(out_channels, groups) if attention else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x))) + self.embed(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class UNet(nn.Module):
    """eps_theta. (x_t (B, 3, H, W), t (B,) int64, y (B,) int64 or NO_LABEL) -> predicted noise (B, 3, H, W) float32."""

    def __init__(self, num_classes, channels, multipliers, blocks, attention_level, dropout):
        super().__init__()
        # Row t: sin(t f_0), cos(t f_0), sin(t f_1), cos(t f_1), ... with f_i = 10000^(-2i / channels); frozen.
        angle = torch.arange(T)[:, None] * torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000) / channels))
        self.register_buffer("time_table", torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1), persistent=False)
        embedding = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(num_classes, embedding) if num_classes else None

        # 4 channels a group at the first level: the 32 groups of DDPM at 128 channels. 32 groups of a 32-channel network would
        # be one channel each, and normalising each channel by itself removes the overall colour of an image.
        groups = channels // 4
        block = functools.partial(ResidualBlock, embedding=embedding, dropout=dropout, groups=groups)
        width = channels
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.down, skips = nn.ModuleList(), [width]  # skips: channels of each output that is kept for the way up
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(block(width, multiplier * channels, attention=level == attention_level))
                width = multiplier * channels
                skips.append(width)
            if level < len(multipliers) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width, attention=False)])
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), multiplier * channels, attention=level == attention_level))
                width = multiplier * channels
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        self.tail = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))
        self.initialise()

    def initialise(self):
        """Xavier-uniform weights, zero biases; near zero: the output, and each branch that is added to its input. The label
        table keeps PyTorch's N(0, 1)."""
        blocks = [m for m in self.modules() if isinstance(m, ResidualBlock)]
        attentions = [m for m in self.modules() if isinstance(m, SelfAttention)]
        near_zero = {self.tail[2], *(m.conv2 for m in blocks), *(m.out for m in attentions)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=1e-5 if module in near_zero else 1.0)
                nn.init.zeros_(module.bias)

    def forward(self, x, t, y):
        embedding = self.time(self.time_table[t])
        if self.label is not None:  # an image without a label has nothing added: there is no "none" row in the table
            embedding = embedding + self.label(y.clamp(min=0)) * (y != NO_LABEL)[:, None]
        embedding = F.silu(embedding)  # (B, 4 * channels), as each block wants it
        h = self.head(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), embedding) if isinstance(layer, ResidualBlock) else layer(h)
        return self.tail(h).to(x.dtype)  # float32 also under autocast


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------
def predict_x_0(x_t, eps_hat, t, clip, alpha_bar=LINEAR):
    """The image in x_t if eps_hat is its noise: the forward process solved for x_0. t: int."""
    x_0 = (x_t - (1 - alpha_bar[t]).sqrt().item() * eps_hat) / alpha_bar[t].sqrt().item()
    return x_0.clamp(-1, 1) if clip else x_0


def ancestral_step(x_t, eps_hat, t, z, clip=False, alpha_bar=LINEAR):
    """x_{t-1} ~ N(mean of q(x_{t-1} | x_t, predicted x_0), beta_t I); z standard normal. Ho et al. 2020, Alg. 2.

    The variance is beta_t ("fixed large"), as in C; the posterior's own would be smaller. No noise in the last step.
    """
    a, a_prev = alpha_bar[t].item(), alpha_bar[t - 1].item() if t > 0 else 1.0
    alpha = a / a_prev  # 1 - beta_t
    x_0 = predict_x_0(x_t, eps_hat, t, clip, alpha_bar)
    mean = (a_prev**0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - a_prev) * x_t) / (1 - a)
    return mean + (1 - alpha) ** 0.5 * z if t > 0 else mean


def ddim_step(x_t, eps_hat, t, t_prev, clip=False, alpha_bar=LINEAR, eta=0.0, z=0.0):
    """x at t_prev (-1: the image itself) from x_t, with t_prev < t. DDIM, Song et al. 2021, Eqs 12 and 16.

    eta = 0, the "deterministic" of P, needs no noise z; eta = 1 has the variance of the posterior of the forward process.
    """
    a, a_prev = alpha_bar[t].item(), alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
    x_0 = predict_x_0(x_t, eps_hat, t, clip, alpha_bar)
    if clip:
        eps_hat = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5  # the noise that belongs to the clipped image
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
    return a_prev**0.5 * x_0 + (1 - a_prev - sigma**2) ** 0.5 * eps_hat + sigma * z


@torch.no_grad()
def sample(model, y, args, amp, seed, sampler, progress=None):
    """Images (N, 3, H, W) uint8 on the CPU, of the classes y (N,), from noise of this seed.

    model: the averaged network in eval mode. progress: a tqdm bar that is moved on by one image at a time.
    """
    device = next(model.parameters()).device
    alpha_bar = noise_schedule(args.noise_schedule)
    generator = torch.Generator(device).manual_seed(seed)
    noise = functools.partial(torch.randn, generator=generator, device=device)
    y = y.to(device)
    shape = (len(y), 3, args.image_size, args.image_size)
    # DDIM with 100 steps visits 0, 10, ..., 990; P and C do not say which.
    times = [i * T // args.ddim_steps for i in range(args.ddim_steps)] if sampler == "ddim" else range(T)

    x = noise(shape)
    for i in reversed(range(len(times))):
        t, t_prev = times[i], times[i - 1] if i > 0 else -1
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            if args.guidance == 0:
                h = model(x, torch.full_like(y, t), y)
            else:  # with and without label in one pass of 2 N
                twice = torch.cat([y, torch.full_like(y, NO_LABEL)])
                h = guided(*model(torch.cat([x, x]), torch.full_like(twice, t), twice).chunk(2), args.guidance)
        eps_hat = h if args.prediction == "eps" else eps_of_velocity(h, x, t, alpha_bar)
        if sampler == "ddim":
            x = ddim_step(x, eps_hat, t, t_prev, args.clip_x0, alpha_bar)
        else:
            x = ancestral_step(x, eps_hat, t, noise(shape), args.clip_x0, alpha_bar)
        if progress is not None:
            progress.update(len(y) / len(times))
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint and resume
# ----------------------------------------------------------------------------------------------------------------------
# same in: classifier.py, cbgan.py, softlabel_gan.py
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
    # The length of a run shapes it from the start where the rate follows a cosine or the regulariser begins later.
    free = FREE if args.lr_schedule == "constant" and args.regularise_after == 0 else FREE - {"steps"}
    now = {k: v for k, v in vars(args).items() if k not in free}
    differs = [f"--{k.replace('_', '-')} {found.get(k)} there, {v} now" for k, v in now.items() if found.get(k) != v]
    if differs:
        raise InputError(f"{run_dir} holds a run with other settings ({'; '.join(differs)}); choose another --run-dir")


# same in: classifier.py, cbgan.py, softlabel_gan.py
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
SAMPLING_BATCH = {"cuda": 500, "mps": 100, "cpu": 50}  # images of 32 x 32 at once; twice as many go through the network
PART_SECONDS = 300  # how often samples of a long evaluation are put on disk
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]{postfix}"


def learning_rate(step, args):
    """Linear from 0 over the warm-up, then constant (P, C) or half a cosine down to 0 (ours, for short runs)."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


# same in: cbgan.py, softlabel_gan.py
def write_grid(path, images, columns):
    """(N, 3, H, W) uint8 as a PNG, row by row; small images are enlarged to about 64 pixels."""
    from PIL import Image
    from torchvision.utils import make_grid  # here: it takes a second to import, and training need not wait for it

    scale = max(1, 64 // images.shape[-1])
    grid = make_grid(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), nrow=columns, padding=scale)
    with atomic_write(path) as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, format="png")


def sample_all(path, model, labels, args, amp, step):
    """Samples of all labels (N,), (N, 3, H, W) uint8, written to `path`; those that are there already are not made again."""
    device = next(model.parameters()).device
    at_once = max(1, int(SAMPLING_BATCH[device.type] * 32**2 / args.image_size**2))
    made_with = str([step, len(labels), at_once, args.seed, args.guidance, args.sampler, args.ddim_steps,
                     args.clip_x0, args.image_size])
    images, part = torch.empty(0, 3, args.image_size, args.image_size, dtype=torch.uint8), path.with_name("samples.part")
    for file in filter(Path.exists, (path, part)):  # of a finished or an interrupted evaluation
        with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as found:  # other or damaged: made again
            if str(found["made_with"]) == made_with:
                images = torch.from_numpy(found["images"]).permute(0, 3, 1, 2)

    def write(path):
        with atomic_write(path) as file:
            np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), labels=labels[: len(images)].numpy(), made_with=made_with)

    saved = time.monotonic()
    with tqdm(total=len(labels), initial=len(images), desc="sampling", unit="img", bar_format=BAR) as bar:
        while len(images) < len(labels):
            # A seed for each batch, so that a batch does not depend on those before it.
            seed = int(np.random.SeedSequence([args.seed, len(images)]).generate_state(1)[0])
            y = labels[len(images) : len(images) + at_once]
            images = torch.cat([images, sample(model, y, args, amp, seed, args.sampler, bar)])
            if time.monotonic() - saved > PART_SECONDS and len(images) < len(labels):
                write(part)
                saved = time.monotonic()
    write(path)
    part.unlink(missing_ok=True)
    return images


def main(argv=None):
    args = parse_settings(argv)
    device = pick_device(args.device)
    amp = use_bf16(args.amp, device)
    run_dir = Path(args.run_dir)
    train = datasets.load(args.dataset, args.data_dir, "train", args.image_size, args.rho)  # the same images for each --seed
    num_classes = len(train.classes)

    # The network that learns, and its moving average, which samples.
    torch.manual_seed(args.seed)
    model = UNet(num_classes, args.channels, args.multipliers, args.blocks, args.attention_level, args.dropout).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    weights, ema_weights = [w.detach() for w in model.parameters()], list(ema.parameters())
    parameters = sum(w.numel() for w in weights)
    # Fused: one kernel updates all weights.
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, args.beta2), fused=device.type in ("cuda", "cpu"))
    batches = datasets.Batches(train, args.batch_size, args.resample, flip=True, device=device, seed=args.seed)
    sums, logged = torch.zeros(4, device=device), 0  # losses and gradient norm since the last line of the log; how many
    start = 0

    # Resume the run that this directory holds; or start from another run's averaged weights (Table 2); or from nothing.
    checkpoint_file, log_file = run_dir / "checkpoint.pt", run_dir / "log.jsonl"
    on_device = getattr(torch, device.type)  # torch.cpu, torch.cuda or torch.mps
    place = [device] if device.type == "cuda" else []  # which of several GPUs; torch.mps has one
    if checkpoint_file.exists():
        state = load_checkpoint(checkpoint_file, "cpu")
        check_same_run(args, state["settings"], run_dir)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type in state["rng"] and device.type != "cpu":
            on_device.set_rng_state(state["rng"][device.type], *place)
        start, sums, logged = state["step"], state["sums"].to(device), state["logged"]
        del state  # a second copy of everything
    elif args.eval_only:
        fail(f"--eval-only: there is no checkpoint in {run_dir}")
    elif args.init_from:
        source = load_checkpoint(args.init_from, device)
        for name in ("prediction", "noise_schedule"):
            if source["settings"][name] != getattr(args, name):
                fail(f"--init-from {args.init_from}: that run has another --{name.replace('_', '-')}")
        if source["ema"]["label.weight"].shape != model.label.weight.shape:  # other classes: their table is drawn anew
            source["ema"]["label.weight"] = model.label.weight
        try:
            model.load_state_dict(source["ema"])
            ema.load_state_dict(source["ema"])
        except RuntimeError as error:
            raise InputError(f"--init-from {args.init_from}: a network of another size") from error
    print(f"{'DDPM' if args.tau == 0 else 'CBDM'} on {args.dataset}: {len(train.labels)} images of {num_classes} classes, "
          f"{int(train.counts.max())} to {int(train.counts.min())} a class; {parameters:,} parameters; {device}"
          f"{', bf16' if amp else ''}; {run_dir}" + (f"; resumed at step {start}" if start else ""), flush=True)

    net, ema_net = (torch.compile(model), torch.compile(ema)) if args.compile else (model, ema)
    q_Y = label_distribution(train.counts, args.label_set)
    alpha_bar = noise_schedule(args.noise_schedule)
    B = args.batch_size

    def check_finite(step):
        if not torch.isfinite(sums).all():
            kept = f"the last good checkpoint, {checkpoint_file}, is kept" if checkpoint_file.exists() else "nothing was saved"
            kind = "NaN" if sums.isnan().any() else "infinite"
            fail(f"loss or gradient became {kind} shortly before step {step}; {kept}; try a lower --lr")

    def save_checkpoint(step):
        check_finite(step)
        rng = {"cpu": torch.get_rng_state()} | ({device.type: on_device.get_rng_state(*place)} if device.type != "cpu" else {})
        state = dict(step=step, settings=vars(args), model=model.state_dict(), ema=ema.state_dict(), sums=sums, logged=logged,
                     optimizer=optimizer.state_dict(), batches=batches.state_dict(), rng=rng)
        with atomic_write(checkpoint_file) as file:
            torch.save(state, file)

    def draw_grid(step):
        order = torch.from_numpy(datasets.head_to_tail(train.counts))
        rows = order[torch.linspace(0, num_classes - 1, min(num_classes, GRID_ROWS)).round().long()]
        # The same noise for each grid. Row by row on a CPU, whose memory is small.
        y = rows.repeat_interleave(GRID_COLUMNS).split(GRID_COLUMNS if device.type == "cpu" else GRID_ROWS * GRID_COLUMNS)
        images = torch.cat([sample(ema_net, part, args, amp, args.seed + i, "ddim") for i, part in enumerate(y)])
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
            config = {"settings": vars(args), **environment(device), "bf16": amp, "parameters": parameters}
            file.write(json.dumps(config, indent=2).encode())
        signal.signal(signal.SIGINT, ask_to_stop)
        signal.signal(signal.SIGTERM, ask_to_stop)
        model.train()
        began = last = time.monotonic()
        last_step = start
        with open(log_file, "a") as log, tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True) as bar:
            for step in range(start, args.steps):
                # Alg. 1, lines 2 to 4: images, noise, a step for each. t and y' are drawn on the CPU, where the schedule is.
                x_0, y = next(batches)
                t = torch.randint(0, T, (B,))
                eps = torch.randn_like(x_0)
                x_t = q_sample(x_0, t, eps, alpha_bar)
                target = eps if args.prediction == "eps" else velocity(x_0, t, eps, alpha_bar)
                # Guidance needs a prediction without label, so some images lose theirs (§3.3).
                dropped = torch.rand(1 if args.drop_whole_batch else B) < args.drop_rate
                labelled = like(y, ~dropped.expand(B)).bool()
                y = torch.where(labelled, y, NO_LABEL)

                t = like(y, t)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    if args.tau == 0 or step < args.regularise_after * args.steps:
                        h = net(x_t, t, y)
                        L_r = L_rc = torch.zeros((), device=device)
                    else:
                        # Line 6: one random label for each image, |Y| = 1; it may equal y.
                        y_prime = like(y, torch.multinomial(q_Y, B, replacement=True))
                        if args.gamma > 0:  # both predictions in one pass of 2 B, each with its own dropout mask
                            h, h_prime = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, y_prime])).chunk(2)
                        else:  # nothing is learnt through h'
                            h = net(x_t, t, y)
                            with torch.no_grad():
                                h_prime = net(x_t, t, y_prime)
                        L_r, L_rc = regularisers(h, h_prime[None], t, args.tau, labelled)  # lines 7 to 10
                    L_DM = ddpm_loss(h, target)  # line 5
                loss = L_DM + L_r + args.gamma * L_rc  # line 11, Eq. 4

                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # C
                optimizer.step()
                optimizer.zero_grad()  # here, so that the next forward pass has their memory
                # EMA in one call for all weights: ema <- ema + (1 - decay) (weights - ema), from the first step on (C).
                torch._foreach_lerp_(ema_weights, weights, 1 - args.ema)

                sums += torch.stack([L_DM.detach(), L_r.detach(), L_rc.detach(), norm])
                logged += 1
                done = step + 1
                bar.update()
                if done % LOG_EVERY == 0 or done == args.steps:
                    check_finite(done)
                    row = dict(zip(("L_DM", "L_r", "L_rc", "gradient_norm"), (sums / logged).tolist(), strict=True))
                    rate = (done - last_step) / (time.monotonic() - last)
                    log.write(json.dumps({"step": done, **row, "lr": learning_rate(step, args), "images": done * B,
                                          "steps_per_second": round(rate, 3)}) + "\n")
                    log.flush()
                    last, last_step = time.monotonic(), done
                    bar.set_postfix_str(", ".join(f"{k} {v:.4f}" for k, v in row.items()), refresh=False)
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

        labels = (torch.arange(args.eval_images) % num_classes).sort().values  # balanced to within one image
        images = sample_all(run_dir / "samples.npz", ema_net, labels, args, amp, start)
        try:
            result = metrics.evaluate(images, labels, args.dataset, args.data_dir, args.features, args.reference, args.rho,
                                      args.image_size, device=device, scores=args.scores)
        except InputError as error:  # most often: no weights for the features, and no network to get them
            print(f"{run_dir / 'samples.npz'} is written but not scored: {error}. Then the same command goes on from here.")
            return
        metrics.write_scores(result, run_dir)
        print(metrics.format_table(result))


if __name__ == "__main__":
    run_command(main)
