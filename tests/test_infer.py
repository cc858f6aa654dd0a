"Questions from a file and from the command line: every bad line, every bad path, whole or absent"
import json, os, signal, subprocess, sys
import pytest, torch
from gsm8k_sft.core.config import load_config
from gsm8k_sft.core.runs import save_config, set_seed, write_json
from gsm8k_sft.infer import InferError, answer, answer_all, infer_file, open_model, read_questions
from gsm8k_sft.models.adapters import add_adapter
from gsm8k_sft.models.loading import load_tokenizer, load_weights
from gsm8k_sft.models.sources import ModelError, resolve_model, weights_fingerprint

QUESTIONS = [
    "Tom has 3 bags of 4 apples. How many apples has he?",
    "What is 2 + 2?",
    "Ann had 9 pens, gave 4 away and bought 2. How many has she?",
]


@pytest.fixture(scope="module")
def toy(): return open_model("toy")[:2]

@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": q, "id": f"q{i}"}) + "\n" for i, q in enumerate(QUESTIONS)))
    return path

def rows(path): return [json.loads(l) for l in path.read_text(encoding="utf-8").splitlines()]

def command(*args, **kwargs):
    return subprocess.run([sys.executable, "-m", "gsm8k_sft.infer", *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)

@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    "A run folder with an adapter that changes the answers"
    folder = tmp_path_factory.mktemp("runs") / "lora_main-s0"
    cfg = load_config("toy", "lora")
    set_seed(0)
    base = load_weights(resolve_model("toy"), "fp32")
    fingerprint = weights_fingerprint(base)
    model = add_adapter(base, cfg)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.1)
    save_config(cfg, folder)
    model.save_pretrained(folder / "adapter")
    write_json(folder / "record.json", {"status": "complete", "model_fingerprint": fingerprint})
    return folder


# Reading

BAD = [
    (b'{"question": "a"', "not JSON"),
    (b'"text"', "not str"),
    (b"[1]", "not list"),
    (b"null", "not NoneType"),
    (b'{"q": "a"}', "no text under the key 'question'"),
    (b'{"question": 7}', "no text under"),
    (b'{"question": "  "}', "no text under"),
    (b'{"question": "a", "id": [1]}', "the id must be"),
    (b'{"question": "a", "id": null}', "the id must be"),
    (b'{"question": "\xff"}', "not UTF-8"),
    (b"[" * 100_000, "not JSON"),
]

@pytest.mark.parametrize("line, says", BAD)
def test_bad_line_is_reported_with_its_number(tmp_path, line, says):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "one"}\n\n' + line + b'\n{"question": "two", "id": "b"}\n')
    found, problems = read_questions(path)
    assert [(r["line"], r["id"], r["question"]) for r in found] == [(1, 1, "one"), (4, "b", "two")]
    assert len(problems) == 1 and f"{path}, line 3: " in problems[0] and says in problems[0]

def test_windows_lines_byte_order_mark_and_no_last_newline(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes('\ufeff{"question": "zwölf €?"}\r\n{"question": "two"}'.encode())
    found, problems = read_questions(path)
    assert [r["question"] for r in found] == ["zwölf €?", "two"] and not problems

def test_line_separators_inside_a_question_are_no_line_ends(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(path)[0][0]["question"] == "a\u2028b\x85c"


# Answering

def test_answers_keep_the_questions_order(toy, questions, tmp_path):
    report = infer_file(questions, tmp_path / "a.jsonl", *toy, max_new_tokens=12, batch_size=2, progress=False)
    found = rows(tmp_path / "a.jsonl")
    assert report["answered"] == 3 and [r["id"] for r in found] == ["q0", "q1", "q2"] and [r["question"] for r in found] == QUESTIONS
    assert set(found[0]) == {"id", "question", "answer", "final", "final_strict", "final_flexible", "n_tokens", "finish_reason"}
    assert all(r["n_tokens"] <= 12 and r["finish_reason"] in ("stop", "length") for r in found)

def test_one_question_is_answered_as_in_a_file(toy):
    alone = answer(QUESTIONS[0], *toy, max_new_tokens=16)
    assert alone == answer_all(QUESTIONS, *toy, max_new_tokens=16, progress=False)[0]

def test_too_long_a_question_costs_only_itself(toy, tmp_path):
    model = toy[0]
    room = model.config.max_position_embeddings
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "How many? " * room}) + "\n" + json.dumps({"question": QUESTIONS[1]}) + "\n")
    report = infer_file(path, tmp_path / "a.jsonl", *toy, max_new_tokens=8, progress=False)
    assert report["answered"] == 1 and [r["id"] for r in rows(tmp_path / "a.jsonl")] == [2]
    assert f"{path}, line 1: " in report["problems"][0] and f"exceed the model's {room} positions" in report["problems"][0]

def test_nothing_to_answer_writes_nothing(toy, tmp_path):
    (tmp_path / "q.jsonl").write_text("\n[]\n")
    with pytest.raises(InferError, match="line 2: .*\n.*no question could be read"):
        infer_file(tmp_path / "q.jsonl", tmp_path / "a.jsonl", *toy)
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]

def test_existing_output_is_kept_unless_told(toy, questions, tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text("precious")
    with pytest.raises(InferError, match="exists: choose another name, or --overwrite"): infer_file(questions, out, *toy)
    assert out.read_text() == "precious"
    infer_file(questions, out, *toy, max_new_tokens=4, overwrite=True, progress=False)
    assert len(rows(out)) == 3

@pytest.mark.parametrize("overwrite", [True, False])
def test_input_is_never_the_output(toy, questions, overwrite):
    with pytest.raises(InferError, match="the same file"): infer_file(questions, questions, *toy, overwrite=overwrite)

def test_output_is_whole_or_absent(toy, questions, tmp_path, monkeypatch):
    def breaks(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr("gsm8k_sft.infer.answer_all", breaks)
    with pytest.raises(KeyboardInterrupt): infer_file(questions, tmp_path / "a.jsonl", *toy)
    assert [p.name for p in tmp_path.iterdir()] == ["questions.jsonl"]


# Opening

def test_run_adapter_and_base_are_told_apart(lora_run):
    base, _, _ = open_model("toy")
    run, _, cfg = open_model(lora_run)
    apart, _, _ = open_model("toy", lora_run)
    by_folder, _, _ = open_model("toy", lora_run / "adapter")
    prints = [weights_fingerprint(m) for m in (run, apart, by_folder, base)]
    assert prints[0] == prints[1] == prints[2] != prints[3] and cfg.tuning_method == "lora"

def test_dtype_is_as_asked(lora_run):
    assert open_model("toy", dtype="bf16")[0].dtype == torch.bfloat16
    assert open_model(lora_run)[0].dtype == torch.float32

def test_run_with_an_adapter_is_a_mistake(lora_run):
    with pytest.raises(InferError, match="leave --adapter_path out"): open_model(lora_run, lora_run)

def test_missing_adapter_is_noticed_before_the_base_is_loaded(tmp_path):
    with pytest.raises(ModelError, match="no adapter here"): open_model("./no-model-either", tmp_path)

def test_adapter_on_other_weights_is_refused(lora_run, tmp_path):
    other = load_weights(resolve_model("toy"), "fp32")
    other.model.norm.weight.data += 0.1
    other.save_pretrained(tmp_path)
    load_tokenizer("toy").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="trained on other base weights"): open_model(tmp_path, lora_run)


# The command

def test_command_answers_a_file(questions, tmp_path, lora_run):
    with questions.open("a") as f: f.write("broken\n")
    done = command("--model_path", "toy", "--adapter_path", lora_run,
                   "--input", questions, "--output", tmp_path / "a.jsonl", "--max_new_tokens", 8)
    assert done.returncode == 0 and "3 answered, 1 skipped" in done.stdout, done.stderr
    assert f"skipped: {questions}, line 4: not JSON" in done.stderr
    assert len(rows(tmp_path / "a.jsonl")) == 3

def test_command_answers_a_question(toy):
    done = command("--model_path", "toy", "--question", QUESTIONS[0], "--max_new_tokens", 16)
    assert done.returncode == 0 and done.stdout.strip() == answer(QUESTIONS[0], *toy, max_new_tokens=16)["answer"].strip()
    assert "final number: " in done.stderr

@pytest.mark.parametrize("args, says", [(["--question", "What?"], "--model_path is missing"), (["--model_path", "toy"], 'give --question'),
    (["--model_path", "toy", "--input", "none.jsonl", "--output", "a.jsonl"], "none.jsonl: no such file"),
    (["--model_path", "toy", "--question", ""], "the question is empty"),
    (["--model_path", "toy", "--question", "What?", "--dtype", "int4"], "not one of bf16, fp32"),
    (["--model_path", "toi", "--question", "What?"], "toi"), (["--model_path", "./none", "--question", "What?"], "no such model folder")])
def test_command_says_what_is_wrong(args, says, tmp_path):
    done = command(*args, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

def test_interrupted_command_leaves_nothing(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS * 400))
    args = ["--model_path", "toy", "--input", path, "--output", tmp_path / "a.jsonl", "--batch_size", 1, "--max_new_tokens", 64]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # tests that run in the background of a shell inherit that it is ignored
    line = [sys.executable, "-m", "gsm8k_sft.infer", *map(str, args)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=listen)
    assert "answered" in process.stdout.readline() # it is at work
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted: nothing was written" in err
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]
