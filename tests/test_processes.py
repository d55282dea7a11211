"""Several processes under torchrun, on the CPU: the run of one, to rounding; signals and sudden deaths."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, flat, log_of, state_of

import cbdm
import cbgan
import datasets
import softlabel_gan

COMMON = ["--dataset", "shapeslt", "--batch-size", "8", "--amp", "off", "--device", "cpu",
          "--eval-images", "0", "--sample-every", "0", "--steps", "6"]
# Small rates: Adam turns the rounding of gradients that are next to 0 into whole steps.
GAN = [*COMMON, "--width", "4", "--discriminator-width", "4", "--lr", "1e-5", "--ema-start", "2"]
RUNS = {
    "cbdm": (cbdm, [*COMMON, "--channels", "8", "--regularise-after", "0", "--lr-schedule", "constant",
                    "--lr", "1e-5", "--warmup", "2"]),
    "cbgan": (cbgan, [*GAN, "--cycle", "2", "--monitor-every", "0"]),
    "cbgan-inverse": (cbgan, [*GAN, "--cycle", "2", "--monitor-every", "0", "--conditioning", "inverse"]),
    "cbgan-acgan": (cbgan, [*GAN, "--monitor-every", "0", "--conditioning", "acgan"]),
    "softlabel": (softlabel_gan, [*GAN, "--labels", "soft", "--d-steps", "2"]),
    "softlabel-mixup": (softlabel_gan, [*GAN, "--labels", "mixup"]),
}


def arguments(name, judges):
    module, flags = RUNS[name]
    needs = name in ("cbgan", "cbgan-inverse", "softlabel")
    return module, flags + ["--classifier", judges.loop] * needs


def torchrun(program, *words, processes=2, **kwargs):
    """Starts the program, a text, in several processes; they import the project."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
               "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, program, *map(str, words)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


@pytest.fixture(scope="module")
def both(judges, tmp_path_factory):
    """Every run with one process, here; with two, all of them in one start; and one that changes after three
    steps from two processes to one."""
    where = tmp_path_factory.mktemp("processes")
    calls = []
    for name in RUNS:
        module, flags = arguments(name, judges)
        module.main([*flags, "--run-dir", str(where / "one" / name)])
        calls.append((module.__name__, [*flags, "--run-dir", str(where / "two" / name)]))
    module, flags = arguments("cbdm", judges)
    calls.append(("cbdm", [*flags, "--steps", "3", "--run-dir", str(where / "changed" / "cbdm")]))
    # dropout, scores and samples, shared out
    calls.append(("cbdm", [*flags, "--steps", "2", "--dropout", "0.5", "--run-dir", str(where / "dropout")]))
    scored = ["--eval-images", "41", "--eval-only", "--features", f"classifier:{judges.annotator}",
              "--data-dir", str(where / "data"), "--run-dir", str(where / "two" / "cbgan")]
    calls.append(("cbgan", arguments("cbgan", judges)[1] + scored))
    program = where / "program.py"
    program.write_text(textwrap.dedent("""\
        import importlib
        for name, flags in CALLS:
            importlib.import_module(name).main(flags)
        """).replace("CALLS", repr(calls)))
    process = torchrun(program, cwd=where)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    module.main([*flags, "--run-dir", str(where / "changed" / "cbdm")])
    return where, out


def difference(a, b, parts=("model", "G", "D", "ema")):
    """|a - b| / |a| of all weights of two checkpoints, but for biases before batch norms: they do nothing."""

    def weights(where):
        return {name: x.double() for name, x in flat(state_of(where)).items()
                if name.split("/")[0] in parts and not ("blocks" in name and name.endswith("bias/"))}

    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and len(a) > 10
    total = sum((x**2).sum() for x in a.values())
    return (sum(((a[name] - b[name]) ** 2).sum() for name in a) / total).sqrt().item()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_follow_the_run_of_one(name, both):
    where, _ = both
    one, two = where / "one" / name, where / "two" / name
    assert difference(one, two) < 1e-5
    start = {"cbdm": "model"}.get(name, "G")
    assert state_of(one)["step"] == state_of(two)["step"] == 6 and start in state_of(one)
    if "c" in state_of(one):
        assert torch.equal(state_of(one)["N_hat"], state_of(two)["N_hat"])  # counts are of the whole batch


def test_a_run_may_change_the_number_of_processes(both):
    where, _ = both
    assert difference(where / "one" / "cbdm", where / "changed" / "cbdm") < 1e-5


def test_one_process_speaks_and_writes(both):
    where, out = both
    assert out.count("CBDM on shapeslt") == 3 and out.count("GAN, conditioning none") == 2
    assert (where / "two" / "cbgan" / "metrics.json").exists()
    lines = (where / "two" / "cbdm" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 1


def test_losses_in_the_log_are_of_the_whole_batch(both):
    where, _ = both
    one, two = (log_of(where / kind / "cbdm")[-1] for kind in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_samples_are_shared_out_and_put_together(both, judges):
    """As many as one process draws, and the same, whatever the number of processes."""
    where, _ = both
    state = state_of(where / "two" / "cbgan")
    args = cbgan.parse_settings(arguments("cbgan", judges)[1])
    G = cbgan.build_generator(args, 10).eval()
    G.load_state_dict(state["ema"])
    images = cbgan.draw_samples(G, 41, cbgan.FINAL, 0, torch.ones(10), args, False)
    with np.load(where / "two" / "cbgan" / "samples.npz") as samples:
        found = torch.from_numpy(samples["images"]).permute(0, 3, 1, 2)
    assert found.shape == images.shape and (found.int() - images.int()).abs().max() <= 1


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


@pytest.mark.parametrize("who", ["SIGTERM to all", "SIGKILL of one"])
def test_processes_that_are_stopped_leave_a_run_that_resumes(who, tmp_path):
    run = tmp_path / "run"
    flags = [*RUNS["cbdm"][1], "--steps", "100000", "--save-every", "20", "--run-dir", str(run)]
    program = tmp_path / "program.py"
    program.write_text(f"import os, cbdm\nopen('pid-' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
                       f"cbdm.main({flags!r})\n")
    process = torchrun(program, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.1)
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    if "TERM" in who:
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    state = state_of(run)
    assert state["step"] > 0 and ("TERM" in who or state["step"] % 20 == 0)
    cbdm.main([*RUNS["cbdm"][1], "--steps", str(state["step"] + 1), "--run-dir", str(run)])
    assert state_of(run)["step"] == state["step"] + 1
