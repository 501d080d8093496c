"""The film task: a published model, people's ratings of sentences about films, and a judge kept apart from training."""
