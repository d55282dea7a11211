"""What stands in several scripts on purpose is word for word the same: functions under a comment `# same in: other.py`."""

import ast

import pytest
from conftest import ROOT

MARK = "# same in: "


def marked(file):
    """{function: (its source, the files it names)} of the marked functions of a script."""
    text = (ROOT / file).read_text()
    lines, found = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        above = lines[node.lineno - 2] if isinstance(node, ast.FunctionDef) else ""
        if above.strip().startswith(MARK):
            source = ast.get_source_segment(text, node, padded=True)
            found[node.name] = source, above.strip().removeprefix(MARK).split(", ")
    assert len(found) == sum(line.strip().startswith(MARK) for line in lines), f"{file}: a mark that is above no function"
    return found


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
COPIES = [(file, name) for file in SCRIPTS for name in marked(file)]


def test_there_are_marked_copies():
    assert ("cbgan.py", "trim_log") in COPIES


@pytest.mark.parametrize("file, name", COPIES)
def test_copies_are_the_same(file, name):
    source, others = marked(file)[name]
    for other in others:
        theirs, back = marked(other)[name]
        assert source == theirs, f"{name} in {file} and {other}"
        assert file in back, f"{other} does not name {file} above {name}"
