"""softlabel_gan.py: each equation against a value found another way, DiffAugment, the networks, resume, errors, whole runs."""

import csv
import json
import math
import os
import signal
import types

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import log_of, same_state, state_of
from PIL import Image

import classifier
import datasets
import softlabel_gan
from datasets import Batches, ImageSet, InputError
from softlabel_gan import (
    Discriminator,
    Generator,
    borrowed,
    diffaugment,
    label_augmentation,
    online_label_smoothing,
    smooth_labels,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def one_hot(labels, K):
    return F.one_hot(torch.as_tensor(labels), K).float()


def count(network):
    return sum(w.numel() for w in network.parameters())


# --------------------------------------------------------------------------------------------------------------- losses


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


# --------------------------------------------------------------------------------------------------------------- labels


def test_smoothing_by_hand():
    """P's 1 - alpha + alpha / K on the class; A's 1 - alpha would leave the sum at 1 - alpha / K."""
    for K, own in ((10, 0.91), (100, 0.901)):
        y = smooth_labels(one_hot([3], K).double(), 0.1)[0]
        assert y[3] == pytest.approx(own) and y[0] == pytest.approx(0.1 / K) and y.sum() == pytest.approx(1, abs=1e-12)
    assert torch.equal(smooth_labels(one_hot([1], 4), 0.0), one_hot([1], 4))
    assert torch.allclose(smooth_labels(one_hot([1], 4), 1.0), torch.full((1, 4), 0.25))


def test_mixup_by_hand():
    x, y = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1), one_hot([0, 2], 3)
    mixed, labels = softlabel_gan.mixup(x, y, 0.75, torch.tensor([1, 0]))
    assert mixed.flatten().tolist() == [0.5, -0.5] and labels.tolist() == [[0.75, 0, 0.25], [0.25, 0, 0.75]]
    same, labels = softlabel_gan.mixup(x, y, 1.0, torch.tensor([1, 0]))
    assert torch.equal(same, x) and torch.equal(labels, y)


def test_online_label_smoothing_by_hand():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2])  # the fourth is mistaken for class 0, the fifth too: class 2 has none
    table = online_label_smoothing(p, labels)
    assert torch.allclose(table, torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0, 0, 1]], dtype=torch.float64))
    assert torch.allclose(label_augmentation("ols", labels, 3, p.float()), table[labels].float())


def test_rows_of_online_label_smoothing_sum_to_one():
    """Also where the classes differ in size, where A's rows do not."""
    labels = torch.arange(4).repeat_interleave(torch.tensor([95, 48, 10, 5]))
    p = (torch.randn(158, 4) + 3 * one_hot(labels, 4)).double().softmax(1)
    table = online_label_smoothing(p, labels)
    assert torch.allclose(table.sum(1), torch.ones(4, dtype=torch.float64)) and (table.argmax(1) == torch.arange(4)).all()
    # a classifier that knows everything gives the identity, and how many images a class has does not matter
    assert torch.equal(online_label_smoothing(one_hot(labels, 4), labels), torch.eye(4))
    same = torch.full((4, 4), 0.1) + 0.6 * torch.eye(4)
    assert torch.allclose(online_label_smoothing(same[labels], labels), online_label_smoothing(same, torch.arange(4)))


def test_every_kind_of_label_is_a_distribution():
    labels, p = torch.randint(10, (50,)), torch.randn(50, 10).softmax(1)
    for how in softlabel_gan.LABELS:
        y = label_augmentation(how, labels, 10, p, 0.1)
        assert y.dtype == torch.float32 and torch.allclose(y.sum(1), torch.ones(50)) and (y >= 0).all()
        if how in ("onehot", "mixup", "cotrain"):
            assert torch.equal(y, one_hot(labels, 10))
    assert torch.equal(label_augmentation("soft", labels, 10, p), p)


def test_images_that_count_for_a_class():
    """One-hot labels: n_c. Smoothing: n_c too with 100 classes, and with 10, where .1 / 10 is the threshold itself."""
    for K in (10, 100):
        labels = torch.randint(K, (500,))
        n_c = torch.bincount(labels, minlength=K)
        for how in ("onehot", "smooth"):
            assert torch.equal(borrowed(label_augmentation(how, labels, K, alpha=0.1)), n_c), (K, how)
    assert borrowed(torch.tensor([[0.985, 0.011, 0.004], [0.02, 0.01, 0.97]])).tolist() == [2, 1, 1]


# --------------------------------------------------------------------------------------------------------- DiffAugment


def test_an_empty_policy_is_the_identity():
    x = torch.rand(4, 3, 16, 16)
    assert diffaugment(x, "") is x


@pytest.mark.parametrize("R", [16, 32, 64])
def test_diffaugment_keeps_shapes_and_ranges_and_lets_gradients_through(R):
    x = (torch.rand(8, 3, R, R) * 2 - 1).requires_grad_()
    out = diffaugment(x, "color,translation,cutout")
    assert out.shape == x.shape and out.dtype == x.dtype and out.abs().max() <= 4.5
    out.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_colour():
    x = torch.rand(2000, 3, 4, 4).double() * 2 - 1
    out = diffaugment(x, "color")
    # Undone from the invariants: saturation keeps each pixel's mean over channels, contrast the image's mean.
    shift = (out - x).mean((1, 2, 3))
    grey, grey_x = out.mean(1), x.mean(1)
    contrast = ((grey - grey.mean((1, 2), keepdim=True)) / (grey_x - grey_x.mean((1, 2), keepdim=True))).flatten(1)
    assert (contrast.std(1) < 1e-6).all()  # one number an image
    colour = ((out - grey[:, None]) / (x - grey_x[:, None])).flatten(1)
    saturation = colour.mean(1) / contrast.mean(1)
    for value, low, high in ((shift, -0.5, 0.5), (contrast.mean(1), 0.5, 1.5), (saturation, 0, 2)):
        p = scipy.stats.kstest(value.numpy(), scipy.stats.uniform(low, high - low).cdf).pvalue
        assert p > 0.001 and low <= value.min() and value.max() <= high
    flat = torch.full((3, 3, 4, 4), 0.3)
    assert (diffaugment(flat, "color").flatten(1).std(1) < 1e-6).all()  # a grey image stays one


def test_translation():
    out = diffaugment(torch.ones(4000, 1, 32, 32), "translation")
    inside = out[:, 0, 4:28, 4:28]
    assert (inside == 1).all()  # no more than an eighth moves in
    assert (out == 0).double().mean() == pytest.approx(1 - (1 - 20 / 9 / 32) ** 2, abs=0.003)
    spot = torch.zeros(4000, 1, 16, 16)
    spot[:, :, 8, 8] = 1
    _, _, row, column = diffaugment(spot, "translation").nonzero().T
    assert len(row) == 4000 and set(row.tolist()) == set(column.tolist()) == set(range(6, 11))  # shifts of -2 .. 2
    assert np.bincount(row.numpy())[6:].min() > 700 and abs(np.corrcoef(row, column)[0, 1]) < 0.06


def test_cutout():
    out = diffaugment(torch.ones(4000, 1, 32, 32), "cutout")[:, 0]
    share = (out == 0).double().mean((1, 2))
    assert share.min() == 1 / 16 and share.max() == 1 / 4 and share.mean() == pytest.approx(0.187, abs=0.004)
    rows, columns = (out == 0).any(2).sum(1), (out == 0).any(1).sum(1)
    assert torch.equal((rows * columns).double() / 1024, share)  # rectangles
    assert len({tuple(o.flatten().tolist()) for o in out[:20]}) > 15  # each image its own


# ------------------------------------------------------------------------------------------------------------- networks


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
    assert D(x, y).shape == (2,)
    assert z.shape[1] == {16: 128, 32: 128, 64: 100, 128: 120, 256: 140}[size]


def test_blocks_by_hand():
    """Doubling and averaging done within the convolutions, against the layers one after the other; in float64, exactly."""
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
        assert [not torch.equal(a, b) for a, b in zip(before, seen[-5:], strict=True)] == [i == part for i in range(5)]
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
    assert torch.allclose(norm(x, code), expected, atol=1e-5) and norm.norm.eps == (1e-5 if size == 32 else 1e-4)
    z = torch.randn(1, softlabel_gan.latent_size(size)).expand(2, -1)
    a, b = G(z, one_hot([0, 1], 4))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("size", [32, 64])
def test_what_has_spectral_norm(size):
    """Every layer with a matrix but, up to 32 pixels, those of the conditional batch norm, above the shared embedding."""
    G, D = Generator(size, 8, 4), Discriminator(size, 8, 4)
    without = {name for network in (G, D) for name, m in network.named_modules()
               if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and not hasattr(m, "parametrizations")}
    by_code = {f"blocks.{i}.{n}.{layer}" for i in range(3) for n in ("norm1", "norm2") for layer in ("gain", "shift")}
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
    assert torch.allclose(D(x, one_hot(labels, 6)), by_table, atol=1e-5)
    assert D.V.bias is None and torch.allclose(D(x, torch.zeros(5, 6)), D.psi(phi)[:, 0], atol=1e-6)


def test_the_score_is_the_mean_of_the_classes_scores(critic):
    D, x = critic
    y = torch.randn(5, 6).softmax(1)
    of_class = torch.stack([D(x, one_hot([k] * 5, 6)) for k in range(6)], 1)
    assert of_class.std(1).min() > 1e-3  # or the next line would hold for anything
    assert torch.allclose(D(x, y), (y * of_class).sum(1), atol=1e-5)
    assert torch.allclose(D(x, torch.full((5, 6), 1 / 6)), of_class.mean(1), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the data


def test_oversampling():
    """alpha 0: as in the data; 1: each class as often; between, between. Images of a class equally often."""
    counts = torch.tensor([60, 30, 10])
    data = ImageSet(torch.zeros(100, 3, 8, 8, dtype=torch.uint8), torch.arange(3).repeat_interleave(counts), list("abc"))
    for alpha in (0.0, 0.4, 1.0):
        _, index = next(Batches(data, 40_000, alpha, targets=torch.arange(100)))
        share = torch.bincount(data.labels[index], minlength=3) / 40_000
        assert torch.allclose(share, (1 - alpha) * counts / 100 + alpha / 3, atol=0.01)
        tail = torch.bincount(index, minlength=100)[90:]
        assert scipy.stats.chisquare(tail.numpy()).pvalue > 0.001


def test_batches_yield_targets_in_the_place_of_labels():
    data = ImageSet(torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 3, 8, 8), torch.zeros(7).long(), ["a"])
    targets = torch.arange(7).float()[:, None] * torch.ones(1, 4)
    x, y = next(Batches(data, 7, targets=targets))
    assert torch.allclose((x[:, 0, 0, 0] + 1) * 127.5, y[:, 2]) and y.shape == (7, 4)


def test_minimum_class_of_figure_5():
    bins = {65: (1720, 3208), 90: None, 120: None}
    for smallest in bins:
        counts = datasets.softlabel_gan_counts(10, smallest)
        assert counts.min() == smallest
        assert counts.argmin() == 6 and counts.argmax() == 5  # frog, dog
    assert softlabel_gan.parse_settings(["--minimum-class", "90"]).dataset == "cifar10imb-90"
    assert softlabel_gan.parse_settings(["--minimum-class", "65"]).dataset == "cifar10imb"
    assert classifier.balanced("cifar10imb-90") == "cifar10"


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def judge(judges):
    """A classifier of an epoch, which labels and scores."""
    return judges.loop


TINY = ["--dataset", "shapeslt", "--rho", "100", "--width", "2", "--discriminator-width", "2", "--batch-size", "8",
        "--steps", "3", "--sample-every", "0", "--eval-images", "0"]  # fmt: skip
AUGMENTED = ["--diffaug", "color,translation,cutout"]


@pytest.mark.parametrize("flags", [
    "--labels onehot", "--labels soft", "--labels smooth --smoothing 0.2", "--labels ols", "--labels mixup", "--labels cotrain",
    "--labels onehot --oversample 1", "--labels soft --oversample 0.5",
    "--labels onehot --diffaug translation,cutout --d-steps 4",
    "--labels smooth --no-flip --amp off",
])  # fmt: skip
def test_each_kind_of_labels_trains(flags, judge, tmp_path):
    flags = flags.split()
    flags += ["--classifier", judge] if {"soft", "ols"} & set(flags) else []
    softlabel_gan.main([*TINY, *AUGMENTED, "--sample-every", "3", *flags, "--run-dir", str(tmp_path)])
    row = log_of(tmp_path)[-1]
    assert all(math.isfinite(row[k]) for k in softlabel_gan.LOSSES) and (row["L_C"] != 0) == ("cotrain" in flags)
    assert row["images"] == 3 * 8 * (4 if "--d-steps" in flags else 1)
    assert (tmp_path / "samples" / "step-0000003.png").exists()


@pytest.mark.parametrize("flags", ["--labels soft", "--labels mixup", "--labels cotrain"])
def test_a_stopped_run_continues_bit_for_bit(flags, judge, tmp_path, monkeypatch):
    common = [*TINY, *AUGMENTED, *flags.split(), "--steps", "24", "--d-steps", "2", "--ema-start", "5"]
    common += ["--classifier", judge] if "soft" in flags else []
    whole, stopped, calls, loss = tmp_path / "whole", tmp_path / "stopped", [], softlabel_gan.generator_loss
    softlabel_gan.main([*common, "--run-dir", str(whole)])

    def terminate(scores):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(scores)

    monkeypatch.setattr(softlabel_gan, "generator_loss", terminate)
    with pytest.raises(SystemExit) as caught:
        softlabel_gan.main([*common, "--run-dir", str(stopped)])
    assert caught.value.code == 128 + signal.SIGTERM and state_of(stopped)["step"] == 13
    softlabel_gan.main([*common, "--run-dir", str(stopped)])
    assert len(calls) == 24 and same_state(whole, stopped) and log_of(whole) == log_of(stopped)


def test_soft_labels_reach_only_real_images_and_fakes_are_uniform(judge, tmp_path, monkeypatch):
    """What each network is told: G and the fakes one-hot labels, each class as often; the real images the classifier's."""
    told = types.SimpleNamespace(G=[], D=[])
    for kind in (Generator, Discriminator):
        name, forward = kind.__name__[0], kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, y, name=name, forward=forward: (
            getattr(told, name).append(y.clone()) if self.training else None, forward(self, x, y))[1])
    softlabel_gan.main([*TINY, "--classifier", judge, "--batch-size", "100", "--steps", "20", "--run-dir", str(tmp_path)])
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
    C = classifier.load_classifier(judge)
    p = C(train.images[::100] / 127.5 - 1).softmax(1)  # of clean images: neither mirrored nor augmented
    assert torch.allclose(stored[::100], p, atol=1e-5)


def test_labels_are_computed_once_and_kept(judge, tmp_path, monkeypatch, capsys):
    run = [*TINY, "--classifier", judge, "--run-dir", str(tmp_path / "run")]
    softlabel_gan.main(run)
    summary = json.loads((tmp_path / "run" / "config.json").read_text())["labels"]
    stored = np.load(tmp_path / "run" / "soft_labels.npz", allow_pickle=False)["probabilities"].astype(np.float64)
    assert list(summary["images_that_count"].values()) == (stored > 0.01).sum(0).tolist()
    assert summary["max_probability"] == pytest.approx(stored.max(1).mean(), abs=1e-6)
    assert summary["entropy"] == pytest.approx(scipy.stats.entropy(stored, axis=1).mean(), abs=1e-5)
    # without the classifier the run goes on; with another it does not
    monkeypatch.setattr(softlabel_gan, "frozen_classifier", lambda *_, **__: pytest.fail("asked again"))
    softlabel_gan.main([*TINY, "--steps", "4", "--run-dir", str(tmp_path / "run")])
    assert state_of(tmp_path / "run")["step"] == 4
    monkeypatch.undo()
    other = torch.load(judge, weights_only=True)
    other["weights"]["conv.weight"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match="labels of another classifier"):
        softlabel_gan.main([*run, "--classifier", str(tmp_path / "other.pt"), "--steps", "5"])
    (tmp_path / "run" / "soft_labels.npz").unlink()
    with pytest.raises(InputError, match="other labels"):
        softlabel_gan.main([*run, "--classifier", str(tmp_path / "other.pt"), "--steps", "5"])
    (tmp_path / "run" / "soft_labels.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="soft_labels.npz is damaged"):
        softlabel_gan.main([*run, "--steps", "5"])


def test_a_whole_run_leaves_everything_it_promises(judge, tmp_path, run_script, monkeypatch):
    small = [*TINY, "--classifier", judge, "--steps", "4", "--sample-every", "2", "--eval-images", "65",
             "--features", f"classifier:{judge}", "--run-dir", "run"]
    done = run_script("softlabel_gan.py", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["steps"] == 4 and config["torch"] == torch.__version__ and len(config["parameters"]) == 2
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["borrowed.png", "step-0000002.png", "step-0000004.png"]
    with Image.open(run / "samples" / "step-0000004.png") as grid:
        assert grid.width == grid.height
    with np.load(run / "samples.npz", allow_pickle=False) as samples:
        assert samples["images"].shape == (65, 16, 16, 3) and samples["images"].dtype == np.uint8
        assert np.bincount(samples["labels"]).tolist() == [7] * 5 + [6] * 5
        images = samples["images"]
    scores = json.loads((run / "metrics.json").read_text())
    assert scores["protocol"]["step"] == 4 and scores["all"]["fd"] > 0
    with open(run / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["images_that_count"]) for row in rows] == list(config["labels"]["images_that_count"].values())
    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.chdir(tmp_path)
    softlabel_gan.main([*small, "--eval-only", "--sample-seed", "1"])
    with np.load(run / "sample-seed-1" / "samples.npz", allow_pickle=False) as samples:
        assert not np.array_equal(samples["images"], images)
    assert (run / "checkpoint.pt").read_bytes() == before and json.loads((run / "metrics.json").read_text()) == scores


def test_picture_of_borrowed_images(tmp_path, monkeypatch):
    """Fig. 2: of other classes, those that count most, the most first; white where fewer than a row count."""
    shown = []
    monkeypatch.setattr(softlabel_gan, "write_grid", lambda path, images, columns: shown.append(images))
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
            Image.fromarray(np.full((16, 16, 3), 60 * c + i, np.uint8)).save(where / "train" / str(c) / f"{i}.png")
    return ["--dataset", f"folder:{where}", "--image-size", "16", "--data-dir", str(where / "data")]


def test_a_class_that_the_labels_forget_is_named(tmp_path, capsys, monkeypatch):
    """Two classes, one of a single image; also: its distance has no covariance, and is left out."""
    monkeypatch.chdir(tmp_path)
    run = [*TINY[4:], *folder(tmp_path / "mine", 9, 1)]
    monkeypatch.setattr(softlabel_gan, "soft_labels", lambda C, images, device: torch.tensor([[0.98, 0.02]] * 10))
    classifier.main([*run[-6:], "--soft-labels", "--epochs", "1", "--run-dir", "c"])
    judge = ["--classifier", "c/classifier.pt", "--features", "classifier:c/classifier.pt", "--eval-images", "4"]
    softlabel_gan.main([*run, *judge, "--run-dir", "run"])
    said = capsys.readouterr()
    assert "gives 1 less than a quarter" in said.err and "training images right" in said.out
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert scores["per_class"][1]["fd"] is None and scores["per_class"][0]["fd"] > 0 and scores["all"]["fd"] > 0


def test_one_class_is_refused(tmp_path):
    with pytest.raises(InputError, match="has one class"):
        softlabel_gan.main([*TINY[4:], *folder(tmp_path / "mine", 4), "--labels", "onehot", "--run-dir", str(tmp_path / "run")])


# ------------------------------------------------------------------------------------------------- settings and errors


def test_defaults_are_the_papers():
    args = softlabel_gan.parse_settings([])
    assert (args.dataset, args.labels, args.diffaug) == ("cifar10imb", "soft", "color,translation,cutout")
    assert (args.batch_size, args.lr, args.lr_d, args.d_steps, args.eval_images) == (128, 2e-4, 2e-4, 4, 10_000)
    for size, batch in ((64, 512), (128, 32)):
        args = softlabel_gan.parse_settings(["--dataset", "folder:x", "--image-size", str(size)])
        assert (args.batch_size, args.lr, args.lr_d, args.width) == (batch, 1e-4, 4e-4, 80)
    assert softlabel_gan.parse_settings(["--dataset", "cifar10imb"]).run_dir == "runs/softlabel_gan-cifar10imb-s0"
    named = softlabel_gan.parse_settings(["--labels", "smooth", "--diffaug", "", "--seed", "2"]).run_dir
    assert named == "runs/softlabel_gan-cifar10imb-labelssmooth-diffaug-s2"


@pytest.mark.parametrize("flags", [
    ["--steps", "0"], ["--d-steps", "0"], ["--batch-size", "-3"], ["--lr", "nan"], ["--lr-d", "0"], ["--ema", "1"],
    ["--width", "0"], ["--image-size", "17"], ["--save-every", "0"], ["--eval-images", "-1"], ["--rho", "0.5"],
    ["--seed", "-1"], ["--oversample", "1.5"], ["--smoothing", "-0.1"], ["--diffaug", "colour"], ["--labels", "hard"],
    ["--classifier", "nowhere.pt"], ["--features", "classifier:nowhere.pt"], ["--minimum-class", "65"],
    ["--labels", "soft", "--smoothing", "0.3"], ["--features", "classifier:"], ["--eval-images", "1"],
    ["--minimum-class", "50", "--dataset", "cifar10imb"], ["--labels", "onehot", "--classifier", __file__], ["--eval-only"],
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
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="foreign.pt is damaged"):
        softlabel_gan.load_checkpoint(tmp_path / "foreign.pt", "cpu")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match="checkpoint.pt is damaged"):
        softlabel_gan.main(run)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == b"PK damaged"


def test_errors_are_one_line_and_status_two(tmp_path, run_script):
    done = run_script("softlabel_gan.py", "--dataset", "shapslt", cwd=tmp_path)
    assert done.returncode == 2 and "shapeslt" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run = [*TINY, "--labels", "onehot", "--save-every", "1", "--lr", "1e30", "--run-dir", str(tmp_path / "run"),
           "--steps", "50"]
    with pytest.raises(InputError, match="NaN|infinite"):
        softlabel_gan.main(run)
    kept = tmp_path / "run" / "checkpoint.pt"
    assert not kept.exists() or all(w.isfinite().all() for w in state_of(tmp_path / "run")["G"].values())
