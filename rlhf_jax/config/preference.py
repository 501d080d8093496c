"""Settings of preference optimization, and its methods as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rlhf_jax.config.checks import at_least, hinted
from rlhf_jax.config.run import LoraConfig, OptimConfig, RowsConfig
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of preference optimization.

    Attributes:
      loss: name of its loss in losses.py, a function of the numbers of a chosen and a rejected response.
      settings: keywords of the loss, each a field of `PreferenceConfig`, with the method's defaults.
      reference: True if the numbers are log-ratios to the reference model; False if they are log-probabilities.
      per_token: True if the numbers are means over the response's tokens, not sums.
      sft_coef: default weight of the chosen response's negative log-likelihood per token.
      unpaired: True for a loss of single responses beside a baseline, as `kto_loss`.
    """

    loss: str
    settings: Mapping[str, Any]
    reference: bool = True
    per_token: bool = False
    sft_coef: float = 0.0
    unpaired: bool = False


PreferenceMethod = Literal[
    "dpo", "ipo", "hinge", "robust", "exo", "nca", "apo_zero", "apo_down", "kto", "orpo", "simpo", "cpo"
]
_BETA = {"beta": 0.1}
METHODS: dict[PreferenceMethod, Method] = {
    "dpo": Method("dpo_loss", {**_BETA, "label_smoothing": 0.0, "divergence": "reverse_kl", "alpha": 0.5}),
    "ipo": Method("ipo_loss", _BETA, per_token=True),
    "hinge": Method("hinge_loss", _BETA),
    "robust": Method("robust_dpo_loss", {**_BETA, "label_smoothing": 0.1}),
    "exo": Method("exo_loss", {**_BETA, "label_smoothing": 1e-3}),
    "nca": Method("nca_loss", _BETA),
    "apo_zero": Method("apo_zero_loss", _BETA),
    "apo_down": Method("apo_down_loss", _BETA),
    "kto": Method("kto_loss", {**_BETA, "desirable_weight": 1.0, "undesirable_weight": 1.0}, unpaired=True),
    "orpo": Method("orpo_loss", _BETA, reference=False, per_token=True, sft_coef=1.0),
    "simpo": Method("simpo_loss", {"beta": 2.0, "margin": 1.0}, reference=False, per_token=True),
    "cpo": Method("dpo_loss", {**_BETA, "label_smoothing": 0.0}, reference=False, sft_coef=1.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(RowsConfig):
    """Settings of preference optimization."""

    init: str = hinted("")
    """Initial policy, and reference model if reference is not given: fine-tuned, pretrained, or the policy of a ppo or
    preference run; a run's folder, hf:FOLDER, gguf:FILE or pypi:PACKAGE."""
    reference: str = ""
    """Reference model, if it is not init, with init's architecture; in the same forms as init. orpo, simpo and cpo have
    none."""
    data: tuple[str, ...] = hinted(())
    """Files of comparisons or rankings; all ordered pairs of a ranking count, with one weight a prompt."""
    method: PreferenceMethod = "dpo"
    """Method. With a reference model: dpo, ipo, hinge (SLiC), robust (DPO with noisy labels), exo, nca, apo_zero,
    apo_down, kto (its unpaired loss on both responses of a pair). Without: orpo, simpo, cpo."""
    beta: float | None = hinted(None, "default: by method")
    """β of the method's loss; 0.1 by default, 2 for simpo. Larger stays closer to the reference model."""
    label_smoothing: float | None = hinted(None, "default: by method")
    """Probability that a label is wrong, for dpo (cDPO), robust, exo and cpo; 0 by default, 0.1 for robust, 0.001 for
    exo."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = hinted(None, "default: reverse_kl")
    """Divergence from the reference model that dpo bounds (f-DPO)."""
    alpha: float | None = hinted(None, "default: 0.5")
    """α of divergence alpha: towards 0 the reverse KL, 1 is the forward KL."""
    margin: float | None = hinted(None, "default: 1")
    """Target margin γ of simpo."""
    desirable_weight: float | None = hinted(None, "default: 1")
    """Weight of the chosen responses in kto."""
    undesirable_weight: float | None = hinted(None, "default: 1")
    """Weight of the rejected responses in kto."""
    sft_coef: float | None = hinted(None, "default: by method")
    """Weight of the chosen response's negative log-likelihood per token, added to the loss; 1 for orpo and cpo, else 0
    by default."""
    optimizer: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(learning_rate=1e-4))
    """AdamW and its learning-rate schedule; 5e-7 to 5e-6 for published models of billions of parameters."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Low-rank adapters, trained instead of all parameters; the reference model then shares their base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        method = METHODS[self.method]
        for field in _COEFFICIENTS - set(method.settings):
            if vars(self)[field] is not None:
                readers = [name for name, each in METHODS.items() if field in each.settings]
                raise UserError(
                    f"{field}: expected none with method {self.method}, which does not read it, got "
                    f"{vars(self)[field]}; methods with it: {', '.join(readers)}"
                )
        if self.reference and not method.reference:
            raise UserError(f"reference: expected none with method {self.method}, which has none, got {self.reference}")
        if self.alpha is not None and self.divergence != "alpha":
            raise UserError(f"alpha: expected none without divergence alpha, got {self.alpha}")
        for field, value in self.coefficients.items():
            low = field in ("beta", "alpha") or (field == "label_smoothing" and self.method == "exo")
            if isinstance(value, float) and not (value > 0 if low else value >= 0):
                raise UserError(f"{field}: expected {'more than 0' if low else '0 or more'}, got {value}")
        smoothing = self.coefficients.get("label_smoothing", 0.0)
        if not smoothing < 0.5:
            raise UserError(f"label_smoothing: expected less than 0.5, got {smoothing}")
        at_least(self, "sft_coef", 0)

    @property
    def coefficients(self) -> dict[str, Any]:
        """Keywords of the method's loss: those given, else the method's defaults."""
        given = vars(self)
        return {
            field: default if given[field] is None else given[field]
            for field, default in METHODS[self.method].settings.items()
        }

    @property
    def likelihood_weight(self) -> float:
        """Weight of the chosen response's negative log-likelihood."""
        return METHODS[self.method].sft_coef if self.sft_coef is None else self.sft_coef


_COEFFICIENTS = {field for method in METHODS.values() for field in method.settings}
