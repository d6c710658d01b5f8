"""Specification of course/assignments.py, on a toy function. What it says of the six assignments is
proved by `python course/assignments.py prove`, which CI runs, too."""

import ast

import pytest

from course import assignments
from course.assignments import ASSIGNMENTS, ROOT
from course.mutants import MUTANTS

SOURCE = '''"""A module."""


def f(x):
    """Doubles x, (N,) -> (N,)."""
    twice = x + x
    return twice


class C:
    def g(self):
        def inner():
            return 1
        return inner()

    @staticmethod
    def h(a,
          b=2):
        """Says so."""
        # a comment
        return (a
                + b)
'''
BODY_OF_F = """\
    twice = x + x
    return twice
"""
BODY_OF_H = """\
        # a comment
        return (a
                + b)
"""


def test_bodies_become_one_line():
    """Signature and docstring stay, decorators too. Names of methods have their class's."""
    expected = SOURCE.replace(BODY_OF_F, '    raise NotImplementedError("task 1")\n')
    expected = expected.replace(BODY_OF_H, '        raise NotImplementedError("task 1")\n')
    assert expected.count("NotImplementedError") == 2
    assert assignments.blank(SOURCE, ["f", "C.h"], "task 1") == expected
    assert 'def g(self):\n        raise NotImplementedError("2")\n\n    @static' in \
        assignments.blank(SOURCE, ["C.g"], "2")
    with pytest.raises(KeyError):
        assignments.blank(SOURCE, ["C.nothing"], "")


def test_points_are_for_tests_that_passed_in_all_their_cases(tmp_path):
    (tmp_path / "report.xml").write_text("""<testsuites><testsuite>
        <testcase classname="tests.test_rl" name="test_a[1]"/>
        <testcase classname="tests.test_rl" name="test_a[2]">
        <failure message="assert 1 == 2&#10;x"/></testcase>
        <testcase classname="tests.test_rl" name="test_a[3]"/>
        <testcase classname="tests.test_rl" name="test_b"/>
        <testcase classname="tests.test_rl" name="test_c"><error message=""/></testcase>
        <testcase classname="tests.test_rl" name="test_d"><skipped message="no GPU"/></testcase>
        </testsuite></testsuites>""")
    tests = [f"test_rl.py::test_{name}" for name in "abcde"]
    assert list(assignments.read_outcomes(tmp_path / "report.xml", tests).values()) == [
        "assert 1 == 2", None, "no message", "no GPU", "did not run"]
    nothing = assignments.read_outcomes(tmp_path / "no.xml", tests[:1], "SyntaxError")
    assert nothing == {tests[0]: "SyntaxError"}


@pytest.mark.parametrize("number", ASSIGNMENTS)
def test_an_assignment_is_whole(number):
    """An assignment has 100 points. Its functions and tests exist. Every task has a mutant, and
    there are at least eight. Its page names every function and has the same points and hours."""
    title, hours, tasks = ASSIGNMENTS[number]
    page = (ROOT / f"course/{number}.md").read_text()
    assert sum(sum(task.tests.values()) for task in tasks) == 100
    assert len(page.splitlines()) <= 150 and f"100 points, about {hours} hours" in page
    for task_number, task in enumerate(tasks, 1):
        for function in task.functions:
            file, name = function.split(":")
            assignments.find_function(ast.parse((ROOT / file).read_text()), name)
            assert f"`{name}`" in page
        for test in task.tests:
            file, name = test.split("::")
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), test
        assert f"\n| {task_number}. " in page and f"| {sum(task.tests.values())} |" in page
        assert any((m.assignment, m.task) == (number, task_number) for m in MUTANTS)
    assert sum(m.assignment == number for m in MUTANTS) >= 8


def test_every_mutant_applies_once():
    """A mutant of code that has changed would prove nothing."""
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.mistake


def test_a_students_copy(tmp_path):
    """Blank functions that compile, no answers, and no project's own files."""
    (tmp_path / "mine").mkdir()
    assignments.start(4, tmp_path / "mine")
    source = (tmp_path / "mine" / "rl.py").read_text()
    assert source.count("raise NotImplementedError(\"assignment 4, task ") == 8
    assert "A'_i = M_i (r_i - b) / (s + eps)" in source
    ast.parse(source)
    names = {str(path.relative_to(tmp_path / "mine")) for path in (tmp_path / "mine").rglob("*")}
    assert {"tools.py", "extras/root.py", "tests/conftest.py", "tests/support/launch.py",
            "course/4.md", "course/assignments.py", "checkpoints/sft/model.safetensors"} <= names
    assert not {".git", "course/mutants.py", "course/teaching.md"} & names


@pytest.mark.parametrize("folder, message", [
    (ROOT / "docs", "is not empty"), (ROOT / "mine", "is inside the project")], ids=str)
def test_where_a_students_copy_must_not_be(folder, message):
    with pytest.raises(SystemExit, match=message):
        assignments.start(4, folder)
