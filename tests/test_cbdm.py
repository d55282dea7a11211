"""cbdm.py: each equation against a value found another way, the network's size, samplers, resume, errors, whole runs.

An untrained U-Net predicts almost nothing (its last layers start near zero), so tests that need a label to matter draw
those layers anew first: `lively`.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import cbdm
from cbdm import NO_LABEL, T
from datasets import InputError

ALPHA_BAR = cbdm.LINEAR
BETA = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)

TINY = ["--dataset", "shapeslt", "--channels", "8", "--multipliers", "1", "1", "--attention-level", "1",
        "--batch-size", "8", "--steps", "3", "--regularise-after", "0", "--sample-every", "0", "--eval-images", "0"]


def lively(num_classes=5, channels=32, multipliers=(1, 2), dropout=0.0, seed=0):
    """A small U-Net in float64 whose near-zero layers are drawn anew, so that every input matters."""
    torch.manual_seed(seed)
    model = cbdm.UNet(num_classes, channels, multipliers, blocks=1, attention_level=1, dropout=dropout).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight)
    return model


def noisy_batch(n=6, size=8, num_classes=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, 3, size, size, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 500, 750, 999])[:n]
    return x_t, t, torch.arange(n) % num_classes


# ------------------------------------------------------------------------------------------------ schedule and Eq. 1


def test_schedule_end_points():
    assert len(BETA) == len(ALPHA_BAR) == 1000
    for t, value in {0: 0.9999, 1: 0.9997800921, 99: 0.8970181457, 499: 0.0785872429, 999: 4.0358298e-05}.items():
        assert math.isclose(ALPHA_BAR[t], value, rel_tol=1e-7)
    assert (ALPHA_BAR.diff() < 0).all()


def test_forward_process_is_undone_by_the_true_noise():
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, T, 3, 2, 2, dtype=torch.float64).unbind(0)
    x_t = cbdm.q_sample(x_0, torch.arange(T), eps)
    by_hand = math.sqrt(0.0785872429) * x_0[499] + math.sqrt(1 - 0.0785872429) * eps[499]
    assert torch.allclose(x_t[499], by_hand, atol=1e-8)
    back = torch.stack([cbdm.predict_x_0(x_t[t], eps[t], t, clip=False) for t in range(T)])
    assert torch.allclose(back, x_0, atol=1e-10)


def test_cosine_schedule():
    """Nichol & Dhariwal 2021: alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + .008) / 1.008 * pi/2)."""
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    alpha_bar = cbdm.noise_schedule("cosine")
    for t in (0, 250, 500, 900):
        assert math.isclose(alpha_bar[t], f((t + 1) / T) / f(0), rel_tol=1e-9)
    assert 0 < alpha_bar[999] < 1e-5


def test_velocity_and_noise_are_the_same_statement():
    x_0, eps = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    for t in (0, 400, 999):
        times = torch.full((4,), t)
        v = cbdm.velocity(x_0, times, eps, ALPHA_BAR)
        # the derivative of x = cos(a) x_0 + sin(a) eps with respect to the angle a, by a small step
        a, d = math.atan2((1 - ALPHA_BAR[t]).sqrt(), ALPHA_BAR[t].sqrt()), 1e-6
        x = lambda a: math.cos(a) * x_0 + math.sin(a) * eps  # noqa: E731
        assert torch.allclose(v, (x(a + d) - x(a - d)) / (2 * d), atol=1e-7)
        assert torch.allclose(cbdm.eps_of_velocity(v, cbdm.q_sample(x_0, times, eps), t, ALPHA_BAR), eps, atol=1e-9)


def test_ddpm_loss_is_the_mean_over_pixels():
    h, eps = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    eps[0, 0, 0, 0] = 3.0
    assert cbdm.ddpm_loss(h, eps).item() == pytest.approx(9 / (2 * 3 * 16))


# ---------------------------------------------------------------------------------------------------------- Eq. 4


@pytest.fixture
def predictions():
    g = torch.Generator().manual_seed(3)
    h, h_prime, eps = torch.randn(3, 6, 3, 4, 4, generator=g, dtype=torch.float64).unbind(0)
    return h.requires_grad_(), h_prime.requires_grad_(), eps, torch.tensor([0, 10, 300, 500, 998, 999]), torch.ones(6).bool()


def test_loss_and_gradients_in_closed_form(predictions):
    """dL/dh = 2/N [(h - eps) + w (h - h')], dL/dh' = 2/N gamma w (h' - h), with w = tau t and N the number of entries."""
    h, h_prime, eps, t, labelled = predictions
    gamma, tau = 0.25, 0.001
    L_r, L_rc = cbdm.regularisers(h, h_prime[None], t, tau, labelled)
    loss = cbdm.ddpm_loss(h, eps) + L_r + gamma * L_rc
    loss.backward()
    w = (tau * t).double().view(-1, 1, 1, 1)
    a, b = h.detach().numpy(), h_prime.detach().numpy()
    expected = sum(((a[i] - eps[i].numpy()) ** 2).sum() + (1 + gamma) * tau * t[i].item() * ((a[i] - b[i]) ** 2).sum()
                   for i in range(6)) / h.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    d = (h - h_prime).detach()
    assert torch.allclose(h.grad, 2 / h.numel() * ((h.detach() - eps) + w * d), atol=1e-15)
    assert torch.allclose(h_prime.grad, 2 / h.numel() * gamma * w * -d, atol=1e-15)


def test_the_two_terms_are_equal_and_weighted_by_t(predictions):
    h, h_prime, _, t, labelled = predictions
    L_r, L_rc = cbdm.regularisers(h, h_prime[None], t, 0.001, labelled)
    assert L_r.item() == L_rc.item() > 0
    ones, zeros = torch.ones(1, 3, 2, 2), torch.zeros(1, 1, 3, 2, 2)
    for step, weight in ((0, 0.0), (500, 0.5), (999, 0.999)):
        L_r, _ = cbdm.regularisers(ones, zeros, torch.tensor([step]), 0.001, torch.ones(1).bool())
        assert L_r.item() == pytest.approx(weight)


def test_gamma_one_is_the_plain_squared_distance(predictions):
    h, h_prime, _, t, labelled = predictions
    sum(cbdm.regularisers(h, h_prime[None], t, 0.001, labelled)).backward()
    a, b = h.detach().requires_grad_(), h_prime.detach().requires_grad_()
    ((0.001 * t).view(-1, 1, 1, 1) * (a - b) ** 2).mean().backward()
    assert torch.allclose(h.grad, a.grad, atol=1e-15) and torch.allclose(h_prime.grad, b.grad, atol=1e-15)


def test_several_labels_are_averaged(predictions):
    h, h_prime, eps, t, labelled = predictions
    both = cbdm.regularisers(h, torch.stack([h_prime, eps]), t, 0.001, labelled)[0]
    single = [cbdm.regularisers(h, x[None], t, 0.001, labelled)[0] for x in (h_prime, eps)]
    assert both.item() == pytest.approx(sum(single).item() / 2, rel=1e-12)


def test_images_without_label_have_no_regulariser_but_count(predictions):
    h, h_prime, _, t, _ = predictions
    none = cbdm.regularisers(h, h_prime[None], t, 0.001, torch.zeros(6).bool())
    assert none[0].item() == none[1].item() == 0
    one = cbdm.regularisers(h, h_prime[None], t, 0.001, torch.arange(6) == 3)[0]
    assert one.item() == pytest.approx(0.5 * ((h[3] - h_prime[3]) ** 2).mean().item() / 6, rel=1e-12)  # t[3] = 500


def test_stop_gradients_reach_the_label_table():
    """L_r moves the rows of y and never those of y'; L_rc the other way round."""
    model = lively(num_classes=6).train()
    x_t, t, _ = noisy_batch(3)
    t = torch.tensor([500, 700, 999])
    y, y_prime = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    for term, moved, still in ((0, y, y_prime), (1, y_prime, y)):
        model.zero_grad()
        h, h_prime = model(x_t, t, y), model(x_t, t, y_prime)
        cbdm.regularisers(h, h_prime[None], t, 0.001, torch.ones(3).bool())[term].backward()
        rows = model.label.weight.grad.abs().sum(1)
        assert (rows[moved] > 0).all() and (rows[still] == 0).all()


def test_equal_labels_give_no_regulariser_unless_dropout_differs():
    x_t, t, y = noisy_batch()
    for dropout, expect_zero in ((0.0, True), (0.5, False)):
        model = lively(dropout=dropout).train()
        h, h_prime = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, y])).chunk(2)
        value = cbdm.regularisers(h, h_prime[None], t, 0.001, torch.ones(6).bool())[0].item()
        assert value < 1e-20 if expect_zero else value > 1e-6


def test_label_distributions():
    counts = torch.tensor([int(500 * 0.01 ** (c / 99)) for c in range(100)])
    ratio = lambda q: (q[0] / q[-1]).item()  # noqa: E731
    train, bal, sqrt = (cbdm.label_distribution(counts, s) for s in ("train", "bal", "sqrt"))
    assert ratio(train) == pytest.approx(100) and ratio(sqrt) == pytest.approx(10) and ratio(bal) == pytest.approx(1)
    # the chance that y' = y, from the data: sum of p(y) q*(y)
    p = counts / counts.sum()
    for q, chance in ((train, 0.0238), (sqrt, 0.0174), (bal, 0.0100)):
        assert q.sum().item() == pytest.approx(1) and (p * q).sum().item() == pytest.approx(chance, abs=5e-5)
    even = [cbdm.label_distribution(torch.full((7,), 30), s) for s in ("train", "bal", "sqrt")]
    assert torch.equal(even[0], even[1]) and torch.allclose(even[1], even[2])


# ---------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("num_classes, parameters", [(0, 35_746_307), (10, 35_751_427), (100, 35_797_507)])
def test_parameters_of_the_papers_network(num_classes, parameters):
    model = cbdm.UNet(num_classes, 128, (1, 2, 2, 2), blocks=2, attention_level=1, dropout=0.1)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_floating_point_operations_of_the_papers_network():
    from torch.utils.flop_counter import FlopCounterMode

    model = cbdm.UNet(100, 128, (1, 2, 2, 2), blocks=2, attention_level=1, dropout=0.1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(torch.zeros(1, 3, 32, 32), torch.tensor([5]), torch.tensor([3]))
    assert out.shape == (1, 3, 32, 32)
    assert counter.get_total_flops() == pytest.approx(12.44e9, rel=2e-3)


def test_attention_against_scaled_dot_product_attention():
    torch.manual_seed(0)
    layer = cbdm.SelfAttention(32, groups=8)
    x = torch.randn(2, 32, 4, 4)
    tokens = lambda f: f(layer.norm(x)).flatten(2).transpose(1, 2)[:, None]  # noqa: E731
    mixed = torch.nn.functional.scaled_dot_product_attention(tokens(layer.q), tokens(layer.k), tokens(layer.v))
    expected = x + layer.out(mixed[:, 0].transpose(1, 2).reshape(x.shape))
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_time_table_is_interleaved_sines_and_cosines():
    table = cbdm.UNet(0, 32, (1,), 1, 0, 0.0).time_table
    assert table.shape == (1000, 32) and torch.equal(table[0], torch.tensor([0.0, 1.0] * 16))
    for i in (0, 5, 15):
        f = 10_000 ** (-2 * i / 32)
        assert table[37, 2 * i].item() == pytest.approx(math.sin(37 * f), abs=1e-5)
        assert table[37, 2 * i + 1].item() == pytest.approx(math.cos(37 * f), abs=1e-5)


def test_labels_matter_and_no_label_is_a_row_of_zeros():
    model = lively().eval()
    x_t, t, y = noisy_batch()
    with torch.no_grad():
        out, other, none = model(x_t, t, y), model(x_t, t, (y + 1) % 5), model(x_t, t, torch.full_like(y, NO_LABEL))
        assert (out - other).abs().amax((1, 2, 3)).min() > 1e-4
        assert (out - none).abs().amax((1, 2, 3)).min() > 1e-4
        model.label.weight[2] = 0
        assert torch.equal(model(x_t, t, torch.full_like(y, 2)), none)


def test_both_labels_in_one_pass_are_two_passes():
    model = lively().eval()
    x_t, t, y = noisy_batch()
    y_prime = (y + 2) % 5
    with torch.no_grad():
        h, h_prime = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, y_prime])).chunk(2)
        assert torch.allclose(h, model(x_t, t, y), atol=1e-6) and torch.allclose(h_prime, model(x_t, t, y_prime), atol=1e-6)


def test_initial_weights():
    model = cbdm.UNet(10, 32, (1, 2), 1, 1, 0.0)
    for module in model.modules():
        if isinstance(module, cbdm.ResidualBlock):
            fan = 9 * (module.conv1.in_channels + module.conv1.out_channels)  # Xavier: variance 2 / (fan in + fan out)
            assert module.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)
            assert module.conv2.weight.abs().max() < 1e-5 and module.conv1.bias.abs().max() == 0
        if isinstance(module, cbdm.SelfAttention):
            assert module.out.weight.abs().max() < 1e-4
    assert model.tail[2].weight.abs().max() < 1e-5
    assert model.label.weight.std().item() == pytest.approx(1, rel=0.1)


# ---------------------------------------------------------------------------------------------------------- sampling


def one_step_pair(t, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 3, 4, 4, generator=g, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("t", [1, 2, 99, 500, 999])
def test_ancestral_mean_is_ho_et_als_formula(t):
    """(x_t - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha): Ho et al. 2020, Alg. 2, line 4."""
    x_t, eps, z = one_step_pair(t)
    mean = cbdm.ancestral_step(x_t, eps, t, torch.zeros_like(z))
    expected = (x_t - BETA[t] / (1 - ALPHA_BAR[t]).sqrt() * eps) / (1 - BETA[t]).sqrt()
    assert torch.allclose(mean, expected, atol=1e-11)
    assert torch.allclose(cbdm.ancestral_step(x_t, eps, t, z) - mean, BETA[t].sqrt() * z, atol=1e-12)


def test_last_ancestral_step_has_no_noise():
    x_t, eps, z = one_step_pair(0)
    assert torch.allclose(cbdm.ancestral_step(x_t, eps, 0, z), cbdm.predict_x_0(x_t, eps, 0, clip=False), atol=1e-12)


@pytest.mark.parametrize("t", [1, 7, 500, 999])
def test_ddim_at_eta_one_is_the_posterior(t):
    """Mean of q(x_{t-1} | x_t, x_0), and its own variance beta (1 - alpha_bar_prev) / (1 - alpha_bar): not beta."""
    x_t, eps, z = one_step_pair(t)
    mean = cbdm.ddim_step(x_t, eps, t, t - 1, eta=1.0)
    assert torch.allclose(mean, cbdm.ancestral_step(x_t, eps, t, torch.zeros_like(z)), atol=1e-11)
    variance = BETA[t] * (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t])
    assert torch.allclose(cbdm.ddim_step(x_t, eps, t, t - 1, eta=1.0, z=z) - mean, variance.sqrt() * z, atol=1e-12)
    assert variance < BETA[t]


def test_posterior_variance_at_the_ends():
    """beta is 2.199 times the posterior variance at t = 1 and equals it at 999."""
    x_t, eps, z = one_step_pair(1)
    for t, ratio in ((1, 2.199), (999, 1.0)):
        small, large = (f(1.0) - f(0.0) for f in (
            lambda scale, t=t: cbdm.ddim_step(x_t, eps, t, t - 1, eta=1.0, z=scale * z),
            lambda scale, t=t: cbdm.ancestral_step(x_t, eps, t, scale * z)))
        assert ((large / small) ** 2).mean().item() == pytest.approx(ratio, rel=1e-3)


def test_ddim_with_the_true_noise_follows_the_trajectory():
    x_0, eps, z = one_step_pair(0)
    x_t = cbdm.q_sample(x_0, torch.tensor([990, 990]), eps)
    for t, t_prev in ((990, 640), (640, 30)):
        x_t = cbdm.ddim_step(x_t, eps, t, t_prev)
        assert torch.allclose(x_t, cbdm.q_sample(x_0, torch.tensor([t_prev, t_prev]), eps), atol=1e-10)
    assert torch.allclose(cbdm.ddim_step(x_t, eps, 30, -1), x_0, atol=1e-10)


def test_clipping_changes_nothing_inside_the_range_and_bounds_what_is_outside():
    x_0, eps, z = one_step_pair(0)
    inside = x_0.clamp(-1, 1)
    x_t = cbdm.q_sample(inside, torch.tensor([700, 700]), eps)
    for step in (lambda x, clip: cbdm.ddim_step(x, eps, 700, 600, clip=clip),
                 lambda x, clip: cbdm.ancestral_step(x, eps, 700, z, clip)):
        assert torch.allclose(step(x_t, True), step(x_t, False), atol=1e-10)
        assert not torch.allclose(step(5 * x_t, True), step(5 * x_t, False), atol=1e-2)
    assert cbdm.ddim_step(5 * x_t, eps, 30, -1, clip=True).abs().max() <= 1


def test_guidance_is_affine():
    a, b = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cbdm.guided(a, b, 0.0), a)
    assert torch.allclose(cbdm.guided(a, b, -1.0), b)
    assert torch.allclose(cbdm.guided(a, b, 1.6), a + 1.6 * (a - b), atol=1e-6)


def sampling_settings(**changes):
    args = cbdm.parse_settings(TINY)
    vars(args).update(dict(image_size=8, ddim_steps=10) | changes)
    return args


class Counting(torch.nn.Module):
    """Counts the images that go through a network."""

    def __init__(self, model):
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x, t, y):
        self.images += len(x)
        return self.model(x, t, y)


def test_sampling_is_repeatable_and_guidance_costs_a_second_pass():
    model = Counting(lively().float().eval())
    y = torch.tensor([0, 1, 2])
    first = cbdm.sample(model, y, sampling_settings(guidance=0.0), False, 7, "ddim")
    assert model.images == 3 * 10 and first.dtype == torch.uint8 and first.shape == (3, 3, 8, 8)
    assert torch.equal(first, cbdm.sample(model, y, sampling_settings(guidance=0.0), False, 7, "ddim"))
    model.images = 0
    guided = cbdm.sample(model, y, sampling_settings(guidance=2.0), False, 7, "ddim")
    assert model.images == 2 * 3 * 10 and not torch.equal(first, guided)
    assert not torch.equal(first, cbdm.sample(model, y, sampling_settings(guidance=0.0), False, 8, "ddim"))


def test_without_a_label_table_guidance_has_no_effect():
    model = lively().float().eval()
    torch.nn.init.zeros_(model.label.weight)
    y = torch.tensor([0, 1])
    a, b = (cbdm.sample(model, y, sampling_settings(guidance=w), False, 7, "ddim") for w in (0.0, 3.0))
    assert (a.int() - b.int()).abs().max() <= 1


def test_samplers_recover_a_known_distribution():
    """With the exact score of one Gaussian, x_0 ~ N(m, s^2), both samplers give its mean and spread."""
    m, s = 0.3, 0.2

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, y):
            a = ALPHA_BAR[t].view(-1, 1, 1, 1)
            return ((1 - a).sqrt() * (x - a.sqrt() * m) / (a * s * s + 1 - a)).float()

    for sampler, tolerance in (("ancestral", 0.01), ("ddim", 0.02)):
        args = sampling_settings(guidance=0.0, clip_x0=False, ddim_steps=100, prediction="eps", noise_schedule="linear")
        x = cbdm.sample(Exact(), torch.zeros(64).long(), args, False, 0, sampler).double() / 127.5 - 1
        assert x.mean().item() == pytest.approx(m, abs=tolerance) and x.std().item() == pytest.approx(s, abs=tolerance)


# ------------------------------------------------------------------------------------------- settings and training


def test_defaults_are_the_papers():
    a = cbdm.parse_settings(["--dataset", "cifar100lt"])
    assert (a.steps, a.batch_size, a.lr, a.warmup, a.ema, a.dropout) == (300_000, 48, 2e-4, 5000, 0.9999, 0.1)
    assert (a.tau, a.gamma, a.guidance, a.label_set) == (0.001, 0.25, 1.6, "train")
    assert (a.eval_images, a.sampler) == (50_000, "ancestral")
    assert cbdm.parse_settings(["--dataset", "cifar100lt", "--tau", "0"]).guidance == 0.8
    assert cbdm.parse_settings(["--dataset", "cifar10lt"]).guidance == 1.0
    b = cbdm.parse_settings(["--dataset", "cifar10"])
    assert (b.steps, b.batch_size, b.guidance) == (800_000, 128, 0.8)


def test_learning_rate():
    a = cbdm.parse_settings(["--dataset", "cifar100lt"])
    assert [cbdm.learning_rate(s, a) for s in (0, 2500, 5000, 299_999)] == [0, 1e-4, 2e-4, 2e-4]
    a.lr_schedule, a.steps, a.warmup = "cosine", 300, 100
    assert cbdm.learning_rate(200, a) == pytest.approx(1e-4) and cbdm.learning_rate(299, a) < 2e-8


def test_ema_after_k_steps():
    """The average of weights that jump from 0 to 1 and stay: 1 - decay^k."""
    average, weights = [torch.zeros(3)], [torch.ones(3)]
    for _ in range(100):
        torch._foreach_lerp_(average, weights, 1 - 0.9999)
    assert average[0][0].item() == pytest.approx(1 - 0.9999**100, rel=1e-4)


def test_run_directory_says_what_differs():
    assert cbdm.parse_settings(["--dataset", "cifar100lt"]).run_dir == "runs/cbdm-cifar100lt-s0"
    named = cbdm.parse_settings(["--dataset", "cifar100lt", "--tau", "0", "--seed", "3", "--device", "cpu"]).run_dir
    assert named == "runs/cbdm-cifar100lt-tau0.0-s3"


def weights_of(run_dir):
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return state, {**{"m." + k: v for k, v in state["model"].items()}, **{"e." + k: v for k, v in state["ema"].items()}}


def same_weights(a, b):
    (state_a, a), (state_b, b) = weights_of(a), weights_of(b)
    assert state_a["step"] == state_b["step"]
    return all(torch.equal(a[k], b[k]) for k in a)


def log_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


def start(*arguments, cwd):
    """cbdm.py as a process of its own, to send signals to."""
    return subprocess.Popen([sys.executable, ROOT / "cbdm.py", *arguments], cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_killed_run_continues_bit_for_bit(tmp_path, capsys):
    """SIGKILL, then the same command: weights, averages and losses of the run that was never stopped."""
    common = [*TINY, "--dropout", "0.1", "--save-every", "7", "--steps", "101"]
    whole = tmp_path / "whole"
    cbdm.main([*common, "--run-dir", str(whole)])
    killed = tmp_path / "killed"
    process = start(*common, "--run-dir", killed, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (killed / "log.jsonl").exists() or not (killed / "log.jsonl").read_text():  # past the first line of the log
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = weights_of(killed)[0]["step"]
    assert 0 < stopped_at < 101
    cbdm.main([*common, "--run-dir", str(killed)])
    assert f"resumed at step {stopped_at}" in capsys.readouterr().out
    assert same_weights(whole, killed)
    assert log_of(whole) == log_of(killed)


def test_sigterm_saves_first(tmp_path):
    common = [*TINY, "--save-every", "100000", "--steps", "60"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    cbdm.main([*common, "--run-dir", str(whole)])
    process = start(*common, "--run-dir", stopped, cwd=tmp_path)
    while "2478 images" not in process.stdout.readline():  # the line that says training begins
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in out
    assert 0 < weights_of(stopped)[0]["step"] < 60
    cbdm.main([*common, "--run-dir", str(stopped)])
    assert same_weights(whole, stopped)


def test_tau_zero_is_ddpm(tmp_path):
    """The script with --tau 0 against a plain DDPM loop written here: the same weights after some steps."""
    import datasets

    run = [*TINY, "--tau", "0", "--steps", "5", "--amp", "off", "--device", "cpu", "--prediction", "eps",
           "--noise-schedule", "linear"]
    cbdm.main([*run, "--run-dir", str(tmp_path / "run")])
    args = cbdm.parse_settings(run)
    torch.manual_seed(args.seed)
    model = cbdm.UNet(10, args.channels, args.multipliers, args.blocks, args.attention_level, args.dropout)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2))
    batches = datasets.Batches(datasets.load("shapeslt", "data"), args.batch_size, flip=True, device="cpu", seed=args.seed)
    for step in range(5):
        x, y = next(batches)
        t, eps = torch.randint(0, 1000, (len(y),)), torch.randn_like(x)
        a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
        y[torch.rand(len(y)) < 0.1] = -1
        loss = ((model(a.sqrt().float() * x + (1 - a).sqrt().float() * eps, t, y) - eps) ** 2).mean()
        optimizer.param_groups[0]["lr"] = args.lr * step / args.warmup
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    trained = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, weight in model.state_dict().items():
        assert torch.allclose(trained[name], weight, atol=1e-6), name


def test_fine_tuning_across_class_counts(tmp_path):
    """--init-from takes another run's averaged weights; with other classes, all but the label table."""
    folder = tmp_path / "pictures"
    for c in range(3):
        (folder / "train" / f"class{c}").mkdir(parents=True)
        for i in range(2 + c):
            Image.fromarray(np.full((16, 16, 3), 40 * c + i, np.uint8)).save(folder / "train" / f"class{c}" / f"{i}.png")
    size = ["--data-dir", str(tmp_path / "data"), "--image-size", "16", "--blocks", "1", "--lr", "1e-3", "--warmup", "0",
            "--prediction", "v", "--noise-schedule", "cosine"]
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    cbdm.main([*TINY, *size, "--steps", "3", "--run-dir", str(first)])
    start = torch.load(first / "checkpoint.pt", weights_only=True)["ema"]
    # A rate too small for float32 leaves the loaded weights as they are.
    still = ["--init-from", str(first / "checkpoint.pt"), "--lr", "1e-30", "--steps", "1"]
    cbdm.main([*TINY, *size, *still, "--run-dir", str(second)])
    loaded = torch.load(second / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(loaded[k], start[k]) for k in start)
    cbdm.main([*TINY, *size, *still, "--run-dir", str(other), "--dataset", f"folder:{folder}"])
    loaded = torch.load(other / "checkpoint.pt", weights_only=True)["model"]
    assert [k for k in start if loaded[k].shape != start[k].shape or not torch.equal(loaded[k], start[k])] == ["label.weight"]
    assert loaded["label.weight"].shape == (3, 32)


def test_each_option_of_the_method_trains(tmp_path):
    """Two steps with each: the losses logged are finite, and gamma 0 and tau 0 do what they say."""
    for i, flags in enumerate((["--gamma", "0"], ["--regularise-after", "0.5"], ["--label-set", "bal"], ["--label-set", "sqrt"],
                               ["--resample", "uniform"], ["--resample", "sqrt"], ["--drop-whole-batch"],
                               ["--drop-rate", "1"])):
        cbdm.main([*TINY, *flags, "--steps", "2", "--run-dir", str(tmp_path / str(i))])
        row = log_of(tmp_path / str(i))[-1]
        assert math.isfinite(row["L_DM"]) and row["L_r"] >= 0
        if flags[0] == "--drop-rate":
            assert row["L_r"] == row["L_rc"] == 0


# -------------------------------------------------------------------------------------------------------------- runs


def test_a_whole_run_leaves_everything_it_promises(tmp_path, run_script, judge_dir):
    small = [*TINY[:-4], "--steps", "4", "--sample-every", "2", "--eval-images", "20", "--ddim-steps", "2",
             "--data-dir", str(judge_dir)]
    done = run_script("cbdm.py", *small, "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["steps"] == 4 and config["torch"] == torch.__version__ and config["parameters"] > 0
    grids = sorted(p.name for p in (run / "samples").iterdir())
    assert grids == ["step-0000002.png", "step-0000004.png"]
    assert Image.open(run / "samples" / grids[0]).size == (10 * 68 + 4, 10 * 68 + 4)  # ten by ten, 64 pixels and a gap of 4
    with np.load(run / "samples.npz", allow_pickle=False) as samples:
        assert samples["images"].shape == (20, 16, 16, 3) and samples["images"].dtype == np.uint8
        assert (np.bincount(samples["labels"]) == 2).all()
    assert json.loads((run / "metrics.json").read_text()) and (run / "per_class.csv").read_text()
    # a second look at the same run, with another sampler; the weights stay
    before = (run / "checkpoint.pt").read_bytes()
    again = run_script("cbdm.py", *small, "--run-dir", "run", "--eval-only", "--guidance", "0", cwd=tmp_path)
    assert again.returncode == 0 and (run / "checkpoint.pt").read_bytes() == before


def test_missing_inception_weights_do_not_spoil_a_run(tmp_path, run_script):
    """Samples are written, the message says what to copy where, and the status is 0."""
    small = [*TINY[:-4], "--steps", "1", "--sample-every", "0", "--eval-images", "10", "--ddim-steps", "2"]
    environment = {"TORCH_HOME": str(tmp_path / "hub"), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    process = subprocess.run([sys.executable, ROOT / "cbdm.py", *small, "--features", "inception-fid", "--run-dir", "run"],
                             cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "samples.npz").exists()
    assert "not scored" in process.stdout and "pt_inception-2015-12-05-6726825d.pth" in process.stdout


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, monkeypatch):
    args = sampling_settings(guidance=0.0, ddim_steps=2)
    model, labels = Counting(lively().float().eval()), torch.arange(12) % 5
    monkeypatch.setitem(cbdm.SAMPLING_BATCH, "cpu", 4 * 8**2 / 32**2)  # 4 images of 8 x 8 at once
    whole = cbdm.sample_all(tmp_path / "whole.npz", model, labels, args, False, 9)
    monkeypatch.setattr(cbdm, "PART_SECONDS", 0)
    sampled, calls = cbdm.sample, []

    def interrupted(*a):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return sampled(*a)

    monkeypatch.setattr(cbdm, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cbdm.sample_all(tmp_path / "samples.npz", model, labels, args, False, 9)
    monkeypatch.setattr(cbdm, "sample", sampled)
    model.images = 0
    again = cbdm.sample_all(tmp_path / "samples.npz", model, labels, args, False, 9)
    assert torch.equal(whole, again) and model.images == 4 * 2 and not (tmp_path / "samples.part").exists()
    model.images = 0  # and what is finished is not made again, unless something about it is other
    assert torch.equal(cbdm.sample_all(tmp_path / "samples.npz", model, labels, args, False, 9), whole) and model.images == 0
    assert not torch.equal(cbdm.sample_all(tmp_path / "samples.npz", model, labels, args, False, 10)[:0], whole)
    assert model.images == 12 * 2


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("flags", [
    ["--steps", "0"], ["--batch-size", "-3"], ["--lr", "nan"], ["--lr", "0"], ["--tau", "-1"], ["--gamma", "inf"],
    ["--ema", "1"], ["--drop-rate", "2"], ["--channels", "42"],
    ["--image-size", "17"], ["--ddim-steps", "1001"], ["--ddim-steps", "1"],

    ["--save-every", "0"],
    ["--eval-images", "-1"], ["--rho", "0.5"], ["--seed", "-1"], ["--device", "tpu"], ["--dataset", "cifar100l"],
    ["--steps", "many"], ["--no-such-flag"], ["--multipliers", "0", "1"], ["--eval-only"],
    ["--init-from", "nowhere.pt"], ["--attention-level", "2"], ["--features", "classifier:nowhere.pt"],
])
def test_senseless_input_is_refused_by_name(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        cbdm.main([*TINY, *flags])
    assert "\n" not in str(error.value) and len(str(error.value)) > 10
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_errors_are_one_line_and_status_two(tmp_path, run_script):
    done = run_script("cbdm.py", *TINY, "--dataset", "shapslt", cwd=tmp_path)
    assert done.returncode == 2 and "shapeslt" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_another_configuration_in_the_directory(tmp_path):
    run = [*TINY, "--steps", "2", "--run-dir", str(tmp_path / "run")]
    cbdm.main(run)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="--tau 0.001 there, 0.5 now.*--seed 0 there, 4 now"):
        cbdm.main([*run, "--tau", "0.5", "--seed", "4"])
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_damaged_checkpoint_is_kept_and_named(tmp_path):
    run = [*TINY, "--steps", "2", "--run-dir", str(tmp_path / "run")]
    cbdm.main(run)
    file = tmp_path / "run" / "checkpoint.pt"
    damaged = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="checkpoint.pt is damaged"):
        cbdm.main(run)
    assert file.read_bytes() == damaged


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run = [*TINY, "--save-every", "1", "--lr", "1e20", "--warmup", "3", "--steps", "50", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="NaN|infinite"):
        cbdm.main(run)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < 50 and all(w.isfinite().all() for w in state["model"].values())


def test_weights_averaged_in_the_run_are_the_average_of_the_weights(tmp_path):
    """Two steps from the same seed: ema_2 = d^2 w_0 + d (1 - d) w_1 + (1 - d) w_2."""
    common = [*TINY, "--ema", "0.5", "--warmup", "0", "--lr-schedule", "constant"]
    states = []
    for steps in ("1", "2"):
        cbdm.main([*common, "--steps", steps, "--run-dir", str(tmp_path / steps)])
        states.append(torch.load(tmp_path / steps / "checkpoint.pt", weights_only=True))
    w_1, w_2 = states[0]["model"], states[1]["model"]
    w_0 = {k: 2 * states[0]["ema"][k] - w_1[k] for k in w_1}
    for k in w_1:
        assert torch.allclose(states[1]["ema"][k], 0.25 * w_0[k] + 0.25 * w_1[k] + 0.5 * w_2[k], atol=1e-6)
    assert copy.deepcopy(w_1).keys() == states[1]["ema"].keys()
