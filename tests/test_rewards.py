"""Rewards by functions: what they are given, what may come back, and how the terms add up."""

import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import rewards
from rlhf_jax.errors import UserError
from rlhf_jax.reward_functions.calling import RewardFunctions
from rlhf_jax.reward_functions.loading import fingerprint, load_function, make_terms, spec_of
from rlhf_jax.rewards import Terms, compose
from tests.cases import case

pytestmark = pytest.mark.core

PROMPTS: Any = ["1 + 1 =", [{"role": "user", "content": "2 + 2?"}], "3 + 3 ="]
COLUMNS: Any = [{"answer": " 2", "level": 1}, {"answer": "4"}, {"answer": " 6", "level": [3]}]
PLACES = ["sums.jsonl:1", "sums.jsonl:2", ""]


def made(*functions: Any, **settings: Any) -> RewardFunctions:
    names = make_terms(functions, (), model=False).names
    given = {"prompts": PROMPTS, "columns": COLUMNS, "places": PLACES} | settings
    return RewardFunctions(functions, names, **given)


def test_a_function_gets_text_or_messages_and_the_columns_that_it_names() -> None:
    calls: list[dict[str, Any]] = []

    def everything(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, **columns})
        return [0.0] * len(prompts)

    def right(completions: Any, answer: Any, strict: bool = True) -> list[Any]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [text == wanted for text, wanted in zip(texts, answer)]

    found = made(everything, right)([2, 1, 0], [" 6", "5", " 2"])
    assert calls == [
        {
            "prompts": [PROMPTS[2], PROMPTS[1], PROMPTS[0]],
            "completions": [" 6", [{"role": "assistant", "content": "5"}], " 2"],
            "answer": [" 6", "4", " 2"],
            "level": [[3], None, 1],
        }
    ]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0, 1], [0, 0], [0, 1]])


def test_what_counts_as_numbers() -> None:
    cases: list[Any] = [
        ([1, 2.5], [1, 2.5]),
        ((True, False), [1, 0]),
        (np.array([3, 4]), [3, 4]),
        ([np.float32(0.5), np.bool_(True)], [0.5, 1]),
        (jax.numpy.array([-1.0, 7.0]), [-1, 7]),
        ([None, 2], [math.nan, 2]),
    ]
    for returned, expected in cases:
        with case(returned):
            found = made(lambda completions, returned=returned: returned, lambda completions: [0, 0])(
                [0, 1], ["a", "b"]
            )
            np.testing.assert_array_equal(found[:, 0], np.float32(expected))


def broken(completions: list[Any]) -> list[float]:
    return [float(text) for text in completions]


def test_a_wrong_answer_names_function_row_and_value() -> None:
    # returned for the prompts of rows 1 and 2, expected message
    cases: list[Any] = [
        (
            [1.0],
            r"'f': expected a list of 2 numbers, one for each completion \(the first to sums.jsonl:2\), got 1 values",
        ),
        (0.5, "'f': expected a list of 2 numbers, .* got 0.5"),
        (None, "'f': expected a list of 2 numbers, .* got None"),
        ("ab", "'f': expected a list of 2 numbers, .* got 'ab'"),
        ({0: 1, 1: 2}, "'f': expected a list of 2 numbers"),
        (np.ones((2, 1)), r"'f': sums.jsonl:2: expected a finite number or None, got \[1.0\]"),
        ([math.nan, 0], "'f': sums.jsonl:2: expected a finite number or None, got nan for the completion ' x'"),
        ([0, -math.inf], "'f': prompt 3: expected a finite number or None, got -inf for the completion ' y'"),
        ([0, 10**39], "'f': prompt 3: expected a finite number or None, got 1000"),
        ([0, "1"], "'f': prompt 3: expected a finite number or None, got '1'"),
        ([1, None], "'f': prompt 3: expected a number from at least one, as there is no reward model, got None"),
    ]
    for returned, message in cases:

        def f(completions: Any, returned: Any = returned) -> Any:
            return returned

        with case(returned), pytest.raises(UserError, match=f"reward function {message}"):
            made(f)([1, 2], [" x", " y"])
    assert np.isnan(made(lambda completions: [1, None], required=False)([1, 2], ["a", "b"])[1, 0])
    where = rf"\({Path(__file__)}:\d+\)"
    raised = (
        f"'broken': sums.jsonl:1: ValueError: could not convert string to float: 'x' {where}, for the completion 'x'"
    )
    for timeout in (0.0, 60.0):  # in the main thread, and in its own
        with pytest.raises(UserError, match=raised) as error:
            made(broken, timeout=timeout)([2, 0], ["1", "x"])
        assert isinstance(error.value.__cause__, ValueError)

    def together(completions: list[str]) -> list[float]:
        return [1.0 / (len(completions) < 2)]

    with pytest.raises(UserError, match=r"prompt 3 and the 1 next prompts together: ZeroDivisionError: float division"):
        made(together)([2, 0], ["1", "x"])


def test_a_function_that_hangs_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"'hangs': expected an answer within 0.1 s for 2 completions, the first to sum.*"
    ):
        made(_hangs, timeout=0.1)([0, 1], ["a", "b"])
    assert time.monotonic() - began < 5


def _hangs(completions: Any) -> None:
    time.sleep(20)


_hangs.__qualname__ = "hangs"


def test_arguments_that_no_row_has_are_refused_before_the_first_call() -> None:
    cases: list[Any] = [
        (lambda completions, anwser: [], "parameter 'anwser': expected one of .*; the fields are answer, level"),
        (lambda texts: [], "parameter 'texts': expected one of prompts, completions"),
    ]
    for function, message in cases:
        with case(message), pytest.raises(UserError, match=f"reward function 'lambda': {message}"):
            made(function)
    with pytest.raises(UserError, match="field 'completions' of the prompts: expected another name"):
        made(lambda completions: [], columns=[{"completions": 1}] * 3)


def test_terms_are_named_and_weighted() -> None:
    functions: list[Any] = [len, len, functools.partial(broken), lambda completions: [], Named()]
    assert make_terms(functions, (), model=True).names == ("model", "len", "len_2", "broken", "lambda", "Named")
    assert make_terms([len], (2.0, -1.0), model=True) == Terms(("model", "len"), (2.0, -1.0))
    with pytest.raises(UserError, match="reward_weights: expected 2, one for each of model, len, got 1"):
        make_terms([len], (1.0,), model=True)


class Named:
    def __call__(self, completions: Any) -> list[float]:
        return [3.0]


def test_a_composed_reward_by_hand() -> None:
    # 2 m + 3 a - b where each applies; a applies to all but the second row, b to the last two.
    model_B = np.float32([1, 2, 3])
    value_BN = np.float32([[10, np.nan], [np.nan, 20], [30, 40]])
    terms = Terms(("model", "a", "b"), (2.0, 3.0, -1.0))
    reward_B, means = jax.jit(functools.partial(compose, terms))(model_B, value_BN)
    np.testing.assert_array_equal(reward_B, [2 + 30, 4 - 20, 6 + 90 - 40])
    assert {name: float(mean) for name, mean in means.items()} == {"reward/model": 2, "reward/a": 20, "reward/b": 30}
    reward_B, means = compose(Terms(("a", "b"), (1.0, 0.5)), None, value_BN)
    np.testing.assert_array_equal(reward_B, [10, 10, 50])
    # A reward model's NaN is a fault to be seen, not a term that does not apply.
    assert np.isnan(compose(terms, np.float32([np.nan, 0, 0]), value_BN)[0][0])


def test_functions_are_found_in_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("neighbour_of_mine.py").write_text("FACTOR = 2\n")
    Path("mine_42.py").write_text("from neighbour_of_mine import FACTOR\ndef f(completions): return [FACTOR]\nX = 1\n")
    Path("broken_42.py").write_text("import json\njson.loads('{')\n")
    for spec in ("mine_42.py:f", "mine_42:f", str(tmp_path / "mine_42.py") + ":f"):
        with case(spec):
            assert load_function(spec)([""]) == [2]
    assert load_function("statistics:mean")([1, 3]) == 2
    limited = load_function("rlhf_jax.rewards:matches(pattern='[(]a.*', whole=False)")
    assert make_terms([limited], (), model=False).names == ("matches",)
    # A column of an option's name does not take its place.
    assert made(limited, columns=[{"pattern": "x"}] * 3)([0, 1], ["b (a", "b"]).tolist() == [[1], [0]]
    Path("nameless_42.py").write_text("commas = lambda completions, **_: [-c.count(',') for c in completions]\n")
    commas = load_function("nameless_42.py:commas")
    assert commas(["a, b"]) == [-1] and make_terms([commas], (), model=False).names == ("commas",)
    cases = [
        ("mine_42.py", "expected FILE.py:NAME or package.module:NAME, got 'mine_42.py'"),
        ("none.py:f", "expected a Python file, got no such file as none.py"),
        ("mine_42.py:g", "expected a function g in mine_42.py, got no such name; its functions are f"),
        ("mine_42.py:X", "expected a function X in mine_42.py, got 1; its functions are f"),
        ("no_such_module:f", "importing no_such_module failed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("statistics:mean(most=", "expected options as in statistics:mean"),
        ("statistics:mean(40)", "expected options as in statistics:mean"),
        ("statistics:mean(most=os)", "expected options as in statistics:mean"),
        ("rlhf_jax.rewards:too_long(mots=40)", "too_long: options mots: got an unexpected keyword argument 'mots'"),
        ("broken_42.py:f", r"importing broken_42.py failed: JSONDecodeError: .* \(.*broken_42.py:2\)"),
    ]
    for spec, message in cases:
        with case(spec), pytest.raises(UserError, match=f"reward_function.*{message}"):
            load_function(spec)


def test_a_function_is_known_by_its_code() -> None:
    def written(text: str, file: str = "a.py") -> Any:
        space: dict[str, Any] = {"__name__": "m"}
        exec(compile(text, file, "exec"), space)  # noqa: S102
        return space["f"]

    one = written("def f(c):\n  return [x in {'a', 'b', 'c'} for x in c]\n")
    moved = written("\n\n# a comment\ndef f(c):\n  return [x in {'c', 'b', 'a'} for x in c]\n", "b.py")
    other = written("def f(c):\n  return [x in {'a', 'b'} for x in c]\n")
    assert fingerprint([one]) == fingerprint([moved]) != fingerprint([other])
    inverse = written("def f(c):\n  return [x not in {'a', 'b', 'c'} for x in c]\n")
    assert fingerprint([inverse]) != fingerprint([one])
    assert fingerprint([one, other]) != fingerprint([other, one])
    assert spec_of(functools.partial(one, 1)) == "m:f" and spec_of(Named()).endswith("test_rewards:Named")
    assert fingerprint([Named(), len])
    # Numbers that a function holds: defaults, those of the function around it, and of a partial.
    texts = [
        "def f(c, k={0}):\n  return c\n",
        "def f(c, *, k={0}):\n  return c\n",
        "f = (lambda k: lambda c: k)({0})\n",
    ]
    for text in texts:
        with case(text):
            half, again, whole = (fingerprint([written(text.format(number))]) for number in (0.5, 0.5, 1))
            assert half == again != whole
    assert fingerprint([functools.partial(one, 1)]) != fingerprint([functools.partial(one, 2)])
    assert fingerprint([functools.partial(one, Named())]) == fingerprint([functools.partial(one, Named())])


def test_ready_made_rewards_by_hand() -> None:
    message = [{"role": "assistant", "content": "a b c d"}]
    assert rewards.too_long(["a b", message, "a b c"], most=2) == [0, -1, -0.5]
    # Trigrams of words: abc bca cab abc bca, of which two occurred before; too few words have none.
    assert rewards.repetition(["a b c A b C a", "a b", message]) == [-0.4, 0, 0]
    assert rewards.matches([" 12\n", "x 12", message], pattern=r"\d+") == [1, 0, 0]
    assert rewards.matches(["x 12"], pattern=r"\d+", whole=False) == [1]
    with pytest.raises(UserError, match=r"pattern: expected a regular expression, got '\('"):
        rewards.matches(["x"], pattern="(")
    assert rewards.is_json(["[1]", "{", '{"a": 1}', "[" * 99_999]) == [1, 0, 1, 0]
    assert rewards.is_json(["[1]", '{"a": 1}', '{"b": 1}'], keys=["a"]) == [0, 1, 0]
    cases: list[Any] = [
        ("It is Paris.", "Paris", 1),
        ("Perhaps PARIS", ["Lutetia", "Paris"], 0.5),
        ("I don\u2019t know; Paris?", "Paris", 0),
        ("I think Rome", "Paris", -2),
        ("Parisian", "Paris", -4),
        ("12", 1, -4),
        ("1.", 1, 1),
        ("anything", None, None),
    ]
    for completion, answer, payoff in cases:
        with case(completion):
            assert rewards.honest_payoff([completion], [answer]) == [payoff]
    verdicts = {"a": True, "b": False, "c": None}
    found = rewards.verified(["p"] * 3, ["a a b c", "", "b"], claims=str.split, holds=lambda _, claim: verdicts[claim])
    assert found == [0.25, 0, -1]


def test_an_ensemble_by_hand() -> None:
    scores_NB = np.array([[1, 4], [3, 0], [5, 2]], np.float32)
    ways: list[Any] = [({}, [3, 2]), ({"how": "worst"}, [1, 0])]
    ways.append(({"how": "cautious", "k": 0.5}, [3 - 0.5 * math.sqrt(8 / 3), 2 - 0.5 * math.sqrt(8 / 3)]))
    for settings, expected in ways:
        with case(settings):
            np.testing.assert_allclose(jax.jit(functools.partial(rewards.ensemble, **settings))(scores_NB), expected)
            judges: list[Any] = [lambda prompts, completions, row=row: row for row in scores_NB]
            found = rewards.judged(["p", "q"], ["a", "b"], judges=judges, **settings)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
