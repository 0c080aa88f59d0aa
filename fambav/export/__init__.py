"""Models for other runtimes, each checked against the one it was made of.

recurrence   the scan's recurrence, the one operation that formats put differently
choosing     the matching of tokens, in plain operations
tracing      a model as a graph of plain operations, for a batch of any size
graph        such a graph as an ONNX model, whose scans are loops
card         what is known of a model, for people
description  the same for programs
folder       what each format's folder holds, written, read back, compared and only then kept
"""

from fambav.export.card import Check
from fambav.export.folder import FORMATS, export

__all__ = ["FORMATS", "Check", "export"]
