"""The programs of a stage over abstract arrays, which are compiled without being run.

`whole` programs are the library's own at full depth, with scanned layers. `pieces` are parts of them without loops
(unrolled layers, no loop over microbatches or tokens) at any depth, whose FLOPs and bytes the compiler can count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.arrays import Params, PromptBatch, RankingBatch, Rollout, TokenBatch
from rlhf_jax.config import CacheDtype, EpisodeConfig, ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generation, draw, extend, filter_logits
from rlhf_jax.layers.kv_cache import Cache, empty_cache
from rlhf_jax.logprobs import target_losses
from rlhf_jax.model import Transformer
from rlhf_jax.optim import apply_gradients, global_count, make_optimizer, new_state, summed_gradients
from rlhf_jax.parallel.mesh import shardings
from rlhf_jax.parallel.sharding import AXES, DATA, FSDP, cache_axes, decoding_params, parameter_axes, spec
from rlhf_jax.pods.chips import written
from rlhf_jax.stages import ppo, pretrain, reward, sft
from rlhf_jax.stages.ppo import Frozen, Networks, sample, score

Stage = Literal["pretrain", "sft", "reward", "ppo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The sizes of a step; `filled` chooses those that are 0, or negative for pretraining_batch and decode_parts."""

    model: ModelConfig
    stage: Stage
    mesh: dict[str, int]
    batch: int = 0
    row_length: int = 0
    prompt_length: int = 512
    response_length: int = 512
    responses: int = 2
    pretraining_batch: int = -1
    minibatches: int = 2
    microbatches: int = 1
    epochs: int = 1
    decode_parts: int = -1
    cache_dtype: CacheDtype = "model"

    @property
    def row_devices(self) -> int:
        """Number of devices over which rows are sharded."""
        return self.mesh[DATA] * self.mesh[FSDP]

    @property
    def parts(self) -> int:
        """Number of parts of a batch: minibatches times microbatches."""
        return self.microbatches * (self.minibatches if self.stage == "ppo" else 1)

    @property
    def tokens(self) -> int:
        """Tokens per step, including padding."""
        return self.batch * self.row_length * (self.responses if self.stage == "reward" else 1)

    def rounds(self, program: str) -> int:
        """Executions of a whole program per step."""
        return self.minibatches * self.epochs if self.stage == "ppo" and program == "update" else 1

    def filled(self) -> Work:
        """The same work with every size chosen.

        Raises:
          UserError: for rows that are not divisible, or longer than the context.
        """
        share = self.row_devices * self.parts
        batch = self.batch if self.batch else share * (2 if self.stage == "ppo" else 1)
        text = self.pretraining_batch if self.pretraining_batch >= 0 else batch
        length = self.row_length if self.row_length else min(self.model.context, 2048)
        if self.stage == "ppo":
            length = self.prompt_length + self.response_length
        for name, rows in (("batch", batch), ("pretraining-batch", text if self.stage == "ppo" else 0)):
            if rows % share:
                raise UserError(
                    f"{name} {rows} is not divisible by {self.row_devices} devices (axes data and fsdp of "
                    f"{written(self.mesh)}) x {self.parts} parts; use --{name} {max(rows - rows % share, share)}"
                )
        if length > self.model.context:
            name = "prompt-length" if self.stage == "ppo" else "row-length"
            fits = self.model.context - (self.response_length if self.stage == "ppo" else 0)
            raise UserError(
                f"rows of {length} tokens are longer than the model's context {self.model.context}; "
                f"use --{name} {max(fits, 1)}"
            )
        parts = self.decode_parts
        if parts < 0:
            # One key head per part; if the weights then do not fit, the caller must request more parts.
            parts = math.gcd(self.mesh[FSDP], self.model.key_heads) if self.mesh[FSDP] > 1 else 0
        if parts and self.mesh[FSDP] % parts:
            raise UserError(
                f"decode_parts {parts} does not divide fsdp {self.mesh[FSDP]}; "
                f"use --decode-parts {math.gcd(parts, self.mesh[FSDP])}"
            )
        return dataclasses.replace(self, batch=batch, pretraining_batch=text, row_length=length, decode_parts=parts)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function with abstract arguments.

    Attributes:
      function: to compile.
      arguments: abstract arrays.
      out: shardings of the results, None if the compiler chooses.
      donated: indices of donated arguments.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out: Any = None
    donated: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a program without loops.

    Attributes:
      program: the whole program that it is a part of.
      at: makes the part for a number of layers.
      times: executions per step.
      deep: True if it depends on the number of layers.
      model_flops: FLOPs of its matrix products on all chips per execution, without recomputation.
      on: mesh.
      tokens: tokens per execution.
    """

    program: str
    at: Callable[[int], Program]
    times: int
    deep: bool
    model_flops: float
    on: Mesh
    tokens: int = 0


class Programs:
    """Abstract arrays of a stage on the mesh of a pod, and its programs."""

    def __init__(self, work: Work, devices: Any) -> None:
        self.work = work
        shape = tuple(work.mesh[name] for name in AXES)
        kinds = (AxisType.Auto,) * len(AXES)
        self.mesh = jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
        # The same devices in the same order, in the shape that decoding uses.
        parts = max(work.decode_parts, 1)
        self.decode_mesh = Mesh(
            self.mesh.devices.reshape(work.row_devices // parts, 1, parts * shape[2]), AXES, axis_types=kinds
        )

    # Shapes

    def model(self, depth: int | None = None, *, scalar: bool = False) -> Transformer:
        """The network at full depth, or unrolled with `depth` layers."""
        config = self.work.model
        if depth is not None:
            windows = config.windows[:depth]
            config = dataclasses.replace(config, layers=depth, windows=windows, scan_layers=False)
        return Transformer(config, scalar=scalar)

    def params(self, depth: int | None = None, *, scalar: bool = False) -> Params:
        """Abstract parameters with the shardings of the sharding table."""
        model = self.model(depth, scalar=scalar)
        shapes = jax.eval_shape(
            lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"], jax.eval_shape(jax.random.key, 0)
        )
        return self.placed(shapes)

    def placed(self, tree: Any) -> Any:
        """Abstract arrays with the shardings of the sharding table."""
        return jax.tree.map(_with, tree, shardings(tree, self.mesh))

    def rows(self, *shape: int, dtype: Any = np.int32) -> Any:
        """An abstract array that is sharded over rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec((DATA, FSDP))))

    def scalar(self, dtype: Any = np.float32) -> Any:
        """An abstract replicated scalar."""
        return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def key(self) -> Any:
        """An abstract replicated random key."""
        shape = jax.eval_shape(jax.random.key, 0)
        return jax.ShapeDtypeStruct((), shape.dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def tokens(self, rows: int, length: int) -> TokenBatch:
        """A language-modelling batch: rows of `length` inputs and one more token for the last target."""
        return TokenBatch(
            self.rows(rows, length + 1), self.rows(rows, length + 1), self.rows(rows, length + 1, dtype=bool)
        )

    def prompts(self, rows: int) -> PromptBatch:
        """A batch of PPO prompts."""
        return PromptBatch(
            self.rows(rows, self.work.prompt_length), self.rows(rows, self.work.prompt_length, dtype=bool)
        )

    def rollout(self, rows: int) -> Rollout:
        """A batch of scored episodes."""
        T, R = self.work.row_length, self.work.response_length
        number_BR = self.rows(rows, R, dtype=np.float32)
        return Rollout(
            tokens_BT=self.rows(rows, T),
            mask_BT=self.rows(rows, T, dtype=bool),
            response_mask_BR=self.rows(rows, R, dtype=bool),
            logp_BR=number_BR,
            ref_logp_BR=number_BR,
            value_BR=number_BR,
            advantage_BR=number_BR,
            target_BR=number_BR,
            score_B=self.rows(rows, dtype=np.float32),
        )

    # Stages

    def ppo_config(self) -> ppo.Config:
        """PPO settings that affect the programs."""
        work = self.work
        return ppo.Config(
            batch=work.batch,
            mesh=",".join(f"{name}={size}" for name, size in work.mesh.items()),
            prompt_length=work.prompt_length,
            minibatches=work.minibatches,
            microbatches=work.microbatches,
            epochs=work.epochs,
            pretraining_batch=work.pretraining_batch,
            pretraining_coef=1.0 if work.pretraining_batch else 0.0,
            episode=EpisodeConfig(
                response_length=work.response_length, decode_parts=work.decode_parts, cache_dtype=work.cache_dtype
            ),
        )

    def networks(self, depth: int | None = None) -> Networks:
        """The policy and value networks."""
        return Networks(self.model(depth), self.model(depth, scalar=True))

    def optimizers(self) -> dict[str, Any]:
        """Optimizers by network; a stage with a single network uses the name "policy"."""
        if self.work.stage == "ppo":
            return ppo.make_optimizers(self.ppo_config())
        return {"policy": make_optimizer(sft.Config().optimizer, 1000)}

    def trained(self, depth: int | None = None) -> dict[str, Params]:
        """Trainable parameters by network."""
        if self.work.stage == "ppo":
            return {"policy": self.params(depth), "critic": self.params(depth, scalar=True)}
        return {"policy": self.params(depth, scalar=self.work.stage == "reward")}

    def opt_state(self, depth: int | None = None) -> dict[str, Any]:
        """Optimizer states by network."""
        trained = self.trained(depth)
        return {
            name: self.placed(jax.eval_shape(optimizer.init, trained[name]))
            for name, optimizer in self.optimizers().items()
        }

    def frozen(self, depth: int | None = None) -> Frozen | None:
        """PPO's frozen networks, None for other stages."""
        if self.work.stage != "ppo":
            return None
        return Frozen(self.params(depth), self.params(depth, scalar=True), self.scalar(), self.scalar())

    def whole(self) -> dict[str, Program]:
        """The programs of the stage at full depth."""
        work = self.work
        if work.stage == "ppo":
            return self._ppo()
        network, optimizer = self.model(scalar=work.stage == "reward"), self.optimizers()["policy"]
        make: Any = {"pretrain": pretrain, "sft": sft, "reward": reward}[work.stage].make_update
        update = make(network, optimizer, microbatches=work.microbatches)
        state = self.placed(
            jax.eval_shape(lambda p, o: new_state(p, o, 0), self.trained()["policy"], self.opt_state()["policy"])
        )
        out = (shardings(state, self.mesh), None)
        return {"update": Program(update, (state, self.batch(work.batch)), out, donated=(0,))}

    def batch(self, rows: int) -> Any:
        """A batch of a stage other than PPO."""
        work = self.work
        if work.stage == "reward":
            K, T = work.responses, work.row_length
            return RankingBatch(
                self.rows(rows, K, T),
                self.rows(rows, K, T, dtype=bool),
                self.rows(rows, K),
                self.rows(rows, K, dtype=bool),
            )
        return self.tokens(rows, work.row_length)

    def _ppo(self) -> dict[str, Program]:
        work, config, networks = self.work, self.ppo_config(), self.networks()
        ids: dict[str, Any] = {"eos_id": 0, "pad_id": 1}
        rows, parts = work.batch // work.minibatches, work.minibatches * work.microbatches
        text = self.tokens(work.pretraining_batch // work.minibatches, work.row_length)
        carry = (self.trained(), self.opt_state())
        return {
            "rollout": Program(
                lambda params, prompts, key: sample(networks.policy, params, prompts, key, config.episode, **ids),
                (self.params(), self.prompts(work.batch), self.key()),
            ),
            "scoring": Program(
                lambda params, frozen, prompts, sampled, kl_coef: score(
                    networks, params, frozen, prompts, sampled, kl_coef, config.episode, eos_id=0, parts=parts
                ),
                (self.trained(), self.frozen(), self.prompts(work.batch), self._sampled(), self.scalar()),
            ),
            "update": Program(
                lambda carry, inputs, frozen: ppo.make_optimizer_step(networks, config)(carry, inputs, frozen),
                (carry, (self.rollout(rows), text if work.pretraining_batch else None, self.key()), self.frozen()),
                (shardings(carry, self.mesh), None),
                donated=(0,),
            ),
        }

    def _sampled(self) -> Generation:
        rows, R = self.work.batch, self.work.response_length
        return Generation(self.rows(rows, R), self.rows(rows, R, dtype=bool), self.rows(rows, R, dtype=np.float32))

    # Pieces

    def pieces(self) -> dict[str, Piece]:
        """The parts of a step, by name."""
        work, model = self.work, self.work.model
        T, R = work.row_length, work.response_length
        backbone = model.flops_per_token(T, language_head=False) * T
        head = 2.0 * model.width * model.vocab_rows
        rows = work.batch // work.parts
        steps = work.parts * (work.epochs if work.stage == "ppo" else 1)
        apply = Piece("update", lambda _: self._apply(), steps // work.microbatches, False, 0.0, self.mesh)
        if work.stage != "ppo":
            responses = work.responses if work.stage == "reward" else 1
            flops = 3 * rows * responses * (backbone + (0 if work.stage == "reward" else T * head))
            piece = Piece("update", self._gradient, steps, True, flops, self.mesh, rows * responses * T)
            return {"gradient": piece, "optimizer": apply}
        decode = model.flops_per_token(T, language_head=True)
        found = {
            "reshard": Piece("rollout", lambda _: self._reshard(), 1, False, 0.0, self.mesh),
            "prefill": Piece(
                "rollout",
                lambda depth: self._extend(depth, work.prompt_length),
                1,
                True,
                work.batch
                * (work.prompt_length * model.flops_per_token(work.prompt_length, language_head=False) + head),
                self.decode_mesh,
                work.batch * work.prompt_length,
            ),
            "decode": Piece(
                "rollout",
                lambda depth: self._extend(depth, 1),
                R - 1,
                True,
                # A decoded token attends to the prompt and its predecessors, not to half a row.
                work.batch * (decode + 2.0 * model.layers * model.heads * model.head_size * work.prompt_length),
                self.decode_mesh,
                work.batch,
            ),
            "scores": Piece(
                "scoring", self._scores, 1, True, work.batch * (4 * backbone + 2 * R * head), self.mesh, work.batch * T
            ),
            "gradient": Piece(
                "update", self._gradient, steps, True, 3 * rows * (2 * backbone + R * head), self.mesh, rows * T
            ),
            "optimizer": apply,
        }
        if not work.decode_parts:
            del found["reshard"]
        if work.pretraining_batch:
            texts = work.pretraining_batch // work.parts
            flops = 3.0 * texts * (backbone + T * head)
            found["pretraining"] = Piece("update", self._text_gradient, steps, True, flops, self.mesh, texts * T)
        return found

    def _gradient(self, depth: int) -> Program:
        work = self.work
        rows = work.batch // work.parts
        if work.stage == "ppo":
            networks, config, trained = self.networks(depth), self.ppo_config(), self.trained(depth)

            def of_ppo(params: Any, part: Rollout, key: Any) -> Any:
                count = global_count(part.response_mask_BR)
                rows, _ = ppo.episode_rows(part, packed=False)
                return summed_gradients(lambda p, x, _: ppo.objective(networks, p, x, count, config), params, rows, key)

            return Program(of_ppo, (trained, self.rollout(rows), self.key()), (shardings(trained, self.mesh), None))
        network, params = self.model(depth, scalar=work.stage == "reward"), self.trained(depth)["policy"]

        def of_stage(params: Params, batch: Any, key: Any) -> Any:
            if work.stage == "reward":
                count = batch.mask_BK.shape[0]
                return summed_gradients(lambda p, x, _: reward.objective(network, p, x, count), params, batch, key)
            count = global_count(batch.shifted()[3])
            return summed_gradients(lambda p, x, _: sft.objective(network, p, x, count), params, batch, key)

        return Program(of_stage, (params, self.batch(rows), self.key()), (shardings(params, self.mesh), None))

    def _text_gradient(self, depth: int) -> Program:
        network, params = self.model(depth), self.params(depth)

        def of_text(params: Params, batch: TokenBatch, key: Any) -> Any:
            count = global_count(batch.shifted()[3])

            def objective(p: Params, x: TokenBatch, _: Any) -> Any:
                loss, mask = target_losses(network, p, x)
                return jnp.sum(jnp.where(mask, loss, 0.0)) / count, {}

            return summed_gradients(objective, params, batch, key)

        batch = self.tokens(self.work.pretraining_batch // self.work.parts, self.work.row_length)
        return Program(of_text, (params, batch, self.key()), (shardings(params, self.mesh), None))

    def _apply(self) -> Program:
        optimizers, trained, opt_state = self.optimizers(), self.trained(), self.opt_state()

        def step(params: Any, opt_state: Any, gradient: Any) -> Any:
            stepped, state, _ = apply_gradients(optimizers, gradient, opt_state, params)
            return {name: (stepped[name], state[name]) for name in optimizers}

        out = {
            name: (shardings(trained[name], self.mesh), shardings(opt_state[name], self.mesh)) for name in optimizers
        }
        return Program(step, (trained, opt_state, trained), out, donated=(0, 1))

    def _scores(self, depth: int) -> Program:
        networks, config = self.networks(depth), self.ppo_config()
        return Program(
            lambda params, frozen, prompts, sampled, kl_coef: score(
                networks, params, frozen, prompts, sampled, kl_coef, config.episode, eos_id=0
            ),
            (self.trained(depth), self.frozen(depth), self.prompts(self.work.batch), self._sampled(), self.scalar()),
        )

    def _reshard(self) -> Program:
        work = self.work
        return Program(lambda params: decoding_params(params, work.decode_parts, work.model.dtype), (self.params(),))

    def decoding_params(self, depth: int | None = None) -> Params:
        """The policy's parameters as sharded for sampling."""
        work, mesh = self.work, dict(self.decode_mesh.shape)
        params = self.params(depth)
        if not work.decode_parts:
            return params

        def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = parameter_axes(jax.tree_util.keystr(path, simple=True, separator="."), len(leaf.shape))
            dtype = work.model.dtype if set(axes) - {"none"} else leaf.dtype
            there = NamedSharding(self.decode_mesh, spec(axes, leaf.shape, mesh))
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=there)

        return jax.tree_util.tree_map_with_path(one, params)

    def cache(self, depth: int | None = None) -> Cache:
        """The KV cache of a rollout, with the sharding of `constrain_cache`."""
        work, model = self.work, self.model(depth)
        mesh = dict(self.decode_mesh.shape)
        shapes = jax.eval_shape(lambda: empty_cache(model.config, work.batch, work.row_length, work.cache_dtype))

        def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes: tuple[str, ...] = ("none",) * len(leaf.shape)
            if len(leaf.shape) >= 4:
                axes = ("none",) * (len(leaf.shape) - 4) + cache_axes(leaf.shape[-4], leaf.shape[-3], mesh)
            elif leaf.shape:
                axes = ("batch", "none")
            return _with(leaf, NamedSharding(self.decode_mesh, spec(axes, leaf.shape, mesh)))

        return jax.tree.map(one, shapes)

    def _extend(self, depth: int, length: int) -> Program:
        work, model = self.work, self.model(depth)
        cache = self.cache(depth)
        there = NamedSharding(self.decode_mesh, PartitionSpec((DATA, FSDP)))
        tokens = jax.ShapeDtypeStruct((work.batch, length), np.int32, sharding=there)
        mask = jax.ShapeDtypeStruct((work.batch, length), bool, sharding=there)

        def step(params: Params, tokens: Any, mask: Any, cache: Cache, key: Any) -> Any:
            logits, cache = extend(model, params, tokens, mask, cache)
            logp = filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0)
            token = draw(logp, jax.random.uniform(key, (work.batch,)))
            return token, jnp.take_along_axis(logp, token[:, None], axis=-1), cache

        key = jax.ShapeDtypeStruct((), self.key().dtype, sharding=NamedSharding(self.decode_mesh, PartitionSpec()))
        out = (None, None, jax.tree.map(lambda leaf: leaf.sharding, cache))
        return Program(step, (self.decoding_params(depth), tokens, mask, cache, key), out, donated=(3,))


def bytes_of(tree: Any) -> int:
    """Bytes of abstract arrays on one chip."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(shape) * size
    return total


def _with(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
