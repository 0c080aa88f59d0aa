"""Training with a teacher through the command line: flags, files, refusals, resuming."""

import itertools

import pytest
import torch
from torch import nn

from fambav.config import ConfigError, load, parse
from fambav.engine import checkpoint
from fambav.engine.distill import Teacher
from fambav.engine.distributed import Processes
from fambav.models import Vim
from fambav.training import model
from fambav.training.step import train_step
from fambav.training.teacher import teacher
from tests.data.made import made_cifar10
from tests.identical import lasting, log, same
from tests.made import crashing, go, refused
from tests.trust.forked import run_two

RUN = ["--model", "vim_tiny"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of 2 updates per epoch of a model that fuses tokens."""
    text = """--model vim_micro --input-size 16 --data-set CIFAR10 --num_workers 0 --batch-size 8
        --grad-accum-steps 2 --epochs 2 --warmup-epochs 1 --lr 1e-3 --unscale-lr --drop-path 0.3
        --log_every 1 --no-repeated-aug
        --fusion-strategy upper --fusion-layer 4 --fusion-token 3"""
    return [*text.split(), "--data-path", str(made_cifar10(tmp_path_factory.mktemp("data")))]


def weights_file(path, *, classes=10, seed=0, words="--model vim_micro --input-size 16"):
    """A file of weights alone, as anyone may have it."""
    torch.manual_seed(seed)
    net = model(parse(words.split()), num_classes=classes)
    torch.save({"model": net.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def unreduced(tmp_path_factory):
    """Weights of the model without reduction."""
    return weights_file(tmp_path_factory.mktemp("teacher") / "unreduced.pth")


@pytest.fixture(scope="module")
def finished(flags, unreduced, tmp_path_factory):
    """A run that nothing interrupted, from its teacher's weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    found = go(
        *(*flags, "--finetune", unreduced, "--distillation-type", "kl", "--output_dir", folder),
    )
    found.folder = folder
    return found


MALFORMED = [
    ("--distillation-alpha 0.3", "is 0.3, expected 0.5 without --distillation-type, so that there"),
    ("--distillation-tau 2", "is 2.0, expected 1.0 without --distillation-type"),
    ("--teacher-model vim_small", "is 'vim_small', expected none without --distillation-type"),
    ("--teacher-path x.pth", "is 'x.pth', expected '' without --distillation-type"),
    ("--distillation-type kl --distillation-tau 2", "expected 1.0 with --distillation-type kl"),
    ("--distillation-type hard --distillation-tau 2", "expected 1.0 with --distillation-type hard"),
    ("--distillation-type soft --distillation-alpha 2", "is 2.0, expected at most 1 with --dist"),
    ("--distillation-type hard --distillation-alpha 1.1", "is 1.1, expected at most 1 with --di"),
    ("--distillation-type kl --distillation-alpha 0", "is 0.0, expected more than 0"),
    ("--distillation-type kl --mesa-start 0.5", "expected 0.25 with --distillation-type kl"),
    ("--distillation-type mesa --teacher-path x.pth", "expected '' with --distillation-type mesa,"),
    ("--distillation-type mesa --no-model-ema", "another with --no-model-ema: its teacher is the"),
    ("--distillation-type soft --distillation-tau 0", "is 0.0, expected more than 0"),
    ("--distillation-type kl --teacher-model resnet50", "timm's own models are written timm/NAME"),
    ("--distillation-type kl --teacher-path https://x/y", "expected a file on this machine"),
]


@pytest.mark.parametrize(("words", "message"), MALFORMED, ids=[words for words, _ in MALFORMED])
def test_settings_of_a_teacher_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        parse([*RUN, *words.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_switched_off_teacher_leaves_the_recipe_of_a_file_without_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: vim_tiny\ndistillation_type: soft\ndistillation_tau: 3.0\n")
    assert load(path).distillation.distillation_tau == 3.0
    off = parse(["--config", str(path), "--distillation-type", "none"])
    assert off.distillation == parse(RUN).distillation
    harder = parse(["--config", str(path), "--distillation-type", "hard"])
    assert harder.distillation.distillation_tau == 1.0


def test_the_weights_to_start_from_are_those_of_the_teacher_unless_it_has_a_file_or_a_name():
    words = [*RUN, "--finetune", "own.pth", "--distillation-type", "kl"]
    run = parse(words)
    assert run.distillation.teacher_path == "own.pth"
    assert run.replace(seed=3).distillation == run.distillation
    assert parse([*words, "--teacher-path", "a.pth"]).distillation.teacher_path == "a.pth"
    named = parse([*words, "--teacher-model", "regnety_160"]).distillation
    assert (named.teacher_model, named.teacher_path) == ("timm/regnety_160", "")
    assert parse([*RUN, "--finetune", "own.pth"]).distillation.teacher_path == ""


def test_the_teacher_is_the_model_itself_with_every_token_kept(flags, unreduced):
    words = ["--finetune", str(unreduced), "--distillation-type", "kl", "--compile"]
    config = parse([*flags, *words])
    found = teacher(config, num_classes=10)
    assert isinstance(found.net, Vim)
    assert set(found.net.schedule.lengths) == {found.net.length}
    assert set(model(config, num_classes=10).schedule.lengths) == {17, 14, 11, 8}
    assert same(dict(found.net.state_dict()), checkpoint.load(unreduced)["model"])
    assert found.net._compiled_call_impl is None
    assert teacher(parse(flags), num_classes=10) is None


def test_a_run_says_who_teaches_and_keeps_the_teacher_out_of_its_files(finished, unreduced):
    assert finished.status == 0, finished.err
    line = f"teacher: vim_micro with every token kept, weights of {unreduced}"
    assert finished.out.count(line) == 1
    saved = checkpoint.load(finished.folder / "checkpoint.pth")
    assert saved["model"].keys() == checkpoint.load(unreduced)["model"].keys()
    assert saved["config"]["distillation_type"] == "kl"
    assert len(saved["teacher"]) == 64
    assert not same(dict(saved["model"]), checkpoint.load(unreduced)["model"])


TYPES = [
    "--distillation-type soft --distillation-tau 3",
    "--distillation-type hard --distillation-alpha 0.7",
    "--distillation-type kl --if_amp --grad-checkpointing",
    "--distillation-type kl --mixup 0 --cutmix 0 --bce-loss --smoothing 0 --deterministic",
    "--distillation-type soft --model timm/vit_tiny_patch16_224",
]


@pytest.mark.parametrize("words", TYPES)
def test_every_kind_of_teaching_trains(flags, tmp_path, words):
    foreign = "timm" in words
    kind = ["--model", "timm/vit_tiny_patch16_224", "--input-size", "16"]
    path = weights_file(
        tmp_path / "teacher.pth",
        words=" ".join(kind) if foreign else "--model vim_micro --input-size 16",
    )
    base = flags[: flags.index("--fusion-strategy")] + flags[-2:] if foreign else flags
    found = go(
        *(*base, *words.split(), "--teacher-path", path),
        *("--epochs", "1", "--output_dir", tmp_path / "run"),
    )
    assert found.status == 0, found.err
    assert "teacher: " in found.out
    assert len(log(tmp_path / "run")) == 1


def unfused(words):
    start = words.index("--fusion-strategy")
    return words[:start] + words[start + 6 :]


STILL = ["--epochs", "1", "--lr", "1e-12", "--min-lr", "0", "--warmup-lr", "0"]


def first_loss(*words, folder):
    found = go(*words, "--output_dir", folder)
    assert found.status == 0, found.err
    return log(folder)[0]["train_loss"]


def test_a_teacher_adds_to_the_loss_and_changes_no_draw(flags, unreduced, tmp_path):
    words = [*flags, *STILL, "--finetune", unreduced]
    taught = [*words, "--distillation-type", "kl", "--distillation-alpha"]
    plain, half, whole = (
        first_loss(*given, folder=tmp_path / str(number))
        for number, given in enumerate([words, [*taught, "0.5"], [*taught, "1"]])
    )
    assert plain < half, "fused, the model is at some distance from itself unfused"
    assert whole - plain == pytest.approx(2 * (half - plain), rel=1e-3)


def test_a_model_that_keeps_its_tokens_starts_at_no_distance_from_itself(
    flags, unreduced, tmp_path
):
    words = [*unfused(flags), *STILL, "--drop-path", "0", "--finetune", unreduced]
    plain = first_loss(*words, folder=tmp_path / "plain")
    taught = first_loss(*words, "--distillation-type", "kl", folder=tmp_path / "taught")
    assert taught == pytest.approx(plain, rel=1e-6)


def test_a_resumed_run_finds_its_teacher_and_is_bit_identical(finished, flags, unreduced, tmp_path):
    words = [*flags, "--finetune", unreduced, "--distillation-type", "kl", "--output_dir", tmp_path]
    with crashing():
        go(*words)
    torch.manual_seed(99)
    found = go(*words, "--resume", "auto")
    assert found.status == 0, found.err
    assert "going on from" in found.out
    ours, theirs = (checkpoint.load(f / "checkpoint.pth") for f in (tmp_path, finished.folder))
    for part in ("model", "optimizer", "model_ema", "teacher"):
        assert same(ours[part], theirs[part]), part
    assert lasting(log(tmp_path)) == lasting(log(finished.folder))


def test_resuming_takes_the_same_teacher_from_anywhere_and_no_other(
    finished, flags, unreduced, tmp_path
):
    resume = [*flags, "--resume", finished.folder / "checkpoint.pth"]
    moved = tmp_path / "moved.pth"
    moved.write_bytes(unreduced.read_bytes())
    other = weights_file(tmp_path / "other.pth", seed=1)
    taught = [*resume, "--distillation-type", "kl", "--teacher-path"]
    assert go(*taught, moved).status == 0
    assert "weights of the teacher" in refused(*taught, other)
    assert "distillation_alpha 0.5 -> 0.4" in refused(*taught, moved, "--distillation-alpha", "0.4")
    assert "distillation_type kl -> none, weights of the teacher" in refused(*resume)
    assert "teacher_path is '', expected a file" in refused(*resume, "--distillation-type", "kl")


def test_evaluation_and_plans_need_no_teacher(finished, flags):
    found = go(
        *(*flags, "--distillation-type", "kl", "--eval"),
        *("--resume", finished.folder / "checkpoint.pth"),
    )
    assert found.status == 0, found.err
    assert "teacher" not in found.out


def test_a_file_of_ours_says_where_its_class_token_stands(finished, flags, tmp_path):
    words = [*unfused(flags), "--class-token", "head", "--epochs", "1", "--output_dir", tmp_path]
    assert go(*words).status == 0
    asked = ["--distillation-type", "soft", "--teacher-model", "vim_micro", "--teacher-path"]
    config = parse([*flags, *asked, str(tmp_path / "checkpoint.pth")])
    assert teacher(config, num_classes=10).net.class_token == "head"


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
    flags, unreduced, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    many = weights_file(outside / "many.pth", classes=12)
    vit = "--model timm/vit_tiny_patch16_224 --input-size 32"
    large = weights_file(outside / "large.pth", words=vit)
    path = ["--teacher-path", unreduced]
    for words, expected in (
        ([], "teacher_path is '', expected a file of the teacher's weights; --finetune FILE would"),
        (["--teacher-model", "vim_tiny"], "teacher_path is '', expected a file of the teacher's"),
        (["--teacher-path", "none.pth"], "checkpoint is none.pth, expected a file that exists"),
        (["--teacher-path", many], "many.pth has 12 classes, expected 10 of a teacher"),
        (["--finetune", many], "many.pth has 12 classes, expected 10 of a teacher"),
        ([*path, "--teacher-model", "vim_tiny"], "the teacher is vim_tiny at 16 pixels"),
        (
            [*path, "--teacher-model", "timm/resnet10t"],
            "the teacher is timm/resnet10t at 16 pixels",
        ),
        ([*path, "--teacher-model", "timm/resnet_ten"], "model is 'timm/resnet_ten', expected a"),
        (
            ["--teacher-path", large, "--teacher-model", vit.split()[1]],
            "the teacher is timm/vit_tiny_patch16_224 at 16 pixels",
        ),
    ):
        line = refused(*flags, "--distillation-type", "kl", *words)
        assert expected in line, line
    assert [p.name for p in tmp_path.iterdir()] == ["outside"]


def step(device, *words):
    """An update of a fused model that its unfused twin teaches."""
    text = """--model vim_micro --input-size 32 --data-set CIFAR10 --batch-size 8 --lr 1e-3
        --unscale-lr --warmup-epochs 0 --fusion-strategy upper --fusion-layer 4 --fusion-token 3
        --distillation-type kl"""
    config = parse([*text.split(), *words])
    torch.manual_seed(0)
    guide = Teacher(model(config.unreduced(), num_classes=10).to(device))
    net = model(config, num_classes=10).to(device)
    group = Processes(0, 1, device)
    made = train_step(config, net, group, num_classes=10, per_epoch=3, teacher=guide)
    made.forward.train(made.training)
    return made, guide


def test_a_model_with_two_heads_learns_from_a_teacher_with_the_second():
    words = "--model groupmamba_nano --batch-size 4 --mixup 0 --cutmix 0 --teacher-path x"
    group = Processes(0, 1, torch.device("cpu"))
    for kind, head, outputs in (
        ("hard", "", 2),
        ("kl", "", 1),
        ("hard", "--no-distillation-head", 1),
    ):
        config = parse([*words.split(), "--distillation-type", kind, *head.split()])
        net = model(config, num_classes=10)
        guide = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
        made = train_step(config, net, group, num_classes=10, per_epoch=3, teacher=guide)
        found = net.train()(torch.randn(2, 3, 32, 32))
        assert (len(found) if isinstance(found, tuple) else 1) == outputs
        batch = torch.randn(4, 3, 32, 32), torch.arange(4)
        assert made(iter([batch]), 0).isfinite()


def test_mesa_s_teacher_is_the_moving_average_after_a_quarter_of_the_epochs():
    words = "--model vim_micro --input-size 16 --epochs 10 --distillation-type mesa"
    config = parse([*words.split(), "--distillation-alpha", "1.5"])
    net, group = model(config, num_classes=10), Processes(0, 1, torch.device("cpu"))
    assert teacher(config, num_classes=10) is None
    made = train_step(config, net, group, num_classes=10, per_epoch=3)
    assert made.teacher.net is made.average.model
    assert made.taught_from == 6
    other = parse([*words.split(), "--mesa-start", "0"])
    assert train_step(other, net, group, num_classes=10, per_epoch=3).taught_from == 0


def test_a_teacher_is_neither_compiled_nor_recorded(monkeypatch):
    recorded = []
    monkeypatch.setattr(
        torch.cuda, "make_graphed_callables", lambda net, images: recorded.append(net) or net
    )
    cpu = torch.device("cpu")
    made, guide = step(cpu, "--cuda-graphs")
    assert [net.net for net in recorded] == [made.model]
    assert made.teacher is guide
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(net))
    made, guide = step(cpu, "--compile")
    assert compiled == [made.model]


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["", "--grad-accum-steps 2", "--no_amp", "--amp-dtype fp16"])
def test_replayed_updates_with_a_teacher_equal_those_that_are_not_bit_for_bit(words):
    gpu = torch.device("cuda", 0)
    found = []
    for more in ([], ["--cuda-graphs"]):
        made, guide = step(gpu, *words.split(), *more)
        before = guide.digest()
        generator = torch.Generator().manual_seed(1)
        batches = [
            (torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)) for _ in range(6)
        ]
        losses = torch.stack([made(itertools.cycle(batches), number) for number in range(4)])
        found.append([losses, *made.model.state_dict().values()])
        assert guide.digest() == before
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_two_processes_with_a_teacher_have_the_losses_of_one(flags, unreduced, tmp_path):
    plain = [*flags, "--mixup", "0", "--cutmix", "0", "--distillation-type", "kl"]
    plain += ["--teacher-path", str(unreduced)]
    one = go(
        *(*plain, "--batch-size", "16", "--grad-accum-steps", "2"), "--output_dir", tmp_path / "one"
    )
    two = run_two(plain, tmp_path / "two")
    assert (one.status, *two.status) == (0, 0, 0), two.out + two.other
    assert (two.out.count("teacher: "), two.other.count("teacher: ")) == (1, 0)
    ours, theirs = log(tmp_path / "two"), log(tmp_path / "one")
    for key in ("train_loss", "test_loss", "test_ema_loss"):
        assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-5), key
