"""Human feedback: from a person's judgement to rankings that a reward model learns from."""
