"""The full recipe as one program on the embedded corpus: sizes, simulated labels, measurements, tables."""
