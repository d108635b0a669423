"""AlpacaFarm in miniature: a small world in which everything the paper measures can be measured on a laptop."""
