"What make hands on: hostile words reach the commands as they are, never the shell; the same words mean the same run"
import json, os, subprocess, sys
from pathlib import Path

import pytest

from gsm8k_sft.core.config import project_root

ROOT = project_root(Path(__file__).parent)

STUB = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["SAID"], "a") as f: f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["-m", "gsm8k_sft.core.runs"]: os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    "make, with commands that only note their words; it gives its exit code, what it prints, and the words"
    venv, said = tmp_path / "venv", tmp_path / "said"
    (venv / "bin").mkdir(parents=True)
    for name in ("python", "papermill"):
        (venv / "bin" / name).write_text(STUB)
        (venv / "bin" / name).chmod(0o755)
    (venv / ".installed").touch()
    monkeypatch.setenv("SAID", str(said))
    monkeypatch.setenv("GSM8K_SFT_PATHS_RUNS", str(tmp_path / "runs here"))
    def run(*words, **environment):
        said.write_text("")
        done = subprocess.run(["make", "-C", ROOT, f"VENV={venv}", *words], capture_output=True, text=True, env=os.environ | environment)
        return done.returncode, done.stdout + done.stderr, [json.loads(line) for line in said.read_text().splitlines()]
    return run


def given(words, option):
    "What an option was given: as --option=value, or after -r and -p"
    for i, word in enumerate(words):
        if word.startswith(f"--{option}="): return word.partition("=")[2]
        if word in ("-r", "-p") and words[i + 1] == option: return words[i + 2]


def hostile(mark):
    "Words that would make the file `mark` if a shell or make took them for more than words"
    return [f"a; touch {mark}; $(touch {mark}) $(shell touch {mark}) ' ; touch {mark} '",
            f"\" ; touch {mark} \" `touch {mark}` | touch {mark} #",
            f"two words\ntouch {mark}\n$HOME ${{HOME}} $$(touch {mark}) ünï ☃ \\", "--help"]


# each variable, the target that hands it on, and the option of the command that gets it
HANDED = [("PRESET", "plan", "preset"), ("OVERRIDES", "plan", "overrides"), ("STUDY", "sweep", None),
          ("WORKERS", "sweep STUDY=x", "workers"),
          ("MINUTES", "sweep STUDY=x", "minutes"), ("RAY", "sweep", "ray"), ("HOW", "sweep STUDY=x", "how"),
          ("RUN", "evaluate", "run"), ("OVERRIDES", "evaluate RUN=x", "overrides"), ("ADAPTER", "bench", "adapter")]

@pytest.mark.parametrize("variable, target, option", HANDED)
def test_words_are_handed_on_as_they_are(make, tmp_path, variable, target, option):
    mark = tmp_path / "mark"
    for word in hostile(mark):
        for at in (0, 1): # on make's line, and in the environment
            code, said, commands = make(*target.split(), *([] if at else [f"{variable}={word}"]), **({variable: word} if at else {}))
            assert code == 0, said
            assert (given(commands[-1], option) if option else commands[-1][3]) == word
            assert not mark.exists(), (variable, word)


@pytest.mark.parametrize("variable", ["PRESET", "TUNING", "DATASET", "SEED", "OVERRIDES"])
@pytest.mark.parametrize("target", ["train", "evaluate"])
def test_a_run_that_cannot_be_is_refused_in_one_line(make, tmp_path, variable, target):
    mark = tmp_path / "mark"
    for word in hostile(mark)[:4 if variable == "OVERRIDES" else 1]: # all are handed on alike
        code, said, commands = make("-s", target, f"{variable}={word}")
        assert code and [c[2] for c in commands] == ["gsm8k_sft.core.runs"], said # nothing else was begun
        lines = [line for line in said.splitlines() if not line.startswith("make")]
        assert len(lines) == 1 and "Error: " in lines[0], said
        assert not mark.exists(), (variable, word)


def test_other_overrides_have_another_notebook_and_evaluate_finds_the_run(make, tmp_path):
    notebooks, words = set(), [[], ["OVERRIDES=train.max_steps=3"], ["OVERRIDES=train.max_steps=4"], ["OVERRIDES=run_name=mine"],
                        ["SEED=3"], ["OVERRIDES='model.path=a b; c'"], ["TUNING=lora", "DATASET=socratic"]]
    for given_words in words:
        code, said, commands = make("train", *given_words)
        assert code == 0, said
        notebook = Path(next(c for c in commands if c[0] == "papermill")[2])
        assert notebook.suffix == ".ipynb" and (ROOT / notebook).parent.samefile(tmp_path / "runs here" / "toy")
        _, _, commands = make("evaluate", *given_words)
        assert f"--run={notebook.with_suffix('')}" == commands[-1][-1]
        notebooks.add(notebook)
    assert len(notebooks) == len(words)


def test_an_executed_notebook_is_kept_when_the_same_words_train_again(make, tmp_path):
    notebook = tmp_path / "runs here" / "toy" / "full_main-s0.ipynb"
    notebook.parent.mkdir(parents=True)
    for text in ("first", "second"):
        notebook.write_text(text)
        make("evaluate")
        assert notebook.read_text() == text
        assert make("train")[0] == 0 and not notebook.exists()
    kept = {p.name: p.read_text() for p in notebook.parent.glob("*.ipynb")}
    assert kept == {"full_main-s0.previous.ipynb": "first", "full_main-s0.2.previous.ipynb": "second"}


def test_seed_of_the_demo_is_only_printed(make, tmp_path):
    "And a wrong one is refused before anything begins"
    code, said, commands = make("demo", f"SEED=$(touch {tmp_path}/mark)")
    assert code and "[1/3]" not in said and f"'$(touch {tmp_path}/mark)' is not a whole number" in said and len(commands) == 1
    assert not (tmp_path / "mark").exists()


def test_the_demo_trains_both_ways_side_by_side(make):
    code, said, commands = make("-s", "demo", "SEED=7")
    assert code == 0 and [line[:5] for line in said.splitlines()] == ["[1/3]", "[2/3]", "[3/3]"], said
    runs = {given(c, "tuning"): c for c in commands if c[0] == "papermill"}
    assert runs.keys() == {"full", "lora"} and all(given(c, "preset") == "toy" and given(c, "seed") == "7" for c in runs.values())
    assert [c[2] for c in (commands[1], commands[-1])] == ["gsm8k_sft.evaluate", "gsm8k_sft.analysis"]
