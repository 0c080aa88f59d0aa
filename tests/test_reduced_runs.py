"""Every reduction method through the command line: it trains, evaluates and resumes."""

import json

import pytest
import torch

from fambav.engine import checkpoint
from fambav.layers import shard
from fambav.models import Vim
from fambav.reduction import reduce
from fambav.registry import METHODS
from tests.data.made import made_cifar
from tests.identical import lasting, log, same
from tests.made import crashing, go, refused

words_of = str.split
RUN = words_of(
    """--num_workers 0 --batch-size 8 --epochs 2 --warmup-epochs 1 --lr 1e-3 --unscale-lr
    --drop-path 0.2 --log_every 1 --mixup 0 --cutmix 0 --aa none"""
)
ORDERED = ["--reduction", "ordered", "--reduction-schedule", "r:1"]
VIM = ["--model", "vim_micro", "--input-size", "16"]
PLAIN = ["--model", "plainmamba_micro", "--input-size", "16"]
SCHEDULES = {"storm": "tokens:13@3", "plain storm": "tokens:12@3"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made_cifar(folder, train=16, test=5)
    return ["--data-set", "CIFAR", "--data-path", str(folder)]


def methods(model):
    for method in METHODS:
        text = SCHEDULES.get(f"{'plain ' * (model is PLAIN)}{method}", "r:2@3,5")
        more = []
        if model is PLAIN and method == "prune-aligned":
            more = ["--param-order", "permuted"]
        yield pytest.param([*model, "--reduction", method, "--reduction-schedule", text, *more])


@pytest.mark.parametrize("chosen", [*methods(VIM), *methods(PLAIN)], ids=lambda c: f"{c[1]} {c[5]}")
def test_every_method_trains_evaluates_and_resumes_to_the_last_bit(chosen, data, tmp_path):
    flags = [*RUN, *data, *chosen]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    found = go(*flags, "--output_dir", whole)
    assert found.status == 0, found.err
    plan = json.loads((whole / "plan.json").read_text())
    assert sum(plan["counts"]) > 0
    with crashing():  # in the second update of the second epoch
        go(*flags, "--output_dir", broken)
    again = go(*flags, "--output_dir", broken, "--resume", "auto")
    assert again.status == 0, again.err
    assert lasting(log(broken)) == lasting(log(whole))
    states = [checkpoint.load(folder / "checkpoint.pth")["model"] for folder in (whole, broken)]
    assert same(*states)
    scores = go(*flags, "--eval", "--resume", whole / "checkpoint.pth").out
    assert f"* Acc@1 {log(whole)[-1]['test_acc1']:.3f}" in scores


def test_digits_train_with_a_method_that_reads_the_mixer(tmp_path):
    words = """--config configs/digits/vim_micro.yaml --reduction prune-aligned --epochs 1
        --reduction-schedule tokens:10@2 --batch-size 64 --warmup-epochs 0 --input-size 16"""
    found = go(*words.split(), "--output_dir", tmp_path)
    assert found.status == 0, found.err
    assert "total removed: 6 of 16 tokens, after the mixer of their layer" in found.out


def test_a_reduction_written_in_a_file_gives_way_to_famba_v_flags(data, tmp_path):
    file = tmp_path / "tome.yaml"
    file.write_text("model: vim_micro\ninput_size: 16\nreduction: tome\nreduction_schedule: r:1\n")
    flags = ["--config", file, *RUN, *data, "--epochs", "1"]
    folders = {name: tmp_path / name for name in ("tome", "upper")}
    upper = ["--fusion-strategy", "upper", "--fusion-layer", "4", "--fusion-token", "2"]
    assert "total removed: 6 of 17" in go(*flags, "--output_dir", folders["tome"]).out
    assert "total removed: 6 of 17" in go(*flags, *upper, "--output_dir", folders["upper"]).out
    settings = {name: (folder / "config.yaml").read_text() for name, folder in folders.items()}
    assert "fusion_strategy: none" not in settings["tome"]
    assert "fusion_strategy: upper" in settings["upper"]
    assert "reduction: tome" not in settings["upper"]


def test_a_run_saved_before_a_setting_existed_goes_on_with_its_default(data, tmp_path):
    flags = [*VIM, *RUN, *data, "--output_dir", tmp_path]
    assert go(*flags).status == 0
    state = checkpoint.load(tmp_path / "checkpoint.pth")
    for name in [n for n in state["config"] if n.startswith(("reduction", "scan_policy"))]:
        del state["config"][name]
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    assert go(*flags, "--resume", "auto").status == 0
    line = refused(
        *flags, "--resume", "auto", "--reduction", "ordered", *("--reduction-schedule", "r:1")
    )
    assert "reduction none -> ordered" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reduction tme", "--reduction is 'tme', expected one of none, famba-v"),
        ("--reduction tome --reduction-schedule 5", "--reduction-schedule is '5', expected one of"),
        ("--reduction mtr", "reduction_schedule is 'published', expected another such as r:5"),
        (
            "--reduction evit --reduction-schedule keep:1.5@2",
            "expected shares of more than 0 and at most 1",
        ),
        (
            "--reduction evit --reduction-schedule keep:0.5@4,2",
            "expected ascending layers, none twice",
        ),
        (
            "--reduction r-meeto --reduction-schedule r:1@2 --class-token none"
            " --class-token-policy middle",
            "class_token_policy is 'middle', expected 'exact' for a model without class tokens",
        ),
        (
            "--reduction storm --reduction-schedule r:5@2",
            "expected a number that makes of 4 x 4 patches a smaller grid",
        ),
        (
            "--reduction mtr --reduction-schedule r:1@1 --reduction-hook before",
            "reduction is 'mtr' at layer 1, expected a later layer or reduction_hook after",
        ),
        (
            "--reduction tome --reduction-schedule r:2 --fusion-strategy upper",
            "--reduction is 'tome', expected none beside --fusion-strategy upper",
        ),
        (
            "--reduction tome --reduction-schedule r:2 --reduction-options a=1",
            "reduction option is 'a', expected one of tome",
        ),
        (
            "--model plainmamba_micro --reduction prune-aligned --reduction-schedule r:2@2",
            "scan_policy is 'aligned', expected another",
        ),
        (
            "--model timm/resnet18 --reduction tome",
            "--reduction is 'tome', expected 'none' with --model timm/resnet18",
        ),
    ],
)
def test_an_impossible_reduction_is_refused_before_data_is_read(words, message, tmp_path):
    model = [] if "--model" in words else ["--model", "vim_micro"]
    where = ["--data-set", "CIFAR", "--data-path", tmp_path, "--output_dir", tmp_path / "run"]
    line = refused(*model, "--input-size", "16", *words.split(), *where)
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", METHODS)
def test_two_shards_of_a_batch_are_reduced_as_the_whole_batch_is(method):
    text = SCHEDULES.get(method, "r:2@3,5")
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=6, img_size=16, patch_size=4, num_classes=3)
    net = reduce(Vim(**sizes, drop_path_rate=0.3), method, text).train()
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(1)
    whole = net(images)
    for index in range(2):
        torch.manual_seed(1)
        with shard(index, 2):
            torch.testing.assert_close(net(images[index::2]), whole[index::2])
