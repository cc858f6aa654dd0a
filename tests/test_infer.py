"Questions from a file and from the command line: every bad line, every bad path, nothing lost"
import json, os, shutil, signal, subprocess, sys, time
import pytest, torch
from commands import finish
from transformers import set_seed
from gsm8k_sft.core.config import load_config
from gsm8k_sft.core.runs import save_config, write_json
from gsm8k_sft.grading.answers import GRADERS, extract_numeric, grade, to_number
from gsm8k_sft.infer import InferError, _plain, answer, answer_all, infer_file, open_model, read_questions
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
    (b'{"question": "a", "id": true}', "the id must be"),
    (b'{"question": "\xff"}', "not UTF-8"),
    (b"[" * 100_000, "not JSON"),
    (rb'{"question": "half \ud83d an emoji"}', "half of a character"),
    (rb'{"question": "a", "id": "\udc00"}', "half of a character"),
    (b'{"question": "a", "id": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"question": "a", "id": NaN}', "the id must be"),
    (b"\xff\xfe{\x00", "not UTF-8"),
]

@pytest.mark.parametrize("line, says", BAD)
def test_bad_line_is_reported_with_its_number(tmp_path, line, says):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "one"}\n\n' + line + b'\n{"question": "two", "id": "b"}\n')
    found, problems = read_questions(path)
    assert [(r["line"], r["id"], r["question"]) for r in found] == [(1, None, "one"), (4, "b", "two")]
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
    assert [r["line"] for r in found] == [1, 2, 3] and [p.name for p in tmp_path.glob("*.partial*")] == []
    assert set(found[0]) == {"line", "id", "question", "answer", "final", *(f"final_{g}" for g in GRADERS), "n_tokens", "finish_reason"}
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
    assert report["answered"] == 1 and [(r["line"], r["id"]) for r in rows(tmp_path / "a.jsonl")] == [(2, None)]
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

def test_an_id_that_is_another_line_s_number(toy, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "What is 2 + 2?", "id": 2}\n{"question": "What is 3 + 3?"}\n')
    infer_file(tmp_path / "q.jsonl", tmp_path / "a.jsonl", *toy, max_new_tokens=4, progress=False)
    assert [(r["line"], r["id"]) for r in rows(tmp_path / "a.jsonl")] == [(1, 2), (2, None)]

def test_odd_lines_that_are_questions(toy, tmp_path):
    "The same id twice, a NUL, a byte order mark within the file, Windows line ends, a key given twice; one line of megabytes is left out"
    lines = [b'{"question": "What is 2 + 2?", "id": "a"}', b'{"question": "What is 3 + 2?", "id": "a"}\r', rb'{"question": "a\u0000b"}',
             b'\xef\xbb\xbf{"question": "marked"}', b'{"question": "' + b"x" * 1_000_000 + b'"}', b'{"question": "a", "question": "last"}']
    (tmp_path / "q.jsonl").write_bytes(b"\n".join(lines))
    report = infer_file(tmp_path / "q.jsonl", tmp_path / "a.jsonl", *toy, max_new_tokens=4, progress=False)
    assert [(r["line"], r["id"]) for r in rows(tmp_path / "a.jsonl")] == [(1, "a"), (2, "a"), (3, None), (4, None), (6, None)]
    assert rows(tmp_path / "a.jsonl")[-1]["question"] == "last" and len(report["problems"]) == 1 and "line 5: " in report["problems"][0]

def test_half_a_character_on_the_command_line():
    done = command("--model_path", "toy", "--question", b"half \xff of it".decode("utf-8", "surrogateescape"))
    assert done.returncode == 1 and "half of a character (a lone surrogate) at position 5" in done.stderr and "Traceback" not in done.stderr

def test_a_bad_question_among_others_is_numbered(toy):
    with pytest.raises(InferError, match="question 2: half of a character"): answer_all([QUESTIONS[0], "\ud83d"], *toy)
    with pytest.raises(InferError, match="^the question is empty"): answer("\n", *toy)

def test_the_final_number_is_the_graded_one():
    texts = {r"\boxed{1{,}200}": "1200", "#### 3/4": "0.75", "#### 1/3": "1/3", "#### -$1,080.50.": "-1080.5", "#### 0.00001": "0.00001",
             "#### 50%": "50", "#### \u22123": "-3", "#### 1 1/2": "1.5", r"\boxed{-\frac{7}{2}}": "-3.5", "#### 1,2": None,
             "#### 1/0": None, "#### 1,234,567.80": "1234567.8",
             "18 or 19": None, "She has 9 eggs and 2 pens": None, "####": None, "#### 18 thousand": "18000"}
    assert {t: _plain(to_number(extract_numeric(t))) for t in texts} == texts
    for text, final in texts.items(): assert final is None or grade(text, final)["numeric"]

# Opening

def test_run_adapter_and_base_are_told_apart(lora_run):
    base, _, _ = open_model("toy")
    run, _, cfg = open_model(lora_run)
    apart, _, _ = open_model("toy", lora_run)
    by_folder, _, _ = open_model("toy", lora_run / "adapter")
    prints = [weights_fingerprint(m) for m in (run, apart, by_folder, base)]
    assert prints[0] == prints[1] == prints[2] != prints[3] and cfg.tuning_method == "lora"

def test_adapter_brings_its_own_tokenizer(lora_run, tmp_path):
    shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    changed = load_tokenizer("toy")
    changed.add_tokens(["<own>"])
    changed.save_pretrained(tmp_path / "adapter")
    vocabularies = [open_model("toy", folder)[1].get_vocab() for folder in (tmp_path / "adapter", lora_run / "adapter")]
    assert ["<own>" in v for v in vocabularies] == [True, False]

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

def test_command_answers_a_file(questions, tmp_path, lora_run, start):
    with questions.open("a") as f: f.write("broken\n")
    code, said = finish(start("infer", "--model_path", "toy", "--adapter_path", lora_run,
                              "--input", questions, "--output", tmp_path / "a.jsonl", "--max_new_tokens", 8))
    assert code == 0 and "3 answered, 1 skipped" in said and f"skipped: {questions}, line 4: not JSON" in said, said
    assert len(rows(tmp_path / "a.jsonl")) == 3

def test_command_answers_a_question(toy, start):
    code, said = finish(start("infer", "--model_path", "toy", "--question", QUESTIONS[0], "--max_new_tokens", 16))
    assert code == 0 and answer(QUESTIONS[0], *toy, max_new_tokens=16)["answer"].strip() in said and "final number: " in said

@pytest.mark.parametrize("args, says", [(["--question", "What?"], "--model_path is missing"), (["--model_path", "toy"], 'give --question'),
    (["--model_path", "toy", "--input", "none.jsonl", "--output", "a.jsonl"], "none.jsonl: no such file"),
    (["--model_path", "toy", "--question", ""], "the question is empty"),
    (["--model_path", "toy", "--question", "What?", "--dtype", "int4"], "not one of auto, bf16, fp16, fp32"),
    (["--model_path", "toi", "--question", "What?"], "toi"), (["--model_path", "./none", "--question", "What?"], "no such model folder")])
def test_command_says_what_is_wrong(args, says, tmp_path):
    done = command(*args, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

def test_interrupted_command_goes_on(tmp_path, start):
    "Ctrl+C while it works; what was answered is kept to the letter, and the same command answers the rest"
    path, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS * 20))
    args = ["--model_path", "toy", "--input", path, "--output", out, "--batch_size", 1, "--max_new_tokens", 64]
    process, partial = start("infer", *args), tmp_path / "a.jsonl.partial.jsonl"
    while process.is_alive() and not (partial.exists() and partial.read_bytes().count(b"\n") > 2): time.sleep(0.02) # it is at work
    os.kill(process.pid, signal.SIGINT)
    code, said = finish(process)
    assert code == 1 and "interrupted; answers of a file are kept" in said and not out.exists()
    kept = rows(partial)[1:]
    assert 0 < len(kept) < 60
    with partial.open("a") as f: f.write('{"line": 60, "cut')
    code, said = finish(start("infer", *args))
    assert code == 0 and f"60 answered ({len(kept)} of them before it was interrupted), 0 skipped" in said, said
    found = rows(out)
    assert [r["line"] for r in found] == list(range(1, 61)) and all(r in found for r in kept) and not partial.exists()

def test_answers_of_other_settings_are_not_mixed(toy, questions, tmp_path):
    out, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial.jsonl"
    partial.write_text('{"protocol": "another", "name": "a.jsonl"}\n{"line": 1, "id": "q0", "answer": "not from here"}\n')
    assert infer_file(questions, out, *toy, max_new_tokens=4, progress=False)["kept"] == 0
    assert "not from here" not in out.read_text() and "not from here" in next((tmp_path / "previous").iterdir()).read_text()

def test_another_tool_s_config_beside_a_model(lora_run, tmp_path):
    load_weights(resolve_model("toy"), "fp32").save_pretrained(tmp_path)
    load_tokenizer("toy").save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("model: ${oc.env:NOT_SET}\nlr: [1, 2\n")
    model, _, cfg = open_model(tmp_path)
    assert cfg is None and weights_fingerprint(model) == weights_fingerprint(open_model("toy")[0])
    assert open_model(tmp_path, lora_run)[2].tuning_method == "lora"

def test_an_output_that_cannot_be_written_is_noticed_first(questions, tmp_path):
    (tmp_path / "file").write_text("")
    done = command("--model_path", "./no-model", "--input", questions, "--output", tmp_path / "file" / "a.jsonl")
    assert done.returncode == 1 and "can't be written" in done.stderr and "Traceback" not in done.stderr
