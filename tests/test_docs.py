"""README.md, docs/, course/ and extras/README.md: what they claim about the code is true. No torch,
no stage is run.

Pages name functions, tests, flags, files and numbers of lines, and nothing else fails when one of
them has changed. Names of the map are looked up in the syntax trees of the files, flags in the
calls of add_argument that a script's parser is made of.
"""

import ast
import functools
import json
import re
from pathlib import Path

import pytest

import tools

ROOT = Path(__file__).resolve().parent.parent


def relative_paths(*patterns):
    """Return the paths of all files of some patterns, relative to the project, sorted."""
    paths = []
    for pattern in patterns:
        paths += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
    return paths


STAGES = ["tools.py", "build_data.py", "collect_coldstart.py", "sft.py", "evaluate.py", "rl.py"]
SCRIPTS = [*STAGES, *relative_paths("extras/*.py", "course/*.py", "tests/support/*.py")]
PAGES = ["README.md", *relative_paths("docs/**/*.md", "course/*.md", "extras/*.md",
                                      "checkpoints/README.md", "checkpoints/*/README.md")]
# flags of every parser, and those of torchrun and hf, which are named next to ours
FOREIGN_FLAGS = {"--help", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint",
                 "--local_addr", "--max_restarts", "--repo-type", "--local-dir"}


@functools.cache
def read(name):
    """Return the text of a file."""
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def syntax_tree(name):
    return ast.parse(read(name))


def fenced(page, language):
    """Return the blocks of a page between ```language and ```."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def prose(page):
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def tables(text):
    """Yield (titles, rows) of the tables in a text; a row is a list of cells."""
    def cells(line):
        return [cell.strip() for cell in line.strip().strip("|").split("|")]

    for head, body in re.findall(r"^(\| .*)\n\|[-|]+\n((?:\|.*\n)*)", text, re.MULTILINE):
        yield cells(head), [cells(line) for line in body.splitlines()]


# ---- The map ------------------------------------------------------------------------------------


def defined_names(body):
    """Return what a module or class defines: "f", "NAME", "Class.method"."""
    names = set()
    for node in body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for name in defined_names(node.body)}
    return names


def map_rows():
    """Return the rows of the map's tables of ideas: [idea, function, test]."""
    rows = []
    for titles, table_rows in tables(read("docs/map.md")):
        if titles[0] == "idea":
            assert titles == ["idea", "function", "test"]
            rows += table_rows
    return rows


def test_defined_names_by_hand():
    source = "A = B = 1\ndef f():\n    hidden = 2\nclass C:\n    def g(self):\n        pass\n"
    assert defined_names(ast.parse(source).body) == {"A", "B", "f", "C", "C.g"}


def test_every_entry_of_the_map_exists():
    entries = re.findall(r"`((?:\w+/)?\w+\.py):([\w.]+)`", read("docs/map.md"))
    assert len(entries) > 60
    missing = [f"{file}:{name}" for file, name in entries
               if name not in defined_names(syntax_tree(file).body)]
    assert not missing, f"docs/map.md names what does not exist: {', '.join(missing)}"


def test_the_map_visits_every_stage():
    assert set(re.findall(r"`(\w+\.py):\w", read("docs/map.md"))) == set(STAGES)


def test_every_row_of_the_map_has_a_function_and_a_test():
    rows = map_rows()
    assert len(rows) > 40
    for idea, function, test in rows:
        assert re.fullmatch(r"`[\w/]+\.py:[\w.]+`(, `[\w/]+\.py:[\w.]+`)*", function), idea
        assert re.fullmatch(r"`[\w/]+\.py::\w+`(, `[\w/]+\.py::\w+`)*", test), idea


def test_every_test_of_the_map_exists():
    """`test_x.py::test_name` is short for `tests/test_x.py::test_name`."""
    missing = []
    for _, _, cell in map_rows():
        for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", cell):
            path = "tests/" + file.removeprefix("tests/")
            if not (ROOT / path).exists() or name not in defined_names(syntax_tree(path).body):
                missing.append(f"{file}::{name}")
    assert not missing, f"docs/map.md names tests that do not exist: {', '.join(missing)}"


# ---- Lines --------------------------------------------------------------------------------------


def num_lines(file):
    return read(file).count("\n")


def test_line_counts_are_true():
    """A claim is in a table with a column "lines", or is written `file` (N lines)."""
    wrong = []
    num_claims = 0
    for page in PAGES:
        # 1. all claims
        text = prose(page)
        claims = re.findall(r"`([\w./]+)` \(([\d,]+) lines\)", text)
        for titles, rows in tables(text):
            if "lines" in titles:
                column = titles.index("lines")
                claims += [(row[0].strip("`"), row[column]) for row in rows]
        # 2. those that are not true
        for file, count in claims:
            if int(count.replace(",", "")) != num_lines(file):
                wrong.append(f"{page}: {file} has {num_lines(file):,} lines, not {count}")
        # 3. numbers of lines that nobody could check
        rest = re.sub(r"`[\w./]+` \([\d,]+ lines\)", "", text)
        for count in re.findall(r"(\d[\d,]*)[ -]lines\b", rest):
            wrong.append(f"{page}: '{count} lines' of what? write `file` ({count} lines)")
        num_claims += len(claims)
    assert not wrong, "\n".join(wrong)
    assert num_claims >= len(STAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_at_most_200_lines(page):
    assert num_lines(page) <= (160 if page == "README.md" else 200)


def test_the_readme_is_at_most_100_columns_wide():
    """Tables may be wider."""
    lines = read("README.md").splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


# ---- Links --------------------------------------------------------------------------------------


def anchors(page):
    """Return the names that headings have as link targets, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page):
    """Return [(file, anchor)] that a page links to or shows, within the repository."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            found.append((path.resolve(), anchor))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.is_file(), f"{page} links to {path}, which does not exist"
        if anchor:
            assert path.suffix == ".md" and anchor in anchors(str(path.relative_to(ROOT))), (
                f"{page}: {path.name} has no heading #{anchor}")


def test_the_readme_leads_to_every_page_and_every_image_is_shown():
    linked = {page: {path for path, _ in links(page)} for page in PAGES}
    pages = {ROOT / page for page in PAGES[1:] if not page.startswith("checkpoints/")}
    unreachable = pages - linked["README.md"]
    assert not unreachable, f"README.md does not link to {sorted(map(str, unreachable))}"
    shown = set().union(*linked.values())
    assert {*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.gif")} <= shown


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_repository_that_are_named_exist(page):
    """A bare `name.py` is a stage, or a script in the page's own folder."""
    for name in re.findall(r"`((?:tests|docs|extras|course|\.ci)/[\w./]+)`", read(page)):
        assert (ROOT / name).exists(), f"{page} names {name}"
    for name in re.findall(r"`(\w+\.py)`", read(page)):
        is_next_to_page = (ROOT / page).parent.joinpath(name).exists()
        assert (ROOT / name).exists() or is_next_to_page, f"{page} names {name}"


# ---- Commands -----------------------------------------------------------------------------------


def functions(script):
    """Return {name: syntax tree} of a script's functions, {} for a file that is none of ours."""
    if script not in SCRIPTS:
        return {}
    return {node.name: node for node in syntax_tree(script).body
            if isinstance(node, ast.FunctionDef)}


def flags_of_call(call):
    """Return the flags that a call adds, such as parser.add_argument("--x", ...)."""
    names = set()
    for argument in call.args:
        if isinstance(argument, ast.Constant) and re.fullmatch(r"--\w+", str(argument.value)):
            names.add(argument.value)
    for keyword in call.keywords:
        if ast.unparse(keyword.value).endswith("BooleanOptionalAction"):
            names |= {name.replace("--", "--no-", 1) for name in names}
    return names


def called_function(call, script):
    """Return (script, name) of a function of ours that is called as f() or as sft.f()."""
    function = call.func
    if isinstance(function, ast.Name):
        return script, function.id
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.py", function.attr
    return script, ""


def parser_flags(script, function_name):
    """Return the flags that a function adds, and those of the add_... functions that it calls."""
    names = set()
    for node in ast.walk(functions(script)[function_name]):
        if isinstance(node, ast.Call):
            names |= flags_of_call(node)
            home, called = called_function(node, script)
            if called.startswith("add_") and called in functions(home):
                names |= parser_flags(home, called)
    return names


@functools.cache
def flags(script):
    """Return the flags of a script: its own, or those of another script whose parse_args it calls.
    None if it has no parser."""
    borrowed = re.search(r"\b(\w+)\.parse_args\(DESCRIPTION\)", read(script))
    if borrowed:
        return flags(f"{borrowed[1]}.py")
    for name, function in functions(script).items():
        for node in ast.walk(function):
            makes_parser = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "argparse.ArgumentParser", "terminal.make_parser")
            if makes_parser and script != "tools.py":
                return parser_flags(script, name)
    return None


@functools.cache
def all_flags():
    names = set()
    for script in SCRIPTS:
        names |= flags(script) or set()
    return names


def commands(text):
    """Return [(script, its flags)] for every command of ours in lines of shell."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    found = []
    for line in text.splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        for command in re.split(r"&&|\|\||[|;]", line):
            match = re.search(r"(?:^|[ /])((?:extras/|course/|tests/)?\w+\.py)(?: (.*))?$",
                              command.strip())
            if match:
                given = re.findall(r"(?<!\S)--[A-Za-z][\w-]*", match[2] or "")
                found.append((match[1], given))
    return found


def shell_of_page(page):
    """Return the commands of a page: its bash blocks, and inline code that begins with a script."""
    return "\n".join([*fenced(page, "bash"), *re.findall(r"`([^`]*\.py [^`]*)`", prose(page))])


def shell_of_docstring(script):
    """Return the commands in the docstring with which a script begins."""
    text = ast.get_docstring(syntax_tree(script)) or ""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    return "\n".join(line for line in text.splitlines() if re.search(r"\b(python|torchrun) ", line))


def test_flags_by_hand():
    """One of each way in which a flag gets into a parser, and some that do not exist."""
    known = flags("rl.py")
    assert {"--steps", "--anneal_lr", "--no-anneal_lr", "--min_pixels", "--resume",
            "--judge"} <= known
    assert not {"--no-steps", "--epochs", "--lr_decay"} & known
    assert "--kills" in flags("extras/crash.py")
    assert flags("tools.py") is None
    assert flags("extras/plan.py") == known


@pytest.mark.parametrize("where", [*PAGES, *SCRIPTS])
def test_documented_commands_have_their_flags(where):
    """In pages, and in the docstrings with which scripts begin."""
    text = shell_of_docstring(where) if where in SCRIPTS else shell_of_page(where)
    for script, given in commands(text):
        assert (ROOT / script).exists(), f"{where}: {script} does not exist"
        unknown = set(given) - (flags(script) or set())
        assert not unknown, f"{where}: {script} has no {', '.join(unknown)}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_mentions_exist(page):
    text = "\n".join([*fenced(page, "bash"), *re.findall(r"`([^`\n]*)`", prose(page))])
    mentioned = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text))
    unknown = mentioned - all_flags() - FOREIGN_FLAGS
    assert not unknown, f"{page}: no script has {', '.join(sorted(unknown))}"


def test_commands_are_found():
    """The stages, in order: the tests above are not about nothing."""
    found = commands(shell_of_page("docs/stages.md"))
    assert [script for script, _ in found][:6] == [
        "build_data.py", "sft.py", "collect_coldstart.py", "sft.py", "rl.py", "evaluate.py"]
    assert found[1][1] == ["--model", "--data", "--out", "--batch_size", "--epochs",
                           "--aggregation"]


def test_every_script_of_extras_has_a_row_in_its_readme():
    """root.py is only imported, and needs no command."""
    table_rows = [row for _, rows in tables(read("extras/README.md")) for row in rows]
    scripts = [row[0].strip("`") for row in table_rows]
    assert sorted([*scripts, "root.py"]) == sorted(path.name for path in ROOT.glob("extras/*.py"))
    assert all(commands(row[-1].strip("`")) for row in table_rows)


def test_ci_finds_its_command():
    """.ci/run runs the first bash block under this heading."""
    text = read("README.md")
    under_heading = text[text.index("\n## Run the tests\n"):]
    block = re.search(r"^```bash\n(.*?)^```$", under_heading, re.MULTILINE | re.DOTALL)[1]
    assert block == "bash run.sh test\n"
    assert "## Run the tests" in read(".ci/run")


# ---- What is written in two places is the same --------------------------------------------------


def test_rl_of_7b_has_one_command():
    command = next(block for block in fenced("README.md", "bash") if "--nproc_per_node=8" in block)
    assert any(command in block for block in fenced("docs/large.md", "bash"))


def test_the_readmes_results_are_those_of_the_findings():
    text = read("README.md")
    results = text[text.index("\n## Results\n"):text.index("\n## The files\n")]
    rows = re.findall(r"^\| [^|]+(\| [\d.]+ \(.*)$", results, re.MULTILINE)
    assert len(rows) >= 2
    for row in rows:
        assert row.rstrip(" |") in read("docs/findings.md"), f"README.md: {row}"


def test_rows_that_are_shown_are_rows():
    question, trajectory = (json.loads(block) for block in fenced("docs/stages.md", "json"))
    instruction = json.loads(fenced("docs/data.md", "json")[0])
    tools.check_question(question)
    for row in (instruction, trajectory):
        tools.check_trajectory(row)
    assert trajectory["turns"][0]["learn"] is False


@pytest.mark.parametrize("heading, scripts", [
    ("## Reinforcement learning", ["rl.py", "evaluate.py"]), ("## Evaluation", ["evaluate.py"])])
def test_metrics_that_are_explained_exist(heading, scripts):
    """The first column of the tables: keys that the code writes, as a string or as a keyword."""
    written = set()
    for script in scripts:
        for node in ast.walk(syntax_tree(script)):
            if isinstance(node, ast.Constant):
                written.add(node.value)
            elif isinstance(node, ast.keyword):
                written.add(node.arg)
    section = read("docs/metrics.md").split(heading + "\n")[1].split("\n## ")[0]
    explained = set()
    for _, rows in tables(section):
        for row in rows:
            explained |= set(re.findall(r"`(\w+)`", row[0]))
    assert len(explained) > 8
    assert explained <= written, explained - written
