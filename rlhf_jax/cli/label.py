"""Label responses in the browser: people rate, flag and rank them, as training data for a reward model.

rlhf-jax label labels/first --data candidates.jsonl

rlhf-jax label labels/blind --run runs/sft --run runs/aligned --prompts prompts.jsonl

rlhf-jax label labels/team --data candidates.jsonl --labeller ann --labeller bob --labellers-per-item 2

rlhf-jax label labels/answers --demonstrations prompts.jsonl --page page.yaml

Started again without --data, it continues with the items in the folder. A link with a token is printed for every new
labeller, and one for the admin at each start. Every judgement is on disk before the page confirms it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from rlhf_jax.config import at_least
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.records import MOST_RESPONSES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Labelling settings."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """Labelling folder for items and judgements; created if missing."""
    data: tuple[str, ...] = ()
    """JSONL files of prompts with 2 to 9 responses, or of comparisons."""
    demonstrations: tuple[str, ...] = ()
    """JSONL files of prompts whose answer labellers write, or correct where a row has one `response`."""
    page: str = ""
    """YAML or JSON file with the page's title, instructions, question, flags and scale; kept in the folder."""
    gold: bool = False
    """Use the ranks in --data as gold labels to score labellers against."""
    calibration: tuple[str, ...] = ()
    """JSONL files of items that every labeller judges, to compare all labellers."""
    quiz: tuple[str, ...] = ()
    """JSONL files of ranked items that each labeller must pass as a quiz before labelling."""
    pass_mark: float = 0.7
    """Share of the ordered pairs of the quiz that a labeller must get right, 0 to 1."""
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Run folder or published model that answers --prompts, compared blind; may be repeated."""
    prompts: tuple[str, ...] = ()
    """JSONL files of prompts for --run."""
    samples: int = 1
    """Responses per prompt from each --run."""
    max_new_tokens: int | None = None
    """Maximum number of tokens in a sampled response; 128 by default, or half of the smallest context."""
    temperature: float = 0.7
    """Sampling temperature, which divides the logits."""
    seed: int = 0
    """Random seed for sampling."""
    labeller: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name of a labeller, who gets a link with a token; may be repeated. By default one person on this machine."""
    new_link: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name of a labeller who lost their link: the old one is revoked and a new one printed; may be repeated."""
    labellers_per_item: int = 1
    """Number of people who judge each item."""
    lease_minutes: float = 30.0
    """Minutes that an item is reserved for an idle labeller before it goes to another."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach requires --labeller."""
    port: int = 8460
    """Port to listen on; 0 picks a free one."""
    origin: str = ""
    """Public URL of the page behind a TLS proxy, such as https://label.example.org."""
    serve: bool = True
    """Serve the web page; --no-serve only adds the items to the folder."""

    def __post_init__(self) -> None:
        for field, low in (("samples", 1), ("max_new_tokens", 1), ("labellers_per_item", 1), ("port", 0), ("seed", 0)):
            at_least(self, field, low)
        at_least(self, "temperature", 0)
        if not 0 <= self.pass_mark <= 1:
            raise UserError(f"pass_mark: expected 0 to 1, got {self.pass_mark}")
        if not self.lease_minutes > 0:
            raise UserError(f"lease_minutes: expected more than 0, got {self.lease_minutes}")
        if bool(self.run) != bool(self.prompts):
            got, missing = ("--run", "--prompts") if self.run else ("--prompts", "--run")
            raise UserError(f"{missing[2:]}: expected both --run and --prompts or neither, got {got} without {missing}")
        if self.run and not 2 <= len(self.run) * self.samples <= MOST_RESPONSES:
            raise UserError(
                f"samples: expected 2 to {MOST_RESPONSES} responses to a prompt, got {len(self.run)} runs with "
                f"{self.samples} samples each"
            )


def run(config: Config) -> None:
    """Adds the items to the folder and serves the page until SIGINT or SIGTERM."""
    from rlhf_jax.cli import labelling

    labelling.run(config)
