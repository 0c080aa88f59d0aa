"""What is evaluated is what the file says, and numbers that are not finite are no result."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import fambav
import fambav.models
from fambav import cli
from fambav.config import OPTIONS, ConfigError
from fambav.data import load
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from fambav.timm_compat import timm
from tests.made import SMALL, converted, filled, go, run, scores, spoiled
from tests.trust.forked import run_two

WEIGHT = "layers.2.mixer.in_proj.weight"
TRAIN = """--model vim_micro --patch-size 8 --input-size 32 --data-stats own --num_workers 0
    --threads 1 --epochs 1 --warmup-epochs 0 --batch-size 16 --output_dir {out}"""
FAKE = """--model vim_micro --input-size 16 --data-set FAKE --num-classes 5 --num_workers 0
    --threads 1"""
READERS = {
    "eval": "main.py --eval --num_workers 0 --resume {file}",
    "finetune": f"main.py {TRAIN} --finetune {{file}}",
    "teacher": f"main.py {TRAIN} --distillation-type soft --teacher-path {{file}}",
    "predict": "predict {file} {image} --device cpu",
    "export": "export {file} --format safetensors --noise --output_dir {out}",
    "show": "show {file} --what groups --output-dir {out}",
    "search-plan": "search-plan {file} --budget token-layers:0.7 --images 8 --trials 0 --steps 2",
    "tune": "tune {file} --margin 1",
}


@pytest.fixture
def read(tmp_path):
    """Let a program read a file."""
    image = tmp_path / "image.png"
    load("DIGITS").val[0][0].save(image)

    def read(reader, file):
        words = READERS[reader].format(file=file, image=image, out=tmp_path / "out").split()
        program = cli.main if words[0] == "main.py" else cli.console
        return go(*words[words[0] == "main.py" :], program=program)

    return read


def one_line(found, status, *parts):
    assert found.status == status, found.out + found.err
    assert found.err.startswith("error: ") and found.err.count("\n") == 1, found.err
    for part in parts:
        assert part in found.err, found.err


@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_weights_that_are_not_finite_end_with_status_3_and_the_first_is_named(
    read, tmp_path, reader, value
):
    def change(state):
        spoiled("norm_f.weight", value)(state)
        spoiled(WEIGHT, value)(state)

    found = read(reader, run(tmp_path / "w.pth", change))
    one_line(found, 3, "w.pth", f"{WEIGHT} has 1 numbers", "not finite")
    assert "Acc@1" not in found.out
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused_in_python(tmp_path):
    path = run(tmp_path / "w.pth", spoiled(WEIGHT, torch.nan))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{WEIGHT} has 1 numbers of \d+ that are"):
        fambav.from_pretrained(path)
    bare = tmp_path / "bare.safetensors"
    save_file(checkpoint.load(path)["model"], bare)
    with pytest.raises(CheckpointError, match=WEIGHT):
        fambav.from_pretrained(bare, model="vim_micro", patch_size=8, input_size=32)


def test_a_number_too_large_for_float32_is_not_finite(tmp_path):
    def change(state):
        converted(WEIGHT, torch.float64)(state)
        spoiled(WEIGHT, 1e300)(state)

    one_line(go("--eval", "--resume", run(tmp_path / "w.pth", change)), 3, WEIGHT)


def test_a_moving_average_that_is_not_finite_ends_with_status_3(tmp_path):
    def change(state):
        state["model_ema"] = {name: v.clone() for name, v in state["model"].items()}
        state["model_ema"][WEIGHT][0, 0] = torch.nan

    found = go("--eval", "--num_workers", "0", "--resume", run(tmp_path / "w.pth", change))
    one_line(found, 3, WEIGHT)
    assert "EMA" not in found.out


HUGE = filled("layers.2.mixer.out_proj.weight", 3e38)


@pytest.mark.parametrize("reader", ["eval", "predict", "export", "show", "search-plan", "tune"])
def test_of_logits_that_are_not_finite_the_first_module_is_named(read, tmp_path, reader):
    found = read(reader, run(tmp_path / "w.pth", HUGE))
    what = {"eval": "evaluation batch 0", "tune": "evaluation batch 0", "predict": "image.png"}
    one_line(found, 3, "logits of", "are not finite", "is layers.2.mixer (", what.get(reader, ""))
    assert "Acc@1" not in found.out


def test_two_processes_end_together_and_one_tells(tmp_path):
    path = run(tmp_path / "w.pth", HUGE)
    words = ["--eval", "--num_workers", "0", "--threads", "1", "--resume", path]
    found = run_two(words, tmp_path / "run")
    assert found.status == [3, 3], found.out + found.other
    assert found.out.count("error: logits of evaluation batch 0 of process 0 are not") == 1
    assert "error: " not in found.other


def test_training_ends_where_what_it_evaluates_is_not_finite(tmp_path):
    words = f"""{FAKE} --batch-size 1280 --epochs 2 --warmup-epochs 0 --opt sgd --lr 1e36
        --unscale-lr --mixup 0 --cutmix 0 --aa none --no-model-ema --no-repeated-aug"""
    found = go(*words.split(), "--output_dir", tmp_path / "run")
    one_line(found, 3, "not finite")
    assert "at update" not in found.err, "the loss was finite, what came of it is not"
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_weights_that_are_no_real_numbers_are_refused_by_name(read, tmp_path, reader, dtype):
    found = read(reader, run(tmp_path / "w.pth", converted(WEIGHT, dtype)))
    one_line(found, 2, "w.pth", f"dtype of {WEIGHT} is {dtype}, expected torch.float32")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of one epoch of two, to go on with."""
    folder = tmp_path_factory.mktemp("resumed")
    words = f"{FAKE} --batch-size 640 --epochs 1 --warmup-epochs 0 --aa none".split()
    assert go(*words, "--output_dir", folder).status == 0
    return words, checkpoint.load(folder / "checkpoint.pth")


SPOILED = {
    "complex weight": ("model", lambda v: v.to(torch.complex64), 2, "complex64"),
    "integer weight": ("model", lambda v: v.to(torch.int32), 2, "int32"),
    "weight": ("model", lambda v: v * torch.nan, 3, "not finite"),
    "complex average": ("model_ema", lambda v: v.to(torch.complex64), 2, "complex64"),
    "integer average": ("model_ema", lambda v: v.to(torch.int64), 2, "int64"),
    "average": ("model_ema", lambda v: v * torch.inf, 3, "not finite"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_run_is_not_gone_on_with_from_such_weights(resumed, tmp_path, case):
    words, state = resumed
    part, change, status, told = SPOILED[case]
    weights = {**state[part], WEIGHT: change(state[part][WEIGHT])}
    path = tmp_path / "w.pth"
    checkpoint.save(path, {**state, part: weights})
    one_line(go(*words, "--resume", path, "--output_dir", tmp_path / "run"), status, WEIGHT, told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "status"), [(lambda v: v.to(torch.int32), 2), (lambda v: v * torch.nan, 3)]
)
def test_a_run_is_not_gone_on_with_from_such_moments(resumed, tmp_path, change, status):
    words, state = resumed
    states = dict(state["optimizer"]["state"])
    states[4] = {**states[4], "exp_avg": change(states[4]["exp_avg"])}
    path = tmp_path / "w.pth"
    checkpoint.save(path, {**state, "optimizer": {**state["optimizer"], "state": states}})
    one_line(go(*words, "--resume", path, "--output_dir", tmp_path / "run"), status, "exp_avg")
    assert not (tmp_path / "run").exists()


RECORDED = {
    "fused": dict(class_token="head", fusion_strategy="upper", fusion_layer=4, fusion_token=2),
    "unfused": dict(class_token="none", patch_size=None),
    "listed": dict(fusion_plan="3:2,5:4", fusion_method="ordered"),
    "reduced": dict(reduction="r-meeto", reduction_schedule="r:2@3-6"),
    "large": dict(input_size=40, eval_crop_ratio=0.6),
    "other": dict(model="plainmamba_micro", patch_size=None, param_order="permuted"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_evaluation_goes_by_what_the_checkpoint_says(tmp_path, case):
    path = run(tmp_path / "w.pth", **RECORDED[case])
    given = {"input_size": 32, **SMALL, **RECORDED[case]}
    flags = [
        word
        for name, value in given.items()
        if value is not None and name != "num_workers"
        for word in (f"--{name}", value)
    ]
    alone = scores("--resume", path)
    assert alone == scores(*flags, "--resume", path)
    assert alone[1] == []
    assert scores("--model", given["model"], "--finetune", path) == alone


def test_what_is_given_wins_and_is_told_where_it_differs(tmp_path):
    path = run(tmp_path / "w.pth", **RECORDED["fused"])
    plain = scores("--resume", path)
    every, notes = scores("--resume", path, "--fusion-strategy", "none", "--patch-size", "8")
    assert every != plain[0]
    assert "note: fusion_strategy 'none' differs from the checkpoint's 'upper'" in notes
    assert not any("patch_size" in note for note in notes)
    other, (note,) = scores("--resume", path, "--data-stats", "imagenet")
    assert other != plain[0]
    assert note == "note: data_stats 'imagenet' differs from the checkpoint's 'own'"
    file = tmp_path / "run.yaml"
    file.write_text("reduction: tome\nreduction_schedule: r:3@2\n")
    _, notes = scores("--resume", path, "--config", file)
    assert "note: reduction 'tome' differs from the checkpoint's 'none'" in notes
    assert "note: fusion_strategy 'none' differs from the checkpoint's 'upper'" in notes


@pytest.mark.parametrize("off", ["--fusion-strategy", "--reduction"])
@pytest.mark.parametrize("case", ["fused", "listed", "reduced"])
def test_none_given_beside_a_checkpoint_keeps_every_token(tmp_path, case, off):
    path = run(tmp_path / "w.pth", **RECORDED[case])
    found = go("--eval", "--num_workers", "0", "--resume", path, off, "none")
    assert found.status == 0, found.err
    assert "total removed: 0 of" in found.out or "total removed" not in found.out
    assert "note: " in found.out


def test_images_are_normalised_as_the_checkpoint_says(tmp_path):
    def change(state):
        state["mean"], state["std"] = [0.9, 0.9, 0.9], [0.1, 0.2, 0.3]

    assert scores("--resume", run(tmp_path / "a.pth", change)) != scores(
        "--resume", run(tmp_path / "b.pth")
    )


SIZES = {"squashed": dict(), "cut": dict(input_size=40), "cut more": RECORDED["large"]}


@pytest.mark.parametrize("case", SIZES)
def test_a_model_says_in_timms_words_how_it_is_evaluated(tmp_path, case):
    path = run(tmp_path / "w.pth", **SIZES[case])
    told, _ = scores("--resume", path)
    words = ["export", path, "--format", "hf", "--noise", "--output_dir", tmp_path / "out"]
    assert go(*words, program=cli.console).status == 0
    exported = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    images = load("DIGITS").val
    for source, named in ((path, None), (tmp_path / "out", None), (path, exported)):
        model = fambav.from_pretrained(source)
        cfg = named or model.pretrained_cfg
        assert {"crop_pct", "crop_mode", "interpolation", "mean", "std", "input_size"} <= set(cfg)
        chosen = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
        transform = timm.data.create_transform(**chosen)
        batch = torch.stack([transform(images[n][0]) for n in range(len(images))])
        labels = torch.tensor([images[n][1] for n in range(len(images))])
        with torch.no_grad():
            logits = model(batch)
        right = 100 * (logits.argmax(dim=1) == labels).double().mean()
        loss = F.cross_entropy(logits, labels)
        assert told.startswith(f"* Acc@1 {right:.3f} ")
        assert told.endswith(f" loss {loss:.3f}")


def test_the_number_of_classes_that_is_asked_for_gets_a_new_head(tmp_path):
    path = run(tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="num_classes is 7 and .* has 10: the head is new"):
        net = fambav.from_pretrained(path, num_classes=7)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert net.pretrained_cfg["num_classes"] == net.num_classes == 7
    own = fambav.from_pretrained(path, num_classes=10)
    for name, value in checkpoint.load(path)["model"].items():
        assert torch.equal(own.state_dict()[name], value)
        assert name.startswith("head.") or torch.equal(net.state_dict()[name], value)


def other(option):
    """A value that is not the default."""
    if option.choices:
        others = (c for c in option.choices if c not in (option.default, "none"))
        return next(others, option.default)
    if option.kind is bool:
        return not option.default
    numbers = {int: 3, float: 0.5, tuple: (0.25, 0.5)}
    words = {"model": "vim_tiny", "fusion_plan": "4:2", "reduction_schedule": "r:1@4"}
    return numbers.get(option.kind) or words.get(option.name, "cpu")


GOOD = {
    "input_size": 48,
    "stride": 4,
    "num_classes": 7,
    "reduction_hook": "after",
    "scan_policy": "masked",
    "class_token_policy": "exact",
    "param_order": "raster",
}


def signs(net):
    """All that can be seen of a model."""
    images = torch.rand(4, 3, *net.img_size, generator=torch.Generator().manual_seed(0))
    said = []
    for mode in (False, True):
        torch.manual_seed(0)
        with torch.no_grad():
            said.append(net.train(mode)(images).tolist())
    layer = net.layers[0]
    names = ("hook", "scan", "gap_policy", "class_policy")
    policies = [getattr(net.reduction, name) for name in names]
    parts = net.schedule, policies, vars(layer).get("grad_checkpointing"), net.pretrained_cfg
    return str((said, *parts))


@pytest.mark.parametrize("base", ["fused", "reduced", "large", "other"])
def test_no_keyword_vanishes(tmp_path, base):
    path = run(tmp_path / "w.pth", **RECORDED[base])
    plain = signs(fambav.from_pretrained(path))
    used = set()
    for name, option in OPTIONS.items():
        value = GOOD.get(name, other(option))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                net = fambav.from_pretrained(path, **{name: value})
            except ValueError as error:
                assert "\n" not in str(error)
                continue
        used.add(name)
        same_as_before = checkpoint.load(path)["config"][name] == value
        nothing_to_switch_off = value == option.off_value and value is not None
        assert same_as_before or nothing_to_switch_off or signs(net) != plain, name
    assert {"input_size", "num_classes", "drop_path", "grad_checkpointing"} <= used
    assert used & {"fusion_plan", "reduction"}


def test_a_keyword_without_meaning_is_refused_in_one_line(tmp_path):
    path = run(tmp_path / "w.pth")
    for name in ("lr", "data_stats", "compile", "scan_backend", "legacy_init"):
        with pytest.raises(ConfigError, match=rf"^{name} is [^\n]* would change nothing$"):
            fambav.from_pretrained(path, **{name: other(OPTIONS[name])})
    with pytest.raises(ConfigError, match=r"^eval_crop_ratio is 0\.5, expected none"):
        fambav.from_pretrained(path, eval_crop_ratio=0.5)
