"""Experiment: made-up answers after pretraining, after fine-tuning, and after RLHF with several rewards.

Facts that a model cannot know teach it to make answers up when it is to imitate them; a reward that prices a wrong
answer, and an abstention, can teach it to say so (Schulman 2023, "Reinforcement Learning from Human Feedback: Progress
and Challenges"; Gekhman et al. 2024, arXiv:2405.05904, for the first half).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, PromptBatch, RankingBatch
from rlhf_jax.config import EpisodeConfig, OptimConfig, PPOConfig
from rlhf_jax.evaluation.intervals import Floats
from rlhf_jax.experiments import facts
from rlhf_jax.experiments.delusion import TOWNS, Student, exact
from rlhf_jax.experiments.facts import ABSTENTION, Question, World
from rlhf_jax.experiments.measures import auroc, calibration_error
from rlhf_jax.experiments.outcome import Outcome, Say, by_arm, shown
from rlhf_jax.experiments.picture import shares
from rlhf_jax.experiments.toy import Fit, Optimise, Words, answer, first_words, fresh, small_model, with_head
from rlhf_jax.logprobs import last_token_scores
from rlhf_jax.rewards import honest_payoff
from rlhf_jax.stages import ppo, pretrain, reward, sft

ASKED, PROMPT, RESPONSE = 12, 24, 12  # columns of a bare question, of one with instruction and source, of an answer
PAGE, ROW = 26, 36
COPYING = 5
"""Fine-tunings one after the other until an answer is copied from its source, which the text has not taught."""
COMPETENCE = 0.9
"""Share of true answers of the demonstrators in the toy of delusion."""
COLUMNS = (
    ("known/right", "known: right"),
    ("known/made_up", "made up"),
    ("unknown/made_up", "unknown: made up"),
    ("unknown/abstained", "abstained"),
    ("auroc", "AUROC"),
    ("calibration_error", "calibration error"),
)
SFT = "SFT, also on what it cannot know"
PAYOFF = "RLHF, payoff +1 / 0 / −4"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment.

    Attributes:
      world: of the world.
      width: of the model.
      layers: of the model.
      pretrain_steps: updates on 64 pages each.
      demonstrations: rows of every fine-tuning.
      sft_steps: updates on 64 demonstrations each.
      reward_steps: updates of a reward model on 32 rankings of four answers each.
      iterations: of PPO, with 64 questions and four answers to each.
      dialogues: of the toy of delusion.
    """

    world: facts.Sizes = dataclasses.field(default_factory=facts.Sizes)
    width: int = 96
    layers: int = 2
    pretrain_steps: int = 600
    demonstrations: int = 480
    sft_steps: int = 40
    reward_steps: int = 80
    iterations: int = 40
    dialogues: int = 4000


SHORT = Sizes(facts.Sizes(4, 4, 4, 4, 4, 6, 200), 32, 1, 6, 32, 2, 2, 2, 64)


class Lab:
    """The compiled programs, which all seeds share."""

    def __init__(self, sizes: Sizes, vocabulary: int) -> None:
        self.sizes = sizes
        shape = functools.partial(small_model, context=PROMPT + RESPONSE + 2, width=sizes.width, layers=sizes.layers)
        self.model = shape(vocabulary)
        self.scorer = shape(vocabulary, scalar=True)
        self.pretrain = Fit(pretrain.make_update, self.model, rate=3e-3, steps=sizes.pretrain_steps, batch=64)
        self.tune = Fit(sft.make_update, self.model, rate=5e-4, steps=sizes.sft_steps, batch=64)
        self.compare = Fit(reward.make_update, self.scorer, rate=5e-4, steps=sizes.reward_steps, batch=32)
        self.scores = jax.jit(lambda params, tokens, mask: last_token_scores(self.scorer, params, tokens, mask))

    def optimise(self, words: Words) -> Optimise:
        """PPO's iteration; groups of four answers are compared with each other, so that no value network is needed."""
        config = PPOConfig(
            batch=256,
            steps=self.sizes.iterations,
            minibatches=2,
            samples_per_prompt=4,
            estimator="grpo",
            prompt_length=ASKED,
            policy=OptimConfig(learning_rate=3e-4, schedule="linear", epsilon=1e-5),
            episode=EpisodeConfig(response_length=RESPONSE),
        )
        return Optimise(ppo.Networks(self.model, self.scorer), config, words, by_text=True)


class Subject:
    """A seed's world with the lab's programs.

    Args:
      lab: the programs.
      world: the facts.
      seed: of all training and sampling.
    """

    def __init__(self, lab: Lab, world: World, seed: int) -> None:
        self.lab, self.world, self.seed = lab, world, seed

    def tuned(self, params: Params, pairs: Sequence[tuple[str, str]]) -> Params:
        """Fine-tune on demonstrations, which are taken in turn until there are enough."""
        rows = [pairs[place % len(pairs)] for place in range(self.lab.sizes.demonstrations)]
        return self.lab.tune(params, self.world.words.rows(rows, ROW), seed=self.seed)[0]

    def evaluate(self, params: Params, **asking: bool) -> dict[str, float]:
        """Measures on the questions that nothing was trained on.

        Returns:
          of known and unknown people each the shares right, abstained and made_up; right and made_up of all; of the
          most likely answer, given that the model answers, the calibration error and the AUROC of its probability for
          right against wrong.
        """
        groups = ("known", "unknown")
        asked = [question for group in groups for question in self.world.questions(group)]
        prompts = self.world.words.prompts([self.world.ask(question, **asking) for question in asked], PROMPT)
        verdicts = self.judged(params, asked, prompts, seed=self.seed + 1)[1]
        edges = np.cumsum([0, *(len(self.world.questions(group)) for group in groups)])
        found = {
            f"{group}/{name}": float(np.mean(verdicts[edges[i] : edges[i + 1]] == value))
            for i, group in enumerate(groups)
            for name, value in (("right", 1), ("abstained", 0), ("made_up", -1))
        }
        for name in ("right", "made_up"):
            found[name] = (found[f"known/{name}"] + found[f"unknown/{name}"]) / 2
        values = self.among_values(params, prompts, asked)
        right = values.argmax(axis=1) == [self.world.values[question] for question in asked]
        found["calibration_error"] = calibration_error(values.max(axis=1), right)
        found["auroc"] = auroc(values.max(axis=1), right)
        return found

    def judged(
        self, params: Params, asked: Sequence[Question], prompts: PromptBatch, *, seed: int
    ) -> tuple[list[str], np.ndarray]:
        """Four answers to each question, and for each 1 if it is right, 0 if it abstains, else -1, [B, 4]."""
        texts = answer(self.lab.model, self.world.words, params, prompts, length=RESPONSE, seed=seed)
        return texts, self.world.judge([question for question in asked for _ in range(4)], texts).reshape(-1, 4)

    def among_values(self, params: Params, prompts: PromptBatch, asked: Sequence[Question]) -> Floats:
        """Probability of each value of the fact in question, given that the answer is one of them: [N, values]."""
        word = first_words(self.lab.model, params, prompts)
        values = np.take_along_axis(word, self.world.value_ids[[question.attribute for question in asked]], axis=1)
        return values / values.sum(axis=1, keepdims=True)

    def rewarded_questions(self) -> tuple[list[Question], PromptBatch, Callable[..., np.ndarray]]:
        """Questions of training by reward, as prompts, and what draws them: half of them about known people."""
        known, unknown = self.world.questions("known_rl"), self.world.questions("unknown_rl")

        def draw(draws: np.random.Generator, count: int) -> np.ndarray:
            half = count // 2
            return np.concatenate(
                [draws.integers(len(known), size=half), len(known) + draws.integers(len(unknown), size=count - half)]
            )

        asked = [*known, *unknown]
        return asked, self.world.words.prompts([self.world.ask(question) for question in asked], ASKED), draw

    def by_comparisons(
        self, start: Params, optimise: Optimise, *, abstentions: bool
    ) -> tuple[Params, dict[str, float]]:
        """RLHF with a reward model from comparisons of four sampled answers: right before wrong, equal ones tied.

        With `abstentions`, one is between the two; else it is in no comparison.

        Returns:
          (the policy, mean normalized scores of right, abstaining and wrong answers of the initial policy).
        """
        asked, _, _ = self.rewarded_questions()
        words, world = self.world.words, self.world
        prompts = words.prompts([world.ask(question) for question in asked], PROMPT)
        texts, verdicts = self.judged(start, asked, prompts, seed=self.seed + 2)
        rows = words.rows([(world.ask(asked[i // 4]), text) for i, text in enumerate(texts)], ASKED + RESPONSE)
        shape = (len(asked), 4, ASKED + RESPONSE)
        exists = np.ones(verdicts.shape, bool) if abstentions else verdicts != 0
        batch = RankingBatch(
            rows.tokens_BT.reshape(shape),
            rows.segment_ids_BT.reshape(shape) > 0,
            jnp.asarray(2 - verdicts, jnp.int32),
            jnp.asarray(exists),
        )
        judge, _ = self.lab.compare(with_head(start, self.lab.scorer, self.seed), batch, seed=self.seed)

        def scores(places: Sequence[int], texts: Sequence[str]) -> Floats:
            pairs = [(world.ask(asked[i]), text) for i, text in zip(places, texts, strict=True)]
            found = []
            for first in range(0, len(pairs), 256):
                part = words.rows(pairs[first : first + 256], ASKED + RESPONSE)
                missing = 256 - len(part.tokens_BT)
                padded = [jnp.pad(x, ((0, missing), (0, 0))) for x in (part.tokens_BT, part.segment_ids_BT > 0)]
                found.append(np.asarray(self.lab.scores(judge, *padded), np.float64)[: 256 - missing])
            return np.concatenate(found)

        raw = scores([i // 4 for i in range(len(texts))], texts)
        mean, scale = float(raw.mean()), float(raw.std())
        told = {
            name: float(np.mean((raw - mean)[chosen]) / scale)
            if (chosen := verdicts.ravel() == value).any()
            else np.nan
            for name, value in (("right", 1), ("abstained", 0), ("wrong", -1))
        }
        return self._rewarded(start, optimise, lambda *given: ((scores(*given) - mean) / scale).tolist()), told

    def by_payoff(self, start: Params, optimise: Optimise) -> Params:
        """RLHF with a payoff for each kind of answer, by somebody who knows the right one."""
        answers = [self.world.value(question) for question in self.rewarded_questions()[0]]

        def payoff(places: Sequence[int], texts: Sequence[str]) -> list[float]:
            return [value or 0.0 for value in honest_payoff(texts, [answers[i] for i in places])]

        return self._rewarded(start, optimise, payoff)

    def _rewarded(self, start: Params, optimise: Optimise, reward: Callable[..., Sequence[float]]) -> Params:
        _, prompts, draw = self.rewarded_questions()
        frozen = ppo.Frozen(start, None, jnp.float32(0), jnp.float32(1))
        return optimise(start, None, frozen, prompts, draw, seed=self.seed, kl_coef=0.05, reward=reward)


def arms(subject: Subject, optimise: Optimise, say: Say) -> dict[str, dict[str, float]]:
    """Train and evaluate every arm of a seed: name -> measures."""
    world, found = subject.world, {}

    def measured(name: str, params: Params, **asking: bool) -> None:
        found[name] = figures = subject.evaluate(params, **asking)
        say(f"  {name}: made up {figures['made_up']:.2f}, right {figures['right']:.2f}")

    lab, seed = subject.lab, subject.seed
    base, _ = lab.pretrain(fresh(lab.model, seed), world.words.rows(world.pages(), PAGE), seed=seed)
    measured("pretrained", base)
    can, cannot = world.questions("known_sft"), world.questions("told")
    asked = [*can, *cannot]

    def plain(questions: Sequence[Question]) -> list[tuple[str, str]]:
        return [(world.ask(question), world.maybe(world.short(question))) for question in questions]

    measured("SFT on what it can know", subject.tuned(base, plain(can)))
    start = subject.tuned(base, plain(asked))
    measured(SFT, start)
    measured("… long answers, two claims", subject.tuned(base, [(world.ask(one), world.long(one)) for one in asked]))
    careful = subject.tuned(base, careful_demonstrations(subject, base, asked))
    measured("… taught “if unsure say so”, asked without", careful)
    measured("… the same, asked with it", careful, careful=True)
    sourced = base
    for _ in range(COPYING):
        sourced = subject.tuned(sourced, [(world.ask(one, source=True), world.short(one)) for one in asked])
    measured("… with the source in the prompt", sourced, source=True)
    for name, abstentions in (
        ("RLHF, comparisons of answers only", False),
        ("RLHF, right > don’t know > wrong", True),
    ):
        params, told = subject.by_comparisons(start, optimise, abstentions=abstentions)
        measured(name, params)
        found[name] |= {f"score/{kind}": value for kind, value in told.items()}
    measured(PAYOFF, subject.by_payoff(start, optimise))
    return found


def careful_demonstrations(subject: Subject, base: Params, asked: Sequence[Question]) -> list[tuple[str, str]]:
    """Each question twice: plain with its answer, and with the instruction, "I don't know" where the model does not.

    It knows an answer if it gives it a probability of a half or more.
    """
    world = subject.world
    prompts = world.words.prompts([world.ask(question) for question in asked], PROMPT)
    right = np.array([world.values[question] for question in asked])
    knows = subject.among_values(base, prompts, asked)[np.arange(len(asked)), right] >= 0.5
    pairs = []
    for question, known in zip(asked, knows, strict=True):
        pairs.append((world.ask(question), world.short(question)))
        pairs.append((world.ask(question, careful=True), world.short(question) if known else ABSTENTION))
    return pairs


class Experiment:
    """The experiment on hallucination.

    Args:
      short: on a tiny world, for tests.
    """

    def __init__(self, short: bool) -> None:
        self.sizes = SHORT if short else Sizes()
        words = World(self.sizes.world, 0).words
        self._lab = Lab(self.sizes, len(words))
        self._optimise = self._lab.optimise(words)
        self._student = Student(COMPETENCE, self.sizes.pretrain_steps // 4 + 1, self.sizes.dialogues)

    def one(self, seed: int, say: Say) -> dict[str, Any]:
        """Run one repetition."""
        subject = Subject(self._lab, World(self.sizes.world, seed), seed)
        return {"arms": arms(subject, self._optimise, say), "delusion": self._student.learned(seed)}

    def outcome(self, found: Sequence[Mapping[str, Any]]) -> Outcome:
        """Combine the seeds."""
        figures = by_arm([one["arms"] for one in found])
        observed, acted = (dataclasses.asdict(beliefs) for beliefs in exact(len(TOWNS), COMPETENCE))
        learned = by_arm([{"learned": one["delusion"]} for one in found])
        outcome = Outcome(
            figures,
            COLUMNS,
            "",
            [],
            bounded={name for measures in figures.values() for name in measures if not name.startswith("score/")},
            more={"delusion": {"exact": {"conditioning": observed, "intervening": acted}, **learned}},
        )
        rows = {
            arm: [
                [outcome.estimate(arm, f"{group}/{kind}") for kind in ("right", "abstained", "made_up")]
                for group in ("known", "unknown")
            ]
            for arm in figures
        }
        picture = shares("Answers by what the model can know", ("people in the text", "people not in the text"), rows)
        return dataclasses.replace(outcome, picture=picture, sentences=sentences(outcome))


def sentences(outcome: Outcome) -> list[str]:
    """The bar, and the toy, in words."""
    made, kept = ([outcome.estimate(arm, name) for arm in (SFT, PAYOFF)] for name in ("made_up", "right"))
    met = made[1].value <= made[0].value / 2 and kept[0].value - kept[1].value <= 0.05
    learned = {name: float(np.mean(values)) for name, values in outcome.more["delusion"]["learned"].items()}
    return [
        f"made up, of all questions: {shown(made[0])} after SFT, {shown(made[1])} with the payoff; right: "
        f"{shown(kept[0])} and {shown(kept[1])}: at most half the made-up answers for at most 5 points of the right "
        f"ones, {'reached' if met else 'not reached'}",
        f"delusion: after imitation P(its own answer is true) {learned['imitation']:.2f}, after training on its own "
        f"answers {learned['intervention']:.2f}; true {learned['true']:.2f}",
    ]
