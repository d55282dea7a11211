"""Several processes under torchrun, on the CPU: the run of one, to rounding; signals and sudden deaths."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, flat, log_of, state_of
from PIL import Image

import cbdm
import cbgan
import datasets
import softlabel_gan

COMMON = ["--dataset", "shapeslt", "--batch-size", "8", "--amp", "off", "--device", "cpu",
          "--eval-images", "0", "--sample-every", "100", "--steps", "6"]
# Small rates: Adam turns the rounding of gradients that are next to 0 into whole steps. CBDM's is larger: its
# first answer to every label is 0, and only once that changes does it matter which label an image gets.
GAN = [*COMMON, "--width", "4", "--discriminator-width", "4", "--lr", "1e-5", "--ema-start", "2"]
RUNS = {
    "cbdm": (cbdm, [*COMMON, "--channels", "8", "--regularise-after", "0", "--lr-schedule", "constant",
                    "--lr", "1e-3", "--warmup", "2", "--tau", "1", "--drop-rate", "0.5", "--ddim-steps", "2",
                    "--sampler", "ddim"]),
    "cbdm-edm": (cbdm, [*COMMON, "--channels", "8", "--regularise-after", "0", "--lr-schedule", "constant",
                        "--lr", "1e-3", "--warmup", "2", "--tau", "1", "--prediction", "edm", "--augment",
                        "ada"]),
    "cbgan": (cbgan, [*GAN, "--cycle", "2", "--monitor-every", "0", "--reg-weight", "100"]),
    "cbgan-inverse": (cbgan, [*GAN, "--cycle", "2", "--monitor-every", "0", "--conditioning", "inverse"]),
    "cbgan-acgan": (cbgan, [*GAN, "--monitor-every", "0", "--conditioning", "acgan"]),
    "softlabel": (softlabel_gan, [*GAN, "--labels", "soft", "--d-steps", "2"]),
    "softlabel-mixup": (softlabel_gan, [*GAN, "--labels", "mixup"]),
    "softlabel-adc": (softlabel_gan, [*GAN, "--labels", "smooth", "--conditioning", "adc"]),
    # One step: C is deep and learns fast on eight images; after a few, a tenth of its gradient is rounding.
    "softlabel-cotrain": (softlabel_gan, [*GAN, "--labels", "cotrain", "--steps", "1"]),
}
# |a - b| / |a| of what may differ by more than 1e-4 (seen: 2e-5): gradients, as their optimizer averages
# them, where a ReLU is next to 0 (seen: 2e-4, in C 1e-2; 1e-2 and more if p_hat is of a process's share, 0.9
# if C's gradients are); batch means, which follow biases before batch norms (seen: 2e-4; 2e-2 and more).
BOUNDS = dict.fromkeys(("exp_avg", "exp_avg_sq", "running_mean"), 5e-3) | {"momentum_buffer": 0.1}
FEW = {"train": 100, "reference": 30, "test": 10}  # images a class
AT_ONCE = {"cpu": 5}  # so that cbdm.py draws samples and grids in several batches: 20 of 16 x 16 pixels each


def arguments(name, judges):
    module, flags = RUNS[name]
    needs = name in ("cbgan", "cbgan-inverse", "softlabel")
    return module, flags + ["--classifier", judges.loop] * needs


def torchrun(calls, where):
    """Starts two processes in a directory that make these calls, (module, flags), of main()."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = where / "program.py"
    program.write_text(textwrap.dedent("""\
        import importlib, os, pathlib, time, cbdm, datasets
        datasets.SHAPES_PER_CLASS, cbdm.AT_ONCE = FEW
        pathlib.Path(f"pid-{datasets.RANK}").write_text(str(os.getpid()))
        *before, last = CALLS
        for name, flags in before:
            importlib.import_module(name).main(flags)
        with datasets.first_process_first():
            time.sleep(0 if datasets.RANK else 0.2)
            there = pathlib.Path("turn-0").exists()
            pathlib.Path(f"turn-{datasets.RANK}").write_text(f"{there} {datasets.together()}")
        importlib.import_module(last[0]).main(last[1])
        """).replace("CALLS", repr(calls)).replace("FEW", repr((FEW, AT_ONCE))))
    return subprocess.Popen([*command, str(program)], env=environment, text=True, cwd=where,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def endless(run, save_every):
    flags = ["--steps", "100000", "--save-every", str(save_every)]
    return "cbdm", [*RUNS["cbdm"][1], *flags, "--run-dir", str(run)]


def stop(process, where, file, number):
    """Waits for a file, then sends the signal to process 1 alone: stdout and stderr, when all have ended."""
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.1)
    pids = [int((where / f"pid-{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], number)
    out, err = process.communicate(timeout=100)
    assert process.returncode != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return out, err


@pytest.fixture(scope="module")
def few(judges):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "SHAPES_PER_CLASS", FEW)
        patch.setattr(datasets, "draw_shapes", functools.cache(datasets.draw_shapes.__wrapped__))
        patch.setattr(cbdm, "AT_ONCE", AT_ONCE)
        yield


@pytest.fixture(scope="module")
def both(few, judges, tmp_path_factory):
    """Every run with one process, here; with two, all of them in one start; one that changes after three
    steps from two processes to one; and one of which a single process is told to stop."""
    where = tmp_path_factory.mktemp("processes")
    calls = []
    for name in RUNS:
        module, flags = arguments(name, judges)
        module.main([*flags, "--run-dir", str(where / "one" / name)])
        calls.append((module.__name__, [*flags, "--run-dir", str(where / "two" / name)]))
    module, flags = arguments("cbdm", judges)
    short = [*flags, "--sample-every", "0", "--steps"]
    calls.append(("cbdm", [*short, "3", "--run-dir", str(where / "changed" / "cbdm")]))
    calls.append(("cbdm", [*short, "2", "--dropout", "0.5", "--run-dir", str(where / "dropout")]))
    for name in ("cbdm", "cbgan"):  # scores and samples
        scored = [*arguments(name, judges)[1], "--eval-images", "61", "--eval-only", "--data-dir",
                  str(where / "data"), "--features", f"classifier:{judges.annotator}", "--run-dir"]
        RUNS[name][0].main([*scored, str(where / "one" / name)])
        calls.append((name, [*scored, str(where / "two" / name)]))
    calls.append(endless(where / "stopped", 100000))
    process = torchrun(calls, where)
    out, _ = stop(process, where, where / "stopped" / "log.jsonl", signal.SIGTERM)
    module, flags = arguments("cbdm", judges)
    module.main([*flags, "--run-dir", str(where / "changed" / "cbdm")])
    return where, out


def differing(a, b):
    """What differs in two checkpoints: {(network or optimizer, kind of tensor): |a - b| / |a|}.

    Left out are biases: some do nothing, as before a batch norm, and rounding moves them. Their gradients are
    in exp_avg.
    """
    a, b = flat(state_of(a)), flat(state_of(b))
    assert a.keys() == b.keys() and len(a) > 10
    squares = {}
    for name in a:
        part, kind = name.split("/")[0], re.split("[/.]", name)[-2]
        if re.fullmatch("model|ema|[GDC]|optimizer.*", part) and kind != "bias":
            d, n = squares.get((part, kind), (0, 0))
            x = a[name].double()
            squares[part, kind] = d + ((x - b[name]) ** 2).sum(), n + (x**2).sum()
    assert {kind for _, kind in squares} >= {"weight"} and any(kind in BOUNDS for _, kind in squares)
    return {what: (d / n).sqrt().item() for what, (d, n) in squares.items()
            if not d <= BOUNDS.get(what[1], 1e-4) ** 2 * n}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_follow_the_run_of_one(name, both):
    where, _ = both
    one, two = where / "one" / name, where / "two" / name
    assert not differing(one, two)
    assert state_of(one)["step"] == state_of(two)["step"]
    if "N_hat" in state_of(one):
        assert torch.equal(state_of(one)["N_hat"], state_of(two)["N_hat"])  # counts are of the whole batch
    assert log_of(one)[-1] == pytest.approx(log_of(two)[-1], rel=1e-4)  # so are losses
    grids = [np.asarray(Image.open(next((run / "samples").glob("step*.png"))), int) for run in (one, two)]
    assert np.abs(grids[0] - grids[1]).max() <= 1  # rounding


def test_a_run_may_change_the_number_of_processes(both):
    where, _ = both
    assert not differing(where / "one" / "cbdm", where / "changed" / "cbdm")


def test_one_process_speaks_and_writes(both):
    where, out = both
    assert out.count("CBDM on shapeslt") == 6 and out.count("GAN, conditioning none") == 2
    assert (where / "two" / "cbgan" / "metrics.json").exists()
    lines = (where / "two" / "cbdm" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 1


@pytest.mark.parametrize("name", ["cbdm", "cbgan"])
def test_samples_and_scores_are_shared_out_and_put_together(name, both):
    """As many as one process draws, and the same."""
    found = []
    for run in (both[0] / "one" / name, both[0] / "two" / name):
        with np.load(run / "samples.npz") as samples:
            found.append(samples["images"].astype(int))
        found.append(json.loads((run / "metrics.json").read_text())["all"])
    assert len(found[0]) == len(found[2]) == 61 and np.abs(found[0] - found[2]).max() <= 1
    assert found[1]["fd"] == pytest.approx(found[3]["fd"], rel=1e-3)  # of features of 61 images


def test_process_0_goes_first(both):
    """Process 1 finds what process 0 has made, and no process waits for another inside."""
    assert [(both[0] / f"turn-{rank}").read_text() for rank in (0, 1)] == ["False False", "True False"]


def test_each_process_has_masks_of_its_own(monkeypatch):
    """What dropout draws differs from process to process and step to step, and leaves no trace."""
    masks, before = [], torch.get_rng_state()
    for rank, step in ((0, 5), (1, 5), (0, 6), (0, 5)):
        monkeypatch.setattr(datasets, "RANK", rank)
        with datasets.own_randomness(torch.device("cpu"), 0, step):
            masks.append(torch.rand(8))
    assert torch.equal(masks[0], masks[3]) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_an_uneven_batch_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "WORLD", 3)
    with pytest.raises(datasets.InputError, match="shared out evenly among 3 processes"):
        cbdm.parse_settings(["--batch-size", "8"])


def test_batch_norm_of_the_whole_batch_is_torchs():
    """With one process it is nn.BatchNorm2d, in training and not: outputs, gradients, averages."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4, requires_grad=True)
    norms = [torch.nn.BatchNorm2d(3), datasets.SharedBatchNorm(3)]
    for mode in (True, False):
        found = []
        for norm in norms:
            y = norm.train(mode)(x)
            found.append((y, torch.autograd.grad((y**3).sum(), x)[0], norm.running_mean, norm.running_var))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_signal_to_one_process_stops_all_and_the_run_is_saved(both):
    run = both[0] / "stopped"
    state = state_of(run)
    assert 0 < state["step"] < 100000 and both[1].count("stopped by signal 15") == 1
    cbdm.main([*RUNS["cbdm"][1], "--steps", str(state["step"] + 1), "--run-dir", str(run)])
    assert state_of(run)["step"] == state["step"] + 1


def test_the_sudden_death_of_a_process_ends_all_and_the_run_resumes(few, tmp_path):
    run = tmp_path / "run"
    process = torchrun([endless(run, 20)], tmp_path)
    stop(process, tmp_path, run / "checkpoint.pt", signal.SIGKILL)
    step = state_of(run)["step"]
    assert step > 0 and step % 20 == 0
    cbdm.main([*RUNS["cbdm"][1], "--steps", str(step + 1), "--run-dir", str(run)])
    assert state_of(run)["step"] == step + 1
