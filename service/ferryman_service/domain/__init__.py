"""What Ferryman is about, in plain Python: recipes, schedules, runs, records, errors. Standard library only."""
