"""When a setting means anything: conditions that fields of `schema` carry as `when`.

A flag that would change nothing is refused: a run ignores no setting.
"""

from __future__ import annotations

from fambav.config.setting import When
from fambav.registry import DATA_SETS, LIBRARY_HEADS, MADE, UNREDUCED, family_of

IN_MEMORY = ("DIGITS", "SHAPES100", "CIFAR", "CIFAR10")  # data sets that are held there
FETCHED = ("CIFAR", "CIFAR10")
INAT = ("INAT", "INAT19")
FOLDERS = ("IMNET", "FOLDER", *INAT, "SEGFOLDER", "ADE20K", "COCO")
DENSE = ("segmentation", "detection")  # tasks for which a backbone gets a head of `registry`


def _taken(setting: str, lacking: str = "") -> When:
    """Return when a model takes a setting; `lacking` is added where it does not."""
    why = f"with --model {{model}}{lacking}"
    return When("model", lambda name: setting in family_of(name).arguments, why)


OURS = When("model", lambda name: family_of(name).layers, "with --model {model}")
SCANNING = When("model", lambda name: family_of(name).scan, "with --model {model}")
REDUCIBLE = When(
    "model",
    lambda name: family_of(name).reducible,
    f"with --model {{model}}, {UNREDUCED}",
)
DROP_PATH = _taken("drop_path", ", which skips no layer")
VIM = _taken("stride")
CLASS_TOKEN = _taken("class_token", ", which has none to place")
PLAINMAMBA = _taken("param_order", ", which has one form")
TWO_HEADS = _taken("distillation_head", ", which has one head")
DROPOUT = _taken("drop", ", which has no dropout")
SERIES = When(
    "data_set",
    lambda name: DATA_SETS[name] == "forecasting",
    "with --data-set {data_set}, which is no time series",
)
IMAGES = When(
    "data_set",
    lambda name: DATA_SETS[name] != "forecasting",
    "with --data-set {data_set}, which has no images",
)
CLASSES = When(
    "data_set",
    lambda name: DATA_SETS[name] == "classification",
    "with --data-set {data_set}, which has no classes of images",
)
MASKS = When(
    "data_set",
    lambda name: DATA_SETS[name] == "segmentation",
    "with --data-set {data_set}, which has no masks",
)
BOXES = When(
    "data_set",
    lambda name: DATA_SETS[name] == "detection",
    "with --data-set {data_set}, which has no boxes",
)
ONE_SHAPE = When(
    "data_set",
    lambda name: DATA_SETS[name] != "detection",
    "with --data-set {data_set}: regions differ in number from image to image",
)
HEADED = When(
    "model data_set",
    lambda model, name: DATA_SETS[name] in DENSE and DATA_SETS[name] != family_of(model).tasks[0],
    "with --model {model} and --data-set {data_set}: no backbone gets a head that labels pixels or "
    "finds boxes",
)
WIDE_HEAD = When(
    "head",
    lambda name: name not in LIBRARY_HEADS,
    "with --head {head}, which has widths of its own",
)
DROPPED = When(
    "data_set",
    lambda name: DATA_SETS[name] not in DENSE,
    "with --data-set {data_set}, for which heads have rates of their own",
)
NOT_COMPILED = When("compile", lambda on: not on, "with --compile; take one of both")
EAGER = When(
    "compile cuda_graphs",
    lambda *on: not any(on),
    "with --compile or --cuda-graphs, which leave no place to look",
)
REDUCED = When("reduction", lambda method: method != "none", "without --reduction")
FUSED = When(
    "fusion_strategy fusion_plan",
    lambda strategy, plan: strategy != "none" or plan is not None,
    "with --fusion-strategy none, which fuses nothing",
)
UNPLANNED = When(
    "fusion_plan",
    lambda plan: plan is None,
    "with --fusion-plan, which has layers and tokens of its own",
)
ONE_ENDED = When(
    "fusion_strategy",
    lambda strategy: strategy in ("none", "lower", "upper"),
    "with --fusion-strategy {fusion_strategy}, where it has no meaning",
)
IMAGE_FILES = When(
    "data_set", FOLDERS.__contains__, "with --data-set {data_set}, which has no image files"
)
STORED = When(
    "data_set",
    lambda name: name not in MADE,
    "with --data-set {data_set}, which has no files; is that the set you mean?",
)
FETCHABLE = When(
    "data_set", FETCHED.__contains__, "with --data-set {data_set}, which is not fetched"
)
INATURALIST = When("data_set", INAT.__contains__, "with --data-set {data_set}")
RESIDENT = When(
    "data_set",
    IN_MEMORY.__contains__,
    "with --data-set {data_set}, whose images are read one by one; "
    f"{', '.join(IN_MEMORY)} are held in memory",
)
ON_DEVICE = When(
    "aa three_augment",
    lambda aa, _: (aa or "rand").startswith("rand"),
    "with --aa {aa}; rand-*, such as rand-m9-mstd0.5-inc1, none and --ThreeAugment are offered on "
    "the device",
)
THREE = When("three_augment", bool, "without --ThreeAugment")
NOT_THREE = When("three_augment", lambda on: not on, "with --ThreeAugment")
NO_POLICY = When(
    "aa three_augment", lambda aa, _: aa is None, "with --aa {aa}; --aa none leaves room for it"
)
ERASING = When("reprob three_augment", lambda share, _: share > 0, "with --reprob 0")
NO_SPAN = When(
    "cutmix_minmax", lambda span: span is None, "with --cutmix-minmax, which replaces it"
)
MIXING = When("mixup cutmix cutmix_minmax", lambda *on: any(on), "with --mixup 0 --cutmix 0")
BOTH_MIXES = When(
    "mixup cutmix cutmix_minmax",
    lambda mixup, *boxes: mixup and any(boxes),
    "with only one of --mixup and --cutmix",
)
SGD = When(
    "opt",
    lambda name: name == "sgd",
    "with --opt {opt}; its --opt-betas are what momentum is to sgd",
)
BETAS = When("opt", lambda name: name != "sgd", "with --opt sgd")
EPSILON = When("opt", lambda name: name not in ("sgd", "lion"), "with --opt {opt}")
WARM_UP = When("warmup_epochs", bool, "with --warmup-epochs 0")
AMP = When("amp", lambda on: on is not False, "with --no_amp")
AVERAGED = When("model_ema", bool, "with --no-model-ema")
TAUGHT = When(
    "distillation_type",
    lambda kind: kind != "none",
    "without --distillation-type, so that there is no teacher",
)
SOFT = When(
    "distillation_type", lambda kind: kind == "soft", "with --distillation-type {distillation_type}"
)
MESA = When(
    "distillation_type", lambda kind: kind == "mesa", "with --distillation-type {distillation_type}"
)
NOT_MESA = When(
    "distillation_type",
    lambda kind: kind != "mesa",
    "with --distillation-type mesa, whose teacher is the moving average",
)
RESUMED = When("resume", bool, "without --resume")
