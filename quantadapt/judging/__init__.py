"""Which of two models answers better: pairs of answers, a model that judges them, people who do."""
