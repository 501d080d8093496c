"""Flags of TRL and transformers, and the flags here that do the same."""

from __future__ import annotations

from collections.abc import Collection

# The first of the flags that the command has is suggested.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "adam-beta1": ("--optimizer.beta1", "--policy.beta1"),
    "adam-beta2": ("--optimizer.beta2", "--policy.beta2"),
    "adam-epsilon": ("--optimizer.epsilon", "--policy.epsilon"),
    "base-model": ("--init",),
    "batch-size": ("--batch",),
    "beta": ("--kl-coef",),
    "cliprange": ("--clip",),
    "cliprange-value": ("--value-clip",),
    "dataset": ("--data",),
    "dataset-name": ("--data",),
    "dataset-path": ("--data",),
    "dataset-train-split": ("--data",),
    "dataset-test-split": ("--heldout",),
    "eval-dataset": ("--heldout",),
    "cpo-alpha": ("--sft-coef",),
    "epsilon-high": ("--clip-high",),
    "eval-steps": ("--eval-every",),
    "f-divergence-type": ("--divergence",),
    "gradient-accumulation-steps": ("--microbatches",),
    "gradient-checkpointing": ("--model.remat",),
    "init-kl-coef": ("--kl-coef",),
    "kl-penalty": ("--kl-coef",),
    "lam": ("--episode.gae-lambda",),
    "logging-steps": ("--log-every",),
    "lora-alpha": ("--lora.alpha",),
    "lora-r": ("--lora.rank",),
    "lora-rank": ("--lora.rank",),
    "lora-target-modules": ("--lora.targets",),
    "loss-type": ("--method", "--policy-loss"),
    "lr": ("--learning-rate", "--optimizer.learning-rate"),
    "lr-scheduler-type": ("--optimizer.schedule", "--policy.schedule"),
    "max-completion-length": ("--episode.response-length",),
    "max-grad-norm": ("--optimizer.clip-norm", "--policy.clip-norm"),
    "max-length": ("--max-tokens", "--row-length", "--prompt-length"),
    "max-new-tokens": ("--episode.response-length",),
    "max-prompt-length": ("--prompt-length",),
    "max-seq-length": ("--max-tokens", "--row-length", "--prompt-length"),
    "max-steps": ("--steps",),
    "model": ("--init",),
    "model-name": ("--init",),
    "model-name-or-path": ("--init",),
    "num-epochs": ("--epochs",),
    "num-generations": ("--samples-per-prompt",),
    "num-mini-batches": ("--minibatches",),
    "num-ppo-epochs": ("--epochs",),
    "num-train-epochs": ("--epochs", "--steps"),
    "output-dir": ("--out",),
    "packing": ("--pack",),
    "peft-model-id": ("--init",),
    "per-device-eval-batch-size": ("--batch",),
    "per-device-train-batch-size": ("--batch",),
    "policy-model": ("--init",),
    "ref-model": ("--reference",),
    "report-to": ("--tensorboard",),
    "response-length": ("--episode.response-length",),
    "reward-model-name-or-path": ("--reward",),
    "reward-model-path": ("--reward",),
    "reward-model": ("--reward",),
    "rpo-alpha": ("--sft-coef",),
    "run-name": ("--name",),
    "save-steps": ("--save-every",),
    "save-total-limit": ("--keep-last",),
    "simpo-gamma": ("--margin",),
    "sft-model-path": ("--init",),
    "total-episodes": ("--steps",),
    "train-batch-size": ("--batch",),
    "train-file": ("--data",),
    "train-dataset": ("--data",),
    "use-peft": ("--lora.rank",),
    "validation-file": ("--heldout",),
    "vf-coef": ("--value-coef",),
    "wandb-project": ("--wandb",),
    "warmup-ratio": ("--optimizer.warmup-fraction", "--policy.warmup-fraction"),
}
NOTES = {
    "gradient-accumulation-steps": "; it splits --batch, which stays the same",
    "per-device-train-batch-size": ", which counts the rows over all devices and microbatches",
    "use-peft": " 8, or another rank",
    "packing": " with the row length in tokens",
    "total-episodes": ", in iterations of --batch episodes each",
    "dataset-name": " with a JSONL file",
}


def suggestion(flag: str, known: Collection[str]) -> str | None:
    """The flag here that does what a flag of another library does, with a note; None without one.

    Args:
      flag: the flag that was given, with its leading hyphens.
      known: flags of the command.
    """
    name = flag.lstrip("-").replace("_", "-").lower()
    ours = next((ours for ours in OTHER_NAMES.get(name, ()) if ours in known), None)
    return None if ours is None else ours + NOTES.get(name, "")
