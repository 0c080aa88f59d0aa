"""How deeply pickles are nested, read without building what they hold."""

import io
import pickle
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest

from fambav.pickles import DeepPickleError, check_depth

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
FLAT = {
    "a long list": list(range(5000)),
    "a long dictionary": {f"name {n}": (n, [n]) for n in range(5000)},
    "objects": [OrderedDict(a=1), Namespace(lr=0.1, betas=(0.9, 0.999)), {1, 2}, frozenset("ab")],
    "arrays": [np.arange(3), np.float64(2), b"\xff" * 300, "text" * 300, 10**400, None, True, 0.5],
    "one value often": [(1, 2)] * 5000,
    "nearly too deep": eval("(" * 60 + "1" + ",)" * 60),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", FLAT)
def test_what_data_needs_passes(case, protocol):
    file = io.BytesIO(pickle.dumps(FLAT[case], protocol) + b"rest")
    check_depth(file)
    assert file.read() == b"rest"


def shared(levels):
    """Tuples of which each holds the one before twice."""
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [shared(150), {shared(12): eval("[" * 90 + "]" * 90)}])
def test_the_depth_is_that_of_the_deepest_value(value, protocol):
    raw = pickle.dumps(value, protocol)
    if isinstance(value, dict):
        check_depth(io.BytesIO(raw))
        return
    with pytest.raises(DeepPickleError, match="nested more than 100 deep"):
        check_depth(io.BytesIO(raw))


DEEP = {
    "tuples": b"K\x01" + b"\x85" * 101 + b".",
    "tuples behind marks": b"(" * 101 + b"t" * 101 + b".",
    "values of dictionaries": b"}K\x01" * 101 + b"}" + b"s" * 101 + b".",
    "calls": b"cbuiltins\nlist\n" * 60 + b")" + b"R\x85" * 60 + b".",
    "a memo": b")q\x00" + b"h\x00\x85q\x00" * 101 + b".",
    "a copy": b")" + b"2\x86" * 101 + b".",
}


@pytest.mark.parametrize("case", DEEP)
def test_whatever_nests_counts(case):
    with pytest.raises(DeepPickleError):
        check_depth(io.BytesIO(DEEP[case]))


@pytest.mark.parametrize("raw", [b"", b"\x80\x02", b"K\x01", b"t.", b"\x85.", b"h\x07.", b"\xff."])
def test_what_is_no_pickle_is_refused(raw):
    with pytest.raises((ValueError, LookupError)):
        check_depth(io.BytesIO(raw))
