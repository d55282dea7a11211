"""How fast the project is, in one table: `python tests/benchmark.py [--threads 2] [--only
training,sampling,...]`.

Each row is a median with its smallest and largest. Training steps are those of main() itself, read from its
log.jsonl;
functions that are compared run in turn (A B A B ...), so that a machine whose speed drifts does not decide.
Not collected by pytest.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cbdm  # noqa: E402
import cbgan  # noqa: E402
import classifier  # noqa: E402
import datasets  # noqa: E402
import metrics  # noqa: E402
import softlabel_gan  # noqa: E402


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
    print(f"{name:<58} {middle:>10.4g} {unit:<10} [{min(values):.4g} .. {max(values):.4g}]  {note}",
          flush=True)
    return middle


def matrix_throughput(device, dtype, size=2048):
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return [2 * size**3 / s / 1e9 for s in in_turn([lambda: a @ b], runs=9, warm_up=2)[0]]


STEPS = 8  # of which the first two are not counted
RUNS = {  # flags of main(), and the ways that are compared
    "training": ("cbdm.py", ["--dataset", "cifar100lt", "--batch-size", "16"], {
        "CBDM": [], "CBDM, float32": ["--amp", "off"], "DDPM": ["--tau", "0"],
        "DDPM, float32": ["--tau", "0", "--amp", "off"]}),
    "cbgan": ("cbgan.py", ["--dataset", "cifar10lt", "--batch-size", "64", "--monitor-images", "0"], {
        "CBGAN": [], "CBGAN, float32": ["--amp", "off"], "without the regulariser": ["--reg-weight", "0"]}),
    "softlabel": ("softlabel_gan.py", ["--dataset", "cifar10imb", "--batch-size", "32", "--d-steps", "1"], {
        "Softlabel-GAN": [], "Softlabel-GAN, float32": ["--amp", "off"],
        "one-hot labels": ["--labels", "onehot"]}),
}


def made_up_cifar(data_dir):
    """Prepared arrays of noise, with the classes of both CIFARs: the speed of a step does not depend on the
    pictures."""
    for source, K in (("cifar10", 10), ("cifar100", 100)):
        for split, n in (("train", 50_000), ("test", 10_000)):
            images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            classes = np.array([f"class{c}" for c in range(K)])
            np.savez(Path(data_dir) / f"{source}-{split}-32.npz", images=images, labels=np.arange(n) % K,
                     classes=classes)


def training(part, device):
    """Seconds a step of main() itself, from its log, at the paper's size: every number is that of a whole
    training step."""
    script, flags, ways = RUNS[part]
    module = {"cbdm.py": cbdm, "cbgan.py": cbgan, "softlabel_gan.py": softlabel_gan}[script]
    datasets.LOG_EVERY = 1
    with tempfile.TemporaryDirectory() as scratch:
        made_up_cifar(scratch)
        classifier_file = Path(scratch) / "classifier.pt"
        settings = {"normalisation": classifier.CENTRED, "head": "linear", "training_data": ""}
        names = [f"class{c}" for c in range(10)]
        shares = dict.fromkeys(("all", "head", "middle", "tail"), 0.1)
        untrained = classifier.ResNet32(10, **classifier.CENTRED)
        classifier.save_classifier(classifier_file, untrained, "cifar10", "train", names, 32, settings,
                                   shares, [0.1] * 10)
        for name, more in ways.items():
            given = [] if script == "cbdm.py" or "onehot" in more else ["--classifier", str(classifier_file)]
            run_dir = Path(scratch) / name
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                module.main([*flags, *more, *given, "--steps", str(STEPS), "--sample-every", "0",
                             "--eval-images", "0",
                             "--save-every", "1000000", "--data-dir", scratch, "--run-dir", str(run_dir),
                             "--device", str(device)])
            lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "steps_per_second" in line]  # not those about samples
            row(f"{name}: a training step", [1 / line["steps_per_second"] for line in lines[2:]], "s",
                " ".join(flags[2:]))


def sampling(device):
    """Seconds of a guided DDIM step of the paper's U-Net, 16 images."""
    model = cbdm.UNet(100, 128, (1, 2, 2, 2), blocks=2, attention_level=1, dropout=0.1).to(device).eval()
    args = cbdm.parse_settings(["--dataset", "cifar100lt", "--ddim-steps", "2"])
    amp = datasets.use_bf16("auto", device)
    ways = [
        lambda amp=amp: cbdm.sample(model, torch.arange(16), args, amp, 0, "ddim") for amp in (amp, False)
    ]
    for name, seconds in zip(("", ", float32"), in_turn(ways, runs=3), strict=True):
        row(f"guided sampling step, 16 images{name}", [s / 2 for s in seconds], "s")


def frechet():
    """Against scipy's matrix square root, on the same features."""
    from scipy import linalg

    rng = np.random.default_rng(0)
    mix = rng.normal(size=(2048, 2048)) / 45
    real, fake = rng.normal(size=(10_000, 2048)) @ mix, rng.normal(size=(10_000, 2048)) @ mix * 1.1 + 0.05

    def by_sqrtm(a, b):
        s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        return ((a.mean(0)
                 - b.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2).real)

    m = [(x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake)]
    result = {}

    def ours():
        result["ours"] = metrics.frechet_distance_from_moments(*m[0], *m[1])

    def theirs():
        (mu1, s1), (mu2, s2) = m
        result["sqrtm"] = (
            ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2).real)
        )

    fast, slow = in_turn([ours, theirs], runs=3, warm_up=0)
    row("Frechet distance from moments, 2048 dimensions, ours", fast, "s", f"value {result['ours']:.6f}")
    row("Frechet distance from moments, 2048 dimensions, sqrtm", slow, "s", f"value {result['sqrtm']:.6f}")
    row("sqrtm / ours", [a / b for a, b in zip(slow, fast, strict=True)], "times")
    row("relative difference", [abs(result["ours"] / result["sqrtm"] - 1)], "")
    row("from 10,000 x 2,048 features, ours",
        in_turn([lambda: metrics.frechet_distance(real, fake)], runs=3)[0], "s")

    labels = np.arange(5000) % 100
    few = real[:5000], labels, fake[:5000], labels
    [intra] = in_turn([lambda: metrics.intra_fid(*few)], runs=3)
    [one] = in_turn([lambda: by_sqrtm(real[labels.nonzero()[0][:50]], fake[:50])], runs=2, warm_up=0)
    row("intra-FID, 100 classes of 50 images, 2048 dim., a class, ours", [s / 100 for s in intra], "s")
    row("intra-FID, one class, sqrtm", one, "s")
    row("sqrtm / ours, a class", [s / (statistics.median(intra) / 100) for s in one], "times")


def scores(device):
    """Each score of 2,000 against 2,000 images with 2,048 features, ours and the plain way; then all, as
    `evaluate` does."""
    import scipy.cluster.vq
    from scipy.spatial.distance import cdist
    from torchvision.models import alexnet

    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, 2000,
                                  2048)).astype(np.float32) + rng.normal(size=(1, 2048)).astype(np.float32)
    x, y = real.astype(np.float64), fake.astype(np.float64)
    k, clusters = 5, 400

    def balls():
        """Three whole tables of distances by differences, one of each set with itself."""
        # place 0 is the image itself
        among, r, f = cdist(x, y), *(np.partition(cdist(a, a), k, 1)[:, k] for a in (x, y))
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
        return metrics.f_beta(*metrics.prd_curve(*(np.bincount(m, minlength=clusters) / 2000
                                                   for m in np.split(mine, 2))), 8)

    torch.manual_seed(0)
    # random weights: only the time counts
    layers = alexnet().features[:-1].to(device).eval().requires_grad_(False)
    widths = [layer.out_channels for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    network = metrics.Lpips(layers, [torch.rand(c, 1, 1, device=device).double() for c in widths])
    images = torch.from_numpy(rng.integers(0, 256, (100, 3, 32, 32), dtype=np.uint8))

    @torch.no_grad()
    def lpips():
        """Features once, then every pair by itself."""
        features = [f.double() for f in metrics.lpips_features(images.to(device), network)]
        pairs = [sum(((f[i] - f[j]) ** 2 * w).sum(0).mean() for f,
                     w in zip(features, network.weights, strict=True)).item()
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
        fast, slow = in_turn([functools.partial(run, "ours", ours), functools.partial(run, "plain", plain)],
                             2, 0)
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
            [seconds] = in_turn([lambda: metrics.evaluate(*samples, "cifar100", scratch, device=device,
                                                          scores=name)],  # noqa: B023
                                runs=1, warm_up=name == "fid,is")  # fmt: skip
            row(f"10,000 against 10,000, 2048 features, 100 classes: {name}", seconds, "s",
                "and within thirds and classes")
            together += seconds[0]
        row("all of them", [together], "s", "with four times the extraction of cheap features")


def start_up(device, threads):
    """Whole processes: from the command to the end of the first step, and the peak memory of one on CIFAR's
    size.

    Comes first: what the system reports of a child is at least what this process had when it started the
    child.
    """
    with tempfile.TemporaryDirectory() as scratch:
        images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
        names = np.array([f"class{c}" for c in range(100)])
        np.savez(Path(scratch) / "cifar100-train-32.npz", images=images, labels=np.arange(50_000) % 100,
                 classes=names)
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
    device = datasets.pick_device("auto")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}; median [smallest .. largest]")
    for name in ("float32", "bfloat16"):
        row(f"matrix product 2048, {name}", matrix_throughput(device, getattr(torch, name)), "GFLOP/s")
    parts = {
        "start_up": lambda: start_up(device, args.threads),
        "sampling": lambda: sampling(device),
        "frechet": frechet,
        "scores": lambda: scores(device),
    } | {part: functools.partial(training, part, device) for part in RUNS}
    for part in args.only.split(","):
        parts[part]()


if __name__ == "__main__":
    main()
