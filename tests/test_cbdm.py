"""cbdm.py: each equation against a value found another way, the network's size, samplers, resume, errors,
whole runs.

An untrained U-Net predicts almost nothing (its last layers start near zero), so tests that need a label to
matter draw
those layers anew first: `lively`.
"""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, edited, state_of
from PIL import Image

import cbdm
import datasets
import metrics
from cbdm import NO_LABEL, T
from datasets import InputError

ALPHA_BAR = cbdm.noise_schedule("linear")
BETA = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)

TINY = ["--dataset", "shapeslt", "--channels", "8", "--multipliers", "1", "1", "--attention-level", "1",
        "--batch-size", "8",
        "--steps", "3", "--regularise-after", "0", "--sample-every", "0", "--eval-images", "0", "--device",
        "cpu"]


def lively(num_classes=5, channels=32, multipliers=(1, 2), dropout=0.0, seed=0):
    """A small U-Net in float64 whose near-zero layers are drawn anew, so that every input matters."""
    torch.manual_seed(seed)
    model = cbdm.UNet(num_classes, channels, multipliers, blocks=1, attention_level=1,
                      dropout=dropout).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight)
    return model


def noisy_batch(n=6, size=8, num_classes=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, 3, size, size, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 500, 750, 999])[:n]
    return x_t, t, torch.arange(n) % num_classes


def image(x_t, eps, t, clip=False):
    """The image that is left of x_t without this noise."""
    return cbdm.predict_x_0(x_t, eps, t, "eps", clip, ALPHA_BAR)


class Answers(torch.nn.Module):
    """A network that gives these answers, float32."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.weight = torch.nn.Parameter(torch.zeros(1))  # where the network is

    def forward(self, x, t, y):
        return self.answer(x, t, y).float()


# ------------------------------------------------------------------------------- schedule and Eq. 1


def test_schedule_end_points():
    assert len(BETA) == len(ALPHA_BAR) == 1000
    for t, value in {0: 0.9999, 1: 0.9997800921, 99: 0.8970181457, 499: 0.0785872429,
                     999: 4.0358298e-05}.items():
        assert math.isclose(ALPHA_BAR[t], value, rel_tol=1e-7)
    assert (ALPHA_BAR.diff() < 0).all()


def test_forward_process_is_undone_by_the_true_noise():
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, T, 3, 2, 2, dtype=torch.float64).unbind(0)
    x_t = cbdm.q_sample(x_0, torch.arange(T), eps, ALPHA_BAR)
    by_hand = math.sqrt(0.0785872429) * x_0[499] + math.sqrt(1 - 0.0785872429) * eps[499]
    assert torch.allclose(x_t[499], by_hand, atol=1e-8)
    back = torch.stack([image(x_t[t], eps[t], t) for t in range(T)])
    assert torch.allclose(back, x_0, atol=1e-10)


def test_cosine_schedule():
    """Nichol & Dhariwal 2021: alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + .008) / 1.008 * pi/2)."""
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    alpha_bar = cbdm.noise_schedule("cosine")
    for t in (0, 250, 500, 900):
        assert math.isclose(alpha_bar[t], f((t + 1) / T) / f(0), rel_tol=1e-9)
    assert 0 < alpha_bar[999] < 1e-5


def test_velocity_and_noise_are_the_same_statement():
    x_0, eps = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64,
                           generator=torch.Generator().manual_seed(0)).unbind(0)
    for t in (0, 400, 999):
        times = torch.full((4,), t)
        v = cbdm.velocity(x_0, times, eps, ALPHA_BAR)
        # the derivative of x = cos(a) x_0 + sin(a) eps with respect to the angle a, by a small step
        a, d = math.atan2((1 - ALPHA_BAR[t]).sqrt(), ALPHA_BAR[t].sqrt()), 1e-6
        x = lambda a: math.cos(a) * x_0 + math.sin(a) * eps  # noqa: E731
        assert torch.allclose(v, (x(a + d) - x(a - d)) / (2 * d), atol=1e-7)
        x_t = cbdm.q_sample(x_0, times, eps, ALPHA_BAR)
        assert torch.allclose(cbdm.predict_x_0(x_t, v, t, "v", False, ALPHA_BAR), x_0, atol=1e-9)


def test_ddpm_loss_is_the_mean_over_pixels():
    h, eps = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    eps[0, 0, 0, 0] = 3.0
    assert cbdm.ddpm_loss(h, eps).item() == pytest.approx(9 / (2 * 3 * 16))


# ----------------------------------------------------------------------------------------------------------
# Eq. 4


@pytest.fixture
def predictions():
    g = torch.Generator().manual_seed(3)
    h, h_prime, eps = torch.randn(3, 6, 3, 4, 4, generator=g, dtype=torch.float64).unbind(0)
    return (
        h.requires_grad_(),
        h_prime.requires_grad_(),
        eps,
        torch.tensor([0, 10, 300, 500, 998, 999]),
        torch.ones(6).bool(),
    )


def test_loss_and_gradients_in_closed_form(predictions):
    """dL/dh = 2/N [(h - eps) + w (h - h')], dL/dh' = 2/N gamma w (h' - h), with w = tau t and N the number of
    entries."""
    h, h_prime, eps, t, labelled = predictions
    gamma, tau = 0.25, 0.001
    L_r, L_rc = cbdm.regularisers(h, h_prime, t, tau, labelled)
    loss = cbdm.ddpm_loss(h, eps) + L_r + gamma * L_rc
    loss.backward()
    w = (tau * t).double().view(-1, 1, 1, 1)
    a, b = h.detach().numpy(), h_prime.detach().numpy()
    expected = sum(((a[i] - eps[i].numpy()) ** 2).sum() + (1 + gamma) * tau * t[i].item()
                   * ((a[i] - b[i]) ** 2).sum()
                   for i in range(6)) / h.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    d = (h - h_prime).detach()
    assert torch.allclose(h.grad, 2 / h.numel() * ((h.detach() - eps) + w * d), atol=1e-15)
    assert torch.allclose(h_prime.grad, 2 / h.numel() * gamma * w * -d, atol=1e-15)


def test_the_two_terms_are_equal_and_weighted_by_t(predictions):
    h, h_prime, _, t, labelled = predictions
    L_r, L_rc = cbdm.regularisers(h, h_prime, t, 0.001, labelled)
    assert L_r.item() == L_rc.item() > 0
    ones, zeros = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    for step, weight in ((0, 0.0), (500, 0.5), (999, 0.999)):
        L_r, _ = cbdm.regularisers(ones, zeros, torch.tensor([step]), 0.001, torch.ones(1).bool())
        assert L_r.item() == pytest.approx(weight)


def test_gamma_one_is_the_plain_squared_distance(predictions):
    h, h_prime, _, t, labelled = predictions
    sum(cbdm.regularisers(h, h_prime, t, 0.001, labelled)).backward()
    a, b = h.detach().requires_grad_(), h_prime.detach().requires_grad_()
    ((0.001 * t).view(-1, 1, 1, 1) * (a - b) ** 2).mean().backward()
    assert torch.allclose(h.grad, a.grad, atol=1e-15) and torch.allclose(h_prime.grad, b.grad, atol=1e-15)


def test_images_without_label_have_no_regulariser_but_count(predictions):
    h, h_prime, _, t, _ = predictions
    none = cbdm.regularisers(h, h_prime, t, 0.001, torch.zeros(6).bool())
    assert none[0].item() == none[1].item() == 0
    one = cbdm.regularisers(h, h_prime, t, 0.001, torch.arange(6) == 3)[0]
    # t[3] = 500
    assert one.item() == pytest.approx(0.5 * ((h[3] - h_prime[3]) ** 2).mean().item() / 6, rel=1e-12)


def test_stop_gradients_reach_the_label_table():
    """L_r moves the rows of y and never those of y'; L_rc the other way round."""
    model = lively(num_classes=6).train()
    x_t, t, _ = noisy_batch(3)
    t = torch.tensor([500, 700, 999])
    y, y_prime = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    for term, moved, still in ((0, y, y_prime), (1, y_prime, y)):
        model.zero_grad()
        h, h_prime = model(x_t, t, y), model(x_t, t, y_prime)
        cbdm.regularisers(h, h_prime, t, 0.001, torch.ones(3).bool())[term].backward()
        rows = model.label.weight.grad.abs().sum(1)
        assert (rows[moved] > 0).all() and (rows[still] == 0).all()


def test_equal_labels_give_no_regulariser_unless_dropout_differs():
    x_t, t, y = noisy_batch()
    for dropout, expect_zero in ((0.0, True), (0.5, False)):
        model = lively(dropout=dropout).train()
        h, h_prime = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, y])).chunk(2)
        value = cbdm.regularisers(h, h_prime, t, 0.001, torch.ones(6).bool())[0].item()
        assert value < 1e-20 if expect_zero else value > 1e-6


def test_label_distributions():
    counts = torch.tensor([int(500 * 0.01 ** (c / 99)) for c in range(100)])
    ratio = lambda q: (q[0] / q[-1]).item()  # noqa: E731
    train, bal, sqrt = (cbdm.label_distribution(counts, s) for s in ("train", "bal", "sqrt"))
    assert ratio(train) == pytest.approx(100) and ratio(sqrt) == pytest.approx(10)
    assert ratio(bal) == pytest.approx(1)
    # the chance that y' = y, from the data: sum of p(y) q*(y)
    p = counts / counts.sum()
    for q, chance in ((train, 0.0238), (sqrt, 0.0174), (bal, 0.0100)):
        assert q.sum().item() == pytest.approx(1) and (p * q).sum().item() == pytest.approx(chance, abs=5e-5)
    even = [cbdm.label_distribution(torch.full((7,), 30), s) for s in ("train", "bal", "sqrt")]
    assert torch.equal(even[0], even[1]) and torch.allclose(even[1], even[2])


# ------------------------------------------------------------------------------------------ network


@pytest.mark.parametrize("num_classes, parameters", [(10, 35_751_427), (100, 35_797_507)])
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
    mixed = torch.nn.functional.scaled_dot_product_attention(
        tokens(layer.q), tokens(layer.k), tokens(layer.v)
    )
    expected = x + layer.out(mixed[:, 0].transpose(1, 2).reshape(x.shape))
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_time_is_told_as_interleaved_sines_and_cosines():
    table = cbdm.UNet(1, 32, (1,), 1, 0, 0.0).waves(torch.arange(38))
    assert table.shape == (38, 32) and torch.equal(table[0], torch.tensor([0.0, 1.0] * 16))
    for i in (0, 5, 15):
        f = 10_000 ** (-2 * i / 32)
        assert table[37, 2 * i].item() == pytest.approx(math.sin(37 * f), abs=1e-5)
        assert table[37, 2 * i + 1].item() == pytest.approx(math.cos(37 * f), abs=1e-5)


def test_labels_matter_and_no_label_is_a_row_of_zeros():
    model = lively().eval()
    x_t, t, y = noisy_batch()
    with torch.no_grad():
        out, other, none = (
            model(x_t, t, y),
            model(x_t, t, (y + 1) % 5),
            model(x_t, t, torch.full_like(y, NO_LABEL)),
        )
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
        assert torch.allclose(h, model(x_t, t, y),
                              atol=1e-6) and torch.allclose(h_prime, model(x_t, t, y_prime), atol=1e-6)


def test_initial_weights():
    model = cbdm.UNet(10, 32, (1, 2), 1, 1, 0.0)
    for module in model.modules():
        if isinstance(module, cbdm.ResidualBlock):
            # Xavier: variance 2 / (fan in + fan out)
            fan = 9 * (module.conv1.in_channels + module.conv1.out_channels)
            assert module.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)
            assert module.conv2.weight.abs().max() < 1e-5 and module.conv1.bias.abs().max() == 0
        if isinstance(module, cbdm.SelfAttention):
            assert module.out.weight.abs().max() < 1e-4
    assert model.tail[2].weight.abs().max() < 1e-5
    assert model.label.weight.std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("num_classes, parameters", [(10, 35_756_035), (100, 35_802_115)])
def test_parameters_with_ada(num_classes, parameters):
    model = cbdm.UNet(num_classes, 128, (1, 2, 2, 2), 2, 1, 0.1, ada=True)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_soft_labels_are_the_mean_of_the_embeddings():
    model = lively().eval()
    x_t, t, y = noisy_batch()
    one_hot = torch.nn.functional.one_hot(y, 5).double()
    with torch.no_grad():
        assert torch.equal(model(x_t, t, one_hot), model(x_t, t, y))  # to the bit
        assert torch.equal(model(x_t, t, 0 * one_hot), model(x_t, t, torch.full_like(y, NO_LABEL)))
        soft = torch.tensor([0.5, 0.25, 0.25, 0, 0]).double().expand(6, 5)
        mean = (2 * model.label.weight[0] + model.label.weight[1] + model.label.weight[2]) / 4
        mixed = model(x_t, t, soft)
        model.label.weight[3] = mean
        assert torch.allclose(mixed, model(x_t, t, torch.full_like(y, 3)), atol=1e-12)
        with torch.autocast("cpu", torch.bfloat16):  # float32 all the same
            float_model = lively().float()
            a, b = (float_model.embedding(t, labels, None) for labels in (one_hot.float(), y))
            assert torch.equal(a, b)


def test_zeros_told_are_nothing_told():
    torch.manual_seed(0)
    model = cbdm.UNet(5, 32, (1, 2), 1, 1, 0.0, ada=True).double()
    randomise(model)
    x_t, t, y = noisy_batch()
    with torch.no_grad():
        zeros = torch.zeros(6, 9, dtype=torch.float64)
        assert torch.equal(model(x_t, t, y, zeros), model(x_t, t, y))
        assert not torch.allclose(model(x_t, t, y, zeros + 1), model(x_t, t, y))


def test_parameters_of_the_papers_vit():
    """Layer by layer from the table of Diffusion-ViT: width 384, 12 heads, 9 layers, 65 tokens."""
    width, tokens, E = 384, 65, 260
    layer = 4 * width + (E + 1) * 2 * tokens  # two norms; scale and shift of each token
    layer += 3 * (width + 1) * width + (width + 1) * width  # q, k, v; out
    layer += (width + 1) * 2 * width + (2 * width + 1) * width
    ends = (48 + 1) * width + width + tokens * width + (width + 1) * 48
    told = (width + 1) * E + (E + 1) * E + 100 * E
    model = cbdm.ViT(100, 128, 32, 0.1)
    assert sum(p.numel() for p in model.parameters()) == 9 * layer + ends + told
    assert 9 * layer + ends + told == pytest.approx(11.2e6, rel=0.02)
    assert model.layers[0].attention.num_heads == 12 and len(model.layers) == 9


def test_the_vit_sees_its_patches_the_label_and_the_step():
    torch.manual_seed(0)
    model = cbdm.ViT(5, 32, 16, 0.0, ada=True, depth=2).double().eval()
    x_t, t, y = noisy_batch(size=16)
    with torch.no_grad():
        h = model(x_t, t, y)
        assert h.shape == x_t.shape
        told = torch.ones(6, 9, dtype=torch.float64)
        none = torch.full_like(y, NO_LABEL)
        for other in (model(x_t, t, (y + 1) % 5), model(x_t, t + 7, y), model(x_t, t, none),
                      model(x_t, t, y, told)):
            assert (h - other).abs().amax((1, 2, 3)).min() > 1e-5
        # Without layers an output patch depends on its own input patch alone: they keep their places.
        model.layers = torch.nn.ModuleList()
        h = model(x_t, t, y)
        x_t[:, :, 6, 3] += 1  # in the patch of rows 6, 7 and columns 2, 3
        moved = (model(x_t, t, y) != h).any(1)
        assert moved[:, 6:8, 2:4].all() and moved.sum() == 6 * 4


# ---------------------------------------------------------------------------------------------- EDM


def test_edm_draws_log_normal_levels_whose_rank_is_t():
    torch.manual_seed(0)
    t = torch.randint(0, T, (40_000,))
    sigma = cbdm.edm_sigma(t).log().numpy()
    assert scipy.stats.kstest(sigma, scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 0.01
    assert np.array_equal(np.floor(1000 * scipy.stats.norm(-1.2, 1.2).cdf(sigma) + 1e-9), t.numpy())
    assert 80 > np.exp(sigma).max() > 16


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_edm_preconditioning(sigma):
    """Karras et al. 2022, App. B.6: input and target have variance 1 if the data has sigma_data^2."""
    skip, out, scale = cbdm.edm_coefficients(sigma)
    assert scale**2 * (0.25 + sigma**2) == pytest.approx(1)
    # target = (x_0 - skip (x_0 + sigma eps)) / out
    assert ((1 - skip) ** 2 * 0.25 + (skip * sigma) ** 2) / out**2 == pytest.approx(1)
    # lambda = 1 / out^2, their Table 1
    assert 1 / out**2 == pytest.approx((sigma**2 + 0.25) / (0.5 * sigma) ** 2)
    x_0, eps = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64).unbind(0)
    seen, target = cbdm.edm_pair(x_0, sigma, eps)
    noisy = x_0 + sigma * eps
    assert torch.allclose(seen, scale * noisy) and torch.allclose(skip * noisy + out * target, x_0, atol=1e-9)


def test_edm_loss_of_the_best_denoiser_of_a_gaussian():
    """x_0 ~ N(0, s^2): D = s^2 / (s^2 + sigma^2) x leaves s^2 sigma^2 / (s^2 + sigma^2), times lambda."""
    torch.manual_seed(0)
    s, sigma = 0.3, 0.7
    x_0, eps = s * torch.randn(400_000, dtype=torch.float64), torch.randn(400_000, dtype=torch.float64)
    seen, target = cbdm.edm_pair(x_0, sigma, eps)
    skip, out, scale = cbdm.edm_coefficients(sigma)
    best = (s**2 / (s**2 + sigma**2) - skip) * seen / scale / out  # F of that D
    weighed = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * s**2 * sigma**2 / (s**2 + sigma**2)
    assert cbdm.ddpm_loss(best, target).item() == pytest.approx(weighed, rel=0.01)
    for other in (0.9, 1.1):
        assert cbdm.ddpm_loss(other * best, target) > cbdm.ddpm_loss(best, target)
    assert cbdm.ddpm_loss(best, target, absolute=True) == (best - target).abs().mean()


def test_heun_is_of_second_order():
    """For x_0 ~ N(m, s^2) the ODE keeps (x - m) / sqrt(s^2 + sigma^2): its end is known."""
    m, s = 0.3, 0.25
    x = 80 * torch.randn(50, dtype=torch.float64)
    calls = []

    def denoised(x, sigma):
        calls.append(sigma)
        return m + (x - m) * s**2 / (s**2 + sigma**2)

    end = m + (x - m) * s / math.sqrt(s**2 + 80**2)
    errors = [(cbdm.heun(denoised, x, steps) - end).abs().max().item() for steps in (18, 36, 72)]
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([4, 4], rel=0.3)
    calls.clear()
    cbdm.heun(denoised, x, 18)
    assert len(calls) == 35 and calls[0] == pytest.approx(80) and calls[-1] == pytest.approx(0.002)
    # Their Eq. 5, written out for the second level of 18.
    first, last = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert sorted(set(calls))[-2] == pytest.approx((first + (last - first) / 17) ** 7)


def test_edm_samples_a_known_distribution():
    """Through `sample`: the network answers for F, told ln sigma / 4 and shown c_in x."""
    m, s = 0.3, 0.2

    def exact(x, t, y):
        sigma = (4 * t.double()).exp().view(-1, 1, 1, 1)
        x_t = x * (sigma**2 + 0.25).sqrt()
        best = m + (x_t - m) * s**2 / (s**2 + sigma**2)
        skip = 0.25 / (0.25 + sigma**2)
        return (best - skip * x_t) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())

    for omega in (0.0, 1.0):  # with both answers the same guidance changes nothing
        args = sampling_settings(guidance=omega, clip_x0=False, ddim_steps=40, prediction="edm")
        x = cbdm.sample(Answers(exact), torch.zeros(64).long(), args, False, 0, "heun").double() / 127.5 - 1
        assert x.mean().item() == pytest.approx(m, abs=0.01) and x.std().item() == pytest.approx(s, abs=0.01)


# ----------------------------------------------------------------------------------------- sampling


def one_step_pair(t, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 3, 4, 4, generator=g, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("t", [1, 2, 99, 500, 999])
def test_ancestral_mean_is_ho_et_als_formula(t):
    """(x_t - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha): Ho et al. 2020, Alg. 2, line 4."""
    x_t, eps, z = one_step_pair(t)
    mean = cbdm.ancestral_step(x_t, image(x_t, eps, t), t, torch.zeros_like(z), ALPHA_BAR)
    expected = (x_t - BETA[t] / (1 - ALPHA_BAR[t]).sqrt() * eps) / (1 - BETA[t]).sqrt()
    assert torch.allclose(mean, expected, atol=1e-11)
    noisy = cbdm.ancestral_step(x_t, image(x_t, eps, t), t, z, ALPHA_BAR)
    assert torch.allclose(noisy - mean, BETA[t].sqrt() * z, atol=1e-12)


def test_last_ancestral_step_has_no_noise():
    x_t, eps, z = one_step_pair(0)
    last = cbdm.ancestral_step(x_t, image(x_t, eps, 0), 0, z, ALPHA_BAR)
    assert torch.allclose(last, (x_t - 0.01 * eps) / math.sqrt(0.9999), atol=1e-12)  # alpha_bar_0 = 0.9999


def test_ancestral_variance_is_the_large_one():
    """beta_t is 2.199 times the variance of the posterior at t = 1, and as large at 999 (Ho et al. 2020,
    §3.2)."""
    x_t, eps, z = one_step_pair(1)
    for t, ratio in ((1, 2.199), (999, 1.0)):
        x_0 = image(x_t, eps, t)
        with_noise, without = (cbdm.ancestral_step(x_t, x_0, t, s * z, ALPHA_BAR) for s in (1, 0))
        posterior = BETA[t] * (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t])
        assert (((with_noise - without) / z) ** 2 / posterior).mean().item() == pytest.approx(ratio, rel=1e-3)


def test_ddim_with_the_true_noise_follows_the_trajectory():
    x_0, eps, z = one_step_pair(0)
    x_t = cbdm.q_sample(x_0, torch.tensor([990, 990]), eps, ALPHA_BAR)
    for t, t_prev in ((990, 640), (640, 30)):
        x_t = cbdm.ddim_step(x_t, image(x_t, eps, t), t, t_prev, ALPHA_BAR)
        assert torch.allclose(x_t, cbdm.q_sample(x_0, torch.tensor([t_prev, t_prev]), eps, ALPHA_BAR),
                              atol=1e-10)
    assert torch.allclose(cbdm.ddim_step(x_t, image(x_t, eps, 30), 30, -1, ALPHA_BAR), x_0, atol=1e-10)


def solver_error(sampler, steps, alpha_bar, times):
    """Largest error of x_0 for x_0 ~ N(m, s^2), whose score and whose paths, the ODE's solutions, are known:
    x_t = sqrt(alpha_bar) m + sqrt(alpha_bar s^2 + 1 - alpha_bar) xi, xi fixed along a path."""
    m, s, xi, before = 0.3, 0.25, torch.linspace(-2, 2, 9, dtype=torch.float64), None
    spread = (alpha_bar * s * s + 1 - alpha_bar).sqrt()
    x = alpha_bar[times[0]].sqrt() * m + spread[times[0]] * xi
    for t, t_prev in zip(times, times[1:], strict=False):
        a = alpha_bar[t].sqrt()
        x_0 = m + a * s * s / spread[t] ** 2 * (x - a * m)
        if sampler == "ddim":
            x = cbdm.ddim_step(x, x_0, t, t_prev, alpha_bar)
        else:
            x, before = cbdm.dpm_step(x, x_0, before, t, t_prev, alpha_bar), (t, x_0)
    end = times[-1]
    exact = m + s * xi if end < 0 else alpha_bar[end].sqrt() * m + spread[end] * xi
    return (x - exact).abs().max().item()


def test_dpm_is_of_second_order_and_ddim_of_first():
    """On a schedule so fine that whole t are as good as real ones: twice the steps, a fourth of the error."""
    fine = torch.cumprod(1 - torch.linspace(1e-6, 2e-4, 100_000, dtype=torch.float64), 0)
    log_ratio = cbdm.log_snr(fine)
    for sampler, order in (("ddim", 1), ("dpm", 2)):
        errors = []
        for steps in (40, 80, 160):
            wanted = torch.linspace(log_ratio[-1], log_ratio[100], steps + 1, dtype=torch.float64)
            times = (log_ratio - wanted[:, None]).abs().argmin(1).tolist()
            errors.append(solver_error(sampler, steps, fine, times))
        orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
        assert orders == pytest.approx([order, order], abs=0.25), (sampler, errors)


def test_twenty_calls_of_dpm_are_worth_a_hundred_of_ddim():
    for kind in ("linear", "cosine"):
        alpha_bar = cbdm.noise_schedule(kind)
        error = {}
        for sampler, steps in (("dpm", 20), ("ddim", 100)):
            times = cbdm.sampling_times(sampler, steps, alpha_bar)
            assert len(times) <= steps and times == sorted(times, reverse=True)
            error[sampler] = solver_error(sampler, steps, alpha_bar, [*times, -1])
        assert error["dpm"] < error["ddim"], (kind, error)


def test_sampling_times():
    assert cbdm.sampling_times("ancestral", 5, ALPHA_BAR) == list(range(999, -1, -1))
    assert cbdm.sampling_times("ddim", 4, ALPHA_BAR) == [750, 500, 250, 0]
    times = cbdm.sampling_times("dpm", 10, ALPHA_BAR)
    assert times[0] == 999 and times[-1] == 0  # linear; with cosine the last steps are noise, and skipped
    assert 990 < cbdm.sampling_times("dpm", 10, cbdm.noise_schedule("cosine"))[0] < 999
    assert len(cbdm.sampling_times("dpm", 1000, ALPHA_BAR)) < 1000  # no step twice


def test_clipping_changes_nothing_inside_the_range_and_bounds_what_is_outside():
    x_0, eps, z = one_step_pair(0)
    inside = x_0.clamp(-1, 1)
    x_t = cbdm.q_sample(inside, torch.tensor([700, 700]), eps, ALPHA_BAR)
    assert torch.allclose(image(x_t, eps, 700, clip=True), image(x_t, eps, 700), atol=1e-10)
    outside = image(5 * x_t, eps, 700)
    assert outside.abs().max() > 1 and torch.equal(image(5 * x_t, eps, 700, clip=True), outside.clamp(-1, 1))


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
    """Counts the images that go through a network, and notes the step of each pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.images, self.times = model, 0, []
        self.weight = torch.nn.Parameter(torch.zeros(1))  # where the network is

    def forward(self, x, t, y):
        self.images += len(x)
        self.times.append(t[0].item())
        return self.model(x, t, y)


class Nothing(torch.nn.Module):
    def forward(self, x, t, y):
        return 0 * x


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


def test_ddim_visits_the_multiples_of_a_tenth_of_T():
    """10 steps: t = 900, 800, ..., 0, the last one straight to the image."""
    model = Counting(lively().float().eval())
    cbdm.sample(model, torch.tensor([0]), sampling_settings(guidance=0.0), False, 7, "ddim")
    assert model.times == list(range(900, -1, -100))
    model.times.clear()
    model.model = Nothing()
    cbdm.sample(model, torch.tensor([0]), sampling_settings(guidance=1.0), False, 7, "ancestral")
    assert model.times == list(range(999, -1, -1))


def test_without_a_label_table_guidance_has_no_effect():
    model = lively().float().eval()
    torch.nn.init.zeros_(model.label.weight)
    y = torch.tensor([0, 1])
    a, b = (cbdm.sample(model, y, sampling_settings(guidance=w), False, 7, "ddim") for w in (0.0, 3.0))
    assert (a.int() - b.int()).abs().max() <= 1


def test_samplers_recover_a_known_distribution():
    """With the exact score of one Gaussian, x_0 ~ N(m, s^2), all samplers give its mean and spread."""
    m, s = 0.3, 0.2

    def exact(x, t, y):
        a = ALPHA_BAR[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s * s + 1 - a)

    for sampler, steps, tolerance in (("ancestral", 100, 0.01), ("ddim", 100, 0.02), ("dpm", 20, 0.01)):
        args = sampling_settings(guidance=0.0, clip_x0=False, ddim_steps=steps, prediction="eps",
                                 noise_schedule="linear")
        x = cbdm.sample(Answers(exact), torch.zeros(64).long(), args, False, 0, sampler).double() / 127.5 - 1
        assert x.mean().item() == pytest.approx(m, abs=tolerance) and x.std().item() == pytest.approx(
            s, abs=tolerance
        )


# ---------------------------------------------------------------------------- settings and training


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


def test_run_directory_says_what_differs():
    assert cbdm.parse_settings(["--dataset", "cifar100lt"]).run_dir == "runs/cbdm-cifar100lt-s0"
    named = cbdm.parse_settings(["--dataset", "cifar100lt", "--tau", "0", "--seed", "3", "--device",
                                 "cpu"]).run_dir
    assert named == "runs/cbdm-cifar100lt-tau0.0-s3"


def weights_of(run_dir):
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return state, {**{"m." + k: v for k, v in state["model"].items()},
                   **{"e." + k: v for k, v in state["ema"].items()}}


def same_weights(a, b):
    (state_a, a), (state_b, b) = weights_of(a), weights_of(b)
    assert state_a["step"] == state_b["step"]
    return all(torch.equal(a[k], b[k]) for k in a)


def log_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


def tiny_run(run_dir, *flags):
    cbdm.main([*TINY, *map(str, flags), "--run-dir", str(run_dir)])
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def angle(t):
    """alpha_bar = cos^2, 1 - alpha_bar = sin^2 of it: (B, 1, 1, 1) float64, from the betas of P, §4.1."""
    return torch.cumprod(1 - BETA, 0).sqrt().arccos()[t].view(-1, 1, 1, 1)


def randomise(model):
    """A network starts with outputs near zero, whose gradients are small: draw those layers anew."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight, gain=1.5)


LOOPS = {
    "eps, bal": dict(prediction="eps", label_set="bal", gamma=0.5, tau=0.01, drop_rate=0.3,
                     regularise_after=0.34),
    "v, sqrt": dict(prediction="v", label_set="sqrt", gamma=2.0, tau=0.001, drop_rate=0.5,
                    regularise_after=0.0),
    "gamma 0, train": dict(prediction="eps", label_set="train", gamma=0.0, tau=0.02, drop_rate=0.1,
                           regularise_after=0.0),
    "whole batches": dict(prediction="eps", label_set="bal", gamma=0.5, tau=0.01, drop_rate=0.5,
                          regularise_after=0.0,
                          drop_whole_batch=True, resample="uniform"),
    "DDPM": dict(prediction="eps", label_set="train", gamma=0.25, tau=0.0, drop_rate=0.1,
                 regularise_after=0.0),
    "EDM, ADA": dict(prediction="edm", label_set="bal", gamma=0.5, tau=0.01, drop_rate=0.3,
                     regularise_after=0.34, augment="ada"),
    "DiffAug, gamma 0": dict(prediction="v", label_set="bal", gamma=0.0, tau=0.01, drop_rate=0.3,
                             regularise_after=0.0, augment="diffaug"),
    "ViT, soft labels": dict(prediction="eps", label_set="bal", gamma=0.5, tau=0.01, drop_rate=0.3,
                             regularise_after=0.0, backbone="vit"),
}


@pytest.mark.parametrize("how", LOOPS)
def test_the_loop_is_algorithm_1(how, tmp_path, monkeypatch):
    """Six steps of main() against the same steps written here, from the same random numbers: Eq. 4, two
    passes, plain
    autograd, Adam, a clipping that bites, the average of the weights. Only the network is the script's."""
    c, lr, beta2, decay, warmup, steps, B = LOOPS[how], 0.01, 0.9, 0.7, 2, 6, 8
    if "backbone" in c:  # nine layers that rescale what they add to: rounding grows at larger rates
        lr = 1e-3
    initialise = cbdm.UNet.initialise
    monkeypatch.setattr(cbdm.UNet, "initialise", lambda self: (initialise(self), randomise(self)))
    flags = [x for k, v in c.items() if v is not True for x in ("--" + k.replace("_", "-"), str(v))]
    flags += ["--drop-whole-batch"] if c.get("drop_whole_batch") else []
    vit, ada, edm = c.get("backbone") == "vit", c.get("augment") == "ada", c["prediction"] == "edm"
    train = datasets.load("shapeslt", "data")
    soft = None
    if vit:
        soft = torch.rand(len(train.labels), 10, generator=torch.Generator().manual_seed(3))
        soft /= soft.sum(1, keepdim=True)
        np.savez(tmp_path / "soft.npz", probabilities=soft, training_data=train.fingerprint, classifier="")
        flags += ["--soft-labels", tmp_path / "soft.npz", "--image-size", "16"]
    state = tiny_run(tmp_path, *flags, "--lr", lr, "--beta2", beta2, "--ema", decay, "--warmup", warmup,
                     "--steps", steps,
                     "--lr-schedule", "constant", "--noise-schedule", "linear", "--amp", "off", "--seed", "5")

    torch.manual_seed(5)
    model = cbdm.ViT(10, 8, 16, 0.0) if vit else cbdm.UNet(10, 8, [1, 1], 1, 1, 0.0, ada=ada)
    averaged = {name: w.clone() for name, w in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2))
    batches = datasets.Batches(train, B, c.get("resample", "data"), flip=not ada, seed=5, targets=soft)
    N_k = train.counts.double()
    norms, unlabelled = [], 0
    for step in range(steps):
        x_0, y = next(batches)
        t, eps = torch.randint(0, 1000, (B,)), torch.randn_like(x_0)
        dropped = torch.rand(1 if c.get("drop_whole_batch") else B) < c["drop_rate"]
        dropped = dropped.expand(B)
        rank = (t + torch.rand(B, dtype=torch.float64)) / 1000 if edm else None
        told = ()
        if ada:
            x_0, *told = datasets.ada(x_0)
        elif c.get("augment") == "diffaug":
            x_0 = datasets.diffaugment(x_0, "color,translation,cutout")
        cos, sin = angle(t).cos().float(), angle(t).sin().float()
        x_t, level = cos * x_0 + sin * eps, t
        target = eps if c["prediction"] == "eps" else cos * eps - sin * x_0
        if edm:  # their Table 1, with the loss at the denoised image
            sigma = torch.from_numpy(scipy.stats.norm(-1.2, 1.2).ppf(rank)).exp().float().view(-1, 1, 1, 1)
            noisy, root = x_0 + sigma * eps, (sigma**2 + 0.25).sqrt()
            x_t, level = noisy / root, sigma.flatten().log() / 4
            target = (x_0 - 0.25 / root**2 * noisy) / (sigma * 0.5 / root)
        for i in range(B):
            if dropped[i]:
                y[i] = 0 if vit else NO_LABEL
        unlabelled += dropped.sum().item()
        h = model(x_t, level, y, *told)
        loss = (target - h).abs().mean() if vit else ((target - h) ** 2).mean()
        if c["tau"] and step >= c["regularise_after"] * steps:
            q = {"train": N_k, "bal": torch.ones(10).double(), "sqrt": N_k**0.5}[c["label_set"]]
            y_prime = torch.multinomial(q / q.sum(), B, replacement=True)
            h_prime = model(x_t, level, y_prime, *told)
            for i in range(B):
                if not dropped[i]:
                    moves_h = ((h[i] - h_prime[i].detach()) ** 2).mean()
                    moves_h_prime = ((h[i].detach() - h_prime[i]) ** 2).mean()
                    loss = loss + c["tau"] * t[i] / B * (moves_h + c["gamma"] * moves_h_prime)
        optimizer.zero_grad()
        loss.backward()
        gradient = torch.cat([w.grad.flatten() for w in model.parameters()])
        norms.append(gradient.norm().item())
        for w in model.parameters():
            w.grad *= min(1, 1 / (norms[-1] + 1e-6))
        optimizer.param_groups[0]["lr"] = lr * min(1, step / warmup)
        optimizer.step()
        averaged = {name: decay * averaged[name] + (1 - decay) * w for name, w in model.state_dict().items()}
    assert (vit or max(norms) > 1.5) and unlabelled > 0  # the clipping bites, labels were dropped
    for name, w in model.state_dict().items():
        # Where the gradient is 0, Adam takes whole steps on rounding.
        seen = torch.ones_like(w, dtype=torch.bool)
        if name.endswith(".k.bias"):  # softmax does not see it
            assert model.get_parameter(name).grad.abs().max() < 1e-6 * gradient.abs().max()
            continue
        if name.endswith("in_proj_bias"):  # of q, k and v
            seen[len(w) // 3 : 2 * len(w) // 3] = False
        if vit and ".embed." in name:  # the shift of the token that is no patch: norms take it off again
            seen[65] = False
        for found, expected in ((state["model"][name], w), (state["ema"][name], averaged[name])):
            torch.testing.assert_close(found[seen], expected[seen], rtol=2e-4, atol=2e-5, msg=lambda m,
                                       name=name: f"{name}: {m}")


def test_the_final_samples_are_the_averaged_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "score_run", lambda *a, **k: None)
    flags = ["--steps", 3, "--eval-images", 20, "--ddim-steps", 2, "--ema", "0.5", "--warmup", 0, "--amp",
             "off",
             "--dropout", "0.5"]
    state = tiny_run(tmp_path, *flags)
    args = cbdm.parse_settings([*TINY, *map(str, flags)])
    expected = {}
    for which in ("model", "ema"):
        network = cbdm.UNet(10, 8, [1, 1], 1, 1, 0.5).eval()
        network.load_state_dict(state[which])
        labels = torch.arange(10).repeat_interleave(2)
        expected[which] = cbdm.sample(network, labels, args, False, datasets.seed_from(0, 0),
                                      "ddim").permute(0, 2, 3, 1)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert (samples["labels"] == labels.numpy()).all()
        assert np.array_equal(samples["images"], expected["ema"].numpy())
        assert not np.array_equal(samples["images"], expected["model"].numpy())


def test_a_step_of_imbalance(tmp_path):
    state = tiny_run(tmp_path, "--rho", 10, "--imbalance", "step")
    train = datasets.load("shapeslt", "data", rho=10, imbalance="step")
    assert state["settings"]["training_data"] == train.fingerprint
    with pytest.raises(InputError, match="holds a run on other images"):
        tiny_run(tmp_path, "--rho", 10)
    del state["settings"]["imbalance"]  # of a run that did not know it
    torch.save(state, tmp_path / "checkpoint.pt")
    assert tiny_run(tmp_path, "--rho", 10, "--imbalance", "step")["step"] == 3


def test_flips_can_be_turned_off(tmp_path, monkeypatch):
    """--no-flip, for digits and signs: all images of the batches are images of the data."""
    seen = []
    following = datasets.Batches.__next__
    monkeypatch.setattr(datasets.Batches, "__next__", lambda self: seen.append(following(self)) or seen[-1])
    tiny_run(tmp_path / "a", "--no-flip", "--steps", 2)
    images = datasets.load("shapeslt", "data").images
    known = {x.numpy().tobytes() for x in images}
    found = [((x + 1) * 127.5).round().to(torch.uint8) for x, _ in seen]
    assert all(x.numpy().tobytes() in known for batch in found for x in batch)
    seen.clear()
    tiny_run(tmp_path / "b", "--steps", 2)
    found = [((x + 1) * 127.5).round().to(torch.uint8) for x, _ in seen]
    assert not all(x.numpy().tobytes() in known for batch in found for x in batch)


# ------------------------------------------------------------------------ TRY: places to experiment


def test_try_the_same_pull_at_each_step(predictions):
    """T / 2 for t: as much pull on average over t, but also on images with hardly any noise."""
    other = edited("cbdm.py", ("weight = tau * t.to(h.dtype)", "weight = tau * T / 2")).regularisers
    h, zeros = torch.ones(T, 3, 1, 1), torch.zeros(T, 3, 1, 1)
    each, first = torch.arange(T), torch.ones(T).bool()
    assert other(h, zeros, each, 0.001, first)[0].item() == pytest.approx(0.5)
    assert cbdm.regularisers(h, zeros, each, 0.001, first)[0].item() == pytest.approx(0.4995)
    assert (
        other(h[:1], zeros[:1], each[:1], 0.001, first[:1])[0]
        > cbdm.regularisers(h[:1], zeros[:1], each[:1], 0.001, first[:1])[0]
    )


def test_try_without_stop_gradients(predictions):
    """L_r alone (gamma 0) then pulls h' too, which stop-gradients spare."""
    other = edited("cbdm.py", ("distance(h, h_prime.detach()), distance(h.detach(), h_prime)",
                               "distance(h, h_prime), distance(h, h_prime)")).regularisers
    h, h_prime, _, t, labelled = predictions
    other(h, h_prime, t, 0.001, labelled)[0].backward()
    assert h_prime.grad.abs().sum() > 0 and torch.allclose(h_prime.grad, -h.grad)
    h.grad = h_prime.grad = None
    cbdm.regularisers(h, h_prime, t, 0.001, labelled)[0].backward()
    assert h_prime.grad is None and h.grad.abs().sum() > 0


def test_try_rare_labels_most_often():
    counts = torch.tensor([1000, 100, 10])
    other = edited("cbdm.py", ('"bal": 0.0,', '"bal": -1.0,')).label_distribution(counts, "bal")
    assert (other[2] / other[0]).item() == pytest.approx(100) and other.sum().item() == pytest.approx(1)


def test_try_guidance_in_the_later_steps_alone():
    """`or t > 600`: three of ten steps of DDIM then cost one pass instead of two."""
    line = "if args.guidance == 0:"
    assert line + "  # TRY: or t > 600" in inspect.getsource(cbdm)
    other = edited("cbdm.py", (line, "if args.guidance == 0 or t > 600:"))
    model = Counting(lively().float().eval())
    other.sample(model, torch.tensor([0, 1]), sampling_settings(guidance=2.0), False, 7, "ddim")
    assert model.images == 2 * (3 * 1 + 7 * 2)


# ----------------------------------------------------------------------------------------- resuming


class Stopped(Exception):
    pass


def interrupt(monkeypatch, after, how):
    """Calls how() at the end of step `after`, before anything of that step is logged or saved."""
    add, count = datasets.Log.add, []

    def counting(self, *values):
        add(self, *values)
        count.append(1)
        if len(count) == after:
            how()

    monkeypatch.setattr(datasets.Log, "add", counting)


def raise_stopped():
    raise Stopped


def test_an_aborted_run_resumes_bit_for_bit(tmp_path, capsys, monkeypatch):
    """Cut off in its tenth step, then the same command: weights, averages and losses of the run that was
    never stopped."""
    monkeypatch.setattr(datasets, "LOG_EVERY", 4)
    flags = ["--dropout", "0.1", "--save-every", "7", "--steps", "13"]
    tiny_run(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        interrupt(patch, 10, raise_stopped)
        tiny_run(tmp_path / "cut", *flags)
    assert weights_of(tmp_path / "cut")[0]["step"] == 7
    tiny_run(tmp_path / "cut", *flags)
    assert "resumed at step 7" in capsys.readouterr().out
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    assert [row["step"] for row in log_of(tmp_path / "cut")] == [4, 8, 12, 13]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(number, tmp_path, monkeypatch, capsys):
    flags = ["--save-every", "100000", "--steps", "9"]
    before = signal.getsignal(number)
    tiny_run(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt(patch, 5, lambda: os.kill(os.getpid(), number))
        tiny_run(tmp_path / "cut", *flags)
    assert stopped.value.code == 128 + number and "the same command resumes" in capsys.readouterr().out
    assert weights_of(tmp_path / "cut")[0]["step"] == 5
    assert signal.getsignal(number) is before  # a later signal to this process is not swallowed
    tiny_run(tmp_path / "cut", *flags)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_killed_process_loses_at_most_save_every_steps(tmp_path):
    """SIGKILL to a process of its own: the checkpoint is whole, and resumes."""
    flags = [*TINY, "--save-every", "3", "--steps", "1000000", "--lr-schedule", "constant"]
    process = subprocess.Popen([sys.executable, ROOT / "cbdm.py", *flags, "--run-dir", "run"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert done > 0 and done % 3 == 0
    flags[flags.index("1000000")] = str(done + 1)
    cbdm.main([*flags, "--run-dir", str(tmp_path / "run")])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == done + 1


def test_a_new_flag_of_a_fork_leaves_old_runs_resumable(tmp_path):
    """A setting that the checkpoint does not know is not compared."""
    state = tiny_run(tmp_path, "--steps", 2, "--lr-schedule", "constant")
    del state["settings"]["gamma"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert tiny_run(tmp_path, "--steps", 3, "--lr-schedule", "constant")["step"] == 3


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    """The keys of the first version: named, never misread, and left alone."""
    state = tiny_run(tmp_path, "--steps", 2)
    log = state.pop("log")
    torch.save(state | {"sums": log["sums"], "logged": log["added"]}, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="another version of this script"):
        tiny_run(tmp_path, "--steps", 2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_folder_that_changed_since_is_refused(tmp_path):
    folder = tmp_path / "pictures"
    for c in range(3):
        (folder / "train" / f"class{c}").mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), 40 * c, np.uint8)).save(folder / "train" / f"class{c}" / "0.png")
    flags = ["--dataset", f"folder:{folder}", "--data-dir", tmp_path / "data", "--image-size", 16, "--blocks",
             1, "--steps", 1]
    tiny_run(tmp_path / "run", *flags)
    (folder / "train" / "class3").mkdir()
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(folder / "train" / "class3" / "0.png")
    with pytest.raises(InputError, match="other images than folder:"):
        tiny_run(tmp_path / "run", *flags)


def test_fine_tuning_across_class_counts(tmp_path, capsys):
    """--init-from takes another run's averaged weights; with other classes, all but the label table."""
    folder = tmp_path / "pictures"
    for c in range(3):
        (folder / "train" / f"class{c}").mkdir(parents=True)
        for i in range(2 + c):
            Image.fromarray(np.full((16, 16, 3), 40 * c + i,
                                    np.uint8)).save(folder / "train" / f"class{c}" / f"{i}.png")
    size = ["--data-dir", str(tmp_path / "data"), "--image-size", "16", "--blocks", "1", "--lr", "1e-3",
            "--warmup", "0",
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
    assert [k for k in start if loaded[k].shape != start[k].shape
            or not torch.equal(loaded[k], start[k])] == ["label.weight"]
    assert loaded["label.weight"].shape == (3, 32)
    assert "10 classes there, 3 here; the embeddings of the classes are new" in capsys.readouterr().out


def test_each_option_of_the_method_trains(tmp_path):
    """Two steps with each: the losses logged are finite, and gamma 0 and tau 0 do what they say."""
    for i, flags in enumerate((["--gamma", "0"], ["--regularise-after", "0.5"], ["--label-set", "bal"],
                               ["--label-set", "sqrt"],
                               ["--resample", "uniform"], ["--resample", "sqrt"], ["--drop-whole-batch"],
                               ["--drop-rate", "1"])):
        cbdm.main([*TINY, *flags, "--steps", "2", "--run-dir", str(tmp_path / str(i))])
        row = log_of(tmp_path / str(i))[-1]
        assert math.isfinite(row["L_DM"]) and row["L_r"] >= 0
        if flags[0] == "--drop-rate":
            assert row["L_r"] == row["L_rc"] == 0


# --------------------------------------------------------------------------------------------- runs


def test_a_whole_run_leaves_everything_it_promises(tmp_path, judge_dir):
    small = [*TINY, "--steps", "4", "--sample-every", "2", "--eval-images", "20", "--ddim-steps", "2",
             "--data-dir",
             str(judge_dir), "--run-dir", str(tmp_path / "run")]
    cbdm.main(small)
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["steps"] == 4 and config["torch"] == torch.__version__
    assert config["parameters"] > 0
    grids = sorted(p.name for p in (run / "samples").iterdir())
    assert grids == ["step-0000002.png", "step-0000004.png"]
    # ten by ten, 64 pixels and a gap of 4
    assert Image.open(run / "samples" / grids[0]).size == (10 * 68 + 4, 10 * 68 + 4)
    with np.load(run / "samples.npz", allow_pickle=False) as samples:
        assert samples["images"].shape == (20, 16, 16, 3) and samples["images"].dtype == np.uint8
        assert (np.bincount(samples["labels"]) == 2).all()
    assert json.loads((run / "metrics.json").read_text()) and (run / "per_class.csv").read_text()
    # a second look at the same run, with another sampler; the weights stay
    before = (run / "checkpoint.pt").read_bytes()
    cbdm.main([*small, "--eval-only", "--guidance", "0"])
    assert (run / "checkpoint.pt").read_bytes() == before


def test_missing_inception_weights_do_not_spoil_a_run(tmp_path, monkeypatch, capsys):
    """Samples are written, and the message says what to copy where."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    tiny_run(tmp_path / "run", "--steps", 1, "--eval-images", 10, "--ddim-steps", 2, "--features",
             "inception-fid")
    assert (tmp_path / "run" / "samples.npz").exists()
    out = capsys.readouterr().out
    assert "not scored" in out and "pt_inception-2015-12-05-6726825d.pth" in out


def evaluation(tmp_path, monkeypatch, **changes):
    """sample_all's arguments, for 12 images in batches of 4."""
    monkeypatch.setitem(cbdm.AT_ONCE, "cpu", 4 * 8**2 / 32**2)
    args = sampling_settings(guidance=0.0, ddim_steps=2, run_dir=str(tmp_path), **changes)
    return Counting(lively().float().eval()), torch.arange(12) % 5, args, False


def test_an_interrupted_evaluation_resumes(tmp_path, monkeypatch):
    model, *rest = evaluation(tmp_path / "whole", monkeypatch)
    whole = cbdm.sample_all(model, *rest, rest[1].run_dir)
    monkeypatch.setattr(datasets, "SAVE_SECONDS", 0)
    model, *rest = evaluation(tmp_path, monkeypatch)
    sampled, calls = cbdm.sample, []

    def interrupted(*a):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return sampled(*a)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cbdm, "sample", interrupted)
        cbdm.sample_all(model, *rest, rest[1].run_dir)
    model.images = 0
    again = cbdm.sample_all(model, *rest, rest[1].run_dir)
    assert torch.equal(whole, again) and model.images == 4 * 2 and not (tmp_path / "samples.part").exists()


def test_what_a_run_will_take_is_said_first(tmp_path, capsys, monkeypatch):
    """1,000 guided steps for 50,000 images are longer than a day of training; the cheaper way is named."""
    cbdm.main([*TINY, "--steps", "16", "--run-dir", str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if "s a step: " in line)
    assert "the training takes 0 s from here, with " in line and "samples" not in line
    args = cbdm.parse_settings(["--dataset", "cifar100lt"])  # two labels a step, so six forward passes of 48
    text = cbdm.about_sampling(args, 6 * 48 * 1e-3, 86_400)  # a millisecond for an image
    assert "50,000 samples then take about 27.8 hours, longer than the training" in text  # twice: guided
    assert text.endswith("--sampler dpm --ddim-steps 20 takes about 33 minutes")
    plain = ["--dataset", "cifar100lt", "--tau", "0", "--guidance", "0", "--sampler", "ddim"]
    args = cbdm.parse_settings(plain)
    assert cbdm.about_sampling(args, 3 * 48 * 1e-3, 86_400) == "; 50,000 samples then take about 83 minutes"
    assert datasets.duration(3 * 86_400 + 7200) == "3 days 2 hours" and datasets.duration(59) == "59 s"


def test_dropout_is_on_in_training(tmp_path):
    """The masks are the only difference: images, labels and noise are drawn as without."""
    states = []
    for dropout in ("0", "0.5"):
        run = [*TINY, "--steps", "4", "--warmup", "0", "--dropout", dropout]
        cbdm.main([*run, "--run-dir", str(tmp_path / dropout)])
        states.append(state_of(tmp_path / dropout))
    assert torch.equal(states[0]["rng"]["cpu"], states[1]["rng"]["cpu"])
    assert not torch.equal(states[0]["model"]["tail.2.weight"], states[1]["model"]["tail.2.weight"])


def test_an_edited_script_is_named_when_a_run_resumes(tmp_path, capsys):
    """Whoever edits the loss and runs the same command again would compare a run with itself."""
    run = [*TINY, "--run-dir", str(tmp_path)]
    cbdm.main(run)
    cbdm.main(run)
    assert "warning" not in capsys.readouterr().err
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["settings"]["code"] = "of another version"
    torch.save(state, tmp_path / "checkpoint.pt")
    cbdm.main(run)
    assert "the script has changed since" in capsys.readouterr().err
    del state["settings"]["code"]  # of an older version: nothing is known
    torch.save(state, tmp_path / "checkpoint.pt")
    cbdm.main(run)
    assert "has changed" not in capsys.readouterr().err


def test_finished_samples_are_used_again_only_where_nothing_changed(tmp_path, monkeypatch):
    """Other settings, other weights or an edited script: they are made again; with --eval-only always."""
    model, labels, args, amp = evaluation(tmp_path, monkeypatch)
    first = cbdm.sample_all(model, labels, args, amp, args.run_dir)

    def made_again(args):
        model.images = 0
        images = cbdm.sample_all(model, labels, args, amp, args.run_dir)
        return model.images > 0, torch.equal(images, first)

    assert made_again(args) == (False, True)
    other_scores = sampling_settings(**vars(args) | {"scores": "all", "features": "inception"})
    assert made_again(other_scores) == (False, True)
    assert made_again(sampling_settings(**vars(args) | {"eval_only": True})) == (True, True)
    # the script may have been edited since
    assert made_again(sampling_settings(**vars(args) | {"eval_only": True}))[0]
    assert made_again(args) == (False, True)  # those of --eval-only are as good
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "samples.npz").rename(moved / "samples.npz")
    assert made_again(sampling_settings(**vars(args) | {"run_dir": str(moved)})) == (False, True)
    (moved / "samples.npz").rename(tmp_path / "samples.npz")
    assert made_again(sampling_settings(**vars(args) | {"gamma": 0.5}))[0]
    made_again(args)
    with torch.no_grad():
        model.model.tail[2].bias += 1  # another training
    assert made_again(args) == (True, False)
    monkeypatch.setattr(cbdm, "__file__", str(ROOT / "cbgan.py"))  # as good as an edited sampler
    assert made_again(args)[0]


# --------------------------------------------------------------------------- a folder of your own, --export


def test_settings_follow_from_the_folder(tmp_path):
    """Files are counted, not opened; of prepared arrays the labels are read and nothing else."""
    for name, n in (("owl", 30), ("kiwi", 10), ("emu", 1)):
        (tmp_path / "birds" / "train" / name).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "birds" / "train" / name / f"{i}.png").touch()
    of = lambda name, *flags: cbdm.parse_settings(  # noqa: E731
        ["--dataset", f"folder:{tmp_path / name}", "--data-dir", str(tmp_path), *flags])
    a = of("birds")
    assert (a.recipe, a.steps, a.eval_images, a.sample_every) == ("folder", 10_000, 3 * 167, 500)
    assert (a.regularise_after, a.lr_schedule, a.image_size) == (0, "constant", 32)
    for size, multipliers in ((16, [2, 4]), (32, [1, 2, 4]), (48, [1, 2, 4]), (64, [1, 1, 2, 4])):
        a = of("birds", "--image-size", str(size), "--steps", "200")
        assert a.multipliers == multipliers and a.attention_level == len(multipliers) - 2
        assert 8 <= size / 2 ** (len(multipliers) - 1) < 16 and a.sample_every == 100
    for n, K, steps, images in ((2000, 20, 83_100, 1000), (50_000, 300, 300_000, 4800)):
        np.savez(tmp_path / f"folder-far{n}-train-32.npz", labels=np.zeros(n, int),
                 classes=np.arange(K).astype(str))
        a = of(f"far{n}")  # 2000 * 1330 / 32 = 83,125
        assert (a.steps, a.eval_images) == (steps, images)
    (tmp_path / "folder-broken-train-32.npz").write_bytes(b"PK")
    for name in ("nowhere", "broken"):
        assert of(name).steps == 300_000
    paper = of("birds", "--recipe", "cifar100lt")
    assert (paper.steps, paper.channels, paper.eval_images) == (300_000, 128, 50_000)
    assert cbdm.parse_settings(["--recipe", "folder"]).channels == 32  # of no folder


def exported(where):
    return {str(file.relative_to(where)): file.read_bytes() for file in where.rglob("*") if file.is_file()}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """export(DIR, ...) of a run; batches of four."""
    run = [*TINY, "--run-dir", str(tmp_path / "run")]
    cbdm.main(run)
    monkeypatch.setattr(datasets, "EXPORT_AT_ONCE", 1)

    def export(where, *flags):
        small = ["--sampler", "ddim", "--ddim-steps", "2", "--eval-images", "8"]  # which it leaves alone
        cbdm.main([*run, *small, "--eval-only", "--export", str(tmp_path / where), *map(str, flags)])
        return exported(tmp_path / where)

    return export


def test_several_strengths_of_guidance_are_scored_one_after_the_other(tmp_path, monkeypatch):
    """Fig. 6, from one checkpoint: each value's samples and scores in a directory of its own."""
    asked = []

    def score(where, images, labels, args, device, protocol):
        asked.append((where, args.guidance, protocol))

    monkeypatch.setattr(metrics, "score_run", score)
    run = [*TINY, "--warmup", "0", "--lr", "1e-2", "--run-dir", str(tmp_path)]
    cbdm.main(run)
    draw = [*run, "--eval-only", "--eval-images", "10", "--ddim-steps", "2"]
    cbdm.main([*draw, "--guidance", "0", "3"])
    assert asked == [(tmp_path / f"guidance-{w}", w, {"guidance": w}) for w in (0, 3)]
    cbdm.main([*draw, "--guidance", "3"])
    assert asked[2][:2] == (tmp_path, 3)
    images = []
    for where, _, _ in asked:
        with np.load(where / "samples.npz", allow_pickle=False) as file:
            images.append(file["images"])
    assert not np.array_equal(images[0], images[1]) and np.array_equal(images[1], images[2])


def test_a_grid_of_one_class(tmp_path, monkeypatch):
    """Fig. 7: columns are strengths of guidance, rows are runs; the same noise in all, and no scores."""
    monkeypatch.setattr(metrics, "score_run", lambda *a, **k: pytest.fail("nothing is to be scored"))
    initialise = cbdm.UNet.initialise
    monkeypatch.setattr(cbdm.UNet, "initialise", lambda self: (initialise(self), randomise(self)))
    run = [*TINY, "--warmup", "0", "--lr", "1e-2", "--run-dir", str(tmp_path / "a")]
    cbdm.main(run)
    other = tiny_run(tmp_path / "b", "--warmup", 0, "--lr", 1e-2, "--tau", 0)["ema"]
    flags = ["--eval-only", "--ddim-steps", "2", "--eval-images", "5", "--class-grid", "star"]
    flags += ["--guidance", "0", "2", "--beside", str(tmp_path / "b" / "checkpoint.pt")]
    cbdm.main([*run, *flags])
    k = datasets.load("shapeslt", "data").classes.index("star")
    args = cbdm.parse_settings([*TINY, *flags])
    assert args.sweep == [0, 2]
    network = cbdm.UNet(10, 8, [1, 1], 1, 1, 0.0).eval()
    network.load_state_dict(other)
    vars(args)["guidance"] = 2.0
    expected = cbdm.sample(network, torch.full((4,), k), args, True, 0, args.sampler)
    picture = np.asarray(Image.open(tmp_path / "a" / "samples" / f"class-{k}.png"))
    tiles = [picture[4 + 68 * row : 68 + 68 * row : 4, 4 + 68 * column : 68 + 68 * column : 4]
             for row in (0, 1) for column in range(8)]  # 16 pixels, enlarged to 64, and 4 between
    assert all((tiles[12 + i] == expected[i].permute(1, 2, 0).numpy()).mean() > 0.9 for i in range(4))
    assert not np.array_equal(tiles[0], tiles[4]) and not np.array_equal(tiles[0], tiles[8])
    with pytest.raises(InputError, match="no class is called 'stars'"):
        cbdm.main([*run, *flags, "--class-grid", "stars"])


def test_pictures_do_not_depend_on_what_else_is_exported(finished, tmp_path, monkeypatch):
    asked, sampled = [], cbdm.sample
    monkeypatch.setattr(cbdm, "sample", lambda model, y, *a: asked.append(y) or sampled(model, y, *a))
    some = finished("some", "--classes", "star,disc", "--per-class", 6)
    assert torch.stack(asked).tolist() == [[k] * 4 for k in (5, 5, 0, 0)]  # whole batches
    files = [f"{name}/0000{i}.png" for name in ("disc", "star") for i in range(1, 7)]
    assert sorted(some) == sorted(["export.json", *files])
    assert len(set(some.values())) == 13
    assert Image.open(tmp_path / "some" / "star" / "00001.png").size == (16, 16)
    assert not (tmp_path / "run" / "samples.npz").exists()
    for flags in (["--classes", "disc", "--per-class", 3], ["--classes", "ring", "disc", "--per-class", 5]):
        other = finished("other", *flags)
    assert all(some[name] == data for name, data in other.items() if name in some)
    assert len(other) == 11 and "ring/00005.png" in other
    assert len(finished("all", "--per-class", 1)) == 11


def test_an_export_resumes_and_never_overwrites(finished, tmp_path, monkeypatch):
    run = ["--classes", "star,disc", "--per-class", 6]
    whole = finished("pictures", *run)
    asked, sampled = [], cbdm.sample
    monkeypatch.setattr(cbdm, "sample", lambda *a: asked.append(1) or sampled(*a))
    (tmp_path / "pictures" / "star" / "00005.png").unlink()
    (tmp_path / "pictures" / "disc" / "00001.png").write_bytes(b"retouched")
    (tmp_path / "pictures" / "disc" / "00002.png").unlink()
    again = finished("pictures", *run)
    assert len(asked) == 2 and again == whole | {"disc/00001.png": b"retouched"}
    with pytest.raises(InputError, match="other things"):
        finished("pictures", *run, "--guidance", 0.5)
    state = state_of(tmp_path / "run")
    state["ema"]["tail.2.bias"] += 1
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(InputError, match="other things") as error:
        finished("pictures", *run)
    assert "\n" not in str(error.value) and exported(tmp_path / "pictures") == again
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat.jpg").touch()
    with pytest.raises(InputError, match="other things"):
        finished("mine")
    assert list(exported(tmp_path / "mine")) == ["cat.jpg"]


def test_a_full_disk_keeps_the_pictures_that_are_there(finished, tmp_path, monkeypatch):
    whole, fsync, written = finished("whole", "--classes", "disc", "--per-class", 6), os.fsync, []

    def full(file):
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        written.append(fsync(file))

    with monkeypatch.context() as patch, pytest.raises(InputError, match="00004.png.*No space left"):
        patch.setattr(os, "fsync", full)
        finished("full", "--classes", "disc", "--per-class", 6)
    assert len(exported(tmp_path / "full")) == 4
    assert finished("full", "--classes", "disc", "--per-class", 6) == whole


@pytest.mark.parametrize("flags, message", [
    (["--eval-only", "--export", "there", "--classes", "stars,disc"], "'stars'; there are star"),
    (["--eval-only", "--export", "there", "--classes", "zebra"], "'zebra'; there are disc, square"),
    (["--export", "there"], "add --eval-only"), (["--classes", "disc"], "--export"),
    (["--eval-only", "--export", "there", "--per-class", "0"], "per-class"),
])
def test_exports_that_cannot_be(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cbdm.main([*TINY, "--run-dir", "run"])
    with pytest.raises(InputError, match=message) as error:
        cbdm.main([*TINY, "--run-dir", "run", *flags])
    assert "\n" not in str(error.value) and not (tmp_path / "there").exists()


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("flags", [
    ["--steps", "0"], ["--batch-size", "-3"], ["--lr", "nan"], ["--lr", "0"], ["--tau", "-1"],
    ["--gamma", "inf"],
    ["--ema", "1"], ["--drop-rate", "2"], ["--channels", "42"], ["--rho", "x"],
    ["--image-size", "17"], ["--ddim-steps", "1001"], ["--ddim-steps", "1"], ["--save-every", "0"],
    ["--eval-images", "-1"], ["--rho", "0.5"], ["--seed", "-1"], ["--device", "tpu"],
    ["--dataset", "cifar100l"],
    ["--steps", "many"], ["--no-such-flag"], ["--multipliers", "0", "1"], ["--eval-only"],
    ["--scores", "fod"],
    ["--init-from", "nowhere.pt"], ["--attention-level", "2"], ["--features", "classifier:nowhere.pt"],
    ["--sampler", "heun"], ["--prediction", "edm", "--sampler", "ddim"], ["--class-grid", "heart"],
    ["--soft-labels", "nowhere.npz"], ["--image-size", "18", "--backbone", "vit"], ["--augment", "some"],
])
def test_senseless_input_is_refused_by_name(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        cbdm.main([*TINY, *flags])
    assert "\n" not in str(error.value) and len(str(error.value)) > 10
    assert (
        flags[0].strip("-").split("-")[0] in str(error.value).replace("image size", "image-size")
        or len(flags) == 2
    )
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_errors_are_one_line_and_status_two(tmp_path, run_script):
    done = run_script("cbdm.py", *TINY, "--dataset", "shapslt", cwd=tmp_path)
    assert done.returncode == 2 and "shapeslt" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_another_configuration_in_the_directory(tmp_path):
    tiny_run(tmp_path / "run", "--steps", 2)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="--tau 0.001 there, 0.5 now.*--seed 0 there, 4 now"):
        tiny_run(tmp_path / "run", "--steps", 2, "--tau", "0.5", "--seed", "4")
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_damaged_checkpoint_is_kept_and_named(tmp_path):
    tiny_run(tmp_path, "--steps", 2)
    file = tmp_path / "checkpoint.pt"
    damaged = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="checkpoint.pt is damaged"):
        tiny_run(tmp_path, "--steps", 2)
    assert file.read_bytes() == damaged


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(InputError, match="NaN or infinite"):
        tiny_run(tmp_path, "--save-every", 1, "--lr", "1e20", "--warmup", 3, "--steps", 50)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < 50 and all(w.isfinite().all() for w in state["model"].values())
