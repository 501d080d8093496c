"""The four stages as pure functions; each module has Config, objective and make_update."""
