"""fambav export."""

from __future__ import annotations

from fambav.arguments import check_folder
from fambav.commands.output import print_line
from fambav.commands.parser import Parser, count, number
from fambav.commands.trained import RUN
from fambav.config import ConfigError
from fambav.config.setting import POSITIVE
from fambav.registry import nearest

_FORMATS = ("safetensors", "torch", "onnx", "hf", "pth")


def run(words: list[str]) -> None:
    """Write a trained model for other programs, checked on images against the model itself."""
    parser = _parser()
    given = parser.parse_args(words)
    if given.format not in _FORMATS:
        hint = nearest(given.format, _FORMATS)
        raise ConfigError(f"format is {given.format!r}, expected a known name; {hint}")

    from pathlib import Path

    from fambav.export import export

    source = Path(given.path)
    beside = source if source.is_dir() else source.parent
    folder = Path(given.output_dir or beside / f"export-{given.format}")
    check_folder(folder)
    check = export(
        source,
        given.format,
        folder,
        images=given.images,
        noise=given.noise,
        tolerance=given.tolerance,
        data_path=given.data_path,
        dynamic_batch=given.dynamic_batch,
    )
    print_line(f"{given.format} in {check.seconds:.1f} s: {folder}")
    for file in sorted(folder.iterdir()):
        print(f"  {file.name:<26}{file.stat().st_size / 2**20:8.2f} MiB")
    print(check.line())


def _parser() -> Parser:
    parser = Parser(
        "fambav export",
        description=run.__doc__,
        epilog="safetensors, hf and pth, the smallest: float16 and compressed, are loaded by"
        " fambav.from_pretrained; torch by torch.export.load without this package, onnx by ONNX"
        " Runtime; both take a batch of any size.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="RUN|CHECKPOINT", help=RUN)
    parser.add_argument("--format", required=True, metavar="|".join(_FORMATS))
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="empty or new; export-FORMAT beside the weights by default",
    )
    parser.add_argument(
        "--images", type=count, default=64, metavar="N", help="held-out images to compare on (64)"
    )
    parser.add_argument(
        "--noise", action="store_true", help="compare on noise, where the data set is not at hand"
    )
    parser.add_argument(
        "--tolerance",
        type=number(float, POSITIVE),
        metavar="X",
        help="largest difference of a logit, relative to the largest logit, at least 1 (1e-4; of"
        " pth 1e-2)",
    )
    parser.add_argument(
        "--dynamic-batch",
        action="store_true",
        help="compare on batches of 1 and 3 images too (torch, onnx)",
    )
    parser.add_argument("--data-path", metavar="DIR", help="of the data set, if it has moved")
    return parser
