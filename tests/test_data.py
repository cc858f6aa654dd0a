"""Damaged files of every kind, both layouts, other tokenizers, a damaged cache."""
import json, os, re, time

import pyarrow as pa, pyarrow.parquet as pq, pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gsm8k_sft.core.config import load_config
from gsm8k_sft.data.datasets import Collator, TRAINING_SPLITS, data_fingerprint, load_gsm8k, refuse_test, tokenize_split
from gsm8k_sft.data.labels import LabelError, check_labels, encode, inspect_labels
from gsm8k_sft.data.problems import DataError
from gsm8k_sft.data.prompts import Renderer
from gsm8k_sft.data.synthetic import make_rows, toy_model_path

GEMMA = ("{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
         " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHOT = {"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"}


def problem(i):
    "A problem of its own for each `i`, with a line separator (U+2028) in its question"
    answer = f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i} eggs.\n#### {2 * i:,}"
    return {"question": f"Ann has {i} eggs \u2028 and {i} more. How many?", "answer": answer}


ROWS = [problem(i) for i in range(600, 620)]


def jsonl(rows): return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode("utf-8", "surrogatepass")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A good folder in GitHub's layout; GSM8K_DIR and the cache point into the test's own"
    monkeypatch.setenv("GSM8K_SFT_PATHS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GSM8K_DIR", raising=False)
    good = tmp_path / "gsm8k"
    good.mkdir()
    for name, rows in (("train", ROWS[:15]), ("test", ROWS[15:])):
        (good / f"{name}.jsonl").write_bytes(jsonl(rows))
        (good / f"{name}_socratic.jsonl").write_bytes(jsonl({**r, "answer": "How many? ** " + r["answer"]} for r in rows))
    return good


def config(folder=None, dataset="main", **data):
    given = {"source": "auto", **({"folder": folder} if folder else {}), **data}
    return load_config("toy", dataset=dataset, overrides=[f"data.{k}={v}" for k, v in given.items()])


def parquet(folder, shards=1):
    "The JSONL files of `folder` as the hub lays them out"
    for dataset, suffix in (("main", ""), ("socratic", "_socratic")):
        (folder / dataset).mkdir()
        for split in ("train", "test"):
            source = folder / f"{split}{suffix}.jsonl"
            rows = [json.loads(line) for line in source.read_bytes().decode().split("\n") if line]
            for i in range(shards):
                part = rows[len(rows) * i // shards:len(rows) * (i + 1) // shards]
                pq.write_table(pa.Table.from_pylist(part), folder / dataset / f"{split}-{i:05}-of-{shards:05}.parquet")
            source.unlink()


# reading

def test_a_good_folder(folder):
    data = load_gsm8k(config(folder, validation_fraction=0.2))
    assert {s: len(d) for s, d in data.items()} == {"train": 12, "validation": 3, "test": 5}
    assert sorted(data["train"]["id"][:] + data["validation"]["id"][:]) == sorted(f"main/train/{i}" for i in range(15))
    assert data["test"][0] == {"id": "main/test/0", **ROWS[15], "final": "1230"}


@pytest.mark.parametrize("shards", [1, 3])
def test_parquet_gives_the_same_rows(folder, shards):
    before = [data_fingerprint(load_gsm8k(config(folder, d))) for d in ("main", "socratic")]
    parquet(folder, shards)
    assert [data_fingerprint(load_gsm8k(config(folder, d))) for d in ("main", "socratic")] == before


DAMAGE = {
    b"": "train.jsonl: the file is empty",
    b"\n \n": "train.jsonl: the file is empty",
    b"\xef\xbb\xbf" + jsonl(ROWS[:2]): "line 1: starts with a byte order mark",
    jsonl(ROWS[:2]).decode().encode("utf-16"): "train.jsonl: encoded as UTF-16",
    jsonl(ROWS[:2]).replace(b"eggs", b"\xc3\x28", 1): "line 1: not UTF-8: byte 0xc3",
    jsonl(ROWS[:2]) + b"\n" + jsonl(ROWS[2:3]): "line 3: the line is blank",
    jsonl(ROWS[:2])[:-9]: "line 2: not valid JSON",
    jsonl(ROWS[:1]) + b"[" * 100_000 + b"\n": "line 2: not valid JSON",
    jsonl(ROWS[:1]) + b"\x00" * 20 + b"\n": "line 2: not valid JSON",
    jsonl([ROWS[0], ["question", "answer"]]): "line 2: an object with question and answer is needed, not list",
    jsonl([{"question": "?"}]): "line 1: the field 'answer' is missing",
    jsonl([{**ROWS[0], "answer": None}]): "line 1: the field 'answer' is NoneType, not text",
    jsonl([{**ROWS[0], "question": " "}]): "line 1: the field 'question' is empty",
    jsonl([{**ROWS[0], "question": "a\x00b"}]): "line 1: the field 'question' holds U+0000 at character 2",
    json.dumps({**ROWS[0], "question": "a\ud800"}).encode(): "line 1: the field 'question' holds U+D800",
    jsonl([{**ROWS[0], "answer": "5 eggs"}]): "line 1: the answer has no '####'",
    jsonl([{**ROWS[0], "answer": "#### 5\n#### 6"}]): "line 1: the answer has 2 '####'",
    jsonl([{**ROWS[0], "answer": "#### 5\nmore"}]): "line 1: the answer's last line is 'more'",
    jsonl([{**ROWS[0], "answer": "5\n#### five"}]): "line 1: '#### five' does not end in a number",
    jsonl([{**ROWS[0], "answer": "5\n#### "}]): "line 1: ",
    jsonl([{**ROWS[0], "answer": "12\n#### 1,2"}]): "line 1: '#### 1,2' does not end in a number",
    jsonl([ROWS[0], ROWS[1], ROWS[0]]): "line 3: the same question as",
    jsonl([ROWS[0], ROWS[16]]): "test.jsonl line 2: the same question as",
}


@pytest.mark.parametrize("damaged, says", DAMAGE.items(), ids=range(len(DAMAGE)))
def test_damaged_jsonl(folder, damaged, says):
    (folder / "train.jsonl").write_bytes(damaged)
    with pytest.raises(DataError, match=re.escape(says)) as e: load_gsm8k(config(folder))
    assert str(folder) in str(e.value) and "GSM8K_DIR" in str(e.value)


def test_other_fields_of_a_row_change_nothing(folder):
    before = load_gsm8k(config(folder))
    (folder / "train.jsonl").write_bytes(jsonl([{"id": "mine/test/1", "final": "7", **r, "level": 3} for r in ROWS[:15]]))
    assert load_gsm8k(config(folder))["train"][:] == before["train"][:]


def test_all_problems_are_reported_up_to_ten(folder):
    (folder / "train.jsonl").write_bytes(jsonl([{**r, "answer": "5"} for r in ROWS[:12]]))
    with pytest.raises(DataError) as e: load_gsm8k(config(folder))
    assert str(e.value).startswith("12 problems") and str(e.value).count("has no '####'") == 10 and "and 2 more" in str(e.value)


def test_windows_line_ends_are_fine(folder):
    before = data_fingerprint(load_gsm8k(config(folder)))
    (folder / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    assert data_fingerprint(load_gsm8k(config(folder))) == before


def test_missing_files_and_folders(folder, monkeypatch):
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match="neither test.jsonl nor main/test-00000-of-00001.parquet"): load_gsm8k(config(folder))
    monkeypatch.setenv("GSM8K_DIR", str(folder / "gone"))
    with pytest.raises(DataError, match="GSM8K_DIR: there is no folder"): load_gsm8k(config())
    monkeypatch.delenv("GSM8K_DIR")
    with pytest.raises(DataError, match="data.source: folder, but nothing names one"): load_gsm8k(config(source="folder"))


def test_damaged_parquet(folder):
    parquet(folder)
    path = folder / "main" / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], b"<html>"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="train-00000-of-00001.parquet: not readable as parquet"): load_gsm8k(config(folder))
    path.rename(path.with_name("train-00000-of-00002.parquet"))
    with pytest.raises(DataError, match="1 of 2 shards of train"): load_gsm8k(config(folder))


@pytest.mark.parametrize("columns, says", [
    ({"question": ["a", "b"]}, "row 0: the field 'answer' is missing"),
    ({"question": ["a", "b"], "answer": ["#### 1", None]}, "row 1: the field 'answer' is NoneType"),
    ({"question": [1, 2], "answer": ["#### 1", "#### 2"]}, "row 0: the field 'question' is int"),
    ({"question": ["a", "a"], "answer": ["#### 1", "#### 1"]}, "row 1: the same question as"),
    ({"question": pa.array([b"a", b"\xff"]).view(pa.string()), "answer": ["#### 1", "#### 1"]}, "row 1: the field 'question' is not UTF-8"),
    ({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}, "the file is empty"),
])
def test_damaged_parquet_rows(folder, columns, says):
    parquet(folder)
    pq.write_table(pa.table(columns), folder / "main" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=re.escape(says)): load_gsm8k(config(folder))


def test_hub_unreachable_says_what_to_do(monkeypatch):
    start = time.perf_counter()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="use the preset toy") as e: load_gsm8k(config(source="hub", hub_name="nobody/no-such-data"))
    assert time.perf_counter() - start < 20 and "variable. Set data.folder" in str(e.value), "one full stop"


def test_what_a_library_says_ends_in_one_full_stop(folder):
    parquet(folder)
    (folder / "main" / "train-00000-of-00001.parquet").write_bytes(b"no parquet, but long enough for a footer")
    with pytest.raises(DataError, match=r"not readable as parquet: .*[a-z]\. Correct the data, or"): load_gsm8k(config(folder))


def test_hub_loading(folder):
    "`datasets` reads a dataset repository from a local copy as it does from the hub"
    before = data_fingerprint(load_gsm8k(config(folder)))
    parquet(folder)
    entry = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*\n  - split: test\n    path: {0}/test-*\n"
    files = "".join(entry.format(c) for c in ("main", "socratic"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert data_fingerprint(load_gsm8k(config(source="hub", hub_name=folder))) == before


# splits

def test_validation_is_the_same_for_main_and_socratic_and_in_any_order(folder):
    main, socratic = (load_gsm8k(config(folder, d, validation_fraction=0.3)) for d in ("main", "socratic"))
    assert main["validation"]["question"][:] == socratic["validation"]["question"][:]
    (folder / "train.jsonl").write_bytes(jsonl(reversed(ROWS[:15])))
    def held(**data): return set(load_gsm8k(config(folder, validation_fraction=0.3, **data))["validation"]["question"])
    assert held() == set(main["validation"]["question"])
    assert held(validation_seed=1) != set(main["validation"]["question"])


def test_test_problems_never_reach_training(folder):
    cfg = config(folder)
    assert list(load_gsm8k(cfg, TRAINING_SPLITS)) == ["train", "validation"]
    tokenizer = AutoTokenizer.from_pretrained(toy_model_path())
    for rows in (load_gsm8k(cfg)["test"], [{"id": "synthetic-main/test/0", **SHOT}]):
        with pytest.raises(DataError, match="a problem of the test split"): tokenize_split(rows, tokenizer, Renderer(tokenizer), 512)
        with pytest.raises(DataError, match="a problem of the test split"): refuse_test(rows)


def test_the_one_shot_example_is_of_train_alone(folder):
    def with_shot(row, **data):
        cfg = config(folder, **data)
        cfg.one_shot_example.question = row["question"]
        return cfg
    held = load_gsm8k(config(folder, validation_fraction=0.3))["validation"]
    for row in held: assert row["question"] not in load_gsm8k(with_shot(row, validation_fraction=0.3))["validation"]["question"]
    with pytest.raises(DataError, match="one_shot_example: is a problem of the test split"): load_gsm8k(with_shot(ROWS[16]))


def test_samples_and_no_validation(folder):
    data = load_gsm8k(config(folder, train_samples=4, test_samples=2, validation_fraction=0))
    assert {s: len(d) for s, d in data.items()} == {"train": 4, "validation": 0, "test": 2}
    tokenizer = AutoTokenizer.from_pretrained(toy_model_path())
    assert tokenize_split(data["validation"], tokenizer, Renderer(tokenizer), 512)[1]["n"] == 0


def test_toy_problems_pass_the_same_checks():
    for dataset in ("main", "socratic"): load_gsm8k(load_config("toy", dataset=dataset))


# tokenizers

def tokenizer(bos=None, eos="<eos>", pad="<pad>", template=None, adds_bos=False, extra=()):
    "A byte-level tokenizer with these special tokens"
    specials = list(dict.fromkeys(t for t in (pad, eos, bos, *extra) if t))
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    if adds_bos: backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, specials.index(bos))])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=list(extra))
    made.chat_template = template
    return made


TURNS, IM = ("<start_of_turn>", "<end_of_turn>"), ("<|im_start|>", "<|im_end|>")
KINDS = { # tokenizer; style, BOS tokens in a prompt, end, stops
    "gemma-it": (tokenizer("<bos>", template=GEMMA, adds_bos=True, extra=TURNS), "chat", 1, "<end_of_turn>", ["<end_of_turn>", "<eos>"]),
    "gemma-base": (tokenizer("<bos>", adds_bos=True, extra=TURNS), "plain", 1, "<eos>", ["<eos>"]),
    "template without bos": (tokenizer("<bos>", template=CHATML, adds_bos=True, extra=IM),
                             "chat", 1, "<|im_end|>", ["<|im_end|>", "<eos>"]),
    "smollm2": (tokenizer("<|im_start|>", "<|im_end|>", "<|im_end|>", CHATML, extra=("<|endoftext|>",)),
                "chat", 2, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "qwen": (tokenizer(None, "<|im_end|>", "<|endoftext|>", CHATML, extra=IM[:1]),
             "chat", 0, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "gpt2": (tokenizer("<|endoftext|>", "<|endoftext|>", None), "plain", 0, "<|endoftext|>", ["<|endoftext|>"]),
    "opt": (tokenizer("</s>", "</s>", "<pad>", adds_bos=True), "plain", 1, "</s>", ["</s>"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_kinds(kind):
    tok, style, n_bos, end, stops = KINDS[kind]
    renderer = Renderer(tok)
    assert (renderer.style, renderer.end_token, tok.convert_ids_to_tokens(renderer.stop_ids)) == (style, end, stops)
    for row in ROWS:
        example = check_labels(encode(row, tok, renderer), tok, renderer, 4096)
        prompt = example["input_ids"][:example["prompt_length"]]
        assert tok.bos_token is None or prompt.count(tok.bos_token_id) == n_bos
        assert tok.decode(prompt) == renderer.prompt(row["question"]) and example["input_ids"][-1] == renderer.end_token_id
    together = tok(renderer.prompt(row["question"]) + renderer.completion(row["answer"]), add_special_tokens=False)["input_ids"]
    assert together == example["input_ids"]
    shots = tok(renderer.prompt("How many?", [SHOT, SHOT]), add_special_tokens=False)["input_ids"]
    if renderer.uses_bos and end != tok.bos_token: assert shots.count(tok.bos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_bos_too_many_or_too_few_is_refused(kind):
    tok, renderer = KINDS[kind][0], Renderer(KINDS[kind][0])
    if tok.bos_token_id is None: return
    example = encode(ROWS[0], tok, renderer)
    more = {"input_ids": [tok.bos_token_id, *example["input_ids"]], "labels": [-100, *example["labels"]],
            "prompt_length": example["prompt_length"] + 1}
    with pytest.raises(LabelError): check_labels(more, tok, renderer)
    if not renderer.bos_count: return
    less = {"input_ids": example["input_ids"][1:], "labels": example["labels"][1:], "prompt_length": example["prompt_length"] - 1}
    with pytest.raises(LabelError): check_labels(less, tok, renderer)


def test_a_bos_in_the_question_is_refused():
    tok = KINDS["gemma-it"][0]
    with pytest.raises(LabelError, match="2 BOS tokens"): inspect_labels([{**SHOT, "question": "What is <bos>?"}], tok, Renderer(tok))


def test_styles_that_cannot_be():
    with pytest.raises(DataError, match="no chat template"): Renderer(KINDS["gpt2"][0], "chat")
    endless = tokenizer(template=CHATML.replace("<|im_end|>", ""))
    with pytest.raises(DataError, match="which is no special token"): Renderer(endless)
    with pytest.raises(DataError, match="names no eos token"): Renderer(tokenizer(eos=None))
    for template, says in (("{{ raise_exception('no turns') }}", "can't write question and answer \\(no turns\\)"),
                           (CHATML.partition("{% if add_generation_prompt")[0], "has no generation prompt.*<.im_start.>assistant"),
                           ("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ missing.key }}", "can't write"),
                           (CHATML.replace("m['content']", "''"), "leaves out"), # neither question nor answer
                           (CHATML.replace("m['content']", "m['content'] if m['role'] == 'user' else ''"), "leaves out"),
                           (CHATML.replace("m['content']", "m['content'] | map(attribute='text') | join"), "leaves out"), # lists of parts
                           (CHATML.replace("m['content']", "m['content'] | replace('3', '')"), "or changes them"),
                           (CHATML.replace("m['content']", "m['content'][:100]"), "or changes them"),
                           (CHATML.replace("m['content']", "(m['content'] | e if m['role'] == 'user' else m['content'])"),
                            "or changes them")):
        with pytest.raises(DataError, match=says): Renderer(tokenizer(template=template, extra=IM))
    mistral = ("{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user'"
               " else m['content'] + eos_token }}{% endfor %}")
    assert Renderer(tokenizer(template=mistral)).prompt("Why?") == "[INST] Why? [/INST]" # needs no generation prompt


def test_a_template_that_drops_earlier_turns_shows_no_examples():
    last = Renderer(tokenizer(template=CHATML.replace("in messages", "in messages[-1:]"), extra=IM))
    assert "Why?" in last.prompt("Why?")
    with pytest.raises(DataError, match=r"leaves out earlier turns.*evaluation.shots=\[0\]"): last.prompt("Why?", [SHOT])


def test_a_template_with_todays_date_writes_the_same_each_day():
    dated = Renderer(tokenizer(template="{{ 'Today: ' + strftime_now('%d %b %Y, %H:%M:%S') + '\\n' }}" + CHATML, extra=IM))
    assert dated.prompt("Why?") == "Today: 26 Jul 2024\n" + Renderer(tokenizer(template=CHATML, extra=IM)).prompt("Why?")


def test_pad_that_is_eos_keeps_the_end_supervised():
    tok = KINDS["smollm2"][0]
    examples = [encode(row, tok, Renderer(tok)) for row in (ROWS[0], SHOT)]
    batch = Collator(tok.pad_token_id)(examples)
    for example, labels, mask in zip(examples, batch["labels"].tolist(), batch["attention_mask"].tolist()):
        n = len(example["input_ids"])
        assert labels == example["labels"] + [-100] * (len(labels) - n) and sum(mask) == n and labels[n - 1] == tok.pad_token_id


def test_chat_prompts_are_the_templates_own():
    tok = AutoTokenizer.from_pretrained(toy_model_path())
    conversation = [{"role": "user", "content": SHOT["question"]}, {"role": "assistant", "content": SHOT["answer"]}]
    renderer = Renderer(tok)
    ours = renderer.prompt(SHOT["question"]) + renderer.completion(SHOT["answer"])
    assert ours + "\n" == tok.apply_chat_template(conversation, tokenize=False)


# labels, the inspector, the cache

def test_one_row_is_encoded_as_in_the_batch(folder):
    tok = AutoTokenizer.from_pretrained(toy_model_path())
    renderer = Renderer(tok)
    rows = [{"id": str(i), **row} for i, row in enumerate(make_rows("train", n=50))]
    tok(["a", "bb"], padding=True, truncation=True, max_length=2) # a state that must not leak into what follows
    tokens, report = tokenize_split(rows, tok, renderer, 512)
    for row, example in zip(rows, tokens):
        assert encode(row, tok, renderer) == {k: example[k] for k in ("input_ids", "labels", "prompt_length")}
    labels = [encode(row, tok, renderer)["labels"] for row in rows]
    assert (report["tokens"], report["supervised"]) == (sum(map(len, labels)), sum(x != -100 for l in labels for x in l))


def test_too_long_examples_are_left_out_and_named(folder):
    tok = AutoTokenizer.from_pretrained(toy_model_path())
    rows = [{"id": f"train/{i}", **row} for i, row in enumerate(make_rows("train", n=20))]
    lengths = {row["id"]: len(encode(row, tok, Renderer(tok))["input_ids"]) for row in rows}
    limit = sorted(lengths.values())[10]
    tokens, report = tokenize_split(rows, tok, Renderer(tok), limit)
    assert report["too_long"] == [name for name, n in lengths.items() if n > limit]
    assert report["n"] + report["n_too_long"] == 20 and report["longest"] == max(lengths.values())
    assert max(map(len, tokens["input_ids"])) <= limit


def test_the_inspector_loses_no_text():
    tok = KINDS["gemma-it"][0]
    renderer, row = Renderer(tok), {"question": "½ é 😀 & <b>?", "answer": "\t1  2\n\n#### 3"}
    shown = inspect_labels([row], tok, renderer)
    assert "".join(t for t, *_ in shown.examples[0][2]) == renderer.prompt(row["question"]) + renderer.completion(row["answer"])
    page = shown._repr_html_()
    assert "&lt;" in page and "<b>?" not in page and "😀" in page


def test_the_whole_of_gsm8k_has_its_splits():
    if not os.environ.get("GSM8K_DIR"): pytest.skip("GSM8K_DIR names no folder")
    for dataset in ("main", "socratic"):
        assert {s: len(d) for s, d in load_gsm8k(config(dataset=dataset)).items()} == {"train": 7099, "validation": 374, "test": 1319}
