import csv
import functools
import json
import math
import os
import random
import signal
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import edited
from PIL import Image

import classifier
import datasets
from classifier import (
    BasicBlock,
    ResNet32,
    TorchvisionResNet,
    augment,
    drw_weights,
    focal_loss,
    frozen_classifier,
    learning_rate,
    load_classifier,
    parse_settings,
    save_classifier,
    train,
)
from datasets import ImageSet, InputError

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


class Small(ResNet32):
    """Two blocks where ResNet-32 has fifteen: a fifth of the time. Known to --network in the tests alone."""

    name = "small"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = torch.nn.Sequential(BasicBlock(16, 32), BasicBlock(32, 64))


classifier.NETWORKS["small"] = Small

# A command that takes a second; --amp off, so that it is the same arithmetic on every machine.
TINY = ["--dataset", "shapeslt", "--rho", "100", "--image-size", "8", "--network", "small", "--batch-size",
        "250",
        "--amp", "off", "--device", "cpu"]


def run(tmp_path, *arguments, name="run"):
    """train() of a tiny command in tmp_path/name: its directory."""
    train(parse_settings([*TINY, *map(str, arguments), "--run-dir", str(tmp_path / name)]))
    return tmp_path / name


def shapes_samples(path, n=40, size=8, **arrays):
    """A file of samples: real shapes with their labels, and `arrays` beside or instead of them; None leaves
    one out."""
    real = datasets.load("shapes", "data", "reference", size)
    pick = torch.arange(n) * (len(real.labels) // n)
    found = {"images": real.images[pick].permute(0, 2, 3, 1).numpy(),
             "labels": real.labels[pick].numpy()} | arrays
    np.savez(path, **{name: a for name, a in found.items() if a is not None})
    return path


environment = functools.cache(datasets.environment)  # it asks git: a process for each run


@pytest.fixture(autouse=True)
def same_numbers_in_every_run(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(datasets, "environment", environment)


SETTINGS = {"normalisation": HALF, "head": "linear"}  # of a checkpoint: what `load_classifier` reads of them


def settled(network):
    """A network whose batch norms have seen something, so that eval mode is not the identity at every
    layer."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 8, 8) * 2 - 1)
    return network.eval()


# --------------------------------------------------------------------------------------------------
# Network
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_classes, count", [(5, 463_829), (10, 464_154), (100, 470_004), (1010, 529_154)])
def test_parameter_count(num_classes, count):
    network = ResNet32(num_classes, **HALF)
    assert sum(p.numel() for p in network.parameters()) == count
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 32 and all(m.bias is None for m in convolutions)


@pytest.mark.parametrize("size", [8, 16, 33])
def test_shapes_of_what_it_returns(size):
    network = settled(ResNet32(7, **HALF))
    x = torch.rand(2, 3, size, size)
    features = network.features(x)
    assert features.shape == (2, 64) and features.min() >= 0 and features.std() > 0
    assert torch.equal(network(x), features @ network.head.weight.T + network.head.bias)


def test_shortcut_without_parameters():
    """With both convolutions at zero a block is the ReLU of its shortcut."""
    block = BasicBlock(4, 8)
    torch.nn.init.zeros_(block.conv1.weight)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6) + 0.1
    out = block(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].abs().sum() == 0 and out[:, 6:].abs().sum() == 0


def test_initial_weights_are_kaiming_normal_over_the_inputs():
    torch.manual_seed(0)
    network = ResNet32(100, **HALF)
    for weight, fan_in in ((network.blocks[14].conv2.weight, 64 * 9), (network.head.weight, 64)):
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_normalisation_is_that_of_pixels_in_zero_to_one():
    """A network for CIFAR's statistics, shown [-1, 1], sees what a plain one sees in (u - mean) / std."""
    mean, std = classifier.CIFAR_STATISTICS["mean"], classifier.CIFAR_STATISTICS["std"]
    network = settled(ResNet32(10, mean, std))
    plain = ResNet32(10, **HALF)  # mean 0.5 and deviation 0.5 leave an image in [-1, 1] as it is
    plain.load_state_dict(network.state_dict() | {"mean": torch.zeros(1, 3, 1, 1),
                                                  "std": torch.ones(1, 3, 1, 1)})
    plain.eval()
    assert torch.equal(ResNet32(10, **HALF).mean, plain.mean) and torch.equal(
        ResNet32(10, **HALF).std, plain.std
    )
    u = torch.rand(4, 3, 8, 8)
    by_hand = (u - torch.tensor(mean)[None, :, None, None]) / torch.tensor(std)[None, :, None, None]
    with torch.no_grad():
        assert torch.allclose(network(2 * u - 1), plain(by_hand), atol=1e-5)
        assert not torch.allclose(network(2 * u - 1), plain(2 * u - 1), atol=1e-2)
    # The affine map of [-1, 1] to CIFAR's normalised pixels: x times these plus those.
    assert (1 / network.std).flatten().tolist() == pytest.approx([2.47158, 2.50752, 2.48756], abs=1e-5)
    assert (-network.mean / network.std).flatten().tolist() == pytest.approx(
        [0.04251, 0.08927, 0.26617], abs=1e-5
    )


@torch.no_grad()
def test_the_large_network_resizes_and_normalises():
    """It sees 128 x 128 pixels whatever comes, in ImageNet's statistics; by hand through torchvision."""
    torch.manual_seed(0)
    network = classifier.NETWORKS["resnet50"](3, **classifier.IMAGENET_STATISTICS).eval()
    assert (
        network.head.weight.abs().sum() == 0
        and sum(p.numel() for p in network.body.parameters()) == 23_508_032
    )
    torch.nn.init.normal_(network.head.weight)
    u = torch.rand(2, 3, 8, 8)
    by_hand = (u - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    seen = []
    handle = network.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = network(2 * u - 1)
    handle.remove()
    expected = F.interpolate(by_hand, size=(128, 128), mode="bilinear", align_corners=False)
    assert seen[0].shape == (2, 3, 128, 128) and torch.allclose(seen[0], expected, atol=1e-5)
    features = network.features(2 * u - 1)
    assert features.shape == (2, 2048) and features.min() >= 0 and features.std() > 0
    assert logits.shape == (2, 3) and torch.allclose(logits, network.head(features), atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
DRW = {  # computed apart from this project, in double precision
    "cifar10lt, rho 100": ([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
                           [.0506, .0769, .1211, .1950, .3188, .5246, .8683, 1.4426, 2.4092, 3.9927]),
    "cifar10lt, rho 10": ([5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
                          [.2923, .3584, .4442, .5555, .6997, .8858, 1.1266, 1.4375, 1.8415, 2.3585]),
    "LSUN, rho 100": ([50000, 15811, 5000, 1581, 500], [.1566, .1958, .3953, 1.0635, 3.1888]),
    "LSUN, rho 10": ([50000, 28117, 15811, 8891, 5000], [.6651, .7028, .8317, 1.1216, 1.6788]),
}  # fmt: skip


@pytest.mark.parametrize("name", DRW)
def test_drw_weights(name):
    counts, weights = DRW[name]
    for epoch in (160, 199):
        found = drw_weights(counts, epoch, 200)
        assert found.tolist() == pytest.approx(weights, abs=5.1e-5)
        assert found.sum().item() == pytest.approx(len(counts), abs=1e-4)
    for epoch in (0, 159):
        assert drw_weights(counts, epoch, 200).tolist() == [1] * len(counts)


def test_drw_starts_in_proportion_and_does_without_an_empty_class():
    assert drw_weights([9, 1], 7, 10).tolist() == [1, 1] != drw_weights([9, 1], 8, 10).tolist()
    some = drw_weights(torch.tensor([10, 0, 5]), 9, 10)
    assert some[1] == 0 and some.sum().item() == pytest.approx(3)
    assert (some[2] / some[0]).item() == pytest.approx((1 - 0.9999**10) / (1 - 0.9999**5), rel=1e-5)


def test_drw_starts_where_the_rate_falls():
    """In runs of 1 to 200 epochs; both in the last fifth, rounded so that a run of two epochs has both."""
    for epochs in range(1, 201):
        rates = [learning_rate(e, epochs, 1.0, "steps") for e in range(epochs)]
        weighted = [(drw_weights([9, 1], e, epochs) != 1).any().item() for e in range(epochs)]
        assert weighted == [rate < 0.011 for rate in rates], epochs  # warm-up starts at a fifth
        assert sum(weighted) == (0 if epochs == 1 else epochs - math.floor(0.8 * epochs + 1e-9)), epochs
        assert sum(rate < 1e-3 for rate in rates) == math.floor(0.1 * epochs + 1e-9), epochs


def test_focal_loss_by_hand():
    """Two samples of probability 1/2 and 1/4; the weights are inside the exponent, and the mean is over the
    samples."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    labels, weight = torch.tensor([0, 1]), torch.tensor([2.0, 0.5])
    l_0, l_1 = 2 * math.log(2), 0.5 * math.log(4)  # so exp(-l) is 1/4 and 1/2
    assert focal_loss(logits, labels, weight).item() == pytest.approx((3 / 4 * l_0 + 1 / 2 * l_1) / 2)
    assert focal_loss(logits, labels, weight,
                      gamma=2).item() == pytest.approx((9 / 16 * l_0 + 1 / 4 * l_1) / 2)
    assert focal_loss(logits, labels, weight, gamma=0).item() == pytest.approx((l_0 + l_1) / 2)
    # what ce means here
    assert F.cross_entropy(logits, labels, weight).item() == pytest.approx((l_0 + l_1) / 2.5)


def test_which_loss_for_whom():
    def recipe(*arguments):
        return classifier.recipe_for(parse_settings(list(arguments)), 10_000, 32)

    loop = recipe("--dataset", "cifar10lt")
    assert (loop["loss"], loop["drw"], loop["epochs"], loop["lr"], loop["crop_padding"]) == (
        "focal",
        True,
        200,
        0.1,
        4,
    )
    for annotator in (["--split", "reference"], ["--train-on", "samples.npz"], ["--label-fraction", "0.1"]):
        assert (recipe("--dataset", "cifar10lt", *annotator)["loss"], recipe(*annotator)["drw"]) == (
            "ce",
            False,
        )
    assert recipe("--dataset", "folder:x")["normalisation"] == HALF
    assert recipe("--dataset", "cifar100")["normalisation"] == classifier.CIFAR_STATISTICS
    few = classifier.recipe_for(parse_settings(["--label-fraction", "0.001"]), 50, 32)
    many = classifier.recipe_for(parse_settings(["--label-fraction", "0.1"]), 1025, 32)
    assert (few["epochs"], many["epochs"]) == (500, 167)  # 500 steps, of one and of three batches an epoch


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epoch, lr",
                         [(0, 0.02), (1, 0.04), (4, 0.1), (100, 0.1), (159, 0.1), (160, 1e-3), (179, 1e-3),
                                       (180, 1e-5), (199.99, 1e-5)])  # fmt: skip
def test_learning_rate_of_the_paper(epoch, lr):
    assert learning_rate(epoch, 200, 0.1, "steps") == pytest.approx(lr)


@pytest.mark.parametrize("epoch, lr", [(0, 0.1), (7, 0.1), (8, 1e-3), (9, 1e-5)])
def test_learning_rate_scales_with_a_shorter_run(epoch, lr):
    assert learning_rate(epoch, 10, 0.1, "steps") == pytest.approx(lr)


def test_cosine_learning_rate():
    # a quarter of the way up, which takes one epoch
    assert learning_rate(0.25, 5, 0.4, "cosine") == pytest.approx(0.1)
    assert learning_rate(1, 5, 0.4, "cosine") == pytest.approx(0.4)
    assert learning_rate(3, 5, 0.4, "cosine") == pytest.approx(0.2)
    assert learning_rate(4.999, 5, 0.4, "cosine") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("step, lr",
                         [(0, 0), (50, 0.0015), (100, 0.003), (199, 0.003), (200.5, 3e-4), (300.5, 3e-5),
                                      (499, 3e-6)])  # fmt: skip
def test_learning_rate_of_bit(step, lr):
    assert learning_rate(step, 500, 0.003, "bit") == pytest.approx(lr)
    assert learning_rate(step / 3, 500 / 3, 0.003, "bit") == pytest.approx(lr)  # three steps an epoch


def test_augment_cuts_every_window_of_the_padded_image():
    images = torch.randint(1, 256, (1, 3, 6, 6), dtype=torch.uint8).expand(400, -1, -1, -1)
    padded = np.pad(images[0].numpy(), ((0, 0), (2, 2), (2, 2)))
    windows = {padded[:, i : i + 6, j : j + 6].tobytes() for i in range(5) for j in range(5)}
    out = augment(images, 2, False, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8 and {x.contiguous().numpy().tobytes() for x in out} == windows
    flipped = augment(images, 0, True, torch.Generator().manual_seed(0))
    mirrored = sum(torch.equal(x, images[0].flip(2)) for x in flipped)
    untouched = sum(torch.equal(x, images[0]) for x in flipped)
    assert mirrored + untouched == 400 and 160 < mirrored < 240
    assert torch.equal(augment(images, 0, False, torch.Generator()), images)


def weights_of(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"]


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return all(torch.equal(a[k], b[k]) for k in a)


def log_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


def test_training_repeats_itself_and_leaves_the_caller_alone(tmp_path):
    """Random states of PyTorch, NumPy and Python, signal handlers: a SIGTERM that comes later is the
    caller's."""
    torch.manual_seed(123), np.random.seed(5), random.seed(6)

    def state():
        return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
                signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))  # fmt: skip

    caught = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    try:
        was = state()
        a, b, c = (run(tmp_path, "--epochs", 1, "--seed", seed, name=name) for name,
                   seed in (("a", 0), ("b", 0), ("c", 1)))
        run(tmp_path, "--epochs", 1, name="a")  # a checkpoint holds random states; they stay there
        assert state() == was
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert same_weights(a, b) and not same_weights(a, c)
    assert log_of(a) == log_of(b) != log_of(c)


def test_a_loss_that_explodes_is_reported(tmp_path):
    with pytest.raises(InputError,
                       match="NaN or infinite shortly before step 10; nothing was saved; try a lower --lr"):
        run(tmp_path, "--lr", "1e30")
    assert (
        not (tmp_path / "run" / "checkpoint.pt").exists()
        and (tmp_path / "run" / "log.jsonl").read_text() == ""
    )


def crop(image, top, left, padding, mirrored):
    """A window of an image (3, H, W) of uint8 in a frame of zeros, by NumPy."""
    framed = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    window = framed[:, top : top + image.shape[1], left : left + image.shape[2]]
    return window[:, :, ::-1] if mirrored else window


def focal_by_hand(logits, labels, weight):
    p = (logits.exp() / logits.exp().sum(1, keepdim=True))[range(len(labels)), labels]
    return sum((1 - p_y**w) * -w * p_y.log() for p_y, w in zip(p, weight[labels], strict=True)) / len(labels)


def rewarded_by_hand(logits, labels, _):
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -p[range(len(labels)), labels].log().mean() + 0.3 * (p * p.log()).sum() / len(labels)


@pytest.mark.parametrize("soft", [False, True])
def test_training_is_what_it_says(tmp_path, monkeypatch, soft):
    """Every step of a run again, by hand from the same random numbers: order, crops, mirror images, class
    weights
    in the second epoch, rate, SGD with momentum and weight decay. With soft labels: entropy, and the held-out
    loss."""
    args = parse_settings([*TINY, "--epochs", "2", "--rho", "500", "--batch-size", "600", "--schedule",
                           "steps" if soft else "cosine", "--lr", "0.05", "--seed", "3", "--run-dir",
                           str(tmp_path),
                           *(["--soft-labels", "--head", "linear"] if soft else [])])  # fmt: skip
    args.flip, args.crop_padding, args.weight_decay = True, 2, 0.02
    monkeypatch.setattr(classifier, "predict", lambda network, images,
                        *_: torch.zeros(len(images), dtype=torch.int64))
    train(args)

    data = datasets.load("shapeslt", "data", "train", 8, 500)
    learnt, watched = classifier.held_out(data, 0.1) if soft else (data, None)
    n, counts = len(learnt.labels), learnt.counts.numpy().astype(float)
    late = (1 - 0.9999) / (1 - 0.9999**counts)
    late = torch.tensor(late * 10 / late.sum(), dtype=torch.float32)
    torch.manual_seed(3)
    network = Small(10, **HALF).to(memory_format=torch.channels_last).train()
    at_first = {name: w.clone() for name, w in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 1.0, momentum=0.9, weight_decay=0.02)
    generator = torch.Generator().manual_seed(3)
    held_out_losses, steps = [], math.ceil(n / 600)
    assert 1 < steps and n % 600
    for epoch in range(2):
        order = torch.randperm(n, generator=generator)
        for i in range(steps):
            chosen = order[600 * i : 600 * (i + 1)]
            top, left = torch.randint(5, (2, len(chosen), 1), generator=generator)
            mirrored = torch.rand(len(chosen), 1, generator=generator) < 0.5
            crops = [crop(learnt.images[j].numpy(), top[k], left[k], 2, mirrored[k]) for k,
                     j in enumerate(chosen)]
            x = torch.from_numpy(np.stack(crops)).to(memory_format=torch.channels_last)
            logits = network(x / 127.5 - 1)
            weight = late if epoch == 1 else torch.ones(10)
            loss = (rewarded_by_hand if soft else focal_by_hand)(logits, learnt.labels[chosen], weight)
            passed = epoch + (i + 0.5) / steps  # epochs
            rate = 0.05 * (passed / 0.4 if passed < 0.4
                           else (1 + math.cos(math.pi * (passed - 0.4) / 1.6)) / 2)
            if soft:
                rate = 0.05 if epoch < 1 else 0.0005
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if soft:
            network.eval()
            with torch.no_grad():
                logits = network(watched.images / 127.5 - 1)
            held_out_losses.append(rewarded_by_hand(logits, watched.labels, None).item())
            network.train()
    found, expected = weights_of(tmp_path), network.state_dict()
    # rounding grows from step to step; to a hundredth of how far the weights came
    for name, w in expected.items():
        moved = (w - at_first[name]).abs().max()
        assert (found[name] - w).abs().max() <= 0.01 * moved and (moved > 0 or name in ("mean", "std")), name
    if soft:
        assert [row["held_out_loss"] for row in log_of(tmp_path)] == pytest.approx(held_out_losses, rel=1e-3)
    assert [row["lr"] for row in log_of(tmp_path)][-1] == pytest.approx(rate)


@pytest.mark.parametrize("drw", [True, False])
def test_which_weights_the_loss_gets(tmp_path, monkeypatch, drw):
    """DRW in the last fifth: with 5 epochs in the last one; with one epoch, or --no-drw, never."""
    seen = []

    def spy(logits, labels, weight, gamma=1):
        seen.append(weight)
        return focal_loss(logits, labels, weight, gamma)

    monkeypatch.setattr(classifier, "focal_loss", spy)
    monkeypatch.setattr(classifier, "predict", lambda network, images,
                        *_: torch.zeros(len(images), dtype=torch.int64))
    flags = ["--loss", "focal", "--drw" if drw else "--no-drw", "--rho", 1000, "--batch-size", 1000]
    run(tmp_path, "--epochs", 5, *flags)
    counts = datasets.load("shapeslt", "data", rho=1000).counts
    steps = math.ceil(counts.sum().item() / 1000)
    assert len(seen) == 5 * steps and all((w == 1).all() for w in seen[: 4 * steps])
    assert all(torch.equal(w, drw_weights(counts, 4 if drw else 0, 5)) for w in seen[4 * steps :])
    assert (seen[-1] == 1).all() == (not drw)
    run(tmp_path, "--epochs", 1, *flags, name="one")
    assert (seen[-1] == 1).all()


# --------------------------------------------------------------------------------------------------
# Resume
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three epochs, of 10 steps each, that nothing stopped."""
    return run(tmp_path_factory.mktemp("whole"), "--epochs", 3)


class Killed(BaseException):
    """Nothing catches it, nothing is saved: the disk is left as SIGKILL leaves it."""


@pytest.mark.parametrize("how", ["killed", "terminated"])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, whole, how, monkeypatch, capsys):
    """Killed or terminated in step 17 of 30; then the same command."""
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 17:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "learning_rate", stop)
        with pytest.raises(Killed if how == "killed" else SystemExit) as caught:
            run(tmp_path, "--epochs", 3)
    stopped_at = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert stopped_at == (10 if how == "killed" else 17) and not (tmp_path / "run" / "classifier.pt").exists()
    if how == "terminated":
        assert caught.value.code == 128 + signal.SIGTERM
        assert "stopped by signal 15 at step 17; the same command resumes the run" in capsys.readouterr().out
    # as if it had been killed between the log and the checkpoint
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 30, "epoch": 3}\n{"step"')
    run(tmp_path, "--epochs", 3)
    assert same_weights(whole, tmp_path / "run") and log_of(whole) == log_of(tmp_path / "run")
    a, b = (load_classifier(folder / "classifier.pt") for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.info["test_accuracy"] == b.info["test_accuracy"]


def test_another_script_is_stopped_too_and_goes_on(tmp_path, monkeypatch):
    """SIGTERM while frozen_classifier trains: SystemExit 143 with all saved; the next call finishes; same
    weights."""
    monkeypatch.chdir(tmp_path)
    recipe = classifier.SHAPES_RECIPE | {"batch_size": 200, "network": "small"}
    monkeypatch.setattr(classifier, "SHAPES_RECIPE", recipe)
    monkeypatch.setattr(classifier, "SHAPES_IMAGES_IN_THE_LOOP", 4000)  # two epochs of 13 steps
    monkeypatch.setattr(classifier, "predict", lambda network, images,
                        *_: torch.zeros(len(images), dtype=torch.int64))
    whole = frozen_classifier("shapeslt", "data", image_size=8, seed=7)
    run_dir = Path(whole.info["path"]).parent
    assert run_dir == Path("runs/classifier-shapeslt-8px-rho100-s7")
    run_dir.rename("whole")
    calls, handler = [], signal.getsignal(signal.SIGTERM)

    def terminate(*arguments):
        calls.append(arguments)
        if len(calls) == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*arguments)

    monkeypatch.setattr(classifier, "learning_rate", terminate)
    with pytest.raises(SystemExit) as caught:
        frozen_classifier("shapeslt", "data", image_size=8, seed=7)
    assert caught.value.code == 128 + signal.SIGTERM and not (run_dir / "classifier.pt").exists()
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 17
    assert signal.getsignal(signal.SIGTERM) == handler
    again = frozen_classifier("shapeslt", "data", image_size=8, seed=7)
    assert len(calls) == 26
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_finished_run_is_not_trained_again(whole, monkeypatch, capsys):
    before = {
        name: (whole / name).read_bytes()
        for name in ("checkpoint.pt", "metrics.json", "log.jsonl", "classifier.pt")
    }
    monkeypatch.setattr(classifier, "augment", lambda *_: pytest.fail("trained again"))
    (whole / "classifier.pt").unlink()  # as if it had been killed just before the end
    run(whole.parent, "--epochs", 3, "--save-every", 3, name=whole.name)  # --save-every may differ
    assert "trained already" in capsys.readouterr().out
    assert before == {name: (whole / name).read_bytes() for name in before}


@pytest.mark.parametrize("other, message", [
    (["--epochs", "5"], r"--epochs 3 there, 5 now"),
    (["--lr", "0.01"], r"--lr 0.05 there, 0.01 now"),
    (["--loss", "ce"], r"--loss focal there, ce now; --drw True there, False now"),
    (["--rho", "10"], "holds a run on other images than shapeslt has now"),
    (["--seed", "1"], r"--seed 0 there, 1 now"),
])  # fmt: skip
def test_other_settings_in_the_same_directory(whole, other, message):
    before = (whole / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"whole0?/run .*" + message):
        run(whole.parent, "--epochs", 3, *other, name=whole.name)
    assert (whole / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_kept_and_named(tmp_path):
    file = tmp_path / "run" / "checkpoint.pt"
    file.parent.mkdir()
    file.write_bytes(b"half a checkpoint")
    with pytest.raises(InputError, match="run/checkpoint.pt is damaged .*it is kept"):
        run(tmp_path, "--epochs", 1)
    assert file.read_bytes() == b"half a checkpoint"


# --------------------------------------------------------------------------------------------------
# Testing
# --------------------------------------------------------------------------------------------------
def test_accuracy_by_thirds_of_the_training_counts():
    labels = torch.arange(6).repeat_interleave(4)
    images = (labels[:, None, None, None] * 20 + torch.zeros(1, 3, 2, 2)).to(torch.uint8)
    wrong = torch.zeros(24, dtype=torch.bool)
    wrong[[0, 8, 9, 20, 21, 22]] = True  # class 0: 1 of 4 wrong, class 2: 2 of 4, class 5: 3 of 4
    images[wrong] += 20

    def network(x):  # recognises the class in the brightness
        k = torch.round((x[:, 0, 0, 0] + 1) * 127.5 / 20).long()
        return F.one_hot(k, 7).float()

    counts = torch.tensor([1, 9, 5, 8, 2, 4])  # head 1, 3; middle 2, 5; tail 4, 0
    assert torch.equal(classifier.predict(network, images, batch_size=5), labels + wrong)
    found, per_class = classifier.accuracy(network, ImageSet(images, labels, list("abcdef")), counts)
    assert found == {"all": 18 / 24, "head": 1.0, "middle": 3 / 8, "tail": 7 / 8}
    assert per_class == [3 / 4, 1, 2 / 4, 1, 1, 1 / 4]


def test_what_a_run_says_of_each_class(whole, capsys):
    """The log, metrics.json, per_class.csv and the checkpoint against the accuracy that is counted here."""
    network = load_classifier(whole / "classifier.pt")
    test, train_set = (datasets.load("shapeslt", "data", split, 8) for split in ("test", "train"))
    with torch.no_grad():
        right = network(test.images / 127.5 - 1).argmax(1) == test.labels
    by_class = [right[test.labels == k].double().mean().item() for k in range(10)]
    # in other batches: rounding
    assert network.info["per_class_accuracy"] == pytest.approx(by_class, abs=0.011)
    assert network.info["test_accuracy"].keys() == {"all", "head", "middle", "tail"}
    assert network.info["test_accuracy"]["all"] == pytest.approx(sum(by_class) / 10, abs=0.002)
    tail = np.mean(network.info["per_class_accuracy"][7:])
    assert network.info["test_accuracy"]["tail"] == pytest.approx(tail)
    rows = list(csv.DictReader((whole / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == test.classes  # head to tail
    assert [int(row["train_images"]) for row in rows] == train_set.counts.tolist()
    assert [float(row["accuracy"]) for row in rows] == network.info["per_class_accuracy"]
    metrics, log = json.loads((whole / "metrics.json").read_text()), log_of(whole)
    assert metrics["test_accuracy"] == network.info["test_accuracy"] == log[-1]["test_accuracy"]
    tests = [row["test_accuracy"]["all"] for row in log if "test_accuracy" in row]
    # a balanced test set; in other batches: rounding
    assert metrics["macro_recall"] == pytest.approx(metrics["test_accuracy"]["all"], abs=0.002)
    assert 0 < metrics["macro_precision"] != metrics["macro_recall"]
    assert len(tests) == 3 and metrics["best_on_test"] == {
        "all": max(tests),
        "epoch": 1 + tests.index(max(tests)),
    }
    run(whole.parent, "--epochs", 3, name=whole.name)  # says it again
    out = capsys.readouterr().out
    assert f"tail {100 * metrics['test_accuracy']['tail']:.2f} %" in out
    (line,) = [line.split() for line in out.splitlines() if line.startswith("triangle ")]
    assert line == ["triangle", rows[2]["train_images"], f"{float(rows[2]['accuracy']):.4g}"]


def test_how_often_a_run_is_tested(tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(classifier, "accuracy", lambda *_: epochs.append(0) or ({"all": 0.5}, [0.5] * 10))
    monkeypatch.setattr(classifier, "write_results", lambda *_: None)
    monkeypatch.setattr(Small, "tests", 2)
    run(tmp_path, "--epochs", 5, "--rho", 1e3)
    tested = [row["epoch"] for row in log_of(tmp_path / "run") if "test_accuracy" in row]
    assert tested == [2, 4, 5] and len(epochs) == 3


# --------------------------------------------------------------------------------------------------
# The annotator of the shapes data
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data_dir(judge_dir):
    return judge_dir


@pytest.fixture(scope="module")
def annotator(data_dir):
    return frozen_classifier("shapeslt", data_dir, split="reference", seed=3)


def test_the_annotator_is_right(annotator, data_dir):
    test = datasets.load("shapes", data_dir, "test")
    with torch.no_grad():
        right = (annotator(test.images.float() / 127.5 - 1).argmax(1) == test.labels).double().mean().item()
    assert right >= 0.97
    # What a GAN's loop sees is what was counted when the annotator was trained, to the digit; other inputs
    # are other images.
    assert annotator.info["test_accuracy"]["all"] == right
    with torch.no_grad():
        x = test.images[::20].float() / 127.5 - 1
        # raw [0, 1]; normalised once more, or wrongly
        for mistaken in ((x + 1) / 2, (x - 0.5) / 0.5, 2 * x + 1):
            assert (annotator(mistaken) - annotator(x)).abs().mean() > 0.5
    assert annotator.info["path"] == str(data_dir / "classifier-shapes-16.pt")
    assert (data_dir / "classifier-shapes-16" / "metrics.json").is_file()
    assert annotator.info["split"] == "reference" and annotator.info["classes"] == test.classes
    # the same annotator whatever the seed of the run that asks for it
    assert annotator.info["settings"]["seed"] == 0


def test_the_annotator_is_frozen_but_lets_gradients_through(annotator):
    assert not annotator.training and not any(p.requires_grad for p in annotator.parameters())
    before = annotator.norm.running_mean.clone()
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    annotator(x).logsumexp(1).sum().backward()
    assert (
        x.grad.abs().sum() > 0
        and annotator.conv.weight.grad is None
        and torch.equal(before, annotator.norm.running_mean)
    )


def test_the_annotator_is_trained_once(annotator, data_dir, monkeypatch):
    monkeypatch.setattr(classifier, "train", lambda *a, **k: pytest.fail("trained again"))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    # any shapes set, any seed: the same annotator
    again = frozen_classifier("shapes", data_dir, split="reference")
    assert torch.equal(before, torch.get_rng_state())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(x), annotator(x))
    assert torch.equal(frozen_classifier("shapes", data_dir, annotator.info["path"])(x), annotator(x))


def test_a_classifier_for_other_data_is_refused(annotator, data_dir):
    path = annotator.info["path"]
    with pytest.raises(InputError, match=r"shapes-16\.pt is for shapes .*wanted are images of 8 pixels"):
        frozen_classifier("shapes", data_dir, path, image_size=8)
    with pytest.raises(InputError,
                       match=r"shapes-16\.pt is for .*10 classes.*wanted are 2 classes, cat, dog"):
        load_classifier(path, classes=["cat", "dog"])
    with pytest.raises(InputError,
                       match=r"is for shapes .*; wanted is another data set with 10 classes, bird, 1, 2"):
        load_classifier(path, classes=["bird", *map(str, range(1, 10))])


def test_another_classifier_to_start_from(whole, tmp_path):
    """All weights but the head's are those of --init-from; which file it was is part of the experiment."""
    source = load_classifier(whole / "classifier.pt")
    common = [*TINY, "--epochs", "1", "--lr", "1e-30", "--run-dir", str(tmp_path / "run")]
    train(parse_settings([*common, "--init-from", str(whole / "classifier.pt"), "--head", "spinal"]))
    found = load_classifier(tmp_path / "run" / "classifier.pt")
    for name, w in found.named_parameters():
        assert name.startswith("head.") or torch.equal(w, source.get_parameter(name)), name
    assert isinstance(found.head, classifier.SpinalHead) and found.head.out.weight.std() > 0
    saved = torch.load(whole / "classifier.pt", weights_only=True)
    saved["weights"]["conv.weight"] += 1
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(InputError, match="--first-weights"):
        train(parse_settings([*common, "--init-from", str(tmp_path / "other.pt"), "--head", "spinal"]))
    with pytest.raises(InputError, match="other.pt is a small and this is a resnet32"):
        classifier.copy_body(ResNet32(10, **HALF), tmp_path / "other.pt")
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    other = Small(3, mean, std)  # for three classes, with statistics of its own
    head = other.head.weight.clone()
    classifier.copy_body(other, whole / "classifier.pt")
    assert torch.equal(other.head.weight, head) and torch.equal(other.mean, Small(3, mean, std).mean)
    assert torch.equal(other.conv.weight, source.conv.weight) and other.norm.running_mean.abs().sum() > 0


def test_with_nothing_held_out_the_last_weights_count(tmp_path, capsys):
    """Of all training images; what their labels are like is in metrics.json, per_class.csv and the table."""
    run(tmp_path, "--rho", 500, "--soft-labels", "--hold-out", 0, "--epochs", 2)
    out = capsys.readouterr().out
    network = load_classifier(tmp_path / "run" / "classifier.pt")
    train_set = datasets.load("shapeslt", "data", "train", 8, 500)
    with torch.no_grad():
        p = network(train_set.images / 127.5 - 1).softmax(1).numpy().astype(np.float64)
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert said["train_images"] == len(p)
    right = (p.argmax(1) == train_set.labels.numpy()).mean()
    assert said["labels"]["training_accuracy"] == pytest.approx(right, abs=0.01)
    assert said["labels"]["entropy"] == pytest.approx(scipy.stats.entropy(p, axis=1).mean(), rel=1e-3)
    rows = list(csv.DictReader((tmp_path / "run" / "per_class.csv").read_text().splitlines()))
    counted = {int(row["label"]): int(row["images_that_count"]) for row in rows}
    assert [counted[k] for k in range(10)] == pytest.approx((p > 0.01).sum(0).tolist(), abs=3)  # rounding
    assert said["labels"]["images_that_count"] == [min(counted.values()), max(counted.values())]
    assert "count for it" in out and log_of(tmp_path / "run")[-1]["training_accuracy"] >= 0
    found, last = (
        load_classifier(tmp_path / "run" / "classifier.pt").state_dict(),
        weights_of(tmp_path / "run"),
    )
    assert all(torch.equal(found[name], w) for name, w in last.items())
    assert "held_out_loss" not in log_of(tmp_path / "run")[-1]


def test_a_classifier_of_long_tailed_data_has_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def stand_in(args, path):  # training is tested above
        train_set, _, counts = classifier.load_data(args, "cpu")
        assert torch.equal(train_set.counts, counts)
        seen.append((counts.tolist(), args.seed))
        network = ResNet32(10, **HALF)
        save_classifier(path, network, "shapeslt", "train", train_set.classes, 8, SETTINGS, {"all": 0.5})

    monkeypatch.setattr(classifier, "train", stand_in)
    for rho in (None, 100, 10):
        frozen_classifier("shapeslt", tmp_path, image_size=8, rho=rho, seed=5)
    found = sorted(p.parent.name for p in (tmp_path / "runs").glob("*/classifier.pt"))
    # 100 is the default
    assert found == ["classifier-shapeslt-8px-rho10-s5", "classifier-shapeslt-8px-rho100-s5"]
    assert [(counts[0], counts[-1], seed) for counts, seed in seen] == [(1000, 10, 5), (1000, 100, 5)]


def test_a_classifier_in_the_loop_learns_from_what_the_gan_does(tmp_path, monkeypatch):
    """Thinned likewise, and unflipped if the GAN is: each in a run of its own."""
    monkeypatch.chdir(tmp_path)
    for kind in "abc":
        (tmp_path / "mine/train" / kind).mkdir(parents=True)
        for i in range(15):
            image = np.full((8, 8, 3), 5 * i + ord(kind), np.uint8)
            Image.fromarray(image).save(tmp_path / f"mine/train/{kind}/{i}.png")
    seen = []

    def stand_in(args, path):  # training is tested above
        train_set, test_set, _ = classifier.load_data(args, "cpu")
        classifier.complete(args, len(train_set.labels), 8)
        seen.append((args.flip, train_set.counts.tolist(), test_set.counts.tolist()))
        assert path == Path(args.run_dir) / "classifier.pt"
        settings = SETTINGS | {"training_data": train_set.fingerprint}
        network = ResNet32(3, **HALF)
        save_classifier(path, network, args.dataset, "train", train_set.classes, 8, settings, {"all": 0.5})

    monkeypatch.setattr(classifier, "train", stand_in)
    for more in ({}, {"rho": 4}, {"rho": 4, "imbalance": "step"}, {"rho": 4, "flip": False}):
        for _ in range(2):  # the second time it is there
            path = frozen_classifier("folder:mine", tmp_path, image_size=8, **more).info["path"]
        assert len(seen) == len(list(tmp_path.glob("runs/*"))) and path.startswith("runs/")
    assert path == "runs/classifier-folder_mine-8px-rho4-flipFalse-s0/classifier.pt"
    assert seen == [(True, [12, 12, 12], [3, 3, 3]), (True, [12, 6, 3], [3, 3, 3]),
                    (True, [12, 12, 3], [3, 3, 3]), (False, [12, 6, 3], [3, 3, 3])]
    assert (tmp_path / "runs/classifier-folder_mine-8px-rho4-step-s0").is_dir()
    args = types.SimpleNamespace(dataset="folder:mine", data_dir=tmp_path, image_size=8, rho=3,
                                 imbalance="step", classifier=None, flip=False, amp="off")
    train_set = datasets.load("folder:mine", tmp_path, "train", 8, 3, imbalance="step")
    classifier.labels_by_classifier(args, train_set, tmp_path / "run", "cpu")
    assert seen[4:] == [(False, [12, 12, 4], [3, 3, 3])]


@pytest.mark.parametrize("dataset, flag, expected, name", [
    ("cifar10", [], True, ""), ("cifar10", ["--no-flip"], False, "-flipFalse"),
    ("cifar10", ["--flip"], True, ""),
    ("shapes", [], False, ""), ("shapes", ["--flip"], True, "-flipTrue"),
    ("shapes", ["--no-flip"], False, ""),
])  # fmt: skip
def test_flips_of_the_recipe_can_be_turned_off_and_on(dataset, flag, expected, name):
    args = parse_settings(["--dataset", dataset, *flag])
    classifier.complete(args, 100, 32)
    assert args.flip is expected and args.run_dir == f"runs/classifier-{dataset}-32px{name}-s0"


def test_how_images_lie_in_memory_changes_nothing(tmp_path, monkeypatch):
    weights = []
    load = datasets.load
    for lying in (False, True):
        def loaded(*args, lying=lying, **kwargs):
            data = load(*args, **kwargs)
            data = ImageSet(data.images[::10].contiguous(), data.labels[::10], data.classes)
            if lying:  # as of a prepared file
                data.images = data.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            return data

        monkeypatch.setattr(datasets, "load", loaded)
        flags = ["--flip", "--rho", 1000, "--epochs", 1, "--soft-labels", "--entropy-weight", 0]
        where = run(tmp_path, *flags, name=str(lying))
        weights.append(weights_of(where))
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    logs = [log_of(tmp_path / str(lying)) for lying in (False, True)]
    assert logs[0] == logs[1] and "held_out_loss" in logs[0][-1]


# --------------------------------------------------------------------------------------------------
# Soft labels
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("K, head", [(102, 491_130), (176, None), (196, 1_072_708)])
def test_spinal_head_parameters(K, head):
    """Softlabel-GAN's heads on 2,048 features: w(1024 + 1) + 3 w(1024 + w + 1) + (4w + 1)K with w = K."""
    count = sum(p.numel() for p in classifier.SpinalHead(2048, K).parameters())
    assert count == (1025 * K + 3 * K * (1025 + K) + (4 * K + 1) * K) and (head is None or count == head)


def test_spinal_head_by_hand():
    layer, x = classifier.SpinalHead(8, 3), torch.randn(5, 8)
    a, b = x[:, :4], x[:, 4:]
    x1 = layer.layers[0](a).relu()
    x2 = layer.layers[1](torch.cat([b, x1], 1)).relu()
    x3 = layer.layers[2](torch.cat([a, x2], 1)).relu()
    x4 = layer.layers[3](torch.cat([b, x3], 1)).relu()
    assert torch.allclose(layer(x), layer.out(torch.cat([x1, x2, x3, x4], 1))) and x1.shape == (5, 20)
    assert ResNet32(4, **HALF, head="spinal")(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_entropy_is_rewarded():
    """L_C = CE - w H: ln K (1 - w) at the uniform prediction, CE at w = 0, and SciPy's entropy elsewhere."""
    assert classifier.entropy_rewarded_loss(torch.zeros(4, 7), torch.arange(4),
                                            0.3).item() == pytest.approx(math.log(7) * 0.7)
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])
    p = logits.softmax(1)
    cross_entropy = -p[range(6), labels].log().mean().item()
    for w in (0.0, 0.3, 0.7):
        by_hand = cross_entropy - w * scipy.stats.entropy(p.numpy(), axis=1).mean()
        assert classifier.entropy_rewarded_loss(logits, labels, w).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("K", [10, 100])
def test_what_a_classifier_trained_to_the_end_says(K):
    """The optimum for an image known by heart says nothing of it: p* on its class, the rest spread evenly. p*
    by SciPy from
    the equation, and by gradient descent on free logits; more weight on the entropy, less certainty."""
    stars = []
    for w in (0.1, 0.3, 0.7):
        slope = lambda p, w=w: 1 / p - w * math.log((K - 1) * p / (1 - p))  # noqa: E731
        star = scipy.optimize.brentq(slope, 1 / K, 1 - 1e-12)
        logits = torch.randn(1, K, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14,
                                      line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()  # noqa: B023
            value = classifier.entropy_rewarded_loss(logits, torch.tensor([2]), w)  # noqa: B023
            value.backward()
            return value

        optimizer.step(loss)
        p = logits.detach().softmax(1)[0]
        assert p[2].item() == pytest.approx(star, abs=1e-4)
        others = torch.cat([p[:2], p[3:]])
        assert (others - (1 - star) / (K - 1)).abs().max() < 1e-4
        stars.append(star)
    assert stars[1] == pytest.approx({10: 0.8492, 100: 0.6430}[K], abs=1e-4) and stars == sorted(
        stars, reverse=True
    )


def test_description_of_labels():
    labels = torch.tensor([0, 1])
    facts = classifier.describe_labels(torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.05, 0.85, 0.05, 0.05]]), labels)
    assert facts["max_probability"] == pytest.approx(0.775)
    assert facts["training_accuracy"] == 1 and facts["images_that_count"] == [1, 2]
    assert facts["off_class_mass"] == pytest.approx(0.225)
    # half of |.2 - .1| + |.1 - .1| + |0 - .1| of .3, and 0 of .15
    assert facts["off_class_distance"] == pytest.approx(0.1 / 0.45, rel=1e-5)
    swapped = classifier.describe_labels(torch.eye(4)[[0, 0, 2]], torch.tensor([0, 1, 2]))
    assert swapped["training_accuracy"] == pytest.approx(2 / 3) and swapped["images_that_count"] == [0, 2]
    one_hot = classifier.describe_labels(torch.eye(4)[labels], labels)
    assert one_hot["entropy"] == 0 and one_hot["off_class_distance"] is None


def test_held_out_images():
    counts = torch.tensor([30, 12, 3, 1])
    labels = torch.arange(4).repeat_interleave(counts)
    images = torch.arange(46, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    data = ImageSet(images, labels, list("abcd"))
    learnt, watched = classifier.held_out(data, 0.1)
    assert watched.counts.tolist() == [3, 1, 1,
                                       0] and (learnt.counts + watched.counts).tolist() == counts.tolist()
    assert sorted(torch.cat([learnt.images, watched.images])[:, 0, 0, 0].tolist()) == list(range(46))
    learnt, _ = classifier.held_out(data, 0.99)
    assert learnt.counts.min() == 1  # something is left to learn from
    assert classifier.held_out(data, 0) == (data, None)
    with pytest.raises(InputError, match="no class has two images"):
        classifier.held_out(ImageSet(images[:1], labels[:1], ["a"]), 0.1)


def test_early_stopping_keeps_the_best_weights(tmp_path, monkeypatch, capsys):
    """It stops PATIENCE epochs after the smallest held-out loss, keeps the weights of that epoch, logs what
    the labels are
    like, and a second call does not train."""
    monkeypatch.setattr(classifier, "PATIENCE", 2)
    held_out_losses = iter([3.0, 1.0, 2.0, 1.5] + [0.5] * 9)
    real = classifier.entropy_rewarded_loss

    def loss(logits, labels, w=0.3):
        return real(logits, labels, w) if logits.requires_grad else torch.tensor(next(held_out_losses))

    monkeypatch.setattr(classifier, "entropy_rewarded_loss", loss)
    run = [*TINY, "--rho", "500", "--soft-labels", "--epochs", "12", "--batch-size", "600", "--run-dir",
           str(tmp_path)]
    classifier.main(run)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3,
                                              4] and "kept the weights of epoch 2" in capsys.readouterr().out
    assert all(0 < row["max_probability"] < 1 and 0 <= row["off_class_distance"] <= 1 for row in rows)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    kept = load_classifier(tmp_path / "classifier.pt")
    assert kept.info["head"] == "spinal" and isinstance(kept.head, classifier.SpinalHead)
    assert all(torch.equal(kept.state_dict()[k], w) for k, w in state["kept"]["weights"].items())
    assert not torch.equal(kept.state_dict()["conv.weight"], state["model"]["conv.weight"])
    before = (tmp_path / "log.jsonl").read_text()
    classifier.main(run)
    assert (tmp_path
            / "log.jsonl").read_text() == before and "kept the weights of epoch 2" in capsys.readouterr().out


@pytest.fixture(scope="module")
def labelled(whole, tmp_path_factory):
    """labels_by_classifier's arguments for the training images of `whole`: the namespace and the images."""
    args = types.SimpleNamespace(dataset="shapeslt", data_dir="data", classifier=str(whole / "classifier.pt"),
                                 image_size=8, rho=100, imbalance="exp", flip=True, amp="off")
    return args, datasets.load("shapeslt", "data", "train", 8, 100)


def test_images_that_count_for_a_class():
    y = torch.tensor([[0.985, 0.011, 0.004], [0.02, 0.01, 0.97], [0.5, 0.5, 0.0]])
    assert classifier.images_that_count(y).tolist() == [3, 2, 1]
    assert classifier.images_that_count(y, 0.3).tolist() == [2, 1, 1]


def test_labels_are_computed_once_and_kept(labelled, tmp_path, monkeypatch, capsys):
    args, train_set = labelled
    p = classifier.labels_by_classifier(args, train_set, tmp_path, "cpu")
    network = load_classifier(args.classifier)
    with torch.no_grad():  # of clean images
        assert torch.allclose(p[::50], network(train_set.images[::50] / 127.5 - 1).softmax(1), atol=1e-5)
    assert p.dtype == torch.float32 and p.shape == (len(train_set.labels), 10)
    right, counted = (p.argmax(1) == train_set.labels).double().mean().item(), (p.numpy() > 0.01).sum(0)
    out = capsys.readouterr().out
    assert f"{network.info['test_accuracy']['all']:.1%} of test images and {right:.1%} of the labelled" in out
    assert f"for a class: {counted.min()} to {counted.max()}; its own images: 10 to 1000" in out
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "outputs", lambda *_: pytest.fail("computed again"))
        assert torch.equal(classifier.labels_by_classifier(args, train_set, tmp_path, "cpu"), p)
        without = types.SimpleNamespace(**vars(args) | {"classifier": None})
        patch.setattr(classifier, "frozen_classifier", lambda *_, **__: pytest.fail("asked again"))
        assert torch.equal(classifier.labels_by_classifier(without, train_set, tmp_path, "cpu"), p)
    other = torch.load(args.classifier, weights_only=True)
    other["weights"]["conv.weight"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match="labels of another classifier"):
        with_other = types.SimpleNamespace(**vars(args) | {"classifier": str(tmp_path / "other.pt")})
        classifier.labels_by_classifier(with_other, train_set, tmp_path, "cpu")
    fewer = ImageSet(train_set.images[1:], train_set.labels[1:], train_set.classes)
    with pytest.raises(InputError, match="soft_labels.npz labels other images"):
        classifier.labels_by_classifier(args, fewer, tmp_path, "cpu")
    (tmp_path / "soft_labels.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="soft_labels.npz is damaged"):
        classifier.labels_by_classifier(args, train_set, tmp_path, "cpu")


def test_labels_unlike_the_papers_are_warned_of(capsys):
    """Right on 90 % or not, collapsed or not, a class without its probability; the paper's counts where it
    has them."""
    labels = torch.arange(10).repeat_interleave(10)
    train_set = ImageSet(torch.zeros(100, 3, 8, 8, dtype=torch.uint8), labels, list("abcdefghij"))
    y, neighbour = torch.eye(10)[labels], torch.eye(10)[(labels + 1) % 10]
    good = 0.8 * y + 0.2 * neighbour
    wrong, without_c = good.clone(), good.clone()
    wrong[5::9] = good[5::9].roll(1, 1)  # 11 of the 100
    without_c[labels == 2] = neighbour[labels == 2]  # exactly 90 % are right
    for p, said in ((good, None), (wrong, "only 89.0%"), (0.9 * y + 0.01, "plain smoothing"),
                    (y, "all but one-hot"),
                    (0.5 * y + 0.5 * neighbour, None), (without_c, "gives c less than a quarter")):
        classifier.report_labels(p, train_set, "cifar10imb", "labels by c.pt: right on")
        out, err = capsys.readouterr()
        assert (err.count("warning") == 1 and said in err) if said else err == ""
        assert "(the paper's: 149 to 2,232); its own images: 10 to 10" in out
    classifier.report_labels(good, train_set, "cifar10imb-90", "labels")
    assert "paper" not in capsys.readouterr().out


def test_whether_bfloat16_is_used_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def stand_in(args, path):
        seen.append(args.amp)
        classifier.complete(args, 100, 8)
        assert path == Path(args.run_dir) / "classifier.pt"
        network = ResNet32(10, **HALF)
        save_classifier(path, network, "shapeslt", "train", train_set.classes, 8, SETTINGS, {"all": 0.5})

    train_set = datasets.load("shapeslt", "data", "train", 8, 10)
    monkeypatch.setattr(classifier, "train", stand_in)
    for amp in ("auto", "off"):
        frozen_classifier("shapeslt", tmp_path, image_size=8, soft_labels=True, amp=amp)
    args = types.SimpleNamespace(dataset="shapeslt", data_dir="data", classifier=None, image_size=8, rho=10,
                                 imbalance="exp", flip=True, amp="off")
    classifier.labels_by_classifier(args, train_set, tmp_path / "run", "cpu")
    assert seen == ["auto", "off", "off"]


def test_what_soft_labels_are_trained_with():
    def recipe(size, *arguments):
        return classifier.recipe_for(parse_settings(["--soft-labels", *arguments]), 3208, size)

    small = recipe(32, "--dataset", "cifar10imb")
    large = recipe(128, "--dataset", "folder:x", "--network", "wide_resnet101_2")
    for r in (small, large, recipe(16, "--dataset", "shapeslt")):
        assert (r["head"], r["entropy_weight"], r["hold_out"], r["loss"], r["drw"]) == (
            "spinal",
            0.3,
            0.1,
            "ce",
            False,
        )
    assert (small["network"], small["pretrained"]) == ("resnet32", False)
    assert (large["epochs"], large["pretrained"], large["lr"]) == (25, True, 0.001)
    assert [classifier.learning_rate(e, 25, 1.0, "sevens") for e in (0, 6.9, 7, 21)] == pytest.approx(
        [1, 1, 0.1, 0.001]
    )
    args = parse_settings(["--soft-labels", "--dataset", "cifar10imb", "--entropy-weight", "0.5", "--head",
                           "linear"])
    classifier.complete(args, 3208, 32)
    assert args.run_dir == "runs/classifier-cifar10imb-32px-soft-headlinear-entropyweight0.5-s0"
    for wrong in (["--entropy-weight", "-1"], ["--hold-out", "1"], ["--split", "reference"],
                  ["--loss", "focal", "--entropy-weight", "1"], ["--loss", "focal"], ["--drw"]):
        with pytest.raises(InputError):
            parse_settings(["--soft-labels", *wrong])


@torch.no_grad()
def test_the_network_for_large_images():
    with torch.device("meta"):  # 127 million parameters
        network = TorchvisionResNet("wide_resnet101_2", 176, **classifier.IMAGENET_STATISTICS, head="spinal")
    head = sum(p.numel() for p in network.head.parameters())
    assert head == 1025 * 176 + 3 * 176 * 1201 + 705 * 176
    assert sum(p.numel() for p in network.parameters()) - head == 124_837_696


def test_another_backbone_is_a_line_in_a_table():
    """resnet18: 512 features, ImageNet's weights by default, the official script's settings."""
    other = edited("classifier.py", ("TORCHVISION = {", 'TORCHVISION = {"resnet18": (24, 50), '))
    args = other.parse_settings(["--dataset", "cifar10imb", "--soft-labels", "--network", "resnet18"])
    other.complete(args, 3208, 32)
    assert (args.pretrained, args.lr, args.schedule, args.head) == (True, 0.001, "sevens", "spinal")
    network = other.NETWORKS[args.network](10, **args.normalisation, head=args.head).eval()
    assert sum(p.numel() for p in network.body.parameters()) == 11_176_512  # He et al. 2016, without the head
    with torch.no_grad():
        assert network.features(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# --------------------------------------------------------------------------------------------------
# Checkpoint
# --------------------------------------------------------------------------------------------------
def test_checkpoint_round_trip(tmp_path):
    network = settled(ResNet32(3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    settings = {"epochs": 1, "normalisation": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
                "head": "linear"}
    classes = list(np.array(["a", "b", "c"]))  # as they come out of a prepared file
    save_classifier(tmp_path / "new" / "c.pt", network, "toy", "train", classes, 8, settings, {"all": 0.5},
                    [0.5, 0.25, 0.75])
    again = load_classifier(tmp_path / "new" / "c.pt", classes=classes, image_size=8)
    saved, loaded = network.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)
    x = torch.rand(2, 3, 8, 8)
    # the same kernels: no rounding between them
    assert torch.equal(network.to(memory_format=torch.channels_last)(x), again(x))
    assert again.info["settings"] == settings and again.info["test_accuracy"] == {"all": 0.5}
    assert again.info["network"] == "resnet32" and again.info["per_class_accuracy"] == [0.5, 0.25, 0.75]


@pytest.mark.parametrize("content",
                         ["missing", "text", "cut short", "another dict", "a list", "another network",
                                     "an older version"])  # fmt: skip
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "c.pt"
    save_classifier(path, ResNet32(3, **HALF), "toy", "train", ["a", "b", "c"], 8, SETTINGS, {"all": 0.5})
    if content == "missing":
        path.unlink()
    elif content == "text":
        path.write_text("hello")
    elif content == "cut short":
        path.write_bytes(path.read_bytes()[:-5000])
    elif content == "another dict":
        torch.save({"model": {}}, path)
    elif content == "a list":
        torch.save([1, 2], path)
    elif content == "an older version":
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["per_class_accuracy"]
        torch.save(checkpoint, path)
    elif content == "another network":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["weights"].pop("conv.weight")
        torch.save(checkpoint, path)
    with pytest.raises(InputError, match="c.pt"):
        load_classifier(path)


class Mischief:
    """Unpickled without care, it opens a file for writing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"classes": Mischief(str(tmp_path / "proof"))}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="c.pt"):
        load_classifier(tmp_path / "c.pt")
    assert not (tmp_path / "proof").exists()


# --------------------------------------------------------------------------------------------------
# Few labels
# --------------------------------------------------------------------------------------------------
IMAGENET_FILE = "resnet50-0676ba61.pth"  # the published name


def prepared_cifar(folder, each=30):
    """CIFAR-10 as datasets.py prepares it, with noise in place of images: the path of the folder."""
    noise = np.random.RandomState(0)
    for split, n in (("train", each), ("test", 2)):
        labels = noise.permutation(np.arange(10).repeat(n))
        images = noise.randint(0, 256, (10 * n, 32, 32, 3)).astype(np.uint8)
        images[:, 0, 0, 0] = labels
        np.savez(folder / f"cifar10-{split}-32.npz", images=images, labels=labels,
                 classes=np.array(list("abcdefghij")))
    return folder


@pytest.mark.parametrize("name", ["cifar10", "cifar10lt", "cifar10imb"])
def test_few_labels_come_from_the_balanced_training_images(tmp_path, name):
    prepared_cifar(tmp_path)

    def draw(fraction, *more):
        arguments = ["--dataset", name, "--data-dir", str(tmp_path), "--label-fraction", str(fraction), *more]
        return classifier.few_labels(parse_settings(arguments))

    few = draw(0.1)
    assert few.counts.tolist() == [3] * 10 and torch.equal(few.images[:, 0, 0, 0].long(), few.labels)
    train_set = datasets.load("cifar10", tmp_path)
    every = {x.numpy().tobytes() for x in train_set.images}
    # 30 different ones of the training images
    assert len({x.numpy().tobytes() for x in few.images} & every) == 30
    assert torch.equal(draw(0.1, "--seed", "9").images, few.images)  # which ones: not a matter of the seed
    with pytest.raises(InputError, match="is 0 for each of 10 classes"):
        draw(1e-6)
    with pytest.raises(InputError, match="is 60 for each of 10 classes, of which the smallest has 30"):
        draw(2)


def test_few_labels_of_cifar10_and_lsun():
    """0.001 of 50,000 and of 250,000 images: the paper's 5 and 50 a class."""
    for n, K, each in ((50_000, 10, 5), (250_000, 5, 50)):
        labels = torch.arange(n) % K
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets, "load", lambda *_, x=labels, k=K: ImageSet(x[:, None], x, list(range(k))))
            assert (
                classifier.few_labels(parse_settings(["--label-fraction", "0.001"])).counts.tolist()
                == [each] * K
            )


def test_fine_tuning(tmp_path, monkeypatch, run_script):
    """Random weights where torch.hub would put ImageNet's; two steps on one image a class."""
    from torchvision.models import resnet50

    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    source = resnet50().state_dict()
    torch.save(source, folder / IMAGENET_FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # The test images are left out but for a few: 2,000 of 128 x 128 pixels are a minute.
    monkeypatch.setattr(classifier, "predict", lambda network, images,
                        *_: torch.zeros(len(images), dtype=torch.int64))
    command = ["--dataset", "shapeslt", "--image-size", "8", "--label-fraction", "0.001", "--epochs", "1",
               "--amp", "off",
               "--device", "cpu", "--run-dir", str(tmp_path / "run")]  # fmt: skip
    train(parse_settings([*command, "--lr", "1e-30"]))
    network = load_classifier(tmp_path / "run" / "classifier.pt",
                              classes=datasets.load("shapes", "data").classes)
    assert isinstance(network, TorchvisionResNet) and network.info["network"] == "resnet50"
    assert torch.equal(network.body.conv1.weight, source["conv1.weight"])  # the rate is next to nothing
    assert network.info["settings"]["label_fraction"] == 0.001
    assert network.info["settings"]["weight_decay"] == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_images"] == 10
    with pytest.raises(InputError, match="--lr 1e-30 there, 0.003 now"):
        train(parse_settings(command))


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tried = []

    def no_network(url, *rest, **more):
        tried.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    place = tmp_path / "hub" / "checkpoints" / IMAGENET_FILE
    with pytest.raises(InputError, match="no route to host") as caught:
        run(tmp_path, "--network", "resnet50", "--label-fraction", "0.001")
    assert f"copy that file to {place}" in str(caught.value) and tried[0] in str(caught.value)
    assert tried[0].startswith("https://") and tried[0].endswith(IMAGENET_FILE)
    assert not (tmp_path / "run").exists()
    network = TorchvisionResNet("resnet50", 2, **classifier.IMAGENET_STATISTICS)
    for content, message in ((b"", "is damaged"), (b"<html>not found</html>", "is damaged"),
                             (None, "does not hold")):
        if content is None:
            torch.save({"conv1.weight": torch.zeros(3)}, place)
        else:
            place.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            network.load_imagenet()
        assert str(place) in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------
def read(path, *more):
    args = parse_settings(["--dataset", "shapeslt", "--image-size", "8", "--train-on", str(path), *more])
    return classifier.load_data(args, "cpu")[0], args


def test_samples_are_read_with_their_labels(tmp_path, whole):
    path = tmp_path / "s.npz"
    shapes_samples(path)
    (found, _), stored = read(path), np.load(path)
    assert np.array_equal(found.images.permute(0, 2, 3, 1), stored["images"])
    assert np.array_equal(found.labels, stored["labels"]) and found.counts.tolist() == [4] * 10
    other = np.arange(40) % 7
    shapes_samples(path, predicted=other)
    # the class it was made for, before the one that is seen
    assert np.array_equal(read(path)[0].labels, stored["labels"])
    shapes_samples(path, labels=None, predicted=other)
    assert np.array_equal(read(path)[0].labels, other)
    annotator = load_classifier(whole / "classifier.pt")
    labelled = read(path, "--label-with", str(whole / "classifier.pt"))[0].labels
    assert torch.equal(labelled,
                       annotator(found.images / 127.5 - 1).argmax(1)) and not np.array_equal(labelled, other)


@pytest.mark.parametrize("arrays, message", [
    (dict(labels=None), "holds neither labels nor predicted; --label-with CLASSIFIER.pt labels its images"),
    (dict(labels=np.arange(40) - 1), "labels from -1 to 38; shapeslt has 0 to 9"),
    (dict(labels=np.full(40, 10)), "labels from 10 to 10"),
    (dict(labels=np.zeros(39, int)), r"labels are int64 \(39,\), not integers \(40,\)"),
    (dict(labels=np.zeros(40)), "labels are float64"),
    (dict(images=None), "has neither images nor arr_0"),
    (dict(images=np.zeros((40, 8, 8, 3), np.float32)), "images are float32"),
    (dict(images=np.zeros((40, 9, 8, 3), np.uint8)),
     "samples of 8 x 9 pixels and shapeslt 8 x 8; see --image-size"),
    (dict(labels=np.array([{}] * 40)), "damaged .*allow_pickle"),
])  # fmt: skip
def test_samples_that_nothing_can_learn_from(tmp_path, arrays, message):
    with pytest.raises(InputError, match=f"s.npz:? .*{message}"):
        read(shapes_samples(tmp_path / "s.npz", **arrays))


def test_classifier_accuracy_score(tmp_path, capsys):
    """It learns from the file and is counted on the real test images, beside the GAN's own files."""
    run_dir = tmp_path / "runs" / "gan"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.json").write_text("the GAN's own")
    shapes_samples(run_dir / "samples.npz", n=500)
    command = [*TINY, "--train-on", str(run_dir / "samples.npz"), "--epochs", "2"]
    classifier.main(command)
    assert (run_dir / "metrics.json").read_text() == "the GAN's own"
    (cas,) = run_dir.glob("cas-samples-shapeslt-8px-rho100-ampoff-networksmall-*epochs2*-s0")
    found = json.loads((cas / "metrics.json").read_text())
    score = found["classifier_accuracy_score"]
    assert f"\nclassifier accuracy score: {100 * score:.2f} %\n" in capsys.readouterr().out
    assert score == found["test_accuracy"]["all"] <= found["best_on_test"]["all"]
    assert found["train_images"] == 500
    network = load_classifier(cas / "classifier.pt")
    test = datasets.load("shapeslt", "data", "test", 8)
    assert score == (classifier.predict(network, test.images) == test.labels).double().mean().item()
    assert (network.info["settings"]["loss"], network.info["settings"]["drw"]) == ("ce", False)
    shapes_samples(run_dir / "samples.npz", n=400)  # the GAN's run went on
    with pytest.raises(InputError, match="other images"):
        classifier.main(command)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def test_command_line(run_script, tmp_path):
    done = run_script("classifier.py", "--dataset", "shapeslt", "--rho", 50, "--image-size", 8, "--epochs", 1,
                      "--batch-size", 500, "--lr", 0.02, "--schedule", "steps", "--loss", "ce", "--no-drw",
                      "--amp", "off",
                      "--seed", 1, "--save-every", 2, "--device", "cpu", "--data-dir", "d",
                      cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("classifier-shapeslt-8px-rho50-") and run_dir.name.endswith("-s1")
    for part in ("epochs1", "batchsize500", "lr0.02", "schedulesteps", "ampoff"):
        assert f"-{part}-" in run_dir.name
    network = load_classifier(run_dir / "classifier.pt", image_size=8)
    assert f"tail {100 * network.info['test_accuracy']['tail']:.2f} %" in done.stdout
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["rho"] == 50 and config["settings"]["epochs"] == 1
    assert config["torch"] == torch.__version__
    (row,) = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    assert row["epoch"] == 1 and 0 < row["loss"] < 5
    assert {p.name for p in run_dir.iterdir()} == {"classifier.pt", "checkpoint.pt", "config.json",
                                                   "log.jsonl",
                                                   "metrics.json", "per_class.csv"}  # fmt: skip


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "shape"], "unknown data set 'shape'"),
    (["--epochs", "many"], "'many' is not a whole number from 1 on"),
    (["--lr", "0"], "--lr: '0' is not a positive number"),
    (["--seed", "-1"], "--seed: '-1' is not a whole number from 0 on"),
    (["--epochs", "0"], "--epochs: '0' is not a whole number from 1 on"),
    (["--hold-out", "1"], "--hold-out: '1' is not a number from 0 to below 1"),
    (["--init-from", "c.pt"], "--init-from: there is no file c.pt"),
    (["--pretrained"], "ImageNet's weights do not fit resnet32"),
    (["--label-with", "c.pt"], "--train-on or --add, and neither is given"),
    (["--label-fraction", "0.1", "--train-on", "a.npz"], "--train-on and --label-fraction each say"),
    (["--label-fraction", "0.9", "--dataset", "shapes", "--image-size", "2"], "image size is 2"),
    (["--train-on", "nowhere.npz"], "no samples at nowhere.npz"),
    (["--device", "nowhere"], "--device nowhere can't be used"),
])  # fmt: skip
def test_command_line_errors(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, SystemExit), match=message):
        classifier.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line_errors_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classifier.py", "--dataset", "shape"])
    with pytest.raises(SystemExit) as caught:
        datasets.run_command(classifier.main)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("classifier.py: error: unknown data set 'shape'") and err.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Real and generated images together: CBDM, Table 4
# --------------------------------------------------------------------------------------------------
def test_macro_precision_and_recall():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    seen = torch.tensor([0, 0, 1, 1, 3, 0])
    # precision: 2 of 3 taken for 0, 1 of 2 for 1, none of class 2; recall: 2/3, 1/2, 0; class 3 has no images
    found = classifier.macro_precision_recall(seen, labels, 4)
    assert found == pytest.approx(((2 / 3 + 1 / 2 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3))
    seen = torch.tensor([0, 1, 1, 1, 1, 2])
    assert classifier.macro_precision_recall(seen, labels,
                                             3) == pytest.approx(((1 + 2 / 4 + 1) / 3, (1 / 3 + 1 + 1) / 3))


def test_generated_images_are_added_to_the_real_ones(tmp_path):
    real = datasets.load("shapeslt", tmp_path, "train", 8)
    added = datasets.load("shapes", tmp_path, "reference", 8)
    images = added.images[::20].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", images=images, labels=added.labels[::20].numpy())
    command = [*TINY, "--epochs", "1", "--data-dir", str(tmp_path), "--add", str(tmp_path / "samples.npz")]
    args = classifier.parse_settings(command)
    both, test_set, counts = classifier.load_data(args, "cpu")
    assert len(both.labels) == len(real.labels) + 200 and torch.equal(counts, real.counts)
    assert torch.equal(both.images[-200:],
                       added.images[::20]) and torch.equal(both.labels[: len(real.labels)], real.labels)
    classifier.main(command)
    (run_dir,) = tmp_path.glob("with-samples-shapeslt-8px-rho100-*epochs1*-s0")
    result = json.loads((run_dir / "metrics.json").read_text())
    network = classifier.load_classifier(run_dir / "classifier.pt")
    seen = classifier.outputs(network, test_set.images).argmax(1)
    recall = [(seen[test_set.labels == k] == k).double().mean().item() for k in range(10)]
    precision = [(test_set.labels[seen == k] == k).double().mean().item() if (seen == k).any() else 0
                 for k in range(10)]
    assert result["macro_recall"] == pytest.approx(np.mean(recall))
    assert result["macro_recall"] == pytest.approx(result["test_accuracy"]["all"])
    assert result["macro_precision"] == pytest.approx(np.mean(precision)) and result["loss"] == "ce"
    with pytest.raises(classifier.InputError, match="--train-on and --add each say what to learn from"):
        classifier.parse_settings([*command, "--train-on", "x.npz"])


# --------------------------------------------------------------------------------------------------
# Do generated images help?
# --------------------------------------------------------------------------------------------------
def test_paired_difference_by_hand():
    """Differences .1, .2, .6: mean .3, deviations -.2, -.1, .3, s^2 = .14 / 2, error sqrt(.07 / 3)."""
    difference, error = classifier.paired_difference([0.2, 0.5, 0.1], [0.3, 0.7, 0.7])
    assert difference == pytest.approx(0.3) and error == pytest.approx((0.07 / 3) ** 0.5)


# Accuracy of three classes without, by seed, and what is gained with: the second's gain is beyond doubt; the
# third's is larger than its error, .0306, and smaller than twice that.
ACCURACY = {1: [0.9, 0.1, 0.5], 2: [0.5, 0.3, 0.2], 3: [0.1, 0.5, 0.8]}
GAIN = {1: [0.0, 0.1, 0.1], 2: [0.0, 0.12, 0.0], 3: [0.0, 0.11, 0.08]}


@pytest.fixture
def three_classes(tmp_path, monkeypatch):
    """--add for three classes with the accuracies above: the command, and the settings of each run."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([3, 20, 9]))  # from head to tail: b, c, a
    images = torch.zeros(32, 3, 8, 8, dtype=torch.uint8)
    real, runs = ImageSet(images, labels, ["a", "b", "all"]), []

    def stand_in(args, path=None):  # training is tested above
        learnt = len(classifier.load_data(args, "cpu")[0].labels)
        classifier.complete(args, learnt, 8)
        accuracy = np.add(ACCURACY[args.seed], GAIN[args.seed] if args.add else 0).tolist()
        shares = {"all": sum(accuracy) / 3, "head": accuracy[1], "middle": accuracy[2], "tail": accuracy[0]}
        path = Path(args.run_dir) / "classifier.pt"
        save_classifier(path, ResNet32(3, **HALF), "folder:x", args.source, real.classes, 8, SETTINGS, shares,
                        accuracy)
        runs.append((types.SimpleNamespace(**vars(args)), learnt))
        return path

    monkeypatch.setattr(datasets, "load", lambda *_, **__: real)
    monkeypatch.setattr(datasets, "folder_splits", lambda *_: ["train", "test"])
    monkeypatch.setattr(classifier, "train", stand_in)
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return ["--dataset", "folder:x", "--add", "s.npz", "--repeats", "3", "--seed", "1"], runs


def test_with_and_without_are_compared_within_a_seed(three_classes, capsys):
    """Between seeds accuracies differ by .4, within them by .1: errors by hand, .0058 for b."""
    command, runs = three_classes
    classifier.main([*command, "--run-dir", "both"])
    assert [(run.seed, run.run_dir, run.add, run.source) for run, _ in runs] == [
        (seed, f"both/{arm}-s{seed}", add, source) for seed in (1, 2, 3) for arm, add, source in
        (("without", None, "train"), ("with", "s.npz", "train and samples"))]
    assert all((run.loss, run.drw) == ("ce", False) for run, _ in runs)
    result = json.loads(Path("both/comparison.json").read_text())
    assert [(row["of"], row["images"]) for row in result["rows"]] == [
        ("all", 32), ("head", 20), ("middle", 9), ("tail", 3),
        ("class b", 20), ("class all", 9), ("class a", 3)]
    expected = [(0.3, 0.11, 0.01 / 3**0.5, "better with"), (0.5, 0.06, (0.0028 / 3) ** 0.5, None),
                (0.5, 0, 0, None)]
    for row, (without, difference, error, told) in zip(result["rows"][1:], expected * 2, strict=True):
        assert row["without"] == pytest.approx(without) and row["with"] == pytest.approx(without + difference)
        assert row["difference"] == pytest.approx(difference, abs=1e-12)
        assert row["error"] == pytest.approx(error, abs=1e-12)
        assert row["told"] == (told or "no difference can be told")
    assert [run["run"] for run in result["runs"]["with"]] == [f"both/with-s{seed}/classifier.pt" for seed in
                                                              (1, 2, 3)]
    assert [run["class all"] for run in result["runs"]["with"]] == pytest.approx([0.6, 0.2, 0.88])
    table = list(csv.DictReader(Path("both/comparison.csv").read_text().splitlines()))
    assert [float(row["error"]) for row in table] == [row["error"] for row in result["rows"]]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("class b ")]
    assert line.split() == ["class", "b", "20", "30.00", "41.00", "11.00", "0.58", "better", "with"]


def test_a_class_without_test_images_is_left_out_of_a_comparison(three_classes, monkeypatch):
    command, _ = three_classes
    real = classifier.load_classifier

    def without_tests_of_a(path):
        network = real(path)
        network.info["per_class_accuracy"][0] = network.info["test_accuracy"]["tail"] = None
        return network

    monkeypatch.setattr(classifier, "load_classifier", without_tests_of_a)
    classifier.main([*command, "--run-dir", "both"])
    rows = json.loads(Path("both/comparison.json").read_text())["rows"]
    assert [row["of"] for row in rows] == ["all", "head", "middle", "class b", "class all"]


def test_both_arms_take_as_many_steps(three_classes):
    """32 and 64 images in batches of 10: 4 and 7 steps an epoch; 35 epochs and 20."""
    command, runs = three_classes
    classifier.main([*command, "--epochs", "35", "--batch-size", "10"])
    assert {(run.epochs, learnt) for run, learnt in runs} == {(35, 32), (20, 64)}
    where = Path("with-s-folder_x-8px-epochs20-batchsize10-s1")  # beside the samples
    assert json.loads((where / "comparison.json").read_text())["what"].startswith(
        "without: 35 epochs of 32 training images; with (train and samples): 20 of 64, as many steps\n")
    assert len(list(Path("runs").iterdir())) == 3  # those without, for other samples too


def test_a_finished_comparison_is_not_trained_again(tmp_path, monkeypatch):
    shapes_samples(tmp_path / "s.npz")
    command = [*TINY, "--rho", "1000", "--add", str(tmp_path / "s.npz"), "--repeats", "2", "--epochs", "1",
               "--run-dir", str(tmp_path / "both")]
    classifier.main(command)
    files = {path: path.read_bytes() for path in (tmp_path / "both").glob("comparison.*")}
    rows = json.loads((tmp_path / "both" / "comparison.json").read_text())["rows"]
    runs = [tmp_path / "both" / f"{arm}-s{seed}" for arm in ("without", "with") for seed in (0, 1)]
    tail = [json.loads((run / "metrics.json").read_text())["test_accuracy"]["tail"] for run in runs]
    assert rows[3]["difference"] == pytest.approx((tail[2] + tail[3] - tail[0] - tail[1]) / 2)
    monkeypatch.setattr(classifier, "augment", lambda *_: pytest.fail("trained again"))
    classifier.main(command)
    assert len(files) == 2 and all(path.read_bytes() == content for path, content in files.items())
    with pytest.raises(pytest.fail.Exception, match="trained again"):  # seed 2 is new, the others are kept
        classifier.main([*command, "--repeats", "3"])
    with pytest.raises(InputError, match="--repeats is for .* neither is given"):
        parse_settings(["--repeats", "2"])


# --------------------------------------------------------------------------------------------------
# Your own folder
# --------------------------------------------------------------------------------------------------
def test_what_a_folder_is_trained_with():
    def recipe(size, images, *flags):
        return classifier.recipe_for(parse_settings(["--dataset", "folder:x", *flags]), images, size)

    assert [recipe(32, n)["epochs"] for n in (50, 1200, 5000, 100_000)] == [200, 50, 12, 10]
    assert [recipe(size, 1200)["network"] for size in (16, 32, 33, 128)] == ["resnet32"] * 2 + [
        "resnet32at32"] * 2
    loop, annotator, soft = (recipe(64, 1200, *flags) for flags in
                             ([], ["--split", "reference"], ["--soft-labels"]))
    assert [(r["loss"], r["drw"]) for r in (loop, annotator, soft)] == [("focal", True), ("ce", False),
                                                                         ("ce", False)]
    for r in (loop, annotator, soft):
        assert (r["batch_size"], r["schedule"], r["epochs"], r["pretrained"]) == (32, "cosine", 50, False)
    assert (soft["head"], soft["entropy_weight"], soft["hold_out"]) == ("spinal", 0.3, 0.1)
    assert soft["network"] == "resnet32at32"
    papers = parse_settings(["--dataset", "folder:x", "--soft-labels", "--network", "wide_resnet101_2"])
    classifier.complete(papers, 1200, 128)
    assert papers.run_dir == "runs/classifier-folder_x-128px-soft-networkwide_resnet101_2-s0"  # its own
    flags = ["--network", "resnet32", "--epochs", "200", "--batch-size", "128", "--lr", "0.1", "--schedule",
             "steps"]
    args = parse_settings(["--dataset", "folder:x", *flags])
    classifier.complete(args, 1200, 64)  # LDAM-DRW's own, for rows of the papers
    assert all(getattr(args, name) == value for name, value in classifier.PAPER_RECIPE.items())


@torch.no_grad()
def test_large_images_are_seen_at_32_pixels():
    """Half as large: each pixel is the mean of 4 x 4 with the weights 1, 3, 3, 1, a triangle filter's."""
    network, x, seen = classifier.ResNet32At32(5, **HALF).eval(), torch.rand(2, 3, 64, 64) * 2 - 1, []
    network.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(x), network(x[:, :, :32, :32])
    weights = torch.tensor([1.0, 3, 3, 1]) / 8
    weights = (weights[:, None] * weights).view(1, 1, 4, 4)
    by_hand = F.conv2d(x.view(6, 1, 64, 64), weights, stride=2, padding=1)
    assert seen[0].shape == (2, 3, 32, 32)
    assert torch.allclose(seen[0][..., 1:-1, 1:-1], by_hand.view(2, 3, 32, 32)[..., 1:-1, 1:-1], atol=1e-5)
    assert torch.equal(seen[1], x[:, :, :32, :32])


def folder_of(root, *splits):
    """PATH/<split>/<class>/*.png, other images in each split; the name of the data set."""
    for i, split in enumerate(splits):
        for c in "ab":
            (root / split / c).mkdir(parents=True)
            for n in range(2):
                image = np.full((8, 8, 3), 60 * i + 20 * (c == "b") + n, np.uint8)
                PIL.Image.fromarray(image).save(root / split / c / f"{n}.png")
    return f"folder:{root}"


@pytest.mark.parametrize("there, annotator, tested", [
    (["train"], 0, 0), (["train", "test"], 0, 1), (["train", "reference"], 1, 1),
    (["train", "test", "reference"], 2, 1)])  # fmt: skip
def test_what_the_annotator_of_a_folder_learns_from(tmp_path, monkeypatch, there, annotator, tested):
    """From PATH/reference, else the training images; tested on PATH/test."""
    name = folder_of(tmp_path / "x", *there)
    args = parse_settings(["--dataset", name, "--data-dir", str(tmp_path), "--image-size", "8", "--split",
                           "reference"])
    learnt, test_set, _ = classifier.load_data(args, "cpu")
    assert [learnt.images.max().item() // 60, test_set.images.max().item() // 60] == [annotator, tested]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier, "FOLDER_EPOCHS", (1, 1))
    for _ in range(2):  # trained, and found again
        found = frozen_classifier(name, tmp_path, split="reference", image_size=8, amp="off")
    assert found.info["settings"]["training_data"] == learnt.fingerprint
    assert found.info["tested_on_unseen_images"] == (annotator != tested)


def test_samples_of_a_directory(tmp_path, monkeypatch):
    """The classes of the data set are handed on: directories are labels by them."""
    import metrics

    found = []
    images, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([3, 4])
    monkeypatch.setattr(metrics, "load_samples", lambda *all: found.append(all) or (images, labels))
    assert read(tmp_path)[0].labels.tolist() == [3, 4]
    assert found == [(str(tmp_path), ("labels", "predicted"), list(datasets.SHAPES))]
