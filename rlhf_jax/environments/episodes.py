"""Episodes on the host, turn by turn, and the arrays that they become."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.arrays import PromptBatch
from rlhf_jax.data import PromptRows, observation_ids, response_text
from rlhf_jax.environments.calling import Caller
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generation
from rlhf_jax.stages.turns import Turns
from rlhf_jax.tokenizers.protocol import TextTokenizer


@dataclasses.dataclass
class Episode:
    """An episode so far.

    Attributes:
      row: row of its prompt.
      state: the environment's state.
      ids: token ids after the prompt, of turns and observations.
      own: True for those that the policy sampled.
      logp: log-probability in nats of each of those, 0 for others.
      rewards: (number of tokens up to the end of the turn, reward) of each turn.
      said: (what the policy said, what the environment replied) in each turn; "" once it is done.
      is_over: no further turn follows.
      ended: the environment ended it, and the last turn has its end token.
    """

    row: int
    state: Any
    ids: list[int] = dataclasses.field(default_factory=list)
    own: list[bool] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)
    rewards: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    said: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    is_over: bool = False
    ended: bool = False

    @property
    def reward(self) -> float:
        """Sum of the rewards of all turns."""
        return sum(reward for _, reward in self.rewards)

    def add(self, ids: Sequence[int], logp: Sequence[float] | None = None) -> None:
        """Append sampled tokens, or those of an observation, which have no log-probability."""
        self.ids += ids
        self.own += [logp is not None] * len(ids)
        self.logp += [0.0] * len(ids) if logp is None else logp


@dataclasses.dataclass(frozen=True)
class Table:
    """Where episodes are played: the environment, the prompts and the limits.

    Attributes:
      environment: the environment.
      prompts: the prompts.
      tokenizer: decodes turns and encodes observations.
      length: room for an episode after the prompt, R tokens.
      turn_length: room for a turn.
      turns: most turns of an episode.
    """

    environment: Caller
    prompts: PromptRows
    tokenizer: TextTokenizer
    length: int
    turn_length: int
    turns: int

    def start(self, rows: Sequence[int]) -> list[Episode]:
        """Episodes without a turn, each with a state of its own."""
        return [Episode(row, self.environment.start(row)) for row in rows]

    def take(self, episodes: Sequence[Episode], sampled: Sequence[Any], turn: int) -> None:
        """Add the policy's turn to all episodes that are not over, and the environment's reply.

        An episode is over once the environment says so, after a turn that was cut at its limit, after the last turn,
        and where a further turn would not fit behind the observation.

        Args:
          episodes: the episodes, which are changed.
          sampled: tokens, mask and log-probabilities of each episode's turn, as in `Generation`.
          turn: number of the turn, from 0.

        Raises:
          UserError: for a reply that is none, or an observation that cannot be rendered.
        """
        tokens, mask, logp = map(np.asarray, sampled)
        live = [at for at, episode in enumerate(episodes) if not episode.is_over]
        texts = []
        for at in live:
            ids = tokens[at][mask[at]].tolist()
            texts.append(self._text(episodes[at], ids))
            episodes[at].add(ids, logp[at][mask[at]].tolist())
        if not live:
            return
        states = [episodes[at].state for at in live]
        replies = self.environment([episodes[at].row for at in live], states, texts, turn)
        for at, text, reply in zip(live, texts, replies, strict=True):
            episode = episodes[at]
            episode.said.append((text, reply.observation.content))
            episode.state = reply.state
            episode.rewards.append((len(episode.ids), reply.reward))
            cut = episode.ids[-1] not in self.tokenizer.stop_ids
            episode.ended = reply.done and not cut
            episode.is_over = reply.done or cut or turn + 1 == self.turns
            if episode.is_over:
                continue
            ids = self._observation(episode, reply.observation, turn)
            episode.is_over = len(episode.ids) + len(ids) + self.turn_length > self.length
            if not episode.is_over:
                episode.add(ids)

    def so_far(self, episodes: Sequence[Episode]) -> PromptBatch:
        """The episodes as prompts for their next turn; of those that are over the prompt alone."""
        prompts = [[*self.prompts.rows[each.row], *([] if each.is_over else each.ids)] for each in episodes]
        width = self.prompts.width + self.length - self.turn_length
        rows = PromptRows(prompts, width, self.tokenizer.pad_id)
        return rows.batch(np.arange(len(prompts)))

    def arrays(self, episodes: Sequence[Episode], weight: float) -> tuple[Generation, np.ndarray, Turns]:
        """The policy's tokens [B, R], the sum of each episode's rewards [B, 1], and the environment's part.

        Args:
          episodes: the episodes.
          weight: weight of the environment's rewards in the reward.
        """
        shape = (len(episodes), self.length)
        tokens, mask = np.full(shape, self.tokenizer.pad_id, np.int32), np.zeros(shape, bool)
        own, logp, reward = np.zeros(shape, bool), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for at, episode in enumerate(episodes):
            size = len(episode.ids)
            tokens[at, :size], mask[at, :size] = episode.ids, True
            own[at, :size], logp[at, :size] = episode.own, episode.logp
            for end, value in episode.rewards[:-1]:
                reward[at, end - 1] = weight * value
        total = np.array([[episode.reward] for episode in episodes], np.float32)
        ended = np.array([episode.ended for episode in episodes])
        count = np.array([len(episode.rewards) for episode in episodes], np.int32)
        sampled: list[Any] = [tokens, own, logp]
        turns: list[Any] = [mask, reward, ended, count]
        return Generation(*sampled), total, Turns(*turns)

    def _text(self, episode: Episode, ids: list[int]) -> str:
        decoded = response_text([*self.prompts.rows[episode.row], *episode.ids], ids, self.tokenizer)
        # The answer to messages starts with a space in the Human / Assistant template, which is not its content.
        turns = self.prompts.sources[episode.row].turns
        return decoded.removeprefix(" ") if turns and self.tokenizer.chat_template is None else decoded

    def _observation(self, episode: Episode, observation: Any, turn: int) -> list[int]:
        try:
            return observation_ids(self.prompts.sources[episode.row].turns, observation, self.tokenizer)
        except UserError as error:
            name, prompt = self.environment.name, self.prompts.sources[episode.row]
            place = prompt.where or f"prompt {episode.row + 1}"
            raise UserError(f"environment {name!r}: {place}: turn {turn + 1}: observation: {error}") from None
