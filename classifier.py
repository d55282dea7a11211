"""ResNet-32 for small images: it annotates samples, and two of the GANs learn with it.

Network: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2.
Recipe: LDAM-DRW's (Cao et al. 2019, arXiv:1906.07413), which the long-tailed papers share: SGD, 200 epochs,
random crops and flips. From epoch 160 on the rate is lower, and rare classes weigh more in the loss (DRW).

    python classifier.py --dataset cifar10lt --rho 100           # for a GAN that learns from cifar10lt
    python classifier.py --dataset cifar100 --split reference    # an annotator: it learns from balanced data
    python classifier.py --dataset cifar10imb --soft-labels      # gives Softlabel-GAN its labels
    python classifier.py --dataset cifar10lt --label-fraction 0.001        # CBGAN, Table 3: 5 labels a class
    python classifier.py --dataset cifar10lt --train-on runs/<a run>/samples.npz    # CBGAN, Table 1: Acc.
    python classifier.py --dataset cifar100lt --add runs/<a run>/samples.npz       # CBDM, Table 4
    python classifier.py --dataset folder:PATH --add SAMPLES --repeats 5    # do they help? With and without
    python metrics.py samples.npz --dataset cifar100lt --features classifier:runs/<that run>/classifier.pt

The same command resumes the run that it finds, bit for bit on a CPU. The network takes images in [-1, 1] and
normalises them itself; CBGAN's code hands them to a network whose training has CIFAR's mean and deviation.

CBGAN calls `--split train` its classifier and `--split reference` its annotator.
    accuracy there, %  CIFAR-10 rho 100 76.67, rho 10 87.70, balanced 92.29; CIFAR-100 rho 10 57.63;
                       iNaturalist 46.90; LSUN 82.40, 88.07, 90.53; few labels 84.96 (CIFAR-10), 82.40 (LSUN)
    Fig. 5             --rho 1, 10, 100, 500, 5000 for a GAN at --rho 10; its axis: per_class.csv, last row
    iNaturalist        plain cross-entropy: --loss ce
    Acc., Table 1      --train-on 50,000 samples. No recipe is given. CHOICE: plain cross-entropy, as is usual

Softlabel-GAN's classifier starts from ImageNet (here: --network wide_resnet101_2) and recognises up to 99.9 %
of the very images that it labels. Ours starts from random weights and stops early, on cifar10imb at 50 to
60 %: otherwise it would learn its images by heart, and its labels would be plain smoothing (see
`entropy_rewarded_loss`). Nearer to the paper: a classifier of other data (--dataset cifar100 --split
reference), then --soft-labels --hold-out 0 --init-from that one, which takes all its weights but the head's
and trains to the end; or --network wide_resnet101_2. In log.jsonl `training_accuracy`, `images_that_count`
and `off_class_distance` say how far it is; fewer --epochs if the labels collapse.
Measured at 16 pixels alone (--image-size 16 --batch-size 64 --epochs 36, hold-out 0, one seed, a thread of a
Xeon), after 23 epochs on cifar10imb: from scratch 69 % of its images right, 1,839 to 2,991 count for a class;
from 3 epochs of CIFAR-100, 81 % and 1,028 to 2,947; after all 36 89 % and 778 to 2,768 (the paper: 149 to
2,232), and the labels have not collapsed (distance 0.53). At 32 pixels not measured, so the default stays.

Cost, on two cores of an AMD EPYC: shapes 12 to 19 s for the annotator, which recognises 98.8 to 99.8 % of the
test images, and half a minute for a GAN's classifier. At CIFAR's size 128 images take 0.26 s in bfloat16 and
0.40 s in float32; 30 epochs of cifar10lt 20 minutes beside other work, 59.5 %. All 200: not measured.

Deviations from CBGAN and from LDAM-DRW
- The loss is focal (gamma = 1) with DRW, as CBGAN's released configs name it; its text says "DRW" alone.
  Rate 0.1 after 5 epochs of warm-up, as in LDAM-DRW's code; CBGAN prints 0.01. Annotators learn with plain
  cross-entropy. LDAM's own loss is left out: CBGAN's code has no head for it.
- The weights of the last epoch are kept; LDAM-DRW keeps the epoch that does best on the *test* set. Ours
  logs the best of some 20 tests on the way beside it.
- Shorter runs keep the proportions of the schedule; shapes and folders have a short schedule of our own.
- Few labels: ResNet-50 with torchvision's ImageNet-1k weights. CBGAN fine-tunes BiT's R50x1 (ImageNet-21k
  weights, which torchvision does not have) after BiT's own resizing and cropping: expect other numbers.
"""

import argparse
import hashlib
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import datasets
from datasets import (
    ImageSet,
    InputError,
    at_least,
    atomic_write,
    decay,
    due,
    fail,
    not_negative,
    positive,
    warn,
)

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------
# Channel mean and deviation of pixels in [0, 1]. CIFAR: the constants of LDAM-DRW, for both CIFARs.
# CHOICE: 0.5 for everything else, so that the first layer sees the [-1, 1] image itself.
CIFAR_STATISTICS = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
CENTRED = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # torchvision

# LDAM-DRW, cifar_train.py. The weight decay acts on every parameter, batch norm included.
PAPER_RECIPE = dict(epochs=200, batch_size=128, lr=0.1, schedule="steps", flip=True, weight_decay=2e-4,
                    save_every=1)
MOMENTUM = 0.9  # LDAM-DRW, BiT

# CHOICE: small batches, as few images are seen: 98.8 to 99.8 % by seed and threads; with batches of 64, 96 %.
SHAPES_RECIPE = PAPER_RECIPE | dict(batch_size=32, lr=0.05, schedule="cosine", flip=False)
SHAPES_IMAGES_SEEN = 12_000  # 3 epochs of the reference split
# 8 epochs of shapeslt. Accuracy in the tail third with seeds 0, 1, 2, in %: focal + DRW 86, 97, 98;
# cross-entropy 87, 92, 91. With 5 epochs (seed 0): 42 and 4.
SHAPES_IMAGES_IN_THE_LOOP = 19_000

# BiT (Kolesnikov et al. 2020, arXiv:1912.11370), its rule for fewer than 20,000 images: 500 steps, no weight
# decay. A batch has 512 images at most; BiT repeats images to fill it.
FEW_LABELS_RECIPE = PAPER_RECIPE | dict(batch_size=512, lr=0.003, schedule="bit", weight_decay=0.0,
                                        save_every=50)
FEW_LABELS_STEPS = 500

# Softlabel-GAN: §4.3 gives the head and the weight of the entropy, nothing else. For torchvision's networks
# the rest is that of the official script for Stanford Cars, without its rotations; else ours.
HELD_OUT = 0.1  # CHOICE: see `held_out`
PATIENCE = 30  # CHOICE: epochs without a smaller held-out loss, after which training stops
SOFT_LABELS = dict(head="spinal", entropy_weight=0.3, hold_out=HELD_OUT)
# CHOICE, by the held-out loss: 0.55 on cifar10imb and 2.44 on cifar100imb; with LDAM-DRW's rate and decay and
# batches of 64, 0.60 and 2.67.
SOFT_RECIPE = PAPER_RECIPE | SOFT_LABELS | dict(epochs=60, batch_size=32, lr=0.05, weight_decay=5e-4,
                                                schedule="cosine")
SOFT_LARGE_RECIPE = SOFT_RECIPE | dict(pretrained=True, normalisation=IMAGENET_STATISTICS, epochs=25,
                                       batch_size=8, lr=0.001, schedule="sevens", weight_decay=0.0)

# CHOICE: minutes on two cores. 20 classes of CIFAR-100, 150 to 15 images each; right of 2,000 training images
# held back, in %, after seeing 20,000, 40,000, 60,000, 80,000 images with decay 5e-4: 33, 43, 48, 47 (a seed;
# rate 0.1, batches of 32 or 64: 43 after 40,000); with LDAM-DRW's 2e-4, so that flags reach its recipe, 46.
FOLDER_RECIPE = PAPER_RECIPE | dict(batch_size=32, lr=0.05, schedule="cosine")
FOLDER_IMAGES_SEEN = 60_000
FOLDER_EPOCHS = 10, 200  # at least, for many images, and at most, for few

# These may differ between two commands on one run directory: they do not define the experiment. What is in
# the samples and in the first weights does: it is compared by fingerprints.
FREE = {"data_dir", "run_dir", "device", "save_every", "train_on", "add", "label_with", "init_from",
        "repeats"}


def parse_settings(argv=None):
    """The command line as a namespace. What is None in it depends on the data, and `complete` fills it in."""
    description = "Train a classifier that annotates samples or guides a GAN."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="shapes", help="a name that datasets.py knows (default: shapes)")
    add("--split", default="train", choices=["train", "reference"],
        help="train: what a generator learns from; reference: balanced data, for an annotator")
    add("--rho", type=not_negative, help=f"imbalance ratio of a long-tailed set (default: "
        f"{datasets.DEFAULT_RHO}), or to thin a balanced folder")
    add("--imbalance", choices=datasets.IMBALANCES, default="exp", help="with --rho; exp (default): falls "
        "from class to class; step: one half of the classes is the head, the other the tail")
    add("--data-dir", default="data", help="where prepared data sets lie (default: data)")
    add("--image-size", type=at_least(1), help="pixels a side (default: the data set's own)")
    add("--label-fraction", type=positive, metavar="F",
        help="fine-tune a ResNet-50 that knows ImageNet on this share of the balanced training images")
    add("--train-on", metavar="NPZ", help="learn from generated images and test on real ones: the classifier "
        "accuracy score of Ravuri & Vinyals 2019")
    add("--add", metavar="NPZ", help="learn from the training split and these generated images, or from "
        "those in DIR/<class>/*.png; prints macro precision and recall on the test images")
    add("--label-with", metavar="CLASSIFIER.pt", help="labels the images of --train-on or --add")
    add("--repeats", type=at_least(2), metavar="N", help="do these images help? Trains N classifiers with "
        "them and N on the training split alone, for as many steps, and compares; --epochs: of the latter")

    add = parser.add_argument_group("Softlabel-GAN").add_argument
    add("--soft-labels", action="store_true", help="train as Softlabel-GAN does; the next three change that")
    add("--head", choices=["linear", "spinal"], help="linear: the ResNet of the supplement (default: spinal)")
    add("--entropy-weight", type=not_negative, metavar="W", help="loss: cross-entropy - W entropy (0.3)")
    add("--hold-out", type=decay, metavar="F",
        help=f"share of each class that early stopping watches; 0: train to the end (default: {HELD_OUT})")

    add = parser.add_argument_group("network").add_argument
    add("--network", choices=NETWORKS,
        help="default: resnet32; a folder above 32 pixels: resnet32at32; few labels: resnet50")
    add("--pretrained", action=argparse.BooleanOptionalAction,
        help="start from ImageNet's weights (default: torchvision's networks do)")
    add("--init-from", type=datasets.existing_file, metavar="CLASSIFIER.pt",
        help="start from the weights of another classifier, with a head drawn anew")

    add = parser.add_argument_group("training; defaults: LDAM-DRW's, BiT's, ours").add_argument
    add("--loss", choices=["ce", "focal"], help="default: focal for --split train (CBGAN's configs), else ce")
    add("--drw", action=argparse.BooleanOptionalAction,
        help="weigh rare classes up in the last fifth of the epochs (default: with focal)")
    add("--epochs", type=at_least(1), help="default: 200; shapes: 12,000 images, for a GAN 19,000; folder: "
        f"{FOLDER_IMAGES_SEEN:,} images; few labels: 500 steps; soft labels: 60")
    add("--batch-size", type=at_least(1), help="default: 128; few labels: 512; shapes, folder, soft: 32")
    add("--lr", type=positive, help="highest rate (default: .1; few labels: .003; shapes, folder, soft: .05)")
    add("--flip", action=argparse.BooleanOptionalAction,
        help="mirror half of the images; not for text (default: all but shapes)")
    add("--schedule", choices=["steps", "cosine", "bit", "sevens"], help="steps: down at 80 and 90 %% of the "
        "epochs; cosine: shapes, folder, soft labels; bit: few labels; sevens: soft, wide_resnet101_2")
    add("--seed", type=at_least(0), default=0, help="of the weights, the order and the crops (default: 0)")

    add = parser.add_argument_group("run").add_argument
    add("--run-dir", help="default: runs/classifier-<data>-<what differs>-s<seed>; with --train-on and --add "
        "beside the samples, cas-<samples>-... and with-<samples>-...")
    add("--save-every", type=at_least(1), help="epochs between two checkpoints (default: 1; few labels: 50)")
    add("--device", default="auto", help="auto (default): CUDA, else MPS, else the CPU")
    add("--amp", choices=["auto", "bf16", "off"], default="auto",
        help="bfloat16; auto (default): where the hardware has it")
    args = parser.parse_args(argv)

    if args.split == "reference":  # the same annotator for cifar10, cifar10lt at any rho, and cifar10imb
        args.dataset = balanced(args.dataset)
        args.rho, args.imbalance = None, "exp"
    if args.rho is None and args.dataset in datasets.LONG_TAILED:
        args.rho = datasets.DEFAULT_RHO
    given = {"--split reference": args.split == "reference", "--train-on": args.train_on, "--add": args.add,
             "--label-fraction": args.label_fraction, "--soft-labels": args.soft_labels}
    if len(sources := [flag for flag, value in given.items() if value]) > 1:
        fail(f"{' and '.join(sources)} each say what to learn from; choose one")
    for flag, value in (("--label-with", args.label_with), ("--repeats", args.repeats)):
        if value and not (args.train_on or args.add):
            fail(f"{flag} is for the images of --train-on or --add, and neither is given")
    if args.init_from and args.pretrained:
        fail("--init-from and --pretrained each say where the weights come from; choose one")
    rewarded = args.soft_labels if args.entropy_weight is None else args.entropy_weight > 0
    if rewarded and (args.loss == "focal" or args.drw):
        fail("the entropy is rewarded with --loss ce and --no-drw alone; or take --entropy-weight 0")
    args.source = ("samples" if args.train_on else "train and samples" if args.add
                   else "few labels" if args.label_fraction else args.split)
    return args


def recipe_for(args, num_images, image_size):
    """Training settings for `num_images` training images: a fresh dict of plain values."""
    in_the_loop = not (args.split == "reference" or args.train_on or args.add)
    recipe = {"network": "resnet32", "pretrained": False, "head": "linear", "entropy_weight": 0.0,
              "hold_out": 0.0, "loss": "ce", "drw": False, "normalisation": CENTRED,
              "crop_padding": image_size // 8}  # LDAM-DRW: 4 at 32 pixels
    if args.label_fraction:
        steps = math.ceil(num_images / (args.batch_size or FEW_LABELS_RECIPE["batch_size"]))  # an epoch
        recipe |= {"network": "resnet50", "pretrained": True, "normalisation": IMAGENET_STATISTICS}
        return recipe | FEW_LABELS_RECIPE | {"epochs": math.ceil(FEW_LABELS_STEPS / steps)}
    if in_the_loop and not args.soft_labels:
        recipe |= {"loss": "focal", "drw": True}
    if args.dataset.startswith("shapes"):
        seen = SHAPES_IMAGES_IN_THE_LOOP if in_the_loop else SHAPES_IMAGES_SEEN
        recipe |= SHAPES_RECIPE | (SOFT_LABELS if args.soft_labels else {})
        return recipe | {"epochs": math.ceil(seen / num_images), "crop_padding": 1}
    if args.dataset.startswith("cifar"):
        recipe |= {"normalisation": CIFAR_STATISTICS}
    if args.soft_labels and args.network in TORCHVISION:
        return recipe | SOFT_LARGE_RECIPE
    if args.dataset.startswith("folder:"):
        recipe["network"] = "resnet32" if image_size <= 32 else "resnet32at32"
        epochs = int(np.clip(math.ceil(FOLDER_IMAGES_SEEN / num_images), *FOLDER_EPOCHS))
        return recipe | FOLDER_RECIPE | {"epochs": epochs} | (SOFT_LABELS if args.soft_labels else {})
    return recipe | (SOFT_RECIPE if args.soft_labels else PAPER_RECIPE)


def complete(args, num_images, image_size):
    """Fills in what the command line left open, and the name of the run."""
    args.image_size, args.first_weights = image_size, None
    changed = []
    recipe = recipe_for(args, num_images, image_size)
    if args.loss and args.drw is None:
        recipe["drw"] = args.loss == "focal"
    if args.init_from:
        recipe["pretrained"] = False
        args.first_weights = hashlib.sha256(Path(args.init_from).read_bytes()).hexdigest()[:16]
        changed.append(f"from{args.first_weights[:8]}")
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
        elif getattr(args, name) != value and name not in FREE:
            changed.append(f"{name.replace('_', '')}{getattr(args, name)}")
    if args.pretrained and args.network not in TORCHVISION:
        fail(f"--pretrained: ImageNet's weights do not fit {args.network}; --init-from takes a classifier's")
    changed += ["relabelled"] if args.label_with else []
    samples = args.train_on or args.add
    where = Path(samples).parent if samples else Path("runs")
    args.run_dir = str(args.run_dir or where / run_name(args, changed))


def balanced(dataset):
    """The data set that a long-tailed one was cut from; of a folder nothing is known."""
    return dataset if dataset.startswith("folder:") else dataset.removesuffix("lt").partition("imb")[0]


def run_name(args, changed=()):
    """Name of a run: the data, and `changed`, what differs from the recipe."""
    what = "classifier"
    if args.train_on or args.add:
        what = ("cas-" if args.train_on else "with-") + Path(args.train_on or args.add).stem
    parts = [what, args.dataset.replace("/", "_").replace(":", "_"), f"{args.image_size}px"]
    parts += [f"rho{args.rho:g}"] if args.rho is not None else []
    parts += [args.imbalance] if args.imbalance != "exp" else []
    parts += [args.split] if args.split != "train" else []
    parts += [f"labels{args.label_fraction:g}"] if args.label_fraction else []
    parts += ["soft"] if args.soft_labels else []
    parts += [f"amp{args.amp}"] if args.amp != "auto" else []
    return "-".join([*parts, *changed, f"s{args.seed}"])


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
# K classes with n_k training images; w_k: the weight of a class. The effective number of images of
# a class is (1 - b^n_k) / (1 - b) with b = 0.9999 (Cui et al. 2019, arXiv:1901.05555).
def rate_drops(epochs):
    """(first, second): the epochs, counted from 0, at which the rate falls; 160 and 180 of 200.

    With other lengths the first, at which DRW starts, is rounded down, and the second up. A run of
    one epoch has neither.
    """
    return max(1, 160 * epochs // 200), math.ceil(180 * epochs / 200)


def drw_weights(counts, epoch, epochs, b=0.9999):
    """Deferred re-weighting (Cao et al. 2019): the weights w_k in `epoch` = 0 .. epochs - 1.

    counts (K,) holds n_k; returns (K,) float32. All ones until the rate falls, in epoch 160 of 200;
    from then on in proportion to (1 - b) / (1 - b^n_k), with the sum K. A class without images,
    which no loss asks for, has the weight 0.
    """
    counts = torch.as_tensor(counts).double()
    if epoch < rate_drops(epochs)[0]:
        return torch.ones(len(counts))
    w = torch.where(counts > 0, (1 - b) / (1 - b ** counts.clamp(min=1)), 0)
    return (w * len(counts) / w.sum()).float()


def focal_loss(logits, labels, weight, gamma=1):
    """mean_i (1 - exp(-l_i))^gamma l_i with l_i = w_y CE_i; logits (B, K), labels (B,), weight (K,).

    As in LDAM-DRW the weight is inside the exponent too, the mean is over B, not over the weights,
    and gamma is 1; Lin et al. 2017 (arXiv:1708.02002) have gamma = 2.
    """
    l = weight[labels] * F.cross_entropy(logits, labels, reduction="none")  # noqa: E741
    return ((1 - torch.exp(-l)) ** gamma * l).mean()


def entropy_rewarded_loss(logits, labels, w=0.3):
    """Softlabel-GAN, §4.3: L_C = CE(C(x), y) - w H(softmax C(x)), H(p) = -sum_c p_c log p_c. Scalar.

    logits (B, K), labels (B,). The paper says "entropy regularization term" and not its sign; the
    official scripts subtract it, so that uncertainty pays. For an image that the classifier knows
    by heart the best label is the same whatever the image shows: p* on its class and
    (1 - p*) / (K - 1) on each other, with 1 / p* = w log((K - 1) p* / (1 - p*)). For w = 0.3, p* is
    .849 with K = 10 and .643 with K = 100. So a classifier trained to the end smooths labels and
    says nothing else; its labels are worth more if it stops before.
    """
    log_p = logits.log_softmax(1)
    return F.nll_loss(log_p, labels) + w * (log_p.exp() * log_p).sum(1).mean()


def training_loss(args):
    """The loss that `args` ask for, as loss(logits, labels, weight)."""
    if args.entropy_weight:
        return lambda logits, labels, _: entropy_rewarded_loss(logits, labels, args.entropy_weight)
    return focal_loss if args.loss == "focal" else F.cross_entropy  # its mean is over the weights


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------
class SpinalHead(nn.Module):
    """(B, D) -> (B, K): SpinalNet (Kabir et al. 2020, arXiv:2007.03347) as in Softlabel-GAN's code.

    Four layers of width w see the halves of the features in turn, each together with the output of
    the layer before; the last layer sees all four outputs. No dropout.
    """

    def __init__(self, features, num_classes):
        super().__init__()
        half = features // 2
        w = max(20, num_classes)  # K in the official scripts (102, 196). CHOICE: 20 at least
        widths = [half, half + w, half + w, half + w]
        self.layers = nn.ModuleList([nn.Linear(width, w) for width in widths])
        self.out = nn.Linear(4 * w, num_classes)

    def forward(self, x):
        halves, seen = x.chunk(2, 1), []
        for i, layer in enumerate(self.layers):
            seen.append(F.relu(layer(torch.cat([halves[i % 2], *seen[-1:]], 1))))
        return self.out(torch.cat(seen, 1))


def build_head(kind, features, num_classes):
    return (SpinalHead if kind == "spinal" else nn.Linear)(features, num_classes)


class BasicBlock(nn.Module):
    """relu(BN conv relu BN conv x + shortcut x); no parameters in the shortcut (He et al., option A)."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.stride = 1 if width_in == width_out else 2  # twice as wide, half as large
        self.conv1 = nn.Conv2d(width_in, width_out, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        if self.stride == 2:  # every second pixel; new channels, zero, half before and half after
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
        return F.relu(h + x)


class ResNet32(nn.Module):
    """464,154 parameters with K = 10 classes, 470,004 with 100. Takes images of any size.

    mean, std: three numbers each, of training pixels in [0, 1].
    """

    name = "resnet32"
    batch, tests = 200, 20  # images to look at at a time; tests on the way

    def __init__(self, num_classes, mean, std, head="linear"):
        super().__init__()
        # Saved with the weights. With u = (x + 1) / 2: (u - m) / s = (x - (2m - 1)) / (2s).
        self.register_buffer("mean", 2 * torch.tensor(mean).view(1, 3, 1, 1) - 1)
        self.register_buffer("std", 2 * torch.tensor(std).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        # 32 layers: 1 + 3 stages x 5 blocks x 2 convolutions + 1. The paper's n is 5.
        widths = [16] + [16] * 5 + [32] * 5 + [64] * 5
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.Sequential(*[BasicBlock(*pair) for pair in pairs])
        self.head = build_head(head, 64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # fan-in, as in LDAM-DRW

    def features(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, 64) >= 0: the pooled activations that the head sees."""
        h = F.relu(self.norm(self.conv((x - self.mean) / self.std)))
        return self.blocks(h).mean(dim=(2, 3))

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, K) logits."""
        return self.head(self.features(x))


class ResNet32At32(ResNet32):
    """ResNet-32 behind a resize to 32 x 32: larger images cost no more. resnet32 sees all their pixels."""

    name = "resnet32at32"

    def features(self, x):
        return super().features(F.interpolate(x, (32, 32), mode="bilinear", antialias=True))


# torchvision's ResNets and ResNeXts: the pixels a side that each sees, and images to look at at a time.
# A line here is all that another one takes; --pretrained and --soft-labels then know it.
TORCHVISION = {
    "resnet50": (128, 100),  # BiT's size for small images
    "wide_resnet101_2": (448, 16),  # Softlabel-GAN's backbone (A)
}


class TorchvisionResNet(nn.Module):
    """One of TORCHVISION, behind a resize to its size.

    mean, std: as for ResNet32. The weights are random; see `load_imagenet`.
    """

    tests = 5

    def __init__(self, name, num_classes, mean, std, head="linear"):
        super().__init__()
        import torchvision.models  # here: it takes a second to import, and few runs need it

        self.name = name
        self.size, self.batch = TORCHVISION[name]
        self.register_buffer("mean", 2 * torch.tensor(mean).view(1, 3, 1, 1) - 1)
        self.register_buffer("std", 2 * torch.tensor(std).view(1, 3, 1, 1))
        self.body = getattr(torchvision.models, self.name)()
        self.head = build_head(head, self.body.fc.in_features, num_classes)
        self.body.fc = nn.Identity()
        if head == "linear":
            nn.init.zeros_(self.head.weight)  # BiT
            nn.init.zeros_(self.head.bias)

    def features(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, D) >= 0: the pooled activations; D is 2048 for both."""
        x = (x - self.mean) / self.std
        return self.body(F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True))

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> (B, K) logits."""
        return self.head(self.features(x))

    def load_imagenet(self):
        """Takes ImageNet's weights from torch.hub's cache, or a download. Raises InputError."""
        from torchvision.models import get_model_weights

        # CHOICE: the first of torchvision's two, trained with cross-entropy alone: label smoothing and
        # mixup make features less useful elsewhere (Kornblith et al. 2021, arXiv:2010.16402).
        url = get_model_weights(self.name).IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        cached = path.exists()
        try:
            weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                         weights_only=True)
        except Exception as error:  # urllib's, a wrong hash, or torch.load's of a damaged file
            if cached:
                fail(f"{path} is damaged ({type(error).__name__}); put a good copy there")
            raise InputError(f"cannot download {url} ({error}); copy that file to {path}") from error
        try:  # without the head for ImageNet's classes
            body = {name: w for name, w in weights.items() if not name.startswith("fc.")}
            self.body.load_state_dict(body)
        except (AttributeError, RuntimeError) as error:
            raise InputError(f"{path} does not hold the weights of {url}; delete it") from error


NETWORKS = {kind.name: kind for kind in (ResNet32, ResNet32At32)}
NETWORKS |= {name: partial(TorchvisionResNet, name) for name in TORCHVISION}


def copy_body(network, path):
    """Gives `network` all weights of the classifier at `path` but its head's. Raises InputError."""
    source = load_classifier(path)
    if source.name != network.name:
        fail(f"--init-from: {path} is a {source.name} and this is a {network.name}; see --network")
    own = ("head.", "mean", "std")  # of this network: the statistics are those of its own data
    body = {name: w for name, w in source.state_dict().items() if not name.startswith(own)}
    network.load_state_dict(network.state_dict() | body)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def load_data(args, device):
    """ImageSets to learn from and to test on; (K,) counts of the training split, which say what the tail is.

    None of the three depends on --seed. Raises InputError.
    """
    test_set = load_test(args.dataset, args.data_dir, args.image_size, args.rho)
    train_set = datasets.load(args.dataset, args.data_dir, "train", args.image_size, args.rho,
                              imbalance=args.imbalance)
    counts = train_set.counts
    if args.train_on:
        train_set = read_samples(args, test_set, device)
    elif args.add:
        added = read_samples(args, test_set, device)
        train_set = ImageSet(torch.cat([train_set.images, added.images]),
                             torch.cat([train_set.labels, added.labels]), train_set.classes)
    elif args.label_fraction:
        train_set = few_labels(args)
    elif args.split == "reference":
        split = split_there(args.dataset, args.data_dir, "reference", args.image_size)
        train_set = datasets.load(args.dataset, args.data_dir, split, args.image_size, args.rho)
    return train_set, test_set, counts


def load_test(dataset, data_dir, image_size=None, rho=None):
    """The test split; of a folder without one its reference, which may be its training images."""
    split = split_there(dataset, data_dir, "test", image_size)
    return datasets.load(dataset, data_dir, split, image_size, rho)


def split_there(dataset, data_dir, split, image_size=None):
    """`split`, or what a folder has in its place: to test with, the reference; for an annotator, train.
    CHOICE: learning from a fifth of the images that is held out, an annotator of the folder of FOLDER_RECIPE
    recognises 31 % of unseen ones, and no class too small to hold any out; from the other four fifths 42 %,
    tested by the fifth; from both 46 %, and nothing is left to test by. Hence the four fifths, the training
    images. It knows those by heart: a generator that copies them is recognised at 98 %.
    """
    if not dataset.startswith("folder:"):
        return split
    root = datasets.folder_root(dataset.removeprefix("folder:"))
    there = datasets.folder_splits(root, Path(data_dir), image_size or 32)
    return split if split in there else {"test": "reference", "reference": "train"}.get(split, split)


def few_labels(args):
    """--label-fraction of the balanced training images (cifar10's for cifar10lt; a folder's are taken for
    balanced), as many of each class; the same ones in every run."""
    train = datasets.load(balanced(args.dataset), args.data_dir, "train", args.image_size)
    each = round(args.label_fraction * len(train.labels) / len(train.classes))
    if not 1 <= each <= train.counts.min():
        fail(f"--label-fraction {args.label_fraction:g} of {len(train.labels)} images is {each} for each of "
             f"{len(train.classes)} classes, of which the smallest has {train.counts.min()}")
    keep = datasets.subset(train.labels.numpy(), [each] * len(train.classes), np.random.RandomState(0))
    return ImageSet(train.images[keep], train.labels[keep], train.classes)


def read_samples(args, test_set, device):
    """The ImageSet of --train-on or --add, with the labels of --label-with, of a directory or of the file:
    `labels`, else `predicted`, the class that an unconditional GAN's classifier sees in a sample."""
    from metrics import load_samples  # here: metrics.py imports this file

    path = args.train_on or args.add
    size, K = test_set.images.shape[-1], len(test_set.classes)
    by_name = [test_set.classes] if Path(path).is_dir() else []  # DIR/<class>/*.png
    images, labels = load_samples(path, ("labels", "predicted"), *by_name)
    if images.shape[2:] != (size, size):
        found = f"{images.shape[3]} x {images.shape[2]}"
        fail(f"{path} has samples of {found} pixels and {args.dataset} {size} x {size}; see --image-size")
    images = images.contiguous()
    if args.label_with:
        labels = predict(load_classifier(args.label_with, device, test_set.classes, size), images, device)
    if labels is None:
        fail(f"{path} holds neither labels nor predicted; --label-with CLASSIFIER.pt labels its images")
    if labels.min() < 0 or labels.max() >= K:
        fail(f"{path} has labels from {labels.min()} to {labels.max()}; {args.dataset} has 0 to {K - 1}")
    return ImageSet(images, labels, test_set.classes)


def held_out(train_set, share):
    """(ImageSet to learn from, ImageSet that early stopping watches), `share` of each class; None for 0.

    Of two images or more at least one is held out and one stays; the same ones in every run. Test images must
    not be watched: they are the reference that samples are scored against.
    """
    if not share:
        return train_set, None
    n = [min(n_k - 1, max(1, round(share * n_k))) for n_k in train_set.counts.tolist()]
    if not sum(n):
        fail("no class has two images: none can be held out to stop early by; --hold-out 0 trains to the end")
    out = torch.zeros(len(train_set.labels), dtype=torch.bool)
    out[torch.from_numpy(datasets.subset(train_set.labels.numpy(), n, np.random.RandomState(0)))] = True
    return tuple(ImageSet(train_set.images[i], train_set.labels[i], train_set.classes) for i in (~out, out))


def augment(images, crop_padding, flip, generator):
    """A random crop of each zero-padded image, half of them mirrored if `flip`; (B, 3, H, W) uint8."""
    b, _, height, width = images.shape
    top, left = torch.randint(2 * crop_padding + 1, (2, b, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (B, H), (B, W)
    if flip:
        columns = torch.where(torch.rand(b, 1, generator=generator) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (crop_padding,) * 4).permute(0, 2, 3, 1)
    index = torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]
    return datasets.laid_out(padded[tuple(i.to(images.device) for i in index)].permute(0, 3, 1, 2))


# --------------------------------------------------------------------------------------------------
# Testing
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def outputs(network, images, device="cpu", batch_size=None):
    """images (N, 3, H, W) uint8 -> logits (N, K) on the CPU of an eval-mode network."""
    batch_size = batch_size or getattr(network, "batch", 200)
    batches = images.split(batch_size)
    return torch.cat([network(x.contiguous().to(device) / 127.5 - 1).cpu() for x in batches])


def predict(network, images, device="cpu", batch_size=None):
    """images (N, 3, H, W) uint8 -> (N,) int64 on the CPU: the class that an eval-mode network sees."""
    return outputs(network, images, device, batch_size).argmax(1)


def accuracy(network, test_set, train_counts, device="cpu"):
    """Share of an ImageSet's images that an eval-mode network recognises, in [0, 1].

    Returns {"all", "head", "middle", "tail"}, thirds of the classes by `train_counts` (K,), the number of
    *training* images of each class; and the list of the K classes' shares. None: no test images.
    """
    right = (predict(network, test_set.images, device) == test_set.labels).double()
    groups = {"all": range(len(train_counts)), **datasets.thirds(train_counts)}
    groups |= {k: [k] for k in range(len(train_counts))}
    shares = {}
    for name, classes in groups.items():
        of_them = right[torch.isin(test_set.labels, torch.as_tensor(list(classes)))]
        shares[name] = of_them.mean().item() if len(of_them) else None
    return {name: shares.pop(name) for name in ("all", "head", "middle", "tail")}, list(shares.values())


def macro_precision_recall(seen, labels, num_classes):
    """Means over the classes of precision and of recall; seen (N,): predicted, labels (N,): true.

    Precision of a class: the share of the images taken for it that belong to it, 0 if none is taken for it.
    Recall: the share of its images that are recognised. Classes without images are left out.
    """
    right = torch.bincount(labels[seen == labels], minlength=num_classes).double()
    taken, there = (torch.bincount(x, minlength=num_classes).double() for x in (seen, labels))
    return tuple((right / n.clamp(min=1))[there > 0].mean().item() for n in (taken, there))


# --------------------------------------------------------------------------------------------------
# What the other scripts import
# --------------------------------------------------------------------------------------------------
def save_classifier(path, network, dataset, split, classes, image_size, settings, test_accuracy,
                    per_class_accuracy=(), unseen=True):
    """Writes all that `load_classifier` needs to `path`, in one piece or not at all."""
    info = {"dataset": dataset, "split": split, "image_size": image_size, "settings": settings,
            "classes": [str(name) for name in classes],  # NumPy's strings would not load with weights_only
            "normalisation": settings["normalisation"], "head": settings["head"], "network": network.name,
            "test_accuracy": test_accuracy, "per_class_accuracy": list(per_class_accuracy),
            "tested_on_unseen_images": unseen}
    # A classifier is known by the bytes of its file. Hence JSON: pickle writes a string once where the same
    # object comes twice, which depends on whether the run was resumed.
    weights = {name: w.cpu() for name, w in network.state_dict().items()}
    with atomic_write(path) as file:
        torch.save(json.loads(json.dumps(info)) | {"weights": weights}, file)


def load_classifier(path, device="cpu", classes=None, image_size=None):
    """A frozen eval-mode network, one of NETWORKS; `.info` holds the rest of its checkpoint, and the path.

    classes, image_size: what the caller is going to show it, where that should be checked. Raises InputError,
    naming the file, where it is missing, damaged, no classifier, or made for other classes or another size.
    """
    path = Path(path)
    if not path.is_file():
        fail(f"no classifier at {path}")
    try:
        info = torch.load(path, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # building it draws weights; the caller's random state stays
            K, head = len(info["classes"]), info["head"]
            network = NETWORKS[info["network"]](K, **info["normalisation"], head=head)
        network.load_state_dict(info.pop("weights"))
        if missing := {"test_accuracy", "per_class_accuracy", "tested_on_unseen_images"} - info.keys():
            raise KeyError(*missing)  # of an older version
        made_for = f"{path} is for {info['dataset']} ({K} classes, {info['image_size']} pixels)"
    except Exception as error:  # a damaged or foreign file: zip, pickle, a missing key, other weights ...
        raise InputError(f"{path} is not a checkpoint of classifier.py, or damaged ({type(error).__name__}); "
                         "move it away to train it again") from error
    if classes is not None and list(classes) != info["classes"]:
        other = "wanted are" if len(classes) != K else "wanted is another data set with"
        fail(f"{made_for}; {other} {len(classes)} classes, {', '.join(list(classes)[:3])} ...")
    if image_size is not None and image_size != info["image_size"]:
        fail(f"{made_for}; wanted are images of {image_size} pixels")
    network.info = {**info, "path": str(path)}
    return network.to(device, **datasets.layout(device)).eval().requires_grad_(False)


def frozen_classifier(dataset, data_dir, path=None, split="train", image_size=None, rho=None, seed=0,
                      device="cpu", soft_labels=False, amp="auto", imbalance="exp", flip=True):
    """The network of the checkpoint at `path`; without a path, one trained for the purpose.

    split       what that one learns from: "train", like a GAN, or "reference", balanced: an annotator, the
                same for cifar10, cifar10lt and cifar10imb
    soft_labels whether to train it as Softlabel-GAN does: its probabilities are to be labels
    amp         bfloat16 in that training: "auto" (where the hardware has it), "bf16" or "off"
    rho, imbalance  as in datasets.load
    flip        False: no image is mirrored in that training; True: as its recipe has it
    returns     a frozen eval-mode network: images (B, 3, H, W) in [-1, 1] -> logits (B, K);
                `.features(x)` (B, D); `.info`: a dict with classes, image_size, test_accuracy, path ...
    raises      InputError, see `load_classifier`

    The next call finds what this one has trained, or resumes it: the annotator of the shapes at
    <data_dir>/classifier-shapes-<size>.pt, any other at runs/<name>/classifier.pt. A signal while it trains
    ends the program, with all saved. The caller's random state and signal handlers are left as they were.
    """
    test_set = load_test(dataset, data_dir, image_size, rho)
    size = test_set.images.shape[-1]
    if path is not None:
        return load_classifier(path, device, test_set.classes, size)

    shapes_annotator = dataset.startswith("shapes") and split == "reference"  # one for every run
    command = ["--dataset", dataset, "--data-dir", data_dir, "--split", split, "--image-size", size,
               "--seed", 0 if shapes_annotator else seed, "--device", device, "--amp", amp]
    command += ["--rho", rho] if rho is not None and split != "reference" else []
    command += ["--imbalance", imbalance] if split != "reference" else []
    command += ["--soft-labels"] if soft_labels else []
    args = parse_settings([str(word) for word in command])
    changed = []
    if not flip and recipe_for(args, 1, size)["flip"]:
        args.flip, changed = False, ["flipFalse"]
    path = Path("runs") / run_name(args, changed) / "classifier.pt"  # `complete` gives it the same name
    if shapes_annotator:
        path = Path(data_dir) / f"classifier-shapes-{size}.pt"
        args.run_dir = str(path.with_suffix(""))
    if path.is_file() and dataset.startswith("folder:"):
        found = load_classifier(path).info["settings"]["training_data"]
        split = split_there(dataset, data_dir, split, size)
        if found != datasets.load(dataset, data_dir, split, size, args.rho, imbalance=imbalance).fingerprint:
            fail(f"{path} has learnt from other images than {dataset} has now; move its directory away")
    with datasets.first_process_first():
        if not path.is_file():
            print(f"Training the classifier {path} first.", flush=True)
            train(args, path)
    return load_classifier(path, device, test_set.classes, size)


# Softlabel-GAN, Table 1: least and most images that count for a class, of data sets that have a name here.
COUNTED_BY_PAPER = {"cifar10imb": (149, 2_232), "cifar100imb": (35, 176)}
RIGHT_ENOUGH = 0.9  # CHOICE. The paper has 81.2 % (AnimeFace), 84.4 % (Tiny ImageNet), 99.9 % (flowers, cars)
MASS_KEPT = 0.25  # CHOICE
COLLAPSED = dict(distance=0.1, mass=0.01)  # CHOICE: below these, labels lend no images


def labels_by_classifier(args, train, run_dir, device):
    """p (N, K) float32: the classifier's probabilities of the training images, neither flipped nor cropped.

    args    dataset, data_dir, image_size, rho, imbalance, flip, amp; classifier: a path, or None for one that
            is trained first
    train   the ImageSet to label
    run_dir keeps p as soft_labels.npz; later calls without args.classifier need nothing else
    raises  InputError where that file is damaged, or labels other images, or is by another classifier
    """
    path = Path(run_dir) / "soft_labels.npz"
    stored = read_soft_labels(path, train) if path.exists() else None
    if stored and args.classifier is None:
        report_labels(stored["probabilities"], train, args.dataset, f"labels of {path}: right on")
        return stored["probabilities"]

    C = frozen_classifier(args.dataset, args.data_dir, args.classifier, "train", args.image_size, args.rho,
                          device=device, soft_labels=True, amp=args.amp, imbalance=args.imbalance,
                          flip=args.flip)
    sha = hashlib.sha256(Path(C.info["path"]).read_bytes()).hexdigest()
    if stored and stored["classifier"] != sha:
        fail(f"{run_dir} has labels of another classifier than {C.info['path']}; choose another --run-dir")
    p = stored["probabilities"] if stored else outputs(C, train.images, device).softmax(1)
    if not stored:
        with atomic_write(path) as file:
            np.savez(file, probabilities=p.numpy(), training_data=train.fingerprint, classifier=sha)

    tested_on = "test" if C.info["tested_on_unseen_images"] else "its own training"
    right = f"right on {C.info['test_accuracy']['all']:.1%} of {tested_on} images and"
    report_labels(p, train, args.dataset, f"labels by {C.info['path']}: {right}")
    if C.info["settings"].get("training_data") != train.fingerprint:  # on purpose in the supplement's Fig. 5
        warn(f"the classifier has learnt from other images than {args.dataset}'s")
    return p


def read_soft_labels(path, train):
    """What `labels_by_classifier` wrote for these images: probabilities (N, K) and two fingerprints."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in ("probabilities", "training_data", "classifier")}
    except Exception as error:  # zip, zlib and NumPy have their own
        raise InputError(f"{path} is damaged ({error}); delete it: labels are then computed again") from error
    if stored["training_data"] != train.fingerprint:
        fail(f"{path} labels other images than there are now; choose another --run-dir")
    p = stored["probabilities"]
    if p.shape != (len(train.labels), len(train.classes)) or not np.allclose(p.sum(1), 1, atol=1e-3):
        fail(f"{path} is damaged (no probabilities); delete it: labels are then computed again")
    return stored | {"probabilities": torch.from_numpy(p)}


def images_that_count(y, threshold=0.01):
    """(K,) int64: how many labels, rows of y (N, K), give each class more than 0.01 (Table 1)."""
    return (y.double() > threshold).sum(0)


def describe_labels(y, labels):
    """What soft labels y (N, K) of images of the classes labels (N,) are like: a dict.

    training_accuracy   share of the labels whose largest probability is the image's own class
    images_that_count   [least, most] over the classes (Table 1)
    max_probability     mean of the largest probability
    entropy             mean, natural logarithm
    off_class_mass      mean of the probability that is not on the image's own class
    off_class_distance  total variation distance of that part from the uniform distribution, 0 to 1, weighted
                        by the part. 0: plain smoothing, which says nothing of the image. None: no such part
    """
    y, own = y.double(), F.one_hot(labels, y.shape[1]).bool()
    off = y.masked_fill(own, 0)
    mass = off.sum(1, keepdim=True)
    even = (mass / (y.shape[1] - 1)).masked_fill(own, 0)
    distance = ((off - even).abs().sum() / 2 / mass.sum()).item() if mass.sum() > 0 else None
    entropy = -torch.special.xlogy(y, y).sum(1).mean().item()
    counted = images_that_count(y)
    return {"training_accuracy": (y.argmax(1) == labels).double().mean().item(),
            "images_that_count": [counted.min().item(), counted.max().item()],
            "max_probability": y.amax(1).mean().item(), "entropy": entropy,
            "off_class_mass": mass.mean().item(), "off_class_distance": distance}


def report_labels(p, train, dataset, source):
    """Prints what the labels p (N, K) of `train` are like beside Softlabel-GAN's, and warns."""
    facts, K = describe_labels(p, train.labels), len(train.classes)
    right, mass, distance = (facts[k] for k in ("training_accuracy", "off_class_mass", "off_class_distance"))
    least, most = COUNTED_BY_PAPER.get(dataset, (None, None))
    apart = f", {distance:.3f} from plain smoothing" if distance is not None else ""
    print(f"{source} {right:.1%} of the labelled images; mean of the largest probability "
          f"{facts['max_probability']:.3f}, entropy {facts['entropy']:.3f}, off the class {mass:.3f}{apart}")
    print("images that count for a class: {} to {}".format(*facts["images_that_count"])
          + (f" (the paper's: {least:,} to {most:,})" if least else "")
          + f"; its own images: {train.counts.min()} to {train.counts.max()}", flush=True)

    if right < RIGHT_ENOUGH:
        warn(f"the classifier recognises only {right:.1%} of the images that it labels, Softlabel-GAN's up "
             "to 99.9 %: another regime; see --init-from and --hold-out in classifier.py")
    if mass < COLLAPSED["mass"]:
        warn(f"the labels are all but one-hot ({mass:.2%} off the class): classes lend each other nothing; "
             "try a larger --entropy-weight or fewer --epochs")
    elif K > 2 and distance < COLLAPSED["distance"]:
        warn(f"the labels have collapsed into plain smoothing (off-class distance {distance:.3f}): the "
             "classifier knows its images by heart; try fewer --epochs")
    kept = p.sum(0) / train.counts
    if lost := [name for name, share in zip(train.classes, kept, strict=True) if share < MASS_KEPT]:
        warn(f"the classifier gives {', '.join(lost)} less than a quarter of the probability that one-hot "
             "labels would: the discriminator hears little of them")


def build_soft_classifier(dataset, num_classes, image_size, device="cpu"):
    """An untrained network of --soft-labels, and its SGD, to train beside a GAN ("co-training").
    CHOICE: a tenth of the highest learning rate throughout, as there is no last epoch to anneal to."""
    args = parse_settings(["--dataset", dataset, "--soft-labels"])
    complete(args, 1, image_size)
    network = NETWORKS[args.network](num_classes, **args.normalisation, head=args.head)
    network = network.to(device, **datasets.layout(device))
    optimizer = torch.optim.SGD(network.parameters(), args.lr / 10, MOMENTUM, weight_decay=args.weight_decay)
    return network, optimizer


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def learning_rate(progress, epochs, base, schedule):
    """Learning rate after `progress` of `epochs` epochs, a real number in [0, epochs).

    "steps"   LDAM-DRW: base times (e + 1) / 5 in epoch e = 0 .. 4 of 200, then base; times 1e-2
              from epoch 160 on, times 1e-4 from 180 on. Other lengths: the same shares of a run.
    "cosine"  CHOICE, for runs of seconds: up over the first fifth, then half a cosine down to 0.
    "sevens"  Softlabel-GAN's official scripts: a tenth of it after every 7 epochs.
    "bit"     BiT, for 500 steps: up over 100, a tenth from each of 200, 300, 400 on.
    """
    if schedule == "cosine":
        rise = 0.2 * epochs
        if progress < rise:
            return base * progress / rise
        return base * (1 + math.cos(math.pi * (progress - rise) / (epochs - rise))) / 2
    if schedule == "bit":
        fifths = 5 * progress / epochs
        return base * min(1, fifths) * 0.1 ** max(0, math.floor(fifths) - 1)
    epoch = math.floor(progress)
    if schedule == "sevens":
        return base * 0.1 ** (epoch // 7)
    first, second = rate_drops(epochs)
    warm_up = min(1, (epoch + 1) / (5 * (epochs / 200)))
    return base * warm_up * (1 if epoch < first else 1e-2 if epoch < second else 1e-4)


def train(args, path=None):
    """Trains the classifier that `args` of `parse_settings` ask for, or resumes it; returns `path`, its file.

    path: <run-dir>/classifier.pt by default. Every random number comes from --seed through generators of its
    own: a GAN's script that calls this keeps its random state. On a CPU two runs give the same weights.
    """
    device = datasets.pick_device(args.device)
    amp = datasets.use_bf16(args.amp, device)
    train_set, test_set, train_counts = load_data(args, device)
    complete(args, len(train_set.labels), test_set.images.shape[-1])
    args.training_data = train_set.fingerprint  # compared like a setting
    run_dir, classes = Path(args.run_dir), train_set.classes
    path, checkpoint = path or run_dir / "classifier.pt", run_dir / "checkpoint.pt"
    state = None
    if checkpoint.exists():
        state = datasets.load_checkpoint(checkpoint)
        datasets.check_same_run(args, state["settings"], run_dir, FREE)

    # Network and optimiser.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)  # not torch.manual_seed: it seeds GPUs too
        network = NETWORKS[args.network](len(classes), **args.normalisation, head=args.head)
    if args.init_from and not state:
        copy_body(network, args.init_from)
    if args.pretrained and not state:
        network.load_imagenet()
    network = network.to(device, **datasets.layout(device)).train()
    optimizer = torch.optim.SGD(network.parameters(), args.lr, momentum=MOMENTUM,
                                weight_decay=args.weight_decay)
    loss_of = training_loss(args)

    # Data: what the network learns from, and what early stopping watches.
    learnt, watched = held_out(train_set, args.hold_out)
    images, labels = learnt.images.to(device), learnt.labels.to(device)
    generator = torch.Generator().manual_seed(args.seed)
    B, epochs = args.batch_size, args.epochs
    steps = math.ceil(len(labels) / B)  # an epoch
    test_every = max(1, epochs // network.tests)  # epochs
    if watched:
        test_every = min(test_every, PATIENCE)  # a run that stops early has been tested

    # Progress: the order of the epoch's images, the last test, the best one, the time that all took,
    # and the weights with the smallest loss on what is held out.
    start, order = 0, None
    tested, best = {}, {}
    seconds, kept = 0.0, {"epoch": 0, "loss": math.inf}
    log = datasets.Log(args, ("loss",), device)
    parts = {"model": network, "optimizer": optimizer, "log": log}
    if state:
        # With the random state as it is now: it is the caller's.
        datasets.restore(state | {"rng": datasets.random_states(device)}, parts, device)
        generator.set_state(state["generator"])
        start, order = state["step"], state["order"]
        tested, best = state["tested"], state["best"]
        seconds, kept = state["seconds"], state["kept"]
    loss = args.loss + (" + DRW" if args.drw else "")
    loss += f" - {args.entropy_weight:g} entropy" if args.entropy_weight else ""
    resumed = f"; resumed at step {start}" if start else ""
    resumed = "; trained already" if start == epochs * steps else resumed
    print(f"{args.network} on {args.dataset}, {args.source}: {len(labels)} images of {len(classes)} classes; "
          f"{loss}; {epochs} epochs of {steps} steps; {device}{', bf16' if amp else ''}; {run_dir}{resumed}",
          flush=True)
    unseen = test_set.fingerprint != args.training_data
    if not unseen:
        warn(f"{args.dataset} has no images apart to test with: accuracies are those on what was learnt from")

    if start < epochs * steps:
        datasets.write_config(args, device, bf16=amp)
        began = time.monotonic() - seconds
        with datasets.stop_signals() as stop, log.open(start, epochs * steps):
            for step in range(start, epochs * steps):
                epoch, i = divmod(step, steps)
                if i == 0 and watched and epoch - kept["epoch"] >= PATIENCE:
                    break

                # Images of the batch, cropped and mirrored, and the weights of the classes.
                if i == 0:
                    order = torch.randperm(len(labels), generator=generator)
                if i == 0 or step == start:
                    weight = drw_weights(learnt.counts, epoch if args.drw else 0, epochs).to(device)
                index = order[i * B : (i + 1) * B].to(device)
                x = augment(images[index], args.crop_padding, args.flip, generator) / 127.5 - 1

                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits = network(x).float()
                loss = loss_of(logits, labels[index], weight)

                lr = learning_rate(epoch + (i + 0.5) / steps, epochs, args.lr, args.schedule)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

                done = step + 1
                log.add(loss)
                if done % steps == 0:
                    network.eval()
                    row = {"epoch": epoch + 1, "lr": lr}
                    if watched:
                        logits = outputs(network, watched.images, device)
                        row["held_out_loss"] = loss_of(logits, watched.labels, weight.cpu()).item()
                        if row["held_out_loss"] < kept["loss"]:
                            weights = {name: w.clone() for name, w in network.state_dict().items()}
                            kept = {"epoch": epoch + 1, "loss": row["held_out_loss"], "weights": weights}
                    if due(epoch + 1, test_every, epochs):  # nothing is chosen by it
                        shares, per_class = accuracy(network, test_set, train_counts, device)
                        tested = {"epoch": epoch + 1, "test_accuracy": shares,
                                  "per_class_accuracy": per_class, "seconds": time.monotonic() - began}
                        if not best or shares["all"] > best["test_accuracy"]["all"]:
                            best = tested
                        row["test_accuracy"] = shares
                        if args.soft_labels:
                            p = outputs(network, train_set.images, device).softmax(1)
                            row |= describe_labels(p, train_set.labels)
                    network.train()
                    log.write(done, **row)

                signal = datasets.asked_to_stop(stop)  # one that comes later is for the next step
                if signal or due(done, steps * args.save_every, epochs * steps):
                    datasets.save(args, done, parts, device, generator=generator.get_state(),
                                  order=order, tested=tested, best=best, kept=kept,
                                  seconds=time.monotonic() - began)
                if signal:
                    datasets.leave(signal, done, args)

    network.eval()
    if watched:
        network.load_state_dict(kept["weights"])
        shares, per_class = accuracy(network, test_set, train_counts, device)
        tested |= {"epoch": kept["epoch"], "test_accuracy": shares, "per_class_accuracy": per_class}
        print(f"kept the weights of epoch {kept['epoch']}, which had the smallest loss, {kept['loss']:.3f}, "
              f"on {len(watched.labels)} images held out", flush=True)
    facts = {}
    counted = None
    if args.soft_labels:
        p = outputs(network, train_set.images, device).softmax(1)
        report_labels(p, train_set, args.dataset, "labels: right on")
        facts = {"labels": describe_labels(p, train_set.labels)}
        counted = images_that_count(p).tolist()
    seen = predict(network, test_set.images, device)
    precision, recall = macro_precision_recall(seen, test_set.labels, len(classes))
    facts |= {"macro_precision": precision, "macro_recall": recall}  # CBDM, Table 4
    if args.add:
        facts["added"] = args.add
    write_results(args, learnt, test_set, train_counts, tested, best, unseen, facts, counted)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    save_classifier(path, network, args.dataset, args.source, classes, args.image_size, settings,
                    tested["test_accuracy"], tested["per_class_accuracy"], unseen)
    print(f"wrote {path}")
    return path


def write_results(args, learnt, test_set, train_counts, tested, best, unseen, facts, counted=None):
    """metrics.json and per_class.csv of the run, and the same as text: which test images are recognised.
    counted (K,): of --soft-labels, the images that count for each class."""
    import metrics  # here: it imports this file

    shares, per_class = tested["test_accuracy"], tested["per_class_accuracy"]
    rows = [{"class": learnt.classes[k], "label": int(k), "train_images": int(learnt.counts[k]),
             "test_images": int(test_set.counts[k]), "accuracy": per_class[k]}
            | ({"images_that_count": counted[k]} if counted else {})
            for k in datasets.head_to_tail(train_counts)]
    names = ("dataset", "rho", "imbalance", "source", "train_on", "loss", "drw", "epochs", "seed")
    result = {name: getattr(args, name) for name in names}
    result |= {"train_images": len(learnt.labels), "test_accuracy": shares, "tested_on_unseen_images": unseen,
               "best_on_test": {"epoch": best["epoch"], "all": best["test_accuracy"]["all"]},
               "seconds": round(tested["seconds"], 1), **facts}
    if args.train_on:
        result["classifier_accuracy_score"] = shares["all"]
    run_dir = Path(args.run_dir)
    result["per_class"] = rows
    metrics.write_result(result, rows, run_dir / "metrics.json", run_dir / "per_class.csv")

    found = ", ".join(f"{name} {100 * share:.2f} %" for name, share in shares.items() if share is not None)
    print(f"trained in {tested['seconds']:.0f} s; accuracy on {len(test_set.labels)} test images: {found}; "
          f"best of the epochs tested: {100 * best['test_accuracy']['all']:.2f} % after {best['epoch']}")
    if len(rows) <= 20:
        columns = {"train_images": "images", "images_that_count": "count for it", "accuracy": "accuracy"}
        print("\n".join(metrics.text_table({row["class"]: row for row in rows}, columns)))
    if args.train_on:
        print(f"classifier accuracy score: {100 * shares['all']:.2f} %")
    if args.add:
        print(f"real and generated images: macro precision {facts['macro_precision']:.4f}, macro recall "
              f"{facts['macro_recall']:.4f} on {len(test_set.labels)} test images")


# --------------------------------------------------------------------------------------------------
# Do generated images help?
# --------------------------------------------------------------------------------------------------
def paired_difference(without, with_them):
    """Mean of the n differences d_i within seeds, and its standard error s / sqrt(n), s^2 with n - 1."""
    d = np.subtract(with_them, without)
    return d.mean().item(), d.std(ddof=1).item() / math.sqrt(len(d))


def compare(args):
    """--repeats: are more test images recognised by classifiers that learnt from generated images too?

    Each seed trains both arms, with one loss and from the same first weights; a finished run is not repeated.
    CHOICE: equal steps; real images are then seen less often where others are added. CBDM's Table 4 has equal
    epochs, but in runs as short as a folder's more steps help, whatever the images. The error is that over
    seeds: it says nothing of other samples of the GAN, or of other test images.
    """
    import metrics  # here: it imports this file

    args.loss = args.loss or "ce"  # the training split alone would have focal
    learnt, test_set, counts = load_data(args, datasets.pick_device(args.device))  # bad samples fail at once
    alone = {"source": "train", "train_on": None, "add": None, "label_with": None}
    without = argparse.Namespace(**vars(args) | alone)
    n, m = counts.sum().item(), len(learnt.labels)
    complete(without, n, test_set.images.shape[-1])
    steps, steps_of_both = (math.ceil(images / without.batch_size) for images in (n, m))  # an epoch
    epochs = max(1, round(without.epochs * steps / steps_of_both))
    arms = {"without": alone | {"epochs": without.epochs}, "with": {"epochs": epochs}}
    runs, names = {arm: [] for arm in arms}, [f"class {name}" for name in test_set.classes]
    for seed in range(args.seed, args.seed + args.repeats):
        for arm, settings in arms.items():
            run = argparse.Namespace(**vars(args) | settings | {"seed": seed})
            run.run_dir = args.run_dir and f"{args.run_dir}/{arm}-s{seed}"
            info = load_classifier(train(run)).info
            of_classes = dict(zip(names, info["per_class_accuracy"], strict=True))
            runs[arm].append({"run": info["path"]} | info["test_accuracy"] | of_classes)

    rows, order = [], datasets.head_to_tail(counts).tolist()
    for name, classes in {"all": order, **datasets.thirds(counts), **{names[k]: [k] for k in order}}.items():
        a, b = ([accuracy[name] for accuracy in runs[arm]] for arm in arms)
        if None not in a:  # there are test images
            difference, error = paired_difference(a, b)
            told = "better with" if difference > 0 else "worse with"
            rows.append({"of": name, "images": counts[classes].sum().item(), "without": np.mean(a).item(),
                         "with": np.mean(b).item(), "difference": difference, "error": error,
                         "told": told if abs(difference) > 2 * error else "no difference can be told"})
    what = (f"without: {without.epochs} epochs of {n} training images; with ({args.source}): {epochs} of {m},"
            f" as many steps\naccuracy on {len(test_set.labels)} test images, means of {args.repeats} seeds; "
            "mean difference within a seed, and its standard error")
    where = Path(args.run_dir or Path(runs["with"][0]["run"]).parent)
    result = {"dataset": args.dataset, "samples": args.add or args.train_on, "what": what, "rows": rows}
    metrics.write_result(result | {"runs": runs}, rows, where / "comparison.json", where / "comparison.csv")
    shown = {row["of"]: {key: f"{100 * x:.2f}" if isinstance(x, float) else x for key, x in row.items()}
             for row in rows}
    print("\n".join([f"{what}; in %", *metrics.text_table(shown, {key: key for key in list(rows[0])[1:]})]))
    print("no difference can be told: it is at most twice its error. By chance alone one row in nine has "
          f"more (with 5 seeds)\nwrote {where / 'comparison.json'}")


def main(argv=None):
    args = parse_settings(argv)
    (compare if args.repeats else train)(args)


if __name__ == "__main__":
    datasets.run_command(main)
