"""What both sides of a comparison run: the model's shape and each job's sizes. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# GPT-2's block: layers, width, heads, vocabulary, context. S has 4.3 million parameters, M 91.5 million.
SIZES = {"S": (4, 256, 4, 4096, 256), "M": (12, 768, 12, 8192, 256)}
EOS = 0
MEAN_LENGTH = 24  # of responses of varied lengths

JOBS: dict[str, dict[str, Any]] = {
    "lm": {"unit": "tokens", "batch": 16, "length": 256},
    "lm_installed": {"unit": "tokens", "batch": 16, "length": 256},
    "sft_varied": {"unit": "useful tokens", "batch": 16, "length": 256},
    "reward": {"unit": "pairs", "pairs": 16, "length": 128},
    "rankings": {"unit": "responses", "prompts": 8, "responses": 4, "prompt": 96, "response": 32},
    "sample": {"unit": "tokens", "batch": 32, "prompt": 64, "response": 64},
    "sample_varied": {"unit": "useful tokens", "batch": 32, "queue": 256, "prompt": 64, "response": 128},
    "ppo": {"unit": "episodes", "batch": 32, "prompt": 64, "response": 64, "epochs": 4, "minibatches": 4},
    "ppo_varied": {"unit": "episodes", "batch": 32, "prompt": 64, "response": 128, "epochs": 4, "minibatches": 4},
}


def stop_ids(vocabulary: int) -> list[int]:
    """Ids that end a response: so many of them that a nearly uniform model ends after MEAN_LENGTH tokens on average.

    Lengths then follow a geometric law by the sampler's own means, on both sides.
    """
    return list(range(EOS, EOS + round(vocabulary / MEAN_LENGTH)))


def read_rows(path: str | Path) -> list[dict[str, list[int]]]:
    """Rows {"input_ids", "completion_mask"} that both sides train on."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
