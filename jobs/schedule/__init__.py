"""Declarative schedules: which spec is to run when, with the state of it in the output and none on any machine."""
