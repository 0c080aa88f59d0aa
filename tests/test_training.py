"""From settings to objects."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from fambav.config import ConfigError, parse
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.cuda_graph import CudaGraph
from fambav.engine.distributed import Processes
from fambav.engine.trainer import Trainer
from fambav.layers.drop import current
from fambav.ops.kernels import KernelSet
from fambav.tasks.classification import binary_cross_entropy, soft_cross_entropy
from fambav.timm_compat import timm
from fambav.training import job, model, run, schedule
from fambav.training.batches import data_set, train_batches
from fambav.training.network import layout
from fambav.training.run_state import RunState, as_strings, facts
from fambav.training.step import learning_rate, precision, train_step

CPU = torch.device("cpu")
ONE, FOUR = Processes(0, 1, CPU), Processes(2, 4, CPU)
MICRO = "--model vim_micro --input-size 16 --num_workers 0"


def config(*words):
    return parse(" ".join((MICRO, *words)).split())


def test_the_seed_command_fuses_the_layers_of_the_paper():
    name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    fusion = "--fusion-strategy upper --fusion-layer 4 --fusion-token 8"
    assert schedule(parse(["--model", name, *fusion.split()])).lengths == (
        197,
        197,
        *range(197, 28, -8),
    )


def test_a_plan_is_made_without_weights():
    large = parse(["--model", "vim_base", "--fusion-plan", "3:5"])
    assert schedule(large).counts[:4] == (0, 0, 5, 0)
    assert layout(large).input_size == (224, 224)


def test_a_plan_that_cannot_be_done_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"fusion_token is 9, expected at most \d; layer \d"):
        schedule(config("--fusion-strategy all --fusion-token 9"))


def test_a_share_to_keep_is_refused_where_images_are_taken_whole(tmp_path):
    where = f"--data-set DIGITS --output_dir {tmp_path / 'run'}"
    with pytest.raises(ValueError, match=r"^eval_crop_ratio is 0\.5, expected 0\.875, its default"):
        run(config("--eval-crop-ratio 0.5", where))
    assert not list(tmp_path.iterdir())


def test_kernels_are_compiled_before_the_time_of_training_begins(tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begin(trainer):
        raise Begun

    loaded = []
    monkeypatch.setattr(KernelSet, "load", lambda kernels: loaded.append(kernels.name))
    monkeypatch.setattr(Trainer, "run", begin)
    with pytest.raises(Begun):
        run(config(f"--data-set DIGITS --device cpu --output_dir {tmp_path / 'run'}"))
    assert loaded == ["numba"]


def test_models_of_timms_have_no_plan():
    foreign = parse(["--model", "timm/resnet18"])
    assert layout(foreign)[:2] == ((224, 224), None)
    with pytest.raises(ValueError, match="expected one whose tokens can be reduced"):
        schedule(foreign)
    with pytest.raises(ValueError, match="did you mean 'deit_tiny_patch16_224'"):
        layout(parse(["--model", "timm/deit_tiny_patch16_225"]))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_models_of_timms_take_the_size_and_the_classes(name):
    net = model(parse(["--model", f"timm/{name}", "--input-size", "32"]), num_classes=7)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_learning_rate_is_scaled_by_all_images_of_an_update():
    words = "--lr 5e-4 --batch-size 128 --grad-accum-steps 2 --warmup-epochs 0 --min-lr 1e-5"
    assert learning_rate(config(words), FOUR, per_epoch=10)(0) == pytest.approx(1e-3)
    alone = config(words, "--unscale-lr --epochs 2")
    assert learning_rate(alone, FOUR, per_epoch=10)(0) == pytest.approx(5e-4)
    assert learning_rate(alone, FOUR, per_epoch=10)(20) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("", None), ("--if_amp", torch.bfloat16), ("--if_amp --amp-dtype fp16", torch.float16)],
)
def test_precision_on_a_cpu_is_mixed_only_when_asked_for(words, expected):
    assert precision(config(words), ONE).dtype == expected


def test_precision_on_a_gpu_is_mixed_unless_declined():
    gpu = Processes(0, 1, torch.device("cuda", 0))
    assert precision(config(), gpu).dtype == torch.bfloat16
    assert precision(config("--no_amp"), gpu).dtype is None


def step(*words):
    wanted = config(*words)
    return train_step(wanted, model(wanted, num_classes=5), ONE, num_classes=5, per_epoch=3)


def test_the_loss_follows_the_targets():
    assert step().loss is soft_cross_entropy
    assert step("--bce-loss --smoothing 0").loss is binary_cross_entropy
    plain = step("--mixup 0 --cutmix 0 --smoothing 0.5")
    assert plain.mix is None
    logits = torch.tensor([[0.0, 0.0, 0.0, math.log(4.0), 0.0]])
    wanted = -(0.6 * math.log(4 / 8) + 4 * 0.1 * math.log(1 / 8))
    assert plain.loss(logits, torch.tensor([3])).item() == pytest.approx(wanted)


def test_an_update_is_made_as_the_flags_say():
    made = step("--clip-grad 2 --grad-accum-steps 3 --no-model-ema --if_continue_inf --opt lion")
    assert (made.max_grad_norm, made.accumulate, made.average) == (2.0, 3, None)
    assert made.skipping
    assert type(made.optimizer).__name__ == "Lion"
    plain = step("--weight-decay 0.3 --decay-groups published --no-train-mode --opt-betas 0.8 0.9")
    assert [group["weight_decay"] for group in plain.optimizer.param_groups] == [0.0, 0.3]
    assert plain.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert len(plain.optimizer.param_groups[1]["params"]) == 2 + 6 * 10
    assert (plain.average is not None, plain.training, plain.skipping) == (True, False, False)


def test_passes_are_recorded_for_the_batches_of_one_process(monkeypatch):
    seen = []

    def record(module, samples):
        seen.append((samples[0].shape, module.training, current()[1]))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    words = "--cuda-graphs --batch-size 6 --grad-accum-steps 2"
    made = step(words)
    assert isinstance(made.forward, CudaGraph)
    assert made.forward.net is made.model
    step(words, "--no-train-mode")
    assert seen == [((6, 3, 16, 16), True, 2), ((6, 3, 16, 16), False, 2)]
    assert not isinstance(step().forward, CudaGraph)


def test_recorded_passes_need_a_gpu(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="device is cpu, expected a CUDA device with --cuda-gr"):
        run(config("--cuda-graphs --device cpu --data-set IMNET --data-path /no/such"))


@pytest.mark.parametrize(
    ("name", "alike"), [("vim_micro", True), ("timm/vit_tiny_patch16_224", False)]
)
def test_batches_of_an_update_start_alike_only_where_the_model_draws_for_all(name, alike):
    wanted = parse(f"--model {name} --input-size 32".split())
    made = train_step(wanted, model(wanted, num_classes=2), ONE, num_classes=2, per_epoch=3)
    draws = []
    for place in range(2):
        made.seed(4, place)
        draws.append(torch.rand(3))
    assert torch.equal(*draws) is alike
    made.seed(4, 0)
    assert torch.equal(torch.rand(3), draws[0])
    made.seed(5, 0)
    assert not torch.equal(torch.rand(3), draws[0])


def test_batches_start_at_an_epoch_as_if_all_before_were_read():
    wanted = config("--data-set FAKE --num-classes 5 --batch-size 512 --epochs 2 --aa none")
    found = data_set(wanted, ONE, input_size=(16, 16))
    stream = train_batches(wanted, found, ONE, input_size=(16, 16))
    assert stream.updates_per_epoch == 2
    later = train_batches(wanted, found, ONE, input_size=(16, 16), start_epoch=1)
    images, labels = next(iter(later))
    *_, expected, _last = iter(stream)
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


@pytest.fixture(scope="module")
def fake():
    wanted = config("--data-set FAKE --num-classes 5 --class-token head")
    return wanted, data_set(wanted, ONE, input_size=(16, 16))


def test_facts_are_plain_and_survive_both_kinds_of_file(fake, tmp_path):
    wanted, found = fake
    known = facts(wanted, found, schedule(wanted), images=64)
    checkpoint.save(tmp_path / "a.pth", {"model": {}, **known})
    checkpoint.save_weights(tmp_path / "a.safetensors", {"w": torch.ones(1)}, as_strings(known))
    for name in ("a.pth", "a.safetensors"):
        state = RunState.read(tmp_path / name)
        assert state.config == wanted
        assert state.class_token == "head"
        assert state.statistics == (tuple(known["mean"]), tuple(known["std"]))
        assert state.facts["schedule"]["lengths"] == [17] * 6
        assert state.class_names is None
    assert RunState.of(tmp_path, {"model": {}, "metadata": {}}).config is None
    assert RunState.of(tmp_path, {"model": {}, "metadata": 3}).config is None


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_the_grid_that_a_file_records_decides_over_the_number_of_patches(fake, name, tmp_path):
    wanted, found = fake
    build = partial(timm.create_model, name, num_classes=5)
    wide, square = build(img_size=(16, 64)), build(img_size=(32, 32))
    known = facts(wanted, found, None, images=64, grid=wide.grid)
    del known["class_token"]  # the data set's settings name another place
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, wide.state_dict(), as_strings(known))
    again = build(img_size=(16, 64))
    RunState.read(path).load_into(again)
    position = "backbone.pos_embed" if name == "plainmamba_micro" else "pos_embed"
    assert torch.equal(again.state_dict()[position], wide.state_dict()[position])
    RunState.read(path).load_into(square)
    assert not torch.equal(square.state_dict()[position], wide.state_dict()[position])
    for wrong in ("[4]", "[0, 16]", '"4 x 4"'):
        strings = {**as_strings(known), "grid": wrong}
        checkpoint.save_weights(path, wide.state_dict(), strings)
        with pytest.raises(CheckpointError, match=r"grid is .*, expected 2 64-bit whole numbers"):
            RunState.read(path)


def test_only_a_checkpoint_of_the_same_run_goes_on(fake, tmp_path):
    wanted, found = fake
    known = facts(wanted, found, None, images=64)
    entries = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 0, **known}
    state = RunState.of(tmp_path, entries)
    state.extended(wanted, images=64)
    free = {"num_workers": 3, "log_every": 2, "device": "cpu", "compile": True, "cuda_graphs": True}
    for name, value in free.items():
        state.extended(wanted.replace(**{name: value}), images=64)
    changed = wanted.replace(epochs=7, opt_betas=(0.9, 0.95))
    with pytest.raises(CheckpointError, match=r"300 -> 7, opt_betas None -> \[0\.9, 0\.95\]"):
        state.extended(changed, images=64)
    with pytest.raises(CheckpointError, match="images per update 64 -> 32"):
        state.extended(wanted, images=32)
    for part in ("config", "optimizer", "epoch"):
        less = RunState.of(tmp_path, {k: v for k, v in entries.items() if k != part})
        with pytest.raises(CheckpointError, match="does not hold a run, expected a checkpoint of"):
            less.extended(wanted, images=64)


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    net = model(config(), num_classes=5)
    path = tmp_path / "w.pth"
    other = model(config("--class-token double"), num_classes=5)
    for wrong in ({"model": other.state_dict()}, {"model": {}}, {"epoch": 3}):
        with pytest.raises(CheckpointError, match=r"w\.pth: checkpoint [^\n]*$"):
            RunState.of(path, wrong).load_into(net)
    foreign = model(parse(["--model", "timm/resnet18"]), num_classes=5)
    with pytest.raises(CheckpointError, match=r"w\.pth: [^\n]*$"):
        RunState.of(path, {"model": other.state_dict()}).load_into(foreign)


@pytest.mark.parametrize("name", ["vim_micro", "timm/resnet18"])
def test_integers_are_not_taken_for_weights(tmp_path, name):
    """Bits of a float32 read as an int32 would be a weight of a billion."""
    net = model(parse(["--model", name, "--data-set", "CIFAR"]), num_classes=5)
    weights = net.state_dict()
    last = [own for own in weights if own.endswith("weight")][-1]
    wrong = {**weights, last: weights[last].view(torch.int32)}
    with pytest.raises(
        CheckpointError, match=rf"dtype of {last} is torch\.int32, expected torch\.f"
    ):
        RunState.of(tmp_path / "w.pth", {"model": wrong}).load_into(net)
    RunState.of(tmp_path / "w.pth", {"model": weights}).load_into(net)


def test_complex_numbers_are_taken_for_nothing(tmp_path):
    net = model(parse(["--model", "timm/resnet18", "--data-set", "CIFAR"]), num_classes=5)
    for name in ("bn1.num_batches_tracked", "conv1.weight"):
        wrong = {**net.state_dict(), name: net.state_dict()[name].to(torch.complex64)}
        with pytest.raises(
            CheckpointError, match=rf"dtype of {name} is torch\.complex64, expected"
        ):
            RunState.of(tmp_path / "w.pth", {"model": wrong}).load_into(net)


def test_a_foreign_model_takes_another_head_only_when_finetuned(tmp_path):
    resnet = parse(["--model", "timm/resnet18"])
    state = {"model": model(resnet, num_classes=9).state_dict()}
    net = model(resnet, num_classes=5)
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        RunState.of(tmp_path, state).load_into(net)
    RunState.of(tmp_path, state).load_into(net, head="drop")
    assert torch.equal(net.conv1.weight, state["model"]["conv1.weight"])
    assert net.fc.weight.shape == (5, 512)


def test_a_moving_average_that_is_not_there_is_refused(tmp_path):
    net = model(config(), num_classes=5)
    with pytest.raises(CheckpointError, match="expected weights under model_ema"):
        RunState.of(tmp_path, {"model": net.state_dict()}).load_into(net, ema=True)


def test_settings_that_a_file_must_not_have_are_refused():
    with pytest.raises(ConfigError):
        assert RunState.of(Path("w.pth"), {"config": {"lr": "fast"}}).config


def test_an_interrupted_run_says_what_it_can_go_on_from(tmp_path):
    assert "nothing is saved" in job._left_of(tmp_path)
    (tmp_path / "checkpoint.pth").touch()
    assert job._left_of(tmp_path) == f"--resume auto goes on from {tmp_path / 'checkpoint.pth'}"
