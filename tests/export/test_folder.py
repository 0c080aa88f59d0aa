"""An exported folder is whole, tells only what is known, and gives back the model."""

import json

import pytest
import torch
import yaml

import fambav
from fambav.commands import export as command
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError
from fambav.export import FORMATS, export, folder
from fambav.timm_compat import timm
from tests.export.made import NAMES, weights

UPPER = dict(fusion_strategy="upper", fusion_layer=4, fusion_token=9)
SMALL = dict(input_size=16, reduction="prune-aligned", reduction_schedule="r:2@3-6")


@pytest.fixture
def run(tmp_path):
    """A run folder with a checkpoint of its last epoch of two."""
    path = tmp_path / "run"
    path.mkdir()
    weights(path / "checkpoint.pth", **UPPER)
    epochs = [dict(epoch=n, test_acc1=50.0 + n, test_acc5=90.0 + n) for n in range(2)]
    (path / "log.txt").write_text("".join(json.dumps(e) + "\n" for e in epochs))
    about = dict(started="2026-01-02T03:04:05+0000", commit="abc123", cpu_count=2, threads=1)
    (path / "env.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "hf"])
@pytest.mark.parametrize("settings", [UPPER, SMALL, {"model": "plainmamba_micro"}])
def test_a_folder_gives_back_the_model_bit_by_bit(kind, settings, tmp_path):
    net = weights(tmp_path / "weights.pth", **settings)
    check = export(tmp_path / "weights.pth", kind, tmp_path / "out", images=2, noise=True)
    assert (check.difference, check.agreeing, check.images) == (0, 2, 2)
    found = fambav.from_pretrained(tmp_path / "out")
    assert not found.training
    assert found.schedule == net.schedule
    told = found.pretrained_cfg
    assert (told["mean"], told["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert told["label_names"] == NAMES
    stored = checkpoint.load(tmp_path / "out" / "model.safetensors")["metadata"]
    assert json.loads(stored["grid"]) == list(net.grid)
    images = torch.randn(2, *told["input_size"])
    assert torch.equal(found(images), net(images))


def test_a_compressed_file_is_less_than_half_as_large_and_rounded_to_float16(tmp_path):
    net = weights(tmp_path / "weights.pth", fusion_strategy="none")
    check = export(tmp_path / "weights.pth", "pth", tmp_path / "out", images=4, noise=True)
    assert 0 < check.difference < 5e-3
    stored, found = tmp_path / "out" / "model.pth", fambav.from_pretrained(tmp_path / "out")
    assert stored.stat().st_size < 0.5 * (tmp_path / "weights.pth").stat().st_size
    for name, value in torch.load(stored, weights_only=True)["model"].items():
        assert torch.equal(value, net.state_dict()[name].half())
        assert torch.equal(found.state_dict()[name], value.float())
    with pytest.raises(ValueError, match=r"export differs .* --tolerance allows more"):
        exact = dict(images=4, noise=True, tolerance=1e-7)
        export(tmp_path / "weights.pth", "pth", tmp_path / "exact", **exact)
    assert not (tmp_path / "exact").exists()


STAGED = dict(model="vssd_nano", reduction="tome", reduction_schedule="r:8@1.1")
PLAN = dict(class_token="none", fusion_strategy="none", fusion_plan="4:9,6:2")


@pytest.mark.parametrize("settings", [UPPER, SMALL, STAGED, PLAN, {"model": "plainmamba_micro"}])
def test_timm_builds_the_model_of_a_folder(settings, tmp_path):
    net = weights(tmp_path / "weights.pth", **settings)
    export(tmp_path / "weights.pth", "hf", tmp_path / "out", images=1, noise=True)
    images = torch.randn(2, *net.pretrained_cfg["input_size"])
    built = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(built(images), net(images))
    model_args = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    timm.models.save_for_hf(built, tmp_path / "again", model_args=model_args)
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert torch.equal(again(images), net(images))


def test_held_out_images_are_compared(run, tmp_path):
    check = export(run, "safetensors", tmp_path / "out", images=3)
    assert check.line().startswith(
        "3 held-out samples of DIGITS: largest difference of an output 0 "
    )


def test_the_description_alone_is_enough_to_build_the_model(run, tmp_path):
    from safetensors.torch import load_file, save_file

    export(run, "hf", tmp_path / "out", images=1, noise=True)
    bare = tmp_path / "out" / "model.safetensors"
    save_file(load_file(bare), bare)  # without what stands beside the weights
    found = fambav.from_pretrained(tmp_path / "out")
    assert found.schedule.counts == (0, 0, 0, 9, 9, 9)
    assert found.pretrained_cfg["label_names"] == NAMES


def test_the_card_says_what_the_run_says(run, tmp_path):
    export(run, "hf", tmp_path / "out", images=1, noise=True)
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, card = text.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["license"] == "apache-2.0"
    assert told["datasets"] == ["digits"]
    assert told["model-index"][0]["results"][0]["metrics"][0]["value"] == 51.0
    for known in (
        "51.00%",
        "91.00%",
        "abc123",
        "2026-01-02T03:04:05+0000",
        "2 of 300",
        "| 4 | 9 |",
    ):
        assert known in card, known
    assert "fambav.from_pretrained('out')" in card
    assert "literature" in card


def test_the_card_believes_the_history_of_a_checkpoint_and_not_the_log(run, tmp_path):
    path, records = run / "checkpoint.pth", [dict(epoch=0, test_acc1=40.5, test_acc5=80.5)]
    checkpoint.save(path, {**checkpoint.load(path), "epoch": 0, "history": records})
    export(run, "hf", tmp_path / "out", images=1, noise=True)
    about = json.loads((tmp_path / "out" / "config.json").read_text())["fambav"]["run"]
    assert (about["epoch"], about["acc1"], about["acc5"]) == (1, 40.5, 80.5)


def test_a_log_that_is_damaged_is_refused_in_one_line(run, tmp_path):
    log = run / "log.txt"
    log.write_text("{" + log.read_text())
    with pytest.raises(ValueError, match=r"^[^\n]*log\.txt: line 1 is damaged[^\n]*$"):
        export(run, "hf", tmp_path / "out", images=1, noise=True)


def test_the_card_of_bare_weights_invents_nothing(tmp_path):
    weights(tmp_path / "weights.pth")
    export(tmp_path / "weights.pth", "hf", tmp_path / "out", images=1, noise=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| top-1 on the held-out samples of DIGITS | not measured |" in text
    assert "model-index" not in text
    assert text.count("unknown") == 5, "seed, epoch, date, commit, hardware"


def test_an_export_that_differs_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    def wrong(place):
        assert (place / "model.safetensors").is_file()
        return lambda images: fambav.from_pretrained(run)(images) + 1e-2

    broken = FORMATS["safetensors"]._replace(load=wrong)
    monkeypatch.setitem(folder.FORMATS, "safetensors", broken)
    with pytest.raises(ValueError, match=r"differs on 2 of 2 inputs of noise.*nothing was kept"):
        export(run, "safetensors", tmp_path / "out", images=2, noise=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export(run, "safetensors", tmp_path / "out", images=2, noise=True, tolerance=0.1)


def chooses(images):
    """Logits that jump where the mean of an image passes a half."""
    return torch.stack([(images.mean((1, 2, 3)) > 0.5).float(), images.amax((1, 2, 3))], dim=1)


def test_rounding_that_decides_a_near_tie_is_told_and_not_refused():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.2, 0.5, 0.9)])
    want = chooses(images)
    got = want.clone()
    got[1, 0] = 1.0
    assert folder._steady(chooses, images, want, 1e-3).tolist() == [True, False, True]
    given = dict(kind="images", tolerance=1e-3, seconds=1.0)
    check = folder._compare(chooses, images, want, got, **given)
    assert (check.images, check.ties, check.difference) == (3, 1, 0.0)
    assert "but for 1 with a near tie between tokens, same top-1 on" in check.line()
    got[2, 0] += 0.1
    with pytest.raises(ValueError, match="export differs on 1 of 3 images"):
        folder._compare(chooses, images, want, got, **given)
    with pytest.raises(ValueError, match="export differs on 1 of 1 images"):
        folder._compare(chooses, images[1:2], want[1:2], got[1:2], **given)


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(model, place):
        raise OSError("no space left on device")

    broken = FORMATS["hf"]._replace(write=full)
    monkeypatch.setitem(folder.FORMATS, "hf", broken)
    with pytest.raises(OSError, match="no space"):
        export(run, "hf", tmp_path / "out", images=1, noise=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_done_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    missing, full = tmp_path / "missing", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match=r"format is 'onx', expected .*onnx"):
        export(missing, "onx", tmp_path / "out")
    with pytest.raises(ValueError, match=r"output_dir is .*full', expected a folder that is empty"):
        export(missing, "hf", full)
    with pytest.raises(ValueError, match="images is 0, expected at least 1"):
        export(missing, "hf", tmp_path / "out", images=0)
    monkeypatch.setattr(folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'onnx is not installed.*pip install "fambav\[export\]"'):
        export(missing, "onnx", tmp_path / "out")


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no best_checkpoint\.pth, expected a run"):
        export(tmp_path, "hf", tmp_path / "out")


def test_of_a_run_folder_the_best_checkpoint_is_taken(run):
    last = fambav.from_pretrained(run)
    torch.manual_seed(9)
    (run / "checkpoint.pth").rename(run / "best_checkpoint.pth")
    weights(run / "checkpoint.pth")
    assert fambav.from_pretrained(run).schedule == last.schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["fambav"].update(class_token="head"), "class_token is 'head'"),
        (lambda told: told.pop("pretrained_cfg"), "pretrained_cfg is missing"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(run, tmp_path, change, message):
    export(run, "safetensors", tmp_path / "out", images=1, noise=True)
    path = tmp_path / "out" / "config.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=message):
        fambav.from_pretrained(tmp_path / "out")


def test_the_command_tells_files_and_the_check(run, tmp_path, capsys):
    words = [str(run), "--format", "hf", "--output-dir", str(tmp_path / "out"), "--images", "2"]
    command.run([*words, "--noise"])
    printed = capsys.readouterr().out
    for name in ("README.md", "config.json", "model.safetensors", "preprocessor_config.json"):
        assert name in printed
    assert "same top-1 on 2 of 2" in printed
    with pytest.raises(ValueError, match="format is 'pickle', expected a known name"):
        command.run([str(run), "--format", "pickle"])


def test_the_command_knows_every_format():
    assert set(command._FORMATS) == set(FORMATS)
