"""Does the project run on a GPU? Asked on a machine that has none.

A CPU forgives mistakes that a GPU does not: a tensor left behind, a random generator of the other device,
float64 on MPS, NumPy at the wrong moment. So a GPU is pretended here. Each of its tensors (`OnDevice`) says
that it lies on cuda:0 or mps:0 and holds a CPU tensor with its numbers. `Device` is shown each operation of
PyTorch, refuses what a GPU refuses, and has the CPU compute the rest. A whole run must then end, with the
numbers of a run on the CPU. Mistakes put into the scripts on purpose show that the checks see them.

Not pretended: bfloat16 (hence --amp off), torch.compile, memory, speed, operations that MPS lacks. The last
test needs a real GPU.
"""

import collections
import functools
import json
import os
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, edited, log_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cbdm
import cbgan
import classifier
import datasets
import metrics
import softlabel_gan

# --------------------------------------------------------------------------------------------------
# A GPU that is not there
# --------------------------------------------------------------------------------------------------
# Every build of PyTorch has the device "meta", whose tensors have a shape and no memory. What the scripts
# know as cuda or mps is that device to PyTorch's C++ side.
META = torch.device("meta")
COPIES = ("_to_copy", "copy_")  # from one device to the other
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")  # the first is .item()


class Refused(Exception):
    """What a GPU refuses. No script expects this exception, so none handles it."""


class OnDevice(torch.Tensor):
    kind = None  # "cuda" or "mps"
    is_meta = False
    device = property(lambda self: torch.device(self.kind, 0))
    __torch_function__ = torch._C._disabled_torch_function_impl  # its results are made by Device

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                   dtype=inner.dtype, device=META)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise Refused(f"{func}: the test is over, and there is no such device any more")

    def numpy(self, **_):  # np.asarray calls it too
        raise Refused(f"numpy of a tensor on {self.device}")

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.inner.__reduce_ex__(protocol)


class Generator(torch.Generator):
    """Draws on the CPU. Device knows by its address that it was made for the pretended GPU."""

    there = {}  # address: generator, kept so that no other gets that address

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        if torch.device(device).type == OnDevice.kind:
            cls.there[generator._cdata] = generator
        return generator

    def __init__(self, device="cpu"):
        pass


class Names(TorchFunctionMode):
    """Where Python names the device, as in x.to("cuda") or zeros(3, device="cuda"), C++ hears "meta"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args)
        args, kwargs = [self.meta(a) for a in args], {k: self.meta(a) for k, a in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            return func(*args, **kwargs | {"device": "cpu"}).to(META)  # else C++ would drop the numbers
        return func(*args, **kwargs)

    def meta(self, a):
        return META if isinstance(a, torch.device | str) and str(a).split(":")[0] == OnDevice.kind else a


class Device(TorchDispatchMode):
    """Sees each operation, those of backward() included.

    waits: a Counter of the project's lines at which the CPU waits until the GPU has finished all its work.
    """

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        asked = kwargs.get("device")
        made_there = asked == META if asked is not None else OnDevice in types
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in Generator.there) != made_there:
            raise Refused(f"{func}: a generator of the other device")
        if not made_there and OnDevice not in types:
            return func(*args, **kwargs)  # nothing but CPU tensors

        # All tensors on one device. PyTorch makes exceptions of copies, indices, and single numbers.
        items = [y for x in (*args, *kwargs.values()) for y in (x if type(x) in (list, tuple) else [x])]
        tensors = [x for x in items if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if not isinstance(x, OnDevice)]
        pointwise = torch.Tag.pointwise in func.tags or "fill" in name
        waits = name in WAITS
        if name in COPIES:
            asynchronous = kwargs.get("non_blocking") or name == "copy_" and args[2:] == (True,)
            waits = not made_there or here and not asynchronous  # to the CPU; from it
        elif here and name == "index" and isinstance(args[0], OnDevice):
            waits = True
        elif here and not (pointwise and all(x.dim() == 0 for x in here)):
            shapes = [(*x.shape, x.device.type) for x in tensors]
            raise Refused(f"{func}: tensors on {OnDevice.kind} and on the CPU, {shapes}")
        if OnDevice.kind == "mps" and name in ("convolution", "convolution_backward"):
            images = [x.inner for x in tensors if x.dim() == 4 and not x.inner.is_contiguous()]
            if any(x.is_contiguous(memory_format=torch.channels_last) for x in images):
                raise Refused(f"{func}: on MPS channels_last gives wrong gradients, at {project_line()}")
        if waits:
            self.waits[project_line()] += 1

        def plain(x):
            return x.inner if isinstance(x, OnDevice) else x

        def wrapped(x):
            if id(x) in given or not made_there or not isinstance(x, torch.Tensor):
                return given.get(id(x), x)
            if OnDevice.kind == "mps" and x.dtype == torch.float64:
                raise Refused(f"{func}: MPS has no float64")
            return OnDevice(x)

        given = {id(plain(x)): x for x in tensors}  # operations in place return what they were given
        if made_there and asked is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        args, kwargs = [each(plain, x) for x in args], {k: each(plain, x) for k, x in kwargs.items()}
        return each(wrapped, func(*args, **kwargs))


def each(f, x):
    """f(x), or f of each item where an operation takes or returns several tensors as one argument."""
    return type(x)([f(y) for y in x]) if type(x) in (list, tuple) else f(x)


FILES = {file for path in ROOT.glob("*.py") for file in (str(path), path.name)}  # edited ones: the name alone


def project_line():
    """The innermost line of the project that is being executed."""
    frame = sys._getframe()
    while frame and frame.f_code.co_filename not in FILES:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "elsewhere"


@pytest.fixture(params=["cuda", "mps"])
def pretended(request, monkeypatch):
    """The Device of a machine with such a GPU. When the test ends everything is as it was."""
    monkeypatch.setattr(OnDevice, "kind", request.param)
    monkeypatch.setattr(Generator, "there", {})
    monkeypatch.setattr(torch, "Generator", Generator)
    for place in (torch.cuda, torch.mps):  # noise without a generator comes from the CPU's default one
        monkeypatch.setattr(place, "get_rng_state", lambda *_: torch.get_rng_state())
        monkeypatch.setattr(place, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "pretended")
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to() makes new parameters
    try:
        with Names(), Device() as device:
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


# --------------------------------------------------------------------------------------------------
# Small runs
# --------------------------------------------------------------------------------------------------
COMMON = ["--dataset", "shapeslt", "--rho", "4", "--amp", "off"]
CLASSIFIER = [*COMMON, "--epochs", "1", "--batch-size", "40"]
GAN = ["--width", "2", "--discriminator-width", "2", "--ema-start", "1"]
SLOW = ["--lr", "1e-5", "--lr-d", "1e-5"]  # Adam turns rounding, other in MPS's layout, into whole steps
DIFFUSION = ["--channels", "4", "--ddim-steps", "2", "--regularise-after", "0", "--lr-schedule", "constant"]
RUNS = {  # name: script, whether it takes a classifier, flags
    "cbdm": (cbdm, False, [*DIFFUSION, "--multipliers", "1", "1", "--attention-level", "1"]),
    "edm": (cbdm, False, [*DIFFUSION, "--multipliers", "1", "1", "--attention-level", "1", "--prediction",
                          "edm", "--augment", "ada"]),
    "vit": (cbdm, False, [*DIFFUSION, "--backbone", "vit", "--augment", "diffaug"]),
    "cbgan": (cbgan, True, [*GAN, "--cycle", "1", "--monitor-every", "2", "--monitor-images", "12"]),
    "acgan": (cbgan, False, [*GAN, "--monitor-every", "0", "--conditioning", "acgan",
                             "--architecture", "snresgan", "--scores", "all"]),
    "soft": (softlabel_gan, True, [*GAN, *SLOW, "--diffaug", "color,translation,cutout"]),
    "adc": (softlabel_gan, False, [*GAN, "--labels", "smooth", "--conditioning", "adc"]),
    "mixup": (softlabel_gan, False, [*GAN, "--labels", "mixup"]),
    "cotrain": (softlabel_gan, False, [*GAN, *SLOW, "--labels", "cotrain"]),
}


class Small(classifier.ResNet32):
    """Two blocks where ResNet-32 has fifteen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = torch.nn.Sequential(classifier.BasicBlock(16, 32), classifier.BasicBlock(32, 64))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier of one epoch: in the loop, for labels, and to score samples. Images are few meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "SHAPES_PER_CLASS", {"train": 20, "reference": 8, "test": 8})
        patch.setattr(datasets, "draw_shapes", functools.cache(datasets.draw_shapes.__wrapped__))
        patch.setattr(datasets, "environment", functools.cache(datasets.environment))  # it asks git
        patch.setitem(classifier.NETWORKS, "resnet32", Small)
        patch.setattr(metrics, "CLUSTERS", 2)  # F_8 needs at least as many images of a class
        where = tmp_path_factory.mktemp("judge")
        classifier.main([*CLASSIFIER, "--device", "cpu", "--run-dir", str(where)])
        yield str(where / "classifier.pt")
    torch.set_num_threads(threads)


def command(name, judge, where, device):
    _, asks, flags = RUNS[name]
    return [*COMMON, "--batch-size", "4", *flags, *(["--classifier", judge] if asks else []), "--features",
            f"classifier:{judge}", "--data-dir", str(where), "--run-dir", str(where), "--device", device]


def run(name, judge, where, device):
    """Two steps; then a third after resuming, a grid of samples, and scores. Returns log and scores."""
    main, flags = RUNS[name][0].main, command(name, judge, where, device)
    main([*flags, "--steps", "2", "--sample-every", "0", "--eval-images", "0"])
    main([*flags, "--steps", "3", "--sample-every", "3", "--eval-images", "12"])
    assert (where / "samples" / "step-0000003.png").exists()
    return log_of(where), json.loads((where / "metrics.json").read_text())["all"]


@pytest.fixture(scope="module", params=RUNS)
def on_cpu(request, judge, tmp_path_factory):
    """A name in RUNS, and what that run gives on the CPU."""
    return request.param, run(request.param, judge, tmp_path_factory.mktemp("cpu"), "cpu")


def numbers(x):
    """Every number in a nest of dictionaries and lists, in order."""
    if isinstance(x, dict | list | tuple):
        return [n for y in (x.values() if isinstance(x, dict) else x) for n in numbers(y)]
    return [x] if isinstance(x, int | float) else []


# --------------------------------------------------------------------------------------------------
# What passes
# --------------------------------------------------------------------------------------------------
def test_the_scripts_run(on_cpu, pretended, judge, tmp_path):
    name, expected = on_cpu
    found = run(name, judge, tmp_path, OnDevice.kind)
    rel = 5e-2 if name == "edm" else 1e-2  # on MPS ADA interpolates in another way
    assert numbers(found) == pytest.approx(numbers(expected), rel=rel, abs=1e-3)


@pytest.mark.parametrize("flags", [["--hold-out", "0.2", "--drw", "--epochs", "2"], ["--soft-labels"]])
def test_the_classifier_trains(flags, pretended, judge, tmp_path):
    logs = []
    for device in (OnDevice.kind, "cpu"):
        torch.manual_seed(0)
        classifier.main([*CLASSIFIER, *flags, "--device", device, "--run-dir", str(tmp_path / device)])
        logs.append(numbers(log_of(tmp_path / device)))
    assert logs[0] == pytest.approx(logs[1], rel=1e-2, abs=1e-3)


def test_cbdm_runs_without_its_regulariser(pretended, judge, tmp_path):
    flags = ["--steps", "1", "--tau", "0", "--sample-every", "0", "--eval-images", "0"]
    cbdm.main([*command("cbdm", judge, tmp_path, OnDevice.kind), *flags])
    assert log_of(tmp_path)[-1]["step"] == 1


@pytest.mark.parametrize("pretended", ["mps"], indirect=True)
def test_lpips(pretended, monkeypatch):
    layers, widths = torchvision.models.alexnet().features, (64, 192, 384, 256, 256)
    body = {f"features.{name}": w for name, w in layers.state_dict().items()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate(widths)}
    fetch = {metrics.LPIPS_WEIGHTS: heads}
    monkeypatch.setattr(metrics, "fetch_weights", lambda url, _: fetch.get(url, body))
    images = torch.randint(256, (3, 3, 31, 31), dtype=torch.uint8)
    found, expected = (metrics.lpips_diversity(images, device=device) for device in (OnDevice.kind, "cpu"))
    assert found == pytest.approx(expected, rel=1e-3)


def waits_of_a_step(name, judge, where, device, main=None):
    """What a run of three steps waits for and one of two does not: a Counter of lines."""
    found = []
    for steps in ("3", "2"):
        device.waits.clear()
        flags = [*command(name, judge, where / steps, "cuda"), "--sample-every", "0", "--eval-images", "0"]
        (main or RUNS[name][0].main)([*flags, "--steps", steps])
        found.append(device.waits.copy())
    return found[0] - found[1]


cuda = pytest.mark.parametrize("pretended", ["cuda"], indirect=True)  # on MPS all copies wait


@cuda
@pytest.mark.parametrize("name", ["cbdm", "acgan", "mixup"])
def test_no_step_waits_for_the_gpu(name, pretended, judge, tmp_path):
    """A GPU that is waited for idles while the CPU prepares its next work."""
    assert not waits_of_a_step(name, judge, tmp_path, pretended)


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------
LABELS = "to_device(my_share(torch.multinomial(q_Y, B, replacement=True)), device)"


@pytest.mark.parametrize("pretended, name, right, wrong, refusal", [
    ("cuda", "cbdm", LABELS, "torch.multinomial(q_Y, B, replacement=True)", "and on the CPU"),
    ("mps", "soft", "return to_device(z, device)", "return z", "and on the CPU"),
    ("cuda", "cbdm", "torch.Generator(device)", "torch.Generator()", "generator"),
    ("mps", "cbdm", "w.cpu().contiguous().numpy()", "w.contiguous().numpy()", "numpy"),
    ("mps", "cbgan", ".float().to(device)\n    zero", ".to(device)\n    zero", "no float64"),  # w of Eq. 7
    ("mps", "cbdm", "datasets.laid_out(f(h))", "f(h)", "channels_last"),
], indirect=["pretended"])
def test_a_mistake_in_a_script_is_seen(pretended, name, right, wrong, refusal, judge, tmp_path):
    main, flags = edited(f"{RUNS[name][0].__name__}.py", (right, wrong)).main, ["--steps", "1"]
    with pytest.raises(Refused, match=refusal):
        main([*command(name, judge, tmp_path, OnDevice.kind), *flags, "--eval-images", "12"])


@cuda
def test_a_wait_in_a_step_is_seen(pretended, judge, tmp_path):
    main = edited("softlabel_gan.py", ("L_D.backward()", "L_D.backward(), L_D.item()")).main
    assert list(waits_of_a_step("mixup", judge, tmp_path, pretended, main).values()) == [1]


def test_single_operations(pretended):
    """What PyTorch refuses, what it allows, and what makes the CPU wait."""
    kind, here = OnDevice.kind, torch.tensor([1, 2, 3])
    x = torch.tensor([1.0, 2, 3], device=kind)
    pretended.waits.clear()
    y = x * torch.tensor(2.0) + here.to(kind, non_blocking=True)
    assert y.device == x.device and not pretended.waits
    assert (y[torch.tensor([2])] + here.to(kind)).tolist() == [10, 11, 12] and pretended.waits.total() == 3

    refused = [lambda: x + here, lambda: torch.cat([x, here]), lambda: here[x.long()], lambda: np.asarray(x),
               lambda: x.normal_(generator=torch.Generator()), x.numpy,
               lambda: torch.randn(3, generator=torch.Generator(kind))]
    refused += [x.double, lambda: torch.zeros((), dtype=torch.float64, device=kind)] * (kind == "mps")
    for operation in refused:
        with pytest.raises(Refused):
            operation()


# --------------------------------------------------------------------------------------------------
# A real GPU
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, there", [("cuda", torch.cuda.is_available()),
                                         ("mps", torch.backends.mps.is_available())])
def test_the_scripts_run_on_a_real_gpu(kind, there, on_cpu, judge, tmp_path, monkeypatch):
    if not there:
        pytest.skip(f"there is no {kind} device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    name, (expected, _) = on_cpu
    log, scores = run(name, judge, tmp_path, kind)
    assert np.isfinite(numbers([log, scores])).all() and log[-1]["step"] == 3
    if RUNS[name][0] is not cbdm and name != "cotrain":  # cbdm draws its noise on the device
        losses = [[row.get(k) for row in rows for k in RUNS[name][0].LOGGED] for rows in (log, expected)]
        assert numbers(losses[0]) == pytest.approx(numbers(losses[1]), rel=1e-2, abs=1e-3)
