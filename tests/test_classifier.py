import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import classifier
import datasets
from classifier import BasicBlock, ResNet32, augment, frozen_classifier, learning_rate, load_classifier, save_classifier
from datasets import ImageSet, InputError

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
SMALL = {"epochs": 1, "batch_size": 16, "lr": 0.05, "schedule": "cosine", "crop_padding": 1, "flip": True,
         "normalisation": HALF}  # fmt: skip


def toy_set(n=48, classes=("a", "b", "c"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) % len(classes), list(classes))


def settled(network):
    """A network whose batch norms have seen something, so that eval mode is not the identity at every layer."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 8, 8) * 2 - 1)
    return network.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_classes, count", [(5, 463_829), (10, 464_154), (100, 470_004), (1010, 529_154)])
def test_parameter_count(num_classes, count):
    network = ResNet32(num_classes, **HALF)
    assert sum(p.numel() for p in network.parameters()) == count
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 32 and all(m.bias is None for m in convolutions)


@pytest.mark.parametrize("size", [8, 16, 33])
def test_shapes_of_what_it_returns(size):
    network = settled(ResNet32(7, **HALF))
    x = torch.rand(2, 3, size, size)
    features = network.features(x)
    assert features.shape == (2, 64) and features.min() >= 0 and features.std() > 0
    assert torch.equal(network(x), features @ network.head.weight.T + network.head.bias)


def test_shortcut_without_parameters():
    """With both convolutions at zero a block is the ReLU of its shortcut."""
    block = BasicBlock(4, 8)
    torch.nn.init.zeros_(block.conv1.weight)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6) + 0.1
    out = block(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].abs().sum() == 0 and out[:, 6:].abs().sum() == 0


def test_initial_weights_are_kaiming_normal_over_the_inputs():
    torch.manual_seed(0)
    network = ResNet32(100, **HALF)
    for weight, fan_in in ((network.blocks[14].conv2.weight, 64 * 9), (network.head.weight, 64)):
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_normalisation_is_that_of_pixels_in_zero_to_one():
    """A network for CIFAR's statistics, shown [-1, 1], sees what a plain one sees in (u - mean) / std."""
    mean, std = classifier.CIFAR_STATISTICS["mean"], classifier.CIFAR_STATISTICS["std"]
    network = settled(ResNet32(10, mean, std))
    plain = ResNet32(10, **HALF)  # mean 0.5 and deviation 0.5 leave an image in [-1, 1] as it is
    plain.load_state_dict(network.state_dict() | {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)})
    plain.eval()
    assert torch.equal(ResNet32(10, **HALF).mean, plain.mean) and torch.equal(ResNet32(10, **HALF).std, plain.std)
    u = torch.rand(4, 3, 8, 8)
    by_hand = (u - torch.tensor(mean)[None, :, None, None]) / torch.tensor(std)[None, :, None, None]
    with torch.no_grad():
        assert torch.allclose(network(2 * u - 1), plain(by_hand), atol=1e-5)
        assert not torch.allclose(network(2 * u - 1), plain(2 * u - 1), atol=1e-2)
    # The affine map of [-1, 1] to CIFAR's normalised pixels: x times these plus those.
    assert (1 / network.std).flatten().tolist() == pytest.approx([2.47158, 2.50752, 2.48756], abs=1e-5)
    assert (-network.mean / network.std).flatten().tolist() == pytest.approx([0.04251, 0.08927, 0.26617], abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epoch, lr", [(0, 0.02), (1, 0.04), (4, 0.1), (100, 0.1), (159, 0.1), (160, 1e-3), (179, 1e-3),
                                       (180, 1e-5), (199.99, 1e-5)])  # fmt: skip
def test_learning_rate_of_the_paper(epoch, lr):
    assert learning_rate(epoch, 200, 0.1, "steps") == pytest.approx(lr)


@pytest.mark.parametrize("epoch, lr", [(0, 0.1), (7, 0.1), (8, 1e-3), (9, 1e-5)])
def test_learning_rate_scales_with_a_shorter_run(epoch, lr):
    assert learning_rate(epoch, 10, 0.1, "steps") == pytest.approx(lr)


def test_cosine_learning_rate():
    assert learning_rate(0.25, 5, 0.4, "cosine") == pytest.approx(0.1)  # a quarter of the way up, which takes one epoch
    assert learning_rate(1, 5, 0.4, "cosine") == pytest.approx(0.4)
    assert learning_rate(3, 5, 0.4, "cosine") == pytest.approx(0.2)
    assert learning_rate(4.999, 5, 0.4, "cosine") == pytest.approx(0, abs=1e-6)


def test_augment_cuts_every_window_of_the_padded_image():
    images = torch.randint(1, 256, (1, 3, 6, 6), dtype=torch.uint8).expand(400, -1, -1, -1)
    padded = np.pad(images[0].numpy(), ((0, 0), (2, 2), (2, 2)))
    windows = {padded[:, i : i + 6, j : j + 6].tobytes() for i in range(5) for j in range(5)}
    out = augment(images, 2, False, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8 and {x.contiguous().numpy().tobytes() for x in out} == windows
    flipped = augment(images, 0, True, torch.Generator().manual_seed(0))
    mirrored = sum(torch.equal(x, images[0].flip(2)) for x in flipped)
    untouched = sum(torch.equal(x, images[0]) for x in flipped)
    assert mirrored + untouched == 400 and 160 < mirrored < 240
    assert torch.equal(augment(images, 0, False, torch.Generator()), images)


def test_training_repeats_itself_and_leaves_the_random_state_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    rows = []
    runs = [classifier.train_classifier(toy_set(), SMALL, seed, log=rows.append).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert not torch.equal(runs[0]["conv.weight"], runs[2]["conv.weight"])
    assert rows[0]["epoch"] == 1 and rows[0]["loss"] == rows[1]["loss"] != rows[2]["loss"]


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(InputError, match="loss is (nan|inf) in epoch 1"):
        classifier.train_classifier(toy_set(), SMALL | {"lr": 1e30})


def test_accuracy_by_thirds_of_the_training_counts():
    labels = torch.arange(6).repeat_interleave(4)
    images = (labels[:, None, None, None] * 20 + torch.zeros(1, 3, 2, 2)).to(torch.uint8)
    wrong = torch.zeros(24, dtype=torch.bool)
    wrong[[0, 8, 9, 20, 21, 22]] = True  # class 0: 1 of 4 wrong, class 2: 2 of 4, class 5: 3 of 4
    images[wrong] += 20

    def network(x):  # recognises the class in the brightness
        k = torch.round((x[:, 0, 0, 0] + 1) * 127.5 / 20).long()
        return F.one_hot(k, 7).float()

    counts = torch.tensor([1, 9, 5, 8, 2, 4])  # head 1, 3; middle 2, 5; tail 4, 0
    found = classifier.accuracy(network, ImageSet(images, labels, list("abcdef")), counts, batch_size=5)
    assert found == {"all": 18 / 24, "head": 1.0, "middle": 3 / 8, "tail": 7 / 8}


# ----------------------------------------------------------------------------------------------------------------------
# The judge of the shapes data
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def judge(data_dir):
    return frozen_classifier("shapeslt", data_dir, split="reference", seed=3)


def test_the_judge_is_right(judge, data_dir):
    test = datasets.load("shapes", data_dir, "test")
    with torch.no_grad():
        right = (judge(test.images.float() / 127.5 - 1).argmax(1) == test.labels).double().mean().item()
    assert right >= 0.97
    assert judge.info["test_accuracy"]["all"] == pytest.approx(right, abs=1e-3)
    assert judge.info["path"] == str(data_dir / "classifier-shapes-16.pt")
    assert judge.info["split"] == "reference" and judge.info["classes"] == test.classes
    assert judge.info["settings"]["seed"] == 0  # the same judge whatever the seed of the run that asks for it


def test_the_judge_is_frozen_but_lets_gradients_through(judge):
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    before = judge.norm.running_mean.clone()
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    judge(x).logsumexp(1).sum().backward()
    assert x.grad.abs().sum() > 0 and judge.conv.weight.grad is None and torch.equal(before, judge.norm.running_mean)


def test_the_judge_is_trained_once(judge, data_dir, monkeypatch):
    monkeypatch.setattr(classifier, "train_classifier", lambda *a, **k: pytest.fail("trained again"))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = frozen_classifier("shapes", data_dir, split="reference")  # any shapes set, any seed: the same judge
    assert torch.equal(before, torch.get_rng_state())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(x), judge(x))
    assert torch.equal(frozen_classifier("shapes", data_dir, judge.info["path"])(x), judge(x))


def test_a_classifier_for_other_data_is_refused(judge, data_dir):
    path = judge.info["path"]
    with pytest.raises(InputError, match=r"shapes-16\.pt is for shapeslt .*wanted are images of 8 pixels"):
        frozen_classifier("shapes", data_dir, path, image_size=8)
    with pytest.raises(InputError, match=r"shapes-16\.pt is for .*10 classes.*wanted are 2 classes, cat, dog"):
        load_classifier(path, classes=["cat", "dog"])


def test_a_classifier_of_long_tailed_data_has_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def stand_in(train_set, settings, seed, device, amp, log):  # training is tested above
        seen.append((train_set.counts.tolist(), seed))
        return ResNet32(10, **HALF).eval()

    monkeypatch.setattr(classifier, "train_classifier", stand_in)
    for rho in (None, 100, 10):
        frozen_classifier("shapeslt", tmp_path, image_size=8, rho=rho, seed=5)
    found = sorted(p.parent.name for p in (tmp_path / "runs").glob("*/classifier.pt"))
    assert found == ["classifier-shapeslt-8px-rho10-s5", "classifier-shapeslt-8px-rho100-s5"]  # 100 is the default
    assert [(counts[0], counts[-1], seed) for counts, seed in seen] == [(1000, 10, 5), (1000, 100, 5)]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------
def test_checkpoint_round_trip(tmp_path):
    network = settled(ResNet32(3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    settings = SMALL | {"normalisation": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    classes = list(np.array(["a", "b", "c"]))  # as they come out of a prepared file
    save_classifier(tmp_path / "new" / "c.pt", network, "toy", "train", classes, 8, settings, {"all": 0.5})
    again = load_classifier(tmp_path / "new" / "c.pt", classes=classes, image_size=8)
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(network(x), again(x), atol=1e-6)
    assert again.info["settings"] == settings and again.info["test_accuracy"] == {"all": 0.5}


@pytest.mark.parametrize("content", ["missing", "text", "cut short", "another dict", "a list", "another network"])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "c.pt"
    save_classifier(path, ResNet32(3, **HALF), "toy", "train", ["a", "b", "c"], 8, SMALL, {"all": 0.5})
    if content == "missing":
        path.unlink()
    elif content == "text":
        path.write_text("hello")
    elif content == "cut short":
        path.write_bytes(path.read_bytes()[:-5000])
    elif content == "another dict":
        torch.save({"model": {}}, path)
    elif content == "a list":
        torch.save([1, 2], path)
    elif content == "another network":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["resnet32"].pop("conv.weight")
        torch.save(checkpoint, path)
    with pytest.raises(InputError, match="c.pt"):
        load_classifier(path)


class Mischief:
    """Unpickled without care, it opens a file for writing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"classes": Mischief(str(tmp_path / "proof"))}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="c.pt"):
        load_classifier(tmp_path / "c.pt")
    assert not (tmp_path / "proof").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------
def test_command_line(run_script, tmp_path):
    done = run_script("classifier.py", "--dataset", "shapeslt", "--rho", 50, "--image-size", 8, "--epochs", 1,
                      "--batch-size", 64, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "classifier-shapeslt-8px-rho50-epochs1-batch_size64-s0"
    network = load_classifier(run_dir / "classifier.pt", image_size=8)
    assert network.info["test_accuracy"].keys() == {"all", "head", "middle", "tail"}
    assert f"tail {100 * network.info['test_accuracy']['tail']:.2f} %" in done.stdout
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["rho"] == 50 and config["settings"]["epochs"] == 1
    assert config["torch"] == torch.__version__
    (row,) = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    assert row["epoch"] == 1 and 0 < row["loss"] < 5


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "shape"], "unknown data set 'shape'"),
    (["--epochs", "many"], "invalid int value: 'many'"),
    (["--lr", "0"], "--lr is 0.0"),
    (["--device", "nowhere"], "--device nowhere can't be used"),
])  # fmt: skip
def test_command_line_errors_are_one_line(run_script, tmp_path, arguments, message):
    done = run_script("classifier.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("classifier.py: error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
