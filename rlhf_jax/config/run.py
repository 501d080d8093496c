"""Settings shared by all stages, and settings of the optimizer, LoRA adapters and PPO episodes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path, PurePosixPath
from typing import Literal

from rlhf_jax.config.checks import at_least, ceil_product, hinted, row_settings, within
from rlhf_jax.config.sampling import CacheDtype, SamplingConfig
from rlhf_jax.errors import UserError

# Fields that affect neither the data nor the arithmetic of a step, so a resumed run may change them. `devices` and
# `mesh` are included: rows and their order stay the same, but the last bits of a sum may differ.
MAY_CHANGE = frozenset(
    "name out devices mesh log_every save_every eval_every keep_last tensorboard wandb examples reward_timeout "
    "alarms".split()
)
# Places of inputs whose content is compared instead (`inputs` in config.json), so that they may be moved.
MAY_CHANGE |= {"init", "reward", "reference", "base", "chat_template"}
MAY_CHANGE |= {"data", "heldout", "demonstrations", "pretraining_data"}
_WARMUP = 0.05
PLACES = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings shared by the runs of all stages."""

    name: str = hinted("", "required, or --out")
    """Name of the run, stored in the folder runs/NAME."""
    out: str = ""
    """Run folder, in place of runs/NAME."""
    seed: int = 0
    """Random seed for parameter initialization, data order and sampling."""
    devices: int = 1
    """Number of data-parallel devices, each with a full copy of the model; short for --mesh data=N."""
    mesh: str = ""
    """Device mesh, such as data=2,fsdp=4,tensor=1. data: copies of the model; fsdp: shards of every parameter, gathered
    layer by layer; tensor: shards of the heads, hidden units and vocabulary."""
    pmap: bool = False
    """Replicate the model with pmap instead of sharding with jit; for models that fit on one device."""
    base: str = ""
    """Model under an adapter given as peft:FOLDER: the folder of a published model or of a run, in place of what the
    adapter names, which may be a name on the Hub."""
    chat_template: str = ""
    """File of a chat template, in Jinja, in place of that of the model in init; for a published reward model too."""
    batch: int | None
    """Batch size in rows, over all devices."""
    steps: int | None
    """Number of updates in the run; 0 evaluates and saves the initial model."""
    microbatches: int = 1
    """Microbatches per optimizer step (gradient accumulation), to save memory; the gradients stay the same."""
    log_every: int = 10
    """Steps between rows of metrics."""
    save_every: int = 200
    """Steps between checkpoints; 0 saves at the end only."""
    eval_every: int | None = None
    """Steps between evaluations on held-out data; 0 evaluates at the end only. By default SFT evaluates about ten
    times, the other stages at the end."""
    keep_last: int = 2
    """Number of most recent checkpoints to keep, besides the best one."""
    tensorboard: bool = False
    """Also write TensorBoard event files; requires the package tensorboardX."""
    wandb: str = ""
    """Project of Weights & Biases to write the metrics to as well; requires the package wandb."""

    examples: int = 4
    """Held-out prompts whose answers before and after the stage are shown at its end; 0 shows none."""

    def __post_init__(self) -> None:
        for field in ("devices", "batch", "microbatches", "log_every", "keep_last"):
            at_least(self, field, 1)
        for field in ("seed", "steps", "save_every", "eval_every", "examples"):
            at_least(self, field, 0)
        if self.mesh and self.devices != 1:
            raise UserError(f"devices: expected 1 with mesh {self.mesh!r}, got {self.devices}; use one of the two")
        if self.pmap and self.mesh_shape["data"] != self.device_count:
            raise UserError(
                f"pmap: expected a mesh with the axis data only, got {self.mesh!r}; pmap replicates the model"
            )
        if self.batch is not None and self.batch % self.shares:
            raise UserError(
                f"batch {self.batch} is not divisible by devices {self.row_devices} x microbatches "
                f"{self.microbatches}; use --batch {max(self.shares, self.batch - self.batch % self.shares)}"
            )
        models = [str(value) for field, value in vars(self).items() if field in ("init", "reward")]
        if self.base and not any(model.startswith("peft:") for model in models):
            raise UserError(f"base: expected an adapter, peft:FOLDER, as init or reward, got {' and '.join(models)!r}")
        if self.chat_template and not any(models):
            raise UserError("chat_template: expected a model to use it with, got no init; use --init")
        parts = PurePosixPath(self.name)
        if self.name and (parts.is_absolute() or ".." in parts.parts):
            raise UserError(f"name: expected a name below runs/, got {self.name!r}; use --out for any other folder")

    @property
    def may_change(self) -> frozenset[str]:
        """Fields that may differ when the run resumes."""
        # Under pmap each device draws with a key of its own, so that other devices would sample other responses.
        return MAY_CHANGE - {"devices", "mesh"} if self.pmap else MAY_CHANGE

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Number of devices along each of the axes data, fsdp and tensor."""
        shape = {"data": self.devices, "fsdp": 1, "tensor": 1}
        if not self.mesh:
            return shape
        given = [part.partition("=") for part in self.mesh.replace(" ", "").split(",")]
        for name, equals, size in given:
            if name not in shape or not equals or not size.isdecimal() or int(size) < 1:
                raise UserError(
                    f"mesh: expected axes of {', '.join(shape)} with a size each, such as data=2,fsdp=4, got "
                    f"{self.mesh!r}"
                )
        if len({name for name, _, _ in given}) < len(given):
            raise UserError(f"mesh: expected each axis once, got {self.mesh!r}")
        return shape | {name: int(size) for name, _, size in given}

    @property
    def device_count(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.mesh_shape.values())

    @property
    def row_devices(self) -> int:
        """Number of devices over which the rows of a batch are sharded."""
        return self.mesh_shape["data"] * self.mesh_shape["fsdp"]

    @property
    def shares(self) -> int:
        """Number of equal parts that a batch is split into, over devices and microbatches."""
        return self.row_devices * self.microbatches

    @property
    def folder(self) -> Path:
        """Run folder: `out`, or runs/NAME."""
        if self.out:
            return Path(self.out)
        if self.name:
            return Path("runs") / self.name
        raise UserError("name: expected a run folder, got none; use --name NAME (for runs/NAME) or --out FOLDER")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig(RunConfig):
    """Settings shared by the stages that train on rows of different lengths, epoch by epoch."""

    heldout: tuple[str, ...] = ()
    """Held-out files to evaluate on; heldout_fraction of data by default."""
    heldout_fraction: float = 0.05
    """Fraction of the prompts that is held out with all their rows, drawn by seed, if heldout is not given."""
    columns: tuple[str, ...] = ()
    """Fields of data and heldout under other names, such as prompt=task."""
    max_tokens: int | None = None
    """Maximum row length in tokens; prompts with a longer row are dropped and recorded in the ledger. The model's
    context by default."""
    buckets: tuple[int, ...] = ()
    """Row lengths that batches are padded to, each compiled once; a few lengths up to max_tokens by default."""
    batch: int | None = hinted(None, "default: by the data")
    """Batch size in rows, or in prompts with all their responses, over all devices. By default 32, or 16, 8 or 4 for an
    epoch of at least 16 steps; a batch larger than the data is replaced by this default."""
    epochs: float | None = hinted(None, "default: 1")
    """Passes over the training rows, such as 3 or 0.5, rounded up to whole steps."""
    steps: int | None = hinted(None, "default: by epochs")
    """Number of updates, in place of epochs; 0 evaluates and saves the initial model."""
    optimizer: OptimConfig
    """AdamW and its learning-rate schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row_settings(self)
        self.optimizer.check_steps("optimizer", self.steps or 0)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with gradient clipping, linear warm-up and a learning-rate schedule."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_fraction: float = _WARMUP
    """Fraction of the optimizer steps that is linear warm-up from 0, rounded up to whole steps."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up from 0, in place of warmup_fraction."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule from the end of the warm-up to the end of the run."""
    final_fraction: float = 0.1
    """Final learning rate of a linear or cosine schedule, as a fraction of learning_rate."""
    beta1: float = 0.9
    """Decay rate of the first moment in Adam."""
    beta2: float = 0.95
    """Decay rate of the second moment in Adam."""
    epsilon: float = 1e-8
    """Epsilon added to the square root of the second moment in Adam; 1e-5 in Ziegler et al. 2019."""
    weight_decay: float = 0.0
    """Decoupled weight decay of kernels, embeddings and adapters; biases and norms have none."""
    clip_norm: float = 1.0
    """Maximum global norm of the gradient; 0 disables clipping."""

    def __post_init__(self) -> None:
        for field in ("learning_rate", "weight_decay", "clip_norm"):
            at_least(self, field, 0)
        if self.warmup_steps is not None:
            at_least(self, "warmup_steps", 0)
        if not self.epsilon > 0:
            raise UserError(f"epsilon: expected more than 0, got {self.epsilon}")
        within(self, "warmup_fraction", 0, 1)
        if self.warmup_steps is not None and self.warmup_fraction != _WARMUP:
            raise UserError(
                f"warmup_steps: expected warmup_steps or warmup_fraction, got {self.warmup_steps} and "
                f"{self.warmup_fraction}; use one of the two"
            )
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"final_fraction: expected 0 to 1, got {self.final_fraction}")

    def warmup(self, steps: int) -> int:
        """Number of warm-up steps of a run with `steps` optimizer steps."""
        return ceil_product(self.warmup_fraction, steps) if self.warmup_steps is None else self.warmup_steps

    def check_steps(self, field: str, steps: int) -> None:
        """Check that the warm-up ends within a run of `steps` optimizer steps, if that number is known yet (not 0).

        Raises:
          UserError: if it does not: the run would end before it has reached its learning rate.
        """
        if steps and self.warmup(steps) > steps:
            raise UserError(
                f"{field}.warmup_steps: expected at most the {steps} optimizer steps of the run, got "
                f"{self.warmup_steps}; use a shorter warm-up or more steps"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA), trained in place of all parameters."""

    rank: int = 0
    """LoRA rank; 0 trains all parameters."""
    alpha: float = 16.0
    """LoRA alpha; the product A B is scaled by alpha / rank."""
    targets: tuple[str, ...] = PLACES
    """Kernels with an adapter: query, key, value and out of attention; gate, up and down of the feed-forward layer."""

    def __post_init__(self) -> None:
        at_least(self, "rank", 0)
        if not self.alpha > 0:
            raise UserError(f"alpha: expected more than 0, got {self.alpha}")
        unknown = [target for target in self.targets if target not in PLACES]
        if unknown or not self.targets:
            raise UserError(f"targets: expected one or more of {', '.join(PLACES)}, got {list(self.targets)}")

    @property
    def passes(self) -> int:
        """Cost of a training step in forward passes; gradients of frozen kernels are not computed."""
        return 2 if self.rank else 3

    @property
    def scale(self) -> float:
        """Factor alpha / rank of the product A B; 0 without adapters."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """Sampling and rewards of PPO episodes."""

    response_length: int = 32
    """Maximum response length in tokens, the end-of-text token included."""
    temperature: float = 1.0
    """Sampling temperature; it divides the logits in sampling and in all log-probabilities."""
    missing_end: Literal["replace", "subtract", "keep"] = "replace"
    """Score of a response without an end-of-text token. replace: missing_end_score; subtract: its score plus
    missing_end_score; keep: its score."""
    missing_end_score: float = -1.0
    """Penalty for a response without an end-of-text token, in units of the normalized score; 0 or negative."""
    gamma: float = 1.0
    """Discount factor γ."""
    gae_lambda: float = 0.95
    """λ of generalized advantage estimation (GAE)."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch; their mean is kept."""
    decode_parts: int = 0
    """Number of devices along the mesh axis fsdp that share one copy of the policy's weights during sampling, gathered
    once per iteration; 0 keeps the fsdp sharding and gathers the weights at each token."""
    slots: int = 0
    """Slots of continuous batching: rows sampled at a time, where a finished row frees a slot for the next prompt. For
    responses of different lengths, on one device or with --pmap; 0 samples all rows together."""
    segments: int = 1
    """Number of KV cache lengths used during sampling: the last is response_length and each is half the next, so that a
    large response_length costs little while responses are short. Each is compiled; not available with slots."""
    cache_dtype: CacheDtype = "model"
    """Dtype of the KV cache during sampling: the model's, or fewer bytes. The update recomputes log-probabilities, so
    its ratio still starts at 1; the metric sampler_logp_error shows the error of the sampler's own."""
    pack: int = 0
    """Packed rows of prompt_length + response_length tokens computed at a time; packing several episodes into a row
    avoids computing padding. A divisor of the episodes of a minibatch, on one device or with --pmap. 0 pads each
    episode."""

    def __post_init__(self) -> None:
        if self.response_length < 1:
            raise UserError(f"response_length: expected 1 or more, got {self.response_length}")
        if self.temperature <= 0:
            raise UserError(f"temperature: expected more than 0, got {self.temperature}; PPO samples a distribution")
        for field, low in (("slots", 0), ("pack", 0), ("segments", 1)):
            at_least(self, field, low)
        if self.slots and self.segments > 1:
            raise UserError(f"segments: expected 1 with slots {self.slots}, got {self.segments}; use one of the two")
        if self.decode_parts < 0:
            raise UserError(f"decode_parts: expected 0 or a divisor of the mesh's axis fsdp, got {self.decode_parts}")
        if self.missing_end_score > 0:
            raise UserError(f"missing_end_score: expected 0 or less, as it is a penalty, got {self.missing_end_score}")

    def sampling(self, stop_ids: tuple[int, ...], pad_id: int) -> SamplingConfig:
        """Sampling settings of a rollout: the full distribution, on which the ratio and the KL are defined."""
        return SamplingConfig(
            max_new_tokens=self.response_length,
            stop_ids=stop_ids,
            pad_id=pad_id,
            temperature=self.temperature,
            slots=self.slots,
            segments=self.segments,
            cache_dtype=self.cache_dtype,
            decode_parts=self.decode_parts,
        )
