"""cbgan.py: each equation against a value found another way, the propositions, the networks, resume, errors,
whole runs."""

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from conftest import ROOT, edited, log_of, same_state, state_of
from PIL import Image

import cbgan
import classifier
import datasets
import metrics
from cbgan import (
    class_balancing_regulariser,
    class_weights,
    effective_class_distribution,
    effective_class_frequency,
)
from datasets import InputError

# rho = 100
CIFAR10_LT = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], dtype=torch.float64)


def settings(**changed):
    """What the networks read of the command line; the paper's SNDCGAN unless changed."""
    plain = dict(architecture="sndcgan", image_size=32, width=64, discriminator_width=64, slope=0.1,
                 conditioning="none",
                 generator_spectral_norm=False)
    return types.SimpleNamespace(**plain | changed)


def count(network):
    return sum(w.numel() for w in network.parameters())


# -------------------------------------------------------------------------------------- Eqs 2 and 3


def test_relativistic_loss():
    real, fake = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 3.0])
    by_hand = -np.mean([math.log(1 / (1 + math.exp(-d))) for d in (1.0, -3.0, -2.5)])
    assert cbgan.relativistic_loss(real, fake).item() == pytest.approx(by_hand, rel=1e-6)
    assert cbgan.relativistic_loss(real, real).item() == pytest.approx(math.log(2))
    # Pairs go by their place in the batch, not all with all.
    assert cbgan.relativistic_loss(real, fake) != cbgan.relativistic_loss(real, fake[[2, 0, 1]])
    huge = cbgan.relativistic_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert huge.isfinite() and huge.item() == pytest.approx(2e4)


# -------------------------------------------------------------------- Eqs 5 and 6, class statistics


def test_effective_class_frequency_has_a_closed_form():
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (7, 5), generator=g).double()
    alpha, beta, N_hat = 0.3, 0.8, torch.ones(5, dtype=torch.float64)
    for c in counts:
        N_hat = effective_class_frequency(N_hat, c, alpha, beta)
    T = len(counts)
    closed = (1 - alpha) ** T + beta * sum((1 - alpha) ** (T - 1 - s) * counts[s] for s in range(T))
    assert torch.allclose(N_hat, closed)
    assert effective_class_distribution(N_hat).sum().item() == pytest.approx(1)


def test_beta_only_weighs_the_start():
    c = torch.tensor([9.0, 5.0, 1.0], dtype=torch.float64)
    a, b = torch.full((3,), 4.0).double(), torch.full((3,), 4.0 / 0.25).double()
    for _ in range(5):
        a, b = effective_class_frequency(a, c, 0.5, 0.25), effective_class_frequency(b, c, 0.5, 1.0)
    assert torch.allclose(a, 0.25 * b)
    assert torch.allclose(effective_class_distribution(a), effective_class_distribution(b))


def test_without_counts_the_distribution_stays():
    N_hat = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    for _ in range(20):
        N_hat = effective_class_frequency(N_hat, torch.zeros(3), 0.5, 1.0)
    assert torch.allclose(effective_class_distribution(N_hat), torch.tensor([0.5, 0.3, 0.2]).double())


def test_inaturalist_is_not_levelled():
    """1010 classes, 256 counts a step, alpha = beta = .005: N follows the shares. With A's floor of 1 it
    could not."""
    rng = np.random.default_rng(0)
    share = np.exp(-np.linspace(0, math.log(50), 1010))
    share /= share.sum()
    N_hat = torch.ones(1010, dtype=torch.float64)
    for _ in range(3000):
        N_hat = effective_class_frequency(N_hat, torch.from_numpy(rng.multinomial(256, share)), 0.005, 0.005)
    assert np.corrcoef(N_hat, share)[0, 1] > 0.9 and N_hat.max() / N_hat.mean() > 2
    assert N_hat.mean() < 0.5  # below A's floor


def test_labels_are_drawn_in_inverse_proportion():
    N = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    y = cbgan.draw_labels(100_000, N, "inverse", torch.Generator().manual_seed(0))
    wanted = (1 / N) / (1 / N).sum()
    assert torch.allclose(torch.bincount(y) / 1e5, wanted.float(), atol=0.006)
    y = cbgan.draw_labels(100_000, N, "acgan", torch.Generator().manual_seed(0))
    assert torch.allclose(torch.bincount(y) / 1e5, torch.full((4,), 0.25), atol=0.006)
    assert cbgan.draw_labels(5, N, "none") is None


# --------------------------------------------------------------------------- Eq. 7, the regulariser


def test_regulariser_by_hand():
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    N = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    eq_7 = 0.5 * math.log(0.5) / 0.6 + 0.25 * math.log(0.25) / 0.3 + 0.25 * math.log(0.25) / 0.1
    # lambda / K
    assert class_balancing_regulariser(p, class_weights(N, "paper")).item() == pytest.approx(eq_7 / 3)
    w = np.array([1 / 0.6, 1 / 0.3, 1 / 0.1])
    w *= 3 / w.sum()
    assert class_weights(N, "sum-to-K").tolist() == pytest.approx(w.tolist())


def test_both_weightings_agree_at_uniform():
    uniform = torch.full((10,), 0.1, dtype=torch.float64)
    p = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(10)))
    values = [
        class_balancing_regulariser(p, class_weights(uniform, name)).item() for name in ("paper", "sum-to-K")
    ]
    assert values == pytest.approx([(p * p.log()).sum().item()] * 2)
    assert class_balancing_regulariser(uniform,
                                       class_weights(uniform, "paper")).item() == pytest.approx(-math.log(10))


def test_the_weightings_differ_by_a_number():
    N = torch.tensor([0.64] + [0.04] * 9, dtype=torch.float64)
    ratio = class_weights(N, "paper") / class_weights(N, "sum-to-K")
    assert ratio.tolist() == pytest.approx([2.265625] * 10)
    cifar = CIFAR10_LT / CIFAR10_LT.sum()
    assert (class_weights(cifar, "paper")
            / class_weights(cifar, "sum-to-K"))[0].item() == pytest.approx(6.17, abs=0.005)
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64,
                         requires_grad=True)
    g = [
        torch.autograd.grad(
            class_balancing_regulariser(logits.softmax(1).mean(0), class_weights(cifar, name)), logits
        )[0]
        for name in ("paper", "sum-to-K")
    ]
    assert F.cosine_similarity(g[0].flatten(), g[1].flatten(), dim=0).item() == pytest.approx(1)


def test_a_class_that_is_never_generated_has_a_finite_weight():
    N = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)
    assert class_weights(N, "paper")[2].item() == pytest.approx(1000)
    w = class_weights(N, "sum-to-K")
    assert w.sum().item() == pytest.approx(3) and w[2] > 2.9
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    loss = class_balancing_regulariser(p, w)
    loss.backward()
    assert loss.isfinite() and p.grad.isfinite().all()
    assert class_balancing_regulariser(torch.tensor([1.0, 0.0, 0.0]),
                                       torch.ones(3)).item() == pytest.approx(0, abs=1e-6)
    assert -3 / math.e <= loss.item() <= 0  # the bound of sum-to-K, lambda = 1


def test_the_entropy_is_that_of_the_batch():
    """Two certain images of two classes are as spread as can be: log 2, where each alone has entropy 0."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert class_balancing_regulariser(q.mean(0), torch.ones(2)).item() == pytest.approx(-math.log(2))


def test_gradient_in_closed_form_and_where_it_points():
    """Descent lowers the logits of a class that is generated too often, and raises all others."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 5, generator=g, dtype=torch.float64) + torch.tensor([2.0, 0, 0, 0, 0])
    logits.requires_grad_()
    N = torch.tensor([0.8, 0.05, 0.05, 0.05, 0.05], dtype=torch.float64)
    w = class_weights(N, "paper") * 5
    q = logits.softmax(1)
    p = q.mean(0)
    class_balancing_regulariser(p, w).backward()
    slope = (1 + p.log()) / N  # d L_reg / d p_k
    closed = q * (slope - (q * slope).sum(1, keepdim=True)) / 32
    assert torch.allclose(logits.grad, closed.detach(), atol=1e-12)
    mean = logits.grad.mean(0)
    assert mean[0] > 0 and (mean[1:] < 0).all()


def optimum(N):
    """Propositions 1 and 2: p_k = exp(nu N_k - 1) with sum p = 1; the minimum nu - sum_k p_k / N_k."""
    N = np.asarray(N, dtype=np.float64)
    nu = scipy.optimize.brentq(lambda v: np.exp(v * N - 1).sum() - 1, -1e5, 1 / N.max() + 1, xtol=1e-12)
    p = np.exp(nu * N - 1)
    return nu, p, nu - (p / N).sum()


def minimise(N):
    """The regulariser's minimum by descent on logits, from uniform."""
    w = 1 / torch.as_tensor(N, dtype=torch.float64)

    def value_and_slope(logits):
        logits = torch.tensor(logits, requires_grad=True)
        loss = class_balancing_regulariser(logits.softmax(0), w)
        loss.backward()
        return loss.item(), logits.grad.numpy()

    found = scipy.optimize.minimize(value_and_slope, np.zeros(len(N)), jac=True, method="L-BFGS-B",
                                    options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-12})
    return torch.tensor(found.x).softmax(0).numpy(), found.fun


def test_proposition_2():
    N = (CIFAR10_LT / CIFAR10_LT.sum()).numpy()
    nu, p, value = optimum(N)
    assert nu == pytest.approx(-52.3563, abs=1e-3) and value == pytest.approx(-193.4748, abs=1e-3)
    found, minimum = minimise(N)
    assert np.abs(found - p).max() < 1e-4 and minimum == pytest.approx(value, rel=1e-6)
    # rarest first: the optimum overshoots, towards the classes with a small N_k
    assert (np.diff(p) > 0).all()
    assert p[-1] == pytest.approx(0.297896, abs=1e-5)


@pytest.mark.parametrize("K, nu", [(3, -0.295837), (5, -3.047190), (10, -13.025851), (100, -360.517019)])
def test_uniform_is_the_fixed_point(K, nu):
    found_nu, p, value = optimum(np.full(K, 1 / K))
    assert found_nu == pytest.approx(nu, abs=1e-5) and p == pytest.approx(np.full(K, 1 / K))
    assert value == pytest.approx(-K * math.log(K))
    descent, _ = minimise(np.full(K, 1 / K))
    assert descent == pytest.approx(np.full(K, 1 / K))


def test_bound_of_proposition_1():
    """No minimum of the regulariser has more of a class than Eq. 16 allows; at the uniform N it has as
    much."""
    rng = np.random.default_rng(0)
    for K in (3, 5, 10):
        for N in (*rng.dirichlet(np.full(K, 2.0), 5) * 0.9 + 0.1 / K, np.full(K, 1 / K)):
            p, _ = minimise(N)
            bound = np.exp(-K * (math.log(K) - 1) * N - 1)
            assert (p <= bound + 1e-6).all()
    assert p == pytest.approx(bound)


def test_two_classes_are_the_known_failure(tmp_path):
    """With K = 2 the optimum favours the frequent class, so the script refuses."""
    p, _ = minimise([0.8, 0.2])
    assert p == pytest.approx([0.5866, 0.4134], abs=1e-3)
    folder = tmp_path / "pictures"
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / "train" / name / f"{i}.png")
    run = ["--dataset", f"folder:{folder}", "--image-size", "16", "--data-dir", str(tmp_path / "data")]
    with pytest.raises(InputError, match="2 classes.*--reg-weight 0"):
        cbgan.main([*run, "--run-dir", str(tmp_path / "run")])


@pytest.mark.parametrize("K, alpha, converges",
                         [(10, 0.5, True), (100, 0.4, True), (100, 0.5, False), (10, 0.9, False)])
def test_the_alternation_converges_where_alpha_is_below_2_over_log_K(K, alpha, converges):
    """Cycles of 1000 images with a generator that obeys Eq. 7 at once: deviations shrink by 1 - alpha log K
    each time."""
    assert converges == (alpha < 2 / math.log(K))
    N_hat = torch.full((K,), 1000 / K, dtype=torch.float64)
    N_hat[0] *= 1.002
    N = effective_class_distribution(N_hat)
    deviation = [(N - 1 / K).abs().max().item()]
    for _ in range(6):
        p, _ = minimise(N)
        N_hat = effective_class_frequency(N_hat, 1000 * torch.from_numpy(p), alpha, alpha)
        N = effective_class_distribution(N_hat)
        deviation.append((N - 1 / K).abs().max().item())
    assert (deviation[-1] < deviation[0]) == converges
    assert deviation[1] / deviation[0] == pytest.approx(abs(1 - alpha * math.log(K)), abs=0.02)


def test_two_dimensional_ring():
    """The whole method on five Gaussians, rho = 20: KL to uniform with and without the regulariser."""

    def kl(reg_weight):
        torch.manual_seed(0)
        angle = torch.arange(5) * 2 * math.pi / 5
        modes = 2 * torch.stack([angle.cos(), angle.sin()], 1)
        prior = torch.tensor([20 ** (-k / 4) for k in range(5)])

        def network(i, o):
            return torch.nn.Sequential(torch.nn.Linear(i, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64),
                                       torch.nn.ReLU(),
                                       torch.nn.Linear(64, o))

        def oracle(x):
            return -torch.cdist(x, modes).square() / (2 * 0.5**2)

        G, D = network(8, 2), network(2, 1)
        optimizers = [torch.optim.Adam(n.parameters(), 1e-3, (0.5, 0.999), fused=True) for n in (G, D)]
        N_hat, c, w = torch.ones(5), torch.zeros(5), torch.ones(5)
        for step in range(1200):
            x = modes[torch.multinomial(prior, 128, True)] + 0.2 * torch.randn(128, 2)
            loss = cbgan.relativistic_loss(D(x), D(G(torch.randn(128, 8)).detach()))
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
            fake = G(torch.randn(128, 8))
            q = oracle(fake).softmax(1)
            loss = cbgan.relativistic_loss(D(fake),
                                           D(x)) + reg_weight * class_balancing_regulariser(q.mean(0), w)
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
            c += torch.bincount(q.argmax(1), minlength=5)
            if (step + 1) % 100 == 0:
                N_hat = effective_class_frequency(N_hat, c, 0.5, 1.0)
                w = class_weights(effective_class_distribution(N_hat), "sum-to-K")
                c.zero_()
        with torch.no_grad():
            r = torch.bincount(oracle(G(torch.randn(20_000, 8))).argmax(1), minlength=5) / 20_000
        return torch.special.xlogy(r, 5 * r).sum().item()

    assert kl(1.0) < 0.15 < kl(0.0)


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("architecture, size, conditioning, K, generator, discriminator", [
    ("sndcgan", 32, "none", 10, 3_811_907, 2_928_193),
    ("sndcgan", 32, "cgan", 10, 3_819_971, 2_933_313),
    ("sndcgan", 32, "acgan", 10, 3_819_971, 2_933_323),
    ("snresgan", 32, "none", 100, 4_275_971, 1_053_825),
    ("snresgan", 32, "cgan", 100, 4_580_099, 1_066_625),
    ("snresgan", 32, "acgan", 100, 4_580_099, 1_066_725),
    ("snresgan", 64, "none", 5, 12_219_715, 19_542_721),
    ("snresgan", 64, "cgan", 5, 12_242_755, 19_547_841),
    ("snresgan", 64, "acgan", 1010, 18_031_555, 20_577_971),
])  # fmt: skip
def test_parameter_counts(architecture, size, conditioning, K, generator, discriminator, monkeypatch):
    """Those of P and A, but for the biases right before a batch norm: 448, 768 and 960 fewer."""
    # its QR decompositions would take most of the time
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda w: w)
    args = settings(architecture=architecture, image_size=size, conditioning=conditioning)
    assert count(cbgan.build_generator(args, K)) == generator
    assert count(cbgan.Discriminator(args, K)) == discriminator


@pytest.mark.parametrize("architecture", ["sndcgan", "snresgan"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes_and_ranges(architecture, size):
    torch.manual_seed(0)
    args = settings(architecture=architecture, image_size=size, width=4, discriminator_width=4,
                    conditioning="acgan")
    G, D, y = cbgan.build_generator(args, 3), cbgan.Discriminator(args, 3), torch.tensor([0, 1, 2, 0])
    x = G(torch.randn(4, 128), y)
    assert x.shape == (4, 3, size, size) and x.dtype == torch.float32 and x.abs().max() <= 1
    score, logits = D(x)
    assert score.shape == (4,) and logits.shape == (4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert G(torch.randn(4, 128), y).dtype == D(x)[0].dtype == torch.float32
    assert not any("BatchNorm" in type(m).__name__ for m in D.modules())
    # but for the power method, no image depends on the others
    assert torch.allclose(D(x[:1])[0], D(x)[0][:1], atol=1e-2)


def test_spectral_norm_of_every_weight_in_the_discriminator_is_one():
    torch.manual_seed(0)
    D = cbgan.Discriminator(settings(image_size=16, width=8, discriminator_width=8, conditioning="cgan"), 5)
    layers = [m for m in D.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear | torch.nn.Embedding)]
    with torch.no_grad():
        for m in layers:
            m.parametrizations.weight.original.copy_(torch.randn(m.weight.shape) * 3)
        for _ in range(300):
            D(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]))
    assert len(layers) == 7
    for m in layers:
        assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_one_step_of_the_power_method_a_forward_pass():
    torch.manual_seed(0)
    D = cbgan.Discriminator(settings(image_size=16, width=8, discriminator_width=8), 5)
    parametrisation = D.score.parametrizations.weight
    W, u = parametrisation.original.detach(), None
    with torch.no_grad():
        D.layers[0].parametrizations.weight.original.copy_(torch.randn(8, 3, 3, 3))
    first = D.layers[0].parametrizations.weight
    W, v = first.original.detach().flatten(1), first[0]._v.clone()
    D(torch.zeros(1, 3, 16, 16))
    u = F.normalize(W @ v, dim=0)
    v = F.normalize(W.T @ u, dim=0)
    assert torch.allclose(first[0]._u, u, atol=1e-6) and torch.allclose(first[0]._v, v, atol=1e-6)
    D.eval()
    assert torch.allclose(D.layers[0].weight.flatten(1), W / (u @ W @ v), atol=1e-6)
    assert torch.allclose(first[0]._v, v, atol=1e-6)  # none in eval mode


def test_discriminator_block_skips_with_the_raw_input():
    """A's in-place activation hands the skip the activated input."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    block = cbgan.DiscriminatorBlock(4, 4, 0.1, first=False, down=False)
    act = lambda h: F.leaky_relu(h, 0.1)  # noqa: E731
    raw = block.conv2(act(block.conv1(act(x)))) + x
    assert torch.allclose(block(x), raw, atol=1e-6) and not torch.allclose(raw, raw - x + act(x), atol=1e-2)
    block = cbgan.DiscriminatorBlock(4, 6, 0.1, first=False, down=True)
    # convolution, then pooling
    by_hand = F.avg_pool2d(block.conv2(act(block.conv1(act(x)))) + block.skip(x), 2)
    assert torch.allclose(block(x), by_hand, atol=1e-5)
    assert torch.equal(x, before)
    block = cbgan.DiscriminatorBlock(4, 6, 0.1, first=True, down=True)
    assert torch.allclose(block(x), F.avg_pool2d(block.conv2(act(block.conv1(x))) + block.skip(x), 2),
                          atol=1e-5)


def test_conditional_batch_norm():
    torch.manual_seed(0)
    norm, x, y = cbgan.Norm(4, 3), torch.randn(6, 4, 5, 5) * 2 + 1, torch.tensor([0, 1, 2, 2, 1, 0])
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (
        x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-4
    ).sqrt()
    by_hand = plain * (1 + norm.gain.weight[y])[:, :, None, None] + norm.shift.weight[y][:, :, None, None]
    assert torch.allclose(norm(x, y), by_hand, atol=1e-5)
    torch.nn.init.zeros_(norm.gain.weight)
    torch.nn.init.zeros_(norm.shift.weight)
    assert torch.allclose(norm(x, y), plain, atol=1e-5)


def test_projection_discriminator_by_hand():
    torch.manual_seed(0)
    D = cbgan.Discriminator(settings(image_size=16, width=8, discriminator_width=8, conditioning="cgan"),
                            5).eval()
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 4, 2, 2])
    h = D.layers(x).sum((2, 3))
    by_hand = [(D.score.weight[0] @ h[i] + D.score.bias[0] + D.projection.weight[y[i]] @ h[i]).item()
               for i in range(4)]
    assert D(x, y)[0].tolist() == pytest.approx(by_hand, rel=1e-4)


def test_the_classifier_lets_gradients_through_and_keeps_none():
    torch.manual_seed(0)
    C = classifier.ResNet32(5, **classifier.CENTRED).eval().requires_grad_(False)
    before = {k: v.clone() for k, v in C.state_dict().items()}
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    class_balancing_regulariser(C(x).softmax(1).mean(0), torch.ones(5)).backward()
    assert x.grad.abs().sum() > 0 and all(w.grad is None for w in C.parameters())
    assert all(torch.equal(before[k], v) for k, v in C.state_dict().items())


# -------------------------------------------------------------------------------- the training loop


def steps_by_hand(args, C):
    """The steps of main() from the paper: cbgan's networks, plain autograd, Adam. Returns G, D, the average,
    N_hat, c."""
    torch.manual_seed(args.seed)
    K, B, how = 10, args.batch_size, args.conditioning
    G, D = cbgan.build_generator(args, K), cbgan.Discriminator(args, K)
    average = {name: value.clone() for name, value in G.state_dict().items()}
    betas = (args.beta1, args.beta2)
    adam_G, adam_D = (torch.optim.Adam(n.parameters(), args.lr, betas, eps=1e-6) for n in (G, D))
    batches = datasets.Batches(datasets.load("shapeslt", "data"), B, flip=True, seed=args.seed)
    N_hat, c = torch.ones(K, dtype=torch.float64), torch.zeros(K)

    def noise():
        z = torch.randn(B, 128)
        if how == "none":
            return z, None
        weight = N_hat.sum() / N_hat if how == "inverse" else torch.ones(K)
        return z, torch.multinomial(weight, B, replacement=True)

    def minus_log_sigmoid(a):
        return -torch.log(torch.sigmoid(a)).mean()

    def cross_entropy(logits, y):
        return -logits.softmax(1)[range(len(y)), y].log().mean()

    for step in range(1, args.steps + 1):
        x, y = next(batches)
        z, y_fake = noise()
        labels = None if y_fake is None else torch.cat([y, y_fake])
        s, logits = D(torch.cat([x, G(z, y_fake).detach()]), labels)  # one pass: one step of the power method
        loss = minus_log_sigmoid(s[:B] - s[B:])  # Eq. 2
        if how == "acgan":
            loss = loss + cross_entropy(logits[:B], y) + cross_entropy(logits[B:], y_fake)
        adam_D.zero_grad()
        loss.backward()
        adam_D.step()

        z, y_fake = noise()
        fake = G(z, y_fake)
        (s_fake, logits), (s_real, _) = D(fake, y_fake), D(x, y)
        loss = minus_log_sigmoid(s_fake - s_real)  # Eq. 3
        q = C(fake).softmax(1)
        p, N = q.mean(0), N_hat / N_hat.sum()  # Eq. 6
        w = 1 / N / K if args.weighting == "paper" else K / N / (1 / N).sum()
        loss = loss + args.reg_weight * (w * p * torch.log(p)).sum()  # Eqs 7 and 17
        if how == "acgan":
            loss = loss + cross_entropy(logits, y_fake)
        if how == "pretrained":
            loss = loss - 0.5 * q[range(B), y_fake].log().mean()
        adam_G.zero_grad()
        loss.backward()
        adam_G.step()

        for name, value in G.state_dict().items():
            mean = value.is_floating_point() and step > args.ema_start
            average[name] = args.ema * average[name] + (1 - args.ema) * value if mean else value.clone()
        if args.reg_weight:
            c += torch.bincount(q.argmax(1), minlength=K)
            if step % args.cycle == 0:
                N_hat, c = (1 - args.alpha) * N_hat + args.beta * c, torch.zeros(K)  # Eq. 5
    return G.state_dict(), D.state_dict(), average, N_hat, c


@pytest.fixture
def tiny(judges):
    return ["--dataset", "shapeslt", "--width", "8", "--discriminator-width", "8", "--batch-size", "8",
            "--steps", "3",
            "--sample-every", "0", "--eval-images", "0", "--monitor-every", "0", "--monitor-images", "0",
            "--classifier", judges.loop]  # fmt: skip


@pytest.mark.parametrize("flags", [
    "--conditioning none", "--conditioning none --weighting paper", "--conditioning none --reg-weight 0",
    "--conditioning uniform", "--conditioning inverse", "--conditioning acgan",
    "--conditioning acgan --reg-weight 0",
    "--conditioning cgan --reg-weight 0", "--conditioning pretrained --reg-weight 0",
])  # fmt: skip
def test_the_loop_is_the_papers(flags, tiny, judges, tmp_path):
    """Seven steps of main() against steps_by_hand(): two cycles and a half, the average from step 4 on."""
    # Adam turns the rounding of small gradients into whole steps: with a small rate these stay below the
    # bound.
    run = [*tiny, "--steps", "7", "--lr", "1e-5", "--amp", "off", "--device", "cpu", "--reg-weight", "3",
           "--cycle", "3",
           "--alpha", "0.3",
           "--beta", "0.8", "--ema", "0.75", "--ema-start", "3", *flags.split()]  # fmt: skip
    cbgan.main([*run, "--run-dir", str(tmp_path)])
    args, state = cbgan.parse_settings(run), state_of(tmp_path)
    G, D, average, N_hat, c = steps_by_hand(args, classifier.load_classifier(judges.loop))
    assert torch.allclose(state["N_hat"], N_hat) and torch.equal(state["c"], c.long())
    if args.reg_weight:
        assert c.sum() == args.batch_size and N_hat.sum() > 10  # in the middle of the third cycle
    for part, expected in (("G", G), ("D", D), ("ema", average)):
        assert state[part].keys() == expected.keys()
        for name, value in expected.items():
            # where Adam met only rounding: a step of 1e-5
            off = (state[part][name].double() - value.double()).abs()
            assert off.max() < 3e-5 and (off < 2e-6).double().mean() > 0.98, (part, name)


# --------------------------------------------------------------------------------------------- runs


def start(*arguments, cwd):
    """cbgan.py as a process of its own, to send signals to."""
    return subprocess.Popen([sys.executable, ROOT / "cbgan.py", *arguments], cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_stopped_run_continues_bit_for_bit(tiny, tmp_path, monkeypatch, capsys):
    """The residual networks, with spectral norm and conditional batch norm in the generator, and labels drawn
    by N."""
    common = [*tiny, "--architecture", "snresgan", "--conditioning", "inverse", "--generator-spectral-norm",
              "--cycle", "7",
              "--steps", "30", "--ema-start", "10"]
    whole, stopped, calls, loss = tmp_path / "whole", tmp_path / "stopped", [], cbgan.relativistic_loss
    cbgan.main([*common, "--run-dir", str(whole)])

    def terminate(*scores):
        calls.append(1)
        if len(calls) == 2 * 17:  # in the generator's half of step 17
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*scores)

    monkeypatch.setattr(cbgan, "relativistic_loss", terminate)
    with pytest.raises(SystemExit) as caught:
        cbgan.main([*common, "--run-dir", str(stopped)])
    assert caught.value.code == 128 + signal.SIGTERM and state_of(stopped)["step"] == 17
    said = f"stopped by signal {signal.SIGTERM.value} at step 17; the same command resumes"
    assert said in capsys.readouterr().out
    cbgan.main([*common, "--run-dir", str(stopped)])
    assert len(calls) == 2 * 30 and same_state(whole, stopped) and log_of(whole) == log_of(stopped)


def test_a_killed_run_continues_bit_for_bit(tiny, judges, tmp_path, capsys):
    """SIGKILL, then the same command: every tensor of the checkpoint and every loss of the run that was never
    stopped."""
    common = [*tiny, "--features", f"classifier:{judges.annotator}", "--data-dir", str(tmp_path / "data"),
              "--save-every", "7",
              "--monitor-images", "20", "--monitor-every", "30", "--cycle", "20", "--steps", "101",
              "--ema-start", "10"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(*common, "--run-dir", killed, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (killed / "log.jsonl").exists() or '"step": 50' not in (killed / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = state_of(killed)["step"]
    assert 0 < stopped_at < 101
    cbgan.main([*common, "--run-dir", str(killed)])
    assert f"resumed at step {stopped_at}" in capsys.readouterr().out
    cbgan.main([*common, "--run-dir", str(whole)])
    assert same_state(whole, killed)
    assert log_of(whole) == log_of(killed)


def test_only_the_generators_fakes_are_counted(tiny, judges, tmp_path):
    """Sum of c = steps of the cycle times batch; a monitored distance in mid-cycle leaves the counts
    alone."""
    run = [*tiny, "--cycle", "100", "--steps", "5"]
    cbgan.main([*run, "--run-dir", str(tmp_path / "a")])
    cbgan.main([*run, "--run-dir", str(tmp_path / "b"), "--monitor-images", "30", "--monitor-every", "2",
                "--sample-every", "2",
                "--features", f"classifier:{judges.annotator}", "--data-dir", str(tmp_path / "data")])
    a, b = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    assert (
        a["c"].sum() == 5 * 8
        and torch.equal(a["c"], b["c"])
        and torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    )
    assert all(torch.equal(a["G"][k], b["G"][k]) for k in a["G"])


def test_force_frequency_stays(tiny, tmp_path):
    cbgan.main([*tiny, "--force-frequency", "1000", "--cycle", "1", "--run-dir", str(tmp_path / "run")])
    state = state_of(tmp_path / "run")
    assert state["N_hat"].tolist() == [1000.0] + [1.0] * 9 and state["c"].sum() == 0


def test_average_of_the_generator(tiny, tmp_path):
    """Before --ema-start a copy; then average + (1 - decay) (value - average), batch statistics included."""
    states = []
    for steps in ("2", "3"):
        cbgan.main([*tiny, "--ema", "0.75", "--ema-start", "2", "--steps", steps, "--run-dir",
                    str(tmp_path / steps)])
        states.append(state_of(tmp_path / steps))
    assert all(torch.equal(states[0]["ema"][k], states[0]["G"][k]) for k in states[0]["G"])
    for k, value in states[1]["G"].items():
        expected = 0.75 * states[0]["G"][k] + 0.25 * value if value.is_floating_point() else value
        assert torch.allclose(states[1]["ema"][k], expected, atol=1e-6), k
        assert value.is_floating_point() or k.endswith("num_batches_tracked")
    assert any("running_var" in k for k in states[1]["ema"])


def test_vectors_of_spectral_norm_are_copied_not_averaged(tiny, tmp_path):
    cbgan.main([*tiny, "--generator-spectral-norm", "--ema", "0.75", "--ema-start", "1", "--run-dir",
                str(tmp_path)])
    state = state_of(tmp_path)
    unit = [name for name in state["G"] if name.endswith(("_u", "_v"))]
    assert len(unit) == 2 * 4 and all(torch.equal(state["ema"][name], state["G"][name]) for name in unit)
    name = "first.parametrizations.weight.original"
    assert not torch.equal(state["ema"][name], state["G"][name])


def test_a_generator_without_counters_can_be_averaged():
    """A fork without batch norm and spectral norm: there is nothing to copy."""
    torch.manual_seed(0)
    G = cbgan.build_generator(settings(image_size=16, width=4), 3)
    G.norm = torch.nn.ModuleList(Plain() for _ in G.norm)
    ema = copy.deepcopy(G)
    average = datasets.Average(ema, G)
    with torch.no_grad():
        G.last.weight.add_(1)
    average.update(0.75)
    assert torch.allclose(G.last.weight - ema.last.weight, torch.tensor(0.75))


class Plain(torch.nn.Module):
    def forward(self, x, y):
        return x


@pytest.mark.parametrize("flags, regularised", [
    ("--conditioning acgan", False), ("--conditioning cgan", False), ("--conditioning pretrained", False),
    ("--conditioning uniform", True), ("--conditioning uniform --reg-weight 0", False),
    ("--conditioning inverse --cycle 1 --alpha 0.005 --beta 0.005 --generator-spectral-norm", True),
    ("--conditioning acgan --reg-weight 1", True), ("--reg-weight 0", False), ("--weighting paper", True),
    ("--architecture snresgan --slope 0", True), ("--force-frequency 0.001", True), ("--no-flip", True),
])  # fmt: skip
def test_each_option_of_the_method_trains(flags, regularised, tiny, tmp_path):
    cbgan.main([*tiny, "--sample-every", "3", *flags.split(), "--run-dir", str(tmp_path)])
    row = log_of(tmp_path)[-1]
    assert all(math.isfinite(row[k]) for k in cbgan.LOGGED)
    assert (row["L_D_class"] > 0) == ("acgan" in flags) and (row["L_reg"] < 0) == regularised == (
        "kl_of_N" in row
    )
    assert (row["L_G_class"] > 0) == ("acgan" in flags or "pretrained" in flags)
    assert (tmp_path / "samples" / "step-0000003.png").exists()


def test_class_losses_of_the_baselines(tiny, judges, tmp_path):
    """ACGAN: D learns the class of both halves. After one step of D alone (G's rate is shared, so looked at
    through Adam's
    averages) the class head has a gradient; cgan and pretrained have no head."""
    cbgan.main([*tiny, "--conditioning", "acgan", "--steps", "1", "--amp", "off", "--run-dir",
                str(tmp_path / "a")])
    torch.manual_seed(0)
    args = cbgan.parse_settings([*tiny, "--conditioning", "acgan"])
    G, D = cbgan.build_generator(args, 10), cbgan.Discriminator(args, 10)
    x, y = next(datasets.Batches(datasets.load("shapeslt", "data"), 8, flip=True, seed=0))
    z, y_fake = torch.randn(8, 128), torch.multinomial(torch.ones(10), 8, replacement=True)
    _, logits = D(torch.cat([x, G(z, y_fake).detach()]), torch.cat([y, y_fake]))
    p = logits.softmax(1)
    by_hand = -p[range(8), y].log().mean() - p[range(8, 16), y_fake].log().mean()
    assert log_of(tmp_path / "a")[0]["L_D_class"] == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_whole_run_leaves_everything_it_promises(tiny, judges, tmp_path, run_script, monkeypatch):
    small = [*tiny, "--steps", "4", "--sample-every", "2", "--eval-images", "60", "--monitor-images", "40",
             "--monitor-every", "2", "--features", f"classifier:{judges.annotator}", "--run-dir", "run",
             "--amp", "off", "--ema-start", "0"]
    done = run_script("cbgan.py", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["steps"] == 4 and config["torch"] == torch.__version__
    assert len(config["parameters"]) == 2
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "final.png",
        "step-0000002.png",
        "step-0000004.png",
    ]
    with np.load(run / "samples.npz", allow_pickle=False) as samples:
        assert sorted(samples) == ["images", "predicted"]
        assert samples["images"].shape == (60, 16, 16, 3) and samples["images"].dtype == np.uint8
        images = torch.from_numpy(samples["images"]).permute(0, 3, 1, 2)
        predicted = torch.from_numpy(samples["predicted"])
    scores = json.loads((run / "metrics.json").read_text())
    found = {}
    for name, path in (("annotator", judges.annotator), ("in_loop", judges.loop)):
        found[name] = cbgan.predict(classifier.load_classifier(path), images)
        r = torch.bincount(found[name], minlength=10) / 60
        assert scores["all"][f"kl_{name}"] == pytest.approx(
            torch.special.xlogy(r, 10 * r).sum().item(), abs=1e-6
        )
    assert scores["all"]["kl_to_uniform"] == scores["all"]["kl_annotator"] and torch.equal(
        found["in_loop"], predicted
    )
    with open(run / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["seen"]) for row in rows] == torch.bincount(found["annotator"], minlength=10).tolist()
    shares = torch.bincount(found["in_loop"], minlength=10) / 60
    assert [float(row["share_in_loop"]) for row in rows] == pytest.approx(shares.tolist())
    assert rows[0]["train_images"] == "1000"
    logits = classifier.outputs(classifier.load_classifier(judges.loop), images)
    certain = found["in_loop"][logits.exp().max(1).values > 0.9 * logits.exp().sum(1)]
    assert ("share_in_loop_certain" in rows[0]) == (len(certain) > 0)
    if len(certain):
        shares = torch.bincount(certain, minlength=10) / len(certain)
        assert [float(row["share_in_loop_certain"]) for row in rows] == pytest.approx(shares.tolist())
    # the weights that were scored are averages in eval mode, those with the smallest monitored distance
    distances = {row["step"]: row["monitored_distance"] for row in log_of(run) if "monitored_distance" in row}
    assert sorted(distances) == [2, 4] and scores["protocol"]["step"] == min(distances, key=distances.get)
    state = state_of(run)
    z = torch.randn(60, 128, generator=torch.Generator().manual_seed(datasets.seed_from(cbgan.FINAL, 0)))

    def samples_of(weights):
        G = cbgan.build_generator(cbgan.parse_settings(small), 10).eval()
        G.load_state_dict(weights)
        G.to(memory_format=torch.channels_last)  # as in main(): another layout rounds otherwise
        with torch.no_grad():
            return ((G(z) + 1) * 127.5).round()

    assert torch.equal(samples_of(state["best"]["ema"]), images.float())
    assert (samples_of(state["G"]) - images).abs().max() > 1
    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.chdir(tmp_path)
    cbgan.main([*small, "--eval-only", "--weights", "last", "--sample-seed", "1"])
    protocol = json.loads((run / "sample-seed-1" / "metrics.json").read_text())["protocol"]
    assert (protocol["step"], protocol["weights"], protocol["sample_seed"]) == (4, "last", 1)
    assert (run / "checkpoint.pt").read_bytes() == before
    with np.load(run / "sample-seed-1" / "samples.npz", allow_pickle=False) as samples:
        assert not np.array_equal(samples["images"], images.permute(0, 2, 3, 1))
    assert json.loads((run / "metrics.json").read_text()) == scores


def test_the_best_weights_are_the_ones_that_sample(tiny, judges, tmp_path):
    run = [*tiny, "--steps", "2", "--eval-images", "0", "--monitor-images", "20", "--monitor-every", "2",
           "--features", f"classifier:{judges.annotator}", "--amp", "off", "--run-dir", str(tmp_path)]
    cbgan.main(run)
    state = state_of(tmp_path)
    state["best"]["ema"]["last.bias"] += torch.tensor([1.0, 0.0, -1.0])  # as if they were of another step
    torch.save(state, tmp_path / "checkpoint.pt")
    colours = {}
    for weights in ("best", "last"):
        cbgan.main([*run, "--eval-only", "--eval-images", "40", "--weights", weights])
        with np.load(tmp_path / "samples.npz") as samples:
            colours[weights] = samples["images"].mean((0, 1, 2))
    assert colours["best"][0] > colours["last"][0] + 20 and colours["best"][2] < colours["last"][2] - 20


def test_labels_are_drawn_as_when_the_best_weights_were_found(tiny, judges, tmp_path, monkeypatch):
    run = [*tiny, "--conditioning", "inverse", "--steps", "2", "--monitor-images", "20",
           "--monitor-every", "2",
           "--features", f"classifier:{judges.annotator}", "--run-dir", str(tmp_path)]
    cbgan.main(run)
    state = state_of(tmp_path)
    state["best"]["N"] = torch.linspace(0.01, 0.19, 10, dtype=torch.float64)
    torch.save(state, tmp_path / "checkpoint.pt")
    drawn, draw_samples = [], cbgan.draw_samples
    monkeypatch.setattr(cbgan, "draw_samples", lambda *a, **k: drawn.append(a[4]) or draw_samples(*a, **k))
    cbgan.main([*run, "--eval-only", "--eval-images", "20"])
    assert torch.equal(drawn[-1], state["best"]["N"]) and not torch.equal(state["N_hat"], drawn[-1])


def test_labels_are_in_the_samples_of_conditional_generators(tiny, judges, tmp_path):
    common = ["--eval-images", "30", "--features", f"classifier:{judges.annotator}", "--data-dir",
              str(tmp_path / "data")]
    cbgan.main([*tiny, *common, "--conditioning", "cgan", "--run-dir", str(tmp_path / "run")])
    with np.load(tmp_path / "run" / "samples.npz", allow_pickle=False) as samples:
        assert sorted(samples) == ["images", "labels"] and (np.bincount(samples["labels"]) == 3).all()


def test_choice_and_score_share_neither_noise_nor_real_images(monkeypatch, tiny, judges, tmp_path, capsys):
    measured, seeds = [], []
    latents, distance = cbgan.latents, metrics.load_reference
    monkeypatch.setattr(cbgan, "latents", lambda n, kind,
                        seed: seeds.append((kind, seed)) or latents(n, kind, seed))
    monkeypatch.setattr(metrics, "load_reference", lambda real,
                        *a: measured.append(real.images) or distance(real, *a))
    run = [*tiny, "--monitor-images", "20", "--monitor-every", "3", "--features",
           f"classifier:{judges.annotator}",
           "--data-dir", str(tmp_path / "data"), "--eval-images", "20", "--run-dir", str(tmp_path / "run")]
    cbgan.main(run)
    choice, score, *_ = measured  # then those of the floor
    assert not set(map(hash_of, choice)) & set(map(hash_of, score)) and seeds == [
        (cbgan.MONITOR, 0),
        (cbgan.FINAL, 0),
    ]
    assert not torch.equal(latents(9, cbgan.MONITOR, 0)[0], latents(9, cbgan.FINAL, 0)[0])
    assert "have chosen them" not in capsys.readouterr().err
    cbgan.main([*run, "--eval-only", "--reference", "test"])
    assert "test images that score these weights have chosen them" in capsys.readouterr().err


def hash_of(image):
    return hash(image.numpy().tobytes())


@pytest.mark.parametrize("splits, scored, expected", [
    (("train", "test", "reference"), "reference", "test"),
    (("train", "test", "reference"), "test", "reference"),
    (("train",), "reference", None), (("train", "test"), "test", None),
    (("train", "reference"), "reference", None),
])  # fmt: skip
def test_real_images_that_are_left_for_the_choice(splits, scored, expected, tmp_path):
    for i, split in enumerate(splits):
        for name in ("a", "b", "c"):
            (tmp_path / split / name).mkdir(parents=True)
            # long-tailed, and so of no use for the choice
            for n in range(3 if (split, name) == ("train", "a") else 1):
                Image.fromarray(np.full((16, 16, 3), 40 * i + n,
                                        np.uint8)).save(tmp_path / split / name / f"{n}.png")
    args = dict(dataset=f"folder:{tmp_path}", data_dir=tmp_path / "data", image_size=16, rho=None,
                imbalance="exp")
    args = types.SimpleNamespace(reference=scored, **args)
    assert cbgan.other_images(args)[0] == expected


def test_a_step_of_imbalance(monkeypatch):
    args = cbgan.parse_settings(["--dataset", "shapeslt", "--rho", "10", "--imbalance", "step"])
    assert args.run_dir == "runs/cbgan-shapeslt-rho10.0-imbalancestep-s0"
    train = cbgan.load_split(args, "train")
    assert train.counts.tolist() == [1000] * 5 + [100] * 5
    asked = {}
    monkeypatch.setattr(cbgan, "frozen_classifier", lambda *_, **more: asked.update(more))
    with pytest.raises(AttributeError):  # there is no classifier to tell of
        cbgan.classifier_in_the_loop(args, train, train.classes, "cpu")
    assert asked["imbalance"] == "step"


def test_a_folder_of_its_own(tmp_path, monkeypatch):
    """Three classes, training images alone: classifiers are trained first, then the GAN, and everything is
    scored."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for c, n in enumerate((9, 5, 2)):
        (tmp_path / "mine" / "train" / f"class{c}").mkdir(parents=True)
        for i in range(n):
            image = rng.integers(80 * c, 80 * c + 60, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "mine" / "train" / f"class{c}" / f"{i}.png")
    mine = ["--dataset", "folder:mine", "--image-size", "16"]
    for split in ("train", "reference"):
        classifier.main([*mine, "--split", split, "--epochs", "1", "--run-dir", split])
    cbgan.main([*mine, "--width", "8", "--discriminator-width", "8", "--batch-size",
                "4", "--steps", "2", "--eval-images", "12", "--classifier", "train/classifier.pt",
                "--run-dir", "run",
                "--features", "classifier:reference/classifier.pt"])
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert scores["protocol"]["reference"] == "reference" and scores["protocol"]["reference_images"] == 2
    assert scores["all"]["fd"] > 0 and len(scores["per_class"]) == 3  # of one of them no image is held out


def test_a_hundred_classes(tmp_path, monkeypatch, capsys):
    """The tail is in the table; the training split chooses, the test split scores."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = np.array([f"class{k:02d}" for k in range(100)])
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        images = rng.integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / "data" / f"cifar100-{split}-16.npz", images=images, labels=np.arange(300) % 100,
                 classes=names)
    data = ["--dataset", "cifar100", "--image-size", "16"]
    for split in ("train", "reference"):
        classifier.main([*data, "--split", split, "--epochs", "1", "--run-dir", split])
    cbgan.main([*data, "--width", "2", "--discriminator-width", "2", "--batch-size", "4", "--steps", "2",
                "--monitor-every", "1", "--monitor-images", "9", "--eval-images", "200", "--run-dir", "run",
                "--classifier", "train/classifier.pt", "--features", "classifier:reference/classifier.pt"])
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (
        scores["protocol"]["reference"] == "test"
        and state_of(tmp_path / "run")["best"]["split"] == "reference"
    )
    assert scores["protocol"]["weights"] == "best" and scores["protocol"]["step"] in (1, 2)
    out = capsys.readouterr().out
    assert "ten classes of the head and ten of the tail" in out and "class99" in out
    assert "class50" not in out.split("ten of")[1]


def test_missing_inception_weights_do_not_spoil_a_run(tiny, judges, tmp_path, monkeypatch, capsys):
    """Samples and the annotator's table are there, and the message says what to copy where."""

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    small = [*tiny, "--eval-images", "20", "--monitor-images", "20", "--monitor-every", "2",
             "--features", "inception-fid"]
    cbgan.main([*small, "--annotator", judges.annotator, "--run-dir", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert (tmp_path / "run" / "samples.npz").exists() and "KL to uniform" in said.out
    assert "not scored" in said.out and "pt_inception-2015-12-05-6726825d.pth" in said.out
    assert "the distance is not monitored" in said.err


# --------------------------------------------------------------------------- a folder of your own, --export


def test_settings_follow_from_the_folder(tmp_path):
    np.savez(tmp_path / "folder-x-train-64.npz", labels=np.zeros(2000, int), classes=["a", "b", "c"])
    folder = ["--dataset", "folder:x", "--data-dir", str(tmp_path), "--image-size"]
    a = cbgan.parse_settings([*folder, "64"])  # 2000 * 2060 / 64 = 64,375
    assert (a.steps, a.eval_images, a.batch_size, a.architecture, a.beta1) == (64_400, 501, 64, "snresgan", 0)
    assert (a.recipe, a.monitor_images, a.reference, a.width) == ("folder", 0, "reference", 32)
    b = cbgan.parse_settings([*folder, "32"])  # of that size there is nothing
    assert (b.architecture, b.beta1, b.width, b.steps) == ("sndcgan", 0.5, 32, 100_000)
    assert cbgan.parse_settings([*folder, "64", "--recipe", "lsun5"]).steps == 100_000
    assert cbgan.parse_settings(["--dataset", "cifar10imb"]).recipe == "cifar10lt"
    for K, weight in ((4, 7.5), (31, 0.5)):  # lambda by the imbalance, here 10, and by the classes
        labels = torch.arange(K).repeat_interleave(torch.tensor([10] + [1] * (K - 1)))
        images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
        a = cbgan.parse_settings([*folder, "64"])
        cbgan.complete_settings(a, datasets.ImageSet(images, labels, [str(k) for k in range(K)]))
        assert a.reg_weight == weight


def exported(where):
    return {str(file.relative_to(where)): file.read_bytes() for file in where.rglob("*") if file.is_file()}


def test_pictures_are_sorted_by_the_classifier(tiny, judges, tmp_path, monkeypatch, capsys):
    """Batches of 100 in their order; the first pictures of each class. C itself says what they show."""
    run = [*tiny, "--lr", "0.05", "--ema", "0.5", "--ema-start", "0", "--steps", "12", "--classifier",
           judges.annotator, "--run-dir", str(tmp_path / "run")]  # to which these fakes are of many classes
    cbgan.main(run)
    monkeypatch.setattr(datasets, "EXPORT_BATCHES", 3)

    def export(where, *flags):
        cbgan.main([*run, "--eval-only", "--export", str(tmp_path / where), *flags])
        return exported(tmp_path / where)

    some = export("all", "--per-class", "40")
    rows = list(csv.DictReader(some["certainty.csv"].decode().splitlines()))
    assert {row["file"] for row in rows} == some.keys() - {"certainty.csv", "export.json"}
    C, names = classifier.load_classifier(judges.annotator), list(datasets.SHAPES)
    for row in rows:
        image = torch.from_numpy(np.array(Image.open(tmp_path / "all" / row["file"]))).permute(2, 0, 1)
        p = classifier.outputs(C, image[None]).softmax(1)[0]
        assert row["class"] == names[p.argmax()] == row["file"].split("/")[0]
        assert float(row["probability"]) == pytest.approx(p.max().item(), abs=2e-3)
    count = {name: sum(row["class"] == name for row in rows) for name in names}
    assert max(count.values()) <= 40 and 40 < len(rows) <= 300
    assert sum(n > 5 for n in count.values()) > 2
    few = [name for name in names if count[name] < 40]
    said = capsys.readouterr().err
    assert "3 batches hold fewer than 40 pictures of " + ", ".join(f"{k} ({count[k]})" for k in few) in said

    frequent = max(count, key=count.get)
    one = export("one", "--per-class", "5", "--classes", frequent)
    assert len(one) == 7 and all(some[name] == one[name] for name in one if name.endswith("png"))
    export("one", "--per-class", "40")
    one = export("one", "--per-class", "2", "--classes", frequent)  # what is in the table stays there
    assert one.keys() == some.keys()
    assert sorted(one["certainty.csv"].splitlines()) == sorted(some["certainty.csv"].splitlines())
    (tmp_path / "all" / rows[3]["file"]).unlink()
    assert export("all", "--per-class", "40") == some
    state = state_of(tmp_path / "run")
    state["best"] = {"ema": {k: v * 1.5 for k, v in state["ema"].items()}, "step": 3, "N": state["N_hat"]}
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(InputError, match="other things"):  # the best weights are the ones that sample
        export("all")


def test_pictures_of_a_label(tiny, tmp_path, monkeypatch):
    run = [*tiny, "--conditioning", "cgan", "--reg-weight", "0", "--run-dir", str(tmp_path / "run")]
    cbgan.main(run)
    monkeypatch.setattr(datasets, "EXPORT_AT_ONCE", 1)
    asked, drawn = [], cbgan.generate
    monkeypatch.setattr(cbgan, "generate", lambda ema, z, y, *a: asked.append(y) or drawn(ema, z, y, *a))
    cbgan.main([*run, "--eval-only", "--export", str(tmp_path / "star"), "--classes", "star",
                "--per-class", "6"])
    assert torch.stack(asked).tolist() == [[5] * 4] * 2
    assert len(set(exported(tmp_path / "star").values())) == 7
    assert not (tmp_path / "star" / "certainty.csv").exists()


# ------------------------------------------------------------------------------ settings and errors


def test_defaults_are_the_papers():
    for flags, rho in ((["--dataset", "cifar10lt"], 100), (["--dataset", "cifar10"], None),
                       (["--dataset", "cifar100lt"], 10)):
        args = cbgan.parse_settings(flags)
        assert (args.rho, args.lr, args.batch_size, args.reg_weight) == (rho, 2e-4, 256, None)
        assert (args.beta1, args.beta2, args.steps, args.cycle, args.alpha,
                args.beta) == (0.5, 0.999, 100_000, 2000, 0.5, 1.0)
        assert (args.ema, args.ema_start, args.eval_images, args.reference) == (
            0.9999,
            20_000,
            50_000,
            "test",
        )
        assert args.architecture == ("snresgan" if "cifar100lt" in flags else "sndcgan")
    args = cbgan.parse_settings(["--dataset", "folder:x", "--recipe", "inat2019"])
    assert (args.conditioning, args.alpha, args.beta, args.cycle) == ("inverse", 0.005, 0.005, 1)
    assert (args.beta1, args.image_size) == (0, 64)
    assert args.generator_spectral_norm and args.architecture == "snresgan" and args.reference == "reference"


@pytest.mark.parametrize("recipe, rho, flags, expected", [
    ("cifar10lt", 100, [], 10), ("cifar10lt", 10, [], 7.5), ("cifar10lt", 1, [], 5),
    ("cifar100lt", 10, [], 0.5),
    ("lsun5", 100, [], 10), ("inat2019", 50, [], 0.5), ("cifar10lt", 100, ["--conditioning", "cgan"], 0),
    ("cifar10lt", 100, ["--reg-weight", "3"], 3),
])  # fmt: skip
def test_lambda_follows_the_imbalance_of_the_data(recipe, rho, flags, expected, tiny, tmp_path):
    """Table 5 by what the data are: a folder has no --rho to say so."""
    small = ["--architecture", "sndcgan", "--image-size", "16", "--conditioning", "none",
             "--no-generator-spectral-norm"]
    run = [*tiny, "--rho", str(rho), "--recipe", recipe, *small, *flags, "--steps", "1", "--run-dir",
           str(tmp_path)]
    cbgan.main(run)
    assert state_of(tmp_path)["settings"]["reg_weight"] == expected


def test_run_directory_says_what_differs():
    assert cbgan.parse_settings(["--dataset", "cifar10lt"]).run_dir == "runs/cbgan-cifar10lt-s0"
    folder = cbgan.parse_settings(["--dataset", "folder:x", "--recipe", "lsun5"])
    assert folder.run_dir == "runs/cbgan-folder_x-recipelsun5-s0"
    named = cbgan.parse_settings(["--dataset", "cifar10lt", "--rho", "10", "--reg-weight", "0", "--seed",
                                  "2"]).run_dir
    assert named == "runs/cbgan-cifar10lt-regweight0.0-rho10.0-s2"


@pytest.mark.parametrize("flags", [
    ["--steps", "0"], ["--batch-size", "-3"], ["--lr", "nan"], ["--lr", "0"], ["--reg-weight", "-1"],
    ["--alpha", "0"],
    ["--alpha", "1.5"], ["--beta", "0"], ["--cycle", "0"], ["--ema", "1"], ["--width", "0"],
    ["--image-size", "17"],
    ["--image-size", "8"], ["--save-every", "0"], ["--eval-images", "-1"], ["--monitor-images", "1"],
    ["--rho", "0.5"],
    ["--seed", "-1"], ["--device", "tpu"], ["--dataset", "cifar100l"], ["--steps", "many"],
    ["--no-such-flag"], ["--eval-only"],
    ["--classifier", "nowhere.pt"], ["--annotator", "nowhere.pt"], ["--features", "classifier:nowhere.pt"],
    ["--conditioning", "inverse", "--reg-weight", "0"], ["--force-frequency", "0"], ["--recipe", "lsun"],
    ["--force-frequency", "9", "--reg-weight", "0"],
])  # fmt: skip
def test_senseless_input_is_refused_by_name(flags, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        cbgan.main([*tiny, *flags])
    assert "\n" not in str(error.value) and len(str(error.value)) > 10
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_folder_that_has_changed_is_not_gone_on_with(tiny, tmp_path, monkeypatch):
    for c in range(3):
        (tmp_path / "mine" / "train" / str(c)).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 16, 3), 40 * c + i,
                                    np.uint8)).save(tmp_path / "mine" / "train" / str(c) / f"{i}.png")
    run = [*tiny[2:-2], "--dataset", f"folder:{tmp_path}/mine", "--image-size", "16", "--data-dir",
           str(tmp_path / "data"),
           "--conditioning", "cgan", "--run-dir", str(tmp_path / "run")]
    cbgan.main(run)
    (tmp_path / "mine" / "train" / "0" / "2.png").unlink()
    with pytest.raises(InputError, match="holds a run on other images"):
        cbgan.main([*run, "--steps", "5"])
    # nor with a classifier that has learnt from what is no longer there
    monkeypatch.chdir(tmp_path)
    where = tmp_path / "runs" / f"classifier-folder_{str(tmp_path).replace('/', '_')}_mine-16px-s0"
    classifier.main(["--dataset", f"folder:{tmp_path}/mine", "--image-size", "16", "--epochs", "1",
                     "--run-dir", str(where)])
    (tmp_path / "mine" / "train" / "1" / "2.png").unlink()
    with pytest.raises(InputError, match="has learnt from other images"):
        classifier.frozen_classifier(f"folder:{tmp_path}/mine", "data", image_size=16)


def test_errors_are_one_line_and_status_two(tmp_path, run_script):
    done = run_script("cbgan.py", "--dataset", "shapslt", cwd=tmp_path)
    assert done.returncode == 2 and "shapeslt" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_classifier_for_something_else_is_refused_by_name(tiny, judges, tmp_path):
    with pytest.raises(InputError,
                       match="classifier.pt is for shapeslt.*16 pixels.*wanted are images of 32 pixels"):
        cbgan.main([*tiny, "--image-size", "32", "--run-dir", str(tmp_path / "run")])


def test_an_annotator_that_is_no_independent_one_is_warned_of(tiny, judges, tmp_path, monkeypatch, capsys):
    """P has one network for both where it has no balanced set, so it is no error."""
    cbgan.main([*tiny, "--eval-images", "20", "--annotator", judges.loop, "--features",
                f"classifier:{judges.annotator}", "--run-dir", str(tmp_path / "run")])
    assert "the annotator is the classifier in the loop" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").exists()
    for c, n in enumerate((9, 4, 3)):  # a folder that is uneven throughout
        (tmp_path / "mine" / str(c)).mkdir(parents=True)
        for i in range(n):
            image = np.full((16, 16, 3), 40 * c + i, np.uint8)
            Image.fromarray(image).save(tmp_path / "mine" / str(c) / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier, "FOLDER_EPOCHS", (1, 1))
    args = cbgan.parse_settings(["--dataset", f"folder:{tmp_path}/mine", "--image-size", "16"])
    monkeypatch.setattr(args, "eval_images", 0)  # nothing to count classes in
    assert cbgan.find_annotator(args, None, list("012"), torch.device("cpu")) is None
    monkeypatch.setattr(args, "eval_images", 9)
    annotator = cbgan.find_annotator(args, None, list("012"), torch.device("cpu"))
    assert annotator.info["split"] == "reference" and "uneven classes" in capsys.readouterr().err


def test_try_weights_without_memory():
    """All classes then weigh the same: a batch that is spread evenly is content, whatever was rare so far."""
    line = "inverse = 1 / N.clamp"
    other = edited("cbgan.py", (line, f"return torch.ones_like(N)\n    {line}"))
    assert "# TRY: return torch.ones_like(N)" in (ROOT / "cbgan.py").read_text()
    N = effective_class_distribution(CIFAR10_LT)
    pulls = []
    for module in (cbgan, other):
        logits = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        w = module.class_weights(N, "sum-to-K")
        class_balancing_regulariser(logits.softmax(0), w).backward()
        pulls.append(-logits.grad)  # where the generator is pushed
    assert pulls[0][-1] > 0 > pulls[0][0] and torch.allclose(pulls[1], torch.zeros_like(pulls[1]), atol=1e-9)


def test_try_a_regulariser_for_each_image(tiny, tmp_path):
    """Images that are certain of one class each, of all classes together: what the batch's term wants most,
    the image's wants least."""
    certain = torch.eye(10, dtype=torch.float64)
    w = torch.ones(10, dtype=torch.float64)
    assert class_balancing_regulariser(certain.mean(0), w).item() == pytest.approx(-math.log(10))
    assert class_balancing_regulariser(certain, w).item() / 10 == 0
    changed = "class_balancing_regulariser(seen.softmax(1), w) / B"
    assert f"# TRY: {changed}" in (ROOT / "cbgan.py").read_text()
    other = edited("cbgan.py", ("L_reg = class_balancing_regulariser(p_hat, w)", f"L_reg = {changed}"))
    for module, name in ((cbgan, "a"), (other, "b")):
        module.main([*tiny, "--steps", "1", "--run-dir", str(tmp_path / name)])
    # x log x is convex: the mean over the images is above the value at their mean
    assert log_of(tmp_path / "a")[0]["L_reg"] < log_of(tmp_path / "b")[0]["L_reg"] < 0


def test_try_counts_of_real_images(tiny, tmp_path):
    """N is then the training distribution, whatever is generated."""
    line = "c += datasets.sum_of_processes(F.one_hot(seen.argmax(1), K).sum(0))"
    assert "# TRY: c += F.one_hot(y, K).sum(0)" in (ROOT / "cbgan.py").read_text()
    other = edited("cbgan.py", (line, "c += F.one_hot(y, K).sum(0)"))
    run = [*tiny, "--steps", "40", "--cycle", "40", "--alpha", "1", "--run-dir", str(tmp_path)]
    other.main(run)
    counts = datasets.load("shapeslt", "unused", "train", 16).counts
    share = state_of(tmp_path)["N_hat"] / (40 * 8)
    assert (share - counts / counts.sum()).abs().max() < 0.07  # of 320 draws


@pytest.mark.parametrize("flags", ["--conditioning none --reg-weight 10", "--conditioning pretrained"])
def test_images_without_labels(flags, tiny, judges, tmp_path, capsys):
    """§4.3: one class directory; what the classes are, and what is in the samples, the classifier says."""
    folder = tmp_path / "pile" / "train" / "all"
    folder.mkdir(parents=True)
    for i, image in enumerate(datasets.load("shapeslt", "unused", "train", 16).images[::80]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    run = [*tiny[2:], "--dataset", f"folder:{tmp_path}/pile", "--image-size", "16", "--eval-images", "20",
           "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]
    if "none" in flags:
        with pytest.raises(InputError, match="--reg-weight is needed"):
            cbgan.main([*run, "--conditioning", "none"])
    with pytest.raises(InputError, match="one class directory"):
        cbgan.main([*run, "--conditioning", "acgan"])
    cbgan.main([*run, *flags.split()])
    assert "10 classes" in capsys.readouterr().out
    state = state_of(tmp_path / "run")
    assert state["N_hat"].shape == (10,)
    assert state["c"].sum() == (3 * 8 if "none" in flags else 0)  # within the first cycle
    with np.load(tmp_path / "run" / "samples.npz") as samples:
        assert samples["predicted" if "none" in flags else "labels"].shape == (20,)


def test_a_classifier_that_cannot_tell_the_tail_is_warned_of(tiny, judges, tmp_path, capsys):
    checkpoint = torch.load(judges.loop, weights_only=True)
    for tail, rarest, warned in ((0.01, 0.5, True), (0.5, 0.5, False), (0.5, 0.0, True)):
        accuracy = f"{tail}-{rarest}"
        checkpoint["test_accuracy"]["tail"], checkpoint["per_class_accuracy"] = tail, [0.0] * 9 + [rarest]
        torch.save(checkpoint, tmp_path / "c.pt")
        cbgan.main([*tiny, "--classifier", str(tmp_path / "c.pt"), "--run-dir",
                    str(tmp_path / str(accuracy))])
        assert ("diverges and is not able to produce meaningful results" in capsys.readouterr().err) == warned


def test_another_configuration_in_the_directory(tiny, tmp_path):
    run = [*tiny, "--run-dir", str(tmp_path / "run")]
    cbgan.main(run)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="--reg-weight 2.0 there, 3.0 now.*--seed 0 there, 4 now"):
        cbgan.main([*run, "--reg-weight", "3", "--seed", "4"])
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_another_classifier_under_the_same_name_is_refused(tiny, judges, tmp_path):
    path = tmp_path / "c.pt"
    checkpoint = torch.load(judges.loop, weights_only=True)
    torch.save(checkpoint, path)
    run = [*tiny, "--classifier", str(path), "--run-dir", str(tmp_path / "run")]
    cbgan.main(run)
    checkpoint["weights"]["head.bias"] += 1
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="another classifier in its loop"):
        cbgan.main([*run, "--steps", "5"])
    cbgan.main([*run, "--reg-weight", "0", "--run-dir", str(tmp_path / "without")])
    checkpoint["weights"]["head.bias"] += 1
    torch.save(checkpoint, path)
    # it only looks on there
    cbgan.main([*run, "--reg-weight", "0", "--run-dir", str(tmp_path / "without"), "--steps", "5"])
    assert state_of(tmp_path / "without")["step"] == 5


def test_a_damaged_checkpoint_is_kept_and_named(tiny, tmp_path):
    run = [*tiny, "--run-dir", str(tmp_path / "run")]
    cbgan.main(run)
    file = tmp_path / "run" / "checkpoint.pt"
    damaged = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="checkpoint.pt is damaged"):
        cbgan.main(run)
    assert file.read_bytes() == damaged


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    run = [*tiny, "--save-every", "1", "--lr", "1e30", "--steps", "50", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="NaN|infinite"):
        cbgan.main(run)
    kept = tmp_path / "run" / "checkpoint.pt"
    assert not kept.exists() or all(w.isfinite().all() for w in state_of(tmp_path / "run")["G"].values())
