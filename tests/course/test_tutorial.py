"""course/tutorial.md: every command in it runs, in its order, at toy size, and its last one shows
what it says."""

import contextlib
import io
import re
import shlex
import subprocess

from support.launch import ROOT, run_here, run_script

TOY = {     # a flag that is given twice counts as it was given last
    "build_data.py": "--train 24 --test 3 --val 6 --scenes 2 --workers 1",
    "collect_coldstart.py": "--workers 1", "sft.py": "--steps 1 --batch_size 2",
    "evaluate.py": "--limit 2 --num_samples 1 --budgets 1 2 --max_new_tokens 8",
    "rl.py": "--steps 1 --prompts_per_step 2 --group_size 2 --resample 0 --eval_size 2 --eval_turns 2 "
             "--max_new_tokens 8"}


def run_line(line):
    """One line of shell: a stage in this process, so that torch is not imported again; torchrun and
    other programs as they are."""
    program, *words = shlex.split(line)
    if program not in ("python", "torchrun"):
        return subprocess.run(line, shell=True, check=True, capture_output=True)
    flags = TOY.get(words[-1] if words[-1].endswith(".py") else
                    next(word for word in words if word.endswith(".py")), "").split()
    if program == "torchrun":
        return run_script(*words[1:], *flags, nproc=2)
    done = run_here(*words, *flags)
    assert done.returncode == 0, (line, done.stderr)
    return done


def test_every_command_runs_at_toy_size(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if block.startswith("python - <<'END'\n"):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(block.split("\n", 1)[1].rsplit("END", 1)[0], {})
        else:
            for line in re.sub(r"\\\n", " ", block).splitlines():
                run_line(line)
    assert len(blocks) == 8
    pairs = re.findall(r"b = [\d.]+: ([-+.\d]+), by the formula ([-+.\d]+)", said.getvalue())
    assert len(pairs) == 4
    for found, expected in pairs:
        assert abs(float(found) - float(expected)) < 0.02
