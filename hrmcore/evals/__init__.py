"""Evaluation: generated reasoning tasks, external suites and record files, scored on any engine."""
