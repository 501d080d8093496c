"""The comparison of methods: its commands, figures by hand, and the table."""

import io
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from rlhf_jax.cli import compare_methods, ppo, preference
from rlhf_jax.cli.flags import parse_command
from rlhf_jax.errors import UserError
from rlhf_jax.recipe import methods
from rlhf_jax.recipe.methods import Ground, Method, at_nats, command_of, in_process_of_its_own
from rlhf_jax.recipe.methods_report import table, write_methods_report
from rlhf_jax.recipe.sizes import SIZES
from tests.cases import case

pytestmark = pytest.mark.demo


def test_each_method_has_a_command_that_its_stage_takes(tmp_path: Path) -> None:
    for size in SIZES.values():
        for name in get_args(Method):
            with case((size.model.width, name)):
                if name == "best-of-n":
                    continue
                ground = Ground(Path("runs/recipe"), tmp_path, size, 3, kl_coef=0.04, rate=3e-4)
                stage, *flags = command_of(name, ground, tmp_path / name)
                module: Any = {"ppo": ppo, "preference": preference}[stage]
                config, _ = parse_command(module.Config, "", flags, program=f"rlhf-jax {stage}")
                assert (config.seed, config.init, config.examples) == (3, "runs/recipe/sft", 0)
                # As many responses are read as are sampled, and at most five checkpoints and the last are kept.
                read = config.steps * config.batch * (1 if stage == "ppo" else 4)
                assert read == pytest.approx(size.iterations * size.episodes, rel=0.1)
                assert config.steps / config.save_every <= config.keep_last - 1


def test_gold_at_a_kl_is_on_the_line_between_two_checkpoints() -> None:
    points = [{"kl": kl, "gold": gold} for kl, gold in ((0.0, 1.0), (1.0, 2.0), (9.0, 4.0), (16.0, 3.0))]
    # √5 is (√5 − 1) / 2 of the way from √1 to √9.
    assert at_nats(points)["at_nats"] == pytest.approx(2 + 2 * (math.sqrt(5) - 1) / 2)
    assert at_nats(points) | {"at_nats": None} == {"at_nats": None, "best": 4.0, "best_kl": 9.0}
    assert at_nats(points[:2]) == {"at_nats": None, "best": 2.0, "best_kl": 1.0}
    assert at_nats(points, 1.0)["at_nats"] == pytest.approx(2.0)
    # It went there and came back: the first time counts.
    assert at_nats([*points[:3], points[1]], 4.0)["at_nats"] == pytest.approx(3.0)


def seed(number: int, gold: float | None) -> dict[str, Any]:
    points = [{"kl": 0.0, "gold": 1.0}, {"kl": 9.0, "gold": 2.0}]
    found = {"points": points, "at_nats": gold, "best": 2.0, "best_kl": 9.0, "seconds": 10.0, "gib": None}
    return {"seed": number, "methods": {"ppo": found, "dpo": found}, "wins": {"ppo": {"dpo": 0.6}, "dpo": {"ppo": 0.4}}}


def test_the_table_says_how_sure_it_is(tmp_path: Path) -> None:
    both = [methods._over_seeds([seed(n, gold)["methods"]["ppo"] for n, gold in enumerate(golds)])
            for golds in ((1.0, 2.0, 3.0), (1.0, None, 2.0))]  # fmt: skip
    # The mean of three is uncertain by t = 4.3026527 standard errors of 1 / √3.
    assert both[0]["at_nats"] == 2.0 and both[0]["at_nats_spread"] == pytest.approx(4.3026527 / math.sqrt(3))
    assert both[1]["at_nats"] is None and both[1]["reached"] == 2
    seeds = [seed(n, 1.0) for n in range(3)]
    content = {"nats": 5.0, "seeds": seeds, "methods": dict(zip(("ppo", "dpo"), both)), "wins": seeds[0]["wins"]}
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table(content))
    said = console.export_text()
    assert "2.00 ± 2.48" in said and "reached by 2 of 3" in said
    page = write_methods_report(tmp_path, content).read_text()
    assert "0.60" in page and "Win rate of the row over the column" in page and "<svg" in page


def test_a_command_that_fails_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf-jax"])
    with pytest.raises(UserError, match=r"rlhf-jax ppo ended with 2: error: .*unknown flag --nothing.*; see "):
        in_process_of_its_own(["ppo", "--nothing", "1"], tmp_path / "log")
    cost = in_process_of_its_own(["--version"], tmp_path / "version")
    assert 0 < cost["seconds"] and 0.01 < cost["gib"] < 4
    assert (tmp_path / "version").read_text().strip()


def test_a_stop_waits_for_the_command_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "command"
    command.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.3)\n    print('saved', flush=True)\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    command.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(command))
    log = tmp_path / "log"

    def interrupt() -> None:
        while not log.exists() or "ready" not in log.read_text():
            time.sleep(0.02)
        # To this process alone, as `kill -INT` sends it.
        os.kill(os.getpid(), signal.SIGINT)

    # Whatever the process that started the tests does with this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        in_process_of_its_own([], log)
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert log.read_text() == "ready\nsaved\n"


def test_settings_that_do_not_fit_are_refused() -> None:
    good: dict[str, Any] = {"recipes": ("r",), "out": "o"}
    for changes, message in (
        ({"recipes": ()}, "recipes: expected folders of finished recipes, got none"),
        ({"out": ""}, "out: expected a folder, got nothing"),
        ({"methods": ("ppo", "ppo")}, "methods: expected one or more, each once, got ppo ppo"),
        ({"share": 1.5}, "share: expected more than 0 and at most 1, got 1.5"),
        ({"kl_coef": 0.0}, r"kl_coef: expected more than 0, got 0\.0"),
    ):
        with case(changes), pytest.raises(UserError, match=message):
            compare_methods.Config(**(good | changes))
