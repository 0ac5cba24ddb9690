from __future__ import annotations

import hashlib
import hmac
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakbench.errors import UserError
from leakbench.keys import DEVELOPMENT, PUBLIC_KEY, Season, derive, seed

KEY = b"a secret of at least sixteen bytes"
VALUES = st.recursive(
    st.one_of(st.integers(), st.text(max_size=4), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)


def canonical(value):
    return json.dumps(value, sort_keys=True)


def test_derive_is_the_documented_hmac():
    expected = hmac.new(KEY, b'["victims",{"a":1,"b":[2,null]},3]', hashlib.sha256).digest()
    assert derive(KEY, "victims", {"b": [2, None], "a": 1}, 3) == expected
    assert seed(KEY, "victims", {"b": [2, None], "a": 1}, 3) == int.from_bytes(expected[:8], "little") >> 1


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4), st.data())
def test_derive_changes_with_every_name_and_with_the_key(names, data):
    index = data.draw(st.integers(0, len(names) - 1))
    other = data.draw(VALUES.filter(lambda value: canonical(value) != canonical(names[index])))
    assert derive(KEY, *names[:index], other, *names[index + 1 :]) != derive(KEY, *names)
    assert derive(KEY + b"x", *names) != derive(KEY, *names)
    assert derive(KEY, *names, 0) != derive(KEY, *names)
    assert derive(KEY, *names) == derive(KEY, *names)


def test_names_are_not_concatenated():
    paths = [("ab", "c"), ("a", "bc"), (["ab", "c"],), (1, 2), (12,), ("1", 2), ()]
    assert len({derive(KEY, *path) for path in paths}) == len(paths)


@given(st.binary(min_size=16, max_size=40), st.text(max_size=5))
def test_a_seed_fits_a_generator(key, name):
    assert 0 <= seed(key, name) < 2**63


def test_no_key_is_in_what_a_season_prints():
    season = Season("spring", KEY)
    for text in (repr(season), str(season), f"{season}", season.commitment, repr([season])):
        assert KEY.decode() not in text
        assert KEY.hex() not in text
    assert repr(season) == f"Season('spring', commitment={hashlib.sha256(KEY).hexdigest()[:12]})"


def test_a_commitment_is_the_keys_sha256():
    assert Season("spring", KEY).commitment == hashlib.sha256(KEY).hexdigest()


def test_the_public_keys_differ():
    assert DEVELOPMENT.name == "development"
    assert DEVELOPMENT.key != PUBLIC_KEY
    assert derive(PUBLIC_KEY, "x") != derive(DEVELOPMENT.key, "x")


def test_a_season_file_gives_name_and_key(tmp_path):
    path = tmp_path / "autumn.key"
    path.write_bytes(b"\n " + KEY + b"\n")
    season = Season.from_file(path)
    assert season == Season("autumn", KEY)
    assert pickle.loads(pickle.dumps(season)) == season


@pytest.mark.parametrize("content", [b"", b"short", b" " * 40])
def test_a_short_key_is_one_line_with_the_command_that_makes_one(tmp_path, content):
    path = tmp_path / "autumn.key"
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected at least 16 bytes, got") as error:
        Season.from_file(path)
    assert "head -c 32 /dev/urandom" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path in (tmp_path / "gone.key", tmp_path):
        with pytest.raises(UserError, match=r"--season-key .*: cannot be read \(") as error:
            Season.from_file(path)
        assert "\n" not in str(error.value)
