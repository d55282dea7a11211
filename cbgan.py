"""CBGAN: Class Balancing GAN with a Classifier in the Loop (Rangwani, Mopuri, Babu; UAI 2021).

A GAN that learns from long-tailed images reproduces their imbalance. In CBGAN generator and discriminator
get no labels. Beside them stands a frozen classifier, trained beforehand on the same long-tailed data,
that looks at each batch of fakes. What it sees is counted over cycles of 2000 steps, older counts fading
(Eqs 5 and 6). A term in the generator's loss (Eq. 7) asks for batches spread over all classes, and pushes
hardest for the classes generated least so far.

    python cbgan.py --dataset shapeslt                               # first look: a CPU, minutes
    python cbgan.py --dataset cifar10lt --rho 100                    # the paper's run (Table 1); 10, 1
    python cbgan.py --dataset cifar10lt --reg-weight 0               # its baseline: no regulariser
    python cbgan.py --dataset cifar10lt --conditioning acgan         # with labels; cgan, pretrained (§4.2)
    python cbgan.py --dataset cifar100lt                             # Table 4, rho 10
    python cbgan.py --dataset cifar10lt --cycle 500                  # Fig. 6
    python cbgan.py --dataset cifar10lt --rho 10 --classifier C.pt   # Fig. 5; C: classifier.py --rho 100 ...
    python cbgan.py --dataset folder:LSUN --recipe lsun5             # Table 1; your images, cut to rho
    python cbgan.py --dataset folder:INAT --recipe inat2019          # Table 4, labels by 1 / N_k
    python cbgan.py --dataset cifar10 --force-frequency 1000         # Fig. 3: class 0 counts as frequent
    python cbgan.py --dataset folder:PATH --image-size 64            # your own images, settings that fit
    python cbgan.py --dataset folder:PATH --image-size 64 --eval-only --export DIR --classes A,B
    python cbgan.py --dataset folder:PILE --classifier C.pt --reg-weight 10    # images without labels (§4.3)

`--classifier runs/.../classifier.pt` is a checkpoint of classifier.py; if omitted, the classifier is
trained first. PILE has one class directory, PILE/train/all/*; the classes are those of the classifier,
which learnt from a few labelled images (classifier.py --label-fraction). Each command resumes the run
that it finds in its run directory: bit for bit on the CPU with as many threads.
Cost, on two cores of an AMD EPYC: shapeslt 5 minutes 44 seconds with classifiers and scores; cifar10lt
0.67 s for a step with 64 images. The paper's has 256; a full run was never made.
Target values, on CIFAR-10 with rho 100 (P, Table 1): FID 36.97 without and 32.93 with the regulariser, KL
to uniform 0.31 and 0.06. These FIDs are in the features of --features inception-fid. Table 1's Acc. is
classifier.py --train-on.

P is the paper, A the authors' code (github.com/val-iisc/class-balancing-gan); CHOICE marks what they
leave open. From A, because P does not say: Adam's eps, orthogonal initial weights, the real images of D's
step used again in G's, batch statistics averaged with the weights (EMA). Where we differ, and why:
  * The learning rate is 2e-4, as in P's text and throughout A; P's Tables 10 and 12 print 2e-3.
  * Leaky ReLUs of slope 0.1 also in SNResGAN, as in A; P's Tables 8 and 9 print ReLU (--slope 0).
  * P weighs class k with lambda / (K N_k), without bound when a class is never generated; A's weights sum
    to K. Ours are A's; `--weighting paper` for P's, with a floor. See `class_weights`.
  * A starts N_hat at 50 a class and the first count at 512; we start at 1 and 0. A never lets N_hat fall
    below 1, which at iNaturalist's 256 counts a step makes nearly all 1010 classes equal. Ours is a floor
    on the share, 0.001 / K.
  * Images go to the classifier with its own normalisation. A hands it [-1, 1], which is right only if it
    was trained so.
  * A counts evaluation samples with the same counters, and so loses those of a cycle. Only fakes of G's
    steps count here.
  * A never loads its annotator, the classifier that learnt from balanced data and counts the samples: the
    KL that it logs is by the classifier in the loop. We print both. P has one network for iNaturalist,
    where no balanced set exists: its KL is our kl_in_loop.
  * A's discriminator blocks activate the skip connection too (an in-place ReLU). Ours take the raw input,
    as P's references do.
  * As in P, we score the weights with the smallest distance on the way. P and A choose and score with the
    same real images. We choose with other noise and other balanced images; where there are none, the last
    weights are scored. For cifar10lt and cifar100lt they are *all* balanced training images, those
    withheld from the GAN included: G is not trained on them, but the choice uses them. `--weights last`
    avoids this.
  * The final batch norm of the residual generator is unconditional, as in A. P says that iNaturalist's
    are all conditional.
  * Convolutions right before a batch norm have no bias; P's and A's do nothing there.
  * bfloat16 where the hardware has it (`--amp off`: float32), fused Adam, real and fake in one pass of D.
Not here: BiT's weights for Table 3 (torchvision has none; classifier.py fine-tunes a ResNet-50);
downloads of LSUN and iNaturalist. The classifier sees the GAN's image size; P shows it iNaturalist's at
224 pixels.
"""

import argparse
import contextlib
import copy
import hashlib
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import datasets
from classifier import frozen_classifier, load_classifier, outputs, predict
from datasets import (
    InputError,
    at_least,
    decay,
    due,
    existing_file,
    fail,
    my_share,
    not_negative,
    number,
    to_device,
    warn,
    whole_batch_mean,
)

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------
# How labels come in. The first is the method of the paper; LABELLED are its baselines.
#   none        no labels at all
#   inverse     random labels for G, drawn in proportion to 1 / N_k; none for D (iNaturalist)
#   uniform     the same, each class equally likely: the ablation of appendix 6.5.2 (FID 11.58). With
#               --reg-weight 0 it is Table 4's SNResGAN for iNaturalist
#   acgan       conditional batch norm in G, a class head in D
#   cgan        the same G, a projection in D
#   pretrained  the same G, no labels for D; the classifier in the loop is ACGAN's class head (§4.2)
LABELLED = ("acgan", "cgan", "pretrained")
CONDITIONINGS = ("none", "inverse", "uniform", *LABELLED)

# What differs from data set to data set. P: the paper, its tables in the appendix; A: its code.
CIFAR10LT = dict(
    conditioning="none", rho=100, image_size=32, flip=False,  # P, §4; A
    architecture="sndcgan", width=64, discriminator_width=64,  # P, Tables 6 and 7
    slope=0.1, generator_spectral_norm=False,  # A
    alpha=0.5, beta=1.0, cycle=2_000,  # P, §3.1, Table 10, §4
    steps=100_000, batch_size=256, lr=2e-4, beta1=0.5, beta2=0.999,  # P, §4, Table 10
    ema=0.9999, ema_start=20_000,  # P, Table 10
    monitor_every=2_000, monitor_images=10_000,  # P, appendix 6.4
    eval_images=50_000, reference="test",  # P, §4
    sample_every=2_000, save_every=1_000,
)
LSUN5 = CIFAR10LT | dict(image_size=64, architecture="snresgan", beta1=0.0)  # P, Tables 8 and 9, §4
RECIPES = {
    "cifar10lt": CIFAR10LT,
    # P, Table 12. CHOICE: its beta1; 6.5.1 refers to LSUN's settings, whose beta1 is 0.
    "cifar100lt": CIFAR10LT | dict(rho=10, architecture="snresgan"),
    "lsun5": LSUN5,
    # P, Table 12, appendix 6.5.2
    "inat2019": LSUN5 | dict(
        conditioning="inverse", alpha=0.005, beta=0.005, cycle=1, steps=200_000,
        generator_spectral_norm=True),
    # Ours, for two CPU cores and a few minutes: the paper's networks, a level less, G narrowed.
    "shapeslt": CIFAR10LT | dict(
        image_size=16, flip=True, width=32, discriminator_width=64, cycle=100, steps=3_000,
        batch_size=32, lr=1e-3, beta1=0.0, beta2=0.99, ema=0.995, ema_start=100, monitor_every=500,
        monitor_images=0, eval_images=10_000, reference="reference", sample_every=500,
        save_every=500),
    # Ours, for your own images: half the paper's widths. As many epochs as on CIFAR10-LT, 2,060
    # (100,000 steps of 256 among 12,406 images), but 10,000 to 100,000 steps: 10,000 for 200 images,
    # 64,400 for 2,000.
    "folder": CIFAR10LT | dict(
        width=32, discriminator_width=32, cycle=200, batch_size=64, ema=0.999, ema_start=1_000,
        monitor_images=0, eval_images=2_000, save_every=250),
}  # fmt: skip
# lambda by the imbalance of the data; the entry nearest in log ratio is used: P, Tables 5 and 12.
# LSUN's are A's, where the weights sum to K; --weighting paper goes with P's 20, 7.5, 5. CHOICE for
# Fig. 3, where P has none: that of balanced CIFAR-10.
LAMBDA = {
    "cifar10lt": {100: 10.0, 10: 7.5, 1: 5.0},
    "cifar100lt": {10: 0.5},
    "lsun5": {100: 10.0, 10: 7.5, 1: 2.5},
    "inat2019": {1: 0.5},
    "shapeslt": {1: 2.0},
}
# classifier: its content is compared, not its path
FREE = datasets.FREE | {"annotator", "sample_seed", "weights", "classifier"}


def parse_settings(argv=None):
    """The command line as a namespace; what is not given comes from the table of the data set."""
    first = datasets.first_flags(argv)
    dataset = first.dataset or "cifar10lt"
    of_name = [name for name in RECIPES if dataset.startswith(name.removesuffix("lt"))]
    by_name = max(of_name, key=len, default="cifar10lt")  # cifar10, cifar10imb: cifar10lt
    recipe = RECIPES.get(first.recipe or by_name, CIFAR10LT)  # an unknown one is refused below
    defaults = recipe | dict(dataset=dataset, recipe=by_name)
    if dataset not in datasets.LONG_TAILED:
        defaults["rho"] = None
    if dataset.startswith("folder:"):
        defaults["reference"] = "reference"  # a folder may do without a test split
    if recipe is RECIPES["folder"]:
        if (first.image_size or 32) > 32:
            defaults |= dict(architecture="snresgan", beta1=0.0)
        defaults |= datasets.folder_settings(first, 64, epochs=2_060, low=10_000, high=100_000)

    parser = datasets.settings_parser(f"Class Balancing GAN; defaults: those of {dataset}")
    add = parser.add_argument_group("method").add_argument
    add("--recipe", choices=RECIPES, help="whose defaults to take, for a folder")
    add("--conditioning", choices=CONDITIONINGS, help="none: the method; see the settings in the script")
    add("--classifier", metavar="PATH", type=existing_file,
        help="the classifier in the loop; default: one that is trained first")
    add("--reg-weight", type=not_negative, metavar="LAMBDA",
        help="default: by the imbalance of the data, see LAMBDA in the script; 0 with labels")
    add("--weighting", choices=("sum-to-K", "paper"), default="sum-to-K",
        help="sum-to-K: A, bounded; paper: 1 / N_k, Eq. 7")
    add("--alpha", type=number(float, lambda v: 0 < v <= 1, "a number above 0, up to 1"),
        help="forgetting factor, Eq. 5")
    add("--beta", type=datasets.positive, help="weight of new counts, Eq. 5")
    add("--cycle", type=at_least(1), help="generator steps from one update of N_k to the next")
    add("--force-frequency", type=datasets.positive, metavar="N",
        help="keep N_hat at N for class 0 and at 1 for the others: Fig. 3")
    add = parser.add_argument_group("networks and optimisers").add_argument
    add("--architecture", choices=("sndcgan", "snresgan"), help="Tables 6 and 7, or 8 and 9")
    add("--width", type=at_least(1), help="channels of G's last level; snresgan up to 32 pixels: a quarter")
    add("--discriminator-width", type=at_least(1), help="of D's first level; snresgan up to 32 pixels: half")
    add("--slope", type=not_negative, help="of the leaky ReLUs; A: 0.1; P: 0 in Tables 8 and 9")
    add("--generator-spectral-norm", action=argparse.BooleanOptionalAction, help="P: for iNaturalist")
    add("--beta1", type=decay, help="of Adam: decay of its average of gradients")
    add("--beta2", type=decay, help="of Adam: decay of its average of squared gradients")
    add("--ema-start", type=at_least(0), help="step after which averaging starts")
    add = parser.add_argument_group("samples on the way and at the end").add_argument
    add("--monitor-every", type=at_least(0), help="steps between two looks at samples, for the log; 0: none")
    add("--monitor-images", type=number(int, lambda v: v == 0 or v >= 2, "0, or 2 or more"),
        help="samples for the distance that chooses the best weights; 0: no choice, KL alone")
    add("--weights", choices=("best", "last"), default="best", help="to score; best: by that distance")
    add("--sample-seed", type=at_least(0), default=0,
        help="other samples, scored in their own directory: P's +-")
    add("--annotator", metavar="PATH", type=existing_file, help="a classifier trained on balanced data, to "
        "count samples with; default: that of --features if it is one, else one that is trained for it")
    args = datasets.read_settings(parser, argv, "cbgan", defaults, FREE)

    if args.image_size not in (16, 32, 64, 128, 256):
        fail(f"--image-size is {args.image_size}; it must be 16, 32, 64, 128 or 256")
    if args.eval_images == 1:
        fail("--eval-images 1: scores need at least 2 samples")
    if args.conditioning == "inverse" and args.reg_weight == 0:
        fail("--conditioning inverse draws labels by what the regulariser counts; without it "
             "(--reg-weight 0) take uniform")
    return args


def complete_settings(args, train):
    """Settles what the training images decide: lambda. Returns the names of the classes, a list.

    A single class directory holds images without labels; their classes are the classifier's.
    """
    args.training_data = train.fingerprint
    labelled, classes = args.conditioning in LABELLED, train.classes
    if len(classes) == 1:
        if args.conditioning in ("acgan", "cgan") or not args.classifier:
            fail(f"{args.dataset} has one class directory, so its images count as unlabelled: they "
                 "need --classifier PATH, and another --conditioning than acgan and cgan")
        if args.reg_weight is None and not labelled:
            fail("--reg-weight is needed: unlabelled images don't tell how uneven their classes "
                 "are; P's Table 11 has 10 and 7.5 for ratios of 100 and 10")
        classes = load_classifier(args.classifier).info["classes"]
    if labelled and args.reg_weight is None:
        args.reg_weight = 0.0
    if args.reg_weight is None:
        imbalance = (train.counts.max() / train.counts.min()).item()
        by_classes = "cifar100lt" if len(classes) > 30 else "cifar10lt"  # CHOICE, for "folder"
        table = LAMBDA.get(args.recipe, LAMBDA[by_classes])
        nearest = min(table, key=lambda rho: abs(math.log(rho / imbalance)))
        args.reg_weight = table[nearest]
    if args.force_frequency and not args.reg_weight:
        fail("--force-frequency says how frequent the regulariser takes class 0 to be; lambda is 0")
    if args.reg_weight and len(classes) < 3:
        fail(f"{args.dataset} has {len(classes)} classes: the regulariser balances 3 or more "
             "(Proposition 1); --reg-weight 0 goes without")
    return classes


# --------------------------------------------------------------------------------------------------
# The paper's equations
# --------------------------------------------------------------------------------------------------
# K      number of classes                         C      the classifier in the loop, frozen
# x      (B, 3, H, W) real images, in [-1, 1]      c      (K,) fakes of a cycle that C takes for
# z      (B, 128) noise                                   each class
# y      (B,) int64, classes of x; y_fake: asked   N_hat  (K,) effective class frequency
#        of G                                      N      (K,) effective class distribution, sum 1
# p_hat  (K,) batch mean of softmax(C(G(z)))       w      (K,) weight of each class in Eq. 7
# alpha, beta: forgetting and gain of N_hat. lambda: --reg-weight (in its propositions P has another
# lambda, a multiplier; here nu).
def relativistic_loss(better, worse):
    """Eqs 2 and 3: -E[log sigmoid(better - worse)] of two batches of scores, (B,) each. Scalar.

    Eq. 2, D's: relativistic_loss(D(x), D(G(z))). Eq. 3, G's: relativistic_loss(D(G(z)), D(x)).
    Scores are paired by their place in the batch. Jolicoeur-Martineau 2018: a fake need not look
    real by itself, only more so than a real image.
    """
    return F.softplus(worse - better).mean()  # softplus(-a) = -log sigmoid(a), without overflow


def effective_class_frequency(N_hat, c, alpha, beta):
    """Eq. 5: N_hat_k^t = (1 - alpha) N_hat_k^(t-1) + beta c_k^(t-1), once a cycle.

    (K,) float and (K,) counts in, (K,) out. P uses beta = 1 or beta = alpha. After Eq. 6 that is
    almost the same: N_hat from (beta, N_hat^0) is beta times N_hat from (1, N_hat^0 / beta). So
    beta only weighs the start, which one cycle of 512,000 counts drowns (iNaturalist's takes
    hundreds).
    """
    return (1 - alpha) * N_hat + beta * c


def effective_class_distribution(N_hat):
    """Eq. 6: N_k = N_hat_k / sum_j N_hat_j. (K,) in and out."""
    return N_hat / N_hat.sum()


FLOOR = 1e-3  # CHOICE: N_k counts as 0.001 / K at least: a class never generated has a weight


def class_weights(N, weighting):
    """w (K,) from N (K,): what stands for 1 / N_k in Eq. 7. All 1 where N is uniform.

    "paper"     w_k = 1 / (K N_k), at most 1 / FLOOR: Eq. 7, lambda divided by K as below P's Table 5
    "sum-to-K"  w_k = K (1 / N_k) / sum_j (1 / N_j): A. |lambda L_reg| can't exceed lambda K / e
    Their ratio, paper over sum-to-K, is sum_j (1 / N_j) / K^2, arithmetic over harmonic mean of N:
    the same for each class. So the gradient of L_reg points the same way. P's is longer, 6.2 times
    where N is CIFAR10-LT's distribution at rho = 100, and weighs that much more against L_G. When
    the method has done its work the ratio is 1.
    """
    inverse = 1 / N.clamp(min=FLOOR / len(N))
    # TRY: return torch.ones_like(N). Without memory it pulls less, and the tail stays rarer.
    return inverse / len(N) if weighting == "paper" else inverse / inverse.mean()


def class_balancing_regulariser(p_hat, w):
    """Eq. 7: L_reg = sum_k w_k p_hat_k log p_hat_k. Scalar, from -sum(w) / e to 0; 0 log 0 = 0.

    p_hat (K,) is the mean over the batch, so the entropy is that of the batch: images may each be
    of one class for certain, as long as they are not all of the same. With w = 1 the minimum,
    -log K, is at the uniform p_hat. Else it is at p_hat_k = exp(nu N_k - 1), with nu such that they
    sum to 1 (Proposition 2): a class with a small N_k gets more than its share, one with a large
    N_k at most exp(-K (log K - 1) N_k - 1) (Proposition 1, Eq. 16; on Fig. 3 P's text says the
    contrary of its caption and proof). That needs K >= 3: with two classes nu > 0, and the frequent
    one is favoured.
    """
    return (w * p_hat * p_hat.clamp(min=1e-8).log()).sum()


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------
# Generators start from 4 x 4 pixels and double. Parameters at the paper's sizes, without labels:
#                        G           G of P and A         D, as in P and A
#   sndcgan   32    3,811,907    448 more: biases    2,928,193
#   snresgan  32    4,275,971    768 more            1,053,825
#   snresgan  64   12,219,715    960 more           19,542,721
# Those biases stand right before a batch norm, which subtracts the mean of each channel. They have
# no effect and no gradient, and Adam would take the rounding error of that 0 for a direction.
LATENT = 128


class Norm(nn.Module):
    """Batch normalisation of (B, C, H, W); with classes, a scale and a shift for each.

    Conditional batch norm, de Vries et al. 2017: (1 + gain_y) x + shift_y. Both tables start
    orthogonal, not zero, as in A.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        if num_classes is None:
            self.norm = nn.BatchNorm2d(channels)
        else:
            self.norm = nn.BatchNorm2d(channels, eps=1e-4, affine=False)  # eps: A
            self.gain = nn.Embedding(num_classes, channels)
            self.shift = nn.Embedding(num_classes, channels)

    def forward(self, x, y):
        x = self.norm(x)
        if y is None:
            return x
        return x * (1 + self.gain(y)[:, :, None, None]) + self.shift(y)[:, :, None, None]


def initialise(network, normalise):
    """Orthogonal weights, zero biases (A); then spectral norm on all weights, if `normalise`.

    Miyato et al. 2018: W / sigma(W), sigma by one step of the power method in each forward pass in
    training mode.
    """
    weighted = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Embedding
    for module in list(network.modules()):
        if isinstance(module, weighted):
            nn.init.orthogonal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if normalise:
                datasets.spectral_norm(module, eps=1e-6)


class DCGenerator(nn.Module):
    """SNDCGAN, Table 6. z (B, 128), y (B,) or None -> (B, 3, H, W) float32 in [-1, 1]."""

    def __init__(self, image_size, width, slope, num_classes):
        super().__init__()
        self.slope = slope
        levels = int(math.log2(image_size // 4))
        widths = [width * 2**i for i in reversed(range(levels + 1))]  # 512 ... 64 at 32 pixels
        self.first = nn.Linear(LATENT, widths[0] * 4 * 4)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 4, 2, padding=1, bias=False) for a, b in pairwise(widths))
        self.norm = nn.ModuleList(Norm(b, num_classes) for b in widths[1:])
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
        self.norm1 = Norm(width_in, num_classes)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm2 = Norm(width_out, num_classes)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x, y):
        h = F.interpolate(F.leaky_relu(self.norm1(x, y), self.slope), scale_factor=2)
        h = self.conv2(F.leaky_relu(self.norm2(self.conv1(h), y), self.slope))
        return h + F.interpolate(self.skip(x), scale_factor=2)


class ResGenerator(nn.Module):
    """SNResGAN. Table 8 at 64 pixels and above; up to 32 the CIFAR network of Miyato et al. 2018.

    z (B, 128), y (B,) or None -> (B, 3, H, W) float32 in [-1, 1]. The CIFAR network has one width.
    """

    def __init__(self, image_size, width, slope, num_classes):
        super().__init__()
        self.slope = slope
        levels = int(math.log2(image_size // 4))
        widths = [width * 2**i for i in reversed(range(levels + 1))]
        if image_size <= 32:
            widths = [4 * width] * (levels + 1)
        self.first = nn.Linear(LATENT, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(
            GeneratorBlock(a, b, slope, num_classes) for a, b in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z, y=None):
        h = self.first(z).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, y)
        return self.last(F.leaky_relu(self.norm(h), self.slope)).tanh().float()


def build_generator(args, num_classes):
    """The generator of these settings; it takes labels unless --conditioning is none."""
    network = {"sndcgan": DCGenerator, "snresgan": ResGenerator}[args.architecture]
    num_classes = None if args.conditioning == "none" else num_classes
    generator = network(args.image_size, args.width, args.slope, num_classes)
    initialise(generator, args.generator_spectral_norm)
    return generator


class DiscriminatorBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), half the height and width if `down`.

    The skip connection takes the raw input (A activates it).
    """

    def __init__(self, width_in, width_out, slope, first, down):
        super().__init__()
        self.slope = slope
        self.first, self.down = first, down
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        plain = width_in == width_out and not down
        self.skip = nn.Identity() if plain else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x):
        h = x if self.first else F.leaky_relu(x, self.slope)  # an image is not activated
        h = self.conv2(F.leaky_relu(self.conv1(h), self.slope))
        if self.down:  # x before its 1 x 1 convolution: the same, at a quarter of the price
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.skip(x)


class Discriminator(nn.Module):
    """x (B, 3, H, W) in [-1, 1], y (B,) for cgan -> scores (B,), class logits (B, K) or None.

    Scores have no bound; acgan alone has logits. Table 7 (sndcgan), Table 9 (snresgan from 64
    pixels) or Miyato et al.'s (up to 32). Spectral norm everywhere, no batch norm: an image's score
    does not depend on the others in its batch.
    """

    def __init__(self, args, num_classes):
        super().__init__()
        slope, width = args.slope, args.discriminator_width
        levels = int(math.log2(args.image_size // 4))
        widths = [3] + [width * 2**i for i in range(levels + 1)]  # 3, 64 ... 512 at 32 pixels
        layers = []
        if args.architecture == "sndcgan":
            for a, b in pairwise(widths):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(slope)]
                if b != widths[-1]:
                    layers += [nn.Conv2d(b, b, 4, 2, padding=1), nn.LeakyReLU(slope)]
        else:
            downs = levels  # to 4 x 4, then a block that keeps the size
            if args.image_size <= 32:
                widths, downs = [3] + [2 * width] * (levels + 1), levels - 1  # to 8 x 8, then two
            for i, (a, b) in enumerate(pairwise(widths)):
                layers.append(DiscriminatorBlock(a, b, slope, first=i == 0, down=i < downs))
            layers.append(nn.LeakyReLU(slope))
        self.layers = nn.Sequential(*layers)
        self.score = nn.Linear(widths[-1], 1)
        self.class_head = self.projection = None
        if args.conditioning == "acgan":
            self.class_head = nn.Linear(widths[-1], num_classes)
        if args.conditioning == "cgan":
            self.projection = nn.Embedding(num_classes, widths[-1])
        initialise(self, normalise=True)

    def forward(self, x, y=None):
        h = self.layers(x).float().sum((2, 3))  # (B, width): sum over the pixels, not mean
        with torch.autocast(x.device.type, enabled=False):  # bfloat16's 8 bits are too few to compare
            score = self.score(h)[:, 0]
            if self.projection is not None:  # Miyato & Koyama 2018: w h + b + <e_y, h>
                score = score + (self.projection(y) * h).sum(1)
            return score, None if self.class_head is None else self.class_head(h)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
AT_ONCE = 500  # samples of 32 x 32 pixels
GRID, MONITOR, FINAL, EXPORT = range(4)  # four kinds of samples; no two share their noise


def draw_labels(n, N, conditioning, random=None):
    """y (n,) int64 for a generator that takes labels, None for one that does not. N (K,): Eq. 6.

    Each class equally likely; with "inverse" in proportion to 1 / N_k (P, appendix 6.5.2), so that
    rare classes come more often in G's batches.
    """
    if conditioning == "none":
        return None
    probability = class_weights(N, "paper") if conditioning == "inverse" else torch.ones(len(N))
    return torch.multinomial(probability, n, replacement=True, generator=random)


def noise_and_labels(n, N, conditioning, device):
    """What G makes fakes from in training: this process's share of z (n, 128), y_fake (n,) or None.

    From the CPU: the same on each device.
    """
    z, y = torch.randn(n, LATENT), draw_labels(n, N, conditioning)
    return tuple(None if x is None else to_device(my_share(x), device) for x in (z, y))


def latents(n, kind, seed):
    """z (n, 128) for samples, and the random generator to draw their labels with. On the CPU."""
    random = torch.Generator().manual_seed(datasets.seed_from(kind, seed))
    return torch.randn(n, LATENT, generator=random), random


@torch.no_grad()
def generate(ema, z, y, args, amp):
    """Images (n, 3, H, W) uint8 on the CPU from z (n, 128) and y (n,) or None.

    ema: the averaged generator, in eval mode.
    """
    device = next(ema.parameters()).device
    mine = datasets.my_part(len(z))
    z, y = z[mine], None if y is None else y[mine]
    at_once = datasets.images_at_once(AT_ONCE, args.image_size)
    images = []
    for i in range(0, len(z), at_once):
        part = slice(i, i + at_once)
        y_part = None if y is None else y[part].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            x = ema(z[part].to(device), y_part)
        images.append(datasets.to_uint8(x))
    return datasets.collect(torch.cat(images))


def draw_samples(ema, n, kind, seed, N, args, amp, y=None):
    """(n, 3, H, W) uint8. y (n,): what to ask for; None: drawn as in training. kind: see GRID."""
    z, random = latents(n, kind, seed)
    if y is None:
        y = draw_labels(n, N, args.conditioning, random)
    return generate(ema, z, y, args, amp)


def sample_grid(ema, C, classes, N, args, amp, device):
    """A row for each of these classes, always from the same noise: (10 rows, 3, H, W) uint8.

    With labels, samples of that label; else samples that C takes for that class.
    """
    if args.conditioning in LABELLED:
        y = classes.repeat_interleave(datasets.GRID_COLUMNS)
        return draw_samples(ema, len(y), GRID, args.seed, N, args, amp, y)
    n = min(50 * len(N), 5_000)  # usually enough to hold most classes
    images = draw_samples(ema, n, GRID, args.seed, N, args, amp)
    return datasets.rows_of(images, predict(C, images, device), classes)


def export(ema, C, classes, N, args, amp, device):
    """--export: by label where classes are G's labels, else by what C takes the samples for."""

    def draw_class(k, start, n):
        seed = datasets.seed_from(args.sample_seed, k, start)
        return draw_samples(ema, n, EXPORT, seed, N, args, amp, torch.full((n,), k))

    def draw(i):
        images = draw_samples(ema, 100, EXPORT, datasets.seed_from(args.sample_seed, i), N, args, amp)
        return images, outputs(C, images, device).softmax(1)

    if args.conditioning in LABELLED:
        datasets.export_by_label(args, ema, classes, draw_class)
    else:
        datasets.export_by_look(args, ema, classes, draw)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
LOGGED = ("L_D", "L_G", "L_reg", "L_D_class", "L_G_class")  # Eqs 2, 3, 7; the baselines'
KL_IMAGES = 1_000  # samples for KL in the log where --monitor-images is 0


def classifier_in_the_loop(args, train, classes, device):
    """C, frozen: images (B, 3, H, W) in [-1, 1] -> logits (B, K). None where it is not needed.

    ACGAN and cGAN do without, but take a given one for the log. For a plain GAN it is used for the log alone.
    """
    if args.conditioning in ("acgan", "cgan") and not args.reg_weight and not args.classifier:
        return None
    rarest = []
    if len(train.classes) == 1:  # images without labels
        C = load_classifier(args.classifier, device, classes, args.image_size)
    else:
        C = frozen_classifier(args.dataset, args.data_dir, args.classifier, "train", args.image_size,
                              args.rho, device=device, imbalance=args.imbalance)
        rarest = [C.info["per_class_accuracy"][datasets.head_to_tail(train.counts)[-1]]]
    right = C.info["test_accuracy"]
    shown = ", ".join(f"{name} {x:.1%}" for name, x in right.items() if x is not None)
    print(f"classifier in the loop: {C.info['path']}, test images right: {shown}", flush=True)
    if args.reg_weight and min(x for x in [right["tail"], *rarest, 1] if x is not None) < 0.05:
        warn("the classifier can hardly tell the tail. With one whose performance is 0 on the rarest class, "
            'P\'s "algorithm diverges and is not able to produce meaningful results" (§4.4)')
    return C


def find_annotator(args, C, classes, device):
    """The classifier that counts classes in samples; in P it learnt from balanced data.

    It is trained now if it is needed for the final samples. None: it is not, or there are no labels.
    """
    kind, _, of_features = (args.features or "").partition(":")
    path = args.annotator or (of_features if kind == "classifier" else None)
    if path:
        annotator = load_classifier(path, device, classes, args.image_size)
    else:
        counts = load_split(args, "reference").counts
        if len(counts) == 1 or not args.eval_images:
            return None
        annotator = frozen_classifier(args.dataset, args.data_dir, None, "reference", args.image_size,
                                      device=device)
        if counts.max() > 2 * counts.min():
            warn("no split is balanced: the annotator too has learnt from uneven classes")
    if C and Path(C.info["path"]).samefile(annotator.info["path"]):
        warn("the annotator is the classifier in the loop: it may be pleased by images that please itself")
    return annotator


def load_split(args, split):
    return datasets.load(args.dataset, args.data_dir, split, args.image_size, args.rho,
                         imbalance=args.imbalance)


def other_images(args):
    """(split, ImageSet) of balanced real images that are not those of the final score, or (None, None).

    Balanced: a distance to long-tailed images would choose against the method.
    """
    scored = load_split(args, args.reference)
    for split in ("reference", "test", "train"):
        with contextlib.suppress(InputError):  # a folder without this split
            real = load_split(args, split)
            balanced = len(real.classes) > 1 and real.counts.max() == real.counts.min()
            if balanced and not torch.equal(real.images, scored.images):
                return split, real
    return None, None


def how_to_choose(args, device):
    """What the best weights are chosen by: network, features (N, D) of real images, split, words for it.

    A dict; empty, with a warning, where that can't be had.
    """
    import metrics  # here: SciPy takes a second to import, and training need not wait for it

    split, real = other_images(args)
    try:
        if real is None:
            fail("there are no balanced images but those of the final score")
        network, features = metrics.load_reference(
            real, args.dataset, args.data_dir, args.features, split, args.rho, device)
    except InputError as error:  # or no weights for the features, and no network to get them
        warn(f"the distance is not monitored: {error}")
        return {}
    words = f"{network.name} distance to {len(real.labels):,} balanced {split} images"
    if split == "reference" and args.dataset in ("cifar10lt", "cifar100lt"):
        words += ", those withheld from the GAN included"
    return {"network": network, "features": features, "split": split, "words": words}


def monitor(ema, N, choice, watchers, args, amp, device):
    """A row of the log: what samples of the averaged generator are like, and N.

    monitored_distance, if there is a choice; kl_<name>: KL to uniform of what each watcher sees.
    """
    import metrics

    n = args.monitor_images or KL_IMAGES
    images = draw_samples(ema, n, MONITOR, args.seed, N, args, amp)
    row = {}
    if choice:
        features, _ = metrics.extract_features(images, choice["network"], device)
        row["monitored_distance"] = metrics.frechet_distance(choice["features"], features)
    for name, network in watchers.items():
        row[f"kl_{name}"] = metrics.kl_to_uniform(predict(network, images, device).numpy(), len(N))
    return row | {"N": N.tolist()}


def main(argv=None):
    args = parse_settings(argv)
    device = datasets.pick_device(args.device)
    amp = datasets.use_bf16(args.amp, device)
    run_dir = Path(args.run_dir)
    train = load_split(args, "train")
    classes = complete_settings(args, train)
    state = datasets.find_run(args, FREE)
    K, B = len(classes), args.batch_size
    labelled = args.conditioning in LABELLED
    unlabelled = len(train.classes) == 1  # training images: then nobody knows which class is the head
    counts = torch.ones(K) if unlabelled else train.counts

    # C, the classifier in the loop, and the annotator, which counts classes in the samples.
    C = classifier_in_the_loop(args, train, classes, device)
    annotator = find_annotator(args, C, classes, device)
    in_loss = bool(args.reg_weight) or args.conditioning == "pretrained"
    C_hash = hashlib.sha256(Path(C.info["path"]).read_bytes()).hexdigest() if in_loss else None
    if state and state.get("classifier") != C_hash:
        fail(f"{run_dir} holds a run with another classifier in its loop; choose another --run-dir")

    # Generator, its moving average, which samples, and discriminator.
    torch.manual_seed(args.seed)
    layout = datasets.layout(device)
    G = datasets.share_batch_norms(build_generator(args, K)).to(device, **layout)
    D = Discriminator(args, K).to(device, **layout)
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    average = datasets.Average(ema, G)
    adam = dict(lr=args.lr, betas=(args.beta1, args.beta2), eps=1e-6)  # eps: A
    adam["fused"] = device.type in ("cuda", "cpu")  # one kernel updates all weights
    optimizer_G = torch.optim.Adam(G.parameters(), **adam)
    optimizer_D = torch.optim.Adam(D.parameters(), **adam)
    batches = datasets.Batches(train, B, flip=args.flip, device=device, seed=args.seed)
    log = datasets.Log(args, LOGGED, device)
    parts = {"G": G, "D": D, "ema": ema, "optimizer_G": optimizer_G, "optimizer_D": optimizer_D,
             "batches": batches, "log": log}
    N_hat = torch.ones(K, dtype=torch.float64)  # on the CPU: it changes once a cycle
    if args.force_frequency:
        N_hat[0] = args.force_frequency
    c = torch.zeros(K, dtype=torch.int64, device=device)  # the cycle's counts so far
    best = {}  # the averaged generator at the smallest monitored distance, and what that was

    # Resume the run that the directory holds.
    start = 0
    if state:
        datasets.restore(state, parts, device)
        start, best = state["step"], state["best"]
        N_hat, c = state["N_hat"], state["c"].to(device)
    del state  # a second copy of everything
    parameters = [sum(w.numel() for w in network.parameters()) for network in (G, D)]
    precision = ", bf16" if amp else ""
    resumed = f"; resumed at step {start}" if start else ""
    print(f"GAN, conditioning {args.conditioning}, lambda {args.reg_weight:g}, on {args.dataset}: "
          f"{len(train.labels)} images, {K} classes; {parameters[0]:,} + {parameters[1]:,} "
          f"parameters; {device}{precision}; {run_dir}{resumed}", flush=True)

    net_G, net_D, net_C = (torch.compile(n) if args.compile and n else n for n in (G, D, C))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=amp)
    grid_classes = datasets.grid_classes(counts)
    watchers = {name: n for name, n in (("annotator", annotator), ("in_loop", C)) if n is not None}
    N = effective_class_distribution(N_hat)
    w = class_weights(N, args.weighting).float().to(device)
    zero = torch.zeros((), device=device)
    done = start
    if start < args.steps and not args.eval_only:
        choose = args.monitor_images and args.monitor_every
        choice = how_to_choose(args, device) if choose else {}
        if choice and best.get("chosen_by", choice["words"]) != choice["words"]:
            best = {}  # by another distance
        datasets.write_config(args, device, bf16=amp, parameters=parameters,
                              classifier=C and C.info["path"])
        with datasets.stop_signals() as stop, log.open(start, args.steps):
            for step in range(start, args.steps):
                # D. Real and fake images in one pass.
                x, y = map(my_share, next(batches))
                z, y_fake = noise_and_labels(B, N, args.conditioning, device)
                y_both = None if y_fake is None else torch.cat([y, y_fake])
                with autocast():
                    with torch.no_grad():
                        fake = net_G(z, y_fake)
                    scores, logits = net_D(torch.cat([x, fake]), y_both)
                D_real, D_fake = scores.chunk(2)

                L_D = relativistic_loss(D_real, D_fake)  # Eq. 2
                L_D_class = L_G_class = L_reg = zero
                if args.conditioning == "acgan":  # each image has the label that it came with (A)
                    of_real, of_fake = logits.chunk(2)
                    L_D_class = F.cross_entropy(of_real, y) + F.cross_entropy(of_fake, y_fake)
                optimizer_D.zero_grad()
                (L_D + L_D_class).backward()
                datasets.average_gradients(D)
                optimizer_D.step()

                # G. New noise; the same real images (A), which D scores once more for Eq. 3.
                D.requires_grad_(False)  # its gradients would be computed and thrown away
                z, y_fake = noise_and_labels(B, N, args.conditioning, device)
                with autocast():
                    fake = net_G(z, y_fake)
                    D_fake, logits = net_D(fake, y_fake)
                    with torch.no_grad():
                        D_real, _ = net_D(x, y)
                    seen = net_C(fake).float() if in_loss else None  # (B, K) logits, for G to mend
                D.requires_grad_(True)

                L_G = relativistic_loss(D_fake, D_real)  # Eq. 3
                if args.reg_weight:
                    p_hat = whole_batch_mean(seen.softmax(1).mean(0))
                    # TRY: class_balancing_regulariser(seen.softmax(1), w) / B. Then each *image* has
                    # to be of all classes: hybrids.
                    L_reg = class_balancing_regulariser(p_hat, w)  # Eq. 7
                if args.conditioning == "acgan":
                    L_G_class = F.cross_entropy(logits, y_fake)  # weight 1: A
                elif args.conditioning == "pretrained":
                    L_G_class = 0.5 * F.cross_entropy(seen, y_fake)  # §4.2, appendix 6.6
                optimizer_G.zero_grad()
                # Eq. 17; the 1 / K of appendix 6.4.1 is in w.
                (L_G + args.reg_weight * L_reg + L_G_class).backward()
                datasets.average_gradients(G)
                optimizer_G.step()

                done = step + 1
                average.update(args.ema if done > args.ema_start else 0)

                # Class statistics: of these fakes alone, for the cycles to come.
                if args.reg_weight and not args.force_frequency:
                    # TRY: c += F.one_hot(y, K).sum(0). N is the data's for ever: too much tail.
                    c += datasets.sum_of_processes(F.one_hot(seen.argmax(1), K).sum(0))
                    if done % args.cycle == 0:
                        N_hat = effective_class_frequency(N_hat, c.cpu(), args.alpha, args.beta)
                        N = effective_class_distribution(N_hat)
                        w = class_weights(N, args.weighting).float().to(device)
                        c.zero_()

                log.add(L_D, L_G, L_reg, L_D_class, L_G_class)
                if due(done, datasets.LOG_EVERY, args.steps):
                    kl = torch.special.xlogy(N, K * N).sum().item()  # of N to uniform
                    log.write(done, images=done * B, **({"kl_of_N": kl} if args.reg_weight else {}))
                if due(done, args.monitor_every, args.steps) and (watchers or choice):
                    row = monitor(ema, N, choice, watchers, args, amp, device)
                    log.note(done, **row)
                    if row.get("monitored_distance", math.inf) < best.get("distance", math.inf):
                        best = {"distance": row["monitored_distance"], "step": done, "N": N,
                                "split": choice["split"], "chosen_by": choice["words"],
                                "ema": copy.deepcopy(ema.state_dict())}
                if due(done, args.sample_every, args.steps):
                    grid = sample_grid(ema, C, grid_classes, N, args, amp, device)
                    datasets.write_grid(run_dir / "samples" / f"step-{done:07d}.png", grid)
                signal = datasets.asked_to_stop(stop)  # one that comes later is for the next step
                if signal or due(done, args.save_every, args.steps):
                    datasets.save(args, done, parts, device, N_hat=N_hat, c=c, best=best,
                                  classifier=C_hash)
                if signal:
                    datasets.leave(signal, done, args)

    use_best = args.weights == "best" and best
    if use_best:
        ema.load_state_dict(best["ema"])
        N = best["N"]
    if args.export:
        export(ema, C, classes, N, args, amp, device)
    if args.eval_images:
        import metrics

        where = run_dir / f"sample-seed-{args.sample_seed}" if args.sample_seed else run_dir
        protocol = {"step": done, "weights": "last", "sample_seed": args.sample_seed}
        if use_best:
            protocol |= {"step": best["step"], "weights": "best", "chosen_by": best["chosen_by"]}
            print(f"weights of step {best['step']}, chosen by the smallest {best['chosen_by']}")
            if torch.equal(load_split(args, best["split"]).images, load_split(args, args.reference).images):
                warn(f"the {args.reference} images that score these weights have chosen them")
        y = datasets.balanced_labels(args.eval_images, K) if labelled else None
        images = draw_samples(ema, args.eval_images, FINAL, args.sample_seed, N, args, amp, y)
        # Without labels: what C takes the samples for, to train a classifier on (Table 1, Acc.).
        labels = {"labels": y} if labelled else {"predicted": predict(C, images, device)}
        datasets.save_samples(where / "samples.npz", images, **labels)

        if annotator is not None:
            protocol["annotator"] = annotator.info["path"]
        seen = {}
        for name, network in watchers.items():
            certainty, seen[name] = outputs(network, images, device).softmax(1).max(1)
            if (certainty > 0.9).any():  # Fig. 3 counts these apart
                seen[f"{name}_certain"] = seen[name][certainty > 0.9]
        kl, shares = metrics.class_shares(seen, classes, datasets.head_to_tail(counts))
        grid = datasets.rows_of(images, y if labelled else next(iter(seen.values())), grid_classes)
        datasets.write_grid(where / "samples" / "final.png", grid)
        if unlabelled:
            print(f"{where / 'samples.npz'} is written but not scored: {args.dataset} has no classes to "
                  "compare with; metrics.py takes another --dataset")
            return
        metrics.score_run(where, images, y, args, device, seen["annotator"], protocol, kl, shares)


if __name__ == "__main__":
    datasets.run_command(main)
