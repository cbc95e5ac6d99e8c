"""Everything that needs a GPU: python -m bench.gpu first OUT. README.md says what runs, and what the results look like."""
