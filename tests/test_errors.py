"""Errors: one tree, exit codes by kind, messages that keep what, where and what to do, also between processes."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray import errors
from dinoray.errors import BadRequest, DinorayError, ItemError, SystemicError, TransientError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DinorayError)]


def build(kind: type[DinorayError], what: str, where: str = "", todo: str = "") -> DinorayError:
    if kind is ItemError:
        return ItemError("decode", what, where=where, todo=todo)
    return kind(what, where=where, todo=todo)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(what=st.text(min_size=1), where=st.text(), todo=st.text())
def test_pickle_and_copy_keep_everything(kind: type[DinorayError], what: str, where: str, todo: str) -> None:
    error = build(kind, what, where, todo)
    error.extra = {"unit": 7}
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert (again.what, again.where, again.todo, again.extra) == (what, where, todo, {"unit": 7})
        assert again.exit_code == error.exit_code
        assert getattr(again, "reason", None) == getattr(error, "reason", None)


def test_message_says_what_where_and_what_to_do() -> None:
    text = str(BadRequest("no such field", where="--size", todo="use tiles"))
    assert text == "no such field [--size]\n  use tiles"
    assert str(BadRequest("no such field")) == "no such field"
    assert str(ItemError("nan", "3 values are NaN", where="a.tif")) == "3 values are NaN [a.tif]"


def test_exit_codes_by_kind() -> None:
    codes = {kind.__name__: build(kind, "x").exit_code for kind in KINDS}
    assert {name for name, code in codes.items() if code == 2} == {"BadRequest", "ChangedRequest", "MissingScale", "WeightsError"}
    assert {code for code in codes.values()} == {1, 2}


def test_the_three_classes_exclude_each_other() -> None:
    classes = (ItemError, TransientError, SystemicError, BadRequest)
    for one in classes:
        for other in classes:
            assert one is other or not issubclass(one, other)
