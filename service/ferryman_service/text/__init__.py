"""From text to subwords and back: what training and serving must do alike. No torch here."""
