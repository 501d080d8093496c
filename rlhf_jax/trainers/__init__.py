"""run(config) of each stage: files in, a run folder out, resumed where an earlier start stopped."""
