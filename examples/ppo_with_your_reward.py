"""PPO with reward functions of your own and no reward model: sums, checked against a column of the data.

    python examples/ppo_with_your_reward.py runs/answers        # any pretrained or fine-tuned run, or hf:FOLDER
    rlhf-jax ppo --name brief --init runs/sft --data p.jsonl --reward-function examples/ppo_with_your_reward.py:short

A function has TRL's form f(prompts, completions, **columns); columns are the other fields of the prompts' rows.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from rlhf_jax import EpisodeConfig, PPOConfig, load
from rlhf_jax.trainers import ppo


def exact(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 if the first number in a completion is the row's answer."""
    found = [re.search(r"\d+", completion) for completion in completions]
    return [float(match is not None and match[0] == right) for match, right in zip(found, answer, strict=True)]


def digits(completions: list[str], **_: object) -> list[float]:
    """Share of digits: a smooth term, which leads to answers that `exact` can reward."""
    return [sum(map(str.isdigit, completion)) / max(len(completion), 1) for completion in completions]


def short(completions: list[str], **_: object) -> list[float]:
    """Minus the length in characters, in hundreds."""
    return [-len(completion) / 100 for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("init", help="model to start from")
    parser.add_argument("--out", default="runs/sums", help="run folder to write")
    parser.add_argument("--steps", type=int, default=30, help="PPO iterations")
    given = parser.parse_args()
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(1, 10) for b in range(1, 10)]
    data = Path(given.out).with_suffix(".jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PPOConfig(
        out=given.out,
        init=given.init,
        data=(str(data),),
        steps=given.steps,
        reward_weights=(1.0, 0.5, 0.1),
        episode=EpisodeConfig(response_length=8, missing_end="keep"),
    )
    finished = ppo.run(config, reward_funcs=[exact, digits, short])
    print(finished.summary)
    print(load(given.out).generate(["2 + 3 =", "7 + 8 ="], max_new_tokens=8))


if __name__ == "__main__":
    main()
