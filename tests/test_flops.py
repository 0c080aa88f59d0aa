"""What an image costs: published figures, and agreement with models that run."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fambav.models  # noqa: F401  registers the models and what their operators cost
from fambav import config, flops
from fambav.cli import console
from fambav.models.flops import FREE, Cost, alignment, carrying, total
from fambav.ops import force
from fambav.ops.flop_formulas import SCAN
from fambav.reduction import Reducer, reduce
from fambav.registry import (
    CLASSIFIERS,
    DATA_SETS,
    FAMILIES,
    METHODS,
    REDUCERS,
    family_of,
    models_of,
)
from fambav.timm_compat import timm

GIGA = 1e9
LINEAR = ("mm", "addmm", "bmm", "baddbmm", "convolution", "match")


def built(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def giga(cost, *digits):
    """Each convention's count in G, to so many digits behind the point."""
    return tuple(round(n / GIGA, d) for n, d in zip(cost, digits, strict=True))


def rows(report, part="layer"):
    return [row for row in report.rows if row.part == part]


@pytest.mark.parametrize(
    ("name", "literature", "directions", "products"),
    [
        ("vim_tiny", 1.449, 1.823, 1.293),
        ("vim_small", 5.077, 5.912, 4.851),  # published cut off: 5.076, and 18.867
        ("vim_base", 18.868, 20.886, 18.766),
    ],
)
def test_dense_vim_costs_what_is_published(name, literature, directions, products):
    report = flops.count(built(name))
    assert giga(report.total, 3, 3, 3) == (literature, directions, products)
    assert report.total == report.unreduced


def test_overlapping_patches_cost_what_is_published():
    tiny, small = (
        flops.count(built(f"vim_{name}_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed"
                          "_with_midclstok_div2"))
        for name in ("tiny", "small")
    )  # fmt: skip
    assert giga(tiny.total, 2, 2, 2)[1:] == (6.75, 4.79)
    assert giga(small.total, 2, 2, 2)[1:] == (21.91, 17.98)


@pytest.mark.parametrize(
    ("name", "removed", "published"),
    [("vim_tiny", 5, 1.284), ("vim_small", 11, 3.584), ("vim_base", 11, 13.207)],
)
def test_merging_before_every_second_block_costs_what_its_paper_says(name, removed, published):
    places = ",".join(f"{layer}:{removed}" for layer in range(3, 24, 2))
    report = flops.count(built(name, fusion_plan=places, fusion_method="ordered"))
    assert giga(report.total, 3, 3, 3)[0] == published


@pytest.mark.parametrize(
    ("strategy", "tiny", "small"),
    [
        (("all", None, 7), (0.731, 1.026), (2.722, 3.311)),
        (("interleaved", None, 14), (0.754, 1.058), (2.807, 3.415)),
        (("upper", 6, 9), (0.836, 1.174), (3.117, 3.794)),
        (("upper", 7, 9), (0.881, 1.239), (3.291, 4.006)),
        (("lower", 19, 9), (0.607, 0.850), (2.251, 2.736)),
        (("lower", 18, 9), (0.621, 0.870), (2.305, 2.803)),
    ],
)
def test_fused_vim_costs_what_is_known_beside_its_matching(strategy, tiny, small):
    name, layer, token = strategy
    fusion = dict(fusion_strategy=name, fusion_layer=layer, fusion_token=token)
    for model, want in (("vim_tiny", tiny), ("vim_small", small)):
        report = flops.count(built(model, num_classes=100, **fusion))
        rest = total(*(row.own for row in report.rows))
        assert (giga(rest, 3, 3, 3)[2], giga(rest, 3, 3, 3)[1]) == want


@pytest.mark.parametrize(
    ("name", "schedule", "token_layers", "share"),
    [
        ("vim_tiny", "tokens:157,125@10,20", 688, 14.3),
        ("vim_small", "tokens:157,125,101@5,10,15", 1424, 29.8),
    ],
)
def test_pruning_after_a_layer_saves_the_published_share(name, schedule, token_layers, share):
    report = flops.count(reduce(built(name), "ordered", schedule, hook="after"))
    assert sum(197 - row.tokens for row in rows(report)) == token_layers
    own = total(*(row.own for row in report.rows)).literature
    assert round(100 * (1 - own / report.unreduced.literature), 1) == share


@pytest.mark.parametrize(
    ("arguments", "branches", "scans"), [("v2", 2, 2), ("v1", 1, 2), ("none", 1, 1)]
)
def test_every_mixer_counts_what_it_has(arguments, branches, scans):
    report = flops.count(built("vim_micro", bimamba_type=arguments))
    length, dim, inner, rank, state = 65, 64, 128, 4, 16
    branch = length * inner * (4 + 2 * rank + 2 * state)
    scan = length * inner * (9 * state + 2)
    products = 3 * length * dim * inner + branches * branch
    layer = rows(report)[0].own
    assert layer.multiply_adds == products
    assert layer.all_directions == products + scans * scan
    assert layer.literature == 3 * length * dim * inner + branch + 3 * inner * 4 + scan


@pytest.mark.parametrize(("kind", "tokens"), [("middle", 65), ("double", 66), ("none", 64)])
def test_class_tokens_are_tokens(kind, tokens):
    report = flops.count(built("vim_micro", class_token=kind))
    assert {row.tokens for row in rows(report)} == {report.start} == {tokens}


def test_size_stride_and_classes_are_counted():
    model = built("vim_micro", img_size=(40, 24), patch_size=8, stride=4, num_classes=7)
    patches, head = flops.count(model).rows[0], flops.count(model).rows[-1]
    assert patches.tokens == 9 * 5
    assert patches.own == Cost.of_products(9 * 5 * 3 * 64 * 64)
    assert head.own == Cost.of_products(7 * 64)
    assert flops.count(built("vim_micro", num_classes=0)).rows[-1].own == FREE


@pytest.mark.parametrize("fusion", [{}, {"fusion_strategy": "upper", "fusion_token": 8}])
@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
def test_a_model_that_runs_does_these_operations(kind, fusion):
    if fusion:
        fusion["fusion_layer"] = 4
    model = timm.create_model("vim_micro", bimamba_type=kind, **fusion).eval()
    report = flops.count(model)
    batch, inner, state, scans = 2, 128, 16, 1 if kind == "none" else 2
    with torch.no_grad(), force("cpu"), FlopCounterMode(display=False) as counter:
        model(torch.randn(batch, 3, 32, 32))
    found = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    lengths = [row.tokens for row in rows(report)]
    steps = SCAN * scans * inner * state * sum(lengths)
    other = sum(n for op, n in found.items() if "norm" in op or "pool" in op)
    linear = sum(found.values()) / batch - steps - other / batch
    assert linear == 2 * report.total.multiply_adds
    assert report.total.all_directions > report.total.multiply_adds


@pytest.mark.parametrize(
    ("name", "published", "patches"),
    [("l1", 3.01, 0.73), ("l2", 8.07, 1.35), ("l3", 14.43, 1.40)],
)
def test_plain_mamba_costs_what_is_published(name, published, patches):
    report = flops.count(built(f"plainmamba_{name}"))
    assert giga(report.total, 2, 2, 2)[:2] == (published, published)
    assert giga(report.rows[0].own, 2, 2, 2)[0] == patches
    first, second = rows(report)[:2]
    convolution = 196 * 192 * 9 if name == "l1" else 0
    assert first.own.multiply_adds - second.own.multiply_adds == convolution


@pytest.mark.parametrize(
    ("method", "published"), [("evit", 8.4), ("prune-aligned", 8.4), ("storm", 9.74)]
)
def test_a_reduced_plain_mamba_costs_about_what_is_published(method, published):
    model = reduce(built("plainmamba_l3", param_order="permuted"), method)
    own = total(*(row.own for row in flops.count(model).rows)).literature
    assert own / GIGA == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *models_of("segmentation")])
def test_torch_counts_the_same_products_of_every_model_on_the_meta_device(name):
    deep = {"depths": (1, 1, 1, 2)} if family_of(name).staged else {"depth": 2}
    # Torch counts no product over a width of one, as step sizes of narrow maps are.
    if family_of(name).tasks == ("segmentation",):
        deep["dims"] = (32, 64, 96, 128)
    elif family_of(name) is FAMILIES["groupmamba"]:  # whose mixers have a quarter of the width
        deep["dims"] = (128, 192, 256, 320)
    model = built(name, **deep, num_classes=7).eval()
    images = torch.empty(1, 3, *model.img_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    found = counter.get_flop_counts()["Global"].items()
    products = sum(n for op, n in found if str(op).split(".")[-1] in LINEAR)
    assert products == 2 * flops.count(model).total.multiply_adds


@pytest.mark.parametrize("name", models_of("forecasting"))
def test_torch_counts_the_same_products_of_a_forecast(name):
    flags = ["--model", name, "--data-set", "ETTh1", "--lookback", "64", "--horizon", "24"]
    report = flops.count_config(config.parse(flags))
    assert (report.input_size, report.num_classes, report.forecast) == ((64, 7), 24, True)
    title, *_ = report.table().render("text").splitlines()
    assert "64 rows of 7 variates, 24 rows ahead: " in title
    with torch.device("meta"):
        model = timm.create_model(name, lookback=64, horizon=24).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 64, 7, device="meta"))
    found = counter.get_flop_counts()["Global"].items()
    products = sum(n for op, n in found if str(op).split(".")[-1] in LINEAR)
    assert products == 2 * report.total.multiply_adds
    assert flops.count(model).total.multiply_adds < report.total.multiply_adds, "of one variate"


def test_a_series_of_unknown_variates_is_refused():
    run = config.parse(["--model", "dlinear", "--data-set", "CSV", "--data-path", "x.csv"])
    with pytest.raises(
        ValueError, match="data_set is 'CSV', expected one of known variates: WAVES"
    ):
        flops.count_config(run)


@pytest.mark.parametrize("schedule", [None, "list:0,20"])
def test_a_plain_mamba_that_runs_does_these_operations(schedule):
    model = timm.create_model("plainmamba_micro", num_classes=5).eval()
    if schedule:
        reduce(model, "ordered", schedule)
    report = flops.count(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32))
    found = counter.get_flop_counts()["Global"].items()
    linear = sum(n for op, n in found if str(op).split(".")[-1] in LINEAR)
    assert linear == 2 * report.total.multiply_adds


def test_plain_mamba_convolves_tokens_that_form_no_grid_on_the_first_grid():
    model = reduce(built("plainmamba_l1", dim=64, depth=3, dwconv=False), "ordered", "list:0,40")
    first, second, third = rows(flops.count(model))
    length, inner, dim, rank, state = 156, 128, 64, 4, 16
    linear = length * inner * (3 * dim + 2 * rank + 2 * state)
    assert second.own.multiply_adds == third.own.multiply_adds == linear + 196 * inner * 49
    assert second.tokens == third.tokens == length
    assert first.tokens == 196


class TopRow(Reducer):
    """Takes away the first row of the grid."""

    name = "top-row"

    def select(self, tokens, count):
        raise AssertionError("nothing runs here")

    @staticmethod
    def limit(length, cls_index):
        return length - 1

    @staticmethod
    def grid_after(grid, count):
        return None if grid is None or count != grid[1] else (grid[0] - 1, grid[1])


@pytest.fixture
def top_row(monkeypatch):
    monkeypatch.setitem(REDUCERS._builders, "top-row", TopRow)


@pytest.mark.parametrize(
    ("hook", "cells"),
    [("before", (196, 182, 168, 196, 196)), ("after", (196, 196, 182, 168, 196))],
)
def test_convolutions_of_tokens_that_form_a_grid_run_on_that(top_row, monkeypatch, hook, cells):
    monkeypatch.setitem(flops.OVERHEADS._builders, "top-row", lambda _: FREE)
    model = built("plainmamba_l1", dim=64, depth=5, dwconv=False)
    report = flops.count(reduce(model, "top-row", "list:0,14,14,3", hook=hook))
    linear = 128 * (3 * 64 + 2 * 4 + 2 * 16)
    for row, n in zip(rows(report), cells, strict=True):
        assert row.own.multiply_adds == row.tokens * linear + n * 128 * 49
    assert report.reduction == FREE


def test_a_method_of_unknown_cost_is_counted_without_and_named(top_row):
    report = flops.count(reduce(built("vim_micro"), "top-row", "list:0,2"))
    assert report.reduction == FREE
    assert "what choosing costs top-row is not known, and not counted" in report.table().render(
        "text"
    )
    assert report.total.literature < report.unreduced.literature
    known = flops.count(reduce(built("vim_micro"), "random", "list:0,2"))
    assert "not known" not in known.table().render("text")


def test_the_parts_add_up_to_the_total():
    report = flops.count(
        built("vim_micro", fusion_strategy="upper", fusion_layer=3, fusion_token=9)
    )
    parts = [cost for row in report.rows for cost in (row.own, row.alignment, row.reduction)]
    assert report.total == total(*parts)
    assert [row.layer for row in rows(report)] == [1, 2, 3, 4, 5, 6]


def test_only_layers_that_reduce_pay_for_it():
    report = flops.count(built("vim_micro", fusion_strategy="interleaved", fusion_token=5))
    for row in report.rows:
        assert bool(row.removed) == (row.reduction != FREE)
        assert row.alignment == FREE
    second = rows(report)[1]
    elementwise = 6 * 65 * 64 + 5 * 64
    assert second.reduction.literature == elementwise + 2 * 64 * 65**2 // 4
    assert second.reduction.multiply_adds == 64 * 32 * 33


def test_masked_tokens_save_nothing():
    model = reduce(built("vim_micro"), "ordered", "r:5", scan="masked")
    report = flops.count(model)
    assert [row.tokens for row in rows(report)] == [65] * 6
    assert total(*(row.own for row in report.rows)) == report.unreduced
    assert report.reduction != FREE


def test_alignment_is_paid_by_every_layer_behind_the_first_tokens_that_went():
    model = reduce(
        built("vim_micro"), "ordered", "list:0,0,5,0,3", scan="aligned", gap_policy="self"
    )
    found = rows(flops.count(model))
    assert [row.alignment for row in found] == [
        FREE,
        FREE,
        *(Cost(2 * n * 128, 2 * 2 * n * 128) for n in (60, 60, 57, 57)),
    ]
    model = reduce(
        built("vim_micro"), "ordered", "list:0,0,5,0,3", scan="aligned", gap_policy="cached"
    )
    kept = rows(flops.count(model))
    assert kept[2].alignment == Cost(60 * 128, 2 * 60 * 128)
    assert kept[2].reduction.literature - found[2].reduction.literature == 2 * 5 * 128
    report = flops.count(model)
    whole = total(*(row.own for row in report.rows), report.reduction, report.alignment)
    assert report.total == whole
    assert "alignment" in report.table().render("text")
    model = reduce(
        built("vim_micro"), "ordered", "list:0,0,5,0,3", scan="aligned", gap_policy="none"
    )
    assert flops.count(model).alignment == FREE


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_cost(name):
    sizes = flops.Overhead(length=65, removed=9, dim=64, inner=128, directions=2, published=1)
    found = flops.OVERHEADS[name](sizes)
    assert found.all_directions >= found.literature >= 2 * found.multiply_adds >= 0
    assert (found == FREE) == (name == "random")


def test_without_gaps_nothing_is_aligned():
    sizes = flops.Overhead(length=65, removed=9, dim=64, inner=128, directions=2, published=1)
    assert alignment(56, sizes, "none") == carrying(sizes, "none") == FREE
    assert carrying(sizes, "bias") == FREE


def test_the_table_joins_equal_layers_and_shows_shares():
    flags = "--model vim_tiny --data-set CIFAR --fusion-strategy upper --fusion-layer 23"
    report = flops.count_config(config.parse([*flags.split(), "--fusion-token", "9"]))
    title, _, head, *body = report.table().render("text").splitlines()
    assert title == (
        "vim_tiny, 224 x 224 pixels, 100 classes: 197 tokens, famba-v removes 18, compact scan"
    )
    assert head.split() == ["part", "tokens", "removed", *flops.CONVENTIONS]
    shown = {line[:18].strip(): line.split() for line in body if line}
    assert list(shown)[:9] == [
        "patches",
        "layers 1-22",
        "layer 23",
        "layer 24",
        "reduction",
        "head",
        "total",
        "without reduction",
        "share left",
    ]
    whole = sum(float(shown[part][-3]) for part in list(shown)[:6])
    assert whole == pytest.approx(float(shown["total"][-3]), abs=6e-4)
    assert shown["without reduction"][-3:] == ["1.4488", "1.8227", "1.2925"]
    assert shown["share left"][-3].endswith("%")


def test_small_models_are_shown_in_millions():
    text = flops.count(built("vim_micro")).table().render("text")
    assert "in M (1e6) operations" in text
    assert "reduction" not in text


def test_markdown_has_the_cells_of_the_table():
    report = flops.count(built("vim_micro", fusion_strategy="all", fusion_token=3))
    lines = [
        line for line in report.table().render("markdown").splitlines() if line.startswith("|")
    ]
    text = [line for line in report.table().render("text").splitlines()[2:] if line][
        : len(lines) - 1
    ]
    for shown, line in zip([lines[0], *lines[2:]], text, strict=True):
        assert shown.replace("|", " ").split() == line.split()


def test_json_has_every_number():
    report = flops.count(built("vim_micro", fusion_strategy="all", fusion_token=3))
    figures = json.loads(report.json())
    assert figures["total"] == dict(zip(flops.CONVENTIONS, report.total, strict=True))
    assert figures["conventions"] == flops.CONVENTIONS
    assert (figures["method"], figures["start"], figures["num_classes"]) == ("famba-v", 65, 1000)
    assert [row["layer"] for row in figures["rows"]] == [None, 1, 2, 3, 4, 5, 6, None]
    for name in flops.CONVENTIONS:
        parts = sum(
            row[p][name] for row in figures["rows"] for p in ("own", "reduction", "alignment")
        )
        assert parts == figures["total"][name]


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("SHAPES-SEG", 11),
        ("POTSDAM", 6),
        ("ADE20K", 150),
        ("DIGITS", 10),
        ("SHAPES100", 100),
        ("CIFAR", 100),
        ("CIFAR10", 10),
        ("IMNET", 1000),
    ],
)
def test_the_head_has_the_classes_of_the_data_set(name, classes):
    model = "vim_micro" if DATA_SETS[name] == "classification" else "vmunet_nano"
    flags = ["--model", model, "--data-set", name]
    assert flops.count_config(config.parse(flags)).num_classes == classes
    given = flops.count_config(config.parse([*flags, "--num-classes", "3"]))
    assert given.num_classes == 3


def test_models_of_others_are_refused():
    with pytest.raises(ValueError, match="model is a Linear, expected one of `fambav list models`"):
        flops.count(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'timm/resnet10t', expected one of `fambav list models`"):
        flops.count_config(config.parse(["--model", "timm/resnet10t"]))


def test_unknown_classes_are_refused():
    run = config.parse(["--model", "vim_micro", "--data-set", "FOLDER"])
    with pytest.raises(ValueError, match="num_classes is None, expected a number with data_set FO"):
        flops.count_config(run)


def test_the_command_prints_a_table_and_writes_json(capsys, tmp_path):
    target = tmp_path / "costs.json"
    words = ["flops", "--json", str(target), "--model", "vim_micro", "--data-set", "CIFAR"]
    assert console(words) == 0
    assert capsys.readouterr().out.startswith("vim_micro, 32 x 32 pixels, 100 classes: 65 tokens")
    assert json.loads(target.read_text())["num_classes"] == 100
    assert console([*words, "--markdown"]) == 0
    assert "| part | tokens | removed | literature |" in capsys.readouterr().out


def test_the_command_says_which_settings_it_reads_by_itself(capsys):
    assert console(["flops"]) == 0
    notice, title, *_ = capsys.readouterr().out.splitlines()
    assert "reading configs/digits/vim_micro_upper.yaml" in notice
    assert title.startswith("vim_micro, 32 x 32 pixels, 10 classes")
