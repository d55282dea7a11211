"""CBDM: Class-Balancing Diffusion Models (Qin, Zheng, Yao, Zhou, Zhang; CVPR 2023).

A class-conditional diffusion model that has seen five images of a class repeats those five, or
produces images of other classes. CBDM is the usual DDPM with one more term (Eq. 4). For an image
x_t of class y the network is asked a second time, with a random label y', and the two predictions
are pulled together, more strongly the noisier x_t is. Our intuition: the noisy steps fix
composition and colour, which classes can share; in the last steps, which tell classes apart, the
pull is weak.

    python cbdm.py --dataset shapeslt                     # first look: drawn shapes, a CPU, minutes
    python cbdm.py --dataset cifar100lt                   # the paper's run (Table 1)
    python cbdm.py --dataset cifar100lt --tau 0           # the baseline: DDPM with guidance
    python cbdm.py --dataset cifar100lt --tau 0 --resample uniform      # RS; sqrt is RS-SQRT
    python cbdm.py --dataset cifar100lt --label-set sqrt  # Table 2; also bal
    python cbdm.py --dataset cifar100lt --steps 50000 --guidance 2 --init-from BASELINE/checkpoint.pt
                                                          # Table 2, fine-tuning (A; it has y' uniform)
    python cbdm.py --dataset cifar100lt --augment ada     # Table 1; also diffaug
    python cbdm.py --dataset cifar100lt --prediction edm --augment ada  # Table 5; also --backbone vit
    python cbdm.py --dataset cifar100lt --eval-only --sampler ddim      # Table 6; overwrites samples, scores
    python cbdm.py --dataset cifar100lt --eval-only --sampler dpm --ddim-steps 20     # the cheapest; ours
    python cbdm.py --dataset cifar100lt --eval-only --guidance 0 0.8 1.6      # Fig. 6: each is scored
    python cbdm.py --dataset folder:PATH --image-size 64  # your own images, settings that fit them
    python cbdm.py --dataset folder:PATH --image-size 64 --eval-only --export DIR --classes A,B
                                                          # pictures of rare classes, for a training set

P's FIDs in Table 1: 7.38 for DDPM, 6.26 for CBDM. Its other columns: --scores fid,is,pr,prd; all
rows of all tables: .results/tables.md. Each command resumes the run that it finds in its run
directory: bit for bit on the CPU with the same number of threads; on a GPU with the same data and
noise, up to rounding.
Cost: shapeslt 5 minutes on two CPU cores. cifar100lt takes 11 s a step there, over a month in all: a
GPU's work. It has never been run in full.

P is the paper and A the authors' code (github.com/qym7/CBDM-pytorch). From A, because P does not
say: gradients clipped at norm 1, averaged weights (EMA) for sampling, horizontal flips, dropout
0.1, the sizes of the U-Net. Where we differ:
  * t takes T = 1000 values, 0 .. 999, as in A; Alg. 1 writes {0 .. T}, which would be 1001. The
    noise of our step t is P's alpha_bar_(t + 1).
  * The regulariser's weight is tau t, from 0 to 0.999, with our t and P's tau = 0.001; A writes
    t/T * 1.0, the same number.
  * A label is dropped (for guidance) per image; A drops those of a whole batch at once. Before
    clipping the expected gradient is the same; it varies less. `--drop-whole-batch` does as A.
  * Images whose label is dropped have no regulariser, as in A; P does not say.
  * Squared norms are means over pixels, as in A; P's sums would change what clipping at norm 1
    means.
  * Warm-up is 5000 steps, as in A; P says epochs, which would be longer than the whole training.
  * y' comes from the training distribution by default, as in A's runs from scratch; P leaves q*_Y
    open (Table 2).
  * x_0 is not clipped while sampling: A computes a clipped one but never uses it. `--clip-x0` does.
  * Samples have exactly balanced labels; A draws them at random (500 +- 22 a class).
  * The output convolution of an attention block starts near zero, as in DDPM (Ho et al. 2020); in A
    the enclosing block initialises it again, at full scale.
  * bfloat16 where the hardware has it (`--amp off` for A's float32), fused Adam, both labels in one
    forward pass.
Eq. 2 and the propositions argue for Eq. 3; nothing of them is computed. |Y| is 1, as in Alg. 1.
"""

import argparse
import copy
import functools
import hashlib
import json
import math
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import datasets
from datasets import InputError, at_least, decay, due, fail, my_share, not_negative, to_device

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------
T = 1000  # diffusion steps, P §4.1

# What differs from data set to data set. P: the paper. A: the authors' README, config files, flags.
CIFAR100LT = dict(
    image_size=32, flip=True,  # A
    steps=300_000, regularise_after=0.0, batch_size=48,  # A, README (P: "appropriate epochs")
    lr=2e-4, beta2=0.999, warmup=5_000, lr_schedule="constant",  # P §4.1, A
    ema=0.9999, dropout=0.1,  # A
    channels=128, multipliers=[1, 2, 2, 2], blocks=2, attention_level=1,  # A, the U-Net of DDPM
    prediction="eps", noise_schedule="linear",  # P §3.1, §4.1
    guidance=1.6,  # P §4.1, read in the order of Table 1; A's README says 1.6 too
    sampler="ancestral", ddim_steps=100, clip_x0=False,  # A; DDIM: P Table 6
    eval_images=50_000,  # P §4.1
    sample_every=10_000, save_every=2_000,
)
BALANCED = CIFAR100LT | dict(steps=800_000, batch_size=128, guidance=0.8)  # A, config files; P §4.1
RECIPES = {
    "cifar100lt": CIFAR100LT,
    # CHOICE: steps and batch of CIFAR100-LT, which has nearly as many images; P and A give none.
    "cifar10lt": CIFAR100LT | dict(guidance=1.0),  # P §4.1
    "cifar100": BALANCED,
    "cifar10": BALANCED,
    # Ours: sized for two CPU cores and a few minutes. The regulariser doubles the cost of a step, so
    # it fine-tunes a DDPM, as in the second block of Table 2, here for the last tenth of one run. The
    # scores hardly move by it; with --regularise-after 0 (Alg. 1 as it is) they do, see the README.
    "shapeslt": CIFAR100LT | dict(
        image_size=16, steps=2600, regularise_after=0.9, batch_size=32,
        lr=3e-3, beta2=0.99, warmup=100, lr_schedule="cosine", ema=0.995, dropout=0.0,
        channels=32, multipliers=[1, 1, 2], blocks=1, attention_level=2,
        prediction="v", noise_schedule="cosine",
        guidance=2.0, sampler="ddim", ddim_steps=25, clip_x0=True,
        eval_images=500, sample_every=650, save_every=325,
    ),
}
RECIPES["shapes"] = RECIPES["shapeslt"]
# What a flag changes, and what it changes on CIFAR*-LT, whose lengths these are, besides.
WITH = {
    "ada": dict(flip=False),  # ADA mirrors by itself, and says so
    "edm": dict(sampler="heun", ddim_steps=18),  # Karras et al. 2022
    "vit": dict(dropout=0.0),  # as all below: sndnyang/Diffusion_ViT, 500 epochs, ten of them warm-up
}
LT = ("cifar100lt", "cifar10lt")
WITH_ON_LT = {
    "ada": dict(steps=500_000, guidance=1.4),  # A, README
    "edm": dict(guidance=0.0),  # CHOICE: as Karras et al.; P does not say
    "vit": dict(noise_schedule="cosine", clip_x0=True, batch_size=128, steps=42_400, lr=1e-3, warmup=850,
                lr_schedule="cosine", ema=0.999),
}
# Ours, for your own images: a quarter of the paper's width. The lowest level has 8 to 15 pixels a side.
# As many epochs as the paper's run, 1,330 (300,000 steps of 48 among 10,847 images), but 10,000 to
# 300,000 steps: 10,000 for 200 images, 83,100 for 2,000. Fewer never get beyond blobs. A constant
# rate, so that --steps can be raised later.
RECIPES["folder"] = CIFAR100LT | dict(
    batch_size=32, lr=5e-4, warmup=500, ema=0.999, channels=32, prediction="v", noise_schedule="cosine",
    guidance=1.5, sampler="dpm", ddim_steps=20, clip_x0=True, eval_images=2_000, save_every=250)
FREE = datasets.FREE | {"guidance", "sweep", "sampler", "ddim_steps", "clip_x0", "class_grid", "beside"}


def parse_settings(argv=None):
    """The command line as a namespace; what is not given comes from the table of the data set."""
    first = datasets.first_flags(argv, tau=float, augment=str, prediction=str, backbone=str)
    dataset = first.dataset or "cifar100lt"
    recipe = "folder" if dataset.startswith("folder:") else dataset if dataset in RECIPES else "cifar100lt"
    name = first.recipe or recipe  # an unknown one is refused below
    defaults = RECIPES.get(name, CIFAR100LT) | dict(dataset=dataset, recipe=recipe)
    if name == "folder":
        levels = max(1, int(math.log2((first.image_size or 32) / 4)))  # 3 at 32 to 63 pixels
        defaults |= dict(multipliers=[max(1, 4 >> i) for i in reversed(range(levels))],
                         attention_level=max(0, levels - 2))
        defaults |= datasets.folder_settings(first, 32, epochs=1_330, low=10_000, high=300_000)
    for flag in (first.augment, first.prediction, first.backbone):
        defaults |= WITH.get(flag, {}) | (WITH_ON_LT.get(flag, {}) if name in LT else {})
    if first.tau == 0 and dataset == "cifar100lt" and first.prediction != "edm":
        defaults["guidance"] = 0.8  # A, README, for the baseline; P tunes omega for each model
    if dataset in datasets.LONG_TAILED:
        defaults["rho"] = datasets.DEFAULT_RHO  # P: 100

    parser = datasets.settings_parser(f"Class-Balancing Diffusion Models; defaults: {dataset}'s")
    add = parser.add_argument_group("method").add_argument
    add("--recipe", choices=RECIPES, help="whose defaults to take")
    add("--tau", type=not_negative, default=0.001, help="weight of the regulariser, P §4.3; 0 is DDPM")
    add("--gamma", type=not_negative, default=0.25, help="weight of the commitment term, P §3.3")
    add("--label-set", choices=("train", "bal", "sqrt"), default="train",
        help="where y' comes from, Table 2")
    add("--regularise-after", type=decay, help="share of the steps that are plain DDPM first; 0: Alg. 1")
    add("--drop-rate", type=datasets.share, default=0.1, help="share of images without a label, P §3.3")
    add("--drop-whole-batch", action="store_true", help="drop the labels of whole batches, A")
    add("--resample", choices=("data", "uniform", "sqrt"), default="data",
        help="class distribution of the training images; with --tau 0 uniform is RS, sqrt RS-SQRT (Table 1)")
    add("--augment", choices=("none", "diffaug", "ada"), default="none", help="of training images, Table 1")
    add("--soft-labels", metavar="NPZ", type=datasets.existing_file,
        help="soft_labels.npz of a run of softlabel_gan.py: an image has the mean of the classes' "
        "embeddings; with --tau 0 Table 7 of that paper")
    add("--prediction", choices=("eps", "v", "edm"),
        help="what the network predicts; v: ours, for short runs; edm: Table 5")
    add("--noise-schedule", choices=("linear", "cosine"), help="linear: P §4.1; edm has its own")
    add("--guidance", type=datasets.finite, nargs="+", help="omega, P §4.1; each is scored (Fig. 6)")
    add("--sampler", choices=("ancestral", "ddim", "dpm", "heun"),
        help="ancestral takes all 1000 steps; heun: edm's only one")
    add("--ddim-steps", type=datasets.number(int, lambda v: 2 <= v <= T, f"2 to {T}"),
        help="steps of the other samplers, also for the grids drawn during training")
    add("--clip-x0", action=argparse.BooleanOptionalAction, help="clip x_0 to [-1, 1] in each sampling step")
    add("--class-grid", metavar="CLASS", help="with --eval-only: draw this class and nothing else, a "
        "column for each --guidance, a row for this run and for each of --beside (Fig. 7)")
    add("--beside", metavar="CHECKPOINT", type=datasets.existing_file, nargs="+", default=[],
        help="of other runs, for --class-grid")
    add = parser.add_argument_group("network and optimiser").add_argument
    add("--backbone", choices=("unet", "vit"), default="unet", help="vit: Diffusion-ViT, Table 5")
    add("--channels", type=at_least(1), help="width of the first level; of a ViT a third of its width")
    add("--multipliers", type=at_least(1), nargs="+", help="width of each level, in units of --channels")
    add("--blocks", type=at_least(1), help="residual blocks a level")
    add("--attention-level", type=at_least(0), help="the level with self-attention, counted from 0")
    add("--dropout", type=decay, help="inside the residual blocks")
    add("--beta2", type=decay, help="of Adam: decay of its average of squared gradients")
    add("--warmup", type=at_least(0), help="steps over which the rate rises linearly from 0")
    add("--lr-schedule", choices=("constant", "cosine"), help="after the warm-up")
    add("--init-from", metavar="CHECKPOINT", type=datasets.existing_file,
        help="start from another run's averaged weights (fine-tuning)")
    args = datasets.read_settings(parser, argv, "cbdm", defaults, FREE)

    args.sweep = args.guidance if isinstance(args.guidance, list) else [args.guidance]
    args.guidance = args.sweep[0]
    if (args.sampler == "heun") != (args.prediction == "edm"):
        fail(f"--sampler {args.sampler} --prediction {args.prediction}: heun and edm go together")
    if args.class_grid and not args.eval_only:
        fail("--class-grid draws from a run that is trained: add --eval-only")
    if args.backbone == "vit" and args.image_size % PATCHES:
        fail(f"--image-size {args.image_size}: a ViT needs a multiple of {PATCHES}")
    if args.beside and not args.class_grid:
        fail("--beside is for --class-grid")
    levels = len(args.multipliers)
    if args.attention_level >= levels:
        fail(f"--attention-level {args.attention_level}: {levels} levels are 0 to {levels - 1}")
    if args.image_size % 2 ** (levels - 1):
        fail(f"--image-size {args.image_size}: {levels} levels need a multiple of {2 ** (levels - 1)}")
    if args.channels % 4:
        fail(f"--channels {args.channels}: not a multiple of 4, the channels in a group of GroupNorm")
    return args


# --------------------------------------------------------------------------------------------------
# The paper's equations
# --------------------------------------------------------------------------------------------------
# x_0     (B, 3, H, W) images, in [-1, 1]          y       (B,) int64, their classes
# t       (B,) int64, step 0 .. T-1                y'      (B,) int64, random classes
# eps     (B, 3, H, W), the noise in x_t           h       (B, 3, H, W), eps_theta(x_t, y, t)
# x_t     (B, 3, H, W), x_0 after t steps          h'      (B, 3, H, W), eps_theta(x_t, y', t)
#         (with --prediction v, h and h' are velocities; with edm see there)
# tau     weight of the regulariser                gamma   weight of its commitment term
# omega   guidance strength                        q_Y     (K,), the paper's q*_Y
# B is the paper's N. alpha_bar (T,) is the noise schedule; index t here is the paper's step t + 1.
NO_LABEL = -1  # the paper's y = None


def noise_schedule(kind):
    """alpha_bar (T,) float64: the share of the variance of x_t that is still signal.

    "linear": beta_t from 1e-4 to 0.02, P §4.1; alpha_bar falls from 0.9999 to 0.00004.
    "cosine": Nichol & Dhariwal 2021, Eq. 17, where images are small. CHOICE: the linear one leaves
    small images as pure noise for many of its steps.
    """
    if kind == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        s = 0.008
        u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0)


def coefficients(t, alpha_bar, like):
    """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t): (B, 1, 1, 1) each, device and type of `like`."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return tuple(to_device(x.sqrt().to(like.dtype), like.device) for x in (a, 1 - a))


def q_sample(x_0, t, eps, alpha_bar):
    """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), §3.1."""
    signal, noise = coefficients(t, alpha_bar, x_0)
    return signal * x_0 + noise * eps


def velocity(x_0, t, eps, alpha_bar):
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, the target with --prediction v.

    Salimans & Ho 2022; not in the paper. At pure noise an error in eps is multiplied by
    1 / sqrt(alpha_bar) on its way to x_0, up to 157 (linear) or 20,000 (cosine), and a network that
    trains for minutes never becomes that exact; an error in v is not multiplied. Both halves of
    Eq. 4 are then distances between velocities: at each t their ratio stays the paper's.
    """
    signal, noise = coefficients(t, alpha_bar, x_0)
    return signal * eps - noise * x_0


def ddpm_loss(h, target, absolute=False):
    """Eq. 1: || eps - eps_theta(x_t, y, t) ||^2, the mean over images and pixels. Scalar.

    target: eps, or the velocity, or EDM's F. absolute: |.| instead, which Diffusion-ViT learns with.
    """
    return (target - h).abs().mean() if absolute else (target - h).square().mean()


def regularisers(h, h_prime, t, tau, labelled):
    """The second half of Eq. 4 with |Y| = 1 (Alg. 1, lines 7 to 10). Two scalars, L_r and L_rc:

        L_r  = tau t || h - sg(h') ||^2   tau times Eq. 3: moves the prediction for the own label
        L_rc = tau t || sg(h) - h' ||^2   moves the prediction for the random label ("commitment")

    labelled (B,) bool: False where the label was dropped; such an image has no regulariser but
    counts in the mean. sg is the stop-gradient, which keeps the network from ignoring its label
    (§3.3). The two terms have the same value; sg gives the pull on h' a weight of its own, gamma.
    """
    # (B,): for tau = 0.001 from 0 (almost the image) to 0.999 (noise).
    # TRY: T / 2 instead of t: the same average pull, but also where x_t is almost the image.
    weight = tau * t.to(h.dtype) * labelled

    def distance(a, b):
        return (weight * (a - b).square().mean(dim=(1, 2, 3))).mean()

    # TRY: remove both detach(). Each term then moves both predictions; gamma only scales the sum.
    return distance(h, h_prime.detach()), distance(h.detach(), h_prime)


def label_distribution(counts, label_set):
    """q*_Y, the distribution of y' (§4.2): (K,) float64, sums to 1. counts (K,): images n_k.

    "train" n_k, "bal" uniform, "sqrt" sqrt(n_k): on CIFAR100-LT head / tail is 100, 1 and 10.
    """
    power = {"train": 1.0, "bal": 0.0, "sqrt": 0.5}[label_set]  # TRY: "bal": -1.0, rare labels most
    weight = counts.double() ** power
    return weight / weight.sum()


def guided(eps_y, eps_none, omega):
    """Guidance, §3.1: (1 + omega) eps_theta(x_t, y, t) - omega eps_theta(x_t, t)."""
    return (1 + omega) * eps_y - omega * eps_none


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------
class Conditional(nn.Module):
    """A network that is told t, y and, with ADA, how the image was augmented: embeddings, summed."""

    def __init__(self, num_classes, channels, width, ada):
        super().__init__()
        f = torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000) / channels))
        self.register_buffer("frequencies", f, persistent=False)
        self.time = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes, width)
        self.augmented = nn.Linear(datasets.ADA_CONDITIONS, width, bias=False) if ada else None

    def waves(self, t):
        """sin(t f_0), cos(t f_0), sin(t f_1), ... with f_i = 10000^(-2i / channels): (B, channels)."""
        angle = t[:, None] * self.frequencies
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)

    def embedding(self, t, y, augmented):
        """t (B,); y (B,) classes or NO_LABEL, or (B, K) soft labels, 0: none; augmented (B, 9) or None."""
        # Without a label nothing is added: the table has no row for "none".
        if y.is_floating_point():  # the mean of the embeddings
            with torch.autocast(y.device.type, enabled=False):
                label = y @ self.label.weight
        else:
            label = self.label(y.clamp(min=0)) * (y != NO_LABEL)[:, None]
        total = self.time(self.waves(t)) + label
        return total if augmented is None else total + self.augmented(augmented)


# The U-Net of DDPM (Ho et al. 2020) with a label embedding. At the paper's size 35,797,507
# parameters for 100 classes, 12.4 GFLOP for a 32 x 32 image and a forward pass.
class SelfAttention(nn.Module):
    """Every pixel attends to every pixel, one head. (B, C, H, W) -> the same."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (datasets.laid_out(f(h)).flatten(2) for f in (self.q, self.k, self.v))  # (B, C, HW)
        # Written out: at 256 pixels it is twice as fast on a CPU as F.scaled_dot_product_attention.
        scores = q.transpose(1, 2) @ k * q.shape[1] ** -0.5
        attention = scores.softmax(dim=2)  # (B, HW, HW), rows sum to 1
        return x + self.out((v @ attention.transpose(1, 2)).view_as(x))


class ResidualBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W). The embedding of t and y is a bias for each channel."""

    def __init__(self, width_in, width_out, embedding, dropout, groups, attention):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.embed = nn.Linear(embedding, width_out)
        self.norm2 = nn.GroupNorm(groups, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        same = width_in == width_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1)
        self.attention = SelfAttention(width_out, groups) if attention else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x))) + self.embed(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class UNet(Conditional):
    """eps_theta: x_t (B, 3, H, W), t (B,), y (B,) int64 or NO_LABEL -> (B, 3, H, W) float32."""

    def __init__(self, num_classes, channels, multipliers, blocks, attention_level, dropout, ada=False):
        E = 4 * channels  # width of the embedding
        super().__init__(num_classes, channels, E, ada)

        # 4 channels a group at the first level: the 32 groups of DDPM at 128 channels. In a network
        # of 32 channels, 32 groups would normalise each channel alone and lose an image's colour.
        groups = channels // 4
        block = functools.partial(ResidualBlock, embedding=E, dropout=dropout, groups=groups)
        width = channels
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width]  # channels of each output that is kept for the way up
        for level, multiplier in enumerate(multipliers):
            attend = level == attention_level
            for _ in range(blocks):
                self.down.append(block(width, multiplier * channels, attention=attend))
                width = multiplier * channels
                skips.append(width)
            if level < len(multipliers) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        middle = (block(width, width, attention=attend) for attend in (True, False))
        self.middle = nn.ModuleList(middle)
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            attend = level == attention_level
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), multiplier * channels, attention=attend))
                width = multiplier * channels
            if level > 0:
                conv = nn.Conv2d(width, width, 3, padding=1)
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv))
        last = nn.Conv2d(width, 3, 3, padding=1)
        self.tail = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), last)
        self.initialise()

    def initialise(self):
        """Xavier-uniform weights, zero biases; the label table keeps PyTorch's N(0, 1).

        The output starts near zero, and so does each branch that is added to its input.
        """
        blocks = [m for m in self.modules() if isinstance(m, ResidualBlock)]
        attentions = [m for m in self.modules() if isinstance(m, SelfAttention)]
        near_zero = {self.tail[2], *(m.conv2 for m in blocks), *(m.out for m in attentions)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module is not self.augmented:
                gain = 1e-5 if module in near_zero else 1.0
                nn.init.xavier_uniform_(module.weight, gain)
                nn.init.zeros_(module.bias)

    def forward(self, x, t, y, augmented=None):
        embedding = F.silu(self.embedding(t, y, augmented))
        h = self.head(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if isinstance(layer, ResidualBlock):
                h = layer(torch.cat([h, skips.pop()], 1), embedding)
            else:
                h = layer(h)
        return self.tail(h).to(x.dtype)  # float32 also under autocast


# Diffusion-ViT (GenViT: Yang et al. 2022, sndnyang/Diffusion_ViT), unconditional there; P adds an
# embedding of the label. At 32 x 32 pixels 11.2 million parameters for 100 classes. The regulariser is
# the U-Net's, a squared distance, though L_DM is an absolute one there (`ddpm_loss`). Where we
# differ: Adam without decay of weights, loss not times 100 (clipping bites less), PyTorch's initial
# weights and biases of q, k, v, sampling as for the U-Net.
PATCHES = 8  # a side


class TransformerLayer(nn.Module):
    """(B, tokens, width) -> the same. The embedding scales and shifts each token first."""

    def __init__(self, width, tokens, embedding, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.embed = nn.Linear(embedding, 2 * tokens)
        self.attention = nn.MultiheadAttention(width, max(1, width // 32), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(2 * width, width))  # fmt: skip

    def forward(self, x, embedding):
        scale, shift = self.embed(embedding)[:, :, None].chunk(2, dim=1)  # (B, tokens, 1)
        x = x * (1 + scale) + shift
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(Conditional):
    """The same arguments and answers as those of UNet. 8 x 8 patches and one more token, nine layers."""

    def __init__(self, num_classes, channels, image_size, dropout, ada=False, depth=9):
        width, tokens = 3 * channels, PATCHES**2 + 1
        super().__init__(num_classes, width, 4 * tokens, ada)
        patch = image_size // PATCHES
        self.head = nn.Conv2d(3, width, patch, stride=patch)
        self.extra = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        layers = (TransformerLayer(width, tokens, 4 * tokens, dropout) for _ in range(depth))
        self.layers = nn.ModuleList(layers)
        self.tail = nn.Linear(width, 3 * patch**2)  # without a norm, which would undo the last shifts
        self.to_image = nn.PixelShuffle(patch)

    def forward(self, x, t, y, augmented=None):
        embedding = F.silu(self.embedding(t, y, augmented))
        h = datasets.laid_out(self.head(x)).flatten(2).transpose(1, 2)  # (B, 64, width)
        h = torch.cat([self.extra.expand(len(x), -1, -1), h], 1) + self.place
        for layer in self.layers:
            h = layer(h, embedding)
        h = self.tail(h[:, 1:]).transpose(1, 2).unflatten(2, (PATCHES, PATCHES))
        return self.to_image(h).to(x.dtype)


def build_network(args, num_classes):
    ada = args.augment == "ada"
    if args.backbone == "vit":
        return ViT(num_classes, args.channels, args.image_size, args.dropout, ada)
    shape = args.channels, args.multipliers, args.blocks, args.attention_level
    return UNet(num_classes, *shape, args.dropout, ada)


# --------------------------------------------------------------------------------------------------
# EDM (--prediction edm, Table 5)
# --------------------------------------------------------------------------------------------------
# Karras et al. 2022: what the network sees, answers and learns, and another sampler, around the U-Net
# and with the settings of the other runs. EDM itself has another network (56 million parameters),
# rate (1e-3), batch (512) and length (200 million images), no clipping of gradients, and augments
# (--augment ada). P "strictly follows" it, whatever that includes.
SIGMA_DATA = 0.5  # as all numbers here: theirs


def edm_sigma(t):
    """EDM's noise levels sigma (B,) float64, x_t = x_0 + sigma eps, of t (B,) int64, uniform as ever.

    ln sigma ~ N(-1.2, 1.2^2), drawn by its quantiles: t is their rank, in thousandths. So tau t weighs
    the noisier half of the images as it does in DDPM; Karras et al. know no t, and P does not say.
    """
    rank = (t + torch.rand(len(t), dtype=torch.float64)) / T
    return torch.exp(1.2 * torch.special.ndtri(rank) - 1.2)


def edm_coefficients(sigma):
    """c_skip, c_out, c_in of the denoiser D(x) = c_skip x + c_out F(c_in x), F the network."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total**0.5, total**-0.5


def edm_pair(x_0, sigma, eps):
    """What F sees and what it should answer: c_in x_t, and the F for which D(x_t) is x_0.

    EDM's loss weighs || D - x_0 ||^2 with 1 / c_out^2: that is || F - target ||^2. With the same
    weight the regulariser is the distance between two answers of F, as between two eps in DDPM.
    """
    skip, out, scale = edm_coefficients(sigma)
    x_t = x_0 + sigma * eps
    return scale * x_t, (x_0 - skip * x_t) / out


def heun(denoised, x, steps):
    """EDM's sampler (their Alg. 1): the image from x at sigma = 80.

    denoised(x, sigma): D. In sigma the ODE is dx / dsigma = (x - D) / sigma. Each step goes down to
    the next level as Euler would, and once more with the mean of the slopes at both ends: second
    order, for 2 steps - 1 calls.
    """
    rho, place = 7, torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (80 ** (1 / rho) + place * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    for sigma, lower in pairwise([*sigmas.tolist(), 0.0]):
        slope = (x - denoised(x, sigma)) / sigma
        euler = x + (lower - sigma) * slope
        if lower > 0:
            slope = (slope + (euler - denoised(euler, lower)) / lower) / 2
        x = x + (lower - sigma) * slope
    return x


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
def predict_x_0(x_t, h, t, prediction, clip, alpha_bar):
    """The image in x_t if h is its noise ("eps"), or its velocity ("v"). t: int."""
    a = alpha_bar[t].item()
    x_0 = (x_t - (1 - a) ** 0.5 * h) / a**0.5 if prediction == "eps" else a**0.5 * x_t - (1 - a) ** 0.5 * h
    return x_0.clamp(-1, 1) if clip else x_0


# Each step takes x_t and the image x_0 predicted in it, and gives x at a smaller t.
def ancestral_step(x_t, x_0, t, z, alpha_bar):
    """x_{t-1} ~ N(mean of q(x_{t-1} | x_t, x_0), beta_t I). Ho et al. 2020, Alg. 2.

    z: standard normal. The variance is beta_t ("fixed large"), as in A; the posterior's own would
    be smaller. The last step adds no noise.
    """
    a = alpha_bar[t].item()
    a_prev = alpha_bar[t - 1].item() if t > 0 else 1.0
    alpha = a / a_prev  # 1 - beta_t
    mean = (a_prev**0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - a_prev) * x_t) / (1 - a)
    return mean + (1 - alpha) ** 0.5 * z if t > 0 else mean


def ddim_step(x_t, x_0, t, t_prev, alpha_bar):
    """x at t_prev < t (-1: the image). DDIM with eta = 0: Song et al. 2021, Eq. 12."""
    a = alpha_bar[t].item()
    a_prev = alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
    eps_hat = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5
    return a_prev**0.5 * x_0 + (1 - a_prev) ** 0.5 * eps_hat


def log_snr(alpha_bar):
    """lambda (T,) = log(signal / noise): falls over t, in steps of very different size."""
    return (alpha_bar / (1 - alpha_bar)).log() / 2


def dpm_step(x_t, x_0, before, t, t_prev, alpha_bar):
    """x at t_prev < t (-1: the image). DPM-Solver++(2M): Lu et al. 2022b, Alg. 2.

    before: (t, x_0) of the step before, or None. In lambda the ODE of sampling is linear in x_t but
    for the predicted image. DDIM takes that for constant over a step; here it is extrapolated from
    the step before, so the error falls with the square of the steps. The last step is DDIM's, for
    at the image lambda is infinite.
    """
    if t_prev < 0:
        return x_0
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    log_ratio = log_snr(alpha_bar)
    h = (log_ratio[t_prev] - log_ratio[t]).item()
    if before is not None:
        t_before, x_0_before = before
        h_before = (log_ratio[t] - log_ratio[t_before]).item()
        x_0 = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
    return (noise[t_prev] / noise[t]).item() * x_t - signal[t_prev].item() * math.expm1(-h) * x_0


def sampling_times(sampler, steps, alpha_bar):
    """The steps t at which the network is asked, from the first, nearly noise, to the last."""
    if sampler == "ancestral":
        return list(reversed(range(T)))
    if sampler == "ddim":  # CHOICE, as DDIM's code: 100 steps are 990, 980 .. 0
        return [i * T // steps for i in reversed(range(steps))]
    log_ratio = log_snr(alpha_bar)  # dpm: equal steps of lambda, as its authors for small images
    first = max(log_ratio[-1].item(), -5.1)  # their bound: below it x_t is noise
    wanted = torch.linspace(first, log_ratio[0].item(), steps, dtype=torch.float64)
    nearest = (log_ratio - wanted[:, None]).abs().argmin(1)
    return nearest.unique().flip(0).tolist()  # unique: where steps are many and t is coarse


@torch.no_grad()
def sample(model, y, args, amp, seed, sampler, progress=None):
    """Images (N, 3, H, W) uint8 on the CPU, of the classes y (N,), from noise of this seed.

    model: the averaged network in eval mode. progress: a tqdm bar, advanced by one per image.
    """
    device = next(model.parameters()).device
    alpha_bar = noise_schedule(args.noise_schedule)
    generator = torch.Generator(device).manual_seed(seed)
    noise = functools.partial(torch.randn, generator=generator, device=device)
    y = y.to(device)
    shape = (len(y), 3, args.image_size, args.image_size)
    calls = 2 * args.ddim_steps - 1  # of heun
    if sampler != "heun":
        times = sampling_times(sampler, args.ddim_steps, alpha_bar)
        calls = len(times)

    def ask(x, t):
        """The network's answer, with guidance. t: a number."""
        if progress is not None:
            progress.update(len(y) / calls)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            if args.guidance == 0:  # TRY: or t > 600: guidance once the composition is settled
                return model(x, torch.full(y.shape, t, device=device), y)
            # With and without label in one pass of 2 N.
            twice = torch.cat([y, torch.full_like(y, NO_LABEL)])
            h_y, h_none = model(torch.cat([x, x]), torch.full(twice.shape, t, device=device), twice).chunk(2)
            return guided(h_y, h_none, args.guidance)

    def denoised(x, sigma):  # EDM's D
        skip, out, scale = edm_coefficients(sigma)
        x_0 = skip * x + out * ask(scale * x, math.log(sigma) / 4)
        return x_0.clamp(-1, 1) if args.clip_x0 else x_0

    if sampler == "heun":
        return datasets.to_uint8(heun(denoised, 80 * noise(shape), args.ddim_steps))
    x, before = noise(shape), None
    for t, t_prev in pairwise([*times, -1]):
        x_0 = predict_x_0(x, ask(x, t), t, args.prediction, args.clip_x0, alpha_bar)
        if sampler == "ddim":
            x = ddim_step(x, x_0, t, t_prev, alpha_bar)
        elif sampler == "dpm":
            x, before = dpm_step(x, x_0, before, t, t_prev, alpha_bar), (t, x_0)
        else:
            x = ancestral_step(x, x_0, t, noise(shape), alpha_bar)
    return datasets.to_uint8(x)


AT_ONCE = {"cuda": 250, "mps": 100, "cpu": 50}  # images of 32 x 32; the network sees twice as many
EXPORT = 1  # in their seed: pictures to --export are not the samples that are scored


def sample_grid(model, classes, args, amp):
    """Ten samples of each class (n,), the same noise for each grid: (10 n, 3, H, W) uint8."""
    device = next(model.parameters()).device
    at_once = datasets.images_at_once(AT_ONCE[device.type], args.image_size)
    y = classes.repeat_interleave(datasets.GRID_COLUMNS).split(at_once)
    mine = datasets.my_part(len(y))
    sampler = "heun" if args.prediction == "edm" else "ddim"
    parts = [sample(model, part, args, amp, args.seed + i, sampler) for i, part in list(enumerate(y))[mine]]
    empty = torch.empty(0, 3, args.image_size, args.image_size, dtype=torch.uint8)
    return datasets.collect(torch.cat([empty, *parts]))


def draw_class(model, args, amp, k, start, n):
    """--export: pictures start to start + n of class k, (n, 3, H, W) uint8."""
    seed = datasets.seed_from(EXPORT, args.seed, k, start)
    return sample(model, torch.full((n,), k), args, amp, seed, args.sampler)


def draw_class_grid(model, classes, args, amp):
    """Fig. 7: one class, the same noise everywhere. A column for each --guidance, four images wide.

    The first row is this run's, the others those of --beside, which may have other tau. A PNG.
    """
    k = datasets.class_number(args.class_grid, classes, "--class-grid")
    path = Path(args.run_dir) / "samples" / f"class-{k}.png"
    y, rows = torch.full((4,), k), []
    for checkpoint in [None, *args.beside]:
        if checkpoint:
            load_weights(model, checkpoint, args, "--beside")
        for omega in args.sweep:
            settings = argparse.Namespace(**vars(args) | {"guidance": omega})
            rows.append(sample(model, y, settings, amp, args.seed, args.sampler))
    datasets.write_grid(path, torch.cat(rows), columns=len(y) * len(args.sweep))
    print(f"wrote {path}: {classes[k]}, guidance {args.sweep}, rows {[args.run_dir, *args.beside]}")


def sample_all(model, labels, args, amp, where):
    """Samples of all labels (N,), (N, 3, H, W) uint8, kept in <where>/samples.npz, resumed from there.

    Not repeated, except with --eval-only, if settings, averaged weights and this file are the same.
    """
    at_once = datasets.images_at_once(AT_ONCE[next(model.parameters()).device.type], args.image_size)
    elsewhere = ("features", "scores", "reference", "eval_only", "run_dir", "data_dir", "sweep")
    settings = {k: v for k, v in vars(args).items() if k not in elsewhere}
    key = hashlib.sha256(json.dumps([settings, at_once]).encode() + Path(__file__).read_bytes())
    for w in model.state_dict().values():
        key.update(w.cpu().contiguous().numpy())

    def draw(y, start, bar):
        return sample(model, y, args, amp, datasets.seed_from(args.seed, start), args.sampler, bar)

    shape = (0, 3, args.image_size, args.image_size)
    return datasets.draw_in_batches(where, labels, shape, at_once, key.hexdigest(), args.eval_only, draw)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
LOGGED = ("L_DM", "L_r", "L_rc", "gradient_norm")  # Eq. 4's terms (L_rc has L_r's value), clipping


def learning_rate(step, args):
    """Linear from 0 over the warm-up, then constant (P, A) or half a cosine down to 0 (ours)."""
    if step < args.warmup:
        return args.lr * step / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def about_sampling(args, step_seconds, training_seconds):
    """How long the final samples will take, as text; what to do if that is longer than the training.

    A backward pass costs as much as two forward passes, so a step costs three, for each label.
    """
    if not args.eval_images:
        return ""
    labels = 2 if args.tau > 0 and args.regularise_after == 0 else 1
    call = step_seconds / (3 * labels * args.batch_size)  # seconds of an image
    call *= 1 if args.guidance == 0 else 2
    calls = T if args.sampler == "ancestral" else args.ddim_steps * (2 if args.sampler == "heun" else 1)
    seconds = args.eval_images * len(args.sweep) * calls * call
    text = f"; {args.eval_images:,} samples then take about {datasets.duration(seconds)}"
    if seconds > training_seconds and args.sampler == "ancestral":
        cheaper = datasets.duration(seconds / calls * 20)
        text += f", longer than the training: --sampler dpm --ddim-steps 20 takes about {cheaper}"
    return text


def load_weights(model, path, args, flag):
    """--init-from, --beside: another run's averaged weights."""
    source = datasets.load_checkpoint(path)
    if "label.weight" not in source.get("ema", {}):
        fail(f"{flag} {path}: not a checkpoint of cbdm.py")
    for name in ("prediction", "noise_schedule", "augment", "backbone"):
        if source["settings"].get(name, getattr(args, name)) != getattr(args, name):
            fail(f"{flag} {path}: that run has another --{name.replace('_', '-')}")
    weights = source["ema"]
    there, here = len(weights["label.weight"]), len(model.label.weight)
    if there != here and flag == "--init-from":  # Table 2, from CIFAR-100 to CIFAR-10-LT
        print(f"{flag} {path}: {there} classes there, {here} here; the embeddings of the classes are new")
        weights["label.weight"] = model.label.weight
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{flag} {path}: a network of another size") from error


def main(argv=None):
    args = parse_settings(argv)
    device = datasets.pick_device(args.device)
    amp = datasets.use_bf16(args.amp, device)
    run_dir = Path(args.run_dir)
    train = datasets.load(args.dataset, args.data_dir, "train", args.image_size, args.rho,
                          imbalance=args.imbalance)
    args.training_data = train.fingerprint
    soft_labels = None
    if args.soft_labels:
        from classifier import read_soft_labels  # here: one run in a hundred needs it

        soft_labels = read_soft_labels(args.soft_labels, train)["probabilities"]
        args.training_data += hashlib.sha256(soft_labels.numpy()).hexdigest()
    # Where the rate follows a cosine, or the regulariser begins later, the length shapes the whole run.
    fixed_length = args.lr_schedule == "cosine" or args.regularise_after > 0
    state = datasets.find_run(args, FREE - {"steps"} if fixed_length else FREE)

    # The network that learns, and its moving average, which samples.
    K, B = len(train.classes), args.batch_size
    torch.manual_seed(args.seed)
    model = build_network(args, K).to(device)
    if args.init_from and not state:
        load_weights(model, args.init_from, args, "--init-from")
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    average = datasets.Average(ema, model)
    fused = device.type in ("cuda", "cpu")  # one kernel updates all weights
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2), fused=fused)
    batches = datasets.Batches(train, B, args.resample, args.flip, device, args.seed, soft_labels)
    log = datasets.Log(args, LOGGED, device, functools.partial(about_sampling, args))

    # Resume the run that the directory holds.
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "batches": batches, "log": log}
    start = 0
    if state:
        datasets.restore(state, parts, device)
        start = state["step"]
    del state  # a second copy of everything
    parameters = sum(w.numel() for w in model.parameters())
    name = "DDPM" if args.tau == 0 else "CBDM"
    precision = ", bf16" if amp else ""
    resumed = f"; resumed at step {start}" if start else ""
    print(f"{name} on {args.dataset}: {train.summary}; {parameters:,} parameters; {device}{precision}; "
          f"{run_dir}{resumed}", flush=True)

    net, ema_net = (torch.compile(model), torch.compile(ema)) if args.compile else (model, ema)
    alpha_bar = noise_schedule(args.noise_schedule)
    q_Y = label_distribution(train.counts, args.label_set)
    zero = torch.zeros((), device=device)
    grid_classes = datasets.grid_classes(train.counts)
    if start < args.steps and not args.eval_only:
        datasets.write_config(args, device, bf16=amp, parameters=parameters)
        model.train()
        with datasets.stop_signals() as stop, log.open(start, args.steps):
            for step in range(start, args.steps):
                # Alg. 1, lines 2 to 4: images, a step and noise for each.
                x_0, y = next(batches)
                t = torch.randint(0, T, (B,))  # on the CPU, where alpha_bar is; the network's copy below
                eps = torch.randn_like(x_0)
                # Guidance needs a prediction without label, so some images lose theirs (§3.3).
                kept = torch.rand(1 if args.drop_whole_batch else B) >= args.drop_rate

                sigma = edm_sigma(t) if args.prediction == "edm" else t

                # This process's share of the batch, with labels, noise and target.
                x_0, y, t, sigma, eps, kept = map(my_share, (x_0, y, t, sigma, eps, kept.expand(B)))
                labelled = to_device(kept, device)
                y = torch.where(labelled, y, NO_LABEL) if soft_labels is None else y * labelled[:, None]
                augmented = None
                if args.augment == "diffaug":
                    x_0 = datasets.diffaugment(x_0, ",".join(datasets.DIFFAUGMENT))
                elif args.augment == "ada":
                    x_0, augmented = datasets.ada(x_0)
                # level: what the network is told for t; with EDM ln sigma / 4.
                if args.prediction == "edm":
                    sigma = to_device(sigma.float(), device)
                    x_t, target = edm_pair(x_0, sigma.view(-1, 1, 1, 1), eps)
                    t, level = to_device(t, device), sigma.log() / 4
                else:
                    x_t = q_sample(x_0, t, eps, alpha_bar)
                    target = eps if args.prediction == "eps" else velocity(x_0, t, eps, alpha_bar)
                    t = level = to_device(t, device)

                # Line 6: a random label for each image, |Y| = 1; it may equal y.
                tau = args.tau if step >= args.regularise_after * args.steps else 0.0
                if tau > 0:
                    y_prime = to_device(my_share(torch.multinomial(q_Y, B, replacement=True)), device)
                    if soft_labels is not None:  # CHOICE: y' is one class all the same
                        y_prime = F.one_hot(y_prime, K).to(y.dtype)

                # The network's answers to both labels.
                masks = datasets.own_randomness(device, args.seed, step) if args.dropout else nullcontext()
                with masks, torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    if tau == 0:
                        h = net(x_t, level, y, augmented)
                    elif args.gamma > 0:  # in one pass of 2 B, each with its own dropout mask
                        both = torch.cat([y, y_prime])
                        how = None if augmented is None else augmented.repeat(2, 1)
                        h, h_prime = net(x_t.repeat(2, 1, 1, 1), level.repeat(2), both, how).chunk(2)
                    else:  # nothing is learnt through h'
                        h = net(x_t, level, y, augmented)
                        with torch.no_grad():
                            h_prime = net(x_t, level, y_prime, augmented)

                # Lines 5 and 7 to 11: the three terms of Eq. 4 and their sum.
                L_DM = ddpm_loss(h, target, absolute=args.backbone == "vit")
                L_r = L_rc = zero
                if tau > 0:
                    L_r, L_rc = regularisers(h, h_prime, t, tau, labelled)
                loss = L_DM + L_r + args.gamma * L_rc

                # Line 11: update. Then average.
                optimizer.param_groups[0]["lr"] = learning_rate(step, args)
                loss.backward()
                datasets.average_gradients(model)
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # A
                optimizer.step()
                optimizer.zero_grad()  # here, so that the next forward pass has their memory
                average.update(args.ema)  # from the first step on (A)

                done = step + 1
                log.add(L_DM, L_r, L_rc, norm)
                if due(done, datasets.LOG_EVERY, args.steps):
                    log.write(done, lr=learning_rate(step, args), images=done * B)
                if due(done, args.sample_every, args.steps):
                    grid = sample_grid(ema_net, grid_classes, args, amp)
                    datasets.write_grid(run_dir / "samples" / f"step-{done:07d}.png", grid)
                signal = datasets.asked_to_stop(stop)  # one that comes later is for the next step
                if signal or due(done, args.save_every, args.steps):
                    datasets.save(args, done, parts, device)
                if signal:
                    datasets.leave(signal, done, args)

    if args.export:
        draw = functools.partial(draw_class, ema_net, args, amp)
        datasets.export_by_label(args, ema, train.classes, draw)
    if args.class_grid:
        draw_class_grid(ema, train.classes, args, amp)
    elif args.eval_images:
        import metrics  # here: SciPy takes a second to import, and training need not wait for it

        labels = datasets.balanced_labels(args.eval_images, K)
        for omega in args.sweep:
            args.guidance = omega
            where = run_dir / f"guidance-{omega:g}" if len(args.sweep) > 1 else run_dir
            where.mkdir(exist_ok=True)
            images = sample_all(ema_net, labels, args, amp, where)
            metrics.score_run(where, images, labels, args, device, protocol={"guidance": omega})


if __name__ == "__main__":
    datasets.run_command(main)
