import os

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported
# One thread for each worker; as many in the processes that tests start: it decides the last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def judge_dir(tmp_path_factory):
    """A data directory with the judge of the shapes, trained once for all tests: a quarter of a minute."""
    from classifier import frozen_classifier

    where = tmp_path_factory.mktemp("data")
    frozen_classifier("shapeslt", where, split="reference", seed=3)
    return where


@pytest.fixture(scope="session")
def judges(tmp_path_factory):
    """Two classifiers of an epoch each: one for the loop, one that annotates."""
    import classifier

    where = tmp_path_factory.mktemp("judges")
    for name, dataset, split in (("loop", "shapeslt", "train"), ("annotator", "shapes", "reference")):
        classifier.main(["--dataset", dataset, "--split", split, "--epochs", "1", "--run-dir",
                         str(where / name)])
    return types.SimpleNamespace(
        **{name: str(where / name / "classifier.pt") for name in ("loop", "annotator")}
    )


@pytest.fixture(scope="session")
def run_script():
    """run_script("cbdm.py", "--steps", 3, cwd=...) -> CompletedProcess with text output."""

    def run(*command, cwd, **kwargs):
        return subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])], cwd=cwd,
                              capture_output=True,
                              text=True, **kwargs)

    return run


def edited(script, *changes):
    """The module of a script in which some passages, (old, new), are replaced: what a reader tries at a
    TRY."""
    source = (ROOT / script).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{script} has {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    module = types.ModuleType(f"{Path(script).stem}_edited")
    module.__file__ = str(ROOT / script)
    exec(compile(source, script, "exec"), module.__dict__)
    return module


# What a run left behind, for the tests of several scripts.
def state_of(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def flat(state):
    """Every tensor of a checkpoint under its path: networks, spectral-norm vectors, batch statistics, Adam's
    averages ..."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, list | tuple)
        else ()
    )
    return {f"{name}/{rest}": x for name, value in items for rest, x in flat(value).items()}


def same_state(a, b):
    a, b = flat(state_of(a)), flat(state_of(b))
    assert a.keys() == b.keys() and any("_u" in k for k in a) and any("running_mean" in k for k in a)
    return all(torch.equal(a[k], b[k]) for k in a)


def log_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]
