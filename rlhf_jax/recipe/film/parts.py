"""Training, judge and held-out parts of people's judgements, and the records that the stages read from them.

Sentences (or, where the data has prompts, prompts) are divided, not comparisons: the judge has seen no sentence that
the reward model has seen, and both are measured on sentences that neither has seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import Comparison, Ledger, Ranking
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.data.split import prompt_key
from rlhf_jax.errors import UserError
from rlhf_jax.recipe.film.ratings import RatedSentence
from rlhf_jax.recipe.film.settings import DataConfig

Rows = list[dict[str, Any]]
Judged = Comparison | Ranking
Whole = Callable[[str, str], bool]
"""True if an opening and the rest of its sentence have the tokens of the sentence."""
PARTS = ("train", "judge", "heldout")


class Continued(NamedTuple):
    """The fields of these names of `Records`."""

    demonstrations: Rows
    prompts: Rows
    text: Rows
    heldout_prompts: Rows


@dataclasses.dataclass
class Records:
    """Rows of the JSONL files that the stages read, as a user would write them.

    Attributes:
      demonstrations: of the training part, for SFT.
      rankings: of the training part, for the reward model.
      prompts: of the training part, for PPO.
      text: of the training part, for PPO's pretraining mix.
      judge: rankings of the judge's part.
      heldout: comparisons of the held-out part.
      heldout_prompts: distinct prompts that the training part does not have.
      openings: True if the prompts are openings of sentences, so that prompt and answer together are a sentence.
      human: share of the held-out comparisons on which another rater would agree; None if that is not known.
    """

    demonstrations: Rows = dataclasses.field(default_factory=list)
    rankings: Rows = dataclasses.field(default_factory=list)
    prompts: Rows = dataclasses.field(default_factory=list)
    text: Rows = dataclasses.field(default_factory=list)
    judge: Rows = dataclasses.field(default_factory=list)
    heldout: Rows = dataclasses.field(default_factory=list)
    heldout_prompts: Rows = dataclasses.field(default_factory=list)
    openings: bool = True
    human: float | None = None

    @property
    def files(self) -> dict[str, Rows]:
        """The rows by the name of their file."""
        return {name: value for name, value in vars(self).items() if isinstance(value, list)}


def part_of(key: str, config: DataConfig) -> str:
    """The part that a sentence or prompt belongs to, by its hash: the same in every run, whatever else is there."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return "train" if share < config.train else "judge" if share < config.train + config.judge else "heldout"


def sentence_key(text: str) -> str:
    """A sentence with white space normalized."""
    return " ".join(text.split())


# From ratings


def from_ratings(sentences: Sequence[RatedSentence], config: DataConfig, whole: Whole, seed: int) -> Records:
    """Rankings of several sentences each by their mean ratings, and comparisons of held-out ones by single raters.

    Args:
      sentences: rated sentences.
      config: settings.
      whole: see `Whole`.
      seed: of who is ranked beside whom.

    Raises:
      UserError: if a part has fewer sentences than a ranking.
    """
    parts: dict[str, list[RatedSentence]] = {name: [] for name in PARTS}
    for sentence in sentences:
        parts[part_of(sentence_key(sentence.text), config)].append(sentence)
    for name, members in parts.items():
        if len(members) < config.ranking_size:
            raise UserError(
                f"data: expected {config.ranking_size} or more sentences in the part {name}, got {len(members)} of "
                f"{len(sentences)}; use more data, or other shares in data.yaml"
            )
    random = np.random.default_rng([seed, 28])
    heldout, human = compared(parts["heldout"], config.least_gap, random)
    return Records(
        rankings=list(ranked(parts["train"], config.ranking_size, config.passes, random)),
        judge=list(ranked(parts["judge"], config.ranking_size, config.judge_passes, random)),
        heldout=heldout,
        human=human,
        **_continuations(
            [one.text for one in parts["train"]], [one.text for one in parts["heldout"]], config, whole
        )._asdict(),
    )


def ranked(sentences: Sequence[RatedSentence], size: int, passes: int, random: np.random.Generator) -> Iterator[dict]:
    """Rankings of `size` sentences each, every sentence in `passes` of them (a few in one more, to fill the last).

    A ranking whose sentences are all tied is left out.
    """
    for _ in range(passes):
        order = random.permutation(len(sentences))
        order = np.concatenate([order, order[: -len(order) % size]])
        for group in order.reshape(-1, size):
            members = [sentences[i] for i in group]
            ranks = ranks_of(members)
            if len(set(ranks)) > 1:
                yield {"prompt": "", "responses": [one.text for one in members], "ranks": ranks}


def ranks_of(sentences: Sequence[RatedSentence]) -> list[int]:
    """Ranks by mean rating, 1 for the best; sentences are tied with the best of their rank within the raters' noise.

    A sentence has a rank of its own if its mean is below that of the first of the rank above by more than one standard
    error of the difference. A rank is 1 plus the number of sentences ranked above.
    """
    ranks = [0] * len(sentences)
    order = sorted(range(len(sentences)), key=lambda i: -sentences[i].mean)
    first = sentences[order[0]]
    rank = 1
    for place, at in enumerate(order):
        if first.mean - sentences[at].mean > float(np.hypot(first.error, sentences[at].error)):
            first, rank = sentences[at], place + 1
        ranks[at] = rank
    return ranks


def compared(
    sentences: Sequence[RatedSentence], least_gap: float, random: np.random.Generator
) -> tuple[Rows, float | None]:
    """Comparisons by single raters, each sentence in one at most, and how often another rater agrees.

    The two ratings of a comparison are drawn from those of its sentences, given that they differ.

    Args:
      sentences: of the held-out part.
      least_gap: least difference of the mean ratings.
      random: draws the pairs and the ratings.
    """
    rows, agreement = [], []
    waiting = [sentences[i] for i in random.permutation(len(sentences))]
    while waiting:
        one = waiting.pop()
        at = next((i for i, other in enumerate(waiting) if abs(one.mean - other.mean) >= least_gap), None)
        if at is None:
            continue
        other = waiting.pop(at)
        chance = preferred(one, other)
        if chance is None:
            continue
        better, worse = (one, other) if random.random() < chance else (other, one)
        rows.append({"prompt": "", "chosen": better.text, "rejected": worse.text})
        agreement.append(chance**2 + (1 - chance) ** 2)
    return rows, float(np.mean(agreement)) if agreement else None


def preferred(one: RatedSentence, other: RatedSentence) -> float | None:
    """Probability that a rater gives `one` more than another rater gives `other`, given that they differ.

    None if all ratings are the same.
    """
    gap = np.subtract.outer(np.array(one.ratings), np.array(other.ratings))
    return float((gap > 0).sum() / (gap != 0).sum()) if gap.any() else None


# From comparisons and rankings


def from_records(records: Sequence[Judged], config: DataConfig, whole: Whole, ledger: Ledger) -> Records:
    """The user's own comparisons or rankings.

    Those with prompts are divided by prompt. Answers without a prompt are sentences, which are divided; a comparison
    whose sentences are in different parts is dropped, which the ledger records.

    Raises:
      UserError: for data of which some has prompts and some has none, and if a part is empty.
    """
    kept = [record for record in records if not _refused(record, ledger)]
    bare = [record for record in kept if not record.prompt.strip()]
    if bare and len(bare) < len(kept):
        other = next(record for record in kept if record.prompt.strip())
        raise UserError(
            f"{bare[0].where}: field 'prompt': expected a prompt in all rows or in none, got none here and one in "
            f"{other.where}; use one file for each kind"
        )
    parts: dict[str, list[Judged]] = {name: [] for name in PARTS}
    for record in kept:
        keys = [sentence_key(text) for text in _texts(record)] if bare else [prompt_key(record)]
        names = {part_of(key, config) for key in keys}
        if len(names) > 1:
            ledger.drop(record.where, "its sentences are in different parts, of which the judge's is kept apart")
            continue
        ledger.keep(record.where)
        parts[names.pop()].append(record)
    for name, members in parts.items():
        if not members:
            raise UserError(
                f"data: expected comparisons in the part {name}, got none of {len(records)}; use more data, or other "
                "shares in data.yaml"
            )
    found = Records(
        rankings=[_row(record) for record in parts["train"]],
        judge=[_row(record) for record in parts["judge"]],
        heldout=[_row(record) for record in parts["heldout"]],
        openings=bool(bare),
    )
    if bare:
        made = _continuations(_distinct(parts["train"]), _distinct(parts["heldout"]), config, whole)
    else:
        made = _exchanges(parts["train"], parts["heldout"])
    return dataclasses.replace(found, **made._asdict())


def _refused(record: Judged, ledger: Ledger) -> bool:
    if record.rests:
        ledger.drop(record.where, "an answer of several messages")
    return bool(record.rests)


def _texts(record: Judged) -> tuple[str, ...]:
    return (record.chosen, record.rejected) if isinstance(record, Comparison) else record.responses


def _distinct(records: Iterable[Judged]) -> list[str]:
    """The sentences of records without prompts, each once."""
    return list({sentence_key(text): text for record in records for text in _texts(record)}.values())


def _answers(record: Judged) -> list[str]:
    """The answers as files have them: with messages, without the space that follows the header."""
    return [text.removeprefix(" ") if record.turns else text for text in _texts(record)]


def _asked(record: Judged) -> dict[str, Any]:
    return prompt_row(record.turns) if record.turns else {"prompt": record.prompt}


def _row(record: Judged) -> dict[str, Any]:
    """A record as a line of a file."""
    ranks = [1, 2] if isinstance(record, Comparison) else list(record.ranks)
    ended = {"ended": list(record.ended)} if record.ended else {}
    return {**_asked(record), "responses": _answers(record), "ranks": ranks, **ended}


def _exchanges(train: Sequence[Judged], heldout: Sequence[Judged]) -> Continued:
    """Demonstrations, prompts and text of comparisons with prompts: all answers, the better and the worse."""
    demonstrations: dict[str, dict[str, Any]] = {}
    text: Rows = []
    for record in train:
        for place, answer in enumerate(_answers(record)):
            cut = bool(record.ended) and not record.ended[place]
            row = {**_asked(record), "completion": answer, **({"ended": False} if cut else {})}
            if demonstrations.setdefault(f"{prompt_key(record)} {answer}", row) is not row:
                continue
            if record.turns:
                messages = [*prompt_row(record.turns)["prompt"], {"role": "assistant", "content": answer}]
                text.append({"messages": messages})
            else:
                text.append({"text": record.prompt + answer})
    prompts, held = ({prompt_key(record): _asked(record) for record in part} for part in (train, heldout))
    return Continued(list(demonstrations.values()), list(prompts.values()), text, list(held.values()))


# Openings


class Opened(NamedTuple):
    """A sentence in two: its first words, and the rest with the space before it."""

    opening: str
    rest: str


def opened(text: str, words: int, whole: Whole) -> Opened | None:
    """A sentence cut after its first words; None if nothing follows them, or if the cut changes its tokens."""
    match = re.match(rf"\S+(?:\s+\S+){{{words - 1}}}(?=\s+\S)", text)
    if match is None or not whole(match[0], text[match.end() :]):
        return None
    return Opened(match[0], text[match.end() :])


def _continuations(train: Sequence[str], heldout: Sequence[str], config: DataConfig, whole: Whole) -> Continued:
    """Demonstrations, prompts and text of sentences without prompts, by openings."""
    cut, held = (
        [one for text in part if (one := opened(text.strip(), config.opening_words, whole))]
        for part in (train, heldout)
    )
    seen = {one.opening for one in cut}
    new = dict.fromkeys(one.opening for one in held if one.opening not in seen)
    return Continued(
        demonstrations=[{"prompt": one.opening, "completion": one.rest} for one in cut],
        prompts=[{"prompt": one.opening} for one in cut],
        text=[{"text": text.strip()} for text in train],
        heldout_prompts=[{"prompt": opening} for opening in new],
    )
