"""Label answers in the browser: people rate, flag and rank responses, and a reward model trains on what they said.

rlhf-jax label labels/first --data candidates.jsonl

rlhf-jax label labels/blind --run runs/sft --run runs/aligned --prompts prompts.jsonl

rlhf-jax label labels/team --data candidates.jsonl --labeller ann --labeller bob --labellers-per-item 2

Started again without --data it goes on with what the folder holds. A link with a token is printed for every new
labeller, and one for the admin at each start. Every answer is on the disk before the page says so.
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
    """Settings of labelling."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """Where items and judgements are kept; made if it is not there."""
    data: tuple[str, ...] = ()
    """JSONL files of prompts with 2 to 9 responses, or of comparisons."""
    gold: bool = False
    """Keep the ranks of --data as gold, to measure labellers by."""
    calibration: tuple[str, ...] = ()
    """Files of items that every labeller judges, so that all can be compared."""
    quiz: tuple[str, ...] = ()
    """Files of items with ranks that screen labellers before anything else."""
    pass_mark: float = 0.7
    """Share of the quiz's ordered pairs that a labeller must have right."""
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Run folders or published models that answer --prompts, compared blind; give it once for each."""
    prompts: tuple[str, ...] = ()
    """JSONL files of prompts for --run."""
    samples: int = 1
    """Responses of each run to a prompt."""
    max_new_tokens: int = 128
    """Most tokens of a sampled response."""
    temperature: float = 0.7
    """Divides the logits when responses are sampled."""
    seed: int = 0
    """Of what is sampled."""
    labeller: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Names of labellers; each gets a link with a token. None means one person on this machine."""
    new_link: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Labellers whose link was lost: it is made worthless, and another is printed."""
    labellers_per_item: int = 1
    """How many people judge each item."""
    lease_minutes: float = 30.0
    """How long an item waits for a labeller who does nothing before it goes to another."""
    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach needs --labeller."""
    port: int = 8460
    """Port to listen on; 0 takes a free one."""
    origin: str = ""
    """Where the page is seen from outside, such as https://label.example.org, behind a proxy that speaks TLS."""
    serve: bool = True
    """Serve the page; --no-serve only fills the folder."""

    def __post_init__(self) -> None:
        for field, low in (("samples", 1), ("max_new_tokens", 1), ("labellers_per_item", 1), ("port", 0), ("seed", 0)):
            at_least(self, field, low)
        at_least(self, "temperature", 0)
        if not 0 <= self.pass_mark <= 1:
            raise UserError(f"pass_mark: found {self.pass_mark}, wanted 0 to 1")
        if not self.lease_minutes > 0:
            raise UserError(f"lease_minutes: found {self.lease_minutes}, wanted more than 0")
        if bool(self.run) != bool(self.prompts):
            found, wanted = ("--run", "--prompts") if self.run else ("--prompts", "--run")
            raise UserError(f"{wanted[2:]}: found {found} without {wanted}, wanted both or neither")
        if self.run and not 2 <= len(self.run) * self.samples <= MOST_RESPONSES:
            raise UserError(
                f"samples: found {len(self.run)} runs with {self.samples} samples each, wanted 2 to {MOST_RESPONSES} "
                "responses to a prompt"
            )


def run(config: Config) -> None:
    """Fills the folder and serves it until it is told to stop."""
    from rlhf_jax.cli import labelling

    labelling.run(config)
