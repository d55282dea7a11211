"""The classifier that judges samples, and that the two GANs keep in their loop: ResNet-32 for small images.

Network: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2 with n = 5.
Recipe: what the long-tailed papers share, LDAM-DRW (Cao et al. 2019, arXiv:1906.07413; CBDM and CBGAN train theirs with
it): SGD, 200 epochs, steps at 160 and 180, random crops and flips.

    python classifier.py --dataset cifar10lt --rho 100           # what a GAN on cifar10lt keeps in its loop
    python classifier.py --dataset cifar100 --split reference    # a judge: trained on all of the balanced data
    python metrics.py samples.npz --dataset cifar100lt --features classifier:runs/<that run>/classifier.pt

Other scripts import one function, `frozen_classifier`: it loads a checkpoint, or trains one where there is none, and
returns a frozen network that takes images in [-1, 1]. Subtracting the mean and dividing by the deviation is the
network's own business, so that no caller can forget it (the official CBGAN code hands images in [-1, 1] to a network
whose public training code uses CIFAR's statistics).

Cost, on two cores of an AMD EPYC: shapes 12 to 17 s, for 99.5 % or more of the test images. At CIFAR's size a step of
128 images takes 0.26 s in bfloat16 and 0.40 s in float32, so an epoch of cifar10lt 25 s. All 200 epochs: not measured.

Deviations from the LDAM-DRW recipe
- The weights of the last epoch are kept; the official code keeps the epoch that does best on the *test* set.
- Plain cross-entropy, without the deferred re-weighting (DRW) of rare classes.
- The schedule in shorter runs keeps its proportions; the shapes data have a short schedule of our own.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
from datasets import InputError, atomic_write, environment, fail, pick_device, run_command, use_bf16

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------
# Channel mean and deviation of pixels in [0, 1]. CIFAR: the constants of LDAM-DRW's cifar_train.py, for both CIFARs.
# CHOICE: 0.5 for everything else, so that the [-1, 1] image itself is what the first layer sees.
CIFAR_STATISTICS = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
CENTRED = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

# LDAM-DRW, cifar_train.py. CBGAN's appendix prints lr 0.01; the code that it builds on has 0.1.
PAPER_RECIPE = {"epochs": 200, "batch_size": 128, "lr": 0.1, "schedule": "steps", "crop_padding": 4, "flip": True}
# CHOICE (ours): 99.5 % or more with seeds 0, 1, 2. Few images are seen, so batches are small: of 64 they end at 96 %.
SHAPES_RECIPE = {"batch_size": 32, "lr": 0.05, "schedule": "cosine", "crop_padding": 1, "flip": False}
SHAPES_IMAGES_SEEN = 12_000  # whatever the size of the training set: 3 epochs of the reference split
MOMENTUM, WEIGHT_DECAY = 0.9, 2e-4  # LDAM-DRW; the decay acts on every parameter, batch norm included


def recipe_for(dataset, num_images):
    """Training settings of a data set with `num_images` training images: a fresh dict of plain values."""
    if dataset.startswith("shapes"):
        return {"epochs": math.ceil(SHAPES_IMAGES_SEEN / num_images), **SHAPES_RECIPE, "normalisation": CENTRED}
    return {**PAPER_RECIPE, "normalisation": CIFAR_STATISTICS if dataset.startswith("cifar") else CENTRED}


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------
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

    def __init__(self, num_classes, mean, std):
        super().__init__()
        # Buffers travel with the weights. u = (x + 1) / 2 and (u - m) / s give (x - (2m - 1)) / (2s) for x in [-1, 1].
        self.register_buffer("mean", 2 * torch.tensor(mean).view(1, 3, 1, 1) - 1)
        self.register_buffer("std", 2 * torch.tensor(std).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] + [16] * 5 + [32] * 5 + [64] * 5  # 1 + 3 stages x 5 blocks x 2 + 1 = 32 layers
        self.blocks = nn.Sequential(*[BasicBlock(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])
        self.head = nn.Linear(64, num_classes)
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


# ----------------------------------------------------------------------------------------------------------------------
# Training and testing
# ----------------------------------------------------------------------------------------------------------------------
def learning_rate(progress, epochs, base, schedule):
    """Learning rate after `progress` of `epochs` epochs, a real number in [0, epochs).

    "steps"   LDAM-DRW, for 200 epochs: base times (e + 1)/5 in epoch e = 0 .. 4, times 1 up to epoch 159, 1e-2 up to
              179, 1e-4 from 180. Other lengths keep the proportions.
    "cosine"  CHOICE, for runs of seconds: a straight line up over the first fifth, half a cosine down to 0.
    """
    if schedule == "cosine":
        rise = 0.2 * epochs
        if progress < rise:
            return base * progress / rise
        return base * (1 + math.cos(math.pi * (progress - rise) / (epochs - rise))) / 2
    epoch, scale = math.floor(progress), epochs / 200
    warm_up = min(1, (epoch + 1) / (5 * scale))
    return base * warm_up * (1 if epoch < 160 * scale else 1e-2 if epoch < 180 * scale else 1e-4)


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


def train_classifier(train_set, settings, seed=0, device="cpu", amp=False, log=None):
    """A ResNet32 trained with cross-entropy on an ImageSet; returned in eval mode.

    settings    the keys of `recipe_for`
    amp         bfloat16 autocast
    log         called with a dict after each epoch
    Every random number comes from `seed` and from generators of its own: the random state of the caller, which may be a
    training run that stops for its scores, stays as it was. On a CPU two runs give the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet32(len(train_set.classes), **settings["normalisation"])
    # channels_last: 1.2 to 1.5 times as fast on the CPU.
    network = network.to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=settings["lr"], momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    images, labels = train_set.images.to(device), train_set.labels.to(device)
    epochs, steps = settings["epochs"], math.ceil(len(labels) / settings["batch_size"])
    start = time.perf_counter()
    with tqdm(total=epochs * steps, desc="classifier", dynamic_ncols=True) as bar:
        for epoch in range(epochs):
            loss_sum = torch.zeros((), device=device)
            order = torch.randperm(len(labels), generator=generator)
            for step, index in enumerate(order.split(settings["batch_size"])):
                lr = learning_rate(epoch + (step + 0.5) / steps, epochs, settings["lr"], settings["schedule"])
                optimiser.param_groups[0]["lr"] = lr
                index = index.to(device)
                x = augment(images[index], settings["crop_padding"], settings["flip"], generator) / 127.5 - 1
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                    logits = network(x)
                loss = F.cross_entropy(logits.float(), labels[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                loss_sum += loss.detach()
                bar.update()
            mean_loss = loss_sum.item() / steps  # once an epoch: reading a number makes a GPU wait
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            if not math.isfinite(mean_loss):
                raise InputError(f"the loss is {mean_loss} in epoch {epoch + 1}; try a lower learning rate")
            if log:
                log({"epoch": epoch + 1, "loss": mean_loss, "lr": lr, "seconds": time.perf_counter() - start})
    return network.eval()


@torch.no_grad()
def accuracy(network, test_set, train_counts, device="cpu", batch_size=500):
    """Share of an ImageSet's images that an eval-mode network recognises.

    Returns {"all", "head", "middle", "tail"}, each in [0, 1]: thirds of the classes by `train_counts` (K,), the number
    of *training* images of each class.
    """
    logits = [network(x.to(device) / 127.5 - 1) for x in test_set.images.split(batch_size)]
    right = (torch.cat(logits).argmax(1).cpu() == test_set.labels).double()
    groups = {"all": range(len(train_counts)), **datasets.thirds(train_counts)}
    return {name: right[torch.isin(test_set.labels, torch.as_tensor(ks))].mean().item() for name, ks in groups.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------
def save_classifier(path, network, dataset, split, classes, image_size, settings, test_accuracy):
    """Write all that `load_classifier` needs to `path`, in one piece or not at all."""
    checkpoint = {
        "dataset": dataset, "split": split,
        "classes": [str(name) for name in classes],  # they may be NumPy's strings, which weights_only would not load
        "image_size": image_size, "settings": settings, "normalisation": settings["normalisation"],
        "test_accuracy": test_accuracy,
        "resnet32": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
    }
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_classifier(path, device="cpu", classes=None, image_size=None):
    """A frozen eval-mode ResNet32; its `.info` holds what the checkpoint says beside the weights, and its path.

    classes, image_size: what the caller is going to show it, where that should be checked. Raises InputError, naming
    the file, where it is missing, damaged, no classifier, or made for other classes or another size.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no classifier at {path}")
    try:
        info = torch.load(path, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # building it draws weights; the caller's random state is left alone
            network = ResNet32(len(info["classes"]), **info["normalisation"])
        network.load_state_dict(info.pop("resnet32"))
        made_for = f"{path} is for {info['dataset']} ({len(info['classes'])} classes, {info['image_size']} pixels)"
    except Exception as error:  # a damaged or foreign file: zip, pickle, a missing key, another network's weights ...
        what = type(error).__name__
        raise InputError(f"{path} is not a checkpoint of classifier.py, or damaged ({what})") from error
    if classes is not None and list(classes) != info["classes"]:
        raise InputError(f"{made_for}; wanted are {len(classes)} classes, {', '.join(list(classes)[:3])} ...")
    if image_size is not None and image_size != info["image_size"]:
        raise InputError(f"{made_for}; wanted are images of {image_size} pixels")
    network.info = {**info, "path": str(path)}
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# What the other scripts import
# ----------------------------------------------------------------------------------------------------------------------
def frozen_classifier(dataset, data_dir, path=None, split="train", image_size=None, rho=None, seed=0, device="cpu"):
    """The network of the checkpoint at `path`; without a path, one trained for the purpose, with a progress bar.

    split       what that one learns from: "train", the (long-tailed) data that a GAN learns from too, or "reference",
                balanced: a judge
    returns     a frozen eval-mode network: images (B, 3, H, W) in [-1, 1] -> logits (B, K); `.features(x)` (B, 64);
                `.info`: a dict with classes, image_size, test_accuracy, path ...
    raises      InputError, see `load_classifier`

    What it trains it keeps, and finds again in the next call: the judge of the shapes data as
    <data_dir>/classifier-shapes-<size>.pt, any other as runs/<name>/classifier.pt. That judge learns from the reference
    split, which is drawn independently of every training split: it has not seen what a generator learnt from.
    """
    test_set = datasets.load(dataset, data_dir, "test", image_size, rho)
    size = test_set.images.shape[-1]
    if path is None:
        path = Path("runs") / run_name(dataset, split, size, rho, seed) / "classifier.pt"
        if dataset.startswith("shapes") and split == "reference":
            path, seed = Path(data_dir) / f"classifier-shapes-{size}.pt", 0  # one judge for every run
        if not path.is_file():
            tqdm.write(f"Training the classifier {path} first.")
            train_and_save(path, dataset, data_dir, split, size, rho, seed, device)
    return load_classifier(path, device, test_set.classes, size)


def run_name(dataset, split, image_size, rho, seed, changed=()):
    """Name of a run: the data, and `changed`, the (setting, value) pairs that differ from the recipe."""
    parts = ["classifier", dataset.replace("/", "_").replace(":", "_"), f"{image_size}px"]
    if dataset in datasets.LONG_TAILED:
        parts.append(f"rho{datasets.DEFAULT_RHO if rho is None else rho:g}")
    if split != "train":
        parts.append(split)
    return "-".join(parts + [f"{name}{value}" for name, value in changed] + [f"s{seed}"])


def train_and_save(path, dataset, data_dir, split, image_size, rho, seed, device, settings=None, amp="auto", log=None):
    """Train on one split, test on "test", save to `path`, print how good it is; arguments as in `frozen_classifier`."""
    train_set = datasets.load(dataset, data_dir, split, image_size, rho)
    test_set = datasets.load(dataset, data_dir, "test", image_size, rho)
    train_counts = datasets.load(dataset, data_dir, "train", image_size, rho).counts
    settings = settings or recipe_for(dataset, len(train_set.labels))
    network = train_classifier(train_set, settings, seed, device, use_bf16(amp, torch.device(device)), log)
    shares = accuracy(network, test_set, train_counts, device)
    size = train_set.images.shape[-1]
    save_classifier(path, network, dataset, split, train_set.classes, size, {**settings, "seed": seed}, shares)
    recognised = ", ".join(f"{name} {100 * share:.2f} %" for name, share in shares.items())
    tqdm.write(f"Wrote {path}; accuracy on the test images: {recognised}.")


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------
def parse_args():
    parser = argparse.ArgumentParser(description="Train the ResNet-32 that judges samples and guides the GANs.")
    parser.error = fail  # one line where argparse would print the usage too
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes", help="a name that datasets.py knows (default: shapes)")
    group.add_argument("--split", default="train", choices=["train", "reference"],
                       help="train: what a generator learns from, for a GAN's loop; reference: balanced, for a judge")
    group.add_argument("--rho", type=float, help="imbalance ratio of a long-tailed set (default: 100)")
    group.add_argument("--data-dir", default="data", help="where data sets are kept (default: data)")
    group.add_argument("--image-size", type=int, help="pixels a side (default: the data set's own)")
    group = parser.add_argument_group("training; defaults are LDAM-DRW's, and our own for shapes")
    group.add_argument("--epochs", type=int, help="default: 200; shapes: 12,000 images in all")
    group.add_argument("--batch-size", type=int, help="default: 128; shapes: 32")
    group.add_argument("--lr", type=float, help="highest learning rate (default: 0.1; shapes: 0.05)")
    group.add_argument("--schedule", choices=["steps", "cosine"],
                       help="steps: down at 80 and 90 %% of the epochs; cosine: for few epochs, as shapes has them")
    group.add_argument("--seed", type=int, default=0, help="of the weights, the order and the crops (default: 0)")
    group = parser.add_argument_group("run")
    group.add_argument("--run-dir", help="default: runs/classifier-<data>-<what differs from the default>-s<seed>")
    group.add_argument("--device", default="auto", help="auto (default): CUDA, else MPS, else the CPU")
    group.add_argument("--amp", choices=["auto", "bf16", "off"], default="auto",
                       help="bfloat16; auto (default): where hardware has it")
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "lr"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    train_set = datasets.load(args.dataset, args.data_dir, args.split, args.image_size, args.rho)
    size = train_set.images.shape[-1]
    settings = recipe_for(args.dataset, len(train_set.labels))
    given = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "schedule")}
    changed = [(name, value) for name, value in given.items() if value is not None and value != settings[name]]
    settings.update(changed)
    name = run_name(args.dataset, args.split, size, args.rho, args.seed, changed)
    run_dir = Path(args.run_dir or f"runs/{name}")
    config = {"settings": vars(args) | settings | {"image_size": size}, **environment(), "device": str(device)}
    with atomic_write(run_dir / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
    images, classes = len(train_set.labels), len(train_set.classes)
    print(f"{args.dataset}, {args.split} split: {images} images of {classes} classes, on {device}, to {run_dir}")
    with open(run_dir / "log.jsonl", "w") as log_file:
        train_and_save(run_dir / "classifier.pt", args.dataset, args.data_dir, args.split, size, args.rho, args.seed,
                       device, settings, args.amp, log=lambda row: print(json.dumps(row), file=log_file, flush=True))


if __name__ == "__main__":
    run_command(main)
