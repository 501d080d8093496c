"""A reward model from your own comparisons, and the pairs on which it contradicts people most.

python examples/reward_on_comparisons.py --name judge --init runs/answers --data comparisons.jsonl
"""

import sys

import numpy as np

from rlhf_jax import Ledger, read_records
from rlhf_jax.cli.flags import parse
from rlhf_jax.data import encode_rankings
from rlhf_jax.evaluation.heldout import scores_of
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.trainers import reward


def main(arguments):
    """Take the flags of `rlhf-jax reward`."""
    config = parse(reward.Config, arguments)
    summary = reward.run(config).summary  # resumes, or returns at once if the run is finished
    if summary["heldout_accuracy"] is not None:
        print(f"held-out accuracy {summary['heldout_accuracy']:.2f} on {summary['heldout_pairs']} pairs")

    # Baseline: how far does length alone go?
    records = read_records(config.data, "comparisons", Ledger())
    pairs = [record for record in records if hasattr(record, "chosen")]  # the files may hold rankings too
    longer = np.mean([len(pair.chosen) > len(pair.rejected) for pair in pairs])
    print(f"the longer response is preferred in {longer:.0%} of {len(pairs)} pairs")

    # The scores of every pair, [pairs, 2], the chosen response first.
    judge = open_source(str(config.folder), stages=("reward",))
    rows = encode_rankings(pairs, judge.tokenizer, max_tokens=judge.model.context, ledger=Ledger())
    scores = scores_of(judge.network(), judge.params(), rows)
    margin = scores[:, 0] - scores[:, 1]
    print(f"in the order of people: {np.mean(margin > 0):.0%}; the most contrary pairs, worth reading:")
    for place in np.argsort(margin)[:5]:
        pair = rows.sources[place]
        print(f"{margin[place]:+.2f}  {pair.where}\n  people: {pair.chosen.strip()}\n  model:  {pair.rejected.strip()}")


if __name__ == "__main__":
    main(sys.argv[1:])
