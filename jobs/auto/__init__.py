"""The recipe `auto`: what layers would cost, candidates measured on held-out train data, the best one published."""
