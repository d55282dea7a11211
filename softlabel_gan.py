"""Softlabel-GAN: label augmentation for conditional GANs (Katsumata, Vo, Nakayama; WACV 2024).

A conditional GAN that learns from few and unevenly spread images keeps generating the same few
pictures for a rare class. Softlabel-GAN is a BigGAN with another kind of label: in place of a real
image's class, the discriminator D gets the class probabilities of a classifier C, trained
beforehand on the same images: .7 dog, .2 cat, .1 horse. D's score is linear in the label, so this
dog counts a little as a cat, and the cats borrow the variety of the dogs. Fakes keep one-hot
labels, drawn uniformly. C is rewarded for doubt (weight 0.3), but one that has memorised its images
only smooths labels all the same, so ours also stops early (classifier.py, `entropy_rewarded_loss`).
`samples/borrowed.png` shows which images of other classes a class borrows.

P is the paper, S its supplement, A the authors' code (github.com/raven38/softlabel-gan), whose
training loop does not run as released; CHOICE marks what none of them says.

    python softlabel_gan.py --dataset shapeslt                     # first look: a CPU, minutes
    python softlabel_gan.py --dataset cifar10imb                   # the paper's run (Table 2)
    python softlabel_gan.py --dataset cifar10imb --labels onehot   # its baseline, DiffAug-GAN
    python softlabel_gan.py --dataset cifar10imb --labels smooth   # Smooth-GAN; mixup, ols, cotrain
    python softlabel_gan.py --dataset cifar10imb --conditioning adc   # ADC-GAN, P's Table 6
    python softlabel_gan.py --dataset folder:PATH --image-size 64  # your own images
.results/tables.md has every row of the tables, README.md --export.

`--classifier runs/.../classifier.pt` takes a checkpoint of `classifier.py --soft-labels`. Without
it one is trained first, the same for each --seed; its labels are kept in the run directory, in
soft_labels.npz. Each command resumes the run that it finds there: bit for bit on the CPU with the
same number of threads. The tables' other columns are --scores all (intra-FID is always there).
Cost, on two cores of an AMD EPYC: shapeslt 5.5 minutes with everything; cifar10imb 1.9 s for a step
of D and one of G with 32 images. The full step is four of D with 128 images each and one of G; a
full run was never made. Targets: README.md, of 10,000 samples (P) against the balanced test images
(A). For the same Softlabel-GAN P has FID 54.59 in Table 2 and 36.72 in Table 3 without a word on it;
without DiffAugment 72.81, one-hot 79.16, smoothed 83.68. 149 to 2,232 images count for a class.

From A, because P does not say: BigGAN-PyTorch's layers and initial weights, Adam's betas and eps,
four steps of D for one of G at 32 pixels, flips, EMA. Where we differ:
  * Fakes have the hinge, as in A; P's Eq. 3 omits it, probably a misprint.
  * Smoothed labels sum to 1, as in P; A's sum to 1 - alpha / K.
  * The table of --labels ols is divided by rows; A divides by columns.
  * Oversampling draws class c with probability (1 - alpha) n_c / N + alpha / K. A's weights are
    right at alpha = 1; at 0, where S has the data's distribution, they are inverse to it.
  * Batches are P's, 128 at 32 pixels (A's scripts: 50); DiffAugment has colour too (A's: not).
  * Under the SpinalNet head, CIFAR and the shapes have a ResNet-32 from scratch, P's backbone for
    CIFAR being unknown. Larger images have a Wide-ResNet-101-2 with ImageNet's weights, as in A; P
    does not mention them. A tenth of the images decides when it stops; A trains it on all of them.
  * Samples are made with the batch statistics of training; A's 32-pixel scripts use those of each
    batch of samples, which holds a single class where classes are scored apart.
  * The last weights are scored; A's had the best FID on the way, against the images of that score.
  * The vectors of spectral norm are copied into the averaged generator, not averaged.
  * bfloat16 where the hardware has it (not with --amp off); real and fake in one pass; fused Adam.
--conditioning adc is ADC-GAN (Hou et al. 2022, arXiv:2107.10060; A has no code for it): D's score
has no label, and a second head tells 2 K classes apart, "a real dog" and "a generated dog". CHOICE:
y_hat is that head's target for real images, the one place left for it; the head weighs 1 (Hou et
al. for CIFAR; 0.5 for Tiny ImageNet). FID of AnimeFace, one-hot 35.09, smoothed 23.18, soft 21.05.
Not here: vision-aided GAN, whose weights are those of several other pretrained networks (P does not
say which): each would stand frozen beside D, with a small head that is scored on the same labels,
its hinge added to L_D and L_G. Elsewhere: P's Table 7, a guided diffusion with these labels, is
cbdm.py --soft-labels; Fig. 7, colour histograms, metrics.py --scores colours.
"""

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
from classifier import build_soft_classifier, entropy_rewarded_loss, images_that_count, labels_by_classifier
from datasets import at_least, due, fail, my_share, number, positive, share, to_device

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------
# The label that D gets with a real image
#   soft     the probabilities of a classifier (Softlabel-GAN)
#   onehot   its class (DiffAug-GAN; without DiffAugment BigGAN)
#   smooth   its class with 1 - alpha, and alpha spread over all classes (Smooth-GAN)
#   ols      the mean of `soft` over the images of its class
#   mixup    its class, mixed with another image's as the images are
#   cotrain  the probabilities of a classifier that learns beside the GAN
LABELS = ("soft", "onehot", "smooth", "ols", "mixup", "cotrain")

# What differs from resolution to resolution. P: the paper, §4.3. A: the authors' code.
AT_32 = dict(
    image_size=32, width=64, discriminator_width=64,  # A
    labels="soft", smoothing=0.1, diffaug="color,translation,cutout",  # P
    batch_size=128, lr=2e-4, lr_d=2e-4,  # P
    d_steps=4, flip=True,  # A
    # CHOICE, as P gives no length: as many images as A sees. Here 5,000 epochs of 3,208 images (its
    # script for small data sets), at 64 pixels and above 1,000 of AnimeFace's 14,490.
    steps=31_000,
    ema=0.9999, ema_start=1_000,  # A
    eval_images=10_000, sample_every=1_000, save_every=500,  # eval_images: P
)
AT_128 = AT_32 | dict(
    image_size=128, width=80, discriminator_width=80,  # A
    batch_size=32, lr=1e-4, lr_d=4e-4,  # P
    d_steps=1, steps=453_000, save_every=2_000,  # d_steps: A
    ema_start=40_000,  # as many images as A's 20,000 batches of 64
)
RECIPES = {
    # Ours, for two CPU cores and a few minutes: the network for 32 pixels, narrower, a level less.
    # No cutout: a square of half the picture hides the shape.
    16: AT_32 | dict(
        image_size=16, width=8, discriminator_width=16, diffaug="color,translation", batch_size=32,
        lr=1e-3, lr_d=1e-3, d_steps=1, steps=3_500, ema=0.995, ema_start=100, sample_every=500),
    32: AT_32,
    64: AT_128 | dict(image_size=64, batch_size=512, steps=28_300, ema_start=2_500),  # batch: P
    128: AT_128,
    256: AT_128 | dict(image_size=256),  # CHOICE: as 128; neither P nor A says
}
# Ours, for your own images: narrower, fewer images a step. D sees each image as often as on
# cifar10imb, 4,950 times (31,000 x 4 steps of 128 among 3,208 images), but in 5,000 to 124,000 steps,
# as many as D's there: 30,900 for 200 images, all from 800 on.
FOLDER = dict(batch_size=32, d_steps=1, ema=0.999, ema_start=500, eval_images=2_000, save_every=250)
# CHOICE: as imbalanced CIFAR-10. At 100 most of what counts for a rare class is of other classes.
SHAPES_RHO = 26.5
FREE = datasets.FREE | {"sample_seed", "classifier"}  # classifier: its labels are compared instead


def shares(text):
    """{"cat": 0.5, "dog": 0.5} of "cat:0.5,dog:0.5"."""
    return {name: float(p) for name, _, p in (part.rpartition(":") for part in text.split(","))}


mixture = number(shares, lambda of: min(of.values()) >= 0 and math.isclose(sum(of.values()), 1),
                 "CLASS:SHARE,... with shares that sum to 1")


def parse_settings(argv=None):
    """The command line as a namespace; what is not given comes from the table of the resolution."""
    first = datasets.first_flags(argv)
    dataset = first.dataset or "cifar10imb"
    usual = 16 if dataset.startswith("shapes") else 32
    size = first.image_size or usual
    if size not in RECIPES:
        fail(f"--image-size is {size}; it must be {', '.join(map(str, RECIPES))}")
    recipe = "folder" if dataset.startswith("folder:") else "paper"
    defaults = RECIPES[size] | dict(dataset=dataset, recipe=recipe)
    if (first.recipe or recipe) == "folder":
        width = 32 if size <= 32 else 16  # whose channels grow more from level to level
        defaults |= (AT_128 if size > 32 else AT_32) | FOLDER
        defaults |= dict(image_size=size, width=width, discriminator_width=width)
        defaults |= datasets.folder_settings(first, 32, epochs=4_950, low=5_000, high=124_000)
    if dataset in datasets.LONG_TAILED:
        defaults["rho"] = SHAPES_RHO if dataset == "shapeslt" else datasets.DEFAULT_RHO
    defaults["image_size"] = usual  # any other is given, and so in the name of the run directory

    parser = datasets.settings_parser(f"Softlabel-GAN; defaults: those at {size} pixels")
    add = parser.add_argument_group("method").add_argument
    add("--recipe", choices=("paper", "folder"), help="whose defaults to take; paper: those at a resolution")
    add("--labels", choices=LABELS, help="D's labels of real images; see the settings in the script")
    add("--conditioning", choices=("projection", "adc"), default="projection", help="adc: ADC-GAN, Table 6")
    add("--classifier", metavar="PATH", type=datasets.existing_file, help="default: one is trained first")
    add("--smoothing", type=share, metavar="ALPHA", help="alpha of --labels smooth")
    add("--oversample", type=share, default=0.0, metavar="ALPHA", help="0: classes as in the data; 1: even")
    some = f'some of {",".join(datasets.DIFFAUGMENT)}, or ""'
    policy = number(str, lambda text: not text or set(text.split(",")) <= set(datasets.DIFFAUGMENT), some)
    add("--diffaug", type=policy, metavar="POLICY", help=f"parts of DiffAugment: {some}")
    add = parser.add_argument_group("networks and optimisers").add_argument
    add("--width", type=at_least(1), help="base width of the generator, ch of BigGAN")
    add("--discriminator-width", type=at_least(1), help="base width of the discriminator")
    add("--d-steps", type=at_least(1), help="steps of D before each step of G")
    add("--lr-d", type=positive, help="learning rate of D")
    add("--ema-start", type=at_least(0), help="step after which averaging starts")
    add("--sample-seed", type=at_least(0), default=0, help="another one scores other samples, elsewhere")
    add("--soft-label", type=mixture, metavar="A:P,B:Q", help="to --export pictures of this mixture")
    args = datasets.read_settings(parser, argv, "softlabel_gan", defaults, FREE)

    if args.classifier and args.labels not in ("soft", "ols"):
        fail(f"--labels {args.labels} asks no classifier; --classifier is for soft and ols")
    if args.labels != "smooth" and args.smoothing != AT_32["smoothing"]:
        fail(f"--labels {args.labels} smooths nothing; --smoothing is for smooth")
    if args.eval_images == 1:
        fail("--eval-images 1: scores need at least 2 samples")
    if args.soft_label and (args.classes or not args.export):
        fail("--soft-label is for --export, in place of --classes")
    return args


# --------------------------------------------------------------------------------------------------
# The paper's equations
# --------------------------------------------------------------------------------------------------
# x_r, x_f   (B, 3, R, R) real and fake images, in [-1, 1]     K  number of classes
# y_hat      (B, K) labels of real images                      N  number of training images
# y_f        (B, K) labels of fakes: one-hot, uniform          C  the classifier
# D_real     (B,) D(x_r, y_hat), scores without bound          p  (N, K) C's probabilities of them
# D_fake     (B,) D(x_f, y_f), likewise                        z  (B, d_z) standard normal
# D sees every image after DiffAugment. Every label is a distribution over the classes.
def discriminator_loss(D_real, D_fake):
    """Eqs 1 and 3: E[f_D(-D(x_r, y_hat))] + E[f_D(D(x_f, y_f))], f_D(t) = max(0, 1 + t). Scalar.

    Eq. 1 has the one-hot y_r for y_hat. Without its second f_D, Eq. 3 as printed has no lower bound.
    """
    # TRY: F.softplus(-D_real).mean() + F.softplus(D_fake).mean(), the loss of the first GANs. It
    # has no margin: D pushes its scores apart without limit, see D_real and D_fake in the log.
    return F.relu(1 - D_real).mean() + F.relu(1 + D_fake).mean()


def generator_loss(D_fake):
    """Eq. 2: -E[D(G(z, y_f), y_f)]. Scalar."""
    return -D_fake.mean()


# ADC-GAN adds these to Eqs 3 and 2. real, fake (B, 2 K): logits of D's class head for x_r and x_f;
# q: their softmax, first for the real images of each class, q_c+, then for its fakes, q_c-.
ADC_WEIGHT = 1.0  # Hou et al., their code for CIFAR


def adc_discriminator_loss(real, fake, y_hat, y_f):
    """-E[sum_c y_hat_c log q_c+(x_r)] - E[sum_c y_f_c log q_c-(x_f)]. Scalar."""
    none = torch.zeros_like(y_hat)
    on_real = F.cross_entropy(real, torch.cat([y_hat, none], 1))
    return on_real + F.cross_entropy(fake, torch.cat([none, y_f], 1))


def adc_generator_loss(fake, y_f):
    """-E[sum_c y_f_c (log q_c+(x_f) - log q_c-(x_f))], where the softmax's sum cancels. Scalar."""
    as_real, as_fake = fake.chunk(2, 1)
    return -(y_f * (as_real - as_fake)).sum(1).mean()


def smooth_labels(y, alpha):
    """Smooth-GAN, §4.2: (1 - alpha) y + alpha / K. (N, K) in and out."""
    return (1 - alpha) * y + alpha / y.shape[1]


def mixup(x, y, lam, other):
    """Mixup, §4.2: lambda x + (1 - lambda) x', labels likewise. other (B,): which image is x'."""
    return lam * x + (1 - lam) * x[other], lam * y + (1 - lam) * y[other]


def online_label_smoothing(p, classes):
    """OLS as in A: (K, K), whose row i is the label of each real image of class i.

    Row i is the mean of p over the images of class i that C recognises; without any it is one-hot.
    p (N, K); classes (N,): the images'. Zhang et al. 2021, who invented OLS, renew the table each
    epoch. A divides entry (i, j) by the number for class j, not for class i: its rows sum to more
    than 1 for the head, and the rarer a class the larger its column.
    """
    K = p.shape[1]
    right = p.argmax(1) == classes
    y, p = F.one_hot(classes[right], K).to(p), p[right]
    total, count = y.T @ p, y.sum(0)[:, None]  # (K, K), (K, 1)
    return torch.where(count > 0, total / count.clamp(min=1), torch.eye(K, dtype=p.dtype))


def label_augmentation(how, classes, K, p=None, alpha=0.1):
    """§4.2, the function T_y: the labels that D gets with the training images, (N, K) float32.

    classes (N,): the images'. p (N, K): for soft, ols. Mixup and cotrain: one-hot, till the loop.
    """
    y = F.one_hot(classes, K).double()
    if how == "soft":
        y = p  # y_hat = C(x). TRY: (y + p) / 2: classes lend each other half as much
    elif how == "smooth":
        y = smooth_labels(y, alpha)
    elif how == "ols":
        y = online_label_smoothing(p.double(), classes)[classes]
    return y.float()


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------
# BigGAN (Brock et al. 2019, arXiv:1809.11096), not the deep one, as in A. CHANNELS are those of the
# generator from 4 x 4 pixels up, in multiples of --width; the discriminator's are the same from the
# image down. Above 32 pixels there is more: z comes in parts, one for each block ("hierarchical"),
# the blocks share an embedding of the class, and 64 x 64 pixels have attention.
# Parameters with K classes, generator and discriminator: at 32 pixels 4,273,667 + 3,072 K and
# 4,204,801 + 256 K; at 128 pixels 49,200,804 + 128 K and 60,034,482 + 1,280 K.
CHANNELS = {
    16: (4, 4, 4), 32: (4, 4, 4, 4), 64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1), 256: (16, 16, 8, 8, 4, 2, 1),
}
FLAT_LATENT = 128  # d_z up to 32 pixels: P, §4.3
CHUNK = 20  # part of z, above, for the first layer and for each block: P
EMBEDDING = 128  # of the class, above: P
ATTENTION_AT = 64  # pixels. The discriminator of 64 pixels has none: no block of it gives 64 x 64


def latent_size(image_size):
    """d_z: 128 up to 32 pixels; above, 20 for the first layer and for each block."""
    return FLAT_LATENT if image_size <= 32 else CHUNK * len(CHANNELS[image_size])


class ConditionalNorm(nn.Module):
    """Batch normalisation, then (1 + W_g c) x + W_s c. c (B, code_size): class and noise."""

    def __init__(self, channels, code_size, eps):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gain, self.shift = (nn.Linear(code_size, channels, bias=False) for _ in range(2))

    def forward(self, x, code):
        gain, shift = self.gain(code)[:, :, None, None], self.shift(code)[:, :, None, None]
        return self.norm(x) * (1 + gain) + shift


class GeneratorBlock(nn.Module):
    """(B, in, H, W), code -> (B, out, 2H, 2W)."""

    def __init__(self, width_in, width_out, code_size, eps):
        super().__init__()
        self.norm1 = ConditionalNorm(width_in, code_size, eps)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = ConditionalNorm(width_out, code_size, eps)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x, code):
        h = F.interpolate(F.relu(self.norm1(x, code)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), code)))
        # 1 x 1, then upsampled: the same as the other way round, at a quarter of the price.
        return h + F.interpolate(self.skip(x), scale_factor=2)


class DiscriminatorBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), half the height and width if `down`."""

    def __init__(self, width_in, width_out, first, down):
        super().__init__()
        self.first, self.down = first, down
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        same = width_in == width_out and not down
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x):
        h = x if self.first else F.relu(x)  # an image is not activated
        h = self.conv2(F.relu(self.conv1(h)))
        if self.down:  # skip: pooled, then 1 x 1: the same, at a quarter of the price
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.skip(x)


class Attention(nn.Module):
    """Self-attention over pixels (SAGAN: Zhang et al. 2019), (B, C, H, W) in and out; the identity
    at first, as gamma = 0.
    """

    def __init__(self, channels):
        super().__init__()
        narrow = max(1, channels // 8)
        self.query, self.key = (nn.Conv2d(channels, narrow, 1, bias=False) for _ in range(2))
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        maps = self.query(x), F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2)
        q, k, v = (datasets.laid_out(t).flatten(2).transpose(1, 2) for t in maps)  # (B, pixels, channels)
        # Zeros change no score; with multiples of 8 and a dimension for heads a GPU has a kernel that
        # never writes the (pixels, pixels / 4) table. No 1 / sqrt(channels), as in SAGAN.
        q, k = (F.pad(t, (0, -t.shape[-1] % 8)) for t in (q, k))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]
        h = datasets.laid_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))
        return x + self.gamma * self.out(h)


def initialise(network, image_size, plain=()):
    """Weights N(0, 0.02^2) up to 32 pixels, orthogonal above (A); zero biases; spectral norm (A),
    but for the layers in `plain`: W / sigma(W) (Miyato et al. 2018), with sigma from one step of
    the power method in each forward pass in training mode.
    """
    draw = partial(nn.init.normal_, std=0.02) if image_size <= 32 else nn.init.orthogonal_
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if module not in plain:
                datasets.spectral_norm(module, eps=1e-8 if image_size <= 32 else 1e-6)  # eps: A


class Generator(nn.Module):
    """z (B, d_z), y (B, K) one-hot float -> (B, 3, R, R) float32 in [-1, 1]."""

    def __init__(self, image_size, width, num_classes):
        super().__init__()
        widths = [width * c for c in CHANNELS[image_size]]
        large = self.hierarchical = image_size > 32
        self.shared = nn.Linear(num_classes, EMBEDDING, bias=False) if large else nn.Identity()
        z_size, code_size = (CHUNK, EMBEDDING + CHUNK) if large else (FLAT_LATENT, num_classes)
        eps = 1e-4 if large else 1e-5  # of the batch norms: A
        self.first = nn.Linear(z_size, 4 * 4 * widths[0])
        self.blocks = nn.ModuleList(GeneratorBlock(*pair, code_size, eps) for pair in pairwise(widths))
        places = [i for i in range(len(self.blocks)) if 8 * 2**i == ATTENTION_AT]  # 8 * 2^i pixels
        self.attention = nn.ModuleDict({str(i): Attention(widths[i + 1]) for i in places})
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)
        # Without spectral norm, as in A: what stands for an embedding of the classes.
        norms = [n for block in self.blocks for n in (block.norm1, block.norm2)]
        by_class = [layer for n in norms for layer in (n.gain, n.shift)]
        initialise(self, image_size, plain=[self.shared] if large else by_class)

    def forward(self, z, y):
        code = self.shared(y)
        codes = [code] * len(self.blocks)
        if self.hierarchical:
            z, *chunks = z.split(CHUNK, 1)
            codes = [torch.cat([code, chunk], 1) for chunk in chunks]
        h = self.first(z).view(len(z), -1, 4, 4)
        for i, (block, c) in enumerate(zip(self.blocks, codes, strict=True)):
            h = block(h, c)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return self.last(F.relu(self.norm(h))).tanh().float()


class Discriminator(nn.Module):
    """x (B, 3, R, R) augmented, y (B, K) a distribution over classes -> scores (B,) without bound.

    §4.3: D(x, y) = phi(x) V y + psi(phi(x)). V has no bias, so the score is linear in y: where y
    sums to 1, D(x, y) is the mean of D(x, class) weighted by y. A one-hot y picks a column of V,
    the embedding of the usual projection discriminator. With `adc` the score is psi(phi(x)), and
    (B, 2 K) logits come with it, else None.
    """

    def __init__(self, image_size, width, num_classes, adc=False):
        super().__init__()
        widths = [3] + [width * c for c in reversed(CHANNELS[image_size])]
        # Down to 8 x 8 pixels up to 32, to 4 x 4 above; the other blocks keep the size.
        downs = int(math.log2(image_size // (8 if image_size <= 32 else 4)))
        layers = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [DiscriminatorBlock(a, b, first=i == 0, down=i < downs)]
            layers += [Attention(b)] if image_size // 2 ** (i + 1) == ATTENTION_AT else []
        self.phi = nn.Sequential(*layers, nn.ReLU())
        self.V = None if adc else nn.Linear(num_classes, widths[-1], bias=False)
        self.class_head = nn.Linear(widths[-1], 2 * num_classes) if adc else None
        self.psi = nn.Linear(widths[-1], 1)
        initialise(self, image_size)

    def forward(self, x, y):
        phi = self.phi(x).float().sum((2, 3))  # (B, l): the sum over the pixels, not the mean
        # bfloat16 has 8 bits: too few to compare scores with 1.
        with torch.autocast(x.device.type, enabled=False):
            score = self.psi(phi)[:, 0]
            if self.class_head:
                return score, self.class_head(phi)
            return (phi * self.V(y)).sum(1) + score, None


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
AT_ONCE = 250  # samples of 32 x 32 pixels
GRID, FINAL, EXPORT = range(3)  # the pictures on the way, what is scored, --export: no shared noise


def noise_and_labels(n, d_z, K, device):
    """§4.2: z (n, d_z) and y_f (n, K), one-hot, each class equally likely: what G makes fakes from.

    Drawn on the CPU: the same on each device. Of n, this process's share.
    """
    z, classes = my_share(torch.randn(n, d_z)), my_share(torch.randint(K, (n,)))
    return to_device(z, device), F.one_hot(to_device(classes, device), K).float()


def latents(n, d_z, kind, seed):
    """z (n, d_z) for samples to look at or to score, from the CPU: the same on each device."""
    generator = torch.Generator().manual_seed(datasets.seed_from(kind, seed))
    return torch.randn(n, d_z, generator=generator)  # TRY: 0.5 * this: cleaner, more alike


@torch.no_grad()
def generate(generator, z, classes, K, args, amp):
    """Images (n, 3, R, R) uint8 on the CPU from z (n, d_z) and classes (n,) or labels (n, K), by the
    averaged generator in eval mode: batch norm has the averages of training.
    """
    device = next(generator.parameters()).device
    z, classes = (t[datasets.my_part(len(t))] for t in (z, classes))
    at_once = datasets.images_at_once(AT_ONCE, args.image_size)
    images = []
    for z_part, part in zip(z.split(at_once), classes.split(at_once), strict=True):
        y = part if part.is_floating_point() else F.one_hot(part, K).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            x = generator(z_part.to(device), y.to(device))
        images.append(datasets.to_uint8(x))
    return datasets.collect(torch.cat(images))


def sample_grid(generator, classes, K, args, amp):
    """Ten samples of each class (n,), always of the same ten z: (10 n, 3, R, R) uint8."""
    z = latents(datasets.GRID_COLUMNS, latent_size(args.image_size), GRID, args.seed)
    y = classes.repeat_interleave(datasets.GRID_COLUMNS)
    return generate(generator, z.repeat(len(classes), 1), y, K, args, amp)


def export(ema, classes, args, amp):
    """--export: pictures of each class, or of --soft-label: a distribution as the label of G."""
    K = len(classes)
    y_f = torch.eye(K + 1, K)  # row k: class k. The last: the mixture
    if args.soft_label:
        for name, p in args.soft_label.items():
            y_f[K, datasets.class_number(name, classes, "--soft-label")] = p
        args.classes = [" ".join(f"{name} {p:g}" for name, p in args.soft_label.items())]

    def draw(k, start, n):
        z = latents(n, latent_size(args.image_size), EXPORT, datasets.seed_from(args.sample_seed, k, start))
        return generate(ema, z, y_f[k].expand(n, K), K, args, amp)

    datasets.export_by_label(args, ema, classes + (args.classes if args.soft_label else []), draw)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
# In the log, of D's last step for each step of G. L_C: cotrain's classifier.
LOGGED = ("L_D", "L_G", "L_C", "D_real", "D_fake")


def draw_borrowed(path, train, y_hat, rows):
    """Fig. 2: a row for each of these classes, the images of other classes that count most for it, by
    y_hat (N, K). White where less than a row of them counts at all. Equals come in random order.
    """
    shuffled = torch.randperm(len(y_hat), generator=torch.Generator().manual_seed(0))
    index, classes = [], []
    for k in rows:
        lent = y_hat[shuffled, k].masked_fill(train.labels[shuffled] == k, 0)
        most = lent.argsort(descending=True, stable=True)[: datasets.GRID_COLUMNS]
        index.append(shuffled[most[lent[most] > 0.01]])  # as in `images_that_count`
        classes.append(k.expand(len(index[-1])))
    grid = datasets.rows_of(train.images[torch.cat(index)], torch.cat(classes), rows)
    datasets.write_grid(path, grid)


def main(argv=None):
    args = parse_settings(argv)
    device = datasets.pick_device(args.device)
    amp = datasets.use_bf16(args.amp, device)
    run_dir = Path(args.run_dir)
    load = partial(datasets.load, args.dataset, args.data_dir, image_size=args.image_size, rho=args.rho,
                   imbalance=args.imbalance)
    train = load(split="train")
    args.training_data = train.fingerprint
    state = datasets.find_run(args, FREE)
    K, B = len(train.classes), args.batch_size
    if K < 2:
        fail(f"{args.dataset} has one class; a conditional GAN needs two")
    if args.eval_images:  # if it is missing, fail now and not after the training
        load(split=args.reference)

    # The labels that D gets with the training images, (N, K). For soft, T_y(x) = C(x): C sees each image
    # once, neither mirrored nor augmented. It is trained here if need be.
    p = None
    if args.labels in ("soft", "ols"):
        with datasets.first_process_first():
            p = labels_by_classifier(args, train, run_dir, device)
    y_train = label_augmentation(args.labels, train.labels, K, p, args.smoothing)
    labels_hash = hashlib.sha256(y_train.numpy().tobytes()).hexdigest()
    if state and state.get("labels_hash") != labels_hash:
        fail(f"{run_dir} holds a run with other labels; choose another --run-dir")
    counted = None if args.labels in ("mixup", "cotrain") else images_that_count(y_train).tolist()
    grid_classes = datasets.grid_classes(train.counts)
    if p is not None:
        draw_borrowed(run_dir / "samples" / "borrowed.png", train, y_train, grid_classes)

    # Generator, its moving average (used for sampling), and discriminator.
    torch.manual_seed(args.seed)
    layout = datasets.layout(device)
    G = datasets.share_batch_norms(Generator(args.image_size, args.width, K)).to(device, **layout)
    adc = args.conditioning == "adc"
    D = Discriminator(args.image_size, args.discriminator_width, K, adc).to(device, **layout)
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    average = datasets.Average(ema, G)
    eps = 1e-8 if args.image_size <= 32 else 1e-6
    adam = dict(betas=(0.0, 0.999), eps=eps, fused=device.type in ("cuda", "cpu"))  # betas, eps: A
    optimizer_G = torch.optim.Adam(G.parameters(), args.lr, **adam)
    optimizer_D = torch.optim.Adam(D.parameters(), args.lr_d, **adam)
    real_by = args.oversample or "data"
    # Each image comes with its row of y_train: the whole method, as far as the loop is concerned.
    batches = datasets.Batches(train, B * args.d_steps, real_by, args.flip, device, args.seed, y_train)
    log = datasets.Log(args, LOGGED, device)
    parts = dict(G=G, D=D, ema=ema, optimizer_G=optimizer_G, optimizer_D=optimizer_D)
    parts |= dict(batches=batches, log=log)
    if args.labels == "cotrain":
        C, optimizer_C = build_soft_classifier(args.dataset, K, args.image_size, device)
        datasets.share_batch_norms(C)
        parts |= {"C": C, "optimizer_C": optimizer_C}

    # Resume the run that the directory holds.
    start = state["step"] if state else 0
    if state:
        datasets.restore(state, parts, device)
    del state  # a second copy of everything
    parameters = [sum(w.numel() for w in network.parameters()) for network in (G, D)]
    resumed = f"; resumed at step {start}" if start else ""
    print(f"{'ADC-GAN' if adc else 'BigGAN'}, labels {args.labels}, DiffAugment {args.diffaug or 'off'}, on "
          f"{args.dataset}: {train.summary}; {parameters[0]:,} + {parameters[1]:,} parameters; {device}"
          f"{', bf16' if amp else ''}; {run_dir}{resumed}", flush=True)

    net_G, net_D = (torch.compile(G), torch.compile(D)) if args.compile else (G, D)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=amp)
    d_z = latent_size(args.image_size)
    done, L_C = start, torch.zeros((), device=device)
    if start < args.steps and not args.eval_only:
        datasets.write_config(args, device, bf16=amp, parameters=parameters, images_that_count=counted)
        with datasets.stop_signals() as stop, log.open(start, args.steps):
            for step in range(start, args.steps):
                # Real images for all steps of D, and their labels.
                x_all, y_all = next(batches)
                if args.labels == "mixup":  # one lambda for all of them, from Beta(0.2, 0.2): A
                    lam = torch.distributions.Beta(0.2, 0.2).sample().item()
                    other = to_device(torch.randperm(len(x_all)), device)
                    x_all, y_all = mixup(x_all, y_all, lam, other)

                # D, --d-steps times.
                for x_r, y_hat in zip(x_all.split(B), y_all.split(B), strict=True):
                    x_r, y_hat = my_share(x_r), my_share(y_hat)
                    # Co-training. CHOICE, as S has one sentence on it: C learns at each step of D,
                    # and the same pass, in training mode, gives the labels.
                    if args.labels == "cotrain":
                        with autocast():
                            logits = C(x_r).float()
                        L_C = entropy_rewarded_loss(logits, y_hat.argmax(1))  # still one-hot
                        y_hat = logits.detach().softmax(1)
                        optimizer_C.zero_grad()
                        L_C.backward()
                        datasets.average_gradients(C)
                        optimizer_C.step()

                    # Fakes, then the scores of real and fake images, augmented, in one pass.
                    z, y_f = noise_and_labels(B, d_z, K, device)
                    with autocast():
                        with torch.no_grad():
                            x_f = net_G(z, y_f)
                        x = datasets.diffaugment(torch.cat([x_r, x_f]), args.diffaug, batches=2)
                        scores, logits = net_D(x, torch.cat([y_hat, y_f]))

                    D_real, D_fake = scores.chunk(2)
                    L_D = discriminator_loss(D_real, D_fake)  # Eq. 3
                    if adc:
                        L_D = L_D + ADC_WEIGHT * adc_discriminator_loss(*logits.chunk(2), y_hat, y_f)
                    optimizer_D.zero_grad()
                    L_D.backward()
                    datasets.average_gradients(D)
                    optimizer_D.step()

                # G, on one-hot labels always.
                D.requires_grad_(False)  # its gradients would be computed and thrown away
                z, y_f = noise_and_labels(B, d_z, K, device)
                with autocast():
                    x = datasets.diffaugment(net_G(z, y_f), args.diffaug)
                    scores, logits = net_D(x, y_f)
                L_G = generator_loss(scores)  # Eq. 2
                if adc:
                    L_G = L_G + ADC_WEIGHT * adc_generator_loss(logits, y_f)
                D.requires_grad_(True)
                optimizer_G.zero_grad()
                L_G.backward()
                datasets.average_gradients(G)
                optimizer_G.step()

                done = step + 1
                # TRY: update(0): samples are of the raw weights, and the grids jump about
                average.update(args.ema if done > args.ema_start else 0)

                log.add(L_D, L_G, L_C, D_real.mean(), D_fake.mean())
                if due(done, datasets.LOG_EVERY, args.steps):
                    log.write(done, images=done * B * args.d_steps)
                if due(done, args.sample_every, args.steps):
                    grid = sample_grid(ema, grid_classes, K, args, amp)
                    datasets.write_grid(run_dir / "samples" / f"step-{done:07d}.png", grid)
                signal = datasets.asked_to_stop(stop)  # one that comes later is for the next step
                if signal or due(done, args.save_every, args.steps):
                    datasets.save(args, done, parts, device, labels_hash=labels_hash)
                if signal:
                    datasets.leave(signal, done, args)

    if args.export:
        export(ema, train.classes, args, amp)
    if args.eval_images:
        import metrics  # here: SciPy takes a second to import, and training need not wait for it
        where = run_dir / f"sample-seed-{args.sample_seed}" if args.sample_seed else run_dir
        classes = datasets.balanced_labels(args.eval_images, K)
        z = latents(len(classes), d_z, FINAL, args.sample_seed)
        images = generate(ema, z, classes, K, args, amp)
        datasets.save_samples(where / "samples.npz", images, labels=classes)
        protocol = {"step": done, "sample_seed": args.sample_seed}
        per_class = [{"images_that_count": n} for n in counted] if counted else None
        metrics.score_run(where, images, classes, args, device, None, protocol, None, per_class)


if __name__ == "__main__":
    datasets.run_command(main)
