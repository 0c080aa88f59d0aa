"""Kernels compiled ahead of time: what is counted, and what is objected to."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest
from aot import code_size

from fambav.bench.report import MeasureError
from fambav.cli import guarded

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/aot.py"
TABLE = ROOT / "benchmarks/aot.json"


def code(*lines):
    """What nvdisasm prints: labels as they are, and each instruction with its address."""
    shown = ["//-------- .text.kernel --------", ".text.kernel:"]
    for n, line in enumerate(lines):
        shown.append(line if line.startswith(".L") else f"        /*{16 * n:04x}*/   {line} ;")
    return "\n".join(shown)


END = ("EXIT", ".L_x_9:", "BRA `(.L_x_9)", "NOP", "NOP")


def test_code_without_a_branch_has_no_loop():
    assert code_size(code("MOV R1, c[0x0][0x28]", "IADD3 R1, R1, 0x1, RZ", "EXIT")) == (3, ())


def test_padding_is_not_counted_and_the_branch_to_itself_behind_the_end_is_no_loop():
    assert code_size(code("MOV R1, R2", *END)) == (3, ())


def test_a_loop_is_counted_from_its_label_to_its_branch():
    looped = code("MOV R1, R2", ".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", *END)
    assert code_size(looped) == (5, (2,))


@pytest.mark.parametrize("branch", ["BRA.U UP0, `(.L_x_0)", "@!UP0 BRA.U `(.L_x_0)"])
def test_a_branch_goes_on_too_if_its_condition_is_an_operand(branch):
    looped = code("MOV R1, R2", ".L_x_0:", "FADD R1, R1, R2", branch, "MOV R3, R4", *END)
    assert code_size(looped)[1] == (2,)


def test_loops_one_after_the_other_are_counted_in_their_order():
    first = (".L_x_0:", "FADD R1, R1, R2", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)")
    second = (".L_x_1:", "FMUL R1, R1, R2", "@P1 BRA `(.L_x_1)")
    assert code_size(code(*first, "MOV R1, R2", *second, *END))[1] == (3, 2)


def test_of_nested_loops_the_innermost_are_counted():
    outer = (
        *(".L_x_0:", "MOV R1, R2", ".L_x_1:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_1)"),
        *(".L_x_2:", "FMUL R1, R1, R2", "FMUL R1, R1, R2", "@P1 BRA `(.L_x_2)"),
        "@P2 BRA `(.L_x_0)",
    )
    assert code_size(code(*outer, *END))[1] == (2, 3)


def test_both_sides_of_a_branch_inside_a_loop_are_counted_once():
    looped = code(
        *(".L_x_0:", "ISETP.GE.AND P0, PT, R1, R2, PT", "@P0 BRA `(.L_x_1)"),
        *("FADD R1, R1, R2", "BRA `(.L_x_2)", ".L_x_1:", "FMUL R1, R1, R2"),
        *(".L_x_2:", "@P1 BRA `(.L_x_0)", *END),
    )
    assert code_size(looped)[1] == (6,)


def test_two_branches_to_one_label_are_one_loop():
    looped = code(
        *(".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "FADD R1, R1, R2"),
        *("@P1 BRA `(.L_x_0)", *END),
    )
    assert code_size(looped)[1] == (4,)


def test_a_jump_from_behind_the_end_back_into_the_main_line_is_no_loop():
    aside = code(
        *("@P0 BRA `(.L_x_1)", ".L_x_0:", "FADD R1, R1, R2", "EXIT"),
        *(".L_x_1:", "MUFU.RCP R1, R2", "BRA `(.L_x_0)"),
    )
    assert code_size(aside) == (5, ())


def test_a_part_of_a_loop_that_stands_behind_the_end_is_counted_with_it():
    looped = code(
        *(".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_2)", ".L_x_1:", "@P1 BRA `(.L_x_0)"),
        *("EXIT", ".L_x_2:", "MUFU.RCP R1, R2", "BRA `(.L_x_1)"),
    )
    assert code_size(looped)[1] == (5,)


def test_a_loop_that_nothing_leads_to_is_not_counted():
    assert code_size(code("EXIT", ".L_x_0:", "MOV R1, R2", "@P0 BRA `(.L_x_0)"))[1] == ()


def row(name="scan bf16", **changes):
    made = aot.Row(
        name=name,
        arch=90,
        registers=70,
        spill_bytes=0,
        shared_bytes=128,
        loops=(100, 50),
        slots=12.0,
        instructions=300,
    )
    return dataclasses.replace(made, **changes)


def report(*rows, triton="3.7.1"):
    return aot.Audit(date="2026-11-21", triton=triton, command="made", rows=rows)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(registers=72), dict(loops=(110, 55)), dict(loops=(1, 1)), dict(instructions=999)],
    ids=str,
)
def test_equal_or_better_code_is_not_objected_to(changes):
    assert aot.regressions(report(row(**changes)), report(row())) == []


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        (dict(spill_bytes=8), "spilled bytes are 8, expected 0"),
        (dict(registers=73), "registers are 73, expected at most 72"),
        (dict(loops=(111, 50)), "instructions of loops are 111 50, expected at most 110 55"),
        (dict(loops=(100, 56)), "instructions of loops are 100 56, expected at most 110 55"),
        (dict(loops=(100,)), "innermost loops are 1, expected 2"),
    ],
    ids=str,
)
def test_worse_code_is_objected_to(changes, objection):
    worse = aot.regressions(report(row(**changes)), report(row()))
    assert worse == [f"scan bf16 on sm_90: {objection}"]


def test_a_recorded_spill_is_objected_to_all_the_same():
    spilled = report(row(spill_bytes=8))
    assert aot.regressions(spilled, spilled) != []


def test_forms_that_came_or_went_are_objected_to():
    both, one = report(row(), row("conv")), report(row())
    assert aot.regressions(both, one) == ["conv on sm_90 is not recorded, expected it to be"]
    assert aot.regressions(one, both) == ["conv on sm_90 is not compiled, expected it as recorded"]


def test_forms_that_were_not_asked_for_are_not_missed():
    both = report(row(), row("conv"), row(arch=80))
    assert aot.regressions(report(row()), both, only="scan") == []


def test_of_another_triton_only_spills_and_twice_the_registers_are_objected_to():
    recorded = report(row())

    def other(**changes):
        return aot.regressions(report(row(**changes), triton="3.6.0"), recorded)

    assert other(registers=144, loops=(200,), instructions=999) == []
    assert other(registers=145) == ["scan bf16 on sm_90: registers are 145, expected at most 144"]
    assert other(spill_bytes=4) == ["scan bf16 on sm_90: spilled bytes are 4, expected 0"]


def test_the_first_objection_is_told_with_the_number_of_the_others():
    worse = report(row(spill_bytes=8, registers=99))
    with pytest.raises(MeasureError, match=r"registers are 99.*; and 1 more$"):
        aot.compare(worse, report(row()))
    with pytest.raises(MeasureError, match=r"spilled bytes are 8, expected 0$"):
        aot.compare(report(row(spill_bytes=8)), report(row()))
    aot.compare(report(row()), report(row()))


def test_a_report_is_read_as_it_was_written(tmp_path):
    made = report(row(), row("conv", slots=None, loops=()))
    (tmp_path / "aot.json").write_text(made.json())
    assert aot.read(tmp_path / "aot.json") == made
    assert len(made.json().splitlines()) == 9


def test_a_report_shows_every_number():
    shown = report(row(), row("conv", slots=None, loops=())).text().splitlines()
    assert " ".join(shown[3].split()) == "scan bf16 sm_90 70 0 128 12.0 300 100 50"
    assert " ".join(shown[4].split()) == "conv sm_90 70 0 128 - 300 -"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"loops": []}]}', '{"rows": [1]}'])
def test_a_file_that_is_no_table_is_refused(tmp_path, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert guarded(aot.main, ["--against", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(
        f"error: table is {path}, expected what benchmarks/aot.py --json writes"
    )
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "no/such"], "no/such: no such file"),
        (["--arch", "91"], "invalid choice: 91"),
        ([], "TRITON_INTERPRET is '1', expected it unset"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(monkeypatch, capsys, words, message):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert guarded(aot.main, words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_without_triton_there_is_a_hint(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert guarded(aot.main, []) == 2
    told = "error: triton is not installed, expected it; pip install 'fambav[triton]'\n"
    assert capsys.readouterr().err == told


KERNELS = """
import triton
import triton.language as tl

from fambav.ops.triton.variant import Variant


@triton.jit
def decayed(x, y, bias, length, stride, N: tl.constexpr):
    place = tl.arange(0, N)
    h = tl.zeros([N], tl.float32)
    if bias is not None:
        h += tl.load(bias + place)
    for t in range(length):
        h = h * 0.5 + tl.load(x + t * N + place * stride)
    tl.store(y + place, h * tl.sum(h))


def variants():
    types = dict(x="*fp32", y="*fp32", bias="*fp32", length="i32", stride="i32")
    told = dict(warps=1, aligned=("x", "y", "bias"), ones=("stride",))
    for n in (512, 8192):
        yield Variant(f"whole {n}", decayed, types, dict(N=n), **told, loop_work=(n,))
    yield Variant("whole bare", decayed, types, dict(N=512, bias=None), **told)
    yield Variant("whole miscounted", decayed, types, dict(N=512), **told, loop_work=(9, 9, 9))
    yield Variant("broken", decayed, types, dict(N=33), **told)
"""
CALL = """
import sys
from aot import audit
from fambav.bench.report import MeasureError

if __name__ == "__main__":
    for only in sys.argv[1:]:
        try:
            print(audit([80, 90], only=only, package="made").json())
        except MeasureError as error:
            print(error)
"""


def compiled(*words, folder=ROOT):
    """Run Python where kernels are compiled."""
    pytest.importorskip("triton")
    settings = {n: value for n, value in os.environ.items() if n != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, SCRIPT.parent, folder)))
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=settings, cwd=ROOT
    )


@pytest.fixture
def made(tmp_path):
    package = tmp_path / "made"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "decay.py").write_text(KERNELS)
    (tmp_path / "call.py").write_text(CALL)
    return tmp_path


@pytest.mark.slow
def test_kernels_are_compiled_and_measured_without_a_gpu(made):
    done = compiled(made / "call.py", "whole", folder=made)
    assert done.stderr == ""
    path = made / "aot.json"
    path.write_text(done.stdout)
    rows = {row.key: row for row in aot.read(path).rows}
    names = ["512", "8192", "bare", "miscounted"]
    assert list(rows) == [f"whole {n} on sm_{arch}" for n in names for arch in (80, 90)]
    for arch in (80, 90):
        small, big, bare, miscounted = (rows[f"whole {n} on sm_{arch}"] for n in names)
        assert small.spill_bytes == 0 < big.spill_bytes
        (loop,) = big.loops
        assert big.slots == round(loop * 32 / 8192, 2)
        assert bare.instructions < small.instructions
        assert bare.slots is miscounted.slots is None


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_named(made):
    done = compiled(made / "call.py", "broken", "absent", folder=made)
    broken, absent = done.stdout.splitlines()
    assert broken.startswith("broken does not compile for sm_80, expected it to: ")
    assert absent == "--only is 'absent', expected a part of one of 5 names"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", [80, 90])
def test_no_kernel_is_worse_than_recorded(arch):
    # What has been compiled before is taken from Triton's cache, by the hash of its source.
    done = compiled(SCRIPT, "--against", TABLE, "--arch", str(arch))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
