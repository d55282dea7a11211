"""How fast the project is, in one table: `python tests/benchmark.py [--threads 2] [--only training,sampling,...]`.

Each row is the median of several runs with its smallest and largest; what is compared is measured in turn (A B A B ...) in
one process, so that a machine whose speed drifts does not decide. "Plain" is the same arithmetic as the papers' releases do
it: float32, one forward pass for each label, Adam tensor by tensor, the moving average tensor by tensor.
Not collected by pytest.
"""

import argparse
import copy
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cbdm  # noqa: E402
import cbgan  # noqa: E402
import classifier  # noqa: E402
import metrics  # noqa: E402
import softlabel_gan  # noqa: E402

GFLOP_FORWARD = 12.44  # one 32 x 32 image through the paper's U-Net (tests/test_cbdm.py counts it)
BATCH = 16


def in_turn(functions, runs=5, warm_up=1):
    """Seconds of each function, called in turn: a list of `runs` values for each."""
    device_wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = [[] for _ in functions]
    for i in range(warm_up + runs):
        for f, seconds in zip(functions, times, strict=True):
            device_wait()
            began = time.perf_counter()
            f()
            device_wait()
            if i >= warm_up:
                seconds.append(time.perf_counter() - began)
    return times


def row(name, values, unit, note=""):
    middle = statistics.median(values)
    print(f"{name:<58} {middle:>10.4g} {unit:<10} [{min(values):.4g} .. {max(values):.4g}]  {note}", flush=True)
    return middle


def matrix_throughput(device, dtype, size=2048):
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return [2 * size**3 / s / 1e9 for s in in_turn([lambda: a @ b], runs=9, warm_up=2)[0]]


def paper_model(device):
    torch.manual_seed(0)
    return cbdm.UNet(100, 128, (1, 2, 2, 2), blocks=2, attention_level=1, dropout=0.1).to(device)


def training(device, peak):
    """One CBDM step of 16 images at the paper's size: two predictions, both terms of Eq. 4, Adam, EMA."""
    x = torch.rand(BATCH, 3, 32, 32, device=device) * 2 - 1
    t, y, y_prime = torch.randint(0, 1000, (BATCH,)), *torch.randint(0, 100, (2, BATCH), device=device)
    labelled, t_ = torch.ones(BATCH, dtype=torch.bool, device=device), t.to(device)

    def step(model, optimizer, both, average):
        eps = torch.randn_like(x)
        h, h_prime = both(model, cbdm.q_sample(x, t, eps))
        L_r, L_rc = cbdm.regularisers(h, h_prime[None], t, 0.001, labelled)
        optimizer.zero_grad()
        (cbdm.ddpm_loss(h, eps) + L_r + 0.25 * L_rc).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average()

    def plain():
        model = paper_model(device)
        ema = copy.deepcopy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, foreach=False)

        def average():
            with torch.no_grad():
                new = model.state_dict()
                for name, value in ema.state_dict().items():
                    value.copy_(value * 0.9999 + new[name] * (1 - 0.9999))

        return lambda: step(model, optimizer, lambda m, x_t: (m(x_t, t_, y), m(x_t, t_, y_prime)), average)

    def ours():
        model = paper_model(device)
        ema = list(copy.deepcopy(model).requires_grad_(False).parameters())
        weights = [w.detach() for w in model.parameters()]
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)

        def both(m, x_t):
            with torch.autocast(device.type, torch.bfloat16, enabled=cbdm.use_bf16("auto", device)):
                return m(torch.cat([x_t, x_t]), torch.cat([t_, t_]), torch.cat([y, y_prime])).chunk(2)

        return lambda: step(model, optimizer, both, lambda: torch._foreach_lerp_(ema, weights, 1 - 0.9999))

    # Two forward passes, and backward passes that cost two each.
    compare("CBDM training step, 16 images", {"plain": plain(), "ours": ours()}, GFLOP_FORWARD * 6, peak)


def sampling(device, peak):
    """One guided denoising step of 16 images: a prediction with and one without label."""
    model = paper_model(device).eval()
    x = torch.randn(BATCH, 3, 32, 32, device=device)
    t, y = torch.full((BATCH,), 500, device=device), torch.arange(BATCH, device=device)
    none = torch.full_like(y, cbdm.NO_LABEL)

    @torch.no_grad()
    def plain():
        cbdm.ancestral_step(x, cbdm.guided(model(x, t, y), model(x, t, none), 1.6), 500, torch.randn_like(x))

    def ours(network):
        @torch.no_grad()
        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=cbdm.use_bf16("auto", device)):
                both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, none]))
            cbdm.ancestral_step(x, cbdm.guided(*both.chunk(2), 1.6), 500, torch.randn_like(x))

        return step

    ways = {"plain": plain, "ours": ours(model), "ours with --compile": ours(torch.compile(model))}
    compare("guided sampling step, 16 images", ways, GFLOP_FORWARD * 2, peak)


def compare(name, ways, gflop_image, peak):
    """Seconds of each way, what they make of the machine, and how many times faster than "plain" they are."""
    seconds = dict(zip(ways, in_turn(list(ways.values())), strict=True))
    for way, values in seconds.items():
        middle, top = statistics.median(values), "float32" if way == "plain" else "bfloat16"
        share = gflop_image * BATCH / middle / peak[top]
        row(f"{name}, {way}", values, "s", f"{BATCH / middle:.2f} images/s, {share:.0%} of the matrix product in {top}")
    for way in list(ways)[1:]:
        row(f"{name}, plain / {way}", [a / b for a, b in zip(seconds["plain"], seconds[way], strict=True)], "times")


def cbgan_training(device, batch=64):
    """One iteration of CBGAN at the paper's networks: D, G, the regulariser through a ResNet-32, two Adams, EMA."""
    args = cbgan.parse_settings(["--dataset", "cifar10lt"])
    x, w = torch.rand(batch, 3, 32, 32, device=device) * 2 - 1, torch.ones(10, device=device)
    amp = cbgan.use_bf16("auto", device)

    def networks():
        torch.manual_seed(0)
        C = classifier.ResNet32(10, **classifier.CIFAR_STATISTICS).eval()
        return [n.to(device) for n in (cbgan.build_generator(args, 10), cbgan.Discriminator(args, 10), C)]

    def z():
        return torch.randn(batch, cbgan.LATENT).to(device)

    def losses(D_real, D_fake, seen):
        p_hat = seen.float().softmax(1).mean(0)
        return cbgan.relativistic_loss(D_fake, D_real) + 10 * cbgan.class_balancing_regulariser(p_hat, w)

    def plain():
        """As the release has it: float32, D twice a step, gradients for D and C in the generator's step."""
        G, D, C = networks()
        ema = copy.deepcopy(G)
        adam = [torch.optim.Adam(n.parameters(), lr=2e-4, foreach=False) for n in (G, D)]

        def step():
            loss = cbgan.relativistic_loss(D(x)[0], D(G(z()).detach())[0])
            adam[1].zero_grad()
            loss.backward()
            adam[1].step()
            fake = G(z())
            loss = losses(D(x)[0], D(fake)[0], C(fake))
            adam[0].zero_grad()
            loss.backward()
            adam[0].step()
            with torch.no_grad():
                new = G.state_dict()
                for name, value in ema.state_dict().items():
                    value.copy_(value * 0.9999 + new[name] * (1 - 0.9999))

        return step

    def ours():
        """The lines of cbgan.py's loop."""
        G, D, C = (n.to(memory_format=torch.channels_last) for n in networks())
        C.requires_grad_(False)
        (means, values), (copies, originals) = cbgan.state_pairs(copy.deepcopy(G), G)
        adam = [torch.optim.Adam(n.parameters(), lr=2e-4, fused=True) for n in (G, D)]

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                with torch.no_grad():
                    fake = G(z())
                scores, _ = D(torch.cat([x, fake]))
            loss = cbgan.relativistic_loss(*scores.chunk(2))
            adam[1].zero_grad()
            loss.backward()
            adam[1].step()
            D.requires_grad_(False)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                fake = G(z())
                D_fake, _ = D(fake)
                with torch.no_grad():
                    D_real, _ = D(x)
                seen = C(fake)
            D.requires_grad_(True)
            loss = losses(D_real, D_fake, seen)
            adam[0].zero_grad()
            loss.backward()
            adam[0].step()
            torch._foreach_lerp_(means, values, 1 - 0.9999)
            torch._foreach_copy_(copies, originals)

        return step

    plain, ours = in_turn([plain(), ours()], runs=7)
    row(f"CBGAN training step, {batch} images, plain", plain, "s")
    row(f"CBGAN training step, {batch} images, ours", ours, "s", f"{batch / statistics.median(ours):.1f} images/s")
    row("CBGAN training step, plain / ours", [a / b for a, b in zip(plain, ours, strict=True)], "times")


def softlabel_training(device, size, width, batch):
    """One step of D and one of G of Softlabel-GAN at the paper's networks, with DiffAugment, two Adams, EMA."""
    K, policy, amp = 10, "color,translation,cutout", softlabel_gan.use_bf16("auto", device)
    x = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    y_soft = torch.randn(batch, K, device=device).softmax(1)

    def networks():
        torch.manual_seed(0)
        return [network(size, width, K).to(device) for network in (softlabel_gan.Generator, softlabel_gan.Discriminator)]

    def inputs():
        z, y = torch.randn(batch, softlabel_gan.latent_size(size)), F.one_hot(torch.randint(K, (batch,)), K).float()
        return z.to(device), y.to(device)

    def plain():
        """As the release has it: float32, skips convolved at the larger size, gradients for D in the generator's step."""
        G, D = networks()

        def skip_G(block, h, code):
            x, h = F.interpolate(h, scale_factor=2), F.interpolate(F.relu(block.norm1(h, code)), scale_factor=2)
            return block.conv2(F.relu(block.norm2(block.conv1(h), code))) + block.skip(x)

        def skip_D(block, x):
            h = block.conv2(F.relu(block.conv1(x if block.first else F.relu(x))))
            if not block.down:
                return h + block.skip(x)
            return F.avg_pool2d(h, 2) + (block.skip(F.avg_pool2d(x, 2)) if block.first else F.avg_pool2d(block.skip(x), 2))

        for block in G.blocks:
            block.forward = functools.partial(skip_G, block)
        for block in D.phi:
            if isinstance(block, softlabel_gan.DiscriminatorBlock):
                block.forward = functools.partial(skip_D, block)
        ema = copy.deepcopy(G)
        adam = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.0, 0.999), foreach=False) for n in (G, D)]

        def step():
            z, y = inputs()
            with torch.no_grad():
                fake = G(z, y)
            scores = D(softlabel_gan.diffaugment(torch.cat([fake, x]), policy), torch.cat([y, y_soft]))
            adam[1].zero_grad()
            softlabel_gan.discriminator_loss(*scores.chunk(2)[::-1]).backward()
            adam[1].step()
            z, y = inputs()
            adam[0].zero_grad()
            softlabel_gan.generator_loss(D(softlabel_gan.diffaugment(G(z, y), policy), y)).backward()
            adam[0].step()
            with torch.no_grad():
                new = G.state_dict()
                for name, value in ema.state_dict().items():
                    value.copy_(value * 0.9999 + new[name] * (1 - 0.9999))

        return step

    def ours():
        """The lines of softlabel_gan.py's loop."""
        G, D = (n.to(memory_format=torch.channels_last) for n in networks())
        (means, values), (copies, originals) = softlabel_gan.state_pairs(copy.deepcopy(G), G)
        adam = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.0, 0.999), fused=True) for n in (G, D)]

        def step():
            z, y = inputs()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                with torch.no_grad():
                    fake = G(z, y)
                scores = D(softlabel_gan.diffaugment(torch.cat([x, fake]), policy), torch.cat([y_soft, y]))
            adam[1].zero_grad()
            softlabel_gan.discriminator_loss(*scores.chunk(2)).backward()
            adam[1].step()
            D.requires_grad_(False)
            z, y = inputs()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = softlabel_gan.generator_loss(D(softlabel_gan.diffaugment(G(z, y), policy), y))
            D.requires_grad_(True)
            adam[0].zero_grad()
            loss.backward()
            adam[0].step()
            torch._foreach_lerp_(means, values, 1 - 0.9999)
            torch._foreach_copy_(copies, originals)

        return step

    name = f"Softlabel-GAN training step, {batch} images of {size}"
    plain, ours = in_turn([plain(), ours()], runs=5 if size == 32 else 2)
    row(f"{name}, plain", plain, "s")
    row(f"{name}, ours", ours, "s", f"{batch / statistics.median(ours):.1f} images/s")
    row("Softlabel-GAN training step, plain / ours", [a / b for a, b in zip(plain, ours, strict=True)], "times")


def frechet():
    """Against scipy's matrix square root, on the same features."""
    from scipy import linalg

    rng = np.random.default_rng(0)
    mix = rng.normal(size=(2048, 2048)) / 45
    real, fake = rng.normal(size=(10_000, 2048)) @ mix, rng.normal(size=(10_000, 2048)) @ mix * 1.1 + 0.05

    def by_sqrtm(a, b):
        s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2).real)

    m = [(x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake)]
    result = {}

    def ours():
        result["ours"] = metrics.frechet_distance_from_moments(*m[0], *m[1])

    def theirs():
        (mu1, s1), (mu2, s2) = m
        result["sqrtm"] = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2).real)

    fast, slow = in_turn([ours, theirs], runs=3, warm_up=0)
    row("Frechet distance from moments, 2048 dimensions, ours", fast, "s", f"value {result['ours']:.6f}")
    row("Frechet distance from moments, 2048 dimensions, sqrtm", slow, "s", f"value {result['sqrtm']:.6f}")
    row("sqrtm / ours", [a / b for a, b in zip(slow, fast, strict=True)], "times")
    row("relative difference", [abs(result["ours"] / result["sqrtm"] - 1)], "")
    row("from 10,000 x 2,048 features, ours", in_turn([lambda: metrics.frechet_distance(real, fake)], runs=3)[0], "s")

    labels = np.arange(5000) % 100
    few = real[:5000], labels, fake[:5000], labels
    [intra] = in_turn([lambda: metrics.intra_fid(*few)], runs=3)
    [one] = in_turn([lambda: by_sqrtm(real[labels.nonzero()[0][:50]], fake[:50])], runs=2, warm_up=0)
    row("intra-FID, 100 classes of 50 images, 2048 dim., a class, ours", [s / 100 for s in intra], "s")
    row("intra-FID, one class, sqrtm", one, "s")
    row("sqrtm / ours, a class", [s / (statistics.median(intra) / 100) for s in one], "times")


def scores(device):
    """Each score of 2,000 against 2,000 images with 2,048 features, ours and the plain way; then all, as `evaluate` does."""
    import scipy.cluster.vq
    from scipy.spatial.distance import cdist
    from torchvision.models import alexnet

    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, 2000, 2048)).astype(np.float32) + rng.normal(size=(1, 2048)).astype(np.float32)
    x, y = real.astype(np.float64), fake.astype(np.float64)
    k, clusters = 5, 400

    def balls():
        """Three whole tables of distances by differences, one of each set with itself."""
        among, r, f = cdist(x, y), *(np.partition(cdist(a, a), k, 1)[:, k] for a in (x, y))  # place 0 is the image itself
        a, b = among < r[:, None], among < f
        return a.any(0).mean(), b.any(1).mean(), a.sum() / k / len(y), a.any(1).mean()

    def kid():
        """100 subsets of 1,000, as published code does; ours takes all pairs once."""
        found = []
        for _ in range(100):
            a, b = x[rng.permutation(2000)[:1000]], y[rng.permutation(2000)[:1000]]
            aa, bb, ab = (((u @ v.T) / 2048 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
            found.append((aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (1000 * 999) - 2 * ab.mean())
        return np.mean(found)

    def prd():
        """One clustering of ten, by SciPy: Lloyd, 10 rounds from random rows, float64."""
        mine = scipy.cluster.vq.kmeans2(np.concatenate([x, y]), clusters, iter=10, minit="points", rng=0)[1]
        return metrics.f_beta(*metrics.prd_curve(*(np.bincount(m, minlength=clusters) / 2000 for m in np.split(mine, 2))), 8)

    torch.manual_seed(0)
    layers = alexnet().features[:-1].to(device).eval().requires_grad_(False)  # random weights: only the time counts
    widths = [layer.out_channels for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    network = metrics.Lpips(layers, [torch.rand(c, 1, 1, device=device).double() for c in widths])
    images = torch.from_numpy(rng.integers(0, 256, (100, 3, 32, 32), dtype=np.uint8))

    @torch.no_grad()
    def lpips():
        """Features once, then every pair by itself."""
        features = [f.double() for f in metrics.lpips_features(images.to(device), network)]
        pairs = [sum(((f[i] - f[j]) ** 2 * w).sum(0).mean() for f, w in zip(features, network.weights, strict=True)).item()
                 for i in range(100) for j in range(i)]  # fmt: skip
        return np.mean(pairs)

    on = [torch.from_numpy(a).to(device if device.type == "cuda" else "cpu") for a in (real, fake)]
    ways = {
        "precision, recall, density, coverage": (lambda: metrics.balls(*on), balls),
        "KID": (lambda: metrics.kernel_inception_distance(*on), kid),
        "F_8, a clustering": (lambda: metrics.prd_f_beta(*on, clusters, clusterings=1)[0], prd),
        "LPIPS, 100 images of 32 x 32": (lambda: metrics.lpips_diversity(images, network, device), lpips),
    }
    found = {}

    def run(key, f):
        found[key] = f()

    for name, (ours, plain) in ways.items():
        fast, slow = in_turn([functools.partial(run, "ours", ours), functools.partial(run, "plain", plain)], 2, 0)
        row(f"{name}, ours", fast, "s", f"value {found['ours']}")
        row(f"{name}, plain", slow, "s", f"value {found['plain']}")
        row(f"{name}, plain / ours", [a / b for a, b in zip(slow, fast, strict=True)], "times")

    with tempfile.TemporaryDirectory() as scratch:
        pixels, labels = rng.integers(0, 256, (2, 10_000, 32, 32, 3), dtype=np.uint8), np.arange(10_000) % 100
        names = np.array([f"class{c}" for c in range(100)])
        np.savez(Path(scratch) / "cifar100-train-32.npz", images=pixels[0], labels=labels, classes=names)
        project = torch.randn(3072, 2048, generator=torch.Generator().manual_seed(0)) / 3072**0.5
        head = torch.randn(2048, 100, generator=torch.Generator().manual_seed(1)) / 2048**0.5

        def forward(x):  # costs nearly nothing: what is left is the scores
            features = (x.float().flatten(1) / 127.5 - 1) @ project.to(x.device)
            return features, (features @ head.to(x.device)).softmax(1)

        stand_in = metrics.FeatureNetwork("stand-in", "FD", "stand-in", forward, None)
        metrics.load_feature_network = lambda *_: stand_in
        samples = torch.from_numpy(pixels[1]).permute(0, 3, 1, 2), torch.from_numpy(labels)
        together = 0.0
        for name in ("fid,is", "kid", "pr,dc", "prd"):  # the first also makes the features of the reference
            [seconds] = in_turn([lambda: metrics.evaluate(*samples, "cifar100", scratch, device=device, scores=name)],  # noqa: B023
                                runs=1, warm_up=name == "fid,is")  # fmt: skip
            row(f"10,000 against 10,000, 2048 features, 100 classes: {name}", seconds, "s", "and within thirds and classes")
            together += seconds[0]
        row("all of them", [together], "s", "with four times the extraction of cheap features")


def start_up(device, threads):
    """Whole processes: from the command to the end of the first step, and the peak memory of one on CIFAR's size.

    Comes first: what the system reports of a child is at least what this process had when it started the child.
    """
    with tempfile.TemporaryDirectory() as scratch:
        images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
        names = np.array([f"class{c}" for c in range(100)])
        np.savez(Path(scratch) / "cifar100-train-32.npz", images=images, labels=np.arange(50_000) % 100, classes=names)
        for name, flags in (("shapeslt, one step", ["--dataset", "shapeslt"]),
                            ("cifar100lt, one step of the paper's network", ["--dataset", "cifar100lt"])):
            seconds, memory = [], []
            for i in range(3):
                command = [sys.executable, ROOT / "cbdm.py", *flags, "--steps", "1", "--eval-images", "0",
                           "--sample-every", "0", "--run-dir", f"{scratch}/{name}{i}",
                           "--data-dir", scratch, "--device", device.type]
                began = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                           env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                _, status, usage = os.wait4(process.pid, 0)
                assert status == 0
                seconds.append(time.perf_counter() - began)
                memory.append(usage.ru_maxrss / 2**20)
            row(f"{name}: whole command", seconds, "s")
            row(f"{name}: peak memory", memory, "GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    parser.add_argument("--only", default="start_up,training,sampling,cbgan,softlabel,frechet,scores",
                        help="which parts, with commas between")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = cbdm.pick_device("auto")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}; median [smallest .. largest]")
    peak = {name: row(f"matrix product 2048, {name}", matrix_throughput(device, getattr(torch, name)), "GFLOP/s")
            for name in ("float32", "bfloat16")}
    for part in args.only.split(","):
        {"start_up": lambda: start_up(device, args.threads), "training": lambda: training(device, peak),
         "sampling": lambda: sampling(device, peak), "cbgan": lambda: cbgan_training(device), "frechet": frechet,
         "scores": lambda: scores(device),
         "softlabel": lambda: [softlabel_training(device, *at) for at in ((32, 64, 32), (128, 80, 16))]}[part]()


if __name__ == "__main__":
    main()
