"""A traced model as an ONNX model.

Every scan is ONNX's own loop over the tokens, `Scan`, so that neither the graph nor memory grows
with their number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fambav.export.tracing import quiet, traced

OPSET = 18  # the first with all that is used here, and the one torch translates to
INPUT, OUTPUT = "images", "logits"

_DOMAIN, _NAME = "fambav", "recurrence"
_RECURRENCE = f"""
<domain: "{_DOMAIN}", opset_import: ["" : {OPSET}]>
{_NAME} (step, drive, A, B, C) => (y)
{{
  tokens = Shape <start: int = 1> (drive)
  state = Shape <start: int = 1> (A)
  shape = Concat <axis: int = 0> (tokens, state)
  zero = Constant <value = float {{0.0}}> ()
  nothing = Expand (zero, shape)
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  last, y = Scan <num_scan_inputs: int = 4, body = steps (
    float[b, d, n] h, float[b, d] step_t, float[b, d] drive_t, float[b, n] B_t, float[b, n] C_t
  ) => (float[b, d, n] next, float[b, d] y_t) {{
    each = Unsqueeze (step_t, two)
    rate = Mul (each, A)
    decay = Exp (rate)
    kept = Mul (decay, h)
    row = Unsqueeze (drive_t, two)
    column = Unsqueeze (B_t, one)
    given = Mul (row, column)
    next = Add (kept, given)
    weight = Unsqueeze (C_t, two)
    out = MatMul (next, weight)
    y_t = Squeeze (out, two)
  }}> (nothing, step, drive, B, C)
}}
"""


def onnx_model(net: nn.Module, input_size: tuple[int, ...]) -> Any:
    """Translate a model.

    Args:
        net: In evaluation mode, on the CPU, in float32.
        input_size: Shape of an input, of an image channels, height and width.

    Returns:
        An `onnx.ModelProto` from `images`, (batch, *input_size), to `logits`, (batch, classes) of
        a classifier, of operators of ONNX alone.

    Raises:
        ValueError: If the model does something that ONNX has no operator for.
    """
    import onnx
    import onnx.inliner
    import onnx.parser

    lowering: dict[Any, Any] = {
        torch.ops.fambav.recurrence.default: _placeholder,
        torch.ops.aten.sort.stable: sort_by_topk,
        torch.ops.aten.searchsorted.Tensor: rank_by_counting,
    }
    if not hasattr(torch.onnx, "ops"):
        raise ValueError(f"torch is {torch.__version__}, expected 2.8 or later for export to onnx")
    program = traced(net, input_size, lowering)
    names: dict[str, Any] = dict(input_names=[INPUT], output_names=[OUTPUT])
    with torch.no_grad(), quiet():
        try:
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, **names
            )
        except torch.onnx.errors.OnnxExporterError as error:
            last = str(error).strip().splitlines()
            reason = next((line for line in last if "No ONNX function" in line), last[0])
            raise ValueError(
                f"model is a {type(net).__name__}, expected one that ONNX can express: {reason}"
            ) from error
        model = exported.model_proto if exported is not None else onnx.ModelProto()
    model.functions.append(onnx.parser.parse_function(_RECURRENCE))
    if all(known.domain != _DOMAIN for known in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    model = _tidied(onnx.inliner.inline_local_functions(model))
    onnx.checker.check_model(model, full_check=True)
    return model


def sort_by_topk(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """Do what `torch.sort` does by TopK, in which ONNX puts the lower index first among equals."""
    del stable
    values, indices = torch.topk(x, x.shape[dim], dim, descending)
    return values, indices


def rank_by_counting(ordered: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Do what `torch.searchsorted` does: ordered (..., k), x (..., n) -> ranks (..., n)."""
    if not ordered.shape[-1]:  # ONNX Runtime returns nothing for a sum over an empty axis
        return torch.zeros_like(x)
    right = options.get("right") or options.get("side") == "right"
    rows, each = ordered.unsqueeze(-2), x.unsqueeze(-1)
    return (rows <= each if right else rows < each).sum(dim=-1)


def _tidied(model: Any) -> Any:
    """Name the size of the batch, and remove our own names and source."""
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    for dim in (dim for value in values for dim in value.type.tensor_type.shape.dim):
        if dim.dim_param == batch:
            dim.dim_param = "batch"
    for node in model.graph.node:
        del node.metadata_props[:]
    known = [(opset.domain, opset.version) for opset in model.opset_import]
    del model.opset_import[:]
    for domain, version in known:
        if domain != _DOMAIN:
            model.opset_import.add(domain=domain, version=version)
    return model


def _placeholder(step: Tensor, *rest: Tensor) -> Tensor:
    """Mark where the loop goes."""
    y: Tensor = torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_NAME}", (step, *rest), dtype=step.dtype, shape=step.shape, version=1
    )
    return y
