"""A model as a graph of PyTorch's own operations, for a batch of any size.

Numbers of tokens are fixed by the schedule, so they are constants of the graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from fambav.export import recurrence
from fambav.ops.dispatch import SCAN, Backend, backends, force
from fambav.ops.match import MATCH
from fambav.ops.selective_scan import SELECTIVE_SCAN

Lowering = Mapping[Any, Callable[..., Any]]

_EXAMPLES = 2  # a batch of one would be taken for a constant
_KEPT = ("val", "tensor_meta")  # what a saved graph needs to know of a node


def traced(net: nn.Module, input_size: tuple[int, ...], lowering: Lowering) -> ExportedProgram:
    """Trace a model.

    Args:
        net: In evaluation mode, on the CPU; its parameters need no gradients afterwards.
        input_size: Shape of an input, of an image channels, height and width.
        lowering: What operators become in the graph, beside the matching, which becomes its
            reference.

    Returns:
        A program without operators of ours, but for those that `lowering` brings in.

    Raises:
        ValueError: If the model does something that depends on its numbers.
    """
    examples = (torch.zeros(_EXAMPLES, *input_size),)
    shapes = ({0: Dim("batch", min=1)},)
    matching = {torch.ops.fambav.match.default: MATCH["reference"].run}
    net.requires_grad_(requires_grad=False)
    with torch.no_grad(), _plain_backends(), quiet():
        try:
            program: ExportedProgram = torch.export.export(
                net, examples, dynamic_shapes=shapes, strict=False
            )
            program = program.run_decompositions({**matching, **lowering})
        except (RuntimeError, TypeError, torch._dynamo.exc.UserError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"model is a {type(net).__name__}, expected one that torch can trace: {reason}"
            ) from error
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the log lines and warnings of torch and ONNX."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def bare(program: ExportedProgram) -> ExportedProgram:
    """Strip a program, in place, of what its nodes say of the source they were traced from."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        node.meta = {name: node.meta[name] for name in _KEPT if name in node.meta}
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


@contextmanager
def _plain_backends() -> Iterator[None]:
    """Force the reference of every operation, and for the scan the one that is exported."""
    before = SELECTIVE_SCAN.backends
    last = {op: name for op, name, _ in backends()}
    SELECTIVE_SCAN.backends = (Backend("export", recurrence.scan), *before)
    try:
        with ExitStack() as stack:
            for op, name in last.items():
                stack.enter_context(force("export" if op == SCAN else name, op))
            yield
    finally:
        SELECTIVE_SCAN.backends = before
