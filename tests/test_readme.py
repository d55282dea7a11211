"""README.md: its ablations are applied and run, the files it names exist, its commands are understood.
.results/tables.md: its commands are understood, find what those before them wrote, and train."""

import functools
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, edited

import cbdm
import cbgan
import classifier
import datasets
import metrics
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


# --------------------------------------------------------------------------------------------------
# .results/tables.md: the rows of the papers' tables
# --------------------------------------------------------------------------------------------------
PAGE = (ROOT / ".results/tables.md").read_text()
LISTED = [shlex.split(command)[1:] for command in dict.fromkeys(re.findall(r"`(python [^`]+)`", PAGE))]
WRITTEN = {  # what others read of a run
    "cbdm.py": ("checkpoint.pt", "samples.npz"),
    "cbgan.py": ("samples.npz",),
    "softlabel_gan.py": ("samples.npz", "soft_labels.npz"),
    "classifier.py": ("classifier.pt",),
}


@pytest.fixture
def any_file(monkeypatch):
    """Files that a command names count as there."""
    for module in (datasets, cbgan):
        monkeypatch.setattr(module, "existing_file", str)


def settings_of(script, *flags):
    """What a command's own parser makes of it; of classifier.py also what the data decides."""
    args = SCRIPTS[script].parse_settings(flags)
    if script == "classifier.py":
        usual = next(size for name, size in datasets.SIZES.items() if args.dataset.startswith(name))
        classifier.complete(args, 100_000, args.image_size or usual)
    return args


def test_every_row_has_five_cells_and_a_command_or_a_reason():
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("|")]
    rows = [row for row in rows if row[0] != "row" and "---" not in row[0]]
    assert len(rows) > 200
    for row in rows:
        reason = r"`python|Table|quoted|no command|samples|csv|jsonl"
        assert len(row) in (4, 5) and re.search(reason, row[1]), row
        hours = row[4] if len(row) == 5 else ""
        assert ("`python" in row[1]) == bool(re.fullmatch(r"<?\d+(\.\d+)?", hours)), row


def test_the_rows_are_understood_and_find_what_they_need(any_file, tmp_path, monkeypatch):
    """From top to bottom: what a command reads one before it has written, and no two share a directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: True)  # matplotlib is optional
    written, trained = set(), {}
    for script, *flags in LISTED:
        command = shlex.join([script, *flags])
        read = {word for word in flags if re.match("runs/.*/", word)}
        assert read <= written, (command, read - written)
        if script == "metrics.py":
            monkeypatch.setattr(sys, "argv", [script, *flags])
            assert datasets_has(metrics.parse_args().dataset), command
        elif script == "datasets.py":
            assert datasets_has(flags[0]) and set(flags[1::2]) <= {"--image-size"}, command
        else:
            args = settings_of(script, *flags)
            assert datasets_has(args.dataset), command
            if getattr(args, "eval_only", False):
                assert args.run_dir in trained, command
            else:
                assert args.run_dir not in trained, (command, trained[args.run_dir])
                trained[args.run_dir] = command
                written |= {f"{args.run_dir}/{name}" for name in WRITTEN[script]}
    assert len(trained) > 100


def datasets_has(name):
    return name in datasets.NAMES or name.startswith("folder:")


TINY = ("--dataset shapeslt --image-size 16 --rho 26.5 --batch-size 8 --steps 2 --save-every 2 "
        "--sample-every 0 --eval-images 0 --device cpu --amp off").split()
TINIER = {
    "cbdm.py": "--channels 8 --multipliers 1 1 --attention-level 1 --blocks 1 --warmup 0 --ddim-steps 2",
    "cbgan.py": "--width 8 --discriminator-width 8 --cycle 1 --monitor-every 0",
    "softlabel_gan.py": "--width 4 --discriminator-width 4",
}


def test_each_kind_of_row_trains(any_file, judges, tmp_path, monkeypatch):
    """Two steps of each GAN and diffusion model, narrow and on the shapes: the losses logged are finite.

    Rows that differ by data or numbers alone (but for zeros: --tau 0) are one kind. A file that a row reads
    is that of the tiny run of the row that writes it.
    """
    load = datasets.load

    @functools.cache  # drawn once, not for each kind
    def few(*where, **more):
        found = load(*where, **more)
        return datasets.ImageSet(found.images[::8], found.labels[::8], found.classes)

    monkeypatch.setattr(datasets, "load", few)
    tiny, kinds, drawn = {}, {}, 0

    def stand_in(word):
        """The file of a tiny run for a file that the page names."""
        if Path(word).name == "classifier.pt":
            return judges.loop
        run_dir, _, name = word.rpartition("/")
        return str(tiny[run_dir] / name) if run_dir in tiny else word

    for script, *flags in LISTED:
        if script not in TINIER:
            continue
        args = settings_of(script, *flags)
        here = list(map(stand_in, flags)) + TINY + TINIER[script].split()
        here += [] if script == "softlabel_gan.py" else ["--recipe", args.recipe]  # not the shapes' recipe
        if script == "cbgan.py" or args.__dict__.get("labels") in ("soft", "ols"):
            here += ["--classifier", judges.loop]
        if args.eval_only:
            if getattr(args, "class_grid", None):
                grid = ["--class-grid", "star", "--run-dir", str(tiny[args.run_dir])]
                SCRIPTS[script].main([*here, "--eval-images", "1", "--sampler", "ddim", *grid])
                star = list(datasets.SHAPES).index("star")
                drawn += (tiny[args.run_dir] / "samples" / f"class-{star}.png").exists()
            continue
        settings = vars(SCRIPTS[script].parse_settings(here)).items()
        numbers = {name: value for name, value in settings if isinstance(value, int | float)}
        kind = script, json.dumps(
            {name: bool(value) if name in numbers else value for name, value in settings
             if name not in ("run_dir", "recipe", "guidance", "sweep", "scores", "features", "reference",
                             "beta1")})
        if kind not in kinds:
            kinds[kind] = tmp_path / str(len(kinds))
            SCRIPTS[script].main([*here, "--run-dir", str(kinds[kind])])
            (row,) = map(json.loads, (kinds[kind] / "log.jsonl").read_text().splitlines())
            losses = [row[name] for name in row if name.startswith("L_")]
            assert row["step"] == 2 and len(losses) >= 3 and all(map(math.isfinite, losses)), (kind, row)
        tiny[args.run_dir] = kinds[kind]
    assert len(kinds) > 30 and drawn == 3


def test_lines_to_try_are_marked():
    for script in ("cbdm.py", "cbgan.py", "softlabel_gan.py"):
        assert "TRY:" in (ROOT / script).read_text()
