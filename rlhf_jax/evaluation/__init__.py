"""Evaluation: held-out losses, reward-model accuracy, win rates, the HTML report."""
