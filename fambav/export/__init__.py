"""Models for other runtimes, each checked against the one it was made of.

tracing      a model as a graph of plain operations, for a batch of any size
recurrence   the scan's recurrence, the one operation that formats express differently
graph        such a graph as an ONNX model, whose scans are loops
description  what is known of a model, for programs
card         the same for people
folder       the folder of each format: written, read back, compared and only then kept
"""

from fambav.export.card import Check
from fambav.export.folder import FORMATS, export

__all__ = ["FORMATS", "Check", "export"]
