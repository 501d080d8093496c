"""The recipe behind ChatGPT in JAX: pretraining, supervised fine-tuning, reward modelling and PPO.

`load(run)` opens a trained model, to generate text or to score answers; the stages from Python are
`from rlhf_jax.trainers import ppo`, then `ppo.run(config)`, with reward functions of one's own as `reward_funcs`.

Public names are imported lazily on first access, so that `import rlhf_jax` is cheap. Import a function that shares its
module's name from the module: `from rlhf_jax.generate import generate`. The stages are modules:
`from rlhf_jax.stages import ppo`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax.arrays import PromptBatch as PromptBatch
    from rlhf_jax.arrays import RankingBatch as RankingBatch
    from rlhf_jax.arrays import Rollout as Rollout
    from rlhf_jax.arrays import TokenBatch as TokenBatch
    from rlhf_jax.arrays import TrainState as TrainState
    from rlhf_jax.config import EpisodeConfig as EpisodeConfig
    from rlhf_jax.config import ModelConfig as ModelConfig
    from rlhf_jax.config import OptimConfig as OptimConfig
    from rlhf_jax.config import PPOConfig as PPOConfig
    from rlhf_jax.data import Ledger as Ledger
    from rlhf_jax.data import batch_at as batch_at
    from rlhf_jax.data import extract_dialogues as extract_dialogues
    from rlhf_jax.data import read_records as read_records
    from rlhf_jax.errors import UserError as UserError
    from rlhf_jax.inference import load as load
    from rlhf_jax.kl import adapt_kl_coef as adapt_kl_coef
    from rlhf_jax.kl import kl_estimate as kl_estimate
    from rlhf_jax.losses import clipped_surrogate as clipped_surrogate
    from rlhf_jax.losses import clipped_value_loss as clipped_value_loss
    from rlhf_jax.losses import next_token_loss as next_token_loss
    from rlhf_jax.losses import pairwise_loss as pairwise_loss
    from rlhf_jax.losses import ranking_loss as ranking_loss
    from rlhf_jax.masked import masked_mean as masked_mean
    from rlhf_jax.masked import masked_whiten as masked_whiten
    from rlhf_jax.model import Transformer as Transformer
    from rlhf_jax.model import init_params as init_params
    from rlhf_jax.model import to_scalar_head as to_scalar_head
    from rlhf_jax.optim import make_optimizer as make_optimizer
    from rlhf_jax.optim import new_state as new_state
    from rlhf_jax.parallel.mesh import jit_update as jit_update
    from rlhf_jax.parallel.mesh import make_mesh as make_mesh
    from rlhf_jax.parallel.mesh import pmap_update as pmap_update
    from rlhf_jax.returns import generalized_advantages as generalized_advantages
    from rlhf_jax.returns import kl_penalized_reward as kl_penalized_reward
    from rlhf_jax.runs.folder import RunFolder as RunFolder
    from rlhf_jax.stages.ppo import Frozen as Frozen
    from rlhf_jax.stages.ppo import Networks as Networks
    from rlhf_jax.stages.ppo import make_rollout as make_rollout
    from rlhf_jax.tokenizers.bpe import Tokenizer as Tokenizer

# The same names for the lazy import at run time; a test checks that both lists agree.
_NAMES = {
    "arrays": "PromptBatch RankingBatch Rollout TokenBatch TrainState",
    "data": "Ledger batch_at extract_dialogues read_records",
    "config": "EpisodeConfig ModelConfig OptimConfig PPOConfig",
    "stages.ppo": "Frozen Networks make_rollout",
    "errors": "UserError",
    "inference": "load",
    "kl": "adapt_kl_coef kl_estimate",
    "losses": "clipped_surrogate clipped_value_loss next_token_loss pairwise_loss ranking_loss",
    "masked": "masked_mean masked_whiten",
    "model": "Transformer init_params to_scalar_head",
    "optim": "make_optimizer new_state",
    "parallel.mesh": "jit_update make_mesh pmap_update",
    "returns": "generalized_advantages kl_penalized_reward",
    "runs.folder": "RunFolder",
    "tokenizers.bpe": "Tokenizer",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("rlhf_jax")
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf_jax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"rlhf_jax.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
