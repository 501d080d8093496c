"""The recipe as one program on the embedded default: sizes, simulated labels, figures, tables."""
