"""From sentences to translations over any decoder: what the training engine and the serving engine share."""
