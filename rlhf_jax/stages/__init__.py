"""The four stages as pure functions: Config, objective, make_update."""
