"""PPO over several turns: a customer who says what he wants when asked, and a waiter who learns to ask.

    python examples/ppo_in_an_environment.py runs/answers        # any pretrained or fine-tuned run, or hf:FOLDER
    rlhf-jax ppo … --environment examples/ppo_in_an_environment.py:waiter

An environment is (state, text) -> (state, observation, reward, done); the first state is the prompt's row.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from rlhf_jax import EpisodeConfig, PPOConfig
from rlhf_jax.environments import customer
from rlhf_jax.trainers import ppo


def waiter(state: dict[str, Any], text: str) -> tuple[dict[str, Any], str | None, float, bool]:
    """The ready-made customer, who leaves after two questions that he does not understand."""
    state, said, reward, done = customer(state, text)
    lost = state.get("lost", 0) + (said == "I do not understand.")
    return {**state, "lost": lost}, said, reward, done or lost == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("init", help="model to start from")
    parser.add_argument("--out", default="runs/waiter", help="run folder to write")
    parser.add_argument("--steps", type=int, default=30, help="PPO iterations")
    given = parser.parse_args()
    drinks = itertools.product(("tea", "coffee", "milk"), ("small", "large"), ("A drink, please.", "I am thirsty."))
    rows = [
        {"prompt": [{"role": "user", "content": said}], "goal": {"drink": drink, "size": size}}
        for drink, size, said in drinks
    ]
    data = Path(given.out).with_suffix(".jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PPOConfig(
        out=given.out,
        init=given.init,
        data=(str(data),),
        steps=given.steps,
        prompt_length=48,
        max_turns=3,
        turn_length=16,
        episode=EpisodeConfig(response_length=160, missing_end="keep"),
    )
    print(ppo.run(config, environment=waiter).summary)


if __name__ == "__main__":
    main()
