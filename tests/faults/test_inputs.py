"Every kind of bad input ends its command in one line that says the way out; nothing is written, nothing has a traceback"
import json
import pytest
from kinds import KINDS, MESSAGES, QUICK, make_template, meet


@pytest.fixture(scope="module")
def template(tmp_path_factory): return make_template(tmp_path_factory.mktemp("template") / "it")


def check(name, path, template):
    code, said, new = meet(name, path / "box", template)
    assert code == 1 and KINDS[name][1] in said and "Traceback" not in said, said
    assert len(said.splitlines()) == 1 and not new, (said, new)


@pytest.mark.parametrize("name", QUICK)
def test_what_is_seen_at_once(name, tmp_path): check(name, tmp_path, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in QUICK])
def test_what_is_seen_at_work(name, tmp_path, template): check(name, tmp_path, template)


def test_the_sites_table_is_what_users_see():
    shown = json.loads(MESSAGES.read_text(encoding="utf-8"))
    assert list(shown) == list(KINDS) and len(KINDS) >= 60
    assert not [name for name, (_, words) in KINDS.items() if words not in shown[name]], "run `python tests/faults/kinds.py`"
