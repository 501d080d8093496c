"""Settings as frozen dataclasses, validated on construction.

Nothing here imports JAX, because flags are parsed before JAX is imported.
"""

from rlhf_jax.config.checks import at_least, row_settings, within
from rlhf_jax.config.model import ModelConfig, RopeScaling
from rlhf_jax.config.plain import Partial, coerce_fields, from_plain, over_defaults, to_plain
from rlhf_jax.config.preference import METHODS, Method, PreferenceConfig
from rlhf_jax.config.run import MAY_CHANGE, PLACES, EpisodeConfig, LoraConfig, OptimConfig, RowsConfig, RunConfig
from rlhf_jax.config.sampling import CacheDtype, SamplingConfig
from rlhf_jax.config.stages import PPOConfig, PretrainConfig, RewardConfig, SFTConfig

__all__ = [
    "MAY_CHANGE",
    "METHODS",
    "PLACES",
    "CacheDtype",
    "EpisodeConfig",
    "LoraConfig",
    "Method",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "Partial",
    "PreferenceConfig",
    "PretrainConfig",
    "RewardConfig",
    "RopeScaling",
    "RowsConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "at_least",
    "coerce_fields",
    "from_plain",
    "over_defaults",
    "row_settings",
    "to_plain",
    "within",
]
