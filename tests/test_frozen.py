"""What stays as it is however the package is built: figures, names, files, a checkpoint, losses.

Figures were written by commit 57234c4.  `python -m tests.test_frozen` writes `behaviour.json` anew
from the present code, which is right only where a figure was wrong; the commit says which.

`vim_micro.pth.xz` is a checkpoint that commit 57234c4 trained on DIGITS for five epochs, its
weights rounded to three bits of mantissa in the last update and its momentum set to zero, so that
it packs; `vim_micro.yaml` are the settings that the run wrote down.
"""

import io
import json
import lzma
import re
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml

import fambav
from tests.made import go

HERE = Path(__file__).parent / "frozen"
BEHAVIOUR, SETTINGS = HERE / "behaviour.json", HERE / "vim_micro.yaml"
CHECKPOINT = HERE / "vim_micro.pth.xz"

UPPER = "--fusion-strategy upper --fusion-layer 3 --fusion-token 12"
PLANS = [  # of `fambav plan`
    "--model vim_tiny",
    "--model vim_tiny --fusion-strategy upper --fusion-layer 4 --fusion-token 8",
    "--model vim_tiny --class-token head --fusion-strategy lower --fusion-layer 9 --fusion-token 9",
    "--model vim_small --fusion-strategy alternate --fusion-token 14",
    "--model vim_small --class-token double --fusion-strategy interleaved --fusion-token 14",
    "--model vim_base --fusion-strategy all --fusion-token 7 --fusion-method ordered",
    f"--model vim_micro {UPPER}",
    f"--model vim_micro --class-token none {UPPER} --fusion-method ordered",
    "--model vim_micro --fusion-plan 3:5,5:20",
    "--model vim_micro --stride 2 --fusion-plan 3:5,5:20",
    "--model plainmamba_l1 --reduction ordered --reduction-schedule r:5@3-23/2",
    "--model plainmamba_l2 --reduction evit --reduction-schedule published",
    "--model plainmamba_l3 --reduction evit --reduction-schedule keep:0.7@5,11,17",
    "--model plainmamba_micro --reduction random --reduction-schedule keep:0.8@2,4",
    "--model vim_tiny --reduction prune-aligned --reduction-schedule published",
    "--model vim_small --reduction evit --reduction-schedule published",
    "--model vim_tiny --reduction r-meeto --reduction-schedule published",
    "--model vim_small --reduction tome --reduction-schedule ramp:6,-1",
    "--model vim_micro --reduction mtr --reduction-schedule list:0,0,7,7,7",
    "--model vim_micro --reduction utrc --reduction-schedule tokens:50,30@3,5",
    "--model vim_micro --reduction stm --reduction-schedule r:8@3-6",
    "--model vim_micro --reduction storm --reduction-schedule r:8@3-6 --reduction-hook before",
]
COSTS = [  # of `fambav flops`
    *(f"--model {name}" for name in ("vim_tiny", "vim_small", "vim_base", "plainmamba_l1")),
    *PLANS[1:],
]
RECIPE = f"""
    --model vim_micro --class-token head {UPPER} --data-set DIGITS --data-stats own --num_workers 0
    --threads 1 --epochs 1 --batch-size 128 --unscale-lr --lr 1e-3 --warmup-epochs 0 --smoothing 0
    --mixup 0 --cutmix 0 --aa none --color-jitter 0 --reprob 0 --hflip 0.5 --no-repeated-aug
""".split()


def command(words: str) -> str:
    """Return what a command of `fambav` prints."""
    (entry,) = entry_points(group="console_scripts", name="fambav")
    with redirect_stdout(io.StringIO()) as out:
        assert entry.load()(words.split()) == 0, words
    return out.getvalue()


def figures(text: str) -> str:
    """Return the numbers of a text in order; the words around them may change."""
    return " ".join(re.findall(r"(?<![\w.-])-?\d+(?:\.\d+)?(?![\w.])", text))


def images() -> torch.Tensor:
    """Make images by arithmetic alone, (6, 3, 32, 32)."""
    number = torch.arange(6 * 3 * 32 * 32, dtype=torch.float64)
    return (number * number * 0.37).sin().float().view(6, 3, 32, 32)


LINE = r"\* Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+)"


def listed(kind: str) -> list[str]:
    """Return the names of `fambav list`, and of options the whole line."""
    lines = [line.strip() for line in command(f"list {kind}").splitlines()]
    return lines if kind == "options" else [line.split()[0] for line in lines]


def parts(line: str) -> set[str]:
    """The words of a line and its options."""
    return set(re.split(r"[\s,]+", line))


def facts(folder: Path) -> dict:
    """Return the files of a run, their entries, and its losses."""
    log = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    entries = {
        "log.txt": log,
        "metrics.csv": (folder / "metrics.csv").read_text().splitlines()[0].split(","),
        "config.yaml": yaml.safe_load((folder / "config.yaml").read_text()),
        "plan.json": json.loads((folder / "plan.json").read_text()),
        "env.json": json.loads((folder / "env.json").read_text()),
        "checkpoint.pth": state,
        "weights": state["model"],
    }
    files = [p.name for p in folder.iterdir() if not p.name.startswith(("events", "."))]
    entries["files"] = files
    names = {name: " ".join(sorted(found)) for name, found in entries.items()}
    return dict(names=names, losses=[log["train_loss"], log["test_loss"]])


def logits(path: Path) -> torch.Tensor:
    """Return what the model of a file makes of the images, (6, 10)."""
    with torch.no_grad():
        return fambav.from_pretrained(path)(images())


FROZEN = json.loads(BEHAVIOUR.read_text())


@pytest.mark.parametrize("words", PLANS)
def test_a_plan_has_its_figures(words):
    assert figures(command(f"plan {words}")) == FROZEN["plan"][words]


@pytest.mark.parametrize("words", COSTS)
def test_operations_have_their_figures(words):
    assert figures(command(f"flops {words}")) == FROZEN["flops"][words]


@pytest.mark.parametrize("kind", FROZEN["list"])
def test_names_are_still_offered(kind):
    """A line may have gained an option; none is gone."""
    offered = [parts(line) for line in listed(kind)]
    gone = [n for n in FROZEN["list"][kind] if not any(parts(n) <= own for own in offered)]
    assert gone == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an epoch, as `main.py` leaves it, and what was printed."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    return folder, trained(*RECIPE, "--output_dir", folder)


def trained(*words):
    """Return what `main.py` prints."""
    done = go(*words)
    assert done.status == 0, done.err
    return done.out


def test_a_run_leaves_its_files_and_their_entries(run):
    folder, _ = run
    seen = facts(folder)
    for name, entries in FROZEN["run"]["names"].items():
        assert set(entries.split()) <= set(seen["names"][name].split()), name
    # Sums in another order differ in the last digits, which an epoch makes more of.
    assert seen["losses"] == pytest.approx(FROZEN["run"]["losses"], rel=2e-3)


def test_a_run_prints_the_lines_that_tools_look_for(run):
    _, printed = run
    assert re.search(r"^Epoch: \[0\] \[\d+/11\] ", printed, re.MULTILINE)
    assert re.search(r"^\* Acc@1 [\d.]+ Acc@5 [\d.]+ loss [\d.]+$", printed, re.MULTILINE)
    assert re.search(r"^Max accuracy: [\d.]+%$", printed, re.MULTILINE)
    assert re.search(r"^Training time \d+:\d\d:\d\d$", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The checkpoint of commit 57234c4."""
    path = tmp_path_factory.mktemp("frozen") / "checkpoint.pth"
    path.write_bytes(lzma.decompress(CHECKPOINT.read_bytes()))
    return path


def test_an_old_checkpoint_gives_the_same_logits(old):
    wanted = torch.tensor([[float(x) for x in row.split()] for row in FROZEN["logits"]])
    torch.testing.assert_close(logits(old), wanted, rtol=1e-4, atol=1e-4)


def test_an_old_checkpoint_has_the_same_accuracy(old):
    words = [*RECIPE, "--eval", "--resume", old]
    first, fifth, loss = map(float, re.search(LINE, trained(*words)).groups())
    assert (first, fifth, loss) == pytest.approx(FROZEN["scores"], abs=0.3)  # one image of 360


def test_an_old_run_goes_on(old, tmp_path):
    words = ["--config", SETTINGS, "--output_dir", tmp_path / "run"]
    printed = trained(*words, "--resume", old)
    assert "Training time" in printed
    assert json.loads((tmp_path / "run/log.txt").read_text().splitlines()[-1])["epoch"] == 4


def main() -> None:
    """Write all figures anew."""
    with tempfile.TemporaryDirectory() as folder:
        run, path = Path(folder) / "run", Path(folder) / "checkpoint.pth"
        trained(*RECIPE, "--output_dir", run)
        path.write_bytes(lzma.decompress(CHECKPOINT.read_bytes()))
        scores = re.search(LINE, trained(*RECIPE, "--eval", "--resume", path)).groups()
        kinds = ("models", "strategies", "methods", "data-sets", "backends", "grids", "options")
        told = {
            "plan": {words: figures(command(f"plan {words}")) for words in PLANS},
            "flops": {words: figures(command(f"flops {words}")) for words in COSTS},
            "list": {kind: listed(kind) for kind in kinds},
            "run": facts(run),
            "logits": [" ".join(f"{x:.6f}" for x in row) for row in logits(path).tolist()],
            "scores": list(map(float, scores)),
        }
    BEHAVIOUR.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
