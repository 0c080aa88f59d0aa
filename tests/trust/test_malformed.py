"""Malformed input: one line, status 2, no traceback, nothing written, whatever is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fambav.ops import causal_conv1d, selective_scan
from tests.data.made import made_cifar, made_folder
from tests.trust.forked import run

ROOT = Path(__file__).resolve().parents[2]

# Words of main.py, and what the line has to name.
FLAGS = {
    "--modle vim_tiny": "--modle",
    "--model vim_tinny": "vim_tiny",
    "--model timm/": "timm/",
    "vim_tiny": "vim_tiny",
    "--batch-size 0": "at least 1",
    "--batch-size many": "many",
    "--batch-size 1.5": "1.5",
    "--batch-size": "--batch-size",
    "--epochs -1": "-1",
    "--lr 0": "more than 0",
    "--lr nan": "nan",
    "--lr inf": "inf",
    "--drop-path 1": "less than 1",
    "--drop-path -0.1": "-0.1",
    "--seed -1": "-1",
    "--seed 4294967296": "4294967296",
    "--num_workers -2": "-2",
    "--opt adamx": "adamw",
    "--opt-betas 0.9": "0.9",
    "--opt-betas 0.9 1.5": "1.5",
    "--amp-dtype fp8": "fp8",
    "--device gpu": "gpu",
    "--device cuda:x": "cuda:x",
    "--data-set CIFAR1000": "CIFAR",
    "--data-set DIGITS --data-path here": "which has no files",
    "--download": "which is not fetched",
    "--data-stats mine": "mine",
    "--eval-crop-ratio 0": "more than 0",
    "--aa none --color-jitter -1": "-1",
    "--aa rand-m9-foo": "in place of 'foo'",
    "--aa rand-m9-mstdX": "in place of 'mstdX'",
    "--aa rand-m15": "at most 10",
    "--config policy.yaml": "in place of 'mstdX'",
    "--cutmix-minmax 0.5 0.2": "0.2",
    "--mixup 0 --cutmix 0 --mixup-prob 0.5": "--mixup 0 --cutmix 0",
    "--ThreeAugment --reprob 0.5": "--ThreeAugment",
    "--smoothing 1": "less than 1",
    "--model vim_micro --bce-loss": "smoothing",
    "--eval": "--resume",
    "--resume auto": "output_dir",
    "--allow-world-size-change": "without --resume",
    "--save-every 0": "at least 1",
    "--on-bad-image skip": "which has no image files",
    "--on-bad-image maybe": "maybe",
    "--compile --cuda-graphs": "--compile",
    "--log-activations --compile": "which leave no place to look",
    "--fusion-strategy uper": "upper",
    "--fusion-strategy none --fusion-token 3": "fusion",
    "--fusion-plan 3": "fusion",
    "--fusion-plan 3:x": "fusion",
    "--fusion-strategy all --fusion-plan 3:4": "fusion",
    "--reduction orderd": "ordered",
    "--reduction ordered --fusion-strategy all": "none beside",
    "--reduction ordered --reduction-schedule r": "r",
    "--reduction ordered --reduction-schedule some": "r:5",
    "--reduction-schedule r:5": "without --reduction",
    "--distillation-type hardest": "hardest",
    "--distillation-alpha 0.7": "no teacher",
    "--config nowhere.yaml": "nowhere.yaml",
    "--config list.yaml": "list.yaml",
    "--config broken.yaml": "broken.yaml",
    "--config unknown.yaml": "epochs",
    "--config twice.yaml": "twice.yaml",
    "--config typed.yaml": "many",
    "--config circle.yaml": "circle.yaml",
    "--config binary.yaml": "binary.yaml",
    "--config tagged.yaml": "tagged.yaml",
}
YAML = {
    "list.yaml": "- epochs\n",
    "broken.yaml": "epochs: [1\n",
    "unknown.yaml": "epoch: 3\n",
    "twice.yaml": "epochs: 3\nepochs: 4\n",
    "typed.yaml": "epochs: many\n",
    "policy.yaml": "aa: rand-m9-mstdX\n",
    "circle.yaml": "base: circle.yaml\n",
    "tagged.yaml": "epochs: !!python/object/apply:os.mkdir [ran]\n",
}
MANY = """
import contextlib, io, json, sys
from fambav import cli
answers = {}
for text in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(text.split())
    answers[text] = [status, err.getvalue()]
print(json.dumps([answers, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What main.py says to all of them, one after the other in one process."""
    folder = tmp_path_factory.mktemp("flags")
    for name, text in YAML.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\x80\x02\xff\x00")
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(list(FLAGS)),
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=True,
        timeout=100,  # else what is not refused trains on
    )
    assert sorted(folder.iterdir()) == before, "nothing is written"
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", FLAGS)
def test_a_malformed_flag_or_file_of_settings_is_one_line(answers, words):
    status, err = answers[0][words]
    assert status == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert FLAGS[words] in err


def test_flags_are_refused_without_loading_torch(answers):
    assert answers[1] is False


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Folders of data, each wrong in its way."""
    root = tmp_path_factory.mktemp("damaged")
    for name in ("whole", "no_train", "cut", "text", "few_labels"):
        made_cifar(root / name, train=40, test=37)
    (root / "no_train/cifar-100-python/train").unlink()
    train = root / "cut/cifar-100-python/train"
    train.write_bytes(train.read_bytes()[:5000])
    (root / "text/cifar-100-python/test").write_text("hello")
    made_folder(root / "images", train=20, val=8)
    made_folder(root / "other", train=20, val=8)
    next((root / "other/val").iterdir()).rename(root / "other/val/zebra")
    made_folder(root / "one", classes=["cat"], train=20, val=8)
    made_folder(root / "loop", train=20, val=8)
    (root / "loop/train/cat/again").symlink_to(root / "loop/train/cat")
    for name in ("one", "two"):
        made_folder(root / "sets" / name, train=20, val=8)
        for part in ("train", "val"):
            (root / "deep" / part).mkdir(parents=True, exist_ok=True)
            (root / "deep" / part / name).symlink_to(root / "sets" / name / part)
    (root / "empty/train").mkdir(parents=True)
    (root / "empty/val").mkdir()
    torch.save({"model": {"x": torch.zeros(2)}}, root / "strange.pth")
    torch.save([1, 2], root / "list.pth")
    (root / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (root / "file").write_text("")
    return root


FOLDER = "--data-set FOLDER --data-stats imagenet --no-repeated-aug --data-path"
THINGS = {
    "--data-path {}/nowhere": "nowhere",
    "--data-path {}/no_train": "train",
    "--data-path {}/cut": "train",
    "--data-path {}/text": "test",
    FOLDER + " {}/whole": "train/",
    FOLDER + " {}/empty": "train",
    FOLDER + " {}/other": "zebra",
    FOLDER + " {}/one": "one class, cat",
    FOLDER + " {}/loop": "are one folder",
    FOLDER + " {}/deep": "are cat, dog the classes?",
    FOLDER + " {}/images/train": "did you mean",
    "--data-set INAT --data-path {}/images": "train2018.json",
    "--data-path {}/whole --resume {}/none.pth": "none.pth",
    "--data-path {}/whole --resume {}/strange.pth": "strange.pth",
    "--data-path {}/whole --resume {}/list.pth": "list.pth",
    "--data-path {}/whole --finetune {}/strange.pth": "strange.pth",
    "--data-path {}/whole --finetune {}/half.safetensors": "half.safetensors",
    "--data-path {}/whole --eval --resume {}/strange.pth": "strange.pth",
    "--data-path {}/whole --output_dir {}/file": "file",
    "--data-path {}/whole --num-classes 7": "num_classes is 7",
    "--data-path {}/whole --input-size 18": "18",
    "--data-path {}/whole --batch-size 64": "batch_size is 64",
    "--data-path {}/whole --batch-size 5": "even",
    "--data-path {}/whole --fusion-token 9": "fusion_token is 9",
    "--data-path {}/whole --fusion-layer 9": "fusion_layer is 9",
    "--data-path {}/whole --reduction ordered --reduction-schedule keep:2@3": "keep:2@3",
    "--data-path {}/whole --reduction ordered --reduction-schedule tokens:5": "tokens:5",
    "--data-path {}/whole --reduction ordered --reduction-schedule r:5@5,3": "ascending",
    "--data-path {}/whole --reduction storm --reduction-schedule r:1": "a smaller grid",
    "--data-path {}/whole --scan-backend cuda": "'cuda'",
    "--data-path {}/whole --device cuda:9": "cuda:9",
    "--data-path {}/whole --model timm/deit_tony": "deit_tony",
}


@pytest.mark.parametrize("words", THINGS)
def test_malformed_data_checkpoints_and_plans_are_one_line(recipe, damaged, tmp_path, words):
    base = list(map(str, recipe[: recipe.index("--data-path")]))
    if "timm/" in words or "--reduction" in words:
        base = base[: base.index("--fusion-strategy")]
    given = words.replace("{}", str(damaged)).split()
    output = [] if "--output_dir" in words else ["--output_dir", tmp_path / "run"]
    found = run([*base, *given], tmp_path / "run") if output else run_there([*base, *given])
    assert found.status == 2, found.out
    errors = [line for line in found.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert THINGS[words] in errors[0]
    assert "Traceback" not in found.out
    assert not (tmp_path / "run").exists()


def run_there(words):
    """Run main.py with its own --output_dir."""
    done = subprocess.run(
        [sys.executable, "main.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    done.status, done.out = done.returncode, done.stdout + done.stderr
    return done


U, A, B = torch.ones(1, 4, 5), -torch.ones(4, 2), torch.ones(1, 2, 5)
KERNELS = {
    "no batch": lambda: selective_scan(U[0], U, A, B, B),
    "other lengths": lambda: selective_scan(U, U[..., :4], A, B, B),
    "other channels": lambda: selective_scan(U, U, A[:3], B, B),
    "other state": lambda: selective_scan(U, U, A, B[:, :1], B),
    "a gate of another shape": lambda: selective_scan(U, U, A, B, B, z=U[..., :2]),
    "a bias of another length": lambda: selective_scan(U, U, A, B, B, delta_bias=torch.ones(3)),
    "integers": lambda: selective_scan(U.long(), U, A, B, B),
    "a width of another weight": lambda: causal_conv1d(U, torch.ones(3, 4)),
    "an unknown activation": lambda: causal_conv1d(U, torch.ones(4, 4), activation="relu"),
    "a bias of another width": lambda: causal_conv1d(U, torch.ones(4, 4), torch.ones(3)),
}


@pytest.mark.parametrize("case", KERNELS)
def test_malformed_arguments_of_kernels_are_one_line(case):
    with pytest.raises((ValueError, TypeError), match=r"^[^\n]+, expected [^\n]+$"):
        KERNELS[case]()


def test_the_list_is_as_long_as_is_promised():
    assert len(FLAGS) + len(THINGS) + len(KERNELS) >= 60
