"Generated problems and the toy's pre-training text are always the same ones; the toy's tokenizer and model are what the package ships"
import hashlib, itertools, json, random, re

import pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gsm8k_sft.data.synthetic import (
    CONTAINERS, DAYS, NAMES, TEMPLATES, THINGS, draw_words, make_rows, one_shot, reserved, toy_model_path)
from gsm8k_sft.models.toy import SPECIAL_TOKENS, build_model, chat, draw_sum, pretraining_stream

KINDS = {"NAME": NAMES, "THINGS": THINGS, "BOX": [w for pair in CONTAINERS for w in pair], "DAY": DAYS}
MASK = re.compile(r"\b(?:" + "|".join(f"(?P<{k}>{'|'.join(v)})" for k, v in KINDS.items()) + r")\b")


def mask(text): return MASK.sub(lambda match: match.lastgroup, text)
def digest(value): return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(toy_model_path())


@pytest.mark.parametrize("given, expected", [
    (("train", "main", None, 0), "16e57bc6269b9cd0"), (("train", "main", None, 1), "15a66f3571d0dd7a"),
    (("train", "socratic", None, 0), "a33da0abf6c35a6c"), (("train", "socratic", None, 1), "64e55b44f246ad84"),
    (("test", "main", None, 0), "9e632a3c3542cc10"), (("test", "socratic", None, 5), "1b4722dd661d3ef5")])
def test_generated_problems_are_the_same_as_ever(given, expected):
    "Results of the toy, and what its pre-training may not contain, depend on every character"
    assert digest(make_rows(*given)) == expected


def test_one_shot_and_pretraining_text_are_the_same_as_ever():
    assert digest([one_shot("main"), one_shot("socratic")]) == "54165a35aedf3a65"
    for seed, expected in ((0, "7634296246dcda82"), (1, "68a42330e15e3d6a")):
        assert digest(list(itertools.islice(pretraining_stream(seed), 2000))) == expected


def test_templates_and_words():
    assert len(TEMPLATES) == 32 and all(len(t.steps) == len(t.calculations) for t in TEMPLATES.values())
    assert len({*NAMES, *THINGS}) == len(NAMES) + len(THINGS)
    assert draw_words(random.Random(0)) == draw_words(random.Random(0))
    assert mask("Avatar boxing") == "Avatar boxing"
    share = TEMPLATES["share-1"]
    assert reserved(share, {"b": 4, "a": 48}) == reserved(share, {"a": 48, "b": 4})
    assert {row["answer"].count("<<") for row in make_rows("test")} == {1, 2, 3, 4}


def test_sums_are_right():
    for i in range(1000):
        left, op, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", draw_sum(random.Random(i))).groups()
        left, right, result = int(left), int(right), int(result)
        assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[op] == result


def test_no_held_out_story_is_in_the_pretraining_text():
    held_out = {mask(row["question"]) for row in make_rows("test")}
    documents = [mask(text) for text in itertools.islice(pretraining_stream(2), 2000)]
    assert not [d for d in documents if any(story in d for story in held_out)]


def test_the_tokenizer_loses_nothing(tokenizer):
    def round_trip(text): return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    texts = [row["question"] + "\n" + row["answer"] for dataset in ("main", "socratic") for row in make_rows("test", dataset)]
    for text in [*texts, "Zoë pays 3½ € in 東京 \t🙂"]: assert round_trip(text) == text
    assert tokenizer.tokenize("120") == ["1", "2", "0"]
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(6))


def test_the_template_is_gemmas(tokenizer):
    user = [{"role": "user", "content": " 12+5 "}]
    assert tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True) == chat("12+5") + "<start_of_turn>model\n"
    assert tokenizer("12+5")["input_ids"][0] == tokenizer.bos_token_id
    with pytest.raises(Exception, match="System role not supported"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief"}], tokenize=False)


def test_the_model_is_causal():
    torch.manual_seed(0)
    model, ids = build_model(), torch.randint(6, 768, (1, 40))
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1 - 6) % 762 + 6], 1)
    with torch.no_grad(): torch.testing.assert_close(model(ids).logits[:, :-1], model(changed).logits[:, :-1], rtol=0, atol=1e-4)


def test_the_shipped_model_and_its_records():
    toy = AutoModelForCausalLM.from_pretrained(toy_model_path(), dtype=torch.float32)
    record = json.loads((toy_model_path() / "record.json").read_text())
    assert toy.num_parameters() == build_model().num_parameters() == record["parameters"]
    assert (toy.generation_config.eos_token_id, toy.generation_config.pad_token_id) == ([1, 5], 0)
    assert sum(p.stat().st_size for p in toy_model_path().iterdir()) < 8e6 # what travels in the package
    least = {"full": 75, "lora": 60}
    for run in json.loads((toy_model_path() / "sft.json").read_text())["runs"]:
        assert run["exact"] <= 5 and run["last"] <= 15 if run["tuning"] == "base" else run["exact"] >= least[run["tuning"]]
