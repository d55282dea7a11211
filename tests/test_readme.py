"""README.md: its ablations are applied and run, the files it names exist, its commands are understood."""

import re
import shlex

import pytest
from conftest import ROOT, edited

import cbdm
import cbgan
import classifier
import datasets
import softlabel_gan

README = (ROOT / "README.md").read_text()
SCRIPTS = {"cbdm.py": cbdm, "cbgan.py": cbgan, "softlabel_gan.py": softlabel_gan, "classifier.py": classifier}


def ablations():
    """(script, [(old, new), ...]) of each diff in the README; a line `-` and the line `+` after it are one
    change."""
    found = []
    for block in re.findall(r"```diff\n(.*?)```", README, re.S):
        first, *lines = block.splitlines()
        old = [line[1:].strip() for line in lines if line.startswith("-")]
        new = [line[1:].strip() for line in lines if line.startswith("+")]
        found.append((first.removeprefix("# ").split(":")[0], list(zip(old, new, strict=True))))
    return found


def test_there_are_five_ablations():
    assert len(ablations()) == 5


@pytest.mark.parametrize("number", range(5))
def test_an_ablation_runs(number, tmp_path, judges):
    """Two steps of the edited script, to finite losses that are not those of the script as it is."""
    script, changes = ablations()[number]
    flags = ["--dataset", "shapeslt", "--steps", "2", "--batch-size", "8", "--sample-every", "0",
             "--eval-images", "0",
             "--amp", "off", "--device", "cpu"]
    flags += {"cbdm.py": ["--regularise-after", "0", "--warmup", "0", "--channels", "8"],
              "cbgan.py": ["--classifier", judges.loop, "--width", "8", "--discriminator-width", "8",
                           "--cycle", "1"],
              "softlabel_gan.py": ["--classifier", judges.loop, "--width", "4", "--discriminator-width",
                                   "4"]}[script]
    logs = []
    for name, module in (("as it is", SCRIPTS[script]), ("edited", edited(script, *changes))):
        module.main([*flags, "--run-dir", str(tmp_path / name)])
        logs.append((tmp_path / name / "log.jsonl").read_text())
    without_speed = [re.sub(r'"steps_per_second".*', "", log) for log in logs]
    assert "NaN" not in logs[1] and without_speed[0] != without_speed[1]


def test_what_the_readme_links_is_there():
    links = [link for link in re.findall(r"\]\((?!http)([^)#]+)\)", README)]
    assert len(links) > 5 and all((ROOT / link).is_file() for link in links)
    for page in (ROOT / ".results").glob("*.md"):
        assert all(
            (page.parent / link).is_file() for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
        )


COMMANDS = sorted({line.split("#")[0].strip() for line in re.findall(r"python \w+\.py [^`\n|)]*", README)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    """Each flag of each command exists; that they run is what the tests of the scripts show."""
    words = shlex.split(command.replace("PATH", "x").replace("`", "").rstrip(",;"))[1:]
    if words[0] not in SCRIPTS or "--eval-only" in words and "..." in words:
        return
    monkeypatch.setattr(datasets, "existing_file", lambda text: text)
    monkeypatch.chdir(tmp_path)
    for name in ("RUN/checkpoint.pt", "RUN/samples.npz"):
        (tmp_path / "RUN").mkdir(exist_ok=True)
        (tmp_path / name).touch()
    words = [word for word in words if word not in ("...",)]
    try:
        SCRIPTS[words[0]].parse_settings(words[1:])
    except datasets.InputError as error:
        assert "no file" in str(error) or "classifier" in str(error), error


def test_lines_to_try_are_marked():
    for script in ("cbdm.py", "cbgan.py", "softlabel_gan.py"):
        assert "TRY:" in (ROOT / script).read_text()
