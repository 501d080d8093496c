"""A new loss, tried on a tiny reward model: a hinge on the margin in place of -log σ(r_w - r_l).

python examples/new_loss.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import ModelConfig, OptimConfig, Transformer, batch_at, init_params, make_optimizer, masked_mean
from rlhf_jax.data import RankingRows
from rlhf_jax.evaluation.heldout import pair_accuracy, scores_of
from rlhf_jax.logprobs import ranking_scores
from rlhf_jax.losses import ordered_pairs, ranking_loss
from rlhf_jax.optim import global_count, gradient_step, new_state


def hinge_loss(scores, ranks, mask):
    """max(0, 1 - (r_w - r_l)), averaged over a prompt's ordered pairs: [B, K] in, [B] out, as `ranking_loss`."""
    wins = ordered_pairs(ranks, mask)
    loss = jnp.maximum(0.0, 1.0 - (scores[:, :, None] - scores[:, None, :]))
    return jnp.sum(jnp.where(wins, loss, 0.0), axis=(1, 2)) / jnp.maximum(jnp.sum(wins, axis=(1, 2)), 1)


def train(loss, rows, steps):
    """Train a reward model with a loss; returns it with its parameters."""
    model = Transformer(ModelConfig(vocab_size=32, context=16, width=32, layers=1, heads=2), scalar=True)
    optimizer = make_optimizer(OptimConfig(learning_rate=3e-3), steps)

    @jax.jit
    def update(state, batch):
        useful_B = jnp.any(ordered_pairs(batch.ranks_BK, batch.mask_BK), axis=(1, 2))

        def objective(params, part, key):
            loss_B = loss(ranking_scores(model, params, part), part.ranks_BK, part.mask_BK)
            return masked_mean(loss_B, useful_B, count=global_count(useful_B)), {}

        return gradient_step(state, objective, batch, optimizer)

    params = init_params(model, jax.random.key(0))
    state = new_state(params, optimizer.init(params), seed=0)
    for step in range(steps):
        state, _ = update(state, batch_at(rows, batch_size=32, seed=0, step=step))
    return model, state.params


def main(steps=200):
    """Compare both losses on rows of random tokens, of which the one with more of token 7 is better."""
    tokens = np.random.default_rng(0).integers(1, 16, (1024, 2, 12))
    sevens = (tokens == 7).sum(axis=2)
    ranks = 1 + (sevens[:, None, :] > sevens[:, :, None]).sum(axis=2)  # equal numbers are ties
    everything = [([row.tolist() for row in pair], rank.tolist()) for pair, rank in zip(tokens, ranks)]
    training, heldout = (RankingRows(part, limit=12) for part in (everything[:768], everything[768:]))
    for loss in (ranking_loss, hinge_loss):
        accuracy, pairs = pair_accuracy(scores_of(*train(loss, training, steps), heldout), ranks[768:], ranks[768:] > 0)
        print(f"{loss.__name__}: {accuracy:.2f} of {pairs} held-out pairs in the right order")


if __name__ == "__main__":
    main()
