"""Measuring and reporting: statistics, win rates, true KL, judges, factuality, the paper's tables and figures."""
