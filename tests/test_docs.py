"""README.md and docs/: what they claim about the code is so. No torch, no stage is run.

Pages name functions, flags, files and numbers of lines, and nothing else tells when one of them has
changed. The map's names are looked up in the syntax trees of the files, flags in the calls of
add_argument that a script's parser is made of.
"""

import ast
import functools
import json
import re
from pathlib import Path

import pytest

import tools

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["tools.py", "build_data.py", "collect_coldstart.py", "sft.py", "evaluate.py", "rl.py"]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
SCRIPTS = [*STAGES, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[dt]*/*.py")
                            if not path.name.startswith(("test_", "conftest")))]
# of torchrun and hf, which are named beside ours
FOREIGN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts",
           "--repo-type", "--local-dir"}


@functools.cache
def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def tree(name):
    return ast.parse(read(name))


def fenced(page, language):
    """The blocks of a page between ```language and ```."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


# -------------------------------------------------------------------------------------------------
# The map


def names(body):
    """What a module or class defines: "f", "NAME", "Class.method"."""
    found = set()
    for node in body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for name in names(node.body)}
    return found


def test_names_by_hand():
    source = "A = B = 1\ndef f():\n    hidden = 2\nclass C:\n    def g(self):\n        pass\n"
    assert names(ast.parse(source).body) == {"A", "B", "f", "C", "C.g"}


def test_every_entry_of_the_map_is_there():
    entries = re.findall(r"`((?:docs/)?\w+\.py):([\w.]+)`", read("docs/map.md"))
    assert len(entries) > 60
    gone = [f"{file}:{name}" for file, name in entries if name not in names(tree(file).body)]
    assert not gone, f"docs/map.md names what is not there (any more): {', '.join(gone)}"


def test_the_map_visits_every_stage():
    assert {*re.findall(r"`(\w+\.py):", read("docs/map.md"))} == {*STAGES}


def test_every_row_of_the_map_has_an_entry():
    rows = [line for line in read("docs/map.md").splitlines() if re.match(r"\| (?!idea \|)", line)]
    assert rows and all(re.search(r"`[\w/]+\.py:[\w.]+`", row) for row in rows)


# -------------------------------------------------------------------------------------------------
# Lines


def lines_of(file):
    return read(file).count("\n")


def test_line_counts_are_so():
    """Claims stand in a table with a column "lines", or are written `file` (N lines)."""
    wrong, count = [], 0
    for page in PAGES:
        text = prose(page)
        claims = re.findall(r"`([\w./]+)` \(([\d,]+) lines\)", text)
        for head, body in re.findall(r"^(\| .*)\n\|[-|]+\n((?:\|.*\n)*)", text, re.MULTILINE):
            titles = [title.strip() for title in head.split("|")]
            if "lines" in titles:
                rows = [row.split("|") for row in body.splitlines()]
                claims += [(row[1].strip(" `"), row[titles.index("lines")].strip()) for row in rows]
        wrong += [f"{page}: {file} has {lines_of(file):,} lines, not {said}"
                  for file, said in claims if int(said.replace(",", "")) != lines_of(file)]
        rest = re.sub(r"`[\w./]+` \([\d,]+ lines\)", "", text)
        wrong += [f"{page}: '{said} lines' of what? write `file` ({said} lines)"
                  for said in re.findall(r"(\d[\d,]*)[ -]lines\b", rest)]
        count += len(claims)
    assert not wrong, "\n".join(wrong)
    assert count >= len(STAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_at_most_200_lines(page):
    assert lines_of(page) <= 200


def test_the_readme_is_at_most_100_columns_wide():
    """Tables and rows of JSON may be wider."""
    text = re.sub(r"^```json\n.*?^```$", "", read("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in text.splitlines() if len(line) > 100 and not line.startswith("|")]


# -------------------------------------------------------------------------------------------------
# Links


def anchors(page):
    """The names that headings have as link targets, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page):
    """(file, anchor) that a page links to or shows, within the repository."""
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
        known = {"", *anchors(path.relative_to(ROOT).as_posix())} if path.suffix == ".md" else {""}
        assert anchor in known, f"{page}: {path.name} has no heading #{anchor}"


def test_the_readme_leads_to_every_page_and_every_image_is_shown():
    pages, linked = {ROOT / page for page in PAGES[1:]}, {page: links(page) for page in PAGES}
    assert pages <= {path for path, _ in linked["README.md"]}
    assert {*(ROOT / "docs").glob("*.png")} <= {path for page in PAGES for path, _ in linked[page]}


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_repository_that_are_named_exist(page):
    for name in re.findall(r"`((?:tests|docs|\.ci)/[\w./]+)`", read(page)):
        assert (ROOT / name).exists(), f"{page} names {name}"
    for name in re.findall(r"`(\w+\.py)`", read(page)):
        assert (ROOT / name).exists(), f"{page} names {name}"


# -------------------------------------------------------------------------------------------------
# Commands


def functions(module):
    """{name: node} of a file's functions; none for what is not a file of ours (parser, group)."""
    body = tree(module).body if module in SCRIPTS else []
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def parser_flags(module, function):
    """Flags that are added in a function and in those of our add_... functions that it calls."""
    found, nodes = set(), ast.walk(functions(module)[function])
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        called = call.func
        # parser.add_argument("--x", ...), by whatever name it is called
        given = [arg.value for arg in call.args if isinstance(arg, ast.Constant)
                 and re.fullmatch(r"--\w+", str(arg.value))]
        found |= {*given}
        if any(ast.unparse(k.value).endswith("BooleanOptionalAction") for k in call.keywords):
            found |= {flag.replace("--", "--no-", 1) for flag in given}
        # add_policy_flags(group), sft.add_policy_flags(group)
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        home = f"{called.value.id}.py" if isinstance(called, ast.Attribute) \
            and isinstance(called.value, ast.Name) else module
        if name.startswith("add_") and name != "add_argument" and name in functions(home):
            found |= parser_flags(home, name)
    return found


@functools.cache
def flags(script):
    """Flags of a script, whose parser is made in parse_args or main, or is another script's: then
    it calls, say, rl.parse_args(). None if it has no parser."""
    borrowed = re.search(r"\b(\w+)\.parse_args\(\)", read(script))
    if borrowed and (ROOT / f"{borrowed[1]}.py").exists():
        return flags(f"{borrowed[1]}.py")
    makers = [name for name, node in functions(script).items()
              if any(getattr(getattr(n, "func", None), "attr", "") == "ArgumentParser"
                     for n in ast.walk(node))]
    return parser_flags(script, makers[0]) if makers else None


@functools.cache
def all_flags():
    return set().union(*(flags(script) or set() for script in SCRIPTS))


def commands(text):
    """(script, its flags) for every command of ours in lines of shell."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    found = []
    for line in text.splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        for command in re.split(r"&&|\|\||[|;]", line):
            script = re.search(r"(?:^|[ /])((?:tests/|docs/)?\w+\.py)(?: (.*))?$", command.strip())
            if script:
                given = re.findall(r"(?<!\S)--[A-Za-z][\w-]*", script[2] or "")
                found.append((script[1], given))
    return found


def shell_of(page):
    """The commands of a page: its bash blocks, and inline code that begins with a script."""
    return "\n".join([*fenced(page, "bash"), *re.findall(r"`([^`]*\.py [^`]*)`", prose(page))])


def shell_of_docstring(script):
    text = ast.get_docstring(tree(script)) or ""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    return "\n".join(line for line in text.splitlines() if re.search(r"\b(python|torchrun) ", line))


def test_flags_by_hand():
    """One of each way in which a flag gets into a parser, and one that is not there."""
    known = flags("rl.py")
    assert {"--steps", "--anneal_lr", "--no-anneal_lr", "--min_pixels", "--resume", "--judge"} <= known
    assert not {"--no-steps", "--epochs", "--lr_decay"} & known
    assert "--kills" in flags("extras/crash.py") and flags("tools.py") is None
    assert flags("extras/plan.py") == known


@pytest.mark.parametrize("where", [*PAGES, *SCRIPTS])
def test_documented_commands_have_their_flags(where):
    """In pages, and in the docstrings with which scripts begin."""
    text = shell_of_docstring(where) if where in SCRIPTS else shell_of(where)
    for script, given in commands(text):
        assert (ROOT / script).exists(), f"{where}: {script} does not exist"
        known = flags(script) or set()
        assert {*given} <= known, f"{where}: {script} has no {', '.join({*given} - known)}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_mentions_exist(page):
    text = "\n".join([*fenced(page, "bash"), *re.findall(r"`([^`\n]*)`", prose(page))])
    unknown = {*re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text)} - all_flags() - FOREIGN
    assert not unknown, f"{page}: no script has {', '.join(sorted(unknown))}"


def test_commands_are_found():
    """The README's main job, in order: the test above is not about nothing."""
    found = commands(shell_of("README.md"))
    assert [script for script, _ in found][:6] == [
        "build_data.py", "sft.py", "collect_coldstart.py", "sft.py", "rl.py", "evaluate.py"]
    assert found[1][1] == ["--model", "--data", "--out", "--batch_size", "--epochs", "--aggregation"]


def test_ci_finds_its_command():
    """.ci/run runs the first bash block under this heading."""
    text = read("README.md")
    under = text[text.index("\n## Run the tests\n"):]
    assert re.search(r"^```bash\n(.*?)^```$", under, re.MULTILINE | re.DOTALL)[1].endswith(
        "python -m pytest -q tests\n")
    assert "## Run the tests" in read(".ci/run")


# -------------------------------------------------------------------------------------------------
# What stands in two places is the same


def test_rl_of_7b_has_one_command():
    command = next(block for block in fenced("README.md", "bash") if "--nproc_per_node=8" in block)
    assert any(command in block for block in fenced("docs/large.md", "bash"))


def test_the_readmes_results_are_those_of_the_findings():
    text = read("README.md")
    part = text[text.index("\n## Results\n"):text.index("\n## The files\n")]
    rows = re.findall(r"^\| [^|]+(\| [\d.]+ \(.*)$", part, re.MULTILINE)
    assert len(rows) >= 2
    for row in rows:
        assert row.rstrip(" |") in read("docs/findings.md"), f"README.md: {row}"


def test_rows_of_the_readme_are_rows():
    question, instruction, trajectory = (json.loads(block) for block in fenced("README.md", "json"))
    tools.check_question(question)
    for row in (instruction, trajectory):
        tools.check_trajectory(row)
    assert trajectory["turns"][0]["learn"] is False


@pytest.mark.parametrize("heading, scripts", [
    ("## Reinforcement learning", ["rl.py", "evaluate.py"]), ("## Evaluation", ["evaluate.py"])])
def test_metrics_that_are_explained_exist(heading, scripts):
    """The first column of the tables: keys that the code writes, as a string or as a keyword."""
    written = set()
    for node in (node for script in scripts for node in ast.walk(tree(script))):
        if isinstance(node, (ast.Constant, ast.keyword)):
            written.add(node.value if isinstance(node, ast.Constant) else node.arg)
    part = read("docs/metrics.md").split(heading + "\n")[1].split("\n## ")[0]
    explained = {name for line in re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)
                 for name in re.findall(r"`(\w+)`", line)}
    assert len(explained) > 8 and explained <= written, explained - written
