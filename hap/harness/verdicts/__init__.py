"""From runs to verdicts: measured values, bounds over seeds, claims judged."""
