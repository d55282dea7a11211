import os

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def judge_dir(tmp_path_factory):
    """A data directory with the judge of the shapes, trained once for all tests: a quarter of a minute."""
    from classifier import frozen_classifier

    where = tmp_path_factory.mktemp("data")
    frozen_classifier("shapeslt", where, split="reference", seed=3)
    return where


@pytest.fixture(scope="session")
def run_script():
    """run_script("cbdm.py", "--steps", 3, cwd=...) -> CompletedProcess with text output."""

    def run(*command, cwd, **kwargs):
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        return subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])], cwd=cwd, capture_output=True,
                              text=True, env=environment, **kwargs)

    return run
