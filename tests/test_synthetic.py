"Generated problems are always the same ones; the toy model is what the package ships (its making is tested in nbs/models/toy.ipynb)"
import hashlib, json, random

import pytest, torch
from transformers import AutoModelForCausalLM

from gsm8k_sft.core.config import load_config
from gsm8k_sft.data.synthetic import NAMES, TEMPLATES, THINGS, draw_words, make_rows, reserved, toy_model_path

def digest(value): return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


@pytest.mark.parametrize("given, expected", [
    (("train", "main", None, 0), "16e57bc6269b9cd0"), (("train", "main", None, 1), "15a66f3571d0dd7a"),
    (("train", "socratic", None, 0), "a33da0abf6c35a6c"), (("train", "socratic", None, 1), "64e55b44f246ad84"),
    (("test", "main", None, 0), "9e632a3c3542cc10"), (("test", "socratic", None, 5), "1b4722dd661d3ef5")])
def test_generated_problems_are_the_same_as_ever(given, expected):
    "Results of the toy, and what its pre-training may not contain, depend on every character"
    assert digest(make_rows(*given)) == expected


def test_one_shot_is_the_same_as_ever():
    shown = [dict(load_config("toy", dataset=d, training=False).one_shot_example) for d in ("main", "socratic")]
    assert digest(shown) == "54165a35aedf3a65"


def test_templates_and_words():
    assert len(TEMPLATES) == 32 and all(len(t.steps) == len(t.calculations) for t in TEMPLATES.values())
    assert len({*NAMES, *THINGS}) == len(NAMES) + len(THINGS)
    assert draw_words(random.Random(0)) == draw_words(random.Random(0))
    share = TEMPLATES["share-1"]
    assert reserved(share, {"b": 4, "a": 48}) == reserved(share, {"a": 48, "b": 4})
    assert {row["answer"].count("<<") for row in make_rows("test")} == {1, 2, 3, 4}


def test_the_shipped_model_and_its_records():
    toy = AutoModelForCausalLM.from_pretrained(toy_model_path(), dtype=torch.float32)
    record = json.loads((toy_model_path() / "record.json").read_text())
    assert toy.num_parameters() == record["parameters"]
    assert (toy.generation_config.eos_token_id, toy.generation_config.pad_token_id) == ([1, 5], 0)
    assert sum(p.stat().st_size for p in toy_model_path().iterdir()) < 8e6 # what travels in the package
    least = {"full": 75, "lora": 60}
    for run in json.loads((toy_model_path() / "sft.json").read_text())["runs"]:
        assert run["exact"] <= 5 and run["last"] <= 15 if run["tuning"] == "base" else run["exact"] >= least[run["tuning"]]
