"""What is learnt: one file for each objective, with its options' class and its record."""
