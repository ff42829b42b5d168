"""Tables, figures, VERDICTS.md and index.html, written from records."""
