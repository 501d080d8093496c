"""Trainers of the four stages: run(config) reads files, writes a run folder and resumes from its latest checkpoint."""
