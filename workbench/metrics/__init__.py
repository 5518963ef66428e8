"""Pure statistics on scores: metrics, paired changes, intervals and what makes them narrower."""
