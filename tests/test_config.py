"""Flags, YAML and defaults: one table, four levels, and a refusal for what would be ignored."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import fambav
from fambav.config import (
    OPTIONS,
    Config,
    ConfigError,
    affecting,
    help_text,
    load,
    parse,
    read_flags,
    read_settings,
)
from fambav.config.legacy_flags import LAUNCHER, UNSUPPORTED
from fambav.config.schema import OPTIMIZERS

ROOT = Path(fambav.__file__).parents[1]
TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
SMALL = TINY.replace("tiny", "small")
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

# What DeiT's, Vim's and Famba-V's parsers hold when nothing is given.
ORIGINAL = dict(
    batch_size=64,
    epochs=300,
    bce_loss=False,
    unscale_lr=False,
    drop=0.0,
    drop_path=0.1,
    model_ema=True,
    model_ema_decay=0.99996,
    fusion_strategy="none",
    opt="adamw",
    opt_eps=1e-8,
    opt_betas=None,
    clip_grad=None,
    momentum=0.9,
    weight_decay=0.05,
    sched="cosine",
    lr=5e-4,
    warmup_lr=1e-6,
    min_lr=1e-5,
    warmup_epochs=5,
    aa="rand-m9-mstd0.5-inc1",
    smoothing=0.1,
    train_interpolation="bicubic",
    repeated_aug=True,
    train_mode=True,
    three_augment=False,
    src=False,
    reprob=0.25,
    remode="pixel",
    recount=1,
    mixup=0.8,
    cutmix=1.0,
    cutmix_minmax=None,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    mixup_mode="batch",
    finetune="",
    inat_category="name",
    seed=0,
    resume="",
    eval=False,
    eval_crop_ratio=0.875,
    num_workers=10,
    pin_mem=True,
    if_continue_inf=False,
)
RUN = ["--model", "vim_tiny"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


def flat(*words):
    return parse([*RUN, *words]).flat()


def written(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_are_the_originals():
    resolved = flat()
    assert {name: resolved[name] for name in ORIGINAL} == ORIGINAL
    assert OPTIONS["color_jitter"].default == 0.3
    assert resolved["color_jitter"] is None, "the original ignores it while aa is set"


def test_the_readme_command_of_famba_v_means_what_it_says():
    words = f"""--model {TINY} --batch-size 128 --drop-path 0.0 --weight-decay 0.1 --num_workers 25
        --data-set CIFAR --data-path ./datasets/cifar-100-python --output_dir ./output/{TINY}
        --no_amp --fusion-strategy upper --fusion-layer 4 --fusion-token 8"""
    given = dict(
        model=TINY,
        batch_size=128,
        drop_path=0.0,
        weight_decay=0.1,
        num_workers=25,
        data_set="CIFAR",
        data_path="./datasets/cifar-100-python",
        output_dir=f"./output/{TINY}",
        amp=False,
        fusion_strategy="upper",
        fusion_layer=4,
        fusion_token=8,
    )
    assert parse(words.split()).flat() == {**flat(), **given}


COMMON = "--batch-size 128 --drop-path 0.0 --weight-decay 0.1 --num_workers 25 --no_amp"
LOWER = [(4, 9), (5, 9), (3, 8), (6, 10), (7, 10), (8, 11), (9, 12), (10, 12), (11, 13), (12, 14)]
LOWER += [(13, 15), *((4, count) for count in range(1, 9))]
PLAIN = "--fusion-strategy no"
SCRIPTS = [
    *((TINY, "CIFAR", f"--fusion-strategy lower --fusion-layer {la} --fusion-token {r}", None)
      for la, r in LOWER),
    (TINY, "CIFAR", PLAIN, None),
    (TINY, "CIFAR", f"{PLAIN} --visualize", "--visualize is on, expected off; `fambav plan`"),
    *((TINY, "CIFAR", "--fusion-strategy all --fusion-layer 5 --fusion-token 7", "no meaning")
      for _ in range(2)),
    (TINY, "CIFAR", "--fusion-strategy alternate --fusion-layer 5 --fusion-token 14", "no meaning"),
    (TINY, "CIFAR", "--fusion-strategy upper --fusion-layer 18 --fusion-token 9", None),
    (SMALL, "CIFAR", PLAIN, None),
    (SMALL, "CIFAR", "--fusion-strategy all --fusion-layer 5 --fusion-token 7", "no meaning"),
    (SMALL, "CIFAR", "--fusion-strategy alternate --fusion-layer 5 --fusion-token 14", "no mean"),
    (SMALL, "CIFAR", "--fusion-strategy upper --fusion-layer 18 --fusion-token 9", None),
    (SMALL, "CIFAR", "--fusion-strategy lower --fusion-layer 4 --fusion-token 9", None),
    (SMALL, "CIFAR", "--fusion-strategy lower --fusion-layer 5 --fusion-token 9", None),
    (TINY, "IMNET", f"{PLAIN} --fusion-layer 8 --fusion-token 9", "fuses nothing"),
    (TINY, "IMNET", "--fusion-strategy all --fusion-layer 5 --fusion-token 7", "no meaning"),
    (TINY, "IMNET", "--fusion-strategy alternate --fusion-layer 5 --fusion-token 14", "no meaning"),
    (TINY, "IMNET", "--fusion-strategy lower --fusion-layer 5 --fusion-token 9", None),
    (TINY, "IMNET", "--fusion-strategy upper --fusion-layer 18 --fusion-token 9", None),
]  # fmt: skip


def test_there_are_36_old_scripts():
    assert len(SCRIPTS) == 36


@pytest.mark.parametrize(("model", "data", "fusion", "refusal"), SCRIPTS)
def test_flags_of_an_old_script_keep_their_meaning_or_are_refused(model, data, fusion, refusal):
    words = f"--model {model} --data-set {data} --data-path x {COMMON} {fusion}".split()
    if refusal is not None:
        with pytest.raises(ConfigError, match=refusal):
            parse(words)
        return
    chosen = dict(zip(fusion.split()[::2], fusion.split()[1::2], strict=True))
    fused = parse(words).fusion
    assert fused.fusion_strategy == {"no": "none"}.get(
        chosen["--fusion-strategy"], chosen["--fusion-strategy"]
    )
    assert fused.fusion_layer == (int(chosen.get("--fusion-layer", 0)) or None)
    assert fused.fusion_token == int(chosen.get("--fusion-token", 0))


def other_value(option):
    """A value that is not the default, as words after the flag and as an object."""
    if option.choices:
        word = next((c for c in option.choices if c != option.default), option.default)
        return [word], word
    if option.kind is tuple:
        return ["0.25", "0.5"], (0.25, 0.5)
    if option.kind is int:
        return ["3"], 3
    if option.kind is float:
        return ["0.125"], 0.125
    names = {"model": "vim_small", "teacher_model": "vim_small", "device": "cpu"}
    names |= {"fusion_plan": "6:9", "reduction_schedule": "r:5", "aa": "augmix"}
    word = names.get(option.name, "word")
    return [word], word


@pytest.mark.parametrize("name", OPTIONS)
def test_every_setting_has_a_flag_in_both_spellings_and_a_yaml_key(name):
    option = OPTIONS[name]
    for flag in {name, option.flag, *option.also, name.replace("_", "-")}:
        for spelling in (flag, flag.replace("_", "-"), flag.replace("-", "_")):
            if option.kind is bool:
                words, value = [f"--{spelling}"], True
            else:
                words, value = other_value(option)
                words = [f"--{spelling}", *words]
            assert read_flags(words) == {name: value}
    assert read_settings({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--repeated-aug", "repeated_aug", True),
        ("--no-repeated-aug", "repeated_aug", False),
        ("--model-ema", "model_ema", True),
        ("--no-model-ema", "model_ema", False),
        ("--no_model_ema", "model_ema", False),
        ("--pin-mem", "pin_mem", True),
        ("--no-pin-mem", "pin_mem", False),
        ("--train-mode", "train_mode", True),
        ("--no-train-mode", "train_mode", False),
        ("--if_amp", "amp", True),
        ("--no_amp", "amp", False),
        ("--no-amp", "amp", False),
        ("--if_continue_inf", "if_continue_inf", True),
        ("--no_continue_inf", "if_continue_inf", False),
        ("--ThreeAugment", "three_augment", True),
        ("--no-compile", "compile", False),
        ("--compile --no_compile", "compile", False),
        ("--no-ThreeAugment --no-three-augment", "three_augment", False),
        ("--model-ema --no-model-ema", "model_ema", False),
        ("--lr 1e-3 --lr=2e-3", "lr", 2e-3),
        ("--aa none", "aa", None),
        ("--aa None", "aa", None),
        ("--clip-grad 5", "clip_grad", 5.0),
        ("--opt-betas 0.9 0.95 --lr 1", "opt_betas", (0.9, 0.95)),
        ("--input-size 224 320 --lr 1", "input_size", (224, 320)),
        ("--input-size 224 224", "input_size", 224),
        ("--input-size 224", "input_size", 224),
        ("--input-size none", "input_size", None),
        ("--fusion-strategy no", "fusion_strategy", "none"),
        ("--fusion-strategy alternate", "fusion_strategy", "interleaved"),
        ("--model timm/deit_tiny_patch16_224", "model", "timm/deit_tiny_patch16_224"),
        ("--seed 4294967295", "seed", 2**32 - 1),
    ],
)
def test_flags_mean(words, name, value):
    assert flat(*words.split())[name] == value


@pytest.mark.parametrize(
    "words",
    [
        "--no_nan2num --no_random_cls_token_position --no-random-token-rank",
        "--distillation-type none --distillation-alpha 0.5 --distillation_tau 1 --teacher-path=",
        "--teacher-model none --start_epoch 0 --sched cosine --decay-rate .1 --dr 0.1",
        "--lr-noise none --lr-noise-pct .67 --lr-noise-std 1 --cooldown-epochs 10",
        "--local-rank 0 --local_rank=0 --world_size 1 --dist_url env:// --dist-eval",
    ],
)
def test_what_is_not_offered_parses_while_it_is_off(words):
    assert flat(*words.split()) == flat()


def test_a_launcher_says_how_many_processes_there_are(monkeypatch):
    for name, value in zip(RANKS, ("1", "1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    words = ["--local-rank", "1", "--world_size", "2", "--distributed"]
    assert flat(*words) == flat()
    with pytest.raises(ConfigError, match="--world_size is 4, expected 2"):
        flat("--world_size", "4")


MALFORMED = [
    ("--modle vim_tiny", "--modle is not a flag; did you mean --model?"),
    ("--batchsize 3", "--batchsize is not a flag; did you mean --batch-size?"),
    ("--epoch_count 3", "--epoch_count is not a flag; did you mean --epochs?"),
    ("--learning-rate 1", "--learning-rate is not a flag; did you mean --lr?"),
    ("--repeated", "--repeated is not a flag; did you mean --repeated-aug?"),
    ("--threeaugment2", "--threeaugment2 is not a flag; did you mean --ThreeAugment?"),
    ("--no-model-emma", "--no-model-emma is not a flag; did you mean --no-model-ema?"),
    ("--xyzzy", "--xyzzy is not a flag; see --help"),
    ("--", "-- is not a flag; see --help"),
    ("word", "'word' is not a flag, expected --name"),
    ("-e 3", "'-e' is not a flag, expected --name"),
    ("--lr", "--lr has no value, expected one after it"),
    ("--lr --epochs 3", "--lr has no value"),
    ("--opt-betas --epochs 3", "--opt-betas has no value"),
    ("--model-ema=1", "--model-ema is '1', expected no value; use --model-ema or --no-model-ema"),
    ("--eval yes", "'yes' is not a flag"),
    ("--lr abc", "--lr is 'abc', expected a number"),
    ("--lr=", "--lr is '', expected a number"),
    ("--lr nan", "--lr is nan, expected a finite number"),
    ("--lr inf", "--lr is inf, expected a finite number"),
    ("--lr 0", "--lr is 0.0, expected more than 0"),
    ("--lr -1e-3", "--lr is -0.001, expected more than 0"),
    ("--epochs 3.5", "--epochs is '3.5', expected a whole number"),
    ("--epochs 0", "--epochs is 0, expected at least 1"),
    ("--epochs -1", "--epochs is -1, expected at least 1"),
    (f"--epochs {'9' * 400}", f"--epochs is {'9' * 77}..., expected a finite number"),
    ("--batch_size 0", "--batch_size is 0, expected at least 1"),
    ("--num_workers -1", "--num_workers is -1, expected at least 0"),
    ("--seed -1", "--seed is -1, expected at least 0 and at most"),
    ("--eval-crop-ratio 0", "--eval-crop-ratio is 0.0, expected more than 0 and at most 1"),
    ("--eval-crop-ratio 1.1", "expected more than 0 and at most 1"),
    ("--reprob 1.5", "--reprob is 1.5, expected at least 0 and at most 1"),
    ("--drop-path 1", "--drop-path is 1.0, expected at least 0 and less than 1"),
    ("--weight-decay -0.1", "--weight-decay is -0.1, expected at least 0"),
    ("--clip-grad 0", "--clip-grad is 0.0, expected more than 0"),
    ("--model-ema-decay 1", "expected at least 0 and less than 1"),
    ("--opt-betas 0.9", r"--opt-betas is [0.9], expected 2 numbers"),
    ("--input-size 224 x", "--input-size is 'x', expected a whole number"),
    ("--input-size 224 0", "--input-size is 0, expected at least 1"),
    ("--input-size 1 2 3", "'3' is not a flag"),
    ("--opt-betas 0.9 x", "--opt-betas is 'x', expected a number"),
    ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax is [0.8, 0.2], expected two rising numbers"),
    ("--opt adamx", "one of adamw, adam, nadamw, lamb, lion, sgd; did you mean 'adam'?"),
    ("--model vim_tny", "--model is 'vim_tny', expected a model of `fambav list models`; did you"),
    ("--model resnet50", "timm's own models are written timm/NAME"),
    ("--model timm/", "--model is 'timm/', expected a model"),
    ("--class-token midle", "one of middle, head, double, none; did you mean 'middle'?"),
    ("--bimamba-type v3", "--bimamba-type is 'v3', expected one of v2, v1, none"),
    ("--scan-backend fast", "--scan-backend is 'fast', expected one of"),
    ("--data-set CIFAR100", "did you mean 'CIFAR10'?"),
    ("--data-set cifar", "did you mean 'CIFAR'?"),
    ("--inat-category kind", "--inat-category is 'kind', expected one of kingdom"),
    ("--sched plateau", "--sched is 'plateau', expected cosine"),
    ("--device tpu", "--device is 'tpu', expected cpu, cuda or cuda:N"),
    ("--output_dir=", "--output_dir is '', expected a text that is not empty"),
    ("--resume https://host/x.pth", "expected a file on this machine; download it first"),
    # fusion
    ("--fusion-strategy uper", "did you mean 'upper'?"),
    ("--fusion-strategy upper --fusion-token -1", "--fusion-token is -1, expected at least 0"),
    ("--fusion-strategy upper --fusion-token 0", "is 0, expected at least 1 with --fusion-str"),
    ("--fusion-strategy upper --fusion-layer 0", "--fusion-layer is 0, expected at least 1"),
    ("--fusion-strategy all --fusion-layer 5", "with --fusion-strategy all, where it has no mean"),
    ("--fusion-layer 4", "is 4, expected none with --fusion-strategy none, which fuses nothing"),
    ("--fusion-token 8", "--fusion-token is 8, expected 0 with --fusion-strategy none"),
    ("--fusion-method ordered", "is 'ordered', expected 'famba-v' with --fusion-strategy none"),
    ("--fusion-strategy upper --fusion-method tome", "--fusion-method is 'tome', expected one of"),
    ("--fusion-plan 6:9 --fusion-strategy upper", "--fusion-plan is '6:9', expected none with"),
    ("--fusion-plan 6:9 --fusion-strategy none", "--fusion-plan is '6:9', expected none with"),
    ("--fusion-plan 6:9 --fusion-token 3", "--fusion-token is 3, expected 0 with --fusion-plan"),
    ("--fusion-plan 6:9,6:8", "expected layer:tokens pairs such as 6:9,8:9"),
    ("--fusion-plan 6", "expected layer:tokens pairs"),
    ("--fusion-plan 0:3", "expected layer:tokens pairs"),
    ("--fusion-plan 6:0", "expected layer:tokens pairs"),
    # what would change nothing
    ("--bi-merge", "--bi-merge is on, expected off; use --fusion-strategy"),
    ("--distillation-type mild", "is 'mild', expected one of none, soft, hard, kl"),
    ("--cosub", "--cosub is on, expected off"),
    ("--attn-only", "--attn-only is on, expected off"),
    ("--if_nan2num", "--if_nan2num is on, expected off"),
    ("--if_random_token_rank", "--if_random_token_rank is on, expected off"),
    ("--if-random-cls-token-position", "expected off; choose a place with --class-token"),
    ("--resplit", "--resplit is on, expected off"),
    ("--pretrained", "expected off; nothing is fetched; --finetune starts from a file of weights"),
    ("-c 3", "'-c' is not a flag, expected --name"),
    ("--opt-betas 0.9 0.95 -b x", "-b is 'x', expected a whole number"),
    ("--lr-noise 0.1 0.2", "--lr-noise is [0.1, 0.2], expected none; noise"),
    ("--start_epoch 3", "--start_epoch is 3, expected 0; --resume knows its epoch"),
    ("--decay-epochs 20", "--decay-epochs is 20.0, expected 30.0; only --sched cosine"),
    ("--model-ema-force-cpu", "expected off; the average stays"),
    ("--local-rank 1", "--local-rank is 1, expected 0; only a launcher sets it"),
    ("--world_size 4", "--world_size is 4, expected 1; use torchrun --nproc-per-node=N"),
    ("--distributed", "--distributed is on, expected off; use torchrun"),
    ("--dist_url tcp://x", "--dist_url is 'tcp://x', expected 'env://'"),
    ("--data-path x", "with --data-set DIGITS, which has no files; is that the set you mean?"),
    ("--data-set IMNET --download", "--download is on, expected off with --data-set IMNET"),
    ("--inat-category order", "--inat-category is 'order', expected 'name' with --data-set DIGITS"),
    ("--color-jitter 0.4", "expected none or 0.0 with --aa rand-m9-mstd0.5-inc1; --aa none leaves"),
    ("--src", "--src is on, expected off without --ThreeAugment"),
    ("--ThreeAugment --aa v0", "--aa is 'v0', expected none with --ThreeAugment"),
    ("--ThreeAugment --reprob 0.25", "--reprob is 0.25, expected 0.0 with --ThreeAugment"),
    ("--ThreeAugment --affine 5", "--affine is 5.0, expected 0.0 with --ThreeAugment"),
    ("--data-set INAT --download", "expected off with --data-set INAT, which is not fetched"),
    ("--reprob 0 --recount 2", "--recount is 2, expected 1 with --reprob 0"),
    ("--cutmix-minmax 0.2 0.8 --cutmix 0.5", "--cutmix is 0.5, expected 1.0 or 0.0 with --cut"),
    ("--mixup 0 --cutmix 0 --mixup-prob 0.5", "is 0.5, expected 1.0 or 0.0 with --mixup 0"),
    ("--mixup 0 --mixup-switch-prob 0.4", "with only one of --mixup and --cutmix"),
    ("--batch-size 5", "--batch-size is 5, expected an even number while mixup or cutmix is on"),
    ("--bce-loss", "--smoothing is 0.1, expected 0 with --bce-loss"),
    ("--momentum 0.8", "--momentum is 0.8, expected 0.9 or 0.0 with --opt adamw"),
    ("--opt sgd --opt-eps 1e-6", "--opt-eps is 1e-06, expected 1e-08 with --opt sgd"),
    ("--warmup-epochs 0 --warmup-lr 1e-5", "--warmup-lr is 1e-05, expected 1e-06 with"),
    ("--compile --cuda-graphs", "--cuda-graphs is on, expected off with --compile; take one of"),
    ("--model timm/x --cuda-graphs", "--cuda-graphs is on, expected off with --model timm/x"),
    ("--no_amp --amp-dtype fp16", "--amp-dtype is 'fp16', expected 'bf16' with --no_amp"),
    ("--no-model-ema --model-ema-decay 0.9", "expected 0.99996 with --no-model-ema"),
    ("--model timm/x --class-token head", "--class-token is 'head', expected 'middle' with --mo"),
    ("--model timm/x --fusion-strategy all", "is 'all', expected none with --model timm/x"),
    (
        "--model vmunet --data-set DIGITS",
        "--model is 'vmunet', expected a model for classification",
    ),
    ("--eval", "--eval has nothing to evaluate, expected --resume FILE"),
    ("--resume auto", "--resume is 'auto', expected --output_dir with it"),
    ("--resume a.pth --finetune b.pth", "--finetune is 'b.pth', expected no file beside --resume"),
    ("--config a.yaml --config", "--config has no value"),
    ("--config no/such.yaml", "config is 'no/such.yaml', expected a readable file; no such file"),
    ("--config .", "config is '.', expected a readable file; is a directory"),
]


def test_there_are_enough_malformed_command_lines():
    assert len(MALFORMED) >= 100


@pytest.mark.parametrize(("words", "message"), MALFORMED, ids=[words for words, _ in MALFORMED])
def test_a_wrong_command_line_is_refused_in_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        flat(*words.split())
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 400


BAD_YAML = [
    ("lr: 1e-3", "lr is '1e-3', expected a number; YAML needs a dot in 1.0e-3"),
    ("lr: abc", "lr is 'abc', expected a number"),
    ("lr: true", "lr is on, expected a number"),
    ("lr: null", "lr is none, expected a number"),
    ("lr: [1.0]", "lr is [1.0], expected a number"),
    ("epochs: 3.0", "epochs is 3.0, expected a whole number"),
    ("epochs: '3'", "epochs is '3', expected a whole number"),
    ("epochs: -3", "epochs is -3, expected at least 1"),
    (f"epochs: {'9' * 400}", f"epochs is {'9' * 77}..., expected a finite number"),
    ("model_ema: 1", "model_ema is 1, expected true or false"),
    ("model_ema: 'false'", "model_ema is 'false', expected true or false"),
    ("fusion_strategy: no", "fusion_strategy is off, expected a text; YAML reads a bare yes, no"),
    ("fusion_plan: 6:9", "fusion_plan is 369, expected a text; quote it"),
    ("output_dir: 2026-01-01", "expected a text; quote it"),
    ("opt_betas: 0.9", "opt_betas is 0.9, expected a list of numbers such as [0.9, 0.95]"),
    ("input_size: [224]", "input_size is [224], expected one number, or two: height and width"),
    ("input_size: [32, 4.5]", "input_size is 4.5, expected a whole number"),
    ("opt_betas: [0.9, x]", "opt_betas is 'x', expected a number"),
    ("opt_betas: [0.9]", "opt_betas is [0.9], expected 2 numbers"),
    ("batchsize: 3", "'batchsize' is not a setting; did you mean batch_size?"),
    ("batch-size: 3", "'batch-size' is not a setting; did you mean batch_size?"),
    ("ephocs: 3", "'ephocs' is not a setting; did you mean epochs?"),
    ("qqqq: 3", "'qqqq' is not a setting; see main.py --help"),
    ("3: 4", "3 is not a setting"),
    ("on: 4", "on is not a setting"),
    ("no_amp: true", "no_amp is not a setting; write amp: false"),
    ("amp: true\nif_amp: true", "if_amp sets amp twice, expected one of the two"),
    ("lr: 1.0\nlr: 2.0", "line 1 is not YAML; lr is given twice"),
    ("config: x.yaml", "'config' is not a setting"),
    ("model:\n  name: vim_tiny", "model is {'name': 'vim_tiny'}, expected a text"),
    ("bi_merge: true", "bi_merge is on, expected off"),
    ("mixup: 0\ncutmix: 0\nmixup_prob: 0.5", "mixup_prob is 0.5, expected 1.0 or 0.0 with"),
    ("dist_eval: false", "dist_eval is off, expected on"),
    ("- lr", "is a list, expected lines such as `lr: 0.001`"),
    ("lr", "is a str, expected lines such as `lr: 0.001`"),
    ("lr: [", "line 1 is not YAML"),
    ("lr: 1.0\n\tepochs: 3", "line 2 is not YAML"),
    ("lr: !!python/object:os.system x", "is not YAML; could not determine a constructor"),
    ("output_dir: 2026-19-99", "is not YAML; month must be in 1..12"),
    ("lr: \x00", "is not YAML; unacceptable character"),
    ("a: &a [*a, *a]", "'a' is not a setting"),
    (f"lr: {'[' * 800}", "is not YAML; maximum recursion"),
    (f"lr: {'9' * 400}", "expected a finite number"),
    ("base: 3", "base is 3, expected the path of a YAML file"),
    ("base: other.yaml", "expected a readable file; no such file"),
    ("base: run.yaml", "base is 'run.yaml', expected a file without a base of its own"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML, ids=range(len(BAD_YAML)))
def test_a_wrong_file_is_refused_in_one_line_that_names_it(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    shown = str(caught.value)
    assert message in shown
    assert str(tmp_path) in shown
    assert "\n" not in shown


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"lr: \xff\xfe")
    with pytest.raises(ConfigError, match=r"run.yaml is not YAML; 'utf-8' codec"):
        load(path)


def test_an_empty_file_changes_nothing(tmp_path):
    assert load(written(tmp_path, "# nothing\n")) == parse(RUN)


def test_flags_win_over_the_file_and_the_file_over_its_base(tmp_path):
    written(tmp_path, "lr: 0.1\nepochs: 10\nseed: 1\nmodel: vim_small\n", "base.yaml")
    path = written(tmp_path, "base: base.yaml\nepochs: 20\nseed: 2\n")
    run = parse(["--seed", "3", "--config", str(path)])
    assert (run.model.model, run.optim.lr, run.optim.epochs, run.run.seed) == (
        "vim_small",
        0.1,
        20,
        3,
    )


UPPER = "fusion_strategy: upper\nfusion_layer: 4\nfusion_token: 8\nfusion_method: ordered\n"
PLAN = "fusion_plan: '6:9,8:9'\nfusion_method: ordered\n"


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("", "--fusion-strategy upper", ("upper", 11, 7, "famba-v", None)),
        ("", "--fusion-strategy lower", ("lower", 11, 7, "famba-v", None)),
        ("", "--fusion-strategy all", ("all", None, 7, "famba-v", None)),
        ("", "--fusion-strategy alternate", ("interleaved", None, 7, "famba-v", None)),
        ("", "--fusion-plan 6:9", ("none", None, 0, "famba-v", "6:9")),
        (UPPER, "", ("upper", 4, 8, "ordered", None)),
        (UPPER, "--fusion-token 9", ("upper", 4, 9, "ordered", None)),
        (UPPER, "--fusion-strategy none", ("none", None, 0, "famba-v", None)),
        (UPPER, "--fusion-strategy no --fusion-token 0", ("none", None, 0, "famba-v", None)),
        (UPPER, "--fusion-strategy all", ("all", None, 8, "ordered", None)),
        (UPPER, "--fusion-strategy lower", ("lower", 4, 8, "ordered", None)),
        (UPPER, "--fusion-plan 6:9", ("none", None, 0, "ordered", "6:9")),
        (PLAN, "", ("none", None, 0, "ordered", "6:9,8:9")),
        (PLAN, "--fusion-strategy none", ("none", None, 0, "famba-v", None)),
        (PLAN, "--fusion-strategy all", ("all", None, 7, "ordered", None)),
        (PLAN, "--fusion-plan none", ("none", None, 0, "famba-v", None)),
        ("fusion_strategy: none\nfusion_token: 0\n", "--fusion-strategy upper",
         ("upper", 11, 7, "famba-v", None)),
    ],
)  # fmt: skip
def test_the_highest_level_decides_what_is_fused(tmp_path, text, words, expected):
    path = written(tmp_path, text)
    assert dataclasses.astuple(parse(["--config", str(path), *words.split()]).fusion) == expected


@pytest.mark.parametrize(
    ("base", "text", "words"),
    [
        ("", "fusion_token: 8", ""),
        ("", "fusion_strategy: none", "--fusion-token 8"),
        ("", UPPER, "--fusion-strategy none --fusion-token 8"),
        ("fusion_strategy: none", "fusion_layer: 4", ""),
        ("fusion_token: 8", "", ""),
        ("", PLAN, "--fusion-token 3"),
        ("", UPPER, "--fusion-strategy all --fusion-layer 3"),
        ("", "fusion_strategy: all\nfusion_layer: 3", ""),
        ("", "fusion_strategy: none\nfusion_plan: '6:9'", ""),
        ("", UPPER, "--model timm/deit_tiny_patch16_224"),
    ],
)
def test_a_fusion_setting_without_effect_at_the_deciding_level_is_refused(
    tmp_path, base, text, words
):
    written(tmp_path, base, "base.yaml")
    path = written(tmp_path, f"base: base.yaml\n{text}\n")
    with pytest.raises(ConfigError, match="expected"):
        parse(["--config", str(path), *words.split()])


def test_a_setting_of_the_file_that_a_flag_makes_meaningless_is_put_back(tmp_path):
    path = written(tmp_path, "data_set: CIFAR\ndata_path: x\nmodel_ema_decay: 0.9\nmixup: 0.5\n")
    words = "--data-set DIGITS --no-model-ema --mixup 0 --cutmix 0"
    resolved = parse(["--config", str(path), *words.split()]).flat()
    assert (resolved["data_path"], resolved["model_ema_decay"]) == ("datasets", 0.99996)


def test_one_level_of_base_is_the_limit(tmp_path):
    written(tmp_path, "lr: 0.1\n", "a.yaml")
    written(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="expected a file without a base of its own"):
        load(written(tmp_path, "base: b.yaml\n"))


ROUND = [
    "",
    "--fusion-strategy upper --fusion-layer 4 --fusion-token 8 --lr 1e-3 --unscale-lr",
    "--fusion-plan 6:9,8:9 --fusion-method ordered --opt-betas 0.9 0.95",
    "--data-set CIFAR --data-path ünïcode/päth --aa none --color-jitter 0.4 --no_amp",
    "--ThreeAugment --src --color-jitter 0.3 --mixup 0 --cutmix 0 --reprob 0 --batch-size 5",
    "--opt sgd --momentum 0.8 --no-model-ema --clip-grad 1 --cutmix-minmax 0.2 0.8",
    "--model timm/deit_tiny_patch16_224 --input-size 32 --warmup-epochs 0 --device cuda:1",
    "--output_dir no --resume auto --amp --amp-dtype fp16",
]


@pytest.mark.parametrize("words", ROUND)
def test_what_a_run_writes_is_read_as_the_same_run(tmp_path, words):
    run = parse([*RUN, *words.split()])
    path = written(tmp_path, run.to_yaml())
    assert load(path) == run
    assert parse(["--config", str(path)]) == run
    assert Config.from_flat(run.flat()) == run
    assert run.replace() == run
    assert run.replace(output_dir="elsewhere").run.output_dir == "elsewhere"


def test_a_resolved_run_may_be_given_another_strategy_by_flag(tmp_path):
    path = written(tmp_path, parse([*RUN, "--fusion-plan", "6:9"]).to_yaml())
    run = parse(["--config", str(path), "--fusion-strategy", "upper"])
    assert (run.fusion.fusion_plan, run.fusion.fusion_layer) == (None, 11)


def test_code_is_held_to_the_same_rules():
    with pytest.raises(ConfigError, match=r"lr is -1\.0, expected more than 0"):
        Config.from_flat({"lr": -1.0})
    with pytest.raises(ConfigError, match="'ephocs' is not a setting"):
        parse(RUN).replace(ephocs=3)


def test_every_setting_stands_in_one_group_only():
    groups = dataclasses.asdict(Config()).values()
    names = [name for group in groups if isinstance(group, dict) for name in group]
    assert len(names) == len(set(names)) == len(OPTIONS)
    assert not set(names) & ({*UNSUPPORTED} | {*LAUNCHER})


PLACES = {"output_dir", "resume", "finetune", "teacher_path", "eval", "data_path", "download"}
CONTINUED = {  # what may differ between a run and its continuation, besides places
    *("device", "num_workers", "gpu_augment", "threads", "pin_mem", "scan_backend", "compile"),
    *("cuda_graphs", "grad_checkpointing", "matmul_precision", "deterministic", "save_every"),
    *("if_continue_inf", "log_activations", "on_bad_image", "allow_world_size_change"),
}


def test_a_setting_says_what_it_affects():
    assert affecting("nothing") == PLACES | {"log_every", "extend", "tracker"}
    assert affecting("speed") == CONTINUED
    groups = vars(Config())
    built = {name for key in ("model", "fusion", "reduction") for name in vars(groups[key])}
    shown = {"eval_crop_ratio", "crop_size", "window_overlap", "eval_scales", "eval_flip"}
    assert affecting("model") == built - CONTINUED | shown
    assert affecting("nothing", "speed", "result", "model") == OPTIONS.keys()


def test_help_names_every_flag():
    text = help_text("main.py", "Train.")
    for option in OPTIONS.values():
        assert f"--{option.flag}" in text
        assert option.text in " ".join(text.split())
        assert not option.off or f"--{option.off}" in text
    assert all(f"--{option.flag}" in text for option in UNSUPPORTED.values())
    assert max(map(len, text.splitlines())) <= 100


SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "grids" not in path.parts)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_parses_and_round_trips(tmp_path, path):
    run = load(path)
    assert load(written(tmp_path, run.to_yaml())) == run


def test_without_model_config_or_data_set_the_digits_run_is_read():
    run = parse(["--epochs", "2"])
    assert run.notice == (
        "no --model, --config or --data-set: reading configs/digits/vim_micro_upper.yaml"
    )
    assert run == parse(["--config", str(SHIPPED_DIGITS), "--epochs", "2"])
    assert run.fusion.fusion_strategy == "upper"


SHIPPED_DIGITS = ROOT / "configs/digits/vim_micro_upper.yaml"


@pytest.mark.parametrize("words", [RUN, ["--data-set", "DIGITS"]])
def test_naming_a_model_or_a_data_set_never_switches_fusion_on(words):
    run = parse(words)
    assert (run.notice, run.fusion) == ("", type(run.fusion)())


def test_a_missing_default_file_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("fambav.config.config.CONFIGS", tmp_path / "configs")
    with pytest.raises(ConfigError, match=r"config is '.*upper.yaml', expected a readable file"):
        parse([])


@pytest.mark.parametrize("words", [["--modle", "x"], ["--lr", "abc"], ["--fusion-layer", "4"]])
def test_a_wrong_flag_is_refused_before_torch_is_imported(words):
    code = f"""
import sys
from fambav.cli import main
status = main({[*RUN, *words]!r})
print(status, [name for name in ("torch", "numpy", "timm") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


FILES = (
    "vim",
    "plainmamba",
    "vmamba",
    "vssd",
    "groupmamba",
    "vim2",
    "vmunet",
    "cvmh_unet",
    "tsm2",
    "forecaster",
)  # of models


def test_names_are_those_of_the_registries():
    import fambav.data
    import fambav.models
    import fambav.ops
    import fambav.reduction
    from fambav import registry
    from fambav.timm_compat import timm

    registered = (timm.list_models(module=module) for module in FILES)
    assert set(registry.MODELS) == {name for names in registered for name in names}
    assert set(registry.METHODS) == set(registry.REDUCERS.names())
    assert set(registry.DATA_SETS) == set(registry.BUILDERS.names())
    scans = {name for op, name, _ in fambav.ops.backends() if op == "selective_scan"}
    assert set(registry.SCAN_BACKENDS) == scans
    assert set(OPTIMIZERS) <= set(timm.optim.list_optimizers())
    assert not any(name.startswith("timm/") for name in registry.MODELS)


def test_every_setting_is_read_by_the_builder():
    from fambav.registry import FAMILIES

    read = {name for family in FAMILIES.values() for name in family.arguments}
    folders = (ROOT / "fambav" / name for name in ("training", "tasks", "data"))
    for path in (path for folder in folders for path in folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    kept = {"sched": "has one value", "crop_size": "becomes input_size"}
    assert set(OPTIONS) - read == set(kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_setting_of_the_optimizer_reaches_it_or_is_refused(name):
    import torch

    from fambav.engine import optim

    for setting, value in (("eps", 1e-4), ("betas", (0.5, 0.25)), ("momentum", 0.5)):
        flag = setting if setting == "momentum" else f"opt_{setting}"
        words = [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
        try:
            flat("--opt", name, *words)
        except ConfigError as error:
            assert f"with --opt {name}" in str(error)
        else:
            groups = optim.groups(torch.nn.Linear(2, 2), weight_decay=0.1)
            made = optim.optimizer(groups, name=name, lr=0.1, **{setting: value})
            assert made.defaults[setting] == value


OFF_WHERE_IT_IS_NOT = [  # flags, and what has no meaning there and is switched off all the same
    ("--data-set WAVES", "--mixup 0 --cutmix 0 --mixup-prob 0 --smoothing 0 --reprob 0 --aa none"),
    ("--data-set WAVES", "--hflip 0 --color-jitter 0 --no-repeated-aug --eval-crop-ratio 1"),
    ("--data-set SHAPES-SEG", "--mixup 0 --cutmix 0 --mixup-switch-prob 0 --eval-crop-ratio 1"),
    ("--data-set DIGITS", "--window-overlap 0 --resize-range 1 1 --vflip 0 --eval-scales 1"),
    ("--cutmix-minmax 0.2 0.8", "--cutmix 0"),
    ("--model vim_micro", "--no-distillation-head --no-dt-bias-twice"),
    ("--no-model-ema --opt adamw", "--no-model-ema-warmup --momentum 0"),
]


@pytest.mark.parametrize(("where", "off"), OFF_WHERE_IT_IS_NOT)
def test_what_is_not_there_may_be_switched_off(where, off):
    assert parse([*where.split(), *off.split()]) == parse(where.split())


@pytest.mark.parametrize("flag", ["mixup", "cutmix", "mixup-prob", "smoothing", "window-overlap"])
def test_what_is_not_there_may_not_be_switched_on(flag):
    with pytest.raises(
        ConfigError, match=rf"--{flag} is 0\.7, expected .*0\.0 with --data-set WAVES"
    ):
        parse(["--data-set", "WAVES", f"--{flag}", "0.7"])
