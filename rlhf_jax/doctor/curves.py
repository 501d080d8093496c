"""Checks of the metrics of a run: what its curves should do, and what they should not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.config import METHODS, OptimConfig, from_plain
from rlhf_jax.doctor.checks import STAGES, Check, LeftOut, Measured
from rlhf_jax.doctor.columns import column, quarters
from rlhf_jax.doctor.patient import Patient
from rlhf_jax.doctor.policy import FIRST
from rlhf_jax.evaluation.warnings import ANSWERS_CUT, LOST_AGAIN, MARGIN, lost_again
from rlhf_jax.trainers.alarms import HEALTHY, JUDGES, REWARD, STEP, Alarms, Limits, lost_entropy

# Ranges of docs/how-to/reward-does-not-rise.md: of a policy that moves, in nats a response; of one that moves far
# enough for its score to follow; of the first score, in deviations; of the share of clipped tokens.
STAYS, MOVES, STRANGE, CLIPPED = 0.01, 1.0, 2.0, 0.3
# Nats a pair at which a reward model has learned nothing (log 2 is 0.693); and its over-fitting.
CHANCE, LEARNED_BY_HEART, GAP = 0.69, 0.9, 0.2
# Nats by which the log-probability of chosen responses may fall.
FALLEN = 20.0
PPO = ("ppo",)


def skipped(patient: Patient) -> Measured:
    """Steps that were not applied, and responses without a finite score."""
    names = [name for name in ("skipped", "policy_skipped", "critic_skipped", "nonfinite") if column(patient, name)]
    if not names:
        raise LeftOut("no metrics")
    found = {name: max(value for _, value in column(patient, name)) for name in names}
    name, worst = max(found.items(), key=lambda item: item[1])
    first = next((step for step, value in column(patient, name) if value > 0), 0)
    return Measured(worst == 0, f"{name} {worst:g}" + (f", first at step {first:,}" if worst else " in all rows"))


def warm_up(patient: Patient) -> Measured:
    """Optimizer steps done, against those of the warm-up."""
    config = {} if patient.run is None else patient.run.config
    if not patient.metrics or not (config.get("optimizer") or config.get("policy")):
        raise LeftOut("no metrics")
    settings = config.get("optimizer") or config["policy"]
    optimizer = from_plain(OptimConfig, settings, where=f"{patient.where}/config.json: optimizer")
    each = int(config.get("epochs") or 1) * int(config["minibatches"]) if patient.stage == "ppo" else 1
    done, planned = patient.metrics[-1]["step"] * each, int(config["steps"] or 0) * each
    warmup = optimizer.warmup(planned)
    return Measured(done > warmup or planned == 0, f"{done:,} optimizer steps, {warmup:,} of them or more are warm-up")


def over_fit(patient: Patient) -> Measured:
    """Share of what training gained on held-out rows that it lost again."""
    before = patient.summary.get("heldout_response_nll_before")
    found = lost_again(patient.metrics, before)
    if found is None:
        raise LeftOut("fewer than two evaluations on held-out rows")
    best, last, share = found
    gained = "nothing was gained" if math.isinf(share) else f"{share:.0%} of the gain is lost again"
    released = patient.summary.get("released_step")
    taken = "" if released is None else f"; later stages take step {released:,}"
    start = "" if before is None else f"{before:.3f} before, "
    return Measured(
        share <= LOST_AGAIN, f"held-out loss {start}{best:.3f} at best, {last:.3f} at the end: {gained}{taken}"
    )


def loss_falls(patient: Patient) -> Measured:
    """Training loss at the start and at the end."""
    first, last = quarters(patient, "loss", fewest=8)
    return Measured(last <= first * (1 + MARGIN) if first > 0 else last <= first, f"loss {first:.3f}, then {last:.3f}")


def reward_learns(patient: Patient) -> Measured:
    """Training loss of a reward model against that of guessing."""
    _, last = quarters(patient, "loss", fewest=4)
    return Measured(last < CHANCE, f"loss {last:.3f} nats a pair in the last quarter")


def reward_over_fits(patient: Patient) -> Measured:
    """Training accuracy of a reward model against that on held-out pairs."""
    judged = column(patient, "eval/accuracy")
    if not judged:
        raise LeftOut("no evaluation on held-out pairs")
    _, training = quarters(patient, "accuracy", fewest=4)
    share = judged[-1][1]
    return Measured(
        training < LEARNED_BY_HEART or share > training - GAP,
        f"accuracy {training:.2f} in training, {share:.2f} held out",
    )


def first_iteration(patient: Patient) -> Measured:
    """The first row of PPO, or of preference optimization, before anything was learned."""
    rows = [row for row in patient.metrics if row["step"] == 1]
    if not rows:
        raise LeftOut("no row of step 1 in metrics.jsonl")
    names = ["first_ratio_error"] if patient.ppo.reference else ["first_ratio_error", "kl"]
    if patient.stage == "preference":
        config = {} if patient.run is None else patient.run.config
        method = METHODS.get(config.get("method", ""))
        if method is None or not method.reference or config.get("reference"):
            raise LeftOut("the method has no reference model, or another than the initial policy")
        names = ["margin"]
    found = {name: rows[0][name] for name in names if rows[0].get(name) is not None}
    if not found:
        raise LeftOut(f"the row of step 1 has no {' and no '.join(names)}")
    return Measured(
        all(abs(value) <= FIRST for value in found.values()),
        ", ".join(f"{name} {value:.2g}" for name, value in found.items()),
    )


def sign(name: str) -> Callable[[Patient], Measured]:
    """The check of one kind of alarm: whether it would have ended the run at any time."""

    def measure(patient: Patient) -> Measured:
        rows = [row for row in patient.metrics if row["step"] > 0]
        if not rows:
            raise LeftOut("no metrics")
        names = JUDGES if name == "judge" else (name,)
        if name == "judge" and not any(column(patient, judge) for judge in JUDGES):
            raise LeftOut("no held-out judge in the metrics (`evaluate` of a program, eval/gold in a recipe)")
        alarms = Alarms(Limits.of(patient.ppo), [], stop=False)
        alarms(rows, lambda _: None)
        for found in alarms.lasted:
            if found.name in names:
                return Measured(False, found.cause, found.remedy)
        if name == "entropy" and (lost := lost_entropy(rows[0], rows[-1])):
            return Measured(False, lost, f"fine only if each prompt has one right answer; else {STEP}")
        if name == "missing_end" and rows[-1].get(name) is not None:
            last = statistics.fmean([value for _, value in column(patient, name)[-Limits.of(patient.ppo).rows :]])
            return Measured(last <= ANSWERS_CUT, f"{name} {last:.2g} at the end")
        shown = next((one for one in names if column(patient, one)), name)
        values = column(patient, shown)
        return Measured(True, f"{shown} {values[0][1]:.3g}, then {values[-1][1]:.3g}" if values else "no such metric")

    return measure


def score_start(patient: Patient) -> Measured:
    """The score of the starting policy's answers."""
    scores = column(patient, "score")
    if not scores or not Limits.of(patient.ppo).normalized:
        raise LeftOut("the score is not that of a reward model alone")
    return Measured(abs(scores[0][1]) <= STRANGE, f"score {scores[0][1]:.2f} deviations at step {scores[0][0]}")


def policy_moves(patient: Patient) -> Measured:
    """The KL at the end."""
    _, kl = quarters(patient, "kl")
    return Measured(abs(kl) >= STAYS, f"kl {kl:.3g} nats a response in the last quarter")


def score_follows(patient: Patient) -> Measured:
    """The score of a policy that has moved."""
    _, kl = quarters(patient, "kl")
    first, last = quarters(patient, "score")
    return Measured(kl < MOVES or last > first, f"score {first:.3f}, then {last:.3f}, at a kl of {kl:.2f} nats")


def gold_flat(patient: Patient) -> Measured:
    """A held-out judge that does not follow a score that rises."""
    judged: list[tuple[str, list[float]]] = [
        (name, [float(row[name]) for row in patient.metrics if row.get(name) is not None]) for name in JUDGES
    ]
    judged = [(name, values) for name, values in judged if len(values) >= 3]
    if not judged:
        raise LeftOut("fewer than three evaluations by a held-out judge (eval/gold, eval/judge, eval/win_rate)")
    first, last = quarters(patient, "score")
    scores = [value for _, value in column(patient, "score")]
    # Of the difference of two means, by the noise from row to row.
    noise = float(np.std(np.diff(scores))) / math.sqrt(2) * math.sqrt(2 / max(len(scores) // 4, 1))
    found, healthy = [], True
    for name, values in judged:
        later = values[1:]
        gain = statistics.fmean(later[-max(len(later) // 3, 1) :]) - values[0]
        # Deviation of the noise alone: second differences leave out a trend, and are √6 times as wide.
        bends = np.abs(np.diff(later, 2))
        wobble = float(np.median(bends)) / 0.67 / math.sqrt(6) if len(bends) else 0.0
        flat = gain <= max(2 * wobble, MARGIN * abs(values[0]))
        healthy &= not flat or last - first <= 3 * noise
        found.append(f"{name} {values[0]:.3g}, then {values[0] + gain:.3g}")
    return Measured(healthy, f"score {first:.3g}, then {last:.3g}; {', '.join(found)}")


def clipping(patient: Patient) -> Measured:
    """Share of tokens whose ratio is outside the clipping range."""
    shares: Sequence[float] = [value for _, value in column(patient, "clipped")]
    if not shares:
        raise LeftOut("no metrics")
    return Measured(statistics.fmean(shares) <= CLIPPED, f"clipped {statistics.fmean(shares):.2g} on average")


def chosen_falls(patient: Patient) -> Measured:
    """Log-probability of chosen responses."""
    first, last = quarters(patient, "chosen_logp")
    return Measured(last >= first - FALLEN, f"chosen_logp {first:.1f}, then {last:.1f} nats")


def _signs() -> list[Check]:
    names: dict[str, tuple[str, str]] = {
        "kl": ("kl-runaway", STEP),
        "entropy": ("entropy-collapse", STEP),
        "same_answer": ("one-answer", REWARD),
        "repeated_pairs": ("repetition", STEP),
        "missing_end": ("missing-ends", "raise --episode.response-length, or fine-tune longer, so that answers end"),
        "response_tokens": ("length-hacking", REWARD),
        "score": ("score-scale", "train the reward model on answers to such prompts"),
        "judge": ("over-optimisation", "stop earlier (--steps), or raise --kl-coef"),
    }
    healthy = HEALTHY | {"missing_end": f"at most {ANSWERS_CUT:g} at the end; {HEALTHY['missing_end']}"}
    return [
        Check(
            check,
            "eval/gold, eval/judge or eval/win_rate" if name == "judge" else name,
            healthy[name],
            remedy,
            PPO,
            sign(name),
        )
        for name, (check, remedy) in names.items()
    ]


CURVES = (
    Check(
        "first-iteration",
        "first_ratio_error and kl of step 1 (margin, for preferences)",
        f"0 within {FIRST:g}",
        "a fault of the program, not of a setting: report it with the first row of metrics.jsonl",
        ("ppo", "preference"),
        first_iteration,
    ),
    Check(
        "skipped-steps",
        "steps that were not applied as a number was not finite",
        "0",
        "a lower learning rate, or --model.dtype float32",
        STAGES,
        skipped,
    ),
    Check(
        "warm-up",
        "optimizer steps done, against the warm-up's",
        "more than the warm-up's",
        "it has never learned at its learning rate: more data, --steps or --epochs, or a shorter "
        "--optimizer.warmup-steps",
        STAGES,
        warm_up,
    ),
    Check(
        "loss-falls",
        "loss in the first and in the last quarter",
        "falls",
        "--optimizer.learning-rate ÷ 3 if it rises",
        ("pretrain", "sft", "preference"),
        loss_falls,
    ),
    Check(
        "over-fit",
        "share of the gain on held-out rows that is lost again",
        f"at most {LOST_AGAIN:g}; a slight rise is usual",
        "fewer --epochs, more data, or a lower --optimizer.learning-rate; --release best takes the best evaluation",
        ("pretrain", "sft", "preference"),
        over_fit,
    ),
    Check(
        "reward-learns",
        "training loss of the reward model",
        f"below {CHANCE:g} (log 2, guessing, is 0.693)",
        "--optimizer.learning-rate × 3 and ÷ 3; start from the fine-tuned model; look for exchanged labels",
        ("reward",),
        reward_learns,
    ),
    Check(
        "reward-over-fits",
        "accuracy in training against held out",
        f"below {LEARNED_BY_HEART:g} in training, or held out at most {GAP:g} lower",
        "one epoch, more comparisons, or a lower --optimizer.learning-rate",
        ("reward",),
        reward_over_fits,
    ),
    Check(
        "chosen-falls",
        "chosen_logp at the start and at the end",
        f"falls by less than {FALLEN:g} nats",
        "a lower learning rate, a larger --beta or --sft-coef",
        ("preference",),
        chosen_falls,
    ),
    Check(
        "score-start",
        "score at the first step",
        f"within ±{STRANGE:g} deviations",
        "the prompts are unlike those that the reward model was trained on: label answers to such prompts",
        PPO,
        score_start,
    ),
    Check(
        "policy-moves",
        "kl in the last quarter",
        f"at least {STAYS:g} nats a response",
        "--policy.learning-rate × 3, or a lower --kl-coef",
        PPO,
        policy_moves,
    ),
    Check(
        "score-follows",
        "score in the first and in the last quarter, once kl is above 1 nat",
        "rises",
        "the policy moves without aim: is the reward model better than chance? A lower --policy.learning-rate if "
        f"clipped is above {CLIPPED:g}",
        PPO,
        score_follows,
    ),
    Check(
        "gold-flat",
        "held-out judge while the score rises",
        "rises with it",
        "over-optimisation: stop earlier (--steps), raise --kl-coef, or label answers of this policy and train the "
        "reward model again",
        PPO,
        gold_flat,
    ),
    *_signs(),
    Check(
        "clipping",
        "mean of clipped",
        f"at most {CLIPPED:g}",
        "a lower --policy.learning-rate, or fewer --epochs",
        PPO,
        clipping,
    ),
)
