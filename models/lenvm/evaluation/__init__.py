"""Evaluations: each module turns samples into the figures of one report (DESIGN section 7)."""
