"""A mistake is one line on stderr and a status: what every such test looks at."""

from fambav import cli
from tests.made import go as call

LONGEST = 1000  # characters of a line that people can still read


def the_line(found, *names, status=2):
    """Return the one line of a program that had to refuse; it names all of `names`."""
    assert found.status == status, found.out + found.err
    lines = [line for line in found.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, found.err
    (line,) = lines
    assert line.startswith("error: ")
    assert len(line) <= LONGEST
    assert "Traceback" not in found.out
    for name in names:
        assert str(name) in line, f"{name} is not in: {line}"
    return line


def refused(*words, names=(), program=cli.main, status=2):
    """Call a program that has to refuse in a line which names all of `names`; return the line."""
    return the_line(call(*words, program=program), *names, status=status)


def content(folder):
    """Every file below a folder, by its path, with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def the_line_of(found, *names, status=2):
    """Do what `the_line` does for a process whose two streams are one; remarks may stand before."""
    assert found.status == status, found.out
    assert "Traceback" not in found.out
    lines = [line for line in found.out.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, found.out
    for name in names:
        assert str(name) in lines[0], f"{name} is not in: {lines[0]}"
    assert len(lines[0]) <= LONGEST
    return lines[0]
