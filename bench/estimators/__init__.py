"""What the options of the likelihood estimators cost and bring: variance against work, and the defaults that follow."""
