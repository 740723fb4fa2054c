"""Speed and memory beside the best alternative, in one run, as ratios."""
