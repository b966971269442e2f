"""Facial-expression recognition: data, models, losses, training, evaluation. Knows no pipeline framework."""
