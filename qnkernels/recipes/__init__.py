"""The demo: its model, text, trainings, results and picture."""
