"""The nearest word and what a user's mistake is. Truth: hand-made cases."""

from core.errors import UserError, nearest


def test_nearest():
    assert nearest("contxt", ["data", "context"]) == "; did you mean context?"
    assert nearest("zzz", ["data", "context"]) == ""


def test_a_users_mistake_is_a_value_error():
    assert issubclass(UserError, ValueError)
