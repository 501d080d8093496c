"""Settings that every stage shares, and those of its parts: optimizer, adapters, sampling and rewards of PPO."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path, PurePosixPath
from typing import Literal

from rlhf_jax.config.checks import at_least, within
from rlhf_jax.config.sampling import CacheDtype, SamplingConfig
from rlhf_jax.errors import UserError

# Fields that change neither the data nor the arithmetic of a step: a resumed run may give other values.
# `devices` and `pmap` are among them: the rows and their order stay, the last bits of a sum may not.
MAY_CHANGE = frozenset(
    {"name", "out", "devices", "mesh", "pmap", "log_every", "save_every", "eval_every", "keep_last", "tensorboard"}
)
PLACES = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every stage's run is told besides its own settings."""

    name: str = ""
    """Name of the run; its folder is runs/NAME."""
    out: str = ""
    """Folder of the run, instead of runs/NAME."""
    seed: int = 0
    """Seed of the parameters, the order of the data and everything sampled."""
    devices: int = 1
    """How many devices share a batch, each with the whole model; short for --mesh data=N."""
    mesh: str = ""
    """Axes of devices, such as data=2,fsdp=4,tensor=1: fsdp cuts every parameter into parts that are gathered layer by
    layer, tensor gives each device a part of the heads, hidden units and vocabulary."""
    pmap: bool = False
    """Replicate by pmap instead of sharding by jit; for models that fit on one device."""
    batch: int
    """Rows in a batch, over all devices."""
    steps: int
    """Updates until the run is complete."""
    microbatches: int = 1
    """Parts a batch is cut into, one after the other, to save memory; the gradients stay the same."""
    log_every: int = 10
    """Steps between two rows of metrics."""
    save_every: int = 200
    """Steps between two checkpoints; 0 saves at the end only."""
    eval_every: int = 0
    """Steps between two evaluations on held-out data; 0 evaluates at the end only."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    tensorboard: bool = False
    """Write TensorBoard event files too; needs the extra: pip install 'rlhf_jax[tensorboard]'."""

    def __post_init__(self) -> None:
        for field in ("devices", "batch", "microbatches", "log_every", "keep_last"):
            at_least(self, field, 1)
        for field in ("seed", "steps", "save_every", "eval_every"):
            at_least(self, field, 0)
        if self.mesh and self.devices != 1:
            raise UserError(f"devices: found {self.devices} beside mesh {self.mesh!r}, wanted one of the two")
        if self.pmap and self.mesh_shape["data"] != self.device_count:
            raise UserError(
                f"pmap: found it with mesh {self.mesh!r}, wanted axis data alone: pmap replicates the model"
            )
        shares = self.row_devices * self.microbatches
        if self.batch % shares:
            raise UserError(
                f"batch {self.batch} is not divisible by devices {self.row_devices} x microbatches "
                f"{self.microbatches}; use --batch {max(shares, self.batch - self.batch % shares)}"
            )
        parts = PurePosixPath(self.name)
        if self.name and (parts.is_absolute() or ".." in parts.parts):
            raise UserError(f"name: found {self.name!r}, wanted a name below runs/; give any other folder with --out")

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Devices along the axes data, fsdp and tensor."""
        shape = {"data": self.devices, "fsdp": 1, "tensor": 1}
        if not self.mesh:
            return shape
        given = [part.partition("=") for part in self.mesh.replace(" ", "").split(",")]
        for name, equals, size in given:
            if name not in shape or not equals or not size.isdecimal() or int(size) < 1:
                raise UserError(
                    f"mesh: found {self.mesh!r}, wanted axes of {', '.join(shape)} with a size each, such as "
                    "data=2,fsdp=4"
                )
        if len({name for name, _, _ in given}) < len(given):
            raise UserError(f"mesh: found {self.mesh!r}, wanted each axis once")
        return shape | {name: int(size) for name, _, size in given}

    @property
    def device_count(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh_shape.values())

    @property
    def row_devices(self) -> int:
        """Devices over which the rows of a batch are spread."""
        return self.mesh_shape["data"] * self.mesh_shape["fsdp"]

    @property
    def folder(self) -> Path:
        """The run's own folder: `out`, or runs/NAME."""
        if self.out:
            return Path(self.out)
        if self.name:
            return Path("runs") / self.name
        raise UserError("the run has no folder: give --name NAME (for runs/NAME) or --out FOLDER")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with gradient clipping, linear warm-up and a schedule."""

    learning_rate: float = 1e-3
    """At the end of the warm-up."""
    warmup_steps: int = 10
    """Linear from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up, to the end of the run."""
    final_fraction: float = 0.1
    """Of the learning rate, at the end of a linear or cosine schedule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment; 1e-5 in Ziegler et al. 2019."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 for none."""

    def __post_init__(self) -> None:
        for field in ("learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            at_least(self, field, 0)
        if not self.epsilon > 0:
            raise UserError(f"epsilon: found {self.epsilon}, wanted more than 0")
        within(self, "beta1", 0, 1)
        within(self, "beta2", 0, 1)
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"final_fraction: found {self.final_fraction}, wanted 0 to 1")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of training all parameters."""

    rank: int = 0
    """r; 0 trains all parameters."""
    alpha: float = 16.0
    """The product A B is multiplied by alpha / rank."""
    targets: tuple[str, ...] = PLACES
    """Which kernels have one: query, key, value, out of attention, gate, up, down of the feed-forward layer."""

    def __post_init__(self) -> None:
        at_least(self, "rank", 0)
        if not self.alpha > 0:
            raise UserError(f"alpha: found {self.alpha}, wanted more than 0")
        unknown = [target for target in self.targets if target not in PLACES]
        if unknown or not self.targets:
            raise UserError(f"targets: found {list(self.targets)}, wanted some of {', '.join(PLACES)}")

    @property
    def passes(self) -> int:
        """Forward passes that a training step costs: gradients of frozen kernels are not computed."""
        return 2 if self.rank else 3

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """How responses are sampled and rewarded."""

    response_length: int = 32
    """Most tokens of a response, the end-of-text token included."""
    temperature: float = 1.0
    """Divides the logits in sampling and in every log-probability alike."""
    missing_end: Literal["replace", "subtract", "keep"] = "replace"
    """A response without an end gets missing_end_score as its score, has its size subtracted, or keeps its own."""
    missing_end_score: float = -1.0
    """In units of the score (after its scale); negative."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """λ of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation over the batch; their mean is kept."""
    decode_parts: int = 0
    """Devices of the axis fsdp among which one copy of the policy's weights lies while sampling, gathered once an
    iteration; 0 gathers what fsdp cuts at each token."""
    slots: int = 0
    """Rows that are sampled at a time: one that has ended gives its place to the next prompt. For responses of
    different lengths, on one device or with --pmap; 0 samples all rows together."""
    segments: int = 1
    """Lengths that the cache has while sampling, the last response_length and each half the next, so that a generous
    response_length costs little while responses are short; each is compiled. Not beside slots."""
    cache_dtype: CacheDtype = "model"
    """Of keys and values while sampling: as the model computes them, or fewer bytes. The update computes
    log-probabilities anew, so that its ratio starts at 1 all the same; sampler_logp_error shows how far off the
    sampler's are."""
    pack: int = 0
    """Rows of prompt_length + response_length tokens that are computed at a time, with the episodes laid end to end in
    them, so that padding is not; a divisor of the episodes of a minibatch, for one device or --pmap. 0 pads each."""

    def __post_init__(self) -> None:
        if self.response_length < 1:
            raise UserError(f"response_length: found {self.response_length}, wanted 1 or more")
        if self.temperature <= 0:
            raise UserError(f"temperature: found {self.temperature}, wanted more than 0: PPO samples a distribution")
        for field, low in (("slots", 0), ("pack", 0), ("segments", 1)):
            at_least(self, field, low)
        if self.slots and self.segments > 1:
            raise UserError(f"segments: found {self.segments} beside slots {self.slots}, wanted one of them")
        if self.decode_parts < 0:
            raise UserError(f"decode_parts: found {self.decode_parts}, wanted 0 or a divisor of the mesh's axis fsdp")
        if self.missing_end_score > 0:
            raise UserError(f"missing_end_score: found {self.missing_end_score}, wanted 0 or less: it is a penalty")

    def sampling(self, stop_ids: tuple[int, ...], pad_id: int) -> SamplingConfig:
        """How responses are sampled: from the whole distribution, which the ratio and the KL are of."""
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
