"""Checks of a policy by a fresh rollout: its KL and ratio before an update, its sampler, its answers, its values."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.arrays import Params, PromptBatch, Rollout
from rlhf_jax.config import EpisodeConfig, PPOConfig
from rlhf_jax.data import Ledger, PromptRows, encode_demonstrations, encode_prompts
from rlhf_jax.doctor.checks import Check, LeftOut, Measured
from rlhf_jax.doctor.columns import column, quarters
from rlhf_jax.doctor.patient import AMONG, Patient, exact
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.warnings import ANSWERS_CUT
from rlhf_jax.model import Transformer, count_parameters
from rlhf_jax.pretrained import convert
from rlhf_jax.pretrained.source import LANGUAGE, PUBLISHED, Source, open_source
from rlhf_jax.stages import ppo
from rlhf_jax.trainers.alarms import REPEATED, SAME, Limits
from rlhf_jax.trainers.ppo_start import difference

# Nats, and relative error of a ratio, of two passes over the same tokens.
FIRST = 1e-4
# Nats: mean difference of the sampler's log-probabilities; with a cache in fewer bits.
SAMPLER, ROUNDED = 1e-3, 0.05
# Share of the variance of returns from which on the loss of a value network need not fall.
LEARNED = 0.5
# Floating point operations of a rollout, which take some ten seconds on two cores; answers, their most tokens, and
# those of their prompts.
WORK, MOST, LONGEST, SHORT = 1e12, 64, 128, 256


@dataclasses.dataclass(frozen=True)
class Rolled:
    """A compiled rollout of a patient's policy, with the networks that PPO has beside it.

    Attributes:
      run: (reference parameters, β) -> (episodes, metrics).
      reference: parameters of the run's own reference model; None if it is not there.
      no_values: why the value network cannot be checked; "" if it can.
      own_prompts: True if the prompts are from the data, False if they are the beginnings of other rows.
      room: most tokens of a response.
      capped: True if answers may be longer.
    """

    run: Any
    reference: Params | None
    no_values: str
    own_prompts: bool
    room: int
    capped: bool


@functools.lru_cache(maxsize=1)
def rolled(patient: Patient) -> Rolled:
    """The rollout of a patient, as its PPO run is set, or as PPO is by default."""
    reward, reference, critic, why = companions(patient)
    episode, capped = episode_of(patient)
    prompts, own = prompts_of(patient, episode.response_length)
    rows = len(prompts.rows)
    episode = dataclasses.replace(episode, pack=episode.pack if episode.pack and rows % episode.pack == 0 else 0)
    scorer = Transformer(patient.network.config, scalar=True) if reward is None else exact(reward)
    networks = ppo.Networks(patient.network, scorer)
    params = {"policy": patient.params} | ({} if critic is None else {"critic": critic})
    mean, scale = patient.normalization
    frozen = ppo.Frozen(
        reference=patient.params,
        reward=None if reward is None else reward.params(),
        score_mean=jnp.float32(mean),
        score_scale=jnp.float32(scale),
    )
    rollout = ppo.make_rollout(
        networks,
        episode,
        eos_id=patient.tokenizer.stop_ids,
        pad_id=patient.tokenizer.pad_id,
        estimator="reinforce_pp" if critic is None else "gae",
    )
    config = PPOConfig(episode=episode)

    @jax.jit
    def compiled(
        params: dict[str, Params], frozen: ppo.Frozen, prompts: PromptBatch, key: Any, kl_coef: Any
    ) -> tuple[Rollout, dict[str, Any]]:
        episodes, metrics = rollout(params, frozen, prompts, key, kl_coef)
        laid, _ = ppo.episode_rows(episodes, packed=episode.pack > 0)
        _, more = ppo.objective(networks, params, laid, jnp.sum(episodes.response_mask_BR), config)
        return episodes, metrics | {"ratio_error": more["ratio_error"]}

    batch = prompts.batch(np.arange(rows))

    def run(reference: Params, kl_coef: float) -> tuple[Rollout, dict[str, float]]:
        beside = dataclasses.replace(frozen, reference=reference)
        episodes, metrics = compiled(params, beside, batch, jax.random.key(0), jnp.float32(kl_coef))
        return episodes, {name: float(value) for name, value in metrics.items()}

    return Rolled(run, reference, why, own, episode.response_length, capped)


def episode_of(patient: Patient) -> tuple[EpisodeConfig, bool]:
    """Settings of the rollout, of a PPO run with λ 1, so that the targets of the values are the returns.

    Returns:
      (settings, True if the answers of the data are longer than those of the rollout).
    """
    context = patient.network.config.context
    most = min(LONGEST, context // 2)
    if patient.stage == "ppo":
        own = patient.ppo.episode
        length = min(own.response_length, most)
        own = dataclasses.replace(own, segments=1, decode_parts=0, gae_lambda=1.0)
        return dataclasses.replace(own, response_length=length), length < own.response_length
    some = patient.records.demonstrations[:AMONG]
    rows = encode_demonstrations(some, patient.tokenizer, max_tokens=context, ledger=Ledger()).rows
    # A dialogue has several answers.
    answers = [len(list(run)) for _, mask in rows for learned, run in itertools.groupby(mask) if learned]
    longest = max(answers, default=32)
    return EpisodeConfig(response_length=max(min(longest, most), 1), missing_end="keep"), longest > most


def prompts_of(patient: Patient, response_length: int) -> tuple[PromptRows, bool]:
    """Prompts for the rollout, a power of two of them; (prompts, True if they are the data's own)."""
    room = patient.network.config.context - response_length
    width = min(patient.ppo.prompt_length, room) if patient.stage == "ppo" else room
    some = patient.records.prompts[: 4 * AMONG]
    ids = [ids for ids in encode_prompts(some, patient.tokenizer, max_tokens=width, ledger=Ledger()).rows if ids]
    own = bool(ids)
    if not own:
        ids = [row[: max(len(row) // 2, 1)] for row, _ in patient.rows]
    # Long prompts would take longer than a minute, and long and short ones are padded alike.
    bound = max(SHORT, sorted(map(len, ids))[min(len(ids), 4) - 1])
    ids = [each for each in ids if len(each) <= bound]
    width = max(map(len, ids))
    work = 12 * count_parameters(patient.params) * (width + response_length)
    rows = MOST
    while rows > 4 and rows * work > WORK:
        rows //= 2
    chosen = np.linspace(0, len(ids) - 1, min(rows, len(ids))).round().astype(int)
    return PromptRows([ids[chosen[at % len(chosen)]] for at in range(rows)], width, patient.tokenizer.pad_id), own


def companions(patient: Patient) -> tuple[Source | None, Params | None, Params | None, str]:
    """(reward model, parameters of the reference, value network, "") of a PPO run; or None each, and why."""
    if patient.stage != "ppo" or patient.run is None:
        return None, None, None, "it is no PPO run"
    config = patient.ppo
    if not config.value_network:
        return None, None, None, f"the estimator {config.estimator} has no value network"
    if config.reward_function or config.environment:
        return None, None, None, "its reward has functions or an environment, which are not called here"
    found = []
    try:
        for spec, stages in ((config.reward, ("reward",)), (config.reference or config.init, LANGUAGE)):
            at = spec if spec.startswith(PUBLISHED) else patient.run.find(spec)
            if at is None:
                return None, None, None, f"{spec or 'its reward model'} is not there"
            found.append(open_source(at, stages=stages))
        reward, reference = found
        if difference(patient.opened, reference) is not None:
            return None, None, None, "its reference model has another architecture"
        return reward, reference.params(), convert.value_network(patient.opened).params(), ""
    except UserError as error:
        return None, None, None, str(error)


@functools.lru_cache(maxsize=1)
def fresh(patient: Patient) -> dict[str, float]:
    """Metrics of a rollout whose reference model is the policy itself."""
    metrics: dict[str, float] = rolled(patient).run(patient.params, 0.0)[1]
    return metrics


def kl_and_ratio(patient: Patient) -> Measured:
    """KL to the policy itself, and the ratio before the first update."""
    kl, ratio = fresh(patient)["kl"], fresh(patient)["ratio_error"]
    return Measured(
        abs(kl) <= FIRST and ratio <= FIRST, f"KL to itself {kl:.2g} nats a response, |ratio − 1| {ratio:.2g}"
    )


def cached_decoding(patient: Patient) -> Measured:
    """The sampler's log-probabilities against those of the full forward pass."""
    error, dtype = fresh(patient)["sampler_logp_error"], patient.ppo.episode.cache_dtype
    limit = SAMPLER if dtype == "model" else ROUNDED
    return Measured(error <= limit, f"log-probabilities of {dtype} cache and full pass differ by {error:.2g} nats")


def sampled(patient: Patient) -> dict[str, float]:
    """Metrics of answers to the data's own prompts."""
    if not rolled(patient).own_prompts:
        raise LeftOut("no prompts to answer; give some with --data")
    return fresh(patient)


def answers_end(patient: Patient) -> Measured:
    """Fresh answers that are cut at the limit."""
    missing, room = sampled(patient)["missing_end"], rolled(patient).room
    # A published model was not trained on these rows: its answers may be longer.
    known = patient.stage == "ppo" or (patient.stage != "published" and bool(patient.records.demonstrations))
    if missing > ANSWERS_CUT and (rolled(patient).capped or not known):
        raise LeftOut(f"{missing:.0%} have no end within {room} tokens, but answers may be longer")
    return Measured(missing <= ANSWERS_CUT, f"{missing:.0%} of the answers have no end within {room} tokens")


def answers_differ(patient: Patient) -> Measured:
    """Fresh answers that are the same to all prompts, or repeat themselves."""
    share = sampled(patient).get("same_answer")
    repeated = sampled(patient)["repeated_pairs"]
    if share is None:
        raise LeftOut("too few prompts to compare the answers to")
    return Measured(
        share < SAME and repeated < REPEATED,
        f"{share:.0%} are the same answer; {repeated:.0%} of the pairs of tokens are repetitions",
    )


def values(patient: Patient) -> Measured:
    """Share of the variance of fresh returns that the value network explains, and whether it has learned at all."""
    norms = [value for _, value in column(patient, "critic_param_norm")]
    if len(norms) > 1 and max(norms) == min(norms):
        return Measured(False, f"its parameters never change (critic_param_norm {norms[0]:.6g} in all rows)")
    if not patient.ppo.value_network:
        raise LeftOut(f"the estimator {patient.ppo.estimator} has no value network")
    first, last = quarters(patient, "value_loss")
    course = f"value_loss {first:.3g}, then {last:.3g}"
    rollout = rolled(patient)
    if rollout.reference is None:
        # The deviation of other rewards than a reward model's may grow, and the loss with it.
        if not Limits.of(patient.ppo).normalized:
            raise LeftOut(rollout.no_values)
        return Measured(last < first, f"{course}; fresh returns are unknown, as {rollout.no_values}")
    kl_coef = float(patient.summary.get("kl_coef", patient.ppo.kl_coef)) if patient.ppo.kl_in == "reward" else 0.0
    episodes, _ = rollout.run(rollout.reference, kl_coef)
    mask = np.asarray(episodes.response_mask_BR)
    value, returns = (np.asarray(x, np.float64)[mask] for x in (episodes.value_BR, episodes.target_BR))
    variance = float(returns.var())
    if variance == 0:
        raise LeftOut("all returns are the same")
    explained = 1 - float(np.square(returns - value).mean()) / variance
    return Measured(
        explained > 0 and (last < first or explained >= LEARNED),
        f"values explain {explained:.2f} of the variance of {len(mask)} fresh returns; {course}",
    )


def reward_trusted(patient: Patient) -> Measured:
    """Reasons not to trust the reward model, as its run has found them."""
    spec = patient.ppo.reward
    at = spec if spec.startswith(PUBLISHED) or patient.run is None else patient.run.find(spec)
    if not spec or at is None:
        raise LeftOut(f"{spec} is not there" if spec else "the reward is of functions alone")
    warnings = open_source(at, stages=("reward",)).warnings
    return Measured(not warnings, "; ".join(warnings) or f"{spec} has no warnings")


ANSWERING = ("sft", "ppo", "preference", "published")
POLICY = (
    Check(
        "kl-to-itself",
        "KL and ratio before an update, with the policy as its own reference",
        f"0 and 1, within {FIRST:g}",
        "the log-probabilities that PPO learns from are not those of the policy that sampled: a fault of the program, "
        "not of a setting; report it with this line",
        ("language",),
        kl_and_ratio,
    ),
    Check(
        "cached-decoding",
        "sampler_logp_error: the sampler's log-probabilities against the full forward pass",
        f"at most {SAMPLER:g} nats ({ROUNDED:g} with a cache of fewer bits)",
        "the KV cache, or the positions of left-padded prompts: try --episode.cache-dtype model and --episode.slots 0; "
        "report it if the difference stays",
        ("language",),
        cached_decoding,
    ),
    Check(
        "answers-end",
        "missing_end of fresh answers",
        f"at most {ANSWERS_CUT:g}",
        "fine-tune longer, on demonstrations that end (eos-learned), or raise --episode.response-length",
        ANSWERING,
        answers_end,
    ),
    Check(
        "answers-differ",
        "same_answer and repeated_pairs of fresh answers",
        f"below {SAME:g} and below {REPEATED:g}",
        "how-to “It says the same to every prompt”: stop earlier, raise --kl-coef, or fine-tune on more varied answers",
        ANSWERING,
        answers_differ,
    ),
    Check(
        "reward-trusted",
        "warnings of the reward model's own run",
        "none",
        "train the reward model again before PPO: how-to “My reward model is stuck at 60%”",
        ("ppo",),
        reward_trusted,
    ),
    Check(
        "value-network",
        "share of the variance of fresh returns that the values explain, 1 − mean (return − value)² / variance",
        f"above 0, which the mean return would reach, and value_loss falls or it is above {LEARNED:g}",
        "--critic.learning-rate × 3, or more --steps: the value network has not learned, and its advantages are noise",
        ("ppo",),
        values,
    ),
)
