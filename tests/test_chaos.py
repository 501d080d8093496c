"""Each trial of `rlhf-jax chaos` holds in its short form, and fails where its guarantee is broken on purpose."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf_jax.chaos import rows, scripts
from rlhf_jax.chaos.kills import place_of
from rlhf_jax.chaos.run import TRIALS
from rlhf_jax.chaos.small import difference
from rlhf_jax.cli import chaos
from rlhf_jax.cli.app import main
from tests.cases import case
from tests.chaos_short import SHORT

pytestmark = pytest.mark.runs

FACTS: dict[str, Any] = {"finished": True, "handed on": "1f", "params": "2e", "torn": []}
ROWS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


@pytest.mark.slow
def test_each_trial_holds_and_sees_its_guarantee_broken() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos_short"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [(name, bad) for name, _, broken in SHORT for bad in ((False, True) if broken else (False,))]
    assert [(each["trial"], each["broken"]) for each in found] == expected, done.stderr[-3000:]
    for each in found:
        with case((each["trial"], each["broken"])):
            assert each["holds"] == (not each["broken"]), each
    healthy = {each["trial"]: each for each in found if not each["broken"]}
    kill = healthy["kill"]
    assert (kill["kills"], kill["after step 1"], kill["save"], kill["delete"]) == (2, 2, 1, 1), kill
    assert healthy["sigterm"]["landed"] == {"step": 1} and healthy["mismatch"]["refused"] == {"stage": 1}
    # Servers, clusters and alarms have tests of their own, of the same code.
    assert {name for name, _, _ in SHORT} | {"peer", "labels", "guards"} == set(TRIALS) == set(get_args(chaos.Name))


def test_what_a_killed_run_loses_doubles_or_changes_is_seen() -> None:
    def made(rows: list[dict[str, Any]] = ROWS, **changes: Any) -> dict[str, Any]:
        return {**FACTS, "rows": rows, **changes}

    for found, seen in (
        (made(), ""),
        (made(ROWS[:1]), "steps of the metrics: expected [1, 2], got [1]"),
        (made([*ROWS, ROWS[1]]), "steps of the metrics: expected [1, 2], got [1, 2, 2]"),
        (made([ROWS[0], {"step": 2, "loss": 1.5}]), "loss of step 2: expected 1.0, got 1.5"),
        (made([ROWS[0], {"step": 2}]), "loss of step 2: expected 1.0, got None"),
        (made(torn=['{"lo']), "torn: expected [], got ['{\"lo']"),
        (made(params="3d"), "params: expected 2e, got 3d"),
        (made(**{"handed on": "3d"}), "handed on: expected 1f, got 3d"),
        (made(finished=False), "finished: expected True, got False"),
    ):
        with case(found):
            assert difference(found, made()) == seen
    for phase, stage, place in (
        ("beside: saving", "sft", "save"),
        ("saving", "ppo", "save"),
        ("beside: deleting", "ppo", "delete"),
        ("sampling", "ppo", "rollout"),
        ("updating", "ppo", "epoch"),
        ("waiting for the devices", "pretrain", "other"),
    ):
        assert place_of(phase, stage) == place, phase


def test_clusters_and_servers_are_judged_by_what_they_print() -> None:
    strike = {"ended_well": True, "same": True, "seconds": 9.0}
    for changes, wrong in (({}, 0), ({"ended_well": False}, 1), ({"ended_well": False, "same": False}, 2)):
        with case(changes):
            assert len(scripts.judge_strikes([strike, strike | changes]).wrong) == wrong
    kills: dict[str, Any] = {"wanted": 40, "rows": 40, "lost": 0, "changed": 0, "doubled": 0, "different_replies": 0}
    kills |= {"integrity": "ok", "other_answers": {}, "kills": 3}
    changes_of: list[dict[str, Any]] = [
        {},
        {"lost": 1},
        {"changed": 1},
        {"doubled": 1},
        {"rows": 39},
        {"integrity": "row 3 missing"},
    ]
    for row in changes_of:
        with case(row):
            assert len(scripts.judge_labels({"kills": kills | row}).wrong) == len(row)


def test_the_command_prints_json_and_fails_where_the_guarantee_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["chaos", *arguments])
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    status, out, _ = call("tokens", "--n", "40", "--seed", "3", "--out", str(tmp_path / "a.json"))
    result = json.loads(out)
    assert (status, result["name"], result["n"], result["strings"], result["holds"]) == (0, "tokens", 40, 40, True)
    assert json.loads((tmp_path / "a.json").read_text()) == result and result["processor"]
    monkeypatch.setattr(rows.Tokenizer, "special_ids", property(lambda self: frozenset(range(256))))
    status, out, _ = call("tokens", "--n", "3")
    assert status == 1 and not json.loads(out)["holds"] and json.loads(out)["wrong"]
    for arguments, message in (
        (["tokens", "--n", "0"], "error: n: expected 1 or more, got 0"),
        (["tokens", "--folder", str(tmp_path / "none")], "error: folder: expected an existing folder, got "),
        (["token"], "error: "),
    ):
        with case(arguments):
            status, out, said = call(*arguments)
            assert status == 2 and not out and said.startswith(message) and said.count("\n") == 1
    monkeypatch.setattr(scripts, "STRESS", tmp_path)
    status, _, said = call("labels")
    assert (
        status == 2 and said.startswith("error: chaos: expected a checkout of rlhf_jax with ") and said.count("\n") == 1
    )
