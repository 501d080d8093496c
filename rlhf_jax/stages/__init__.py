"""The stages of the recipe, each with Config, objective, make_update and run."""
