"""softlabel_gan.py: each equation against a value found another way, DiffAugment, networks, loop, runs."""

import csv
import functools
import json
import math
import os
import shutil
import signal
import types

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import ROOT, edited, log_of, same_state, state_of
from PIL import Image

import classifier
import datasets
import softlabel_gan
from datasets import Batches, ImageSet, InputError
from softlabel_gan import (
    Discriminator,
    Generator,
    images_that_count,
    label_augmentation,
    online_label_smoothing,
    smooth_labels,
)

DRAWN_ONCE = functools.cache(datasets.draw_shapes)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(datasets, "draw_shapes", DRAWN_ONCE)


def one_hot(labels, K):
    return F.one_hot(torch.as_tensor(labels), K).float()


def count(network):
    return sum(w.numel() for w in network.parameters())


# ------------------------------------------------------------------------------------------- losses


def test_hinge_by_hand():
    one, zero = torch.ones(4), torch.zeros(4)
    assert softlabel_gan.discriminator_loss(one, -one) == 0  # beyond the margin nothing is gained
    assert softlabel_gan.discriminator_loss(5 * one, -7 * one) == 0
    assert softlabel_gan.discriminator_loss(zero, zero) == 2
    # max(0, 1 - .5), max(0, 1 + 2) of the real, max(0, 1 + .25), max(0, 1 - 3) of the fakes
    loss = softlabel_gan.discriminator_loss(torch.tensor([0.5, -2.0]), torch.tensor([0.25, -3.0]))
    assert loss == pytest.approx((0.5 + 3) / 2 + 1.25 / 2)
    assert softlabel_gan.generator_loss(torch.tensor([1.0, 4.0])) == -2.5


def test_the_discriminator_gains_nothing_beyond_the_margin_on_fakes():
    """The f_D that Eq. 3 has lost in print."""
    D_fake = torch.tensor([-3.0, 0.5], requires_grad=True)
    softlabel_gan.discriminator_loss(torch.zeros(2), D_fake).backward()
    assert D_fake.grad.tolist() == [0, 0.5]


# Logits of ADC-GAN's head, three images of two classes: real a, real b, generated a, generated b.
LOGITS = [[1.0, -0.5, 0.25, 2.0], [0.0, 3.0, -1.0, 0.5], [-2.0, 0.75, 1.5, 0.0]]


def test_losses_of_adc_gan_by_hand():
    """Cross-entropies written out in NumPy: soft targets among the real classes, one-hot among the others."""
    y_hat, y_f = np.array([[0.7, 0.3], [0.1, 0.9], [1.0, 0.0]]), np.array([[0, 1], [1, 0], [0, 1]])
    real, fake = np.array(LOGITS), np.array(LOGITS[::-1])
    q_real, q_fake = (np.exp(t) / np.exp(t).sum(1, keepdims=True) for t in (real, fake))
    on_real = -np.mean([0.7 * np.log(q_real[0, 0]) + 0.3 * np.log(q_real[0, 1]),
                        0.1 * np.log(q_real[1, 0]) + 0.9 * np.log(q_real[1, 1]), np.log(q_real[2, 0])])
    on_fake = -np.mean(np.log([q_fake[0, 3], q_fake[1, 2], q_fake[2, 3]]))
    given = [torch.tensor(t, dtype=torch.float64) for t in (real, fake, y_hat, y_f)]
    assert softlabel_gan.adc_discriminator_loss(*given).item() == pytest.approx(on_real + on_fake)
    as_real = -np.mean(np.log([q_fake[0, 1], q_fake[1, 0], q_fake[2, 1]]))
    assert softlabel_gan.adc_generator_loss(given[1], given[3]).item() == pytest.approx(as_real - on_fake)


def test_what_the_losses_of_adc_gan_move():
    """G: only the two logits of the fake's own class. D: softmax - target, each half of the batch its own."""
    real, fake = (torch.tensor(LOGITS, requires_grad=True) for _ in range(2))
    y_f, y_hat = one_hot([1, 0, 1], 2), torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.0, 1.0]])
    softlabel_gan.adc_generator_loss(fake, y_f).backward()
    assert torch.allclose(3 * fake.grad, torch.tensor([[0.0, -1, 0, 1], [-1, 0, 1, 0], [0, -1, 0, 1]]))
    fake.grad = None
    softlabel_gan.adc_discriminator_loss(real, fake, y_hat, y_f).backward()
    targets = torch.tensor([[[0.7, 0.3, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]],
                            [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]])
    for logits, target in zip((real, fake), targets, strict=True):
        assert torch.allclose(3 * logits.grad, logits.detach().softmax(1) - target, atol=1e-6)


# ------------------------------------------------------------------------------------------- labels


def test_smoothing_by_hand():
    """P's 1 - alpha + alpha / K on the class; A's 1 - alpha would leave the sum at 1 - alpha / K."""
    for K, own in ((10, 0.91), (100, 0.901)):
        y = smooth_labels(one_hot([3], K).double(), 0.1)[0]
        assert y[3] == pytest.approx(own) and y[0] == pytest.approx(0.1 / K)
        assert y.sum() == pytest.approx(1, abs=1e-12)
    assert torch.equal(smooth_labels(one_hot([1], 4), 0.0), one_hot([1], 4))
    assert torch.allclose(smooth_labels(one_hot([1], 4), 1.0), torch.full((1, 4), 0.25))


def test_mixup_by_hand():
    x, y = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1), one_hot([0, 2], 3)
    mixed, labels = softlabel_gan.mixup(x, y, 0.75, torch.tensor([1, 0]))
    assert mixed.flatten().tolist() == [0.5, -0.5] and labels.tolist() == [[0.75, 0, 0.25], [0.25, 0, 0.75]]
    same, labels = softlabel_gan.mixup(x, y, 1.0, torch.tensor([1, 0]))
    assert torch.equal(same, x) and torch.equal(labels, y)


def test_online_label_smoothing_by_hand():
    p = [[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.5, 0.4, 0.1]]
    p = torch.tensor(p, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2])  # the last two are mistaken for class 0: class 2 has none
    table = online_label_smoothing(p, labels)
    by_hand = [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0, 0, 1]]
    assert torch.allclose(table, torch.tensor(by_hand, dtype=torch.float64))
    assert torch.allclose(label_augmentation("ols", labels, 3, p.float()), table[labels].float())


def test_rows_of_online_label_smoothing_sum_to_one():
    """Also where the classes differ in size, where A's rows do not."""
    labels = torch.arange(4).repeat_interleave(torch.tensor([95, 48, 10, 5]))
    p = (torch.randn(158, 4) + 3 * one_hot(labels, 4)).double().softmax(1)
    table = online_label_smoothing(p, labels)
    assert torch.allclose(table.sum(1), torch.ones(4, dtype=torch.float64))
    assert (table.argmax(1) == torch.arange(4)).all()
    # a classifier that knows everything gives the identity, and how many images a class has does not matter
    assert torch.equal(online_label_smoothing(one_hot(labels, 4), labels), torch.eye(4))
    same = torch.full((4, 4), 0.1) + 0.6 * torch.eye(4)
    of_each = online_label_smoothing(same, torch.arange(4))
    assert torch.allclose(online_label_smoothing(same[labels], labels), of_each)


def test_every_kind_of_label_is_a_distribution():
    labels, p = torch.randint(10, (50,)), torch.randn(50, 10).softmax(1)
    for how in softlabel_gan.LABELS:
        y = label_augmentation(how, labels, 10, p, 0.1)
        assert y.dtype == torch.float32 and torch.allclose(y.sum(1), torch.ones(50)) and (y >= 0).all()
        if how in ("onehot", "mixup", "cotrain"):
            assert torch.equal(y, one_hot(labels, 10))
    assert torch.equal(label_augmentation("soft", labels, 10, p), p)


def test_images_that_count_for_a_class():
    """One-hot labels: n_c. Smoothing: n_c too with 100 classes, and with 10: .1 / 10 is the threshold."""
    for K in (10, 100):
        labels = torch.randint(K, (500,))
        n_c = torch.bincount(labels, minlength=K)
        for how in ("onehot", "smooth"):
            y_hat = label_augmentation(how, labels, K, alpha=0.1)
            assert torch.equal(images_that_count(y_hat), n_c), (K, how)
    assert images_that_count(torch.tensor([[0.985, 0.011, 0.004], [0.02, 0.01, 0.97]])).tolist() == [2, 1, 1]


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size, width, base_G, each_G, base_D, each_D", [
    (32, 64, 4_273_667, 3_072, 4_204_801, 256), (64, 80, 17_285_604, 128, 30_532_721, 1_280),
    (128, 80, 49_200_804, 128, 60_034_482, 1_280), (256, 80, 57_460_004, 128, 67_842_802, 1_280),
])  # fmt: skip
def test_parameter_counts(size, width, base_G, each_G, base_D, each_D, monkeypatch):
    monkeypatch.setattr(softlabel_gan, "initialise", lambda *_, **__: None)  # orthogonal weights take seconds
    with torch.device("meta"):
        for K in (10, 176):
            assert count(Generator(size, width, K)) == base_G + each_G * K
            assert count(Discriminator(size, width, K)) == base_D + each_D * K


@pytest.mark.parametrize("size", softlabel_gan.CHANNELS)
def test_shapes_and_ranges(size):
    G, D = Generator(size, 8, 5), Discriminator(size, 8, 5)
    z, y = torch.randn(2, softlabel_gan.latent_size(size)), one_hot([0, 3], 5)
    x = G(z, y)
    assert x.shape == (2, 3, size, size) and x.abs().max() <= 1
    assert D(x, y)[0].shape == (2,) and D(x, y)[1] is None
    assert z.shape[1] == {16: 128, 32: 128, 64: 100, 128: 120, 256: 140}[size]


def test_blocks_by_hand():
    """The skip's 1 x 1 convolution before the upsampling and after the pooling: the same numbers."""
    x, code = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    up = softlabel_gan.GeneratorBlock(8, 16, 5, 1e-5).double()
    h = up.conv1(F.interpolate(F.relu(up.norm1(x, code)), scale_factor=2))
    h = up.conv2(F.relu(up.norm2(h, code))) + up.skip(F.interpolate(x, scale_factor=2))
    assert h.shape == (2, 16, 12, 12) and torch.allclose(up(x, code), h, rtol=0, atol=1e-12)
    for first in (True, False):
        block = softlabel_gan.DiscriminatorBlock(8, 16, first, down=True).double()
        h = block.conv2(F.relu(block.conv1(x if first else F.relu(x)))) + block.skip(x)
        assert torch.allclose(block(x), F.avg_pool2d(h, 2), rtol=0, atol=1e-12)
    block = softlabel_gan.DiscriminatorBlock(8, 8, first=False, down=False).double()
    assert torch.allclose(block(x), x + block.conv2(F.relu(block.conv1(F.relu(x)))), rtol=0, atol=1e-12)


def test_where_attention_is():
    """At 64 x 64 pixels: in the generator after that block, in the discriminator of 64 pixels nowhere."""

    def places(modules):
        return [i for i, m in enumerate(modules) if isinstance(m, softlabel_gan.Attention)]

    for size, in_G, in_D in ((32, [], []), (64, ["3"], []), (128, ["3"], [1]), (256, ["3"], [2])):
        assert list(Generator(size, 8, 2).attention) == in_G and places(Discriminator(size, 8, 2).phi) == in_D


def test_attention_by_hand():
    layer, x = softlabel_gan.Attention(16), torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x)  # gamma starts at 0
    with torch.no_grad():
        layer.gamma.fill_(0.5)
    q, k, v = layer.query(x), F.max_pool2d(layer.key(x), 2), F.max_pool2d(layer.value(x), 2)
    weights = torch.einsum("bcij,bckl->bijkl", q, k).flatten(3).softmax(3)
    h = torch.einsum("bijm,bcm->bcij", weights, v.flatten(2))
    assert torch.allclose(layer(x), x + 0.5 * layer.out(h), atol=1e-5)


def test_chunks_of_noise_reach_their_block_alone():
    G = Generator(64, 8, 3).eval()
    z, y, seen = torch.randn(1, 100), one_hot([1], 3), []
    G.first.register_forward_hook(lambda *a: seen.append(a[2]))
    for i, block in enumerate(G.blocks):
        block.register_forward_hook(lambda _, inputs, out, i=i: seen.append(inputs[1]))
    G(z, y)
    for part in range(5):  # part 0 for the first layer, the others for a block each
        changed, before = z.clone(), seen[-5:]
        changed[:, 20 * part : 20 * part + 20] += 1
        G(changed, y)
        moved = [not torch.equal(a, b) for a, b in zip(before, seen[-5:], strict=True)]
        assert moved == [i == part for i in range(5)]
        del seen[:-5]
        G(z, y)


@pytest.mark.parametrize("size", [32, 64])
def test_the_label_of_the_generator_acts(size):
    """Conditional batch norm without a table: the linear layers of a one-hot label, 1 + gain."""
    G = Generator(size, 8, 4)
    norm = G.blocks[0].norm1
    code = torch.randn(2, norm.gain.in_features)
    x = torch.randn(2, norm.norm.num_features, 4, 4)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    G.eval()  # spectral norm's vectors stay
    norm.norm.train()
    gain, shift = (layer(code)[..., None, None] for layer in (norm.gain, norm.shift))
    expected = (x - mean) / (var + norm.norm.eps).sqrt() * (1 + gain) + shift
    assert torch.allclose(norm(x, code), expected, atol=1e-5)
    assert norm.norm.eps == (1e-5 if size == 32 else 1e-4)
    z = torch.randn(1, softlabel_gan.latent_size(size)).expand(2, -1)
    a, b = G(z, one_hot([0, 1], 4))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("size", [32, 64])
def test_what_has_spectral_norm(size):
    """Every layer with a matrix but, up to 32 pixels, the conditional batch norms'; above, the embedding."""
    G, D = Generator(size, 8, 4), Discriminator(size, 8, 4)
    without = {name for network in (G, D) for name, m in network.named_modules()
               if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and not hasattr(m, "parametrizations")}
    by_code = {f"blocks.{i}.{norm}.{layer}"
               for i in range(3) for norm in ("norm1", "norm2") for layer in ("gain", "shift")}
    assert without == (by_code if size == 32 else {"shared"})
    for _ in range(100):  # the power method converges
        D.V(torch.zeros(1, 4))
    assert torch.linalg.matrix_norm(D.V.weight, 2).item() == pytest.approx(1, abs=1e-3)
    before = D.V.parametrizations.weight[0]._u.clone()
    D.eval()(torch.zeros(1, 3, size, size), torch.zeros(1, 4))
    assert torch.equal(before, D.V.parametrizations.weight[0]._u)


@pytest.fixture
def critic():
    """A discriminator in eval mode, and images."""
    return Discriminator(16, 4, 6).eval(), torch.rand(5, 3, 16, 16) * 2 - 1


def test_a_one_hot_label_picks_a_column_of_V(critic):
    D, x = critic
    phi, labels = D.phi(x).sum((2, 3)), torch.tensor([0, 5, 2, 2, 3])
    by_table = (phi * F.embedding(labels, D.V.weight.T)).sum(1) + D.psi(phi)[:, 0]
    assert torch.allclose(D(x, one_hot(labels, 6))[0], by_table, atol=1e-5)
    assert D.V.bias is None and torch.allclose(D(x, torch.zeros(5, 6))[0], D.psi(phi)[:, 0], atol=1e-6)


def test_the_score_is_the_mean_of_the_classes_scores(critic):
    D, x = critic
    y = torch.randn(5, 6).softmax(1)
    of_class = torch.stack([D(x, one_hot([k] * 5, 6))[0] for k in range(6)], 1)
    assert of_class.std(1).min() > 1e-3  # or the next line would hold for anything
    assert torch.allclose(D(x, y)[0], (y * of_class).sum(1), atol=1e-5)
    assert torch.allclose(D(x, torch.full((5, 6), 1 / 6))[0], of_class.mean(1), atol=1e-5)


def test_the_discriminator_of_adc_gan():
    """Its score has no label; its head has spectral norm, and a row and a bias for each of 2 K classes."""
    D, x = Discriminator(16, 4, 6, adc=True), torch.rand(3, 3, 16, 16)
    D.eval()
    phi = D.phi(x).sum((2, 3))
    for y in (one_hot([0, 1, 2], 6), torch.randn(3, 6)):
        score, logits = D(x, y)
        assert torch.allclose(score, D.psi(phi)[:, 0]) and torch.allclose(logits, D.class_head(phi))
    assert logits.shape == (3, 12) and hasattr(D.class_head, "parametrizations")
    assert count(D) - count(Discriminator(16, 4, 6)) == (16 + 1) * 12 - 16 * 6
    score.sum().backward()
    assert D.class_head.bias.grad is None and D.psi.bias.grad == 3


# ----------------------------------------------------------------------------------------- the data


def test_oversampling():
    """alpha 0: as in the data; 1: each class as often; between, between. Images of a class equally often."""
    counts = torch.tensor([60, 30, 10])
    images, labels = torch.zeros(100, 3, 8, 8, dtype=torch.uint8), torch.arange(3).repeat_interleave(counts)
    data = ImageSet(images, labels, list("abc"))
    for alpha in (0.0, 0.4, 1.0):
        _, index = next(Batches(data, 40_000, alpha, targets=torch.arange(100)))
        share = torch.bincount(data.labels[index], minlength=3) / 40_000
        assert torch.allclose(share, (1 - alpha) * counts / 100 + alpha / 3, atol=0.01)
        tail = torch.bincount(index, minlength=100)[90:]
        assert scipy.stats.chisquare(tail.numpy()).pvalue > 0.001


def test_batches_yield_targets_in_the_place_of_labels():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 3, 8, 8)
    data = ImageSet(images, torch.zeros(7).long(), ["a"])
    targets = torch.arange(7).float()[:, None] * torch.ones(1, 4)
    x, y = next(Batches(data, 7, targets=targets))
    assert torch.allclose((x[:, 0, 0, 0] + 1) * 127.5, y[:, 2]) and y.shape == (7, 4)


@pytest.mark.parametrize("name, smallest, total", [("cifar10imb", 65, 5000), ("cifar10imb-90", 90, 6900),
                                                   ("cifar10imb-120", 120, 9150)])
def test_smallest_classes_of_figure_5(name, smallest, total):
    """A's recipe: a log-normal distribution (shape 3) in ten bins from 0 to 3; frog smallest, dog largest."""
    bins = np.floor(total * np.diff(scipy.stats.lognorm.cdf(np.linspace(0, 3, 11), 3)))
    counts = datasets.softlabel_gan_counts(10, smallest)
    assert sorted(counts.tolist(), reverse=True) == bins.tolist() and counts.min() == smallest
    assert counts.argmin() == 6 and counts.argmax() == 5
    assert softlabel_gan.parse_settings(["--dataset", name]).run_dir == f"runs/softlabel_gan-{name}-s0"
    assert classifier.balanced(name) == "cifar10"


# ----------------------------------------------------------------------------------------- the loop


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64: rounding is far below Adam's eps, and two ways to a step agree anywhere."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def augment_one_by_one(x, policy):
    """DiffAugment, an image at a time. The numbers are drawn for all images first, in this order."""
    B, R = len(x), x.shape[-1]
    if "color" in policy:
        brightness, saturation, contrast = torch.rand(B) - 0.5, 2 * torch.rand(B), torch.rand(B) + 0.5
    if "translation" in policy:
        up, to_the_left = torch.randint(2 * R // 8 + 1, (2, B)) - R // 8
    if "cutout" in policy:
        centre = torch.randint(R + 1, (2, B))
    images = []
    for b, image in enumerate(x):
        if "color" in policy:
            image = image + brightness[b]
            grey = image.sum(0) / 3
            image = saturation[b] * image + (1 - saturation[b]) * grey
            image = contrast[b] * image + (1 - contrast[b]) * image.mean()
        if "translation" in policy:
            for dim, by in ((1, -int(up[b])), (2, -int(to_the_left[b]))):
                came_from = torch.arange(R) - by
                outside = (came_from < 0) | (came_from >= R)
                image = torch.roll(image, by, dim).index_fill(dim, outside.nonzero()[:, 0], 0)
        if "cutout" in policy:
            (top, left), hole = (max(0, int(c) - R // 4) for c in centre[:, b]), torch.zeros(R, R)
            bottom, right = (int(c) + R // 4 for c in centre[:, b])
            hole[top:bottom, left:right] = 1
            image = image - image * hole
        images.append(image)
    return torch.stack(images)


def linear_classifier(dataset, num_classes, image_size, device):
    """In the place of the ResNet of co-training."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * image_size**2, num_classes))
    return network, torch.optim.SGD(network.parameters(), 0.1, 0.9)


LOOPS = {  # what differs between the kinds of labels; the last two columns are flags
    "soft": ("color,translation,cutout", 0.0, True),
    "onehot": ("translation,cutout", 0.7, True),
    "smooth": ("color", 0.0, False),
    "ols": ("color,translation", 0.0, True),
    "mixup": ("color,translation,cutout", 0.0, True),
    "cotrain": ("cutout", 0.0, True),
    "soft adc": ("color,translation", 0.0, True),
    "smooth adc": ("translation", 0.0, True),
}
LOOP_FLAGS = ["--width", "2", "--discriminator-width", "3", "--batch-size", "6", "--d-steps", "2",
              "--steps", "4", "--ema", "0.7", "--ema-start", "2", "--lr", "0.002", "--lr-d", "0.005",
              "--seed", "5", "--sample-every", "0", "--eval-images", "0", "--amp", "off", "--device", "cpu"]


@pytest.mark.parametrize("kind", LOOPS)
def test_the_loop_is_the_papers(kind, tmp_path, monkeypatch, float64):
    """Four steps of main() against the same steps written here, from the same random numbers: labels image
    by image, Eqs 2 and 3, plain autograd and Adam, the average from step 2 on. The networks are main's."""
    policy, oversample, flip = LOOPS[kind]
    how, _, adc = kind.partition(" ")
    B, K, smoothing = 6, 10, 0.3
    train = datasets.load("shapeslt", "data", "train", 16, 26.5)
    p = (torch.randn(len(train.labels), K) + one_hot(train.labels, K)).softmax(1)  # right on some, not on all
    monkeypatch.setattr(softlabel_gan, "labels_by_classifier", lambda *_: p)
    monkeypatch.setattr(softlabel_gan, "build_soft_classifier", linear_classifier)
    flags = [*LOOP_FLAGS, "--labels", how, "--diffaug", policy, "--oversample", str(oversample)]
    flags += ["--flip" if flip else "--no-flip"]
    flags += ["--smoothing", str(smoothing)] if how == "smooth" else []
    flags += ["--conditioning", "adc"] if adc else []
    softlabel_gan.main(["--dataset", "shapeslt", *flags, "--run-dir", str(tmp_path)])

    torch.manual_seed(5)
    G, D = Generator(16, 2, K), Discriminator(16, 3, K, bool(adc))
    averaged = {name: w.clone() for name, w in G.state_dict().items()}
    C, optimizer_C = linear_classifier("", K, 16, "cpu") if how == "cotrain" else (None, None)
    optimizer_G = torch.optim.Adam(G.parameters(), lr=0.002, betas=(0.0, 0.999), eps=1e-8)
    optimizer_D = torch.optim.Adam(D.parameters(), lr=0.005, betas=(0.0, 0.999), eps=1e-8)
    numbers = torch.arange(len(train.labels))
    batches = Batches(train, 2 * B, oversample or "data", flip=flip, seed=5, targets=numbers)

    def told(n):
        """(K,): what D is told of training image n."""
        own = train.labels[n]
        if how == "soft":
            return p[n]
        if how == "ols":
            seen = [p[m] for m in numbers[train.labels == own] if p[m].argmax() == own]
            return torch.stack(seen).mean(0)
        alpha = smoothing if how == "smooth" else 0
        return torch.tensor([(1 - alpha) * (k == own) + alpha / K for k in range(K)])

    def fake_inputs():
        z, classes = torch.randn(B, 128), torch.randint(K, (B,))
        return z, torch.eye(K)[classes]

    rows = []
    for step in range(4):
        x_all, which = next(batches)
        y_all = torch.stack([told(n) for n in which])
        if how == "mixup":
            lam = torch.distributions.Beta(0.2, 0.2).sample()
            partner = torch.randperm(2 * B)
            x_all = torch.stack([lam * x_all[i] + (1 - lam) * x_all[partner[i]] for i in range(2 * B)])
            y_all = torch.stack([lam * y_all[i] + (1 - lam) * y_all[partner[i]] for i in range(2 * B)])
        L_C = torch.zeros(())
        for k in range(2):
            x_r, y_r = x_all[k * B : k * B + B], y_all[k * B : k * B + B]
            if how == "cotrain":
                q = C(x_r).softmax(1)
                entropy = -(q * q.log()).sum(1)
                L_C = (-(q * y_r).sum(1).log() - 0.3 * entropy).mean()
                optimizer_C.zero_grad()
                L_C.backward()
                optimizer_C.step()
                y_r = q.detach()
            z, y_f = fake_inputs()
            x_f = G(z, y_f).detach()
            both = augment_one_by_one(torch.cat([x_r, x_f]), policy)
            scores, logits = D(both, torch.cat([y_r, y_f]))  # one pass: one step of the power method
            hinges = [(1 - s).clamp(min=0) for s in scores[:B]] + [(1 + s).clamp(min=0) for s in scores[B:]]
            L_D = sum(hinges) / B
            if adc:  # real images: classes 0 .. K - 1 of the head; fakes: K .. 2 K - 1
                log_q = logits - logits.exp().sum(1, keepdim=True).log()
                L_D = L_D - ((y_r * log_q[:B, :K]).sum() + (y_f * log_q[B:, K:]).sum()) / B
            optimizer_D.zero_grad()
            L_D.backward()
            optimizer_D.step()
        z, y_f = fake_inputs()
        s, logits = D(augment_one_by_one(G(z, y_f), policy), y_f)
        L_G = -s.mean()
        if adc:
            log_q = logits - logits.exp().sum(1, keepdim=True).log()
            L_G = L_G + (-(y_f * log_q[:, :K]).sum() + (y_f * log_q[:, K:]).sum()) / B
        optimizer_G.zero_grad()
        L_G.backward()
        optimizer_G.step()
        rows.append([L_D.item(), L_G.item(), L_C.item(), scores[:B].mean().item(), scores[B:].mean().item()])
        for name, w in G.state_dict().items():
            moves = w.is_floating_point() and not name.endswith(("._u", "._v")) and step >= 2
            averaged[name] = 0.7 * averaged[name] + 0.3 * w if moves else w.clone()

    found = state_of(tmp_path)
    expected = {"G": G.state_dict(), "D": D.state_dict(), "ema": averaged}
    expected |= {"C": C.state_dict()} if C else {}
    for part, tensors in expected.items():
        assert tensors.keys() == found[part].keys()
        for name, w in tensors.items():
            message = functools.partial("{}.{}: {}".format, part, name)
            torch.testing.assert_close(found[part][name], w, rtol=1e-7, atol=1e-9, msg=message)
    row = log_of(tmp_path)[-1]
    means = dict(zip(("L_D", "L_G", "L_C", "D_real", "D_fake"), np.mean(rows, 0), strict=True))
    assert {k: row[k] for k in means} == pytest.approx(means) and row["images"] == 4 * 2 * B
    # The hinge has bitten, on real images or fakes, or the loss would be 2 - D_real + D_fake.
    assert any(abs(r[0] - (2 - r[3] + r[4])) > 1e-3 for r in rows) or how in ("smooth", "cotrain")
    assert (averaged["first.bias"] - G.first.bias).abs().max() > 1e-4


# ------------------------------------------------------------------------ TRY: places to experiment


def test_try_classes_that_lend_each_other_half_as_much():
    line = "y = p  # y_hat = C(x). TRY: (y + p) / 2"
    other = edited("softlabel_gan.py", (line, "y = (y + p) / 2  # was p"))
    labels, p = torch.randint(4, (50,)), torch.randn(50, 4).double().softmax(1)
    own, half = one_hot(labels, 4).bool(), other.label_augmentation("soft", labels, 4, p)
    lent = label_augmentation("soft", labels, 4, p).masked_fill(own, 0)
    assert torch.allclose(half.masked_fill(own, 0), lent / 2)
    assert torch.allclose(half.sum(1), torch.ones(50))


def test_try_a_loss_without_a_margin():
    """ln 2 each at a score of 0, as in Goodfellow et al. 2014; the gradient does not end at a margin."""
    other = edited("softlabel_gan.py", ("return F.relu(1 - D_real).mean() + F.relu(1 + D_fake).mean()",
                    "return F.softplus(-D_real).mean() + F.softplus(D_fake).mean()"))
    line = "# TRY: F.softplus(-D_real).mean() + F.softplus(D_fake).mean()"
    assert line in (ROOT / "softlabel_gan.py").read_text()
    zero = torch.zeros(2)
    assert other.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    for module, still_moves in ((other, True), (softlabel_gan, False)):
        D_real, D_fake = (torch.full((2,), s, requires_grad=True) for s in (3.0, -3.0))
        module.discriminator_loss(D_real, D_fake).backward()
        assert (D_real.grad < 0).all() == (D_fake.grad > 0).all() == still_moves


def test_try_less_noise_for_samples_more_alike():
    other = edited("softlabel_gan.py", ("return torch.randn(n, d_z, generator=generator)  # TRY: 0.5 * this:",
                    "return 0.5 * torch.randn(n, d_z, generator=generator)  # was 1 *"))
    G, y = Generator(16, 8, 3).eval(), one_hot([1] * 100, 3)
    spread = [G(m.latents(100, 128, 0, 0), y).std(0).mean().item() for m in (softlabel_gan, other)]
    assert spread[1] < 0.75 * spread[0]


def test_try_samples_of_the_last_step(tmp_path):
    line = "average.update(args.ema if done > args.ema_start else 0)"
    assert "# TRY: update(0)" in (ROOT / "softlabel_gan.py").read_text()
    run = [*TINY, "--labels", "onehot", "--ema-start", "0", "--run-dir"]
    softlabel_gan.main([*run, str(tmp_path / "a")])
    edited("softlabel_gan.py", (line, "average.update(0)")).main([*run, str(tmp_path / "b")])
    averaged, copied = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    assert all(torch.equal(copied["ema"][k], w) for k, w in copied["G"].items())
    assert all(torch.equal(copied["G"][k], w) for k, w in averaged["G"].items())  # training is the same
    assert not torch.equal(averaged["ema"]["first.bias"], averaged["G"]["first.bias"])


# --------------------------------------------------------------------------------------------- runs


TINY = ["--dataset", "shapeslt", "--rho", "100", "--width", "2", "--discriminator-width", "2",
        "--batch-size", "8", "--steps", "3", "--sample-every", "0", "--eval-images", "0", "--device", "cpu"]
AUGMENTED = ["--diffaug", "color,translation,cutout"]


@pytest.fixture(scope="module")
def annotator(judges):
    """A classifier of an epoch, which labels and scores."""
    return judges.loop


@pytest.fixture(scope="module")
def labelled(annotator, tmp_path_factory):
    """labelled(run_dir): flags for a run whose soft labels are there already. Labelling takes a second."""
    first = tmp_path_factory.mktemp("labelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "draw_shapes", DRAWN_ONCE)
        softlabel_gan.main([*TINY, "--classifier", annotator, "--steps", "1", "--run-dir", str(first)])

    def flags(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(first / "soft_labels.npz", run_dir)
        return ["--classifier", annotator, "--run-dir", str(run_dir)]

    return flags


@pytest.mark.parametrize("flags", [
    "--labels onehot", "--labels soft", "--labels smooth --smoothing 0.2", "--labels ols", "--labels mixup",
    "--labels cotrain", "--labels onehot --oversample 1", "--labels soft --oversample 0.5",
    "--labels onehot --diffaug translation,cutout --d-steps 4", "--labels smooth --no-flip --amp off",
    "--labels onehot --conditioning adc", "--labels mixup --conditioning adc --amp bf16",
])  # fmt: skip
def test_each_kind_of_labels_trains(flags, labelled, tmp_path):
    flags = flags.split()
    where = labelled(tmp_path) if {"soft", "ols"} & set(flags) else ["--run-dir", str(tmp_path)]
    softlabel_gan.main([*TINY, *AUGMENTED, "--sample-every", "3", *flags, *where])
    row = log_of(tmp_path)[-1]
    assert all(math.isfinite(row[k]) for k in softlabel_gan.LOGGED)
    assert (row["L_C"] != 0) == ("cotrain" in flags)
    assert row["images"] == 3 * 8 * (4 if "--d-steps" in flags else 1)
    assert (tmp_path / "samples" / "step-0000003.png").exists()


@pytest.mark.parametrize("labels", ["soft", "mixup", "cotrain", "soft adc"])
def test_a_stopped_run_continues_bit_for_bit(labels, labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "LOG_EVERY", 4)
    labels, _, adc = labels.partition(" ")
    common = [*TINY, *AUGMENTED, "--labels", labels, "--steps", "11", "--d-steps", "2", "--ema-start", "3"]
    common += ["--conditioning", "adc"] if adc else []
    runs = {name: tmp_path / name for name in ("whole", "stopped")}
    for name, run_dir in runs.items():
        where = labelled(run_dir) if labels == "soft" else ["--run-dir", str(run_dir)]
        runs[name] = [*common, *where]
    softlabel_gan.main(runs["whole"])
    calls, loss = [], softlabel_gan.generator_loss

    def terminate(scores):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(scores)

    monkeypatch.setattr(softlabel_gan, "generator_loss", terminate)
    with pytest.raises(SystemExit) as caught:
        softlabel_gan.main(runs["stopped"])
    assert caught.value.code == 128 + signal.SIGTERM and state_of(tmp_path / "stopped")["step"] == 6
    softlabel_gan.main(runs["stopped"])
    assert "resumed at step 6" in capsys.readouterr().out
    assert len(calls) == 11 and same_state(tmp_path / "whole", tmp_path / "stopped")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    assert [row["step"] for row in log_of(tmp_path / "stopped")] == [4, 8, 11]


def test_soft_labels_reach_only_real_images_and_fakes_are_uniform(annotator, labelled, tmp_path, monkeypatch):
    """What each network is told: G and the fakes one-hot labels, each class as often; real images C's."""
    told = types.SimpleNamespace(G=[], D=[])
    for kind in (Generator, Discriminator):
        name, forward = kind.__name__[0], kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, y, name=name, forward=forward: (
            getattr(told, name).append(y.clone()) if self.training else None, forward(self, x, y))[1])
    softlabel_gan.main([*TINY, *labelled(tmp_path), "--batch-size", "100", "--steps", "20"])
    real = torch.cat([y[:100] for y in told.D if len(y) == 200])
    fake = torch.cat([y[100:] if len(y) == 200 else y for y in told.D])
    assert len(told.D) == len(told.G) == 40 and len(real) == 2000 and len(fake) == 4000
    for y in (fake, torch.cat(told.G)):
        assert torch.equal(y, one_hot(y.argmax(1), 10))
        assert scipy.stats.chisquare(y.sum(0).numpy()).pvalue > 0.001
    stored = torch.from_numpy(np.load(tmp_path / "soft_labels.npz")["probabilities"])
    known = {tuple(row) for row in stored.tolist()}
    assert all(tuple(row) in known for row in real.tolist()) and (real.amax(1) < 0.999).any()
    train = datasets.load("shapeslt", "data")
    C = classifier.load_classifier(annotator)
    p = C(train.images[::100] / 127.5 - 1).softmax(1)  # of clean images: neither mirrored nor augmented
    assert torch.allclose(stored[::100], p, atol=1e-5)


def test_labels_are_computed_once_and_kept(annotator, labelled, tmp_path, monkeypatch):
    run, here = [*TINY, *labelled(tmp_path)], ["--run-dir", str(tmp_path)]
    softlabel_gan.main(run)
    counted = json.loads((tmp_path / "config.json").read_text())["images_that_count"]
    stored = np.load(tmp_path / "soft_labels.npz", allow_pickle=False)["probabilities"].astype(np.float64)
    assert counted == (stored > 0.01).sum(0).tolist()
    # without the classifier the run resumes; with another it does not
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "frozen_classifier", lambda *_, **__: pytest.fail("asked again"))
        softlabel_gan.main([*TINY, "--steps", "4", *here])
    assert state_of(tmp_path)["step"] == 4
    other = torch.load(annotator, weights_only=True)
    other["weights"]["conv.weight"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match="another classifier"):
        softlabel_gan.main([*run, "--classifier", str(tmp_path / "other.pt"), "--steps", "5"])
    (tmp_path / "soft_labels.npz").unlink()
    with pytest.raises(InputError, match="other labels"):
        softlabel_gan.main([*run, "--classifier", str(tmp_path / "other.pt"), "--steps", "5"])
    (tmp_path / "soft_labels.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="soft_labels.npz is damaged"):
        softlabel_gan.main([*run, "--steps", "5"])
    assert state_of(tmp_path)["step"] == 4


def test_a_whole_run_leaves_everything_it_promises(annotator, labelled, tmp_path, monkeypatch):
    shown, write_grid = {}, datasets.write_grid
    monkeypatch.setattr(datasets, "write_grid",
                        lambda path, x: (shown.update({path.name: x}), write_grid(path, x)))
    small = [*TINY, *labelled(tmp_path), "--steps", "4", "--sample-every", "2", "--eval-images", "65",
             "--ema-start", "0", "--features", f"classifier:{annotator}", "--amp", "off"]
    softlabel_gan.main(small)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["steps"] == 4 and config["torch"] == torch.__version__
    assert config["parameters"] == [count(Generator(16, 2, 10)), count(Discriminator(16, 2, 10))]
    pictures = ["borrowed.png", "step-0000002.png", "step-0000004.png"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == pictures
    with Image.open(tmp_path / "samples" / "step-0000004.png") as grid:
        assert grid.width == grid.height
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert samples["images"].shape == (65, 16, 16, 3) and samples["images"].dtype == np.uint8
        assert np.bincount(samples["labels"]).tolist() == [7] * 5 + [6] * 5
        images, labels = samples["images"], samples["labels"]

    # Both are of the averaged generator in eval mode, with noise of their own; a column has the same.
    def samples_of(part, kind, n, labels):
        G = Generator(16, 2, 10).eval()
        G.load_state_dict(state_of(tmp_path)[part])
        G.to(memory_format=torch.channels_last)  # as in main(): another layout rounds otherwise
        with torch.no_grad():
            x = G(torch.randn(n, 128, generator=torch.Generator().manual_seed(
                datasets.seed_from(kind, 0))).repeat(len(labels) // n, 1), one_hot(labels, 10))
        return ((x + 1) * 127.5).round().to(torch.uint8)

    assert np.array_equal(images, samples_of("ema", 1, 65, labels).permute(0, 2, 3, 1).numpy())
    assert not np.array_equal(images, samples_of("G", 1, 65, labels).permute(0, 2, 3, 1).numpy())
    head_to_tail = torch.arange(10).repeat_interleave(10)  # of the shapes, the first class is the largest
    assert torch.equal(shown["step-0000004.png"], samples_of("ema", 0, 10, head_to_tail))

    scores = json.loads((tmp_path / "metrics.json").read_text())
    assert scores["protocol"]["step"] == 4 and scores["all"]["fd"] > 0
    with open(tmp_path / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["images_that_count"]) for row in rows] == config["images_that_count"]
    before = (tmp_path / "checkpoint.pt").read_bytes()
    softlabel_gan.main([*small, "--eval-only", "--sample-seed", "1"])
    with np.load(tmp_path / "sample-seed-1" / "samples.npz", allow_pickle=False) as samples:
        assert not np.array_equal(samples["images"], images)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores


def test_picture_of_borrowed_images(tmp_path, monkeypatch):
    """Fig. 2: of other classes, those that count most, the most first; white where fewer than a row count."""
    shown = []
    monkeypatch.setattr(datasets, "write_grid", lambda path, images: shown.append(images))
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).repeat(1, 3, 8, 8)
    train = ImageSet(images, torch.tensor([0, 0, 0, 1, 1, 1]), ["a", "b"])
    y_hat = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.995, 0.005], [0.0, 1.0], [0.02, 0.98], [0.01, 0.99]])
    softlabel_gan.draw_borrowed(tmp_path / "x.png", train, y_hat, torch.tensor([0, 1]))
    assert shown[0][:, 0, 0, 0].tolist() == [4] + [255] * 9 + [1, 0] + [255] * 8


def folder(where, *counts):
    """PATH/train with this many images in each class."""
    for c, n in enumerate(counts):
        (where / "train" / str(c)).mkdir(parents=True)
        for i in range(n):
            picture = Image.fromarray(np.full((16, 16, 3), 60 * c + i, np.uint8))
            picture.save(where / "train" / str(c) / f"{i}.png")
    return ["--dataset", f"folder:{where}", "--image-size", "16", "--data-dir", str(where / "data")]


def test_a_class_that_the_labels_forget_is_named(tmp_path, capsys, monkeypatch):
    """Two classes, one of a single image; also: its distance has no covariance, and is left out."""
    monkeypatch.chdir(tmp_path)
    run = [*TINY[4:], *folder(tmp_path / "mine", 11, 1)]  # two of the eleven are held out
    classifier.main([*run[-6:], "--soft-labels", "--epochs", "1", "--run-dir", "c"])
    shown = datasets.load(run[-5], run[-1], "train", 16).fingerprint
    (tmp_path / "run").mkdir()
    p = np.float32([[0.98, 0.02]] * 10)
    np.savez("run/soft_labels.npz", probabilities=p, training_data=shown, classifier="")
    scored = ["--features", "classifier:c/classifier.pt", "--eval-images", "4"]
    softlabel_gan.main([*run, *scored, "--run-dir", "run"])
    said = capsys.readouterr()
    assert "gives 1 less than a quarter" in said.err and "90.0% of the labelled images" in said.out
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert scores["per_class"][1]["fd"] is None and scores["per_class"][0]["fd"] > 0
    assert scores["all"]["fd"] > 0
    assert [row["images_that_count"] for row in scores["per_class"]] == [10, 10]


def test_a_step_of_imbalance(tmp_path):
    run = [*TINY, "--labels", "onehot", "--steps", "1", "--imbalance", "step", "--run-dir", str(tmp_path)]
    softlabel_gan.main(run)
    train = datasets.load("shapeslt", "data", rho=100, imbalance="step")
    assert state_of(tmp_path)["settings"]["training_data"] == train.fingerprint


def test_larger_networks_have_another_eps_in_adam(tmp_path):
    """1e-8 up to 32 pixels, 1e-6 above, as in A."""
    for size, eps in ((16, 1e-8), (64, 1e-6)):
        run = [*TINY, "--labels", "onehot", "--image-size", str(size), "--batch-size", "2", "--steps", "1"]
        softlabel_gan.main([*run, "--run-dir", str(tmp_path / str(size))])
        state = state_of(tmp_path / str(size))
        assert state["optimizer_G"]["param_groups"][0]["eps"] == eps
        assert state["optimizer_D"]["param_groups"][0]["eps"] == eps


def test_one_class_is_refused(tmp_path):
    run = [*TINY[4:], *folder(tmp_path / "mine", 4), "--labels", "onehot", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="has one class"):
        softlabel_gan.main(run)


# --------------------------------------------------------------------------- a folder of your own, --export


def test_settings_follow_from_the_folder(tmp_path):
    np.savez(tmp_path / "folder-x-train-64.npz", labels=np.zeros(200, int), classes=["a", "b"])
    folder = ["--dataset", "folder:x", "--data-dir", str(tmp_path), "--image-size"]
    a = softlabel_gan.parse_settings([*folder, "64"])  # 200 * 4950 / 32 = 30,937.5
    assert (a.recipe, a.steps, a.eval_images, a.sample_every) == ("folder", 30_900, 500, 1545)
    assert (a.image_size, a.batch_size, a.d_steps, a.lr, a.width) == (64, 32, 1, 1e-4, 16)
    b = softlabel_gan.parse_settings([*folder, "16"])
    assert (b.image_size, b.lr, b.width, b.diffaug) == (16, 2e-4, 32, "color,translation,cutout")
    paper = softlabel_gan.parse_settings([*folder, "64", "--recipe", "paper"])
    assert (paper.steps, paper.width, paper.batch_size) == (28_300, 80, 512)
    assert softlabel_gan.parse_settings(["--dataset", "cifar10imb"]).recipe == "paper"


def test_pictures_of_classes_and_of_a_mixture(tmp_path):
    """Those of G with these labels, rounded; a mixture lies between its classes, and is none of them."""
    run = [*TINY, "--labels", "onehot", "--amp", "off", "--lr", "0.01", "--run-dir", str(tmp_path / "run")]
    softlabel_gan.main(run)
    pictures = [*run, "--eval-only", "--export", str(tmp_path / "pictures"), "--per-class", "3"]
    softlabel_gan.main([*pictures, "--classes", "star,disc"])
    softlabel_gan.main([*pictures, "--soft-label", "star:0.75,disc:0.25"])
    where = tmp_path / "pictures"
    assert sorted(f.name for f in where.iterdir()) == ["disc", "export.json", "star", "star 0.75 disc 0.25"]
    state = state_of(tmp_path / "run")
    G = Generator(16, state["settings"]["width"], 10).eval()
    G.load_state_dict(state["ema"])
    star, disc = F.one_hot(torch.tensor([5, 0]), 10).float()
    labels = {"star": (5, star), "disc": (0, disc), "star 0.75 disc 0.25": (10, 0.75 * star + 0.25 * disc)}
    n = datasets.images_at_once(datasets.EXPORT_AT_ONCE, 16)
    for name, (k, y) in labels.items():
        seed = datasets.seed_from(softlabel_gan.EXPORT, datasets.seed_from(0, k, 0))
        z = torch.randn(n, 128, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            x = ((G(z[:3], y.expand(3, 10)) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        files = sorted((where / name).iterdir())
        assert [f.name for f in files] == ["00001.png", "00002.png", "00003.png"]
        for image, file in zip(x, files, strict=True):
            assert np.abs(image - np.asarray(Image.open(file), dtype=float)).max() < 0.51
    for flags, message in ((["--soft-label", "star:0.5,disc:0.6"], "sum to 1"),
                           (["--soft-label", "star:1.5,disc:-0.5"], "sum to 1"),
                           (["--soft-label", "star"], "sum to 1"),
                           (["--soft-label", "stare:1"], "'stare'; there are star"),
                           (["--soft-label", "star:1", "--classes", "disc"], "in place of")):
        with pytest.raises(InputError, match=message):
            softlabel_gan.main([*pictures, *flags])
    with pytest.raises(InputError, match="for --export"):
        softlabel_gan.main([*run, "--soft-label", "star:1"])
    assert len(list(where.iterdir())) == 4


# ------------------------------------------------------------------------------ settings and errors


def test_defaults_are_the_papers():
    args = softlabel_gan.parse_settings([])
    assert (args.dataset, args.labels, args.diffaug) == ("cifar10imb", "soft", "color,translation,cutout")
    assert (args.batch_size, args.lr, args.lr_d, args.d_steps) == (128, 2e-4, 2e-4, 4)
    assert args.eval_images == 10_000
    for size, batch in ((64, 512), (128, 32)):
        args = softlabel_gan.parse_settings(["--dataset", "folder:x", "--recipe", "paper", "--image-size",
                                             str(size)])
        assert (args.batch_size, args.lr, args.lr_d, args.width) == (batch, 1e-4, 4e-4, 80)
    named = softlabel_gan.parse_settings(["--dataset", "cifar10imb"]).run_dir
    assert named == "runs/softlabel_gan-cifar10imb-s0"
    named = softlabel_gan.parse_settings(["--labels", "smooth", "--diffaug", "", "--seed", "2"]).run_dir
    assert named == "runs/softlabel_gan-cifar10imb-labelssmooth-diffaug-s2"
    flowers = [softlabel_gan.parse_settings(["--dataset", "flowers102", "--image-size", size]).run_dir
               for size in ("64", "128")]  # Tables 3 and 2
    assert flowers == [f"runs/softlabel_gan-flowers102-imagesize{size}-s0" for size in (64, 128)]


@pytest.mark.parametrize("flags", [
    ["--steps", "0"], ["--d-steps", "0"], ["--batch-size", "-3"], ["--lr", "nan"], ["--lr-d", "0"],
    ["--ema", "1"], ["--ema-start", "-1"], ["--discriminator-width", "0"], ["--sample-seed", "-1"],
    ["--width", "0"], ["--image-size", "17"], ["--save-every", "0"], ["--eval-images", "-1"],
    ["--rho", "0.5"],
    ["--seed", "-1"], ["--oversample", "1.5"], ["--smoothing", "-0.1"], ["--diffaug", "colour"],
    ["--labels", "hard"],
    ["--classifier", "nowhere.pt"], ["--features", "classifier:nowhere.pt"], ["--dataset", "cifar10imb-50"],
    ["--labels", "soft", "--smoothing", "0.3"], ["--features", "classifier:"], ["--eval-images", "1"],
    ["--minimum-class", "65"], ["--labels", "onehot", "--classifier", __file__], ["--eval-only"],
])  # fmt: skip
def test_senseless_input_is_refused_by_name(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        softlabel_gan.main([*TINY, *flags])
    assert "\n" not in str(error.value) and len(str(error.value)) > 10
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_another_configuration_in_the_directory(tmp_path):
    run = [*TINY, "--labels", "onehot", "--run-dir", str(tmp_path / "run")]
    softlabel_gan.main(run)
    with pytest.raises(InputError, match="--labels onehot there, smooth now"):
        softlabel_gan.main([*run, "--labels", "smooth"])
    kept = tmp_path / "run" / "checkpoint.pt"
    for damaged in (b"PK damaged", None):
        if damaged:
            kept.write_bytes(damaged)
        else:  # no checkpoint of a run
            torch.save({"weights": torch.ones(2)}, kept)
        before = kept.read_bytes()
        with pytest.raises(InputError, match="checkpoint.pt is damaged"):
            softlabel_gan.main(run)
        assert kept.read_bytes() == before


def test_a_checkpoint_of_the_first_version_is_refused(tmp_path):
    """Its keys are others: named in one line, never misread, and left alone."""
    run = [*TINY, "--labels", "onehot", "--run-dir", str(tmp_path)]
    softlabel_gan.main(run)
    state = state_of(tmp_path)
    log, rng = state.pop("log"), state.pop("rng")["cpu"]
    state |= {"sums": log["sums"], "logged": log["added"], "rng": rng}
    state["settings"]["minimum_class"] = None
    torch.save(state, tmp_path / "checkpoint.pt")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for flags in ([], ["--steps", "5"], ["--eval-only", "--eval-images", "9"]):
        with pytest.raises(InputError, match="another version of this script") as error:
            softlabel_gan.main([*run, *flags])
        assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_errors_are_one_line_and_status_two(tmp_path, run_script):
    done = run_script("softlabel_gan.py", "--dataset", "shapslt", cwd=tmp_path)
    assert done.returncode == 2 and "shapeslt" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run = [*TINY, "--labels", "onehot", "--save-every", "1", "--lr", "1e30", "--steps", "50",
           "--run-dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="NaN|infinite"):
        softlabel_gan.main(run)
    kept = tmp_path / "run" / "checkpoint.pt"
    assert not kept.exists() or all(w.isfinite().all() for w in state_of(tmp_path / "run")["G"].values())
