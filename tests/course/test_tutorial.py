"""course/tutorial.md: every command in it runs, in its order, at toy size, and the last one prints
what the page says."""

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess

from support.launch import ROOT, checked, run_here, run_script

# flags that are added to the page's commands; of a flag that is given twice the last one counts
TOY_FLAGS = {
    "build_data.py": "--train 24 --test 3 --val 6 --scenes 2 --workers 1",
    "collect_coldstart.py": "--workers 1",
    "sft.py": "--steps 1 --batch_size 2",
    "evaluate.py": "--limit 2 --num_samples 1 --budgets 1 2 --max_new_tokens 8",
    "rl.py": "--steps 1 --prompts_per_step 2 --group_size 2 --resample 0 --eval_size 2 "
             "--eval_turns 6 --max_new_tokens 8"}


def run_line(line):
    """Run one line of shell. A stage runs in this process, so that torch is not imported again;
    torchrun and other programs run as they are."""
    program, *words = shlex.split(line)
    if program not in ("python", "torchrun"):
        subprocess.run(line, shell=True, check=True, capture_output=True)
        return
    script = next(word for word in words if word.endswith(".py"))
    words += TOY_FLAGS.get(script, "").split()
    if program == "torchrun":
        run_script(*words[1:], nproc=2)
    else:
        checked(run_here(*words))


def run_python(block, folder):
    """Run a block "python - <<'END' ... END" in this process, as a file in `folder`, and return
    what it prints."""
    script = folder / "block.py"
    script.write_text(block.split("\n", 1)[1].rsplit("END", 1)[0], encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(script))
    return printed.getvalue()


def test_every_command_runs_at_toy_size(tmp_path, monkeypatch):
    page = (ROOT / "course" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if block.startswith("python - <<'END'\n"):
            printed = run_python(block, tmp_path)
        else:
            for line in re.sub(r"\\\n", " ", block).splitlines():
                run_line(line)
    # the last block: measured slopes next to those of the formula
    pairs = re.findall(r"b = [\d.]+: ([-+.\d]+), by the formula ([-+.\d]+)", printed)
    assert len(pairs) == 4
    for measured, expected in pairs:
        assert abs(float(measured) - float(expected)) < 0.02
